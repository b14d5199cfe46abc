"""The attribute index against the plain rule, one device at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from broker.audiences.attributes import (
    NUMBER_BITS,
    ORDER,
    Question,
    changed,
    check_attributes,
    equals,
    number_code,
    read_question,
    split,
    term_changes,
    terms,
    version_code,
)
from broker.errors import ApiError
from broker.limits import Limits
from broker.model import AttributeValue, TermKey

LIMITS = Limits()
VERSIONS = [
    "1",
    "1.0",
    "1.2",
    "1.10",
    "v2.3.4.5",
    "2.3-beta",
    "2.3 (build 7)",
    "10.0.0.1",
    "65535.65535.65535.65535",
]
NO_VERSIONS = ["", "x", "1.", ".1", "1..2", "1.2.3.4.5", "65536", "1.2x", "٣.1", "1,2", "version 2"]

numbers = st.one_of(
    st.integers(-1000, 1000),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, -0.0, 0.5, -0.5, 1e308, -1e308, 5e-324, -5e-324]),
)
texts = st.one_of(st.sampled_from([*VERSIONS, *NO_VERSIONS, "en", "de", "=x", "#1", "?1"]))
values = st.one_of(numbers, texts, st.booleans())
devices = st.lists(st.dictionaries(st.sampled_from(["a", "b"]), values), max_size=12)


def _lists(of: Sequence[Mapping[str, AttributeValue]], wanted: Sequence[TermKey]) -> dict[TermKey, BitMap]:
    """What the store would answer."""
    lists = {term: BitMap() for term in wanted}
    for devno, attributes in enumerate(of):
        for name, value in attributes.items():
            for term in terms(name, value):
                if term in lists:
                    lists[term].add(devno)
    return lists


def _same(one: AttributeValue, other: AttributeValue) -> bool:
    """Numbers are one kind, true is not 1."""
    alike = isinstance(one, bool) == isinstance(other, bool) and isinstance(one, str) == isinstance(
        other, str
    )
    return alike and one == other


def _less(one: AttributeValue, other: AttributeValue) -> bool | None:
    """None: the two do not compare."""
    if isinstance(one, bool) or isinstance(other, bool) or isinstance(one, str) != isinstance(other, str):
        return None
    if not isinstance(one, str) and not isinstance(other, str):
        return one < other
    codes = version_code(str(one)), version_code(str(other))
    return None if codes[0] is None or codes[1] is None else codes[0] < codes[1]


def _holds(question: Question, attributes: Mapping[str, AttributeValue]) -> bool:
    """The rule of every operator."""
    if question.name not in attributes:
        return False
    value = attributes[question.name]
    match question.op:
        case "exists":
            return True
        case "=" | "in":
            return any(_same(value, one) for one in question.values)
        case "!=":
            return not _same(value, question.values[0])
        case "between":
            low, high = question.values
            return _less(value, low) is False and _less(high, value) is False
    bound = question.values[0]
    less, more = _less(value, bound), _less(bound, value)
    return bool({"<": less, ">": more, "<=": more is False, ">=": less is False}[question.op])


@st.composite
def questions(draw: st.DrawFn) -> Question:
    op = draw(st.sampled_from(["=", "!=", "in", "exists", *ORDER]))
    comparable = st.sampled_from(VERSIONS) if draw(st.booleans()) else numbers
    kind = comparable if op in ORDER else values
    count = {"exists": 0, "between": 2, "in": draw(st.sampled_from([1, 2, 4, 20]))}.get(op, 1)
    return Question(draw(st.sampled_from(["a", "b"])), op, tuple(draw(kind) for _ in range(count)))


@given(questions(), devices)
def test_an_answer_is_what_each_device_says(question: Question, of: list[dict[str, AttributeValue]]) -> None:
    lists = _lists(of, list(question.terms()))
    before = {term: bits.copy() for term, bits in lists.items()}
    wanted = {n for n, device in enumerate(of) if _holds(question, device)}
    assert set(question.answer(lists)) == wanted
    assert set(BitMap.union(*[part.answer(lists) for part in question.parts()])) == wanted
    assert lists == before, "posting lists belong to the store"


@given(numbers, numbers)
def test_number_codes_sort_as_the_numbers_do(a: float, b: float) -> None:
    a, b = abs(float(a)), abs(float(b))
    assert (number_code(a) < number_code(b)) == (a < b)
    assert 0 <= number_code(a) < 1 << NUMBER_BITS


@given(st.lists(st.integers(0, 255), max_size=20), st.integers(0, 255))
def test_a_split_is_a_partition(codes: list[int], bound: int) -> None:
    digits = [BitMap([n for n, code in enumerate(codes) if code >> d & 1]) for d in reversed(range(8))]
    less, equal, more = split(BitMap(range(len(codes))), digits, bound)
    assert set(less) == {n for n, code in enumerate(codes) if code < bound}
    assert set(equal) == {n for n, code in enumerate(codes) if code == bound}
    assert equals(BitMap(range(len(codes))), digits, bound) == equal
    assert set(more) == {n for n, code in enumerate(codes) if code > bound}


def test_versions_sort_as_people_mean_them() -> None:
    ordered = ["0.9", "1", "1.0.1", "1.2", "1.2.3", "1.10", "2", "2.0.0.1", "10", "65535.65535.65535.65535"]
    codes = [version_code(text) for text in ordered]
    assert None not in codes
    assert codes == sorted(codes, key=lambda code: code or 0)
    assert len(set(codes)) == len(codes)
    assert version_code("1.2") == version_code("v1.2.0-rc1") == version_code("1.2 beta")


@pytest.mark.parametrize("text", NO_VERSIONS)
def test_what_is_no_version(text: str) -> None:
    assert version_code(text) is None


def test_a_small_whole_number_is_in_few_lists() -> None:
    assert len(list(terms("age", 42))) < 16, "each list is a write when it is set"
    assert len(list(terms("age", -42))) < 17


@given(values, values)
def test_only_what_differs_is_written(one: AttributeValue, other: AttributeValue) -> None:
    assert set(terms("a", one)).isdisjoint(terms("b", one))
    if _same(one, other):
        assert set(terms("a", one)) == set(terms("a", other))
    else:
        assert set(terms("a", one)) != set(terms("a", other))


attributes = st.dictionaries(st.sampled_from(["a", "b", "c"]), values)


@given(attributes, attributes)
def test_a_change_touches_the_terms_that_differ(
    before: dict[str, AttributeValue], after: dict[str, AttributeValue]
) -> None:
    old, new = (
        {term for name, value in side.items() for term in terms(name, value)} for side in (before, after)
    )
    assert term_changes(before, after) == (old - new, new - old)


def test_a_change_sets_and_removes() -> None:
    before = {"a": 1, "b": "x"}
    assert changed(before, {}) is before
    assert changed(before, {"a": None, "b": "y", "c": True}) == {"b": "y", "c": True}


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"": 1}, 7002, "1 to 40 letters"),
    ({"x" * 41: 1}, 7002, "1 to 40 letters"),
    ({"a b": 1}, 7002, "letters, digits and _.-"),
    ({"ä": 1}, 7002, "letters, digits and _.-"),
    ({"a\n": 1}, 7002, "letters, digits and _.-"),
    ({"x": ""}, 7002, "attributes.x: a text has 1 to 128 bytes"),
    ({"x": "ä" * 65}, 7002, "attributes.x: a text has 1 to 128 bytes"),
    ({"x": "a\0b"}, 7002, "printable"),
    ({"x": [1]}, 7002, "attributes.x: must be text, a number, true or false"),
    ({"x": {}}, 7002, "attributes.x: must be text"),
    ({"x": math.inf}, 7002, "finite"),
    ({"x": math.nan}, 7002, "finite"),
    ({"x": 10**400}, 7002, "finite"),
    ({"carrier": 7}, 7002, "attributes.carrier: must be text"),
    ({"app_version": True}, 7002, "attributes.app_version: must be text"),
    ({str(n): n for n in range(51)}, 7013, "at most 50, not 51"),
]


@pytest.mark.parametrize(("attributes", "code", "message"), WRONG)
def test_wrong_attributes(attributes: dict[str, Any], code: int, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_attributes(attributes, LIMITS, 7002)
    assert (caught.value.code, message in caught.value.message) == (code, True), caught.value.message


def test_right_attributes_are_kept_as_they_mean() -> None:
    given = {"x": 2.0, "y": 2.5, "big": 2.0**60, "on": True, "gone": None, "carrier": None, "t": "x" * 128}
    checked = check_attributes(given, LIMITS, 7002)
    assert checked == given
    assert [type(checked[name]) for name in ("x", "y", "big", "on")] == [int, float, float, bool]


@pytest.mark.parametrize(
    ("name", "op", "value", "message"),
    [
        (None, "=", 1, "r.attribute: must be a name"),
        ("a b", "=", 1, "r.attribute: a name has"),
        ("a", "==", 1, "r.op: must be one of ="),
        ("a", None, 1, "r.op: must be one of ="),
        ("a", [], 1, "r.op: must be one of ="),
        ("a", "=", None, "r.value: must be text"),
        ("a", "=", "", "r.value: a text has"),
        ("a", "exists", True, "r.value: exists takes no value"),
        ("a", "in", [], "r.value: must be a list of values"),
        ("a", "in", "x", "r.value: must be a list of values"),
        ("a", "in", ["x", None], "r.value[1]: must be text"),
        ("a", "between", [1], "r.value: must be a list of two values"),
        ("a", "between", [1, "2.0"], "numbers are compared with numbers"),
        ("a", "<", True, "numbers are compared with numbers"),
        ("a", "<", "many", "r.value: must be a number, or a version"),
    ],
)
def test_wrong_questions(name: Any, op: Any, value: Any, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_question(name, op, value, "r", LIMITS)
    assert (caught.value.code, message in caught.value.message) == (1003, True), caught.value.message
