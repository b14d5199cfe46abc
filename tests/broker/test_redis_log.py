"""The append log of the fleet: brokers that stop between any two steps, for ever or for a while."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from pyroaring import BitMap

from broker.bus import Broadcast, Doorbell, Recalled, Targeted
from broker.model import Callback, RecordChange
from broker.redis import entries
from broker.redis import log as log_module
from broker.redis.keys import of_app, of_message
from broker.redis.log import IDLE, INDEX
from broker.redis.spreading import LEASE
from broker.store import Conflict, StoreError, StoreFull, StoreUnavailable, UnknownMessage
from tests.broker.redis_logs import APP, HOUR, START, Broker, World, id_of, lost, message, world
from tests.broker.redis_rigs import Rig
from tests.patience import PATIENCE


@pytest.fixture
async def fleet(plain: Rig) -> AsyncIterator[World]:
    async with world(plain.url) as made:
        yield made


async def waiting(broker: Broker) -> int:
    """Entries of the log."""
    broker.hold(None)
    return int(await broker.engine.run("LLEN", of_app(APP, "log")))


async def recovered(fleet: World, broker: Broker) -> None:
    """After a lease this one finds what others left."""
    fleet.clock.now += LEASE + 1
    for _ in range(3):
        await broker.log.recover()
        await broker.log.finish()
    assert not await waiting(broker)


# One broker


async def test_a_push_is_in_the_inbox_when_its_append_returns_and_is_rung(fleet: World) -> None:
    broker = await fleet.broker()
    await broker.claimed(1)
    msg_id = await broker.push(1, 2)
    assert await broker.owed(1) == await broker.owed(2) == [msg_id]
    await broker.log.finish()
    ((node, doorbell),) = fleet.rung
    assert isinstance(doorbell, Targeted)
    assert (node, doorbell.message.msg_id, doorbell.devnos) == (
        await broker.nodes.ensure("node-1"),
        msg_id,
        (1,),
    )
    assert not await waiting(broker)
    assert broker.log.spreader.idle, "an app costs nothing when nothing happens"


async def test_nodes_hear_of_one_push_once_each(fleet: World) -> None:
    broker = await fleet.broker()
    for devno in range(20):
        await broker.claimed(devno, f"node-{devno % 2}")
    await broker.push(*range(30))
    await broker.log.finish()
    assert sorted(doorbell.devnos for _, doorbell in fleet.rung if isinstance(doorbell, Targeted)) == [
        tuple(range(0, 20, 2)),
        tuple(range(1, 20, 2)),
    ]


async def test_appends_that_come_during_a_commit_share_the_next_one(fleet: World) -> None:
    broker = await fleet.broker()
    commits, committing = 0, asyncio.Event()

    async def count(name: str) -> None:
        nonlocal commits
        if name == "commit":
            commits += 1
            committing.set()

    await broker.push(0)
    broker.hold(count)
    first = asyncio.ensure_future(broker.push(1))
    await committing.wait()
    rest = [asyncio.ensure_future(broker.push(devno)) for devno in range(2, 40)]
    ids = await asyncio.gather(first, *rest)
    assert ids == sorted(ids)
    assert commits == 2


async def test_a_group_is_bounded(fleet: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "GROUP_MESSAGES", 3)
    monkeypatch.setattr(entries, "SPREAD_ENTRIES", 2)
    broker = await fleet.broker()
    ids = await asyncio.gather(*[broker.push(5) for _ in range(10)])
    large = await broker.log.append([message(5) for _ in range(7)])
    assert await broker.owed(5) == [*ids, *[one.msg_id for one in large]]


async def test_a_full_log_refuses_and_changes_nothing(fleet: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "MAX_LOG", 2)
    broker = await fleet.broker()
    dead = await fleet.broker()
    dead.hold(failing("put", 100))
    kept = [await dead.push(1) for _ in range(2)]
    with pytest.raises(StoreFull, match="2 pushes wait"):
        await dead.push(1)
    await recovered(fleet, broker)
    assert await broker.owed(1) == kept
    await broker.push(1)


async def test_messages_of_two_apps_are_no_append(fleet: World) -> None:
    broker = await fleet.broker()
    with pytest.raises(ValueError, match="one app"):
        await broker.log.append([message(1)], [RecordChange(APP + 1, "k", "a", b"", 0)])


async def test_a_deleted_app_takes_no_push(fleet: World) -> None:
    broker = await fleet.broker()
    await broker.engine.run("SET", of_app(APP, "deleted"), 1)
    with pytest.raises(StoreError, match="deleted"):
        await broker.push(1)


async def test_what_must_not_wait_is_rung_and_not_kept(fleet: World) -> None:
    broker = await fleet.broker()
    await broker.claimed(1)
    now = await broker.push(1, 2, ttl=0)
    everyone = await broker.push(1, 2, ttl=0, broadcast=True)
    await broker.push(1, 2, paced=True)
    await broker.log.finish()
    assert await broker.owed(1) == []
    assert [id_of(doorbell) for _, doorbell in fleet.rung] == [now, everyone]
    assert await broker.engine.run("ZCARD", of_app(APP, "live")) == 0
    assert len(await broker.engine.run("KEYS", "*:row")) == 3


async def test_a_row_names_the_lasting_broadcast_before_it(fleet: World) -> None:
    broker = await fleet.broker()
    await broker.push(1)
    kinds = [{"broadcast": True}, {}, {"broadcast": True, "ttl": 0.0}, {}]
    answers = await broker.log.append([message(1, **kind) for kind in kinds])
    later = await broker.push(1)
    await broker.log.finish()
    ids = [answer.msg_id for answer in answers]
    found = await broker.log._rows.read(APP, [*ids, later])
    assert [found[i].after for i in (*ids, later)] == [0, ids[0], ids[0], ids[0], ids[0]]
    assert await broker.engine.run("ZRANGE", of_app(APP, "live"), 0, -1) == [b"%d" % ids[0]]


async def test_bells_keep_the_order_of_the_ids(fleet: World) -> None:
    broker = await fleet.broker()
    await broker.claimed(1, "a")
    await broker.claimed(2, "b")
    kinds = [(1,), (2,), (), (1, 2), (), (), (1,)]
    await broker.log.append([message(*(some or (1, 2)), broadcast=not some) for some in kinds])
    await broker.log.finish()
    for node, count in (("a", 6), ("b", 5)):
        number = await broker.nodes.ensure(node)
        heard = [id_of(doorbell) for to, doorbell in fleet.rung if to in (None, number)]
        assert heard == sorted(heard)
        assert len(heard) == count


async def test_rings_that_do_not_come_through_hold_nothing_up(fleet: World) -> None:
    broker = await fleet.broker()
    await broker.claimed(1)
    broker.bell.gate = lost
    ids = [await broker.push(1) for _ in range(3)]
    await broker.log.finish()
    assert not await waiting(broker)
    assert await broker.owed(1) == ids


async def test_what_is_taken_back_comes_with_the_answer_and_is_rung_first(fleet: World) -> None:
    broker = await fleet.broker()
    await broker.claimed(1)
    answers = await broker.log.append([message(1, collapse="k") for _ in range(3)])
    await broker.log.finish()
    ids = [answer.msg_id for answer in answers]
    assert [[gone.msg_id for gone in answer.withdrawn] for answer in answers] == [[], ids[:1], ids[:2]]
    assert await broker.owed(1) == ids[2:]
    assert [type(doorbell) for _, doorbell in fleet.rung] == [
        Targeted,
        Recalled,
        Targeted,
        Recalled,
        Targeted,
    ]


async def test_an_unknown_message_is_not_replaced(fleet: World) -> None:
    broker = await fleet.broker()
    for unknown in (17, 1 << 52):
        with pytest.raises(UnknownMessage, match=str(unknown)):
            await broker.push(1, replaces=unknown)
    old = await broker.push(1)
    await broker.push(1, replaces=old)


async def test_what_a_push_replaces_may_still_be_in_the_log(fleet: World) -> None:
    """And be spread by this very process."""
    broker, other = await fleet.broker(), await fleet.broker()
    asleep, awake = asyncio.Event(), asyncio.Event()

    async def at_put(name: str) -> None:
        if name == "put":
            asleep.set()
            await awake.wait()

    broker.hold(at_put)
    first = asyncio.ensure_future(broker.push(2))
    await asleep.wait()
    old = await other.push(1)
    replaces = asyncio.ensure_future(broker.push(1, replaces=old))
    awake.set()
    assert await asyncio.wait_for(replaces, PATIENCE) > old > await first


async def test_the_suppressed_of_a_push_with_a_callback_are_recorded(fleet: World) -> None:
    broker = await fleet.broker()
    msg_id = await broker.push(1, suppressed=BitMap([2]), callback=Callback("https://example.org"))
    assert await broker.engine.run("EXISTS", of_message(APP, msg_id, "suppressed"))


async def test_online_is_counted_when_a_push_is_accepted(fleet: World) -> None:
    broker, other = await fleet.broker(), await fleet.broker()
    await broker.claimed(1)
    await broker.claimed(5000)
    known = await broker.push(1, 2, 5000)
    other.hold(failing("online"))
    broker_died = await other.push(1, 2)
    await recovered(fleet, broker)
    rows = await broker.log._rows.read(APP, [known, broker_died])
    assert (rows[known].online, rows[broker_died].online) == (2, 1)


async def test_expired_ones_do_not_use_up_a_page(fleet: World) -> None:
    broker = await fleet.broker()
    ids = [await broker.push(1, ttl=10 + place % 2 * 0.5) for place in range(6)]
    late = await broker.push(1)
    fleet.clock.now += 10.2  # half of them: in a second that is not over
    assert await broker.owed(1, limit=2) == ids[1::2][:2]
    fleet.clock.now += 0.4
    assert await broker.owed(1, limit=1) == [late]


# Cids and records


async def test_s6_of_two_brokers_one_stores_a_cid(fleet: World) -> None:
    brokers = [await fleet.broker() for _ in range(3)]
    answers = await asyncio.gather(
        *[b.log.append([message(1, cid="c", sendno=f"n {i}")]) for i, b in enumerate(brokers * 5)]
    )
    first = {answer.msg_id for (answer,) in answers}
    assert len(first) == 1
    assert sum(not answer.repeated for (answer,) in answers) == 1
    assert len({answer.sendno for (answer,) in answers}) == 1
    assert await brokers[0].owed(1) == list(first)
    found = await brokers[1].log.find_cids(APP, ["c", "other"])
    assert {cid: one.msg_id for cid, one in found.items()} == {"c": next(iter(first))}


async def test_s12_under_contention_one_wins_each_round(fleet: World) -> None:
    brokers = [await fleet.broker() for _ in range(3)]
    for version in range(10):
        change = RecordChange(APP, "pace", "p", b"%d" % version, version, START + version)
        results = await asyncio.gather(
            *[b.push(1, changes=[change]) for b in brokers], return_exceptions=True
        )
        assert sum(isinstance(result, int) for result in results) == 1
        assert sum(isinstance(result, Conflict) for result in results) == 2
    for broker in brokers:
        await broker.log.finish()
    assert len(await brokers[0].owed(1)) == 10
    record = await brokers[0].records.find(APP, "pace", "p")
    assert record is not None
    assert record.version == 10


async def test_s12_a_commit_whose_answer_was_lost_is_made_once(fleet: World) -> None:
    """The engine repeats the call, with its token."""
    broker = await fleet.broker()
    inner, calls = broker.engine._engine.call, 0

    def twice(script, keys, arguments=()):  # type: ignore[no-untyped-def]
        nonlocal calls
        if script.name == "commit":
            calls += 1
            inner(script, keys, arguments)
        return inner(script, keys, arguments)

    broker.engine._engine.call = twice  # type: ignore[method-assign]
    change = RecordChange(APP, "pace", "", b"", 0)
    ids = [await broker.push(1, changes=[change]) for _ in range(3)]
    await broker.log.finish()
    assert calls >= 3
    assert await broker.owed(1) == ids
    assert await broker.records.count(APP, "pace") == 3


# Holders that stop


def only_until(last: str, times: int = 1) -> Callable[[str], Awaitable[None]]:
    """The process dies when it is about to make this call for the n-th time: nothing comes through any more."""
    left = times

    async def gate(name: str) -> None:
        nonlocal left
        left -= name == last
        if left <= 0:
            raise StoreUnavailable(f"{name}: dead")

    return gate


def failing(name: str, times: int = 1) -> Callable[[str], Awaitable[None]]:
    """Redis is away for so many of these calls."""
    left = times

    async def gate(call: str) -> None:
        nonlocal left
        if call == name and left:
            left -= 1
            raise StoreUnavailable(f"{name}: away")

    return gate


@dataclass
class Stopping:
    """Stops a process at its n-th step: for ever, or until `go`."""

    step: int
    names: list[str] = field(default_factory=list)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event | None = None

    async def __call__(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) > self.step:
            self.stopped.set()
            if self.go is None:
                raise StoreUnavailable(f"{name}: dead")
            await self.go.wait()


async def _pushes(broker: Broker) -> list[list[int]]:
    """Some of every kind, by targets."""
    answers = await broker.log.append(
        [
            message(1),
            message(1, 2, 5000, collapse="k"),
            message(1, 2, broadcast=True),
            message(1, 2, collapse="k"),
            message(3, ttl=0),
            *[message(4) for _ in range(6)],
        ]
    )
    ids = [answer.msg_id for answer in answers]
    return [[1, *ids[:1], *ids[3:4]], [2, *ids[3:4]], [5000, *ids[1:2]], [4, *ids[-4:]]]


STEPS = 60  # more than a spreading has: the last ones find a process that was not stopped


@pytest.mark.parametrize("first", range(0, STEPS, 10))
async def test_a_holder_that_dies_at_any_step_leaves_nothing_undone(plain: Rig, first: int) -> None:
    for step in range(first, first + 10):
        plain.flush()
        async with world(plain.url) as fleet:
            fleet.limit = 4
            dying, other = await fleet.broker(), await fleet.broker()
            await other.claimed(1)
            await other.push(1)
            await other.log.finish()
            (before,) = await other.owed(1)
            dying.hold(gate := Stopping(step))
            try:
                expected = await asyncio.wait_for(_pushes(dying), PATIENCE)
            except StoreUnavailable:
                expected = []
            await dying.log.finish()
            await recovered(fleet, other)
            if not expected and not any(id_of(bell) > before for _, bell in fleet.rung):
                found = [await other.owed(devno) for devno in range(6)]
                assert found == [[], [before], [], [], [], []]
                continue  # it was not committed
            assert "commit" in gate.names
            found = {devno: await other.owed(devno) for devno in (1, 2, 5000, 4)}
            for devno, *ids in expected:
                assert found[devno] == ([before] if devno == 1 else []) + ids, (step, gate.names[step:])
            assert [len(ids) for ids in found.values()] == [3, 1, 1, 4]
            dropped = await other.engine.run("KEYS", "*:evicted")
            assert len(dropped) == 2, "recorded, and forgotten by the partition"
            rung = [id_of(bell) for _, bell in fleet.rung if id_of(bell)]
            firsts = list(dict.fromkeys(rung))
            assert firsts == sorted(firsts)
            assert len(firsts) == 5  # before, 1, collapse k, broadcast, k once more; nobody else has a route


@pytest.mark.parametrize("first", range(0, STEPS, 10))
async def test_a_holder_that_sleeps_and_goes_on_does_nothing_twice_and_nothing_late(
    plain: Rig, first: int
) -> None:
    for step in range(first, first + 10):
        plain.flush()
        async with world(plain.url) as fleet:
            sleeping, other = await fleet.broker(), await fleet.broker()
            await other.claimed(1)
            await other.push(1)
            await other.log.finish()
            sleeping.hold(gate := Stopping(step, go=asyncio.Event()))
            assert gate.go is not None
            pushes = asyncio.ensure_future(_pushes(sleeping))
            stopped = asyncio.ensure_future(gate.stopped.wait())
            await asyncio.wait((pushes, stopped), return_when=asyncio.FIRST_COMPLETED)
            await recovered(fleet, other)
            newer = [await other.push(devno) for devno in (1, 2, 5000, 4)]
            await other.log.finish()
            seen = {devno: await other.owed(devno) for devno in (1, 2, 5000, 4)}
            done = {devno: [i for i in seen[devno] if i not in newer] for devno in (1, 2, 5000)}
            await other.partitions.take_out(APP, done)  # their devices got everything but the last
            gate.go.set()
            await pushes
            await sleeping.log.finish()
            stopped.cancel()
            sleeping.hold(None)
            await recovered(fleet, other)
            for devno, newest in zip((1, 2, 5000), newer[:3], strict=True):
                left = await other.owed(devno)
                late = [i for i in left if i not in seen[devno]]
                assert newest in left, step
                assert set(left) - set(late) == {newest}, (step, "what was delivered has come back")
                assert late == [] or min(late) > newest, (step, "an older one became visible later")
            assert await waiting(other) == 0
            rung = [id_of(bell) for _, bell in fleet.rung if id_of(bell)]
            firsts = list(dict.fromkeys(rung))
            assert firsts == sorted(firsts), step


async def test_a_step_that_is_made_twice_lets_nothing_go_twice(fleet: World) -> None:
    """Its answer was lost, and the engine repeated it."""
    dead, other = await fleet.broker(), await fleet.broker()
    dead.hold(failing("put", 100))
    ids = [await dead.push(1) for _ in range(3)]
    fleet.clock.now += LEASE + 1
    entries = await other.log.spreader.take(APP, "x.1", [], acquire=True)
    assert [entry.msg_id for entry in entries] == ids
    for _ in range(2):
        left = await other.log.spreader.take(APP, "x.1", entries[:1])
        assert [entry.msg_id for entry in left] == ids[1:]
    assert await other.log.spreader.take(APP, "x.2", [], acquire=True) is None, "another one has the lock"
    assert await other.log.spreader.take(APP, "x.2", left) is None
    assert await waiting(other) == 2
    fleet.clock.now += LEASE + 1
    assert len(await other.log.spreader.take(APP, "x.2", [], acquire=True)) == 2
    assert await other.log.spreader.take(APP, "x.1", left) is None, "it lost the lock, and stops"
    assert await waiting(other) == 2
    assert await other.log.spreader.take(APP, "x.2", left) is None
    assert await other.log.spreader.take(APP, "x.2", left) is None, "made twice where the log is empty"


async def test_the_lock_is_free_when_the_log_is_empty(fleet: World) -> None:
    brokers = [await fleet.broker() for _ in range(2)]
    for _ in range(5):
        for broker in brokers:
            await broker.push(1)
            await broker.log.finish()
            assert not await broker.engine.run("EXISTS", of_app(APP, "lock"))


async def test_whoever_stopped_because_redis_was_away_goes_on_with_its_next_push(fleet: World) -> None:
    broker = await fleet.broker()
    broker.hold(failing("put"))
    first = await broker.push(1)
    await broker.log.finish()
    assert await waiting(broker) == 1
    second = await broker.push(1)
    assert await broker.owed(1) == [first, second], "its lock runs still, and is its own"


async def test_an_append_does_not_wait_for_another_process(fleet: World) -> None:
    """It is accepted; its device gets it when the other one has it spread."""
    holder, other = await fleet.broker(), await fleet.broker()
    asleep, awake = asyncio.Event(), asyncio.Event()

    async def at_put(name: str) -> None:
        if name == "put":
            asleep.set()
            await awake.wait()

    holder.hold(at_put)
    first = asyncio.ensure_future(holder.push(1))
    await asleep.wait()
    second = await other.push(1)
    assert await other.owed(1) == []
    passed = asyncio.ensure_future(other.log.passed(APP, second))
    await asyncio.sleep(0)
    assert not passed.done()
    awake.set()
    await passed
    assert await other.owed(1) == [await first, second]
    await other.log.passed(APP, second + 1)  # nobody knows it: there is nothing to wait for


async def test_who_does_not_spread_waits_when_the_log_is_long(
    fleet: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "BACKLOG", 3)
    holder, other = await fleet.broker(), await fleet.broker()
    asleep, awake = asyncio.Event(), asyncio.Event()

    async def at_put(name: str) -> None:
        if name == "put":
            asleep.set()
            await awake.wait()

    holder.hold(at_put)
    first = asyncio.ensure_future(holder.push(1))
    await asleep.wait()
    for _ in range(3):
        await other.push(1)
    waits = asyncio.ensure_future(other.push(1))
    looked = asyncio.Event()

    async def look(name: str) -> None:
        if name == "after log_front":
            looked.set()

    other.hold(look)
    await looked.wait()
    assert not waits.done()
    awake.set()
    last = await waits
    assert last > await first
    assert (await other.owed(1))[-1] == last, "it is spread when its append returns"


async def test_whoever_waits_for_a_push_of_a_dead_holder_spreads_it(fleet: World) -> None:
    dead, other = await fleet.broker(), await fleet.broker()
    dead.hold(only_until("put"))
    msg_id = await dead.push(1)
    await dead.log.finish()
    fleet.clock.now += LEASE + 1
    await other.log.passed(APP, msg_id)
    assert await other.owed(1) == [msg_id]


async def test_a_fetch_waits_for_the_row_of_what_it_found(fleet: World) -> None:
    """Row and inbox are written at the same time."""
    dead, other = await fleet.broker(), await fleet.broker()
    dead.hold(failing("SET"))
    msg_id = await dead.push(1)
    await dead.log.finish()
    fleet.clock.now += LEASE + 1
    assert await other.owed(1) == [msg_id]


# The index of logs


async def test_an_idle_app_leaves_the_index_and_comes_back_with_its_next_push(fleet: World) -> None:
    broker, other = await fleet.broker(), await fleet.broker()
    await broker.push(1)
    await broker.log.finish()
    assert await broker.engine.run("ZCARD", INDEX) == 1
    await other.log.recover()
    assert await broker.engine.run("ZCARD", INDEX) == 1, "it may go on pushing"
    fleet.clock.now += IDLE
    await other.log.recover()
    assert await broker.engine.run("ZCARD", INDEX) == 0
    await broker.push(1)
    assert await broker.engine.run("ZCARD", INDEX) == 1


@pytest.mark.parametrize("sleeps_at", ["commit", "ZADD"])
async def test_a_log_is_never_outside_the_index(fleet: World, sleeps_at: str) -> None:
    """A broker that slept between the index and its commit, and then dies, is found all the same."""
    broker, other, sweeper = [await fleet.broker() for _ in range(3)]
    awake, asleep, calls = asyncio.Event(), asyncio.Event(), 0

    async def gate(name: str) -> None:
        nonlocal calls
        calls += name == sleeps_at
        if name == "put":
            raise StoreUnavailable("dead")
        if name == sleeps_at and calls == (2 if sleeps_at == "commit" else 1):
            asleep.set()
            await awake.wait()

    broker.hold(gate)
    push = asyncio.ensure_future(broker.push(1))
    await asleep.wait()
    for _ in range(2):
        await other.push(2)
        await other.log.finish()
        fleet.clock.now += IDLE + 1
        await sweeper.log.recover()
        assert await other.engine.run("ZCARD", INDEX) == 0
    awake.set()
    msg_id = await push
    await broker.log.finish()
    await recovered(fleet, sweeper)
    assert await sweeper.owed(1) == [msg_id]


async def test_a_sweeper_that_slept_removes_no_newer_entry(fleet: World) -> None:
    sweeper, broker = await fleet.broker(), await fleet.broker()
    await broker.push(1)
    await broker.log.finish()
    fleet.clock.now += IDLE
    awake, asleep = asyncio.Event(), asyncio.Event()

    async def gate(name: str) -> None:
        if name == "unindex":
            asleep.set()
            await awake.wait()

    sweeper.hold(gate)
    sweeping = asyncio.ensure_future(sweeper.log.recover())
    await asleep.wait()
    await broker.push(1)
    awake.set()
    await sweeping
    assert await broker.engine.run("ZCARD", INDEX) == 1


async def test_a_turn_of_recovery_is_bounded(fleet: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "LOOKS", 16)
    broker, looks = await fleet.broker(), 0
    await broker.engine.run("ZADD", INDEX, *[word for app in range(100, 200) for word in (1, app)])

    async def count(name: str) -> None:
        nonlocal looks
        looks += name == "log_look"

    broker.hold(count)
    await broker.log.recover()
    assert looks == 16
    for _ in range(200):
        await broker.log.recover()
    assert await broker.engine.run("ZCARD", INDEX) == 0


async def test_purging_leaves_nothing(fleet: World) -> None:
    broker = await fleet.broker()
    await broker.push(1, broadcast=True)
    await broker.log.finish()
    await broker.log.purge(APP, range(1), 100)
    assert await broker.engine.run("KEYS", f"{{{APP}}}:[hl]*") == []


# Everything at once


@dataclass
class Chaos:
    """Several brokers at once, each with delays, lost calls and lost answers, and sleeps in which the lease ends."""

    fleet: World
    dice: random.Random
    bells_lost: bool = False

    def gate(self) -> Callable[[str], Awaitable[None]]:
        async def pass_(name: str) -> None:
            roll = self.dice.random()
            for _ in range(int(roll * 4)):
                await asyncio.sleep(0)
            if roll < 0.01:
                self.bells_lost = self.bells_lost or name == "ring"
                raise StoreUnavailable(f"{name}: lost")
            if roll < 0.03:
                self.fleet.clock.now += LEASE + 1  # everybody thinks this one dead
                for _ in range(self.dice.randrange(200)):
                    await asyncio.sleep(0)

        return pass_


@pytest.mark.parametrize("seed", range(12))
async def test_nothing_is_lost_nothing_comes_twice_and_ids_grow_for_each_device(
    fleet: World, seed: int
) -> None:
    await brokers_at_once(fleet, seed)


@pytest.mark.parametrize("seed", range(100, 103))
async def test_nor_in_a_cluster(cluster: Rig, seed: int) -> None:
    async with world(cluster.url) as fleet:
        await brokers_at_once(fleet, seed)


async def brokers_at_once(fleet: World, seed: int) -> None:
    dice = random.Random(seed)
    chaos = Chaos(fleet, dice)
    brokers = [await fleet.broker() for _ in range(3)]
    reader = await fleet.broker()
    devnos = [*range(6), 5000, 9000]
    for devno in devnos[::2]:
        await reader.claimed(devno)
    for broker in brokers:
        broker.hold(chaos.gate())
    accepted: dict[int, list[int]] = {}
    unknown: list[list[int]] = []
    seen: dict[int, list[int]] = {devno: [] for devno in devnos}
    running = True

    async def push(broker: Broker) -> None:
        for _ in range(15):
            calls = [dice.sample(devnos, dice.choice((1, 1, 2, 4))) for _ in range(dice.randrange(1, 4))]
            try:
                answers = await broker.log.append([message(*targets) for targets in calls])
            except StoreUnavailable:
                unknown.extend(calls)
                continue
            accepted.update((a.msg_id, targets) for a, targets in zip(answers, calls, strict=True))

    async def read() -> None:
        """A device gets what is there, in order, and acknowledges some of it."""
        while running:
            devno = dice.choice(devnos)
            after = seen[devno][-1] if seen[devno] else 0
            page = await reader.owed(devno, limit=5)
            old = [i for i in page if i <= after and i not in seen[devno]]
            assert not old, f"device {devno} has seen {after}, and now {old} appeared"
            seen[devno] += [i for i in page if i > after]
            await reader.partitions.take_out(APP, {devno: page[: dice.randrange(6)]})
            await asyncio.sleep(0)

    reading = asyncio.ensure_future(read())
    await asyncio.gather(*[push(broker) for broker in brokers], *[push(broker) for broker in brokers])
    for broker in brokers:
        broker.hold(None)
        await broker.log.finish()
    await recovered(fleet, reader)
    running = False
    await reading
    for devno in devnos:
        seen[devno] += await reader.owed(devno, after=seen[devno][-1] if seen[devno] else 0)
        assert seen[devno] == sorted(set(seen[devno]))
        certain = sorted(i for i, targets in accepted.items() if devno in targets)
        assert [i for i in seen[devno] if i in accepted] == certain
        more = len(seen[devno]) - len(certain)
        assert more <= sum(devno in targets for targets in unknown)
    check_bells(fleet.rung, chaos.bells_lost, accepted, set(devnos[::2]))


def check_bells(
    rung: list[tuple[int | None, Doorbell]], some_lost: bool, accepted: dict[int, list[int]], routed: set[int]
) -> None:
    firsts = list(dict.fromkeys(id_of(doorbell) for _, doorbell in rung))
    if some_lost:
        return
    assert firsts == sorted(firsts)
    for msg_id, targets in accepted.items():
        devnos = {
            devno
            for _, bell in rung
            if isinstance(bell, Targeted) and bell.message.msg_id == msg_id
            for devno in bell.devnos
        }
        assert devnos == set(targets) & routed


async def test_recovery_runs_by_itself(fleet: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "RECOVER", 0.01)
    dead, other = await fleet.broker(), await fleet.broker()
    dead.hold(only_until("put"))
    msg_id = await dead.push(1)
    await dead.log.finish()
    fleet.clock.now += LEASE + 1
    taken = asyncio.Event()

    async def note(name: str) -> None:
        if name == "after take":
            taken.set()

    other.hold(note)
    await other.log.open()
    await asyncio.wait_for(taken.wait(), PATIENCE)
    await other.log.finish()
    assert await other.owed(1) == [msg_id]


async def test_broadcasts_are_rung_at_all_nodes_with_their_targets(fleet: World) -> None:
    broker = await fleet.broker()
    msg_id = await broker.push(1, 2, 70_000, broadcast=True)
    await broker.log.finish()
    ((node, doorbell),) = fleet.rung
    assert node is None
    assert isinstance(doorbell, Broadcast)
    assert doorbell.broadcast.message.msg_id == msg_id
    assert list(doorbell.broadcast.targets) == [1, 2, 70_000]
    assert doorbell.broadcast.message.expires_at == START + HOUR
