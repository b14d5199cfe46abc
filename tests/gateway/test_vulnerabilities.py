"""The ways in which MQTT brokers have been broken, one after the other, tried on ours. A number names an advisory
that a test follows; what happened to others is said beside it."""

from __future__ import annotations

import contextlib
import gc
import re
import socket
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final

import orjson
import pytest

import gateway.admission
from broker.store import StoreError
from broker.tenants.access import Access, parse_rules
from clients.local_server import LocalServer
from gateway.connection import MAX_CONNECT_SIZE, MAX_UNREAD, Connection, Phase
from gateway.doorkeeper import TurnedAway
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
    Unsubscribe,
    Will,
    encode,
)
from gateway.node import NodeSettings
from gateway.websocket import MAX_HANDSHAKE_SIZE, WebSocketFactory
from tests.conftest import StartServer
from tests.gateway.peer import (
    Closed,
    Peer,
    acknowledged_within,
    call,
    connect_packet,
    counted,
    device,
    eventually,
    publisher,
    register,
    sooner_or_later,
    works,
)
from tests.gateway.world import FakeTransport, Phone, World, start_node

ALMOST: Final = b"\x10\xe8\xfb\x03"  # a CONNECT of 65,000 bytes begins
DEEP: Final = "/" * 60_000
ALLOWED_NOISE: Final = 30_000  # bytes that may stay after hundreds of connections: caches, tables that grew


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = await World(tmp_path).open(devices=3, open=True)
    yield world
    await world.close()


class Stranger:
    """A connection that has not said who it is."""

    def __init__(self, world: World) -> None:
        self.written: list[bytes] = []
        self.connection = Connection(world.node, "tcp")
        self.transport = FakeTransport(self.written.append)
        self.connection.connection_made(self.transport)

    def send(self, raw: bytes) -> None:
        self.connection.data_received(raw)

    @property
    def closed(self) -> bool:
        return self.connection.phase is Phase.CLOSED

    @property
    def holds(self) -> int:
        """Bytes of it that the server keeps."""
        return sys.getsizeof(self.connection.partial) if self.connection.partial else 0


def backend(world: World, name: str = "backend", **options: Any) -> Phone:
    """A publisher's CONNECT, sent."""
    connect = Connect(name, username=world.app.key, password=world.app.master_secret.encode(), **options)
    return Phone(world.node, connect)


async def connected(world: World, name: str = "backend", **options: Any) -> Phone:
    phone = backend(world, name, **options)
    await phone.until(lambda phone: phone.packets)
    assert phone.connack.reason == 0
    await world.calm()
    return phone


async def asked(world: World, phone: Phone, *packets: Packet) -> list[Packet]:
    """What comes of these."""
    before = len(phone.packets)
    phone.send(*packets)
    await world.calm()
    return phone.packets[before:]


def payloads(packets: list[Packet]) -> list[bytes]:
    return [packet.payload for packet in packets if isinstance(packet, Publish)]


def lines(story: Callable[[], object]) -> int:
    """How many lines of our code run: the same on every machine."""
    count, ours = 0, str(Path(gateway.admission.__file__).parent)
    before = sys.gettrace()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(ours):
            return None
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        story()
    finally:
        sys.settrace(before)
    return count


async def growth(story: Callable[[], Any], world: World) -> int:
    """Bytes that the second half of many repetitions leaves behind; the first half fills tables and caches."""

    async def rest() -> None:
        await world.calm()
        world.node._wheel._buckets.clear()  # closed connections stay on it for seconds
        gc.collect()

    for _ in range(200):
        await story()
    await rest()
    tracemalloc.start()
    try:
        start = tracemalloc.get_traced_memory()[0]
        for _ in range(200):
            await story()
        await rest()
        return tracemalloc.get_traced_memory()[0] - start
    finally:
        tracemalloc.stop()


# Memory before authentication


@pytest.mark.parametrize(
    "begin",
    [
        b"\x10\xff\xff\xff\x7f",  # CONNECT of 256 MB
        b"\x10\x81\x80\x04",  # of 65,537 bytes
        b"\x30\xff\xff\xff\x7f",  # PUBLISH
        b"\x30\xff\x7f",  # of a size that would be allowed, but not now
        b"\x82\x80\x80\x01",
        b"\xe0\xff\xff\xff\x7f",
        b"\x00\xff\xff\xff\x7f",
    ],
)
async def test_a_long_packet_is_refused_by_its_first_bytes(world: World, begin: bytes) -> None:
    """CVE-2023-0809 (mosquitto), CVE-2021-33175 (EMQX), CVE-2021-33176 (VerneMQ), CVE-2019-0222 (ActiveMQ): memory
    for what a stranger announces, whatever packet it is."""
    stranger = Stranger(world)
    stranger.send(begin)
    assert stranger.closed
    assert stranger.holds == 0
    stranger.send(bytes(100_000))  # what was on its way already
    assert stranger.holds == 0


async def test_half_a_connect_holds_what_came_and_no_more(world: World) -> None:
    """CVE-2017-7651 (mosquitto): a CONNECT that never ends, many times."""
    stranger = Stranger(world)
    stranger.send(ALMOST)
    assert stranger.holds < 100
    for _ in range(64):
        stranger.send(bytes(1000))
    assert stranger.holds < 1.2 * MAX_CONNECT_SIZE
    assert not stranger.closed
    assert world.node.settings.max_connecting * MAX_CONNECT_SIZE < 1 << 30  # all strangers together


def test_many_half_connects_cost_a_server_what_they_sent(start_server: StartServer) -> None:
    server = start_server("--mqtt-max-connecting", "300", "--mqtt-connect-timeout", "600")
    before = server.metrics()["process_resident_memory_bytes"]
    assert server.addresses.ws is not None
    with (
        counted(server, 'refusals_total{reason="too many connections"}', by=100),
        contextlib.ExitStack() as all_of,
    ):
        peers = []
        for number in range(400):
            address = server.addresses.ws if number % 2 else server.addresses.mqtt
            peers.append(all_of.enter_context(Peer(address)))
            with contextlib.suppress(ConnectionError):
                peers[-1].send(b"GET /mqtt?" + b"x" * 8000 if number % 2 else ALMOST + bytes(60_000))
        grown = server.metrics()["process_resident_memory_bytes"] - before
        assert grown < 400 * 65_536 * 1.5
    eventually(lambda: server.metrics()["holdfast_connections_opening"] == 0)
    works(server)


async def test_a_websocket_holds_one_handshake_and_one_small_frame_before_connack() -> None:
    refused: list[str] = []
    wires: list[bytes] = []

    def open_websocket() -> Any:
        inner = _Deaf()
        made = WebSocketFactory(lambda: inner, 1 << 28, refused.append)()
        made.connection_made(FakeTransport(wires.append))
        return made

    websocket = open_websocket()
    for _ in range(100):
        websocket.data_received(b"x" * 100)
    assert websocket._unfinished is None  # it gave up at MAX_HANDSHAKE_SIZE
    assert refused == ["websocket handshake too large"]
    websocket = open_websocket()
    websocket.data_received(b"x" * MAX_HANDSHAKE_SIZE)
    assert sys.getsizeof(websocket._unfinished) < 2 * MAX_HANDSHAKE_SIZE


class _Deaf:
    def connection_made(self, transport: object) -> None:
        pass


# Work before authentication


async def test_a_connect_full_of_properties_costs_by_its_length(world: World) -> None:
    """CVE-2021-41039 (mosquitto): thousands of user properties, each compared with all others."""

    def connects(count: int) -> int:
        properties: Properties = {"user_properties": (("a", "b"),) * count}
        raw = encode(Connect("x", username="nobody", password=b"x", version=5, properties=properties), 5)
        stranger = Stranger(world)
        return lines(lambda: stranger.send(raw))

    few, many = connects(90), connects(9000)
    await world.calm()
    assert many < 110 * few


async def test_a_subscribe_with_thousands_of_filters_costs_by_its_length(world: World) -> None:
    phone = await connected(world)

    def subscribes(count: int) -> int:
        packet = Subscribe(1, tuple(Subscription(f"f/{n}") for n in range(count)))
        return lines(lambda: phone.send(packet))

    few, many = subscribes(200), subscribes(20_000)
    assert many < 110 * few
    assert world.hub.subscriptions.count == world.node.settings.mailbox.subscriptions


# Leaks


ODD_CONNECTS: Final[dict[str, dict[str, Any]]] = {
    "unknown app": {"username": "nobody"},
    "wrong password": {"password": b"wrong"},
    "no password": {"password": None},
    "a will": {"will": Will("a", b"x" * 5000, 1, True), "password": b"wrong"},
    "a will with properties": {
        "will": Will(
            "a", b"x" * 5000, 1, properties={"will_delay_interval": 9, "user_properties": (("a", "b"),)}
        ),
        "password": b"wrong",
    },
    "a will where none is allowed": {"will": Will("push", b"x" * 5000)},
    "a method": {"properties": {"authentication_method": "X", "authentication_data": b"x" * 5000}},
    "a login that goes no further": {
        "properties": {"authentication_method": "SCRAM-SHA-256", "authentication_data": b"n,,n=x,r=abc"}
    },
    "welcome": {"will": Will("a", b"x" * 5000, 1, properties={"will_delay_interval": 9})},
}


@pytest.mark.parametrize("label", ODD_CONNECTS)
async def test_odd_connects_leave_nothing(world: World, label: str) -> None:
    """CVE-2017-7654, CVE-2021-34431, CVE-2023-3592, CVE-2024-8376 (mosquitto): memory that a CONNECT left behind."""
    count = 0

    async def story() -> None:
        nonlocal count
        count += 1
        values = {"username": world.app.key, "password": world.app.master_secret.encode()} | ODD_CONNECTS[
            label
        ]
        phone = Phone(world.node, Connect(f"odd-{count}", version=5, **values))
        await world.turns(4)
        if not phone.closed:
            phone.leave()

    assert await growth(story, world) < ALLOWED_NOISE
    assert world.node.arrivals.opening == set()
    assert all(not hub.wills for hub in world.node.hubs)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x10\x1a\x00\x04MQTT\x05\x04\x00\x00\x00\x00\x01x\x02\x26\x00\x00\x01a\x00\x03abc\x00\x00",
        b"\x10\x16\x00\x04MQTT\x05\x04\x00\x00\x00\x00\x01x\x02\x23\x05\x00\x01a\x00\x01b",  # topic alias in a will
        b"\x10\x12\x00\x04MQTT\x05\x02\x00\x00\x05\x11\x00\x00\x00\x01\x00\x01",
        b"\x10\x0d\x00\x04MQTT\x05\xff\x00\x00\x00\x00\x00",
        b"\x10\x0f\x00\x04MQTT\x04\x42\x00\x00\x00\x01x\x00",  # a password without a name
    ],
)
async def test_broken_connects_leave_nothing(world: World, raw: bytes) -> None:
    async def story() -> None:
        stranger = Stranger(world)
        stranger.send(raw)
        if not stranger.closed:
            stranger.connection.connection_lost(None)

    assert await growth(story, world) < ALLOWED_NOISE


@pytest.mark.parametrize("expiry", [0, 600])
async def test_odd_subscribes_leave_nothing(world: World, expiry: int) -> None:
    """CVE-2024-8376 (mosquitto): SUBSCRIBE and UNSUBSCRIBE in odd orders."""
    names = ("a", "a/+", "$share/g/a", "$share/g/a/#", "a")
    both = tuple(Subscription(name, 1) for name in names)
    number = 0

    async def story() -> None:
        nonlocal number
        number += 1
        properties: Properties = {"session_expiry_interval": expiry}
        phone = await connected(world, f"odd-{number}", version=5, properties=properties)
        phone.send(Unsubscribe(1, names), Subscribe(2, both), Subscribe(3, both), Unsubscribe(4, names * 2))
        phone.send(Subscribe(5, both), Publish("a", b"x", 2, packet_id=9))
        await world.calm()
        if number % 2:
            phone.leave()
            phone = await connected(world, f"odd-{number}", version=5)  # clean start, and it ends
        phone.send(Disconnect(properties={"session_expiry_interval": 0}))
        await world.calm()

    for _ in range(5):
        await story()
    assert world.hub.subscriptions.count == 0
    assert not world.hub.mailboxes
    assert not world.hub.others
    await world.node.journal.saved()
    assert list(await world.store.list_session_items(world.app.app_id)) == []


async def test_two_copies_of_one_message_survive_a_restart_and_then_leave_nothing(world: World) -> None:
    speaker = await connected(world)
    await asked(world, speaker, Publish("a", b"x", 2, True, packet_id=1))
    properties: Properties = {"session_expiry_interval": 600}
    phone = await connected(world, "twice", version=5, properties=properties)
    both = (Subscription("a/#", 1), Subscription("#", 2))
    first = await asked(world, phone, Subscribe(1, both))
    sent = {packet.packet_id: packet.qos for packet in first if isinstance(packet, Publish)}
    assert sorted(sent.values()) == [1, 2]
    await world.node.drain(1.0)
    await world.node.close()
    world.node = world.new_node()
    start_node(world.node)
    phone = await connected(world, "twice", clean_start=False, version=5, properties=properties)
    await world.calm()
    again = {packet.packet_id: packet.qos for packet in phone.packets if isinstance(packet, Publish)}
    assert again == sent
    phone.send(Disconnect(properties={"session_expiry_interval": 0}))
    await world.calm()
    await world.node.journal.saved()
    assert list(await world.store.list_session_items(world.app.app_id)) == []


# QoS 2 state


async def test_qos_2_ids_that_are_never_released_are_bounded(world: World) -> None:
    """CVE-2023-28366 (mosquitto): QoS 2 messages, and no PUBREL ever."""
    phone = await connected(world, version=5)
    for packet_id in range(1, 400):
        if not phone.closed:
            phone.send(Publish("a", b"x", 2, packet_id=packet_id))
    await world.calm()
    assert phone.closed
    assert phone.goodbye.reason is Reason.RECEIVE_MAXIMUM_EXCEEDED

    old, listener = await connected(world, "old", version=4), await connected(world, "listener")
    await asked(world, listener, Subscribe(1, (Subscription("b"),)))
    for packet_id in [*range(1, 3000)] * 2:
        old.send(Publish("b", b"x", 2, dup=True, packet_id=packet_id))
    await world.calm()
    assert len(payloads(listener.packets)) == 2999  # 3.1.1 has no such limit; each id counts once
    received = old.session.own_mailbox().received
    assert received is not None
    assert len(received.serialize()) < 10_000  # as it would be for all 65,535


async def test_the_same_qos_2_id_again_and_again_is_one_message_and_no_memory(world: World) -> None:
    phone = await connected(world)
    listener = await connected(world, "listener")
    await asked(world, listener, Subscribe(1, (Subscription("a", 2),)))

    async def story() -> None:
        phone.send(Publish("a", b"x" * 1000, 2, dup=True, packet_id=1))

    assert await growth(story, world) < ALLOWED_NOISE + 200 * 200  # what the phone keeps: PUBREC
    assert payloads(listener.packets) == [b"x" * 1000]


async def test_a_subscriber_that_never_completes_qos_2_costs_its_queue(world: World) -> None:
    listener = await connected(world, "listener")
    await asked(world, listener, Subscribe(1, (Subscription("a", 2),)))
    speaker = await connected(world)
    for number in range(1, 2001):
        speaker.send(Publish("a", b"x", 2, packet_id=number % 200 + 1), Pubrel(number % 200 + 1))
        if number % 200 == 0:
            await world.calm()
    sent = [packet for packet in listener.packets if isinstance(packet, Publish)]
    assert len(sent) == world.node.settings.window
    for packet in sent[:10]:
        listener.send(Pubrec(packet.packet_id))  # and no PUBCOMP
    await world.calm()
    assert len(payloads(listener.packets)) == world.node.settings.window
    mailbox = listener.session.own_mailbox()
    assert len(mailbox.queue) == world.node.settings.mailbox.queued_messages
    assert mailbox.dropped == 2000 - len(mailbox.queue) - world.node.settings.window


# Answers that nobody reads


async def test_pings_are_not_answered_while_too_much_is_unread(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    phone = await world.online(0)
    phone.block()
    monkeypatch.setattr(phone.transport, "get_write_buffer_size", lambda: MAX_UNREAD + 1)
    phone.send(Pingreq())
    assert not phone.transport.reading
    assert not any(isinstance(packet, Pingresp) for packet in phone.packets)
    phone.drain()
    assert phone.transport.reading
    assert phone.packets[-1] == Pingresp()


# Topics and patterns


@pytest.mark.parametrize("version", [4, 5])
async def test_sixty_thousand_slashes_cost_nothing(world: World, version: int) -> None:
    """CVE-2019-11779 (mosquitto): the stack ran over. Here each level would be a node of an index."""
    phone = await connected(world, version=version)
    refused = Reason.TOPIC_FILTER_INVALID if version == 5 else Reason.UNSPECIFIED_ERROR
    for topic_filter in (DEEP, "+" + "/+" * 30_000, DEEP + "/#", "$share/g/" + DEEP, "a" * 60_000):
        before = len(phone.packets)
        work = lines(lambda: phone.send(Subscribe(1, (Subscription(topic_filter, 1),))))  # noqa: B023
        await world.calm()
        [suback] = phone.packets[before:]
        assert isinstance(suback, Suback)
        assert suback.reasons == (refused,)
        assert work < 500 + 3 * topic_filter.count("/")  # whether its wildcards are in their places
    for topic in (DEEP, "a" * 60_000):
        for retain in (False, True):
            work = lines(lambda: phone.send(Publish(topic, b"x", 1, retain, packet_id=1)))  # noqa: B023
            assert work < 1000
        await world.calm()
    assert lines(lambda: phone.send(Unsubscribe(1, (DEEP,)))) < 1000
    assert world.hub.subscriptions.count == world.hub.retained.count == 0
    assert not phone.closed


async def test_a_will_on_a_deep_topic_is_refused(world: World) -> None:
    phone = backend(world, will=Will(DEEP, b"x", 1, True))
    await phone.until(lambda phone: phone.packets)
    assert phone.connack.reason >= 0x80


async def test_wildcards_that_do_not_match_cost_a_visit_of_their_common_levels(world: World) -> None:
    """`+/+/…/x` in many depths, `a/+/…`, `+/a/…`: the number of ways through them must not multiply."""
    listener = await connected(world, "listener")
    depth = 60
    filters = [
        *("/".join(["+"] * n + ["x"]) for n in range(1, depth)),
        *("/".join(["a"] * n + ["+"] * (depth - n - 1) + ["x"]) for n in range(1, 40)),
    ]
    speaker = await connected(world)
    message = Publish("/".join(["a"] * depth), b"x")
    alone = lines(lambda: speaker.send(message))
    await asked(world, listener, Subscribe(1, tuple(map(Subscription, filters))))
    assert len(listener.session.own_mailbox().subscriptions) == len(filters)
    levels = len({topic.rsplit("/", n)[0] for topic in filters for n in range(topic.count("/") + 1)})
    assert lines(lambda: speaker.send(message)) < alone + 20 * levels
    assert payloads(listener.packets) == []


async def test_overlapping_filters_get_one_copy_and_cost_one_visit_each(world: World) -> None:
    listener = await connected(world, "listener", version=4)
    ways = ["/".join(("a", "+")[n >> bit & 1] for bit in range(6)) for n in range(64)]
    await asked(world, listener, Subscribe(1, tuple(map(Subscription, (*ways, "#", "a/#", "+/#")))))
    speaker = await connected(world)
    work = lines(lambda: speaker.send(Publish("a/a/a/a/a/a", b"x")))
    assert work < 30 * (2 * 64 + 3) + 500
    assert payloads(listener.packets) == [b"x"]


async def test_many_filters_over_many_retained_messages_hold_up_nobody(world: World) -> None:
    """Each SUBSCRIBE asks for all of them, a hundred times over."""
    speaker = await connected(world)
    for n in range(1000):
        speaker.send(Publish(f"a/{n}", b"x" * 100, retain=True))
    await world.calm()
    listener = await connected(world, "listener")
    listener.block()  # it does not read
    filters = ["/".join(part) for part in (("#",), ("+", "#"), ("a", "#"), ("+", "+"), ("a", "+"))]
    both = [*filters, *(f"+/+/{'+/' * n}#" for n in range(90))]
    work = lines(lambda: listener.send(Subscribe(1, tuple(Subscription(one, 1) for one in both))))
    await world.calm()
    assert len(listener.session.own_mailbox().queue) <= world.node.settings.mailbox.queued_messages
    assert work < 100_000  # in one turn of the event loop, of which a thousand lines take some 0.1 ms


# Names


SPECIAL: Final = (
    "__proto__", "constructor", "..", "../../etc/passwd", "/", "//", "a//b", " ", "%00", "%2e%2e", "\u202e", "\ufeff",
    "$", "$x", "$CONTROL/x", "None", "*", ";drop table", "'", '"', "\\", "\x01", "\x7f", "e\u0301", "\u00e9", "K",
    "\u212a", "ａ", "\U0001f4a9", "d/device-0", "p/backend", "a" * 4000,
)  # fmt: skip


async def test_special_topics_are_topics_like_any_other(world: World) -> None:
    """CVE-2018-12543 (mosquitto): a topic with `$` ended the process. Look-alikes are not the same topic, nothing is
    normalised, decoded, or taken for a path."""
    listeners = {}
    for number, topic in enumerate(SPECIAL):
        listener = await connected(world, f"listener-{number}")
        [suback] = await asked(world, listener, Subscribe(1, (Subscription(topic, 1),)))
        assert isinstance(suback, Suback)
        assert suback.reasons == (1,), topic
        listeners[topic] = listener
    speaker = await connected(world)
    for topic in SPECIAL:
        await asked(world, speaker, Publish(topic, topic.encode(), 1, True, packet_id=1))
    for topic, listener in listeners.items():
        assert payloads(listener.packets) == [topic.encode()]
    rows = await world.store.list_retained(world.app.app_id)
    assert {row.topic: row.payload for row in rows} == {topic: topic.encode() for topic in SPECIAL}


async def test_special_client_ids_are_ids_like_any_other(world: World) -> None:
    """A session under one name is never another's; HiveMQ's CVE-2020-13821 put one into a page unescaped."""
    phones = []
    for name in SPECIAL[:-1]:
        properties: Properties = {"session_expiry_interval": 600}
        phone = await connected(world, name, clean_start=True, version=5, properties=properties)
        await asked(world, phone, Subscribe(1, (Subscription(f"to/{len(phones)}", 1),)))
        phones.append(phone)
    speaker = await connected(world, "speaker")
    for phone in phones:
        phone.leave()
    for number in range(len(phones)):
        await asked(world, speaker, Publish(f"to/{number}", b"%d" % number, 1, packet_id=1))
    for number, name in enumerate(SPECIAL[:-1]):
        phone = await connected(world, name, clean_start=False, version=5)
        await world.calm()
        assert phone.connack.session_present
        assert payloads(phone.packets) == [b"%d" % number]


@pytest.mark.parametrize("topic", ["$SYS/x", "$SYS"])
async def test_nobody_publishes_to_sys(world: World, topic: str) -> None:
    for name, password in (("x", world.app.device_key), ("backend", world.app.master_secret)):
        phone = Phone(world.node, Connect(name, username=world.app.key, password=password.encode()))
        await phone.until(lambda phone: phone.packets)
        await world.calm()
        answers = await asked(world, phone, Publish(topic, b"forged", 1, True, packet_id=1))
        assert [packet.reason >= 0x80 for packet in answers if isinstance(packet, Puback)] == [True]
    assert world.hub.retained.count == 0


# Access rules


@pytest.mark.parametrize(
    "name", ["+", "#", "a/b", "/", "device-0/x", "+/x", "../device-0", "", "$SYS", "{registration_id}"]
)
def test_a_client_id_widens_no_rule(name: str) -> None:
    """CVE-2017-7650 (mosquitto): a client called `#` could read what belonged to each client alone."""
    rules = parse_rules([{"allow": "all", "topic": "own/{registration_id}/#", "who": "devices"}])
    access = Access(_App(rules))
    for wanted in (
        "own/device-0/x",
        "own/device-0/#",
        "own/#",
        "own/+/x",
        "own/+/#",
        "#",
        "+/+/#",
        "$SYS/#",
        "own/a/x",
    ):
        if "own/" + name + "/" not in wanted or not name:
            assert not access.may_subscribe("device", name, wanted)
    for topic in ("own/device-0/x", "own/a/x", "own/a/b", "$SYS/x"):
        assert not access.may_publish("device", name, topic)


class _App:
    """As much of an app as rules need."""

    open = False

    def __init__(self, rules: Any) -> None:
        self.access = tuple(rules)


async def test_a_device_called_like_a_wildcard_gets_its_own_and_nothing_more(world: World) -> None:
    rules = [
        {"allow": "all", "topic": "own/{registration_id}/#", "who": "devices"},
        {"deny": "all", "topic": "#", "who": "devices"},
    ]
    await world.apps.set_access(world.app.key, parse_rules(rules))
    await world.calm()
    for name in ("+", "#", "a/b"):
        connect = Connect(name, username=world.app.key, password=world.app.device_key.encode())
        phone = Phone(world.node, connect)
        await phone.until(lambda phone: phone.packets)
        await world.calm()
        assert phone.connack.reason == 0
        wanted = ("own/device-0/#", "own/+/#", "own/#", "own/a/b/#")
        [suback] = await asked(world, phone, Subscribe(1, tuple(map(Subscription, wanted))))
        assert isinstance(suback, Suback)
        assert set(suback.reasons) == {Reason.NOT_AUTHORIZED}


async def test_rules_taken_back_reach_absent_sessions_wills_and_retained_messages(world: World) -> None:
    """CVE-2018-12546, CVE-2021-34434 (mosquitto): what had been allowed once stayed."""
    absent = await world.online(0)
    await asked(world, absent, Subscribe(1, (Subscription("news", 1),)))
    absent.leave()
    speaker = await world.online(1, will=Will("news", b"will", 1))
    answers = await asked(world, speaker, Publish("news", b"queued", 1, True, packet_id=1))
    assert any(isinstance(packet, Puback) for packet in answers)
    await world.apps.set_access(world.app.key, parse_rules([{"deny": "all", "topic": "#", "who": "devices"}]))
    await world.calm()
    speaker.leave()  # its will goes off
    await world.calm()
    assert payloads((await world.online(0)).packets) == []
    reader = await connected(world, "reader")  # a publisher may read everything
    assert payloads(await asked(world, reader, Subscribe(1, (Subscription("#", 1),)))) == []


def test_credentials_taken_back_end_connections(server: LocalServer) -> None:
    app = server.create_app("taken back")
    token = register(server, app, "phone")
    with device(server, "phone", app=app, password=token) as peer:
        status, _ = call(server, app, "DELETE", "/v1/devices/phone/token")
        assert status == 200
        [goodbye] = peer.rest()
        assert isinstance(goodbye, Disconnect)
        assert goodbye.reason is Reason.NOT_AUTHORIZED
    with Peer(server.addresses.mqtt) as peer:
        assert peer.connect(connect_packet(app, "phone", password=token)).reason >= 0x80


# When authentication breaks


class Broken(Exception):
    """Something nobody thought of."""


@pytest.mark.parametrize("where", ["admit", "may_publish", "verify", "find", "store"])
async def test_nobody_is_let_in_when_a_check_fails(
    world: World, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """CVE-2018-12550, CVE-2018-12551 (mosquitto): rules or passwords that could not be read let everybody in."""

    def breaks(*_: object, **__: object) -> Any:
        raise StoreError("away") if where == "store" else Broken

    async def breaks_later(*_: object, **__: object) -> Any:
        breaks()

    loaded = where in ("admit", "verify", "may_publish")
    if loaded:
        await connected(world, "first")  # the app is there; what follows is decided in the same turn
    match where:
        case "admit":
            monkeypatch.setattr("gateway.arrivals.admit", breaks)
        case "may_publish":
            monkeypatch.setattr(Access, "may_publish", breaks)
        case "verify":
            monkeypatch.setattr("broker.tenants.tokens.verify", breaks)
        case _:
            monkeypatch.setattr(world.apps, "find", breaks_later)
    phone: Phone | None = None
    with contextlib.suppress(Broken):  # the event loop closes a connection whose protocol raises
        connect = Connect(
            "device-0", username=world.app.key, password=b"wrong", version=5, will=Will("a", b"x", 1)
        )
        phone = Phone(world.node, connect)
    await world.calm()
    assert phone is None or not any(
        isinstance(packet, Connack) and packet.reason == 0 for packet in phone.packets
    )
    assert world.node.live == int(loaded)


async def test_a_check_that_fails_while_live_allows_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    phone, listener = await world.online(0), await connected(world, "listener")
    await asked(world, listener, Subscribe(1, (Subscription("#", 1),)))

    def breaks(*_: object) -> Any:
        raise Broken

    monkeypatch.setattr(Access, "may_publish", breaks)
    monkeypatch.setattr(Access, "may_subscribe", breaks)
    for packet in (Publish("a", b"x", 1, True, packet_id=1), Subscribe(1, (Subscription("a", 1),))):
        with pytest.raises(Broken):
            phone.send(packet)
    await world.calm()
    assert payloads(listener.packets) == []
    assert world.hub.subscriptions.count == 1
    assert world.hub.retained.count == 0


# Logs


FORGED: Final = (
    "x\n2026-01-31T12:00:00.000Z INFO gateway.node device connected app=forged",
    'x"}\n{"time": "2026-01-31T12:00:00.000Z", "level": "info", "event": "forged"}',
    "x\r\nforged", "x\u2028forged", "x\u0085forged", "x\x1b[2Jforged", "x\x1b]0;forged\x07", "x\u202eforged",
    'x" forged="1', "x" * 60_000,
)  # fmt: skip


@pytest.mark.parametrize("form", ["text", "json"])
def test_names_forge_no_log_line(start_server: StartServer, form: str) -> None:
    server = start_server("--server-log-format", form)
    works(server)  # what it says at its start is said
    before = len(server.log_text())
    for name in FORGED:
        for connect in (
            Connect(name[:60], username=name, password=b"x", version=5),
            connect_packet(server.app, name[:64]),
            connect_packet(server.app, name, password=server.app.master_secret),
            connect_packet(server.app, "x", will=Will(name, name.encode(), 1)),
        ):
            with Peer(server.addresses.mqtt) as peer:
                peer.send(connect)
                try:
                    answer = peer.expect(Connack)
                except Closed:  # a CONNECT over 65,536 bytes
                    continue
                if answer.reason == 0:
                    peer.send(
                        Publish(name, b"", 1, packet_id=1), Publish("event/" + name, b"", 1, packet_id=2)
                    )
                    peer.send(b"\x00\x00")
                    peer.rest()
    eventually(lambda: server.log_text().count("disconnected") >= len(FORGED))
    written = server.log_text()[before:]
    assert "\x1b" not in written
    assert "\u2028" not in written
    for line in written.splitlines():
        assert len(line) < 3000
        if form == "json":
            told = orjson.loads(line)
            assert told["event"] != "forged"
            assert set(told) >= {"time", "level", "logger", "event"}
        else:
            assert re.match(r"\S+Z (INFO|WARNING) (gateway|broker)\.\S+ [a-z ]+", line), line
            assert "app=forged" not in re.sub(r'"(?:[^"\\]|\\.)*"', '""', line)
            assert ' forged="1' not in re.sub(r'"(?:[^"\\]|\\.)*"', '""', line)
    works(server)


# Proxies


@pytest.mark.parametrize(
    "header",
    [
        b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n",
        b"PROXY UNKNOWN\r\n",
        b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + bytes(12),  # version 2
        b"X-Forwarded-For: 127.0.0.1\r\n\r\n",
    ],
)
def test_a_proxy_header_from_a_stranger_is_no_connect(server: LocalServer, header: bytes) -> None:
    with counted(server, 'refusals_total{reason="bad CONNECT"}'), Peer(server.addresses.mqtt) as peer:
        peer.send(header, encode(connect_packet(server.app, "proxied"), 5))
        assert peer.rest_of_bytes() == b""
    works(server)


def upgrade(server: LocalServer, **fields: str) -> bytes:
    lines = [
        "GET /mqtt HTTP/1.1", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Protocol: mqtt",
    ]  # fmt: skip
    lines += [
        f"{name.replace('_', '-')}: {value}" for name, value in ({"Host": "localhost"} | fields).items()
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def test_an_address_in_a_header_is_not_believed(start_server: StartServer) -> None:
    server = start_server("--mqtt-max-connections-per-address", "2")
    assert server.addresses.ws is not None
    with (
        counted(server, f'refusals_total{{reason="{TurnedAway.ADDRESS}"}}', by=3),
        contextlib.ExitStack() as all_of,
    ):
        peers = [all_of.enter_context(Peer(server.addresses.ws)) for _ in range(5)]
        for number, peer in enumerate(peers):
            with contextlib.suppress(ConnectionError):
                fake = f"192.0.2.{number}"
                peer.send(upgrade(server, X_Forwarded_For=fake, X_Real_IP=fake, Forwarded=f"for={fake}"))
        eventually(lambda: sum(peer.is_closed() for peer in peers[2:]) == 3)
    assert "192.0.2" not in server.log_text()


# Pages


@pytest.mark.parametrize(
    ("setting", "origin", "status"),
    [
        (None, "http://localhost:3000", 101),
        (None, "https://evil.example", 403),
        ("any", "https://evil.example", 101),
        ("https://app.example", "https://app.example", 101),
        ("https://app.example", "http://localhost", 403),
    ],
)
def test_a_page_of_another_site_may_not_connect(
    start_server: StartServer, setting: str | None, origin: str, status: int
) -> None:
    """CWE-1385: a visitor's browser as the way into a private network."""
    server = start_server(*(("--mqtt-ws-origins", setting) if setting else ()))
    assert server.addresses.ws is not None
    refusals = counted(server, 'refusals_total{reason="websocket origin"}', by=int(status == 403))
    with refusals, Peer(server.addresses.ws) as peer:
        peer.send(upgrade(server, Origin=origin))
        peer.stop_sending()
        assert peer.rest_of_bytes().startswith(b"HTTP/1.1 %d " % status)


# Slow senders


def test_slow_senders_cost_little_and_hold_up_nobody(start_server: StartServer) -> None:
    """A byte now and then: before CONNECT the deadline ends it, after that it may take its time."""
    server = start_server("--mqtt-connect-timeout", "2")
    assert server.addresses.ws is not None
    endless = encode(connect_packet(server.app, "slow", will=Will("a", bytes(60_000))), 5)
    starts = [(server.addresses.mqtt, endless), (server.addresses.ws, upgrade(server, X="x" * 7000))] * 50
    before = server.metrics()["process_resident_memory_bytes"]
    with contextlib.ExitStack() as all_of:
        peers = [(all_of.enter_context(Peer(address)), iter(raw)) for address, raw in starts]

        def ended() -> bool:
            sooner_or_later(lambda: works(server))
            closed = [peer.trickles(rest) for peer, rest in peers]
            return all(closed)

        eventually(ended)
    assert server.metrics()["process_resident_memory_bytes"] - before < 20e6

    def take_its_time() -> None:
        with device(server, "slow") as peer:
            for byte in encode(Publish("a", b"x" * 200, 1, packet_id=1), 5):
                peer.send(bytes((byte,)))
            assert peer.expect(Puback)

    sooner_or_later(take_its_time)


# One bad packet


POISON: Final = [
    b"\x30\x03\x00\x00\x00",  # CVE-2021-34432 (mosquitto): a topic of length 0
    encode(Connack(), 5),  # CVE-2021-28166 (mosquitto)
    b"\x30\xff\xff\x0f" + b"\xff" * 10,  # CVE-2026-25627 (NanoMQ): longer than what comes
    b"\x30\xff\xff\xff\xff\xff\x01",  # CVE-2026-21888 (NanoMQ): a length without an end
    b"\x40\x02\x00\x00",
    b"\x50\x02\xff\xff",
    b"\x62\x02\xff\xff",
    b"\x82\x00",
    b"\xa2\x00",
    encode(Publish("event/" + "x" * 60_000, b"x", 1, packet_id=1), 5),
    encode(Publish("event/\x01" + "\u202e" * 60, b"x", 1, packet_id=1), 5),
    encode(Publish("device", b'{"alias": "' + b"\x01" * 100_000 + b'"}', 1, packet_id=1), 5),
    encode(Publish("device", b'{"' + b"k" * 100_000 + b'": 1}', 1, packet_id=1), 5),
    encode(Publish("receipt", b'{"msg_id": "' + b"9" * 100_000 + b'", "event": "shown"}', 1, packet_id=1), 5),
    encode(Publish("receipt", b'{"msg_id": 1e400, "event": ' + b"[" * 50_000 + b"}", 1, packet_id=1), 5),
    encode(Publish("x/" + "\x01" * 4000, b"x", 2, True, packet_id=1), 5),
    encode(Publish("shared", b"x" * 200_000, 1, True, packet_id=1, properties={"correlation_data": b"x" * 9000}), 5),
    encode(
        Publish("shared", b"x", 1, packet_id=1, properties={"user_properties": (("k" * 9000, "v" * 9000),) * 10}), 5
    ),
    encode(Publish("shared", b"x", 1, packet_id=1, properties={"message_expiry_interval": 0xFFFF_FFFF}), 5),
    encode(Publish("shared", b"x", 1, packet_id=1, properties={"message_expiry_interval": 0}), 5),
    encode(Publish("push", b"[" * 100_000, 1, packet_id=1), 5),
    encode(Publish("push", orjson.dumps({"platform": "x" * 100_000}), 1, packet_id=1), 5),
    encode(Publish("push", orjson.dumps({"audience": {"tag": ["\x01" * 9000] * 9}}), 1, packet_id=1), 5),
]  # fmt: skip


@pytest.fixture(scope="module")
def patient(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> LocalServer:
    """It waits for acknowledgements as long as this takes."""
    folder = acknowledged_within(600, tmp_path_factory.mktemp("carriers"))
    return start_server("--carriers-directory", str(folder))


@pytest.mark.parametrize("role", ["device", "publisher"])
def test_one_bad_packet_does_not_stop_the_others(patient: LocalServer, role: str) -> None:
    server = patient
    app = server.create_app(f"poisoned by a {role}", open=True)
    with (
        device(server, "old", app=app, version=4) as old,
        device(server, "new", app=app) as new,
        device(server, "small", app=app, properties={"maximum_packet_size": 100}) as small,
        publisher(server, "speaker", app=app) as speaker,
    ):
        for peer in (old, new, small):
            peer.subscribe("#", "shared", qos=2)
        for number, poison in enumerate(POISON):
            password = app.master_secret if role == "publisher" else None
            with (
                device(server, f"bad-{number}", app=app, password=password) as bad,
                contextlib.suppress(Closed, ConnectionError, TimeoutError),
            ):
                bad.send(poison, Pingreq())
                while not isinstance(bad.receive(1.0), Pingresp):
                    pass
        speaker.send(Publish("last", b"last", 1, packet_id=1))
        assert speaker.expect(Puback).reason == 0
        for peer in (old, new, small):
            while (packet := peer.receive()) and not (
                isinstance(packet, Publish) and packet.payload == b"last"
            ):
                if isinstance(packet, Publish) and packet.qos:
                    peer.send(Puback(packet.packet_id) if packet.qos == 1 else Pubrec(packet.packet_id))
                elif isinstance(packet, Pubrel):
                    peer.send(Pubcomp(packet.packet_id))
    works(server, app)


async def test_a_connect_that_breaks_does_not_stop_those_that_wait_with_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gateway.admission.admit

    def admit(app: Any, access: Any, connect: Connect, *others: Any, **more: Any) -> Any:
        if connect.client_id == "bad":
            raise Broken
        return real(app, access, connect, *others, **more)

    monkeypatch.setattr("gateway.arrivals.admit", admit)
    bad, good = backend(world, "bad", version=5), backend(world, "good")  # the app is not loaded yet
    for phone in (bad, good):
        await phone.until(lambda phone: phone.packets)
    assert bad.connack.reason >= 0x80
    assert bad.closed
    assert good.connack.reason == 0


async def test_wills_that_wait_are_as_many_as_sessions_that_are_kept(tmp_path: Path) -> None:
    async with await World(tmp_path, settings=NodeSettings("node-1", max_sessions=3)).open(
        open=True
    ) as world:
        listener = await connected(world, "listener")
        await asked(world, listener, Subscribe(1, (Subscription("will", 1),)))
        will = Will("will", b"bye", 1, properties={"will_delay_interval": 1000})
        properties: Properties = {"session_expiry_interval": 1000}
        for number in range(10):
            phone = await connected(world, f"leaver-{number}", version=5, will=will, properties=properties)
            phone.leave()
        await world.calm()
        assert len(world.hub.wills) == len(world.hub.mailboxes) == 3
        assert payloads(listener.packets) == [b"bye"] * 7  # their sessions ended at once, and so did the wait


async def test_a_client_id_is_not_longer_than_a_name(world: World) -> None:
    for name in ("x" * 65_000, "ä" * 1000):
        phone = backend(world, name, version=5, properties={"session_expiry_interval": 600})
        await phone.until(lambda phone: phone.packets)
        assert phone.connack.reason is Reason.CLIENT_IDENTIFIER_NOT_VALID


async def test_a_will_that_waits_longer_than_its_session_is_sent_once(world: World) -> None:
    """CVE-2019-11778 (mosquitto): it was used after it was freed."""
    listener = await connected(world, "listener")
    await asked(world, listener, Subscribe(1, (Subscription("will", 1),)))
    will = Will("will", b"bye", 1, properties={"will_delay_interval": 100_000})
    phone = await connected(
        world, "leaver", version=5, will=will, properties={"session_expiry_interval": 1000}
    )
    phone.leave()
    await world.calm()
    assert payloads(listener.packets) == []
    await connected(world, "leaver", version=5)  # clean start: the session is over
    await world.calm()
    assert payloads(listener.packets) == [b"bye"]


# Text


NOT_TEXT: Final = {
    "a lone byte": b"\xff",
    "a surrogate": b"\xed\xa0\x80",
    "overlong": b"\xc0\xaf",
    "cut off": b"\xe2\x82",
    "beyond Unicode": b"\xf4\x90\x80\x80",
    "U+0000": b"a\x00b",
}


def text(raw: bytes) -> bytes:
    return len(raw).to_bytes(2, "big") + raw


def publish(*sections: bytes, properties: bytes = b"") -> bytes:
    """MQTT 5, QoS 0; the sections are topic and payload."""
    topic, payload = sections
    body = topic + bytes((len(properties),)) + properties + payload
    return bytes((0x30, len(body))) + body


@pytest.mark.parametrize("label", NOT_TEXT)
def test_what_is_not_utf8_reaches_nobody(server: LocalServer, label: str) -> None:
    """CVE-2017-7653 (mosquitto): it was passed on, and clients that were stricter closed."""
    app, bad = server.create_app(label, open=True), NOT_TEXT[label]
    senders = [
        publish(text(b"a" + bad), b"x"),
        publish(text(b"a"), b"x", properties=b"\x26" + text(bad) + text(b"v")),
        publish(text(b"a"), b"x", properties=b"\x26" + text(b"k") + text(bad)),
        publish(text(b"a"), b"x", properties=b"\x08" + text(b"r" + bad)),
        publish(text(b"a"), b"x", properties=b"\x03" + text(bad)),
        b"\x82" + bytes((len(bad) + 6,)) + b"\x00\x01\x00" + text(bad) + b"\x00",
        b"\xe0" + bytes((len(bad) + 5,)) + b"\x04" + bytes((len(bad) + 3,)) + b"\x1f" + text(bad),
    ]
    with device(server, "listener", app=app) as listener:
        listener.subscribe("#")
        for raw in senders:
            with device(server, "sender", app=app, will=None) as sender:
                sender.send(raw)
                [goodbye] = sender.rest()
                assert isinstance(goodbye, Disconnect)
                assert goodbye.reason is Reason.MALFORMED_PACKET
        head = b"\x00\x04MQTT\x05\x04\x00\x00\x00" + text(b"x")
        for will in (b"\x00" + text(b"w" + bad) + text(b"p"), b"\x03\x26" + text(bad)[:2]):
            with Peer(server.addresses.mqtt) as peer:
                peer.send(b"\x10" + bytes((len(head + will),)) + head + will)
                answer = peer.rest_of_bytes()
                assert answer[:1] in (b"", b"\x20")
        listener.expect_nothing()


def test_a_payload_that_is_said_to_be_utf8_is(server: LocalServer) -> None:
    app = server.create_app("said to be text", open=True)
    said: Properties = {"payload_format_indicator": 1}
    with device(server, "listener", app=app) as listener, device(server, "sender", app=app) as sender:
        listener.subscribe("#")
        sender.send(Publish("a", b"\xff", 1, packet_id=1, properties=said))
        assert sender.expect(Puback).reason is Reason.PAYLOAD_FORMAT_INVALID
        sender.send(Publish("a", b"\xff", 0, properties=said), Pingreq())
        sender.expect(Pingresp)
        sender.send(Publish("a", b"\xff", 1, True, packet_id=2, properties=said))
        assert sender.expect(Puback).reason is Reason.PAYLOAD_FORMAT_INVALID
        sender.send(Publish("a", "ä".encode(), 1, packet_id=3, properties=said))
        assert sender.expect(Puback).reason == 0
        assert listener.expect(Publish).payload == "ä".encode()
    with Peer(server.addresses.mqtt) as peer:
        answer = peer.connect(connect_packet(app, "x", will=Will("a", b"\xff", properties=said)))
        assert answer.reason is Reason.PAYLOAD_FORMAT_INVALID


# A socket that is closed in the middle


def test_resets_at_every_moment_leave_no_connection(server: LocalServer) -> None:
    """The other half of a leak: what was under way when the peer went."""
    raw = encode(connect_packet(server.app, "gone", will=Will("a", b"x", 1)), 5)
    raw += encode(Subscribe(1, (Subscription("a/#", 1),)), 5) + encode(Publish("a", b"x", 1, packet_id=1), 5)
    for size in range(0, len(raw), 7):
        with contextlib.closing(socket.create_connection(server.addresses.mqtt)) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # close with RST
            one.sendall(raw[:size])
    eventually(lambda: server.metrics()["holdfast_connections_opening"] == 0)
    live = 'holdfast_connections_live{transport="tcp",version="5"}'
    eventually(lambda: server.metrics().get(live, 0) == 0)
    works(server)
