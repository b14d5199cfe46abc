from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from clients.device import Device, LinkSettings, Push
from clients.local_server import AppKeys, LocalServer
from clients.publisher import Publisher, PushReport
from tests.patience import PATIENCE

QUICK = LinkSettings(backoff_base=0.05, backoff_cap=0.2)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Nobody answers there: its queue is full, so the kernel drops what comes."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Bound, so that nobody else gets it, and not listening."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture
def app(server: LocalServer) -> AppKeys:
    """One of the test's own."""
    return server.create_app("test")


@pytest.fixture
async def publisher(server: LocalServer, app: AppKeys) -> AsyncIterator[Publisher]:
    async with Publisher(app.app_key, app.master_secret, server.addresses.http) as publisher:
        yield publisher


Phone = Callable[[str], AbstractAsyncContextManager[tuple[Device, asyncio.Queue[Push]]]]


@pytest.fixture
def phone(server: LocalServer, app: AppKeys, publisher: Publisher) -> Phone:
    """`async with phone("name") as (device, pushes)`: a device that is online."""

    @asynccontextmanager
    async def online(name: str) -> AsyncIterator[tuple[Device, asyncio.Queue[Push]]]:
        pushes: asyncio.Queue[Push] = asyncio.Queue()
        registered = await publisher.register_device(name, platform="android")
        host, port = server.addresses.mqtt
        device = Device(
            app.app_key,
            name,
            on_push=pushes.put_nowait,
            token=registered.token,
            host=host,
            port=port,
            settings=QUICK,
        )
        async with device:
            await asyncio.wait_for(device.connected(), PATIENCE)
            yield device, pushes

    return online


Until = Callable[[int, Callable[[PushReport], bool]], Awaitable[PushReport]]


@pytest.fixture
def until(publisher: Publisher) -> Until:
    """`await until(msg_id, true)`: the report once it is as wanted; acknowledgements are recorded in batches."""

    async def wait(msg_id: int, true: Callable[[PushReport], bool]) -> PushReport:
        async with asyncio.timeout(PATIENCE):
            while True:
                if true(report := await publisher.reports.push(msg_id)):
                    return report
                await asyncio.sleep(0.02)

    return wait
