"""The whole account of one push, its curve and its traces, on the real store."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import orjson
import pytest
from pyroaring import BitMap

from broker.errors import ApiError
from broker.model import NewMessage, Receipt, Settled

HOUR = 3600
NAMES = ("ann", "bob", "cid", "dee", "eve")


async def _refused(call: Awaitable[object]) -> tuple[int, int, str]:
    with pytest.raises(ApiError) as caught:
        await call
    return caught.value.code, caught.value.http_status, caught.value.message


async def _devices(service: Any) -> dict[str, int]:
    return {name: (await service.register(name)).devno for name in NAMES}


async def _append(service: Any, devnos: Any, *, ttl: float = 100_000.0, **more: Any) -> int:
    message = NewMessage(
        service.app.app_id, b'{"message":{}}', BitMap(devnos), True, service.now, service.now + ttl, **more
    )
    (appended,) = await service.store.append([message])
    return int(appended.msg_id)


async def _settle(service: Any, msg_id: int, **more: Any) -> None:
    settled = Settled(service.app.app_id, msg_id, True, **{"at": service.now, "node": "n1", **more})
    await service.store.settle([settled])


async def _lived(service: Any) -> int:
    """ann has it and clicked, an hour and a half later; bob was sent it; cid is suppressed; dee it waits for."""
    numbers = await _devices(service)
    msg_id = await _append(
        service, [numbers[name] for name in ("ann", "bob", "dee")], suppressed=BitMap([numbers["cid"]])
    )
    service.now += 2.5
    await _settle(service, msg_id, sent=[numbers["bob"]])
    await _settle(service, msg_id, delivered=[numbers["ann"]], sent_at=service.now - 0.2)
    service.now += 1.5 * HOUR
    receipt = Receipt(service.app.app_id, msg_id, numbers["ann"], "clicked", service.now)
    await service.store.record_receipts([receipt])
    return msg_id


async def test_the_counts_of_a_push_add_up(service: Any) -> None:
    at = service.now
    msg_id = await _lived(service)
    assert await service.broker.accounts.push(service.app, str(msg_id)) == {
        "msg_id": str(msg_id), "sendno": "0", "state": "sending", "accepted_at": at, "expires_at": at + 100_000.0,
        "broadcast": True, "target": 4, "online": 0, "sent": 2, "delivered": 1, "pending": 2, "expired": 0,
        "evicted": 0, "recalled": 0, "suppressed": 1, "shown": 0, "clicked": 1, "dismissed": 0, "parts": 0,
        "progress": None, "withdrawn_at": None, "replaced_by": None,
    }  # fmt: skip
    await service.store.recall(service.app.app_id, [msg_id], service.now)
    report = await service.broker.accounts.push(service.app, str(msg_id))
    assert (report["state"], report["recalled"], report["pending"]) == ("withdrawn", 2, 0)


async def test_the_curve_has_each_device_once_in_the_hour_since_the_push(service: Any) -> None:
    at = service.now
    msg_id = await _lived(service)
    await _settle(service, msg_id, sent=[1])  # bob, again: he connected anew
    curve = await service.broker.accounts.curve(service.app, str(msg_id))
    nothing = {"sent": 0, "delivered": 0, "shown": 0, "clicked": 0, "dismissed": 0}
    assert curve == {
        "msg_id": str(msg_id),
        "accepted_at": at,
        "hours": [
            nothing | {"hour": 0, "at": at, "sent": 2, "delivered": 1},
            nothing | {"hour": 1, "at": at + HOUR, "clicked": 1},
        ],
    }


async def test_a_push_that_nothing_happened_to_has_one_empty_hour(service: Any) -> None:
    await _devices(service)
    msg_id = await _append(service, [0])
    curve = await service.broker.accounts.curve(service.app, str(msg_id))
    assert [sum(hour[name] for name in ("sent", "delivered", "shown")) for hour in curve["hours"]] == [0]


async def _trace(service: Any, msg_id: int, name: str) -> tuple[str, list[tuple[Any, ...]]]:
    trace = await service.broker.accounts.trace(service.app, str(msg_id), name)
    assert (trace["msg_id"], trace["registration_id"]) == (str(msg_id), name)
    return trace["status"], [
        (step["step"], step["at"], step["resolution"], step.get("node")) for step in trace["steps"]
    ]


async def test_a_trace_tells_what_happened_in_order_with_times_and_nodes(service: Any) -> None:
    at = service.now
    msg_id = await _lived(service)
    begun = [("accepted", at, 0, None), ("matched", at, 0, None)]
    clicked = at + 2.5 + 1.5 * HOUR
    hour = clicked // HOUR * HOUR
    assert await _trace(service, msg_id, "ann") == (
        "delivered",
        [
            *begun,
            ("sent", at + 2, 1.0, "n1"),
            ("acknowledged", at + 2, 1.0, "n1"),
            ("clicked", hour, float(HOUR), None),
        ],
    )
    assert await _trace(service, msg_id, "bob") == ("pending", [*begun, ("sent", at + 2, 1.0, "n1")])
    assert await _trace(service, msg_id, "cid") == ("suppressed", [begun[0], ("suppressed", at, 0, None)])
    assert await _trace(service, msg_id, "dee") == ("pending", begun)
    assert await _trace(service, msg_id, "eve") == ("not a target", begun[:1])
    service.now = at + 100_000.0
    assert await _trace(service, msg_id, "dee") == ("expired", [*begun, ("expired", service.now, 0, None)])


async def test_a_trace_is_as_exact_as_a_second_a_minute_or_an_hour(service: Any) -> None:
    """Also where the push was accepted within that time."""
    service.now += 0.456
    at = service.now
    numbers = await _devices(service)
    msg_id = await _append(service, numbers.values())
    for name, later in (("ann", 0.1), ("bob", 90.0), ("cid", 2 * HOUR)):
        service.now = at + later
        await _settle(service, msg_id, delivered=[numbers[name]])
        (_, start, resolution, _) = (await _trace(service, msg_id, name))[1][-1]
        assert resolution == {"ann": 1, "bob": 60, "cid": HOUR}[name]
        assert at <= start <= service.now <= start + resolution


async def test_a_trace_ends_with_how_a_copy_was_withdrawn_unless_it_came_all_the_same(service: Any) -> None:
    numbers = await _devices(service)
    at = service.now
    msg_id = await _append(service, numbers.values())
    service.now += 1
    await _settle(service, msg_id, evicted=[numbers["ann"]])
    await service.store.recall(service.app.app_id, [msg_id], service.now)
    assert (await _trace(service, msg_id, "ann"))[1][2:] == [("evicted", at + 1, 1.0, "n1")]
    assert await _trace(service, msg_id, "bob") == (
        "recalled",
        [("accepted", at, 0, None), ("matched", at, 0, None), ("recalled", at + 1, 1.0, None)],
    )
    await _settle(service, msg_id, delivered=[numbers["bob"]])
    status, steps = await _trace(service, msg_id, "bob")
    assert (status, [step[0] for step in steps]) == (
        "delivered",
        ["accepted", "matched", "sent", "acknowledged", "withdrawn"],
    )


async def test_a_push_tells_which_one_replaced_it(service: Any) -> None:
    await _devices(service)
    body: dict[str, Any] = {"platform": "all", "audience": "all", "notification": {"alert": "hi"}}
    old = (await service.call("POST", "/v3/push", body)).json["msg_id"]
    body["options"] = {"override_msg_id": int(old)}
    new = (await service.call("POST", "/v3/push", body)).json["msg_id"]
    report = (await service.call("GET", f"/v1/pushes/{old}")).json
    assert (report["replaced_by"], report["withdrawn_at"], report["state"]) == (new, None, "done")


async def test_the_push_of_one_device_has_exact_times(service: Any) -> None:
    await _devices(service)
    at = service.now
    answer = await service.call(
        "POST", "/v3/push",
        {"platform": "all", "audience": {"registration_id": ["ann"]}, "notification": {"alert": "hi"}},
    )  # fmt: skip
    msg_id = int(answer.json["msg_id"])
    settled = Settled(
        service.app.app_id, msg_id, False, delivered=[0], at=at + 0.25, sent_at=at + 0.125, node="n1"
    )
    await service.store.settle([settled])
    assert (await _trace(service, msg_id, "ann"))[1][2:] == [
        ("sent", at + 0.125, 0, "n1"),
        ("acknowledged", at + 0.25, 0, "n1"),
    ]


async def test_a_push_in_parts_is_told_as_one(service: Any) -> None:
    numbers = await _devices(service)
    at = service.now
    whole = await _append(service, numbers.values(), paced=True)
    service.now += 60
    part = await _append(service, [numbers["ann"], numbers["bob"]], part_of=whole)
    service.now += 1
    await _settle(service, part, delivered=[numbers["ann"]])
    report = await service.broker.accounts.push(service.app, str(whole))
    counts = [report[name] for name in ("target", "sent", "delivered", "pending", "parts")]
    assert counts == [5, 1, 1, 4, 1]
    # There is no plan of it (any more): the pacer says that all went.
    assert (report["state"], report["progress"]["state"]) == ("sending", "done")
    steps = (await _trace(service, whole, "ann"))[1]
    assert [step[:2] for step in steps[1:3]] == [("matched", at), ("released", at + 60)]
    curve = await service.broker.accounts.curve(service.app, str(whole))
    assert [hour["delivered"] for hour in curve["hours"]] == [1]


async def test_a_slow_push_shows_its_progress(service: Any) -> None:
    await _devices(service)
    answer = await service.call(
        "POST", "/v3/push",
        {
            "platform": "all", "audience": "all", "notification": {"alert": "hi"},
            "options": {"big_push_duration": 10},
        },
    )  # fmt: skip
    msg_id = answer.json["msg_id"]
    report = (await service.call("GET", f"/v1/pushes/{msg_id}")).json
    assert (report["target"], report["pending"], report["state"]) == (5, 5, "sending")
    assert report["progress"]["total"] == 5
    await service.broker.pacer.pause(service.app.app_id, int(msg_id))
    report = (await service.call("GET", f"/v1/pushes/{msg_id}")).json
    assert (report["state"], report["progress"]["state"]) == ("paused", "paused")


@pytest.mark.parametrize("path", ["", "/curve", "/devices/ann"])
async def test_a_push_that_is_none(service: Any, path: str) -> None:
    await _devices(service)
    msg_id = await _append(service, [0])
    unknown = await service.call("GET", f"/v1/pushes/7{path}")
    assert (unknown.status, unknown.code) == (404, 3004)
    wrong = await service.call("GET", f"/v1/pushes/x{path}")
    assert (wrong.status, wrong.code) == (400, 3004)
    other = await service.apps.create("other")
    stranger = await service.call("GET", f"/v1/pushes/{msg_id}{path}", auth=(other.key, other.master_secret))
    assert (stranger.status, stranger.code) == (404, 3004)


async def test_a_device_that_is_none(service: Any) -> None:
    await _devices(service)
    msg_id = await _append(service, [0])
    answer = await service.call("GET", f"/v1/pushes/{msg_id}/devices/nobody")
    assert (answer.status, answer.code) == (404, 3004)
    assert "nobody is not a device" in answer.message


async def test_the_endpoints_answer_what_the_service_says(service: Any) -> None:
    msg_id = await _lived(service)
    for path, wanted in (
        ("", await service.broker.accounts.push(service.app, str(msg_id))),
        ("/curve", await service.broker.accounts.curve(service.app, str(msg_id))),
        ("/devices/ann", await service.broker.accounts.trace(service.app, str(msg_id), "ann")),
    ):
        answer = await service.call("GET", f"/v1/pushes/{msg_id}{path}")
        assert (answer.status, answer.json) == (200, orjson.loads(orjson.dumps(wanted)))


async def test_an_acknowledgement_that_is_told_again_keeps_its_time(service: Any) -> None:
    """Found by the truth machine: of a push to one device the last one counted."""
    await _devices(service)
    at, app_id = service.now, service.app.app_id
    message = NewMessage(app_id, b'{"message":{}}', BitMap([0]), False, at, at + HOUR)
    (appended,) = await service.store.append([message])
    for seconds, node in ((1, "n1"), (600, "n2")):
        settled = Settled(app_id, appended.msg_id, False, delivered=[0], at=at + seconds, node=node)
        await service.store.settle([settled])
    assert (await _trace(service, appended.msg_id, "ann"))[1][-1] == ("acknowledged", at + 1, 0, "n1")
