"""What the front asks a worker: its metrics, its health. A question is a line, the answer is all until the end.

The socket is in the abstract namespace: nothing is left behind by a worker that was killed, and no path is too long.
Who asks must be of the same user.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Final, cast

LONGEST: Final = 64  # bytes of a question
PATIENCE: Final = 2.0  # seconds for a question or an answer; Prometheus waits for ten

_CREDENTIALS: Final = struct.Struct("3i")  # of SO_PEERCRED: process, user, group


class Inquiries:
    """`answers`: a question, and what makes its answer. On the event loop."""

    def __init__(self, answers: Mapping[str, Callable[[], bytes]]) -> None:
        self.answers = answers
        self._server: asyncio.Server | None = None

    async def open(self, address: str) -> None:
        """`address`: without the leading NUL."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("\0" + address)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Inquiry(self.answers), sock=listener)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()


class _Inquiry(asyncio.Protocol):
    """One question."""

    def __init__(self, answers: Mapping[str, Callable[[], bytes]]) -> None:
        self._answers = answers
        self._question = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._transport.abort)
        if not _is_ours(transport.get_extra_info("socket")):
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._question += data
        if self._question.endswith(b"\n"):
            make = self._answers.get(self._question[:-1].decode("ascii", "replace"))
            self._transport.write(b"" if make is None else make())
            self._transport.close()
        elif len(self._question) > LONGEST:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()


def _is_ours(peer: socket.socket) -> bool:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(credentials)[1] == os.getuid())


async def inquire(address: str, question: str) -> bytes | None:
    """None: no answer came in time."""
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_unix_connection(sock=_connected(address))
            try:
                writer.write(question.encode() + b"\n")
                return await reader.read() or None
            finally:
                writer.close()
    except (TimeoutError, OSError):
        return None


def _connected(address: str) -> socket.socket:
    """Connecting to a Unix socket does not take time; and uvloop knows no abstract addresses."""
    connected = socket.socket(socket.AF_UNIX)
    connected.setblocking(False)
    try:
        connected.connect("\0" + address)
    except OSError:
        connected.close()
        raise
    return connected
