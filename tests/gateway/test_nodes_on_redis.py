"""Two nodes and a broker, each with its own store, around one real Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import cast

import orjson
import pytest
from pyroaring import BitMap

import gateway.fetcher
import gateway.membership
from broker.audiences.devices import Devices
from broker.carriers.catalog import Carriers
from broker.limits import Limits
from broker.metrics import Metrics
from broker.model import DeliveryState, NewDevice, NodeInfo
from broker.pushing.pushes import Pushes
from broker.store import Store
from broker.store_redis import RedisStore
from broker.telling.reports import Reports
from broker.tenants import tokens
from broker.tenants.apps import Apps
from gateway.membership import Membership
from gateway.mqtt import Connect, Reason
from gateway.node import Node, NodeSettings
from tests.broker.redis_rigs import Rig, plain, plain_redis
from tests.gateway.world import DAY, Phone, World

__all__ = ["plain", "plain_redis"]  # fixtures

DELIVERED, PENDING = DeliveryState.DELIVERED, DeliveryState.PENDING
LIMITS = Limits(fanout_limit=1)


class Process:
    """Of a fleet: its own store and bus, and everything that a broker or a gateway has."""

    def __init__(self, url: str, name: str, role: str) -> None:
        self.name, self.role = name, role
        self.redis = RedisStore(url)
        self.store, self.bus = cast("Store", self.redis), self.redis.bus
        self.apps = Apps(self.store, self.bus, LIMITS)
        self.devices = Devices(self.store, self.bus, LIMITS)
        self.pushes = Pushes(self.store, self.bus, LIMITS)
        metrics = Metrics()
        self.membership = Membership(self.store.nodes, self.info, metrics)
        self.node = Node(
            NodeSettings(name),
            store=self.store,
            bus=self.bus,
            apps=self.apps,
            devices=self.devices,
            pushes=self.pushes,
            reports=Reports(self.store, LIMITS),
            carriers=Carriers(),
            metrics=metrics,
            membership=self.membership,
        )

    def info(self) -> NodeInfo:
        node = self.node
        return NodeInfo(self.name, role=self.role, connections=node.live, draining=node.draining)

    async def open(self) -> None:
        await self.store.open()
        await self.membership.join()
        if self.role == "gateway":
            self.node.start()

    async def close(self) -> None:
        if self.role == "gateway":
            await self.node.drain(0.0)
            await self.node.close()
        self.apps.close()
        await self.membership.leave()
        await self.store.close()

    async def recorded(self) -> None:
        self.node.settler.fold()
        assert await self.node.settler._record()


class Fleet:
    def __init__(self, url: str) -> None:
        self.nodes = [Process(url, f"node-{n}", "gateway") for n in range(2)]
        self.broker = Process(url, "broker", "broker")

    async def open(self) -> Fleet:
        for process in (*self.nodes, self.broker):
            await process.open()
        self.app = await self.broker.store.create_app("test")
        self.names = [f"device-{n}" for n in range(4)]
        await self.broker.store.register(self.app.app_id, [NewDevice(name) for name in self.names])
        return self

    async def close(self) -> None:
        for process in (self.broker, *self.nodes):
            await process.close()

    async def online(self, number: int, devno: int) -> Phone:
        name, now = self.names[devno], self.nodes[number].node.clock.wall
        token = tokens.issue(self.app, name, devno, "other", 0, now, DAY).encode()
        phone = Phone(
            self.nodes[number].node,
            Connect(name, False, username=self.app.key, password=token, properties={}),
        )
        await phone.until(lambda phone: phone.packets)
        assert phone.connack.reason is Reason.SUCCESS
        return phone

    async def push(self, *devnos: int) -> int:
        body = {
            "platform": "all",
            "audience": {"registration_id": [self.names[devno] for devno in devnos]},
            "notification": {"alert": "hi"},
        }
        return (await self.broker.pushes.push(self.app, orjson.dumps(body))).msg_id

    async def states(self, msg_id: int) -> dict[int, DeliveryState | None]:
        record = (await self.broker.store.find_messages(self.app.app_id, [msg_id]))[msg_id]
        return {devno: record.state(devno, record.created_at) for devno in record.targets}


@pytest.fixture
async def fleet(plain: Rig) -> AsyncIterator[Fleet]:
    fleet = await Fleet(plain.url).open()
    yield fleet
    await fleet.close()


async def test_a_push_reaches_devices_wherever_they_are(fleet: Fleet) -> None:
    phones = [await fleet.online(n, n) for n in range(2)]
    msg_ids = [await fleet.push(*devnos) for devnos in ((0,), (1,), (0, 1), (0,))]
    assert await phones[0].pushed(3) == [msg_ids[n] for n in (0, 2, 3)]
    assert await phones[1].pushed(2) == [msg_ids[n] for n in (1, 2)]
    for phone, process in zip(phones, fleet.nodes, strict=True):
        phone.ack()
        await process.recorded()
    assert [set((await fleet.states(msg_id)).values()) for msg_id in msg_ids] == [{DELIVERED}] * 4


async def test_what_waited_comes_in_order_and_without_a_hold(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hold in ("HOLD", "HOLD_KNOWN"):
        monkeypatch.setattr(gateway.fetcher, hold, 3600)  # a page that is held does not come
    msg_ids = [await fleet.push(*devnos) for devnos in ((0,), (0, 1), (0,), (0, 1), (0,))]
    phone = await fleet.online(0, 0)
    assert await phone.pushed(5) == msg_ids


async def test_a_device_that_moves_is_closed_at_the_first_node_and_fenced(fleet: Fleet) -> None:
    old = await fleet.online(0, 0)
    msg_ids = [await fleet.push(0), await fleet.push(0, 1)]
    await old.pushed(2)
    new = await fleet.online(1, 0)
    old.ack()
    await fleet.nodes[0].recorded()
    assert (old.closed, old.goodbye.reason) == (True, Reason.SESSION_TAKEN_OVER)
    assert [(await fleet.states(msg_id))[0] for msg_id in msg_ids] == [PENDING, PENDING]
    assert await new.pushed(2) == msg_ids
    new.ack()
    await fleet.nodes[1].recorded()
    assert [(await fleet.states(msg_id))[0] for msg_id in msg_ids] == [DELIVERED, DELIVERED]
    assert await fleet.broker.store.online(fleet.app.app_id) == BitMap((0,))


async def test_a_broadcast_does_not_come_again_at_the_next_node(fleet: Fleet) -> None:
    await fleet.online(1, 2)  # the app is loaded there
    phone = await fleet.online(0, 0)
    first, second = await fleet.push(0, 1), await fleet.push(0, 1)
    await phone.pushed(2)
    phone.ack(first)
    await fleet.nodes[0].recorded()
    phone.leave()
    there = await fleet.online(1, 0)
    assert await there.pushed(1) == [second]


async def test_a_page_after_a_broadcast_that_is_over_costs_one_sweep(fleet: Fleet) -> None:
    phone = await fleet.online(0, 0)
    over = await fleet.push(0, 1)
    await fleet.broker.store.recall(fleet.app.app_id, [over], fleet.nodes[0].node.clock.wall)
    waiting = await fleet.push(2)
    there = await fleet.online(1, 2)
    assert await there.pushed(1) == [waiting]
    phone.leave()


async def test_a_sweep_finds_what_was_not_heard(fleet: Fleet) -> None:
    process = fleet.nodes[0]
    phones = [await fleet.online(0, devno) for devno in range(2)]
    process.node._unsubscribe()
    msg_ids = [await fleet.push(*devnos) for devnos in ((0,), (0, 1), (1,))]
    await process.bus.catch_up()
    await World.turns()
    assert [phone.got for phone in phones] == [[], []]
    [hub] = process.node.hubs
    app = hub.app
    await process.node.sweeper.sweep("missed")
    assert hub.app is app  # read again, and the same
    assert await phones[0].pushed(2) == msg_ids[:2]
    assert await phones[1].pushed(2) == msg_ids[1:]


async def test_a_revoked_token_ends_the_connection_on_any_node(fleet: Fleet) -> None:
    phones = [await fleet.online(n, n) for n in range(2)]
    await fleet.broker.devices.revoke(fleet.app, fleet.names[1])
    await phones[1].until(lambda phone: phone.closed)
    assert not phones[0].closed
    await fleet.nodes[0].node.sweeper.sweep("missed")
    assert not phones[0].closed


async def test_a_drained_node_hands_its_devices_over(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.membership, "BEAT", 0.01)
    phone = await fleet.online(0, 0)
    assert await fleet.broker.store.nodes.wish("node-0", "drain")
    await phone.until(lambda phone: phone.closed)
    assert phone.goodbye.reason is Reason.USE_ANOTHER_SERVER
    msg_id = await fleet.push(0)
    assert await (await fleet.online(1, 0)).pushed(1) == [msg_id]
    await fleet.broker.store.nodes.wish("node-0", "resume")
    await World.when(lambda: not fleet.nodes[0].node.draining)
    assert await (await fleet.online(0, 0)).pushed(1) == [msg_id]
