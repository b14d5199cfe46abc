"""Accepting, where the event loop is not to make its own transports of what comes."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

from broker.logs import log_event

ACCEPTS_AT_ONCE: Final = 64  # in one turn of the loop, about 1 ms
ACCEPT_PAUSE: Final = 1.0  # seconds without accepting when the system has no files or memory left

Socket: TypeAlias = socket.SocketType
"""What `socket.socket` is made of, without its Python half: as much as a device needs, in half the memory."""

STREAM: Final = int(socket.SOCK_STREAM)

log = logging.getLogger(__name__)


class Acceptor:
    """Takes connections on `sockets`, which listen, from the beginning until `close`. `take` gets each, set not to
    block, and the name of its peer, as `getpeername` has it. All on the event loop's thread."""

    def __init__(self, sockets: Sequence[socket.socket], take: Callable[[Socket, Any], None]) -> None:
        self.sockets = tuple(sockets)
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._resting: asyncio.TimerHandle | None = None
        for listening in self.sockets:
            listening.setblocking(False)
            # What is accepted inherits it. Packets are small: Nagle's algorithm would hold them back.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._start()

    def close(self) -> None:
        self._stop()
        if self._resting is not None:
            self._resting.cancel()
        for listening in self.sockets:
            listening.close()

    def _start(self) -> None:
        for listening in self.sockets:
            self._loop.add_reader(listening, self._accept, listening, int(listening.family))

    def _stop(self) -> None:
        for listening in self.sockets:
            self._loop.remove_reader(listening)

    def _accept(self, listening: socket.socket, family: int) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                # `accept` would make a `socket.socket` of it, and looks up two enums for that: 2 us.
                descriptor, peer = listening._accept()  # type: ignore[attr-defined]
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as error:
                self._rest(error)
                return
            accepted = Socket(family, STREAM, 0, descriptor)
            accepted.setblocking(False)
            self._take(accepted, peer)

    def _rest(self, error: OSError) -> None:
        """The kernel keeps those who come meanwhile."""
        log_event(log, logging.ERROR, "not accepting for a moment", reason=str(error))
        self._stop()
        self._resting = self._loop.call_later(ACCEPT_PAUSE, self._start)
