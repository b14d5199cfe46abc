"""The load of test_crash.py: a fleet of devices, publishers of every kind, and the test's own ledger of both.

The ledger decides what must have happened; it knows nothing of the server but its answers. Devices here are
lean on purpose (the codec and a socket): what they count depends on no SDK of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, Protocol

import aiohttp
import orjson

from clients.local_server import Addresses, AppKeys
from gateway.mqtt import (
    Connack,
    Connect,
    Disconnect,
    Packet,
    Pingreq,
    Pingresp,
    Puback,
    Publish,
    Reason,
    decode,
    encode,
)

DEVICES: Final = 50
TAGS: Final = tuple(f"tag{n}" for n in range(6))
MAX_PACKET: Final = 1 << 20
HANDSHAKE_LIMIT: Final = 30.0  # seconds; far beyond what a live server takes
CLOSED_LIMIT: Final = 90.0  # seconds until a connection that was taken over must be closed
AGAIN_AFTER: Final = 0.05  # seconds until a device or publisher tries a dead server again
BUSY: Final = (
    Reason.SERVER_UNAVAILABLE,
    Reason.SERVER_BUSY,
    Reason.USE_ANOTHER_SERVER,
    Reason.CONNECTION_RATE_EXCEEDED,
)


class TryAgain(Exception):
    """The server is there, and says that it cannot at the moment."""


GONE: Final = (
    OSError,
    EOFError,
    TimeoutError,
    aiohttp.ClientError,
    TryAgain,
)  # the server was killed, is not up yet, or cannot at the moment


@dataclass(slots=True)
class Push:
    """What one publisher sent once, or again and again under one cid."""

    uid: str  # its alert
    audience: dict[str, list[str]] | str
    targets: frozenset[str]  # registration ids, by the ledger's own model of tags and aliases
    cid: str | None
    answers: set[str] = field(default_factory=set)  # msg_ids it was answered with
    msg_ids: set[str] = field(default_factory=set)  # under which devices got it
    reached: set[str] = field(default_factory=set)

    def body(self) -> bytes:
        content: dict[str, Any] = {
            "platform": "all", "audience": self.audience, "notification": {"alert": self.uid},
        }  # fmt: skip
        return orjson.dumps(content | ({"cid": self.cid} if self.cid else {}))

    @property
    def exists(self) -> bool:
        """Somebody knows that the server has it."""
        return bool(self.answers or self.msg_ids)


class Ledger:
    """Every push, what became of it, and whatever broke a guarantee on the way."""

    def __init__(self) -> None:
        self.pushes: dict[str, Push] = {}
        self.wrong: list[str] = []
        self.copies = 0  # deliveries, repeats included
        self.missing: set[tuple[str, str]] = set()  # (uid, device) that must still arrive
        self.unseen: set[str] = set()  # stored msg_ids that no device got yet; filled when the load is over
        self.complete = asyncio.Event()
        self.on_answer: Callable[[], None] | None = None  # called once, at the next answer

    def answered(self, push: Push, msg_id: str) -> None:
        if self.on_answer is not None:
            act, self.on_answer = self.on_answer, None
            act()
        self._exists(push)
        push.answers.add(msg_id)

    def arrived(self, device: str, uid: str, msg_id: str) -> None:
        self.copies += 1
        push = self.pushes[uid]
        self._exists(push)
        push.msg_ids.add(msg_id)
        push.reached.add(device)
        self.missing.discard((uid, device))
        self.unseen.discard(msg_id)
        if not self.missing and not self.unseen:
            self.complete.set()

    def _exists(self, push: Push) -> None:
        if not push.exists:
            self.missing.update((push.uid, target) for target in push.targets - push.reached)

    def expect(self, stored: Iterable[str]) -> None:
        """The load is over, and this is what the store holds: from now on wait for `complete`."""
        seen = {msg_id for push in self.pushes.values() for msg_id in push.msg_ids}
        self.unseen = set(stored) - seen
        self.complete.clear()
        if not self.missing and not self.unseen:
            self.complete.set()

    def mistakes(self) -> list[str]:
        """G1, G2: all or nothing, once per cid, and nobody else."""
        found = list(self.wrong)
        for push in self.pushes.values():
            if len(push.answers | push.msg_ids) > 1:
                found.append(f"push {push.uid} is several: {push.answers} {push.msg_ids}")
            if push.reached - push.targets:
                found.append(f"push {push.uid} reached strangers: {push.reached - push.targets}")
            if push.exists and push.targets - push.reached:
                found.append(f"push {push.uid} {push.answers} did not reach {push.targets - push.reached}")
        return found


class Server(Protocol):
    """Where to: one server, or one of several at each look."""

    @property
    def app(self) -> AppKeys: ...

    @property
    def addresses(self) -> Addresses: ...


class Load:
    """What devices and publishers share: the server, its tags as the ledger models them, and the gate."""

    def __init__(self, server: Server, seed: int, *, patient: bool = False, pace: float = 1.0) -> None:
        """`patient`: the store may be away for a while, and those who push are told so; nodes may send devices away.
        `pace`: how long publishers rest between pushes; 1 is nearly nothing."""
        self.server = server
        self.patient = patient
        self.pace = pace
        self.app: AppKeys = server.app
        self.random = Random(seed)
        self.ledger = Ledger()
        self.recorded = asyncio.Event()  # the server has every acknowledgement on record
        self.names = [f"device-{n}" for n in range(DEVICES)]
        self.tokens: dict[str, bytes] = {}
        self.tags: dict[str, set[str]] = {}
        self.draining = asyncio.Event()
        self._gate = asyncio.Event()
        self._busy = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._uids = 0

    def alias(self, name: str) -> str:
        return f"alias{self.names.index(name) % (DEVICES // 2)}"

    # The gate: publishers begin a push only while it is open

    def open_gate(self) -> None:
        self._gate.set()

    async def close_gate(self) -> None:
        """Nothing new begins; returns when all that had begun is answered or given up."""
        self._gate.clear()
        await self._quiet.wait()

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        await self._gate.wait()
        self._busy += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._busy -= 1
            if not self._busy:
                self._quiet.set()

    # Pushes and their targets

    def new_push(self, random: Random, *, cid: bool | None = None, one: bool = False) -> Push:
        audience, targets = self._audience(random, one=one)
        self._uids += 1
        uid = f"p{self._uids}"
        wanted = random.random() < 0.5 if cid is None else cid
        push = Push(uid, audience, frozenset(targets), f"cid-{uid}" if wanted else None)
        self.ledger.pushes[uid] = push
        return push

    def _audience(self, random: Random, *, one: bool) -> tuple[dict[str, list[str]] | str, set[str]]:
        kind = "few" if one else random.choice(("few", "many", "alias", "tag", "tag_and", "tag_not", "all"))
        if kind == "all":
            return "all", set(self.names)
        if kind in ("few", "many"):
            most = 1 if one else 3 if kind == "few" else 20
            names = random.sample(self.names, random.randint(1, most))
            return {"registration_id": names}, set(names)
        if kind == "alias":
            alias = self.alias(random.choice(self.names))
            return {"alias": [alias]}, {name for name in self.names if self.alias(name) == alias}
        first, second = random.sample(TAGS, 2)
        having = {tag: {name for name in self.names if tag in self.tags[name]} for tag in (first, second)}
        audience, targets = {
            "tag": ({"tag": [first, second]}, having[first] | having[second]),
            "tag_and": ({"tag_and": [first, second]}, having[first] & having[second]),
            "tag_not": ({"tag": [first], "tag_not": [second]}, having[first] - having[second]),
        }[kind]
        return (audience, targets) if targets else self._audience(random, one=one)

    # HTTP

    def session(self) -> aiohttp.ClientSession:
        login = b64encode(f"{self.app.app_key}:{self.app.master_secret}".encode()).decode()
        return aiohttp.ClientSession(
            self.server.addresses.http,
            headers={"Authorization": f"Basic {login}"},
            timeout=aiohttp.ClientTimeout(HANDSHAKE_LIMIT),
        )

    async def register(self, http: aiohttp.ClientSession) -> None:
        for name in self.names:
            self.tags[name] = set(self.random.sample(TAGS, 2))
            body = {"registration_id": name, "tags": sorted(self.tags[name]), "alias": self.alias(name)}
            async with http.post("/v1/devices", data=orjson.dumps(body)) as answer:
                self.tokens[name] = orjson.loads(await answer.read())["token"].encode()

    async def change_tags(self, http: aiohttp.ClientSession) -> None:
        """Only while the gate is closed: then the model is exact."""
        for name in self.random.sample(self.names, 5):
            self.tags[name] = set(self.random.sample(TAGS, self.random.randint(0, 3)))
            body = orjson.dumps({"tags": sorted(self.tags[name]) or ""})
            async with http.post(f"/v3/devices/{name}", data=body) as answer:
                assert answer.status == 200, await answer.text()


class Wire:
    """One MQTT connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, version: int) -> None:
        self._reader = reader
        self._writer = writer
        self._buffer = bytearray()
        self._version = version
        self.port: int = writer.get_extra_info("sockname")[1]

    @classmethod
    async def open(cls, address: tuple[str, int], connect: Connect) -> Wire:
        """Raises one of GONE. Returns after CONNACK."""
        async with asyncio.timeout(HANDSHAKE_LIMIT):
            wire = cls(*await asyncio.open_connection(*address), connect.version)
            try:
                wire.send(connect)
                while (packet := wire.next()) is None:
                    await wire.fill()
                assert isinstance(packet, Connack), packet
                if packet.reason in BUSY:
                    raise TryAgain
                assert packet.reason is Reason.SUCCESS, packet
            except BaseException:
                wire.abort()
                raise
        return wire

    def send(self, *packets: Packet) -> None:
        self._writer.write(b"".join(encode(packet, self._version) for packet in packets))

    async def fill(self) -> None:
        data = await self._reader.read(65_536)
        if not data:
            raise EOFError
        self._buffer += data

    def next(self) -> Packet | None:
        found = decode(self._buffer, 0, self._version, MAX_PACKET)
        if found is None:
            return None
        packet, end = found
        del self._buffer[:end]
        return packet

    def waiting(self) -> list[Packet]:
        packets = []
        while (packet := self.next()) is not None:
            packets.append(packet)
        return packets

    def abort(self) -> None:
        self._writer.transport.abort()


class Device:
    """Comes and goes. While the load runs each of its lives has a habit; when it drains, it is a good device."""

    HABITS = ("prompt", "prompt", "slow", "forgetful", "mute", "stalled")

    def __init__(self, load: Load, name: str, seed: int) -> None:
        self.name = name
        self._load = load
        self._random = Random(seed)
        self._version = self._random.choice((4, 5))
        self._ghost: Wire | None = None  # a life that was not ended when the next began

    async def run(self) -> None:
        try:
            while not self._load.draining.is_set():
                with contextlib.suppress(*GONE):
                    await self._live()
                await self._either(self._load.draining.wait(), self._random.choice((0.0, 0.02, 0.3, 1.0)))
            await asyncio.gather(self._stay(), self._see_ghost_closed())
        finally:
            self._bury()

    @staticmethod
    async def _either(waiting: Any, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(waiting, seconds)

    def _connect(self, *, steady: bool) -> Connect:
        random, load = self._random, self._load
        properties: Any = {}
        if self._version == 5:
            properties["session_expiry_interval"] = random.choice((0, 600))
            properties["receive_maximum"] = 65_535 if steady else random.choice((1, 3, 65_535))
        signed = load.patient or random.random() < 0.5  # a fleet's app is not open: it would have a home
        return Connect(
            client_id=self.name,
            clean_start=random.random() < 0.2,
            keep_alive=60,
            username=load.app.app_key,
            password=load.tokens[self.name] if signed else load.app.device_key.encode(),
            version=self._version,
            properties=properties,
        )

    async def _live(self) -> None:
        wire = await Wire.open(self._load.server.addresses.mqtt, self._connect(steady=False))
        self._bury()
        try:
            await self._either(self._behave(wire), self._random.expovariate(1.0))
        except BaseException:
            wire.abort()
            raise
        if self._random.random() < 0.2:
            self._ghost = wire  # the next connection takes over
        else:
            if self._random.random() < 0.5:
                wire.send(Disconnect())
            wire.abort()

    def _bury(self) -> None:
        if self._ghost is not None:
            self._ghost.abort()
            self._ghost = None

    async def _see_ghost_closed(self) -> None:
        """G5: by the server, as there is a newer connection."""
        if self._ghost is None:
            return
        try:
            async with asyncio.timeout(CLOSED_LIMIT):
                while True:
                    await self._ghost.fill()
        except TimeoutError:
            self._load.ledger.wrong.append(f"{self.name}: an older connection stays open (G5)")
        except GONE:
            pass

    async def _behave(self, wire: Wire) -> None:
        habit = self._random.choice(self.HABITS)
        last = 0
        while habit != "stalled":
            last, ids = self._take(wire.waiting(), last)
            if habit == "slow":
                await asyncio.sleep(self._random.random() * 0.1)
            if habit == "forgetful":
                ids = [packet_id for packet_id in ids if self._random.random() < 0.7]
            if habit != "mute" and ids:
                wire.send(*map(Puback, ids))
            await wire.fill()
        await asyncio.Event().wait()

    def _take(self, packets: Sequence[Packet], last: int) -> tuple[int, list[int]]:
        """Note pushes; returns the newest msg_id of this connection and the packet ids to acknowledge."""
        ledger = self._load.ledger
        ids = []
        for packet in packets:
            if isinstance(packet, Publish):
                content = orjson.loads(packet.payload)
                msg_id = int(content["msg_id"])
                if msg_id <= last:
                    ledger.wrong.append(f"{self.name}: {msg_id} came after {last} on one connection (G3)")
                last = msg_id
                ledger.arrived(self.name, content["notification"]["alert"], content["msg_id"])
                ids.append(packet.packet_id)
        return last, ids

    async def _stay(self) -> None:
        """Take everything and acknowledge it, until the server has that on record."""
        while True:
            try:
                await self._stay_once()
            except GONE:
                if not self._load.patient:
                    raise
                await asyncio.sleep(AGAIN_AFTER)
            else:
                return

    async def _stay_once(self) -> None:
        wire = await Wire.open(self._load.server.addresses.mqtt, self._connect(steady=True))
        recorded = asyncio.create_task(self._load.recorded.wait())
        last = 0
        try:
            recorded.add_done_callback(lambda _: wire.send(Pingreq()))
            while True:
                packets = wire.waiting()
                last, ids = self._take(packets, last)
                wire.send(*map(Puback, ids))
                if any(isinstance(packet, Pingresp) for packet in packets):
                    return
                await wire.fill()
        finally:
            recorded.cancel()
            wire.abort()


class HttpPublisher:
    """One push a call, or a batch."""

    def __init__(self, load: Load, seed: int, *, batch: bool = False) -> None:
        self._load = load
        self._random = Random(seed)
        self._send = self._batch if batch else self._single

    async def run(self) -> None:
        async with self._load.session() as http:
            while True:
                async with self._load.turn():
                    await self._send(http)
                await asyncio.sleep(self._random.random() * 0.02 * self._load.pace)

    async def _single(self, http: aiohttp.ClientSession) -> None:
        push = self._load.new_push(self._random)
        answer = await self.call(http, "/v3/push", push.body(), again=push.cid is not None)
        if answer is not None:
            self._load.ledger.answered(push, answer["msg_id"])

    async def _batch(self, http: aiohttp.ClientSession) -> None:
        pushes = [
            self._load.new_push(self._random, cid=True, one=True) for _ in range(self._random.randint(1, 30))
        ]
        items = {
            push.cid: {"platform": "all", "target": min(push.targets), "notification": {"alert": push.uid}}
            for push in pushes
        }
        body = orjson.dumps({"pushlist": items})
        answer = await self.call(http, "/v3/push/batch/regid/single", body, again=True)
        for push in pushes:
            self._load.ledger.answered(push, answer[push.cid]["msg_id"])

    async def call(self, http: aiohttp.ClientSession, path: str, body: bytes, *, again: bool) -> Any:
        """The answer; None if the server went away and the push must not be tried again."""
        while True:
            try:
                address = self._load.server.addresses.http  # of another broker, if there are several
                async with http.post(address + path, data=body) as answer:
                    raw = await answer.read()
                    if self._load.patient and answer.status == 503:
                        raise TryAgain
                    if answer.status != 200:
                        self._load.ledger.wrong.append(f"{path}: {answer.status} {raw[:200]!r}")
                    return orjson.loads(raw)
            except GONE:
                if not again:
                    return None
                await asyncio.sleep(AGAIN_AFTER)


class MqttPublisher:
    """Bursts of pushes over one connection; PUBACK is the answer."""

    def __init__(self, load: Load, seed: int) -> None:
        self._load = load
        self._random = Random(seed)
        self._wire: Wire | None = None

    async def run(self) -> None:
        try:
            while True:
                async with self._load.turn():
                    count = self._random.randint(1, 10)
                    await self._burst([self._load.new_push(self._random) for _ in range(count)])
                await asyncio.sleep(self._random.random() * 0.05 * self._load.pace)
        finally:
            self._drop()

    async def _burst(self, pushes: list[Push]) -> None:
        while pushes:
            try:
                await self._try(pushes)
            except GONE:
                self._drop()
                await asyncio.sleep(AGAIN_AFTER)
            pushes = [push for push in pushes if push.cid is not None and not push.answers]

    async def _try(self, pushes: list[Push]) -> None:
        wire = self._wire = self._wire or await self._open()
        by_id = dict(enumerate(pushes, start=1))
        wire.send(*(Publish("push", push.body(), 1, packet_id=i) for i, push in by_id.items()))
        async with asyncio.timeout(HANDSHAKE_LIMIT):
            while by_id:
                for packet in wire.waiting():
                    if self._load.patient and isinstance(packet, Disconnect):  # sent to another node
                        raise TryAgain
                    assert isinstance(packet, Puback), packet
                    if self._load.patient and packet.reason is Reason.IMPLEMENTATION_SPECIFIC_ERROR:
                        raise TryAgain
                    if packet.reason is not Reason.SUCCESS:
                        self._load.ledger.wrong.append(f"PUBACK {packet}")
                    told = dict(packet.properties["user_properties"])
                    self._load.ledger.answered(by_id.pop(packet.packet_id), told["msg_id"])
                if by_id:
                    await wire.fill()

    async def _open(self) -> Wire:
        app = self._load.app
        connect = Connect("publisher", username=app.app_key, password=app.master_secret.encode())
        return await Wire.open(self._load.server.addresses.mqtt, connect)

    def _drop(self) -> None:
        if self._wire is not None:
            self._wire.abort()
            self._wire = None
