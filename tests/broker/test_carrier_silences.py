"""Which heartbeat follows from silences: the pooling against its textbook formula, the advice by rows and by NATs."""

from __future__ import annotations

import random
from itertools import pairwise
from math import isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.carriers.silences import (
    BINS,
    EDGES,
    LEAST,
    SHARE,
    Block,
    Findings,
    advise,
    bin_of,
    floor_of,
    pool,
    weigh,
)

Counts = list[float]


def counts(*given: tuple[float, float]) -> Counts:
    """(silence in seconds, how many)"""
    found = [0.0] * BINS
    for silence, count in given:
        found[bin_of(silence)] += count
    return found


def test_bins_are_few_and_a_heartbeat_of_a_round_number_begins_one() -> None:
    assert BINS == len(EDGES) + 1 < 256
    assert list(EDGES) == sorted(set(EDGES))
    for seconds in (30, 45, 60, 240, 300, 600, 900, 1200, 1800):
        assert floor_of(bin_of(seconds)) == seconds


@given(st.floats(0, 1e5))
def test_a_silence_lies_in_its_bin(silence: float) -> None:
    number = bin_of(silence)
    assert floor_of(number) <= silence
    assert number == BINS - 1 or silence < floor_of(number + 1)


BLOCKS = [
    (counts(), counts(), []),
    (counts((60, 3)), counts(), [1.0]),
    (counts((60, 3), (90, 1)), counts((90, 1)), [1.0, 0.5]),
    (counts((60, 1), (90, 2)), counts((60, 1)), [0.75]),  # the shorter cannot be the worse
    (counts((60, 2), (90, 1), (120, 0)), counts((60, 2), (90, 1), (120, 5)), [0.5, 0.0]),
    (counts((60, 0), (90, 1), (120, 2)), counts((60, 2), (90, 1)), [0.5]),
]


@pytest.mark.parametrize(("survived", "died", "shares"), BLOCKS)
def test_neighbours_that_are_out_of_order_are_pooled(
    survived: Counts, died: Counts, shares: list[float]
) -> None:
    assert [block.share for block in pool(survived, died)] == shares


trials = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12)


def _by_formula(found: list[tuple[int, int]], at: int) -> float:
    """The nearest non-increasing shape at one place: the least, over all that begin before it, of the greatest mean
    of all that end behind it (Robertson, Wright and Dykstra, 1.4)."""

    def mean(first: int, last: int) -> float:
        part = found[first : last + 1]
        return sum(alive for alive, _ in part) / sum(map(sum, part))

    return min(max(mean(a, b) for b in range(at, len(found))) for a in range(at + 1))


@given(trials)
def test_pooling_gives_the_nearest_shape_that_does_not_grow(found: list[tuple[int, int]]) -> None:
    survived, died = [0.0] * BINS, [0.0] * BINS
    for number, (alive, dead) in enumerate(found):
        survived[number], died[number] = alive, dead
    blocks = pool(survived, died)
    tried = [pair for pair in found if sum(pair)]
    at = 0
    for block in blocks:
        for number in range(block.first, block.last + 1):
            if survived[number] + died[number]:
                assert isclose(block.share, _by_formula(tried, at), abs_tol=1e-12)
                at += 1
    assert at == len(tried)
    assert sum(block.survived for block in blocks) == sum(survived)
    assert sum(block.died for block in blocks) == sum(died)
    assert all(one.share > other.share for one, other in pairwise(blocks))


FINDINGS = [
    ([], [], Findings(0, 0)),
    ([(60, LEAST)], [], Findings(60, 0)),
    ([(60, LEAST - 1)], [], Findings(0, 0)),  # too few to say so
    ([(60, LEAST - 1), (240, 1)], [], Findings(60, 0)),  # who survives 240 survives 60
    ([(60, LEAST), (240, LEAST)], [(240, 2)], Findings(240, 0)),
    ([(60, LEAST), (240, LEAST)], [(240, 20)], Findings(60, 240)),
    ([(60, LEAST)], [(240, 9)], Findings(60, 0)),  # too few deaths
    ([(60, LEAST)], [(240, 10)], Findings(60, 240)),
    ([(60, LEAST)], [(70, 1), (240, 1000)], Findings(60, 240)),  # one mistake among a thousand
    ([(60, 5 * LEAST)], [(10, 1), (240, 1000)], Findings(60, 240)),
    ([], [(240, 10)], Findings(0, 240)),
]


@pytest.mark.parametrize(("survived", "died", "found"), FINDINGS)
def test_what_is_known_of_a_network(
    survived: list[tuple[float, float]], died: list[tuple[float, float]], found: Findings
) -> None:
    assert weigh(counts(*survived), counts(*died)) == found


bins = st.lists(st.integers(0, 3000), min_size=BINS, max_size=BINS)


@given(bins, bins, st.integers(10, 2000))
def test_what_is_known_holds_together_and_the_advice_keeps_its_bounds(
    survived: list[int], died: list[int], wish: int
) -> None:
    found = weigh(survived, died)
    assert not found.dead or found.alive < found.dead
    if found.alive:
        above = range(bin_of(found.alive), BINS)
        assert sum(survived[number] + died[number] for number in above) >= LEAST
    least, most = min(30, wish), max(1200, wish)
    told = advise(found, wish, least, most)
    assert least <= told <= most
    if found.dead and found.dead <= wish and told > least:
        assert told < found.dead


ADVICE = [
    (Findings(0, 0), 240, 240),  # nothing is known
    (Findings(120, 0), 240, 240),  # nobody tried more: that is no reason
    (Findings(300, 0), 240, 270),  # a tenth less
    (Findings(3600, 0), 240, 1200),
    (Findings(100, 140), 240, 90),
    (Findings(40, 240), 240, 120),  # nothing is known between: half
    (Findings(0, 240), 240, 120),
    (Findings(0, 40), 240, 30),
    (Findings(300, 420), 240, 270),
    (Findings(40, 300), 240, 240),  # the wish is not known to be bad
    (Findings(30, 45), 240, 30),  # 25 is below the least
]


@pytest.mark.parametrize(("found", "wish", "told"), ADVICE)
def test_advice_leaves_the_wish_only_for_a_reason(found: Findings, wish: int, told: int) -> None:
    assert advise(found, wish, 30, 1200) == told


def test_a_block_has_the_share_of_its_trials() -> None:
    assert Block(0, 3, 199.0, 1.0).share == SHARE


def _live(timeouts: list[float], heartbeat: float, silences: int, seed: int) -> tuple[Counts, Counts]:
    """Devices behind NATs that forget after these times, half of whose silences a push ends before their heartbeat.
    They give up after a death."""
    chance = random.Random(seed)
    survived, died = [0.0] * BINS, [0.0] * BINS
    for timeout in timeouts:
        for _ in range(silences):
            silence = heartbeat * (chance.random() if chance.random() < 0.5 else 1.0)
            if silence >= timeout:
                died[bin_of(silence)] += 1
                break
            survived[bin_of(silence)] += 1
    return survived, died


NATS = [
    ([60.0] * 500, 30, 55),
    ([300.0] * 500, 180, 240),  # nothing says that 240 is bad
    ([200.0] * 500, 100, 199),
    ([3600.0] * 999 + [60.0] * 1, 240, 240),  # one in a thousand learns for itself
]


@pytest.mark.parametrize(("timeouts", "least", "most"), NATS)
@pytest.mark.parametrize("seed", range(3))
def test_a_fleet_that_is_told_240_finds_what_its_nats_bear(
    timeouts: list[float], least: int, most: int, seed: int
) -> None:
    told, survived, died = 240, [0.0] * BINS, [0.0] * BINS
    for generation in range(6):
        alive, dead = _live(timeouts, told, 40, 100 * seed + generation)
        survived = [a + b for a, b in zip(survived, alive, strict=True)]
        died = [a + b for a, b in zip(died, dead, strict=True)]
        told = advise(weigh(survived, died), 240, 30, 1200)
    assert least <= told <= most
