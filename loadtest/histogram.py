"""Latencies as counts in buckets that grow with them: what many processes measured is added up.

Up to 256 µs each microsecond has its own bucket, above that there are 128 for each power of two, so that no quantile
is off by more than 0.8 % (Tene's HDR histogram has this layout). Only the buckets in use are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

FINE: Final = 8  # bits of a value that are kept
US: Final = 1e6

Counts = Mapping[int, int]  # bucket -> how many


def bucket_of(seconds: float) -> int:
    """Negative ones count as 0: clocks of two cores may differ by a microsecond."""
    value = max(0, int(seconds * US))
    shift = max(0, value.bit_length() - FINE)
    return (shift << (FINE - 1)) + (value >> shift)


def highest_of(bucket: int) -> float:
    """The largest value of a bucket, in seconds."""
    half = 1 << (FINE - 1)
    if bucket < 2 * half:
        return bucket / US
    shift = bucket // half - 1
    return ((bucket - shift * half + 1 << shift) - 1) / US


class Histogram:
    __slots__ = ("counts",)

    def __init__(self, counts: Counts | None = None) -> None:
        self.counts: Counter[int] = Counter(counts)

    def add(self, seconds: float) -> None:
        self.counts[bucket_of(seconds)] += 1

    def merge(self, counts: Counts) -> None:
        for bucket, count in counts.items():
            self.counts[bucket] += count

    @property
    def count(self) -> int:
        return self.counts.total()

    def above(self, seconds: float) -> int:
        """How many are in buckets above this value's."""
        limit = bucket_of(seconds)
        return sum(count for bucket, count in self.counts.items() if bucket > limit)

    def quantile(self, share: float) -> float:
        """In seconds, the nearest rank; 0 for no values."""
        [value] = self.quantiles([share])
        return value

    def quantiles(self, shares: Iterable[float]) -> list[float]:
        """In one pass; `shares` ascend."""
        found: list[float] = []
        buckets, total = sorted(self.counts), self.counts.total()
        at, seen = -1, 0
        for share in shares:
            rank = min(int(total * share), total - 1)
            while seen <= rank:
                at += 1
                seen += self.counts[buckets[at]]
            found.append(highest_of(buckets[at]) if total else 0.0)
        return found


class Timeline:
    """A histogram for each window of time.perf_counter, `width` seconds wide; of what was added since `drain`."""

    __slots__ = ("_counts", "width")

    def __init__(self, width: float) -> None:
        self.width = width
        self._counts: dict[int, Counter[int]] = {}

    def add(self, due: float, at: float) -> None:
        """Something that was due then took until `at`."""
        window = int(due / self.width)
        counts = self._counts.get(window)
        if counts is None:
            counts = self._counts[window] = Counter()
        counts[bucket_of(at - due)] += 1

    def drain(self) -> dict[int, Counter[int]]:
        """By the number of the window."""
        drained, self._counts = self._counts, {}
        return drained
