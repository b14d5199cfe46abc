"""What every entrant has to do in a turn, and what that took.

Some devices connect first, so that what a server makes only once does not count; the others are timed. Then each
device subscribes to a topic of its own, and is sent messages there: with WINDOW of them outstanding, and on schedules
that wait for nobody. At last all subscribe to one topic, and messages to all go there, one or four at once. All that
is sent has 100 bytes, and what is sent at QoS 1 all devices acknowledge. Holdfast does it twice: with ordinary
topics, and with pushes over HTTP, which are durable before their answer, and in its report when the clock stops.
"""

from __future__ import annotations

import random
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final, NoReturn

import msgspec

from loadtest.fleet import Fleet, FleetError
from loadtest.http_pool import HttpError
from loadtest.ledger import Ledger, alert
from loadtest.machine import KB, read_memory
from loadtest.peers.entrants import Arena, Entrant
from loadtest.publishing import PushRefused, check_accepted, push_body, quantile
from loadtest.reactor import Reactor
from loadtest.rounds import Rounds
from loadtest.scenarios.broadcast import Volley
from loadtest.scenarios.topics import TOPIC, TopicVolley
from loadtest.server import ServerError, wait_for_steady_rss
from loadtest.stage import HTTP_CONNECTIONS, Cast, Meter, Stage
from loadtest.topic_publisher import PublishError, TopicPublisher, payload, subscribe_packet

RATES: Final = (500, 2000, 8000)  # messages a second of the schedules
KINDS: Final = ((1, 1), (1, 4), (0, 1), (0, 4))  # QoS and how many at once
WINDOW: Final = HTTP_CONNECTIONS
CONNECTING: Final = 64  # at once: mosquitto lets 100 wait, the next come back a second later
BEHIND: Final = 0.25  # seconds of a schedule that may be on their way; with more a server cannot keep up
LIMIT: Final = 150.0  # seconds of a turn; what was not done by then is missing
SEED: Final = 2026
US: Final = 1e6
MS: Final = 1e3
TOPICS, PUSH = "topics", "push"

FAILURES: Final = (FleetError, PublishError, PushRefused, HttpError, ServerError, TimeoutError, OSError)

Post = tuple[int, float]  # device, and when it was due


class Work(msgspec.Struct, frozen=True):
    """Something that was done as fast as it went."""

    rate: float  # a second
    cost: float  # µs of the server's CPU for each
    server: float  # share of its core
    generator: float  # share of the other core
    others: float  # what all others used, in cores


class Pace(msgspec.Struct, frozen=True):
    """Messages on a schedule: milliseconds from when they were due to their arrival."""

    p50: float
    p99: float
    kept: bool  # the server kept up


class Ways(msgspec.Struct):
    """What one way to reach devices gave; those that are missing failed, or are not what it does."""

    fan_out: dict[str, Work] = {}  # by `kind`
    single: Work | None = None
    paces: dict[str, Pace] = {}  # by rate


class Findings(msgspec.Struct):
    """Of one entrant in one turn."""

    rss: float | None = None  # KB of each connection
    subscribed: float | None = None  # with one subscription
    kernel: float | None = None  # KB of both ends of each connection
    connects: Work | None = None
    ways: dict[str, Ways] = {}
    failure: str = ""  # what ended the turn early


def kind(qos: int, at_once: int) -> str:
    return f"QoS {qos}, {'one' if at_once == 1 else 'four'}"


def own_topic(device: int) -> str:
    """As long as TOPIC, and never it."""
    return f"{device:04x}"


@dataclass(slots=True)
class Crowd:
    """The generator's side."""

    reactor: Reactor
    ledger: Ledger
    fleet: Fleet
    devices: int


class Way(ABC):
    """How devices are reached."""

    name: str

    @abstractmethod
    def rounds(self, qos: int, at_once: int) -> Rounds | None:
        """Messages to all; None: it does not do that."""

    @abstractmethod
    def send(self, posts: Sequence[Post]) -> None:
        """A message to each of these devices."""

    @abstractmethod
    def settle(self) -> None:
        """Until all that was sent is answered, too."""


class TopicWay(Way):
    """One MQTT connection publishes; single messages at QoS 1."""

    name = TOPICS

    def __init__(self, crowd: Crowd, publisher: TopicPublisher) -> None:
        self._crowd = crowd
        self._publisher = publisher

    def rounds(self, qos: int, at_once: int) -> Rounds:
        crowd = self._crowd
        return TopicVolley(crowd.reactor, crowd.ledger, self._publisher, crowd.devices, at_once, qos)

    def send(self, posts: Sequence[Post]) -> None:
        add = self._crowd.ledger.add_targeted
        self._publisher.publish_together(
            [(own_topic(device), payload(add(device, due))) for device, due in posts], 1
        )

    def settle(self) -> None:
        self._publisher.wait_for_answers()


class PushWay(Way):
    """HTTP requests, one for each push."""

    name = PUSH

    def __init__(self, cast_: Cast, devices: int) -> None:
        self._cast = cast_
        self._devices = devices
        self._unanswered = 0

    def rounds(self, qos: int, at_once: int) -> Rounds | None:
        return Volley(self._cast, self._devices, at_once) if qos else None

    def send(self, posts: Sequence[Post]) -> None:
        cast_ = self._cast
        for device, due in posts:
            serial = cast_.ledger.add_targeted(device, due)
            body = push_body(cast_.population.names[device], alert(serial, cast_.msg_id_digits))
            cast_.pool.send(cast_.pool.build("POST", "/v3/push", body), self._answered)
            self._unanswered += 1

    def settle(self) -> None:
        self._cast.reactor.run_until(lambda: not self._unanswered, "all pushes answered")

    def _answered(self, status: int, body: bytes) -> None:
        self._unanswered -= 1
        check_accepted(status, body)


class _Turn:
    """`doing` is what it is at, for whoever has to say where it failed."""

    def __init__(
        self, stage: Stage, arena: Arena, crowd: Crowd, ways: Sequence[Way], findings: Findings
    ) -> None:
        self._stage = stage
        self._arena = arena
        self._crowd = crowd
        self._ways = ways
        self._findings = findings
        self._random = random.Random(SEED)
        self.doing = "connecting"

    def run(self) -> None:
        self._connect()
        for way in self._ways:
            self._findings.ways[way.name] = Ways()
            self._reach_one(way)
        self.doing = "subscribing to one topic"
        crowd = self._crowd
        crowd.fleet.subscribe(dict.fromkeys(range(crowd.devices), subscribe_packet([TOPIC])))
        for qos, at_once in KINDS:
            for way in self._ways:
                self._reach_all(way, qos, at_once)
        self._findings.failure = crowd.ledger.errors()

    def _connect(self) -> None:
        crowd, findings = self._crowd, self._findings
        warm = min(self._stage.plan.warm_devices, crowd.devices // 2)
        crowd.fleet.connect(range(warm), at_once=CONNECTING)
        rss, kernel = self._rss(), read_memory().kernel
        findings.connects = self._timed(lambda: self._connect_rest(warm))
        count = crowd.devices - warm
        more = self._rss()
        findings.rss = (more - rss) / count / KB
        findings.kernel = (read_memory().kernel - kernel) / count / KB
        self.doing = "subscribing to topics of their own"
        crowd.fleet.subscribe({one: subscribe_packet([own_topic(one)]) for one in range(crowd.devices)})
        findings.subscribed = findings.rss + (self._rss() - more) / crowd.devices / KB

    def _rss(self) -> int:
        return wait_for_steady_rss(self._arena.pid)

    def _connect_rest(self, warm: int) -> int:
        self._crowd.fleet.connect(range(warm, self._crowd.devices), at_once=CONNECTING)
        return self._crowd.devices - warm

    def _reach_one(self, way: Way) -> None:
        found, seconds = self._findings.ways[way.name], self._stage.plan.seconds
        self.doing = f"{way.name}: single messages"
        self._send_singly(way, seconds / 4)  # warm
        found.single = self._timed(lambda: self._send_singly(way, seconds))
        for rate in RATES:
            self.doing = f"{way.name}: {rate:,} messages a second"
            found.paces[str(rate)] = self._keep_pace(way, rate, seconds)

    def _send_singly(self, way: Way, seconds: float) -> int:
        """How many, with WINDOW outstanding."""
        ledger, reactor = self._crowd.ledger, self._crowd.reactor
        ledger.latencies.clear()
        deadline = time.perf_counter() + seconds
        while (now := time.perf_counter()) < deadline:
            if free := WINDOW - len(ledger.waiting):
                way.send([(self._anyone(), now) for _ in range(free)])
            reactor.turn(0.01)
        self._settle(way)
        return len(ledger.latencies)

    def _keep_pace(self, way: Way, rate: int, seconds: float) -> Pace:
        ledger, reactor = self._crowd.ledger, self._crowd.reactor
        ledger.latencies.clear()
        due = time.perf_counter()
        end = due + seconds
        while due < end and len(ledger.waiting) <= rate * BEHIND:
            posts: list[Post] = []
            while due <= time.perf_counter():
                posts.append((self._anyone(), due))
                due += 1 / rate
            if posts:
                way.send(posts)
            reactor.turn(due - time.perf_counter())
        self._settle(way)
        p50, p99 = (quantile(ledger.latencies, share) * MS for share in (0.5, 0.99))
        return Pace(p50, p99, kept=due >= end)

    def _reach_all(self, way: Way, qos: int, at_once: int) -> None:
        rounds = way.rounds(qos, at_once)
        if rounds is None:
            return
        name, devices = kind(qos, at_once), self._crowd.devices
        self.doing = f"{way.name}: to all at {name}"
        rounds.run(1)  # warm

        def reach() -> int:
            rounds.run_for(self._stage.plan.seconds)
            return rounds.posted * devices

        self._findings.ways[way.name].fan_out[name] = self._timed(reach)

    def _anyone(self) -> int:
        return self._random.randrange(self._crowd.devices)

    def _settle(self, way: Way) -> None:
        ledger = self._crowd.ledger
        self._crowd.reactor.run_until(lambda: not ledger.waiting, "all messages arrived")
        way.settle()

    def _timed(self, do: Callable[[], int]) -> Work:
        """`do` returns how many it did."""
        meter = Meter(self._arena.pid)
        with meter.running():
            count = do()
        load = meter.load
        return Work(
            count / meter.seconds,
            meter.server_cpu / count * US,
            load.server,
            load.generator,
            load.others,
        )


def take_turn(stage: Stage, entrant: Entrant) -> Findings:
    """Start it, have it do everything, end it. Where it fails, the rest is missing."""
    findings = Findings()
    doing = "starting"
    try:
        with entrant.open(stage) as arena, _crowd(stage, arena) as (crowd, ways), _limited(LIMIT):
            turn = _Turn(stage, arena, crowd, ways, findings)
            try:
                turn.run()
            finally:
                doing = turn.doing
    except FAILURES as error:
        findings.failure = f"{doing}: {error}"
    return findings


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the middle of whatever takes longer. For the main thread."""

    def end(*_: object) -> NoReturn:
        raise TimeoutError(f"the turn took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _crowd(stage: Stage, arena: Arena) -> Iterator[tuple[Crowd, list[Way]]]:
    """Devices, none connected yet, and all ways to reach them."""
    devices = stage.plan.subscribers
    reactor, ledger = Reactor(), Ledger(devices)
    fleet = Fleet(reactor, arena.address, arena.connects, ledger.take, topic=TOPIC)
    with ExitStack() as stack:
        stack.callback(reactor.close)
        stack.callback(fleet.close)
        publisher = TopicPublisher(reactor, arena.address, arena.publisher)
        stack.callback(publisher.close)
        crowd = Crowd(reactor, ledger, fleet, devices)
        ways: list[Way] = []
        if arena.server is not None and arena.population is not None:
            pool = arena.population.pool(reactor, arena.server, HTTP_CONNECTIONS)
            stack.callback(pool.close)
            cast_ = Cast(arena.server, arena.population, reactor, ledger, fleet, pool)
            ways.append(PushWay(cast_, devices))
        ways.append(TopicWay(crowd, publisher))
        yield crowd, ways
