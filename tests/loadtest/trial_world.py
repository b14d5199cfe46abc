"""Trials against real servers, small enough for a test, and what watches them."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clients.local_server import LocalServer
from loadtest.roster import Listed, Strangers
from loadtest.trial.conductor import View
from loadtest.trial.plan import Plan
from loadtest.trial.results import Result
from loadtest.trial.run import run_trial
from loadtest.trial.scenarios import SCENARIOS
from loadtest.trial.target import Login, Target, read_http
from tests.gateway.peer import eventually
from tests.patience import PATIENCE
from tests.ports import free_port

DEVICES = 30


class Watcher:
    """A display for nobody: `act` gets each view, and may do something about it."""

    def __init__(self, act: Callable[[View], None] | None = None) -> None:
        self.views: list[View] = []
        self._act = act

    def show(self, view: View) -> None:
        self.views.append(view)
        if self._act is not None:
            self._act(view)


def small_plan(scenario: str, **changes: Any) -> Plan:
    sizes = {
        "rate": SCENARIOS[scenario].rate,
        "seconds": 0.6,
        "connect_rate": 300.0,
        "patience": 30.0,
        "processes": 2,
    }
    return Plan(scenario, **{"devices": DEVICES, **sizes, **changes})


def target_of(server: LocalServer, **changes: Any) -> Target:
    http, _ = read_http(server.addresses.http)
    app = server.create_app("loadtest")
    login = Login(app.app_key, app.master_secret)
    return Target("holdfast", server.addresses.mqtt, http, login, **{"pid": server.pid, **changes})


def play(
    plan: Plan,
    target: Target | None,
    act: Callable[[View], None] | None = None,
    *,
    who: Listed | Strangers | None = None,
    tidy: bool = False,
) -> Result:
    return run_trial(plan, target, Watcher(act), who=who, tidy=tidy)


def check_complete(result: Result, devices: int = DEVICES) -> None:
    """All devices came and stayed, nothing was lost, doubled or refused."""
    assert result.ended == "complete"
    assert [note for note in result.notes if "HTTP connections" not in note] == []  # slow machines have those
    connects, pushes, deliveries = result.connects, result.pushes, result.deliveries
    assert (connects.online, connects.dropped, connects.failed, connects.refused) == (devices, {}, {}, {})
    assert pushes.accepted == pushes.sent
    assert (pushes.refused, pushes.unanswered) == ({}, 0)
    assert (deliveries.lost, deliveries.under_way, deliveries.strayed) == (0, 0, 0)
    assert deliveries.latency.count == deliveries.arrived
    assert sum(window.due for window in result.windows) == pushes.sent


@contextmanager
def running_mosquitto(folder: Path, *lines: str) -> Iterator[Target]:
    """Which lets everybody in, unless `lines` say otherwise."""
    program = shutil.which("mosquitto")
    assert program is not None
    address = ("127.0.0.1", free_port())
    settings = [f"listener {address[1]} {address[0]}", "user root", *(lines or ["allow_anonymous true"])]
    (folder / "mosquitto.conf").write_text("\n".join(settings) + "\n")
    with (folder / "mosquitto.log").open("wb") as log:
        process = subprocess.Popen([program, "-c", str(folder / "mosquitto.conf")], stderr=log)
    try:
        eventually(lambda: _listens(address), PATIENCE)
        yield Target("mqtt", address, pid=process.pid)
    finally:
        process.kill()
        process.wait()


def _listens(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0
