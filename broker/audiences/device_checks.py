"""What a device may be called, tagged and described as: every rule about the values that callers send, with the
limits of one app."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from broker.audiences.attributes import changed, check_attributes
from broker.errors import DEVICE, ApiError
from broker.limits import Limits
from broker.model import PLATFORMS, AttributeValue, Device, DeviceChange, NewDevice
from broker.pushing.requests import check_name

_MOBILE: Final = re.compile(r"[0-9+][0-9 -]{0,31}")


class AddRemove(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    add: list[str | int] | None = None
    remove: list[str | int] | None = None


class Properties(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a device that is registered. None: not given."""

    platform: str | None = None
    alias: str | None = None
    tags: list[str | int] | None = None
    mobile: str | None = None
    registration_id: str | None = None
    attributes: dict[str, Any] | None = None


class ChangeRequest(msgspec.Struct, frozen=True):
    tags: str | list[str | int] | AddRemove | None = None  # "" clears, a list replaces
    alias: str | None = None  # "" clears
    mobile: str | None = None  # "" clears
    platform: str | None = None
    attributes: dict[str, Any] | None = None  # null removes one


@dataclass(frozen=True, slots=True)
class Checks:
    """Every method raises ApiError."""

    limits: Limits

    def new(self, registration_id: str, properties: Properties) -> NewDevice:
        attributes = self.attributes(properties.attributes)
        return NewDevice(
            self.registration_id(registration_id),
            platform(properties.platform) or "other",
            self.alias(properties.alias) or None,
            self.tags(map(str, properties.tags or ())),
            mobile(properties.mobile) or None,
            changed({}, attributes),
        )

    def change(self, request: ChangeRequest) -> DeviceChange:
        set_tags, add, remove = self._read_tags(request.tags)
        return DeviceChange(
            alias=self.alias(request.alias),
            mobile=mobile(request.mobile),
            platform=platform(request.platform),
            set_tags=set_tags,
            add_tags=add,
            remove_tags=remove,
            attributes=self.attributes(request.attributes),
            most_tags=self.limits.max_device_tags,
            most_attributes=self.limits.max_attributes,
        )

    def registration_id(self, registration_id: str) -> str:
        """1 to 64 bytes of printable text, which is also what a client id of an open app must be."""
        most = self.limits.registration_id_size
        if not 0 < len(registration_id.encode("utf-8", "replace")) <= most:
            raise ApiError(7002, f"registration_id: must be 1 to {most} bytes")
        if not registration_id.isprintable():
            raise ApiError(7002, "registration_id: must have printable characters only")
        return registration_id

    def alias(self, alias: str | None) -> str | None:
        return self.name(alias, "alias") if alias else alias

    def tags(self, tags: Iterable[str]) -> frozenset[str]:
        checked = frozenset(self.name(tag, "tags") for tag in tags)
        self.tag_count(checked)
        return checked

    def tag_count(self, tags: frozenset[str]) -> None:
        if len(tags) > self.limits.max_device_tags:
            raise ApiError(7013, f"tags: a device has at most {self.limits.max_device_tags}, not {len(tags)}")

    def attributes(self, attributes: Mapping[str, Any] | None) -> dict[str, AttributeValue | None]:
        return check_attributes(attributes, self.limits, DEVICE.invalid) if attributes else {}

    def room(self, device: Device, change: DeviceChange) -> None:
        """That what the change adds has room on the device."""
        if change.add_tags:
            self.tag_count((device.tags | change.add_tags) - change.remove_tags)
        count = len(changed(device.attributes, change.attributes))
        if count > self.limits.max_attributes:
            raise ApiError(
                7013, f"attributes: a device has at most {self.limits.max_attributes}, not {count}"
            )

    def name(self, name: str, path: str) -> str:
        return check_name(name, path, self.limits, DEVICE.invalid)

    def bounded(self, path: str, ids: Sequence[str | int]) -> list[str]:
        if len(ids) > self.limits.max_ids:
            raise ApiError(7013, f"{path}: at most {self.limits.max_ids} values, got {len(ids)}")
        return [str(i) for i in ids]

    def _read_tags(
        self, tags: str | list[str | int] | AddRemove | None
    ) -> tuple[frozenset[str] | None, frozenset[str], frozenset[str]]:
        """What to set, add and remove."""
        none: frozenset[str] = frozenset()
        if tags is None:
            return None, none, none
        if isinstance(tags, AddRemove):
            add = self.tags(map(str, tags.add or ()))
            return None, add, frozenset(map(str, tags.remove or ()))
        if isinstance(tags, str):
            if tags:
                raise ApiError(7002, 'tags: must be "" to clear, a list, or {"add": […], "remove": […]}')
            return none, none, none
        return self.tags(map(str, tags)), none, none


def mobile(number: str | None) -> str | None:
    if number and not _MOBILE.fullmatch(number):
        raise ApiError(7002, "mobile: must be a telephone number: up to 32 digits, blanks and -, + first")
    return number


def platform(name: str | None) -> str | None:
    if name is not None and name not in PLATFORMS:
        raise ApiError(7002, f"platform: must be one of {', '.join(PLATFORMS)}")
    return name


def platforms(names: str | None) -> list[str]:
    """The `platform` parameter: names with commas between; absent or "all" means no filter."""
    if not names or names == "all":
        return []
    split = names.split(",")
    for name in split:
        platform(name)
    return split
