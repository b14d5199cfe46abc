"""RSS of the server per connected device that does nothing.

Each run has a fresh server. The first `warm_devices` connect before the first look, so that what the server
makes only once (its caches, the app, the first arenas) does not count; then the rest connect and stay. The figure
is the slope between the two looks; memory freed in between could not make it smaller, for nobody leaves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from loadtest.population import Population
from loadtest.report import Row
from loadtest.server import Server
from loadtest.stage import Stage, cast
from loadtest.transports import make_certificate, open_tls, open_websocket

KB = 1024

Measure = Callable[[Stage, Server, Population, int], float]


def idle(stage: Stage) -> list[Row]:
    plan = stage.plan
    return [
        Row(
            f"idle: RSS per TCP device, {plan.devices:,} connected",
            "KB",
            _runs(stage, plan.devices, _measure_tcp),
            at_most=1.6,
        ),
        Row(
            f"idle: RSS per WebSocket device, {plan.devices:,} connected",
            "KB",
            _runs(stage, plan.devices, _measure_websocket),
            at_most=3.0,
        ),
        _idle_tls(stage),
    ]


def _runs(stage: Stage, devices: int, measure: Measure) -> list[float]:
    population = stage.population(stage.plan.devices)
    values = []
    for _ in range(stage.plan.runs):
        with stage.server(population) as server:
            values.append(measure(stage, server, population, devices) / KB)
        stage.say(f"idle: {values[-1]:.2f} KB per device")
    return values


def _measure_tcp(stage: Stage, server: Server, population: Population, devices: int) -> float:
    warm = stage.plan.warm_devices
    with cast(server, population, devices) as cast_:
        cast_.fleet.connect(range(warm))
        before = server.steady_rss()
        cast_.fleet.connect(range(warm, devices))
        return (server.steady_rss() - before) / (devices - warm)


def _measure_websocket(stage: Stage, server: Server, population: Population, devices: int) -> float:
    warm = stage.plan.warm_devices
    packets = population.connect_packets(devices)
    address = server.address("ws")
    with ExitStack() as stack:
        for packet in packets[:warm]:
            stack.enter_context(open_websocket(address, packet))
        before = server.steady_rss()
        for packet in packets[warm:]:
            stack.enter_context(open_websocket(address, packet))
        return (server.steady_rss() - before) / (devices - warm)


def _idle_tls(stage: Stage) -> Row:
    plan = stage.plan
    population = stage.population(plan.devices)
    packets = population.connect_packets(plan.tls_devices)
    warm = min(plan.warm_devices, plan.tls_devices // 4)
    values = []
    with tempfile.TemporaryDirectory() as directory:
        settings, context = make_certificate(Path(directory))
        for _ in range(plan.runs):
            with stage.server(population, settings) as server, ExitStack() as stack:
                address = server.address("mqtts")
                for packet in packets[:warm]:
                    stack.enter_context(open_tls(address, context, packet))
                before = server.steady_rss()
                for packet in packets[warm:]:
                    stack.enter_context(open_tls(address, context, packet))
                values.append((server.steady_rss() - before) / (plan.tls_devices - warm) / KB)
            stage.say(f"idle: {values[-1]:.2f} KB per TLS device")
    return Row(f"idle: RSS per TLS device, {plan.tls_devices:,} connected", "KB", values, at_most=25.0)
