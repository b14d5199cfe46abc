"""What is known of messages: their records, and the steps that led there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from broker.model import MessageRecord, Step, StoredBroadcast
from broker.redis.engine import Engine
from broker.redis.keys import of_app
from broker.redis.node_names import NodeNames
from broker.redis.rows import Message, Rows, stored_message
from broker.redis.scripts import load
from broker.redis.settling import Settling
from broker.settlements import message_record

_live = load("live")


class Reports:
    """`spread`: see `withdrawing.until_now`."""

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float],
        rows: Rows,
        names: NodeNames,
        settling: Settling,
        spread: Callable[[int], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._rows = rows
        self._names = names
        self._settling = settling
        self._spread = spread

    async def _look(self, app_id: int, msg_ids: Sequence[int]) -> dict[int, Message]:
        """One that was accepted a moment ago may not be spread yet."""
        found = await self._rows.look(app_id, msg_ids)
        if missing := [msg_id for msg_id in msg_ids if msg_id not in found]:
            await self._spread(app_id)
            found |= await self._rows.look(app_id, missing)
        return found

    async def _parts(self, message: Message) -> list[Message]:
        return await self._rows.parts(message.row.app_id, message.msg_id) if message.row.paced else []

    async def find_messages(self, app_id: int, msg_ids: Sequence[int]) -> dict[int, MessageRecord]:
        """See Store."""
        found = await self._look(app_id, list(dict.fromkeys(msg_ids)))
        parts = await asyncio.gather(*map(self._parts, found.values()))
        now = self._clock()
        return {
            message.msg_id: message_record(
                message.stored, [part.stored for part in own], message.fate.receipts(), now
            )
            for message, own in zip(found.values(), parts, strict=True)
        }

    async def find_steps(self, app_id: int, msg_id: int) -> list[Step]:
        """See Store. In the order of their times."""
        message = (await self._look(app_id, [msg_id])).get(msg_id)
        if message is None:
            return []
        every = [message, *await self._parts(message)]
        names = await self._names.names({key[1] for one in every for key in one.fate.steps})
        steps = [
            Step(one.msg_id, step, names[node], float(start), float(width), devnos)
            for one in every
            for (step, node, start, width), devnos in one.fate.steps.items()
        ]
        return sorted(steps, key=lambda step: (step.start, step.msg_id, step.step))

    async def read_broadcast(self, app_id: int, msg_id: int) -> StoredBroadcast | None:
        """One that a doorbell only names."""
        for _, row, targets, settled in await self._rows.read_live(app_id, [msg_id]):
            return StoredBroadcast(stored_message(msg_id, row), targets, settled)
        return None

    async def live_broadcasts(self, app_id: int) -> list[StoredBroadcast]:
        """See Store. An entry leaves the log after its doorbell rang, and before that it may not be in the inboxes
        yet: what is in the log now is waited for. Raises StoreUnavailable if that takes too long."""
        in_log, *ids = await self._engine.call(_live, (of_app(app_id, "live"),), (self._clock(),))
        if in_log:
            await self._spread(app_id)
        live: list[StoredBroadcast] = []
        finished: list[int] = []
        for msg_id, row, targets, settled in await self._rows.read_live(app_id, sorted(map(int, ids))):
            if len(settled) == len(targets):
                finished.append(msg_id)
            elif row.body:
                live.append(StoredBroadcast(stored_message(msg_id, row), targets, settled))
        await asyncio.gather(*[self._settling.fold(app_id, msg_id) for msg_id in finished])
        return live
