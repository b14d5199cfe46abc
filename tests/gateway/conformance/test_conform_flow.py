"""Flow control and sizes (3.3.4, 4.9, 3.1.2.11.4): Receive Maximum and Maximum Packet Size, in both directions."""

from __future__ import annotations

from typing import Any

import pytest

from clients.local_server import LocalServer
from gateway.mqtt import (
    Disconnect,
    Pingreq,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Reason,
    Suback,
    Subscribe,
    Subscription,
    Unsubscribe,
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
    take_all,
    unsubscribe,
)
from tests.gateway.peer import Peer, connect_packet

TWO: Any = {"receive_maximum": 2}


@pytest.mark.parametrize("qos", [1, 2])
def test_no_more_than_receive_maximum_are_unacknowledged(server: LocalServer, name: str, qos: int) -> None:
    """MQTT5-3.3.4-9, 4.3.2-3, 4.3.3-3, 4.3.3-5, 4.9.0-1, 4.9.0-2: QoS 2 counts until PUBCOMP."""
    with short(server, f"{name}p") as sender, short(server, name, properties=TWO) as peer:
        subscribe(peer, name)
        for i in range(6):
            publish(sender, name, b"%d" % i, qos)
        flying = [peer.expect(Publish), peer.expect(Publish)]
        nothing_waits(peer)
        for i in range(2, 6):
            packet_id = flying.pop(0).packet_id
            if qos == 1:
                peer.send(Puback(packet_id))
            else:
                peer.send(Pubrec(packet_id))
                assert peer.receive() == Pubrel(packet_id)
                nothing_waits(peer)
                peer.send(Pubcomp(packet_id))
            flying.append(peer.expect(Publish))
            assert flying[-1].payload == b"%d" % i
            nothing_waits(peer)


def test_a_refusal_of_the_subscriber_makes_room(server: LocalServer, name: str) -> None:
    """MQTT5-3.3.4-9: PUBACK and PUBREC with 0x80 or more."""
    with short(server, f"{name}p") as sender, short(server, name, properties={"receive_maximum": 1}) as peer:
        subscribe(peer, name)
        for i in range(3):
            publish(sender, name, b"%d" % i, 2 - i % 2)
        packet = peer.expect(Publish)
        peer.send(Pubrec(packet.packet_id, Reason.QUOTA_EXCEEDED))
        packet = peer.expect(Publish)
        assert packet.payload == b"1"
        peer.send(Puback(packet.packet_id, Reason.QUOTA_EXCEEDED))
        assert peer.expect(Publish).payload == b"2"


def test_a_full_window_holds_up_nothing_but_messages_that_count(server: LocalServer, name: str) -> None:
    """MQTT5-3.3.4-10, 4.9.0-3: everything else is answered."""
    with short(server, f"{name}p") as sender, short(server, name, properties=TWO) as peer:
        subscribe(peer, f"{name}/full")
        for _ in range(4):
            publish(sender, f"{name}/full")
        flying = [peer.expect(Publish), peer.expect(Publish)]
        nothing_waits(peer)
        assert isinstance(subscribe(peer, f"{name}/other", qos=0), Suback)
        publish(sender, f"{name}/other", qos=0)
        assert peer.expect(Publish).topic == f"{name}/other"
        unsubscribe(peer, f"{name}/other")
        for qos in (1, 2):
            publish(peer, f"{name}/out", qos=qos)
        peer.send(*[Puback(packet.packet_id) for packet in flying])
        assert [packet.topic for packet in take_all(peer, 2)] == [f"{name}/full"] * 2


def test_a_client_may_use_all_of_the_servers_receive_maximum(server: LocalServer, name: str) -> None:
    """MQTT5-3.3.4-7, 4.9.0-3: and is served with none left."""
    with opened(server, name, clean=True, expiry=0) as (peer, connack):
        most = connack.properties["receive_maximum"]
        peer.send(*[Publish(name, b"x", 2, packet_id=i + 1) for i in range(most)])
        assert [peer.expect(Pubrec).packet_id for _ in range(most)] == [*range(1, most + 1)]
        nothing_waits(peer)
        subscribe(peer, "t")
        peer.send(*[Pubrel(i + 1) for i in range(most)])
        assert [peer.receive() for _ in range(most)] == [Pubcomp(i + 1) for i in range(most)]


def test_one_more_than_the_servers_receive_maximum_ends_the_connection(
    server: LocalServer, name: str
) -> None:
    """MQTT5-3.3.4-7: QoS 2 counts until PUBCOMP."""
    with opened(server, name, clean=True, expiry=0) as (peer, connack):
        most = connack.properties["receive_maximum"]
        peer.send(*[Publish(name, b"x", 2, packet_id=i + 1) for i in range(most)])
        assert [peer.expect(Pubrec).packet_id for _ in range(most)] == [*range(1, most + 1)]
        peer.send(Publish(name, b"x", 1, packet_id=most + 1))
        ended(peer, Reason.RECEIVE_MAXIMUM_EXCEEDED)


def test_the_same_qos_2_message_again_does_not_count_twice(server: LocalServer, name: str) -> None:
    """MQTT5-3.3.4-7, 4.3.3-10."""
    with opened(server, name, clean=True, expiry=0) as (peer, connack):
        most = connack.properties["receive_maximum"]
        peer.send(*[Publish(name, b"x", 2, packet_id=i + 1) for i in range(most)])
        peer.send(Publish(name, b"x", 2, dup=True, packet_id=1))
        assert [peer.expect(Pubrec).packet_id for _ in range(most + 1)] == [*range(1, most + 1), 1]


# Sizes


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_message_too_large_for_the_subscriber_is_passed_over(
    server: LocalServer, name: str, qos: int
) -> None:
    """MQTT5-3.1.2-24, 3.1.2-25: it holds up nothing, live, retained or queued; others get it."""
    limits: Any = {"maximum_packet_size": 60, "receive_maximum": 1}
    large, small = b"x" * 60, b"x"
    with short(server, f"{name}p") as sender, short(server, f"{name}s") as other:
        subscribe(other, f"{name}/#")
        with device(server, name, properties=limits) as peer:
            subscribe(peer, f"{name}/#")
            for payload in (large, small, large, small):
                publish(sender, f"{name}/x", payload, qos)
            assert [packet.payload for packet in take_all(peer, 2)] == [small] * 2
            assert [packet.payload for packet in take_all(other, 4)] == [large, small] * 2
            nothing_waits(peer)
            leave(peer)
        for payload in (large, small):
            publish(sender, f"{name}/x", payload, qos, retain=True)
            publish(sender, f"{name}/{len(payload)}", payload, qos, retain=True)
        with device(server, name, properties=limits) as peer:
            waited = take_all(peer, 2 * (qos > 0))
            assert {packet.payload for packet in waited} == ({small} if qos else set())
            subscribe(peer, f"{name}/+")
            assert [packet.payload for packet in take_all(peer, 2)] == [small] * 2
            nothing_waits(peer)


def test_a_packet_of_exactly_the_maximum_is_sent(server: LocalServer, name: str) -> None:
    """MQTT5-3.1.2-24."""
    message = Publish(name, b"x" * 50, 1, packet_id=1)
    size = len(encode(message, 5))
    with short(server, f"{name}p") as sender:
        for most, expected in ((size, 1), (size - 1, 0)):
            with short(server, name, properties={"maximum_packet_size": most}) as peer:
                subscribe(peer, name)
                publish(sender, name, message.payload)
                for _ in range(expected):
                    assert take(peer) == message
                nothing_waits(peer)


def test_properties_count_towards_the_size(server: LocalServer, name: str) -> None:
    """MQTT5-3.1.2-24: user properties, and what the server adds."""
    with (
        short(server, f"{name}p") as sender,
        short(server, name, properties={"maximum_packet_size": 60}) as peer,
    ):
        subscribe(peer, name, identifier=5)
        publish(sender, name, properties={"user_properties": (("k", "v" * 50),)})
        publish(sender, name)
        assert take(peer).properties == {"subscription_identifiers": (5,)}
        nothing_waits(peer)


@pytest.mark.parametrize("most", [1, 4, 10])
def test_who_takes_no_connack_gets_nothing_larger(server: LocalServer, name: str, most: int) -> None:
    """MQTT5-3.1.2-24: and the connection ends, as nothing can be told on it."""
    with Peer(server.addresses.mqtt) as peer:
        peer.send(connect_packet(server.app, name, properties={"maximum_packet_size": most}))
        assert len(peer.rest_of_bytes()) <= most


def test_an_answer_that_would_be_too_large_is_not_sent(server: LocalServer, name: str) -> None:
    """MQTT5-3.1.2-24: a SUBACK and an UNSUBACK cannot be made shorter."""
    filters = [f"{name}/{i}" for i in range(60)]
    limits: Any = {"maximum_packet_size": 50}
    for packet in (Subscribe(7, tuple(map(Subscription, filters))), Unsubscribe(7, tuple(filters))):
        with short(server, name, properties=limits) as peer:
            peer.send(packet, Disconnect())
            assert len(peer.rest_of_bytes()) <= limits["maximum_packet_size"]


def test_a_packet_over_the_servers_maximum_ends_the_connection(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT5-3.2.2-15."""
    with opened(server, f"{name}m") as (_, connack):
        most = connack.properties["maximum_packet_size"]
    fits = Publish(name, b"x" * (most - 20 - len(name)), 1, packet_id=1)
    with short(server, name, version=version) as peer:
        peer.send(fits)
        assert isinstance(peer.receive(), Puback)
        peer.send(encode(Publish(name, b"x" * most), version), Pingreq())
        ended(peer, Reason.PACKET_TOO_LARGE)
