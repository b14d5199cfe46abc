"""Garbage: devices leave none, and what others leave is collected without a look at all that is in use."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.metrics import Metrics
from gateway.collector import YOUNG, Collector
from gateway.connection import Connection
from gateway.mqtt import Disconnect
from gateway.session import Session
from tests.gateway.world import World

MOST = 50_000  # objects: the tests' own are more


class Cycle:
    """Garbage, once nobody has it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def collect() -> Iterator[Callable[..., Collector]]:
    """Starts a collector. Afterwards everything is as it was."""
    thresholds, started = gc.get_threshold(), list[Collector]()

    def start(**values: Any) -> Collector:
        started.append(Collector(Metrics(), **values))
        started[-1].start()
        return started[-1]

    yield start
    for collector in started:
        collector.stop()
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def cycles() -> int:
    return sum(isinstance(found, Cycle) for found in gc.get_objects())


async def test_young_garbage_is_collected(collect: Callable[..., Collector]) -> None:
    collector = collect()
    for _ in range(2 * YOUNG):
        Cycle()
    assert cycles() < YOUNG
    assert collector._garbage.value > YOUNG / 2
    assert sum(collector._young.counts) >= 1


async def test_what_lives_through_a_look_is_not_looked_at_again(collect: Callable[..., Collector]) -> None:
    collect()
    kept = [[number] for number in range(3 * YOUNG)]
    assert len(gc.get_objects()) < 2 * YOUNG
    assert gc.get_freeze_count() > len(kept) - YOUNG


async def test_garbage_that_was_frozen_is_collected_when_much_is_frozen(
    collect: Callable[..., Collector],
) -> None:
    collector = collect()
    collector._least = collector._most = collector._frozen + MOST
    kept = [Cycle() for _ in range(MOST // 2)]
    del kept[:]
    assert gc.get_freeze_count() > collector._frozen - MOST
    more = [[number] for number in range(2 * MOST)]
    await World.turns(1)
    assert sum(collector._full.counts) == 1
    assert collector._garbage.value >= MOST / 2
    assert collector._most >= 2 * len(more)


async def test_what_was_frozen_and_freed_is_no_reason(collect: Callable[..., Collector]) -> None:
    collector = collect()
    collector._most = collector._frozen + MOST
    for _ in range(4):
        kept = [[number] for number in range(MOST // 2)]
        del kept
        await World.turns(1)
    assert sum(collector._full.counts) == 0


@pytest.mark.parametrize("polite", [True, False])
async def test_a_device_leaves_no_garbage(tmp_path: Path, polite: bool) -> None:
    world = await World(tmp_path).open(devices=10)
    gc.collect()
    others = _devices()  # that tests before this one left to somebody
    gc.disable()
    try:
        for devno in range(10):
            phone = await world.online(devno)
            await world.push(devno)
            await phone.pushed(1)
            phone.ack()
            if polite:
                phone.send(Disconnect())
            phone.leave()
            del phone.connection  # or the two would have each other
        await world.calm()
        world.node.clock.now += 100.0
        for connection in world.node._wheel.due(world.node.clock.now):
            assert connection.check(world.node.clock.now) is None
        del connection
        left = [one for one in _devices() if not any(one is other for other in others)]
        assert [(type(one), gc.get_referrers(one)) for one in left] == []
    finally:
        gc.enable()
        await world.close()


def _devices() -> list[object]:
    return [one for one in gc.get_objects() if issubclass(type(one), Connection | Session)]
