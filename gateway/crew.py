"""The processes of a supervisor, as a state machine: what happened and *now* come in, actions go out. No I/O.

Theory. There are as many places as there are workers, and one for the front, which answers the operator. A place
has at most one life that is to stay, and besides it lives that were told to leave. The front comes first, because it
looks whether the store can be used at all, and goes last.

A life that ends without having been told to is followed by another, after a pause that doubles with each life that
did not last. What cannot start at all is not tried for ever: while the crew starts, the first failure ends it; later
on, it ends when no worker is left and each place has failed HOPELESS times in a row. As long as one worker has its
devices, the others are tried again.

A replacement (rolling restart) goes place by place: the new life is ready before the old one is told to leave, and
the old one has ended before the next place's turn. If the new one fails the old one stays, and the replacement ends.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from msgspec import Struct

FRONT: Final = 0  # the number of the front's place; workers have those from 1 on
FIRST_PAUSE: Final = 0.2  # seconds before a life follows one that did not last; doubled each time
LONGEST_PAUSE: Final = 30.0
LASTING: Final = 30.0  # seconds after which a life has lasted
HOPELESS: Final = 5  # failures in a row
START_LIMIT: Final = 60.0  # seconds until a life has to be ready
NAME_REST: Final = 15.0  # seconds: longer than a node's lease, which holds the name of one that was killed


class State(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    LEAVING = "draining"


@dataclass(slots=True, eq=False)
class Life:
    """One process, from its start to its end."""

    serial: int  # no other life has it
    place: Place
    number: int  # of its name: no two that live have the same
    state: State
    since: float  # it is in this state
    pid: int = 0  # set by whoever starts it
    error: str = ""  # what it said before it ended


@dataclass(slots=True, eq=False)
class Place:
    number: int
    life: Life | None = None
    leaving: set[Life] = field(default_factory=set)
    failures: int = 0  # lives in a row that did not last
    due: float | None = None  # when the next life starts
    successor: Life | None = None  # of `life`, in a replacement
    error: str = ""  # of the last failure

    def lives(self) -> Iterator[Life]:
        yield from (life for life in (self.life, self.successor) if life is not None)
        yield from self.leaving


class Adopted(Struct, frozen=True, array_like=True):
    """A life, as one supervisor leaves it to the next."""

    serial: int
    place: int
    number: int
    state: str
    since: float
    pid: int


@dataclass(frozen=True, slots=True)
class Start:
    life: Life


@dataclass(frozen=True, slots=True)
class Leave:
    """Tell it to drain and end."""

    life: Life


@dataclass(frozen=True, slots=True)
class Kill:
    life: Life


@dataclass(frozen=True, slots=True)
class Announce:
    """All are ready, for the first time."""


@dataclass(frozen=True, slots=True)
class Note:
    """For the log."""

    level: Literal["info", "warning", "error"]
    event: str
    life: Life | None = None
    reason: str = ""


Action: TypeAlias = Start | Leave | Kill | Announce | Note


class Crew:
    """`workers`: how many; `leave_limit`: seconds that a life may take to leave. Times are monotonic."""

    def __init__(self, workers: int, leave_limit: float) -> None:
        self.places = [Place(number) for number in range(workers + 1)]
        self.restarts = 0  # lives that followed one that ended without being told to
        self.stopping = False
        self.hopeless = ""  # why it ended by itself
        self._leave_limit = leave_limit
        self._announced = False
        self._serial = 0
        self._resting: dict[int, float] = {}  # numbers of names, until when
        self._turns: list[Place] = []  # places whose life is still to be replaced

    def adopt(self, lives: Iterable[Adopted], restarts: int, now: float) -> list[Action]:
        """Go on with the processes of another crew, all of which were announced. Places that it did not have get
        their lives, those that there are no more lose theirs."""
        self._announced, self.restarts = True, restarts
        actions: list[Action] = []
        for adopted in lives:
            self._serial = max(self._serial, adopted.serial)
            there = adopted.place < len(self.places)
            place = self.places[adopted.place if there else -1]
            life = Life(
                adopted.serial, place, adopted.number, State(adopted.state), adopted.since, adopted.pid
            )
            if there and place.life is None and life.state is not State.LEAVING:
                place.life = life
            elif life.state is State.LEAVING:
                place.leaving.add(life)
            else:
                actions.append(self._leave(life, now))
        return actions + [self._start(place, now) for place in self.places if place.life is None]

    @property
    def workers(self) -> list[Place]:
        return self.places[1:]

    @property
    def front(self) -> Place:
        return self.places[FRONT]

    @property
    def may_replace(self) -> bool:
        return self._announced and not self.stopping and not self._turns

    @property
    def replacing(self) -> bool:
        return bool(self._turns)

    @property
    def done(self) -> bool:
        return self.stopping and not any(True for _ in self.lives())

    def lives(self) -> Iterator[Life]:
        for place in self.places:
            yield from place.lives()

    # What happens

    def begin(self, now: float) -> list[Action]:
        return [self._start(self.front, now)]

    def ready(self, life: Life, now: float) -> list[Action]:
        if life.state is not State.STARTING:
            return []
        life.state, life.since = State.READY, now
        place = life.place
        if place is self.front and not self._announced:
            return [self._start(worker, now) for worker in self.workers if worker.life is None]
        if place.successor is life:
            return self._succeed(place, now)
        if self._announced:
            return self._go_on(now)
        self._announced = all(map(_is_ready, self.places))
        return [Announce()] if self._announced else []

    def ended(self, life: Life, reason: str, now: float) -> list[Action]:
        """`reason`: why, in words."""
        place, told = life.place, life.state is State.LEAVING
        lasted = life.state is State.READY and now - life.since >= LASTING
        if not told:
            self._resting[life.number] = now + NAME_REST
        place.leaving.discard(life)
        if told:
            return [*self._go_on(now), *self._front_leaves(now)]
        reason = life.error or reason
        if place.successor is life:
            place.successor, self._turns = None, []
            return [Note("error", "replacement failed, the old worker stays", life, reason)]
        place.life = None
        if self.stopping:
            return self._front_leaves(now)
        place.failures = 1 if lasted else place.failures + 1
        place.error = reason
        if not self._announced:
            return self._give_up(reason, now)
        if self._is_hopeless():
            return self._give_up(
                f"no worker is left, and none could be started; the last said: {reason}", now
            )
        if place.successor is not None:  # it was to follow anyway
            place.life, place.successor = place.successor, None
            return [Note("warning", "worker ended", life, reason)]
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (place.failures - 1))
        place.due = now + pause
        return [Note("warning", "worker ended", life, reason)]

    def replace(self, now: float) -> list[Action]:
        """A new life for the front and each worker, one after the other."""
        if not self.may_replace:
            return [
                Note("warning", "not replaced: the workers are starting, stopping or being replaced already")
            ]
        self._turns = list(self.places)
        return [Note("info", "replacing the workers"), *self._next_turn(now)]

    def stop(self, now: float) -> list[Action]:
        """All workers leave together, then the front."""
        if self.stopping:
            return []
        self.stopping = True
        self._turns = []
        actions: list[Action] = []
        for place in self.places:
            place.due = None
            leaving = (place.successor,) if place is self.front else (place.life, place.successor)
            actions += [self._leave(life, now) for life in leaving if life]
        return actions + self._front_leaves(now)

    def tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for place in self.places:
            if place.due is not None and place.due <= now:
                place.due = None
                self.restarts += 1
                actions.append(self._start(place, now))
        for life in self.lives():
            if (at := self._overdue(life)) is not None and at <= now:
                life.since = now  # once; and again, should it survive that
                actions += [Note("error", "worker takes too long, killed", life, life.state), Kill(life)]
        self._resting = {number: until for number, until in self._resting.items() if until > now}
        return actions

    def next_at(self) -> float | None:
        """When `tick` has something to do."""
        times = [place.due for place in self.places if place.due is not None]
        times += [at for life in self.lives() if (at := self._overdue(life)) is not None]
        return min(times, default=None)

    # How it goes on

    def _overdue(self, life: Life) -> float | None:
        match life.state:
            case State.STARTING:
                return life.since + START_LIMIT
            case State.LEAVING:
                return life.since + self._leave_limit
            case State.READY:
                return None

    def _start(self, place: Place, now: float) -> Action:
        self._serial += 1
        number = FRONT if place is self.front else self._free_number()
        life = Life(self._serial, place, number, State.STARTING, now)
        if place.life is None:
            place.life = life
        else:
            place.successor = life
        return Start(life)

    def _free_number(self) -> int:
        """The smallest that no process has or had lately."""
        taken = {life.number for life in self.lives()} | self._resting.keys()
        return next(number for number in range(1, len(taken) + 2) if number not in taken)

    def _leave(self, life: Life, now: float) -> Action:
        place = life.place
        if place.life is life:
            place.life = None
        if place.successor is life:
            place.successor = None
        place.leaving.add(life)
        life.state, life.since = State.LEAVING, now
        return Leave(life)

    def _succeed(self, place: Place, now: float) -> list[Action]:
        old, new = place.life, place.successor
        assert new is not None
        actions: list[Action] = [self._leave(old, now)] if old is not None else []
        place.life, place.successor, place.failures = new, None, 0
        return actions or self._go_on(now)

    def _go_on(self, now: float) -> list[Action]:
        """With the replacement, once in this turn's place the old life is gone and the new one ready."""
        if not self._turns or self._turns[0].leaving or not _is_ready(self._turns[0]):
            return []
        if self._turns[0].successor is not None:
            return []
        del self._turns[0]
        return self._next_turn(now)

    def _next_turn(self, now: float) -> list[Action]:
        while self._turns:
            place = self._turns[0]
            if place.life is not None:
                return [self._start(place, now)]
            del self._turns[0]  # it starts anew anyway
        return [Note("info", "the workers are replaced")]

    def _is_hopeless(self) -> bool:
        return all(
            place.failures >= HOPELESS and not (place.life and place.life.state is State.READY)
            for place in self.workers
        )

    def _give_up(self, reason: str, now: float) -> list[Action]:
        self.hopeless = reason
        return self.stop(now)

    def _front_leaves(self, now: float) -> list[Action]:
        front = self.front.life
        if not self.stopping or front is None or any(True for place in self.workers for _ in place.lives()):
            return []
        return [self._leave(front, now)]


def _is_ready(place: Place) -> bool:
    return place.life is not None and place.life.state is State.READY
