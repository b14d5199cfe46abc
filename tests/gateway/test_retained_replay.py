"""Retained messages on their way to a new subscription: all of them, in slices, as fast as it takes them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.fanout import SLICE
from gateway.mqtt import Puback, Publish, Suback, Subscribe, Subscription, Unsubscribe
from tests.gateway.world import Phone, World

MANY = 1200  # more than the window and the queue hold together


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = await World(tmp_path).open(devices=2, open=True)
    yield world
    await world.close()


async def retain(world: World, count: int, **properties: int) -> None:
    speaker = await world.online(1)
    for i in range(count):
        speaker.send(Publish(f"state/{i}", b"x", 0, True, properties=properties))  # type: ignore[arg-type]
    await world.when(lambda: world.hub.retained.count == count)


def topics(phone: Phone) -> list[str]:
    return [packet.topic for packet in phone.packets if isinstance(packet, Publish)]


def acknowledge(phone: Phone) -> None:
    """Everything that came since the last time."""
    new = [packet for packet in phone.packets if isinstance(packet, Publish) and packet.qos]
    phone.packets.clear()
    phone.send(*(Puback(packet.packet_id) for packet in new))


@pytest.mark.parametrize("expiry", [0, 600])
async def test_more_retained_messages_than_a_session_may_queue_all_arrive(world: World, expiry: int) -> None:
    speaker = await world.online(1)
    for i in range(MANY):
        speaker.send(Publish(f"state/{i}", b"x", 1, True, packet_id=1))
        await speaker.until(lambda phone: any(isinstance(packet, Puback) for packet in phone.packets))
        speaker.packets.clear()
    listener = await world.online(0, properties={"session_expiry_interval": expiry})
    listener.send(Subscribe(1, (Subscription("state/#", 1),)))
    got: set[str] = set()
    while len(got) < MANY:
        await listener.until(topics)
        got.update(topics(listener))
        acknowledge(listener)
    assert world.node.metrics.topic_dropped.value == 0


async def test_a_replay_holds_up_nobody_for_longer_than_a_slice(world: World) -> None:
    await retain(world, 10 * SLICE)
    listener = await world.online(0)
    listener.send(Subscribe(1, (Subscription("#", 0),)))
    before = 0
    while before < 10 * SLICE:
        await world.turns(1)
        assert len(topics(listener)) - before <= 2 * SLICE
        before = len(topics(listener))


async def test_a_replay_waits_for_a_slow_socket_and_ends_with_its_subscription(world: World) -> None:
    await retain(world, 4 * SLICE)
    listener = await world.online(0, properties={"session_expiry_interval": 0})
    listener.send(Subscribe(1, (Subscription("#", 0),)))
    listener.block()
    sent = len(topics(listener))
    await world.turns(50)
    assert len(topics(listener)) == sent < 4 * SLICE
    listener.send(Unsubscribe(2, ("#",)))
    listener.drain()
    await world.turns(50)
    assert len(topics(listener)) == sent


async def test_a_replay_goes_on_where_it_was_when_the_session_is_taken_up(world: World) -> None:
    await retain(world, 4 * SLICE)
    listener = await world.online(0)
    listener.send(Subscribe(1, (Subscription("#", 0),)))
    await listener.until(lambda phone: any(isinstance(packet, Suback) for packet in phone.packets))
    listener.leave()
    first = topics(listener)
    back = await world.online(0)
    await back.until(lambda phone: len(topics(phone)) + len(first) == 4 * SLICE)
    assert sorted([*first, *topics(back)]) == sorted(f"state/{i}" for i in range(4 * SLICE))


async def test_an_expired_retained_message_is_not_sent(world: World) -> None:
    await retain(world, 3, message_expiry_interval=10)
    world.node.clock.now += 11
    listener = await world.online(0)
    listener.send(Subscribe(1, (Subscription("#", 0),)))
    await world.calm()
    assert topics(listener) == []


async def test_the_longest_expiry_interval_there_is_survives_the_arithmetic_of_floats(world: World) -> None:
    await retain(world, 1, message_expiry_interval=0xFFFF_FFFF)
    listener = await world.online(0)
    listener.send(Subscribe(1, (Subscription("#", 0),)))
    await listener.until(topics)
    (packet,) = [packet for packet in listener.packets if isinstance(packet, Publish)]
    assert packet.properties["message_expiry_interval"] == 0xFFFF_FFFF
