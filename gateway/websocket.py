"""MQTT over WebSocket (MQTT5-6.0.0, RFC 6455): the HTTP upgrade and the frames, around an ordinary protocol.

`WebSocketTransport` stands between a socket and the `asyncio.Protocol` that also serves plain TCP. To the
socket it is the protocol, to that protocol the transport: one object, so that an idle WebSocket costs
little more than TCP. The handshake, frame syntax, masking and close codes are those of the `websockets`
library; what it builds for them is dropped as soon as it has answered, and a frame parser is kept only
while half a frame has arrived (decision 0005).

    OPENING   -> UPGRADED   the HTTP request was good, 101 is written
    UPGRADED  -> OPEN       our side wrote for the first time: its CONNACK
    .. OPEN   -> CLOSING    our Close frame is written, the peer's is awaited
    .. CLOSING-> DEAF       the peer broke a rule: Close is written, what still comes is thrown away
    any       -> CLOSED     the socket is closed or closing

MQTT packets may span or share frames (MQTT5-6.0.0-2, MQTT311-6.0.0-2), so fragments are passed on as they
come and a message is never assembled. What comes after OPEN ends within `close_timeout`, whatever the peer
does.
"""

from __future__ import annotations

import asyncio
import enum
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Final, TypeAlias

from websockets.datastructures import Headers
from websockets.exceptions import InvalidUpgrade, NegotiationError, PayloadTooBig, ProtocolError
from websockets.frames import Close, CloseCode, Frame, Opcode
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol
from websockets.streams import StreamReader
from websockets.typing import Subprotocol

from gateway.layer import Bytes, Layer

try:
    from websockets.speedups import apply_mask
except ImportError:  # no wheel for this machine
    from websockets.utils import apply_mask

PATH: Final = "/mqtt"
SUBPROTOCOLS: Final = (
    Subprotocol("mqtt"),
    Subprotocol("mqttv3.1"),
)  # MQTT5-6.0.0-3; the second: MQTT 3.1 clients
SAME_ORIGIN: Final = "same"
ANY_ORIGIN: Final = "any"
MAX_HANDSHAKE_SIZE: Final = 8192  # bytes of HTTP request: a peer that never ends its headers
MAX_FIRST_FRAME_SIZE: Final = 65_536  # until CONNACK: a stranger that makes us hold frames of the full size
MAX_FIRST_FRAMES: Final = (
    256  # in one read until CONNACK, about 2 ms: a stranger whose empty frames hold up all
)
MAX_PONG_BACKLOG: Final = 65_536  # bytes waiting to be sent: a peer that pings and does not read
CLOSE_TIMEOUT: Final = 2.0  # for the closing handshake: a peer that never answers Close, or does not read it
MASK_SIZE: Final = 4
SHORT_HEADER_SIZE: Final = 2 + MASK_SIZE
MAX_SHORT_PAYLOAD: Final = 125  # above, the length takes two or eight bytes more (RFC 6455 5.2)
FINAL_BINARY: Final = 0x80 | Opcode.BINARY
MASKED: Final = 0x80


class Phase(enum.IntEnum):
    OPENING = 0
    UPGRADED = 1
    OPEN = 2
    CLOSING = 3
    DEAF = 4
    CLOSED = 5


class Refusal(enum.StrEnum):
    """What `on_refused` is told; the set is closed, so it may be a metric's label."""

    #                             what the peer gets
    PATH = "websocket path"  # 404
    ORIGIN = "websocket origin"  # 403
    SUBPROTOCOL = "websocket subprotocol"  # 400
    NO_UPGRADE = "not a websocket"  # 426
    BAD_HANDSHAKE = "bad websocket handshake"  # 400, or 405 or 505 where the library tells them apart
    LONG_HANDSHAKE = "websocket handshake too large"  # 431
    TEXT = "websocket text frame"  # 1003, MQTT5-6.0.0-1
    BAD_FRAME = "bad websocket frame"  # 1002
    LONG_FRAME = "websocket frame too large"  # 1009
    MANY_FRAMES = "too many websocket frames"  # 1008


class _Ended(Exception):
    """The peer's side of the WebSocket is over."""

    def __init__(self, code: int, refusal: Refusal | None = None) -> None:
        super().__init__(code)
        self.code = code  # for our Close frame
        self.refusal = refusal  # None: it sent Close


@dataclass(frozen=True, slots=True)
class WebSocketFactory:
    """Pass it to `loop.create_server`, with `ssl=` or without.

    `make_protocol` is called once for each accepted socket. Its product gets `connection_made` at once,
    before the HTTP request: its own connect deadline covers the upgrade too, by `close` or `abort`, so a
    silent socket needs no timer here.
    """

    make_protocol: Callable[[], asyncio.Protocol]
    max_frame_size: int  # bytes of payload: the largest MQTT packet allowed
    on_refused: Callable[[str], None]  # gets a Refusal, on the event loop
    path: str = PATH
    origins: str = SAME_ORIGIN  # as mqtt.ws_origins has it: "same", "any", or a list with commas
    close_timeout: float = CLOSE_TIMEOUT

    def __call__(self) -> WebSocketTransport:
        return self.around(self.make_protocol())

    def around(self, protocol: asyncio.Protocol) -> WebSocketTransport:
        return WebSocketTransport(self, protocol)


class WebSocketTransport(Layer):
    """One WebSocket. All calls on the event loop's thread.

    `write` and `writelines` send one binary frame each; what is written before the upgrade or after `close`
    is lost. `data_received` of the protocol behind gets what one read brought, never empty.
    """

    __slots__ = ("_close_timer", "_factory", "_in_message", "_phase", "_unfinished")

    def __init__(self, factory: WebSocketFactory, protocol: asyncio.Protocol) -> None:
        super().__init__(protocol)
        self._factory = factory
        self._phase = Phase.OPENING
        self._unfinished: bytes | _UnfinishedFrame | None = None  # HTTP request, later a frame
        self._in_message = False  # a fragment has come, the last one has not
        self._close_timer: asyncio.TimerHandle | None = None

    # From the event loop

    def data_received(self, data: bytes) -> None:
        if self._phase is Phase.OPEN and self._unfinished is None and not self._in_message:
            size = len(data) - SHORT_HEADER_SIZE
            if 0 < size <= MAX_SHORT_PAYLOAD and data[0] == FINAL_BINARY and data[1] == MASKED | size:
                # One whole short frame, as most reads are: 8 µs less than the library's parser.
                self._inner.data_received(apply_mask(data[SHORT_HEADER_SIZE:], data[2:SHORT_HEADER_SIZE]))
                return
        if self._phase is Phase.OPENING:
            self._take_request(data)
        elif self._phase < Phase.DEAF:
            self._take_frames(data)

    def eof_received(self) -> bool:
        if self._phase < Phase.CLOSING:
            self._inner.eof_received()
        return False  # close: a WebSocket is not half-open

    def connection_lost(self, exc: Exception | None) -> None:
        self._phase = Phase.CLOSED
        self._unfinished = None
        if self._close_timer is not None:
            self._close_timer.cancel()
        self._inner.connection_lost(exc)

    # From the protocol behind

    def write(self, data: Bytes) -> None:
        if self._phase is Phase.UPGRADED:
            self._phase = Phase.OPEN
        if self._phase is Phase.OPEN:
            self._transport.write(binary_header(len(data)) + data)

    def close(self) -> None:
        if self._phase is Phase.OPENING:
            self._close_socket()
        elif not self.is_closing():
            self._send_close(CloseCode.NORMAL_CLOSURE)
            self._leave(Phase.CLOSING)
            self._transport.resume_reading()  # or the peer's Close would not come

    def abort(self) -> None:
        self._phase = Phase.CLOSED
        self._transport.abort()

    def can_write_eof(self) -> bool:
        return False  # the WebSocket has a closing handshake of its own

    def is_closing(self) -> bool:
        return self._phase > Phase.OPEN or self._transport.is_closing()

    def resume_reading(self) -> None:
        if not self.is_closing():
            self._transport.resume_reading()

    # The upgrade

    def _take_request(self, data: bytes) -> None:
        received = self._unfinished + data if isinstance(self._unfinished, bytes) else data
        end = received.find(b"\r\n\r\n") + 4
        if end > MAX_HANDSHAKE_SIZE or (end < 4 and len(received) > MAX_HANDSHAKE_SIZE):
            self._unfinished = None
            self._answer(_too_long(), Refusal.LONG_HANDSHAKE)
        elif end < 4:
            self._unfinished = received
        else:
            self._unfinished = None
            self._answer(*decide(received[:end], self._factory.path, self._factory.origins))
            if end < len(received) and self._phase is Phase.UPGRADED:
                self._take_frames(received[end:])

    def _answer(self, response: Response, refusal: Refusal | None) -> None:
        self._transport.write(response.serialize())
        if refusal is None:
            self._phase = Phase.UPGRADED
        else:
            self._factory.on_refused(refusal)
            self._close_socket()

    # Frames

    def _take_frames(self, data: bytes) -> None:
        payloads: list[bytes] = []
        ended: _Ended | None = None
        try:
            for count, frame in enumerate(self._read_frames(data)):
                if count == MAX_FIRST_FRAMES and self._phase is Phase.UPGRADED:
                    raise _Ended(CloseCode.POLICY_VIOLATION, Refusal.MANY_FRAMES)
                self._take_frame(frame, payloads)
        except _Ended as reason:
            ended = reason
        received = b"".join(payloads)
        # Before the end: a DISCONNECT often shares its read with Close, and a will must not be published then.
        if received and self._phase < Phase.CLOSING:
            self._inner.data_received(received)
        if ended is not None:
            self._end(ended)

    def _read_frames(self, data: bytes) -> Iterator[Frame]:
        reader, parser = self._unfinished if isinstance(self._unfinished, tuple) else (StreamReader(), None)
        self._unfinished = None
        reader.feed_data(data)
        while parser is not None or reader.buffer:
            if parser is None:
                parser = Frame.parse(reader.read_exact, mask=True, max_size=self._frame_limit())
            frame = _advance(parser)
            if frame is None:
                self._unfinished = (reader, parser)
                return
            parser = None
            yield frame

    def _frame_limit(self) -> int:
        limit = self._factory.max_frame_size
        return min(limit, MAX_FIRST_FRAME_SIZE) if self._phase is Phase.UPGRADED else limit

    def _take_frame(self, frame: Frame, payloads: list[bytes]) -> None:
        match frame.opcode:
            case Opcode.BINARY | Opcode.CONT:
                if (frame.opcode is Opcode.CONT) is not self._in_message:
                    raise _Ended(CloseCode.PROTOCOL_ERROR, Refusal.BAD_FRAME)  # RFC 6455 5.4
                self._in_message = not frame.fin
                payloads.append(bytes(frame.data))
            case Opcode.TEXT:
                raise _Ended(CloseCode.UNSUPPORTED_DATA, Refusal.TEXT)  # MQTT5-6.0.0-1
            case Opcode.PING:
                self._pong(frame)
            case Opcode.CLOSE:
                raise _closed_by_peer(frame)

    def _pong(self, ping: Frame) -> None:
        """A peer that has many unread answers gets fewer: RFC 6455 5.5.3 allows it."""
        if self._phase < Phase.CLOSING and self._transport.get_write_buffer_size() < MAX_PONG_BACKLOG:
            self._transport.write(Frame(Opcode.PONG, ping.data).serialize(mask=False))

    # The end

    def _end(self, ended: _Ended) -> None:
        if self._phase is Phase.CLOSED:
            return
        if self._phase < Phase.CLOSING:
            self._send_close(ended.code)
            if ended.refusal is not None:
                self._factory.on_refused(ended.refusal)
        if ended.refusal is None:
            self._close_socket()
        else:
            # A closed socket with unread data would be reset, and our Close might never be read.
            self._leave(Phase.DEAF)

    def _send_close(self, code: int) -> None:
        told = b"" if code == CloseCode.NO_STATUS_RCVD else Close(code, "").serialize()
        self._transport.write(Frame(Opcode.CLOSE, told).serialize(mask=False))

    def _close_socket(self) -> None:
        self._leave(Phase.CLOSED)
        self._transport.close()

    def _leave(self, phase: Phase) -> None:
        self._phase = phase
        if self._close_timer is None:
            loop = asyncio.get_running_loop()
            self._close_timer = loop.call_later(self._factory.close_timeout, self._transport.abort)


_FrameParser: TypeAlias = Generator[None, None, Frame]
_UnfinishedFrame: TypeAlias = tuple[StreamReader, _FrameParser]


def decide(request: bytes, path: str, origins: str = SAME_ORIGIN) -> tuple[Response, Refusal | None]:
    """The answer to a whole HTTP request: 101, or an error and the reason for it."""
    protocol = ServerProtocol(
        subprotocols=SUBPROTOCOLS, extensions=None
    )  # no deflate: it keeps 32 KiB windows
    # Beyond ASCII nothing here has a meaning, and the library would log a stranger's byte as an error of its own.
    protocol.receive_data(request.decode("ascii", "replace").encode("ascii", "replace"))
    events = protocol.events_received()
    if not events:
        text = f"{protocol.handshake_exc}: {protocol.handshake_exc.__cause__}\n"  # type: ignore[union-attr]
        return protocol.reject(HTTPStatus.BAD_REQUEST, text), Refusal.BAD_HANDSHAKE
    upgrade = events[0]
    assert isinstance(upgrade, Request)
    if upgrade.path.partition("?")[0] != path:
        return protocol.reject(HTTPStatus.NOT_FOUND, f"MQTT is at {path}\n"), Refusal.PATH
    if not is_welcome(upgrade.headers, origins):
        return protocol.reject(HTTPStatus.FORBIDDEN, "this page may not connect\n"), Refusal.ORIGIN
    response = protocol.accept(upgrade)
    if response.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
        return response, None
    response.headers["Sec-WebSocket-Version"] = "13"  # RFC 6455 4.2.2
    return response, _refusal(protocol.handshake_exc)


def is_welcome(headers: Headers, origins: str) -> bool:
    """Whether the page that asks may connect (RFC 6455 10.2). Browsers let any page open a WebSocket to any server,
    and say in Origin which it is; who says nothing is no browser."""
    told = headers.get_all("Origin")
    if not told or origins == ANY_ORIGIN:
        return True
    if len(told) > 1:
        return False
    if origins != SAME_ORIGIN:
        return told[0] in _listed(origins)
    origin, host = _ORIGIN.fullmatch(told[0]), _HOST.fullmatch(", ".join(headers.get_all("Host")))
    return origin is not None and host is not None and origin[1].lower() == host[1].lower()


_NAME: Final = (
    r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(?::\d+)?"  # the port is another one: pages are not served on ours
)
_HOST: Final = re.compile(_NAME, re.ASCII)
_ORIGIN: Final = re.compile(rf"[A-Za-z][\w+.-]*://{_NAME}", re.ASCII)


@lru_cache(maxsize=4)
def _listed(origins: str) -> frozenset[str]:
    return frozenset(origin.strip() for origin in origins.split(","))


def _refusal(error: Exception | None) -> Refusal:
    match error:
        case NegotiationError():
            return Refusal.SUBPROTOCOL
        case InvalidUpgrade():
            return Refusal.NO_UPGRADE
        case _:
            return Refusal.BAD_HANDSHAKE


def _too_long() -> Response:
    text = f"the request has more than {MAX_HANDSHAKE_SIZE} bytes of headers\n"
    return ServerProtocol().reject(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text)


def _advance(parser: _FrameParser) -> Frame | None:
    """None: the rest of the frame has not come yet."""
    try:
        next(parser)
    except StopIteration as done:
        frame: Frame = done.value
        return frame
    except PayloadTooBig as error:
        raise _Ended(CloseCode.MESSAGE_TOO_BIG, Refusal.LONG_FRAME) from error
    except ProtocolError as error:
        raise _Ended(CloseCode.PROTOCOL_ERROR, Refusal.BAD_FRAME) from error
    return None


def _closed_by_peer(frame: Frame) -> _Ended:
    try:
        return _Ended(Close.parse(bytes(frame.data)).code)
    except (ProtocolError, UnicodeDecodeError):
        return _Ended(CloseCode.PROTOCOL_ERROR, Refusal.BAD_FRAME)


@lru_cache(maxsize=1024)
def binary_header(length: int) -> bytes:
    """The bytes before an unmasked binary payload, made by the library once for each length."""
    frame = Frame(Opcode.BINARY, bytes(length)).serialize(mask=False)
    return frame[: len(frame) - length]
