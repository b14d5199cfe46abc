"""Pushes that the server makes at a time, once or again and again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from datetime import time as TimeOfDay
from typing import Any, Final, Literal

import msgspec

from clients.publishing.calls import Calls, given, quoted
from clients.publishing.pushes import PushRequest

PATH: Final = "/v3/schedules"
Unit = Literal["day", "week", "month"]
Weekday = Literal["MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN"]


class Single(msgspec.Struct, frozen=True, omit_defaults=True):
    """Once. `time` is a wall-clock time of `zone` (a name of the IANA time zone database; None: the server's
    default), `YYYY-MM-DD HH:MM:SS`."""

    time: str
    zone: str | None = None

    @classmethod
    def at(cls, moment: datetime) -> Single:
        """`moment` with its time zone, of `zoneinfo` or UTC; without one it is in the server's default zone."""
        return cls(_wall(moment), _zone(moment))


class Periodical(msgspec.Struct, frozen=True, omit_defaults=True):
    """At `time` (`HH:MM:SS`) on days from `start` to `end` (as Single.time, a year apart at most): every
    `frequency` days, or in every so many weeks or months on the days of `point`: MON to SUN, or 1 to 31 (months
    without such a day are left out). All are wall-clock times of `zone`."""

    start: str
    end: str
    time: str
    time_unit: Unit
    frequency: int = 1
    point: Sequence[Weekday | str] | None = None
    zone: str | None = None

    @classmethod
    def daily(cls, start: datetime, end: datetime, at: TimeOfDay, *, every: int = 1) -> Periodical:
        return cls(_wall(start), _wall(end), _clock(at), "day", every, None, _zone(start))

    @classmethod
    def weekly(
        cls, start: datetime, end: datetime, at: TimeOfDay, days: Sequence[Weekday], *, every: int = 1
    ) -> Periodical:
        return cls(_wall(start), _wall(end), _clock(at), "week", every, days, _zone(start))

    @classmethod
    def monthly(
        cls, start: datetime, end: datetime, at: TimeOfDay, days: Sequence[int], *, every: int = 1
    ) -> Periodical:
        points = [f"{day:02}" for day in days]
        return cls(_wall(start), _wall(end), _clock(at), "month", every, points, _zone(start))


class Trigger(msgspec.Struct, frozen=True, omit_defaults=True):
    """Exactly one of the two."""

    single: Single | None = None
    periodical: Periodical | None = None


def _wall(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def _clock(at: TimeOfDay) -> str:
    return at.strftime("%H:%M:%S")


def _zone(moment: datetime) -> str | None:
    """Its name. Raises ValueError for an offset without a name, which says nothing about summer time."""
    if moment.tzinfo is None:
        return None
    name = getattr(moment.tzinfo, "key", None) or str(moment.tzinfo)
    if name.startswith("UTC") and name != "UTC":
        raise ValueError(f"{name} is an offset; use a zone of `zoneinfo`, such as ZoneInfo('Asia/Shanghai')")
    return str(name)


def as_trigger(when: Single | Periodical) -> Trigger:
    return Trigger(single=when) if isinstance(when, Single) else Trigger(periodical=when)


class Schedule(msgspec.Struct, frozen=True):
    """`push` as it was given. `next`: when it fires next, as Single.time in the trigger's zone; None: never again.
    `fired`: so many pushes were made, `failed`: were refused, `missed`: times went by while no server ran."""

    schedule_id: str
    name: str
    enabled: bool
    trigger: Trigger
    push: Mapping[str, Any]
    next: str | None = None
    fired: int = 0
    missed: int = 0
    failed: int = 0


class _Page(msgspec.Struct, frozen=True):
    total_count: int
    total_pages: int
    page: int
    schedules: list[Schedule]


class _Created(msgspec.Struct, frozen=True):
    schedule_id: str


class Failure(msgspec.Struct, frozen=True):
    """Why a push was refused."""

    code: int
    message: str


class Firing(msgspec.Struct, frozen=True):
    """What a schedule did at a time (Unix seconds): it made a push, or was refused one."""

    at: float
    msg_id: int | None = None
    error: Failure | None = None


class _Messages(msgspec.Struct, frozen=True):
    log: list[Firing]


class Schedules:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def create(
        self,
        name: str,
        when: Single | Periodical,
        push: PushRequest | Mapping[str, Any],
        *,
        cid: str | None = None,
    ) -> str:
        """Returns the id. `name`: 1 to 255 bytes. Without a `cid` of your own a creation whose answer was lost
        is not tried again."""
        body = {"name": name, "enabled": True, "trigger": as_trigger(when), "push": push, "cid": cid}
        created = await self._calls.post(PATH, given(body), _Created, safe=cid is not None)
        return created.schedule_id

    async def get(self, schedule_id: str) -> Schedule:
        """Raises PushError 8104 if there is none."""
        return await self._calls.get(f"{PATH}/{quoted(schedule_id)}", Schedule)

    async def all(self) -> AsyncIterator[Schedule]:
        """Page by page."""
        number = pages = 1
        while number <= pages:
            page = await self._calls.get(PATH, _Page, page=number)
            for schedule in page.schedules:
                yield schedule
            number, pages = number + 1, page.total_pages

    async def change(
        self,
        schedule_id: str,
        *,
        name: str | None = None,
        enabled: bool | None = None,
        when: Single | Periodical | None = None,
        push: PushRequest | Mapping[str, Any] | None = None,
    ) -> None:
        """None leaves a value as it is. A single one cannot be made periodical, nor the other way round."""
        trigger = None if when is None else as_trigger(when)
        body = {"name": name, "enabled": enabled, "trigger": trigger, "push": push}
        await self._calls.do("PUT", f"{PATH}/{quoted(schedule_id)}", given(body))

    async def delete(self, schedule_id: str) -> None:
        """Pushes that it made go on."""
        await self._calls.do("DELETE", f"{PATH}/{quoted(schedule_id)}")

    async def log(self, schedule_id: str) -> list[Firing]:
        """The newest 1000 pushes and the newest 20 refusals, oldest first."""
        return (await self._calls.get(f"{PATH}/{quoted(schedule_id)}/msg_ids", _Messages)).log
