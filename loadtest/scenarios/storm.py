"""A reconnect storm over TLS (P-256 certificate, TLS 1.3): devices that have no session ticket, then such that have.

In turns of one run it hits Holdfast and a server that does OpenSSL's handshakes only (loadtest/bare_tls.py). The
number that counts is CPU seconds of the server for each device: both find their work in volleys
(loadtest/tls_fleet.py), and the pace is what one core would make of it. Wanted: with all that Holdfast does for a
connect, from accept to CONNACK, 85 % of the pace that the handshakes alone allow.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from loadtest.report import Row
from loadtest.stage import Meter, Stage
from loadtest.tls_fleet import TlsFleet
from loadtest.transports import make_certificate

MICROSECONDS: Final = 1e6
FIRST, RESUMED = "first handshakes", "resumed handshakes"
KINDS: Final = (FIRST, RESUMED)


class _Side:
    """One of the two servers, the fleet in front of it, and what was measured."""

    def __init__(self, name: str, pid: int, fleet: TlsFleet) -> None:
        self.name = name
        self.pid = pid
        self.fleet = fleet
        self.costs: dict[str, list[float]] = {kind: [] for kind in KINDS}  # µs of server CPU
        self._waves = 0

    def run(self, stage: Stage, kind: str) -> None:
        devices = stage.plan.tls_devices
        meter = Meter(self.pid)
        before = self.fleet.resumed
        with meter.running():
            self.fleet.connect(range(devices), resume=kind == RESUMED, wave=self._waves)
        resumed = self.fleet.resumed - before
        if resumed != (devices if kind == RESUMED else 0):
            raise RuntimeError(f"{resumed:,} of {devices:,} handshakes were resumed")
        self._waves += 1
        self.fleet.close()
        self.costs[kind].append(meter.server_cpu / devices * MICROSECONDS)
        stage.say(f"storm, {self.name}, {kind}: {self.costs[kind][-1]:.0f} µs of server CPU")


def storm(stage: Stage) -> list[Row]:
    population = stage.population(stage.plan.devices)
    packets = population.connect_packets(stage.plan.tls_devices)
    with tempfile.TemporaryDirectory() as directory:
        settings, context = make_certificate(Path(directory))
        with stage.server(population, settings) as server, _bare_server(stage, settings) as (pid, port):
            fleet = TlsFleet(server.address("mqtts"), server.pid, context, packets)
            ours = _Side("connect", server.pid, fleet)
            bare = _Side("bare handshake", pid, TlsFleet(("127.0.0.1", port), pid, context))
            for _ in range(stage.plan.runs):
                for kind in KINDS:
                    for side in (ours, bare):
                        side.run(stage, kind)
    return [row for kind in KINDS for row in _rows(kind, stage.plan.tls_devices, ours, bare)]


def _rows(kind: str, devices: int, ours: _Side, bare: _Side) -> list[Row]:
    shares = [there / here for here, there in zip(ours.costs[kind], bare.costs[kind], strict=True)]
    name = f"storm: {devices:,} devices, {kind}"
    return [
        Row(f"{name}: server CPU for each CONNECT", "µs", ours.costs[kind]),
        Row(f"{name}: server CPU of a bare handshake", "µs", bare.costs[kind]),
        Row(
            f"{name}: pace, of what bare handshakes allow",
            "",
            shares,
            at_least=0.85 if kind == FIRST else None,
        ),
    ]


@contextmanager
def _bare_server(stage: Stage, settings: dict[str, str]) -> Iterator[tuple[int, int]]:
    """Its pid and port."""
    files = settings["HOLDFAST_MQTT_CERTIFICATE"], settings["HOLDFAST_MQTT_PRIVATE_KEY"]
    command = [sys.executable, "-m", "loadtest.bare_tls", *files]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as bare:
        if stage.server_core is not None:
            os.sched_setaffinity(bare.pid, {stage.server_core})
        assert bare.stdout is not None
        yield bare.pid, int(bare.stdout.readline())
