"""What stands between a socket and the protocol that serves it: to the one the protocol, to the other the transport.

Here is what a layer passes on unchanged. Layers may stand on each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, TypeAlias, cast

Bytes: TypeAlias = bytes | bytearray | memoryview


class Layer(asyncio.Transport, asyncio.Protocol):
    """All calls on the event loop's thread. The protocol behind gets `connection_made` at once, before any handshake
    of the layer: its own connect deadline covers that too, by `close` or `abort`."""

    __slots__ = ("_inner", "_transport")

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self._inner = protocol
        self._transport: asyncio.Transport

    # From the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._inner.connection_made(self)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    # From the protocol behind

    def writelines(self, list_of_data: Iterable[Bytes]) -> None:
        self.write(b"".join(list_of_data))

    def pause_reading(self) -> None:
        if not self.is_closing():
            self._transport.pause_reading()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._inner = cast("asyncio.Protocol", protocol)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._transport.set_write_buffer_limits(high, low)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)
