import pytest

from gateway.mqtt import MAX_TOPIC_BYTES, split_share, valid_filter, valid_topic_name

NAMES = [
    ("a", True),
    ("/", True),  # two empty levels
    ("a//b/", True),
    ("$SYS/x", True),
    ("$share/g/t", True),  # a topic name; only a filter reads it otherwise
    (" ", True),
    ("\ufeff\x01é🙂", True),
    ("x" * MAX_TOPIC_BYTES, True),
    ("é" * (MAX_TOPIC_BYTES // 2), True),
    ("", False),  # MQTT5-4.7.3-1
    ("a+", False),  # MQTT5-3.3.2-2
    ("#", False),
    ("a\0", False),  # MQTT5-4.7.3-2
    ("\ud800", False),
    ("x" * (MAX_TOPIC_BYTES + 1), False),  # MQTT5-4.7.3-3
    ("é" * (MAX_TOPIC_BYTES // 2 + 1), False),
]
FILTERS = [
    ("a", True),
    ("#", True),
    ("+", True),
    ("/", True),
    ("/+", True),
    ("+/+/#", True),
    ("a/#", True),
    ("+/tennis/#", True),
    ("sport/+/player1", True),
    ("$SYS/#", True),
    ("$share", True),  # one level like another
    ("$shares/+/x", True),
    ("", False),  # MQTT5-4.7.3-1
    ("#/", False),  # MQTT5-4.7.1-1
    ("#/a", False),
    ("a#", False),
    ("a/b#", False),
    ("##", False),
    ("a/#b", False),
    ("a+", False),  # MQTT5-4.7.1-2
    ("+a/b", False),
    ("++", False),
    ("a\0", False),
    ("+/\ud800", False),
    ("+/" + "x" * MAX_TOPIC_BYTES, False),
    ("$share/", False),  # MQTT5-4.8.2-1
    ("$share/g", False),  # MQTT5-4.8.2-2
    ("$share/g/", False),
    ("$share//t", False),
    ("$share/+/t", False),
    ("$share/g#/t", False),
    ("$share/g/a#", False),
    ("$share/g/\0", False),
    ("$share/g/t", True),
    ("$share/g//", True),
    ("$share/g/+/#", True),
]
SHARES = [
    ("$share/g/t", ("g", "t")),
    ("$share/g//t/#", ("g", "/t/#")),
    ("$share/g/$share/h/t", ("g", "$share/h/t")),
    ("$share/g", None),
    ("$share//t", None),
    ("$share/g/a#", None),
    ("share/g/t", None),
    ("t", None),
]


@pytest.mark.parametrize(("topic", "valid"), NAMES)
def test_topic_name(topic, valid):
    assert valid_topic_name(topic) is valid


@pytest.mark.parametrize(("topic_filter", "valid"), FILTERS)
def test_topic_filter(topic_filter, valid):
    assert valid_filter(topic_filter) is valid


@pytest.mark.parametrize(("topic_filter", "share"), SHARES)
def test_share(topic_filter, share):
    assert split_share(topic_filter) == share
