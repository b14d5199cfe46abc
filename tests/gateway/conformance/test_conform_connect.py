"""CONNECT and CONNACK (3.1, 3.2): what is let in, and what it is told."""

from __future__ import annotations

import string
from typing import Any

import pytest

from clients.local_server import LocalServer
from gateway.mqtt import (
    Connack,
    Disconnect,
    Pingreq,
    Pingresp,
    Publish,
    Reason,
    Suback,
    Subscribe,
    Subscription,
    Will,
    encode,
)
from tests.gateway.conformance.talk import (
    device,
    ended,
    leave,
    nothing_waits,
    opened,
    publish,
    short,
    subscribe,
    take,
)
from tests.gateway.peer import Peer, connect_packet

# The header of a CONNECT up to its flags, then keep-alive 60, no properties, a client id. Flags: 0x80 user name,
# 0x40 password, 0x20 will retain, 0x18 will QoS, 0x04 will, 0x02 clean.
HELLO = {4: "00044d515454 04 {flags} 003c 0001 63", 5: "00044d515454 05 {flags} 003c 00 0001 63"}
WILL = {4: "0001 77 0001 78", 5: "00 0001 77 0001 78"}


def raw_connect(version: int, flags: str, rest: str = "") -> bytes:
    body = bytes.fromhex(HELLO[version].format(flags=flags) + rest)
    return bytes((0x10, len(body))) + body


def refused(server: LocalServer, raw: bytes, version: int, reason: Reason) -> None:
    """3.1.1 is closed without a word, 5 is told."""
    with Peer(server.addresses.mqtt, version=version) as peer:
        peer.send(raw)
        told = [packet.reason for packet in peer.rest() if isinstance(packet, Connack)]
    assert told == ([reason] if version == 5 else [])


@pytest.mark.parametrize(
    "packet",
    [Pingreq(), Publish("t", b"x"), Subscribe(1, (Subscription("t"),)), Disconnect()],
    ids=lambda packet: type(packet).__name__,
)
def test_the_first_packet_is_a_connect_or_the_connection_ends(
    server: LocalServer, version: int, packet: Any
) -> None:
    """MQTT311-3.1.0-1, MQTT5-3.1.0-1, MQTT5-3.14.0-1."""
    with Peer(server.addresses.mqtt, version=version) as peer:
        peer.send(encode(packet, version))
        assert peer.rest_of_bytes() == b""


def test_a_second_connect_ends_the_connection_and_gets_no_second_connack(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-3.1.0-2; MQTT5-3.1.0-2, 3.2.0-2."""
    with short(server, name, version=version) as peer:
        peer.send(encode(connect_packet(server.app, name, version=version), version), Pingreq())
        ended(peer, Reason.PROTOCOL_ERROR)


@pytest.mark.parametrize(
    ("hello", "answer"),
    [
        pytest.param("00044d515458 04 02", None, id="MQTX"),
        pytest.param("00046d717474 05 02", None, id="lower case"),
        pytest.param("00064d5149736470 03 02", "20 02 00 01", id="3.1"),
        pytest.param("00044d515454 03 02", "20 02 00 01", id="level 3"),
        pytest.param("00044d515454 06 02", "20 02 00 01", id="level 6"),
    ],
)
def test_another_protocol_is_refused(server: LocalServer, hello: str, answer: str | None) -> None:
    """MQTT311-3.1.2-1, 3.1.2-2; MQTT5-3.1.2-1, 3.1.2-2. The answer has the shape of 3.1.1, which they all read."""
    body = bytes.fromhex(f"{hello} 003c 0001 63")
    with Peer(server.addresses.mqtt) as peer:
        peer.send(bytes((0x10, len(body))) + body)
        received = peer.rest_of_bytes()
    assert received in ((b"", b"\x20\x02\x00\x01") if answer is None else (bytes.fromhex(answer),))


@pytest.mark.parametrize(
    ("flags", "rest"),
    [
        pytest.param("03", "", id="reserved flag"),
        pytest.param("0a", "", id="will QoS without will"),
        pytest.param("22", "", id="will retain without will"),
        pytest.param("1e", "WILL", id="will QoS 3"),
        pytest.param("06", "", id="will flag and no will"),
        pytest.param("02", "WILL", id="will and no will flag"),
        pytest.param("82", "", id="user name flag and no user name"),
        pytest.param("02", "0001 75", id="user name and no flag"),
        pytest.param("c2", "0001 75", id="password flag and no password"),
        pytest.param("82", "0001 75 0001 70", id="password and no flag"),
    ],
)
def test_connect_flags_and_fields_agree(server: LocalServer, version: int, flags: str, rest: str) -> None:
    """MQTT311-3.1.2-3, -9, -11, -13 to -15, -18 to -21, 3.1.4-1, 3.2.2-6;
    MQTT5-3.1.2-3, -9, -11 to -13, -16 to -19, 3.1.4-1."""
    raw = raw_connect(version, flags, rest.replace("WILL", WILL[version]))
    refused(server, raw, version, Reason.MALFORMED_PACKET)


def test_311_has_no_password_without_a_user_name(server: LocalServer) -> None:
    """MQTT311-3.1.2-22, 3.1.4-1; MQTT 5 has (3.1.2.9), and then it is the credentials that are not enough."""
    refused(server, raw_connect(4, "42", "0001 70"), 4, Reason.MALFORMED_PACKET)
    refused(server, raw_connect(5, "42", "0001 70"), 5, Reason.BAD_USER_NAME_OR_PASSWORD)


def test_a_connect_without_client_id_field_is_malformed(server: LocalServer, version: int) -> None:
    """MQTT311-3.1.3-3, 3.1.4-1; MQTT5-3.1.3-3, 3.1.4-1."""
    body = bytes.fromhex(HELLO[version].format(flags="02"))[:-3]
    refused(server, bytes((0x10, len(body))) + body, version, Reason.MALFORMED_PACKET)


def test_fields_are_read_in_their_order(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.1.3-1, 3.1.3-3; MQTT5-3.1.2-9, 3.1.3-1, 3.1.3-3: client id, will, user name, password."""
    will = Will(f"{name}/will", b"gone", 1)
    with short(server, f"{name}h", version=version) as heir:
        subscribe(heir, will.topic)
        connect = connect_packet(server.app, name, version=version, will=will)
        raw = encode(connect, version)
        fields = [name, will.topic, "gone", server.app.app_key, server.app.device_key]
        positions = [raw.index(field.encode(), 10) for field in fields]
        assert positions == sorted(positions)
        with Peer(server.addresses.mqtt, version=version) as peer:
            peer.send(raw)
            assert peer.expect(Connack).reason is Reason.SUCCESS
        assert take(heir).payload == b"gone"


@pytest.mark.parametrize("length", [1, 12, 23])
def test_short_alphanumeric_client_ids_are_allowed(server: LocalServer, version: int, length: int) -> None:
    """MQTT311-3.1.3-5, MQTT5-3.1.3-5."""
    alphabet = string.digits + string.ascii_letters
    for start in range(0, len(alphabet), length if length > 1 else 31):
        with opened(server, (alphabet + alphabet)[start : start + length], version=version, clean=True) as (
            _,
            connack,
        ):
            assert connack.reason is Reason.SUCCESS


def test_sessions_belong_to_client_ids(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.1.3-2, MQTT5-3.1.2-6, 3.1.3-2: another id, in length or case, is another session."""
    for other in (name, name.upper(), name + "x", f" {name}"):
        with opened(server, other, version=version) as (_, connack):
            assert not connack.session_present
    for other in (name, name.upper(), name + "x", f" {name}"):
        with opened(server, other, version=version) as (_, connack):
            assert connack.session_present


def test_a_publisher_without_client_id_gets_a_new_one(server: LocalServer, version: int) -> None:
    """MQTT311-3.1.3-6, 3.1.3-7; MQTT5-3.1.3-6, 3.1.3-7, 3.2.2-16."""
    secret = server.app.master_secret
    with (
        opened(server, "", version=version, password=secret, clean=True) as (one, first),
        opened(server, "", version=version, password=secret, clean=True) as (other, second),
    ):
        nothing_waits(one)  # the second one did not take it over
        nothing_waits(other)
        if version == 5:
            ids = [told.properties["assigned_client_identifier"] for told in (first, second)]
            assert len({*ids, ""}) == 3
            subscribe(one, "t")
            leave(one)
    if version == 5:  # the session is that of the id that was told
        with opened(server, ids[0], password=secret) as (_, connack):
            assert connack.session_present


def test_a_device_of_an_open_app_without_client_id_gets_a_new_one(server: LocalServer, version: int) -> None:
    """MQTT311-3.1.3-6, MQTT5-3.1.3-6, 3.1.3-7, 3.2.2-16."""
    with (
        opened(server, "", version=version, clean=True) as (one, first),
        opened(server, "", version=version, clean=True) as (other, second),
    ):
        assert (first.reason, second.reason) == (Reason.SUCCESS, Reason.SUCCESS)
        nothing_waits(one)
        nothing_waits(other)
        if version == 5:
            ids = [told.properties["assigned_client_identifier"] for told in (first, second)]
            assert len({*ids, ""}) == 3


def test_311_may_not_leave_out_the_client_id_and_keep_its_session(server: LocalServer) -> None:
    """MQTT311-3.1.3-7, 3.1.3-8, 3.1.3-9."""
    for password in (server.app.master_secret, server.app.device_key):
        connect = connect_packet(server.app, "", version=4, password=password)
        with Peer(server.addresses.mqtt) as peer:
            peer.send(connect)
            assert peer.rest_of_bytes() == b"\x20\x02\x00\x02"


def test_a_rejected_client_id_is_told_and_closed(server: LocalServer, version: int) -> None:
    """MQTT311-3.1.3-9, 3.2.2-5; MQTT5-3.1.3-8, 3.2.2-7."""
    with opened(server, "x" * 65, version=version) as (peer, connack):
        assert connack.reason is Reason.CLIENT_IDENTIFIER_NOT_VALID
        assert peer.rest() == []


def test_a_refused_connect_says_no_session_and_closes(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.2.2-4, 3.2.2-5; MQTT5-3.1.4-2, 3.2.2-6, 3.2.2-7, 4.13.2-1: though there is a session."""
    with device(server, name, version=version):
        pass
    with Peer(server.addresses.mqtt) as peer:
        peer.send(connect_packet(server.app, name, version=version, password="wrong"))
        raw = peer.rest_of_bytes()
    assert raw[2] == 0
    assert raw[3] == (Reason.BAD_USER_NAME_OR_PASSWORD if version == 5 else 4)
    assert len(raw) == raw[1] + 2


def test_what_follows_a_refused_connect_is_not_processed(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-3.1.4-5, MQTT5-3.1.4-6."""
    with short(server, f"{name}s", version=version) as peer:
        subscribe(peer, f"{name}/#")
        with Peer(server.addresses.mqtt, version=version) as stranger:
            stranger.send(
                connect_packet(server.app, name, version=version, password="wrong"),
                Publish(f"{name}/x", b"x", retain=True),
                Publish(f"{name}/x", b"x", 1, packet_id=1),
            )
            assert [type(packet) for packet in stranger.rest()] == [Connack]
        nothing_waits(peer)
        subscribe(peer, f"{name}/x")
        nothing_waits(peer)


def test_a_connect_is_answered_before_whatever_came_with_it(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-3.1.4-4, 3.2.0-1; MQTT5-3.1.4-5, 3.2.0-1."""
    connect = connect_packet(server.app, name, version=version, clean=True)
    with Peer(server.addresses.mqtt, version=version) as peer:
        peer.send(connect, Pingreq(), Subscribe(1, (Subscription("x"),)))
        assert isinstance(peer.receive(), Connack)
        assert peer.receive() == Pingresp()
        assert peer.expect(Suback).packet_id == 1


def test_connack_comes_before_what_has_waited(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.2.0-1; MQTT5-3.2.0-1."""
    with device(server, name, version=version) as peer:
        subscribe(peer, f"{name}/x")
    with short(server, f"{name}p") as sender:
        publish(sender, f"{name}/x")
    with Peer(server.addresses.mqtt, version=version) as peer:
        peer.send(connect_packet(server.app, name, version=version))
        assert isinstance(peer.receive(), Connack)
        assert peer.expect(Publish).topic == f"{name}/x"


def test_session_present_is_the_only_flag_of_connack(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.1.4-3, 3.1.4-4, 3.2.2-1 to -3; MQTT5-3.1.2-6, 3.1.4-4, 3.1.4-5, 3.2.2-1 to -3."""
    for clean, present in ((False, 0), (False, 1), (True, 0), (False, 0 if version == 4 else 1)):
        with Peer(server.addresses.mqtt, version=version) as peer:
            peer.send(connect_packet(server.app, name, version=version, clean=clean), Disconnect())
            raw = peer.rest_of_bytes()
        assert (raw[0], raw[2], raw[3]) == (0x20, present, 0)


def test_the_server_lacks_nothing_that_it_would_have_to_announce(server: LocalServer, name: str) -> None:
    """MQTT5-3.2.2-9, 3.2.2-12, 3.2.2-13: no Maximum QoS, no Retain Available, a will of any kind is taken."""
    will = Will(f"{name}/will", b"x", 2, retain=True)
    with opened(server, name, will=will) as (peer, connack):
        assert connack.reason is Reason.SUCCESS
        for missing in ("maximum_qos", "retain_available", "wildcard_subscription_available"):
            assert missing not in connack.properties
        assert "subscription_identifier_available" not in connack.properties
        peer.send(Disconnect())
        peer.rest()


@pytest.mark.parametrize("asked", [None, 0, 1])
def test_no_response_information_is_returned(server: LocalServer, name: str, asked: int | None) -> None:
    """MQTT5-3.1.2-28. It is optional even where it is asked for, and there is nothing to say."""
    properties: Any = {} if asked is None else {"request_response_information": asked}
    with opened(server, name, properties=properties) as (_, connack):
        assert "response_information" not in connack.properties


def test_a_refusal_leaves_out_its_text_where_the_packet_would_be_too_large(
    server: LocalServer, name: str
) -> None:
    """MQTT5-3.2.2-19, 3.2.2-20, 3.1.2-24."""
    wrong: dict[str, Any] = {"password": "wrong", "properties": {"maximum_packet_size": 20}}
    with Peer(server.addresses.mqtt) as peer:
        peer.send(connect_packet(server.app, name, **wrong))
        assert peer.rest_of_bytes() == b"\x20\x03\x00\x86\x00"


def test_a_client_that_is_connected_is_cut_off_by_its_next_connection(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-3.1.4-2, MQTT5-3.1.4-3: whichever versions the two speak."""
    with short(server, name, version=version) as old, short(server, name, version=9 - version) as new:
        assert old.rest() == ([Disconnect(Reason.SESSION_TAKEN_OVER)] if version == 5 else [])
        nothing_waits(new)


def test_ping_is_answered(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.12.4-1, MQTT5-3.12.4-1."""
    with short(server, name, version=version) as peer:
        peer.send(*[Pingreq()] * 3)
        assert [peer.receive() for _ in range(3)] == [Pingresp()] * 3


def test_a_connect_with_every_property_is_taken(server: LocalServer, name: str) -> None:
    properties: Any = {
        "receive_maximum": 7,
        "maximum_packet_size": 1000,
        "topic_alias_maximum": 3,
        "request_response_information": 1,
        "request_problem_information": 1,
        "user_properties": (("a", "b"), ("a", "b")),
    }
    with opened(server, name, properties=properties) as (peer, connack):
        assert connack.reason is Reason.SUCCESS
        nothing_waits(peer)
