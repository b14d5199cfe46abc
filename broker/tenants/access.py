"""Access rules: who may publish and subscribe where among the ordinary topics of one app (decision 0009).

    [{"allow": "publish", "topic": "up/{registration_id}/#", "who": "devices"}, …]

The first rule that fits decides. A rule fits a message if its filter matches the topic. For a subscription an
allow rule fits only if it covers *everything* the wanted filter can match, a deny rule already if it touches any of
it: so what was granted needs no look at its messages. Where none fits, publishers and everybody in an open app
may, a device may not.

Filters are compared level by level, from the left, and never further than the longest rule of the app: the cost
follows from the rules and not from what a peer sends. `#` alone is kept as `+/#`, which matches the same: every topic
has a level. Wildcards in the first level do not reach topics that begin with `$` (MQTT5-4.7.2-1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

from broker.errors import ApiError
from broker.model import AccessRule, App

MAX_RULES: Final = 100  # of one app: each message of an app with rules may be compared with all of them
MAX_RULE_TOPIC: Final = 1024  # bytes of a rule's filter: bounds its levels, and so the cost of a comparison
MAX_SHOWN: Final = 100  # characters of a wrong value in its error

PLACEHOLDER: Final = "{registration_id}"
ACTIONS: Final = ("publish", "subscribe", "all")
WHO: Final = ("devices", "publishers", "everyone")
KEYS: Final = ("allow", "deny", "topic", "who")

Role: TypeAlias = Literal["device", "publisher"]
ROLES: Final[tuple[Role, ...]] = ("device", "publisher")
Levels: TypeAlias = Sequence[str]


class Access:
    """What the peers of one app may do, as its rules say now. A new one is made when they change.

    Both questions take the peer's role and name: the registration id of a device, the client id of a publisher.
    Neither concerns the reserved topics, which are not under these rules; the caller looks for those first.
    """

    __slots__ = ("_default", "_depth", "_publish", "_subscribe")

    def __init__(self, app: App) -> None:
        rules = {
            role: [rule for rule in app.access if rule.who in (role + "s", "everyone")] for role in ROLES
        }
        self._publish = {role: _compiled(rules[role], "publish") for role in ROLES}
        self._subscribe = {role: _compiled(rules[role], "subscribe") for role in ROLES}
        self._default = {"device": app.open, "publisher": True}
        self._depth = max((len(split_filter(rule.topic)) for rule in app.access), default=0)

    def may_publish(self, role: Role, name: str, topic: str) -> bool:
        """Whether this peer may publish to a topic name, will and retained messages included. Never to `$SYS`."""
        if _is_sys(topic):
            return False
        rules = self._publish[role]
        if rules:
            levels = topic.split("/", self._depth)
            for rule in rules:
                own = rule.levels_for(name)
                if own is not None and covers(own, levels):
                    return rule.allow
        return self._default[role]

    def may_subscribe(self, role: Role, name: str, topic_filter: str) -> bool:
        """Whether this peer may have a subscription, of a valid filter without `$share/<group>/`, which the caller
        takes off. `$SYS` is open only by a rule that begins with `$SYS/`."""
        rules = self._subscribe[role]
        if rules:
            levels = split_filter(topic_filter, self._depth)
            for rule in rules:
                own = rule.levels_for(name)
                if own is not None and (covers(own, levels) if rule.allow else overlaps(own, levels)):
                    return rule.allow
        return self._default[role] and not _is_sys(topic_filter)


class _Compiled:
    """A rule in the form in which it is compared."""

    __slots__ = ("_levels", "_named", "allow")

    def __init__(self, rule: AccessRule) -> None:
        self.allow = rule.allow
        self._levels = tuple(split_filter(rule.topic))
        self._named = PLACEHOLDER in self._levels

    def levels_for(self, name: str) -> Levels | None:
        """With the peer's name in place. None where the rule is not for such a name: one that would be more than
        one level, a wildcard, or (as the first level) a topic of the server."""
        if not self._named:
            return self._levels
        if not name or "+" in name or "#" in name or "/" in name:
            return None
        if name[0] == "$" and self._levels[0] == PLACEHOLDER:
            return None
        return [name if level == PLACEHOLDER else level for level in self._levels]


def _compiled(rules: Sequence[AccessRule], action: str) -> tuple[_Compiled, ...]:
    return tuple(_Compiled(rule) for rule in rules if rule.action in (action, "all"))


def _is_sys(topic: str) -> bool:
    return topic[:4] == "$SYS" and topic[4:5] in ("", "/")


# Filters


def split_filter(topic_filter: str, depth: int = -1) -> list[str]:
    """Its levels. What lies beyond the first `depth` of them stays in one piece, which `covers` and `overlaps` only
    look at to see whether it is `#`: a filter of 60,000 levels is split into as many as the rules have."""
    return ["+", "#"] if topic_filter == "#" else topic_filter.split("/", depth)


def covers(rule: Levels, wanted: Levels) -> bool:
    """Whether `rule` matches every topic that `wanted` matches; both are `split_filter`'s, or `wanted` a topic's."""
    if rule[0] == "+" and wanted[0][:1] == "$":
        return False
    for level, asked in zip(rule, wanted, strict=False):
        if level == "#":
            return True
        if asked == "#" or level not in ("+", asked):
            return False
    return len(rule) == len(wanted) or (len(rule) > len(wanted) and rule[len(wanted)] == "#")


def overlaps(rule: Levels, wanted: Levels) -> bool:
    """Whether some topic is matched by both."""
    if (rule[0] == "+" and wanted[0][:1] == "$") or (wanted[0] == "+" and rule[0][:1] == "$"):
        return False
    for level, asked in zip(rule, wanted, strict=False):
        if "#" in (level, asked):
            return True
        if level != asked and "+" not in (level, asked):
            return False
    shorter, longer = sorted((rule, wanted), key=len)
    if len(shorter) < len(longer):
        # `#` stands for no level here; the rest is no topic if it is empty (MQTT5-4.7.3-1).
        return longer[len(shorter)] == "#" and not (len(shorter) == 1 and "" in (rule[0], wanted[0]))
    return True


# Rules as JSON


def parse_rules(value: object) -> tuple[AccessRule, ...]:
    """The rules of a decoded JSON document. Raises ApiError (1003) that names rule, key, value and what is
    allowed."""
    if not isinstance(value, list):
        raise ApiError(1003, f"access rules = {_show(value)}: must be a list")
    if len(value) > MAX_RULES:
        raise ApiError(1003, f"{len(value)} access rules: must be at most {MAX_RULES}")
    return tuple(_Parser(index).parse(entry) for index, entry in enumerate(value))


def describe_rules(rules: Sequence[AccessRule]) -> list[dict[str, str]]:
    """The same the other way."""
    return [
        {"allow" if rule.allow else "deny": rule.action, "topic": rule.topic, "who": rule.who}
        for rule in rules
    ]


class _Parser:
    def __init__(self, index: int) -> None:
        self._rule = f"rule {index}"

    def parse(self, entry: object) -> AccessRule:
        if not isinstance(entry, dict):
            raise ApiError(1003, f"{self._rule} = {_show(entry)}: must be an object")
        for key in entry:
            if key not in KEYS:
                raise ApiError(1003, f"{self._rule}: unknown key {_show(key)}; there is {', '.join(KEYS)}")
        if ("allow" in entry) == ("deny" in entry):
            raise ApiError(1003, f"{self._rule}: must have either allow or deny")
        verb = "allow" if "allow" in entry else "deny"
        action, who = self._word(entry, verb, ACTIONS), self._word(entry, "who", WHO)
        return AccessRule(verb == "allow", action, self._topic(entry), who)

    def _word(self, entry: Mapping[str, Any], key: str, allowed: Sequence[str]) -> str:
        value = entry.get(key)
        if isinstance(value, str) and value in allowed:
            return value
        raise self._wrong(entry, key, f"one of {', '.join(allowed)}")

    def _topic(self, entry: Mapping[str, Any]) -> str:
        topic = entry.get("topic")
        if not isinstance(topic, str) or not topic or "\0" in topic:
            raise self._wrong(entry, "topic", "a topic filter")
        if _size(topic) > MAX_RULE_TOPIC:
            raise self._wrong(entry, "topic", f"at most {MAX_RULE_TOPIC} bytes of UTF-8")
        if topic.startswith("$share/"):
            raise self._wrong(
                entry, "topic", "a filter without $share/: a rule for it holds for shared subscriptions, too"
            )
        levels = topic.split("/")
        if "#" in levels[:-1] or any(len(level) > 1 and ("+" in level or "#" in level) for level in levels):
            raise self._wrong(entry, "topic", "a topic filter: + and # are whole levels, # the last one")
        for level in levels:
            self._check_braces(entry, level)
        return topic

    def _check_braces(self, entry: Mapping[str, Any], level: str) -> None:
        """A placeholder with a slip in it would be an ordinary level that nobody has."""
        in_braces = level[:1] == "{" and level[-1:] == "}"
        if level != PLACEHOLDER and (in_braces or PLACEHOLDER in level):
            raise self._wrong(
                entry, "topic", f"a topic filter with {PLACEHOLDER}, as a whole level, for a placeholder"
            )

    def _wrong(self, entry: Mapping[str, Any], key: str, allowed: str) -> ApiError:
        if key not in entry:
            return ApiError(1003, f"{self._rule}: {key} is missing: must be {allowed}")
        return ApiError(1003, f"{self._rule}: {key} = {_show(entry[key])}: must be {allowed}")


def _size(topic: str) -> int:
    """In bytes; over any limit where it is not to be had (half of a surrogate pair, which JSON may hold)."""
    try:
        return len(topic.encode())
    except UnicodeEncodeError:
        return MAX_RULE_TOPIC + 1


def _show(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "…"
