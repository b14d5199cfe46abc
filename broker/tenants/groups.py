"""App groups: several apps that one secret may push to at once. Records of the installation (app_id 0)."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Callable
from typing import Final
from uuid import UUID, uuid4, uuid5

import msgspec
import orjson
from msgspec import Struct

from broker.errors import ADMIN, PUSH, ApiError, refusal
from broker.limits import Limits, limits_of
from broker.model import Record, RecordChange
from broker.pushing.pushes import Accepted, Pushes
from broker.pushing.requests import decode
from broker.store import Conflict, Store, StoreError, TooMany, every_record
from broker.tenants.apps import Apps, read_basic
from broker.tenants.networks import is_within
from broker.tenants.rates import RateLimits, is_over
from broker.tenants.tokens import new_secret

Clock = Callable[[], float]
KIND: Final = "group"
USER: Final = "group-"  # and the group's key: the user of a group push
MAX_NAME: Final = 200
_SPACE: Final = UUID("3f0e1c55-4c1d-4a30-9a57-8d8d1f7f4f0e")  # of the ids of group pushes with a cid


class Group(Struct, frozen=True):
    key: str
    name: str
    secret: str
    apps: tuple[str, ...]  # their keys
    created_at: float

    def describe(self) -> dict[str, object]:
        return {
            "group_key": self.key,
            "name": self.name,
            "secret": self.secret,
            "apps": list(self.apps),
            "created_at": int(self.created_at),
        }


class GroupRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """What is left out stays, or is empty in a new group."""

    name: str | None = None
    apps: list[str] | None = None


_read_request: Final = msgspec.json.Decoder(GroupRequest).decode
_read_group: Final = msgspec.json.Decoder(Group).decode


class Groups:
    """Methods raise ApiError for what the caller did wrong and let StoreError pass."""

    def __init__(
        self, store: Store, apps: Apps, limits: Limits | None = None, clock: Clock = time.time
    ) -> None:
        self._records = store.records
        self._apps = apps
        self._limits = limits or Limits()
        self._clock = clock

    async def create(self, raw: bytes) -> Group:
        request = decode(_read_request, raw, ADMIN)
        if request.name is None:
            raise ApiError(ADMIN.missing, "name is required")
        group = Group(
            secrets.token_hex(12),
            _check_name(request.name),
            new_secret(),
            await self._check_apps(request.apps or []),
            self._clock(),
        )
        most = self._limits.max_groups
        try:
            await self._records.save([msgspec.structs.replace(_change(group, 0), at_most=most)])
        except TooMany:
            raise ApiError(ADMIN.too_many, f"there are {most} groups already") from None
        return group

    async def change(self, key: str, raw: bytes) -> Group:
        """Another name, other apps, or both."""
        request = decode(_read_request, raw, ADMIN)
        name = None if request.name is None else _check_name(request.name)
        apps = None if request.apps is None else await self._check_apps(request.apps)
        while True:
            record = await self._record(key)
            group = _read_group(record.value)
            group = msgspec.structs.replace(
                group, name=name or group.name, apps=group.apps if apps is None else apps
            )
            try:
                await self._records.save([_change(group, record.version)])
            except Conflict:
                continue
            return group

    async def every(self) -> list[Group]:
        records = await every_record(self._records, 0, KIND)
        return sorted((_read_group(record.value) for record in records), key=lambda group: group.created_at)

    async def delete(self, key: str) -> Group:
        while True:
            record = await self._record(key)
            try:
                await self._records.save([RecordChange(0, KIND, key, None, record.version)])
            except Conflict:
                continue
            return _read_group(record.value)

    async def login(self, header: str) -> Group | None:
        """Check an `Authorization: Basic` header (group-KEY and the group's secret)."""
        credentials = read_basic(header)
        if credentials is None or not credentials[0].startswith(USER):
            return None
        record = await self._records.find(0, KIND, credentials[0].removeprefix(USER))
        group = _read_group(record.value) if record else None
        if group is None or not hmac.compare_digest(group.secret.encode(), credentials[1]):
            return None
        return group

    async def _record(self, key: str) -> Record:
        record = await self._records.find(0, KIND, key)
        if record is None:
            raise ApiError(ADMIN.invalid, f"there is no group {key}", http_status=404)
        return record

    async def _check_apps(self, keys: list[str]) -> tuple[str, ...]:
        if len(keys) > self._limits.max_group_apps:
            raise ApiError(
                ADMIN.too_many, f"apps: at most {self._limits.max_group_apps} in a group, got {len(keys)}"
            )
        for key in keys:
            if await self._apps.find(key) is None:
                raise ApiError(1008, f"apps: there is no app {key[:40]}")
        return tuple(dict.fromkeys(keys))


class GroupPushes:
    """One push to each app of a group: each is accepted or refused on its own, and counts against its rate limit."""

    def __init__(self, apps: Apps, pushes: Pushes, rates: RateLimits, limits: Limits) -> None:
        self._apps = apps
        self._pushes = pushes
        self._rates = rates
        self._limits = limits

    async def push(
        self, group: Group, raw: bytes, address: str
    ) -> tuple[str, dict[str, Accepted | ApiError]]:
        """The id of the group's push, and the result by app key. The same cid gives the same id, and each app that
        accepted it the first time answers what it did then."""
        if not group.apps:
            raise ApiError(1011, f"the group {group.name} has no apps")
        results = await asyncio.gather(*(self._push(key, raw, address) for key in group.apps))
        return _group_msgid(group, raw), dict(zip(group.apps, results, strict=True))

    async def _push(self, key: str, raw: bytes, address: str) -> Accepted | ApiError:
        try:
            app = await self._apps.find(key)
            if app is None:
                raise ApiError(1008, f"there is no app {key} any more")
            if app.settings.allow_from and not is_within(address, app.settings.allow_from):
                raise ApiError(2004)
            if is_over(self._rates.spend(PUSH, (app.app_id, True), limits_of(self._limits, app))):
                raise ApiError(2002)
            return await self._pushes.push(app, raw)
        except ApiError as error:
            return error
        except StoreError as error:
            return refusal(error, PUSH)


def _group_msgid(group: Group, raw: bytes) -> str:
    """Of a body that was read already, unless all apps refused it."""
    try:
        cid = orjson.loads(raw)["cid"]
    except (ValueError, TypeError, KeyError):
        cid = None
    return str(uuid5(_SPACE, f"{group.key}/{cid}") if isinstance(cid, str) else uuid4())


def _change(group: Group, version: int) -> RecordChange:
    return RecordChange(0, KIND, group.key, msgspec.json.encode(group), version)


def _check_name(name: str) -> str:
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise ApiError(ADMIN.invalid, f"name: must be 1 to {MAX_NAME} printable characters")
    return name
