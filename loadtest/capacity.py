"""How much of everything a fleet needs, from what one costs: the model behind `holdfast capacity`, docs/capacity.md.

It multiplies measured costs by rates, divides by what a machine or a Redis shard may be used for, and rounds up.
Rates are those of the busy hour. A broadcast to everybody must be over within a given time, which is what most cores
are for. What it assumes and does not know is marked: a constant without a date was not measured.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from math import ceil
from typing import Final

import msgspec

DAY: Final = 86_400.0
US: Final = 1e-6
GB: Final = 1 << 30
HEADERS: Final = 90  # of a packet: Ethernet with its gap 38, IPv4 20, TCP with time stamps 32
PUBLISH: Final = 10  # MQTT's own bytes around a push
ACK: Final = HEADERS + 4
PING: Final = 2 * (HEADERS + 2)  # and its answer


class Constant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    what: str
    unit: str
    value: float
    date: str = ""  # "": not measured yet
    command: str = ""


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured once, as a whole, and what of it the model says too: see `predict`."""

    name: str
    date: str
    command: str
    devices: int  # all online
    processes: int
    cores: float  # that the server had
    measures: Mapping[str, float]


class Knowledge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """capacity.toml."""

    constant: Mapping[str, Constant]
    point: tuple[Point, ...] = ()

    def __getitem__(self, name: str) -> float:
        return self.constant[name].value


def read_knowledge() -> Knowledge:
    return msgspec.convert(tomllib.loads(files("loadtest").joinpath("capacity.toml").read_text()), Knowledge)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked of a fleet, and of what it is to be made."""

    devices: int  # registered
    pushes_per_day: float = 500e6  # as devices get them
    online: float = 0.3  # share of the devices
    targeted: float = 0.5  # share of the pushes that are for one device; the others are of broadcasts
    peak: float = 4.0  # the busy hour, against the mean of the day
    broadcast_within: float = 60.0  # seconds for one to everybody online
    payload: int = 250  # bytes
    keep_alive: float = 240.0  # seconds
    connects_per_day: float = 8.0  # of a device that is online: networks change, phones sleep
    waiting: float = 2.0  # pushes that wait for a device, on average
    report_days: float = 1.0  # for which it is told what became of a push
    largest_app: float = 1.0  # its share of everything
    process_devices: int = 20_000  # of one node process: what one death moves
    machine_cores: int = 16
    machine_memory: float = 64.0  # GB
    regions: int = 3
    use: float = 0.5  # share of cores and memory that is used in the busy hour: the rest is for failures
    shard_memory: float = 16.0  # GB of data in one Redis


@dataclass(frozen=True, slots=True)
class Limit:
    """Something that more machines do not raise."""

    what: str
    used: float  # share of it; above 1 it is what breaks
    remedy: str


class Model:
    """A fleet for a demand. Rates are a second, of the busy hour; memory is bytes."""

    def __init__(self, knowledge: Knowledge, demand: Demand) -> None:
        self.knowledge = knowledge
        self.demand = demand
        pushes = demand.pushes_per_day / DAY * demand.peak
        self.online = demand.devices * demand.online
        self.pushes = pushes * demand.targeted  # targeted
        self.deliveries = max(pushes - self.pushes, self.online / demand.broadcast_within)  # of broadcasts
        self.connects = self.online * demand.connects_per_day / DAY * demand.peak
        self.pings = self.online / demand.keep_alive

    # Nodes

    @property
    def busy_cores(self) -> float:
        """Of nodes and brokers."""
        know = self.knowledge
        return US * (
            self.pushes * know["push_node"]
            + self.deliveries * know["delivery_node"]
            + self.connects * know["connect_node"]
            + self.pings * know["ping_node"]
        )

    @property
    def cores(self) -> int:
        return ceil(self.busy_cores / self.demand.use)

    @property
    def processes(self) -> int:
        return max(ceil(self.online / self.demand.process_devices), self.cores)

    @property
    def memory(self) -> float:
        """Kernel included."""
        know = self.knowledge
        each = know["node_memory"] + know["kernel_memory"]
        return self.online * each + self.processes * know["process_memory"]

    @property
    def machines(self) -> int:
        """At least two: one may die."""
        demand = self.demand
        by_memory = self.memory / demand.use / (demand.machine_memory * GB)
        return max(2, ceil(by_memory), ceil(self.cores / demand.machine_cores))

    # Redis

    @property
    def redis_cores(self) -> float:
        know = self.knowledge
        return US * (
            self.pushes * know["push_redis"]
            + self.deliveries * know["delivery_redis"]
            + self.connects * know["connect_redis"]
            + self.processes * know["beat_redis"]
        )

    @property
    def registry(self) -> float:
        """Redis' memory for devices and what waits for them."""
        know, demand = self.knowledge, self.demand
        return demand.devices * (know["device_redis"] + demand.waiting * know["waiting_redis"])

    @property
    def reports(self) -> float:
        """Redis' memory for pushes that are reported."""
        demand = self.demand
        kept = demand.pushes_per_day * demand.targeted * demand.report_days
        return kept * self.knowledge["push_kept_redis"]

    @property
    def shards(self) -> int:
        """Masters: one thread each."""
        by_memory = (self.registry + self.reports) / (self.demand.shard_memory * GB)
        return max(1, ceil(by_memory), ceil(self.redis_cores / self.demand.use))

    # The network

    @property
    def bits_out(self) -> float:
        """To devices."""
        push = self.demand.payload + PUBLISH + HEADERS
        return 8 * ((self.pushes + self.deliveries) * push + self.pings * PING / 2)

    @property
    def bits_in(self) -> float:
        return 8 * ((self.pushes + self.deliveries) * ACK + self.pings * PING / 2)

    # When something dies

    def back_after(self, devices: float, cores: float, shards: float) -> float:
        """Seconds until so many devices are back on what is left, which has the rest of its busy hour to do."""
        know, use = self.knowledge, self.demand.use
        by_nodes = cores * (1 - use) / (know["connect_node"] * US)
        by_redis = shards * (1 - use) / (know["connect_redis"] * US)
        return devices / min(by_nodes, by_redis)

    @property
    def process_death(self) -> tuple[float, float]:
        """Devices that have to come back, and seconds."""
        devices = self.online / self.processes
        return devices, self.back_after(devices, self.cores - 1 if self.cores > 1 else 1, self.shards)

    @property
    def region_death(self) -> tuple[float, float]:
        """One of `regions`, Redis included: its masters' replicas are elsewhere."""
        left = 1 - 1 / self.demand.regions
        devices = self.online / self.demand.regions
        return devices, self.back_after(devices, self.cores * left, self.shards * left)

    # What does not grow with the machines

    @property
    def limits(self) -> list[Limit]:
        """The first is what breaks first."""
        found = [self._app_log(), self._bitmaps(), self._table(), self._reports_share(), self._storm()]
        return sorted(found, key=lambda limit: -limit.used)

    def _app_log(self) -> Limit:
        used = self.pushes * self.demand.largest_app / self.knowledge["app_pushes"]
        return Limit("the log of the largest app", used, "split its log by audience; batches")

    def _bitmaps(self) -> Limit:
        """A broadcast to a random half: each process reads the row's bitmap from one shard, at 1 GB/s."""
        seconds = self.processes * self.demand.devices * self.demand.largest_app / 8 / 1e9
        remedy = "devices of a partition on few nodes; a machine reads once for its processes"
        return Limit(
            "a broadcast's bitmap, read by every process", seconds / self.demand.broadcast_within, remedy
        )

    def _table(self) -> Limit:
        """All processes are restarted within an hour: each leaves and joins, and all read the table each time."""
        size = 2 * self.processes**3 * self.knowledge["table_entry"] / 3600
        return Limit(
            "the table of nodes, in a rolling restart", size / 1e9, "larger processes; tell changes only"
        )

    def _reports_share(self) -> Limit:
        used = self.reports / (self.registry + self.reports)
        return Limit(
            "reports, as a share of Redis' memory", used, "a shorter store.report_lifetime; a column store"
        )

    def _storm(self) -> Limit:
        """A region's devices are back within five minutes."""
        return Limit("a region's death", self.region_death[1] / 300, "longer jitter; more shards")


# Against what was measured


def predict(knowledge: Knowledge, point: Point) -> dict[str, float]:
    """What the model says of a point, by the names of its measures."""
    return {
        "node_memory": point.devices * knowledge["node_memory"]
        + point.processes * knowledge["process_memory"],
        "kernel_memory": 2 * point.devices * knowledge["kernel_memory"],  # both ends on one machine
        "redis_memory": point.devices * knowledge["device_redis"],
        "broadcast_seconds": point.devices * _cost(knowledge, "delivery") / point.cores,
        "connects_per_second": point.cores / _cost(knowledge, "connect"),
    }


def _cost(knowledge: Knowledge, what: str) -> float:
    """Seconds of a core for one, of all that share a machine in a test."""
    return US * sum(knowledge[f"{what}_{whose}"] for whose in ("node", "redis", "generator"))


def check(knowledge: Knowledge) -> Iterator[tuple[Point, str, float, float]]:
    """Each measure of each point: its name, what was measured, what the model says."""
    for point in knowledge.point:
        said = predict(knowledge, point)
        for name, measured in point.measures.items():
            yield point, name, measured, said[name]
