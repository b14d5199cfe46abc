"""The load of test_crash_sessions.py: publishers and durable subscribers of ordinary topics, and a ledger of its own.

These are right MQTT clients and no more: a session's state is kept across connections, what is unacknowledged is sent
again with DUP under its packet id when Session Present is 1, and the receiver of QoS 2 knows a message by its packet
id until PUBREL. Whatever the server does to them, the ledger judges by what the specification promises.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Final, cast

from clients.local_server import AppKeys, LocalServer
from gateway.mqtt import (
    Connack,
    Connect,
    Disconnect,
    Packet,
    Pingreq,
    Pingresp,
    Properties,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Reason,
    Suback,
    Subscribe,
    Subscription,
)
from tests.crash_load import AGAIN_AFTER, GONE, HANDSHAKE_LIMIT, Wire

EXPIRY: Final = 3600  # seconds: sessions outlive the test
TOPICS: Final = tuple(f"t/{n}" for n in range(4))
UNANSWERED: Final = 12  # messages that a publisher has under way at most
WATCHED: Final = (
    Connack,
    Puback,
    Pubrec,
    Pubcomp,
    Publish,
    Pubrel,
)  # packets of the server after which it may be killed

Key = tuple[str, str, int]  # publisher, topic, QoS it arrives with


@dataclass(frozen=True, slots=True)
class Message:
    """What a payload says."""

    publisher: str
    topic: str
    qos: int
    number: int  # grows with each message of the publisher

    @classmethod
    def read(cls, packet: Publish) -> Message:
        publisher, qos, number = packet.payload.decode().split()
        return cls(publisher, packet.topic, int(qos), int(number))

    @property
    def payload(self) -> bytes:
        return f"{self.publisher} {self.qos} {self.number}".encode()


@dataclass(slots=True)
class Reader:
    """A subscription: of one client, or shared by several."""

    name: str
    filter: str
    qos: int
    ordered: bool = True
    times: dict[Message, int] = field(default_factory=dict)  # how often each message came
    newest: dict[Key, int] = field(default_factory=dict)
    missing: set[Message] = field(default_factory=set)
    complete: asyncio.Event = field(default_factory=asyncio.Event)

    def wants(self, message: Message) -> bool:
        return self.filter.endswith("#") or self.filter.endswith(message.topic)


class Ledger:
    """What was accepted, what arrived, and whatever broke a promise on the way."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = readers
        self.accepted: set[Message] = set()
        self.wrong: list[str] = []
        self.copies = 0
        self.on_packet: Callable[[], None] | None = None  # called once, at the next packet that is `on_kind`
        self.on_kind: type[Packet] = Puback

    def came(self, packet: Packet) -> None:
        """A packet of the server, before anything is done about it."""
        if self.on_packet is not None and isinstance(packet, self.on_kind):
            act, self.on_packet = self.on_packet, None
            act()

    def accept(self, message: Message) -> None:
        self.accepted.add(message)

    def arrived(self, reader: Reader, message: Message, qos: int) -> None:
        self.copies += 1
        times = reader.times[message] = reader.times.get(message, 0) + 1
        if times > 1 and qos == 2:
            self.wrong.append(f"{reader.name} got {message} {times} times")
        if times == 1 and reader.ordered:
            key = (message.publisher, message.topic, qos)
            if message.number < reader.newest.get(key, 0):
                self.wrong.append(f"{reader.name} got {message} after {reader.newest[key]}")
            reader.newest[key] = message.number
        reader.missing.discard(message)
        if not reader.missing:
            reader.complete.set()

    def expect(self) -> None:
        """The load is over: `Reader.complete` is set when all that was accepted is there."""
        for reader in self.readers:
            wanted = {message for message in self.accepted if reader.wants(message)}
            reader.missing = wanted - set(reader.times)
            reader.complete.clear()
            if not reader.missing:
                reader.complete.set()

    def mistakes(self) -> list[str]:
        found = list(self.wrong)
        for reader in self.readers:
            found += [f"{reader.name} did not get {message}" for message in reader.missing]
            found += [f"{reader.name} got {m} out of nothing" for m in set(reader.times) - self.accepted]
        return found


class Line(Wire):
    """A connection, after CONNACK."""

    present = False

    @classmethod
    async def dial(cls, address: tuple[str, int], connect: Connect, ledger: Ledger) -> Line:
        """Raises one of GONE."""
        async with asyncio.timeout(HANDSHAKE_LIMIT):
            line = cls(*await asyncio.open_connection(*address), connect.version)
            try:
                line.ledger = ledger
                line.send(connect)
                connack = await line.receive()
                assert isinstance(connack, Connack), connack
                assert connack.reason is Reason.SUCCESS, connack
                line.present = connack.session_present
            except BaseException:
                line.abort()
                raise
        return line

    ledger: Ledger

    async def receive(self) -> Packet:
        while (packet := self.next()) is None:
            await self.fill()
        self.ledger.came(packet)
        return packet


class Load:
    def __init__(self, server: LocalServer, seed: int) -> None:
        self.server = server
        self.random = Random(seed)
        alone = [Reader(f"reader-{n}", "t/#", qos) for n, qos in enumerate((2, 2, 2, 2, 1))]
        alone += [Reader(f"narrow-{n}", TOPICS[n], 2) for n in range(2)]
        group = Reader("group", "$share/group/t/#", 2, ordered=False)
        self.ledger = Ledger([*alone, group])
        self.subscribers = [Subscriber(self, reader.name, reader) for reader in alone]
        self.subscribers += [Subscriber(self, f"member-{n}", group) for n in range(3)]
        self.publishers = [Publisher(self, f"publisher-{n}", device=n % 2 == 1) for n in range(4)]
        self.gate = asyncio.Event()  # closed: publishers begin nothing new, and end when they have finished
        self.gate.set()
        self.draining = asyncio.Event()

    @property
    def app(self) -> AppKeys:
        return self.server.app


class Client:
    """What both kinds share: a durable session, and connections that come and go."""

    def __init__(self, load: Load, name: str, *, device: bool = True) -> None:
        self.name = name
        self.password = load.app.device_key if device else load.app.master_secret
        self.load = load
        self.ledger = load.ledger
        self.random = Random(load.random.getrandbits(32))
        self.version = self.random.choice((4, 5))

    def connect(self, *, clean: bool = False, expiry: int = EXPIRY) -> Connect:
        properties: Properties = {}
        if self.version == 5:
            properties = {"session_expiry_interval": expiry}
            properties["receive_maximum"] = self.random.choice((2, 20, 65_535))
        return Connect(
            self.name,
            clean,
            60,
            self.load.app.app_key,
            self.password.encode(),
            version=self.version,
            properties=properties,
        )

    @contextlib.asynccontextmanager
    async def dialled(self, connect: Connect) -> AsyncIterator[Line]:
        line = await Line.dial(self.load.server.addresses.mqtt, connect, self.ledger)
        try:
            yield line
        finally:
            line.abort()

    async def end(self) -> None:
        """End the session, in one of the ways there are."""
        if self.version == 5 and self.random.random() < 0.5:
            connect, goodbye = self.connect(), Disconnect(properties={"session_expiry_interval": 0})
        else:
            connect, goodbye = self.connect(clean=True, expiry=0), Disconnect()
        async with self.dialled(connect) as line:
            line.send(goodbye)
            with contextlib.suppress(EOFError):
                while True:  # the server has taken it when it closes
                    await line.fill()


class Publisher(Client):
    """Sends messages of both QoS, and what is unanswered again."""

    def __init__(self, load: Load, name: str, *, device: bool) -> None:
        super().__init__(load, name, device=device)
        self._device = device
        self._unanswered: dict[int, Publish | Pubrel] = {}  # packet id -> what is sent again, in order
        self._messages: dict[int, Message] = {}  # those of the same ids
        self._backlog: deque[Message] = deque()  # the server lost the session they were sent in
        self._number = 0
        self._next_id = 1

    async def run(self) -> None:
        """Until the gate is closed and everything is answered."""
        while self.load.gate.is_set() or self._unanswered or self._backlog:
            with contextlib.suppress(*GONE):
                async with self.dialled(self.connect()) as line:
                    self._resume(line)
                    await self._work(line)
            await asyncio.sleep(AGAIN_AFTER)

    def _resume(self, line: Line) -> None:
        if line.present:
            for packet_id, packet in self._unanswered.items():
                again = replace(packet, dup=True) if isinstance(packet, Publish) else packet
                self._unanswered[packet_id] = again
                line.send(again)
            return
        for packet_id, packet in self._unanswered.items():
            if isinstance(packet, Publish):  # the application's business: they were not accepted
                self._backlog.append(self._messages[packet_id])
            elif not self._device:  # the session of a device is forgotten when it holds nothing any more
                self.ledger.wrong.append(f"{self.name}: the session with {packet} was lost")
        self._unanswered, self._messages = {}, {}

    async def _work(self, line: Line) -> None:
        patience = self.random.expovariate(0.5)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience if self.load.gate.is_set() else HANDSHAKE_LIMIT):
                reading = asyncio.create_task(self._read(line))
                try:
                    while not reading.done() and (
                        self.load.gate.is_set() or self._unanswered or self._backlog
                    ):
                        self._publish(line)
                        await asyncio.wait((reading,), timeout=self.random.random() * 0.02)
                finally:
                    reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)
        if reading.done() and not reading.cancelled() and (error := reading.exception()) is not None:
            raise error

    def _publish(self, line: Line) -> None:
        while len(self._unanswered) < UNANSWERED and (self._backlog or self.load.gate.is_set()):
            message = self._backlog.popleft() if self._backlog else self._new()
            packet_id = self._free_id()
            packet = Publish(message.topic, message.payload, message.qos, packet_id=packet_id)
            self._unanswered[packet_id], self._messages[packet_id] = packet, message
            line.send(packet)
            if self.random.random() < 0.3:
                return

    def _new(self) -> Message:
        self._number += 1
        return Message(self.name, self.random.choice(TOPICS), self.random.choice((1, 2)), self._number)

    def _free_id(self) -> int:
        while self._next_id in self._unanswered:
            self._next_id = self._next_id % 40 + 1  # few ids: a stale one of either side would be noticed
        packet_id, self._next_id = self._next_id, self._next_id % 40 + 1
        return packet_id

    async def _read(self, line: Line) -> None:
        while True:
            packet = await line.receive()
            match packet:
                case Puback(packet_id, reason) | Pubrec(packet_id, reason):
                    if reason >= Reason.UNSPECIFIED_ERROR:
                        self.ledger.wrong.append(f"{self.name}: {packet}")
                    if packet_id not in self._unanswered:
                        self.ledger.wrong.append(f"{self.name}: {packet} answers nothing")
                        continue
                    self.ledger.accept(self._messages[packet_id])
                    if isinstance(packet, Puback):
                        self._forget(packet_id)
                    else:
                        self._unanswered[packet_id] = Pubrel(packet_id)
                        line.send(Pubrel(packet_id))
                case Pubcomp(packet_id):
                    self._forget(packet_id)
                case Disconnect():
                    pass
                case _:
                    self.ledger.wrong.append(f"{self.name}: {packet}")

    def _forget(self, packet_id: int) -> None:
        self._unanswered.pop(packet_id, None)
        self._messages.pop(packet_id, None)


class Subscriber(Client):
    """Comes and goes, and acknowledges with delays and out of order; when the load drains it takes everything."""

    HABITS = ("prompt", "prompt", "slow", "shuffled", "mute")

    def __init__(self, load: Load, name: str, reader: Reader) -> None:
        super().__init__(load, name)
        self._reader = reader
        self._received: set[int] = set()  # QoS 2 ids between PUBLISH and PUBREL
        self._ghost: Line | None = None

    async def subscribe(self) -> None:
        async with self.dialled(self.connect()) as line:
            line.send(Subscribe(1, (Subscription(self._reader.filter, self._reader.qos),)))
            suback = await line.receive()
            assert isinstance(suback, Suback), suback
            assert suback.reasons == (Reason(self._reader.qos),), suback

    async def run(self) -> None:
        try:
            while not self.load.draining.is_set():
                with contextlib.suppress(*GONE):
                    await self._live()
                await self._rest(self.random.choice((0.0, 0.02, 0.3, 1.0)))
        finally:
            self._bury()
        async with self.dialled(self.connect()) as line:
            self._check(line)
            await self._stay(line)

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.load.draining.wait(), seconds)

    def _bury(self) -> None:
        if self._ghost is not None:
            self._ghost.abort()
            self._ghost = None

    def _check(self, line: Line) -> None:
        if not line.present:
            self.ledger.wrong.append(f"{self.name}: the session was lost")

    async def _live(self) -> None:
        line = await Line.dial(self.load.server.addresses.mqtt, self.connect(), self.ledger)
        self._bury()
        try:
            self._check(line)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.random.expovariate(1.0)):
                    await self._behave(line)
        except BaseException:
            line.abort()
            raise
        if self.random.random() < 0.2:
            self._ghost = line  # the next connection takes over
        else:
            if self.random.random() < 0.5:
                line.send(Disconnect())
            line.abort()

    async def _behave(self, line: Line) -> None:
        habit = self.random.choice(self.HABITS)
        waiting: list[Packet] = []  # answers
        while True:
            waiting += self._take(await line.receive())
            if habit == "mute":
                continue
            if habit == "slow":
                await asyncio.sleep(self.random.random() * 0.05)
            if habit == "shuffled":
                if len(waiting) < 3 and self.random.random() < 0.7:
                    continue
                self.random.shuffle(waiting)
            line.send(*waiting)
            waiting = []

    def _take(self, packet: Packet) -> list[Packet]:
        """Do what the packet asks for; returns the answers that are due."""
        match packet:
            case Publish(qos=1):
                self.ledger.arrived(self._reader, Message.read(packet), 1)
                return [Puback(packet.packet_id)]
            case Publish(qos=2):
                if packet.packet_id not in self._received:
                    self._received.add(packet.packet_id)
                    self.ledger.arrived(self._reader, Message.read(packet), 2)
                elif not packet.dup:
                    self.ledger.wrong.append(f"{self.name}: {packet} has an id that is not released")
                return [Pubrec(packet.packet_id)]
            case Pubrel():
                self._received.discard(packet.packet_id)
                return [Pubcomp(packet.packet_id)]
            case Disconnect() | Pingresp():
                return []
            case _:
                self.ledger.wrong.append(f"{self.name}: {packet}")
                return []

    async def _stay(self, line: Line) -> None:
        """Take everything; then the server has our answers, and nothing more comes."""
        complete = asyncio.create_task(self._reader.complete.wait())
        receiving = asyncio.create_task(line.receive())
        try:
            while not complete.done() or self._received:
                await asyncio.wait((complete, receiving), return_when=asyncio.FIRST_COMPLETED)
                while receiving.done():
                    line.send(*self._take(receiving.result()))
                    receiving = asyncio.create_task(line.receive())
                    await asyncio.sleep(0)
            quiet = False
            while not quiet:  # repeats of QoS 1 may still come, a window at a time
                quiet = True
                line.send(Pingreq())
                while not isinstance(packet := await receiving, Pingresp):
                    quiet = False
                    line.send(*self._take(packet))
                    receiving = asyncio.create_task(line.receive())
                receiving = asyncio.create_task(line.receive())
        finally:
            complete.cancel()
            receiving.cancel()

    async def look_again(self) -> None:
        """Nothing may be left: what came twice would have come now."""
        async with self.dialled(self.connect()) as line:
            self._check(line)
            line.send(Pingreq())
            while not isinstance(packet := await line.receive(), Pingresp):
                self._take(packet)
                self.ledger.wrong.append(f"{self.name}: {cast('object', packet)} was left")
