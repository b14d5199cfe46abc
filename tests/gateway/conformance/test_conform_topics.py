"""Topic names and filters (4.7) as a server takes them."""

from __future__ import annotations

import pytest

from clients.local_server import LocalServer
from gateway.mqtt import Pingreq, Publish, Reason, Subscribe, Subscription, Unsubscribe, encode
from tests.gateway.conformance.talk import (
    ended,
    nothing_waits,
    publish,
    short,
    subscribe,
    take,
    take_all,
    unsubscribe,
)
from tests.gateway.peer import publisher

# Below a first level of the test's own: topic -> the filters that it meets, of all that are named here.
MEETS = {
    "sport": ["#", "+", "sport/#", "sport"],
    "sport/": ["#", "+/+", "sport/#", "sport/+", "sport/"],
    "sport/tennis": ["#", "+/+", "sport/#", "sport/+", "+/tennis"],
    "sport/tennis/player1": ["#", "sport/#", "sport/+/player1", "+/+/player1"],
    "sport/tennis/player1/ranking": ["#", "sport/#"],
    "/finance": ["#", "+/+", "/+", "/finance"],
    "": ["#", "+"],
    "/": ["#", "+/+", "/+"],
    "//": ["#"],
}
FILTERS = sorted({topic_filter for filters in MEETS.values() for topic_filter in filters})


def test_filters_meet_the_topics_of_the_specifications_examples(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-3.3.2-3, 4.7.1-2, 4.7.1-3; MQTT5-3.3.2-3, 4.7.1-1, 4.7.1-2. Live and retained."""
    with short(server, f"{name}p") as sender, short(server, name, version=version) as peer:
        for topic in MEETS:
            publish(sender, f"{name}/{topic}", retain=True)
        for topic_filter in FILTERS:
            subscribe(peer, f"{name}/{topic_filter}")
            expected = sorted(f"{name}/{topic}" for topic in MEETS if topic_filter in MEETS[topic])
            assert sorted(p.topic for p in take_all(peer, len(expected))) == expected, topic_filter
            nothing_waits(peer)
            sender.send(*[Publish(f"{name}/{topic}", b"x") for topic in MEETS])
            nothing_waits(sender)
            assert sorted(p.topic for p in take_all(peer, len(expected))) == expected, topic_filter
            unsubscribe(peer, f"{name}/{topic_filter}")
            nothing_waits(peer)


@pytest.mark.parametrize("bad", ["a#", "#/a", "a/#/b", "a/b#", "##", "a+", "+a", "a/+b/c", "++", "a/b+/c"])
def test_a_filter_with_a_wildcard_out_of_place_ends_the_connection(
    server: LocalServer, name: str, version: int, bad: str
) -> None:
    """MQTT311-4.7.1-2, 4.7.1-3; MQTT5-4.7.1-1, 4.7.1-2: in SUBSCRIBE and in UNSUBSCRIBE."""
    for packet in (Subscribe(1, (Subscription("@" * len(bad)),)), Unsubscribe(1, ("@" * len(bad),))):
        with short(server, name, version=version) as peer:
            peer.send(encode(packet, version).replace(b"@" * len(bad), bad.encode()), Pingreq())
            ended(peer, Reason.TOPIC_FILTER_INVALID)


def test_a_leading_wildcard_does_not_meet_a_leading_dollar(
    server: LocalServer, name: str, version: int
) -> None:
    """MQTT311-4.7.2-1, MQTT5-4.7.2-1: live and retained; deeper down `$` is a character like another."""
    app = server.create_app(name)  # nobody else's topics
    with publisher(server, name, app=app, version=version, clean=True) as peer:
        for topic in ("$a/x", "b/$x"):
            publish(peer, topic, retain=True)
        for topic_filter, topics in (
            ("#", {"b/$x"}),
            ("+/#", {"b/$x"}),
            ("+/x", set()),
            ("+/$x", {"b/$x"}),
            ("b/+", {"b/$x"}),
            ("$a/+", {"$a/x"}),
            ("$a/#", {"$a/x"}),
        ):
            subscribe(peer, topic_filter)
            assert {packet.topic for packet in take_all(peer, len(topics))} == topics
            peer.send(Publish("$a/x", b"x"), Publish("b/$x", b"x"))
            assert {packet.topic for packet in take_all(peer, len(topics))} == topics
            nothing_waits(peer)
            unsubscribe(peer, topic_filter)


def test_names_are_compared_as_they_are(server: LocalServer, name: str, version: int) -> None:
    """MQTT311-4.7.3-4, MQTT5-4.7.3-4: no case, form or space is evened out."""
    topics = [
        "é",
        "e\u0301",
        "E\u0301",
        "x",
        "X",
        "x ",
        " x",
        "/x",
        "x/",
        "x//",
        "\ufb01",
        "fi",
        "\u212b",
        "\u00c5",
        "ß",
        "ss",
    ]
    with short(server, name, version=version) as peer:
        for wanted in topics:
            subscribe(peer, Subscription(f"{name}/{wanted}", 0))
            peer.send(*[Publish(f"{name}/{topic}", b"x") for topic in topics])
            assert take(peer).topic == f"{name}/{wanted}"
            nothing_waits(peer)
            unsubscribe(peer, f"{name}/{wanted}")
