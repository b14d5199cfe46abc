"""The capacity model: what it says grows as it should, and the document says what the command does."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.capacity import Constant, Demand, Knowledge, Model, Point, check, predict, read_knowledge
from loadtest.capacity_command import BLOCK, SIZES, capacity, fill, run_capacity, show_models

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs/capacity.md"
KNOWLEDGE = read_knowledge()
NEAR = (0.67, 1.5)  # model / measured

DEMANDS = st.builds(
    Demand,
    devices=st.integers(1, 10**9),
    pushes_per_day=st.floats(1, 1e12),
    online=st.floats(0.001, 1),
    targeted=st.floats(0, 1),
    broadcast_within=st.floats(1, 3600),
    process_devices=st.integers(1_000, 1_000_000),
    report_days=st.floats(0, 60),
)


def _model(**demand: float) -> Model:
    return Model(KNOWLEDGE, Demand(**{"devices": 1_000_000, **demand}))  # type: ignore[arg-type]


@settings(deadline=None)
@given(DEMANDS)
def test_twice_the_demand_never_needs_less(demand: Demand) -> None:
    one = Model(KNOWLEDGE, demand)
    two = Model(
        KNOWLEDGE, replace(demand, devices=2 * demand.devices, pushes_per_day=2 * demand.pushes_per_day)
    )
    for name in ("cores", "processes", "machines", "memory", "shards", "redis_cores", "bits_out", "bits_in"):
        assert getattr(two, name) >= getattr(one, name) > 0


@settings(deadline=None)
@given(DEMANDS)
def test_what_there_is_is_enough(demand: Demand) -> None:
    model = Model(KNOWLEDGE, demand)
    assert model.cores * demand.use >= model.busy_cores
    assert model.shards * demand.use >= model.redis_cores
    assert model.machines * demand.machine_cores >= model.cores
    assert model.online / model.processes <= demand.process_devices
    assert model.process_death[0] <= demand.process_devices


def test_a_day_and_a_peak() -> None:
    model = _model(pushes_per_day=86_400_000, targeted=0.25, peak=2, online=0.1, broadcast_within=3600)
    assert (model.online, model.pushes, model.deliveries) == (100_000, 500, 1500)
    assert _model(online=0.6, broadcast_within=10).deliveries == 60_000


def test_memory_is_what_each_device_costs() -> None:
    model = _model(devices=10_000_000, online=1.0)
    each = KNOWLEDGE["node_memory"] + KNOWLEDGE["kernel_memory"]
    assert model.memory == 10_000_000 * each + model.processes * KNOWLEDGE["process_memory"]
    assert _model(waiting=0.0).registry == 1_000_000 * KNOWLEDGE["device_redis"]
    assert _model(report_days=30).reports == pytest.approx(30 * _model(report_days=1).reports)


def test_a_death_is_over_sooner_with_more_of_everything() -> None:
    model = _model()
    assert model.back_after(1000, 2, 1) > model.back_after(1000, 4, 2) > 0
    assert model.back_after(2000, 4, 2) == 2 * model.back_after(1000, 4, 2)
    assert model.region_death[0] == pytest.approx(model.online / 3)


def test_what_is_nearest_to_its_limit_breaks_first() -> None:
    used = [limit.used for limit in _model().limits]
    assert used == sorted(used, reverse=True)
    assert _model(largest_app=0.0).limits[-1].used == 0
    assert "table of nodes" in _model(devices=10**9, process_devices=1000).limits[0].what
    assert "log" in _model(pushes_per_day=5e9, report_days=0.0, targeted=1.0).limits[0].what


# What it knows


@pytest.mark.parametrize("name", KNOWLEDGE.constant)
def test_a_constant_is_measured_or_says_that_it_is_not(name: str) -> None:
    one = KNOWLEDGE.constant[name]
    assert one.value > 0
    assert bool(one.date) == bool(one.command)
    assert re.fullmatch(r"(\d{4}-\d\d-\d\d)?", one.date)
    assert one.unit in ("bytes", "µs", "/s")
    answer = show_models([_model()])
    assert (one.what in answer) == (not one.date)


@pytest.mark.parametrize("point", KNOWLEDGE.point, ids=lambda point: point.name)
def test_the_model_is_near_what_was_measured(point: Point) -> None:
    said = predict(KNOWLEDGE, point)
    ratios = {name: said[name] / measured for name, measured in point.measures.items()}
    assert {name: ratio for name, ratio in ratios.items() if not NEAR[0] <= ratio <= NEAR[1]} == {}


def test_a_point_is_held_against_the_model() -> None:
    point = Point("p", "2026-01-01", "c", 1000, 2, 1.0, {"redis_memory": 100.0})
    known = Knowledge({**KNOWLEDGE.constant, "device_redis": Constant("d", "bytes", 0.2)}, (point,))
    assert list(check(known)) == [(point, "redis_memory", 100.0, 200.0)]


# The command and its page


def test_the_page_says_what_the_command_prints() -> None:
    text = PAGE.read_text()
    assert len(BLOCK.findall(text)) >= 3
    assert fill(text, run_capacity) == text, "python -m loadtest.capacity_command writes it anew"


def test_each_limit_is_explained_on_the_page() -> None:
    text = PAGE.read_text()
    for limit in _model().limits:
        assert f"\n| {limit.what.split(',')[0]} |" in text


def test_the_sizes_are_columns() -> None:
    head = run_capacity([]).splitlines()[0]
    assert head.count("|") == len(SIZES) + 2
    assert run_capacity(["--devices", "7", "--devices", "8000000"]).startswith(
        "| registered devices | 7 | 8 M |\n"
    )


def test_flags_change_the_demand() -> None:
    assert run_capacity(["--online", "1"]) != run_capacity([])


def test_a_size_that_is_none_is_refused() -> None:
    answer = CliRunner().invoke(capacity, ["--devices", "0"])
    assert answer.exit_code == 2
    assert "--devices" in answer.output


def test_only_marked_blocks_are_filled() -> None:
    page = "a\n<!-- holdfast capacity --online 1 -->\nold\n<!-- end -->\nb\n"
    seen: list[list[str]] = []
    filled = fill(page, lambda arguments: seen.append(arguments) or "new\n")  # type: ignore[func-returns-value]
    assert filled == "a\n<!-- holdfast capacity --online 1 -->\n\nnew\n\n<!-- end -->\nb\n"
    assert seen == [["--online", "1"]]
