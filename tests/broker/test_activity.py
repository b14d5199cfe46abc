"""Who was there, in memory and in SQLite: against a plain model, and what it costs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from broker.model import Activity, App
from broker.sqlite import activity as tables
from broker.store import StoreUnavailable
from broker.store_sqlite import SqliteStore
from broker.telling import attendance
from broker.telling.attendance import GAP, LONGEST_DAY, Attendance, Bits
from broker.telling.calendar import HOUR, Calendar
from tests.broker.store_contract import Clock, claimed, expire_all
from tests.patience import PATIENCE

DAY = 24 * HOUR
START = 1_800_000_000
ONLINE, ACTIVE = Activity.ONLINE, Activity.ACTIVE
APP = 7


class World:
    """An Attendance with routes, a clock and a writer that takes what it is given when told to."""

    def __init__(self) -> None:
        self.now = float(START)
        self.routed: dict[int, BitMap] = {}
        self.written: list[tuple[list[Bits], asyncio.Future[None]]] = []
        self.attendance = Attendance(Calendar(), lambda: self.now, self.routes, self.write)

    def routes(self, app_id: int) -> BitMap:
        return self.routed.setdefault(app_id, BitMap())

    def write(self, rows: list[Bits]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.written.append((rows, future))
        return future

    def come(self, devno: int, app_id: int = APP) -> None:
        self.attendance.note(app_id, ONLINE, devno)
        self.routes(app_id).add(devno)

    def flushed(self) -> list[tuple[int, list[int]]]:
        """(hours since the start, devices)."""
        self.attendance.flush()
        rows = [row for rows, _ in self.written for row in rows]
        self.written.clear()
        return sorted(((start - START) // HOUR, list(bits)) for _, _, _, start, bits in rows)


async def test_a_device_that_comes_back_within_the_hour_costs_nothing_more() -> None:
    world = World()
    world.come(3)
    assert world.flushed() == [(0, [3])]
    for _ in range(5):
        world.come(3)
    assert world.flushed() == []
    world.come(4)
    assert world.flushed() == [(0, [4])]


async def test_those_who_stay_are_written_once_an_hour() -> None:
    world = World()
    for devno in range(1000):
        world.come(devno)
    world.flushed()
    for hour in range(1, 4):
        world.now += HOUR
        assert world.flushed() == [(hour, list(range(1000)))]
        assert world.flushed() == []


async def test_hours_that_went_by_unseen_count_for_who_was_connected_up_to_a_limit() -> None:
    world = World()
    world.come(1)
    world.now += 3 * HOUR
    assert world.flushed() == [(0, [1]), (1, [1]), (2, [1]), (3, [1])]
    world.now += GAP * 100
    assert len(world.flushed()) == GAP // HOUR + 1


async def test_what_could_not_be_written_is_tried_again_and_stays_visible(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    world.come(1)
    world.attendance.flush()
    ((_, future),) = world.written
    assert world.attendance.find(APP, ONLINE) == [(START, BitMap([1]))], "on its way"
    with caplog.at_level(logging.WARNING):
        future.set_exception(StoreUnavailable("gone"))
        await asyncio.sleep(0)
    assert "trying again: gone" in caplog.text
    assert world.attendance.find(APP, ONLINE) == [(START, BitMap([1]))]
    world.written.clear()
    assert world.flushed() == [(0, [1])]


async def test_what_fails_for_days_is_given_up() -> None:
    world = World()
    world.come(1)
    world.attendance.flush()
    world.routed.clear()
    world.now += GAP + HOUR
    world.come(2)
    world.written[0][1].set_exception(StoreUnavailable("gone"))
    await asyncio.sleep(0)
    assert [start for start, _ in world.attendance.find(APP, ONLINE)] == [START + GAP + HOUR]


async def test_an_app_that_sleeps_costs_nothing() -> None:
    world = World()
    for app_id in range(100):
        world.come(1, app_id)
        world.attendance.note(app_id, ACTIVE, 1)
    world.flushed()
    assert len(world.attendance._seen) == 200
    world.routed.clear()
    world.now += HOUR
    assert world.flushed() == []
    assert not world.attendance._seen


async def test_many_apps_enter_a_new_hour_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    for app_id in range(10):
        world.come(1, app_id)
    world.flushed()
    world.now += HOUR
    for _ in range(5):
        world.attendance.flush(2)
    assert sum(len(rows) for rows, _ in world.written) == 10
    world.written.clear()
    monkeypatch.setattr(attendance, "ROWS_PER_WRITE", 4)
    world.now += HOUR
    world.attendance.flush()
    assert [len(rows) for rows, _ in world.written] == [4, 4, 2]


async def test_it_is_written_while_the_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "ACTIVITY_DELAY", 0.001)
    store = SqliteStore(tmp_path / "db", clock=Clock())
    await store.open()
    app = await store.create_app("now")
    await claimed(store, app, 1)
    try:
        async with asyncio.timeout(PATIENCE):
            while not await _rows(store, app):
                pass
    finally:
        await store.close()


async def _rows(store: SqliteStore, app: App) -> list[BitMap]:
    found: list[BitMap] = await store._list("active", (app.app_id, "online", [(0.0, 4e9)]))
    return [bits for bits in found if bits]


# Against a model: sets of (hour or day, device)

DEVICES = (0, 1, 65_535, 65_536, 200_000)
_device = st.sampled_from(DEVICES)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("come"), _device),
        st.tuples(st.just("leave"), _device),
        st.tuples(st.just("act"), _device),
        st.tuples(st.just("pass"), st.sampled_from([1, 1_000, HOUR, 5 * HOUR, DAY, 40 * DAY])),
        st.tuples(st.sampled_from(["flush", "restart", "expire"]), st.just(0)),
    ),
    max_size=30,
)


class Model:
    """The same with a set for each hour."""

    def __init__(self, zone: str) -> None:
        self.calendar = Calendar(zone)
        self.now = float(START)
        self.hours: dict[tuple[Activity, int], set[int]] = {}
        self.folded: set[int] = set()  # days
        self.routed: set[int] = set()

    def note(self, activity: Activity, device: int) -> None:
        self.hours.setdefault((activity, self.calendar.hour(self.now)), set()).add(device)

    def go(self, seconds: int) -> None:
        """A restart or a release may come later, but who has a route now has it in each hour that begins."""
        end = self.now + seconds
        hour = self.calendar.hour(self.now) + HOUR
        while hour <= end and self.routed:
            if hour > end - GAP - HOUR:
                self.hours.setdefault((ONLINE, hour), set()).update(self.routed)
            hour += HOUR
        self.now = end

    def fold(self) -> None:
        before = self.calendar.day(self.now, -2)
        self.folded |= {day for _, hour in self.hours if (day := self.calendar.day(hour)) < before}
        over = self.now - 61 * DAY
        self.hours = {
            (activity, hour): devices
            for (activity, hour), devices in self.hours.items()
            if self._end(hour) >= over
        }

    def _end(self, hour: int) -> int:
        day = self.calendar.day(hour)
        return day + LONGEST_DAY if day in self.folded else hour + HOUR

    def in_hour(self, activity: Activity, hour: int) -> set[int]:
        """What a store may know of it."""
        day = self.calendar.day(hour)
        if day not in self.folded:
            return self.hours.get((activity, hour), set())
        return self.in_day(activity, day)

    def in_day(self, activity: Activity, day: int) -> set[int]:
        return set().union(
            *(
                found
                for (kind, hour), found in self.hours.items()
                if kind == activity and self.calendar.day(hour) == day
            )
        )


@settings(deadline=None, max_examples=40)
@given(_steps, st.sampled_from(["UTC", "Asia/Kolkata", "Europe/Berlin"]))
@example(
    [("come", 0), ("pass", 5 * HOUR), ("leave", 0), ("pass", 5 * DAY), ("expire", 0), ("restart", 0)], "UTC"
)
def test_the_store_knows_what_the_model_knows(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], zone: str
) -> None:
    asyncio.run(_compare(tmp_path_factory.mktemp("activity"), steps, zone))


async def _compare(folder: Path, steps: list[tuple[str, int]], zone: str) -> None:
    model = Model(zone)
    epochs: dict[int, int] = {}

    async def opened() -> SqliteStore:
        store = SqliteStore(folder / "db", clock=lambda: model.now, time_zone=zone)
        await store.open()
        return store

    store = await opened()
    app = await store.create_app("model")
    await expire_all(store, model.now - HOUR)  # so that a pass is due again
    for step, number in steps:
        match step:
            case "come":
                epochs[number] = (await claimed(store, app, number)).epoch
                model.routed.add(number)
                model.note(ONLINE, number)
            case "leave":
                if number in epochs:
                    store.release_route(app.app_id, number, epochs.pop(number), model.now)
                    model.routed.discard(number)
            case "act":
                store._attendance.note(app.app_id, ACTIVE, number)
                model.note(ACTIVE, number)
            case "pass":
                model.go(number)
                store._attendance.flush()  # the timer's part: it looks at least once in each GAP
            case "flush":
                store._attendance.flush()
            case "restart":
                await store.close()
                store = await opened()
                epochs.clear()
                model.routed.clear()
            case "expire":
                await store.close()
                store = await opened()  # nothing is left in memory, and a pass is due
                epochs.clear()
                model.routed.clear()
                await expire_all(store, model.now)
                model.fold()
    await _agree(store, app, model)
    await store.close()


async def _agree(store: SqliteStore, app: App, model: Model) -> None:
    for activity in Activity:
        hours = sorted({hour for _, hour in model.hours})
        found = [await store.active(app.app_id, activity, hour, hour + 1) for hour in hours]
        assert [set(bits) for bits in found] == [model.in_hour(activity, hour) for hour in hours]
        days = sorted({model.calendar.day(hour) for hour in hours})
        counts = await store.active_counts(
            app.app_id, activity, [(day, model.calendar.day(day, 1)) for day in days] or [(0, 1)]
        )
        assert counts == ([len(model.in_day(activity, day)) for day in days] or [0])


async def test_a_full_pass_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLICE_APPS", 2), ("PASS_APPS", 4), ("SLICE_ROWS", 3)):
        monkeypatch.setattr(tables, name, value)
    clock = Clock()
    store = SqliteStore(tmp_path / "db", clock=clock)
    await store.open()
    apps = [await store.create_app(str(n)) for n in range(11)]
    for app in apps[::3]:
        for _ in range(4):
            claim = await claimed(store, app, 1)
            store.release_route(app.app_id, 1, claim.epoch, clock.now)
            clock.now += HOUR
    clock.now += 3 * DAY
    await store.close()
    store = SqliteStore(tmp_path / "db", clock=clock)
    await store.open()
    await expire_all(store, clock.now)
    rows: Callable[..., Any] = store._connections[0].execute
    assert rows("SELECT width, count(*) FROM activity GROUP BY width").fetchall() == [(DAY, 4)]
    await store.close()


async def test_a_zone_that_is_none_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no time zone"):
        SqliteStore(tmp_path / "db", time_zone="Nowhere")
