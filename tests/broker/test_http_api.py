"""The public API over real sockets: one shape for every failure, whatever the path."""

from __future__ import annotations

import asyncio
import gzip
import logging
import zlib
from typing import Any
from urllib.parse import quote

import orjson
import pytest

from broker.limits import NO_LIMIT, Limits
from broker.model import AppSettings
from tests.patience import PATIENCE

HELLO: dict[str, Any] = {"platform": "all", "audience": "all", "notification": {"alert": "hi"}}
ITEM: dict[str, Any] = {"platform": "all", "target": "a", "notification": {"alert": "hi"}}
RATE_HEADERS = {"X-Rate-Limit-Quota", "X-Rate-Limit-Remaining", "X-Rate-Limit-Reset"}


def _ids(count: int) -> list[str]:
    return [f"d{n}" for n in range(count)]


REFUSED: list[tuple[str, str, object, int, int, str]] = [
    # method, path, body, status, code, what the message says
    ("GET", "/", None, 404, 1003, "no such path"),
    ("POST", "/v3/pushes", {}, 404, 1003, "no such path"),
    ("POST", "/v1/push/", HELLO, 404, 1003, "no such path"),
    ("GET", "/v1/settings/x", None, 404, 1003, "no such path"),
    ("DELETE", "/v3/push/cid", None, 405, 1001, "DELETE is not supported here, only GET"),
    ("GET", "/v3/devices/status", None, 405, 7002, "GET is not supported here, only POST"),
    ("GET", "/v3/devices/a/b", None, 404, 7002, "no such path"),
    ("GET", "/v3/report/x", None, 404, 3004, "no such path"),
    ("GET", "/%ff%00", None, 404, 1003, "no such path"),
    ("GET", "/v3/push", None, 405, 1001, "GET is not supported here, only POST"),
    ("HEAD", "/v3/push", None, 405, 0, ""),
    ("DELETE", "/v3/devices/a", None, 405, 7002, "DELETE is not supported here, only GET, POST"),
    ("POST", "/v3/received", {}, 405, 3004, "POST is not supported here, only GET"),
    ("POST", "/v3/push", None, 400, 1003, "not valid JSON"),
    ("POST", "/v3/push", b"{not json", 400, 1003, "not valid JSON"),
    ("POST", "/v3/push", b"\xff\xfe\x00", 400, 1003, "not valid JSON"),
    ("POST", "/v3/push", b'{"platform":"\xff"}', 400, 1003, "UTF-8"),
    ("POST", "/v3/push", b"platform=all&audience=all", 400, 1003, "not valid JSON"),
    ("POST", "/v3/push", [], 400, 1003, "expected object, got array"),
    ("POST", "/v3/push", {}, 400, 1002, "platform is required"),
    ("POST", "/v3/push", HELLO | {"platform": 1}, 400, 1003, "platform: expected"),
    ("POST", "/v3/push", HELLO | {"notification": {"x": 1}}, 400, 1009, "notification.x"),
    ("POST", "/v3/push", HELLO | {"audience": {"tag": ["x" * 41]}}, 400, 1003, "at most 40 bytes"),
    ("POST", "/v3/push", HELLO | {"audience": {"registration_id": _ids(1001)}}, 400, 1003, "at most 1000"),
    ("POST", "/v3/push", HELLO | {"audience": {"alias": _ids(1001)}}, 400, 1003, "at most 1000"),
    ("POST", "/v3/push", HELLO | {"options": {"time_to_live": -1}}, 400, 1003, "time_to_live"),
    ("POST", "/v3/push", HELLO | {"message": {"msg_content": "x" * 5000}}, 400, 1005, "at most 4000 bytes"),
    ("POST", "/v3/push", HELLO, 400, 1011, "no target"),
    ("POST", "/v3/push", b" " * 10_000_000, 413, 1005, "larger than 1048576 bytes"),
    ("POST", "/v3/push/validate", HELLO | {"audience": 1}, 400, 1003, "audience: expected"),
    ("POST", "/v3/push/validate", HELLO, 400, 1011, "no target"),
    ("GET", "/v3/push/cid?count=0", None, 400, 1003, "count: must be 1 to 1000"),
    ("GET", "/v3/push/cid?count=1001", None, 400, 1003, "count: must be 1 to 1000"),
    ("GET", "/v3/push/cid?count=x", None, 400, 1003, "count: must be 1 to 1000"),
    ("GET", "/v3/push/cid?type=x", None, 400, 1003, "type: must be push or schedule"),
    ("POST", "/v3/push/batch/regid/single", {"pushlist": {}}, 400, 1002, "at least one"),
    ("POST", "/v3/push/batch/alias/single", {"pushlist": {"c": ITEM}}, 400, 1011, "no target"),
    ("POST", "/v3/push/batch/regid/single", b" " * 8_388_609, 413, 1005, "larger than 8388608 bytes"),
    ("GET", "/v3/devices/nobody", None, 400, 7002, "no such device in this app: nobody"),
    ("POST", "/v3/devices/nobody", {"alias": "x"}, 400, 7002, "no such device"),
    ("POST", "/v3/device/nobody", {"alias": 1}, 400, 7002, "alias: expected"),
    ("POST", "/v3/devices/status", {"registration_ids": _ids(1001)}, 400, 7013, "at most 1000"),
    ("POST", "/v3/devices/status", {}, 400, 7002, "registration_ids is required"),
    ("POST", "/v3/device/status", b" " * 2_000_000, 413, 7002, "larger than"),
    ("GET", "/v3/aliases/x?platform=symbian", None, 400, 7002, "platform: must be one of"),
    ("POST", "/v3/aliases/x", {"registration_ids": {"set": []}}, 400, 7002, "registration_ids.set"),
    ("POST", "/v3/tags/x", {"registration_ids": {"add": ["nobody"]}}, 400, 7002, "nobody"),
    ("POST", "/v3/tags/x", {"registration_ids": {"add": _ids(1001)}}, 400, 7013, "at most 1000"),
    ("POST", f"/v3/tags/{'x' * 41}", {"registration_ids": {"add": ["a"]}}, 400, 7002, "at most 40 bytes"),
    ("GET", "/v3/tags/x/registration_ids/nobody", None, 400, 7002, "no such device"),
    ("GET", "/v3/received", None, 400, 3004, "msg_ids is required"),
    ("GET", "/v3/report/received?msg_ids=x", None, 400, 3004, "positive integer"),
    ("GET", "/v3/received/detail?msg_ids=" + ",".join(["1"] * 101), None, 400, 3004, "at most 100"),
    ("POST", "/v3/status/message", {"msg_id": 1, "registration_ids": _ids(1001)}, 400, 3004, "at most 1000"),
    (
        "POST",
        "/v3/report/status/message",
        {"msg_id": 1, "registration_ids": ["a"]},
        400,
        3004,
        "not a message",
    ),
    ("POST", "/v1/devices", {"platform": "symbian"}, 400, 7002, "platform: must be one of android"),
    ("POST", "/v1/devices", {"os": "ios"}, 400, 7002, "os: this key is not supported"),
    ("POST", "/v1/devices", {"tags": "x"}, 400, 7002, "tags: expected array"),
    ("POST", "/v1/devices", {"registration_id": "x" * 65}, 400, 7002, "1 to 64 bytes"),
    ("POST", "/v1/devices/nobody/token", None, 400, 7002, "no such device"),
    ("DELETE", "/v1/devices/nobody/token", None, 400, 7002, "no such device"),
    ("GET", "/v1/events?limit=0", None, 400, 3004, "limit: must be an integer from 1 to 1000"),
]


async def test_every_refusal_says_code_status_and_what_is_allowed(service: Any) -> None:
    for method, path, body, status, code, message in REFUSED:
        answer = await service.call(method, path, body)
        where = (method, path, answer.body)
        assert answer.status == status, where
        assert answer.headers["Content-Type"] == "application/json", where
        assert answer.headers.keys() >= RATE_HEADERS, where
        if method != "HEAD":
            assert (answer.code, message in answer.message) == (code, True), where
    counted = sum(service.counters.requests.values())
    assert counted == len(REFUSED)
    assert service.counters.requests["/v3/push", 413] == 1
    assert service.counters.requests["unknown", 404] == 7


@pytest.mark.parametrize(
    ("path", "missing", "wrong"),
    [("/v3/push/cid", 1004, 1004), ("/v3/received?msg_ids=1", 3001, 3001), ("/v3/tags", 7001, 7004)],
)
async def test_whoever_proves_nothing_gets_401(service: Any, path: str, missing: int, wrong: int) -> None:
    key, device_key = service.app.key, service.app.device_key
    other = await service.apps.create("other")
    for auth, code in (
        (None, missing),
        (("x", "y"), wrong),
        ((key, ""), wrong),
        ((key, device_key), wrong),
        ((key, other.master_secret), wrong),
        ((other.key, service.app.master_secret), wrong),
    ):
        answer = await service.call("GET", path, auth=auth)
        assert (answer.status, answer.code) == (401, code), auth
        assert answer.headers["WWW-Authenticate"].startswith("Basic")
    for header in ("Bearer x", "Basic ###", "Basic"):
        answer = await service.call("GET", path, auth=None, headers={"Authorization": header})
        assert (answer.status, answer.code) == (401, wrong)
    assert (await service.call("GET", path)).status == 200


async def test_a_push_is_answered_with_two_strings(service: Any) -> None:
    await service.register("a")
    answer = await service.call("POST", "/v3/push", HELLO)
    assert (answer.status, answer.json["sendno"], answer.json["msg_id"].isdigit()) == (200, "0", True)
    answer = await service.call("POST", "/v3/push", HELLO | {"options": {"sendno": 17}})
    assert answer.json["sendno"] == "17"
    wrong = HELLO | {"options": {"sendno": 18}, "platform": "x"}
    assert (await service.call("POST", "/v3/push", wrong)).json["sendno"] == "18"
    answer = await service.call("POST", "/v3/push/validate", HELLO)
    assert (answer.status, answer.json) == (200, {"sendno": "0", "msg_id": "0"})


async def test_cids_make_a_retry_safe(service: Any) -> None:
    await service.register("a")
    cids = (await service.call("GET", "/v3/push/cid?count=1000&type=push")).json["cidlist"]
    assert len(set(cids)) == 1000
    assert all(cid.startswith(service.app.key + "-") for cid in cids)
    first = await service.call("POST", "/v3/push", HELLO | {"cid": cids[0]})
    assert (await service.call("POST", "/v3/push", HELLO | {"cid": cids[0]})).body == first.body


async def test_a_batch_answers_200_unless_nothing_was_accepted(service: Any) -> None:
    await service.register("a")
    mixed = {"pushlist": {"c1": ITEM, "c2": ITEM | {"target": "b"}}}
    answer = await service.call("POST", "/v3/push/batch/regid/single", mixed)
    assert answer.status == 200
    assert answer.json["c1"]["msg_id"].isdigit()
    assert answer.json["c2"]["error"]["code"] == 1011
    wrong = {"pushlist": {"c3": ITEM | {"target": "b"}, "c4": 1}}
    answer = await service.call("POST", "/v3/push/batch/regid/single", wrong)
    assert answer.status == 400
    assert {cid: answer.json[cid]["error"]["code"] for cid in ("c3", "c4")} == {"c3": 1011, "c4": 1003}
    assert answer.code in {1003, 1011}


async def test_a_body_may_come_in_pieces_or_compressed_but_not_without_end(start: Any) -> None:
    service = await start(limits=Limits(max_body=10_000, max_batch_body=10_000))
    await service.register("a")
    raw = orjson.dumps(HELLO)
    answer = await service.call("POST", "/v3/push", gzip.compress(raw), headers={"Content-Encoding": "gzip"})
    assert answer.status == 200
    bomb = gzip.compress(b" " * 5_000_000)
    assert len(bomb) < 10_000
    answer = await service.call("POST", "/v3/push", bomb, headers={"Content-Encoding": "gzip"})
    assert (answer.status, answer.code) == (413, 1005)
    packed = zlib.compress(raw)
    for body, encoding in (
        (b"no gzip", "gzip"),
        (packed[:-5], "deflate"),
        (packed, "br"),
        (gzip.compress(raw) + gzip.compress(b" "), "gzip"),
        (raw, "gzip, gzip"),
    ):
        answer = await service.call("POST", "/v3/push", body, headers={"Content-Encoding": encoding})
        assert (answer.status, answer.code) == (400, 1003), encoding
    answer = await service.call("POST", "/v3/push", packed, headers={"Content-Encoding": "deflate"})
    assert answer.status == 200


async def test_nothing_is_inflated_for_a_caller_who_is_refused(service: Any, inflated: list[str]) -> None:
    """aiohttp reads the rest of a refused body, for up to ten seconds."""
    bomb = gzip.compress(b" " * (200 << 20), 9)
    answer = await service.call("POST", "/v3/push", bomb, headers={"Content-Encoding": "gzip"}, auth=None)
    assert answer.status == 401
    again = await service.call("GET", "/v3/push/cid", auth=None)  # on the same connection
    assert again.status == 401
    assert inflated == []


@pytest.mark.parametrize(
    "path", ["/v3/push", "/v3/push/validate", "/v3/devices/status", "/v3/status/message"]
)
async def test_an_app_may_have_a_body_limit_of_its_own(service: Any, path: str) -> None:
    await service.apps.set_settings(service.app.key, AppSettings(limits={"max_body": 100}))
    answer = await service.call("POST", path, b"{" + b" " * 100)
    assert answer.status == 413


async def test_a_chunked_body_is_cut_off_at_the_limit(start: Any) -> None:
    service = await start(limits=Limits(max_body=10_000, max_batch_body=10_000))
    host, port = service.base.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    from base64 import b64encode

    basic = b64encode(f"{service.app.key}:{service.app.master_secret}".encode()).decode()
    writer.write(
        f"POST /v3/push HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {basic}\r\n"
        "Transfer-Encoding: chunked\r\n\r\n".encode()
    )
    for _ in range(11):
        writer.write(b"3e8\r\n" + b" " * 1000 + b"\r\n")
    answer = await asyncio.wait_for(reader.readuntil(b"}}"), PATIENCE)
    assert answer.startswith(b"HTTP/1.1 413 ")
    writer.close()


async def test_both_address_plans_are_one_api(service: Any) -> None:
    await service.register("a", alias="ann", tags=["red"])
    msg_id = (await service.call("POST", "/v3/push", HELLO)).json["msg_id"]
    for paths in (
        ("/v3/devices/a", "/v3/device/a"),
        ("/v3/aliases/ann", "/v3/device/aliases/ann"),
        ("/v3/tags", "/v3/tags/", "/v3/device/tags", "/v3/device/tags/"),
        ("/v3/tags/red/registration_ids/a", "/v3/device/tags/red/registration_ids/a"),
        (f"/v3/received?msg_ids={msg_id}", f"/v3/report/received?msg_ids={msg_id}"),
        (f"/v3/received/detail?msg_ids={msg_id}", f"/v3/report/received/detail?msg_ids={msg_id}"),
    ):
        answers = [await service.call("GET", path) for path in paths]
        assert {(answer.status, answer.body) for answer in answers} == {(200, answers[0].body)}, paths


async def test_names_in_paths_may_have_any_allowed_character(service: Any) -> None:
    name, device = "深@!#$&*+=.|￥", "phone/1 %2F?"
    await service.register(device)
    tag, rid = quote(name, safe=""), quote(device, safe="")
    body = {"registration_ids": {"add": [device]}}
    assert (await service.call("POST", f"/v3/tags/{tag}", body)).status == 200
    assert (await service.call("POST", f"/v3/devices/{rid}", {"alias": name})).status == 200
    answer = await service.call("GET", f"/v3/devices/{rid}")
    assert answer.json == {"tags": [name], "alias": name, "mobile": None}
    assert (await service.call("GET", f"/v3/tags/{tag}/registration_ids/{rid}")).json == {"result": True}
    assert (await service.call("GET", f"/v3/aliases/{tag}")).json == {"registration_ids": [device]}
    assert (await service.call("DELETE", f"/v3/tags/{tag}")).body == b""
    assert (await service.call("GET", "/v3/tags")).json == {"tags": []}


async def test_the_device_key_registers_and_renews_and_nothing_else(service: Any) -> None:
    installation = (service.app.key, service.app.device_key)
    answer = await service.call(
        "POST", "/v1/devices", {"platform": "ios", "tags": ["x", 1]}, auth=installation
    )
    assert answer.status == 200
    assert set(answer.json) == {"registration_id", "token", "expires_at"}
    device, token = answer.json["registration_id"], answer.json["token"]
    path = f"/v1/devices/{device}/token"
    answer = await service.call("POST", path, {"token": token}, auth=installation)
    assert (answer.status, answer.json["registration_id"]) == (200, device)
    answer = await service.call("POST", path, auth=installation)
    assert (answer.status, answer.code) == (401, 7001)
    assert (await service.call("POST", path)).status == 200
    answer = await service.call("DELETE", path, auth=installation)
    assert (answer.status, answer.code) == (401, 7004)
    answer = await service.call("DELETE", path)
    assert (answer.status, answer.body) == (200, b"")
    answer = await service.call("POST", path, {"token": token}, auth=installation)
    assert (answer.status, answer.code, answer.message) == (401, 7004, "token: revoked")
    answer = await service.call("POST", "/v1/devices", {"registration_id": device}, auth=installation)
    assert (answer.status, answer.code) == (400, 7002)


async def test_rate_limits_are_off_unless_set(start: Any) -> None:
    service = await start(limits=Limits(push_rate=2))
    service.now = 1_800_000_030.0 // 60 * 60 + 45
    answer = await service.call("GET", "/v3/tags")
    assert answer.headers["X-Rate-Limit-Quota"] == str(NO_LIMIT)
    seen = [await service.call("GET", "/v3/push/cid") for _ in range(4)]
    assert [answer.status for answer in seen] == [200, 200, 429, 429]
    assert seen[2].code == 2002
    assert [answer.headers["X-Rate-Limit-Remaining"] for answer in seen] == ["1", "0", "0", "0"]
    assert {answer.headers["X-Rate-Limit-Quota"] for answer in seen} == {"2"}
    assert {answer.headers["X-Rate-Limit-Reset"] for answer in seen} == {"15"}
    other = await service.apps.create("other")
    assert (await service.call("GET", "/v3/push/cid", auth=(other.key, other.master_secret))).status == 200
    service.now += 15
    assert (await service.call("GET", "/v3/push/cid")).status == 200


async def test_installations_do_not_use_up_the_rate_of_the_backend(start: Any) -> None:
    service = await start(limits=Limits(device_rate=2))
    device = (service.app.key, service.app.device_key)
    spent = [(await service.call("POST", "/v1/devices", {}, auth=device)).status for _ in range(3)]
    assert spent == [200, 200, 429]
    assert (await service.call("POST", "/v1/devices", {})).status == 200


async def test_a_key_that_may_not_is_counted(start: Any) -> None:
    service = await start(limits=Limits(push_rate=3))
    key = (await service.call("POST", "/v1/keys", {"name": "x", "scopes": ["report"]})).json
    auth = (service.app.key, key["secret"])
    seen = [(await service.call("PUT", "/v1/settings", {}, auth=auth)).status for _ in range(3)]
    assert seen == [403, 403, 429]


async def test_what_nobody_expected_is_told_without_details(
    service: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("the secret of the store")

    monkeypatch.setattr(service.store, "list_terms", fail)
    with caplog.at_level(logging.ERROR):
        answer = await service.call("GET", "/v3/tags")
    assert (answer.status, answer.code) == (500, 7000)
    assert "secret" not in answer.message
    request_id = answer.message.rsplit(" ", 1)[1]
    assert request_id in caplog.text
    assert "the secret of the store" in caplog.text


async def test_a_store_that_is_away_is_503(service: Any) -> None:
    await service.register("a")
    await service.store.close()
    for method, path, body, code in (
        ("POST", "/v3/push", HELLO, 1030),
        ("POST", "/v3/push/batch/regid/single", {"pushlist": {"c": ITEM}}, 1030),
        ("POST", "/v3/devices/a", {"alias": "x"}, 7030),
    ):
        answer = await service.call(method, path, body)
        assert (answer.status, answer.code) == (503, code), answer.body
