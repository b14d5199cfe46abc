"""/v1/devices, /v3/devices, /v3/aliases, /v3/tags: who is there, and under which names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import orjson

from broker.api.call import BATCH_BODY, BODY, DONE, Call, Endpoint
from broker.audiences.devices import Devices, Registered
from broker.errors import DEVICE

ISSUED: Final = "device.issue_token"  # in the audit log


def device_endpoints(devices: Devices) -> list[Endpoint]:
    async def register(call: Call) -> bytes:
        registered = await devices.register_json(call.app, call.raw, trusted=call.publisher)
        _note_tokens(call, [registered])
        return _registered(registered)

    async def import_devices(call: Call) -> bytes:
        registered = await devices.import_json(call.app, call.raw)
        _note_tokens(call, registered)
        return orjson.dumps({"devices": [_registered_row(one) for one in registered]})

    async def renew(call: Call) -> bytes:
        renewed = await devices.renew_json(call.app, call.path("id"), call.raw, trusted=call.publisher)
        return _registered(renewed)

    async def revoke(call: Call) -> bytes:
        await devices.revoke(call.app, call.path("id"))
        return DONE

    async def status(call: Call) -> bytes:
        return orjson.dumps(await devices.status(call.app, call.raw))

    async def get(call: Call) -> bytes:
        device = await devices.find(call.app, call.path("id"))
        answer: dict[str, object] = {
            "tags": sorted(device.tags),
            "alias": device.alias,
            "mobile": device.mobile,
        }
        if device.attributes:
            answer["attributes"] = device.attributes
        return orjson.dumps(answer)

    async def change(call: Call) -> bytes:
        await devices.change(call.app, call.path("id"), call.raw)
        return DONE

    async def of_alias(call: Call) -> bytes:
        names = await devices.of_alias(call.app, call.path("alias"), call.query("platform"))
        return orjson.dumps({"registration_ids": names})

    async def change_alias(call: Call) -> bytes:
        await devices.change_alias(call.app, call.path("alias"), call.raw)
        return DONE

    async def delete_alias(call: Call) -> bytes:
        await devices.delete_alias(call.app, call.path("alias"), call.query("platform"))
        return DONE

    async def tags(call: Call) -> bytes:
        return orjson.dumps({"tags": await devices.tags(call.app)})

    async def has_tag(call: Call) -> bytes:
        return orjson.dumps({"result": await devices.has_tag(call.app, call.path("tag"), call.path("id"))})

    async def change_tag(call: Call) -> bytes:
        tag = call.path("tag")
        if removed := await devices.change_tag(call.app, tag, call.raw):
            call.action, call.subject = "tag.remove", f"{tag} from {removed} devices"
        return DONE

    async def delete_tag(call: Call) -> bytes:
        await devices.delete_tag(call.app, call.path("tag"), call.query("platform"))
        return DONE

    own = "/v1/devices"
    own_token = "/v1/devices/{id}/token"
    device = ("/v3/devices/{id}", "/v3/device/{id}")
    alias = ("/v3/aliases/{alias}", "/v3/device/aliases/{alias}")
    tag = ("/v3/tags/{tag}", "/v3/device/tags/{tag}")
    member = "/registration_ids/{id}"
    # In each plan the fixed paths come before those with a parameter in the same place.
    return [
        Endpoint("POST", (own,), DEVICE, register, BODY, device_key=True),
        Endpoint("POST", ("/v1/devices/import",), DEVICE, import_devices, BATCH_BODY),
        Endpoint("POST", (own_token,), DEVICE, renew, BODY, device_key=True, audit=ISSUED),
        Endpoint("DELETE", (own_token,), DEVICE, revoke, audit="token.revoke"),
        Endpoint("POST", ("/v3/devices/status", "/v3/device/status"), DEVICE, status, BODY),
        Endpoint("GET", ("/v3/tags", "/v3/tags/", "/v3/device/tags", "/v3/device/tags/"), DEVICE, tags),
        Endpoint("GET", (tag[0] + member, tag[1] + member), DEVICE, has_tag),
        Endpoint("POST", tag, DEVICE, change_tag, BODY),
        Endpoint("DELETE", tag, DEVICE, delete_tag, audit="tag.delete"),
        Endpoint("GET", alias, DEVICE, of_alias),
        Endpoint("POST", alias, DEVICE, change_alias, BODY, audit="alias.remove"),
        Endpoint("DELETE", alias, DEVICE, delete_alias, audit="alias.delete"),
        Endpoint("GET", device, DEVICE, get),
        Endpoint("POST", device, DEVICE, change, BODY),
    ]


def _note_tokens(call: Call, registered: Sequence[Registered]) -> None:
    """Who has a token of a device is that device. A new one is nobody's yet."""
    known = [one.device.registration_id for one in registered if one.was_known]
    if known:
        call.action, call.subject = ISSUED, ", ".join(known)


def _registered(registered: Registered) -> bytes:
    return orjson.dumps(_registered_row(registered))


def _registered_row(registered: Registered) -> dict[str, object]:
    return {
        "registration_id": registered.device.registration_id,
        "token": registered.token,
        "expires_at": registered.expires_at,
    }
