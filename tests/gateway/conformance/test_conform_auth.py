"""Enhanced authentication (4.12, 3.15), with SCRAM-SHA-256: user name `device`, the device key as password."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from clients.local_server import LocalServer
from gateway.mqtt import Auth, Connack, Disconnect, Packet, Pingreq, Pingresp, Publish, Reason, encode
from tests.gateway.conformance.talk import ended, nothing_waits, opened, short, subscribe
from tests.gateway.peer import Peer, connect_packet

METHOD = "SCRAM-SHA-256"


def client(password: str) -> Any:
    """The peer's side of SCRAM."""
    scramp = pytest.importorskip("scramp", reason="scramp is a test dependency of enhanced authentication")
    return scramp.ScramClient([METHOD], "device", password)


def said(data: str, method: str = METHOD) -> Any:
    return {"authentication_method": method, "authentication_data": data.encode()}


def method_of(packet: Packet) -> str:
    assert isinstance(packet, Auth | Connack), packet
    return packet.properties["authentication_method"]


@contextlib.contextmanager
def asked(server: LocalServer, name: str, data: str, method: str = METHOD) -> Iterator[Peer]:
    """A peer that has sent its CONNECT, with a method and no password."""
    connect = connect_packet(server.app, name, properties=said(data, method), clean=True, expiry=0)
    with Peer(server.addresses.mqtt) as peer:
        raw = encode(connect, 5)
        password = server.app.device_key.encode()
        flags = raw.index(b"MQTT\x05") + 5
        cut = len(password) + 2  # the password field is the last one
        body = raw[2 if raw[1] < 0x80 else 3 : flags] + bytes((raw[flags] & ~0x40,)) + raw[flags + 1 : -cut]
        head = (
            bytes((0x10, len(body)))
            if len(body) < 0x80
            else bytes((0x10, len(body) & 0x7F | 0x80, len(body) >> 7))
        )
        peer.send(head + body)
        yield peer


def proven(peer: Peer, who: Any) -> Connack:
    """The rest of a good authentication."""
    challenge = peer.expect(Auth)
    assert (challenge.reason, method_of(challenge)) == (Reason.CONTINUE_AUTHENTICATION, METHOD)
    assert challenge.properties.keys() == {"authentication_method", "authentication_data"}
    who.set_server_first(challenge.properties["authentication_data"].decode())
    peer.send(Auth(Reason.CONTINUE_AUTHENTICATION, said(who.get_client_final())))
    connack = peer.expect(Connack)
    assert (connack.reason, method_of(connack)) == (Reason.SUCCESS, METHOD)
    who.set_server_final(connack.properties["authentication_data"].decode())
    return connack


def test_a_method_that_the_server_does_not_know_is_refused(server: LocalServer, name: str) -> None:
    """MQTT5-4.12.0-1: whatever password comes with it."""
    with opened(server, name, properties={"authentication_method": "NO-SUCH-METHOD"}) as (peer, connack):
        assert connack.reason in (Reason.BAD_AUTHENTICATION_METHOD, Reason.NOT_AUTHORIZED)
        assert peer.rest() == []


def test_a_method_that_the_server_does_not_know_is_refused_without_a_password(
    server: LocalServer, name: str
) -> None:
    """MQTT5-4.12.0-1."""
    with asked(server, name, "x", "NO-SUCH-METHOD") as peer:
        assert peer.expect(Connack).reason in (Reason.BAD_AUTHENTICATION_METHOD, Reason.NOT_AUTHORIZED)
        assert peer.rest() == []


@pytest.mark.parametrize("reason", [Reason.CONTINUE_AUTHENTICATION, Reason.RE_AUTHENTICATE])
def test_auth_without_a_method_in_connect_ends_the_connection(
    server: LocalServer, name: str, reason: Reason
) -> None:
    """MQTT5-4.12.0-7."""
    with short(server, name) as peer:
        peer.send(Auth(reason, said("x")), Pingreq())
        ended(peer, Reason.PROTOCOL_ERROR)


def test_without_a_method_in_connect_the_server_names_none(server: LocalServer, name: str) -> None:
    """MQTT5-4.12.0-6: no AUTH, and no method in CONNACK."""
    with opened(server, name) as (peer, connack):
        assert "authentication_method" not in connack.properties
        nothing_waits(peer)
    with opened(server, name, password="wrong") as (peer, connack):
        assert "authentication_method" not in connack.properties
        assert peer.rest() == []


def test_data_without_a_method_is_an_error(server: LocalServer, name: str) -> None:
    """3.1.2.11.10."""
    good = encode(connect_packet(server.app, name, properties=said("data")), 5)
    method = b"\x15" + len(METHOD).to_bytes(2) + METHOD.encode()
    at = good.index(method)
    properties = good.index(b"\x00\x3c") + 2
    raw = bytearray(good[:at] + good[at + len(method) :])
    raw[properties] -= len(method)
    raw[1] -= len(method)
    with Peer(server.addresses.mqtt) as peer:
        peer.send(bytes(raw))
        assert peer.expect(Connack).reason is Reason.PROTOCOL_ERROR
        assert peer.rest() == []


@pytest.mark.parametrize("flags", [1, 2, 8])
def test_reserved_bits_of_auth_are_looked_at(server: LocalServer, name: str, flags: int) -> None:
    """MQTT5-3.15.1-1."""
    with short(server, name) as peer:
        peer.send(bytes((0xF0 | flags, 0)), Pingreq())
        ended(peer, Reason.MALFORMED_PACKET)


@pytest.mark.parametrize("reason", [0x01, 0x10, 0x80, 0x8C])
def test_auth_has_its_own_reasons(server: LocalServer, name: str, reason: int) -> None:
    """MQTT5-3.15.2-1."""
    with short(server, name) as peer:
        peer.send(bytes((0xF0, 1, reason)), Pingreq())
        ended(peer, Reason.PROTOCOL_ERROR)


def test_a_device_proves_that_it_has_the_key(server: LocalServer, name: str) -> None:
    """MQTT5-4.12.0-2, 4.12.0-3, 4.12.0-5, 3.1.2-30, 3.2.0-1, 3.15.2-1 to -3."""
    who = client(server.app.device_key)
    with asked(server, name, who.get_client_first()) as peer:
        proven(peer, who)
        nothing_waits(peer)
        subscribe(peer, name)


def test_a_wrong_proof_is_refused_and_closed(server: LocalServer, name: str) -> None:
    """MQTT5-4.12.0-4, 3.1.4-2."""
    who = client("a guess")
    with asked(server, name, who.get_client_first()) as peer:
        who.set_server_first(peer.expect(Auth).properties["authentication_data"].decode())
        peer.send(Auth(Reason.CONTINUE_AUTHENTICATION, said(who.get_client_final())))
        assert peer.expect(Connack).reason >= Reason.UNSPECIFIED_ERROR
        assert peer.rest() == []


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(Publish("t", b"x", 1, packet_id=1), id="PUBLISH"),
        pytest.param(Pingreq(), id="PINGREQ"),
        pytest.param(Auth(Reason.CONTINUE_AUTHENTICATION, said("x", "OTHER")), id="another method"),
        pytest.param(Auth(Reason.RE_AUTHENTICATE, said("x")), id="re-authentication"),
        pytest.param(Auth(Reason.SUCCESS, said("x")), id="success"),
    ],
)
def test_before_connack_nothing_but_its_own_auth_is_taken(
    server: LocalServer, name: str, packet: Packet
) -> None:
    """MQTT5-3.1.2-30, 4.12.0-3, 4.12.0-5, 3.14.0-1: the answer is a CONNACK or none."""
    who = client(server.app.device_key)
    with asked(server, name, who.get_client_first()) as peer:
        peer.expect(Auth)
        peer.send(packet)
        rest = peer.rest()
        assert all(isinstance(told, Connack) and told.reason >= 0x80 for told in rest)
        assert len(rest) <= 1


def test_disconnect_is_taken_before_connack(server: LocalServer, name: str) -> None:
    """MQTT5-3.1.2-30."""
    with asked(server, name, client(server.app.device_key).get_client_first()) as peer:
        peer.expect(Auth)
        peer.send(Disconnect())
        assert peer.rest() == []


def test_a_peer_may_prove_it_again(server: LocalServer, name: str) -> None:
    """MQTT5-3.15.2-2, -3, 4.12.0-5, 4.12.1-1: while the connection goes on as it was."""
    who, again = client(server.app.device_key), client(server.app.device_key)
    with asked(server, name, who.get_client_first()) as peer:
        proven(peer, who)
        peer.send(Auth(Reason.RE_AUTHENTICATE, said(again.get_client_first())), Pingreq())
        challenge, pong = sorted((peer.receive(), peer.receive()), key=lambda p: isinstance(p, Pingresp))
        assert pong == Pingresp()
        assert isinstance(challenge, Auth)
        again.set_server_first(challenge.properties["authentication_data"].decode())
        peer.send(Auth(Reason.CONTINUE_AUTHENTICATION, said(again.get_client_final())))
        done = peer.expect(Auth)
        assert (done.reason, method_of(done)) == (Reason.SUCCESS, METHOD)
        assert done.properties.keys() == {"authentication_method", "authentication_data"}
        again.set_server_final(done.properties["authentication_data"].decode())
        nothing_waits(peer)


def test_a_second_proof_that_fails_ends_the_connection(server: LocalServer, name: str) -> None:
    """MQTT5-4.12.1-2."""
    who, liar = client(server.app.device_key), client("a guess")
    with asked(server, name, who.get_client_first()) as peer:
        proven(peer, who)
        peer.send(Auth(Reason.RE_AUTHENTICATE, said(liar.get_client_first())))
        liar.set_server_first(peer.expect(Auth).properties["authentication_data"].decode())
        peer.send(Auth(Reason.CONTINUE_AUTHENTICATION, said(liar.get_client_final())))
        assert peer.expect(Disconnect).reason is Reason.NOT_AUTHORIZED
        assert peer.rest() == []


def test_a_second_proof_has_the_method_of_the_first(server: LocalServer, name: str) -> None:
    """MQTT5-4.12.1-1."""
    who = client(server.app.device_key)
    with asked(server, name, who.get_client_first()) as peer:
        proven(peer, who)
        peer.send(Auth(Reason.RE_AUTHENTICATE, said("x", "OTHER")))
        assert peer.expect(Disconnect).reason in (Reason.PROTOCOL_ERROR, Reason.BAD_AUTHENTICATION_METHOD)
        assert peer.rest() == []
