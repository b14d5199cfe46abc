"""What every call of the public API shares: who calls, how much, how fast, one shape for every failure."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Final, Literal

from aiohttp import hdrs, web
from aiohttp.web_request import BaseRequest

from broker.api.peers import Peers
from broker.api.plain import PlainAnswer
from broker.errors import ApiError, Area, refusal
from broker.limits import Limits, limits_of
from broker.model import App
from broker.store import StoreError
from broker.tenants.apps import Apps, Login
from broker.tenants.audit import Audit
from broker.tenants.groups import Group, Groups
from broker.tenants.keys import ApiKey
from broker.tenants.networks import is_within
from broker.tenants.rates import MINUTE, RateLimits, Who, is_over, over_rate

log: Final = logging.getLogger(__name__)
DONE: Final = b""  # the vendor answers changes with an empty body
GZIP_OR_ZLIB: Final = zlib.MAX_WBITS | 32  # told by the first bytes

Clock = Callable[[], float]
Observe = Callable[[str, int, float], None]
Size = Callable[[Limits], int]
BODY: Final[Size] = attrgetter("max_body")
BATCH_BODY: Final[Size] = attrgetter("max_batch_body")


@dataclass(slots=True)
class Call:
    """One authenticated, admitted request with its whole body."""

    caller: Login | Group | None  # None: anybody may make it
    raw: bytes
    request: web.Request
    peers: Peers
    action: str = ""  # its name in the audit log; "": it does not belong there
    subject: str | None = None  # what it is done to, for the audit log; None: the last name in the path
    status: int = 200  # of the answer, and headers of its own
    headers: dict[str, str] | None = None

    @property
    def address(self) -> str:
        """Of the caller, "" if unknown."""
        return self.peers.address(self.request)

    @property
    def app(self) -> App:
        assert isinstance(self.caller, Login)
        return self.caller.app

    @property
    def publisher(self) -> bool:
        """False: it has only the device key."""
        return isinstance(self.caller, Login) and self.caller.publisher

    @property
    def group(self) -> Group:
        assert isinstance(self.caller, Group)
        return self.caller

    def path(self, name: str) -> str:
        return self.request.match_info[name]

    def query(self, name: str) -> str | None:
        return self.request.query.get(name)


Handler = Callable[[Call], Awaitable[bytes]]
Handle = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A row of the API: answers 200 with what `handler` returns, or what it raised. What it is for and what it takes
    is in described.py."""

    method: str
    paths: tuple[str, ...]  # one for each address plan; the first names it in metrics
    area: Area
    handler: Handler
    max_body: int | Size = 0  # 0: the body is left to the handler
    device_key: bool = False  # the device key is enough
    scope: str = ""  # that an API key needs; "": the area's name
    who: Literal["app", "group", "anybody"] = "app"
    audit: str = ""  # its name in the audit log, if every such call belongs there; else the handler names it

    @property
    def needs(self) -> str:
        return self.scope or self.area.name

    @property
    def fixed(self) -> bool:
        """No path of it has a parameter."""
        return not any("{" in path for path in self.paths)


class ApiCounters:
    """The default for `observe`: plain ints, at most endpoints x statuses of them."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = {}
        self.seconds: dict[str, float] = {}

    def observe(self, endpoint: str, status: int, seconds: float) -> None:
        """`endpoint` is a route's pattern, never a path as the peer sent it."""
        self.requests[endpoint, status] = self.requests.get((endpoint, status), 0) + 1
        self.seconds[endpoint] = self.seconds.get(endpoint, 0.0) + seconds


@dataclass(slots=True)
class _Answer:
    """What is known of a call so far."""

    call: Call | None = None  # once somebody proved who they are, and was within the rate limit
    headers: dict[str, str] | None = None  # once they were counted
    admitted: bool = False  # once they may do what they ask for
    status: int = 200  # and own headers: as the handler wants them
    own_headers: dict[str, str] | None = None


class Guard:
    """Runs endpoints: authenticate, admit, read, handle, answer, record, count."""

    def __init__(
        self,
        apps: Apps,
        groups: Groups,
        audit: Audit,
        rates: RateLimits,
        limits: Limits,
        clock: Clock,
        observe: Observe,
        peers: Peers | None = None,
    ) -> None:
        self._apps = apps
        self._groups = groups
        self._audit = audit
        self._limits = limits
        self._clock = clock
        self._rates = rates
        self._observe = observe
        self._peers = peers or Peers()
        self._minute = 0
        self._refused: set[tuple[int, str, str]] = set()  # app, actor, action: refused in this minute

    def route(self, endpoint: Endpoint) -> Handle:
        async def handle(request: web.Request) -> web.StreamResponse:
            started = time.perf_counter()
            answer, body, error = _Answer(), b"", None
            try:
                body = await self._run(endpoint, request, answer)
            except ApiError as refused:
                error = refused
            except StoreError as failure:
                log.error("%s %s: %s", endpoint.method, endpoint.paths[0], failure)
                error = refusal(failure, endpoint.area)
            except Exception:  # noqa: BLE001 - the boundary: whatever it is, the caller gets the API's shape
                error = _internal(endpoint)
            if answer.call is not None and answer.call.action:
                await self._record(endpoint, answer.call, answer.admitted, error.message if error else "done")
            headers = answer.headers or self._rates.untouched(endpoint.area)
            response = _refuse(error, headers) if error else _answer(request, body, headers, answer)
            self._observe(endpoint.paths[0], response.status, time.perf_counter() - started)
            return response

        return handle

    def refuse(self, request: web.Request, error: ApiError, area: Area) -> web.Response:
        """Answer a call that belongs to no endpoint."""
        if self._peers.https_only and not self._peers.is_secure(request):
            error = ApiError(1020)
        self._observe("unknown", error.http_status, 0.0)
        return _refuse(error, self._rates.untouched(area))

    async def _run(self, endpoint: Endpoint, request: web.Request, answer: _Answer) -> bytes:
        if self._peers.https_only and not self._peers.is_secure(request):
            raise ApiError(1020)
        call = Call(None, b"", request, self._peers, endpoint.audit)
        if endpoint.who != "anybody":
            caller = call.caller = await self._login(request, endpoint)
            headers = answer.headers = self._rates.spend(endpoint.area, *self._purse(caller))
            if is_over(headers):
                headers["X-Rate-Limit-Remaining"] = "0"
                headers["Retry-After"] = headers["X-Rate-Limit-Reset"]  # RFC 9110, 10.2.3
                raise over_rate(endpoint.area, headers)
            answer.call = call
            if isinstance(caller, Login):
                if caller.key is not None:
                    _check_key(caller.key, endpoint, self._clock())
                _check_address(caller, call)
            answer.admitted = True
        if endpoint.max_body:
            most, patience = self._most(endpoint, call.caller), self._limits.request_timeout
            call.raw = await _read_body(request, endpoint, most, patience)
        body = await endpoint.handler(call)
        answer.status, answer.own_headers = call.status, call.headers
        return body

    def _purse(self, caller: Login | Group) -> tuple[Who, Limits]:
        if isinstance(caller, Group):
            return caller.key, self._limits
        return (caller.app.app_id, caller.publisher), limits_of(self._limits, caller.app)

    def _most(self, endpoint: Endpoint, caller: Login | Group | None) -> int:
        """Bytes of a body."""
        if isinstance(endpoint.max_body, int):
            return endpoint.max_body
        return endpoint.max_body(
            limits_of(self._limits, caller.app) if isinstance(caller, Login) else self._limits
        )

    async def _login(self, request: BaseRequest, endpoint: Endpoint) -> Login | Group:
        header = request.headers.get("Authorization")
        if header is None:
            raise ApiError(
                endpoint.area.no_credentials, f"HTTP Basic authentication is required: {_WHO[endpoint.who]}"
            )
        if endpoint.who == "group":
            return await self._group_login(header, endpoint)
        login = self._apps.peek_login(header) or await self._apps.login(header)
        if login is None:
            raise ApiError(endpoint.area.bad_credentials)
        if not (login.publisher or endpoint.device_key):
            raise ApiError(
                endpoint.area.bad_credentials, "the device key is not enough; use the master secret"
            )
        return login

    async def _group_login(self, header: str, endpoint: Endpoint) -> Group:
        group = await self._groups.login(header)
        if group is None:
            raise ApiError(
                endpoint.area.bad_credentials, f"authentication failed; it needs {_WHO[endpoint.who]}"
            )
        return group

    async def _record(self, endpoint: Endpoint, call: Call, admitted: bool, outcome: str) -> None:
        caller, subject = call.caller, call.subject
        if not (isinstance(caller, Login) and caller.publisher):
            return
        if not admitted and not self._is_news((caller.app.app_id, caller.actor, call.action)):
            return
        if subject is None:
            subject = "" if endpoint.fixed else next(reversed(call.request.match_info.values()), "")
        await self._audit.record(caller.app.app_id, caller.actor, call.address, call.action, subject, outcome)

    def _is_news(self, refused: tuple[int, str, str]) -> bool:
        """One entry a minute for what a caller may not do: a leaked key without the scope must not fill the log."""
        minute = int(self._clock()) // MINUTE
        if minute != self._minute:
            self._minute = minute
            self._refused.clear()
        known = refused in self._refused
        self._refused.add(refused)
        return not known


_WHO: Final = {"app": "app key and master secret", "group": "group-KEY and the group's secret"}


def _check_key(key: ApiKey, endpoint: Endpoint, now: float) -> None:
    """Not expired (401), and for this scope (403: we know who it is, and it may not)."""
    if key.expires_at is not None and now >= key.expires_at:
        raise ApiError(endpoint.area.bad_credentials, "the API key has expired")
    if endpoint.needs not in key.scopes:
        raise ApiError(
            endpoint.area.bad_credentials,
            f"the API key needs the scope {endpoint.needs}, it has {', '.join(key.scopes)}",
            http_status=403,
        )


def _check_address(login: Login, call: Call) -> None:
    """Installations are everywhere: the list is for those who hold the secret of a publisher."""
    if not login.publisher:
        return
    for networks in (login.app.settings.allow_from, login.key.allow_from if login.key else ()):
        if networks and not is_within(address := call.address, networks):
            raise ApiError(2004, f"the caller's address, {address or 'unknown'}, is not on the white list")


async def _read_body(request: web.Request, endpoint: Endpoint, most: int, patience: float) -> bytes:
    """At most so many bytes, before and after decompression."""
    if request.content.is_eof():  # nearly always; a timeout costs ten microseconds
        try:
            body = request.content.read_nowait()
        except ConnectionError as error:  # the caller left since
            raise _unreadable(endpoint, error) from None
        if len(body) > most:
            raise _too_large(endpoint, most)
    else:
        body = await _await_body(request, endpoint, most, patience)
    match request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower():
        case "identity":
            return body
        case "gzip" | "deflate":
            return _inflate(body, endpoint, most)
    raise ApiError(endpoint.area.invalid, "Content-Encoding: must be gzip or deflate, if any")


async def _await_body(request: web.Request, endpoint: Endpoint, most: int, patience: float) -> bytes:
    try:
        async with asyncio.timeout(patience):
            return await _read_raw(request, endpoint, most)
    except TimeoutError:
        raise ApiError(endpoint.area.invalid, too_slow(patience), http_status=408) from None


def _inflate(body: bytes, endpoint: Endpoint, most: int) -> bytes:
    """Stops at the limit: what a small body can grow to is a thousand times its size."""
    reader = zlib.decompressobj(GZIP_OR_ZLIB)
    try:
        inflated = reader.decompress(body, most + 1)
    except zlib.error as error:
        raise _unreadable(endpoint, error) from None
    if len(inflated) > most:
        raise _too_large(endpoint, most)
    if reader.unused_data:
        raise ApiError(
            endpoint.area.invalid, "the body could not be read: its compressed form has several parts"
        )
    if not reader.eof:
        raise ApiError(endpoint.area.invalid, "the body could not be read: its compressed form has no end")
    return inflated


async def _read_raw(request: web.Request, endpoint: Endpoint, most: int) -> bytes:
    if (request.content_length or 0) > most:
        raise _too_large(endpoint, most)
    try:
        body = await request.content.readany()
        if request.content.at_eof() and len(body) <= most:
            return body
        chunks, size = [body], len(body)
        while size <= most and not request.content.at_eof():
            chunks.append(await request.content.readany())
            size += len(chunks[-1])
    except (web.RequestPayloadError, ConnectionError) as error:
        raise _unreadable(endpoint, error) from None
    if size > most:
        raise _too_large(endpoint, most)
    return b"".join(chunks)


def too_slow(patience: float) -> str:
    return f"the body was not there within {patience:g} seconds (http.request_timeout)"


def _unreadable(endpoint: Endpoint, error: Exception) -> ApiError:
    return ApiError(endpoint.area.invalid, f"the body could not be read: {error}")


def _too_large(endpoint: Endpoint, most: int) -> ApiError:
    message = f"the body is larger than {most} bytes"
    return ApiError(endpoint.area.too_large, message, http_status=413)


def _internal(endpoint: Endpoint) -> ApiError:
    request_id = secrets.token_hex(8)
    log.exception("request %s: %s %s failed", request_id, endpoint.method, endpoint.paths[0])
    return ApiError(endpoint.area.internal, f"internal error; the server's log has more under {request_id}")


def _answer(
    request: web.Request, body: bytes, headers: dict[str, str], answer: _Answer
) -> web.StreamResponse:
    if answer.own_headers is not None:
        headers |= answer.own_headers
    elif answer.status == 200 and PlainAnswer.fits(request):
        return PlainAnswer(body, headers)
    return web.Response(status=answer.status, body=body, headers=headers)


def _refuse(error: ApiError, headers: dict[str, str]) -> web.Response:
    response = web.Response(status=error.http_status, body=error.body(), headers=headers)
    if error.http_status == 401:
        response.headers["WWW-Authenticate"] = 'Basic realm="app key and secret"'  # RFC 9110, 11.6.1
    if error.http_status in (408, 413):
        response.force_close()  # the rest of the body is not worth reading
    return response
