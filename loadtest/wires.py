"""Sockets that never block, by their file descriptors: plain ones, which are the system's calls and nothing else, and
those of TLS, which have an SSL object beside.

Of TLS nobody sees more than that a first write takes several attempts. It goes on with the handshake each time, and
says whether the next is to come when the socket can be read, or when it takes bytes. Every handshake is a full one: a
ticket is worth nothing to a device that never asks for its session. What TLS has to say later (tickets, new keys) is
read with what the server sends, and answered with what is written next.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from loadtest.fleet import open_socket
from loadtest.server import Address

HANDSHAKE_LIMIT: Final = 10.0  # seconds for one that somebody waits for
RECORD: Final = 16_384  # bytes: with more TLS says nothing until the last of them is written
CLOSED: Final = "closed in the TLS handshake"
NOT_TLS: Final = "WRONG_VERSION_NUMBER"

HOPELESS: Final = frozenset(
    {
        NOT_TLS,
        "UNSUPPORTED_PROTOCOL",
        "TLSV1_ALERT_PROTOCOL_VERSION",
        "TLSV1_UNRECOGNIZED_NAME",
        "SSLV3_ALERT_HANDSHAKE_FAILURE",
        "TLSV13_ALERT_CERTIFICATE_REQUIRED",
    }
)
"""What OpenSSL calls that which another handshake would not mend; a certificate that was refused is one, too."""


class Tls(msgspec.Struct, frozen=True):
    """The server's certificate is to be of `server_name`, and of an authority in the PEM file `cafile`, None: of one
    that the system trusts; `insecure`: any is good."""

    server_name: str
    cafile: str | None = None
    insecure: bool = False

    def context(self) -> ssl.SSLContext:
        """Raises OSError if the file is none of certificates."""
        context = ssl.create_default_context(cafile=self.cafile)
        context.options |= ssl.OP_NO_RENEGOTIATION  # so that only a handshake makes writing wait for reading
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One listener of a server."""

    address: Address
    tls: Tls | None = None

    def url(self, scheme: str) -> str:
        """`scheme`: the plain one."""
        if self.tls is None:
            return "{}://{}:{}".format(scheme, *self.address)
        return f"{scheme}s://{self.tls.server_name}:{self.address[1]}"


class Wires(Protocol):
    """As the system's calls: BlockingIOError is for what cannot be done yet, any other OSError is the end."""

    def open(self, address: Address, source: str | None, /) -> int:
        """See fleet.open_socket."""
        ...

    def read(self, fd: int, size: int, /) -> bytes:
        """At least what no epoll would tell of again; nothing: the server has closed it."""
        ...

    def write(self, fd: int, data: bytes | bytearray | memoryview, /) -> int:
        """What could not be written must be the beginning of the next attempt."""
        ...

    def waits_to_write(self, fd: int, /) -> bool:
        """What makes the next attempt of a write worthwhile: that the socket takes bytes, or that it can be read."""
        ...

    def close(self, fd: int, /) -> None: ...


class PlainWires:
    open = staticmethod(open_socket)
    read = staticmethod(os.read)
    write = staticmethod(os.write)
    close = staticmethod(os.close)

    @staticmethod
    def waits_to_write(_: int, /) -> bool:
        return True


class TlsWires:
    """An fd is in `_names` until its connection is made, then in `_secured`. One that is in neither was lost in
    between, and the ssl module has closed it."""

    def __init__(self, tls: Tls, homes: Iterable[Address]) -> None:
        """`homes`: where the server's name is that of `tls`; elsewhere it is that of the address."""
        self._context = tls.context()
        self._server_name = tls.server_name
        self._homes = frozenset(homes)
        self._names: dict[int, str] = {}
        self._secured: dict[int, ssl.SSLSocket] = {}
        self._shaking: set[int] = set()  # of `_secured`: none of their writes has succeeded yet
        self._full: set[int] = set()  # what they have to write, the system does not take

    def open(self, address: Address, source: str | None, /) -> int:
        fd = open_socket(address, source)
        self._names[fd] = self._server_name if address in self._homes else address[0]
        return fd

    def read(self, fd: int, size: int, /) -> bytes:
        secured = self._secured.get(fd)
        if secured is None:
            return os.read(fd, size)  # there is nothing but why it was not connected
        if fd in self._shaking:
            raise BlockingIOError  # else it might read what a write waits for
        try:
            data = secured.recv(size)
            pending = secured.pending()  # of the same record: it has left the socket
            return data + secured.recv(pending) if pending else data
        except ssl.SSLWantReadError:
            raise BlockingIOError from None

    def write(self, fd: int, data: bytes | bytearray | memoryview, /) -> int:
        secured = self._secured.get(fd) or self._secure(fd)
        try:
            sent = secured.send(data[:RECORD])
        except ssl.SSLWantReadError:
            self._full.discard(fd)
            raise BlockingIOError from None
        except ssl.SSLWantWriteError:
            self._full.add(fd)
            raise BlockingIOError from None
        except OSError:
            self._shaking.discard(fd)
            with suppress(OSError):  # the server may have done it
                secured.shutdown(socket.SHUT_RDWR)  # for those who wait until reading ends it
            raise
        self._shaking.discard(fd)
        return sent

    def waits_to_write(self, fd: int, /) -> bool:
        return fd in self._names or fd in self._full

    def close(self, fd: int, /) -> None:
        self._shaking.discard(fd)
        self._full.discard(fd)
        if self._names.pop(fd, None):
            os.close(fd)
        elif secured := self._secured.pop(fd, None):
            secured.close()

    def _secure(self, fd: int) -> ssl.SSLSocket:
        """Raises BlockingIOError while the connection is being made."""
        plain = socket.socket(fileno=fd)
        try:
            if error := plain.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error))
            if not _is_connected(plain):
                raise BlockingIOError
            plain.setblocking(False)
        except OSError:
            plain.detach()
            raise
        secured = self._context.wrap_socket(
            plain, server_hostname=self._names.pop(fd), do_handshake_on_connect=False
        )
        self._secured[fd] = secured
        self._shaking.add(fd)
        return secured


def _is_connected(one: socket.socket) -> bool:
    try:
        one.getpeername()
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return False
    return True


def wires_of(tls: Tls | None, homes: Iterable[Address]) -> Wires:
    return PlainWires() if tls is None else TlsWires(tls, homes)


def is_hopeless(error: OSError) -> bool:
    """Another connection would end in the same way."""
    if isinstance(error, ssl.SSLError):
        return isinstance(error, ssl.SSLCertVerificationError) or error.reason in HOPELESS
    return False


def why_of(error: OSError) -> str:
    """In few words, that are the same for all devices."""
    match error:
        case ssl.SSLCertVerificationError():
            return f"certificate refused: {error.verify_message}"
        case ssl.SSLEOFError():
            return CLOSED
        case ssl.SSLError(reason=str(reason)):
            return "an answer that is not TLS" if reason == NOT_TLS else f"TLS: {reason}"
    return error.strerror or type(error).__name__


def check_tls(endpoint: Endpoint) -> str:
    """Why a TLS connection cannot be made; nothing if it can. Waits for it."""
    assert endpoint.tls is not None
    connected = False
    try:
        with socket.create_connection(endpoint.address, HANDSHAKE_LIMIT) as plain:
            connected = True
            with endpoint.tls.context().wrap_socket(plain, server_hostname=endpoint.tls.server_name):
                return ""
    except TimeoutError:
        return f"no answer within {HANDSHAKE_LIMIT:g} s"
    except OSError as error:
        return CLOSED if connected and isinstance(error, ConnectionError) else why_of(error)


def suspect_tls(endpoint: Endpoint) -> str:
    """What to say of a server that lets nobody in, if it wants TLS; else nothing."""
    host = endpoint.address[0]
    if endpoint.tls or check_tls(Endpoint(endpoint.address, Tls(host, insecure=True))):
        return ""
    return "; it speaks TLS there: mqtts://"
