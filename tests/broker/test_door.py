"""The door of an HTTP listener: who is let in, and which waits end."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web

from broker.api.door import Door
from broker.config import load_config
from broker.limits import Limits
from gateway.server import Service
from tests.patience import PATIENCE, until

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Streams]]

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
GET_SMALL = GET.replace(b"/ ", b"/small ")
SOON = 0.05  # seconds; a slow machine may need more to make a request
NEVER = 600.0


async def _answer(_: web.Request) -> web.Response:
    return web.Response(body=b"x" * (8 << 20))


async def _answer_little(_: web.Request) -> web.Response:
    return web.Response(text="x")


@asynccontextmanager
async def _listening(door: Door) -> AsyncIterator[Connect]:
    application = web.Application()
    application.router.add_get("/", _answer)
    application.router.add_get("/small", _answer_little)
    runner = door.runner(application)
    await door.open(runner, "127.0.0.1", 0)
    writers: list[asyncio.StreamWriter] = []

    async def connect() -> Streams:
        streams = await asyncio.open_connection(*runner.addresses[0][:2])
        writers.append(streams[1])
        return streams

    try:
        yield connect
    finally:
        for writer in writers:
            writer.close()
        await runner.cleanup()
    await until(lambda: not door.connections)


async def _end(reader: asyncio.StreamReader) -> bytes:
    """What came until the server closed."""
    try:
        return await asyncio.wait_for(reader.read(), PATIENCE)
    except ConnectionResetError:
        return b""


async def _status(reader: asyncio.StreamReader) -> bytes:
    return (await asyncio.wait_for(reader.readuntil(b"\r\n"), PATIENCE)).split()[1]


async def _answered(connect: Connect, request: bytes) -> Streams:
    """A connection whose first request was soon enough, and the head of the answer to it."""
    while True:
        reader, writer = await connect()
        writer.write(request)
        with suppress(ConnectionResetError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            return reader, writer


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_connections_over_the_limit_are_reset_and_counted_until_one_leaves(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """On the loop of `serve`, too: its transports are others."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_come_and_go())


async def _come_and_go() -> None:
    door = Door(2, NEVER)
    async with _listening(door) as connect:
        (first, writer), _ = await connect(), await connect()
        over, _ = await connect()
        assert (await _end(over), door.connections, door.refused) == (b"", 2, 1)
        writer.write(GET.replace(b"Host", b"Connection: close\r\nHost"))
        assert (await _end(first)).startswith(b"HTTP/1.1 200")
        again, writer = await connect()
        writer.write(GET)
        assert (await _status(again), door.refused) == (b"200", 1)


async def test_one_address_has_a_limit_of_its_own_until_one_of_its_connections_leaves() -> None:
    door = Door(9, NEVER, per_address=2)
    async with _listening(door) as connect:
        (first, writer), _ = await connect(), await connect()
        over, _ = await connect()
        assert (await _end(over), door.connections, door.refused) == (b"", 2, 1)
        writer.write(GET.replace(b"Host", b"Connection: close\r\nHost"))
        await _end(first)
        again, writer = await connect()
        writer.write(GET)
        assert (await _status(again), door.refused) == (b"200", 1)


async def test_proxies_connect_for_others() -> None:
    door = Door(9, NEVER, per_address=1, proxies=("127.0.0.0/8",))
    async with _listening(door) as connect:
        for _ in range(3):
            reader, writer = await connect()
            writer.write(GET)
            assert await _status(reader) == b"200"


def test_an_address_counts_as_its_site() -> None:
    door = Door(9, NEVER, per_address=1, proxies=("2001:db8:9::/48",))
    assert door.source_of(("::ffff:192.0.2.1", 1, 0, 0)) == door.source_of(("192.0.2.1", 1)) == "192.0.2.1"
    assert door.source_of(("2001:db8:1:2::3", 1, 0, 0)) == "2001:db8:1:2::/64"
    assert door.source_of(("2001:db8:9:2::3", 1, 0, 0)) == ""
    assert Door(9, NEVER).source_of(("192.0.2.1", 1)) == ""


@pytest.mark.parametrize("sent", [b"", b"POST /v3/push HTTP/1.1\r\nHost: x\r\n", b"\r\n\r\n\r\n"])
async def test_a_connection_without_a_whole_request_is_closed(sent: bytes) -> None:
    async with _listening(Door(2, SOON)) as connect:
        reader, writer = await connect()
        writer.write(sent)
        assert await _end(reader) == b""


async def test_a_connection_that_made_a_request_may_rest() -> None:
    async with _listening(Door(2, SOON)) as connect:
        reader, writer = await _answered(connect, GET_SMALL)
        await reader.readexactly(1)
        silent, _ = await connect()
        assert await _end(silent) == b"", "it is longer than the limit"
        writer.write(GET_SMALL)
        assert await _status(reader) == b"200"


async def test_an_answer_that_nobody_reads_ends() -> None:
    door = Door(2, SOON)
    async with _listening(door) as connect:
        reader, _ = await _answered(connect, GET)
        silent, _ = await connect()
        assert await _end(silent) == b""
        assert len(await _end(reader)) < 8 << 20


# A body that does not come


@pytest.mark.parametrize(
    ("path", "kind", "begun"),
    [
        ("/v3/push", "application/json", b"{"),
        ("/v3/push", "application/json", b""),
        ("/v3/files/alias", "multipart/form-data; boundary=b", b""),
        (
            "/v3/files/alias",
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="filename"; filename="a"\r\n\r\nanna\n',
        ),
    ],
)
async def test_a_body_that_stops_is_given_up(start: Any, path: str, kind: str, begun: bytes) -> None:
    service = await start(limits=Limits(request_timeout=SOON, max_files=1))
    auth = "Basic " + b64encode(f"{service.app.key}:{service.app.master_secret}".encode()).decode()
    for _ in range(2):  # the place of an upload is free again
        host, port = service.base.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {auth}\r\nContent-Type: {kind}\r\n"
        writer.write(f"{head}Content-Length: 900\r\n\r\n".encode() + begun)
        answer = await asyncio.wait_for(reader.readuntil(b"}}"), PATIENCE)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"within 0.05 seconds" in answer
        assert b"\r\nConnection: close\r\n" in answer
        writer.close()


async def test_the_settings_reach_the_doors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.server.tune_interpreter", lambda _: None)
    flags = {"mqtt.port": "off", "mqtt.ws_port": "off", "http.port": "0", "admin.port": "0"}
    limits = {"http.max_connections": "1", "http.request_timeout": "60"}
    service = Service(load_config(None, None, {"server.data_dir": str(tmp_path), **flags, **limits}))
    listening = await service.open()
    try:
        for address in (listening.http, listening.admin):
            host, port = address.split(":")
            _, first = await asyncio.open_connection(host, int(port))
            over, second = await asyncio.open_connection(host, int(port))
            assert await _end(over) == b""
            second.close()
            if address == listening.http:
                shown = service.metrics.render()[0].decode()
                assert "holdfast_http_connections 1.0" in shown
                assert "holdfast_http_connections_refused_total 1.0" in shown
            first.close()
    finally:
        await service.close()
