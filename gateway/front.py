"""The front of a supervisor's workers: one of its processes, which answers the operator for all of them.

It comes first and looks whether the store can be used; it makes the open apps, so that workers need only find them.
Then it serves metrics, health and the admin API of the whole, with a store of its own. The supervisor tells it who
its workers are, and what those that ended had counted.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import zlib
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import msgspec
import uvloop

from broker.admin import AdminListener, LocalActions
from broker.broker import Broker
from broker.carriers.reading import CarrierError
from broker.command import make_bus, make_store
from broker.config import Config
from broker.metrics import Metrics
from broker.metrics_merge import Whole, export
from gateway.inquiries import inquire
from gateway.open_apps import OpenApps, check_anonymous
from gateway.server import Listening, WorkerHealth, tune_interpreter

LARGEST: Final = 1 << 20  # bytes of one message of the supervisor
OURSELVES: Final = "front"  # among the processes whose metrics are merged

log = logging.getLogger(__name__)


class WorkerState(msgspec.Struct, frozen=True, array_like=True):
    """One worker, as the supervisor knows it."""

    serial: int  # no other process of this supervisor has it
    name: str
    pid: int
    state: str  # starting | ready | draining
    answers_at: str
    role: str


class CrewState(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Told by the supervisor whenever it changes."""

    workers: Sequence[WorkerState] = ()
    restarts: int = 0
    stopping: bool = False


class Buried(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What all workers that ended have counted: the front tells it the supervisor, who tells it the next front."""

    gone: bytes


class LastWords(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What a worker that ends has counted."""

    serial: int
    exported: bytes


Told: TypeAlias = CrewState | LastWords | Buried
_TOLD: Final = msgspec.msgpack.Decoder(Told)
_HEALTH: Final = msgspec.msgpack.Decoder(WorkerHealth)


class CrewOverview:
    """Implements `broker.admin.Overview` for all workers together."""

    def __init__(self, bury: Callable[[bytes], None]) -> None:
        """`bury` is called with what all that ended have counted, whenever it changed."""
        self.crew = CrewState()
        self._bury = bury
        self._metrics = Metrics(process=False)  # of a process whose counters nobody would miss
        self._whole = Whole()
        self._healths: dict[str, WorkerHealth] = {}  # by name, as of the last scrape
        metrics = self._metrics
        metrics.gauge("workers", "Workers of this supervisor.", self._count_states, "state")
        metrics.gauge("worker_up", "1 while the worker answers.", self._ups, "worker")
        metrics.gauge("worker_connections", "Connections of a worker.", self._connections, "worker")
        metrics.read_counter(
            "worker_restarts", "Workers that were started for one that died.", lambda: self.crew.restarts
        )

    def hear(self, told: Told) -> None:
        match told:
            case CrewState():
                self._change_crew(told)
            case LastWords(serial, exported):
                self._whole.take(str(serial), exported)
            case Buried(gone):
                self._whole.unpack_gone(gone)

    def _change_crew(self, crew: CrewState) -> None:
        staying = {worker.serial for worker in crew.workers}
        ended = [worker for worker in self.crew.workers if worker.serial not in staying]
        self.crew = crew
        for worker in ended:
            self._whole.drop(str(worker.serial))
        if ended:
            self._bury(self._whole.pack_gone())

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        await asyncio.gather(self._look(), *map(self._scrape, self.crew.workers))
        self._whole.take(OURSELVES, export(self._metrics))
        return self._whole.render(accept)

    async def alive(self) -> dict[str, object]:
        await self._look()
        lags = [health.loop_lag for health in self._healths.values()]
        return {
            "status": "alive",
            "loop_lag_seconds": max(lags, default=0.0),
            "workers": [self._describe(worker) for worker in self.crew.workers],
        }

    async def reasons(self) -> list[str]:
        """None while of each role one worker is ready: during a rolling restart there is always one."""
        if self.crew.stopping:
            return ["draining"]
        await self._look()
        roles = sorted({worker.role for worker in self.crew.workers})
        return [reason for role in roles for reason in self._reasons_of(role)] or (
            [] if roles else ["no worker answers"]
        )

    def _reasons_of(self, role: str) -> list[str]:
        names = [worker.name for worker in self.crew.workers if worker.role == role]
        found = [self._healths[name].reasons for name in names if name in self._healths]
        if found and not all(found):
            return []
        said = {reason for reasons in found for reason in reasons}
        return sorted(said) or ["no worker answers" if role == "all" else f"no {role} answers"]

    async def _look(self) -> None:
        """At the health of all."""
        workers = self.crew.workers
        answers = await asyncio.gather(*(inquire(worker.answers_at, "health") for worker in workers))
        self._healths = {
            worker.name: _HEALTH.decode(answer)
            for worker, answer in zip(workers, answers, strict=True)
            if answer is not None
        }

    async def _scrape(self, worker: WorkerState) -> None:
        answer = await inquire(worker.answers_at, "metrics")
        if all(worker.serial != other.serial for other in self.crew.workers):
            return  # it ended meanwhile, and its last words count
        if answer is None:
            self._whole.rest(str(worker.serial))
        else:
            self._whole.take(str(worker.serial), answer)

    def _describe(self, worker: WorkerState) -> dict[str, object]:
        health = self._healths.get(worker.name)
        return {
            "name": worker.name,
            "pid": worker.pid,
            "state": worker.state,
            "connections": None if health is None else health.connections,
        }

    def _count_states(self) -> dict[tuple[str, ...], float]:
        counts: dict[tuple[str, ...], float] = {("starting",): 0, ("ready",): 0, ("draining",): 0}
        for worker in self.crew.workers:
            counts[worker.state,] += 1
        return counts

    def _ups(self) -> dict[tuple[str, ...], float]:
        return {(worker.name,): float(worker.name in self._healths) for worker in self.crew.workers}

    def _connections(self) -> dict[tuple[str, ...], float]:
        return {(name,): health.connections for name, health in self._healths.items()}


def run_front(
    config: Config, channel: socket.socket, tell: Callable[[Listening], None], bury: Callable[[bytes], None]
) -> None:
    """Returns when it was told to stop, or the supervisor has gone. Raises one of START_ERRORS."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config, channel, tell, bury))


async def _serve(
    config: Config, channel: socket.socket, tell: Callable[[Listening], None], bury: Callable[[bytes], None]
) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    reload = asyncio.Event()
    for signal_number in (signal.SIGINT, signal.SIGUSR2):  # the supervisor's, or the terminal's
        loop.add_signal_handler(signal_number, _ignore)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    check_anonymous(config)
    config.server.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    overview = CrewOverview(bury)
    loop.add_reader(channel, _hear, channel, overview, stop)
    store = make_store(config)
    await store.open()
    broker = Broker(store, make_bus(config, store), config.limits(), carriers=config.carriers.directory)
    admin = AdminListener(config, LocalActions(broker, config.push.offline_limit), overview)
    try:
        apps = OpenApps(config, store, broker.apps)
        demo_app, anonymous_app = await apps.demo_app(), await apps.anonymous_app()
        address = (await admin.open(shared=True)).removeprefix("http://")
        tune_interpreter(Metrics())  # which nobody reads: few wait for this process
        await broker.learning.open(f"{config.server.node_id}-{OURSELVES}")  # for what `dispatch ask` is told
        reloading = loop.create_task(_reload_carriers(broker, reload))
        tell(Listening(None, None, None, None, address, demo_app, anonymous_app))
        await stop.wait()
        reloading.cancel()
        await asyncio.wait([reloading])
    finally:
        await admin.close(succeeded=not overview.crew.stopping)
        await broker.close()
        await broker.learning.close()
        await store.close()


async def _reload_carriers(broker: Broker, asked: asyncio.Event) -> None:
    """Those by which this process answers `dispatch ask`; the workers say in the log that they have theirs."""
    while True:
        await asked.wait()
        asked.clear()
        try:
            await asyncio.to_thread(broker.dispatch.reload)
        except CarrierError as error:
            log.error("carrier profiles not reloaded, the old ones stay: %s", error)


def _hear(channel: socket.socket, overview: CrewOverview, stop: asyncio.Event) -> None:
    message = channel.recv(LARGEST)
    if message:
        overview.hear(_TOLD.decode(zlib.decompress(message)))
    else:  # the supervisor has gone
        asyncio.get_running_loop().remove_reader(channel)
        stop.set()


def _ignore() -> None:
    pass
