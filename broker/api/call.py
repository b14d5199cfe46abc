"""What every call of the public API shares: who calls, how much, how fast, one shape for every failure."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from aiohttp.web_request import BaseRequest

from broker.apps import Apps, Login
from broker.errors import ApiError, Area, refusal
from broker.limits import NO_LIMIT, Limits
from broker.model import App
from broker.store import StoreError

log: Final = logging.getLogger(__name__)
MINUTE: Final = 60
DONE: Final = b""  # the vendor answers changes with an empty body

Clock = Callable[[], float]
Observe = Callable[[str, int, float], None]


@dataclass(frozen=True, slots=True)
class Call:
    """One authenticated, admitted request with its whole body."""

    app: App
    publisher: bool  # False: it has only the device key
    raw: bytes
    request: web.Request

    def path(self, name: str) -> str:
        return self.request.match_info[name]

    def query(self, name: str) -> str | None:
        return self.request.query.get(name)


Handler = Callable[[Call], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A row of the API: answers 200 with what `handler` returns, or what it raised."""

    method: str
    paths: tuple[str, ...]  # one for each address plan; the first names it in metrics
    area: Area
    handler: Handler
    max_body: int = 0
    device_key: bool = False  # the device key is enough


class ApiCounters:
    """The default for `observe`: plain ints, at most endpoints x statuses of them."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = {}
        self.seconds: dict[str, float] = {}

    def observe(self, endpoint: str, status: int, seconds: float) -> None:
        """`endpoint` is a route's pattern, never a path as the peer sent it."""
        self.requests[endpoint, status] = self.requests.get((endpoint, status), 0) + 1
        self.seconds[endpoint] = self.seconds.get(endpoint, 0.0) + seconds


class RateLimits:
    """Calls per app and clock minute, in each area. Holds only the apps of the current minute."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._quotas = {
            "push": limits.push_rate,
            "report": limits.report_rate,
            "device": limits.device_rate,
        }
        self._clock = clock
        self._minute = 0
        self._spent: dict[tuple[str, int], int] = {}

    def spend(self, area: Area, app_id: int) -> dict[str, str]:
        """Count one call and return the headers that say what is left; "-1" left means: refuse."""
        quota = self._quotas[area.name]
        if quota is None:
            return _UNLIMITED
        now = int(self._clock())
        if now // MINUTE != self._minute:
            self._minute = now // MINUTE
            self._spent.clear()
        spent = self._spent[area.name, app_id] = self._spent.get((area.name, app_id), 0) + 1
        return _headers(quota, max(quota - spent, -1), MINUTE - now % MINUTE)

    def untouched(self, area: Area) -> dict[str, str]:
        """Headers for a caller we do not know."""
        quota = self._quotas[area.name]
        return _UNLIMITED if quota is None else _headers(quota, quota, MINUTE)


def _headers(quota: int, remaining: int, reset: int) -> dict[str, str]:
    return {
        "Content-Type": "application/json",
        "X-Rate-Limit-Quota": str(quota),
        "X-Rate-Limit-Remaining": str(remaining),
        "X-Rate-Limit-Reset": str(reset),
    }


_UNLIMITED: Final = _headers(NO_LIMIT, NO_LIMIT, MINUTE)


class Guard:
    """Runs endpoints: authenticate, admit, read, handle, answer, count."""

    def __init__(self, apps: Apps, limits: Limits, clock: Clock, observe: Observe) -> None:
        self._apps = apps
        self._rates = RateLimits(limits, clock)
        self._observe = observe

    def route(self, endpoint: Endpoint) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            started = time.perf_counter()
            headers = self._rates.untouched(endpoint.area)
            try:
                login = await self._login(request, endpoint)
                headers = self._rates.spend(endpoint.area, login.app.app_id)
                if headers["X-Rate-Limit-Remaining"] == "-1":
                    headers["X-Rate-Limit-Remaining"] = "0"
                    raise ApiError(2002)
                raw = await _read_body(request, endpoint) if endpoint.max_body else b""
                body = await endpoint.handler(Call(login.app, login.publisher, raw, request))
                response = web.Response(body=body, headers=headers)
            except ApiError as error:
                response = _refuse(error, headers)
            except StoreError as error:
                log.error("%s %s: %s", endpoint.method, endpoint.paths[0], error)
                response = _refuse(refusal(error, endpoint.area), headers)
            except Exception:  # noqa: BLE001 - the boundary: whatever it is, the caller gets the API's shape
                response = _refuse(_internal(endpoint), headers)
            self._observe(endpoint.paths[0], response.status, time.perf_counter() - started)
            return response

        return handle

    def refuse(self, error: ApiError, area: Area) -> web.Response:
        """Answer a call that belongs to no endpoint."""
        self._observe("unknown", error.http_status, 0.0)
        return _refuse(error, self._rates.untouched(area))

    async def _login(self, request: BaseRequest, endpoint: Endpoint) -> Login:
        header = request.headers.get("Authorization")
        if header is None:
            raise ApiError(
                endpoint.area.no_credentials,
                "HTTP Basic authentication is required: app key and master secret",
            )
        login = self._apps.peek_login(header) or await self._apps.login(header)
        if login is None:
            raise ApiError(endpoint.area.bad_credentials)
        if not (login.publisher or endpoint.device_key):
            raise ApiError(
                endpoint.area.bad_credentials, "the device key is not enough; use the master secret"
            )
        return login


async def _read_body(request: web.Request, endpoint: Endpoint) -> bytes:
    """At most max_body bytes, after decompression."""
    if (request.content_length or 0) > endpoint.max_body:
        raise _too_large(endpoint)
    try:
        body = await request.content.readany()
        if request.content.at_eof():
            return body
        chunks, size = [body], len(body)
        while size <= endpoint.max_body and not request.content.at_eof():
            chunks.append(await request.content.readany())
            size += len(chunks[-1])
    except (web.RequestPayloadError, ConnectionError) as error:
        raise ApiError(endpoint.area.invalid, f"the body could not be read: {error}") from None
    if size > endpoint.max_body:
        raise _too_large(endpoint)
    return b"".join(chunks)


def _too_large(endpoint: Endpoint) -> ApiError:
    message = f"the body is larger than {endpoint.max_body} bytes"
    return ApiError(endpoint.area.too_large, message, http_status=413)


def _internal(endpoint: Endpoint) -> ApiError:
    request_id = secrets.token_hex(8)
    log.exception("request %s: %s %s failed", request_id, endpoint.method, endpoint.paths[0])
    return ApiError(endpoint.area.internal, f"internal error; the server's log has more under {request_id}")


def _refuse(error: ApiError, headers: dict[str, str]) -> web.Response:
    response = web.Response(status=error.http_status, body=error.body(), headers=headers)
    if error.http_status == 401:
        response.headers["WWW-Authenticate"] = 'Basic realm="app key and secret"'  # RFC 9110, 11.6.1
    if error.http_status == 413:
        response.force_close()  # the rest of the body is not worth reading
    return response
