"""How many pushes become durable in a second: to offline devices, so that nothing else is measured.

Batches of 1,000 pushes, several in flight; and single requests over kept connections. Requests are built before
the clock starts. An answer means durable (G1).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

from loadtest.http_pool import HttpPool
from loadtest.ledger import alert
from loadtest.population import Population
from loadtest.publishing import BATCH, batch_body, check_accepted, check_batch, keep_in_flight, push_body
from loadtest.reactor import Reactor
from loadtest.report import Load, Row
from loadtest.stage import HTTP_CONNECTIONS, Meter, Stage

BATCHES_IN_FLIGHT = 4
BATCH_RATE = 60_000  # pushes a second for which batches are built ahead
SINGLE_REQUESTS = 20_000  # built ahead, then used again: a single push needs no cid
MSG_ID_DIGITS = 10


def accepts(stage: Stage) -> list[Row]:
    population = stage.population(stage.plan.registered)
    with stage.server(population) as server:
        reactor = Reactor()
        pool = population.pool(reactor, server, HTTP_CONNECTIONS)
        batch_maker, single_maker = _batches(population, stage.plan.seconds), _singles(population)

        def measure(name: str, make: Callable[[HttpPool], Iterator[bytes]], size: int) -> list[Row]:
            rates: list[float] = []
            loads: list[Load] = []
            check, at_once = (
                (check_batch, BATCHES_IN_FLIGHT) if size > 1 else (check_accepted, HTTP_CONNECTIONS)
            )
            for run in range(stage.plan.runs):
                requests = make(pool)
                meter = Meter(server)
                with stage.profiled(server, f"accepts-{size}-{run}"), meter.running():
                    count, seconds = keep_in_flight(pool, requests, check, at_once, stage.plan.seconds)
                rates.append(count * size / seconds)
                loads.append(meter.load)
                stage.say(f"{name}: {rates[-1]:,.0f} pushes/s")
            goal = 30_000 if size > 1 else 8_000
            return [Row(name, "/s", rates, at_least=goal, loads=loads)]

        rows = measure(f"accepts: single requests, {HTTP_CONNECTIONS} connections", single_maker, 1)
        rows += measure(f"accepts: batches of {BATCH:,}, {BATCHES_IN_FLIGHT} in flight", batch_maker, BATCH)
        pool.close()
        reactor.close()
    return rows


def _batches(population: Population, seconds: float) -> Callable[[HttpPool], Iterator[bytes]]:
    cids = itertools.count()
    chooser = random.Random(1)

    def build(pool: HttpPool) -> bytes:
        names = chooser.sample(population.names, BATCH)
        items = [(f"{next(cids):09d}", name, alert(i, MSG_ID_DIGITS)) for i, name in enumerate(names)]
        return pool.build("POST", "/v3/push/batch/regid/single", batch_body(items))

    return lambda pool: iter([build(pool) for _ in range(int(BATCH_RATE * seconds / BATCH))])


def _singles(population: Population) -> Callable[[HttpPool], Iterator[bytes]]:
    chooser = random.Random(2)

    def build(pool: HttpPool) -> bytes:
        body = push_body(chooser.choice(population.names), alert(0, MSG_ID_DIGITS))
        return pool.build("POST", "/v3/push", body)

    return lambda pool: itertools.cycle([build(pool) for _ in range(SINGLE_REQUESTS)])
