"""Inboxes: which pushes wait for which devices, as the writer thread keeps them.

Pushes to devices at random change a page of `inbox` each, which the log then holds whole. Most of them need not: a
push to one device is found by its own row of `messages`, which says whom it is for and whether it still waits, while
it is *fresh*: later than `high_water.moved`. For the time being memory knows the fresh pushes of each device
(`Fresh`); a device that is online takes its push long before MOVE_AFTER others have come. What waits then is moved
into `inbox`, in one sorted statement. Pushes with several targets, or wishes of their own, are put there at once.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from pyroaring import BitMap

from broker.sqlite.engine import Row, delete_rows, read_rows, write_rows
from broker.sqlite.routes import AppStates

MOVE_AFTER: Final = 8_192  # messages: some milliseconds for the writer, about 2 MB of memory

# A push for one device waits until its own row says what became of it.
WAITS: Final = "m.delivered IS NULL AND m.evicted IS NULL AND m.recalled IS NULL AND m.body IS NOT NULL"
FRESH: Final = f"""
SELECT m.app, m.target, m.msg_id FROM messages m
WHERE m.msg_id > ? AND typeof(m.target) = 'integer' AND NOT m.broadcast AND NOT m.paced
    AND m.expires_at > m.created_at AND {WAITS}
ORDER BY m.app, m.target, m.msg_id
"""  # and those for one device that were put into `inbox` at once
STILL_WAITING: Final = f"""
SELECT json_group_array(m.msg_id) FROM ({{values}}) v CROSS JOIN messages m ON m.msg_id = v.column1
WHERE m.expires_at > ? AND {WAITS}
"""
IN_INBOX: Final = """
SELECT json_group_array(json((
    SELECT json_group_array(msg_id) FROM (
        SELECT msg_id FROM inbox WHERE app = v.column1 AND devno = v.column2 ORDER BY msg_id))))
FROM ({values}) v
"""

DeviceKey = tuple[int, int]  # app, devno
Find = Callable[[DeviceKey, int], list[int]]


class _Generation:
    """Fresh pushes in the order in which they came; by device when somebody asks."""

    __slots__ = ("_by_device", "_came", "_known")

    def __init__(self) -> None:
        self._came: list[Sequence[Row]] = []
        self._known = 0  # of these, how many are in `_by_device`
        self._by_device: dict[DeviceKey, list[int]] = {}

    def add(self, rows: Sequence[Row]) -> None:
        self._came.append(rows)

    def find(self, device: DeviceKey) -> Sequence[int]:
        while self._known < len(self._came):
            for app_id, devno, msg_id in self._came[self._known]:
                self._by_device.setdefault((app_id, devno), []).append(msg_id)
            self._known += 1
        return self._by_device.get(device, ())


class Fresh:
    """The fresh pushes of each device: their ids, and perhaps some that wait no longer or were rolled back; the rows
    of `messages` decide. The writer adds, readers look while they are `reading`.

    What was moved is forgotten once that is committed and no reader is left whose snapshot may be from before."""

    def __init__(self) -> None:
        self._generations = [_Generation()]
        self._moved = 0  # of these, how many of the oldest are in `inbox`
        self._reading = 0
        self._lock = threading.Lock()

    def add(self, rows: Sequence[Row]) -> None:
        """(app, devno, msg_id)."""
        self._generations[-1].add(rows)

    def turn(self) -> None:
        """What is there is being moved."""
        self._generations.append(_Generation())

    def moved(self) -> None:
        """What was there at the last turn is in `inbox`."""
        with self._lock:
            self._moved = len(self._generations) - 1
            self._forget()

    def _forget(self) -> None:
        if not self._reading:
            del self._generations[: self._moved]
            self._moved = 0

    @contextmanager
    def reading(self) -> Iterator[Find]:
        """Around a read transaction, from before its snapshot is taken. To be asked after that: the ids above the
        second argument that may wait for a device, in order."""
        with self._lock:
            self._reading += 1
        try:
            yield self._find
        finally:
            with self._lock:
                self._reading -= 1
                self._forget()

    def _find(self, device: DeviceKey, after: int) -> list[int]:
        with self._lock:  # two readers may index one generation
            found = [generation.find(device) for generation in tuple(self._generations)]
        return [msg_id for ids in found for msg_id in ids if msg_id > after]


def with_fresh(
    connection: sqlite3.Connection, moved: Sequence[list[int]], fresh: Sequence[Sequence[int]], now: float
) -> list[list[int]]:
    """What waits for each of some devices, in order. `moved`: what `inbox` has, likewise; `fresh`: what `Fresh` has,
    of which those count that wait, and do not expire by `now`. Some may be in both."""
    ids = [(msg_id,) for found in fresh for msg_id in found]
    rows = read_rows(connection, STILL_WAITING, ids, (now,))
    waiting = {msg_id for (text,) in rows for msg_id in json.loads(text)}
    return [
        sorted({*older, *waiting.intersection(newer)}) if newer else older
        for older, newer in zip(moved, fresh, strict=True)
    ]


class InboxWrites:
    """Puts pushes into inboxes, takes them out, and finds those beyond the newest N. The writer thread only."""

    def __init__(self, connection: sqlite3.Connection, states: AppStates, fresh: Fresh) -> None:
        self._connection = connection
        self._states = states
        self._fresh = fresh
        self._size = 0  # messages later than `moved`
        self._at_once: set[int] = set()  # messages later than `moved` that are in `inbox` all the same
        self._greatest = 0  # message id that was stored
        self._moved = 0  # as `high_water` has it
        self._moving = 0  # as it will have it, if the transaction that moved last is committed
        self._limits: dict[int, int] = {}  # by app
        self._bounds: dict[int, array[int]] = {}  # by app and devno: no more than so many wait
        self._crowded: dict[int, BitMap] = {}  # by app: those for whom perhaps too many wait

    def open(self) -> Mapping[int, BitMap]:
        """Take up what the last process left; returns who has something waiting."""
        run = self._connection.execute
        (self._moved,) = run("SELECT moved FROM high_water").fetchone()
        later = (self._moved,)
        newest, self._size = run(
            "SELECT max(msg_id), count(*) FROM messages WHERE msg_id > ?", later
        ).fetchone()
        self._greatest = newest or self._moved
        self._at_once = {msg_id for (msg_id,) in run("SELECT msg_id FROM inbox WHERE msg_id > ?", later)}
        fresh = run(FRESH, later).fetchall()
        self._fresh.add(fresh)
        waiting: dict[int, BitMap] = {}
        moved = run("SELECT app, devno, count(*) FROM inbox GROUP BY app, devno")
        for app_id, devno, count in itertools.chain(moved, ((app, devno, 1) for app, devno, _ in fresh)):
            waiting.setdefault(app_id, BitMap()).add(devno)
            self._bounds_up_to(app_id, devno)[devno] += count
        return waiting

    def begin(self) -> None:
        """A transaction starts."""
        self._crowded.clear()
        if not self._moving:
            return
        (self._moved,) = self._connection.execute("SELECT moved FROM high_water").fetchone()
        if self._moved == self._moving:
            self._fresh.moved()
            self._at_once = {msg_id for msg_id in self._at_once if msg_id > self._moved}
        else:  # it was rolled back; what comes next may fit where a move did not, and makes room perhaps
            self._size = MOVE_AFTER // 2
        self._moving = 0

    def finish(self) -> None:
        """It ends."""
        if self._size >= MOVE_AFTER:
            self.move()

    def move(self) -> None:
        """What is fresh goes into `inbox`."""
        self._connection.execute(f"INSERT OR IGNORE INTO inbox {FRESH}", (self._moved,))
        self._connection.execute("UPDATE high_water SET moved = ?", (self._greatest,))
        self._moved = self._moving = self._greatest
        self._fresh.turn()
        self._size = 0

    # Putting and taking

    def stored(self, count: int, greatest: int) -> None:
        """So many messages, up to this id, whoever they are for."""
        self._size += count
        self._greatest = greatest

    def put_fresh(self, rows: Sequence[Row]) -> None:
        """(app, devno, msg_id) of plain pushes to one device each, which are in `messages`."""
        if rows:
            self._fresh.add(rows)
            self._count(rows, evicts=True)

    def put(self, rows: Sequence[Row], *, evicts: bool) -> None:
        """The same of others. `evicts`: the newest-N rule is to be looked at."""
        write_rows(self._connection, "INSERT INTO inbox {values}", rows)
        self._at_once.update([row[2] for row in rows])
        self._count(rows, evicts=evicts)

    def take(self, keys: Sequence[Row]) -> None:
        """(app, devno, msg_id): they wait no longer. Of a fresh push its own row says so."""
        moved, at_once = self._moved, self._at_once
        rows = [key for key in keys if key[2] <= moved or key[2] in at_once]
        delete_rows(self._connection, "inbox", rows)

    # The newest-N rule (S8)

    def _count(self, rows: Sequence[Row], *, evicts: bool) -> None:
        counted, bounds, limit = 0, array("I"), 0
        for app_id, devno, _ in rows:
            if app_id != counted:
                counted, bounds, limit = app_id, self._bounds_up_to(app_id, devno), self._limit(app_id)
            elif devno >= len(bounds):
                bounds = self._bounds_up_to(app_id, devno)
            bounds[devno] += 1
            if bounds[devno] > limit and evicts:
                self._crowded.setdefault(app_id, BitMap()).add(devno)

    def _bounds_up_to(self, app_id: int, devno: int) -> array[int]:
        bounds = self._bounds.setdefault(app_id, array("I"))
        if devno >= len(bounds):
            bounds.extend([0] * (devno + 1 + devno // 8 - len(bounds)))
        return bounds

    def _limit(self, app_id: int) -> int:
        """It is never changed."""
        if app_id not in self._limits:
            row = self._connection.execute(
                "SELECT offline_limit FROM apps WHERE app_id = ?", (app_id,)
            ).fetchone()
            self._limits[app_id] = int(row[0]) if row else 0
        return self._limits[app_id]

    def surplus(self) -> list[Row]:
        """(app, devno, msg_id): of the devices without a route all but the newest N."""
        surplus: list[Row] = []
        for app_id, devnos in self._crowded.items():
            limit, bounds = self._limit(app_id), self._bounds[app_id]
            away = self._states.without_route(app_id, devnos)
            for devno, ids in zip(away, self._waiting([(app_id, devno) for devno in away]), strict=True):
                bounds[devno] = min(len(ids), limit)
                surplus += [(app_id, devno, msg_id) for msg_id in ids[: max(0, len(ids) - limit)]]
        self._crowded.clear()
        return surplus

    def _waiting(self, devices: Sequence[DeviceKey]) -> list[list[int]]:
        """What waits for each of them, the oldest first; expired pushes among it, until they are removed."""
        rows = read_rows(self._connection, IN_INBOX, devices)
        moved = [ids for (text,) in rows for ids in json.loads(text)]
        with self._fresh.reading() as find:
            fresh = [find(device, 0) for device in devices]
        return with_fresh(self._connection, moved, fresh, 0.0)

    def forget(self, app_id: int) -> None:
        """The app is gone."""
        self._limits.pop(app_id, None)
        self._bounds.pop(app_id, None)
