"""API keys: secrets beside the master secret, each for some scopes, from some networks, until some time.

A secret is `hk<id><192 random bits>`, letters and digits only: some SDKs check that. Only HMAC-SHA256 of it is kept,
under the app's signing key: what slow password hashes are for, guessing, does not work on 192 random bits, and a call
must not wait for one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import Struct

from broker.errors import ADMIN, ApiError
from broker.limits import Limits, limits_of
from broker.model import App, Record, RecordChange
from broker.pushing.requests import decode
from broker.store import Conflict, Store, TooMany, every_record
from broker.tenants.app_settings import read_networks

Clock = Callable[[], float]
KIND: Final = "key"
SCOPES: Final = ("push", "report", "device", "schedule", "file", "segment", "callback", "admin")
MAX_NAME: Final = 200
_SECRET: Final = re.compile(rb"hk([0-9a-f]{16})[0-9a-f]{48}")


class ApiKey(Struct, frozen=True):
    """As it is kept."""

    key_id: str
    name: str
    scopes: tuple[str, ...]
    allow_from: tuple[str, ...]
    created_at: float
    expires_at: float | None
    hash: str

    def describe(self) -> dict[str, object]:
        """Without the hash."""
        return {
            "id": self.key_id,
            "name": self.name,
            "scopes": list(self.scopes),
            "allow_from": list(self.allow_from),
            "created_at": int(self.created_at),
            "expires_at": None if self.expires_at is None else int(self.expires_at),
        }


class KeyRequest(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    scopes: list[str]
    expires_at: int | None = None  # Unix time
    allow_from: list[str] | None = None


_read_request: Final = msgspec.json.Decoder(KeyRequest).decode
_read_key: Final = msgspec.json.Decoder(ApiKey).decode


async def find_key(store: Store, app: App, secret: bytes) -> ApiKey | None:
    """The key that this is the secret of, expired or not. Lets StoreError pass."""
    match = _SECRET.fullmatch(secret)
    record = await store.records.find(app.app_id, KIND, match[1].decode()) if match else None
    if record is None:
        return None
    key = _read_key(record.value)
    return key if hmac.compare_digest(key.hash, _hash(app, secret)) else None


class Keys:
    """Methods raise ApiError for what the caller did wrong and let StoreError pass. `changed(app_id)` is called after
    a key went: whoever remembers logins must drop them."""

    def __init__(
        self,
        store: Store,
        changed: Callable[[int], None],
        limits: Limits | None = None,
        clock: Clock = time.time,
    ) -> None:
        self._records = store.records
        self._changed = changed
        self._limits = limits or Limits()
        self._clock = clock

    async def create(self, app: App, raw: bytes) -> tuple[ApiKey, str]:
        """`raw`: `{"name", "scopes", "expires_at"?, "allow_from"?}`. Returns the key and its secret, which nobody can
        show again."""
        request = decode(_read_request, raw, ADMIN)
        key_id = secrets.token_hex(8)
        secret = f"hk{key_id}{secrets.token_hex(24)}"
        key = ApiKey(
            key_id,
            _check_name(request.name),
            _check_scopes(request.scopes),
            read_networks(request.allow_from or ()),
            self._clock(),
            self._check_expiry(request.expires_at),
            _hash(app, secret.encode()),
        )
        most = limits_of(self._limits, app).max_keys
        change = RecordChange(app.app_id, KIND, key_id, msgspec.json.encode(key), 0, at_most=most)
        try:
            await self._records.save([change])
        except TooMany:
            message = f"the app has {most} keys already, its limit (max_keys)"
            raise ApiError(ADMIN.too_many, message) from None
        return key, secret

    async def of_app(self, app: App) -> list[ApiKey]:
        """Oldest first."""
        records = await every_record(self._records, app.app_id, KIND)
        return sorted((_read_key(record.value) for record in records), key=lambda key: key.created_at)

    async def delete(self, app: App, key_id: str) -> ApiKey:
        """It stops at once, here; in other processes when the bell arrives."""
        while record := await self._records.find(app.app_id, KIND, key_id):
            try:
                await self._remove(record)
            except Conflict:
                continue
            self._changed(app.app_id)
            return _read_key(record.value)
        raise ApiError(ADMIN.invalid, f"there is no key {key_id}", http_status=404)

    async def _remove(self, record: Record) -> None:
        await self._records.save([RecordChange(record.app_id, KIND, record.key, None, record.version)])

    def _check_expiry(self, expires_at: int | None) -> float | None:
        if expires_at is not None and not self._clock() < expires_at < MAX_TIME:
            raise ApiError(ADMIN.invalid, f"expires_at: must be Unix time in the future, got {expires_at}")
        return expires_at


MAX_TIME: Final = 1 << 40  # of a time in seconds; those in milliseconds are a mistake


def _hash(app: App, secret: bytes) -> str:
    return hmac.new(app.signing_key, b"api key\0" + secret, hashlib.sha256).hexdigest()


def _check_name(name: str) -> str:
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise ApiError(ADMIN.invalid, f"name: must be 1 to {MAX_NAME} printable characters")
    return name


def _check_scopes(scopes: list[str]) -> tuple[str, ...]:
    wrong = [scope for scope in scopes if scope not in SCOPES]
    if wrong or not scopes:
        got = f", not {wrong[0][:40]!r}" if wrong else ""
        raise ApiError(ADMIN.invalid, f"scopes: one or more of {', '.join(SCOPES)}{got}")
    return tuple(scope for scope in SCOPES if scope in scopes)
