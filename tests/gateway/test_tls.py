"""TLS on a running server: its certificate changes under live connections, and handshakes that fail are harmless."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import time
from pathlib import Path

import pytest
import trustme
from cryptography import x509

from clients.local_server import LocalServer
from gateway.mqtt import Pingreq, Pingresp
from tests.conftest import StartServer
from tests.gateway.peer import Peer, connect_packet, device, eventually, push, works


class Authority:
    """A CA, and the files that the server reads."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self.certificate, self.key = folder / "cert.pem", folder / "key.pem"
        self.trust = ssl.create_default_context()
        self._ca.configure_trust(self.trust)
        self.issue()

    def issue(self) -> int:
        """A new certificate in the files; its serial number."""
        issued = self._ca.issue_cert("localhost", "127.0.0.1")
        issued.private_key_pem.write_to_path(str(self.key))
        self.certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        return x509.load_pem_x509_certificate(issued.cert_chain_pems[0].bytes()).serial_number


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def server(start_server: StartServer, authority: Authority) -> LocalServer:
    files = ("--mqtt-certificate", str(authority.certificate), "--mqtt-private-key", str(authority.key))
    return start_server("--mqtts-port", "0", "--mqtt-connect-timeout", "1", *files)


def shown(server: LocalServer, authority: Authority) -> int:
    """The serial number of the certificate in a new handshake."""
    assert server.addresses.mqtts is not None
    with (
        socket.create_connection(server.addresses.mqtts, 10) as raw,
        authority.trust.wrap_socket(raw, server_hostname="localhost") as secured,
    ):
        assert secured.version() == "TLSv1.3"
        certificate = secured.getpeercert(binary_form=True)
        assert certificate is not None
        return x509.load_der_x509_certificate(certificate).serial_number


def test_a_reload_changes_new_handshakes_and_drops_nobody(server: LocalServer, authority: Authority) -> None:
    with device(server, "phone", tls=authority.trust) as peer:
        before = shown(server, authority)
        after = authority.issue()
        assert shown(server, authority) == before
        os.kill(server.pid, signal.SIGHUP)
        eventually(lambda: shown(server, authority) == after)
        push(server, server.app, "phone")
        peer.push()
        peer.send(Pingreq())
        assert peer.receive() == Pingresp()


def test_a_broken_certificate_is_not_taken(server: LocalServer, authority: Authority) -> None:
    before = shown(server, authority)
    authority.certificate.write_text("not a certificate")
    os.kill(server.pid, signal.SIGHUP)
    eventually(lambda: "the old one stays" in server.log_text())
    assert str(authority.certificate) in server.log_text()
    assert shown(server, authority) == before


def test_handshakes_that_fail_or_hang_harm_nobody(server: LocalServer, authority: Authority) -> None:
    assert server.addresses.mqtts is not None
    with pytest.raises(ssl.SSLError), Peer(server.addresses.mqtts, tls=ssl.create_default_context()):
        pass  # it does not trust the certificate
    with Peer(server.addresses.mqtts) as peer:
        peer.send(connect_packet(server.app, "plain"))  # no TLS at all
        peer.rest_of_bytes()  # a TLS alert, or nothing
    with Peer(server.addresses.mqtts) as peer:  # it says nothing
        began = time.monotonic()
        assert peer.rest_of_bytes() == b""
        assert time.monotonic() - began < 4  # of 1 second
    with device(server, "phone", tls=authority.trust) as peer:
        push(server, server.app, "phone")
        peer.push()
    works(server)
