"""How long a device may take to acknowledge: measured, kept within the carrier's bounds, and what happens past it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.carriers.catalog import Carriers
from broker.carriers.profile import Acks
from gateway.ack_time import LONGEST, OVERDUE, TICKS, UNKNOWN, AckTime
from gateway.live import LivePush
from gateway.messages import TopicCopy, TopicMessage
from gateway.mqtt import Puback, Publish, Pubrec, Reason, Subscribe, Subscription
from gateway.session import Session
from tests.gateway.test_session import push, read, session
from tests.gateway.world import Phone, World

BOUNDS = Acks(first=30.0, least=1.0, most=60.0)
ALL = Acks(first=30.0, least=0.01, most=1e9)
TICK = 1 / TICKS

seconds = st.one_of(st.floats(0, 2), st.floats(0, 100), st.floats(0, 1e6))


def measured(*samples: float) -> AckTime:
    known = UNKNOWN
    for sample in samples:
        known = known.after(sample)
    return known


# The estimate


@pytest.mark.parametrize(
    ("samples", "timeout"),
    [
        ((), 30.0),
        ((2.0,), 6.0),  # R + 4 * R / 2 (RFC 6298, 2.2)
        ((10.0,), 30.0),
        ((10.0, 10.0), 25.0),  # the deviation falls by a quarter
        ((2.0, 4.0), 7.25),  # 2.25 + 4 * (3/4 * 1 + 1/4 * 2), in quarters of a second
        ((0.0,), 1.0),  # not below `least`
        ((0.1,), 1.0),
        ((40.0,), 60.0),  # not above `most`
        ((1e12,), 60.0),
    ],
)
def test_the_timeout_follows_the_measured_times(samples: tuple[float, ...], timeout: float) -> None:
    assert measured(*samples).timeout(BOUNDS) == timeout


def test_a_spread_of_nothing_still_leaves_a_tick() -> None:
    assert measured(*[0.0] * 50).timeout(ALL) == TICK  # max(G, 4 * RTTVAR) (RFC 6298, 2.3)


def test_an_overdue_acknowledgement_backs_off_to_the_most() -> None:
    assert OVERDUE.timeout(BOUNDS) == 60.0
    assert OVERDUE.after(2.0) is UNKNOWN.after(2.0)  # then what is measured counts (RFC 6298, 5.7)


@settings(deadline=None)
@given(st.lists(seconds, min_size=1, max_size=60))
def test_the_integers_do_what_the_rfc_says(samples: list[float]) -> None:
    mean = spread = 0.0
    known = UNKNOWN
    for n, sample in enumerate(samples):
        ticks = min(round(sample * TICKS), LONGEST)
        if n:
            spread += (abs(ticks - mean) - spread) / 4
            mean += (ticks - mean) / 8
        else:
            mean, spread = ticks, ticks / 2
        known = known.after(sample)
        assert known.timeout(ALL) * TICKS == pytest.approx(mean + max(1, 4 * spread), abs=12)


@settings(deadline=None)
@given(st.lists(seconds, max_size=60), st.floats(0.1, 30), st.floats(30, 90))
def test_the_timeout_is_within_the_bounds(samples: list[float], least: float, most: float) -> None:
    acks = Acks(first=30.0, least=least, most=most)
    assert least <= measured(*samples).timeout(acks) <= most


@settings(deadline=None)
@given(st.floats(0, 100))
def test_a_device_that_is_always_as_fast_is_waited_for_a_moment_longer(sample: float) -> None:
    timeout = measured(*[sample] * 60).timeout(ALL)
    assert sample - TICK <= timeout <= sample + 5 * TICK


@settings(deadline=None)
@given(st.lists(seconds, min_size=1, max_size=40))
def test_steady_means_that_an_answer_at_once_changes_nothing(samples: list[float]) -> None:
    known = measured(*samples)
    assert known.steady == (known.after(0.0) is known)


def test_sessions_share_their_estimates() -> None:
    assert measured(0.3, 0.5) is measured(0.3, 0.5)
    assert not UNKNOWN.steady
    assert not OVERDUE.steady


# What a session measures


def acked(device: Session, *packet_ids: int, now: float) -> None:
    for packet_id in packet_ids:
        assert device.acked(packet_id, now) is not None


def test_the_time_from_sending_to_acknowledging_is_measured() -> None:
    device = session()
    device.send_push(push(1), now=10.0)
    acked(device, 1, now=12.0)
    assert device.ack_time is measured(2.0)
    device.send_push(push(2), now=100.0)
    acked(device, 2, now=104.0)
    assert device.ack_time is measured(2.0, 4.0)


def test_of_several_on_their_way_the_first_is_measured() -> None:
    device = session()
    for n in (1, 2, 3):
        device.send_push(push(n), now=10.0 + n)
    acked(device, 1, now=15.0)
    acked(device, 2, 3, now=40.0)
    assert device.ack_time is measured(4.0)


def test_at_once_is_a_time_too() -> None:
    device = session()
    device.send_push(push(1), now=10.0)
    acked(device, 1, now=10.0)
    assert device.ack_time is measured(0.0)
    device.ack_time = measured(8.0)
    device.send_push(push(2), now=20.0)
    acked(device, 2, now=20.0)
    assert device.ack_time is measured(8.0, 0.0)


def test_a_resend_is_not_measured() -> None:
    before, device = session(), session()
    before.send_push(push(1), now=0.0)
    device.resend = before.suspend()
    assert read(device.send_push(push(1), now=10.0)).dup
    device.send_push(push(2), now=10.0)
    acked(device, 1, 2, now=19.0)
    assert device.ack_time is UNKNOWN
    device.send_push(push(3), now=20.0)
    acked(device, 3, now=21.0)
    assert device.ack_time is measured(1.0)


def test_an_acknowledgement_of_nothing_measures_nothing() -> None:
    device = session()
    device.receive(Puback(1), now=5.0)
    device.send_push(push(1), now=10.0)
    acked(device, 1, now=11.0)
    device.receive(Puback(1), now=50.0)
    assert device.ack_time is measured(1.0)


@pytest.mark.parametrize("mailbox", [False, True])
def test_pushes_of_a_device_with_subscriptions_are_measured(mailbox: bool) -> None:
    device = session()
    if mailbox:
        device.own_mailbox()
    device.send_push(push(1), now=10.0)
    acked(device, 1, now=13.0)
    assert device.ack_time is measured(3.0)


def copy(qos: int) -> TopicCopy:
    return TopicCopy(TopicMessage("a", b"x", qos), qos)


def test_ordinary_messages_are_measured_at_qos_1_only() -> None:
    device = session()
    assert device.send_copy(copy(1), now=10.0) is not None
    device.receive(Puback(1), now=12.0)
    assert device.ack_time is measured(2.0)
    device.send_copy(copy(2), now=20.0)
    device.receive(Pubrec(2), now=29.0)
    assert device.ack_time is measured(2.0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.sampled_from((0.0, 0.0, 0.3, 4.0))), max_size=80)
)
def test_no_measured_time_is_longer_than_an_acknowledgement_took(
    steps: list[tuple[bool, int, float]],
) -> None:
    """Whatever is sent and acknowledged in whatever order."""
    device, now, longest = session(window=4), 100.0, 0.0
    sent: dict[int, float] = {}
    for msg_id, (send, which, pause) in enumerate(steps, start=1):
        now += pause
        if send and device.room:
            sent[read(device.send_push(push(msg_id), now)).packet_id] = now
        elif sent:
            packet_id = sorted(sent)[which % len(sent)]
            longest = max(longest, now - sent.pop(packet_id))
            acked(device, packet_id, now=now)
    if device.ack_time is not UNKNOWN:
        assert device.ack_time.mean >> 3 <= round(longest * TICKS)


# What a node does with it


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    folder = tmp_path / "carriers"
    folder.mkdir()
    (folder / "default.toml").write_text('name = "default"\n[acks]\nfirst = 30\nleast = 2\nmost = 60\n')
    (folder / "patient.toml").write_text("[acks]\nfirst = 75\nmost = 85\n")
    world = await World(tmp_path, carriers=Carriers(folder)).open()
    yield world
    await world.close()


def passes(world: World, time: float) -> float:
    world.node.clock.now += time
    return world.node.clock.now


async def acknowledges_after(world: World, phone: Phone, time: float) -> None:
    count = len(phone.got)
    msg_id = await world.push(0)
    await phone.pushed(count + 1)
    passes(world, time)
    phone.ack(msg_id)


async def waits_for_an_ack(world: World, **connect: Any) -> Phone:
    phone = await world.online(0, **connect)
    await world.push(0)
    await phone.until(lambda phone: phone.pushes)
    return phone


async def test_who_was_never_measured_has_the_first_timeout(world: World) -> None:
    phone = await waits_for_an_ack(world)
    now = world.node.clock.now
    assert phone.connection.check(now + 29.0) == now + 30.0
    assert phone.connection.check(now + 30.0) is None
    assert phone.goodbye.reason is Reason.UNSPECIFIED_ERROR
    assert world.node.metrics.disconnects.labels("ack timeout").value == 1


async def test_a_fast_device_is_given_up_sooner(world: World) -> None:
    phone = await world.online(0)
    await acknowledges_after(world, phone, 1.0)
    assert phone.connection.check(passes(world, 100.0)) == world.node.clock.now + 30.0  # idle: as ever
    await world.push(0)
    await phone.pushed(2)
    now = world.node.clock.now
    assert phone.connection.check(now + 2.9) == now + 3.0
    assert phone.connection.check(now + 3.0) is None


async def test_who_is_idle_is_looked_at_however_long_acknowledgements_may_take(world: World) -> None:
    """Its silences are measured then."""
    phone = await world.online(0, properties={"user_properties": (("carrier", "patient"),)})
    assert phone.connection.profile.acks.first == 75.0
    assert phone.connection.check(passes(world, 5.0)) == world.node.clock.now + 30.0


async def test_a_slow_device_is_waited_for(world: World) -> None:
    phone = await world.online(0)
    for _ in range(3):
        await acknowledges_after(world, phone, 20.0)
    assert 30.0 < phone.session.ack_time.timeout(phone.connection.profile.acks) <= 60.0


async def test_who_was_too_slow_has_all_the_time_on_the_next_connection(world: World) -> None:
    phone = await waits_for_an_ack(world)
    assert phone.connection.check(passes(world, 30.0)) is None
    again = await world.online(0)
    assert again.pushes[0].dup
    now = world.node.clock.now
    assert again.connection.check(now + 30.0) == now + 60.0
    again.send(*(Puback(packet.packet_id) for packet in again.pushes))
    await acknowledges_after(world, again, 4.0)
    assert again.session.ack_time is measured(4.0)
    again.leave()
    assert (await world.online(0)).session.ack_time is UNKNOWN


async def test_any_progress_restarts_the_wait(world: World) -> None:
    phone = await world.online(0)
    ids = [await world.push(0) for _ in range(3)]
    await phone.pushed(3)
    for msg_id in ids:
        assert phone.connection.check(passes(world, 29.0)) is not None
        phone.ack(msg_id)


async def test_a_keep_alive_that_is_over_first_counts_first(world: World) -> None:
    phone = await waits_for_an_ack(world, keep_alive=10)
    now = world.node.clock.now
    assert phone.connection.check(now) == now + 15.0
    assert phone.connection.check(now + 15.0) is None
    assert phone.goodbye.reason is Reason.KEEP_ALIVE_TIMEOUT


async def test_who_has_answered_everything_is_never_overdue(world: World) -> None:
    phone = await world.online(0, keep_alive=0, version=4)
    await acknowledges_after(world, phone, 1.0)
    now = passes(world, 1e6)
    assert phone.connection.check(now) == now + 30.0


async def test_a_message_of_qos_2_is_waited_for_as_well(world: World) -> None:
    world.app = await world.store.create_app("open", open=True)
    await world.devices.register_open(world.app, "device-0")
    phone = await world.online(0)
    phone.send(Subscribe(1, (Subscription("a", 2),)), Publish("a", b"x", 2, packet_id=1))
    await phone.until(lambda phone: any(isinstance(packet, Publish) for packet in phone.packets))
    assert phone.connection.check(world.node.clock.now + 30.0) is None


def test_a_push_that_is_shared_is_measured_for_each_device_alone() -> None:
    shared: LivePush = push(1)
    fast, slow = session(), session()
    fast.send_push(shared, now=0.0)
    slow.send_push(shared, now=0.0)
    acked(fast, 1, now=0.0)
    acked(slow, 1, now=5.0)
    assert (fast.ack_time, slow.ack_time) == (measured(0.0), measured(5.0))
