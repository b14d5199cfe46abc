"""How long a device may be silent: learned for each network. No I/O, no chance; the clock is an argument.

Theory. A NAT forgets a connection after a silence that it does not tell. What is known of that limit is a bracket:

    good    a silence that a connection survived. That is proof: once is enough.
    bad     a silence that a connection died of. That is a hint: a connection may die of other things.

Until the bracket is narrow, each heartbeat is sent at a silence inside it (a probe): a fifth longer than `good` while
nothing is bad, else at the geometric mean. Then it rests a little below `good`, and tries `bad` again later,
ever more rarely: a NAT is replaced by a better one, or `bad` was bad luck.

What a failed probe costs is that pushes are late, by at most the silence that was not proven yet. So probes go up in
small steps and down in large ones, one that failed is not repeated for an hour, and none is begun while somebody
looks at the app (decision 0024).

A death at a silence that was survived before is bad luck or another NAT. The next silence is half as long, so that
the next pushes arrive in either case; a second death before that silence was survived again says: another NAT, search
anew, below. Where it was bad luck, or a NAT that wavers, the rest is a little shorter for a while.

mars (WeChat's) asks for five successes and two failures at each step, goes up by 60 s steps from 210 to 600 s, and
never below where it began. `python -m loadtest.heartbeats` compares.

What it cannot see: a NAT that forgets a connection, lets the device's next packet make a new entry for it, and so
answers each probe (Linux's does, unless nf_conntrack_tcp_loose is 0; its timeout is five days where nobody lowered
it). There the operator lowers `most` of the carrier.

A path that dies, or a NAT that moves, would be noticed at the next heartbeat only. Where pushes come often, silence
itself says something: `Rhythm` knows how often, and after several usual gaps without one the device asks early.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
from msgspec import Meta

STEP: Final = 1.2  # from a good silence to the next probe, at most; a bracket no wider ends the search
NARROW: Final = 1.08  # bad / good: later probes make it as narrow; more saves less than it makes pushes late
MARGIN: Final = 0.96  # of good: timers fire late, and no NAT counts exactly. Less after each death there …
RELIEF: Final = (1 - MARGIN) / 100  # … and again more with each heartbeat answered there
FIRST_REST: Final = 3600.0  # seconds from the end of a search to the next probe; doubled each time …
LONGEST_REST: Final = 86_400.0  # … up to this
LONGEST: Final = 65_535  # seconds: MQTT's keep-alive has 16 bits
INEXACT: Final = 0.5  # seconds: two silences that differ by less are the same
# Usual gaps between pushes without one until the device asks early, and how often it does.
CALM: Final = (3.0, 1)
WARY: Final = (2.0, 2)  # the same where a connection died lately, or another address is known
WARY_FOR: Final = 3600.0  # seconds after a death
EARLY_LEAST: Final = 20.0  # seconds of silence that say nothing, however often pushes come
TOGETHER: Final = 1.0  # seconds: pushes that are closer are one
GAPS: Final = 16  # that count; the gaps between chance events then say their mean to within a fifth
FIRST_GAP: Final = (
    30.0  # seconds: taken for granted, as one gap, so that the first silence says something too
)
ANSWER_LEAST: Final = 4.0  # seconds: three losses in a row, sent again by TCP after 0.4 + 0.8 + 1.6 s


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds of silence. `start`: where nothing is known of a network. Raises ValueError."""

    start: float = 240.0
    least: float = 30.0
    most: float = 1200.0

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.start <= self.most <= LONGEST:
            raise ValueError(f"heartbeat {self}: not 0 < least <= start <= most <= {LONGEST}")

    @classmethod
    def read(cls, text: str) -> Bounds:
        """As a server says it, "start least most". Raises ValueError."""
        start, least, most = (float(word) for word in text.split())
        return cls(start, least, most)

    def clamp(self, seconds: float) -> float:
        return min(max(seconds, self.least), self.most)


class _Saved(msgspec.Struct, omit_defaults=True):
    good: Annotated[float, Meta(ge=0, le=LONGEST)] = 0.0
    bad: Annotated[float, Meta(gt=0, le=LONGEST)] | None = None
    rest: Annotated[float, Meta(ge=FIRST_REST, le=LONGEST_REST)] = FIRST_REST
    met: bool = False
    margin: Annotated[float, Meta(gt=0, le=MARGIN)] = MARGIN
    growth: Annotated[float, Meta(ge=NARROW, le=STEP)] = STEP
    probe_in: Annotated[float, Meta(ge=0, le=LONGEST_REST)] = (
        0.0  # from now on: clocks do not survive a restart
    )


class Heartbeat:
    """Of one network. `bounds` may change at any time; what was learned is kept."""

    __slots__ = (
        "_deaths",
        "_doubted",
        "_growth",
        "_hint",
        "_margin",
        "_met",
        "_probe_at",
        "_proof",
        "_rest",
        "answers",
        "bad",
        "bounds",
        "good",
    )

    def __init__(self, bounds: Bounds = Bounds()) -> None:
        self.bounds = bounds
        self.good = 0.0  # longest silence survived; 0: none
        self.bad = math.inf  # shortest one died of, that is longer
        self.answers = AnswerTime()
        self._met = False  # a death here: what the server thinks of this network does not count any more
        self._deaths = 0  # since a silence was survived
        self._doubted = False  # died at a silence survived before, and not survived it since
        self._proof = 0.0  # longest silence survived since
        self._hint = math.inf  # died at, when asked early, and no silence as long was survived since
        self._margin = MARGIN
        self._growth = STEP
        self._rest = FIRST_REST
        self._probe_at = -math.inf  # no probe before

    def interval(self, now: float, *, probe: bool = True) -> float:
        """Seconds of silence after which a heartbeat is due. `probe`: whether it may be a silence never survived."""
        if self._doubted and self._deaths:
            wanted = self.good / 2
        elif probe and now >= self._probe_at and not (self.good and self._deaths > 1):
            wanted = self._next_probe()
        else:
            wanted = self._proven()
        return self.bounds.clamp(wanted)

    def _proven(self) -> float:
        if not self._met:
            return max(self.good * MARGIN, self.bounds.start)
        return self.good * self._margin or self.bounds.least

    def _next_probe(self) -> float:
        if not self._met:
            return max(self.good * STEP, self.bounds.start)
        if self.bad <= self._low() * NARROW:
            return self.bad
        mean = math.sqrt(self._low() * self.bad)
        return min(mean, self.good * self._growth) if self.good else mean

    def _low(self) -> float:
        return max(self.good, self.bounds.least)

    def survived(self, silence: float, now: float) -> None:
        """Something was heard after so long a silence, on the same connection."""
        if (
            silence < self.bounds.least - INEXACT
        ):  # no heartbeat is as close, and what comes after a reconnect proves nothing
            return
        silence = min(silence, LONGEST)  # a phone may sleep longer
        self._deaths = 0
        if silence >= self._hint - INEXACT:
            self._hint = math.inf
        if self._doubted:
            self._proof = max(self._proof, silence)
        if silence >= self.bounds.clamp(self.good * self._margin) - INEXACT:
            self._doubted = False
            self._margin = min(self._margin + RELIEF, MARGIN)
        if silence <= self.good:
            return
        self.good = silence
        self._growth = min(self._growth**2, STEP)
        if silence >= self.bad - INEXACT:
            self._growth = NARROW  # a little more patient is likelier than another NAT
            self._search(math.inf, now)
        else:
            self._rest_if_found(now)

    def died(self, silence: float, now: float, *, early: bool = False) -> None:
        """Nobody answered after so long a silence, and a new connection was possible at once: it was not the network
        that was gone, but the connection. `early`: asked because pushes were missing (Rhythm), which finds more paths
        that died than NATs that forget. So it counts when it is the second, and no silence as long was survived since
        the first."""
        if silence < self.bounds.least - INEXACT:
            return
        silence = min(silence, LONGEST)
        if early and silence < self._hint - INEXACT:
            self._hint = silence
            return
        self._met = True
        self._deaths += 1
        if silence > self.good + INEXACT:
            self.bad = min(self.bad, silence)
            self._rest_if_found(now)
        elif not self._doubted:
            self._doubted, self._proof = True, 0.0
            self._margin *= MARGIN
            self._probe_at = max(self._probe_at, now + FIRST_REST)
        else:
            self._doubted, self._margin = False, MARGIN
            self.good = self._proof if self._proof < silence else 0.0
            self._search(silence, now)

    def _search(self, bad: float, now: float) -> None:
        self.bad = bad
        self._rest = FIRST_REST
        self._probe_at = now
        self._rest_if_found(now)

    def _rest_if_found(self, now: float) -> None:
        if self.bad <= self._low() * STEP + INEXACT:
            self._probe_at = now + self._rest
            self._rest = min(2 * self._rest, LONGEST_REST)

    def saved(self, now: float) -> dict[str, float]:
        """Small, for JSON."""
        bad = None if self.bad == math.inf else self.bad
        wait = max(self._probe_at - now, 0.0)
        kept = _Saved(self.good, bad, self._rest, self._met, self._margin, self._growth, wait)
        found: dict[str, float] = msgspec.to_builtins(kept)
        return found

    @classmethod
    def restored(cls, saved: object, bounds: Bounds, now: float) -> Heartbeat:
        """What cannot be read was not learned."""
        found = cls(bounds)
        with contextlib.suppress(msgspec.ValidationError):
            kept = msgspec.convert(saved, _Saved)
            found.good = kept.good
            found.bad = math.inf if kept.bad is None else max(kept.bad, kept.good)
            found._rest, found._probe_at = kept.rest, now + kept.probe_in
            found._met, found._margin, found._growth = kept.met, kept.margin, kept.growth
        return found


class Rhythm:
    """How often the server speaks unasked. A decaying mean of the gaps; a burst counts as one, and what waited while
    the device was away is a burst. Pushes are as frequent in each network: only what died is forgotten with it."""

    __slots__ = ("_asked", "_gaps", "_mean", "_spoke_at", "_wary_until")

    def __init__(self) -> None:
        self._asked = 0  # questions since it spoke
        self._gaps = 1
        self._mean = FIRST_GAP
        self._spoke_at: float | None = None  # on this connection
        self._wary_until = -math.inf

    def connected(self, now: float, *, died: bool) -> None:
        """`died`: the connection before, without a word."""
        self._spoke_at = None
        if died:
            self._wary_until = now + WARY_FOR

    def moved(self) -> None:
        self._wary_until = -math.inf

    def spoke(self, now: float) -> None:
        before, self._spoke_at, self._asked = self._spoke_at, now, 0
        if before is None or now - before < TOGETHER:
            return
        self._gaps = min(self._gaps + 1, GAPS)
        self._mean += (now - before - self._mean) / self._gaps

    def asked(self) -> None:
        self._asked += 1

    def patience(self, now: float, *, alternatives: bool) -> float:
        """Seconds of silence, since anything was heard, after which it is worth a question; infinite until the first
        push of a connection, and when enough was asked. `alternatives`: there is another way, if this one is dead."""
        gaps, times = WARY if alternatives or now < self._wary_until else CALM
        if self._spoke_at is None or self._asked >= times:
            return math.inf
        return max(gaps * self._mean, EARLY_LEAST)


class AnswerTime:
    """How long the answer to a heartbeat may take: twice what RFC 6298 says (2.2, 2.3), at least ANSWER_LEAST. Twice,
    for what TCP lost and sent again is in the samples, and one comes in minutes, not one with each round trip."""

    __slots__ = ("_deviation", "_mean")

    def __init__(self) -> None:
        self._mean: float | None = None
        self._deviation = 0.0

    def sample(self, seconds: float) -> None:
        if self._mean is None:
            self._mean, self._deviation = seconds, seconds / 2
        else:
            self._deviation += (abs(self._mean - seconds) - self._deviation) / 4
            self._mean += (seconds - self._mean) / 8

    def limit(self, most: float) -> float:
        """Seconds. `most`, where nothing was answered yet."""
        if self._mean is None:
            return most
        return min(max(2 * (self._mean + 4 * self._deviation), ANSWER_LEAST), most)
