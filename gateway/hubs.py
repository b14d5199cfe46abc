"""The apps that this node has something to do with: loaded from the store when somebody connects, unloaded when idle.

There may be hundreds of thousands. A hub is loaded once, however many of its devices wait for it; doorbells that ring
meanwhile are heard again when it is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from broker.bus import Broadcast, Doorbell, Recalled
from broker.model import App
from broker.store import Store, StoreError
from broker.tenants.apps import Apps
from gateway.exchange import Exchange
from gateway.fanout import Fanout
from gateway.hub import Hub, Ordinary
from gateway.keeper import Keeper
from gateway.metrics import NodeMetrics
from gateway.wheel import Clock

HUB_REST: Final = 60.0  # seconds without a CONNECT or anybody there before an app is unloaded
UPKEEP_SLICE: Final = 500  # apps looked after in one tick

Loaded = Callable[
    [Hub | None, bool], None
]  # the hub, None if there is no such app or (True) the store is away

log = logging.getLogger(__name__)


def has_topics(app: App) -> bool:
    """Somebody may use ordinary topics (decision 0009)."""
    return app.open or bool(app.access)


@dataclass(slots=True)
class _Load:
    """An app's hub on its way from the store, and what came meanwhile."""

    heard: list[Doorbell] = field(default_factory=list)
    missed: bool = False  # doorbells were lost since the rows were read
    waiting: list[Loaded] = field(default_factory=list)  # in the order they came (G5)


class Hubs:
    def __init__(
        self,
        *,
        store: Store,
        apps: Apps,
        exchange: Exchange,
        keeper: Keeper,
        fanout: Fanout,
        clock: Clock,
        metrics: NodeMetrics,
        max_retained: int,
        max_retained_bytes: int,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        alone: bool,
        unrecorded: Callable[[], Collection[tuple[int, int]]],
    ) -> None:
        """`alone`: there is no other node. `unrecorded`: see `Settler.unrecorded_broadcasts`."""
        self._alone = alone
        self._unrecorded = unrecorded
        self._store = store
        self._apps = apps
        self._exchange = exchange
        self._keeper = keeper
        self._fanout = fanout
        self._clock = clock
        self._metrics = metrics
        self._max_retained = max_retained
        self._max_retained_bytes = max_retained_bytes
        self._spawn = spawn
        self._by_key: dict[str, Hub] = {}
        self._by_id: dict[int, Hub] = {}
        self._loading: dict[str, _Load] = {}
        self._upkeep_todo: list[Hub] = []

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Hub]:
        return iter(list(self._by_id.values()))

    def get(self, app_id: int) -> Hub | None:
        return self._by_id.get(app_id)

    def find(self, key: str) -> Hub | None:
        """If it is loaded."""
        return self._by_key.get(key)

    def remove(self, hub: Hub) -> None:
        self._by_key.pop(hub.app.key, None)
        self._by_id.pop(hub.app.app_id, None)

    # Loading

    def load(self, key: str, then: Loaded) -> None:
        load = self._loading.get(key)
        if load is None:
            load = self._loading[key] = _Load()
            self._spawn(self._load(key, load))
        load.waiting.append(then)

    def heard(self, doorbells: Sequence[Doorbell]) -> None:
        """For the hubs that are on their way."""
        for load in self._loading.values():
            load.heard += doorbells

    def missed(self) -> None:
        """Doorbells were lost: the hubs that are on their way have their rows read again."""
        for load in self._loading.values():
            load.missed = True

    async def _load(self, key: str, load: _Load) -> None:
        hub, away = None, False
        try:
            hub = await self._load_hub(key, load)
        except StoreError as error:
            log.warning("app not read: %s", error)
            away = True
        except Exception:  # whatever it is, those who wait get an answer
            log.exception("app not loaded")
            away = True
        del self._loading[key]
        for then in load.waiting:  # at once: whoever comes from now on is newer
            try:
                then(hub, away)
            except Exception:  # one CONNECT must not stop the others
                log.exception("a CONNECT was not answered")

    async def _load_hub(self, key: str, load: _Load) -> Hub | None:
        app = await self._apps.find(key)
        if app is None:
            return None
        hub = Hub(
            app,
            max_retained=self._max_retained,
            max_retained_bytes=self._max_retained_bytes,
            too_large=self._metrics.too_large,
        )
        hub.ordinary = await self._find_ordinary(app)
        for row in await self._store.live_broadcasts(app.app_id):
            hub.add_broadcast(row)
        here = hub.ordinary is Ordinary.HERE
        retained = await self._store.list_retained(app.app_id) if here else ()
        items = await self._store.list_session_items(app.app_id) if here else ()
        while load.missed:
            load.missed = False
            for row in await self._store.live_broadcasts(app.app_id):
                hub.add_broadcast(row)
        self._exchange.load_retained(hub, retained)
        self._keeper.load(hub, items)
        self._exchange.rules_changed(hub)  # they may have, while the app was not loaded
        self._by_key[key] = self._by_id[app.app_id] = hub
        for doorbell in load.heard:  # accepted after the rows were read; known ones are ignored
            if isinstance(doorbell, Broadcast) and doorbell.broadcast.message.app_id == app.app_id:
                self._fanout.broadcast(hub, doorbell)
            elif isinstance(doorbell, Recalled):
                self._fanout.recalled(hub, doorbell)
        return hub

    async def _find_ordinary(self, app: App) -> Ordinary:
        if self._alone:
            return Ordinary.HERE
        if not has_topics(app):
            return Ordinary.NONE
        return Ordinary.HERE if await self._store.find_home(app.app_id) is None else Ordinary.AWAY

    async def is_right(self, hub: Hub) -> bool:
        """Whether the app's ordinary topics still are where the hub has them. Raises StoreError."""
        return hub.ordinary is await self._find_ordinary(hub.app)

    # Upkeep

    def upkeep(self) -> None:
        """Look after the next apps, a slice at a time."""
        if not self._upkeep_todo:
            self._upkeep_todo = list(self._by_id.values())
        now, wall = self._clock.now, self._clock.wall
        some = self._upkeep_todo[-UPKEEP_SLICE:]
        unrecorded = self._unrecorded() if any(True for hub in some for _ in hub.broadcasts()) else ()
        for hub in some:
            hub.drop_finished(wall, unrecorded)
            hub.forget(now)
            self._keeper.expire(hub)
            if hub.idle(now) and now > hub.touched + HUB_REST and not self._fanout.walking:
                self.remove(hub)
        del self._upkeep_todo[-UPKEEP_SLICE:]
