"""The PROXY protocol, versions 1 and 2: what a proxy in front of us says of a connection before its first byte.

No I/O. The specification is haproxy's `proxy-protocol.txt`. A header is either a line of text or a binary record, and
neither can begin an MQTT packet, an HTTP request or a TLS handshake of a device.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from dataclasses import dataclass
from typing import Final, TypeAlias

LINE_BEGIN: Final = b"PROXY "
LINE_END: Final = b"\r\n"
MAX_LINE: Final = 107  # bytes, its end included (2.1)
SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
FIXED_SIZE: Final = 16  # bytes of a binary header whose own length says how many follow (2.2)
MAX_HEADER: Final = 4096  # bytes: extensions (certificates, ids) are skipped, but have to come in first
VERSION: Final = 2
STREAM: Final = 1  # the lower half of the byte after the command
UNSPECIFIED: Final = 0  # both halves
_PORT: Final = re.compile(r"0|[1-9]\d{0,4}", re.ASCII)

Endpoint: TypeAlias = tuple[str, int]  # address and port


class ProxyError(Exception):
    """No header, or one that breaks the rules; the message says which."""


@dataclass(frozen=True, slots=True)
class _Family:
    address: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address]
    layout: struct.Struct  # two addresses, two ports


_IPV4: Final = _Family(ipaddress.IPv4Address, struct.Struct("!4s4sHH"))
_IPV6: Final = _Family(ipaddress.IPv6Address, struct.Struct("!16s16sHH"))
_BY_WORD: Final = {"TCP4": _IPV4, "TCP6": _IPV6}
_BY_NUMBER: Final = {1: _IPV4, 2: _IPV6}  # the upper half of the byte; the others are not IP
_BY_SIZE: Final = {family.layout.size: family for family in (_IPV4, _IPV6)}


@dataclass(frozen=True, slots=True)
class Route:
    """From where a peer came to where at the proxy. Kept for as long as the connection, so as a binary header has
    it: 0.1 KB instead of 0.4 KB."""

    packed: bytes

    @property
    def source(self) -> Endpoint:
        address, _, port, _ = self._unpack()
        return address, port

    @property
    def destination(self) -> Endpoint:
        _, address, _, port = self._unpack()
        return address, port

    def _unpack(self) -> tuple[str, str, int, int]:
        family = _BY_SIZE[len(self.packed)]
        source, destination, source_port, port = family.layout.unpack(self.packed)
        return str(family.address(source)), str(family.address(destination)), source_port, port


@dataclass(frozen=True, slots=True)
class Header:
    size: int  # bytes that it took
    route: Route | None = (
        None  # None: the proxy speaks for itself or does not know, and the socket's names hold
    )


def read_header(data: bytes) -> Header | None:
    """At the beginning of `data`. None: all of `data` belongs to a header whose end has not come, and MAX_HEADER
    bytes are enough for any. Raises ProxyError."""
    if data[: len(LINE_BEGIN)] == LINE_BEGIN[: len(data)]:
        return _read_line(data)
    if data[: len(SIGNATURE)] == SIGNATURE[: len(data)]:
        return _read_record(data)
    raise ProxyError("no PROXY header")


# Version 1: "PROXY TCP4 192.0.2.7 198.51.100.1 40000 1883\r\n"


def _read_line(data: bytes) -> Header | None:
    end = data.find(LINE_END, 0, MAX_LINE)
    if end < 0 and len(data) >= MAX_LINE:
        raise ProxyError(f"the line is longer than {MAX_LINE} bytes")
    if end < 0:
        return None
    size = end + len(LINE_END)
    words = data[len(LINE_BEGIN) : end].decode("latin-1").split(" ")
    if words[0] == "UNKNOWN":  # whatever follows says nothing (2.1)
        return Header(size)
    family = _BY_WORD.get(words[0])
    if family is None or len(words) != 5:
        raise ProxyError("the line must be PROXY TCP4 or TCP6, two addresses, two ports; or PROXY UNKNOWN")
    source, destination = (_address(word, family) for word in words[1:3])
    ports = map(_port, words[3:])
    return Header(size, Route(family.layout.pack(source, destination, *ports)))


def _address(word: str, family: _Family) -> bytes:
    try:
        address = family.address(word)
    except ValueError as error:
        raise ProxyError(f"bad address: {error}") from error
    if "%" in word:
        raise ProxyError("bad address: a zone is of no use here")
    return address.packed


def _port(word: str) -> int:
    if not _PORT.fullmatch(word) or int(word) > 65_535:
        raise ProxyError("a port must be a number from 0 to 65535")
    return int(word)


# Version 2: the signature, command, family, length; then addresses and extensions


def _read_record(data: bytes) -> Header | None:
    if len(data) < FIXED_SIZE:
        return None
    command, family, length = struct.unpack_from("!BBH", data, len(SIGNATURE))
    size = FIXED_SIZE + length
    if command >> 4 != VERSION:
        raise ProxyError(f"version {command >> 4} is not known")
    if size > MAX_HEADER:
        raise ProxyError(f"a header of {size} bytes; {MAX_HEADER} are allowed")
    if len(data) < size:
        return None
    match command & 0x0F:
        case 0:  # LOCAL: the proxy speaks for itself, as in a health check
            return Header(size)
        case 1:  # PROXY
            return _read_addresses(data[FIXED_SIZE:size], family, size)
        case other:
            raise ProxyError(f"command {other} is not known")


def _read_addresses(body: bytes, number: int, size: int) -> Header:
    """Checksums among the extensions are not looked at: TCP has its own."""
    if number == UNSPECIFIED:
        return Header(size)
    if number & 0x0F != STREAM:
        raise ProxyError(f"family 0x{number:02x} is no stream")
    family = _BY_NUMBER.get(number >> 4)
    if family is None:  # a Unix socket of the proxy's machine, or what is not invented yet
        return Header(size)
    if len(body) < family.layout.size:
        raise ProxyError(f"{len(body)} bytes cannot hold the addresses of family 0x{number:02x}")
    return Header(size, Route(body[: family.layout.size]))
