"""Opening connections, with real sockets: ports that refuse, that nobody answers on, and that do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trustme

from clients.addresses import Address, Hints, Race
from clients.reach import Line, News, Unreachable, connect, open_first
from clients.websocket import PATH
from gateway.websocket import decide
from tests.patience import PATIENCE

HINTS = Hints(stagger=0.05, parallel=3, attempt=0.2)


class Told(Line):
    """A connection, and what became of it."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.heard = bytearray()
        self.news = asyncio.Event()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard += data
        self.news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()

    def discard(self) -> None:
        assert self.transport is not None
        self.transport.abort()

    async def end(self) -> None:
        self.discard()
        await asyncio.wait_for(self.ended.wait(), PATIENCE)

    async def hear(self, size: int) -> bytes:
        async with asyncio.timeout(PATIENCE):
            while len(self.heard) < size:
                self.news.clear()
                await self.news.wait()
        return bytes(self.heard)


@contextlib.asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] | None = None,
    host: str = "127.0.0.1",
    **more: ssl.SSLContext,
) -> AsyncIterator[int]:
    """A port that answers with what it gets."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await (serve or _echo)(reader, writer)
        writer.transport.abort()

    server = await asyncio.start_server(echo, host, 0, **more)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)


def at(port: int) -> Address:
    return Address("127.0.0.1", port)


async def race_for(
    *addresses: Address, hints: Hints = HINTS, news: News | None = None, tls: ssl.SSLContext | None = None
) -> tuple[Address, Race, Told]:
    race = Race(addresses, hints, asyncio.get_running_loop().time())
    async with asyncio.timeout(PATIENCE):
        address, line = await open_first(
            race, lambda address: connect(address, Told, tls if address.secret else None), news
        )
    return address, race, line


async def test_the_first_that_opens_wins(silent_port: int, closed_port: int) -> None:
    async with listening() as port:
        address, race, line = await race_for(at(closed_port), at(silent_port), at(port))
        assert address == at(port)
        assert race.failures.keys() == {at(closed_port), at(silent_port)}
        await line.end()


async def test_nothing_of_a_list_can_be_opened(closed_port: int) -> None:
    with pytest.raises(Unreachable, match=f"tcp://127.0.0.1:{closed_port}: .*refused|Connect call failed"):
        await race_for(at(closed_port))
    with pytest.raises(Unreachable, match="there is no address"):
        await race_for()


async def test_more_silent_ones_than_may_be_tried_at_a_time(silent_port: int) -> None:
    async with listening() as port:
        silent = [Address(f"127.0.0.{n}", silent_port) for n in range(1, 2)]
        address, race, line = await race_for(
            *silent, at(port), hints=Hints(stagger=0.02, parallel=1, attempt=0.05)
        )
        assert (address, race.failures.keys()) == (at(port), set(silent))
        await line.end()


async def test_a_list_that_comes_meanwhile_is_tried(closed_port: int, silent_port: int) -> None:
    async with listening() as port:
        news: News = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.05, news.set_result, (at(port),))
        address, _race, line = await race_for(
            at(closed_port), at(silent_port), hints=Hints(stagger=0.2), news=news
        )
        assert address == at(port)
        await line.end()


async def test_who_has_no_list_yet_waits_for_it() -> None:
    async with listening() as port:
        news: News = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(news.set_result, (at(port),))
        _address, _race, line = await race_for(news=news)
        await line.end()


async def test_those_that_lose_are_closed() -> None:
    lines: list[Told] = []
    both_open = asyncio.Barrier(2)

    async def together(address: Address) -> Told:
        """Both open in the same turn of the loop."""
        lines.append(line := await connect(address, Told, None))
        await both_open.wait()
        return line

    async with listening() as one, listening() as other:
        race = Race([at(one), at(other)], Hints(stagger=0), asyncio.get_running_loop().time())
        _address, won = await asyncio.wait_for(open_first(race, together), PATIENCE)
        (lost,) = [line for line in lines if line is not won]
        await asyncio.wait_for(lost.ended.wait(), PATIENCE)
        assert not won.ended.is_set()
        await won.end()


async def test_who_gives_up_leaves_nothing_behind(silent_port: int) -> None:
    before = asyncio.all_tasks()
    running = asyncio.ensure_future(race_for(at(silent_port)))
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running})
    for _ in range(3):  # a cancelled task needs a turn or two
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_a_mistake_of_ours_is_not_taken_for_a_dead_address() -> None:
    async def wrong(address: Address) -> Told:
        raise AssertionError(address)

    race = Race([at(1)], HINTS, asyncio.get_running_loop().time())
    with pytest.raises(AssertionError):
        await open_first(race, wrong)


async def test_a_host_is_tried_at_all_its_addresses(
    monkeypatch: pytest.MonkeyPatch, silent_port: int
) -> None:
    """A name with a dead IPv6 address before a good IPv4 one; which names a machine knows, no test can choose."""
    async with listening() as port:
        infos = [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
        ]

        async def resolve(host: str, port: int, **_: object) -> list[object]:
            assert host == "push.example.net"
            return list(infos)

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        address, _race, line = await race_for(Address("push.example.net", port), hints=Hints())
        assert address.host == "push.example.net"
        assert line.transport is not None
        assert line.transport.get_extra_info("peername")[0] == "127.0.0.1"
        await line.end()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 64 + ".example", ".."])
async def test_a_name_that_leads_nowhere_is_a_failure(host: str) -> None:
    async with listening() as port:
        address, race, line = await race_for(Address(host, 1), at(port), hints=Hints(stagger=2 * PATIENCE))
        assert (address, race.failures.keys()) == (at(port), {Address(host, 1)})
        await line.end()


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def contexts(authority: trustme.CA, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and the device's."""
    server, device = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert(name).configure_cert(server)
    authority.configure_trust(device)
    return server, device


async def test_tls_checks_the_name_at_a_literal_too(authority: trustme.CA) -> None:
    server, device = contexts(authority, "push.example.net")
    async with listening(ssl=server) as port:
        literal = Address("push.example.net", port, "tls").at("127.0.0.1")
        _address, _race, line = await race_for(literal, tls=device)
        await line.end()
        with pytest.raises(Unreachable, match="certificate"):
            await race_for(Address("127.0.0.1", port, "tls"), tls=device)


# WebSocket


def upgrading(
    first: Callable[[bytes], bytes],
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """A server that answers the request with `first`, then echoes the frames that it gets."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first(await reader.readuntil(b"\r\n\r\n")))
        while header := await reader.read(2):
            assert header[0] & 0x0F in (2, 8, 10)
            mask = await reader.readexactly(4)
            text = bytes(
                byte ^ mask[i % 4] for i, byte in enumerate(await reader.readexactly(header[1] & 0x7F))
            )
            if header[0] & 0x0F == 2:
                writer.write(b"\x89\x01p\x02" + bytes([len(text) - 1]) + text[:-1] + b"\x80\x01" + text[-1:])

    return serve


def switch(request: bytes) -> bytes:
    assert b"Sec-WebSocket-Protocol: mqtt\r\n" in request
    return decide(request, PATH)[0].serialize()


async def test_a_websocket_carries_what_tcp_would() -> None:
    async with listening(upgrading(switch)) as port:
        _address, _race, line = await race_for(Address("127.0.0.1", port, "ws"))
        assert line.transport is not None
        line.transport.write(b"hello")
        assert await line.hear(5) == b"hello"  # in two frames, after a ping
        line.transport.close()
        await asyncio.wait_for(line.ended.wait(), PATIENCE)


async def test_a_websocket_is_closed_by_the_server() -> None:
    async with listening(upgrading(lambda request: switch(request) + b"\x88\x02\x03\xe8")) as port:
        _address, _race, line = await race_for(Address("127.0.0.1", port, "ws"))
        await asyncio.wait_for(line.ended.wait(), PATIENCE)


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", b"\x20\x03\x00\x00\x00\r\n\r\n", b""]
)
async def test_who_wants_no_websocket_has_failed(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()

    async with listening(serve) as bad:
        with pytest.raises(Unreachable, match="no WebSocket"):
            await race_for(Address("127.0.0.1", bad, "ws"))


async def test_a_websocket_that_never_opens_loses() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listening(serve) as mute, listening(upgrading(switch)) as port:
        address, _race, line = await race_for(
            Address("127.0.0.1", mute, "ws"), Address("127.0.0.1", port, "ws")
        )
        assert address.port == port
        await line.end()


async def test_a_websocket_over_tls(authority: trustme.CA, tmp_path: Path) -> None:
    server, device = contexts(authority, "push.example.net")
    async with listening(upgrading(switch), ssl=server) as port:
        literal = Address("push.example.net", port, "wss").at("127.0.0.1")
        _address, _race, line = await race_for(literal, tls=device)
        assert line.transport is not None
        line.transport.write(b"hello")
        assert await line.hear(5) == b"hello"
        await line.end()
