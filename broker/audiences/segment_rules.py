"""The rule language of segments: who belongs to one, as algebra over posting lists. Read once with every limit
checked, then a tree of a few frozen nodes; answered from posting lists, in steps that leave the event loop free.

    rule = {"and": [rule, …]} | {"or": [rule, …]} | {"not": rule}
         | {"tag": name} | {"alias": name} | {"platform": name}
         | {"attribute": name, "op": "=" | "!=" | "<" | "<=" | ">" | ">=" | "between" | "in" | "exists", "value": …}
         | {"last_active": {"within": days}} | {"last_active": {"before": days}}
         | {"registered": {"since": day or Unix time, "before": day or Unix time}}

`docs/segment-rule.schema.json` says the same as a JSON schema.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

import msgspec
from pyroaring import BitMap

from broker.audiences.attributes import Question, read_question
from broker.errors import ApiError
from broker.limits import DAY, Limits
from broker.model import PLATFORMS, Activity, Term, TermKey
from broker.store import Store

MAX_DAYS: Final = 366  # of last_active
SLICED_PARTS: Final = 8  # that a question about numbers or versions counts for more: it is 64 posting lists
EVERYONE: Final[TermKey] = (Term.ALL, "")


class All(msgspec.Struct, frozen=True):
    rules: tuple[Rule, ...]


class AnyOf(msgspec.Struct, frozen=True):
    rules: tuple[Rule, ...]


class Not(msgspec.Struct, frozen=True):
    rule: Rule


class Has(msgspec.Struct, frozen=True):
    term: TermKey


class LastActive(msgspec.Struct, frozen=True):
    """Was online in the last `days`, or (not `within`) was not: a device that never was, counts as such."""

    days: float
    within: bool


class Registered(msgspec.Struct, frozen=True):
    """From `since` on, and before `before` (Unix times)."""

    since: float | None
    before: float | None


Rule: TypeAlias = All | AnyOf | Not | Has | Question | LastActive | Registered


# Reading

_BOUNDLESS: Final = 1 << 40
_NO_LIMITS: Final = Limits(
    max_rule_depth=_BOUNDLESS,
    max_rule_parts=_BOUNDLESS,
    max_rule_times=_BOUNDLESS,
    attribute_name_size=_BOUNDLESS,
    attribute_text_size=_BOUNDLESS,
    name_size=_BOUNDLESS,
)


class _Reader:
    """Counts what is read, so that no rule costs more than the limits say."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._parts = 0
        self._times = 0

    def read(self, rule: Any, path: str, depth: int = 1) -> Rule:
        if depth > self._limits.max_rule_depth:
            raise ApiError(1003, f"{path}: rules may be nested {self._limits.max_rule_depth} levels deep")
        self._spend(1, path)
        if not isinstance(rule, dict) or not rule:
            raise ApiError(1003, f'{path}: must be an object such as {{"tag": "red"}}')
        key = "attribute" if "attribute" in rule else next(iter(rule))
        _only_keys(rule, {"attribute", "op", "value"} if key == "attribute" else {key}, path)
        return self._read_one(key, rule, path, depth)

    def _read_one(self, key: str, rule: dict[str, Any], path: str, depth: int) -> Rule:
        value, inner = rule[key], f"{path}.{key}"
        match key:
            case "and" | "or":
                rules = self._read_many(value, inner, depth)
                return All(rules) if key == "and" else AnyOf(rules)
            case "not":
                return Not(self.read(value, inner, depth + 1))
            case "tag" | "alias":
                return Has((Term.TAG if key == "tag" else Term.ALIAS, _read_name(value, inner, self._limits)))
            case "platform":
                if value not in PLATFORMS:
                    raise ApiError(1003, f"{inner}: must be one of {', '.join(PLATFORMS)}")
                return Has((Term.PLATFORM, value))
            case "attribute":
                question = read_question(value, rule.get("op"), rule.get("value"), path, self._limits)
                self._spend(len(question.values) + (SLICED_PARTS if question.sliced else 0), path)
                return question
            case "last_active":
                return self._read_last_active(value, inner)
            case "registered":
                return _read_registered(value, inner)
        raise ApiError(1003, f"{path}.{key:.40}: there is no such condition")

    def _read_many(self, rules: Any, path: str, depth: int) -> tuple[Rule, ...]:
        if not isinstance(rules, list) or not rules:
            raise ApiError(1003, f"{path}: must be a list of rules, at least one")
        return tuple(self.read(rule, f"{path}[{i}]", depth + 1) for i, rule in enumerate(rules))

    def _read_last_active(self, value: Any, path: str) -> LastActive:
        self._times += 1
        if self._times > self._limits.max_rule_times:
            raise ApiError(1003, f"{path}: at most {self._limits.max_rule_times} of these in one rule")
        if not isinstance(value, dict) or len(value) != 1 or not value.keys() <= {"within", "before"}:
            raise ApiError(1003, f'{path}: must be {{"within": days}} or {{"before": days}}')
        ((key, days),) = value.items()
        if isinstance(days, bool) or not isinstance(days, int | float) or not 0 < days <= MAX_DAYS:
            raise ApiError(1003, f"{path}.{key}: must be above 0, up to {MAX_DAYS} days")
        return LastActive(days, key == "within")

    def _spend(self, parts: int, path: str) -> None:
        self._parts += parts
        if self._parts > self._limits.max_rule_parts:
            raise ApiError(
                1003, f"{path}: a rule has at most {self._limits.max_rule_parts} conditions and values"
            )


class StoredSegment(msgspec.Struct, frozen=True):
    """The value of a record of kind "segment"; its key is the segment's id."""

    name: str
    rule: Any  # as JSON

    def read_rule(self) -> Rule:
        """It was within the limits when it was saved."""
        return _Reader(_NO_LIMITS).read(self.rule, "rule")


KIND: Final = "segment"
_decode: Final = msgspec.json.Decoder(StoredSegment).decode


async def find_segment(store: Store, app_id: int, segment_id: str) -> StoredSegment | None:
    record = await store.records.find(app_id, KIND, segment_id)
    return None if record is None else _decode(record.value)


def read_rule(rule: Any, limits: Limits, path: str = "rule") -> Rule:
    """`rule` as decoded JSON. Raises ApiError 1003 that says where and what."""
    return _Reader(limits).read(rule, path)


def _only_keys(rule: dict[str, Any], known: set[str], path: str) -> None:
    for key in rule:
        if key not in known:
            raise ApiError(1003, f"{path}.{key:.40}: not expected beside {', '.join(sorted(known))}")


def _read_name(value: Any, path: str, limits: Limits) -> str:
    if not isinstance(value, str) or not 0 < len(value.encode("utf-8", "replace")) <= limits.name_size:
        raise ApiError(1003, f"{path}: must be a name of 1 to {limits.name_size} bytes")
    return value


def _read_registered(value: Any, path: str) -> Registered:
    if not isinstance(value, dict) or not value or not value.keys() <= {"since", "before"}:
        raise ApiError(1003, f'{path}: must be {{"since": …, "before": …}}, or one of the two')
    times = {key: _read_time(time, f"{path}.{key}") for key, time in value.items()}
    return Registered(times.get("since"), times.get("before"))


def _read_time(value: Any, path: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e11:
        return float(value)
    try:
        return datetime.strptime(value, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except (TypeError, ValueError):
        raise ApiError(1003, f"{path}: must be a day as YYYY-MM-DD (UTC) or a Unix time") from None


# Answering


class Facts(msgspec.Struct, frozen=True):
    """What a rule is answered from. Nothing in it is changed."""

    lists: Mapping[TermKey, BitMap]
    sliced: Mapping[int, BitMap] = {}  # id() of a question about numbers or versions -> its answer
    active: Mapping[float, BitMap] = {}  # days -> who was online in them
    older: Mapping[float, int] = {}  # time -> devnos below this number were registered before it


def nodes(rule: Rule) -> Iterator[Rule]:
    """The rule and all below it."""
    yield rule
    match rule:
        case All(rules) | AnyOf(rules):
            for inner in rules:
                yield from nodes(inner)
        case Not(inner):
            yield from nodes(inner)


def terms(rule: Rule) -> set[TermKey]:
    """The posting lists that it needs, without those of sliced questions."""
    found = {EVERYONE}
    for node in nodes(rule):
        match node:
            case Has(term):
                found.add(term)
            case Question() if not node.sliced:
                found.update(node.terms())
    return found


def answer(rule: Rule, facts: Facts) -> BitMap:
    """The devices it holds for; the caller owns the result."""
    return _answer(rule, facts) & facts.lists[EVERYONE]


def _answer(rule: Rule, facts: Facts) -> BitMap:
    """May be one of the facts."""
    match rule:
        case All(rules):
            return BitMap.intersection(*_answers(rules, facts))
        case AnyOf(rules):
            return BitMap.union(*_answers(rules, facts))
        case Not(inner):
            return facts.lists[EVERYONE] - _answer(inner, facts)
        case Has(term):
            return facts.lists[term]
        case Question():
            return facts.sliced[id(rule)] if rule.sliced else rule.answer(facts.lists)
        case LastActive(days, within):
            there = facts.active[days]
            return there if within else facts.lists[EVERYONE] - there
        case Registered(since, before):
            everyone = facts.lists[EVERYONE]
            first = 0 if since is None else facts.older[since]
            end = _end(everyone) if before is None else facts.older[before]
            return BitMap(range(first, end)) if first < end else BitMap()


def _end(devnos: BitMap) -> int:
    return int(devnos.max()) + 1 if devnos else 0


def _answers(rules: Sequence[Rule], facts: Facts) -> list[BitMap]:
    return [_answer(rule, facts) for rule in rules]


async def resolve_rules(store: Store, app_id: int, rules: Sequence[Rule], now: float) -> list[BitMap]:
    """The devices of each rule; the caller owns the results. One look-up of posting lists for all rules, and one for
    each question about numbers or versions."""
    keys = list(set().union(*map(terms, rules)))
    found = [node for rule in rules for node in nodes(rule)]
    times = {
        time
        for node in found
        if isinstance(node, Registered)
        for time in (node.since, node.before)
        if time is not None
    }
    active = {
        node.days: await _active(store, app_id, node.days, now)
        for node in found
        if isinstance(node, LastActive)
    }
    older = dict(zip(times, await store.registered_before(app_id, list(times)), strict=True)) if times else {}
    sliced = {
        id(node): await _answer_sliced(store, app_id, node)
        for node in found
        if isinstance(node, Question) and node.sliced
    }
    lists = dict(zip(keys, await store.postings(app_id, keys), strict=True))
    facts = Facts(lists, sliced, active, older)
    return [answer(rule, facts) for rule in rules]


async def _answer_sliced(store: Store, app_id: int, question: Question) -> BitMap:
    """Its lists, some megabytes, are held for no longer than this takes, and others get their turn meanwhile."""
    keys = list(dict.fromkeys(question.terms()))
    lists = dict(zip(keys, await store.postings(app_id, keys), strict=True))
    devnos = BitMap()
    for part in question.parts():
        devnos |= part.answer(lists)
        await asyncio.sleep(0)
    return devnos


async def _active(store: Store, app_id: int, days: float, now: float) -> BitMap:
    """Who is online is there, whether its hour was noted yet or not."""
    there = await store.active(app_id, Activity.ONLINE, now - days * DAY, now)
    return there | await store.online(app_id)
