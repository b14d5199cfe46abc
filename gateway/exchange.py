"""Ordinary MQTT topics inside an app: subscribe, publish, retain, wills.

The access rule so far: in an open app, and for publishers, every topic is allowed; a device of any other app may
only use the reserved ones (docs/protocol.md). `push` is not a topic one can join or leave: every device has it.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, cast

from broker.model import Retained
from broker.store import Store
from gateway.hub import DelayedWill, Hub
from gateway.live import PUSH_TOPIC, TopicMessage
from gateway.metrics import NodeMetrics
from gateway.mqtt import (
    NO_PROPERTIES,
    Properties,
    Publish,
    Reason,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
    Will,
    encode,
    split_share,
)
from gateway.session import Mailbox
from gateway.wheel import Clock

if TYPE_CHECKING:
    from gateway.connection import Connection

PASSED_ON: Final = (  # MQTT5-3.3.2: what a publisher says about its message and subscribers get
    "payload_format_indicator",
    "content_type",
    "response_topic",
    "correlation_data",
    "user_properties",
)


class Exchange:
    def __init__(self, store: Store, clock: Clock, metrics: NodeMetrics) -> None:
        self._store = store
        self._clock = clock
        self._metrics = metrics

    @staticmethod
    def allowed(connection: Connection) -> bool:
        """Whether this peer may use ordinary topics."""
        assert connection.hub is not None
        assert connection.session is not None
        return connection.hub.app.open or connection.session.devno < 0

    # Subscriptions

    def subscribe(self, connection: Connection, packet: Subscribe) -> None:
        session = connection.session
        assert session is not None
        identifiers = packet.properties.get("subscription_identifiers", (0,))
        reasons, retained = [], []
        for subscription in packet.subscriptions:
            reason, messages = self._subscribe_one(connection, subscription, identifiers[0])
            reasons.append(reason)
            retained += messages
        connection.send(encode(Suback(packet.packet_id, tuple(reasons)), session.encoding.version))
        for message, qos in retained:
            self._deliver(session.own_mailbox(), message, qos)

    def _subscribe_one(
        self, connection: Connection, subscription: Subscription, identifier: int
    ) -> tuple[Reason, list[tuple[TopicMessage, int]]]:
        session, hub = connection.session, connection.hub
        assert session is not None
        assert hub is not None
        if subscription.filter == PUSH_TOPIC and session.devno >= 0:
            return Reason.GRANTED_QOS_1, []  # implicit, and always acknowledged
        if split_share(subscription.filter) is not None:
            return Reason.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED, []
        if not self.allowed(connection):
            return Reason.NOT_AUTHORIZED, []
        mailbox = session.own_mailbox()
        mailbox.member = connection
        known = subscription.filter in mailbox.subscriptions
        if not known and len(mailbox.subscriptions) >= mailbox.limits.subscriptions:
            return Reason.QUOTA_EXCEEDED, []
        mailbox.subscriptions[subscription.filter] = (subscription, identifier)
        hub.subscriptions.add(subscription, identifier, mailbox)
        retained = []
        if subscription.retain_handling == 0 or (subscription.retain_handling == 1 and not known):
            retained = [
                (
                    _as_received(message, retain=True, identifiers=[identifier]),
                    min(message.qos, subscription.qos),
                )
                for message in hub.retained.match(subscription.filter, self._clock.now)
            ]
        return Reason(subscription.qos), retained

    def unsubscribe(self, connection: Connection, packet: Unsubscribe) -> None:
        session, hub = connection.session, connection.hub
        assert session is not None
        assert hub is not None
        reasons = []
        for topic_filter in packet.filters:
            mailbox = session.mailbox
            found = mailbox is not None and mailbox.subscriptions.pop(topic_filter, None) is not None
            if found and mailbox is not None:
                hub.subscriptions.remove(topic_filter, mailbox)
            reasons.append(Reason.SUCCESS if found else Reason.NO_SUBSCRIPTION_EXISTED)
        connection.send(encode(Unsuback(packet.packet_id, tuple(reasons)), session.encoding.version))

    @staticmethod
    def forget(hub: Hub, mailbox: Mailbox) -> None:
        """The session is over: take its subscriptions out."""
        for topic_filter in mailbox.subscriptions:
            hub.subscriptions.remove(topic_filter, mailbox)
        mailbox.subscriptions = {}

    # Messages

    def publish(
        self, hub: Hub, packet: Publish, origin: Mailbox | None
    ) -> tuple[Reason, Coroutine[Any, Any, None] | None]:
        """Hand an ordinary message to its subscribers, and retain it if asked to. Returns the answer, and for a
        retained message what makes it durable, to be awaited before the answer (raises StoreError)."""
        message = _message(packet, self._clock.now)
        if packet.retain and not hub.retained.set(message):
            return Reason.QUOTA_EXCEEDED, None
        reason = self.route(hub, message, origin)
        if not packet.retain:
            return reason, None
        return reason, self._store.retain([_as_row(hub, message, self._clock)])

    def route(self, hub: Hub, message: TopicMessage, origin: Mailbox | None) -> Reason:
        delivered = False
        for mailbox, entries in hub.subscriptions.match(message.topic).items():
            meant = [entry for entry in entries if not (entry[0].no_local and mailbox is origin)]
            if not meant:
                continue
            delivered = True
            retain = message.retain and any(options.retain_as_published for options, _ in meant)
            identifiers = [identifier for _, identifier in meant]
            qos = min(message.qos, max(options.qos for options, _ in meant))
            self._deliver(mailbox, _as_received(message, retain=retain, identifiers=identifiers), qos)
        return Reason.SUCCESS if delivered else Reason.NO_MATCHING_SUBSCRIBERS

    def _deliver(self, mailbox: Mailbox, message: TopicMessage, qos: int) -> None:
        session, member = mailbox.session, mailbox.member
        dropped = mailbox.dropped
        if session is None or member is None:
            if qos:
                mailbox.put_for_later(message, qos)
        elif qos or not member.blocked:
            frame = session.send_message(message, qos, self._clock.now)
            if frame is not None:
                self._metrics.topic_messages.value += 1
                member.send(frame)
        else:
            self._metrics.topic_dropped.value += 1  # QoS 0 to a socket that does not drain
        self._metrics.topic_dropped.value += mailbox.dropped - dropped

    def send_will(self, connection: Connection, hub: Hub, key: str, will: Will) -> None:
        """The connection ended without DISCONNECT (MQTT5-3.1.2-8): publish now, or after the will delay unless
        the session is taken up before (MQTT5-3.1.3-9)."""
        delay = min(will.properties.get("will_delay_interval", 0), connection.session_expiry)
        packet = Publish(
            will.topic, will.payload, will.qos, will.retain, packet_id=1, properties=will.properties
        )
        if not delay:
            self._publish_will(connection, hub, packet)
            return
        publish = functools.partial(self._publish_will, connection, hub, packet)
        timer = asyncio.get_running_loop().call_later(delay, self._publish_delayed, hub, key)
        hub.wills[key] = DelayedWill(timer, publish)

    def _publish_delayed(self, hub: Hub, key: str) -> None:
        hub.wills.pop(key).publish()

    def _publish_will(self, connection: Connection, hub: Hub, packet: Publish) -> None:
        _, retaining = self.publish(hub, packet, None)
        if retaining is not None:
            connection.node.spawn(retaining)


def _message(packet: Publish, now: float) -> TopicMessage:
    expiry = packet.properties.get("message_expiry_interval")
    kept = {name: value for name, value in packet.properties.items() if name in PASSED_ON}
    return TopicMessage(
        packet.topic,
        packet.payload,
        packet.qos,
        packet.retain,
        cast("Properties", kept) if kept else None,
        None if expiry is None else now + expiry,
    )


def _as_received(message: TopicMessage, *, retain: bool, identifiers: list[int]) -> TopicMessage:
    ids = tuple(identifier for identifier in identifiers if identifier)
    if retain == message.retain and not ids:
        return message
    return TopicMessage(
        message.topic, message.payload, message.qos, retain, message.properties, message.expires_at, ids
    )


def _as_row(hub: Hub, message: TopicMessage, clock: Clock) -> Retained:
    properties = encode(Publish(message.topic, b"", properties=message.properties or NO_PROPERTIES), 5)
    expires = None if message.expires_at is None else clock.wall + message.expires_at - clock.now
    return Retained(hub.app.app_id, message.topic, message.payload, message.qos, properties, expires)
