"""Saved segments and estimates, over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pyroaring import BitMap

from broker.audiences.attributes import VALUES_AT_ONCE
from broker.audiences.segment_rules import read_rule, resolve_rules
from broker.limits import Limits
from broker.model import Claim, Device, TermKey
from tests.patience import PATIENCE

PUSH = {"platform": "all", "notification": {"alert": "x"}}


async def _devices(service: Any) -> list[Device]:
    return [
        await service.register(
            "a", platform="ios", tags=["red"], attributes={"app_version": "2.3", "age": 30}
        ),
        await service.register("b", platform="android", attributes={"app_version": "2.10.1", "age": 17}),
        await service.register("c", platform="android", tags=["red"], attributes={"language": "de"}),
    ]


async def _connect(service: Any, device: Device) -> None:
    claimed: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
    service.store.claim_route(service.app.app_id, device.devno, "node", claimed.set_result)
    await asyncio.wait_for(claimed, PATIENCE)


async def _targets(service: Any, audience: dict[str, Any]) -> set[str]:
    """Whom a push reaches."""
    answer = await service.call("POST", "/v3/push", {**PUSH, "audience": audience})
    assert answer.status == 200, answer.body
    msg_id = int(answer.json["msg_id"])
    record = (await service.store.find_messages(service.app.app_id, [msg_id]))[msg_id]
    return set((await service.store.names(service.app.app_id, list(record.targets))).values())


async def test_the_life_of_a_segment(service: Any) -> None:
    devices = await _devices(service)
    await _connect(service, devices[1])
    new = {"name": "Recent versions", "rule": {"attribute": "app_version", "op": ">=", "value": "2.3"}}
    created = await service.call("POST", "/v1/segments", new)
    assert created.status == 200, created.body
    segment_id = created.json["id"]
    assert created.json == {"id": segment_id, **new}
    path = f"/v1/segments/{segment_id}"
    assert (await service.call("GET", path)).json == created.json
    assert (await service.call("GET", "/v1/segments")).json == {"segments": [created.json]}
    assert (await service.call("GET", f"/v1/segments?after={segment_id}")).json == {"segments": []}
    assert (await service.call("GET", f"{path}/estimate")).json == {"registered": 2, "online": 1}
    assert await _targets(service, {"segment": [segment_id]}) == {"a", "b"}
    assert await _targets(service, {"segment": [segment_id], "tag": ["red"]}) == {"a"}
    assert await _targets(service, {"segment": [segment_id], "tag_not": ["red"]}) == {"b"}

    changed = {"name": "Red", "rule": {"not": {"tag": "red"}}}
    assert (await service.call("PUT", path, changed)).json == {"id": segment_id, **changed}
    assert await _targets(service, {"segment": [segment_id]}) == {"b"}
    deleted = await service.call("DELETE", path)
    assert (deleted.status, deleted.body) == (200, b"")
    for method, also in (("GET", ""), ("PUT", ""), ("DELETE", ""), ("GET", "/estimate")):
        answer = await service.call(method, path + also, changed if method == "PUT" else None)
        assert (answer.status, answer.code) == (404, 1003), (method, also)
    answer = await service.call("POST", "/v3/push", {**PUSH, "audience": {"segment": [segment_id]}})
    assert (answer.status, answer.code, segment_id in answer.message) == (400, 1003, True)


async def test_estimates_of_rules_and_audiences(service: Any) -> None:
    devices = await _devices(service)
    await _connect(service, devices[0])
    rows: list[tuple[str, dict[str, Any], dict[str, int]]] = [
        ("segments", {"rule": {"tag": "red"}}, {"registered": 2, "online": 1}),
        ("segments", {"rule": {"tag": "blue"}}, {"registered": 0, "online": 0}),
        ("audience", {"platform": "all", "audience": "all"}, {"registered": 3, "online": 1}),
        ("audience", {"platform": ["android"], "audience": {"tag": ["red"]}}, {"registered": 1, "online": 0}),
    ]
    for what, body, wanted in rows:
        answer = await service.call("POST", f"/v1/{what}/estimate", body)
        assert (answer.status, answer.json) == (200, wanted), body


async def test_true_and_one_in_one_rule_are_two_questions(service: Any) -> None:
    await service.register("a", attributes={"vip": True})
    await service.register("b", attributes={"vip": 1})
    await service.register("c", attributes={"vip": 2})
    one, yes = ({"attribute": "vip", "op": "=", "value": value} for value in (1, True))
    for rule, wanted in (
        ({"or": [one, yes]}, 2),
        ({"and": [yes, {"not": one}]}, 1),
        ({"attribute": "vip", "op": "in", "value": [True, 1, 2]}, 3),
        ({"attribute": "vip", "op": "in", "value": [3] * 20 + [2]}, 1),
    ):
        answer = await service.call("POST", "/v1/segments/estimate", {"rule": rule})
        assert answer.json["registered"] == wanted, rule


async def test_a_dear_rule_leaves_others_their_turn(service: Any) -> None:
    """A millisecond for each value, with a million devices."""
    await service.register("a", attributes={"n": 7})
    numbers = {"attribute": "n", "op": "in", "value": list(range(100))}
    rule = read_rule({"or": [{"attribute": "n", "op": ">", "value": 9}] * 5 + [numbers]}, service.limits)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def postings(app_id: int, keys: list[TermKey]) -> list[BitMap]:
        return [BitMap() for _ in keys]  # cached: no turn comes from the store

    service.store.postings = postings
    counting = asyncio.create_task(count())
    await resolve_rules(service.store, service.app.app_id, [rule], service.now)
    counting.cancel()
    assert turns >= 5 + 100 // VALUES_AT_ONCE


async def test_when_a_device_was_there(service: Any) -> None:
    """On the store's own clock: it is what devices are registered by."""
    devices = await _devices(service)
    await _connect(service, devices[2])

    async def count(rule: dict[str, Any]) -> int:
        answer = await service.call("POST", "/v1/segments/estimate", {"rule": rule})
        assert answer.status == 200, answer.body
        return int(answer.json["registered"])

    assert await count({"last_active": {"within": 1}}) == 1, "who is online is there"
    assert await count({"last_active": {"before": 1}}) == 2, "those that never were are not"
    registered = devices[0].created_at
    assert await count({"registered": {"since": registered - 60}}) == 3
    assert await count({"registered": {"since": registered + 60}}) == 0
    assert await count({"registered": {"before": registered - 60}}) == 0
    assert await count({"registered": {"since": "2020-01-01", "before": registered + 60}}) == 3


REFUSED: list[tuple[str, str, Any, int, str]] = [
    ("POST", "/v1/segments", b"{", 1003, "not valid JSON"),
    ("POST", "/v1/segments", {}, 1002, "name is required"),
    ("POST", "/v1/segments", {"name": "x"}, 1002, "rule is required"),
    ("POST", "/v1/segments", {"name": "", "rule": {"tag": "x"}}, 1003, "name: must be 1 to 255 bytes"),
    ("POST", "/v1/segments", {"name": "ä" * 128, "rule": {"tag": "x"}}, 1003, "name: must be 1 to 255 bytes"),
    ("POST", "/v1/segments", {"name": "x\n", "rule": {"tag": "x"}}, 1003, "printable"),
    ("POST", "/v1/segments", {"name": "x", "rule": {"and": []}}, 1003, "rule.and: must be a list"),
    ("POST", "/v1/segments", {"name": "x", "rule": {"tag": "x"}, "id": "y"}, 1009, "not supported"),
    ("PUT", "/v1/segments/x", {"name": "x", "rule": 1}, 1003, "rule: must be an object"),
    ("POST", "/v1/segments/estimate", {}, 1002, "rule is required"),
    ("POST", "/v1/segments/estimate", {"rule": {"platform": "x"}}, 1003, "rule.platform: must be one of"),
    ("POST", "/v1/audience/estimate", {"platform": "all"}, 1002, "audience is required"),
    ("POST", "/v1/audience/estimate", {"audience": "all"}, 1002, "platform is required"),
    ("POST", "/v1/audience/estimate", {"platform": "all", "audience": {}}, 1003, "names nobody"),
    (
        "POST",
        "/v1/audience/estimate",
        {"platform": "all", "audience": {"segment": ["nothing"]}},
        1003,
        "there is no segment nothing",
    ),
    ("POST", "/v1/audience/estimate", {"platform": "all", "audience": {"file": {"file_id": "no"}}}, 1003, "no file"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "code", "message"), REFUSED)
async def test_what_is_refused(
    service: Any, method: str, path: str, body: Any, code: int, message: str
) -> None:
    answer = await service.call(method, path, body)
    assert (answer.status, answer.code, message in answer.message) == (400, code, True), answer.body
    assert (await service.call("GET", "/v1/segments")).json == {"segments": []}


async def test_an_app_has_so_many_segments_and_none_of_others(start: Any) -> None:
    service = await start(limits=Limits(max_segments=1))
    body = {"name": "x", "rule": {"tag": "x"}}
    assert (await service.call("POST", "/v1/segments", body)).status == 200
    answer = await service.call("POST", "/v1/segments", body)
    assert (answer.status, answer.code) == (400, 1003)
    assert "the app has 1 segments already" in answer.message
    other = await service.apps.create("other")
    listed = await service.call("GET", "/v1/segments", auth=(other.key, other.master_secret))
    assert listed.json == {"segments": []}


async def test_calls_at_once_make_no_more_segments_than_the_limit(start: Any) -> None:
    service = await start(limits=Limits(max_segments=3))
    body = {"name": "x", "rule": {"tag": "x"}}
    answers = await asyncio.gather(*(service.call("POST", "/v1/segments", body) for _ in range(20)))
    assert sorted(answer.status for answer in answers) == [200] * 3 + [400] * 17
    assert len((await service.call("GET", "/v1/segments")).json["segments"]) == 3


async def test_of_two_who_replace_at_once_both_succeed(service: Any) -> None:
    created = await service.call("POST", "/v1/segments", {"name": "x", "rule": {"tag": "x"}})
    path = f"/v1/segments/{created.json['id']}"
    bodies = [{"name": f"n{n}", "rule": {"tag": "x"}} for n in range(4)]
    answers = await asyncio.gather(*(service.call("PUT", path, body) for body in bodies))
    assert [answer.status for answer in answers] == [200] * 4
    assert (await service.call("GET", path)).json["name"] in {body["name"] for body in bodies}
