"""What became of deliveries: folded into bitmaps by the thousand, recorded in the store in batches.

An acknowledgement is one append. `FOLD_AFTER` later all that came meanwhile are folded into the broadcasts'
bitmaps and the latency histogram; `RECORD_AFTER` later they go to the store, one batch at a time. A crash in
between loses acknowledgements, never pushes: the devices get those again and drop the repeats (G2).

Another node may take a device. From then on nothing counts that came over the connection here (G5): before a batch is
recorded, `certain` makes sure that the node knows of everything that was taken before, and what those devices
acknowledged, and was not recorded, is left out. Only what was read before `certain` was asked goes into the batch: an
answer says nothing of what comes after its question.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from time import time
from typing import Any, Final

from msgspec.structs import replace
from pyroaring import BitMap

from broker.model import Settled
from broker.store import Store, StoreError, StoreUnavailable
from gateway.live import LivePush
from gateway.metrics import NodeMetrics

FOLD_AFTER: Final = 0.005
RECORD_AFTER: Final = 0.05
RETRY_AFTER: Final = 1.0  # when the store takes nothing
CERTAIN_LIMIT: Final = 5.0  # seconds to find out what was taken: a bus that is away says nothing
BACKLOG_MAX: Final = 1_000_000  # deliveries not recorded yet, with the store away; past it the oldest are
# forgotten, which costs their devices a repeat

log = logging.getLogger(__name__)


async def _is_certain() -> None:
    """Of a node that has the store to itself."""


class Settler:
    """`certain` returns when the node knows which devices were taken from it; it may raise StoreError.
    `unsettle(app_id, msg_id, devnos)` is told of a broadcast's acknowledgements that do not count after all,
    `acked(app_id, devnos, seconds)` of those of a targeted push, so long after it was sent."""

    def __init__(
        self,
        store: Store,
        metrics: NodeMetrics,
        clock: Callable[[], float] = time,
        node: str = "",
        *,
        certain: Callable[[], Coroutine[Any, Any, None]] = _is_certain,
        unsettle: Callable[[int, int, BitMap], None] | None = None,
        acked: Callable[[int, Sequence[int], float], None] | None = None,
    ) -> None:
        self._acked = acked
        self._certain = certain
        self._unsettle = unsettle
        self._store = store
        self._node = node  # its name, for the record
        self._metrics = metrics
        self._clock = clock
        self._dirty: list[LivePush] = []
        self._batch: list[Settled] = []
        self._recording: list[Settled] = []  # on their way to the store
        self._one = asyncio.Lock()  # of these
        self._fenced: dict[int, BitMap] = {}  # app_id -> devnos that were taken since
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
            if push.sent_at and acked and self._acked is not None:
                self._acked(message.app_id, acked, now - push.sent_at)
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
        async with self._one:
            batch, self._batch = self._batch, []
            if not batch:
                return True
            self._recording = batch
            try:
                await self._make_certain()
                self._leave_out_fenced()
                await self._store.settle(self._recording)
            except StoreError as error:
                self._metrics.settle_errors.value += 1
                log.warning("acknowledgements not recorded, trying again: %s", error)
                self._batch = self._recording + self._batch
                self._trim()
                return False
            else:
                self._backlog -= sum(map(_size, self._recording))
                return True
            finally:
                self._recording = []

    async def _make_certain(self) -> None:
        try:
            await asyncio.wait_for(self._certain(), CERTAIN_LIMIT)
        except TimeoutError as error:
            raise StoreUnavailable("which devices other nodes took is not known") from error

    # Devices that other nodes took

    def fence(self, app_id: int, devno: int) -> None:
        """The device was taken: what it acknowledged here and is not recorded does not count."""
        self._fenced.setdefault(app_id, BitMap()).add(devno)

    def returned(self, app_id: int, devno: int) -> None:
        """The device is back: what it acknowledges from now on counts."""
        if self._fenced and devno in self._fenced.get(app_id, ()):
            self._leave_out_fenced()

    def unrecorded(self) -> Iterator[tuple[int, Sequence[int]]]:
        """app_id and devnos of all that was acknowledged and is not recorded."""
        for push in self._dirty:
            yield push.message.app_id, (*push.acked, *push.evicted)
        for settled in (*self._recording, *self._batch):
            yield settled.app_id, (*settled.delivered, *settled.evicted)

    def unrecorded_broadcasts(self) -> set[tuple[int, int]]:
        """app_id and msg_id of the broadcasts among these."""
        dirty = {(push.message.app_id, push.msg_id) for push in self._dirty if push.broadcast}
        return dirty | {
            (settled.app_id, settled.msg_id)
            for settled in (*self._recording, *self._batch)
            if settled.broadcast and (settled.delivered or settled.evicted)
        }

    def _leave_out_fenced(self) -> None:
        if not self._fenced:
            return
        for push in self._dirty:
            gone = self._fenced.get(push.message.app_id)
            if gone is not None:
                self._spare_push(push, gone)
        self._recording = self._spared(self._recording)
        self._batch = self._spared(self._batch)
        self._fenced.clear()

    def _spare_push(self, push: LivePush, gone: BitMap) -> None:
        if push.settled is not None:
            push.settled -= gone & BitMap(push.evicted)
        push.acked = self._without(push.acked, gone)
        push.evicted = self._without(push.evicted, gone)

    def _spared(self, batch: Sequence[Settled]) -> list[Settled]:
        kept = (self._spare(settled, self._fenced.get(settled.app_id)) for settled in batch)
        return [settled for settled in kept if _size(settled)]

    def _spare(self, settled: Settled, gone: BitMap | None) -> Settled:
        hit = gone & BitMap((*settled.delivered, *settled.evicted)) if gone else None
        if not hit:
            return settled
        if settled.broadcast and self._unsettle is not None:
            self._unsettle(settled.app_id, settled.msg_id, hit)
        kept = replace(
            settled,
            delivered=self._without(settled.delivered, hit),
            evicted=self._without(settled.evicted, hit),
        )
        self._backlog -= _size(settled) - _size(kept)
        return kept

    def _without(self, devnos: Sequence[int], gone: BitMap) -> list[int]:
        kept = [devno for devno in devnos if devno not in gone]
        self._metrics.fenced.value += len(devnos) - len(kept)
        return kept

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
