"""Who was there when, in the database: rows of 65,536 devices by hour, and by day once the day is old.

Hours would take 180 MB in 60 days for an app of a million. Folded into days it is 7.5 MB, and 9 MB for the hours
of three days. So a day is one of a fixed time zone (`Calendar`), and reports have to use the same. What is in memory:
broker/telling/attendance.py.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from pyroaring import BitMap

from broker.bitmaps import decode_bits, encode_bits
from broker.model import Activity
from broker.sqlite.engine import Row, delete_rows, read_rows, write_rows
from broker.sqlite.threads import Handler
from broker.telling.attendance import (
    DAYS_OF_HOURS,
    LONGEST_DAY,
    PASS_EVERY,
    Bits,
    Stretch,
    touches,
)
from broker.telling.calendar import HOUR, Calendar

log = logging.getLogger(__name__)

SLICE_APPS: Final = 512  # looked at in one statement
SLICE_ROWS: Final = 128  # hours of 65,536 devices folded in one transaction: up to 1 MB
PASS_APPS: Final = 8 * SLICE_APPS  # looked at in one transaction

DAY_WIDTHS: Final = tuple(
    range(22 * HOUR, LONGEST_DAY + 1, HOUR // 2)
)  # named, so that `start` can be looked up


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
