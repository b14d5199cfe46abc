"""What the in-process stories about ordinary topics share, beside `tests.gateway.world`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from broker.model import SessionItem
from broker.store import StoreFull
from broker.store_sqlite import SqliteStore
from gateway.mqtt import (
    Packet,
    Pingreq,
    Pingresp,
    Puback,
    Publish,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
)
from tests.gateway.world import Phone, World

P = TypeVar("P", bound=Packet)


class SlowStore(SqliteStore):
    """Session items are saved when, and if, the test says so."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        self.free = asyncio.Event()
        self.free.set()
        self.asked = asyncio.Event()  # a write is under way
        self.full = False
        self.writes: list[list[SessionItem]] = []  # those that were tried

    async def save_session_items(self, items: Sequence[SessionItem]) -> None:
        self.writes.append(list(items))
        self.asked.set()
        await self.free.wait()
        self.asked.clear()
        if self.full:
            raise StoreFull("no space left on device")
        await super().save_session_items(items)

    def hold(self) -> None:
        self.free.clear()
        self.asked.clear()

    def release(self) -> None:
        self.free.set()


async def topic_world(path: Path, *, devices: int = 4, **values: Any) -> World:
    """An open app, so that devices may use every topic."""
    return await World(path, **values).open(devices, open=True)


def got(phone: Phone, kind: type[P]) -> list[P]:
    """What came so far."""
    return [packet for packet in phone.packets if isinstance(packet, kind)]


def payloads(phone: Phone) -> list[bytes]:
    return [packet.payload for packet in got(phone, Publish)]


async def after_ping(phone: Phone) -> None:
    """The node has taken all that the phone sent."""
    seen = len(got(phone, Pingresp)) + 1
    phone.send(Pingreq())
    await phone.until(lambda phone: len(got(phone, Pingresp)) == seen)


async def subscribe(phone: Phone, *filters: str, qos: int = 1) -> Suback:
    seen = len(got(phone, Suback)) + 1
    phone.send(Subscribe(seen, tuple(Subscription(one, qos) for one in filters)))
    await phone.until(lambda phone: len(got(phone, Suback)) == seen)
    return got(phone, Suback)[-1]


async def unsubscribe(phone: Phone, *filters: str) -> Unsuback:
    seen = len(got(phone, Unsuback)) + 1
    phone.send(Unsubscribe(seen, filters))
    await phone.until(lambda phone: len(got(phone, Unsuback)) == seen)
    return got(phone, Unsuback)[-1]


async def publish(phone: Phone, topic: str, *said: bytes) -> None:
    """At QoS 1, until they are acknowledged."""
    seen = len(got(phone, Puback))
    for n, payload in enumerate(said, 1):
        phone.send(Publish(topic, payload, 1, packet_id=n))
    await phone.until(lambda phone: len(got(phone, Puback)) == seen + len(said))


def acknowledge(phone: Phone) -> None:
    """Every QoS 1 message that came so far."""
    phone.send(*(Puback(packet.packet_id) for packet in got(phone, Publish) if packet.qos == 1))


async def rows(world: World) -> list[SessionItem]:
    """What the store holds of sessions, once everything is saved."""
    await world.node.journal.saved()
    return await world.store.list_session_items(world.app.app_id)
