"""The bus inside one process: rings are gathered and handed over in the loop's next turn. None is lost.

What waits is bounded by the publishers: each waits for the answer that follows its ring, so there are never more
doorbells than pushes being accepted at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from broker.bus import Broadcast, Doorbell, Missed, Subscriber
from broker.model import StoredBroadcast

log = logging.getLogger(__name__)


class LocalBus:
    """Implements `broker.bus.Bus`. Used on one event loop."""

    def __init__(self) -> None:
        self._subscribers: list[Subscriber] = []
        self._waiting: list[Sequence[Doorbell]] = []

    def ring(self, doorbells: Sequence[Doorbell]) -> None:
        if not doorbells or not self._subscribers:
            return
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._deliver)
        self._waiting.append(doorbells)

    def subscribe(self, subscriber: Subscriber, missed: Missed | None = None) -> Callable[[], None]:
        self._subscribers = [*self._subscribers, subscriber]
        return lambda: self._unsubscribe(subscriber)

    async def catch_up(self) -> None:
        if self._waiting:
            self._deliver()  # the turn of the loop that was meant for it finds nothing

    async def close(self) -> None:
        await self.catch_up()

    def _unsubscribe(self, subscriber: Subscriber) -> None:
        self._subscribers = [other for other in self._subscribers if other is not subscriber]

    def _deliver(self) -> None:
        waiting, self._waiting = self._waiting, []
        for subscriber in self._subscribers[1:]:
            hand_over(subscriber, [[copy_of(doorbell) for doorbell in doorbells] for doorbells in waiting])
        for subscriber in self._subscribers[:1]:  # last: it gets the originals
            hand_over(subscriber, waiting)


def hand_over(subscriber: Subscriber, waiting: Sequence[Sequence[Doorbell]]) -> None:
    """An error of the subscriber's is logged (B3)."""
    for doorbells in waiting:
        try:
            subscriber(doorbells)
        except Exception:
            log.exception("a bus subscriber failed")


def copy_of(doorbell: Doorbell) -> Doorbell:
    """Each receiver owns the bitmaps it gets."""
    if not isinstance(doorbell, Broadcast):
        return doorbell
    row = doorbell.broadcast
    return Broadcast(StoredBroadcast(row.message, row.targets.copy(), row.settled.copy()))
