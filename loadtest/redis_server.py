"""A redis-server of our own as a child process, as careful as the store asks for, and what it tells of itself."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtest.server import Usage, read_usage

START_LIMIT: Final = 20.0
STOP_LIMIT: Final = 60.0
SLOW_MS: Final = 5  # what takes longer, Redis notes
READ_SIZE: Final = 65_536
PONG: Final = b"+PONG\r\n"
SCRIPTS: Final = ("eval", "evalsha", "eval_ro", "evalsha_ro", "fcall")


class RedisError(Exception):
    """There is none, or it did not start; the message has what it wrote last."""


@dataclass(frozen=True, slots=True)
class RedisWork:
    """What it has done since its start."""

    commands: int  # those inside scripts as well
    scripts: int
    usage: Usage

    def since(self, before: RedisWork) -> RedisWork:
        usage = Usage(self.usage.cpu - before.usage.cpu, self.usage.at - before.usage.at)
        return RedisWork(self.commands - before.commands, self.scripts - before.scripts, usage)


class RedisServer:
    """`start`, then `stop`. Every write is on the disk before its answer (appendfsync always)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._log = directory / "redis.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def start(self) -> None:
        """Raises RedisError."""
        if shutil.which("redis-server") is None:
            raise RedisError("redis-server is not installed: as root, apt-get install redis-server")
        self._directory.mkdir(parents=True, exist_ok=True)
        self.port = _free_port()
        durable = ("--save", "", "--appendonly", "yes", "--appendfsync", "always")
        watched = ("--latency-monitor-threshold", str(SLOW_MS))
        where = ("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._directory))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["redis-server", *where, *durable, *watched], stdout=log, stderr=log
            )
        deadline = time.perf_counter() + START_LIMIT
        while not self._answers():
            if self._process.poll() is not None or time.perf_counter() > deadline:
                self.stop()
                raise RedisError(
                    f"redis-server did not start:\n{self._log.read_text(errors='replace')[-2000:]}"
                )
            time.sleep(0.02)

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def info(self, section: str) -> dict[str, str]:
        """Of INFO."""
        lines = self._ask(f"INFO {section}").split("\r\n")
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def slowest_sync(self) -> int:
        """Milliseconds of the longest sync of its log so far; 0: none took longer than SLOW_MS. Nobody is answered
        while one lasts."""
        found = re.search(r"aof-fsync-always\r\n:\d+\r\n:\d+\r\n:(\d+)", self._ask("LATENCY LATEST"))
        return int(found[1]) if found else 0

    def _ask(self, command: str) -> str:
        """The answer as it is; a PING behind the command tells where it ends."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(f"{command}\r\nPING\r\n".encode())
            received = b""
            while not received.endswith(PONG):
                more = connection.recv(READ_SIZE)
                if not more:
                    raise ConnectionResetError("Redis closed the connection")
                received += more
        return received.removesuffix(PONG).decode()

    def memory(self) -> tuple[int, int]:
        """used_memory and used_memory_rss, bytes."""
        info = self.info("memory")
        return int(info["used_memory"]), int(info["used_memory_rss"])

    def work(self) -> RedisWork:
        calls = {
            name.removeprefix("cmdstat_"): int(text.removeprefix("calls=").split(",", 1)[0])
            for name, text in self.info("commandstats").items()
        }
        scripts = sum(calls.get(name, 0) for name in SCRIPTS)
        return RedisWork(sum(calls.values()), scripts, read_usage(self.pid))

    def _answers(self) -> bool:
        try:
            return bool(self.info("server"))
        except OSError:
            return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
