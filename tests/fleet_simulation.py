"""Gateways, brokers, devices and publishers of one app in a `fleet_machine`: what happens to them, what must hold.

A seed decides everything. `simulate(seed)` returns what was wrong. By hand, and for many seeds:

    PYTHONHASHSEED=0 python tests/fleet_simulation.py 0 1000           # these seeds; prints those that fail
    PYTHONHASHSEED=0 python tests/fleet_simulation.py --trace 17       # one seed, told event by event

What is checked, from what devices and publishers saw (the guarantees: README, G1 to G5):

G1  Every push that was answered is in the store in the end, with its targets, once.
G2  Each of its targets that comes back has got it, unless it was evicted, recalled or expired. A device that stays
    connected gets it without coming back, within the time that `SETTLED` gives.
G3  On each connection msg_ids grow, and none comes twice.
G4  The states of all targets add up. Who has not acknowledged on a connection that was its newest is not delivered.
G5  In the end each device has one connection, where the store has its route.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final

if __name__ == "__main__":  # by hand: `broker` is not `tests/broker`, and `tests` is nobody else's package
    _here = Path(__file__).resolve().parent
    sys.path[0] = str(_here.parent)
    sys.modules["tests"] = ModuleType("tests")
    sys.modules["tests"].__path__ = [str(_here)]

import orjson
from pyroaring import BitMap

from broker.audiences.devices import Devices
from broker.carriers.catalog import Carriers
from broker.limits import Limits
from broker.metrics import Metrics
from broker.model import (
    App,
    Appended,
    DeliveryState,
    MessageRecord,
    NewDevice,
    NewMessage,
    NodeInfo,
    RecordChange,
    Withdrawn,
)
from broker.pushing.pushes import Pushes
from broker.store import StoreError
from broker.store_redis import RedisStore
from broker.telling.reports import Reports
from broker.tenants import tokens
from broker.tenants.apps import Apps
from gateway import fanout
from gateway.connection import Connection, Phase
from gateway.membership import Membership
from gateway.mqtt import Connack, Connect, Disconnect, Puback, Publish, decode, encode
from gateway.node import Node, NodeSettings
from tests.fleet_machine import OF_THE_DEAD, START, Machine, Process, RedisBehind

URL: Final = "redis://127.0.0.1:6379"  # of the machine's Redis, whatever it says
DAY: Final = 86_400.0
PATIENCE: Final = 5.0  # seconds that a device waits for CONNACK
SETTLED: Final = 20.0  # seconds after everything is whole again in which the fleet must have caught up
MAX_PACKET: Final = 1 << 20

REST: Final = 6.5  # seconds that a node takes at most to look up what a device that was elsewhere is owed
PLAN: Final = "plan"  # kind of a record
STARTS: Final = 30.0  # seconds that redis-server has until it listens
NEVER: Final = float("inf")

Wrong = list[str]


# Devices


@dataclass(eq=False)
class Line:
    """One connection of a device, seen from its side."""

    fleet: Fleet
    device: Device
    number: int
    process: Process
    connected_at: float | None = None
    open: bool = True
    got: list[int] = field(default_factory=list)
    patience: float = 0.01  # seconds until it acknowledges; infinite: never
    connection: Connection | None = None
    _buffer: bytearray = field(default_factory=bytearray)
    _arrives: float = 0.0  # the last bytes, at either end

    @property
    def full(self) -> bool:
        """It gets nothing more: it does not acknowledge what it has."""
        return self.patience == NEVER and len(self.got) >= self.device.window

    @property
    def epoch(self) -> int:
        return self.connection.epoch if self.connection is not None else 0

    def dial(self) -> None:
        """In the gateway's loop."""
        node = getattr(self.process, "node", None)
        if node is None:
            self.fleet.machine.after(0.001, self.ended)
            return
        device = self.device
        self.connection = Connection(node, "tcp")
        self.connection.connection_made(_Wire(self))
        token = tokens.issue(self.fleet.app, device.name, device.devno, "other", 0, START, DAY)
        connect = Connect(
            device.name,
            False,
            username=self.fleet.app.key,
            password=token.encode(),
            properties={"session_expiry_interval": device.expiry, "receive_maximum": device.window},
        )
        self.send(connect)

    def send(self, packet: Any) -> None:
        self._at_gateway(self._receive, encode(packet, 5))

    def _at_gateway(self, call: Callable[..., object], *arguments: Any) -> None:
        machine = self.fleet.machine
        self._arrives = max(self._arrives, machine.now + machine.latency())
        machine.at(self._arrives, self.process.inject, call, *arguments)

    def _receive(self, data: bytes) -> None:
        if self.connection is not None and self.connection.phase is not Phase.CLOSED:
            self.connection.data_received(data)

    def heard(self, data: bytes) -> None:
        if not self.open:
            return
        self._buffer += data
        while (found := decode(self._buffer, 0, 5, MAX_PACKET)) is not None:
            packet, end = found
            del self._buffer[:end]
            self._take(packet)

    def _take(self, packet: Any) -> None:
        match packet:
            case Connack():
                if packet.reason == 0:
                    self.connected_at = self.fleet.machine.now
                    self.fleet.tell(f"{self} is connected")
                else:
                    self.fleet.tell(f"{self} is refused: {packet.reason}")
                    self.ended()
            case Publish():
                self._push(packet)
            case Disconnect():
                self.fleet.tell(f"{self} is told to go: {packet.reason}")
                self.ended()

    def _push(self, packet: Publish) -> None:
        message = orjson.loads(packet.payload)
        msg_id = int(message["msg_id"])
        self.fleet.tell(f"{self} gets {msg_id}")
        if self.got and msg_id <= self.got[-1]:
            self.fleet.wrong.append(f"G3: {self} got {msg_id} after {self.got[-1]}")
        self.got.append(msg_id)
        self.device.received(msg_id, message)
        if self.patience < NEVER:
            self.fleet.machine.after(
                self.patience * self.fleet.dice.random(), self.acknowledge, msg_id, packet.packet_id
            )

    def acknowledge(self, msg_id: int, packet_id: int) -> None:
        if self.open:
            self.device.acknowledged(self, msg_id)
            self.send(Puback(packet_id))

    def ended(self) -> None:
        """The device knows that it is over."""
        if self.open:
            self.open = False
            self.fleet.tell(f"{self} is over")
            self.hang_up()
            self.device.lost(self)

    def hang_up(self) -> None:
        """Its socket is closed; the gateway hears of it, if it lives."""
        self.open = False
        self._at_gateway(self._lost)

    def _lost(self) -> None:
        if self.connection is not None:
            self.connection.connection_lost(None)

    def __repr__(self) -> str:
        return f"{self.device.name}/{self.number}@{self.process.name}"


class _Wire(asyncio.Transport):
    """A gateway's end of a line."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line
        self._machine = line.fleet.machine
        self._closed = False
        self._arrives = 0.0

    def write(self, data: Any) -> None:
        if not self._closed:
            self._later(self._line.heard, bytes(data))

    def _later(self, call: Callable[..., object], *arguments: Any) -> None:
        machine = self._machine
        self._arrives = max(self._arrives, machine.now + machine.latency())
        machine.at(self._arrives, call, *arguments)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._later(self._line.ended)
            self._line.process.inject(self._line._lost)

    def abort(self) -> None:
        self.close()

    def is_closing(self) -> bool:
        return self._closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("10.0.0.1", 1000 + self._line.device.devno) if name == "peername" else default

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.close()

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


@dataclass(eq=False)
class Device:
    fleet: Fleet
    devno: int
    name: str
    window: int = 16
    expiry: int = 600
    restless: float = 3.0  # seconds between what its owner does, about
    lines: list[Line] = field(default_factory=list)
    numbers: dict[int, set[int]] = field(
        default_factory=dict
    )  # what a push is (its number) -> msg_ids it came by
    has: set[int] = field(default_factory=set)
    truly: set[int] = field(default_factory=set)  # acknowledged while no newer connection was there

    @property
    def line(self) -> Line | None:
        """The newest one."""
        return self.lines[-1] if self.lines else None

    def connect(self) -> None:
        fleet = self.fleet
        gateways = [process for process in fleet.gateways if process.alive]
        if not gateways:
            fleet.machine.after(0.5, self.connect)
            return
        line = Line(fleet, self, len(self.lines), fleet.dice.choice(gateways))
        line.patience = fleet.patience()
        self.lines.append(line)
        fleet.tell(f"{line} connects")
        line._at_gateway(line.dial)
        fleet.machine.after(PATIENCE, self._waited, line)

    def _waited(self, line: Line) -> None:
        if line.open and line.connected_at is None:
            line.ended()

    def lost(self, line: Line) -> None:
        if line is self.line:
            self.fleet.machine.after(self.fleet.dice.choice((0.01, 0.1, 1.0)), self._again, line)

    def _again(self, line: Line) -> None:
        if line is self.line:
            self.connect()

    def act(self) -> None:
        """Something its owner does."""
        fleet, line = self.fleet, self.line
        if fleet.healing:
            return
        fleet.machine.after(fleet.dice.expovariate(1 / self.restless), self.act)
        if line is None or not line.open:
            if line is None or fleet.dice.random() < 0.5:
                self.connect()
            return
        deed = fleet.dice.choice(("leave", "move", "move", "stay", "stay"))
        if deed == "leave":  # and come back when it acts again
            fleet.tell(f"{line} leaves")
            line.hang_up()
        elif deed == "move":  # the old line stays as it is: nobody tells its gateway
            self.connect()

    def received(self, msg_id: int, message: dict[str, Any]) -> None:
        self.has.add(msg_id)
        number = int(message["notification"]["alert"])
        self.numbers.setdefault(number, set()).add(msg_id)

    def acknowledged(self, line: Line, msg_id: int) -> None:
        newer = any(
            other.connected_at is not None
            and other.connected_at < self.fleet.machine.now - self.fleet.scenario.grace
            and other.epoch > line.epoch
            for other in self.lines
        )
        self.fleet.tell(f"{line} acknowledges {msg_id}{' too late' if newer else ''}")
        if not newer:
            self.truly.add(msg_id)


# Publishers


@dataclass(eq=False)
class Publication:
    """One push, tried until it is answered."""

    number: int
    targets: BitMap
    broadcast: bool
    ttl: float
    collapse: str = ""
    replaces: int = 0
    once: bool = True  # with a cid: it is stored once, however often it is tried; else at most so often
    planned: bool = False  # a record is made along with it
    msg_id: int | None = None
    created_at: float = 0.0  # of the first try
    tries: int = 0
    withdrawn: bool = False  # its publisher asked for it
    recalled: bool = False  # and was answered


# Processes


async def open_store(fleet: Fleet, process: Process) -> RedisStore:
    """Tried until it is there: that is what a supervisor does."""
    while True:
        store = RedisStore(URL, clock=process.wall, node_clock=fleet.machine_clock, checked=False)
        try:
            await store.open()
        except StoreError as error:
            fleet.tell(f"{process.name} does not start: {error}")
            await asyncio.sleep(0.5)
        else:
            return store


async def run_gateway(fleet: Fleet, process: Process) -> None:
    store = await open_store(fleet, process)
    bus = store.bus
    limits, metrics = Limits(), Metrics()
    apps = Apps(store, bus, limits)
    devices = Devices(store, bus, limits, process.wall)
    pushes = Pushes(store, bus, limits, process.wall)
    info = NodeInfo(process.name, role="gateway")
    membership = Membership(store.nodes, lambda: info, metrics)
    node = Node(
        NodeSettings(process.name),
        store=store,
        bus=bus,
        apps=apps,
        devices=devices,
        pushes=pushes,
        reports=Reports(store, limits, process.wall),
        carriers=Carriers(),
        metrics=metrics,
        wall=process.wall,
        membership=membership,
    )
    await _join(membership)
    node.start()
    process.node = node  # type: ignore[attr-defined]
    process.store = store  # type: ignore[attr-defined]
    process.metrics = metrics  # type: ignore[attr-defined]
    fleet.tell(f"{process.name} is up, number {store.nodes.number}")


async def _join(membership: Membership) -> None:
    while True:
        try:
            await membership.join()
        except StoreError:
            await asyncio.sleep(0.5)
        else:
            return


async def run_broker(fleet: Fleet, process: Process) -> None:
    store = await open_store(fleet, process)
    info = NodeInfo(process.name, role="broker")
    await _join(Membership(store.nodes, lambda: info, Metrics()))
    process.store = store  # type: ignore[attr-defined]
    fleet.tell(f"{process.name} is up")
    while True:
        await asyncio.sleep(2.0)
        try:
            await store.expire(process.wall())
        except StoreError as error:
            fleet.tell(f"{process.name} removes nothing: {error}")


# What happens


@dataclass(frozen=True, slots=True)
class Scenario:
    """Counts, and rates per second of what goes wrong while the fleet is at work."""

    gateways: int = 2
    brokers: int = 2
    devices: int = 4
    pushes: int = 25
    seconds: float = 8.0
    cuts: float = 0.0  # a process is cut off from Redis
    breaks: float = 0.0  # a connection to Redis breaks
    stops: float = 0.0  # a process is stopped
    longest_stop: float = 3.0
    kills: float = 0.0  # a process is killed, and started anew
    redis_kills: float = 0.0
    slow: float = 0.0
    tampering: float = 0.0
    victims: Sequence[str] = ("gateway", "broker")
    offline_limit: int = 100
    restless: float = 3.0
    patience: Sequence[float] = (0.005, 0.05, 0.05, 1.0, NEVER)  # of devices, before they acknowledge
    grace: float = (
        3.0  # seconds in which an older connection may still be heard: the doorbell of the newer one is on
    )
    # its way, or whoever rings it was stopped
    special: float = 0.2  # share of pushes that replace, collapse, are short-lived


CALM: Final = Scenario()
SCENARIOS: Final[dict[str, Scenario]] = {
    "calm": CALM,
    "slow": Scenario(slow=0.3, breaks=0.3),
    "bus": Scenario(tampering=0.2, slow=0.1),
    "cuts": Scenario(cuts=0.4, breaks=0.4, slow=0.05),
    "stops": Scenario(stops=0.5, seconds=12, tampering=0.02),
    "kills": Scenario(kills=0.3, brokers=2, seconds=12),
    "holders": Scenario(
        stops=1.5,
        longest_stop=9,
        kills=0.5,
        seconds=6,
        victims=("broker",),
        pushes=12,
        special=0.0,
        restless=20,
    ),
    "redis": Scenario(redis_kills=0.2, seconds=10, slow=0.05),
    "restless": Scenario(restless=0.5, gateways=3, slow=0.05, breaks=0.1),
    "overtaken": Scenario(restless=0.7, tampering=0.4, patience=(0.3, 1.0, 2.0), grace=0.05),
    "newest": Scenario(offline_limit=3, restless=1.0, pushes=40, slow=0.05),
    "minute": Scenario(stops=0.15, longest_stop=80, seconds=40, pushes=40, restless=8),
    "everything": Scenario(
        gateways=3,
        cuts=0.15,
        breaks=0.2,
        stops=0.2,
        kills=0.15,
        redis_kills=0.05,
        slow=0.1,
        tampering=0.05,
        seconds=12,
    ),
}


class Fleet:
    """One run."""

    def __init__(self, redis: RedisBehind, seed: int, *, trace: bool = False) -> None:
        self.dice = random.Random(seed)
        names = list(SCENARIOS)
        self.kind = names[seed % len(names)]
        self.scenario = SCENARIOS[self.kind]
        self.machine = Machine(redis, self.dice)
        self.wrong: Wrong = []
        self.healing = False
        self.ending = False
        self.gateways: list[Process] = []
        self.brokers: list[Process] = []
        self.publications: list[Publication] = []
        self.by_id: dict[int, Publication] = {}
        self.records: dict[int, MessageRecord] = {}
        self.app: App
        self.devices: list[Device] = []
        self._trace = trace
        self._names = itertools.count(1)

    def machine_clock(self) -> float:
        """That of Redis."""
        return START + self.machine.now

    def tell(self, what: str) -> None:
        if self._trace:
            _say(f"{self.machine.now:9.4f}  {what}")

    def patience(self) -> float:
        if self.ending:
            return 0.01
        patience = self.dice.choice(self.scenario.patience)
        return min(patience, 0.05) if self.healing and patience < NEVER else patience

    # Processes

    def start(self, kind: str) -> Process:
        skew = self.dice.choice((0.0, 0.0, -0.3, 0.4))
        process = Process(self.machine, f"{kind}-{next(self._names)}", skew)
        self.machine.processes.append(process)
        if kind == "gateway":
            self.gateways.append(process)
            self.spawn(process, run_gateway(self, process))
        elif kind == "broker":
            self.brokers.append(process)
            self.spawn(process, run_broker(self, process))
        return process

    def spawn(self, process: Process, work: Coroutine[Any, Any, Any]) -> None:
        def begin() -> None:
            task = process.loop.create_task(work)
            process.tasks.add(task)
            task.add_done_callback(ended)

        def ended(task: asyncio.Task[Any]) -> None:
            process.tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self.tell(f"{process.name}: {error!r}")
                if self._trace:
                    traceback.print_exception(error)
                self.wrong.append(f"{process.name}: {error!r}")

        process.inject(begin)

    def do(self, work: Coroutine[Any, Any, Any], process: Process, patience: float = 60.0) -> Any:
        """Let time go on until this is done."""
        answer: list[Any] = []

        async def run() -> None:
            answer.append(await work)

        self.spawn(process, run())
        end = self.machine.now + patience
        while not answer:
            assert self.machine.now < end, "it does not end"
            self.machine.run(self.machine.now + 0.05)
        return answer[0]

    # The run

    def run(self) -> Wrong:
        scenario = self.scenario
        observer = self.start("observer")
        self.store = self.do(open_store(self, observer), observer)
        self.app = self.do(self.store.create_app("test", offline_limit=scenario.offline_limit), observer)
        names = [f"d{n}" for n in range(scenario.devices)]
        self.do(self.store.register(self.app.app_id, [NewDevice(name) for name in names]), observer)
        self.devices = [
            Device(self, devno, name, restless=scenario.restless, window=self.dice.choice((1, 3, 16)))
            for devno, name in enumerate(names)
        ]
        for _ in range(scenario.gateways):
            self.start("gateway")
        for _ in range(scenario.brokers):
            self.start("broker")
        self.machine.run(self.machine.now + 1.0)
        self._plan()
        self.machine.run(self.machine.now + scenario.seconds)
        self._heal()
        self._check()
        for process in self._alive():
            for context in process.loop.errors:
                self.wrong.append(
                    f"error in {process.name}: {context.get('message')} {context.get('exception')!r}"
                )
        return self.wrong

    def _plan(self) -> None:
        scenario, machine, dice = self.scenario, self.machine, self.dice
        machine.slow, machine.tampering = scenario.slow, scenario.tampering
        for device in self.devices:
            machine.after(dice.random() * scenario.restless, device.act)
        for number in range(scenario.pushes):
            machine.after(dice.random() * scenario.seconds, self._publish_new, number)
        for rate, fault in (
            (scenario.cuts, self._cut),
            (scenario.breaks, self._break),
            (scenario.stops, self._stop),
            (scenario.kills, self._kill),
            (scenario.redis_kills, self._kill_redis),
        ):
            if rate:
                machine.after(dice.expovariate(rate), self._again, rate, fault)

    def _again(self, rate: float, fault: Callable[[], None]) -> None:
        if not self.healing:
            fault()
            self.machine.after(self.dice.expovariate(rate), self._again, rate, fault)

    def _anyone(self) -> Process | None:
        alive = [one for one in self._alive() if one.name.partition("-")[0] in self.scenario.victims]
        return self.dice.choice(alive) if alive else None

    def _cut(self) -> None:
        process, seconds = self._anyone(), self.dice.choice((0.3, 2.0, 7.0, 14.0))
        if process is None:
            return
        self.tell(f"{process.name} is cut off from Redis for {seconds} s")
        process.cut = self.machine.now + seconds

    def _break(self) -> None:
        links = [link for process in (*self.gateways, *self.brokers) for link in process.links]
        if links:
            link = self.dice.choice(links)
            self.tell(f"a connection of {link.process.name} breaks")
            link.cut("reset by peer")

    def _stop(self) -> None:
        process, seconds = self._anyone(), self.dice.uniform(0.05, self.scenario.longest_stop)
        if process is None:
            return
        self.tell(f"{process.name} is stopped for {seconds:.3f} s")
        process.stopped = self.machine.now + seconds

    def _kill(self) -> None:
        stopped = [one for one in self._alive() if one.stopped > self.machine.now]
        process = self.dice.choice(stopped) if stopped else self._anyone()
        if process is None:
            return
        self.tell(f"{process.name} is killed")
        process.kill()
        kind = process.name.partition("-")[0]
        for device in self.devices:
            for line in device.lines:
                if line.process is process and line.open:
                    self.machine.after(self.machine.latency(), line.ended)
        self.machine.after(self.dice.choice((0.1, 1.0, 3.0)), self.start, kind)

    def _kill_redis(self) -> None:
        seconds = self.dice.choice((0.1, 1.0, 4.0))
        self.tell(f"Redis is away for {seconds} s")
        self.machine.stop_redis(seconds)

    # Publishing

    def _publish_new(self, number: int) -> None:
        dice, scenario = self.dice, self.scenario
        broadcast = dice.random() < 0.4
        count = dice.randrange(2, len(self.devices) + 1) if broadcast else dice.choice((1, 1, 1, 2))
        targets = BitMap(dice.sample(range(len(self.devices)), count))
        publication = Publication(number, targets, broadcast, DAY, once=dice.random() < 0.8)
        if dice.random() < scenario.special:
            special = dice.choice(("short", "collapse", "replaces", "recall", "planned", "planned"))
            answered = [one for one in self.publications if one.msg_id is not None]
            publication.planned = special == "planned"
            if special == "short":
                publication.ttl = dice.choice((0.0, 1.0, 3.0))
            elif special == "collapse":
                publication.collapse = "k"
            elif special == "replaces" and answered:
                publication.replaces = dice.choice(answered).msg_id or 0
            elif special == "recall" and answered:
                self._recall(dice.choice(answered))
        self.publications.append(publication)
        self._try(publication)

    def _try(self, publication: Publication) -> None:
        brokers = [process for process in self.brokers if process.alive and hasattr(process, "store")]
        if not brokers:
            self.machine.after(0.5, self._try, publication)
            return
        publication.tries += 1
        process = self.dice.choice(brokers)
        self.tell(f"{process.name} is asked to push {publication.number}, try {publication.tries}")
        self.spawn(process, self._push(process, publication))
        self.machine.after(8.0, self._answer_late, publication, publication.tries)

    def _answer_late(self, publication: Publication, tries: int) -> None:
        if publication.msg_id is None and publication.tries == tries:
            self._try(publication)

    async def _push(self, process: Process, publication: Publication) -> None:
        now = process.wall()
        publication.created_at = publication.created_at or now
        message = NewMessage(
            self.app.app_id,
            orjson.dumps({"notification": {"alert": str(publication.number)}}),
            publication.targets,
            publication.broadcast,
            now,
            now + publication.ttl,
            cid=f"p{publication.number}" if publication.once else None,
            collapse=publication.collapse,
            replaces=publication.replaces,
        )
        tries = publication.tries
        try:
            (appended,) = await process.store.append([message], _plan(self.app, publication, now))  # type: ignore[attr-defined]
        except StoreError as error:
            self.tell(f"push {publication.number} is not answered: {error}")
            if publication.tries == tries:
                self.machine.after(0.3, self._answer_late, publication, tries)
            return
        self._answered(publication, appended)

    def _answered(self, publication: Publication, appended: Appended) -> None:
        self.tell(
            f"push {publication.number} is {appended.msg_id}{' (repeated)' if appended.repeated else ''}"
        )
        if publication.msg_id not in {None, appended.msg_id}:
            if not publication.once:
                return
            self.wrong.append(f"S6: push {publication.number} is {publication.msg_id} and {appended.msg_id}")
        other = self.by_id.get(appended.msg_id)
        if other not in (None, publication):
            self.wrong.append(
                f"S3: pushes {publication.number} and {other.number} are both {appended.msg_id}"
            )
        publication.msg_id = appended.msg_id
        self.by_id[appended.msg_id] = publication
        self._withdrawn(appended.withdrawn)

    def _withdrawn(self, withdrawn: Sequence[Withdrawn]) -> None:
        for one in withdrawn:
            self.tell(f"{one.msg_id} is taken back from {list(one.devnos)}")

    def _recall(self, publication: Publication) -> None:
        publication.withdrawn = True
        process = self._anyone()
        if process is not None and hasattr(process, "store"):
            self.spawn(process, self._recall_by(process, publication))

    async def _recall_by(self, process: Process, publication: Publication) -> None:
        assert publication.msg_id is not None
        try:
            found = await process.store.recall(self.app.app_id, [publication.msg_id], process.wall())  # type: ignore[attr-defined]
        except StoreError as error:
            self.tell(f"{publication.msg_id} is not recalled: {error}")
        else:
            publication.recalled = True
            self._withdrawn(found)

    # When all is over

    def _heal(self) -> None:
        machine = self.machine
        self.healing = True
        machine.slow = machine.tampering = 0.0
        self.tell("everything is whole again")
        for process in machine.processes:
            process.stopped = machine.now
            if process.cut > machine.now:
                process.cut = machine.now
                for link in list(
                    process.links
                ):  # what was sent over them is planned for when the cut would have ended
                    link.cut("reset by peer")
        for line in (line for device in self.devices for line in device.lines):
            if line.patience < NEVER:
                line.patience = 0.05
        end = machine.now + 60.0
        while any(one.msg_id is None for one in self.publications) or not all(map(_is_up, self._alive())):
            if machine.now > end:
                self.wrong.append("G1: a push is not answered though everything is whole")
                return
            machine.run(machine.now + 0.5)
        self._wait()

    def _wait(self) -> None:
        """Until everybody who is connected and acknowledges has what is owed for sure, not for longer than SETTLED;
        and then a moment."""
        end = self.machine.now + SETTLED
        self.machine.run(self.machine.now + 2.0)
        while self.machine.now < end and not self._is_told():
            self.machine.run(self.machine.now + 0.5)
        self.machine.run(self.machine.now + 1.5)
        while self.ending and self.machine.now < end and self._is_unrecorded():
            self.machine.run(self.machine.now + 0.5)

    def _is_unrecorded(self) -> bool:
        """A node that could not be sure of its lease tries again a few seconds later."""
        self._find_records()
        return any(
            state is DeliveryState.PENDING and one.msg_id in self.devices[devno].has
            for one in self.publications
            for devno, state in self._states(one).items()
        )

    def _is_told(self) -> bool:
        sure = [one for one in self.publications if one.ttl == DAY and not self._may_be_taken_back(one)]
        for device in self.devices:
            line = device.line
            if line is None or not line.open or line.connected_at is None:
                if self.ending:
                    return False
                continue
            if line.full:
                continue
            known = device.truly.union(line.got)
            if any(device.devno in one.targets and one.msg_id not in known for one in sure):
                return False
        return True

    def _alive(self) -> list[Process]:
        return [process for process in (*self.gateways, *self.brokers) if process.alive]

    def _check(self) -> None:
        self._find_records()
        self._check_answered()
        self._check_plans()
        self._check_states()
        self._check_connected()
        self.tell("everybody acknowledges, and comes back")
        self.ending = True
        for device in self.devices:
            for line in device.lines:
                line.patience = 0.01
                if line.open and line is not device.line:
                    line.ended()
        for device in self.devices:
            if (line := device.line) is not None and line.open:
                line.ended()
            else:
                device.connect()
        self._wait()
        if self.machine.counts.get(OF_THE_DEAD):
            self._go_round()
            self._wait()
        self._find_records()
        self._check_everybody_has_it()
        self._check_lines()

    def _go_round(self) -> None:
        """What a killed node had sent, and Redis took when the node was long dead, no bus can notice: the round does,
        which is not waited for here."""
        for process in self.gateways:
            if process.alive:
                self.do(process.node.sweeper.sweep("round"), process)  # type: ignore[attr-defined]

    def _find_records(self) -> None:
        ids = [one.msg_id for one in self.publications if one.msg_id is not None]
        observer = self.machine.processes[0]
        self.records = self.do(self.store.find_messages(self.app.app_id, ids), observer)

    def _check_answered(self) -> None:
        for one in self.publications:
            record = self.records.get(one.msg_id or 0)
            if record is None:
                self.wrong.append(f"G1: push {one.number} ({one.msg_id}) is not in the store")
            elif record.targets != one.targets:
                self.wrong.append(f"G1: {one.msg_id} has other targets: {list(record.targets)}")
        for device in self.devices:
            for number, ids in device.numbers.items():
                one = next(one for one in self.publications if one.number == number)
                if len(ids) > (1 if one.once else one.tries):
                    self.wrong.append(f"G1: {device.name} got push {number} as {sorted(ids)}")

    def _check_plans(self) -> None:
        """S12, and that what is due is found."""
        observer = self.machine.processes[0]
        planned = {str(one.msg_id) for one in self.publications if one.planned}
        unsure = {one.number for one in self.publications if one.planned and not one.once}
        due = self.do(self.store.records.due([PLAN], self.machine.now + START, 1000), observer)
        found = {record.key for record in due}
        if not planned <= found or (not unsure and found != planned):
            self.wrong.append(f"S12: records {sorted(found)} are due, not {sorted(planned)}")

    def _states(self, one: Publication) -> dict[int, DeliveryState | None]:
        record = self.records.get(one.msg_id or 0)
        if record is None:
            return {}
        now = self.machine.processes[0].wall()
        counts = record.counts(now)
        if sum(counts.values()) != len(record.targets):
            self.wrong.append(f"G4: {one.msg_id} has {len(record.targets)} targets, and {counts}")
        return {devno: record.state(devno, now) for devno in record.targets}

    def _check_states(self) -> None:
        for one in self.publications:
            for devno, state in self._states(one).items():
                device = self.devices[devno]
                if state is DeliveryState.DELIVERED and one.msg_id not in device.truly:
                    self.wrong.append(f"G4/G5: {one.msg_id} counts as delivered to {device.name}")
                elif state is DeliveryState.PENDING and self._is_taken_back(one, devno):
                    self.wrong.append(f"G4: {one.msg_id} waits for {device.name}, and was taken back")

    def _check_connected(self) -> None:
        """Who stayed has it without coming back."""
        for device in self.devices:
            line = device.line
            if line is None or not line.open or line.connected_at is None:
                continue
            if line.connected_at > self.machine.now - REST:
                continue
            if line.full:
                continue
            for one in self.publications:
                self._check_has(device, line, one)

    def _check_has(self, device: Device, line: Line, one: Publication) -> None:
        state = self._states(one).get(device.devno)
        if state is DeliveryState.PENDING and one.msg_id not in line.got:
            late = bool(line.got) and line.got[-1] > (one.msg_id or 0)
            why = ", which has newer ones" if late else ""
            self.wrong.append(f"G2: {one.msg_id} waits for {line}{why}")

    def _check_everybody_has_it(self) -> None:
        for one in self.publications:
            for devno, state in self._states(one).items():
                device = self.devices[devno]
                where = f"{one.msg_id} for {device.name}"
                if state is DeliveryState.PENDING:
                    has = "it has it" if one.msg_id in device.has else "it never came"
                    self.wrong.append(f"G2: {where} is still pending ({has})")
                elif state is DeliveryState.DELIVERED and one.msg_id not in device.has:
                    self.wrong.append(f"G2: {where} counts as delivered, and never came")
                elif state is DeliveryState.EXPIRED and one.ttl == DAY:
                    self.wrong.append(f"G2: {where} counts as expired")
                elif state is DeliveryState.EVICTED and len(self.publications) <= self.app.offline_limit:
                    self.wrong.append(f"G2: {where} counts as evicted")
                elif state is DeliveryState.RECALLED and not self._may_be_taken_back(one, devno):
                    self.wrong.append(f"G2: {where} counts as recalled")

    def _is_taken_back(self, one: Publication, devno: int) -> bool:
        """For certain."""
        if one.recalled:
            return True
        return any(
            (
                other.replaces == one.msg_id
                or (
                    other.collapse
                    and other.collapse == one.collapse
                    and (other.msg_id or 0) > (one.msg_id or 0)
                )
            )
            and devno in other.targets
            for other in self.publications
            if other is not one
        )

    def _may_be_taken_back(self, one: Publication, devno: int | None = None) -> bool:
        if one.withdrawn or (one.collapse and not one.once):  # a second copy takes the place of the first
            return True
        return any(
            (other.replaces == one.msg_id or (other.collapse and other.collapse == one.collapse))
            and (devno is None or devno in other.targets)
            for other in self.publications
            if other is not one
        )

    def _check_lines(self) -> None:
        routes = self.do(self.store.online(self.app.app_id), self.machine.processes[0])
        for device in self.devices:
            live = [
                (process.name, member)
                for process in self.gateways
                if process.alive and (hub := process.node.hubs.get(self.app.app_id)) is not None  # type: ignore[attr-defined]
                for devno, member in hub.members.items()
                if devno == device.devno
            ]
            newest = device.line.connection if device.line is not None else None
            if [member for _, member in live] != [newest]:
                self.wrong.append(
                    f"G5: {device.name} is connected at {[name for name, _ in live]}, wants {device.line}"
                )
            if device.devno not in routes:
                self.wrong.append(f"G5: {device.name} is connected and has no route")


def _plan(app: App, publication: Publication, now: float) -> list[RecordChange]:
    if not publication.planned:
        return []
    return [RecordChange(app.app_id, PLAN, "", b"%d" % publication.number, 0, now)]


def _is_up(process: Process) -> bool:
    return hasattr(process, "store")


class _Errors(logging.Handler):
    """What a process logs as an error is one."""

    def __init__(self, wrong: Wrong) -> None:
        super().__init__(logging.ERROR)
        self._wrong = wrong

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "asyncio":
            error = record.exc_info[1] if record.exc_info else ""
            self._wrong.append(f"log: {record.getMessage()} {error!r}")


def simulate(redis: RedisBehind, seed: int, *, trace: bool = False) -> Wrong:
    """What was wrong; empty: nothing."""
    dice = random.Random(f"secrets {seed}")
    random._urandom = dice.randbytes  # type: ignore[attr-defined]  # what `secrets` hands out
    random.seed(seed)
    gc.collect()  # what is left of the run before must not come into this one
    gc.disable()
    redis.command("FLUSHALL")
    redis.listeners.clear()
    fleet = Fleet(redis, seed, trace=trace)
    errors = _Errors(fleet.wrong)
    logging.getLogger().addHandler(errors)
    try:
        wrong = fleet.run()
    except Exception as error:
        if trace:
            raise
        wrong = [*fleet.wrong, f"{type(error).__name__}: {error}"]
    finally:
        fleet.machine.close()
        logging.getLogger().removeHandler(errors)
    return [f"{fleet.kind}: {text}" for text in dict.fromkeys(wrong)]


def _connected(path: Path) -> RedisBehind:
    """The socket's file is there a moment before the server listens."""
    deadline = time.monotonic() + STARTS
    while True:
        try:
            return RedisBehind(path)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextmanager
def running_redis() -> Iterator[RedisBehind]:
    """A server of its own behind a Unix socket. It keeps nothing: what a power cut loses is not simulated here."""
    program = shutil.which("redis-server", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/bin")
    assert program is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        path = Path(directory) / "redis.sock"
        options = ("--port", "0", "--unixsocket", str(path), "--save", "", "--dir", directory)
        process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
        try:
            redis = _connected(path)
            yield redis
            redis.close()
        finally:
            process.kill()
            process.wait()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("seeds", type=int, nargs="+", help="one, or the first and the one after the last")
    parser.add_argument("--kind", choices=SCENARIOS, help="count only the seeds of this scenario")
    parser.add_argument("--trace", action="store_true")
    options = parser.parse_args(arguments)
    if options.trace:
        logging.basicConfig(stream=sys.stdout, level=logging.WARNING)
    logging.getLogger().addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _found: None  # what a killed process leaves half done
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server goes, too
    fanout.SCHEDSTAT = ""  # what it waits for a core: a seed would not give the same run twice
    first, *rest = options.seeds
    seeds: Sequence[int] = range(first, rest[0] if rest else first + 1)
    if options.kind:
        offset = list(SCENARIOS).index(options.kind)
        seeds = [seed * len(SCENARIOS) + offset for seed in seeds]
    failed = 0
    with running_redis() as redis:
        learn_scripts(redis)
        gc.freeze()
        for seed in seeds:
            wrong = simulate(redis, seed, trace=options.trace)
            if wrong:
                failed += 1
                _say(f"seed {seed}: {'; '.join(wrong[:6])}")
    return int(failed > 0)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def learn_scripts(redis: RedisBehind) -> None:
    from importlib.resources import files

    from broker.redis.scripts import load

    names = [path.name.removesuffix(".lua") for path in (files("broker.redis") / "lua").iterdir()]
    scripts = [load(name) for name in names]
    redis.learn(iter([(script.sha, script.source) for script in scripts]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
