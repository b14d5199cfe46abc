"""Which silence a network survives, from silences that ended: what a heartbeat may be.

Theory. A NAT forgets a connection after a time T without a packet, and says so to nobody. A silence of s seconds is a
trial of T: it is survived where T > s. The share of a network that survives s cannot grow with s, so its most likely
shape is the non-increasing one nearest to what was counted, which pooling neighbours that are out of order finds
(Ayer, Brunk, Ewing, Reid and Silverman 1955). Silences that nobody tried are unknown, not bad: what devices were told
before must not become the truth because they did it. So the advice leaves the profile's value only for a reason.

Counts are by bins of EDGES, of fixed number: they add up over nodes and days.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

EDGES: Final = (
    *range(5, 60, 5),
    *range(60, 120, 10),
    *range(120, 300, 20),
    *range(300, 600, 30),
    *range(600, 1200, 60),
    *range(1200, 3600, 300),
    *(3600, 7200),
)
"""Seconds; the bin n begins at EDGES[n - 1], the first at 0. Fewer than 256, so that a bin's number costs nothing."""

BINS: Final = len(EDGES) + 1
SHARE: Final = 0.995  # of the silences of one length that must be survived
LEAST: Final = 600  # trials that say so: with none failed of 3 / (1 - SHARE), one is 95 % sure
LEAST_DEATHS: Final = 10  # that say the opposite
FEW_DEATHS: Final = 0.1  # of all; so many of the shortest may be mistakes
MARGIN: Final = 0.1  # of a silence, and
LEAST_MARGIN: Final = 5.0  # seconds: how much earlier the heartbeat goes


def bin_of(silence: float) -> int:
    return bisect_right(EDGES, silence)


def floor_of(number: int) -> int:
    """The shortest silence of a bin."""
    return EDGES[number - 1] if number else 0


@dataclass(slots=True)
class Block:
    """Neighbouring bins that were pooled."""

    first: int
    last: int
    survived: float
    died: float

    @property
    def share(self) -> float:
        """That was survived; there is at least one trial."""
        return self.survived / (self.survived + self.died)


def pool(survived: Sequence[float], died: Sequence[float]) -> list[Block]:
    """The bins with a trial, in blocks of falling share."""
    blocks: list[Block] = []
    for number, (alive, dead) in enumerate(zip(survived, died, strict=True)):
        if alive + dead <= 0:
            continue
        blocks.append(Block(number, number, alive, dead))
        while len(blocks) > 1 and blocks[-2].share <= blocks[-1].share:
            last = blocks.pop()
            blocks[-1].last = last.last
            blocks[-1].survived += last.survived
            blocks[-1].died += last.died
    return blocks


@dataclass(frozen=True, slots=True)
class Findings:
    """Of one network; 0: not known."""

    alive: int  # seconds: the longest silence that SHARE of all survive, as LEAST trials say
    dead: int  # the shortest that fewer do; above `alive`


def weigh(survived: Sequence[float], died: Sequence[float]) -> Findings:
    """By bin, so many silences ended in a packet, and so many in the end of their connection."""
    blocks = pool(survived, died)
    good = [block for block in blocks if block.share >= SHARE]
    bad = blocks[len(good) :]
    return Findings(_alive(survived, died, good), _dead(died, bad))


def _alive(survived: Sequence[float], died: Sequence[float], good: Sequence[Block]) -> int:
    """Who survives a longer silence survives this one, too."""
    trials = 0.0
    for number in range(good[-1].last if good else -1, -1, -1):
        trials += survived[number] + died[number]
        if trials >= LEAST:
            return floor_of(number)
    return 0


def _dead(died: Sequence[float], bad: Sequence[Block]) -> int:
    first = bad[0].first if bad else BINS
    seen = list(accumulate(died[first:], initial=0.0))  # before each bin, and after the last
    if seen[-1] < LEAST_DEATHS:
        return 0
    enough = max(LEAST_DEATHS, FEW_DEATHS * seen[-1])
    return floor_of(first + bisect_left(seen, enough) - 1)


def advise(findings: Findings, wish: int, least: int, most: int) -> int:
    """The heartbeat, seconds, least to most: `wish`, unless it is known to be too long, or longer ones to be safe.
    Where nothing was tried between a silence that is survived and one that is not: half of what is not."""
    alive, dead = findings.alive, findings.dead
    safe = int(alive - max(LEAST_MARGIN, MARGIN * alive))
    if dead and dead <= wish:
        return max(least, min(max(safe, dead // 2), most))
    return max(least, min(max(safe, wish), most))
