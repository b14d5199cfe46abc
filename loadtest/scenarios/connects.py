"""A reconnect storm of devices that are owed nothing: from the first SYN to the last CONNACK.

Closed loop: a bounded number of devices is between SYN and CONNACK, the next begins when one is done.
All devices have signed tokens and sessions of before; nothing about them is in the node's memory on the first run.
"""

from __future__ import annotations

from loadtest.report import Load, Row
from loadtest.stage import Meter, Stage, cast

MICROSECONDS = 1e6


def connects(stage: Stage) -> list[Row]:
    plan = stage.plan
    population = stage.population(plan.devices)
    rates: list[float] = []
    costs: list[float] = []
    own_costs: list[float] = []
    loads: list[Load] = []
    with stage.server(population) as server, cast(server, population, plan.devices) as cast_:
        cast_.fleet.connect(range(min(plan.warm_devices, plan.devices)))
        cast_.fleet.disconnect(range(min(plan.warm_devices, plan.devices)))
        cast_.wait_for_offline()
        for run in range(plan.runs):
            meter = Meter(server.pid)
            with stage.profiled(server, f"connects-{run}"), meter.running():
                seconds = cast_.fleet.connect(range(plan.devices), wave=run + 1)
            rates.append(plan.devices / seconds)
            costs.append(meter.server_cpu / plan.devices * MICROSECONDS)
            own_costs.append(meter.generator_cpu / plan.devices * MICROSECONDS)
            loads.append(meter.load)
            stage.say(f"connects: {rates[-1]:,.0f}/s, {costs[-1]:.0f} µs of server CPU each")
            cast_.fleet.disconnect(range(plan.devices))
            cast_.wait_for_offline()
    return [
        Row(f"connects: {plan.devices:,} devices", "/s", rates, at_least=20_000, loads=loads),
        Row("connects: server CPU for each", "µs", costs),
        Row("connects: generator CPU for each", "µs", own_costs),
    ]
