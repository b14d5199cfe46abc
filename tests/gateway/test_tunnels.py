"""Connections that are passed on to another node: over real sockets, plain and WebSocket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import pytest

from gateway.listeners import address_of
from gateway.tunnels import Tunnels
from tests.patience import PATIENCE

MEGABYTES = 64  # more than the kernel takes


class Home(asyncio.Protocol):
    """Answers with what it gets, in capitals."""

    def __init__(self, seen: list[Home]) -> None:
        self.ended = asyncio.Event()
        self.received = bytearray()
        seen.append(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.transport.write(data.upper())

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


class Edge(asyncio.Protocol):
    """Passes on whoever says anything."""

    def __init__(self, tunnels: Tunnels, address: str) -> None:
        self._tunnels = tunnels
        self._address = address

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._transport.pause_reading()
        self._task = asyncio.create_task(self._pass_on(data))

    async def _pass_on(self, data: bytes) -> None:
        if not await self._tunnels.open(self._transport, self._address, lambda: data):
            self._transport.write(b"no home")
            self._transport.close()


class World:
    def __init__(self) -> None:
        self.tunnels = Tunnels()
        self.homes: list[Home] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self.home = await loop.create_server(lambda: Home(self.homes), "127.0.0.1", 0)
        self.address = address_of(self.home)
        self.edge = await loop.create_server(lambda: Edge(self.tunnels, self.address), "127.0.0.1", 0)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = address_of(self.edge).split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        self._writers.append(writer)
        return reader, writer

    async def close(self) -> None:
        self.tunnels.close()
        self.edge.close()
        self.home.close()
        for writer in self._writers:
            writer.close()
            await writer.wait_closed()
        for home in self.homes:
            home.transport.abort()
            await home.ended.wait()
        while len(self.tunnels):  # noqa: ASYNC110 - their ends are on their way
            await asyncio.sleep(0)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.open()
    yield world
    await world.close()


async def test_what_the_peer_says_reaches_home_and_the_answer_comes_back(world: World) -> None:
    reader, writer = await world.connect()
    for words in (b"connect", b"publish"):
        writer.write(words)
        assert await reader.readexactly(7) == words.upper()
    assert len(world.tunnels) == 1
    assert world.homes[0].received == b"connectpublish"


async def test_when_the_peer_leaves_so_does_the_tunnel(world: World) -> None:
    reader, writer = await world.connect()
    writer.write(b"hello")
    await reader.readexactly(5)
    writer.close()
    await asyncio.wait_for(world.homes[0].ended.wait(), PATIENCE)
    assert len(world.tunnels) == 0


async def test_when_the_home_goes_the_peer_is_told(world: World) -> None:
    reader, writer = await world.connect()
    writer.write(b"hello")
    await reader.readexactly(5)
    world.homes[0].transport.abort()
    assert await asyncio.wait_for(reader.read(), PATIENCE) == b""


async def test_without_a_home_the_caller_keeps_the_connection(world: World) -> None:
    world.home.close()
    await world.home.wait_closed()
    reader, writer = await world.connect()
    writer.write(b"hello")
    assert await asyncio.wait_for(reader.read(), PATIENCE) == b"no home"
    assert len(world.tunnels) == 0


async def test_a_peer_that_does_not_read_makes_nobody_keep_what_it_is_owed(world: World) -> None:
    """The home is not read from either, so its own limits hold (G6)."""
    reader, writer = await world.connect()
    writer.write(b"x")
    await reader.readexactly(1)
    home = world.homes[0].transport
    home.write(bytes(MEGABYTES << 20))
    before = -1
    while before != (before := home.get_write_buffer_size()):  # noqa: ASYNC110 - until nothing moves any more
        await asyncio.sleep(0.1)
    assert before > 0
    assert len(await reader.readexactly(MEGABYTES << 20)) == MEGABYTES << 20


async def test_closing_ends_all_tunnels(world: World) -> None:
    reader, writer = await world.connect()
    writer.write(b"hello")
    await reader.readexactly(5)
    world.tunnels.close()
    assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
