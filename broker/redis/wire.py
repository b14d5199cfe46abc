"""One connection to one Redis server: bytes out, answers in the order of the requests, pushes of RESP3 aside.

hiredis parses and packs. No task and no stream of its own: `data_received` hands the answers over.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, TypeAlias, cast

import hiredis

from broker.redis.address import Address, RedisUrl

Argument: TypeAlias = str | bytes | int | float
CONNECT_TIMEOUT: Final = 5.0  # seconds, with the handshake
ANSWER_TIMEOUT: Final = (
    10.0  # seconds without an answer that is owed: longer than a busy disk takes for an fsync
)
KEEPALIVE: Final = (
    (socket.TCP_KEEPIDLE, 5),
    (socket.TCP_KEEPINTVL, 2),
    (socket.TCP_KEEPCNT, 3),
    (
        socket.TCP_USER_TIMEOUT,
        5_000,
    ),  # ms in which the peer's kernel must confirm: a host that vanished does not
)

pack: Final[Callable[[tuple[Argument, ...]], bytes]] = hiredis.pack_command  # type: ignore[assignment]
_NOTHING: Final = object()


class Refused(Exception):
    """The server answered the handshake with an error."""


class Asked(Protocol):
    """Requests that were sent together."""

    count: int

    def done(self, answers: list[Any]) -> None:
        """All are answered; errors are among the answers."""

    def lost(self, reason: str) -> None:
        """The connection ended before. They may have been carried out."""


class _One:
    __slots__ = ("future",)
    count = 1

    def __init__(self, future: asyncio.Future[Any]) -> None:
        self.future = future

    def done(self, answers: list[Any]) -> None:
        if not self.future.done():
            self.future.set_result(answers[0])

    def lost(self, reason: str) -> None:
        if not self.future.done():
            self.future.set_exception(ConnectionResetError(reason))


class Connection(asyncio.Protocol):
    """Use `connect`. `on_lost` is called once, with the reason; `on_push` with each push of RESP3."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.on_lost: Callable[[str], None] | None = None
        self.on_push: Callable[[Sequence[Any]], None] | None = None
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self._retired = False
        self._ended = self._loop.create_future()
        self._reader = hiredis.Reader(notEnoughData=_NOTHING)
        self._transport: asyncio.WriteTransport
        self._asked: deque[Asked] = deque()
        self._answers: list[Any] = []  # of the first of them
        self._heard_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._reason = "it closed the connection"

    def send(self, data: bytes, asked: Asked) -> None:
        if not self._asked:
            self._heard_at = self._loop.time()
            if self._timer is None:
                self._timer = self._loop.call_later(ANSWER_TIMEOUT, self._check)
        self._asked.append(asked)
        self._transport.write(data)

    def ask(self, *words: Argument) -> asyncio.Future[Any]:
        """One request. Its answer may be a hiredis.ReplyError; raises ConnectionResetError."""
        future = self._loop.create_future()
        if self.closed:
            future.set_exception(ConnectionResetError(self._reason))
        else:
            self.send(pack(words), _One(future))
        return future

    def tell(self, data: bytes) -> None:
        """Send what has no answer, only pushes."""
        self._transport.write(data)

    def abort(self, reason: str) -> None:
        self._reason = reason
        self._transport.abort()

    def close(self) -> None:
        """What is not answered is lost."""
        self.abort("the connection was closed")

    async def ended(self) -> None:
        """Return when it is closed."""
        await asyncio.shield(self._ended)

    def retire(self) -> None:
        """Close it when everything is answered."""
        self._retired = True
        if not self._asked:
            self.close()

    def _check(self) -> None:
        self._timer = None
        if self._asked:
            late = self._heard_at + ANSWER_TIMEOUT - self._loop.time()
            if late <= 0:
                self.abort(f"it did not answer in {ANSWER_TIMEOUT:.0f} s")
            else:
                self._timer = self._loop.call_later(late, self._check)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's does not say that it is one
        _keep_alive(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        self._reader.feed(data)
        try:
            while (answer := self._reader.gets()) is not _NOTHING:
                self._take(answer)
        except hiredis.ProtocolError as error:
            self.abort(f"it does not speak Redis's protocol: {error}")

    def _take(self, answer: Any) -> None:
        if type(answer) is hiredis.PushNotification:
            if self.on_push is not None:
                self.on_push(answer)
            return
        if not self._asked:
            self.abort("it answered what nobody asked")
            return
        asked, answers = self._asked[0], self._answers
        answers.append(answer)
        if len(answers) == asked.count:
            self._asked.popleft()
            self._answers = []
            asked.done(answers)
            if self._retired and not self._asked:
                self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._ended.set_result(None)
        if exc is not None:
            self._reason = str(exc)
        if self._timer is not None:
            self._timer.cancel()
        lost, self._asked = self._asked, deque()
        for asked in lost:
            asked.lost(self._reason)
        if self.on_lost is not None:
            self.on_lost(self._reason)


def _keep_alive(sock: socket.socket | None) -> None:
    """A host that vanished is noticed within some ten seconds, also where nothing is asked of it (the bus)."""
    if sock is not None and sock.family in {socket.AF_INET, socket.AF_INET6}:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


async def connect(
    address: Address, url: RedisUrl, tls: ssl.SSLContext | None = None, *, pushes: bool = False
) -> Connection:
    """Open one and log in. `pushes`: RESP3. Raises OSError, TimeoutError or Refused."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(CONNECT_TIMEOUT):
        _, connection = await loop.create_connection(lambda: Connection(address), *address, ssl=tls)
        try:
            await _log_in(connection, url, pushes)
        except BaseException:
            connection.close()
            raise
    return connection


async def _log_in(connection: Connection, url: RedisUrl, pushes: bool) -> None:
    requests: list[tuple[Argument, ...]] = []
    if url.password:
        requests.append(("AUTH", url.user, url.password) if url.user else ("AUTH", url.password))
    if pushes:
        requests.append(("HELLO", 3))
    if url.database:
        requests.append(("SELECT", url.database))
    for request in requests:
        answer = await connection.ask(*request)
        if isinstance(answer, hiredis.ReplyError):
            raise Refused(str(answer))
