"""Time for a node: one coarse clock and one timer wheel instead of a timer per connection.

A connection stands in exactly one bucket, at the time of its next check; the check says when the next one is.
Nothing moves when bytes arrive: that only notes the time (architecture, decision 2).
"""

from __future__ import annotations

from typing import Generic, TypeVar

Item = TypeVar("Item")


class Clock:
    """Read by the hot paths as plain attributes; the node sets both several times a second."""

    __slots__ = ("now", "wall")

    def __init__(self, now: float = 0.0, wall: float = 0.0) -> None:
        self.now = now  # seconds, monotonic
        self.wall = wall  # Unix seconds


class Wheel(Generic[Item]):
    """Buckets of `tick` seconds."""

    __slots__ = ("_buckets", "_turn", "tick")

    def __init__(self, now: float, tick: float) -> None:
        self.tick = tick
        self._buckets: dict[int, list[Item]] = {}
        self._turn = int(now / tick)  # buckets up to here are done

    def add(self, item: Item, at: float) -> None:
        """Have `item` returned by `due` at `at`, up to one tick late, never early."""
        turn = max(int(at / self.tick) + 1, self._turn + 1)
        bucket = self._buckets.get(turn)
        if bucket is None:
            self._buckets[turn] = [item]
        else:
            bucket.append(item)

    def due(self, now: float) -> list[Item]:
        """Everything whose time has come, taken off the wheel."""
        last = int(now / self.tick)
        found: list[Item] = []
        if last - self._turn > len(self._buckets):  # the clock leapt: look at what there is, not at each turn
            turns = sorted(turn for turn in self._buckets if turn <= last)
        else:
            turns = list(range(self._turn + 1, last + 1))
        for turn in turns:
            found.extend(self._buckets.pop(turn, ()))
        self._turn = max(self._turn, last)
        return found
