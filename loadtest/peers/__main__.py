"""`python -m loadtest.peers`: the same work for Holdfast, other servers and the bare limit, in turns of one run."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Final, NoReturn

import click
import msgspec

from loadtest.peers.entrants import Entrant, read_entrants
from loadtest.peers.tables import Turn, as_markdown
from loadtest.peers.work import take_turn
from loadtest.report import DISTURBED, machine, write_block
from loadtest.stage import QUICK, Plan, Stage

NUMBERS: Final = Path("docs/numbers.md")
WORK: Final = Path(".bench")
SECONDS: Final = 1.2
QUICK_SECONDS: Final = 0.3
SETTINGS: Final = {"HOLDFAST_SERVER_LOG_LEVEL": "warning"}


@click.command()
@click.option("--peers", "names", help="Some of them, with commas between. Default: all that are installed.")
@click.option("--quick", is_flag=True, help="Small and short: shows that it works, not how fast.")
@click.option(
    "--turns",
    type=click.IntRange(min=0),
    help="Each takes part once in a turn; 0: only those that --add-to has.  [default: 5]",
)
@click.option("--devices", type=click.IntRange(min=1200, max=65_536), help="Online at once.")
@click.option("--seconds", type=click.FloatRange(min=0.1), help="Of each measurement.")
@click.option(
    "--add-to",
    "kept",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keep the turns there, as JSON; those that it has count, too.",
)
@click.option("--list", "only_list", is_flag=True, help="Show who could take part, and end.")
@click.option("--write", is_flag=True, help=f"Put the tables into {NUMBERS}.")
def main(
    names: str | None,
    quick: bool,
    turns: int | None,
    devices: int | None,
    seconds: float | None,
    kept: Path | None,
    only_list: bool,
    write: bool,
) -> None:
    """Measure all of them side by side, and print tables."""
    plan = QUICK if quick else Plan()
    plan = replace(
        plan,
        runs=(1 if quick else plan.runs) if turns is None else turns,
        subscribers=devices or plan.subscribers,
        seconds=seconds or (QUICK_SECONDS if quick else SECONDS),
    )
    entrants = read_entrants()
    missing = {name: entrant.missing() for name, entrant in entrants.items()}
    if only_list:
        click.echo("\n".join(f"{name:16} {missing[name] or entrants[name].version()}" for name in entrants))
        return
    wanted = _wanted(entrants, names)
    left_out = [f"{name}: {missing[name]}" for name in wanted if missing[name]]
    for line in left_out:
        click.echo(f"left out: {line}", err=True)
    chosen = [entrants[name] for name in wanted if not missing[name]]
    if not chosen:
        raise click.ClickException("nobody is left")
    signal.signal(signal.SIGTERM, _end)  # so that what was started is ended
    results = _read(kept)
    directory = WORK / f"peers-{os.getpid()}"
    try:
        for _ in _measure(Stage(plan, directory, settings=SETTINGS), chosen, results):
            if kept is not None:  # after each entrant: some take minutes
                kept.write_bytes(msgspec.json.encode(results) + b"\n")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if not results:
        raise click.ClickException("there are no turns")
    block = _block(results, list(entrants.values()), plan, left_out)
    click.echo(f"\n{block}\n")
    if write:
        write_block(NUMBERS, "peers", block)


def _wanted(entrants: Mapping[str, Entrant], names: str | None) -> list[str]:
    wanted = list(entrants) if names is None else names.split(",")
    if unknown := set(wanted) - set(entrants):
        raise click.UsageError(f"no peer {', '.join(sorted(unknown))}: {', '.join(entrants)}")
    return wanted


def _read(kept: Path | None) -> list[Turn]:
    if kept is None or not kept.exists():
        return []
    try:
        return msgspec.json.decode(kept.read_bytes(), type=list[Turn])
    except msgspec.DecodeError as error:
        raise click.ClickException(f"{kept} has no turns of before: {error}") from error


def _measure(stage: Stage, entrants: Sequence[Entrant], results: list[Turn]) -> Iterator[None]:
    """Adds turns to `results`, and yields after each entrant. Whoever was first is last in the next turn."""
    order = list(entrants)
    for number in range(stage.plan.runs):
        turn: Turn = {}
        results.append(turn)
        for entrant in order:
            started = time.perf_counter()
            turn[entrant.name] = take_turn(stage, entrant)
            took = time.perf_counter() - started
            how = turn[entrant.name].failure or "done"
            stage.say(f"turn {number + 1} of {stage.plan.runs}: {entrant.name}: {how}, {took:.0f} s")
            yield
        order.append(order.pop(0))


def _block(turns: Sequence[Turn], entrants: Sequence[Entrant], plan: Plan, left_out: Sequence[str]) -> str:
    date = time.strftime("%Y-%m-%d")
    lines = [
        f"{date}, {machine()}, `{_command()}`: {plan.subscribers:,} devices, turns: {len(turns)}.",
        as_markdown(turns, entrants),
    ]
    if left_out:
        lines.append("Left out: " + "; ".join(left_out) + ".")
    if (others := _others(turns)) > DISTURBED:
        lines.append(f"Not quiet: what was no part of this took {others:.2f} of a core (median).")
    return "\n\n".join(lines)


def _others(turns: Sequence[Turn]) -> float:
    works = [
        work.others
        for turn in turns
        for findings in turn.values()
        for way in findings.ways.values()
        for work in way.fan_out.values()
    ]
    return median(works) if works else 0.0


def _command() -> str:
    return " ".join(["python -m loadtest.peers", *sys.argv[1:]])


def _end(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
