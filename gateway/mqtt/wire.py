"""The data types of MQTT (MQTT5-1.5, MQTT311-1.5). Readers take (body, position), return (value, next
position).

A body is the exact `bytes` of one packet or one property section: its end is the end of what may be read.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, TypeAlias

from .errors import MalformedPacket

Buffer: TypeAlias = bytes | bytearray

MAX_VARINT: Final = 268_435_455  # four bytes of seven bits
MAX_STRING: Final = 65_535  # bytes: the length is a UINT16


class PacketType(IntEnum):
    """The upper half of a packet's first byte. 0 is reserved on the wire; here it names the will inside
    CONNECT, which has a property section of its own."""

    WILL = 0
    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    PUBREC = 5
    PUBREL = 6
    PUBCOMP = 7
    SUBSCRIBE = 8
    SUBACK = 9
    UNSUBSCRIBE = 10
    UNSUBACK = 11
    PINGREQ = 12
    PINGRESP = 13
    DISCONNECT = 14
    AUTH = 15


def read_byte(body: bytes, pos: int) -> tuple[int, int]:
    if pos >= len(body):
        raise MalformedPacket("the packet ends where a byte is due")
    return body[pos], pos + 1


def read_uint16(body: bytes, pos: int) -> tuple[int, int]:
    if pos + 2 > len(body):
        raise MalformedPacket("the packet ends inside a two byte integer")
    return body[pos] << 8 | body[pos + 1], pos + 2


def read_uint32(body: bytes, pos: int) -> tuple[int, int]:
    if pos + 4 > len(body):
        raise MalformedPacket("the packet ends inside a four byte integer")
    return int.from_bytes(body[pos : pos + 4], "big"), pos + 4


def read_varint(body: bytes, pos: int) -> tuple[int, int]:
    value = 0
    for shift in (0, 7, 14, 21):
        byte, pos = read_byte(body, pos)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if shift and not byte:
                raise MalformedPacket("a variable byte integer longer than it needs to be")  # MQTT5-1.5.5-1
            return value, pos
    raise MalformedPacket("a variable byte integer of more than four bytes")


def read_binary(body: bytes, pos: int) -> tuple[bytes, int]:
    start = pos + 2
    if start > len(body):
        raise MalformedPacket("the packet ends inside a length")
    end = start + (body[pos] << 8 | body[pos + 1])
    if end > len(body):
        raise MalformedPacket("a string or binary field runs over the end of the packet")
    return body[start:end], end


def read_string(body: bytes, pos: int) -> tuple[str, int]:
    raw, pos = read_binary(body, pos)
    return decode_utf8(raw), pos


def read_pair(body: bytes, pos: int) -> tuple[tuple[str, str], int]:
    name, pos = read_string(body, pos)
    value, pos = read_string(body, pos)
    return (name, value), pos


def decode_utf8(raw: Buffer) -> str:
    """Python's strict decoder already refuses surrogates (MQTT5-1.5.4-1) and keeps U+FEFF (MQTT5-1.5.4-3).
    Control characters and non-characters SHOULD NOT be sent; they are let through."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise MalformedPacket("a string is not UTF-8") from None  # MQTT5-1.5.4-1, MQTT311-1.5.3-1
    if "\0" in text:
        raise MalformedPacket("a string holds U+0000")  # MQTT5-1.5.4-2, MQTT311-1.5.3-2
    return text


def byte(value: int) -> bytes:
    return bytes((value,))


def uint16(value: int) -> bytes:
    assert 0 <= value <= 0xFFFF, f"{value} is not a two byte integer"
    return value.to_bytes(2, "big")


def uint32(value: int) -> bytes:
    assert 0 <= value <= 0xFFFF_FFFF, f"{value} is not a four byte integer"
    return value.to_bytes(4, "big")


def varint(value: int) -> bytes:
    if 0 <= value < 0x80:
        return bytes((value,))
    assert 0 <= value <= MAX_VARINT, f"{value} is not a variable byte integer"
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def binary(value: bytes) -> bytes:
    assert len(value) <= MAX_STRING, f"a field of {len(value)} bytes; the most is {MAX_STRING}"
    return len(value).to_bytes(2, "big") + value


def string(value: str) -> bytes:
    assert "\0" not in value, "a string holds U+0000"
    return binary(value.encode())


def pair(value: tuple[str, str]) -> bytes:
    return string(value[0]) + string(value[1])
