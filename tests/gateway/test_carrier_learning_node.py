"""What a node learns from the lives of its connections: which ends were deaths, and which silences were survived."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner, Result

from broker.carriers.catalog import Carriers
from broker.carriers.command import carriers
from broker.carriers.panels import PANELS, panel_of, voice_of
from broker.carriers.silences import BINS, LEAST, LEAST_DEATHS, bin_of, floor_of
from broker.carriers.tally import Tally
from broker.config import load_config
from gateway import witness
from gateway.mqtt import (
    Connack,
    Connect,
    Disconnect,
    Pingreq,
    Publish,
    Subscribe,
    Subscription,
    decode,
    encode,
)
from gateway.server import Service
from gateway.witness import ELSEWHERE, MAX_SUSPECTS, NOTICED, PROMPT, SAMPLE, SWEEP_EVERY, UNLIMITED
from tests.gateway.fleet_world import FleetWorld
from tests.gateway.world import Phone, World

LOOK = 30.0  # seconds between the timer's looks at an idle connection
KEEP_ALIVE = 1000
ABOVE_ALL = "[acks]\nfirst = 30\nleast = 30\nmost = 30\n[heartbeat]\nstart = 240\nleast = 30\nmost = 3000\n"
OF_WIFI = '[recognise]\nlinks = ["wifi"]\n'


def _write(path: Path) -> Carriers:
    folder = path / "carriers"
    folder.mkdir()
    (folder / "default.toml").write_text(ABOVE_ALL)
    (folder / "home.toml").write_text(OF_WIFI)
    return Carriers(folder)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = await World(tmp_path, carriers=_write(tmp_path)).open()
    yield world
    await world.close()


def wifi(**more: Any) -> dict[str, Any]:
    """A device that tells where it is."""
    properties = {"session_expiry_interval": 600, "user_properties": (("link", "wifi"),)}
    return {"keep_alive": KEEP_ALIVE, "properties": properties, **more}


async def online(world: World, devno: int = 0, **values: Any) -> Phone:
    return await world.online(devno, **(values or wifi()))


def passes(world: World, seconds: float, *phones: Phone) -> None:
    """The timer looks at these meanwhile."""
    clock = world.node.clock
    until = clock.now + seconds
    while clock.now < until:
        clock.now = min(clock.now + LOOK, until)
        for phone in phones:
            if not phone.closed:
                phone.connection.check(clock.now)
        world.node.witness.sweep()


def learned(world: World, carrier: str = "home", link: str = "wifi") -> Tally:
    network = world.node.learning._networks.get((carrier, link))
    return Tally() if network is None else network.fresh


def survived(world: World) -> list[int]:
    """The silences, seconds, rounded down to their bins."""
    return [floor_of(n) for n in range(BINS) for _ in range(learned(world).survived[n])]


def died(world: World) -> list[int]:
    return [floor_of(n) for n in range(BINS) for _ in range(learned(world).died[n])]


def ends(world: World, carrier: str = "home", link: str = "wifi") -> dict[str, int]:
    tally = learned(world, carrier, link)
    counts = {how: getattr(tally, how) for how in ("closed", "told", "silent", "taken")}
    return {how: count for how, count in counts.items() if count}


# Who is counted, and where


async def test_a_device_counts_for_the_carrier_and_link_it_has(world: World) -> None:
    await online(world, 0)
    await online(world, 1, keep_alive=60)
    counts = {key: one.online for key, one in world.node.learning._networks.items()}
    assert counts == {("home", "wifi"): 1, ("default", "unknown"): 1}


async def test_who_is_no_device_is_not_counted(world: World) -> None:
    names = {"username": world.app.key, "password": world.app.master_secret.encode()}
    phone = Phone(world.node, Connect("server", True, **names))
    await phone.until(lambda phone: phone.packets)
    passes(world, 100.0, phone)
    phone.send(Disconnect())
    assert not world.node.learning._networks


async def test_a_lifetime_is_from_connect_to_the_end(world: World) -> None:
    phone = await online(world)
    passes(world, 3000.0 - 1)
    phone.send(Disconnect())
    assert ends(world) == {"closed": 1}
    value = world.metrics.registry.get_sample_value
    labels = {"carrier": "home", "link": "wifi"}
    assert value("holdfast_carrier_lifetime_seconds_bucket", {**labels, "le": "3600.0"}) == 1
    assert value("holdfast_carrier_lifetime_seconds_bucket", {**labels, "le": "1800.0"}) == 0
    assert value("holdfast_carrier_connections", labels) == 0


async def test_ends_are_counted_by_who_said_what(world: World) -> None:
    said = await online(world, 0)
    said.send(Disconnect())
    lost = await online(world, 0)
    lost.leave()
    told = await online(world, 0)
    told.connection.close("token revoked")
    old = await online(world, 0)
    again = await online(world, 0)
    assert old.closed
    passes(world, 1.5 * KEEP_ALIVE, again)
    assert again.closed
    assert ends(world) == {"closed": 2, "told": 1, "silent": 1, "taken": 1}


async def test_pushes_that_nobody_answered_are_counted_at_the_end(world: World) -> None:
    phone = await online(world)
    ids = [await world.push(0) for _ in range(4)]
    await phone.pushed(4)
    phone.ack(*ids[:3])
    assert learned(world).sent == 0
    phone.leave()
    assert (learned(world).sent, learned(world).unanswered) == (4, 1)


async def test_packet_ids_that_are_not_only_of_pushes_are_not_counted_as_such(world: World) -> None:
    world.app = await world.store.create_app("open", open=True)
    await world.devices.register_open(world.app, "device-0")
    phone = await online(world)
    phone.send(Subscribe(1, (Subscription("a", 1),)), Publish("a", b"x", 1, packet_id=1))
    await phone.until(lambda phone: any(isinstance(packet, Publish) for packet in phone.packets))
    phone.leave()
    assert (learned(world).sent, learned(world).unanswered) == (0, 0)


async def test_times_to_acknowledge_are_those_of_pushes_that_went_out_at_once(world: World) -> None:
    phone = await online(world)
    await world.push(0)
    await phone.pushed(1)
    world.later(0.3)
    phone.ack()
    world.node.settler.fold()
    labels = {"carrier": "home", "link": "wifi"}
    value = world.metrics.registry.get_sample_value
    assert value("holdfast_carrier_ack_seconds_sum", labels) == pytest.approx(0.3)
    phone.leave()
    await world.push(0)
    world.later(5000.0)
    again = await online(world)
    await again.pushed(1)
    again.ack()
    world.node.settler.fold()
    assert value("holdfast_carrier_ack_seconds_count", labels) == 1


async def test_of_a_push_to_many_some_times_are_looked_at(tmp_path: Path) -> None:
    async with await World(tmp_path, carriers=_write(tmp_path), fanout_limit=100).open(
        devices=SAMPLE + 3
    ) as world:
        phones = [await online(world, devno) for devno in range(SAMPLE + 3)]
        await world.push(*range(SAMPLE + 3))
        for phone in phones:
            await phone.pushed(1)
        for phone in phones:
            phone.ack()
        world.node.settler.fold()
        assert sum(learned(world).acks) == SAMPLE


# Silences that were survived


async def test_a_silence_that_a_packet_ends_was_survived_for_as_long_as_it_was_seen(world: World) -> None:
    phone = await online(world)
    passes(world, 245.0, phone)
    phone.send(Pingreq())
    assert survived(world) == []  # no packet costs anything
    passes(world, 10.0, phone)
    assert survived(world) == [240]


async def test_each_silence_counts(world: World) -> None:
    phone = await online(world)
    for _ in range(3):
        passes(world, 240.0, phone)
        phone.send(Pingreq())
    passes(world, 1.0, phone)
    assert survived(world) == [240] * 3


async def test_silences_count_in_the_panels_of_their_app_and_address(world: World) -> None:
    """Survived ones, and those that a device was forgotten in."""
    phone = await online(world)
    voice = voice_of(world.app.app_id, panel_of(phone.connection.peer[0]))
    assert voice > 0
    by_app, by_source = divmod(voice, PANELS)
    passes(world, 240.0, phone)
    phone.send(Pingreq())
    passes(world, 1.0, phone)
    assert {key // BINS for key in learned(world).panels} == {2 * by_app, 2 * (PANELS + by_source)}
    learned(world).panels.clear()
    await forgotten(world, 400.0)
    assert {key // BINS for key in learned(world).panels} == {2 * by_app + 1, 2 * (PANELS + by_source) + 1}


async def test_a_word_at_the_end_ends_a_silence_too(world: World) -> None:
    phone = await online(world)
    passes(world, 200.0, phone)
    phone.send(Disconnect())
    assert survived(world) == [200]


async def test_the_silence_before_a_connection_is_lost_is_nothing(world: World) -> None:
    phone = await online(world)
    passes(world, 200.0, phone)
    phone.leave()
    assert (survived(world), died(world)) == ([], [])


async def test_a_push_that_is_answered_ends_a_silence(world: World) -> None:
    phone = await online(world)
    passes(world, 120.0, phone)
    await world.push(0)
    await phone.pushed(1)
    phone.ack()
    passes(world, 30.0, phone)
    assert survived(world) == [120]


# Deaths


async def forgotten(world: World, silence: float) -> Phone:
    """The NAT has forgotten it; its heartbeat finds that out, and it is back after some seconds."""
    phone = await online(world)
    passes(world, silence + NOTICED, phone)
    again = await online(world)
    assert phone.closed
    return again


async def test_a_device_that_comes_back_out_of_a_silence_was_forgotten(world: World) -> None:
    await forgotten(world, 240.0)
    assert died(world) == [240]
    assert ends(world) == {"taken": 1}


async def test_a_connection_that_has_survived_as_long_was_lost_otherwise(world: World) -> None:
    phone = await online(world)
    for _ in range(2):
        passes(world, 240.0, phone)
        phone.send(Pingreq())
    passes(world, 200.0, phone)
    await online(world)
    assert died(world) == []


async def test_a_longer_one_than_it_has_survived_counts(world: World) -> None:
    phone = await online(world)
    passes(world, 120.0, phone)
    phone.send(Pingreq())
    passes(world, 180.0 + NOTICED, phone)
    await online(world)
    assert (survived(world), died(world)) == ([120], [180])


async def test_a_device_that_is_in_another_network_now_proves_nothing(world: World) -> None:
    phone = await online(world)
    passes(world, 240.0, phone)
    await online(world, 0, keep_alive=60)
    passes(world, 10 * SWEEP_EVERY)
    assert died(world) == []
    assert sum(learned(world, "default", "unknown").died) == 0


async def test_a_push_into_the_silence_tells_when_it_was_too_long(world: World) -> None:
    phone = await online(world)
    passes(world, 100.0, phone)
    await world.push(0)
    await phone.pushed(1)
    passes(world, 60.0, phone)
    assert phone.closed
    passes(world, 80.0)
    await online(world)
    assert died(world) == [100]
    assert ends(world) == {"silent": 1}


async def test_a_reset_in_answer_to_a_push_is_a_death(world: World) -> None:
    phone = await online(world)
    passes(world, 100.0, phone)
    await world.push(0)
    await phone.pushed(1)
    phone.connection.connection_lost(ConnectionResetError())
    await online(world)
    assert died(world) == [100]


async def test_a_reset_without_a_push_says_nothing(world: World) -> None:
    phone = await online(world)
    passes(world, 100.0, phone)
    phone.connection.connection_lost(ConnectionResetError())
    await online(world)
    assert (ends(world), died(world)) == ({"closed": 1}, [])


async def overdue(world: World) -> Phone:
    """We gave it up."""
    phone = await online(world)
    passes(world, 100.0, phone)
    await world.push(0)
    await phone.pushed(1)
    while not phone.closed:
        passes(world, 1.0, phone)
    return phone


async def test_who_heard_us_close_had_a_way(world: World) -> None:
    await overdue(world)
    passes(world, PROMPT - 1)
    await online(world)
    assert died(world) == []


async def test_who_was_away_itself_proves_nothing(world: World) -> None:
    await overdue(world)
    passes(world, 1.5 * KEEP_ALIVE + 1)
    await online(world)
    assert died(world) == []


async def test_who_stays_away_is_forgotten_here_too(world: World) -> None:
    await overdue(world)
    assert len(world.node.witness._suspects) == 1
    passes(world, 1.5 * KEEP_ALIVE + SWEEP_EVERY + LOOK)
    assert not world.node.witness._suspects
    assert died(world) == []


async def test_the_heartbeat_of_a_plain_client_is_its_keep_alive(world: World) -> None:
    phone = await online(world, 0, **wifi(keep_alive=240))
    passes(world, 1.5 * 240, phone)
    assert phone.closed
    passes(world, 120.0)
    await online(world)
    assert died(world) == [240]


async def test_without_a_keep_alive_a_silence_may_be_long(world: World) -> None:
    values = {"keep_alive": 0, "version": 4}
    phone = await online(world, 0, **values)
    passes(world, 2 * UNLIMITED, phone)
    await online(world, 0, **values)
    tally = learned(world, "default", "unknown")
    assert tally.died[bin_of(UNLIMITED)] == 1


async def test_a_short_silence_is_none(world: World) -> None:
    await online(world)
    passes(world, 3.0)
    await online(world)
    assert died(world) == []


async def test_suspects_are_few(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_SUSPECTS >= 1000
    monkeypatch.setattr(witness, "MAX_SUSPECTS", 2)
    phones = [await online(world, devno) for devno in range(3)]
    passes(world, 100.0, *phones)
    for devno, phone in enumerate(phones):
        await world.push(devno)
        await phone.pushed(1)
    passes(world, 40.0, *phones)
    assert all(phone.closed for phone in phones)
    assert list(world.node.witness._suspects) == [(world.app.app_id, 1), (world.app.app_id, 2)]


async def test_a_device_that_is_at_another_node_now_is_taken_to_be_in_the_same_network(
    tmp_path: Path,
) -> None:
    world = FleetWorld(tmp_path, carriers=_write(tmp_path))
    await world.open()
    async with await world.build():
        phone = await world.online_at(0, 0, **wifi())
        passes(world, 240.0 + NOTICED, phone)
        await world.online_at(1, 0, **wifi())
        world.hear()
        assert phone.closed
        assert sum(_fresh(world, 0).died) == 0
        passes(world, ELSEWHERE + SWEEP_EVERY + LOOK)
        assert sum(_fresh(world, 0).died) == 1
        assert sum(_fresh(world, 1).died) == 0


def _fresh(world: FleetWorld, number: int) -> Tally:
    networks = world.nodes[number].node.learning._networks.values()
    total = Tally()
    for network in networks:
        total.add(network.fresh)
    return total


# What comes of it


async def knows(world: World, link: str) -> None:
    """That 200 seconds are too long, and 100 are not."""
    catalog = world.node.carriers.catalog
    profile = catalog.profiles["home"] if link else catalog.default
    network = world.node.learning.network(profile, link)
    for _ in range(LEAST):
        network.survived(bin_of(160))
    for _ in range(LEAST_DEATHS):
        network.died(bin_of(200))
    await world.node.learning.save()
    await world.node.learning.read()


async def test_a_new_device_is_told_what_the_others_found_out(world: World) -> None:
    assert ("heartbeat", "240 30 3000") in (await online(world)).connack.properties["user_properties"]
    await knows(world, "wifi")
    phone = await online(world)
    assert ("heartbeat", "144 30 3000") in phone.connack.properties["user_properties"]
    assert phone.connack.properties.get("server_keep_alive", KEEP_ALIVE) == KEEP_ALIVE  # it learns for itself


async def test_a_client_that_learns_nothing_is_given_a_keep_alive_that_holds(world: World) -> None:
    plain = await online(world, 0, keep_alive=KEEP_ALIVE)
    assert "server_keep_alive" not in plain.connack.properties
    await knows(world, "")
    plain = await online(world, 0, keep_alive=KEEP_ALIVE)
    assert plain.connack.properties["server_keep_alive"] == 144
    assert "user_properties" not in plain.connack.properties


async def test_what_tcp_says_of_a_connection_counts_for_its_network(world: World) -> None:
    phone = await online(world)
    world.node.tcp.learn(phone.connection, 0.2, 10, 1)
    world.node.tcp.learn(phone.connection, 0.0, 5, 0)
    tally = learned(world)
    assert (tally.trips, tally.trip_seconds, tally.segments, tally.retransmits) == (1, 0.2, 15, 1)
    phone.leave()
    world.node.tcp.learn(phone.connection, 0.2, 10, 1)
    assert learned(world).segments == 15


async def test_an_idle_connection_is_counted_without_an_object_of_its_own(world: World) -> None:
    one, other = await online(world, 0), await online(world, 1)
    passes(world, 1400.0, one, other)
    assert one.connection.network is other.connection.network
    assert one.connection.quiet == bin_of(1400.0) < 256  # such small numbers are there already


async def test_idle_connections_share_what_they_have_agreed_on(world: World) -> None:
    """Each object of a connection's own is 30 bytes, a million times."""
    wishes: Any = {"session_expiry_interval": 5000, "user_properties": (("link", "wifi"),)}
    one, other = [await world.online(devno, keep_alive=400, properties=wishes) for devno in (0, 1)]
    for name in ("profile", "network", "keep_alive", "session_expiry"):
        assert getattr(one.connection, name) is getattr(other.connection, name), name
    for name in ("encoding", "manners", "limits", "ack_time"):
        assert getattr(one.session, name) is getattr(other.session, name), name
    session = one.session
    assert session.comeback is session.unacked is session.inbox is session.resend is session.mailbox is None


# A whole server

OFF = {"mqtt.port": "0", "mqtt.ws_port": "off", "http.port": "0", "admin.port": "0", "server.node_id": "n1"}


@pytest.fixture
async def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    monkeypatch.setattr("gateway.server.tune_interpreter", lambda _: None)
    service = Service(load_config(None, None, {"server.data_dir": str(tmp_path / "data"), **OFF}))
    try:
        service.listening = await service.open()  # type: ignore[attr-defined]
        yield service
    finally:
        await service.close()


def _show(data_dir: Path, *words: str) -> Result:
    return CliRunner().invoke(carriers, [*words, "--data-dir", str(data_dir)])


async def _welcome(reader: asyncio.StreamReader) -> Connack:
    received = b""
    while (found := decode(received, 0, 5, 1 << 16)) is None:
        received += await reader.readexactly(1)
    packet, _ = found
    assert isinstance(packet, Connack)
    return packet


async def test_the_command_asks_the_running_server_and_it_remembers(service: Service, tmp_path: Path) -> None:
    app = await service._broker.apps.create("shop", open=True)
    host, port = service.listening.mqtt.rsplit(":", 1)  # type: ignore[attr-defined]
    reader, writer = await asyncio.open_connection(host, int(port))
    declared = {"user_properties": (("carrier", "46000"), ("link", "cellular"))}
    login = {"username": app.key, "password": app.device_key.encode()}
    try:
        writer.write(encode(Connect("phone-1", True, keep_alive=60, properties=declared, **login), 5))
        await _is_learned_of(reader, writer, tmp_path / "data")
    finally:
        writer.close()
    done = await asyncio.to_thread(_show, tmp_path / "data")
    assert done.stdout.splitlines()[1].split()[:4] == ["china-mobile", "cellular", "0", "1"]


async def _is_learned_of(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data_dir: Path) -> None:
    profile = Carriers().catalog.profiles["china-mobile"]
    assert profile.recognise.operators
    bounds = profile.heartbeat
    wanted = ("heartbeat", f"{bounds.start} {bounds.least} {bounds.most}")
    assert wanted in (await _welcome(reader)).properties["user_properties"]
    done = await asyncio.to_thread(_show, data_dir, "--json")
    assert done.exit_code == 0, done.output
    [network] = orjson.loads(done.stdout)
    assert (network["carrier"], network["link"], network["online"]) == ("china-mobile", "cellular", 1)
    refused = await asyncio.to_thread(_show, data_dir, "--days", "29")
    assert refused.exit_code == 2
    writer.write(encode(Disconnect(), 5))
    await reader.read()


async def test_a_server_that_stops_leaves_what_it_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.server.tune_interpreter", lambda _: None)
    config = load_config(None, None, {"server.data_dir": str(tmp_path / "data"), **OFF})
    for stop in (1, 2):
        service = Service(config)
        await service.open()
        assert service.node is not None
        network = service.node.learning.network(service.node.carriers.catalog.default, "wifi")
        network.connected()
        network.ended("closed", 5.0)
        await service.close()
        done = await asyncio.to_thread(_show, tmp_path / "data", "--json")
        assert [(one["connects"], one["ends"]["closed"]) for one in orjson.loads(done.stdout)] == [
            (stop, stop)
        ]
