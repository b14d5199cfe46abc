"""Where devices come in: TCP, TLS and WebSocket, all in front of the same `Connection`."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from gateway.connection import FROM_NODES, Connection
from gateway.node import Node
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


async def listen_tcp(
    node: Node, host: str, port: int, certificate: Certificate | None = None, *, shared: bool = False
) -> asyncio.Server:
    """`shared`: other processes listen there, too."""
    listener = "tls" if certificate else "tcp"
    context = certificate.context if certificate else None
    return await _listen(
        lambda: Connection(node, listener), host, port, context, node.settings.connect_timeout, shared=shared
    )


async def listen_to_nodes(node: Node, host: str) -> asyncio.Server:
    """For connections that other nodes carry here, on any free port: they have been through those nodes' doors."""
    return await _listen(lambda: Connection(node, FROM_NODES), host, 0, None, shared=False)


async def listen_websocket(
    node: Node, host: str, port: int, origins: str = SAME_ORIGIN, *, shared: bool = False
) -> asyncio.Server:
    """`origins`: the pages that may connect, as `mqtt.ws_origins` has it."""
    factory = WebSocketFactory(
        lambda: Connection(node, "ws"),
        node.settings.max_packet_size,
        node.count_refusal,
        origins=origins,
    )
    return await _listen(factory, host, port, None, shared=shared)


async def _listen(
    factory: Callable[[], asyncio.Protocol],
    host: str,
    port: int,
    context: ssl.SSLContext | None,
    handshake_timeout: float | None = None,
    *,
    shared: bool,
) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    # A peer that never finishes its handshake is not a connection yet, and no other deadline holds it.
    timeout = handshake_timeout if context else None
    return await loop.create_server(
        factory,
        host,
        port,
        ssl=context,
        backlog=BACKLOG,
        ssl_handshake_timeout=timeout,
        reuse_port=shared or None,
    )


def address_of(server: asyncio.Server) -> str:
    """`host:port` of a listening socket."""
    return format_address(server.sockets[0].getsockname())


def format_address(name: Sequence[Any]) -> str:
    """`host:port`, or `[host]:port` for IPv6, of a socket's name."""
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
