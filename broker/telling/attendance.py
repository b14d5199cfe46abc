"""Who was there when, as far as it is in memory and whatever keeps it.

The hour that is going on is in memory: a device that was seen in it costs nothing more, however often it comes back.
What is new is handed over every ACTIVITY_DELAY seconds. A device that stays connected is handed over once an hour, in
the bitmap of routes that the hour began with. A crash loses at most the last ACTIVITY_DELAY seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from pyroaring import BitMap

from broker.model import Activity
from broker.telling.calendar import HOUR, Calendar

log = logging.getLogger(__name__)

ACTIVITY_DELAY: Final = 10.0  # until what is new is written
ROLLED_AT_ONCE: Final = 5_000  # apps taken into a new hour in one go: about 10 ms of the event loop
ROWS_PER_WRITE: Final = 1_000  # bitmaps handed over in one piece, so that other writes get through
DAYS_OF_HOURS: Final = 2  # a day is folded when so many whole days lie between it and now
GAP: Final = 48 * HOUR  # a process that slept for longer tells nothing of the time before
PASS_EVERY: Final = float(HOUR)  # apps are looked through for what can be folded or dropped
LONGEST_DAY: Final = 26 * HOUR  # a day is dropped when it would be over, had it been one

Stretch = tuple[float, float]  # from, to
Hour = tuple[int, str, int]  # app, activity, start
Bits = tuple[int, str, int, int, BitMap]  # app, activity, width, start, devices


class Attendance:
    """The part in memory. The event loop's thread only. `routed` gives an app's routes, `write` hands rows to the
    writer thread."""

    def __init__(
        self,
        calendar: Calendar,
        clock: Callable[[], float],
        routed: Callable[[int], BitMap],
        write: Callable[[list[Bits]], asyncio.Future[Any]],
    ) -> None:
        self._calendar = calendar
        self._clock = clock
        self._routed = routed
        self._write = write
        self._hour = 0  # the one that is going on
        self._behind: set[tuple[int, str]] = set()  # of `_seen`: in an hour that is over
        self._seen: dict[tuple[int, str], tuple[int, BitMap]] = {}  # (app, activity) -> hour, devices
        self._fresh: dict[Hour, BitMap] = {}  # not written yet
        self._writing: list[dict[Hour, BitMap]] = []
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(ACTIVITY_DELAY, self._tick)

    def _tick(self) -> None:
        self.flush(ROLLED_AT_ONCE)
        self.open()

    def close(self) -> None:
        """Hand over the rest; the writer must not be stopped before it has that."""
        if self._timer is not None:
            self._timer.cancel()
        self.flush()

    def note(self, app_id: int, activity: Activity, devno: int) -> None:
        """The device is there now. Before its route is claimed or released: the roll looks at the routes."""
        hour = self._this_hour()
        seen = self._roll(app_id, activity, hour)
        if devno not in seen:
            seen.add(devno)
            self._fresh.setdefault((app_id, activity, hour), BitMap()).add(devno)

    def turn(self, app_id: int) -> None:
        """Before a route goes: it counts for the hour that has begun."""
        self._roll(app_id, Activity.ONLINE, self._this_hour())

    def _this_hour(self) -> int:
        now = self._clock()
        if not self._hour <= now < self._hour + HOUR:
            self._hour = self._calendar.hour(now)
            self._behind = set(self._seen)
        return self._hour

    def _roll(self, app_id: int, activity: str, hour: int) -> BitMap:
        """Those seen in this hour. Whoever had a route when an hour began was online in it."""
        known = self._seen.get((app_id, activity))
        if known is not None and known[0] == hour:
            return known[1]
        last = 0 if known is None else known[0]
        there = self._routed(app_id) if activity == Activity.ONLINE and last else BitMap()
        if there:
            # The clock may have stood still for long, or been put back
            for start in range(max(last + HOUR, hour - GAP), hour + 1, HOUR) or (hour,):
                self._fresh.setdefault((app_id, activity, start), BitMap()).update(there)
        self._seen[app_id, activity] = (hour, seen := there.copy())
        self._behind.discard((app_id, activity))
        return seen

    def _roll_all(self, limit: int | None) -> None:
        hour = self._this_hour()
        for app_id, activity in list(itertools.islice(self._behind, limit)):
            if not self._roll(app_id, activity, hour):
                del self._seen[app_id, activity]  # an app that sleeps costs nothing

    def flush(self, limit: int | None = None) -> None:
        """`limit`: so many apps whose hour is over are looked at; None: all."""
        self._roll_all(limit)
        rows, self._fresh = self._fresh, {}
        keys = list(rows)
        for first in range(0, len(keys), ROWS_PER_WRITE):
            self._submit({key: rows[key] for key in keys[first : first + ROWS_PER_WRITE]})

    def _submit(self, rows: dict[Hour, BitMap]) -> None:
        self._writing.append(rows)
        future = self._write([(app, kind, HOUR, start, bits) for (app, kind, start), bits in rows.items()])
        future.add_done_callback(lambda done: self._wrote(rows, done))

    def _wrote(self, rows: dict[Hour, BitMap], done: asyncio.Future[Any]) -> None:
        self._writing = [other for other in self._writing if other is not rows]
        if done.cancelled() or (error := done.exception()) is None:
            return
        log.warning("which devices were there is not recorded, trying again: %s", error)
        for key, bits in rows.items():
            if key[2] > self._hour - GAP:
                self._fresh.setdefault(key, BitMap()).update(bits)

    def find(self, app_id: int, activity: Activity) -> list[tuple[int, BitMap]]:
        """(hour, devices) that the tables may not have yet; look here before them, so that nothing is missed that is
        on its way. The bitmaps may grow later."""
        if (app_id, activity) in self._seen:
            self._roll(app_id, activity, self._this_hour())
        return [
            (start, bits)
            for rows in (self._fresh, *self._writing)
            for (app, kind, start), bits in rows.items()
            if app == app_id and kind == activity
        ]

    def drop(self, app_id: int) -> None:
        """A deleted app's."""
        self._fresh = {key: bits for key, bits in self._fresh.items() if key[0] != app_id}
        for activity in Activity:
            self._seen.pop((app_id, activity), None)
            self._behind.discard((app_id, activity))


def touches(start: int, width: int, stretch: Stretch) -> bool:
    return start < stretch[1] and start + width > stretch[0]


def add_fresh(
    found: Sequence[BitMap], stretches: Sequence[Stretch], fresh: Iterable[tuple[int, BitMap]]
) -> None:
    """Add what is only in memory to what the tables had."""
    for start, bits in fresh:
        for devnos, stretch in zip(found, stretches, strict=True):
            if touches(start, HOUR, stretch):
                devnos.update(bits)
