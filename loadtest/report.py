"""Numbers as rows of a table, and their place in docs/numbers.md."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

import orjson

BUSY: Final = 0.95  # of its core: from here on the generator is the limit
DISTURBED: Final = 0.05  # of one core used by others: from here on the numbers are not only ours
HEAD: Final = (
    "| what | wanted | median | least … most | runs | server CPU | generator CPU | |\n"
    "|---|---|---|---|---|---|---|---|"
)

CONTEST_HEAD: Final = (
    "| what | here | {} | here / there | least … most of a turn | turns | |\n|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True, slots=True)
class Load:
    """Shares of one core used during a run, 0 to 1; `others` is everything that is neither of the two."""

    server: float
    generator: float
    others: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """One number: a value from each run, and what it must reach."""

    what: str
    unit: str
    values: Sequence[float]
    at_least: float | None = None
    at_most: float | None = None
    loads: Sequence[Load] = ()
    note: str = ""

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def met(self) -> bool | None:
        """None: nothing was wanted."""
        if self.at_least is not None:
            return self.median >= self.at_least
        if self.at_most is not None:
            return self.median <= self.at_most
        return None

    @property
    def wanted(self) -> str:
        if self.at_least is not None:
            return f"≥ {show(self.at_least)} {self.unit}"
        return "" if self.at_most is None else f"≤ {show(self.at_most)} {self.unit}"

    def as_markdown(self) -> str:
        server = _percent([load.server for load in self.loads])
        generator = _percent([load.generator for load in self.loads])
        spread = f"{show(min(self.values))} … {show(max(self.values))}" if len(self.values) > 1 else ""
        cells = (
            self.what,
            self.wanted,
            f"{show(self.median)} {self.unit}",
            spread,
            str(len(self.values)),
            server,
            generator,
            self._remarks(),
        )
        return f"| {' | '.join(cells)} |"

    def _remarks(self) -> str:
        remarks = ["missed"] if self.met is False else []
        if self.loads and median(load.generator for load in self.loads) > BUSY:
            remarks.append("the generator is the limit")
        if self.loads and (others := median(load.others for load in self.loads)) > DISTURBED:
            remarks.append(f"not quiet: others took {_percent([others])} of a core")
        if self.note:
            remarks.append(self.note)
        return "; ".join(remarks)


@dataclass(frozen=True, slots=True)
class Contest:
    """One number of two servers, measured in turns: `ours` and `theirs` have a row from each turn."""

    ours: Sequence[Row]
    theirs: Sequence[Row]

    @property
    def ratio(self) -> float:
        """Of the medians, ours to theirs."""
        theirs = median(_values(self.theirs))
        return median(_values(self.ours)) / theirs if theirs else float("nan")

    def as_markdown(self) -> str:
        cells = (
            self.ours[0].what,
            self._shown(self.ours),
            self._shown(self.theirs),
            f"{self.ratio:.3f}",
            self._spread(),
            str(len(self.ours)),
            "; ".join([*_notes("here", self.ours), *_notes("there", self.theirs)]),
        )
        return f"| {' | '.join(cells)} |"

    def _shown(self, rows: Sequence[Row]) -> str:
        return f"{show(median(_values(rows)))} {rows[0].unit}"

    def _spread(self) -> str:
        """Of the ratios turn by turn: a machine that changes its speed does that to both of a turn."""
        pairs = zip(self.ours, self.theirs, strict=True)
        ratios = [mine.median / other.median for mine, other in pairs if other.median]
        return f"{min(ratios):.3f} … {max(ratios):.3f}" if len(ratios) > 1 else ""


def contests(ours: Sequence[Sequence[Row]], theirs: Sequence[Sequence[Row]]) -> list[Contest]:
    """`ours` and `theirs`: the rows of each turn, the same ones in all."""
    return [Contest(*rows) for rows in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)]


def _notes(whose: str, rows: Sequence[Row]) -> list[str]:
    return [f"{whose}: {note}" for note in dict.fromkeys(row.note for row in rows) if note]


def _values(rows: Sequence[Row]) -> list[float]:
    return [value for row in rows for value in row.values]


def show(value: float) -> str:
    """Three digits, and all before the point."""
    if value and abs(value) < 10:
        return f"{value:.2f}"
    return f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * median(shares):.0f} %" if shares else ""


def table(rows: Sequence[Row]) -> str:
    return "\n".join([HEAD, *(row.as_markdown() for row in rows)])


def contest_table(rows: Sequence[Contest], rival: str) -> str:
    """`rival`: what to call the other server."""
    return "\n".join([CONTEST_HEAD.format(rival), *(row.as_markdown() for row in rows)])


def machine() -> str:
    """What the numbers were measured on."""
    kernel = platform.release().split("-")[0]
    return f"{os.cpu_count()} cores ({_processor()}), Python {platform.python_version()}, Linux {kernel}"


def _processor() -> str:
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def write_json(file: Path, command: str, measured: Mapping[str, Sequence[Row]]) -> None:
    """The rows of each scenario, for programs."""
    scenarios = {
        name: [
            {
                "what": row.what,
                "unit": row.unit,
                "values": list(row.values),
                "median": row.median,
                "wanted": row.wanted,
                "met": row.met,
                "note": row.note,
            }
            for row in rows
        ]
        for name, rows in measured.items()
    }
    whole = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "command": command,
        "scenarios": scenarios,
    }
    file.write_bytes(orjson.dumps(whole, option=orjson.OPT_INDENT_2) + b"\n")


def write_block(file: Path, name: str, block: str) -> None:
    """Replace what stands between `<!-- bench NAME -->` and `<!-- end NAME -->`, or append it with the two."""
    begin, end = f"<!-- bench {name} -->", f"<!-- end {name} -->"
    text = file.read_text() if file.exists() else "# Numbers\n"
    whole = f"{begin}\n{block.strip()}\n{end}"
    pattern = re.compile(rf"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    text, found = pattern.subn(lambda _: whole, text)
    file.write_text(text if found else f"{text.rstrip()}\n\n{whole}\n")
