"""Line plots as inline SVG: a few hundred points, two axes, a legend. Everything a browser needs is in the text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH, HEIGHT = 900, 240
LEFT, RIGHT, TOP, BOTTOM = 80, 16, 28, 32
COLOURS: Final = ("#0969da", "#bf8700", "#cf222e", "#8250df", "#1a7f37")
TICKS: Final = 5
NICE: Final = (1.0, 2.0, 2.5, 5.0, 10.0)

Point = tuple[float, float | None]  # None: a gap


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Plot:
    """`show` writes a value of the y axis; `log`: it has decades, and no 0."""

    name: str  # an id in the page
    title: str
    lines: Sequence[Line]
    show: Callable[[float], str]
    log: bool = False

    @property
    def is_empty(self) -> bool:
        return not any(value is not None for line in self.lines for _, value in line.points)


def draw(plot: Plot) -> str:
    """One <svg> element."""
    values = [value for line in plot.lines for _, value in line.points if value is not None]
    times = [at for line in plot.lines for at, _ in line.points]
    across = Axis(0.0, max(times, default=0.0) or 1.0, LEFT, WIDTH - RIGHT)
    up = _decades(values) if plot.log else Axis(0.0, max(values, default=0.0) or 1.0, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg id="{escape(plot.name)}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(plot.title)}" font-family="sans-serif" font-size="12">',
        f'<text x="{LEFT}" y="16" font-weight="bold">{escape(plot.title)}</text>',
        *_grid(across, up, plot.show),
        *_legend(plot.lines),
        *(_polylines(line, colour, across, up) for line, colour in zip(plot.lines, COLOURS, strict=False)),
        "</svg>",
    ]
    return "\n".join(parts)


@dataclass(frozen=True, slots=True)
class Axis:
    """From values to places in the picture."""

    least: float
    most: float
    begin: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        least, most = self._scaled(self.least), self._scaled(self.most)
        share = (self._scaled(max(value, self.least)) - least) / (most - least)
        return self.begin + share * (self.end - self.begin)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self) -> list[float]:
        if self.log:
            decades = range(round(math.log10(self.least)), round(math.log10(self.most)) + 1)
            return [10.0**power for power in decades]
        step = nice_step((self.most - self.least) / TICKS)
        return [step * n for n in range(int(self.most / step + 1e-9) + 1)]


def nice_step(least: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, and not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return power * next(nice for nice in NICE if power * nice >= least * (1 - 1e-9))


def _decades(values: Sequence[float]) -> Axis:
    positive = [value for value in values if value > 0] or [1e-3]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    return Axis(10.0**low, 10.0 ** max(high, low + 1), HEIGHT - BOTTOM, TOP, log=True)


def _grid(across: Axis, up: Axis, show: Callable[[float], str]) -> Iterator[str]:
    for value in up.ticks():
        y = up.place(value)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d0d7de"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(show(value))}</text>'
    for at in across.ticks():
        x = across.place(at)
        yield f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{at:g} s</text>'


def _legend(lines: Sequence[Line]) -> Iterator[str]:
    x = WIDTH - RIGHT
    for line, colour in reversed(list(zip(lines, COLOURS, strict=False))):
        yield f'<text x="{x}" y="16" text-anchor="end" fill="{colour}">{escape(line.name)}</text>'
        x -= 12 + 7 * len(line.name)


def _polylines(line: Line, colour: str, across: Axis, up: Axis) -> str:
    """One for each run of points without a gap; a dot where a run is a single point."""
    drawn = []
    for run in _runs(line.points):
        places = [f"{across.place(at):.1f},{up.place(value):.1f}" for at, value in run]
        if len(places) > 1:
            drawn.append(
                f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            )
        else:
            x, y = places[0].split(",")
            drawn.append(f'<circle cx="{x}" cy="{y}" r="2" fill="{colour}"/>')
    return "\n".join(drawn)


def _runs(points: Sequence[Point]) -> Iterator[list[tuple[float, float]]]:
    run: list[tuple[float, float]] = []
    for at, value in points:
        if value is not None:
            run.append((at, value))
        elif run:
            yield run
            run = []
    if run:
        yield run
