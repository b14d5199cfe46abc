"""The rule language of segments against a plain set model, its limits, and its schema."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from broker.audiences.segment_rules import EVERYONE, Facts, StoredSegment, answer, read_rule, terms
from broker.errors import ApiError
from broker.limits import Limits
from broker.model import Term, TermKey

DEVICES = range(12)
LIMITS = Limits()
SCHEMA = Path(__file__).parents[2] / "docs" / "segment-rule.schema.json"
TIMES = {1_700_000_000: 4, 1_750_000_000: 9}  # -> registered before

devno_sets = st.sets(st.sampled_from(DEVICES))
leaves = st.one_of(
    st.sampled_from(["x", "y"]).map(lambda name: {"tag": name}),
    st.sampled_from(["x", "y"]).map(lambda name: {"alias": name}),
    st.sampled_from(["ios", "hmos"]).map(lambda name: {"platform": name}),
    st.sampled_from(["x", "y"]).map(lambda value: {"attribute": "lang", "op": "=", "value": value}),
    st.just({"attribute": "lang", "op": "exists"}),
    st.sampled_from([7, 30]).map(lambda days: {"last_active": {"within": days}}),
    st.sampled_from([7, 30]).map(lambda days: {"last_active": {"before": days}}),
    st.fixed_dictionaries(
        {}, optional={"since": st.sampled_from(list(TIMES)), "before": st.sampled_from(list(TIMES))}
    )
    .filter(bool)
    .map(lambda times: {"registered": times}),
)
rules = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda many: {"and": many}),
        st.lists(inner, min_size=1, max_size=3).map(lambda many: {"or": many}),
        inner.map(lambda one: {"not": one}),
    ),
    max_leaves=8,
)
KEYS: list[tuple[Term, str]] = [
    (Term.TAG, "x"), (Term.TAG, "y"), (Term.ALIAS, "x"), (Term.ALIAS, "y"),
    (Term.PLATFORM, "ios"), (Term.PLATFORM, "hmos"),
    (Term.ATTRIBUTE, "lang\0=x"), (Term.ATTRIBUTE, "lang\0=y"), (Term.ATTRIBUTE, "lang\0"),
]  # fmt: skip
worlds = st.fixed_dictionaries(dict.fromkeys(KEYS, devno_sets))


def _model(rule: dict[str, Any], has: Mapping[TermKey, set[int]], active: Mapping[int, set[int]]) -> set[int]:
    ((key, value), *rest) = rule.items()
    everyone = set(DEVICES)
    match key:
        case "and":
            return set.intersection(*(_model(one, has, active) for one in value))
        case "or":
            return set().union(*(_model(one, has, active) for one in value))
        case "not":
            return everyone - _model(value, has, active)
        case "tag" | "alias" | "platform":
            kind = {"tag": Term.TAG, "alias": Term.ALIAS, "platform": Term.PLATFORM}[key]
            return has[kind, value]
        case "attribute":
            equal = f"={rule['value']}" if rest[0][1] == "=" else ""
            return has[Term.ATTRIBUTE, f"lang\0{equal}"]
        case "last_active":
            ((how, days),) = value.items()
            return active[days] if how == "within" else everyone - active[days]
    since, before = TIMES.get(value.get("since"), 0), TIMES.get(value.get("before"), len(DEVICES))
    return {devno for devno in DEVICES if since <= devno < before}


@given(rules, worlds, devno_sets, devno_sets)
def test_a_rule_is_the_algebra_of_its_parts(
    rule: dict[str, Any], has: dict[TermKey, set[int]], week: set[int], month: set[int]
) -> None:
    read = read_rule(rule, LIMITS)
    lists = {term: BitMap(devnos) for term, devnos in has.items()} | {EVERYONE: BitMap(DEVICES)}
    active = {7: BitMap(week), 30: BitMap(month)}
    before = {term: bits.copy() for term, bits in lists.items()}
    older = {float(time): count for time, count in TIMES.items()}

    result = answer(read, Facts({term: lists[term] for term in terms(read)}, {}, active, older))

    assert set(result) == _model(rule, has, {7: week, 30: month})
    result.clear()
    assert lists == before, "posting lists belong to the store"
    assert active == {7: BitMap(week), 30: BitMap(month)}


@given(rules)
def test_a_rule_that_was_saved_is_read_as_it_was(rule: dict[str, Any]) -> None:
    assert StoredSegment("x", orjson.loads(orjson.dumps(rule))).read_rule() == read_rule(rule, LIMITS)


def test_what_was_saved_is_read_though_limits_have_shrunk() -> None:
    rule = {"and": [{"tag": "x" * 40}] * 200}
    assert StoredSegment("x", rule).read_rule().rules  # type: ignore[union-attr]


def _nested(depth: int) -> dict[str, Any]:
    return {"tag": "x"} if depth == 1 else {"not": _nested(depth - 1)}


WRONG: list[tuple[Any, str]] = [
    (None, "rule: must be an object"),
    ([], "rule: must be an object"),
    ({}, "rule: must be an object"),
    ({"colour": "red"}, "rule.colour: there is no such condition"),
    ({"tag": "x", "alias": "y"}, "rule.alias: not expected beside tag"),
    ({"tag": 1}, "rule.tag: must be a name of 1 to 40 bytes"),
    ({"tag": ""}, "rule.tag: must be a name"),
    ({"tag": "ä" * 21}, "rule.tag: must be a name"),
    ({"alias": None}, "rule.alias: must be a name"),
    ({"platform": "symbian"}, "rule.platform: must be one of android"),
    ({"platform": ["ios"]}, "rule.platform: must be one of android"),
    ({"and": []}, "rule.and: must be a list of rules"),
    ({"or": {"tag": "x"}}, "rule.or: must be a list of rules"),
    ({"and": [{"tag": "x"}, {"not": [1]}]}, "rule.and[1].not: must be an object"),
    ({"attribute": "a"}, "rule.op: must be one of"),
    ({"attribute": "a", "op": "=", "value": 1, "tag": "x"}, "rule.tag: not expected beside attribute"),
    ({"or": [{"attribute": "a", "op": "<", "value": "x"}]}, "rule.or[0].value: must be a number, or a version"),
    ({"last_active": 7}, "rule.last_active: must be"),
    ({"last_active": {}}, "rule.last_active: must be"),
    ({"last_active": {"within": 7, "before": 7}}, "rule.last_active: must be"),
    ({"last_active": {"within": 0}}, "rule.last_active.within: must be above 0"),
    ({"last_active": {"within": True}}, "rule.last_active.within: must be above 0"),
    ({"last_active": {"before": 367}}, "rule.last_active.before: must be above 0, up to 366 days"),
    ({"last_active": {"before": "7"}}, "rule.last_active.before: must be above 0"),
    ({"registered": {}}, "rule.registered: must be"),
    ({"registered": {"until": 5}}, "rule.registered: must be"),
    ({"registered": {"since": "tomorrow"}}, "rule.registered.since: must be a day as YYYY-MM-DD"),
    ({"registered": {"since": "2026-02-30"}}, "rule.registered.since: must be a day"),
    ({"registered": {"before": None}}, "rule.registered.before: must be a day"),
    ({"registered": {"before": -1}}, "rule.registered.before: must be a day"),
    ({"registered": {"before": True}}, "rule.registered.before: must be a day"),
    (_nested(11), "rules may be nested 10 levels deep"),
    ({"or": [{"tag": "x"}] * 200}, "a rule has at most 200 conditions and values"),
    ({"attribute": "a", "op": "in", "value": list(range(192))}, "a rule has at most 200 conditions and values"),
    ({"or": [{"attribute": "a", "op": "<", "value": 1}] * 20}, "a rule has at most 200 conditions and values"),
    ({"or": [{"attribute": "a", "op": "<", "value": "1.2"}] * 20}, "a rule has at most 200 conditions and values"),
    ({"or": [{"last_active": {"within": 1}}] * 11}, "at most 10 of these"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "message"), WRONG)
def test_a_wrong_rule_is_told_where_and_why(rule: Any, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_rule(rule, LIMITS)
    assert (caught.value.code, message in caught.value.message) == (1003, True), caught.value.message


def test_rules_at_the_limits() -> None:
    read_rule(_nested(10), LIMITS)
    read_rule({"or": [{"tag": "x"}] * 199}, LIMITS)
    read_rule({"attribute": "a", "op": "in", "value": list(range(191))}, LIMITS)
    read_rule({"attribute": "a", "op": "in", "value": [str(n) for n in range(199)]}, LIMITS)
    read_rule({"or": [{"attribute": "a", "op": "<", "value": 1}] * 19}, LIMITS)


def test_a_day_is_midnight_utc() -> None:
    by_day = read_rule({"registered": {"since": "2023-11-14"}}, LIMITS)
    assert by_day == read_rule({"registered": {"since": 1_699_920_000}}, LIMITS)


@pytest.fixture(scope="module")
def validate() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    return jsonschema.Draft202012Validator(orjson.loads(SCHEMA.read_bytes()))


@given(rule=rules)
def test_the_schema_takes_what_is_right(validate: Any, rule: dict[str, Any]) -> None:
    validate.validate(rule)


BEYOND_A_SCHEMA = ("nested", "at most", "2026-02-30", "numbers are compared", "a number, or a version", "ä")


@pytest.mark.parametrize(
    ("rule", "message"), [row for row in WRONG if not any(w in f"{row}" for w in BEYOND_A_SCHEMA)]
)
def test_the_schema_refuses_what_is_wrong(validate: Any, rule: Any, message: str) -> None:
    assert not validate.is_valid(rule), message
