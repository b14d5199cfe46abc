"""A server whose every word is in the test, and the swarm that meets it."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gateway.mqtt import Connack, Connect, Packet, Publish, decode, encode
from loadtest.ledger import alert
from loadtest.roster import TOKEN_SIZE, Roster, RosterConnects
from loadtest.server import Address
from loadtest.swarm import Swarm
from loadtest.tally import Tally
from tests.patience import PATIENCE

TOKENS = ("a" * TOKEN_SIZE, "b" * TOKEN_SIZE, "c" * TOKEN_SIZE)


def push_packet(serial: int, packet_id: int, version: int = 4) -> bytes:
    payload = f'{{"msg_id":"1","notification":{{"alert":"{alert(serial, 1)}"}}}}'.encode()
    return encode(Publish("push", payload, qos=1, packet_id=packet_id), version)


def make_roster(folder: Path) -> Roster:
    """Of three devices."""
    tokens = folder / "tokens"
    tokens.write_text("".join(TOKENS))
    return Roster("some-app", len(TOKENS), tokens)


class Peer:
    """A server that says what the test says, on one address; over TLS if it has a context."""

    def __init__(self, swarm: Callable[[], Swarm]) -> None:
        self._swarm = swarm
        self.context: ssl.SSLContext | None = None
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.setblocking(False)
        self.address: Address = self._listening.getsockname()
        self._accepted: list[socket.socket] = []
        self._rest: dict[socket.socket, bytes] = {}  # what was received behind a packet

    def close(self) -> None:
        for accepted in [*self._accepted, self._listening]:
            accepted.close()

    def accept(self) -> socket.socket:
        """The next connection; the swarm turns meanwhile."""
        accepted = self.accept_plainly()
        return accepted if self.context is None else self._secure(accepted, self.context)

    def accept_plainly(self) -> socket.socket:
        """Before the handshake."""
        accepted = self.wait(self._try_accept)
        accepted.setblocking(False)
        self._accepted.append(accepted)
        return accepted

    def _secure(self, accepted: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
        """Raises ssl.SSLError."""
        secured = context.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False)
        self._accepted.append(secured)

        def shake() -> bool | None:
            try:
                secured.do_handshake()
            except ssl.SSLWantReadError:
                return None
            return True

        self.wait(shake)
        return secured

    def _try_accept(self) -> socket.socket | None:
        try:
            return self._listening.accept()[0]
        except BlockingIOError:
            return None

    def read(self, accepted: socket.socket, version: int) -> Packet:
        """The next packet; what is behind it must wait for another call."""

        def look() -> Packet | None:
            rest = self._rest.pop(accepted, b"")
            with suppress(BlockingIOError, ssl.SSLWantReadError):
                rest += accepted.recv(4096)
            found = decode(rest, 0, version, 4096)
            packet, end = found or (None, 0)
            self._rest[accepted] = rest[end:]
            return packet

        packet: Packet = self.wait(look)
        return packet

    def welcome(self, version: int) -> tuple[socket.socket, Connect]:
        accepted = self.accept()
        connect = self.read(accepted, version)
        assert isinstance(connect, Connect)
        accepted.sendall(encode(Connack(), version))
        return accepted, connect

    def wait(self, look: Callable[[], Any]) -> Any:
        deadline = time.perf_counter() + PATIENCE
        while (found := look()) is None:
            assert time.perf_counter() < deadline
            self._swarm().turn()
        return found

    def turn_until(self, done: Callable[[], bool]) -> None:
        self.wait(lambda: done() or None)


class Play:
    """One swarm of three devices and two addresses that a device may meet."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._swarm: Swarm | None = None
        self.peer, self.other = Peer(lambda: self.swarm), Peer(lambda: self.swarm)

    @property
    def swarm(self) -> Swarm:
        assert self._swarm is not None
        return self._swarm

    def begin(self, count: int = 1, version: int = 4, rate: float = 1e4, **settings: Any) -> None:
        """Connect `count` devices; where the test does not say, pauses are short, and nobody pings."""
        self._swarm = Swarm(
            RosterConnects(self._roster, 60, [version]),
            Tally(0, count),
            [self.peer.address],
            **{"pause": 0.01, "pause_max": 0.02, "ping_interval": 1e9, **settings},
        )
        self.swarm.connect(rate)

    def close(self) -> None:
        self.peer.close()
        self.other.close()
        if self._swarm is not None:
            self._swarm.close()
