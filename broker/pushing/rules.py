"""What an app's own rules hold back: quiet hours, and caps on how many pushes a device gets.

A cap counts by device without a number for each: the counts of all devices are bit-sliced, one bitmap for each binary
digit, so that adding a push to a million devices and finding those at the cap is a handful of bitmap operations
(O'Neil and Quass, SIGMOD 1997). Counts are saved in the background: a crash forgets those of the last SAVE_DELAY.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from datetime import time as wall_time
from typing import Final
from zoneinfo import ZoneInfo

import msgspec
from pyroaring import BitMap

from broker.limits import DAY
from broker.model import App, AppSettings, FrequencyCap, QuietHours, RecordChange
from broker.store import Conflict, Store, StoreError, StoreFull, StoreUnavailable

log: Final = logging.getLogger(__name__)

Clock = Callable[[], float]
KIND: Final = "frequency"
SAVE_DELAY: Final = 2.0
SAVE_ATTEMPTS: Final = 5  # against other brokers; the rest goes the next time
MAX_WINDOWS: Final = 10_000  # kept ready; one takes up to ten bitmaps


def has_rules(app: App) -> bool:
    return app.settings.quiet_hours is not None or bool(app.settings.frequency_caps)


# Quiet hours


def quiet_until(settings: AppSettings, now: float) -> float | None:
    """When the quiet hours that it is in end, Unix seconds; None outside of them."""
    quiet = settings.quiet_hours
    if quiet is None:
        return None
    zone = ZoneInfo(quiet.zone)
    at = datetime.fromtimestamp(now, zone)
    for day in (at.date() - timedelta(days=1), at.date()):
        start, end = _hours(quiet, datetime.combine(day, wall_time(), zone))
        if start.timestamp() <= now < end.timestamp():
            return end.timestamp()
    return None


def _hours(quiet: QuietHours, midnight: datetime) -> tuple[datetime, datetime]:
    """The quiet hours that start on this day, as wall-clock times."""
    start, end = wall_time.fromisoformat(quiet.start), wall_time.fromisoformat(quiet.end)
    next_day = timedelta(days=end <= start)
    day = midnight.date()
    return (
        datetime.combine(day, start, midnight.tzinfo),
        datetime.combine(day + next_day, end, midnight.tzinfo),
    )


# Counting by device


class Counts:
    """How often each devno was added. `digits[i]` holds the devnos whose count has the binary digit 2**i."""

    __slots__ = ("digits",)

    def __init__(self, digits: Sequence[BitMap] = ()) -> None:
        self.digits = list(digits)

    def add(self, devnos: BitMap, place: int = 0) -> None:
        """2**place to each of them."""
        carry = devnos
        while carry:
            while place >= len(self.digits):
                self.digits.append(BitMap())
            self.digits[place], carry = self.digits[place] ^ carry, self.digits[place] & carry
            place += 1

    def subtract(self, devnos: BitMap, place: int = 0) -> None:
        """2**place of those whose count is at least that."""
        borrow = devnos & BitMap.union(BitMap(), *self.digits[place:])
        for i in range(place, len(self.digits)):
            digit = self.digits[i]
            self.digits[i], borrow = digit ^ borrow, borrow - digit

    def copy(self) -> Counts:
        return Counts([digit.copy() for digit in self.digits])

    def add_all(self, other: Counts) -> None:
        for place, digit in enumerate(other.digits):
            self.add(digit, place)

    def subtract_all(self, other: Counts) -> None:
        for place, digit in enumerate(other.digits):
            self.subtract(digit, place)

    def at_least(self, count: int, among: BitMap) -> BitMap:
        """Those with `count` or more, which is above 0."""
        if count.bit_length() > len(self.digits):
            return BitMap()
        above, equal = BitMap(), among
        for place in range(len(self.digits) - 1, -1, -1):
            has = equal & self.digits[place]
            if count >> place & 1:
                equal = has
            else:
                above |= has
                equal = equal - has
        return above | equal


class _Window:
    """What one cap of an app counts in the hour or day that it is. What is not saved yet is also counted apart, so
    that several brokers can each add theirs to the one record."""

    __slots__ = ("added", "counts", "read_at", "start", "taken", "version")

    def __init__(self, start: float, counts: Counts, version: int) -> None:
        self.begin(start, counts)
        self.version = version  # of its record
        self.read_at = 0.0  # or saved

    def begin(self, start: float, counts: Counts) -> None:
        self.start = start
        self.counts = counts
        self.added, self.taken = Counts(), Counts()  # since it was saved

    @property
    def changed(self) -> bool:
        return bool(self.added.digits or self.taken.digits)

    def add(self, devnos: BitMap) -> None:
        self.counts.add(devnos)
        self.added.add(devnos)

    def take(self, devnos: BitMap) -> None:
        self.counts.subtract(devnos)
        self.taken.add(devnos)

    def saved(self, added: Counts, taken: Counts) -> None:
        """These are in the record now."""
        self.added.subtract_all(added)
        self.taken.subtract_all(taken)
        for counts in (self.added, self.taken):
            if not any(counts.digits):
                counts.digits.clear()

    def catch_up(self, saved: _Window) -> None:
        """The same, maybe of a later hour or day."""
        if not self.changed:
            self.begin(saved.start, Counts())
        self.merge(saved)

    def merge(self, saved: _Window) -> None:
        """Another broker wrote the record."""
        self.version = saved.version
        counts = saved.counts if saved.start == self.start else Counts()
        counts.add_all(self.added)
        counts.subtract_all(self.taken)
        self.counts = counts


class _Saved(msgspec.Struct):
    start: float
    digits: list[bytes]


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(_Saved).decode


def window_start(cap: FrequencyCap, now: float) -> float:
    at = datetime.fromtimestamp(now, ZoneInfo(cap.zone))
    start = at.replace(minute=0, second=0, microsecond=0)
    if cap.per == "day":
        start = datetime.combine(at.date(), wall_time(), at.tzinfo)
    return start.timestamp()


def _key(cap: FrequencyCap) -> str:
    return f"{cap.per} {cap.zone}"


class Rules:
    """Asked for every push of an app that has rules. `clock` gives Unix seconds."""

    def __init__(self, store: Store, clock: Clock = time.time) -> None:
        self._store = store
        self._clock = clock
        self._windows: dict[tuple[int, str], _Window] = {}
        self._saver: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    async def suppressed(self, app: App, targets: BitMap, lasts: float) -> BitMap:
        """Those of the targets that are not to get a push that comes now and may wait until `lasts` (Unix seconds);
        the others are counted as having got it. What would be over before the quiet hours are is not delayed."""
        settings = app.settings
        until = quiet_until(settings, self._clock())
        if until is not None:
            assert settings.quiet_hours is not None
            if settings.quiet_hours.action == "suppress" or lasts <= until:
                return targets
        over = BitMap()
        windows = [await self._window(app, cap) for cap in settings.frequency_caps]
        for cap, window in zip(settings.frequency_caps, windows, strict=True):
            over |= window.counts.at_least(cap.count, targets)
        self._count(windows, targets - over, _Window.add)
        return over

    async def forget(self, app: App, devnos: BitMap) -> None:
        """They did not get it after all."""
        windows = [await self._window(app, cap) for cap in app.settings.frequency_caps]
        self._count(windows, devnos, _Window.take)

    def _count(
        self, windows: Sequence[_Window], devnos: BitMap, change: Callable[[_Window, BitMap], None]
    ) -> None:
        for window in {id(window): window for window in windows}.values():
            change(window, devnos)
        if windows and self._saver is None:
            self._saver = asyncio.get_running_loop().create_task(self._save_soon())

    async def _window(self, app: App, cap: FrequencyCap) -> _Window:
        key = (app.app_id, _key(cap))
        window = self._windows.get(key)
        if window is None or self._is_old(window):
            loaded = await self._load(*key)
            window = self._windows.setdefault(key, loaded)  # another call may have been faster
            if loaded.version > window.version:
                window.catch_up(loaded)
            window.read_at = self._clock()
        start = window_start(cap, self._clock())
        if window.start != start:
            window.begin(start, Counts())
        return window

    def _is_old(self, window: _Window) -> bool:
        """Nothing was counted here for a while: others may have counted something."""
        return not (window.changed or 0 <= self._clock() - window.read_at < SAVE_DELAY)

    async def _load(self, app_id: int, key: str) -> _Window:
        record = await self._store.records.find(app_id, KIND, key)
        if record is None:
            return _Window(0.0, Counts(), 0)
        saved = _decode(record.value)
        return _Window(
            saved.start, Counts([BitMap.deserialize(bits) for bits in saved.digits]), record.version
        )

    async def _save_soon(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), SAVE_DELAY)
        self._saver = None
        await self.save()

    async def save(self) -> None:
        """Write what changed; what the store does not take now is written the next time."""
        for (app_id, key), window in list(self._windows.items()):
            if not window.changed:
                continue
            try:
                await self._save(app_id, key, window)
            except (StoreFull, StoreUnavailable) as error:
                log.warning("frequency counts not saved, trying again: %s", error)
            except StoreError:  # the app was deleted
                del self._windows[app_id, key]
        self._forget_old()

    async def _save(self, app_id: int, key: str, window: _Window) -> None:
        for _ in range(SAVE_ATTEMPTS):
            start, added, taken = window.start, window.added.copy(), window.taken.copy()
            digits = [bytes(digit.serialize()) for digit in window.counts.digits]
            value = _encode(_Saved(start, digits))
            try:
                (window.version,) = await self._store.records.save(
                    [RecordChange(app_id, KIND, key, value, window.version)]
                )
            except Conflict:
                window.merge(await self._load(app_id, key))
                continue
            window.read_at = self._clock()
            if window.start == start:
                window.saved(added, taken)
            return

    def _forget_old(self) -> None:
        """Of days that are over, and beyond MAX_WINDOWS all that can be loaded again."""
        over = self._clock() - 2 * DAY
        crowded = len(self._windows) > MAX_WINDOWS
        self._windows = {
            key: window
            for key, window in self._windows.items()
            if window.changed or not (crowded or window.start < over)
        }

    async def close(self) -> None:
        self._closing.set()
        if self._saver is not None:
            await asyncio.wait([self._saver])
        await self.save()
