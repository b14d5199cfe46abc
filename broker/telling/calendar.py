"""Hours and days of a time zone, as Unix seconds."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

HOUR: Final = 3600


class Calendar:
    """An hour is always 3600 seconds and begins when the zone's does; a day has 23 or 25 of them now and then."""

    def __init__(self, zone: str = "UTC") -> None:
        """Raises ValueError if the IANA time zone database has no such name."""
        try:
            self._zone = ZoneInfo(zone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(f"{zone!r} is no time zone, such as Europe/Berlin or UTC") from error

    def local(self, at: float) -> datetime:
        return datetime.fromtimestamp(at, self._zone)

    def hour(self, at: float) -> int:
        """When the hour began that `at` is in."""
        offset = int((self.local(at).utcoffset() or timedelta()).total_seconds())
        return int((at + offset) // HOUR * HOUR - offset)

    def day(self, at: float, days: int = 0) -> int:
        """When the day began that `at` is in, or one so many days later."""
        return self.midnight(self.local(at).date() + timedelta(days=days))

    def midnight(self, day: date) -> int:
        return self.moment(datetime.combine(day, time()))

    def moment(self, local: datetime) -> int:
        """A wall-clock time without zone. What the clock shows twice is the first of the two."""
        return int(local.replace(tzinfo=self._zone).timestamp())
