"""Will messages (3.1.2.5 to 3.1.2.7, 3.1.3.2, 3.14.4)."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest

from clients.local_server import LocalServer
from gateway.mqtt import Disconnect, Pingreq, Pingresp, Publish, Reason, Will
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
from tests.gateway.peer import TICK, Peer, clock_of


@pytest.mark.parametrize("qos", [0, 1, 2])
@pytest.mark.parametrize("retain", [False, True])
def test_a_will_is_published_when_the_connection_is_lost(
    server: LocalServer, name: str, version: int, qos: int, retain: bool
) -> None:
    """MQTT311-3.1.2-8, 3.1.2-16, 3.1.2-17; MQTT5-3.1.2-7, 3.1.2-8, 3.1.2-12, 3.1.2-14, 3.1.2-15."""
    topic = f"{name}/will"
    with short(server, f"{name}h", version=version) as heir:
        subscribe(heir, topic)
        with short(server, name, version=version, will=Will(topic, b"gone", qos, retain)):
            nothing_waits(heir)
        message = take(heir)
        assert (message.payload, message.qos, message.retain) == (b"gone", qos, False)
        subscribe(heir, topic)
        if retain:
            message = take(heir)
            assert (message.payload, message.qos, message.retain) == (b"gone", qos, True)
        nothing_waits(heir)


@pytest.mark.parametrize("raw", [b"\x00\x00", b"\xd0\x00"], ids=["malformed", "not for a client"])
def test_a_will_is_published_when_the_server_ends_the_connection(
    server: LocalServer, name: str, version: int, raw: bytes
) -> None:
    """MQTT311-3.1.2-8, MQTT5-3.1.2-8: the server closes it for an error."""
    with short(server, f"{name}h") as heir:
        subscribe(heir, f"{name}/will")
        with short(server, name, version=version, will=Will(f"{name}/will", b"gone")) as peer:
            peer.send(raw)
            ended(peer, Reason.MALFORMED_PACKET if raw[0] == 0 else Reason.PROTOCOL_ERROR)
            assert take(heir).payload == b"gone"


def test_silence_is_a_lost_connection_and_publishes_the_will(server: LocalServer, name: str) -> None:
    """MQTT311-3.1.2-8, 3.1.2-24; MQTT5-3.1.2-8, 3.1.2-22, 3.2.2-22: after 1.5 times the keep-alive asked for."""
    with short(server, f"{name}h") as heir, contextlib.ExitStack() as stack:
        subscribe(heir, f"{name}/+")
        began = clock_of(server)
        for version in (4, 5):
            will = Will(f"{name}/{version}", b"gone")
            options: Any = {"version": version, "keep_alive": 1, "will": will}
            _, connack = stack.enter_context(opened(server, f"{name}-{version}", **options))
            assert "server_keep_alive" not in connack.properties
        assert {take(heir).topic, take(heir).topic} == {f"{name}/4", f"{name}/5"}
        assert time.monotonic() - began >= 1.5 - TICK


def test_a_will_is_published_when_another_connection_takes_over(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-3.1.2-8, MQTT5-3.1.2-8: it has no delay, and the connection ended without DISCONNECT."""
    with short(server, f"{name}h") as heir:
        subscribe(heir, f"{name}/will")
        with (
            device(server, name, version=version, will=Will(f"{name}/will", b"gone")),
            device(server, name, version=version),
        ):
            assert take(heir).payload == b"gone"
        nothing_waits(heir)


def test_a_goodbye_deletes_the_will(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.1.2-8, 3.1.2-10, 3.14.4-3; MQTT5-3.1.2-8, 3.1.2-10, 3.14.4-3."""
    with short(server, f"{name}h") as heir:
        subscribe(heir, f"{name}/will")
        with device(server, name, version=version, will=Will(f"{name}/will", b"gone")) as peer:
            leave(peer)
        with device(server, name, version=version):  # and the next connection has none
            pass
        with opened(server, name, version=version, clean=True) as (peer, _):
            nothing_waits(peer)
        nothing_waits(heir)


def test_a_will_is_published_once(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.1.2-10, 3.1.2-12; MQTT5-3.1.2-10: a connection without will has none, whatever the last one had."""
    with short(server, f"{name}h") as heir:
        subscribe(heir, f"{name}/will")
        with device(server, name, version=version, will=Will(f"{name}/will", b"gone")):
            pass
        assert take(heir).payload == b"gone"
        with device(server, name, version=version) as peer:
            nothing_waits(peer)
        with opened(server, name, version=version, clean=True) as (peer, _):
            nothing_waits(peer)
        nothing_waits(heir)


def test_a_disconnect_may_ask_for_the_will(server: LocalServer, name: str) -> None:
    """MQTT5-3.1.2-8, 3.1.2-10, 3.14.4-3."""
    with short(server, f"{name}h") as heir:
        subscribe(heir, f"{name}/will")
        with short(server, name, will=Will(f"{name}/will", b"gone")) as peer:
            peer.send(Disconnect(Reason.DISCONNECT_WITH_WILL_MESSAGE))
            assert peer.rest() == []
        assert take(heir).payload == b"gone"


def test_a_disconnect_that_tells_of_an_error_publishes_the_will(server: LocalServer, name: str) -> None:
    """MQTT5-3.1.2-8, 3.1.2-10, 3.14.4-3: only 0x00 deletes it."""
    with short(server, f"{name}h") as heir:
        subscribe(heir, f"{name}/will", qos=0)
        for reason in (0x80, 0x93, 0x98):
            with short(server, name, will=Will(f"{name}/will", b"gone")) as peer:
                peer.send(Disconnect(Reason(reason)))
                assert peer.rest() == []
            assert isinstance(heir.receive(), Publish)


def delayed(topic: str, seconds: int) -> Will:
    return Will(topic, b"gone", 1, properties={"will_delay_interval": seconds})


def test_a_delayed_will_waits_for_its_time_and_not_for_the_session_that_comes_back(
    server: LocalServer, name: str
) -> None:
    """MQTT5-3.1.2-8, 3.1.3-9: a return in time and a takeover keep the will from being sent."""
    with short(server, f"{name}h") as heir, contextlib.ExitStack() as stack:
        subscribe(heir, f"{name}/+")
        began = clock_of(server)
        for other, seconds in (("lost", 1), ("back", 3600)):
            with device(server, name + other, will=delayed(f"{name}/{other}", seconds)):
                pass
        assert take(heir).topic == f"{name}/lost"
        assert time.monotonic() - began >= 1 - TICK
        back = stack.enter_context(device(server, f"{name}back"))
        old = stack.enter_context(device(server, f"{name}over", will=delayed(f"{name}/over", 3600)))
        over = stack.enter_context(device(server, f"{name}over"))
        assert old.rest() == [Disconnect(Reason.SESSION_TAKEN_OVER)]
        for peer in (back, over):  # a will that still waited would go with its session
            peer.send(Disconnect(properties={"session_expiry_interval": 0}))
            assert peer.rest() == []
        nothing_waits(heir)


def test_a_delayed_will_does_not_outwait_its_session(server: LocalServer, name: str) -> None:
    """MQTT5-3.1.2-8: it goes when the session ends, by its expiry, by DISCONNECT or by a clean start."""
    topic = f"{name}/will"
    with short(server, f"{name}h") as heir:
        subscribe(heir, topic)
        with device(server, f"{name}a", expiry=0, will=delayed(topic, 100)):
            pass
        take(heir)
        with device(server, f"{name}b", will=delayed(topic, 100)) as peer:
            peer.send(Disconnect(Reason(0x04), {"session_expiry_interval": 0}))
            assert peer.rest() == []
        take(heir)
        with device(server, f"{name}c", will=delayed(topic, 100)):
            pass
        nothing_waits(heir)
        with opened(server, f"{name}c", clean=True):
            take(heir)
        began = clock_of(server)
        with device(server, f"{name}d", expiry=1, will=delayed(topic, 3600)):
            pass
        take(heir)
        assert time.monotonic() - began >= 1 - TICK
        nothing_waits(heir)


def test_what_is_said_of_a_will_reaches_subscribers(server: LocalServer, name: str) -> None:
    """MQTT5-3.1.3-10, 3.1.2-9: user properties in their order, and all the others."""
    properties: Any = {
        "payload_format_indicator": 1,
        "content_type": "text",
        "response_topic": "r",
        "correlation_data": b"\0",
        "user_properties": (("b", "1"), ("a", "2"), ("b", "1")),
    }
    with short(server, f"{name}h") as heir:
        subscribe(heir, f"{name}/will")
        said: Any = {**properties, "message_expiry_interval": 86_400}
        with short(server, name, will=Will(f"{name}/will", b"gone", 1, properties=said)):
            pass
        told = dict(take(heir).properties)
        assert 80_000 < told.pop("message_expiry_interval") <= 86_400
        assert told == properties


def test_an_empty_will_may_remove_what_is_retained(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.1.2-17, MQTT5-3.1.2-15: a retained will is a retained message like another."""
    with short(server, f"{name}h", version=version) as heir:
        publish(heir, f"{name}/will", b"here", retain=True)
        subscribe(heir, f"{name}/will")
        assert take(heir).payload == b"here"
        with short(server, name, version=version, will=Will(f"{name}/will", b"", 1, retain=True)):
            pass
        assert take(heir).payload == b""
        subscribe(heir, f"{name}/will")
        nothing_waits(heir)


def test_a_will_does_not_reach_a_client_that_was_refused(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-3.1.2-8: it is kept only if the CONNECT was accepted."""
    with short(server, f"{name}h") as heir:
        subscribe(heir, f"{name}/will")
        will = Will(f"{name}/will", b"gone")
        with opened(server, name, version=version, password="wrong", will=will) as (peer, connack):
            assert connack.reason is Reason.BAD_USER_NAME_OR_PASSWORD
            assert peer.rest() == []
        heir.send(Pingreq())
        assert heir.receive() == Pingresp()


def test_the_will_of_a_peer_is_not_its_own_message(server: LocalServer, name: str) -> None:
    """MQTT311-3.1.2-9, MQTT5-3.1.2-9: topic and payload are the will's."""
    with short(server, f"{name}h") as heir, Peer(server.addresses.mqtt):
        subscribe(heir, f"{name}/#")
        with short(server, name, will=Will(f"{name}/will", b"gone")) as peer:
            peer.send(Publish(f"{name}/will", b"alive"))
            assert take(heir).payload == b"alive"
        assert take(heir).payload == b"gone"
