"""What it costs that many devices are there: idle, and while one of them is pushed to; and how long the collector of
garbage stops everything while they come, stay and go."""

from __future__ import annotations

import random
import time
from typing import Final

from loadtest.publishing import quantile
from loadtest.report import Load, Row
from loadtest.scenarios.targeted import MS, RATE, push_for
from loadtest.stage import Cast, Meter, Stage, cast

FEW: Final = 1_000
KEEP_ALIVE: Final = 300
PINGREQ: Final = b"\xc0\x00"
PER: Final = 10_000  # devices of which idle CPU is told


def steady(stage: Stage) -> list[Row]:
    population = stage.population(stage.plan.devices)
    with (
        stage.server(population) as server,
        cast(server, population, stage.plan.devices, keep_alive=KEEP_ALIVE) as cast_,
    ):
        empty = _share_of_nobody(stage, cast_)
        rows = _latencies(stage, cast_)
        cast_.fleet.connect(range(FEW, stage.plan.devices), wave=stage.plan.runs)
        rows += [_idle(stage, cast_, empty), collector_row("steady", cast_)]
    return rows


def _latencies(stage: Stage, cast_: Cast) -> list[Row]:
    """With few and with many connected, in turns; the same devices are pushed to."""
    plan = stage.plan
    measured: dict[int, list[list[float]]] = {FEW: [], plan.devices: []}
    loads: dict[int, list[Load]] = {FEW: [], plan.devices: []}
    cast_.fleet.connect(range(FEW))
    push_for(cast_, 1.0)  # warm
    for run in range(plan.runs):
        for online in (FEW, plan.devices):
            cast_.fleet.connect(range(cast_.fleet.online, online), wave=run)
            meter = Meter(cast_.server.pid)
            with stage.profiled(cast_.server, f"steady-{online}-{run}"), meter.running():
                measured[online].append(push_for(cast_, plan.seconds, range(FEW)))
            loads[online].append(meter.load)
        cast_.fleet.disconnect(range(FEW, plan.devices))
        stage.say(f"steady: latencies, turn {run + 1} of {plan.runs}")
        cast_.wait_for_online(FEW)
    return [row for share in (0.5, 0.99) for row in _latency_rows(plan.devices, measured, loads, share)]


def _latency_rows(
    devices: int, measured: dict[int, list[list[float]]], loads: dict[int, list[Load]], share: float
) -> list[Row]:
    values = {
        online: [quantile(latencies, share) * MS for latencies in runs] for online, runs in measured.items()
    }
    name = f"steady: {RATE:,.0f} pushes a second, p{100 * share:g}"
    rows = [
        Row(f"{name}, {online:,} devices online", "ms", values[online], loads=loads[online])
        for online in values
    ]
    ratios = [many / few for few, many in zip(values[FEW], values[devices], strict=True)]
    return [*rows, Row(f"{name}, {devices:,} devices to {FEW:,}, turn by turn", "", ratios, at_most=1.2)]


def _share_of_nobody(stage: Stage, cast_: Cast) -> float:
    """Per cent of a core that the server takes with no device connected."""
    meter = Meter(cast_.server.pid)
    with meter.running():
        cast_.reactor.run_for(stage.plan.idle / 6)
    return 100 * meter.server_cpu / meter.seconds


def _idle(stage: Stage, cast_: Cast, empty: float) -> Row:
    """Every device pings when its keep-alive is nearly over, one after the other."""
    devices, seconds = cast_.fleet.online, stage.plan.idle
    order = random.Random(1).sample(range(devices), devices)
    interval = KEEP_ALIVE / devices
    cast_.reactor.run_for(1.0)
    meter = Meter(cast_.server.pid)
    with stage.profiled(cast_.server, "steady-idle"), meter.running():
        started = time.perf_counter()
        for number, device in enumerate(order[: int(seconds / interval)]):
            cast_.reactor.run_for(started + number * interval - time.perf_counter())
            cast_.fleet.send(device, PINGREQ)
    share = 100 * meter.server_cpu / meter.seconds * PER / devices
    stage.say(f"steady: idle {share:.2f} % of a core for {PER:,} devices")
    return Row(
        f"steady: idle CPU per {PER:,} devices, keep-alive {KEEP_ALIVE} s, {devices:,} connected",
        "% of a core",
        [share],
        at_most=0.5,
        loads=[meter.load],
        note=f"over {meter.seconds:.0f} s; {empty:.2f} % of a core with nobody connected",
    )


def collector_row(scenario: str, cast_: Cast) -> Row:
    """Since the server's start."""
    pauses = cast_.server.histogram("gc_pause_seconds")
    longest = pauses.quantile(1.0) * MS
    return Row(
        f"{scenario}: longest stop for garbage collection, up to {cast_.fleet.online:,} devices online, at most",
        "ms",
        [longest],
        at_most=5.0,
        note=f"{pauses.total():,} of them",
    )
