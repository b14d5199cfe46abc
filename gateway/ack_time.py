"""How long a peer takes to acknowledge, and how long it is waited for: RFC 6298, in the integers of Jacobson and
Karels ("Congestion Avoidance and Control", 1988, appendix A).

The time from sending to acknowledging is measured in ticks, for one packet at a time: the one that was sent into an
empty window. Of it a mean and a mean deviation are kept, scaled so that shifts are all the arithmetic there is. What
comes out is a timeout; in MQTT it resends nothing, it ends the connection (architecture, decision 6).

Values are shared: few pairs of small integers occur, and a session owns none of its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Final

from broker.carriers.profile import Acks

TICKS: Final = 4  # of a second: a node's clock is no finer
LONGEST: Final = 65_535 * TICKS  # a sample counts as at most this: no peer makes us keep large numbers
MEAN_SHIFT: Final = 3  # alpha = 1/8
SPREAD_SHIFT: Final = 2  # beta = 1/4


@dataclass(frozen=True, slots=True, eq=False)
class AckTime:
    """Get one from UNKNOWN, OVERDUE and `after`; compare by identity."""

    mean: int  # eighths of a tick
    spread: int  # quarters of a tick; 0: nothing was measured
    steady: bool = field(init=False)  # a sample of 0 would change nothing: the hot path takes none

    def __post_init__(self) -> None:
        steady = self.mean < 1 << MEAN_SHIFT and 0 < self.spread < 1 << SPREAD_SHIFT
        object.__setattr__(self, "steady", steady)

    def after(self, seconds: float) -> AckTime:
        """With one more sample."""
        return _after(self, min(round(seconds * TICKS), LONGEST))

    def timeout(self, acks: Acks) -> float:
        """Seconds in which some progress must come."""
        if self is OVERDUE:
            return acks.most
        if not self.spread:
            return acks.first
        ticks = (self.mean >> MEAN_SHIFT) + self.spread  # SRTT + max(G, 4 * RTTVAR), with a tick as G
        return max(acks.least, min(ticks / TICKS, acks.most))


@functools.lru_cache(maxsize=4096)
def _after(known: AckTime, ticks: int) -> AckTime:
    if not known.spread:  # SRTT = R, RTTVAR = R / 2
        return _ack_time(ticks << MEAN_SHIFT, max(1, ticks << SPREAD_SHIFT - 1))
    error = ticks - (known.mean >> MEAN_SHIFT)
    spread = known.spread + abs(error) - (known.spread >> SPREAD_SHIFT)
    return _ack_time(max(0, known.mean + error), spread)


@functools.lru_cache(maxsize=4096)
def _ack_time(mean: int, spread: int) -> AckTime:
    return AckTime(mean, spread)


UNKNOWN: Final = AckTime(0, 0)
OVERDUE: Final = AckTime(-1, 0)
"""Nothing was measured, and on the connection before an acknowledgement did not come in time: on a link slower than
`first` nothing would ever be measured (RFC 6298, 5.5)."""
