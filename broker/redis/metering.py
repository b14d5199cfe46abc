"""What only a fleet's store and bus count, as metrics."""

from __future__ import annotations

from broker.bus_redis import BusStats
from broker.metrics import Metrics
from broker.redis.engine import RedisStats


def count_redis(metrics: Metrics, redis: RedisStats, bus: BusStats) -> None:
    metrics.read_counter("redis_calls", "Calls that Redis answered.", lambda: redis.calls)
    metrics.gauge("redis_calls_waiting", "Calls without an answer.", lambda: redis.pending)
    metrics.gauge("redis_bytes_waiting", "Bytes of calls without an answer.", lambda: redis.pending_bytes)
    metrics.read_counter(
        "redis_calls_redirected",
        "Calls that met a server that was not the one for them.",
        lambda: redis.redirected,
    )
    metrics.read_counter(
        "redis_connections_lost", "Connections to Redis that ended.", lambda: redis.lost_connections
    )
    metrics.read_counter("doorbells_rung", "Doorbells published, once for each node.", lambda: bus.rung)
    metrics.read_counter("doorbells_dropped", "Doorbells that could not be published.", lambda: bus.dropped)
    metrics.read_counter("doorbells_heard", "Messages of the bus that came.", lambda: bus.heard)
    metrics.read_counter("doorbells_repeated", "Messages that came again.", lambda: bus.repeated)
    metrics.read_counter("doorbells_missed", "Times that something was not heard.", lambda: bus.missed)
