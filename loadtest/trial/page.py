"""A result as one HTML file that needs nothing else: no script, no style sheet, no font, no address."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Final

from loadtest.trial.plot import Line, Plot, draw
from loadtest.trial.results import Result, Window
from loadtest.trial.summary import MB, headline, sections, show_time, show_verdict

STYLE: Final = (
    "body{font-family:sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#1f2328}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #d0d7de}"
    ".bad{color:#cf222e;font-weight:bold}.warning{background:#fff8c5;padding:.5em 1em}"
    "svg{width:100%;height:auto;margin:1em 0}"
)

Value = Callable[[Window], float | None]


def make_page(result: Result) -> str:
    title = escape(f"Load test: {result.scenario}, {result.began}")
    body = "\n".join([*_head(result), *_plots(result), *_tables(result)])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _head(result: Result) -> Iterator[str]:
    yield f"<h1>{escape(headline(result))}</h1>"
    yield f"<p>{escape(result.began)}; the generator ran on {escape(result.machine)}.</p>"
    yield from _list("verdicts", "Thresholds", [(show_verdict(one), one.met) for one in result.verdicts])
    if result.generator.bottleneck:
        yield '<div class="warning" id="bottleneck"><b>The generator may be the limit:</b>'
        yield from _list("", "", [(line, True) for line in result.generator.bottleneck])
        yield "</div>"
    yield from _list("notes", "Notes", [(line, True) for line in result.notes])


def _list(name: str, title: str, lines: Sequence[tuple[str, bool]]) -> Iterator[str]:
    """`lines`: with whether they are good news."""
    if not lines:
        return
    if title:
        yield f'<h2 id="{name}">{escape(title)}</h2>'
    marks = ("" if good else ' class="bad"' for _, good in lines)
    items = (f"<li{mark}>{escape(line)}</li>" for mark, (line, _) in zip(marks, lines, strict=True))
    yield f"<ul>{''.join(items)}</ul>"


def _plots(result: Result) -> Iterator[str]:
    for plot in plots(result):
        if not plot.is_empty:
            yield draw(plot)


def plots(result: Result) -> list[Plot]:
    """All there could be; those without a point are not shown."""
    windows = result.windows

    def line(name: str, value: Value) -> Line:
        return Line(name, [(window.at, value(window)) for window in windows])

    latencies = [
        line("p50", lambda w: w.p50),
        line("p90", lambda w: w.p90),
        line("p99", lambda w: w.p99),
        line("p99.9", lambda w: w.p999),
        line("max", lambda w: w.max),
    ]
    throughput = [
        line("due", lambda w: w.due / result.window),
        line("delivered", lambda w: None if w.arrivals is None else w.arrivals / result.window),
    ]
    lost = [line("lost", lambda w: w.lost if result.pushes.sent else None)]
    behind = [line("behind", lambda w: w.behind if result.pushes.sent else None)]
    return [
        Plot("latency", "Latency of deliveries, by when they were due", latencies, show_time, log=True),
        Plot(
            "connects",
            "Latency of connects, p99",
            [line("p99", lambda w: w.connect_p99)],
            show_time,
            log=True,
        ),
        Plot("throughput", "Pushes due and deliveries, a second", throughput, _count),
        Plot("online", "Devices online", [line("online", lambda w: w.online)], _count),
        Plot("memory", "Memory of the server", [line("memory", _memory)], lambda v: f"{v:g} MB"),
        Plot("cpu", "CPU of the server, cores", [line("CPU", lambda w: w.server_cpu)], lambda v: f"{v:g}"),
        Plot("lost", "Deliveries lost, by when they were due", lost, _count),
        Plot("behind", "Pushes that left late, the latest", behind, show_time),
    ]


def _memory(window: Window) -> float | None:
    return None if window.server_memory is None else window.server_memory / MB


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"


def _tables(result: Result) -> Iterator[str]:
    for title, rows in sections(result):
        cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
        yield f"<h2>{escape(title)}</h2><table>{cells}</table>"
    plan = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in result.plan.items())
    yield f'<h2>Asked for</h2><table id="plan">{plan}</table>'
