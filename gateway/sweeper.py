"""Looks in the store for what no doorbell told (bus B1), and for what other nodes did.

A doorbell that was lost delays a push, it never loses one. How long: the bus notices a loss with its next beat at the
latest, and has all apps swept (`sweep`); what no bus can notice (a request that was cancelled between its append and
its ring) the round finds, which comes to each app every ROUND.

Order matters (G3). The live broadcasts are read first, then the inboxes are asked for: what is older than a broadcast
that is live is in its inbox by then. Devices that are owed rows fetch them before the broadcast walks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol

from broker.bus import Broadcast
from broker.model import StoredBroadcast
from broker.store import Store, StoreError
from gateway.hub import Hub
from gateway.metrics import NodeMetrics
from gateway.wheel import Clock

if TYPE_CHECKING:
    from gateway.fanout import Fanout
    from gateway.hubs import Hubs

ROUND: Final = (
    300.0  # seconds in which each app is looked at, whatever was heard; one may wait for two rounds
)
ROUTES: Final = 2000  # devices in one look at their routes
AT_ONCE: Final = 32  # apps that are swept at the same time
RETRY_AFTER: Final = 1.0
RESTS: Final = 9  # times as long as a look took, an app is left alone: looks take at most a tenth of the time
REST_MIN: Final = 0.25  # seconds: many nodes ask the same few keys
REST_MAX: Final = 5.0

Then = Callable[[], None]

log = logging.getLogger(__name__)


class Owner(Protocol):
    """Who acts on what a sweep finds."""

    async def look_at_app(self, hub: Hub) -> None: ...

    def lose(self, hub: Hub, devno: int, epoch: int) -> None: ...


class _Looks:
    """Of one app: who waits, and whether for all of it."""

    __slots__ = ("thens", "whole")

    def __init__(self) -> None:
        self.thens: list[Then] = []
        self.whole = False


class Sweeper:
    def __init__(
        self,
        owner: Owner,
        *,
        store: Store,
        hubs: Hubs,
        fanout: Fanout,
        clock: Clock,
        metrics: NodeMetrics,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._owner = owner
        self._store = store
        self._hubs = hubs
        self._fanout = fanout
        self._clock = clock
        self._metrics = metrics
        self._spawn = spawn
        self._wanted: dict[Hub, _Looks] = {}
        self._looking: set[Hub] = set()

    # All apps

    async def sweep(self, reason: str) -> None:
        """What is there when this is called is known here when it returns. Raises StoreError."""
        self._hubs.missed()
        hubs = iter(list(self._hubs))
        sweeps = (self._sweep_each(hubs, reason) for _ in range(AT_ONCE))
        for error in await asyncio.gather(*sweeps, return_exceptions=True):
            if error is not None:
                raise error

    async def _sweep_each(self, hubs: Iterator[Hub], reason: str) -> None:
        for hub in hubs:
            await self.sweep_app(hub, reason)

    async def go_round(self) -> None:
        while True:
            hubs = list(self._hubs)
            pause = ROUND / (len(hubs) + 1)
            await asyncio.sleep(pause)
            for hub in hubs:
                try:
                    await self.sweep_app(hub, "round")
                except StoreError as error:
                    log.warning("an app was not looked up: %s", error)
                except Exception:  # one app must not stop the round
                    log.exception("an app was not looked up")
                await asyncio.sleep(pause)

    # One app

    async def sweep_app(self, hub: Hub, reason: str) -> None:
        """Raises StoreError."""
        if not self._is_loaded(hub):
            return
        self._metrics.sweeps.labels(reason).value += 1
        await self._owner.look_at_app(hub)
        rows = await self._store.live_broadcasts(hub.app.app_id)
        await self._look_at_routes(hub)
        if self._is_loaded(hub):
            self._take_rows(hub, rows)

    def _is_loaded(self, hub: Hub) -> bool:
        return self._hubs.get(hub.app.app_id) is hub

    def _take_rows(self, hub: Hub, rows: Sequence[StoredBroadcast]) -> None:
        hub.merge(rows, self._clock.wall)
        for row in rows:
            if row.message.msg_id > hub.last_broadcast:
                self._metrics.swept.labels("broadcast").value += 1
                self._fanout.broadcast(hub, Broadcast(row))

    async def _look_at_routes(self, hub: Hub) -> None:
        members = iter(list(hub.members.items()))
        while part := {devno: member.epoch for devno, member in islice(members, ROUTES)}:
            check = await self._store.inspect_routes(hub.app.app_id, part)
            for devno in check.lost:
                member = hub.members.get(devno)
                if member is not None and member.epoch == part[devno]:
                    self._metrics.swept.labels("lost").value += 1
                    self._owner.lose(hub, devno, part[devno] + 1)
            for devno in part:
                member = hub.members.get(devno)
                if member is not None and member.session is not None:
                    owing = devno in check.owing
                    self._metrics.swept.labels("owing").value += owing
                    if hub.look_again(member.session, owing=owing):
                        member.catch_up()

    # On demand, many at a time

    def look(self, hub: Hub, then: Then, *, whole: bool = False) -> None:
        """Call `then` when what the store knew of the app's broadcasts at this moment is known here; with `whole`,
        those that nobody rang for included, and inbox rows. Many who ask share one look; the store being away delays
        it."""
        looks = self._wanted.get(hub)
        if looks is None:
            looks = self._wanted[hub] = _Looks()
        looks.thens.append(then)
        looks.whole |= whole
        if hub not in self._looking:
            self._looking.add(hub)
            self._spawn(self._look(hub))

    async def _look(self, hub: Hub) -> None:
        loop = asyncio.get_running_loop()
        try:
            while hub in self._wanted:
                looks = self._wanted.pop(hub)  # who asks from now on is for the next one
                started = loop.time()
                await self._try(hub, looks)
                for then in looks.thens:
                    then()
                if hub in self._wanted:
                    await asyncio.sleep(max(REST_MIN, min(REST_MAX, RESTS * (loop.time() - started))))
        finally:
            self._looking.discard(hub)

    async def _try(self, hub: Hub, looks: _Looks) -> None:
        while self._is_loaded(hub):
            try:
                await (self.sweep_app(hub, "late") if looks.whole else self._refresh(hub))
            except StoreError as error:
                log.warning("an app was not looked up, trying again: %s", error)
                await asyncio.sleep(RETRY_AFTER)
            else:
                return

    async def _refresh(self, hub: Hub) -> None:
        """Of the broadcasts in the log, who has them. Others may have doorbells on their way: they wait for these."""
        self._metrics.sweeps.labels("elsewhere").value += 1
        hub.merge(await self._store.live_broadcasts(hub.app.app_id), self._clock.wall)
