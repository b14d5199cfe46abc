"""One HTTP call to the API and its answer: pool, repetitions, errors. What all domains share."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote, urlencode

import aiohttp
import msgspec

from clients.http import http_address, login_headers

NO_ANSWER: Final = 0  # as code and http_status: the server said nothing that could be understood
UNDONE: Final = frozenset({429})  # refused before anything happened
TRY_AGAIN: Final = frozenset({429, 500, 502, 503, 504})

_T = TypeVar("_T")
_encode: Final = msgspec.json.Encoder().encode


class PushError(Exception):
    """`code` is the public API's, `http_status` the answer's. Both are NO_ANSWER (0) if the server could
    not be reached or its answer was lost."""

    def __init__(self, code: int, http_status: int, message: str) -> None:
        super().__init__(code, http_status, message)
        self.code = code
        self.http_status = http_status
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} (code {self.code}, HTTP {self.http_status})" if self.code else self.message


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """Times are seconds. The n-th pause is uniform in [0, min(cap, base * 2^n))."""

    attempts: int = 4
    base: float = 0.2
    cap: float = 5.0
    timeout: float = 30.0  # of one attempt; of an upload: without any progress


class _Error(msgspec.Struct, frozen=True):
    code: int
    message: str


class _Failure(msgspec.Struct, frozen=True):
    error: _Error


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    raw: bytes
    repeated: bool = False  # an attempt before it may have been carried out

    def check(self) -> Self:
        if self.status != 200:
            raise self.failure()
        return self

    def failure(self) -> PushError:
        try:
            error = msgspec.json.decode(self.raw, type=_Failure).error
        except msgspec.DecodeError:
            return PushError(NO_ANSWER, self.status, f"HTTP status {self.status}, without an explanation")
        return PushError(error.code, self.status, error.message)

    def read(self, shape: type[_T]) -> _T:
        """Not strict: msg_ids are strings on the wire."""
        try:
            return msgspec.json.decode(self.raw, type=shape, strict=False)
        except msgspec.DecodeError as error:
            raise PushError(NO_ANSWER, self.status, f"HTTP status {self.status}: {error}") from error


Stream = Callable[[], AsyncIterator[bytes]]
"""Makes the body of a call, from its start, for each attempt."""
Body = bytes | Stream | None


class Calls:
    """A pool of connections to one server, with the login of one app. Every call raises PushError. ValueError: `url`
    is no http address."""

    def __init__(
        self,
        user: str,
        secret: str,
        url: str,
        connections: int,
        retry: RetrySettings,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._url = http_address(url)
        self._headers = login_headers(user, secret)
        self._connections = connections
        self._retry = retry
        self._jitter = jitter
        self._http: aiohttp.ClientSession | None = None

    def open(self) -> None:
        tracing = aiohttp.TraceConfig()
        tracing.on_request_headers_sent.append(_count_sent)
        self._http = aiohttp.ClientSession(
            trace_configs=[tracing],
            connector=aiohttp.TCPConnector(limit=self._connections),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._retry.timeout),
        )

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def get(self, path: str, shape: type[_T], **query: object) -> _T:
        answer = await self.call("GET", with_query(path, query), None, safe=True)
        return answer.check().read(shape)

    async def post(self, path: str, body: object, shape: type[_T], *, safe: bool) -> _T:
        answer = await self.call("POST", path, _encode(body), safe=safe)
        return answer.check().read(shape)

    async def put(self, path: str, body: object, shape: type[_T]) -> _T:
        """Putting the same twice is putting it once."""
        return (await self.call("PUT", path, _encode(body), safe=True)).check().read(shape)

    async def do(self, method: str, path: str, body: object = None, *, safe: bool = True) -> None:
        """A call whose answer says no more than that it was done. What is gone when a deletion is repeated, was
        deleted."""
        answer = await self.call(method, path, None if body is None else _encode(body), safe=safe)
        if not (method == "DELETE" and answer.repeated and answer.status == 404):
            answer.check()

    async def call(
        self, method: str, path: str, body: Body, *, safe: bool, content_type: str | None = None
    ) -> Answer:
        """`safe`: repeating the call does no harm. Raises PushError if there is no answer."""
        repeated = False
        for attempt in range(self._retry.attempts):
            if attempt:
                await asyncio.sleep(self._pause(attempt - 1))
            last = attempt + 1 == self._retry.attempts
            try:
                answer = await self._call_once(method, path, body, content_type)
            except aiohttp.ClientConnectorError as error:  # nothing was sent
                if last:
                    raise self._unreachable(error) from error
            except (aiohttp.ClientError, TimeoutError) as error:
                if last or not safe:
                    raise self._lost(error, safe) from error
                repeated = True
            else:
                if last or not (answer.status in UNDONE or (safe and answer.status in TRY_AGAIN)):
                    return replace(answer, repeated=repeated or answer.repeated)
                repeated = repeated or answer.status not in UNDONE
        raise AssertionError("at least one attempt")

    async def _call_once(self, method: str, path: str, body: Body, content_type: str | None) -> Answer:
        assert self._http is not None, "use `async with Publisher(…)`"
        sent = {"times": 0}
        options: dict[str, Any] = {"data": body() if callable(body) else body, "trace_request_ctx": sent}
        if callable(body):
            options["timeout"] = aiohttp.ClientTimeout(total=None, sock_read=self._retry.timeout)
        if content_type is not None:
            options["headers"] = {"Content-Type": content_type}
        async with self._http.request(method, self._url + path, **options) as response:
            return Answer(response.status, await response.read(), repeated=sent["times"] > 1)

    def _pause(self, n: int) -> float:
        return self._jitter() * min(self._retry.cap, self._retry.base * 2.0**n)

    def _unreachable(self, error: Exception) -> PushError:
        return PushError(NO_ANSWER, NO_ANSWER, f"{self._url} cannot be reached: {error}")

    def _lost(self, error: Exception, safe: bool) -> PushError:
        what = "" if safe else "; it may have been accepted: look before you try again, or give a push a cid"
        why = str(error) or "no answer in time"
        return PushError(NO_ANSWER, NO_ANSWER, f"{self._url}: the answer was lost: {why}{what}")


async def _count_sent(_: aiohttp.ClientSession, context: Any, __: object) -> None:
    """aiohttp itself sends again what it takes for harmless, a DELETE among it, when the connection breaks."""
    context.trace_request_ctx["times"] += 1


def quoted(name: object) -> str:
    """As one part of a path."""
    return quote(str(name), safe="")


def with_query(path: str, query: Mapping[str, object]) -> str:
    """What is None is left out."""
    text = urlencode(given(query), safe=",")
    return f"{path}?{text}" if text else path


def given(body: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in body.items() if value is not None}


def join(values: Sequence[object]) -> str:
    return ",".join(map(str, values))
