"""Delivery (4.3, 4.6; 3.4 to 3.7): each step of QoS 0, 1 and 2 in both directions, and the order of things."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

from clients.local_server import LocalServer
from gateway.mqtt import (
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Reason,
    encode,
)
from tests.gateway.conformance.talk import (
    device,
    leave,
    nothing_waits,
    publish,
    short,
    subscribe,
    take,
    take_all,
)
from tests.gateway.peer import let_pass, register


def test_each_qos_has_its_answer(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.3.4-1, 2.3.1-6, 4.3.2-2, 4.3.3-2; MQTT5-3.3.4-1, 2.2.1-5, 4.3.2-4, 4.3.3-8, 4.3.3-11."""
    with short(server, f"{name}s", version=version) as listener, short(server, name, version=version) as peer:
        subscribe(listener, name)
        peer.send(Publish(name, b"0"))
        nothing_waits(peer)
        peer.send(Publish(name, b"1", 1, packet_id=65_535))
        assert peer.receive() == Puback(65_535)
        peer.send(Publish(name, b"2", 2, packet_id=256))
        assert peer.receive() == Pubrec(256)
        peer.send(Pubrel(256))
        assert peer.receive() == Pubcomp(256)
        assert [take(listener).payload for _ in range(3)] == [b"0", b"1", b"2"]


def test_qos_0_leaves_without_dup(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.3.1-2, 4.3.1-1; MQTT5-3.3.1-2, 4.3.1-1."""
    with short(server, name, version=version) as peer:
        subscribe(peer, name, qos=0)
        peer.send(Publish(name, b"x", 1, dup=True, packet_id=1))
        packets = [peer.receive(), peer.receive()]
        [message] = [packet for packet in packets if isinstance(packet, Publish)]
        assert (message.qos, message.dup, message.packet_id) == (0, False, 0)


@pytest.mark.parametrize("qos", [1, 2])
def test_dup_of_the_publisher_is_not_passed_on(
    server: LocalServer, name: str, version: int, qos: int
) -> None:
    """MQTT311-3.3.1-3, 4.3.2-1, 4.3.3-1; MQTT5-3.3.1-3, 4.3.2-2, 4.3.3-2."""
    with short(server, f"{name}p") as sender, short(server, name, version=version) as peer:
        subscribe(peer, name)
        publish(sender, name, qos=qos, dup=True)
        message = take(peer)
        assert (message.qos, message.dup) == (qos, False)


def test_after_puback_the_packet_id_is_that_of_a_new_message(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-4.3.2-2, MQTT5-4.3.2-5: whatever DUP says."""
    with short(server, f"{name}s") as listener, short(server, name, version=version) as peer:
        subscribe(listener, name)
        for dup in (False, True, False):
            peer.send(Publish(name, b"x", 1, dup=dup, packet_id=5))
            assert peer.receive() == Puback(5)
            take(listener)


def test_qos_2_is_passed_on_once_until_it_is_released(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-4.3.3-2; MQTT5-4.3.3-10, 4.3.3-11, 4.3.3-12."""
    with short(server, f"{name}s") as listener, short(server, name, version=version) as peer:
        subscribe(listener, name)
        for payload in (b"one", b"two"):
            for dup in (False, True, False):
                peer.send(Publish(name, payload, 2, dup=dup, packet_id=5))
                assert peer.receive() == Pubrec(5)
            peer.send(Pubrel(5))
            assert peer.receive() == Pubcomp(5)
            assert take(listener).payload == payload
            nothing_waits(listener)


def test_qos_2_ids_are_remembered_across_connections(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-4.3.3-2, MQTT5-4.3.3-10."""
    with short(server, f"{name}s") as listener:
        subscribe(listener, name)
        with device(server, name, version=version) as peer:
            peer.send(Publish(name, b"x", 2, packet_id=5))
            peer.expect(Pubrec)
        with device(server, name, version=version) as peer:
            peer.send(Publish(name, b"x", 2, dup=True, packet_id=5), Pubrel(5))
            assert [peer.receive(), peer.receive()] == [Pubrec(5), Pubcomp(5)]
        take(listener)
        nothing_waits(listener)


def test_a_refused_qos_2_id_is_that_of_a_new_message(server: LocalServer, name: str) -> None:
    """MQTT5-4.3.3-9."""
    with short(server, name) as peer:
        peer.send(Publish("push", b"x", 2, packet_id=5))
        assert peer.expect(Pubrec).reason is Reason.NOT_AUTHORIZED
        subscribe(peer, name)
        peer.send(Publish(name, b"new", 2, packet_id=5))
        kinds = {type(packet) for packet in (peer.receive(), peer.receive())}
        assert kinds == {Pubrec, Publish}


def test_qos_2_to_a_subscriber_goes_step_by_step(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-2.3.1-6, 4.3.3-1; MQTT5-2.2.1-5, 4.3.3-2, 4.3.3-4, 4.3.3-5."""
    with short(server, f"{name}p") as sender, short(server, name, version=version) as peer:
        subscribe(peer, name)
        publish(sender, name, qos=2)
        message = peer.expect(Publish)
        assert (message.qos, message.dup) == (2, False)
        nothing_waits(peer)  # no PUBREL before PUBREC
        peer.send(Pubrec(message.packet_id))
        assert peer.receive() == Pubrel(message.packet_id)
        nothing_waits(peer)
        peer.send(Pubcomp(message.packet_id))
        nothing_waits(peer)


def test_pubrec_or_pubrel_of_nothing_is_told_so(server: LocalServer, name: str) -> None:
    """3.6.2.1, 3.7.2.1, and MQTT5-3.6.2-1 to -3, 3.7.2-1 to -3: a reason and nothing else."""
    with short(server, name) as peer:
        peer.send(Pubrec(5), Pubrel(6))
        assert peer.receive() == Pubrel(5, Reason.PACKET_IDENTIFIER_NOT_FOUND)
        assert peer.receive() == Pubcomp(6, Reason.PACKET_IDENTIFIER_NOT_FOUND)


def test_expiry_does_not_stop_what_has_begun(server: LocalServer, name: str) -> None:
    """MQTT5-4.3.3-7, 4.3.3-13."""
    expiry: Any = {"message_expiry_interval": 3}  # it leaves once its packet id is saved, and that in time
    with short(server, f"{name}p") as sender:
        with device(server, name) as peer:
            subscribe(peer, f"{name}/out")
            publish(sender, f"{name}/out", qos=2, properties=expiry)
            first = peer.expect(Publish)
            peer.send(Publish(f"{name}/in", b"x", 2, packet_id=5, properties=expiry))
            peer.expect(Pubrec)
            leave(peer)
        let_pass(server, 3.0)
        with device(server, name) as peer:
            again = peer.expect(Publish)
            assert (again.packet_id, again.dup, again.payload) == (first.packet_id, True, b"x")
            peer.send(Publish(f"{name}/in", b"x", 2, dup=True, packet_id=5, properties=expiry), Pubrel(5))
            assert [peer.receive(), peer.receive()] == [Pubrec(5), Pubcomp(5)]


# Order


def test_answers_leave_in_the_order_of_the_messages(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-4.6.0-2, 4.6.0-3, 4.6.0-4; MQTT5-4.6.0-2, -3, -4: PUBACK, PUBREC, PUBREL."""
    events = [
        Publish(f"event/{name}", orjson.dumps(i), 1 + i % 2, packet_id=i + 1) for i in range(20)
    ]  # each waits for the store
    with short(server, name, version=version) as peer:
        peer.send(*events)
        answers = [peer.receive() for _ in events]
        assert answers == [(Puback, Pubrec)[i % 2](i + 1) for i in range(20)]
        subscribe(peer, f"{name}/#")
        with short(server, f"{name}p") as sender:
            for i in range(6):
                publish(sender, f"{name}/{i}", qos=2)
        ids = [peer.expect(Publish).packet_id for _ in range(6)]
        order = [ids[i] for i in (3, 0, 5, 1, 2, 4)]
        peer.send(*[Pubrec(packet_id) for packet_id in order])
        assert [peer.receive() for _ in order] == [Pubrel(packet_id) for packet_id in order]


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_messages_of_a_topic_keep_the_order_of_their_publisher(
    server: LocalServer, name: str, version: int, qos: int
) -> None:
    """MQTT311-4.6.0-5, 4.6.0-6; MQTT5-4.6.0-5, 4.6.0-6: live and through a small window."""
    payloads = [b"%d" % i for i in range(60)]
    with (
        short(server, f"{name}p", version=version) as sender,
        short(server, name, version=version, properties={"receive_maximum": 3}) as peer,
    ):
        subscribe(peer, f"{name}/#")
        sender.send(
            *[Publish(f"{name}/x", p, qos, packet_id=i * (qos > 0)) for i, p in enumerate(payloads, 1)]
        )
        assert [packet.payload for packet in take_all(peer, len(payloads))] == payloads


@pytest.mark.parametrize("qos", [1, 2])
def test_messages_that_waited_keep_the_order_of_their_publisher(
    server: LocalServer, name: str, version: int, qos: int
) -> None:
    """MQTT311-4.6.0-6, MQTT5-4.6.0-5."""
    with device(server, name, version=version) as peer:
        subscribe(peer, f"{name}/#")
        leave(peer)
    payloads = [b"%d" % i for i in range(60)]
    with short(server, f"{name}p", version=version) as sender:
        for payload in payloads:
            publish(sender, f"{name}/x", payload, qos)
    with device(server, name, version=version) as peer:
        assert [packet.payload for packet in take_all(peer, len(payloads))] == payloads


def test_messages_in_flight_come_again_in_their_order(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-4.6.0-1, MQTT5-4.6.0-1: QoS 1 and 2 mixed, and before what has waited."""
    with short(server, f"{name}p") as sender:
        with device(server, name, version=version) as peer:
            subscribe(peer, f"{name}/#")
            for i in range(6):
                publish(sender, f"{name}/{i}", qos=1 + i % 2)
            first = [peer.expect(Publish) for _ in range(6)]
            leave(peer)
        publish(sender, f"{name}/later")
        with device(server, name, version=version) as peer:
            again = [peer.expect(Publish) for _ in range(7)]
    assert again[:6] == [replace(packet, dup=True) for packet in first]
    assert (again[6].topic, again[6].dup) == (f"{name}/later", False)


# What goes into an acknowledgement


@pytest.mark.parametrize("qos", [1, 2])
def test_an_acknowledgement_leaves_out_its_text_where_it_would_be_too_large(
    server: LocalServer, name: str, qos: int
) -> None:
    """MQTT5-3.4.2-2, 3.4.2-3, 3.5.2-2, 3.5.2-3."""
    limits: Any = {"maximum_packet_size": 24}
    with short(server, name, properties=limits) as peer:
        peer.send(Publish("receipt", b"not JSON", qos, packet_id=5))
        answer = peer.receive()
        assert isinstance(answer, Puback | Pubrec)
        assert answer.reason is Reason.PAYLOAD_FORMAT_INVALID
        assert len(encode(answer, 5)) <= 24


@pytest.mark.parametrize("qos", [1, 2])
def test_who_does_not_want_problem_information_gets_none(server: LocalServer, name: str, qos: int) -> None:
    """MQTT5-3.1.2-29."""
    quiet: Any = {"request_problem_information": 0}
    with short(server, name, properties=quiet) as peer:
        for topic, reason in (("receipt", Reason.PAYLOAD_FORMAT_INVALID), ("push", Reason.NOT_AUTHORIZED)):
            peer.send(Publish(topic, b"not JSON", qos, packet_id=5))
            assert peer.receive() == (Puback, Pubrec)[qos - 1](5, reason)


def test_who_does_not_want_problem_information_gets_no_user_properties_of_a_success(
    server: LocalServer, name: str
) -> None:
    """MQTT5-3.1.2-29: a publisher learns the msg_id of its push another way then."""
    register(server, server.app, name)
    body = {"platform": "all", "audience": {"registration_id": [name]}, "notification": {"alert": "x"}}
    quiet: Any = {"request_problem_information": 0}
    with short(server, f"{name}p", password=server.app.master_secret, properties=quiet) as backend:
        backend.send(Publish("push", orjson.dumps(body), 1, packet_id=5))
        assert backend.receive() == Puback(5)


def test_who_wants_problem_information_gets_it(server: LocalServer, name: str) -> None:
    """MQTT5-3.1.2-29: 1 is the default."""
    for properties in ({}, {"request_problem_information": 1}):
        with short(server, name, properties=properties) as peer:
            peer.send(Publish("receipt", b"not JSON", 1, packet_id=5))
            answer = peer.expect(Puback)
            assert answer.reason is Reason.PAYLOAD_FORMAT_INVALID
            assert answer.properties["reason_string"]
