"""The session machine of one device or publisher: packets and *now* in, actions and bytes out; no I/O.

Theory. A session sends two kinds of thing through one window of packet ids:

- *pushes*. The session keeps no queue of them: it is a cursor over the store. `seen` is the newest inbox row
  sent on this connection, `cursor` a position in the app's broadcast log, `inbox` a page of rows fetched and
  not yet sent. What does not fit the window stays where it is (`behind`), and is collected when
  acknowledgements make room. Nothing is resent on a live connection (MQTT5-4.4.0-1): whoever closes a session
  keeps `(msg_id, packet id)` of the window, and the next one sends what is still owed anew, under the same id
  and with DUP.
- *ordinary messages* (topics inside the app). They queue in the `Mailbox`, which is the part of a session that
  outlives its connection: subscriptions, queue, and the QoS 2 state of both directions.

What must always hold: at most `window` packet ids are in flight; an id is in use by one message only; answers to
inbound QoS 1 and 2 messages leave in the order the messages came (MQTT5-4.6.0-2). Packets that rely on a change
of a durable session are *held*: the connection sends them when the change is saved (decision 0008).

A device whose connection ended without a word, or whose carrier wants the urgent first, begins with a `Comeback`: a
small window, that doubles with each round of acknowledgements, or a backlog that is not sent in its order. When both
are over it is dropped, and the session is one like all others.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, cast

from pyroaring import BitMap

from gateway.ack_time import UNKNOWN, AckTime
from gateway.live import PUBACK, Encoding, Flight, Frames, LivePush
from gateway.mailbox import Mailbox, MailboxLimits
from gateway.messages import TopicCopy
from gateway.mqtt import (
    NO_PROPERTIES,
    Auth,
    Disconnect,
    Packet,
    Pingreq,
    Pingresp,
    Properties,
    ProtocolError,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Reason,
    Subscribe,
    Unsubscribe,
    encode,
)
from gateway.mqtt.errors import TopicAliasInvalid

MAX_PACKET_ID: Final = 65_535
ALIASES_SENT: Final = 32  # topics that one peer gets by alias at most, whatever it would take
ALIAS_WORTH: Final = 3  # bytes a topic alias takes: a shorter name is sent as it is
PUBACK_SIZE: Final = 4
PUBACK_BYTES: Final = 0x40
PINGREQ: Final = encode(Pingreq(), 4)
PINGRESP: Final = encode(Pingresp(), 4)


class Inbox(enum.IntEnum):
    """What is known of the device's inbox rows after `seen`."""

    EMPTY = 0  # nothing there that no doorbell will tell of
    WANTED = 1  # there may be rows: fetch when there is room
    FETCHING = 2
    FETCHING_STALE = 3  # a doorbell rang meanwhile: fetch once more


@dataclass(frozen=True, slots=True)
class Send:
    data: bytes


@dataclass(frozen=True, slots=True)
class Published:
    """The peer published; unless QoS 0, answer it with `Session.answer` once it is safe."""

    packet: Publish


@dataclass(frozen=True, slots=True)
class Acked:
    """The device has this push."""

    push: LivePush


@dataclass(frozen=True, slots=True)
class Subscribed:
    packet: Subscribe


@dataclass(frozen=True, slots=True)
class Unsubscribed:
    packet: Unsubscribe


@dataclass(frozen=True, slots=True)
class Authenticating:
    """The peer wants to prove again who it is (MQTT5-4.12.1)."""

    packet: Auth


@dataclass(frozen=True, slots=True)
class Closed:
    """The peer said goodbye."""

    with_will: bool
    session_expiry: int | None  # seconds, if it changed its mind


Action = Send | Published | Acked | Subscribed | Unsubscribed | Authenticating | Closed


class Member(Protocol):
    """The live connection of a session, as far as fan-out needs it."""

    session: Session | None
    epoch: int  # of the route it claimed
    generation: int  # of its token; lower than that of the device: it was revoked
    blocked: bool  # its socket is over the write buffer limit: skip it, it catches up when it drains

    def send(self, data: bytes) -> None: ...

    def send_held(self) -> None: ...

    def catch_up(self) -> None: ...

    def close(self, label: str, reason: Reason | None = None, text: str = "") -> None: ...


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What one peer may make the node keep (G6)."""

    receive_maximum: int = 256  # its unanswered QoS 1 messages and unreleased QoS 2 ids
    topic_alias_maximum: int = 16  # each keeps one topic name alive
    mailbox: MailboxLimits = field(default_factory=MailboxLimits)


@dataclass(frozen=True, slots=True)
class Manners:
    """What the peer said in CONNECT about what it may be sent. A few of these serve all sessions."""

    maximum_packet: int = 0  # bytes of a packet; 0: no limit
    alias_maximum: int = 0  # topic aliases it accepts
    problem_information: bool = True  # whether acknowledgements may say more than a code
    bridge: bool = False  # a broker's: gets nothing back that it sent, and retained messages as retained
    largest: int = 0  # bytes of a push's payload; 0: no limit. The carrier's wish, not the peer's
    choosy: bool = field(init=False)  # there are pushes that it is not sent

    def __post_init__(self) -> None:
        object.__setattr__(self, "choosy", bool(self.maximum_packet or self.largest))


PLAIN: Final = Manners()
DEFAULT_LIMITS: Final = SessionLimits()


class Comeback:
    """How a connection begins whose device was away."""

    __slots__ = ("most", "newest", "round_end", "urgent")

    def __init__(self, most: int, *, urgent: bool) -> None:
        self.most = most  # the window in the end
        self.round_end = (
            0  # packet id that was the newest in flight when this round of acknowledgements began
        )
        self.urgent = urgent  # the backlog goes out by urgency (`Hub`), and it is not through yet
        self.newest = 0  # msg_id of that backlog: what comes after it is in order again (G3)


class Session:
    """One connection's session. `encoding` and the rest are fixed at CONNECT; `window` then only grows."""

    __slots__ = (
        "_unacked",
        "ack_time",
        "aliases",
        "aliases_sent",
        "behind",
        "comeback",
        "cursor",
        "devno",
        "encoding",
        "fetch",
        "flight",
        "held",
        "inbound",
        "inbox",
        "limits",
        "mailbox",
        "manners",
        "next_id",
        "resend",
        "seen",
        "sent",
        "timed",
        "unsure",
        "waiting_since",
        "window",
    )

    def __init__(
        self,
        encoding: Encoding,
        *,
        devno: int = -1,
        window: int = 32,
        manners: Manners = PLAIN,
        limits: SessionLimits = DEFAULT_LIMITS,
    ) -> None:
        self.encoding = encoding
        self.manners = manners
        self.limits = limits
        self.devno = devno  # -1: not a registered device, receives no pushes
        self.window = (
            window  # packet ids in flight at most: the peer's Receive Maximum and the carrier's window
        )
        self.next_id = 1
        self._unacked: dict[int, LivePush | TopicCopy] | None = None
        self.flight: Flight | None = None  # all that is in flight, if many sessions share it
        self.waiting_since = (
            0.0  # since when the oldest acknowledgement is awaited, restarted by any progress
        )
        self.timed = (
            0  # packet id that was sent into an empty window at `waiting_since`; 0: none, or a resend
        )
        self.ack_time: AckTime = UNKNOWN
        self.comeback: Comeback | None = None
        self.resend: dict[int, int] | None = None  # msg_id -> packet id of the connection before
        self.seen = 0  # the newest inbox row that was taken up on this connection
        self.sent = 0  # the newest msg_id that was sent on it: nothing older may follow (G3)
        self.cursor = 0
        self.inbox: list[LivePush] | None = None  # newest first, so that the next is popped off the end
        self.fetch = Inbox.EMPTY
        self.behind = False  # something is owed that found no room
        self.unsure = False  # it may have acknowledged broadcasts elsewhere: the store is to be asked first
        self.inbound: dict[int, bytes | None] | None = None  # packet id -> its answer, None while undecided
        self.aliases: dict[int, str] | None = None  # that the peer set
        self.aliases_sent: dict[str, int] | None = None  # that we set
        self.held: list[bytes] | None = None  # packets that wait until the session's changes are saved
        self.mailbox: Mailbox | None = None

    @property
    def newest(self) -> int:
        """The newest msg_id that was taken up or sent on this connection; inbox rows up to it are behind us."""
        return self.seen if self.urgent else max(self.seen, self.sent)

    @property
    def urgent(self) -> bool:
        """What is owed goes out by urgency, not in its order."""
        return self.comeback is not None and self.comeback.urgent

    @property
    def unacked(self) -> dict[int, LivePush | TopicCopy] | None:
        """What is in flight, by packet id, oldest first; None when nothing is: idle sessions own no dict. Whoever
        asks makes the session leave its `flight`."""
        if self.flight is not None:
            self._unacked, self.flight = cast("dict[int, LivePush | TopicCopy]", self.flight.window()), None
        return self._unacked

    @unacked.setter
    def unacked(self, unacked: dict[int, LivePush | TopicCopy] | None) -> None:
        self._unacked, self.flight = unacked, None

    # Sending

    @property
    def at_rest(self) -> bool:
        """Nothing is in flight or waits, nothing is unusual: what is owed may go out, under any packet ids."""
        return (
            self._unacked is None
            and self.flight is None
            and self.fetch is Inbox.EMPTY
            and self.inbox is None
            and (self.mailbox is None or not (self.mailbox.queue or self.mailbox.in_flight))
            and self.comeback is None
            and not self.resend
            and not self.behind
            and not self.manners.choosy
        )

    def depart(self, flight: Flight, now: float) -> None:
        """Of a session at rest, with this `next_id`: these are sent."""
        self.flight = flight
        self.sent = flight.pushes[-1].message.msg_id
        self.waiting_since = now
        self.timed = flight.first
        self.next_id = flight.end

    def arrived(self, now: float) -> None:
        """The whole flight is acknowledged."""
        self.flight = None
        if not (now == self.waiting_since and self.ack_time.steady):
            self.ack_time = self.ack_time.after(now - self.waiting_since)
        self.waiting_since = now

    @property
    def room(self) -> int:
        """How many more packet ids may be in flight."""
        return self.window - len(self.unacked) if self.unacked else self.window

    def send_push(self, push: LivePush, now: float) -> bytes:
        """Put a push into the window, which has room, and return its packet."""
        self.sent = push.message.msg_id
        if self.resend:
            known = self.resend.pop(push.msg_id, None)
            if known is not None:
                self._enter(known, push, now, again=True)
                return push.frames(self.encoding).again(known)
        packet_id = self.next_id
        free = self._unacked is None and self.flight is None and self.mailbox is None and not self.resend
        if free:  # the hot case: under any id
            self._unacked = {packet_id: push}
            self.waiting_since = now
            self.timed = packet_id
            self.next_id = packet_id + 1 if packet_id < MAX_PACKET_ID else 1
        else:
            packet_id = self._free_id()
            self._enter(packet_id, push, now)
        return push.frames(self.encoding)[packet_id]

    def _free_id(self) -> int:
        packet_id, mailbox = self.next_id, self.mailbox
        if self.resend or (mailbox is not None and mailbox.in_flight):
            reserved = {*(self.resend or {}).values(), *(mailbox.in_flight if mailbox else ())}
        else:
            reserved = None
        while (self.unacked and packet_id in self.unacked) or (reserved and packet_id in reserved):
            packet_id = packet_id % MAX_PACKET_ID + 1
        self.next_id = packet_id % MAX_PACKET_ID + 1
        return packet_id

    def _enter(self, packet_id: int, item: LivePush | TopicCopy, now: float, *, again: bool = False) -> None:
        if self.unacked is None:
            self.unacked = {}
            self.waiting_since = now
            self.timed = 0 if again else packet_id  # Karn: what is sent again measures nothing
        self.unacked[packet_id] = item

    def fits(self, size: int) -> bool:
        """Whether the peer accepts a packet of so many bytes (MQTT5-3.1.2-24)."""
        most = self.manners.maximum_packet
        return not most or size <= most

    def accepts(self, frames: Frames) -> bool:
        """Whether it may be sent the push of these packets."""
        largest = self.manners.largest
        if (
            largest and len(frames.tail) - (self.encoding.version == 5) > largest
        ):  # v5: a byte for no properties
            return False
        return self.fits(frames.size)

    def own_mailbox(self) -> Mailbox:
        """The session's mailbox, made on first use: most devices only receive pushes and never need one."""
        if self.mailbox is None:
            self.mailbox = Mailbox(self.limits.mailbox)
            self.mailbox.session = self
        return self.mailbox

    def send_copy(self, copy: TopicCopy, now: float) -> bytes | None:
        """An ordinary message for this subscriber: its packet, or None if it was queued, held or dropped."""
        mailbox = self.mailbox or self.own_mailbox()
        if copy.qos == 1 and self._unacked is None and self.flight is None and self.manners is PLAIN:
            if not (mailbox.queue or mailbox.in_flight or self.resend):  # the hot case: any id is free
                packet_id = self.next_id
                self._unacked = {packet_id: copy}
                self.waiting_since = now
                self.timed = packet_id
                self.next_id = packet_id + 1 if packet_id < MAX_PACKET_ID else 1
                return copy.frames(self.encoding.version, now)[packet_id]
        elif copy.qos == 0:
            frame = self._frame(copy, 0, now)
            if frame is None:
                mailbox.drop(copy)
            return frame
        if mailbox.queue or mailbox.in_flight or not self.room:
            mailbox.put(copy)
            return None
        return self._send_copy(mailbox, copy, now)

    def _send_copy(self, mailbox: Mailbox, copy: TopicCopy, now: float) -> bytes | None:
        if copy.qos == 0:
            return self.send_copy(copy, now)
        packet_id = self._free_id()
        frame = self._frame(copy, packet_id, now)
        if frame is None:
            mailbox.drop(copy)
            return None
        self._enter(packet_id, copy, now)
        if (
            copy.qos == 2 and mailbox.log is not None
        ):  # exactly once: the client must know it by this id for ever
            mailbox.log.sent(packet_id, copy, released=False)
            self._hold(frame)
            return None
        return frame

    def _hold(self, frame: bytes) -> None:
        if self.held is None:
            self.held = []
        self.held.append(frame)

    def _frame(self, copy: TopicCopy, packet_id: int, now: float, *, dup: bool = False) -> bytes | None:
        """The PUBLISH; None if the peer would not accept it."""
        if self.manners.alias_maximum:
            return self._aliased(copy, packet_id, now, dup=dup)
        frames = copy.frames(self.encoding.version, now)
        if not self.fits(frames.size):
            return None
        if copy.qos == 0:
            return frames.head + frames.tail
        return frames.again(packet_id) if dup else frames[packet_id]

    def _aliased(self, copy: TopicCopy, packet_id: int, now: float, *, dup: bool) -> bytes | None:
        """Where the peer takes topic aliases, a topic's name goes out once (MQTT5-3.1.2-26). The packet that sets one
        is not one of QoS 2, which may be held: others would overtake it."""
        packet = copy.packet(packet_id, now, dup=dup)
        known = self.aliases_sent or {}
        alias = known.get(packet.topic, 0)
        fresh = not alias and len(known) < self.manners.alias_maximum and len(packet.topic) > ALIAS_WORTH
        if fresh and copy.qos < 2:
            alias = len(known) + 1
        if alias:
            properties = cast("Properties", {**packet.properties, "topic_alias": alias})
            packet = replace(packet, topic=packet.topic if fresh else "", properties=properties)
        frame = encode(packet, self.encoding.version)
        if not self.fits(len(frame)):
            return None
        if alias and fresh:
            self.aliases_sent = known | {copy.message.topic: alias}
        return frame

    def drain_mailbox(self, now: float) -> list[bytes]:
        """Ordinary messages that fit the window now: those to be sent again, then the queue."""
        mailbox = self.mailbox
        if mailbox is None or mailbox.waits:
            return []
        frames = self._send_again(now)
        while self.room and (copy := mailbox.take(now)) is not None:
            frame = self._send_copy(mailbox, copy, now)
            if frame is not None:
                frames.append(frame)
        return frames

    # Life

    def resume(self, mailbox: Mailbox, now: float) -> list[bytes]:
        """Take up a mailbox: what is to be sent again first, in its old order (MQTT5-4.4.0-1, 4.6.0-1). If QoS 2 is
        among it, nothing yet (`Mailbox.waits`)."""
        mailbox.session = self
        self.mailbox = mailbox
        self.next_id = mailbox.next_id
        mailbox.waits = mailbox.log is not None and any(copy.qos == 2 for copy in mailbox.in_flight.values())
        return [] if mailbox.waits else self._send_again(now)

    def _send_again(self, now: float) -> list[bytes]:
        """As many as fit: the window may be smaller than that of the connection before (MQTT5-3.3.4-9)."""
        frames: list[bytes] = []
        mailbox = self.mailbox
        while mailbox is not None and mailbox.in_flight and self.room:
            packet_id = next(iter(mailbox.in_flight))
            copy = mailbox.in_flight.pop(packet_id)
            frame = (
                encode(Pubrel(packet_id), self.encoding.version)
                if mailbox.is_released(packet_id)
                else self._frame(copy, packet_id, now, dup=True)
            )
            if frame is None:  # larger than this connection's Maximum Packet Size
                mailbox.drop(copy)
                mailbox.forget(packet_id)
                continue
            self._enter(packet_id, copy, now, again=True)
            frames.append(frame)
        return frames

    def come_back(self, first_window: int, *, urgent: bool) -> None:
        """Before anything is sent: begin with this window, if that is smaller, and by urgency or in order."""
        if first_window < self.window or urgent:
            self.comeback = Comeback(self.window, urgent=urgent)
            self.window = min(first_window, self.window)

    def begin_round(self, comeback: Comeback) -> None:
        """What could be sent was sent. A round of acknowledgements ends with that of the newest packet in flight at
        its beginning."""
        if not comeback.round_end and self.unacked:
            comeback.round_end = next(reversed(self.unacked))

    def widen(self, comeback: Comeback) -> None:
        """Double the window if a round has ended."""
        if comeback.round_end and not (self.unacked and comeback.round_end in self.unacked):
            comeback.round_end = 0
            self.window = min(2 * self.window, comeback.most)
            self.leave_comeback(comeback)

    def backlog_through(self, comeback: Comeback) -> None:
        """All that was owed by urgency went out: from now on pushes go in order (G3)."""
        comeback.urgent = False
        self.sent = max(self.sent, comeback.newest)
        self.leave_comeback(comeback)

    def leave_comeback(self, comeback: Comeback) -> None:
        if not comeback.urgent and self.window >= comeback.most:
            self.comeback = None

    def unanswered(self) -> list[LivePush]:
        """Pushes that were sent and not acknowledged."""
        return [item for item in (self.unacked or {}).values() if isinstance(item, LivePush)]

    def suspend(self) -> dict[int, int]:
        """The connection is gone. Leaves the ordinary part in the mailbox and returns the pushes in flight,
        msg_id -> packet id, for `resend` of the next session."""
        pushes: dict[int, int] = {}
        messages: dict[int, TopicCopy] = {}
        for packet_id, item in (self.unacked or {}).items():
            if isinstance(item, LivePush):
                pushes[item.msg_id] = packet_id
            else:
                messages[packet_id] = item
        if self.resend:  # passed over in favour of newer ones: not owed any more, their ids are free
            newest = 0 if self.urgent else max(pushes, default=0)
            pushes |= {msg_id: known for msg_id, known in self.resend.items() if msg_id > newest}
        if self.mailbox is not None:
            self.mailbox.in_flight = messages | self.mailbox.in_flight
            self.mailbox.session = self.mailbox.member = None
            self.mailbox.next_id = self.next_id
        self.unacked = self.held = None
        return pushes

    # Receiving

    def acked(self, packet_id: int, now: float) -> LivePush | None:
        """A PUBACK: the push it acknowledges, if it was one. Unknown ids are ignored: an acknowledgement may
        come twice."""
        unacked = self._unacked if self.flight is None else self.unacked
        item = unacked.pop(packet_id, None) if unacked is not None else None
        if type(item) is LivePush:
            if not unacked:
                self._unacked = None
            if packet_id == self.timed and not (now == self.waiting_since and self.ack_time.steady):
                self.ack_time = self.ack_time.after(now - self.waiting_since)
            self.waiting_since = now
            return item
        if type(item) is TopicCopy:
            if not unacked:
                self._unacked = None
            if packet_id == self.timed and item.qos == 1:
                self.ack_time = self.ack_time.after(now - self.waiting_since)
            self.waiting_since = now
            if item.qos == 2 or (self.mailbox is not None and self.mailbox.log is not None):
                self._acked_copy(item, packet_id)
        elif not packet_id:
            raise ProtocolError("packet id 0")  # MQTT5-2.2.1-3
        return None

    def _acked_copy(self, copy: TopicCopy, packet_id: int) -> None:
        if copy.qos == 2:
            self.unacked = {packet_id: copy, **(self.unacked or {})}  # still unacknowledged, and comes again
            raise ProtocolError(f"PUBACK for packet id {packet_id}, which has QoS 2")
        mailbox = self.mailbox
        if mailbox is not None and mailbox.log is not None:
            mailbox.done(copy)
            mailbox.log.completed(packet_id)

    def receive(self, packet: Packet, now: float) -> list[Action]:
        """One packet from the peer. Raises MQTTError for what it must not send."""
        match packet:
            case Puback():
                push = self.acked(packet.packet_id, now)
                return [Acked(push)] if push is not None else []
            case Pingreq():
                return [Send(PINGRESP)]
            case Publish():
                return self._receive_publish(packet)
            case Pubrel():
                return self._release(packet.packet_id)
            case Pubrec():
                return self._received(packet, now)
            case Pubcomp():
                return self._complete(packet, now)
            case Subscribe():
                return [Subscribed(packet)]
            case Unsubscribe():
                return [Unsubscribed(packet)]
            case Disconnect():
                expiry = packet.properties.get("session_expiry_interval")
                return [Closed(packet.reason != Reason.NORMAL_DISCONNECTION, expiry)]  # MQTT5-3.14.4-3
            case Auth():
                return [Authenticating(packet)]
            case _:
                raise ProtocolError(f"{type(packet).__name__.upper()} is not for a client to send")

    def _receive_publish(self, packet: Publish) -> list[Action]:
        if "subscription_identifiers" in packet.properties:
            raise ProtocolError("a subscription identifier from a client")  # MQTT5-3.3.4-6
        packet = self._resolve_alias(packet)
        if packet.qos == 0:
            return [Published(packet)]
        inbound = self.inbound
        if inbound is None:
            inbound = self.inbound = {}
        if packet.packet_id in inbound:
            return []  # still being decided; one answer serves both
        if packet.qos == 2:
            received = self._received_ids()
            if packet.packet_id in received:
                inbound[packet.packet_id] = None
                return self._once_saved(self.answer(packet))  # MQTT5-4.3.3-10: seen before, PUBREC again
            self._check_quota(inbound)
            received.add(packet.packet_id)
            self._undecided().add(packet.packet_id)
        else:
            self._check_quota(inbound)
        inbound[packet.packet_id] = None
        return [Published(packet)]

    def _received_ids(self) -> BitMap:
        mailbox = self.own_mailbox()
        if mailbox.received is None:
            mailbox.received = BitMap()
        return mailbox.received

    def _undecided(self) -> set[int]:
        mailbox = self.own_mailbox()
        if mailbox.undecided is None:
            mailbox.undecided = set()
        return mailbox.undecided

    def took(self, packet_id: int) -> None:
        """An inbound QoS 2 message is safe, or is noted together with this: repeats of it are repeats from now on."""
        self._undecided().discard(packet_id)
        self.own_mailbox().note_received()

    def refused(self, packet_id: int) -> None:
        """It was not taken: its id is free again (MQTT5-4.3.3-9), and a repeat of it is another try."""
        self._undecided().discard(packet_id)
        self._received_ids().discard(packet_id)
        self.own_mailbox().note_received()

    def _check_quota(self, inbound: dict[int, bytes | None]) -> None:
        """MQTT5-3.3.4-7: QoS 1 until PUBACK, QoS 2 until PUBCOMP. 3.1.1 knows no such limit; there the ids themselves
        are one, and reading stops while too much is unanswered."""
        most = self.limits.receive_maximum
        received = self.mailbox.received if self.mailbox else None
        if self.encoding.version != 5 or len(inbound) + len(received or ()) < most:
            return
        if len(BitMap(inbound) | (received or BitMap())) >= most:
            raise ProtocolError(f"more than {most} unanswered messages", Reason.RECEIVE_MAXIMUM_EXCEEDED)

    def _resolve_alias(self, packet: Publish) -> Publish:
        alias = packet.properties.get("topic_alias")
        if alias is None:
            return packet
        if alias > self.limits.topic_alias_maximum:  # MQTT5-3.3.2-9
            raise TopicAliasInvalid(f"topic alias {alias} is over {self.limits.topic_alias_maximum}")
        if self.aliases is None:
            self.aliases = {}
        if packet.topic:
            self.aliases[alias] = packet.topic
            return packet
        topic = self.aliases.get(alias)
        if topic is None:
            raise ProtocolError(f"topic alias {alias} was never set")
        return replace(packet, topic=topic)

    def answer(
        self,
        packet: Publish,
        reason: Reason = Reason.SUCCESS,
        *,
        text: str = "",
        user_properties: Sequence[tuple[str, str]] = (),
    ) -> bytes:
        """The verdict on an inbound QoS 1 or 2 message; returns what may leave now, which is nothing while an
        earlier message is undecided."""
        assert self.inbound is not None
        self.inbound[packet.packet_id] = self._verdict(packet, reason, text, user_properties)
        ready = []
        for packet_id, frame in self.inbound.items():
            if frame is None:
                break
            ready.append((packet_id, frame))
        for packet_id, _ in ready:
            del self.inbound[packet_id]
        return b"".join(frame for _, frame in ready)

    def _verdict(
        self, packet: Publish, reason: Reason, text: str, user_properties: Sequence[tuple[str, str]]
    ) -> bytes:
        if self.encoding.version != 5:
            reason = Reason.SUCCESS  # 3.1.1 has no other answer, and no answer would mean a resend for ever
        if packet.qos == 2 and reason >= Reason.UNSPECIFIED_ERROR:
            self.refused(packet.packet_id)
        elif packet.qos == 2:
            self._undecided().discard(packet.packet_id)
        if packet.qos == 1 and reason == Reason.SUCCESS and not text and not user_properties:
            return PUBACK + packet.packet_id.to_bytes(2)
        return self._acknowledge(
            Puback if packet.qos == 1 else Pubrec, packet.packet_id, reason, text, user_properties
        )

    def _acknowledge(
        self,
        kind: type[Puback | Pubrec],
        packet_id: int,
        reason: Reason,
        text: str,
        user_properties: Sequence[tuple[str, str]],
    ) -> bytes:
        """With an explanation, where the peer wants one (MQTT5-3.1.2-29) and takes it (MQTT5-3.4.2-2)."""
        version = self.encoding.version
        if version == 5 and self.manners.problem_information and (text or user_properties):
            properties: Properties = {}
            if text:
                properties["reason_string"] = text
            if user_properties:
                properties["user_properties"] = tuple(user_properties)
            frame = encode(kind(packet_id, reason, properties), version)
            if self.fits(len(frame)):
                return frame
        return encode(kind(packet_id, reason, NO_PROPERTIES), version)

    def _say(self, packet: Packet) -> list[Action]:
        """A step of QoS 2, which waits for the one before to be saved."""
        return self._once_saved(encode(packet, self.encoding.version))

    def _once_saved(self, frame: bytes) -> list[Action]:
        """What was noted on the connection before may not be saved yet either."""
        if self.mailbox is not None and self.mailbox.log is not None:
            self._hold(frame)
            return []
        return [Send(frame)]

    def _release(self, packet_id: int) -> list[Action]:
        mailbox = self.mailbox
        if mailbox is None or mailbox.received is None or packet_id not in mailbox.received:
            return self._say(Pubcomp(packet_id, Reason.PACKET_IDENTIFIER_NOT_FOUND))
        mailbox.received.discard(packet_id)
        mailbox.note_received()
        return self._say(Pubcomp(packet_id))

    def _received(self, packet: Pubrec, now: float) -> list[Action]:
        packet_id, mailbox = packet.packet_id, self.mailbox
        item = self.unacked.get(packet_id) if self.unacked else None
        refused = packet.reason >= Reason.UNSPECIFIED_ERROR
        if item is None:
            answer = Pubrel(packet_id, Reason.PACKET_IDENTIFIER_NOT_FOUND)
            return [] if refused else [Send(encode(answer, self.encoding.version))]  # MQTT5-4.3.3-4
        if type(item) is not TopicCopy or item.qos != 2 or mailbox is None:
            raise ProtocolError(f"PUBREC for packet id {packet_id}, which has QoS 1")
        self.waiting_since = now
        if refused:  # it does not want it
            self._leave(mailbox, packet_id, item)
            return []
        mailbox.release(packet_id)
        if mailbox.log is not None:
            mailbox.log.sent(packet_id, item, released=True)
        return self._say(Pubrel(packet_id))

    def _complete(self, packet: Pubcomp, now: float) -> list[Action]:
        packet_id, mailbox = packet.packet_id, self.mailbox
        item = self.unacked.get(packet_id) if self.unacked else None
        if item is None:
            return []
        if type(item) is not TopicCopy or mailbox is None or not mailbox.is_released(packet_id):
            raise ProtocolError(f"PUBCOMP for packet id {packet_id}, before PUBREC")
        self.waiting_since = now
        self._leave(mailbox, packet_id, item)
        return []

    def _leave(self, mailbox: Mailbox, packet_id: int, copy: TopicCopy) -> None:
        assert self.unacked is not None
        del self.unacked[packet_id]
        if not self.unacked:
            self.unacked = None
        mailbox.done(copy)
        mailbox.forget(packet_id)
