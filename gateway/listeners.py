"""Where devices come in: TCP, TLS and WebSocket, all in front of the same `Connection`."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from gateway.acceptor import Acceptor
from gateway.connection import FROM_NODES, Connection
from gateway.node import Node
from gateway.proxy_listener import ProxiedConnection, ProxyListener
from gateway.proxy_protocol import Route
from gateway.tls import TlsFactory
from gateway.websocket import SAME_ORIGIN, WebSocketFactory

BACKLOG: Final = 4096  # connections the kernel holds for us in a reconnect storm; it may allow fewer


class TlsError(Exception):
    """The certificate or key cannot be used; the message names the file."""


class Certificate:
    """The server's certificate, which can change under live connections: a handshake uses what is loaded then."""

    def __init__(self, certificate: Path, private_key: Path) -> None:
        self._certificate = certificate
        self._private_key = private_key
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.options |= ssl.OP_NO_RENEGOTIATION  # a handshake is ours to pay, and once is enough
        self.context.num_tickets = 1  # each costs a signed and encrypted copy of the session
        self.context.set_alpn_protocols(["mqtt"])
        self.reload()

    def reload(self) -> None:
        """Read both files again. Raises TlsError, and goes on with the old ones."""
        trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            trial.load_cert_chain(
                self._certificate, self._private_key
            )  # a bad pair must not replace a good one
            self.context.load_cert_chain(self._certificate, self._private_key)
        except (OSError, ssl.SSLError) as error:
            raise TlsError(f"{self._certificate} and {self._private_key}: {error}") from error


class Listener(Protocol):
    """What accepts connections until it is closed; those that it made go on."""

    @property
    def sockets(self) -> Sequence[Any]: ...

    def close(self) -> None: ...


Wrap = Callable[[Connection], asyncio.Protocol]  # what the event loop talks to, around a connection


def listen_tcp(
    node: Node,
    host: str,
    port: int,
    certificate: Certificate | None = None,
    *,
    shared: bool = False,
    proxies: Sequence[str] = (),
) -> Listener:
    """`shared`: other processes listen there, too. `proxies`: networks of those whose connections begin with a PROXY
    header."""
    if certificate is None:
        return _listen(node, "tcp", _bare, host, port, shared=shared, proxies=proxies)
    wrap = TlsFactory(certificate.context, node.count_refusal).around
    return _listen(node, "tls", wrap, host, port, shared=shared, proxies=proxies)


def listen_to_nodes(node: Node, host: str) -> Listener:
    """For connections that other nodes carry here, on any free port: they have been through those nodes' doors."""
    return _listen(node, FROM_NODES, _bare, host, 0, shared=False)


def listen_websocket(
    node: Node,
    host: str,
    port: int,
    origins: str = SAME_ORIGIN,
    *,
    shared: bool = False,
    proxies: Sequence[str] = (),
) -> Listener:
    """`origins`: the pages that may connect, as `mqtt.ws_origins` has it; the rest as for `listen_tcp`."""
    factory = WebSocketFactory(
        lambda: Connection(node, "ws"),
        node.settings.max_packet_size,
        node.count_refusal,
        origins=origins,
    )
    return _listen(node, "ws", factory.around, host, port, shared=shared, proxies=proxies)


def _bare(connection: Connection) -> asyncio.Protocol:
    return connection


def _listen(
    node: Node,
    name: str,
    wrap: Wrap,
    host: str,
    port: int,
    *,
    shared: bool,
    proxies: Sequence[str] = (),
) -> Listener:
    def make(route: Route | None = None) -> asyncio.Protocol:
        return wrap(Connection(node, name) if route is None else ProxiedConnection(node, name, route))

    if proxies:
        return ProxyListener(node, bind(host, port, shared=shared), make, trusted=proxies)
    return Acceptor(bind(host, port, shared=shared), lambda one, peer: node.wires.connect(one, make(), peer))


def bind(host: str, port: int, *, shared: bool) -> list[socket.socket]:
    """A listening socket for each of the host's addresses; the first finds the number if it is 0. Raises OSError."""
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, place in socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            number = sockets[0].getsockname()[1] if sockets else port
            address = (place[0], number, *place[2:])
            sockets.append(socket.create_server(address, family=family, backlog=BACKLOG, reuse_port=shared))
    except OSError:
        for bound in sockets:
            bound.close()
        raise
    return sockets


def address_of(server: Listener) -> str:
    """`host:port` of a listening socket."""
    return format_address(server.sockets[0].getsockname())


def format_address(name: Sequence[Any]) -> str:
    """`host:port`, or `[host]:port` for IPv6, of a socket's name."""
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
