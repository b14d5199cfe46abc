"""What is fuzzed: functions of bytes that end, or raise something other than MQTTError, which is a finding.

`fuzz.py` runs them for long with a coverage-guided fuzzer, `test_fuzz_rows.py` with the inputs that once broke them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from broker.metrics import Metrics
from broker.model import NewDevice
from broker.tenants import tokens
from broker.tenants.access import parse_rules
from gateway.connection import Connection, Phase
from gateway.mqtt import Connect, MQTTError, Packet, Reason, decode, encode, puback_run
from gateway.websocket import WebSocketFactory
from tests.gateway.world import DAY, FakeTransport, World

MAX_PACKET: Final = 1 << 20
MAX_FRAME: Final = 1000
CLIENTS: Final = 3
STEPS: Final = 48  # of one input

# The codec


def codec(data: bytes) -> None:
    """The first byte chooses the version (0: before CONNECT), the others are packets. What decodes must encode to
    something that decodes to the same."""
    if not data:
        return
    version, raw, start = (0, 4, 5)[data[0] % 3], data[1:], 0
    try:
        while (found := decode(raw, start, version, MAX_PACKET)) is not None:
            packet, end = found
            assert start < end <= len(raw)
            _check_packet(packet, version)
            start = end
    except MQTTError as error:
        reason = error.reason
    else:
        reason = Reason.UNSPECIFIED_ERROR
    assert 0x80 <= reason <= 0xFF
    _check_acks(raw)


def _check_packet(packet: Packet, version: int) -> None:
    told = packet.version if isinstance(packet, Connect) else version
    again = encode(packet, told)
    assert decode(again, 0, version, MAX_PACKET) == (packet, len(again))
    assert decode(bytearray(b"\0" + again), 1, version, MAX_PACKET) == (packet, len(again) + 1)
    for size in {0, 1, len(again) // 2, len(again) - 1}:
        assert decode(again[:size], 0, version, MAX_PACKET) is None


def _check_acks(raw: bytes) -> None:
    """The short way for acknowledgements sees what the decoder sees."""
    if raw[:1] == b"\x40":
        try:
            packet_ids, end = puback_run(raw, 0)
        except MQTTError:
            return
        start = 0
        for packet_id in packet_ids:
            found = decode(raw, start, 4, MAX_PACKET)
            assert found is not None
            assert found[0].packet_id == packet_id  # type: ignore[union-attr]
            start = found[1]
        assert start == end


# The WebSocket transport

UPGRADE: Final = (
    b"GET /mqtt HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n"
)


class _Behind(asyncio.Protocol):
    """Behind the WebSocket; may answer the first bytes it gets."""

    def __init__(self, answers: bool) -> None:
        self.answers = answers
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        assert data
        if self.answers and not self.received:
            self.transport.write(b"answer")  # type: ignore[attr-defined]
        self.received += data


def websocket(data: bytes) -> None:
    """The first byte says whether the upgrade is done and whether it is answered, the second how the rest is cut.
    However it is cut, the same arrives, and it ends in the same way."""
    if len(data) < 2:
        return
    answers, upgraded, cut = bool(data[0] & 1), bool(data[0] & 2), data[1] % 60 + 1
    raw = (UPGRADE if upgraded else b"") + data[2:]
    _in_loop(lambda: _compare(raw, cut, answers))


def _compare(raw: bytes, cut: int, answers: bool) -> None:
    whole, parts = _through_websocket([raw], answers), _through_websocket(_cut(raw, cut), answers)
    if "too many websocket frames" not in (*whole[1], *parts[1]):  # that counts the frames of one read
        assert whole == parts


def _cut(raw: bytes, size: int) -> Iterator[bytes]:
    return (raw[start : start + size] for start in range(0, len(raw), size))


def _through_websocket(parts: Iterator[bytes] | list[bytes], answers: bool) -> tuple[bytes, list[str]]:
    behind, refused, written = _Behind(answers), list[str](), list[bytes]()
    transport = WebSocketFactory(lambda: behind, MAX_FRAME, refused.append)()
    wire = FakeTransport(written.append)
    transport.connection_made(wire)
    for part in parts:
        if wire.closed:
            break
        if part:
            transport.data_received(part)
    transport.connection_lost(None)
    assert len(refused) <= 1
    assert not behind.received or written[0].startswith(b"HTTP/1.1 101 ")
    return behind.received, refused


_loop: asyncio.AbstractEventLoop | None = None


def _own_loop() -> asyncio.AbstractEventLoop:
    global _loop  # noqa: PLW0603 - a loop for each input would be most of the time
    if _loop is None:
        _loop = asyncio.new_event_loop()
    return _loop


def _in_loop(story: Callable[[], None]) -> None:
    async def run() -> None:
        story()

    _own_loop().run_until_complete(run())


# A node and its clients


class _Errors(logging.Handler):
    """What was logged as an error: an exception that somebody caught."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _Client:
    """A connection that the input speaks through."""

    def __init__(self, world: World, name: str, devno: int) -> None:
        self._world = world
        self.name = name
        self._devno = devno
        self.open()

    def open(self) -> None:
        self.written = b""
        self.version = 0
        self.connection = Connection(self._world.node, "tcp")
        self.transport = FakeTransport(self._take)
        self.connection.connection_made(self.transport)

    def _take(self, data: bytes) -> None:
        self.written += data

    def send(self, raw: bytes) -> None:
        if raw and self.connection.phase is not Phase.CLOSED and self.transport.reading:
            self.connection.data_received(raw)
        self.read()

    def read(self) -> None:
        """What the server says is packets, in the version it was asked in. Who was sent away at once may have asked
        in either."""
        if self.connection.session is not None:
            self.version = self.connection.session.encoding.version
        said, self.written = self.written, b""
        if not self.version and _are_packets(said, 4):
            return
        assert _are_packets(said, self.version or 5), said

    def connect(self, number: int) -> None:
        """One of a few good CONNECTs."""
        app, publisher = self._world.app, self._devno < 0
        password = app.master_secret.encode()
        if not publisher:
            password = tokens.issue(app, self.name, self._devno, "other", 0, self._world.wall, DAY).encode()
        version = 4 if number & 1 else 5
        properties: dict[str, Any] = {}
        if version == 5:
            properties = {"session_expiry_interval": 600 if number & 4 else 0}
            properties |= {"receive_maximum": 2} if number & 8 else {}
            properties |= {"topic_alias_maximum": 3} if number & 16 else {}
            properties |= {"maximum_packet_size": 60} if number & 32 else {}
        connect = Connect(
            self.name,
            bool(number & 2),
            0,
            app.key,
            password,
            version=version,
            properties=properties,  # type: ignore[arg-type]
        )
        self.send(encode(connect, version))

    def lose(self) -> None:
        self.connection.connection_lost(None)
        self.read()
        self.open()


def _are_packets(said: bytes, version: int) -> bool:
    start = 0
    try:
        while start < len(said):
            found = decode(said, start, version, MAX_PACKET)
            if found is None:
                return False
            start = found[1]
    except MQTTError:
        return False
    return True


class Node:
    """A whole node; each input has an app and a node of its own, on one store."""

    def __init__(self) -> None:
        self._errors = _Errors()
        logging.getLogger().addHandler(self._errors)
        self._folder = tempfile.TemporaryDirectory()
        self._world = World(Path(self._folder.name))
        self._loop = _own_loop()
        self._loop.run_until_complete(self._world.open(CLIENTS, open=True))
        self._loop.run_until_complete(self._world.node.close())

    def close(self) -> None:
        self._loop.run_until_complete(self._world.store.close())
        logging.getLogger().removeHandler(self._errors)
        self._folder.cleanup()

    def __call__(self, data: bytes) -> None:
        """Steps of a kind, a client, and what it takes."""
        self._errors.records.clear()
        failures: list[dict[str, Any]] = []
        self._loop.set_exception_handler(lambda _, context: failures.append(context))
        self._loop.run_until_complete(asyncio.wait_for(self._story(data), 30))
        assert not failures, failures
        assert not self._errors.records, [record.getMessage() for record in self._errors.records]

    async def _story(self, data: bytes) -> None:
        world = self._world
        world.app = await world.store.create_app("fuzz", open=bool(data[:1] != b"\xff"))
        await world.store.register(world.app.app_id, [NewDevice(f"device-{n}") for n in range(CLIENTS)])
        world.metrics = Metrics()  # the gauges of one keep its node
        world.node = node = world.new_node()
        node.start()
        clients = [_Client(world, f"device-{n}", n) for n in range(CLIENTS - 1)]
        clients.append(_Client(world, "backend", -1))
        for kind, who, argument in itertools.islice(_steps(data), STEPS):
            await self._step(kind, clients[who % CLIENTS], argument)
        await world.turns(3)
        for client in clients:
            client.read()
            client.connection.connection_lost(None)
        await world.calm()
        self._check(node)
        await node.close()
        await world.apps.delete(world.app.key)

    async def _step(self, kind: int, client: _Client, argument: bytes) -> None:
        world = self._world
        match kind % 8:
            case 0 | 1:
                client.send(argument)
            case 2:
                client.connect(argument[0] if argument else 0)
            case 3:
                client.lose()
            case 4:
                await world.turns(len(argument) % 4 + 1)
            case 5:
                await world.calm()
            case 6:
                if client.connection.blocked:
                    client.connection.resume_writing()
                elif client.connection.phase is Phase.LIVE:
                    client.connection.pause_writing()
            case 7:
                await self._change_rules(argument)
        client.read()

    async def _change_rules(self, argument: bytes) -> None:
        rules: list[dict[str, str]] = [
            {
                ("allow", "deny")[byte & 1]: ("publish", "subscribe", "all", "all")[byte >> 1 & 3],
                "topic": ("#", "a/#", "a/{registration_id}/#", "+/b")[byte >> 3 & 3],
                "who": ("devices", "everyone")[byte >> 5 & 1],
            }
            for byte in argument[:4]
        ]
        await self._world.apps.set_access(self._world.app.key, parse_rules(rules))

    def _check(self, node: Any) -> None:
        """Whatever came: nobody is there any more, and what is kept is kept by sessions."""
        assert node.live == 0
        assert not node.arrivals.opening
        assert node.blocked == 0
        for hub in node.hubs:
            assert not hub.members
            assert not hub.others
            kept = sum(len(mailbox.subscriptions) for mailbox in hub.mailboxes.values())
            assert hub.subscriptions.count == kept


def _steps(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Each begins with two bytes: kind and client, and how long the argument is."""
    start = 0
    while start + 1 < len(data):
        what, size = data[start], data[start + 1]
        start += 2
        yield what & 7, what >> 3, data[start : start + size]
        start += size


def step(kind: int, who: int, argument: bytes = b"") -> bytes:
    """The other way round, for seeds and rows."""
    return bytes((kind | who << 3, len(argument))) + argument
