from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.wheel import Wheel


def test_item_is_due_at_its_time_and_only_once() -> None:
    wheel: Wheel[str] = Wheel(now=100.0, tick=0.25)
    wheel.add("a", at=101.0)
    assert wheel.due(100.9) == []
    assert wheel.due(101.25) == ["a"]
    assert wheel.due(200.0) == []


def test_an_item_of_the_past_is_due_at_the_next_tick() -> None:
    wheel: Wheel[str] = Wheel(now=100.0, tick=0.25)
    wheel.add("late", at=3.0)
    assert wheel.due(100.3) == ["late"]


def test_a_leap_of_the_clock_loses_nothing() -> None:
    wheel: Wheel[int] = Wheel(now=0.0, tick=0.25)
    for at in (1, 1000, 2000):
        wheel.add(at, at=float(at))
    assert wheel.due(1e9) == [1, 1000, 2000]


@given(st.lists(st.floats(0, 100), max_size=30), st.lists(st.floats(0, 120), max_size=30))
def test_never_early_and_at_most_one_tick_late(times: list[float], looks: list[float]) -> None:
    wheel: Wheel[float] = Wheel(now=0.0, tick=0.25)
    for at in times:
        wheel.add(at, at=at)
    before = 0.0
    for now in [*sorted(looks), 1000.0]:
        for at in wheel.due(now):
            assert at <= now
            assert at + 0.25 >= before
        before = now
