"""The lab's columns: from what devices wrote down to what is missed; tables and plots of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.lab.account import (
    NEVER,
    Cut,
    Happening,
    Result,
    cut_off,
    make_result,
    quantile,
    read_accepted,
    read_log,
    shortcomings,
    worse,
)
from loadtest.lab.networks import Event, Network
from loadtest.lab.plan import PlannedPush
from loadtest.lab.tables import as_list_of_misses, as_table, plot, show_time, write_json

COUNTS = {
    "heartbeats": 20,
    "up_bytes": 1000,
    "down_bytes": 3000,
    "lost": 7,
    "full": 0,
    "forgotten": 0,
    "dead": 0,
    "too_long": 0,
}
START = 1000.0
NONE = {1.0: 0.0, 5.0: 0.0, 30.0: 0.0, 300.0: 0.0}


def _network(**given: Any) -> Network:
    return Network(name="test", title="A test", seconds=1700, drain=100, devices=2, **given)


def _push(serial: int, at: float, device: int = 0, *, counted: bool = True) -> PlannedPush:
    return PlannedPush(serial, at, device, "text", counted)


def _got(serial: int, at: float, device: int = 0) -> Happening:
    return Happening("got", device, START + at, serial)


def _result(contender: str = "a", **given: Any) -> Result:
    whole: dict[str, Any] = {
        "network": "test",
        "contender": contender,
        "pushes": 2,
        "shares": {1.0: 1.0, 5.0: 1.0, 30.0: 1.0, 300.0: 1.0},
        "p50": 0.1,
        "p99": 0.2,
        "lost": 0,
        "refused": 0,
        "repeats": 0,
        "heartbeats": 10.0,
        "oracle": 0.0,
        "bytes_per_push": 500.0,
        "times": (0.1, 0.2),
    }
    return Result(**{**whole, **given})


# Reading


def test_a_log_is_read_and_what_was_cut_off_is_not() -> None:
    text = "on 0 1.5\ngot 0 2.5 77\nnonsense\nwhat 0 1\noff 1 3.0\ngot 0 4.5 7"
    assert read_log(text) == [
        Happening("on", 0, 1.5),
        Happening("got", 0, 2.5, 77),
        Happening("off", 1, 3.0),
    ]


def test_accepted_pushes_are_read() -> None:
    assert read_accepted("accepted 1 5.5\nelse 3 4\naccepted 2 6.5\naccepted 3") == {1: 5.5, 2: 6.5}


# Results


def test_times_count_from_the_moment_a_push_was_due() -> None:
    plan = [_push(1, 10), _push(2, 20, 1), _push(3, 30), _push(4, 40), _push(5, 5, counted=False)]
    log = [_got(5, 50), _got(1, 10.5), _got(2, 24, 1), _got(3, 300), _got(3, 301)]
    result = make_result(_network(), "a", plan, {1, 2, 3, 4, 5}, log, COUNTS, START)
    assert result.times == (pytest.approx([0.5, 4.0, 270.0, NEVER]))
    assert result.shares == {1.0: 0.25, 5.0: 0.5, 30.0: 0.5, 300.0: 0.75}
    assert (result.p50, result.p99) == (4.0, NEVER)
    assert (result.pushes, result.lost, result.repeats, result.refused) == (4, 1, 1, 0)
    assert result.heartbeats == pytest.approx(20), "20 of two devices in half an hour"
    assert result.bytes_per_push == 1000, "of the four that came"
    assert result.dropped == {"lost": 7}


def test_a_push_that_was_not_accepted_is_refused_and_not_lost() -> None:
    result = make_result(_network(), "a", [_push(1, 10), _push(2, 20)], {2}, [_got(2, 21)], COUNTS, START)
    assert (result.pushes, result.lost, result.refused) == (1, 0, 1)


def test_a_push_of_another_device_is_an_error_of_the_lab() -> None:
    with pytest.raises(AssertionError, match="push 1 came to device 1"):
        make_result(_network(), "a", [_push(1, 10)], {1}, [_got(1, 11, 1)], COUNTS, START)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.floats(0.01, 1))
def test_a_quantile_is_the_least_value_that_covers_the_share(values: list[float], share: float) -> None:
    times = sorted(values)
    found = quantile(times, share)
    assert sum(time <= found for time in times) >= share * len(times) - 1e-6
    assert sum(time < found for time in times) < share * len(times) + 1e-6


def test_back_is_when_a_device_that_was_cut_off_is_online_again() -> None:
    network = _network(event=(Event(what="dead", at=100, until=200),))
    log = [
        _got(1, 50),
        Happening("on", 0, START + 107.5),
        _got(2, 120),
        _got(3, 100.5, 1),  # on its way before
        Happening("off", 1, START + 160),
    ]
    plan = [_push(1, 50), _push(2, 119), _push(3, 100), _push(4, 150, 1)]
    assert cut_off(network, plan, log, START) == [Cut(7.5, 7.5), Cut(60.0, NEVER)]
    assert cut_off(network, plan[:-1], log, START) == [Cut(7.5, 7.5)], "nothing more was for the second one"


def test_a_device_that_gets_pushes_meanwhile_was_not_cut_off() -> None:
    network = _network(event=(Event(what="dead", address=1, at=100, until=200),), addresses=2)
    log = [_got(1, 130), Happening("on", 0, START + 300), _got(2, 140, 1)]
    plan = [_push(1, 130), _push(2, 140, 1)]
    assert cut_off(network, plan, log, START) == []


# What is wanted


def test_one_that_reaches_all_misses_nothing() -> None:
    network = _network(wanted=("within-5", "oracle", "back", "tenfold"), forget=60)
    ours = _result(heartbeats=13.0, oracle=10.0, back=(14.0,))
    theirs = _result("c", heartbeats=60.0, p99=2.0)
    assert shortcomings(network, {"a": ours, "c": theirs}) == []


@pytest.mark.parametrize(
    ("wish", "given", "expected"),
    [
        ("within-5", {"shares": {1.0: 0.5, 5.0: 0.98, 30.0: 1.0, 300.0: 1.0}}, "98.0% within 5 s"),
        (
            "oracle",
            {"oracle": 10.0, "heartbeats": 14.0},
            "14.0 heartbeats /h, wanted 1.3 of the oracle's 10.0",
        ),
        ("oracle", {"oracle": 10.0, "times": (0.1, 11.0)}, "50.0% within 10 s"),
        ("back", {"back": (40.0, 50.0), "again": (1.0, 16.0)}, "back 16.0 s after it was noticed"),
        ("back", {"back": (NEVER,), "again": (NEVER,)}, "back inf s after it was noticed"),
        ("tenfold", {"p99": 0.3}, "wanted a tenth"),
        (None, {"lost": 1}, "1 lost"),
        (None, {"repeats": 2}, "2 repeated"),
    ],
)
def test_each_wish_can_be_missed(wish: str | None, given: dict[str, Any], expected: str) -> None:
    network = _network(wanted=(wish,) if wish else ())
    found = shortcomings(
        network,
        {"a": _result(**given), "c": _result("c", p99=2.0, heartbeats=99.0, lost=2, repeats=2, shares=NONE)},
    )
    assert len(found) == 1
    assert expected in found[0]


def test_phones_that_are_told_have_nothing_to_notice() -> None:
    told = _network(wanted=("back",), event=(Event(what="moved", at=1, told=True),))
    late = _result(back=(16.0,), again=(1.0,))
    assert shortcomings(told, {"a": late}) == ["back 16.0 s after the event, wanted 15"]
    assert shortcomings(_network(wanted=("back",)), {"a": late}) == []


@pytest.mark.parametrize(
    "given",
    [
        {"shares": {1.0: 0.9, 5.0: 1.0, 30.0: 1.0, 300.0: 1.0}},
        {"p50": 0.2},
        {"p99": 0.4},
        {"p99": NEVER},
        {"heartbeats": 12.0},
        {"bytes_per_push": 600.0},
        {"lost": 1},
        {"repeats": 1},
    ],
    ids=str,
)
def test_each_column_can_be_worse(given: dict[str, Any]) -> None:
    assert len(worse(_result(**given), _result("c"))) == 1
    assert worse(_result(), _result("c", **given)) == []


def test_what_the_machine_adds_is_not_worse() -> None:
    assert worse(_result(p50=0.12, bytes_per_push=510.0, heartbeats=10.5), _result("c")) == []


# Tables


def test_the_table_has_a_row_each_and_names_a_network_once() -> None:
    ours = _result(heartbeats=13.0, oracle=10.0, back=(2.0, 4.5), again=(0.5, 0.25), refused=3)
    theirs = _result("c", p99=NEVER, lost=5, shares={1.0: 0.9996, 5.0: 1.0, 30.0: 1.0, 300.0: 1.0})
    lines = as_table([theirs, ours], [_network()]).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {15}
    assert lines[2].startswith("| A test | a | 2 | 100.0 % |")
    assert "13.0 (1.30 of an oracle's)" in lines[2]
    assert "0, 3 refused" in lines[2]
    assert lines[2].endswith("| 4.5 s (500 ms) |")
    assert lines[3].startswith("|  | c | 2 | 99.9 % |"), "not rounded up"
    assert "never" in lines[3]


def test_misses_name_their_network() -> None:
    text = as_list_of_misses([_result(lost=1), _result("c")], [_network()])
    assert text == "- A test: 1 lost; lost or repeated more"
    assert as_list_of_misses([_result("c")], [_network()]) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "12 ms"), (1.0, "1.0 s"), (75.25, "75.2 s"), (NEVER, "never")]
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert show_time(seconds) == text


def test_json_has_null_for_never(tmp_path: Path) -> None:
    file = tmp_path / "lab.json"
    write_json(file, {"seed": 1}, [_result(p99=NEVER, times=(0.1, math.inf))])
    whole = orjson.loads(file.read_bytes())
    assert whole["seed"] == 1
    assert whole["results"][0]["p99"] is None
    assert whole["results"][0]["times"] == [0.1, None]
    assert whole["results"][0]["shares"]["5.0"] == 1.0


@pytest.mark.parametrize(("name", "begins"), [("lab.svg", b"<?xml"), ("lab.png", b"\x89PNG")])
def test_a_plot_is_a_picture(tmp_path: Path, name: str, begins: bytes) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib: pip install 'holdfast[lab]'")
    file = tmp_path / name
    plot(file, [_result(times=(0.1, 3.0, NEVER)), _result("c", times=())], [_network(), _network()])
    assert file.read_bytes().startswith(begins)
