"""The bus of the fleet: the contract, and what a connection to Redis can lose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from broker.bus import Broadcast, CredentialsChanged, Doorbell, Missed, Recalled, Taken, Targeted
from broker.bus_redis import MAX_WAITING, BusStats, RedisBus, _Ear
from broker.model import NodeInfo, StoredBroadcast, StoredMessage, Withdrawn
from broker.redis import bells
from broker.redis.engine import Engine
from broker.redis.keys import of_node
from broker.redis.nodes import LEASE, RedisNodes
from broker.redis.topology import slot_of
from broker.store import StoreUnavailable
from tests.broker.bus_contract import MESSAGE, Arrive, BusContract, numbered
from tests.broker.redis_rigs import Rig, cluster_of_six, give_slot, take_over
from tests.broker.store_contract import Clock
from tests.patience import PATIENCE, until


@dataclass
class Process:
    """One of the fleet: what it heard, and where in between it looked into the store."""

    engine: Engine
    nodes: RedisNodes
    bus: RedisBus
    heard: list[Any] = field(default_factory=list)

    def hear(self, doorbells: Sequence[Doorbell]) -> None:
        self.heard.extend(
            doorbell.devnos[0] if isinstance(doorbell, CredentialsChanged) and doorbell.devnos else doorbell
            for doorbell in doorbells
        )

    async def missed(self) -> None:
        self.heard.append("missed")

    async def listening(self, missed: Missed | None = None) -> Process:
        self.bus.subscribe(self.hear, missed or self.missed)
        await self.bus.catch_up()
        self.heard.clear()  # perhaps it looked: what was rung before it listened was missed
        return self

    async def lose_one(self) -> None:
        """A doorbell that it does not hear."""
        await self.engine.run("INCR", of_node(self.nodes.number, "rung"))


StartProcess = Callable[..., Awaitable[Process]]


@pytest.fixture(autouse=True)
def no_look_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one of a slow test comes between."""
    monkeypatch.setattr("broker.bus_redis.CHECK", 3600.0)


@pytest.fixture(params=["plain", "cluster"])
def rig(request: pytest.FixtureRequest) -> Rig:
    rig: Rig = request.getfixturevalue(request.param)
    return rig


@pytest.fixture
async def start() -> AsyncIterator[StartProcess]:
    """Starts processes: `await start(rig, "n1")`."""
    processes: list[Process] = []

    async def run(rig: Rig, name: str, role: str = "all", clock: Clock | None = None) -> Process:
        engine = Engine(rig.url, patience=PATIENCE)
        await engine.open()
        nodes = RedisNodes(engine, clock)
        made = Process(engine, nodes, RedisBus(engine, nodes))
        processes.append(made)
        await nodes.join(NodeInfo(name, role))
        for other in processes:
            await other.nodes.refresh()
        return made

    yield run
    for made in processes:
        await made.bus.close()
        await made.nodes.close()
        await made.engine.close()


@pytest.fixture
def process(start: StartProcess, rig: Rig) -> StartProcess:
    """`await process("n1")`."""
    return partial(start, rig)


async def looking(process: StartProcess) -> tuple[Process, asyncio.Event]:
    """A process that looks for what it missed, until the event is set."""
    node = await process("n1")
    began, go_on = asyncio.Event(), asyncio.Event()

    async def missed() -> None:
        began.set()
        await go_on.wait()
        node.heard.append("missed")

    go_on.set()
    await node.listening(missed)
    began.clear()
    go_on.clear()
    await node.lose_one()
    await node.bus._ear._check()
    await began.wait()
    return node, go_on


class TestRedisBus(BusContract):
    @pytest.fixture
    async def bus(self, process: StartProcess) -> RedisBus:
        bus = (await process("n1")).bus
        stop = bus.subscribe(lambda _doorbells: None)
        await bus.catch_up()
        stop()
        return bus

    @pytest.fixture
    def arrive(self, bus: RedisBus) -> Arrive:
        async def arrive() -> None:
            await bus.flush()
            await bus.catch_up()

        return arrive


# Who hears what


async def test_each_node_hears_it_once(process: StartProcess) -> None:
    first, second = await process("n1"), await process("n2")
    for node in (first, second):
        await node.listening()
    await first.bus.ring_nodes(None, numbered(3))
    for node in (first, second):
        await node.bus.catch_up()
        assert node.heard == [0, 1, 2]


async def test_only_the_nodes_that_are_named_hear_it(process: StartProcess) -> None:
    first, second = await process("n1"), await process("n2")
    await second.listening()
    await second.bus.ring_nodes([first.nodes.number], numbered(3))
    await second.bus.ring_nodes([second.nodes.number], [Targeted(MESSAGE, (1, 2))])
    await second.bus.catch_up()
    assert [told(doorbell) for doorbell in second.heard] == [told(Targeted(MESSAGE, (1, 2)))]


async def test_what_is_taken_is_told_to_whom_it_was_taken_from(process: StartProcess) -> None:
    first, second = await process("n1"), await process("n2")
    for node in (first, second):
        await node.listening()
    taken = Taken(1, 5, 9, "n1")
    second.bus.ring([taken, Taken(1, 5, 9, "gone"), *numbered(1)])
    await second.bus.flush()
    for node, heard in ((first, [taken, 0]), (second, [0])):
        await node.bus.catch_up()
        assert node.heard == heard


async def test_brokers_hear_of_credentials_only(process: StartProcess) -> None:
    node, broker = await process("n1"), await process("b1", "broker")
    await broker.listening()
    node.bus.ring([Targeted(MESSAGE, (1,)), *numbered(1), Recalled([])])
    await node.bus.flush()
    await broker.bus.catch_up()
    assert broker.heard == [0]


@pytest.mark.parametrize("rung", ["ring", "ring_nodes"])
async def test_a_node_that_joined_a_moment_ago_hears_it_too(
    process: StartProcess, rig: Rig, rung: str
) -> None:
    first, engine = await process("n1"), Engine(rig.url)
    await engine.open()
    nodes = RedisNodes(engine)
    late = Process(engine, nodes, RedisBus(engine, nodes))
    await nodes.join(NodeInfo("n2"))
    await late.listening()
    assert nodes.number not in first.nodes.live
    if rung == "ring":
        first.bus.ring(numbered(1))
        await first.bus.flush()
    else:
        await first.bus.ring_nodes(None, numbered(1))
    await late.bus.catch_up()
    assert late.heard == [0]
    await late.bus.close()
    await nodes.close()
    await engine.close()


async def test_doorbells_for_the_dead_wait_for_nobody(process: StartProcess) -> None:
    first, second = await process("n1"), await process("n2")
    number = second.nodes.number
    await second.nodes.leave()
    await first.nodes.refresh()
    await first.bus.ring_nodes([number], numbered(1))
    assert first.bus.stats.dropped == 1
    assert await first.engine.run("GET", of_node(number, "rung")) is None


async def test_what_rang_while_a_node_slept_is_a_gap_when_it_wakes(process: StartProcess) -> None:
    clock = Clock()
    sleeper, other = await process("n1", clock=clock), await process("n2", clock=clock)
    await sleeper.listening()
    slept_through = asyncio.Queue[Any]()
    await tamper(sleeper, lambda pushes: [slept_through.put_nowait(push) for push in pushes] and [])
    clock.now += LEASE + 1
    await other.nodes.beat(NodeInfo("n2"))
    assert not other.nodes.is_live(sleeper.nodes.number)
    await other.bus.ring_nodes(None, numbered(1))
    await slept_through.get()
    await tamper(sleeper, lambda pushes: pushes)
    assert (await sleeper.nodes.beat(NodeInfo("n1"))).lapsed
    await other.bus.ring_nodes(None, numbered(2))
    await sleeper.bus.catch_up()
    assert sleeper.heard == ["missed", 0, 1]


async def test_rings_that_fail_leave_no_error_behind(process: StartProcess) -> None:
    """Neither the look at the table nor a node's line does."""
    node = await process("n1")
    await node.engine.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await node.bus.ring_nodes(None, numbered(1))
    await node.bus.close()


# What gets lost


async def tamper(node: Process, change: Callable[[list[Any]], list[Any]]) -> None:
    """What arrives from now on goes through `change`, as a list of pushes."""
    connection = node.bus._ear._connection
    assert connection is not None
    connection.on_push = lambda push: [node.bus._ear._hear(each) for each in change([push])] and None


async def test_a_gap_is_looked_up_before_anything_later_is_heard(process: StartProcess) -> None:
    node = await (await process("n1")).listening()
    await tamper(node, lambda pushes: [push for push in pushes if not push[2].startswith(b"2 ")])
    for number in range(1, 5):
        await node.bus.ring_nodes([node.nodes.number], [CredentialsChanged(1, (number,))])
    await node.bus.catch_up()
    assert node.heard == [1, "missed", 3, 4]
    assert node.bus.stats.missed == 2  # one was the subscription itself


async def test_a_lost_last_one_is_found_by_the_next_look(process: StartProcess) -> None:
    node = await (await process("n1")).listening()
    await tamper(node, lambda _pushes: [])
    await node.bus.ring_nodes([node.nodes.number], numbered(1))
    assert node.heard == []
    await node.bus.catch_up()
    assert node.heard == ["missed"]
    await node.bus.catch_up()
    assert node.heard == ["missed"]


async def test_the_look_comes_by_itself(process: StartProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.bus_redis.CHECK", 0.01)
    node = await process("n1")
    looked = asyncio.Queue[str]()

    async def missed() -> None:
        looked.put_nowait("missed")

    await node.listening(missed)
    while not looked.empty():
        looked.get_nowait()
    await tamper(node, lambda _pushes: [])
    await node.bus.ring_nodes([node.nodes.number], numbered(1))
    assert await asyncio.wait_for(looked.get(), PATIENCE) == "missed"


async def test_what_comes_twice_is_heard_once(process: StartProcess) -> None:
    node = await (await process("n1")).listening()
    await tamper(node, lambda pushes: pushes * 3)
    for number in range(3):
        await node.bus.ring_nodes([node.nodes.number], [CredentialsChanged(1, (number,))])
    await node.bus.catch_up()
    assert node.heard == [0, 1, 2]
    assert node.bus.stats.repeated == 6


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(6)).flatmap(lambda order: st.tuples(st.just(order), st.sets(st.integers(0, 5)))))
def test_whatever_is_lost_or_late_later_ones_follow_a_look(fate: tuple[list[int], set[int]]) -> None:
    order, lost = fate

    async def run() -> list[Any]:
        heard: list[Any] = []

        async def missed() -> None:
            await asyncio.sleep(0)
            heard.append("missed")

        ear = _Ear(None, BusStats(), None)  # type: ignore[arg-type]
        ear.subscribe(lambda d: heard.extend(x.devnos[0] for x in d), missed)  # type: ignore[union-attr]
        for number in order:
            if number not in lost:
                bell = bells.join([bells.encode([CredentialsChanged(1, (number,))])])
                ear._hear([b"smessage", b"", b"%d %s" % (number + 1, bell)])
            if number % 2:
                await asyncio.sleep(0)
        ear.counted(6)
        while ear._working is not None:
            await ear._working
        return heard

    heard = asyncio.run(run())
    told = [each for each in heard if each != "missed"]
    assert told == sorted(set(told))
    expected = 0
    for each in heard:  # between two that do not follow each other there was a look
        if each == "missed":
            expected = -1
        else:
            assert expected in {-1, each}
            expected = each + 1
    assert expected in {-1, 6}


async def test_a_new_subscription_looks_for_what_the_old_one_missed(process: StartProcess) -> None:
    node = await (await process("n1")).listening()
    connection = node.bus._ear._connection
    assert connection is not None
    connection.abort("cut")
    await node.bus.ring_nodes([node.nodes.number], numbered(1))
    await node.bus.catch_up()
    assert node.heard[0] == "missed"


async def test_later_ones_wait_while_what_was_missed_is_looked_up(process: StartProcess) -> None:
    node, go_on = await looking(process)
    await node.bus.ring_nodes([node.nodes.number], numbered(2))
    await node.engine.run("PING")
    assert node.heard == []
    go_on.set()
    await node.bus.catch_up()
    assert node.heard == ["missed", 0, 1]


async def test_looking_is_tried_again_until_the_store_answers(
    process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.bus_redis.BACKOFF", (0.001, 0.001))
    node = await process("n1")
    attempts = iter(range(3))

    async def missed() -> None:
        if (attempt := next(attempts, 3)) < 2:
            raise StoreUnavailable("away")
        node.heard.append(f"missed {attempt}")

    await node.listening(missed)
    attempts = iter(range(3))
    await node.lose_one()
    await node.bus.catch_up()
    assert node.heard == ["missed 2"]


async def test_what_could_not_be_rung_is_a_gap(
    process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.bus_redis.BACKOFF", (0.001, 0.001))
    node, other = await (await process("n1")).listening(), await process("n2")
    call, fails = other.engine.call, iter([True])

    def fail(*arguments: Any) -> Any:
        if next(fails, False):
            future = asyncio.get_running_loop().create_future()
            future.set_exception(StoreUnavailable("cut"))
            return future
        return call(*arguments)

    other.engine.call = fail  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailable, match="not rung: cut"):
        await other.bus.ring_nodes([node.nodes.number], numbered(1))
    await other.bus.flush()
    await node.bus.catch_up()
    assert node.heard == ["missed"]
    other.bus.ring(numbered(1))
    await other.bus.flush()
    await node.bus.catch_up()
    assert node.heard == ["missed", 0]


async def test_g6_what_waits_for_a_node_is_bounded(process: StartProcess) -> None:
    node, other = await (await process("n1")).listening(), await process("n2")
    big = Targeted(StoredMessage(7, 1, bytes(MAX_WAITING // 4), 0.0, 1.0), (1,))
    for _ in range(9):
        other.bus.ring([big])
    await other.bus.flush()
    await node.bus.catch_up()
    assert node.heard[0] == "missed"
    assert other.bus.stats.dropped > 4
    assert len(node.heard) == 10 - other.bus.stats.dropped / 2  # each was dropped for both nodes


async def test_g6_what_is_heard_and_not_handed_over_is_bounded(
    process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.bus_redis.MAX_INCOMING", 100)
    node, go_on = await looking(process)
    for number in range(50):
        await node.bus.ring_nodes([node.nodes.number], [CredentialsChanged(1, (number,))])
    go_on.set()
    await node.bus.catch_up()
    assert node.heard[:2] == ["missed", "missed"]
    assert node.heard[-1] == 49
    assert len(node.heard) < 40


async def test_nothing_is_rung_after_closing(process: StartProcess) -> None:
    node = await process("n1")
    await node.bus.close()
    node.bus.ring(numbered(1))
    with pytest.raises(StoreUnavailable, match="closed"):
        await node.bus.ring_nodes(None, numbered(1))
    await node.bus.flush()
    assert node.bus.stats.rung == 0


# Servers that change


async def test_a_channel_whose_slot_moves_is_followed(cluster: Rig, start: StartProcess) -> None:
    node, other = await (await start(cluster, "n1")).listening(), await start(cluster, "n2")
    slot, masters = slot_of(of_node(node.nodes.number, "bells")), cluster.servers[:3]
    at = next(n for n in range(3) if slot < 16_384 * (n + 1) // 3)
    try:
        for key in masters[at].command("CLUSTER", "GETKEYSINSLOT", slot, 10):
            masters[at].command("DEL", key)
        give_slot(cluster, slot, (at + 1) % 3)
        await other.bus.ring_nodes([node.nodes.number], numbered(1))
        await node.bus.catch_up()
        assert node.heard[0] == "missed"  # perhaps the doorbell came, too
        node.heard.clear()
        await other.bus.ring_nodes([node.nodes.number], numbered(2))
        await node.bus.catch_up()
        assert node.heard == [0, 1]
    finally:
        cluster.flush()
        give_slot(cluster, slot, at)


@pytest.fixture
def frail_cluster() -> Iterator[Rig]:
    with cluster_of_six() as rig:
        yield rig


async def test_the_death_of_the_channels_master_is_a_gap(frail_cluster: Rig, start: StartProcess) -> None:
    node, other = await start(frail_cluster, "n1"), await start(frail_cluster, "n2")
    await node.listening()
    slot = slot_of(of_node(node.nodes.number, "bells"))
    at = next(n for n in range(3) if slot < 16_384 * (n + 1) // 3)
    frail_cluster.servers[at].stop()
    take_over(frail_cluster, at)
    await until(lambda: all(process.engine.stats.lost_connections for process in (node, other)))
    await other.bus.ring_nodes([node.nodes.number], numbered(1))
    await node.bus.catch_up()
    assert node.heard[0] == "missed"
    node.heard.clear()
    await other.bus.ring_nodes([node.nodes.number], numbered(2))
    await node.bus.catch_up()
    assert node.heard == [0, 1]


# What they carry


def broadcast(size: int) -> StoredBroadcast:
    return StoredBroadcast(MESSAGE, BitMap(range(0, 3 * size, 3)), BitMap([3]))


async def test_a_large_broadcast_is_read_by_those_who_hear_it(process: StartProcess) -> None:
    node = await (await process("n1")).listening()
    row = broadcast(100_000)

    async def read(app_id: int, msg_id: int) -> StoredBroadcast | None:
        await asyncio.sleep(0)
        return StoredBroadcast(row.message, row.targets.copy(), row.settled.copy()) if msg_id == 7 else None

    node.bus.read_broadcast = read
    await node.bus.ring_nodes(None, [Broadcast(row), Broadcast(broadcast(3))])
    await node.bus.ring_nodes(None, numbered(1))
    await node.bus.catch_up()
    large, small, last = node.heard
    assert (large.broadcast.targets, large.broadcast.settled) == (row.targets, row.settled)
    assert (told(small), last) == (told(Broadcast(broadcast(3))), 0)


async def test_a_large_broadcast_that_cannot_be_read_was_missed(process: StartProcess) -> None:
    node = await (await process("n1")).listening()

    async def read(_app_id: int, _msg_id: int) -> StoredBroadcast | None:
        raise StoreUnavailable("away")

    node.bus.read_broadcast = read
    await node.bus.ring_nodes(None, [Broadcast(broadcast(100_000))])
    await node.bus.catch_up()
    assert node.heard == ["missed"]


MESSAGES = st.builds(
    StoredMessage,
    st.integers(0, 2**53), st.integers(1, 2**31), st.binary(max_size=50), st.floats(0, 2e9), st.floats(0, 2e9),
    st.integers(0, 2**53), st.integers(0, 2**53), st.booleans(), st.integers(0, 2**53),
)  # fmt: skip
BITS = st.sets(st.integers(0, 2**32 - 1), max_size=20).map(BitMap)
DEVNOS = st.lists(st.integers(0, 2**32 - 1), max_size=5).map(tuple)
APP, ID = st.integers(1, 2**31), st.integers(1, 2**53)
DOORBELLS = st.one_of(
    st.builds(Targeted, MESSAGES, DEVNOS),
    st.builds(Broadcast, st.builds(StoredBroadcast, MESSAGES, BITS, BITS)),
    st.builds(Recalled, st.lists(st.builds(Withdrawn, APP, ID, BITS, BITS), max_size=3)),
    st.builds(CredentialsChanged, APP, st.none() | DEVNOS),
    st.builds(Taken, APP, st.integers(0, 2**32 - 1), ID, st.text(max_size=20)),
)


def told(doorbell: Any) -> Any:
    """Bitmaps of messages compare by identity."""
    match doorbell:
        case Broadcast():
            row = doorbell.broadcast
            return told(Targeted(row.message, ())), row.targets, row.settled
        case Targeted():
            message = doorbell.message
            return [getattr(message, name) for name in message.__struct_fields__], doorbell.devnos
        case Recalled():
            return [(w.app_id, w.msg_id, w.devnos, w.reached) for w in doorbell.withdrawn]
    return doorbell


@given(st.lists(st.lists(DOORBELLS, max_size=4), max_size=3))
def test_doorbells_arrive_as_they_were_rung(sequences: list[list[Doorbell]]) -> None:
    message = bells.join([bells.encode(sequence) for sequence in sequences])
    arrived = bells.decode(message)
    assert [[told(d) for d in one] for one in arrived] == [[told(d) for d in one] for one in sequences]


def test_what_a_newer_version_adds_is_passed_over() -> None:
    newer = msgspec.msgpack.encode([[[99, "?"], [bells.TAKEN, 1, 2, 3, "n1", "more"]]])
    assert bells.decode(newer) == [[Taken(1, 2, 3, "n1")]]
