"""Callbacks of a fleet: what is told, once as far as it can be, whichever broker looks and whoever dies."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from pyroaring import BitMap

from broker import model
from broker.redis.callbacks import APP_BITS, DueApps, RedisCallbacks
from broker.redis.endings import Place, read_place
from broker.settlements import EVENT_DEVICES
from broker.store import StoreUnavailable
from tests.broker.redis_rigs import Rig
from tests.broker.redis_world import APP, DAY, EVERYTHING, HOUR, OTHER, World
from tests.broker.store_contract import Clock

MakeWorld = Callable[[], Awaitable[World]]


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


# What is told


async def test_everything_that_happens_is_told(world: World, clock: Clock) -> None:
    suppressing = world.message([0, 1, 2], callback=EVERYTHING, ttl=10, suppressed=BitMap([9]))
    (appended,) = await world.append(suppressing)
    msg_id = appended.msg_id
    assert await world.told() == [(msg_id, "suppressed", [9])]
    await world.deliver(msg_id, [0, 7])
    for event in ("shown", "shown", "clicked"):
        await world.receive(msg_id, 0, event, clock())
    await world.receive(msg_id, 5, "shown", clock())  # no target
    assert await world.told() == [
        (msg_id, "delivered", [0]),
        (msg_id, "shown", [0]),
        (msg_id, "clicked", [0]),
    ]
    clock.now += 10
    assert await world.told() == []
    await world.expire()
    assert await world.told() == [(msg_id, "expired", [1, 2])]
    recalled = await world.push([3], callback=EVERYTHING)
    await world.recall(recalled)
    await world.recall(recalled)
    assert await world.told() == [(recalled, "recalled", [3])]
    newest = [await world.push([4], callback=EVERYTHING) for _ in range(6)]
    assert await world.told() == [(newest[0], "evicted", [4])]


async def test_the_end_is_told_to_the_moment(world: World, clock: Clock) -> None:
    """Not with the bucket of ten minutes that others are in; and those that do not last a little later."""
    lasting = await world.push([0], callback=EVERYTHING, ttl=7)
    moment = await world.push([0], callback=EVERYTHING, ttl=0)
    for seconds, told in ((6.9, []), (0.2, [lasting]), (7.7, []), (0.3, [moment])):
        clock.now += seconds
        await world.expire()
        assert [event[0] for event in await world.told()] == told
    assert await world.expire() == 0
    assert await world.engine.run("ZCARD", "{endings}:due") == 0


async def test_what_was_delivered_does_not_expire(world: World, clock: Clock) -> None:
    one, several = [await world.push(t, callback=EVERYTHING, ttl=7) for t in ([0], [1, 2])]
    await world.deliver(one, [0])
    await world.deliver(several, [1])
    await world.told()
    clock.now += 7
    await world.expire()
    assert await world.told() == [(several, "expired", [2])]


async def test_only_what_was_asked_for_is_told_and_nothing_of_other_pushes(world: World) -> None:
    clicks = await world.push([0], callback=model.Callback("https://a", ("clicked",)))
    silent = await world.push([0])
    for msg_id in (clicks, silent):
        await world.deliver(msg_id, [0])
        await world.receive(msg_id, 0, "clicked", world.clock())
    assert await world.told() == [(clicks, "clicked", [0])]
    assert await world.engine.run("EXISTS", f"{{{OTHER}}}:told") == 0


async def test_a_part_tells_whom_its_whole_would_tell(world: World, clock: Clock) -> None:
    whole = await world.push(range(4), broadcast=True, paced=True, callback=EVERYTHING, ttl=20)
    parts = [await world.push(t, part_of=whole, ttl=10) for t in ([0, 1], [2])]
    await world.settling.settle(
        [
            model.Settled(APP, parts[0], False, [0, 3], at=clock()),
            model.Settled(APP, parts[1], False, [2], at=clock()),
        ]
    )
    assert await world.told() == [(whole, "delivered", [0, 2])]
    clock.now += 10
    await world.expire()
    assert await world.told() == [(whole, "expired", [1])]
    clock.now += 10
    await world.expire()
    assert await world.told() == [(whole, "expired", [3])]


async def test_many_devices_are_several_events(world: World) -> None:
    msg_id = await world.push(range(2500), broadcast=True, callback=EVERYTHING)
    await world.deliver(msg_id, range(2500), broadcast=True)
    told = await world.told()
    assert [len(devnos) for _, _, devnos in told] == [EVENT_DEVICES, EVENT_DEVICES, 500]
    assert sorted(devno for _, _, devnos in told for devno in devnos) == list(range(2500))


# Over a crash


async def test_an_event_is_entered_before_what_it_tells_of_is_recorded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    msg_id = await world.push([0], callback=EVERYTHING)
    enter = world.telling.note

    async def enter_and_die(notes: object) -> None:
        await enter(notes)  # type: ignore[arg-type]
        raise StoreUnavailable("the process died")

    monkeypatch.setattr(world.telling, "note", enter_and_die)
    with pytest.raises(StoreUnavailable):
        await world.deliver(msg_id, [0])
    assert await world.counts(msg_id) == {"pending": 1}
    assert await world.owed(0) == [msg_id]  # it comes again
    monkeypatch.undo()
    await world.deliver(msg_id, [0])
    assert await world.told() == [(msg_id, "delivered", [0])] * 2
    assert await world.counts(msg_id) == {"delivered": 1}


async def test_nothing_is_recorded_if_its_event_cannot_be_entered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    msg_id = await world.push([0, 1], callback=EVERYTHING)

    async def die(notes: object) -> None:
        del notes
        raise StoreUnavailable("the process died")

    monkeypatch.setattr(world.telling, "note", die)
    for doing in (
        lambda: world.deliver(msg_id, [0]),
        lambda: world.receive(msg_id, 0, "shown", 1.0),
        lambda: world.settling.evicted(APP, [(msg_id, 0)], 1.0),
    ):
        with pytest.raises(StoreUnavailable):
            await doing()
    record = await world.record(msg_id)
    assert not record.delivered | record.evicted
    assert record.receipts == {}


async def test_who_dies_before_the_end_was_told_leaves_it_to_the_next(
    make_world: MakeWorld, clock: Clock
) -> None:
    one, two = await make_world(), await make_world()
    msg_id = await one.push([0], callback=EVERYTHING, ttl=7)
    clock.now += 7
    assert len(await one.endings.claim(clock(), 10)) == 1
    assert await two.expire() == 0
    clock.now += 61
    assert await two.expire() == 1
    assert await two.told() == [(msg_id, "expired", [0])]


async def test_the_end_of_a_message_that_is_not_written_yet_waits_for_it(world: World, clock: Clock) -> None:
    """Its place is noted before its row is."""
    late = (1_843_200_000_000_500, (await world.rows.read(APP, [await world.push([0])])).popitem()[1])
    row = type(late[1])(APP, b"{}", 0, False, clock(), clock() + 5, callback=EVERYTHING)
    await world.endings.note([(late[0], row)])
    clock.now += 6
    assert await world.expire() == 0
    assert len(await world.engine.run("ZRANGE", "{endings}:due", 0, -1)) == 2
    await world.rows.write([(late[0], row)])
    clock.now += 61
    assert await world.expire() == 1
    assert await world.told() == [(late[0], "expired", [0])]


@pytest.mark.parametrize("place", [Place(7, 1_800_000_600), Place(12, 1_800_000_011, 2**52)])
def test_a_place_is_read_as_it_was_written(place: Place) -> None:
    assert read_place(place.member.encode()) == place


# Who has which


async def _tell(world: World, count: int, first: int = 0) -> list[int]:
    messages = [world.message([first + n], callback=EVERYTHING) for n in range(count)]
    ids = [appended.msg_id for appended in await world.append(*messages)]
    await world.log.passed(APP, ids[-1])
    await world.settling.settle(
        [model.Settled(APP, msg_id, False, [first + n], at=world.clock()) for n, msg_id in enumerate(ids)]
    )
    return ids


async def test_two_brokers_never_have_the_same_event(make_world: MakeWorld, clock: Clock) -> None:
    one, two = await make_world(), await make_world()
    ids = await _tell(one, 300)
    batches = await asyncio.gather(*[(one, two)[n % 2].callbacks.claim(clock(), 60, 7) for n in range(60)])
    claimed = [event.msg_id for batch in batches for event in batch]
    assert sorted(claimed) == sorted(ids)
    assert await two.callbacks.claim(clock(), 60, 7) == []
    clock.now += 60
    assert len(await two.callbacks.claim(clock(), 60, 1000)) == 300


async def test_those_that_are_due_longest_come_first_and_no_more_than_asked_for(
    world: World, clock: Clock
) -> None:
    ids = []
    for _ in range(5):
        ids += await _tell(world, 4, len(ids))
        clock.now += 1
    found = [await world.callbacks.claim(clock(), 60, 7) for _ in range(4)]
    assert [len(batch) for batch in found] == [7, 7, 6, 0]
    assert [event.msg_id for batch in found for event in batch] == ids
    numbers = [event.event_id for batch in found for event in batch]
    assert numbers == sorted(set(numbers))
    assert max(numbers) < 2**63


async def test_an_id_says_whose_event_it_is(world: World) -> None:
    await _tell(world, 1)
    (event,) = await world.callbacks.claim(world.clock(), 60, 10)
    assert event.event_id % (1 << APP_BITS) == APP
    await RedisCallbacks(world.engine, DAY).done([event.event_id])  # another process
    assert await world.callbacks.counts(APP) == (0, 0)


async def test_done_by_one_whose_lease_ran_out_is_done(make_world: MakeWorld, clock: Clock) -> None:
    one, two = await make_world(), await make_world()
    await _tell(one, 1)
    (slow,) = await one.callbacks.claim(clock(), 60, 10)
    clock.now += 60
    (again,) = await two.callbacks.claim(clock(), 60, 10)
    assert again == slow or again.event_id == slow.event_id
    await one.callbacks.done([slow.event_id])
    await two.callbacks.failed([again.event_id], clock() + 5, "HTTP 500")
    await two.callbacks.postpone([again.event_id], clock() + 5)
    assert await two.callbacks.counts(0) == (0, 0)


async def test_parked_ones_wait_for_retry_and_are_counted(world: World, clock: Clock) -> None:
    ids = await _tell(world, 3)
    events = await world.callbacks.claim(clock(), 60, 10)
    await world.callbacks.failed([event.event_id for event in events], None, "HTTP 410 " + "x" * 5000)
    clock.now += HOUR
    assert await world.told() == []
    assert await world.callbacks.counts(0) == await world.callbacks.counts(APP) == (0, 3)
    first, *_ = await world.callbacks.list_parked(APP, 0, 1)
    rest = await world.callbacks.list_parked(APP, first.event_id, 10)
    assert [event.msg_id for event in (first, *rest)] == ids
    assert (first.attempts, first.error[:8], len(first.error)) == (1, "HTTP 410", 1000)
    assert await world.callbacks.retry(APP, clock()) == 3
    assert [event.attempts for event in await world.callbacks.claim(clock(), 60, 10)] == [0] * 3


async def test_old_ones_are_forgotten(world: World, clock: Clock) -> None:
    await _tell(world, 2)
    parked, _ = await world.callbacks.claim(clock(), 60, 10)
    await world.callbacks.failed([parked.event_id], None, "HTTP 410")
    clock.now += 7 * DAY
    await _tell(world, 1)
    assert await world.callbacks.expire(clock(), 100) == 1  # the parked one: as old as it happened
    clock.now += 120
    assert await world.callbacks.expire(clock(), 100) == 1
    assert await world.callbacks.counts(0) == (1, 0)


async def test_events_of_a_deleted_app_are_never_due(world: World, clock: Clock) -> None:
    await _tell(world, 2)
    await world.engine.run("SET", f"{{{APP}}}:deleted", 1)
    assert await world.callbacks.claim(clock(), 60, 10) == []
    assert await world.engine.run("ZCARD", "{due:told}:apps") == 0
    assert await world.callbacks.purge(APP, range(1), 10) > 0
    assert await world.engine.run("EXISTS", f"{{{APP}}}:told", f"{{{APP}}}:told:due") == 0


async def test_an_app_without_anything_due_leaves_the_list_and_comes_back(world: World, clock: Clock) -> None:
    (msg_id,) = await _tell(world, 1)
    (event,) = await world.callbacks.claim(clock(), 60, 10)
    await world.callbacks.done([event.event_id])
    clock.now += 61
    assert await world.told() == []
    assert await world.engine.run("ZCARD", "{due:told}:apps") == 0
    assert await _tell(world, 1) != [msg_id]
    assert len(await world.told()) == 1


async def test_whoever_was_about_to_enter_an_event_when_the_list_was_closed_looks_again(
    world: World, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the app would have an event that is due, and be in no list."""
    touches: list[int] = []
    call = DueApps._call

    async def called(self: DueApps, verb: str, *arguments: str | bytes | int | float) -> object:
        answer = await call(self, verb, *arguments)
        if verb == "touch":
            touches.append(answer)
            if len(touches) == 1:  # a reader comes in between
                (listed,) = await self.listed(clock(), 10)
                await self.put_later(*listed)
                assert await self.listed(clock(), 10) == []
        return answer

    monkeypatch.setattr(DueApps, "_call", called)
    ids = await _tell(world, 1)
    monkeypatch.undo()
    assert len(touches) == 2
    assert [told[0] for told in await world.told()] == ids


@pytest.mark.parametrize("seed", range(4))
async def test_every_event_is_told_whoever_claims_fails_and_enters_at_the_same_time(
    make_world: MakeWorld, clock: Clock, seed: int
) -> None:
    dice = random.Random(seed)
    worlds = [await make_world(), await make_world()]
    told: list[int] = []
    expected: list[int] = []

    async def tell() -> None:
        expected.extend(await _tell(dice.choice(worlds), dice.randrange(1, 4), 8 * len(expected)))

    async def dispatch() -> None:
        callbacks = dice.choice(worlds).callbacks
        for event in await callbacks.claim(clock(), 30, dice.choice((1, 3, 50))):
            await dice.choice(
                (
                    lambda e: callbacks.done([e.event_id]),
                    lambda e: callbacks.done([e.event_id]),
                    lambda e: callbacks.failed([e.event_id], clock() + dice.randrange(40), "x"),
                    lambda e: callbacks.failed([e.event_id], None, "x"),
                    lambda e: callbacks.postpone([e.event_id], clock() + 3),
                    lambda e: asyncio.sleep(0),  # it died
                )
            )(event)
            told.append(event.msg_id)

    async def retry() -> None:
        await dice.choice(worlds).callbacks.retry(APP, clock())

    async def counts() -> None:
        await dice.choice(worlds).callbacks.counts(0)

    for _ in range(25):
        calls = (tell, dispatch, dispatch, dispatch, retry, counts)
        await asyncio.gather(*[dice.choice(calls)() for _ in range(6)])
        clock.now += dice.choice((0, 1, 31))
    await retry()
    left = set[int]()
    for _ in range(10):
        clock.now += 61
        for world in worlds:
            events = await world.callbacks.claim(clock(), 60, 1000)
            left.update(event.msg_id for event in events)
            await world.callbacks.done([event.event_id for event in events])
    assert await worlds[0].callbacks.counts(0) == (0, 0)
    assert set(told) | left == set(expected)


async def test_who_never_had_a_callback_pays_one_call_a_message(world: World) -> None:
    ids = [appended.msg_id for appended in await world.append(*[world.message([n]) for n in range(100)])]
    await world.log.passed(APP, ids[-1])
    before = await _scripts(world)
    await world.settling.settle([model.Settled(APP, msg_id, False, [n]) for n, msg_id in enumerate(ids)])
    assert await _scripts(world) - before <= 100 + 2  # and the inboxes, of one partition


async def _scripts(world: World) -> int:
    text = (await world.engine.run("INFO", "commandstats")).decode()
    lines = [line for line in text.splitlines() if line.startswith(("cmdstat_eval:", "cmdstat_evalsha:"))]
    return sum(int(line.split("calls=")[1].split(",")[0]) for line in lines)
