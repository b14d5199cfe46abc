"""What a device learns of its NAT. The clock is a number."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.heartbeat import (
    ANSWER_LEAST,
    EARLY_LEAST,
    FIRST_GAP,
    FIRST_REST,
    LONGEST_REST,
    MARGIN,
    NARROW,
    STEP,
    WARY_FOR,
    AnswerTime,
    Bounds,
    Heartbeat,
    Rhythm,
)

BOUNDS = Bounds(240, 30, 1200)
LATE_TIMER = 0.2  # seconds


class Nat:
    """Forgets after a silence. The device sends nothing but heartbeats."""

    def __init__(self, timeout: float, heartbeat: Heartbeat | None = None, now: float = 0.0) -> None:
        self.timeout = timeout
        self.heartbeat = heartbeat or Heartbeat(BOUNDS)
        self.now = now
        self.silences: list[float] = []
        self.deaths = 0

    def beat(self, *, unlucky: bool = False) -> bool:
        """One heartbeat. Whether it was answered."""
        silence = self.heartbeat.interval(self.now) + LATE_TIMER
        self.silences.append(silence)
        self.now += silence
        answered = silence < self.timeout and not unlucky
        (self.heartbeat.survived if answered else self.heartbeat.died)(silence, self.now)
        self.deaths += not answered
        return answered

    def live(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.beat()

    def settled(self) -> Nat:
        """After the search, before the next probe."""
        self.live(2 * 3600)
        while self.silences[-1] != self.heartbeat.good * MARGIN + LATE_TIMER:
            self.beat()
        assert self.heartbeat.good
        self.silences.clear()
        return self


# The search


@pytest.mark.parametrize(
    ("timeout", "learning"), [(45, 1800), (60, 1800), (120, 1800), (300, 1800), (600, 7200)]
)
def test_a_timeout_is_found_in_time(timeout: float, learning: float) -> None:
    nat = Nat(timeout)
    nat.live(learning)
    interval = nat.heartbeat.interval(nat.now, probe=False)
    assert timeout / 1.25 < interval < timeout


@settings(deadline=None)  # a busy machine
@given(timeout=st.floats(33, 1150), start=st.floats(30, 1200))
def test_any_timeout_is_found_from_any_start(timeout: float, start: float) -> None:
    nat = Nat(timeout, Heartbeat(Bounds(start, 30, 1200)))
    for _ in range(40):
        nat.beat()
    interval = nat.heartbeat.interval(nat.now, probe=False)
    assert interval < timeout
    assert interval >= max(30, MARGIN * timeout / STEP - 1)
    for _ in range(8):
        nat.now += LONGEST_REST
        nat.beat()
        nat.beat()
    assert nat.heartbeat.bad / nat.heartbeat.good < NARROW + 0.03


def test_the_first_heartbeat_is_at_the_start() -> None:
    assert Heartbeat(BOUNDS).interval(0.0) == 240


def test_a_probe_goes_up_by_a_fifth_and_down_to_the_middle() -> None:
    nat = Nat(330)
    for _ in range(5):
        nat.beat()
    steps = [round(after / before, 2) for before, after in pairwise(nat.silences)]
    assert steps[:2] == [1.2, 1.2]  # 240, 288, 346, which dies
    assert nat.silences[3] == pytest.approx(288 * MARGIN, rel=0.01)
    assert nat.deaths == 1


def test_a_later_probe_is_in_the_middle_of_the_bracket() -> None:
    nat = Nat(330).settled()
    good, bad = nat.heartbeat.good, nat.heartbeat.bad
    later = nat.heartbeat.interval(nat.now + LONGEST_REST)
    assert later == pytest.approx(math.sqrt(good * bad)) or bad <= NARROW * good


def test_a_longer_timeout_than_the_server_allows_means_its_most() -> None:
    nat = Nat(7200)
    nat.live(3 * 3600)
    assert nat.heartbeat.interval(nat.now) == 1200
    assert nat.deaths == 0


def test_a_shorter_timeout_than_the_server_allows_means_its_least() -> None:
    nat = Nat(20)
    nat.live(3600)
    assert nat.heartbeat.interval(nat.now) == 30


def test_a_push_after_a_silence_is_proof_as_well() -> None:
    heartbeat = Heartbeat(BOUNDS)
    heartbeat.survived(300, 1000)
    assert heartbeat.interval(1000, probe=False) == 300 * MARGIN
    assert heartbeat.interval(1000) == 360


def test_an_early_push_does_not_shorten_the_start() -> None:
    heartbeat = Heartbeat(BOUNDS)
    heartbeat.survived(50, 1000)
    assert heartbeat.interval(1000) == heartbeat.interval(1000, probe=False) == 240


def test_the_start_is_not_gone_back_to_once_something_died() -> None:
    nat = Nat(60).settled()
    nat.heartbeat.survived(nat.heartbeat.bad, nat.now)
    assert nat.heartbeat.interval(nat.now) < 100
    assert nat.heartbeat.interval(nat.now, probe=False) < 70


def test_a_death_out_of_turn_is_not_held_against_longer_silences() -> None:
    """The app was opened, and the network was gone for a moment."""
    nat = Nat(300).settled()
    proven = nat.heartbeat.interval(nat.now, probe=False)
    nat.heartbeat.died(40, nat.now)
    nat.beat()
    nat.beat()
    assert nat.heartbeat.interval(nat.now, probe=False) == pytest.approx(proven * MARGIN, rel=0.01)


def test_what_comes_right_after_a_reconnect_is_no_proof() -> None:
    nat = Nat(60)
    nat.beat()
    before = nat.heartbeat.interval(nat.now)
    nat.heartbeat.survived(0.1, nat.now)
    assert nat.heartbeat.interval(nat.now) == before


def test_no_probe_while_somebody_looks() -> None:
    nat = Nat(1000)
    for _ in range(20):
        silence = nat.heartbeat.interval(nat.now, probe=False)
        assert silence <= 240
        nat.now += silence
        nat.heartbeat.survived(silence, nat.now)


# Rest, and later probes


def test_after_the_search_it_rests() -> None:
    nat = Nat(300)
    nat.live(1800)
    deaths = nat.deaths
    nat.live(2000)
    assert nat.deaths == deaths


def test_probes_become_rare() -> None:
    nat = Nat(300)
    nat.live(86_400)
    deaths = nat.deaths
    nat.live(10 * 86_400)
    assert 9 <= nat.deaths - deaths <= 11


def test_a_nat_that_became_patient_is_noticed_by_a_later_probe() -> None:
    nat = Nat(60).settled()
    nat.timeout = 600
    nat.live(2 * FIRST_REST + 4 * 3600)
    assert 480 < nat.heartbeat.interval(nat.now, probe=False) < 600


# A death at a proven silence


def test_bad_luck_costs_one_short_silence_and_a_margin() -> None:
    nat = Nat(300).settled()
    nat.beat(unlucky=True)
    for _ in range(4):
        nat.beat()
    proven, short, *after = nat.silences
    assert short == pytest.approx(proven / 2, rel=0.05)
    assert after == pytest.approx([proven * MARGIN] * 3, rel=0.01)
    assert nat.deaths >= 1


def test_another_nat_is_searched_anew_from_the_second_death_on() -> None:
    nat = Nat(300).settled()
    deaths, began = nat.deaths, nat.now
    nat.timeout = 60
    nat.live(1200)
    assert nat.heartbeat.interval(nat.now, probe=False) < 60
    assert nat.deaths - deaths <= 6
    nat.live(began + 2400 - nat.now)
    assert 45 < nat.heartbeat.interval(nat.now, probe=False) < 60


def test_a_nat_a_little_shorter_is_met_without_a_new_search() -> None:
    nat = Nat(300).settled()
    proven = nat.heartbeat.interval(nat.now, probe=False)
    nat.timeout = proven * 0.97
    nat.live(3600)
    assert proven * 0.85 < nat.heartbeat.interval(nat.now, probe=False) < nat.timeout


def test_a_probe_that_dies_and_then_a_proven_silence_too_is_another_nat() -> None:
    nat = Nat(10_000)
    nat.beat()
    nat.timeout = 50
    nat.live(2400)
    assert 30 <= nat.heartbeat.interval(nat.now, probe=False) < 50


def test_one_false_death_of_the_first_probe_is_made_good_within_hours() -> None:
    nat = Nat(1000)
    nat.beat(unlucky=True)
    nat.live(2 * FIRST_REST + 3 * 3600)
    assert nat.heartbeat.interval(nat.now, probe=False) > 700


# Whatever happens

happenings = st.lists(
    st.tuples(st.sampled_from(["survived", "died", "bounds", "wait"]), st.floats(0, 5000)), max_size=80
)


@settings(deadline=None)  # a busy machine
@given(happenings)
def test_the_servers_bounds_are_kept_and_the_bracket_stays_one(events: list[tuple[str, float]]) -> None:
    heartbeat, now = Heartbeat(BOUNDS), 0.0
    for what, seconds in events:
        now += seconds
        match what:
            case "survived":
                heartbeat.survived(heartbeat.interval(now), now)
            case "died":
                heartbeat.died(heartbeat.interval(now), now)
            case "bounds":
                least = max(1.0, seconds / 10)
                heartbeat.bounds = Bounds(least * 2, least, least * 5)
            case "wait":
                heartbeat.survived(seconds, now)
        for probe in (True, False):
            assert heartbeat.bounds.least <= heartbeat.interval(now, probe=probe) <= heartbeat.bounds.most
        assert heartbeat.good < heartbeat.bad


@settings(deadline=None)  # a busy machine
@given(happenings, st.floats(0, 1e9))
def test_what_was_saved_goes_on_where_it_was(events: list[tuple[str, float]], later: float) -> None:
    heartbeat, now = Heartbeat(BOUNDS), 0.0
    for what, seconds in events:
        now += seconds
        (heartbeat.died if what == "died" else heartbeat.survived)(heartbeat.interval(now), now)
    for _ in range(2):  # a doubt is not kept
        heartbeat.survived(heartbeat.interval(now, probe=False), now)
    kept = json.loads(json.dumps(heartbeat.saved(now)))
    again = Heartbeat.restored(kept, BOUNDS, later)
    for wait in (0.0, FIRST_REST + 60, 3 * LONGEST_REST):
        assert again.interval(later + wait) == pytest.approx(heartbeat.interval(now + wait))
    assert (again.good, again.bad) == (heartbeat.good, heartbeat.bad)


@pytest.mark.parametrize(
    "saved",
    [
        None,
        7,
        "x",
        [],
        {"good": "long"},
        {"good": -1},
        {"good": math.nan},
        {"good": 1e9},
        {"met": 1},
        {"bad": 0},
        {"rest": 1},
        {"probe_in": -5},
        {"probe_in": 1e12},
    ],
)
def test_what_cannot_be_read_was_not_learned(saved: object) -> None:
    assert Heartbeat.restored(saved, BOUNDS, 5.0).interval(5.0) == 240


def test_a_phone_that_slept_for_a_day_has_learned_something_that_can_be_kept() -> None:
    heartbeat = Heartbeat(BOUNDS)
    heartbeat.survived(90_000, 90_000)
    assert Heartbeat.restored(heartbeat.saved(0), BOUNDS, 0).interval(0) == 1200


# Bounds


def test_bounds_are_read_as_the_server_says_them() -> None:
    assert Bounds.read("240 30 1200") == BOUNDS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "240",
        "240 30",
        "240 30 1200 1",
        "a b c",
        "nan nan nan",
        "10 30 1200",
        "2000 30 1200",
        "5 0 9",
        "1 1 65536",
    ],
)
def test_other_bounds_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Bounds.read(text)


# Asked early


def test_one_death_when_asked_early_may_be_the_paths() -> None:
    heartbeat = Heartbeat(BOUNDS)
    heartbeat.died(60, 1000, early=True)
    assert heartbeat.interval(1000) == 240


def test_a_second_one_without_proof_in_between_is_the_nats() -> None:
    heartbeat = Heartbeat(BOUNDS)
    heartbeat.died(60, 1000, early=True)
    heartbeat.died(61, 2000, early=True)
    assert heartbeat.interval(2000) < 60


@pytest.mark.parametrize(("survived", "held"), [(61, False), (45, True)])
def test_proof_of_as_long_a_silence_takes_the_first_one_back(survived: float, held: bool) -> None:
    heartbeat = Heartbeat(BOUNDS)
    heartbeat.died(60, 1000, early=True)
    heartbeat.survived(survived, 1500)
    heartbeat.died(61, 2000, early=True)
    assert (heartbeat.bad < math.inf) is held


def test_a_death_at_a_shorter_silence_asks_for_shorter_proof() -> None:
    heartbeat = Heartbeat(BOUNDS)
    heartbeat.died(60, 1000, early=True)
    heartbeat.died(40, 2000, early=True)
    assert heartbeat.interval(2000) == 240
    heartbeat.survived(41, 2500)
    heartbeat.died(60, 3000, early=True)
    assert heartbeat.interval(3000) == 240


def test_a_nat_is_found_where_pushes_come_often_too() -> None:
    """Its silences are all asked early."""
    heartbeat, rhythm = Heartbeat(BOUNDS), Rhythm()
    heard(rhythm, 15, 10)
    now = 1000.0
    for _ in range(4):
        silence = min(rhythm.patience(now, alternatives=False), heartbeat.interval(now))
        heartbeat.died(silence, now, early=silence < heartbeat.interval(now))
    assert heartbeat.interval(now) < 50


# How often pushes come


def heard(rhythm: Rhythm, gap: float, times: int, now: float = 0.0) -> float:
    for _ in range(times):
        now += gap
        rhythm.spoke(now)
    return now


def test_silence_says_something_after_the_first_push() -> None:
    rhythm = Rhythm()
    assert rhythm.patience(0.0, alternatives=True) == math.inf
    now = heard(rhythm, 20, 1)
    assert rhythm.patience(now, alternatives=True) == 2 * FIRST_GAP
    heard(rhythm, 600, 1, now)
    assert rhythm.patience(now, alternatives=True) > 600


@pytest.mark.parametrize(("alternatives", "times"), [(False, 1), (True, 2)])
def test_enough_is_asked_until_the_next_push(alternatives: bool, times: int) -> None:
    rhythm = Rhythm()
    now = heard(rhythm, 20, 60)
    for _ in range(times):
        assert rhythm.patience(now, alternatives=alternatives) < 100
        rhythm.asked()
    assert rhythm.patience(now, alternatives=alternatives) == math.inf
    heard(rhythm, 20, 1, now)
    assert rhythm.patience(now, alternatives=alternatives) < 100


def test_where_there_is_another_way_less_silence_is_enough() -> None:
    rhythm = Rhythm()
    now = heard(rhythm, 20, 60)
    assert rhythm.patience(now, alternatives=True) == pytest.approx(40, rel=0.05)


def test_where_a_connection_died_less_silence_is_enough_for_an_hour() -> None:
    rhythm = Rhythm()
    now = heard(rhythm, 20, 60)
    for died, patience in ((False, 60), (True, 40)):
        rhythm.connected(now, died=died)
        assert rhythm.patience(now, alternatives=False) == math.inf, "nothing is missing yet"
        rhythm.spoke(now)
        assert rhythm.patience(now, alternatives=False) == pytest.approx(patience, rel=0.05)
    assert rhythm.patience(now + WARY_FOR, alternatives=False) == pytest.approx(60, rel=0.05)
    rhythm.moved()
    assert rhythm.patience(now, alternatives=False) == pytest.approx(60, rel=0.05)


def test_a_burst_counts_as_one_push() -> None:
    rhythm = Rhythm()
    now = 0.0
    for _ in range(60):
        now = heard(rhythm, 0.3, 5, now + 60)
    assert rhythm.patience(now, alternatives=False) == pytest.approx(180, rel=0.05)


def test_a_time_without_connection_is_no_gap() -> None:
    rhythm = Rhythm()
    now = heard(rhythm, 20, 60)
    rhythm.connected(now + 5000, died=False)
    heard(rhythm, 20, 3, now + 5000)
    assert rhythm.patience(now, alternatives=False) == pytest.approx(60, rel=0.05)


def test_however_often_pushes_come_a_moment_without_says_nothing() -> None:
    rhythm = Rhythm()
    now = heard(rhythm, 1.5, 50)
    assert rhythm.patience(now, alternatives=True) == EARLY_LEAST


def test_what_is_rarer_than_before_is_so_soon() -> None:
    rhythm = Rhythm()
    now = heard(rhythm, 10, 30)
    heard(rhythm, 3600, 1, now)
    assert rhythm.patience(now, alternatives=True) > 400


@pytest.mark.parametrize(("alternatives", "least", "most"), [(False, 0.04, 0.08), (True, 0.1, 0.2)])
def test_of_gaps_between_chance_events_few_are_so_long(alternatives: bool, least: float, most: float) -> None:
    rhythm, chance, now, asked = Rhythm(), Random(6), 0.0, 0
    for _ in range(20_000):
        gap = chance.expovariate(1 / 60)
        asked += gap > rhythm.patience(now, alternatives=alternatives)
        now += gap
        rhythm.spoke(now)
    assert least < asked / 20_000 < most


# How long to wait for an answer


def test_the_first_answer_may_take_as_long_as_any() -> None:
    assert AnswerTime().limit(10) == 10


def test_on_a_quick_network_an_answer_is_overdue_soon() -> None:
    answers = AnswerTime()
    for _ in range(5):
        answers.sample(0.05)
    assert answers.limit(10) == ANSWER_LEAST


def test_rfc_6298_by_hand() -> None:
    answers = AnswerTime()
    answers.sample(1.0)
    assert answers.limit(60) == 2 * (1.0 + 4 * 0.5)
    answers.sample(2.0)
    assert answers.limit(60) == 2 * (1.125 + 4 * (0.75 * 0.5 + 0.25 * 1.0))


def test_one_slow_answer_makes_more_room_for_a_while() -> None:
    answers = AnswerTime()
    for seconds in (0.2,) * 20 + (4.0,):
        answers.sample(seconds)
    assert answers.limit(20) > 8
    for _ in range(20):
        answers.sample(0.2)
    assert answers.limit(20) == ANSWER_LEAST


@given(st.lists(st.floats(0, 1000), min_size=1), st.floats(0.05, 60))
def test_an_answer_has_its_bounds(samples: list[float], most: float) -> None:
    answers = AnswerTime()
    for sample in samples:
        answers.sample(sample)
    assert min(ANSWER_LEAST, most) <= answers.limit(most) <= most
