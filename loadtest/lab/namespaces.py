"""Network namespaces: made, set up, entered, and all gone at the end. Root only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
HOME: Final = Path("/run/netns")  # where `ip netns` keeps them
END_LIMIT: Final = 5.0  # seconds that what still runs in a namespace has to end after SIGTERM

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(Exception):
    """A namespace could not be made or set up; the message has what `ip` said."""


def why_not() -> str:
    """What keeps the lab from running here; "" if nothing does."""
    if os.geteuid() != 0:
        return "the lab makes network namespaces, which only root may"
    if shutil.which("ip") is None:
        return "the command ip is missing; as root: apt-get install iproute2"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun: the kernel has no TUN devices"
    return ""


@contextlib.contextmanager
def entered(name: str) -> Iterator[None]:
    """This thread is in the namespace meanwhile. Sockets that it opens and processes that it starts stay there."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(HOME / name, os.O_RDONLY)
    try:
        _set(there)
        yield
    finally:
        _set(before)
        os.close(there)
        os.close(before)


def _set(namespace: int) -> None:
    if _libc.setns(namespace, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Namespaces:
    """As a context: those that were made are deleted at its end, and what still runs in them is ended first."""

    def __init__(self, prefix: str) -> None:
        """`prefix` of all names, so that nobody else's are touched."""
        self._prefix = prefix
        self._names: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def make(self, name: str) -> str:
        """Its full name. Its loopback is up."""
        full = f"{self._prefix}-{name}"
        _ip("netns", "add", full)
        self._names.append(full)
        self.set_up(full, ["link set lo up"])
        return full

    def set_up(self, name: str, commands: Sequence[str]) -> None:
        """Commands of `ip`, without the `ip`."""
        _ip("-n", name, "-batch", "-", script="\n".join(commands))

    def close(self) -> None:
        _end(_processes(self._names))
        for name in self._names:
            with contextlib.suppress(NamespaceError):
                _ip("netns", "del", name)
        self._names.clear()


def _ip(*arguments: str, script: str | None = None) -> None:
    done = subprocess.run(["ip", *arguments], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NamespaceError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _processes(names: Sequence[str]) -> list[int]:
    """All that are in one of these namespaces, found in one look at /proc."""
    spaces = {_identity(HOME / name) for name in names if (HOME / name).exists()}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours to ask
            if _identity(process / "ns/net") in spaces:
                found.append(int(process.name))
    return found


def _identity(namespace: Path) -> tuple[int, int]:
    stat = namespace.stat()
    return stat.st_dev, stat.st_ino


def _end(pids: Sequence[int]) -> None:
    """Those that do not end by SIGTERM are killed."""
    deadline = time.monotonic() + END_LIMIT
    _signal(pids, signal.SIGTERM)
    while (left := [pid for pid in pids if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal(left, signal.SIGKILL)


def _runs(pid: int) -> bool:
    """What has ended, and whose parent did not notice yet, does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
