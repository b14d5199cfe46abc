"""API keys over real sockets: scopes, networks, expiry, revocation."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from broker.api.http import api_endpoints
from broker.bus import CredentialsChanged
from broker.limits import Limits
from broker.model import AppSettings
from broker.tenants.apps import Apps
from broker.tenants.keys import SCOPES, find_key

HELLO: dict[str, Any] = {"platform": "all", "audience": "all", "notification": {"alert": "hi"}}


async def _create(service: Any, *scopes: str, **more: Any) -> dict[str, Any]:
    answer = await service.call("POST", "/v1/keys", {"name": "backend", "scopes": list(scopes), **more})
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json
    return found


def _auth(service: Any, key: dict[str, Any]) -> tuple[str, str]:
    return service.app.key, key["secret"]


async def test_a_key_is_shown_with_its_secret_once(service: Any) -> None:
    made = await _create(
        service, "report", "push", expires_at=int(service.now) + 60, allow_from=["10.0.0.0/8"]
    )
    assert made["secret"].startswith(f"hk{made['id']}")
    assert len(made["secret"]) == 2 + 16 + 48
    assert re.match("^[a-zA-Z0-9]{24}", made["secret"]), "as the vendor's Node SDK checks it"
    listed = (await service.call("GET", "/v1/keys")).json["keys"]
    assert listed == [{name: value for name, value in made.items() if name != "secret"}]
    assert listed == [
        {
            "id": made["id"],
            "name": "backend",
            "scopes": ["push", "report"],
            "allow_from": ["10.0.0.0/8"],
            "created_at": int(service.now),
            "expires_at": int(service.now) + 60,
        }
    ]


async def test_the_secret_is_not_in_the_store(service: Any) -> None:
    made = await _create(service, "push")
    (record,) = await service.store.records.list(service.app.app_id, "key")
    assert made["secret"].encode() not in record.value
    assert made["secret"][18:].encode() not in record.value


async def test_a_key_is_good_for_its_scopes_and_nothing_else(service: Any) -> None:
    await service.register("a")
    push = _auth(service, await _create(service, "push"))
    report = _auth(service, await _create(service, "report"))
    assert (await service.call("POST", "/v3/push", HELLO, auth=push)).status == 200
    assert (await service.call("GET", "/v3/received?msg_ids=1", auth=report)).status == 200
    for method, path, auth, code, needs in (
        ("GET", "/v3/received?msg_ids=1", push, 3001, "report"),
        ("GET", "/v3/tags", push, 7004, "device"),
        ("GET", "/v1/keys", push, 1004, "admin"),
        ("PUT", "/v1/settings", push, 1004, "admin"),
        ("POST", "/v3/push", report, 1004, "push"),
    ):
        answer = await service.call(method, path, auth=auth)
        assert (answer.status, answer.code) == (403, code), path
        assert f"needs the scope {needs}" in answer.message


async def test_each_endpoint_needs_one_scope_that_there_is(service: Any) -> None:
    needed = {endpoint.needs for endpoint in api_endpoints(service.broker) if endpoint.who == "app"}
    assert needed <= set(SCOPES)
    assert needed >= {"push", "report", "device", "admin"}


async def test_the_scope_admin_may_make_keys(service: Any) -> None:
    admin = _auth(service, await _create(service, "admin"))
    answer = await service.call("POST", "/v1/keys", {"name": "x", "scopes": ["push"]}, auth=admin)
    assert answer.status == 200


async def test_a_deleted_key_stops_at_once_everywhere(service: Any) -> None:
    made = await _create(service, "push")
    auth = _auth(service, made)
    elsewhere = Apps(service.store, service.bus)
    assert (await service.call("GET", "/v3/push/cid", auth=auth)).status == 200
    header = _basic(*auth)
    assert await elsewhere.login(header) is not None
    assert elsewhere.peek_login(header) is not None
    assert (await service.call("DELETE", f"/v1/keys/{made['id']}")).status == 200
    answer = await service.call("GET", "/v3/push/cid", auth=auth)
    assert (answer.status, answer.code) == (401, 1004)
    while not isinstance(bell := await service.doorbell(), CredentialsChanged) or bell.devnos is not None:
        pass
    assert elsewhere.peek_login(header) is None
    assert await elsewhere.login(header) is None
    elsewhere.close()
    answer = await service.call("DELETE", f"/v1/keys/{made['id']}")
    assert (answer.status, answer.code) == (404, 1003)


def _basic(user: str, password: str) -> str:
    from base64 import b64encode

    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()


async def test_a_key_ends_at_its_time_though_its_login_is_remembered(service: Any) -> None:
    auth = _auth(service, await _create(service, "push", expires_at=int(service.now) + 60))
    assert (await service.call("GET", "/v3/push/cid", auth=auth)).status == 200
    service.now += 60
    answer = await service.call("GET", "/v3/push/cid", auth=auth)
    assert (answer.status, answer.code, answer.message) == (401, 1004, "the API key has expired")


async def test_a_key_is_good_from_its_networks_only(service: Any) -> None:
    near = _auth(service, await _create(service, "push", allow_from=["127.0.0.1"]))
    far = _auth(service, await _create(service, "push", allow_from=["192.0.2.0/24", "2001:db8::/32"]))
    assert (await service.call("GET", "/v3/push/cid", auth=near)).status == 200
    answer = await service.call("GET", "/v3/push/cid", auth=far)
    assert (answer.status, answer.code) == (403, 2004)
    assert "127.0.0.1" in answer.message


async def test_a_key_is_of_one_app(service: Any) -> None:
    made = await _create(service, "push")
    other = await service.apps.create("other")
    answer = await service.call("GET", "/v3/push/cid", auth=(other.key, made["secret"]))
    assert (answer.status, answer.code) == (401, 1004)
    answer = await service.call("DELETE", f"/v1/keys/{made['id']}", auth=(other.key, other.master_secret))
    assert answer.status == 404


async def test_what_is_almost_a_secret_is_none(service: Any) -> None:
    secret = (await _create(service, "push"))["secret"]
    for wrong in (secret[:-1], secret + "x", secret.upper(), f"hk{'0' * 16}{secret[18:]}", "hk", "hk_x_y"):
        assert await find_key(service.store, service.app, wrong.encode()) is None
    assert await find_key(service.store, service.app, secret.encode()) is not None


async def test_an_app_has_so_many_keys(start: Any) -> None:
    service = await start(limits=Limits(max_keys=2))
    for _ in range(2):
        await _create(service, "push")
    answer = await service.call("POST", "/v1/keys", {"name": "x", "scopes": ["push"]})
    assert (answer.status, answer.code) == (400, 1003)
    assert "2 keys already" in answer.message


async def test_calls_at_once_make_no_more_keys_than_the_limit(start: Any) -> None:
    service = await start(limits=Limits(max_keys=3))
    body = {"name": "x", "scopes": ["push"]}
    answers = await asyncio.gather(*(service.call("POST", "/v1/keys", body) for _ in range(20)))
    assert sorted(answer.status for answer in answers) == [200] * 3 + [400] * 17


async def test_keys_beyond_a_limit_that_was_lowered_are_listed(start: Any) -> None:
    service = await start(limits=Limits(max_keys=2))
    app = await service.apps.set_settings(service.app.key, AppSettings(limits={"max_keys": 5}))
    made = {(await _create(service, "push"))["id"] for _ in range(5)}
    await service.apps.set_settings(app.key, AppSettings())
    listed = (await service.call("GET", "/v1/keys")).json["keys"]
    assert {key["id"] for key in listed} == made


WRONG: list[tuple[object, int, str]] = [
    ({"scopes": ["push"]}, 1002, "name is required"),
    ({"name": "x"}, 1002, "scopes is required"),
    ({"name": " ", "scopes": ["push"]}, 1003, "name: must be 1 to 200"),
    ({"name": "a\nb", "scopes": ["push"]}, 1003, "name: must be 1 to 200"),
    ({"name": "x" * 201, "scopes": ["push"]}, 1003, "name: must be 1 to 200"),
    ({"name": "x", "scopes": []}, 1003, "scopes: one or more of push, report"),
    ({"name": "x", "scopes": ["push", "all"]}, 1003, "not 'all'"),
    ({"name": "x", "scopes": ["push"], "expires_at": 1}, 1003, "expires_at: must be Unix time in the future"),
    ({"name": "x", "scopes": ["push"], "expires_at": 1 << 50}, 1003, "expires_at"),
    ({"name": "x", "scopes": ["push"], "expires_at": "soon"}, 1003, "expires_at: expected"),
    ({"name": "x", "scopes": ["push"], "allow_from": ["10.0.0.1/8"]}, 1003, "has host bits set"),
    ({"name": "x", "scopes": ["push"], "secret": "mine"}, 1003, "secret: this key is not supported"),
    (b"{", 1003, "not valid JSON"),
]


@pytest.mark.parametrize(("body", "code", "message"), WRONG)
async def test_a_wrong_key_is_refused_with_the_reason(
    service: Any, body: object, code: int, message: str
) -> None:
    answer = await service.call("POST", "/v1/keys", body)
    assert (answer.status, answer.code, message in answer.message) == (400, code, True), answer.body
    assert (await service.call("GET", "/v1/keys")).json == {"keys": []}
