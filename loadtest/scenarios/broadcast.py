"""Broadcasts to everyone online, each delivery acknowledged and recorded.

A run posts `broadcasts` of them, one or four at once: the next are posted when the last device has acknowledged
the last of those before. The clock stops when the server's report says "delivered" for all of all of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import orjson

from loadtest.ledger import alert
from loadtest.publishing import broadcast_body, check_accepted, quantile
from loadtest.report import Load, Row
from loadtest.rounds import Rounds
from loadtest.stage import Cast, Meter, Plan, Stage, cast

PROBES = 200  # devices, of those that get the broadcasts, on which arrival times are taken
PROBE_RATE = 200.0
REPORT_PAGE = 100
WANTED = {1: 105_000, 4: 280_000}  # deliveries a second, by broadcasts at once
MS = 1000.0


def broadcast(stage: Stage) -> list[Row]:
    population = stage.population(stage.plan.devices)
    probes = frozenset(random.Random(1).sample(range(stage.plan.devices), PROBES))
    with (
        stage.server(population) as server,
        cast(server, population, stage.plan.devices, urgent=probes) as cast_,
    ):
        cast_.fleet.connect(range(stage.plan.devices))
        Volley(cast_, stage.plan.devices, 1).run(2)  # warm
        rows = [*_throughput(stage, cast_, 1), *_throughput(stage, cast_, 4)]
        for at_once in (1, 4):
            rows += _targeted_meanwhile(stage, cast_, sorted(probes), at_once)
    return rows


class Volley(Rounds):
    """Posts broadcasts over HTTP, and follows them to the report."""

    def __init__(self, cast_: Cast, devices: int, at_once: int) -> None:
        super().__init__(cast_.reactor, cast_.ledger, devices, at_once)
        self._cast = cast_
        self.msg_ids: list[str] = []

    def begin(self) -> None:
        super().begin()
        self.msg_ids = []

    def finish(self) -> None:
        """Until all that was posted, these and targeted pushes, has arrived and these are in the report."""
        self._reactor.run_until(lambda: not self._ledger.missing, "all pushes arrived")
        self._reactor.run_until(lambda: len(self.msg_ids) == self.posted, "all broadcasts answered")
        wait_for_report(self._cast, self.msg_ids, self._devices)

    def _post(self, serial: int) -> None:
        text = alert(serial, self._cast.msg_id_digits)
        pool = self._cast.pool
        pool.send(pool.build("POST", "/v3/push", broadcast_body(text)), self._answered)

    def _answered(self, status: int, body: bytes) -> None:
        check_accepted(status, body)
        self.msg_ids.append(orjson.loads(body)["msg_id"])
        self._cast.msg_id_digits = len(self.msg_ids[-1])


def wait_for_report(cast_: Cast, msg_ids: Sequence[str], delivered: int) -> None:
    """Until the server's own report has `delivered` for each."""
    deadline = time.perf_counter() + 60
    left = list(msg_ids)
    while left:
        page = ",".join(left[:REPORT_PAGE])
        rows: list[dict[str, Any]] = cast_.pool.call("GET", f"/v3/received/detail?msg_ids={page}")
        done = {row["msg_id"] for row in rows if row["delivered"] == delivered}
        left = [msg_id for msg_id in left if msg_id not in done]
        if time.perf_counter() > deadline:
            raise TimeoutError(f"the report has not counted {delivered:,} deliveries: {rows[:3]}")
        if left:
            cast_.reactor.run_for(0.01)


def _throughput(stage: Stage, cast_: Cast, at_once: int) -> list[Row]:
    plan = stage.plan
    rates: list[float] = []
    ceilings: list[float] = []
    costs: list[float] = []
    loads: list[Load] = []
    volley = Volley(cast_, plan.devices, at_once)
    for run in range(plan.runs):
        meter = Meter(cast_.server.pid)
        with stage.profiled(cast_.server, f"broadcast-{at_once}-{run}"), meter.running():
            seconds = volley.run(plan.broadcasts)
        deliveries = volley.posted * plan.devices
        rates.append(deliveries / seconds)
        costs.append(meter.server_cpu / deliveries * 1e6)
        ceilings.append(deliveries / meter.generator_cpu)
        loads.append(meter.load)
        stage.say(f"broadcast, {at_once} at once: {rates[-1]:,.0f} deliveries/s")
    name = f"broadcast: {plan.devices:,} devices, {at_once} at once"
    errors = cast_.ledger.errors()
    return [
        Row(
            name,
            "/s",
            rates,
            at_least=WANTED.get(at_once),
            loads=loads,
            note=errors or "none lost",
        ),
        Row(f"{name}: server CPU for each delivery", "µs", costs),
        Row(f"{name}: deliveries per generator CPU second", "/s", ceilings, note="the generator's ceiling"),
    ]


def _targeted_meanwhile(stage: Stage, cast_: Cast, probes: Sequence[int], at_once: int) -> list[Row]:
    medians, worst, loads = [], [], []
    for _ in range(stage.plan.runs):
        meter = Meter(cast_.server.pid)
        with meter.running():
            latencies = _run_with_probes(stage.plan, cast_, probes, at_once)
        medians.append(quantile(latencies, 0.5) * MS)
        worst.append(quantile(latencies, 0.99) * MS)
        loads.append(meter.load)
        stage.say(f"targeted amid {at_once} broadcasts: p50 {medians[-1]:.1f}, p99 {worst[-1]:.1f} ms")
    name = f"targeted amid broadcasts, {at_once} at once"
    return [
        Row(f"{name}: p50", "ms", medians, loads=loads),
        Row(f"{name}: p99", "ms", worst, at_most=20.0, loads=loads),
    ]


def _run_with_probes(plan: Plan, cast_: Cast, probes: Sequence[int], at_once: int) -> list[float]:
    volley = Volley(cast_, plan.devices, at_once)
    volley.begin()
    cast_.ledger.latencies.clear()
    publisher = cast_.open_loop(probes, PROBE_RATE)
    deadline = time.perf_counter() + plan.seconds
    while time.perf_counter() < deadline:
        volley.step(publisher.send_due())
    volley.finish()
    return list(cast_.ledger.latencies)
