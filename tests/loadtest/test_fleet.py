"""The fleet against a real server: what it counts is what the server counts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.mqtt import Publish, encode
from loadtest.fleet import FleetError, connect_packet
from loadtest.population import Population, register
from loadtest.publishing import batch_body, check_batch, keep_in_flight
from loadtest.scenarios.broadcast import Volley
from loadtest.scenarios.day import TAG, Day
from loadtest.scenarios.steady import PINGREQ
from loadtest.scenarios.storm import storm
from loadtest.server import Server
from loadtest.stage import QUICK, Cast, Meter, Stage, cast
from loadtest.transports import make_certificate, open_tls, open_websocket

DEVICES = 50


@pytest.fixture(scope="module")
def population(tmp_path_factory: pytest.TempPathFactory) -> Population:
    return register(tmp_path_factory.mktemp("population") / "data", DEVICES)


@pytest.fixture
def server(population: Population, tmp_path: Path) -> Iterator[Server]:
    population.copy_to(tmp_path / "data")
    server = Server(tmp_path / "data", settings={"HOLDFAST_PUSH_FANOUT_LIMIT": str(DEVICES - 1)})
    server.start()
    yield server
    server.stop()


@pytest.fixture
def played(server: Server, population: Population) -> Iterator[Cast]:
    with cast(server, population, DEVICES, urgent=frozenset({3})) as cast_:
        yield cast_


def test_every_device_gets_every_broadcast_exactly_once(played: Cast) -> None:
    played.fleet.connect(range(DEVICES))
    assert played.fleet.online == DEVICES
    volley = Volley(played, DEVICES, 4)
    volley.run(6)  # two times four, then: never fewer than asked for
    assert len(volley.msg_ids) == 8
    ledger = played.ledger
    assert (ledger.arrived, ledger.missing, ledger.errors()) == (8 * DEVICES, 0, "")
    assert played.fleet.acked == 8 * DEVICES
    assert played.server.metric("deliveries_acked_total") == 8 * DEVICES
    assert all(set(broadcast.marks) == {1} for broadcast in ledger.broadcasts.values())


def test_the_payload_is_100_bytes_on_the_wire(played: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    real_read = os.read
    played.fleet.connect([0])
    volley = Volley(played, 1, 1)
    volley.run(1)  # from now on the length of a msg_id is known
    monkeypatch.setattr("os.read", lambda fd, size: seen.append(real_read(fd, size)) or seen[-1])
    volley.run(1)
    [publish] = [data for data in seen if b"\x00\x04push" in data]
    assert len(publish) - publish.index(b'{"msg_id"') == 100


def test_targeted_pushes_are_timed_from_when_they_were_due(played: Cast) -> None:
    played.fleet.connect(range(DEVICES))
    publisher = played.open_loop(range(DEVICES), rate=1e6)
    publisher.send_due()
    played.reactor.run_until(lambda: not played.ledger.missing, "arrival")
    assert publisher.sent == len(played.ledger.latencies) > 0
    assert all(latency > 0 for latency in played.ledger.latencies)
    assert played.ledger.errors() == ""


def test_what_waited_comes_with_the_connect(played: Cast) -> None:
    names = played.population.names
    items = [(f"c{i}", name, f"{played.ledger.add_targeted(i):08d}") for i, name in enumerate(names)]
    request = played.pool.build("POST", "/v3/push/batch/regid/single", batch_body(items))
    assert keep_in_flight(played.pool, iter([request]), check_batch, 4)[0] == 1
    played.fleet.connect(range(DEVICES), wave=7, at_once=10)
    played.reactor.run_until(lambda: not played.ledger.missing, "arrival")
    played.fleet.disconnect(range(DEVICES))
    played.wait_for_offline()
    assert (played.ledger.arrived, played.ledger.errors()) == (DEVICES, "")


def test_devices_say_something_and_are_answered(played: Cast) -> None:
    played.fleet.connect(range(3))
    played.fleet.send(0, PINGREQ)
    played.fleet.send(1, encode(Publish("event/opened", b"{}", qos=1, packet_id=1), 4))
    played.reactor.run_until(lambda: played.fleet.answers == 2, "PINGRESP and PUBACK")
    assert played.server.metric("publishes_received_total") == 1


def test_what_happens_on_a_day_leaves_nothing_missing(played: Cast) -> None:
    day = Day(played, DEVICES)
    day.begin()
    online = played.fleet.online
    for _ in range(4):
        for act in (day.come_and_go, day.show, day.tag, day.broadcast, day.ping):
            act()
        played.reactor.run_until(lambda: played.fleet.online == online, "one has come for one that has gone")
    day.run(0.0)
    played.reactor.run_until(lambda: played.fleet.answers == 8, "answers to 4 receipts and 4 pings")
    assert played.ledger.arrived == 5 * (DEVICES - DEVICES // 10)
    assert played.ledger.errors() == ""
    assert played.server.metric("publishes_received_total") == 4
    assert TAG in played.pool.call("GET", "/v3/tags")["tags"]


def test_a_refused_device_is_an_error(server: Server, population: Population) -> None:
    with cast(server, population, DEVICES) as cast_:
        wrong = connect_packet(population.app_key, population.names[0], "x" * 40)
        cast_.fleet._packets = [wrong]
        with pytest.raises(FleetError, match="device 0 was refused: 20020004"):
            cast_.fleet.connect([0])


def test_mqtt_5_devices_are_counted_alike(server: Server, population: Population) -> None:
    with cast(server, population, DEVICES) as cast_:
        cast_.fleet._packets = population.connect_packets(DEVICES, version=5)
        cast_.fleet.connect(range(DEVICES))
        Volley(cast_, DEVICES, 1).run(2)
        assert cast_.ledger.arrived == 2 * DEVICES


def test_a_websocket_device_gets_its_connack(server: Server, population: Population) -> None:
    with open_websocket(server.address("ws"), population.connect_packets(1)[0]):
        assert server.metric("connections_live") == 1


def test_a_tls_device_gets_its_connack(population: Population, tmp_path: Path) -> None:
    settings, context = make_certificate(tmp_path)
    population.copy_to(tmp_path / "data")
    server = Server(tmp_path / "data", settings=settings)
    server.start()
    with open_tls(server.address("mqtts"), context, population.connect_packets(1)[0]):
        assert server.metric("connections_live") == 1
    server.stop()


def test_the_meter_reads_the_server_from_proc(played: Cast) -> None:
    meter = Meter(played.server.pid)
    with meter.running():
        played.fleet.connect(range(DEVICES))
    assert meter.server_cpu >= 0  # it is told late, and may be less than a tick
    assert meter.generator_cpu > 0
    assert 0 < meter.load.generator < 1.5
    assert played.server.steady_rss() > 1 << 20


def test_a_stage_leaves_nothing_behind(tmp_path: Path) -> None:
    affinity = os.sched_getaffinity(0)
    try:
        stage = Stage(QUICK, tmp_path)
        population = stage.population(DEVICES)
        assert stage.population(DEVICES) is population
        with stage.server(population) as server:
            assert server.addresses["data_dir"] != str(population.directory)
    finally:
        os.sched_setaffinity(0, affinity)
    assert [path.name for path in tmp_path.iterdir()] == [f"population-{DEVICES}"]


def test_a_storm_is_measured_beside_bare_handshakes(tmp_path: Path) -> None:
    affinity = os.sched_getaffinity(0)
    try:
        small = replace(QUICK, runs=1, devices=DEVICES, tls_devices=DEVICES)
        rows = storm(Stage(small, tmp_path))
    finally:
        os.sched_setaffinity(0, affinity)
    assert len(rows) == 6
    assert all(value > 0 for row in rows for value in row.values)
    assert [row.at_least for row in rows] == [None, None, 0.85, None, None, None]
