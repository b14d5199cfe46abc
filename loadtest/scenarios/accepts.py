"""How many pushes become durable in a second: to offline devices, so that nothing else is measured.

Batches of 1,000 pushes, several in flight; and single requests over kept connections. Requests are built before
the clock starts. An answer means durable (G1).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loadtest.http_pool import Done, HttpPool
from loadtest.ledger import alert
from loadtest.population import Population
from loadtest.publishing import BATCH, batch_body, check_accepted, check_batch, keep_in_flight, push_body
from loadtest.reactor import Reactor
from loadtest.report import Load, Row
from loadtest.server import Server
from loadtest.stage import HTTP_CONNECTIONS, Meter, Stage

BATCHES_IN_FLIGHT = 4
BATCH_RATE = 60_000  # pushes a second for which batches are built ahead
SINGLE_REQUESTS = 20_000  # built ahead, then used again: a single push needs no cid
MSG_ID_DIGITS = 18

Maker = Callable[[HttpPool], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class Path:
    """One way to push."""

    name: str
    pushes: int  # in one request
    at_once: int
    check: Done
    at_least: float


SINGLE = Path(
    f"accepts: single requests, {HTTP_CONNECTIONS} connections", 1, HTTP_CONNECTIONS, check_accepted, 12_000
)
BATCHES = Path(
    f"accepts: batches of {BATCH:,}, {BATCHES_IN_FLIGHT} in flight",
    BATCH,
    BATCHES_IN_FLIGHT,
    check_batch,
    60_000,
)


def accepts(stage: Stage) -> list[Row]:
    population = stage.population(stage.plan.registered)
    reactor = Reactor()
    with stage.server(population) as server:
        pool = population.pool(reactor, server, HTTP_CONNECTIONS)
        rows = [
            *_measure(stage, server, pool, SINGLE, _singles(population)),
            *_measure(stage, server, pool, BATCHES, _batches(population, stage.plan.seconds)),
        ]
        pool.close()
    reactor.close()
    return rows


def _measure(stage: Stage, server: Server, pool: HttpPool, path: Path, make: Maker) -> list[Row]:
    rates: list[float] = []
    costs: list[float] = []
    loads: list[Load] = []
    for run in range(stage.plan.runs):
        requests = make(pool)
        meter = Meter(server.pid)
        with stage.profiled(server, f"accepts-{path.pushes}-{run}"), meter.running():
            count, seconds = keep_in_flight(pool, requests, path.check, path.at_once, stage.plan.seconds)
        pushes = count * path.pushes
        rates.append(pushes / seconds)
        costs.append(meter.server_cpu / pushes * 1e6)
        loads.append(meter.load)
        stage.say(f"{path.name}: {rates[-1]:,.0f} pushes/s")
    return [
        Row(path.name, "/s", rates, at_least=path.at_least, loads=loads),
        Row(f"{path.name}: server CPU for each", "µs", costs),
    ]


def _batches(population: Population, seconds: float) -> Maker:
    cids = itertools.count()
    chooser = random.Random(1)

    def build(pool: HttpPool) -> bytes:
        names = chooser.sample(population.names, BATCH)
        items = [(f"{next(cids):09d}", name, alert(i, MSG_ID_DIGITS)) for i, name in enumerate(names)]
        return pool.build("POST", "/v3/push/batch/regid/single", batch_body(items))

    return lambda pool: iter([build(pool) for _ in range(int(BATCH_RATE * seconds / BATCH))])


def _singles(population: Population) -> Maker:
    chooser = random.Random(2)

    def build(pool: HttpPool) -> bytes:
        body = push_body(chooser.choice(population.names), alert(0, MSG_ID_DIGITS))
        return pool.build("POST", "/v3/push", body)

    return lambda pool: itertools.cycle([build(pool) for _ in range(SINGLE_REQUESTS)])
