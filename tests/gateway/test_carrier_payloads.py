"""What a carrier's profile says of payloads: compressed where that saves a packet, and how large one may be."""

from __future__ import annotations

import asyncio
import random
import socket
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from broker.bus import Broadcast, Doorbell, Targeted
from broker.carriers.catalog import Carriers
from broker.carriers.profile import Tcp
from broker.model import NewMessage, StoredBroadcast, StoredMessage
from gateway.admission import NO_PUSH_IS_LARGER, manners
from gateway.live import AROUND, deflate, encoding, render, segments
from gateway.mqtt import Connect
from gateway.segments import STEP, USUAL, segment_size
from gateway.session import PLAIN, Manners, Session
from tests.gateway.test_hub import NOW, broadcast, connected, make_hub, sent, targeted
from tests.gateway.world import DAY, Phone, World

ZLIB, JSON = 0x78, 0x7B
noise = random.Random(6).randbytes
ASKED: Any = {"user_properties": (("compression", "deflate"),)}
WIDE: Any = {"user_properties": (("carrier", "wide"),)}


# Segments


@pytest.mark.parametrize(
    ("size", "segment", "count"),
    [
        (0, 100, 1),
        (60, 100, 1),
        (61, 100, 2),
        (1400 - AROUND, 1400, 1),
        (1401 - AROUND, 1400, 2),
        (5000, 1400, 4),
        (5000, 0, 5000),  # every byte counts
    ],
)
def test_segments_of_a_payload(size: int, segment: int, count: int) -> None:
    assert segments(bytes(size), segment) == count


@pytest.mark.parametrize(
    ("payload", "segment", "smaller"),
    [
        (b"a" * 1000, 1400, False),  # one packet either way
        (b"a" * 1400, 1400, True),  # two become one
        (b"a" * 1000, 500, True),
        (noise(1480) + b"a" * 300, 500, False),  # shorter, and as many packets
        (noise(1480) + b"a" * 300, 0, True),
        (noise(3000), 1400, False),
        (noise(3000), 0, False),
        (b"", 0, False),
        (b"a", 0, False),
    ],
)
def test_compressed_where_that_saves_a_packet(payload: bytes, segment: int, smaller: bool) -> None:
    deflated = deflate(payload, segment)
    assert (len(deflated) < len(payload)) is smaller
    assert (zlib.decompress(deflated) if smaller else deflated) == payload


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(1, 60), st.sampled_from((0, 100, 500, 1400)))
def test_compression_never_costs_a_packet_and_loses_nothing(seed: bytes, times: int, segment: int) -> None:
    payload = seed * times
    deflated = deflate(payload, segment)
    if deflated is payload:
        assert (
            segments(zlib.compress(payload), segment) >= segments(payload, segment) or len(payload) <= segment
        )
    else:
        assert zlib.decompress(deflated) == payload
        assert segments(deflated, segment) < segments(payload, segment)


def test_only_devices_that_take_it_get_it_compressed() -> None:
    message = StoredMessage(1, 1, orjson.dumps({"notification": {"alert": "a" * 3000}}), 0.0, 1.0)
    plain, packet = encoding(5, "other"), encoding(5, "other", False, True, 1400)
    assert render(message, plain)[0] == JSON
    assert render(message, packet)[0] == ZLIB
    assert packet is encoding(5, "other", False, True, 1400)


# The size of a segment


@pytest.mark.parametrize(("mss", "size"), [(88, STEP), (536, 500), (1360, 1300), (1400, 1400), (None, USUAL)])
def test_the_profile_says_how_large_a_segment_is(mss: int | None, size: int) -> None:
    assert segment_size(asyncio.Transport(), Tcp(mss=mss)) == size


def test_or_else_the_system_does() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as dialled:
        dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1000)
        dialled.connect(listening.getsockname())
        told = dialled.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        transport = asyncio.Transport({"socket": dialled})
        assert segment_size(transport, Tcp()) == told // STEP * STEP < USUAL
        assert segment_size(transport, Tcp(mss=536)) == 500


def test_a_proxy_beside_us_says_nothing_of_the_devices_segments() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as dialled,
    ):
        assert dialled.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) > USUAL
        assert segment_size(asyncio.Transport({"socket": dialled}), Tcp()) == USUAL


def test_a_socket_without_segments_has_the_usual_ones() -> None:
    here, there = socket.socketpair()
    with here, there:
        assert segment_size(asyncio.Transport({"socket": here}), Tcp()) == USUAL


# How large a push may be


def test_a_push_over_the_carriers_largest_is_passed_over_and_counted() -> None:
    hub = make_hub()
    hub.add_broadcast(broadcast(1, size=500))
    hub.add_broadcast(broadcast(2))
    session = connected(hub, manners=Manners(largest=200))
    assert sent(hub.collect(session, NOW)) == [2]
    assert hub.offer(session, targeted(3, size=500), NOW) == []
    assert sent(hub.offer(session, targeted(4), NOW)) == [4]
    assert hub._too_large.value == 2


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_the_largest_is_of_the_payload_to_the_byte(version: int, packed: bool) -> None:
    push, kind = targeted(1, size=300), encoding(version, "other", packed)
    size = len(render(push.message, kind))
    frames = push.frames(kind)
    assert Session(kind, manners=Manners(largest=size)).accepts(frames)
    assert not Session(kind, manners=Manners(largest=size - 1)).accepts(frames)
    assert not Session(kind, manners=Manners(maximum_packet=size, largest=size)).accepts(frames)
    assert Session(kind, manners=Manners(maximum_packet=frames.size)).accepts(frames)


@pytest.mark.parametrize(
    ("largest", "kept"),
    [(1024, 1024), (NO_PUSH_IS_LARGER - 1, NO_PUSH_IS_LARGER - 1), (NO_PUSH_IS_LARGER, 0), (1 << 26, 0)],
)
def test_a_limit_that_no_push_can_reach_is_none(largest: int, kept: int) -> None:
    found = manners(Connect("a", True), largest)
    assert (found.largest, found is PLAIN) == (kept, not kept)


@pytest.mark.parametrize(
    ("manners", "choosy"),
    [
        (PLAIN, False),
        (Manners(alias_maximum=3, bridge=True), False),
        (Manners(maximum_packet=100), True),
        (Manners(largest=100), True),
    ],
)
def test_who_is_not_choosy_is_asked_nothing(manners: Manners, choosy: bool) -> None:
    assert manners.choosy is choosy


# A whole node


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    folder = tmp_path / "carriers"
    folder.mkdir()
    text = 'name = "default"\n[delivery]\ncompress = "packet"\nlargest = 4000\n[tcp]\nmss = 1000\n'
    (folder / "default.toml").write_text(text)
    (folder / "wide.toml").write_text("[delivery]\nlargest = 1048576\n")
    world = await World(tmp_path, carriers=Carriers(folder)).open()
    yield world
    await world.close()


async def push_of(world: World, alert: str, *devnos: int) -> int:
    body, targets = orjson.dumps({"notification": {"alert": alert}}), BitMap(devnos)
    new = NewMessage(world.app.app_id, body, targets, len(devnos) > 1, world.wall, world.wall + DAY)
    (answer,) = await world.store.append([new])
    message = StoredMessage(answer.msg_id, new.app_id, body, new.created_at, new.expires_at)
    bell: Doorbell = Targeted(message, devnos)
    if new.broadcast:
        bell = Broadcast(StoredBroadcast(message, targets, BitMap()))
    world.bus.ring([bell])
    return answer.msg_id


def first_bytes(phone: Phone) -> list[int]:
    return [push.payload[0] for push in phone.pushes]


@pytest.mark.parametrize(("properties", "first"), [({}, [JSON, JSON]), (ASKED, [JSON, ZLIB])])
async def test_a_device_gets_compressed_what_saves_a_packet(
    world: World, properties: Any, first: list[int]
) -> None:
    await push_of(world, "a" * 500, 0)
    await push_of(world, "a" * 2000, 0)
    phone = await world.online(0, properties=properties)
    assert first_bytes(phone) == first


async def test_a_push_that_is_too_large_for_the_carrier_waits_for_another(world: World) -> None:
    large = await push_of(world, "".join(map(str, range(1500))), 0)
    small = await push_of(world, "hi", 0)
    phone = await world.online(0, properties={})
    assert phone.got == [small]
    phone.ack()
    phone.leave()
    assert world.node.metrics.too_large.value == 1
    await world.recorded()
    again = await world.online(0, properties=WIDE)
    assert again.got == [large]


async def test_a_broadcast_that_is_too_large_goes_to_others_only(world: World) -> None:
    here, other = await world.online(0, properties={}), await world.online(1, properties=WIDE)
    large = await push_of(world, "".join(map(str, range(1500))), 0, 1)
    assert await other.pushed(1) == [large]
    small = await push_of(world, "hi", 0, 1)
    assert await here.pushed(1) == [small]
    assert await other.pushed(2) == [large, small]
    assert next(world.hub.broadcasts()).owed_to(0)
