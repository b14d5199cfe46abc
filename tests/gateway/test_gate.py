"""How many CONNECTs are decided, and what the others are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gateway.arrivals
from gateway.connection import Phase
from gateway.gate import BURST, FIRST_PACE, JITTER, LONGEST, MIN_PACE, PATIENCE, SOONEST, Gate
from gateway.mqtt import Reason
from gateway.node import NodeSettings
from tests.gateway.world import Phone, World

NOW = 1000.0


# Appointments


def test_each_who_is_turned_away_gets_a_slot_of_its_own() -> None:
    gate = Gate(10, NOW)
    times = [gate.appointment(NOW).retry_after for _ in range(5)]
    assert times == pytest.approx([SOONEST + n / 10 for n in range(5)])


def test_slots_that_passed_are_not_given_again() -> None:
    gate = Gate(10, NOW)
    for _ in range(5):
        gate.appointment(NOW)
    assert gate.appointment(NOW + 100).retry_after == SOONEST


def test_jitter_is_a_part_of_the_time() -> None:
    gate = Gate(1, NOW)
    for _ in range(10):
        told = gate.appointment(NOW)
    assert told.retry_jitter == pytest.approx(JITTER * told.retry_after)
    assert told.properties == (("retry_after", "10.0"), ("retry_jitter", "2.0"))


def test_what_would_be_too_far_away_is_spread_by_the_peers() -> None:
    gate = Gate(1, NOW)
    told = [gate.appointment(NOW) for _ in range(200)]
    assert max(one.retry_after for one in told) <= LONGEST
    assert told[-1] == (LONGEST, LONGEST)
    assert gate.appointment(NOW + 30).retry_after <= LONGEST


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=200), st.integers(1, 500))
def test_no_more_come_back_in_a_second_than_the_pace(steps: list[tuple[float, bool]], rate: int) -> None:
    gate, now = Gate(rate, NOW), NOW
    slots: list[float] = []
    for wait, _ in steps:
        now += wait
        told = gate.appointment(now)
        assert SOONEST - 1e-6 <= told.retry_after <= LONGEST
        if told.retry_jitter < LONGEST:
            slots.append(now + told.retry_after)
    assert all(later - earlier >= 1 / rate - 1e-6 for earlier, later in pairwise(slots))


# The allowed rate, and the measured pace


@given(st.integers(1, 1000))
def test_a_seconds_worth_is_decided_at_once_and_then_one_at_a_time(rate: int) -> None:
    gate = Gate(rate, NOW)
    assert sum(not gate.over_rate(NOW) for _ in range(rate + 5)) == rate * BURST
    assert not gate.over_rate(NOW + 1.01 / rate)
    assert gate.over_rate(NOW + 1.01 / rate)


def test_without_a_rate_nothing_is_over_it() -> None:
    gate = Gate(None, NOW)
    assert not any(gate.over_rate(NOW) for _ in range(10_000))
    assert gate.pace == FIRST_PACE


def test_the_pace_is_what_was_managed_while_there_was_a_line() -> None:
    gate = Gate(None, NOW)
    for n in range(1, 11):
        gate.decided(30, NOW + n / 10, line=True)
    assert gate.pace == pytest.approx(300)
    gate.decided(5, NOW + 3, line=False)  # few came: says nothing
    assert gate.pace == pytest.approx(300)
    gate.decided(0, NOW + 30, line=True)
    assert gate.pace == MIN_PACE


def test_a_rate_is_the_pace() -> None:
    gate = Gate(7, NOW)
    gate.decided(1000, NOW + 1, line=True)
    assert gate.pace == 7


# The line of a node


Start = Callable[..., Awaitable[World]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    worlds: list[World] = []

    async def run(*, devices: int = 12, **settings: Any) -> World:
        world = World(tmp_path, settings=NodeSettings("node-1", **settings))
        worlds.append(await world.open(devices=devices))
        await world.online(0)  # the app is loaded
        return world

    yield run
    for world in worlds:
        await world.close()


def told(phone: Phone) -> dict[str, str]:
    return dict(phone.connack.properties.get("user_properties", ()))


async def test_in_one_turn_so_many_are_decided_and_the_rest_in_their_order(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.arrivals, "AT_ONCE", 2)
    world = await start()
    phones = [world.connect(devno) for devno in range(1, 8)]
    decided = [len([phone for phone in phones if phone.packets])]
    while decided[-1] < len(phones):
        assert world.node.arrivals.waiting == len(phones) - decided[-1]
        await asyncio.sleep(0)
        done = [bool(phone.packets) for phone in phones]
        assert done == sorted(done, reverse=True)
        decided.append(sum(done))
    assert [more for earlier, later in pairwise(decided) if (more := later - earlier)] == [2, 2, 1]
    assert world.node.live == 8


async def test_who_leaves_the_line_is_passed_over(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.arrivals, "AT_ONCE", 1)
    world = await start()
    first, gone, last = (world.connect(devno) for devno in (1, 2, 3))
    gone.leave()
    await last.until(lambda phone: phone.packets)
    assert (first.connection.phase, last.connection.phase, gone.packets) == (Phase.LIVE, Phase.LIVE, [])


@pytest.mark.parametrize("version", [4, 5])
async def test_newcomers_are_turned_away_when_the_line_is_too_slow(
    start: Start, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    monkeypatch.setattr(gateway.arrivals, "AT_ONCE", 1)
    world = await start()
    waits = [world.connect(devno) for devno in (1, 2, 3)]
    connection, connect, since = world.node.arrivals._line[0]
    world.node.arrivals._line[0] = connection, connect, since - PATIENCE - 0.1
    refused = world.connect(4, version=version, properties={} if version == 4 else {"receive_maximum": 3})
    assert (refused.closed, refused.connack.reason) == (
        True,
        Reason.SERVER_BUSY if version == 5 else Reason.SERVER_UNAVAILABLE,
    )
    assert set(told(refused)) == (set() if version == 4 else {"retry_after", "retry_jitter"})
    await waits[-1].until(lambda phone: phone.packets)
    assert not any(phone.closed for phone in waits)
    assert world.node.metrics.refusals.labels("busy").value == 1


async def test_over_the_allowed_rate_each_is_told_another_time(start: Start) -> None:
    world = await start(admit_rate=3)
    phones = [world.connect(devno) for devno in range(1, 6)]  # one is there already
    assert [phone.connack.reason for phone in phones] == [
        *[Reason.SUCCESS] * 2,
        *[Reason.CONNECTION_RATE_EXCEEDED] * 3,
    ]
    times = [float(told(phone)["retry_after"]) for phone in phones[2:]]
    assert times == pytest.approx([1.0, 1.3, 1.7])
    assert world.node.metrics.refusals.labels("admit rate").value == 3


async def test_a_bug_of_ours_in_the_line_answers_its_connect_only(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gateway.arrivals, "AT_ONCE", 1)
    world = await start()
    decide = world.node.arrivals._decide

    def fail(connection: Any, connect: Any) -> None:
        if connect.client_id == "device-2":
            raise ValueError("a bug")
        decide(connection, connect)

    first, second, third = (world.connect(devno) for devno in (1, 2, 3))
    monkeypatch.setattr(world.node.arrivals, "_decide", fail)
    await third.until(lambda phone: phone.packets)
    assert (first.closed, second.connack.reason, third.closed) == (False, Reason.UNSPECIFIED_ERROR, False)
    assert "a CONNECT was not answered" in caplog.text
