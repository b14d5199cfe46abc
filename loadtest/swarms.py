"""A fleet of any size on one machine: processes of simulated devices, driven from here.

A process may have some 20,000 files open, so a million devices are 52 processes, forked from one that imported
everything. They are asked over sockets; whoever asks goes on turning its own reactor meanwhile. On the way out, and
when anything fails, the whole process group is killed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from loadtest.ledger import Ledger
from loadtest.reactor import Reactor
from loadtest.roster import Who
from loadtest.server import Address
from loadtest.swarm_process import Order, Share
from loadtest.tally import read_arrivals

DEVICES_EACH: Final = 19_500  # of the 20,000 files a process may have open
MOST_PROCESSES: Final = 250  # one octet of the source addresses
ANSWER_LIMIT: Final = 60.0
STOP_LIMIT: Final = 60.0  # seconds; a million sockets take some to close
FAILURE_LIMIT: Final = 5.0
LOOK: Final = 0.25  # seconds between two looks at how things are


class SwarmError(Exception):
    """A process ended, or devices did not do what they were to do."""


@dataclass(frozen=True, slots=True)
class Status:
    """Of all processes together."""

    online: int = 0
    wanted: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """For whoever waits."""
        told = [f"{self.online:,} of {self.wanted:,} online", f"{self.counts.get('acked', 0):,} acked"]
        for name, reasons in (("lost", self.lost), ("failed", self.failed), ("refused", self.refused)):
            if reasons:
                which = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(2))
                told.append(f"{name}: {which}")
        return "; ".join(told)


@dataclass(frozen=True, slots=True)
class Arrived:
    """How far a broadcast has come."""

    count: int
    repeats: int
    first: float  # time.perf_counter; 0: nobody has it
    last: float


Show = Callable[[Status], None]
Take = Callable[[int, Any], None]  # gets a process's number and its answer


class Swarms:
    """Devices 0 to `devices`-1 of `who`, in as many processes as they need; a context manager."""

    def __init__(
        self,
        reactor: Reactor,
        who: Who,
        devices: int,
        addresses: Sequence[Address],
        *,
        processes: int | None = None,
        probes: int = 0,
        log: Path | None = None,
        **settings: Any,
    ) -> None:
        """`settings`: fields of Order. `probes`: so many devices, the first ones, have a process of their own.
        `log`: where the processes write what goes wrong."""
        self.reactor = reactor
        self.devices = devices
        many = devices - probes
        crowds = processes or -(-many // DEVICES_EACH)
        self._edges = [probes + many * n // crowds for n in range(crowds + 1)]
        if probes:
            self._edges.insert(0, 0)
        self.processes = len(self._edges) - 1
        if self.processes > MOST_PROCESSES:
            raise SwarmError(
                f"{devices:,} devices need {self.processes} processes, more than {MOST_PROCESSES}"
            )
        self._who = who
        self._addresses = addresses
        self._settings = settings
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._connections: list[Connection] = []
        self._takers: list[deque[Take]] = []
        self._looking = False  # a status was asked for
        self.status = Status()

    # Life

    def __enter__(self) -> Self:
        ours, theirs = zip(*(socket.socketpair() for _ in range(self.processes)), strict=True)
        self._connections = [Connection(end.detach()) for end in ours]
        spans = zip(theirs, pairwise(self._edges), strict=True)
        shares = [Share(end.fileno(), first, after - first) for end, (first, after) in spans]
        order = Order(self._who, list(self._addresses), shares, **self._settings)
        command = [sys.executable, "-m", "loadtest.swarm_process"]
        with open(self._log or os.devnull, "wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stderr=log if self._log else None,
                pass_fds=[end.fileno() for end in theirs],
                start_new_session=True,
            )
        for end in theirs:
            end.close()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as order_to:  # if it ended, its socket tells
            order_to.write(msgspec.json.encode(order, enc_hook=str))
        self._takers = [deque() for _ in self._connections]
        for number, connection in enumerate(self._connections):
            self.reactor.watch(connection.fileno(), partial(self._answered, number))
        try:
            self.renew()  # from here on all of them run
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections:
            self.reactor.forget(connection.fileno())
            connection.close()
        process = self._process
        assert process is not None
        try:
            status = process.wait(STOP_LIMIT if kind is None else FAILURE_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        if status and kind is None:
            raise SwarmError(f"the fleet ended with status {status}: {self._last_words()}")

    @property
    def shares(self) -> list[range]:
        """The devices of each process."""
        return [range(first, after) for first, after in pairwise(self._edges)]

    @property
    def pids(self) -> list[int]:
        """Of the one that forked the processes, and theirs in order."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        return [self._process.pid, *map(int, children.split())]

    # Asking

    def ask(self, name: str, *arguments: object) -> list[Any]:
        """All processes, and their answers in order; the reactor turns meanwhile."""
        taken: list[list[Any]] = []
        self.request(name, *arguments, done=taken.append)
        self.reactor.run_until(lambda: bool(taken), f"answers to {name}", ANSWER_LIMIT)
        return taken[0]

    def request(self, name: str, *arguments: object, done: Callable[[list[Any]], None]) -> None:
        """As `ask`, but returns at once; `done` gets the answers."""
        answers: dict[int, Any] = {}

        def take(number: int, answer: Any) -> None:
            answers[number] = answer
            if len(answers) == self.processes:
                done([answers[number] for number in range(self.processes)])

        self._send(name, arguments, take)

    def look(self) -> None:
        """Have `status` renewed soon; returns at once."""
        if self._looking:
            return
        self._looking = True

        def take(answers: list[Any]) -> None:
            self.status = _sum(answers)
            self._looking = False

        self.request("status", done=take)

    def _send(self, name: str, arguments: tuple[object, ...], take: Take) -> None:
        for number, connection in enumerate(self._connections):
            self._takers[number].append(take)
            try:
                connection.send((name, arguments))
            except ConnectionError:
                raise self._ended(number) from None

    def _answered(self, number: int, _: int) -> None:
        try:
            answer = self._connections[number].recv()
        except (EOFError, ConnectionError):
            raise self._ended(number) from None
        self._takers[number].popleft()(number, answer)

    def _ended(self, number: int) -> SwarmError:
        return SwarmError(f"process {number} of the fleet ended: {self._last_words()}")

    def _last_words(self) -> str:
        return "see above" if self._log is None else self._log.read_text(errors="replace")[-2000:]

    # What a fleet does

    def connect(self, rate: float, limit: float, show: Show | None = None) -> float:
        """Bring all online, `rate` a second; seconds until the last CONNACK. Raises SwarmError after `limit` seconds,
        and as soon as a device is refused for good."""
        started = time.perf_counter()
        self.ask("connect", rate / self.processes)
        self.wait(lambda status: status.online == self.devices, "all devices online", limit, show)
        return time.perf_counter() - started

    def wait(self, done: Callable[[Status], bool], what: str, limit: float, show: Show | None = None) -> None:
        """Look until `done`; `show` gets each status. Raises SwarmError."""
        deadline = time.perf_counter() + limit
        while True:
            self.renew()
            if show is not None:
                show(self.status)
            if self.status.refused:
                raise SwarmError(f"{what}: {self.status.line()}")
            if done(self.status):
                return
            if time.perf_counter() > deadline:
                raise SwarmError(f"{what}: not within {limit:g} s: {self.status.line()}")
            self.reactor.run_for(LOOK)

    def renew(self) -> Status:
        """Look now."""
        self.look()
        self.reactor.run_until(lambda: not self._looking, "the processes' status", ANSWER_LIMIT)
        return self.status

    def arrived(self, serial: int) -> Arrived:
        """Of a broadcast that was announced with `expect`."""
        counts, repeats, firsts, lasts = zip(*self.ask("marks", serial), strict=True)
        return Arrived(sum(counts), sum(repeats), min(filter(None, firsts), default=0.0), max(lasts))

    def missing(self, serial: int, limit: int = 10) -> list[int]:
        """Devices that have not got the broadcast."""
        return [device for devices in self.ask("missing", serial, limit) for device in devices][:limit]

    def take_arrivals(self, ledger: Ledger) -> None:
        """Enter the targeted pushes that came since the last call."""
        for raw in self.ask("drain"):
            for serial, device, at, _ in read_arrivals(raw):
                ledger.take_targeted(device, serial, at)


def _sum(answers: Iterable[tuple[int, int, dict[str, Any]]]) -> Status:
    status = Status()
    online = wanted = 0
    for here, wanted_here, counts in answers:
        online += here
        wanted += wanted_here
        for name, value in counts.items():
            if isinstance(value, int):
                status.counts[name] = status.counts.get(name, 0) + value
            else:
                getattr(status, name).update(value)
    return replace(status, online=online, wanted=wanted)
