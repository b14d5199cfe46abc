"""A device's connection over WebSocket (RFC 6455, MQTT5-6.0.0), for networks that let nothing else through.

`WebSocketLine` stands between a socket and the protocol that also speaks over plain TCP: to the socket it is the
protocol, to that protocol the transport. Packets and frames have nothing to do with each other (MQTT5-6.0.0-2).
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, cast

from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI

PATH: Final = "/mqtt"
MAX_FRAME: Final = 1 << 20  # bytes: a server that lost its mind


class WebSocketLine(asyncio.Protocol, asyncio.Transport):
    """`opened` is done when `inner` may speak; it raises OSError where the server wants no WebSocket."""

    def __init__(self, host: str, port: int, secure: bool, inner: asyncio.Protocol) -> None:
        asyncio.Transport.__init__(self)
        uri = WebSocketURI(secure, host, port, PATH, "", None, None)
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inner = inner
        self._frames = ClientProtocol(uri, subprotocols=[Subprotocol("mqtt")], max_size=MAX_FRAME)
        self._socket = cast("asyncio.Transport", None)

    # To the socket

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._socket = cast("asyncio.Transport", transport)
        self._frames.send_request(self._frames.connect())
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._frames.receive_data(data)
        for event in self._frames.events_received():
            if not isinstance(event, Frame):
                self._answered()
            elif event.opcode in (Opcode.BINARY, Opcode.CONT):
                self._inner.data_received(bytes(event.data))
        if self._frames.handshake_exc is not None:
            self._fail(str(self._frames.handshake_exc))
            return
        self._flush()
        if self._frames.close_expected():
            self._socket.close()

    def _answered(self) -> None:
        if self._frames.handshake_exc is None and not self.opened.done():
            self._inner.connection_made(self)
            self.opened.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.opened.done():
            self._inner.connection_lost(exc)
        else:
            self._fail("closed before the handshake" if exc is None else str(exc))

    def _fail(self, why: str) -> None:
        if not self.opened.done():
            self.opened.set_exception(ConnectionError(f"no WebSocket: {why}"))
            self.opened.exception()  # nobody may be waiting any more
        self._socket.abort()

    def _flush(self) -> None:
        for data in self._frames.data_to_send():
            if data:  # b"" asks for the end of our side, which the close of the socket is
                self._socket.write(data)

    # To who speaks MQTT

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self._frames.send_binary(bytes(data))
        self._flush()

    def close(self) -> None:
        if not self.is_closing():
            self._frames.send_close()
            self._flush()
            self._socket.close()

    def abort(self) -> None:
        self._socket.abort()

    def is_closing(self) -> bool:
        return self._socket.is_closing()

    def get_write_buffer_size(self) -> int:
        return self._socket.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._socket.get_extra_info(name, default)
