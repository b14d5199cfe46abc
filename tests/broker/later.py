"""A store, a bus and brokers whose clock is the test's: nothing happens until `pass_time` or `run` is called."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from broker.broker import Broker
from broker.bus import Broadcast, Doorbell, Recalled, Targeted
from broker.bus_local import LocalBus
from broker.limits import Limits
from broker.model import App, AppSettings, MessageRecord, NewDevice
from broker.store_sqlite import SqliteStore

START = 1_800_000_000.0  # 2027-01-15 08:00:00 UTC, a Friday
HELLO = {"platform": "all", "audience": "all", "notification": {"alert": "hi"}}


@dataclass
class World:
    path: Path
    limits: Limits
    now: float = START
    bells: list[Doorbell] = field(default_factory=list)
    brokers: list[Broker] = field(default_factory=list)
    app: App = field(init=False)

    async def open(self) -> None:
        self.store = SqliteStore(self.path, clock=lambda: self.now)
        await self.store.open()
        self.bus = LocalBus()
        self.bus.subscribe(self.bells.extend)
        self.brokers = []
        self.add_broker()

    def add_broker(self) -> Broker:
        """It is not opened: its tasks would run on their own."""
        broker = Broker(self.store, self.bus, self.limits, lambda: self.now)
        self.brokers.append(broker)
        return broker

    async def close(self) -> None:
        for broker in self.brokers:
            await broker.close()
        await self.store.close()

    async def crash(self) -> None:
        """All that a process knows is lost; what is in the file stays."""
        await self.close()
        await self.open()

    @property
    def broker(self) -> Broker:
        return self.brokers[0]

    async def create_app(self, devices: int = 3) -> App:
        self.app = await self.broker.apps.create("test")
        await self.register(devices)
        return self.app

    async def set_rules(self, **settings: Any) -> None:
        app = await self.store.set_settings(self.app.key, AppSettings(**settings))
        assert app is not None
        self.app = app

    async def register(self, devices: int, first: int = 0) -> None:
        names = [NewDevice(f"d{n}", tags=frozenset([f"t{n % 10}"])) for n in range(first, first + devices)]
        await self.store.register(self.app.app_id, names)

    async def run(self) -> float:
        """One round of every broker, all at once."""
        return min(await asyncio.gather(*(broker.timekeeper.run_due() for broker in self.brokers)))

    async def pass_time(self, until: float) -> None:
        """As the timekeepers' tasks would, but without waiting."""
        kinds = list(self.broker.timekeeper._handlers)
        while True:
            await self.run()
            due = await self.store.records.next_due(kinds)
            if due is None or due > until:
                break
            assert due > self.now, "what is due is not handled"
            self.now = due
        self.now = until
        await self.run()

    async def push(self, **changes: Any) -> int:
        """Its msg_id."""
        return (await self.broker.pushes.push(self.app, orjson.dumps(HELLO | changes))).msg_id

    async def find(self, msg_id: int) -> MessageRecord:
        return (await self.store.find_messages(self.app.app_id, [msg_id]))[msg_id]

    async def counts(self, msg_id: int) -> dict[str, int]:
        """Of each state that some target is in. They must add up (G4)."""
        record = await self.find(msg_id)
        counts = record.counts(self.now)
        assert sum(counts.values()) == len(record.targets)
        return {state.value: count for state, count in counts.items() if count}

    async def rung(self) -> Sequence[Targeted | Broadcast | Recalled]:
        """The bells about pushes since the last time."""
        for _ in range(3):  # they are handed over in the loop's next turn
            await asyncio.sleep(0)
        bells = [bell for bell in self.bells if isinstance(bell, Targeted | Broadcast | Recalled)]
        self.bells.clear()
        return bells


@asynccontextmanager
async def open_world(path: Path, limits: Limits | None = None) -> AsyncIterator[World]:
    world = World(path / "data.db", limits or Limits())
    await world.open()
    try:
        yield world
    finally:
        await world.close()
