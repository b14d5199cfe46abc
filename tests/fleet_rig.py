"""A fleet for tests: real Redis servers, and nodes that are `holdfast serve` in processes of their own.

Every node has an address of Redis to itself (127.0.<node + 1>.1), so that a firewall rule cuts off one of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Final

import orjson
import pytest
import redis

from clients.local_server import Addresses, AppKeys, LocalServer
from tests.faulty_bus import FaultyBus
from tests.ports import free_port, listeners

START_LIMIT: Final = 60.0  # seconds
NODE_TIMEOUT: Final = 1000  # milliseconds until a master of a cluster is found dead
ROLL_LIMIT: Final = 300.0  # seconds until all workers of a machine are replaced
DURABLE: Final = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")
PROGRAM: Final = "redis-server"
NOWHERE: Final = "127.0.0.1:1"  # what a node of one role has not
ALL: Final = "all"


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

    def start(self, *more: str) -> None:
        """`more`: flags of this start only."""
        command = (PROGRAM, "--port", str(self.port), "--bind", "0.0.0.0", "--protected-mode", "no")
        with (self._directory / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--dir", str(self._directory), *DURABLE, *self._flags, *more],
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
    """What a fleet keeps its data in: a single server. `flags` are those that its nodes need."""

    flags: tuple[str, ...] = ()

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


class RedisBehindFaultyBus(OneRedis):
    """It loses and doubles doorbells on their way to the nodes."""

    def __init__(self, directory: Path, seed: int) -> None:
        super().__init__(directory)
        self.bus = FaultyBus(free_port(), self.servers[0].port, seed)

    def start(self) -> None:
        super().start()
        self.bus.start()

    def close(self) -> None:
        self.bus.close()
        super().close()

    def url(self, node: int) -> str:
        return f"redis://127.0.{node + 1}.1:{self.bus.port}"


class RedisPair(OneRedis):
    """A master and its replica, which has each write before it is answered."""

    flags = ("--store-replicas", "1")

    def __init__(self, directory: Path) -> None:
        self.servers = [Redis(directory / f"redis-{n}") for n in range(2)]

    def start(self) -> None:
        master, replica = self.servers
        master.start()
        replica.start(*self._follow(master))
        self._until_in_step(replica)

    @staticmethod
    def _follow(master: Redis) -> tuple[str, ...]:
        return ("--replicaof", f"127.0.0.1 {master.port}")

    @staticmethod
    def _until_in_step(replica: Redis) -> None:
        deadline = time.monotonic() + START_LIMIT
        with replica.client() as client:
            while client.info("replication").get("master_link_status") != "up":
                assert time.monotonic() < deadline, "the replica is not in step"
                time.sleep(0.02)

    def kill_the_master(self) -> None:
        self.servers[0].kill()

    def promote_the_replica(self) -> None:
        """And the old master comes back as its replica."""
        old, new = self.servers
        with new.client() as client:
            client.replicaof("NO", "ONE")
        old.start(*self._follow(new))
        self._until_in_step(old)
        self.servers.reverse()

    def url(self, node: int) -> str:
        return ",".join(f"redis://127.0.{node + 1}.1:{server.port}" for server in self.servers)


class RedisCluster(OneRedis):
    """Three masters, a replica each, which has each write before it is answered."""

    flags = ("--store-replicas", "1")

    def __init__(self, directory: Path) -> None:
        flags = (
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            str(NODE_TIMEOUT),
            "--cluster-config-file",
            "nodes.conf",
        )
        self.servers = [Redis(directory / f"redis-{n}", *flags) for n in range(6)]

    def start(self) -> None:
        for server in self.servers:
            server.start("--cluster-node-timeout", "15000")  # who does not answer MEET in time is forgotten
        members = [f"127.0.0.1:{server.port}" for server in self.servers]
        create = ("redis-cli", "--cluster", "create", *members, "--cluster-replicas", "1", "--cluster-yes")
        subprocess.run(create, check=True, capture_output=True, timeout=4 * START_LIMIT)
        deadline = time.monotonic() + START_LIMIT
        while not all(self._agrees(server) for server in self.servers):
            assert time.monotonic() < deadline, "the cluster does not agree"
            time.sleep(0.05)
        for server in self.servers:
            with server.client() as client:
                client.config_set("cluster-node-timeout", NODE_TIMEOUT)

    @staticmethod
    def _agrees(server: Redis) -> bool:
        with server.client() as client:
            state = client.execute_command("CLUSTER INFO")
            links = client.info("replication")
        in_step = links["role"] == "master" or links["master_link_status"] == "up"
        return bool(state["cluster_state"] == "ok" and in_step)

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


class Node(LocalServer):
    """Of any role: what it does not listen on has an address where nobody is."""

    def _take_listening(self, line: bytes) -> None:
        told = orjson.loads(line)
        super()._take_listening(
            orjson.dumps(told | {name: told[name] or NOWHERE for name in ("mqtt", "http", "admin")})
        )

    def workers(self) -> dict[int, str]:
        """Of a node with `--workers`: process -> state."""
        with urllib.request.urlopen(f"{self.addresses.admin}/healthz", timeout=START_LIMIT) as response:
            return {worker["pid"]: worker["state"] for worker in orjson.loads(response.read())["workers"]}

    def replace_workers(self) -> None:
        """The rolling restart of one machine; returns when it is done."""
        before = self.workers()
        os.kill(self.pid, signal.SIGUSR2)
        deadline = time.monotonic() + ROLL_LIMIT
        while not self._are_ready(len(before), before):
            assert time.monotonic() < deadline, (before, self.workers(), self.log_text()[-2000:])
            time.sleep(0.1)

    def _are_ready(self, count: int, gone: Container[int]) -> bool:
        with suppress(OSError):  # the worker that answers is being replaced
            now = self.workers()
            return len(now) == count and all(s == "ready" and pid not in gone for pid, s in now.items())
        return False


class Fleet:
    """Nodes of these roles. Stands in for a `LocalServer` in `tests.crash_load`: whoever asks for addresses gets
    those of one of the nodes, by chance."""

    def __init__(self, directory: Path, store: OneRedis, roles: int | Sequence[str], *flags: str) -> None:
        """A number: so many that do everything."""
        roles = (ALL,) * roles if isinstance(roles, int) else roles
        self.store = store
        self.nodes = [
            Node(
                directory / f"node-{n}",
                *listeners(),
                "--store", store.url(n), "--node-id", f"node-{n}", "--role", role,
                "--server-demo-app", "false", *store.flags, *flags,
            )
            for n, role in enumerate(roles)
        ]  # fmt: skip
        self.gateways = [node for node, role in zip(self.nodes, roles, strict=True) if role != "broker"]
        self.brokers = [node for node, role in zip(self.nodes, roles, strict=True) if role != "gateway"]
        self._random = Random(0)
        self._app: AppKeys | None = None

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        self._app = self.brokers[0].create_app("fleet")  # not open: it would have a home

    @property
    def app(self) -> AppKeys:
        assert self._app is not None, "not started"
        return self._app

    @property
    def addresses(self) -> Addresses:
        broker = self._random.choice(self.brokers).addresses
        return replace(broker, mqtt=self._random.choice(self.gateways).addresses.mqtt)

    def close(self) -> None:
        for node in self.nodes:
            if node.running:
                os.kill(node.pid, signal.SIGCONT)
            node.kill()

    def logs(self) -> str:
        return "\n".join(node.log_text() for node in self.nodes)
