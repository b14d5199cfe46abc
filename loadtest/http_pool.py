"""A lean HTTP/1.1 client: prebuilt requests over kept connections, one outstanding on each.

A general client costs more than the server under test; this one makes no objects per request but the answer.
"""

from __future__ import annotations

import socket
from base64 import b64encode
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import orjson

from loadtest.reactor import Reactor
from loadtest.server import Address
from loadtest.wires import Tls, why_of, wires_of

READ_SIZE: Final = 262_144
CONTENT_LENGTH: Final = b"content-length:"
NO_ANSWER: Final = 0  # instead of a status

Done = Callable[[int, bytes], None]  # gets status and body


class HttpError(Exception):
    """An answer that is not 200, or a connection that broke."""


class HttpPool:
    def __init__(
        self,
        reactor: Reactor,
        address: Address,
        connections: int,
        *,
        tls: Tls | None = None,
        user: str = "",
        password: str = "",
        again: bool = False,
        bears_loss: bool = False,
    ) -> None:
        """`again`: a request whose connection breaks is sent once more, instead of being an error. `bears_loss`: one
        that breaks, or cannot be made, is answered with the status NO_ANSWER and the reason; `tls` asks for that."""
        assert bears_loss or tls is None
        self.again = again
        self.bears_loss = bears_loss
        self.reactor = reactor
        self.address = address
        self.wires = wires_of(tls, [address])
        self._host = tls.server_name if tls else address[0]
        self._authorization = b64encode(f"{user}:{password}".encode()).decode()
        self._idle = [_HttpConnection(self) for _ in range(connections)]
        self._all = list(self._idle)
        self._queue: deque[tuple[bytes, Done]] = deque()

    def close(self) -> None:
        for connection in self._all:
            connection.close()

    def build(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of one request."""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: Basic {self._authorization}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def send(self, request: bytes, done: Done) -> None:
        """`done` is called from the reactor; requests wait while all connections are taken."""
        self._queue.append((request, done))
        if self._idle:
            self.free(self._idle.pop())

    @property
    def waiting(self) -> int:
        """Requests for which there is no connection yet."""
        return len(self._queue)

    def free(self, connection: _HttpConnection) -> None:
        """Let it begin what waits."""
        while self._queue:
            if connection.begin(*self._queue.popleft()):
                return
        self._idle.append(connection)

    def repeat(self, request: bytes, done: Done) -> None:
        """Before all that wait."""
        self._queue.appendleft((request, done))

    def call(self, method: str, path: str, body: object = None) -> Any:
        """One call, waited for; the answer's JSON. Raises HttpError unless it is 200."""
        answers: list[tuple[int, bytes]] = []
        raw = b"" if body is None else orjson.dumps(body)
        self.send(self.build(method, path, raw), lambda status, content: answers.append((status, content)))
        self.reactor.run_until(lambda: bool(answers), f"{method} {path}")
        status, content = answers[0]
        if status != 200:
            raise HttpError(f"{method} {path}: {status} {content[:500].decode(errors='replace')}")
        return orjson.loads(content) if content else None


class _HttpConnection:
    """Opened when it is first needed, and again if the server closed it in between."""

    __slots__ = ("_done", "_fd", "_pool", "_received", "_request", "_trouble", "_unsent")

    def __init__(self, pool: HttpPool) -> None:
        self._pool = pool
        self._fd = -1
        self._request = b""
        self._unsent = memoryview(b"")
        self._received = bytearray()
        self._trouble = ""  # why the connection will turn out to be broken
        self._done: Done | None = None

    def begin(self, request: bytes, done: Done) -> bool:
        """False: there is no connection, and `done` was told."""
        if self._fd < 0:
            try:
                self._open()
            except OSError as error:
                if not self._pool.bears_loss:
                    raise
                done(NO_ANSWER, why_of(error).encode())
                return False
        self._done = done
        self._request = request
        self._unsent = memoryview(request)
        self._flush()
        if self._unsent:
            self._watch()
        return True

    def close(self) -> None:
        if self._fd >= 0:
            self._pool.reactor.forget(self._fd)
            self._pool.wires.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        if self._pool.bears_loss:
            self._fd = self._pool.wires.open(self._pool.address, None)  # a host that is gone holds nobody up
        else:
            opened = socket.create_connection(self._pool.address)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            opened.setblocking(False)
            self._fd = opened.detach()
        self._pool.reactor.watch(self._fd, self._ready, urgent=True)

    def _flush(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self._pool.wires.write(self._fd, self._unsent) :]
        except BlockingIOError:
            return
        except OSError as error:
            self._trouble = self._trouble or why_of(error)  # reading ends it

    def _watch(self) -> None:
        """Until it can be read, or the rest of the request can be written."""
        writable = bool(self._unsent) and self._pool.wires.waits_to_write(self._fd)
        self._pool.reactor.rewatch(self._fd, self._ready, writable=writable, urgent=True)

    def _ready(self, fd: int) -> None:
        if self._unsent:
            self._flush()
            self._watch()
        try:
            data = self._pool.wires.read(fd, READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._trouble = self._trouble or why_of(error)
            data = b""
        if not data:
            self._lost()
            return
        self._received += data
        answer = read_answer(self._received)
        if answer is not None:
            self._answered(*answer)

    def _lost(self) -> None:
        self.close()
        self._received.clear()
        done, self._done = self._done, None
        trouble, self._trouble = self._trouble or "the connection was closed instead of an answer", ""
        if done is None:
            return
        if self._pool.bears_loss:
            self._pool.free(self)
            done(NO_ANSWER, trouble.encode())
            return
        if not self._pool.again:
            raise HttpError("the server closed the connection instead of an answer")
        self._pool.repeat(self._request, done)
        self._pool.free(self)

    def _answered(self, status: int, body: bytes) -> None:
        self._received.clear()
        done, self._done = self._done, None
        self._pool.free(self)
        if done is not None:
            done(status, body)


def read_answer(received: bytes | bytearray) -> tuple[int, bytes] | None:
    """Status and body of an answer with a Content-Length; None while it is incomplete. Raises HttpError for
    another."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = received[:end].lower()
    at = head.find(CONTENT_LENGTH) + len(CONTENT_LENGTH)
    if at < len(CONTENT_LENGTH):
        raise HttpError(f"an answer without Content-Length: {head[:200].decode(errors='replace')}")
    line_end = head.find(b"\r", at)
    size = int(head[at : line_end if line_end > 0 else end])
    if len(received) < end + 4 + size:
        return None
    return int(received[9:12]), bytes(received[end + 4 : end + 4 + size])
