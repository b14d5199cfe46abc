"""Brokers around one Redis, as far as the log and the partitions go, whose calls a test may hold up or lose.

Rows and the reports of messages are kept as simply as the log needs them; the real ones have tests of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
from pyroaring import BitMap

from broker.bus import Broadcast, Doorbell, Recalled, Targeted
from broker.model import Claim, NewMessage, OwedRequest, RecordChange, Withdrawn
from broker.redis.engine import Argument, Engine
from broker.redis.keys import of_message
from broker.redis.log import Log
from broker.redis.nodes import RedisNodes
from broker.redis.partitions import Partitions
from broker.redis.records import RedisRecords
from broker.redis.rows import ROWS, Row
from broker.redis.scripts import Script
from broker.store import StoreUnavailable

START = 1_800_000_000.0
HOUR = 3600.0
APP = 7

Gate = Callable[[str], Awaitable[None]]
"""Awaited with a call's name before it is sent, and with "after <name>" before its answer is handed over. Raises
StoreUnavailable for a call that does not come through."""


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class GatedEngine:
    """An engine all of whose calls pass a gate."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.gate: Gate | None = None

    def call(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()
    ) -> asyncio.Future[Any]:
        return self._pass(script.name, lambda: self._engine.call(script, keys, arguments))

    def run(self, *command: Argument) -> asyncio.Future[Any]:
        return self._pass(str(command[0]), lambda: self._engine.run(*command))

    def _pass(self, name: str, make: Callable[[], asyncio.Future[Any]]) -> asyncio.Future[Any]:
        return make() if self.gate is None else asyncio.ensure_future(self._gated(self.gate, name, make))

    @staticmethod
    async def _gated(gate: Gate, name: str, make: Callable[[], asyncio.Future[Any]]) -> Any:
        await gate(name)
        answer = await make()
        await gate(f"after {name}")
        return answer


class PlainRows:
    def __init__(self, engine: GatedEngine) -> None:
        self._engine = engine

    async def write(self, entries: Sequence[tuple[int, Row]]) -> Mapping[int, BitMap]:
        await asyncio.gather(
            *[
                self._engine.run("SET", of_message(row.app_id, i, "row"), msgspec.msgpack.encode(row), "NX")
                for i, row in entries
            ]
        )
        return {}

    async def read(self, app_id: int, ids: Iterable[int]) -> Mapping[int, Row]:
        ids = list(ids)
        found = await asyncio.gather(*[self._engine.run("GET", of_message(app_id, i, "row")) for i in ids])
        return {i: ROWS.decode(row) for i, row in zip(ids, found, strict=True) if row is not None}


class PlainReports:
    """Takes the place of the newest message with the same collapse key."""

    def __init__(self, engine: GatedEngine, partitions: Partitions) -> None:
        self._engine = engine
        self._partitions = partitions

    async def take_back(self, app_id: int, msg_id: int, row: Row) -> Sequence[Withdrawn]:
        key = f"{{{app_id}}}:collapse:{row.collapse}"
        ids = [int(i) for i in await self._engine.run("ZRANGE", key, 0, -1)]
        await self._engine.run("ZADD", key, msg_id, msg_id)
        older = [i for i in ids if i < msg_id]
        targets = [row.targets] if isinstance(row.targets, int) else list(BitMap.deserialize(row.targets))
        await self._partitions.take_out(app_id, dict.fromkeys(targets, older))
        return [Withdrawn(app_id, i, BitMap(targets), BitMap()) for i in older]

    async def evicted(self, app_id: int, dropped: Sequence[tuple[int, int]], at: float) -> None:
        for msg_id, devno in dropped:
            await self._engine.run("SADD", of_message(app_id, msg_id, "evicted"), devno)

    async def suppressed(self, app_id: int, msg_id: int, row: Row) -> None:
        await self._engine.run("SET", of_message(app_id, msg_id, "suppressed"), row.suppressed or b"")


@dataclass
class Bell:
    """Hears what is rung: (node or None, doorbell), shared by all brokers."""

    rung: list[tuple[int | None, Doorbell]] = field(default_factory=list)
    gate: Gate | None = None

    async def ring_nodes(self, numbers: Sequence[int] | None, doorbells: Sequence[Doorbell]) -> None:
        if self.gate is not None:
            await self.gate("ring")
        for number in [None] if numbers is None else numbers:
            self.rung += [(number, doorbell) for doorbell in doorbells]
        if self.gate is not None:
            await self.gate("after ring")

    def ids(self) -> list[int]:
        return [msg_id for _, doorbell in self.rung if (msg_id := id_of(doorbell))]

    def devnos(self, msg_id: int) -> set[int]:
        return {
            devno
            for _, doorbell in self.rung
            if isinstance(doorbell, Targeted) and doorbell.message.msg_id == msg_id
            for devno in doorbell.devnos
        }


def id_of(doorbell: Doorbell) -> int:
    """0: it carries no message."""
    match doorbell:
        case Targeted(message=message):
            return message.msg_id
        case Broadcast(broadcast=broadcast):
            return broadcast.message.msg_id
    assert isinstance(doorbell, Recalled)
    return 0


@dataclass
class Broker:
    """One process."""

    engine: GatedEngine
    nodes: RedisNodes
    partitions: Partitions
    log: Log
    bell: Bell
    records: RedisRecords

    def hold(self, gate: Gate | None) -> None:
        self.engine.gate = self.bell.gate = gate

    async def claimed(self, devno: int, node: str = "node-1") -> Claim:
        future: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        self.partitions.claim_route(APP, devno, node, future.set_result)
        return await future

    async def owed(self, devno: int, after: int = 0, limit: int = 1000) -> list[int]:
        (messages,) = await self.log.fetch_owed([OwedRequest(APP, devno, after, limit)])
        return [message.msg_id for message in messages]

    async def push(self, *targets: int, changes: Sequence[RecordChange] = (), **more: Any) -> int:
        (appended,) = await self.log.append([message(*targets, **more)], changes)
        return appended.msg_id


def message(*targets: int, ttl: float = HOUR, broadcast: bool = False, **more: Any) -> NewMessage:
    return NewMessage(APP, b'{"message":{}}', BitMap(targets), broadcast, START, START + ttl, **more)


@dataclass
class World:
    """Brokers are made by `broker()`; they share the clock and the bell."""

    url: str
    stack: AsyncExitStack
    clock: Clock = field(default_factory=Clock)
    rung: list[tuple[int | None, Doorbell]] = field(default_factory=list)
    limit: int = 1000
    node_clock: Clock | None = None  # of the leases of nodes; None: Redis's own

    async def broker(self) -> Broker:
        engine = Engine(self.url)
        await engine.open()
        self.stack.push_async_callback(engine.close)
        gated = GatedEngine(engine)
        nodes = RedisNodes(engine, self.node_clock)
        await nodes.open()
        self.stack.push_async_callback(nodes.close)
        partitions = Partitions(gated, nodes, self.clock)  # type: ignore[arg-type]
        bell = Bell(self.rung)
        records = RedisRecords(gated)  # type: ignore[arg-type]
        log = Log(
            gated,  # type: ignore[arg-type]
            self.clock,
            partitions,
            PlainRows(gated),
            PlainReports(gated, partitions),
            records,
            bell,
            offline_limit=self._limit,
        )
        broker = Broker(gated, nodes, partitions, log, bell, records)
        self.stack.push_async_callback(partitions.close)
        self.stack.push_async_callback(log.close)
        self.stack.callback(broker.hold, None)
        return broker

    async def _limit(self, app_id: int) -> int:
        return self.limit


@asynccontextmanager
async def world(url: str) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(url, stack)


async def lost(name: str) -> None:
    raise StoreUnavailable(f"{name}: the connection is gone")
