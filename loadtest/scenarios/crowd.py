"""As many devices as a fleet would have, against processes that do nothing but keep them (loadtest/bare.py): what the
kernel and the generator take of this machine, before any server of ours takes something."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from loadtest.machine import Guard, pss, read_memory
from loadtest.reactor import Reactor
from loadtest.report import Row
from loadtest.roster import TOKEN_SIZE, Roster
from loadtest.stage import Stage
from loadtest.swarms import DEVICES_EACH, Swarms

KB = 1024
CONNECT_RATE = 40_000.0  # wanted: what is reached is measured
LEAST_RATE = 1_000.0  # below that it is given up
PINGS = (240, 180.0)  # keep-alive, and seconds between two PINGREQs


def crowd(stage: Stage) -> list[Row]:
    devices = stage.plan.fleet_devices
    with stage.whole_machine(), _bare_servers(-(-devices // DEVICES_EACH)) as bare:
        assert bare.stdout is not None
        address = ("127.0.0.1", int(bare.stdout.readline()))
        before = read_memory()
        reactor = Reactor()
        keep_alive, ping_interval = PINGS
        roster = _roster(stage, devices)
        with Swarms(
            reactor, roster, devices, [address], keep_alive=keep_alive, ping_interval=ping_interval
        ) as swarms:
            rows = _measure(stage, swarms, bare, before.kernel)
        reactor.close()
    return rows


def _roster(stage: Stage, devices: int) -> Roster:
    """Of nobody: these servers ask no questions."""
    tokens = stage.directory / "crowd" / "tokens"
    tokens.parent.mkdir(parents=True, exist_ok=True)
    with tokens.open("wb") as file:
        os.truncate(file.fileno(), devices * TOKEN_SIZE)
    return Roster("crowd", devices, tokens)


@contextmanager
def _bare_servers(processes: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "loadtest.bare", str(processes)]
    bare = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield bare
    finally:
        assert bare.stdin is not None
        bare.stdin.close()  # the processes end with it
        bare.wait(60)
        assert bare.stdout is not None
        bare.stdout.close()


def _measure(stage: Stage, swarms: Swarms, bare: subprocess.Popen[str], kernel: int) -> list[Row]:
    devices = swarms.devices
    guard = Guard("crowd")
    empty = pss(swarms.pids)
    seconds = swarms.connect(CONNECT_RATE, devices / LEAST_RATE + 30, guard.show)
    memory = read_memory()
    stage.say(f"crowd: {devices:,} devices in {seconds:.1f} s")
    _hold(stage, swarms, guard)
    broadcast = _broadcast(swarms, bare)
    lost = sum(swarms.renew().lost.values())
    name = f"crowd: {devices:,} devices, {swarms.processes} processes a side"
    return [
        Row(f"{name}: connects", "/s", [devices / seconds]),
        Row(f"{name}: kernel memory, both ends", "KB a device", [(memory.kernel - kernel) / devices / KB]),
        Row(
            f"{name}: generator",
            "bytes a device",
            [pss(swarms.pids) / devices],
            note=f"{empty / KB / KB:.0f} MB without devices",
        ),
        Row(f"{name}: a broadcast, acknowledged", "s", [broadcast]),
        Row(f"{name}: lost in {stage.plan.hold:g} s", "", [float(lost)], at_most=0),
    ]


def _hold(stage: Stage, swarms: Swarms, guard: Guard) -> None:
    until = time.perf_counter() + stage.plan.hold
    swarms.wait(lambda _: time.perf_counter() >= until, "hold", stage.plan.hold + 60, guard.show)


def _broadcast(swarms: Swarms, bare: subprocess.Popen[str]) -> float:
    """The slowest process' seconds."""
    assert bare.stdin is not None
    assert bare.stdout is not None
    swarms.ask("expect", 1)
    bare.stdin.write("1 1\n")
    bare.stdin.flush()
    answers: list[bytes] = []
    fd = bare.stdout.fileno()
    swarms.reactor.watch(fd, lambda fd: answers.append(os.read(fd, 65_536)))
    swarms.reactor.run_until(
        lambda: b"".join(answers).count(b"\n") == swarms.processes, "the broadcast", 300.0
    )
    swarms.reactor.unwatch(fd)
    return max(map(float, b"".join(answers).split()))
