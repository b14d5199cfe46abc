"""The fleet's store: the contract on each kind of Redis, and what only a store of several processes can do wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack

import pytest

from broker.bus import Doorbell, Targeted
from broker.metrics import Metrics
from broker.model import App, Claim, NewDevice, NodeInfo
from broker.redis.nodes import LEASE
from broker.redis.wire import pack
from broker.store import Store, StoreUnavailable
from broker.store_redis import RedisStore
from tests.broker.activity_contract import ActivityContract
from tests.broker.message_contract import MessageContract
from tests.broker.redis_rigs import RedisServer, Rig, cluster_of_six, servers, take_over, with_replica
from tests.broker.store_contract import HOUR, START, Clock, MakeStore, StoreContract, claimed, owed, push
from tests.patience import PATIENCE


class OnRedis(StoreContract, MessageContract, ActivityContract):
    """The suites of every store, on the rig that a subclass names."""

    @pytest.fixture
    def rig(self) -> Rig:
        raise NotImplementedError

    @pytest.fixture
    def make_store(self, clock: Clock, rig: Rig) -> MakeStore:
        async def make() -> Store:
            store = RedisStore(rig.url, clock=clock, replicas=rig.replicas)
            await store.open()
            return store

        return make


class TestPlain(OnRedis):
    @pytest.fixture
    def rig(self, plain: Rig) -> Rig:
        return plain


class TestReplicated(OnRedis):
    @pytest.fixture
    def rig(self, replicated: Rig) -> Rig:
        return replicated


class TestCluster(OnRedis):
    @pytest.fixture
    def rig(self, cluster: Rig) -> Rig:
        return cluster


# Several processes

Process = Callable[..., Awaitable[RedisStore]]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def process(clock: Clock) -> AsyncIterator[Process]:
    """Opens stores, each as another process would: `await process(rig, "n1")`."""
    async with AsyncExitStack() as stack:

        async def run(rig: Rig, name: str = "", *, node_clock: Clock | None = None) -> RedisStore:
            store = RedisStore(rig.url, clock=clock, node_clock=node_clock, replicas=rig.replicas)
            await store.open()
            stack.push_async_callback(store.close)
            if name:
                await store.nodes.join(NodeInfo(name))
            return store

        yield run


async def test_what_one_process_stored_another_sees(process: Process, plain: Rig) -> None:
    first, second = await process(plain), await process(plain)
    app = await first.create_app("shop")
    assert await second.find_app(app.key) == app
    await first.register(app.app_id, [NewDevice("a", tags=frozenset(("t",)))])
    assert (await second.resolve(app.app_id, ["a"])) == {"a": 0}
    (appended,) = await second.append([push(app, [0])])
    assert await owed(first, app, 0) == [appended.msg_id]
    assert await first.delete_app(app.key)
    assert await second.find_app(app.key) is None


async def test_a_device_that_moves_is_told_where_it_was(process: Process, plain: Rig) -> None:
    first, second = await process(plain, "n1"), await process(plain, "n2")
    app = await first.create_app("shop")
    await first.register(app.app_id, [NewDevice("a")])
    old = await claimed(first, app, 0, "n1")
    new = await claimed(second, app, 0, "n2")
    assert (old.former, new.former) == ("", "n1")
    first.release_route(app.app_id, 0, old.epoch, START)
    assert 0 in await second.online(app.app_id)
    assert list((await first.inspect_routes(app.app_id, {0: old.epoch})).lost) == [0]
    assert not (await second.inspect_routes(app.app_id, {0: new.epoch})).lost


async def test_routes_of_a_process_that_died_lapse_with_its_lease(
    process: Process, plain: Rig, clock: Clock
) -> None:
    dead, other = await process(plain, "n1", node_clock=clock), await process(plain, "n2", node_clock=clock)
    app = await other.create_app("shop")
    await other.register(app.app_id, [NewDevice("a")])
    claim = await claimed(dead, app, 0, "n1")
    assert list(await other.online(app.app_id)) == [0]
    clock.now += LEASE + 1
    await other.nodes.beat(NodeInfo("n2"))
    assert not await other.online(app.app_id)
    assert (await dead.nodes.beat(NodeInfo("n1"))).lapsed
    assert not (await dead.inspect_routes(app.app_id, {0: claim.epoch})).lost  # nobody claimed it meanwhile
    await other.nodes.refresh()
    assert list(await other.online(app.app_id)) == [0]


async def test_a_doorbell_rings_at_the_node_that_has_the_device(process: Process, plain: Rig) -> None:
    node, other, broker = (
        await process(plain, "n1"),
        await process(plain, "n2"),
        await process(plain),
    )
    heard: dict[str, list[Doorbell]] = {"n1": [], "n2": []}
    for store in (node, other):
        store.bus.subscribe(heard[store.nodes.name].extend)
        await store.bus.catch_up()
    app = await broker.create_app("shop")
    await broker.register(app.app_id, [NewDevice("a")])
    await claimed(node, app, 0, "n1")
    (appended,) = await broker.append([push(app, [0])])
    assert appended.rung
    await broker.close()  # it has rung by then
    for store in (node, other):
        await store.bus.catch_up()
    (bell,) = heard["n1"]
    assert isinstance(bell, Targeted)
    assert (bell.message.msg_id, list(bell.devnos)) == (appended.msg_id, [0])
    assert heard["n2"] == []


# Redis that goes


@pytest.fixture
def own() -> Iterator[RedisServer]:
    with servers(1) as (server,):
        yield server


async def test_s1_what_was_answered_survives_the_end_of_redis(own: RedisServer, process: Process) -> None:
    """By kill -9, with appends under way: those that were answered are there, the others may be."""
    rig = Rig("own", [own])
    store = await process(rig)
    app = await store.create_app("shop")
    appends = [asyncio.create_task(_append(store, app, n)) for n in range(200)]
    await asyncio.wait(appends, return_when=asyncio.FIRST_COMPLETED)
    own.restart()
    ids = [msg_id for msg_id in await asyncio.gather(*appends) if msg_id]
    assert ids
    again = await process(rig)
    for one in (store, again):
        assert sorted(await one.find_messages(app.app_id, ids)) == sorted(ids)


async def _append(store: Store, app: App, number: int, *, patient: bool = False) -> int:
    """0: it was not answered."""
    message = push(app, [number], cid=f"c{number}")
    while True:
        try:
            return (await store.append([message]))[0].msg_id
        except StoreUnavailable:
            if not patient:
                return 0
            await asyncio.sleep(0.1)


async def test_s6_a_publisher_that_tries_again_through_a_failover_stores_once(
    frail_cluster: Rig, process: Process
) -> None:
    """A master of a Cluster dies while pushes come in."""
    servers = frail_cluster.servers
    store = await process(frail_cluster)
    apps = [await store.create_app(f"shop {n}") for n in range(6)]  # of several slots
    before = [await _append(store, app, n) for n, app in enumerate(apps)]
    appends = [
        asyncio.create_task(_append(store, app, n, patient=True)) for app in apps for n in range(10, 40)
    ]
    servers[1].stop()
    take_over(frail_cluster, 1)
    servers[1].start()  # nothing is stored for good before the new master has a replica, too
    ids = await asyncio.gather(*appends)
    for number, app in enumerate(apps):
        mine = ids[30 * number : 30 * number + 30]
        assert len(set(mine)) == 30
        assert len(await store.find_messages(app.app_id, [before[number], *mine])) == 31
        for n, msg_id in enumerate(mine):
            assert await owed(store, app, n + 10) == [msg_id]


@pytest.fixture
def frail_cluster() -> Iterator[Rig]:
    with cluster_of_six() as rig:
        yield rig


async def test_what_is_stored_can_be_read_where_the_replica_became_the_master(
    frail: Rig, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no replica itself, so nothing is stored; but what was answered is there."""
    store = await process(frail)
    app = await store.create_app("shop")
    msg_id = await _append(store, app, 0)
    await store.engine.run("WAIT", 1, 0)  # that it was spread
    frail.servers[0].stop()
    frail.servers[1].command("REPLICAOF", "NO", "ONE")
    monkeypatch.setattr(store.engine, "wait_command", pack(("WAIT", 1, 100)))
    assert await owed(store, app, 0) == [msg_id]
    with pytest.raises(StoreUnavailable, match="0 of 1 replicas"):
        await store.append([push(app, [1])])


@pytest.fixture
def frail() -> Iterator[Rig]:
    with with_replica() as rig:
        yield rig


async def test_claims_wait_for_a_redis_that_is_away(own: RedisServer, process: Process) -> None:
    store = await process(Rig("own", [own]), "n1")
    app = await store.create_app("shop")
    await store.register(app.app_id, [NewDevice("a")])
    own.stop()
    future: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
    store.claim_route(app.app_id, 0, "n1", future.set_result)
    own.start()
    own.wait()
    assert (await asyncio.wait_for(future, PATIENCE)).epoch
    assert list(await store.online(app.app_id)) == [0]


async def test_its_metrics(process: Process, plain: Rig) -> None:
    store, metrics = await process(plain, "n1"), Metrics(process=False)
    store.count_in(metrics)
    await store.create_app("shop")
    await store.bus.ring_nodes(None, [])
    text = metrics.render()[0].decode()
    calls = next(line for line in text.splitlines() if line.startswith("holdfast_redis_calls_total"))
    assert float(calls.split()[1]) > 3
    assert "holdfast_doorbells_rung_total 0.0" in text


async def test_leases_do_not_depend_on_the_clock_of_the_store(
    process: Process, plain: Rig, clock: Clock
) -> None:
    """Which tests turn, and which may be wrong on one machine of many."""
    store = await process(plain, "n1")
    app = await store.create_app("shop")
    await store.register(app.app_id, [NewDevice("a")])
    await claimed(store, app, 0, "n1")
    clock.now += 100 * HOUR
    assert list(await (await process(plain)).online(app.app_id)) == [0]
