"""A Redis of our own, as the fleet's scenario has it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.redis_server import RedisError, RedisServer

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


def _send(redis: RedisServer, *commands: str) -> None:
    with socket.create_connection(("127.0.0.1", redis.port)) as connection:
        for command in commands:
            connection.sendall(f"{command}\r\n".encode())
            assert connection.recv(4096)[:1] in b"+:$"


def test_it_loses_nothing_that_it_answered(redis: RedisServer) -> None:
    info = redis.info("persistence")
    assert info["aof_enabled"] == "1"
    assert redis.url == f"redis://127.0.0.1:{redis.port}"
    with socket.create_connection(("127.0.0.1", redis.port)) as connection:
        connection.sendall(b"CONFIG GET appendfsync\r\n")
        assert b"always" in connection.recv(4096)


def test_its_work_is_counted(redis: RedisServer) -> None:
    before = redis.work()
    _send(redis, "SET a 1", "EVAL \"return redis.call('GET','a')\" 0")
    done = redis.work().since(before)
    assert (done.commands, done.scripts) == (5, 1), "SET, EVAL, GET in it; the INFO before and its PING"
    assert done.usage.cpu >= 0
    assert redis.memory()[0] > 0
    assert redis.memory()[1] > 0


def test_a_long_sync_is_told(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert redis.slowest_sync() >= 0
    event = "*4\r\n$16\r\naof-fsync-always\r\n:1795339058\r\n:1426\r\n:7170\r\n"
    monkeypatch.setattr(redis, "_ask", lambda _: f"*1\r\n{event}")
    assert redis.slowest_sync() == 7170


def test_it_is_gone_when_it_was_stopped(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    pid = server.pid
    server.stop()
    server.stop()
    assert not Path(f"/proc/{pid}").exists()


def test_one_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    fake = bin_dir / "redis-server"
    fake.write_text("#!/bin/sh\necho it does not like this\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    with pytest.raises(RedisError, match="it does not like this"):
        RedisServer(tmp_path / "data").start()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RedisError, match="apt-get install redis-server"):
        RedisServer(tmp_path / "data").start()
