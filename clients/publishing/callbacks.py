"""Callbacks: what still waits to be told, what was given up; and, for their receiver, who sent one."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from clients.publishing.calls import Calls

PATH: Final = "/v1/callbacks"
PAGE: Final = 1000  # events in one answer
SIGNATURE: Final = "Holdfast-Signature"
_FORM: Final = re.compile(r"t=([0-9]{1,12}),v1=([0-9a-f]{64})")


class CallbackCounts(msgspec.Struct, frozen=True):
    """Events to be told, events given up; and the secret that signs what is sent."""

    waiting: int
    parked: int
    signing_secret: str


class ParkedEvent(msgspec.Struct, frozen=True):
    """One event of one push for so many `devices`. `at` is Unix seconds, `error` that of the last attempt."""

    event_id: str
    msg_id: int
    event: str
    at: float
    devices: int
    url: str
    attempts: int
    error: str


class _Parked(msgspec.Struct, frozen=True):
    events: list[ParkedEvent]


class _Retried(msgspec.Struct, frozen=True):
    retried: int


class _Dropped(msgspec.Struct, frozen=True):
    dropped: int


class Callbacks:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def counts(self) -> CallbackCounts:
        return await self._calls.get(PATH, CallbackCounts)

    async def parked(self) -> AsyncIterator[ParkedEvent]:
        """Page by page, oldest first."""
        after = "0"
        while True:
            page = (await self._calls.get(f"{PATH}/parked", _Parked, after=after, limit=PAGE)).events
            for event in page:
                yield event
            if len(page) < PAGE:
                return
            after = page[-1].event_id

    async def retry(self) -> int:
        """Try the parked ones again, now; returns how many."""
        return (await self._calls.post(f"{PATH}/parked/retry", {}, _Retried, safe=True)).retried

    async def drop(self) -> int:
        """Forget the parked ones; returns how many."""
        answer = await self._calls.call("DELETE", f"{PATH}/parked", None, safe=True)
        return answer.check().read(_Dropped).dropped


# For receivers


class CallbackEvent(msgspec.Struct, frozen=True):
    """The same `event_id` may come again: an event is told at least once."""

    event_id: str
    msg_id: int
    event: str
    at: float
    registration_ids: Sequence[str]
    params: Mapping[str, Any] | None


class Callback(msgspec.Struct, frozen=True):
    """The body of one POST. `sent_at` is Unix seconds."""

    app_key: str
    sent_at: float
    events: Sequence[CallbackEvent]


class SignatureError(ValueError):
    """A callback is not from our server, or is a repetition of an old one."""


def verify_signature(secret: str, header: str, body: bytes, now: float, *, tolerance: float = 300.0) -> None:
    """Raises SignatureError unless `header` (Holdfast-Signature) signs this body with the app's signing secret
    (CallbackCounts), at most `tolerance` seconds away from `now`. `body`: the bytes as they came."""
    match = _FORM.fullmatch(header)
    if match is None:
        raise SignatureError(f"{SIGNATURE} is not of the form t=…,v1=…")
    expected = hmac.new(secret.encode(), match[1].encode() + b"." + body, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(match[2], expected):
        raise SignatureError("the signature does not fit the body and the secret")
    if abs(now - int(match[1])) > tolerance:
        raise SignatureError(f"signed {now - int(match[1]):.0f} seconds ago; {tolerance:.0f} are allowed")


def read_callback(secret: str, header: str, body: bytes, now: float) -> Callback:
    """Verify and decode. Raises SignatureError, and msgspec.DecodeError."""
    verify_signature(secret, header, body, now)
    return msgspec.json.decode(body, type=Callback, strict=False)
