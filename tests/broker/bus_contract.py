"""What every bus must do. A back end subclasses `BusContract` and gives it `bus`; `settle` lets what was rung
arrive."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import pytest
from pyroaring import BitMap

from broker.bus import Broadcast, Bus, CredentialsChanged, Doorbell, Targeted
from broker.model import StoredBroadcast, StoredMessage

Arrive = Callable[[], Awaitable[None]]
MESSAGE = StoredMessage(7, 1, b"{}", 0.0, 1.0)


def numbered(count: int) -> list[Doorbell]:
    return [CredentialsChanged(1, (number,)) for number in range(count)]


class BusContract:
    @pytest.fixture
    def bus(self) -> Bus:
        raise NotImplementedError

    @pytest.fixture
    def arrive(self) -> Arrive:
        """Waits until what was rung has been delivered."""
        raise NotImplementedError

    async def test_b2_b4_doorbells_arrive_in_order_and_not_inside_ring(
        self, bus: Bus, arrive: Arrive
    ) -> None:
        calls: list[Sequence[Doorbell]] = []
        bus.subscribe(calls.append)
        doorbells = numbered(10)
        bus.ring(doorbells[:4])
        bus.ring(doorbells[4:])
        assert calls == []
        await arrive()
        assert [doorbell for call in calls for doorbell in call] == doorbells

    async def test_b1_each_subscriber_gets_each_doorbell(self, bus: Bus, arrive: Arrive) -> None:
        first: list[Doorbell] = []
        second: list[Doorbell] = []
        bus.subscribe(first.extend)
        bus.subscribe(second.extend)
        bus.ring([Targeted(MESSAGE, (1, 2))])
        await arrive()
        assert [[d.devnos for d in got if isinstance(d, Targeted)] for got in (first, second)] == [
            [(1, 2)]
        ] * 2

    async def test_b3_a_failing_subscriber_is_logged_and_the_others_are_served(
        self, bus: Bus, arrive: Arrive, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(_doorbells: Sequence[Doorbell]) -> None:
            raise ValueError("broken node")

        got: list[Doorbell] = []
        bus.subscribe(fail)
        bus.subscribe(got.extend)
        with caplog.at_level(logging.ERROR):
            bus.ring(numbered(1))
            bus.ring(numbered(1))
            await arrive()
        assert len(got) == 2
        assert "broken node" in caplog.text

    async def test_nothing_arrives_after_unsubscribing(self, bus: Bus, arrive: Arrive) -> None:
        got: list[Doorbell] = []
        stop = bus.subscribe(got.extend)
        stop()
        stop()
        bus.ring(numbered(3))
        await arrive()
        assert got == []

    async def test_the_receiver_owns_the_bitmaps(self, bus: Bus, arrive: Arrive) -> None:
        kept: list[BitMap] = []

        def take(doorbells: Sequence[Doorbell]) -> None:
            for doorbell in doorbells:
                assert isinstance(doorbell, Broadcast)
                kept.append(doorbell.broadcast.targets)
                kept[-1].discard(len(kept))

        bus.subscribe(take)
        bus.subscribe(take)
        bus.ring([Broadcast(StoredBroadcast(MESSAGE, BitMap([1, 2, 3]), BitMap()))])
        await arrive()
        assert [list(bits) for bits in kept] == [[2, 3], [1, 3]]
