"""Devices as the API shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from clients.publishing.calls import Calls, quoted, with_query

AttributeValue = str | int | float | bool


class NewDevice(msgspec.Struct, frozen=True, omit_defaults=True):
    """A device to be imported: registered, or changed to these properties where it exists."""

    registration_id: str
    platform: str | None = None
    alias: str | None = None
    tags: Sequence[str] | None = None
    mobile: str | None = None
    attributes: Mapping[str, AttributeValue] | None = None


class DeviceInfo(msgspec.Struct, frozen=True):
    tags: frozenset[str]
    alias: str | None
    mobile: str | None
    attributes: Mapping[str, AttributeValue] = {}


class DeviceStatus(msgspec.Struct, frozen=True):
    """`last_online_time` is UTC, `2026-01-31 23:59:59`; None while online, or if it never was."""

    online: bool
    last_online_time: str | None = None


class Registered(msgspec.Struct, frozen=True):
    """`expires_at` in Unix seconds."""

    registration_id: str
    token: str
    expires_at: int


class _Tags(msgspec.Struct, frozen=True):
    tags: list[str]


class _HasTag(msgspec.Struct, frozen=True):
    result: bool


class _OfAlias(msgspec.Struct, frozen=True):
    registration_ids: list[str]


class Tags:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def all(self) -> list[str]:
        """Those that some device has, sorted; the first 10000."""
        return (await self._calls.get("/v3/tags", _Tags)).tags

    async def has(self, tag: str, registration_id: str) -> bool:
        """Raises PushError 7002 if there is no such device."""
        path = f"{_tag(tag)}/registration_ids/{quoted(registration_id)}"
        return (await self._calls.get(path, _HasTag)).result

    async def change(self, tag: str, *, add: Sequence[str] = (), remove: Sequence[str] = ()) -> None:
        """Give it to devices, take it from others; up to 1000 each, all or none."""
        await self._calls.do("POST", _tag(tag), {"registration_ids": {"add": add, "remove": remove}})

    async def delete(self, tag: str, platforms: Sequence[str] = ()) -> None:
        """From all devices, or only from those of `platforms`."""
        await self._calls.do("DELETE", with_query(_tag(tag), _only(platforms)))


class Aliases:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def devices(self, alias: str, platforms: Sequence[str] = ()) -> list[str]:
        """Registration ids, the first 10000, of all or only of `platforms`."""
        return (await self._calls.get(_alias(alias), _OfAlias, **_only(platforms))).registration_ids

    async def delete(self, alias: str, platforms: Sequence[str] = ()) -> None:
        """From all devices, or only from those of `platforms`."""
        await self._calls.do("DELETE", with_query(_alias(alias), _only(platforms)))


def _tag(tag: str) -> str:
    return f"/v3/tags/{quoted(tag)}"


def _alias(alias: str) -> str:
    return f"/v3/aliases/{quoted(alias)}"


def _only(platforms: Sequence[str]) -> dict[str, object]:
    return {"platform": ",".join(platforms) or None}
