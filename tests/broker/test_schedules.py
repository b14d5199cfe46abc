"""Scheduled pushes: the calls over HTTP, and what fires when, on a real store with the clock as an argument."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import jpush
import orjson
import pytest

from broker.errors import ApiError
from broker.later import schedule_firing, schedules
from broker.later.schedule_records import CID, KEPT_IDS, LIVE, OVER, Schedule
from broker.limits import Limits
from broker.model import AppSettings, QuietHours, Record
from broker.store import Conflict, StoreError, StoreUnavailable, UnknownMessage
from tests.broker.later import HELLO, START, World, open_world

HOUR = 3600.0
DAY = 86_400.0
# The world begins on Friday, 2027-01-15, at 08:00:00 UTC, which is 16:00:00 in Shanghai.
SOON = {"single": {"time": "2027-01-15 16:30:00"}}
DAILY = {
    "periodical": {
        "start": "2027-01-15 00:00:00",
        "end": "2027-02-15 00:00:00",
        "time": "17:00:00",
        "time_unit": "day",
        "frequency": 1,
    }
}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as world:
        await world.create_app()
        yield world


def _body(**changes: Any) -> dict[str, Any]:
    return {"name": "good morning", "enabled": True, "trigger": SOON, "push": HELLO} | changes


async def _create(world: World, **changes: Any) -> str:
    created = await world.broker.schedules.create(world.app, orjson.dumps(_body(**changes)))
    return created.schedule_id


async def _find(world: World, schedule_id: str) -> dict[str, Any]:
    return dict(await world.broker.schedules.find(world.app, schedule_id))


async def _log(world: World, schedule_id: str) -> list[Any]:
    """The time of each firing, or with the code of each refusal."""
    answer: Any = await world.broker.schedules.msg_ids(world.app, schedule_id)
    assert answer["msgids"] == [row["msg_id"] for row in answer["log"] if "msg_id" in row]
    assert answer["count"] == len(answer["msgids"])
    return [(row["at"], row["error"]["code"]) if "error" in row else row["at"] for row in answer["log"]]


async def _change(world: World, schedule_id: str, **changes: Any) -> dict[str, Any]:
    return dict(await world.broker.schedules.change(world.app, schedule_id, orjson.dumps(changes)))


async def _pushes(world: World) -> int:
    """Since the last time."""
    return len(await world.rung())


# What fires when


async def test_a_single_one_fires_once_at_its_time(world: World) -> None:
    schedule_id = await _create(world)
    await world.pass_time(START + HOUR / 2 - 1)
    assert await _pushes(world) == 0
    await world.pass_time(START + HOUR / 2)
    assert await _pushes(world) == 1
    assert await _log(world, schedule_id) == [START + HOUR / 2]
    (msg_id,) = (await world.broker.schedules.msg_ids(world.app, schedule_id))["msgids"]  # type: ignore[misc]
    assert await world.counts(int(msg_id)) == {"pending": 3}
    await world.pass_time(START + 10 * DAY)
    assert await _pushes(world) == 0


async def test_a_periodical_one_fires_again_and_again_to_its_end(world: World) -> None:
    schedule_id = await _create(world, trigger=DAILY)
    assert (await _find(world, schedule_id))["next"] == "2027-01-15 17:00:00"
    await world.pass_time(START + 2.5 * DAY)
    assert await _log(world, schedule_id) == [START + HOUR, START + DAY + HOUR, START + 2 * DAY + HOUR]
    found = await _find(world, schedule_id)
    assert (found["next"], found["fired"], found["missed"]) == ("2027-01-18 17:00:00", 3, 0)
    await world.pass_time(START + 40 * DAY)
    found = await _find(world, schedule_id)
    assert (found["next"], found["fired"], found["missed"]) == (None, 31, 0)
    assert world.broker.firing.counts.fired == 31


async def test_its_audience_is_resolved_when_it_fires(world: World) -> None:
    schedule_id = await _create(world)
    await world.register(2, first=3)
    await world.pass_time(START + HOUR)
    (msg_id,) = (await world.broker.schedules.msg_ids(world.app, schedule_id))["msgids"]  # type: ignore[misc]
    assert await world.counts(int(msg_id)) == {"pending": 5}


async def test_of_many_brokers_one_fires(world: World) -> None:
    world.add_broker()
    world.add_broker()
    ids = [await _create(world, trigger=DAILY) for _ in range(5)]
    await world.pass_time(START + 4 * DAY)
    assert await _pushes(world) == 20
    assert [len(await _log(world, one)) for one in ids] == [4] * 5
    assert sum(broker.firing.counts.fired for broker in world.brokers) == 20
    assert sum(broker.timekeeper.failed for broker in world.brokers) == 0


async def test_a_broker_that_dies_while_it_fires_leaves_one_push_or_none(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the append nothing has happened, and the next broker fires; after it everything has."""
    schedule_id = await _create(world)
    world.now = START + HOUR / 2
    for stored in (0, 1):
        append = world.store.append

        async def die(*args: Any, append: Any = append, stored: int = stored) -> None:
            if stored:
                await append(*args)
            raise asyncio.CancelledError

        with monkeypatch.context() as patch:
            patch.setattr(world.store, "append", die)
            with pytest.raises(asyncio.CancelledError):
                await world.run()
        await world.crash()
        assert len(await _log(world, schedule_id)) == stored
    await world.run()
    assert len(await _log(world, schedule_id)) == 1


async def test_a_store_that_is_away_when_it_is_due_is_no_refusal(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule_id = await _create(world)
    world.now = START + HOUR / 2

    async def fail(*_: object) -> None:
        raise StoreUnavailable("locked")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "append", fail)
        await world.run()
    assert await _log(world, schedule_id) == []
    await world.pass_time(START + HOUR)
    assert await _log(world, schedule_id) == [START + HOUR / 2 + 1]
    assert (await _find(world, schedule_id))["failed"] == 0


@pytest.mark.parametrize(("late", "fired", "missed"), [(3600, 1, 0), (3601, 0, 1)])
async def test_a_single_one_that_was_missed_fires_within_the_grace(
    world: World, late: int, fired: int, missed: int
) -> None:
    schedule_id = await _create(world)
    world.now = START + HOUR / 2 + late
    await world.run()
    found = await _find(world, schedule_id)
    assert (found["fired"], found["missed"], found["next"]) == (fired, missed, None)
    assert await _pushes(world) == fired
    counts = world.broker.firing.counts
    assert (counts.fired, counts.missed) == (fired, missed)


@pytest.mark.parametrize(("away", "fired", "missed"), [(4.0, 1, 3), (3.5, 0, 4)])
async def test_a_periodical_one_fires_once_for_all_that_were_missed_and_goes_on(
    world: World, away: float, fired: int, missed: int, caplog: pytest.LogCaptureFixture
) -> None:
    schedule_id = await _create(world, trigger=DAILY)
    world.now = START + away * DAY + (0.0 if away == 3.5 else -DAY + HOUR * 2)
    await world.run()
    found = await _find(world, schedule_id)
    assert (found["fired"], found["missed"]) == (fired, missed)
    assert "schedule missed" in caplog.text
    await world.pass_time(START + 5 * DAY)
    assert (await _find(world, schedule_id))["fired"] > fired


async def test_the_grace_is_a_setting(tmp_path: Path) -> None:
    async with open_world(tmp_path, Limits(schedule_grace=0)) as world:
        await world.create_app()
        on_time, late = await _create(world), await _create(world, trigger=DAILY)
        await world.pass_time(START + HOUR / 2)
        world.now = START + HOUR + 1
        await world.run()
        assert (await _find(world, on_time))["fired"] == 1
        assert (await _find(world, late))["missed"] == 1


async def test_what_is_refused_when_it_fires_is_noted_and_it_goes_on(world: World) -> None:
    schedule_id = await _create(world, trigger=DAILY, push=HELLO | {"audience": {"tag": ["later"]}})
    await world.pass_time(START + 2 * HOUR)
    assert await _log(world, schedule_id) == [(START + HOUR, 1011)]
    await world.broker.devices.register(world.app, registration_id="new", trusted=True, tags=["later"])
    await world.pass_time(START + DAY + HOUR)
    assert await _log(world, schedule_id) == [(START + HOUR, 1011), START + DAY + HOUR]
    found = await _find(world, schedule_id)
    assert (found["fired"], found["failed"]) == (1, 1)
    assert world.broker.firing.counts.failed == 1


async def test_a_push_whose_predecessor_is_gone_is_refused_and_not_tried_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*_: object) -> None:
        raise UnknownMessage("17")

    early = await _create(world, push=HELLO | {"options": {"override_msg_id": 17}})
    await world.pass_time(START + HOUR)
    late = await _create(world, trigger=DAILY)
    monkeypatch.setattr(world.store, "append", gone)  # it goes between the check and the append
    await world.pass_time(START + DAY + HOUR)
    assert await _log(world, early) == [(START + HOUR / 2, 1003)]
    assert await _log(world, late) == [(START + DAY + HOUR, 1003)]


async def test_the_apps_settings_of_that_moment_hold(world: World) -> None:
    """Restricted when it fires; allowed again the next day, but in quiet hours, so that it is held."""
    schedule_id = await _create(world, trigger=DAILY)
    await world.set_rules(restricted=True)
    await world.pass_time(START + 2 * HOUR)
    await world.set_rules(quiet_hours=QuietHours(start="00:00", end="23:00"))
    await world.pass_time(START + DAY + HOUR)
    assert await _log(world, schedule_id) == [(START + HOUR, 2003), START + DAY + HOUR]
    assert await _pushes(world) == 0
    await world.pass_time(START + DAY + 15 * HOUR)
    assert await _pushes(world) == 1


async def test_a_slow_push_may_be_scheduled(world: World) -> None:
    schedule_id = await _create(world, push=HELLO | {"options": {"big_push_duration": 60}})
    await world.pass_time(START + HOUR / 2)
    assert await _pushes(world) == 1
    await world.pass_time(START + 2 * HOUR)
    assert await _pushes(world) == 2
    assert len(await _log(world, schedule_id)) == 1


async def test_one_that_is_not_enabled_does_not_fire_and_is_over_at_its_end(world: World) -> None:
    single, daily = await _create(world), await _create(world, trigger=DAILY)
    for one in (single, daily):
        assert (await _change(world, one, enabled=False))["next"] is None
    await world.pass_time(START + 3 * DAY)
    assert await _pushes(world) == 0
    assert [(await _find(world, one))["missed"] for one in (single, daily)] == [0, 0]
    with pytest.raises(ApiError, match="is over"):
        await _change(world, single, enabled=True)
    assert (await _change(world, daily, enabled=True))["next"] == "2027-01-18 17:00:00"
    await world.pass_time(START + 3 * DAY + HOUR)
    assert await _pushes(world) == 1
    assert (await world.broker.schedules.page(world.app, None))["total_count"] == 1


async def test_one_that_is_over_is_kept_as_long_as_reports(world: World) -> None:
    schedule_id = await _create(world, cid="c")
    await world.pass_time(START + HOUR / 2)
    records = world.store.records
    assert await records.count(world.app.app_id, LIVE) == 0
    await world.pass_time(START + HOUR / 2 + world.limits.report_lifetime - 1)
    assert len(await _log(world, schedule_id)) == 1
    await world.pass_time(START + HOUR / 2 + world.limits.report_lifetime)
    with pytest.raises(ApiError) as caught:
        await _find(world, schedule_id)
    assert caught.value.code == 8104
    for kind in (LIVE, OVER, CID, f"schedule-ids {schedule_id}"):
        assert await records.count(world.app.app_id, kind) == 0


async def test_of_its_pushes_the_newest_are_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule_firing, "KEPT_IDS", 3)
    monkeypatch.setattr(schedule_firing, "KEPT_ERRORS", 2)
    schedule_id = await _create(world, trigger=DAILY)
    await world.pass_time(START + 5 * DAY)
    assert await _log(world, schedule_id) == [START + n * DAY + HOUR for n in (2, 3, 4)]
    await world.set_rules(restricted=True)
    await world.pass_time(START + 9 * DAY)
    assert await _log(world, schedule_id) == [
        *(START + n * DAY + HOUR for n in (2, 3, 4)),
        *((START + n * DAY + HOUR, 2003) for n in (7, 8)),
    ]
    assert KEPT_IDS <= 1000  # what `list` gives at once


async def test_zones(tmp_path: Path) -> None:
    async with open_world(tmp_path, Limits(schedule_zone="Europe/Berlin")) as world:
        await world.create_app()
        berlin = await _create(world, trigger={"single": {"time": "2027-01-15 09:30:00"}})
        tokyo = await _create(
            world, trigger={"single": {"time": "2027-01-15 17:15:00", "zone": "Asia/Tokyo"}}
        )
        found = await _find(world, berlin)
        assert found["trigger"] == {"single": {"time": "2027-01-15 09:30:00", "zone": "Europe/Berlin"}}
        assert found["next"] == "2027-01-15 09:30:00"
        assert (await _find(world, tokyo))["next"] == "2027-01-15 17:15:00"
        await world.pass_time(START + HOUR)
        assert await _log(world, berlin) == [START + 1800]
        assert await _log(world, tokyo) == [START + 900]


async def test_a_name_changes_nothing_else_and_a_trigger_counts_from_now(world: World) -> None:
    schedule_id = await _create(world, trigger=DAILY)
    await world.pass_time(START + 2 * HOUR)
    assert (await _change(world, schedule_id, name="x"))["next"] == "2027-01-16 17:00:00"
    evening = {"periodical": DAILY["periodical"] | {"time": "23:00:00"}}
    assert (await _change(world, schedule_id, trigger=evening))["next"] == "2027-01-15 23:00:00"
    found = await _change(world, schedule_id, push=HELLO | {"cid": "ignored", "audience": {"tag": ["t1"]}})
    assert (found["name"], found["fired"]) == ("x", 1)
    await world.pass_time(START + 8 * HOUR)
    msg_id = (await world.broker.schedules.msg_ids(world.app, schedule_id))["msgids"][-1]  # type: ignore[index]
    assert await world.counts(int(msg_id)) == {"pending": 1}


async def test_a_change_that_meets_a_firing_is_made_after_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule_id = await _create(world, trigger=DAILY)
    find, records = world.store.records.find, world.store.records
    fired = []

    async def find_then_fire(app_id: int, kind: str, key: str) -> Record | None:
        record = await find(app_id, kind, key)
        if record is not None and not fired:
            fired.append(record)
            world.now = START + HOUR
            await world.broker.firing.fire(record)
        return record

    monkeypatch.setattr(records, "find", find_then_fire)
    found = await _change(world, schedule_id, name="x")
    assert (found["name"], found["fired"], found["next"]) == ("x", 1, "2027-01-16 17:00:00")


async def test_one_who_is_always_slower_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule_id = await _create(world)

    async def conflict(_: object) -> None:
        raise Conflict

    monkeypatch.setattr(world.store.records, "save", conflict)
    with pytest.raises(StoreError, match="changed by others"):
        await _change(world, schedule_id, name="x")
    with pytest.raises(StoreError, match="changed by others"):
        await world.broker.schedules.delete(world.app, schedule_id)


async def test_two_calls_with_one_cid_make_one_schedule(world: World) -> None:
    body = orjson.dumps(_body(cid="c"))
    made = await asyncio.gather(*(world.broker.schedules.create(world.app, body) for _ in range(5)))
    assert len({one.schedule_id for one in made}) == 1
    assert (await world.broker.schedules.page(world.app, None))["total_count"] == 1
    await world.pass_time(START + HOUR)  # it fired: the answer is the same
    assert await world.broker.schedules.create(world.app, body) == made[0]
    world.now = START + world.limits.cid_lifetime + 1
    later = _body(cid="c", trigger={"single": {"time": "2027-01-20 00:00:00"}})
    assert await world.broker.schedules.create(world.app, orjson.dumps(later)) != made[0]


async def test_a_deleted_apps_schedules_do_not_fire(world: World) -> None:
    await _create(world)
    assert await world.broker.apps.delete(world.app.key)
    await world.pass_time(START + HOUR)
    assert await _pushes(world) == 0
    assert world.broker.timekeeper.failed == 0


async def test_a_new_schedule_wakes_the_timekeeper(world: World) -> None:
    woken: list[None] = []
    world.broker.schedules._wake = lambda: woken.append(None)
    schedule_id = await _create(world)
    await _change(world, schedule_id, name="x")
    assert len(woken) == 2


def test_what_was_checked_once_is_read_again_whatever_the_limits() -> None:
    schedule = Schedule("x", schedules._read_create(orjson.dumps(_body(trigger=DAILY))).trigger, b"")  # type: ignore[arg-type]
    assert schedule.times.next_after(START) is not None


# Over HTTP. The service's clock begins where the world's does.


async def test_the_life_of_a_schedule_in_both_address_plans(service: Any) -> None:
    await service.register("a")
    for plan in ("/v3/schedules", "/v3/push/schedules"):
        created = await service.call("POST", f"{plan}/", _body())
        assert created.status == 200
        schedule_id = created.json["schedule_id"]
        assert created.json == {"schedule_id": str(UUID(schedule_id)), "name": "good morning"}
        found = await service.call("GET", f"{plan}/{schedule_id}")
        assert found.json == {
            "schedule_id": schedule_id,
            "name": "good morning",
            "enabled": True,
            "trigger": {"single": {"time": "2027-01-15 16:30:00", "zone": "Asia/Shanghai"}},
            "push": HELLO,
            "next": "2027-01-15 16:30:00",
            "fired": 0,
            "missed": 0,
            "failed": 0,
        }
        changed = await service.call("PUT", f"{plan}/{schedule_id}", {"enabled": False, "name": "x"})
        assert (changed.status, changed.json["enabled"], changed.json["name"]) == (200, False, "x")
        assert (await service.call("GET", f"{plan}/?page=1")).json["schedules"] == [changed.json]
        ids = await service.call("GET", f"{plan}/{schedule_id}/msg_ids")
        assert ids.json == {"count": 0, "msgids": [], "log": []}
        deleted = await service.call("DELETE", f"{plan}/{schedule_id}")
        assert (deleted.status, deleted.body) == (200, b"")
        for method, path, body in (
            ("GET", schedule_id, None),
            ("GET", f"{schedule_id}/msg_ids", None),
            ("PUT", schedule_id, {"name": "x"}),
            ("DELETE", schedule_id, None),
            ("GET", "not-a-uuid", None),
            ("GET", "%ff%00", None),
        ):
            gone = await service.call(method, f"{plan}/{path}", body)
            assert (gone.status, gone.code) == (404, 8104)


async def test_the_list_has_fifty_a_page_in_the_order_of_creation(service: Any) -> None:
    empty = await service.call("GET", "/v3/schedules")
    assert empty.json == {"total_count": 0, "total_pages": 0, "page": 1, "schedules": []}
    for n in range(101):
        service.now += 0.001
        await service.broker.schedules.create(service.app, orjson.dumps(_body(name=f"s{n}")))
    pages = [(await service.call("GET", f"/v3/schedules?page={page}")).json for page in (1, 2, 3, 4)]
    assert [(page["total_count"], page["total_pages"], page["page"]) for page in pages] == [
        (101, 3, number) for number in (1, 2, 3, 4)
    ]
    names = [[row["name"] for row in page["schedules"]] for page in pages]
    assert names == [[f"s{n}" for n in range(50)], [f"s{n}" for n in range(50, 100)], ["s100"], []]
    for page in ("0", "-1", "x", "1.5", "9" * 30):
        wrong = await service.call("GET", f"/v3/schedules?page={page}")
        assert (wrong.status, wrong.code) == (400, 8100)
    assert (await service.call("GET", "/v3/schedules?page=")).json == pages[0]


PAST = {"single": {"time": "2027-01-15 16:00:00"}}
WRONG: list[tuple[object, str]] = [
    (b"{", "not valid JSON"),
    (b"[]", "expected"),
    ({"name": "x"}, "is required"),
    ({k: v for k, v in _body().items() if k != "name"}, "name is required"),
    ({k: v for k, v in _body().items() if k != "trigger"}, "trigger is required"),
    ({k: v for k, v in _body().items() if k != "push"}, "push is required"),
    (_body(name=""), "name: must be 1 to 255 bytes"),
    (_body(name="好" * 86), "name: must be 1 to 255 bytes"),
    (_body(name="a\nb"), "name: must be"),
    (_body(name=7), "name: expected"),
    (orjson.dumps(_body()).replace(b"good", b"\\ud800"), "not valid JSON"),
    (orjson.dumps(_body()).replace(b"good", b"\xff"), "not valid"),
    (orjson.dumps(_body()).replace(b'"hi"', b"[" * 2000 + b"]" * 2000), "nested too deeply"),
    (_body(enabled=False), "enabled: must be true"),
    (_body(enabled="true"), "enabled: expected"),
    (_body(trigger={}), "trigger: must have single or periodical"),
    (_body(trigger={"weekly": {}}), "trigger.weekly: this key is not supported"),
    (_body(trigger={"single": {"time": "2027-01-15 16:30:00", "tz": "x"}}), "trigger.single.tz"),
    (_body(trigger=PAST), "it would never fire"),
    (_body(trigger={"single": {"time": "2028-01-17 16:00:00"}}), "at most 366 days from now"),
    (
        _body(trigger={"periodical": DAILY["periodical"] | {"end": "2027-01-15 16:59:59"}}),
        "it would never fire",
    ),
    (_body(push="x"), "push: expected"),
    (_body(push={}), "push: platform is required"),
    (
        _body(push=HELLO | {"notification": {"alarm": 1}}),
        "push: notification.alarm: this key is not supported",
    ),
    (_body(push=HELLO | {"notification": {"alert": "x" * 5000}}), "push: notification"),
    (_body(push=HELLO | {"options": {"time_to_live": -1}}), "push: options.time_to_live"),
    (_body(push=HELLO | {"extra": "x" * (256 << 10)}), "push: at most 262144 bytes"),
    (_body(cid=""), "cid: must be"),
    (_body(cid="x" * 129), "cid: must be"),
]


@pytest.mark.parametrize(("body", "message"), WRONG)
async def test_what_is_wrong_is_8100(service: Any, body: object, message: str) -> None:
    answer = await service.call("POST", "/v3/schedules", body)
    assert (answer.status, answer.code) == (400, 8100)
    assert message in answer.message
    assert (await service.call("GET", "/v3/schedules")).json["total_count"] == 0


WRONG_CHANGES: list[tuple[object, str]] = [
    (b"x", "not valid JSON"),
    ({}, "name, enabled, trigger or push is required"),
    ({"name": None}, "name, enabled, trigger or push is required"),
    ({"name": ""}, "name: must be"),
    ({"trigger": DAILY}, "trigger: single and periodical cannot be changed into each other"),
    ({"trigger": PAST}, "it would never fire"),
    ({"trigger": {"end": "2027-02-15 00:00:00"}}, "trigger.end: this key is not supported"),
    ({"push": {"platform": ["android"]}}, "push: audience is required"),
    ({"enabled": 1}, "enabled: expected"),
]


@pytest.mark.parametrize(("body", "message"), WRONG_CHANGES)
async def test_a_wrong_change_is_8100_and_changes_nothing(service: Any, body: object, message: str) -> None:
    path = "/v3/schedules/" + (await service.call("POST", "/v3/schedules", _body())).json["schedule_id"]
    before = (await service.call("GET", path)).json
    answer = await service.call("PUT", path, body)
    assert (answer.status, answer.code) == (400, 8100)
    assert message in answer.message
    assert (await service.call("GET", path)).json == before


async def test_what_is_over_cannot_be_changed(service: Any) -> None:
    await service.register("a")
    path = "/v3/schedules/" + (await service.call("POST", "/v3/schedules", _body())).json["schedule_id"]
    service.now += HOUR
    await service.broker.timekeeper.run_due()
    assert (await service.call("GET", f"{path}/msg_ids")).json["count"] == 1
    assert (await service.call("GET", "/v3/schedules")).json["total_count"] == 0
    answer = await service.call("PUT", path, {"name": "x"})
    assert (answer.status, answer.code) == (400, 8100)
    assert (await service.call("DELETE", path)).status == 200
    assert (await service.call("GET", path)).code == 8104


async def test_the_limit_of_live_schedules_is_a_setting_of_server_and_app(start: Any) -> None:
    service = await start(limits=Limits(max_schedules=2))
    made = [await service.call("POST", "/v3/schedules", _body(cid=f"c{n}")) for n in range(3)]
    assert [answer.status for answer in made] == [200, 200, 400]
    assert (made[2].code, made[2].message) == (8100, "there are 2 live schedules, which is the app's limit")
    assert (await service.call("POST", "/v3/schedules", _body(cid="c0"))).json == made[0].json
    await service.call("DELETE", "/v3/schedules/" + made[0].json["schedule_id"])
    assert (await service.call("POST", "/v3/schedules", _body())).status == 200
    await service.store.set_settings(service.app.key, AppSettings(limits={"max_schedules": None}))
    service.apps.forget(service.app.app_id)
    assert (await service.call("POST", "/v3/schedules", _body())).status == 200


async def test_strangers_get_8101_and_other_methods_8100(service: Any) -> None:
    for auth in (None, (service.app.key, "wrong"), (service.app.key, service.app.device_key)):
        answer = await service.call("GET", "/v3/schedules", auth=auth)
        assert (answer.status, answer.code) == (401, 8101)
    other = await service.apps.create("other")
    path = "/v3/schedules/" + (await service.call("POST", "/v3/schedules", _body())).json["schedule_id"]
    answer = await service.call("GET", path, auth=(other.key, other.master_secret))
    assert (answer.status, answer.code) == (404, 8104)
    answer = await service.call("DELETE", "/v3/schedules")
    assert (answer.status, answer.code, answer.headers["Allow"]) == (405, 8100, "GET, POST")
    answer = await service.call("PUT", "/v3/push/schedules")
    assert (answer.status, answer.code) == (405, 8100)
    answer = await service.call("GET", "/v3/schedules/a/b/c")
    assert (answer.status, answer.code) == (404, 8100)


async def test_a_body_that_is_too_large_is_413(start: Any) -> None:
    service = await start(limits=Limits(max_body=2000))
    answer = await service.call("POST", "/v3/schedules", _body(extra="x" * 2000))
    assert (answer.status, answer.code) == (413, 8100)


async def test_trouble_is_8203_or_8200(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(service.broker.schedules, "page", fail)
        answer = await service.call("GET", "/v3/schedules")
        assert (answer.status, answer.code) == (500, 8200)
    await service.store.close()
    answer = await service.call("POST", "/v3/schedules", _body())
    assert (answer.status, answer.code) == (503, 8203)


async def test_the_jpush_package_works_unmodified(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    await service.register("a")
    zone = {"SCHEDULE": f"{service.base}/v3/push/schedules/", "PUSH": f"{service.base}/v3/"}
    monkeypatch.setitem(jpush.common.ZONES, "HERE", zone)
    client = jpush.JPush(service.app.key, service.app.master_secret, zone="HERE").create_schedule()
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(service.now + 8 * HOUR + 60))
    trigger = jpush.schedulepayload.trigger(at)
    payload = jpush.schedulepayload.schedulepayload("update a new name", True, trigger, HELLO)

    def use() -> None:
        schedule_id = client.post_schedule(payload).payload["schedule_id"]
        assert client.get_schedule_by_id(schedule_id).payload["push"] == HELLO
        assert client.get_schedule_list("1").payload["total_count"] == 1
        assert client.put_schedule({"name": "y"}, schedule_id).payload["name"] == "y"
        assert client.delete_schedule(schedule_id).payload == "success"

    await asyncio.to_thread(use)
