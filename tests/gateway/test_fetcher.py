"""Inboxes read for many connections at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import cast

import pytest

import gateway.fetcher
import gateway.hub
from broker.model import OwedRequest, StoredMessage
from broker.store import StoreUnavailable
from broker.store_sqlite import SqliteStore
from gateway.live import Encoding, Frames, LivePush
from gateway.mqtt import Reason
from tests.gateway.world import World

Pages = list[list[StoredMessage]]


class WatchedStore(SqliteStore):
    """Counts what it is asked, and is away when told to."""

    away = 0
    asked: list[list[int]]  # devnos of each read

    async def fetch_owed(self, requests: Sequence[OwedRequest]) -> Pages:
        if requests:
            self.__dict__.setdefault("asked", []).append([request.devno for request in requests])
            if self.away:
                self.away -= 1
                raise StoreUnavailable("away")
        return await super().fetch_owed(requests)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = await World(tmp_path, store=WatchedStore).open(devices=4)
    yield world
    await world.close()


def watched(world: World) -> WatchedStore:
    return cast("WatchedStore", world.store)


async def test_a_device_that_is_owed_nothing_costs_no_read(world: World) -> None:
    await world.online(0)
    await world.push(1, 2)
    await world.online(1)
    assert "asked" not in watched(world).__dict__


async def test_devices_that_come_together_share_a_read_and_the_encoded_push(world: World) -> None:
    await world.online(3)
    world.limits = type(world.limits)(fanout_limit=10)
    msg_id = await world.push(0, 1, 2)
    await world.calm()
    phones = [world.connect(devno) for devno in range(3)]
    for phone in phones:
        assert await phone.pushed(1) == [msg_id]
    assert watched(world).asked == [[0, 1, 2]]
    pushes = {id(push) for phone in phones for push in (phone.session.unacked or {}).values()}
    assert len(pushes) == 1


async def test_a_read_that_failed_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gateway.fetcher, "RETRY_AFTER", 0)
    await world.online(3)
    msg_id = await world.push(0)
    await world.calm()
    watched(world).away = 2
    phone = world.connect(0)
    assert await phone.pushed(1) == [msg_id]
    assert watched(world).asked == [[0]] * 3
    assert "inboxes not read, trying again: away" in caplog.text


async def test_who_left_while_the_store_was_away_is_not_asked_for_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.fetcher, "RETRY_AFTER", 0)
    await world.online(3)
    ids = [await world.push(0), await world.push(1)]
    await world.calm()
    watched(world).away = 1
    gone, stays = world.connect(0), world.connect(1)
    await world.when(lambda: watched(world).__dict__.get("asked"))
    gone.leave()
    assert await stays.pushed(1) == ids[1:]
    assert watched(world).asked == [[0, 1], [1]]
    assert gone.got == []


async def test_a_long_inbox_is_read_page_by_page_as_there_is_room(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.hub, "ROWS", 2)
    ids = [await world.push(0) for _ in range(5)]
    phone = await world.online(0, properties={"receive_maximum": 2})
    assert phone.got == ids[:2]
    assert watched(world).asked == [[0]]  # no room: the rest stays in the store
    phone.ack()
    assert await phone.pushed(4) == ids[:4]
    phone.ack(*ids[2:])
    assert await phone.pushed(5) == ids


async def test_a_page_whose_doorbell_is_lost_is_handed_over_in_the_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.fetcher, "HOLD", 0)
    await world.online(3)
    msg_id = await world.append(0)  # never rings
    assert await world.connect(0).pushed(1) == [msg_id]


async def test_a_push_that_cannot_be_encoded_harms_nobody_else(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await world.online(3)
    broken, good = await world.push(0), await world.push(1)
    await world.calm()
    frames = LivePush.frames

    def break_one(push: LivePush, encoding: Encoding) -> Frames:
        if push.msg_id == broken:
            raise ValueError("cannot be encoded")
        return frames(push, encoding)

    monkeypatch.setattr(LivePush, "frames", break_one)
    phones = [world.connect(0), world.connect(1)]
    assert await phones[1].pushed(1) == [good]
    assert (phones[0].closed, phones[0].goodbye.reason) == (True, Reason.UNSPECIFIED_ERROR)
    world.ring(broken, 3)
    world.ring(later := await world.append(1), 1)
    assert await phones[1].pushed(2) == [good, later]
    assert "pushes of 'device-0' not sent" in caplog.text
    assert "a doorbell was not followed" in caplog.text
