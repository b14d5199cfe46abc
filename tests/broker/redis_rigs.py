"""Redis servers for tests, each of their own: a plain one, one with a replica, a Cluster of three masters with a
replica each. They run for the session and are emptied for each test."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import hiredis
import pytest

from tests.ports import free_port

START_TIMEOUT: Final = 60.0  # seconds until a server answers, or a cluster is whole
_REDIS: Final = shutil.which("redis-server", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/bin")


@dataclass
class RedisServer:
    """One process. `options` are those of its command line, `port` is free."""

    directory: Path
    options: tuple[str, ...] = ()
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    _socket: socket.socket | None = None
    _reader: Any = None

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns at once; `wait` until it answers."""
        assert _REDIS is not None
        options = [
            *("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.directory)),
            *("--save", "", "--appendonly", "yes", "--appendfsync", "always"),
            *self.options,
        ]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen([_REDIS, *options], stdout=log, stderr=log)

    def wait(self) -> None:
        until(lambda: self.command("PING") == "PONG", f"redis-server on port {self.port} does not answer")

    def stop(self, *, kill: bool = True) -> None:
        """SIGKILL, or SIGTERM."""
        self._hang_up()
        if self.process is not None:
            (self.process.kill if kill else self.process.terminate)()
            self.process.wait(START_TIMEOUT)
            self.process = None

    def restart(self) -> None:
        self.stop()
        self.start()
        self.wait()

    def command(self, *words: str | bytes | int | float) -> Any:
        """Its answer; texts are str, errors are raised."""
        try:
            if self._socket is None:
                self._socket = socket.create_connection(("127.0.0.1", self.port), START_TIMEOUT)
                self._reader = hiredis.Reader(encoding="utf-8", errors="surrogateescape")
            self._socket.sendall(hiredis.pack_command(words))
            while (answer := self._reader.gets()) is False:
                if not (received := self._socket.recv(65_536)):
                    raise ConnectionResetError("the server has gone")
                self._reader.feed(received)
        except OSError:
            self._hang_up()
            raise
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


@dataclass
class Rig:
    """What a store opens, and the servers behind it."""

    name: str
    servers: list[RedisServer]
    replicas: int = 0  # that acknowledge each write

    @property
    def url(self) -> str:
        return "redis://" + ",".join(f"127.0.0.1:{server.port}" for server in self.servers)

    @property
    def masters(self) -> list[RedisServer]:
        return [server for server in self.servers if server.command("ROLE")[0] == "master"]

    def flush(self) -> None:
        for server in self.masters:
            server.command("FLUSHALL", "SYNC")


def until(true: Callable[..., object], message: str) -> None:
    for _attempt in _attempts():
        with suppress(OSError, hiredis.HiredisError):
            if true():
                return
    raise AssertionError(message)


def _attempts() -> Iterator[int]:
    """A server outside has no clock that we could turn."""
    end = time.monotonic() + START_TIMEOUT
    for attempt in itertools.count():
        yield attempt
        if time.monotonic() > end:
            return
        time.sleep(0.02)


@contextmanager
def servers(
    count: int, *options: str, prepare: Callable[[list[RedisServer]], None] = lambda made: None
) -> Iterator[list[RedisServer]]:
    """Running, each in a directory of its own. Skips the test where there is no redis-server."""
    if _REDIS is None:
        pytest.skip("redis-server is not installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        made = [RedisServer(Path(directory) / str(number), options) for number in range(count)]
        prepare(made)
        try:
            for server in made:
                server.start()
            for server in made:
                server.wait()
            yield made
        finally:
            for server in made:
                server.stop()


# Kinds of Redis


@contextmanager
def with_replica() -> Iterator[Rig]:
    """A master and its replica."""
    with servers(2, "--repl-diskless-sync-delay", "0") as made:
        master, replica = made
        replica.command("REPLICAOF", "127.0.0.1", master.port)
        until(lambda: "state=online" in master.command("INFO", "replication"), "the replica is not in step")
        yield Rig("replica", made, replicas=1)


@contextmanager
def cluster_of_six() -> Iterator[Rig]:
    """Three masters, then a replica of each. None is taken for dead because its machine stands still for a moment."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(int(START_TIMEOUT * 1000)))
    with servers(6, *options, "--repl-diskless-sync-delay", "0", prepare=_introduce) as made:
        for server in made:
            until(lambda s=server: _is_whole(s), "the cluster is not whole")
        yield Rig("cluster", made, replicas=1)


def take_over(rig: Rig, master: int) -> None:
    """The replica of this master of a cluster, which is dead, becomes the master at once: without an election."""
    rig.servers[3 + master].command("CLUSTER", "FAILOVER", "TAKEOVER")


def give_slot(rig: Rig, slot: int, master: int) -> None:
    """An empty slot of a cluster, to this of its masters. Returns when all know it: they have to be told of a newer
    epoch, or what another one said before and they hear after would count."""
    owner, *others = sorted(rig.servers[:3], key=lambda server: server is not rig.servers[master])
    owner.command("CLUSTER", "BUMPEPOCH")
    name = owner.command("CLUSTER", "MYID")
    for server in (owner, *others):
        server.command("CLUSTER", "SETSLOT", slot, "NODE", name)
    for server in rig.servers:
        until(lambda server=server: _owner(server, slot) == name, f"slot {slot} did not move")


def _owner(server: RedisServer, slot: int) -> str:
    ranges = server.command("CLUSTER", "SLOTS")
    return next((master[2] for first, last, master, *_ in ranges if first <= slot <= last), "")


def _introduce(made: Sequence[RedisServer]) -> None:
    """They know each other from their configuration: to meet takes ten seconds."""
    ids = [f"{number:040x}" for number in range(1, 7)]
    for server, own in zip(made, ids, strict=True):
        lines = []
        for number, (other, name) in enumerate(zip(made, ids, strict=True)):
            flags = "myself," * (name == own) + ("master" if number < 3 else "slave")
            master = "-" if number < 3 else ids[number - 3]
            slots = f" {16_384 * number // 3}-{16_384 * (number + 1) // 3 - 1}" if number < 3 else ""
            where = f"127.0.0.1:{other.port}@{other.port + 10_000}"
            lines.append(f"{name} {where} {flags} {master} 0 0 {number % 3 + 1} connected{slots}\n")
        lines.append("vars currentEpoch 3 lastVoteEpoch 0\n")
        (server.directory / "nodes.conf").write_text("".join(lines))


def _is_whole(server: RedisServer) -> bool:
    """It sees all slots served, and is or has a replica that is in step."""
    replication = server.command("INFO", "replication")
    in_step = "master_link_status:up" in replication or "state=online" in replication
    return in_step and "cluster_state:ok" in server.command("CLUSTER", "INFO")


@pytest.fixture(scope="session")
def plain_redis() -> Iterator[Rig]:
    with servers(1) as made:
        yield Rig("plain", made)


@pytest.fixture
def plain(plain_redis: Rig) -> Rig:
    """An empty Redis."""
    plain_redis.flush()
    return plain_redis


@pytest.fixture(scope="session")
def replicated_redis() -> Iterator[Rig]:
    with with_replica() as rig:
        yield rig


@pytest.fixture
def replicated(replicated_redis: Rig) -> Rig:
    """An empty Redis with a replica."""
    replicated_redis.flush()
    return replicated_redis


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[Rig]:
    with cluster_of_six() as rig:
        yield rig


@pytest.fixture
def cluster(redis_cluster: Rig) -> Rig:
    """An empty cluster. Tests that break one make one of their own."""
    redis_cluster.flush()
    return redis_cluster
