"""A fleet for tests: real Redis servers, and nodes that are `holdfast serve` in processes of their own.

Every node has an address of Redis to itself (127.0.<node + 1>.1), so that a firewall rule cuts off one of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from random import Random, SystemRandom
from typing import Final

import pytest
import redis

from clients.local_server import Addresses, AppKeys, LocalServer

START_LIMIT: Final = 20.0  # seconds
DURABLE: Final = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")
PROGRAM: Final = "redis-server"


def free_port() -> int:
    """Below those that the kernel gives to connecting sockets, so that a killed server can come back to it; a cluster
    takes the one 10,000 above as well."""
    while True:
        port = SystemRandom().randrange(11_000, 20_000)
        with closing(socket.socket()) as first, closing(socket.socket()) as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            return port


class Redis:
    """One server, on the same port after each restart."""

    def __init__(self, directory: Path, *flags: str) -> None:
        if shutil.which(PROGRAM) is None:
            pytest.skip(f"{PROGRAM} is not installed")
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._directory = directory
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    def client(self) -> redis.Redis:
        return redis.Redis("127.0.0.1", self.port)

    def start(self) -> None:
        command = (PROGRAM, "--port", str(self.port), "--bind", "0.0.0.0", "--protected-mode", "no")
        with (self._directory / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--dir", str(self._directory), *DURABLE, *self._flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_LIMIT
        while not self._answers():
            assert time.monotonic() < deadline, (self._directory / "redis.log").read_text()[-2000:]
            time.sleep(0.02)

    def _answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except redis.exceptions.RedisError:  # not listening yet, or loading its data
                return False

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()


class OneRedis:
    """What a fleet keeps its data in: a single server."""

    def __init__(self, directory: Path) -> None:
        self.servers = [Redis(directory / "redis")]

    def start(self) -> None:
        for server in self.servers:
            server.start()

    def close(self) -> None:
        for server in self.servers:
            server.kill()

    def url(self, node: int) -> str:
        return f"redis://127.0.{node + 1}.1:{self.servers[0].port}"

    def stored_ids(self) -> set[str]:
        """All messages that there are, answered or not: each of them has to reach its targets."""
        return {msg_id for server in self.servers for msg_id in _stored_ids(server)}


class RedisCluster(OneRedis):
    """Three masters, a replica each."""

    def __init__(self, directory: Path) -> None:
        flags = (
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            "1000",
            "--cluster-config-file",
            "nodes.conf",
        )
        self.servers = [Redis(directory / f"redis-{n}", *flags) for n in range(6)]

    def start(self) -> None:
        super().start()
        members = [f"127.0.0.1:{server.port}" for server in self.servers]
        create = ("redis-cli", "--cluster", "create", *members, "--cluster-replicas", "1", "--cluster-yes")
        subprocess.run(create, check=True, capture_output=True, timeout=60)
        deadline = time.monotonic() + START_LIMIT
        while not all(self._agrees(server) for server in self.servers):
            assert time.monotonic() < deadline, "the cluster does not agree"
            time.sleep(0.05)

    @staticmethod
    def _agrees(server: Redis) -> bool:
        with server.client() as client:
            state = client.execute_command("CLUSTER INFO")
            links = client.info("replication")
        return state["cluster_state"] == "ok" and (
            links["role"] == "master" or links["master_link_status"] == "up"
        )

    def url(self, node: int) -> str:
        return ",".join(f"redis://127.0.0.1:{server.port}" for server in self.servers)

    def masters(self) -> list[Redis]:
        found = []
        for server in self.servers:
            with server.client() as client:
                if client.info("replication")["role"] == "master":
                    found.append(server)
        return found


def _stored_ids(server: Redis) -> Iterator[str]:
    with server.client() as client:
        for key in client.scan_iter("{*/*}:row", 1000):
            yield key.decode().partition("/")[2].partition("}")[0]


class Fleet:
    """Nodes that all do everything. Stands in for a `LocalServer` in `tests.crash_load`: whoever asks for addresses
    gets those of one of the nodes, by chance."""

    def __init__(self, directory: Path, store: OneRedis, count: int, *flags: str) -> None:
        self.store = store
        self.nodes = [
            LocalServer(
                directory / f"node-{n}",
                "--store", store.url(n), "--node-id", f"node-{n}", "--server-demo-app", "false", *flags,
            )
            for n in range(count)
        ]  # fmt: skip
        self._random = Random(0)
        self._app: AppKeys | None = None

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        self._app = self.nodes[0].create_app("fleet")  # not open: it would have a home

    @property
    def app(self) -> AppKeys:
        assert self._app is not None, "not started"
        return self._app

    @property
    def addresses(self) -> Addresses:
        return self._random.choice(self.nodes).addresses

    @property
    def running(self) -> Sequence[LocalServer]:
        return [node for node in self.nodes if node.running]

    def close(self) -> None:
        for node in self.nodes:
            if node.running:
                os.kill(node.pid, signal.SIGCONT)
            node.kill()

    def logs(self) -> str:
        return "\n".join(node.log_text() for node in self.nodes)
