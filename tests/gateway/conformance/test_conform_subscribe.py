"""SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK (3.8 to 3.11)."""

from __future__ import annotations

import pytest

from clients.local_server import LocalServer
from gateway.mqtt import (
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
    Unsuback,
    Unsubscribe,
)
from tests.gateway.conformance.talk import (
    device,
    ended,
    leave,
    nothing_waits,
    publish,
    short,
    subscribe,
    take,
    take_all,
    unsubscribe,
)
from tests.gateway.peer import Peer, register


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param({4: "82 02 0001", 5: "82 03 0001 00"}, Reason.PROTOCOL_ERROR, id="SUBSCRIBE to nothing"),
        pytest.param({4: "a2 02 0001", 5: "a2 03 0001 00"}, Reason.PROTOCOL_ERROR, id="UNSUBSCRIBE of nothing"),
        pytest.param({4: "82 06 0001 0001 74 03", 5: "82 07 0001 00 0001 74 03"}, Reason.PROTOCOL_ERROR, id="QoS 3"),
        pytest.param({4: "82 06 0001 0001 74 04", 5: "82 07 0001 00 0001 74 40"}, Reason.MALFORMED_PACKET, id="bit"),
        pytest.param({4: "82 06 0001 0001 74 80", 5: "82 07 0001 00 0001 74 80"}, Reason.MALFORMED_PACKET, id="7"),
        pytest.param({4: "82 05 0001 0001 74", 5: "82 06 0001 00 0001 74"}, Reason.MALFORMED_PACKET, id="no options"),
        pytest.param({4: "82 05 0001 0000 00", 5: "82 06 0001 00 0000 00"}, Reason.TOPIC_FILTER_INVALID, id="empty"),
        pytest.param({4: "a2 04 0001 0000", 5: "a2 05 0001 00 0000"}, Reason.TOPIC_FILTER_INVALID, id="leave empty"),
    ],
)  # fmt: skip
def test_a_subscribe_or_unsubscribe_that_breaks_a_rule_ends_the_connection(
    server: LocalServer, name: str, version: int, raw: dict[int, str], reason: Reason
) -> None:
    """MQTT311-3.8.3-3, 3.8.3-4, 3.10.3-2, 4.7.3-1; MQTT5-3.8.3-2, 3.8.3-5, 3.10.3-2, 4.7.3-1."""
    with short(server, name, version=version) as peer:
        peer.send(bytes.fromhex(raw[version]), Pingreq())
        ended(peer, reason)


def test_retain_handling_3_and_no_local_on_a_shared_subscription_end_the_connection(
    server: LocalServer, name: str
) -> None:
    """MQTT5-3.8.3-4, 3.8.3-5."""
    for raw in ("82 07 0001 00 0001 74 30", "82 10 0001 00 000a 2473686172652f672f74 05"):
        with short(server, name) as peer:
            peer.send(bytes.fromhex(raw), Pingreq())
            ended(peer, Reason.PROTOCOL_ERROR)


def test_no_local_keeps_a_clients_own_messages_from_it(server: LocalServer, name: str) -> None:
    """MQTT5-3.8.3-3: by client id, so also on its next connection, and nobody else's."""
    with short(server, f"{name}p") as other:
        with device(server, name) as peer:
            subscribe(peer, Subscription(f"{name}/#", 1, no_local=True))
            publish(peer, f"{name}/own")
            publish(other, f"{name}/other")
            assert take(peer).topic == f"{name}/other"
            leave(peer)
        with device(server, name) as peer:
            publish(peer, f"{name}/own")
            publish(other, f"{name}/other")
            assert take(peer).topic == f"{name}/other"
            subscribe(peer, Subscription(f"{name}/#", 1))
            publish_to_self(peer, f"{name}/own")


@pytest.mark.parametrize("granted", [0, 1, 2])
def test_a_message_has_the_lower_of_its_qos_and_the_granted_one(
    server: LocalServer, name: str, version: int, granted: int
) -> None:
    """MQTT311-3.8.4-5, 3.8.4-6; MQTT5-3.8.4-7, 3.8.4-8: live and retained."""
    with short(server, f"{name}p") as sender, short(server, name, version=version) as peer:
        assert subscribe(peer, f"{name}/+", qos=granted).reasons == (Reason(granted),)
        for qos in (0, 1, 2):
            publish(sender, f"{name}/x", qos=qos)
            assert take(peer).qos == min(qos, granted)
            publish(sender, f"{name}/kept/{qos}", qos=qos, retain=True)
        subscribe(peer, f"{name}/kept/+", qos=granted)
        kept = {packet.topic[-1]: packet.qos for packet in take_all(peer, 3)}
        assert kept == {str(qos): min(qos, granted) for qos in (0, 1, 2)}


def test_a_repeated_subscription_replaces_the_older(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.8.4-3; MQTT5-3.8.4-3, 3.8.4-4: one copy, the new QoS, and the retained message again."""
    with short(server, f"{name}p") as sender, short(server, name, version=version) as peer:
        publish(sender, name, b"kept", retain=True)
        for qos in (2, 0, 1):
            assert subscribe(peer, name, qos=qos).reasons == (Reason(qos),)
            again = take(peer)
            assert (again.payload, again.retain, again.qos) == (b"kept", True, min(qos, 1))
            publish(sender, name, b"live", 2)
            assert take(peer).qos == qos
            nothing_waits(peer)
        unsubscribe(peer, name)
        publish(sender, name, b"live", 2)
        nothing_waits(peer)


def test_no_message_is_lost_while_a_subscription_is_replaced(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-3.8.4-3, MQTT5-3.8.4-4."""
    count = 200
    with short(server, f"{name}p") as sender, short(server, name, version=version) as peer:
        subscribe(peer, name, qos=0)
        sender.send(*[Publish(name, b"%d" % i) for i in range(count)])
        peer.send(*[Subscribe(i + 1, (Subscription(name),)) for i in range(20)])
        packets = [peer.receive() for _ in range(count + 20)]
        payloads = [packet.payload for packet in packets if isinstance(packet, Publish)]
        assert payloads == [b"%d" % i for i in range(count)]


def test_many_filters_in_one_packet_are_as_many_packets(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.8.4-4, 3.8.4-5, 3.9.3-1; MQTT5-3.8.4-5, 3.8.4-6, 3.9.3-1: in order, one answer for each; the later of
    two equal filters holds."""
    with short(server, f"{name}p") as sender, short(server, name, version=version) as peer:
        for topic in ("a", "b"):
            publish(sender, f"{name}/{topic}", topic.encode(), qos=2, retain=True)
        suback = subscribe(
            peer,
            Subscription(f"{name}/a", 2),
            Subscription(f"{name}/b", 0),
            Subscription(f"{name}/c", 1),
            Subscription(f"{name}/a", 1),
        )
        assert suback.reasons == (Reason(2), Reason(0), Reason(1), Reason(1))
        kept: dict[bytes, int] = {}
        while kept != {b"a": 1, b"b": 0}:  # `a` perhaps twice, the second time as it was asked for last
            message = take(peer)
            assert message.retain
            kept[message.payload] = message.qos
        publish(sender, f"{name}/a", qos=2)
        assert take(peer).qos == 1
        nothing_waits(peer)


def test_each_refused_filter_has_its_code_and_the_others_are_granted(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-3.8.4-5, 3.9.3-1, 3.9.3-2; MQTT5-3.8.4-7, 3.9.3-1, 3.9.3-2, 3.9.2-1, 3.9.2-2."""
    app = server.create_app(name)
    token = register(server, app, "phone")
    no = Reason.NOT_AUTHORIZED if version == 5 else Reason.UNSPECIFIED_ERROR
    with device(server, "phone", app=app, password=token, version=version) as peer:
        suback = subscribe(peer, "a", "push", "#", "b/+", "push")
        assert suback == Suback(7, (no, Reason.GRANTED_QOS_1, no, no, Reason.GRANTED_QOS_1))


# UNSUBSCRIBE


def test_unsubscribe_takes_exactly_the_filters_it_names(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.10.4-1, 3.10.4-5, 3.10.4-6;
    MQTT5-3.10.4-1, 3.10.4-5, 3.10.4-6, 3.11.2-1, 3.11.2-2, 3.11.3-1, 3.11.3-2."""
    there, gone = Reason.SUCCESS, Reason.NO_SUBSCRIPTION_EXISTED
    with short(server, name, version=version) as peer:
        subscribe(peer, f"{name}/+", f"{name}/a", f"{name}/b")
        answer = unsubscribe(
            peer, f"{name}/#", f"{name}/a", f"{name}/A", f"{name}/a/", f"{name}/b", f"{name}/b"
        )
        assert answer == Unsuback(8, (gone, there, gone, gone, there, gone) if version == 5 else ())
        publish_to_self(peer, f"{name}/a")  # through the `+`, which was not named
        assert unsubscribe(peer, f"{name}/+") == Unsuback(8, (there,) if version == 5 else ())
        peer.send(Publish(f"{name}/a", b"x"))
        nothing_waits(peer)
        assert unsubscribe(peer, "nothing") == Unsuback(8, (gone,) if version == 5 else ())


def publish_to_self(peer: Peer, topic: str) -> None:
    peer.send(Publish(topic, b"x"))
    assert take(peer).topic == topic
    nothing_waits(peer)


@pytest.mark.parametrize("qos", [1, 2])
def test_after_unsubscribe_nothing_new_comes_and_what_has_begun_is_completed(
    server: LocalServer, name: str, version: int, qos: int
) -> None:
    """MQTT311-3.10.4-2, 3.10.4-3; MQTT5-3.10.4-2, 3.10.4-3: also on the next connection."""
    with short(server, f"{name}p") as sender:
        with device(server, name, version=version) as peer:
            subscribe(peer, name)
            publish(sender, name, b"begun", qos)
            begun = peer.expect(Publish)
            unsubscribe(peer, name)
            publish(sender, name, b"later", qos)
            nothing_waits(peer)
            leave(peer)
        publish(sender, name, b"later", qos)
        with device(server, name, version=version) as peer:
            again = peer.expect(Publish)
            assert (again.payload, again.packet_id, again.dup) == (b"begun", begun.packet_id, True)
            if qos == 1:
                peer.send(Puback(again.packet_id))
            else:
                peer.send(Pubrec(again.packet_id))
                peer.send(Pubcomp(peer.expect(Pubrel).packet_id))
            nothing_waits(peer)


def test_a_qos_2_message_goes_on_after_unsubscribe(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.10.4-3, MQTT5-3.10.4-3."""
    with short(server, f"{name}p") as sender, short(server, name, version=version) as peer:
        subscribe(peer, name)
        publish(sender, name, qos=2)
        packet_id = peer.expect(Publish).packet_id
        peer.send(Unsubscribe(8, (name,)), Pubrec(packet_id))
        assert {type(peer.receive()), type(peer.receive())} == {Unsuback, Pubrel}
        peer.send(Pubcomp(packet_id))
        nothing_waits(peer)
