"""Bytes that are too many for one record, in rows of up to PIECE bytes, each a write of its own: nothing is held, and
other writes go between. A crash half-way leaves pieces that belong to no record; opening the store removes them.
Upkeep removes what a full disk did not let go."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any, Final

from broker.sqlite.engine import Row, delete_rows, write_rows
from broker.sqlite.threads import Handler
from broker.store import PIECE, StoreError, StoreFull

KIND: Final = "file"  # of the record that makes a file exist
SLICE_PIECES: Final = 8  # removed in one transaction: a full disk has little room for its log
RESERVE: Final = 64 << 20  # bytes of the disk that uploads leave to pushes

Submit = Callable[[str, Any, int], Awaitable[Any]]
"""Runs a handler in the writer or a reader: its name, its argument, about how many rows."""


class FileWrites:
    """The writer's side."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.handlers: dict[str, Handler] = {
            "write_pieces": self._write_pieces,
            "remove_pieces": lambda calls: [self._remove_pieces(*call) for call in calls],
        }

    def _write_pieces(self, rows: list[Row]) -> list[None]:
        write_rows(self._connection, "INSERT OR REPLACE INTO files {values}", rows)
        return [None] * len(rows)

    def _remove_pieces(self, app_id: int, file_id: str) -> int:
        """A slice of them; returns how many went."""
        keys = self._connection.execute(
            "SELECT app, file, piece FROM files WHERE app = ? AND file = ? LIMIT ?",
            (app_id, file_id, SLICE_PIECES),
        ).fetchall()
        delete_rows(self._connection, "files", keys)
        return len(keys)


def remove_orphans(connection: sqlite3.Connection) -> int:
    """Remove the pieces of files that were never finished, or are half removed, and return how many files those were.
    While nobody writes one: at open."""
    orphans = [key for key in _stored(connection) if not _has_record(connection, key)]
    for key in orphans:
        connection.execute("DELETE FROM files WHERE app = ? AND file = ?", key)
    return len(orphans)


def _stored(connection: sqlite3.Connection) -> Iterator[Row]:
    """One step for each file: a scan would pass over every piece."""
    key: Row | None = (0, "")
    while key is not None:
        key = connection.execute(
            "SELECT app, file FROM files WHERE (app, file) > (?, ?) ORDER BY app, file LIMIT 1", key
        ).fetchone()
        if key is not None:
            yield key


def _has_record(connection: sqlite3.Connection, key: Row) -> bool:
    return bool(
        connection.execute(
            "SELECT 1 FROM records WHERE app = ? AND kind = ? AND key = ?", (key[0], KIND, key[1])
        ).fetchone()
    )


class FileReads:
    """The readers' side."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.handlers: dict[str, Handler] = {
            "read_piece": lambda calls: [self._read_piece(call) for call in calls]
        }

    def _read_piece(self, key: Row) -> bytes | None:
        row = self._connection.execute(
            "SELECT bytes FROM files WHERE app = ? AND file = ? AND piece = ?", key
        ).fetchone()
        return row[0] if row else None


class SqliteFiles:
    """`store.files`. `free`: bytes of the disk that are free beyond what uploads leave to pushes."""

    def __init__(
        self, write: Submit, read: Submit, check_app: Callable[[int], None], free: Callable[[], int]
    ) -> None:
        self._write = write
        self._read = read
        self._check_app = check_app
        self._free = free
        self._leaving: set[tuple[int, str]] = set()  # their pieces are being removed, or could not be

    async def write(self, app_id: int, file_id: str, pieces: AsyncIterable[bytes]) -> int:
        size = number = 0
        try:
            async for piece in pieces:
                if len(piece) > PIECE:
                    raise StoreError(f"a piece has at most {PIECE} bytes, not {len(piece)}")
                self._check_app(app_id)
                if self._free() < PIECE:
                    raise StoreFull("no room for files: the rest of the disk is left to pushes")
                await self._write("write_pieces", (app_id, file_id, number, piece), 1)
                number += 1
                size += len(piece)
        except BaseException:
            with suppress(StoreError):  # upkeep tries again
                await self.remove(app_id, file_id)
            raise
        return size

    async def read(self, app_id: int, file_id: str) -> AsyncIterator[bytes]:
        number = 0
        while (piece := await self._read("read_piece", (app_id, file_id, number), 1)) is not None:
            yield piece
            number += 1

    async def remove(self, app_id: int, file_id: str) -> None:
        self._leaving.add((app_id, file_id))
        while await self._remove_slice(app_id, file_id):
            pass

    async def remove_again(self) -> int:
        """A slice of what could not be removed before; returns how many pieces went. For upkeep."""
        for key in self._leaving:
            return await self._remove_slice(*key)
        return 0

    async def _remove_slice(self, app_id: int, file_id: str) -> int:
        gone: int = await self._write("remove_pieces", (app_id, file_id), SLICE_PIECES)
        if not gone:
            self._leaving.discard((app_id, file_id))
        return gone
