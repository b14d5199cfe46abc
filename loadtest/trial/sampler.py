"""What processes used while the trial ran: the generator's, from /proc, and the server's, from /proc or /metrics.

A sample is taken at the end of each window. What /metrics says comes when it comes: a server that stands still must
not stop the load.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from loadtest.http_pool import HttpError, HttpPool
from loadtest.machine import PAGE, family, pss
from loadtest.reactor import Reactor
from loadtest.server import read_machine_usage, read_usage, sum_metric
from loadtest.trial.target import Target
from loadtest.wires import Endpoint

NANOSECONDS: Final = 1e9
MEMORY_METRIC: Final = "process_resident_memory_bytes"
SHORTEST: Final = 0.25  # seconds: the use in less is not a share of anything
CPU_METRIC: Final = "process_cpu_seconds_total"


@dataclass(frozen=True, slots=True)
class Process:
    """One of the generator's: the conductor, or one that plays `devices` devices."""

    name: str
    pid: int
    devices: int = 0


@dataclass(slots=True)
class Use:
    """Shares of a core and of the time, one for each window that was sampled."""

    process: Process
    cpu: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)  # it could have run, and had no core

    def add(self, cpu: float, waited: float) -> None:
        self.cpu.append(cpu)
        self.waited.append(waited)

    @property
    def mean_cpu(self) -> float:
        return sum(self.cpu) / len(self.cpu) if self.cpu else 0.0

    @property
    def mean_waited(self) -> float:
        return sum(self.waited) / len(self.waited) if self.waited else 0.0


@dataclass(slots=True)
class Sample:
    """At the end of a window. None: nobody told."""

    at: float  # time.perf_counter
    online: int
    arrived: int  # deliveries so far
    server_memory: int | None = None  # bytes
    server_cpu: float | None = None  # seconds so far
    machine_cpu: float = 0.0


def read_waited(pid: int) -> float:
    """Seconds in which the threads of a process were ready to run, and others ran."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[1]) for task in tasks) / NANOSECONDS


class Sampler:
    def __init__(self, reactor: Reactor, target: Target, processes: Sequence[Process]) -> None:
        self._reactor = reactor
        self._target = target
        self._uses = [Use(process) for process in processes]
        self._before = [(0.0, 0.0, 0.0)] * len(processes)  # CPU, waited, when
        self.samples: list[Sample] = []
        self._pool: HttpPool | None = None
        if target.metrics is not None:
            self._pool = _metrics_pool(reactor, target.metrics[0])
        self._asked = False
        self.trouble = ""  # why there is nothing about the server
        self._read_processes(lambda *_: None)

    @property
    def uses(self) -> Sequence[Use]:
        return self._uses

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def sample_first(self, limit: float) -> None:
        """Before anybody is online; waits for /metrics, but no longer than that."""
        self.sample(0, 0)
        with suppress(TimeoutError):
            self._reactor.run_until(lambda: not self._asked, "/metrics", limit)

    def sample(self, online: int, arrived: int) -> None:
        sample = Sample(time.perf_counter(), online, arrived, machine_cpu=read_machine_usage().cpu)
        self.samples.append(sample)
        self._read_processes(Use.add)
        if self._pool is not None:
            self._ask(self._pool, sample)
        elif self._target.pid is not None:
            self._look_at(self._target.pid, sample)

    def _read_processes(self, take: Callable[[Use, float, float], object]) -> None:
        for number, use in enumerate(self._uses):
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended; its socket tells why
                usage, waited = read_usage(use.process.pid), read_waited(use.process.pid)
                cpu_before, waited_before, before = self._before[number]
                seconds = usage.at - before
                if seconds < SHORTEST:
                    continue
                self._before[number] = (usage.cpu, waited, usage.at)
                take(use, (usage.cpu - cpu_before) / seconds, (waited - waited_before) / seconds)

    def _look_at(self, pid: int, sample: Sample) -> None:
        try:
            processes = family(pid)
            sample.server_cpu = sum(read_usage(one).cpu for one in processes)
            sample.server_memory = pss(processes) if len(processes) > 1 else _rss(pid)
        except (FileNotFoundError, ProcessLookupError):
            self.trouble = f"process {pid} has ended"

    def _ask(self, pool: HttpPool, sample: Sample) -> None:
        if self._asked:
            return  # it is slow: that much is told by the missing point
        self._asked = True
        assert self._target.metrics is not None

        def take(status: int, body: bytes) -> None:
            self._asked = False
            text = body.decode(errors="replace")
            if status != 200:
                self.trouble = f"/metrics: {status or text}"
                return
            sample.server_memory = int(sum_metric(text, MEMORY_METRIC)) or None
            sample.server_cpu = sum_metric(text, CPU_METRIC) or None

        pool.send(pool.build("GET", self._target.metrics[1]), take)


def check_metrics(endpoint: Endpoint, path: str) -> str:
    """Why /metrics cannot be used; nothing if it can."""
    reactor = Reactor()
    pool = _metrics_pool(reactor, endpoint)
    answers: list[tuple[int, bytes]] = []
    try:
        pool.send(pool.build("GET", path), lambda status, body: answers.append((status, body)))
        reactor.run_until(lambda: bool(answers), "an answer", 10.0)
    except (TimeoutError, HttpError) as error:
        return str(error)
    finally:
        pool.close()
        reactor.close()
    status, body = answers[0]
    text = body.decode(errors="replace")
    if status != 200:
        return f"it answers {status}" if status else text
    return "" if sum_metric(text, MEMORY_METRIC) else f"it has no {MEMORY_METRIC}"


def _metrics_pool(reactor: Reactor, endpoint: Endpoint) -> HttpPool:
    return HttpPool(reactor, endpoint.address, 1, tls=endpoint.tls, bears_loss=True)


def _rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
