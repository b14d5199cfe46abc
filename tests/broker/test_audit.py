"""The audit log: who did what, from where, to what, and how it ended."""

from __future__ import annotations

from typing import Any

import pytest

from broker.admin import LocalActions
from broker.errors import ApiError
from broker.limits import Limits
from broker.tenants.audit import MAX_TEXT, Audit


async def _entries(service: Any, query: str = "", **options: Any) -> list[dict[str, Any]]:
    answer = await service.call("GET", f"/v1/audit{query}", **options)
    assert answer.status == 200, answer.body
    entries: list[dict[str, Any]] = answer.json["entries"]
    return entries


async def test_calls_of_the_owner_are_recorded(service: Any) -> None:
    made = (await service.call("POST", "/v1/keys", {"name": "ops", "scopes": ["admin"]})).json
    auth = (service.app.key, made["secret"])
    await service.call("PUT", "/v1/settings", {"frequency_caps": [{"count": 0}]}, auth=auth)
    await service.call("DELETE", "/v1/keys/0123", auth=auth)
    await service.call("DELETE", f"/v1/keys/{made['id']}", auth=auth)
    entries = await _entries(service)
    assert all((entry["at"], entry["address"]) == (service.now, "127.0.0.1") for entry in entries)
    assert [tuple(e[name] for name in ("actor", "action", "subject", "outcome")) for e in entries] == [
        (f"key {made['id']} ops", "key.delete", f"{made['id']} ops", "done"),
        (f"key {made['id']} ops", "key.delete", "0123", "there is no key 0123"),
        (f"key {made['id']} ops", "settings.set", "", "frequency_caps[0].count = 0: must be 1 to 1000"),
        ("master", "key.create", f"{made['id']} ops: admin", "done"),
    ]
    assert made["secret"] not in str(entries)


async def test_what_takes_something_away_is_recorded(service: Any) -> None:
    await service.register("a", alias="ann", tags=["red"])
    await service.call("DELETE", "/v3/tags/red")
    await service.call("DELETE", "/v3/aliases/ann")
    await service.call("DELETE", "/v1/devices/a/token")
    await service.call("DELETE", "/v3/push/1")
    await service.call("DELETE", "/v1/callbacks/parked")
    assert [(entry["action"], entry["subject"]) for entry in await _entries(service)] == [
        ("callback.drop", ""),
        ("push.withdraw", "1"),
        ("token.revoke", "a"),
        ("alias.delete", "ann"),
        ("tag.delete", "red"),
    ]


async def test_what_is_taken_from_listed_devices_is_recorded(service: Any) -> None:
    await service.register("a", alias="ann", tags=["red"])
    both = {"registration_ids": {"remove": ["a"]}}
    await service.call("POST", "/v3/tags/red", {"registration_ids": {"add": ["a"]}})
    await service.call("POST", "/v3/tags/red", both)
    await service.call("POST", "/v3/aliases/ann", both)
    assert [(entry["action"], entry["subject"]) for entry in await _entries(service)] == [
        ("alias.remove", "ann"),
        ("tag.remove", "red from 1 devices"),
    ]


async def test_a_token_of_a_device_that_was_there_is_recorded(service: Any) -> None:
    """Who has it is that device."""
    device = (service.app.key, service.app.device_key)
    token = (await service.call("POST", "/v1/devices", {"registration_id": "a"}, auth=device)).json["token"]
    await service.call("POST", "/v1/devices/a/token", {"token": token}, auth=device)
    await service.call("POST", "/v1/devices", {"registration_id": "b"})
    assert await _entries(service) == []
    await service.call("POST", "/v1/devices", {"registration_id": "a"})
    await service.call("POST", "/v1/devices/a/token")
    devices = [{"registration_id": name} for name in ("a", "b", "c")]
    await service.call("POST", "/v1/devices/import", {"devices": devices})
    assert [(entry["action"], entry["subject"]) for entry in await _entries(service)] == [
        ("device.issue_token", "a, b"),
        ("device.issue_token", "a"),
        ("device.issue_token", "a"),
    ]


async def test_settings_that_changed_are_named(service: Any) -> None:
    await service.call("PUT", "/v1/settings", {"allow_from": ["127.0.0.1"], "frequency_caps": [{"count": 9}]})
    await service.call("PUT", "/v1/settings", {"frequency_caps": [{"count": 9}]})
    actions = LocalActions(service.broker, 100)
    await actions.set_settings(service.app.key, {"limits": {"push_rate": None, "max_ids": 5}})
    assert [entry["subject"] for entry in await _entries(service)] == [
        f"{service.app.key} frequency_caps, limits.max_ids, limits.push_rate",
        "allow_from",
        "allow_from, frequency_caps",
    ]


async def test_who_may_not_fills_no_log(start: Any) -> None:
    service = await start(limits=Limits(push_rate=4))
    service.now = service.now // 60 * 60
    made = (await service.call("POST", "/v1/keys", {"name": "push", "scopes": ["push"]})).json
    for minute in range(2):
        service.now += 60 * minute
        for n in range(3):
            await service.call("DELETE", f"/v1/keys/{n}", auth=(service.app.key, made["secret"]))
    seen = await _entries(service)
    assert [(entry["action"], entry["subject"]) for entry in seen[:-1]] == [("key.delete", "0")] * 2
    for _ in range(5):
        await service.call("PUT", "/v1/settings", {})
    service.now += 60
    assert [entry["action"] for entry in await _entries(service)].count("settings.set") == 0, "2002"


async def test_reading_is_no_deed(service: Any) -> None:
    for path in ("/v1/keys", "/v1/settings", "/v1/audit", "/v3/tags"):
        await service.call("GET", path)
    assert await _entries(service) == []


async def test_a_caller_who_may_not_is_recorded_and_a_stranger_is_not(service: Any) -> None:
    made = (await service.call("POST", "/v1/keys", {"name": "push", "scopes": ["push"]})).json
    settings = ("PUT", "/v1/settings", {})
    await service.call(*settings, auth=(service.app.key, made["secret"]))
    await service.call(*settings, auth=(service.app.key, "wrong"))
    await service.call(*settings, auth=None)
    await service.call(*settings, auth=(service.app.key, service.app.device_key))
    refused, created = await _entries(service)
    assert created["action"] == "key.create"
    assert (refused["actor"], refused["action"]) == (f"key {made['id']} push", "settings.set")
    assert refused["outcome"] == "the API key needs the scope admin, it has push"


async def test_an_app_sees_its_own_entries_page_by_page(service: Any) -> None:
    other = await service.apps.create("other")
    auth = (other.key, other.master_secret)
    await service.call("PUT", "/v1/settings", {}, auth=auth)
    for _ in range(5):
        await service.call("PUT", "/v1/settings", {})
    assert len(await _entries(service, auth=auth)) == 1
    first = (await service.call("GET", "/v1/audit?limit=3")).json
    assert (len(first["entries"]), first["before"]) == (3, first["entries"][-1]["id"])
    second = (await service.call("GET", f"/v1/audit?limit=3&before={first['before']}")).json
    assert (len(second["entries"]), second["before"]) == (2, 0)
    ids = [entry["id"] for entry in first["entries"] + second["entries"]]
    assert ids == sorted(set(ids), reverse=True)


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "before=-1", f"before={2**63}"])
async def test_a_wrong_page_is_refused(service: Any, query: str) -> None:
    answer = await service.call("GET", f"/v1/audit?{query}")
    assert (answer.status, answer.code) == (400, 1003)


async def test_calls_of_the_operator_are_recorded(service: Any) -> None:
    actions = LocalActions(service.broker, 100).by("admin", "192.0.2.1")
    made: Any = await actions.create_app("Shop", open=False)
    key = made["app_key"]
    await actions.rotate_secret(key)
    await actions.set_access(key, [])
    with pytest.raises(ApiError):
        await actions.set_settings(key, {"limits": {"x": 1}})
    await actions.issue_token(key, "phone-1")
    group: Any = await actions.create_group({"name": "all", "apps": [key]})
    await actions.change_group(group["group_key"], {"name": "both"})
    await actions.delete_group(group["group_key"])
    await actions.delete_app(key)
    with pytest.raises(ApiError):
        await actions.delete_app(key)
    page: Any = await actions.list_audit(None, None, None)
    entries = page["entries"]
    assert {(entry["actor"], entry["address"]) for entry in entries} == {("admin", "192.0.2.1")}
    assert [(entry["action"], entry["subject"]) for entry in reversed(entries)] == [
        ("app.create", f"{key} Shop"),
        ("app.rotate_secret", key),
        ("app.set_access", f"{key} 0 rules"),
        ("app.set_settings", key),
        ("device.issue_token", f"{key} phone-1"),
        ("group.create", f"{group['group_key']} all: {key}"),
        ("group.change", f"{group['group_key']} both: {key}"),
        ("group.delete", f"{group['group_key']} both: {key}"),
        ("app.delete", f"{key} Shop"),
        ("app.delete", key),
    ]
    assert entries[0]["outcome"] == f"there is no app {key}"
    assert entries[6]["outcome"].startswith("limits.x: there is no such limit")
    assert {entry["app_key"] for entry in entries} == {None}  # the app is gone


async def test_the_operator_sees_which_app(service: Any) -> None:
    actions = LocalActions(service.broker, 100)
    await service.call("PUT", "/v1/settings", {})
    other: Any = await actions.create_app("Shop", open=False)
    page: Any = await actions.list_audit(None, None, "10")
    assert [(e["app_key"], e["actor"]) for e in page["entries"]] == [
        (other["app_key"], "local"),
        (service.app.key, "master"),
    ]
    page = await actions.list_audit(service.app.key, None, None)
    assert [entry["action"] for entry in page["entries"]] == ["settings.set"]
    with pytest.raises(ApiError, match="there is no app nope"):
        await actions.list_audit("nope", None, None)


async def test_a_row_does_not_tell_a_terminal_what_to_do(service: Any) -> None:
    await service.call("DELETE", "/v3/tags/%1B%5B2Jred")
    (entry,) = await _entries(service)
    assert entry["subject"] == "\ufffd[2Jred"


async def test_a_row_is_bounded(service: Any) -> None:
    await service.broker.audit.record(0, "admin", "", "x", "y" * 10_000, "z" * 10_000)
    ((_, entry),) = await service.broker.audit.entries(None)
    assert (len(entry.subject), len(entry.outcome)) == (MAX_TEXT, MAX_TEXT)


async def test_a_deed_stands_though_the_log_does_not_take_it(
    service: Any, caplog: pytest.LogCaptureFixture
) -> None:
    audit = Audit(service.store)
    await service.store.close()
    async with audit.deed("admin", "", "app.create", "Shop"):
        pass
    assert "not in the audit log: admin app.create Shop" in caplog.text
