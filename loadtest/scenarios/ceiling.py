"""What the generator and this machine's loopback allow: the fleet against loadtest/bare.py, which only writes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loadtest.fleet import Fleet, connect_packet
from loadtest.reactor import Reactor
from loadtest.report import Load, Row
from loadtest.stage import Meter, Stage


def ceiling(stage: Stage) -> list[Row]:
    devices = stage.plan.devices
    packets = [connect_packet("bench", f"device-{i:06d}", "x" * 40) for i in range(devices)]
    with _bare_server(stage) as bare:
        assert bare.stdout is not None
        reactor = Reactor()
        fleet = Fleet(reactor, ("127.0.0.1", int(bare.stdout.readline())), packets, lambda *_: None)
        fleet.connect(range(devices))
        rows = [_measure(stage, bare, reactor, fleet, at_once) for at_once in (1, 4)]
        fleet.close()
        reactor.close()
    return rows


@contextmanager
def _bare_server(stage: Stage) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "loadtest.bare"]
    bare = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with bare:
        if stage.server_core is not None:
            os.sched_setaffinity(bare.pid, {stage.server_core})
        yield bare


def _measure(stage: Stage, bare: subprocess.Popen[str], reactor: Reactor, fleet: Fleet, at_once: int) -> Row:
    rates: list[float] = []
    loads: list[Load] = []
    for _ in range(stage.plan.runs):
        meter = Meter(bare.pid)
        with meter.running():
            seconds = _blast(bare, reactor, at_once, stage.plan.broadcasts)
        loads.append(meter.load)
        rates.append(stage.plan.broadcasts * fleet.online / seconds)
        stage.say(f"ceiling, {at_once} at once: {rates[-1]:,.0f} deliveries/s")
    return Row(
        f"ceiling: bare epoll server, {fleet.online:,} devices, {at_once} at once",
        "/s",
        rates,
        loads=loads,
    )


def _blast(bare: subprocess.Popen[str], reactor: Reactor, at_once: int, rounds: int) -> float:
    """Have the bare server do it, and acknowledge meanwhile."""
    assert bare.stdin is not None
    assert bare.stdout is not None
    bare.stdin.write(f"{at_once} {rounds}\n")
    bare.stdin.flush()
    answers: list[bytes] = []
    fd = bare.stdout.fileno()
    reactor.watch(fd, lambda fd: answers.append(os.read(fd, 100)))
    reactor.run_until(lambda: bool(answers), "the bare server's answer")
    reactor.unwatch(fd)
    return float(answers[0])
