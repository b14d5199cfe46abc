"""Settings of one app: what they may be, how they are read and shown.

The owner of an app (master secret, or an API key with scope admin) sets OWNER_KEYS; the operator sets all. A PUT
replaces: what it leaves out gets its default, and of the owner's, what is the operator's stays.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final
from zoneinfo import ZoneInfo

import msgspec
from msgspec import Struct

from broker.errors import ADMIN, ApiError
from broker.limits import NO_LIMIT, Limits
from broker.model import AppSettings, FrequencyCap, QuietHours
from broker.pushing.requests import decode
from broker.telling.callback_urls import read_callback
from broker.tenants.networks import is_within, read_network

OWNER_KEYS: Final = ("allow_from", "quiet_hours", "frequency_caps", "callback")
MAX_NETWORKS: Final = 1000
MAX_CAPS: Final = 10
MAX_CAP: Final = 1000
ACTIONS: Final = ("delay", "suppress")
PERIODS: Final = ("hour", "day")

PER_SERVER: Final = frozenset(
    {
        "fanout_limit",
        "max_apps_cached",
        "max_unknown_keys",
        "max_groups",
        "max_group_apps",
        "name_size",
        "registration_id_size",
        "cid_size",
        "sendno_size",
        "max_event",
        "max_event_name",
        "schedule_grace",
        "cid_lifetime",
        "report_lifetime",
    }
)
"""Limits that are about the process, the installation, or what is checked without an app at hand."""

FROM_ZERO: Final = frozenset({"default_ttl", "max_ttl"})


class SettingsRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a PUT; the wire shape of AppSettings."""

    restricted: bool | None = None
    allow_from: list[str] | None = None
    limits: dict[str, int | None] | None = None
    quiet_hours: QuietHours | None = None
    frequency_caps: list[FrequencyCap] | None = None
    callback: dict[str, Any] | None = None


_read_request: Final = msgspec.json.Decoder(SettingsRequest).decode


def read_settings(raw: bytes, limits: Limits) -> AppSettings:
    """All of them, from an operator. Raises ApiError that names key, value and what is allowed."""
    request = decode(_read_request, raw, ADMIN)
    return AppSettings(
        restricted=bool(request.restricted),
        limits=read_limits(request.limits or {}, limits),
        **_read_owners(request),
    )


def read_own_settings(raw: bytes, current: AppSettings, caller: str) -> AppSettings:
    """The owner's part, the rest as it is. `caller`: the address that asks, which must not lock itself out."""
    request = decode(_read_request, raw, ADMIN)
    for name in ("restricted", "limits"):
        if getattr(request, name) is not None:
            raise _wrong(f"{name}: only the operator of the server may set it")
    changed = msgspec.structs.replace(current, **_read_owners(request))
    if changed.allow_from and not is_within(caller, changed.allow_from):
        raise _wrong(f"allow_from: your own address, {caller or 'unknown'}, is not in it")
    return changed


def describe_settings(settings: AppSettings) -> dict[str, object]:
    """Every key, as a PUT takes it."""
    return {name: _plain(value) for name, value in msgspec.structs.asdict(settings).items()}


def describe_own_settings(settings: AppSettings) -> dict[str, object]:
    return {name: _plain(getattr(settings, name)) for name in OWNER_KEYS}


def names_of_changes(before: AppSettings, after: AppSettings) -> str:
    """For the audit log: `allow_from, limits.push_rate`."""
    was, now = _flat(before), _flat(after)
    return ", ".join(sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name)))


def _flat(settings: AppSettings) -> dict[str, tuple[object]]:
    values = msgspec.structs.asdict(settings)
    values |= {f"limits.{name}": value for name, value in values.pop("limits").items()}
    return {
        name: (value,) for name, value in values.items()
    }  # a limit that is off is not one that is not set


def _read_owners(request: SettingsRequest) -> dict[str, Any]:
    return {
        "allow_from": read_networks(request.allow_from or ()),
        "quiet_hours": _check_quiet_hours(request.quiet_hours),
        "frequency_caps": _check_caps(request.frequency_caps or ()),
        "callback": None if request.callback is None else read_callback(request.callback),
    }


def read_networks(texts: Sequence[str]) -> tuple[str, ...]:
    """The value of an `allow_from`. Raises ApiError."""
    if len(texts) > MAX_NETWORKS:
        raise _wrong(f"allow_from: at most {MAX_NETWORKS} networks, got {len(texts)}")
    found = []
    for text in texts:
        try:
            found.append(read_network(text))
        except ValueError as error:
            raise _wrong(f"allow_from: must be networks such as 192.0.2.0/24 or addresses; {error}") from None
    return tuple(dict.fromkeys(found))


def read_limits(changes: Mapping[str, int | None], limits: Limits) -> dict[str, int | None]:
    """`changes`: by the names of fields of Limits. Raises ApiError."""
    for name, value in changes.items():
        _check_limit(name, value)
    merged: Limits = dataclasses.replace(limits, **changes)  # type: ignore[arg-type]
    if merged.default_ttl > merged.max_ttl:
        raise _wrong(f"limits.default_ttl = {merged.default_ttl}: must be at most max_ttl, {merged.max_ttl}")
    return dict(changes)


def _check_limit(name: str, value: int | None) -> None:
    can_be_off = OVERRIDABLE.get(name)
    if can_be_off is None:
        raise _wrong(f"limits.{name[:40]}: there is no such limit; there are {', '.join(OVERRIDABLE)}")
    least = 0 if name in FROM_ZERO else 1
    if value is None and can_be_off:
        return
    if value is None or not least <= value <= NO_LIMIT:
        off = ", or null for none" if can_be_off else ""
        got = "null" if value is None else value
        raise _wrong(f"limits.{name} = {got}: must be a whole number from {least} to {NO_LIMIT}{off}")


OVERRIDABLE: Final[Mapping[str, bool]] = {
    field.name: field.type == "int | None"
    for field in dataclasses.fields(Limits)
    if field.name not in PER_SERVER and field.type in ("int", "int | None")
}
"""Limits that an app may have of its own -> whether they can be off."""

_TIME: Final = re.compile(r"(?:[01]\d|2[0-3]):[0-5]\d")


def _check_quiet_hours(hours: QuietHours | None) -> QuietHours | None:
    if hours is None:
        return None
    for name in ("start", "end"):
        if not _TIME.fullmatch(getattr(hours, name)):
            raise _wrong(f"quiet_hours.{name} = {getattr(hours, name)[:40]!r}: must be HH:MM, 00:00 to 23:59")
    if hours.start == hours.end:
        raise _wrong(f"quiet_hours.end = {hours.end!r}: must differ from start")
    _check_zone("quiet_hours.zone", hours.zone)
    _check_word("quiet_hours.action", hours.action, ACTIONS)
    return hours


def _check_caps(caps: Sequence[FrequencyCap]) -> tuple[FrequencyCap, ...]:
    if len(caps) > MAX_CAPS:
        raise _wrong(f"frequency_caps: at most {MAX_CAPS}, got {len(caps)}")
    for number, cap in enumerate(caps):
        path = f"frequency_caps[{number}]"
        if not 1 <= cap.count <= MAX_CAP:
            raise _wrong(f"{path}.count = {cap.count}: must be 1 to {MAX_CAP}")
        _check_word(f"{path}.per", cap.per, PERIODS)
        _check_zone(f"{path}.zone", cap.zone)
    return tuple(caps)


def _check_word(path: str, word: str, allowed: Sequence[str]) -> None:
    if word not in allowed:
        raise _wrong(f"{path} = {word[:40]!r}: must be one of {', '.join(allowed)}")


def _check_zone(path: str, zone: str) -> None:
    try:
        ZoneInfo(zone)
    except (KeyError, ValueError, OSError):  # ZoneInfo opens a file of that name
        raise _wrong(
            f"{path} = {zone[:40]!r}: must be a name of the IANA time zones, like Asia/Tokyo"
        ) from None


def _plain(value: Any) -> object:
    if isinstance(value, Struct):
        return {name: _plain(part) for name, part in msgspec.structs.asdict(value).items()}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return dict(value) if isinstance(value, Mapping) else value


def _wrong(message: str) -> ApiError:
    return ApiError(ADMIN.invalid, message)
