"""Results as a table, as JSON, and as plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import orjson

from loadtest.lab.account import NEVER, WITHIN, Result, shortcomings
from loadtest.lab.contenders import CONTENDERS
from loadtest.lab.networks import Network

COLUMNS: Final = (
    "network",
    "",
    "pushes",
    *(f"≤ {limit:g} s" for limit in WITHIN),
    "p50",
    "p99",
    "lost",
    "repeats",
    "heartbeats /h",
    "bytes /push",
    "back (from noticing), worst",
)
COLOURS: Final = {"a": "#1a7f37", "b": "#bf8700", "c": "#8250df"}
ACROSS: Final = 4  # plots in a row
FOREVER: Final = 1000.0  # seconds: right end of the plots


class PlotError(Exception):
    """There is nothing to plot with."""


def as_table(results: Sequence[Result], networks: Sequence[Network]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    titles = {network.name: network.title for network in networks}
    shown = ""
    for result in sorted(results, key=lambda one: (list(titles).index(one.network), one.contender)):
        title = titles[result.network] if result.network != shown else ""
        shown = result.network
        lines.append(f"| {' | '.join(_cells(title, result))} |")
    return "\n".join(lines)


def _cells(title: str, result: Result) -> list[str]:
    heartbeats = f"{result.heartbeats:.1f}"
    if result.oracle:
        heartbeats += f" ({result.heartbeats / result.oracle:.2f} of an oracle's)"
    lost = str(result.lost) + (f", {result.refused} refused" if result.refused else "")
    return [
        title,
        result.contender,
        str(result.pushes),
        *(_percent(result.shares[limit]) for limit in WITHIN),
        show_time(result.p50),
        show_time(result.p99),
        lost,
        str(result.repeats),
        heartbeats,
        f"{result.bytes_per_push:,.0f}",
        _back(result),
    ]


def _back(result: Result) -> str:
    if result.back_worst is None:
        return ""
    since = "" if result.again_worst is None else f" ({show_time(result.again_worst)})"
    return show_time(result.back_worst) + since


def _percent(share: float) -> str:
    """Not rounded up to all."""
    return f"{math.floor(share * 1000) / 10:.1f} %"


def show_time(seconds: float) -> str:
    if seconds == NEVER:
        return "never"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def as_list_of_misses(results: Sequence[Result], networks: Sequence[Network]) -> str:
    """What is not reached yet, a line each network; "" if all is."""
    lines = []
    for network in networks:
        of_network = {result.contender: result for result in results if result.network == network.name}
        if "a" in of_network and (missed := shortcomings(network, of_network)):
            lines.append(f"- {network.title}: {'; '.join(missed)}")
    return "\n".join(lines)


def as_legend(letters: Sequence[str]) -> str:
    return "; ".join(f"{letter}: {CONTENDERS[letter].title}" for letter in letters)


def write_json(file: Path, head: Mapping[str, Any], results: Sequence[Result]) -> None:
    """`head`: what was run. A time that never came is null."""
    whole = {**head, "results": [_finite(asdict(result)) for result in results]}
    file.write_bytes(orjson.dumps(whole, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS) + b"\n")


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _finite(one) for key, one in value.items()}
        case list() | tuple():
            return [_finite(one) for one in value]
        case _:
            return value


def plot(file: Path, results: Sequence[Result], networks: Sequence[Network]) -> None:
    """For each network the share of pushes that had come after so many seconds, of each contender. PNG or SVG, by the
    file's name. Raises PlotError."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("plots need matplotlib: pip install 'holdfast[lab]'") from error
    rows = math.ceil(len(networks) / ACROSS)
    figure = Figure(figsize=(4 * ACROSS, 2.8 * rows), layout="constrained")
    for place, network in enumerate(networks, 1):
        axes = figure.add_subplot(rows, ACROSS, place)
        axes.set_title(network.title, fontsize=9)
        axes.set_xscale("log")
        axes.set_xlim(0.001, FOREVER)
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
        for result in (one for one in results if one.network == network.name):
            times = [time for time in result.times if time != NEVER]
            shares = [(i + 1) / max(1, len(result.times)) for i in range(len(times))]
            curve = ([0.001, *times, FOREVER], [0.0, *shares, shares[-1] if shares else 0.0])
            axes.step(*curve, where="post", color=COLOURS[result.contender], label=result.contender)
        axes.legend(fontsize=8, loc="lower right")
    figure.supxlabel("seconds from the push to the device")
    figure.supylabel("share of pushes")
    figure.savefig(file)
