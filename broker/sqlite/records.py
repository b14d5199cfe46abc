"""Small documents with versions. Changes are checked and made by the writer thread, in the transaction of whatever
they go along with, so that two who read the same version cannot both change it (S12)."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from broker.model import Record, RecordChange
from broker.sqlite.engine import Row
from broker.sqlite.threads import Handler
from broker.store import Conflict, StoreError, TooMany

COLUMNS: Final = "app, kind, key, value, version, due"

Submit = Callable[[str, Any, int], Awaitable[Any]]
"""Runs a handler in the writer or a reader: its name, its argument, about how many rows."""


class RecordWrites:
    """The writer's side. Handlers give one result for each call, an Exception for the caller whose call failed."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.handlers: dict[str, Handler] = {
            "save_records": lambda calls: [self._save(call) for call in calls]
        }

    def check(self, changes: Sequence[RecordChange]) -> StoreError | None:
        """Why they may not be made, all of them."""
        more: dict[tuple[int, str], int] = {}  # records that the changes before make
        for change in changes:
            if change.key and self._version(change) != change.version:
                return Conflict(f"{change.kind} {change.key} was changed by somebody else")
            if change.at_most is not None:
                kind = (change.app_id, change.kind)
                more[kind] = more.get(kind, 0) + 1
                if self._count(*kind) + more[kind] > change.at_most:
                    return TooMany(f"{change.at_most} of kind {change.kind}")
        return None

    def _count(self, app_id: int, kind: str) -> int:
        (count,) = self._connection.execute(
            "SELECT count(*) FROM records WHERE app = ? AND kind = ?", (app_id, kind)
        ).fetchone()
        return int(count)

    def make(self, changes: Sequence[RecordChange], ids: Sequence[int] = ()) -> list[int]:
        """Make changes that were checked; returns the new versions. `ids` of messages stand in for empty keys."""
        return [self._make(change, change.key or str(ids[change.message])) for change in changes]

    def _save(self, changes: Sequence[RecordChange]) -> list[int] | StoreError:
        return self.check(changes) or self.make(changes)

    def _version(self, change: RecordChange) -> int:
        row = self._connection.execute(
            "SELECT version FROM records WHERE app = ? AND kind = ? AND key = ?",
            (change.app_id, change.kind, change.key),
        ).fetchone()
        return int(row[0]) if row else 0

    def _make(self, change: RecordChange, key: str) -> int:
        where = (change.app_id, change.kind, key)
        if change.value is None:
            self._connection.execute("DELETE FROM records WHERE app = ? AND kind = ? AND key = ?", where)
            return 0
        version = change.version + 1
        self._connection.execute(
            "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?)",
            (*where, change.value, version, change.due),
        )
        return version


class RecordReads:
    """The readers' side."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.handlers: dict[str, Handler] = {
            "find_record": lambda calls: [self._find(call) for call in calls],
            "list_records": lambda calls: [self._list(*call) for call in calls],
            "count_records": lambda calls: [self._count(call) for call in calls],
            "due_records": lambda calls: [self._due(*call) for call in calls],
            "next_due": lambda calls: [self._next_due(call) for call in calls],
        }

    def _find(self, where: Row) -> Record | None:
        row = self._connection.execute(
            f"SELECT {COLUMNS} FROM records WHERE app = ? AND kind = ? AND key = ?", where
        ).fetchone()
        return Record(*row) if row else None

    def _list(self, app_id: int, kind: str, after: str, limit: int) -> list[Record]:
        rows = self._connection.execute(
            f"SELECT {COLUMNS} FROM records WHERE app = ? AND kind = ? AND key > ? ORDER BY key LIMIT ?",
            (app_id, kind, after, limit),
        )
        return [Record(*row) for row in rows]

    def _count(self, where: Row) -> int:
        (count,) = self._connection.execute(
            "SELECT count(*) FROM records WHERE app = ? AND kind = ?", where
        ).fetchone()
        return int(count)

    def _due(self, kinds: Sequence[str], now: float, limit: int) -> list[Record]:
        rows: list[Row] = []
        for kind in kinds:
            rows += self._connection.execute(
                f"SELECT {COLUMNS} FROM records WHERE kind = ? AND due <= ? AND app NOT IN"
                " (SELECT app_id FROM apps WHERE deleted) ORDER BY due LIMIT ?",
                (kind, now, limit),
            ).fetchall()
        return [Record(*row) for row in sorted(rows, key=lambda row: float(row[5]))[:limit]]

    def _next_due(self, kinds: Sequence[str]) -> float | None:
        earliest = [
            self._connection.execute(
                "SELECT min(due) FROM records WHERE kind = ? AND due IS NOT NULL AND app NOT IN"
                " (SELECT app_id FROM apps WHERE deleted)",
                (kind,),
            ).fetchone()[0]
            for kind in kinds
        ]
        return min((due for due in earliest if due is not None), default=None)


class SqliteRecords:
    """`store.records`."""

    def __init__(self, write: Submit, read: Submit, check_app: Callable[[int], None]) -> None:
        self._write = write
        self._read = read
        self._check_app = check_app

    async def find(self, app_id: int, kind: str, key: str) -> Record | None:
        found: Record | None = await self._read("find_record", (app_id, kind, key), 1)
        return found

    async def list(self, app_id: int, kind: str, after: str = "", limit: int = 1000) -> Sequence[Record]:
        records: Sequence[Record] = await self._read("list_records", (app_id, kind, after, limit), 1)
        return records

    async def count(self, app_id: int, kind: str) -> int:
        count: int = await self._read("count_records", (app_id, kind), 1)
        return count

    async def due(self, kinds: Sequence[str], now: float, limit: int) -> Sequence[Record]:
        records: Sequence[Record] = await self._read("due_records", (tuple(kinds), now, limit), 1)
        return records

    async def next_due(self, kinds: Sequence[str]) -> float | None:
        due: float | None = await self._read("next_due", tuple(kinds), 1)
        return due

    async def save(self, changes: Sequence[RecordChange]) -> Sequence[int]:
        for change in changes:
            if not change.key:
                raise StoreError("a record needs a key")
            self._check_app(change.app_id)
        versions: Sequence[int] = await self._write("save_records", tuple(changes), len(changes))
        return versions
