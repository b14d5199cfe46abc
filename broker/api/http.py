"""The public HTTP API: JPush v3 in both its address plans, and our few paths under /v1. See docs/api.md."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from broker.api.call import ApiCounters, Guard, Observe
from broker.api.devices import device_endpoints
from broker.api.pushes import push_endpoints
from broker.api.reports import report_endpoints
from broker.broker import Broker
from broker.errors import DEVICE, PUSH, REPORT, ApiError, Area


def build_api(broker: Broker, observe: Observe | None = None) -> web.Application:
    """`observe(endpoint, status, seconds)` is called once for each answer."""
    limits = broker.limits
    guard = Guard(broker.apps, limits, broker.clock, observe or ApiCounters().observe)
    # Every endpoint reads its body itself, up to its own limit.
    api = web.Application(client_max_size=limits.max_batch_body)
    for endpoint in (
        *push_endpoints(broker.pushes, limits),
        *device_endpoints(broker.devices, limits),
        *report_endpoints(broker.reports, limits),
    ):
        handle = guard.route(endpoint)
        for path in endpoint.paths:
            api.router.add_route(endpoint.method, path, handle)
    api.router.add_route("*", "/{path:.*}", _fallback(guard))
    return api


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
