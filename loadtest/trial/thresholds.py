"""Thresholds from a TOML file, and whether they were met."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loadtest.trial.results import Result, Verdict
from loadtest.trial.scenarios import SCENARIOS

ALL: Final = "all"
Measure = Callable[[Result], float | None]


@dataclass(frozen=True, slots=True)
class Threshold:
    """`at_least`: more is better."""

    what: str
    measure: Measure
    at_least: bool = False


def _share_lost(result: Result) -> float:
    told = result.deliveries
    return told.lost / max(1, told.arrived + told.lost)


THRESHOLDS: Final[Mapping[str, Threshold]] = {
    "lost": Threshold("deliveries that were accepted and did not come", lambda r: r.deliveries.lost),
    "lost_share": Threshold("of the deliveries", _share_lost),
    "repeated": Threshold("deliveries that came more than once", lambda r: r.deliveries.repeated),
    "strayed": Threshold("deliveries to the wrong device", lambda r: r.deliveries.strayed),
    "refused": Threshold("pushes that were not accepted", lambda r: sum(r.pushes.refused.values())),
    "unanswered": Threshold("pushes without an answer", lambda r: r.pushes.unanswered),
    "offline": Threshold(
        "devices that are not online at the end", lambda r: r.plan["devices"] - r.connects.online
    ),
    "dropped": Threshold("connections that were lost", lambda r: sum(r.connects.dropped.values())),
    "latency_p50": Threshold("seconds from due to the device", lambda r: r.deliveries.latency.p50),
    "latency_p90": Threshold("the same", lambda r: r.deliveries.latency.p90),
    "latency_p99": Threshold("the same", lambda r: r.deliveries.latency.p99),
    "latency_p999": Threshold("the same", lambda r: r.deliveries.latency.p999),
    "latency_max": Threshold("the same", lambda r: r.deliveries.latency.max),
    "accept_p99": Threshold("seconds from due to the server's answer", lambda r: r.pushes.latency.p99),
    "connect_p50": Threshold("seconds from due to online", lambda r: r.connects.latency.p50),
    "connect_p99": Threshold("the same", lambda r: r.connects.latency.p99),
    "connect_max": Threshold("the same", lambda r: r.connects.latency.max),
    "connects_a_second": Threshold("while all connect", lambda r: r.connects.a_second, at_least=True),
    "deliveries_a_second": Threshold("while they come", lambda r: r.deliveries.a_second, at_least=True),
    "server_memory": Threshold("bytes, the most", lambda r: r.server.memory_most),
    "server_memory_a_device": Threshold("bytes", lambda r: r.server.memory_a_device),
    "server_memory_growth": Threshold("bytes an hour", lambda r: r.server.memory_growth),
    "server_cpu": Threshold("cores, on average", lambda r: r.server.cpu),
    "bottlenecks": Threshold("reasons to doubt the generator", lambda r: len(r.generator.bottleneck)),
}


def read_thresholds(file: Path, scenario: str) -> dict[str, float]:
    """Those of the table [all], and over them those of the scenario's. Raises ValueError."""
    try:
        tables = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid TOML: {error}") from error
    for name, table in tables.items():
        if name != ALL and name not in SCENARIOS:
            raise ValueError(f"{file}: [{name}] is no scenario; there are [{ALL}] and {_names(SCENARIOS)}")
        _check_table(file, name, table)
    return {**tables.get(ALL, {}), **tables.get(scenario, {})}


def _check_table(file: Path, name: str, table: Any) -> None:
    if not isinstance(table, dict):
        raise ValueError(f"{file}: {name} must be a table, [{name}]")
    for key, value in table.items():
        if key not in THRESHOLDS:
            raise ValueError(f"{file}: [{name}] {key} is no threshold; there are {_names(THRESHOLDS)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"{file}: [{name}] {key} must be a number of 0 or more, and is {value!r}")


def _names(table: Mapping[str, object]) -> str:
    return ", ".join(table)


def judge(result: Result, wanted: Mapping[str, float]) -> list[Verdict]:
    """What was not measured is missed."""
    return [_judge(result, name, value) for name, value in wanted.items()]


def _judge(result: Result, name: str, wanted: float) -> Verdict:
    threshold = THRESHOLDS[name]
    measured = threshold.measure(result)
    met = measured is not None and (measured >= wanted if threshold.at_least else measured <= wanted)
    return Verdict(name, wanted, measured, met)
