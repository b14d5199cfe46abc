"""What the conformance tests say to the server, beside `tests.gateway.peer`. Devices of the open demo app may use
every ordinary topic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from clients.local_server import LocalServer
from gateway.mqtt import (
    Connack,
    Disconnect,
    Packet,
    Pingreq,
    Pingresp,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Reason,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
)
from tests.gateway.peer import Closed, Peer, connect_packet


@contextlib.contextmanager
def opened(server: LocalServer, client_id: str, **options: Any) -> Iterator[tuple[Peer, Connack]]:
    """A peer and the server's answer to its CONNECT, whatever it is."""
    with Peer(server.addresses.mqtt) as peer:
        yield peer, peer.connect(connect_packet(options.pop("app", server.app), client_id, **options))


@contextlib.contextmanager
def device(server: LocalServer, client_id: str, **options: Any) -> Iterator[Peer]:
    """A connected peer whose session outlives its connection."""
    with opened(server, client_id, **options) as (peer, connack):
        assert connack.reason is Reason.SUCCESS, connack
        yield peer


@contextlib.contextmanager
def short(server: LocalServer, client_id: str, **options: Any) -> Iterator[Peer]:
    """A device whose session ends with its connection."""
    with device(server, client_id, clean=True, expiry=0, **options) as peer:
        yield peer


def subscribe(peer: Peer, *wanted: str | Subscription, qos: int = 2, identifier: int = 0) -> Suback:
    """The SUBACK; a filter alone is asked for with `qos`."""
    subscriptions = tuple(Subscription(one, qos) if isinstance(one, str) else one for one in wanted)
    properties: Any = {"subscription_identifiers": (identifier,)} if identifier else {}
    peer.send(Subscribe(7, subscriptions, properties))
    return peer.expect(Suback)


def unsubscribe(peer: Peer, *filters: str) -> Unsuback:
    peer.send(Unsubscribe(8, filters))
    return peer.expect(Unsuback)


def publish(peer: Peer, topic: str, payload: bytes = b"x", qos: int = 1, **options: Any) -> Packet | None:
    """Publish and go through the acknowledgements: when this returns, the server has the message."""
    packet_id = options.pop("packet_id", 9 if qos else 0)
    peer.send(Publish(topic, payload, qos, packet_id=packet_id, **options))
    if qos == 1:
        return peer.expect(Puback)
    if qos == 2:
        peer.expect(Pubrec)
        peer.send(Pubrel(packet_id))
        return peer.expect(Pubcomp)
    peer.send(Pingreq())
    return peer.expect(Pingresp)


def take(peer: Peer) -> Publish:
    """The next packet, which is a message, with its acknowledgements."""
    packet = peer.expect(Publish)
    if packet.qos == 1:
        peer.send(Puback(packet.packet_id))
    elif packet.qos == 2:
        peer.send(Pubrec(packet.packet_id))
        assert peer.expect(Pubrel).packet_id == packet.packet_id
        peer.send(Pubcomp(packet.packet_id))
    return packet


def take_all(peer: Peer, count: int) -> list[Publish]:
    """So many messages, with the acknowledgements of all of them as they come."""
    messages: list[Publish] = []
    releases = 0
    while len(messages) < count or releases:
        packet = peer.receive()
        if isinstance(packet, Pubrel):
            releases -= 1
            peer.send(Pubcomp(packet.packet_id))
            continue
        assert isinstance(packet, Publish), packet
        messages.append(packet)
        if packet.qos:
            peer.send((Puback, Pubrec)[packet.qos - 1](packet.packet_id))
            releases += packet.qos == 2
    return messages


def leave(peer: Peer) -> None:
    """A goodbye that the server has seen: from now on the client is away."""
    peer.send(Disconnect())
    assert peer.rest() == []


def ended(peer: Peer, reason: Reason) -> None:
    """The server ends the connection at once: 5 is told why, 3.1.1 is just closed."""
    if peer.version == 5:
        assert peer.expect(Disconnect).reason is reason
    with pytest.raises(Closed):
        raise AssertionError(peer.receive())


def nothing_waits(peer: Peer) -> None:
    """Whatever the server had for this peer has been read: the next packet is the answer to a ping."""
    peer.send(Pingreq())
    assert peer.receive() == Pingresp()
