"""What /proc says of the whole machine: memory of processes and of the kernel's sockets; a stop before it ends."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtest.swarms import Status

KB: Final = 1024
GB: Final = 1 << 30
PAGE: Final = os.sysconf("SC_PAGE_SIZE")
LEAST: Final = 3 * GB // 2  # available memory below which a run stops
SHOWN: Final = 5.0  # seconds between two lines of progress where they cannot overwrite each other


class OutOfRoom(Exception):
    """The machine has too little memory left to go on."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, of the machine."""

    available: int
    slab: int  # kernel objects: sockets, their files, inodes and epoll entries among them
    tcp: int  # buffers of TCP sockets
    sockets: int  # TCP sockets that are allocated, both ends

    @property
    def kernel(self) -> int:
        return self.slab + self.tcp


def read_memory() -> Memory:
    info = dict(re.findall(r"(?m)^(\w+): +(\d+) kB", Path("/proc/meminfo").read_text()))
    tcp = re.search(r"(?m)^TCP: .* alloc (\d+) mem (\d+)", Path("/proc/net/sockstat").read_text())
    assert tcp is not None
    return Memory(
        available=int(info["MemAvailable"]) * KB,
        slab=int(info["Slab"]) * KB,
        tcp=int(tcp[2]) * PAGE,
        sockets=int(tcp[1]),
    )


def pss(pids: Iterable[int]) -> int:
    """Bytes of these processes, a page they share counted by its share; those that ended count nothing."""
    total = 0
    for pid in pids:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found = re.search(r"(?m)^Pss: +(\d+) kB", rollup)
        total += int(found[1]) * KB if found else 0
    return total


def family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


class Guard:
    """Shows one line of progress that lives, and stops a run that would end the machine."""

    def __init__(self, what: str, least: int = LEAST) -> None:
        self.what = what
        self._least = least
        self._live = sys.stderr.isatty()
        self._shown_at = 0.0

    def show(self, status: Status) -> None:
        """Raises OutOfRoom."""
        self.check()
        now = time.perf_counter()
        if self._live or now - self._shown_at >= SHOWN:
            self._shown_at = now
            self.say(f"{self.what}: {status.line()}; {read_memory().available / GB:.1f} GB left")

    def say(self, text: str) -> None:
        begin, end = ("\r\x1b[K", "") if self._live else ("", "\n")
        sys.stderr.write(f"{begin}{time.strftime('%H:%M:%S')} {text}{end}")
        sys.stderr.flush()

    def check(self) -> None:
        """Raises OutOfRoom."""
        available = read_memory().available
        if available < self._least:
            raise OutOfRoom(f"{self.what}: only {available / GB:.1f} GB of memory are left")
