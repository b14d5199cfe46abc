"""Servers in a namespace of their own, as devices far away see them: Holdfast, one node or two with a Redis, and
mosquitto."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from loadtest.lab.namespaces import entered
from loadtest.redis_server import RedisServer
from loadtest.server import Server, run_holdfast

ADDRESSES: Final = ("172.30.0.1", "172.30.0.2")  # of each site, in its own namespace: address 1 and address 2
PORT: Final = 1883
HTTP_PORT: Final = 8080
START_LIMIT: Final = 20.0
LOGGED: Final = {"HOLDFAST_SERVER_LOG_LEVEL": "info"}


class SiteError(Exception):
    """A server did not start; the message has what it wrote last."""


@dataclass(frozen=True, slots=True)
class Access:
    """What devices and publishers need to be let in; "": nothing."""

    app_key: str = ""
    secret: str = ""
    device_key: str = ""
    url: str = ""


@dataclass(slots=True)
class Site(ABC):
    """`start` in the namespace `space`, then `stop`. An edge is what answers at one address."""

    space: str
    directory: Path
    edges: int = 1
    access: Access = field(default_factory=Access)

    def start(self) -> None:
        self.directory.mkdir(parents=True)
        with entered(self.space):
            self._start()

    def restore_edge(self, number: int) -> None:
        """Start the one that was killed. It may take a while: a node waits for its lease."""
        with entered(self.space):
            self._start_edge(number)

    @abstractmethod
    def _start(self) -> None: ...

    @abstractmethod
    def _start_edge(self, number: int) -> None: ...

    @abstractmethod
    def kill_edge(self, number: int) -> None:
        """At once, without a word. Numbers are those of addresses, from 1."""

    @abstractmethod
    def stop(self) -> None:
        """Whatever is left of it."""


@dataclass(slots=True)
class HoldfastSite(Site):
    """One embedded server under all addresses; with two edges a node at each, around a Redis. `settings` as of its
    environment."""

    settings: Mapping[str, str] = field(default_factory=dict)
    _redis: RedisServer | None = field(default=None, init=False)
    _nodes: dict[int, Server] = field(default_factory=dict, init=False)

    def _start(self) -> None:
        settings = {**LOGGED, **self.settings}
        if self.edges > 1:
            self._redis = RedisServer(self.directory / "redis")
            self._redis.start()
            settings["HOLDFAST_STORE_URL"] = self._redis.url
        data = self.directory / "1" / "data"
        data.parent.mkdir()
        app: dict[str, Any] = run_holdfast(
            "app", "create", "lab", "--open", "--data-dir", str(data), settings=settings
        )
        host = ADDRESSES[self.edges - 1]  # of the edge that stays
        self.access = Access(
            app["app_key"], app["master_secret"], app["device_key"], f"http://{host}:{HTTP_PORT}"
        )
        for number in range(1, self.edges + 1):
            self._nodes[number] = Server(
                self.directory / str(number) / "data", settings=settings, flags=self._flags(number)
            )
            self._start_edge(number)

    def _flags(self, number: int) -> Sequence[str]:
        ports = (f"--mqtt-port={PORT}", f"--http-port={HTTP_PORT}")
        if self.edges == 1:
            return (*ports, "--host=0.0.0.0")
        address = ADDRESSES[number - 1]
        return (
            *ports,
            f"--host={address}",
            f"--node-id=edge-{number}",
            f"--server-advertise={address}:{PORT}",
        )

    def _start_edge(self, number: int) -> None:
        self._nodes[number].log.parent.mkdir(exist_ok=True)
        self._nodes[number].start()

    def kill_edge(self, number: int) -> None:
        self._nodes[number].kill()

    def stop(self) -> None:
        for node in self._nodes.values():
            node.kill()
        if self._redis is not None:
            self._redis.stop()


@dataclass(slots=True)
class MosquittoSite(Site):
    """One broker under all addresses, with its defaults but for what must be said; its queues have no limit."""

    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def _start(self) -> None:
        lines = (
            f"listener {PORT} 0.0.0.0",
            "allow_anonymous true",
            "user root",
            "persistence true",
            f"persistence_location {self.directory}/",
            "max_queued_messages 0",
        )
        (self.directory / "mosquitto.conf").write_text("\n".join(lines) + "\n")
        self._start_edge(1)

    def _start_edge(self, number: int) -> None:
        program = shutil.which("mosquitto")
        if program is None:
            raise SiteError("mosquitto is not installed: as root, apt-get install mosquitto")
        with (self.directory / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, "-c", str(self.directory / "mosquitto.conf")], stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_LIMIT
        while not _listens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise SiteError((self.directory / "mosquitto.log").read_text(errors="replace")[-2000:])
            time.sleep(0.02)

    def kill_edge(self, number: int) -> None:
        """Only at address 1 would there be one: its other address is the same process."""
        self.stop()

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


def _listens() -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", PORT), timeout=1):
        return True
    return False
