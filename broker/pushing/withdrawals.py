"""Taking a push back: what nobody got yet nobody gets, and devices that may have it are told to remove it.

Told are those that acknowledged it or were sent it, and those that are online now and were still to get it: it may be
on its way to them. Nodes record what they sent a moment later, so who was sent it is asked after that moment. Whoever
never had it finds nothing to remove.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

import orjson
from pyroaring import BitMap

from broker.bus import Bus, Recalled
from broker.errors import PUSH, ApiError, refusing
from broker.later.pacer import Pacer
from broker.limits import DAY, Limits
from broker.model import App, NewMessage, Withdrawn
from broker.pushing.pushes import doorbells
from broker.store import Store

Clock = Callable[[], float]
RECORD_LAG: Final = (
    0.15  # seconds: nodes record what they sent, or was acknowledged, within 60 ms and a commit
)
NOTICE_TTL: Final = 10 * DAY  # seconds that a device which is away is told late


class Withdrawals:
    """`clock` gives Unix seconds. Store failures become ApiErrors."""

    def __init__(
        self,
        store: Store,
        bus: Bus,
        pacer: Pacer,
        limits: Limits | None = None,
        clock: Clock = time.time,
    ) -> None:
        self._store = store
        self._bus = bus
        self._pacer = pacer
        self._limits = limits or Limits()
        self._clock = clock

    async def withdraw(self, app: App, msg_id: int) -> None:
        """Raises ApiError 1003: there is no such push. Withdrawing twice does no harm."""
        with refusing(PUSH):
            now = self._clock()
            withdrawn = await self._store.recall(app.app_id, [msg_id], now)
            if not withdrawn:
                raise ApiError(1003, f"msg_id: there is no push {msg_id} in this app", http_status=404)
            self._bus.ring([Recalled(withdrawn)])
            await self._pacer.end(app.app_id, msg_id)  # parts that come before it have no targets left
            told = BitMap.union(BitMap(), *(one.reached for one in withdrawn))
            told |= await self._store.online(app.app_id, await self._waiting(app, msg_id, withdrawn))
            await self._tell(app, msg_id, told, now)
            await asyncio.sleep(RECORD_LAG)
            for record in (await self._store.find_messages(app.app_id, [msg_id])).values():
                await self._tell(app, msg_id, record.sent - told, now)

    async def _waiting(self, app: App, msg_id: int, withdrawn: Sequence[Withdrawn]) -> BitMap:
        """Those that it may be on its way to. Of a push in parts nothing of the whole is."""
        (record,) = (await self._store.find_messages(app.app_id, [msg_id])).values()
        parts = [one.devnos for one in withdrawn if not (record.paced and one.msg_id == msg_id)]
        return BitMap.union(BitMap(), *parts)

    async def _tell(self, app: App, msg_id: int, devnos: BitMap, now: float) -> None:
        if not devnos:
            return
        notice = NewMessage(
            app.app_id,
            orjson.dumps({"recall": str(msg_id)}),
            devnos,
            len(devnos) > self._limits.fanout_limit,
            now,
            now + NOTICE_TTL,
            high=True,
            collapse=f"\0recall {msg_id}",  # no key of a publisher's; told again, it waits once
            evicts=False,
        )
        self._bus.ring(doorbells([notice], await self._store.append([notice])))
