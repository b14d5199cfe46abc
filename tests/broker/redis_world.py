"""One broker or node of a fleet, as far as messages go: the parts of the store, put together on a test's Redis.
Several worlds on one Redis are several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pyroaring import BitMap

from broker.bus import Doorbell
from broker.model import (
    Appended,
    Callback,
    MessageRecord,
    NewMessage,
    OwedRequest,
    Receipt,
    RecordChange,
    Settled,
    Withdrawn,
)
from broker.redis.callbacks import RedisCallbacks, Telling
from broker.redis.endings import Endings
from broker.redis.engine import Engine
from broker.redis.log import Log
from broker.redis.node_names import NodeNames
from broker.redis.nodes import RedisNodes
from broker.redis.partitions import Partitions
from broker.redis.records import RedisRecords
from broker.redis.reports import Reports
from broker.redis.rows import Rows
from broker.redis.settling import Settling
from broker.redis.upkeep import MessageUpkeep
from broker.redis.withdrawing import Withdrawing, until_now

APP, OTHER = 7, 8
HOUR, DAY = 3600.0, 86_400.0
LIMIT = 5  # newest-N


class World:
    """`clock` is shared by the worlds of a test."""

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.engine = engine = Engine(url)
        self.nodes = RedisNodes(engine)
        self.rung: list[Doorbell] = []
        self.partitions = Partitions(engine, self.nodes, clock)
        self.endings = Endings(engine, clock)
        self.rows = Rows(engine, clock, 30 * DAY, self.endings)
        self.names = NodeNames(engine)
        self.telling = Telling(engine, self.rows)
        spread = until_now(engine, self._passed)
        self.settling = Settling(
            engine, self.rows, self.partitions, self.nodes, self.names, self.telling, spread
        )
        self.withdrawing = Withdrawing(engine, clock, self.rows, self.partitions, self.settling, spread)
        self.reports = Reports(engine, clock, self.rows, self.names, self.settling, spread)
        self.upkeep = MessageUpkeep(
            engine, self.rows, self.endings, self.partitions, self.settling, self.telling
        )
        self.callbacks = RedisCallbacks(engine, 7 * DAY)
        self.records = RedisRecords(engine)
        self.log = Log(
            engine,
            clock,
            self.partitions,
            self.rows,
            self.withdrawing,
            self.records,
            self,
            offline_limit=self._limit,
        )

    async def open(self) -> None:
        await self.engine.open()
        await self.nodes.refresh()

    async def close(self) -> None:
        await self.log.close()
        await self.partitions.close()
        await self.nodes.close()
        await self.engine.close()

    async def _passed(self, app_id: int, msg_id: int) -> None:
        await self.log.passed(app_id, msg_id)

    async def _limit(self, app_id: int) -> int:
        del app_id
        return LIMIT

    async def ring_nodes(self, numbers: Sequence[int] | None, doorbells: Sequence[Doorbell]) -> None:
        del numbers
        self.rung += doorbells

    # What tests do

    def message(
        self, targets: Iterable[int], *, broadcast: bool = False, ttl: float = HOUR, **more: Any
    ) -> NewMessage:
        now = self.clock()
        return NewMessage(APP, b'{"message":{}}', BitMap(targets), broadcast, now, now + ttl, **more)

    async def append(self, *messages: NewMessage, changes: Sequence[RecordChange] = ()) -> list[Appended]:
        return await self.log.append(messages, changes)

    async def push(self, targets: Iterable[int], **more: Any) -> int:
        (appended,) = await self.append(self.message(targets, **more))
        return appended.msg_id

    async def deliver(
        self, msg_id: int, devnos: Iterable[int], *, broadcast: bool = False, **more: Any
    ) -> None:
        more = {"at": self.clock()} | more
        await self.settling.settle([Settled(APP, msg_id, broadcast, list(devnos), **more)])

    async def receive(self, msg_id: int, devno: int, event: str, at: float) -> None:
        await self.settling.record_receipts([Receipt(APP, msg_id, devno, event, at)])

    async def recall(self, *msg_ids: int) -> list[Withdrawn]:
        return await self.withdrawing.recall(APP, msg_ids, self.clock())

    async def expire(self) -> int:
        total = 0
        while gone := await self.upkeep.expire(self.clock(), 1000):
            total += gone
        return total

    async def owed(self, devno: int) -> list[int]:
        """What a node would fetch."""
        (ids,) = await self.partitions.owed_ids([OwedRequest(APP, devno, 0, 1000)])
        rows = await self.rows.read(APP, ids)
        return [msg_id for msg_id in ids if msg_id in rows and rows[msg_id].body]

    async def record(self, msg_id: int) -> MessageRecord:
        return (await self.reports.find_messages(APP, [msg_id]))[msg_id]

    async def counts(self, msg_id: int) -> dict[str, int]:
        """The states that some device is in; together they are all targets (G4)."""
        record = await self.record(msg_id)
        counted = record.counts(self.clock())
        assert sum(counted.values()) == len(record.targets)
        return {state.value: count for state, count in counted.items() if count}

    async def raw(self, msg_id: int, what: str = "row") -> bytes | None:
        found: bytes | None = await self.engine.run("GET", f"{{{APP}/{msg_id}}}:{what}")
        return found

    async def told(self, limit: int = 1000, lease: float = 60.0) -> list[tuple[int, str, list[int]]]:
        """Claims what is due."""
        events = await self.callbacks.claim(self.clock(), lease, limit)
        return [(event.msg_id, event.event, list(event.devnos)) for event in events]


EVERYTHING = Callback(
    "https://shop.example/told",
    ("delivered", "shown", "clicked", "dismissed", "expired", "evicted", "recalled", "suppressed"),
)
