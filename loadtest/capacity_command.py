"""`holdfast capacity`: the model's answer as tables, which docs/capacity.md shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, Final

import click

from loadtest.capacity import GB, Demand, Knowledge, Model, check, read_knowledge

SIZES: Final = (1_000_000, 10_000_000, 100_000_000, 500_000_000)
HELP: Final = {
    "pushes_per_day": "Pushes as devices get them, in a day.",
    "online": "Share of the devices that is online.",
    "targeted": "Share of the pushes that are for one device; the others are of broadcasts.",
    "peak": "The busy hour, against the mean of the day.",
    "broadcast_within": "Seconds in which a broadcast reaches all that are online.",
    "payload": "Bytes of a push.",
    "keep_alive": "Seconds between two PINGREQs of a device.",
    "connects_per_day": "Of a device that is online.",
    "waiting": "Pushes that wait for a device, on average.",
    "report_days": "Days for which it is told what became of a push.",
    "largest_app": "The largest app's share of everything.",
    "process_devices": "Devices of one node process.",
    "machine_cores": "Cores of one machine.",
    "machine_memory": "GB of one machine.",
    "regions": "Regions, one of which may die.",
    "use": "Share of cores and memory that is used in the busy hour.",
    "shard_memory": "GB of data in one Redis.",
}

Show = Callable[[Model], str]


def _number(value: float) -> str:
    """Three digits, and k, M, G behind them."""
    for size, name in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= size:
            scaled = value / (1e3 if name == " k" else size)
            return f"{scaled:.3g}{name}" if scaled < 1000 else f"{scaled:,.0f}{name}"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _memory(value: float) -> str:
    return f"{_number(value / GB)} GB"


def _death(death: tuple[float, float]) -> str:
    devices, seconds = death
    return f"{_number(devices)}, {_number(seconds)} s"


ROWS: Final[Sequence[tuple[str, Show]]] = (
    ("devices online", lambda m: _number(m.online)),
    ("targeted pushes, busy hour", lambda m: f"{_number(m.pushes)} /s"),
    ("deliveries of broadcasts", lambda m: f"{_number(m.deliveries)} /s"),
    ("connects", lambda m: f"{_number(m.connects)} /s"),
    ("PINGREQs", lambda m: f"{_number(m.pings)} /s"),
    ("**cores** of nodes and brokers", lambda m: _number(m.cores)),
    ("**node processes**", lambda m: _number(m.processes)),
    ("**memory** of nodes and their kernels", lambda m: _memory(m.memory)),
    ("**machines**", lambda m: _number(m.machines)),
    ("**Redis shards**, without replicas", lambda m: _number(m.shards)),
    ("Redis' memory: devices and what waits", lambda m: _memory(m.registry)),
    ("Redis' memory: reports", lambda m: _memory(m.reports)),
    ("Redis' cores, busy", lambda m: _number(m.redis_cores)),
    ("**bandwidth** to devices", lambda m: f"{_number(m.bits_out / 1e6)} Mbit/s"),
    ("from devices", lambda m: f"{_number(m.bits_in / 1e6)} Mbit/s"),
    ("a process dies: devices, back after", lambda m: _death(m.process_death)),
    ("a region dies: devices, back after", lambda m: _death(m.region_death)),
    ("breaks first", lambda m: f"{m.limits[0].what}: {m.limits[0].used:.0%}"),
    ("then", lambda m: f"{m.limits[1].what}: {m.limits[1].used:.0%}"),
)


def demand_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A flag for each field of Demand that has a default."""
    for one in reversed(fields(Demand)):
        if one.default is not MISSING:
            kind = type(one.default)
            flag = "--" + one.name.replace("_", "-")
            decorate = click.option(
                flag, type=kind, default=one.default, show_default=True, help=HELP[one.name]
            )
            command = decorate(command)
    return command


@click.command()
@click.option(
    "--devices",
    "sizes",
    type=click.IntRange(min=1),
    multiple=True,
    help="Registered devices; may be repeated.",
)
@click.option(
    "--constants", is_flag=True, help="Show what the model knows, and how it compares with what was measured."
)
@demand_options
def capacity(sizes: tuple[int, ...], constants: bool, **demand: Any) -> None:
    """What a fleet needs for so many devices and pushes: cores, memory, Redis, bandwidth; and what breaks first."""
    knowledge = read_knowledge()
    if constants:
        click.echo(f"{show_constants(knowledge)}\n\n{show_check(knowledge)}")
        return
    first = Demand(devices=0, **demand)
    click.echo(show_models([Model(knowledge, replace(first, devices=size)) for size in sizes or SIZES]))


def show_models(models: Sequence[Model]) -> str:
    head = ["registered devices", *(_number(model.demand.devices) for model in models)]
    lines = [[name, *(show(model) for model in models)] for name, show in ROWS]
    unknown = [one.what for one in models[0].knowledge.constant.values() if not one.date]
    notes = [f"\nNot measured yet: {'; '.join(unknown)}."] if unknown else []
    return "\n".join([_table(head, lines), *notes])


def show_constants(knowledge: Knowledge) -> str:
    lines = [
        [
            one.what,
            f"{one.value:,.4g} {one.unit}",
            one.date or "not measured yet",
            f"`{one.command}`" if one.command else "",
        ]
        for one in knowledge.constant.values()
    ]
    return _table(["what", "value", "date", "command"], lines)


def show_check(knowledge: Knowledge) -> str:
    lines = [
        [point.name, name.replace("_", " "), f"{measured:,.4g}", f"{said:,.4g}", f"{said / measured:.2f}"]
        for point, name, measured, said in check(knowledge)
    ]
    return _table(["point", "what", "measured", "model", "model / measured"], lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


# The document

BLOCK: Final = re.compile(r"(<!-- holdfast (capacity[^>]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def fill(document: str, run: Callable[[list[str]], str]) -> str:
    """The document, each block from `<!-- holdfast capacity … -->` to `<!-- end -->` as the command prints it now;
    `run` gets its arguments."""

    def shown(found: re.Match[str]) -> str:
        return f"{found[1]}\n{run(found[2].split()[1:]).strip()}\n\n{found[4]}"

    return BLOCK.sub(shown, document)


def run_capacity(arguments: list[str]) -> str:
    """What `holdfast capacity` prints."""
    from click.testing import CliRunner

    answer = CliRunner().invoke(capacity, arguments, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    return answer.output


if __name__ == "__main__":
    page = Path("docs/capacity.md")
    page.write_text(fill(page.read_text(), run_capacity))
