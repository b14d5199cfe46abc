from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest
from pyroaring import BitMap

from broker.errors import ApiError
from broker.model import AppSettings, BehaviourEvent, NewMessage, Receipt, Settled

HELLO = orjson.dumps({"platform": "all", "audience": {"tag": ["red"]}, "message": {"msg_content": "hi"}})


async def _refused(call: Awaitable[object]) -> tuple[int, str]:
    with pytest.raises(ApiError) as caught:
        await call
    return caught.value.code, caught.value.message


async def _pushed(service: Any) -> tuple[int, dict[str, int]]:
    """A message to a, b and c, of which a and c have it and a was clicked; d is no target."""
    devnos = {}
    for name, platform in (("a", "ios"), ("b", "android"), ("c", "hmos")):
        devnos[name] = (await service.register(name, platform=platform, tags=["red"])).devno
    devnos["d"] = (await service.register("d")).devno
    msg_id = (await service.pushes.push(service.app, HELLO)).msg_id
    app_id = service.app.app_id
    await service.store.settle(
        [Settled(app_id, msg_id, broadcast=False, delivered=[devnos["a"], devnos["c"]])]
    )
    receipt = service.reports.receipt(
        app_id, devnos["a"], orjson.dumps({"msg_id": str(msg_id), "event": "clicked"})
    )
    await service.store.record_receipts([receipt])
    return msg_id, devnos


async def test_the_summary_has_the_vendors_fields(service: Any) -> None:
    msg_id, _ = await _pushed(service)
    rows = await service.reports.received(service.app, f"{msg_id},999999")
    assert [row["msg_id"] for row in rows] == [str(msg_id), "999999"]
    assert (rows[0]["android_received"], rows[0]["ios_msg_received"], rows[0]["ios_apns_sent"]) == (
        0,
        1,
        None,
    )
    assert set(rows[1].values()) == {"999999", None}


async def test_the_detail_accounts_for_every_target(service: Any) -> None:
    msg_id, _ = await _pushed(service)
    row = (await service.reports.received_detail(service.app, str(msg_id)))[0]
    assert (row["jpush_received"], row["ios_msg_received"], row["hmos_msg_received"]) == (0, 1, 1)
    states = ("delivered", "pending", "expired", "evicted", "recalled", "suppressed")
    assert row["target"] == sum(row[state] for state in states) == 3
    assert [row[state] for state in states] == [2, 1, 0, 0, 0, 0]
    assert (row["shown"], row["clicked"], row["dismissed"]) == (0, 1, 0)
    assert (row["online"], row["sent"]) == (0, 2)
    service.now += service.limits.default_ttl
    row = (await service.reports.received_detail(service.app, str(msg_id)))[0]
    assert [row[state] for state in states] == [2, 0, 1, 0, 0, 0]
    unknown = (await service.reports.received_detail(service.app, "999999"))[0]
    assert unknown.keys() == row.keys()


async def test_statistics_by_platform_and_by_channel(service: Any) -> None:
    msg_id, _ = await _pushed(service)
    rows = await service.reports.messages(service.app, f"{msg_id},999999")
    one = {"target": 1, "online_push": 1, "received": 1, "click": 0, "msg_click": None}
    none = {"target": 0, "online_push": 0, "received": 0, "click": 0, "msg_click": None}
    apns = {"apns_target": None, "apns_sent": None, "apns_received": None}
    assert rows[0] == {
        "msg_id": str(msg_id),
        "android": one | {"online_push": 0, "received": 0},
        "ios": apns | one | {"click": 1},
        "winphone": {"mpns_target": None, "mpns_sent": None} | none,
        "quickapp": none,
        "hmos": one,
    }
    assert set(rows[1].values()) == {"999999", None}
    assert rows[1].keys() == rows[0].keys()
    detail = await service.reports.messages_detail(service.app, f"{msg_id},999999")
    assert detail[0] == {
        "msg_id": str(msg_id),
        "jpush": {"target": 3, "online_push": 2, "received": 2, "click": 1, "msg_click": None},
        "android_pns": None,
        "ios": apns | {"apns_click": None, "msg_target": 1, "msg_received": 1},
        "winphone": {"mpns_target": None, "mpns_sent": None, "click": 0},
        "quickapp": none,
        "hmos": one,
        "details": None,
    }
    assert set(detail[1].values()) == {"999999", None}
    assert detail[1].keys() == detail[0].keys()


@pytest.mark.parametrize("name", ["received", "received_detail", "messages", "messages_detail"])
@pytest.mark.parametrize(
    "msg_ids", [None, "", "x", "1,,2", "-1", "1.5", "9" * 20, "0" * 5000, ",".join(["1"] * 101)]
)
async def test_msg_ids_that_are_none(service: Any, name: str, msg_ids: str | None) -> None:
    assert (await _refused(getattr(service.reports, name)(service.app, msg_ids)))[0] == 3004


async def test_an_app_may_have_limits_of_its_own(service: Any) -> None:
    settings = AppSettings(limits={"max_msg_ids": 1, "max_ids": 1})
    app = await service.store.set_settings(service.app.key, settings)
    assert "at most 1 values, got 2" in (await _refused(service.reports.received(app, "1,2")))[1]
    body = b'{"msg_id":1,"registration_ids":["a","b"]}'
    assert "at most 1 values, got 2" in (await _refused(service.reports.status(app, body)))[1]


async def test_the_status_of_one_message_for_each_device(service: Any) -> None:
    msg_id, _ = await _pushed(service)
    body = orjson.dumps(
        {"msg_id": msg_id, "registration_ids": ["a", "b", "d", "nobody"], "date": "2026-01-31"}
    )
    assert await service.reports.status(service.app, body) == {
        "a": {"status": 0}, "b": {"status": 1, "state": "pending"}, "d": {"status": 3}, "nobody": {"status": 2},
    }  # fmt: skip
    other = await service.apps.create("other")
    assert (await _refused(service.reports.status(other, body)))[0] == 3004


async def test_the_status_of_a_device_says_why_it_does_not_have_the_message(service: Any) -> None:
    names = ("delivered", "suppressed", "evicted", "recalled")
    devnos = {name: (await service.register(name)).devno for name in names}
    push = NewMessage(
        service.app.app_id, b"{}", BitMap(devnos.values()), True, service.now, service.now + 60.0,
        suppressed=BitMap([devnos["suppressed"]]),
    )  # fmt: skip
    [appended] = await service.store.append([push])
    msg_id = appended.msg_id
    settled = Settled(
        service.app.app_id, msg_id, True, delivered=[devnos["delivered"]], evicted=[devnos["evicted"]]
    )
    await service.store.settle([settled])

    async def states() -> dict[str, str]:
        body = orjson.dumps({"msg_id": str(msg_id), "registration_ids": names})
        found = await service.reports.status(service.app, body)
        return {name: row.get("state", row["status"]) for name, row in found.items()}

    known = {"delivered": 0, "suppressed": "suppressed", "evicted": "evicted"}
    assert await states() == known | {"recalled": "pending"}
    service.now += 60.0
    assert await states() == known | {"recalled": "expired"}
    service.now -= 1.0
    await service.store.recall(service.app.app_id, [msg_id], service.now)
    assert await states() == known | {"recalled": "recalled"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{}", "msg_id is required"),
        (b'{"msg_id":1}', "registration_ids is required"),
        (b'{"msg_id":1,"registration_ids":[]}', "at least one"),
        (b'{"msg_id":1.5,"registration_ids":["a"]}', "msg_id: expected int | str"),
        (b'{"msg_id":"x","registration_ids":["a"]}', "msg_id: must be a positive integer"),
        (b'{"msg_id":1,"registration_ids":["a"]}', "msg_id: 1 is not a message of this app"),
        (b'{"msg_id":1,"registration_ids":["a"],"date":"yesterday"}', "date: must be YYYY-MM-DD"),
        (orjson.dumps({"msg_id": 1, "registration_ids": ["a"] * 1001}), "at most 1000 values, got 1001"),
    ],
)
async def test_a_wrong_status_request(service: Any, body: bytes, message: str) -> None:
    code, said = await _refused(service.reports.status(service.app, body))
    assert (code, message in said) == (3004, True), said


async def test_events_are_listed_in_pages(service: Any) -> None:
    devno = (await service.register("a")).devno
    app_id, reports = service.app.app_id, service.reports
    events = [reports.event(app_id, devno, f"e{n}", b'{"n":%d}' % n, 100.0 + n) for n in range(3)]
    await service.store.record_events([*events, reports.event(app_id, devno, "bare", b"", 200.0)])
    first = await reports.events(service.app, None, "3")
    assert orjson.loads(orjson.dumps(first["events"]))[0] | {"id": 0} == {
        "id": 0, "registration_id": "a", "name": "e0", "at": 100.0, "payload": {"n": 0},
    }  # fmt: skip
    second = await reports.events(service.app, str(first["after"]), None)
    assert [event["name"] for event in second["events"]] == ["bare"]
    assert (await reports.events(service.app, str(second["after"]), None)) == {
        "events": [],
        "after": second["after"],
    }
    for after, limit in (("x", None), (None, "0"), (None, "1001"), ("-1", None), (None, "9" * 30)):
        assert (await _refused(reports.events(service.app, after, limit)))[0] == 3004


def _intake(service: Any) -> list[tuple[Callable[[], object], str]]:
    reports = service.reports
    return [
        (lambda: reports.receipt(1, 2, b""), "not valid JSON"),
        (lambda: reports.receipt(1, 2, b'{"msg_id":1}'), "event is required"),
        (lambda: reports.receipt(1, 2, b'{"msg_id":1,"event":"eaten"}'), "event: must be one of shown"),
        (lambda: reports.receipt(1, 2, b'{"msg_id":-1,"event":"shown"}'), "msg_id: must be"),
        (lambda: reports.event(1, 2, "", b"{}", 3.0), "event name: must be"),
        (lambda: reports.event(1, 2, "x" * 65, b"{}", 3.0), "event name: must be"),
        (lambda: reports.event(1, 2, "x", b"{", 3.0), "not valid JSON"),
        (lambda: reports.event(1, 2, "x", b'"\xff"', 3.0), "not valid JSON"),
        (lambda: reports.event(1, 2, "x", b'"%b"' % (b"x" * 4095), 3.0), "at most 4096 bytes, got 4097"),
    ]


async def test_what_devices_tell_is_checked(service: Any) -> None:
    for call, message in _intake(service):
        with pytest.raises(ApiError, match=message) as caught:
            call()
        assert caught.value.code == 3004
    assert service.reports.receipt(1, 2, b'{"msg_id":"7","event":"shown"}') == Receipt(
        1, 7, 2, "shown", service.now
    )
    assert service.reports.event(1, 2, "x/y", b"[1]", 3.0) == BehaviourEvent(1, 2, "x/y", 3.0, b"[1]")
