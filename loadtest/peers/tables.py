"""The turns as tables: a median and its spread in each cell, and what the bare loop of the same turn did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from loadtest.peers.entrants import HOLDFAST, Entrant
from loadtest.peers.work import KINDS, RATES, TOPICS, Findings, Pace, Work, kind
from loadtest.report import BUSY, show

Turn = dict[str, Findings]  # by entrant

BARE, COALESCING = "bare", "bare-coalescing"
LIMITED: Final = "†"
MISSING: Final = "–"
LEGEND: Final = (
    "A cell is the median of all turns (least … most). × is the share of the bare loop's of the same turn: one send "
    "for each message, for four at once the coalescing one. "
    f"{LIMITED}: the generator was busier than the server, which could do more; its CPU for a million, and what that "
    f"would give on a full core, say how much. {MISSING}: it does not do that, or failed (below)."
)


@dataclass(frozen=True, slots=True)
class _Line:
    """A row of tables: an entrant, and how it reaches devices."""

    entrant: str
    title: str
    way: str


Pick = Callable[[Findings], Work | None]


def as_markdown(turns: Sequence[Turn], entrants: Sequence[Entrant]) -> str:
    """All tables. `entrants` in their order; who is in no turn is left out."""
    present = [one for one in entrants if any(one.name in turn for turn in turns)]
    parts = [
        LEGEND,
        _who(turns, present),
        "Connections:",
        _connections(turns, present),
        "Messages to all, deliveries a second:",
        _fan_out(turns, present, _rates),
        "The same, seconds of the server's CPU for a million deliveries → deliveries a second on a full core:",
        _fan_out(turns, present, _costs),
        "Messages to one device each, at QoS 1; milliseconds from when they were due, p50 / p99:",
        _singles(turns, present),
    ]
    if failures := _failures(turns, present):
        parts += ["What failed:", failures]
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _who(turns: Sequence[Turn], entrants: Sequence[Entrant]) -> str:
    rows = []
    for one in entrants:
        count = sum(one.name in turn for turn in turns)
        rows.append((one.title, one.version(), str(count), one.lacks or "durable, recorded, authenticated"))
    return _table(("server", "version", "turns", "beside a push of ours"), rows)


def _lines(turns: Sequence[Turn], entrants: Sequence[Entrant]) -> list[_Line]:
    return [
        _Line(one.name, f"{one.title}, {way}" if one.name == HOLDFAST else one.title, way)
        for one in entrants
        for way in dict.fromkeys(
            name for turn in turns if one.name in turn for name in turn[one.name].ways or (TOPICS,)
        )
    ]


def _connections(turns: Sequence[Turn], entrants: Sequence[Entrant]) -> str:
    head = (
        "server",
        "RSS each",
        "with a subscription",
        "kernel, both ends",
        "connects a second",
        "CPU of each",
    )
    rows = []
    for one in entrants:
        found = [turn[one.name] for turn in turns if one.name in turn]
        pick = _connects
        rows.append(
            (
                one.title,
                _cell([each.rss for each in found], " KB"),
                _cell([each.subscribed for each in found], " KB"),
                _cell([each.kernel for each in found], " KB"),
                _rates(turns, one.name, pick, BARE),
                _cell([each.connects.cost for each in found if each.connects], " µs"),
            )
        )
    return _table(head, rows)


def _connects(findings: Findings) -> Work | None:
    return findings.connects


def _fan_out(
    turns: Sequence[Turn],
    entrants: Sequence[Entrant],
    cell: Callable[[Sequence[Turn], str, Pick, str], str],
) -> str:
    rows = []
    for line in _lines(turns, entrants):
        cells = [
            cell(turns, line.entrant, _fan_out_of(line.way, kind(*one)), COALESCING if one[1] > 1 else BARE)
            for one in KINDS
        ]
        rows.append((line.title, *cells))
    return _table(("server", *(kind(*one) for one in KINDS)), rows)


def _fan_out_of(way: str, name: str) -> Pick:
    """Of the bare loops there is one way, whichever is asked for."""

    def pick(findings: Findings) -> Work | None:
        found = findings.ways.get(way) or findings.ways.get(TOPICS)
        return found.fan_out.get(name) if found else None

    return pick


def _singles(turns: Sequence[Turn], entrants: Sequence[Entrant]) -> str:
    rows = []
    for line in _lines(turns, entrants):
        pick = _single_of(line.way)
        found = [turn[line.entrant].ways.get(line.way) for turn in turns if line.entrant in turn]
        paces = [[each.paces.get(str(rate)) for each in found if each] for rate in RATES]
        rows.append(
            (
                line.title,
                _rates(turns, line.entrant, pick, BARE),
                _costs(turns, line.entrant, pick, BARE),
                *(_pace([pace for pace in each if pace]) for each in paces),
            )
        )
    head = ("server", "most a second", "CPU for a million → alone", *(f"{rate:,} a second" for rate in RATES))
    return _table(head, rows)


def _single_of(way: str) -> Pick:
    def pick(findings: Findings) -> Work | None:
        found = findings.ways.get(way) or findings.ways.get(TOPICS)
        return found.single if found else None

    return pick


def _rates(turns: Sequence[Turn], entrant: str, pick: Pick, bare: str) -> str:
    works = _works(turns, entrant, pick)
    if not works:
        return MISSING
    limited = median(work.generator - min(work.server, BUSY) for work in works) > 0
    share = _share(turns, entrant, bare, pick, lambda mine, limit: mine.rate / limit.rate)
    return f"{_cell([work.rate for work in works])}{share}{' ' + LIMITED if limited else ''}"


def _costs(turns: Sequence[Turn], entrant: str, pick: Pick, bare: str) -> str:
    works = _works(turns, entrant, pick)
    if not works:
        return MISSING
    alone = 1e6 / median(work.cost for work in works)
    share = _share(turns, entrant, bare, pick, lambda mine, limit: limit.cost / mine.cost)
    return f"{_cell([work.cost for work in works])} → {show(alone)}{share}"


def _works(turns: Sequence[Turn], entrant: str, pick: Pick) -> list[Work]:
    return [work for turn in turns if entrant in turn and (work := pick(turn[entrant]))]


def _share(
    turns: Sequence[Turn], entrant: str, bare: str, pick: Pick, ratio: Callable[[Work, Work], float]
) -> str:
    """Of the bare loop's, turn by turn: a machine that changes its speed does that to both of a turn."""
    if entrant == bare:
        return ""
    both = [turn for turn in turns if entrant in turn and bare in turn]
    pairs = [(pick(turn[entrant]), pick(turn[bare])) for turn in both]
    shares = [ratio(mine, limit) for mine, limit in pairs if mine and limit]
    return f", {median(shares):.2f} ×" if shares else ""


def _pace(paces: Sequence[Pace]) -> str:
    if not paces:
        return MISSING
    if sum(pace.kept for pace in paces) * 2 <= len(paces):
        return "cannot keep up"
    both = [_cell([getattr(pace, name) for pace in paces]) for name in ("p50", "p99")]
    return " / ".join(both)


def _cell(values: Iterable[float | None], unit: str = "") -> str:
    there = [value for value in values if value is not None]
    if not there:
        return MISSING
    spread = f" ({show(min(there))} … {show(max(there))})" if len(there) > 1 else ""
    return f"{show(median(there))}{unit}{spread}"


def _failures(turns: Sequence[Turn], entrants: Sequence[Entrant]) -> str:
    lines = []
    for one in entrants:
        mine = [turn[one.name].failure for turn in turns if one.name in turn]
        told = [text for text in mine if text]
        lines += [
            f"- {one.title}: {text} ({told.count(text)} of {len(mine)} turns)" for text in dict.fromkeys(told)
        ]
    return "\n".join(lines)
