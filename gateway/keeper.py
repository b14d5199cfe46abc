"""Sessions across connections: taken up, left, kept, ended, and loaded with their app after a restart.

What a session holds besides pushes is its `Mailbox`. A session that outlives its connection is durable from the
moment it holds anything: its mailbox gets a log, and a row in the store (decision 0008).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

import msgspec
from pyroaring import BitMap

from broker.logs import log_event
from broker.model import SessionItem
from gateway.hub import Hub, Ordinary, Resend
from gateway.journal import (
    COPIES,
    MESSAGE,
    RECEIVED,
    SENT,
    SESSION,
    SUBSCRIPTION,
    WILL,
    CopyRow,
    Journal,
    MessageRow,
    SessionRow,
    StoredSession,
    decode_subscription,
)
from gateway.mailbox import NOTHING, Entry, Mailbox, MailboxLimits, Replay
from gateway.messages import TopicCopy, TopicMessage, stored_publish
from gateway.metrics import NodeMetrics
from gateway.session import Session
from gateway.wheel import Clock
from gateway.wills import Wills, delay_of

if TYPE_CHECKING:
    from gateway.connection import Connection

NEVER: Final = 0xFFFF_FFFF  # seconds: a session expiry that means so (MQTT5-3.1.2.11.2)

log = logging.getLogger(__name__)


class Keeper:
    def __init__(
        self,
        journal: Journal,
        wills: Wills,
        clock: Clock,
        metrics: NodeMetrics,
        *,
        limits: MailboxLimits,
        max_sessions: int,
        reassign: Callable[[Hub, Mailbox, Sequence[TopicCopy]], Sequence[TopicCopy]],
        replay: Callable[[Hub, Entry], Iterator[Replay | None]],
    ) -> None:
        self._journal = journal
        self._wills = wills
        self._clock = clock
        self._metrics = metrics
        self._limits = limits
        self._max_sessions = max_sessions
        self.replay = replay  # the retained messages of a subscription
        self._reassign = reassign  # gives copies of shared subscriptions to other members; returns the rest

    # While a client is connected

    def adopt(self, connection: Connection) -> Mailbox:
        """The mailbox of a live connection, known to be its."""
        hub, session = connection.hub, connection.session
        assert hub is not None
        assert session is not None
        mailbox = session.own_mailbox()
        if mailbox.member is None:
            mailbox.member = connection
            mailbox.key = connection.key
            if connection.session_expiry:
                self._make_durable(hub, mailbox, connection.session_expiry)
        return mailbox

    def note_will(self, connection: Connection) -> None:
        """Of a session that outlives its connection; see `Wills`."""
        if connection.will is not None and connection.session_expiry:
            self._wills.note(self.adopt(connection), connection.will)

    def _make_durable(self, hub: Hub, mailbox: Mailbox, expiry: int) -> None:
        """Without ordinary topics there is nothing in it that must survive (decision 0022)."""
        if hub.ordinary is Ordinary.NONE:
            return
        if mailbox.log is None:
            mailbox.log = StoredSession(self._journal, hub.app.app_id, hub.new_session_number())
            mailbox.note_received()
        self._save(hub, mailbox, expiry, None)

    def _save(self, hub: Hub, mailbox: Mailbox, expiry: int, expires_at: float | None) -> None:
        assert mailbox.log is not None
        row = SessionRow(mailbox.key, expiry, expires_at, mailbox.next_id)
        self._journal.note(hub.app.app_id, mailbox.log.number, SESSION, 0, msgspec.msgpack.encode(row))

    def resume(
        self, connection: Connection, hub: Hub, session: Session, *, clean_start: bool
    ) -> tuple[list[bytes], bool]:
        """Take up the session before this one, or end it. Returns what to send again, and Session Present."""
        key, now = connection.key, self._clock.now
        mailbox = hub.mailboxes.pop(key, None)
        resend = hub.resend.pop(session.devno, None)
        known = hub.session_ends.take(session.devno, now)
        expired = mailbox is not None and mailbox.expires_at is not None and mailbox.expires_at <= now
        over = clean_start or expired
        self._wills.cancel(hub, key, mailbox, publish=over)
        if over:
            if mailbox is not None:
                self.end(hub, mailbox)
            return [], False
        if resend is not None and resend.expires_at > now:
            session.resend = resend.packet_ids
        if mailbox is None:
            return [], known
        mailbox.member = connection
        mailbox.expires_at = None
        self._make_durable(hub, mailbox, connection.session_expiry)
        return session.resume(mailbox, now), True

    # When a connection has ended

    def leave(self, connection: Connection, hub: Hub, session: Session) -> None:
        """Keep what outlives the connection, and end what does not."""
        in_flight = session.suspend()
        self._metrics.abandoned.value += len(in_flight)
        mailbox, expiry = session.mailbox, connection.session_expiry
        if mailbox is not None:
            self._hand_over(hub, mailbox)
        if not expiry:
            if mailbox is not None:
                self.end(hub, mailbox)
        else:
            # Of devices that hold nothing `session_ends` knows; a will's delay is part of the session, too.
            kept = session.devno < 0 or (connection.will is not None and delay_of(connection.will) > 0)
            if kept and mailbox is None:
                mailbox = Mailbox(self._limits, connection.key)
            if mailbox is not None and (kept or not mailbox.empty):
                expiry = self._keep(hub, mailbox, expiry)
            elif mailbox is not None:
                self._forget(hub, mailbox)
            if expiry:
                self._note_device(hub, session.devno, in_flight, expiry)
        if connection.will is not None:
            self._wills.send(hub, connection.key, connection.will, expiry, mailbox)
        else:
            self._wills.forget(mailbox)

    def _note_device(self, hub: Hub, devno: int, in_flight: dict[int, int], expiry: int) -> None:
        if devno >= 0:
            now = asyncio.get_running_loop().time()  # the clock may be a tick old: it must not end early
            hub.session_ends.note(devno, now, expiry)
            if in_flight and len(hub.resend) < self._max_sessions:
                hub.resend[devno] = Resend(in_flight, now + expiry)

    def _hand_over(self, hub: Hub, mailbox: Mailbox) -> None:
        """Other members of its shared subscriptions get what it has not acknowledged, the oldest first. What nobody
        takes stays as it is (MQTT5-4.4.0-1), and so does what QoS 2 has sent (MQTT5-4.8.2-4)."""
        sent, queued = _shared(mailbox)
        if not sent and not queued:
            return
        kept = set(self._reassign(hub, mailbox, [*sent, *queued]))
        mailbox.remove(lambda copy: copy.share is not None and copy not in kept)
        for copy, packet_id in sent.items():
            if copy not in kept:
                del mailbox.in_flight[packet_id]
                if mailbox.log is not None:
                    mailbox.log.completed(packet_id)

    def _keep(self, hub: Hub, mailbox: Mailbox, expiry: int) -> int:
        """For how many seconds; 0: there is no room, and the session is over."""
        if len(hub.mailboxes) >= self._max_sessions:
            log_event(log, logging.WARNING, "session not kept: max_sessions reached", session=mailbox.key)
            self.end(hub, mailbox)
            return 0
        self._make_durable(hub, mailbox, expiry)
        for packet_id, copy in mailbox.in_flight.items():
            if copy.left is not None and mailbox.log is not None:
                mailbox.log.sent(packet_id, copy, released=mailbox.is_released(packet_id))
        self._keep_for(hub, mailbox, expiry, expiry)
        return expiry

    def _keep_for(self, hub: Hub, mailbox: Mailbox, expiry: int, left: float) -> None:
        mailbox.expires_at = asyncio.get_running_loop().time() + left if expiry != NEVER else None
        if mailbox.log is not None:
            self._save(hub, mailbox, expiry, self._clock.wall + left)
        hub.mailboxes[mailbox.key] = mailbox

    def end(self, hub: Hub, mailbox: Mailbox) -> None:
        """The session is over, and everything in it; what QoS 2 has sent goes to nobody else (MQTT5-4.8.2-5)."""
        mailbox.over = True
        for topic_filter in mailbox.subscriptions:
            hub.subscriptions.remove(topic_filter, mailbox)
        sent, queued = _shared(mailbox)
        self._reassign(hub, mailbox, [*sent, *queued])
        for copy in (*mailbox.in_flight.values(), *mailbox.queue):
            mailbox.done(copy)
        self._forget(hub, mailbox)

    def _forget(self, hub: Hub, mailbox: Mailbox) -> None:
        """Of a durable session the store forgets every item."""
        mailbox.over = True
        if (stored := mailbox.log) is not None:
            for topic_filter in mailbox.subscriptions:
                stored.unsubscribed(topic_filter)
            for packet_id in mailbox.in_flight:
                stored.completed(packet_id)
            stored.received(BitMap())
            stored.will(None)
            self._journal.note(hub.app.app_id, stored.number, SESSION, 0, None)
        mailbox.subscriptions, mailbox.in_flight, mailbox.received = {}, {}, None
        mailbox.queue = NOTHING
        mailbox.replays.clear()

    def expire(self, hub: Hub) -> None:
        """End the sessions whose client stayed away too long."""
        for mailbox in hub.drop_sessions(self._clock.now):
            self._wills.cancel(hub, mailbox.key, mailbox, publish=True)
            self.end(hub, mailbox)

    # After a restart

    def load(self, hub: Hub, items: Iterable[SessionItem]) -> None:
        """What the app's sessions were when the server stopped. Those whose client was connected live on for their
        whole expiry from now."""
        _Loading(self, hub, self._clock).load(items)

    def loaded(self, hub: Hub, mailbox: Mailbox, row: SessionRow) -> None:
        mailbox.next_id = row.next_id
        left = row.expiry if row.expires_at is None else row.expires_at - self._clock.wall
        self._keep_for(hub, mailbox, row.expiry, left)

    def touch(self, hub: Hub, message: TopicMessage) -> None:
        self._journal.touch(hub.app.app_id, message)

    def new_mailbox(self, hub: Hub, number: int, key: str) -> Mailbox:
        mailbox = Mailbox(self._limits, key)
        mailbox.log = StoredSession(self._journal, hub.app.app_id, number)
        return mailbox

    def restore_will(self, hub: Hub, mailbox: Mailbox, value: bytes) -> None:
        assert isinstance(mailbox.log, StoredSession)
        mailbox.log.has_will = True
        self._wills.restore(hub, mailbox, value)


class _Loading:
    """Items of one app on their way into its hub."""

    def __init__(self, keeper: Keeper, hub: Hub, clock: Clock) -> None:
        self._keeper = keeper
        self._hub = hub
        self._clock = clock
        self._mailboxes: dict[int, Mailbox] = {}  # by session number
        self._owed: dict[int, dict[int, TopicCopy]] = {}  # session number -> number of a copy -> it

    def load(self, items: Iterable[SessionItem]) -> None:
        kinds: dict[str, list[SessionItem]] = {}
        for item in items:
            kinds.setdefault(item.kind, []).append(item)
        rows = {
            item.session: msgspec.msgpack.decode(_value(item), type=SessionRow)
            for item in kinds.get(SESSION, ())
        }
        for number, row in rows.items():
            self._mailboxes[number] = self._keeper.new_mailbox(self._hub, number, row.key)
        self._hub.numbers_used(max(rows, default=0))
        for item in kinds.get(SUBSCRIPTION, ()):
            self._subscription(item)
        self._messages(kinds.get(MESSAGE, ()), kinds.get(COPIES, ()))
        for item in kinds.get(SENT, ()):
            self._sent(item)
        for item in kinds.get(RECEIVED, ()):
            if (mailbox := self._mailboxes.get(item.session)) is not None:
                mailbox.received = BitMap.deserialize(_value(item))
        for number, mailbox in self._mailboxes.items():
            self._finish(number, mailbox)
            self._keeper.loaded(self._hub, mailbox, rows[number])
        for item in kinds.get(WILL, ()):
            if (mailbox := self._mailboxes.get(item.session)) is not None:
                self._keeper.restore_will(self._hub, mailbox, _value(item))

    def _subscription(self, item: SessionItem) -> None:
        mailbox = self._mailboxes.get(item.session)
        if mailbox is not None:
            entry, owed = decode_subscription(str(item.item), _value(item))
            mailbox.subscriptions[str(item.item)] = entry
            self._hub.subscriptions.add(entry, mailbox)
            if owed:
                mailbox.replays[str(item.item)] = self._keeper.replay(self._hub, entry)

    def _messages(self, messages: Iterable[SessionItem], copies: Iterable[SessionItem]) -> None:
        found = {int(item.item): self._message(item) for item in messages}
        for item in copies:
            message = found.get(int(item.item))
            if message is not None:
                self._copies(message, msgspec.msgpack.decode(_value(item), type=list[CopyRow]))
        for message in found.values():
            self._hub.numbers_used(0, message.number)
            if not all(copy.left for copy in message.copies) or not message.copies:
                self._keeper.touch(self._hub, message)  # nobody waits for it any more

    def _message(self, item: SessionItem) -> TopicMessage:
        row = msgspec.msgpack.decode(_value(item), type=MessageRow)
        packet = stored_publish(row.packet)
        expires_at = None if row.expires_at is None else row.expires_at - self._clock.wall + self._clock.now
        message = TopicMessage(
            packet.topic, packet.payload, row.qos, packet.retain, packet.properties, expires_at, row.source
        )
        message.number = int(item.item)
        return message

    def _copies(self, message: TopicMessage, rows: Sequence[CopyRow]) -> None:
        for row in rows:
            copy = TopicCopy(
                message,
                row.qos,
                retain=row.retain,
                subscription_ids=row.subscription_ids,
                share=self._hub.subscriptions.group(row.share) if row.share else None,
            )
            copy.number = row.number
            stored = BitMap.deserialize(row.left)  # some may have ended while it was on its way to them
            self._hub.numbers_used(max(stored, default=0), row.number)
            copy.left = BitMap(number for number in stored if number in self._mailboxes)
            message.copies.append(copy)
            for number in copy.left:
                self._owed.setdefault(number, {})[copy.number] = copy

    def _sent(self, item: SessionItem) -> None:
        """Packet ids come in no order; `_finish` sorts them by copy, which is the order of sending."""
        mailbox, packet_id = self._mailboxes.get(item.session), int(item.item)
        number, released = msgspec.msgpack.decode(_value(item), type=tuple[int, bool])
        if mailbox is None:
            return
        assert isinstance(mailbox.log, StoredSession)
        mailbox.log.ids.add(packet_id)
        copy = self._owed.get(item.session, {}).pop(number, None)
        if copy is None:
            mailbox.log.completed(packet_id)
            return
        mailbox.in_flight[packet_id] = copy
        if released:
            mailbox.release(packet_id)

    def _finish(self, number: int, mailbox: Mailbox) -> None:
        in_order = sorted(mailbox.in_flight.items(), key=lambda sent: sent[1].number)
        mailbox.in_flight = dict(in_order)
        for _, copy in sorted(self._owed.pop(number, {}).items()):
            mailbox.restore(copy)


def _shared(mailbox: Mailbox) -> tuple[dict[TopicCopy, int], list[TopicCopy]]:
    """What other members of its shared subscriptions may get: sent with QoS 1, by packet id, and not sent yet."""
    sent = {copy: packet_id for packet_id, copy in mailbox.in_flight.items() if copy.share and copy.qos == 1}
    return sent, [copy for copy in mailbox.queue if copy.share]


def _value(item: SessionItem) -> bytes:
    assert item.value is not None
    return item.value
