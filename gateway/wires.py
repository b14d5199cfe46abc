"""Plain TCP without the event loop's transports: one epoll for all devices of a node, and 200 bytes for each.

A transport of uvloop takes 1.2 KB: buffers, handles and weak references that an idle device has no use for. Here a
connection is a `Wire`: a socket, its protocol, and a backlog while the peer does not read. To its protocol a wire is
an `asyncio.Transport`: what may be called, and what is called back and when, is as there.

What must always hold: a wire is in the epoll for just what it waits for, and out of it while that is nothing (a
connection that was reset would be reported again and again); `connection_lost` comes in a later turn than whatever
ended the connection, and nothing comes after it.
"""

from __future__ import annotations

import asyncio
import select
import socket
from typing import Any, Final

from gateway.acceptor import Socket

AT_ONCE: Final = 256  # wires that are read in one turn of the loop, about 2 ms
READ_SIZE: Final = 4096  # bytes: what most devices say at once
LARGE_READ: Final = 262_144  # bytes: who said so much at once says more
HIGH_WATER: Final = 65_536  # bytes not sent, above which the protocol is told to pause
LEFT: Final = select.EPOLLRDHUP  # beside EPOLLIN: the peer has closed its side
READ: Final = select.EPOLLIN | LEFT
WRITE: Final = select.EPOLLOUT
OPEN, ENDING, CLOSING, LOST = range(4)
"""ENDING: nothing more is written, and the peer is told so once all is sent. CLOSING: once all is sent it is closed.
LOST: it is over."""


class Wires:
    """Those of one event loop. There is no epoll before the first."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._epoll: select.epoll | None = None
        self._wires: list[Wire | None] = []  # by file descriptor

    def close(self) -> None:
        """Whatever is still connected is let go without a word."""
        if self._epoll is not None and not self._epoll.closed:
            self.loop.remove_reader(self._epoll)
            self._epoll.close()
        for wire in self._wires:
            if wire is not None:
                wire.socket.close()
        self._wires.clear()

    def connect(self, connected: Socket, protocol: asyncio.Protocol, peer: Any = None) -> None:
        """Make a wire of a socket that does not block, which is the wire's from then on. `peer`: the name of the
        socket's other end, where the caller knows it."""
        Wire(self, connected, protocol).start(peer)

    def add(self, wire: Wire) -> None:
        if self._epoll is None:
            self._epoll = select.epoll()
            self.loop.add_reader(self._epoll, self._ready)
        fd = wire.socket.fileno()
        if fd >= len(self._wires):
            self._wires.extend([None] * (fd + 1 - len(self._wires)))
        self._wires[fd] = wire

    def remove(self, wire: Wire) -> None:
        if self._wires:  # or all are closed
            self._wires[wire.socket.fileno()] = None

    def watch(self, wire: Wire, before: int, events: int) -> None:
        """For `events` instead of those `before`."""
        assert self._epoll is not None
        if self._epoll.closed:
            return
        if not before:
            self._epoll.register(wire.socket, events)
        elif events:
            self._epoll.modify(wire.socket, events)
        else:
            self._epoll.unregister(wire.socket)

    def _ready(self) -> None:
        assert self._epoll is not None
        wires = self._wires
        for fd, events in self._epoll.poll(0, AT_ONCE):
            wire = wires[fd]
            if wire is None:
                continue  # closed in this turn
            try:
                if events & LEFT:
                    wire.left = True
                if events & WRITE:
                    wire.flush()
                if events & ~WRITE and wire.is_reading():
                    wire.read()
            except Exception as error:  # noqa: BLE001 (an error of ours; no other device is to suffer from it)
                wire.fail(error)


class Wire(asyncio.Transport):
    """A connected socket that does not block. `start` it once."""

    __slots__ = (
        "_backlog",
        "_events",
        "_high",
        "_paused",
        "_peer",
        "_protocol",
        "_state",
        "_wires",
        "left",
        "socket",
    )

    def __init__(self, wires: Wires, connected: Socket, protocol: asyncio.Protocol) -> None:
        self._wires = wires
        self._protocol = protocol
        self.socket = connected
        self._backlog: bytearray | None = None  # not sent yet
        self._high = HIGH_WATER
        self._events = 0  # that it is in the epoll for
        self._paused = False  # the protocol was told to pause
        self._state = OPEN
        self.left = False  # the peer had closed its side when something of it was read last
        self._peer: Any = None  # its name, while the connection is being made: kept, it would take 140 bytes

    def start(self, peer: Any = None) -> None:
        self._peer = peer
        self._wires.add(self)
        self._watch(READ)
        self._protocol.connection_made(self)
        self._peer = None

    # For the protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        try:
            match name:
                case "socket":
                    return self.socket
                case "peername":
                    return self._peer or self.socket.getpeername()
                case "sockname":
                    return self.socket.getsockname()
                case "left":
                    return self.left or (not self.is_reading() and _has_left(self.socket))
        except OSError:  # it is not connected any more
            pass
        return default

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol

    def get_protocol(self) -> asyncio.Protocol:
        return self._protocol

    def is_closing(self) -> bool:
        return self._state >= CLOSING

    def pause_reading(self) -> None:
        self._watch(self._events & ~READ)

    def resume_reading(self) -> None:
        if self._state < CLOSING:
            self._watch(self._events | READ)

    def is_reading(self) -> bool:
        return bool(self._events & READ)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """`low` is a quarter of `high`, whatever is asked."""
        self._high = HIGH_WATER if high is None else high

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._high // 4, self._high

    def get_write_buffer_size(self) -> int:
        return len(self._backlog) if self._backlog else 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._state != OPEN:
            return
        if self._backlog is None:
            try:
                sent = self.socket.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self._lose(error)
                return
            if sent == len(data):
                return
            self._backlog = bytearray(data[sent:])
            self._watch(self._events | WRITE)
        else:
            self._backlog += data
        if not self._paused and len(self._backlog) > self._high:
            self._paused = True
            self._protocol.pause_writing()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if self._state == OPEN:
            self._state = ENDING
            self._end_if_sent()

    def close(self) -> None:
        if self._state < CLOSING:
            self._state = CLOSING
            self.pause_reading()
            self._end_if_sent()

    def abort(self) -> None:
        self._lose(None)

    # For the epoll

    def read(self) -> None:
        """There may be something."""
        try:
            data = self.socket.recv(READ_SIZE)
            if len(data) == READ_SIZE:
                data += self._read_on()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        if data:
            self._protocol.data_received(data)
        elif self._protocol.eof_received():
            self.pause_reading()
        else:
            self.close()

    def _read_on(self) -> bytes:
        try:
            return self.socket.recv(LARGE_READ)
        except (BlockingIOError, InterruptedError):
            return b""

    def flush(self) -> None:
        """There may be room for the backlog."""
        if self._backlog is None:
            return
        try:
            del self._backlog[: self.socket.send(self._backlog)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        left = len(self._backlog)
        if not left:
            self._backlog = None
            self._watch(self._events & ~WRITE)
            self._end_if_sent()
        if self._paused and left <= self._high // 4:
            self._paused = False
            self._protocol.resume_writing()

    def fail(self, error: Exception) -> None:
        """The protocol raised it."""
        context = {"message": "a connection failed", "exception": error, "protocol": self._protocol}
        self._wires.loop.call_exception_handler(context)
        self._lose(error)

    def _watch(self, events: int) -> None:
        if events != self._events:
            self._wires.watch(self, self._events, events)
            self._events = events

    def _end_if_sent(self) -> None:
        if self._backlog is not None:
            return
        if self._state == CLOSING:
            self._lose(None)
        elif self._state == ENDING:
            try:
                self.socket.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._lose(error)

    def _lose(self, error: Exception | None) -> None:
        """`connection_lost` is called in the next turn."""
        if self._state != LOST:
            self._state = LOST
            self._backlog = None
            self._watch(0)
            self._wires.loop.call_soon(self._lost, error)

    def _lost(self, error: Exception | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self._wires.remove(self)
            self.socket.close()


def _has_left(connected: Socket) -> bool:
    """Whether the peer has closed its side by now: while nothing is read, the epoll does not tell."""
    look = select.poll()
    look.register(connected.fileno(), select.POLLRDHUP)
    return bool(look.poll(0))
