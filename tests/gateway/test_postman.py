"""Ordinary messages on their way to many subscribers: order, turns, and how much may be under way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from broker.metrics import Metrics
from broker.model import App
from gateway.fanout import SLICE
from gateway.hub import Hub
from gateway.journal import MESSAGE
from gateway.live import encoding
from gateway.mailbox import MailboxLimits
from gateway.messages import TopicCopy, TopicMessage
from gateway.metrics import NodeMetrics
from gateway.mqtt import Disconnect, Puback, Publish, Reason, Subscription, Unsubscribe, decode
from gateway.postman import MAX_WAITING, Postman, Targets
from gateway.session import Session
from gateway.wheel import Clock
from tests.gateway.topic_world import (
    after_ping,
    got,
    payloads,
    publish,
    rows,
    subscribe,
    topic_world,
)
from tests.gateway.world import Phone, World
from tests.patience import PATIENCE

MANY: Final = 10_000
SENDER: Final = 3
FLEETING: Final[Any] = {"clean_start": True, "properties": {}}


class Ear:
    """A subscriber's connection that keeps what it is sent."""

    epoch = 0

    def __init__(self) -> None:
        self.session: Session | None = Session(encoding(5, "other"))
        self.mailbox = self.session.own_mailbox()
        self.mailbox.member = self
        self.blocked = False
        self.deaf = False  # whatever it is sent raises
        self.writes: list[bytes] = []

    def send(self, data: bytes) -> None:
        if self.deaf:
            raise RuntimeError("a bug")
        self.writes.append(data)

    def send_held(self) -> None: ...

    def catch_up(self) -> None: ...

    def close(self, label: str, reason: Reason | None = None, text: str = "") -> None: ...

    @property
    def heard(self) -> list[bytes]:
        data, start, found = b"".join(self.writes), 0, []
        while start < len(data):
            packet, start = decode(data, start, 5, 1 << 20) or (None, len(data))
            assert isinstance(packet, Publish)
            found.append(packet.payload)
        return found


@pytest.fixture
def hub() -> Hub:
    metrics = NodeMetrics(Metrics())
    app = App(1, "a" * 24, "name", "m" * 24, "d" * 24, b"k" * 32, open=True, created_at=0.0)
    return Hub(app, max_retained=1, max_retained_bytes=1, too_large=metrics.too_large)


@pytest.fixture
def postman() -> Postman:
    return Postman(Clock(), NodeMetrics(Metrics()), lambda work: work.close())


def targets(ears: Sequence[Ear], payload: bytes, qos: int = 0) -> Targets:
    copy = TopicCopy(TopicMessage("t", payload, qos), qos)
    return Targets([ear.mailbox for ear in ears], [copy for _ in ears])


async def finished(postman: Postman) -> int:
    """The turns of the loop until everything is delivered."""
    turns = 0
    while postman.waiting:
        await asyncio.sleep(0)
        turns += 1
    assert not postman._convoys
    assert not postman._turns
    return turns


# Order and turns


async def test_a_message_to_few_waits_for_the_one_to_many_before_it_on_its_topic(
    hub: Hub, postman: Postman
) -> None:
    ears = [Ear() for _ in range(10 * SLICE)]
    postman.deliver(hub, "t", targets(ears, b"many"))
    postman.deliver(hub, "t", targets(ears[-1:], b"few"))
    postman.deliver(hub, "t", targets(ears[:5], b"some"))
    postman.deliver(hub, "t", targets(ears, b"all"))
    await finished(postman)
    assert ears[-1].heard == [b"many", b"few", b"all"]
    assert ears[0].heard == [b"many", b"some", b"all"]
    assert all(ear.heard == [b"many", b"all"] for ear in ears[5:-1])


async def test_a_message_on_another_topic_or_in_another_app_does_not_wait(hub: Hub, postman: Postman) -> None:
    ears = [Ear() for _ in range(10 * SLICE)]
    other = Hub(hub.app, max_retained=1, max_retained_bytes=1, too_large=hub._too_large)
    postman.deliver(hub, "t", targets(ears, b"many"))
    postman.deliver(hub, "u", targets(ears[-1:], b"few"))
    postman.deliver(other, "t", targets(ears[-2:-1], b"few"))
    assert (ears[-1].heard, ears[-2].heard, ears[0].heard) == ([b"few"], [b"few"], [])
    await finished(postman)


async def test_messages_under_way_together_come_in_one_write_each_and_in_order(
    hub: Hub, postman: Postman
) -> None:
    ears = [Ear() for _ in range(10 * SLICE)]
    for n in range(4):
        postman.deliver(hub, "t", targets(ears, b"%d" % n))
        if n == 1:
            await asyncio.sleep(0)
            assert [bool(ear.heard) for ear in (ears[0], ears[-1])] == [True, False]
    await finished(postman)
    assert all(ear.heard == [b"0", b"1", b"2", b"3"] for ear in ears)
    assert len(ears[-1].writes) == 1
    assert len(ears[0].writes) == 2  # those that joined later came round


async def test_many_topics_take_turns(hub: Hub, postman: Postman) -> None:
    crowds = [[Ear() for _ in range(20 * SLICE)] for _ in range(4)]
    for n, ears in enumerate(crowds):
        postman.deliver(hub, str(n), targets(ears, b"x"))
    while not any(ears[-1].heard for ears in crowds):
        await asyncio.sleep(0)
        reached = [sum(bool(ear.writes) for ear in ears) for ears in crowds]
        assert max(reached) - min(reached) <= SLICE
    await finished(postman)


async def test_everything_else_runs_between_slices(hub: Hub, postman: Postman) -> None:
    for n in range(3):
        postman.deliver(hub, str(n), targets([Ear() for _ in range(10 * SLICE)], b"x"))
    assert await finished(postman) >= 30


async def test_what_is_delivered_at_once_is_bounded_in_one_turn(hub: Hub, postman: Postman) -> None:
    ears = [Ear() for _ in range(SLICE)]
    for _ in range(100):
        postman.deliver(hub, "t", targets(ears, b"x"))
    assert len(ears[0].heard) < 20
    await finished(postman)
    assert len(ears[0].heard) == 100


@pytest.mark.parametrize("last", [False, True])
async def test_one_that_cannot_be_sent_to_stops_nobody_else(
    hub: Hub, postman: Postman, caplog: pytest.LogCaptureFixture, last: bool
) -> None:
    ears = [Ear() for _ in range(2 * SLICE)]
    ears[-1 if last else 1].deaf = True
    postman.deliver(hub, "t", targets(ears, b"x"))
    postman.deliver(hub, "t", targets(ears[:3], b"y"))
    await finished(postman)
    assert [bool(ear.heard) for ear in ears] == [not ear.deaf for ear in ears]
    assert ears[0].heard == [b"x", b"y"]
    assert caplog.text.count("a message was not handed over") == (1 if last else 2)


async def test_who_is_blocked_or_away_gets_what_can_wait(hub: Hub, postman: Postman) -> None:
    blocked, away = Ear(), Ear()
    blocked.blocked = True
    away.mailbox.session = away.mailbox.member = None
    for qos in (0, 1):
        postman.deliver(hub, "t", targets([blocked, away], b"%d" % qos, qos))
    assert [copy.message.payload for copy in blocked.mailbox.queue] == [b"1"]
    assert [copy.message.payload for copy in away.mailbox.queue] == [b"1"]
    assert postman._metrics.topic_dropped.value == 1  # nobody waits for QoS 0 who is away


# Too much


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = await topic_world(tmp_path)
    yield world
    await world.close()


@pytest.fixture
async def sender(world: World) -> Phone:
    return await world.online(SENDER, **FLEETING)


def listen(world: World, count: int, topic: str = "t") -> list[Ear]:
    ears = [Ear() for _ in range(count)]
    for ear in ears:
        world.hub.subscriptions.add((Subscription(topic), 0), ear.mailbox)
    return ears


@pytest.mark.parametrize("senders", [1, 3])
async def test_who_floods_many_subscribers_is_not_read_from_while_too_much_waits(
    world: World, senders: int
) -> None:
    floods = [await world.online(n, **FLEETING) for n in range(senders)]
    ears, postman, each = listen(world, MANY), world.node.postman, 40 // senders
    most = paused = 0
    for phone in floods:
        phone.send(*(Publish("t", b"%d %d" % (phone.connection.epoch, n)) for n in range(each)))
    async with asyncio.timeout(PATIENCE):
        while postman.waiting:
            most = max(most, postman.waiting)
            paused += not any(phone.transport.reading for phone in floods)
            await asyncio.sleep(0)
    assert MAX_WAITING < most <= MAX_WAITING + MANY
    assert paused > 10
    assert all(phone.transport.reading for phone in floods)
    for ear in (ears[0], ears[MANY // 2], ears[-1]):
        for phone in floods:
            mine = [said for said in ear.heard if said.startswith(b"%d " % phone.connection.epoch)]
            assert mine == [b"%d %d" % (phone.connection.epoch, n) for n in range(each)]


async def test_whoever_does_not_publish_is_read_from_meanwhile(world: World, sender: Phone) -> None:
    listen(world, MANY)
    other = await world.online(0)
    await subscribe(other, "u")
    sender.send(*(Publish("t", b"x") for _ in range(20)))
    assert world.node.postman.waiting > MAX_WAITING
    await after_ping(other)
    other.send(Publish("u", b"waits", 1, packet_id=1))
    assert got(other, Puback) == []
    await other.until(lambda phone: payloads(phone) == [b"waits"] and got(phone, Puback))
    await finished(world.node.postman)


async def test_who_waits_to_publish_and_goes_is_forgotten(world: World, sender: Phone) -> None:
    listen(world, MANY)
    sender.send(*(Publish("t", b"x") for _ in range(20)))
    assert sender.connection in world.node.postman._paused
    sender.leave()
    await finished(world.node.postman)
    assert not world.node.postman._paused


# Subscribers that go meanwhile


async def subscribers(world: World, qos: int, **values: Any) -> list[Phone]:
    phones = [await world.online(n, **values) for n in range(3)]
    for phone in phones:
        await subscribe(phone, "t", qos=qos)
    return phones


def crowd_before(world: World) -> list[Ear]:
    """So many that a message is under way for a while."""
    return listen(world, 4 * SLICE)


async def test_who_goes_meanwhile_gets_it_when_it_comes_back(world: World, sender: Phone) -> None:
    crowd_before(world)
    first, second, third = await subscribers(world, 1)
    sender.send(Publish("t", b"x", 1, packet_id=1))
    assert world.node.postman.waiting
    second.leave()
    third.leave()
    back = await world.online(2)
    await finished(world.node.postman)
    assert payloads(first) == payloads(back) == payloads(await world.online(1)) == [b"x"]


@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("clean", [False, True], ids=["disconnect", "clean start"])
async def test_a_durable_session_that_ends_meanwhile_leaves_nothing(
    world: World, sender: Phone, qos: int, clean: bool
) -> None:
    crowd_before(world)
    phones = await subscribers(world, qos)
    sender.send(Publish("t", b"x", qos, packet_id=1))
    assert world.node.postman.waiting
    for devno, phone in enumerate(phones):
        if clean:
            phone.leave()
            await world.online(devno, **FLEETING)
        else:
            phone.send(Disconnect(properties={"session_expiry_interval": 0}))
    await finished(world.node.postman)
    assert await rows(world) == []


async def test_who_unsubscribes_meanwhile_may_get_it_and_keeps_nothing(world: World, sender: Phone) -> None:
    crowd_before(world)
    (phone, *_) = await subscribers(world, 1)
    sender.send(Publish("t", b"x", 1, packet_id=1))
    phone.send(Unsubscribe(2, ("t",)))
    phone.leave()
    assert world.node.postman.waiting
    await finished(world.node.postman)
    assert payloads(await world.online(0)) == []
    assert not [row for row in await rows(world) if row.session == 1]


async def test_a_durable_session_that_is_away_keeps_so_many_messages_and_the_store_no_more(
    world: World, sender: Phone
) -> None:
    phone = await world.online(0)
    await subscribe(phone, "t")
    phone.leave()
    most = MailboxLimits().queued_messages
    for start in range(0, most + 200, 100):
        await publish(sender, "t", *(b"%d" % n for n in range(start, start + 100)))
    kept = [copy.message.payload for copy in world.hub.mailboxes["d/device-0"].queue]
    assert kept == [b"%d" % n for n in range(most)]
    assert len([row for row in await rows(world) if row.kind == MESSAGE]) == most
    assert world.node.metrics.topic_dropped.value == 200
