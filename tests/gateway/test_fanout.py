"""Doorbells to sockets: slices, slow sockets, several broadcasts at once."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest

import gateway.fanout
from broker.model import DeliveryState
from gateway.fanout import LONGEST_REST, MOST_RESTED, REST, SCHEDSTAT, CoreLoad
from gateway.live import Encoding, Frames, LivePush
from gateway.session import MAX_PACKET_ID
from tests.gateway.world import Phone, World

DEVICES = 5
EVERYONE = range(DEVICES)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """With one device to a slice of a walk."""
    monkeypatch.setattr(gateway.fanout, "SLICE", 1)
    world = await World(tmp_path).open(devices=DEVICES)
    yield world
    await world.close()


@pytest.fixture
async def phones(world: World) -> list[Phone]:
    return [await world.online(devno) for devno in EVERYONE]


def reached(phones: Iterable[Phone], msg_id: int) -> int:
    return sum(msg_id in phone.got for phone in phones)


async def walked(world: World, phones: list[Phone], msg_id: int, count: int) -> None:
    """Until a broadcast has come to so many devices."""
    await world.when(lambda: reached(phones, msg_id) >= count)
    assert reached(phones, msg_id) == count
    assert world.node.fanout.left == DEVICES - count


async def test_a_walk_lets_others_through_between_two_slices(world: World, phones: list[Phone]) -> None:
    broadcast = await world.push(*EVERYONE)
    await walked(world, phones, broadcast, 1)
    targeted = await world.push(4)  # of the last in the walk
    await phones[4].pushed(2)
    assert phones[4].got == [broadcast, targeted]
    await world.calm()
    assert [len(phone.got) for phone in phones] == [1, 1, 1, 1, 2]
    assert world.node.fanout.walking == 0


async def test_a_targeted_push_overtakes_a_walk_to_other_devices(world: World, phones: list[Phone]) -> None:
    broadcast = await world.append(0, 1, 2, 3)
    targeted = await world.append(4)
    world.ring(broadcast, 0, 1, 2, 3)
    world.ring(targeted, 4)
    await phones[4].pushed(1)
    assert reached(phones, broadcast) < 4
    await world.calm()
    assert reached(phones, broadcast) == 4


async def test_broadcasts_due_together_go_in_one_write(world: World, phones: list[Phone]) -> None:
    writes: list[bytes] = []
    take = phones[4]._take

    def written(data: bytes) -> None:
        writes.append(data)
        take(data)

    phones[4].transport._written = written
    ids = [await world.append(*EVERYONE) for _ in range(3)]
    for msg_id in ids:
        world.ring(msg_id, *EVERYONE)
    await world.calm()
    assert all(phone.got == ids for phone in phones)
    assert len(writes) == 1


async def test_a_slow_socket_is_skipped_and_catches_up_when_it_drains(
    world: World, phones: list[Phone]
) -> None:
    phones[2].block()
    ids = [await world.push(*EVERYONE), await world.push(2), await world.push(*EVERYONE)]
    await world.calm()
    assert [phone.got for phone in phones[1:4]] == [[ids[0], ids[2]], [], [ids[0], ids[2]]]
    assert world.node.metrics.skipped.value == 2
    phones[2].drain()
    assert await phones[2].pushed(3) == ids


async def test_a_full_window_is_passed_over_and_catches_up_with_acknowledgements(world: World) -> None:
    phone = await world.online(0, properties={"receive_maximum": 1})
    ids = [await world.push(*EVERYONE) for _ in range(3)]
    await world.calm()
    for i in range(3):
        assert phone.got == ids[: i + 1]
        phone.ack(ids[i])


async def test_a_device_that_leaves_during_a_walk_is_passed_over(world: World, phones: list[Phone]) -> None:
    msg_id = await world.push(*EVERYONE)
    await walked(world, phones, msg_id, 2)
    phones[3].leave()
    await world.calm()
    assert [len(phone.got) for phone in phones] == [1, 1, 1, 0, 1]
    assert (await world.online(3)).got == [msg_id]


async def test_a_device_that_comes_during_a_walk_gets_it_once(world: World, phones: list[Phone]) -> None:
    phones[3].leave()
    msg_id = await world.push(*EVERYONE)
    await world.when(lambda: reached(phones, msg_id))
    again = world.connect(3)
    assert again.got == [msg_id]
    await world.calm()
    assert again.got == [msg_id]


async def have(world: World, msg_id: int) -> list[int]:
    """Devices that have it, as it is recorded."""
    await world.recorded()
    states = await world.states(msg_id)
    return [devno for devno, state in states.items() if state is DeliveryState.DELIVERED]


async def three_at_once(world: World) -> list[int]:
    """Three broadcasts whose doorbells ring in a row."""
    msg_ids = [await world.append(*EVERYONE) for _ in range(3)]
    for msg_id in msg_ids:
        world.ring(msg_id, *EVERYONE)
    await world.calm()
    return msg_ids


async def test_devices_at_rest_share_what_is_in_flight(world: World, phones: list[Phone]) -> None:
    msg_ids = await three_at_once(world)
    flight = phones[0].session.flight
    assert flight is not None
    assert [phone.session.flight for phone in phones] == [flight] * DEVICES
    for phone in phones[1:]:
        phone.ack()
        assert phone.session.flight is phone.session.unacked is None
    assert [await have(world, msg_id) for msg_id in msg_ids] == [[1, 2, 3, 4]] * 3


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
async def test_who_acknowledges_one_by_one_leaves_the_flight(
    world: World, phones: list[Phone], order: tuple[int, ...]
) -> None:
    msg_ids = await three_at_once(world)
    left = list(msg_ids)
    for place in order:
        phones[0].ack(msg_ids[place])
        left.remove(msg_ids[place])
        assert [push.msg_id for push in phones[0].session.unanswered()] == left
    assert phones[1].session.flight is not None
    assert [await have(world, msg_id) for msg_id in msg_ids] == [[0]] * 3


async def test_who_leaves_amid_a_flight_is_sent_it_again(world: World, phones: list[Phone]) -> None:
    msg_ids = await three_at_once(world)
    phones[0].ack(msg_ids[1])
    await world.recorded()
    phones[0].leave()
    again = world.connect(0)
    await again.pushed(2)
    assert again.got == [msg_ids[0], msg_ids[2]]
    assert [(push.packet_id, push.dup) for push in again.pushes] == [(1, True), (3, True)]


async def test_what_comes_amid_a_flight_takes_the_next_packet_id(world: World, phones: list[Phone]) -> None:
    msg_ids = [*await three_at_once(world), await world.push(0), await world.push(*EVERYONE)]
    await phones[0].pushed(5)
    assert phones[0].got == msg_ids
    assert [push.packet_id for push in phones[0].pushes] == [1, 2, 3, 4, 5]
    phones[0].ack()
    assert phones[0].session.unacked is None


async def test_packet_ids_of_a_flight_stand_in_a_row(world: World, phones: list[Phone]) -> None:
    phones[0].session.next_id = MAX_PACKET_ID - 1
    await three_at_once(world)
    assert [push.packet_id for push in phones[0].pushes] == [MAX_PACKET_ID - 1, MAX_PACKET_ID, 1]
    assert phones[0].session.flight is None
    phones[0].ack()
    assert phones[0].session.unacked is None


async def test_a_flight_is_no_larger_than_the_window(world: World, phones: list[Phone]) -> None:
    phones[0].session.window = 2
    msg_ids = await three_at_once(world)
    assert phones[0].got == msg_ids[:2]
    phones[0].ack()
    assert phones[0].got == msg_ids


async def test_a_walk_rests_when_the_node_had_to_wait_for_a_core(
    world: World, phones: list[Phone], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.node.fanout._load = CoreLoad(asked=True)
    waits = [0.0, 0.0, 0.002]  # as the walk begins, before its first slice, before its second
    monkeypatch.setattr(CoreLoad, "waited", lambda _: waits.pop(0) if waits else 0.0)
    rests: list[float] = []
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def later(delay: float, *work: Any) -> asyncio.TimerHandle:
        if work[0] == world.node.fanout._go_on:
            rests.append(delay)
        return call_later(delay, *work)

    monkeypatch.setattr(loop, "call_later", later)
    broadcast = await world.push(*EVERYONE)
    await world.when(lambda: reached(phones, broadcast) == DEVICES)
    assert rests == [0.002 * REST]


@pytest.mark.skipif(
    not Path(SCHEDSTAT).exists(), reason="only Linux says how long a thread waited for a core"
)
def test_waiting_for_a_core_is_not_sleeping() -> None:
    load = CoreLoad(asked=True)
    allowed = os.sched_getaffinity(0)
    core = min(allowed)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            os.sched_setaffinity(other.pid, {core})
            os.sched_setaffinity(0, {core})
            load.begin()
            until = time.perf_counter() + 60
            waited = 0.0
            while waited < 0.02 and time.perf_counter() < until:
                waited += load.waited()
            assert waited >= 0.02
        finally:
            os.sched_setaffinity(0, allowed)
            other.kill()
    began = time.perf_counter()
    load.waited()
    time.sleep(0.3)
    assert load.waited() <= time.perf_counter() - began - 0.3  # for a core, once it was to wake up
    load.close()


def test_rests_take_no_more_than_their_share_of_a_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(gateway.fanout, "perf_counter", lambda: now)
    monkeypatch.setattr(CoreLoad, "waited", lambda _: 1.0)
    load = CoreLoad(asked=True)
    load.begin()
    rested = 0.0
    while now < 100:
        rest = load.rest()
        assert 0 <= rest <= LONGEST_REST
        rested += rest
        now += rest + 0.001
    assert rested == pytest.approx(MOST_RESTED * now, rel=0.01)


async def test_frames_are_forgotten_when_the_walk_is_over(world: World, phones: list[Phone]) -> None:
    await world.push(*EVERYONE)
    await world.calm()
    hub = world.hub
    (push,) = hub.broadcasts()
    assert (len(phones), push._frames) == (DEVICES, {})


async def test_a_broadcast_that_cannot_be_sent_does_not_stop_the_others(
    world: World, phones: list[Phone], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    frames = LivePush.frames
    broken = await world.append(0, 1)

    def break_one(push: LivePush, encoding: Encoding) -> Frames:
        if push.msg_id == broken:
            raise ValueError("cannot be encoded")
        return frames(push, encoding)

    monkeypatch.setattr(LivePush, "frames", break_one)
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context["exception"]))
    caplog.set_level(logging.CRITICAL)
    world.ring(broken, 0, 1)
    await world.calm()
    assert [str(error) for error in failures] == ["cannot be encoded"]
    msg_id = await world.push(2, 3)
    assert (await phones[2].pushed(1), await phones[3].pushed(1)) == ([msg_id], [msg_id])
