"""Thousands of simulated MQTT devices in one thread: each costs a file descriptor and two table entries.

A device here does what a device must (CONNECT, SUBSCRIBE, PUBACK for each PUBLISH, DISCONNECT), in the fewest
steps: one read, a look at the fixed header and the serial, one write of a ready-made PUBACK. All that a fleet
receives is on topics of one length, at QoS 0 or 1, and ends as a push does.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from gateway.mqtt import Connect, Disconnect, Puback, Suback, decode, encode
from loadtest.ledger import SERIAL_DIGITS
from loadtest.reactor import Reactor
from loadtest.server import Address

READ_SIZE: Final = 4096
KNOWN: Final = 64  # reads that are remembered: devices of one age get a broadcast in the same bytes
KNOWN_SIZE: Final = 1024
ACK_SIZE: Final = 4
AT_ONCE: Final = 256  # connections between SYN and CONNACK
KEEP_ALIVE: Final = 1200
CONNACK: Final = 0x20
PUBLISH: Final = 0x30
ANSWERS: Final = (0x40, 0xD0)  # PUBACK, PINGRESP
ALERT_TAIL: Final = len('"}}')
SOURCES: Final = (
    8  # addresses of one wave: with most of one's 28,000 ports taken, Linux searches 100 µs for one
)
IP_BIND_ADDRESS_NO_PORT: Final = 24  # linux/in.h; connect chooses the port

Take = Callable[[int, int], None]  # gets device index and serial
Other = Callable[[int, bytes], None]  # gets device index and a packet that is no PUBLISH

_PUBACK: Final = encode(Puback(1), 4)[:2]
_DISCONNECT: Final = encode(Disconnect(), 4)


class FleetError(Exception):
    """A device was refused or dropped, or got what it cannot read."""


def connect_packet(
    app_key: str,
    registration_id: str,
    token: str,
    version: int = 4,
    *,
    clean_start: bool = False,
    keep_alive: int = KEEP_ALIVE,
) -> bytes:
    """CONNECT of a device; one that keeps its session, unless `clean_start`."""
    packet = Connect(
        registration_id,
        clean_start=clean_start,
        keep_alive=keep_alive,
        username=app_key,
        password=token.encode(),
        version=version,
    )
    return encode(packet, version)


def open_socket(address: Address, source: str | None) -> int:
    """The fd of a connection that is being made, from the address `source`, None: whichever the kernel takes; nothing
    blocks. Raises OSError if it is known at once that nothing comes of it."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    # PUBACKs are small writes: Nagle's algorithm would hold them back for up to 40 ms.
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if source is not None:
        opened.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        opened.bind((source, 0))
    error = opened.connect_ex(address)
    if error not in (0, errno.EINPROGRESS):
        opened.close()
        raise OSError(error, os.strerror(error))
    return opened.detach()


def take_pushes(device: int, data: bytes, head: int, take: Take, other: Other) -> tuple[list[bytes], int]:
    """Each whole packet of `data`, the hot path of everything here: the PUBACKs to send, and where the rest begins.
    `head`: of a PUBLISH, bytes before the packet id."""
    acks = []
    start, size = 0, len(data)
    while size - start > 1:
        length, body = data[start + 1], start + 2
        if length >= 0x80:  # what comes here is shorter than 16 KB: two bytes at most
            if size - start < 3:
                break
            length, body = length & 0x7F | data[start + 2] << 7, start + 3
        end = body + length
        if end > size:
            break
        if data[start] & 0xF0 == PUBLISH:
            if data[start] & 6:  # QoS
                at = body + head
                acks.append(_PUBACK + data[at : at + 2])
            tail = end - ALERT_TAIL
            take(device, int(data[tail - SERIAL_DIGITS : tail]))
        else:
            other(device, data[start:end])
        start = end
    return acks, start


class Fleet:
    """Devices by index; `packets[i]` is the CONNECT of device i. `urgent` devices are those that measure time."""

    def __init__(
        self,
        reactor: Reactor,
        address: Address,
        packets: Sequence[bytes],
        take: Take,
        *,
        urgent: frozenset[int] = frozenset(),
        topic: str = "push",
    ) -> None:
        """`topic`: one as long as those of all messages."""
        self._reactor = reactor
        self._address = address
        self._packets = packets
        self._take = take
        self._urgent = urgent
        self._head = 2 + len(topic)
        self._device: dict[int, int] = {}  # fd -> index
        self._fd: dict[int, int] = {}  # and back
        self._partial: dict[int, bytes] = {}  # fd -> the beginning of a packet
        self._known: dict[bytes, tuple[tuple[int, ...], bytes]] = {}  # what came -> serials, PUBACKs
        self._todo: Iterator[int] = iter(())
        self._wave = 0
        self._opening = 0
        self._ungranted = 0
        self.acked = 0
        self.answers = 0  # to what devices said

    @property
    def online(self) -> int:
        return len(self._fd) - self._opening

    def connect(self, devices: Iterable[int], *, at_once: int = AT_ONCE, wave: int = 0) -> float:
        """Connect them all, `at_once` at a time; seconds from the first SYN to the last CONNACK. Each `wave`
        (0 to 255) has addresses of its own, so that ports in TIME_WAIT are in nobody's way."""
        started = time.perf_counter()
        self.begin(devices, at_once=at_once, wave=wave)
        self._reactor.run_until(lambda: not self._opening, "all devices online")
        return time.perf_counter() - started

    def begin(self, devices: Iterable[int], *, at_once: int = AT_ONCE, wave: int = 0) -> None:
        """Connect them while other things happen."""
        self._todo = itertools.chain(self._todo, devices)
        self._wave = wave
        for _ in range(at_once - self._opening):
            self._begin_next()

    def send(self, device: int, packet: bytes) -> None:
        """Something else that a device may say; its PUBACK or PINGRESP is no surprise."""
        os.write(self._fd[device], packet)

    def subscribe(self, packets: Mapping[int, bytes]) -> None:
        """Have each device send its SUBSCRIBE (3.1.1); all is granted when this returns."""
        todo = list(packets.items())
        for first in range(0, len(todo), AT_ONCE):
            for device, packet in todo[first : first + AT_ONCE]:
                fd = self._fd[device]
                self._reactor.rewatch(fd, self._answered, urgent=device in self._urgent)
                self._ungranted += 1
                os.write(fd, packet)
            self._reactor.run_until(lambda: not self._ungranted, "all subscriptions granted")

    def _answered(self, fd: int) -> None:
        """SUBACK came, perhaps with messages behind it."""
        data = self._partial.pop(fd, b"") + self._read(fd)
        found = decode(data, 0, 4, READ_SIZE)
        if found is None:
            self._partial[fd] = data
            return
        packet, end = found
        device = self._device[fd]
        if not isinstance(packet, Suback) or max(packet.reasons) > 2:
            raise FleetError(f"device {device} was not granted its subscriptions: {packet}")
        self._ungranted -= 1
        self._reactor.rewatch(fd, self._readable, urgent=device in self._urgent)
        if len(data) > end:
            self._take_packets(fd, data[end:])

    def disconnect(self, devices: Iterable[int]) -> None:
        """Say DISCONNECT and close."""
        for device in list(devices):
            fd = self._fd[device]
            os.write(fd, _DISCONNECT)
            self._drop(fd)

    def close(self) -> None:
        """Close without a word."""
        for fd in list(self._device):
            self._drop(fd)

    def _drop(self, fd: int) -> None:
        self._reactor.forget(fd)
        del self._fd[self._device.pop(fd)]
        self._partial.pop(fd, None)
        os.close(fd)

    def _begin_next(self) -> None:
        device = next(self._todo, None)
        if device is None:
            return
        fd = open_socket(self._address, f"127.1.{self._wave}.{1 + device % SOURCES}")
        self._device[fd], self._fd[device] = device, fd
        self._opening += 1
        try:
            os.write(fd, self._packets[device])  # over loopback the handshake is mostly done by now
        except BlockingIOError:
            self._reactor.watch(fd, self._connected, writable=True, urgent=device in self._urgent)
        else:
            self._reactor.watch(fd, self._welcomed, urgent=device in self._urgent)

    def _connected(self, fd: int) -> None:
        device = self._device[fd]
        os.write(fd, self._packets[device])
        self._reactor.rewatch(fd, self._welcomed, urgent=device in self._urgent)

    def _welcomed(self, fd: int) -> None:
        """CONNACK came, perhaps with what is owed behind it."""
        data = self._partial.pop(fd, b"") + self._read(fd)
        end = 2 + data[1] if len(data) > 1 else 2
        if len(data) < end:
            self._partial[fd] = data
            return
        device = self._device[fd]
        if data[0] != CONNACK or data[3]:
            raise FleetError(f"device {device} was refused: {data[:end].hex()}")
        self._opening -= 1
        self._reactor.rewatch(fd, self._readable, urgent=device in self._urgent)
        if len(data) > end:
            self._take_packets(fd, data[end:])
        self._begin_next()

    def _read(self, fd: int) -> bytes:
        try:
            data = os.read(fd, READ_SIZE)
        except BlockingIOError:
            return b""
        except ConnectionError:
            data = b""
        if not data:
            raise FleetError(f"device {self._device[fd]} was disconnected by the server")
        return data

    def _readable(self, fd: int) -> None:
        data = self._read(fd)
        known = self._known.get(data)
        if known is not None and fd not in self._partial:
            serials, answer = known
            device, take = self._device[fd], self._take
            for serial in serials:
                take(device, serial)
            if answer:
                self.acked += len(answer) // ACK_SIZE
                os.write(fd, answer)
            return
        if fd in self._partial:
            data = self._partial.pop(fd) + data
        self._take_packets(fd, data)

    def _take_packets(self, fd: int, data: bytes) -> None:
        serials: list[int] = []
        device, answers = self._device[fd], self.answers
        acks, end = take_pushes(
            device, data, self._head, lambda _, serial: serials.append(serial), self._take_answer
        )
        for serial in serials:
            self._take(device, serial)
        answer = b"".join(acks)
        if end < len(data):
            self._partial[fd] = data[end:]
        elif len(data) <= KNOWN_SIZE and self.answers == answers:
            self._remember(data, (tuple(serials), answer))
        if answer:
            self.acked += len(acks)
            os.write(fd, answer)

    def _remember(self, data: bytes, means: tuple[tuple[int, ...], bytes]) -> None:
        if len(self._known) >= KNOWN:
            self._known.clear()
        self._known[data] = means

    def _take_answer(self, device: int, packet: bytes) -> None:
        if packet[0] not in ANSWERS:
            raise FleetError(f"device {device} got something else: {packet.hex()}")
        self.answers += 1
