"""Ordinary topics in a fleet: an app that uses them lives on one node, and whoever connects elsewhere is carried
there (decision 0022). Real nodes on a real Redis."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from clients.local_server import AppKeys
from gateway.mqtt import (
    Connect,
    Packet,
    Puback,
    Publish,
    Reason,
    Suback,
    Subscribe,
    Subscription,
)
from tests.crash_load import TryAgain, Wire
from tests.fleet_rig import Fleet, OneRedis

NODES = 3
LIMIT = 60.0  # seconds until something that must happen has not happened

pytestmark = pytest.mark.xdist_group("homes")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("homes")
    store = OneRedis(directory)
    fleet = Fleet(directory, store, NODES)
    try:
        store.start()
        fleet.start()
        yield fleet
    finally:
        fleet.close()
        store.close()
    assert "Traceback" not in fleet.logs(), fleet.logs()[-5000:]


@pytest.fixture
def app(fleet: Fleet, request: pytest.FixtureRequest) -> AppKeys:
    return fleet.nodes[0].create_app(request.node.name, open=True)


class Client:
    """A device of the open app, on the node with this number."""

    def __init__(self, fleet: Fleet, app: AppKeys, name: str) -> None:
        self._fleet = fleet
        self._app = app
        self._name = name
        self._ids = itertools.count(1)
        self._come: list[Packet] = []
        self._wire: Wire | None = None

    async def connect(self, node: int, *, clean: bool = True) -> Client:
        connect = Connect(
            self._name,
            clean_start=clean,
            keep_alive=60,
            username=self._app.app_key,
            password=self._app.device_key.encode(),
            version=5,
            properties={} if clean else {"session_expiry_interval": 600},
        )
        async with asyncio.timeout(LIMIT):
            while True:
                try:
                    self._wire = await Wire.open(self._fleet.nodes[node].addresses.mqtt, connect)
                except (TryAgain, OSError, EOFError):
                    await asyncio.sleep(0.2)
                else:
                    return self

    async def _until(self, wanted: Callable[[Packet], bool]) -> Any:
        async with asyncio.timeout(LIMIT):
            while True:
                for packet in self._come:
                    if wanted(packet):
                        self._come.remove(packet)
                        return packet
                self._come += self._wire.waiting()
                if not any(map(wanted, self._come)):
                    await self._wire.fill()

    async def subscribe(self, topic: str) -> None:
        self._wire.send(Subscribe(next(self._ids), (Subscription(topic, 1),)))
        suback = await self._until(lambda packet: isinstance(packet, Suback))
        assert suback.reasons == (Reason.GRANTED_QOS_1,)

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self._wire.send(Publish(topic, payload, 1, retain=retain, packet_id=next(self._ids)))
        await self._until(lambda packet: isinstance(packet, Puback))

    async def take(self) -> bytes:
        message: Publish = await self._until(lambda packet: isinstance(packet, Publish))
        self._wire.send(Puback(message.packet_id))
        return message.payload

    def leave(self) -> None:
        if self._wire is not None:
            self._wire.abort()


MakeClient = Callable[[str], Client]


@pytest.fixture
async def client(fleet: Fleet, app: AppKeys) -> AsyncIterator[MakeClient]:
    """`client(name)`; whoever is connected when the test ends leaves."""
    made: list[Client] = []

    def make(name: str) -> Client:
        made.append(Client(fleet, app, name))
        return made[-1]

    yield make
    for one in made:
        one.leave()
    await asyncio.sleep(0)  # their sockets are closed in the next turn


async def test_subscribers_on_all_nodes_get_what_is_published_on_any(client: MakeClient) -> None:
    clients = [await client(f"client-{n}").connect(n) for n in range(NODES)]
    for one in clients:
        await one.subscribe("news/#")
    for n, sender in enumerate(clients):
        await sender.publish("news/today", b"from %d" % n)
        assert [await one.take() for one in clients] == [b"from %d" % n] * NODES


async def test_of_a_shared_subscription_one_member_gets_each_message(client: MakeClient) -> None:
    members = [await client(f"member-{n}").connect(n) for n in range(2)]
    for member in members:
        await member.subscribe("$share/group/work")
    publisher = await client("publisher").connect(2)
    for n in range(6):
        await publisher.publish("work", b"%d" % n)
    taken = [[await member.take() for _ in range(3)] for member in members]
    assert sorted(itertools.chain(*taken)) == [b"%d" % n for n in range(6)]


async def test_a_session_waits_wherever_its_client_comes_back(client: MakeClient) -> None:
    sleeper = await client("sleeper").connect(0, clean=False)
    await sleeper.subscribe("dreams")
    sleeper.leave()
    publisher = await client("publisher").connect(1)
    await publisher.publish("dreams", b"of sheep")
    await publisher.publish("kept", b"for later", retain=True)
    sleeper = await client("sleeper").connect(2, clean=False)
    assert await sleeper.take() == b"of sheep"
    await sleeper.subscribe("kept")
    assert await sleeper.take() == b"for later"


async def test_when_the_home_dies_another_node_takes_the_app_on(fleet: Fleet, client: MakeClient) -> None:
    sleeper = await client("sleeper").connect(0, clean=False)  # the first one: its node is the home
    await sleeper.subscribe("dreams")
    publisher = await client("publisher").connect(1)
    sleeper.leave()
    await publisher.publish("dreams", b"one")
    publisher.leave()
    await asyncio.to_thread(fleet.nodes[0].kill)
    try:
        publisher = await client("publisher").connect(1)
        await publisher.publish("dreams", b"two")
        sleeper = await client("sleeper").connect(2, clean=False)
        assert [await sleeper.take() for _ in range(2)] == [b"one", b"two"]
    finally:
        await asyncio.to_thread(fleet.nodes[0].start)
