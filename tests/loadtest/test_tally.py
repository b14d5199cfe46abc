"""What devices got, as one process counts it."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.ledger import Ledger
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
