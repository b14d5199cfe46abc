"""Pieces of posting lists: what one partition has of a list. Up to 255 places in order, two bytes each, low one
first; or one bit for each of the 4,096 places, low bits first, as lua/devices_write.lua makes them."""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Mapping
from typing import Final

from pyroaring import BitMap

from broker.redis.keys import PARTITION, PARTITION_BITS

BITS: Final = PARTITION // 8  # bytes of a piece of bits
_CONTAINER_BITS: Final = 16 - PARTITION_BITS  # 16 partitions are one container of a roaring bitmap
_CONTAINER: Final = BITS << _CONTAINER_BITS
_LONGEST_ARRAY: Final = 4096  # of what a container has in it, where it is no bitset
_NO_RUNS: Final = 12346  # RoaringFormatSpec: how a bitmap begins that has no run containers
_PLACES: Final = [tuple(i for i in range(8) if byte >> i & 1) for byte in range(256)]


def pack_places(places: Iterable[int]) -> bytes:
    return _little(array("H", places)).tobytes()


def unpack_places(packed: bytes) -> array[int]:
    places = array("H")
    places.frombytes(packed)
    return _little(places)


def _little(places: array[int]) -> array[int]:
    if sys.byteorder == "big":
        places.byteswap()
    return places


def unite(pieces: Mapping[int, bytes]) -> BitMap:
    """One list from its pieces, by partition. Full containers are handed to roaring as they are."""
    devnos = array("I")
    dense: dict[int, bytearray] = {}
    for partition, piece in pieces.items():
        if len(piece) == BITS:
            container, place = partition >> _CONTAINER_BITS, partition % (1 << _CONTAINER_BITS)
            buffer = dense.setdefault(container, bytearray(_CONTAINER))
            buffer[place * BITS : (place + 1) * BITS] = piece
        else:
            first = partition << PARTITION_BITS
            devnos.extend([first + place for place in unpack_places(piece)])
    full: dict[int, tuple[int, bytearray]] = {}
    for container, buffer in dense.items():
        count = int.from_bytes(buffer, "little").bit_count()
        if count > _LONGEST_ARRAY:
            full[container] = count, buffer
        else:
            devnos.extend(_set_bits(container << 16, buffer))
    bits = _deserialize(full)
    bits.update(devnos)
    return bits


def _set_bits(first: int, buffer: bytearray) -> list[int]:
    return [first + 8 * i + j for i, byte in enumerate(buffer) if byte for j in _PLACES[byte]]


def _deserialize(full: Mapping[int, tuple[int, bytearray]]) -> BitMap:
    """RoaringBitmap/RoaringFormatSpec on GitHub: cookie, count, (key, size - 1) and offset of each, bitsets."""
    if not full:
        return BitMap()
    keys = sorted(full)
    head = struct.pack("<II", _NO_RUNS, len(keys))
    head += b"".join(struct.pack("<HH", key, full[key][0] - 1) for key in keys)
    data = len(head) + 4 * len(keys)
    head += b"".join(struct.pack("<I", data + i * _CONTAINER) for i in range(len(keys)))
    return BitMap.deserialize(head + b"".join(full[key][1] for key in keys))
