"""MQTT over TLS: the handshake and the records, around an ordinary protocol.

`TlsTransport` stands between a socket and the `asyncio.Protocol` that also serves plain TCP. To the socket it is the
protocol, to that protocol the transport, and OpenSSL is in between (decision 0028).

    WAITING   nothing has come: there is no TLS object yet
    .. SHAKING -> OPEN     the handshake is done
    .. OPEN    -> ENDED    our close_notify is written; what still comes is thrown away
    any        -> CLOSED   the socket is closed or closing

OpenSSL reads from and writes to memory BIOs, and one pair of them serves all connections of a listener. What must
always hold: between two calls of the event loop both are empty. OpenSSL takes all there is before it says that it
wants more, and keeps the beginning of a record itself; what it wrote is taken out at once. So a connection that is
idle costs this object and OpenSSL's own, and no buffer.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from gateway.layer import Bytes, Layer

MAX_RECORD: Final = 16_384  # bytes of plain text in one record (RFC 8446 5.1)


class Phase(enum.IntEnum):
    WAITING = 0
    SHAKING = 1
    OPEN = 2
    ENDED = 3
    CLOSED = 4


class Refusal(enum.StrEnum):
    """What `on_refused` is told; the set is closed, so it may be a metric's label. The peer gets TLS's own alert."""

    HANDSHAKE = "bad TLS handshake"
    RECORD = "bad TLS record"


@dataclass(frozen=True, slots=True)
class TlsFactory:
    """Of one listener; everything on one event loop's thread."""

    context: ssl.SSLContext
    on_refused: Callable[[str], None]  # gets a Refusal, on the event loop
    incoming: ssl.MemoryBIO = field(default_factory=ssl.MemoryBIO)
    outgoing: ssl.MemoryBIO = field(default_factory=ssl.MemoryBIO)
    plain: memoryview = field(default_factory=lambda: memoryview(bytearray(MAX_RECORD)))

    def around(self, protocol: asyncio.Protocol) -> TlsTransport:
        return TlsTransport(self, protocol)


class TlsTransport(Layer):
    """One TLS connection. What is written before the handshake is done, or after `close`, is lost. It is not
    half-open: when the peer has ended, so do we."""

    __slots__ = ("_factory", "_phase", "_tls")

    def __init__(self, factory: TlsFactory, protocol: asyncio.Protocol) -> None:
        super().__init__(protocol)
        self._factory = factory
        self._tls: ssl.SSLObject  # from the first byte to the end
        self._phase = Phase.WAITING

    # From the event loop

    def data_received(self, data: bytes) -> None:
        factory = self._factory
        if self._phase > Phase.OPEN:
            return
        if self._phase is Phase.WAITING:
            self._tls = factory.context.wrap_bio(factory.incoming, factory.outgoing, server_side=True)
            self._phase = Phase.SHAKING
        factory.incoming.write(data)
        pieces: list[bytes] = []
        try:
            ended = self._decrypt(pieces)
        except ssl.SSLError:
            self._refuse(pieces)
            return
        finally:
            factory.incoming.read()  # what follows an end or a mistake is nobody's
        self._deliver(pieces)
        if ended:
            self._end()

    def _decrypt(self, pieces: list[bytes]) -> bool:
        """What came, into `pieces`; whether the peer's close_notify was behind it. Raises ssl.SSLError."""
        incoming, plain, read = self._factory.incoming, self._factory.plain, self._tls.read
        try:
            if self._phase is Phase.SHAKING:
                self._tls.do_handshake()
                self._phase = Phase.OPEN
            while incoming.pending:
                size: int = read(MAX_RECORD, plain)  # type: ignore[assignment]  # typeshed: bytes, always
                if not size:
                    return True
                pieces.append(bytes(plain[:size]))
        except ssl.SSLWantReadError:
            pass  # a record, or the handshake, goes on with the next read
        except ssl.SSLZeroReturnError:
            return True
        return False

    def _deliver(self, pieces: list[bytes]) -> None:
        """First what TLS itself has to say, and then what came, in one piece."""
        self._flush()
        if pieces:
            self._inner.data_received(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def _refuse(self, pieces: list[bytes]) -> None:
        """What came before the mistake is good; what the protocol behind answers cannot be sent any more."""
        self._factory.on_refused(Refusal.HANDSHAKE if self._phase is Phase.SHAKING else Refusal.RECORD)
        self._phase = Phase.ENDED
        self._deliver(pieces)
        self.close()

    def _end(self) -> None:
        if self._phase <= Phase.OPEN:
            self._inner.eof_received()
            self.close()

    def eof_received(self) -> bool:
        self._end()
        return False  # close

    def connection_lost(self, exc: Exception | None) -> None:
        self._phase = Phase.CLOSED
        if hasattr(self, "_tls"):
            del self._tls  # 15 KB that would wait for the garbage collector
        self._inner.connection_lost(exc)

    # From the protocol behind

    def write(self, data: Bytes) -> None:
        if self._phase is not Phase.OPEN or not data:
            return
        try:
            sent = self._tls.write(data)
            self._flush()
            while sent < len(data):  # a record at a time
                sent += self._tls.write(memoryview(data)[sent : sent + MAX_RECORD])
                self._flush()
        except ssl.SSLError:  # TLS has failed, and its records are of no use to the peer
            self.abort()

    def _flush(self) -> None:
        records = self._factory.outgoing.read()
        if records:
            self._transport.write(records)

    def can_write_eof(self) -> bool:
        return self._phase is Phase.OPEN

    def write_eof(self) -> None:
        """The peer may read what it was sent, to the end; what it sends is thrown away."""
        if self._phase is Phase.OPEN:
            self._say_goodbye()
            self._phase = Phase.ENDED
            self._transport.write_eof()

    def close(self) -> None:
        """The peer's close_notify is not waited for (RFC 8446 6.1)."""
        if self._phase is Phase.OPEN:
            self._say_goodbye()
        if self._phase is not Phase.CLOSED:
            self._close_socket()

    def _say_goodbye(self) -> None:
        with contextlib.suppress(ssl.SSLError):  # among them: that the peer's has not come
            self._tls.unwrap()
        self._flush()

    def _close_socket(self) -> None:
        self._phase = Phase.CLOSED
        self._transport.close()

    def abort(self) -> None:
        self._phase = Phase.CLOSED
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._phase > Phase.OPEN or self._transport.is_closing()

    def resume_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()
