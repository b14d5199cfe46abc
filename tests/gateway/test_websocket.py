"""MQTT over WebSocket against a listening server, by foreign clients and by raw sockets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import itertools
import pathlib
import ssl
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
import trustme
import uvloop
import websockets
import websockets.asyncio.client
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK, InvalidStatus
from websockets.frames import Close, Frame, Opcode
from websockets.typing import Origin, Subprotocol

import gateway.websocket
from gateway.websocket import (
    MAX_FIRST_FRAME_SIZE,
    MAX_FIRST_FRAMES,
    MAX_HANDSHAKE_SIZE,
    MAX_PONG_BACKLOG,
    SAME_ORIGIN,
    SUBPROTOCOLS,
    Refusal,
    WebSocketFactory,
    WebSocketTransport,
    binary_header,
)
from tests.gateway.echo import Echo

MAX_FRAME_SIZE = 100_000
MQTT = Subprotocol("mqtt")
FIELDS = {
    "Host": "localhost",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(),
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Protocol": "mqtt",
}


def request(line: str = "GET /mqtt HTTP/1.1", **changes: str | None) -> bytes:
    """An upgrade request; a change of None leaves the field out."""
    fields = FIELDS | {name.replace("_", "-"): value for name, value in changes.items()}
    lines = [line, *(f"{name}: {value}" for name, value in fields.items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode()


def frame(opcode: Opcode, payload: bytes = b"", *, fin: bool = True, masked: bool = True) -> bytes:
    return Frame(opcode, payload, fin).serialize(mask=masked)


def closing(code: int) -> bytes:
    """The server's Close frame."""
    return frame(Opcode.CLOSE, Close(code, "").serialize(), masked=False)


@dataclass
class Listening:
    """A server on a free port. `echoes` holds the protocols it made, `refusals` what it refused."""

    make_protocol: Callable[[], Echo] = Echo
    close_timeout: float = 60.0
    origins: str = SAME_ORIGIN
    tls: ssl.SSLContext | None = None
    echoes: list[Echo] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    accepted: asyncio.Event = field(default_factory=asyncio.Event)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    port: int = 0

    def make(self) -> Echo:
        self.echoes.append(self.make_protocol())
        self.accepted.set()
        return self.echoes[-1]

    @property
    def url(self) -> str:
        return f"{'wss' if self.tls else 'ws'}://localhost:{self.port}/mqtt"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer

    async def upgrade(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await self.connect()
        writer.write(request())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        return reader, writer


@contextlib.asynccontextmanager
async def listening(**options: Any) -> AsyncIterator[Listening]:
    where = Listening(**options)
    factory = WebSocketFactory(
        where.make,
        MAX_FRAME_SIZE,
        where.refusals.append,
        origins=where.origins,
        close_timeout=where.close_timeout,
    )
    loop = asyncio.get_running_loop()
    server = await loop.create_server(factory, "127.0.0.1", 0, ssl=where.tls)
    where.port = server.sockets[0].getsockname()[1]
    try:
        yield where
    finally:
        server.close()
        for echo in where.echoes:
            echo.transport.abort()
            await echo.lost.wait()
        for writer in where.writers:
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Awaitable[None]], None]]:
    """Runs a story on each kind of event loop."""
    new_loop = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=new_loop) as runner:

        def run_story(story: Awaitable[None]) -> None:
            async def bounded() -> None:
                async with asyncio.timeout(60):
                    await story

            runner.run(bounded())

        yield run_story


Run = Callable[[Awaitable[None]], None]

# Foreign clients


def test_the_websockets_client_gets_its_bytes_back(run: Run) -> None:
    async def story() -> None:
        async with listening() as at, websockets.asyncio.client.connect(at.url, subprotocols=[MQTT]) as peer:
            assert peer.subprotocol == "mqtt"
            for size in (1, 125, 126, 65_535, 65_536, MAX_FRAME_SIZE):  # each form of the length
                await peer.send(b"x" * size)
                await _expect(peer, b"x" * size)
            await peer.close()
            assert peer.close_code == 1000
            await at.echoes[0].lost.wait()
            assert at.refusals == []

    run(story())


async def _expect(peer: websockets.asyncio.client.ClientConnection, expected: bytes) -> None:
    """What was sent as one frame may come back as several."""
    received = b""
    while len(received) < len(expected):
        part = await peer.recv()
        assert isinstance(part, bytes)
        received += part
    assert received == expected


def test_the_aiohttp_client_gets_its_bytes_back_and_no_compression(run: Run) -> None:
    async def story() -> None:
        async with (
            listening() as at,
            aiohttp.ClientSession() as http,
            http.ws_connect(at.url, protocols=("mqtt",), compress=15) as peer,
        ):
            assert peer.protocol == "mqtt"
            assert peer.compress == 0
            await peer.send_bytes(b"\xc0\x00")
            assert await peer.receive_bytes() == b"\xc0\x00"
            await peer.close(code=1001)
            assert peer.close_code == 1001

    run(story())


def test_a_ping_is_answered_and_stays_outside_mqtt(run: Run) -> None:
    async def story() -> None:
        async with listening() as at, websockets.asyncio.client.connect(at.url, subprotocols=[MQTT]) as peer:
            await (await peer.ping(b"are you there"))
            assert at.echoes[0].received == []

    run(story())


def test_the_mqtt_side_closes_and_the_client_sees_1000(run: Run) -> None:
    async def story() -> None:
        async with listening() as at, websockets.asyncio.client.connect(at.url, subprotocols=[MQTT]) as peer:
            at.echoes[0].transport.close()
            assert at.echoes[0].transport.is_closing()
            with pytest.raises(ConnectionClosedOK):
                await peer.recv()
            await at.echoes[0].lost.wait()
            assert at.echoes[0].events == ["made", "lost"]

    run(story())


def test_a_client_without_the_subprotocol_is_refused(run: Run) -> None:
    async def story() -> None:
        async with listening() as at:
            with pytest.raises(InvalidStatus) as refused:
                await websockets.asyncio.client.connect(at.url)
            assert refused.value.response.status_code == 400
            assert at.refusals == [Refusal.SUBPROTOCOL]

    run(story())


def test_a_text_frame_is_refused_with_1003(run: Run) -> None:
    async def story() -> None:
        async with listening(close_timeout=0.05) as at:
            async with websockets.asyncio.client.connect(at.url, subprotocols=[MQTT]) as peer:
                await peer.send("CONNECT")
                with pytest.raises(ConnectionClosedError) as refused:
                    await peer.recv()
            assert refused.value.rcvd is not None
            assert refused.value.rcvd.code == 1003

    run(story())


def test_it_works_over_tls(run: Run) -> None:
    authority = trustme.CA()
    server_side, client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server_side)
    authority.configure_trust(client_side)

    async def story() -> None:
        async with (
            listening(tls=server_side) as at,
            websockets.asyncio.client.connect(at.url, subprotocols=[MQTT], ssl=client_side) as peer,
        ):
            await peer.send(b"\xc0\x00")
            assert await peer.recv() == b"\xc0\x00"
            assert at.echoes[0].transport.get_extra_info("cipher") is not None

    run(story())


# Handshakes

ACCEPTED = [
    pytest.param(request(), "mqtt", id="plain"),
    pytest.param(request("GET /mqtt?client=7 HTTP/1.1"), "mqtt", id="with a query"),
    pytest.param(request(Connection="keep-alive, Upgrade"), "mqtt", id="as Firefox sends it"),
    pytest.param(request(Sec_WebSocket_Protocol="mqttv3.1"), "mqttv3.1", id="MQTT 3.1 client"),
    pytest.param(request(Sec_WebSocket_Protocol="mqttv3.1, mqtt"), "mqtt", id="both"),
    pytest.param(request(Sec_WebSocket_Extensions="permessage-deflate"), "mqtt", id="offers deflate"),
]

REFUSED = [
    pytest.param(request("GET / HTTP/1.1"), 404, Refusal.PATH, id="root"),
    pytest.param(request("GET /mqtt/ HTTP/1.1"), 404, Refusal.PATH, id="longer path"),
    pytest.param(b"GET /favicon.ico HTTP/1.1\r\n\r\n", 404, Refusal.PATH, id="browser"),
    pytest.param(request(Sec_WebSocket_Protocol=None), 400, Refusal.SUBPROTOCOL, id="no subprotocol"),
    pytest.param(request(Sec_WebSocket_Protocol="MQTT, amqp"), 400, Refusal.SUBPROTOCOL, id="other ones"),
    pytest.param(b"GET /mqtt HTTP/1.1\r\nHost: h\r\n\r\n", 426, Refusal.NO_UPGRADE, id="plain GET"),
    pytest.param(request(Upgrade="h2c"), 426, Refusal.NO_UPGRADE, id="other upgrade"),
    pytest.param(request(Connection="close"), 426, Refusal.NO_UPGRADE, id="no connection upgrade"),
    pytest.param(request(Sec_WebSocket_Version="8"), 400, Refusal.BAD_HANDSHAKE, id="old version"),
    pytest.param(request(Sec_WebSocket_Key=None), 400, Refusal.BAD_HANDSHAKE, id="no key"),
    pytest.param(request(Sec_WebSocket_Key="AAAA"), 400, Refusal.BAD_HANDSHAKE, id="short key"),
    pytest.param(request(Sec_WebSocket_Key="ä" * 24), 400, Refusal.BAD_HANDSHAKE, id="key not base64"),
    pytest.param(b"GET /mqtt\r\n\r\n", 400, Refusal.BAD_HANDSHAKE, id="HTTP 0.9"),
    pytest.param(b"\x16\x03\x01\x02\x00\r\n\r\n", 400, Refusal.BAD_HANDSHAKE, id="TLS to a plain port"),
    pytest.param(b"GET /mqtt HTTP/1.1\r\nno colon\r\n\r\n", 400, Refusal.BAD_HANDSHAKE, id="bad header"),
    pytest.param(request(Content_Length="5"), 400, Refusal.BAD_HANDSHAKE, id="body"),
    pytest.param(b"a" * (MAX_HANDSHAKE_SIZE + 1), 431, Refusal.LONG_HANDSHAKE, id="never ends"),
    pytest.param(request(X="a" * MAX_HANDSHAKE_SIZE), 431, Refusal.LONG_HANDSHAKE, id="too long"),
]


@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize(("sent", "subprotocol"), ACCEPTED)
def test_handshake_is_accepted(run: Run, sent: bytes, subprotocol: str, bytewise: bool) -> None:
    async def story() -> None:
        async with listening() as at:
            reader, writer = await at.connect()
            await _send(writer, sent, bytewise)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
            assert f"\r\nSec-WebSocket-Protocol: {subprotocol}\r\n".encode() in answer
            assert b"Sec-WebSocket-Extensions" not in answer
            assert at.refusals == []

    run(story())


async def _send(writer: asyncio.StreamWriter, sent: bytes, bytewise: bool) -> None:
    for part in (sent[i : i + 1] for i in range(len(sent))) if bytewise else [sent]:
        writer.write(part)
        await writer.drain()


@pytest.mark.parametrize(("sent", "status", "refusal"), REFUSED)
def test_handshake_is_refused(run: Run, sent: bytes, status: int, refusal: Refusal) -> None:
    async def story() -> None:
        async with listening() as at:
            reader, writer = await at.connect()
            writer.write(sent)
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            assert head.startswith(f"HTTP/1.1 {status} ".encode())
            assert body.endswith(b"\n")
            await at.echoes[0].lost.wait()
            assert at.echoes[0].events == ["made", "lost"]
            assert at.refusals == [refusal]

    run(story())


def test_a_post_is_refused(run: Run) -> None:
    async def story() -> None:
        async with listening() as at:
            reader, writer = await at.connect()
            writer.write(request("POST /mqtt HTTP/1.1"))
            assert (await reader.readline())[9:12] in (b"400", b"405")  # websockets 15, 17
            await at.echoes[0].lost.wait()
            assert at.refusals == [Refusal.BAD_HANDSHAKE]

    run(story())


def test_frames_may_share_the_read_with_the_request(run: Run) -> None:
    async def story() -> None:
        async with listening() as at:
            reader, writer = await at.connect()
            writer.write(request() + frame(Opcode.BINARY, b"ab") + frame(Opcode.BINARY, b"c"))
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(5) == b"\x82\x03abc"
            assert at.echoes[0].received == [b"abc"]

    run(story())


@pytest.mark.parametrize("upgraded", [False, True])
def test_a_silent_socket_is_ended_by_the_deadline_of_the_protocol_behind(run: Run, upgraded: bool) -> None:
    async def story() -> None:
        async with listening() as at:
            reader, _ = await (at.upgrade() if upgraded else at.connect())
            await at.accepted.wait()
            at.echoes[0].transport.abort()
            with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                await reader.readexactly(1)
            await at.echoes[0].lost.wait()

    run(story())


def test_close_before_the_request_closes_the_socket_and_a_write_is_lost(run: Run) -> None:
    async def story() -> None:
        async with listening() as at:
            reader, _ = await at.connect()
            await at.accepted.wait()
            at.echoes[0].transport.write(b"too early")
            at.echoes[0].transport.close()
            assert await reader.read() == b""
            await at.echoes[0].lost.wait()

    run(story())


# Pages

LISTED = "https://app.example.com, https://b.example:8443,null"
TWICE = "https://app.example.com\r\nOrigin: https://app.example.com"
ORIGINS = [
    # setting, Host, Origin, let in
    ("same", "localhost", None, True),  # no browser
    ("same", "localhost", "http://localhost", True),
    ("same", "localhost:8083", "https://localhost:3000", True),  # a page has a port of its own
    ("same", "Push.Example.com:8083", "https://push.example.COM", True),
    ("same", "[2001:db8::1]:8083", "https://[2001:DB8::1]", True),
    ("same", "push.example.com", "https://example.com", False),
    ("same", "push.example.com", "https://evil-push.example.com", False),
    ("same", "push.example.com", "https://push.example.com.evil.org", False),
    ("same", "push.example.com", "https://evil.org/?push.example.com", False),
    ("same", "push.example.com", "https://push.example.com@evil.org", False),
    ("same", "push.example.com", "https://push.example.com https://evil.org", False),
    ("same", "push.example.com", "null", False),  # a sandboxed page
    ("same", "push.example.com", "", False),
    ("same", "push.example.com", "push.example.com", False),
    ("same", "p\xe4.example", "https://p\xf6.example", False),  # both are `?` to the library
    ("same", "", "https://", False),
    ("same", None, "https://push.example.com", False),
    ("same", "app.example.com", TWICE, False),
    ("same", "evil.org\r\nHost: push.example.com", "https://evil.org", False),
    ("any", "push.example.com", "https://evil.org", True),
    ("any", "push.example.com", "null", True),
    (LISTED, "push.example.com", None, True),
    (LISTED, "push.example.com", "https://app.example.com", True),
    (LISTED, "push.example.com", "https://b.example:8443", True),
    (LISTED, "push.example.com", "null", True),
    (LISTED, "push.example.com", "https://b.example", False),
    (LISTED, "push.example.com", "http://app.example.com", False),
    (LISTED, "push.example.com", "https://push.example.com", False),  # itself is not listed
    (LISTED, "push.example.com", "https://app.example.com, https://b.example:8443", False),
    (LISTED, "push.example.com", TWICE, False),
]


@pytest.mark.parametrize(("origins", "host", "origin", "let_in"), ORIGINS)
def test_a_page_is_let_in_by_its_origin(
    run: Run, origins: str, host: str | None, origin: str | None, let_in: bool
) -> None:
    async def story() -> None:
        async with listening(origins=origins) as at:
            reader, writer = await at.connect()
            writer.write(request(Host=host, Origin=origin))
            if let_in:
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
                assert at.refusals == []
            else:
                assert (await reader.read()).startswith(b"HTTP/1.1 403 ")
                assert at.refusals == [Refusal.ORIGIN]

    run(story())


def test_the_websockets_client_is_refused_with_a_strange_origin(run: Run) -> None:
    async def story() -> None:
        async with listening() as at:
            own = Origin(f"http://localhost:{at.port}")
            async with websockets.asyncio.client.connect(at.url, subprotocols=[MQTT], origin=own) as peer:
                await peer.send(b"\xc0\x00")
                assert await peer.recv() == b"\xc0\x00"
            with pytest.raises(InvalidStatus) as refused:
                await websockets.asyncio.client.connect(
                    at.url, subprotocols=[MQTT], origin=Origin("https://evil.org")
                )
            assert refused.value.response.status_code == 403
            assert at.refusals == [Refusal.ORIGIN]

    run(story())


# Frames

TEXT, BINARY, CONT = Opcode.TEXT, Opcode.BINARY, Opcode.CONT
PING, PONG, CLOSE = Opcode.PING, Opcode.PONG, Opcode.CLOSE

BAD_FRAMES = [
    pytest.param(frame(TEXT, b"hi"), b"", 1003, Refusal.TEXT, id="text"),
    pytest.param(frame(TEXT, b"h", fin=False), b"", 1003, Refusal.TEXT, id="text fragment"),
    pytest.param(frame(BINARY, b"hi", masked=False), b"", 1002, Refusal.BAD_FRAME, id="unmasked"),
    pytest.param(frame(CONT, b"hi"), b"", 1002, Refusal.BAD_FRAME, id="continues nothing"),
    pytest.param(
        frame(BINARY, b"a", fin=False) + frame(BINARY, b"b"),
        b"a",
        1002,
        Refusal.BAD_FRAME,
        id="not continued",
    ),
    pytest.param(b"\x83\x80\0\0\0\0", b"", 1002, Refusal.BAD_FRAME, id="unknown opcode"),
    pytest.param(b"\xc2\x81\0\0\0\0a", b"", 1002, Refusal.BAD_FRAME, id="reserved bit: deflate"),
    pytest.param(b"\x09\x80\0\0\0\0", b"", 1002, Refusal.BAD_FRAME, id="fragmented ping"),
    pytest.param(b"\x89\xfe\x00\x7e\0\0\0\0" + bytes(126), b"", 1002, Refusal.BAD_FRAME, id="long ping"),
    pytest.param(frame(CLOSE, b"\x03"), b"", 1002, Refusal.BAD_FRAME, id="half a close code"),
    pytest.param(frame(CLOSE, b"\x03\xed"), b"", 1002, Refusal.BAD_FRAME, id="close code 1005"),
    pytest.param(frame(CLOSE, b"\x03\xe8\xff"), b"", 1002, Refusal.BAD_FRAME, id="close reason not UTF-8"),
    pytest.param(
        b"\x82\xff" + (MAX_FRAME_SIZE + 1).to_bytes(8, "big"), b"", 1009, Refusal.LONG_FRAME, id="long"
    ),
    pytest.param(b"\x82\xff" + b"\xff" * 8, b"", 1009, Refusal.LONG_FRAME, id="2**64 - 1"),
    pytest.param(
        frame(BINARY, b"kept") + frame(TEXT, b"hi") + frame(BINARY, b"not"),
        b"kept",
        1003,
        Refusal.TEXT,
        id="late",
    ),
]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize(("sent", "delivered", "code", "refusal"), BAD_FRAMES)
def test_bad_frame_is_answered(
    run: Run, sent: bytes, delivered: bytes, code: int, refusal: Refusal, bytewise: bool, known: bool
) -> None:
    async def story() -> None:
        async with listening() as at:
            reader, writer = await (_known(at) if known else at.upgrade())
            await _send(writer, sent, bytewise)
            answers = await reader.readexactly(4 + (len(delivered) + 2 if delivered else 0))
            assert answers == (bytes((0x82, len(delivered))) + delivered if delivered else b"") + closing(
                code
            )
            assert at.refusals == [refusal]
            assert b"".join(at.echoes[0].received) == (b"CONNECT" if known else b"") + delivered
            writer.write_eof()
            await at.echoes[0].lost.wait()

    run(story())


async def _known(at: Listening) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A device that has its answer."""
    reader, writer = await at.upgrade()
    writer.write(frame(BINARY, b"CONNECT"))
    assert await reader.readexactly(9) == b"\x82\x07CONNECT"
    return reader, writer


def test_a_message_that_is_not_continued_in_a_later_read_is_refused(run: Run) -> None:
    async def story() -> None:
        async with listening() as at:
            reader, writer = await _known(at)
            writer.write(frame(BINARY, b"a", fin=False))
            assert await reader.readexactly(3) == b"\x82\x01a"
            writer.write(frame(BINARY, b"b"))
            assert await reader.readexactly(4) == closing(1002)

    run(story())


@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        pytest.param(frame(PING, b"x"), b"\x8a\x01x", id="ping"),
        pytest.param(frame(PING), b"\x8a\x00", id="empty ping"),
        pytest.param(frame(PONG, b"x") + frame(PING), b"\x8a\x00", id="unasked pong"),
        pytest.param(frame(BINARY) + frame(PING), b"\x8a\x00", id="empty binary"),
        pytest.param(frame(CLOSE), b"\x88\x00", id="close without code"),
        pytest.param(frame(CLOSE, b"\x03\xe9bye"), closing(1001), id="close with code"),
        pytest.param(frame(CLOSE, b"\x0f\xa0"), closing(4000), id="private close code"),
    ],
)
def test_control_frame_is_answered(run: Run, sent: bytes, answered: bytes, bytewise: bool) -> None:
    async def story() -> None:
        async with listening() as at:
            reader, writer = await at.upgrade()
            await _send(writer, sent, bytewise)
            assert await reader.readexactly(len(answered)) == answered
            if answered[0] == 0x88:
                assert await reader.read() == b""
            assert at.echoes[0].received == []
            assert at.refusals == []

    run(story())


def test_fragments_are_one_stream_and_may_enclose_a_ping(run: Run) -> None:
    async def story() -> None:
        async with listening() as at:
            reader, writer = await at.upgrade()
            parts = [
                frame(BINARY, b"a", fin=False),
                frame(PING),
                frame(CONT, b"b", fin=False),
                frame(CONT, b"c"),
            ]
            writer.write(b"".join(parts) + frame(BINARY, b"d"))
            assert await reader.readexactly(8) == b"\x8a\x00\x82\x04abcd"
            assert at.echoes[0].received == [b"abcd"]

    run(story())


def test_frames_of_the_full_size_are_for_those_who_got_an_answer(run: Run) -> None:
    async def story() -> None:
        async with listening() as at:
            reader, writer = await _known(at)
            writer.write(frame(BINARY, bytes(MAX_FRAME_SIZE)))
            assert (await reader.readexactly(MAX_FRAME_SIZE + 10))[10:] == bytes(MAX_FRAME_SIZE)
            writer.write(b"\x82\xff" + (MAX_FRAME_SIZE + 1).to_bytes(8, "big"))
            assert await reader.readexactly(4) == closing(1009)

            reader, writer = await at.upgrade()
            writer.write(b"\x82\xff" + (MAX_FIRST_FRAME_SIZE + 1).to_bytes(8, "big"))
            assert await reader.readexactly(4) == closing(1009)

    run(story())


def test_a_stranger_may_send_few_frames_in_one_read_and_a_known_device_many() -> None:
    refusals: list[str] = []
    storm = frame(PING) * (MAX_FIRST_FRAMES + 1)

    async def story() -> None:  # closing needs a loop
        stranger = WebSocketFactory(Sink, MAX_FRAME_SIZE, refusals.append)()
        stranger.connection_made(Wire())
        stranger.data_received(request())
        stranger.data_received(storm)
        assert stranger.is_closing()
        stranger.connection_lost(None)

    asyncio.run(story())
    assert refusals == [Refusal.MANY_FRAMES]
    _opened(Sink()).data_received(storm)


# The end


def test_what_came_before_close_in_the_same_read_is_delivered_first(run: Run) -> None:
    """Else the will of a device that said DISCONNECT would be published."""

    async def story() -> None:
        async with listening() as at:
            reader, writer = await at.upgrade()
            writer.write(frame(BINARY, b"\xe0\x00") + frame(CLOSE, b"\x03\xe8"))
            assert await reader.read() == b"\x82\x02\xe0\x00" + closing(1000)
            await at.echoes[0].lost.wait()
            assert at.echoes[0].received == [b"\xe0\x00"]

    run(story())


class ClosesAtOnce(Echo):
    def data_received(self, data: bytes) -> None:
        self.received.append(data)
        self.transport.pause_reading()  # as a connection does while it decides about CONNECT
        self.transport.writelines([b"sorry, ", b"no"])
        self.transport.close()
        self.transport.write(b"lost")


def test_after_our_close_nothing_is_delivered_and_the_peers_close_ends_it(run: Run) -> None:
    async def story() -> None:
        async with listening(make_protocol=ClosesAtOnce) as at:
            reader, writer = await at.upgrade()
            writer.write(frame(BINARY, b"CONNECT"))
            assert await reader.readexactly(15) == b"\x82\x09sorry, no" + closing(1000)
            writer.write(frame(BINARY, b"more") + frame(PING) + frame(CLOSE, b"\x03\xe8"))
            assert await reader.read() == b""
            await at.echoes[0].lost.wait()
            assert at.echoes[0].received == [b"CONNECT"]

    run(story())


@pytest.mark.parametrize(
    "sent", [frame(BINARY, b"CONNECT"), frame(TEXT, b"hi")], ids=["our close", "refused"]
)
def test_a_peer_that_never_answers_close_is_aborted(run: Run, sent: bytes) -> None:
    async def story() -> None:
        async with listening(make_protocol=ClosesAtOnce, close_timeout=0.05) as at:
            _, writer = await at.upgrade()
            writer.write(sent)
            await at.echoes[0].lost.wait()

    run(story())


def test_tcp_end_without_close_is_told(run: Run) -> None:
    async def story() -> None:
        async with listening() as at:
            reader, writer = await at.upgrade()
            writer.write(frame(BINARY, b"\xc0\x00")[:4])
            writer.write_eof()
            assert await reader.read() == b""
            await at.echoes[0].lost.wait()
            assert at.echoes[0].events == ["made", "eof", "lost"]

    run(story())


def test_a_slow_reader_is_told_to_the_protocol_behind(run: Run) -> None:
    async def story() -> None:
        async with listening() as at:
            reader, _ = await at.upgrade()
            echo = at.echoes[0]
            echo.transport.set_write_buffer_limits(high=65_536)
            written = 0
            while not echo.paused.is_set():
                echo.transport.write(bytes(65_536))
                written += 65_536
                await asyncio.sleep(0)
            assert echo.transport.get_write_buffer_size() > 65_536
            await reader.readexactly(written // 65_536 * (65_536 + 10))
            await echo.resumed.wait()

    run(story())


def test_pings_that_go_unread_do_not_fill_the_write_buffer(run: Run) -> None:
    async def story() -> None:
        async with listening() as at:
            _, writer = await at.upgrade()
            transport = at.echoes[0].transport
            while transport.get_write_buffer_size() < MAX_PONG_BACKLOG:  # first, the socket's own buffers
                transport.write(bytes(MAX_PONG_BACKLOG))
                await asyncio.sleep(0)
            before = transport.get_write_buffer_size()
            writer.write(frame(PING, bytes(125)) * 1000 + frame(BINARY, b"end"))
            await at.echoes[0].heard.wait()
            assert transport.get_write_buffer_size() <= before + len(b"\x82\x03end")

    run(story())


# Without a socket: every split, and the cost


class Wire(asyncio.Transport):
    """The other end of nothing."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False


class Sink(asyncio.Protocol):
    __slots__ = ("received",)

    def __init__(self) -> None:
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data


def _opened(sink: Sink) -> WebSocketTransport:
    websocket = WebSocketFactory(lambda: sink, MAX_FRAME_SIZE, pytest.fail)()
    websocket.connection_made(Wire())
    websocket.data_received(request())
    websocket.write(b"CONNACK")
    return websocket


@given(
    payloads=st.lists(st.binary(max_size=300), max_size=8),
    fins=st.lists(st.booleans(), min_size=8, max_size=8),
    cuts=st.lists(st.integers(0, 2500), max_size=12),
)
def test_however_a_stream_is_framed_and_cut_it_arrives_whole(
    payloads: list[bytes], fins: list[bool], cuts: list[int]
) -> None:
    sent, opcode = b"", BINARY
    for payload, fin in zip(payloads, fins, strict=False):
        sent += frame(opcode, payload, fin=fin) + frame(PING)
        opcode = BINARY if fin else CONT
    edges = sorted({0, *(min(cut, len(sent)) for cut in cuts), len(sent)})
    sink = Sink()
    websocket = _opened(sink)
    for start, end in itertools.pairwise(edges):
        websocket.data_received(sent[start:end])
    assert sink.received == b"".join(payloads)


@given(st.binary(min_size=1, max_size=130))
def test_the_short_way_and_the_librarys_way_agree(payload: bytes) -> None:
    short, long = Sink(), Sink()
    raw = frame(BINARY, payload)
    _opened(short).data_received(raw)
    _opened(long).data_received(raw + frame(PONG))
    assert short.received == long.received == payload


def test_the_second_half_of_a_frame_may_look_like_a_frame() -> None:
    sink = Sink()
    websocket = _opened(sink)
    inside = b"\x82\x82\0\0\0\0ab"
    websocket.data_received(b"\x82\x88\0\0\0\0")
    websocket.data_received(inside)
    assert sink.received == inside


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536])
def test_binary_header_is_the_librarys(size: int) -> None:
    assert binary_header(size) + bytes(size) == frame(BINARY, bytes(size), masked=False)


def test_an_idle_websocket_keeps_one_small_object_and_nothing_of_the_library() -> None:
    ours = tracemalloc.Filter(True, gateway.websocket.__file__)
    library = tracemalloc.Filter(True, f"{pathlib.Path(websockets.__file__).parent}/*")
    _idle()  # fills the library's caches
    kept: list[object] = [None] * 1000
    tracemalloc.start()
    for number in range(1000):
        kept[number] = _idle()
    gc.collect()
    kept_now = tracemalloc.take_snapshot().filter_traces([ours, library])
    tracemalloc.stop()
    assert sum(statistic.size for statistic in kept_now.statistics("filename")) / 1000 < 128


def _idle() -> WebSocketTransport:
    sink = Sink()
    websocket = _opened(sink)
    websocket.data_received(frame(BINARY, b"a") + frame(PING) + frame(BINARY, b"bc", fin=False) + frame(CONT))
    sink.received = b""
    return websocket


def test_the_subprotocols_are_those_of_mqtt() -> None:
    assert SUBPROTOCOLS == ("mqtt", "mqttv3.1")
