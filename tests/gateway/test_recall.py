"""Pushes that are taken back, replaced, or go before others, as devices see it."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgpack
import orjson
import pytest
from msgspec.structs import replace
from pyroaring import BitMap

import gateway.fanout
from broker.broker import Broker
from broker.bus import Recalled
from broker.model import NewMessage, StoredMessage, Withdrawn
from gateway.live import encoding, render
from tests.gateway.world import DAY, Phone, World

EVERYONE = range(5)
WINDOW = {"properties": {"session_expiry_interval": 600, "receive_maximum": 1}}


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """With one device to a slice of a walk."""
    monkeypatch.setattr(gateway.fanout, "SLICE", 1)
    world = await World(tmp_path).open(devices=len(EVERYONE))
    yield world
    await world.close()


async def recall(world: World, *msg_ids: int) -> None:
    world.bus.ring([Recalled(await world.store.recall(world.app.app_id, msg_ids, world.wall))])
    await world.calm()


def payloads(phone: Phone) -> list[dict[str, Any]]:
    return [orjson.loads(push.payload) for push in phone.pushes]


async def counts(world: World, msg_id: int) -> dict[str, int]:
    await world.recorded()
    record = (await world.store.find_messages(world.app.app_id, [msg_id]))[msg_id]
    return {state.value: count for state, count in record.counts(world.wall).items() if count}


async def test_a_device_that_was_away_never_sees_what_was_recalled(world: World) -> None:
    targeted, broadcast, kept = await world.push(0), await world.push(*EVERYONE), await world.push(0)
    await recall(world, targeted, broadcast)
    phone = await world.online(0)
    assert await phone.pushed(1) == [kept]


async def test_what_waits_behind_a_full_window_is_not_sent_after_its_recall(world: World) -> None:
    phone = await world.online(0, **WINDOW)
    pushed = [await world.push(0) for _ in range(3)] + [await world.push(*EVERYONE), await world.push(0)]
    await phone.pushed(1)
    await recall(world, *pushed[1:4])
    phone.ack()
    assert await phone.pushed(2) == [pushed[0], pushed[4]]
    assert await counts(world, pushed[3]) == {"recalled": 5}


async def test_a_page_that_was_read_before_the_recall_is_not_sent_after_it(world: World) -> None:
    phone = await world.online(0, **WINDOW)
    first, second = await world.push(0), await world.push(0)
    await phone.pushed(1)
    await world.calm()
    withdrawn = await world.store.recall(world.app.app_id, [second], world.wall)
    world.bus.ring([Recalled(withdrawn)])
    phone.ack()
    await world.calm()
    assert phone.got == [first]


async def test_a_second_recall_does_not_make_the_node_forget_the_first(world: World) -> None:
    phone = await world.online(0, **WINDOW)
    await world.push(0)
    second = await world.push(0)
    await phone.pushed(1)
    await recall(world, second)
    await recall(world, second)
    assert list(world.hub.recalled[second][0]) == [0]


async def test_a_walk_leaves_out_those_it_was_recalled_for(world: World) -> None:
    phones = [await world.online(devno) for devno in EVERYONE]
    broadcast = await world.push(*EVERYONE)
    await world.when(lambda: sum(map(len, (phone.got for phone in phones))) == 2)
    gone = Withdrawn(world.app.app_id, broadcast, BitMap([2, 4]), BitMap())  # no turn of the loop in between
    world.node.fanout.recalled(world.hub, Recalled([gone]))
    assert world.node.fanout.left == 1
    await world.calm()
    assert [bool(phone.got) for phone in phones] == [True, True, False, True, False]
    assert world.node.fanout.walking == 0


async def test_one_that_is_acknowledged_after_its_recall_was_delivered(world: World) -> None:
    phone = await world.online(0)
    msg_id = await world.push(0)
    await phone.pushed(1)
    await recall(world, msg_id)
    assert await counts(world, msg_id) == {"recalled": 1}
    phone.ack()
    await world.calm()
    assert await counts(world, msg_id) == {"delivered": 1}


async def test_recalls_are_forgotten_when_no_page_can_be_on_its_way_any_more(world: World) -> None:
    phone = await world.online(0)
    await recall(world, await world.push(1))
    assert len(world.hub.recalled) == 1
    world.hub.forget(world.node.clock.now + 3600)
    assert not world.hub.recalled
    assert not phone.closed


async def test_another_apps_recall_takes_nothing_from_this_one(world: World) -> None:
    phone = await world.online(0, **WINDOW)
    first, second = await world.push(0), await world.push(0)
    await phone.pushed(1)
    (gone,) = await world.store.recall(world.app.app_id, [second], world.wall)
    world.node.fanout.recalled(world.hub, Recalled([replace(gone, app_id=world.app.app_id + 1)]))
    assert not world.hub.recalled
    assert first in phone.got


# Told to devices


async def test_devices_are_told_to_remove_a_withdrawn_push(world: World) -> None:
    broker = Broker(world.store, world.bus, world.limits, world.clock)
    phone, absent = await world.online(0), 1
    msg_id = await world.push(0, absent)
    await phone.pushed(1)
    phone.ack()
    await world.calm()
    await world.recorded()
    await broker.withdrawals.withdraw(world.app, msg_id)
    await phone.pushed(2)
    notice = payloads(phone)[1]
    assert notice == {"msg_id": notice["msg_id"], "recall": str(msg_id)}
    assert int(notice["msg_id"]) > msg_id
    late = await world.online(absent)
    assert late.got == []
    await broker.close()


async def test_an_override_says_which_push_it_takes_the_place_of(world: World) -> None:
    phone = await world.online(0)
    old = await world.push(0)
    new = NewMessage(
        world.app.app_id, b'{"message":{"msg_content":"x"}}', BitMap([0]), False, world.wall, world.wall + DAY,
        replaces=old,
    )  # fmt: skip
    await world.store.append([new])
    await phone.pushed(1)
    phone.leave()
    again = await world.online(0)
    await again.until(lambda phone: phone.pushes)
    assert payloads(again)[-1]["override"] == str(old)


async def test_a_part_goes_by_the_id_of_the_whole(world: World) -> None:
    whole = await world.append(*EVERYONE)
    part = NewMessage(
        world.app.app_id, b'{"notification":{"alert":"x"}}', BitMap([0]), False, world.wall, world.wall + DAY,
        part_of=whole,
    )  # fmt: skip
    await world.store.append([part])
    await recall(world, whole)
    (owed,) = await world.store.append([replace(part, body=b'{"notification":{"alert":"y"}}')])
    phone = await world.online(0)
    assert await phone.pushed(1) == [whole]
    assert owed.msg_id != whole


# Priority


async def test_a_broadcast_of_high_priority_walks_before_those_under_way(world: World) -> None:
    phones = [await world.online(devno) for devno in EVERYONE]
    walking = await world.append(*EVERYONE)
    urgent = NewMessage(
        world.app.app_id, b'{"notification":{"alert":"!"}}', BitMap(EVERYONE), True, world.wall, world.wall + DAY,
        high=True,
    )  # fmt: skip
    (appended,) = await world.store.append([urgent])
    world.ring(walking, *EVERYONE)
    await world.when(lambda: any(phone.got for phone in phones))
    hub = world.hub
    (row,) = [
        row
        for row in await world.store.live_broadcasts(world.app.app_id)
        if row.message.msg_id == appended.msg_id
    ]
    assert row.message.high
    added = hub.add_broadcast(row)
    if added is not None:
        world.node.fanout._begin(hub, hub.walk(*added))
        assert world.node.fanout._walks[0][1].push.msg_id == appended.msg_id
    await world.calm()
    assert [phone.got for phone in phones] == [[walking, appended.msg_id]] * len(phones)


# What was sent and not acknowledged


async def test_what_a_lost_connection_had_not_acknowledged_is_recorded_as_sent(world: World) -> None:
    phone = await world.online(0)
    msg_id = await world.push(0)
    await phone.pushed(1)
    phone.leave()
    await world.recorded()
    record = (await world.store.find_messages(world.app.app_id, [msg_id]))[msg_id]
    assert (list(record.sent), list(record.delivered)) == ([0], [])
    (step,) = await world.store.find_steps(world.app.app_id, msg_id)
    assert (step.step, step.node) == ("sent", "node-1")
    assert abs(step.start - world.wall) < 60


# Compression


@pytest.mark.parametrize("packed", [False, True])
def test_a_push_is_compressed_where_that_is_shorter(packed: bool) -> None:
    long, short = ({"notification": {"alert": text}} for text in ("hello " * 50, "hi"))
    for body, smaller in ((long, True), (short, False)):
        message = StoredMessage(7, 1, orjson.dumps(body), 0.0, 1.0)
        plain = render(message, encoding(5, "other", packed))
        asked = render(message, encoding(5, "other", packed, deflated=True))
        assert (len(asked) < len(plain)) is smaller
        assert (asked[:1] == b"\x78") is smaller
        content = zlib.decompress(asked) if smaller else asked
        assert content == plain
        assert (msgpack.unpackb(content) if packed else orjson.loads(content)) == {"msg_id": "7", **body}


@pytest.mark.parametrize("asked", [False, True])
async def test_a_device_gets_compression_only_if_it_asks_for_it(world: World, asked: bool) -> None:
    properties: dict[str, Any] = {"session_expiry_interval": 600}
    if asked:
        properties["user_properties"] = (("compression", "deflate"),)
    phone = await world.online(0, properties=properties)
    long = NewMessage(
        world.app.app_id, orjson.dumps({"notification": {"alert": "x" * 500}}), BitMap([0]), False,
        world.wall, world.wall + DAY,
    )  # fmt: skip
    await world.store.append([long])
    phone.leave()
    again = await world.online(0, properties=properties)
    await again.until(lambda phone: phone.pushes)
    assert (again.pushes[0].payload[:1] == b"\x78") is asked
