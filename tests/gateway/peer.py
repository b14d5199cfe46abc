"""A peer on a raw socket, and what else the tests against a running server share. All of it blocks.

The peer speaks our own codec and does only what it is told: no pings, no acknowledgements of its own.
"""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import orjson

from clients.local_server import AppKeys, LocalServer
from gateway.mqtt import (
    Connack,
    Connect,
    Packet,
    Properties,
    Puback,
    Publish,
    Subscribe,
    Subscription,
    decode,
    encode,
)
from tests.patience import PATIENCE

SHORT_PATIENCE: Final = 0.3  # seconds in which something that must not happen would have happened
POLL: Final = 0.02
TICK: Final = 0.3  # seconds: the clock of a server that has its turns is not further behind

_T = TypeVar("_T")
_P = TypeVar("_P", bound=Packet)


def eventually(look: Callable[[], _T | None], patience: float = PATIENCE) -> _T:
    """The first true value that `look` returns."""
    deadline = time.monotonic() + patience
    while not (found := look()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(POLL)
    return found


def sooner_or_later(story: Callable[[], object]) -> None:
    """The story works out. Whoever is too slow for a limit of the server is closed; so it is told anew until this
    machine lets it be quick enough."""

    def works_out() -> bool:
        try:
            story()
        except (Closed, ConnectionError, ssl.SSLError):
            return False
        return True

    eventually(works_out)


def clock_of(server: LocalServer) -> float:
    """Now, monotonic. The server's clock is at most TICK behind this, from here on: whatever held the server up
    before, it has had a turn since, and has looked at the time."""
    now = time.monotonic()
    server.metrics()
    return now


def let_pass(server: LocalServer, seconds: float) -> None:
    """So much time from now, and the server has noticed it."""
    end = time.monotonic() + seconds + TICK
    eventually(lambda: time.monotonic() > end)
    clock_of(server)


@contextlib.contextmanager
def counted(server: LocalServer, *samples: str, by: float = 1) -> Iterator[None]:
    """What happens inside raises each of these samples by so much; names without `holdfast_`."""
    before = server.metrics()

    def risen() -> bool:
        now = server.metrics()
        return all(now.get(name, 0) - before.get(name, 0) == by for name in names)

    names = [f"holdfast_{sample}" for sample in samples]
    yield
    with contextlib.suppress(AssertionError):
        eventually(risen)
    now = server.metrics()
    assert {name: now.get(name, 0) - before.get(name, 0) for name in names} == dict.fromkeys(names, by)


def call(server: LocalServer, app: AppKeys, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """Status and JSON answer of the HTTP API, asked by the app's publisher."""
    login = base64.b64encode(f"{app.app_key}:{app.master_secret}".encode()).decode()
    raw = body if isinstance(body, bytes) else None if body is None else orjson.dumps(body)
    request = urllib.request.Request(
        server.addresses.http + path, data=raw, method=method, headers={"Authorization": f"Basic {login}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, orjson.loads(response.read() or b"null")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, orjson.loads(error.read())


def push_body(
    registration_ids: list[str] | str, alert: str = "Hello", **options: object
) -> dict[str, object]:
    audience = "all" if registration_ids == "all" else {"registration_id": registration_ids}
    return {"platform": "all", "audience": audience, "notification": {"alert": alert}, "options": options}


def push(
    server: LocalServer, app: AppKeys, registration_id: str, alert: str = "Hello", **options: object
) -> str:
    """The msg_id of an accepted push to one device."""
    status, answer = call(server, app, "POST", "/v3/push", push_body([registration_id], alert, **options))
    assert status == 200, answer
    return str(answer["msg_id"])


def accounts(server: LocalServer, app: AppKeys, msg_id: str) -> dict[str, Any]:
    """The row of /v3/received/detail."""
    status, rows = call(server, app, "GET", f"/v3/received/detail?msg_ids={msg_id}")
    assert status == 200, rows
    return dict(rows[0])


def register(server: LocalServer, app: AppKeys, registration_id: str, platform: str = "android") -> str:
    """The device's token."""
    body = {"registration_id": registration_id, "platform": platform}
    status, answer = call(server, app, "POST", "/v1/devices", body)
    assert status == 200, answer
    return str(answer["token"])


class Closed(Exception):
    """The server closed the connection."""


class Peer:
    """A connection on which nothing happens by itself."""

    def __init__(
        self,
        address: tuple[str, int],
        *,
        version: int = 5,
        tls: ssl.SSLContext | None = None,
        source: str = "",
    ) -> None:
        """`source`: the address to come from, if it matters."""
        self.version = version
        self._socket = socket.create_connection(address, PATIENCE, (source, 0) if source else None)
        # Nagle's algorithm would hold the second of two small packets back for up to 40 ms.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            self._socket = tls.wrap_socket(self._socket, server_hostname="localhost")
        self._received = b""

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def set_buffers(self, size: int) -> None:
        """With small ones, a server that writes notices soon that nobody reads."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)

    def send(self, *packets: Packet | bytes) -> None:
        self._socket.settimeout(PATIENCE)
        raw = [p if isinstance(p, bytes) else encode(p, self.version) for p in packets]
        self._socket.sendall(b"".join(raw))

    def stop_sending(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def receive(self, patience: float = PATIENCE) -> Packet:
        """The next packet. Raises TimeoutError or Closed."""
        deadline = time.monotonic() + patience
        while (found := decode(self._received, 0, self.version, 1 << 28)) is None:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                more = self._socket.recv(1 << 20)
            except ConnectionError:
                more = b""
            if not more:
                raise Closed
            self._received += more
        packet, end = found
        self._received = self._received[end:]
        return packet

    def expect(self, kind: type[_P]) -> _P:
        packet = self.receive()
        assert isinstance(packet, kind), packet
        return packet

    def expect_nothing(self, patience: float = SHORT_PATIENCE) -> None:
        with contextlib.suppress(TimeoutError):
            packet = self.receive(patience)
            raise AssertionError(f"{packet} came")

    def rest(self, patience: float = PATIENCE) -> list[Packet]:
        """Every packet until the server closes, which it must."""
        packets: list[Packet] = []
        with contextlib.suppress(Closed):
            while True:
                packets.append(self.receive(patience))
        return packets

    def rest_of_bytes(self, patience: float = PATIENCE) -> bytes:
        """Whatever comes until the server closes, which it must."""
        self._socket.settimeout(patience)
        received, self._received = self._received, b""
        with contextlib.suppress(ConnectionError):
            while more := self._socket.recv(1 << 16):
                received += more
        return received

    def is_closed(self) -> bool:
        """Whether the server has closed; for a peer that is sent nothing."""
        self._socket.settimeout(0)
        try:
            return not self._socket.recv(1)
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    def trickles(self, rest: Iterator[int]) -> bool:
        """Another byte; whether the server has closed."""
        with contextlib.suppress(ConnectionError):
            self.send(bytes((next(rest),)))
        return self.is_closed()

    def send_until_stuck(self, raw: bytes, most: int, idle: Callable[[], object]) -> int:
        """Send this again and again until nobody takes it for a second; how many bytes went. `idle` returns when
        the server had a turn: one that is held up is not one that does not want it."""
        self._socket.settimeout(1.0)
        sent, stuck = 0, -1
        while sent < most and sent != stuck:
            try:
                sent += self._socket.send(raw[sent % len(raw) :])
            except TimeoutError:
                stuck = sent
                idle()
                with contextlib.suppress(TimeoutError):
                    sent += self._socket.send(raw[sent % len(raw) :])
        return sent

    def connect(self, packet: Connect) -> Connack:
        self.version = packet.version
        self.send(packet)
        return self.expect(Connack)

    def push(self, *, ack: bool = True) -> Publish:
        """The next packet, which is a push."""
        packet = self.expect(Publish)
        assert packet.topic == "push"
        if ack:
            self.send(Puback(packet.packet_id))
        return packet

    def subscribe(self, *filters: str, qos: int = 1) -> Packet:
        self.send(Subscribe(1, tuple(Subscription(f, qos) for f in filters)))
        return self.receive()


def connect_packet(
    app: AppKeys,
    registration_id: str,
    *,
    version: int = 5,
    clean: bool = False,
    expiry: int = 3600,
    password: str | None = None,
    keep_alive: int = 60,
    properties: Properties | None = None,
    **others: Any,
) -> Connect:
    """Of a device with the app's device key, unless another password is given."""
    wished: Properties = {"session_expiry_interval": expiry}
    return Connect(
        registration_id,
        clean,
        keep_alive,
        app.app_key,
        (app.device_key if password is None else password).encode(),
        version=version,
        properties={**wished, **(properties or {})} if version == 5 else {},
        **others,
    )


@contextlib.contextmanager
def device(
    server: LocalServer, registration_id: str, *, app: AppKeys | None = None, tls: ssl.SSLContext | None = None,
    **options: Any,
) -> Iterator[Peer]:  # fmt: skip
    """A connected device."""
    address = server.addresses.mqtt if tls is None else server.addresses.mqtts
    assert address is not None
    with Peer(address, tls=tls) as peer:
        connack = peer.connect(connect_packet(app or server.app, registration_id, **options))
        assert connack.reason == 0, connack
        yield peer


@contextlib.contextmanager
def publisher(
    server: LocalServer, name: str = "backend", *, app: AppKeys | None = None, **options: Any
) -> Iterator[Peer]:
    """A connected publisher."""
    app = app or server.app
    with device(server, name, app=app, password=app.master_secret, **options) as peer:
        yield peer


def acknowledged_within(seconds: int, folder: Path) -> Path:
    """Carrier profiles that give devices so much time for an acknowledgement."""
    (folder / "default.toml").write_text(f"[acks]\nfirst = {seconds}\nleast = {seconds}\nmost = {seconds}\n")
    return folder


def works(
    server: LocalServer,
    app: AppKeys | None = None,
    registration_id: str = "witness",
    tls: ssl.SSLContext | None = None,
) -> None:
    """A device gets a push and its delivery is recorded: the service is still there."""
    app = app or server.app
    password = register(server, app, registration_id)
    with device(server, registration_id, app=app, tls=tls, password=password, clean=True, expiry=0) as peer:
        msg_id = push(server, app, registration_id)
        while orjson.loads(peer.push().payload)["msg_id"] != msg_id:
            pass  # one from before
        eventually(lambda: accounts(server, app, msg_id)["delivered"] == 1)
