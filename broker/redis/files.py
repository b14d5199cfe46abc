"""Bytes that are too many for one record: pieces of up to PIECE bytes in slots of their own.

Redis forgets pieces of a file that is not complete after a day. The app has a list of its files: each is there from
its first piece, and seen once the list says how many pieces it has. What never gets a record is removed from there
after a day, too: that is what a crash between pieces and record leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Final

from broker.redis.engine import Engine
from broker.redis.keys import of_app, of_piece, tag_of_app
from broker.redis.records import refused
from broker.redis.scripts import load
from broker.store import PIECE, StoreError

ORPHANED: Final = (
    86_400.0  # seconds without a record after which a file is removed; longer than any upload takes
)
STEP: Final = 64  # pieces touched at once, where their bytes do not come along
APPS: Final = "{files}:apps"  # set of the apps that have files

_files: Final = load("files")


class RedisFiles:
    """`store.files`. `clock` gives Unix seconds."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._cursor = b"0"  # of the walk over apps for orphans
        self._walked = 0.0  # when the last one began

    async def write(self, app_id: int, file_id: str, pieces: AsyncIterable[bytes]) -> int:
        size = count = 0
        try:
            await self._engine.run("SADD", APPS, app_id)
            await self._note(app_id, file_id, 0)
            async for piece in pieces:
                if len(piece) > PIECE:
                    raise StoreError(f"a piece has at most {PIECE} bytes, not {len(piece)}")
                lifetime = int(ORPHANED)
                await self._engine.run("SET", of_piece(app_id, file_id, count), piece, "EX", lifetime)
                count += 1
                size += len(piece)
            await self._keep(app_id, file_id, count)
            await self._note(app_id, file_id, count)
        except BaseException:
            with suppress(StoreError):  # `expire` tries again
                await self.remove(app_id, file_id)
            raise
        return size

    async def _note(self, app_id: int, file_id: str, count: int) -> None:
        arguments = (tag_of_app(app_id), "note", file_id, count, self._clock())
        refused(await self._engine.call(_files, [of_app(app_id, "files")], arguments))

    async def _keep(self, app_id: int, file_id: str, count: int) -> None:
        """Raises StoreError if a piece was forgotten: the upload took too long."""
        for start in range(0, count, STEP):
            numbers = range(start, min(start + STEP, count))
            kept = await asyncio.gather(
                *[self._engine.run("PERSIST", of_piece(app_id, file_id, n)) for n in numbers]
            )
            if not all(kept):
                raise StoreError("the upload took too long")

    async def read(self, app_id: int, file_id: str) -> AsyncIterator[bytes]:
        for number in range(await self._count(app_id, file_id)):
            piece: bytes | None = await self._engine.run("GET", of_piece(app_id, file_id, number))
            if piece is None:
                return  # it is being removed
            yield piece

    async def _count(self, app_id: int, file_id: str) -> int:
        """0: there is none, or it is not complete."""
        noted: bytes | None = await self._engine.run("HGET", of_app(app_id, "files"), file_id)
        return 0 if noted is None else int(noted.split()[0])

    async def remove(self, app_id: int, file_id: str) -> None:
        """From the last piece known, and on until there are none: of an incomplete file nobody knows how many."""
        count = await self._count(app_id, file_id)
        start, gone = 0, 1
        while start < count or gone:
            gone = sum(
                await asyncio.gather(
                    *[
                        self._engine.run("UNLINK", of_piece(app_id, file_id, n))
                        for n in range(start, start + STEP)
                    ]
                )
            )
            start += STEP
        await self._engine.run("HDEL", of_app(app_id, "files"), file_id)

    async def expire(self, now: float, _budget: int) -> int:
        """Remove orphans of a few apps; once an hour it begins with the first again. Returns how many files went."""
        if self._cursor == b"0":
            if now < self._walked + ORPHANED / 24:
                return 0
            self._walked = now
        self._cursor, apps = await self._engine.run("SSCAN", APPS, self._cursor, "COUNT", STEP)
        gone = await asyncio.gather(*[self._remove_orphans(int(app), now - ORPHANED) for app in apps])
        return sum(gone)

    async def _remove_orphans(self, app_id: int, before: float) -> int:
        arguments = (tag_of_app(app_id), "orphans", before)
        orphans: list[bytes] = await self._engine.call(_files, [of_app(app_id, "files")], arguments)
        for file_id in orphans:
            await self.remove(app_id, file_id.decode())
        return len(orphans)

    async def purge(self, app_id: int, _partitions: range, _budget: int) -> int:
        """Of a deleted app: one file. Returns how many went."""
        files: Any = await self._engine.run("HSCAN", of_app(app_id, "files"), 0, "COUNT", 1)
        for file_id in files[1][:1]:
            await self.remove(app_id, file_id.decode())
            return 1
        await self._engine.run("SREM", APPS, app_id)
        return 0
