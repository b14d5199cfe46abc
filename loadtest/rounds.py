"""Messages to everybody, some at once: the next are posted when the last device has acknowledged the last of those
before. Who posts, and when all is settled, is up to the kind."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

from loadtest.ledger import Ledger
from loadtest.reactor import Reactor


class Rounds(ABC):
    def __init__(self, reactor: Reactor, ledger: Ledger, devices: int, at_once: int) -> None:
        """To `devices` devices, `at_once` messages together."""
        self._reactor = reactor
        self._ledger = ledger
        self._devices = devices
        self._at_once = at_once
        self._open: list[int] = []  # serials
        self.posted = 0

    def run(self, count: int) -> float:
        """Post at least `count`; seconds from the first post until all is settled."""
        started = time.perf_counter()
        self.begin()
        while self.posted < count:
            self.step()
        self.finish()
        return time.perf_counter() - started

    def run_for(self, seconds: float) -> float:
        """Post for so long, at least once; seconds from the first post until all is settled."""
        started = time.perf_counter()
        self.begin()
        while not self.posted or time.perf_counter() - started < seconds:
            self.step()
        self.finish()
        return time.perf_counter() - started

    def begin(self) -> None:
        self.posted, self._open = 0, []

    def step(self, timeout: float = 0.01) -> None:
        """Post the next if none is open, then let things happen for `timeout` seconds."""
        broadcasts = self._ledger.broadcasts
        self._open = [serial for serial in self._open if broadcasts[serial].left]
        if not self._open:
            for _ in range(self._at_once):
                serial = self._ledger.add_broadcast(self._devices)
                self._open.append(serial)
                self.posted += 1
                self._post(serial)
        self._reactor.turn(timeout)

    @abstractmethod
    def finish(self) -> None:
        """Until all that was posted has arrived and is settled."""

    @abstractmethod
    def _post(self, serial: int) -> None: ...
