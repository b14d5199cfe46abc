"""PUBLISH (3.3): retained messages, topic names, properties, topic aliases, overlapping subscriptions."""

from __future__ import annotations

from typing import Any

import pytest

from clients.local_server import LocalServer
from gateway.mqtt import (
    Pingreq,
    Puback,
    Publish,
    Pubrec,
    Reason,
    Subscription,
    encode,
)
from tests.conftest import StartServer
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
from tests.gateway.peer import let_pass

HOUR, DAY = 3600, 86_400  # seconds: no machine stands still for the one, no message of the other expires

EVERYTHING: Any = {
    "payload_format_indicator": 1,
    "content_type": "text/plain; charset=\ufeffutf-8",
    "response_topic": "answer/here//",
    "correlation_data": b"\0\xff\0",
    "user_properties": (("b", "1"), ("a", "2"), ("b", "1"), ("", ""), ("a", "é")),
}


# Retained messages


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_retained_message_goes_to_new_subscribers_with_its_qos_and_the_flag(
    server: LocalServer, name: str, version: int, qos: int
) -> None:
    """MQTT311-3.3.1-5, 3.3.1-6, 3.3.1-8; MQTT5-3.3.1-5, 3.3.1-9. One for each topic that matches."""
    with short(server, name, version=version) as peer:
        for topic in ("a", "b", "other/c"):
            publish(peer, f"{name}/{topic}", topic.encode(), qos, retain=True)
        subscribe(peer, f"{name}/+")
        got = take_all(peer, 2)
        nothing_waits(peer)
    assert sorted(packet.payload for packet in got) == [b"a", b"b"]
    assert {(packet.qos, packet.retain, packet.dup) for packet in got} == {(qos, True, False)}


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_newer_retained_message_replaces_the_older(
    server: LocalServer, name: str, version: int, qos: int
) -> None:
    """MQTT311-3.3.1-5, 3.3.1-7; MQTT5-3.3.1-5."""
    with short(server, name, version=version) as peer:
        publish(peer, name, b"old", 1, retain=True)
        publish(peer, name, b"new", qos, retain=True)
        subscribe(peer, name)
        message = take(peer)
        assert (message.payload, message.qos) == (b"new", qos)
        nothing_waits(peer)


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_an_empty_retained_message_is_passed_on_and_removes_the_older(
    server: LocalServer, name: str, version: int, qos: int
) -> None:
    """MQTT311-3.3.1-10, 3.3.1-11; MQTT5-3.3.1-6, 3.3.1-7."""
    with short(server, f"{name}s", version=version) as listener, short(server, name, version=version) as peer:
        publish(peer, name, b"old", 1, retain=True)
        subscribe(listener, name)
        take(listener)
        publish(peer, name, b"", qos, retain=True)
        message = take(listener)
        assert (message.payload, message.qos, message.retain) == (b"", qos, False)
        subscribe(peer, name)
        nothing_waits(peer)
        publish(peer, f"{name}/never-set", b"", qos, retain=True)
        subscribe(peer, f"{name}/never-set")
        nothing_waits(peer)


def test_a_message_without_the_flag_changes_nothing_that_is_retained(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-3.3.1-12, MQTT5-3.3.1-8."""
    with short(server, name, version=version) as peer:
        publish(peer, f"{name}/a", b"kept", retain=True)
        publish(peer, f"{name}/a", b"passing")
        publish(peer, f"{name}/a", b"")
        publish(peer, f"{name}/b", b"passing")
        subscribe(peer, f"{name}/#")
        assert take(peer).payload == b"kept"
        nothing_waits(peer)


def test_who_is_subscribed_already_gets_it_without_the_flag(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-3.3.1-9, MQTT5-3.3.1-12: now, and after an absence."""
    with short(server, f"{name}p", version=version) as sender:
        with device(server, name, version=version) as peer:
            subscribe(peer, f"{name}/#")
            publish(sender, f"{name}/a", retain=True)
            assert not take(peer).retain
            leave(peer)
        publish(sender, f"{name}/b", retain=True)
        with device(server, name, version=version) as peer:
            message = take(peer)
            assert (message.topic, message.retain) == (f"{name}/b", False)


def test_retain_as_published_keeps_the_flag_as_it_was(server: LocalServer, name: str) -> None:
    """MQTT5-3.3.1-12, 3.3.1-13."""
    with short(server, f"{name}p") as sender, short(server, name) as peer:
        subscribe(peer, Subscription(f"{name}/as-is", 1, retain_as_published=True), f"{name}/plain")
        for topic in ("as-is", "plain"):
            for retain in (True, False):
                publish(sender, f"{name}/{topic}", retain=retain)
        assert [take(peer).retain for _ in range(4)] == [True, False, False, False]


def test_retain_handling_says_when_retained_messages_are_sent(server: LocalServer, name: str) -> None:
    """MQTT5-3.3.1-9, 3.3.1-10, 3.3.1-11: on a first SUBSCRIBE, and when it is repeated."""
    with short(server, name) as peer:
        publish(peer, name, retain=True)
        for handling, first, again in ((0, 1, 1), (1, 1, 0), (2, 0, 0)):
            for expected in (first, again):
                subscribe(peer, Subscription(name, 1, retain_handling=handling))
                for _ in range(expected):
                    assert take(peer).retain
                nothing_waits(peer)
            unsubscribe(peer, name)


# Topic names


@pytest.mark.parametrize("topic", ["#", "+", "a/#", "a/+/b", "a#", "a+"])
def test_a_topic_name_has_no_wildcard(server: LocalServer, name: str, version: int, topic: str) -> None:
    """MQTT311-3.3.2-2, 4.7.1-1; MQTT5-3.3.2-2, 4.7.0-1."""
    raw = encode(Publish("@" * len(topic), b"x"), version).replace(b"@" * len(topic), topic.encode())
    with short(server, name, version=version) as peer:
        peer.send(raw, Pingreq())
        ended(peer, Reason.TOPIC_NAME_INVALID)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param({4: "30 00", 5: "30 00"}, Reason.MALFORMED_PACKET, id="nothing"),
        pytest.param({4: "30 03 0005 61", 5: "30 03 0005 61"}, Reason.MALFORMED_PACKET, id="over the end"),
        pytest.param({4: "30 02 0000", 5: "30 03 0000 00"}, Reason.PROTOCOL_ERROR, id="empty"),
    ],
)
def test_a_publish_begins_with_a_topic_name(
    server: LocalServer, name: str, version: int, raw: dict[int, str], reason: Reason
) -> None:
    """MQTT311-3.3.2-1, 4.7.3-1; MQTT5-3.3.2-1, 4.7.3-1."""
    with short(server, name, version=version) as peer:
        peer.send(bytes.fromhex(raw[version]), Pingreq())
        ended(peer, reason)


def test_what_arrives_has_the_topic_it_was_published_on(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-3.3.2-3, 4.5.0-1; MQTT5-3.3.2-3, 4.5.0-1: not the filter, and nothing that does not match."""
    with short(server, name, version=version) as peer:
        subscribe(peer, f"{name}/+/z", qos=0)
        topics = [f"{name}/{middle}/z" for middle in ("", "x", "é", " ")]
        for topic in (f"{name}/z", f"{name}/x/z/", *topics, f"{name}/x/y"):
            peer.send(Publish(topic, b"x"))
        assert [peer.expect(Publish).topic for _ in topics] == topics
        nothing_waits(peer)


# Properties


def test_what_the_publisher_says_of_its_message_reaches_subscribers_unaltered(
    server: LocalServer, name: str
) -> None:
    """MQTT5-3.3.2-4, -15, -16, -17, -18, -20: live, retained, and after an absence."""
    with short(server, f"{name}p") as sender:
        with device(server, name) as peer:
            subscribe(peer, f"{name}/x")
            publish(sender, f"{name}/x", properties=EVERYTHING)
            assert take(peer).properties == EVERYTHING
            leave(peer)
        publish(sender, f"{name}/x", qos=2, retain=True, properties=EVERYTHING)
        with device(server, name) as peer:
            assert take(peer).properties == EVERYTHING
            subscribe(peer, f"{name}/x")
            assert take(peer).properties == EVERYTHING


def test_the_versions_meet(server: LocalServer, name: str) -> None:
    """What 3.1.1 has no place for is left out; what it did not say is not made up."""
    with short(server, f"{name}4", version=4) as old, short(server, f"{name}5") as new:
        subscribe(old, f"{name}/5")
        subscribe(new, f"{name}/4")
        publish(new, f"{name}/5", b"a", 2, properties=EVERYTHING)
        assert take(old).payload == b"a"
        publish(old, f"{name}/4", b"b", 2)
        assert take(new) == Publish(f"{name}/4", b"b", 2, packet_id=1)


@pytest.mark.parametrize("topic", ["a/#", "+", ""])
def test_a_response_topic_is_a_topic_name(server: LocalServer, name: str, topic: str) -> None:
    """MQTT5-3.3.2-14."""
    raw = encode(Publish("t", b"x", properties={"response_topic": "@" * 3}), 5)
    size = len(raw) - 3 + len(topic)
    raw = bytes((raw[0], size - 2)) + raw[2:5] + bytes((raw[5] - 3 + len(topic), raw[6], 0, len(topic)))
    with short(server, name) as peer:
        peer.send(raw + topic.encode() + b"x", Pingreq())
        ended(peer, Reason.TOPIC_NAME_INVALID)


def test_a_message_that_waited_too_long_is_not_sent_and_the_others_tell_what_is_left(
    server: LocalServer, name: str
) -> None:
    """MQTT5-3.3.2-5, 3.3.2-6: to who was away, and to new subscribers of what is retained."""
    long: Any = {"message_expiry_interval": DAY}
    with short(server, f"{name}p") as sender:
        with device(server, name) as peer:
            subscribe(peer, f"{name}/away")
            publish(sender, f"{name}/away", b"live", properties=long)
            assert DAY - HOUR < take(peer).properties["message_expiry_interval"] <= DAY
            leave(peer)
        for topic in ("away", "kept"):
            publish(sender, f"{name}/{topic}", b"long", properties=long, retain=topic == "kept")
        publish(sender, f"{name}/away", b"short", properties={"message_expiry_interval": 1})
        publish(sender, f"{name}/soon", b"short", properties={"message_expiry_interval": 1}, retain=True)
        let_pass(server, 2.0)
        with device(server, name) as peer:
            message = take(peer)
            assert message.payload == b"long"
            assert DAY - HOUR < message.properties["message_expiry_interval"] <= DAY - 2
            nothing_waits(peer)
            subscribe(peer, f"{name}/kept", f"{name}/soon")
            message = take(peer)
            assert message.payload == b"long"
            assert DAY - HOUR < message.properties["message_expiry_interval"] <= DAY - 2
            nothing_waits(peer)


def test_a_payload_that_is_not_the_text_it_says_is_refused(server: LocalServer, name: str) -> None:
    """3.3.2.3.2: a receiver may check it, and answers 0x99."""
    text: Any = {"payload_format_indicator": 1}
    with short(server, f"{name}s") as listener, short(server, name) as peer:
        subscribe(listener, name)
        peer.send(Publish(name, b"\xff\xfe", 1, packet_id=1, properties=text))
        assert peer.expect(Puback).reason is Reason.PAYLOAD_FORMAT_INVALID
        peer.send(Publish(name, b"\xff\xfe", 2, packet_id=2, properties=text))
        assert peer.expect(Pubrec).reason is Reason.PAYLOAD_FORMAT_INVALID
        publish(peer, name, "größer".encode(), properties=text)
        publish(peer, name, b"\xff\xfe", properties={"payload_format_indicator": 0})
        assert [take(listener).payload for _ in range(2)] == ["größer".encode(), b"\xff\xfe"]


def test_a_client_sends_no_subscription_identifier(server: LocalServer, name: str) -> None:
    """MQTT5-3.3.4-6."""
    with short(server, name) as peer:
        peer.send(Publish(name, b"x", properties={"subscription_identifiers": (1,)}), Pingreq())
        ended(peer, Reason.PROTOCOL_ERROR)


# Topic aliases


def test_every_topic_alias_that_was_offered_works(server: LocalServer, name: str) -> None:
    """MQTT5-3.3.2-12: and an alias may get another topic."""
    with short(server, f"{name}s") as listener, opened(server, name) as (peer, connack):
        subscribe(listener, f"{name}/#", qos=0)
        offered = range(1, connack.properties["topic_alias_maximum"] + 1)
        for turn in (b"one", b"two"):
            for alias in offered:
                topic = f"{name}/{turn.decode()}/{alias}"
                peer.send(Publish(topic, b"set", properties={"topic_alias": alias}))
            for alias in offered:
                peer.send(Publish("", turn, properties={"topic_alias": alias}))
            topics = [f"{name}/{turn.decode()}/{alias}" for alias in offered]
            assert [listener.expect(Publish).topic for _ in range(2 * len(offered))] == topics * 2


@pytest.mark.parametrize("alias", [0, 17, 65_535])
def test_a_topic_alias_that_was_not_offered_ends_the_connection(
    server: LocalServer, name: str, alias: int
) -> None:
    """MQTT5-3.2.2-17, 3.3.2-8, 3.3.2-9."""
    raw = encode(Publish(name, b"x", properties={"topic_alias": 0x0101}), 5)
    with short(server, name) as peer:
        peer.send(raw.replace(b"\x23\x01\x01", b"\x23" + alias.to_bytes(2)), Pingreq())
        ended(peer, Reason.TOPIC_ALIAS_INVALID)


def test_where_no_topic_alias_is_offered_any_ends_the_connection(start_server: StartServer) -> None:
    """MQTT5-3.2.2-18."""
    server = start_server("--mqtt-topic-alias-maximum", "0")
    with opened(server, "c") as (peer, connack):
        assert connack.properties.get("topic_alias_maximum", 0) == 0
        peer.send(Publish("t", b"x", properties={"topic_alias": 1}), Pingreq())
        ended(peer, Reason.TOPIC_ALIAS_INVALID)


def test_a_topic_alias_does_not_outlive_its_connection(server: LocalServer, name: str) -> None:
    """MQTT5-3.3.2-7."""
    with device(server, name) as peer:
        peer.send(Publish(name, b"x", properties={"topic_alias": 1}))
        nothing_waits(peer)
    with device(server, name) as peer:
        peer.send(Publish("", b"x", properties={"topic_alias": 1}), Pingreq())
        ended(peer, Reason.PROTOCOL_ERROR)


def test_a_topic_alias_of_the_publisher_is_not_passed_on(server: LocalServer, name: str) -> None:
    """MQTT5-3.1.2-27, 3.3.2-7, 3.3.2-11: a subscriber that offers none gets none."""
    with short(server, f"{name}p") as sender, short(server, name) as peer:
        subscribe(peer, f"{name}/#")
        for _ in range(3):
            publish(sender, f"{name}/x", properties={"topic_alias": 1})
        for _ in range(3):
            message = take(peer)
            assert (message.topic, "topic_alias" in message.properties) == (f"{name}/x", False)


def resolved(packets: list[Publish], most: int) -> list[str]:
    """The topics of messages that may use aliases up to `most`."""
    known: dict[int, str] = {}
    topics = []
    for packet in packets:
        alias = packet.properties.get("topic_alias", 0)
        assert 0 <= alias <= most
        if packet.topic and alias:
            known[alias] = packet.topic
        topics.append(packet.topic or known[alias])
    return topics


def test_the_server_uses_no_topic_alias_over_the_clients_maximum(server: LocalServer, name: str) -> None:
    """MQTT5-3.1.2-26, 3.3.2-11."""
    topics = [f"{name}/{i % 4}/{'long' * 20}" for i in range(16)]
    with (
        short(server, f"{name}p") as sender,
        short(server, name, properties={"topic_alias_maximum": 2}) as peer,
    ):
        subscribe(peer, f"{name}/#")
        for topic in topics:
            publish(sender, topic)
        assert resolved([take(peer) for _ in topics], most=2) == topics


def test_the_server_uses_topic_aliases_where_they_are_offered(server: LocalServer, name: str) -> None:
    """MQTT5-3.3.2-7: a name that comes again is left out, and sent anew on the next connection."""
    topics = [f"{name}/{'long' * 20}"] * 4
    limits: Any = {"topic_alias_maximum": 10}
    with short(server, f"{name}p") as sender, device(server, name, properties=limits) as peer:
        subscribe(peer, f"{name}/#")
        for topic in topics:
            publish(sender, topic)
        packets = [take(peer) for _ in topics]
        assert resolved(packets, most=10) == topics
        assert packets[-1].topic == ""
        leave(peer)
        publish(sender, topics[0])
    with device(server, name, properties=limits) as peer:
        assert take(peer).topic == topics[0]


# Overlapping subscriptions


def test_overlapping_subscriptions_get_one_copy_with_the_best_qos(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-3.3.5-1, MQTT5-3.3.4-2."""
    with short(server, f"{name}p") as sender, short(server, name, version=version) as peer:
        subscribe(
            peer, Subscription(f"{name}/#", 0), Subscription(f"{name}/x", 2), Subscription(f"{name}/+", 1)
        )
        for qos in (2, 1, 0):
            publish(sender, f"{name}/x", qos=qos)
            assert take(peer).qos == qos
            nothing_waits(peer)


def test_a_message_names_the_subscription_identifiers_of_all_that_match(
    server: LocalServer, name: str
) -> None:
    """MQTT5-3.3.4-3, 3.3.4-4: in one copy, live and after an absence."""
    with short(server, f"{name}p") as sender:
        with device(server, name) as peer:
            for topic_filter, identifier in ((f"{name}/#", 268_435_455), (f"{name}/x", 1), (f"{name}/+", 0)):
                subscribe(peer, topic_filter, identifier=identifier)
            publish(sender, f"{name}/x")
            assert sorted(take(peer).properties["subscription_identifiers"]) == [1, 268_435_455]
            publish(sender, f"{name}/y")
            assert take(peer).properties["subscription_identifiers"] == (268_435_455,)
            leave(peer)
        publish(sender, f"{name}/x")
        with device(server, name) as peer:
            assert sorted(take(peer).properties["subscription_identifiers"]) == [1, 268_435_455]
            nothing_waits(peer)
