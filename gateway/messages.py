"""Ordinary messages, inside one app, on their way from a publisher to subscribers.

A message has one *copy* for each set of delivery options (QoS, retain, subscription identifiers), and all subscribers
with these options share it and its packets: fan-out to any number of them encodes a handful of byte strings, as
`live.py` does for pushes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from pyroaring import BitMap

from gateway.live import Frames
from gateway.mqtt import NO_PROPERTIES, Properties, Publish, decode, publish_frame

if TYPE_CHECKING:
    from gateway.topics import SharedGroup

PASSED_ON: Final = (  # MQTT5-3.3.2: what a publisher says about its message and subscribers get
    "payload_format_indicator",
    "content_type",
    "response_topic",
    "correlation_data",
    "user_properties",
)
MAX_UINT32: Final = 0xFFFF_FFFF
PROPERTY_SIZE: Final = 16  # bytes a property takes beside its text, about


class TopicMessage:
    """As it was published. Times are monotonic seconds."""

    __slots__ = (
        "copies",
        "expires_at",
        "number",
        "payload",
        "properties",
        "qos",
        "retain",
        "size",
        "source",
        "topic",
    )

    def __init__(
        self,
        topic: str,
        payload: bytes,
        qos: int,
        retain: bool = False,
        properties: Properties = NO_PROPERTIES,
        expires_at: float | None = None,
        source: str = "",
    ) -> None:
        self.topic = topic
        self.payload = payload
        self.qos = qos
        self.retain = retain
        self.properties = properties  # those of PASSED_ON
        self.expires_at = expires_at  # MQTT 5 message expiry
        self.source = source  # key of the session that published it
        self.size = len(payload) + len(topic) + _size(properties)  # bytes it keeps alive, about
        self.number = 0  # in the store; 0: no durable session waits for it
        self.copies: list[TopicCopy] = []  # those that durable sessions wait for

    def expired(self, now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now


class TopicCopy:
    """What subscribers with the same options get."""

    __slots__ = (
        "_frames",
        "_frames_of",
        "left",
        "message",
        "number",
        "qos",
        "retain",
        "share",
        "subscription_ids",
    )

    def __init__(
        self,
        message: TopicMessage,
        qos: int,
        *,
        retain: bool = False,
        subscription_ids: tuple[int, ...] = (),
        share: SharedGroup | None = None,
    ) -> None:
        self.message = message
        self.qos = qos
        self.retain = retain
        self.subscription_ids = subscription_ids
        self.share = share  # the shared subscription whose member was chosen
        self.number = 0  # in the store, as the message's; in the order in which a session is sent its copies
        self.left: BitMap | None = None  # durable sessions, by number, that are still to get it
        self._frames: dict[int, Frames] = {}  # by protocol version
        self._frames_of: int | None = None  # the message expiry interval they tell

    def frames(self, version: int, now: float) -> Frames:
        """The packets for this protocol version; at QoS 0 `head + tail` is the packet."""
        if self.message.expires_at is None and (made := self._frames.get(version)) is not None:
            return made
        interval = _interval(self.message, now)
        if interval != self._frames_of:  # MQTT5-3.3.2-6: it counts down
            self._frames, self._frames_of = {}, interval
        frames = self._frames.get(version)
        if frames is None:
            message = self.message
            properties = self._properties(interval) if version == 5 else NO_PROPERTIES
            head, tail = publish_frame(
                message.topic, message.payload, self.qos, version, properties, retain=self.retain
            )
            frames = self._frames[version] = Frames(head, tail)
        return frames

    def packet(self, packet_id: int, now: float, *, dup: bool) -> Publish:
        """The same for one MQTT 5 subscriber, to be changed for it."""
        message = self.message
        properties = self._properties(_interval(message, now))
        return Publish(message.topic, message.payload, self.qos, self.retain, dup, packet_id, properties)

    def _properties(self, interval: int | None) -> Properties:
        if interval is None and not self.subscription_ids:
            return self.message.properties
        properties = cast("Properties", dict(self.message.properties))
        if interval is not None:
            properties["message_expiry_interval"] = interval
        if self.subscription_ids:
            properties["subscription_identifiers"] = self.subscription_ids
        return properties


def _interval(message: TopicMessage, now: float) -> int | None:
    """The message expiry interval that is left, in seconds. `now` may be a fraction older than the message."""
    return None if message.expires_at is None else min(max(1, int(message.expires_at - now)), MAX_UINT32)


def stored_publish(packet: bytes) -> Publish:
    """A PUBLISH that was encoded for the store, in MQTT 5."""
    found = decode(packet, 0, 5, len(packet))
    assert found is not None
    assert isinstance(found[0], Publish)
    return found[0]


def passed_on(properties: Properties) -> Properties:
    """What subscribers get of a publisher's properties."""
    kept = {name: value for name, value in properties.items() if name in PASSED_ON}
    return cast("Properties", kept) if kept else NO_PROPERTIES


def _size(properties: Properties) -> int:
    return sum(PROPERTY_SIZE + _length(value) for value in properties.values()) if properties else 0


def _length(value: object) -> int:
    if isinstance(value, tuple):
        return sum(2 * PROPERTY_SIZE + _length(item) for item in value)
    return len(value) if isinstance(value, (str, bytes)) else 0
