"""Ordinary topics inside one app: who subscribed to what, and what is retained.

Both are tries over topic levels, walked with a list instead of recursion, so that a topic with 60,000 slashes
costs memory in proportion and no stack. Matching visits the children that can match, whatever the number of
subscriptions that do not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

from gateway.mailbox import Entry, Mailbox
from gateway.messages import TopicMessage
from gateway.mqtt import split_share

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

    def find(self, path: str) -> _Level[Value] | None:
        """The same if it is there."""
        level: _Level[Value] | None = self.root
        for word in path.split("/"):
            level = level.children.get(word) if level is not None and level.children else None
            if level is None:
                return None
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


class SharedGroup:
    """The members of one shared subscription (MQTT5-4.8.2): each message goes to one of them."""

    __slots__ = ("filter", "members", "turn")

    def __init__(self, topic_filter: str) -> None:
        self.filter = topic_filter  # as subscribed: $share/group/filter
        self.members: dict[Mailbox, Entry] = {}
        self.turn: deque[Mailbox] = deque()  # the same, in the order of their turns

    def choose(self, *, qos: int, other_than: Mailbox | None = None, live: bool = False) -> Mailbox | None:
        """The next member in turn that has room; else one that is connected; else, for a message that can wait and
        unless `live`, one that is away."""
        connected = away = None
        for mailbox in self.turn:
            if mailbox is other_than:
                continue
            session, member = mailbox.session, mailbox.member
            if session is None or member is None:
                if self.members[mailbox][0].qos:
                    away = away or mailbox
            elif not member.blocked and not mailbox.queue and session.room:
                return self._turn_of(mailbox)
            else:
                connected = connected or mailbox
        if connected is None and (not qos or live):
            return None
        chosen = connected or away
        return self._turn_of(chosen) if chosen is not None else None

    def _turn_of(self, mailbox: Mailbox) -> Mailbox:
        if self.turn[0] is mailbox:
            self.turn.rotate(-1)
        else:
            self.turn.remove(mailbox)
            self.turn.append(mailbox)
        return mailbox


class _Subscribers:
    """Of one filter."""

    __slots__ = ("groups", "members")

    def __init__(self) -> None:
        self.members: dict[Mailbox, Entry] = {}
        self.groups: dict[str, SharedGroup] | None = None


class Found(NamedTuple):
    """The subscriptions a message meets."""

    members: Mapping[Mailbox, Entry]  # by one filter each
    several: Mapping[Mailbox, Sequence[Entry]]  # by overlapping filters
    groups: Sequence[SharedGroup]


class SubscriptionIndex:
    """Topic name -> the mailboxes subscribed to it."""

    __slots__ = ("_trie", "count")

    def __init__(self) -> None:
        self._trie: _Trie[_Subscribers] = _Trie()
        self.count = 0

    def add(self, entry: Entry, mailbox: Mailbox) -> None:
        """Subscribe, or change the options of a subscription (MQTT5-3.8.4-3)."""
        share, plain = split_group(entry[0].filter)
        level = self._trie.at(plain)
        if level.value is None:
            level.value = _Subscribers()
        if share is None:
            members = level.value.members
        else:
            level.value.groups = level.value.groups or {}
            group = level.value.groups.setdefault(share, SharedGroup(entry[0].filter))
            if mailbox not in group.members:
                group.turn.append(mailbox)
            members = group.members
        self.count += mailbox not in members
        members[mailbox] = entry

    def remove(self, topic_filter: str, mailbox: Mailbox) -> bool:
        """False if there was no such subscription."""
        share, plain = split_group(topic_filter)
        level = self._trie.find(plain)
        if level is None or level.value is None:
            return False
        found = self._remove(level.value, share, mailbox)
        self.count -= found
        if not level.value.members and not level.value.groups:
            level.value = None
            self._trie.prune(plain)
        return found

    @staticmethod
    def _remove(subscribers: _Subscribers, share: str | None, mailbox: Mailbox) -> bool:
        if share is None:
            return subscribers.members.pop(mailbox, None) is not None
        groups = subscribers.groups or {}
        group = groups.get(share)
        if group is None or group.members.pop(mailbox, None) is None:
            return False
        group.turn.remove(mailbox)
        if not group.members:
            del groups[share]
        return True

    def below(self, prefix: str) -> bool:
        """Whether some filter begins with this word and a slash."""
        children = self._trie.root.children
        return children is not None and prefix.rstrip("/") in children

    def group(self, topic_filter: str) -> SharedGroup | None:
        """A shared subscription that has members."""
        share, plain = split_group(topic_filter)
        level = self._trie.find(plain)
        groups = level.value.groups if level is not None and level.value is not None else None
        return groups.get(share) if groups and share is not None else None

    def match(self, topic: str) -> Found:
        """The subscriptions a message on this topic meets, by subscriber."""
        members: dict[Mailbox, Entry] = {}
        several: dict[Mailbox, list[Entry]] = {}
        groups: list[SharedGroup] = []
        for subscribers in self._matching(topic):
            if subscribers.groups:
                groups.extend(subscribers.groups.values())
            if not members and not several:  # most often the only filter that matches
                members = subscribers.members.copy()
                continue
            for mailbox, entry in subscribers.members.items():
                if mailbox in several:
                    several[mailbox].append(entry)
                elif mailbox in members:
                    several[mailbox] = [members.pop(mailbox), entry]
                else:
                    members[mailbox] = entry
        return Found(members, several, groups)

    def _matching(self, topic: str) -> Iterator[_Subscribers]:
        words = topic.split("/")
        hidden = topic.startswith("$")  # MQTT5-4.7.2-1: wildcards at the first level do not meet $ topics
        stack: list[tuple[_Level[_Subscribers], int]] = [(self._trie.root, 0)]
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


def split_group(topic_filter: str) -> tuple[str | None, str]:
    """(group, filter) of a shared subscription, (None, filter) of any other."""
    return split_share(topic_filter) or (None, topic_filter)


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

    def match(self, topic_filter: str) -> Iterator[TopicMessage | None]:
        """Retained messages a new subscription gets, found as they are asked for, whatever is retained meanwhile.
        None: looked at LOOK levels in vain, so that nobody has to wait for the next one."""
        words = topic_filter.split("/")
        looked = 0
        stack: list[tuple[_Level[TopicMessage], int]] = [(self._trie.root, 0)]
        while stack:
            level, depth = stack.pop()
            word = words[depth] if 0 <= depth < len(words) else ""
            meant = depth in (len(words), BELOW) or word == "#"
            if depth != len(words):
                stack.extend(_following(level, word, depth))
            looked += 1
            if meant and level.value is not None:
                looked = 0
                yield level.value
            elif looked == LOOK:
                looked = 0
                yield None


LOOK: Final = 100
LEVEL_SIZE: Final = 100  # bytes a level of a topic takes, shared with its neighbours or not
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
    return message.size + LEVEL_SIZE * (message.topic.count("/") + 1) if message is not None else 0
