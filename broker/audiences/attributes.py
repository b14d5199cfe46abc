"""Attributes of devices as index terms, and questions about them as algebra over posting lists. Pure functions.

A text or truth value is one term. A number is a bit-sliced index: one posting list for each binary digit of a code
that sorts as the numbers do, so that a comparison is a walk over the digits, highest first (O'Neil and Quass,
"Improved query performance with variant indexes", SIGMOD 1997, algorithm 4.2). The code is the 63 bits below the
sign of an IEEE 754 double, and the sign a list of its own: small whole numbers have few digits that are one, and only
those are terms, so a device is in few lists. A text that reads as a version has a second code beside it, four parts
of 16 bits.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
from pyroaring import BitMap

from broker.errors import ApiError
from broker.limits import Limits
from broker.model import AttributeValue, Term, TermKey

TEXTS: Final = frozenset(("app_version", "carrier", "language", "region"))
"""Attributes that are text whatever the app says."""
ORDER: Final = ("<", "<=", ">", ">=", "between")
OPERATORS: Final = ("=", "!=", *ORDER, "in", "exists")
NUMBER_BITS: Final = 63
VERSION_BITS: Final = 64
VERSION_PARTS: Final = 4
VALUES_AT_ONCE: Final = 8  # of an "in"
EXACT: Final = 2**53  # whole numbers up to it are whole in a double, too

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]+")
_VERSION: Final = re.compile(r"v?(\d{1,5}(?:\.\d{1,5}){0,3})(?:[-+ ].*)?", re.DOTALL | re.ASCII)

Lists = Mapping[TermKey, BitMap]


# Values


def check_name(name: str, path: str, limits: Limits, code: int) -> str:
    if not 0 < len(name) <= limits.attribute_name_size or not _NAME.fullmatch(name):
        most = limits.attribute_name_size
        raise ApiError(code, f"{path}: a name has 1 to {most} letters, digits and _.- only, got {name!r:.60}")
    return name


def check_value(value: Any, path: str, limits: Limits, code: int) -> AttributeValue:
    """Text of 1 to `attribute_text_size` bytes, a finite number, or a truth value. Whole numbers become int."""
    match value:
        case bool():
            return value
        case int() | float():
            return _check_number(value, path, code)
        case str():
            if not 0 < len(value.encode("utf-8", "replace")) <= limits.attribute_text_size:
                raise ApiError(code, f"{path}: a text has 1 to {limits.attribute_text_size} bytes")
            if not value.isprintable():
                raise ApiError(code, f"{path}: a text has printable characters only")
            return value
    raise ApiError(code, f"{path}: must be text, a number, true or false")


def _check_number(value: float, path: str, code: int) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ApiError(code, f"{path}: a number must be finite")
    return int(number) if number.is_integer() and abs(number) <= EXACT else number


def check_attributes(
    attributes: Mapping[str, Any], limits: Limits, code: int
) -> dict[str, AttributeValue | None]:
    """As a device's owner sets them: None removes one."""
    if len(attributes) > limits.max_attributes:
        raise ApiError(
            7013, f"attributes: a device has at most {limits.max_attributes}, not {len(attributes)}"
        )
    checked: dict[str, AttributeValue | None] = {}
    for name, value in attributes.items():
        path = f"attributes.{check_name(name, 'attributes', limits, code)}"
        if name in TEXTS and not isinstance(value, str | None):
            raise ApiError(code, f"{path}: must be text")
        checked[name] = None if value is None else check_value(value, path, limits, code)
    return checked


def changed(
    attributes: Mapping[str, AttributeValue], change: Mapping[str, AttributeValue | None]
) -> Mapping[str, AttributeValue]:
    """`attributes` after a DeviceChange."""
    if not change:
        return attributes
    return {name: value for name, value in {**attributes, **change}.items() if value is not None}


def version_code(text: str) -> int | None:
    """Sorts as versions do; None if the text is none. Up to four numbers below 65,536 with dots between; a leading v,
    and what follows after -, + or a blank, do not count."""
    match = _VERSION.fullmatch(text)
    if match is None:
        return None
    parts = [int(part) for part in match[1].split(".")]
    if max(parts) >= 1 << 16:
        return None
    code = 0
    for part in parts + [0] * (VERSION_PARTS - len(parts)):
        code = code << 16 | part
    return code


def number_code(value: float) -> int:
    """Of the number without its sign."""
    (code,) = struct.unpack(">Q", struct.pack(">d", abs(value)))
    return int(code)


# Terms: name \0 kind rest. A name cannot have a \0


def _term(name: str, rest: str) -> TermKey:
    return Term.ATTRIBUTE, f"{name}\0{rest}"


def _has(name: str) -> TermKey:
    return _term(name, "")


def _equal(name: str, value: str | bool) -> TermKey:
    return _term(name, f"?{value:d}" if isinstance(value, bool) else f"={value}")


def _digit(name: str, kind: str, digit: int) -> TermKey:
    return _term(name, f"{kind}{digit}")


def _ones(name: str, kind: str, code: int) -> Iterator[TermKey]:
    yield _term(name, kind)
    while code:
        lowest = code & -code
        yield _digit(name, kind, lowest.bit_length() - 1)
        code ^= lowest


def terms(name: str, value: AttributeValue) -> Iterator[TermKey]:
    """The index terms that hold for a device with this attribute."""
    yield _has(name)
    if isinstance(value, str | bool):
        yield _equal(name, value)
        version = version_code(value) if isinstance(value, str) else None
        if version is not None:
            yield from _ones(name, "v", version)
        return
    if value < 0:
        yield _term(name, "-")
    yield from _ones(name, "#", number_code(value))


def term_changes(
    before: Mapping[str, AttributeValue], after: Mapping[str, AttributeValue]
) -> tuple[set[TermKey], set[TermKey]]:
    """The terms that hold no more, and those that hold now. Of a number that changes, only the digits that do."""
    old: set[TermKey] = set()
    new: set[TermKey] = set()
    for name in before.keys() | after.keys():
        was, now = before.get(name), after.get(name)
        if was is not None and (was != now or type(was) is not type(now)):
            old.update(terms(name, was))
        if now is not None and (was != now or type(was) is not type(now)):
            new.update(terms(name, now))
    return old - new, new - old


# Questions


class Question(msgspec.Struct, frozen=True):
    """What is asked about one attribute. `!=` holds for devices that have the attribute with another value."""

    name: str
    op: str  # one of OPERATORS
    values: tuple[AttributeValue, ...] = ()  # one; two of between; some of in; none of exists

    def terms(self) -> Iterator[TermKey]:
        """The posting lists that the answer needs."""
        if self.op in ("exists", "!="):
            yield _has(self.name)
        for value in self.values:
            if self.op not in ORDER and isinstance(value, str | bool):
                yield _equal(self.name, value)
            elif isinstance(value, str):
                yield from _slices(self.name, "v", VERSION_BITS)
            else:
                yield _term(self.name, "-")
                yield from _slices(self.name, "#", NUMBER_BITS)

    @property
    def sliced(self) -> bool:
        """It is about numbers or versions: some 64 lists and a millisecond for each value, a million devices."""
        return any(self.op in ORDER or not isinstance(value, str | bool) for value in self.values)

    def parts(self) -> Iterator[Question]:
        """Questions that together have the same answer, each the work of a few milliseconds."""
        if self.op != "in":
            yield self
            return
        for start in range(0, len(self.values), VALUES_AT_ONCE):
            yield Question(self.name, "in", self.values[start : start + VALUES_AT_ONCE])

    def answer(self, lists: Lists) -> BitMap:
        """The devices. May be one of the lists: it must not be changed."""
        match self.op:
            case "exists":
                return lists[_has(self.name)]
            case "!=":
                return lists[_has(self.name)] - self._equals(self.values[0], lists)
            case "=" | "in":
                return BitMap.union(*[self._equals(value, lists) for value in self.values])
            case "between":
                low, high = self.values
                return self._compare(">=", low, lists) & self._compare("<=", high, lists)
        return self._compare(self.op, self.values[0], lists)

    def _equals(self, value: AttributeValue, lists: Lists) -> BitMap:
        if isinstance(value, str | bool):
            return lists[_equal(self.name, value)]
        has, digits = _read_slices(self.name, "#", NUMBER_BITS, lists)
        negative = lists[_term(self.name, "-")]
        return equals(has & negative if value < 0 else has - negative, digits, number_code(value))

    def _compare(self, op: str, bound: AttributeValue, lists: Lists) -> BitMap:
        if isinstance(bound, str):
            code = version_code(bound)
            assert code is not None, "read_question lets only versions through"
            less, equal, more = split(*_read_slices(self.name, "v", VERSION_BITS, lists), code)
        else:
            less, equal, more = _split_numbers(self.name, bound, lists)
        side = less if op[0] == "<" else more
        return side | equal if op[1:] else side


def read_question(name: Any, op: Any, value: Any, path: str, limits: Limits) -> Question:
    """Raises ApiError 1003, naming the key below `path`."""
    if not isinstance(name, str):
        raise ApiError(1003, f"{path}.attribute: must be a name")
    check_name(name, f"{path}.attribute", limits, 1003)
    if op not in OPERATORS:
        raise ApiError(1003, f"{path}.op: must be one of {' '.join(OPERATORS)}")
    question = Question(name, op, _read_values(op, value, f"{path}.value", limits))
    if op in ORDER:
        _check_order(question.values, f"{path}.value")
    return question


def _read_values(op: str, value: Any, path: str, limits: Limits) -> tuple[AttributeValue, ...]:
    if op == "exists":
        if value is not None:
            raise ApiError(1003, f"{path}: exists takes no value")
        return ()
    if op not in ("in", "between"):
        return (check_value(value, path, limits, 1003),)
    if not isinstance(value, list) or not value or (op == "between" and len(value) != 2):
        raise ApiError(1003, f"{path}: must be a list of {'two values' if op == 'between' else 'values'}")
    return tuple(check_value(one, f"{path}[{i}]", limits, 1003) for i, one in enumerate(value))


def _check_order(values: Sequence[AttributeValue], path: str) -> None:
    texts = [value for value in values if isinstance(value, str)]
    if any(isinstance(value, bool) for value in values) or 0 < len(texts) < len(values):
        raise ApiError(1003, f"{path}: numbers are compared with numbers, versions with versions")
    if any(version_code(text) is None for text in texts):
        raise ApiError(1003, f"{path}: must be a number, or a version such as 2.3.1")


# The slices


def _slices(name: str, kind: str, width: int) -> Iterator[TermKey]:
    yield _term(name, kind)
    for digit in range(width):
        yield _digit(name, kind, digit)


def _read_slices(name: str, kind: str, width: int, lists: Lists) -> tuple[BitMap, list[BitMap]]:
    """Who has a code, and its digits, the highest first."""
    digits = [lists[_digit(name, kind, digit)] for digit in reversed(range(width))]
    return lists[_term(name, kind)], digits


def equals(has: BitMap, digits: Sequence[BitMap], code: int) -> BitMap:
    """The devices in `has` with this code. `digits`: highest first."""
    for place, ones in zip(reversed(range(len(digits))), digits, strict=True):
        if not has:
            break
        has = has & ones if code >> place & 1 else has - ones
    return has


def split(has: BitMap, digits: Sequence[BitMap], bound: int) -> tuple[BitMap, BitMap, BitMap]:
    """The devices in `has` whose code is less than `bound`, equal, and more. `digits`: highest first."""
    less, equal, more = BitMap(), has.copy(), BitMap()
    for place, ones in zip(reversed(range(len(digits))), digits, strict=True):
        if not equal:
            break
        if bound >> place & 1:
            less |= equal - ones
            equal &= ones
        elif ones:
            more |= equal & ones
            equal -= ones
    return less, equal, more


def _split_numbers(name: str, bound: float, lists: Lists) -> tuple[BitMap, BitMap, BitMap]:
    has, digits = _read_slices(name, "#", NUMBER_BITS, lists)
    negative = lists[_term(name, "-")]
    code = number_code(bound)
    if bound < 0:  # the greater the code, the less the number
        more, equal, less = split(has & negative, digits, code)
        return less, equal, more | (has - negative)
    less, equal, more = split(has - negative, digits, code)
    return less | (has & negative), equal, more
