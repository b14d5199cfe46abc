from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker.later import timekeeper
from broker.later.timekeeper import AT_ONCE, FAILING, LOOK_EVERY, PUT_OFF, STORE_PAUSE, Timekeeper
from broker.model import Record, RecordChange
from broker.store import Conflict, StoreError, StoreUnavailable
from tests.broker.later import START, World, open_world
from tests.patience import PATIENCE


class Alarms:
    """Handles records of kind "alarm": notes them, then removes them or rings again `every` seconds later."""

    def __init__(self, world: World, every: float | None = None) -> None:
        self.world = world
        self.every = every
        self.rung: list[str] = []
        self.heard = asyncio.Event()
        self.keeper = Timekeeper(world.store.records, lambda: world.now)
        self.keeper.register({"alarm": self.ring})

    async def ring(self, record: Record) -> None:
        value = None if self.every is None else record.value
        due = None if self.every is None else self.world.now + self.every
        change = RecordChange(record.app_id, record.kind, record.key, value, record.version, due)
        await self.world.store.records.save([change])
        self.rung.append(record.key)
        self.heard.set()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as world:
        await world.create_app(0)
        yield world


async def _set(world: World, key: str, due: float | None, kind: str = "alarm") -> None:
    await world.store.records.save([RecordChange(world.app.app_id, kind, key, b"", 0, due)])


async def _find(world: World, key: str) -> Record | None:
    return await world.store.records.find(world.app.app_id, "alarm", key)


async def test_what_is_due_is_handled_oldest_first_and_the_rest_waits(world: World) -> None:
    alarms = Alarms(world)
    for key, due in (("late", START), ("later", START + 1), ("early", START - 9), ("never", None)):
        await _set(world, key, due)
    await _set(world, "other", START, kind="other")
    assert await alarms.keeper.run_due() == START + 1
    assert alarms.rung == ["early", "late"]
    world.now += 1
    assert await alarms.keeper.run_due() == world.now + LOOK_EVERY
    assert alarms.rung == ["early", "late", "later"]


async def test_a_time_far_away_is_not_waited_for_in_one_piece(world: World) -> None:
    await _set(world, "a", START + 1000)
    assert await Alarms(world).keeper.run_due() == START + LOOK_EVERY


async def test_a_crowd_that_is_due_is_handled_in_one_round(world: World) -> None:
    alarms = Alarms(world)
    for n in range(2 * AT_ONCE + 1):
        await _set(world, str(n), START)
    await alarms.keeper.run_due()
    assert len(set(alarms.rung)) == len(alarms.rung) == 2 * AT_ONCE + 1


@pytest.mark.parametrize("crowded", ["alarm", "part"])
async def test_a_crowd_of_one_kind_does_not_hold_up_another(world: World, crowded: str) -> None:
    """Also where the crowd was due before the other, as schedules are before the next part of a slow push."""
    alarms, order, again = Alarms(world), [], 3

    async def handle(record: Record) -> None:
        nonlocal again
        order.append(record.kind)
        await alarms.ring(record)
        if record.kind != crowded and (again := again - 1):
            await _set(world, str(again), START, record.kind)

    alarms.keeper.register({"alarm": handle, "part": handle})
    other = {"alarm": "part", "part": "alarm"}[crowded]
    for n in range(4 * AT_ONCE):
        await _set(world, str(n), START - 100, crowded)
    await _set(world, "a", START, other)
    await alarms.keeper.run_due()
    assert sorted(order) == sorted([crowded] * 4 * AT_ONCE + [other] * 3)
    assert [n // AT_ONCE for n, kind in enumerate(order) if kind == other] == [0, 1, 2]  # each in its round


async def test_a_record_may_come_again(world: World) -> None:
    alarms = Alarms(world, every=3.0)
    await _set(world, "a", START)
    for _ in range(3):
        assert await alarms.keeper.run_due() == world.now + 3
        world.now += 3
    assert alarms.rung == ["a", "a", "a"]


async def test_of_two_brokers_one_handles_a_record(world: World) -> None:
    here, there = Alarms(world), Alarms(world)
    for n in range(50):
        await _set(world, str(n), START)
    await asyncio.gather(here.keeper.run_due(), there.keeper.run_due())
    assert sorted(here.rung + there.rung, key=int) == [str(n) for n in range(50)]
    assert here.keeper.failed == there.keeper.failed == 0


async def test_one_that_fails_is_put_off_ever_longer_and_does_not_stop_others(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    alarms = Alarms(world)
    tries: list[float] = []

    async def fail(record: Record) -> None:
        tries.append(world.now)
        raise ValueError("a bug")

    alarms.keeper.register({"bad": fail})
    await _set(world, "bad", START, kind="bad")
    await _set(world, "good", START)
    while len(tries) < 12:
        world.now = await alarms.keeper.run_due()
    assert alarms.rung == ["good"]
    pauses = [late - early for early, late in itertools.pairwise(tries)]
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, PUT_OFF[1], PUT_OFF[1]]
    assert alarms.keeper.failed == 12
    assert "bad bad of app" in caplog.text
    assert "ValueError: a bug" in caplog.text


async def test_one_that_works_again_is_not_held_against_it(world: World) -> None:
    alarms, broken = Alarms(world, every=100.0), [True, True, False, True]
    ring = alarms.ring

    async def sometimes(record: Record) -> None:
        if broken.pop(0):
            raise ValueError
        await ring(record)

    alarms.keeper.register({"alarm": sometimes})
    await _set(world, "a", START)
    dues = []
    while broken:
        await alarms.keeper.run_due()
        record = await _find(world, "a")
        assert record is not None
        assert record.due is not None
        dues.append(record.due - world.now)
        world.now = record.due
    assert dues == [1, 2, 100, 1]


@pytest.mark.parametrize("mistake", ["does nothing", "changes something else", "meets another record"])
async def test_a_handler_that_leaves_its_record_due_does_not_spin(
    world: World, mistake: str, caplog: pytest.LogCaptureFixture
) -> None:
    alarms, calls = Alarms(world), []

    async def forget(record: Record) -> None:
        calls.append(record)
        if mistake == "meets another record":
            raise Conflict("about another record")
        if mistake == "changes something else":
            change = RecordChange(record.app_id, record.kind, record.key, b"x", record.version, record.due)
            await world.store.records.save([change])

    alarms.keeper.register({"alarm": forget})
    await _set(world, "a", START)
    assert await alarms.keeper.run_due() == START + PUT_OFF[0]
    assert len(calls) == 1
    assert "its handler left it due" in caplog.text


async def test_one_that_was_changed_while_it_was_handled_is_handled_again_at_once(world: World) -> None:
    alarms, changed = Alarms(world), []

    async def overtaken(record: Record) -> None:
        if not changed:
            change = RecordChange(record.app_id, record.kind, record.key, b"x", record.version, record.due)
            changed.append(await world.store.records.save([change]))
        await alarms.ring(record)

    alarms.keeper.register({"alarm": overtaken})
    await _set(world, "a", START)
    await alarms.keeper.run_due()
    assert (alarms.rung, alarms.keeper.failed) == (["a"], 0)


async def test_a_store_that_is_away_is_asked_again_later(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alarms = Alarms(world)
    await _set(world, "a", START)

    async def fail(*_: object) -> None:
        raise StoreUnavailable("disk on fire")

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(world.store.records, "due", fail)
        assert await alarms.keeper.run_due() == START + STORE_PAUSE
        assert "disk on fire" in caplog.text
    with (
        monkeypatch.context() as patch
    ):  # it is there, but nothing can be written: neither handled nor put off
        patch.setattr(world.store.records, "save", fail)
        assert await alarms.keeper.run_due() == START + STORE_PAUSE
    assert alarms.rung == []
    await alarms.keeper.run_due()
    assert alarms.rung == ["a"]
    assert "Traceback" not in caplog.text


async def test_a_store_error_of_a_handler_is_no_bug(world: World, caplog: pytest.LogCaptureFixture) -> None:
    alarms = Alarms(world)

    async def fail(record: Record) -> None:
        raise StoreError("no room")

    alarms.keeper.register({"alarm": fail})
    await _set(world, "a", START)
    assert await alarms.keeper.run_due() == START + PUT_OFF[0]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_failures_are_counted_for_a_bounded_number_of_records(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timekeeper, "FAILING", 3)
    alarms = Alarms(world)

    async def fail(record: Record) -> None:
        raise StoreError("no")

    alarms.keeper.register({"alarm": fail})
    for n in range(5):
        await _set(world, str(n), START)
    await alarms.keeper.run_due()
    assert len(alarms.keeper._failures) == 3 < FAILING


async def test_the_task_is_woken_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timekeeper, "LOOK_EVERY", 3600.0)
    alarms = Alarms(world)
    alarms.keeper.open()
    await alarms.keeper.run_due()
    await _set(world, "a", START)
    alarms.keeper.wake()
    await asyncio.wait_for(alarms.heard.wait(), PATIENCE)
    await alarms.keeper.close()
    assert alarms.rung == ["a"]


async def test_the_task_survives_whatever_happens(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alarms, due, failed = Alarms(world), world.store.records.due, asyncio.Event()

    async def fail(*_: object) -> None:
        monkeypatch.setattr(world.store.records, "due", due)
        failed.set()
        raise RuntimeError("a bug")

    await _set(world, "a", START)
    monkeypatch.setattr(world.store.records, "due", fail)
    alarms.keeper.open()
    await asyncio.wait_for(failed.wait(), PATIENCE)
    alarms.keeper.wake()
    await asyncio.wait_for(alarms.heard.wait(), PATIENCE)
    await alarms.keeper.close()
    assert "RuntimeError: a bug" in caplog.text


async def test_the_task_waits_until_the_next_is_due_and_is_ended_by_close(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timekeeper, "LOOK_EVERY", 3600.0)
    loop = asyncio.get_running_loop()
    alarms = Alarms(world)
    alarms.keeper = Timekeeper(world.store.records, lambda: START + loop.time() - began)
    alarms.keeper.register({"alarm": alarms.ring})
    began = loop.time()
    await _set(world, "a", START + 0.05)
    alarms.keeper.open()
    await asyncio.wait_for(alarms.heard.wait(), PATIENCE)
    assert loop.time() - began >= 0.05
    await alarms.keeper.close()
    await alarms.keeper.close()


@pytest.mark.parametrize("turns", range(5))
async def test_close_ends_the_task_even_if_it_is_just_being_woken(world: World, turns: int) -> None:
    """asyncio.wait_for of Python 3.11 may swallow a cancellation at that moment."""
    alarms = Alarms(world)
    alarms.keeper.open()
    while not alarms.keeper._woken._waiters:
        await world.store.records.count(world.app.app_id, "alarm")  # the task's first round goes the same way
    alarms.keeper.wake()
    for _ in range(turns):
        await asyncio.sleep(0)
    await asyncio.wait_for(alarms.keeper.close(), PATIENCE)


async def test_one_that_was_never_opened_can_be_closed(world: World) -> None:
    await Alarms(world).keeper.close()
