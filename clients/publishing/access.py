"""The app's own settings, its API keys, and its audit log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Final, Literal

import msgspec

from clients.publishing.calls import Calls, given, quoted
from clients.publishing.pushes import CallbackTo

Scope = Literal["push", "report", "device", "schedule", "file", "segment", "callback", "admin"]
AUDIT_PAGE: Final = 100


class QuietHours(msgspec.Struct, frozen=True, omit_defaults=True):
    """From `start` to `end` (`HH:MM` in `zone`), past midnight where `end` is not later, pushes of normal
    priority wait for the end ("delay") or are suppressed."""

    start: str
    end: str
    zone: str = "UTC"
    action: Literal["delay", "suppress"] = "delay"


class FrequencyCap(msgspec.Struct, frozen=True, omit_defaults=True):
    """At most `count` (1 to 1000) pushes of normal priority for one device in a calendar hour or day of `zone`."""

    count: int
    per: Literal["hour", "day"] = "day"
    zone: str = "UTC"


class Settings(msgspec.Struct, frozen=True, omit_defaults=True):
    """`allow_from`: networks (CIDR) that may call the API; empty: all. `callback`: of pushes that bring none."""

    allow_from: tuple[str, ...] = ()
    quiet_hours: QuietHours | None = None
    frequency_caps: tuple[FrequencyCap, ...] = ()
    callback: CallbackTo | None = None


class Key(msgspec.Struct, frozen=True):
    """Times are Unix seconds; `expires_at` None: never."""

    id: str
    name: str
    scopes: Sequence[str]
    allow_from: Sequence[str]
    created_at: int
    expires_at: int | None


class NewKey(Key, frozen=True):
    """`secret`, the password in place of the master secret, is told this once."""

    secret: str


class _Keys(msgspec.Struct, frozen=True):
    keys: list[Key]


class Keys:
    """Secrets for a part of the API, so that not every backend needs the master secret."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def create(
        self,
        name: str,
        scopes: Sequence[Scope],
        *,
        expires_at: int | None = None,
        allow_from: Sequence[str] | None = None,
    ) -> NewKey:
        """`expires_at` in Unix seconds. If the answer was lost, the key may exist, and nobody knows its secret: look,
        and delete it."""
        body = {"name": name, "scopes": scopes, "expires_at": expires_at, "allow_from": allow_from}
        return await self._calls.post("/v1/keys", given(body), NewKey, safe=False)

    async def list(self) -> list[Key]:
        """Oldest first, without secrets."""
        return (await self._calls.get("/v1/keys", _Keys)).keys

    async def delete(self, key_id: str) -> None:
        """It stops at once."""
        await self._calls.do("DELETE", f"/v1/keys/{quoted(key_id)}")


class AuditEntry(msgspec.Struct, frozen=True):
    """One administrative call. `at` in Unix seconds; `outcome`: "done", or the error's message."""

    id: int
    at: float
    actor: str
    address: str
    action: str
    subject: str
    outcome: str


class _AuditPage(msgspec.Struct, frozen=True):
    entries: list[AuditEntry]
    before: int


async def read_audit(calls: Calls) -> AsyncIterator[AuditEntry]:
    """Newest first, page by page."""
    before: int | None = None
    while before != 0:
        page = await calls.get("/v1/audit", _AuditPage, before=before, limit=AUDIT_PAGE)
        for entry in page.entries:
            yield entry
        before = page.before
