"""Files on Redis: when they are seen, and what a crash leaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest

from broker.model import RecordChange
from broker.redis.engine import Engine
from broker.redis.files import ORPHANED, STEP, RedisFiles
from broker.redis.keys import of_app, of_piece
from broker.redis.records import RedisRecords
from broker.store import StoreError
from tests.broker.redis_rigs import Rig, plain, plain_redis

__all__ = ["plain", "plain_redis"]

START = 1_800_000_000.0


@pytest.fixture
async def engine(plain: Rig) -> AsyncIterator[Engine]:
    engine = Engine(plain.url)
    await engine.open()
    yield engine
    await engine.close()


@pytest.fixture
def files(engine: Engine) -> RedisFiles:
    return RedisFiles(engine, lambda: START)


async def each(pieces: Sequence[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def content(files: RedisFiles, app_id: int, file_id: str) -> list[bytes]:
    return [piece async for piece in files.read(app_id, file_id)]


async def pieces_of(engine: Engine, file_id: str) -> int:
    return len(await engine.run("KEYS", f"*/{file_id}.*"))


async def test_a_file_is_seen_once_it_is_complete(engine: Engine, files: RedisFiles) -> None:
    seen: list[list[bytes]] = []

    async def watched() -> AsyncIterator[bytes]:
        for piece in (b"a", b"b", b"c"):
            seen.append(await content(files, 7, "f"))
            yield piece

    assert await files.write(7, "f", watched()) == 3
    assert seen == [[], [], []]
    assert await content(files, 7, "f") == [b"a", b"b", b"c"]
    assert await engine.run("TTL", of_piece(7, "f", 1)) == -1
    assert await content(files, 8, "f") == []


async def test_a_file_of_many_pieces_goes_whole(engine: Engine, files: RedisFiles) -> None:
    pieces = [b"%d" % n for n in range(STEP * 2 + 3)]
    await files.write(7, "f", each(pieces))
    assert await content(files, 7, "f") == pieces
    await files.remove(7, "f")
    assert await pieces_of(engine, "f") == 0
    assert await engine.run("HLEN", of_app(7, "files")) == 0


async def test_what_a_crash_leaves_is_forgotten_or_collected(engine: Engine, files: RedisFiles) -> None:
    """Half an upload; a complete one without its record; and one with."""
    await files._note(7, "half", 0)
    await engine.run("SADD", "{files}:apps", 7)
    await engine.run("SET", of_piece(7, "half", 0), b"x", "EX", int(ORPHANED))
    await files.write(7, "lost", each([b"x"] * 3))
    await files.write(7, "kept", each([b"x"] * 3))
    await RedisRecords(engine).save([RecordChange(7, "file", "kept", b"{}", 0)])
    assert await files.expire(START + ORPHANED, 100) == 0
    again = RedisFiles(engine, lambda: START)
    assert await again.expire(START + ORPHANED + 1, 100) == 2
    assert [await pieces_of(engine, name) for name in ("half", "lost", "kept")] == [0, 0, 3]
    assert await again.expire(START + ORPHANED + 2, 100) == 0, "only once an hour"


async def test_an_upload_that_takes_longer_than_its_pieces_live_fails(
    engine: Engine, files: RedisFiles
) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"a"
        yield b"b"
        await engine.run("DEL", of_piece(7, "f", 0))

    with pytest.raises(StoreError, match="too long"):
        await files.write(7, "f", slow())
    assert await pieces_of(engine, "f") == 0
    assert await content(files, 7, "f") == []


async def test_a_deleted_app_gets_no_files_and_loses_those_it_has(engine: Engine, files: RedisFiles) -> None:
    for name in "abc":
        await files.write(7, name, each([b"x"]))
    await engine.run("SET", of_app(7, "deleted"), 1)
    with pytest.raises(StoreError, match="app 7 was deleted"):
        await files.write(7, "d", each([b"x"]))
    while await files.purge(7, range(1), 100):
        pass
    assert await engine.run("KEYS", "*") == [b"{7}:deleted"]
