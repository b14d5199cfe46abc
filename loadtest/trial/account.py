"""The trial's account: what was due, what was accepted, what came and when, what is missing; second by second.

Every push is in one of these states: posted (no answer yet), accepted, refused, or unanswered (its connection broke:
it may have been accepted or not). Lost is what was accepted and has not come to a device that was to have it.
A latency counts from when the push was due, or from when its device was to be back, if that was away on purpose and
comes later; and it stands in the window of that moment, so that a server which stands still for a second shows in it.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from loadtest.histogram import Histogram
from loadtest.ledger import Ledger
from loadtest.tally import Collected, read_arrivals

FIRST_SERIALS: Final = range(1, 50_000_000)  # of eight digits: half of them are a trial's own
NO_ANSWER: Final = "no answer"


@dataclass(slots=True)
class Window:
    """Pushes and connects that were due in it."""

    due: int = 0
    latencies: Histogram = field(default_factory=Histogram)  # of deliveries
    connects: Histogram = field(default_factory=Histogram)
    behind: float = 0.0  # the latest push that was sent
    lost: int = 0


@dataclass(slots=True)
class Shout:
    """A push to many, of which the processes tell how far it came."""

    due: float
    targets: int
    come: int = 0


class Account(Ledger):
    """`begin`: the time.perf_counter from which windows of `width` seconds are counted."""

    def __init__(self, begin: float, width: float) -> None:
        super().__init__(0, first=random.choice(FIRST_SERIALS))
        self._width = width
        self._first_window = int(begin / width)
        self.windows: dict[int, Window] = {}
        self.shouts: dict[int, Shout] = {}
        self._shout_progress: dict[int, dict[int, tuple[int, int, int]]] = {}  # process -> serial -> progress
        self.posted: dict[int, float] = {}  # serial -> due
        self.unanswered: set[int] = set()
        self.refusals: Counter[str] = Counter()
        self.sent = 0
        self.accepted = 0
        self.answers = Histogram()  # from when a push was due until it was accepted
        self.behind = Histogram()  # from when it was due until it was sent
        self.connects_behind: Counter[int] = Counter()  # process -> milliseconds, the latest

    def window(self, at: float) -> Window:
        return self._numbered(int(at / self._width))

    def number(self, at: float) -> int:
        """Of a window, from 0 on."""
        return int(at / self._width) - self._first_window

    def end_of(self, number: int) -> float:
        """The time.perf_counter at which a window ends."""
        return (self._first_window + number + 1) * self._width

    def _numbered(self, number: int) -> Window:
        number -= self._first_window
        found = self.windows.get(number)
        if found is None:
            found = self.windows[number] = Window()
        return found

    # What is sent

    def post_targeted(self, device: int, due: float) -> int:
        """The serial of a push to one device that is sent now."""
        serial = self.add_targeted(device, due)
        self._post(serial, due)
        return serial

    def next_serial(self) -> int:
        """For a push to many."""
        self._last += 1
        return self._last

    def post_shout(self, serial: int, due: float, targets: int) -> None:
        """A push to many that is sent now."""
        self.shouts[serial] = Shout(due, targets)
        self._post(serial, due)

    def _post(self, serial: int, due: float) -> None:
        late = max(0.0, time.perf_counter() - due)
        self.sent += 1
        self.posted[serial] = due
        self.behind.add(late)
        window = self.window(due)
        window.due += 1
        window.behind = max(window.behind, late)

    def answered(self, serial: int, refusal: str) -> None:
        """`refusal`: nothing, NO_ANSWER or the reason."""
        due = self.posted.pop(serial)
        if not refusal:
            self.accepted += 1
            self.answers.add(time.perf_counter() - due)
        elif refusal == NO_ANSWER:
            self.unanswered.add(serial)
        else:
            self.refusals[refusal] += 1
            self.forget(serial)
            self.shouts.pop(serial, None)

    # What comes

    def note(self, due: float, at: float) -> None:
        self.window(due).latencies.add(at - due)

    def collect(self, told: Iterable[Collected]) -> None:
        for process, one in enumerate(told):
            for serial, device, at, since in read_arrivals(one.arrivals):
                self.take_targeted(device, serial, at, since)
            for number, counts in one.latencies.items():
                self._numbered(number).latencies.merge(counts)
            for number, counts in one.connects.items():
                self._numbered(number).connects.merge(counts)
            behind = int(one.behind * 1000)
            self.connects_behind[process] = max(self.connects_behind[process], behind)
            self._shout_progress.setdefault(process, {}).update(one.broadcasts)
        self._sum_shouts()

    def _sum_shouts(self) -> None:
        come: Counter[int] = Counter()
        for progress in self._shout_progress.values():
            for serial, (count, _, _) in progress.items():
                come[serial] += count
        for serial, shout in self.shouts.items():
            shout.come = come[serial]

    # What it comes to

    @property
    def arrivals(self) -> int:
        return self.arrived + sum(shout.come for shout in self.shouts.values())

    @property
    def repeated(self) -> int:
        return self.repeats + self._shout_sum(1)

    @property
    def strayed(self) -> int:
        return self.strays + self._shout_sum(2)

    def _shout_sum(self, place: int) -> int:
        tables = self._shout_progress.values()
        return sum(progress[place] for table in tables for progress in table.values())

    def lacking(self) -> list[tuple[float, int]]:
        """Of the accepted pushes: when one was due, and how many devices have not got it."""
        open_ = self.posted.keys() | self.unanswered
        singles = [(due, 1) for serial, (_, due) in self.waiting.items() if serial not in open_]
        many = [(shout.due, shout.targets - shout.come) for s, shout in self.shouts.items() if s not in open_]
        return singles + [one for one in many if one[1] > 0]

    @property
    def settled(self) -> bool:
        """Nothing is under way any more, as far as anybody knows."""
        return not self.posted and not self.lacking()

    def close(self, *, lost: bool) -> int:
        """At the end: how many deliveries are missing. `lost`: they had their time, and go into their windows."""
        missing = self.lacking()
        if lost:
            for due, count in missing:
                self.window(due).lost += count
        return sum(count for _, count in missing)
