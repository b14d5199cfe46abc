"""Stories of a whole node, and a property over all of them: whatever happens in whatever order, each device gets
what it is owed, in order, and nothing twice on one connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

import gateway.fanout
import gateway.fetcher
import gateway.settler
import gateway.sweeper
from broker.audiences.devices import Devices
from broker.bus import Broadcast, CredentialsChanged, Doorbell, Missed, Subscriber, Targeted
from broker.carriers.catalog import Carriers
from broker.metrics import Metrics
from broker.model import (
    App,
    Claim,
    DeliveryState,
    NodeInfo,
    OwedRequest,
    RouteCheck,
    Settled,
    StoredBroadcast,
    StoredMessage,
)
from broker.nodes_local import OneNode
from broker.pushing.pushes import Pushes
from broker.store_sqlite import SqliteStore
from broker.telling.reports import Reports
from broker.tenants import tokens
from broker.tenants.apps import Apps
from gateway.hubs import HUB_REST
from gateway.membership import Membership
from gateway.mqtt import Connect, Puback, Reason
from gateway.node import Node, NodeSettings
from tests.gateway.world import DAY, START, Phone, World, start_node

DELIVERED, PENDING, EVICTED = DeliveryState.DELIVERED, DeliveryState.PENDING, DeliveryState.EVICTED
Start = Callable[..., Awaitable[World]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """`await start(devices=3, offline_limit=100, store=HeldStore)`"""
    worlds: list[World] = []

    async def run(*, store: Callable[..., SqliteStore] = SqliteStore, **app: Any) -> World:
        worlds.append(await World(tmp_path, store=store).open(**app))
        return worlds[-1]

    yield run
    for world in worlds:
        await world.close()


@pytest.fixture
async def world(start: Start) -> World:
    return await start()


class HeldStore(SqliteStore):
    """Its answers to a fetch, or to live_broadcasts, wait while the test holds them."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        self.open_for = asyncio.Event()  # answers pass
        self.open_for.set()
        self.read = asyncio.Event()  # an answer is there, and held

    async def _held(self) -> None:
        if not self.open_for.is_set():
            self.read.set()
            await self.open_for.wait()
            self.read.clear()

    async def fetch_owed(self, requests: Sequence[OwedRequest]) -> list[list[StoredMessage]]:
        owed = await super().fetch_owed(requests)
        if requests:
            await self._held()
        return owed

    async def live_broadcasts(self, app_id: int) -> list[StoredBroadcast]:
        rows = await super().live_broadcasts(app_id)
        await self._held()
        return rows


# From push to record


async def test_a_push_arrives_and_is_recorded_when_it_is_acknowledged(world: World) -> None:
    phone = await world.online(0)
    msg_id = await world.push(0)
    assert await phone.pushed(1) == [msg_id]
    assert await world.states(msg_id) == {0: PENDING}
    phone.ack()
    await world.recorded()
    assert await world.states(msg_id) == {0: DELIVERED}


async def test_a_broadcast_reaches_those_online_now_and_the_others_when_they_come(world: World) -> None:
    here = await world.online(0)
    msg_id = await world.push(0, 1)
    assert await here.pushed(1) == [msg_id]
    here.ack()
    there = await world.online(1)
    assert there.got == [msg_id]
    there.ack()
    await world.recorded()
    assert await world.states(msg_id) == {0: DELIVERED, 1: DELIVERED}
    assert (await world.online(2)).got == []


async def test_what_waited_comes_in_order_whatever_its_kind(world: World) -> None:
    ids = [await world.push(*devnos) for devnos in ((0,), (0, 1), (0,), (0, 1), (0, 2), (0,))]
    phone = await world.online(0)
    assert phone.got == ids


async def test_more_than_a_page_and_a_window_comes_piece_by_piece(world: World) -> None:
    ids = [await world.push(*((0,) if i % 3 else (0, 1))) for i in range(120)]
    phone = await world.online(0, properties={"receive_maximum": 7})
    while len(phone.got) < len(ids):
        had = len(phone.got)
        assert had <= 7 or len(phone.session.unacked or ()) <= 7
        phone.ack(*phone.got[-7:])
        await phone.pushed(had + 1)
        await world.calm()
    assert phone.got == ids


# Write yours, then read theirs (architecture, decision 4): a push against a CONNECT


async def test_a_push_committed_before_the_claim_is_fetched(world: World) -> None:
    msg_id = await world.append(0)
    phone = world.connect(0)
    assert await phone.pushed(1) == [msg_id]


async def test_a_push_committed_after_the_claim_comes_by_its_doorbell(world: World) -> None:
    phone = await world.online(0)
    msg_id = await world.append(0)
    assert phone.got == []
    world.ring(msg_id, 0)
    assert await phone.pushed(1) == [msg_id]


async def test_a_push_that_is_being_committed_while_the_device_connects_arrives_once(world: World) -> None:
    await world.online(1)  # the hub is loaded, so CONNECT is decided at once
    pushing = asyncio.create_task(world.push(0))
    await asyncio.sleep(0)  # the append is on its way to the writer
    phone = world.connect(0)
    msg_id = await pushing
    await phone.pushed(1)
    await world.calm()
    assert phone.got == [msg_id]


async def test_a_push_committed_during_a_fetch_comes_with_the_next_one(start: Start) -> None:
    world = await start(store=HeldStore)
    store = cast("HeldStore", world.store)
    await world.online(1)
    first = await world.push(0)
    await world.calm()
    store.open_for.clear()
    phone = world.connect(0)
    await store.read.wait()
    second = await world.push(0)
    third = await world.push(0, 1)
    await world.turns()
    assert phone.got == []
    store.open_for.set()
    assert await phone.pushed(3) == [first, second, third]
    await world.calm()
    assert phone.got == [first, second, third]


async def test_a_fetch_that_is_faster_than_an_older_broadcasts_doorbell_waits_for_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader may see a commit before the loop is told of it (found by test_crash.py)."""
    for hold in ("HOLD", "HOLD_KNOWN"):
        monkeypatch.setattr(gateway.fetcher, hold, 3600)
    await world.online(1)
    broadcast = await world.append(0, 1)
    targeted = await world.append(0)
    phone = world.connect(0)
    await world.calm()
    assert phone.got == []
    world.ring(broadcast, 0, 1)
    world.ring(targeted, 0)
    assert await phone.pushed(2) == [broadcast, targeted]
    await world.calm()
    assert phone.got == [broadcast, targeted]


async def test_rows_from_before_the_start_wait_for_no_doorbell(start: Start) -> None:
    world = await start()
    msg_id = await world.append(0)
    world.wall += 1
    await world.node.close()
    world.node = world.new_node()
    start_node(world.node)
    assert (await world.online(0)).got == [msg_id]


async def test_broadcasts_heard_while_the_app_is_loaded_are_not_lost(start: Start) -> None:
    world = await start(store=HeldStore)
    store = cast("HeldStore", world.store)
    before = await world.append(0, 1)
    store.open_for.clear()
    phone = world.connect(0)
    await store.read.wait()
    world.ring(before, 0, 1)  # in the rows already
    during = await world.push(0, 1)
    await world.turns()
    store.open_for.set()
    assert await phone.pushed(2) == [before, during]
    await world.calm()
    assert phone.got == [before, during]


# Coming back


async def test_what_was_not_acknowledged_is_sent_again_with_dup_and_its_packet_id(world: World) -> None:
    phone = await world.online(0)
    ids = [await world.push(*devnos) for devnos in ((0,), (0, 1), (0,))]
    await phone.pushed(3)
    phone.ack(ids[1])
    await world.recorded()
    phone.leave()
    again = await world.online(0)
    assert again.connack.session_present
    assert [(packet.packet_id, packet.dup) for packet in again.pushes] == [(1, True), (3, True)]
    assert again.got == [ids[0], ids[2]]


@pytest.mark.parametrize("values", [{"clean_start": True}, {"properties": {}}])
async def test_a_new_session_gets_the_same_pushes_as_new(world: World, values: dict[str, Any]) -> None:
    phone = await world.online(0, **values)
    msg_id = await world.push(0)
    await phone.pushed(1)
    phone.leave()
    again = await world.online(0, **values)
    assert not again.connack.session_present
    assert (again.got, [packet.dup for packet in again.pushes]) == ([msg_id], [False])


async def test_packet_ids_of_pushes_that_expired_meanwhile_are_forgotten(world: World) -> None:
    for _ in range(5):
        phone = await world.online(0)
        for _ in range(3):
            await world.push(0, ttl=10)
        await phone.pushed(3)
        phone.leave()
        world.later(20)
    (kept,) = world.hub.resend.values()
    assert len(kept.packet_ids) == 3


async def test_an_acknowledgement_just_before_the_connection_ended_counts(world: World) -> None:
    phone = await world.online(0)
    msg_id = await world.push(0)
    await phone.pushed(1)
    phone.ack()
    phone.leave()
    await world.recorded()
    assert await world.states(msg_id) == {0: DELIVERED}
    assert (await world.online(0)).got == []


# One live connection (G5)


async def test_the_newer_connection_wins_and_the_older_can_do_nothing_more(world: World) -> None:
    old = await world.online(0)
    msg_id = await world.push(0)
    await old.pushed(1)
    new = world.connect(0)
    assert await new.pushed(1) == [msg_id]
    assert (old.closed, old.goodbye.reason) == (True, Reason.SESSION_TAKEN_OVER)
    old.ack()
    old.leave()
    await world.recorded()
    assert await world.states(msg_id) == {0: PENDING}
    assert BitMap((0,)) == await world.store.online(world.app.app_id)
    assert await world.push(0) in await new.pushed(2)


async def test_a_takeover_during_a_fetch_leaves_nothing_out(start: Start) -> None:
    world = await start(store=HeldStore)
    store = cast("HeldStore", world.store)
    await world.online(1)
    ids = [await world.push(0) for _ in range(3)]
    await world.calm()
    store.open_for.clear()
    old = world.connect(0)
    await store.read.wait()
    new = world.connect(0)
    store.open_for.set()
    assert await new.pushed(3) == ids
    assert old.got == []
    await world.calm()
    assert new.got == ids


async def test_a_takeover_during_a_walk_sends_once_on_each_connection(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.fanout, "SLICE", 1)
    old = [await world.online(devno) for devno in range(3)]
    msg_id = await world.push(0, 1, 2)
    await old[0].pushed(1)
    assert old[2].got == []  # the walk is not there yet
    new = world.connect(2)
    await world.calm()
    assert [phone.got for phone in (*old, new)] == [[msg_id], [msg_id], [], [msg_id]]


@pytest.mark.parametrize("turns", range(8))
async def test_the_newer_connect_wins_even_if_the_older_waited_for_the_app(start: Start, turns: int) -> None:
    world = await start(store=HeldStore)
    store = cast("HeldStore", world.store)
    store.open_for.clear()
    old = world.connect(0)
    await store.read.wait()
    store.open_for.set()
    await world.turns(turns)
    new = world.connect(0)
    await new.until(lambda phone: phone.packets)
    await world.calm()
    assert (old.closed, new.closed) == (True, False)


# The end of a right


async def test_a_revoked_token_ends_the_connection(world: World) -> None:
    phone = await world.online(0)
    await world.devices.revoke(world.app, world.names[0])
    await phone.until(lambda phone: phone.closed)
    assert phone.goodbye.reason is Reason.NOT_AUTHORIZED
    again = world.connect(0)
    await again.until(lambda phone: phone.packets)
    assert again.connack.reason is Reason.NOT_AUTHORIZED


async def test_a_deleted_app_ends_its_connections(world: World) -> None:
    phone = await world.online(0)
    await world.apps.delete(world.app.key)
    await phone.until(lambda phone: phone.closed)
    again = world.connect(0)
    await again.until(lambda phone: phone.packets)
    assert again.connack.reason is Reason.BAD_USER_NAME_OR_PASSWORD


async def test_an_unknown_app_doorbell_is_nothing_to_us(world: World) -> None:
    world.bus.ring([CredentialsChanged(99, None), CredentialsChanged(99, (1,))])
    world.ring(5, 0)
    await world.turns()


# Newest N, expiry


async def test_the_newest_n_rule_counts_what_it_drops(start: Start) -> None:
    world = await start(offline_limit=2)
    await world.online(1)
    broadcasts = [await world.push(0, 2) for _ in range(4)]
    await world.calm()
    phone = await world.online(0)
    assert phone.got == broadcasts[2:]
    await world.recorded()
    assert [(await world.states(msg_id))[0] for msg_id in broadcasts] == [EVICTED, EVICTED, PENDING, PENDING]


async def test_the_newest_n_rule_does_not_count_what_was_acknowledged_a_moment_ago(start: Start) -> None:
    world = await start(offline_limit=2)
    phone = await world.online(0)
    ids = [await world.push(0, 1) for _ in range(4)]
    await phone.pushed(4)
    phone.ack(*ids[2:])
    phone.leave()
    again = world.connect(0)  # at once: nothing is folded yet
    assert set(ids[:2]) <= set(again.got)
    await world.recorded()
    assert [(await world.states(msg_id))[0] for msg_id in ids] == [PENDING, PENDING, DELIVERED, DELIVERED]


async def test_a_lost_doorbell_delays_a_broadcast_and_does_not_lose_it(world: World) -> None:
    """Bus B1. The log of a loaded app grows by doorbells, and by sweeps."""
    here = await world.online(1)
    msg_id = await world.append(0, 1)  # never rings
    there = await world.online(0)
    await world.node.sweeper.sweep("missed")
    assert await here.pushed(1) == await there.pushed(1) == [msg_id]


async def test_what_expired_is_not_sent(world: World) -> None:
    gone = [await world.push(0, ttl=10), await world.push(0, 1, ttl=10)]
    kept = [await world.push(0, ttl=60), await world.push(0, 1, ttl=60)]
    world.later(30)
    assert (await world.online(0)).got == kept
    assert [await world.states(msg_id) for msg_id in gone] == [
        {0: DeliveryState.EXPIRED},
        {0: DeliveryState.EXPIRED, 1: DeliveryState.EXPIRED},
    ]


async def test_no_time_to_live_reaches_those_online_and_is_recorded(world: World) -> None:
    phone = await world.online(0)
    ids = [await world.push(0, 1, ttl=0), await world.push(0, ttl=0)]
    assert await phone.pushed(2) == ids
    phone.ack()
    await world.recorded()
    assert [(await world.states(msg_id))[0] for msg_id in ids] == [DELIVERED, DELIVERED]
    assert (await world.online(1)).got == []


# Closing, unloading


async def test_acknowledgements_are_recorded_before_the_node_is_closed(world: World) -> None:
    phone = await world.online(0)
    msg_id = await world.push(0)
    await phone.pushed(1)
    phone.ack()
    await world.node.drain(1.0)
    assert phone.goodbye.reason is Reason.SERVER_SHUTTING_DOWN
    await world.node.close()
    assert await world.states(msg_id) == {0: DELIVERED}


async def test_an_app_without_devices_is_unloaded_and_loaded_again(world: World) -> None:
    phone = await world.online(0, properties={})
    msg_id = await world.push(0, 1)
    phone.leave()
    world.node.clock.now += HUB_REST + 1
    world.node.hubs.upkeep()
    assert len(world.node.hubs) == 0
    assert (await world.online(1)).got == [msg_id]


async def test_a_peer_that_does_not_read_its_goodbye_is_cut_off(world: World) -> None:
    phone = await world.online(0)
    phone.connection.close("told to")
    assert (phone.transport.closed, phone.transport.aborted) == (True, False)
    later = phone.connection.check(world.node.clock.now)
    assert later is not None
    assert phone.connection.check(later) is None
    assert phone.transport.aborted


# The property


class ModelBus:
    """Doorbells wait until the test lets them ring."""

    def __init__(self) -> None:
        self.hear: Subscriber = lambda _: None

    def subscribe(self, subscriber: Subscriber, missed: Missed | None = None) -> Callable[[], None]:
        del missed
        self.hear = subscriber
        return lambda: None

    async def catch_up(self) -> None:
        pass

    def ring(self, doorbells: Sequence[Doorbell]) -> None:
        raise AssertionError("nobody rings here")


class Pushed:
    """What the model knows of one push."""

    def __init__(self, message: StoredMessage, targets: BitMap, *, broadcast: bool) -> None:
        self.message = message
        self.targets = targets
        self.broadcast = broadcast
        self.settled = BitMap()

    @property
    def bell(self) -> Doorbell:
        if self.broadcast:
            return Broadcast(StoredBroadcast(self.message, self.targets.copy(), BitMap()))
        return Targeted(self.message, tuple(self.targets))

    @property
    def lasting(self) -> bool:
        return self.message.expires_at > self.message.created_at


class ModelStore:
    """A store of dicts whose reads happen, and answer, when the test says. The parts that a node uses."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.pushed: dict[int, Pushed] = {}
        self.nodes = OneNode()
        self.records: Any = None  # nothing is learned for good
        self.asked: tuple[Sequence[OwedRequest], asyncio.Future[list[list[StoredMessage]]]] | None = None
        self.found: list[list[StoredMessage]] | None = None
        self.epoch = 0
        self.epochs: dict[int, int] = {}

    async def find_app(self, key: str) -> App | None:
        return self.app if key == self.app.key else None

    async def live_broadcasts(self, app_id: int) -> list[StoredBroadcast]:
        del app_id
        return [
            StoredBroadcast(one.message, one.targets.copy(), one.settled.copy())
            for one in self.pushed.values()
            if one.broadcast and one.lasting
        ]

    async def list_retained(self, app_id: int) -> list[Any]:
        del app_id
        return []

    async def list_session_items(self, app_id: int) -> list[Any]:
        del app_id
        return []

    def token_generations(self, app_id: int) -> Mapping[int, int]:
        del app_id
        return {}

    def claim_route(self, app_id: int, devno: int, node_id: str, done: Callable[[Claim], None]) -> None:
        del app_id, node_id
        self.epoch += 1
        self.epochs[devno] = self.epoch
        done(Claim(self.epoch, bool(self._inbox(devno, 0))))

    def release_route(self, app_id: int, devno: int, epoch: int, now: float) -> None:
        pass

    async def inspect_routes(self, app_id: int, routes: Mapping[int, int]) -> RouteCheck:
        del app_id
        await asyncio.sleep(0)
        lost = BitMap([devno for devno, epoch in routes.items() if self.epochs.get(devno) != epoch])
        return RouteCheck(lost, BitMap([devno for devno in routes if self._inbox(devno, 0)]))

    async def fetch_owed(self, requests: Sequence[OwedRequest]) -> list[list[StoredMessage]]:
        assert self.asked is None
        self.asked = (requests, asyncio.get_running_loop().create_future())
        return await self.asked[1]

    def read(self) -> None:
        if self.asked is not None and self.found is None:
            self.found = [self._inbox(one.devno, one.after)[: one.limit] for one in self.asked[0]]

    def answer(self) -> None:
        if self.asked is not None and self.found is not None:
            (_, future), found = self.asked, self.found
            self.asked = self.found = None
            if not future.done():
                future.set_result(found)

    def _inbox(self, devno: int, after: int) -> list[StoredMessage]:
        return [
            one.message
            for msg_id, one in self.pushed.items()
            if not one.broadcast and one.lasting
            if msg_id > after and devno in one.targets and devno not in one.settled
        ]

    async def settle(self, settled: Sequence[Settled]) -> None:
        for one in settled:
            assert not one.evicted
            self.pushed[one.msg_id].settled.update(one.delivered)


class Model:
    """One node on a ModelStore, and phones that check what they get. `in_order`: the carrier wants it so."""

    def __init__(self, carriers: Carriers | None = None, *, in_order: bool = True) -> None:
        self.in_order = in_order
        key, now = "0" * 24, START
        self.app = App(1, key, "app", "secret", "device", b"s" * 32, False, now, offline_limit=1_000_000)
        self.store = ModelStore(self.app)
        self.bus = ModelBus()
        store = cast("Any", self.store)
        apps = Apps(store, self.bus)
        metrics = Metrics()
        self.node = Node(
            NodeSettings("model"),
            store=store,
            bus=self.bus,
            apps=apps,
            devices=Devices(store, self.bus),
            pushes=Pushes(store, self.bus),
            reports=Reports(store),
            carriers=carriers or Carriers(),
            metrics=metrics,
            membership=Membership(store.nodes, lambda: NodeInfo("model"), metrics),
            wall=lambda: START,
        )
        apps.close()
        self.waiting: list[Doorbell] = []
        self.lost = False
        self.rung: list[Doorbell] = []
        self.phones: list[Phone | None] = [None] * DEVICES
        self.all_phones: list[Phone] = []

    def push(self, devices: int, kind: int) -> None:
        targets = BitMap([devno for devno in range(DEVICES) if devices >> devno & 1]) or BitMap((0,))
        msg_id = len(self.store.pushed) + 1
        size, ttl = (200 if kind & 2 else 2), (0.0 if kind & 4 else DAY)
        body = b'{"notification":{"alert":"%s"}}' % (b"x" * size)
        replaces = msg_id - 1 if kind & 16 else 0
        message = StoredMessage(msg_id, 1, body, START, START + ttl, replaces=replaces, high=bool(kind & 8))
        pushed = Pushed(message, targets, broadcast=bool(kind & 1))
        self.store.pushed[msg_id] = pushed
        self.waiting.append(pushed.bell)

    def ring(self) -> None:
        """After one was lost nothing is heard until the node has looked for it (bus B1)."""
        if self.waiting and not self.lost:
            self.rung.append(self.waiting.pop(0))
            self.bus.hear([self.rung[-1]])

    def ring_again(self, which: int) -> None:
        if self.rung:
            self.bus.hear([self.rung[which % len(self.rung)]])

    def lose(self) -> None:
        if self.waiting:
            self.waiting.pop(0)
            self.lost = True

    async def sweep(self) -> None:
        """As the bus does when it lost something, or the round at any time."""
        await self.node.sweeper.sweep("missed")
        self.lost = False

    def connect(self, devno: int, window: int, limit: int) -> None:
        properties: Any = {"receive_maximum": window, "session_expiry_interval": 60}
        if limit:
            properties["maximum_packet_size"] = 100
        name = f"device-{devno}"
        token = tokens.issue(self.app, name, devno, "other", 0, START, DAY).encode()
        connect = Connect(name, False, username=self.app.key, password=token, properties=properties)
        phone = self.phones[devno] = Phone(self.node, connect)
        self.all_phones.append(phone)

    def leave(self, devno: int) -> None:
        phone, self.phones[devno] = self.phones[devno], None
        if phone is not None:
            phone.leave()

    def ack(self, devno: int, count: int) -> None:
        phone = self.phones[devno]
        if phone is not None and phone.connection.session is not None:
            open_ids = list(phone.session.unacked or ())
            phone.send(*map(Puback, open_ids[:count]))

    def block(self, devno: int, blocked: int) -> None:
        phone = self.phones[devno]
        if phone is not None and phone.connection.session is not None and phone.connection.blocked != blocked:
            if blocked:
                phone.block()
            else:
                phone.drain()

    def check(self) -> None:
        for phone in self.all_phones:
            assert len(phone.got) == len(set(phone.got)), "once on a connection"
            assert not self.in_order or phone.got == sorted(phone.got), "in order"
            if phone.connection.session is not None:
                assert len(phone.session.unacked or ()) <= phone.session.window

    def owed(self) -> set[tuple[int, int]]:
        """(msg_id, devno) that no phone has had yet, of pushes with a time to live."""
        had = {
            (msg_id, int(phone.connection.client_id[-1])) for phone in self.all_phones for msg_id in phone.got
        }
        return {
            (msg_id, devno)
            for msg_id, one in self.store.pushed.items()
            if one.lasting
            for devno in one.targets
        } - had

    def push_and_ring(self, devices: int, kind: int) -> None:
        self.push(devices, kind)
        while self.waiting and not self.lost:
            self.ring()

    def read(self) -> None:
        self.store.read()

    def answer(self) -> None:
        self.store.answer()

    def upkeep(self) -> None:
        self.node.hubs.upkeep()

    async def settle(self) -> None:
        """Nothing is held up any more, until nothing more happens."""
        if self.lost:
            await self.sweep()
        while self.waiting:
            self.ring()
        for devno in range(DEVICES):
            self.block(devno, 0)
        for _ in range(40 + 10 * len(self.store.pushed)):
            self.read()
            self.answer()
            await asyncio.sleep(0)
            for devno in range(DEVICES):
                self.ack(devno, 100)

    def unlimited(self) -> set[int]:
        """Devices that are connected and take packets of any size."""
        live = [phone for phone in self.phones if phone is not None and phone.connection.session is not None]
        return {phone.session.devno for phone in live if not phone.session.manners.maximum_packet}


DEVICES: Final = 3
devnos = st.integers(0, DEVICES - 1)
masks = st.integers(1, 2**DEVICES - 1)
kinds = st.sampled_from((0, 0, 0, 1, 1, 1, 2, 3, 5, 4))  # mostly plain: targeted, broadcast
STEPS: Final = (
    st.tuples(st.just("push_and_ring"), masks, kinds),
    st.tuples(st.just("push_and_ring"), masks, kinds),
    st.tuples(st.just("push"), masks, kinds),
    st.tuples(st.just("ring")),
    st.tuples(st.just("ring_again"), st.integers(0, 9)),
    st.tuples(st.just("read")),
    st.tuples(st.just("answer")),
    st.tuples(st.just("connect"), devnos, st.integers(1, 3), st.sampled_from((0, 0, 1))),
    st.tuples(st.just("leave"), devnos),
    st.tuples(st.just("ack"), devnos, st.integers(1, 3)),
    st.tuples(st.just("ack"), devnos, st.integers(1, 3)),
    st.tuples(st.just("block"), devnos, st.integers(0, 1)),
    st.tuples(st.just("upkeep")),
)
LOSSY_STEPS: Final = (*STEPS, st.tuples(st.just("lose")), st.tuples(st.just("sweep")))


def courses(steps: Sequence[st.SearchStrategy[Any]]) -> st.SearchStrategy[list[tuple[int, tuple[Any, ...]]]]:
    """Turns of the loop before each step, and the steps."""
    return st.lists(st.tuples(st.integers(0, 3), st.one_of(*steps)), min_size=5, max_size=60)


async def run_steps(steps: list[tuple[int, tuple[Any, ...]]], model: Model) -> None:
    node = model.node
    node._unsubscribe = model.bus.subscribe(node._heard)
    node.settler.start()
    node.fetcher.start()
    try:
        for devno in range(DEVICES):
            model.connect(devno, 2, 0)
        await World.turns()
        for turns, (step, *values) in steps:
            await World.turns(turns)
            under_way = getattr(model, step)(*values)
            if under_way is not None:
                await under_way
            model.check()
        await model.settle()
        model.check()
        assert {devno for _, devno in model.owed()}.isdisjoint(model.unlimited()), "it got stuck"
        for devno in range(DEVICES):
            model.connect(devno, 3, 0)
        await model.settle()
        model.check()
        assert model.owed() == set()
        assert all(one.settled >= one.targets for one in model.store.pushed.values() if one.lasting)
    finally:
        if model.store.asked is not None:
            model.store.asked[1].cancel()
        await node.close()


@pytest.fixture(scope="module", autouse=True)
def _small_slices() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gateway.settler, "FOLD_AFTER", 0)
        patch.setattr(gateway.settler, "RECORD_AFTER", 0)
        patch.setattr(gateway.fanout, "PATIENCE", 3600)  # or a busy machine would have walks rest
        yield


@pytest.fixture(params=[1, 2, 256])
def slice_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(gateway.fanout, "SLICE", request.param)
    return int(request.param)


@settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(  # a doorbell of a broadcast without time to live, once more after the app was loaded
    steps=[
        (0, ("push_and_ring", 1, 0)),
        (0, ("push_and_ring", 4, 4)),
        (0, ("connect", 2, 2, 0)),
        (0, ("push_and_ring", 4, 1)),
        (0, ("ring_again", 1)),
    ]
)
@given(steps=courses(STEPS))
def test_everything_owed_is_sent_in_order_and_once_on_a_connection(
    slice_size: int, steps: list[tuple[int, tuple[Any, ...]]]
) -> None:
    run(steps)


@settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(  # the sweep finds a row while the window is full
    steps=[
        (0, ("push_and_ring", 1, 0)),
        (0, ("push_and_ring", 1, 0)),
        (0, ("push", 1, 0)),
        (0, ("lose",)),
    ]
)
@given(steps=courses(LOSSY_STEPS))
def test_the_same_where_doorbells_are_lost(
    slice_size: int, monkeypatch: pytest.MonkeyPatch, steps: list[tuple[int, tuple[Any, ...]]]
) -> None:
    monkeypatch.setattr(gateway.fetcher, "HOLD", 0)
    for rest in ("RESTS", "REST_MIN"):
        monkeypatch.setattr(gateway.sweeper, rest, 0)
    run(steps)


def run(steps: list[tuple[int, tuple[Any, ...]]], **model: Any) -> None:
    async def story() -> None:
        await run_steps(steps, Model(**model))

    with asyncio.Runner() as runner:
        runner.run(story())
