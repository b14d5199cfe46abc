"""One trial from inside: devices, publisher, account and samples, all turned by one loop.

What is due is sent when it is due, and never waits for an answer. The loop looks at the devices' processes four times
a second, asking all and waiting for none; so a server that stands still, or is gone, changes what is measured and not
what is done.
"""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Final, Protocol

from loadtest.histogram import Histogram
from loadtest.publishing import Schedule
from loadtest.swarms import Swarms
from loadtest.trial.account import Account
from loadtest.trial.plan import Plan, TrialError
from loadtest.trial.sampler import Process, Sampler
from loadtest.trial.senders import Sender
from loadtest.trial.target import TAGS, Target
from loadtest.wires import suspect_tls

LOOK: Final = 0.25  # seconds between two looks at the processes
AHEAD: Final = 0.05  # seconds
LEAD: Final = 0.5  # seconds before it is due, a push to many is announced to the processes
JUST_BEFORE: Final = 1e-6  # seconds: what is due at the end of a phase is not due in it
HURRY: Final = 1.0  # seconds for what is under way when somebody stops the trial
SHUT_OUT: Final = {"closed", "Connection reset by peer"}  # what a CONNECT gets where TLS is spoken
SHOWN: Final = 5  # windows of which the display has the latencies
Rate = Callable[[float], float]  # gets seconds since the phase began


@dataclass(frozen=True, slots=True)
class Phase:
    """Seconds since the trial began."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class View:
    """How things are, for the display."""

    phase: str
    seconds: float  # since the trial began
    left: float | None  # of the phase, if it is known
    devices: int
    online: int
    sent: int
    accepted: int
    refused: int
    arrived: int
    a_second: float  # deliveries, in the last window
    latencies: Histogram  # of the last windows
    behind: float  # seconds: the latest push of the last windows
    busiest: float  # share of a core of the generator's process that has most
    memory: int | None  # bytes, of the server


class Display(Protocol):
    def show(self, view: View) -> None: ...


class Flow(Protocol):
    """Pushes of one kind, on a schedule that ends at the time.perf_counter `end`."""

    def start(self, begin: float) -> None: ...

    def send_due(self, now: float, end: float) -> float:
        """Send what is due by now; when to call again."""
        ...

    def is_done(self, end: float) -> bool:
        """All that is due by the end was sent."""
        ...


@dataclass(slots=True)
class Conductor:
    plan: Plan
    target: Target
    swarms: Swarms
    account: Account
    sampler: Sampler
    sender: Sender | None
    display: Display
    begun: float  # time.perf_counter
    stopped: bool = False  # somebody asked for the end
    phases: list[Phase] = field(default_factory=list)
    queued: int = 0  # requests that waited for a connection, at most
    given_up: str = ""  # what was not reached
    _phase: str = ""
    _until: float | None = None
    _suspected: bool = False  # of wanting TLS
    _wants_tls: bool = False
    _collecting: bool = False
    _next_look: float = 0.0
    _windows: int = 0  # that were sampled

    # What scenarios are made of

    def connect(self, rate: float, what: str = "connect") -> None:
        """Bring all devices online, `rate` a second. Goes on without those that do not come in time. Raises
        TrialError if none does."""
        count = self.swarms.devices
        limit = time.perf_counter() + count / rate + self.plan.patience
        with self.phase(what, count / rate):
            # All processes have one time to begin from, which is none that has passed.
            begin = time.perf_counter() + AHEAD
            self.swarms.request("connect", rate / self.swarms.processes, begin, done=_ignore)
            self.turn_until(lambda: self._all_decided() or self._is_hopeless(), limit)
        self._look_and_wait()
        status = self.swarms.status
        if not status.online and not self.stopped:
            raise TrialError(f"no device came online: {status.line()}{suspect_tls(self.target.mqtt)}")
        if status.online < count and not self.stopped:
            self.given_up = (
                f"{count - status.online:,} of {count:,} devices did not come online: {status.line()}"
            )

    def hold(self, seconds: float, what: str = "hold") -> None:
        """Nothing but keep-alives."""
        with self.phase(what, seconds):
            self.turn_until(lambda: False, time.perf_counter() + seconds)

    def push(self, seconds: float, flows: Sequence[Flow], what: str = "push") -> None:
        """Whatever the flows have due."""
        assert self.sender is not None
        begin = time.perf_counter()
        end = begin + seconds - JUST_BEFORE
        for flow in flows:
            flow.start(begin)
        with self.phase(what, seconds):
            while not self.stopped:
                now = time.perf_counter()
                due = min(flow.send_due(now, end) for flow in flows)
                self.queued = max(self.queued, self.sender.waiting)
                if now >= end and all(flow.is_done(end) for flow in flows):
                    break  # also where this loop was late
                self._turn(due if now >= end else min(due, end))

    def wait_for_answers(self) -> None:
        """Of the publisher's pushes."""
        with self.phase("answers", None):
            self.turn_until(lambda: not self.account.posted, time.perf_counter() + self.plan.patience)

    def settle(self) -> None:
        """Wait for what is under way, for as long as it may take."""
        patience = HURRY if self.stopped else self.plan.patience
        with self.phase("settle", None):
            stopped, limit = self.stopped, time.perf_counter() + patience
            while not self.account.settled and time.perf_counter() < limit and stopped == self.stopped:
                self._turn(limit)

    def wait_for_devices(self, seconds: float) -> None:
        with self.phase("devices come back", seconds):
            self.turn_until(self._all_decided, time.perf_counter() + seconds)

    def _all_decided(self) -> bool:
        status = self.swarms.status
        return status.online + sum(status.refused.values()) >= self.swarms.devices

    def _is_hopeless(self) -> bool:
        """Nobody is let in, because the server wants TLS: it is asked once."""
        status = self.swarms.status
        if not self._suspected and not status.online and SHUT_OUT & status.failed.keys():
            self._suspected = True
            self._wants_tls = bool(suspect_tls(self.target.mqtt))
        return self._wants_tls

    # Flows

    def to_devices(self, rate: Rate) -> Flow:
        """Pushes to one device each, whichever it is."""
        devices = range(self.swarms.devices)
        return _Singles(self, rate, lambda: random.choice(devices))

    def to_devices_in_turn(self, rate: Rate) -> Flow:
        turns = cycle(range(self.swarms.devices))
        return _Singles(self, rate, lambda: next(turns))

    def to_all(self, rate: Rate) -> Flow:
        return _Shouts(self, rate, lambda: None)

    def to_groups(self, rate: Rate) -> Flow:
        """Pushes to the devices of one tag each."""
        return _Shouts(self, rate, lambda: random.randrange(TAGS))

    # The loop

    @contextmanager
    def phase(self, name: str, seconds: float | None) -> Iterator[None]:
        begin = time.perf_counter()
        self._phase = name
        self._until = None if seconds is None else begin + seconds
        try:
            yield
        finally:
            self.phases.append(Phase(name, begin - self.begun, time.perf_counter() - self.begun))

    def turn_until(self, done: Callable[[], bool], limit: float) -> None:
        """Or until the time.perf_counter `limit`, or somebody stops the trial."""
        while not self.stopped and not done() and time.perf_counter() < limit:
            self._turn(limit)

    def finish(self) -> None:
        """The last look: what the processes know is in the account then."""
        self._look_and_wait()
        self._sample()

    def _turn(self, due: float) -> None:
        now = time.perf_counter()
        if now >= self._next_look:
            self._next_look = now + min(LOOK, self.plan.window)
            self._look()
            if self.account.number(now) > self._windows:
                self._windows = self.account.number(now)
                self._sample()
            self.display.show(self._view(now))
        self.swarms.reactor.turn(max(0.0, min(due, self._next_look) - now))

    def _look(self) -> None:
        self.swarms.look()
        if not self._collecting:
            self._collecting = True

            def take(told: list) -> None:  # type: ignore[type-arg]
                self._collecting = False
                self.account.collect(told)

            self.swarms.request("collect", done=take)

    def _look_and_wait(self) -> None:
        self.swarms.reactor.run_until(lambda: not self._collecting, "the processes' account")
        self._look()
        self.swarms.renew()
        self.swarms.reactor.run_until(lambda: not self._collecting, "the processes' account")

    def _sample(self) -> None:
        self.sampler.sample(self.swarms.status.online, self.account.arrivals)

    def _view(self, now: float) -> View:
        account, samples = self.account, self.sampler.samples
        last = account.number(now)
        windows = [account.windows[n] for n in range(max(0, last - SHOWN), last + 1) if n in account.windows]
        latencies = Histogram()
        for window in windows:
            latencies.merge(window.latencies.counts)
        a_second = 0.0
        if len(samples) > 1:
            a_second = (samples[-1].arrived - samples[-2].arrived) / (samples[-1].at - samples[-2].at)
        return View(
            phase=self._phase,
            seconds=now - self.begun,
            left=None if self._until is None else max(0.0, self._until - now),
            devices=self.swarms.devices,
            online=self.swarms.status.online,
            sent=account.sent,
            accepted=account.accepted,
            refused=account.refusals.total(),
            arrived=account.arrivals,
            a_second=a_second,
            latencies=latencies,
            behind=max((window.behind for window in windows), default=0.0),
            busiest=max((use.cpu[-1] for use in self.sampler.uses if use.cpu), default=0.0),
            memory=next((one.server_memory for one in reversed(samples) if one.server_memory), None),
        )


def _ignore(_: object) -> None:
    """Of an answer that says nothing."""


def processes_of(swarms: Swarms) -> list[Process]:
    """The generator's."""
    _, *pids = swarms.pids
    players = [
        Process(f"devices {share.start:,} to {share.stop - 1:,}", pid, len(share))
        for pid, share in zip(pids, swarms.shares, strict=True)
    ]
    return [Process("publisher", os.getpid()), *players]


class _Singles:
    def __init__(self, conductor: Conductor, rate: Rate, choose: Callable[[], int]) -> None:
        assert conductor.sender is not None
        self._send = conductor.sender.to_device
        self._account = conductor.account
        self._rate = rate
        self._choose = choose

    def start(self, begin: float) -> None:
        self._schedule = Schedule(lambda now: self._rate(now - begin), begin)

    def send_due(self, now: float, end: float) -> float:
        for due in self._schedule.take(min(now, end)):
            device = self._choose()
            serial = self._account.post_targeted(device, due)
            self._send(serial, device, partial(self._account.answered, serial))
        return self._schedule.due

    def is_done(self, end: float) -> bool:
        return self._schedule.due > end


@dataclass(slots=True)
class _Announced:
    serial: int
    due: float
    group: int | None
    known: bool = False  # to all processes


class _Shouts:
    """Pushes to many: the processes must know of one before it arrives."""

    def __init__(self, conductor: Conductor, rate: Rate, choose: Callable[[], int | None]) -> None:
        """`choose` gives the group of the next, None: all."""
        assert conductor.sender is not None
        self._sender = conductor.sender
        self._account = conductor.account
        self._swarms = conductor.swarms
        self._rate = rate
        self._choose = choose
        self._announced: deque[_Announced] = deque()

    def start(self, begin: float) -> None:
        self._schedule = Schedule(lambda now: self._rate(now - begin), begin + LEAD)

    def send_due(self, now: float, end: float) -> float:
        for due in self._schedule.take(min(now + LEAD, end)):
            self._announce(due)
        while self._announced and self._announced[0].known and self._announced[0].due <= now:
            self._send(self._announced.popleft())
        if self._announced and self._announced[0].known:
            return min(self._announced[0].due, self._schedule.due - LEAD)
        return self._schedule.due - LEAD  # what the processes answer ends the wait, too

    def is_done(self, end: float) -> bool:
        return not self._announced and self._schedule.due > end

    def _announce(self, due: float) -> None:
        one = _Announced(self._account.next_serial(), due, self._choose())
        self._announced.append(one)
        among, residue = (1, 0) if one.group is None else (TAGS, one.group)

        def take(_: object) -> None:
            one.known = True

        self._swarms.request("expect_timed", one.serial, due, among, residue, done=take)

    def _send(self, one: _Announced) -> None:
        devices = self._swarms.devices
        targets = devices if one.group is None else len(range(one.group, devices, TAGS))
        self._account.post_shout(one.serial, one.due, targets)

        done = partial(self._account.answered, one.serial)
        if one.group is None:
            self._sender.to_all(one.serial, done)
        else:
            self._sender.to_group(one.serial, one.group, done)
