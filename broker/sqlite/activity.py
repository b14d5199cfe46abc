"""Who was there when: the devices that were online, or active, in each hour, and by day once the day is old.

The hour that is going on is in memory: a device that was seen in it costs nothing more, however often it comes
back. What is new goes to the writer every ACTIVITY_DELAY seconds and is merged there into rows of 65,536 devices. A
device that stays connected is written once an hour, in the bitmap of routes that the hour began with: a million of
them are 16 rows. A crash loses at most the last ACTIVITY_DELAY seconds.

Hours would take 180 MB in 60 days for an app of a million. Folded into days it is 7.5 MB, and 9 MB for the hours
of three days. So a day is one of a fixed time zone (`Calendar`), and reports have to use the same.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from pyroaring import BitMap

from broker.bitmaps import decode_bits, encode_bits
from broker.model import Activity
from broker.sqlite.engine import Row, delete_rows, read_rows, write_rows
from broker.sqlite.threads import Handler
from broker.telling.calendar import HOUR, Calendar

log = logging.getLogger(__name__)

ACTIVITY_DELAY: Final = 10.0  # until what is new is written
ROLLED_AT_ONCE: Final = 5_000  # apps taken into a new hour in one go: about 10 ms of the event loop
ROWS_PER_WRITE: Final = 1_000  # bitmaps handed to the writer in one piece, so that other writes get through
DAYS_OF_HOURS: Final = 2  # a day is folded when so many whole days lie between it and now
GAP: Final = 48 * HOUR  # a process that slept for longer tells nothing of the time before
PASS_EVERY: Final = float(HOUR)  # apps are looked through for what can be folded or dropped
SLICE_APPS: Final = 512  # looked at in one statement
SLICE_ROWS: Final = 128  # hours of 65,536 devices folded in one transaction: up to 1 MB
PASS_APPS: Final = 8 * SLICE_APPS  # looked at in one transaction

LONGEST_DAY: Final = 26 * HOUR  # a day is dropped when it would be over, had it been one
DAY_WIDTHS: Final = tuple(
    range(22 * HOUR, LONGEST_DAY + 1, HOUR // 2)
)  # named, so that `start` can be looked up

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
        last, seen = self._seen.get((app_id, activity), (0, BitMap()))
        if last == hour:
            return seen
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


def _chunks(bits: BitMap) -> Iterator[tuple[int, BitMap]]:
    """The devices by devno >> 16."""
    devno = bits.next_set_bit(0) if bits else -1
    while bits and devno <= bits.max():
        chunk = devno >> 16
        end = (chunk + 1) << 16
        yield chunk, bits & BitMap(range(chunk << 16, end))
        if end > bits.max():
            return
        devno = bits.next_set_bit(end)


class ActivityWrites:
    """The part on the writer thread."""

    def __init__(self, connection: sqlite3.Connection, calendar: Calendar, lifetime: float) -> None:
        self._connection = connection
        self._calendar = calendar
        self._lifetime = lifetime
        self._after: int | None = None  # the pass has come to this app; None: none is under way
        self._next_pass = 0.0
        self.handlers: dict[str, Handler] = {"activity": self._activity}

    def _activity(self, calls: list[list[Bits]]) -> list[None]:
        self._merge(row for call in calls for row in call)
        return [None] * len(calls)

    def _merge(self, rows: Iterable[Bits]) -> None:
        merged: dict[Row, BitMap] = {}
        for app, kind, width, start, bits in rows:
            for chunk, part in _chunks(bits):
                merged.setdefault((app, kind, width, start, chunk), BitMap()).update(part)
        stored = read_rows(
            self._connection,
            "SELECT a.app, a.kind, a.width, a.start, a.chunk, a.bits FROM ({values}) v CROSS JOIN activity a"
            " ON a.app = v.column1 AND a.kind = v.column2 AND a.width = v.column3 AND a.start = v.column4"
            " AND a.chunk = v.column5",
            list(merged),
        )
        for *key, column in stored:
            merged[tuple(key)] |= decode_bits(column)
        write_rows(  # not for a deleted app: its purge may be over, and nobody would remove them again
            self._connection,
            "INSERT OR REPLACE INTO activity (app, kind, width, start, chunk, bits)"
            " SELECT v.column1, v.column2, v.column3, v.column4, v.column5, v.column6 FROM ({values}) v"
            " CROSS JOIN apps ON app_id = v.column1 WHERE NOT deleted",
            [(*key, encode_bits(bits)) for key, bits in merged.items()],
        )

    # Upkeep

    def expire(self, now: float) -> int:
        """Fold hours into days and drop what is over, app by app, once every PASS_EVERY."""
        if self._after is None:
            if self._next_pass - PASS_EVERY <= now < self._next_pass:
                return 0
            self._after = 0
        for _ in range(PASS_APPS // SLICE_APPS):
            apps = self._connection.execute(
                "SELECT app_id FROM apps WHERE app_id > ? AND NOT deleted ORDER BY app_id LIMIT ?",
                (self._after, SLICE_APPS),
            ).fetchall()
            if not apps:
                self._after, self._next_pass = None, now + PASS_EVERY
                return 0
            if gone := self._expire_apps(apps, now):
                return gone
            self._after = apps[-1][0]
        return 1  # nothing went, but the pass is not over

    def _expire_apps(self, apps: Sequence[Row], now: float) -> int:
        old_hours, over = self._calendar.day(now, -DAYS_OF_HOURS), now - self._lifetime
        rows = read_rows(
            self._connection,
            "SELECT column1, column2 FROM ({values})"
            " WHERE EXISTS (SELECT 1 FROM activity WHERE app = column1 AND kind = column2"
            f"  AND width = {HOUR} AND start < max(?, ? - {HOUR}))"
            " OR EXISTS (SELECT 1 FROM activity WHERE app = column1 AND kind = column2"
            f"  AND width IN {DAY_WIDTHS} AND start < ?)",
            [(app, str(kind)) for (app,) in apps for kind in Activity],
            (old_hours, over, over - LONGEST_DAY),
        )
        gone = 0
        for app, kind in rows:
            gone += self._fold(app, kind, old_hours) + self._drop(app, kind, over)
            if gone >= SLICE_ROWS:
                break
        return gone

    def _fold(self, app: int, kind: str, before: int) -> int:
        hours = self._connection.execute(
            "SELECT start, chunk, bits FROM activity WHERE app = ? AND kind = ? AND width = ? AND start < ?"
            " ORDER BY start LIMIT ?",
            (app, kind, HOUR, before, SLICE_ROWS),
        ).fetchall()
        days = {start: (self._calendar.day(start), self._calendar.day(start, 1)) for start, _, _ in hours}
        self._merge(
            (app, kind, days[start][1] - days[start][0], days[start][0], decode_bits(column))
            for start, _, column in hours
        )
        delete_rows(
            self._connection, "activity", [(app, kind, HOUR, start, chunk) for start, chunk, _ in hours]
        )
        return len(hours)

    def _drop(self, app: int, kind: str, over: float) -> int:
        hours = self._connection.execute(
            "DELETE FROM activity WHERE app = ? AND kind = ? AND width = ? AND start < ?",
            (app, kind, HOUR, over - HOUR),
        )
        days = self._connection.execute(
            f"DELETE FROM activity WHERE app = ? AND kind = ? AND width IN {DAY_WIDTHS} AND start < ?",
            (app, kind, over - LONGEST_DAY),
        )
        return hours.rowcount + days.rowcount


REGISTERED_BEFORE: Final = """
WITH RECURSIVE search (place, at, low, high) AS (
    SELECT key, value, 0, (SELECT coalesce(max(devno) + 1, 0) FROM devices WHERE app = ?1) FROM json_each(?2)
    UNION ALL
    SELECT place, at, iif(created_at < at, (low + high) / 2 + 1, low), iif(created_at < at, high, (low + high) / 2)
    FROM search LEFT JOIN devices ON app = ?1 AND devno = (low + high) / 2 WHERE low < high)
SELECT json_group_array(low) FROM (SELECT low FROM search WHERE low = high ORDER BY place)
"""  # a binary search: devnos are dense, and grow with the time. One row comes back: each would be a step


class ActivityReads:
    """The part on a reader thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.handlers: dict[str, Handler] = {
            "active": lambda calls: [self._active(*call) for call in calls],
            "registered_before": lambda calls: [self._registered_before(*call) for call in calls],
        }

    def _active(self, app_id: int, kind: str, stretches: Sequence[Stretch]) -> list[BitMap]:
        """The devices of the hours and days that touch each stretch."""
        first, last = min(start for start, _ in stretches), max(end for _, end in stretches)
        rows = self._connection.execute(
            "SELECT start, width, bits FROM activity"
            f" WHERE app = ?1 AND kind = ?2 AND width = {HOUR} AND start > ?3 - {HOUR} AND start < ?4"
            " UNION ALL SELECT start, width, bits FROM activity"
            f" WHERE app = ?1 AND kind = ?2 AND width IN {DAY_WIDTHS} AND start > ?3 - {LONGEST_DAY} AND start < ?4",
            (app_id, kind, first, last),
        ).fetchall()
        stored = [(start, width, decode_bits(column)) for start, width, column in rows]
        return [
            BitMap().union(*(bits for start, width, bits in stored if touches(start, width, stretch)))
            for stretch in stretches
        ]

    def _registered_before(self, app_id: int, times: Sequence[float]) -> list[int]:
        (text,) = self._connection.execute(REGISTERED_BEFORE, (app_id, json.dumps(list(times)))).fetchone()
        counts: list[int] = json.loads(text)
        return counts


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
