"""The paths whose cost is guarded, each driven as a listener would drive it. A cost is that of one device, push or
delivery, the mean of many."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeAlias

from websockets.frames import Frame, Opcode

from broker.bus import Doorbell
from broker.logs import set_up_logs
from gateway.connection import Connection
from gateway.mqtt import Disconnect, encode
from tests.costs.counting import Instructions, StillLoop, memory
from tests.costs.still_node import NOBODY, UPGRADE, Peer, StillNode, still_node

EACH: Final = 40  # devices, or requests
AUDIENCE: Final = 320  # devices of a broadcast: whole slices of its walk
BATCH: Final = 100  # pushes
CROWD: Final = 1000  # devices whose memory is looked at
FIRST_OF_CROWD: Final = 200  # were there before them: what the node makes only once does not count
DEVICES: Final = AUDIENCE + 2 * (1 + BATCH + 2 * EACH)

Costs: TypeAlias = dict[str, float]


class Bill:
    """What the paths cost, by name; and how many of its instructions each function took."""

    def __init__(self) -> None:
        self._instructions = Instructions()
        self.costs: Costs = {}
        self.functions: dict[str, Costs] = {}

    @contextmanager
    def counting(self, name: str, per: int) -> Iterator[None]:
        before = self._instructions.by_function()
        with self._instructions.counting():
            yield
        now = self._instructions.by_function()
        taken = {function: (count - before.get(function, 0)) / per for function, count in now.items()}
        self.functions[name] = taken
        self.costs[f"{name}.instructions"] = sum(taken.values())

    def writes(self, name: str, peers: Iterable[Peer], per: int) -> None:
        """To these, since they were last asked for their acknowledgements."""
        self.costs[f"{name}.writes"] = sum(len(peer.received) for peer in peers) / per


PathOf: TypeAlias = Callable[[StillNode, Bill], Coroutine[Any, Any, None]]


async def accept_single(still: StillNode, bill: Bill) -> None:
    """A push over HTTP: request, durable, answer. One after the other."""
    publisher = still.publisher()
    (name,) = still.names_of(still.strangers(1))
    request = still.request("/v3/push", _push({"audience": {"registration_id": [name]}}))
    with bill.counting("accept.single", EACH):
        for _ in range(EACH):
            await still.accept(publisher, request)


async def accept_batch(still: StillNode, bill: Bill) -> None:
    """A push of a batch over HTTP."""
    publisher = still.publisher()
    pushes = {
        f"{still.next_number()}": _push({"target": name}) for name in still.names_of(still.strangers(BATCH))
    }
    request = still.request("/v3/push/batch/regid/single", {"pushlist": pushes})
    with bill.counting("accept.batch", BATCH):
        await still.accept(publisher, request)


async def connect(still: StillNode, bill: Bill) -> None:
    """From an accepted socket to CONNACK, of a device that is owed nothing: token, route, session, log."""
    await _connect(still, bill, "connect", still.strangers(EACH))


async def connect_owed(still: StillNode, bill: Bill) -> None:
    """The same, of a device that a push and a broadcast wait for, until it has both."""
    devnos = still.strangers(EACH)
    await still.append(*([devno] for devno in devnos))
    still.ring(await still.append(devnos))
    _acknowledge(await _connect(still, bill, "connect.owed", devnos), pushes=2)


async def _connect(still: StillNode, bill: Bill, name: str, devnos: Sequence[int]) -> list[Peer]:
    peers = [still.device() for _ in devnos]
    packets = [still.connect_packet(devno) for devno in devnos]
    with bill.counting(name, EACH):
        for peer, packet in zip(peers, packets, strict=True):
            await still.connect(peer, packet)
    bill.writes(name, peers, EACH)
    return peers


async def deliver(still: StillNode, bill: Bill) -> None:
    """A targeted push, from its doorbell until its acknowledgement is recorded."""
    peers = (await still.audience(AUDIENCE))[:EACH]
    bells = await still.append(*([devno] for devno in range(EACH)))
    await _deliver(still, bill, "deliver", bells, peers)


async def broadcast_one(still: StillNode, bill: Bill) -> None:
    """A broadcast, likewise, for each device."""
    peers = await still.audience(AUDIENCE)
    await _deliver(still, bill, "broadcast.one", await still.append(range(AUDIENCE)), peers)


async def broadcast_four(still: StillNode, bill: Bill) -> None:
    """Four at once, for each delivery."""
    peers = await still.audience(AUDIENCE)
    await _deliver(still, bill, "broadcast.four", await still.append(*[range(AUDIENCE)] * 4), peers)


async def _deliver(still: StillNode, bill: Bill, name: str, bells: list[Doorbell], peers: list[Peer]) -> None:
    each = 1 if len(bells) == len(peers) else len(bells)  # pushes a device gets
    with bill.counting(name, each * len(peers)):
        still.ring(bells)
        await still.rest()
        bill.writes(name, peers, each * len(peers))
        _acknowledge(peers, pushes=each)
        await still.recorded()


def _acknowledge(peers: Iterable[Peer], *, pushes: int) -> None:
    for peer in peers:
        acks = peer.take_acks()
        assert len(acks) == 4 * pushes, "not all pushes came"
        peer.send(acks)


def _push(to: dict[str, Any]) -> dict[str, Any]:
    return {"platform": "all", "notification": {"alert": "x" * 60}, **to}


INSTRUCTIONS: Final[tuple[PathOf, ...]] = (
    accept_single,
    accept_batch,
    connect,
    connect_owed,
    deliver,
    broadcast_one,
    broadcast_four,
)


# Memory


async def idle_memory(still: StillNode, bill: Bill) -> None:
    """Of a device that does nothing, but for the event loop's and the kernel's share; and of its session when it has
    left."""
    with memory() as held:
        tcp = Crowd(still, held, lambda: Connection(still.node, "tcp"), bytes)
        ws = Crowd(still, held, still.websocket_factory(), _masked, UPGRADE)
        bill.costs["idle.tcp.bytes"] = await tcp.come()
        bill.costs["absent.bytes"] = await tcp.leave()
        bill.costs["idle.ws.bytes"] = await ws.come()


class Crowd:
    """Devices on connections that are made by `make`."""

    def __init__(
        self,
        still: StillNode,
        held: Callable[[], int],
        make: Callable[[], asyncio.Protocol],
        wrap: Callable[[bytes], bytes],
        hello: bytes = b"",
    ) -> None:
        """`wrap` makes what is sent of a packet, `hello` comes before the first one."""
        self._still = still
        self._held = held
        self._make = make
        self._devnos = still.strangers(FIRST_OF_CROWD + CROWD)
        self._numbers = range(len(self._devnos))
        self._packets = [wrap(still.connect_packet(devno)) for devno in self._devnos]
        self._goodbye = wrap(encode(Disconnect(), 4))
        self._hello = hello
        self._protocols: list[asyncio.Protocol | None] = [None] * len(self._devnos)
        self._empty = 0

    async def come(self) -> float:
        """Bytes of each that is connected."""
        first, others = self._numbers[:FIRST_OF_CROWD], self._numbers[FIRST_OF_CROWD:]
        await self._come(first)
        await self._leave(first)
        self._empty = self._held()
        await self._come(others)
        return (self._held() - self._empty) / CROWD

    async def leave(self) -> float:
        """Bytes of each that has left, and has a session."""
        await self._leave(self._numbers[FIRST_OF_CROWD:])
        return (self._held() - self._empty) / CROWD

    async def _come(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            protocol = self._protocols[number] = self._make()
            protocol.connection_made(NOBODY)
            for data in filter(None, (self._hello, self._packets[number])):
                protocol.data_received(data)
            if number % EACH == 0:
                await self._still.rest()
        await self._still.rest()
        online = self._still.world.hub.online
        assert all(self._devnos[number] in online for number in numbers)

    async def _leave(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            protocol, self._protocols[number] = self._protocols[number], None
            assert protocol is not None
            protocol.data_received(self._goodbye)
            protocol.connection_lost(None)
            del protocol
        await self._still.minute_later()


def _masked(packet: bytes) -> bytes:
    return Frame(Opcode.BINARY, packet).serialize(mask=True)


def measure() -> Bill:
    """All costs, as Python runs them here. It takes some seconds."""
    bill = Bill()
    run_paths(bill, INSTRUCTIONS)
    run_idle_memory(bill)
    return bill


def run_paths(bill: Bill, paths: Sequence[PathOf]) -> None:
    """On one node, which logs as it does when nothing is set."""

    async def story(still: StillNode) -> None:
        for path in paths:
            for _ in range(2):  # the first time fills caches
                await path(still, bill)

    with _logging():
        _run(DEVICES, story)


def run_idle_memory(bill: Bill) -> None:
    """On a node that logs nothing: lines that wait to be written are no connection's memory."""
    _run(2 * (FIRST_OF_CROWD + CROWD), lambda still: idle_memory(still, bill))


def _run(devices: int, story: Callable[[StillNode], Coroutine[Any, Any, None]]) -> None:
    async def run(directory: Path) -> None:
        async with still_node(directory, devices) as still:
            await story(still)

    with TemporaryDirectory() as directory, asyncio.Runner(loop_factory=StillLoop) as runner:
        runner.run(run(Path(directory)))


@contextmanager
def _logging() -> Iterator[None]:
    root = logging.root
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # or they would be closed
    with open(os.devnull, "w") as nowhere:
        set_up_logs("text", "info", nowhere)
        try:
            yield
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
