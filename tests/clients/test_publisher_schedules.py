"""Schedules through the publisher SDK."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from clients.publisher import Notification, Periodical, Publisher, PushError, PushRequest, Single

PUSH = PushRequest("all", Notification("Hello"))
BERLIN = ZoneInfo("Europe/Berlin")
SOON = datetime.now(BERLIN).replace(microsecond=0) + timedelta(days=2)
START, END = SOON, SOON + timedelta(days=90)
NOON = time(12, 30)


def wall(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def test_triggers_are_the_apis_words() -> None:
    moment = datetime(2027, 3, 4, 5, 6, 7, tzinfo=BERLIN)
    assert Single.at(moment) == Single("2027-03-04 05:06:07", "Europe/Berlin")
    assert Single.at(moment.astimezone(UTC)) == Single("2027-03-04 04:06:07", "UTC")
    assert Single.at(moment.replace(tzinfo=None)) == Single("2027-03-04 05:06:07")
    with pytest.raises(ValueError, match="is an offset"):
        Single.at(moment.astimezone(timezone(timedelta(hours=1))))
    common = (wall(START), wall(END), "12:30:00")
    assert Periodical.daily(START, END, NOON, every=3) == Periodical(*common, "day", 3, None, "Europe/Berlin")
    assert Periodical.weekly(START, END, NOON, ["MON"]).point == ["MON"]
    assert Periodical.monthly(START, END, NOON, [1, 15]).point == ["01", "15"]


WHEN: dict[str, Single | Periodical] = {
    "once": Single.at(SOON),
    "daily": Periodical.daily(START, END, NOON),
    "weekly": Periodical.weekly(START, END, NOON, ["MON", "FRI"], every=2),
    "monthly": Periodical.monthly(START, END, NOON, [1, 31]),
}


@pytest.mark.parametrize("often", WHEN)
async def test_schedules_come_back_as_they_were_made(publisher: Publisher, often: str) -> None:
    when = WHEN[often]
    schedule_id = await publisher.schedules.create("mine", when, PUSH)
    found = await publisher.schedules.get(schedule_id)
    assert (found.name, found.enabled, found.fired) == ("mine", True, 0)
    assert (found.trigger.single or found.trigger.periodical) == when
    assert found.push["notification"] == {"alert": "Hello"}
    assert found.next is not None
    assert await publisher.schedules.log(schedule_id) == []


async def test_a_cid_makes_one_schedule(publisher: Publisher) -> None:
    made = [await publisher.schedules.create("mine", WHEN["once"], PUSH, cid="c") for _ in range(2)]
    assert made[0] == made[1]
    assert len([one async for one in publisher.schedules.all()]) == 1


async def test_schedules_are_changed_and_deleted(publisher: Publisher) -> None:
    schedule_id = await publisher.schedules.create("mine", WHEN["once"], PUSH)
    later = Single.at(SOON + timedelta(days=1))
    await publisher.schedules.change(schedule_id, name="other", enabled=False, when=later)
    found = await publisher.schedules.get(schedule_id)
    assert (found.name, found.enabled, found.trigger.single) == ("other", False, later)
    await publisher.schedules.change(schedule_id, enabled=True, push={**_body("new")})
    assert (await publisher.schedules.get(schedule_id)).push["notification"] == {"alert": "new"}
    with pytest.raises(PushError) as caught:
        await publisher.schedules.change(schedule_id, when=WHEN["weekly"])
    assert caught.value.code == 8100
    await publisher.schedules.delete(schedule_id)
    with pytest.raises(PushError) as caught:
        await publisher.schedules.get(schedule_id)
    assert (caught.value.code, caught.value.http_status) == (8104, 404)


def _body(alert: str) -> dict[str, Any]:
    return {"platform": "all", "audience": "all", "notification": {"alert": alert}}


async def test_all_pages_are_read(publisher: Publisher) -> None:
    made = [await publisher.schedules.create(f"n{n}", WHEN["once"], PUSH) for n in range(51)]
    assert [one.schedule_id async for one in publisher.schedules.all()] == made


async def test_what_a_schedule_made(publisher: Publisher, until: Any, phone: Any) -> None:
    """In some seconds, by the server's clock, which is ours."""
    async with phone("a") as (_, pushes):
        schedule_id = await _create_soon(publisher)
        push = await pushes.get()
    [firing] = await publisher.schedules.log(schedule_id)
    assert (firing.msg_id, firing.error) == (push.msg_id, None)
    found = await publisher.schedules.get(schedule_id)
    assert (found.fired, found.next) == (1, None)


async def _create_soon(publisher: Publisher) -> str:
    """Once the time is not over before the server reads it, as it may be on a slow machine."""
    for seconds in (2, 8, 32):
        when = Single.at(datetime.now(UTC) + timedelta(seconds=seconds))
        try:
            return await publisher.schedules.create("soon", when, PUSH)
        except PushError as error:
            late = error
    raise late


async def test_what_a_schedule_was_refused(publisher: Publisher) -> None:
    await publisher.register_device("a")
    with pytest.raises(PushError) as caught:
        await publisher.schedules.create("mine", WHEN["once"], {"platform": "all", "audience": "all"})
    assert caught.value.http_status == 400
    with pytest.raises(PushError) as caught:
        await publisher.schedules.create("mine", Single("some day"), PUSH)
    assert caught.value.code == 8100
