"""Many TLS devices that connect at once, in one thread: each does its whole half of the handshake, so this generator
costs about as much as the server. What a storm costs is therefore read from the server's CPU, not from its pace.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from loadtest.fleet import IP_BIND_ADDRESS_NO_PORT, SOURCES, FleetError
from loadtest.reactor import Reactor
from loadtest.server import Address
from loadtest.transports import check_connack

AT_ONCE: Final = 64  # connections between SYN and the last answer
READ_SIZE: Final = 4096


class _Visit:
    """A device between SYN and CONNACK."""

    __slots__ = ("device", "secured", "shaken")

    def __init__(self, device: int, secured: ssl.SSLSocket) -> None:
        self.device = device
        self.secured = secured
        self.shaken = False


class TlsFleet:
    """Devices by index; `packets[i]` is the CONNECT of device i. Without packets a device is content with the session
    ticket that ends a handshake of TLS 1.3, and its server need know nothing else."""

    def __init__(
        self,
        reactor: Reactor,
        address: Address,
        context: ssl.SSLContext,
        packets: Sequence[bytes] = (),
    ) -> None:
        self._reactor = reactor
        self._address = address
        self._context = context
        self._packets = packets
        self._visits: dict[int, _Visit] = {}  # by fd
        self._online: dict[int, ssl.SSLSocket] = {}  # by device
        self._tickets: dict[int, ssl.SSLSession] = {}  # by device: of its last connection
        self._todo: Iterator[int] = iter(())
        self._resumes = False
        self._wave = 0
        self.resumed = 0  # handshakes that the server took a ticket in

    def connect(self, devices: Iterable[int], *, resume: bool = False, wave: int = 0) -> float:
        """Connect them all, AT_ONCE at a time; seconds. `resume`: with the tickets they got when they were connected
        last. `wave`: see `Fleet.connect`."""
        self._todo, self._resumes, self._wave = iter(devices), resume, wave
        started = time.perf_counter()
        for _ in range(AT_ONCE):
            self._begin_next()
        self._reactor.run_until(lambda: not self._visits, "all TLS devices online", limit=300.0)
        return time.perf_counter() - started

    def close(self) -> None:
        """Without a word."""
        for secured in self._online.values():
            secured.close()
        self._online.clear()
        for fd, visit in list(self._visits.items()):
            self._reactor.forget(fd)
            visit.secured.close()
        self._visits.clear()

    def _begin_next(self) -> None:
        device = next(self._todo, None)
        if device is None:
            return
        plain = socket.socket()
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        plain.bind((f"127.1.{self._wave}.{1 + device % SOURCES}", 0))
        plain.connect(self._address)  # over loopback the kernel does not wait for anybody
        plain.setblocking(False)
        secured = self._context.wrap_socket(
            plain,
            server_hostname=self._address[0],
            do_handshake_on_connect=False,
            session=self._tickets[device] if self._resumes else None,
        )
        self._visits[secured.fileno()] = visit = _Visit(device, secured)
        self._reactor.watch(secured.fileno(), self._readable)
        self._shake_hands(visit)

    def _readable(self, fd: int) -> None:
        visit = self._visits[fd]
        if visit.shaken:
            self._take_answer(visit)
        else:
            self._shake_hands(visit)

    def _shake_hands(self, visit: _Visit) -> None:
        try:
            visit.secured.do_handshake()
        except ssl.SSLWantReadError:
            return
        visit.shaken = True
        self.resumed += bool(visit.secured.session_reused)
        if self._packets:
            visit.secured.send(self._packets[visit.device])

    def _take_answer(self, visit: _Visit) -> None:
        try:
            data = visit.secured.recv(READ_SIZE)
        except ssl.SSLWantReadError:  # the ticket
            if not self._packets:
                self._arrived(visit)
            return
        if not data:
            raise FleetError(f"device {visit.device} was disconnected by the server")
        check_connack(data)
        self._arrived(visit)

    def _arrived(self, visit: _Visit) -> None:
        fd, session = visit.secured.fileno(), visit.secured.session
        if session is None or not session.has_ticket:
            raise FleetError(f"device {visit.device} got no session ticket")
        self._tickets[visit.device] = session
        self._online[visit.device] = visit.secured
        del self._visits[fd]
        self._reactor.unwatch(fd)
        self._begin_next()
