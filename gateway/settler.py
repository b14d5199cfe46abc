"""What became of deliveries: folded into bitmaps by the thousand, recorded in the store in batches.

An acknowledgement is one append. `FOLD_AFTER` later all that came meanwhile are folded into the broadcasts'
bitmaps and the latency histogram; `RECORD_AFTER` later they go to the store, one batch at a time. A crash in
between loses acknowledgements, never pushes: the devices get those again and drop the repeats (G2).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import time
from typing import Final

from broker.model import Settled
from broker.store import Store, StoreError
from gateway.live import LivePush
from gateway.metrics import NodeMetrics

FOLD_AFTER: Final = 0.005
RECORD_AFTER: Final = 0.05
RETRY_AFTER: Final = 1.0  # when the store takes nothing
BACKLOG_MAX: Final = 1_000_000  # deliveries not recorded yet, with the store away; past it the oldest are
# forgotten, which costs their devices a repeat

log = logging.getLogger(__name__)


class Settler:
    def __init__(
        self, store: Store, metrics: NodeMetrics, clock: Callable[[], float] = time, node: str = ""
    ) -> None:
        self._store = store
        self._node = node  # its name, for the record
        self._metrics = metrics
        self._clock = clock
        self._dirty: list[LivePush] = []
        self._batch: list[Settled] = []
        self._backlog = 0
        self._timer: asyncio.TimerHandle | None = None
        self._recorder: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._closing = False

    def start(self) -> None:
        self._recorder = asyncio.get_running_loop().create_task(self._record_forever())

    def note(self, push: LivePush, devno: int) -> None:
        """A device acknowledged a push."""
        if not push.acked:
            self._mark(push)
        push.acked.append(devno)

    def note_evicted(self, push: LivePush) -> None:
        """The newest-N rule added devices to `push.evicted`."""
        self._mark(push)

    def note_unanswered(self, push: LivePush, devno: int, since: float) -> None:
        """A connection ended and had not acknowledged what it was sent; `since`: when it was, Unix seconds."""
        message = push.message
        self._add(
            Settled(message.app_id, message.msg_id, push.broadcast, sent=(devno,), at=since, node=self._node)
        )
        self._fold_soon()

    def _mark(self, push: LivePush) -> None:
        self._dirty.append(push)
        self._fold_soon()

    def _fold_soon(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FOLD_AFTER, self.fold)

    def _add(self, settled: Settled) -> None:
        self._backlog += _size(settled)
        self._batch.append(settled)

    def fold(self) -> None:
        """Take in what was noted. Called on a timer, and by whoever needs the bitmaps to be exact."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._clock()
        dirty, self._dirty = self._dirty, []
        for push in dirty:
            self._fold_one(push, now)
        if self._batch:
            self._wake.set()

    def _fold_one(self, push: LivePush, now: float) -> None:
        message, metrics = push.message, self._metrics
        acked, push.acked = push.acked, []
        evicted, push.evicted = push.evicted, []
        if push.settled is not None:
            push.settled.update(acked)
            metrics.acked_broadcast.value += len(acked)
            metrics.latency_broadcast.observe(now - message.created_at, len(acked))
        else:
            metrics.acked_targeted.value += len(acked)
            metrics.latency_targeted.observe(now - message.created_at, len(acked))
        metrics.evicted.value += len(evicted)
        if acked or evicted:
            self._add(
                Settled(
                    message.app_id,
                    message.msg_id,
                    push.broadcast,
                    acked,
                    evicted,
                    at=now,
                    sent_at=push.sent_at,
                    node=self._node,
                )
            )

    async def _record_forever(self) -> None:
        while not self._closing:
            await self._wake.wait()
            self._wake.clear()
            if not self._closing:
                await asyncio.sleep(RECORD_AFTER)
            if not await self._record():
                await asyncio.sleep(RETRY_AFTER)
                self._wake.set()

    async def _record(self) -> bool:
        batch, self._batch = self._batch, []
        if not batch:
            return True
        try:
            await self._store.settle(batch)
        except StoreError as error:
            self._metrics.settle_errors.value += 1
            log.warning("acknowledgements not recorded, trying again: %s", error)
            self._batch = batch + self._batch
            self._trim()
            return False
        self._backlog -= sum(map(_size, batch))
        return True

    def _trim(self) -> None:
        while self._backlog > BACKLOG_MAX and self._batch:
            self._backlog -= _size(self._batch.pop(0))

    async def close(self) -> None:
        """Record what there is."""
        self.fold()
        self._closing = True
        self._wake.set()
        if self._recorder is not None:
            await self._recorder
        await self._record()


def _size(settled: Settled) -> int:
    return len(settled.delivered) + len(settled.evicted) + len(settled.sent)
