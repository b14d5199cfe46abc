"""Who may open a connection: how many at once from one address, and how many a second. No I/O; the clock is an
argument.

A refused connection has cost its accept: on the TLS port we are asked before the handshake.

Theory. A bucket of `rate` tokens that fills at `rate` a second is one number: the time at which it will be full
again. Each connection moves that time by 1 / rate, from now on if it has passed; more than a second ahead, the
bucket is empty. A bucket is full again a second after its last connection, so an address is known for as long as
it has connections and for one second more, and that is all that strangers can make us remember.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from typing import Final

from broker.tenants.networks import site_of

BURST: Final = 1.0  # seconds: the connections of so much time may come at once
ROUNDING: Final = 1e-6  # seconds: a sum of 1 / rate is not exact


class TurnedAway(enum.StrEnum):
    """Why; the set is closed, so it may be a metric's label."""

    ADDRESS = "too many from one address"
    RATE = "connect rate"


@dataclass(frozen=True, slots=True)
class DoorLimits:
    """None: no limit. Rates are new connections a second."""

    connections_per_address: int | None = None
    rate: int | None = None
    rate_per_address: int | None = None

    @property
    def off(self) -> bool:
        return self.connections_per_address is self.rate is self.rate_per_address is None


class _Source:
    """What is known of one address."""

    __slots__ = ("connections", "full_at")

    def __init__(self) -> None:
        self.connections = 0
        self.full_at = 0.0  # when its bucket will be full again


class Doorkeeper:
    """Call `admit` for each new connection, and `left` once at the end of each that was let in."""

    def __init__(self, limits: DoorLimits) -> None:
        self._limits = limits
        self._sources: dict[str, _Source] = {}
        self._leaving: deque[tuple[float, str]] = deque()  # when one went whose bucket is not full
        self._full_at = 0.0  # of the bucket that all share

    def __len__(self) -> int:
        """Addresses that are remembered."""
        return len(self._sources)

    def admit(self, source: str, now: float) -> TurnedAway | None:
        """`source`: see `source_of`. A connection that is refused for its address takes nothing from the others."""
        self._forget(now)
        limits, known = self._limits, self._sources.get(source)
        if known is not None:
            most = limits.connections_per_address
            if most is not None and known.connections >= most:
                return TurnedAway.ADDRESS
            if _is_empty(known.full_at, limits.rate_per_address, now):
                return TurnedAway.RATE
        if _is_empty(self._full_at, limits.rate, now):
            return TurnedAway.RATE
        self._full_at = _take(self._full_at, limits.rate, now)
        if known is None:
            known = self._sources[source] = _Source()
        known.connections += 1
        known.full_at = _take(known.full_at, limits.rate_per_address, now)
        return None

    def left(self, source: str, now: float) -> None:
        known = self._sources[source]
        known.connections -= 1
        if not known.connections:
            if known.full_at <= now:
                del self._sources[source]
            else:
                self._leaving.append((now, source))
        self._forget(now)

    def _forget(self, now: float) -> None:
        leaving = self._leaving
        while leaving and now >= leaving[0][0] + BURST:
            _, source = leaving.popleft()
            known = self._sources.get(source)
            if known is not None and not known.connections and known.full_at <= now + ROUNDING:
                del self._sources[source]


def _is_empty(full_at: float, rate: int | None, now: float) -> bool:
    return rate is not None and full_at + 1 / rate > now + BURST + ROUNDING


def _take(full_at: float, rate: int | None, now: float) -> float:
    return full_at if rate is None else max(full_at, now) + 1 / rate


def source_of(name: object) -> str:
    """What a peer is counted as: its address, or for IPv6 its /64. `name`: what `getpeername` says of its socket;
    None, and names of other families than IP, are all one."""
    host = str(name[0]) if isinstance(name, tuple) else ""
    return site_of(host) if ":" in host else host
