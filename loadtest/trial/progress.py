"""How the trial is going, on standard error: a table that lives on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from loadtest.trial.conductor import Display, View
from loadtest.trial.summary import show_memory, show_time

PAUSE: Final = 5.0  # seconds between two lines


class Lines:
    """One each PAUSE seconds, and whenever a phase begins."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._phase = ""
        self._shown = 0.0

    def show(self, view: View) -> None:
        now = time.perf_counter()
        if view.phase == self._phase and now - self._shown < PAUSE:
            return
        self._phase, self._shown = view.phase, now
        told = "; ".join(f"{name} {value}" for name, value in facts(view))
        self._file.write(f"{time.strftime('%H:%M:%S')} {told}\n")
        self._file.flush()


class Living:
    def __init__(self, live: Live, scenario: str) -> None:
        self._live = live
        self._scenario = scenario

    def show(self, view: View) -> None:
        table = Table(title=self._scenario, show_header=False, title_justify="left")
        for name, value in facts(view):
            table.add_row(name, value)
        self._live.update(table, refresh=True)


def facts(view: View) -> list[tuple[str, str]]:
    """What is known so far."""
    left = "" if view.left is None else f", {view.left:.0f} s left"
    told = [("phase", f"{view.phase}, {view.seconds:.0f} s{left}")]
    told.append(("online", f"{view.online:,} of {view.devices:,}"))
    if view.sent:
        refused = f", {view.refused:,} refused" if view.refused else ""
        told += [
            ("pushes", f"{view.sent:,} sent, {view.accepted:,} accepted{refused}"),
            ("delivered", f"{view.arrived:,}, {view.a_second:,.0f} a second"),
        ]
    if view.latencies.count:
        p50, p99 = view.latencies.quantiles([0.5, 0.99])
        told.append(("latency", f"p50 {show_time(p50)}, p99 {show_time(p99)}"))
    if view.behind >= 1e-3:
        told.append(("behind", show_time(view.behind)))
    told.append(("generator", f"{view.busiest:.0%} of a core"))
    if view.memory is not None:
        told.append(("server", show_memory(view.memory)))
    return told


@contextmanager
def display(scenario: str) -> Iterator[Display]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(sys.stderr)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield Living(live, scenario)
