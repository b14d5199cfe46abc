"""What publishers are to be told, as the store keeps it: entered by the transaction in which it happened.

A message that has a callback is rare, and settling is the hottest thing the writer does. So `note` first asks whether
the app ever had one, in memory; only then one statement joins what was noted with the messages' callbacks. All notes
of a transaction become rows at its end (`flush`): one row for each event of a message, cut at EVENT_DEVICES.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, Protocol

import msgspec
from pyroaring import BitMap

from broker.bitmaps import decode_bits, encode_bits
from broker.model import Callback, CallbackEvent
from broker.settlements import event_parts
from broker.sqlite.engine import Row, delete_rows, read_rows, write_rows
from broker.sqlite.threads import Handler

SLICE_ROWS: Final = 1_000  # parked rows changed in one transaction, so that other writes get through
KNOWN_CALLBACKS: Final = 1024  # decoded ones kept ready

Note = tuple[int, int, str, Iterable[int], float]
"""(app_id, msg_id of the row, event, devnos, when)"""


class IdSource(Protocol):
    """Message and event ids (broker.sqlite.messages.Ids)."""

    greatest: int

    def next(self, count: int) -> range: ...


COLUMNS: Final = "id, app, msg_id, event, at, bits, callback, attempts, error"


@functools.lru_cache(maxsize=KNOWN_CALLBACKS)
def decode_callback(column: str) -> Callback:
    return msgspec.json.decode(column, type=Callback)


class CallbackWrites:
    """On the writer's thread: `begin`, any number of `expect` and `note`, `flush`, for each transaction."""

    def __init__(self, connection: sqlite3.Connection, ids: IdSource) -> None:
        self._connection = connection
        self._ids = ids
        # Apps with a message that has a callback, or events of one. One that a rollback left here costs its notes a
        # look-up.
        self._apps = {
            app
            for (app,) in connection.execute(
                "SELECT app FROM messages WHERE callback IS NOT NULL UNION SELECT app FROM callback_events"
            )
        }
        # Nobody can have claimed any: those that the last run claimed and did not finish are due again.
        connection.execute("UPDATE callback_events SET due = at WHERE due IS NOT NULL AND attempts = 0")
        self._noted: dict[tuple[int, int, str], tuple[BitMap, float]] = {}
        self.handlers: dict[str, Handler] = {"callbacks": lambda calls: [self._run(*call) for call in calls]}
        self._verbs: dict[str, Callable[..., Any]] = {
            "claim": self._claim,
            "done": self._done,
            "failed": self._failed,
            "postpone": self._postpone,
            "retry": self._retry,
            "drop_parked": self._drop_parked,
        }

    @property
    def wanted(self) -> bool:
        """Whether any app has a callback: if not, notes need not be made, and there are no events. Any thread may
        ask: it is known before what makes it so is committed."""
        return bool(self._apps)

    def begin(self) -> None:
        """What an earlier transaction noted and rolled back did not happen."""
        self._noted.clear()

    def expect(self, app_id: int) -> None:
        """A message of this app with a callback is stored: from now on its notes are looked at."""
        self._apps.add(app_id)

    def note(self, notes: Iterable[Note]) -> None:
        """What happened to messages in this transaction. Those without a callback, of another app, or not for these
        devices are passed over."""
        apps, noted = self._apps, self._noted
        for app_id, msg_id, event, devnos, at in notes:
            if app_id in apps:
                key = (app_id, msg_id, event)
                if (known := noted.get(key)) is None:
                    noted[key] = (BitMap(devnos), at)
                else:
                    known[0].update(devnos)

    def flush(self) -> None:
        """Make what was noted into rows, before the commit."""
        if not self._noted:
            return
        noted, self._noted = self._noted, {}
        wanted = read_rows(
            self._connection,
            "SELECT v.column1, v.column2, v.column3, coalesce(m.part_of, m.msg_id), m.target,"
            " m.suppressed, coalesce(m.callback, w.callback)"
            " FROM ({values}) v CROSS JOIN messages m ON m.msg_id = v.column2 AND m.app = v.column1"
            " LEFT JOIN messages w ON w.msg_id = m.part_of"
            " WHERE coalesce(m.callback, w.callback) IS NOT NULL",
            list(noted),
        )
        told: dict[tuple[int, int, str, str], tuple[BitMap, float]] = {}
        for app_id, msg_id, event, public_id, target, suppressed, callback in wanted:
            if event not in decode_callback(callback).events:
                continue
            devnos, at = noted[app_id, msg_id, event]
            devnos &= decode_bits(target) | decode_bits(suppressed)
            if devnos:
                whole = told.setdefault((app_id, public_id, event, callback), (devnos, at))
                whole[0].update(devnos)
        self._insert(told)

    def _insert(self, told: dict[tuple[int, int, str, str], tuple[BitMap, float]]) -> None:
        rows = [
            (app_id, msg_id, event, at, encode_bits(part), callback, at)
            for (app_id, msg_id, event, callback), (devnos, at) in told.items()
            for part in event_parts(devnos)
        ]
        if rows:
            numbered = [(i, *row) for i, row in zip(self._ids.next(len(rows)), rows, strict=True)]
            write_rows(
                self._connection,
                "INSERT INTO callback_events (id, app, msg_id, event, at, bits, callback, due) {values}",
                numbered,
            )

    # What the dispatcher does with them

    def _run(self, verb: str, *arguments: Any) -> Any:
        return self._verbs[verb](*arguments)

    def _claim(self, now: float, lease: float, limit: int) -> list[CallbackEvent]:
        rows = self._connection.execute(
            "UPDATE callback_events SET due = ? WHERE id IN (SELECT e.id FROM callback_events e"
            " JOIN apps a ON a.app_id = e.app AND NOT a.deleted WHERE e.due <= ? ORDER BY e.due, e.id LIMIT ?)"
            f" RETURNING {COLUMNS}",
            (now + lease, now, limit),
        ).fetchall()
        return sorted(map(event_from_row, rows), key=lambda event: event.event_id)

    def _done(self, event_ids: Sequence[int]) -> None:
        """Their ids must not come again: receivers know by them what they have seen."""
        delete_rows(self._connection, "callback_events", [(event_id,) for event_id in event_ids])
        self._keep_high_water()

    def _keep_high_water(self) -> None:
        self._connection.execute("UPDATE high_water SET id = ?", (self._ids.greatest,))

    def _failed(self, event_ids: Sequence[int], due: float | None, error: str) -> None:
        write_rows(
            self._connection,
            "UPDATE callback_events SET attempts = attempts + 1, due = v.column2, error = v.column3"
            " FROM ({values}) v WHERE id = v.column1",
            [(event_id, due, error) for event_id in event_ids],
        )

    def _postpone(self, event_ids: Sequence[int], due: float) -> None:
        write_rows(
            self._connection,
            "UPDATE callback_events SET due = v.column2 FROM ({values}) v WHERE id = v.column1",
            [(event_id, due) for event_id in event_ids],
        )

    def _retry(self, app_id: int, now: float) -> int:
        return self._connection.execute(
            "UPDATE callback_events SET due = ?, attempts = 0 WHERE id IN (SELECT id FROM callback_events"
            " WHERE app = ? AND due IS NULL ORDER BY id LIMIT ?)",
            (now, app_id, SLICE_ROWS),
        ).rowcount

    def _drop_parked(self, app_id: int) -> int:
        rows = self._connection.execute(
            "SELECT id FROM callback_events WHERE app = ? AND due IS NULL ORDER BY id LIMIT ?",
            (app_id, SLICE_ROWS),
        ).fetchall()
        delete_rows(self._connection, "callback_events", rows)
        self._keep_high_water()
        return len(rows)


def event_from_row(row: Row) -> CallbackEvent:
    event_id, app_id, msg_id, event, at, bits, callback, attempts, error = row
    return CallbackEvent(
        event_id, app_id, msg_id, event, at, decode_bits(bits), decode_callback(callback), attempts, error
    )


class CallbackReads:
    """On a reader's thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.handlers: dict[str, Handler] = {
            "callbacks_due": lambda calls: [self._due(now) for now in calls],
            "list_parked_callbacks": lambda calls: [self._list_parked(*call) for call in calls],
            "count_callbacks": lambda calls: [self._count(app_id) for app_id in calls],
        }

    def _due(self, now: float) -> bool:
        query = "SELECT EXISTS (SELECT 1 FROM callback_events WHERE due <= ?)"
        return bool(self._connection.execute(query, (now,)).fetchone()[0])

    def _list_parked(self, app_id: int, after: int, limit: int) -> list[CallbackEvent]:
        rows = self._connection.execute(
            f"SELECT {COLUMNS} FROM callback_events WHERE app = ? AND id > ? AND due IS NULL ORDER BY id LIMIT ?",
            (app_id, after, limit),
        )
        return [event_from_row(row) for row in rows.fetchall()]

    def _count(self, app_id: int) -> tuple[int, int]:
        if app_id:
            query = "SELECT count(due), count(*) FROM callback_events WHERE app = ?"
            waiting, both = self._connection.execute(query, (app_id,)).fetchone()
        else:  # from the indexes alone
            waiting, both = self._connection.execute(
                "SELECT (SELECT count(*) FROM callback_events WHERE due IS NOT NULL), count(*)"
                " FROM callback_events"
            ).fetchone()
        return waiting, both - waiting


Call = Callable[[str, Any, int], Awaitable[Any]]


class SqliteCallbacks:
    """`store.callbacks`; `write` and `read` submit to the store's threads."""

    def __init__(self, write: Call, read: Call, wanted: Callable[[], bool]) -> None:
        """`wanted`: see `CallbackWrites.wanted`. Who has nothing to tell wakes no thread, and who has nothing to tell
        now costs the writer nothing."""
        self._write = write
        self._read = read
        self._wanted = wanted

    async def claim(self, now: float, lease: float, limit: int) -> list[CallbackEvent]:
        if not self._wanted() or not await self._read("callbacks_due", now, 1):
            return []
        claimed: list[CallbackEvent] = await self._write("callbacks", ("claim", now, lease, limit), limit)
        return claimed

    async def done(self, event_ids: Sequence[int]) -> None:
        await self._write("callbacks", ("done", event_ids), len(event_ids))

    async def failed(self, event_ids: Sequence[int], due: float | None, error: str) -> None:
        await self._write("callbacks", ("failed", event_ids, due, error), len(event_ids))

    async def postpone(self, event_ids: Sequence[int], due: float) -> None:
        await self._write("callbacks", ("postpone", event_ids, due), len(event_ids))

    async def retry(self, app_id: int, now: float) -> int:
        return await self._slices("retry", app_id, now)

    async def drop_parked(self, app_id: int) -> int:
        return await self._slices("drop_parked", app_id)

    async def _slices(self, verb: str, *arguments: Any) -> int:
        changed = 0
        while count := await self._write("callbacks", (verb, *arguments), SLICE_ROWS):
            changed += count
        return changed

    async def list_parked(self, app_id: int, after: int, limit: int) -> list[CallbackEvent]:
        parked: list[CallbackEvent] = await self._read("list_parked_callbacks", (app_id, after, limit), limit)
        return parked

    async def counts(self, app_id: int) -> tuple[int, int]:
        if not self._wanted():
            return 0, 0
        counted: tuple[int, int] = await self._read("count_callbacks", app_id, 1)
        return counted
