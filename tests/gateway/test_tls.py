"""TLS on a running server: its certificate changes under live connections, and handshakes that fail are harmless."""

from __future__ import annotations

import os
import signal
import socket
import ssl
from pathlib import Path
from typing import Final

import orjson
import pytest
import trustme
from cryptography import x509

from clients.local_server import LocalServer
from gateway.mqtt import Disconnect, Pingreq, Pingresp, Reason
from tests.conftest import StartServer
from tests.gateway.peer import Peer, connect_packet, counted, device, eventually, push, sooner_or_later, works
from tests.patience import PATIENCE

HALF_A_HELLO: Final = bytes.fromhex("16030102000100")  # a record of 512 bytes, of which two have come


def refused(reason: str) -> str:
    return f'refusals_total{{reason="{reason}"}}'


class Authority:
    """A CA, and the files that the server reads."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self.certificate, self.key = folder / "cert.pem", folder / "key.pem"
        self.trust = ssl.create_default_context()
        self._ca.configure_trust(self.trust)
        self.issue()

    @property
    def flags(self) -> tuple[str, ...]:
        """Of a server with this certificate."""
        files = ("--mqtt-certificate", str(self.certificate), "--mqtt-private-key", str(self.key))
        return ("--mqtts-port", "0", *files)

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
    return start_server(*authority.flags)


def shown(server: LocalServer, authority: Authority) -> int:
    """The serial number of the certificate in a new handshake."""
    assert server.addresses.mqtts is not None
    with (
        socket.create_connection(server.addresses.mqtts, PATIENCE) as raw,
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


def test_handshakes_that_fail_harm_nobody(server: LocalServer, authority: Authority) -> None:
    assert server.addresses.mqtts is not None
    with counted(server, refused("bad TLS handshake"), by=2):
        with pytest.raises(ssl.SSLError), Peer(server.addresses.mqtts, tls=ssl.create_default_context()):
            pass  # it does not trust the certificate
        with Peer(server.addresses.mqtts) as peer:
            peer.send(connect_packet(server.app, "plain"))  # no TLS at all
            peer.rest_of_bytes()  # a TLS alert, or nothing
    with device(server, "phone", tls=authority.trust) as peer:
        push(server, server.app, "phone")
        peer.push()
    works(server)


def test_handshakes_that_hang_harm_nobody(start_server: StartServer, authority: Authority) -> None:
    server = start_server("--mqtt-connect-timeout", "1", *authority.flags)
    assert server.addresses.mqtts is not None
    for begun in (b"", HALF_A_HELLO):
        with counted(server, refused("connect timeout")), Peer(server.addresses.mqtts) as peer:
            peer.send(begun)
            assert peer.rest_of_bytes() == b""
    sooner_or_later(lambda: works(server, tls=authority.trust))


def test_who_may_not_come_in_has_no_handshake(start_server: StartServer, authority: Authority) -> None:
    server = start_server("--mqtt-max-connections-per-address", "1", *authority.flags)
    assert server.addresses.mqtts is not None
    with device(server, "phone", tls=authority.trust):
        refusal = refused("too many from one address")
        with (
            counted(server, refusal),
            pytest.raises(OSError),
            Peer(server.addresses.mqtts, tls=authority.trust),
        ):
            pass


def test_a_large_push_goes_through_a_small_hole(server: LocalServer, authority: Authority) -> None:
    """More than one record, to a peer that takes its time."""
    with device(server, "slow", tls=authority.trust) as peer:
        peer.set_buffers(4096)
        alerts = [f"{number:03} " + "x" * 1500 for number in range(30)]
        for alert in alerts:
            push(server, server.app, "slow", alert)
        assert [orjson.loads(peer.push().payload)["notification"]["alert"] for _ in alerts] == alerts


def test_why_it_ends_is_told_over_tls_too(server: LocalServer, authority: Authority) -> None:
    with device(server, "twice", tls=authority.trust) as first, device(server, "twice", tls=authority.trust):
        assert first.expect(Disconnect).reason == Reason.SESSION_TAKEN_OVER
        assert first.rest_of_bytes() == b""
