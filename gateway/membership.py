"""This process as one node of many: it joins, says every second that it lives, and leaves.

Theory. A lease that ran out means: others were told that our devices are away. Pushes were stored without a doorbell
for us, rows were evicted, devices may be on other nodes. The answer to a beat tells (`lapsed`); but whoever was
stopped for a minute (SIGSTOP, a machine that swaps) must not act before he has asked. So `certain` looks at the
monotonic clock: after more than a lease without an answered beat, it first beats and looks in the store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from math import inf
from typing import Any, Final

from broker.logs import log_event
from broker.metrics import Metrics
from broker.model import NodeInfo
from broker.pulse import rest
from broker.store import Nodes, StoreError

BEAT: Final = 1.0  # seconds between beats

log = logging.getLogger(__name__)


class Membership:
    """`info` says what is told; `now` is monotonic."""

    def __init__(
        self,
        nodes: Nodes,
        info: Callable[[], NodeInfo],
        metrics: Metrics,
        *,
        now: Callable[[], float] | None = None,
    ) -> None:
        self._nodes = nodes
        self._info = info
        self._lapsed: Callable[[], Awaitable[None]] | None = None
        self._wished: Callable[[str], None] | None = None
        self._now = now or asyncio.get_running_loop().time
        self._beaten_at: float | None = None  # the last answered beat was sent then; None: not joined
        self._lapsed_times = 0
        self._looked_up = 0  # what was missed in so many of them
        self._wish = ""
        self._task: asyncio.Task[None] | None = None
        self._look_task: asyncio.Task[None] | None = None
        self._beating = asyncio.Lock()
        self._looking = asyncio.Lock()
        self._failed = metrics.counter("node_beats_failed", "Beats that the store did not take.")
        self._lapses = metrics.counter("node_lapses", "Times that the node's lease had run out.")
        metrics.gauge("node_lease_seconds", "What is left of the node's lease.", self._left, merge="min")

    def watch(self, *, lapsed: Callable[[], Awaitable[None]], wished: Callable[[str], None]) -> None:
        """Of a process with devices: `lapsed` looks in the store for what was missed (it may raise StoreError),
        `wished` is called with each new wish of the operator."""
        self._lapsed, self._wished = lapsed, wished

    @property
    def alone(self) -> bool:
        """No other process shares the store: nothing lapses, nobody takes anything away."""
        return self._nodes.lease == inf

    def _left(self) -> float:
        return 0.0 if self._beaten_at is None else self._nodes.lease - (self._now() - self._beaten_at)

    async def join(self) -> None:
        """Raises Conflict if a live node has the name."""
        sent = self._now()
        info = self._info()
        await self._nodes.join(info)
        self._beaten_at = sent
        log_event(log, logging.INFO, "joined", node=info.name)
        self._task = asyncio.get_running_loop().create_task(self._beat_forever())

    async def leave(self) -> None:
        """The last thing a node does: its routes end."""
        if self._task is None:
            return
        for task in (self._task, self._look_task):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        self._task = self._look_task = self._beaten_at = None
        try:
            await self._nodes.leave()
        except StoreError as error:
            log.warning("the node's lease was not given back, and runs out by itself: %s", error)

    async def certain(self) -> None:
        """Return when the lease holds, and what was missed while it did not was looked up. Raises StoreError."""
        if self._beaten_at is None:
            return
        if self._now() - self._beaten_at > self._nodes.lease:
            await self.beat()
        if self._behind:
            await self._look()

    async def beat(self) -> None:
        """Beat once. Raises StoreError."""
        async with self._beating:
            sent = self._now()
            answer = await self._nodes.beat(self._info())
            paused = self._beaten_at is not None and sent - self._beaten_at > self._nodes.lease
            self._beaten_at = sent
        if answer.lapsed or paused:
            self._lapsed_times += 1
            self._lapses.value += 1
            log_event(log, logging.WARNING, "lease had run out", node=self._info().name)
        if answer.wish != self._wish:
            self._wish = answer.wish
            if self._wished is not None:
                self._wished(answer.wish)

    async def tell(self) -> None:
        """Something about the node has changed that the others are to know at once."""
        if self._beaten_at is not None:
            await self._guarded(self.beat())

    @property
    def _behind(self) -> bool:
        return self._looked_up < self._lapsed_times

    async def _look(self) -> None:
        """For what was missed."""
        async with self._looking:
            while self._behind:
                times = self._lapsed_times
                if self._lapsed is not None:
                    await self._lapsed()
                self._looked_up = times

    async def _beat_forever(self) -> None:
        while True:
            await rest(BEAT)
            await self._guarded(self.beat())
            if self._behind and not self._looking.locked():  # not here: a long look must not cost the lease
                self._look_task = asyncio.get_running_loop().create_task(self._guarded(self._look()))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """A node that stops beating is a dead one, whatever the error."""
        try:
            await work
        except StoreError as error:
            self._failed.value += 1
            log.warning("beat failed: %s", error)
        except Exception:
            self._failed.value += 1
            log.exception("beat failed")
