from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import orjson
import pytest

from broker.bus import CredentialsChanged
from broker.errors import ApiError
from broker.limits import Limits
from broker.model import Claim
from broker.tenants import tokens
from tests.patience import PATIENCE


async def _refused(call: Awaitable[object]) -> tuple[int, str]:
    with pytest.raises(ApiError) as caught:
        await call
    return caught.value.code, caught.value.message


async def test_a_device_gets_an_id_and_a_token_that_works(service: Any) -> None:
    registered = await service.devices.register(
        service.app, platform="ios", alias="ann", tags=["x"], mobile="+49 1"
    )
    device = registered.device
    assert len(device.registration_id) == 20
    assert set(device.registration_id) <= set("0123456789abcdef")
    assert (device.platform, device.alias, device.tags, device.mobile) == ("ios", "ann", {"x"}, "+49 1")
    claims = tokens.verify(service.app, device.registration_id, registered.token.encode(), service.now)
    assert (claims.devno, claims.platform, claims.expires_at) == (device.devno, "ios", registered.expires_at)
    assert registered.expires_at == service.now + service.limits.token_lifetime


async def test_the_device_key_cannot_take_over_a_registered_id(service: Any) -> None:
    first, second = await asyncio.gather(
        *(service.devices.register(service.app, registration_id="mine") for _ in range(2)),
        return_exceptions=True,
    )
    assert {type(first), type(second)} >= {ApiError}, "one of the two is refused"
    assert isinstance(first, ApiError) != isinstance(second, ApiError)
    code, message = await _refused(service.devices.register(service.app, registration_id="mine"))
    assert (code, "is registered" in message) == (7002, True)


async def test_the_publisher_may_register_an_id_again_and_set_its_properties(service: Any) -> None:
    first = await service.register("mine", platform="ios", alias="ann", tags=["x"])
    again = await service.register("mine", tags=["y"])
    assert (again.devno, again.platform, again.alias, again.tags) == (first.devno, "ios", "ann", {"y"})


async def test_an_open_app_registers_on_first_sight(start: Any) -> None:
    service = await start(open=True)
    first = await service.devices.register_open(service.app, "phone-1")
    assert await service.devices.register_open(service.app, "phone-1") == first
    assert (await service.devices.register(service.app, registration_id="phone-1")).device == first


@pytest.mark.parametrize(
    ("client_id", "message"),
    [("", "1 to 64 bytes"), ("x" * 65, "1 to 64 bytes"), ("ü" * 33, "1 to 64 bytes"), ("a\0b", "printable")],
)
async def test_a_client_id_of_an_open_app_that_is_not_one(start: Any, client_id: str, message: str) -> None:
    service = await start(open=True)
    code, said = await _refused(service.devices.register_open(service.app, client_id))
    assert (code, message in said) == (7002, True)


async def test_a_token_is_renewed_with_the_current_one_until_it_is_revoked(service: Any) -> None:
    registered = await service.devices.register(service.app)
    app, devices, device_id = service.app, service.devices, registered.device.registration_id

    def renew(token: str | None, *, trusted: bool = False) -> Awaitable[Any]:
        return devices.renew_json(app, device_id, orjson.dumps({"token": token}), trusted=trusted)  # type: ignore[no-any-return]

    service.now += 100
    assert (await renew(registered.token)).expires_at == registered.expires_at + 100
    assert (await renew(None, trusted=True)).device == registered.device
    assert (await _refused(renew(None)))[0] == 7001
    assert await _refused(renew("A" * 40)) == (7004, "token: malformed")

    await devices.revoke(app, device_id)
    while not isinstance(bell := await service.doorbell(), CredentialsChanged) or bell.devnos is None:
        pass
    assert bell == CredentialsChanged(app.app_id, (registered.device.devno,))
    assert service.store.token_generations(app.app_id)[registered.device.devno] == 1
    assert await _refused(renew(registered.token)) == (7004, "token: revoked")
    fresh = await renew(None, trusted=True)
    claims = tokens.verify(app, device_id, fresh.token.encode(), service.now)
    assert claims.generation == 1
    service.now = fresh.expires_at
    assert await _refused(renew(fresh.token)) == (7004, "token: expired")
    assert (await _refused(devices.revoke(app, "nobody")))[0] == 7002


CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"alias": "bob"}, {"alias": "bob"}),
    ({"alias": ""}, {"alias": None}),
    ({"alias": None}, {}),
    ({"mobile": "13012345678"}, {"mobile": "13012345678"}),
    ({"mobile": ""}, {"mobile": None}),
    ({"tags": ""}, {"tags": set()}),
    ({"tags": ["new", 1]}, {"tags": {"new", "1"}}),
    ({"tags": {"add": ["new", "x"]}}, {"tags": {"x", "y", "new"}}),
    ({"tags": {"remove": ["x", "never"]}}, {"tags": {"y"}}),
    ({"tags": {"add": ["new"], "remove": ["x"]}, "alias": "bob"}, {"tags": {"y", "new"}, "alias": "bob"}),
    ({"platform": "ios"}, {"platform": "ios"}),
    ({}, {}),
]


@pytest.mark.parametrize(("body", "changed"), CHANGES)
async def test_a_device_is_changed(service: Any, body: dict[str, Any], changed: dict[str, Any]) -> None:
    await service.register("a", platform="android", alias="ann", tags=["x", "y"], mobile="110")
    device = await service.devices.change(service.app, "a", orjson.dumps(body))
    was = {"platform": "android", "alias": "ann", "tags": {"x", "y"}, "mobile": "110"}
    assert {key: getattr(device, key) for key in was} == was | changed
    assert await service.devices.find(service.app, "a") == device


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b"", 7002, "not valid JSON"),
        (b"[]", 7002, "the body: expected object"),
        (b'{"alias":1}', 7002, "alias: expected str"),
        (b'{"alias":{"add":["x"]}}', 7002, "alias: expected str"),
        (b'{"alias":"a b"}', 7002, "alias: a name has letters"),
        (orjson.dumps({"alias": "x" * 41}), 7002, "alias: a name is at most 40 bytes"),
        (b'{"tags":"x"}', 7002, 'tags: must be ""'),
        (b'{"tags":{"set":["x"]}}', 7002, "tags.set: this key is not supported"),
        (b'{"tags":["a b"]}', 7002, "tags: a name has letters"),
        (b'{"tags":{"add":["x\xff"]}}', 7002, "UTF-8"),
        (orjson.dumps({"tags": [str(n) for n in range(6)]}), 7013, "tags: a device has at most 5, not 6"),
        (orjson.dumps({"tags": {"add": list("abcd")}}), 7013, "tags: a device has at most 5, not 6"),
        (b'{"mobile":"call me"}', 7002, "mobile: must be a telephone number"),
        (b'{"platform":"symbian"}', 7002, "platform: must be one of android"),
    ],
)
async def test_a_wrong_change_changes_nothing(start: Any, body: bytes, code: int, message: str) -> None:
    service = await start(limits=Limits(max_device_tags=5))
    before = await service.register("a", tags=["x", "y"])
    assert await _refused(service.devices.change(service.app, "nobody", b'{"alias":"x"}')) == (
        7002, "no such device in this app: nobody",
    )  # fmt: skip
    was, said = await _refused(service.devices.change(service.app, "a", body))
    assert (was, message in said) == (code, True), said
    assert await service.devices.find(service.app, "a") == before


async def test_the_status_of_devices(service: Any) -> None:
    a, b = await service.register("a"), await service.register("b")
    await service.register("c")
    app_id, epochs = service.app.app_id, []
    for device in (a, b):
        claimed: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        service.store.claim_route(app_id, device.devno, "node", claimed.set_result)
        epochs.append((await asyncio.wait_for(claimed, PATIENCE)).epoch)
    service.store.release_route(app_id, b.devno, epochs[1], 1_700_000_000.0)
    body = orjson.dumps({"registration_ids": ["a", "b", "c", "nobody"]})
    assert await service.devices.status(service.app, body) == {
        "a": {"online": True},
        "b": {"online": False, "last_online_time": "2023-11-14 22:13:20"},
        "c": {"online": False},
    }


async def test_aliases(service: Any) -> None:
    app, devices = service.app, service.devices
    for name, platform in (("a", "ios"), ("b", "android"), ("c", "android")):
        await service.register(name, platform=platform, alias="ann")
    assert sorted(await devices.of_alias(app, "ann", None)) == ["a", "b", "c"]
    assert sorted(await devices.of_alias(app, "ann", "android,hmos")) == ["b", "c"]
    assert await devices.of_alias(app, "nobody", "all") == []
    await devices.change_alias(app, "ann", b'{"registration_ids":{"remove":["b","unknown"]}}')
    assert sorted(await devices.of_alias(app, "ann", None)) == ["a", "c"]
    await devices.delete_alias(app, "ann", "android")
    assert await devices.of_alias(app, "ann", None) == ["a"]
    await devices.delete_alias(app, "ann", None)
    assert await devices.of_alias(app, "ann", None) == []
    assert (await _refused(devices.of_alias(app, "ann", "symbian")))[0] == 7002
    assert (await _refused(devices.change_alias(app, "ann", b'{"registration_ids":{"add":["b"]}}')))[
        0
    ] == 7002
    assert (await _refused(devices.change_alias(app, "ann", b'{"registration_ids":{}}')))[0] == 7002


async def test_tags(service: Any) -> None:
    app, devices = service.app, service.devices
    await service.register("a", platform="ios", tags=["red"])
    await service.register("b", platform="android")
    assert await devices.tags(app) == ["red"]
    await devices.change_tag(app, "big", b'{"registration_ids":{"add":["a","b"]}}')
    assert [await devices.has_tag(app, "big", name) for name in ("a", "b")] == [True, True]
    await devices.change_tag(app, "big", b'{"registration_ids":{"add":["a"],"remove":["b"]}}')
    assert [await devices.has_tag(app, "big", name) for name in ("a", "b")] == [True, False]
    await devices.delete_tag(app, "big", "android")
    assert await devices.tags(app) == ["big", "red"]
    await devices.delete_tag(app, "big", None)
    assert await devices.tags(app) == ["red"]
    assert (await _refused(devices.has_tag(app, "red", "nobody")))[0] == 7002
    code, message = await _refused(
        devices.change_tag(app, "big", b'{"registration_ids":{"add":["b","nobody"]}}')
    )
    assert (code, "nobody" in message) == (7002, True)
    assert not await devices.has_tag(app, "big", "b"), "all or none"
    many = orjson.dumps({"registration_ids": {"add": [str(n) for n in range(1001)]}})
    assert (await _refused(devices.change_tag(app, "big", many)))[0] == 7013
    assert (await _refused(devices.change_tag(app, "big", b'{"registration_ids":{}}')))[0] == 7002
    assert (await _refused(devices.change_tag(app, "a b", b'{"registration_ids":{"add":["a"]}}')))[0] == 7002


async def test_a_tag_is_refused_where_it_would_be_one_too_many(start: Any) -> None:
    service = await start(limits=Limits(max_device_tags=2))
    await service.register("a", tags=["x", "y"])
    for tag, code in (("x", None), ("z", 7013)):
        change = service.devices.change_tag(service.app, tag, b'{"registration_ids":{"add":["a"]}}')
        if code is None:
            await change
        else:
            assert (await _refused(change))[0] == code


async def test_long_lists_are_cut(start: Any) -> None:
    service = await start(limits=Limits(max_listed=2))
    for name in ("a", "b", "c"):
        await service.register(name, alias="ann", tags=[name])
    assert len(await service.devices.of_alias(service.app, "ann", None)) == 2
    assert await service.devices.tags(service.app) == ["a", "b"]
