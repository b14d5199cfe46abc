"""A device as it is kept: one entry of a page. `lua/pages.lua` says how a page is made of its entries.

Whoever changes a device names the entry as he read it; so two who change different devices of one page do not
disturb each other."""

from __future__ import annotations

import struct
from hashlib import blake2b
from typing import Any, Final

import msgspec
from msgspec import Struct

from broker.model import PLATFORMS, Device

DIGEST: Final = 8  # bytes of an alias digest
NO_ALIAS: Final = bytes(DIGEST)
_CREATED_AT: Final = struct.Struct(">d")
_CODES: Final = {name: code for code, name in enumerate(PLATFORMS)}


class _Entry(Struct, array_like=True, frozen=True, omit_defaults=True, gc=False):
    registration_id: str
    platform: int
    alias: str | None = None
    tags: list[str] = []  # sorted
    mobile: str | None = None
    generation: int = 0
    attributes: dict[str, Any] = {}


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(_Entry).decode


def entry_of(device: Device) -> bytes:
    entry = _Entry(
        device.registration_id,
        _CODES[device.platform],
        device.alias,
        sorted(device.tags),
        device.mobile,
        device.token_generation,
        dict(device.attributes),
    )
    return _CREATED_AT.pack(device.created_at) + _encode(entry)


def device_of(app_id: int, devno: int, packed: bytes) -> Device:
    """`last_online_at` is kept elsewhere."""
    entry = _decode(memoryview(packed)[_CREATED_AT.size :])
    (created_at,) = _CREATED_AT.unpack_from(packed)
    return Device(
        app_id,
        devno,
        entry.registration_id,
        PLATFORMS[entry.platform],
        entry.alias,
        frozenset(entry.tags),
        entry.mobile,
        entry.generation,
        created_at,
        None,
        entry.attributes,
    )


def alias_digest(alias: str | None) -> bytes:
    """Of 100 million devices, two aliases have the same one with a probability of 1 : 3,600. None: zeros."""
    return NO_ALIAS if alias is None else blake2b(alias.encode(), digest_size=DIGEST).digest()
