"""Messages that are over: what nobody got is told of, inbox entries and bodies go, and what is left of deleted
apps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from pyroaring import BitMap

from broker.redis.callbacks import Note, Telling
from broker.redis.endings import LEASE, Endings, Place, due_at
from broker.redis.engine import Engine
from broker.redis.keys import of_app
from broker.redis.rows import Message, Rows
from broker.redis.settling import Inboxes, Settling
from broker.settlements import released

PLACES: Final = 64  # dealt with together
LATE: Final = 3_600.0  # seconds after its end in which a message may still be written


class MessageUpkeep:
    def __init__(
        self,
        engine: Engine,
        rows: Rows,
        endings: Endings,
        inboxes: Inboxes,
        settling: Settling,
        telling: Telling,
    ) -> None:
        self._engine = engine
        self._rows = rows
        self._endings = endings
        self._inboxes = inboxes
        self._settling = settling
        self._telling = telling

    async def expire(self, now: float, budget: int) -> int:
        """How many messages were dealt with. Several processes may do it: each place is one's at a time."""
        count = 0
        for place in await self._endings.claim(now, min(PLACES, budget)):
            if count >= budget:
                await self._endings.later(place, now)
            else:
                count += await self._end(place, now, budget - count)
        return count

    async def _end(self, place: Place, now: float, budget: int) -> int:
        ids = await self._endings.ids(place, budget)
        if await self._engine.run("EXISTS", of_app(place.app_id, "deleted")):
            await self._rows.remove(place.app_id, ids)
            await self._endings.done(place, ids, now)
            return len(ids)
        found = list(
            (await self._rows.look(place.app_id, await self._rows.unfinished(place.app_id, ids))).values()
        )
        if not found and place.msg_id and now <= place.due + LATE:
            await self._endings.later(place, now + LEASE)  # it may still have to be written
            return 0
        await self._end_messages(place.app_id, found, now)
        await self._endings.done(place, ids, now)
        return len(ids)

    async def _end_messages(self, app_id: int, messages: Sequence[Message], now: float) -> None:
        over = [message for message in messages if due_at(message.row) <= now]
        expired = await asyncio.gather(*map(self._expired, over))
        notes: list[Note] = [
            (app_id, message.msg_id, "expired", devnos, message.row.expires_at)
            for message, devnos in zip(over, expired, strict=True)
            if devnos and message.row.callback is not None
        ]
        await self._telling.note(notes)
        waiting: dict[int, list[int]] = {}
        for message, devnos in zip(over, expired, strict=True):
            if message.row.lasting and not message.row.broadcast:
                for devno in devnos:
                    waiting.setdefault(devno, []).append(message.msg_id)
        await asyncio.gather(
            self._inboxes.take_out(app_id, waiting),
            *[self._settling.fold_message(message, finished=True) for message in over],
        )

    async def _expired(self, message: Message) -> BitMap:
        """Of a paced push those that no part went to."""
        waiting = message.fate.states.waiting
        if message.row.paced:
            waiting -= released(
                part.stored for part in await self._rows.parts(message.row.app_id, message.msg_id)
            )
        return waiting

    async def purge(self, app_id: int, partitions: range, budget: int) -> int:
        """Of a deleted app: the messages that are not over yet. Of others a report is left, without a body, until its
        time is over."""
        del partitions
        count = 0
        for place in await self._endings.of_app(app_id):
            while count < budget and (ids := await self._endings.ids(place, budget - count)):
                await self._rows.remove(app_id, ids)
                await self._endings.done(place, ids, 0.0)
                count += len(ids)
                if place.msg_id:
                    break
            if count >= budget:
                return count
        return count + int(await self._engine.run("UNLINK", of_app(app_id, "live")))
