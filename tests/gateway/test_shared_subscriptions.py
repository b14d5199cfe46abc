"""Shared subscriptions (MQTT5-4.8.2): who gets a message, and who gets it when that one goes. The rules that any
server must follow are in conformance/test_conform_shared.py; here is what ours chooses to do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from gateway.mqtt import Disconnect, Puback, Pubcomp, Publish, Pubrec, Pubrel, Reason
from tests.gateway.topic_world import (
    acknowledge,
    got,
    payloads,
    publish,
    rows,
    subscribe,
    topic_world,
    unsubscribe,
)
from tests.gateway.world import Phone, World

GROUP: Final = "$share/group/work"
SENDER: Final = 3
FLEETING: Final[Any] = {"clean_start": True, "properties": {}}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = await topic_world(tmp_path)
    yield world
    await world.close()


@pytest.fixture
async def sender(world: World) -> Phone:
    return await world.online(SENDER, **FLEETING)


async def member(world: World, devno: int, *, qos: int = 1, group: str = GROUP, **values: Any) -> Phone:
    """Durable, unless `values` say otherwise."""
    phone = await world.online(devno, **values)
    assert (await subscribe(phone, group, qos=qos)).reasons == (Reason(qos),)
    return phone


async def members(world: World, count: int, **values: Any) -> list[Phone]:
    return [await member(world, devno, **values) for devno in range(count)]


def numbered(count: int) -> list[bytes]:
    return [b"%d" % n for n in range(count)]


# Who gets a message


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("durable", [False, True])
async def test_members_take_turns(world: World, sender: Phone, version: int, durable: bool) -> None:
    options = {"version": version, "clean_start": not durable}
    if not durable or version == 4:
        options["properties"] = {}
    first, second, third = await members(world, 3, **options)
    await publish(sender, "work", *numbered(6))
    assert [payloads(phone) for phone in (first, second, third)] == [
        [b"0", b"3"],
        [b"1", b"4"],
        [b"2", b"5"],
    ]


async def test_who_is_away_is_passed_over_while_somebody_is_there(world: World, sender: Phone) -> None:
    here, away = await members(world, 2)
    away.leave()
    await publish(sender, "work", *numbered(3))
    assert payloads(here) == numbered(3)
    assert payloads(await world.online(1)) == []


async def test_who_does_not_read_is_passed_over(world: World, sender: Phone) -> None:
    here, blocked = await members(world, 2)
    blocked.block()
    await publish(sender, "work", *numbered(3))
    assert payloads(here) == numbered(3)
    blocked.drain()
    assert payloads(blocked) == []


async def test_whose_window_is_full_is_passed_over(world: World, sender: Phone) -> None:
    roomy = await member(world, 0)
    narrow = await member(world, 1, properties={"session_expiry_interval": 600, "receive_maximum": 1})
    await publish(sender, "work", *numbered(4))
    assert (payloads(roomy), payloads(narrow)) == ([b"0", b"2", b"3"], [b"1"])
    acknowledge(narrow)
    await publish(sender, "work", *numbered(2))
    assert len(payloads(narrow)) == 2


async def test_where_all_windows_are_full_messages_wait_with_who_is_connected(
    world: World, sender: Phone
) -> None:
    narrow = await member(world, 0, properties={"session_expiry_interval": 600, "receive_maximum": 1})
    away = await member(world, 1)
    away.leave()
    await publish(sender, "work", *numbered(3))
    for count in (1, 2, 3):
        assert payloads(narrow) == numbered(count)
        acknowledge(narrow)
    assert payloads(await world.online(1)) == []


async def test_with_nobody_there_messages_wait_for_durable_members_in_turn(
    world: World, sender: Phone
) -> None:
    for phone in await members(world, 2):
        phone.leave()
    fleeting = await member(world, 2, **FLEETING)
    fleeting.leave()
    await publish(sender, "work", *numbered(4))
    assert payloads(await world.online(0)) == [b"0", b"2"]
    assert payloads(await world.online(1)) == [b"1", b"3"]


async def test_a_member_that_takes_qos_0_only_is_not_waited_for(world: World, sender: Phone) -> None:
    modest, eager = await member(world, 0, qos=0), await member(world, 1, qos=1)
    modest.leave()
    eager.leave()
    await publish(sender, "work", *numbered(2))
    assert payloads(await world.online(1)) == numbered(2)


async def test_qos_0_waits_for_nobody(world: World, sender: Phone) -> None:
    (phone,) = await members(world, 1)
    phone.leave()
    sender.send(Publish("work", b"x"))
    assert payloads(await world.online(0)) == []
    assert not [row for row in await rows(world) if row.kind == "m"]


# Who gets it when that one goes


async def test_what_who_goes_has_not_acknowledged_goes_to_another_in_its_order(
    world: World, sender: Phone
) -> None:
    narrow: Any = {"session_expiry_interval": 600, "receive_maximum": 2}
    first = await member(world, 0, properties=narrow)
    await publish(sender, "work", *numbered(5))  # two in flight, three wait
    second = await member(world, 1)
    first.leave()
    assert payloads(second) == numbered(5)
    assert not any(packet.dup for packet in got(second, Publish))
    acknowledge(second)
    assert payloads(await world.online(0)) == []
    assert {row.kind for row in await rows(world)} == {"s", "f"}


async def test_what_nobody_else_can_take_stays_in_flight(world: World, sender: Phone) -> None:
    first, second = await members(world, 2)
    second.leave()
    await publish(sender, "work", *numbered(3))
    sent = got(first, Publish)
    first.leave()
    again = got(await world.online(0), Publish)
    assert [(p.payload, p.packet_id, p.dup) for p in again] == [(p.payload, p.packet_id, True) for p in sent]
    assert payloads(await world.online(1)) == []


async def test_it_goes_to_nobody_who_is_away_until_its_session_ends(world: World, sender: Phone) -> None:
    first, second = await members(world, 2)
    second.leave()
    await publish(sender, "work", *numbered(3))
    first.send(Disconnect(properties={"session_expiry_interval": 0}))
    assert payloads(await world.online(1)) == numbered(3)


async def test_qos_2_that_was_sent_stays_and_what_was_not_goes(world: World, sender: Phone) -> None:
    narrow: Any = {"session_expiry_interval": 600, "receive_maximum": 1}
    first = await member(world, 0, qos=2, properties=narrow)
    for n in (1, 2):
        sender.send(Publish("work", b"%d" % n, 2, packet_id=n))
    await first.until(lambda phone: payloads(phone) == [b"1"])
    await sender.until(lambda phone: len(got(phone, Pubrec)) == 2)
    second = await member(world, 1, qos=2)
    first.leave()
    await second.until(lambda phone: payloads(phone) == [b"2"])
    await world.calm()
    again = await world.online(0)
    await again.until(payloads)
    assert [(p.payload, p.dup) for p in got(again, Publish)] == [(b"1", True)]
    assert payloads(second) == [b"2"]


async def test_qos_2_that_was_sent_ends_with_its_session(world: World, sender: Phone) -> None:
    """MQTT5-4.8.2-5."""
    first = await member(world, 0, qos=2)
    sender.send(Publish("work", b"x", 2, packet_id=1))
    await first.until(payloads)
    second = await member(world, 1, qos=2)
    first.send(Disconnect(properties={"session_expiry_interval": 0}))
    await world.calm()
    assert payloads(second) == []
    assert {row.kind for row in await rows(world)} == {"s", "f"}


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_refused_message_is_discarded(world: World, sender: Phone, qos: int) -> None:
    """MQTT5-4.8.2-6: no other member gets it, nor does the same one again."""
    first, second = await members(world, 2, qos=qos)
    sender.send(Publish("work", b"x", qos, packet_id=1))
    await first.until(payloads)
    answer = (Puback, Pubrec)[qos - 1]
    first.send(answer(got(first, Publish)[0].packet_id, Reason.UNSPECIFIED_ERROR))
    first.leave()
    await world.calm()
    assert payloads(second) == []
    assert payloads(await world.online(0)) == []
    assert not [row for row in await rows(world) if row.kind in "mci"]


async def test_who_takes_up_its_session_completes_qos_2(world: World, sender: Phone) -> None:
    first = await member(world, 0, qos=2)
    await member(world, 1, qos=2)
    sender.send(Publish("work", b"x", 2, packet_id=1))
    await first.until(payloads)
    packet_id = got(first, Publish)[0].packet_id
    first.send(Pubrec(packet_id))
    await first.until(lambda phone: got(phone, Pubrel))
    first.leave()
    again = await world.online(0)
    await again.until(lambda phone: got(phone, Pubrel) == [Pubrel(packet_id)])
    again.send(Pubcomp(packet_id))
    assert not [row for row in await rows(world) if row.kind in "mci"]


# Beside other subscriptions


async def test_a_shared_and_a_plain_subscription_of_one_client_both_count(
    world: World, sender: Phone
) -> None:
    first, second = await members(world, 2)
    await subscribe(first, "work")
    await publish(sender, "work", *numbered(2))
    assert sorted(payloads(first)) == [b"0", b"0", b"1"]
    assert payloads(second) == [b"1"]


async def test_groups_do_not_mix_nor_do_filters_of_one_group(world: World, sender: Phone) -> None:
    first = await member(world, 0, group="$share/a/work")
    second = await member(world, 1, group="$share/b/work")
    third = await member(world, 2, group="$share/a/+")
    await publish(sender, "work", *numbered(2))
    assert [payloads(phone) for phone in (first, second, third)] == [numbered(2)] * 3


async def test_a_new_member_gets_no_retained_message(world: World, sender: Phone) -> None:
    sender.send(Publish("work", b"kept", 1, True, packet_id=1))
    await sender.until(lambda phone: got(phone, Puback))
    (phone,) = await members(world, 1)
    assert payloads(phone) == []
    assert (await subscribe(phone, "work")).reasons == (Reason.GRANTED_QOS_1,)
    assert payloads(phone) == [b"kept"]


async def test_who_leaves_the_group_gets_nothing_more_and_completes_what_it_has(
    world: World, sender: Phone
) -> None:
    first, second = await members(world, 2)
    await publish(sender, "work", *numbered(2))
    assert (await unsubscribe(first, GROUP)).reasons == (Reason.SUCCESS,)
    assert (await unsubscribe(first, GROUP)).reasons == (Reason.NO_SUBSCRIPTION_EXISTED,)
    await publish(sender, "work", b"2", b"3")
    assert (payloads(first), payloads(second)) == ([b"0"], [b"1", b"2", b"3"])
    first.leave()
    assert payloads(second) == [b"1", b"2", b"3", b"0"]  # the last member that is there


async def test_the_last_to_leave_takes_the_group_along(world: World, sender: Phone) -> None:
    (phone,) = await members(world, 1)
    await unsubscribe(phone, GROUP)
    assert world.hub.subscriptions.count == 0
    assert world.hub.subscriptions._trie.root.children is None
    sender.send(Publish("work", b"x", 1, packet_id=1))
    await sender.until(lambda phone: got(phone, Puback))
    assert got(sender, Puback) == [Puback(1, Reason.NO_MATCHING_SUBSCRIBERS)]
