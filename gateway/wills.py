"""Wills: published when a connection ends without DISCONNECT, at once or after their delay (MQTT5-3.1.2-8).

A delayed will waits with its session, and ends with it: it is published when the delay is over or the session ends,
whichever is first, and never if the session is taken up before (MQTT5-3.1.3-9). That of a durable session survives a
restart.
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
    due: float  # Unix seconds


class Wills:
    def __init__(self, publish: Publishing, clock: Clock) -> None:
        self._publish = publish
        self._clock = clock

    def send(self, hub: Hub, key: str, will: Will, session_expiry: int, mailbox: Mailbox | None) -> None:
        """The connection with this will ended. `session_expiry`: how long its session outlives it."""
        delay = min(will.properties.get("will_delay_interval", 0), session_expiry)
        packet = Publish(
            will.topic,
            will.payload,
            will.qos,
            will.retain,
            packet_id=1 if will.qos else 0,
            properties=will.properties,
        )
        if not delay:
            self._publish(hub, packet, key)
            return
        self._wait(hub, key, packet, delay)
        if mailbox is not None and mailbox.log is not None:
            mailbox.log.will(self._row(will, self._clock.wall + delay))

    def _wait(self, hub: Hub, key: str, packet: Publish, delay: float) -> None:
        timer = asyncio.get_running_loop().call_later(delay, self._due, hub, key)
        hub.wills[key] = DelayedWill(timer, packet)

    def _due(self, hub: Hub, key: str) -> None:
        self._publish(hub, hub.wills.pop(key).packet, key)
        self._forget(hub.mailboxes.get(key))

    def cancel(self, hub: Hub, key: str, mailbox: Mailbox | None, *, publish: bool) -> None:
        """Its session is taken up again, or (`publish`) over (MQTT5-3.1.2-10)."""
        will = hub.wills.pop(key, None)
        if will is None:
            return
        will.timer.cancel()
        self._forget(mailbox)
        if publish:
            self._publish(hub, will.packet, key)

    @staticmethod
    def _forget(mailbox: Mailbox | None) -> None:
        if mailbox is not None and mailbox.log is not None:
            mailbox.log.will(None)

    @staticmethod
    def _row(will: Will, due: float) -> bytes:
        properties = cast("Properties", dict(will.properties))
        properties.pop("will_delay_interval", None)
        packet = encode(Publish(will.topic, will.payload, retain=will.retain, properties=properties), 5)
        return msgspec.msgpack.encode(WillRow(packet, will.qos, due))

    def restore(self, hub: Hub, key: str, value: bytes) -> None:
        """A delay that ran when the server stopped goes on; one that is over ends in the next turn."""
        row = msgspec.msgpack.decode(value, type=WillRow)
        kept = stored_publish(row.packet)
        packet = Publish(
            kept.topic,
            kept.payload,
            row.qos,
            kept.retain,
            packet_id=1 if row.qos else 0,
            properties=kept.properties,
        )
        self._wait(hub, key, packet, max(0.0, row.due - self._clock.wall))
