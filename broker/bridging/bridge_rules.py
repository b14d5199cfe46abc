"""Rules of the bridge: which topic of a foreign broker becomes which push. A TOML file:

    [[rule]]
    topic = "orders/{order}/shipped"
    app = "<app key>"
    audience = { alias = ["{order}"] }
    notification = { alert = "Order {order}: {payload.text}" }

In the texts of a push, `{order}` stands for that level of the topic, `{topic}` for all of it, `{payload}` for the
payload as text, `{payload.a.b}` for a field of a JSON payload; `{{` and `}}` for braces. A text that is one
`{payload.…}` and nothing else takes the field's JSON value, be it a number, a list or an object.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from broker.errors import ApiError
from broker.limits import Limits
from broker.pushing.requests import read_push

RULE_KEYS: Final = (
    "topic",
    "app",
    "payload",
    "platform",
    "audience",
    "notification",
    "message",
    "options",
    "cid",
)
PUSH_KEYS: Final = ("platform", "audience", "notification", "message", "options")
MAX_RULES: Final = 1000
PLACEHOLDER: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RESERVED: Final = ("payload", "topic")


class RulesError(Exception):
    """The rules are wrong; `errors` has one line for each mistake."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


class Unfit(Exception):
    """A message that a rule cannot make a push of; the text says why, without the payload."""


@dataclass(slots=True)
class Incoming:
    """A message of the foreign broker, as the rules see it."""

    topic: str
    payload: bytes
    cid: str | None = None  # the publisher's own mark: a second message with it is the first one again
    _json: Any = field(default=None, repr=False)
    _read: bool = False

    @property
    def text(self) -> str:
        try:
            return self.payload.decode()
        except UnicodeDecodeError:
            raise Unfit("the payload is not UTF-8") from None

    @property
    def json(self) -> Any:
        if not self._read:
            try:
                self._json = orjson.loads(self.payload)
            except orjson.JSONDecodeError:
                raise Unfit("the payload is not JSON") from None
            self._read = True
        return self._json


# Texts with placeholders

Values = Mapping[str, str]  # of the topic's levels
Render = Callable[[Incoming, Values], Any]


def compile_template(value: object, names: Sequence[str]) -> Render:
    """`value`: what TOML gives. Raises ValueError where a placeholder is wrong."""
    match value:
        case str():
            return _compile_text(value, names)
        case dict():
            fields = {key: compile_template(item, names) for key, item in value.items()}
            return lambda message, values: {key: render(message, values) for key, render in fields.items()}
        case list():
            items = [compile_template(item, names) for item in value]
            return lambda message, values: [render(message, values) for render in items]
        case _:
            return lambda _message, _values: value


def _compile_text(text: str, names: Sequence[str]) -> Render:
    pieces: list[Render] = []
    end = 0
    for found in PLACEHOLDER.finditer(text):
        pieces.append(_constant(text[end : found.start()]))
        pieces.append(_compile_placeholder(found, text, names))
        end = found.end()
    if not pieces:
        return _constant(text)
    pieces.append(_constant(text[end:]))
    if is_field(text):
        return pieces[1]
    return lambda message, values: "".join(_as_text(piece(message, values)) for piece in pieces)


def _constant(text: str) -> Render:
    return lambda _message, _values: text


def is_field(text: str) -> bool:
    """One field of the payload and nothing else: it keeps its type."""
    found = PLACEHOLDER.fullmatch(text)
    return found is not None and (found[1] or "").startswith("payload.")


def _compile_placeholder(found: re.Match[str], text: str, names: Sequence[str]) -> Render:
    if found[0] in ("{{", "}}"):
        return _constant(found[0][0])
    name = found[1]
    if name is None:
        raise ValueError(f"a single {found[0]} in {text!r}; write {found[0] * 2} for a brace")
    if name == "payload":
        return lambda message, _values: message.text
    if name == "topic":
        return lambda message, _values: message.topic
    if name.startswith("payload."):
        path = name.split(".")[1:]
        if not all(path):
            raise ValueError(f"{{{name}}}: a field's name is empty")
        return lambda message, _values: _find_field(message.json, path)
    if name not in names:
        allowed = ", ".join(f"{{{known}}}" for known in (*names, "topic", "payload", "payload.FIELD"))
        raise ValueError(f"{{{name}}} is not known here; there is {allowed}")
    return lambda _message, values: values[name]


def _find_field(value: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(value, dict) or name not in value:
            raise Unfit(f"the payload has no field {'.'.join(path)}")
        value = value[name]
    return value


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


# Topics


@dataclass(frozen=True, slots=True)
class Pattern:
    """A topic filter whose levels may have names."""

    text: str
    levels: tuple[str, ...]  # of the filter: "+" in the place of names
    names: tuple[str | None, ...]

    @property
    def filter(self) -> str:
        return "/".join(self.levels)

    def match(self, topic: str) -> dict[str, str] | None:
        """The named levels; None: another topic."""
        levels = topic.split("/")
        values: dict[str, str] = {}
        if topic.startswith("$") and not self.levels[0].startswith("$"):
            return None  # MQTT5-4.7.2-1
        for position, wanted in enumerate(self.levels):
            if wanted == "#":
                return values
            if position == len(levels) or wanted not in ("+", levels[position]):
                return None
            name = self.names[position]
            if name is not None:
                values[name] = levels[position]
        return values if len(levels) == len(self.levels) else None

    def overlaps(self, other: Pattern) -> bool:
        """Is there a topic that fits both?"""
        for one, two in itertools.zip_longest(self.levels, other.levels):
            if "#" in (one, two):
                return True
            if one != two and (one is None or two is None or "+" not in (one, two)):
                return False
        return True


def read_pattern(text: object) -> Pattern:
    """Raises ValueError."""
    if not isinstance(text, str) or not text or "\0" in text or len(text.encode()) > 65_535:
        raise ValueError("must be a topic such as orders/{order}/shipped")
    if text.startswith("$share/"):
        raise ValueError("must be without $share/; bridge.group shares the work among several servers")
    levels: list[str] = []
    names: list[str | None] = []
    parts = text.split("/")
    for position, level in enumerate(parts):
        named = level[1:-1] if len(level) > 2 and level[0] == "{" and level[-1] == "}" else None
        if named is not None and (not NAME.fullmatch(named) or named in RESERVED or named in names):
            raise ValueError(
                f"{level}: must be a name of its own, of letters, digits and _, not payload or topic"
            )
        if named is None and any(c in level for c in "{}"):
            raise ValueError(f"{level}: a name must fill its level, such as /{{order}}/")
        if ("+" in level or "#" in level) and len(level) > 1:
            raise ValueError(f"{level}: + and # must fill their level")
        if level == "#" and position < len(parts) - 1:
            raise ValueError("# must be the last level")
        levels.append("+" if named is not None else level)
        names.append(named)
    return Pattern(text, tuple(levels), tuple(names))


# Rules


@dataclass(frozen=True, slots=True)
class Rule:
    number: int  # from 1, as in the file
    pattern: Pattern
    app: str
    push: Render | None  # None: the payload is the whole push
    cid: Render | None

    def make_push(self, message: Incoming, values: Values) -> bytes:
        """The push object, as the API takes it. Raises Unfit."""
        push = message.json if self.push is None else self.push(message, values)
        if not isinstance(push, dict):
            raise Unfit("the payload is not a push object")
        cid = self._cid(message, values)
        return orjson.dumps({**push, "cid": cid} if cid is not None else push)

    def _cid(self, message: Incoming, values: Values) -> str | None:
        if self.cid is not None:
            return _as_text(self.cid(message, values))
        if message.cid is None:
            return None
        return f"{message.cid}#{self.number}"  # several rules may push the same message to one app


def read_rules(file: Path, limits: Limits | None = None) -> tuple[Rule, ...]:
    """Raises RulesError with every mistake."""
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RulesError([f"{file}: cannot be read: {error}"]) from error
    except tomllib.TOMLDecodeError as error:
        raise RulesError([f"{file}: not valid TOML: {error}"]) from error
    errors = [f"{file}: {key}: unknown; there is [[rule]]" for key in document if key != "rule"]
    tables = document.get("rule")
    if not isinstance(tables, list) or not 1 <= len(tables) <= MAX_RULES:
        raise RulesError([*errors, f"{file}: rule: must be 1 to {MAX_RULES} tables, each [[rule]]"])
    rules: list[Rule] = []
    for number, table in enumerate(tables, 1):
        wrong = list(_mistakes(table)) if isinstance(table, dict) else ["must be a table, [[rule]]"]
        if not wrong:
            rule = _make_rule(number, table)
            wrong = list(_dry_run(rule, table, limits or Limits()))
            rules.append(rule)
        errors += [f"{file}: rule {number}: {line}" for line in wrong]
    errors += [f"{file}: {line}" for line in _overlaps(rules)]
    if errors:
        raise RulesError(errors)
    return tuple(rules)


def _mistakes(table: dict[str, Any]) -> Iterator[str]:
    """Key by key."""
    for key, value in table.items():
        if key not in RULE_KEYS:
            yield f"{key} = {value!r}: unknown key; there is {', '.join(RULE_KEYS)}"
    try:
        pattern = read_pattern(table.get("topic"))
    except ValueError as error:
        yield f"topic = {table.get('topic')!r}: {error}"
    else:
        yield from _wrong_placeholders(table, _names(pattern))
    if not isinstance(table.get("app"), str) or not table["app"]:
        yield f"app = {table.get('app')!r}: must be an app key"
    if table.get("payload", "push") != "push":
        yield f'payload = {table["payload"]!r}: must be "push" (the payload is a push object), or be left out'
    given = [key for key in PUSH_KEYS if key in table]
    if "payload" in table and given:
        yield f"{given[0]} = {table[given[0]]!r}: must be left out where payload is set"
    if "payload" not in table and "notification" not in table and "message" not in table:
        yield "notification or message, or payload: must be set"
    if "payload" not in table and "audience" not in table:
        yield 'audience: must be set, such as "all" or { alias = ["{name}"] }'
    if not isinstance(table.get("cid", ""), str):
        yield f"cid = {table['cid']!r}: must be text"


def _wrong_placeholders(table: dict[str, Any], names: Sequence[str]) -> Iterator[str]:
    for key in (*PUSH_KEYS, "cid"):
        try:
            compile_template(table.get(key), names)
        except ValueError as error:
            yield f"{key} = {table[key]!r}: {error}"


def _names(pattern: Pattern) -> tuple[str, ...]:
    return tuple(name for name in pattern.names if name is not None)


def _make_rule(number: int, table: dict[str, Any]) -> Rule:
    pattern = read_pattern(table["topic"])
    names = _names(pattern)
    push = {"platform": "all"} | {key: table[key] for key in PUSH_KEYS if key in table}
    return Rule(
        number,
        pattern,
        table["app"],
        None if "payload" in table else compile_template(push, names),
        compile_template(table["cid"], names) if "cid" in table else None,
    )


def _dry_run(rule: Rule, table: dict[str, Any], limits: Limits) -> Iterator[str]:
    """Check the push that a message would give, where that does not hang on the types in its payload."""
    if rule.push is None or _has_typed_field(table):
        return
    values = dict.fromkeys(_names(rule.pattern), "1")
    push = rule.push(_Anything("1", b"1"), values)
    try:
        read_push(orjson.dumps(push), limits)
    except ApiError as error:
        yield f"is no push: {error.message}"


class _Anything(Incoming):
    """Has any field."""

    @property
    def json(self) -> Any:
        return _AnyField()


class _AnyField(dict[str, Any]):
    def __contains__(self, _key: object) -> bool:
        return True

    def __missing__(self, _key: str) -> Any:
        return self


def _has_typed_field(value: object) -> bool:
    match value:
        case str():
            return is_field(value)
        case dict():
            return any(map(_has_typed_field, value.values()))
        case list():
            return any(map(_has_typed_field, value))
        case _:
            return False


def _overlaps(rules: Sequence[Rule]) -> Iterator[str]:
    """A broker may send a message once for each of two filters that it fits, and it would be pushed twice."""
    for one, two in itertools.combinations(rules, 2):
        if one.pattern.filter != two.pattern.filter and one.pattern.overlaps(two.pattern):
            yield (
                f"rule {two.number}: topic = {two.pattern.text!r}: some topics also fit rule {one.number},"
                f" {one.pattern.text!r}; make both the same filter, or such that none fits both"
            )
