"""Two nodes as processes around one Redis, and the device SDK: it goes where it is sent."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from clients.device import Device, LinkSettings, Push
from clients.local_server import LocalServer
from clients.publisher import Audience, Notification, Publisher, PushRequest
from tests.broker.redis_rigs import servers
from tests.gateway.peer import eventually
from tests.gateway.world import World
from tests.patience import PATIENCE

QUICK = LinkSettings(backoff_base=0.05, backoff_cap=0.5, answer_timeout=PATIENCE)


@pytest.fixture(scope="module")
def nodes(start_server: Callable[..., LocalServer]) -> Iterator[list[LocalServer]]:
    with servers(1) as [redis]:
        found = [start_server("--store", redis.url, "--node-id", f"node-{n}") for n in range(2)]
        yield found
        for node in found:
            node.kill()


async def test_a_device_goes_to_the_other_node_when_its_own_stops(nodes: list[LocalServer]) -> None:
    """SIGTERM. Nobody tells the device another address than the node itself, and no push is lost."""
    pushes: asyncio.Queue[Push] = asyncio.Queue()
    app, (host, port) = nodes[0].app, nodes[0].addresses.mqtt
    device = Device(
        app.app_key,
        "mover",
        on_push=pushes.put_nowait,
        device_key=app.device_key,
        host=host,
        port=port,
        settings=QUICK,
    )
    async with device, Publisher(app.app_key, app.master_secret, nodes[1].addresses.http) as publisher:
        await asyncio.wait_for(device.connected(), PATIENCE)

        async def push() -> int:
            request = PushRequest(Audience(["mover"]), Notification("x"))
            return (await publisher.push(request)).msg_id

        first = await push()
        assert (await asyncio.wait_for(pushes.get(), PATIENCE)).msg_id == first
        os.kill(nodes[0].pid, signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            await World.when(lambda: not device.online)
        second = await push()
        assert (await asyncio.wait_for(pushes.get(), PATIENCE)).msg_id == second
    samples = nodes[1].metrics()
    assert sum(value for name, value in samples.items() if name.startswith("holdfast_connects_total")) == 1
    await asyncio.to_thread(eventually, lambda: "moved" in nodes[0].log_text())
