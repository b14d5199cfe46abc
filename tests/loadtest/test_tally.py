"""What devices got, as one process counts it."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.histogram import highest_of
from loadtest.ledger import Ledger
from loadtest.publishing import Schedule
from loadtest.tally import Tally, read_arrivals

FIRST, COUNT = 100, 37


@settings(deadline=None)
@given(st.lists(st.integers(FIRST, FIRST + COUNT - 1)))
def test_a_broadcast_is_a_set_of_devices(arrivals: list[int]) -> None:
    tally = Tally(FIRST, COUNT)
    tally.expect(7)
    for device in arrivals:
        tally.take(device, 7)
    marks, those = tally.marks(7), set(arrivals)
    assert (marks.count, marks.repeats) == (len(those), len(arrivals) - len(those))
    assert tally.missing(7, COUNT) == [n for n in range(FIRST, FIRST + COUNT) if n not in those]
    assert tally.drain() == b""


def test_no_more_missing_devices_are_named_than_asked_for() -> None:
    tally = Tally(FIRST, COUNT)
    tally.expect(7)
    assert tally.missing(7, 2) == [100, 101]


def test_the_first_and_the_last_arrival_have_their_times() -> None:
    tally = Tally(FIRST, COUNT)
    tally.expect(7)
    assert (tally.marks(7).first, tally.marks(7).last) == (0.0, 0.0)
    before = time.perf_counter()
    tally.take(100, 7)
    tally.take(101, 7)
    tally.take(100, 7)
    assert before <= tally.marks(7).first <= tally.marks(7).last <= time.perf_counter()


def test_what_is_no_broadcast_is_held_against_the_ledger() -> None:
    tally, ledger = Tally(FIRST, COUNT), Ledger(0)
    due = time.perf_counter()
    mine, twice, wrong, late = (ledger.add_targeted(device, due) for device in (100, 101, 102, 103))
    for device, serial in ((100, mine), (101, twice), (101, twice), (99, wrong)):
        tally.take(device, serial)
    for serial, device, at, _ in read_arrivals(tally.drain()):
        ledger.take_targeted(device, serial, at)
    assert ledger.errors() == "1 repeated, 1 stray"
    assert set(ledger.waiting) == {late}
    assert len(ledger.latencies) == 2
    assert all(0 <= latency < 10 for latency in ledger.latencies)
    assert tally.drain() == b""


def test_a_timed_broadcast_is_for_some_and_is_forgotten_once_they_have_it() -> None:
    """Every second device, from 1 on; what comes after that is no news of it."""
    tally = Tally(FIRST, COUNT, window=1e9)
    now = time.perf_counter()
    tally.since[1] = now  # device FIRST + 1 was away until now
    tally.expect_timed(7, now - 5.0, 2, (FIRST + 1) % 2)
    wanted = [FIRST + place for place in range(1, COUNT, 2)]
    for device in (*wanted, wanted[0], FIRST):
        tally.take(device, 7)
    assert tally.progress() == {7: (len(wanted), 1, 1)}
    [counts] = tally.latencies.drain().values()
    assert sum(count for bucket, count in counts.items() if highest_of(bucket) >= 5.0) == len(wanted) - 1
    assert tally.progress() == {}
    tally.take(wanted[0], 7)
    assert [arrival[:2] for arrival in read_arrivals(tally.drain())] == [(7, wanted[0])]


def test_a_schedule_follows_its_rate() -> None:
    """One a second for ten seconds, ten a second after that; a pause of the caller changes nothing."""
    schedule = Schedule(lambda now: 1.0 if now < 110.0 else 10.0, 100.0)
    first = [*schedule.take(105.0), *schedule.take(105.5)]
    assert first == pytest.approx([100.0 + n for n in range(6)])
    rest = list(schedule.take(111.95))
    assert rest == pytest.approx([106.0, 107.0, 108.0, 109.0, *(110.0 + n / 10 for n in range(20))])
