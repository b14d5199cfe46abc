from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.mailbox import Mailbox, MailboxLimits
from gateway.messages import TopicMessage
from gateway.mqtt import Subscription, valid_filter
from gateway.topics import LOOK, RetainedMessages, SubscriptionIndex

MATCHES = [  # filter, topic, matches (MQTT5-4.7.1 and its examples)
    ("sport/tennis/player1/#", "sport/tennis/player1", True),
    ("sport/tennis/player1/#", "sport/tennis/player1/ranking", True),
    ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
    ("sport/#", "sport", True),
    ("#", "a", True),
    ("#", "/", True),
    ("sport/tennis/+", "sport/tennis/player1", True),
    ("sport/tennis/+", "sport/tennis/player1/ranking", False),
    ("sport/+", "sport", False),
    ("sport/+", "sport/", True),
    ("+/+", "/finance", True),
    ("/+", "/finance", True),
    ("+", "/finance", False),
    ("+", "finance", True),
    ("a/b", "a/b", True),
    ("a/b", "a/b/c", False),
    ("a/b", "a/B", False),
    ("#", "$SYS/uptime", False),
    ("+/monitor/Clients", "$SYS/monitor/Clients", False),
    ("$SYS/#", "$SYS/uptime", True),
    ("$SYS/monitor/+", "$SYS/monitor/Clients", True),
    ("+/#", "a", True),
    ("+/+/#", "a", False),
    ("a//b", "a//b", True),
    ("a/+/b", "a//b", True),
]


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox(MailboxLimits())


@pytest.mark.parametrize(("topic_filter", "topic", "expected"), MATCHES)
def test_filters_meet_topics(topic_filter: str, topic: str, expected: bool, mailbox: Mailbox) -> None:
    index = SubscriptionIndex()
    index.add((Subscription(topic_filter), 0), mailbox)
    assert (mailbox in index.match(topic).members) is expected


@pytest.mark.parametrize(("topic_filter", "topic", "expected"), MATCHES)
def test_retained_messages_meet_filters_the_same_way(topic_filter: str, topic: str, expected: bool) -> None:
    retained = RetainedMessages(10, 1000)
    assert retained.set(TopicMessage(topic, b"x", 0))
    assert bool(list(retained.match(topic_filter))) is expected


words = st.sampled_from(["a", "b", "", "$x"])
topics = st.lists(words, min_size=1, max_size=4).map("/".join).filter(bool)
filters = (
    st.lists(st.sampled_from(["a", "b", "", "$x", "+", "#"]), min_size=1, max_size=4)
    .map("/".join)
    .filter(valid_filter)
)


def naive_match(topic_filter: str, topic: str) -> bool:
    wanted, given_ = topic_filter.split("/"), topic.split("/")
    if topic.startswith("$") and wanted[0] in "+#":
        return False
    for i, word in enumerate(wanted):
        if word == "#":
            return True
        if i >= len(given_) or (word not in ("+", given_[i])):
            return False
    return len(wanted) == len(given_)


def test_naive_model_knows_the_rows() -> None:
    for topic_filter, topic, expected in MATCHES:
        if not topic_filter.endswith("/#"):
            assert naive_match(topic_filter, topic) is expected


@given(st.lists(filters, max_size=8), topics)
def test_index_agrees_with_the_definition(all_filters: list[str], topic: str) -> None:
    index = SubscriptionIndex()
    boxes = {topic_filter: Mailbox(MailboxLimits()) for topic_filter in all_filters}
    for topic_filter, box in boxes.items():
        index.add((Subscription(topic_filter), 0), box)
    expected = {
        box
        for topic_filter, box in boxes.items()
        if naive_match(topic_filter, topic)
        or (topic_filter.endswith("/#") and naive_match(topic_filter[:-2], topic))
    }
    found = index.match(topic)
    assert {*found.members, *found.several} == expected
    assert not {*found.members} & {*found.several}
    for topic_filter, box in boxes.items():
        assert index.remove(topic_filter, box)
    assert index.count == 0
    assert index.match(topic).members == {}
    assert index._trie.root.children is None  # no level left behind


@given(st.lists(topics, max_size=8), filters)
def test_retained_agrees_with_the_definition(names: list[str], topic_filter: str) -> None:
    retained = RetainedMessages(100, 10_000)
    for name in names:
        retained.set(TopicMessage(name, b"x", 0))
    expected = {
        name
        for name in names
        if naive_match(topic_filter, name)
        or (topic_filter.endswith("/#") and naive_match(topic_filter[:-2], name))
    }
    assert {message.topic for message in retained.match(topic_filter) if message} == expected
    for name in names:
        retained.set(TopicMessage(name, b"", 0))
    assert (retained.count, retained.bytes) == (0, 0)
    assert retained._trie.root.children is None


def test_one_subscriber_with_two_matching_filters_is_found_once_with_both(mailbox: Mailbox) -> None:
    index = SubscriptionIndex()
    index.add((Subscription("a/#", qos=0), 1), mailbox)
    index.add((Subscription("a/b", qos=1), 2), mailbox)
    assert sorted(identifier for _, identifier in index.match("a/b").several[mailbox]) == [1, 2]


def test_resubscribing_replaces_options_and_counts_once(mailbox: Mailbox) -> None:
    index = SubscriptionIndex()
    index.add((Subscription("a", qos=0), 0), mailbox)
    index.add((Subscription("a", qos=1), 0), mailbox)
    assert index.count == 1
    assert index.match("a").members[mailbox][0].qos == 1


def test_a_topic_of_sixty_thousand_levels_is_walked_without_recursion(mailbox: Mailbox) -> None:
    deep = "/" * 60_000
    index, retained = SubscriptionIndex(), RetainedMessages(10, 100_000_000)
    index.add((Subscription(deep), 0), mailbox)
    assert mailbox in index.match(deep).members
    assert index.remove(deep, mailbox)
    assert retained.set(TopicMessage(deep, b"x", 0))
    assert len([found for found in retained.match("#") if found]) == 1


def test_retained_messages_are_bounded_and_replacing_is_always_possible() -> None:
    retained = RetainedMessages(max_count=2, max_bytes=300)
    assert retained.set(TopicMessage("a", b"1", 0))
    assert retained.set(TopicMessage("b", b"1", 0))
    assert not retained.set(TopicMessage("c", b"1", 0))
    assert retained.set(TopicMessage("a", b"2", 0))
    assert not retained.set(TopicMessage("a", b"x" * 200, 0))
    assert [message.payload for message in retained.match("a") if message] == [b"2"]


def test_a_search_among_retained_messages_pauses_when_it_finds_nothing() -> None:
    retained = RetainedMessages(1000, 1_000_000)
    for i in range(1000):
        retained.set(TopicMessage(f"a/{i}", b"x", 0))
    found = list(retained.match("+/+/b"))
    assert set(found) == {None}
    assert len(found) == 1001 // LOOK
