"""Trials against real servers, small enough for a test, and what watches them."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

from clients.local_server import LocalServer
from loadtest.roster import Listed, Strangers
from loadtest.server import Address
from loadtest.trial.conductor import View
from loadtest.trial.plan import Plan
from loadtest.trial.results import Result
from loadtest.trial.run import run_trial
from loadtest.trial.scenarios import SCENARIOS
from loadtest.trial.target import Login, Target, read_http
from loadtest.wires import Endpoint
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
    settings = {"mqtt": Endpoint(server.addresses.mqtt), "http": http, "pid": server.pid, **changes}
    return Target("holdfast", login=login, **settings)


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


@dataclass(frozen=True, slots=True)
class Certified:
    """Files in PEM: of a server, and of whoever is to trust it."""

    certificate: Path
    key: Path
    cafile: Path

    @property
    def of_holdfast(self) -> tuple[str, ...]:
        """Flags of a server with a TLS listener."""
        return (
            *("--mqtts-port", "0", "--mqtt-certificate", str(self.certificate)),
            *("--mqtt-private-key", str(self.key)),
        )

    @property
    def of_mosquitto(self) -> tuple[str, ...]:
        return (f"certfile {self.certificate}", f"keyfile {self.key}", "allow_anonymous true")

    def context(self) -> ssl.SSLContext:
        """Of a server."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context


def certify(folder: Path, *names: str) -> Certified:
    """By an authority of its own."""
    authority = trustme.CA()
    issued = authority.issue_cert(*names)
    certified = Certified(folder / "certificate.pem", folder / "key.pem", folder / "authority.pem")
    certified.certificate.write_bytes(b"".join(one.bytes() for one in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(certified.key)
    authority.cert_pem.write_to_path(certified.cafile)
    return certified


@contextmanager
def tls_before(address: Address, context: ssl.SSLContext) -> Iterator[Address]:
    """A proxy that ends TLS, in a thread of its own."""

    loop = asyncio.new_event_loop()
    ready: Future[Address] = Future()
    stop = asyncio.Event()
    relays: set[asyncio.Task[None]] = set()
    writers: set[asyncio.StreamWriter] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        with suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_connection(*address)
        await asyncio.gather(pump(reader, back_writer), pump(back_reader, writer))

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relays.add(loop.create_task(relay(reader, writer)))

    async def serve() -> None:
        async with await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context) as front:
            ready.set_result(front.sockets[0].getsockname())
            await stop.wait()
            for writer in writers:
                writer.transport.abort()
            await asyncio.gather(*relays)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield ready.result()
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


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
        yield Target("mqtt", Endpoint(address), pid=process.pid)
    finally:
        process.kill()
        process.wait()


def _listens(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0
