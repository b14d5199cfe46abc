"""Connections go to other nodes: at a pace, told where to, and with what they acknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import gateway.handover
import gateway.membership
from broker.model import DeliveryState, NodeEntry, NodeInfo
from gateway.handover import Elsewhere
from gateway.mqtt import Disconnect, Reason
from gateway.node import NodeSettings
from tests.gateway.fleet_world import LEASE, FleetWorld
from tests.gateway.world import DAY, Phone, World

Build = Callable[..., Awaitable[FleetWorld]]


@pytest.fixture
async def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Build]:
    """`await build(devices=3, nodes=2, drain_rate=1000)`"""
    monkeypatch.setattr(gateway.membership, "BEAT", 3600)
    worlds: list[FleetWorld] = []

    async def run(*, devices: int = 6, nodes: int = 2, **settings: Any) -> FleetWorld:
        worlds.append(FleetWorld(tmp_path))
        await worlds[-1].open(devices=devices)
        return await worlds[-1].build(nodes, NodeSettings("", **settings))

    yield run
    for world in worlds:
        await world.close()


async def wish(world: FleetWorld, wish: str) -> None:
    """Of the operator, to the first node, which hears it with its next beat."""
    member = world.nodes[0]
    await member.store.nodes.wish(member.node.settings.node_id, wish)
    await member.membership.beat()


async def gone(world: World) -> None:
    await world.when(lambda: not world.node.live)


def reference(phone: Phone) -> str | None:
    assert isinstance(phone.goodbye, Disconnect)
    return phone.goodbye.properties.get("server_reference")


# Where to


def entry(name: str, connections: int = 0, **values: Any) -> NodeEntry:
    live = values.pop("live", True)
    info = NodeInfo(name, address=values.pop("address", f"{name}:1883"), connections=connections, **values)
    return NodeEntry(info, 1, 0.0, live)


def test_the_node_with_the_fewest_connections_is_next() -> None:
    elsewhere = Elsewhere([entry("me"), entry("a", 10), entry("b", 12)], "me")
    assert [elsewhere.address() for _ in range(6)] == ["a:1883"] * 2 + ["a:1883", "b:1883"] * 2


@pytest.mark.parametrize(
    "other",
    [
        entry("a", live=False),
        entry("a", draining=True),
        entry("a", role="broker"),
        entry("a", address=""),
    ],
)
def test_who_takes_no_devices_is_not_named(other: NodeEntry) -> None:
    assert Elsewhere([entry("me"), other], "me").address() is None


# A stop


async def test_a_stop_sends_devices_to_the_others(build: Build) -> None:
    world = await build()
    phones = [await world.online_at(0, devno) for devno in range(2)]
    old = await world.online_at(0, 2, version=4, properties={})
    await world.node.drain(1.0)
    assert [(phone.goodbye.reason, reference(phone)) for phone in phones] == [
        (Reason.USE_ANOTHER_SERVER, "node-2.example:1883")
    ] * 2
    assert (old.closed, len(old.packets)) == (True, 1)
    assert world.node.metrics.disconnects.labels("moved").value == 3


async def test_devices_are_asked_at_a_pace(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def count(delay: float) -> None:
        pauses.append(delay)
        live.append(world.node.live)
        await sleep(0)

    world = await build(drain_rate=40)
    live: list[int] = []
    for devno in range(5):
        await world.online_at(0, devno)
    connections = world.node.connections()
    monkeypatch.setattr(gateway.handover.asyncio, "sleep", count)
    await world.node.handover._ask(connections, 40)
    assert live == [3, 1]  # two in each twentieth of a second
    assert pauses == [0.05, 0.05]


async def test_a_stop_is_in_time_whatever_the_pace(build: Build) -> None:
    world = await build(drain_rate=1)
    for devno in range(5):
        await world.online_at(0, devno)
    async with asyncio.timeout(2):
        await world.node.drain(0.3)
    assert world.node.live == 0


async def test_the_only_node_says_that_it_stops(build: Build) -> None:
    world = await build(nodes=1)
    phone = await world.online_at(0, 0)
    await world.node.drain(0.0)
    assert (phone.goodbye.reason, phone.goodbye.properties) == (Reason.SERVER_SHUTTING_DOWN, {})


async def test_many_that_come_back_to_the_only_node_are_spread(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await build(nodes=1, admit_rate=3)
    phones = [await world.online_at(0, devno) for devno in range(3)]
    await world.node.drain(0.0)
    told = dict(phones[0].goodbye.properties["user_properties"])
    assert told == {"retry_after": "0.0", "retry_jitter": "1.0"}


async def test_a_stop_goes_on_when_the_others_are_not_known(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    world = await build()
    phone = await world.online_at(0, 0)
    world.nodes[0].store.nodes.away = 1
    await world.node.drain(0.0)
    assert phone.goodbye.reason is Reason.SERVER_SHUTTING_DOWN
    assert "the other nodes are not known: away" in caplog.text


async def test_what_is_acknowledged_in_the_last_moment_is_recorded(build: Build) -> None:
    world = await build()
    phone, idle = await world.online_at(0, 0), await world.online_at(0, 1)
    msg_id = await world.push(0)
    await phone.pushed(1)
    draining = asyncio.create_task(world.node.drain(4.0))
    await idle.until(lambda phone: phone.closed)
    assert not phone.closed  # goes last
    phone.ack()
    await draining
    assert phone.closed
    await world.node.close()
    assert (await world.states(msg_id))[0] is DeliveryState.DELIVERED


async def test_routes_end_with_the_node(build: Build) -> None:
    world = await build()
    await world.online_at(0, 0)
    await world.node.drain(0.0)
    assert await world.store.online(world.app.app_id) == type(world.hub.online)()


# A drain that the operator wishes, and its end


@pytest.mark.parametrize("version", [4, 5])
async def test_a_drained_node_hands_over_and_refuses(build: Build, version: int) -> None:
    world = await build()
    phone = await world.online_at(0, 0)
    await wish(world, "drain")
    await gone(world)
    assert reference(phone) == "node-2.example:1883"
    refused = world.connect_at(0, 1, version=version, properties={})
    assert refused.closed
    if version == 5:
        assert refused.connack.reason is Reason.USE_ANOTHER_SERVER
        assert refused.connack.properties["server_reference"] == "node-2.example:1883"
    else:
        assert refused.connack.reason is Reason.SERVER_UNAVAILABLE
    assert world.nodes[0].info().draining


async def test_a_drained_node_that_is_resumed_takes_devices(build: Build) -> None:
    world = await build(drain_rate=1)
    phones = [await world.online_at(0, devno) for devno in range(3)]
    await wish(world, "drain")
    await world.when(lambda: any(phone.closed for phone in phones))
    await wish(world, "resume")
    assert not (await world.online_at(0, 4)).closed
    assert sum(phone.closed for phone in phones) == 1


async def test_who_was_being_let_in_when_the_drain_began_goes_too(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await build()
    await world.online_at(0, 0)
    held: list[Callable[[], None]] = []
    claim = world.nodes[0].store.claim_route
    monkeypatch.setattr(
        world.nodes[0].store,
        "claim_route",
        lambda app, devno, node, done: claim(app, devno, node, lambda a: held.append(lambda: done(a))),
    )
    late = world.connect_at(0, 1)
    await wish(world, "drain")
    await gone(world)
    held[0]()
    await late.until(lambda phone: phone.closed)
    assert late.goodbye.reason is Reason.USE_ANOTHER_SERVER


async def test_without_addresses_peers_are_just_asked_to_go(build: Build) -> None:
    world = await build()
    world.nodes[1].address = ""
    await world.nodes[1].membership.beat()
    phone = await world.online_at(0, 0)
    await wish(world, "drain")
    await gone(world)
    assert (phone.goodbye.reason, reference(phone)) == (Reason.USE_ANOTHER_SERVER, None)


@pytest.mark.parametrize("nonsense", ["", "dance", "rebalance", "rebalance:", "rebalance:x", "rebalance:-5"])
async def test_a_wish_that_is_not_understood_changes_nothing(build: Build, nonsense: str) -> None:
    world = await build()
    phone = await world.online_at(0, 0)
    await wish(world, nonsense)
    await world.turns()
    assert (phone.closed, world.node.draining) == (False, False)


# A share, after a scale-out


async def test_a_share_goes_and_the_least_active_first(build: Build) -> None:
    world = await build()
    phones = [await world.online_at(0, devno) for devno in range(5)]
    for n, phone in enumerate(phones):
        phone.connection.last_seen = float((3, 1, 4, 0, 2)[n])
    await wish(world, "rebalance:40:1")
    await world.when(lambda: world.node.live == 3)
    assert [phone.closed for phone in phones] == [False, True, False, True, False]
    assert reference(phones[1]) == "node-2.example:1883"
    assert not world.node.draining


async def test_who_has_something_in_flight_goes_last(build: Build) -> None:
    world = await build()
    busy, idle = await world.online_at(0, 0), await world.online_at(0, 1)
    busy.connection.last_seen = 0.0
    await world.push(0)
    await busy.pushed(1)
    await wish(world, "rebalance:50:1")
    await idle.until(lambda phone: phone.closed)
    await world.turns()
    assert not busy.closed


async def test_a_drained_node_has_nothing_to_share(build: Build) -> None:
    world = await build()
    await wish(world, "drain")
    await wish(world, "rebalance:100:1")
    assert world.node.draining


async def test_nodes_that_died_are_nowhere_to_go(build: Build) -> None:
    world = await build()
    phone = await world.online_at(0, 0)
    world.table.now += LEASE + 1
    await world.nodes[0].membership.beat()
    await wish(world, "drain")
    await gone(world)
    assert reference(phone) is None


# What the next node brings


async def test_the_next_node_brings_what_was_not_acknowledged(build: Build) -> None:
    world = await build()
    phone = await world.online_at(0, 0)
    msg_ids = [await world.push(0, ttl=DAY), await world.push(0, 1)]
    await phone.pushed(2)
    phone.ack(msg_ids[0])
    await world.node.drain(0.0)
    await world.nodes[0].recorded()
    assert phone.closed
    there = await world.online_at(1, 0)
    assert await there.pushed(1) == msg_ids[1:]


async def test_a_handover_that_fails_is_logged(
    build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = await build()
    await world.online_at(0, 0)
    with monkeypatch.context() as patch:
        patch.setattr(world.node.handover, "_ask", lambda *_: 1 / 0)
        await wish(world, "rebalance:100:1")
        await world.when(lambda: "handing over failed" in caplog.text)
