"""What an MQTT session has besides pushes, and keeps while its client is away: subscriptions, waiting messages, and
the QoS 2 state of both directions. No I/O: what must survive a restart is told to a `SessionLog` as it changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from pyroaring import BitMap

from broker.tenants.access import Role
from gateway.messages import TopicCopy, TopicMessage
from gateway.mqtt import Subscription

if TYPE_CHECKING:
    from gateway.session import Member, Session

Entry = tuple[Subscription, int]  # options, subscription identifier (0: none)
Replay = tuple[TopicMessage, int, int]  # a retained message, the QoS it is sent with, subscription identifier


class SessionLog(Protocol):
    """Where a durable session's changes go (decision 0008). `number` is the session's within its app."""

    number: int

    def subscribed(self, entry: Entry, *, owed: bool) -> None:
        """`owed`: the retained messages of the subscription have not all been sent."""

    def unsubscribed(self, topic_filter: str) -> None: ...

    def sent(self, packet_id: int, copy: TopicCopy, *, released: bool) -> None:
        """This packet id stands for that copy; `released`: PUBREC came."""

    def completed(self, packet_id: int) -> None:
        """The packet id is free again."""

    def received(self, packet_ids: BitMap) -> None:
        """These are the inbound QoS 2 ids between PUBLISH and PUBREL."""

    def done(self, copy: TopicCopy) -> None:
        """The session has the copy, or will never get it."""

    def will(self, value: bytes | None) -> None:
        """This will waits for its delay; None: not any more."""


# A session's key begins with its role, so that a device and a publisher of one name differ.
PUBLISHER: Final = "p/"
DEVICE: Final = "d/"


def role_of(key: str) -> tuple[Role, str]:
    """The role and name that the access rules speak of."""
    return ("publisher" if key.startswith(PUBLISHER) else "device"), key[2:]


@dataclass(frozen=True, slots=True)
class MailboxLimits:
    """What one session may make the node keep (G6)."""

    subscriptions: int = 100
    queued_messages: int = 1000
    queued_bytes: int = 1_048_576


NOTHING: Final = ()  # a deque takes 760 bytes, and most sessions never queue anything


class Mailbox:
    __slots__ = (
        "dropped",
        "expires_at",
        "in_flight",
        "key",
        "limits",
        "log",
        "member",
        "next_id",
        "over",
        "queue",
        "queued_bytes",
        "received",
        "released",
        "replaying",
        "replays",
        "session",
        "subscriptions",
        "undecided",
        "waits",
    )

    def __init__(self, limits: MailboxLimits, key: str = "") -> None:
        self.key = key  # of its session within the app
        self.limits = limits
        self.log: SessionLog | None = None  # None: the session does not outlive its connection, or the server
        self.session: Session | None = None  # of the live connection
        self.member: Member | None = None  # that connection
        self.subscriptions: dict[str, Entry] = {}  # by filter
        self.replays: dict[str, Iterator[Replay | None]] = {}  # by filter: retained messages still to be sent
        self.replaying = False  # they go on in the next turn of the loop
        self.queue: deque[TopicCopy] | tuple[()] = NOTHING
        self.queued_bytes = 0
        self.in_flight: dict[int, TopicCopy] = {}  # of the last connection, until sent again
        self.released: set[int] | None = None  # outbound QoS 2 ids after PUBREC: what is resent is PUBREL
        self.received: BitMap | None = None  # inbound QoS 2 ids between PUBLISH and PUBREL: at most 8 KB
        self.undecided: set[int] | None = None  # of these, those whose message is not safe yet
        self.next_id = 1
        self.over = False  # the session has ended
        self.waits = False  # taken up, and what was noted of QoS 2 on the connection before is not saved yet
        self.expires_at: float | None = None  # while away, monotonic
        self.dropped = 0  # messages that found no room, expired, or were too large

    @property
    def waiting(self) -> bool:
        """Something here is to be sent."""
        return bool(self.queue or self.in_flight or self.replays)

    @property
    def empty(self) -> bool:
        """Nothing here that a new session would not have."""
        return not (self.subscriptions or self.queue or self.in_flight or self.received)

    def note_received(self) -> None:
        """The ids of messages that are safe have changed: a repeat of one of them is known for one."""
        if self.log is not None and not self.over:
            self.log.received((self.received or BitMap()) - BitMap(self.undecided or ()))

    def release(self, packet_id: int) -> None:
        """PUBREC came."""
        if self.released is None:
            self.released = set()
        self.released.add(packet_id)

    def is_released(self, packet_id: int) -> bool:
        return self.released is not None and packet_id in self.released

    def forget(self, packet_id: int) -> None:
        """The id is free again."""
        if self.released is not None:
            self.released.discard(packet_id)
        if self.log is not None:
            self.log.completed(packet_id)

    def put(self, copy: TopicCopy) -> bool:
        """Queue a message; with no room left the newcomer is dropped and counted."""
        size = copy.message.size
        if (
            len(self.queue) >= self.limits.queued_messages
            or self.queued_bytes + size > self.limits.queued_bytes
        ):
            self.drop(copy)
            return False
        self.restore(copy)
        return True

    def restore(self, copy: TopicCopy) -> None:
        """Queue a message that was accepted before."""
        if isinstance(self.queue, deque):
            self.queue.append(copy)
        else:
            self.queue = deque((copy,))
        self.queued_bytes += copy.message.size

    def take(self, now: float) -> TopicCopy | None:
        """The next message that has not expired."""
        while isinstance(self.queue, deque):
            copy = self.queue.popleft()
            self.queued_bytes -= copy.message.size
            if not self.queue:
                self.queue = NOTHING
            if not copy.message.expired(now):
                return copy
            self.drop(copy)
        return None

    def drop(self, copy: TopicCopy) -> None:
        """The session will not get this one."""
        self.dropped += 1
        self.done(copy)

    def done(self, copy: TopicCopy) -> None:
        """The session has it, or will never get it."""
        if self.log is not None and copy.left is not None:
            self.log.done(copy)

    def remove(self, unwanted: Callable[[TopicCopy], bool]) -> list[TopicCopy]:
        """Take these out of the queue; the caller decides what becomes of them."""
        removed = [copy for copy in self.queue if unwanted(copy)]
        if removed:
            self.queue = deque(copy for copy in self.queue if not unwanted(copy)) or NOTHING
            self.queued_bytes -= sum(copy.message.size for copy in removed)
        return removed
