"""Which process is started, told to leave and killed when: the supervisor without processes."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.crew import (
    FIRST_PAUSE,
    HOPELESS,
    LASTING,
    LONGEST_PAUSE,
    NAME_REST,
    START_LIMIT,
    Action,
    Adopted,
    Announce,
    Crew,
    Kill,
    Leave,
    Life,
    Note,
    Start,
    State,
)

LEAVE_LIMIT = 10.0


class Stage:
    """A crew, its clock, and what it wanted since it was last asked."""

    def __init__(self, workers: int = 2) -> None:
        self.crew = Crew(workers, LEAVE_LIMIT)
        self.now = 1000.0
        self.did: list[Action] = []
        self.announced = 0

    def do(self, actions: list[Action]) -> list[Action]:
        self.did += actions
        self.announced += sum(isinstance(action, Announce) for action in actions)
        return actions

    def begin(self) -> None:
        self.do(self.crew.begin(self.now))

    def ready(self, life: Life) -> list[Action]:
        return self.do(self.crew.ready(life, self.now))

    def end(self, life: Life, reason: str = "killed by SIGKILL") -> list[Action]:
        return self.do(self.crew.ended(life, reason, self.now))

    def wait(self, seconds: float) -> list[Action]:
        self.now += seconds
        return self.do(self.crew.tick(self.now))

    def workers(self) -> list[Life]:
        return [place.life for place in self.crew.workers if place.life is not None]

    def front(self) -> Life:
        assert self.crew.front.life is not None
        return self.crew.front.life


def _started(actions: list[Action]) -> list[Life]:
    return [action.life for action in actions if isinstance(action, Start)]


def _left(actions: list[Action]) -> list[Life]:
    return [action.life for action in actions if isinstance(action, Leave)]


def _notes(actions: list[Action]) -> list[str]:
    return [action.event for action in actions if isinstance(action, Note)]


def _running(workers: int = 2) -> Stage:
    stage = Stage(workers)
    stage.begin()
    stage.ready(stage.front())
    for life in stage.workers():
        stage.ready(life)
    stage.did.clear()
    return stage


# Start


def test_the_front_comes_first_and_then_all_workers_together() -> None:
    stage = Stage(3)
    stage.begin()
    [front] = _started(stage.did)
    assert front.place is stage.crew.front
    started = _started(stage.ready(front))
    assert [life.number for life in started] == [1, 2, 3]


def test_it_is_announced_once_when_all_are_ready() -> None:
    stage = Stage(2)
    stage.begin()
    stage.ready(stage.front())
    first, second = stage.workers()
    assert stage.ready(first) == []
    assert stage.ready(second) == [Announce()]
    stage.end(first)
    stage.wait(FIRST_PAUSE)
    stage.ready(stage.workers()[0])
    assert stage.announced == 1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_fails_while_the_crew_starts_ends_it_with_the_reason(place: int) -> None:
    stage = Stage(2)
    stage.begin()
    if place:
        stage.ready(stage.front())
    life = stage.crew.places[place].life
    assert life is not None
    life.error = "Redis: cannot be reached"
    stage.end(life, "exit status 1")
    assert (stage.crew.stopping, stage.crew.hopeless) == (True, "Redis: cannot be reached")
    for life in list(stage.crew.lives()):
        stage.end(life, "exit status 0")
    for life in list(stage.crew.lives()):
        stage.end(life, "exit status 0")
    assert stage.crew.done


def test_what_does_not_get_ready_in_time_is_killed() -> None:
    stage = _running()
    stage.end(stage.workers()[0])
    stage.wait(FIRST_PAUSE)
    slow = stage.workers()[0]
    assert stage.crew.next_at() == stage.now + START_LIMIT
    assert Kill(slow) in stage.wait(START_LIMIT)


# Deaths


def test_a_worker_that_died_is_followed_by_one_of_another_name() -> None:
    stage = _running()
    died = stage.workers()[0]
    assert _notes(stage.end(died)) == ["worker ended"]
    assert stage.crew.next_at() == stage.now + FIRST_PAUSE
    [follower] = _started(stage.wait(FIRST_PAUSE))
    assert (follower.place, follower.number) == (died.place, 3)  # Redis still knows the dead one's name
    assert stage.crew.restarts == 1


def test_a_name_is_free_again_once_the_lease_of_the_dead_has_run_out() -> None:
    stage = _running()
    stage.end(stage.workers()[0])
    stage.wait(FIRST_PAUSE)
    stage.ready(stage.workers()[0])
    stage.wait(NAME_REST)
    stage.end(stage.workers()[1])
    [follower] = _started(stage.wait(FIRST_PAUSE))
    assert follower.number == 1


def test_the_pause_doubles_and_begins_anew_after_a_life_that_lasted() -> None:
    stage = _running()
    pauses = []
    for _ in range(12):
        stage.end(stage.crew.workers[0].life or stage.front())
        due = stage.crew.next_at()
        assert due is not None
        pauses.append(due - stage.now)
        stage.wait(pauses[-1])
    assert pauses[:4] == pytest.approx([FIRST_PAUSE * 2**n for n in range(4)])
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE)
    life = stage.crew.workers[0].life
    assert life is not None
    stage.ready(life)
    stage.wait(LASTING)
    stage.end(life)
    assert stage.crew.next_at() == pytest.approx(stage.now + FIRST_PAUSE)


def test_while_one_worker_lives_the_others_are_tried_for_ever() -> None:
    stage = _running()
    for _ in range(5 * HOPELESS):
        life = stage.crew.workers[0].life
        assert life is not None
        stage.end(life)
        stage.wait(LONGEST_PAUSE)
    assert not stage.crew.stopping


def test_when_none_lives_and_none_can_be_started_it_gives_up() -> None:
    stage = _running()
    for _ in range(HOPELESS):
        assert not stage.crew.stopping
        for place in stage.crew.workers:
            assert place.life is not None
            place.life.error = "the certificate cannot be read"
            stage.end(place.life)
        stage.wait(LONGEST_PAUSE)
    assert "the certificate cannot be read" in stage.crew.hopeless
    [front] = _left(stage.did)
    stage.end(front, "exit status 0")
    assert stage.crew.done


def test_a_front_that_died_is_followed_and_stops_no_worker() -> None:
    stage = _running()
    workers = stage.workers()
    stage.end(stage.front())
    [front] = _started(stage.wait(FIRST_PAUSE))
    assert front.place is stage.crew.front
    assert stage.ready(front) == []
    assert stage.workers() == workers


# Replacement


def _replacing(stage: Stage) -> list[Life]:
    """What is started for the first worker, the front being replaced."""
    old = stage.front()
    [front] = _started(stage.do(stage.crew.replace(stage.now)))
    assert front.place is stage.crew.front
    assert _left(stage.ready(front)) == [old]
    return _started(stage.end(old, "exit status 0"))


def test_the_front_is_replaced_first_and_answers_all_the_time() -> None:
    stage = _running()
    old = stage.front()
    [new] = _started(stage.do(stage.crew.replace(stage.now)))
    assert stage.front() is old
    stage.ready(new)
    assert stage.front() is new
    [first] = _started(stage.end(old, "exit status 0"))
    assert first.place is stage.crew.workers[0]


def test_a_stop_while_the_front_is_replaced_ends_both() -> None:
    stage = _running()
    workers, old = stage.workers(), stage.front()
    [new] = _started(stage.do(stage.crew.replace(stage.now)))
    assert set(_left(stage.do(stage.crew.stop(stage.now)))) == {new, *workers}
    for worker in workers:
        stage.end(worker, "exit status 0")
    stage.end(new, "exit status 0")
    stage.end(old, "exit status 0")
    assert stage.crew.done


def test_each_worker_is_replaced_in_turn_and_the_new_one_is_ready_first() -> None:
    stage = _running()
    before = stage.workers()
    [first] = _replacing(stage)
    assert before[0].state is State.READY
    assert _left(stage.ready(first)) == [before[0]]
    [second] = _started(stage.end(before[0], "exit status 0"))
    assert second.place is before[1].place
    assert _left(stage.ready(second)) == [before[1]]
    assert _notes(stage.end(before[1], "exit status 0")) == ["the workers are replaced"]
    assert stage.workers() == [first, second]
    assert (stage.crew.restarts, stage.crew.replacing) == (0, False)


def test_if_the_new_worker_fails_the_old_one_stays_and_the_replacement_ends() -> None:
    stage = _running()
    before = stage.workers()
    [first] = _replacing(stage)
    assert _notes(stage.end(first, "exit status 1")) == ["replacement failed, the old worker stays"]
    assert (stage.workers(), stage.crew.replacing, stage.crew.next_at()) == (before, False, None)


def test_an_old_worker_that_dies_before_its_successor_is_ready_is_succeeded_at_once() -> None:
    stage = _running()
    before = stage.workers()
    [first] = _replacing(stage)
    assert _started(stage.end(before[0])) == []
    assert stage.crew.workers[0].life is first
    [second] = _started(stage.ready(first))
    assert second.place is before[1].place


def test_a_second_replacement_waits_for_the_first_to_end() -> None:
    stage = _running()
    stage.do(stage.crew.replace(stage.now))
    assert _started(stage.do(stage.crew.replace(stage.now))) == []
    starting = Stage()
    starting.begin()
    assert _started(starting.do(starting.crew.replace(0))) == []


def test_a_place_that_waits_for_its_restart_needs_no_replacement() -> None:
    stage = _running()
    second = stage.workers()[1]
    stage.end(stage.workers()[0])
    [life] = _replacing(stage)
    assert life.place is second.place


# Another program


def _adopted(stage: Stage) -> list[Adopted]:
    places = stage.crew.places
    return [
        Adopted(life.serial, places.index(life.place), life.number, life.state, life.since, life.pid)
        for life in stage.crew.lives()
    ]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_another_crew_goes_on_with_the_processes_of_one(workers: int) -> None:
    stage = _running(2)
    stage.end(stage.workers()[0])
    stage.wait(FIRST_PAUSE)
    stage.ready(stage.workers()[0])
    heir = Stage(workers)
    did = heir.do(heir.crew.adopt(_adopted(stage), stage.crew.restarts, stage.now))
    assert heir.crew.restarts == 1
    assert heir.front().serial == stage.front().serial
    kept = min(workers, 2)
    assert [life.serial for life in heir.workers()[:kept]] == [life.serial for life in stage.workers()[:kept]]
    assert [life.place.number for life in _started(did)] == list(range(3, workers + 1))
    assert len(_left(did)) == 2 - kept
    numbers = [life.number for life in heir.crew.lives()]
    assert len(numbers) == len(set(numbers))
    assert len({life.serial for life in heir.crew.lives()}) == len(numbers)
    assert heir.crew.may_replace
    assert heir.announced == 0  # it was


def test_another_crew_waits_for_those_that_are_leaving() -> None:
    stage = _running(2)
    [first] = _replacing(stage)
    old = stage.workers()[0]
    stage.ready(first)
    heir = Stage(2)
    heir.do(heir.crew.adopt(_adopted(stage), 0, stage.now))
    assert [life.serial for life in heir.crew.workers[0].leaving] == [old.serial]
    heir.now = stage.now
    assert Kill in {type(action) for action in heir.wait(LEAVE_LIMIT)}


# Stop


def test_a_stop_drains_all_workers_together_and_the_front_last() -> None:
    stage = _running(3)
    workers, front = stage.workers(), stage.front()
    assert _left(stage.do(stage.crew.stop(stage.now))) == workers
    for worker in workers[:-1]:
        assert stage.end(worker, "exit status 0") == []
    assert _left(stage.end(workers[-1], "exit status 0")) == [front]
    assert not stage.crew.done
    stage.end(front, "exit status 0")
    assert stage.crew.done
    assert stage.crew.hopeless == ""


def test_who_does_not_leave_in_time_is_killed() -> None:
    stage = _running()
    workers = stage.workers()
    stage.do(stage.crew.stop(stage.now))
    assert stage.wait(LEAVE_LIMIT - 0.1) == []
    assert [action.life for action in stage.wait(0.1) if isinstance(action, Kill)] == workers


def test_a_stop_in_a_replacement_ends_old_and_new() -> None:
    stage = _running()
    before = stage.workers()
    [first] = _replacing(stage)
    assert set(_left(stage.do(stage.crew.stop(stage.now)))) == {first, *before}


def test_nothing_starts_in_a_stop() -> None:
    stage = _running()
    stage.end(stage.workers()[0])
    stage.do(stage.crew.stop(stage.now))
    assert _started(stage.wait(LONGEST_PAUSE)) == []


# Whatever happens


class AnyCourse(RuleBasedStateMachine):
    """Processes start, die, hang and obey in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage(3)
        self.told: set[Life] = set()

    @initialize()
    def begin(self) -> None:
        self.stage.begin()

    def lives(self) -> list[Life]:
        return list(self.stage.crew.lives())

    @precondition(lambda self: self.lives())
    @rule(data=st.data())
    def becomes_ready(self, data: st.DataObject) -> None:
        self.stage.ready(data.draw(st.sampled_from(self.lives())))

    @precondition(lambda self: self.lives())
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        self.stage.end(data.draw(st.sampled_from(self.lives())))

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds: float) -> None:
        self.stage.wait(seconds)

    @rule()
    def is_replaced(self) -> None:
        self.stage.do(self.stage.crew.replace(self.stage.now))

    @invariant()
    def no_two_processes_have_a_name(self) -> None:
        numbers = [life.number for life in self.lives() if life.place is not self.stage.crew.front]
        assert len(numbers) == len(set(numbers))
        assert 0 not in numbers

    @invariant()
    def each_place_has_a_life_or_will_have_one(self) -> None:
        crew = self.stage.crew
        if crew.stopping or not self.stage.announced:
            return
        for place in crew.places:
            assert place.life is not None or place.due is not None

    @invariant()
    def a_replacement_goes_on_or_is_over(self) -> None:
        """Something that will happen by itself moves it: a start, a readiness, an end."""
        crew = self.stage.crew
        if crew.replacing:
            assert any(life.state is not State.READY for life in crew.lives()) or any(
                p.due for p in crew.places
            )

    def teardown(self) -> None:
        """A stop always comes to its end."""
        crew = self.stage.crew
        self.stage.do(crew.stop(self.stage.now))
        for _ in range(3):
            for life in self.lives():
                if life.state is State.LEAVING:
                    self.stage.end(life)
        assert crew.done


TestAnyCourse = AnyCourse.TestCase
TestAnyCourse.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
