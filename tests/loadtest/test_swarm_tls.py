"""Devices over TLS, against servers that agree, refuse, say something else or nothing."""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import socket
import ssl
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

import pytest

from gateway.mqtt import Connack, Connect, Disconnect, Puback, Reason, decode, encode
from loadtest.swarm import OPENING
from loadtest.wires import Tls
from tests.loadtest.swarm_world import TOKENS, Play, make_roster, push_packet
from tests.loadtest.trial_world import Certified, certify

NAME = "push.example"
REFUSED = "certificate refused: "


class TlsPlay(Play):
    """The server is `NAME`, by an authority that devices know."""

    def __init__(self, folder: Path) -> None:
        super().__init__(make_roster(folder))
        self.folder = folder
        self.certified = certify(folder, NAME)
        self.peer.context = self.certified.context()

    def begin_tls(self, count: int = 1, version: int = 4, **tls: Any) -> None:
        secured = Tls(**{"server_name": NAME, "cafile": str(self.certified.cafile), **tls})
        self.begin(count, version, tls=secured)

    def online(self, count: int = 1) -> None:
        self.peer.turn_until(lambda: self.swarm.online == count)

    def refused(self, why: str) -> None:
        """For good, and as nothing else."""
        counts = self.swarm.counts
        self.peer.turn_until(lambda: bool(counts.refused or counts.failed))
        assert (counts.refused, counts.failed) == ({why: 1}, {})

    def failed(self, why: str) -> None:
        """And tried again."""
        counts = self.swarm.counts
        self.peer.turn_until(lambda: bool(counts.refused or counts.failed))
        assert (counts.refused, counts.failed) == ({}, {why: 1})


@pytest.fixture
def play(tmp_path: Path) -> Iterator[TlsPlay]:
    play = TlsPlay(tmp_path)
    yield play
    play.close()


# Connections that come to something


@pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_device_says_who_it_is_when_tls_is_agreed_on(play: TlsPlay, most: ssl.TLSVersion) -> None:
    assert play.peer.context is not None
    play.peer.context.maximum_version = most
    names: list[str | None] = []
    play.peer.context.sni_callback = lambda _, name, __: names.append(name)  # type: ignore[assignment,misc]
    play.begin_tls(3)
    heard = [play.peer.welcome(4)[1] for _ in range(3)]
    play.online(3)
    assert {connect.password for connect in heard} == {token.encode() for token in TOKENS}
    assert names == [NAME] * 3


def test_one_record_may_have_more_than_a_read(play: TlsPlay) -> None:
    """What is left of it is in no socket, so nothing but the device itself would look for it."""
    play.begin_tls()
    server, _ = play.peer.welcome(4)
    play.online()
    for byte in push_packet(1, 1):
        server.sendall(bytes([byte]))  # records may also have less than a packet
    server.sendall(b"".join(push_packet(serial, serial) for serial in range(2, 101)))
    answers = [play.peer.read(server, 4) for _ in range(100)]
    assert [answer.packet_id for answer in answers if isinstance(answer, Puback)] == list(range(1, 101))
    assert play.swarm.counts.acked == 100


def test_a_device_in_a_handshake_waits_until_it_can_read(play: TlsPlay) -> None:
    """The server's half comes byte by byte; the socket would take bytes all the time, and that wakes nobody."""
    play.begin_tls()
    accepted = play.peer.accept_plainly()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    assert play.peer.context is not None
    server = play.peer.context.wrap_bio(incoming, outgoing, server_side=True)

    def hear() -> bytes | None:
        try:
            incoming.write(accepted.recv(65_536))
        except BlockingIOError:
            return None
        try:
            return server.read(4096)
        except ssl.SSLWantReadError:
            return None

    play.peer.wait(lambda: hear() or outgoing.pending or None)
    for byte in outgoing.read():
        assert play.swarm._state[0] == OPENING
        assert not any(events & select.EPOLLOUT for _, events in play.swarm.reactor._bulk.poll(0))
        accepted.sendall(bytes([byte]))
        play.peer.turn_until(lambda: not _unread(play.swarm._fd[0]))
    found = decode(play.peer.wait(hear), 0, 4, 4096)
    assert found is not None
    assert isinstance(found[0], Connect)


def _unread(fd: int) -> bool:
    with socket.socket(fileno=fd) as borrowed:
        try:
            return bool(borrowed.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False
        finally:
            borrowed.detach()


def test_any_certificate_is_good_where_none_is_checked(play: TlsPlay) -> None:
    play.begin_tls(cafile=None, server_name="other.example", insecure=True)
    play.peer.welcome(4)
    play.online()


def test_leaving_says_disconnect(play: TlsPlay) -> None:
    play.begin_tls()
    server, _ = play.peer.welcome(4)
    play.online()
    play.swarm.leave()
    assert isinstance(play.peer.read(server, 4), Disconnect)


def test_a_dropped_device_comes_back(play: TlsPlay) -> None:
    play.begin_tls()
    server, _ = play.peer.welcome(4)
    play.online()
    server.close()
    play.peer.welcome(4)
    play.online()
    assert play.swarm.counts.lost == {"closed": 1}


@pytest.mark.parametrize("name", ["127.0.0.1", "elsewhere.example"])
def test_where_a_device_is_told_to_go_has_a_name_of_its_own(play: TlsPlay, name: str) -> None:
    """The one in the reference, which the certificate there must have."""
    there = play.folder / "there"
    there.mkdir()
    elsewhere = certify(there, name)
    play.other.context = elsewhere.context()
    both = play.folder / "both.pem"
    both.write_bytes(play.certified.cafile.read_bytes() + elsewhere.cafile.read_bytes())
    play.begin_tls(version=5, cafile=str(both))
    server, _ = play.peer.welcome(5)
    play.online()
    host, port = play.other.address
    reference = {"server_reference": f"{host}:{port}"}
    server.sendall(encode(Disconnect(Reason.SERVER_MOVED, reference), 5))
    if name == host:
        play.other.welcome(5)
        play.online()
    else:
        with pytest.raises(ssl.SSLError, match="ALERT"):
            play.other.accept()
        play.refused(f"{REFUSED}IP address mismatch, certificate is not valid for '127.0.0.1'.")


# Connections that come to nothing


@pytest.mark.parametrize(
    ("tls", "why"),
    [
        ({"cafile": None}, "unable to get local issuer certificate"),
        ({"server_name": "x.example"}, "Hostname mismatch, certificate is not valid for 'x.example'."),
        ({"server_name": "127.0.0.1"}, "IP address mismatch, certificate is not valid for '127.0.0.1'."),
    ],
)
def test_a_certificate_may_be_refused(play: TlsPlay, tls: dict[str, Any], why: str) -> None:
    play.begin_tls(**tls)
    with pytest.raises(ssl.SSLError, match="ALERT"):
        play.peer.accept()
    play.refused(REFUSED + why)


@pytest.mark.parametrize(
    ("most", "why"),
    [
        (ssl.TLSVersion.TLSv1_2, "TLS: SSLV3_ALERT_HANDSHAKE_FAILURE"),
        # The device's half of the handshake has succeeded by then, and its CONNECT is on its way.
        (ssl.TLSVersion.TLSv1_3, "TLS: TLSV13_ALERT_CERTIFICATE_REQUIRED"),
    ],
)
def test_a_server_may_want_a_certificate_of_the_device(play: TlsPlay, most: ssl.TLSVersion, why: str) -> None:
    assert play.peer.context is not None
    play.peer.context.maximum_version = most
    play.peer.context.verify_mode = ssl.CERT_REQUIRED
    play.begin_tls()
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN"):
        play.peer.accept()
    play.refused(why)


def test_a_server_may_speak_something_else(play: TlsPlay) -> None:
    play.begin_tls()
    play.peer.accept_plainly().sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    play.refused("an answer that is not TLS")


def test_a_server_that_closes_in_the_handshake_is_tried_again(play: TlsPlay) -> None:
    play.begin_tls()
    play.peer.accept_plainly().close()
    play.failed("closed in the TLS handshake")
    play.peer.welcome(4)
    play.online()


def test_a_server_that_is_not_there_is_tried_again(play: TlsPlay) -> None:
    play.peer.close()
    play.begin_tls()
    play.failed("Connection refused")


@pytest.mark.parametrize(("secured", "why"), [(False, "no end of the TLS handshake"), (True, "no CONNACK")])
def test_a_server_that_says_nothing_is_given_up(
    play: TlsPlay, secured: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    play.begin_tls()
    if secured:
        server = play.peer.accept()
        play.peer.read(server, 4)
    else:
        accepted = play.peer.accept_plainly()
        play.peer.turn_until(lambda: _unread(accepted.fileno()))
    for place in play.swarm._deadlines:
        play.swarm._deadlines[place] = 0.0
    play.failed(why)


# What TLS says later


def test_new_keys_and_tickets_are_nothing_a_device_notices(play: TlsPlay) -> None:
    if not shutil.which("openssl"):
        pytest.skip("openssl: apt-get install openssl")
    with OpenSsl(play.certified) as server:
        play.peer.address = server.address
        play.begin_tls()
        play.peer.turn_until(lambda: TOKENS[0].encode() in server.heard())
        server.say(encode(Connack(), 4))
        play.online()
        for packet_id in (301, 302, 303):
            server.say(b"K\n")  # a KeyUpdate that asks for one
            play.peer.turn_until(server.has_read)
            server.say(push_packet(packet_id, packet_id))
            answer = encode(Puback(packet_id), 4)
            play.peer.turn_until(lambda answer=answer: answer in server.heard())  # type: ignore[misc]
        assert server.heard().count(UPDATED) == 3
    assert (play.swarm.counts.acked, play.swarm.counts.lost) == (3, {})


UPDATED: Final = b"SSL_do_handshake -> 1"


class OpenSsl:
    """`openssl s_server`: it sends two tickets, shows what it hears, and says what it is told, or renews the keys."""

    def __init__(self, certified: Certified) -> None:
        files = ("-cert", certified.certificate, "-key", certified.key)
        self._process = subprocess.Popen(
            ["openssl", "s_server", "-accept", "127.0.0.1:0", *files],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdout is not None
        line = next(line for line in self._process.stdout if line.startswith(b"ACCEPT"))
        self.address = ("127.0.0.1", int(line.rpartition(b":")[2]))
        os.set_blocking(self._process.stdout.fileno(), False)
        self._heard = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def say(self, what: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(what)
        self._process.stdin.flush()

    def has_read(self) -> bool:
        """What it was told: it looks for a command at the beginning of each read."""
        assert self._process.stdin is not None
        left = fcntl.ioctl(self._process.stdin.fileno(), termios.FIONREAD, bytes(4))
        return not any(left)

    def heard(self) -> bytes:
        """All so far."""
        assert self._process.stdout is not None
        self._heard += self._process.stdout.read() or b""
        return self._heard
