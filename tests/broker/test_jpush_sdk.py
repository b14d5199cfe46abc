"""The unmodified `jpush` package from PyPI as publisher, in both address plans.

It is pointed at us the way it offers: a zone of its own in `jpush.common.ZONES`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jpush  # type: ignore[import-untyped]
import orjson
import pytest
from jpush.common import ZONES, JPushFailure, Unauthorized  # type: ignore[import-untyped]
from requests.adapters import HTTPAdapter  # type: ignore[import-untyped]

from broker.model import Settled
from clients.local_server import LocalServer

# Where each call goes in the two plans of the vendor (jpush/common.py).
PLANS = {
    "three hosts": {
        "PUSH": "/v3/",
        "REPORT": "/v3/",
        "DEVICE": "/v3/devices/",
        "ALIAS": "/v3/aliases/",
        "TAG": "/v3/tags/",
        "SCHEDULE": "/v3/schedules/",
    },
    "one host": {
        "PUSH": "/v3/",
        "REPORT": "/v3/report/",
        "DEVICE": "/v3/device/",
        "ALIAS": "/v3/device/aliases/",
        "TAG": "/v3/device/tags/",
        "SCHEDULE": "/v3/push/schedules/",
    },
}
ZONE = "HOLDFAST"
GUIDE = Path(__file__).parents[2] / "docs" / "moving-from-jpush.md"


@pytest.fixture(params=list(PLANS.values()), ids=list(PLANS))
def zone(request: pytest.FixtureRequest, service: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Where the calls go; also of those classes that know the default zone only."""
    plan = {key: service.base + path for key, path in request.param.items()}
    for name in (ZONE, "DEFAULT"):
        monkeypatch.setitem(ZONES, name, plan)
    return plan


@pytest.fixture
def sdk(zone: dict[str, str], service: Any) -> Iterator[jpush.JPush]:
    client = jpush.JPush(service.app.key, service.app.master_secret, zone=ZONE)
    yield client
    client.session.close()


async def _payload(call: Callable[..., Any], *args: Any) -> Any:
    """The SDK blocks, so it runs beside the server's loop."""
    response = await asyncio.to_thread(call, *args)
    assert response.status_code == 200
    return response.payload


async def _devices(service: Any) -> dict[str, int]:
    return {
        name: (await service.register(name, platform=platform, alias=alias, tags=tags)).devno
        for name, platform, alias, tags in (
            ("a", "android", "ann", ["red", "big"]),
            ("b", "ios", "ann", ["red"]),
            ("c", "android", "bob", ["big"]),
        )
    }


def _hello(sdk: jpush.JPush, audience: object = jpush.all_, platform: object = jpush.all_) -> Any:
    push = sdk.create_push()
    push.audience = audience
    push.platform = platform
    push.notification = jpush.notification(alert="hello")
    return push


AUDIENCES: list[tuple[Any, Any, str]] = [
    (jpush.all_, jpush.all_, "abc"),
    (jpush.all_, jpush.platform("ios"), "b"),
    (jpush.audience(jpush.tag("red")), jpush.all_, "ab"),
    (jpush.audience(jpush.tag("red", "big")), jpush.all_, "abc"),
    (jpush.audience(jpush.tag_and("red", "big")), jpush.all_, "a"),
    (jpush.audience(jpush.tag_not("red")), jpush.all_, "c"),
    (jpush.audience(jpush.alias("ann")), jpush.all_, "ab"),
    (jpush.audience(jpush.alias("ann", "bob"), jpush.tag("big")), jpush.platform("android", "hmos"), "ac"),
    (jpush.audience(jpush.registration_id("a", "c")), jpush.all_, "ac"),
]


async def test_push_to_every_audience(service: Any, sdk: jpush.JPush) -> None:
    devices = await _devices(service)
    for audience, platform, names in AUDIENCES:
        payload = await _payload(_hello(sdk, audience, platform).send)
        msg_id = int(payload["msg_id"])
        record = (await service.store.find_messages(service.app.app_id, [msg_id]))[msg_id]
        assert list(record.targets) == sorted(devices[name] for name in names), audience


async def test_push_to_a_segment(service: Any, sdk: jpush.JPush) -> None:
    devices = await _devices(service)
    segment = await service.call("POST", "/v1/segments", {"name": "ios", "rule": {"platform": "ios"}})
    audience = jpush.audience({"segment": [segment.json["id"]]})
    msg_id = int((await _payload(_hello(sdk, audience).send))["msg_id"])
    record = (await service.store.find_messages(service.app.app_id, [msg_id]))[msg_id]
    assert list(record.targets) == [devices["b"]]


async def test_options_that_change_what_happens(service: Any, sdk: jpush.JPush) -> None:
    await _devices(service)
    first = int((await _payload(_hello(sdk).send))["msg_id"])
    for options in (
        {"override_msg_id": first},
        {"big_push_duration": 10},
        {"apns_collapse_id": "news"},
        {"time_to_live": 86_400, "sendno": 12_345, "apns_production": True},
    ):
        push = _hello(sdk)
        push.options = options
        await _payload(push.send)
    push.options = {"override_msg_id": 4_000_000_000}
    with pytest.raises(JPushFailure) as caught:
        await _payload(push.send)
    assert caught.value.error_code == 1003


async def test_sms_is_refused(service: Any, sdk: jpush.JPush) -> None:
    """Left out in silence, people would wait for it."""
    await _devices(service)
    push = _hello(sdk)
    push.smsmessage = jpush.smsmessage(3600, 1)
    with pytest.raises(JPushFailure) as caught:
        await _payload(push.send)
    assert caught.value.error_code == 1003


async def test_everything_that_the_sdk_can_say(service: Any, sdk: jpush.JPush) -> None:
    await _devices(service)
    push = _hello(sdk)
    push.notification = jpush.notification(
        alert="hello",
        android=jpush.android("hi", title="t", priority=1, style=1, alert_type=1, big_text="b", extras={"k": "v"},
                              badge_add_num=1, intent={"url": "x"}, sound="s", display_foreground="1"),
        ios=jpush.ios({"title": "t", "body": "b"}, badge="+1", content_available=True, mutable_content=True,
                      category="c", thread_id="t", interruption_level="active", extras={"k": 1}),
        hmos=jpush.hmos("hi", title="t", category="c", intent={"url": "x"}, badge_add_num=1, push_type=0),
        quickapp=jpush.quickapp("hi", "t", "/page"),
        winphone=jpush.winphone("hi", extras={"k": "v"}),
        voip=jpush.voip({"k": "v"}),
    )  # fmt: skip
    push.message = jpush.message("content", title="t", content_type="text", extras={"k": "v"})
    push.options = {"sendno": 12, "time_to_live": 60, "apns_production": False, "third_party_channel": {}}
    assert (await _payload(push.send))["sendno"] == "12"


FORMS: dict[str, tuple[Any, Any]] = {
    "each platform its own": (
        jpush.notification(
            alert="Hello",
            ios=jpush.ios(alert="Hello, iOS", sound="a.caf", extras={"k1": "v1"}),
            android=jpush.android(
                alert="Hello, Android", priority=1, style=1, alert_type=1, big_text="j" * 10
            ),
            hmos=jpush.hmos(alert="Hello, HMOS", large_icon="icon", style="style", inbox="inbox"),
        ),
        None,
    ),
    "with a message": (
        jpush.notification(alert="Hello", ios=jpush.ios(alert="Hello, iOS", badge="+1")),
        jpush.message("content", extras={"k2": "v2", "k3": "v3"}),
    ),
    "silent": (
        jpush.notification(
            alert="Hello",
            ios=jpush.ios(alert="Hello, iOS", badge="+1", extras={"k1": "v1"}, sound_disable=True),
            hmos=jpush.hmos(alert="Hello, HMOS"),
        ),
        None,
    ),
}


@pytest.mark.parametrize("form", FORMS)
async def test_the_forms_of_its_examples(service: Any, sdk: jpush.JPush, form: str) -> None:
    await _devices(service)
    push = _hello(sdk, jpush.audience(jpush.tag("red", "big"), {"alias": ["ann", "bob"]}))
    push.notification, push.message = FORMS[form]
    assert int((await _payload(push.send))["msg_id"]) > 0
    assert (await _payload(push.send_validate))["msg_id"] == "0"


async def test_devices_as_its_examples_change_them(service: Any, sdk: jpush.JPush) -> None:
    await _devices(service)
    device = sdk.create_device()
    await _payload(device.set_devicemobile, "a", jpush.device_tag(jpush.add("ddd", "tageee")))
    assert await _payload(device.check_taguserexist, "ddd", "a") == {"result": True}
    assert await _payload(device.delete_tag, "ddd", "android,ios,hmos") == "success"
    assert await _payload(device.get_aliasuser, "ann", "android,ios,hmos") == {"registration_ids": ["a", "b"]}
    assert await _payload(device.delete_alias, "ann", "android,ios,hmos") == "success"
    assert await _payload(device.get_device_status, "a") == {"a": {"online": False}}


async def test_validate_and_cid(service: Any, sdk: jpush.JPush) -> None:
    await _devices(service)
    assert (await _payload(_hello(sdk).send_validate)).keys() == {"sendno", "msg_id"}
    push = _hello(sdk)
    push.cid = (await _payload(push.get_cid, 2))["cidlist"][0]
    assert await _payload(push.send) == await _payload(push.send)


async def test_batches(service: Any, sdk: jpush.JPush) -> None:
    await _devices(service)
    notification = jpush.notification(alert="hello")
    by_id = [{"platform": "all", "target": name, "notification": notification} for name in "ab"]
    payload = await _payload(sdk.create_push().batch_push_by_regid, by_id)
    assert [set(result) for result in payload.values()] == [{"sendno", "msg_id"}] * 2
    by_alias = [{"platform": "all", "target": "ann", "notification": notification}]
    payload = await _payload(sdk.create_push().batch_push_by_alias, by_alias)
    msg_id = int(next(iter(payload.values()))["msg_id"])
    assert len((await service.store.find_messages(service.app.app_id, [msg_id]))[msg_id].targets) == 2


async def test_devices_tags_and_aliases(service: Any, sdk: jpush.JPush) -> None:
    await _devices(service)
    device = sdk.create_device()
    assert await _payload(device.get_deviceinfo, "a") == {
        "tags": ["big", "red"],
        "alias": "ann",
        "mobile": None,
    }
    change = jpush.device_tag(jpush.add("new"), jpush.remove("red")) | jpush.device_alias("eve")
    assert await _payload(device.set_deviceinfo, "a", change) == "success"
    await _payload(device.set_devicemobile, "a", jpush.device_mobile("13012345678"))
    info = await _payload(device.get_deviceinfo, "a")
    assert info == {"tags": ["big", "new"], "alias": "eve", "mobile": "13012345678"}
    await _payload(device.set_deviceinfo, "a", jpush.device_tag("") | jpush.device_alias(""))
    assert await _payload(device.get_deviceinfo, "a") == {"tags": [], "alias": None, "mobile": "13012345678"}

    assert await _payload(device.get_taglist) == {"tags": ["big", "red"]}
    users = jpush.device_regid(jpush.add("a"), jpush.remove("b"))
    assert await _payload(device.update_tagusers, "red", users) == "success"
    assert await _payload(device.check_taguserexist, "red", "a") == {"result": True}
    assert await _payload(device.check_taguserexist, "red", "b") == {"result": False}
    assert await _payload(device.delete_tag, "big", "android") == "success"
    assert await _payload(device.get_taglist) == {"tags": ["red"]}

    assert await _payload(device.get_aliasuser, "bob", "android") == {"registration_ids": ["c"]}
    assert await _payload(device.delete_alias, "bob") == "success"
    assert await _payload(device.get_aliasuser, "bob") == {"registration_ids": []}
    status = await _payload(device.get_device_status, ["a", "nobody"])
    assert status == {"a": {"online": False}}


async def test_reports(service: Any, sdk: jpush.JPush) -> None:
    devices = await _devices(service)
    msg_id = int((await _payload(_hello(sdk).send))["msg_id"])
    app_id = service.app.app_id
    await service.store.settle([Settled(app_id, msg_id, broadcast=False, delivered=[devices["a"]])])
    report = sdk.create_report()
    row = (await _payload(report.get_received, str(msg_id)))[0]
    assert (row["msg_id"], row["android_received"], row["ios_msg_received"]) == (str(msg_id), 1, 0)
    row = (await _payload(report.get_received_detail, f"{msg_id}"))[0]
    assert (row["jpush_received"], row["target"], row["delivered"], row["pending"]) == (1, 3, 1, 2)
    status = await _payload(report.get_status_message, msg_id, ["a", "b", "nobody"], "2026-01-31")
    assert status == {"a": {"status": 0}, "b": {"status": 1, "state": "pending"}, "nobody": {"status": 2}}


async def test_reports_of_messages_and_users(service: Any, sdk: jpush.JPush) -> None:
    await _devices(service)
    msg_id = (await _payload(_hello(sdk).send))["msg_id"]
    report = sdk.create_report()
    for call in (report.get_messages, report.get_messages_detail):
        [row] = await _payload(call, msg_id)
        assert str(row["msg_id"]) == msg_id
    for unit, start in (("HOUR", "2027-01-15 07"), ("DAY", "2027-01-14"), ("MONTH", "2027-01")):
        users = await _payload(report.get_users, unit, start, "1")
        assert (users["time_unit"], users["start"], len(users["items"])) == (unit, start, 1)


def _schedule(sdk: jpush.JPush, name: str, *trigger: Any, **periodical: Any) -> Any:
    when = jpush.schedulepayload.trigger(*trigger, **periodical)
    return jpush.schedulepayload.schedulepayload(name, True, when, _hello(sdk).payload)


PERIODICAL: list[dict[str, Any]] = [
    {"time_unit": "day", "frequency": 1},
    {"time_unit": "week", "frequency": 2, "point": ["MON", "FRI"]},
    {"time_unit": "month", "frequency": 1, "point": ["01", "15"]},
]
SPAN = {"start": "2027-02-01 00:00:00", "end": "2027-06-01 00:00:00"}


async def test_schedules(service: Any, sdk: jpush.JPush) -> None:
    await _devices(service)
    schedules = sdk.create_schedule()
    made = await _payload(schedules.post_schedule, _schedule(sdk, "once", "2027-07-17 12:00:00"))
    assert made["name"] == "once"
    found = await _payload(schedules.get_schedule_by_id, made["schedule_id"])
    assert found["trigger"]["single"]["time"] == "2027-07-17 12:00:00"
    assert (found["enabled"], found["push"]["notification"]) == (True, {"alert": "hello"})

    for trigger in PERIODICAL:
        payload = _schedule(sdk, trigger["time_unit"], "12:00:00", **SPAN, **trigger)
        periodical = await _payload(schedules.post_schedule, payload)
        found = await _payload(schedules.get_schedule_by_id, periodical["schedule_id"])
        assert found["trigger"]["periodical"].items() >= trigger.items()

    listed = await _payload(schedules.get_schedule_list, "1")
    assert (listed["total_count"], listed["total_pages"], listed["page"]) == (4, 1, 1)
    assert {row["name"] for row in listed["schedules"]} == {"once", "day", "week", "month"}

    update = _schedule(sdk, "update a new name", "2027-05-17 12:00:00")
    await _payload(schedules.put_schedule, update, made["schedule_id"])
    found = await _payload(schedules.get_schedule_by_id, made["schedule_id"])
    assert (found["name"], found["trigger"]["single"]["time"]) == ("update a new name", "2027-05-17 12:00:00")
    with pytest.raises(JPushFailure) as caught:
        await _payload(schedules.put_schedule, update, periodical["schedule_id"])
    assert caught.value.error_code == 8100

    assert await _payload(schedules.delete_schedule, made["schedule_id"]) == "success"
    with pytest.raises(JPushFailure) as caught:
        await _payload(schedules.get_schedule_by_id, made["schedule_id"])
    assert (caught.value.error_code, caught.value.response.status_code) == (8104, 404)


async def test_messages_of_a_schedule(
    service: Any, sdk: jpush.JPush, zone: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK reads the address from a name that it forgot to define since it has zones."""
    await _devices(service)
    monkeypatch.setattr(jpush.common, "BASE_SCHEDULEURL", zone["SCHEDULE"], raising=False)
    schedules = sdk.create_schedule()
    made = await _payload(schedules.post_schedule, _schedule(sdk, "once", "2027-07-17 12:00:00"))
    found = await _payload(schedules.get_msg_ids, made["schedule_id"])
    assert (found["count"], found["msgids"]) == (0, [])


async def test_a_push_to_a_group(service: Any, zone: dict[str, str]) -> None:
    await _devices(service)
    group = await service.broker.groups.create(orjson.dumps({"name": "all", "apps": [service.app.key]}))
    client = jpush.GroupPush(group.key, group.secret)
    payload = await _payload(_hello(client).send)
    assert payload.keys() == {"group_msgid", service.app.key}
    msg_id = int(payload[service.app.key]["msg_id"])
    assert len((await service.store.find_messages(service.app.app_id, [msg_id]))[msg_id].targets) == 3
    client.session.close()


class _Elsewhere(HTTPAdapter):  # type: ignore[misc]
    """Of `requests`: calls to the vendor's admin host, whose address the SDK does not let us choose, come to us."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self._base = base

    def send(self, request: Any, **options: Any) -> Any:
        request.url = request.url.replace(ADMIN, self._base)
        return super().send(request, **options)


ADMIN = "https://admin.jpush.cn"


def test_apps_are_made_and_deleted_by_the_admin_api(server: LocalServer) -> None:
    key = orjson.loads((server.data_dir / "admin.json").read_bytes())["key"]
    admin = jpush.Admin("admin", key)
    admin.session.mount(ADMIN, _Elsewhere(server.addresses.admin))
    app = admin.create_app("aaa", "cn.jpush.app").payload
    assert (app["name"], app["is_new_created"]) == ("aaa", True)
    assert admin.delete_app(app["app_key"]).payload == {"success": "delete app success"}
    with pytest.raises(JPushFailure) as caught:
        admin.delete_app(app["app_key"])
    assert caught.value.error_code == 1008
    admin.session.close()


async def test_the_sdk_understands_our_errors(service: Any, sdk: jpush.JPush) -> None:
    with pytest.raises(JPushFailure) as caught:
        await _payload(_hello(sdk, jpush.audience(jpush.tag("none"))).send)
    assert caught.value.error_code == 1011
    with pytest.raises(JPushFailure) as caught:
        await _payload(sdk.create_device().get_deviceinfo, "nobody")
    assert caught.value.error_code == 7002
    assert caught.value.details == "no such device in this app: nobody"
    stranger = jpush.JPush(service.app.key, "wrong", zone=ZONE)
    with pytest.raises(Unauthorized):
        await _payload(_hello(stranger).send)
    stranger.session.close()


async def test_the_page_for_those_who_move_works_with_every_class_of_the_sdk(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ZONES, "DEFAULT", ZONES["DEFAULT"])
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    exec(example.replace("https://push.example.com", service.base), {})
    await service.register("a", tags=["red"])
    client = jpush.JPush(service.app.key, service.app.master_secret)
    push = client.create_push()
    push.audience, push.platform, push.notification = jpush.all_, jpush.all_, jpush.notification(alert="hi")
    sent = await _payload(push.send)
    schedule = _schedule(client, "s", "2027-06-01 10:00:00")
    assert "schedule_id" in await _payload(client.create_schedule().post_schedule, schedule)
    assert await _payload(client.create_device().get_taglist) == {"tags": ["red"]}
    (row,) = await _payload(client.create_report().get_received, sent["msg_id"])
    assert row["msg_id"] == sent["msg_id"]
