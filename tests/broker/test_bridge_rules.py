"""Rules of the MQTT bridge: what a message becomes, and what is told about a wrong rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from broker.bridging.bridge_rules import (
    Incoming,
    Pattern,
    Rule,
    RulesError,
    Unfit,
    compile_template,
    read_pattern,
    read_rules,
)
from broker.command import config as config_command
from broker.config import ConfigError, load_config

RULE = """
[[rule]]
topic = "orders/{order}/shipped"
app = "0123456789abcdef01234567"
audience = { alias = ["{order}"] }
"""
ALERT = 'notification = { alert = "hello" }\n'


def write(folder: Path, text: str) -> Path:
    file = folder / "rules.toml"
    file.write_text(text)
    return file


def make(folder: Path, text: str) -> Rule:
    (rule,) = read_rules(write(folder, text))
    return rule


def push(rule: Rule, topic: str, payload: bytes, cid: str | None = None) -> Any:
    values = rule.pattern.match(topic)
    assert values is not None
    return orjson.loads(rule.make_push(Incoming(topic, payload, cid), values))


# What a message becomes


def test_a_push_from_a_template(tmp_path: Path) -> None:
    rule = make(
        tmp_path,
        RULE
        + 'notification = { alert = "Order {order} is {payload.state.name} ({payload.count}) {{on}} {topic}" }\n'
        + 'options = { time_to_live = "{payload.ttl}", sendno = 7 }\n'
        + 'message.msg_content = "{payload}"\n'
        + 'message.extras = { all = ["{payload.list}", "{order}"], deep = "{payload.state}" }\n',
    )
    payload = b'{"state": {"name": "sent"}, "count": 3, "ttl": 60, "list": [1, null]}'
    assert push(rule, "orders/17/shipped", payload) == {
        "platform": "all",
        "audience": {"alias": ["17"]},
        "notification": {"alert": "Order 17 is sent (3) {on} orders/17/shipped"},
        "options": {"time_to_live": 60, "sendno": 7},
        "message": {
            "msg_content": payload.decode(),
            "extras": {"all": [[1, None], "17"], "deep": {"name": "sent"}},
        },
    }


def test_a_payload_that_is_the_push(tmp_path: Path) -> None:
    rule = make(tmp_path, '[[rule]]\ntopic = "push/#"\napp = "x"\npayload = "push"\n')
    whole = {"platform": ["android"], "audience": "all", "message": {"msg_content": "x"}}
    assert push(rule, "push/a/b", orjson.dumps(whole)) == whole
    assert push(rule, "push", orjson.dumps(whole), "c1") == {**whole, "cid": "c1#1"}


def test_a_cid_comes_from_the_rule_or_from_the_message(tmp_path: Path) -> None:
    rule = make(tmp_path, RULE + ALERT)
    assert "cid" not in push(rule, "orders/1/shipped", b"")
    assert push(rule, "orders/1/shipped", b"", "mine")["cid"] == "mine#1"
    ruled = make(tmp_path, RULE + ALERT + 'cid = "{order}-{payload.id}"\n')
    assert push(ruled, "orders/1/shipped", b'{"id": 5}', "mine")["cid"] == "1-5"


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"\xff", "the payload is not JSON"),
        (b"", "the payload is not JSON"),
        (b"[]", "the payload has no field text"),
        (b'{"txt": 1}', "the payload has no field text"),
    ],
)
def test_payloads_that_do_not_fit(tmp_path: Path, payload: bytes, why: str) -> None:
    rule = make(tmp_path, RULE + 'notification = { alert = "{payload.text}" }\n')
    with pytest.raises(Unfit, match=why):
        push(rule, "orders/1/shipped", payload)


def test_text_that_is_not_utf_8_does_not_fit(tmp_path: Path) -> None:
    rule = make(tmp_path, RULE + 'notification = { alert = "-{payload}" }\n')
    with pytest.raises(Unfit, match="not UTF-8"):
        push(rule, "orders/1/shipped", b"\xff")
    whole = make(tmp_path, '[[rule]]\ntopic = "a"\napp = "x"\npayload = "push"\n')
    with pytest.raises(Unfit, match="not a push object"):
        push(whole, "a", b"5")


@given(st.text())
def test_braces_in_a_payload_mean_nothing(text: str) -> None:
    render = compile_template("<{payload}|{a}>", ["a"])
    assert render(Incoming("t", text.encode(errors="replace")), {"a": "{b}"}) == (
        f"<{text.encode(errors='replace').decode()}|{{b}}>"
    )


# Topics

LEVEL = st.sampled_from(["a", "b", "", "$x", "+", "{n}"])
PATTERN = st.lists(LEVEL, min_size=1, max_size=4).map(
    lambda levels: "/".join(level.replace("n", f"n{i}") for i, level in enumerate(levels))
)
PATTERNS = st.one_of(PATTERN, PATTERN.map(lambda text: text + "/#"), st.just("#")).filter(bool)
TOPICS = (
    st.lists(st.sampled_from(["a", "b", "", "$x", "c"]), min_size=1, max_size=5).map("/".join).filter(bool)
)


def plainly(filter_: str, topic: str) -> bool:
    """MQTT 5, section 4.7, level by level."""
    wanted, levels = filter_.split("/"), topic.split("/")
    if topic.startswith("$") and wanted[0] in ("+", "#"):
        return False
    if wanted[-1] == "#":
        wanted = wanted[:-1]
        if len(levels) < len(wanted):
            return False
        levels = levels[: len(wanted)]
    return len(levels) == len(wanted) and all(
        w in ("+", level) for w, level in zip(wanted, levels, strict=True)
    )


@given(PATTERNS, TOPICS)
def test_patterns_match_as_filters_do(text: str, topic: str) -> None:
    pattern = read_pattern(text)
    values = pattern.match(topic)
    assert (values is not None) == plainly(pattern.filter, topic)
    for name, value in (values or {}).items():
        assert topic.split("/")[pattern.names.index(name)] == value


@given(PATTERNS, PATTERNS, TOPICS)
def test_patterns_that_fit_one_topic_overlap(one: str, two: str, topic: str) -> None:
    first, second = read_pattern(one), read_pattern(two)
    if first.match(topic) is not None and second.match(topic) is not None:
        assert first.overlaps(second)
    assert first.overlaps(second) == second.overlaps(first)
    assert first.overlaps(first)


@pytest.mark.parametrize(
    ("one", "two", "overlap"),
    [
        ("a/b", "a/c", False),
        ("a/+", "a/{x}", True),
        ("a/#", "a", True),
        ("a/#", "b/#", False),
        ("a/+/c", "a/b/+", True),
        ("a/+", "a/b/c", False),
        ("#", "a/b", True),
        ("a", "a/b", False),
    ],
)
def test_rows_of_overlap(one: str, two: str, overlap: bool) -> None:
    assert read_pattern(one).overlaps(read_pattern(two)) is overlap


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "must be a topic"),
        (5, "must be a topic"),
        ("a/#/b", "# must be the last level"),
        ("a/b#", "must fill their level"),
        ("a+/b", "must fill their level"),
        ("a/{x", "a name must fill its level"),
        ("a/x{y}", "a name must fill its level"),
        ("{x}/{x}", "a name of its own"),
        ("{payload}", "a name of its own"),
        ("{x-y}", "a name of its own"),
        ("$share/g/a", "bridge.group"),
        ("a\0", "must be a topic"),
    ],
)
def test_topics_that_are_wrong(text: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_pattern(text)


def test_a_pattern_keeps_its_filter() -> None:
    assert read_pattern("a/{b}/#") == Pattern("a/{b}/#", ("a", "+", "#"), (None, "b", None))
    assert read_pattern("a/{b}/#").filter == "a/+/#"


# Files that are wrong

WRONG = [
    ("", "rule: must be 1 to 1000 tables"),
    ("rule = 5", "rule: must be 1 to 1000 tables"),
    ("rule = [5]", "rule 1: must be a table"),
    ("x = [", "not valid TOML"),
    ("[rules]\n" + RULE + ALERT, "rules: unknown; there is [[rule]]"),
    (RULE, "rule 1: notification or message, or payload: must be set"),
    (RULE.replace("app =", "apps ="), "rule 1: apps = '0123456789abcdef01234567': unknown key; there is topic, app,"),
    (RULE.replace("app =", "apps ="), "rule 1: app = None: must be an app key"),
    (RULE.replace("orders/{order}", "o#") + ALERT, "rule 1: topic = 'o#/shipped': o#: + and # must fill"),
    (RULE.replace("{order}", "+") + ALERT + 'cid = "{x}"', "cid = '{x}': {x} is not known here; there is {topic}"),
    (RULE + 'notification = { alert = "{x" }', "notification = {'alert': '{x'}: a single { in '{x'; write {{"),
    (RULE + 'notification = { alert = "{payload.}" }', "{payload.}: a field's name is empty"),
    (RULE + ALERT + "cid = 5", "rule 1: cid = 5: must be text"),
    (RULE + 'payload = "text"', "rule 1: payload = 'text': must be \"push\""),
    (RULE + 'payload = "push"', "rule 1: audience = {'alias': ['{order}']}: must be left out where payload is set"),
    ('[[rule]]\ntopic = "a"\napp = "x"\n' + ALERT, "rule 1: audience: must be set"),
    (RULE + ALERT + "platform = 5", "rule 1: is no push: platform"),
    (RULE + "notification = { alrt = 1 }", "rule 1: is no push: notification.alrt: this key is not supported"),
    (RULE + ALERT + "options = { time_to_live = -1 }", "rule 1: is no push: options.time_to_live"),
    (RULE + "message = { msg_content = 5 }", "rule 1: is no push: message.msg_content"),
    (RULE + ALERT + RULE.replace("{order}", "17") + ALERT, "rule 2: topic = 'orders/17/shipped': some topics"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "told"), WRONG)
def test_wrong_rules_are_told(tmp_path: Path, text: str, told: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(RulesError) as wrong:
        read_rules(file)
    assert any(line.startswith(f"{file}: ") and told in line for line in wrong.value.errors), (
        wrong.value.errors
    )


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RulesError) as wrong:
        read_rules(write(tmp_path, RULE + RULE.replace("orders", "o#")))
    assert len(wrong.value.errors) == 3


def test_rules_with_the_same_filter_may_stand_side_by_side(tmp_path: Path) -> None:
    rules = read_rules(write(tmp_path, RULE + ALERT + RULE.replace("{order}", "{o}") + ALERT))
    assert [rule.pattern.filter for rule in rules] == ["orders/+/shipped"] * 2


# As a setting


def settings(folder: Path, rules: Path | None, **more: str) -> Path:
    file = folder / "holdfast.toml"
    lines = ["[bridge]", 'host = "127.0.0.1"', *(f'{name} = "{value}"' for name, value in more.items())]
    file.write_text("\n".join([*lines, f'rules = "{rules}"' if rules else ""]))
    return file


def test_config_check_reads_the_rules(tmp_path: Path) -> None:
    right = settings(tmp_path, write(tmp_path, RULE + ALERT))
    assert CliRunner().invoke(config_command, ["check", str(right)]).output == "ok\n"
    wrong = settings(tmp_path, write(tmp_path, RULE))
    checked = CliRunner().invoke(config_command, ["check", str(wrong)])
    assert checked.exit_code == 1
    assert "rules.toml: rule 1: notification or message, or payload: must be set" in checked.output


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"rules": ""}, "bridge.host = '127.0.0.1': needs bridge.rules"),
        ({"rules": "/no/such/file"}, "/no/such/file: cannot be read"),
        ({"dead_topic": "orders/1/shipped"}, "bridge.dead_topic = 'orders/1/shipped': must fit no rule"),
        ({"dead_topic": "dead/#"}, "bridge.dead_topic = 'dead/#': must be a topic without + and #"),
        ({"protocol": "4"}, "bridge.protocol = '4': must be one of 3.1.1, 5"),
    ],
)
def test_wrong_settings_of_the_bridge(tmp_path: Path, more: dict[str, str], told: str) -> None:
    rules = more.pop("rules", None)
    file = Path(rules) if rules else None if rules == "" else write(tmp_path, RULE + ALERT)
    with pytest.raises(ConfigError) as wrong:
        load_config(settings(tmp_path, file, **more))
    assert any(told in line for line in wrong.value.errors), wrong.value.errors


def test_without_a_host_there_is_no_bridge(tmp_path: Path) -> None:
    assert load_config(None).bridge.host is None
    (tmp_path / "holdfast.toml").write_text('[bridge]\nrules = "not read"\n')
    assert load_config(tmp_path / "holdfast.toml").bridge.host is None
