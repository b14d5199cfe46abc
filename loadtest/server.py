"""A real `holdfast serve` as a child process on a core of its own, and what /proc tells about it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

HOLDFAST: Final = Path(sys.executable).with_name("holdfast")
START_LIMIT: Final = 20.0
STOP_LIMIT: Final = 60.0
STEADY_PAUSE: Final = 0.25
EXACT: Final = 1e-6  # of a count: less is the fault of floats
STEADY_SIZE: Final = 65_536  # RSS that moves less than this between two looks has settled

Address = tuple[str, int]


class ServerError(Exception):
    """The server did not start, or ended by itself; the message has what it wrote last."""


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds of one process, and when they were read."""

    cpu: float
    at: float

    def busy_since(self, before: Usage) -> float:
        """Share of one core, 0 to 1."""
        return (self.cpu - before.cpu) / max(self.at - before.at, 1e-9)


def run_holdfast(
    *arguments: str, source: Path | None = None, settings: Mapping[str, str] | None = None
) -> Any:
    """Run one command to its end and return the JSON it prints."""
    command: list[str | Path] = [HOLDFAST, *arguments]
    environment = {**os.environ, **(settings or {}), **running(source)}
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    if done.returncode:
        raise ServerError(f"holdfast {arguments[0]}: {done.stderr.decode().strip()}")
    return orjson.loads(done.stdout)


def running(source: Path | None) -> dict[str, str]:
    """The environment in which `holdfast` is that of the checkout `source`; None: the installed one."""
    return {} if source is None else {"PYTHONPATH": str(source.resolve())}


class Server:
    """`start`, then `stop`. Logs go to `log` in the parent of the data directory."""

    def __init__(
        self,
        data_dir: Path,
        *,
        core: int | None = None,
        settings: Mapping[str, str] | None = None,
        source: Path | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        """`flags`: more of them for `holdfast serve`."""
        self._data_dir = data_dir
        self._flags = flags
        self._core = core
        self._settings = {"HOLDFAST_SERVER_DEMO_APP": "false", **(settings or {}), **running(source)}
        self.log = data_dir.parent / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.addresses: dict[str, Any] = {}

    def start(self) -> None:
        flags = [f"--{name}-port=0" for name in ("mqtt", "ws", "http", "admin")]
        command: list[str | Path] = [HOLDFAST, "serve", "--data-dir", self._data_dir, *flags, *self._flags]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, env=os.environ | self._settings
            )
        if self._core is not None:
            os.sched_setaffinity(self.pid, {self._core})
        assert self._process.stdout is not None
        line = self._process.stdout.readline()  # ends with the process, if that gives up
        if not line:
            self._process.wait(START_LIMIT)
            self._process.stdout.close()
            raise ServerError(f"the server did not start:\n{self._last_words()}")
        self.addresses = orjson.loads(line)

    def stop(self) -> None:
        """Drain; raises ServerError if the server was gone already or does not end well."""
        process = self._process
        if process is None:
            return
        self._process = None
        process.terminate()
        try:
            status = process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = -9
        assert process.stdout is not None
        process.stdout.close()
        if status:
            raise ServerError(f"the server ended with status {status}:\n{self._last_words()}")

    def kill(self) -> None:
        """At once, if it is not gone already; `start` may follow."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def address(self, listener: str) -> Address:
        """Of mqtt, mqtts, ws, http or admin."""
        host, port = str(self.addresses[listener]).rsplit(":", 1)
        return host.strip("[]"), int(port)

    # From /proc

    def rss(self) -> int:
        """Resident bytes now."""
        return read_rss(self.pid)

    def steady_rss(self) -> int:
        """Resident bytes once they hardly change."""
        return wait_for_steady_rss(self.pid)

    def metric(self, name: str) -> float:
        """The sum over all labels of holdfast_`name`, as /metrics shows it."""
        return sum_metric(self._metrics(), f"holdfast_{name}")

    def histogram(self, name: str) -> Buckets:
        """All labels together."""
        return sum_histogram(self._metrics(), f"holdfast_{name}")

    def _metrics(self) -> str:
        host, port = self.address("admin")
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())


def read_rss(pid: int) -> int:
    """Resident bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def wait_for_steady_rss(pid: int) -> int:
    """Resident bytes once they hardly change."""
    before = read_rss(pid)
    while True:
        time.sleep(STEADY_PAUSE)
        now = read_rss(pid)
        if abs(now - before) < STEADY_SIZE:
            return now
        before = now


def read_machine_usage() -> Usage:
    """CPU seconds of all processes, with what the hypervisor kept for itself."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields[:8])
    ticks = user + nice + system + irq + softirq + steal
    return Usage(ticks / os.sysconf("SC_CLK_TCK"), time.perf_counter())


def read_usage(pid: int) -> Usage:
    """All threads, in nanoseconds; of another process without what it did since it last waited or its core's clock
    ticked, which is some milliseconds. Raises ProcessLookupError."""
    try:
        return Usage(time.clock_gettime(_cpu_clock(pid)), time.perf_counter())
    except OSError as error:
        raise ProcessLookupError(f"process {pid} is gone: {error.strerror}") from None


def _cpu_clock(pid: int) -> int:
    """As clock_getcpuclockid(3) makes it: the pid above bits that say "a process", "as the scheduler counts"."""
    return ~pid << 3 | 2


class Buckets(Counter[float]):
    """How many values there were, by the upper bound of their bucket."""

    def since(self, before: Buckets) -> Buckets:
        return Buckets(self - before)

    def quantile(self, share: float) -> float:
        """The bound under which so many of the values were; 1: all. 0 for no values."""
        left = share * self.total()
        for bound in sorted(+self):
            left -= self[bound]
            if left <= EXACT:
                return bound
        return 0.0


def sum_histogram(text: str, name: str) -> Buckets:
    """`text` in the Prometheus text format."""
    cumulative: Counter[float] = Counter()
    pattern = rf'^{re.escape(name)}_bucket\{{(?:.*,)?le="([^"]+)".*\}} (\S+)$'
    for bound, count in re.findall(pattern, text, re.MULTILINE):
        cumulative[float(bound)] += int(float(count))
    buckets, below = Buckets(), 0
    for bound in sorted(cumulative):
        buckets[bound], below = cumulative[bound] - below, cumulative[bound]
    return buckets


def sum_metric(text: str, name: str) -> float:
    """`text` in the Prometheus text format; 0 if it has no such metric."""
    found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))
