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
inbound QoS 1 and 2 messages leave in the order the messages came (MQTT5-4.6.0-2).
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, cast

from gateway.live import Encoding, LivePush, TopicMessage
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
    Subscription,
    Unsubscribe,
    encode,
)
from gateway.mqtt.errors import TopicAliasInvalid

MAX_PACKET_ID: Final = 65_535
TOPIC_ALIAS_MAXIMUM: Final = 16  # aliases a peer may set; each keeps one topic name alive
SUCCESS_PUBACK: Final = b"\x40\x02"
PUBACK_SIZE: Final = 4
PUBACK_BYTES: Final = 0x40
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
class Closed:
    """The peer said goodbye."""

    with_will: bool
    session_expiry: int | None  # seconds, if it changed its mind


Action = Send | Published | Acked | Subscribed | Unsubscribed | Closed


class Member(Protocol):
    """The live connection of a session, as far as fan-out needs it."""

    session: Session | None
    epoch: int  # of the route it claimed
    blocked: bool  # its socket is over the write buffer limit: skip it, it catches up when it drains

    def send(self, data: bytes) -> None: ...

    def catch_up(self) -> None: ...

    def close(self, label: str, reason: Reason | None = None, text: str = "") -> None: ...


class Outgoing:
    """An ordinary message on its way to one subscriber."""

    __slots__ = ("message", "qos", "received")

    def __init__(self, message: TopicMessage, qos: int) -> None:
        self.message = message
        self.qos = qos
        self.received = False  # PUBREC came: what is resent is PUBREL


@dataclass(frozen=True, slots=True)
class MailboxLimits:
    """What one session may make the node keep (G6)."""

    subscriptions: int = 1000
    queued_messages: int = 1000
    queued_bytes: int = 1_048_576


class Mailbox:
    """What an MQTT session has besides pushes, and keeps while its client is away."""

    __slots__ = (
        "dropped",
        "expires_at",
        "in_flight",
        "limits",
        "member",
        "next_id",
        "queue",
        "queued_bytes",
        "received",
        "session",
        "subscriptions",
    )

    def __init__(self, limits: MailboxLimits) -> None:
        self.limits = limits
        self.session: Session | None = None  # of the live connection
        self.member: Member | None = None  # that connection
        self.subscriptions: dict[
            str, tuple[Subscription, int]
        ] = {}  # filter -> options, subscription id (0: none)
        self.queue: deque[Outgoing] = deque()
        self.queued_bytes = 0
        self.in_flight: dict[int, Outgoing] = {}  # of the last connection, until sent again
        self.received: set[int] = set()  # inbound QoS 2 ids between PUBLISH and PUBREL
        self.next_id = 1
        self.expires_at: float | None = None  # while away
        self.dropped = 0  # messages that found no room

    @property
    def waiting(self) -> bool:
        """Something here is to be sent."""
        return bool(self.queue or self.in_flight)

    @property
    def empty(self) -> bool:
        """Nothing here that a new session would not have."""
        return not (self.subscriptions or self.queue or self.in_flight or self.received)

    def put(self, item: Outgoing) -> None:
        """Queue a message; with no room left the newcomer is dropped and counted."""
        size = len(item.message.payload) + len(item.message.topic)
        if (
            len(self.queue) >= self.limits.queued_messages
            or self.queued_bytes + size > self.limits.queued_bytes
        ):
            self.dropped += 1
            return
        self.queue.append(item)
        self.queued_bytes += size

    def put_for_later(self, message: TopicMessage, qos: int) -> None:
        """Queue a message for an absent client."""
        self.put(Outgoing(message, qos))

    def take(self, now: float) -> Outgoing | None:
        """The next message that has not expired."""
        while self.queue:
            item = self.queue.popleft()
            self.queued_bytes -= len(item.message.payload) + len(item.message.topic)
            if item.message.expires_at is None or item.message.expires_at > now:
                return item
        return None


class Session:
    """One connection's session. `version`, `window` and the rest are fixed at CONNECT."""

    __slots__ = (
        "aliases",
        "behind",
        "cursor",
        "devno",
        "encoding",
        "fetch",
        "inbound",
        "inbound_maximum",
        "inbox",
        "limits",
        "mailbox",
        "maximum_packet",
        "next_id",
        "resend",
        "seen",
        "sent",
        "unacked",
        "waiting_since",
        "window",
    )

    def __init__(
        self,
        encoding: Encoding,
        *,
        devno: int = -1,
        window: int = 32,
        maximum_packet: int = 0,
        inbound_maximum: int = 256,
        limits: MailboxLimits = MailboxLimits(),
    ) -> None:
        self.encoding = encoding
        self.limits = limits
        self.devno = devno  # -1: a publisher, which receives no pushes
        self.window = (
            window  # packet ids in flight at most: the peer's Receive Maximum and the carrier's window
        )
        self.maximum_packet = maximum_packet  # bytes the peer accepts; 0 = no limit
        self.inbound_maximum = inbound_maximum  # unanswered inbound QoS 1 and 2 messages
        self.next_id = 1
        self.unacked: dict[int, LivePush | Outgoing] | None = (
            None  # None when empty: idle sessions own no dict
        )
        self.waiting_since = (
            0.0  # since when the oldest acknowledgement is awaited, restarted by any progress
        )
        self.resend: dict[int, int] | None = None  # msg_id -> packet id of the connection before
        self.seen = 0  # the newest inbox row that was taken up on this connection
        self.sent = 0  # the newest msg_id that was sent on it: nothing older may follow (G3)
        self.cursor = 0
        self.inbox: list[LivePush] | None = None  # newest first, so that the next is popped off the end
        self.fetch = Inbox.EMPTY
        self.behind = False  # something is owed that found no room
        self.inbound: dict[int, bytes | None] | None = None  # packet id -> its answer, None while undecided
        self.aliases: dict[int, str] | None = None
        self.mailbox: Mailbox | None = None

    @property
    def newest(self) -> int:
        """The newest msg_id that was taken up or sent on this connection; inbox rows up to it are behind us."""
        return max(self.seen, self.sent)

    # Sending

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
                self._enter(known, push, now)
                return push.frames(self.encoding).again(known)
        packet_id = self.next_id
        if self.unacked is None and not self.resend and self.mailbox is None:  # the hot case: any id is free
            self.unacked = {packet_id: push}
            self.waiting_since = now
            self.next_id = packet_id + 1 if packet_id < MAX_PACKET_ID else 1
        else:
            packet_id = self._free_id()
            self._enter(packet_id, push, now)
        return push.frames(self.encoding)[packet_id]

    def _free_id(self) -> int:
        packet_id = self.next_id
        reserved = {*(self.resend or {}).values(), *(self.mailbox.in_flight if self.mailbox else ())}
        while (self.unacked and packet_id in self.unacked) or packet_id in reserved:
            packet_id = packet_id % MAX_PACKET_ID + 1
        self.next_id = packet_id % MAX_PACKET_ID + 1
        return packet_id

    def _enter(self, packet_id: int, item: LivePush | Outgoing, now: float) -> None:
        if self.unacked is None:
            self.unacked = {}
            self.waiting_since = now
        self.unacked[packet_id] = item

    def fits(self, size: int) -> bool:
        """Whether the peer accepts a packet of so many bytes (MQTT5-3.1.2-24)."""
        return not self.maximum_packet or size <= self.maximum_packet

    def own_mailbox(self) -> Mailbox:
        """The session's mailbox, made on first use: most devices only receive pushes and never need one."""
        if self.mailbox is None:
            self.mailbox = Mailbox(self.limits)
            self.mailbox.session = self
        return self.mailbox

    def send_message(self, message: TopicMessage, qos: int, now: float) -> bytes | None:
        """An ordinary message for this subscriber: its packet, or None if it was queued or dropped."""
        if qos == 0:
            return self._publish_frame(Outgoing(message, 0), 0, now, dup=False)
        mailbox = self.own_mailbox()
        if mailbox.waiting or not self.room:
            mailbox.put(Outgoing(message, qos))
            return None
        return self._send_outgoing(Outgoing(message, qos), now)

    def _send_outgoing(self, item: Outgoing, now: float) -> bytes | None:
        packet_id = self._free_id()
        frame = self._publish_frame(item, packet_id, now, dup=False)
        if frame is not None:
            self._enter(packet_id, item, now)
        return frame

    def _publish_frame(self, item: Outgoing, packet_id: int, now: float, *, dup: bool) -> bytes | None:
        message = item.message
        packet = Publish(
            topic=message.topic,
            payload=message.payload,
            qos=item.qos,
            retain=message.retain,
            dup=dup,
            packet_id=packet_id,
            properties=_outgoing_properties(message, now) if self.encoding.version == 5 else NO_PROPERTIES,
        )
        frame = encode(packet, self.encoding.version)
        return frame if self.fits(len(frame)) else None

    def drain_mailbox(self, now: float) -> list[bytes]:
        """Ordinary messages that fit the window now: those to be sent again, then the queue."""
        frames = self._send_again(now)
        mailbox = self.mailbox
        while mailbox is not None and self.room and (item := mailbox.take(now)) is not None:
            frame = self._send_outgoing(item, now)
            if frame is not None:
                frames.append(frame)
        return frames

    # Life

    def resume(self, mailbox: Mailbox, now: float) -> list[bytes]:
        """Take up a mailbox: what is to be sent again first, in its old order (MQTT5-4.4.0-1, 4.6.0-1)."""
        mailbox.session = self
        self.mailbox = mailbox
        self.next_id = mailbox.next_id
        return self._send_again(now)

    def _send_again(self, now: float) -> list[bytes]:
        """As many as fit: the window may be smaller than that of the connection before (MQTT5-3.3.4-9)."""
        frames: list[bytes] = []
        in_flight = self.mailbox.in_flight if self.mailbox else {}
        while in_flight and self.room:
            packet_id = next(iter(in_flight))
            item = in_flight.pop(packet_id)
            frame = (
                encode(Pubrel(packet_id), self.encoding.version)
                if item.received
                else self._publish_frame(item, packet_id, now, dup=True)
            )
            if frame is not None:
                self._enter(packet_id, item, now)
                frames.append(frame)
        return frames

    def suspend(self) -> dict[int, int]:
        """The connection is gone. Leaves the ordinary part in the mailbox and returns the pushes in flight,
        msg_id -> packet id, for `resend` of the next session."""
        pushes: dict[int, int] = {}
        messages: dict[int, Outgoing] = {}
        for packet_id, item in (self.unacked or {}).items():
            if isinstance(item, LivePush):
                pushes[item.msg_id] = packet_id
            else:
                messages[packet_id] = item
        if self.resend:  # passed over in favour of newer ones: not owed any more, their ids are free
            newest = max(pushes, default=0)
            pushes |= {msg_id: known for msg_id, known in self.resend.items() if msg_id > newest}
        if self.mailbox is not None:
            self.mailbox.in_flight = messages | self.mailbox.in_flight
            self.mailbox.session = self.mailbox.member = None
            self.mailbox.next_id = self.next_id
        self.unacked = None
        return pushes

    # Receiving

    def acked(self, packet_id: int, now: float) -> LivePush | None:
        """A PUBACK: the push it acknowledges, if it was one. Unknown ids are ignored: an acknowledgement may
        come twice."""
        unacked = self.unacked
        if unacked is None:
            return None
        item = unacked.pop(packet_id, None)
        if not unacked:
            self.unacked = None
        self.waiting_since = now
        if type(item) is LivePush:
            return item
        if isinstance(item, Outgoing) and item.qos == 2:
            raise ProtocolError(f"PUBACK for packet id {packet_id}, which has QoS 2")
        return None

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
                return [Send(self._release(packet.packet_id))]
            case Pubrec():
                return [Send(self._received(packet, now))]
            case Pubcomp():
                return self._complete(packet, now)
            case Subscribe():
                return [Subscribed(packet)]
            case Unsubscribe():
                return [Unsubscribed(packet)]
            case Disconnect():
                expiry = packet.properties.get("session_expiry_interval")
                return [Closed(packet.reason == Reason.DISCONNECT_WITH_WILL_MESSAGE, expiry)]
            case Auth():
                raise ProtocolError("AUTH without an authentication method in CONNECT")  # MQTT5-4.12.0-6
            case _:
                raise ProtocolError(f"{type(packet).__name__.upper()} is not for a client to send")

    def _receive_publish(self, packet: Publish) -> list[Action]:
        packet = self._resolve_alias(packet)
        if packet.qos == 0:
            return [Published(packet)]
        inbound = self.inbound
        if inbound is None:
            inbound = self.inbound = {}
        if packet.packet_id in inbound:
            return []  # still being decided; one answer serves both
        if len(inbound) >= self.inbound_maximum and self.encoding.version == 5:
            raise ProtocolError(
                f"more than {self.inbound_maximum} unanswered messages", Reason.RECEIVE_MAXIMUM_EXCEEDED
            )  # MQTT5-3.3.4-7
        inbound[packet.packet_id] = None
        if packet.qos == 2 and packet.packet_id in self.own_mailbox().received:
            return [Send(self.answer(packet))]  # MQTT5-4.3.3-10: seen before, PUBREC again
        return [Published(packet)]

    def _resolve_alias(self, packet: Publish) -> Publish:
        alias = packet.properties.get("topic_alias")
        if alias is None:
            return packet
        if alias > TOPIC_ALIAS_MAXIMUM:  # MQTT5-3.3.2-9
            raise TopicAliasInvalid(f"topic alias {alias} is over {TOPIC_ALIAS_MAXIMUM}")
        if self.aliases is None:
            self.aliases = {}
        if packet.topic:
            self.aliases[alias] = packet.topic
            return packet
        topic = self.aliases.get(alias)
        if topic is None:
            raise ProtocolError(f"topic alias {alias} was never set")
        return Publish(
            topic, packet.payload, packet.qos, packet.retain, packet.dup, packet.packet_id, packet.properties
        )

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
        version = self.encoding.version
        properties: Properties = {}
        if version == 5:
            if text:
                properties["reason_string"] = text
            if user_properties:
                properties["user_properties"] = tuple(user_properties)
        else:
            reason = Reason.SUCCESS  # 3.1.1 has no other answer, and no answer would mean a resend for ever
        if packet.qos == 1:
            if not properties and reason == Reason.SUCCESS:
                return SUCCESS_PUBACK + packet.packet_id.to_bytes(2)
            return encode(Puback(packet.packet_id, reason, properties or NO_PROPERTIES), version)
        if reason < Reason.UNSPECIFIED_ERROR:  # MQTT5-4.3.3-9: a refused id is free again
            self.own_mailbox().received.add(packet.packet_id)
        return encode(Pubrec(packet.packet_id, reason, properties or NO_PROPERTIES), version)

    def _release(self, packet_id: int) -> bytes:
        received = self.own_mailbox().received
        known = packet_id in received
        received.discard(packet_id)
        reason = Reason.SUCCESS if known else Reason.PACKET_IDENTIFIER_NOT_FOUND
        return encode(Pubcomp(packet_id, reason), self.encoding.version)

    def _received(self, packet: Pubrec, now: float) -> bytes:
        item = self.unacked.get(packet.packet_id) if self.unacked else None
        if not isinstance(item, Outgoing) or item.qos != 2:
            return encode(Pubrel(packet.packet_id, Reason.PACKET_IDENTIFIER_NOT_FOUND), self.encoding.version)
        self.waiting_since = now
        if packet.reason >= Reason.UNSPECIFIED_ERROR:
            self._leave(packet.packet_id)
            return b""
        item.received = True
        return encode(Pubrel(packet.packet_id), self.encoding.version)

    def _complete(self, packet: Pubcomp, now: float) -> list[Action]:
        item = self.unacked.get(packet.packet_id) if self.unacked else None
        if isinstance(item, Outgoing) and item.received:
            self.waiting_since = now
            self._leave(packet.packet_id)
        return []

    def _leave(self, packet_id: int) -> None:
        assert self.unacked is not None
        del self.unacked[packet_id]
        if not self.unacked:
            self.unacked = None


def _outgoing_properties(message: TopicMessage, now: float) -> Properties:
    properties = cast("Properties", dict(message.properties or {}))
    properties.pop("topic_alias", None)  # MQTT5-3.3.2-7: an alias belongs to one connection
    if message.expires_at is not None:  # MQTT5-3.3.2-6: what is left of it
        properties["message_expiry_interval"] = max(0, int(message.expires_at - now))
    if message.subscription_ids:
        properties["subscription_identifiers"] = tuple(message.subscription_ids)
    return properties or NO_PROPERTIES
