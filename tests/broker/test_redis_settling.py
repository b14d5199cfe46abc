"""What becomes of messages on Redis: rows, entries, folds, receipts, and when they are over."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from broker.bitmaps import encode_bits
from broker.bus import Doorbell
from broker.model import Callback, DeliveryState, NewMessage, RecordChange, Settled
from broker.redis.fates import (
    ENTRY,
    KINDS,
    SUM,
    Fate,
    entry,
    read_entry,
    read_fate,
    read_settled,
    read_single_fate,
)
from broker.redis.rows import LIVE, Row, Rows, decode_row, encode_row, row_of
from broker.settlements import States
from tests.broker.redis_rigs import Rig
from tests.broker.redis_world import APP, HOUR, World
from tests.broker.store_contract import Clock

MakeWorld = Callable[[], Awaitable[World]]
ZERO = 1_800_000_000.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def make_world(plain: Rig, clock: Clock) -> AsyncIterator[MakeWorld]:
    worlds: list[World] = []

    async def make() -> World:
        world = World(plain.url, clock)
        await world.open()
        worlds.append(world)
        return world

    yield make
    for world in worlds:
        await world.close()


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    return await make_world()


# Rows and entries as bytes

ROWS = [
    Row(APP, b"{}", 5, False, ZERO, ZERO + 9),
    Row(APP, b"{}", 2**32 - 1, False, ZERO, ZERO + 9, after=2**52, online=1),
    Row(APP, b"{}", encode_bits(BitMap([1, 9])), False, ZERO, ZERO + 9, "17", high=True, replaces=3),
    Row(APP, b"{}", 5, True, ZERO, ZERO + 9, collapse="k", after=1),
    Row(APP, b"{}", 5, False, ZERO, ZERO + 9, callback=Callback("https://a", ("shown",), {"n": [1]})),
    Row(
        APP, b"{}", encode_bits(BitMap(range(9))), True, ZERO, ZERO + 9, suppressed=encode_bits(BitMap([10]))
    ),
]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_comes_back_as_it_was(row: Row) -> None:
    assert decode_row(APP, encode_row(row)) == (row, b"")


@pytest.mark.parametrize("more", [{"expires_at": ZERO}, {"paced": True, "broadcast": True}])
def test_what_nobody_may_fetch_has_no_body(more: dict[str, object]) -> None:
    message = {"expires_at": ZERO + 9, "broadcast": False, "cid": "c"} | more
    row = row_of(NewMessage(APP, b"{}", BitMap([1, 2]), created_at=ZERO, **message))  # type: ignore[arg-type]
    kept, _ = decode_row(APP, encode_row(row))
    assert (kept.body, kept.cid, kept.targets) == (b"", "", row.targets)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("devnos", [[], [0], [1, 2**32 - 1], list(range(3000))])
def test_an_entry_comes_back_as_it_was(devnos: list[int], few: bool) -> None:
    one = read_entry(entry("delivered", 1.5, devnos, more=0.5, node=3, few=few))
    assert (one.step, one.at, one.more, one.node, list(one.devnos)) == ("delivered", 1.5, 0.5, 3, devnos)


ENTRIES = st.tuples(
    st.sampled_from(sorted(KINDS)),
    st.integers(0, 9000),
    st.sets(st.integers(0, 9), max_size=5),
    st.integers(0, 2),
)


def read(packed: list[bytes], summed: bytes = b"") -> Fate:
    return read_fate(BitMap(range(6)), ZERO, summed, packed)


def pack(one: tuple[str, int, set[int], int]) -> bytes:
    step, after, devnos, node = one
    more = {"delivered": ZERO + after / 2, "replaced": 7.0, "recalled": float(node)}.get(step, 0.0)
    return entry(step, ZERO + after, sorted(devnos), more=more, node=node, few=after % 2 == 0)


def shown(fate: Fate) -> tuple[object, ...]:
    """Everything that is read of it; delivered wins."""
    _, delivered, evicted, recalled, sent = fate.states
    return (
        [list(bits) for bits in (delivered, evicted - delivered, recalled - delivered, sent | delivered)],
        {event: list(bits) for event, bits in fate.receipts().items() if bits},
        fate.withdrawn_at,
        fate.replaced_by,
    )


@given(st.lists(ENTRIES, max_size=12), st.randoms(use_true_random=False))
def test_s5_entries_may_come_in_any_order_and_twice(
    entries: list[tuple[str, int, set[int], int]], dice: random.Random
) -> None:
    packed = list(map(pack, entries))
    again = packed + dice.sample(packed, len(packed) // 2)
    dice.shuffle(again)
    assert shown(read(again)) == shown(read(packed))


@given(st.lists(ENTRIES, max_size=14), st.data())
def test_reading_a_sum_is_reading_what_it_was_made_of(
    entries: list[tuple[str, int, set[int], int]], data: st.DataObject
) -> None:
    packed = list(map(pack, entries))
    first = data.draw(st.integers(0, len(packed)))
    fate = read(packed[first:], read(packed[:first]).encode())
    assert shown(fate)[:2] == shown(read(packed))[:2]
    assert fate.version == 1
    summed = read(packed[:first]).encode()
    _, length = SUM.unpack_from(summed)
    settled = read_settled(summed[SUM.size : SUM.size + length], packed[first:])
    assert settled & fate.states.targets == fate.states.settled  # without its steps
    for step in {key[0] for key in fate.steps}:  # nobody twice
        bits = [bits for key, bits in fate.steps.items() if key[0] == step]
        assert sum(map(len, bits)) == len(BitMap.union(BitMap(), *bits))
    assert not fate.states.settled - fate.states.targets


# One device


async def test_a_message_that_one_device_got_is_a_small_row(world: World) -> None:
    msg_id = await world.push([0], sendno="12345", cid="c" * 36)
    waiting = await world.raw(msg_id)
    await world.deliver(msg_id, [0], node="n1", sent_at=world.clock() - 0.25)
    row = await world.raw(msg_id)
    assert waiting is not None
    assert row is not None
    assert not row[0] & LIVE
    assert b"message" in waiting
    assert b"message" not in row
    assert len(row) < 80
    assert await world.owed(0) == []
    assert await world.raw(msg_id, "sum") is None
    (sent, done) = await world.reports.find_steps(APP, msg_id)
    assert (sent.step, sent.start, sent.node) == ("sent", world.clock() - 0.25, "n1")
    assert (done.step, done.start, done.node) == ("delivered", world.clock(), "n1")


@pytest.mark.parametrize(
    "order", [("evicted", "delivered"), ("delivered", "evicted"), ("recalled", "delivered")]
)
async def test_s4_delivered_wins_whatever_comes_first(world: World, order: tuple[str, str]) -> None:
    msg_id = await world.push([0])
    for step in order:
        await world.settling.record({(APP, msg_id): [entry(step, world.clock(), [0])]}, [])
    assert await world.counts(msg_id) == {"delivered": 1}
    assert [step.step for step in await world.reports.find_steps(APP, msg_id)] == ["delivered"]


async def test_an_entry_counts_once_and_only_for_the_target(world: World) -> None:
    msg_id = await world.push([5])
    before = await world.raw(msg_id)
    await world.settling.record({(APP, msg_id): [entry("shown", 1.0, [4]), entry("sent", 1.0, range(5))]}, [])
    await world.settling.record({(APP, msg_id): [entry("delivered", 1.0, [5], few=False)]}, [])
    assert await world.raw(msg_id) == before
    for at in (1.0, 2.0):
        await world.deliver(msg_id, [4, 5], at=at)
    row = await world.raw(msg_id)
    assert row is not None
    assert decode_row(APP, row)[1] == ENTRY.pack(b"d", 1.0, 0.0, 0)


async def test_when_it_was_sent_is_kept_with_the_delivery(world: World) -> None:
    msg_id = await world.push([5])
    await world.settling.settle([Settled(APP, msg_id, False, sent=[5], at=3.0, node="n1")])
    assert (await world.record(msg_id)).sent == BitMap([5])
    await world.deliver(msg_id, [5], at=9.0, sent_at=8.0, node="n2")
    await world.settling.settle([Settled(APP, msg_id, False, sent=[5], at=10.0, node="n1")])
    steps = [(step.step, step.start, step.node) for step in await world.reports.find_steps(APP, msg_id)]
    assert steps == [("sent", 3.0, "n2"), ("delivered", 9.0, "n2")]


async def test_receipts_of_one_device_are_in_its_row(world: World) -> None:
    msg_id = await world.push([5])
    for devno, event, at in ((5, "shown", 1.0), (4, "shown", 2.0), (5, "shown", 3.0), (5, "clicked", 4.0)):
        await world.receive(msg_id, devno, event, world.clock() + at)
    record = await world.record(msg_id)
    assert record.receipts == {"shown": BitMap([5]), "clicked": BitMap([5])}
    steps = {step.step: (step.start, step.width) for step in await world.reports.find_steps(APP, msg_id)}
    assert steps == {"shown": (world.clock() + 1, 1), "clicked": (world.clock() + 4, 1)}
    assert await world.owed(5) == [msg_id]


# Many devices


async def test_a_long_list_is_folded_by_whoever_made_it_long(world: World) -> None:
    msg_id = await world.push(range(300), broadcast=True)
    for devno in range(200):
        await world.deliver(msg_id, [devno], broadcast=True, at=world.clock() + devno / 10, node="n1")
    length = await world.engine.run("LLEN", f"{{{APP}/{msg_id}}}:log")
    assert length < 64
    assert await world.counts(msg_id) == {"delivered": 200, "pending": 100}
    steps = await world.reports.find_steps(APP, msg_id)
    assert sum(len(step.devnos) for step in steps) == 200
    assert len(steps) == 20


async def test_of_two_that_fold_at_once_one_does(make_world: MakeWorld) -> None:
    one, two = await make_world(), await make_world()
    msg_id = await one.push(range(100), broadcast=True)
    for devno in range(0, 40, 2):
        await asyncio.gather(
            one.deliver(msg_id, [devno], broadcast=True), two.deliver(msg_id, [devno + 1], broadcast=True)
        )
    seen_one, seen_two = [(await w.rows.look(APP, [msg_id]))[msg_id] for w in (one, two)]
    await one.deliver(msg_id, [50], broadcast=True)
    await asyncio.gather(one.rows.fold(seen_one, finished=False), two.rows.fold(seen_two, finished=False))
    for devno in range(51, 99):  # as many again
        await one.deliver(msg_id, [devno], broadcast=True)
    await one.rows.fold(seen_one, finished=False)  # its answer was lost: again
    assert await one.engine.run("LLEN", f"{{{APP}/{msg_id}}}:log") == 49
    assert await two.counts(msg_id) == {"delivered": 89, "pending": 11}


async def test_a_broadcast_is_live_until_nobody_waits_and_then_has_no_body(world: World) -> None:
    msg_id = await world.push(range(10), broadcast=True)
    await world.deliver(msg_id, range(9), broadcast=True)
    (live,) = await world.reports.live_broadcasts(APP)
    assert (live.message.msg_id, list(live.targets - live.settled)) == (msg_id, [9])
    await world.deliver(msg_id, [9], broadcast=True)
    assert await world.reports.live_broadcasts(APP) == []
    row = await world.raw(msg_id)
    assert row is not None
    assert b"message" not in row
    assert await world.engine.run("ZCARD", f"{{{APP}}}:live") == 0
    assert await world.counts(msg_id) == {"delivered": 10}


async def test_what_is_still_in_the_log_is_waited_for_and_in_the_answer(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its doorbell may have been rung and lost already: an entry leaves the log afterwards."""
    one, two = await make_world(), await make_world()
    older = await one.push(range(3), broadcast=True)
    ringing, go_on = asyncio.Event(), asyncio.Event()

    async def ring(numbers: Sequence[int] | None, doorbells: Sequence[Doorbell]) -> None:
        del numbers, doorbells
        ringing.set()
        await go_on.wait()

    monkeypatch.setattr(one, "ring_nodes", ring)
    pushing = asyncio.ensure_future(one.push(range(3), broadcast=True))
    await ringing.wait()
    assert await one.engine.run("LLEN", f"{{{APP}}}:log") == 1
    asking = [asyncio.ensure_future(world.reports.live_broadcasts(APP)) for world in (one, two)]
    mine = await asking[0]  # who spreads knows that the row and the inboxes are there
    go_on.set()
    newer, others = await pushing, await asking[1]
    for live in (mine, others):
        assert [row.message.msg_id for row in live] == [older, newer]


async def test_a_broadcast_is_live_once_what_is_older_is_in_the_inboxes(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that hears of it sends it at once; what an inbox gets afterwards would come out of order (G3)."""
    one, two = await make_world(), await make_world()
    putting, go_on, put = asyncio.Event(), asyncio.Event(), one.partitions.put

    async def held(*arguments: Any) -> Any:
        putting.set()
        await go_on.wait()
        return await put(*arguments)

    monkeypatch.setattr(one.partitions, "put", held)
    messages = [one.message([1]), one.message(range(3), broadcast=True)]
    pushing = asyncio.ensure_future(one.append(*messages))
    await putting.wait()
    asking = asyncio.ensure_future(two.reports.live_broadcasts(APP))
    for _ in range(10):
        await two.engine.run("PING")
    early = asking.done()
    go_on.set()
    assert not early
    older, newer = [appended.msg_id for appended in await pushing]
    assert [row.message.msg_id for row in await asking] == [newer]
    assert await two.owed(1) == [older]


async def test_everything_of_a_message_lapses_with_its_row(world: World) -> None:
    msg_id = await world.push(range(10), broadcast=True)
    await world.deliver(msg_id, range(10), broadcast=True)
    await world.settling.fold(APP, msg_id)
    await world.receive(msg_id, 1, "shown", world.clock())
    keys = [f"{{{APP}/{msg_id}}}:{what}" for what in ("row", "log", "sum")]
    row, *others = await asyncio.gather(*[world.engine.run("PTTL", key) for key in keys])
    assert row > 29 * 86_400_000
    assert all(abs(row - other) < 1000 for other in others)


async def test_another_apps_settlement_reaches_nothing(world: World) -> None:
    msg_id = await world.push([0])
    await world.settling.settle([Settled(APP + 1, msg_id, False, [0]), Settled(APP, 17, False, [0])])
    assert await world.counts(msg_id) == {"pending": 1}
    assert await world.owed(0) == [msg_id]


async def test_what_a_doorbell_only_names_is_read_with_its_body(world: World) -> None:
    msg_id = await world.push(range(100), broadcast=True, ttl=0)
    found = await world.reports.read_broadcast(APP, msg_id)
    assert found is not None
    assert (found.message.body, len(found.targets), len(found.settled)) == (b'{"message":{}}', 100, 0)
    assert await world.reports.live_broadcasts(APP) == []
    assert await world.reports.read_broadcast(APP, msg_id + 1) is None
    world.clock.now += 600  # type: ignore[attr-defined]
    assert await world.expire() == 1
    assert b"message" not in (await world.raw(msg_id) or b"message")


async def test_what_gathered_while_redis_was_away_is_recorded_in_slices(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.redis.settling.SETTLED_AT_ONCE", 7)
    monkeypatch.setattr("broker.redis.settling.AT_ONCE", 5)
    monkeypatch.setattr("broker.redis.engine.MAX_CALLS", 20)
    wide = await world.push(range(40), broadcast=True)
    ids = [await world.push([n]) for n in range(40)]
    await world.settling.settle(
        [Settled(APP, msg_id, False, [n], at=float(n)) for n, msg_id in enumerate(ids)]
        + [Settled(APP, wide, True, [n], at=float(n)) for n in range(40)]
    )
    monkeypatch.undo()
    assert await world.counts(wide) == {"delivered": 40}
    records = await world.reports.find_messages(APP, ids)
    assert [list(record.delivered) for record in records.values()] == [[n] for n in range(40)]


async def test_many_receipts_fold_too(world: World) -> None:
    msg_id = await world.push(range(200), broadcast=True)
    for devno in range(200):
        await world.receive(msg_id, devno % 150, "shown", world.clock() + devno)
    record = await world.record(msg_id)
    assert record.receipts == {"shown": BitMap(range(150))}
    assert await world.engine.run("LLEN", f"{{{APP}/{msg_id}}}:log") < 64
    assert await world.counts(msg_id) == {"pending": 200}


# Who holds the device


async def test_g5_what_another_node_has_meanwhile_is_left_in_its_inbox(world: World) -> None:
    future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    world.partitions.claim_route(APP, 0, "newer", future.set_result)
    await future
    await world.nodes.refresh()
    msg_id = await world.push([0, 1])
    await world.deliver(msg_id, [0, 1], node="older")
    assert [await world.owed(devno) for devno in (0, 1)] == [[msg_id], []]
    await world.deliver(msg_id, [0], node="newer")
    assert await world.owed(0) == []


async def test_a_crash_before_the_inbox_is_cleared_costs_a_repeat_at_most(world: World) -> None:
    several = await world.push([0, 1])
    (one,) = [await world.push([0])]
    entries = {(APP, i): [entry("delivered", world.clock(), [0])] for i in (several, one)}
    await world.settling.record(entries, [])  # and no further
    assert await world.counts(several) == {"delivered": 1, "pending": 1}
    world.rows = Rows(world.engine, world.clock, 30 * 86_400.0, world.endings)  # another process
    assert await world.owed(0) == [several]
    await world.deliver(several, [0])
    assert await world.owed(0) == []


# Over


async def test_what_is_over_loses_its_body_and_its_place_in_the_inbox(world: World) -> None:
    ids = [
        await world.push([0]),
        await world.push([0, 1]),
        await world.push(range(5), broadcast=True),
    ]
    await world.deliver(ids[1], [1])
    assert await world.expire() == 0
    world.clock.now += HOUR  # type: ignore[attr-defined]
    assert await world.expire() == 3
    for msg_id in ids:
        assert b"message" not in (await world.raw(msg_id) or b"message")
    assert await world.counts(ids[1]) == {"delivered": 1, "expired": 1}
    assert await world.engine.run("ZCARD", f"{{{APP}}}:live") == 0
    assert await world.engine.run("ZCARD", "{endings}:due") == 0
    assert await world.engine.run("KEYS", "*:over:*") == []
    world.clock.now -= HOUR  # type: ignore[attr-defined]
    assert await world.partitions.owed_ids([]) == []
    await world.deliver(ids[0], [0])  # it was on its way
    assert await world.counts(ids[0]) == {"delivered": 1}


async def test_of_several_that_clean_up_each_has_places_of_its_own(make_world: MakeWorld) -> None:
    one, two = await make_world(), await make_world()
    for devno in range(50):
        await one.push([devno], ttl=600.0 * (devno % 10 + 1))
    one.clock.now += 2 * HOUR  # type: ignore[attr-defined]
    totals = await asyncio.gather(one.expire(), two.expire())
    assert sum(totals) == 50


async def test_who_dies_cleaning_up_leaves_it_to_the_next(world: World) -> None:
    msg_id = await world.push([0])
    world.clock.now += HOUR  # type: ignore[attr-defined]
    assert len(await world.endings.claim(world.clock(), 10)) == 1
    assert await world.expire() == 0
    world.clock.now += 61  # type: ignore[attr-defined]
    assert await world.expire() == 1
    assert not (await world.raw(msg_id) or b"\xff")[0] & LIVE


async def test_who_cleans_up_too_slowly_takes_nothing_that_was_not_dealt_with(world: World) -> None:
    ids = [await world.push([n]) for n in range(4)]
    world.clock.now += HOUR  # type: ignore[attr-defined]
    (place,) = await world.endings.claim(world.clock(), 10)
    seen = await world.endings.ids(place, 2)
    for _ in range(2):  # another one had it after a minute
        await world.endings.done(place, seen, world.clock())
    assert await world.endings.ids(place, 10) == ids[2:]
    assert await world.endings.claim(world.clock(), 10) == [place]


async def test_a_report_is_there_for_its_lifetime(world: World) -> None:
    msg_id = await world.push([0])
    world.clock.now += 30 * 86_400 - 1  # type: ignore[attr-defined]
    assert await world.counts(msg_id) == {"expired": 1}
    world.clock.now += 2  # type: ignore[attr-defined]
    assert await world.reports.find_messages(APP, [msg_id]) == {}
    assert await world.reports.find_steps(APP, msg_id) == []


async def test_of_a_deleted_app_nothing_is_left_that_was_waiting(world: World) -> None:
    ids = [await world.push([0]), await world.push(range(9), broadcast=True)]
    await world.deliver(ids[1], [1], broadcast=True)
    assert await world.upkeep.purge(APP, range(1), 1000) > 0
    assert await world.upkeep.purge(APP, range(1), 1000) == 0
    assert await world.engine.run("KEYS", f"{{{APP}/*") == []
    await world.push([0])
    await world.engine.run("SET", f"{{{APP}}}:deleted", 1)
    world.clock.now += HOUR  # type: ignore[attr-defined]
    assert await world.expire() == 1
    assert await world.engine.run("KEYS", f"{{{APP}/*") == []


# Taking back


async def test_taking_back_a_second_time_answers_the_same_and_changes_nothing(world: World) -> None:
    """The spreader died before it rang."""
    old = await world.push(range(10), broadcast=True, collapse="k")
    new = await world.push([3, 4], collapse="k")
    row = (await world.rows.read(APP, [new]))[new]
    for _ in range(2):
        (gone,) = await world.withdrawing.take_back(APP, new, row)
        assert (gone.msg_id, list(gone.devnos)) == (old, [3, 4])
    assert await world.counts(old) == {"recalled": 2, "pending": 8}


async def test_a_recall_that_stopped_half_way_is_finished_by_the_next(world: World) -> None:
    msg_id = await world.push([0, 1])
    await world.settling.record({(APP, msg_id): [entry("recalled", world.clock(), [0, 1])]}, [])
    assert await world.owed(0) == [msg_id]  # its body is there until somebody folds
    (gone,) = await world.recall(msg_id)
    assert not gone.devnos
    assert await world.owed(0) == await world.owed(1) == []


async def test_when_and_by_what_a_push_was_taken_back(world: World) -> None:
    first, second = await world.push([0, 1]), await world.push([0])
    later = [await world.push([0], replaces=first), await world.push([1], replaces=first)]
    record = await world.record(first)
    assert (record.replaced_by, record.withdrawn_at) == (later[0], None)
    await world.recall(second)
    world.clock.now += 5  # type: ignore[attr-defined]
    await world.recall(second)
    record = await world.record(second)
    assert (record.replaced_by, record.withdrawn_at) == (None, world.clock() - 5)


async def test_a_part_that_is_spread_after_its_whole_was_taken_back_goes_to_nobody(world: World) -> None:
    whole = await world.push(range(4), broadcast=True, paced=True)
    part = world.message([0, 1], part_of=whole)
    new = world.message([1], replaces=whole)
    replacing, released = await world.append(new, part)
    assert await world.owed(1) == [replacing.msg_id]
    assert await world.owed(0) == [released.msg_id]
    assert await world.counts(whole) == {"recalled": 1, "pending": 3}
    assert await world.counts(released.msg_id) == {"recalled": 1, "pending": 1}


async def test_many_devices_with_one_collapse_key_keep_the_newest(world: World) -> None:
    singles = [await world.push([devno], collapse="mail") for devno in range(20)]
    again = await world.push([7], collapse="mail")
    assert await world.owed(7) == [again]
    assert await world.owed(8) == [singles[8]]
    everyone = await world.push(range(3000), broadcast=True, collapse="mail")
    assert [await world.owed(devno) for devno in range(20)] == [[]] * 20
    assert await world.counts(everyone) == {"pending": 3000}
    alone = await world.push([8], collapse="other")
    assert await world.owed(8) == [alone]


async def test_a_recall_waits_until_the_push_is_spread(make_world: MakeWorld, clock: Clock) -> None:
    """Another process accepted it and was about to put it into the inboxes."""
    one, two = await make_world(), await make_world()
    lock = f"{{{APP}}}:lock"
    await one.engine.run("SET", lock, f"slow {int((clock() + 3) * 1000)}")
    msg_id = await one.push([0, 1])
    assert await two.owed(0) == []
    recalling = asyncio.create_task(two.recall(msg_id))
    finding = asyncio.create_task(two.record(msg_id))
    for _ in range(20):
        await two.engine.run("PING")
    assert not recalling.done()
    assert not finding.done()
    await one.engine.run("DEL", lock)
    (gone,) = await recalling
    assert (gone.msg_id, list(gone.devnos)) == (msg_id, [0, 1])
    assert (await finding).targets == BitMap([0, 1])
    assert await two.owed(0) == await one.owed(1) == []


async def test_a_settlement_may_come_before_the_push_is_spread(make_world: MakeWorld, clock: Clock) -> None:
    one, two = await make_world(), await make_world()
    lock = f"{{{APP}}}:lock"
    await one.engine.run("SET", lock, f"slow {int((clock() + 3) * 1000)}")
    msg_id = await one.push([0])
    settling = asyncio.create_task(two.deliver(msg_id, [0]))
    await one.engine.run("DEL", lock)
    await settling
    assert await one.counts(msg_id) == {"delivered": 1}
    assert await one.owed(0) == []


# Two processes at once


@pytest.mark.parametrize("seed", range(4))
async def test_g4_holds_whoever_settles_folds_and_recalls_at_the_same_time(
    make_world: MakeWorld, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.redis.settling.FOLD_AFTER", 4)
    dice = random.Random(seed)
    worlds = [await make_world(), await make_world()]
    devnos = range(24)
    ids: dict[int, NewMessage] = {}
    delivered: dict[int, set[int]] = {}
    recalled: dict[int, set[int]] = {}

    async def push() -> None:
        count = dice.choice((1, 1, 3, 12))
        more = {"replaces": dice.choice(sorted(ids))} if ids and dice.random() < 0.2 else {}
        message = dice.choice(worlds).message(
            dice.sample(devnos, count),
            broadcast=count == 12,
            collapse=dice.choice(("", "", "a", "b")),
            **more,
        )
        (appended,) = await dice.choice(worlds).append(message)
        await worlds[0].log.passed(APP, appended.msg_id)  # nobody gets it before
        ids[appended.msg_id] = message
        delivered[appended.msg_id] = set()

    async def settle() -> None:
        if ids:
            msg_id = dice.choice(sorted(ids))
            some = dice.sample(devnos, 3)
            delivered[msg_id].update(set(some) & set(ids[msg_id].targets))
            await dice.choice(worlds).deliver(msg_id, some, broadcast=ids[msg_id].broadcast)

    async def fold() -> None:
        if ids:
            await dice.choice(worlds).settling.fold(APP, dice.choice(sorted(ids)))

    async def recall() -> None:
        if ids:
            msg_id = dice.choice(sorted(ids))
            await dice.choice(worlds).recall(msg_id)
            recalled[msg_id] = set(ids[msg_id].targets)

    async def look() -> None:
        if ids:
            await dice.choice(worlds).counts(dice.choice(sorted(ids)))  # it adds up at every moment

    for _ in range(20):
        calls = (push, push, settle, settle, settle, fold, look, recall)
        await asyncio.gather(*[dice.choice(calls)() for _ in range(8)])
    one, two = worlds
    one.rows = two.rows = Rows(one.engine, one.clock, 30 * 86_400.0, one.endings)
    for msg_id, message in ids.items():
        record = await one.record(msg_id)
        assert record.targets == message.targets
        assert record.delivered == BitMap(delivered[msg_id])
        assert recalled.get(msg_id, set()) <= set(record.delivered | record.recalled | record.evicted)
        states = record.sets(one.clock())
        for devno in message.targets:
            waits = not message.broadcast and devno in states[DeliveryState.PENDING]
            assert (msg_id in await two.owed(devno)) == waits, (msg_id, devno)
    live = {row.message.msg_id: row for row in await one.reports.live_broadcasts(APP)}
    for msg_id, message in ids.items():
        waiting = (await one.record(msg_id)).sets(one.clock())[DeliveryState.PENDING]
        if message.broadcast:
            row = live.get(msg_id)
            assert (row.targets - row.settled if row else BitMap()) == waiting


async def test_a_whole_that_is_recalled_while_parts_are_let_go_reaches_nobody_afterwards(
    make_world: MakeWorld,
) -> None:
    one, two = await make_world(), await make_world()
    for turn in range(10):
        whole_message = one.message(range(4), broadcast=True, paced=True)
        change = RecordChange(APP, "pace", "", b"", 0, one.clock())
        (whole,) = await one.append(whole_message, changes=[change])
        key = str(whole.msg_id)

        async def release(key: str = key, whole_id: int = whole.msg_id) -> None:
            for n in range(4):
                record = await one.records.find(APP, "pace", key)
                assert record is not None
                await one.append(
                    one.message([n], part_of=whole_id),
                    changes=[RecordChange(APP, "pace", key, b"", record.version, one.clock())],
                )
                await asyncio.sleep(0)

        releasing = asyncio.create_task(release())
        for _ in range(turn):
            await asyncio.sleep(0.0005 * turn)
        await two.recall(whole.msg_id)
        await asyncio.gather(releasing, return_exceptions=True)
        await two.recall(whole.msg_id)
        for world in (one, two):
            world.rows = Rows(world.engine, world.clock, 30 * 86_400.0, world.endings)
        assert await one.counts(whole.msg_id) == {"recalled": 4}
        assert [await two.owed(devno) for devno in range(4)] == [[]] * 4


def test_states_of_one_device_are_those_of_its_entries() -> None:
    tail = struct.pack(">cddI", b"e", 5.0, 0.0, 0) + struct.pack(">cddI", b"S", ZERO + 9, 0.0, 0)
    fate = read_single_fate(3, ZERO, tail)
    assert fate.states == States(BitMap([3]), BitMap(), BitMap([3]), BitMap(), BitMap())
    assert fate.steps == {("evicted", 0, 5.0, 0.0): BitMap([3]), ("shown", 0, ZERO + 9, 1): BitMap([3])}
