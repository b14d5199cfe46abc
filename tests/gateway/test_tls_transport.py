"""The TLS transport around an echo: peers of Python's ssl and of openssl, and bytes in pieces, in any order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import shutil
import ssl
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from gateway.listeners import Certificate
from gateway.tls import MAX_RECORD, Refusal, TlsFactory, TlsTransport
from tests.gateway.echo import Echo
from tests.gateway.world import FakeTransport
from tests.patience import PATIENCE

MANY = 4 << 20  # bytes, more than the sockets of a connection hold
NOT_TLS = b"\x10\x10\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x03foo"
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl: apt-get install openssl")


class Files:
    """A certificate that is signed by nobody but a CA of ours."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.certificate, self.authority = folder / "server.pem", folder / "ca.pem"
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(self.certificate))
        authority.cert_pem.write_to_path(str(self.authority))

    def server(self) -> ssl.SSLContext:
        return Certificate(self.certificate, self.certificate).context

    def client(self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.authority))
        context.maximum_version = version
        return context


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


class Listening:
    def __init__(self, context: ssl.SSLContext) -> None:
        self.refusals: list[str] = []
        self.echoes: list[Echo] = []
        self.factory = TlsFactory(context, self.refusals.append)
        self.accepted = asyncio.Event()
        self.port = 0

    def make(self) -> TlsTransport:
        self.echoes.append(Echo())
        self.accepted.set()
        return self.factory.around(self.echoes[-1])


@contextlib.asynccontextmanager
async def listening(files: Files) -> AsyncIterator[Listening]:
    at = Listening(files.server())
    server = await asyncio.get_running_loop().create_server(at.make, "127.0.0.1", 0)
    at.port = server.sockets[0].getsockname()[1]
    try:
        yield at
        assert not at.factory.incoming.pending
        assert not at.factory.outgoing.pending
    finally:
        server.close()
        for echo in at.echoes:
            echo.transport.abort()
            await echo.lost.wait()


@contextlib.asynccontextmanager
async def connected(
    at: Listening, context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """By TLS, or (no context) by TCP."""
    name = "localhost" if context else None
    reader, writer = await asyncio.open_connection("127.0.0.1", at.port, ssl=context, server_hostname=name)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


class Half:
    """The client's half of TLS, whose records are in the test's hands."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self._shaken = False

    def take(self, records: bytes) -> bytes:
        """What they hold for us; goes on with the handshake as far as it can."""
        self._incoming.write(records)
        plain = b""
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            if not self._shaken:
                self.tls.do_handshake()
                self._shaken = True
            while piece := self.tls.read(MAX_RECORD):
                plain += piece
        return plain

    def records(self) -> bytes:
        """To be sent now."""
        return self._outgoing.read()

    def goodbye(self) -> None:
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()

    async def shake_hands(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.take(b"")
        writer.write(self.records())
        while not self._shaken:
            self.take(await reader.read(1 << 16))
            writer.write(self.records())

    async def read_to_the_end(self, reader: asyncio.StreamReader) -> bytes:
        """All that came. Raises ssl.SSLEOFError if no close_notify was behind it."""
        plain = self.take(await reader.read(-1))
        self._incoming.write_eof()
        with contextlib.suppress(ssl.SSLZeroReturnError):  # so it says once we have said goodbye, too
            assert self.tls.read(1) == b""
        return plain


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Awaitable[None]], None]]:
    """Runs a story on each kind of event loop."""
    new_loop = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=new_loop) as runner:

        def run_story(story: Awaitable[None]) -> None:
            async def bounded() -> None:
                async with asyncio.timeout(PATIENCE):
                    await story

            runner.run(bounded())

        yield run_story


Run = Callable[[Awaitable[None]], None]

# Peers of Python's ssl


@pytest.mark.parametrize("version", VERSIONS)
def test_a_peer_gets_its_bytes_back(run: Run, files: Files, version: ssl.TLSVersion) -> None:
    async def story() -> None:
        async with listening(files) as at, connected(at, files.client(version)) as (reader, writer):
            assert writer.get_extra_info("ssl_object").version() == version.name.replace("_", ".")
            assert writer.get_extra_info("ssl_object").selected_alpn_protocol() is None
            for size in (1, MAX_RECORD, MAX_RECORD + 1, 300_000):
                writer.write(b"x" * size)
                assert await reader.readexactly(size) == b"x" * size

    run(story())


def test_mqtt_is_the_protocol_where_one_is_asked_for(run: Run, files: Files) -> None:
    async def story() -> None:
        context = files.client()
        context.set_alpn_protocols(["http/1.1", "mqtt"])
        async with listening(files) as at, connected(at, context) as (_, writer):
            assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "mqtt"

    run(story())


@pytest.mark.parametrize("version", VERSIONS)
def test_a_ticket_saves_the_handshake(run: Run, files: Files, version: ssl.TLSVersion) -> None:
    async def story() -> None:
        context, session = files.client(version), None
        async with listening(files) as at:
            for again in (False, True, True):
                async with connected(at) as (reader, writer):
                    half = Half(context)
                    if session is not None:
                        half.tls.session = session
                    await half.shake_hands(reader, writer)
                    assert half.tls.session_reused is again
                    while half.tls.session is None or not half.tls.session.has_ticket:
                        half.take(await reader.read(1000))
                    session = half.tls.session

    run(story())


def test_a_peer_that_does_not_read_is_noticed(run: Run, files: Files) -> None:
    async def story() -> None:
        async with listening(files) as at, connected(at) as (reader, writer):
            half = Half(files.client())
            await half.shake_hands(reader, writer)
            half.tls.write(b"x")
            writer.write(half.records())
            await at.accepted.wait()
            (echo,) = at.echoes
            await echo.heard.wait()
            sent = 1
            while not echo.paused.is_set():
                echo.transport.write(b"y" * MANY)
                sent += MANY
            assert echo.transport.get_write_buffer_size() > 0
            taken = 0
            while taken < sent:
                taken += len(half.take(await reader.read(1 << 20)))
            await echo.resumed.wait()
            assert taken == sent

    run(story())


def test_nothing_is_read_while_it_is_paused(run: Run, files: Files) -> None:
    async def story() -> None:
        async with listening(files) as at, connected(at) as (reader, writer):
            half = Half(files.client())
            await half.shake_hands(reader, writer)
            await at.accepted.wait()
            (echo,) = at.echoes
            echo.transport.pause_reading()
            half.tls.write(b"x")
            writer.write(half.records())
            async with connected(at, files.client()) as (reader_2, writer_2):  # who comes later is heard
                writer_2.write(b"y")
                assert await reader_2.readexactly(1) == b"y"
            assert not echo.received
            echo.transport.resume_reading()
            await echo.heard.wait()
            assert echo.received == [b"x"]

    run(story())


# The end


@pytest.mark.parametrize("version", VERSIONS)
def test_a_goodbye_is_answered(run: Run, files: Files, version: ssl.TLSVersion) -> None:
    async def story() -> None:
        async with listening(files) as at, connected(at) as (reader, writer):
            half = Half(files.client(version))
            await half.shake_hands(reader, writer)
            half.tls.write(b"the last")
            half.goodbye()
            writer.write(half.records())
            assert await half.read_to_the_end(reader) == b"the last"
            (echo,) = at.echoes
            await echo.lost.wait()
            assert (b"".join(echo.received), echo.events, at.refusals) == (
                b"the last",
                ["made", "eof", "lost"],
                [],
            )

    run(story())


@pytest.mark.parametrize("way", ["close", "write_eof"])
def test_our_end_is_a_goodbye(run: Run, files: Files, way: str) -> None:
    async def story() -> None:
        async with listening(files) as at, connected(at) as (reader, writer):
            half = Half(files.client())
            await half.shake_hands(reader, writer)
            half.tls.write(b"x")
            writer.write(half.records())
            await at.accepted.wait()
            (echo,) = at.echoes
            await echo.heard.wait()
            getattr(echo.transport, way)()
            echo.transport.write(b"lost")
            assert echo.transport.is_closing()
            assert not echo.transport.can_write_eof()
            assert await half.read_to_the_end(reader) == b"x"
            if way == "write_eof":  # it may still send, and nobody listens
                half.tls.write(b"y")
                writer.write(half.records())
                writer.write_eof()
            await echo.lost.wait()
            assert echo.received == [b"x"]

    run(story())


def test_a_peer_that_stops_sending_without_a_goodbye_is_told_one(run: Run, files: Files) -> None:
    async def story() -> None:
        async with listening(files) as at, connected(at) as (reader, writer):
            half = Half(files.client())
            await half.shake_hands(reader, writer)
            half.tls.write(b"x")
            records = half.records()
            half.tls.write(b"never whole")
            writer.write(records + half.records()[:-1])
            writer.write_eof()
            assert await half.read_to_the_end(reader) == b"x"
            (echo,) = at.echoes
            await echo.lost.wait()
            assert (b"".join(echo.received), echo.events, at.refusals) == (b"x", ["made", "eof", "lost"], [])

    run(story())


def test_tls_is_let_go_with_the_socket(run: Run, files: Files) -> None:
    async def story() -> None:
        async with listening(files) as at:
            async with connected(at, files.client()) as (reader, writer):
                writer.write(b"x")
                await reader.readexactly(1)
                tls = weakref.ref(at.echoes[0].transport._tls)  # type: ignore[attr-defined]
                assert tls() is not None
            await at.echoes[0].lost.wait()
            assert tls() is None, "it waits for the garbage collector"

    gc.disable()
    try:
        run(story())
    finally:
        gc.enable()


# Mistakes


def test_what_is_no_handshake_is_refused(run: Run, files: Files) -> None:
    async def story() -> None:
        async with listening(files) as at, connected(at) as (reader, writer):
            writer.write(NOT_TLS)
            await reader.read(-1)  # an alert, or nothing
            await at.echoes[0].lost.wait()
            assert at.refusals == [Refusal.HANDSHAKE]
            assert not at.echoes[0].received

    run(story())


def test_a_peer_that_does_not_trust_us_says_so(run: Run, files: Files) -> None:
    async def story() -> None:
        async with listening(files) as at, connected(at) as (reader, writer):
            half = Half(ssl.create_default_context())
            with pytest.raises(ssl.SSLCertVerificationError):
                await half.shake_hands(reader, writer)
            writer.write(half.records())
            await at.echoes[0].lost.wait()
            assert at.refusals == [Refusal.HANDSHAKE]

    run(story())


def test_an_old_version_is_refused(run: Run, files: Files) -> None:
    async def story() -> None:
        async with listening(files) as at, connected(at) as (reader, writer):
            context = files.client()
            with pytest.warns(DeprecationWarning, match="TLSv1_1"):
                context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
            context.set_ciphers("DEFAULT@SECLEVEL=0")
            half = Half(context)
            with contextlib.suppress(ssl.SSLError):
                half.take(b"")
            writer.write(half.records())
            assert (await reader.read(-1))[:1] == b"\x15"
            assert at.refusals == [Refusal.HANDSHAKE]

    run(story())


@pytest.mark.parametrize("version", VERSIONS)
def test_a_record_that_was_changed_ends_the_connection(
    run: Run, files: Files, version: ssl.TLSVersion
) -> None:
    async def story() -> None:
        async with listening(files) as at, connected(at) as (reader, writer):
            half = Half(files.client(version))
            await half.shake_hands(reader, writer)
            half.tls.write(b"good")
            good = half.records()
            half.tls.write(b"bad")
            bad = bytearray(half.records())
            bad[-1] ^= 1
            half.tls.write(b"behind")
            writer.write(good + bad + half.records())
            await at.accepted.wait()
            (echo,) = at.echoes
            await echo.lost.wait()
            assert (b"".join(echo.received), at.refusals) == (b"good", [Refusal.RECORD])

    run(story())


def test_who_leaves_amid_the_handshake_is_forgotten(run: Run, files: Files) -> None:
    async def story() -> None:
        half = Half(files.client())
        half.take(b"")
        hello = half.records()
        async with listening(files) as at:
            for size in (0, 1, len(hello) - 1, len(hello)):
                at.accepted.clear()
                async with connected(at) as (_, writer):
                    writer.write(hello[:size])
                    writer.write_eof()
                    await at.accepted.wait()
                    await at.echoes[-1].lost.wait()
            assert at.refusals == []

    run(story())


# In pieces


def pump(transport: TlsTransport, half: Half, written: bytearray, size: int) -> bytes:
    """Until neither has anything to say; pieces of `size` bytes go to the server."""
    plain = b""
    while True:
        plain += half.take(bytes(written))
        written.clear()
        records = half.records()
        if not records:
            return plain
        for start in range(0, len(records), size):
            transport.data_received(records[start : start + size])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [1, 10])
async def test_bytes_may_trickle_in(files: Files, version: ssl.TLSVersion, size: int) -> None:
    written = bytearray()
    echo = Echo()
    transport = TlsFactory(files.server(), [].append).around(echo)
    transport.connection_made(FakeTransport(written.extend))
    half = Half(files.client(version))
    pump(transport, half, written, size)
    half.tls.write(b"hello")
    assert pump(transport, half, written, size) == b"hello"


SIZES = st.lists(st.integers(1, 700), min_size=1, max_size=20)


@given(turns=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 900)), max_size=80), tails=SIZES)
def test_connections_share_what_is_empty_between_their_turns(
    files: Files, turns: list[tuple[int, int]], tails: list[int]
) -> None:
    """Four connections, whose bytes come in any pieces and in any order: each gets its own back."""

    async def story() -> None:
        factory = TlsFactory(SERVER_CONTEXTS.setdefault(files, files.server()), [].append)
        context = CLIENT_CONTEXTS.setdefault(files, files.client())
        lines = [Line(factory, context, f"I am number {number}".encode() * 30) for number in range(4)]
        for number, size in turns:
            lines[number].move(size)
            assert not factory.incoming.pending
            assert not factory.outgoing.pending
        while not all(line.answered for line in lines):
            for line, size in zip(lines, tails * 4, strict=False):
                line.move(size)

    asyncio.run(story())


SERVER_CONTEXTS: dict[Files, ssl.SSLContext] = {}
CLIENT_CONTEXTS: dict[Files, ssl.SSLContext] = {}


class Line:
    """One client, the transport it talks to, and what is under way between the two."""

    def __init__(self, factory: TlsFactory, context: ssl.SSLContext, words: bytes) -> None:
        self._half = Half(context)
        self._words = words
        self._said = False
        self._answer = b""
        self._to_server, self._to_client = bytearray(), bytearray()
        self._transport = factory.around(Echo())
        self._transport.connection_made(FakeTransport(self._to_client.extend))
        self._half.take(b"")
        self._to_server += self._half.records()

    @property
    def answered(self) -> bool:
        assert self._words.startswith(self._answer)
        return self._answer == self._words

    def move(self, size: int) -> None:
        """So many bytes, or fewer, in each direction."""
        if self._to_server:
            self._transport.data_received(bytes(self._to_server[:size]))
            del self._to_server[:size]
        self._answer += self._half.take(bytes(self._to_client[:size]))
        del self._to_client[:size]
        if self._half._shaken and not self._said:
            self._half.tls.write(self._words)
            self._said = True
        self._to_server += self._half.records()


# openssl


@contextlib.asynccontextmanager
async def s_client(at: Listening, *flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), asyncio.subprocess.PIPE)
    process = await asyncio.create_subprocess_exec(
        "openssl", "s_client", "-connect", f"127.0.0.1:{at.port}", *flags, **pipes, stderr=asyncio.subprocess.STDOUT
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def say(process: asyncio.subprocess.Process, line: bytes, *, until: bytes) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line)
    await process.stdout.readuntil(until)


@needs_openssl
def test_keys_may_change(files: Files) -> None:
    async def story() -> None:
        async with listening(files) as at, s_client(at, "-tls1_3") as openssl:
            await say(openssl, b"before\n", until=b"before\n")
            for command in (b"K\n", b"k\n"):  # with a request for ours, and without
                await say(openssl, command, until=b"KEYUPDATE\n")
                await say(openssl, b"after\n", until=b"after\n")
            assert at.refusals == []

    asyncio.run(asyncio.wait_for(story(), PATIENCE))


@needs_openssl
def test_a_second_handshake_is_refused(files: Files) -> None:
    async def story() -> None:
        async with listening(files) as at, s_client(at, "-tls1_2") as openssl:
            await say(openssl, b"before\n", until=b"before\n")
            await say(openssl, b"R\n", until=b"no renegotiation")

    asyncio.run(asyncio.wait_for(story(), PATIENCE))
