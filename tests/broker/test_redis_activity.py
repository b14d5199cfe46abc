"""Who was there when, told by several processes: they append without reading, and fold while others append."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from broker.model import Activity
from broker.redis.activity import FOLD_BYTES, RedisActivity, _chunks, _decode, _entry, _key
from broker.redis.engine import Engine
from broker.redis.keys import of_app
from broker.telling.calendar import HOUR, Calendar
from tests.broker.redis_index import APP, START, Side, Unreliable, open_sides
from tests.broker.redis_rigs import Rig
from tests.broker.store_contract import DAY, Clock

ONLINE, ACTIVE = Activity.ONLINE, Activity.ACTIVE
MIDNIGHT = START // DAY * DAY


class Process:
    """What one node or broker has of it."""

    def __init__(self, side: Side) -> None:
        self.engine = Unreliable(side.real)
        engine: Any = self.engine
        self.deleted: set[int] = set()
        self.activity = RedisActivity(
            engine, side.clock, Calendar("UTC"), 61 * DAY, side.apps, self.deleted.__contains__
        )

    async def seen(self, start: float, end: float, kind: Activity = ONLINE) -> list[int]:
        return list(await self.activity.active(APP, kind, start, end))

    async def flush(self) -> None:
        self.activity._attendance.flush()
        while self.activity._tasks:
            await asyncio.wait(self.activity._tasks)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def processes(plain: Rig, clock: Clock) -> AsyncIterator[list[Process]]:
    async with AsyncExitStack() as stack:
        sides = await stack.enter_async_context(open_sides(plain.url, clock))
        app = await sides[0].apps.create_app("shop")
        assert app.app_id < APP
        while (await sides[0].apps.create_app("shop")).app_id < APP:
            pass
        yield [Process(side) for side in sides]


async def test_what_each_process_saw_counts_together(processes: list[Process], clock: Clock) -> None:
    one, other = processes
    one.activity.claimed(APP, 1)
    other.activity.claimed(APP, 70_000)
    other.activity.note_active(APP, 5)
    await one.flush()
    await other.flush()
    for process in processes:
        assert await process.seen(START, START + 1) == [1, 70_000]
        assert await process.seen(START, START + 1, ACTIVE) == [5]
    clock.now += HOUR
    one.activity.released(APP, 1)
    clock.now += HOUR
    await one.flush()
    await other.flush()
    hours = [[START + n * HOUR, START + n * HOUR + 1] for n in range(4)]
    assert [await one.seen(*hour) for hour in hours] == [[1, 70_000], [1, 70_000], [70_000], []]
    counts = await other.activity.active_counts(APP, ONLINE, [(START, START + HOUR), (START, START + DAY)])
    assert counts == [2, 2]


async def test_a_device_that_moved_counts_once_and_where_it_is(
    processes: list[Process], clock: Clock
) -> None:
    one, other = processes
    one.activity.claimed(APP, 1)
    other.activity.claimed(APP, 1)
    one.activity.released(APP, 1)
    one.activity.released(APP, 1)  # once more does nothing
    clock.now += HOUR
    assert await one.seen(START + HOUR, START + HOUR + 1) == []
    assert await other.seen(START + HOUR, START + HOUR + 1) == [1]


@given(st.frozensets(st.integers(0, 2**32 - 1), max_size=30))
def test_chunks_are_a_partition(devnos: frozenset[int]) -> None:
    parts = list(_chunks(BitMap(devnos)))
    assert [devno for _, part in parts for devno in part] == sorted(devnos)
    assert all(devno >> 16 == chunk for chunk, part in parts for devno in part)


@given(st.lists(st.frozensets(st.integers(0, 65_535), max_size=20)))
def test_a_value_is_the_union_of_its_entries(sets: list[frozenset[int]]) -> None:
    value = b"".join(_entry(BitMap(devnos)) for devnos in sets)
    assert _decode(value) == BitMap().union(BitMap(), *map(BitMap, sets))


async def _length(process: Process, field: str) -> int:
    value = await process.engine.engine.run("HGET", _key(APP, ONLINE, 0), field)
    return len(value or b"")


async def _append(process: Process, hour: int, devnos: Iterable[int]) -> None:
    await process.activity._append([(APP, ONLINE, HOUR, hour, BitMap(devnos))])


async def test_a_long_value_is_folded_and_none_of_it_is_lost(processes: list[Process]) -> None:
    """While the other process appends, and folds, too."""
    hour, longest = int(START), 0
    for turn in range(40):
        await asyncio.gather(
            *[_append(process, hour, range(turn, 65_536, 97 + n)) for n, process in enumerate(processes)]
        )
        longest = max(longest, await _length(processes[0], f"{HOUR}:{hour}"))
    assert longest < 2 * FOLD_BYTES
    expected = BitMap([d for turn in range(40) for n in range(2) for d in range(turn, 65_536, 97 + n)])
    assert await processes[1].activity.active(APP, ONLINE, hour, hour + 1) == expected


async def test_what_comes_while_hours_become_a_day_is_in_the_day_or_its_hour(
    processes: list[Process], clock: Clock
) -> None:
    one, other = processes
    hours = [int(MIDNIGHT) + n * HOUR for n in range(24)]
    for n, hour in enumerate(hours):
        await _append(one, hour, [n])
    clock.now = MIDNIGHT + 3 * DAY
    late = [1000]

    async def come_between(name: str) -> None:
        if name == "activity_fold" and late:
            await _append(other, hours[3], [late.pop()])

    one.engine.before = come_between
    assert await one.activity.expire(clock.now, 100) == 24
    one.engine.before = None
    assert await other.seen(hours[3], hours[3] + 1) == [*range(24), 1000]
    await _append(other, hours[5], [2000])  # of a process that slept: later than the fold
    assert await one.seen(MIDNIGHT, MIDNIGHT + DAY) == [*range(24), 1000, 2000]
    clock.now += HOUR
    assert await one.activity.expire(clock.now, 100) == 2


async def test_hours_that_another_process_folded_meanwhile_become_a_day_later(
    processes: list[Process], clock: Clock
) -> None:
    one, other = processes
    hour = int(MIDNIGHT)
    for n in range(3):
        await _append(one, hour, [n])
    clock.now = MIDNIGHT + 3 * DAY

    async def come_between(name: str) -> None:
        if name == "activity_fold":
            await other.activity._fold_one(APP, ONLINE, 0, (HOUR, hour))

    one.engine.before = come_between
    assert await one.activity.expire(clock.now, 100) == 0
    one.engine.before = None
    assert await other.seen(hour, hour + 1) == [0, 1, 2]
    clock.now += HOUR
    assert await one.activity.expire(clock.now, 100) == 1
    assert await other.seen(hour + HOUR, hour + DAY) == [0, 1, 2]


async def test_one_process_an_hour_goes_through_the_apps(processes: list[Process], clock: Clock) -> None:
    one, other = processes
    await _append(one, int(MIDNIGHT), [1])
    clock.now = MIDNIGHT + 3 * DAY
    assert await one.activity.expire(clock.now, 100) == 1
    other.engine.calls.clear()
    assert await other.activity.expire(clock.now, 100) == 0
    assert other.engine.calls == ["SET"]
    assert await other.activity.expire(clock.now, 100) == 0
    assert other.engine.calls == ["SET"], "it asks once an hour"


async def test_days_go_after_their_lifetime(processes: list[Process], clock: Clock) -> None:
    one, _ = processes
    await _append(one, int(MIDNIGHT), [1])
    await _append(one, int(MIDNIGHT + DAY), [2])
    for days in (4, 62.2, 63.2):
        clock.now = MIDNIGHT + days * DAY
        await one.activity.expire(clock.now, 100)
    assert await one.seen(0, clock.now) == []
    assert not await one.engine.engine.run("EXISTS", _key(APP, ONLINE, 0))


async def test_a_write_that_failed_is_made_again(processes: list[Process], clock: Clock) -> None:
    one, other = processes
    one.activity.claimed(APP, 1)
    one.engine.lose = 1  # the chunk is listed, its bitmap is not written
    await one.flush()
    assert await one.seen(START, START + 1) == [1]
    assert await other.seen(START, START + 1) == []
    clock.now += 10
    await one.flush()
    assert await other.seen(START, START + 1) == [1]


async def test_a_deleted_app_leaves_nothing(processes: list[Process], clock: Clock) -> None:
    one, other = processes
    for process in processes:
        process.activity.claimed(APP, 1)
        process.activity.claimed(APP, 70_000)
    await one.flush()
    assert await one.activity.purge(APP, range(1), 100) > 0
    for process in processes:
        process.deleted.add(APP)
    await other.flush()
    await one.activity.close()
    assert await one.activity.purge(APP, range(1), 100) == 0
    assert not await one.engine.engine.run("EXISTS", of_app(APP, "seen"))
    assert await one.seen(0, START + DAY) == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1), st.sampled_from(("claim", "release", "hour", "flush")), st.integers(0, 3)
        ),
        max_size=25,
    )
)
def test_any_course_of_two_processes(plain: Rig, course: list[tuple[int, str, int]]) -> None:
    """Against a plain model: who is held by a process in any moment of an hour was there in that hour."""

    async def play() -> None:
        clock = Clock()
        engine = Engine(plain.url)
        await engine.open()
        await engine.run("FLUSHALL")
        await engine.close()
        async with open_sides(plain.url, clock) as sides:
            processes = [Process(side) for side in sides]
            held: list[set[int]] = [set(), set()]
            there: dict[float, set[int]] = {START: set()}
            for n, act, devno in course:
                process = processes[n]
                if act == "claim":
                    process.activity.claimed(APP, devno)
                    held[n].add(devno)
                    there[clock.now].add(devno)
                elif act == "release":
                    process.activity.released(APP, devno)
                    held[n].discard(devno)
                elif act == "hour":
                    clock.now += HOUR
                    there[clock.now] = held[0] | held[1]
                else:
                    await process.flush()
            for process in processes:
                await process.activity.close()
            for hour, devnos in there.items():
                assert await processes[0].seen(hour, hour + 1) == sorted(devnos)

    asyncio.run(play())
