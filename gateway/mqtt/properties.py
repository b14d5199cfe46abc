"""The properties of MQTT 5 (MQTT5-2.2.2): one table, read and written by it.

A property section is a plain dict keyed by the property's name in the specification, so that the packets of a
connection that uses none share one constant, and mypy knows the type of every value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias, TypedDict, cast

from . import wire
from .errors import MalformedPacket, ProtocolError, TopicAliasInvalid, TopicInvalid
from .topics import valid_topic_name
from .wire import PacketType


class Properties(TypedDict, total=False):
    """Every property MQTT 5 has. Intervals are seconds; what may repeat is a tuple, in the order received."""

    payload_format_indicator: int
    message_expiry_interval: int
    content_type: str
    response_topic: str
    correlation_data: bytes
    subscription_identifiers: tuple[int, ...]
    session_expiry_interval: int
    assigned_client_identifier: str
    server_keep_alive: int
    authentication_method: str
    authentication_data: bytes
    request_problem_information: int
    will_delay_interval: int
    request_response_information: int
    response_information: str
    server_reference: str
    reason_string: str
    receive_maximum: int
    topic_alias_maximum: int
    topic_alias: int
    maximum_qos: int
    retain_available: int
    user_properties: tuple[tuple[str, str], ...]
    maximum_packet_size: int
    wildcard_subscription_available: int
    subscription_identifier_available: int
    shared_subscription_available: int


# Shared by every packet without properties; a write to it raises TypeError.
NO_PROPERTIES: Final = cast("Properties", MappingProxyType({}))


def no_properties() -> Properties:
    return NO_PROPERTIES


_Read: TypeAlias = Callable[[bytes, int], tuple[Any, int]]
_Write: TypeAlias = Callable[[Any], bytes]
_Check: TypeAlias = Callable[[str, Any], None]


@dataclass(frozen=True, slots=True)
class Property:
    """One row of the table; `packets` and `repeats` are bit sets over packet types."""

    id: int
    name: str
    read: _Read
    write: _Write
    packets: int
    repeats: int
    check: _Check | None


def _flag(name: str, value: int) -> None:
    if value > 1:
        raise ProtocolError(f"{name} is {value}, not 0 or 1")


def _not_zero(name: str, value: int) -> None:
    if not value:
        raise ProtocolError(f"{name} is 0")


def _alias(name: str, value: int) -> None:
    if not value:
        raise TopicAliasInvalid(f"{name} is 0")  # MQTT5-3.3.2-8


def _topic(name: str, value: str) -> None:
    if not valid_topic_name(value):
        raise TopicInvalid(f"{name} is empty or holds a wildcard")  # MQTT5-3.3.2-14


def _bits(packets: tuple[PacketType, ...]) -> int:
    return sum(1 << packet for packet in packets)


_Type: TypeAlias = tuple[_Read, _Write]

BYTE: Final[_Type] = (wire.read_byte, wire.byte)
UINT16: Final[_Type] = (wire.read_uint16, wire.uint16)
UINT32: Final[_Type] = (wire.read_uint32, wire.uint32)
VARINT: Final[_Type] = (wire.read_varint, wire.varint)
BINARY: Final[_Type] = (wire.read_binary, wire.binary)
STRING: Final[_Type] = (wire.read_string, wire.string)
PAIR: Final[_Type] = (wire.read_pair, wire.pair)

_P = PacketType
_WILL = (_P.PUBLISH, _P.WILL)
_HELLO = (_P.CONNECT, _P.CONNACK)
_ACKS = (_P.PUBACK, _P.PUBREC, _P.PUBREL, _P.PUBCOMP, _P.SUBACK, _P.UNSUBACK)
_ALL = (*_HELLO, *_WILL, *_ACKS, _P.SUBSCRIBE, _P.UNSUBSCRIBE, _P.DISCONNECT, _P.AUTH)


def _prop(
    id: int,
    name: str,
    type: _Type,
    *packets: PacketType,
    check: _Check | None = None,
    repeats: tuple[PacketType, ...] = (),
) -> Property:
    return Property(id, name, *type, _bits(packets), _bits(repeats), check)


# fmt: off
TABLE: Final = (
    #     id    name                                 type    allowed in
    _prop(0x01, "payload_format_indicator",          BYTE,   *_WILL, check=_flag),
    _prop(0x02, "message_expiry_interval",           UINT32, *_WILL),
    _prop(0x03, "content_type",                      STRING, *_WILL),
    _prop(0x08, "response_topic",                    STRING, *_WILL, check=_topic),
    _prop(0x09, "correlation_data",                  BINARY, *_WILL),
    _prop(0x0B, "subscription_identifiers",          VARINT, _P.PUBLISH, _P.SUBSCRIBE,
                                                             check=_not_zero, repeats=(_P.PUBLISH,)),
    _prop(0x11, "session_expiry_interval",           UINT32, *_HELLO, _P.DISCONNECT),
    _prop(0x12, "assigned_client_identifier",        STRING, _P.CONNACK),
    _prop(0x13, "server_keep_alive",                 UINT16, _P.CONNACK),
    _prop(0x15, "authentication_method",             STRING, *_HELLO, _P.AUTH),
    _prop(0x16, "authentication_data",               BINARY, *_HELLO, _P.AUTH),
    _prop(0x17, "request_problem_information",       BYTE,   _P.CONNECT, check=_flag),
    _prop(0x18, "will_delay_interval",               UINT32, _P.WILL),
    _prop(0x19, "request_response_information",      BYTE,   _P.CONNECT, check=_flag),
    _prop(0x1A, "response_information",              STRING, _P.CONNACK),
    _prop(0x1C, "server_reference",                  STRING, _P.CONNACK, _P.DISCONNECT),
    _prop(0x1F, "reason_string",                     STRING, _P.CONNACK, *_ACKS, _P.DISCONNECT, _P.AUTH),
    _prop(0x21, "receive_maximum",                   UINT16, *_HELLO, check=_not_zero),
    _prop(0x22, "topic_alias_maximum",               UINT16, *_HELLO),
    _prop(0x23, "topic_alias",                       UINT16, _P.PUBLISH, check=_alias),
    _prop(0x24, "maximum_qos",                       BYTE,   _P.CONNACK, check=_flag),
    _prop(0x25, "retain_available",                  BYTE,   _P.CONNACK, check=_flag),
    _prop(0x26, "user_properties",                   PAIR,   *_ALL, repeats=_ALL),
    _prop(0x27, "maximum_packet_size",               UINT32, *_HELLO, check=_not_zero),
    _prop(0x28, "wildcard_subscription_available",   BYTE,   _P.CONNACK, check=_flag),
    _prop(0x29, "subscription_identifier_available", BYTE,   _P.CONNACK, check=_flag),
    _prop(0x2A, "shared_subscription_available",     BYTE,   _P.CONNACK, check=_flag),
)
# fmt: on

_BY_ID: Final[Mapping[int, Property]] = {row.id: row for row in TABLE}
_BY_NAME: Final[Mapping[str, Property]] = {row.name: row for row in TABLE}
_TUPLES: Final = ("user_properties", "subscription_identifiers")


def decode_properties(section: bytes, packet: PacketType) -> Properties:
    """Reads a section without its length. The caller takes `NO_PROPERTIES` for an empty one."""
    found: dict[str, Any] = {}
    pos, bit = 0, 1 << packet
    while pos < len(section):
        row = _BY_ID.get(section[pos])
        if row is None or not row.packets & bit:  # MQTT5-2.2.2.2
            raise MalformedPacket(f"property 0x{section[pos]:02x} is not one of {packet.name}")
        value, pos = row.read(section, pos + 1)
        if row.check is not None:
            row.check(row.name, value)
        _add(found, row, value, bit)
    for name in _TUPLES:
        if name in found:
            found[name] = tuple(found[name])
    if "authentication_data" in found and "authentication_method" not in found:
        raise ProtocolError("authentication data without authentication method")  # MQTT5-3.1.2.11.10
    return cast("Properties", found)


def _add(found: dict[str, Any], row: Property, value: Any, bit: int) -> None:
    # A list, not a growing tuple: one packet may repeat a user property thousands of times.
    if row.name in _TUPLES:
        values = found.setdefault(row.name, [])
        values.append(value)
        repeated = len(values) > 1
    else:
        repeated = row.name in found
        found[row.name] = value
    if repeated and not row.repeats & bit:
        raise ProtocolError(f"{row.name} occurs twice")  # MQTT5-2.2.2.2


def encode_properties(properties: Properties, packet: PacketType) -> bytes:
    """The section with its length in front."""
    if not properties:
        return b"\0"
    section = b"".join([_encode(name, value, packet) for name, value in properties.items()])
    return wire.varint(len(section)) + section


def _encode(name: str, value: Any, packet: PacketType) -> bytes:
    row = _BY_NAME[name]
    assert row.packets & 1 << packet, f"{name} is not a property of {packet.name}"
    if name not in _TUPLES:
        return wire.byte(row.id) + row.write(value)
    assert len(value) <= 1 or row.repeats & 1 << packet, f"{name} may occur once in {packet.name}"
    return b"".join([wire.byte(row.id) + row.write(item) for item in value])
