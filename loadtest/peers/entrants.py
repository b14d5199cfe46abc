"""Who takes part: Holdfast as it is installed, and the servers of peers.toml. Each can be opened, one at a time."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Final

import msgspec

from gateway.mqtt import Connect, encode
from loadtest.fleet import KEEP_ALIVE
from loadtest.population import Population
from loadtest.server import Address, Server, ServerError
from loadtest.stage import Stage
from loadtest.topic_publisher import VERSION, publisher_connect

START_LIMIT: Final = 60.0
STOP_LIMIT: Final = 10.0
HOLDFAST: Final = "holdfast"
SYSTEM: Final = "/usr/sbin"  # where Debian puts servers, and not all have in PATH
NODE_MODULES: Final = Path(".venv/node/node_modules")


@dataclass(frozen=True, slots=True)
class Arena:
    """A server that runs, and who comes to it. `server` and `population` are of Holdfast alone."""

    address: Address
    pid: int
    connects: Sequence[bytes]  # CONNECT of each device, 3.1.1, with a clean session
    publisher: bytes  # CONNECT
    server: Server | None = None
    population: Population | None = None


class Entrant(ABC):
    name: str
    title: str
    lacks: str  # of what Holdfast does

    @abstractmethod
    def missing(self) -> str:
        """What there must be, "" if all is there."""

    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    def open(self, stage: Stage) -> AbstractContextManager[Arena]:
        """Start it with nothing of before, on the server's core; end it. Raises ServerError."""


class Holdfast(Entrant):
    """One process, the embedded store, an open app whose devices have signed tokens."""

    name = HOLDFAST
    title = HOLDFAST
    lacks = ""

    def missing(self) -> str:
        return ""

    def version(self) -> str:
        return version(HOLDFAST)

    @contextmanager
    def open(self, stage: Stage) -> Iterator[Arena]:
        devices = stage.plan.subscribers
        population = stage.population(devices, is_open=True)
        connects = population.connect_packets(devices, clean_start=True)
        with stage.server(population) as server:
            yield Arena(
                server.address("mqtt"),
                server.pid,
                connects,
                publisher_connect(population),
                server,
                population,
            )


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of peers.toml, which says what each field means."""

    title: str
    install: str
    needs: tuple[str, ...]
    version: tuple[str, ...]
    command: tuple[str, ...]
    lacks: str
    username: str = ""
    environment: Mapping[str, str] = {}
    files: Mapping[str, str] = {}


class Peer(Entrant):
    def __init__(self, name: str, recipe: Recipe) -> None:
        self.name = name
        self.title = recipe.title
        self.lacks = recipe.lacks
        self._recipe = recipe
        modules = Path(os.environ.get("NODE_MODULES", NODE_MODULES)).resolve()
        self._values = {"python": sys.executable, "modules": str(modules)}

    def missing(self) -> str:
        needed = [Template(text).substitute(self._values) for text in self._recipe.needs]
        lacking = [text for text in needed if not (Path(text).exists() if "/" in text else _find(text))]
        return f"{', '.join(lacking)} is missing ({self._recipe.install})" if lacking else ""

    def version(self) -> str:
        command = _found([Template(text).substitute(self._values) for text in self._recipe.version])
        done = subprocess.run(command, capture_output=True, check=False, text=True)
        found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
        return found[0] if found else "unknown"

    @contextmanager
    def open(self, stage: Stage) -> Iterator[Arena]:
        home = stage.directory.resolve() / self.name
        home.mkdir(parents=True)
        try:
            with ExitStack() as stack:
                port, second = _free_ports(2)
                values = {**self._values, "home": str(home), "port": str(port), "second": str(second)}
                process = stack.enter_context(_Process(self._recipe, values, home, stage.server_core))
                address = "127.0.0.1", port
                process.wait_for(address)
                connects = [self._connect(f"device-{i:06d}") for i in range(stage.plan.subscribers)]
                yield Arena(address, process.pid, connects, self._connect("publisher"))
        finally:
            shutil.rmtree(home, ignore_errors=True)

    def _connect(self, client_id: str) -> bytes:
        username = self._recipe.username or None
        packet = Connect(
            client_id,
            clean_start=True,
            keep_alive=KEEP_ALIVE,
            username=username,
            password=b"any" if username else None,
            version=VERSION,
        )
        return encode(packet, VERSION)


@dataclass(slots=True)
class _Process:
    """A peer, and what it starts: they are one process group, and end together."""

    recipe: Recipe
    values: Mapping[str, str]
    home: Path
    core: int | None
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __enter__(self) -> _Process:
        for name, text in self.recipe.files.items():
            (self.home / name).write_text(self._filled(text).lstrip())
        command = _found([self._filled(text) for text in self.recipe.command])
        environment = {name: self._filled(text) for name, text in self.recipe.environment.items()}
        with _on_core(self.core), self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # it ends with us
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                cwd=self.home,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.close()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_LIMIT)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def wait_for(self, address: Address) -> None:
        """Until it listens. Raises ServerError."""
        assert self._process is not None
        deadline = time.perf_counter() + START_LIMIT
        while not _listens(address):
            if self._process.poll() is not None or time.perf_counter() > deadline:
                words = self._log.read_text(errors="replace")[-2000:]
                raise ServerError(f"{self.recipe.title} did not start:\n{words}")
            time.sleep(0.05)

    @property
    def _log(self) -> Path:
        return self.home / "output.log"

    def _filled(self, text: str) -> str:
        return Template(text).substitute(self.values)


def read_entrants() -> dict[str, Entrant]:
    """All that there could be, in the order of the tables."""
    text = files("loadtest.peers").joinpath("peers.toml").read_bytes()
    recipes = msgspec.toml.decode(text, type=dict[str, Recipe])
    peers = {name: Peer(name, recipe) for name, recipe in recipes.items()}
    limits = {name: peer for name, peer in peers.items() if name.startswith("bare")}
    return {**limits, HOLDFAST: Holdfast(), **peers}


def _find(program: str) -> str | None:
    beside = str(Path(sys.executable).parent)
    return shutil.which(program, path=os.pathsep.join((beside, os.environ.get("PATH", ""), SYSTEM)))


def _found(command: Sequence[str]) -> list[str]:
    return [_find(command[0]) or command[0], *command[1:]]


@contextmanager
def _on_core(core: int | None) -> Iterator[None]:
    """What is started meanwhile runs there, with all threads it will have."""
    mine = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(one.getsockname()[1]) for one in opened]


def _listens(address: Address) -> bool:
    with suppress(OSError), socket.create_connection(address, timeout=1):
        return True
    return False
