"""Pushes to random devices online, each durable: 2,000 single ones a second over HTTP, due time to arrival; then
batches, as many as go through.

Of the batches the clock stops when the server's report says "delivered" of the pushes of the last one: accepted,
sent, acknowledged and recorded.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

import orjson

from loadtest.ledger import alert
from loadtest.publishing import BATCH, batch_body, check_batch, keep_in_flight, quantile
from loadtest.report import Load, Row
from loadtest.scenarios.broadcast import REPORT_PAGE, wait_for_report
from loadtest.stage import Cast, Meter, Stage, cast

RATE = 2000.0
BATCHES_IN_FLIGHT = 4
MS = 1000.0


def targeted(stage: Stage) -> list[Row]:
    population = stage.population(stage.plan.devices)
    devices = range(stage.plan.online_for_targeted)
    with stage.server(population) as server, cast(server, population, len(devices)) as cast_:
        cast_.fleet.connect(devices)
        push_for(cast_, 1.0)  # warm
        return [*_singles(stage, cast_), *_batches(stage, cast_)]


def _singles(stage: Stage, cast_: Cast) -> list[Row]:
    medians: list[float] = []
    worst: list[float] = []
    loads: list[Load] = []
    for run in range(stage.plan.runs):
        meter = Meter(cast_.server.pid)
        with stage.profiled(cast_.server, f"targeted-{run}"), meter.running():
            latencies = push_for(cast_, stage.plan.seconds)
        medians.append(quantile(latencies, 0.5) * MS)
        worst.append(quantile(latencies, 0.99) * MS)
        loads.append(meter.load)
        stage.say(f"targeted: p50 {medians[-1]:.2f}, p99 {worst[-1]:.2f} ms")
    name = f"targeted: {RATE:,.0f} pushes a second, {cast_.fleet.online:,} devices online"
    note = cast_.ledger.errors() or "none lost"
    return [
        Row(f"{name}: p50", "ms", medians, at_most=1.5, loads=loads, note=note),
        Row(f"{name}: p99", "ms", worst, at_most=5.0, loads=loads),
    ]


def _batches(stage: Stage, cast_: Cast) -> list[Row]:
    rates: list[float] = []
    costs: list[float] = []
    loads: list[Load] = []
    for run in range(stage.plan.runs):
        meter = Meter(cast_.server.pid)
        with stage.profiled(cast_.server, f"through-{run}"), meter.running():
            count, seconds = _push_through(cast_, stage.plan.seconds)
        rates.append(count / seconds)
        costs.append(meter.server_cpu / count * 1e6)
        loads.append(meter.load)
        stage.say(f"through to devices: {rates[-1]:,.0f} pushes/s")
    name = f"through: batches of {BATCH:,}, {BATCHES_IN_FLIGHT} in flight, to {cast_.fleet.online:,} devices"
    note = cast_.ledger.errors() or "none lost"
    return [
        Row(name, "/s", rates, at_least=40_000, loads=loads, note=note),
        Row(f"{name}: server CPU for each", "µs", costs),
    ]


def _push_through(cast_: Cast, seconds: float) -> tuple[int, float]:
    """Pushes, and seconds until all of them were recorded as delivered."""
    last = b""

    def check(status: int, body: bytes) -> None:
        nonlocal last
        check_batch(status, body)
        last = body

    started = time.perf_counter()
    answered, _ = keep_in_flight(cast_.pool, _requests(cast_), check, BATCHES_IN_FLIGHT, seconds)
    cast_.reactor.run_until(lambda: not cast_.ledger.missing, "all pushes arrived")
    msg_ids = [row["msg_id"] for row in orjson.loads(last).values()]
    wait_for_report(cast_, msg_ids[-REPORT_PAGE:], 1)
    return answered * BATCH, time.perf_counter() - started


def _requests(cast_: Cast) -> Iterator[bytes]:
    """Built when they are sent: a serial is awaited from then on."""
    chooser = random.Random(3)
    names = cast_.population.names
    while True:
        items = []
        for device in chooser.choices(range(cast_.fleet.online), k=BATCH):
            serial = cast_.ledger.add_targeted(device)
            items.append((f"through-{serial}", names[device], alert(serial, cast_.msg_id_digits)))
        yield cast_.pool.build("POST", "/v3/push/batch/regid/single", batch_body(items))


def push_for(cast_: Cast, seconds: float, devices: Sequence[int] = ()) -> list[float]:
    """Latencies of the pushes of that time, to these devices or to all, all of which have arrived."""
    cast_.ledger.latencies.clear()
    publisher = cast_.open_loop(devices or range(cast_.fleet.online), RATE)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        cast_.reactor.turn(publisher.send_due())
    cast_.reactor.run_until(lambda: not cast_.ledger.missing, "all targeted pushes arrived")
    return list(cast_.ledger.latencies)
