"""Devices go from node to node (G5), and what one node did is known to the next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

import gateway.fetcher
import gateway.membership
import gateway.settler
import gateway.sweeper
from broker.bus import CredentialsChanged, Doorbell, Taken, Targeted
from broker.model import Claim, DeliveryState, DeviceChange, StoredBroadcast, StoredMessage
from gateway.mqtt import Puback, Reason
from tests.gateway.fleet_world import LEASE, FleetWorld
from tests.gateway.world import Phone

DELIVERED, PENDING, EVICTED = DeliveryState.DELIVERED, DeliveryState.PENDING, DeliveryState.EVICTED
Build = Callable[..., Awaitable[FleetWorld]]


async def nothing(*_: object) -> None:
    pass


@pytest.fixture
async def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Build]:
    """`await build(devices=3, offline_limit=100)`"""
    monkeypatch.setattr(gateway.membership, "BEAT", 3600)
    monkeypatch.setattr(gateway.settler, "FOLD_AFTER", 3600)  # `recorded` does it,
    monkeypatch.setattr(gateway.settler.Settler, "_record_forever", nothing)  # and nobody else
    for rest in ("RESTS", "REST_MIN"):
        monkeypatch.setattr(gateway.sweeper, rest, 0)
    worlds: list[FleetWorld] = []

    async def run(**values: int) -> FleetWorld:
        worlds.append(FleetWorld(tmp_path))
        await worlds[-1].open(**values)
        return await worlds[-1].build()

    yield run
    for world in worlds:
        await world.close()


@pytest.fixture
async def world(build: Build) -> FleetWorld:
    return await build()


def raw_ack(phone: Phone) -> None:
    """As if its bytes had been in the socket all the time."""
    phone.send(*(Puback(push.packet_id) for push in phone.pushes))


# Takeover


async def test_a_device_that_comes_to_another_node_is_closed_at_the_first(world: FleetWorld) -> None:
    old = await world.online_at(0, 0)
    new = await world.online_at(1, 0)
    assert not old.closed
    world.hear()
    assert (old.closed, old.goodbye.reason) == (True, Reason.SESSION_TAKEN_OVER)
    assert not new.closed
    assert world.node.metrics.takeovers.value == 1


async def test_acknowledgements_that_came_before_the_doorbell_of_the_takeover_do_not_count(
    world: FleetWorld,
) -> None:
    old = await world.online_at(0, 0)
    msg_ids = [await world.push(0), await world.push(0, 1)]
    await old.pushed(2)
    new = await world.online_at(1, 0)
    raw_ack(old)
    await world.nodes[0].recorded()  # hears of the takeover by itself
    assert old.closed
    assert [(await world.states(msg_id))[0] for msg_id in msg_ids] == [PENDING, PENDING]
    assert world.nodes[0].store.settled == []
    assert world.nodes[0].node.metrics.fenced.value == 2
    assert await new.pushed(2) == msg_ids
    raw_ack(new)
    await world.nodes[1].recorded()
    assert [(await world.states(msg_id))[0] for msg_id in msg_ids] == [DELIVERED, DELIVERED]


async def test_what_was_folded_and_does_not_count_is_owed_here_again(world: FleetWorld) -> None:
    old = await world.online_at(0, 0)
    msg_id = await world.push(0, 1)
    await old.pushed(1)
    raw_ack(old)
    world.node.settler.fold()
    [push] = world.hub.broadcasts()
    assert not push.owed_to(0)
    (await world.online_at(1, 0)).leave()
    await world.nodes[0].recorded()
    assert push.owed_to(0)
    assert (await world.online_at(0, 0)).got == [msg_id]


async def test_what_everybody_has_but_is_not_recorded_is_not_forgotten(world: FleetWorld) -> None:
    """An acknowledgement may still be found not to count: the store gives the broadcast to a hub once only."""
    phones = [await world.online_at(0, devno) for devno in (0, 1)]
    msg_id = await world.push(0, 1)
    for phone in phones:
        await phone.pushed(1)
        raw_ack(phone)
    world.node.settler.fold()
    world.node.hubs.upkeep()
    (await world.online_at(1, 0)).leave()
    await world.nodes[0].recorded()
    assert (await world.online_at(0, 0)).got == [msg_id]
    world.node.settler.fold()


async def test_who_is_back_before_the_batch_is_recorded_counts_from_then_on(world: FleetWorld) -> None:
    old = await world.online_at(0, 0)
    first = await world.push(0)
    await old.pushed(1)
    raw_ack(old)
    (await world.online_at(1, 0)).leave()
    world.hear()
    back = await world.online_at(0, 0)
    assert await back.pushed(1) == [first]
    raw_ack(back)
    second = await world.push(0)
    await back.pushed(2)
    await world.nodes[0].recorded()
    assert [(await world.states(msg_id))[0] for msg_id in (first, second)] == [DELIVERED, PENDING]


async def test_an_acknowledgement_that_comes_after_the_question_waits_for_the_next_answer(
    world: FleetWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer says nothing of what happens after its question was asked."""
    member = world.nodes[0]
    old = await world.online_at(0, 0)
    msg_ids = [await world.push(0), await world.push(0)]
    await old.pushed(2)
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        asked.set()
        await answer.wait()

    monkeypatch.setattr(member.node.settler, "_certain", slow)
    old.ack(msg_ids[0])
    member.node.settler.fold()
    recording = asyncio.create_task(member.node.settler._record())
    await asked.wait()
    old.ack(msg_ids[1])
    member.node.settler.fold()
    answer.set()
    await recording
    assert [one.msg_id for one in member.store.settled] == [msg_ids[0]]


async def test_after_a_long_sleep_nothing_counts_that_was_in_the_sockets(world: FleetWorld) -> None:
    """SIGSTOP: the devices went elsewhere meanwhile, and one just went."""
    phones = [await world.online_at(0, devno) for devno in range(3)]
    msg_id = await world.push(0, 1, 2)
    for phone in phones:
        await phone.pushed(1)
    world.table.now += 1
    world.ether.lossy = lambda name, _: name == "node-1"  # its end of the bus is gone, too
    world.table.now += LEASE
    (await world.online_at(1, 0)).leave()
    (await world.online_at(1, 1)).leave()
    for phone in phones:
        raw_ack(phone)
    phones[1].leave()  # the socket was closed by the device, long ago
    await world.nodes[0].recorded()
    assert phones[0].closed
    assert await world.states(msg_id) == {0: PENDING, 1: PENDING, 2: DELIVERED}


async def test_while_the_node_cannot_ask_it_keeps_serving_and_records_nothing(
    world: FleetWorld, caplog: pytest.LogCaptureFixture
) -> None:
    phone = await world.online_at(0, 0)
    world.table.now += LEASE + 1
    world.nodes[0].store.nodes.away = 1
    msg_id = await world.push(0)
    assert await phone.pushed(1) == [msg_id]
    raw_ack(phone)
    await world.nodes[0].recorded()
    assert "acknowledgements not recorded, trying again: away" in caplog.text
    assert (await world.states(msg_id))[0] is PENDING
    await world.nodes[0].recorded()
    assert (await world.states(msg_id))[0] is DELIVERED


async def test_a_takeover_that_is_heard_before_the_claim_is_answered_wins(
    world: FleetWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = world.nodes[0]
    await world.online_at(0, 1)
    held: list[tuple[Callable[[Claim], None], Claim]] = []
    claim = member.store.claim_route

    def hold(app_id: int, devno: int, node_id: str, done: Callable[[Claim], None]) -> None:
        claim(app_id, devno, node_id, lambda answer: held.append((done, answer)))

    monkeypatch.setattr(member.store, "claim_route", hold)
    late = world.connect_at(0, 0)
    new = await world.online_at(1, 0)
    world.hear()
    [(done, answer)] = held
    done(answer)
    assert late.connack.reason is Reason.SERVER_BUSY
    assert not new.closed


async def test_an_older_doorbell_takes_nothing_from_a_newer_claim(world: FleetWorld) -> None:
    phone = await world.online_at(0, 0)
    epoch = phone.connection.epoch
    world.bus.ring([Taken(world.app.app_id, 0, epoch - 1, "node-1"), Taken(99, 0, epoch + 1, "node-1")])
    world.hear()
    assert not phone.closed


async def test_a_device_that_leaves_before_its_claim_is_answered_is_taken_all_the_same(
    world: FleetWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await world.online_at(0, 0)
    await world.online_at(1, 1)
    held: list[tuple[Callable[[Claim], None], Claim]] = []
    claim = world.nodes[1].store.claim_route
    monkeypatch.setattr(
        world.nodes[1].store,
        "claim_route",
        lambda app_id, devno, node, done: claim(app_id, devno, node, lambda a: held.append((done, a))),
    )
    world.connect_at(1, 0).leave()
    [(done, answer)] = held
    done(answer)
    world.hear()
    assert old.closed


@pytest.mark.parametrize("hung_up", [True, False], ids=["hung up", "the app was loaded anew"])
async def test_a_claim_that_nobody_uses_ends_the_older_connection_here(
    world: FleetWorld, monkeypatch: pytest.MonkeyPatch, hung_up: bool
) -> None:
    """No node is in the route then, so the next node to claim the device could tell nobody."""
    old = await world.online_at(0, 0)
    held: list[tuple[Callable[[Claim], None], Claim]] = []
    store = world.nodes[0].store
    claim = store.claim_route
    monkeypatch.setattr(
        store,
        "claim_route",
        lambda app_id, devno, node, done: claim(app_id, devno, node, lambda a: held.append((done, a))),
    )
    newer = world.connect_at(0, 0)
    await world.when(lambda: held)
    monkeypatch.undo()
    if hung_up:
        newer.leave()
    else:
        hub = world.hub
        world.node.hubs.remove(hub)
        phone = await world.online_at(0, 1)
        assert world.hub is not hub
        world.hub.members[0] = old.connection
        assert not phone.closed
    [(done, answer)] = held
    done(answer)
    assert old.closed
    assert old.goodbye.reason == Reason.SESSION_TAKEN_OVER
    assert (world.app.app_id, 0) not in world.table.routes


# What the device did elsewhere


async def test_a_broadcast_that_was_acknowledged_elsewhere_does_not_come_again(world: FleetWorld) -> None:
    await world.online_at(0, 1)
    there = await world.online_at(1, 0)
    first, second = await world.push(0, 1), await world.push(0, 1)
    await there.pushed(2)
    there.ack(first)
    await world.nodes[1].recorded()
    there.leave()
    back = await world.online_at(0, 0)
    assert await back.pushed(1) == [second]
    await world.calm()
    assert back.got == [second]
    assert not back.session.unsure


async def test_many_that_come_at_once_share_the_look(world: FleetWorld) -> None:
    await world.online_at(0, 2)
    msg_id = await world.push(0, 1)
    read = world.nodes[0].store.rows_read
    phones = [world.connect_at(0, devno) for devno in (0, 1)]
    for phone in phones:
        assert await phone.pushed(1) == [msg_id]
    assert world.nodes[0].store.rows_read <= read + 2


async def test_who_is_owed_no_broadcast_is_not_looked_up(world: FleetWorld) -> None:
    await world.online_at(0, 2)
    msg_ids = [await world.push(1, 2), await world.push(0)]
    read = world.nodes[0].store.rows_read
    assert (await world.online_at(0, 0)).got == msg_ids[1:]
    assert world.nodes[0].store.rows_read == read


async def test_pushes_that_come_meanwhile_wait_for_their_turn(world: FleetWorld) -> None:
    await world.online_at(0, 2)
    broadcast = await world.push(0, 1)
    phone = world.connect_at(0, 0)
    targeted = await world.push(0)
    assert await phone.pushed(2) == [broadcast, targeted]


async def test_the_newest_n_rule_counts_what_was_acknowledged_elsewhere(build: Build) -> None:
    world = await build(offline_limit=2)
    await world.online_at(0, 1)
    there = await world.online_at(1, 0)
    msg_ids = [await world.push(0, 1) for _ in range(4)]
    await there.pushed(4)
    there.ack(*msg_ids[2:])
    await world.nodes[1].recorded()
    there.leave()
    back = await world.online_at(0, 0)
    await back.pushed(2)
    await world.calm()
    assert back.got == msg_ids[:2]
    await world.nodes[0].recorded()
    assert [(await world.states(i))[0] for i in msg_ids] == [PENDING, PENDING, DELIVERED, DELIVERED]


async def test_the_newest_n_rule_applies_after_the_look(build: Build) -> None:
    world = await build(offline_limit=2)
    await world.online_at(0, 1)
    msg_ids = [await world.push(0, 2) for _ in range(4)]
    back = await world.online_at(0, 0)
    await back.pushed(2)
    assert back.got == msg_ids[2:]
    await world.nodes[0].recorded()
    assert [(await world.states(i))[0] for i in msg_ids] == [EVICTED, EVICTED, PENDING, PENDING]


async def test_a_device_that_leaves_during_the_look_is_not_missed(
    world: FleetWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gateway.sweeper, "RETRY_AFTER", 0)
    await world.online_at(0, 2)
    msg_id = await world.push(0, 1)
    world.nodes[0].store.rows_away = True
    phone = world.connect_at(0, 0)
    await world.when(lambda: "an app was not looked up" in caplog.text)
    phone.leave()
    world.nodes[0].store.rows_away = False
    again = world.connect_at(0, 0)
    assert await again.pushed(1) == [msg_id]
    assert phone.got == []


# Sweeps: doorbells that were lost


def lose_all(world: FleetWorld) -> None:
    world.ether.lossy = lambda _name, _bell: True


async def sweep(world: FleetWorld) -> None:
    """What the bus does at the next beat."""
    world.ether.lossy = lambda _name, _bell: False
    for member in world.nodes:
        await member.bus.catch_up()
    await world.calm()


async def test_lost_doorbells_of_pushes_are_found_in_order(
    world: FleetWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.fetcher, "HOLD", 0)
    phones = [await world.online_at(n, n) for n in range(2)]
    lose_all(world)
    msg_ids = [await world.push(*devnos) for devnos in ((0,), (0, 1), (0,), (0, 1), (1,))]
    await sweep(world)
    assert await phones[0].pushed(4) == msg_ids[:4]
    assert await phones[1].pushed(3) == [msg_ids[n] for n in (1, 3, 4)]


async def test_a_lost_takeover_is_found(world: FleetWorld) -> None:
    old = await world.online_at(0, 0)
    lose_all(world)
    new = await world.online_at(1, 0)
    await sweep(world)
    assert (old.closed, new.closed) == (True, False)
    assert world.nodes[0].metrics is not world.nodes[1].metrics
    assert world.nodes[0].node.metrics.swept.labels("lost").value == 1


async def test_a_lost_withdrawal_is_found(world: FleetWorld) -> None:
    await world.online_at(0, 2)
    msg_id = await world.push(0, 1)
    lose_all(world)
    await world.store.recall(world.app.app_id, [msg_id], world.wall)
    later = await world.push(0, 2)
    await sweep(world)
    phone = await world.online_at(0, 0)
    await phone.pushed(1)
    await world.calm()
    assert phone.got == [later]


async def test_a_page_in_memory_of_what_was_withdrawn_is_read_again(world: FleetWorld) -> None:
    for _ in range(3):
        await world.push(0)
    phone = await world.online_at(0, 0, properties={"receive_maximum": 1})
    rows = phone.session.inbox
    assert rows is not None
    assert len(rows) == 2
    await world.store.recall(world.app.app_id, [rows[1].msg_id], world.wall)
    await world.node.sweeper.sweep("missed")
    phone.ack()
    assert await phone.pushed(2) == [phone.got[0], rows[0].msg_id]


async def test_a_lost_revocation_is_found(world: FleetWorld) -> None:
    revoked, other = await world.online_at(0, 0), await world.online_at(0, 1)
    await world.store.change_devices(world.app.app_id, {world.names[0]: DeviceChange(revoke_tokens=True)})
    assert not revoked.closed
    await world.node.sweeper.sweep("missed")
    assert (revoked.closed, revoked.goodbye.reason) == (True, Reason.NOT_AUTHORIZED)
    assert not other.closed


async def test_a_lost_deletion_is_found(world: FleetWorld) -> None:
    phone = await world.online_at(0, 0)
    await world.store.delete_app(world.app.key)
    await world.node.sweeper.sweep("missed")
    assert (phone.closed, phone.goodbye.reason) == (True, Reason.NOT_AUTHORIZED)
    assert len(world.node.hubs) == 0


async def test_a_lost_change_of_an_app_is_found(world: FleetWorld) -> None:
    await world.online_at(0, 0)
    await world.store.rotate_secret(world.app.key)
    before = world.hub.app
    await world.node.sweeper.sweep("missed")
    assert world.hub.app.master_secret != before.master_secret
    assert await world.apps.find(world.app.key) == world.hub.app


async def test_doorbells_lost_while_an_app_is_loaded_are_found(
    world: FleetWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are read again before anybody is in it."""
    store = world.nodes[0].store
    read, go_on = asyncio.Event(), asyncio.Event()

    async def live_broadcasts(app_id: int) -> list[StoredBroadcast]:
        rows = await world.store.live_broadcasts(app_id)
        if not read.is_set():
            read.set()
            await go_on.wait()
        return rows

    monkeypatch.setattr(store, "live_broadcasts", live_broadcasts)
    phone = world.connect_at(0, 0)
    await read.wait()
    lose_all(world)
    msg_id = await world.push(0, 1)
    await sweep(world)
    go_on.set()
    assert await phone.pushed(1) == [msg_id]


async def test_the_round_finds_what_no_bus_noticed(
    world: FleetWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    phone = await world.online_at(0, 0)
    msg_id = await world.append(0)  # a request that was cancelled before it rang
    monkeypatch.setattr(gateway.sweeper, "ROUND", 0)
    world.nodes[0].store.away = True
    going = asyncio.create_task(world.node.sweeper.go_round())
    await world.when(lambda: "an app was not looked up" in caplog.text)
    world.nodes[0].store.away = False
    assert await phone.pushed(1) == [msg_id]
    going.cancel()
    await asyncio.wait([going])


async def test_a_sweep_during_an_outage_says_so(world: FleetWorld) -> None:
    await world.online_at(0, 0)
    world.nodes[0].store.away = True
    with pytest.raises(Exception, match="away"):
        await world.node.sweeper.sweep("missed")


async def test_credentials_that_are_heard_of_are_not_swept(world: FleetWorld) -> None:
    phone = await world.online_at(0, 0)
    world.bus.ring([CredentialsChanged(world.app.app_id, (0,))])
    world.hear()
    await phone.until(lambda phone: phone.closed)


# A page of rows says which broadcast goes before it (StoredMessage.after)


class Named:
    """Rows of the inbox say it."""

    def __init__(self, world: FleetWorld, monkeypatch: pytest.MonkeyPatch) -> None:
        self.after = 0
        self.store = world.nodes[0].store
        fetch = world.store.fetch_owed

        async def fetch_owed(requests: object) -> list[list[StoredMessage]]:
            pages = await fetch(requests)  # type: ignore[arg-type]
            return [[_after(message, self.after) for message in page] for page in pages]

        monkeypatch.setattr(self.store, "fetch_owed", fetch_owed, raising=False)


def _after(message: StoredMessage, after: int) -> StoredMessage:
    return replace(message, after=after if after < message.msg_id else 0)


async def test_a_page_waits_for_the_broadcast_before_it(
    world: FleetWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.fetcher, "HOLD_KNOWN", 3600)
    named = Named(world, monkeypatch)
    await world.online_at(0, 1)
    broadcast, targeted = await world.append(0, 1), await world.append(0)
    named.after = broadcast
    phone = world.connect_at(0, 0)
    await world.calm()
    assert phone.got == []
    world.ring(broadcast, 0, 1)
    assert await phone.pushed(2) == [broadcast, targeted]


async def test_rows_that_come_after_no_broadcast_wait_for_no_doorbell(
    world: FleetWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.fetcher, "HOLD", 3600)
    Named(world, monkeypatch)
    await world.online_at(0, 1)
    msg_id = await world.append(0)
    assert (await world.online_at(0, 0)).got == [msg_id]


async def test_a_page_whose_broadcast_is_lost_is_swept_for(
    world: FleetWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.fetcher, "HOLD_KNOWN", 0)
    named = Named(world, monkeypatch)
    other = await world.online_at(0, 1)
    named.after = broadcast = await world.append(0, 1)
    targeted = await world.append(0)
    assert await world.connect_at(0, 0).pushed(2) == [broadcast, targeted]
    assert await other.pushed(1) == [broadcast]


async def test_a_broadcast_that_was_over_before_the_app_was_loaded_is_waited_for_once(
    world: FleetWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.fetcher, "HOLD_KNOWN", 0)
    named = Named(world, monkeypatch)
    named.after = await world.append(1, 2)
    await world.store.recall(world.app.app_id, [named.after], world.wall)
    msg_ids = [await world.append(0), await world.append(1)]
    assert await world.connect_at(0, 0).pushed(1) == msg_ids[:1]
    assert world.hub.last_broadcast == named.after
    read = world.nodes[0].store.rows_read
    monkeypatch.setattr(gateway.fetcher, "HOLD_KNOWN", 3600)
    assert await world.connect_at(0, 1).pushed(1) == msg_ids[1:]
    assert world.nodes[0].store.rows_read == read


# Doorbells that ring again, long after


async def test_a_doorbell_that_rings_again_brings_back_nothing(world: FleetWorld) -> None:
    phone = await world.online_at(0, 0)
    recalled = await world.push(0)
    await phone.pushed(1)
    message = StoredMessage(recalled, world.app.app_id, b'{"notification":{}}', world.wall, world.wall + 60)
    gone = await world.store.recall(world.app.app_id, [recalled], world.wall)
    bells: list[Doorbell] = [Targeted(message, (0,))]
    world.hub.recall(gone[0], world.node.clock.now)
    phone.leave()
    again = await world.online_at(0, 0)
    world.bus.ring(bells)
    world.hear()
    assert again.got == []
    world.later(120)
    world.hub.recalled.clear()
    world.bus.ring(bells)  # expired
    world.hear()
    assert again.got == []


# Looks at an app on demand


async def test_who_asks_during_a_look_waits_for_the_next_one(world: FleetWorld) -> None:
    """Its device may have acknowledged something after the first one was read."""
    await world.online_at(0, 0)
    store, sweeper = world.nodes[0].store, world.node.sweeper
    read, go_on = asyncio.Event(), asyncio.Event()
    live, done = store.live_broadcasts, list[str]()

    async def slow(app_id: int) -> object:
        rows = await live(app_id)
        read.set()
        await go_on.wait()
        return rows

    store.live_broadcasts = slow  # type: ignore[method-assign]
    before = store.rows_read
    sweeper.look(world.hub, lambda: done.append("first"))
    await read.wait()
    sweeper.look(world.hub, lambda: done.append("second"))
    sweeper.look(world.hub, lambda: done.append("third"))
    go_on.set()
    await world.when(lambda: len(done) == 3)
    assert (done, store.rows_read - before) == (["first", "second", "third"], 2)


async def test_a_look_at_an_app_that_went_ends(world: FleetWorld) -> None:
    await world.online_at(0, 0)
    hub, done = world.hub, list[int]()
    world.node.hubs.remove(hub)
    world.node.sweeper.look(hub, lambda: done.append(1), whole=True)
    await world.when(lambda: done)
