"""New, online and active devices by hour, day and month."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, date, datetime
from typing import Any

import pytest

from broker.errors import ApiError
from broker.model import AppSettings, BehaviourEvent
from broker.telling.calendar import Calendar

HOUR = 3600
DAY = 24 * HOUR
NOON = datetime(2026, 3, 10, 12, tzinfo=UTC).timestamp()


@pytest.fixture
async def march(start: Any) -> Any:
    """A service at noon of 2026-03-10 (UTC)."""
    service = await start()
    service.now = NOON
    service.app = replace(service.app, created_at=NOON)
    return service


@pytest.fixture
def old(march: Any) -> Any:
    """Its app was made years before."""
    march.app = replace(march.app, created_at=NOON - 1000 * DAY)
    return march


async def _connect(service: Any, devno: int) -> int:
    claimed = asyncio.get_running_loop().create_future()
    service.store.claim_route(service.app.app_id, devno, "n1", claimed.set_result)
    return int((await claimed).epoch)


async def _visit(service: Any, devno: int) -> None:
    """Come and go."""
    epoch = await _connect(service, devno)
    service.store.release_route(service.app.app_id, devno, epoch, service.now)


async def _act(service: Any, devno: int) -> None:
    event = BehaviourEvent(service.app.app_id, devno, "bought", service.now, b"")
    await service.store.record_events([event])


async def _report(service: Any, unit: str, start: str, duration: str | None = None) -> list[dict[str, Any]]:
    report = await service.broker.users.report(service.app, unit, start, duration)
    assert report["time_unit"] == unit
    assert report["start"] == start
    assert report["duration"] == len(report["items"]) == int(duration or 1)
    return [
        {"time": item.pop("time")} | {name: counts for name, counts in item.items() if any(counts.values())}
        for item in report["items"]
    ]


def _counts(new: int = 0, online: int = 0, active: int = 0) -> dict[str, int]:
    return {"new": new, "online": online, "active": active}


async def test_by_hour_of_today(march: Any) -> None:
    await march.register("a", platform="android")
    await march.register("i", platform="ios")
    await _visit(march, 0)
    march.now += HOUR
    await _connect(march, 1)
    march.now += HOUR
    await _act(march, 1)
    assert await _report(march, "HOUR", "2026-03-10 11", "4") == [
        {"time": "2026-03-10 11"},
        {"time": "2026-03-10 12", "android": _counts(new=1, online=1), "ios": _counts(new=1)},
        {"time": "2026-03-10 13", "ios": _counts(online=1)},
        {"time": "2026-03-10 14", "ios": _counts(online=1, active=1)},
    ]


async def test_by_day_and_month_a_device_counts_once(march: Any) -> None:
    await march.register("a")
    for _ in range(3):
        await _visit(march, 0)
        await _act(march, 0)
        march.now += 2 * HOUR
    march.now += DAY
    await march.register("b")
    await _visit(march, 0)
    await _visit(march, 1)
    days = [
        {"time": "2026-03-10", "other": _counts(1, 1, 1)},
        {"time": "2026-03-11", "other": _counts(1, 2, 0)},
        {"time": "2026-03-12"},
    ]
    assert await _report(march, "DAY", "2026-03-10", "3") == days
    month = [{"time": "2026-03", "other": _counts(2, 2, 1)}]
    assert await _report(march, "MONTH", "2026-03") == month
    march.now += 10 * DAY
    while await march.store.expire(march.now):
        pass
    assert await _report(march, "DAY", "2026-03-10", "3") == days, "folding hours into days changed the days"
    assert await _report(march, "MONTH", "2026-03") == month


async def test_others_have_their_turn_between_the_days(march: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each day costs the intersections of all platforms."""
    turn = 0
    counted_in: list[int] = []

    def counted(*_: object) -> dict[str, int]:
        counted_in.append(turn)
        return {}

    async def others() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr("broker.telling.users._counted", counted)
    working = asyncio.create_task(others())
    await march.broker.users.report(march.app, "DAY", "2026-03-01", "28")
    working.cancel()
    assert len(set(counted_in)) == 28


async def test_months_across_a_year_and_a_leap_day(start: Any) -> None:
    service = await start()
    service.now = datetime(2028, 2, 29, 23, tzinfo=UTC).timestamp()
    await service.register("a")
    await _visit(service, 0)
    service.now += 2 * HOUR
    await _visit(service, 0)
    assert await _report(service, "MONTH", "2028-02", "2") == [
        {"time": "2028-02", "other": _counts(1, 1)},
        {"time": "2028-03", "other": _counts(0, 1)},
    ]


async def test_before_the_app_was_made_there_was_nobody(service: Any) -> None:
    await service.register("a")
    assert await _report(service, "DAY", "2016-04-10", "3") == [
        {"time": "2016-04-10"}, {"time": "2016-04-11"}, {"time": "2016-04-12"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("unit", "first", "duration", "message"),
    [
        (None, "2026-03-10", "1", "time_unit: must be one of HOUR, DAY, MONTH"),
        ("WEEK", "2026-03-10", "1", "time_unit: must be"),
        ("DAY", None, "1", "start: by DAY it is written as 2014-06-10"),
        ("DAY", "2026-3-10", "1", "start: by DAY it is written as"),
        ("DAY", "2026-02-30", "1", "start: by DAY it is written as"),
        ("DAY", "2026-03-10 12", "1", "start: by DAY it is written as"),
        ("HOUR", "2026-03-10", "1", "start: by HOUR it is written as 2014-06-10 12"),
        ("MONTH", "2026-03-10", "1", "start: by MONTH it is written as 2014-06"),
        ("DAY", "0001-01-01", "1", "start: by DAY it is written as"),
        ("DAY", "2026-03-10", "0", "duration: must be an integer from 1 to 60"),
        ("DAY", "2026-03-10", "61", "duration: must be an integer from 1 to 60"),
        ("HOUR", "2026-03-10 12", "73", "duration: must be an integer from 1 to 72"),
        ("MONTH", "2026-03", "3", "duration: must be an integer from 1 to 2"),
        ("DAY", "2026-03-10", "x", "duration: must be an integer"),
        ("DAY", "2026-01-07", "5", "start: the report by DAY goes back to 2026-01-08"),
        ("HOUR", "2026-03-07 23", "2", "start: the report by HOUR goes back to 2026-03-08 00"),
        ("MONTH", "2026-01", "2", "start: the report by MONTH goes back to 2026-02"),
    ],
)
async def test_what_cannot_be_told_is_refused(
    old: Any, unit: str | None, first: str | None, duration: str, message: str
) -> None:
    with pytest.raises(ApiError) as caught:
        await old.broker.users.report(old.app, unit, first, duration)
    assert caught.value.code == 3004
    assert message in caught.value.message


async def test_each_stretch_that_is_whole_is_answered(old: Any) -> None:
    for unit, first, duration in (
        ("DAY", "2026-01-08", "60"),
        ("HOUR", "2026-03-08 00", "72"),
        ("MONTH", "2026-02", "2"),
    ):
        assert len(await _report(old, unit, first, duration)) == int(duration)


async def test_an_app_may_ask_for_more_days_at_once(march: Any) -> None:
    app = await march.store.set_settings(march.app.key, AppSettings(limits={"max_user_days": 90}))
    report = await march.broker.users.report(app, "DAY", "2026-02-01", "90")
    assert len(report["items"]) == 90


async def test_the_endpoint_in_both_plans(march: Any) -> None:
    for path in ("/v3/users", "/v3/report/users"):
        answer = await march.call("GET", f"{path}?time_unit=day&start=2026-03-10&duration=1")
        assert answer.status == 200
        assert answer.json["items"][0]["android"] == _counts()
    refused = await march.call("GET", "/v3/users?time_unit=DAY")
    assert (refused.status, refused.code) == (400, 3004)


BERLIN = Calendar("Europe/Berlin")


@pytest.mark.parametrize(
    ("calendar", "local", "hours"),
    [
        (BERLIN, date(2026, 3, 29), 23),  # the clock is put forward
        (BERLIN, date(2026, 10, 25), 25),
        (BERLIN, date(2026, 7, 1), 24),
        (Calendar("Asia/Kolkata"), date(2026, 7, 1), 24),  # half an hour beside UTC
        (Calendar(), date(2028, 2, 29), 24),
    ],
)
def test_days_begin_at_midnight_and_hours_with_the_zones(calendar: Calendar, local: date, hours: int) -> None:
    day = calendar.midnight(local)
    assert calendar.day(day, 1) - day == hours * HOUR
    assert {calendar.day(day + n * HOUR + 5) for n in range(hours)} == {day}
    assert [calendar.hour(day + n * HOUR + 3599) for n in range(hours)] == [
        day + n * HOUR for n in range(hours)
    ]
    assert calendar.day(day - 1) < day


@pytest.mark.parametrize("name", ["Mars/Olympus", "", "../etc/passwd", "Europe/berlin\0"])
def test_a_zone_that_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="is no time zone, such as"):
        Calendar(name)
