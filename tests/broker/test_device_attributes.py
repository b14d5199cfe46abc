"""Attributes over HTTP, devices registered by the thousand, and the limit of devices on an alias."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from broker.errors import ApiError
from broker.limits import Limits
from broker.tenants import tokens


async def test_attributes_are_set_shown_and_removed(service: Any) -> None:
    given = {"app_version": "2.3", "language": "de", "age": 41, "score": 0.5, "paying": True}
    body = {"registration_id": "a", "attributes": {**given, "region": None}}
    assert (await service.call("POST", "/v1/devices", body)).status == 200
    shown = (await service.call("GET", "/v3/devices/a")).json
    assert shown == {"tags": [], "alias": None, "mobile": None, "attributes": given}
    change = {"attributes": {"age": 42.0, "paying": False, "score": None, "never": None}}
    assert (await service.call("POST", "/v3/devices/a", change)).body == b""
    shown = (await service.call("GET", "/v3/device/a")).body
    now = {"app_version": "2.3", "language": "de", "age": 42, "paying": False}
    assert orjson.loads(shown)["attributes"] == now
    assert b'"age":42,' in shown, "a whole number stays one"


async def test_a_device_without_attributes_is_shown_as_the_vendor_does(service: Any) -> None:
    await service.register("a")
    assert (await service.call("GET", "/v3/devices/a")).json == {"tags": [], "alias": None, "mobile": None}


async def test_a_known_device_keeps_what_a_registration_does_not_name(service: Any) -> None:
    await service.register("a", attributes={"x": 1, "y": 2}, tags=["t"])
    body = {"registration_id": "a", "attributes": {"x": 3, "y": None}}
    assert (await service.call("POST", "/v1/devices", body)).status == 200
    device = await service.devices.find(service.app, "a")
    assert (device.attributes, device.tags) == ({"x": 3}, {"t"})


REFUSED: list[tuple[object, int, str]] = [
    ({"age": []}, 7002, "attributes.age: must be text, a number, true or false"),
    ({"a b": 1}, 7002, "attributes: a name has 1 to 40 letters"),
    ({"carrier": 1}, 7002, "attributes.carrier: must be text"),
    ({"new": 1}, 7013, "attributes: a device has at most 2, not 3"),
    ({"a": 1, "b": 2, "c": 3}, 7013, "attributes: a device has at most 2, not 3"),
    ([1], 7002, "attributes: expected object"),
]


@pytest.mark.parametrize(("attributes", "code", "message"), REFUSED)
async def test_wrong_attributes_change_nothing(
    start: Any, attributes: object, code: int, message: str
) -> None:
    service = await start(limits=Limits(max_attributes=2))
    before = await service.register("a", attributes={"x": 1, "y": 2})
    for path, more in (("/v3/devices/a", {}), ("/v1/devices", {"registration_id": "a"})):
        answer = await service.call("POST", path, {**more, "attributes": attributes})
        assert (answer.status, answer.code) == (400, code), (path, answer.body)
        assert message in answer.message
    assert await service.devices.find(service.app, "a") == before
    swap = {"attributes": {"x": None, "new": 1}}
    assert (await service.call("POST", "/v3/devices/a", swap)).status == 200, "one went, one came"


# Import


async def test_devices_are_imported_with_tokens_in_their_order(service: Any) -> None:
    await service.register("known", alias="old", tags=["x"], attributes={"a": 1})
    devices = [
        {
            "registration_id": "new",
            "platform": "ios",
            "alias": "ann",
            "tags": ["red"],
            "attributes": {"a": 2},
        },
        {"registration_id": "known", "alias": "bob", "attributes": {"b": True}},
        {},
    ]
    answer = await service.call("POST", "/v1/devices/import", {"devices": devices})
    assert answer.status == 200, answer.body
    rows = answer.json["devices"]
    assert [row["registration_id"] for row in rows[:2]] == ["new", "known"]
    for row in rows:
        device = await service.devices.find(service.app, row["registration_id"])
        claims = tokens.verify(service.app, row["registration_id"], row["token"].encode(), service.now)
        assert (claims.devno, claims.expires_at) == (device.devno, row["expires_at"])
    new, known = [await service.devices.find(service.app, name) for name in ("new", "known")]
    assert (new.platform, new.alias, new.tags, new.attributes) == ("ios", "ann", {"red"}, {"a": 2})
    assert (known.alias, known.tags, known.attributes) == ("bob", {"x"}, {"a": 1, "b": True})


IMPORTS: list[tuple[Any, int, str]] = [
    ({}, 7002, "devices is required"),
    ({"devices": []}, 7013, "devices: 1 to 3 of them, got 0"),
    ({"devices": [{}] * 4}, 7013, "devices: 1 to 3 of them, got 4"),
    ({"devices": [{}, {"alias": "a b"}]}, 7002, "devices[1].alias: a name has letters"),
    ({"devices": [{}, {"registration_id": ""}]}, 7002, "devices[1].registration_id: must be 1 to 64 bytes"),
    ({"devices": [{"platform": "x"}]}, 7002, "devices[0].platform: must be one of"),
    ({"devices": [{"attributes": {"x": []}}]}, 7002, "devices[0].attributes.x: must be text"),
    ({"devices": [{"colour": 1}]}, 7002, "this key is not supported"),
    ({"devices": [{"registration_id": "n"}, {"registration_id": "n"}]}, 7002, "is there twice"),
    (
        {"devices": [{"registration_id": "n"}, {"registration_id": "known", "attributes": {"c": 1}}]},
        7013,
        "at most 2, not 3",
    ),
]


@pytest.mark.parametrize(("body", "code", "message"), IMPORTS)
async def test_a_wrong_import_registers_nobody(start: Any, body: Any, code: int, message: str) -> None:
    service = await start(limits=Limits(max_imported=3, max_attributes=2))
    await service.register("known", attributes={"a": 1, "b": 2})
    answer = await service.call("POST", "/v1/devices/import", body)
    assert (answer.status, answer.code, message in answer.message) == (400, code, True), answer.body
    assert await service.store.resolve(service.app.app_id, ["n"]) == {}


async def test_the_device_key_cannot_import(service: Any) -> None:
    key = (service.app.key, service.app.device_key)
    answer = await service.call("POST", "/v1/devices/import", {"devices": [{}]}, auth=key)
    assert (answer.status, answer.code) == (401, 7004)


# Devices on an alias


async def test_an_alias_has_so_many_devices(start: Any) -> None:
    service = await start(limits=Limits(alias_devices=2))
    for name in ("a", "b"):
        await service.register(name, alias="ann")
    await service.register("c", alias="bob")
    rows: list[tuple[str, Any]] = [
        ("/v1/devices", {"alias": "ann"}),
        ("/v3/devices/c", {"alias": "ann"}),
        ("/v1/devices/import", {"devices": [{"alias": "ann"}]}),
        ("/v1/devices/import", {"devices": [{"alias": "new"}] * 3}),
    ]
    for path, body in rows:
        answer = await service.call("POST", path, body)
        assert (answer.status, answer.code) == (400, 7015), (path, answer.body)
    assert (
        "alias: ann has 2 devices, at most 2 may have it"
        in (await service.call("POST", "/v3/devices/c", {"alias": "ann"})).message
    )
    assert (await service.devices.find(service.app, "c")).alias == "bob"
    for path, body in (
        ("/v3/devices/a", {"alias": "ann"}),  # it has it already
        ("/v3/devices/b", {"alias": ""}),
        ("/v3/devices/c", {"alias": "ann"}),
    ):
        assert (await service.call("POST", path, body)).status == 200, body


async def test_devices_on_an_alias_are_not_limited_by_default(service: Any) -> None:
    answer = await service.call("POST", "/v1/devices/import", {"devices": [{"alias": "ann"}] * 100})
    assert answer.status == 200
    with pytest.raises(ApiError):
        await service.devices.import_json(service.app, b'{"devices":[]}')
