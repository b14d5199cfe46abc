"""A fleet on one machine: Redis, node processes behind one port, and all its devices, stable for a time.

Redis syncs every write to the disk before it answers. The devices are imported with an alias and five tags each, and
connect with their tokens. `probes` are devices in a process of their own: where a broadcast keeps all processes busy,
arrival times are taken on them. Seconds of a broadcast count from its post until the server's own report says
"delivered" for all, and until the last device had it. With no nodes it is the embedded server, for comparison.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field
from statistics import median
from typing import Any, Final

import orjson

from loadtest.http_pool import HttpPool
from loadtest.ledger import Ledger, alert
from loadtest.machine import Guard, Memory, family, pss, read_memory
from loadtest.publishing import OpenLoop, broadcast_body, check_accepted, quantile
from loadtest.reactor import Reactor
from loadtest.redis_server import RedisServer
from loadtest.report import Row
from loadtest.roster import Roster, enroll, name_of
from loadtest.server import Server, read_usage, run_holdfast
from loadtest.stage import Plan, Stage
from loadtest.swarms import SwarmError, Swarms

CONNECT_RATE: Final = 20_000.0  # wanted, a second: what is reached is measured
LEAST_RATE: Final = 500.0  # below that it is given up
KEEP_ALIVE: Final = 240
PING_INTERVAL: Final = 180.0
PROBES: Final = 500
PROBE_RATE: Final = 200.0
TARGETED_RATE: Final = 3000.0
TOGETHER: Final = (1, 10)  # pushes in a request
TARGETED_RUNS: Final = 4.0  # times as long as other open loops: it is to be sustained
MANY: Final = 100_000  # devices: what is wanted is wanted of so many; more are pushed to less often
RATE_OF_MANY: Final = 300.0
BROADCAST_GOAL: Final = 5.0  # seconds
REPORT_LIMIT: Final = 120.0
ARRIVAL_LIMIT: Final = 300.0
RETURN_LIMIT: Final = 180.0  # seconds for all devices to be back after a node's death
HTTP_CONNECTIONS: Final = 256  # a request waits for none: the load is an open loop
LOOK: Final = 0.1  # seconds between two looks at who is back, or at what has come
TAGS: Final = 5
LOG_LINES: Final = 8
WARNING: Final = re.compile(r" ((?:WARNING|ERROR) [^=]*?)(?: \w+=|$)")  # without what names an instance
KB, MB, MS, MILLION = 1 << 10, 1 << 20, 1000.0, 1e6


def fleet(stage: Stage) -> list[Row]:
    with stage.whole_machine(), _scene(stage) as scene:
        rows: list[Row] = []
        try:
            for phase in _phases(stage.plan):
                rows += phase(scene)
        except (TimeoutError, SwarmError) as error:  # after an hour what was measured is not thrown away
            stage.say(f"fleet: {scene.guard.what}: given up: {error}")
            rows.append(Row(f"{scene.name}: given up: {scene.guard.what}: {error}", "", [1.0], at_most=0))
        status = scene.swarms.renew()
        rows.append(Row(f"{scene.name}: pushes lost", "", [float(scene.ledger.missing)], at_most=0))
        if scene.redis is not None:
            rows.append(
                Row(f"{scene.name}: Redis, longest sync of its log", "ms", [scene.redis.slowest_sync()])
            )
        scene.stage.say(f"fleet: at the end {status.line()}; {scene.ledger.errors() or 'none twice'}")
        return [*scene.enrolled, *rows]


def _phases(plan: Plan) -> Iterator[Callable[[Scene], list[Row]]]:
    yield from (_connect, _hold, _memory, _broadcasts)
    for together in TOGETHER:
        yield functools.partial(_targeted, together=together)
    yield _targeted_amid
    if plan.nodes > 1:
        yield _death


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU seconds, Redis' commands (those in scripts too) and its memory in bytes."""

    nodes: float
    devices: float
    redis: float
    commands: int
    scripts: int
    redis_memory: int

    def since(self, before: Spent) -> Spent:
        return Spent(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))

    def plus(self, other: Spent) -> Spent:
        return Spent(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def rows(self, name: str, each: str, count: float) -> list[Row]:
        """What one of `count` cost."""
        us, kind = MILLION / count, "µs of CPU"
        rows = [
            Row(f"{name}: nodes, for each {each}", kind, [self.nodes * us]),
            Row(f"{name}: simulated devices, for each {each}", kind, [self.devices * us]),
        ]
        if self.commands:
            note = f"{self.commands / count:.3g} commands, {self.scripts / count:.3g} of them scripts"
            rows.append(Row(f"{name}: Redis, for each {each}", kind, [self.redis * us], note=note))
        return rows


def _cpu(pids: Iterable[int]) -> float:
    """Those that ended count nothing."""
    total = 0.0
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            total += read_usage(pid).cpu
    return total


@dataclass(slots=True)
class Scene:
    """What runs, and the account of who was pushed what."""

    stage: Stage
    redis: RedisServer | None
    server: Server
    pool: HttpPool
    swarms: Swarms
    guard: Guard
    enrolled: list[Row]
    before: Memory  # of the machine, before anybody connected
    redis_before: int  # used_memory then
    ledger: Ledger = field(default_factory=lambda: Ledger(0))
    msg_id_digits: int = 13

    @property
    def devices(self) -> int:
        return self.swarms.devices

    @property
    def name(self) -> str:
        return f"fleet: {self.devices:,} devices, {_processes(self.stage.plan)}"

    @property
    def targeted_rate(self) -> float:
        return TARGETED_RATE if self.devices <= MANY else RATE_OF_MANY

    @property
    def reactor(self) -> Reactor:
        return self.swarms.reactor

    def spent(self) -> Spent:
        """So far, by everything that runs."""
        redis = None if self.redis is None else self.redis.work()
        return Spent(
            nodes=_cpu(family(self.server.pid)),
            devices=_cpu(self.swarms.pids),
            redis=0.0 if redis is None else redis.usage.cpu,
            commands=0 if redis is None else redis.commands,
            scripts=0 if redis is None else redis.scripts,
            redis_memory=0 if self.redis is None else self.redis.memory()[0],
        )

    def run_for(self, seconds: float) -> None:
        """With a look at the machine, and at who was lost."""
        until = time.perf_counter() + seconds
        self.swarms.wait(
            lambda _: time.perf_counter() >= until, self.guard.what, seconds + 60, self.guard.show
        )


def _processes(plan: Plan) -> str:
    if not plan.nodes:
        return "the embedded server"
    brokers = f", {plan.brokers} broker{'s' * (plan.brokers > 1)}" if plan.brokers else ""
    return f"{plan.nodes} nodes{brokers}"


# Who plays


@contextmanager
def _scene(stage: Stage) -> Iterator[Scene]:
    home = stage.directory / "fleet"
    home.mkdir(parents=True)
    plan, reactor = stage.plan, Reactor()
    redis = RedisServer(home / "redis") if plan.nodes else None
    if redis is not None:
        redis.start()
    try:
        app, server = _server(stage, redis)
        server.start()
        try:
            key, secret, address = app["app_key"], app["master_secret"], server.address("http")
            pool = HttpPool(reactor, address, HTTP_CONNECTIONS, user=key, password=secret, again=True)
            guard = Guard("fleet: connect")
            roster, rows = _enroll(stage, redis, pool, app["app_key"])
            before, used = read_memory(), redis.memory()[0] if redis else 0
            with Swarms(
                reactor,
                roster,
                plan.fleet_devices,
                [server.address("mqtt")],
                probes=PROBES,
                keep_alive=KEEP_ALIVE,
                ping_interval=PING_INTERVAL,
                log=home / "swarms.log",
            ) as swarms:
                yield Scene(stage, redis, server, pool, swarms, guard, rows, before, used)
            pool.close()
        finally:
            server.stop()
            _tell_log(stage, server)
    finally:
        if redis is not None:
            redis.stop()
        reactor.close()
        shutil.rmtree(home)


def _server(stage: Stage, redis: RedisServer | None) -> tuple[dict[str, str], Server]:
    """An app, and a server that is not started yet."""
    data_dir = stage.directory / "fleet" / "data"
    settings = dict(stage.settings)
    flags: list[str] = []
    if redis is not None:
        settings["HOLDFAST_STORE_URL"] = redis.url
        # A process has 20,000 files here, and keeps those of its HTTP connections free of devices.
        settings.setdefault("HOLDFAST_HTTP_MAX_CONNECTIONS", str(2 * HTTP_CONNECTIONS))
        flags = ["--workers", str(stage.plan.nodes), "--brokers", str(stage.plan.brokers)]
    create = ("app", "create", "fleet", "--data-dir", str(data_dir))
    app = run_holdfast(*create, source=stage.source, settings=settings)
    return app, Server(data_dir, settings=settings, source=stage.source, flags=flags)


def _tell_log(stage: Stage, server: Server) -> None:
    """What the server warned of, most often first."""
    with server.log.open(errors="replace") as log:
        warnings = Counter(match[1] for line in log if (match := WARNING.search(line)))
    for text, count in warnings.most_common(LOG_LINES):
        stage.say(f"fleet: the server's log has {count:,} x {text}")


def _enroll(
    stage: Stage, redis: RedisServer | None, pool: HttpPool, app_key: str
) -> tuple[Roster, list[Row]]:
    count = stage.plan.fleet_devices
    used = redis.memory()[0] if redis else 0
    started = time.perf_counter()
    roster = enroll(pool, app_key, count, stage.directory / "fleet" / "tokens", _describe)
    rows = [Row("fleet: devices imported", "/s", [count / (time.perf_counter() - started)])]
    stage.say(f"fleet: registered {count:,} devices, {rows[0].median:,.0f} a second")
    if redis is not None:
        each = (redis.memory()[0] - used) / count
        rows.append(
            Row(f"fleet: {count:,} registered, alias and {TAGS} tags: Redis", "bytes a device", [each])
        )
    return roster, rows


def _describe(device: int) -> dict[str, Any]:
    tags = [f"tag{(device * 7919 + n * 104_729) % 1000}" for n in range(TAGS)]
    return {"platform": "android", "alias": f"user{device}", "tags": tags}


# Connected, and kept


def _connect(scene: Scene) -> list[Row]:
    limit = scene.devices / LEAST_RATE + 60
    before = scene.spent()
    seconds = scene.swarms.connect(CONNECT_RATE, limit, scene.guard.show)
    spent = scene.spent().since(before)
    failed = sum(scene.swarms.status.failed.values())
    scene.stage.say(f"fleet: {scene.devices:,} online after {seconds:.1f} s; {failed:,} tries failed")
    name = f"{scene.name}: connects"
    rate = Row(name, "/s", [scene.devices / seconds], note=f"{failed:,} tries failed")
    return [rate, *spent.rows(name, "connect", scene.devices)]


def _hold(scene: Scene) -> list[Row]:
    """Nothing but keep-alives."""
    scene.guard.what = "fleet: hold"
    counts, before = scene.swarms.renew().counts, scene.spent()
    started = time.perf_counter()
    scene.run_for(scene.stage.plan.hold)
    seconds = time.perf_counter() - started
    status, spent = scene.swarms.renew(), scene.spent().since(before)
    pings = max(1, status.counts["pongs"] - counts["pongs"])
    lost = float(sum(status.lost.values()))
    name = f"{scene.name}: stable for {scene.stage.plan.hold:g} s"
    note = f"nodes {spent.nodes / seconds:.2f} cores, Redis {spent.redis / seconds:.2f}"
    return [
        Row(f"{name}: devices dropped", "", [lost], at_most=0, note=f"{pings:,} PINGRESP; {note}"),
        *spent.rows(name, "PINGREQ", pings)[:2],
        *([] if scene.redis is None else [_beat(scene, name, spent, seconds)]),
    ]


def _beat(scene: Scene, name: str, spent: Spent, seconds: float) -> Row:
    each = MILLION / seconds / max(1, scene.stage.plan.nodes)
    return Row(f"{name}: Redis, for each node and second", "µs of CPU", [spent.redis * each])


def _memory(scene: Scene) -> list[Row]:
    """Of everything, for each device. Of the kernel: what was there before anybody connected does not count."""
    each = 1 / scene.devices
    kernel = read_memory().kernel - scene.before.kernel
    nodes, generator = pss(family(scene.server.pid)), pss(scene.swarms.pids)
    rows = [
        Row(
            f"{scene.name}: memory of the nodes",
            "KB a device",
            [nodes * each / KB],
            note=f"PSS, {nodes / MB:,.0f} MB",
        ),
        Row(
            f"{scene.name}: memory of the kernel, both ends",
            "KB a device",
            [kernel * each / KB],
            note=f"slab and TCP buffers, {kernel / MB:,.0f} MB",
        ),
        Row(f"{scene.name}: memory of the generator", "bytes a device", [generator * each]),
    ]
    if scene.redis is None:
        return rows
    used, resident = scene.redis.memory()
    grown = (used - scene.redis_before) / MB
    note = f"used_memory {used / MB:,.0f} MB, {grown:,.0f} of it since the first connect"
    rows.append(Row(f"{scene.name}: memory of Redis, RSS", "bytes a device", [resident * each], note=note))
    both = (nodes + resident) * each / KB
    return [*rows, Row(f"{scene.name}: nodes and Redis together", "KB a device", [both])]


# Pushes


@dataclass(frozen=True, slots=True)
class Broadcast:
    """One that every device has."""

    recorded: float  # seconds from the post until the report had all
    arrived: float  # until the last device had it
    repeats: int


def _broadcasts(scene: Scene) -> list[Row]:
    scene.guard.what = "fleet: broadcast"
    runs: list[Broadcast] = []
    spent: list[Spent] = []
    for _ in range(scene.stage.plan.runs):
        scene.run_for(scene.stage.plan.calm)
        before = scene.spent()
        runs.append(_broadcast(scene))
        spent.append(scene.spent().since(before))
        scene.stage.say(f"fleet: a broadcast, recorded after {runs[-1].recorded:.2f} s")
    name = f"{scene.name}: a broadcast to all"
    goal = BROADCAST_GOAL if scene.devices <= MANY else None
    repeats = sum(run.repeats for run in runs)
    rows = [
        Row(f"{name}, recorded", "s", [run.recorded for run in runs], at_most=goal),
        Row(f"{name}, the last has it", "s", [run.arrived for run in runs], note=f"{repeats:,} came twice"),
        *_sum(spent).rows(name, "delivery", scene.devices * len(runs)),
    ]
    if scene.redis is not None:
        millions = scene.devices / MILLION
        note = f"{median(one.scripts for one in spent) / millions:,.0f} of them scripts"
        commands = [one.commands / millions for one in spent]
        rows.append(Row(f"{name}: Redis commands per million deliveries", "", commands, note=note))
    return rows


def _sum(spent: Sequence[Spent]) -> Spent:
    return functools.reduce(Spent.plus, spent)


def _broadcast(scene: Scene, meanwhile: Callable[[], float] = lambda: 0.01) -> Broadcast:
    """`meanwhile` is called all the time, and says for how many seconds it has nothing to do. Answered with a cid, so
    that it may be posted again when its node dies."""
    serial = scene.ledger.add_broadcast(0)
    scene.swarms.ask("expect", serial)
    answers: list[bytes] = []

    def take(status: int, body: bytes) -> None:
        check_accepted(status, body)
        answers.append(body)

    acked = scene.swarms.renew().counts["acked"] + scene.devices
    started = time.perf_counter()
    body = broadcast_body(alert(serial, scene.msg_id_digits), cid=f"all-{serial}")
    request = scene.pool.build("POST", "/v3/push", body)
    scene.pool.send(request, take)
    _turn_until(scene, lambda: bool(answers), "the answer", meanwhile)
    msg_id = orjson.loads(answers[0])["msg_id"]
    scene.msg_id_digits = len(msg_id)
    _wait_for_report(scene, msg_id, acked, meanwhile)
    recorded = time.perf_counter() - started
    arrived = scene.swarms.arrived(serial)
    if arrived.count < scene.devices:
        raise AssertionError(f"recorded, but not there: {scene.swarms.missing(serial)}")
    return Broadcast(recorded, arrived.last - started, arrived.repeats)


def _wait_for_report(scene: Scene, msg_id: str, acked: int, meanwhile: Callable[[], float]) -> None:
    """It is not asked before so many pushes were acknowledged: to read it costs the server something."""
    delivered = [0]

    def take(status: int, body: bytes) -> None:
        check_accepted(status, body)
        delivered[0] = orjson.loads(body)[0]["delivered"]

    request = scene.pool.build("GET", f"/v3/received/detail?msg_ids={msg_id}")
    deadline = time.perf_counter() + REPORT_LIMIT
    looked = 0.0
    while delivered[0] < scene.devices:
        now = time.perf_counter()
        if now > deadline:
            raise TimeoutError(f"the report has {delivered[0]:,} of {scene.devices:,} deliveries")
        if now - looked > LOOK:
            looked = now
            scene.guard.check()
            scene.swarms.look()
            if scene.swarms.status.counts.get("acked", 0) >= acked:
                scene.pool.send(request, take)
        scene.reactor.turn(min(meanwhile(), 0.01))


def _turn_until(
    scene: Scene, done: Callable[[], bool], what: str, meanwhile: Callable[[], float], limit: float = 60.0
) -> None:
    deadline = time.perf_counter() + limit
    while not done():
        if time.perf_counter() > deadline:
            raise TimeoutError(f"{what}: not within {limit:g} s")
        scene.reactor.turn(min(meanwhile(), 0.01))


def _publisher(
    scene: Scene, devices: range, rate: float, *, cids: bool = False, together: int = 1
) -> OpenLoop:
    return OpenLoop(
        scene.pool,
        scene.ledger,
        name_of,
        devices,
        rate,
        scene.msg_id_digits,
        cids=cids,
        forgiving=True,
        together=together,
    )


def _targeted(scene: Scene, together: int) -> list[Row]:
    """At a fixed rate to all devices, whether the server keeps up or not. `together`: pushes in a request."""
    scene.guard.what = "fleet: targeted"
    _push_for(scene, TARGETED_RUNS * scene.stage.plan.seconds, together)  # warm
    runs: list[Volley] = []
    for _ in range(scene.stage.plan.runs):
        scene.run_for(scene.stage.plan.calm)
        runs.append(_push_for(scene, TARGETED_RUNS * scene.stage.plan.seconds, together))
        scene.stage.say(
            f"fleet: targeted, {together} a request: {runs[-1].rate:,.0f}/s, p50 {runs[-1].p50:.1f}, "
            f"p99 {runs[-1].p99:.1f} ms"
        )
    rate = scene.targeted_rate
    name = f"{scene.name}: targeted, {rate:,.0f} a second offered, {together} a request"
    refused = sum(run.refused for run in runs)
    note = f"{scene.ledger.errors() or 'none lost'}; {refused:,} refused"
    goal = 0.98 * rate
    pushes = sum(run.pushes for run in runs)
    spent = _sum([run.spent for run in runs])
    rows = [
        Row(f"{name}: delivered", "/s", [run.rate for run in runs], at_least=goal, note=note),
        Row(f"{name}: p50", "ms", [run.p50 for run in runs]),
        Row(f"{name}: p99", "ms", [run.p99 for run in runs], at_most=25 if scene.devices <= MANY else None),
        *spent.rows(name, "push", pushes),
    ]
    if scene.redis is not None:
        rows.append(Row(f"{name}: Redis' memory for each, delivered", "bytes", [spent.redis_memory / pushes]))
    return rows


@dataclass(frozen=True, slots=True)
class Volley:
    """Targeted pushes of one run; times are milliseconds."""

    pushes: int
    refused: int
    rate: float  # delivered a second
    p50: float
    p99: float
    spent: Spent


def _push_for(scene: Scene, seconds: float, together: int) -> Volley:
    scene.ledger.latencies.clear()
    before, started = scene.spent(), time.perf_counter()
    publisher = _publisher(scene, range(scene.devices), scene.targeted_rate, together=together)
    while time.perf_counter() - started < seconds:
        scene.reactor.turn(publisher.send_due())
    _take_all(scene)
    took = max(seconds, time.perf_counter() - started)
    p50, p99 = (quantile(scene.ledger.latencies, share) * MS for share in (0.5, 0.99))
    spent = scene.spent().since(before)
    return Volley(publisher.accepted, publisher.refused, publisher.accepted / took, p50, p99, spent)


def _take_all(scene: Scene, limit: float = ARRIVAL_LIMIT) -> None:
    """Until every targeted push has arrived."""
    deadline = time.perf_counter() + limit
    while True:
        scene.swarms.take_arrivals(scene.ledger)
        if not scene.ledger.missing:
            return
        if time.perf_counter() > deadline:
            raise TimeoutError(f"{scene.ledger.missing:,} targeted pushes have not arrived after {limit:g} s")
        scene.reactor.run_for(0.05)


def _targeted_amid(scene: Scene) -> list[Row]:
    scene.guard.what = "fleet: targeted amid broadcasts"
    medians, worst = [], []
    for _ in range(scene.stage.plan.runs):
        scene.run_for(scene.stage.plan.calm)
        _take_all(scene)
        scene.ledger.latencies.clear()
        _broadcast(scene, _publisher(scene, range(PROBES), PROBE_RATE).send_due)
        _take_all(scene)
        medians.append(quantile(scene.ledger.latencies, 0.5) * MS)
        worst.append(quantile(scene.ledger.latencies, 0.99) * MS)
        scene.stage.say(f"fleet: targeted amid a broadcast: p50 {medians[-1]:.1f}, p99 {worst[-1]:.1f} ms")
    name = f"{scene.name}: targeted amid a broadcast"
    goal = 50 if scene.devices <= MANY else None
    return [Row(f"{name}: p50", "ms", medians), Row(f"{name}: p99", "ms", worst, at_most=goal)]


# A node dies


def _death(scene: Scene) -> list[Row]:
    """One process is killed while pushes come in, and everybody is pushed to at once; the supervisor starts it again.
    Publishers post again, with the same cid, what it did not answer."""
    scene.guard.what = "fleet: a node's death"
    scene.run_for(scene.stage.plan.calm)
    watch = Comeback(scene, _publisher(scene, range(scene.devices), PROBE_RATE, cids=True))
    os.kill(scene.server.addresses["workers"][0]["pid"], signal.SIGKILL)
    told = _broadcast(scene, watch.turn)
    _turn_until(scene, lambda: watch.back > 0, "all devices back", watch.turn, RETURN_LIMIT)
    _take_all(scene, RETURN_LIMIT)
    settled = time.perf_counter() - watch.started
    scene.stage.say(f"fleet: {watch.gone:,} devices lost their node and were back after {watch.back:.1f} s")
    name = f"{scene.name}: a node is killed"
    failed = sum(scene.swarms.status.failed.values())
    return [
        Row(
            f"{name}: its {watch.gone:,} devices are back",
            "s",
            [watch.back],
            at_most=30,
            note=f"{failed:,} tries failed",
        ),
        Row(f"{name}: a broadcast of that moment is recorded", "s", [told.recorded], at_most=30),
        Row(
            f"{name}: all that was owed is delivered",
            "s",
            [settled],
            at_most=30,
            note=f"{watch.publisher.sent:,} targeted pushes; {told.repeats:,} of the broadcast came twice",
        ),
    ]


class Comeback:
    """Follows who lost the node, while pushes go on."""

    def __init__(self, scene: Scene, publisher: OpenLoop) -> None:
        self._scene = scene
        self.publisher = publisher
        self._lost_before = sum(scene.swarms.renew().lost.values())
        self._looked = 0.0
        self.started = time.perf_counter()
        self.gone = 0  # devices that lost their connection
        self.back = 0.0  # seconds until nobody was missing any more; 0: somebody is

    def turn(self) -> float:
        """Seconds until there is something to do. Raises SwarmError when a device was refused for good."""
        now = time.perf_counter()
        if now - self._looked > LOOK:
            self._looked = now
            self._look(now)
        return self.publisher.send_due()

    def _look(self, now: float) -> None:
        scene = self._scene
        status = scene.swarms.status
        scene.guard.show(status)
        if status.refused:
            raise SwarmError(f"after a node's death: {status.line()}")
        self.gone = sum(status.lost.values()) - self._lost_before
        if self.back == 0 and self.gone and status.online == scene.devices:
            self.back = now - self.started
        scene.swarms.look()
