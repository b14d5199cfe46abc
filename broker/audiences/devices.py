"""Devices: registration, tokens, tags, aliases, status. Serves the HTTP API and the MQTT `device` topic."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import msgspec
from pyroaring import BitMap

from broker.audiences.device_checks import AddRemove, ChangeRequest, Checks, Properties
from broker.audiences.device_checks import platforms as read_platforms
from broker.bus import Bus, CredentialsChanged
from broker.errors import DEVICE, ApiError, refusing
from broker.limits import Limits, limits_of
from broker.model import App, AttributeValue, Device, DeviceChange, NewDevice, Term, TermKey
from broker.pushing.requests import decode
from broker.store import Store
from broker.tenants import tokens

Clock = Callable[[], float]


class Ids(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    registration_ids: list[str]


class IdChanges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    registration_ids: AddRemove


class Renewal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    token: str | None = None


class Import(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    devices: list[Properties]


_read_register: Final = msgspec.json.Decoder(Properties).decode
_read_import: Final = msgspec.json.Decoder(Import).decode
_read_change: Final = msgspec.json.Decoder(ChangeRequest).decode
_read_ids: Final = msgspec.json.Decoder(Ids).decode
_read_id_changes: Final = msgspec.json.Decoder(IdChanges).decode
_read_renewal: Final = msgspec.json.Decoder(Renewal).decode


@dataclass(frozen=True, slots=True)
class Registered:
    device: Device
    token: str
    expires_at: int
    was_known: bool = False  # the device was there before: this is a token for somebody else's, or once more


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

    # Registration and tokens

    async def register_json(self, app: App, raw: bytes, *, trusted: bool) -> Registered:
        request = decode(_read_register, raw or b"{}", DEVICE)
        return await self._register(app, request, trusted=trusted)

    async def register(
        self,
        app: App,
        *,
        platform: str | None = None,
        alias: str | None = None,
        tags: Iterable[str] | None = None,
        mobile: str | None = None,
        registration_id: str | None = None,
        attributes: Mapping[str, AttributeValue] | None = None,
        trusted: bool = False,
    ) -> Registered:
        """Register a device, under a fresh id unless one is given. `trusted` (the publisher asks): an id that
        exists gets a new token and the given properties. Otherwise that is refused, for every installation
        knows the device key and could take over another's id; in an open app it may anyway. Store failures
        become ApiErrors."""
        given = Properties(
            platform,
            alias,
            None if tags is None else list(tags),
            mobile,
            registration_id,
            None if attributes is None else dict(attributes),
        )
        return await self._register(app, given, trusted=trusted)

    async def _register(self, app: App, given: Properties, *, trusted: bool) -> Registered:
        new = self._checks(app).new(_id(given), given)
        with refusing(DEVICE):
            await self._check_aliases(app, {new.registration_id: new.alias})
            if given.registration_id is None:
                device = (await self._store.register(app.app_id, [new]))[0]
            elif trusted or app.open:
                return (await self._register_or_change(app, [new], [given]))[0]
            else:
                device = await self._register_unclaimed(app, new)
        return self._issue(app, device)

    async def import_json(self, app: App, raw: bytes) -> list[Registered]:
        """`{"devices": […]}`, each as a trusted registration, in their order. Those that are new are registered all
        or none, then those that exist are changed all or none. Store failures become ApiErrors."""
        devices, checks = decode(_read_import, raw, DEVICE).devices, self._checks(app)
        if not 0 < len(devices) <= checks.limits.max_imported:
            raise ApiError(7013, f"devices: 1 to {checks.limits.max_imported} of them, got {len(devices)}")
        new = []
        for i, given in enumerate(devices):
            try:
                new.append(checks.new(_id(given), given))
            except ApiError as error:
                raise ApiError(error.code, f"devices[{i}].{error.message}") from None
        if len({one.registration_id for one in new}) < len(new):
            raise ApiError(7002, "devices: a registration_id is there twice")
        with refusing(DEVICE):
            await self._check_aliases(app, {one.registration_id: one.alias for one in new})
            return await self._register_or_change(app, new, devices)

    async def register_open(self, app: App, client_id: str) -> Device:
        """The device of an open app that connects with the device key; registered on first sight. Store
        failures become ApiErrors."""
        assert app.open
        self._checks(app).registration_id(client_id)
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
        checks = self._checks(app)
        change = checks.change(decode(_read_change, raw, DEVICE))
        with refusing(DEVICE):
            await self._check_aliases(app, {registration_id: change.alias})
            return (await self._store.change_devices(app.app_id, {registration_id: change}))[registration_id]

    async def status(self, app: App, raw: bytes) -> dict[str, dict[str, object]]:
        """By registration id, in the order asked; ids that are no device of this app are left out."""
        ids = self._checks(app).bounded("registration_ids", decode(_read_ids, raw, DEVICE).registration_ids)
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
        ids = self._checks(app).bounded("registration_ids.remove", change.remove or ())
        if not ids:
            raise ApiError(7002, "registration_ids.remove is required")
        devnos = await self._store.resolve(app.app_id, ids)
        await self._store.drop_term(app.app_id, (Term.ALIAS, alias), BitMap(devnos.values()))

    # Tags

    async def tags(self, app: App) -> list[str]:
        """At most `max_listed`, sorted."""
        return (await self._store.list_terms(app.app_id, Term.TAG))[: limits_of(self._limits, app).max_listed]

    async def has_tag(self, app: App, tag: str, registration_id: str) -> bool:
        return tag in (await self.find(app, registration_id)).tags

    async def change_tag(self, app: App, tag: str, raw: bytes) -> int:
        """`{"registration_ids": {"add": […], "remove": […]}}`, all or none. Returns how many it was taken from. Store
        failures become ApiErrors."""
        checks = self._checks(app)
        checks.name(tag, "tag")
        change = decode(_read_id_changes, raw, DEVICE).registration_ids
        add = checks.bounded("registration_ids.add", change.add or ())
        remove = checks.bounded("registration_ids.remove", change.remove or ())
        if not add and not remove:
            raise ApiError(7002, "registration_ids.add or registration_ids.remove is required")
        changes = {i: DeviceChange(remove_tags=frozenset((tag,))) for i in remove}
        most = checks.limits.max_device_tags
        changes |= {i: DeviceChange(add_tags=frozenset((tag,)), most_tags=most) for i in add}
        with refusing(DEVICE):
            await self._store.change_devices(app.app_id, changes)
        return len(remove)

    async def delete_tag(self, app: App, tag: str, platforms: str | None) -> None:
        await self._drop(app, (Term.TAG, tag), platforms)

    # Checks

    def _checks(self, app: App) -> Checks:
        return Checks(limits_of(self._limits, app))

    async def _check_aliases(self, app: App, aliases: Mapping[str, str | None]) -> None:
        """That no alias gets too many devices; `aliases` by registration id. Calls that overlap may together let a
        few more through: the limit sells plans, it does not protect."""
        most = limits_of(self._limits, app).alias_devices
        named = {rid: alias for rid, alias in aliases.items() if alias}
        if most is None or not named:
            return
        names = list(dict.fromkeys(named.values()))
        lists = await self._store.postings(app.app_id, [(Term.ALIAS, alias) for alias in names])
        known = await self._store.resolve(app.app_id, list(named))
        for alias, devnos in zip(names, lists, strict=True):
            mine = [rid for rid, name in named.items() if name == alias]
            fresh = sum(rid not in known or known[rid] not in devnos for rid in mine)
            if fresh and len(devnos) + fresh > most:
                raise ApiError(7015, f"alias: {alias} has {len(devnos)} devices, at most {most} may have it")

    def _check_token(self, app: App, device: Device, token: str) -> None:
        try:
            claims = tokens.verify(app, device.registration_id, token.encode(), self._clock())
        except tokens.TokenError as error:
            raise ApiError(7004, f"token: {error.reason}") from None
        if claims.generation != device.token_generation:
            raise ApiError(7004, "token: revoked")

    # Store

    async def _register_unclaimed(self, app: App, new: NewDevice) -> Device:
        device = await self._store.register_new(app.app_id, new)
        if device is None:
            raise ApiError(
                7002,
                f"registration_id: {new.registration_id} is registered; renew its token or use the master secret",
            )
        return device

    async def _register_or_change(
        self, app: App, new: Sequence[NewDevice], given: Sequence[Properties]
    ) -> list[Registered]:
        """Register those that are not known, give those that are what was given, and all of them tokens."""
        known = await self._store.resolve(app.app_id, [one.registration_id for one in new])
        changes = {
            one.registration_id: change
            for one, properties in zip(new, given, strict=True)
            if one.registration_id in known and (change := _as_change(one, properties)) != DeviceChange()
        }
        if changes:
            await self._check_room(app, changes)
        devices = await self._store.register(app.app_id, new)
        changed = await self._store.change_devices(app.app_id, changes) if changes else {}
        return [
            self._issue(app, changed.get(device.registration_id, device), device.registration_id in known)
            for device in devices
        ]

    async def _check_room(self, app: App, changes: Mapping[str, DeviceChange]) -> None:
        checks = self._checks(app)
        for rid, device in (await self._store.find_devices(app.app_id, list(changes))).items():
            checks.room(device, changes[rid])

    def _issue(self, app: App, device: Device, was_known: bool = False) -> Registered:
        now, lifetime = self._clock(), limits_of(self._limits, app).token_lifetime
        token = tokens.issue(
            app, device.registration_id, device.devno, device.platform, device.token_generation, now, lifetime
        )
        return Registered(device, token, int(now + lifetime), was_known)

    async def _having(self, app: App, term: TermKey, platforms: str | None) -> BitMap:
        names = read_platforms(platforms)
        terms = [term, *((Term.PLATFORM, name) for name in names)]
        devnos, *on = await self._store.postings(app.app_id, terms)
        return devnos & BitMap.union(*on) if on else devnos

    async def _drop(self, app: App, term: TermKey, platforms: str | None) -> None:
        only = await self._having(app, term, platforms) if platforms else None
        await self._store.drop_term(app.app_id, term, only)

    async def _names(self, app: App, devnos: BitMap) -> list[str]:
        listed = devnos[: limits_of(self._limits, app).max_listed]
        return list((await self._store.names(app.app_id, list(listed))).values())


def _unknown(registration_id: str) -> ApiError:
    return ApiError(7002, f"no such device in this app: {registration_id}")


def _id(given: Properties) -> str:
    """An id for a device that did not choose one. An empty id is a choice, and refused as one."""
    return secrets.token_hex(10) if given.registration_id is None else given.registration_id


def _as_change(new: NewDevice, given: Properties) -> DeviceChange:
    """What a registration of a known device changes: what was given."""
    return DeviceChange(
        given.alias,
        given.mobile,
        given.platform,
        set_tags=None if given.tags is None else new.tags,
        attributes={} if given.attributes is None else {**dict.fromkeys(given.attributes), **new.attributes},
    )


def _status(device: Device, online: bool) -> dict[str, object]:
    if online or device.last_online_at is None:
        return {"online": online}
    at = datetime.fromtimestamp(device.last_online_at, UTC)
    return {"online": False, "last_online_time": at.strftime("%Y-%m-%d %H:%M:%S")}
