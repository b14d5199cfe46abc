"""Chapters 1 and 2: data types, fixed headers, packet ids. What can be said of a packet alone is said row by row
in tests/gateway/mqtt; here a server acts on it."""

from __future__ import annotations

from typing import Any

import pytest

from clients.local_server import LocalServer
from gateway.mqtt import (
    Connack,
    Connect,
    Disconnect,
    Packet,
    Pingreq,
    Puback,
    Publish,
    Pubrel,
    Reason,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
    Will,
    encode,
)
from tests.gateway.conformance.talk import ended, nothing_waits, publish, short, subscribe, take
from tests.gateway.peer import Peer, connect_packet

HERE = b"@@@"  # stands for the bytes of a string
BAD_STRINGS = [
    pytest.param(b"a\xc3\x28", id="a sequence cut short"),
    pytest.param(b"\xed\xa0\x80", id="a surrogate"),
    pytest.param(b"a\xc0\x80", id="an overlong form"),
    pytest.param(b"a\x00b", id="U+0000"),
]


@pytest.mark.parametrize("bad", BAD_STRINGS)
@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(Publish("t/@@@", b"x"), id="topic name"),
        pytest.param(Publish("t/@@@", b"x", 1, packet_id=1), id="topic name, QoS 1"),
        pytest.param(Subscribe(1, (Subscription("t/@@@"),)), id="filter"),
        pytest.param(Unsubscribe(1, ("t/@@@",)), id="filter to leave"),
    ],
)
def test_a_string_that_is_not_well_formed_ends_the_connection(
    server: LocalServer, name: str, version: int, packet: Packet, bad: bytes
) -> None:
    """MQTT311-1.5.3-1, -2, 3.3.2-1, 3.8.3-1, 3.10.3-1, 4.7.3-2; MQTT5-1.5.4-1, -2, 3.3.2-1, 3.8.3-1, 3.10.3-1,
    4.7.3-2."""
    with short(server, name, version=version) as peer:
        peer.send(encode(packet, version).replace(HERE, bad), Pingreq())
        ended(peer, Reason.MALFORMED_PACKET)


@pytest.mark.parametrize("bad", BAD_STRINGS)
@pytest.mark.parametrize(
    "properties",
    [
        pytest.param({"response_topic": "r/@@@"}, id="response topic"),
        pytest.param({"content_type": "@@@"}, id="content type"),
        pytest.param({"user_properties": (("@@@", "v"),)}, id="user property name"),
        pytest.param({"user_properties": (("k", "@@@"),)}, id="user property value"),
    ],
)
def test_a_property_that_is_not_well_formed_ends_the_connection(
    server: LocalServer, name: str, properties: Any, bad: bytes
) -> None:
    """MQTT5-1.5.4-1, -2, 1.5.7-1, 3.3.2-13, 3.3.2-19."""
    with short(server, name) as peer:
        peer.send(encode(Publish("t", b"x", properties=properties), 5).replace(HERE, bad), Pingreq())
        ended(peer, Reason.MALFORMED_PACKET)


@pytest.mark.parametrize("bad", BAD_STRINGS)
@pytest.mark.parametrize("field", ["client id", "user name", "will topic"])
def test_a_connect_with_a_string_that_is_not_well_formed_is_refused(
    server: LocalServer, version: int, field: str, bad: bytes
) -> None:
    """MQTT311-1.5.3-1, -2, 3.1.3-4, 3.1.3-10, 3.1.3-11; MQTT5-1.5.4-1, -2, 3.1.3-4, 3.1.3-11, 3.1.3-12."""
    connect = Connect(
        "c@@@" if field == "client id" else "c",
        username="u@@@" if field == "user name" else server.app.app_key,
        password=server.app.device_key.encode(),
        will=Will("w/@@@" if field == "will topic" else "w", b"x"),
        version=version,
    )
    with Peer(server.addresses.mqtt, version=version) as peer:
        peer.send(encode(connect, version).replace(HERE, bad))
        answers = peer.rest()
    assert [packet.reason for packet in answers if isinstance(packet, Connack)] == (
        [Reason.MALFORMED_PACKET] if version == 5 else []
    )
    assert len(answers) == (version == 5)


def test_a_byte_order_mark_is_a_character_like_another(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-1.5.3-3, MQTT5-1.5.4-3."""
    topic = f"\ufeff{name}/\ufeffx"
    with short(server, name, version=version) as peer, short(server, f"{name}p", version=version) as sender:
        subscribe(peer, topic)
        for other in (f"{name}/x", f"\ufeff{name}/x", topic):
            publish(sender, other)
        assert take(peer).topic == topic
        nothing_waits(peer)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param("30 84 00 0001 74 00", id="remaining length"),
        pytest.param("30 05 0001 74 80 00", id="property length"),
        pytest.param("82 09 0001 03 0b 81 00 0001 74 00", id="subscription identifier"),
    ],
)
def test_an_integer_longer_than_needed_is_malformed(server: LocalServer, name: str, raw: str) -> None:
    """MQTT5-1.5.5-1."""
    with short(server, name) as peer:
        peer.send(bytes.fromhex(raw), Pingreq())
        ended(peer, Reason.MALFORMED_PACKET)


@pytest.mark.parametrize(
    "first",
    [0x36, 0x3E, 0x38, 0x39, 0x41, 0x52, 0x60, 0x63, 0x72, 0x80, 0x83, 0xA0, 0xA3, 0xC1, 0xE1, 0xE8, 0xF1],
    ids=lambda first: f"{first:02x}",
)
def test_flags_that_are_not_those_of_the_packet_end_the_connection(
    server: LocalServer, name: str, version: int, first: int
) -> None:
    """QoS 3, DUP with QoS 0, and reserved bits: MQTT311-2.2.2-1, -2, 3.3.1-2, 3.3.1-4, 3.6.1-1, 3.8.1-1, 3.10.1-1,
    3.14.1-1; MQTT5-2.1.3-1, 3.3.1-2, 3.3.1-4, 3.6.1-1, 3.8.1-1, 3.10.1-1, 3.14.1-1, 3.15.1-1."""
    with short(server, name, version=version) as peer:
        peer.send(bytes((first, 2, 0, 1)), Pingreq())
        ended(peer, Reason.MALFORMED_PACKET)


@pytest.mark.parametrize(
    "packet",
    [Publish("t", b"x", 1, packet_id=1), Publish("t", b"x", 2, packet_id=1), Subscribe(1, (Subscription("t"),)),
     Unsubscribe(1, ("t",)), Pubrel(1)],
    ids=lambda packet: f"{type(packet).__name__} {getattr(packet, 'qos', '')}",
)  # fmt: skip
def test_packet_id_0_ends_the_connection(
    server: LocalServer, name: str, version: int, packet: Packet
) -> None:
    """MQTT311-2.3.1-1, MQTT5-2.2.1-3."""
    raw = encode(packet, version)
    with short(server, name, version=version) as peer:
        peer.send(
            raw.replace(b"\0\1t\0\1", b"\0\1t\0\0") if b"\0\1t\0\1" in raw else raw[:2] + b"\0\0" + raw[4:]
        )
        peer.send(Pingreq())
        ended(peer, Reason.PROTOCOL_ERROR)


def test_qos_0_has_no_packet_id_in_either_direction(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-2.3.1-5, MQTT5-2.2.1-2."""
    with short(server, name, version=version) as peer:
        subscribe(peer, f"{name}/x", qos=0)
        raw = encode(Publish(f"{name}/x", b"\0\7payload"), version)
        peer.send(raw, Disconnect())
        assert peer.rest_of_bytes() == raw


def test_what_the_server_sends_has_packet_ids_that_nothing_else_uses(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-2.3.1-4, 4.3.2-1; MQTT5-2.2.1-4, 4.3.2-1, 4.3.3-1."""
    with short(server, name, version=version) as peer, short(server, f"{name}p", version=version) as sender:
        subscribe(peer, f"{name}/#")
        for i in range(10):
            publish(sender, f"{name}/{i}", qos=1 + i % 2)
        flying = [peer.expect(Publish) for _ in range(10)]
        ids = {packet.packet_id for packet in flying}
        assert len(ids) == 10
        assert 0 not in ids
        peer.send(Puback(flying[0].packet_id))
        publish(sender, f"{name}/more")
        assert peer.expect(Publish).packet_id not in ids - {flying[0].packet_id}


def test_subscribe_and_unsubscribe_are_answered_with_their_packet_id(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-2.3.1-7, 3.8.4-1, 3.8.4-2, 3.10.4-4; MQTT5-2.2.1-6, 3.8.4-1, 3.8.4-2, 3.10.4-4, 3.10.4-5."""
    with short(server, name, version=version) as peer:
        for packet_id in (1, 255, 256, 65_535):
            peer.send(Subscribe(packet_id, (Subscription(f"{name}/{packet_id}"),)))
            assert peer.expect(Suback).packet_id == packet_id
            peer.send(Unsubscribe(packet_id, (f"{name}/{packet_id}",)))
            assert peer.expect(Unsuback).packet_id == packet_id


def test_no_properties_are_told_by_a_length_of_0(server: LocalServer, name: str) -> None:
    """MQTT5-2.2.2-1."""
    with short(server, name) as peer:
        peer.send(Subscribe(1, (Subscription(name),)), Unsubscribe(2, (name, "x")), Publish(name, b"y"))
        peer.send(Subscribe(3, (Subscription(name),)), Publish(name, b"y"), Disconnect())
        assert peer.rest_of_bytes() == b"".join(
            [
                b"\x90\x04\x00\x01\x00\x00",
                b"\xb0\x05\x00\x02\x00\x00\x11",
                b"\x90\x04\x00\x03\x00\x00",
                encode(Publish(name, b"y"), 5),
            ]
        )


def test_a_connect_may_be_read_by_any_version(server: LocalServer, name: str) -> None:
    """Both versions on one port, each answered in its own."""
    for version, answer in ((4, 4), (5, 21)):
        with Peer(server.addresses.mqtt) as peer:
            peer.send(encode(connect_packet(server.app, name, version=version, clean=True), version))
            peer.send(encode(Disconnect(), version))
            raw = peer.rest_of_bytes()
            assert raw[:1] == b"\x20"
            assert (len(raw) > 4) is (answer > 4)
