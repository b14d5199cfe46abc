"""The scenario of audiences, small, against a real server."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest.bench import SCENARIOS
from loadtest.scenarios.reach import HALF, TAGS_OF_DEVICE, _device, reach
from loadtest.stage import QUICK, Stage

DEVICES = 300
SMALL = replace(QUICK, runs=1, seconds=0.3, reachable=DEVICES)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    affinity = os.sched_getaffinity(0)
    yield Stage(SMALL, tmp_path)
    os.sched_setaffinity(0, affinity)


def test_every_number_is_measured(stage: Stage) -> None:
    rows = {row.what: row for row in reach(stage)}
    assert len(rows) == 17
    assert all(value >= 0 for row in rows.values() for value in row.values)
    assert f"reach: accepting a push to a file of {DEVICES} lines" in rows
    assert f"reach: tags set, {DEVICES} devices a call" in rows
    wanted = {row.at_most or row.at_least for row in rows.values()}
    assert wanted >= {5, 50, 300, 20, 10, 5_000}, "what the issue asks for is in the table"
    assert SCENARIOS["reach"] is reach


def test_devices_are_the_same_in_every_run() -> None:
    one, other = (
        [_device(n, f"d{n}", some) for n in range(200)] for some in (random.Random(0), random.Random(0))
    )
    assert [{**device, "tags": set(device["tags"])} for device in one] == [
        {**device, "tags": set(device["tags"])} for device in other
    ]
    halves = sum(HALF in device["tags"] for device in one)
    assert 70 < halves < 130
    assert all(len(set(device["tags"]) - {HALF}) <= TAGS_OF_DEVICE for device in one)
