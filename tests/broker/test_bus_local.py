from __future__ import annotations

import asyncio

import pytest

from broker.bus import Doorbell
from broker.bus_local import LocalBus
from tests.broker.bus_contract import Arrive, BusContract, numbered


class TestLocalBus(BusContract):
    @pytest.fixture
    def bus(self) -> LocalBus:
        return LocalBus()

    @pytest.fixture
    def arrive(self) -> Arrive:
        return lambda: asyncio.sleep(0)


async def test_no_doorbell_is_lost_however_many_ring_in_one_turn() -> None:
    bus = LocalBus()
    got: list[Doorbell] = []
    bus.subscribe(got.extend)
    doorbells = numbered(1000)
    for start in range(0, 1000, 10):
        bus.ring(doorbells[start : start + 10])
    await asyncio.sleep(0)
    assert got == doorbells
