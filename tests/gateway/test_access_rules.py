"""Access rules on live connections: what a change ends, and what it leaves (decision 0009)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker.tenants.access import parse_rules
from gateway.mqtt import Puback, Publish, Reason, Suback, Subscribe, Subscription, Will
from tests.gateway.world import Phone, World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = await World(tmp_path).open(devices=3)
    yield world
    await world.close()


async def rules(world: World, *wanted: dict[str, Any]) -> None:
    await world.apps.set_access(world.app.key, parse_rules([{"who": "devices"} | rule for rule in wanted]))
    await world.calm()


async def subscribe(phone: Phone, *filters: str, qos: int = 1) -> tuple[Reason, ...]:
    before = len(phone.packets)
    phone.send(Subscribe(1, tuple(Subscription(one, qos) for one in filters)))
    await phone.until(lambda phone: any(isinstance(packet, Suback) for packet in phone.packets[before:]))
    return next(packet.reasons for packet in phone.packets[before:] if isinstance(packet, Suback))


async def publish(phone: Phone, topic: str, payload: bytes = b"x", *, retain: bool = False) -> Reason:
    before = len(phone.packets)
    phone.send(Publish(topic, payload, 1, retain, packet_id=7))
    await phone.until(lambda phone: any(isinstance(packet, Puback) for packet in phone.packets[before:]))
    return next(packet.reason for packet in phone.packets[before:] if isinstance(packet, Puback))


def messages(phone: Phone) -> list[tuple[str, bytes]]:
    return [(packet.topic, packet.payload) for packet in phone.packets if isinstance(packet, Publish)]


async def test_without_rules_a_device_may_use_no_ordinary_topic(world: World) -> None:
    phone = await world.online(0)
    assert await subscribe(phone, "news", "push") == (Reason.NOT_AUTHORIZED, Reason.GRANTED_QOS_1)
    assert await publish(phone, "news") is Reason.NOT_AUTHORIZED


async def test_a_rule_with_the_registration_id_gives_each_device_its_own_topics(world: World) -> None:
    await rules(world, {"allow": "all", "topic": "up/{registration_id}/#"})
    phone = await world.online(0)
    granted = await subscribe(phone, "up/device-0/#", "up/device-1/#", "up/+/#", "$share/g/up/device-0/a")
    assert granted == (1, Reason.NOT_AUTHORIZED, Reason.NOT_AUTHORIZED, 1)
    assert await publish(phone, "up/device-0/a") is Reason.SUCCESS
    assert await publish(phone, "up/device-1/a") is Reason.NOT_AUTHORIZED


async def test_a_subscription_that_the_rules_no_longer_cover_ends_at_once(world: World) -> None:
    await rules(world, {"allow": "all", "topic": "#"})
    listener, speaker = await world.online(0), await world.online(1)
    assert await subscribe(listener, "a/#", "b") == (1, 1)
    assert await publish(speaker, "a/1") is Reason.SUCCESS
    await rules(world, {"deny": "subscribe", "topic": "a/#"}, {"allow": "all", "topic": "#"})
    assert await publish(speaker, "a/2") is Reason.NO_MATCHING_SUBSCRIBERS
    assert await publish(speaker, "b") is Reason.SUCCESS
    assert messages(listener) == [("a/1", b"x"), ("b", b"x")]


async def test_what_waits_for_an_absent_session_goes_with_its_permission(world: World) -> None:
    await rules(world, {"allow": "all", "topic": "#"})
    listener, speaker = await world.online(0), await world.online(1)
    await subscribe(listener, "a", "b")
    listener.leave()
    for topic in ("a", "b"):
        assert await publish(speaker, topic) is Reason.SUCCESS
    await rules(world, {"allow": "publish", "topic": "#"}, {"allow": "subscribe", "topic": "b"})
    back = await world.online(0)
    assert messages(back) == [("b", b"x")]


async def test_a_retained_message_is_not_given_out_while_its_source_may_not_publish_there(
    world: World,
) -> None:
    await rules(world, {"allow": "all", "topic": "#"})
    speaker = await world.online(1)
    await publish(speaker, "state", b"on", retain=True)
    await rules(world, {"allow": "subscribe", "topic": "#"})
    listener = await world.online(0)
    await subscribe(listener, "state")
    await world.calm()
    assert messages(listener) == []
    await rules(world, {"allow": "all", "topic": "#"})
    await subscribe(listener, "state")
    await listener.until(messages)
    assert messages(listener) == [("state", b"on")]


async def test_a_delayed_will_is_under_the_rules_of_the_time_it_is_due(world: World) -> None:
    await rules(world, {"allow": "all", "topic": "#"})
    listener = await world.online(0)
    await subscribe(listener, "last")
    doomed = world.connect(1, will=Will("last", b"gone", properties={"will_delay_interval": 60}))
    await doomed.until(lambda phone: phone.packets)
    doomed.leave()
    await rules(world, {"allow": "subscribe", "topic": "#"})
    await world.online(1, clean_start=True)  # ends the session, and with it the delay
    await world.calm()
    assert messages(listener) == []


@pytest.mark.parametrize("name", ["+", "#", "a/b", "+/x"])
async def test_a_registration_id_with_wildcards_widens_no_rule(tmp_path: Path, name: str) -> None:
    async with await World(tmp_path).open(devices=1) as world:
        world.names[0] = name
        await rules(world, {"allow": "all", "topic": "up/{registration_id}/#"})
        phone = await world.online(0)
        refused = Reason.NOT_AUTHORIZED
        assert await subscribe(phone, f"up/{name.rstrip('#')}/#", "up/+/#", "up/#") == (refused,) * 3
        assert await publish(phone, "up/a/b") is refused


async def test_sys_topics_go_only_where_a_rule_names_them(world: World) -> None:
    phone = await world.online(0)
    await rules(world, {"allow": "all", "topic": "#"})
    assert await subscribe(phone, "$SYS/#", "$SYS/broker/uptime") == (Reason.NOT_AUTHORIZED,) * 2
    assert await publish(phone, "$SYS/broker/uptime") is Reason.NOT_AUTHORIZED
    await rules(world, {"allow": "subscribe", "topic": "$SYS/#"})
    assert await subscribe(phone, "$SYS/broker/clients/+", "$SYS/broker/version") == (1, 1)
    await phone.until(lambda phone: len(messages(phone)) == 4)
    assert dict(messages(phone))["$SYS/broker/clients/connected"] == b"1"
    await world.online(1)
    for seconds in (1.0, 20.0):
        world.node.exchange.sys_topics.tick(world.node.clock.now + seconds)
    await phone.until(lambda phone: len(messages(phone)) == 8)
    assert dict(messages(phone))["$SYS/broker/clients/connected"] == b"2"
    assert await publish(phone, "$SYS/broker/uptime") is Reason.NOT_AUTHORIZED
