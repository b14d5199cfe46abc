"""Rate limits: calls of one caller in a clock minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Final, TypeAlias

from broker.errors import ApiError, Area
from broker.limits import NO_LIMIT, Limits

MINUTE: Final = 60
JSON: Final = "application/json"

Clock = Callable[[], float]
Who: TypeAlias = str | tuple[int, bool]
"""A group's key; or an app, and whether it is its publisher: what every installation knows, the device key, must not
use up what the backend needs."""


class RateLimits:
    """In each area on its own. Holds only the callers of the current minute."""

    def __init__(self, limits: Limits, clock: Clock = time.time) -> None:
        self._limits = limits
        self._clock = clock
        self._minute = 0
        self._spent: dict[tuple[str, Who], int] = {}

    def spend(self, area: Area, who: Who, limits: Limits) -> dict[str, str]:
        """Count one call and return the headers that say what is left; "-1" left means: refuse. `limits`: the
        caller's."""
        quota = _QUOTA[area.rate](limits)
        if quota is None:
            return dict(_UNLIMITED)
        now = int(self._clock())
        if now // MINUTE != self._minute:
            self._minute = now // MINUTE
            self._spent.clear()
        spent = self._spent[area.rate, who] = self._spent.get((area.rate, who), 0) + 1
        return _headers(quota, max(quota - spent, -1), MINUTE - now % MINUTE)

    def untouched(self, area: Area) -> dict[str, str]:
        """Headers for a caller we do not know."""
        quota = _QUOTA[area.rate](self._limits)
        return dict(_UNLIMITED) if quota is None else _headers(quota, quota, MINUTE)


def is_over(headers: Mapping[str, str]) -> bool:
    return headers["X-Rate-Limit-Remaining"] == "-1"


def over_rate(area: Area, headers: Mapping[str, str]) -> ApiError:
    """What the refused caller is told."""
    quota, reset = headers["X-Rate-Limit-Quota"], headers["X-Rate-Limit-Reset"]
    return ApiError(
        2002, f"over the rate limit: {quota} {area.rate} calls a minute; try again in {reset} seconds"
    )


_QUOTA: Final[Mapping[str, Callable[[Limits], int | None]]] = {
    name: attrgetter(f"{name}_rate") for name in ("push", "report", "device")
}


def _headers(quota: int, remaining: int, reset: int) -> dict[str, str]:
    return {
        "Content-Type": JSON,
        "X-Rate-Limit-Quota": str(quota),
        "X-Rate-Limit-Remaining": str(remaining),
        "X-Rate-Limit-Reset": str(reset),
    }


_UNLIMITED: Final = _headers(NO_LIMIT, NO_LIMIT, MINUTE)
