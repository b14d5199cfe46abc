"""Pushes that wait: what a waiting copy costs in RAM, and a reconnect storm that takes them all.

One pass per command, whatever `--runs` says: it takes minutes. The storm comes in waves, for one process has
fewer files than there are devices; each wave is one value. RAM: the first half of the targeted pushes is the
warm-up (SQLite's page cache, the first arenas), the growth is counted over the other half and the broadcast.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import orjson

from loadtest.ledger import alert
from loadtest.publishing import BATCH, batch_body, broadcast_body, check_batch, keep_in_flight
from loadtest.report import Load, Row
from loadtest.scenarios.broadcast import wait_for_report
from loadtest.stage import Cast, Meter, Stage, cast

IN_FLIGHT = 4


def offline(stage: Stage) -> list[Row]:
    plan = stage.plan
    population = stage.population(plan.registered)
    with stage.server(population) as server, cast(server, population, plan.registered) as cast_:
        started = server.steady_rss()
        _fill(cast_, plan.targeted_waiting // 2)
        before = server.steady_rss()
        _fill(cast_, plan.targeted_waiting - plan.targeted_waiting // 2)
        msg_id = _broadcast(cast_)
        after = server.steady_rss()
        stage.say(f"offline: RSS {started >> 20} MB, half waiting {before >> 20} MB, all {after >> 20} MB")
        rates, loads = _storm(stage, cast_)
        wait_for_report(cast_, [msg_id], plan.registered)
        lost, errors = cast_.ledger.missing, cast_.ledger.errors()
        stormed = server.rss()
        stage.say(f"offline: {lost:,} lost, RSS after the storm {stormed >> 20} MB")
    copies = plan.registered * (plan.targeted_waiting - plan.targeted_waiting // 2 + 1)
    what = f"offline: {plan.registered:,} devices, {plan.targeted_waiting + 1} pushes waiting for each"
    return [
        Row(f"{what}: RSS for each waiting copy", "bytes", [(after - before) / copies], at_most=4.0),
        Row(f"{what}: deliveries in the storm, {len(rates)} waves", "/s", rates, loads=loads, note=errors),
        Row(f"{what}: lost", "", [lost], at_most=0.0),
    ]


def _fill(cast_: Cast, each: int) -> None:
    """Accept `each` targeted pushes for every device."""
    keep_in_flight(cast_.pool, _batches(cast_, each), check_batch, IN_FLIGHT)


def _batches(cast_: Cast, each: int) -> Iterator[bytes]:
    names = cast_.population.names
    for _ in range(each):
        for first in range(0, len(names), BATCH):
            devices = range(first, min(first + BATCH, len(names)))
            serials = [(device, cast_.ledger.add_targeted(device)) for device in devices]
            items = [
                (f"{serial:09d}", names[device], alert(serial, cast_.msg_id_digits))
                for device, serial in serials
            ]
            yield cast_.pool.build("POST", "/v3/push/batch/regid/single", batch_body(items))


def _broadcast(cast_: Cast) -> str:
    serial = cast_.ledger.add_broadcast(len(cast_.population.names))
    request = cast_.pool.build("POST", "/v3/push", broadcast_body(alert(serial, cast_.msg_id_digits)))
    answers: list[bytes] = []
    keep_in_flight(cast_.pool, iter([request]), lambda _, body: answers.append(body), 1)
    msg_id: str = orjson.loads(answers[0])["msg_id"]
    return msg_id


def _storm(stage: Stage, cast_: Cast) -> tuple[list[float], list[Load]]:
    """Deliveries a second in each wave, from the first SYN to the last PUBACK."""
    rates, loads = [], []
    waves = itertools.count(1)
    for first in range(0, stage.plan.registered, stage.plan.devices):
        wave = next(waves)
        devices = range(first, min(first + stage.plan.devices, stage.plan.registered))
        rates_, load = _wave(stage, cast_, devices, wave)
        rates.append(rates_)
        loads.append(load)
        stage.say(f"offline: wave {wave}, {rates_:,.0f} deliveries/s")
        cast_.fleet.disconnect(devices)
        cast_.wait_for_offline()
    return rates, loads


def _wave(stage: Stage, cast_: Cast, devices: range, wave: int) -> tuple[float, Load]:
    owed = len(devices) * (stage.plan.targeted_waiting + 1)
    before = cast_.ledger.arrived
    meter = Meter(cast_.server.pid)
    with stage.profiled(cast_.server, f"offline-{wave}"), meter.running():
        cast_.fleet.connect(devices, wave=wave)
        arrived = lambda: cast_.ledger.arrived - before >= owed  # noqa: E731
        cast_.reactor.run_until(arrived, f"{owed:,} deliveries")
    return owed / meter.seconds, meter.load
