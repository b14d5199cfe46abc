"""Several clients do what they like to one node, in any order: every packet, both versions, reconnects, takeovers,
slow readers, acknowledgements in any order and wrong ones. Each client keeps its own side of the protocol, and checks
the server's against it.

What must hold: a connection ends only if its client deserved it; ids in flight stay within the window, and none is
used for two messages at once; at QoS 2 a message comes exactly once, at QoS 1 and as a push at least once; pushes
come in order; and when all sessions have ended, nothing of them is left. `make fuzz` runs many more examples.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import gateway.session
from broker.tenants import tokens
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
    Unsuback,
    Unsubscribe,
    Will,
)
from gateway.node import NodeSettings
from tests.gateway.world import DAY, Phone, World, start_node

WINDOW: Final = 8  # ids in flight to a peer that sets no Receive Maximum
LAST_ID: Final = 30  # instead of 65,535, so that ids come round: three windows, and some
EXPIRY: Final = 600  # seconds
TOPICS: Final = ("a", "a/b", "a/b/c", "b", "/")
FILTERS: Final = ("a", "a/b", "a/+", "a/#", "+/b", "#", "b", "$share/g/a/#")
REFUSED: Final = 0x80  # reason codes from here on
UNKNOWN_ID: Final = 60_000  # an id that nobody uses here
GARBAGE: Final = (
    b"\x00\x00",
    b"\x10\x00",
    b"\xc0\x01\x00",
    b"\x30\x03\x00\x05a",
    b"\x82\x02\x00\x01",
    b"\xf5\xff",
)
NOTHING: Final = (b"\xc0", b"\x32\x7f", b"\x82\xff\x7f\x00")  # beginnings of packets


class Incoming(NamedTuple):
    """What a packet id of the server stands for."""

    payload: bytes
    qos: int
    held: bool  # QoS 2: PUBREC was sent, PUBREL is awaited


class Outgoing(NamedTuple):
    """What a packet id of this client stands for."""

    packet: Publish
    wanted_by: tuple[tuple[Client, int], ...]  # who must get it, and what they were then
    received: bool = False  # PUBREC came
    released: bool = False  # PUBREL was sent


class Client:
    """One client id and its side of the protocol."""

    def __init__(self, world: World, name: str, devno: int) -> None:
        self.world = world
        self.name = name
        self.devno = devno  # -1: a publisher
        self.phone: Phone | None = None
        self.read = 0  # packets of the phone that were looked at
        self.version, self.window, self.expiry = 5, WINDOW, 0
        self.ready = False  # CONNACK came
        self.may_close = False  # it asked for it
        self.may_exist: bool | None = False  # whether there is a session to come back to; None: not known
        self.changes = 0  # of what it is subscribed to, new sessions included
        self.pushed: set[int] = set()  # msg_ids that must come
        self.last_id = 0
        self.new_connection()
        self.new_session()

    def new_connection(self) -> None:
        self.sent_here: set[int] = (
            set()
        )  # ids of messages that came on this connection and are not acknowledged
        self.owed: list[Packet] = []  # acknowledgements
        self.asked: dict[int, tuple[Subscription, ...]] = {}
        self.wished: dict[str, int] = {}  # filter -> the SUBSCRIBE that spoke of it last
        self.newest_push = 0

    def new_session(self) -> None:
        self.changes += 1
        self.granted: dict[str, Subscription] = {}
        self.incoming: dict[int, Incoming] = {}
        self.completing: set[int] = set()  # ids whose PUBREL came and whose PUBCOMP was not sent
        self.outgoing: dict[int, Outgoing] = {}
        self.exactly = Counter[bytes]()  # what came at QoS 2
        self.shares = False  # it asked for a shared subscription
        self.expected: set[bytes] = set()
        self.got: set[bytes] = set()

    @property
    def usable(self) -> bool:
        return self.phone is not None and self.ready

    # What the server sends

    def look(self) -> None:
        """Read what has come, and check it."""
        phone = self.phone
        while phone is not None and self.phone is phone and self.read < len(phone.packets):
            packet = phone.packets[self.read]
            self.read += 1
            self.take(packet)
        if phone is not None and phone.closed:
            assert self.may_close, f"{self.name} was sent away: {phone.packets[-1:]}"
            self.lost()

    def take(self, packet: Packet) -> None:
        match packet:
            case Connack():
                self.take_connack(packet)
            case Publish():
                self.take_publish(packet)
            case Pubrel():
                self.take_pubrel(packet)
            case Puback() | Pubrec() | Pubcomp():
                self.take_answer(packet)
            case Suback():
                asked = self.asked.pop(packet.packet_id)
                for subscription, reason in zip(asked, packet.reasons, strict=True):
                    if reason < REFUSED and self.wished.get(subscription.filter) == packet.packet_id:
                        self.granted[subscription.filter] = subscription
            case Unsuback():
                self.asked.pop(packet.packet_id)
            case Disconnect():
                assert self.may_close, f"{self.name} was sent away: {packet}"
            case _:
                assert packet == Pingresp()

    def take_connack(self, packet: Connack) -> None:
        assert not self.ready, "a second CONNACK"
        assert packet.reason == Reason.SUCCESS, packet
        assert self.may_exist is None or packet.session_present is self.may_exist, packet
        self.ready = True
        if not packet.session_present:
            self.new_session()

    def take_publish(self, packet: Publish) -> None:
        assert self.ready, "a message before CONNACK"
        if packet.qos == 0:
            return
        packet_id, known = packet.packet_id, self.incoming.get(packet.packet_id)
        assert packet_id not in self.completing, f"{packet_id} is in use until PUBCOMP"
        assert packet_id not in self.sent_here, f"{packet_id} is in use"
        assert known is None or (packet.dup and packet.payload == known.payload), f"{packet_id} is in use"
        self.sent_here.add(packet_id)
        assert len(self.sent_here) <= self.window, f"{len(self.sent_here)} ids in flight of {self.window}"
        self.owed.append(Pubrec(packet_id) if packet.qos == 2 else Puback(packet_id))
        if known is not None and known.held:
            return
        self.incoming[packet_id] = Incoming(packet.payload, packet.qos, held=False)
        if packet.topic == "push":
            self.take_push(packet)
            return
        self.got.add(packet.payload)
        self.expected.discard(packet.payload)
        if packet.qos == 2 and known is None and not packet.payload.endswith(b"retained"):
            self.exactly[packet.payload] += 1
            by_share = self.shares and packet.topic.startswith("a")  # a copy of its own
            assert self.exactly[packet.payload] <= 1 + by_share, f"{packet.payload!r} came twice at QoS 2"

    def take_push(self, packet: Publish) -> None:
        msg_id = int(orjson.loads(packet.payload)["msg_id"])
        assert msg_id > self.newest_push, "pushes out of order"
        self.newest_push = msg_id
        self.pushed.discard(msg_id)

    def take_pubrel(self, packet: Pubrel) -> None:
        if packet.packet_id < UNKNOWN_ID:
            assert packet.reason == Reason.SUCCESS, packet
            self.incoming.pop(packet.packet_id, None)
            self.completing.add(packet.packet_id)
            self.owed.append(Pubcomp(packet.packet_id))

    def take_answer(self, packet: Puback | Pubrec | Pubcomp) -> None:
        sent = self.outgoing.get(packet.packet_id)
        if sent is None:
            assert isinstance(packet, Pubcomp), f"{packet} for nothing"
            return
        assert isinstance(packet, Puback) is (sent.packet.qos == 1)
        assert sent.released or not isinstance(packet, Pubcomp)
        assert packet.reason < REFUSED or isinstance(packet, Pubcomp), packet
        for client, changes in sent.wanted_by:
            if client.changes == changes and sent.packet.payload not in client.got:
                client.expected.add(sent.packet.payload)
        if isinstance(packet, Pubrec):
            self.outgoing[packet.packet_id] = sent._replace(received=True, wanted_by=())
        else:
            del self.outgoing[packet.packet_id]

    # What it does

    def connect(self, version: int, clean: bool, expiry: int, window: int, will: Will | None) -> None:
        self.look()
        if self.phone is not None:  # a session of no expiry may end with the old connection, or be taken over
            self.may_exist = True if self.ready and self.expiry else None
        if clean:
            self.new_session()
            self.may_exist = False
        properties: Properties = {}
        if version == 5:
            properties = {"session_expiry_interval": expiry, "receive_maximum": window}
        self.version, self.window = version, min(window, WINDOW) if version == 5 else WINDOW
        self.expiry = expiry if version == 5 else 0 if clean else EXPIRY
        self.new_connection()
        self.ready, self.may_close, self.read = False, False, 0
        app, password = self.world.app, self.world.app.master_secret
        if self.devno >= 0:
            password = tokens.issue(app, self.name, self.devno, "other", 0, self.world.wall, DAY)
        self.phone = Phone(
            self.world.node,
            Connect(
                self.name, clean, 0, app.key, password.encode(), will, version=version, properties=properties
            ),
        )
        self.look()

    def send(self, *packets: Packet) -> None:
        assert self.phone is not None
        self.phone.send(*packets)
        self.look()

    def acknowledge(self, which: int, refuse: bool) -> None:
        if not self.owed:
            return
        packet = self.owed.pop(which % len(self.owed))
        assert isinstance(packet, Puback | Pubrec | Pubcomp)
        packet_id = packet.packet_id
        if isinstance(packet, Pubrec) and refuse and self.version == 5:
            packet = Pubrec(packet_id, Reason.QUOTA_EXCEEDED)
        if isinstance(packet, Pubrec) and packet.reason is Reason.SUCCESS:
            self.incoming[packet_id] = self.incoming[packet_id]._replace(held=True)
        else:
            self.sent_here.discard(packet_id)
            self.completing.discard(packet_id)
            self.incoming.pop(packet_id, None)
        self.send(packet)

    def new_id(self) -> int:
        """Never one of before: the server may know it, from a session whose end it has not heard of."""
        self.last_id += 1
        return self.last_id

    def publish(self, packet: Publish, clients: list[Client]) -> None:
        wanted_by = [(c, c.changes) for c in clients if packet.qos and c.wants(packet.topic, self)]
        if packet.qos:
            self.outgoing[packet.packet_id] = Outgoing(packet, tuple(wanted_by))
        self.send(packet)

    def wants(self, topic: str, publisher: Client) -> bool:
        return (self.usable or self.may_exist is True) and any(
            subscription.qos and fits(subscription.filter, topic)
            for subscription in self.granted.values()
            if not (subscription.no_local and publisher is self)
        )

    def subscribe(self, subscriptions: tuple[Subscription, ...]) -> None:
        self.changes += 1
        packet_id = 100 + self.changes
        self.asked[packet_id] = subscriptions
        for subscription in subscriptions:
            self.granted.pop(subscription.filter, None)
            self.wished[subscription.filter] = packet_id
            self.shares |= subscription.filter.startswith("$share")
        self.send(Subscribe(packet_id, subscriptions))

    def unsubscribe(self, filters: tuple[str, ...]) -> None:
        self.changes += 1
        self.expected.clear()  # the server may keep what has not been sent to itself
        packet_id = 100 + self.changes
        self.asked[packet_id] = ()
        for topic_filter in filters:
            self.granted.pop(topic_filter, None)
            self.wished.pop(topic_filter, None)
        self.send(Unsubscribe(packet_id, filters))

    def leave(self) -> None:
        assert self.phone is not None
        self.look()
        if self.phone is not None:
            self.phone.leave()
            self.lost()

    def lost(self) -> None:
        """The connection is gone; what of the session remains?"""
        self.may_exist = bool(self.expiry) if self.ready else None
        self.phone, self.ready = None, False
        if not self.expiry:
            self.new_session()

    def outlive(self, *, crash: bool) -> None:
        """The server is gone. It knows what it has answered, and QoS 2 ids; others may get a new meaning."""
        self.may_close = True
        if self.phone is not None:
            self.look()
        if self.phone is not None:
            self.lost()
        self.incoming = {n: item for n, item in self.incoming.items() if item.qos == 2}
        if self.may_exist and not self.granted:  # an empty session is as good as a new one
            self.may_exist = None
        if crash and self.may_exist is False:  # that it had ended may not have been written yet
            self.may_exist = None


async def abandon(world: World) -> None:
    """The server is killed: what the store has not been given is lost."""
    node = world.node
    node._unsubscribe()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await world.store.settle([])  # writes of the dead are done before those of the living


def fits(topic_filter: str, topic: str) -> bool:
    """MQTT5-4.7, said as simply as it can be; a shared subscription may always go to another member."""
    levels, names = topic_filter.split("/"), topic.split("/")
    for i, level in enumerate(levels):
        if level == "#":
            return True
        if i == len(names) or level not in ("+", names[i]):
            return False
    return len(levels) == len(names)


class Complaints(logging.Handler):
    """What was logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(f"{record.getMessage()} {record.exc_info}")


who = st.integers(0, 3)
qos = st.integers(0, 2)
pause = st.sampled_from(("none", "turns", "calm"))
subscriptions = st.lists(
    st.builds(Subscription, st.sampled_from(FILTERS), qos, st.booleans(), st.booleans(), st.integers(0, 2)),
    min_size=1,
    max_size=3,
    unique_by=lambda subscription: subscription.filter,
)


class Sessions(RuleBasedStateMachine):
    @initialize()
    def open(self) -> None:
        self.runner = asyncio.Runner()
        self.complaints = Complaints()
        logging.getLogger().addHandler(self.complaints)
        self.runner.get_loop().set_exception_handler(
            lambda _, context: self.complaints.records.append(str(context))
        )
        self.folder = Path(tempfile.mkdtemp())
        gateway.session.MAX_PACKET_ID = LAST_ID  # type: ignore[misc]
        self.world = self.runner.run(self.make_world())
        names = [*self.world.names, "backend", "other"]
        self.clients = [
            Client(self.world, name, n if n < len(self.world.names) else -1) for n, name in enumerate(names)
        ]
        self.payloads = 0
        self.run(self.begin())

    async def make_world(self) -> World:
        return await World(self.folder, settings=NodeSettings("node-1", window=WINDOW)).open(2, open=True)

    async def begin(self) -> None:
        """Everybody is there, and two want everything exactly once."""
        for number, client in enumerate(self.clients):
            client.connect(4 + number % 2, False, EXPIRY, WINDOW, None)
        await self.world.calm()
        for client in self.clients[1:3]:
            client.look()
            client.subscribe((Subscription("#", 2),))

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self.run(self.settle())
            self.run(self.end_all())
            assert self.complaints.records == []
        finally:
            self.runner.run(self.world.close())
            self.runner.close()
            gateway.session.MAX_PACKET_ID = 65_535  # type: ignore[misc]
            logging.getLogger().removeHandler(self.complaints)
            shutil.rmtree(self.folder)

    def run(self, story: Coroutine[Any, Any, None], pause: str = "calm") -> None:
        async def bounded() -> None:
            async with asyncio.timeout(60):
                await story
                if pause == "turns":
                    await self.world.turns(3)
                elif pause == "calm":
                    await self.world.calm()
                for client in self.clients:
                    client.look()

        self.runner.run(bounded())

    def payload(self, kind: str = "") -> bytes:
        self.payloads += 1
        return f"{self.payloads}{kind}".encode()

    def some(self, who: int) -> Client:
        """One that is connected, if there is one: most rules are about those."""
        usable = [client for client in self.clients if client.usable] or self.clients
        return usable[who % len(usable)]

    # The end

    async def settle(self) -> None:
        """Everybody takes what is theirs."""
        for client in self.clients:
            if client.usable and client.phone is not None and client.phone.connection.blocked:
                client.phone.drain()
        for _ in range(50):
            await self.world.calm()
            for client in self.clients:
                client.look()
                if client.phone is None and (client.expected or client.pushed):
                    client.connect(5, False, EXPIRY, WINDOW, None)
                while client.owed and client.usable:
                    client.acknowledge(0, refuse=False)
            busy = [client for client in self.clients if client.owed and client.usable]
            if not busy and not any(client.expected or client.pushed for client in self.clients):
                return
        missing = {client.name: (client.expected, client.pushed) for client in self.clients}
        raise AssertionError(f"never came: {missing}")

    async def end_all(self) -> None:
        """All sessions end and all retained messages are removed: nothing is left."""
        for client in self.clients:
            client.connect(4, True, 0, WINDOW, None)
            assert client.phone is not None
            await client.phone.until(lambda phone: phone.packets)
            client.look()
        for topic in TOPICS:
            self.clients[0].send(Publish(topic, b"", retain=True))
        for client in self.clients:
            client.may_close = True
            client.send(Disconnect())
        await self.world.calm()
        assert left_behind(self.world) == {}
        await self.world.node.journal.saved()
        items = await self.world.store.list_session_items(self.world.app.app_id)
        assert [(item.session, item.kind, item.item) for item in items] == []

    # Life

    @rule(
        who=who,
        version=st.sampled_from((4, 5)),
        clean=st.sampled_from((False, False, False, True)),
        expiry=st.sampled_from((EXPIRY, EXPIRY, 0)),
        window=st.sampled_from((1000, 2, 1)),
        will=st.none() | st.tuples(st.sampled_from(TOPICS), qos, st.booleans()),
        pause=pause,
    )
    def connects(
        self, who: int, version: int, clean: bool, expiry: int, window: int, will: Any, pause: str
    ) -> None:
        async def story() -> None:
            wish = None
            if will is not None:
                topic, level, retain = will
                wish = Will(topic, self.payload("retained" if retain else "will"), level, retain)
            self.clients[who].connect(version, clean, expiry, window, wish)

        self.run(story(), pause)

    @rule(
        who=who,
        how=st.sampled_from(("leave", "leave", "normal", "with will", "with its session")),
        pause=pause,
    )
    def goes(self, who: int, how: str, pause: str) -> None:
        async def story() -> None:
            client = self.some(who)
            if client.phone is None:
                return
            if how == "leave" or not client.ready:
                client.leave()
                return
            client.may_close = True
            if client.version == 4 or how == "normal":
                client.send(Disconnect())
            elif how == "with will":
                client.send(Disconnect(Reason.DISCONNECT_WITH_WILL_MESSAGE))
            else:
                client.expiry = 0
                client.send(Disconnect(properties={"session_expiry_interval": 0}))
            assert client.phone is None

        self.run(story(), pause)

    @rule(who=who, blocked=st.booleans())
    def stops_or_begins_to_read(self, who: int, blocked: bool) -> None:
        async def story() -> None:
            client = self.some(who)
            if client.usable and client.phone is not None and client.phone.connection.blocked is not blocked:
                if blocked:
                    client.phone.block()
                else:
                    client.phone.drain()

        self.run(story())

    @rule(crash=st.booleans(), moment=pause)
    def the_server_restarts(self, crash: bool, moment: str) -> None:
        async def story() -> None:
            if crash:
                await abandon(self.world)
            else:
                await self.world.node.drain(1.0)
                await self.world.node.close()
            for client in self.clients:
                client.outlive(crash=crash)
            self.world.wall += 1.0  # pushes of before are older than the new node
            self.world.node = self.world.new_node()
            start_node(self.world.node)

        self.run(asyncio.sleep(0), moment)
        self.run(story())

    # Subscriptions and messages

    @rule(who=who, wanted=subscriptions, pause=pause)
    def subscribes(self, who: int, wanted: list[Subscription], pause: str) -> None:
        async def story() -> None:
            client = self.some(who)
            allowed = [
                one if client.version == 5 else Subscription(one.filter, one.qos)
                for one in wanted
                if not (one.no_local and one.filter.startswith("$share"))
            ]
            if client.usable and allowed:
                client.subscribe(tuple(allowed))

        self.run(story(), pause)

    @rule(who=who, filters=st.lists(st.sampled_from(FILTERS), min_size=1, max_size=2), pause=pause)
    def unsubscribes(self, who: int, filters: list[str], pause: str) -> None:
        async def story() -> None:
            client = self.some(who)
            if client.usable:
                client.unsubscribe(tuple(filters))

        self.run(story(), pause)

    @rule(
        who=who,
        topic=st.sampled_from(TOPICS),
        qos=st.sampled_from((2, 2, 1, 0)),
        retain=st.sampled_from((False, False, True)),
        count=st.sampled_from((1, 1, 3, 5)),
        pause=pause,
    )
    def publishes(self, who: int, topic: str, qos: int, retain: bool, count: int, pause: str) -> None:
        async def story() -> None:
            client = self.some(who)
            for _ in range(count):
                if client.usable:
                    packet_id = client.new_id() if qos else 0
                    payload = self.payload("retained" if retain else "")
                    client.publish(Publish(topic, payload, qos, retain, packet_id=packet_id), self.clients)

        self.run(story(), pause)

    @rule(who=who, which=st.integers(0, 9), pause=pause)
    def repeats_a_message(self, who: int, which: int, pause: str) -> None:
        async def story() -> None:
            client = self.some(who)
            open_ids = [
                n for n, sent in client.outgoing.items() if not sent.released and sent.packet.qos == 2
            ]
            if client.usable and open_ids:
                sent = client.outgoing[open_ids[which % len(open_ids)]].packet
                client.send(Publish(sent.topic, sent.payload, sent.qos, sent.retain, True, sent.packet_id))

        self.run(story(), pause)

    @rule(who=who, which=st.integers(0, 9), pause=pause)
    def releases_a_message(self, who: int, which: int, pause: str) -> None:
        async def story() -> None:
            client = self.some(who)
            received = [n for n, sent in client.outgoing.items() if sent.received]
            if client.usable and received:
                packet_id = received[which % len(received)]
                client.outgoing[packet_id] = client.outgoing[packet_id]._replace(released=True)
                client.send(Pubrel(packet_id))

        self.run(story(), pause)

    @rule(devnos=st.lists(st.integers(0, 1), min_size=1, max_size=2, unique=True), pause=pause)
    def a_push_comes(self, devnos: list[int], pause: str) -> None:
        async def story() -> None:
            msg_id = await self.world.append(*devnos)
            for devno in devnos:
                self.clients[devno].pushed.add(msg_id)
            self.world.ring(msg_id, *devnos)

        self.run(story(), pause)

    @rule(who=who, which=st.integers(0, 40), count=st.integers(1, 4), refuse=st.booleans(), pause=pause)
    def acknowledges(self, who: int, which: int, count: int, refuse: bool, pause: str) -> None:
        async def story() -> None:
            client = self.some(who)
            for _ in range(count):
                if client.usable:
                    client.acknowledge(which, refuse)

        self.run(story(), pause)

    # What it should not do

    @rule(
        who=who, which=st.integers(0, 40), kind=st.sampled_from(("unasked", "wrong", "garbage")), pause=pause
    )
    def behaves_badly(self, who: int, which: int, kind: str, pause: str) -> None:
        async def story() -> None:
            client = self.some(who)
            if not client.usable:
                return
            match kind:
                case "unasked":
                    packets = [packet(UNKNOWN_ID) for packet in (Puback, Pubrec, Pubrel, Pubcomp)]
                    client.send(packets[which % 4], Pingreq())
                case "wrong":
                    self.answer_wrongly(client, which)
                case _:
                    self.send_garbage(client, which)

        self.run(story(), pause)

    def answer_wrongly(self, client: Client, which: int) -> None:
        """PUBACK for QoS 2, PUBREC or PUBCOMP for QoS 1, and off it goes. What was meant may be gone."""
        ids = [n for n in client.incoming if n in client.sent_here]
        if not ids:
            return
        packet_id = ids[which % len(ids)]
        item = client.incoming[packet_id]
        client.may_close = True
        client.send(Puback(packet_id) if item.qos == 2 else (Pubrec, Pubcomp)[which % 2](packet_id))
        if client.phone is not None:
            client.leave()
        client.new_session()
        client.may_exist = client.may_exist and None

    def send_garbage(self, client: Client, which: int) -> None:
        assert client.phone is not None
        client.may_close = True
        if which % 2:
            client.phone.connection.data_received(NOTHING[which % len(NOTHING)])
            client.leave()
        else:
            client.phone.connection.data_received(GARBAGE[which // 2 % len(GARBAGE)])
            client.look()
            assert client.phone is None, "it was let through"


def left_behind(world: World) -> dict[str, object]:
    """Everything that grows with clients, and is not empty."""
    node, hub = world.node, world.hub
    kept: dict[str, Any] = {
        "live": node.live,
        "opening": len(node.arrivals.opening),
        "blocked": node.blocked,
        "mailboxes": hub.mailboxes,
        "members": hub.members,
        "others": hub.others,
        "online": list(hub.online),
        "resend": hub.resend,
        "wills": hub.wills,
        "retained": hub.retained.count,
        "subscriptions": hub.subscriptions.count,
    }
    return {name: value for name, value in kept.items() if value}


TestSessions = Sessions.TestCase
TestSessions.settings = settings(
    max_examples=settings().max_examples // 2
    if settings().max_examples <= 100
    else settings().max_examples // 10,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
