"""How many devices were new, online and active, by hour, day or month."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Final

from pyroaring import BitMap

from broker.errors import ApiError
from broker.limits import Limits, limits_of
from broker.model import PLATFORMS, Activity, App, Term
from broker.store import Store
from broker.telling.calendar import HOUR
from broker.telling.reports import read_int

Clock = Callable[[], float]
DAY: Final = 86_400
DAYS_OF_HOURS: Final = 3  # for so many days, today included, hours are told apart
YEARS: Final = range(1970, 3000)


@dataclass(frozen=True, slots=True)
class Unit:
    """What `time_unit` may be."""

    form: str  # as strptime has it
    example: str


UNITS: Final = {
    "HOUR": Unit("%Y-%m-%d %H", "2014-06-10 12"),
    "DAY": Unit("%Y-%m-%d", "2014-06-10"),
    "MONTH": Unit("%Y-%m", "2014-06"),
}


class Users:
    """Methods let StoreError pass."""

    def __init__(self, store: Store, limits: Limits | None = None, clock: Clock = time.time) -> None:
        self._store = store
        self._limits = limits or Limits()
        self._clock = clock

    async def report(
        self, app: App, time_unit: str | None, start: str | None, duration: str | None
    ) -> dict[str, object]:
        """`duration` hours, days or months from `start` on, in the store's time zone. Raises ApiError."""
        unit = (time_unit or "").upper()
        if unit not in UNITS:
            raise ApiError(3004, f"time_unit: must be one of {', '.join(UNITS)}")
        first, count = _read_start(unit, start), self._read_duration(app, unit, duration)
        edges = self._edges(unit, first, count)
        self._check(app, unit, edges)
        counts = await self._count(app, edges)
        form = UNITS[unit].form
        times = [self._store.calendar.local(edge).strftime(form) for edge in edges[:-1]]
        return {
            "time_unit": unit,
            "start": first.strftime(form),
            "duration": count,
            "items": [{"time": at} | counted for at, counted in zip(times, counts, strict=True)],
        }

    def _read_duration(self, app: App, unit: str, text: str | None) -> int:
        days = limits_of(self._limits, app).max_user_days
        most = {"HOUR": 24 * DAYS_OF_HOURS, "DAY": days, "MONTH": max(1, days // 30)}
        return read_int("duration", text, 1, 1, most[unit])

    def _edges(self, unit: str, first: datetime, count: int) -> list[int]:
        """Where the stretches begin, and where the last one ends."""
        calendar = self._store.calendar
        start = calendar.moment(first)
        if unit == "HOUR":
            return [start + n * HOUR for n in range(count + 1)]
        if unit == "DAY":
            return [calendar.day(start, n) for n in range(count + 1)]
        months = [first.year * 12 + first.month - 1 + n for n in range(count + 1)]
        return [calendar.midnight(date(month // 12, month % 12 + 1, 1)) for month in months]

    def _check(self, app: App, unit: str, edges: Sequence[int]) -> None:
        """What is known in part must not look like the whole. Before the app was made there is nothing to know."""
        calendar, now = self._store.calendar, self._clock()
        oldest = calendar.day(now - self._store.activity_lifetime)
        if unit == "HOUR":
            oldest = max(oldest, calendar.day(now, 1 - DAYS_OF_HOURS))
        if edges[0] < oldest and edges[-1] > app.created_at:
            since = self._first_whole(unit, oldest).strftime(UNITS[unit].form)
            raise ApiError(3004, f"start: the report by {unit} goes back to {since}")

    def _first_whole(self, unit: str, day: int) -> datetime:
        local = self._store.calendar.local(day)
        if unit == "MONTH" and local.day > 1:
            return self._store.calendar.local(self._edges(unit, local.replace(day=1, tzinfo=None), 1)[1])
        return local

    async def _count(self, app: App, edges: Sequence[int]) -> list[dict[str, object]]:
        stretches = list(itertools.pairwise(edges))
        terms = [(Term.PLATFORM, platform) for platform in PLATFORMS]
        postings = await self._store.postings(app.app_id, terms)
        platforms = dict(zip(PLATFORMS, postings, strict=True))
        numbers = await self._store.registered_before(app.app_id, edges)
        there = [await self._active(app, activity, stretches) for activity in Activity]
        counted: list[dict[str, object]] = []
        for stretch in zip(numbers, numbers[1:], *there, strict=False):
            counted.append({platform: _counted(devnos, *stretch) for platform, devnos in platforms.items()})
            await asyncio.sleep(0)  # half a millisecond for each, of a million devices
        return counted

    async def _active(
        self, app: App, activity: Activity, stretches: Sequence[tuple[int, int]]
    ) -> list[BitMap]:
        """Asked for together, they are one read."""
        return await asyncio.gather(
            *(self._store.active(app.app_id, activity, start, end) for start, end in stretches)
        )


def _read_start(unit: str, text: str | None) -> datetime:
    form, example = UNITS[unit].form, UNITS[unit].example
    try:
        start = datetime.strptime(text or "", form)  # noqa: DTZ007 - the store's calendar has the zone
    except ValueError:
        start = None
    if start is None or start.year not in YEARS or start.strftime(form) != text:
        raise ApiError(3004, f"start: by {unit} it is written as {example}")
    return start


def _counted(platform: BitMap, low: int, high: int, online: BitMap, active: BitMap) -> dict[str, int]:
    """`low` and `high`: the numbers of the devices that were new."""
    return {
        "new": platform.range_cardinality(low, high),
        "online": online.intersection_cardinality(platform),
        "active": active.intersection_cardinality(platform),
    }
