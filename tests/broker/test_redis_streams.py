"""Behaviour events and the audit log on Redis: ids over several processes, lifetimes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from broker.model import AuditEntry, BehaviourEvent
from broker.redis.engine import Engine
from broker.redis.keys import of_app
from broker.redis.streams import RedisAudit, RedisEvents, first_id
from broker.store import StoreError
from tests.broker.redis_rigs import Rig, plain, plain_redis
from tests.patience import PATIENCE

__all__ = ["plain", "plain_redis"]

START = 1_800_000_000.0
WEEK = 7 * 86_400.0


@pytest.fixture
async def engine(plain: Rig) -> AsyncIterator[Engine]:
    engine = Engine(plain.url)
    await engine.open()
    yield engine
    await engine.close()


def bought(n: int, app_id: int = 7) -> BehaviourEvent:
    return BehaviourEvent(app_id, n, "bought", START + n, b"\0%d" % n)


def entry(n: int, app_id: int = 0) -> AuditEntry:
    return AuditEntry(START + n, app_id, "master", "::1", "key.create", f"k{n}")


def log_of(engine: Engine, now: float = START) -> RedisEvents:
    return RedisEvents(engine, lambda: now, WEEK)


async def test_ids_grow_whatever_the_clocks_of_the_writers_say(engine: Engine) -> None:
    early, late = log_of(engine, START), log_of(engine, START + 9)
    for n, log in enumerate((late, early, late, early)):
        await log.record([bought(n)])
    found = await early.list(7, 0, 100)
    assert [event for _, event in found] == [bought(n) for n in range(4)]
    ids = [event_id for event_id, _ in found]
    assert ids == sorted(set(ids))
    assert ids[0] == first_id(START + 9)
    assert ids[-1] < 2**53


async def test_a_reader_who_pages_misses_nothing_that_is_written_meanwhile(engine: Engine) -> None:
    seen: list[BehaviourEvent] = []

    async def write(first: int) -> None:
        log = log_of(engine, START + first)
        for n in range(20):
            await log.record([bought(first + n)])

    async def read() -> None:
        after = 0
        while len(seen) < 60:
            page = await log_of(engine).list(7, after, 7)
            seen.extend(event for _, event in page)
            after = page[-1][0] if page else after

    await asyncio.wait_for(asyncio.gather(read(), *[write(n) for n in (0, 100, 200)]), PATIENCE)
    assert sorted(event.devno for event in seen) == [n + i for n in (0, 100, 200) for i in range(20)]


async def test_events_are_over_after_their_lifetime_and_make_room(engine: Engine) -> None:
    await log_of(engine).record([bought(n) for n in range(300)])
    assert await log_of(engine, START + WEEK + 1).list(7, 0, 10) == []
    await log_of(engine, START + WEEK + 1).record([bought(1)])
    assert await engine.run("XLEN", of_app(7, "events")) < 150, "by blocks of a hundred"
    assert WEEK < await engine.run("TTL", of_app(7, "events")) <= WEEK + 60


async def test_events_of_several_apps_and_of_a_deleted_one(engine: Engine) -> None:
    log = log_of(engine)
    await log.record([bought(1, 7), bought(2, 8), bought(3, 7)])
    assert [event.devno for _, event in await log.list(7, 0, 10)] == [1, 3]
    assert [event.devno for _, event in await log.list(8, 0, 10)] == [2]
    await engine.run("SET", of_app(7, "deleted"), 1)
    with pytest.raises(StoreError, match="app 7 was deleted"):
        await log.record([bought(4)])
    assert await log.purge(7, range(1), 100) == 2
    assert await log.list(7, 0, 10) == []


async def test_an_audit_page_is_that_of_an_app_or_of_all(engine: Engine) -> None:
    audit = RedisAudit(engine, lambda: START, WEEK)
    await audit.record([])
    await audit.record([entry(n, n % 3) for n in range(9)])
    whole = await audit.list(None, 0, 100)
    assert [one for _, one in whole] == [entry(n, n % 3) for n in range(8, -1, -1)]
    assert await audit.list(1, 0, 100) == [pair for pair in whole if pair[1].app_id == 1]
    assert await audit.list(1, whole[4][0], 1) == [whole[7]]
    assert await audit.list(None, whole[4][0], 2) == whole[5:7]
    assert await audit.list(9, 0, 10) == []


async def test_audit_entries_go_by_their_own_time(engine: Engine) -> None:
    audit = RedisAudit(engine, lambda: START, WEEK)
    await audit.record([entry(n, n % 2) for n in range(10)])
    assert await audit.expire(START + WEEK - 1, 1000) == 0
    assert await audit.expire(START + WEEK + 4, 3) == 3
    assert await audit.expire(START + WEEK + 4, 1000) == 2
    assert [one for _, one in await audit.list(1, 0, 10)] == [entry(9, 1), entry(7, 1), entry(5, 1)]
    assert len(await audit.list(None, 0, 100)) == 5
