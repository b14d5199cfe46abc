"""`python -m loadtest.swarm_process`: forks the processes of a fleet and waits for them.

All that they share is imported once, before the fork, and kept out of the garbage collector's way, so that its pages
stay common. Each talks over a socket of its own with whoever started this (loadtest/swarms.py), and ends when that
socket does: no process outlives its owner.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any, Final

import msgspec

from loadtest.roster import Who, connects_of
from loadtest.server import Address
from loadtest.swarm import OPENING_AT_ONCE, PAUSE, PAUSE_MAX, Swarm
from loadtest.tally import Collected, Tally
from loadtest.wires import Tls

FAILED: Final = 70  # exit status; sysexits.h


class Share(msgspec.Struct, frozen=True):
    """One process: its socket, and its devices."""

    socket: int
    first: int
    count: int


class Order(msgspec.Struct, frozen=True):
    """What to fork."""

    who: Who
    addresses: list[Address]
    shares: list[Share]
    tls: Tls | None = None
    versions: tuple[int, ...] = (4, 5)
    keep_alive: int = 240
    ping_interval: float = 180.0
    pause: float = PAUSE
    pause_max: float = PAUSE_MAX
    sources: list[str] | None = None
    opening_at_once: int = OPENING_AT_ONCE
    keeps_schedule: bool = False
    window: float = 1.0  # seconds over which latencies are summed up


def main() -> int:
    """Exit status: 0 if each process ended well."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order, dec_hook=lambda kind, text: kind(text))
    gc.collect()
    gc.freeze()
    children = [_fork(order, number) for number in range(len(order.shares))]
    for share in order.shares:
        os.close(share.socket)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return FAILED if any(statuses) else 0


def _fork(order: Order, number: int) -> int:
    child = os.fork()
    if child:
        return child
    status = FAILED
    try:
        gc.disable()  # nothing here makes cycles, and a collection would write to every page
        _play(order, number)
        status = 0
    except Exception:  # noqa: BLE001 - the boundary of the process
        traceback.print_exc()
    finally:
        os._exit(status)


def _play(order: Order, number: int) -> None:
    mine = order.shares[number]
    for share in order.shares:
        if share is not mine:
            os.close(share.socket)  # else its owner would not see it end
    swarm = Swarm(
        connects_of(order.who, order.keep_alive, order.versions),
        Tally(mine.first, mine.count, order.window),
        order.addresses,
        tls=order.tls,
        number=number,
        ping_interval=order.ping_interval,
        pause=order.pause,
        pause_max=order.pause_max,
        sources=order.sources,
        opening_at_once=order.opening_at_once,
        keeps_schedule=order.keeps_schedule,
    )
    Player(swarm, Connection(mine.socket)).run()


class Player:
    """Turns the swarm, and does what its socket says: a name and arguments, answered one by one."""

    def __init__(self, swarm: Swarm, connection: Connection) -> None:
        self._swarm = swarm
        self._connection = connection
        self._running = True
        swarm.reactor.watch(connection.fileno(), self._obey)

    def run(self) -> None:
        """Until the socket ends."""
        while self._running:
            self._swarm.turn()
        self._swarm.close()

    def _obey(self, _: int) -> None:
        try:
            name, arguments = self._connection.recv()
        except EOFError:
            self._running = False
            return
        self._connection.send(getattr(self, f"do_{name}")(*arguments))

    def do_connect(self, rate: float, begin: float = 0.0) -> None:
        self._swarm.connect(rate, begin)

    def do_take_breaks(self, rate: float, away: float) -> None:
        self._swarm.take_breaks(rate, away)

    def do_send_receipts(self, share: float) -> None:
        self._swarm.send_receipts(share)

    def do_leave(self) -> None:
        self._swarm.leave()

    def do_expect(self, serial: int) -> None:
        self._swarm.tally.expect(serial)

    def do_expect_timed(self, serial: int, due: float, among: int, residue: int) -> None:
        self._swarm.tally.expect_timed(serial, due, among, residue)

    def do_collect(self) -> Collected:
        swarm, tally = self._swarm, self._swarm.tally
        behind, swarm.behind = swarm.behind, 0.0
        latencies, connects = tally.latencies.drain(), swarm.connect_times.drain()
        return Collected(tally.drain(), latencies, connects, tally.progress(), behind)

    def do_status(self) -> tuple[int, int, dict[str, Any]]:
        """Devices online, devices that are to be, and what happened so far."""
        return self._swarm.online, self._swarm.wanted, self._swarm.counts.as_dict()

    def do_marks(self, serial: int) -> tuple[int, int, float, float]:
        """How many have this broadcast, got it again, and when the first and the last got it."""
        marks = self._swarm.tally.marks(serial)
        return marks.count, marks.repeats, marks.first, marks.last

    def do_missing(self, serial: int, limit: int) -> list[int]:
        return self._swarm.tally.missing(serial, limit)

    def do_drain(self) -> bytes:
        """Targeted pushes that came since the last call."""
        return self._swarm.tally.drain()


if __name__ == "__main__":
    sys.exit(main())
