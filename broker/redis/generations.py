"""Which devices' tokens were revoked, and how often: in memory, for the apps that are in use here.

Own changes are there at once; those of other processes one answer of Redis after the bus told, or at the latest after
REFRESH seconds: one question for all apps tells those where something changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from broker.bus import CredentialsChanged, Doorbell
from broker.redis.engine import Engine
from broker.redis.keys import of_app
from broker.redis.scripts import load
from broker.redis.watch import Watch
from broker.store import StoreError

log = logging.getLogger(__name__)

REFRESH: Final = 5.0
COMPLAINT: Final = "revoked tokens cannot be looked up"
FEED: Final = "{apps}:revoked"  # app -> version of its last change, and v: the newest

_changed: Final = load("devices_changed")


class Generations:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._apps: dict[int, dict[int, int]] = {}
        self._newest = 0
        self._watch = Watch(self.refresh, REFRESH, COMPLAINT)
        self._looking: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self._newest = int(await self._engine.run("ZSCORE", FEED, "v") or 0)
        self._watch.open()

    async def close(self) -> None:
        await self._watch.close()
        await asyncio.gather(*self._looking, return_exceptions=True)

    async def look(self) -> None:
        """Refresh, if that is possible now."""
        try:
            await self.refresh()
        except StoreError as error:
            log.warning("%s: %s", COMPLAINT, error)

    async def refresh(self) -> None:
        """Look for what others changed."""
        words = await self._engine.run("ZRANGEBYSCORE", FEED, f"({self._newest}", "+inf", "WITHSCORES")
        changed = {word: int(score) for word, score in zip(words[::2], words[1::2], strict=True)}
        newest = changed.pop(b"v", self._newest)
        await asyncio.gather(*[self.load(int(app)) for app in changed if int(app) in self._apps])
        self._newest = max(newest, self._newest)

    async def load(self, app_id: int) -> None:
        words = await self._engine.run("HGETALL", of_app(app_id, "generations"))
        self._note(app_id, {int(d): int(g) for d, g in zip(words[::2], words[1::2], strict=True)})

    def hear(self, doorbells: Sequence[Doorbell]) -> None:
        """A subscriber of the bus."""
        if any(
            isinstance(bell, CredentialsChanged) and bell.devnos and bell.app_id in self._apps
            for bell in doorbells
        ):
            task = asyncio.create_task(self.look())
            self._looking.add(task)
            task.add_done_callback(self._looking.discard)

    async def raised(self, app_id: int, generations: Mapping[int, int]) -> None:
        """By this process; they are stored. Lets the others know."""
        self._note(app_id, generations)
        await self._engine.call(_changed, [FEED, FEED], [app_id])

    def _note(self, app_id: int, generations: Mapping[int, int]) -> None:
        """They only grow; what is read may be older than what is known."""
        known = self._apps.setdefault(app_id, {})
        for devno, generation in generations.items():
            known[devno] = max(generation, known.get(devno, 0))

    def of(self, app_id: int) -> Mapping[int, int]:
        return MappingProxyType(self._apps.setdefault(app_id, {}))

    def drop(self, app_id: int) -> None:
        self._apps.pop(app_id, None)
