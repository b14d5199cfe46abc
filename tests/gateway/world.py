"""A whole node in this process, on a real store and bus, with phones whose transports are lists of bytes.

Time stands still unless a test moves it (`World.later`, and `node.clock.now` for keep-alives); the store's threads
are real, so stories wait for what a phone gets (`Phone.until`), or for everything under way to end (`World.calm`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, cast

import orjson
from pyroaring import BitMap

from broker.audiences.devices import Devices
from broker.bus import Broadcast, Doorbell, Targeted
from broker.bus_local import LocalBus
from broker.carriers.catalog import Carriers
from broker.limits import Limits
from broker.metrics import Metrics
from broker.model import App, DeliveryState, NewDevice, NewMessage, NodeInfo, StoredBroadcast, StoredMessage
from broker.pushing.pushes import Pushes
from broker.store import Store
from broker.store_sqlite import SqliteStore
from broker.telling.reports import Reports
from broker.tenants import tokens
from broker.tenants.apps import Apps
from gateway.connection import Connection, Phase
from gateway.hub import Hub
from gateway.membership import Membership
from gateway.mqtt import Connack, Connect, Disconnect, Packet, Puback, Publish, decode, encode
from gateway.node import Node, NodeSettings
from gateway.session import Session
from tests.patience import PATIENCE

START: Final = 1_800_000_000.0
DAY: Final = 86_400.0
MAX_PACKET: Final = 1 << 20


class FakeTransport(asyncio.Transport):
    """Keeps what is written; `block` makes it a socket whose peer does not read."""

    def __init__(self, written: Callable[[bytes], None]) -> None:
        super().__init__()
        self._written = written
        self.closed = self.aborted = False
        self.reading = True

    def write(self, data: Any) -> None:
        assert not self.closed, "written after close"
        self._written(bytes(data))

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


class Phone:
    """One connection of a device, seen from its side."""

    def __init__(self, node: Node, connect: Connect) -> None:
        self._version = connect.version
        self._buffer = bytearray()
        self._news = asyncio.Event()
        self.packets: list[Packet] = []
        self.connection = Connection(node, "tcp")
        self.transport = FakeTransport(self._take)
        self.connection.connection_made(self.transport)
        self.send(connect)

    def _take(self, data: bytes) -> None:
        self._buffer += data
        while (found := decode(self._buffer, 0, self._version, MAX_PACKET)) is not None:
            packet, end = found
            del self._buffer[:end]
            self.packets.append(packet)
        self._news.set()

    def send(self, *packets: Packet) -> None:
        if packets:
            self.connection.data_received(b"".join(encode(packet, self._version) for packet in packets))

    @property
    def session(self) -> Session:
        session = self.connection.session
        assert session is not None
        return session

    @property
    def closed(self) -> bool:
        return self.connection.phase is Phase.CLOSED

    @property
    def connack(self) -> Connack:
        return cast("Connack", self.packets[0])

    @property
    def goodbye(self) -> Disconnect:
        return cast("Disconnect", self.packets[-1])

    @property
    def pushes(self) -> list[Publish]:
        return [packet for packet in self.packets if isinstance(packet, Publish) and packet.topic == "push"]

    @property
    def got(self) -> list[int]:
        """The msg_ids that came, in their order."""
        return [int(orjson.loads(push.payload)["msg_id"]) for push in self.pushes]

    async def until(self, condition: Callable[[Phone], object]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition(self):
                self._news.clear()
                await self._news.wait()

    async def pushed(self, count: int) -> list[int]:
        await self.until(lambda phone: len(phone.pushes) >= count)
        return self.got

    def ack(self, *msg_ids: int) -> None:
        """Acknowledge these pushes, or (none given) all that came."""
        pushes = zip(self.got, self.pushes, strict=True)
        self.send(*(Puback(push.packet_id) for got, push in pushes if not msg_ids or got in msg_ids))

    def leave(self) -> None:
        """The network is gone."""
        self.connection.connection_lost(None)

    def block(self) -> None:
        self.connection.pause_writing()

    def drain(self) -> None:
        self.connection.resume_writing()


def start_node(node: Node) -> None:
    """Its clock stands still: a tick would set it to this machine's, whatever a test has made of it."""
    node.start()
    assert node._tick_timer is not None
    node._tick_timer.cancel()


class World:
    """`async with await World(…).open()`, or `open` and `close`. Devices have the devnos 0, 1, 2 …"""

    def __init__(
        self,
        path: Path,
        *,
        fanout_limit: int = 1,
        store: Callable[..., SqliteStore] = SqliteStore,
        settings: NodeSettings | None = None,
        carriers: Carriers | None = None,
    ) -> None:
        self.wall = START
        self.carriers = carriers or Carriers()
        self.limits = Limits(fanout_limit=fanout_limit)
        self.store = store(path / "data.db", clock=self.clock)
        self.bus = LocalBus()
        self._settings = settings or NodeSettings("node-1")
        self.metrics = Metrics()
        self.app = cast("App", None)
        self.names: list[str] = []

    def clock(self) -> float:
        return self.wall

    def later(self, seconds: float) -> None:
        """Time passes, for everything that expires at a time of day."""
        self.wall += seconds
        self.node.clock.wall = self.wall

    async def open(self, devices: int = 3, **app: Any) -> World:
        await self.store.open()
        self.app = await self.store.create_app("test", **app)
        self.names = [f"device-{n}" for n in range(devices)]
        await self.store.register(self.app.app_id, [NewDevice(name) for name in self.names])
        self.apps = Apps(self.store, self.bus, self.limits)
        self.devices = Devices(self.store, self.bus, self.limits, self.clock)
        self.pushes = Pushes(self.store, self.bus, self.limits, self.clock)
        self.node = self.new_node()
        start_node(self.node)
        return self

    @property
    def hub(self) -> Hub:
        hub = self.node.hubs.get(self.app.app_id)
        assert hub is not None
        return hub

    def new_node(self, store: Store | None = None, settings: NodeSettings | None = None) -> Node:
        store, settings = store or self.store, settings or self._settings
        info = NodeInfo(settings.node_id)
        return Node(
            settings,
            store=store,
            bus=self.bus,
            apps=self.apps,
            devices=self.devices,
            pushes=self.pushes,
            reports=Reports(store, self.limits, self.clock),
            carriers=self.carriers,
            metrics=self.metrics,
            membership=Membership(store.nodes, lambda: info, self.metrics),
            wall=self.clock,
        )

    async def __aenter__(self) -> World:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.node.drain(0.0)
        await self.node.close()
        self.apps.close()
        await self.store.close()

    def connect(self, devno: int, *, clean_start: bool = False, **values: Any) -> Phone:
        """A CONNECT was sent. `values`: of Connect."""
        name = self.names[devno]
        token = tokens.issue(self.app, name, devno, "other", 0, self.wall, DAY)
        values.setdefault("properties", {"session_expiry_interval": 600})
        connect = Connect(name, clean_start, username=self.app.key, password=token.encode(), **values)
        return Phone(self.node, connect)

    async def online(self, devno: int, **values: Any) -> Phone:
        """A device that is connected and has nothing under way."""
        phone = self.connect(devno, **values)
        await phone.until(lambda phone: phone.packets)
        await self.calm()
        return phone

    async def push(self, *devnos: int, ttl: float = DAY) -> int:
        """As `Pushes` does it: append, then ring. More than `fanout_limit` devices make a broadcast."""
        msg_id = await self.append(*devnos, ttl=ttl)
        self.ring(msg_id, *devnos, ttl=ttl)
        return msg_id

    async def append(self, *devnos: int, ttl: float = DAY) -> int:
        """The push is durable, and its doorbell has not rung yet."""
        (answer,) = await self.store.append([self._message(devnos, ttl)])
        return answer.msg_id

    def ring(self, msg_id: int, *devnos: int, ttl: float = DAY) -> None:
        new = self._message(devnos, ttl)
        message = StoredMessage(msg_id, new.app_id, new.body, new.created_at, new.expires_at)
        bell: Doorbell = Targeted(message, devnos)
        if new.broadcast:
            bell = Broadcast(StoredBroadcast(message, new.targets, BitMap()))
        self.bus.ring([bell])

    def _message(self, devnos: Iterable[int], ttl: float) -> NewMessage:
        targets = BitMap(devnos)
        broadcast = len(targets) > self.limits.fanout_limit
        body = b'{"notification":{"alert":"hi"}}'
        return NewMessage(self.app.app_id, body, targets, broadcast, self.wall, self.wall + ttl)

    async def calm(self) -> None:
        """Until all that is under way on this loop and in the store has ended, and what it set off, too."""
        for _ in range(3):
            await self.store.settle([])  # behind every write
            await self.store.fetch_owed([])  # behind every read of an inbox
            await self.turns()

    @staticmethod
    async def turns(count: int = 10) -> None:
        """Let the loop go round."""
        for _ in range(count):
            await asyncio.sleep(0)

    @staticmethod
    async def when(condition: Callable[[], object]) -> None:
        """Turn by turn, so that the story goes on in the very turn in which it became true."""
        async with asyncio.timeout(PATIENCE):
            while not condition():  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0)

    async def recorded(self) -> None:
        """Until the node has told the store of every acknowledgement so far."""
        self.node.settler.fold()
        await self.node.settler._record()

    async def states(self, msg_id: int) -> dict[int, DeliveryState]:
        record = (await self.store.find_messages(self.app.app_id, [msg_id]))[msg_id]
        states = {devno: record.state(devno, self.wall) for devno in record.targets}
        return {devno: state for devno, state in states.items() if state is not None}
