"""The public HTTP API: JPush v3 in both its address plans, and our few paths under /v1. See docs/api.md."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final, Literal
from uuid import uuid4

import orjson
from aiohttp import web

from broker.apps import Apps
from broker.devices import Devices, Registered
from broker.errors import DEVICE, PUSH, REPORT, ApiError, Area
from broker.http_call import ApiCounters, Call, Clock, Endpoint, Guard, Observe
from broker.limits import Limits
from broker.pushes import Accepted, Pushes
from broker.reports import Reports

MAX_CIDS: Final = 1000
DONE: Final = b""  # the vendor answers changes with an empty body


def build_api(
    apps: Apps,
    devices: Devices,
    pushes: Pushes,
    reports: Reports,
    limits: Limits | None = None,
    *,
    clock: Clock = time.time,
    observe: Observe | None = None,
) -> web.Application:
    """`observe(endpoint, status, seconds)` is called once for each answer."""
    limits = limits or Limits()
    guard = Guard(apps, limits, clock, observe or ApiCounters().observe)
    # Every endpoint reads its body itself, up to its own limit.
    api = web.Application(client_max_size=limits.max_batch_body)
    for endpoint in (
        *push_endpoints(pushes, limits),
        *device_endpoints(devices, limits),
        *report_endpoints(reports, limits),
    ):
        handle = guard.route(endpoint)
        for path in endpoint.paths:
            api.router.add_route(endpoint.method, path, handle)
    api.router.add_route("*", "/{path:.*}", _fallback(guard))
    return api


def push_endpoints(pushes: Pushes, limits: Limits) -> list[Endpoint]:
    async def push(call: Call) -> bytes:
        return _accepted(await pushes.push(call.app, call.raw))

    async def validate(call: Call) -> bytes:
        return _accepted(await pushes.validate(call.app, call.raw))

    async def cids(call: Call) -> bytes:
        return _cids(call)

    def batch(by: Literal["regid", "alias"]) -> Endpoint:
        async def push_batch(call: Call) -> bytes:
            return _batch_results(await pushes.push_batch(call.app, call.raw, by))

        return Endpoint("POST", (f"/v3/push/batch/{by}/single",), PUSH, push_batch, limits.max_batch_body)

    return [
        Endpoint("POST", ("/v3/push",), PUSH, push, limits.max_body),
        Endpoint("POST", ("/v3/push/validate",), PUSH, validate, limits.max_body),
        Endpoint("GET", ("/v3/push/cid",), PUSH, cids),
        batch("regid"),
        batch("alias"),
    ]


def device_endpoints(devices: Devices, limits: Limits) -> list[Endpoint]:
    async def register(call: Call) -> bytes:
        return _registered(await devices.register_json(call.app, call.raw, trusted=call.publisher))

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
        return orjson.dumps({"tags": sorted(device.tags), "alias": device.alias, "mobile": device.mobile})

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
        await devices.change_tag(call.app, call.path("tag"), call.raw)
        return DONE

    async def delete_tag(call: Call) -> bytes:
        await devices.delete_tag(call.app, call.path("tag"), call.query("platform"))
        return DONE

    size = limits.max_body
    own = "/v1/devices"
    own_token = "/v1/devices/{id}/token"
    device = ("/v3/devices/{id}", "/v3/device/{id}")
    alias = ("/v3/aliases/{alias}", "/v3/device/aliases/{alias}")
    tag = ("/v3/tags/{tag}", "/v3/device/tags/{tag}")
    member = "/registration_ids/{id}"
    # In each plan the fixed paths come before those with a parameter in the same place.
    return [
        Endpoint("POST", (own,), DEVICE, register, size, device_key=True),
        Endpoint("POST", (own_token,), DEVICE, renew, size, device_key=True),
        Endpoint("DELETE", (own_token,), DEVICE, revoke),
        Endpoint("POST", ("/v3/devices/status", "/v3/device/status"), DEVICE, status, size),
        Endpoint("GET", ("/v3/tags", "/v3/tags/", "/v3/device/tags", "/v3/device/tags/"), DEVICE, tags),
        Endpoint("GET", (tag[0] + member, tag[1] + member), DEVICE, has_tag),
        Endpoint("POST", tag, DEVICE, change_tag, size),
        Endpoint("DELETE", tag, DEVICE, delete_tag),
        Endpoint("GET", alias, DEVICE, of_alias),
        Endpoint("POST", alias, DEVICE, change_alias, size),
        Endpoint("DELETE", alias, DEVICE, delete_alias),
        Endpoint("GET", device, DEVICE, get),
        Endpoint("POST", device, DEVICE, change, size),
    ]


def report_endpoints(reports: Reports, limits: Limits) -> list[Endpoint]:
    async def received(call: Call) -> bytes:
        return orjson.dumps(await reports.received(call.app, call.query("msg_ids")))

    async def received_detail(call: Call) -> bytes:
        return orjson.dumps(await reports.received_detail(call.app, call.query("msg_ids")))

    async def status(call: Call) -> bytes:
        return orjson.dumps(await reports.status(call.app, call.raw))

    async def events(call: Call) -> bytes:
        return orjson.dumps(await reports.events(call.app, call.query("after"), call.query("limit")))

    def plans(path: str) -> tuple[str, str]:
        return f"/v3/{path}", f"/v3/report/{path}"

    return [
        Endpoint("GET", plans("received"), REPORT, received),
        Endpoint("GET", plans("received/detail"), REPORT, received_detail),
        Endpoint("POST", plans("status/message"), REPORT, status, limits.max_body),
        Endpoint("GET", ("/v1/events",), REPORT, events),
    ]


def _fallback(guard: Guard) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def refuse(request: web.Request) -> web.Response:
        area = _area(request.path)
        allowed = await _methods(request)
        if not allowed:
            return guard.refuse(ApiError(area.invalid, "there is no such path", http_status=404), area)
        names = ", ".join(sorted(allowed))
        error = ApiError(
            area.method, f"{request.method} is not supported here, only {names}", http_status=405
        )
        response = guard.refuse(error, area)
        response.headers["Allow"] = names
        return response

    return refuse


async def _methods(request: web.Request) -> set[str]:
    """What the path supports."""
    methods: set[str] = set()
    for resource in request.app.router.resources():
        _, allowed = await resource.resolve(request)
        methods |= allowed
    return methods - {"*"}


def _area(path: str) -> Area:
    if path.startswith(("/v3/device", "/v3/aliases", "/v3/tags", "/v1/devices")):
        return DEVICE
    return REPORT if path.startswith(("/v3/re", "/v3/status", "/v1/events")) else PUSH


def _accepted(accepted: Accepted) -> bytes:
    return orjson.dumps(_accepted_row(accepted))


def _accepted_row(accepted: Accepted) -> dict[str, str]:
    # Typed SDKs read both as numbers, so a push without a sendno gets the vendor's 0.
    return {"sendno": accepted.sendno or "0", "msg_id": str(accepted.msg_id)}


def _batch_results(results: dict[str, Accepted | ApiError]) -> bytes:
    """Raises the first error if nothing was accepted: 200 never means failure."""
    rows = {cid: r.as_dict() if isinstance(r, ApiError) else _accepted_row(r) for cid, r in results.items()}
    errors = [result for result in results.values() if isinstance(result, ApiError)]
    if len(errors) == len(results):
        raise BatchRefused(errors[0], rows)
    return orjson.dumps(rows)


class BatchRefused(ApiError):
    """No push of the batch was accepted: the first error, and beside it each push's own."""

    def __init__(self, first: ApiError, rows: dict[str, dict[str, str] | dict[str, object]]) -> None:
        super().__init__(first.code, first.message, http_status=first.http_status)
        self._rows = rows

    def as_dict(self) -> dict[str, object]:
        return {**self._rows, **super().as_dict()}


def _registered(registered: Registered) -> bytes:
    return orjson.dumps(
        {
            "registration_id": registered.device.registration_id,
            "token": registered.token,
            "expires_at": registered.expires_at,
        }
    )


def _cids(call: Call) -> bytes:
    """Idempotency keys. Nothing is kept until one is used."""
    count = call.query("count") or "1"
    if not (count.isascii() and count.isdigit() and len(count) <= 4 and 1 <= int(count) <= MAX_CIDS):
        raise ApiError(1003, f"count: must be 1 to {MAX_CIDS}")
    if call.query("type") not in (None, "push", "schedule"):
        raise ApiError(1003, "type: must be push or schedule")
    return orjson.dumps({"cidlist": [f"{call.app.key}-{uuid4()}" for _ in range(int(count))]})
