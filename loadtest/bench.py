"""`python -m loadtest.bench`: measure the server against what it must reach, or against the server of another
checkout (`--against`): each scenario in turns of one run, so that a machine that changes its speed changes both."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NoReturn

import click

from loadtest.report import Contest, Row, contest_table, contests, machine, table, write_block, write_json
from loadtest.scenarios.accepts import accepts
from loadtest.scenarios.broadcast import broadcast
from loadtest.scenarios.ceiling import ceiling
from loadtest.scenarios.churn import churn
from loadtest.scenarios.connects import connects
from loadtest.scenarios.crowd import crowd
from loadtest.scenarios.day import day
from loadtest.scenarios.fleet import fleet
from loadtest.scenarios.idle import idle
from loadtest.scenarios.offline import offline
from loadtest.scenarios.reach import reach
from loadtest.scenarios.steady import steady
from loadtest.scenarios.storm import storm
from loadtest.scenarios.subscriptions import subscriptions
from loadtest.scenarios.targeted import targeted
from loadtest.scenarios.topics import topics
from loadtest.stage import QUICK, Plan, Stage

Scenario = Callable[[Stage], list[Row]]

SCENARIOS: Final[Mapping[str, Scenario]] = {
    scenario.__name__: scenario
    for scenario in (
        ceiling,
        idle,
        connects,
        storm,
        broadcast,
        targeted,
        steady,
        day,
        accepts,
        offline,
        topics,
        subscriptions,
        churn,
        reach,
        crowd,
        fleet,
    )
}
NUMBERS: Final = Path("docs/numbers.md")
WORK: Final = Path(".bench")


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(sorted(SCENARIOS)))
@click.option("--quick", is_flag=True, help="Small and short: shows that it works, not how fast.")
@click.option("--runs", type=click.IntRange(min=1), help="Runs of each measurement.")
@click.option("--devices", type=click.IntRange(min=1200), help="Devices online at once.")
@click.option("--nodes", type=click.IntRange(min=0), help="Node processes of fleet; 0: the embedded server.")
@click.option(
    "--brokers", type=click.IntRange(min=0), help="Broker processes of fleet; 0: its nodes are brokers, too."
)
@click.option("--hold", type=click.FloatRange(min=0), help="Seconds for which fleet must be stable.")
@click.option("--registered", type=click.IntRange(min=1200), help="Devices of accepts and offline.")
@click.option("--reachable", type=click.IntRange(min=1200), help="Devices of reach.")
@click.option("--cycles", type=click.IntRange(min=1000), help="Connects and disconnects of churn.")
@click.option("--log-level", default="info", show_default=True, help="Of the server; its log goes to a file.")
@click.option("--profile", type=click.Path(path_type=Path), help="Write py-spy stacks of the server there.")
@click.option(
    "--against",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A checkout of Holdfast: measure its server too, in turns, and print the ratios.",
)
@click.option("--json", "results", type=click.Path(path_type=Path), help="Write the rows there, as JSON.")
@click.option(
    "--label", default="", help=f"Behind the scenario's name in {NUMBERS}, where it has several tables."
)
@click.option("--write", is_flag=True, help=f"Put the tables into {NUMBERS}.")
def main(
    names: Sequence[str],
    quick: bool,
    runs: int | None,
    devices: int | None,
    nodes: int | None,
    brokers: int | None,
    hold: float | None,
    registered: int | None,
    reachable: int | None,
    cycles: int | None,
    log_level: str,
    profile: Path | None,
    against: Path | None,
    results: Path | None,
    label: str,
    write: bool,
) -> None:
    """Run the named scenarios, or all, and print a table for each."""
    plan = make_plan(quick=quick, runs=runs, devices=devices, registered=registered, cycles=cycles)
    plan = replace(
        plan,
        reachable=reachable or plan.reachable,
        fleet_devices=devices or plan.fleet_devices,
        nodes=plan.nodes if nodes is None else nodes,
        brokers=plan.brokers if brokers is None else brokers,
        hold=plan.hold if hold is None else hold,
    )
    directory = WORK / str(os.getpid())
    signal.signal(signal.SIGTERM, _end)  # so that what was started is ended
    settings = {"HOLDFAST_SERVER_LOG_LEVEL": log_level}
    here = plan if against is None else replace(plan, runs=1)
    stage = Stage(here, directory / "here", settings=settings, profile=profile)
    rival = None
    if against is not None:
        rival = Stage(here, directory / "there", settings=settings, source=against)
    if not stage.two_cores:
        stage.say("only one core: server and generator share it, and the numbers show that")
    measured: dict[str, list[Row]] = {}
    try:
        for name in names or SCENARIOS:
            block, measured[name] = _measure(SCENARIOS[name], stage, rival, plan.runs)
            if results is not None:
                write_json(results, _command(), measured)
            click.echo(f"\n{block}\n")
            if write:
                write_block(NUMBERS, " ".join(filter(None, (name, label, "against" if rival else ""))), block)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def make_plan(
    *, quick: bool, runs: int | None, devices: int | None, registered: int | None, cycles: int | None
) -> Plan:
    plan = QUICK if quick else Plan()
    return replace(
        plan,
        runs=runs or plan.runs,
        devices=devices or plan.devices,
        registered=registered or plan.registered,
        cycles=cycles or plan.cycles,
    )


def _end(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _command() -> str:
    return " ".join(["python -m loadtest.bench", *sys.argv[1:]])


def _measure(scenario: Scenario, stage: Stage, rival: Stage | None, turns: int) -> tuple[str, list[Row]]:
    """The scenario's table, under what it was measured on and with; and its rows, but for those of a contest."""
    command = _command()
    rows: list[Row] = []
    if rival is None or rival.source is None:
        rows = scenario(stage)
        numbers = table(rows)
    else:
        name = rival.source.resolve().name  # docs/numbers.md need not know where it was
        command = command.replace(str(rival.source), name)
        numbers = contest_table(in_turns(scenario, stage, rival, turns), name)
    return f"{time.strftime('%Y-%m-%d')}, {machine()}, `{command}`:\n\n{numbers}", rows


def in_turns(scenario: Scenario, ours: Stage, theirs: Stage, turns: int) -> list[Contest]:
    """Whoever was second is first in the next turn."""
    rows: dict[Stage, list[list[Row]]] = {ours: [], theirs: []}
    for turn in range(turns):
        for stage in (ours, theirs) if turn % 2 == 0 else (theirs, ours):
            rows[stage].append(scenario(stage))
    return contests(rows[ours], rows[theirs])


if __name__ == "__main__":
    main()
