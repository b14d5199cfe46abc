"""The journal (decision 0008): who waits is told when it is safe, and what could not be written is not forgotten."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import pytest
from pyroaring import BitMap

from broker.model import SessionItem
from broker.store import StoreError, StoreFull
from gateway import journal as journal_module
from gateway.journal import COPIES, MESSAGE, SENT, SESSION, SHARED, SUBSCRIPTION, Journal
from gateway.messages import TopicCopy, TopicMessage
from gateway.mqtt import (
    Disconnect,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Reason,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
)
from tests.gateway.topic_world import SlowStore, got, payloads, rows, subscribe, topic_world
from tests.gateway.world import World

SENDER: Final = 3
FLEETING: Final[Any] = {"clean_start": True, "properties": {}}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = await topic_world(tmp_path, store=SlowStore)
    yield world
    store(world).full = False
    store(world).release()
    await world.close()


@pytest.fixture
def slow(world: World) -> SlowStore:
    return store(world)


def store(world: World) -> SlowStore:
    assert isinstance(world.store, SlowStore)
    return world.store


class Told:
    """Who waited, and what they heard."""

    def __init__(self) -> None:
        self.news: list[tuple[str, StoreError | None]] = []

    def __call__(self, name: str) -> Callable[[StoreError | None], None]:
        return lambda error: self.news.append((name, error))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.news]


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
async def journal(world: World) -> Journal:
    """The node's, with nothing noted."""
    await world.node.journal.saved()
    store(world).writes.clear()
    return world.node.journal


def values(items: list[SessionItem]) -> dict[Any, bytes | None]:
    return {item.item: item.value for item in items}


async def stored(world: World) -> dict[Any, bytes | None]:
    return values(await world.store.list_session_items(world.app.app_id))


# Who waits


async def test_who_waits_is_told_after_the_commit_and_only_then(
    world: World, slow: SlowStore, journal: Journal, told: Told
) -> None:
    slow.hold()
    journal.note(world.app.app_id, 9, SESSION, 0, b"x")
    journal.when_saved(told("first"))
    await slow.asked.wait()
    await world.turns()
    assert told.news == []
    slow.release()
    await world.when(lambda: told.news)
    assert told.news == [("first", None)]
    assert await stored(world) == {0: b"x"}


async def test_with_nothing_to_write_nobody_waits(slow: SlowStore, journal: Journal, told: Told) -> None:
    journal.when_saved(told("first"))
    assert told.names == ["first"]
    assert slow.writes == []


async def test_waits_share_a_commit(world: World, slow: SlowStore, journal: Journal, told: Told) -> None:
    for n in range(3):
        journal.note(world.app.app_id, 9, SUBSCRIPTION, f"f{n}", b"x")
        journal.when_saved(told(str(n)))
    await world.when(lambda: told.news)
    assert told.names == ["0", "1", "2"]
    assert len(slow.writes) == 1


async def test_what_is_noted_during_a_write_waits_for_the_next(
    world: World, slow: SlowStore, journal: Journal, told: Told
) -> None:
    slow.hold()
    journal.note(world.app.app_id, 9, SESSION, 0, b"x")
    journal.when_saved(told("first"))
    await slow.asked.wait()
    journal.when_saved(told("joins"))  # all that was noted is in the write under way
    journal.note(world.app.app_id, 9, SESSION, 0, b"y")
    journal.when_saved(told("second"))
    slow.release()
    await world.when(lambda: len(told.news) == 3)
    assert told.names == ["first", "joins", "second"]
    assert [values(items) for items in slow.writes] == [{0: b"x"}, {0: b"y"}]


async def test_what_nobody_waits_for_is_written_soon_and_once(
    world: World, slow: SlowStore, journal: Journal
) -> None:
    for value in (b"1", b"2", None, b"3"):
        journal.note(world.app.app_id, 9, SESSION, 0, value)
    await slow.asked.wait()
    assert [values(items) for items in slow.writes] == [{0: b"3"}]


async def test_who_fails_does_not_keep_the_news_from_others(
    world: World, journal: Journal, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: StoreError | None) -> None:
        raise RuntimeError("one of them")

    journal.note(world.app.app_id, 9, SESSION, 0, b"x")
    journal.when_saved(fail)
    journal.when_saved(told("other"))
    await world.when(lambda: told.news)
    assert "one of them" in caplog.text
    await journal.saved()


async def test_who_waits_while_others_are_told_is_told_after_them(
    world: World, journal: Journal, told: Told
) -> None:
    journal.note(world.app.app_id, 9, SESSION, 0, b"x")
    journal.when_saved(lambda _: journal.when_saved(told("last")))
    journal.when_saved(told("first"))
    await world.when(lambda: len(told.news) == 2)
    assert told.names == ["first", "last"]


# Writes that fail


async def test_a_failed_write_tells_who_waits_and_is_tried_again_under_what_came_later(
    world: World,
    slow: SlowStore,
    journal: Journal,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_AFTER", 0.01)
    slow.full = True
    journal.note(world.app.app_id, 9, SUBSCRIPTION, "kept", b"old")
    journal.note(world.app.app_id, 9, SUBSCRIPTION, "changed", b"old")
    journal.when_saved(told("early"))
    await world.when(lambda: told.news)
    assert isinstance(told.news[0][1], StoreFull)
    assert await stored(world) == {}
    journal.note(world.app.app_id, 9, SUBSCRIPTION, "changed", b"new")
    tries = len(slow.writes)
    while len(slow.writes) < tries + 2:  # by itself
        slow.asked.clear()
        await slow.asked.wait()
    slow.full = False
    journal.when_saved(told("late"))
    await world.when(lambda: len(told.news) == 2)
    assert told.news[1] == ("late", None)
    assert await stored(world) == {"kept": b"old", "changed": b"new"}
    assert world.node.metrics.session_errors.value >= 3
    assert "no space left" in caplog.text


async def test_close_writes_everything(world: World, slow: SlowStore, told: Told) -> None:
    phone = await world.online(0)
    await subscribe(phone, "news")
    phone.send(Unsubscribe(2, ("news",)), Subscribe(3, (Subscription("other", 1),)))
    phone.leave()
    await world.node.close()
    names = [item.item for item in await world.store.list_session_items(world.app.app_id)]
    assert names == ["other", 0]


async def test_close_tells_who_waits_that_it_failed(
    world: World, slow: SlowStore, journal: Journal, told: Told
) -> None:
    slow.full = True
    journal.note(world.app.app_id, 9, SESSION, 0, b"x")
    journal.when_saved(told("somebody"))
    await journal.close()
    assert isinstance(told.news[0][1], StoreFull)


async def test_while_the_store_is_away_messages_that_came_and_went_do_not_add_up(
    world: World, slow: SlowStore, journal: Journal
) -> None:
    slow.full = True
    await world.online(0)
    for number in range(1, 500):
        message = TopicMessage("t", b"x", 1)
        message.number = number
        copy = TopicCopy(message, 1)
        copy.left = BitMap([9])
        message.copies.append(copy)
        journal.note_message(world.app.app_id, message)
        with pytest.raises(StoreFull):
            await journal.saved()
        copy.left.clear()
        journal.touch(world.app.app_id, message)
    journal.note(world.app.app_id, 9, SESSION, 0, None)
    with pytest.raises(StoreFull):
        await journal.saved()
    assert len(journal._noted) < 10


# What peers are told


async def test_suback_and_unsuback_wait_for_the_subscription(world: World, slow: SlowStore) -> None:
    phone = await world.online(0)
    slow.hold()
    phone.send(Subscribe(1, (Subscription("news", 1),)))
    await slow.asked.wait()
    await world.turns()
    assert got(phone, Suback) == []
    slow.release()
    await phone.until(lambda phone: got(phone, Suback))
    slow.hold()
    phone.send(Unsubscribe(2, ("news",)))
    await slow.asked.wait()
    await world.turns()
    assert got(phone, Unsuback) == []
    slow.release()
    await phone.until(lambda phone: got(phone, Unsuback))


async def test_a_session_that_is_not_durable_waits_for_nothing(world: World, slow: SlowStore) -> None:
    durable, fleeting = await world.online(0), await world.online(1, **FLEETING)
    slow.hold()
    durable.send(Subscribe(1, (Subscription("news", 1),)))
    await slow.asked.wait()
    fleeting.send(Subscribe(1, (Subscription("other", 2),)), Publish("other", b"x", 2, packet_id=1))
    fleeting.send(Pubrel(1), Unsubscribe(2, ("other",)))
    kinds = [type(packet) for packet in fleeting.packets[1:]]
    assert kinds == [Suback, Publish, Pubrec, Pubcomp, Unsuback]
    assert got(durable, Suback) == []


@pytest.mark.parametrize("qos", [1, 2])
async def test_the_publisher_is_told_when_the_message_is_saved_for_durable_subscribers(
    world: World, slow: SlowStore, qos: int
) -> None:
    sender = await world.online(SENDER, **FLEETING)
    here, away = await world.online(0), await world.online(1)
    for phone in (here, away):
        await subscribe(phone, "news", qos=qos)
    away.leave()
    await world.node.journal.saved()
    slow.hold()
    sender.send(Publish("news", b"x", qos, packet_id=1))
    await slow.asked.wait()
    await world.turns()
    assert not got(sender, (Puback, Pubrec)[qos - 1])
    assert payloads(here) == ([b"x"] if qos == 1 else [])  # QoS 2 waits for its packet id
    slow.release()
    await sender.until(lambda phone: got(phone, (Puback, Pubrec)[qos - 1]))
    await here.until(payloads)


async def test_each_step_of_qos_2_waits_for_the_one_before(world: World, slow: SlowStore) -> None:
    sender = await world.online(SENDER, **FLEETING)
    phone = await world.online(0)
    await subscribe(phone, "news", qos=2)
    sender.send(Publish("news", b"x", 2, packet_id=1))
    await phone.until(payloads)
    await world.node.journal.saved()
    steps = [
        (Pubrec(got(phone, Publish)[0].packet_id), Pubrel),
        (Publish("up", b"x", 2, packet_id=5), Pubrec),
    ]
    for sent, answer in [*steps, (Pubrel(5), Pubcomp)]:
        slow.hold()
        phone.send(sent)
        await slow.asked.wait()
        await world.turns()
        assert not got(phone, answer), answer
        slow.release()
        await phone.until(lambda phone, answer=answer: got(phone, answer))


async def test_what_qos_2_said_before_waits_on_the_next_connection_too(world: World, slow: SlowStore) -> None:
    """The connection ends before the step is saved, and the client comes back faster than the store."""
    sender = await world.online(SENDER, **FLEETING)
    phone = await world.online(0)
    await subscribe(phone, "news", qos=2)
    sender.send(Publish("news", b"x", 2, packet_id=1))
    await phone.until(payloads)
    await world.node.journal.saved()
    slow.hold()
    phone.send(Publish("up", b"x", 2, packet_id=5), Pubrec(got(phone, Publish)[0].packet_id))
    await slow.asked.wait()
    phone.leave()
    again = world.connect(0)
    again.send(Publish("up", b"x", 2, True, True, packet_id=5), Pubrel(77))
    await again.until(lambda phone: phone.packets)
    await world.turns()
    assert (got(again, Pubrel), got(again, Pubrec), got(again, Pubcomp)) == ([], [], [])
    slow.release()
    await again.until(lambda phone: got(phone, Pubcomp))
    assert got(again, Pubcomp) == [Pubcomp(77, Reason.PACKET_IDENTIFIER_NOT_FOUND)]
    await again.until(lambda phone: got(phone, Pubrel) and got(phone, Pubrec))
    assert payloads(again) == []


@pytest.mark.parametrize("version", [4, 5])
async def test_a_connection_whose_change_cannot_be_saved_is_closed_and_not_told_success(
    world: World, slow: SlowStore, version: int
) -> None:
    phone = await world.online(0, version=version, **({} if version == 5 else {"properties": {}}))
    slow.full = True
    phone.send(Subscribe(1, (Subscription("news", 1),)))
    await world.when(lambda: phone.closed)
    assert got(phone, Suback) == []
    assert [p.reason for p in got(phone, Disconnect)] == [Reason.IMPLEMENTATION_SPECIFIC_ERROR] * (
        version - 4
    )
    assert world.node.metrics.disconnects.labels("store unavailable").value == 1
    slow.full = False
    again = await world.online(0, version=version, **({} if version == 5 else {"properties": {}}))
    assert (await subscribe(again, "news")).reasons == (Reason.GRANTED_QOS_1,)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("qos", [1, 2])
async def test_a_message_that_cannot_be_saved_is_not_acknowledged(
    world: World, slow: SlowStore, version: int, qos: int
) -> None:
    away = await world.online(0)
    await subscribe(away, "news", qos=2)
    away.leave()
    sender = await world.online(SENDER, clean_start=True, version=version, properties={})
    slow.full = True
    sender.send(Publish("news", b"x", qos, packet_id=1))
    answer = (Puback, Pubrec)[qos - 1]
    if version == 5:
        await sender.until(lambda phone: got(phone, answer))
        assert got(sender, answer)[0].reason is Reason.IMPLEMENTATION_SPECIFIC_ERROR
    else:
        await world.when(lambda: sender.closed)
        assert got(sender, answer) == []


async def test_a_message_and_who_waits_for_it_are_one_write(world: World, slow: SlowStore) -> None:
    """Half of it would be a message that never goes, or a packet id without a message."""
    sender, phone = await world.online(SENDER, **FLEETING), await world.online(0)
    await subscribe(phone, "news", qos=2)
    await world.node.journal.saved()
    slow.writes.clear()
    sender.send(Publish("news", b"x", 2, packet_id=1))
    await phone.until(payloads)
    (kinds,) = [{item.kind for item in items} for items in slow.writes]
    assert kinds == {MESSAGE, COPIES, SENT}
    slow.writes.clear()
    packet_id = got(phone, Publish)[0].packet_id
    phone.send(Pubrec(packet_id))
    await phone.until(lambda phone: got(phone, Pubrel))
    phone.send(Pubcomp(packet_id))
    await world.node.journal.saved()
    gone = {(item.session == SHARED, item.kind) for item in slow.writes[-1] if item.value is None}
    assert gone == {(True, MESSAGE), (True, COPIES), (False, SENT)}
    assert not [row for row in await rows(world) if row.kind in (MESSAGE, COPIES, SENT)]


async def test_a_message_that_is_taken_before_it_is_written_needs_no_row(
    world: World, slow: SlowStore
) -> None:
    sender, phone = await world.online(SENDER, **FLEETING), await world.online(0)
    await subscribe(phone, "news")
    await world.node.journal.saved()
    slow.writes.clear()
    sender.send(Publish("news", b"x", 1, packet_id=1))
    phone.send(Puback(got(phone, Publish)[0].packet_id))
    await sender.until(lambda phone: got(phone, Puback))
    assert slow.writes == []
