"""Plan limits: accepted pushes and broadcasts of an app in a UTC day and month. Off unless a limit is set.

Counted in memory and saved in the background: a crash forgets at most the last SAVE_DELAY of pushes, and several
brokers may together let through what they spend in that time. No push waits for a write of its own. Each broker adds
what it spent to the one record of the app, under the record's version, so none overwrites another's count.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import msgspec
from msgspec import Struct

from broker.errors import ApiError
from broker.limits import Limits, limits_of
from broker.model import App, RecordChange
from broker.store import Conflict, Store, StoreError, StoreFull, StoreUnavailable

log: Final = logging.getLogger(__name__)

Clock = Callable[[], float]
KIND: Final = "quota"
KEY: Final = "spent"
SAVE_DELAY: Final = 1.0
SAVE_ATTEMPTS: Final = 5  # against other brokers; the rest goes the next time


class Spent(Struct, frozen=True):
    """What was spent on `day`, and in its month."""

    day: str  # YYYY-MM-DD
    pushes: int = 0
    broadcasts: int = 0
    month_pushes: int = 0

    def on(self, day: str) -> Spent:
        """The same seen from `day`; an earlier day changes nothing, for clocks of brokers differ."""
        if day <= self.day:
            return self
        return Spent(day, 0, 0, self.month_pushes if day[:7] == self.day[:7] else 0)

    def plus(self, other: Spent) -> Spent:
        """Of the later of both days."""
        mine, theirs = self.on(other.day), other.on(self.day)
        return Spent(
            mine.day,
            mine.pushes + theirs.pushes,
            mine.broadcasts + theirs.broadcasts,
            mine.month_pushes + theirs.month_pushes,
        )


_read: Final = msgspec.json.Decoder(Spent).decode


@dataclass(slots=True)
class _Count:
    """Of one app. The truth is both together."""

    saved: Spent
    version: int  # of the record, 0: there is none
    fresh: Spent  # spent here and not saved yet
    read_at: float  # or saved

    @property
    def clean(self) -> bool:
        return not (self.fresh.pushes or self.fresh.broadcasts or self.fresh.month_pushes)


class Quotas:
    """Asked by Pushes for every push that is about to be stored: `if quotas.applies(app): await quotas.spend(…)`, and
    `refund` for what was not stored after all (the store failed, the cid was used before)."""

    def __init__(self, store: Store, limits: Limits | None = None, clock: Clock = time.time) -> None:
        self._store = store
        self._limits = limits or Limits()
        self._clock = clock
        self._counts: dict[int, _Count] = {}
        self._saver: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def applies(self, app: App) -> bool:
        """Whether any of this is on for the app. Cheap: what is off costs a push nothing else."""
        if app.settings.restricted:
            return True
        limits = limits_of(self._limits, app)
        return not (
            limits.daily_pushes is None
            and limits.monthly_pushes is None
            and limits.daily_broadcasts is None
            and limits.max_targets is None
        )

    async def spend(self, app: App, pushes: int = 1, broadcasts: int = 0) -> str:
        """Count pushes that are about to be stored (`broadcasts` of them for more than fanout_limit devices), and
        return the day they count for. Raises ApiError 2003, 2006, 2007 or 2008 and then has counted nothing; lets
        StoreError pass."""
        self.check_restricted(app)
        limits = limits_of(self._limits, app)
        count = self._counts.get(app.app_id)
        if count is None or (count.clean and not 0 <= self._clock() - count.read_at < SAVE_DELAY):
            count = await self._load(app.app_id)
        day = self._day()
        now = count.saved.plus(count.fresh).on(day)
        _check(2006, "daily_pushes", "pushes a day", now.pushes, pushes, limits.daily_pushes)
        _check(2007, "monthly_pushes", "pushes a month", now.month_pushes, pushes, limits.monthly_pushes)
        _check(
            2008, "daily_broadcasts", "broadcasts a day", now.broadcasts, broadcasts, limits.daily_broadcasts
        )
        self._add(count, day, pushes, broadcasts)
        return day

    def refund(self, app: App, day: str, pushes: int = 1, broadcasts: int = 0) -> None:
        """Take back what `spend` counted for the day that it returned: no other gets more for it."""
        count = self._counts.get(app.app_id)
        if count is not None:
            self._add(count, day, -pushes, -broadcasts)

    def check_restricted(self, app: App) -> None:
        """Raises ApiError 2003."""
        if app.settings.restricted:
            raise ApiError(2003, "the app is restricted: its operator lets it push nothing")

    def check_targets(self, app: App, targets: int) -> None:
        """Raises ApiError 2005: one push is for too many devices."""
        most = limits_of(self._limits, app).max_targets
        if most is not None and targets > most:
            raise ApiError(
                2005, f"the push is for {targets} devices, the app's limit is {most} (max_targets)"
            )

    async def close(self) -> None:
        """Save what is not saved yet."""
        self._closing.set()
        if self._saver is not None:
            await asyncio.wait([self._saver])
        await self.save()

    async def save(self) -> None:
        """Add what was spent here to the records; what the store does not take now it gets the next time."""
        for app_id, count in list(self._counts.items()):
            if not count.clean:
                await self._save(app_id, count)
        if len(self._counts) > self._limits.max_apps_cached:
            self._counts = {app_id: count for app_id, count in self._counts.items() if not count.clean}

    def _day(self) -> str:
        return datetime.fromtimestamp(self._clock(), UTC).date().isoformat()

    async def _load(self, app_id: int) -> _Count:
        """Also once more, after a while in which nothing was spent here: others may have spent something."""
        now = self._clock()
        saved, version = await self._find(app_id)
        count = self._counts.setdefault(app_id, _Count(saved, version, Spent(self._day()), now))
        if version > count.version:
            count.saved, count.version = saved, version
        count.read_at = now
        return count

    async def _find(self, app_id: int) -> tuple[Spent, int]:
        record = await self._store.records.find(app_id, KIND, KEY)
        return (Spent(self._day()), 0) if record is None else (_read(record.value), record.version)

    def _add(self, count: _Count, day: str, pushes: int, broadcasts: int) -> None:
        count.fresh = count.fresh.plus(Spent(day, pushes, broadcasts, pushes))
        if self._saver is None or self._saver.done():
            self._saver = asyncio.get_running_loop().create_task(self._save_later())

    async def _save_later(self) -> None:
        while not (self._closing.is_set() or all(count.clean for count in self._counts.values())):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), SAVE_DELAY)
            await self.save()

    async def _save(self, app_id: int, count: _Count) -> None:
        try:
            for _ in range(SAVE_ATTEMPTS):
                if await self._save_once(app_id, count):
                    break
        except (StoreFull, StoreUnavailable) as error:
            log.warning("what app %d spent is not saved, trying again: %s", app_id, error)
        except StoreError:  # the app is gone
            self._counts.pop(app_id, None)

    async def _save_once(self, app_id: int, count: _Count) -> bool:
        """False: another broker was faster; the next time ours is added to what it wrote."""
        now, fresh = self._clock(), count.fresh
        saved = count.saved.plus(fresh)
        change = RecordChange(app_id, KIND, KEY, msgspec.json.encode(saved), count.version)
        try:
            (count.version,) = await self._store.records.save([change])
        except Conflict:
            count.saved, count.version = await self._find(app_id)
            return False
        count.saved, count.read_at = saved, now
        count.fresh = count.fresh.plus(
            Spent(fresh.day, -fresh.pushes, -fresh.broadcasts, -fresh.month_pushes)
        )
        return True


def _check(code: int, limit: str, unit: str, spent: int, more: int, most: int | None) -> None:
    if most is not None and more and spent + more > most:
        raise ApiError(code, f"over a quota: {most} {unit} ({limit}), {spent} are spent; times are UTC")
