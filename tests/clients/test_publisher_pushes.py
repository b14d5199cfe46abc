"""The life of a push through the publisher SDK: options, withdrawal, slow pushes, groups, reports."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import orjson
import pytest

from clients.local_server import AppKeys, LocalServer
from clients.publisher import (
    Accepted,
    Audience,
    CallbackTo,
    FileAudience,
    GroupPublisher,
    NewDevice,
    Notification,
    Options,
    Publisher,
    PushError,
    PushRequest,
)
from tests.patience import PATIENCE

HELLO = Notification("Hello")


def test_what_is_new_in_a_request_is_the_apis_json() -> None:
    request = PushRequest(
        Audience(segment=["s1"], file=FileAudience("f1")),
        HELLO,
        options=Options(override_msg_id=5, big_push_duration=10, collapse_key="k", priority="high"),
        callback=CallbackTo("https://example.com", ["clicked"], {"a": 1}),
    )
    assert orjson.loads(msgspec.json.encode(request)) == {
        "platform": "all",
        "audience": {"segment": ["s1"], "file": {"file_id": "f1"}},
        "notification": {"alert": "Hello"},
        "options": {"override_msg_id": 5, "big_push_duration": 10, "collapse_key": "k", "priority": "high"},
        "callback": {"url": "https://example.com", "events": ["clicked"], "params": {"a": 1}},
    }


async def three_devices(publisher: Publisher) -> None:
    await publisher.import_devices([NewDevice(name, platform="android", tags=["all"]) for name in "abc"])


async def push_all(publisher: Publisher, options: Options | None = None) -> int:
    return (await publisher.push(PushRequest("all", HELLO, options=options))).msg_id


async def test_withdrawn_pushes_no_longer_wait(publisher: Publisher) -> None:
    await three_devices(publisher)
    msg_id = await push_all(publisher)
    await publisher.withdraw(msg_id)
    await publisher.withdraw(msg_id)
    report = await publisher.reports.push(msg_id)
    assert (report.recalled, report.pending, report.state, report.adds_up) == (3, 0, "withdrawn", True)
    with pytest.raises(PushError) as caught:
        await publisher.withdraw(1)
    assert caught.value.http_status == 404


async def test_override_and_collapse(publisher: Publisher) -> None:
    await three_devices(publisher)
    first = await push_all(publisher)
    second = await push_all(publisher, Options(override_msg_id=first))
    assert (await publisher.reports.push(first)).recalled == 3
    third = await push_all(publisher, Options(collapse_key="k"))
    await push_all(publisher, Options(collapse_key="k"))
    assert [row.recalled for row in await publisher.received_detail([second, third])] == [0, 3]
    with pytest.raises(PushError) as caught:
        await push_all(publisher, Options(override_msg_id=7))
    assert caught.value.code == 1003


async def test_a_slow_push_is_paused_resumed_and_stopped(publisher: Publisher) -> None:
    await three_devices(publisher)
    msg_id = await push_all(publisher, Options(big_push_duration=10))
    paused = await publisher.pause(msg_id)
    assert (paused.state, paused.total, paused.over) == ("paused", 3, False)
    assert (await publisher.reports.push(msg_id)).state == "paused"
    resumed = await publisher.resume(msg_id)
    assert resumed.planned_end is not None
    stopped = await publisher.stop(msg_id)
    assert (stopped.state, stopped.over) == ("stopped", True)
    report = await publisher.reports.push(msg_id)
    assert (report.recalled, report.target) == (3, 3)
    with pytest.raises(PushError):
        await publisher.pause(msg_id)


async def test_estimates(publisher: Publisher, phone: Any) -> None:
    await three_devices(publisher)
    async with phone("d"):
        found = await publisher.estimate("all")
        assert (found.registered, found.online) == (4, 1)
        assert (await publisher.estimate(Audience(tag=["all"]), ["android"])).registered == 3
        assert (await publisher.estimate(Audience(tag=["none"]))).registered == 0


async def test_the_account_of_one_push(publisher: Publisher, phone: Any, until: Any) -> None:
    await three_devices(publisher)
    async with phone("d") as (device, pushes):
        msg_id = (await publisher.push(PushRequest("all", HELLO, options=Options(sendno=9)))).msg_id
        push = await asyncio.wait_for(pushes.get(), PATIENCE)
        await device.receipt(push, "clicked")
        report = await until(msg_id, lambda report: report.delivered and report.clicked)
    assert (report.target, report.online, report.sent, report.pending) == (4, 1, 1, 3)
    assert (report.sendno, report.state, report.progress, report.adds_up) == ("9", "sending", None, True)

    curve = await publisher.reports.curve(msg_id)
    assert [(hour.hour, hour.sent, hour.delivered, hour.clicked) for hour in curve.hours] == [(0, 1, 1, 1)]
    trace = await publisher.reports.trace(msg_id, "d")
    assert (trace.status, trace.registration_id) == ("delivered", "d")
    assert [step.step for step in trace.steps] == ["accepted", "matched", "sent", "acknowledged", "clicked"]
    assert trace.steps[3].node
    assert [step.step for step in (await publisher.reports.trace(msg_id, "a")).steps] == [
        "accepted",
        "matched",
    ]

    [message, unknown] = await publisher.reports.messages([msg_id, 1])
    assert message.android is not None
    assert (message.android.target, message.android.received, message.android.click) == (4, 1, 1)
    assert unknown.android is None


async def test_unknown_pushes_and_devices_are_404(publisher: Publisher) -> None:
    await three_devices(publisher)
    msg_id = await push_all(publisher)
    for call in (
        publisher.reports.push(1),
        publisher.reports.curve(1),
        publisher.reports.trace(1, "a"),
        publisher.reports.trace(msg_id, "nobody"),
    ):
        with pytest.raises(PushError) as caught:
            await call
        assert caught.value.http_status == 404


async def test_users_of_today(publisher: Publisher, phone: Any) -> None:
    await three_devices(publisher)
    [entry] = (await publisher.reports.users("MONTH", await _this_month(publisher))).items
    assert (entry.android.new, entry.total().new, entry.ios.new) == (3, 3, 0)
    with pytest.raises(PushError) as caught:
        await publisher.reports.users("DAY", "yesterday")
    assert caught.value.code == 3004


async def _this_month(publisher: Publisher) -> str:
    """In the server's time zone, whatever that is."""
    now = datetime.now(UTC)
    for day in (now + timedelta(days=1), now, now - timedelta(days=1)):
        month = day.strftime("%Y-%m")
        try:
            found = await publisher.reports.users("MONTH", month)
        except PushError:
            continue
        if found.items[0].total().new:
            return month
    pytest.fail("no month has the new devices")


async def test_devices_are_imported_and_changed(publisher: Publisher) -> None:
    registered = await publisher.import_devices(
        [NewDevice(f"i{n}", attributes={"level": n, "vip": True}) for n in range(1001)]
    )
    assert [one.registration_id for one in registered] == [f"i{n}" for n in range(1001)]
    assert (await publisher.device("i7")).attributes == {"level": 7, "vip": True}
    await publisher.update_device("i7", attributes={"vip": None, "city": "Ulm"})
    assert (await publisher.device("i7")).attributes == {"level": 7, "city": "Ulm"}
    with pytest.raises(PushError) as caught:
        await publisher.import_devices([NewDevice("fine"), NewDevice("x", platform="palm")])
    assert caught.value.code == 7002
    with pytest.raises(PushError):
        await publisher.device("fine")


# Groups


async def test_a_group_push_goes_to_each_app(server: LocalServer, app: AppKeys, publisher: Publisher) -> None:
    await three_devices(publisher)
    empty = server.create_app("empty")
    async with GroupPublisher(
        *server.create_group("both", app.app_key, empty.app_key), server.addresses.http
    ) as group:
        answer = await group.push(PushRequest("all", HELLO, cid="once"))
        again = await group.push(PushRequest("all", HELLO, cid="once"))
    accepted, refused = answer.results[app.app_key], answer.results[empty.app_key]
    assert isinstance(accepted, Accepted)
    assert isinstance(refused, PushError)
    assert refused.code == 1011
    assert (await publisher.reports.push(accepted.msg_id)).target == 3
    assert answer.group_msgid == again.group_msgid
    assert again.results[app.app_key] == accepted


async def test_a_group_push_that_all_refuse_is_an_error(server: LocalServer, app: AppKeys) -> None:
    key, secret = server.create_group("one", app.app_key)
    async with GroupPublisher(key, secret, server.addresses.http) as group:
        with pytest.raises(PushError) as caught:
            await group.push({"platform": "all", "audience": "all", "notification": {"alert": "x"}})
    assert caught.value.code == 1011
    async with GroupPublisher(key, "wrong", server.addresses.http) as group:
        with pytest.raises(PushError) as caught:
            await group.push(PushRequest("all", HELLO))
    assert caught.value.http_status == 401
