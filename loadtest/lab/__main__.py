"""`python -m loadtest.lab`: pushes through lossy networks, beside a plain client and another broker. Root only."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import click
import msgspec

from loadtest.lab.contenders import CONTENDERS
from loadtest.lab.namespaces import NamespaceError, why_not
from loadtest.lab.networks import NETWORKS, Lab, Network, NetworkError, read_networks
from loadtest.lab.run import LabError, Outcome, Run
from loadtest.lab.sites import SiteError
from loadtest.lab.tables import PlotError, as_legend, as_list_of_misses, as_table, plot, write_json
from loadtest.report import machine, write_block
from loadtest.server import ServerError

NUMBERS: Final = Path("docs/numbers.md")
WORK: Final = Path(".bench")
LATE: Final = 0.005  # seconds by which a quiet machine is not late on average


@click.command()
@click.argument("names", nargs=-1)
@click.option(
    "--networks",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=NETWORKS,
    help="TOML file of networks. Default: those that come along.",
)
@click.option("--contenders", default="abc", show_default=True, help="Some of a, b, c.")
@click.option("--seed", type=int, help="Of the plan and of all losses. Default: the file's.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    help="At most so long for each network: a trial, in which long silences do not come.",
)
@click.option("--json", "results", type=click.Path(path_type=Path), help="Write the results there, as JSON.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw them there: .png or .svg.")
@click.option("--keep", is_flag=True, help=f"Leave the logs in {WORK}.")
@click.option("--list", "only_list", is_flag=True, help="Show the networks, and end.")
@click.option("--write", is_flag=True, help=f"Put the table into {NUMBERS}.")
def main(
    names: Sequence[str],
    file: Path,
    contenders: str,
    seed: int | None,
    seconds: float | None,
    results: Path | None,
    picture: Path | None,
    keep: bool,
    only_list: bool,
    write: bool,
) -> None:
    """Run the named networks, or all, all at once, and print a table."""
    lab = _read(file)
    networks = [_shortened(network, seconds) for network in _chosen(lab, names)]
    if only_list:
        click.echo("\n".join(f"{network.name:20} {network.title}" for network in networks))
        return
    if unknown := set(contenders) - set(CONTENDERS):
        raise click.UsageError(f"no contender {', '.join(sorted(unknown))}: a, b and c are")
    if reason := why_not():
        raise click.ClickException(reason)
    letters = sorted(set(contenders))
    seed = lab.seed if seed is None else seed
    directory = WORK / f"lab-{os.getpid()}"
    directory.mkdir(parents=True)
    signal.signal(signal.SIGTERM, _end)  # so that what was started is ended
    try:
        outcome = Run(networks, letters, seed, directory.resolve(), _say).go()
    except (LabError, NamespaceError, SiteError, ServerError) as error:
        raise click.ClickException(str(error)) from error
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
    block = _block(outcome, networks, letters, seed)
    click.echo(f"\n{block}\n")
    if results is not None:
        head = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "command": _command(), "seed": seed}
        write_json(results, head, outcome.results)
    if write:
        write_block(NUMBERS, "lab", block)
    if picture is not None:
        _plot(picture, outcome, networks)


def _read(file: Path) -> Lab:
    try:
        return read_networks(file)
    except NetworkError as error:
        raise click.ClickException(str(error)) from error


def _chosen(lab: Lab, names: Sequence[str]) -> list[Network]:
    known = [network.name for network in lab.network]
    if unknown := set(names) - set(known):
        raise click.UsageError(f"no network {', '.join(sorted(unknown))}: {', '.join(known)}")
    return [network for network in lab.network if not names or network.name in names]


def _shortened(network: Network, seconds: float | None) -> Network:
    if seconds is None or seconds >= network.seconds:
        return network
    learn = network.learn * seconds / network.seconds
    return msgspec.structs.replace(network, seconds=seconds, learn=learn)


def _block(outcome: Outcome, networks: Sequence[Network], letters: Sequence[str], seed: int) -> str:
    date = time.strftime("%Y-%m-%d")
    relay = outcome.relay
    lines = [
        f"{date}, {machine()}, `{_command()}`, seed {seed}, {outcome.seconds / 60:.0f} minutes.",
        f"{as_legend(letters)}. The relay delivered {relay.late * 1000:.2f} ms late on average, "
        f"{relay.latest * 1000:.0f} ms at most.",
        "",
        as_table(outcome.results, networks),
    ]
    if relay.late > LATE:
        lines[2:2] = ["**The machine was busy with something else: these times say little.**"]
    if misses := as_list_of_misses(outcome.results, networks):
        lines += ["", "Not reached, or worse than c:", "", misses]
    return "\n".join(lines)


def _plot(file: Path, outcome: Outcome, networks: Sequence[Network]) -> None:
    try:
        plot(file, outcome.results, networks)
    except PlotError as error:
        raise click.ClickException(str(error)) from error


def _command() -> str:
    return " ".join(["python -m loadtest.lab", *sys.argv[1:]])


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def _end(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
