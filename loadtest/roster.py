"""A million registered devices in a file: who they are follows from their number, their tokens lie side by side.

A process that plays some of them reads a token when it needs it, so it holds none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from loadtest.fleet import connect_packet
from loadtest.http_pool import HttpPool
from loadtest.publishing import UNAVAILABLE, check_accepted

TOKEN_SIZE: Final = 40
NAME_SIZE: Final = 16
IMPORTED: Final = 1000  # devices in one call
IMPORTS_IN_FLIGHT: Final = 4
IMPORT_LIMIT: Final = 1800.0  # seconds for all
REFUSALS: Final = 20  # calls that the store may fail to take
SPREAD: Final = 0x9E3779B97F4A7C15  # odd, so no two numbers below 2**64 get one name

Describe = Callable[[int], dict[str, Any]]
"""A device's number -> its properties in an import, but for its registration id."""


def name_of(device: int) -> str:
    """The registration id of a device."""
    return f"{device * SPREAD % 2**64:016x}"


@dataclass(frozen=True, slots=True)
class Roster:
    app_key: str
    count: int
    tokens: Path  # TOKEN_SIZE bytes a device


class Connects:
    """The CONNECT packets of a roster's devices."""

    def __init__(self, roster: Roster, keep_alive: int, versions: Sequence[int]) -> None:
        """Device n speaks `versions[n % len(versions)]`."""
        self._fd = os.open(roster.tokens, os.O_RDONLY)
        self.versions = tuple(versions)
        self._parts = [_cut(roster.app_key, keep_alive, version) for version in versions]

    def close(self) -> None:
        os.close(self._fd)

    def version(self, device: int) -> int:
        return self.versions[device % len(self.versions)]

    def packet(self, device: int) -> bytes:
        head, middle = self._parts[device % len(self._parts)]
        return head + name_of(device).encode() + middle + os.pread(self._fd, TOKEN_SIZE, device * TOKEN_SIZE)


def _cut(app_key: str, keep_alive: int, version: int) -> tuple[bytes, bytes]:
    """What stands before the name and between name and token, which is the end: all of them are of one length."""
    name, token = "~" * NAME_SIZE, "!" * TOKEN_SIZE
    packet = connect_packet(app_key, name, token, version, keep_alive=keep_alive)
    head, _, rest = packet.partition(name.encode())
    middle, _, after = rest.partition(token.encode())
    assert not after
    return head, middle


def enroll(pool: HttpPool, app_key: str, count: int, tokens: Path, describe: Describe) -> Roster:
    """Register `count` devices, a thousand in a call, and keep their tokens in the new file `tokens`.

    Raises PushRefused with the server's answer, TimeoutError after IMPORT_LIMIT.
    """
    with tokens.open("xb") as file:
        os.truncate(file.fileno(), count * TOKEN_SIZE)
        _Enrolment(pool, count, file.fileno(), describe).run()
    return Roster(app_key, count, tokens)


class _Enrolment:
    """Calls in flight, each of which is followed by the next. One that the store could not take is made again: an
    import may be."""

    def __init__(self, pool: HttpPool, count: int, fd: int, describe: Describe) -> None:
        self._pool = pool
        self._count = count
        self._fd = fd
        self._describe = describe
        self._starts: Iterator[int] = iter(range(0, count, IMPORTED))
        self._left = -(-count // IMPORTED)
        self._patience = REFUSALS

    def run(self) -> None:
        for _ in range(IMPORTS_IN_FLIGHT):
            self._send_next()
        what = f"{self._count:,} devices registered"
        self._pool.reactor.run_until(lambda: not self._left, what, IMPORT_LIMIT)

    def _send_next(self) -> None:
        start = next(self._starts, None)
        if start is not None:
            self._send(start)

    def _send(self, start: int) -> None:
        numbers = range(start, min(start + IMPORTED, self._count))
        devices = [{"registration_id": name_of(n)} | self._describe(n) for n in numbers]
        request = self._pool.build("POST", "/v1/devices/import", orjson.dumps({"devices": devices}))
        self._pool.send(request, lambda status, body: self._take(start, status, body))

    def _take(self, start: int, status: int, body: bytes) -> None:
        if status == UNAVAILABLE and self._patience:
            self._patience -= 1
            self._send(start)
            return
        check_accepted(status, body)
        tokens = "".join(device["token"] for device in orjson.loads(body)["devices"])
        os.pwrite(self._fd, tokens.encode(), start * TOKEN_SIZE)
        self._left -= 1
        self._send_next()
