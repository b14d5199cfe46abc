"""Devices as the API shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

AttributeValue = str | float | bool


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
