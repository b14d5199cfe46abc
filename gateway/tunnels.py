"""Connections of apps that are at home on another node: their bytes pass through here (decision 0022)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, cast

OPEN_LIMIT: Final = 5.0  # seconds to reach the home


class _End(asyncio.Protocol):
    """One of a tunnel's two sockets: what comes in here goes out at the other."""

    __slots__ = ("other", "transport")

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _End | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class Tunnels:
    """Of one node."""

    def __init__(self) -> None:
        self._ends: set[_Edge] = set()

    def __len__(self) -> int:
        return len(self._ends)

    async def open(self, transport: asyncio.Transport, address: str, first: Callable[[], bytes]) -> bool:
        """Connect the peer with the home at host:port. `first` gives what the peer has said so far, and is asked when
        the home is reached; from a True on the transport is not the caller's own any more."""
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        home, edge = _End(), _Edge(self._ends)
        try:
            async with asyncio.timeout(OPEN_LIMIT):
                await loop.create_connection(lambda: home, host.strip("[]"), int(port))
        except (OSError, TimeoutError):
            return False
        if transport.is_closing() or home.transport is None:
            if home.transport is not None:
                home.transport.abort()
            return False
        home.other, edge.other = edge, home
        edge.connection_made(transport)
        self._ends.add(edge)
        transport.set_protocol(edge)
        home.transport.write(first())
        transport.resume_reading()
        return True

    def close(self) -> None:
        for end in list(self._ends):
            if end.transport is not None:
                end.transport.close()


class _Edge(_End):
    """The socket of the peer itself."""

    __slots__ = ("_ends",)

    def __init__(self, ends: set[_Edge]) -> None:
        super().__init__()
        self._ends = ends

    def connection_lost(self, exc: Exception | None) -> None:
        self._ends.discard(self)
        super().connection_lost(exc)
