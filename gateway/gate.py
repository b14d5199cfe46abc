"""How many CONNECTs are decided, and when the others are to come. No I/O; the clock is an argument.

After an outage the devices of a whole node come back at once. Each CONNECT that is decided costs some 50 µs: ten
thousand in one turn of the loop are half a second in which nobody gets a push. So CONNECTs stand in line, a few are
decided in each turn (`arrivals.py`), and when the line is too long, newcomers are told to come later, before anything
about them is looked at. That is the node's one sign of overload, whatever it is busy with: the line moves by turns.

Theory. Who is turned away gets an appointment: each a slot of its own, 1 / pace after the one before, so that they
come back at the pace that the node has, in the order in which they asked. `pace` is what is allowed, or else what the
node managed in the last second in which there was a line. Appointments that would be too far away are all at LONGEST,
spread over as much again by the peer (`retry_jitter`).
"""

from __future__ import annotations

from typing import Final, NamedTuple

PATIENCE: Final = 1.0  # seconds in the line, above which newcomers are turned away
SOONEST: Final = 1.0  # seconds until an appointment at least: what is over by then was no storm
LONGEST: Final = 60.0
JITTER: Final = 0.2  # of the time until the appointment: clocks and networks are not that exact
MIN_PACE: Final = 50.0  # CONNECTs a second that a node manages at least
FIRST_PACE: Final = 1000.0  # as long as nothing was measured
BURST: Final = 1.0  # seconds: of the allowed CONNECTs, those of so much time may come at once
ROUNDING: Final = 1e-6  # seconds: a sum of 1 / rate is not exact


class Appointment(NamedTuple):
    """Seconds, as the peer is told."""

    retry_after: float
    retry_jitter: float  # to be added: a random part of this

    @property
    def properties(self) -> tuple[tuple[str, str], ...]:
        """User properties of a CONNACK or DISCONNECT."""
        return ("retry_after", f"{self.retry_after:.1f}"), ("retry_jitter", f"{self.retry_jitter:.1f}")


class Gate:
    """`rate`: CONNECTs a second that are decided, None: as many as the node can. All times are monotonic."""

    def __init__(self, rate: int | None, now: float) -> None:
        self._rate = rate
        self._full_at = 0.0  # when the bucket of `rate` will be full again: see doorkeeper.py
        self._booked = 0.0  # the last appointment
        self._pace = float(rate or FIRST_PACE)
        self._decided = 0  # since:
        self._since = now

    @property
    def pace(self) -> float:
        """CONNECTs a second."""
        return self._pace

    def over_rate(self, now: float) -> bool:
        """Whether another CONNECT now is more than is allowed; if not, it counts."""
        rate = self._rate
        if rate is None:
            return False
        if self._full_at + 1 / rate > now + BURST + ROUNDING:
            return True
        self._full_at = max(self._full_at, now) + 1 / rate
        return False

    def decided(self, count: int, now: float, *, line: bool) -> None:
        """So many CONNECTs were decided; `line`: others still wait."""
        self._decided += count
        elapsed = now - self._since
        if elapsed >= 1.0:
            if line and self._rate is None:
                self._pace = max(MIN_PACE, self._decided / elapsed)
            self._decided, self._since = 0, now

    def appointment(self, now: float) -> Appointment:
        """For the next one who is turned away."""
        at = max(self._booked, now + SOONEST)
        if at > now + LONGEST:
            return Appointment(LONGEST, LONGEST)
        self._booked = at + 1 / self._pace
        return Appointment(at - now, JITTER * (at - now))
