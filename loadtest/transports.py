"""WebSocket and TLS devices for the idle figures: connected one after the other with blocking calls."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import trustme

from loadtest.fleet import CONNACK, FleetError
from loadtest.server import Address

UPGRADE = (
    b"GET /mqtt HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Protocol: mqtt\r\n\r\n"
)


def open_websocket(address: Address, connect: bytes) -> socket.socket:
    """A device that has its CONNACK."""
    opened = socket.create_connection(address)
    opened.sendall(UPGRADE)
    answer = _receive_until(opened, b"\r\n\r\n")
    if not answer.startswith(b"HTTP/1.1 101 "):
        raise FleetError(f"no WebSocket: {answer.splitlines()[0].decode(errors='replace')}")
    opened.sendall(masked_frame(connect))
    check_connack(opened.recv(1024)[2:])
    return opened


def open_tls(address: Address, context: ssl.SSLContext, connect: bytes) -> ssl.SSLSocket:
    """A device that has its CONNACK."""
    opened = context.wrap_socket(socket.create_connection(address), server_hostname=address[0])
    opened.sendall(connect)
    check_connack(opened.recv(1024))
    return opened


def masked_frame(payload: bytes) -> bytes:
    """A whole binary frame; the mask is zero, so that it changes nothing (RFC 6455 5.3)."""
    size = len(payload)
    length = bytes((0x80 | size,)) if size < 126 else bytes((0x80 | 126,)) + size.to_bytes(2)
    return b"\x82" + length + bytes(4) + payload


def _receive_until(opened: socket.socket, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        data = opened.recv(4096)
        if not data:
            raise FleetError("closed by the server")
        received += data
    return received


def check_connack(data: bytes) -> None:
    if len(data) < 4 or data[0] != CONNACK or data[3]:
        raise FleetError(f"refused: {data.hex()}")


def make_certificate(directory: Path) -> tuple[dict[str, str], ssl.SSLContext]:
    """Settings of a server with a certificate for 127.0.0.1, and a client context that trusts it."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    settings = {
        "HOLDFAST_MQTT_TLS_PORT": "0",
        "HOLDFAST_MQTT_CERTIFICATE": str(certificate),
        "HOLDFAST_MQTT_PRIVATE_KEY": str(key),
    }
    return settings, context
