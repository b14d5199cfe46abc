"""Buckets of latencies, and their sums."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.histogram import Histogram, Timeline, bucket_of, highest_of

microseconds = st.integers(0, 10**10)
SHARES = (0.0, 0.25, 0.5, 0.9, 0.99, 1.0)


@pytest.mark.parametrize(
    ("seconds", "bucket", "highest"),
    [
        (-1.0, 0, 0.0),
        (0.0, 0, 0.0),
        (0.000_001_1, 1, 0.000_001),
        (0.000_255_1, 255, 0.000_255),
        (0.000_256_1, 256, 0.000_257),
        (0.000_511_1, 383, 0.000_511),
        (0.000_512_1, 384, 0.000_515),
    ],
)
def test_a_value_has_its_bucket(seconds: float, bucket: int, highest: float) -> None:
    assert bucket_of(seconds) == bucket
    assert highest_of(bucket) == pytest.approx(highest, abs=1e-9)


@given(microseconds)
def test_a_bucket_is_off_by_less_than_a_hundredth(value: int) -> None:
    bucket = bucket_of(value / 1e6 + 1e-9)
    highest = round(highest_of(bucket) * 1e6)
    assert value <= highest <= value * 1.008 + 1
    assert bucket_of(highest / 1e6 + 1e-8) == bucket < bucket_of((highest + 1) / 1e6 + 1e-8)


@given(st.lists(microseconds, min_size=1), st.lists(microseconds))
def test_merged_ones_have_the_quantiles_of_all_values(here: list[int], there: list[int]) -> None:
    one, other = Histogram(), Histogram()
    for histogram, values in ((one, here), (other, there)):
        for value in values:
            histogram.add(value / 1e6 + 1e-9)
    one.merge(other.counts)
    ranked = sorted(here + there)
    assert one.count == len(ranked)
    for share, found in zip(SHARES, one.quantiles(SHARES), strict=True):
        exact = ranked[min(int(len(ranked) * share), len(ranked) - 1)]
        assert exact <= round(found * 1e6) <= exact * 1.008 + 1
        assert one.quantile(share) == found


def test_nothing_has_no_quantiles() -> None:
    assert Histogram().quantiles(SHARES) == [0.0] * len(SHARES)


def test_a_timeline_counts_where_it_was_due_and_forgets_what_it_told() -> None:
    timeline = Timeline(2.0)
    for due, at in ((3.9, 4.1), (2.0, 2.0), (4.0, 14.0)):
        timeline.add(due, at)
    assert {window: counts.total() for window, counts in timeline.drain().items()} == {1: 2, 2: 1}
    assert timeline.drain() == {}
