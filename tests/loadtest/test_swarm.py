"""The devices of one process, against a server whose every word is in the test."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.mqtt import Connack, Connect, Disconnect, Pingreq, Pingresp, Puback, Reason, decode, encode
from loadtest.fleet import take_pushes
from loadtest.roster import Roster, RosterConnects, name_of
from loadtest.server import Address
from loadtest.swarm import read_reference
from tests.loadtest.swarm_world import TOKENS, Play, make_roster, push_packet
from tests.patience import PATIENCE


@pytest.fixture
def roster(tmp_path: Path) -> Roster:
    return make_roster(tmp_path)


@pytest.fixture
def play(roster: Roster) -> Iterator[Play]:
    play = Play(roster)
    yield play
    play.close()


def test_names_are_of_one_length_and_differ() -> None:
    names = {name_of(device) for device in range(10_000)}
    assert len(names) == 10_000
    assert {len(name) for name in names} == {16}


@pytest.mark.parametrize("version", [4, 5])
def test_a_device_says_who_it_is(play: Play, version: int) -> None:
    play.begin(3, version)
    heard = [play.peer.welcome(version)[1] for _ in range(3)]
    assert {(connect.client_id, connect.password) for connect in heard} == {
        (name_of(device), token.encode()) for device, token in enumerate(TOKENS)
    }
    assert {(c.username, c.keep_alive, c.version, c.clean_start) for c in heard} == {
        ("some-app", 60, version, False)
    }
    play.peer.turn_until(lambda: play.swarm.online == 3)
    assert (play.swarm.wanted, play.swarm.counts.connects) == (3, 3)


def test_versions_take_turns(roster: Roster) -> None:
    connects = RosterConnects(roster, 60, [4, 5])
    found = [decode(connects.packet(device), 0, 4, 4096) for device in range(3)]
    connects.close()
    assert [packet[0].version for packet in found if packet and isinstance(packet[0], Connect)] == [4, 5, 4]


@pytest.mark.parametrize("version", [4, 5])
def test_each_push_is_acknowledged_and_counted(play: Play, version: int) -> None:
    play.begin(version=version)
    server, _ = play.peer.welcome(version)
    play.swarm.tally.expect(1)
    for byte in push_packet(1, 300, version) + push_packet(2, 301, version) + push_packet(1, 302, version):
        server.sendall(bytes([byte]))
        play.swarm.turn()
    answers = [play.peer.read(server, version) for _ in range(3)]
    assert [answer.packet_id for answer in answers if isinstance(answer, Puback)] == [300, 301, 302]
    assert (play.swarm.tally.marks(1).count, play.swarm.tally.marks(1).repeats) == (1, 1)
    assert play.swarm.counts.acked == 3


def test_what_comes_with_the_connack_is_not_lost(play: Play) -> None:
    play.begin()
    server = play.peer.accept()
    play.peer.read(server, 4)
    server.sendall(encode(Connack(), 4) + push_packet(1, 9))
    answer = play.peer.read(server, 4)
    assert isinstance(answer, Puback)
    assert (play.swarm.online, answer.packet_id) == (1, 9)


class Clock:
    """The swarm's, in the place of `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("loadtest.swarm.time", clock)
    return clock


def test_a_device_pings_once_in_an_interval(play: Play, clock: Clock) -> None:
    play.begin(ping_interval=60)
    server, _ = play.peer.welcome(4)
    play.peer.turn_until(lambda: play.swarm.online == 1)
    for count in range(1, 4):
        clock.now += 60
        assert isinstance(play.peer.read(server, 4), Pingreq)
        server.sendall(encode(Pingresp(), 4))
        play.peer.turn_until(lambda count=count: play.swarm.counts.pongs == count)  # type: ignore[misc]
    assert play.swarm.counts.pings == 3
    assert not play.swarm.counts.lost


def test_a_ping_without_an_answer_ends_the_connection(play: Play, clock: Clock) -> None:
    play.begin(ping_interval=60)
    server, _ = play.peer.welcome(4)
    play.peer.turn_until(lambda: play.swarm.online == 1)
    clock.now += 60
    assert isinstance(play.peer.read(server, 4), Pingreq)
    clock.now += 60
    play.peer.turn_until(lambda: play.swarm.counts.lost["no PINGRESP"] == 1)
    clock.now += 1
    play.peer.welcome(4)
    play.peer.turn_until(lambda: play.swarm.online == 1)
    assert play.swarm.counts.pings == 1
    server.close()


def test_a_dropped_device_comes_back(play: Play) -> None:
    play.begin()
    for _ in range(3):
        server, _ = play.peer.welcome(4)
        play.peer.turn_until(lambda: play.swarm.online == 1)
        server.close()
        play.peer.turn_until(lambda: play.swarm.online == 0)
    play.peer.welcome(4)
    play.peer.turn_until(lambda: play.swarm.online == 1)
    assert play.swarm.counts.lost == {"closed": 3}


@pytest.mark.parametrize("reason", [Reason.USE_ANOTHER_SERVER, Reason.SERVER_MOVED])
@pytest.mark.parametrize("packet", [Connack, Disconnect])
def test_a_device_goes_where_it_is_told_to_go(
    play: Play, packet: type[Connack | Disconnect], reason: Reason
) -> None:
    host, port = play.other.address
    told = encode(packet(reason=reason, properties={"server_reference": f"{host}:{port} elsewhere"}), 5)
    play.begin(version=5)
    if packet is Connack:
        server = play.peer.accept()
        play.peer.read(server, 5)
    else:
        server, _ = play.peer.welcome(5)
        play.peer.turn_until(lambda: play.swarm.online == 1)
    server.sendall(told)
    play.other.welcome(5)
    play.peer.turn_until(lambda: play.swarm.online == 1)
    assert play.swarm.counts.moves == 1
    which = play.swarm.counts.failed if packet is Connack else play.swarm.counts.lost
    assert which == {f"{packet.__name__.upper()} {reason.name}": 1}


def test_where_it_was_told_to_go_counts_once(play: Play) -> None:
    host, port = play.other.address
    play.begin(version=5)
    server, _ = play.peer.welcome(5)
    server.sendall(encode(Disconnect(Reason.SERVER_MOVED, {"server_reference": f"{host}:{port}"}), 5))
    there, _ = play.other.welcome(5)
    play.peer.turn_until(lambda: play.swarm.online == 1)
    there.close()
    play.peer.welcome(5)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (4, Reason.BAD_USER_NAME_OR_PASSWORD),
        (4, Reason.NOT_AUTHORIZED),
        (5, Reason.NOT_AUTHORIZED),
        (5, Reason.BANNED),
    ],
)
def test_a_device_that_must_not_come_back_does_not(play: Play, version: int, reason: Reason) -> None:
    play.begin(version=version)
    server = play.peer.accept()
    play.peer.read(server, version)
    server.sendall(encode(Connack(reason=reason), version))
    play.peer.turn_until(lambda: play.swarm.counts.refused == {f"CONNACK {reason.name}": 1})
    assert (play.swarm.online, play.swarm.counts.failed) == (0, {})


@pytest.mark.parametrize(("version", "reason"), [(4, Reason.SERVER_UNAVAILABLE), (5, Reason.SERVER_BUSY)])
def test_a_device_that_is_too_early_tries_again(play: Play, version: int, reason: Reason) -> None:
    play.begin(version=version)
    server = play.peer.accept()
    play.peer.read(server, version)
    server.sendall(encode(Connack(reason=reason), version))
    play.peer.welcome(version)
    play.peer.turn_until(lambda: play.swarm.online == 1)
    assert play.swarm.counts.failed == {f"CONNACK {reason.name}": 1}


def test_a_device_comes_when_it_is_told_to_come(play: Play) -> None:
    play.begin(version=5, pause=10 * PATIENCE, pause_max=10 * PATIENCE)
    server = play.peer.accept()
    play.peer.read(server, 5)
    told = (("retry_after", "0.2"), ("retry_jitter", "0.1"))
    begun = time.perf_counter()
    server.sendall(encode(Connack(reason=Reason.SERVER_BUSY, properties={"user_properties": told}), 5))
    play.peer.welcome(5)
    assert time.perf_counter() - begun >= 0.2


def test_a_server_that_is_not_there_is_tried_again(play: Play) -> None:
    play.begin()
    play.peer.close()
    play.peer.turn_until(lambda: sum(play.swarm.counts.failed.values()) >= 3)
    assert play.swarm.online == 0


def test_a_packet_that_no_device_gets_is_an_error(play: Play) -> None:
    play.begin()
    server, _ = play.peer.welcome(4)
    server.sendall(b"\xf0\x00")
    play.peer.turn_until(lambda: play.swarm.counts.refused == {"got a packet 0xf0": 1})


def test_leaving_says_disconnect_and_stays_away(play: Play) -> None:
    play.begin()
    server, _ = play.peer.welcome(4)
    play.peer.turn_until(lambda: play.swarm.online == 1)
    play.swarm.leave()
    assert isinstance(play.peer.read(server, 4), Disconnect)
    assert (play.swarm.online, play.swarm.wanted) == (0, 0)
    play.swarm.connect(1000.0)
    play.peer.welcome(4)
    play.peer.turn_until(lambda: play.swarm.online == 1)


def test_connects_keep_to_their_rate(play: Play) -> None:
    play.begin(3, rate=1e-3)  # the second is a quarter of an hour away
    play.peer.accept()
    for _ in range(5):
        play.swarm.turn()
    with pytest.raises(BlockingIOError):
        play.peer._listening.accept()


@pytest.mark.parametrize(
    ("reference", "address"),
    [
        ("127.0.0.1:1883", ("127.0.0.1", 1883)),
        ("a.example:1 b.example:2", ("a.example", 1)),
        ("[::1]:8883", ("::1", 8883)),
    ],
)
def test_the_first_place_of_a_reference_is_taken(reference: str, address: Address) -> None:
    assert read_reference(reference) == address


# The hot path


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 65_535)), max_size=6), st.integers(0, 2000))
def test_packets_may_come_in_any_pieces(pushes: list[tuple[int, int]], where: int) -> None:
    whole = b"".join(push_packet(serial, packet_id) for serial, packet_id in pushes) + encode(Pingresp(), 4)
    cut = where % (len(whole) + 1)
    taken: list[int] = []
    others: list[bytes] = []
    acks: list[bytes] = []
    rest = b""
    for piece in (whole[:cut], whole[cut:]):
        found, end = take_pushes(
            5,
            rest + piece,
            2 + len("push"),
            lambda _, serial: taken.append(serial),
            lambda _, other: others.append(other),
        )
        acks += found
        rest = (rest + piece)[end:]
    assert (taken, others, rest) == ([serial for serial, _ in pushes], [encode(Pingresp(), 4)], b"")
    assert acks == [encode(Puback(packet_id), 4) for _, packet_id in pushes]
