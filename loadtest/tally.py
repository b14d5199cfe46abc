"""What the devices of one process got: a bit for each device and broadcast, a line for each targeted push.

Who was to get a targeted push, and when it was due, the parent knows: it holds the arrivals against its ledger.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple

from loadtest.histogram import Timeline

ARRIVAL: Final = (
    4  # numbers of one: serial, device, when it came and since when the device was to be there, both µs
)
US: Final = 1e6


class Collected(NamedTuple):
    """What one process has to tell since it was asked before; of broadcasts and counts, since the start."""

    arrivals: bytes  # of targeted pushes
    latencies: dict[int, Counter[int]]  # of timed broadcasts: window -> bucket -> count
    connects: dict[int, Counter[int]]
    broadcasts: dict[int, tuple[int, int, int]]  # serial -> Tally.progress
    behind: float  # seconds: connects, the latest


class Marks:
    """One broadcast: a bit for each device that has it."""

    __slots__ = ("_bits", "count", "first", "last", "repeats")

    def __init__(self, devices: int) -> None:
        self._bits = bytearray(-(-devices // 8))
        self.count = 0
        self.repeats = 0
        self.first = 0.0  # when it came to a device of this process, time.perf_counter; 0: to none
        self.last = 0.0

    def mark(self, place: int) -> None:
        byte, bit = place >> 3, 1 << (place & 7)
        if self._bits[byte] & bit:
            self.repeats += 1
            return
        self._bits[byte] |= bit
        self.count += 1
        self.last = time.perf_counter()
        if self.count == 1:
            self.first = self.last

    def has(self, place: int) -> bool:
        return bool(self._bits[place >> 3] & 1 << (place & 7))


class TimedMarks(Marks):
    """One whose latencies count, and which may be for some of the devices only: every `among`th, from `residue`
    on."""

    __slots__ = ("_among", "_due", "_first", "_latencies", "_residue", "_since", "_told", "_wanted", "strays")

    def __init__(self, tally: Tally, due: float, among: int, residue: int) -> None:
        super().__init__(tally.count)
        self._latencies = tally.latencies
        self._first = tally.first
        self._since = tally.since
        self._due = due
        self._among = among
        self._residue = residue
        self.strays = 0  # came to others
        self._wanted = len(range((residue - tally.first) % among, tally.count, among))
        self._told = (0, 0, 0)

    @property
    def is_complete(self) -> bool:
        return self.count == self._wanted

    def news(self) -> tuple[int, int, int] | None:
        """How many have it, got it again, and were not to get it; None: as at the last call."""
        now = (self.count, self.repeats, self.strays)
        told, self._told = self._told, now
        return None if now == told else now

    def mark(self, place: int) -> None:
        if (self._first + place) % self._among != self._residue:
            self.strays += 1
            return
        before = self.count
        super().mark(place)
        if self.count > before:
            self._latencies.add(max(self._due, self._since[place]), self.last)


class Tally:
    """Of the devices `first` to `first + count - 1`."""

    __slots__ = ("_arrivals", "_broadcasts", "_timed", "count", "first", "latencies", "since")

    def __init__(self, first: int, count: int, window: float = 1.0) -> None:
        """`window`: seconds of which the latencies of timed broadcasts are summed up."""
        self.first = first
        self.count = count
        self.latencies = Timeline(window)
        self.since = array("d", [0.0]) * count  # when a device was to be online, that was away on purpose
        self._broadcasts: dict[int, Marks] = {}
        self._timed: dict[int, TimedMarks] = {}  # some of them
        self._arrivals = array("q")

    def expect(self, serial: int) -> None:
        """A broadcast of this serial is about to be made; any other serial is a targeted push's."""
        self._broadcasts[serial] = Marks(self.count)

    def expect_timed(self, serial: int, due: float, among: int, residue: int) -> None:
        """As `expect`; the broadcast was due then, and is for every `among`th device, from `residue` on."""
        self._timed[serial] = self._broadcasts[serial] = TimedMarks(self, due, among, residue)

    def progress(self) -> dict[int, tuple[int, int, int]]:
        """The news of the timed broadcasts that have any. One that is complete and has none is forgotten: what comes
        of it after that is an arrival of a targeted push, which the parent knows to be none."""
        told = {serial: news for serial, one in self._timed.items() if (news := one.news())}
        for serial in [s for s, one in self._timed.items() if one.is_complete and s not in told]:
            del self._timed[serial], self._broadcasts[serial]
        return told

    def take(self, device: int, serial: int) -> None:
        """A push arrived: the hot path."""
        marks = self._broadcasts.get(serial)
        if marks is not None:
            marks.mark(device - self.first)
        else:
            since = int(self.since[device - self.first] * US)
            self._arrivals.extend((serial, device, int(time.perf_counter() * US), since))

    def marks(self, serial: int) -> Marks:
        return self._broadcasts[serial]

    def missing(self, serial: int, limit: int) -> list[int]:
        """The first `limit` devices that have not got it."""
        marks = self._broadcasts[serial]
        lacking = (self.first + place for place in range(self.count) if not marks.has(place))
        return [device for device, _ in zip(lacking, range(limit), strict=False)]

    def drain(self) -> bytes:
        """The targeted arrivals since the last call; see `read_arrivals`."""
        arrivals, self._arrivals = self._arrivals, array("q")
        return arrivals.tobytes()


def read_arrivals(raw: bytes) -> Iterator[tuple[int, int, float, float]]:
    """Serial, device and time.perf_counter of each, and since when the device was to be there."""
    numbers = array("q", raw)
    for place in range(0, len(numbers), ARRIVAL):
        serial, device, at, since = numbers[place : place + ARRIVAL]
        yield serial, device, at / US, since / US
