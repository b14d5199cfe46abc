"""Shared subscriptions (4.8.2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from clients.local_server import LocalServer
from gateway.mqtt import (
    Disconnect,
    Pingreq,
    Pingresp,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Reason,
    Subscribe,
    Subscription,
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
    unsubscribe,
)
from tests.gateway.peer import Peer


@pytest.mark.parametrize(
    "bad", ["$share/", "$share/g", "$share/g/", "$share//t", "$share/+/t", "$share/g#/t", "$share/g/a#"]
)
def test_a_shared_subscription_names_a_group_and_a_filter(server: LocalServer, name: str, bad: str) -> None:
    """MQTT5-4.8.2-1, 4.8.2-2."""
    raw = encode(Subscribe(1, (Subscription("@" * len(bad)),)), 5).replace(b"@" * len(bad), bad.encode())
    with short(server, name) as peer:
        peer.send(raw, Pingreq())
        ended(peer, Reason.TOPIC_FILTER_INVALID)


@contextlib.contextmanager
def member(server: LocalServer, client_id: str, topic_filter: str, qos: int = 2) -> Iterator[Peer]:
    """A member of the group whose session outlives its connection."""
    with device(server, client_id) as peer:
        assert subscribe(peer, topic_filter, qos=qos).reasons == (Reason(qos),)
        yield peer


def drain(peer: Peer) -> list[Publish]:
    """All messages that are there, with their acknowledgements."""
    messages: list[Publish] = []
    open_ids: set[int] = set()
    quiet = False
    while not quiet or open_ids:
        peer.send(Pingreq())
        quiet = True
        while (packet := peer.receive()) != Pingresp():
            quiet = False
            if isinstance(packet, Pubrel):
                open_ids.discard(packet.packet_id)
                peer.send(Pubcomp(packet.packet_id))
                continue
            assert isinstance(packet, Publish), packet
            messages.append(packet)
            if packet.qos == 1:
                peer.send(Puback(packet.packet_id))
            elif packet.qos == 2:
                open_ids.add(packet.packet_id)
                peer.send(Pubrec(packet.packet_id))
    return messages


def test_the_server_offers_shared_subscriptions(server: LocalServer, name: str) -> None:
    """4.8.2, 3.2.2.3.13."""
    with opened(server, name, clean=True) as (peer, connack):
        assert connack.properties.get("shared_subscription_available", 1) == 1
        assert subscribe(peer, f"$share/g/{name}").reasons == (Reason.GRANTED_QOS_2,)


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_each_message_goes_to_one_member_and_all_members_get_some(
    server: LocalServer, name: str, qos: int
) -> None:
    """4.8.2."""
    topic_filter = f"$share/g/{name}/#"
    with (
        short(server, f"{name}p") as sender,
        member(server, f"{name}a", topic_filter) as one,
        member(server, f"{name}b", topic_filter) as other,
        member(server, f"{name}c", f"$share/h/{name}/#") as alone,
        short(server, f"{name}d") as plain,
    ):
        subscribe(plain, f"{name}/+")
        sent = [b"%d" % i for i in range(20)]
        for payload in sent:
            publish(sender, f"{name}/x", payload, qos)
        got = [sorted(int(p.payload) for p in drain(peer)) for peer in (one, other, alone, plain)]
        assert sorted(got[0] + got[1]) == got[2] == got[3] == list(range(20))
        assert min(len(got[0]), len(got[1])) >= 5


@pytest.mark.parametrize("granted", [0, 1, 2])
def test_a_members_granted_qos_is_respected(server: LocalServer, name: str, granted: int) -> None:
    """MQTT5-4.8.2-3."""
    with (
        short(server, f"{name}p") as sender,
        member(server, name, f"$share/g/{name}", granted) as peer,
    ):
        for qos in (0, 1, 2):
            publish(sender, name, qos=qos)
            assert take(peer).qos == min(qos, granted)


@pytest.mark.parametrize("received", [False, True], ids=["before PUBREC", "after PUBREC"])
def test_a_qos_2_message_in_flight_is_completed_with_its_member(
    server: LocalServer, name: str, received: bool
) -> None:
    """MQTT5-4.8.2-4."""
    topic_filter = f"$share/g/{name}"
    with short(server, f"{name}p") as sender, member(server, f"{name}b", topic_filter) as other:
        with member(server, f"{name}a", topic_filter) as peer:
            mine, packet_id = in_flight(sender, name, peer, other)
            if received:
                peer.send(Pubrec(packet_id))
                peer.expect(Pubrel)
            leave(peer)
        nothing_waits(other)
        with device(server, f"{name}a") as peer:
            if not received:
                again = peer.expect(Publish)
                assert (again.payload, again.packet_id, again.dup) == (mine, packet_id, True)
                peer.send(Pubrec(packet_id))
            assert peer.receive() == Pubrel(packet_id)
            peer.send(Pubcomp(packet_id))
            nothing_waits(peer)
        nothing_waits(other)


def in_flight(sender: Peer, topic: str, peer: Peer, other: Peer) -> tuple[bytes, int]:
    """Publish until `peer` has one QoS 2 message that it has not answered; `other` completes its own."""
    for i in range(10):
        publish(sender, topic, b"%d" % i, 2)
        peer.send(Pingreq())
        packet = peer.receive()
        if isinstance(packet, Publish):
            assert peer.receive() == Pingresp()
            return packet.payload, packet.packet_id
        take(other)
    raise AssertionError("it was never its turn")


def test_a_qos_2_message_in_flight_goes_to_nobody_else_when_its_session_ends(
    server: LocalServer, name: str
) -> None:
    """MQTT5-4.8.2-5."""
    topic_filter = f"$share/g/{name}"
    with short(server, f"{name}p") as sender, member(server, f"{name}b", topic_filter) as other:
        with member(server, f"{name}a", topic_filter) as peer:
            in_flight(sender, name, peer, other)
            peer.send(Disconnect(properties={"session_expiry_interval": 0}))
            assert peer.rest() == []
        nothing_waits(other)
        publish(sender, name, b"next", 2)
        assert take(other).payload == b"next"


def test_a_qos_1_message_goes_to_another_member_when_its_session_ends(server: LocalServer, name: str) -> None:
    """4.8.2: it should, and nothing is lost."""
    topic_filter = f"$share/g/{name}"
    with short(server, f"{name}p") as sender, member(server, f"{name}b", topic_filter) as other:
        with member(server, f"{name}a", topic_filter) as peer:
            for i in range(6):
                publish(sender, name, b"%d" % i)
            taken = drain(other)
            mine = [peer.expect(Publish).payload for _ in range(6 - len(taken))]
            assert mine
            peer.send(Disconnect(properties={"session_expiry_interval": 0}))
            assert peer.rest() == []
        moved = drain(other)
        assert sorted(mine) == sorted(packet.payload for packet in moved)
        assert len(moved) + len(taken) == 6


@pytest.mark.parametrize("qos", [1, 2])
def test_a_message_that_a_member_refuses_is_discarded(server: LocalServer, name: str, qos: int) -> None:
    """MQTT5-4.8.2-6."""
    topic_filter = f"$share/g/{name}"
    with (
        short(server, f"{name}p") as sender,
        member(server, f"{name}a", topic_filter) as one,
        member(server, f"{name}b", topic_filter) as other,
    ):
        for _ in range(4):
            publish(sender, name, qos=qos)
        refused = 0
        for peer in (one, other):
            peer.send(Pingreq())
            while (packet := peer.receive()) != Pingresp():
                assert isinstance(packet, Publish)
                peer.send((Puback, Pubrec)[qos - 1](packet.packet_id, Reason.QUOTA_EXCEEDED))
                refused += 1
        assert refused == 4
        for peer in (one, other):
            nothing_waits(peer)


def test_a_shared_subscription_gets_no_retained_messages(server: LocalServer, name: str) -> None:
    """4.8.2: they are not sent when it is made."""
    with short(server, name) as peer:
        publish(peer, name, retain=True)
        assert subscribe(peer, f"$share/g/{name}").reasons == (Reason.GRANTED_QOS_2,)
        nothing_waits(peer)


def test_a_shared_subscription_is_changed_and_left_by_its_own_filter(server: LocalServer, name: str) -> None:
    """MQTT5-3.8.4-3 (one of its own, beside a plain one of the same topics), 3.10.4-1, 3.10.4-2."""
    topic_filter = f"$share/g/{name}"
    with short(server, f"{name}p") as sender, member(server, f"{name}a", topic_filter, 2) as peer:
        subscribe(peer, topic_filter, qos=0)
        publish(sender, name, qos=2)
        assert take(peer).qos == 0
        assert unsubscribe(peer, name).reasons == (Reason.NO_SUBSCRIPTION_EXISTED,)
        subscribe(peer, Subscription(name, 1))
        publish(sender, name, qos=1)
        assert sorted(packet.qos for packet in drain(peer)) == [0, 1]
        assert unsubscribe(peer, topic_filter).reasons == (Reason.SUCCESS,)
        with member(server, f"{name}b", topic_filter, 1) as other:
            publish(sender, name, qos=1)
            assert (len(drain(peer)), len(drain(other))) == (
                1,
                1,
            )  # the plain one, and the group's only member


def test_a_copy_through_a_group_and_a_plain_one_name_their_own_identifiers(
    server: LocalServer, name: str
) -> None:
    """MQTT5-3.3.4-5: the one case of several copies (4.8.2)."""
    with short(server, f"{name}p") as sender, short(server, name) as peer:
        subscribe(peer, f"$share/g/{name}", identifier=1)
        subscribe(peer, name, identifier=2)
        publish(sender, name)
        copies = drain(peer)
        assert sorted(copy.properties["subscription_identifiers"] for copy in copies) == [(1,), (2,)]
