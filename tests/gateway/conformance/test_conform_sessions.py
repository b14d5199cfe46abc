"""Sessions (3.1.2.4, 3.1.2.11.2, 4.1, 4.4, 4.5): what outlives a connection, and a server."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    Will,
)
from tests.conftest import StartServer
from tests.gateway.conformance.talk import (
    device,
    leave,
    nothing_waits,
    opened,
    publish,
    short,
    subscribe,
    take,
    unsubscribe,
)


def test_a_session_is_taken_up_with_its_subscriptions_and_what_came_meanwhile(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-3.1.2-4, 3.1.2-5, 3.1.4-3, 4.5.0-1; MQTT5-3.1.2-5, 3.1.2-23, 3.1.4-4, 4.5.0-1."""
    with device(server, name, version=version) as peer:
        subscribe(peer, f"{name}/#")
        leave(peer)
    with short(server, f"{name}p", version=version) as sender:
        for qos in (1, 2):
            publish(sender, f"{name}/{qos}", qos=qos)
        with opened(server, name, version=version) as (peer, connack):
            assert connack.session_present
            assert [(take(peer).topic, qos) for qos in (1, 2)] == [(f"{name}/1", 1), (f"{name}/2", 2)]
            publish(sender, f"{name}/live", qos=0)
            assert take(peer).topic == f"{name}/live"


def test_a_clean_start_leaves_nothing_of_the_old_session(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-3.1.2-6, 3.1.4-3; MQTT5-3.1.2-4, 3.1.4-4: subscriptions, messages, QoS 2 ids."""
    with short(server, f"{name}p") as sender:
        with device(server, name, version=version) as peer:
            subscribe(peer, f"{name}/x")
            publish(sender, f"{name}/x")
            peer.expect(Publish)
            peer.send(Publish(f"{name}/y", b"first", 2, packet_id=5))
            peer.expect(Pubrec)
            leave(peer)
        publish(sender, f"{name}/x")
        with opened(server, name, version=version, clean=True) as (peer, connack):
            assert not connack.session_present
            publish(sender, f"{name}/x")
            nothing_waits(peer)
            subscribe(peer, f"{name}/y")
            peer.send(Publish(f"{name}/y", b"second", 2, packet_id=5))
            packets = {type(packet): packet for packet in (peer.receive(), peer.receive())}
            assert packets[Publish].payload == b"second"  # type: ignore[union-attr]


def test_a_clean_session_is_not_taken_up_later(server: LocalServer, name: str) -> None:
    """MQTT311-3.1.2-6, MQTT311-3.2.2-3."""
    with short(server, name, version=4) as peer:
        subscribe(peer, f"{name}/x")
    with opened(server, name, version=4) as (_, connack):
        assert not connack.session_present


def test_a_session_lives_as_long_as_its_connection_even_if_it_has_no_time_after_it(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-4.1.0-1, 4.1.0-2; MQTT5-4.1.0-1, 4.1.0-2."""
    with short(server, f"{name}p") as sender, short(server, name, version=version) as peer:
        subscribe(peer, f"{name}/x")
        peer.send(Publish(f"{name}/y", b"x", 2, packet_id=5))
        peer.expect(Pubrec)
        publish(sender, f"{name}/x")
        assert take(peer).topic == f"{name}/x"
        peer.send(Pubrel(5))
        assert peer.expect(Pubcomp).reason is Reason.SUCCESS
    with opened(server, name, version=version) as (_, connack):
        assert not connack.session_present


def test_a_session_without_anything_in_it_is_a_session(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.2.2-2, MQTT5-3.1.2-23, 3.2.2-3: without one the client forgets what it has under way."""
    with opened(server, name, version=version):
        pass
    with opened(server, name, version=version) as (_, connack):
        assert connack.session_present


def test_a_publishers_session_without_anything_in_it_is_a_session(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-3.2.2-2, MQTT5-3.2.2-3."""
    for present in (False, True):
        with opened(server, name, version=version, password=server.app.master_secret) as (_, connack):
            assert connack.session_present is present


def test_an_unanswered_message_comes_again_with_its_packet_id_and_dup(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-3.3.1-1, 4.3.2-1, 4.4.0-1, 4.6.0-1, 2.3.1-4; MQTT5-3.3.1-1, 4.3.2-3, 4.3.3-3, 4.4.0-1, 4.6.0-1."""
    with short(server, f"{name}p") as sender, device(server, name, version=version) as peer:
        subscribe(peer, f"{name}/#")
        for i in range(4):
            publish(sender, f"{name}/{i}", qos=1 + i % 2)
        first = [peer.expect(Publish) for _ in range(4)]
        assert not any(packet.dup for packet in first)
        peer.send(Puback(first[2].packet_id))
        nothing_waits(peer)
    with device(server, name, version=version) as peer:
        again = [peer.expect(Publish) for _ in range(3)]
        assert again == [replace(packet, dup=True) for packet in (first[0], first[1], first[3])]
        nothing_waits(peer)


def test_after_pubrec_it_is_pubrel_that_comes_again(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-4.3.3-1, 4.4.0-1; MQTT5-4.3.3-4, 4.3.3-5, 4.3.3-6, 4.4.0-1."""
    with short(server, f"{name}p") as sender, device(server, name, version=version) as peer:
        subscribe(peer, f"{name}/x")
        publish(sender, f"{name}/x", qos=2)
        packet_id = peer.expect(Publish).packet_id
        peer.send(Pubrec(packet_id))
        assert peer.expect(Pubrel) == Pubrel(packet_id)
    for _ in range(2):
        with device(server, name, version=version) as peer:
            assert peer.receive() == Pubrel(packet_id)
            nothing_waits(peer)
    with device(server, name, version=version) as peer:
        peer.expect(Pubrel)
        peer.send(Pubcomp(packet_id))
        nothing_waits(peer)
    with device(server, name, version=version) as peer:
        nothing_waits(peer)


def test_nothing_is_sent_again_on_a_live_connection(server: LocalServer, name: str, version: int) -> None:
    """MQTT5-4.4.0-1; MQTT 3.1.1 allows it and needs it no more."""
    with short(server, f"{name}p") as sender, device(server, name, version=version) as peer:
        subscribe(peer, f"{name}/x")
        publish(sender, f"{name}/x", qos=1)
        publish(sender, f"{name}/x", qos=2)
        peer.expect(Publish)
        peer.send(Pubrec(peer.expect(Publish).packet_id))
        peer.expect(Pubrel)
        peer.expect_nothing()


@pytest.mark.parametrize("qos", [1, 2])
def test_a_message_that_was_refused_does_not_come_again(server: LocalServer, name: str, qos: int) -> None:
    """MQTT5-4.4.0-2."""
    with short(server, f"{name}p") as sender, device(server, name) as peer:
        subscribe(peer, f"{name}/x")
        publish(sender, f"{name}/x", qos=qos)
        packet_id = peer.expect(Publish).packet_id
        peer.send(Puback(packet_id, Reason.QUOTA_EXCEEDED) if qos == 1 else Pubrec(packet_id, Reason(0x97)))
        nothing_waits(peer)
    with device(server, name) as peer:
        nothing_waits(peer)


def test_retained_messages_outlive_the_session_that_sent_them(server: LocalServer, name: str) -> None:
    """MQTT311-3.1.2-7."""
    with short(server, name, version=4) as peer:
        publish(peer, f"{name}/x", b"kept", retain=True)
    with short(server, name, version=4) as peer:
        subscribe(peer, f"{name}/x")
        assert take(peer).payload == b"kept"


def test_disconnect_may_end_the_session(server: LocalServer, name: str) -> None:
    """MQTT5-4.1.0-2."""
    with device(server, name) as peer:
        subscribe(peer, f"{name}/x")
        peer.send(Disconnect(properties={"session_expiry_interval": 0}))
        assert peer.rest() == []
    with opened(server, name) as (_, connack):
        assert not connack.session_present


# A restart of the server


@dataclass(frozen=True, slots=True)
class Past:
    """What clients remember of the time before the server was killed and started again."""

    server: LocalServer
    flying: dict[int, list[Publish]]  # by version: sent and not acknowledged, the last of QoS 2


@pytest.fixture(scope="module")
def past(start_server: StartServer) -> Past:
    server = start_server()
    flying = {}
    with short(server, "sender") as sender:
        for version in (4, 5):
            with device(server, f"keeper{version}", version=version) as peer:
                subscribe(peer, f"keep{version}/#", f"gone{version}")
                unsubscribe(peer, f"gone{version}")
                publish(sender, f"keep{version}/done", qos=2)
                take(peer)  # and completed: it is not to come again
                for topic, qos in (("one", 1), ("two", 2), ("released", 2)):
                    publish(sender, f"keep{version}/{topic}", qos=qos)
                flying[version] = [peer.expect(Publish) for _ in range(3)]
                peer.send(Pubrec(flying[version][2].packet_id))
                peer.expect(Pubrel)
                peer.send(Publish(f"inbound{version}", b"x", 2, packet_id=77))
                peer.expect(Pubrec)
                leave(peer)
            with device(server, f"clean{version}", version=version, clean=True, expiry=0) as peer:
                subscribe(peer, f"keep{version}/#")
            publish(sender, f"keep{version}/while-away")
        will = Will("mortal", b"gone", 1, retain=True, properties={"will_delay_interval": 1})
        with device(server, "mortal", will=will) as peer:
            peer.send(Disconnect(Reason.DISCONNECT_WITH_WILL_MESSAGE))
            assert peer.rest() == []
        publish(sender, "after", retain=True)  # behind the will in the store, so the will is there
        with device(server, "interrupted", will=Will("interrupted", b"gone", 1, retain=True)) as peer:
            subscribe(peer, "x")  # answered once the session is in the store
            server.restart()
    return Past(server, flying)


def test_a_session_survives_a_restart_with_all_it_owes(past: Past, version: int) -> None:
    """MQTT311-3.1.2-4, 3.1.2-5, 3.2.2-2, 3.3.1-1, 4.1.0-1, 4.4.0-1;
    MQTT5-3.1.2-5, 3.1.2-23, 3.2.2-3, 3.3.1-1, 4.3.3-6, 4.4.0-1. Nothing that was completed comes again."""
    one, two, released = past.flying[version]
    with opened(past.server, f"keeper{version}", version=version) as (peer, connack):
        assert connack.session_present
        assert peer.receive() == replace(one, dup=True)
        assert peer.receive() == replace(two, dup=True)
        assert peer.receive() == Pubrel(released.packet_id)
        peer.send(Puback(one.packet_id), Pubrec(two.packet_id), Pubcomp(released.packet_id))
        packets = [peer.receive(), peer.receive()]
        assert Pubrel(two.packet_id) in packets
        peer.send(Pubcomp(two.packet_id))
        assert [p.topic for p in packets if isinstance(p, Publish)] == [f"keep{version}/while-away"]


def test_a_subscription_survives_a_restart(past: Past, version: int) -> None:
    """MQTT311-3.1.2-4, 4.1.0-1; MQTT5-3.1.2-5, 3.1.2-23: and one that was left does not come back."""
    with (
        short(past.server, "later", version=version) as sender,
        opened(past.server, f"keeper{version}", version=version) as (peer, _),
    ):
        publish(sender, f"gone{version}", qos=0)
        publish(sender, f"keep{version}/now", qos=0)
        peer.send(Pingreq())
        topics = [packet.topic for packet in iter(peer.receive, Pingresp()) if isinstance(packet, Publish)]
        assert f"keep{version}/now" in topics
        assert f"gone{version}" not in topics


def test_a_qos_2_id_survives_a_restart(past: Past, version: int) -> None:
    """MQTT311-4.3.3-2, MQTT5-4.3.3-10."""
    message = Publish(f"inbound{version}", b"x", 2, dup=True, packet_id=77)
    with (
        short(past.server, "inbound", version=version) as witness,
        opened(past.server, f"keeper{version}", version=version) as (peer, _),
    ):
        subscribe(witness, message.topic)
        peer.send(message, Pubrel(77))
        answers = [packet for packet in iter(peer.receive, Pubcomp(77)) if isinstance(packet, Pubrec)]
        assert answers == [Pubrec(77)]
        nothing_waits(witness)


def test_a_session_that_ended_with_its_connection_is_not_back_after_a_restart(
    past: Past, version: int
) -> None:
    """MQTT311-3.1.2-6, MQTT5-4.1.0-2."""
    with opened(past.server, f"clean{version}", version=version) as (_, connack):
        assert not connack.session_present


def test_a_will_that_waits_survives_a_restart(past: Past) -> None:
    """MQTT5-3.1.2-7, 3.1.2-8: it belongs to the session, and goes in its time or when the server is back."""
    with short(past.server, "heir") as heir:
        subscribe(heir, "mortal")
        assert take(heir).payload == b"gone"


def test_a_will_of_a_connection_that_ended_with_the_server_is_published(past: Past) -> None:
    """MQTT5-3.1.2-7, 3.1.2-8: a server that fails may publish it late (3.1.2.5), but does."""
    with short(past.server, "heir") as heir:
        subscribe(heir, "interrupted")
        assert isinstance(heir.receive(), Publish)
