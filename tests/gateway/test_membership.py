"""A node among others: it joins, beats and leaves, and asks before it trusts what it knew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from math import inf
from typing import Final

import pytest

import gateway.membership
from broker.metrics import Metrics
from broker.model import NodeInfo
from broker.nodes_local import OneNode
from broker.store import Conflict, StoreUnavailable
from gateway.membership import Membership
from tests.gateway.fleet_world import LEASE, SharedNodes, Table
from tests.gateway.world import World

NAME: Final = "node-1"


class Bench:
    def __init__(self) -> None:
        self.table = Table()
        self.nodes = SharedNodes(self.table)
        self.connections = 0
        self.looks = 0  # begun
        self.look = asyncio.Event()  # they may end
        self.look.set()
        self.look_fails = 0
        self.wishes: list[str] = []
        self.membership = self.new(self.nodes)

    def new(self, nodes: SharedNodes) -> Membership:
        membership = Membership(nodes, self.info, Metrics(), now=lambda: self.table.now)
        membership.watch(lapsed=self.lapsed, wished=self.wishes.append)
        return membership

    def info(self) -> NodeInfo:
        return NodeInfo(NAME, connections=self.connections)

    async def lapsed(self) -> None:
        self.looks += 1
        await self.look.wait()
        if self.look_fails:
            self.look_fails -= 1
            raise StoreUnavailable("away")


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(gateway.membership, "BEAT", 3600)  # a story beats itself
    bench = Bench()
    await bench.membership.join()
    yield bench
    bench.look.set()
    await bench.membership.leave()


async def test_a_name_belongs_to_one_live_node(bench: Bench) -> None:
    second = bench.new(SharedNodes(bench.table))
    with pytest.raises(Conflict):
        await second.join()
    bench.table.now += LEASE + 1
    await second.join()
    assert bench.table.entries[NAME].number == 2
    await second.leave()


async def test_a_beat_says_how_the_node_is(bench: Bench) -> None:
    bench.connections = 7
    bench.table.now += 1
    await bench.membership.beat()
    entry = bench.table.entries[NAME]
    assert (entry.info.connections, entry.beaten_at) == (7, bench.table.now)


async def test_a_node_beats_by_itself_and_goes_on_when_beats_fail(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gateway.membership, "BEAT", 0)
    bench = Bench()
    await bench.membership.join()
    bench.nodes.away = 3
    await World.when(lambda: bench.nodes.beats > 2 and not bench.nodes.away)
    assert bench.membership._failed.value == 3
    assert "beat failed: away" in caplog.text
    await bench.membership.leave()


async def test_nothing_is_looked_up_while_the_lease_holds(bench: Bench) -> None:
    bench.table.now += LEASE
    await bench.membership.certain()
    assert (bench.nodes.beats, bench.looks) == (0, 0)


async def test_a_process_that_slept_longer_than_its_lease_asks_first(bench: Bench) -> None:
    bench.table.now += LEASE + 0.1
    await bench.membership.certain()
    assert (bench.nodes.beats, bench.looks) == (1, 1)
    await bench.membership.certain()
    assert (bench.nodes.beats, bench.looks) == (1, 1)


async def test_a_lease_that_ran_out_by_the_stores_clock_is_enough(bench: Bench) -> None:
    """Machines may be stopped together with their clocks."""
    entry = bench.table.entries[NAME]
    del bench.table.entries[NAME]
    bench.table.entries[NAME] = type(entry)(entry.info, entry.number, bench.table.now - 2 * LEASE, True)
    await bench.membership.beat()
    await bench.membership.certain()
    assert bench.looks == 1


async def test_while_the_store_is_away_nothing_is_certain(bench: Bench) -> None:
    bench.table.now += LEASE + 0.1
    bench.nodes.away = 1
    with pytest.raises(StoreUnavailable):
        await bench.membership.certain()
    bench.look_fails = 1
    with pytest.raises(StoreUnavailable):
        await bench.membership.certain()
    await bench.membership.certain()
    assert bench.looks == 2


async def test_who_asks_while_it_is_looked_up_waits_for_that(bench: Bench) -> None:
    bench.look.clear()
    bench.table.now += LEASE + 0.1
    first = asyncio.create_task(bench.membership.certain())
    await World.when(lambda: bench.looks)
    second = asyncio.create_task(bench.membership.certain())
    await World.turns()
    assert not second.done()
    bench.look.set()
    await asyncio.gather(first, second)
    assert bench.looks == 1


async def test_beats_go_on_while_it_is_looked_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.membership.leave()
    monkeypatch.setattr(gateway.membership, "BEAT", 0)
    bench.table.now += LEASE + 1
    bench.look.clear()
    bench.look_fails = 1
    await bench.membership.join()
    bench.table.now += LEASE + 1
    await World.when(lambda: bench.looks)
    beats = bench.nodes.beats
    await World.when(lambda: bench.nodes.beats > beats + 2)
    bench.look.set()
    await World.when(lambda: bench.looks == 2)  # the first one failed
    assert "away" in caplog.text


async def test_a_wish_is_told_once(bench: Bench) -> None:
    for wish in ("drain", "drain", "resume", "rebalance:30:1", "rebalance:30:2"):
        await bench.nodes.wish(NAME, wish)
        await bench.membership.beat()
    assert bench.wishes == ["drain", "resume", "rebalance:30:1", "rebalance:30:2"]


async def test_the_lease_is_given_back_and_that_may_fail(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.nodes.away = 1
    await bench.membership.leave()
    assert "runs out by itself" in caplog.text
    await bench.membership.leave()  # nothing to do


async def test_the_only_process_of_an_installation_is_always_certain() -> None:
    membership = Membership(OneNode(), lambda: NodeInfo(NAME), Metrics(), now=lambda: 0.0)
    assert membership.alone
    await membership.certain()
    await membership.join()
    assert membership._left() == inf
    await membership.certain()
    await membership.leave()
