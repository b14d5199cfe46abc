"""`python -m loadtest.bench`: measure the server against what it must reach."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import click

from loadtest.report import Row, machine, table, write_block
from loadtest.scenarios.accepts import accepts
from loadtest.scenarios.broadcast import broadcast
from loadtest.scenarios.ceiling import ceiling
from loadtest.scenarios.connects import connects
from loadtest.scenarios.idle import idle
from loadtest.scenarios.offline import offline
from loadtest.scenarios.targeted import targeted
from loadtest.stage import QUICK, Plan, Stage

SCENARIOS: Final[Mapping[str, Callable[[Stage], list[Row]]]] = {
    scenario.__name__: scenario
    for scenario in (ceiling, idle, connects, broadcast, targeted, accepts, offline)
}
NUMBERS: Final = Path("docs/numbers.md")
WORK: Final = Path(".bench")


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(sorted(SCENARIOS)))
@click.option("--quick", is_flag=True, help="Small and short: shows that it works, not how fast.")
@click.option("--runs", type=click.IntRange(min=1), help="Runs of each measurement.")
@click.option("--devices", type=click.IntRange(min=1200), help="Devices online at once.")
@click.option("--registered", type=click.IntRange(min=1200), help="Devices of accepts and offline.")
@click.option("--log-level", default="info", show_default=True, help="Of the server; its log goes to a file.")
@click.option("--profile", type=click.Path(path_type=Path), help="Write py-spy stacks of the server there.")
@click.option("--write", is_flag=True, help=f"Put the tables into {NUMBERS}.")
def main(
    names: Sequence[str],
    quick: bool,
    runs: int | None,
    devices: int | None,
    registered: int | None,
    log_level: str,
    profile: Path | None,
    write: bool,
) -> None:
    """Run the named scenarios, or all, and print a table for each."""
    plan = make_plan(quick=quick, runs=runs, devices=devices, registered=registered)
    directory = WORK / str(os.getpid())
    stage = Stage(plan, directory, settings={"HOLDFAST_SERVER_LOG_LEVEL": log_level}, profile=profile)
    if not stage.two_cores:
        stage.say("only one core: server and generator share it, and the numbers show that")
    try:
        for name in names or SCENARIOS:
            block = _as_block(SCENARIOS[name](stage))
            click.echo(f"\n{block}\n")
            if write:
                write_block(NUMBERS, name, block)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def make_plan(*, quick: bool, runs: int | None, devices: int | None, registered: int | None) -> Plan:
    plan = QUICK if quick else Plan()
    return replace(
        plan,
        runs=runs or plan.runs,
        devices=devices or plan.devices,
        registered=registered or plan.registered,
    )


def _as_block(rows: Sequence[Row]) -> str:
    command = " ".join(["python -m loadtest.bench", *sys.argv[1:]])
    return f"{time.strftime('%Y-%m-%d')}, {machine()}, `{command}`:\n\n{table(rows)}"


if __name__ == "__main__":
    main()
