"""What every scenario stands on: sizes, prepared devices, a server on core 0, the generator on core 1."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtest.fleet import KEEP_ALIVE, Fleet
from loadtest.http_pool import HttpPool
from loadtest.ledger import Ledger
from loadtest.population import Population, register
from loadtest.publishing import OpenLoop
from loadtest.reactor import Reactor
from loadtest.report import Load
from loadtest.server import Server, Usage, read_machine_usage, read_usage

SERVER_CORE: Final = 0
GENERATOR_CORE: Final = 1
HTTP_CONNECTIONS: Final = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """How large and how often."""

    runs: int = 5
    devices: int = 15_000  # online at once; a process may have 20,000 files open here
    tls_devices: int = 3_000
    warm_devices: int = 1_000
    registered: int = 100_000  # for accepts and offline
    online_for_targeted: int = 2_000
    broadcasts: int = 20  # in one run
    seconds: float = 5.0  # of one open-loop or closed-loop run
    targeted_waiting: int = 10  # pushes that wait for each offline device
    subscribers: int = 10_000  # of one ordinary topic
    subscriptions: int = 100_000  # in one app
    sessions: int = 400  # that hold them
    cycles: int = 1_000_000  # of connecting and disconnecting
    churn_limit: float = 3600.0  # seconds, after which those that were done must do
    reachable: int = 1_000_000  # registered devices whose audiences are resolved
    fleet_devices: int = 100_000  # of fleet and crowd
    nodes: int = 6  # processes of a fleet's server
    brokers: int = 1  # processes beside them; 0: the nodes are brokers, too
    hold: float = 600.0  # seconds for which a fleet must be stable
    calm: float = 3.0  # seconds between two measurements of a fleet
    idle: float = 90.0  # seconds over which nothing but pings happens
    day: float = 120.0  # seconds of a mixed day: a thousand samples of the event loop's lag


QUICK: Final = Plan(
    runs=2,
    devices=1_500,  # more than fanout_limit, or there were no broadcasts
    tls_devices=200,
    warm_devices=200,
    registered=3_000,
    online_for_targeted=500,
    broadcasts=12,
    seconds=2.0,
    targeted_waiting=3,
    subscribers=1_500,
    subscriptions=10_000,
    sessions=200,
    cycles=4_000,
    churn_limit=60.0,
    reachable=3_000,
    fleet_devices=1_500,
    nodes=2,
    hold=5.0,
    calm=0.5,
    idle=2.0,
    day=3.0,
)


IDLE: Final = Load(0.0, 0.0)


@dataclass(slots=True)
class Meter:
    """CPU use over a `with` block: the process `pid`, this one, and all others."""

    pid: int
    load: Load = IDLE
    server_cpu: float = 0.0  # seconds
    generator_cpu: float = 0.0
    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        before = self._read()
        yield
        after = self._read()
        server, generator, machine = (now.busy_since(then) for now, then in zip(after, before, strict=True))
        self.load = Load(server, generator, max(0.0, machine - server - generator))
        self.server_cpu = after[0].cpu - before[0].cpu
        self.generator_cpu = after[1].cpu - before[1].cpu
        self.seconds = after[0].at - before[0].at

    def _read(self) -> tuple[Usage, Usage, Usage]:
        return read_usage(self.pid), read_usage(os.getpid()), read_machine_usage()


class Stage:
    """Made once for a command; `directory` is emptied at the end. `source`: a checkout whose server is measured,
    instead of the installed one."""

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        *,
        settings: Mapping[str, str] | None = None,
        profile: Path | None = None,
        source: Path | None = None,
    ) -> None:
        self.plan = plan
        self.source = source
        self.directory = directory
        self.settings = settings or {}
        self._profile = profile
        self._populations: dict[str, Population] = {}
        self._servers = 0
        self.two_cores = len(os.sched_getaffinity(0)) > 1 or (os.cpu_count() or 1) > 1
        if self.two_cores:
            os.sched_setaffinity(0, {GENERATOR_CORE})

    @contextmanager
    def whole_machine(self) -> Iterator[None]:
        """Both cores for everything meanwhile: where many processes take turns, none has one of its own."""
        mine = os.sched_getaffinity(0)
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        try:
            yield
        finally:
            os.sched_setaffinity(0, mine)

    @property
    def server_core(self) -> int | None:
        return SERVER_CORE if self.two_cores else None

    def say(self, text: str) -> None:
        """Progress, for whoever waits."""
        whose = "" if self.source is None else f" [{self.source}]"
        sys.stderr.write(f"{time.strftime('%H:%M:%S')}{whose} {text}\n")
        sys.stderr.flush()

    def population(self, count: int, *, is_open: bool = False) -> Population:
        """An app with `count` registered devices, made on first use."""
        name = f"population-{count}{'-open' if is_open else ''}"
        found = self._populations.get(name)
        if found is None:
            started = time.perf_counter()
            directory = self.directory / name / "data"
            directory.parent.mkdir(parents=True)
            found = register(directory, count, is_open=is_open, core=self.server_core, source=self.source)
            self._populations[name] = found
            self.say(f"registered {count:,} devices in {time.perf_counter() - started:.1f} s")
        return found

    @contextmanager
    def server(self, population: Population, settings: Mapping[str, str] | None = None) -> Iterator[Server]:
        """A fresh server on a copy of the population's data."""
        self._servers += 1
        home = self.directory / f"server-{self._servers}"
        home.mkdir(parents=True)
        population.copy_to(home / "data")
        both = {**self.settings, **(settings or {})}
        server = Server(home / "data", core=self.server_core, settings=both, source=self.source)
        server.start()
        try:
            yield server
        finally:
            server.stop()
            shutil.rmtree(home)

    @contextmanager
    def profiled(self, server: Server, name: str) -> Iterator[None]:
        """Sample the server's stacks meanwhile with py-spy, if that was asked for: NAME.txt, one line a stack."""
        if self._profile is None:
            yield
            return
        self._profile.mkdir(parents=True, exist_ok=True)
        # Samples stop the server for a moment: a higher rate, or native frames, would slow it several times.
        command = ["py-spy", "record", "--format", "raw", "--rate", "200", "--duration", "600"]
        where = ["--pid", str(server.pid), "--output", str(self._profile / f"{name}.txt")]
        spy = subprocess.Popen([*command, *where], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            spy.send_signal(2)
            spy.wait(60)


@dataclass(slots=True)
class Cast:
    """A fleet, its account and a publisher, in front of one server."""

    server: Server
    population: Population
    reactor: Reactor
    ledger: Ledger
    fleet: Fleet
    pool: HttpPool
    msg_id_digits: int = 18

    def open_loop(self, devices: Sequence[int], rate: float) -> OpenLoop:
        """Pushes to random ones of these devices, `rate` a second."""
        names = self.population.names.__getitem__
        return OpenLoop(self.pool, self.ledger, names, devices, rate, self.msg_id_digits)

    def wait_for_offline(self) -> None:
        """Until the server has noticed that nobody is connected any more."""
        self.wait_for_online(0)

    def wait_for_online(self, most: int) -> None:
        """Until the server has noticed who is not connected any more."""
        deadline = time.perf_counter() + 60
        while self.server.metric("connections_live") > most:
            if time.perf_counter() > deadline:
                raise TimeoutError(f"the server still counts more than {most} connections after 60 s")
            self.reactor.run_for(0.05)


@contextmanager
def cast(
    server: Server,
    population: Population,
    devices: int,
    *,
    urgent: frozenset[int] = frozenset(),
    clean_start: bool = False,
    keep_alive: int = KEEP_ALIVE,
) -> Iterator[Cast]:
    """Devices 0 to `devices`-1 of the population, none connected yet."""
    reactor, ledger = Reactor(), Ledger(devices)
    packets = population.connect_packets(devices, clean_start=clean_start, keep_alive=keep_alive)
    fleet = Fleet(reactor, server.address("mqtt"), packets, ledger.take, urgent=urgent)
    pool = population.pool(reactor, server, HTTP_CONNECTIONS)
    try:
        yield Cast(server, population, reactor, ledger, fleet, pool)
    finally:
        fleet.close()
        pool.close()
        reactor.close()
