from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from broker.model import Beat, NodeInfo
from broker.redis.engine import Engine
from broker.redis.nodes import GRACE, LEASE, MEMORY, RedisNodes
from broker.store import Conflict
from tests.broker.redis_rigs import Rig
from tests.broker.store_contract import Clock

FIRST, SECOND = NodeInfo("n1", address="a:1"), NodeInfo("n2", "gateway", pid=7)
BROKER = NodeInfo("b1", "broker")


@pytest.fixture
async def engine(plain: Rig) -> AsyncIterator[Engine]:
    engine = Engine(plain.url)
    await engine.open()
    yield engine
    await engine.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def nodes(engine: Engine, clock: Clock) -> RedisNodes:
    return RedisNodes(engine, clock)


@pytest.fixture
async def others(engine: Engine, clock: Clock) -> RedisNodes:
    return RedisNodes(engine, clock)


async def test_numbers_are_never_given_again(nodes: RedisNodes, others: RedisNodes) -> None:
    await nodes.join(FIRST)
    await others.join(SECOND)
    assert (nodes.number, others.number, nodes.mine()) == (1, 2, 1)
    await nodes.leave()
    assert nodes.number == 0
    await nodes.join(FIRST)
    assert nodes.number == 3


async def test_everybody_sees_who_is_there(nodes: RedisNodes, others: RedisNodes) -> None:
    await nodes.join(FIRST)
    await others.join(SECOND)
    await nodes.refresh()
    assert [entry.info for entry in await nodes.list()] == [FIRST, SECOND]
    assert sorted(nodes.live) == [1, 2]
    assert (nodes.name_of(2), nodes.number_of("n2"), nodes.number_of("?"), nodes.name_of(9)) == (
        "n2",
        2,
        0,
        "",
    )
    await others.leave()
    await nodes.refresh()
    assert not nodes.is_live(2)
    assert [entry.info.name for entry in await nodes.list()] == ["n1"]


async def test_brokers_hold_no_devices(nodes: RedisNodes, others: RedisNodes) -> None:
    await nodes.join(FIRST)
    await others.join(BROKER)
    await nodes.refresh()
    assert nodes.gateways() == [1]


async def test_a_name_is_taken_as_long_as_its_node_lives(
    nodes: RedisNodes, others: RedisNodes, clock: Clock
) -> None:
    await nodes.join(FIRST)
    clock.now += LEASE
    with pytest.raises(Conflict, match="n1"):
        await others.join(FIRST)
    clock.now += 1
    await others.join(FIRST)
    assert others.number == 2
    with pytest.raises(Conflict, match="n1"):  # the one that slept finds its name taken
        await nodes.beat(FIRST)


async def test_a_node_that_was_away_for_a_while_has_its_number_again(
    nodes: RedisNodes, others: RedisNodes, clock: Clock
) -> None:
    await nodes.join(FIRST)
    clock.now += LEASE + 1
    await others.refresh()
    assert others.name_of(1) == "n1"
    assert not others.is_live(1)
    assert [entry.live for entry in await others.list()] == [False]
    clock.now += GRACE - 1
    assert others.number_of("n1") == 1
    assert await nodes.beat(FIRST) == Beat(True, "")
    assert await nodes.beat(FIRST) == Beat(False, "")
    await others.refresh()
    assert others.is_live(1)


async def test_a_node_that_was_away_for_too_long_is_a_new_one(
    nodes: RedisNodes, others: RedisNodes, clock: Clock
) -> None:
    heard: list[int] = []
    nodes.on_number = heard.append
    await nodes.join(FIRST)
    clock.now += LEASE + 1
    await others.refresh()
    assert others.dead() == []
    assert others.gateways() == others.everybody() == [1]  # it may wake up, so it is rung
    assert others.may_hear(1)
    clock.now += GRACE
    assert await others.refresh()
    assert others.dead() == [1]
    assert others.gateways() == others.everybody() == []
    assert not others.may_hear(1)
    assert await nodes.beat(FIRST) == Beat(True, "")
    assert nodes.number == 2
    assert heard == [1, 2]


async def test_after_redis_was_away_nobody_is_dead_before_the_grace_is_over(
    nodes: RedisNodes, others: RedisNodes, clock: Clock
) -> None:
    await nodes.join(FIRST)
    await others.join(SECOND)
    clock.now += 10 * MEMORY
    assert (await others.beat(SECOND)).lapsed
    assert others.dead() == []
    assert await nodes.beat(FIRST) == Beat(True, "")
    assert nodes.number == 1


async def test_routes_of_a_node_that_left_may_go_at_once(nodes: RedisNodes, others: RedisNodes) -> None:
    await nodes.join(FIRST)
    await nodes.leave()
    await others.refresh()
    assert others.dead() == [1]


async def test_the_dead_are_forgotten(nodes: RedisNodes, others: RedisNodes, clock: Clock) -> None:
    await nodes.join(FIRST)
    clock.now += LEASE + 1
    await others.refresh()
    clock.now += MEMORY + 1
    assert await others.list() == []
    assert others.dead() == []
    assert not others.is_live(1)


async def test_the_operators_wish_comes_with_the_next_beat(nodes: RedisNodes, others: RedisNodes) -> None:
    await nodes.join(FIRST)
    assert not await others.wish("n2", "drain")
    assert await others.wish("n1", "drain")
    assert await nodes.beat(FIRST) == Beat(False, "drain")
    assert [entry.wish for entry in await others.list()] == ["drain"]
    await others.wish("n1", "")
    assert await nodes.beat(FIRST) == Beat(False, "")


async def test_a_node_that_starts_anew_has_no_wish(nodes: RedisNodes, others: RedisNodes) -> None:
    await nodes.join(FIRST)
    await others.wish("n1", "drain")
    await nodes.leave()
    await nodes.join(FIRST)
    assert await nodes.beat(FIRST) == Beat(False, "")


async def test_a_number_that_is_newer_than_our_look_lives(nodes: RedisNodes, others: RedisNodes) -> None:
    await nodes.join(FIRST)
    await others.join(SECOND)
    assert 2 not in nodes.live
    assert nodes.is_live(2)
    assert not nodes.is_live(0)


async def test_beats_change_the_table_only_when_something_is_new(
    nodes: RedisNodes, others: RedisNodes
) -> None:
    await nodes.join(FIRST)
    await others.refresh()
    await nodes.beat(replace(FIRST, connections=5))
    assert not await others.refresh()
    assert [entry.info.connections for entry in await others.list()] == [5]
    await nodes.beat(replace(FIRST, draining=True))
    assert await others.refresh()
    assert others.live[1].info.draining


async def test_a_process_that_never_joined_plays_the_nodes_it_is_asked_for(
    nodes: RedisNodes, others: RedisNodes
) -> None:
    assert await nodes.ensure("x") == 1
    assert await nodes.ensure("x") == 1
    assert await nodes.ensure("y") == 2
    await nodes.join(FIRST)
    assert await nodes.ensure("n1") == 3
    await others.refresh()
    assert sorted(others.live) == [1, 2, 3]
    await nodes.close()
    await others.refresh()
    assert sorted(others.live) == []
    assert others.dead() == [1, 2, 3]


async def test_leases_run_by_the_clock_of_redis(engine: Engine) -> None:
    nodes, others = RedisNodes(engine), RedisNodes(engine)
    await nodes.join(FIRST)
    await others.open()
    seconds, _ = await engine.run("TIME")
    assert abs(others.live[1].beaten_at - int(seconds)) < 5
    await nodes.close()
    await others.close()
