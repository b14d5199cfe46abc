"""DISCONNECT and errors (3.14, 4.13; 3.1.1: 4.8)."""

from __future__ import annotations

from typing import Any

import pytest

from clients.local_server import LocalServer
from gateway.mqtt import Connack, Disconnect, Pingreq, Publish, Reason, encode
from tests.gateway.conformance.talk import (
    device,
    ended,
    leave,
    nothing_waits,
    publish,
    short,
    subscribe,
    take,
)
from tests.gateway.peer import Peer, connect_packet

WRONG = [
    pytest.param(b"\x00\x00", Reason.MALFORMED_PACKET, id="packet type 0"),
    pytest.param(b"\xc0\x01\x00", Reason.MALFORMED_PACKET, id="PINGREQ with a body"),
    pytest.param(b"\x30\xff\xff\xff\xff\x01", Reason.MALFORMED_PACKET, id="five bytes of length"),
    pytest.param(b"\x20\x02\x00\x00", Reason.PROTOCOL_ERROR, id="CONNACK"),
    pytest.param(b"\x90\x03\x00\x01\x00", Reason.PROTOCOL_ERROR, id="SUBACK"),
    pytest.param(b"\xb0\x02\x00\x01", Reason.PROTOCOL_ERROR, id="UNSUBACK"),
    pytest.param(b"\xd0\x00", Reason.PROTOCOL_ERROR, id="PINGRESP"),
]


@pytest.mark.parametrize(("raw", "reason"), WRONG)
def test_an_error_ends_the_connection_and_nobody_elses(
    server: LocalServer, name: str, version: int, raw: bytes, reason: Reason
) -> None:
    """MQTT311-4.8.0-1; MQTT5-4.13.1-1, 4.13.2-1, 3.14.4-1, 3.14.4-2: one DISCONNECT, and the end."""
    if version == 5 and raw[0] in (0x20, 0x90, 0xB0):  # as 5 has them: with properties
        raw = {0x20: b"\x20\x03\0\0\0", 0x90: b"\x90\x04\0\1\0\0", 0xB0: b"\xb0\x04\0\1\0\0"}[raw[0]]
    with short(server, f"{name}w") as witness, short(server, name, version=version) as peer:
        subscribe(witness, name)
        peer.send(raw, Publish(name, b"x", 1, packet_id=1))
        ended(peer, reason)
        nothing_waits(witness)  # what follows an error is not read


def test_before_connack_an_error_is_no_disconnect(server: LocalServer, name: str) -> None:
    """MQTT5-3.14.0-1: CONNACK says it, or nobody."""
    bad = encode(connect_packet(server.app, name), 5).replace(b"MQTT\x05\xc0", b"MQTT\x05\xc1")
    for raw in (b"\x00\x00", bad, encode(Disconnect(), 5)):
        with Peer(server.addresses.mqtt) as peer:
            peer.send(raw)
            assert all(isinstance(packet, Connack) for packet in peer.rest())


def test_nothing_after_disconnect_is_read_or_sent(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.14.4-1, 3.14.4-2; MQTT5-3.14.4-1, 3.14.4-2: the server closes if the client does not."""
    with short(server, f"{name}w") as witness, short(server, name, version=version) as peer:
        subscribe(witness, f"{name}/#")
        peer.send(Publish(f"{name}/before", b"x"), Disconnect(), Publish(f"{name}/after", b"x"), Pingreq())
        assert peer.rest() == []
        assert take(witness).topic == f"{name}/before"
        nothing_waits(witness)


@pytest.mark.parametrize("raw", [b"\xe1\x00", b"\xe2\x00", b"\xe8\x00"], ids=["bit 0", "bit 1", "bit 3"])
def test_reserved_bits_of_disconnect_are_looked_at(
    server: LocalServer, name: str, version: int, raw: bytes
) -> None:
    """MQTT311-3.14.1-1, MQTT5-3.14.1-1."""
    with short(server, name, version=version) as peer:
        peer.send(raw)
        ended(peer, Reason.MALFORMED_PACKET)


def test_disconnect_of_the_server_has_no_session_expiry(server: LocalServer, name: str) -> None:
    """MQTT5-3.14.2-2: whatever the reason."""
    for raw in (b"\x00\x00", b"\xd0\x00"):
        with device(server, name) as peer:
            peer.send(raw)
            assert set(peer.expect(Disconnect).properties) <= {"reason_string"}
    with device(server, name) as peer, device(server, name) as newer:
        assert peer.expect(Disconnect).properties == {}
        leave(newer)


def test_disconnect_leaves_out_its_text_where_it_would_be_too_large(server: LocalServer, name: str) -> None:
    """MQTT5-3.14.2-3, 3.14.2-4."""
    limits: Any = {"maximum_packet_size": 24}
    with short(server, name, properties=limits) as peer:
        peer.send(b"\x20\x03\0\0\0")
        assert peer.rest_of_bytes() == b"\xe0\x01\x82"


@pytest.mark.parametrize("reason", [0x01, 0x02, 0x10, 0x86, 0x8A, 0x91, 0xFF])
def test_a_disconnect_with_a_reason_of_another_packet_is_an_error(
    server: LocalServer, name: str, reason: int
) -> None:
    """MQTT5-3.14.2-1."""
    with short(server, name) as peer:
        peer.send(bytes((0xE0, 1, reason)))
        ended(peer, Reason.PROTOCOL_ERROR)


def test_disconnect_may_not_begin_a_session(server: LocalServer, name: str) -> None:
    """3.14.2.2.2: an expiry after 0 at CONNECT."""
    with short(server, name) as peer:
        publish(peer, name, qos=0)
        peer.send(Disconnect(properties={"session_expiry_interval": 10}))
        ended(peer, Reason.PROTOCOL_ERROR)
