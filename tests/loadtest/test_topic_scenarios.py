"""The scenarios of ordinary topics and of churn, small, against a real server."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from gateway.mqtt import Connect, Publish, Subscribe, decode, encode
from loadtest.fleet import Fleet, FleetError
from loadtest.ledger import PAYLOAD_SIZE, Ledger
from loadtest.population import Population, register
from loadtest.reactor import Reactor
from loadtest.report import Row
from loadtest.scenarios.churn import churn
from loadtest.scenarios.subscriptions import subscriptions, topic, topic_filter
from loadtest.scenarios.topics import TOPIC, topics
from loadtest.server import Server
from loadtest.stage import QUICK, Stage
from loadtest.topic_publisher import (
    PublishError,
    TopicPublisher,
    payload,
    publisher_connect,
    subscribe_packet,
)
from loadtest.visitors import Programme, Step, Visit, VisitError, Visitors, answer_publish, read_frames

DEVICES = 60
SMALL = replace(
    QUICK,
    runs=1,
    seconds=0.4,
    broadcasts=4,
    subscribers=DEVICES,
    subscriptions=1000,
    sessions=120,
    cycles=400,
)


@pytest.fixture(scope="module")
def population(tmp_path_factory: pytest.TempPathFactory) -> Population:
    return register(tmp_path_factory.mktemp("population") / "data", DEVICES, is_open=True)


@pytest.fixture
def server(population: Population, tmp_path: Path) -> Iterator[Server]:
    population.copy_to(tmp_path / "data")
    server = Server(tmp_path / "data")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    reactor = Reactor()
    yield reactor
    reactor.close()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    affinity = os.sched_getaffinity(0)
    yield Stage(SMALL, tmp_path, settings={"HOLDFAST_PUSH_FANOUT_LIMIT": str(DEVICES - 1)})
    os.sched_setaffinity(0, affinity)


def _row(rows: list[Row], ending: str) -> Row:
    [found] = [row for row in rows if row.what.endswith(ending)]
    return found


# What the scenarios are made of


def _fleet(server: Server, population: Population, reactor: Reactor, ledger: Ledger) -> Fleet:
    packets = population.connect_packets(DEVICES, clean_start=True)
    return Fleet(reactor, server.address("mqtt"), packets, ledger.take)


@pytest.mark.parametrize("qos", [0, 1])
def test_every_subscriber_gets_every_message_exactly_once(
    server: Server, population: Population, reactor: Reactor, qos: int
) -> None:
    ledger = Ledger(DEVICES)
    fleet = _fleet(server, population, reactor, ledger)
    fleet.connect(range(DEVICES))
    fleet.subscribe(dict.fromkeys(range(DEVICES), subscribe_packet([TOPIC])))
    publisher = TopicPublisher(reactor, server.address("mqtt"), publisher_connect(population))
    for _ in range(5):
        publisher.publish(TOPIC, payload(ledger.add_broadcast(DEVICES)), qos)
    reactor.run_until(lambda: not ledger.missing, "all messages arrived")
    publisher.wait_for_answers()
    publisher.close()
    fleet.close()
    assert (ledger.arrived, ledger.errors()) == (5 * DEVICES, "")
    assert fleet.acked == 5 * DEVICES * qos


def test_a_refused_subscription_is_an_error(server: Server, population: Population, reactor: Reactor) -> None:
    fleet = _fleet(server, population, reactor, Ledger(DEVICES))
    fleet.connect([0])
    filters = [f"f/{number}" for number in range(101)]  # more than mqtt.max_subscriptions
    with pytest.raises(FleetError, match="device 0 was not granted its subscriptions"):
        fleet.subscribe({0: subscribe_packet(filters)})
    fleet.close()


def test_a_refused_publisher_is_an_error(server: Server, population: Population, reactor: Reactor) -> None:
    wrong = replace(population, master_secret="wrong")
    with pytest.raises(PublishError, match="the publisher was refused: 20020004"):
        TopicPublisher(reactor, server.address("mqtt"), publisher_connect(wrong))


def test_a_message_is_as_long_as_a_push() -> None:
    assert len(payload(7)) == PAYLOAD_SIZE
    assert len(TOPIC) == len("push")


def test_three_filters_match_each_topic_and_only_that_one() -> None:
    for number in range(30):
        levels = topic_filter(number).removesuffix("/#").split("/")
        matched = [
            place
            for place in range(10)
            if all(level in (part, "+") for level, part in zip(levels, topic(place).split("/"), strict=False))
        ]
        assert matched == [number // 3]
    assert len({topic_filter(number) for number in range(300)}) == 300
    assert len({len(topic(place)) for place in (0, 9, 33_333)}) == 1


def test_the_same_visits_come_again_and_they_are_of_all_kinds(population: Population) -> None:
    visits = list(islice(Programme(population, 3), 500))
    assert visits == list(islice(Programme(population, 3), 500))
    connects = [_decoded(visit.steps[0]) for visit in visits]
    assert all(isinstance(packet, Connect) for packet in connects)
    assert Counter(packet.version for packet in connects).keys() == {4, 5}
    assert (
        {packet.clean_start for packet in connects}
        == {packet.will is None for packet in connects}
        == {True, False}
    )
    assert any(not packet.client_id for packet in connects)
    assert {visit.deaf for visit in visits} == {visit.reset for visit in visits} == {True, False}
    others = [
        _decoded(step, packet.version)
        for visit, packet in zip(visits, connects, strict=True)
        for step in visit.steps[1:]
    ]
    published = [packet for packet in others if isinstance(packet, Publish)]
    assert {packet.qos for packet in published} == {0, 1, 2}
    assert {(packet.retain, bool(packet.payload)) for packet in published} >= {(True, True), (True, False)}
    filters = [
        entry.filter for packet in others if isinstance(packet, Subscribe) for entry in packet.subscriptions
    ]
    assert all(any(mark in name for name in filters) for mark in ("+", "#", "$share/"))


def _decoded(step: Step, version: int = 5) -> object:
    found = decode(step.sends, 0, version, 1 << 20)
    assert found is not None
    assert found[1] == len(step.sends)
    return found[0]


def test_visitors_do_what_they_came_for(server: Server, population: Population, reactor: Reactor) -> None:
    visitors = Visitors(reactor, server.address("mqtt"), iter(Programme(population, 3)))
    visitors.run(100, 8, float("inf"))
    visitors.run(150, 8, float("inf"))
    assert (visitors.finished, visitors.refused) == (150, 0)
    assert visitors.cut < 50
    assert server.metric("connects_total") >= 100
    reactor.run_until(lambda: not server.metric("connections_live"), "all are gone")


def test_visitors_stop_when_their_time_is_over(
    server: Server, population: Population, reactor: Reactor
) -> None:
    visitors = Visitors(reactor, server.address("mqtt"), iter(Programme(population, 3)))
    visitors.run(100, 8, 0.0)
    assert visitors.finished == 0


def test_an_answer_that_does_not_come_is_an_error(
    server: Server, population: Population, reactor: Reactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtest.visitors.STUCK", 0.2)
    connect = encode(Connect("x", username=population.app_key, password=population.device_key.encode()), 5)
    visit = Visit((Step(connect, 2),), b"", reset=False, deaf=False)
    visitors = Visitors(reactor, server.address("mqtt"), iter([visit]))
    with pytest.raises(VisitError, match="1 visits wait: for 1 answers after"):
        visitors.run(1, 1, float("inf"))
    visitors.close()


@pytest.mark.parametrize(
    ("publish", "answer"),
    [
        ("30 05 0001 61 7878", ""),
        ("32 06 0001 61 0007 78", "40 02 0007"),
        ("34 06 0001 61 0007 78", "50 02 0007"),
    ],
)
def test_a_message_is_answered_as_its_qos_wants(publish: str, answer: str) -> None:
    packet = bytes.fromhex(publish)
    assert answer_publish(packet[0], packet[2:]) == bytes.fromhex(answer)


LONG = b"\x30\xc8\x01" + b"x" * 200


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 202, 203, 204, 205])
def test_frames_are_taken_once_they_are_whole(cut: int) -> None:
    seen: list[tuple[int, int]] = []

    def take(first: int, body: bytes) -> bytes:
        seen.append((first, len(body)))
        return b"!"

    data = b"\xd0\x00" + (LONG + b"\x40\x02")[:cut]
    answers, rest = read_frames(data, take)
    assert seen == [(0xD0, 0), (0x30, 200)][: 1 + (cut >= len(LONG))]
    assert answers == b"!" * len(seen)
    assert len(rest) == (cut if cut < len(LONG) else cut - len(LONG))


def test_a_length_of_five_bytes_is_no_packet() -> None:
    with pytest.raises(VisitError, match="no packet"):
        read_frames(b"\x30\xff\xff\xff\xff\xff", lambda *_: b"")


# The scenarios


def test_topics_are_held_against_broadcasts(stage: Stage) -> None:
    rows = topics(stage)
    assert len(rows) == 14
    # CPU time may be 0: so little work falls between two ticks of the clock that counts it.
    assert all(row.values[0] > 0 for row in rows if row.unit != "µs")
    assert _row(rows, "topic at QoS 1, 4 at once").note == "none lost"
    ratio = _row(rows, "topic at QoS 1, 1 at once / push broadcast, 1 at once")
    [topic_rate] = _row(rows, "devices, topic at QoS 1, 1 at once").values
    [push_rate] = _row(rows, "devices, push broadcast, 1 at once").values
    assert ratio.values == [topic_rate / push_rate]


def test_many_subscriptions_are_held_against_few(stage: Stage) -> None:
    rows = subscriptions(stage)
    assert len(rows) == 10
    assert all(row.values[0] > 0 for row in rows if row.unit in {"/s", "ms"})
    assert all(row.note == "none lost" for row in rows if row.what.endswith("at once"))


def test_churn_tells_what_stays(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.scenarios.churn.REST", 0.1)
    rows = churn(stage)
    assert [row.unit for row in rows] == ["MB", "MB", "bytes", "/s"]
    assert len(rows[0].values) == 10
    assert rows[1].what.startswith("churn: 400 cycles")
    assert "stopped" not in rows[1].note


def test_churn_that_takes_too_long_says_so(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.scenarios.churn.REST", 0.1)
    stage.plan = replace(stage.plan, cycles=1_000_000, churn_limit=2.0)
    rows = churn(stage)
    assert "stopped after 2 s, before 1,000,000" in rows[1].note
