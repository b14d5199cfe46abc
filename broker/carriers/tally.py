"""What is counted of a network, a carrier and a kind of link: of fixed size, and two of them add up to one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import inf
from operator import add
from typing import Final

import msgspec

from broker.carriers.panels import PANELS
from broker.carriers.silences import BINS
from broker.metrics import LATENCY_BOUNDS

LIFETIME_BOUNDS: Final = (
    *(1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0),
    *(3600.0, 7200.0, 14_400.0, 28_800.0, 57_600.0, 86_400.0, 172_800.0, 604_800.0),
)
ACK_BOUNDS: Final = LATENCY_BOUNDS


def _none(count: int) -> list[int]:
    return msgspec.field(default_factory=lambda: [0] * count)


class Tally(msgspec.Struct, array_like=True):
    """Counts since some time. A change of its fields or their sizes needs another SHAPE."""

    connects: int = 0
    closed: int = 0  # connections that ended in a word of the device, or of its network
    told: int = 0  # that we ended
    silent: int = 0  # that ended without a word: nothing came within the keep-alive, or no acknowledgement
    taken: int = 0  # likewise, and the device was back before we knew
    lifetimes: list[int] = _none(len(LIFETIME_BOUNDS) + 1)
    survived: list[int] = _none(BINS)  # silences that a packet ended
    died: list[int] = _none(BINS)  # silences that the connection did not outlive
    acks: list[int] = _none(len(ACK_BOUNDS) + 1)  # a sample, by seconds since the push was sent
    sent: int = 0  # pushes, on connections that have ended
    unanswered: int = 0  # of these, not acknowledged
    segments: int = 0  # of TCP, with data; a sample
    retransmits: int = 0  # of these
    trips: int = 0  # round-trip times that TCP knew, and
    trip_seconds: float = 0.0  # their sum
    panels: dict[int, int] = msgspec.field(default_factory=dict)  # silences again: broker/carriers/panels.py

    def add(self, other: Tally) -> None:
        for name in self.__struct_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, dict):
                for key, count in theirs.items():
                    mine[key] = mine.get(key, 0) + count
            else:
                setattr(self, name, list(map(add, mine, theirs)) if isinstance(mine, list) else mine + theirs)

    @property
    def ends(self) -> int:
        return self.closed + self.told + self.silent + self.taken


SHAPE: Final = (2, BINS, len(LIFETIME_BOUNDS), len(ACK_BOUNDS), PANELS)
"""Tallies of another one cannot be added: whoever finds them leaves them out."""


def place(bounds: Sequence[float], value: float) -> int:
    """In a histogram with these upper bounds."""
    return bisect_left(bounds, value)


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """Evenly within a bucket; the last bound where it lies beyond. None: nothing was counted."""
    total = sum(counts)
    if not total:
        return None
    wanted, seen, lower = share * total, 0, 0.0
    for upper, count in zip((*bounds, inf), counts, strict=True):
        if count and seen + count >= wanted:
            return lower if upper == inf else lower + (upper - lower) * max(0.0, wanted - seen) / count
        seen, lower = seen + count, upper if upper != inf else lower
    raise AssertionError("more than were counted")
