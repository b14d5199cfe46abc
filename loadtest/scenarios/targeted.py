"""1,000 single pushes a second over HTTP, each durable, to random devices online: due time to arrival."""

from __future__ import annotations

import time
from collections.abc import Sequence

from loadtest.publishing import quantile
from loadtest.report import Load, Row
from loadtest.stage import Cast, Meter, Stage, cast

RATE = 1000.0
MS = 1000.0


def targeted(stage: Stage) -> list[Row]:
    plan = stage.plan
    population = stage.population(plan.devices)
    devices = range(plan.online_for_targeted)
    medians: list[float] = []
    worst: list[float] = []
    loads: list[Load] = []
    with stage.server(population) as server, cast(server, population, len(devices)) as cast_:
        cast_.fleet.connect(devices)
        push_for(cast_, 1.0)  # warm
        for run in range(plan.runs):
            meter = Meter(server.pid)
            with stage.profiled(server, f"targeted-{run}"), meter.running():
                latencies = push_for(cast_, plan.seconds)
            medians.append(quantile(latencies, 0.5) * MS)
            worst.append(quantile(latencies, 0.99) * MS)
            loads.append(meter.load)
            stage.say(f"targeted: p50 {medians[-1]:.2f}, p99 {worst[-1]:.2f} ms")
        errors = cast_.ledger.errors()
    name = f"targeted: {RATE:,.0f} pushes a second, {len(devices):,} devices online"
    return [
        Row(f"{name}: p50", "ms", medians, at_most=3.0, loads=loads, note=errors or "none lost"),
        Row(f"{name}: p99", "ms", worst, at_most=10.0, loads=loads),
    ]


def push_for(cast_: Cast, seconds: float, devices: Sequence[int] = ()) -> list[float]:
    """Latencies of the pushes of that time, to these devices or to all, all of which have arrived."""
    cast_.ledger.latencies.clear()
    publisher = cast_.open_loop(devices or range(cast_.fleet.online), RATE)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        cast_.reactor.turn(publisher.send_due())
    cast_.reactor.run_until(lambda: not cast_.ledger.missing, "all targeted pushes arrived")
    return list(cast_.ledger.latencies)
