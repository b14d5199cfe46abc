"""Simulated days behind NATs: ours against mars and an oracle (loadtest/heartbeats.py)."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from click.testing import CliRunner

from loadtest.heartbeats import (
    BEGIN,
    DAY,
    END,
    LEARNING,
    PUSHES_EVERY,
    SEED,
    Life,
    Mars,
    Nat,
    Oracle,
    Outcome,
    Row,
    compare,
    deaths,
    main,
)


def behind(nat: Nat, loss: float = 0.0, days: float = 2.0, pushes_every: float = 300.0) -> Row:
    return compare("test", nat, loss, seed=SEED, seconds=days * DAY, pushes_every=pushes_every)


# The reach of the issue


@pytest.mark.parametrize("loss", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("timeout", [60, 300])
def test_after_half_an_hour_pushes_are_in_time_at_little_more_than_an_oracles_cost(
    timeout: float, loss: float
) -> None:
    row = behind(Nat(((0, timeout),)), loss)
    assert row.ours.pushes > 400
    assert row.ours.in_time >= 0.99
    assert row.share(row.ours) <= 1.3


@pytest.mark.parametrize("timeout", [45, 90, 180, 600, 1200, 1800])
def test_other_timeouts_are_learned_too(timeout: float) -> None:
    row = behind(Nat(((0, timeout),)), days=5, pushes_every=max(300, 4 * timeout))
    assert row.ours.in_time >= 0.99
    assert row.share(row.ours) <= 1.3


@pytest.mark.parametrize(
    "nat",
    [
        Nat(((0, 60), (DAY, 300))),
        Nat(((0, 300), (DAY, 60))),
        Nat(((0, 300),), spread=0.2),
    ],
)
def test_nats_that_change_or_waver_are_followed(nat: Nat) -> None:
    row = behind(nat, 0.05, days=3)
    assert row.ours.in_time >= 0.98
    assert row.share(row.ours) <= 1.5


def test_mars_is_beaten() -> None:
    for timeout in (45, 60, 120, 180, 240, 300, 600, 900):
        row = behind(Nat(((0, timeout),)), 0.05, days=5)
        assert row.ours.in_time >= row.mars.in_time - 0.005
        late = row.mars.in_time < 0.95
        assert late or row.share(row.ours) <= row.share(row.mars) + 0.05


@pytest.mark.parametrize("timeout", [60, 300])
def test_where_pushes_are_often_they_are_in_time(timeout: float) -> None:
    row = behind(Nat(((0, timeout),)), 0.05, pushes_every=timeout / 6)
    assert row.ours.in_time >= 0.99


@pytest.mark.parametrize("pushes_every", [5, 15, 30])
def test_a_death_is_noticed_in_some_usual_gaps(pushes_every: float) -> None:
    """At less than paho's 60 heartbeats an hour, even where a push comes every few seconds."""
    with_it, without = (
        deaths(pushes_every, asks=asks, seed=SEED, seconds=20 * DAY) for asks in (True, False)
    )
    assert with_it.dead_for(0.5) < 0.7 * without.dead_for(0.5)
    assert with_it.dead_for(0.9) < max(6 * pushes_every, 40)
    assert with_it.heartbeats < 60 * 24 * 20


def test_who_hears_rarely_asks_no_more_than_before() -> None:
    with_it, without = (deaths(900, asks=asks, seed=SEED, seconds=20 * DAY) for asks in (True, False))
    assert with_it.heartbeats <= 1.1 * without.heartbeats


# The simulation itself


def test_an_oracle_is_never_late_without_loss() -> None:
    nat = Nat(((0, 60), (DAY, 300)))
    outcome = Life(nat, Oracle(nat), 0.0, random.Random(1)).run(2 * DAY)
    assert (outcome.late, outcome.reconnects) == (0, 0)
    days = (DAY - LEARNING, 59), (DAY, 299)
    expected = sum(seconds / PUSHES_EVERY / math.expm1(silence / PUSHES_EVERY) for seconds, silence in days)
    assert outcome.heartbeats == pytest.approx(expected, rel=0.05)


class Fixed(Oracle):
    def interval(self, now: float) -> float:
        return 240.0


def test_a_heartbeat_that_is_too_long_makes_pushes_late() -> None:
    nat = Nat(((0, 60),))
    outcome = Life(nat, Fixed(nat), 0.0, random.Random(1), 300).run(DAY)
    assert outcome.in_time < 0.6
    assert outcome.slowest > 120
    assert outcome.reconnects > 200


def test_pushes_are_all_counted() -> None:
    nat = Nat(((0, 60),))
    outcome = Life(nat, Fixed(nat), 0.2, random.Random(1), 100).run(DAY)
    assert outcome.pushes == pytest.approx((DAY - 1800) / 100, rel=0.1)


def mars_after(answers: str) -> float:
    """The interval after heartbeats that were answered (+) or not (-)."""
    mars = Mars()
    for answer in answers:
        (mars.survived if answer == "+" else mars.died)(mars.interval(0.0), 0.0)
    return mars.interval(0.0)


@pytest.mark.parametrize(
    ("answers", "interval"),
    [
        ("", 210),
        ("+++", 270),
        ("+++" + "+++++", 330),
        ("+++" + "+++++" * 6, 600),
        ("+++" + "+++++" * 7, 580),
        ("+++-", 270),
        ("+++" + "+++++" + "--", 250),
        ("--", 210),
        ("+++" + "+++++" + "--" + "--", 210),
    ],
)
def test_mars_does_as_its_code(answers: str, interval: float) -> None:
    assert mars_after(answers) == interval


def test_mars_tries_a_little_more_after_a_week() -> None:
    mars = Mars()
    for _ in range(8):
        mars.survived(mars.interval(0.0), 0.0)
    for _ in range(2):
        mars.died(mars.interval(0.0), 0.0)
    mars.survived(250, 7 * DAY)
    assert mars.interval(7 * DAY) == 270


def test_a_reconnect_counts_for_three_heartbeats() -> None:
    row = Row("x", 0.0, Outcome(heartbeats=10, reconnects=2), Outcome(), Outcome(heartbeats=8))
    assert row.share(row.ours) == 2.0


def test_the_command_writes_its_table(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.md"
    numbers.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    result = CliRunner().invoke(main, ["--days", "0.1", "--write", str(numbers)])
    assert result.exit_code == 0, result.output
    text = numbers.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")  # noqa: PT018
    assert "old" not in text
    assert "| 60 s | 20% |" in text
    assert "| 15 s | " in text
