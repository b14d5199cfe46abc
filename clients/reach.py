"""Opening connections: the shell around `clients.addresses.Race`. All tasks end with the call that started them, or
are cancelled and on their way out by then."""

from __future__ import annotations

import asyncio
import functools
import itertools
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, TypeVar

from clients.addresses import Abandon, Address, Hints, Race, Try

# Of the IP addresses of one host (RFC 8305 5: 250 ms, families by turns). A host with hundreds is not tried to the
# end.
SAME_HOST: Final = Hints(stagger=0.25, parallel=4, attempt=5.0)
MOST_OF_A_HOST: Final = 6

News = asyncio.Future[tuple[Address, ...]]


class Line(asyncio.Protocol):
    """What is opened."""

    __slots__ = ()

    def discard(self) -> None:
        """It is not needed: another was quicker."""
        raise NotImplementedError


L = TypeVar("L", bound=Line)


class Unreachable(OSError):
    """Nothing of a list could be opened; the message says why, address by address."""


async def open_first(
    race: Race, connect: Callable[[Address], Awaitable[L]], news: News | None = None
) -> tuple[Address, L]:
    """The first that `connect` opens. `news`: a better list that may come meanwhile. Raises Unreachable;
    `race.failures` has what counts against an address in any case."""
    loop = asyncio.get_running_loop()
    attempts: dict[asyncio.Future[L], Address] = {}
    try:
        while True:
            for action in race.tick(loop.time()):
                match action:
                    case Try(address):
                        attempts[asyncio.ensure_future(connect(address))] = address
                    case Abandon(address):
                        _end(attempts, next(task for task, its in attempts.items() if its == address))
            if race.over and news is None:
                raise Unreachable(_explain(race))
            await _wait(attempts, news, race.deadline)
            if news is not None and news.done():
                race.extend(news.result())
                news = None
            for task in [task for task in attempts if task.done()]:
                address = attempts.pop(task)
                try:
                    line = task.result()
                except (OSError, ValueError) as error:  # ValueError: a host that is no host
                    race.failed(address, str(error) or type(error).__name__, loop.time())
                else:
                    race.opened(address, loop.time())
                    return address, line
    finally:
        for task in list(attempts):
            _end(attempts, task)


def _explain(race: Race) -> str:
    return "; ".join(f"{address}: {why}" for address, why in race.failures.items()) or "there is no address"


async def _wait(attempts: Iterable[asyncio.Future[L]], news: News | None, deadline: float | None) -> None:
    timeout = None if deadline is None else max(0.0, deadline - asyncio.get_running_loop().time())
    waited: set[asyncio.Future[Any]] = set(attempts)
    if news is not None:
        waited.add(news)
    await asyncio.wait(waited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


def _end(attempts: dict[asyncio.Future[L], Address], task: asyncio.Future[L]) -> None:
    del attempts[task]
    task.cancel()
    task.add_done_callback(_discard)


def _discard(task: asyncio.Future[L]) -> None:
    """Opened in the very moment in which it was given up, maybe."""
    if not task.cancelled() and task.exception() is None:
        task.result().discard()


async def connect(address: Address, make: Callable[[], L], tls: ssl.SSLContext | None) -> L:
    """Open a connection to a host by the first of its IP addresses that answers. `make` gives the protocol, whose
    connection_made is called when it may speak. `tls` None: without. Raises OSError, or ValueError for a host that
    is none."""
    one = functools.partial(_connect_literal, make=make, tls=tls)
    if address.literal:
        return await one(address)
    race = Race(await _resolve(address), SAME_HOST, asyncio.get_running_loop().time())
    return (await open_first(race, one))[1]


async def _connect_literal(address: Address, *, make: Callable[[], L], tls: ssl.SSLContext | None) -> L:
    name = address.name or address.host
    open_socket = functools.partial(
        asyncio.get_running_loop().create_connection,
        host=address.host,
        port=address.port,
        ssl=tls,
        server_hostname=None if tls is None else name,
    )
    line = make()
    if address.transport in ("tcp", "tls"):
        await open_socket(lambda: line)
        return line
    from clients.websocket import WebSocketLine  # a device on TCP does not need it

    around = WebSocketLine(name, address.port, address.secret, line)
    await open_socket(lambda: around)
    try:
        await around.opened
    except BaseException:  # CancelledError too: another address was quicker
        around.abort()
        raise
    return line


async def _resolve(address: Address) -> list[Address]:
    """By families in turns, that of the system's first choice before the other. Raises OSError."""
    infos = await asyncio.get_running_loop().getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    families: dict[int, list[Address]] = {}
    for family, _kind, _protocol, _name, where in infos:
        families.setdefault(family, []).append(address.at(str(where[0])))
    turns = itertools.chain.from_iterable(itertools.zip_longest(*families.values()))
    return [literal for literal in turns if literal is not None][:MOST_OF_A_HOST]
