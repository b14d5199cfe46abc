"""Processes of different roles around one Redis."""

from __future__ import annotations

import asyncio
import itertools
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from clients.device import Device, LinkSettings, Push
from clients.local_server import ANY_PORT
from clients.publisher import Audience, Notification, Publisher, PushRequest
from tests.fleet_rig import Redis
from tests.gateway.peer import eventually

pytestmark = pytest.mark.xdist_group("roles")  # they share servers

PATIENCE = 180.0  # seconds for what takes a few, on a machine that does much else
QUICK = LinkSettings(backoff_base=0.05, backoff_cap=0.2, answer_timeout=PATIENCE)
SERVE = (sys.executable, "-m", "clients.command", "serve", *ANY_PORT)

Start = Callable[..., "Process"]


class Process:
    """One `holdfast serve`, and the line that it printed."""

    def __init__(self, directory: Path, *flags: str) -> None:
        self.log = directory / "log"
        directory.mkdir()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*SERVE, "--data-dir", str(directory / "data"), *flags], stdout=subprocess.PIPE, stderr=log
            )
        try:
            self.told: dict[str, Any] = orjson.loads(self._line())
        except BaseException:
            self.end()
            raise

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(PATIENCE), self.log.read_text()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        return line

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        status = self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = Redis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield f"redis://127.0.0.1:{server.port}"
    server.kill()


@pytest.fixture(scope="module")
def start(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    processes: list[Process] = []

    def make(role: str, node: str, *flags: str) -> Process:
        directory = tmp_path_factory.mktemp(node) / "process"
        flags = ("--store", url, "--role", role, "--node-id", node, *flags)
        processes.append(Process(directory, *flags))
        return processes[-1]

    yield make
    for process in processes:
        if process.process.poll() is None:
            process.end()
    for process in processes:
        assert "Traceback" not in process.log.read_text()


@pytest.fixture(scope="module")
def gateway(start: Start) -> Process:
    return start("gateway", "gate")


@pytest.fixture(scope="module")
def broker(start: Start) -> Process:
    return start("broker", "brk")


def _command(url: str, *words: str) -> Any:
    command = [sys.executable, "-m", "clients.command", *words, "--store", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return orjson.loads(done.stdout)


def test_each_listens_where_its_role_says(gateway: Process, broker: Process) -> None:
    listeners = ("mqtt", "ws", "http", "admin")
    assert {name for name in listeners if gateway.told[name]} == {"mqtt", "ws", "admin"}
    assert {name for name in listeners if broker.told[name]} == {"http", "admin"}
    assert (gateway.told["role"], broker.told["role"]) == ("gateway", "broker")
    assert gateway.told["demo_app"] is broker.told["demo_app"] is None


def test_both_are_nodes_of_one_fleet(gateway: Process, broker: Process, url: str) -> None:
    nodes = {node["name"]: node for node in _command(url, "node", "list", "--json")}
    assert (nodes["gate"]["role"], nodes["brk"]["role"]) == ("gateway", "broker")
    assert nodes["gate"]["address"] == gateway.told["mqtt"]
    assert nodes["brk"]["address"] == ""
    assert nodes["gate"]["pid"] == gateway.process.pid


async def test_what_a_broker_takes_a_gateway_delivers(gateway: Process, broker: Process, url: str) -> None:
    app = await asyncio.to_thread(_command, url, "app", "create", "Shop", "--open")
    came: asyncio.Queue[Push] = asyncio.Queue()
    host, _, port = gateway.told["mqtt"].rpartition(":")
    device = Device(
        app["app_key"],
        "phone-1",
        device_key=app["device_key"],
        host=host,
        port=int(port),
        on_push=came.put_nowait,
        settings=QUICK,
    )
    publisher = Publisher(app["app_key"], app["master_secret"], f"http://{broker.told['http']}")
    find = (url, "device", "find", "phone-1", "--app", app["app_key"])
    async with publisher, asyncio.timeout(PATIENCE):
        async with device:
            await device.connected()  # before that there may be no such device
            while not (found := await asyncio.to_thread(_command, *find))["online"]:
                pass
            assert (found["node"], found["waiting"]) == ("gate", 0)
            sent = await publisher.push(
                PushRequest(Audience(registration_id=["phone-1"]), Notification("Hello"))
            )
            assert (await came.get()).msg_id == sent.msg_id
        later = await publisher.push(PushRequest("all", Notification("Later")))
        while (found := await asyncio.to_thread(_command, *find))["online"]:
            pass
        assert (found["node"], found["waiting"]) == (None, 1)
        async with Device(
            app["app_key"],
            "phone-1",
            device_key=app["device_key"],
            host=host,
            port=int(port),
            on_push=came.put_nowait,
            settings=QUICK,
        ):
            assert (await came.get()).msg_id == later.msg_id


def test_a_stop_leaves_the_fleet_at_once(start: Start, url: str) -> None:
    process = start("gateway", "brief")
    assert "brief" in {node["name"] for node in _command(url, "node", "list", "--json")}
    assert process.end(signal.SIGTERM) == 0
    assert "brief" not in {node["name"] for node in _command(url, "node", "list", "--json")}


def test_who_was_killed_comes_back_under_his_name_when_the_lease_has_run_out(start: Start, url: str) -> None:
    names = (f"fallen-{number}" for number in itertools.count(1))

    def comes_back() -> str | None:
        """Who, if this machine starts him before the lease has run out anyway."""
        name = next(names)
        start("broker", name).end(signal.SIGKILL)
        return name if "the name is still taken" in start("broker", name).log.read_text() else None

    name = eventually(comes_back, PATIENCE)
    states = {node["name"]: node["state"] for node in _command(url, "node", "list", "--json")}
    assert states[name] == "live"


def test_a_start_that_fails_leaves_its_name(start: Start, url: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [*SERVE, "--data-dir", str(tmp_path), "--store", url, "--node-id", "clumsy"]
        command += ["--http-port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert (done.returncode, done.stderr.count("Error: ")) == (1, 1)
    assert "the name is still taken" not in start("broker", "clumsy").log.read_text()


def test_a_signal_for_supervisors_ends_no_other_process(gateway: Process) -> None:
    os.kill(gateway.process.pid, signal.SIGUSR2)
    deadline = time.monotonic() + PATIENCE
    while "this is none" not in gateway.log.read_text():
        assert time.monotonic() < deadline
    assert gateway.process.poll() is None


@pytest.mark.parametrize("more", [(), ("--workers", "2")])
def test_a_redis_that_may_lose_what_was_answered_is_refused_once(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    server = Redis(tmp_path / "redis", "--appendonly", "no")
    server.start()
    try:
        store = f"redis://127.0.0.1:{server.port}"
        command = [*SERVE, "--data-dir", str(tmp_path / "data"), "--store", store, *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 1
        assert done.stderr.count("Error: ") == 1
        assert "appendonly is no, it must be yes" in done.stderr
        unsafe = Process(tmp_path / "unsafe", "--store", store, "--store-unsafe", "true", *more)
        assert unsafe.end(signal.SIGTERM) == 0
        assert "store.unsafe allows it" in unsafe.log.read_text()
    finally:
        server.kill()
