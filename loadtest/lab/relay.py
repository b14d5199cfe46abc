"""The relay: one process that carries the packets of all paths between TUN devices, as `path.py` says.

    python -m loadtest.lab.relay < plan

The first line of its input is the plan (RelayPlan as JSON). It opens its devices in the namespaces, prints `ready`,
and carries packets. A line `start SECONDS` (of time.monotonic) begins the time of events. At the end of its input it
prints what it counted, as JSON, and ends. One select loop; a packet that is due at once is written at once.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import selectors
import socket
import struct
import sys
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from loadtest.lab.namespaces import entered
from loadtest.lab.networks import Network
from loadtest.lab.path import Path, Way

TUNSETIFF: Final = 0x400454CA  # linux/if_tun.h
IFF_TUN: Final = 0x0001
IFF_NO_PI: Final = 0x1000
LONGEST: Final = 65_536
TURN: Final = 64  # packets of one device in a row: the others come next
MAX_WAITING: Final = 50_000  # packets on their way; more are dropped: something sends without end


class PathPlan(msgspec.Struct, frozen=True, kw_only=True):
    """`public` and `servers`: IPv4 addresses."""

    key: str
    network: Network
    device_space: str
    server_space: str
    device_tun: str
    server_tun: str
    public: tuple[str, ...]
    servers: tuple[str, ...]


class RelayPlan(msgspec.Struct, frozen=True, kw_only=True):
    seed: int
    paths: tuple[PathPlan, ...]


class PathReport(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    counts: dict[str, int]


class RelayReport(msgspec.Struct, frozen=True, kw_only=True):
    """`late`: seconds by which the packets left after they were due, on average; `latest`: at most."""

    paths: tuple[PathReport, ...]
    late: float
    latest: float
    cpu: float  # seconds


def open_tun(name: str, space: str) -> int:
    """A TUN device of this name in a namespace; a non-blocking file, which it lives as long as."""
    with entered(space):
        opened = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(opened, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return opened


def packed(addresses: Sequence[str]) -> list[bytes]:
    return [socket.inet_aton(address) for address in addresses]


class _Port:
    """One end of a path."""

    __slots__ = ("other", "path", "tun", "way")

    def __init__(self, tun: int, path: Path, way: Way) -> None:
        self.tun = tun
        self.path = path
        self.way = way
        self.other = -1  # where its packets go


class Relay:
    """`run` until the input ends."""

    def __init__(self, plan: RelayPlan) -> None:
        self._plan = plan
        self._selector = selectors.EpollSelector()
        self._paths: dict[str, Path] = {}
        self._tuns: list[int] = []
        self._waiting: list[tuple[float, int, int, bytes]] = []  # a heap: due, n, where, packet
        self._n = 0
        self._carried = 0
        self._late = 0.0
        self._latest = 0.0
        for path in plan.paths:
            self._open(path)

    def _open(self, plan: PathPlan) -> None:
        path = Path(plan.network, str(self._plan.seed), packed(plan.public), packed(plan.servers))
        self._paths[plan.key] = path
        device = _Port(open_tun(plan.device_tun, plan.device_space), path, "up")
        server = _Port(open_tun(plan.server_tun, plan.server_space), path, "down")
        device.other, server.other = server.tun, device.tun
        for port in (device, server):
            self._tuns.append(port.tun)
            self._selector.register(port.tun, selectors.EVENT_READ, port)

    def run(self, commands: int) -> None:
        """`commands`: the file that says when to start, and whose end ends it."""
        self._selector.register(commands, selectors.EVENT_READ, None)
        while True:
            wait = max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else None
            for key, _ in self._selector.select(wait):
                if key.data is None:
                    if not self._obey(os.read(commands, 4096)):
                        return
                else:
                    self._take(key.data)
            self._deliver()

    def _obey(self, line: bytes) -> bool:
        """Whether it goes on."""
        if line.startswith(b"start "):
            for path in self._paths.values():
                path.start(float(line.split()[1]))
        return bool(line)

    def _take(self, port: _Port) -> None:
        path = port.path
        carry = path.up if port.way == "up" else path.down
        for _ in range(TURN):
            try:
                packet = os.read(port.tun, LONGEST)
            except (BlockingIOError, OSError):  # the device is not up yet, or gone
                return
            now = time.monotonic()
            due = carry(packet, now)
            if due is None:
                continue
            if due[0] <= now:
                self._write(port.other, due[1])
            elif len(self._waiting) < MAX_WAITING:
                self._n += 1
                heapq.heappush(self._waiting, (due[0], self._n, port.other, due[1]))

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            due, _, where, packet = heapq.heappop(self._waiting)
            self._write(where, packet)
            self._carried += 1
            self._late += now - due
            self._latest = max(self._latest, now - due)

    def _write(self, where: int, packet: bytes) -> None:
        try:
            os.write(where, packet)
        except OSError:  # full, or not up: lost, as on any link
            return

    def report(self) -> RelayReport:
        return RelayReport(
            paths=tuple(
                PathReport(key=key, counts=path.counts.as_dict()) for key, path in self._paths.items()
            ),
            late=self._late / max(1, self._carried),
            latest=self._latest,
            cpu=time.process_time(),
        )

    def close(self) -> None:
        self._selector.close()
        for tun in self._tuns:
            os.close(tun)


def main() -> None:
    plan = msgspec.json.decode(_read_line(0), type=RelayPlan)
    relay = Relay(plan)
    try:
        _say(b"ready")
        relay.run(0)
        _say(msgspec.json.encode(relay.report()))
    finally:
        relay.close()


def _read_line(file: int) -> bytes:
    """Byte by byte would be slow, and what follows the line must stay in the pipe: nothing follows until `ready`."""
    line = b""
    while not line.endswith(b"\n"):
        more = os.read(file, 1 << 16)
        if not more:
            raise SystemExit("no plan")
        line += more
    return line


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
