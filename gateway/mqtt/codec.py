"""Bytes to packets and back, both directions, no I/O.

A packet is a first byte (type and flags), a remaining length and a body. The first byte picks the decoder
from a table of 256, in which forbidden flag bits are simply absent; the length is held against `max_size` and
what has arrived before anything of the body is touched. So a half-received packet costs the same few steps
however large it is, and a decoder always sees a whole body. A decoder gets (buffer, body start, body end,
first byte, version); only PUBLISH and the plain acks are read in place, the others copy their (small) body to
`bytes` once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from struct import unpack_from
from typing import Any, Final, TypeAlias, TypeVar

from .errors import (
    CONNACK_RETURN_CODES,
    FilterInvalid,
    MalformedPacket,
    MQTTError,
    PacketTooLarge,
    ProtocolError,
    Reason,
    TopicInvalid,
    UnsupportedVersion,
)
from .packets import (
    Auth,
    Connack,
    Connect,
    Disconnect,
    Packet,
    Pingreq,
    Pingresp,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
    Will,
)
from .properties import NO_PROPERTIES, Properties, decode_properties, encode_properties
from .topics import SHARE, valid_filter, valid_topic_name
from .wire import (
    Buffer,
    PacketType,
    binary,
    decode_utf8,
    read_binary,
    read_byte,
    read_string,
    read_uint16,
    read_varint,
    string,
    uint16,
    varint,
)

_CONNECT: Final = 0x10
_PUBACK_HEADER: Final = 0x4002
_BRIDGE_LEVEL: Final = 0x84  # 3.1.1 from a broker's bridge: mosquitto's convention, which other brokers share
# Bits of the CONNECT flags (MQTT5-3.1.2.3); the will's QoS is 0x18 of them.
_CLEAN_START, _WILL, _WILL_QOS, _WILL_RETAIN, _PASSWORD, _USERNAME = 0x02, 0x04, 0x18, 0x20, 0x40, 0x80
_USUAL: Final = tuple(  # how a CONNECT of 3.1.1 begins that has user name and password, and no will
    b"\0\4MQTT\4" + bytes((_USERNAME | _PASSWORD | clean,)) for clean in (0, _CLEAN_START)
)

_Ack: TypeAlias = Puback | Pubrec | Pubrel | Pubcomp
_Decoder: TypeAlias = Callable[[Buffer, int, int, int, int], Packet]
_AckT = TypeVar("_AckT", Puback, Pubrec, Pubrel, Pubcomp)
_EmptyT = TypeVar("_EmptyT", Pingreq, Pingresp)


def _reasons(*codes: int) -> Mapping[int, Reason]:
    return {code: Reason(code) for code in codes}


# Which reason codes a packet may carry (MQTT5 table 2.6).
_OF_CONNACK = _reasons(0x00, *range(0x80, 0x8B), 0x8C, 0x90, 0x95, 0x97, *range(0x99, 0x9E), 0x9F)
_OF_PUBACK = _reasons(0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99)
_OF_PUBREL = _reasons(0x00, 0x92)
_OF_SUBACK = _reasons(0x00, 0x01, 0x02, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2)
_OF_UNSUBACK = _reasons(0x00, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91)
_OF_DISCONNECT = _reasons(
    *(0x00, 0x04, *range(0x80, 0x84), 0x87, 0x89, *range(0x8B, 0x91), *range(0x93, 0xA3)),
)
_OF_AUTH = _reasons(0x00, 0x18, 0x19)
# 3.1.1 has two of its own: MQTT311-3.9.3-2, and CONNACK's, where a code is read as the first of its reasons.
_OF_SUBACK_311 = _reasons(0x00, 0x01, 0x02, 0x80)
_OF_CONNACK_311 = {code: reason for reason, code in reversed(list(CONNACK_RETURN_CODES.items()))}


# ---- reading ----


def decode(buffer: Buffer, start: int, version: int, max_size: int) -> tuple[Packet, int] | None:
    """The packet that begins at `start` and the offset behind it; None while it is incomplete.

    `version` is 4 or 5, or 0 while no CONNECT has come, when nothing else is accepted. A second CONNECT is
    decoded; that it is one too many (MQTT5-3.1.0-2) is for the session. `max_size` counts the whole packet.
    Raises MQTTError. The buffer is not kept: every value in the packet is a copy.
    """
    size = len(buffer)
    if size <= start:
        return None
    first = buffer[start]
    decoder = _DECODERS[first]
    if decoder is None or (not version and first != _CONNECT):
        raise _refusal(first, version)
    pos = start + 2
    if size < pos:
        return None
    length = buffer[start + 1]
    if length >= 0x80:
        if size > pos and 0 < buffer[pos] < 0x80:  # most pushes: 128 bytes to 16 KB
            length = length & 0x7F | buffer[pos] << 7
            pos += 1
        else:
            header = _long_length(buffer, start + 1, version)
            if header is None:
                return None
            length, pos = header
    end = pos + length
    if end - start > max_size:
        raise PacketTooLarge(f"a packet of {end - start} bytes; the most is {max_size}")
    if end > size:
        return None
    return decoder(buffer, pos, end, first, version), end


def puback_run(buffer: Buffer, start: int) -> tuple[tuple[int, ...], int]:
    """The packet ids of the plain PUBACKs (4 bytes, success) that stand in a row from `start`, and the offset
    behind them. Stops before whatever else comes; `decode` goes on from there. Some 40 ns each."""
    count = (len(buffer) - start) // 4
    words = unpack_from(f">{2 * count}H", buffer, start)
    heads, packet_ids = words[::2], words[1::2]
    if heads.count(_PUBACK_HEADER) != count or 0 in packet_ids:
        pairs = zip(heads, packet_ids, strict=True)
        count = next(
            i for i, (head, packet_id) in enumerate(pairs) if head != _PUBACK_HEADER or not packet_id
        )
    return packet_ids[:count], start + 4 * count


def _refusal(first: int, version: int) -> MQTTError:
    if not version:
        return ProtocolError(f"the first packet begins with 0x{first:02x}: not a CONNECT")  # MQTT5-3.1.0-1
    if first < 0x10:
        return MalformedPacket("packet type 0 is reserved")
    name = PacketType(first >> 4).name
    return MalformedPacket(f"{name} with flags 0x{first & 15:x}")  # MQTT5-2.1.3-1, 3.3.1-2, 3.3.1-4


def _long_length(buffer: Buffer, pos: int, version: int) -> tuple[int, int] | None:
    length = 0
    for shift, byte in zip((0, 7, 14, 21), buffer[pos : pos + 4], strict=False):
        length |= (byte & 0x7F) << shift
        pos += 1
        if byte < 0x80:
            if not byte and version == 5:  # MQTT5-1.5.5-1; 3.1.1 does not ask for the shortest form
                raise MalformedPacket("a remaining length longer than it needs to be")
            return length, pos
    if shift == 21:
        raise MalformedPacket("a remaining length of more than four bytes")  # MQTT311-2.2.3
    return None


def _decode_connect(buffer: Buffer, pos: int, end: int, first: int, version: int) -> Connect:
    body = bytes(buffer[pos:end])
    if body.startswith(_USUAL) and (usual := _usual_connect(body)) is not None:
        return usual
    name, at = read_binary(body, 0)
    level, at = read_byte(body, at)
    bridge = level == _BRIDGE_LEVEL
    if bridge:
        level = 4
    if name != b"MQTT" or level not in (4, 5):  # MQTT5-3.1.2-1, -2; "MQIsdp" 3 is MQTT 3.1
        raise UnsupportedVersion(f"protocol {name[:8]!r} level {level}")
    try:
        if level == 5 and not buffer[pos - 1]:  # MQTT5-1.5.5-1, unknowable in the header
            raise MalformedPacket("a remaining length longer than it needs to be")
        return _connect(body, at, level, bridge)
    except MQTTError as error:
        error.version = level
        raise


def _usual_connect(body: bytes) -> Connect | None:
    """What most are, in half the time. None: something is wrong with it, and the long way tells what."""
    id_end = 12 + int.from_bytes(body[10:12])
    name_end = id_end + 2 + int.from_bytes(body[id_end : id_end + 2])
    if name_end + 2 + int.from_bytes(body[name_end : name_end + 2]) != len(body):
        return None
    try:
        client_id, username = body[12:id_end].decode(), body[id_end + 2 : name_end].decode()
    except UnicodeDecodeError:
        return None
    if "\0" in client_id or "\0" in username:
        return None
    clean_start, keep_alive = body[7] & _CLEAN_START != 0, body[8] << 8 | body[9]
    password = body[name_end + 2 :]
    return Connect(client_id, clean_start, keep_alive, username, password, None, 4, NO_PROPERTIES)


def _connect(body: bytes, pos: int, version: int, bridge: bool) -> Connect:
    flags, pos = read_byte(body, pos)
    _check_connect_flags(flags, version)
    keep_alive, pos = read_uint16(body, pos)
    properties, pos = _section(body, pos, PacketType.CONNECT, version)
    client_id, pos = read_string(body, pos)
    will, username, password = None, None, None
    if flags & _WILL:
        will, pos = _will(body, pos, flags, version)
    if flags & _USERNAME:
        username, pos = read_string(body, pos)
    if flags & _PASSWORD:
        password, pos = read_binary(body, pos)
    _expect_end(body, pos)
    clean_start = flags & _CLEAN_START != 0
    return Connect(client_id, clean_start, keep_alive, username, password, will, version, properties, bridge)


def _check_connect_flags(flags: int, version: int) -> None:
    if flags & 0x01:
        raise MalformedPacket("the reserved CONNECT flag is set")  # MQTT5-3.1.2-3
    if not flags & _WILL and flags & (_WILL_QOS | _WILL_RETAIN):
        raise MalformedPacket("will QoS or will retain without a will")  # MQTT5-3.1.2-11, -13
    if flags & _WILL_QOS == _WILL_QOS:
        raise MalformedPacket("will QoS 3")  # MQTT5-3.1.2-12
    if version == 4 and flags & _PASSWORD and not flags & _USERNAME:
        raise MalformedPacket("a password without a user name")  # MQTT311-3.1.2-22; 5 allows it


def _will(body: bytes, pos: int, flags: int, version: int) -> tuple[Will, int]:
    properties, pos = _section(body, pos, PacketType.WILL, version)
    topic, pos = read_string(body, pos)
    if not valid_topic_name(topic):
        raise TopicInvalid("the will topic is empty or holds a wildcard")
    payload, pos = read_binary(body, pos)
    return Will(topic, payload, flags >> 3 & 3, flags & _WILL_RETAIN != 0, properties), pos


def _decode_connack(buffer: Buffer, pos: int, end: int, first: int, version: int) -> Connack:
    body = bytes(buffer[pos:end])
    flags, at = read_byte(body, 0)
    if flags > 1:
        raise MalformedPacket("reserved CONNACK flags are set")  # MQTT5-3.2.2-1
    reason, at = _read_reason(body, at, _OF_CONNACK if version == 5 else _OF_CONNACK_311)
    if flags and reason:
        raise ProtocolError("session present with a refusal")  # MQTT5-3.2.2-6, MQTT311-3.2.2-4
    properties, at = _section(body, at, PacketType.CONNACK, version)
    _expect_end(body, at)
    return Connack(flags == 1, reason, properties)


def _decode_publish(buffer: Buffer, pos: int, end: int, first: int, version: int) -> Publish:
    at = pos + 2
    if at > end:
        raise MalformedPacket("a PUBLISH without topic")
    pos = at + (buffer[pos] << 8 | buffer[pos + 1])
    if pos > end:
        raise MalformedPacket("the topic runs over the end of the PUBLISH")
    topic = decode_utf8(buffer[at:pos])
    if "+" in topic or "#" in topic:
        raise TopicInvalid("a topic name with a wildcard")  # MQTT5-3.3.2-2
    qos = first >> 1 & 3
    packet_id = 0
    if qos:
        if pos + 2 > end:
            raise MalformedPacket("a PUBLISH without packet id")
        packet_id = buffer[pos] << 8 | buffer[pos + 1]
        if not packet_id:
            raise ProtocolError("packet id 0")  # MQTT5-2.2.1-3
        pos += 2
    properties = NO_PROPERTIES
    if version == 5:
        if pos < end and not buffer[pos]:
            pos += 1
        else:
            properties, pos = _publish_section(buffer, pos, end)
    if not topic:
        _check_empty_topic(properties, version)
    return Publish(topic, bytes(buffer[pos:end]), qos, first & 1 != 0, first & 8 != 0, packet_id, properties)


def _publish_section(buffer: Buffer, pos: int, end: int) -> tuple[Properties, int]:
    length, size = read_varint(bytes(buffer[pos : min(pos + 4, end)]), 0)
    pos += size
    if pos + length > end:
        raise MalformedPacket("the properties run over the end of the PUBLISH")
    section = bytes(buffer[pos : pos + length])
    return decode_properties(section, PacketType.PUBLISH), pos + length


def _check_empty_topic(properties: Properties, version: int) -> None:
    if version != 5:
        raise TopicInvalid("an empty topic name")  # MQTT311-4.7.3-1
    if "topic_alias" not in properties:
        raise ProtocolError("an empty topic name and no topic alias")  # MQTT5-3.3.2.1


def _ack_decoder(ack: type[_AckT], reasons: Mapping[int, Reason], packet_type: PacketType) -> _Decoder:
    success = Reason.SUCCESS

    def decode_ack(buffer: Buffer, pos: int, end: int, first: int, version: int) -> _AckT:
        if end - pos == 2:
            packet_id = buffer[pos] << 8 | buffer[pos + 1]
            if packet_id:
                return ack(packet_id, success, NO_PROPERTIES)
        body = bytes(buffer[pos:end])
        packet_id, at = _read_packet_id(body)
        if version != 5:
            _expect_end(body, at)
        reason, at = _read_reason(body, at, reasons)
        return ack(packet_id, reason, _last_section(body, at, packet_type))

    return decode_ack


def _decode_subscribe(buffer: Buffer, pos: int, end: int, first: int, version: int) -> Subscribe:
    body = bytes(buffer[pos:end])
    packet_id, at = _read_packet_id(body)
    properties, at = _section(body, at, PacketType.SUBSCRIBE, version)
    subscriptions = []
    while at < len(body):
        topic_filter, at = _read_filter(body, at)
        options, at = read_byte(body, at)
        subscriptions.append(_subscription(topic_filter, options, version))
    if not subscriptions:
        raise ProtocolError("a SUBSCRIBE without filters")  # MQTT5-3.8.3-2, MQTT311-3.8.3-3
    return Subscribe(packet_id, tuple(subscriptions), properties)


def _subscription(topic_filter: str, options: int, version: int) -> Subscription:
    if options & (0xC0 if version == 5 else 0xFC):
        raise MalformedPacket("reserved subscription options are set")  # MQTT5-3.8.3-5, MQTT311-3.8.3-4
    qos, no_local, retain_handling = options & 3, options & 4 != 0, options >> 4
    if qos == 3 or retain_handling == 3:  # MQTT5-3.8.3.1, MQTT311-3.8.3-4
        raise ProtocolError(f"a subscription with QoS {qos} and retain handling {retain_handling}")
    if no_local and topic_filter.startswith(SHARE):
        raise ProtocolError("a shared subscription with No Local")  # MQTT5-3.8.3-4
    return Subscription(topic_filter, qos, no_local, options & 8 != 0, retain_handling)


def _decode_suback(buffer: Buffer, pos: int, end: int, first: int, version: int) -> Suback:
    body = bytes(buffer[pos:end])
    packet_id, at = _read_packet_id(body)
    properties, at = _section(body, at, PacketType.SUBACK, version)
    reasons = _read_reasons(body, at, _OF_SUBACK if version == 5 else _OF_SUBACK_311)
    return Suback(packet_id, reasons, properties)


def _decode_unsubscribe(buffer: Buffer, pos: int, end: int, first: int, version: int) -> Unsubscribe:
    body = bytes(buffer[pos:end])
    packet_id, at = _read_packet_id(body)
    properties, at = _section(body, at, PacketType.UNSUBSCRIBE, version)
    filters = []
    while at < len(body):
        topic_filter, at = _read_filter(body, at)
        filters.append(topic_filter)
    if not filters:
        raise ProtocolError("an UNSUBSCRIBE without filters")  # MQTT5-3.10.3-2, MQTT311-3.10.3-2
    return Unsubscribe(packet_id, tuple(filters), properties)


def _decode_unsuback(buffer: Buffer, pos: int, end: int, first: int, version: int) -> Unsuback:
    body = bytes(buffer[pos:end])
    packet_id, at = _read_packet_id(body)
    if version != 5:
        _expect_end(body, at)
        return Unsuback(packet_id)
    properties, at = _section(body, at, PacketType.UNSUBACK, version)
    return Unsuback(packet_id, _read_reasons(body, at, _OF_UNSUBACK), properties)


def _empty_decoder(packet: _EmptyT) -> _Decoder:
    def decode_empty(buffer: Buffer, pos: int, end: int, first: int, version: int) -> _EmptyT:
        if pos != end:
            raise MalformedPacket(f"a {PacketType(first >> 4).name} with a body")
        return packet

    return decode_empty


def _decode_disconnect(buffer: Buffer, pos: int, end: int, first: int, version: int) -> Disconnect:
    body = bytes(buffer[pos:end])
    if version != 5:
        _expect_end(body, 0)
    if not body:
        return Disconnect()
    reason, at = _read_reason(body, 0, _OF_DISCONNECT)
    return Disconnect(reason, _last_section(body, at, PacketType.DISCONNECT))


def _decode_auth(buffer: Buffer, pos: int, end: int, first: int, version: int) -> Auth:
    if version != 5:
        raise MalformedPacket("packet type 15 is reserved in 3.1.1")
    if pos == end:
        return Auth()
    body = bytes(buffer[pos:end])
    reason, at = _read_reason(body, 0, _OF_AUTH)
    properties = _last_section(body, at, PacketType.AUTH)
    if "authentication_method" not in properties:
        raise ProtocolError("an AUTH without authentication method")  # MQTT5-3.15.2.2.2
    return Auth(reason, properties)


def _section(body: bytes, pos: int, packet: PacketType, version: int) -> tuple[Properties, int]:
    if version != 5:
        return NO_PROPERTIES, pos
    length, pos = read_varint(body, pos)
    if not length:
        return NO_PROPERTIES, pos
    end = pos + length
    if end > len(body):
        raise MalformedPacket(f"the properties run over the end of the {packet.name}")
    return decode_properties(body[pos:end], packet), end


def _last_section(body: bytes, pos: int, packet: PacketType) -> Properties:
    if pos == len(body):  # acks, DISCONNECT and AUTH may leave out even the length: MQTT5-3.4.2.2.1
        return NO_PROPERTIES
    properties, pos = _section(body, pos, packet, 5)
    _expect_end(body, pos)
    return properties


def _read_packet_id(body: bytes) -> tuple[int, int]:
    packet_id, pos = read_uint16(body, 0)
    if not packet_id:
        raise ProtocolError("packet id 0")  # MQTT5-2.2.1-3, MQTT311-2.3.1-1
    return packet_id, pos


def _read_filter(body: bytes, pos: int) -> tuple[str, int]:
    topic_filter, pos = read_string(body, pos)
    if not valid_filter(topic_filter):
        raise FilterInvalid("a topic filter that is empty or has a wildcard out of place")
    return topic_filter, pos


def _read_reason(body: bytes, pos: int, allowed: Mapping[int, Reason]) -> tuple[Reason, int]:
    code, pos = read_byte(body, pos)
    if code not in allowed:
        raise ProtocolError(f"reason code 0x{code:02x} does not belong in this packet")
    return allowed[code], pos


def _read_reasons(body: bytes, pos: int, allowed: Mapping[int, Reason]) -> tuple[Reason, ...]:
    if pos == len(body):
        raise ProtocolError("an answer without reason codes")  # MQTT5-3.9.3-1, 3.11.3-1
    return tuple([_read_reason(body, at, allowed)[0] for at in range(pos, len(body))])


def _expect_end(body: bytes, pos: int) -> None:
    if pos != len(body):
        raise MalformedPacket(f"{len(body) - pos} bytes too many in the packet")


def _decoders() -> list[_Decoder | None]:
    table: list[_Decoder | None] = [None] * 256
    table[0x10] = _decode_connect
    table[0x20] = _decode_connack
    for flags in (0b0000, 0b0001, 0b0010, 0b0011, 0b0100, 0b0101, 0b1010, 0b1011, 0b1100, 0b1101):
        table[0x30 | flags] = _decode_publish  # DUP, QoS (2), RETAIN: no QoS 3, no DUP with QoS 0
    table[0x40] = _ack_decoder(Puback, _OF_PUBACK, PacketType.PUBACK)
    table[0x50] = _ack_decoder(Pubrec, _OF_PUBACK, PacketType.PUBREC)
    table[0x62] = _ack_decoder(Pubrel, _OF_PUBREL, PacketType.PUBREL)
    table[0x70] = _ack_decoder(Pubcomp, _OF_PUBREL, PacketType.PUBCOMP)
    table[0x82] = _decode_subscribe
    table[0x90] = _decode_suback
    table[0xA2] = _decode_unsubscribe
    table[0xB0] = _decode_unsuback
    table[0xC0] = _empty_decoder(Pingreq())
    table[0xD0] = _empty_decoder(Pingresp())
    table[0xE0] = _decode_disconnect
    table[0xF0] = _decode_auth
    return table


_DECODERS: Final = _decoders()


# ---- writing ----


def encode(packet: Packet, version: int) -> bytes:
    """The packet for a peer that speaks `version` (a Connect goes by its own).

    For 3.1.1 what it has no place for is left out: properties, ack reasons, subscription options; a SUBACK
    failure is 0x80. Where 3.1.1 can only close the connection, the result is b"": a Connack whose reason has
    no return code (MQTT311-3.2.2-6), a Disconnect that is not a normal one. AssertionError for what no peer
    may be sent. The peer's maximum packet size is the session's to respect.
    """
    return _ENCODERS[type(packet)](packet, version)


def publish_frame(
    topic: str | bytes,
    payload: bytes,
    qos: int,
    version: int,
    properties: Properties = NO_PROPERTIES,
    *,
    retain: bool = False,
    dup: bool = False,
) -> tuple[bytes, bytes]:
    """A PUBLISH around its packet id: the packet is `head + packet_id.to_bytes(2, "big") + tail`, at QoS 0
    `head + tail`. For one message to many devices. A `bytes` topic is taken as it is: valid, and UTF-8."""
    assert qos in (1, 2) or (qos == 0 and not dup), f"QoS {qos}, DUP {dup}"
    if isinstance(topic, str):
        assert valid_topic_name(topic) or (not topic and "topic_alias" in properties), f"topic {topic!r}"
        topic = topic.encode()
    tail = payload if version != 5 else encode_properties(properties, PacketType.PUBLISH) + payload
    length = 2 + len(topic) + (2 if qos else 0) + len(tail)
    return bytes((0x30 | dup << 3 | qos << 1 | retain,)) + varint(length) + binary(topic), tail


def _frame(first: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return bytes((first,)) + varint(len(body)) + body


def _encode_connect(packet: Connect, version: int) -> bytes:
    will, version = packet.will, packet.version
    assert version in (4, 5), f"no CONNECT of version {version}"
    flags = packet.clean_start << 1
    parts = [uint16(packet.keep_alive), _properties(packet.properties, PacketType.CONNECT, version)]
    parts.append(string(packet.client_id))
    if will is not None:
        assert valid_topic_name(will.topic), f"will topic {will.topic!r}"
        assert will.qos in (0, 1, 2), f"will QoS {will.qos}"
        flags |= _WILL | will.qos << 3 | will.retain << 5
        parts += [
            _properties(will.properties, PacketType.WILL, version),
            string(will.topic),
            binary(will.payload),
        ]
    if packet.username is not None:
        flags |= _USERNAME
        parts.append(string(packet.username))
    if packet.password is not None:
        assert version == 5 or packet.username is not None, "3.1.1: a password without user name"
        flags |= _PASSWORD
        parts.append(binary(packet.password))
    assert version == 4 or not packet.bridge, "a bridge of MQTT 5"
    level = _BRIDGE_LEVEL if packet.bridge else version
    return _frame(0x10, b"\0\4MQTT", bytes((level, flags)), *parts)


def _encode_connack(packet: Connack, version: int) -> bytes:
    assert not (packet.session_present and packet.reason), "session present with a refusal"
    if version == 5:
        assert packet.reason in _OF_CONNACK, f"CONNACK with {packet.reason!r}"
        head = bytes((packet.session_present, packet.reason))
        return _frame(0x20, head, encode_properties(packet.properties, PacketType.CONNACK))
    code = CONNACK_RETURN_CODES.get(packet.reason)
    return b"" if code is None else bytes((0x20, 2, packet.session_present, code))


def _encode_publish(packet: Publish, version: int) -> bytes:
    assert (packet.packet_id > 0) == (packet.qos > 0), f"QoS {packet.qos} with packet id {packet.packet_id}"
    head, tail = publish_frame(
        packet.topic,
        packet.payload,
        packet.qos,
        version,
        packet.properties,
        retain=packet.retain,
        dup=packet.dup,
    )
    return head + packet.packet_id.to_bytes(2, "big") + tail if packet.qos else head + tail


def _ack_encoder(
    first: int, reasons: Mapping[int, Reason], packet_type: PacketType
) -> Callable[[_Ack, int], bytes]:
    header = bytes((first, 2))

    def encode_ack(packet: _Ack, version: int) -> bytes:
        packet_id = _packet_id(packet.packet_id)
        if version != 5 or not (packet.reason or packet.properties):
            return header + packet_id
        assert packet.reason in reasons, f"{packet_type.name} with {packet.reason!r}"
        return _frame(first, packet_id, _reason_section(packet.reason, packet.properties, packet_type))

    return encode_ack


def _encode_subscribe(packet: Subscribe, version: int) -> bytes:
    assert packet.subscriptions, "a SUBSCRIBE without filters"
    section = _properties(packet.properties, PacketType.SUBSCRIBE, version)
    entries = [_filter(entry.filter) + _options(entry, version) for entry in packet.subscriptions]
    return _frame(0x82, _packet_id(packet.packet_id), section, *entries)


def _options(entry: Subscription, version: int) -> bytes:
    assert entry.qos in (0, 1, 2), f"QoS {entry.qos}"
    if version != 5:
        return bytes((entry.qos,))
    assert entry.retain_handling in (0, 1, 2), f"retain handling {entry.retain_handling}"
    assert not (entry.no_local and entry.filter.startswith(SHARE)), "a shared subscription with No Local"
    bits = entry.no_local << 2 | entry.retain_as_published << 3 | entry.retain_handling << 4
    return bytes((entry.qos | bits,))


def _encode_suback(packet: Suback, version: int) -> bytes:
    assert packet.reasons, "a SUBACK without reasons"
    assert all(reason in _OF_SUBACK for reason in packet.reasons), f"SUBACK with {packet.reasons}"
    if version != 5:
        codes = bytes(min(reason, 0x80) for reason in packet.reasons)  # MQTT311-3.9.3-2
        return _frame(0x90, _packet_id(packet.packet_id), codes)
    section = encode_properties(packet.properties, PacketType.SUBACK)
    return _frame(0x90, _packet_id(packet.packet_id), section, bytes(packet.reasons))


def _encode_unsubscribe(packet: Unsubscribe, version: int) -> bytes:
    assert packet.filters, "an UNSUBSCRIBE without filters"
    section = _properties(packet.properties, PacketType.UNSUBSCRIBE, version)
    return _frame(0xA2, _packet_id(packet.packet_id), section, *map(_filter, packet.filters))


def _encode_unsuback(packet: Unsuback, version: int) -> bytes:
    if version != 5:
        return _frame(0xB0, _packet_id(packet.packet_id))
    assert packet.reasons, "an UNSUBACK without reasons"
    assert all(reason in _OF_UNSUBACK for reason in packet.reasons), f"UNSUBACK with {packet.reasons}"
    section = encode_properties(packet.properties, PacketType.UNSUBACK)
    return _frame(0xB0, _packet_id(packet.packet_id), section, bytes(packet.reasons))


def _encode_disconnect(packet: Disconnect, version: int) -> bytes:
    assert packet.reason in _OF_DISCONNECT, f"DISCONNECT with {packet.reason!r}"
    if version != 5:
        return b"" if packet.reason else b"\xe0\0"
    return _frame(0xE0, _reason_section(packet.reason, packet.properties, PacketType.DISCONNECT))


def _encode_auth(packet: Auth, version: int) -> bytes:
    assert version == 5, "3.1.1 has no AUTH"
    assert packet.reason in _OF_AUTH, f"AUTH with {packet.reason!r}"
    return _frame(0xF0, _reason_section(packet.reason, packet.properties, PacketType.AUTH))


def _reason_section(reason: Reason, properties: Properties, packet: PacketType) -> bytes:
    """The shortest form: nothing for plain success, no length for no properties (MQTT5-3.4.2.1)."""
    if not properties:
        return bytes((reason,)) if reason else b""
    return bytes((reason,)) + encode_properties(properties, packet)


def _properties(properties: Properties, packet: PacketType, version: int) -> bytes:
    return encode_properties(properties, packet) if version == 5 else b""


def _packet_id(packet_id: int) -> bytes:
    assert packet_id, "packet id 0"
    return uint16(packet_id)


def _filter(topic_filter: str) -> bytes:
    assert valid_filter(topic_filter), f"topic filter {topic_filter!r}"
    return string(topic_filter)


_ENCODERS: Final[Mapping[type[Packet], Callable[[Any, int], bytes]]] = {
    Connect: _encode_connect,
    Connack: _encode_connack,
    Publish: _encode_publish,
    Puback: _ack_encoder(0x40, _OF_PUBACK, PacketType.PUBACK),
    Pubrec: _ack_encoder(0x50, _OF_PUBACK, PacketType.PUBREC),
    Pubrel: _ack_encoder(0x62, _OF_PUBREL, PacketType.PUBREL),
    Pubcomp: _ack_encoder(0x70, _OF_PUBREL, PacketType.PUBCOMP),
    Subscribe: _encode_subscribe,
    Suback: _encode_suback,
    Unsubscribe: _encode_unsubscribe,
    Unsuback: _encode_unsuback,
    Pingreq: lambda packet, version: b"\xc0\0",
    Pingresp: lambda packet, version: b"\xd0\0",
    Disconnect: _encode_disconnect,
    Auth: _encode_auth,
}
