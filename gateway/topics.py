"""Ordinary topics inside one app: who subscribed to what, and what is retained.

Both are tries over topic levels, walked with a list instead of recursion, so that a topic with 60,000 slashes
costs memory in proportion and no stack. Matching visits the children that can match, whatever the number of
subscriptions that do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Generic, TypeVar

from gateway.live import TopicMessage
from gateway.mqtt import Subscription
from gateway.session import Mailbox

Entry = tuple[Subscription, int]  # options, subscription identifier (0: none)
Value = TypeVar("Value")


class _Level(Generic[Value]):
    __slots__ = ("children", "value")

    def __init__(self) -> None:
        self.children: dict[str, _Level[Value]] | None = None
        self.value: Value | None = None


class _Trie(Generic[Value]):
    __slots__ = ("root",)

    def __init__(self) -> None:
        self.root: _Level[Value] = _Level()

    def at(self, path: str) -> _Level[Value]:
        """The level of a topic or filter, made if need be."""
        level = self.root
        for word in path.split("/"):
            if level.children is None:
                level.children = {}
            following = level.children.get(word)
            if following is None:
                following = level.children[word] = _Level()
            level = following
        return level

    def prune(self, path: str) -> None:
        """Forget the levels on the way to `path` that lead to nothing any more."""
        way: list[tuple[_Level[Value], str]] = []
        level = self.root
        for word in path.split("/"):
            following = level.children.get(word) if level.children else None
            if following is None:
                return
            way.append((level, word))
            level = following
        for parent, word in reversed(way):
            assert parent.children is not None
            child = parent.children[word]
            if child.value is not None or child.children:
                return
            del parent.children[word]
            if not parent.children:
                parent.children = None


class SubscriptionIndex:
    """Topic name -> the mailboxes subscribed to it."""

    __slots__ = ("_trie", "count")

    def __init__(self) -> None:
        self._trie: _Trie[dict[Mailbox, Entry]] = _Trie()
        self.count = 0

    def add(self, subscription: Subscription, subscription_id: int, mailbox: Mailbox) -> bool:
        """Subscribe, or change the options of a subscription (MQTT5-3.8.4-3). True if it is new."""
        level = self._trie.at(subscription.filter)
        if level.value is None:
            level.value = {}
        new = mailbox not in level.value
        level.value[mailbox] = (subscription, subscription_id)
        self.count += new
        return new

    def remove(self, topic_filter: str, mailbox: Mailbox) -> bool:
        """False if there was no such subscription."""
        level = self._trie.at(topic_filter)
        found = level.value is not None and level.value.pop(mailbox, None) is not None
        if not level.value:
            level.value = None
            self._trie.prune(topic_filter)
        self.count -= found
        return found

    def match(self, topic: str) -> dict[Mailbox, list[Entry]]:
        """The subscriptions a message on this topic meets, by subscriber."""
        found: dict[Mailbox, list[Entry]] = {}
        for entries in self._matching(topic):
            for mailbox, entry in entries.items():
                found.setdefault(mailbox, []).append(entry)
        return found

    def _matching(self, topic: str) -> Iterator[dict[Mailbox, Entry]]:
        words = topic.split("/")
        hidden = topic.startswith("$")  # MQTT5-4.7.2-1: wildcards at the first level do not meet $ topics
        stack: list[tuple[_Level[dict[Mailbox, Entry]], int]] = [(self._trie.root, 0)]
        while stack:
            level, depth = stack.pop()
            children = level.children
            wild = not (hidden and depth == 0)
            if children and wild and (rest := children.get("#")) is not None and rest.value:
                yield rest.value  # `a/#` meets `a` too (MQTT5-4.7.1.2)
            if depth == len(words):
                if level.value:
                    yield level.value
                continue
            if children:
                wanted = (words[depth], "+") if wild else (words[depth],)
                stack.extend((children[word], depth + 1) for word in wanted if word in children)


class RetainedMessages:
    """The last retained message of each topic, bounded in number and bytes (G6)."""

    __slots__ = ("_trie", "bytes", "count", "max_bytes", "max_count")

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._trie: _Trie[TopicMessage] = _Trie()
        self.count = 0
        self.bytes = 0
        self.max_count = max_count
        self.max_bytes = max_bytes

    def set(self, message: TopicMessage) -> bool:
        """Retain, replace, or with an empty payload remove (MQTT5-3.3.1-6). False: no room for a new one."""
        level = self._trie.at(message.topic)
        old = level.value
        keep = bool(message.payload)
        count = self.count - (old is not None) + keep
        size = self.bytes - _size(old) + (_size(message) if keep else 0)
        fits = count <= self.max_count and size <= self.max_bytes
        if fits:
            level.value = message if keep else None
            self.count, self.bytes = count, size
        if level.value is None:
            self._trie.prune(message.topic)
        return fits

    def match(self, topic_filter: str, now: float) -> list[TopicMessage]:
        """Retained messages a new subscription gets."""
        words = topic_filter.split("/")
        found: list[TopicMessage] = []
        stack: list[tuple[_Level[TopicMessage], int]] = [(self._trie.root, 0)]
        while stack:
            level, depth = stack.pop()
            word = words[depth] if 0 <= depth < len(words) else ""
            meant = depth in (len(words), BELOW) or word == "#"
            if meant and level.value is not None and not _expired(level.value, now):
                found.append(level.value)
            if depth != len(words):
                stack.extend(_following(level, word, depth))
        return found


BELOW: Final = -1  # below a `#`, where every level matches


def _following(
    level: _Level[TopicMessage], word: str, depth: int
) -> Iterator[tuple[_Level[TopicMessage], int]]:
    children = level.children or {}
    if depth == BELOW or word in ("+", "#"):
        for name, child in children.items():
            if depth or not name.startswith("$"):  # MQTT5-4.7.2-1
                yield child, depth + 1 if word == "+" and depth != BELOW else BELOW
    elif (child_or_none := children.get(word)) is not None:
        yield child_or_none, depth + 1


def _size(message: TopicMessage | None) -> int:
    return len(message.payload) + len(message.topic) if message else 0


def _expired(message: TopicMessage, now: float) -> bool:
    return message.expires_at is not None and message.expires_at <= now
