"""A listener behind proxies that speak the PROXY protocol (`mqtt.proxy_protocol`).

The listener of the event loop reads before anybody can look, and a TLS handshake begins with the first byte. So
sockets are accepted here. From one that a trusted proxy opened exactly the header is taken, and the rest stays in the
kernel; only then it becomes a connection like any other, over TCP, TLS or WebSocket. What others open is no matter of
ours: they are who their socket says, and a header of theirs is a broken packet.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

from broker.logs import log_event
from broker.tenants.networks import is_within
from gateway.acceptor import Acceptor, Socket
from gateway.connection import Connection
from gateway.node import Node
from gateway.proxy_protocol import MAX_HEADER, Endpoint, Header, ProxyError, Route, read_header

MAX_NOTES: Final = 100  # mistakes of proxies that are logged, each once

log = logging.getLogger(__name__)


class ProxiedConnection(Connection):
    """Of a peer that a proxy told us about."""

    __slots__ = ("_route",)

    def __init__(self, node: Node, listener: str, route: Route) -> None:
        super().__init__(node, listener)
        self._route = route

    @property
    def peer(self) -> Endpoint:
        return self._route.source

    @property
    def came_to(self) -> Endpoint:
        return self._route.destination

    @property
    def proxy(self) -> str:
        return self._route.destination[0]


class _Caller:
    """A socket of a proxy, until its header has come."""

    __slots__ = ("deadline", "host", "received", "socket")

    def __init__(self, accepted: Socket, host: str) -> None:
        self.socket = accepted
        self.host = host
        self.received = b""
        self.deadline: asyncio.TimerHandle | None = None

    def read(self) -> Header | None:
        """None: more is needed. Raises BlockingIOError, ProxyError, or another OSError: it is over."""
        seen = self.socket.recv(MAX_HEADER - len(self.received), socket.MSG_PEEK)
        if not seen:
            raise ConnectionResetError("closed before its header")
        header = read_header(self.received + seen)
        ours = len(seen) if header is None else header.size - len(self.received)
        self.received += self.socket.recv(ours)
        return header


class ProxyListener:
    """Listens from the beginning, on `sockets`, until `close`. All on the event loop's thread."""

    def __init__(
        self,
        node: Node,
        sockets: Sequence[socket.socket],
        make: Callable[[Route | None], asyncio.Protocol],
        *,
        trusted: Sequence[str],
    ) -> None:
        """`trusted`: networks of the proxies. `make` gives what serves a connection, of a peer that is where its
        socket says if there is no route."""
        self._node = node
        self._make = make
        self._trusted = tuple(trusted)
        self._loop = asyncio.get_running_loop()
        self._waiting: set[_Caller] = set()
        self._noted: set[tuple[str, str]] = set()
        self._acceptor = Acceptor(sockets, self._take)

    @property
    def sockets(self) -> Sequence[socket.socket]:
        return self._acceptor.sockets

    def close(self) -> None:
        """Connections that are made go on; who has not said who it is has to come again."""
        self._acceptor.close()
        for caller in list(self._waiting):
            self._drop(caller)

    def _take(self, accepted: Socket, peer: Any) -> None:
        host = peer[0]
        if not is_within(host, self._trusted):
            self._connect(accepted, None)
        elif len(self._waiting) >= self._node.settings.max_connecting:
            self._node.count_refusal("too many connections")
            accepted.close()
        else:
            self._listen_to(_Caller(accepted, host))

    # The header

    def _listen_to(self, caller: _Caller) -> None:
        self._waiting.add(caller)
        self._read(caller)
        if caller in self._waiting:  # most have said it all by now
            self._loop.add_reader(caller.socket, self._read, caller)
            caller.deadline = self._loop.call_later(self._node.settings.connect_timeout, self._late, caller)

    def _read(self, caller: _Caller) -> None:
        try:
            header = caller.read()
        except BlockingIOError:
            return
        except ProxyError as error:
            self._refuse(caller, str(error))
        except OSError:  # a look whether the port is open, or a reset
            self._drop(caller)
        else:
            if header is not None:
                self._forget(caller)
                self._connect(caller.socket, header.route)

    def _late(self, caller: _Caller) -> None:
        self._node.count_refusal("connect timeout")
        self._drop(caller)

    def _refuse(self, caller: _Caller, why: str) -> None:
        self._node.count_refusal("bad proxy header")
        if (caller.host, why) not in self._noted and len(self._noted) < MAX_NOTES:
            self._noted.add((caller.host, why))
            log_event(log, logging.WARNING, "bad proxy header", proxy=caller.host, reason=why)
        self._drop(caller)

    def _drop(self, caller: _Caller) -> None:
        self._forget(caller)
        caller.socket.close()

    def _forget(self, caller: _Caller) -> None:
        self._waiting.discard(caller)
        self._loop.remove_reader(caller.socket)
        if caller.deadline is not None:
            caller.deadline.cancel()

    def _connect(self, accepted: Socket, route: Route | None) -> None:
        """From here on it is a connection like any other."""
        self._node.wires.connect(accepted, self._make(route))
