"""Records on Redis: what the contract suite cannot reach. Changes and readers of the due list that come between each
other, answers that were lost."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Sequence

import pytest

from broker.model import Record, RecordChange
from broker.redis.engine import Engine
from broker.redis.keys import of_app
from broker.redis.records import RedisRecords, refused
from broker.redis.scripts import load
from broker.store import Conflict, StoreError, StoreUnavailable, TooMany
from tests.broker.redis_rigs import Rig, plain, plain_redis

__all__ = ["plain", "plain_redis"]


@pytest.fixture
async def engine(plain: Rig) -> AsyncIterator[Engine]:
    engine = Engine(plain.url)
    await engine.open()
    yield engine
    await engine.close()


@pytest.fixture
def records(engine: Engine) -> RedisRecords:
    return RedisRecords(engine)


def change(key: str, value: bytes | None = b"x", version: int = 0, **more: object) -> RecordChange:
    return RecordChange(7, "k", key, value, version, **more)  # type: ignore[arg-type]


async def due_keys(records: RedisRecords, now: float = math.inf, limit: int = 1000) -> list[tuple[int, str]]:
    return [(record.app_id, record.key) for record in await records.due(["k"], now, limit)]


def test_include_puts_a_text_in_its_place() -> None:
    assert "local function check_changes" in load("save_records").source
    assert "-- include" not in load("save_records").source.replace("`-- include records`", "")


async def test_a_record_is_found_as_it_was_saved(records: RedisRecords) -> None:
    whole = bytes(range(256)) * 300
    assert await records.save([change("ä\0b", whole, due=12345678.123456789)]) == [1]
    assert await records.find(7, "k", "ä\0b") == Record(7, "k", "ä\0b", whole, 1, 12345678.123456789)
    assert await records.save([change("ä\0b", b"", 1)]) == [2]
    assert await records.find(7, "k", "ä\0b") == Record(7, "k", "ä\0b", b"", 2)
    assert await records.find(7, "l", "ä\0b") is None
    assert await records.find(8, "k", "ä\0b") is None
    assert await due_keys(records) == []


async def test_keys_come_in_the_order_of_their_bytes(records: RedisRecords) -> None:
    keys = ["", "0", "Z", "a", "a\0b", "ab", "é", "\uffff", "😀"][1:]
    assert await records.save([]) == []
    await records.save([change(key) for key in random.Random(1).sample(keys, len(keys))])
    assert [record.key for record in await records.list(7, "k")] == keys
    assert [record.key for record in await records.list(7, "k", "a", 2)] == ["a\0b", "ab"]
    assert [record.key for record in await records.list(7, "k", "b")] == ["é", "\uffff", "😀"]
    assert await records.list(7, "k", "😀") == []


async def test_changes_of_several_apps_are_refused(records: RedisRecords) -> None:
    with pytest.raises(ValueError, match="one app"):
        await records.save([change("a"), RecordChange(8, "k", "a", b"", 0)])
    assert await records.count(7, "k") == await records.count(8, "k") == 0


async def test_a_limit_counts_what_the_call_itself_makes(records: RedisRecords) -> None:
    with pytest.raises(TooMany, match="2 of kind k"):
        await records.save([change(key, at_most=2) for key in "abc"])
    assert await records.save([change(key, at_most=2) for key in "ab"]) == [1, 1]
    assert await records.save([change("c")]) == [1], "without a limit"


async def test_a_call_whose_answer_was_lost_is_answered_again(engine: Engine, records: RedisRecords) -> None:
    packed = await records.prepare([change("a"), change("b", due=5.0)])
    answers = [
        await engine.call(load("save_records"), [of_app(7, "kinds")], ("{7}", packed, token))
        for token in ("t", "t", "u")
    ]
    assert answers[:2] == [[1, 1], [1, 1]]
    with pytest.raises(Conflict, match="k a was changed"):
        refused(answers[2])


async def test_a_deleted_app_has_no_records_again(engine: Engine, records: RedisRecords) -> None:
    await records.save([change("a", due=1.0), RecordChange(7, "l", "a", b"", 0)])
    await engine.run("SET", of_app(7, "deleted"), 1)
    with pytest.raises(StoreError, match="app 7 was deleted"):
        await records.save([change("b")])
    assert await due_keys(records) == []
    assert await records.next_due(["k"]) is None
    assert await records.purge(7, range(1), 100) == 2
    assert await records.purge(7, range(1), 100) == 0
    keys = {key.decode() for key in await engine.run("KEYS", "{7}*")}
    assert {key for key in keys if ":done:" not in key} == {"{7}:deleted"}


# What is due


async def test_the_due_of_many_apps_come_oldest_first(records: RedisRecords) -> None:
    for app_id in range(1, 31):
        times = (100.0 - app_id, 200.0 + app_id)
        await records.save([RecordChange(app_id, "k", f"{time}", b"", 0, time) for time in times])
    assert [app for app, _ in await due_keys(records, 99.0, 3)] == [30, 29, 28]
    assert [app for app, _ in await due_keys(records, 75.0)] == [30, 29, 28, 27, 26, 25]
    assert len(await due_keys(records, 204.0)) == 34
    assert await records.next_due(["k", "l"]) == 70.0


async def test_many_apps_whose_time_in_the_list_is_old_hide_nobody(records: RedisRecords) -> None:
    """The list is corrected by those who read it: a page of apps without anything due makes room for the next."""
    for app_id in range(1, 201):
        await records.save([RecordChange(app_id, "k", "a", b"", 0, float(app_id))])
    for app_id in range(1, 200):
        late = RecordChange(app_id, "k", "a", b"", 1, 900.0 + app_id)
        await records.save([late if app_id % 2 else RecordChange(app_id, "k", "a", None, 1)])
    assert await records.next_due(["k"]) == 200.0
    assert await due_keys(records, 500.0, 1) == [(200, "a")]
    assert len(await due_keys(records)) == 101


async def test_a_change_that_is_overtaken_by_a_reader_is_prepared_again(
    engine: Engine, records: RedisRecords
) -> None:
    """A process that was stopped between touching the list and changing the record, while others read the list."""
    packed = await records.prepare([change("a", due=5.0)])
    assert await records.next_due(["k"]) is None, "closes that touch"
    answer = await engine.call(load("save_records"), [of_app(7, "kinds")], ("{7}", packed, "t"))
    assert refused(answer)
    assert await records.find(7, "k", "a") is None
    assert await records.save([change("a", due=5.0)]) == [1]
    assert await records.next_due(["k"]) == 5.0


async def test_a_reader_who_is_overtaken_raises_nothing(engine: Engine, records: RedisRecords) -> None:
    await records.prepare([change("a", due=5.0)])
    [(app_id, time, touch)] = await records._listed("k", math.inf, 10)
    await records.save([change("a", due=5.0)])
    await records._raise("k", app_id, touch)
    assert (app_id, time) == (7, 5.0)
    assert await due_keys(records) == [(7, "a")]
    assert await records.next_due(["k"]) == 5.0


async def test_a_change_that_is_late_for_ever_says_so(
    engine: Engine, records: RedisRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    await engine.run("HSET", of_app(7, "fence"), "k", 10**9)
    with pytest.raises(StoreUnavailable, match="too often"):
        await records.save([change("a", due=5.0)])
    assert await records.save([change("a")]) == [1], "without a time nobody has to be told"


@pytest.mark.parametrize("seed", range(25))
async def test_whatever_comes_between_no_due_record_is_forgotten(engine: Engine, seed: int) -> None:
    """Four writers that prepare, wait, and change; two readers of the list."""
    dice, truth = random.Random(seed), dict[tuple[int, str], float]()
    versions: dict[tuple[int, str], int] = {}
    records = RedisRecords(engine)

    async def pause() -> None:
        for _ in range(dice.choice((0, 0, 1, 5, 25))):
            await asyncio.sleep(0)

    async def write(writer: int) -> None:
        for _ in range(12):
            app_id, key = dice.choice((1, 2, 3)), f"{writer}{dice.randrange(2)}"
            due, where = dice.choice((None, dice.uniform(0, 100))), (app_id, key)
            value = dice.choice((b"", b"", None)) if versions.get(where) else b""
            new = RecordChange(app_id, "k", key, value, versions.get(where, 0), due)
            while True:
                packed = await records.prepare([new])
                await pause()
                call = (f"{{{app_id}}}", packed, f"{dice.random()}")
                answer = await engine.call(load("save_records"), [of_app(app_id, "kinds")], call)
                if not refused(answer):
                    break
            [versions[where]] = answer
            truth.pop(where, None)
            if due is not None and value is not None:
                truth[where] = due
            await pause()

    async def read() -> None:
        for _ in range(25):
            await (records.next_due(["k"]) if dice.random() < 0.5 else records.due(["k"], 50.0, 2))
            await pause()

    await asyncio.gather(*[write(n) for n in range(4)], read(), read())
    found = {(record.app_id, record.key): record.due for record in await records.due(["k"], 101.0, 100)}
    assert found == truth
    assert await records.next_due(["k"]) == min(truth.values(), default=None)
    listed: Sequence[tuple[int, float, int]] = await records._listed("k", math.inf, 10)
    assert {app for app, _, _ in listed} >= {app for app, _ in truth}
