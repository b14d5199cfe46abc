"""TLS devices that connect in volleys, as a storm from many machines would: the server finds all of a volley at once.

A client's half of a handshake costs as much as the server's, so one generator cannot keep a server busy: each device
would find it idle, and what it does once for all that wait (a turn of its loop, a commit) it would do for one. So the
server is stopped (SIGSTOP) while the devices of a volley do their part.
"""

from __future__ import annotations

import itertools
import os
import select
import signal
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from loadtest.fleet import IP_BIND_ADDRESS_NO_PORT, SOURCES, FleetError
from loadtest.server import Address
from loadtest.transports import check_connack

VOLLEY: Final = 64  # devices
READ_SIZE: Final = 4096
PATIENCE: Final = 30.0  # seconds until the server must have said something


class _Visit:
    """A device between SYN and CONNACK."""

    __slots__ = ("device", "secured", "shaken")

    def __init__(self, device: int, secured: ssl.SSLSocket) -> None:
        self.device = device
        self.secured = secured
        self.shaken = False


class TlsFleet:
    """Devices by index, of one server process; `packets[i]` is the CONNECT of device i. Without packets a device is
    content with the session ticket that ends a handshake of TLS 1.3, and its server need know nothing else."""

    def __init__(
        self, address: Address, pid: int, context: ssl.SSLContext, packets: Sequence[bytes] = ()
    ) -> None:
        self._address = address
        self._pid = pid
        self._context = context
        self._packets = packets
        self._online: dict[int, ssl.SSLSocket] = {}
        self._tickets: dict[int, ssl.SSLSession] = {}  # of a device's last connection
        self.resumed = 0  # handshakes in which the server took a ticket

    def connect(self, devices: Iterable[int], *, resume: bool = False, wave: int = 0) -> None:
        """Connect them all. `resume`: with the tickets they got when they were connected last. `wave`: see
        `Fleet.connect`. Raises FleetError."""
        left = iter(devices)
        while volley := list(itertools.islice(left, VOLLEY)):
            with self._stopped():
                visits = [self._begin(device, wave, resume=resume) for device in volley]
            _until_readable(visits, lambda _: True)
            with self._stopped():
                for visit in visits:
                    self._go_on(visit)
            _until_readable(visits, self._go_on)

    def close(self) -> None:
        """Without a word."""
        for secured in self._online.values():
            secured.close()
        self._online.clear()

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        os.kill(self._pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._pid, signal.SIGCONT)

    def _begin(self, device: int, wave: int, *, resume: bool) -> _Visit:
        plain = socket.socket()
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        plain.bind((f"127.1.{wave}.{1 + device % SOURCES}", 0))
        plain.connect(self._address)  # the kernel answers, whatever the server does
        plain.setblocking(False)
        visit = _Visit(
            device,
            self._context.wrap_socket(
                plain,
                server_hostname=self._address[0],
                do_handshake_on_connect=False,
                session=self._tickets[device] if resume else None,
            ),
        )
        self._go_on(visit)
        return visit

    def _go_on(self, visit: _Visit) -> bool:
        """As far as what has come allows; whether it has arrived."""
        data: bytes | None = None
        try:
            if not visit.shaken:
                visit.secured.do_handshake()
                visit.shaken = True
                self.resumed += bool(visit.secured.session_reused)
                if self._packets:
                    visit.secured.send(self._packets[visit.device])
            data = visit.secured.recv(READ_SIZE)
        except ssl.SSLWantReadError:
            pass
        if data is not None:
            check_connack(data)
        elif self._packets or not _has_ticket(visit):
            return False
        session = visit.secured.session
        if session is None or not session.has_ticket:
            raise FleetError(f"device {visit.device} got no session ticket")
        self._tickets[visit.device] = session
        self._online[visit.device] = visit.secured
        return True


def _has_ticket(visit: _Visit) -> bool:
    if not visit.shaken:
        return False
    session = visit.secured.session
    return session is not None and session.has_ticket


def _until_readable(visits: Iterable[_Visit], step: Callable[[_Visit], bool]) -> None:
    """Call `step` for each that can be read, until it has been true of all."""
    waiting = {visit.secured.fileno(): visit for visit in visits}
    poll = select.poll()
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    while waiting:
        ready = poll.poll(PATIENCE * 1000)
        if not ready:
            raise FleetError(f"{len(waiting)} devices wait for an answer")
        for fd, _ in ready:
            if step(waiting[fd]):
                poll.unregister(fd)
                del waiting[fd]
