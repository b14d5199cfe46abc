"""Wills: published when a connection ends without DISCONNECT, at once or after their delay (MQTT5-3.1.2-8).

A delayed will waits with its session, and ends with it: it is published when the delay is over or the session ends,
whichever is first, and never if the session is taken up before (MQTT5-3.1.3-9). The will of a session that outlives
its connection is saved at CONNECT: if the server is killed, the connection was lost when it starts again
(MQTT5-3.1.2.5).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import msgspec

from gateway.hub import Hub
from gateway.mailbox import Mailbox
from gateway.messages import stored_publish
from gateway.mqtt import Properties, Publish, Will, encode
from gateway.wheel import Clock

Publishing = Callable[[Hub, Publish, str], None]  # hub, message, key of the session it is from


@dataclass(frozen=True, slots=True)
class DelayedWill:
    """A will whose delay runs."""

    timer: asyncio.TimerHandle
    packet: Publish


class WillRow(msgspec.Struct, frozen=True, array_like=True):
    packet: bytes  # MQTT 5
    qos: int
    due: float | None  # Unix seconds; None: its client is connected
    delay: int  # seconds


class Wills:
    def __init__(self, publish: Publishing, clock: Clock) -> None:
        self._publish = publish
        self._clock = clock

    def send(self, hub: Hub, key: str, will: Will, session_expiry: int, mailbox: Mailbox | None) -> None:
        """The connection with this will ended. `session_expiry`: how long its session outlives it."""
        delay = min(delay_of(will), session_expiry)
        packet = _as_publish(will.topic, will.payload, will.qos, will.retain, will.properties)
        if not delay:
            self._publish(hub, packet, key)
            self.forget(mailbox)
            return
        self._wait(hub, key, packet, delay)
        if mailbox is not None and mailbox.log is not None:
            mailbox.log.will(_row(will, self._clock.wall + delay))

    @staticmethod
    def note(mailbox: Mailbox, will: Will) -> None:
        """A client with this will is connected."""
        if mailbox.log is not None:
            mailbox.log.will(_row(will, None))

    def _wait(self, hub: Hub, key: str, packet: Publish, delay: float) -> None:
        timer = asyncio.get_running_loop().call_later(delay, self._due, hub, key)
        hub.wills[key] = DelayedWill(timer, packet)

    def _due(self, hub: Hub, key: str) -> None:
        self._publish(hub, hub.wills.pop(key).packet, key)
        self.forget(hub.mailboxes.get(key))

    def cancel(self, hub: Hub, key: str, mailbox: Mailbox | None, *, publish: bool) -> None:
        """Its session is taken up again, or (`publish`) over (MQTT5-3.1.2-8)."""
        will = hub.wills.pop(key, None)
        if will is None:
            return
        will.timer.cancel()
        self.forget(mailbox)
        if publish:
            self._publish(hub, will.packet, key)

    @staticmethod
    def forget(mailbox: Mailbox | None) -> None:
        """It was published, or will never be."""
        if mailbox is not None and mailbox.log is not None:
            mailbox.log.will(None)

    def restore(self, hub: Hub, mailbox: Mailbox, value: bytes) -> None:
        """As it was when the server stopped: a delay goes on, and one that is over is over."""
        row = msgspec.msgpack.decode(value, type=WillRow)
        kept = stored_publish(row.packet)
        packet = _as_publish(kept.topic, kept.payload, row.qos, kept.retain, kept.properties)
        left = row.delay if row.due is None else row.due - self._clock.wall
        if left > 0:
            self._wait(hub, mailbox.key, packet, left)
        else:
            self._publish(hub, packet, mailbox.key)
            self.forget(mailbox)


def delay_of(will: Will) -> int:
    """Seconds."""
    return will.properties.get("will_delay_interval", 0)


def _as_publish(topic: str, payload: bytes, qos: int, retain: bool, properties: Properties) -> Publish:
    return Publish(topic, payload, qos, retain, packet_id=1 if qos else 0, properties=properties)


def _row(will: Will, due: float | None) -> bytes:
    properties = cast("Properties", dict(will.properties))
    properties.pop("will_delay_interval", None)
    packet = encode(Publish(will.topic, will.payload, retain=will.retain, properties=properties), 5)
    return msgspec.msgpack.encode(WillRow(packet, will.qos, due, delay_of(will)))
