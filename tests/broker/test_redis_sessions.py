"""Session items and retained messages on Redis: calls that arrive late, calls over several apps."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from broker.model import Retained, SessionItem
from broker.redis.engine import Engine
from broker.redis.keys import of_app
from broker.redis.scripts import load
from broker.redis.sessions import RedisRetained, RedisSessions
from broker.store import StoreUnavailable
from tests.broker.redis_rigs import Rig, plain, plain_redis

__all__ = ["plain", "plain_redis"]

START = 1_800_000_000.0


@pytest.fixture
async def engine(plain: Rig) -> AsyncIterator[Engine]:
    engine = Engine(plain.url)
    await engine.open()
    yield engine
    await engine.close()


def item(n: int | str, value: bytes | None, app_id: int = 7) -> SessionItem:
    return SessionItem(app_id, 1, "s", n, value)


def kept(topic: str, payload: bytes, expires_at: float | None = None, app_id: int = 7) -> Retained:
    return Retained(app_id, topic, payload, 1, b"\1", expires_at, "d/a")


async def replay(engine: Engine, script: str, key: str, number: int, *arguments: str | bytes | int) -> int:
    """A call of writer "w" as it stands on the wire."""
    call = ("{7}", "w", number, 0, *arguments)
    answer: int = await engine.call(load(script), [of_app(7, key)], call)
    return answer


async def test_s11_a_call_that_arrives_after_a_later_one_changes_nothing(engine: Engine) -> None:
    """Its connection was cut, the next call went by another, and Redis read that one first."""
    sessions, value = RedisSessions(engine), b"\x93\1\xa1s\1"
    assert await replay(engine, "session_items", "sessions", 1, 1, value, b"old") == 1
    assert await replay(engine, "session_items", "sessions", 3, 1, value, b"new") == 1
    assert await replay(engine, "session_items", "sessions", 2, 0, value) == 0
    assert await replay(engine, "session_items", "sessions", 3, 1, value, b"new") == 1, "tried again"
    assert await sessions.list(7) == [item(1, b"new")]


async def test_retained_messages_are_not_overtaken_either(engine: Engine) -> None:
    retained = RedisRetained(engine, lambda: START)
    await retained.retain([kept("a", b"1")])
    await engine.run("SET", f"{{7}}:retained:by:{retained._writer._name}", 5)
    with pytest.raises(StoreUnavailable, match="later call"):
        await retained.retain([kept("a", b"")])
    assert await retained.list(7) == [kept("a", b"1")]


async def test_two_processes_do_not_hold_each_other_up(engine: Engine) -> None:
    one, two = RedisSessions(engine), RedisSessions(engine)
    for n in range(3):
        await one.save([item("a", b"%d" % n)])
    await two.save([item("b", b"x")])
    await one.save([item("a", None)])
    assert await two.list(7) == [item("b", b"x")]


async def test_an_app_that_fails_keeps_back_nobody_else(engine: Engine) -> None:
    sessions = RedisSessions(engine)
    await engine.run("SET", of_app(8, "sessions"), "not a hash")
    with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
        await sessions.save([item(1, b"a"), item(1, b"a", 8), item(1, b"a", 9)])
    assert await sessions.list(7) == [item(1, b"a")]
    assert await sessions.list(9) == [item(1, b"a", 9)]


async def test_thousands_of_items_are_one_call(engine: Engine) -> None:
    sessions = RedisSessions(engine)
    await sessions.save([item(n, b"%d" % n) for n in range(5000)])
    await sessions.save([item(n, None) for n in range(10, 5000)] + [item("x", b"")])
    assert await sessions.list(7) == [*(item(n, b"%d" % n) for n in range(10)), item("x", b"")]


async def test_a_deleted_app_gets_nothing_more(engine: Engine) -> None:
    sessions, retained = RedisSessions(engine), RedisRetained(engine, lambda: START)
    await sessions.save([item(1, b"a")])
    await retained.retain([kept("a", b"1", START + 5)])
    await engine.run("SET", of_app(7, "deleted"), 1)
    await sessions.save([item(2, b"a"), item(2, b"a", 8)])
    await retained.retain([kept("b", b"1"), kept("b", b"1", None, 8)])
    assert await sessions.purge(7, range(1), 100) == 1
    assert await retained.purge(7, range(1), 100) == 2
    assert await sessions.list(7) == await retained.list(7) == []
    assert await sessions.list(8) == [item(2, b"a", 8)]
    assert await retained.list(8) == [kept("b", b"1", None, 8)]


async def test_retained_messages_that_are_over_make_room(engine: Engine) -> None:
    now = [START]
    retained = RedisRetained(engine, lambda: now[0])
    await retained.retain([kept(f"t{n}", b"1", START + n) for n in range(1, 120)])
    await retained.retain([kept("t1", b"2"), kept("t2", b"")])
    now[0] = START + 60
    assert [one.topic for one in await retained.list(7)] == sorted(["t1", *(f"t{n}" for n in range(61, 120))])
    await retained.retain([kept("x", b"1")])
    assert await engine.run("HLEN", of_app(7, "retained")) == 61
    assert await engine.run("ZCARD", of_app(7, "retained:over")) == 59


async def test_what_an_old_home_saves_is_refused(engine: Engine) -> None:
    """Decision 0022."""
    old, new = (RedisSessions(engine, lambda number=number: number) for number in (1, 2))
    retained = RedisRetained(engine, lambda: 0.0, lambda: 1)
    await engine.run("SET", of_app(7, "home"), 1)
    await old.save([item(1, b"a")])
    await retained.retain([kept("t", b"a")])
    await engine.run("SET", of_app(7, "home"), 2)
    with pytest.raises(StoreUnavailable, match="home"):
        await old.save([item(1, b"b")])
    with pytest.raises(StoreUnavailable, match="home"):
        await retained.retain([kept("t", b"b")])
    await new.save([item(2, b"c")])
    assert await new.list(7) == [item(1, b"a"), item(2, b"c")]
    assert [one.payload for one in await retained.list(7)] == [b"a"]
