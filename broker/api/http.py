"""The public HTTP API: JPush v3 in both its address plans, and our few paths under /v1. See docs/api.md."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from broker.api.call import ApiCounters, Endpoint, Guard, Handle, Observe
from broker.api.callbacks import callback_endpoints
from broker.api.devices import device_endpoints
from broker.api.dispatch import dispatch_endpoints
from broker.api.door import DIRECT
from broker.api.files import file_endpoints
from broker.api.groups import group_endpoints
from broker.api.keys import key_endpoints
from broker.api.openapi import openapi_endpoint
from broker.api.pace import pace_endpoints
from broker.api.peers import Peers
from broker.api.pushes import push_endpoints
from broker.api.reports import account_endpoints, report_endpoints, user_endpoints
from broker.api.schedules import schedule_endpoints
from broker.api.segments import segment_endpoints
from broker.api.settings import settings_endpoints
from broker.broker import Broker
from broker.errors import DEVICE, PUSH, REPORT, SCHEDULE, ApiError, Area


def api_endpoints(broker: Broker) -> list[Endpoint]:
    """Every row of the API. Where two patterns fit a path, the one without a parameter stands first."""
    return [
        *push_endpoints(broker.pushes, broker.withdrawals),
        *schedule_endpoints(broker.schedules),
        *pace_endpoints(broker.pacer),
        *file_endpoints(broker.files, broker.pushes),
        *segment_endpoints(broker.segments),
        *device_endpoints(broker.devices),
        *dispatch_endpoints(broker.dispatch),
        *report_endpoints(broker.reports),
        *user_endpoints(broker.users),
        *account_endpoints(broker.accounts),
        *callback_endpoints(broker.callbacks, broker.store),
        *settings_endpoints(broker.apps, broker.audit),
        *key_endpoints(broker.keys),
        *group_endpoints(broker.group_pushes),
    ]


def build_api(broker: Broker, observe: Observe | None = None, peers: Peers | None = None) -> web.Application:
    """`observe(endpoint, status, seconds)` is called once for each answer; `peers` says where calls come from."""
    limits = broker.limits
    guard = Guard(
        broker.apps,
        broker.groups,
        broker.audit,
        broker.rates,
        limits,
        broker.clock,
        observe or ApiCounters().observe,
        peers,
    )
    # Every endpoint reads its body itself, up to its own limit.
    # What aiohttp inflates it inflates for refused callers, too, and without a pause: call.py does it, bounded.
    handler_args = {"auto_decompress": False}
    api = web.Application(client_max_size=limits.max_batch_body, handler_args=handler_args)
    endpoints = api_endpoints(broker)
    fixed: dict[str, set[str]] = {}  # paths without a parameter -> their methods
    direct: dict[tuple[str, str], Handle] = {}
    for endpoint in (*endpoints, openapi_endpoint(endpoints)):
        handle = guard.route(endpoint)
        for path in _with_slash(endpoint.paths):
            api.router.add_route(endpoint.method, path, handle)
            if "{" not in path:
                fixed.setdefault(path, set()).add(endpoint.method)
            if endpoint.fixed:
                direct[endpoint.method, path] = handle
    api[DIRECT] = direct
    for path, methods in fixed.items():  # or a pattern that fits, too, would take their other methods
        api.router.add_route("*", path, _other_methods(guard, methods))
    api.router.add_route("*", "/{path:.*}", _fallback(guard))
    return api


def _with_slash(paths: tuple[str, ...]) -> list[str]:
    """The vendor's SDKs end paths with a slash here and there (/v3/tags/, /v3/aliases/ann/?platform=ios)."""
    both = ((path, f"{path.rstrip('/')}/") if path.startswith("/v3/") else (path,) for path in paths)
    return list(dict.fromkeys(path for pair in both for path in pair))


def _fallback(guard: Guard) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def refuse(request: web.Request) -> web.Response:
        area = _area(request.path)
        allowed = await _methods(request)
        if not allowed:
            error = ApiError(area.invalid, "there is no such path", http_status=404)
            return guard.refuse(request, error, area)
        return _refuse_method(guard, request, allowed)

    return refuse


def _other_methods(guard: Guard, allowed: set[str]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def refuse(request: web.Request) -> web.Response:
        return _refuse_method(guard, request, allowed)

    return refuse


def _refuse_method(guard: Guard, request: web.Request, allowed: set[str]) -> web.Response:
    area, names = _area(request.path), ", ".join(sorted(allowed))
    error = ApiError(area.method, f"{request.method} is not supported here, only {names}", http_status=405)
    response = guard.refuse(request, error, area)
    response.headers["Allow"] = names
    return response


async def _methods(request: web.Request) -> set[str]:
    """What the path supports."""
    methods: set[str] = set()
    for resource in request.app.router.resources():
        _, allowed = await resource.resolve(request)
        methods |= allowed
    return methods - {"*"}


def _area(path: str) -> Area:
    if path.startswith(("/v3/device", "/v3/aliases", "/v3/tags", "/v1/devices", "/v1/dispatch")):
        return DEVICE
    if path.startswith(("/v3/schedules", "/v3/push/schedules")):
        return SCHEDULE
    return (
        REPORT
        if path.startswith(
            ("/v3/re", "/v3/messages", "/v3/status", "/v3/users", "/v1/events", "/v1/callbacks")
        )
        else PUSH
    )
