"""A million registered devices in a file: who they are follows from their number, their tokens lie side by side.

A process that plays some of them reads a token when it needs it, so it holds none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import orjson

from gateway.mqtt import Connect, Subscribe, Subscription, encode
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
PUSH: Final = "push"
FOREIGN_TOPIC: Final = "loadtest/"  # what follows has NAME_SIZE characters
EVERYONE: Final = "broadcast-to-all"

Describe = Callable[[int], dict[str, Any]]
"""A device's number -> its properties in an import, but for its registration id."""


def name_of(device: int) -> str:
    """The registration id of a device."""
    return f"{device * SPREAD % 2**64:016x}"


class Roster(msgspec.Struct, frozen=True, tag="registered"):
    """Devices that `enroll` registered."""

    app_key: str
    count: int
    tokens: Path  # TOKEN_SIZE bytes a device
    first: int = 0  # device n has the name of `first` + n

    def name(self, device: int) -> str:
        return name_of(self.first + device)


class Listed(msgspec.Struct, frozen=True, tag="listed"):
    """Devices whose names and tokens somebody gave."""

    app_key: str
    devices: tuple[tuple[str, str], ...]  # registration id, token

    def name(self, device: int) -> str:
        return self.devices[device][0]


class Strangers(msgspec.Struct, frozen=True, tag="strangers"):
    """Clients of another broker than Holdfast: each subscribes to a topic of its own and to that of all."""

    username: str | None = None
    password: str | None = None
    first: int = 0

    def name(self, device: int) -> str:
        return name_of(self.first + device)

    def topic(self, device: int | None) -> str:
        """Of all, if it is None. All are of one length."""
        return FOREIGN_TOPIC + (EVERYONE if device is None else self.name(device))


Who = Roster | Listed | Strangers


class Connects(Protocol):
    """What devices say when they come. Device n speaks `versions[n % len(versions)]`."""

    topic_size: int  # of all that they receive

    def version(self, device: int) -> int: ...

    def packet(self, device: int) -> bytes:
        """CONNECT."""
        ...

    def subscribe(self, device: int) -> bytes:
        """SUBSCRIBE; nothing, where CONNECT is enough."""
        ...


class _Versions:
    def __init__(self, versions: Sequence[int]) -> None:
        self.versions = tuple(versions)

    def version(self, device: int) -> int:
        return self.versions[device % len(self.versions)]


class _Ours(_Versions):
    topic_size = len(PUSH)

    def subscribe(self, device: int) -> bytes:
        return b""


class RosterConnects(_Ours):
    def __init__(self, roster: Roster, keep_alive: int, versions: Sequence[int]) -> None:
        super().__init__(versions)
        self._roster = roster
        self._fd = os.open(roster.tokens, os.O_RDONLY)
        self._parts = [_cut(roster.app_key, keep_alive, version) for version in versions]

    def close(self) -> None:
        os.close(self._fd)

    def packet(self, device: int) -> bytes:
        head, middle = self._parts[device % len(self._parts)]
        token = os.pread(self._fd, TOKEN_SIZE, device * TOKEN_SIZE)
        return head + self._roster.name(device).encode() + middle + token


class ListedConnects(_Ours):
    def __init__(self, listed: Listed, keep_alive: int, versions: Sequence[int]) -> None:
        super().__init__(versions)
        self._listed = listed
        self._keep_alive = keep_alive

    def packet(self, device: int) -> bytes:
        name, token = self._listed.devices[device]
        version = self.version(device)
        return connect_packet(self._listed.app_key, name, token, version, keep_alive=self._keep_alive)


class StrangerConnects(_Versions):
    topic_size = len(FOREIGN_TOPIC) + NAME_SIZE

    def __init__(self, strangers: Strangers, keep_alive: int, versions: Sequence[int]) -> None:
        super().__init__(versions)
        self._strangers = strangers
        self._keep_alive = keep_alive

    def packet(self, device: int) -> bytes:
        who = self._strangers
        version = self.version(device)
        packet = Connect(
            who.name(device),
            clean_start=True,
            keep_alive=self._keep_alive,
            username=who.username,
            password=None if who.password is None else who.password.encode(),
            version=version,
        )
        return encode(packet, version)

    def subscribe(self, device: int) -> bytes:
        filters = (self._strangers.topic(None), self._strangers.topic(device))
        return encode(Subscribe(1, tuple(Subscription(one, 1) for one in filters)), self.version(device))


def connects_of(who: Who, keep_alive: int, versions: Sequence[int]) -> Connects:
    match who:
        case Roster():
            return RosterConnects(who, keep_alive, versions)
        case Listed():
            return ListedConnects(who, keep_alive, versions)
        case Strangers():
            return StrangerConnects(who, keep_alive, versions)


def _cut(app_key: str, keep_alive: int, version: int) -> tuple[bytes, bytes]:
    """What stands before the name and between name and token, which is the end: all of them are of one length."""
    name, token = "~" * NAME_SIZE, "!" * TOKEN_SIZE
    packet = connect_packet(app_key, name, token, version, keep_alive=keep_alive)
    head, _, rest = packet.partition(name.encode())
    middle, _, after = rest.partition(token.encode())
    assert not after
    return head, middle


def enroll(
    pool: HttpPool, app_key: str, count: int, tokens: Path, describe: Describe, *, first: int = 0
) -> Roster:
    """Register `count` devices, a thousand in a call, and keep their tokens in the new file `tokens`. Those that
    exist get new tokens. `describe` gets numbers from 0 on, whatever `first` is.

    Raises PushRefused with the server's answer, TimeoutError after IMPORT_LIMIT.
    """
    roster = Roster(app_key, count, tokens, first)
    with tokens.open("xb") as file:
        os.truncate(file.fileno(), count * TOKEN_SIZE)
        _Enrolment(pool, roster, file.fileno(), describe).run()
    return roster


class _Enrolment:
    """Calls in flight, each of which is followed by the next. One that the store could not take is made again: an
    import may be."""

    def __init__(self, pool: HttpPool, roster: Roster, fd: int, describe: Describe) -> None:
        self._pool = pool
        self._name = roster.name
        self._count = count = roster.count
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
        devices = [{"registration_id": self._name(n)} | self._describe(n) for n in numbers]
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
