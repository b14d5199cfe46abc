"""Devices: registration, tokens, tags, aliases, status. Serves the HTTP API and the MQTT `device` topic."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import msgspec
from pyroaring import BitMap

from broker import tokens
from broker.bus import Bus, CredentialsChanged
from broker.errors import DEVICE, ApiError, refusing
from broker.limits import Limits
from broker.model import PLATFORMS, App, Device, DeviceChange, NewDevice, Term, TermKey
from broker.requests import check_name, decode
from broker.store import Store

Clock = Callable[[], float]


class RegisterRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    platform: str | None = None
    alias: str | None = None
    tags: list[str | int] | None = None
    mobile: str | None = None
    registration_id: str | None = None


class AddRemove(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    add: list[str | int] | None = None
    remove: list[str | int] | None = None


class ChangeRequest(msgspec.Struct, frozen=True):
    tags: str | list[str | int] | AddRemove | None = None  # "" clears, a list replaces
    alias: str | None = None  # "" clears
    mobile: str | None = None  # "" clears
    platform: str | None = None


class Ids(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    registration_ids: list[str]


class IdChanges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    registration_ids: AddRemove


class Renewal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    token: str | None = None


_read_register: Final = msgspec.json.Decoder(RegisterRequest).decode
_read_change: Final = msgspec.json.Decoder(ChangeRequest).decode
_read_ids: Final = msgspec.json.Decoder(Ids).decode
_read_id_changes: Final = msgspec.json.Decoder(IdChanges).decode
_read_renewal: Final = msgspec.json.Decoder(Renewal).decode
_MOBILE: Final = re.compile(r"[0-9+][0-9 -]{0,31}")


@dataclass(frozen=True, slots=True)
class Registered:
    device: Device
    token: str
    expires_at: int


class Devices:
    """`raw` arguments are JSON bodies. Every method raises ApiError for what the caller did wrong; those that
    say so also turn the store's failures into ApiErrors, the others let StoreError pass."""

    def __init__(
        self, store: Store, bus: Bus, limits: Limits | None = None, clock: Clock = time.time
    ) -> None:
        self._store = store
        self._bus = bus
        self._limits = limits or Limits()
        self._clock = clock
        self._claiming: set[tuple[int, str]] = set()  # chosen ids whose registration is under way

    # Registration and tokens

    async def register_json(self, app: App, raw: bytes, *, trusted: bool) -> Registered:
        request = decode(_read_register, raw or b"{}", DEVICE)
        return await self.register(
            app,
            platform=request.platform,
            alias=request.alias,
            tags=None if request.tags is None else [str(tag) for tag in request.tags],
            mobile=request.mobile,
            registration_id=request.registration_id,
            trusted=trusted,
        )

    async def register(
        self,
        app: App,
        *,
        platform: str | None = None,
        alias: str | None = None,
        tags: Iterable[str] | None = None,
        mobile: str | None = None,
        registration_id: str | None = None,
        trusted: bool = False,
    ) -> Registered:
        """Register a device, under a fresh id unless one is given. `trusted` (the publisher asks): an id that
        exists gets a new token and the given properties. Otherwise that is refused, for every installation
        knows the device key and could take over another's id; in an open app it may anyway. Store failures
        become ApiErrors."""
        new = NewDevice(
            secrets.token_hex(10) if registration_id is None else self.check_registration_id(registration_id),
            _check_platform(platform) or "other",
            self._check_alias(alias) or None,
            self._check_tags(tags or ()),
            _check_mobile(mobile) or None,
        )
        with refusing(DEVICE):
            if registration_id is None:
                device = (await self._store.register(app.app_id, [new]))[0]
            elif trusted or app.open:
                change = DeviceChange(alias, mobile, platform, set_tags=None if tags is None else new.tags)
                device = await self._register_or_change(app, new, change)
            else:
                device = await self._register_unclaimed(app, new)
        return self._issue(app, device)

    async def register_open(self, app: App, client_id: str) -> Device:
        """The device of an open app that connects with the device key; registered on first sight. Store
        failures become ApiErrors."""
        assert app.open
        self.check_registration_id(client_id)
        with refusing(DEVICE):
            found = await self._store.find_devices(app.app_id, [client_id])
            if client_id in found:
                return found[client_id]
            return (await self._store.register(app.app_id, [NewDevice(client_id)]))[0]

    async def renew_json(self, app: App, registration_id: str, raw: bytes, *, trusted: bool) -> Registered:
        """A new token; the old one stays valid until it expires. Without trust the body shows the current."""
        request = decode(_read_renewal, raw or b"{}", DEVICE)
        device = await self.find(app, registration_id)
        if request.token is not None:
            self._check_token(app, device, request.token)
        elif not trusted:
            raise ApiError(DEVICE.no_credentials, "give the master secret, or the current token in the body")
        return self._issue(app, device)

    async def revoke(self, app: App, registration_id: str) -> None:
        """All tokens of the device stop being valid, and its connection is closed. Store failures become
        ApiErrors."""
        with refusing(DEVICE):
            change = {registration_id: DeviceChange(revoke_tokens=True)}
            device = (await self._store.change_devices(app.app_id, change))[registration_id]
        self._bus.ring([CredentialsChanged(app.app_id, (device.devno,))])

    # One device

    async def find(self, app: App, registration_id: str) -> Device:
        device = (await self._store.find_devices(app.app_id, [registration_id])).get(registration_id)
        if device is None:
            raise _unknown(registration_id)
        return device

    async def change(self, app: App, registration_id: str, raw: bytes) -> Device:
        """The body of POST /v3/devices/{registration_id}. Store failures become ApiErrors."""
        request = decode(_read_change, raw, DEVICE)
        set_tags, add, remove = self._read_tags(request.tags)
        change = DeviceChange(
            alias=self._check_alias(request.alias),
            mobile=_check_mobile(request.mobile),
            platform=_check_platform(request.platform),
            set_tags=set_tags,
            add_tags=add,
            remove_tags=remove,
        )
        with refusing(DEVICE):
            if add:
                self._check_tag_count((await self.find(app, registration_id)).tags - remove | add)
            return (await self._store.change_devices(app.app_id, {registration_id: change}))[registration_id]

    async def status(self, app: App, raw: bytes) -> dict[str, dict[str, object]]:
        """By registration id, in the order asked; ids that are no device of this app are left out."""
        ids = self._bounded("registration_ids", decode(_read_ids, raw, DEVICE).registration_ids)
        found = await self._store.find_devices(app.app_id, ids)
        online = await self._store.online(app.app_id, BitMap([device.devno for device in found.values()]))
        return {i: _status(found[i], found[i].devno in online) for i in ids if i in found}

    # Aliases

    async def of_alias(self, app: App, alias: str, platforms: str | None) -> list[str]:
        """Registration ids, at most `max_listed` of them."""
        devnos = await self._having(app, (Term.ALIAS, alias), platforms)
        return await self._names(app, devnos)

    async def delete_alias(self, app: App, alias: str, platforms: str | None) -> None:
        await self._drop(app, (Term.ALIAS, alias), platforms)

    async def change_alias(self, app: App, alias: str, raw: bytes) -> None:
        """`{"registration_ids": {"remove": […]}}`: take the alias from these devices."""
        change = decode(_read_id_changes, raw, DEVICE).registration_ids
        if change.add:
            raise ApiError(
                7002, "registration_ids.add: not supported here, use POST /v3/devices/{registration_id}"
            )
        ids = self._bounded("registration_ids.remove", change.remove or ())
        if not ids:
            raise ApiError(7002, "registration_ids.remove is required")
        devnos = await self._store.resolve(app.app_id, ids)
        await self._store.drop_term(app.app_id, (Term.ALIAS, alias), BitMap(devnos.values()))

    # Tags

    async def tags(self, app: App) -> list[str]:
        """At most `max_listed`, sorted."""
        return (await self._store.list_terms(app.app_id, Term.TAG))[: self._limits.max_listed]

    async def has_tag(self, app: App, tag: str, registration_id: str) -> bool:
        return tag in (await self.find(app, registration_id)).tags

    async def change_tag(self, app: App, tag: str, raw: bytes) -> None:
        """`{"registration_ids": {"add": […], "remove": […]}}`, all or none. Store failures become
        ApiErrors."""
        self._name(tag, "tag")
        change = decode(_read_id_changes, raw, DEVICE).registration_ids
        add = self._bounded("registration_ids.add", change.add or ())
        remove = self._bounded("registration_ids.remove", change.remove or ())
        if not add and not remove:
            raise ApiError(7002, "registration_ids.add or registration_ids.remove is required")
        changes = {i: DeviceChange(remove_tags=frozenset((tag,))) for i in remove}
        changes |= {i: DeviceChange(add_tags=frozenset((tag,))) for i in add}
        for device in (await self._store.find_devices(app.app_id, add)).values():
            self._check_tag_count(device.tags | {tag})
        with refusing(DEVICE):
            await self._store.change_devices(app.app_id, changes)

    async def delete_tag(self, app: App, tag: str, platforms: str | None) -> None:
        await self._drop(app, (Term.TAG, tag), platforms)

    # Checks

    def check_registration_id(self, registration_id: str) -> str:
        """1 to 64 bytes of printable text, which is also what a client id of an open app must be."""
        most = self._limits.registration_id_size
        if not 0 < len(registration_id.encode("utf-8", "replace")) <= most:
            raise ApiError(7002, f"registration_id: must be 1 to {most} bytes")
        if not registration_id.isprintable():
            raise ApiError(7002, "registration_id: must have printable characters only")
        return registration_id

    def _check_alias(self, alias: str | None) -> str | None:
        return self._name(alias, "alias") if alias else alias

    def _check_tags(self, tags: Iterable[str]) -> frozenset[str]:
        checked = frozenset(self._name(tag, "tags") for tag in tags)
        self._check_tag_count(checked)
        return checked

    def _check_tag_count(self, tags: frozenset[str]) -> None:
        if len(tags) > self._limits.max_device_tags:
            raise ApiError(
                7013, f"tags: a device has at most {self._limits.max_device_tags}, not {len(tags)}"
            )

    def _name(self, name: str, path: str) -> str:
        return check_name(name, path, self._limits, DEVICE.invalid)

    def _bounded(self, path: str, ids: Sequence[str | int]) -> list[str]:
        if len(ids) > self._limits.max_ids:
            raise ApiError(7013, f"{path}: at most {self._limits.max_ids} values, got {len(ids)}")
        return [str(i) for i in ids]

    def _read_tags(
        self, tags: str | list[str | int] | AddRemove | None
    ) -> tuple[frozenset[str] | None, frozenset[str], frozenset[str]]:
        """What to set, add and remove."""
        none: frozenset[str] = frozenset()
        if tags is None:
            return None, none, none
        if isinstance(tags, AddRemove):
            add = self._check_tags(map(str, tags.add or ()))
            return None, add, frozenset(map(str, tags.remove or ()))
        if isinstance(tags, str):
            if tags:
                raise ApiError(7002, 'tags: must be "" to clear, a list, or {"add": […], "remove": […]}')
            return none, none, none
        return self._check_tags(map(str, tags)), none, none

    def _check_token(self, app: App, device: Device, token: str) -> None:
        try:
            claims = tokens.verify(app, device.registration_id, token.encode(), self._clock())
        except tokens.TokenError as error:
            raise ApiError(7004, f"token: {error.reason}") from None
        if claims.generation != device.token_generation:
            raise ApiError(7004, "token: revoked")

    # Store

    async def _register_unclaimed(self, app: App, new: NewDevice) -> Device:
        claim = (app.app_id, new.registration_id)
        taken = ApiError(
            7002,
            f"registration_id: {new.registration_id} is registered; renew its token or use the master secret",
        )
        if claim in self._claiming:
            raise taken
        self._claiming.add(claim)
        try:
            if await self._store.resolve(app.app_id, [new.registration_id]):
                raise taken
            return (await self._store.register(app.app_id, [new]))[0]
        finally:
            self._claiming.discard(claim)

    async def _register_or_change(self, app: App, new: NewDevice, change: DeviceChange) -> Device:
        known = await self._store.resolve(app.app_id, [new.registration_id])
        device = (await self._store.register(app.app_id, [new]))[0]
        if not known or change == DeviceChange():
            return device
        return (await self._store.change_devices(app.app_id, {new.registration_id: change}))[
            new.registration_id
        ]

    def _issue(self, app: App, device: Device) -> Registered:
        now, lifetime = self._clock(), self._limits.token_lifetime
        token = tokens.issue(
            app, device.registration_id, device.devno, device.platform, device.token_generation, now, lifetime
        )
        return Registered(device, token, int(now + lifetime))

    async def _having(self, app: App, term: TermKey, platforms: str | None) -> BitMap:
        names = _read_platforms(platforms)
        terms = [term, *((Term.PLATFORM, name) for name in names)]
        devnos, *on = await self._store.postings(app.app_id, terms)
        return devnos & BitMap.union(*on) if on else devnos

    async def _drop(self, app: App, term: TermKey, platforms: str | None) -> None:
        only = await self._having(app, term, platforms) if platforms else None
        await self._store.drop_term(app.app_id, term, only)

    async def _names(self, app: App, devnos: BitMap) -> list[str]:
        listed = devnos[: self._limits.max_listed]
        return list((await self._store.names(app.app_id, list(listed))).values())


def _unknown(registration_id: str) -> ApiError:
    return ApiError(7002, f"no such device in this app: {registration_id}")


def _check_mobile(mobile: str | None) -> str | None:
    if mobile and not _MOBILE.fullmatch(mobile):
        raise ApiError(7002, "mobile: must be a telephone number: up to 32 digits, blanks and -, + first")
    return mobile


def _check_platform(platform: str | None) -> str | None:
    if platform is not None and platform not in PLATFORMS:
        raise ApiError(7002, f"platform: must be one of {', '.join(PLATFORMS)}")
    return platform


def _read_platforms(platforms: str | None) -> list[str]:
    """The `platform` parameter: names with commas between; absent or "all" means no filter."""
    if not platforms or platforms == "all":
        return []
    names = platforms.split(",")
    for name in names:
        _check_platform(name)
    return names


def _status(device: Device, online: bool) -> dict[str, object]:
    if online or device.last_online_at is None:
        return {"online": online}
    at = datetime.fromtimestamp(device.last_online_at, UTC)
    return {"online": False, "last_online_time": at.strftime("%Y-%m-%d %H:%M:%S")}
