"""Slow pushes and pushes that quiet hours hold back, on a real store, with the clock as an argument."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from broker.bus import Broadcast, Recalled, Targeted
from broker.errors import ApiError
from broker.later.pacer import Progress
from broker.later.paces import HELD, LEAST_GAP, MAX_PARTS, SLOW, Pace, decode, start_pace
from broker.limits import Limits
from broker.metrics import Metrics
from broker.model import NewMessage, OwedRequest, QuietHours, Settled
from broker.store import StoreError
from tests.broker.later import START, World, open_world

HOUR = 3600.0
DAY = 86_400.0


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path, Limits(fanout_limit=10)) as world:
        await world.create_app(100)
        yield world


async def _slow(world: World, minutes: int = 60, **changes: Any) -> int:
    options = {"big_push_duration": minutes} | changes.pop("options", {})
    return await world.push(options=options, **changes)


async def _progress(world: World, msg_id: int) -> Progress:
    progress = await world.broker.pacer.describe(world.app.app_id, msg_id)
    assert progress is not None
    return progress


async def _refused(act: Any, world: World, msg_id: int) -> tuple[int, int]:
    with pytest.raises(ApiError) as caught:
        await act(world.app.app_id, msg_id)
    return caught.value.code, caught.value.http_status


def _devnos(bells: Sequence[object]) -> list[int]:
    """Of all parts, as often as each got one."""
    found: list[int] = []
    for bell in bells:
        if isinstance(bell, Broadcast):
            found += bell.broadcast.targets
        elif isinstance(bell, Targeted):
            found += bell.devnos
    return found


# The plan


def _pace(total: int, duration: float, **changes: Any) -> Pace:
    message = NewMessage(1, b"{}", BitMap(range(total)), True, START, START + duration + DAY)
    change = start_pace(message, (START, duration, int(DAY)))
    assert change.value is not None
    assert (change.key, change.version, change.kind) == ("", 0, SLOW if duration else HELD)
    return decode(change.value)


@given(st.integers(1, 100_000), st.integers(1, 1400), st.floats(0, 1.2))
@settings(deadline=None)
def test_what_is_released_is_within_five_percent_of_the_plan_or_one_device(
    total: int, minutes: int, moment: float
) -> None:
    duration = minutes * 60.0
    pace = _pace(total, duration)
    released = pace.reaches(pace.due_part(START + moment * duration))
    planned = total * min(moment, 1.0)
    assert -1 < released - planned <= max(0.05 * total, 1)
    assert pace.parts <= MAX_PARTS
    assert duration / pace.parts >= LEAST_GAP
    assert pace.reaches(pace.parts) == total


@given(st.integers(1, 1000), st.integers(1, 1400), st.integers(0, 99), st.floats(0, 80_000))
@settings(deadline=None)
def test_what_is_due_is_due_when_it_is_said(total: int, minutes: int, part: int, later: float) -> None:
    """Else it would be looked at again and again for nothing."""
    pace = _pace(total, minutes * 60.0)
    moment = pace.begins(min(part, pace.parts - 1))
    assert pace.due_part(moment) == min(part, pace.parts - 1) + 1
    moved = pace.held_until(moment + later)
    assert moved.due_part(moved.due) == 1


@given(st.integers(1, 100_000), st.integers(1, 60), st.lists(st.tuples(st.integers(0, 1000), st.booleans())))
@settings(deadline=None)
def test_pauses_count_as_no_time(total: int, minutes: int, steps: list[tuple[int, bool]]) -> None:
    pace, now, active = _pace(total, minutes * 60.0), START, 0
    for seconds, flip in steps:
        now += seconds
        if pace.paused_at is None:
            active += seconds
            pace = msgspec.structs.replace(pace, part=pace.due_part(now))
        planned = total * min(active / (minutes * 60), 1)
        assert abs(pace.released - planned) <= max(0.05 * total, 1) + 1
        if flip:
            paused = pace.paused_at is not None
            pace = pace.resumed(now) if paused else msgspec.structs.replace(pace, paused_at=now)


@given(st.integers(1, 100), st.floats(0, 40_000), st.floats(0, 40_000))
def test_a_pause_in_quiet_hours_costs_only_what_is_beyond_them(
    part: int, paused: float, longer: float
) -> None:
    """However much had gone before them."""
    morning = START + 36_000.0
    held = msgspec.structs.replace(_pace(1000, 6000.0), part=min(part, 99)).held_until(morning)
    resumed = msgspec.structs.replace(held, paused_at=START + paused).resumed(START + paused + longer)
    gap = 6000.0 / held.parts
    goes_on = resumed.begins(resumed.part)
    beyond = max(0.0, paused + longer - max(36_000.0, paused))
    assert -1e-3 <= goes_on - morning - beyond <= gap + 1e-3


def test_a_held_push_goes_at_once_when_it_starts() -> None:
    pace = _pace(5, 0.0)
    assert (pace.parts, pace.due) == (1, START)
    assert (pace.due_part(START - 0.1), pace.due_part(START)) == (0, 1)


# On the store


async def test_an_hour_is_even_at_every_second_and_adds_up(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.create_app(10_000)
        msg_id = await _slow(world)
        due = START
        for second in range(3601):
            world.now = START + second
            if world.now >= due:
                due = await world.run()
            progress = await _progress(world, msg_id)
            assert abs(progress.released - 10_000 * second / 3600) <= 500
            if second % 60 == 0:
                record = await world.find(msg_id)
                assert len(record.released) == progress.released
                assert await world.counts(msg_id) == {"pending": 10_000}
        assert await _progress(world, msg_id) == Progress(10_000, 10_000, None, "done")
        assert sorted(_devnos(await world.rung())) == list(range(10_000))
        assert (await world.find(msg_id)).parts <= MAX_PARTS
        await world.pass_time(START + 3600 + DAY)
        assert await world.counts(msg_id) == {"expired": 10_000}


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_it_adds_up_and_nobody_gets_two(world: World, seed: int) -> None:
    """Time, deliveries, pauses, crashes and at last a stop, at random (G4)."""
    random, msg_id = Random(seed), await _slow(world, options={"time_to_live": 1200})
    got: list[int] = []
    for _ in range(30):
        pacer = world.broker.pacer
        await world.pass_time(world.now + random.randint(0, 400))
        bells = [bell for bell in await world.rung() if isinstance(bell, Broadcast | Targeted)]
        got += _devnos(bells)
        for bell in bells:
            message = bell.broadcast.message if isinstance(bell, Broadcast) else bell.message
            some = [devno for devno in _devnos([bell]) if random.random() < 0.5]
            wide = isinstance(bell, Broadcast)
            await world.store.settle([Settled(world.app.app_id, message.msg_id, wide, some, at=world.now)])
        with suppress(ApiError):
            await random.choice([pacer.pause, pacer.resume, pacer.resume])(world.app.app_id, msg_id)
        if random.random() < 0.2:
            await world.crash()
        counts = await world.counts(msg_id)
        assert sum(counts.values()) == 100
        assert sorted(got) == list((await world.find(msg_id)).released)
    with suppress(ApiError):  # it may be at its end
        await world.broker.pacer.stop(world.app.app_id, msg_id)
        assert "pending" not in await world.counts(msg_id)
    await world.pass_time(world.now + 1200)
    assert "pending" not in await world.counts(msg_id)
    assert (await _progress(world, msg_id)).state in ("done", "stopped", "expired")


async def test_devices_know_a_part_by_the_id_of_the_push(world: World) -> None:
    msg_id = await _slow(world, options={"time_to_live": 60, "priority": "high"})
    await world.run()
    (bell,) = await world.rung()
    assert isinstance(bell, Targeted)
    message = bell.message
    assert (message.public_id, message.high, list(bell.devnos)) == (msg_id, True, [0])
    assert message.msg_id != msg_id
    assert (message.created_at, message.expires_at) == (START, START + 60)
    owed = await world.store.fetch_owed([OwedRequest(world.app.app_id, devno, 0, 10) for devno in (0, 1)])
    assert [[one.public_id for one in row] for row in owed] == [[msg_id], []]


async def test_a_part_for_many_is_a_broadcast(world: World) -> None:
    msg_id = await _slow(world)
    await world.run()
    await world.rung()
    world.now = START + HOUR / 2  # nobody looked for half an hour
    await world.run()
    (bell,) = await world.rung()
    assert isinstance(bell, Broadcast)
    assert list(bell.broadcast.targets) == list(range(1, 51))
    live = await world.store.live_broadcasts(world.app.app_id)
    assert [row.message.public_id for row in live] == [msg_id]


async def test_a_crash_between_parts_loses_none_and_sends_none_twice(world: World) -> None:
    msg_id = await _slow(world)
    got: list[int] = []
    for minute in (7, 7.5, 30, 59, 60, 200):
        await world.pass_time(START + minute * 60)
        got += _devnos(await world.rung())
        assert len(got) >= 99 * min(minute, 60) / 60
        await world.crash()
    assert sorted(got) == list(range(100))
    assert (await _progress(world, msg_id)).state == "done"


async def test_a_broker_that_dies_after_the_part_was_stored_left_nothing_to_do(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: object) -> None:
        raise asyncio.CancelledError

    msg_id = await _slow(world)
    monkeypatch.setattr(world.bus, "ring", die)
    with pytest.raises(asyncio.CancelledError):
        await world.run()
    await world.crash()
    await world.run()
    assert _devnos(await world.rung()) == []
    assert list((await world.find(msg_id)).released) == [0]


async def test_of_many_brokers_one_lets_a_part_go(world: World) -> None:
    world.add_broker()
    world.add_broker()
    msg_id = await _slow(world)
    await world.pass_time(START + HOUR)
    assert sorted(_devnos(await world.rung())) == list(range(100))
    assert sum(broker.pacer.counts.devices for broker in world.brokers) == 100
    assert (
        sum(broker.pacer.counts.parts for broker in world.brokers) == (await world.find(msg_id)).parts == 100
    )
    assert [broker.timekeeper.failed for broker in world.brokers] == [0, 0, 0]
    assert sum(broker.pacer.counts.begun for broker in world.brokers) == 1
    assert sum(broker.pacer.counts.ended for broker in world.brokers) == 1


async def test_pause_and_resume_move_the_plan(world: World) -> None:
    msg_id, pacer = await _slow(world), world.broker.pacer
    assert await _progress(world, msg_id) == Progress(100, 0, START + HOUR, "sending")
    await world.pass_time(START + HOUR / 2)
    assert await _progress(world, msg_id) == Progress(100, 51, START + HOUR, "sending")
    paused = Progress(100, 51, None, "paused")
    assert await pacer.pause(world.app.app_id, msg_id) == paused
    await world.pass_time(START + HOUR)
    assert await pacer.pause(world.app.app_id, msg_id) == paused  # a second time changes nothing
    await world.pass_time(START + 5 * HOUR)
    assert await _progress(world, msg_id) == paused
    resumed = Progress(100, 51, START + 5.5 * HOUR, "sending")
    assert await pacer.resume(world.app.app_id, msg_id) == resumed
    assert await pacer.resume(world.app.app_id, msg_id) == resumed
    await world.pass_time(START + 5.25 * HOUR)
    assert (await _progress(world, msg_id)).released == 76
    await world.pass_time(START + 5.5 * HOUR)
    assert await _progress(world, msg_id) == Progress(100, 100, None, "done")
    assert sorted(_devnos(await world.rung())) == list(range(100))


async def test_resume_wakes_the_timekeeper(world: World) -> None:
    msg_id, woken = await _slow(world), asyncio.Event()
    world.broker.pacer._wake = woken.set
    await world.broker.pacer.pause(world.app.app_id, msg_id)
    assert not woken.is_set()
    await world.broker.pacer.resume(world.app.app_id, msg_id)
    assert woken.is_set()


async def test_stop_recalls_what_was_not_delivered(world: World) -> None:
    msg_id, pacer = await _slow(world), world.broker.pacer
    await world.run()
    first = (await world.rung())[0]
    assert isinstance(first, Targeted)
    settled = Settled(world.app.app_id, first.message.msg_id, False, delivered=[0], at=START)
    await world.store.settle([settled])
    await world.pass_time(START + HOUR / 2)
    await world.rung()
    assert await pacer.stop(world.app.app_id, msg_id) == Progress(100, 51, None, "stopped")
    (bell,) = await world.rung()
    assert isinstance(bell, Recalled)
    assert BitMap.union(*(one.devnos for one in bell.withdrawn)) == BitMap(range(1, 100))
    await world.pass_time(START + 2 * HOUR)
    assert await world.rung() == []
    assert await world.counts(msg_id) == {"delivered": 1, "recalled": 99}
    assert await _progress(world, msg_id) == Progress(100, 51, None, "stopped")


async def test_withdrawal_lets_no_part_follow(world: World) -> None:
    msg_id = await _slow(world)
    await world.pass_time(START + HOUR / 2)
    await world.broker.withdrawals.withdraw(world.app, msg_id)
    await world.rung()
    await world.pass_time(START + 2 * HOUR)
    assert _devnos(await world.rung()) == []
    assert await world.counts(msg_id) == {"recalled": 100}
    assert (await _progress(world, msg_id)).state == "stopped"
    world.now += world.limits.report_lifetime
    await world.run()
    assert await world.store.records.list(world.app.app_id, "pace-cut") == []


async def test_what_is_unknown_or_over_cannot_be_paused_resumed_or_stopped(world: World) -> None:
    pacer, plain, slow = world.broker.pacer, await world.push(), await _slow(world)
    await world.pass_time(START + HOUR)
    for act in (pacer.pause, pacer.resume, pacer.stop):
        assert await _refused(act, world, 17) == (1003, 404)
        assert await _refused(act, world, plain) == (1003, 400)
        assert await _refused(act, world, slow) == (1003, 400)
    assert await pacer.describe(world.app.app_id, 17) is None
    assert await pacer.describe(world.app.app_id, plain) is None


async def test_apps_do_not_see_each_others(world: World) -> None:
    msg_id, pacer = await _slow(world), world.broker.pacer
    other = await world.create_app(0)
    assert await pacer.describe(other.app_id, msg_id) is None
    assert await _refused(pacer.stop, world, msg_id) == (1003, 404)


async def test_a_push_paused_beyond_its_time_to_live_ends(world: World) -> None:
    msg_id, pacer = await _slow(world, options={"time_to_live": 600}), world.broker.pacer
    await world.pass_time(START + HOUR / 2)
    await pacer.pause(world.app.app_id, msg_id)
    await world.pass_time(START + HOUR + 599)
    assert (await _progress(world, msg_id)).state == "paused"
    assert await world.counts(msg_id) == {"expired": 51, "pending": 49}
    await world.pass_time(START + HOUR + 600)
    assert await world.counts(msg_id) == {"expired": 100}
    assert await _progress(world, msg_id) == Progress(100, 51, None, "expired")
    assert await _refused(pacer.resume, world, msg_id) == (1003, 400)
    assert pacer.counts.expired == 1


async def test_no_part_waits_longer_than_the_whole(world: World) -> None:
    msg_id, pacer = await _slow(world, options={"time_to_live": 600}), world.broker.pacer
    await pacer.pause(world.app.app_id, msg_id)
    world.now = START + 1000
    await pacer.resume(world.app.app_id, msg_id)
    await world.pass_time(START + HOUR + 599)
    last = [bell for bell in await world.rung() if isinstance(bell, Targeted)][-1]
    assert last.message.expires_at == START + HOUR + 600 < last.message.created_at + 600
    assert await world.counts(msg_id) == {"expired": 73, "pending": 27}


async def test_a_push_for_now_reaches_who_is_online_when_its_turn_comes(world: World) -> None:
    msg_id = await _slow(world, options={"time_to_live": 0})
    await world.pass_time(START + HOUR / 2)
    bells = await world.rung()
    assert len(bells) == 51
    assert all(
        bell.message.created_at == bell.message.expires_at for bell in bells if isinstance(bell, Targeted)
    )
    assert await world.counts(msg_id) == {"expired": 51, "pending": 49}
    await world.pass_time(START + HOUR)
    assert await world.counts(msg_id) == {"expired": 100}


async def test_those_that_a_newer_push_took_over_get_no_part(world: World) -> None:
    slow = await _slow(world)
    await world.pass_time(START + HOUR / 4)
    newer = await world.push(audience={"tag": ["t9"]}, options={"override_msg_id": slow})
    await world.rung()
    await world.pass_time(START + HOUR)
    assert not [devno for devno in _devnos(await world.rung()) if devno % 10 == 9]
    assert (await world.counts(slow))["recalled"] == 10
    assert await world.counts(newer) == {"pending": 10}
    assert (await _progress(world, slow)).state == "done"


async def test_an_override_that_comes_while_a_part_is_made_is_not_missed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = await _slow(world)
    world.now = START + HOUR / 2
    find, newer = world.store.find_messages, []

    async def find_then_override(app_id: int, msg_ids: Sequence[int]) -> Any:
        found = await find(app_id, msg_ids)
        if not newer:
            newer.append(0)
            newer[0] = await world.push(audience={"tag": ["t9"]}, options={"override_msg_id": slow})
        return found

    monkeypatch.setattr(world.store, "find_messages", find_then_override)
    await world.run()
    assert sorted(_devnos(await world.rung())) == sorted(
        [*range(9, 100, 10), *(devno for devno in range(51) if devno % 10 != 9)]
    )
    assert await world.counts(slow) == {"pending": 90, "recalled": 10}
    assert world.broker.timekeeper.failed == 0


async def test_a_part_takes_the_place_of_what_the_push_overrides(world: World) -> None:
    older = await world.push()
    await world.run()
    await world.rung()
    slow = await _slow(world, options={"override_msg_id": older})
    await world.pass_time(START + HOUR / 2)
    bells = await world.rung()
    parts = [bell for bell in bells if isinstance(bell, Targeted)]
    assert {bell.message.replaces for bell in parts} == {older}
    assert sum(isinstance(bell, Recalled) for bell in bells) == 51
    assert await world.counts(older) == {"recalled": 51, "pending": 49}
    assert await world.counts(slow) == {"pending": 100}


QUIET = QuietHours(start="09:00", end="17:00")  # the world begins at 08:00


async def test_quiet_hours_hold_the_plan_up(world: World) -> None:
    await world.set_rules(quiet_hours=QUIET)
    msg_id = await _slow(world, minutes=120)
    await world.pass_time(START + HOUR)  # the first moment of the quiet hours
    waiting = Progress(100, 50, START + 10 * HOUR, "waiting")
    assert await _progress(world, msg_id) == waiting
    await world.pass_time(START + 8.9 * HOUR)
    assert await _progress(world, msg_id) == waiting
    await world.pass_time(START + 9.5 * HOUR)
    assert (await _progress(world, msg_id)).released == 76
    await world.pass_time(START + 10 * HOUR)
    assert (await _progress(world, msg_id)).state == "done"
    assert world.broker.pacer.counts.postponed == 1


async def test_quiet_hours_do_not_hold_up_what_is_urgent(world: World) -> None:
    await world.set_rules(quiet_hours=QUIET)
    msg_id = await _slow(world, minutes=120, options={"priority": "high"})
    await world.pass_time(START + 2 * HOUR)
    assert await _progress(world, msg_id) == Progress(100, 100, None, "done")


async def test_a_push_in_quiet_hours_goes_when_they_end(world: World) -> None:
    await world.set_rules(quiet_hours=QUIET)
    await world.pass_time(START + 2 * HOUR)
    msg_id = await world.push()
    assert await world.store.records.count(world.app.app_id, SLOW) == 0
    assert await _progress(world, msg_id) == Progress(100, 0, START + 9 * HOUR, "waiting")
    await world.pass_time(START + 9 * HOUR - 1)
    assert _devnos(await world.rung()) == []
    assert await world.counts(msg_id) == {"pending": 100}
    await world.pass_time(START + 9 * HOUR)
    assert _devnos(await world.rung()) == list(range(100))
    assert await _progress(world, msg_id) == Progress(100, 100, None, "done")


async def test_pushes_held_to_the_same_moment_go_in_the_order_they_came(world: World) -> None:
    await world.set_rules(quiet_hours=QUIET)
    world.now = START + 2 * HOUR
    ids = [await world.push() for _ in range(100)]
    await world.pass_time(START + 9 * HOUR)
    bells = [bell.broadcast.message for bell in await world.rung() if isinstance(bell, Broadcast)]
    assert [message.public_id for message in bells] == ids
    assert [message.msg_id for message in bells] == sorted(message.msg_id for message in bells)


async def test_one_that_was_paused_before_it_began_begins_as_planned(world: World) -> None:
    await world.set_rules(quiet_hours=QUIET)
    await world.pass_time(START + 2 * HOUR)
    msg_id, pacer = await world.push(), world.broker.pacer
    await pacer.pause(world.app.app_id, msg_id)
    await world.pass_time(START + 3 * HOUR)
    assert await pacer.resume(world.app.app_id, msg_id) == Progress(100, 0, START + 9 * HOUR, "waiting")
    await pacer.pause(world.app.app_id, msg_id)
    await world.pass_time(START + 10 * HOUR)
    assert (await pacer.resume(world.app.app_id, msg_id)).planned_end == START + 10 * HOUR
    await world.run()
    assert (await _progress(world, msg_id)).state == "done"


async def test_so_many_slow_pushes_at_once(tmp_path: Path) -> None:
    async with open_world(tmp_path, Limits(max_slow_pushes=2)) as world:
        await world.create_app()
        await _slow(world)
        second = await _slow(world)
        with pytest.raises(ApiError) as caught:
            await _slow(world)
        assert (caught.value.code, caught.value.http_status) == (1012, 400)
        await world.push()
        await world.broker.pacer.stop(world.app.app_id, second)
        await _slow(world)


async def test_a_deleted_apps_parts_stop(world: World) -> None:
    await _slow(world)
    await world.run()
    await world.rung()
    assert await world.broker.apps.delete(world.app.key)
    await world.pass_time(START + HOUR)
    assert _devnos(await world.rung()) == []
    assert world.broker.timekeeper.failed == 0


async def test_one_who_is_always_slower_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others change the record between each reading and writing."""
    msg_id, pacer, find = await _slow(world), world.broker.pacer, world.store.records.find

    async def find_and_change(app_id: int, kind: str, key: str) -> Any:
        record = await find(app_id, kind, key)
        if record is not None:
            world.now += 1
            await world.broker.timekeeper._put_off(record)
        return record

    monkeypatch.setattr(world.store.records, "find", find_and_change)
    for act in (pacer.pause, pacer.end):
        with pytest.raises(StoreError, match="changed by others"):
            await act(world.app.app_id, msg_id)


async def test_the_metrics_say_what_goes_on(world: World) -> None:
    metrics = Metrics()
    world.broker.count_in(metrics)
    done, stopped = await _slow(world), await _slow(world, minutes=120)
    unbegun = await _slow(world)
    await world.broker.pacer.pause(world.app.app_id, unbegun)
    await world.pass_time(START + HOUR)
    await world.broker.pacer.stop(world.app.app_id, stopped)
    await world.broker.pacer.stop(world.app.app_id, unbegun)
    assert (await _progress(world, done)).state == "done"
    lines = metrics.render()[0].decode().splitlines()
    shown = {line for line in lines if line.startswith(("holdfast_paced", "holdfast_due", "holdfast_sched"))}
    assert shown == {
        "holdfast_paced_begun_total 2.0",
        "holdfast_paced_ended_total 2.0",
        "holdfast_paced_expired_total 0.0",
        "holdfast_paced_parts_total 151.0",
        "holdfast_paced_devices_total 151.0",
        "holdfast_paced_postponed_total 0.0",
        "holdfast_due_failed_total 0.0",
        "holdfast_schedules_fired_total 0.0",
        "holdfast_schedules_missed_total 0.0",
        "holdfast_schedules_failed_total 0.0",
    }


# Over HTTP


async def test_the_calls(service: Any) -> None:
    await service.register("a")
    await service.register("b")
    answer = await service.call(
        "POST",
        "/v3/push",
        {
            "platform": "all",
            "audience": "all",
            "message": {"msg_content": "x"},
            "options": {"big_push_duration": 2},
        },
    )
    path = f"/v1/pushes/{answer.json['msg_id']}"
    paused = await service.call("POST", f"{path}/pause")
    assert (paused.status, paused.json["state"], paused.json["total"]) == (200, "paused", 2)
    assert (await service.call("POST", f"{path}/resume")).json["state"] == "sending"
    assert (await service.call("POST", f"{path}/stop")).json["state"] == "stopped"
    for verb in ("pause", "resume", "stop"):
        over = await service.call("POST", f"{path}/{verb}")
        assert (over.status, over.code) == (400, 1003)
        for unknown in ("17", "0x1", "9" * 19, "9" * 30):
            wrong = await service.call("POST", f"/v1/pushes/{unknown}/{verb}")
            assert (wrong.status, wrong.code) == (404, 1003), unknown
        stranger = await service.call("POST", f"{path}/{verb}", auth=(service.app.key, "wrong"))
        assert (stranger.status, stranger.code) == (401, 1004)
