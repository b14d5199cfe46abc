"""Withdrawing, overriding, collapsing, spreading: what a push does to others and over time, through the API."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from broker.bus import Broadcast, Recalled, Targeted
from broker.limits import Limits
from broker.model import OwedRequest, Settled
from tests.patience import PATIENCE

DAY = 86_400


@pytest.fixture
async def service(start: Any) -> Any:
    service = await start(limits=Limits(fanout_limit=2))
    for name in "abcd":
        await service.register(name)
    return service


async def _push(service: Any, *names: str, **changes: Any) -> int:
    body: dict[str, Any] = {"platform": "all", "audience": "all", "notification": {"alert": "x"}} | changes
    if names:
        body["audience"] = {"registration_id": names}
    answer = await service.call("POST", "/v3/push", body)
    assert answer.status == 200, answer.body
    return int(answer.json["msg_id"])


async def _counts(service: Any, msg_id: int) -> dict[str, int]:
    record = (await service.store.find_messages(service.app.app_id, [msg_id]))[msg_id]
    return {state.value: count for state, count in record.counts(service.now).items() if count}


async def _owed(service: Any, devno: int) -> list[dict[str, Any]]:
    """Bodies of what waits in an inbox."""
    (rows,) = await service.store.fetch_owed([OwedRequest(service.app.app_id, devno, 0, 10)])
    return [orjson.loads(row.body) for row in rows]


async def _bell(service: Any, kind: type) -> Any:
    async with asyncio.timeout(PATIENCE):
        while not isinstance(bell := await service.doorbell(), kind):
            pass
    return bell


async def _delivered(service: Any, msg_id: int, *devnos: int, broadcast: bool = False) -> None:
    await service.store.settle(
        [Settled(service.app.app_id, msg_id, broadcast, list(devnos), at=service.now, node="n")]
    )


# Withdrawing


async def test_a_withdrawn_push_waits_no_longer_and_who_has_it_is_told(service: Any) -> None:
    msg_id = await _push(service, "a", "b")
    await _delivered(service, msg_id, 0)
    answer = await service.call("DELETE", f"/v3/push/{msg_id}")
    assert (answer.status, answer.body) == (200, b"")
    assert await _counts(service, msg_id) == {"delivered": 1, "recalled": 1}
    assert await _owed(service, 0) == [{"recall": str(msg_id)}]
    assert await _owed(service, 1) == []
    bell = await _bell(service, Recalled)
    assert [(gone.msg_id, list(gone.devnos), list(gone.reached)) for gone in bell.withdrawn] == [
        (msg_id, [1], [0])
    ]


async def test_who_is_online_is_told_too_for_it_may_be_on_its_way(service: Any) -> None:
    msg_id = await _push(service, "a", "b")
    service.store.claim_route(service.app.app_id, 1, "n", lambda claim: None)
    await service.call("DELETE", f"/v3/push/{msg_id}")
    assert await _owed(service, 1) == [{"recall": str(msg_id)}]
    assert await _owed(service, 0) == []


async def test_who_was_not_let_go_yet_is_not_told(service: Any) -> None:
    msg_id = await _push(service, options={"big_push_duration": 10})
    await service.broker.timekeeper.run_due()
    for devno in range(4):
        service.store.claim_route(service.app.app_id, devno, "n", lambda claim: None)
    await service.call("DELETE", f"/v3/push/{msg_id}")
    notice = [{"recall": str(msg_id)}]
    assert [await _owed(service, devno) for devno in range(4)] == [notice, [], [], []]


async def test_a_withdrawn_broadcast_is_gone_from_the_log(service: Any) -> None:
    msg_id = await _push(service)
    await _delivered(service, msg_id, 0, 1, 2, broadcast=True)
    await service.call("DELETE", f"/v3/push/{msg_id}")
    (notice,) = await service.store.live_broadcasts(service.app.app_id)
    assert orjson.loads(notice.message.body) == {"recall": str(msg_id)}
    assert list(notice.targets) == [0, 1, 2]
    assert await _counts(service, msg_id) == {"delivered": 3, "recalled": 1}


@pytest.mark.parametrize(("msg_id", "status"), [("17", 404), ("0", 404), ("x", 400), ("9" * 20, 400)])
async def test_what_is_no_push_cannot_be_withdrawn(service: Any, msg_id: str, status: int) -> None:
    answer = await service.call("DELETE", f"/v3/push/{msg_id}")
    assert (answer.status, answer.code, "msg_id" in answer.message) == (status, 1003, True)


async def test_another_app_withdraws_nothing(service: Any) -> None:
    msg_id = await _push(service, "a")
    other = await service.apps.create("other")
    answer = await service.call("DELETE", f"/v3/push/{msg_id}", auth=(other.key, other.master_secret))
    assert answer.status == 404
    assert await _counts(service, msg_id) == {"pending": 1}


async def test_withdrawing_a_slow_push_ends_it(service: Any) -> None:
    msg_id = await _push(service, options={"big_push_duration": 10})
    service.now += 300
    await service.broker.timekeeper.run_due()
    assert (await service.call("DELETE", f"/v3/push/{msg_id}")).status == 200
    service.now += 3600
    await service.broker.timekeeper.run_due()
    assert await _counts(service, msg_id) == {"recalled": 4}
    assert [await _owed(service, devno) for devno in range(4)] == [[]] * 4


# Override


async def test_an_override_takes_the_place_of_what_waits(service: Any) -> None:
    old = await _push(service, "a", "b")
    await _delivered(service, old, 0)
    new = await _push(
        service, "a", "b", notification={"alert": "better"}, options={"override_msg_id": str(old)}
    )
    assert await _counts(service, old) == {"delivered": 1, "recalled": 1}
    assert await _owed(service, 1) == [{"notification": {"alert": "better"}}]
    bell = await _bell(service, Recalled)
    assert [gone.msg_id for gone in bell.withdrawn] == [old]
    bell = await _bell(service, Targeted)
    assert (bell.message.msg_id, bell.message.replaces) == (new, old)


async def test_an_override_of_an_unknown_or_too_old_push_pushes_nothing(service: Any) -> None:
    old = await _push(service, "a", options={"time_to_live": 2 * DAY})
    other = await service.apps.create("other")
    service.now += DAY + 1
    for unknown in (old, 17):
        body = {
            "platform": "all", "audience": "all", "notification": {"alert": "x"},
            "options": {"override_msg_id": unknown, "sendno": 5},
        }  # fmt: skip
        answer = await service.call("POST", "/v3/push", body)
        assert (answer.status, answer.code, answer.json["sendno"]) == (400, 1003, "5")
        assert "override_msg_id" in answer.message
    assert len(await _owed(service, 0)) == 1
    assert await _owed(service, 1) == []
    assert other.app_id != service.app.app_id


async def test_in_a_batch_a_wrong_override_spoils_its_own_push_only(service: Any) -> None:
    item = {"platform": "all", "target": "a", "notification": {"alert": "x"}}
    pushlist = {"good": item, "bad": item | {"options": {"override_msg_id": 17}}}
    answer = await service.call("POST", "/v3/push/batch/regid/single", {"pushlist": pushlist})
    assert answer.status == 200
    assert "msg_id" in answer.json["good"]
    assert answer.json["bad"]["error"]["code"] == 1003
    assert len(await _owed(service, 0)) == 1


# Collapse key


@pytest.mark.parametrize("option", ["collapse_key", "apns_collapse_id"])
async def test_of_a_collapse_key_only_the_newest_waits(service: Any, option: str) -> None:
    pushed = [
        await _push(service, "a", notification={"alert": text}, options={option: "score"}) for text in "123"
    ]
    assert await _owed(service, 0) == [{"notification": {"alert": "3"}}]
    assert [await _counts(service, msg_id) for msg_id in pushed] == [
        {"recalled": 1},
        {"recalled": 1},
        {"pending": 1},
    ]


# Slow push


async def test_a_slow_push_answers_at_once_and_goes_in_parts(service: Any) -> None:
    msg_id = await _push(service, options={"big_push_duration": 4, "priority": "high"})
    await service.broker.timekeeper.run_due()
    assert len(await _owed(service, 0)) == 1
    assert await _owed(service, 1) == []
    bell = await _bell(service, Targeted)
    assert (bell.message.public_id, bell.message.high) == (msg_id, True)
    service.now += 60
    await service.broker.timekeeper.run_due()
    assert len(await _owed(service, 1)) == 1
    assert await _counts(service, msg_id) == {"pending": 4}


async def test_slow_pushes_are_limited_and_one_too_many_is_1012(start: Any) -> None:
    service = await start(limits=Limits(max_slow_pushes=2))
    for name in "ab":  # two parts: a push with one would be over at once
        await service.register(name)
    body = {
        "platform": "all", "audience": "all", "notification": {"alert": "x"},
        "options": {"big_push_duration": 1},
    }  # fmt: skip
    answers = [await service.call("POST", "/v3/push", body) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 400]
    assert answers[2].code == 1012
    item = {"platform": "all", "target": "a"} | {key: body[key] for key in ("notification", "options")}
    answer = await service.call("POST", "/v3/push/batch/regid/single", {"pushlist": {"c": item}})
    assert (answer.status, answer.code) == (400, 1012)
    service.now += 61
    await service.broker.timekeeper.run_due()
    assert (await service.call("POST", "/v3/push", body)).status == 200


async def test_slow_pushes_are_limited_in_a_batch_and_at_once(start: Any) -> None:
    service = await start(limits=Limits(max_slow_pushes=2))
    for name in "abc":
        await service.register(name)
    item = {"platform": "all", "notification": {"alert": "x"}, "options": {"big_push_duration": 9}}
    pushlist = {name: item | {"target": name} for name in "abc"}
    answer = await service.call("POST", "/v3/push/batch/regid/single", {"pushlist": pushlist})
    assert (answer.status, answer.code) == (400, 1012)
    plain = {"d": {"platform": "all", "target": "a", "notification": {"alert": "now"}}}
    answer = await service.call("POST", "/v3/push/batch/regid/single", {"pushlist": pushlist | plain})
    assert answer.status == 200
    assert ["msg_id" in answer.json[cid] for cid in "abcd"] == [False, False, False, True]
    single = item | {"audience": "all"}
    answers = await asyncio.gather(*(service.call("POST", "/v3/push", single) for _ in range(10)))
    assert sorted(answer.status for answer in answers) == [200] * 2 + [400] * 8


async def test_slow_pushes_of_a_batch_have_a_plan_each(service: Any) -> None:
    item = {
        "platform": "all", "notification": {"alert": "x"}, "options": {"big_push_duration": 1},
    }  # fmt: skip
    pushlist = {name: item | {"target": name} for name in "ab"} | {
        "c": {"platform": "all", "target": "c", "notification": {"alert": "now"}}
    }
    answer = await service.call("POST", "/v3/push/batch/regid/single", {"pushlist": pushlist})
    assert answer.status == 200, answer.body
    again = await service.call("POST", "/v3/push/batch/regid/single", {"pushlist": pushlist})
    assert again.json == answer.json
    await service.broker.timekeeper.run_due()
    assert [len(await _owed(service, devno)) for devno in range(4)] == [1, 1, 1, 0]


async def test_a_wide_part_is_a_broadcast(start: Any) -> None:
    service = await start(limits=Limits(fanout_limit=1))
    for n in range(200):
        await service.register(f"d{n}")
    msg_id = await _push(service, options={"big_push_duration": 1})
    await service.broker.timekeeper.run_due()
    bell = await _bell(service, Broadcast)
    assert bell.broadcast.message.public_id == msg_id
    assert len(bell.broadcast.targets) > 1


# The first result of a cid


async def test_a_used_cid_answers_its_first_result_whatever_has_changed(service: Any) -> None:
    body: dict[str, Any] = {
        "platform": "all", "audience": {"tag": ["red"]}, "notification": {"alert": "x"}, "cid": "c",
    }  # fmt: skip
    assert (await service.call("POST", "/v3/push", body)).code == 1011
    await service.call("POST", "/v3/devices/a", {"tags": ["red"]})
    first = await service.call("POST", "/v3/push", body)
    assert first.status == 200
    await service.call("DELETE", "/v3/tags/red")
    again = await service.call("POST", "/v3/push", body)
    assert (again.status, again.json) == (200, first.json)
    item = {"platform": "all", "target": "nobody", "notification": {"alert": "x"}}
    answer = await service.call("POST", "/v3/push/batch/regid/single", {"pushlist": {"c": item}})
    assert answer.json == {"c": first.json}
    service.now += DAY + 1
    assert (await service.call("POST", "/v3/push", body)).code == 1011


async def test_one_push_of_a_batch_that_its_plan_does_not_allow_spoils_no_other(start: Any) -> None:
    service = await start(limits=Limits(fanout_limit=2, max_targets=3, daily_broadcasts=0))
    for alias, count in (("one", 1), ("many", 4), ("three", 3)):
        for n in range(count):
            await service.register(f"{alias}{n}", alias=alias)
    item = {"platform": "all", "notification": {"alert": "x"}}
    pushlist = {alias: item | {"target": alias} for alias in ("one", "many", "three")}
    answer = await service.call("POST", "/v3/push/batch/alias/single", {"pushlist": pushlist})
    assert answer.status == 200
    codes = {cid: row.get("error", {}).get("code") for cid, row in answer.json.items()}
    assert codes == {"one": None, "many": 2005, "three": 2008}
    everyone = {"platform": "all", "audience": "all", "notification": {"alert": "x"}}
    assert (await service.call("POST", "/v3/push/validate", everyone)).code == 2005
