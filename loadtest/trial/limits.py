"""What this machine allows, looked at before anything begins: open files, memory, ports, addresses."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from loadtest.fleet import SOURCES
from loadtest.machine import GB, read_memory
from loadtest.swarms import MOST_PROCESSES
from loadtest.trial.plan import TrialError

SPARE_FILES: Final = 500  # of a process, for what is no device
SERVER_FILES: Final = 1000  # of a server that we start
EACH: Final = 5000  # devices of a process, if nobody says how many processes
FEW: Final = 500  # devices for which another process is not worth it
TLS_DEVICE: Final = 24_000  # bytes of its SSL object here, with a short chain of certificates
PORT_USE: Final = 0.9  # share of the ports of an address: with more Linux searches long for a free one


def raise_file_limit() -> int:
    """As many open files as the system lets a process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def choose_processes(devices: int, files: int, cores: int) -> int:
    """One for each core, and more if the devices are many."""
    each = max(1, min(EACH, files - SPARE_FILES))
    return max(min(cores, -(-devices // FEW)), -(-devices // each))


def check_files(devices: int, processes: int, files: int, *, embedded: bool) -> None:
    """Raises TrialError."""
    each = -(-devices // processes)
    if each > files - SPARE_FILES:
        least = -(-devices // max(1, files - SPARE_FILES))
        raise TrialError(
            f"{each:,} devices in a process need more than the {files:,} files that it may have open: "
            f"--processes {least} or more, or raise the limit (ulimit -n)"
        )
    if embedded and devices > files - SERVER_FILES:
        raise TrialError(
            f"a server of our own may have {files:,} files open, too few for {devices:,} devices: "
            "raise the limit (ulimit -n), or name a --target"
        )


def check_memory(devices: int) -> None:
    """Of devices over TLS. Raises TrialError."""
    need, available = devices * TLS_DEVICE, read_memory().available
    if need > available:
        raise TrialError(
            f"{devices:,} devices over TLS need {need / GB:.1f} GB here, and {available / GB:.1f} GB are left: "
            "share them among several machines, with --first-device"
        )


def check_ports(devices: int, processes: int, sources: int | None) -> None:
    """`sources`: addresses that connections come from; None: loopback, where each process has its own. Raises
    TrialError."""
    if sources is None:
        if processes > MOST_PROCESSES:
            raise TrialError(f"{processes} processes are too many: {MOST_PROCESSES} at most")
        sources = SOURCES * processes
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    each = int((high - low + 1) * PORT_USE)
    if devices > each * max(1, sources):
        need = -(-devices // each)
        raise TrialError(
            f"{devices:,} connections to one address need {need} addresses of their own, each having {each:,} "
            "ports: name more with --source, or widen net.ipv4.ip_local_port_range"
        )


def check_sources(sources: Sequence[str]) -> None:
    """Each is an address of this machine. Raises TrialError."""
    for source in sources:
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as one:
            try:
                one.bind((source, 0))
            except OSError as error:
                raise TrialError(f"--source {source}: {error.strerror or error}") from None


def cores() -> int:
    return len(os.sched_getaffinity(0))
