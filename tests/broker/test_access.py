"""Access rules: against brute force over all topics of a small alphabet, and against names made to widen them."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import ApiError
from broker.model import AccessRule, App
from broker.tenants.access import (
    MAX_RULE_TOPIC,
    MAX_RULES,
    PLACEHOLDER,
    ROLES,
    Access,
    Role,
    covers,
    describe_rules,
    overlaps,
    parse_rules,
    split_filter,
)

FRESH = "z"  # a level that no filter names: it stands for all the others
LEVELS = ("", "a", "b", "$s", FRESH)
TOPICS = [
    "/".join(levels) for n in range(1, 5) for levels in itertools.product(LEVELS, repeat=n) if levels != ("",)
]

levels = st.lists(st.sampled_from(("", "a", "b", "$s", "+", "+")), min_size=1, max_size=3)
filters = st.builds(lambda body, end: "/".join([*body, *end]), levels, st.sampled_from([[], [], ["#"]]))
filters = (filters | st.just("#")).filter(bool)


def matches(topic_filter: str, topic: str) -> bool:
    """As MQTT 5, 4.7 says it: the slow way."""
    wanted, given_ = topic_filter.split("/"), topic.split("/")
    if topic[0:1] == "$" and wanted[0] in ("+", "#"):
        return False
    while wanted and given_:
        if wanted[0] == "#":
            return True
        if wanted.pop(0) not in ("+", given_[0]):
            return False
        given_.pop(0)
    return not given_ and wanted in ([], ["#"])


def app(*rules: AccessRule, is_open: bool = False) -> App:
    return App(1, "k", "n", "s", "d", b"", is_open, 0.0, access=rules)


def allow(action: str, topic: str, who: str = "devices") -> AccessRule:
    return AccessRule(True, action, topic, who)


def deny(action: str, topic: str, who: str = "devices") -> AccessRule:
    return AccessRule(False, action, topic, who)


# Filters


@given(filters, filters)
def test_a_filter_covers_another_if_it_matches_all_its_topics(rule: str, wanted: str) -> None:
    expected = all(matches(rule, topic) for topic in TOPICS if matches(wanted, topic))
    for depth in (-1, rule.count("/") + 1, 3, 7):  # what lies beyond the rule's levels is never split
        if depth < 0 or depth >= len(split_filter(rule)):
            assert covers(split_filter(rule), split_filter(wanted, depth)) is expected


@given(filters, filters)
def test_filters_overlap_if_one_topic_matches_both(rule: str, wanted: str) -> None:
    expected = any(matches(rule, topic) and matches(wanted, topic) for topic in TOPICS)
    for depth in (-1, *range(len(split_filter(rule)), 7)):
        assert overlaps(split_filter(rule), split_filter(wanted, depth)) is expected
    assert overlaps(split_filter(wanted), split_filter(rule)) is expected


@given(filters, st.sampled_from(TOPICS))
def test_a_filter_covers_the_topics_it_matches(rule: str, topic: str) -> None:
    assert covers(split_filter(rule), topic.split("/")) is matches(rule, topic)


# Decisions

some_rules = st.lists(
    st.builds(
        AccessRule,
        st.booleans(),
        st.sampled_from(("publish", "subscribe", "all")),
        filters,
        st.sampled_from(("devices", "publishers", "everyone")),
    ),
    max_size=5,
)


def first_match(one: App, role: Role, action: str, topic: str) -> bool:
    for rule in one.access:
        fits = rule.action in (action, "all") and rule.who in (role + "s", "everyone")
        if fits and matches(rule.topic, topic):
            return rule.allow
    return one.open or role == "publisher"


@given(some_rules, st.booleans(), st.sampled_from(ROLES), st.sampled_from(TOPICS))
def test_the_first_rule_that_fits_a_topic_decides(
    rules: list[AccessRule], is_open: bool, role: Role, topic: str
) -> None:
    one = app(*rules, is_open=is_open)
    assert Access(one).may_publish(role, "x", topic) is first_match(one, role, "publish", topic)


@given(some_rules, st.booleans(), st.sampled_from(ROLES), filters)
def test_a_subscription_that_is_granted_brings_nothing_that_is_denied(
    rules: list[AccessRule], is_open: bool, role: Role, wanted: str
) -> None:
    one = app(*rules, is_open=is_open)
    if Access(one).may_subscribe(role, "x", wanted):
        for topic in TOPICS:
            if matches(wanted, topic):
                assert first_match(one, role, "subscribe", topic), topic


ORDER = (
    deny("all", "a/secret/#"),
    allow("subscribe", "a/#"),
    deny("subscribe", "a/b"),
    allow("publish", "p"),
)
DECISIONS: list[tuple[tuple[AccessRule, ...], str, bool, bool]] = [
    # rules, topic or filter, may a device publish, may it subscribe
    ((), "a", False, False),
    (ORDER, "a/b", False, True),
    (ORDER, "a/secret", False, False),
    (ORDER, "a/secret/x", False, False),
    (ORDER, "a", False, True),
    (ORDER, "p", True, False),
    (ORDER, "p/x", False, False),
    ((allow("all", "a/#"),), "a", True, True),
    ((allow("all", "a/+"),), "a", False, False),
    ((allow("all", "a/+"),), "a/", True, True),
    ((allow("all", "+"),), "$x", False, False),
    ((allow("all", "#"),), "$x/y", False, False),
    ((allow("all", "$x/#"),), "$x/y", True, True),
    ((allow("all", "a", "publishers"),), "a", False, False),
    ((allow("all", "a", "everyone"),), "a", True, True),
]


@pytest.mark.parametrize(("rules", "topic", "publish", "subscribe"), DECISIONS)
def test_decisions(rules: tuple[AccessRule, ...], topic: str, publish: bool, subscribe: bool) -> None:
    access = Access(app(*rules))
    assert access.may_publish("device", "phone", topic) is publish
    assert access.may_subscribe("device", "phone", topic) is subscribe


SUBSCRIPTIONS: list[tuple[tuple[AccessRule, ...], str, bool]] = [
    (ORDER, "#", False),
    (ORDER, "a/#", False),  # it would bring a/secret, too
    (ORDER, "a/+", False),
    (ORDER, "a/+/x", False),
    (ORDER, "a/c/#", True),
    ((allow("all", "a/#"), deny("all", "#")), "a/#", True),
    ((allow("all", "+/x"),), "a/x", True),
    ((allow("all", "a/x"),), "+/x", False),
    ((allow("all", "+/#"),), "#", True),
    ((allow("all", "#"),), "+/+/#", True),
    ((allow("all", "/#"),), "#", False),
]


@pytest.mark.parametrize(("rules", "wanted", "granted"), SUBSCRIPTIONS)
def test_a_subscription_is_granted_only_as_a_whole(
    rules: tuple[AccessRule, ...], wanted: str, granted: bool
) -> None:
    assert Access(app(*rules)).may_subscribe("device", "phone", wanted) is granted


@pytest.mark.parametrize(("role", "is_open"), [("device", True), ("publisher", False), ("publisher", True)])
def test_a_deny_rule_holds_where_the_default_is_to_allow(role: Role, is_open: bool) -> None:
    access = Access(app(deny("all", "a/secret/#", "everyone"), is_open=is_open))
    assert access.may_publish(role, "x", "a/b")
    assert not access.may_publish(role, "x", "a/secret")
    assert access.may_subscribe(role, "x", "b/#")
    for wanted in ("#", "a/#", "+/+", "a/secret", "a/secret/+"):
        assert not access.may_subscribe(role, "x", wanted)


def test_rules_for_devices_are_not_for_publishers_and_the_other_way() -> None:
    access = Access(app(deny("all", "a", "publishers"), allow("all", "a")))
    assert access.may_publish("device", "x", "a")
    assert not access.may_publish("publisher", "x", "a")


# $SYS


@pytest.mark.parametrize("rules", [(), (allow("all", "#", "everyone"), allow("all", "+/#", "everyone"))])
@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("topic", ["$SYS", "$SYS/", "$SYS/#", "$SYS/broker/uptime", "$SYS/+/x"])
def test_sys_is_never_open_by_itself(
    rules: tuple[AccessRule, ...], is_open: bool, role: Role, topic: str
) -> None:
    access = Access(app(*rules, is_open=is_open))
    assert not access.may_subscribe(role, "$SYS", topic)
    assert not access.may_publish(role, "$SYS", topic)


def test_sys_is_opened_by_a_rule_of_its_own_and_only_for_reading() -> None:
    access = Access(app(allow("all", "$SYS/broker/#", "publishers")))
    assert access.may_subscribe("publisher", "x", "$SYS/broker/clients/+")
    assert not access.may_subscribe("publisher", "x", "$SYS/#")
    assert not access.may_subscribe("device", "x", "$SYS/broker/clients/+")
    assert not access.may_publish("publisher", "x", "$SYS/broker/x")


def test_a_topic_that_only_looks_like_sys_is_an_ordinary_one() -> None:
    assert Access(app(is_open=True)).may_publish("device", "x", "$SYSTEM/a")


# {registration_id}

OWN = (allow("all", "d/{registration_id}/#"), allow("publish", "up/{registration_id}"))
EVIL = ["", "+", "#", "/", "a/b", "+/x", "a/+", "#/", "/a", "a/", "a+", "a#b", "+/#", "a/#"]


def test_each_device_has_its_own_topics() -> None:
    access = Access(app(*OWN))
    for name in ("phone-1", "a b", "$x", "ü😀", PLACEHOLDER, "{}", "%s", "\\1"):
        assert access.may_subscribe("device", name, f"d/{name}/#")
        assert access.may_publish("device", name, f"up/{name}")
        assert not access.may_publish("device", name, "up/phone-2")
        assert not access.may_subscribe("device", name, "d/phone-2/#")
    assert not access.may_publish("device", "a", f"up/{PLACEHOLDER}")


@pytest.mark.parametrize("name", EVIL)
def test_a_name_with_a_wildcard_or_a_slash_fits_no_rule(name: str) -> None:
    access = Access(app(*OWN))
    for level in (name, "+", "#", "phone-1", "a", "x", "", PLACEHOLDER):
        for topic in (f"d/{level}/#", f"d/{level}", f"d/{level}/x", f"up/{level}", "#", "d/#", "up/+"):
            assert not access.may_subscribe("device", name, topic)
            assert not access.may_publish("device", name, topic)


topic_text = st.text(st.sampled_from("ab+#/$"), max_size=4)


@given(topic_text, topic_text, st.sampled_from(["{registration_id}/#", "+/{registration_id}/x"]))
def test_no_name_reaches_the_topics_of_another(name: str, victim: str, rule: str) -> None:
    access = Access(app(allow("all", rule)))
    for topic in (f"{victim}/x", f"a/{victim}/x"):
        granted = access.may_publish("device", name, topic) or access.may_subscribe("device", name, topic)
        if granted:
            assert not {"+", "#", "/"} & set(name)
            assert name in topic.split("/")[:2]


@pytest.mark.parametrize("name", ["$SYS", "$x", "$share"])
def test_a_name_cannot_become_a_topic_of_the_server(name: str) -> None:
    access = Access(app(allow("all", "{registration_id}/#"), allow("all", "{registration_id}")))
    for topic in (name, f"{name}/#", f"{name}/x"):
        assert not access.may_subscribe("device", name, topic)
        assert not access.may_publish("device", name, topic)


# Cost


def test_sixty_thousand_levels_cost_nothing_noticeable() -> None:
    rules = [allow("all", "a/" * 500 + f"{n}/#") for n in range(MAX_RULES)]
    access = Access(app(*rules))
    long = ["/" * 60_000, "+/" * 30_000 + "#", "a/" * 30_000, "a/" * 499 + "/" * 60_000]
    started = time.process_time()
    for topic in long:
        assert not access.may_subscribe("device", "x", topic)
        assert not access.may_publish("device", "x", topic.replace("+", "a").replace("#", "a"))
    assert time.process_time() - started < 10  # 10 ms here; what is quadratic takes minutes


def test_without_rules_no_topic_is_taken_apart() -> None:
    class Whole(str):
        def split(self, *_: Any) -> Any:
            raise AssertionError("split")

    assert Access(app(is_open=True)).may_subscribe("device", "x", Whole("a/#"))
    assert Access(app(is_open=True)).may_publish("device", "x", Whole("a/b"))
    assert Access(app()).may_publish("publisher", "x", Whole("a/b"))
    assert not Access(app()).may_publish("device", "x", Whole("a/b"))


# JSON


def test_rules_are_read_and_written_back() -> None:
    sent = [
        {"allow": "publish", "topic": "up/{registration_id}/#", "who": "devices"},
        {"deny": "all", "topic": "+/x/#", "who": "everyone"},
        {"allow": "subscribe", "topic": "$SYS/#", "who": "publishers"},
        {"allow": "subscribe", "topic": "#", "who": "publishers"},
        {"allow": "subscribe", "topic": "a{b}/{", "who": "publishers"},
    ]
    rules = parse_rules(sent)
    assert rules[:2] == (
        AccessRule(True, "publish", "up/{registration_id}/#", "devices"),
        AccessRule(False, "all", "+/x/#", "everyone"),
    )
    assert describe_rules(rules) == sent
    assert parse_rules([]) == ()


def _with(**more: Any) -> dict[str, Any]:
    rule = {"allow": "all", "topic": "a", "who": "everyone", **more}
    return {key: value for key, value in rule.items() if value is not None}


WRONG: list[tuple[Any, str]] = [
    (None, "access rules = None: must be a list"),
    ({"allow": "all"}, "access rules = {'allow': 'all'}: must be a list"),
    ([_with()] * (MAX_RULES + 1), f"{MAX_RULES + 1} access rules: must be at most {MAX_RULES}"),
    ([_with(), "x"], "rule 1 = 'x': must be an object"),
    ([_with(topics="a")], "rule 0: unknown key 'topics'; there is allow, deny, topic, who"),
    ([_with(allow=None)], "rule 0: must have either allow or deny"),
    ([_with(deny="all")], "rule 0: must have either allow or deny"),
    ([_with(allow="read")], "rule 0: allow = 'read': must be one of publish, subscribe, all"),
    ([_with(allow=["all"])], "rule 0: allow = ['all']: must be one of publish, subscribe, all"),
    ([_with(allow=None, deny=1)], "rule 0: deny = 1: must be one of publish, subscribe, all"),
    ([_with(who="device")], "rule 0: who = 'device': must be one of devices, publishers, everyone"),
    ([_with(who=None)], "rule 0: who is missing: must be one of devices, publishers, everyone"),
    ([_with(topic=None)], "rule 0: topic is missing: must be a topic filter"),
    ([_with(topic=5)], "rule 0: topic = 5: must be a topic filter"),
    ([_with(topic="")], "rule 0: topic = '': must be a topic filter"),
    ([_with(topic="a\0")], r"rule 0: topic = 'a\x00': must be a topic filter"),
    ([_with(topic="a\ud800")], r"rule 0: topic = 'a\ud800': must be at most 1024 bytes of UTF-8"),
    ([_with(topic="ü" * 600)], f"must be at most {MAX_RULE_TOPIC} bytes of UTF-8"),
    ([_with(topic="$share/g/a")], "rule 0: topic = '$share/g/a': must be a filter without $share/"),
]
WRONG += [
    ([_with(topic=topic)], f"rule 0: topic = '{topic}': must be a topic filter: + and # are whole levels")
    for topic in ("a+", "+a/b", "a/#/b", "#/#", "##", "a#", "+#", "a/b#")
]
WRONG += [
    ([_with(topic=topic)], "a topic filter with {registration_id}, as a whole level, for a placeholder")
    for topic in ("{client_id}", "a/{registrationid}/b", "x{registration_id}", "a/{registration_id}{x", "{}")
]


def test_the_example_in_the_manual_does_what_the_manual_says() -> None:
    page = (Path(__file__).parents[2] / "docs/protocol.md").read_text().split("\n## Ordinary topics\n")[1]
    access = Access(app(*parse_rules(json.loads(page.split("```json")[1].split("```")[0]))))
    granted = ("fleet/news", "fleet/news/#", "fleet/#", "#")
    assert all(f"`{wanted}`" in page for wanted in granted)
    assert [access.may_subscribe("device", "x", wanted) for wanted in granted] == [True, True, False, False]
    assert access.may_publish("device", "x", "up/x/battery")
    assert not access.may_publish("device", "x", "up/y")
    assert f"At most {MAX_RULES} rules" in page
    assert f"at most {MAX_RULE_TOPIC} bytes" in page


@pytest.mark.parametrize(("value", "message"), WRONG)
def test_a_wrong_rule_is_refused_with_what_is_allowed(value: Any, message: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse_rules(value)
    assert (refused.value.code, refused.value.http_status) == (1003, 400)
    assert message in refused.value.message
    assert len(refused.value.message) < 300
