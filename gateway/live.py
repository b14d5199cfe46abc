"""A push on its way to devices: rendered and encoded once, shared by every session that sends it.

Devices of the same age use the same packet ids, so a broadcast to any number of them needs a handful of
distinct byte strings (architecture, decision 7): `Frames` makes each at most once and keeps the recent ones.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from typing import Any, Final

import msgpack
import orjson
from pyroaring import BitMap

from broker.model import StoredBroadcast, StoredMessage
from gateway.mqtt import publish_frame

PUSH_TOPIC: Final = "push"
_TOPIC: Final = PUSH_TOPIC.encode()
RECEIPT_TOPIC: Final = "receipt"
DEVICE_TOPIC: Final = "device"
EVENT_PREFIX: Final = "event/"
SYS: Final = "$SYS/"  # the server's own topics
FRAMES_KEPT: Final = (
    1024  # byte strings a message keeps for one encoding; more packet ids than this share nothing
)
AROUND: Final = 40  # bytes that MQTT, WebSocket and TLS put around a payload, about
PUBACK: Final = b"\x40\x02"  # of one that says no more than yes
DUP: Final = 0x08
QOS: Final = 0x06  # bits of a PUBLISH's first byte


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """What decides the bytes of a push besides its packet id. Few exist, and sessions share them: get one from
    `encoding`, and compare by identity."""

    version: int  # MQTT protocol level, 4 or 5
    platform: str  # whose overrides are merged, one of broker.model.PLATFORMS
    packed: bool = False  # MessagePack instead of JSON
    deflated: bool = False  # in a zlib stream where that is shorter
    segment: int = 0  # bytes of a TCP segment: deflated only where that saves one; 0: wherever it is shorter


@functools.cache
def encoding(
    version: int, platform: str, packed: bool = False, deflated: bool = False, segment: int = 0
) -> Encoding:
    """The one Encoding with these values. The arguments come from closed sets, so the cache is bounded."""
    return Encoding(version, platform, packed, deflated, segment)


class Frames(dict[int, bytes]):
    """packet id -> the whole PUBLISH packet, made on first use."""

    __slots__ = ("head", "size", "tail")

    def __init__(self, head: bytes, tail: bytes) -> None:
        super().__init__()
        self.head = head
        self.tail = tail
        self.size = len(head) + len(tail) + (2 if head[0] & QOS else 0)  # of the packet

    def __missing__(self, packet_id: int) -> bytes:
        if len(self) >= FRAMES_KEPT:
            self.clear()
        frame = self[packet_id] = self.make(packet_id)
        return frame

    def make(self, packet_id: int) -> bytes:
        return self.head + packet_id.to_bytes(2) + self.tail

    def again(self, packet_id: int) -> bytes:
        """The same packet with DUP set, for a resend in a session that survived (MQTT5-3.3.1-1)."""
        return bytes((self.head[0] | DUP,)) + self[packet_id][1:]


class Flight:
    """Pushes that go to many sessions in one write, under packet ids in a row: what is written, and what all their
    acknowledgements are when they come back together and in order (MQTT5-4.6.0-2)."""

    __slots__ = ("acks", "data", "end", "first", "pushes")

    def __init__(self, pushes: tuple[LivePush, ...], encoding: Encoding, first: int) -> None:
        """`first`: packet id of the first push."""
        packet_ids = range(first, first + len(pushes))
        frames = [push.frames(encoding) for push in pushes]
        self.pushes = pushes
        self.first = first
        self.end = packet_ids.stop
        self.data = b"".join(frame.make(i) for frame, i in zip(frames, packet_ids, strict=True))
        self.acks = b"".join([PUBACK + i.to_bytes(2) for i in packet_ids])

    def window(self) -> dict[int, LivePush]:
        """By packet id: for a session that goes on by itself."""
        return dict(zip(range(self.first, self.end), self.pushes, strict=True))


class LivePush:
    """A message while this node has something to do with it."""

    __slots__ = ("_frames", "acked", "broadcast", "evicted", "message", "sent_at", "settled", "targets")

    def __init__(self, message: StoredMessage, broadcast: StoredBroadcast | None = None) -> None:
        self.message = message
        self.broadcast = broadcast is not None
        self.targets: BitMap | None = broadcast.targets if broadcast else None
        self.settled: BitMap | None = broadcast.settled if broadcast else None
        self.acked: list[int] = []  # devnos, since the node last folded them
        self.evicted: list[int] = []  # devnos, likewise
        self.sent_at = 0.0  # of a targeted push that went out at once: Unix seconds
        self._frames: dict[Encoding, Frames] = {}

    @property
    def msg_id(self) -> int:
        return self.message.msg_id

    def owed_to(self, devno: int) -> bool:
        """Broadcasts only: whether this device is still to get it."""
        assert self.targets is not None
        assert self.settled is not None
        return devno in self.targets and devno not in self.settled

    def frames(self, encoding: Encoding) -> Frames:
        frames = self._frames.get(encoding)
        if frames is None:
            payload = render(self.message, encoding)
            head, tail = publish_frame(_TOPIC, payload, qos=1, version=encoding.version)
            frames = self._frames[encoding] = Frames(head, tail)
        return frames

    def forget_frames(self) -> None:
        """The walk is over: stragglers make theirs anew, and a live broadcast costs its bitmaps only."""
        self._frames.clear()


def render(message: StoredMessage, encoding: Encoding) -> bytes:
    """The payload a device receives: an object with `msg_id` and the publisher's notification and message, the
    notification merged for the device's platform (docs/protocol.md)."""
    payload = _render(message, encoding)
    return deflate(payload, encoding.segment) if encoding.deflated else payload


def deflate(payload: bytes, segment: int) -> bytes:
    """In a zlib stream where that is shorter, or (`segment` > 0) saves a TCP segment of so many bytes; else as it is.
    What fits one segment is not even tried."""
    before = segments(payload, segment)
    if before == 1:
        return payload
    deflated = zlib.compress(payload)
    return deflated if segments(deflated, segment) < before else payload


def segments(payload: bytes, segment: int) -> int:
    """TCP segments that a push of this payload takes; of one byte each where `segment` is 0."""
    return -(-(len(payload) + AROUND) // segment) if segment else len(payload)


def _render(message: StoredMessage, encoding: Encoding) -> bytes:
    body: dict[str, Any] = orjson.loads(message.body)
    content = {"msg_id": str(message.public_id)}
    if message.replaces:
        content["override"] = str(message.replaces)
    if "recall" in body:
        content["recall"] = body["recall"]
    if "notification" in body:
        content["notification"] = merge_notification(body["notification"], encoding.platform)
    if "message" in body:
        content["message"] = body["message"]
    if encoding.packed:
        packed: bytes = msgpack.packb(content)
        return packed
    return orjson.dumps(content)


def merge_notification(notification: dict[str, Any], platform: str) -> Any:
    """The platform's own part over the common alert; without such a part the alert, and all of it for a device
    that did not say what it is."""
    own = notification.get(platform)
    if platform == "other":
        return notification
    if own is None:
        return {"alert": notification["alert"]} if "alert" in notification else notification
    part = own if isinstance(own, dict) else {"alert": own}
    return {"alert": notification["alert"], **part} if "alert" in notification else part
