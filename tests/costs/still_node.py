"""A node and its HTTP API in this process, on a real store, with nothing that depends on time: one thread, a loop
whose clock stands still, peers that are lists of bytes. What happens, and in which order, is always the same."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final, cast
from unittest.mock import patch

import orjson
from pyroaring import BitMap

from broker.api.door import Connection as HttpConnection
from broker.api.door import Door
from broker.api.http import build_api
from broker.broker import Broker
from broker.bus import Broadcast, Doorbell, Targeted
from broker.model import NewMessage, StoredBroadcast, StoredMessage
from broker.sqlite import threads
from broker.tenants import tokens
from gateway.connection import Connection
from gateway.mqtt import Connect, encode
from gateway.websocket import WebSocketFactory
from tests.costs.counting import StillLoop
from tests.gateway.world import DAY, START, FakeTransport, World

BODY: Final = b'{"notification":{"alert":"%s"}}' % (b"x" * 60)
CONNACK: Final = b"\x20\x02"
PUBLISH: Final = 0x32  # QoS 1
PUBACK: Final = b"\x40\x02"
PACKET_ID: Final = slice(8, 10)  # of a PUBLISH to "push" that is shorter than 128 bytes
MINUTE: Final = 60.0
HTTP_LIMITS: Final = 8, 3600.0  # connections, seconds
UPGRADE: Final = (
    b"GET /mqtt HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n"
)


class _Worker(threads.Worker):
    """A thread of the store that is none: what waits is done in the loop's next turn."""

    def __init__(self, name: str, run: Any, limit: int, pace: float = 0.0) -> None:
        super().__init__(name, run, limit)  # and no pace
        self._done = threading.Event()
        self._done.set()

    def start(self) -> None:
        pass

    def submit(self, operation: threads.Operation) -> None:
        super().submit(operation)
        if self._done.is_set():
            self._done.clear()
            asyncio.get_running_loop().call_soon(self._turn)

    def stop(self) -> None:
        """Called on another thread than the loop's."""
        self._done.wait()

    def _turn(self) -> None:
        group, _ = self._take()
        self._run(group)
        if self._queue.empty():
            self._done.set()
        else:
            asyncio.get_running_loop().call_soon(self._turn)


class Peer:
    """A device, or a publisher's HTTP connection. `protocol`: what a listener would have made for it."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self.received: list[bytes] = []  # one entry for each write
        self.protocol = protocol
        self.transport = FakeTransport(self.received.append)

    def open(self) -> None:
        self.protocol.connection_made(self.transport)

    def send(self, data: bytes) -> None:
        self.protocol.data_received(data)

    def take_acks(self) -> bytes:
        """PUBACKs of the pushes that came."""
        packets = _packets(b"".join(self.received))
        self.received.clear()
        return b"".join(PUBACK + packet[PACKET_ID] for packet in packets if packet[0] == PUBLISH)


class _Nobody(asyncio.Transport):
    """Of any number of connections whose peers only listen: costs none of them anything."""

    def write(self, data: Any) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    abort = pause_reading = resume_reading = close

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


NOBODY: Final = _Nobody()


class StillNode:
    def __init__(self, world: World, make_http: Callable[[], asyncio.Protocol]) -> None:
        self.world = world
        self.node = world.node
        self._make_http = make_http
        self._cids = count()
        self._strangers = len(world.names)  # from here on they have been here
        self._audience: list[Peer] = []

    def next_number(self) -> int:
        return next(self._cids)

    def strangers(self, devices: int) -> range:
        """Devices that have never been connected: the last ones."""
        self._strangers -= devices
        assert self._strangers >= len(self._audience)
        return range(self._strangers, self._strangers + devices)

    def names_of(self, devnos: Iterable[int]) -> list[str]:
        return [self.world.names[devno] for devno in devnos]

    async def rest(self) -> None:
        """Until nothing is under way: nothing waits for a file, a thread or a timer."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)
        while loop._ready:  # type: ignore[attr-defined]  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)

    def connect_packet(self, devno: int) -> bytes:
        """Of a device that keeps its session."""
        world, name = self.world, self.world.names[devno]
        token = tokens.issue(world.app, name, devno, "other", 0, world.wall, DAY)
        connect = Connect(name, False, 300, world.app.key, token.encode(), version=4)
        return encode(connect, 4)

    def device(self) -> Peer:
        """Not connected yet."""
        return Peer(Connection(self.node, "tcp"))

    async def connect(self, peer: Peer, packet: bytes) -> None:
        """Until it has what it is owed."""
        peer.open()
        peer.send(packet)
        await self.rest()
        assert peer.received
        assert peer.received[0][:2] == CONNACK

    async def audience(self, devices: int) -> list[Peer]:
        """The first devices, connected once and for all, with nothing under way."""
        for devno in range(len(self._audience), devices):
            peer = self.device()
            await self.connect(peer, self.connect_packet(devno))
            peer.received.clear()
            self._audience.append(peer)
        return self._audience[:devices]

    def websocket_factory(self) -> WebSocketFactory:
        return WebSocketFactory(
            lambda: Connection(self.node, "ws"), self.node.settings.max_packet_size, self.node.count_refusal
        )

    def publisher(self) -> Peer:
        peer = Peer(self._make_http())
        peer.open()
        return peer

    def request(self, path: str, body: object) -> bytes:
        app, content = self.world.app, orjson.dumps(body)
        login = base64.b64encode(f"{app.key}:{app.master_secret}".encode()).decode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {login}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    async def accept(self, publisher: Peer, request: bytes) -> None:
        """Until the answer is there."""
        publisher.received.clear()
        publisher.send(request)
        await self.rest()
        assert publisher.received[0].startswith(b"HTTP/1.1 200 "), publisher.received

    async def append(self, *audiences: Sequence[int]) -> list[Doorbell]:
        """Pushes, one to each of these audiences; with more than one device it is a broadcast. Their doorbells have
        not rung yet."""
        news = [self._new(devnos) for devnos in audiences]
        answers = await self.world.store.append(news)
        return [_bell(new, answer.msg_id) for new, answer in zip(news, answers, strict=True)]

    def _new(self, devnos: Sequence[int]) -> NewMessage:
        wall, app_id = self.world.wall, self.world.app.app_id
        return NewMessage(app_id, BODY, BitMap(devnos), len(devnos) > 1, wall, wall + DAY)

    def ring(self, bells: Sequence[Doorbell]) -> None:
        self.world.bus.ring(bells)

    async def minute_later(self) -> None:
        """Each connection has been looked at, those that are over are forgotten, and what was to be saved is."""
        await self.rest()
        clock, wheel = self.node.clock, self.node._wheel
        clock.now += MINUTE
        for connection in wheel.due(clock.now):
            following = connection.check(clock.now)
            if following is not None:
                wheel.add(connection, following)
        self.node.hubs.upkeep()
        self.world.store._write_last_online()
        await self.rest()

    async def recorded(self) -> None:
        """Until every acknowledgement is in the store."""
        await self.world.recorded()


@asynccontextmanager
async def still_node(directory: Path, devices: int) -> AsyncIterator[StillNode]:
    """With so many devices registered, none of them connected. On a StillLoop."""
    loop = cast("StillLoop", asyncio.get_running_loop())
    with (
        patch.object(threads, "Worker", _Worker),
        patch("gateway.fanout.SCHEDSTAT", ""),  # or a walk rests on a busy machine
        patch("time.time", lambda: START),  # lines of the log cache the second
    ):
        world = await World(directory).open(devices=devices)
        broker = Broker(world.store, world.bus, world.limits, world.clock)
        await broker.open()
        door = Door(*HTTP_LIMITS)
        runner = door.runner(build_api(broker))
        await runner.setup()
        assert runner.server is not None
        make = runner.server
        try:
            yield StillNode(world, lambda: HttpConnection(door, make))
        finally:
            loop.still = False
            await runner.cleanup()
            await broker.close()
            await world.close()


def _bell(new: NewMessage, msg_id: int) -> Doorbell:
    message = StoredMessage(msg_id, new.app_id, new.body, new.created_at, new.expires_at)
    if new.broadcast:
        return Broadcast(StoredBroadcast(message, new.targets, BitMap()))
    return Targeted(message, tuple(new.targets))


def _packets(data: bytes) -> list[bytes]:
    """All shorter than 128 bytes."""
    packets = []
    while data:
        end = 2 + data[1]
        assert data[1] < 128
        packets.append(data[:end])
        data = data[end:]
    return packets
