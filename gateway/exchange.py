"""Ordinary MQTT topics inside an app: subscribe, publish, retain, under the app's access rules (decision 0009).

`push` is not a topic one can join or leave: every device has it. `$SYS` belongs to the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pyroaring import BitMap

from broker.model import App, Retained
from broker.store import Store
from gateway.hub import Hub
from gateway.journal import Journal
from gateway.live import PUSH_TOPIC
from gateway.mailbox import Entry, Mailbox, Replay, role_of
from gateway.messages import TopicCopy, TopicMessage, passed_on, stored_publish
from gateway.metrics import NodeMetrics
from gateway.mqtt import (
    Publish,
    Reason,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
    encode,
)
from gateway.postman import Postman, Targets
from gateway.replays import Replays
from gateway.session import Session
from gateway.sys_topics import SysTopics
from gateway.topics import SharedGroup, split_group
from gateway.wheel import Clock

if TYPE_CHECKING:
    from gateway.connection import Connection

NO_IDS: Final[tuple[int, ...]] = ()

Options = tuple[int, bool, tuple[int, ...]]  # QoS, retain, subscription identifiers: what makes copies differ


class Exchange:
    def __init__(
        self,
        store: Store,
        journal: Journal,
        postman: Postman,
        clock: Clock,
        metrics: NodeMetrics,
        *,
        max_topic_length: int,
        max_topic_levels: int,
        counters: Callable[[], Mapping[str, float | str]],
        sys_interval: float,
    ) -> None:
        self._store = store
        self._journal = journal
        self._postman = postman
        self._clock = clock
        self._metrics = metrics
        self._max_length = max_topic_length
        self._max_levels = max_topic_levels
        self.sys_topics = SysTopics(counters, self.route, sys_interval)
        self.replays = Replays(clock, postman, self.sys_topics, self._keep)

    def fits(self, topic: str) -> bool:
        """Whether a topic or filter is within the limits; each level costs a node of the index."""
        return (
            topic.count("/") < self._max_levels
            and len(topic) <= self._max_length
            and (topic.isascii() or len(topic.encode()) <= self._max_length)
        )

    # Subscriptions

    def subscribe(self, connection: Connection, packet: Subscribe) -> None:
        session = connection.session
        assert session is not None
        identifier = packet.properties.get("subscription_identifiers", (0,))[0]
        reasons: list[Reason] = []
        replays: dict[str, Iterator[Replay | None]] = {}
        for subscription in packet.subscriptions:
            reason, replay = self._subscribe_one(connection, subscription, identifier)
            reasons.append(reason)
            if replay is not None:
                replays[subscription.filter] = replay
        suback = encode(Suback(packet.packet_id, tuple(reasons)), session.encoding.version)
        if _too_large(connection, session, suback):
            return
        mailbox = session.mailbox
        if mailbox is None:
            connection.send(suback)
        elif mailbox.log is None:
            connection.send(suback)
            self.replays.begin(mailbox, replays)
        else:
            connection.when_saved(lambda: connection.send(suback))
            self._journal.when_saved(lambda _: self.replays.begin(mailbox, replays))

    def _subscribe_one(
        self, connection: Connection, subscription: Subscription, identifier: int
    ) -> tuple[Reason, Iterator[Replay | None] | None]:
        session, hub = connection.session, connection.hub
        assert session is not None
        assert hub is not None
        if subscription.filter == PUSH_TOPIC and session.devno >= 0:
            return Reason.GRANTED_QOS_1, None  # implicit, and always acknowledged
        share, plain = split_group(subscription.filter)
        if not self.fits(subscription.filter):
            return Reason.TOPIC_FILTER_INVALID, None
        if not hub.access.may_subscribe(*role_of(connection.key), plain):
            return Reason.NOT_AUTHORIZED, None
        mailbox = connection.node.keeper.adopt(connection)
        known = subscription.filter in mailbox.subscriptions
        if not known and len(mailbox.subscriptions) >= mailbox.limits.subscriptions:
            return Reason.QUOTA_EXCEEDED, None
        if session.manners.bridge:  # 3.1.1 cannot ask for it; without it two brokers echo each message
            subscription = replace(subscription, no_local=True, retain_as_published=True)
        entry = (subscription, identifier)
        mailbox.subscriptions[subscription.filter] = entry
        hub.subscriptions.add(entry, mailbox)
        wants = subscription.retain_handling == 0 or (subscription.retain_handling == 1 and not known)
        owed = wants and share is None
        if mailbox.log is not None:
            mailbox.log.subscribed(entry, owed=owed)
        return Reason(subscription.qos), self.replays.of(hub, entry) if owed else None

    def drain(self, connection: Connection, session: Session) -> None:
        """Send what waits and fits."""
        mailbox = session.own_mailbox()
        dropped = mailbox.dropped
        frames = session.drain_mailbox(self._clock.now)
        self._metrics.topic_messages.value += len(frames) + len(session.held or ())
        self._metrics.topic_dropped.value += mailbox.dropped - dropped
        connection.send(b"".join(frames))
        connection.send_held()
        if mailbox.replays and not mailbox.replaying:
            assert connection.hub is not None
            self.replays.go_on(connection.hub, mailbox)

    def unsubscribe(self, connection: Connection, packet: Unsubscribe) -> None:
        session, hub = connection.session, connection.hub
        assert session is not None
        assert hub is not None
        mailbox = session.mailbox
        reasons = [
            Reason.SUCCESS
            if mailbox is not None and self._leave(hub, mailbox, topic_filter)
            else Reason.NO_SUBSCRIPTION_EXISTED
            for topic_filter in packet.filters
        ]
        unsuback = encode(Unsuback(packet.packet_id, tuple(reasons)), session.encoding.version)
        if _too_large(connection, session, unsuback):
            return
        if _durable(mailbox):
            connection.when_saved(lambda: connection.send(unsuback))
        else:
            connection.send(unsuback)

    @staticmethod
    def _leave(hub: Hub, mailbox: Mailbox, topic_filter: str) -> bool:
        if mailbox.subscriptions.pop(topic_filter, None) is None:
            return False
        mailbox.replays.pop(topic_filter, None)
        hub.subscriptions.remove(topic_filter, mailbox)
        if mailbox.log is not None:
            mailbox.log.unsubscribed(topic_filter)
        return True

    def rules_changed(self, hub: Hub) -> None:
        """End what the new rules do not cover, and drop what waits for it (decision 0009)."""
        for mailbox in list(hub.sessions()):
            role, name = role_of(mailbox.key)
            ended = [
                topic_filter
                for topic_filter in mailbox.subscriptions
                if not hub.access.may_subscribe(role, name, split_group(topic_filter)[1])
            ]
            for topic_filter in ended:
                self._leave(hub, mailbox, topic_filter)
            if ended:
                for copy in mailbox.remove(
                    lambda copy: not hub.access.may_subscribe(role, name, copy.message.topic)  # noqa: B023
                ):
                    mailbox.drop(copy)

    # Messages

    def publish(self, hub: Hub, packet: Publish, origin: str, session: Session | None) -> tuple[Reason, bool]:
        """Hand an ordinary message to its subscribers, and retain it if asked to. `origin`: key of the session it is
        from. Returns the answer, and whether `saved` is to be awaited before it is given."""
        message = self._message(packet, origin)
        if packet.retain and not hub.retained.set(message):
            return Reason.QUOTA_EXCEEDED, False
        reason = self.route(hub, message, origin)
        saving = packet.retain or bool(message.number)
        if packet.qos == 2 and session is not None and _durable(session.mailbox):
            saving = True
            if not packet.retain:
                session.took(packet.packet_id)  # saved together with the message: exactly once
        return reason, saving

    async def saved(self, hub: Hub, packet: Publish, origin: str, session: Session | None = None) -> None:
        """What was published is durable. Raises StoreError."""
        if packet.retain:
            await self._store.retain([self._as_row(hub.app, packet, origin)])
            if packet.qos == 2 and session is not None:
                session.took(packet.packet_id)
        await self._journal.saved()

    async def taken(self, packet: Publish, session: Session) -> None:
        """A QoS 2 message is safe with somebody else: have its repeats known for repeats. Raises StoreError."""
        session.took(packet.packet_id)
        if _durable(session.mailbox):
            await self._journal.saved()

    def _message(self, packet: Publish, origin: str) -> TopicMessage:
        expiry = packet.properties.get("message_expiry_interval")
        return TopicMessage(
            packet.topic,
            packet.payload,
            packet.qos,
            packet.retain,
            passed_on(packet.properties),
            None
            if expiry is None
            else asyncio.get_running_loop().time() + expiry,  # the clock may be a tick old
            origin,
        )

    def route(self, hub: Hub, message: TopicMessage, origin: str = "") -> Reason:
        found = hub.subscriptions.match(message.topic)
        copies: dict[Options, TopicCopy] = {}
        targets = Targets([], [])
        for mailbox, entry in found.members.items():
            options, identifier = entry
            if options.no_local and mailbox.key == origin:
                continue
            wanted = (
                min(message.qos, options.qos),
                message.retain and options.retain_as_published,
                (identifier,) if identifier else NO_IDS,
            )
            targets.add(mailbox, copies.get(wanted) or _new_copy(copies, message, wanted))
        for mailbox, entries in found.several.items():
            wished = _options(message, entries, own=mailbox.key == origin)
            if wished is not None:
                targets.add(mailbox, copies.get(wished) or _new_copy(copies, message, wished))
        for group in found.groups:
            chosen = self._choose(message, group)
            if chosen is not None:
                targets.add(*chosen)
        durable: dict[TopicCopy, list[Mailbox]] = {}
        for mailbox, copy in zip(*targets, strict=True):
            if mailbox.log is not None and copy.qos:
                durable.setdefault(copy, []).append(mailbox)
        if durable:
            self._keep(hub, message, durable.items())
        self._postman.deliver(hub, message.topic, targets)
        return Reason.SUCCESS if targets.mailboxes else Reason.NO_MATCHING_SUBSCRIBERS

    @staticmethod
    def _choose(
        message: TopicMessage, group: SharedGroup, *, other_than: Mailbox | None = None, live: bool = False
    ) -> tuple[Mailbox, TopicCopy] | None:
        """The member of a shared subscription that gets the message, and what it gets."""
        mailbox = group.choose(qos=message.qos, other_than=other_than, live=live)
        if mailbox is None:
            return None
        options = _options(message, [group.members[mailbox]], own=False)
        assert options is not None
        qos, retain, ids = options
        return mailbox, TopicCopy(message, qos, retain=retain, subscription_ids=ids, share=group)

    def _keep(
        self, hub: Hub, message: TopicMessage, waiting: Iterable[tuple[TopicCopy, Sequence[Mailbox]]]
    ) -> None:
        """Store the message for the durable sessions that get it: one row, whoever they are."""
        new = not message.number
        if new:
            message.number = hub.new_message_number()
        for copy, mailboxes in waiting:
            copy.number = hub.new_message_number()
            copy.left = BitMap(mailbox.log.number for mailbox in mailboxes if mailbox.log is not None)
            message.copies.append(copy)
        if new:
            self._journal.note_message(hub.app.app_id, message)
        else:
            self._journal.touch(hub.app.app_id, message)

    def reassign(self, hub: Hub, mailbox: Mailbox, copies: Sequence[TopicCopy]) -> list[TopicCopy]:
        """Give copies of shared subscriptions, which this member has not acknowledged, to others: to those that are
        connected, or to whoever there is once its session is over. Returns those that nobody takes."""
        left = []
        for copy in copies:
            assert copy.share is not None
            chosen = self._choose(copy.message, copy.share, other_than=mailbox, live=not mailbox.over)
            if chosen is None:
                left.append(copy)
                continue
            if chosen[0].log is not None and chosen[1].qos:
                self._keep(hub, copy.message, [(chosen[1], [chosen[0]])])
            mailbox.done(copy)
            self._postman.deliver(hub, copy.message.topic, Targets([chosen[0]], [chosen[1]]))
        return left

    def publish_will(self, hub: Hub, packet: Publish, key: str) -> None:
        """See `Wills`. The rules may have changed since CONNECT."""
        if not hub.access.may_publish(*role_of(key), packet.topic):
            self._metrics.publishes_refused.labels("not allowed").value += 1
            return
        _, saving = self.publish(hub, packet, key, None)
        if saving:
            self._postman.spawn(self.saved(hub, packet, key))

    # Retained messages in the store

    def _as_row(self, app: App, packet: Publish, origin: str) -> Retained:
        properties = encode(Publish(packet.topic, b"", properties=passed_on(packet.properties)), 5)
        expiry = packet.properties.get("message_expiry_interval")
        expires_at = None if expiry is None else self._clock.wall + expiry
        return Retained(app.app_id, packet.topic, packet.payload, packet.qos, properties, expires_at, origin)

    def load_retained(self, hub: Hub, rows: Iterable[Retained]) -> None:
        for row in rows:
            properties = stored_publish(row.properties).properties
            expires_at = (
                None if row.expires_at is None else self._clock.now + row.expires_at - self._clock.wall
            )
            hub.retained.set(
                TopicMessage(row.topic, row.payload, row.qos, True, properties, expires_at, row.source)
            )


def _new_copy(copies: dict[Options, TopicCopy], message: TopicMessage, options: Options) -> TopicCopy:
    qos, retain, ids = options
    copy = copies[options] = TopicCopy(message, qos, retain=retain, subscription_ids=ids)
    return copy


def _options(message: TopicMessage, entries: Sequence[Entry], *, own: bool) -> Options | None:
    """Of the one copy that overlapping subscriptions of one session get (MQTT5-3.3.4-2, MQTT5-3.3.4-3). None: all of
    them are no-local, and the message is its own."""
    meant = [entry for entry in entries if not (own and entry[0].no_local)]
    if not meant:
        return None
    return (
        min(message.qos, max(options.qos for options, _ in meant)),
        message.retain and any(options.retain_as_published for options, _ in meant),
        tuple(identifier for _, identifier in meant if identifier),
    )


def _too_large(connection: Connection, session: Session, answer: bytes) -> bool:
    """The peer asked for an answer that it does not take (MQTT5-3.1.2-24): then nothing can go on."""
    if session.fits(len(answer)):
        return False
    connection.close("packet too large", Reason.PACKET_TOO_LARGE)
    return True


def _durable(mailbox: Mailbox | None) -> bool:
    return mailbox is not None and mailbox.log is not None
