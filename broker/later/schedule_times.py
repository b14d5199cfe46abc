"""When a schedule fires: wall-clock rules of a time zone, turned into Unix seconds.

Where clocks are put forward, a wall time that does not exist stands for the first moment after the gap; where they
are put back, one that exists twice stands for its first. Periods are counted from the day, week (from Monday) or
month of the first `time` at or after `start`; months without a day that is asked for are left out.

A rule lasts for little more than a year at most, and fires once a day at most: it is walked day by day.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Final, TypeAlias
from zoneinfo import ZoneInfo

import msgspec

from broker.errors import SCHEDULE, ApiError
from broker.limits import Limits

WEEKDAYS: Final = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
UNITS: Final = ("day", "week", "month")
YEARS: Final = range(1971, 3000)  # far from where datetime ends, in any zone
ZONE_SIZE: Final = 64
DAY: Final = timedelta(days=1)

_DATE_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}")
_TIME: Final = re.compile(r"[0-9]{2}:[0-9]{2}:[0-9]{2}")


class Single(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    time: str  # YYYY-MM-DD HH:MM:SS
    zone: str | None = None  # a name of the IANA time zone database


class Periodical(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    start: str  # YYYY-MM-DD HH:MM:SS
    end: str
    time: str  # HH:MM:SS
    time_unit: str  # of UNITS, in any case
    frequency: int = 1
    point: tuple[str | int, ...] | None = None  # MON to SUN, or 01 to 31
    zone: str | None = None


class Trigger(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Exactly one of the two."""

    single: Single | None = None
    periodical: Periodical | None = None

    @property
    def zone(self) -> str | None:
        part = self.single or self.periodical
        return None if part is None else part.zone

    def as_dict(self) -> dict[str, dict[str, object]]:
        """As it was sent, without nulls, and with what it left out."""
        parts = {"single": self.single, "periodical": self.periodical}
        return {
            kind: {key: value for key, value in msgspec.structs.asdict(part).items() if value is not None}
            for kind, part in parts.items()
            if part is not None
        }

    def in_zone(self, zone: str) -> Trigger:
        """The same with the zone named, where it was not."""
        if self.zone is not None:
            return self
        if self.single is not None:
            return Trigger(single=msgspec.structs.replace(self.single, zone=zone))
        assert self.periodical is not None
        return Trigger(periodical=msgspec.structs.replace(self.periodical, zone=zone))


@dataclass(frozen=True, slots=True)
class Once:
    at: float

    @property
    def end(self) -> float:
        return self.at

    def next_after(self, moment: float) -> float | None:
        return self.at if self.at > moment else None


@dataclass(frozen=True, slots=True)
class Repeated:
    """`start` and `end` are wall-clock times of `zone`, both included."""

    zone: ZoneInfo
    start: datetime
    end_wall: datetime
    time: time
    unit: str  # of UNITS
    frequency: int
    points: frozenset[int]  # weekdays (0: Monday) or days of the month; unused for days

    @property
    def end(self) -> float:
        return instant(self.end_wall, self.zone)

    def next_after(self, moment: float) -> float | None:
        """The first firing later than this; None: the rule is over."""
        first, last = instant(self.start, self.zone), self.end
        yesterday = (
            datetime.fromtimestamp(moment, self.zone).date() - DAY
        )  # a gap may have moved its time to today
        day = max(self.start.date(), yesterday)
        while day <= self.end_wall.date():
            if self._fires_on(day):
                at = instant(datetime.combine(day, self.time), self.zone)
                if at > moment and first <= at <= last:
                    return at
            day += DAY
        return None

    @property
    def anchor(self) -> date:
        """The day of the first `time` at or after `start`."""
        return self.start.date() + (DAY if self.time < self.start.time() else timedelta())

    def _fires_on(self, day: date) -> bool:
        anchor = self.anchor
        match self.unit:
            case "day":
                return (day - anchor).days % self.frequency == 0
            case "week":
                weeks = (_monday(day) - _monday(anchor)).days // 7
                return weeks % self.frequency == 0 and day.weekday() in self.points
            case _:
                months = (day.year - anchor.year) * 12 + day.month - anchor.month
                return months % self.frequency == 0 and day.day in self.points


Times: TypeAlias = Once | Repeated


def _monday(day: date) -> date:
    return day - timedelta(days=day.weekday())


def instant(wall: datetime, zone: ZoneInfo) -> float:
    """Unix seconds of a naive wall-clock time; see the module for those that do not exist, or exist twice."""
    first = wall.replace(tzinfo=zone).timestamp()
    if datetime.fromtimestamp(first, zone).replace(tzinfo=None) == wall:
        return first
    # In a gap `fold` 0 counts with the offset before it, `fold` 1 with the one after: the change is between the two.
    before, after = int(wall.replace(tzinfo=zone, fold=1).timestamp()), int(first)
    changed = datetime.fromtimestamp(after, zone).utcoffset()
    while after - before > 1:
        middle = (before + after) // 2
        if datetime.fromtimestamp(middle, zone).utcoffset() == changed:
            after = middle
        else:
            before = middle
    return float(after)


def show(moment: float | None, zone: str) -> str | None:
    """As the API writes times."""
    if moment is None:
        return None
    return datetime.fromtimestamp(moment, find_zone(zone) or UTC).strftime("%Y-%m-%d %H:%M:%S")


def find_zone(name: str) -> ZoneInfo | None:
    """The zone of this name; None: the time zone database has none."""
    try:
        return ZoneInfo(name) if 0 < len(name) <= ZONE_SIZE else None
    except (KeyError, ValueError, OSError):
        return None


def read_times(trigger: Trigger, zone: str, limits: Limits) -> Times:
    """Check a trigger; `zone` where it names none. Raises ApiError 8100."""
    if (trigger.single is None) == (trigger.periodical is None):
        raise ApiError(SCHEDULE.invalid, "trigger: must have single or periodical, one of the two")
    kind = "single" if trigger.single is not None else "periodical"
    found = find_zone(zone if trigger.zone is None else trigger.zone)
    if found is None:
        raise ApiError(SCHEDULE.invalid, f"trigger.{kind}.zone: there is no time zone {trigger.zone!r}")
    if trigger.single is not None:
        return Once(instant(_read_date_time(trigger.single.time, "trigger.single.time"), found))
    assert trigger.periodical is not None
    return _read_periodical(trigger.periodical, found, limits)


def check_span(times: Times, now: float, limits: Limits) -> None:
    """Raises ApiError 8100 for what reaches too far."""
    days = limits.max_schedule_span // 86_400
    match times:
        case Once(at=at) if at - now > limits.max_schedule_span:
            raise ApiError(SCHEDULE.invalid, f"trigger.single.time: at most {days} days from now")
        case Repeated():
            start = instant(times.start, times.zone)
            if start - now > limits.max_schedule_span:
                raise ApiError(SCHEDULE.invalid, f"trigger.periodical.start: at most {days} days from now")


def _read_periodical(periodical: Periodical, zone: ZoneInfo, limits: Limits) -> Repeated:
    path = "trigger.periodical"
    start = _read_date_time(periodical.start, f"{path}.start")
    end = _read_date_time(periodical.end, f"{path}.end")
    if not start <= end <= start + timedelta(seconds=limits.max_schedule_span):
        days = limits.max_schedule_span // 86_400
        raise ApiError(SCHEDULE.invalid, f"{path}.end: must be later than start, by {days} days at most")
    if not 1 <= periodical.frequency <= limits.max_schedule_frequency:
        raise ApiError(SCHEDULE.invalid, f"{path}.frequency: must be 1 to {limits.max_schedule_frequency}")
    unit = periodical.time_unit.lower()
    if unit not in UNITS:
        raise ApiError(SCHEDULE.invalid, f"{path}.time_unit: must be one of {', '.join(UNITS)}")
    at = _read_time(periodical.time, f"{path}.time")
    points = _read_points(periodical.point or (), unit, f"{path}.point")
    return Repeated(zone, start, end, at, unit, periodical.frequency, points)


def _read_points(points: tuple[str | int, ...], unit: str, path: str) -> frozenset[int]:
    known = _POINTS[unit]
    if bool(points) != bool(known):
        raise ApiError(SCHEDULE.invalid, f"{path}: {_POINT_RULES[unit]}")
    read = [known.get(str(point).upper().zfill(2)) for point in points]
    if None in read:
        raise ApiError(SCHEDULE.invalid, f"{path}: {_POINT_RULES[unit]}")
    return frozenset(point for point in read if point is not None)


_POINTS: Final[dict[str, dict[str, int]]] = {
    "day": {},
    "week": {name: number for number, name in enumerate(WEEKDAYS)},
    "month": {f"{day:02}": day for day in range(1, 32)},
}
_POINT_RULES: Final = {
    "day": "must be absent where time_unit is day",
    "week": f"must be a list of {', '.join(WEEKDAYS)}, at least one",
    "month": "must be a list of 01 to 31, at least one",
}


def _read_date_time(text: str, path: str) -> datetime:
    try:
        read = datetime.fromisoformat(text) if _DATE_TIME.fullmatch(text) else None
    except ValueError:
        read = None
    if read is None or read.year not in YEARS:
        raise ApiError(SCHEDULE.invalid, f"{path}: must be YYYY-MM-DD HH:MM:SS, and such a time")
    return read


def _read_time(text: str, path: str) -> time:
    try:
        read = time.fromisoformat(text) if _TIME.fullmatch(text) else None
    except ValueError:
        read = None
    if read is None:
        raise ApiError(SCHEDULE.invalid, f"{path}: must be HH:MM:SS, 00:00:00 to 23:59:59")
    return read
