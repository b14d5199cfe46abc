"""Adaptive heartbeats behind simulated NATs: ours, mars' (WeChat's) and an oracle's who knows the timeout.

    python -m loadtest.heartbeats [--seed N] [--days N] [--write docs/numbers.md]

Simulated time; nothing is connected. A device has one connection through a NAT that forgets it after a silence;
pushes come at random (Poisson); each segment is lost with a probability and sent again by TCP after 0.4, 0.8, 1.6 …
s. A push that meets a forgotten connection arrives when the device has found out and connected again. All three
wait for an answer as long (`clients.heartbeat.AnswerTime`), so that only their silences differ. Counted from half
an hour on: pushes that took more than 10 s, and heartbeats against the oracle's, where a reconnect counts as three
(TCP's handshake, CONNECT).

A second table is of connections that die of something else, after four hours on average, and nobody is told: ours
with and without the question that it asks early where pushes are missing (`clients.heartbeat.Rhythm`).

The oracle sends its heartbeat one second before the NAT forgets, and knows of each change. mars is written after its
code: start 210 s, +60 s after five successes (three at the start), at most 600 s; two failures while it probes: 80 s
less, for good; two failures later: from the start again; +20 s after seven days; never below its start.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import click

from clients.heartbeat import AnswerTime, Bounds, Heartbeat, Rhythm

LEARNING: Final = 1800.0  # seconds that are not counted
LATE: Final = 10.0  # seconds
RECONNECT: Final = 3  # heartbeats' worth of radio
PATIENCE: Final = 10.0  # seconds: longest wait for an answer
ROUND_TRIP: Final = 0.2
DAY: Final = 86_400.0
PUSHES_EVERY: Final = 600.0  # seconds, on average
SEED: Final = 6
BEGIN, END = "<!-- heartbeats -->", "<!-- end heartbeats -->"


@dataclass(frozen=True, slots=True)
class Nat:
    """`timeouts`: (from second, seconds of silence until it forgets), in order. `spread`: each silence has its own
    timeout, up to this share shorter."""

    timeouts: tuple[tuple[float, float], ...]
    spread: float = 0.0

    def shortest(self, now: float) -> float:
        return self._at(now) * (1 - self.spread)

    def draw(self, now: float, chance: random.Random) -> float:
        return self._at(now) * (1 - self.spread * chance.random())

    def _at(self, now: float) -> float:
        return [timeout for since, timeout in self.timeouts if since <= now][-1]


class Strategy(Protocol):
    def interval(self, now: float) -> float:
        """Seconds of silence until the next heartbeat."""

    def survived(self, silence: float, now: float) -> None: ...

    def died(self, silence: float, now: float, *, early: bool = False) -> None: ...


class Oracle:
    def __init__(self, nat: Nat) -> None:
        self._nat = nat

    def interval(self, now: float) -> float:
        return min(self._nat.shortest(now) - 1, Bounds().most)

    def survived(self, silence: float, now: float) -> None:
        pass

    def died(self, silence: float, now: float, *, early: bool = False) -> None:
        pass


class Mars:
    START: Final = 210.0
    MOST: Final = 600.0
    STEP: Final = 60.0
    MARGIN: Final = 20.0
    AGAIN: Final = 7 * DAY

    def __init__(self) -> None:
        self._current = self.START
        self._successes = self._failures = 0
        self._stable_since: float | None = None

    def interval(self, now: float) -> float:
        return self._current

    def survived(self, silence: float, now: float) -> None:
        self._failures = 0
        if silence < self._current:  # a push came first
            return
        self._successes += 1
        if self._stable_since is not None:
            self._try_more_after_a_week(now)
        elif self._successes >= (3 if self._current == self.START else 5):
            self._step_up(now)

    def _try_more_after_a_week(self, now: float) -> None:
        if self._stable_since is not None and now >= self._stable_since + self.AGAIN:
            self._current = min(self._current + self.MARGIN, self.MOST - self.MARGIN)
            self._stable_since = now

    def _step_up(self, now: float) -> None:
        self._successes = 0
        if self._current >= self.MOST:
            self._rest(self.MOST - self.MARGIN, now)
        else:
            self._current = min(self._current + self.STEP, self.MOST)

    def _rest(self, interval: float, now: float) -> None:
        self._current = max(interval, self.START)
        self._stable_since = now

    def died(self, silence: float, now: float, *, early: bool = False) -> None:
        self._failures += 1
        if self._failures < 2:
            return
        self._failures = self._successes = 0
        if self._stable_since is not None:
            self._current, self._stable_since = self.START, None
        elif self._current > self.START:
            self._rest(self._current - self.STEP - self.MARGIN, now)


@dataclass(slots=True)
class Outcome:
    """Of what was counted."""

    pushes: int = 0
    late: int = 0
    slowest: float = 0.0  # seconds
    dead: list[float] = field(default_factory=list)  # seconds from each death until a new connection
    heartbeats: int = 0
    reconnects: int = 0

    @property
    def in_time(self) -> float:
        return 1 - self.late / max(self.pushes, 1)

    def dead_for(self, share: float) -> float:
        """Seconds: this share of the deaths was over by then. 0 without deaths."""
        return sorted(self.dead)[int(share * (len(self.dead) - 1))] if self.dead else 0.0

    @property
    def radio(self) -> int:
        return self.heartbeats + RECONNECT * self.reconnects

    def take_push(self, seconds: float) -> None:
        self.pushes += 1
        self.late += seconds > LATE
        self.slowest = max(self.slowest, seconds)


@dataclass(slots=True)
class Life:
    """A device behind a NAT. `asks`: early, where pushes are missing. `lasts`: mean seconds until a connection dies
    of something else."""

    nat: Nat
    strategy: Strategy
    loss: float
    chance: random.Random
    pushes_every: float = PUSHES_EVERY
    asks: bool = False
    lasts: float = math.inf
    outcome: Outcome = field(default_factory=Outcome)
    answers: AnswerTime = field(default_factory=AnswerTime)
    rhythm: Rhythm = field(default_factory=Rhythm)
    dies_at: float = math.inf
    now: float = 0.0  # when the silence began
    push_at: float = 0.0

    def run(self, until: float) -> Outcome:
        self._await_push(0.0)
        self._connect()
        while self.now < until:
            self._silence()
        return self.outcome

    def _silence(self) -> None:
        """One, until a push or a heartbeat ends it, or finds the connection forgotten."""
        due = self.now + self.strategy.interval(self.now)
        early = self.now + self.rhythm.patience(self.now, alternatives=False) if self.asks else math.inf
        beat_at = min(due, early)
        forgotten_at = min(self.now + self.nat.draw(self.now, self.chance), self.dies_at)
        if self.push_at < min(beat_at, forgotten_at):
            self._push()
        else:
            self.rhythm.asked()
            self._beat(beat_at, alive=beat_at < forgotten_at, early=early < due)

    def _push(self) -> None:
        silence, took = self.push_at - self.now, self._one_way()
        self._count_push(took)
        self.now = max(self.now, self.push_at) + took
        self.strategy.survived(silence, self.now)
        self.rhythm.spoke(self.now)
        self._await_push(self.push_at)

    def _connect(self, *, died: bool = False) -> None:
        self.rhythm.connected(self.now, died=died)
        if self.lasts < math.inf:
            self.dies_at = self.now + self.chance.expovariate(1 / self.lasts)

    def _beat(self, at: float, *, alive: bool, early: bool) -> None:
        self._count(heartbeats=1, at=at)
        silence, took = at - self.now, self._one_way() + self._one_way()
        limit = self.answers.limit(PATIENCE)
        if alive and took < limit:
            self.now = at + took
            self.answers.sample(took)
            self.strategy.survived(silence, self.now)
            return
        self.now = (
            at + limit + self.chance.random() + self._reconnect()
        )  # the backoff's first second, with full jitter
        self._count(reconnects=1, at=at)
        if at >= max(LEARNING, self.dies_at):
            self.outcome.dead.append(self.now - self.dies_at)
        self.strategy.died(silence, self.now, early=early)
        self._connect(died=True)
        while (
            self.push_at < self.now
        ):  # what came in the meantime; what the server sends at once is not lost again
            self._count_push(self.now - self.push_at)
            self.rhythm.spoke(self.now)
            self._await_push(self.push_at)

    def _reconnect(self) -> float:
        return sum(self._one_way() for _ in range(5))  # SYN, SYN ACK, CONNECT, CONNACK, the pushes

    def _one_way(self) -> float:
        took, again = ROUND_TRIP / 2, 2 * ROUND_TRIP
        while self.chance.random() < self.loss:
            took += again
            again *= 2
        return took

    def _await_push(self, after: float) -> None:
        self.push_at = after + self.chance.expovariate(1 / self.pushes_every)

    def _count_push(self, seconds: float) -> None:
        if self.push_at >= LEARNING:
            self.outcome.take_push(seconds)

    def _count(self, *, at: float, heartbeats: int = 0, reconnects: int = 0) -> None:
        if at >= LEARNING:
            self.outcome.heartbeats += heartbeats
            self.outcome.reconnects += reconnects


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    loss: float
    ours: Outcome
    mars: Outcome
    oracle: Outcome

    def share(self, outcome: Outcome) -> float:
        """Of the oracle's radio time."""
        return outcome.radio / max(self.oracle.radio, 1)


NATS: Final[dict[str, Nat]] = {
    **{
        f"{seconds} s": Nat(((0, seconds),))
        for seconds in (45, 60, 90, 120, 180, 300, 420, 600, 900, 1200, 1800)
    },
    "300 s, up to a fifth shorter": Nat(((0, 300),), spread=0.2),
    "60 s, after a day 300 s": Nat(((0, 60), (DAY, 300))),
    "300 s, after a day 60 s": Nat(((0, 300), (DAY, 60))),
    "another each day": Nat(((0, 600), (DAY, 120), (2 * DAY, 1800), (3 * DAY, 300), (4 * DAY, 45))),
}
LOSSES: Final = (0.0, 0.05, 0.2)


def compare(
    name: str, nat: Nat, loss: float, *, seed: int, seconds: float, pushes_every: float = PUSHES_EVERY
) -> Row:
    def live(strategy: Strategy, *, asks: bool = False) -> Outcome:
        chance = random.Random(f"{seed} {name} {loss}")
        return Life(nat, strategy, loss, chance, pushes_every, asks).run(seconds)

    return Row(name, loss, live(Heartbeat(), asks=True), live(Mars()), live(Oracle(nat)))


def rows(seed: int, days: float) -> Iterator[Row]:
    for name, nat in NATS.items():
        for loss in LOSSES:
            yield compare(name, nat, loss, seed=seed, seconds=days * DAY)


def table(found: Iterator[Row]) -> str:
    lines = [
        "| NAT forgets after | loss | in 10 s: ours | mars | oracle | radio of the oracle's: ours | mars "
        "| reconnects: ours | mars | slowest push: ours | mars |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        in_time = " | ".join(f"{100 * o.in_time:.2f} %" for o in (row.ours, row.mars, row.oracle))
        radio = " | ".join(f"{row.share(o):.2f}" for o in (row.ours, row.mars))
        reconnects = " | ".join(f"{o.reconnects}" for o in (row.ours, row.mars))
        slowest = " | ".join(f"{o.slowest:.0f} s" for o in (row.ours, row.mars))
        lines.append(f"| {row.name} | {row.loss:.0%} | {in_time} | {radio} | {reconnects} | {slowest} |")
    return "\n".join(lines)


# Connections that die


LASTS: Final = 4 * 3600.0  # seconds, on average
LIVES: Final = 4  # times as many days: deaths are rare
PATH: Final = Nat(((0, 600),))  # it forgets, too
PUSHES: Final = (5.0, 15.0, 60.0, 300.0)  # seconds between two, on average
INTRODUCTION: Final = (
    f"Connections that die without a word after {LASTS / 3600:g} h on average, behind a NAT that forgets after "
    f"{PATH.shortest(0):g} s, at 1 % loss; with and without the question that is asked early:"
)


def deaths(pushes_every: float, *, asks: bool, lasts: float = LASTS, seed: int, seconds: float) -> Outcome:
    chance = random.Random(f"{seed} deaths {pushes_every}")
    return Life(PATH, Heartbeat(), 0.01, chance, pushes_every, asks, lasts).run(seconds)


def table_of_deaths(seed: int, days: float) -> str:
    seconds = LIVES * days * DAY
    lines = [
        "| a push each | dead for, median | without | 9 of 10 | without | heartbeats /h | without |",
        "|---|---|---|---|---|---|---|",
    ]
    for pushes_every in PUSHES:
        both = [deaths(pushes_every, asks=asks, seed=seed, seconds=seconds) for asks in (True, False)]
        dead = " | ".join(f"{one.dead_for(share):.0f} s" for share in (0.5, 0.9) for one in both)
        heartbeats = " | ".join(f"{one.heartbeats / (seconds - LEARNING) * 3600:.1f}" for one in both)
        lines.append(f"| {pushes_every:g} s | {dead} | {heartbeats} |")
    return "\n".join(lines)


def write(block: str, path: Path) -> None:
    """Between BEGIN and END."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{block}\n{END}{after}")


@click.command()
@click.option("--seed", default=SEED, show_default=True)
@click.option("--days", default=5.0, show_default=True, help="Simulated days for each row.")
@click.option("--write", "path", type=click.Path(exists=True, path_type=Path), help="docs/numbers.md")
def main(seed: int, days: float, path: Path | None) -> None:
    """Ours, mars' and an oracle's heartbeats behind simulated NATs."""
    show: Callable[[str], None] = click.echo
    block = f"{table(rows(seed, days))}\n\n{INTRODUCTION}\n\n{table_of_deaths(seed, days)}"
    show(block)
    if path is not None:
        write(f"`python -m loadtest.heartbeats --seed {seed} --days {days:g}`:\n\n{block}", path)


if __name__ == "__main__":
    main()
