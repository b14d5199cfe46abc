"""Acknowledgements: folded, recorded in batches, kept while the store takes none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest
from pyroaring import BitMap

import gateway.settler
from broker.metrics import Metrics
from broker.model import Settled, StoredBroadcast, StoredMessage
from broker.store import StoreUnavailable
from gateway.live import LivePush
from gateway.metrics import NodeMetrics
from gateway.settler import Settler
from tests.gateway.world import World

NOW = 1000.0


class Recorder:
    """The one call of a store that a settler makes."""

    def __init__(self) -> None:
        self.away = 0  # calls that will fail
        self.calls: asyncio.Queue[list[Settled]] = asyncio.Queue()

    async def settle(self, settled: Sequence[Settled]) -> None:
        if self.away:
            self.away -= 1
            raise StoreUnavailable("away")
        self.calls.put_nowait(list(settled))


class Bench:
    def __init__(self) -> None:
        self.store = Recorder()
        self.metrics = NodeMetrics(Metrics())
        self.settler = Settler(cast("Any", self.store), self.metrics, lambda: NOW, "n1")

    async def recorded(self) -> list[Settled]:
        return await asyncio.wait_for(self.store.calls.get(), 60)


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    for delay in ("FOLD_AFTER", "RECORD_AFTER", "RETRY_AFTER"):
        monkeypatch.setattr(gateway.settler, delay, 0)
    bench = Bench()
    bench.settler.start()
    yield bench
    await bench.settler.close()


def message(msg_id: int) -> StoredMessage:
    return StoredMessage(msg_id, 1, b"{}", NOW - 0.25, NOW + 60)


def broadcast(msg_id: int, *devnos: int) -> LivePush:
    return LivePush(message(msg_id), StoredBroadcast(message(msg_id), BitMap(devnos), BitMap()))


async def test_acknowledgements_of_one_message_are_recorded_together(bench: Bench) -> None:
    targeted, to_many = LivePush(message(1)), broadcast(2, 5, 6, 7)
    bench.settler.note(targeted, 5)
    for devno in (5, 6):
        bench.settler.note(to_many, devno)
    assert await bench.recorded() == [
        Settled(1, 1, False, [5], [], at=NOW, node="n1"),
        Settled(1, 2, True, [5, 6], [], at=NOW, node="n1"),
    ]


async def test_folding_settles_a_broadcast_at_once(bench: Bench) -> None:
    push = broadcast(1, 5, 6)
    bench.settler.note(push, 5)
    assert push.owed_to(5)
    bench.settler.fold()
    assert (push.owed_to(5), push.owed_to(6), push.acked) == (False, True, [])


async def test_folding_counts_deliveries_and_their_latency(bench: Bench) -> None:
    bench.settler.note(LivePush(message(1)), 5)
    push = broadcast(2, 5, 6)
    bench.settler.note(push, 5)
    bench.settler.note(push, 6)
    bench.settler.fold()
    metrics = bench.metrics
    assert (metrics.acked_targeted.value, metrics.acked_broadcast.value) == (1, 2)
    assert (metrics.latency_targeted.total, metrics.latency_broadcast.total) == (0.25, 0.5)


async def test_evictions_are_recorded_and_counted(bench: Bench) -> None:
    push = broadcast(1, 5, 6)
    push.evicted.append(5)
    bench.settler.note_evicted(push)
    assert await bench.recorded() == [Settled(1, 1, True, [], [5], at=NOW, node="n1")]
    assert bench.metrics.evicted.value == 1


async def test_an_eviction_and_an_acknowledgement_before_the_fold_are_recorded_once(bench: Bench) -> None:
    push = broadcast(1, 5, 6)
    bench.settler.note(push, 6)
    push.evicted.append(5)
    bench.settler.note_evicted(push)
    assert await bench.recorded() == [Settled(1, 1, True, [6], [5], at=NOW, node="n1")]


async def test_what_the_store_does_not_take_is_tried_again_in_order(bench: Bench) -> None:
    bench.store.away = 2
    bench.settler.note(LivePush(message(1)), 5)
    bench.settler.fold()
    await World.when(lambda: not bench.store.away)
    bench.settler.note(LivePush(message(2)), 5)
    first = await bench.recorded()
    while len(first) < 2:
        first += await bench.recorded()
    assert [one.msg_id for one in first] == [1, 2]
    assert bench.metrics.settle_errors.value == 2


async def test_with_the_store_away_the_oldest_are_forgotten_past_the_limit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.settler, "BACKLOG_MAX", 3)
    monkeypatch.setattr(gateway.settler, "RECORD_AFTER", 3600)  # the recorder sleeps; the test does its work
    await asyncio.sleep(0)
    for msg_id in range(1, 6):
        bench.settler.note(LivePush(message(msg_id)), 5)
    bench.settler.fold()
    bench.store.away = 1
    assert not await bench.settler._record()
    assert await bench.settler._record()
    assert [one.msg_id for one in await bench.recorded()] == [3, 4, 5]
    assert bench.settler._backlog == 0
    assert bench.settler._recorder is not None
    bench.settler._recorder.cancel()
    await asyncio.wait([bench.settler._recorder])
    bench.settler._recorder = None


async def test_closing_records_what_was_noted_last() -> None:
    bench = Bench()
    bench.settler.start()
    bench.settler.note(LivePush(message(1)), 5)
    await bench.settler.close()
    assert [one.msg_id for one in await bench.recorded()] == [1]


# Devices that other nodes took


class Fenced(Bench):
    """Records when the test says; `certain` fails as often as `unsure`."""

    def __init__(self) -> None:
        super().__init__()
        self.unsure = 0
        self.unsettled: list[tuple[int, int, list[int]]] = []
        self.settler = Settler(
            cast("Any", self.store),
            self.metrics,
            lambda: NOW,
            certain=self._certain,
            unsettle=lambda app_id, msg_id, devnos: self.unsettled.append((app_id, msg_id, list(devnos))),
        )

    async def _certain(self) -> None:
        if self.unsure:
            self.unsure -= 1
            raise StoreUnavailable("cannot ask")

    async def record(self) -> list[tuple[int, list[int], list[int]]]:
        self.settler.fold()
        await self.settler._record()
        batch = [] if self.store.calls.empty() else self.store.calls.get_nowait()
        return [(one.msg_id, list(one.delivered), list(one.evicted)) for one in batch]


@pytest.fixture
def fenced(monkeypatch: pytest.MonkeyPatch) -> Fenced:
    monkeypatch.setattr(gateway.settler, "FOLD_AFTER", 3600)
    return Fenced()


async def test_what_a_taken_device_acknowledged_is_left_out_folded_or_not(fenced: Fenced) -> None:
    targeted, to_many, evicting = LivePush(message(1)), broadcast(2, 5, 6), broadcast(3, 5, 6)
    for devno in (5, 6):
        fenced.settler.note(to_many, devno)
    fenced.settler.fold()
    fenced.settler.note(targeted, 5)
    evicting.evicted.append(5)
    assert evicting.settled is not None
    evicting.settled.add(5)
    fenced.settler.note_evicted(evicting)
    fenced.settler.fence(1, 5)
    fenced.settler.fence(2, 6)  # of another app
    fenced.settler.returned(1, 5)
    assert await fenced.record() == [(2, [6], [])]
    assert fenced.unsettled == [(1, 2, [5])]
    assert (len(evicting.settled), fenced.metrics.fenced.value, fenced.settler._backlog) == (0, 3, 0)


async def test_what_comes_after_its_return_counts(fenced: Fenced) -> None:
    fenced.settler.note(LivePush(message(1)), 5)
    fenced.settler.fence(1, 5)
    fenced.settler.returned(1, 5)
    fenced.settler.note(LivePush(message(2)), 5)
    assert await fenced.record() == [(2, [5], [])]


async def test_who_was_not_taken_returns_without_effect(fenced: Fenced) -> None:
    fenced.settler.note(LivePush(message(1)), 5)
    fenced.settler.fence(1, 6)
    fenced.settler.returned(1, 5)
    assert await fenced.record() == [(1, [5], [])]


async def test_nothing_is_recorded_while_it_is_not_certain(fenced: Fenced) -> None:
    fenced.unsure = 1
    fenced.settler.note(LivePush(message(1)), 5)
    fenced.settler.note(LivePush(message(2)), 6)
    assert await fenced.record() == []
    fenced.settler.fence(1, 5)
    assert await fenced.record() == [(2, [6], [])]
    assert fenced.settler._backlog == 0


async def test_a_bus_that_does_not_answer_is_not_waited_for(
    fenced: Fenced, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gateway.settler, "CERTAIN_LIMIT", 0.01)
    answer = asyncio.Event()
    monkeypatch.setattr(fenced.settler, "_certain", answer.wait)
    monkeypatch.setattr(gateway.settler, "BACKLOG_MAX", 1)
    for msg_id in (1, 2):
        fenced.settler.note(LivePush(message(msg_id)), 5)
    assert await fenced.record() == []
    assert "which devices other nodes took is not known" in caplog.text
    answer.set()
    assert await fenced.record() == [(2, [5], [])]  # what waits is bounded


async def test_all_that_is_not_recorded_is_known(fenced: Fenced) -> None:
    fenced.settler.note(LivePush(message(1)), 5)
    fenced.settler.fold()
    fenced.settler.note(LivePush(message(2)), 6)
    assert sorted(fenced.settler.unrecorded()) == [(1, (5,)), (1, (6,))]


async def test_broadcasts_that_are_not_recorded_are_known_at_each_step(fenced: Fenced) -> None:
    settler, store = fenced.settler, fenced.store
    settler.note(LivePush(message(1)), 5)
    settler.note_unanswered(broadcast(2, 5), 5, NOW - 1)
    acked, evicted = broadcast(3, 5), broadcast(4, 5)
    settler.note(acked, 5)
    evicted.evicted.append(5)
    settler.note_evicted(evicted)
    assert settler.unrecorded_broadcasts() == {(1, 3), (1, 4)}
    settler.fold()
    assert settler.unrecorded_broadcasts() == {(1, 3), (1, 4)}
    fenced.unsure = 1
    assert not await settler._record()
    assert settler.unrecorded_broadcasts() == {(1, 3), (1, 4)}
    assert await settler._record()
    assert len(store.calls.get_nowait()) == 4
    assert settler.unrecorded_broadcasts() == set()


async def test_that_it_was_sent_is_true_whoever_has_it_now(fenced: Fenced) -> None:
    fenced.settler.note_unanswered(LivePush(message(1)), 5, NOW - 1)
    fenced.settler.fence(1, 5)
    fenced.settler.fold()
    await fenced.settler._record()
    [one] = fenced.store.calls.get_nowait()
    assert (list(one.sent), list(one.delivered)) == ([5], [])
