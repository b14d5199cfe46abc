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


async def test_past_the_limit_doorbells_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.bus_local.WAITING_DOORBELLS", 5)
    bus = LocalBus()
    got: list[Doorbell] = []
    bus.subscribe(got.extend)
    doorbells = numbered(8)
    bus.ring(doorbells[:4])
    bus.ring(doorbells[4:])
    await asyncio.sleep(0)
    bus.ring(doorbells[4:])
    await asyncio.sleep(0)
    assert got == doorbells
    assert bus.dropped == 4
