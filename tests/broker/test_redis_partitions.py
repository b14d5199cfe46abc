"""Routes and inboxes by partition: what several nodes and brokers may do to them at the same time."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Mapping

import pytest
from pyroaring import BitMap

from broker.model import Claim, NodeInfo, OwedRequest, Route
from broker.redis import partitions as partitions_module
from broker.redis.keys import PARTITION, of_node, of_partition
from broker.redis.nodes import GRACE
from broker.redis.nodes import LEASE as NODE_LEASE
from broker.redis.partitions import Inbox, split
from broker.redis.scripts import load
from broker.store import StoreUnavailable
from tests.broker.redis_logs import APP, START, Broker, Clock, World, world
from tests.broker.redis_rigs import Rig

LATER = START + 3600
SPREAD = (0, 1, 63, 64, 4095, 4096, 70_000)  # devnos at the edges


@pytest.fixture
async def fleet(plain: Rig) -> AsyncIterator[World]:
    async with world(plain.url) as made:
        made.node_clock = Clock()
        yield made


@pytest.fixture
async def broker(fleet: World) -> Broker:
    return await fleet.broker()


def inboxes(gets: Mapping[int, list[int]], expires: float = LATER) -> dict[int, Inbox]:
    return {devno: Inbox([(i, expires) for i in ids], evicts=True) for devno, ids in gets.items()}


async def owed(broker: Broker, devno: int, after: int = 0, limit: int = 100) -> list[int]:
    (ids,) = await broker.partitions.owed_ids([OwedRequest(APP, devno, after, limit)])
    return ids


async def dies(fleet: World, broker: Broker, after: float = NODE_LEASE + 1) -> None:
    """Nodes that do not beat are not live any more."""
    assert fleet.node_clock is not None
    fleet.node_clock.now += after
    await broker.nodes.refresh()


def put_aside(broker: Broker) -> None:
    """The nodes that this process plays do not beat any more."""
    broker.nodes._guests.clear()


# Claims and releases


async def test_claims_of_one_turn_are_one_call_a_partition(broker: Broker) -> None:
    calls: list[str] = []

    async def note(name: str) -> None:
        calls.append(name)

    await broker.claimed(5000)
    await broker.nodes.join(NodeInfo("me"))
    await broker.claimed(5000, "me")
    broker.hold(note)
    claims = await asyncio.gather(*[broker.claimed(devno, "me") for devno in range(4000, 4200)])
    assert calls.count("routes") == 2
    assert all(claim.epoch == 1 for claim in claims)
    assert await broker.partitions.online(APP) == BitMap([*range(4000, 4200), 5000])


async def test_the_former_node_is_named_until_it_has_gone(fleet: World, broker: Broker) -> None:
    assert await broker.claimed(1, "a") == Claim(1, False)
    assert await broker.claimed(1, "a") == Claim(2, False)
    assert await broker.claimed(1, "b") == Claim(3, False, "a")
    await broker.claimed(2, "a")
    await broker.claimed(3, "a")
    put_aside(broker)
    await dies(fleet, broker)
    assert await broker.claimed(2, "c") == Claim(2, False, "a"), "it may wake up"
    await dies(fleet, broker, GRACE + 1)
    assert await broker.claimed(3, "d") == Claim(2, False)


async def test_a_former_node_that_joined_a_moment_ago_is_named(fleet: World) -> None:
    one, two = await fleet.broker(), await fleet.broker()
    await two.claimed(9, "two")
    await one.nodes.join(NodeInfo("one"))
    await one.claimed(1, "one")
    assert (await two.claimed(1, "two")).former == "one", "its table is a second old"


async def test_a_claim_whose_answer_was_lost_names_the_former_node(broker: Broker) -> None:
    """It is made again, and the first time has written it down."""
    await broker.claimed(1, "a")
    await broker.claimed(2, "b")
    lose = True

    async def once(name: str) -> None:
        nonlocal lose
        if name == "after routes" and lose:
            lose = False
            raise StoreUnavailable("the connection ended")

    broker.hold(once)
    claim = await broker.claimed(1, "b")
    assert not lose
    assert (claim.epoch, claim.former) == (3, "a")


async def test_two_claims_of_a_device_in_a_call_that_comes_twice_keep_their_epochs(broker: Broker) -> None:
    """Else the first connection, which is over, releases the route of the second one."""
    packed = struct.pack(">BHIIBHIIBHII", 1, 7, 1, 0, 1, 8, 1, 0, 1, 7, 1, 0)

    async def call() -> list[int]:
        key = of_partition(APP, 0, "routes")
        answer: bytes = await broker.engine.call(load("routes"), (key,), (packed, "a", 1))
        return [epoch for epoch, _, _ in struct.iter_unpack(">IIB", answer)]

    assert await call() == [1, 1, 2]
    assert await call() == [1, 1, 2]


async def test_a_copy_of_a_claim_that_comes_late_takes_no_device_back(broker: Broker) -> None:
    """Its connection broke, the claim was made again, and the device has moved on since."""
    key = of_partition(APP, 0, "routes")
    claim = struct.pack(">BHII", 1, 7, 1, 0)

    async def call(caller: str, number: int, node: int = 1) -> tuple[int, int, int]:
        packed = claim if node == 1 else struct.pack(">BHII", 1, 7, node, 0)
        answer: bytes = await broker.engine.call(load("routes"), (key,), (packed, caller, number))
        return struct.unpack(">IIB", answer)

    assert await call("a", 2) == (1, 0, 0)
    assert await call("a", 2) == (1, 0, 0), "the answer was lost"
    assert await call("b", 1, 2) == (2, 1, 0)
    assert await call("a", 2) == (1, 0, 0), "older than what the other node has"
    assert await call("a", 1) == (0, 0, 0), "a copy that comes late"
    assert await broker.engine.run("GETRANGE", key, 12 * 7, 12 * 7 + 7) == struct.pack(">II", 2, 2)
    assert await call("a", 3) == (3, 2, 0)


async def test_claims_are_tried_again_until_redis_is_back_and_done_is_called_once(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions_module, "RETRY", (0.0, 0.0))
    failures = 5
    done: list[Claim] = []

    async def away(name: str) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise StoreUnavailable(name)

    broker.hold(away)
    broker.partitions.claim_route(APP, 1, "node", done.append)
    second = asyncio.ensure_future(broker.claimed(2, "node"))
    await second
    assert failures == 0
    assert [claim.epoch for claim in done] == [1]


async def test_a_caller_that_fails_does_not_keep_others_from_their_claims(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(claim: Claim) -> None:
        raise ValueError("a broken session")

    broker.partitions.claim_route(APP, 1, "node", fail)
    assert (await broker.claimed(2, "node")).epoch == 1
    assert "a broken session" in caplog.text


async def test_what_is_made_in_one_turn_happens_in_its_order(broker: Broker) -> None:
    first = await broker.claimed(1)
    broker.partitions.release_route(APP, 1, first.epoch, START)
    again = asyncio.ensure_future(broker.claimed(1))
    await asyncio.sleep(0)
    broker.partitions.release_route(APP, 1, first.epoch, START + 5)
    claim = await again
    assert await broker.partitions.online(APP) == BitMap([1]), "the old epoch releases nothing"
    assert await broker.partitions.last_seen(APP, [1]) == {1: START}
    broker.partitions.release_route(APP, 1, claim.epoch, START + 9)
    assert not await broker.partitions.online(APP)
    assert await broker.partitions.last_seen(APP, [1, 2]) == {1: START + 9}


async def test_releases_are_sent_before_the_partitions_close(fleet: World, broker: Broker) -> None:
    claim = await broker.claimed(1)
    broker.partitions.release_route(APP, 1, claim.epoch, START)
    await broker.partitions.close()
    other = await fleet.broker()
    assert not await other.partitions.online(APP)


async def test_a_release_that_never_comes_through_is_given_up(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(partitions_module, "RETRY", (0.0, 0.0))
    claim = await broker.claimed(1)
    tries, last = 0, asyncio.Event()

    async def away(name: str) -> None:
        nonlocal tries
        tries += 1
        if tries > partitions_module.RELEASE_TRIES:
            last.set()
        raise StoreUnavailable(name)

    broker.hold(away)
    broker.partitions.release_route(APP, 1, claim.epoch, START)
    await last.wait()
    broker.hold(None)
    await broker.partitions.close()
    assert "1 routes were not released" in caplog.text
    assert await broker.partitions.online(APP) == BitMap([1])


# Who is where


async def test_online_and_routes_at_the_edges_of_partitions(broker: Broker) -> None:
    for devno in SPREAD:
        await broker.claimed(devno, f"node-{devno % 2}")
    assert await broker.partitions.online(APP) == BitMap(SPREAD)
    asked = BitMap([0, 2, 63, 4096, 5000, 1 << 20])
    assert await broker.partitions.online(APP, asked) == BitMap([0, 63, 4096])
    assert not await broker.partitions.online(APP + 1)
    many = BitMap(range(3, 20_000)) | BitMap([70_000, 80_000])
    assert await broker.partitions.online(APP, many) == BitMap([63, 64, 4095, 4096, 70_000])
    routes = await broker.partitions.find_routes(APP, [63, 4096, 5])
    assert routes == {63: Route("node-1", 1), 4096: Route("node-0", 1)}


async def test_inspecting_tells_what_was_taken_and_who_is_owed(broker: Broker) -> None:
    epochs = {devno: (await broker.claimed(devno, "a")).epoch for devno in SPREAD}
    await broker.claimed(64, "b")
    broker.partitions.release_route(APP, 4095, epochs[4095], START)
    await broker.partitions.put(APP, inboxes({1: [7], 70_000: [8], 5: [9]}), 100)
    check = await broker.partitions.inspect_routes(APP, {**epochs, 9: 1})
    assert check.lost == BitMap([64, 4095, 9])
    assert check.owing == BitMap([1, 70_000])


async def test_a_route_of_another_node_is_lost_whatever_its_epoch_is(broker: Broker) -> None:
    """A failover may have lost a claim, so that an epoch came twice."""
    claim = await broker.claimed(1, "a")
    await broker.nodes.join(NodeInfo("b"))
    mine = await broker.claimed(2, "b")
    check = await broker.partitions.inspect_routes(APP, {1: claim.epoch, 2: mine.epoch})
    assert check.lost == BitMap([1])


async def test_s9_routes_do_not_outlive_the_lease_and_are_there_again_when_the_node_comes_back(
    fleet: World, broker: Broker
) -> None:
    node = await fleet.broker()
    await node.nodes.join(NodeInfo("n"))
    claim = await node.claimed(1, "n")
    await dies(fleet, broker)
    assert not await broker.partitions.online(APP)
    assert await broker.partitions.find_routes(APP, [1]) == {1: Route("", 1)}
    assert await broker.partitions.expire(START, 100) == 0, "it may come back"
    await node.nodes.beat(NodeInfo("n"))
    await broker.nodes.refresh()
    assert await broker.partitions.online(APP) == BitMap([1])
    assert not (await node.partitions.inspect_routes(APP, {1: claim.epoch})).lost


async def test_routes_of_the_dead_are_erased_a_slice_at_a_time_and_no_others(
    fleet: World, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions_module, "REAPED_AT_ONCE", 4)
    node = await fleet.broker()
    await node.nodes.join(NodeInfo("dead"))
    epochs = {devno: (await node.claimed(devno, "dead")).epoch for devno in (*range(10), *SPREAD[3:])}
    await broker.nodes.join(NodeInfo("live"))
    await broker.claimed(3, "live")
    await broker.claimed(100, "live")
    await dies(fleet, broker, NODE_LEASE + 1)
    await broker.nodes.beat(NodeInfo("live"))
    await dies(fleet, broker, GRACE + 1)
    await broker.nodes.beat(NodeInfo("live"))
    await broker.nodes.refresh()
    assert node.nodes.number in broker.nodes.dead()
    counts = []
    while (count := await broker.partitions.expire(START, 4)) > 0:
        counts.append(count)
    assert sum(counts) == 13
    assert len(counts) > 1
    check = await broker.partitions.inspect_routes(APP, epochs)
    assert check.lost == BitMap(epochs), "a node that was dead for long has none of its routes"
    assert await broker.partitions.online(APP) == BitMap([3, 100])
    assert not await broker.engine.run("EXISTS", of_node(node.nodes.number, "apps"))
    (counted,) = (await broker.engine.run("HGETALL", of_partition(APP, 0, "nodes")))[1::2]
    assert counted == b"2"
    assert (await broker.claimed(5, "live")).epoch == 2, "epochs go on"


# Inboxes


async def test_nothing_is_put_twice_or_late(broker: Broker) -> None:
    await broker.partitions.put(APP, inboxes({1: [5, 9], 2: [9]}), 100)
    await broker.partitions.take_out(APP, {1: [5]})
    await broker.partitions.put(APP, inboxes({1: [5, 9], 2: [9], 3: [7]}), 100)  # a spreader that slept
    assert [await owed(broker, devno) for devno in (1, 2, 3)] == [[9], [9], []]
    await broker.partitions.put(APP, inboxes({1: [5, 9, 12], 5000: [5]}), 100)
    assert [await owed(broker, devno) for devno in (1, 5000)] == [[9, 12], [5]]


async def test_ids_are_compared_as_numbers(broker: Broker) -> None:
    """Also where a byte of theirs would sort otherwise as a text, and up to the greatest there is."""
    ids = [255, 256, 0xFFFF, 0x10000, 0xC3A9_0000, 0xC3A9_00FF, (1 << 53) - 1]
    for msg_id in ids:
        await broker.partitions.put(APP, inboxes({1: [msg_id]}), 100)
    assert await owed(broker, 1) == ids
    for place, msg_id in enumerate(ids):
        assert await owed(broker, 1, after=msg_id) == ids[place + 1 :]
    assert await owed(broker, 1, after=256, limit=2) == ids[2:4]


async def test_s8_the_newest_n_stay_and_what_goes_waits_to_be_recorded(broker: Broker) -> None:
    await broker.partitions.put(APP, inboxes({1: [1, 2, 3]}), 3)
    first = await broker.partitions.put(APP, inboxes({1: [4, 5], 4095: [5]}), 3)
    assert await owed(broker, 1) == [3, 4, 5]
    (eviction,) = first.evictions
    assert (eviction.at, eviction.dropped) == (START, [(1, 1), (2, 1)])
    again = await broker.partitions.put(APP, inboxes({1: [4, 5], 4095: [5]}), 3)
    assert again.evictions == first.evictions, "a spreader died before it was recorded"
    second = await broker.partitions.put(APP, inboxes({1: [6]}), 3)
    assert [one.dropped for one in second.evictions] == [[(1, 1), (2, 1)], [(3, 1)]]
    await broker.partitions.recorded(APP, first.evictions)
    left = await broker.partitions.put(APP, inboxes({1: [6]}), 3)
    assert [one.dropped for one in left.evictions] == [[(3, 1)]]


async def test_s8_who_has_a_live_route_loses_nothing(fleet: World, broker: Broker) -> None:
    for devno in (1, 5000):
        await broker.claimed(devno, "n")
    put = await broker.partitions.put(APP, inboxes({1: [1, 2, 3], 5000: [1, 2, 3]}), 2)
    assert (await owed(broker, 1), put.evictions) == ([1, 2, 3], [])
    put_aside(broker)
    await dies(fleet, broker)
    put = await broker.partitions.put(APP, inboxes({1: [4], 5000: [1]}), 2)
    assert put.routes.keys() == {1, 5000}, "should it wake up, it hears that it missed something"
    assert sorted(one.dropped for one in put.evictions) == [[(1, 1), (2, 1)], [(1, 5000)]]
    assert [await owed(broker, devno) for devno in (1, 5000)] == [[3, 4], [2, 3]]


async def test_s8_whoever_connects_meanwhile_loses_nothing(fleet: World, broker: Broker) -> None:
    """Its node was dead when that was looked up; then it is at another one."""
    await broker.claimed(1, "n")
    put_aside(broker)
    await dies(fleet, broker)
    other = await fleet.broker()

    async def moves(name: str) -> None:
        if name == "evict":
            await other.claimed(1, "m")

    broker.hold(moves)
    put = await broker.partitions.put(APP, inboxes({1: [1, 2, 3]}), 2)
    assert put.evictions == []
    assert await owed(broker, 1) == [1, 2, 3]


async def test_what_takes_nobodys_place_evicts_nothing(broker: Broker) -> None:
    quiet = {1: Inbox([(i, LATER) for i in (1, 2, 3)], evicts=False)}
    assert (await broker.partitions.put(APP, quiet, 2)).evictions == []
    assert await owed(broker, 1) == [1, 2, 3]


async def test_expired_ones_are_not_evicted_but_go(fleet: World, broker: Broker) -> None:
    await broker.partitions.put(APP, inboxes({1: [1, 2]}, START + 10), 2)
    fleet.clock.now += 10
    put = await broker.partitions.put(APP, inboxes({1: [3, 4]}), 2)
    assert put.evictions == []
    assert await owed(broker, 1) == [3, 4]
    await broker.partitions.put(APP, inboxes({2: [5]}, START + 20), 2)
    fleet.clock.now = START + 20 + partitions_module.EXPIRED_GRACE
    assert (await broker.claimed(2)).may_owe
    assert await owed(broker, 2) == []
    assert not (await broker.claimed(2)).may_owe, "it was taken out when it was looked at"


async def test_what_is_not_kept_is_only_asked_where_it_goes(broker: Broker) -> None:
    await broker.claimed(1, "n")
    only = {1: Inbox([(7, 0.0)], evicts=False), 2: Inbox([(7, 0.0)], evicts=False)}
    put = await broker.partitions.put(APP, only, 0)
    assert put.routes == {1: await broker.nodes.ensure("n")}
    assert await owed(broker, 1) == []
    await broker.partitions.put(APP, inboxes({1: [6]}), 5)
    assert await owed(broker, 1) == [6]


async def test_many_devices_of_a_partition_at_once(broker: Broker) -> None:
    await asyncio.gather(*[broker.claimed(devno, "n") for devno in range(0, 1000, 3)])
    put = await broker.partitions.put(APP, inboxes({devno: [1] for devno in range(1000)}), 5)
    assert put.routes.keys() == set(range(0, 1000, 3))
    pages = await broker.partitions.owed_ids([OwedRequest(APP, devno, 0, 5) for devno in range(1001)])
    assert pages == [[1]] * 1000 + [[]]


async def test_a_node_takes_nothing_out_that_is_another_ones(fleet: World, broker: Broker) -> None:
    await broker.claimed(1, "old")
    await broker.claimed(2, "old")
    old = await broker.nodes.ensure("old")
    await broker.claimed(2, "new")
    await broker.partitions.put(APP, inboxes({1: [5, 6], 2: [5], 3: [5], 5000: [5]}), 10)
    messages = {1: [5], 2: [5], 3: [5], 5000: [4, 5]}
    assert await broker.partitions.take_out(APP, messages, old) == BitMap([2])
    assert [await owed(broker, devno) for devno in (1, 2, 3, 5000)] == [[6], [5], [], []]
    put_aside(broker)
    await dies(fleet, broker)
    assert not await broker.partitions.take_out(APP, {2: [5]}, old), "nobody lives who has it"
    assert await owed(broker, 2) == []
    assert not (await broker.claimed(2)).may_owe


async def test_s7_apps_do_not_see_each_other(broker: Broker) -> None:
    await broker.partitions.put(APP, inboxes({1: [5]}), 10)
    await broker.partitions.put(APP + 1, inboxes({1: [6], 2: [6]}), 10)
    await broker.partitions.take_out(APP + 1, {1: [5]})
    requests = [OwedRequest(app, devno, 0, 9) for app in (APP, APP + 1) for devno in (1, 2)]
    assert await broker.partitions.owed_ids(requests) == [[5], [], [6], [6]]


@pytest.mark.parametrize("seed", range(5))
async def test_inboxes_are_what_a_simple_model_says(fleet: World, broker: Broker, seed: int) -> None:
    dice = random.Random(seed)
    devnos = [0, 1, 63, 64, 4095, 4096]
    model: dict[int, list[int]] = {devno: [] for devno in devnos}
    evicted: dict[int, list[int]] = {devno: [] for devno in devnos}
    last = 0
    routed: dict[int, int] = {}
    earlier: list[dict[int, list[int]]] = []
    for _ in range(120):
        match dice.randrange(5):
            case 0 | 1:
                gets: dict[int, list[int]] = {}
                for _ in range(dice.randrange(1, 6)):
                    last += dice.randrange(1, 300)
                    for devno in dice.sample(devnos, 2):
                        gets.setdefault(devno, []).append(last)
                        model[devno].append(last)
                for devno in gets:
                    if devno not in routed:
                        surplus = max(len(model[devno]) - 4, 0)
                        evicted[devno] += model[devno][:surplus]
                        del model[devno][:surplus]
                earlier.append(gets)
                put = await broker.partitions.put(APP, inboxes(gets), 4)
                await broker.partitions.recorded(APP, put.evictions)
                assert put.routes.keys() == gets.keys() & routed.keys()
                for msg_id, devno in (one for e in put.evictions for one in e.dropped):
                    evicted[devno].remove(msg_id)
                assert not any(evicted.values())
            case 2 if earlier:  # a spreader that slept: only who is not routed any more may lose something
                gets = dice.choice(earlier)
                if gets.keys() <= routed.keys() or all(len(model[devno]) <= 4 for devno in gets):
                    assert (await broker.partitions.put(APP, inboxes(gets), 4)).evictions == []
            case 3:
                devno = dice.choice(devnos)
                gone = dice.sample(model[devno], min(len(model[devno]), 2))
                model[devno] = [i for i in model[devno] if i not in gone]
                await broker.partitions.take_out(APP, {devno: [*gone, 10**12]})
            case 4:
                devno = dice.choice(devnos)
                if devno in routed:
                    broker.partitions.release_route(APP, devno, routed.pop(devno), START)
                else:
                    claim = await broker.claimed(devno)
                    routed[devno] = claim.epoch
                    assert claim.may_owe == bool(model[devno])
        assert [await owed(broker, devno) for devno in devnos] == [model[devno] for devno in devnos]
        assert await broker.partitions.online(APP) == BitMap(list(routed))


async def test_purging_leaves_nothing(broker: Broker) -> None:
    for devno in SPREAD:
        await broker.claimed(devno)
    await broker.partitions.put(APP, inboxes({devno: [1, 2, 3] for devno in SPREAD}), 2)
    await broker.claimed(1, "other")
    while await broker.partitions.purge(APP, range(1), 10):
        pass
    assert await broker.engine.run("KEYS", f"{{{APP}*") == []
    assert (await broker.claimed(1)).epoch == 1


def test_devnos_are_split_by_partition_in_their_order() -> None:
    assert split({PARTITION: 0, 5: 0, 3: 0, 3 * PARTITION - 1: 0}) == {0: [3, 5], 1: [4096], 2: [12287]}
    assert split(BitMap([7, 4097])) == {0: [7], 1: [4097]}


def test_times_fit_into_32_bits() -> None:
    seconds = partitions_module._seconds
    assert [seconds(at) for at in (-1.0, 0.0, 1.5, START, 1e12, float("inf"))] == [
        0,
        0,
        1,
        int(START),
        0xFFFF_FFFF,
        0xFFFF_FFFF,
    ]
