"""A backend's side: send pushes, see what became of them, manage devices; over HTTP.

    async with Publisher("APPKEY", "MASTERSECRET", "https://push.example.com") as publisher:
        accepted = await publisher.push(PushRequest(Audience(alias=["anna"]), Notification("Hello")))

An accepted push is durable on the server. One Publisher is one pool of connections: make one for a process
and share it between tasks.

A call is tried again only where a repetition does no harm: the server refused it undone (429), no
connection came about, or the call is idempotent, as a push with a cid is. A push without a cid whose answer
was lost is not sent twice; PushError says so with http_status 0.
"""

from __future__ import annotations

import asyncio
import enum
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar
from urllib.parse import quote
from uuid import uuid4

import aiohttp
import msgspec

from clients.http import login_headers

BATCH: Final = 1000  # pushes in one batch call: the API's limit
BATCHES_AT_ONCE: Final = 4
NO_ANSWER: Final = 0  # as code and http_status: the server said nothing that could be understood
UNDONE: Final = frozenset({429})  # refused before anything happened
TRY_AGAIN: Final = frozenset({429, 500, 502, 503, 504})

Everyone = Literal["all"]
Platform = Literal["android", "ios", "quickapp", "hmos", "winphone"]
_T = TypeVar("_T")


# What a push is


class Audience(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whom a push is for. Keys AND together; `registration_id`, `alias` and `tag` mean any of the values,
    `tag_and` all of them, `tag_not` none of them."""

    registration_id: Sequence[str] = ()
    alias: Sequence[str] = ()
    tag: Sequence[str] = ()
    tag_and: Sequence[str] = ()
    tag_not: Sequence[str] = ()


Part = Mapping[str, Any] | None


class Notification(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a person sees: one `alert` for all, and what a platform has of its own."""

    alert: str | Mapping[str, Any] | None = None
    android: Part = None
    ios: Part = None
    quickapp: Part = None
    hmos: Part = None
    winphone: Part = None
    voip: Part = None

    @classmethod
    def titled(cls, title: str, alert: str, extras: Mapping[str, Any] | None = None) -> Notification:
        """With a title on every platform."""
        more = {"extras": extras} if extras else {}
        own = {"alert": alert, "title": title, **more}
        ios = {"alert": {"title": title, "body": alert}, **more}
        return cls(alert, android=own, ios=ios, quickapp=own, hmos=own, winphone=own)


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the app gets, and shows or not."""

    msg_content: str
    title: str | None = None
    content_type: str | None = None
    extras: Mapping[str, Any] | None = None


class Options(msgspec.Struct, frozen=True, omit_defaults=True):
    """`time_to_live` in seconds, 0: only for devices that are online now; None: the server's default, a
    day."""

    time_to_live: int | None = None
    sendno: int | str | None = None
    apns_production: bool | None = None
    apns_collapse_id: str | None = None
    classification: int | None = None


class PushRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """`cid`: a key of your own, up to 128 bytes; a push with a cid that was used is the push of the first
    time."""

    audience: Audience | Everyone
    notification: Notification | None = None
    message: Message | None = None
    options: Options | None = None
    cid: str | None = None
    platform: Everyone | Sequence[Platform] = msgspec.field(default_factory=lambda: "all")  # always written


class SinglePush(msgspec.Struct, frozen=True, omit_defaults=True):
    """One push of a batch: `target` is one registration id or alias."""

    target: str
    notification: Notification | None = None
    message: Message | None = None
    options: Options | None = None
    platform: Everyone | Sequence[Platform] = msgspec.field(default_factory=lambda: "all")


# What the server says


class Accepted(msgspec.Struct, frozen=True):
    """`msg_id` 0: it was only validated."""

    msg_id: int
    sendno: str


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


class DeviceInfo(msgspec.Struct, frozen=True):
    tags: frozenset[str]
    alias: str | None
    mobile: str | None


class DeviceStatus(msgspec.Struct, frozen=True):
    """`last_online_time` is UTC, `2026-01-31 23:59:59`; None while online, or if it never was."""

    online: bool
    last_online_time: str | None = None


class Registered(msgspec.Struct, frozen=True):
    """`expires_at` in Unix seconds."""

    registration_id: str
    token: str
    expires_at: int


class Delivery(enum.IntEnum):
    """One message and one device."""

    DELIVERED = 0
    NOT_DELIVERED = 1
    NOT_A_DEVICE = 2
    NOT_A_TARGET = 3


class Received(msgspec.Struct, frozen=True):
    """Deliveries by platform; None for an unknown message."""

    msg_id: int
    android_received: int | None
    ios_msg_received: int | None
    wp_mpns_sent: int | None


class Report(msgspec.Struct, frozen=True):
    """The whole accounting of a message: target = delivered + pending + expired + evicted. All None: the
    message is unknown, or its report is over."""

    msg_id: int
    target: int | None
    delivered: int | None
    pending: int | None
    expired: int | None
    evicted: int | None
    shown: int | None
    clicked: int | None
    dismissed: int | None

    @property
    def known(self) -> bool:
        return self.target is not None

    @property
    def adds_up(self) -> bool:
        parts = (self.delivered, self.pending, self.expired, self.evicted)
        return self.target is not None and self.target == sum(part or 0 for part in parts)


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """Times are seconds. The n-th pause is uniform in [0, min(cap, base * 2^n))."""

    attempts: int = 4
    base: float = 0.2
    cap: float = 5.0
    timeout: float = 30.0  # of one attempt


class _Error(msgspec.Struct, frozen=True):
    code: int
    message: str


class _Row(msgspec.Struct, frozen=True):
    """Of a batch's answer."""

    msg_id: int | None = None
    sendno: str = ""
    error: _Error | None = None


class _Failure(msgspec.Struct, frozen=True):
    error: _Error


class _State(msgspec.Struct, frozen=True):
    status: Delivery


DEFAULTS: Final = RetrySettings()
_encode: Final = msgspec.json.Encoder().encode


class Publisher:
    """Every call raises PushError. `connections`: how many calls may be under way at once, others wait."""

    def __init__(
        self,
        app_key: str,
        master_secret: str,
        url: str = "http://127.0.0.1:8080",
        *,
        connections: int = 100,
        retry: RetrySettings = DEFAULTS,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._url = url.rstrip("/")
        self._headers = login_headers(app_key, master_secret)
        self._connections = connections
        self._retry = retry
        self._jitter = jitter
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._retry.timeout),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None

    # Pushes

    async def push(self, request: PushRequest | Mapping[str, Any]) -> Accepted:
        """Send one push. A mapping is the API's JSON object as it is."""
        cid = request.cid if isinstance(request, PushRequest) else request.get("cid")
        return await self._post("/v3/push", request, Accepted, safe=cid is not None)

    async def validate(self, request: PushRequest | Mapping[str, Any]) -> Accepted:
        """All checks of `push`, its audience included, and nothing is sent."""
        return await self._post("/v3/push/validate", request, Accepted, safe=True)

    async def push_many(
        self, pushes: Sequence[SinglePush] | Mapping[str, SinglePush], by: Literal["regid", "alias"] = "regid"
    ) -> list[Accepted | PushError]:
        """Many pushes to one device or alias each, a thousand in a call and one fsync; results in the order
        given. A mapping gives the pushes cids of your own; otherwise they get random ones. Raises PushError
        if a call failed as a whole: with cids of your own the same pushes may be sent again."""
        named = pushes if isinstance(pushes, Mapping) else {str(uuid4()): push for push in pushes}
        cids = list(named)
        gate = asyncio.Semaphore(BATCHES_AT_ONCE)

        async def send(part: list[str]) -> list[Accepted | PushError]:
            async with gate:
                return await self._push_batch({cid: named[cid] for cid in part}, by)

        parts = [cids[start : start + BATCH] for start in range(0, len(cids), BATCH)]
        return [result for results in await asyncio.gather(*map(send, parts)) for result in results]

    async def _push_batch(self, batch: Mapping[str, SinglePush], by: str) -> list[Accepted | PushError]:
        """If every push of a batch is refused, the status is the first one's, and the rows stand beside
        it."""
        path = f"/v3/push/batch/{by}/single"
        answer = await self._call("POST", path, _encode({"pushlist": batch}), safe=True)
        rows = answer.read(dict[str, Any])
        if not batch.keys() <= rows.keys():
            raise answer.failure()
        return [_result(msgspec.convert(rows[cid], _Row, strict=False), answer.status) for cid in batch]

    # What became of them

    async def status(self, msg_id: int, registration_ids: Sequence[str]) -> dict[str, Delivery]:
        body = {"msg_id": msg_id, "registration_ids": registration_ids}
        states = await self._post("/v3/status/message", body, dict[str, _State], safe=True)
        return {registration_id: state.status for registration_id, state in states.items()}

    async def received(self, msg_ids: Sequence[int]) -> list[Received]:
        """Up to 100 messages, in the order given."""
        return await self._get(f"/v3/received?msg_ids={_join(msg_ids)}", list[Received])

    async def received_detail(self, msg_ids: Sequence[int]) -> list[Report]:
        """Up to 100 messages, in the order given."""
        return await self._get(f"/v3/received/detail?msg_ids={_join(msg_ids)}", list[Report])

    # Devices

    async def register_device(
        self,
        registration_id: str | None = None,
        *,
        platform: str | None = None,
        alias: str | None = None,
        tags: Sequence[str] | None = None,
        mobile: str | None = None,
    ) -> Registered:
        """Register a device, or give one that exists a new token and these properties."""
        body = {
            "registration_id": registration_id,
            "platform": platform,
            "alias": alias,
            "tags": tags,
            "mobile": mobile,
        }
        return await self._post("/v1/devices", _given(body), Registered, safe=registration_id is not None)

    async def revoke_tokens(self, registration_id: str) -> None:
        """All tokens of the device stop being valid, and its connection is closed."""
        answer = await self._call("DELETE", f"/v1/devices/{_quoted(registration_id)}/token", None, safe=True)
        answer.check()

    async def device(self, registration_id: str) -> DeviceInfo:
        return await self._get(_device(registration_id), DeviceInfo)

    async def update_device(
        self,
        registration_id: str,
        *,
        alias: str | None = None,
        tags: Sequence[str] | None = None,
        add_tags: Sequence[str] = (),
        remove_tags: Sequence[str] = (),
        mobile: str | None = None,
        platform: str | None = None,
    ) -> None:
        """None leaves a value as it is, "" clears alias and mobile; `tags` replaces all of them."""
        body: dict[str, object] = {"alias": alias, "mobile": mobile, "platform": platform, "tags": tags}
        if add_tags or remove_tags:
            if tags is not None:
                raise ValueError("give tags, or add_tags and remove_tags")
            body["tags"] = {"add": add_tags, "remove": remove_tags}
        answer = await self._call("POST", _device(registration_id), _encode(_given(body)), safe=True)
        answer.check()

    async def devices_status(self, registration_ids: Sequence[str]) -> dict[str, DeviceStatus]:
        """Up to 1000; ids that are no device of the app are left out."""
        body = {"registration_ids": registration_ids}
        return await self._post("/v3/devices/status", body, dict[str, DeviceStatus], safe=True)

    # Calls

    async def _get(self, path: str, shape: type[_T]) -> _T:
        answer = await self._call("GET", path, None, safe=True)
        return answer.check().read(shape)

    async def _post(self, path: str, body: object, shape: type[_T], *, safe: bool) -> _T:
        answer = await self._call("POST", path, _encode(body), safe=safe)
        return answer.check().read(shape)

    async def _call(self, method: str, path: str, body: bytes | None, *, safe: bool) -> _Answer:
        """`safe`: repeating the call does no harm. Raises PushError if there is no answer."""
        for attempt in range(self._retry.attempts):
            if attempt:
                await asyncio.sleep(self._pause(attempt - 1))
            last = attempt + 1 == self._retry.attempts
            try:
                answer = await self._call_once(method, path, body)
            except aiohttp.ClientConnectorError as error:  # nothing was sent
                if last:
                    raise self._unreachable(error) from error
            except (aiohttp.ClientError, TimeoutError) as error:
                if last or not safe:
                    raise self._lost(error, safe) from error
            else:
                if last or not (answer.status in UNDONE or (safe and answer.status in TRY_AGAIN)):
                    return answer
        raise AssertionError("at least one attempt")

    async def _call_once(self, method: str, path: str, body: bytes | None) -> _Answer:
        assert self._http is not None, "use `async with Publisher(…)`"
        async with self._http.request(method, self._url + path, data=body) as response:
            return _Answer(response.status, await response.read())

    def _pause(self, n: int) -> float:
        return self._jitter() * min(self._retry.cap, self._retry.base * 2.0**n)

    def _unreachable(self, error: Exception) -> PushError:
        return PushError(NO_ANSWER, NO_ANSWER, f"{self._url} cannot be reached: {error}")

    def _lost(self, error: Exception, safe: bool) -> PushError:
        what = "" if safe else "; it may have been accepted, only a push with a cid can be sent again safely"
        why = str(error) or "no answer in time"
        return PushError(NO_ANSWER, NO_ANSWER, f"{self._url}: the answer was lost: {why}{what}")


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    raw: bytes

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


def _result(row: _Row, status: int) -> Accepted | PushError:
    if row.error is not None:
        return PushError(row.error.code, status, row.error.message)
    return Accepted(row.msg_id or 0, row.sendno)


def _quoted(name: str) -> str:
    return quote(name, safe="")


def _device(registration_id: str) -> str:
    return f"/v3/devices/{_quoted(registration_id)}"


def _given(body: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in body.items() if value is not None}


def _join(msg_ids: Sequence[int]) -> str:
    return ",".join(map(str, msg_ids))
