"""App groups: one push to several apps, each with its own result."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from broker.errors import ApiError
from broker.limits import Limits
from broker.model import App, AppSettings, NewDevice

HELLO: dict[str, Any] = {"platform": "all", "audience": "all", "notification": {"alert": "hi"}}


async def _group(service: Any, *apps: App, name: str = "all") -> Any:
    raw = orjson.dumps({"name": name, "apps": [app.key for app in apps]})
    return await service.broker.groups.create(raw)


async def _push(service: Any, group: Any, body: object = HELLO, path: str = "/v3/grouppush") -> Any:
    return await service.call("POST", path, body, auth=(f"group-{group.key}", group.secret))


async def _other(service: Any, name: str = "other", *devices: NewDevice) -> App:
    app: App = await service.apps.create(name)
    await service.store.register(app.app_id, devices)
    return app


async def test_each_app_gets_the_push_and_answers(service: Any) -> None:
    await service.register("a")
    other = await _other(service, "other", NewDevice("b"), NewDevice("c"))
    group = await _group(service, service.app, other)
    answer = await _push(service, group, HELLO | {"options": {"sendno": 7}})
    assert answer.status == 200
    assert answer.json.keys() == {"group_msgid", service.app.key, other.key}
    assert isinstance(answer.json["group_msgid"], str)
    for app, targets in ((service.app, 1), (other, 2)):
        row = answer.json[app.key]
        assert (row.keys(), row["sendno"]) == ({"sendno", "msg_id"}, "7")
        msg_id = int(row["msg_id"])
        (record,) = (await service.store.find_messages(app.app_id, [msg_id])).values()
        assert len(record.targets) == targets
    assert answer.headers["X-Rate-Limit-Quota"]


async def test_audiences_are_resolved_in_each_app(service: Any) -> None:
    await service.register("a", alias="ann", tags=["red"])
    other = await _other(
        service, "other", NewDevice("a", tags=frozenset({"blue"})), NewDevice("z", alias="ann")
    )
    group = await _group(service, service.app, other)
    for audience, reached in (
        ({"registration_id": ["a"]}, {service.app.key, other.key}),
        ({"alias": ["ann"]}, {service.app.key, other.key}),
        ({"tag": ["red"]}, {service.app.key}),
        ({"registration_id": ["z"]}, {other.key}),
    ):
        answer = await _push(service, group, HELLO | {"audience": audience})
        assert answer.status == 200
        assert {key for key in answer.json if "msg_id" in answer.json[key]} == reached, audience
        missed = {service.app.key, other.key} - reached
        assert all(answer.json[key]["error"]["code"] == 1011 for key in missed)


async def test_a_cid_makes_a_retry_safe(service: Any) -> None:
    await service.register("a")
    other = await _other(service, "other", NewDevice("b"))
    group = await _group(service, service.app, other)
    first = await _push(service, group, HELLO | {"cid": "x"})
    assert (await _push(service, group, HELLO | {"cid": "x"})).json == first.json
    again = await _push(service, group, HELLO | {"cid": "y"})
    assert not set(map(str, again.json.values())) & set(map(str, first.json.values()))


async def test_where_no_app_takes_it_the_status_is_an_error(service: Any) -> None:
    other = await _other(service)
    group = await _group(service, service.app, other)
    answer = await _push(service, group)
    assert (answer.status, answer.code) == (400, 1011)
    assert {answer.json[app.key]["error"]["code"] for app in (service.app, other)} == {1011}
    for body, code in ((b"{", 1003), (b"[]", 1003), ({}, 1002), (HELLO | {"notification": {"x": 1}}, 1009)):
        answer = await _push(service, group, body)
        assert (answer.status, answer.code) == (400, code)
    answer = await _push(service, await _group(service))
    assert (answer.status, answer.code, "has no apps" in answer.message) == (400, 1011, True)


async def test_an_app_that_may_not_push_does_not_hold_up_the_others(service: Any) -> None:
    await service.register("a")
    far = await _other(service, "far", NewDevice("b"))
    gone = await _other(service, "gone", NewDevice("b"))
    group = await _group(service, service.app, far, gone)
    await service.apps.set_settings(far.key, AppSettings(allow_from=("192.0.2.0/24",)))
    await service.apps.delete(gone.key)
    answer = await _push(service, group)
    assert answer.status == 200
    assert "msg_id" in answer.json[service.app.key]
    assert answer.json[far.key]["error"]["code"] == 2004
    assert answer.json[gone.key]["error"]["code"] == 1008


async def test_only_the_groups_secret_opens_it(service: Any) -> None:
    group = await _group(service, service.app)
    other = await _group(service, service.app)
    user = f"group-{group.key}"
    for auth in (
        None,
        (user, ""),
        (user, other.secret),
        (user, service.app.master_secret),
        (group.key, group.secret),
        ("group-x", group.secret),
        (service.app.key, service.app.master_secret),
    ):
        answer = await service.call("POST", "/v3/grouppush", HELLO, auth=auth)
        assert (answer.status, answer.code) == (401, 1004), auth
    answer = await service.call("POST", "/v3/push", HELLO, auth=(user, group.secret))
    assert (answer.status, answer.code) == (401, 1004)


async def test_groups_have_a_rate_of_their_own(start: Any) -> None:
    service = await start(limits=Limits(push_rate=1))
    await service.register("a")
    others = await _other(service, "other", NewDevice("b"))
    group, other = await _group(service, service.app), await _group(service, others)
    assert (await _push(service, group)).status == 200
    answer = await _push(service, group)
    assert (answer.status, answer.code) == (429, 2002)
    assert (await _push(service, other)).status == 200


async def test_a_group_push_counts_against_the_rate_of_each_app(start: Any) -> None:
    service = await start()
    await service.register("a")
    others = await _other(service, "other", NewDevice("b"))
    await service.apps.set_settings(service.app.key, AppSettings(limits={"push_rate": 2}))
    group = await _group(service, service.app, others)
    assert (await service.call("POST", "/v3/push", HELLO)).status == 200
    answers = [(await _push(service, group)).json for _ in range(2)]
    assert ["error" in answer[service.app.key] for answer in answers] == [False, True]
    assert answers[1][service.app.key]["error"]["code"] == 2002
    assert not any("error" in answer[others.key] for answer in answers)
    assert (await service.call("POST", "/v3/push", HELLO)).status == 429


# Managing them


async def test_a_group_is_made_changed_listed_and_deleted(service: Any) -> None:
    groups, other = service.broker.groups, await _other(service)
    group = await _group(service, service.app)
    assert (group.name, group.apps) == ("all", (service.app.key,))
    changed = await groups.change(group.key, orjson.dumps({"apps": [other.key, other.key]}))
    assert (changed.name, changed.apps, changed.secret) == ("all", (other.key,), group.secret)
    renamed = await groups.change(group.key, b'{"name": "both"}')
    assert (renamed.name, renamed.apps) == ("both", (other.key,))
    assert await groups.every() == [renamed]
    assert await groups.delete(group.key) == renamed
    assert await groups.every() == []
    assert (await _push(service, group)).status == 401


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"apps": []}, 1002, "name is required"),
    ({"name": ""}, 1003, "name: must be 1 to 200 printable characters"),
    ({"name": "x", "apps": ["nope"]}, 1008, "apps: there is no app nope"),
    ({"name": "x", "apps": "all"}, 1003, "apps: expected array"),
    ({"name": "x", "secret": "mine"}, 1003, "secret: this key is not supported"),
    ({"name": "x", "apps": ["a"] * 101}, 1003, "apps: at most 100 in a group, got 101"),
]


@pytest.mark.parametrize(("body", "code", "message"), WRONG)
async def test_a_wrong_group_is_refused_with_the_reason(
    service: Any, body: dict[str, Any], code: int, message: str
) -> None:

    with pytest.raises(ApiError) as error:
        await service.broker.groups.create(orjson.dumps(body))
    assert (error.value.code, message in error.value.message) == (code, True), error.value.message
    for method in (service.broker.groups.delete, lambda key: service.broker.groups.change(key, b"{}")):
        with pytest.raises(ApiError, match="there is no group nope"):
            await method("nope")


async def test_there_are_so_many_groups(start: Any) -> None:

    service = await start(limits=Limits(max_groups=1))
    await _group(service)
    with pytest.raises(ApiError, match="there are 1 groups already"):
        await _group(service)
