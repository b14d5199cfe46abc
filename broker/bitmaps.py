"""Bitmaps over devnos as bytes: the portable format of roaring bitmaps."""

from __future__ import annotations

from pyroaring import BitMap


def encode_bits(bits: BitMap) -> bytes:
    bits.run_optimize()
    return bytes(bits.serialize())


def decode_bits(column: int | bytes | None) -> BitMap:
    """What is kept of a set of devices: nothing, one devno, or a bitmap."""
    if column is None:
        return BitMap()
    if isinstance(column, int):
        return BitMap((column,))
    return BitMap.deserialize(column)


def memory_of(bits: BitMap) -> int:
    """Bytes, about."""
    parts = bits.get_statistics()
    return int(
        parts["n_bytes_array_containers"]
        + parts["n_bytes_run_containers"]
        + parts["n_bytes_bitset_containers"]
    )
