"""Thousands of runs of a simulated fleet (`fleet_simulation.py`), and the machine they run on."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Final

import pytest

from broker.redis.engine import Engine
from broker.store import StoreUnavailable
from tests.fleet_machine import Machine, Process, RedisBehind
from tests.fleet_simulation import SCENARIOS, URL, learn_scripts, running_redis

PROGRAM: Final = Path(__file__).with_name("fleet_simulation.py")
RUNS: Final = 155  # of each scenario
PROCESSES: Final = 2
TIMEOUT: Final = 1800  # seconds, of a slow machine

LIVE: Final = (
    "what was rung before live_broadcasts was called, and was still in the app's log, was not in its answer"
)
TWINS: Final = "two claims of a device in one call, whose answer was lost, got the same epoch"
REGRESSIONS: Final[dict[int, str]] = {40: LIVE, 59: LIVE, 79: LIVE, 150: LIVE, 3303: TWINS}
"""Seeds that found something once, and what. With the code a seed becomes another run; these are not forgotten."""

if shutil.which("redis-server", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/bin") is None:
    pytest.skip("redis-server is not installed", allow_module_level=True)


def run(*arguments: object) -> subprocess.Popen[str]:
    """In a process of its own: the order of sets must be the same each time."""
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcome(*processes: subprocess.Popen[str]) -> str:
    try:
        return "".join(process.communicate(timeout=TIMEOUT)[0] for process in processes)
    finally:
        for process in processes:
            process.terminate()
            process.wait()


@pytest.mark.parametrize("kind", SCENARIOS)
def test_whatever_happens_the_guarantees_hold(kind: str) -> None:
    share = RUNS // PROCESSES
    parts = [run("--kind", kind, part * share, (part + 1) * share) for part in range(PROCESSES)]
    assert outcome(*parts) == ""


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_what_was_found_once_is_not_there_again(seed: int) -> None:
    assert outcome(run(seed)) == "", REGRESSIONS[seed]


def test_a_seed_decides_everything() -> None:
    first, second = outcome(run("--trace", 8)), outcome(run("--trace", 8))
    assert first == second
    assert "acknowledges" in first


# The machine


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisBehind]:
    with running_redis() as redis:
        learn_scripts(redis)
        yield redis


class World:
    def __init__(self, redis: RedisBehind, *names: str) -> None:
        redis.command("FLUSHALL")
        self.machine = Machine(redis, Random(1))
        self.processes = [Process(self.machine, name) for name in names]
        self.machine.processes += self.processes
        self.tasks: list[asyncio.Task[None]] = []
        self.said: list[str] = []

    def say(self, what: object) -> None:
        self.said.append(f"{self.machine.now:.1f} {what}")

    async def count(self, name: str, pause: float = 1.0) -> None:
        """INCR again and again."""
        engine = Engine(URL)
        await engine.open()
        while True:
            try:
                self.say(f"{name} {await engine.run('INCR', 'n')}")
            except StoreUnavailable as error:
                self.say(f"{name} {error}")
            await asyncio.sleep(pause)

    def start(self, process: Process, pause: float = 1.0) -> None:
        process.inject(lambda: self.tasks.append(process.loop.create_task(self.count(process.name, pause))))


@pytest.fixture
def world(redis: RedisBehind) -> Iterator[World]:
    world = World(redis, "a", "b")
    yield world
    for process, task in zip(world.processes, world.tasks, strict=False):
        process.inject(task.cancel)
    world.machine.run(world.machine.now + 100)
    world.machine.close()


def test_time_goes_on_by_what_happens(world: World) -> None:
    for process in world.processes:
        world.start(process)
    world.machine.run(2.5)
    assert [text.split()[0] for text in world.said] == ["0.0", "0.0", "1.0", "1.0", "2.0", "2.0"]
    assert sorted(int(text.split()[2]) for text in world.said) == [1, 2, 3, 4, 5, 6]
    assert world.machine.now == 2.5


def test_a_stopped_process_goes_on_as_if_nothing_had_been(world: World) -> None:
    a, _ = world.processes
    world.start(a)
    world.machine.run(1.5)
    a.stopped = 4.25
    world.machine.run(5.5)
    assert world.said == ["0.0 a 1", "1.0 a 2", "4.3 a 3", "5.3 a 4"]


def test_a_killed_process_does_nothing_more_and_what_it_had_sent_arrives(world: World) -> None:
    a, _ = world.processes
    machine = world.machine
    machine.lost_in_flight = 0.0
    world.start(a)
    machine.run(1.5)
    while not a.links[0].flying:
        machine.run(machine.now + 0.0001)
    assert machine.redis.command("GET", "n") == b"2"
    a.kill()
    machine.run(9.0)
    assert world.said == ["0.0 a 1", "1.0 a 2"]
    assert machine.redis.command("GET", "n") == b"3"


def test_a_broken_connection_loses_an_answer_that_may_have_been_given(world: World) -> None:
    a, _ = world.processes
    world.start(a, 0.001)
    world.machine.run(0.5)
    for number in range(100):
        world.machine.at(0.5 + 0.0777 * number, lambda: [link.cut("reset") for link in list(a.links)])
    world.machine.run(10.0)
    counted = [text for text in world.said if "lost" not in text]
    lost = len(world.said) - len(counted)
    assert lost > 3
    assert len(counted) < int(world.machine.redis.command("GET", "n")) < len(counted) + lost


def test_a_process_that_is_cut_off_waits_and_what_was_on_its_way_may_come_late(world: World) -> None:
    a, b = world.processes
    world.start(a)
    world.start(b)
    world.machine.run(0.5)
    a.cut = 60.0
    world.machine.run(50.0)
    of_a = [text for text in world.said if text.split()[1] == "a"]
    assert of_a[0] == "0.0 a 1"
    assert "the answer was lost" in of_a[1]
    assert len(world.said) - len(of_a) == 50
    world.machine.run(70.0)
    assert {text.split()[1] for text in world.said[-4:]} == {"a", "b"}, "it is back"
    assert world.machine.counts.keys() & {"carried out late", "lost in flight"}
