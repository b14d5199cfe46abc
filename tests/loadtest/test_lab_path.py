"""A path of the lab, packet by packet: what is lost, when the others arrive, and what a NAT forgets."""

from __future__ import annotations

import socket
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.lab import path as path_module
from loadtest.lab.networks import Event, Network
from loadtest.lab.packets import End, Segment, read_segment
from loadtest.lab.path import FIRST_PORT, Lane, Nat, Path
from tests.loadtest.lab_packets import make_packet

PUBLIC = [socket.inet_aton("10.0.1.1"), socket.inet_aton("10.0.2.1")]
SERVERS = [socket.inet_aton("172.30.0.1"), socket.inet_aton("172.30.0.2")]
DEVICE: End = (socket.inet_aton("192.168.0.2"), 4000)
SERVER: End = (SERVERS[0], 1883)
OTHER: End = (SERVERS[1], 1883)
SYN = 0x02


def _network(**given: Any) -> Network:
    return Network(name="test", title="a test", **given)


def _path(seed: str = "1", **given: Any) -> Path:
    return Path(_network(**given), seed, PUBLIC, SERVERS)


def _up(path: Path, now: float, *, flags: int = 0x10, to: End = SERVER, payload: bytes = b"") -> Any:
    return path.up(make_packet(DEVICE, to, payload, flags=flags), now)


def _down(path: Path, now: float, *, port: int = FIRST_PORT, origin: End = SERVER, size: int = 0) -> Any:
    return path.down(make_packet(origin, (PUBLIC[0], port), bytes(size)), now)


def _segment(packet: bytes) -> Segment:
    segment = read_segment(packet)
    assert segment is not None
    return segment


# Lanes


@pytest.mark.parametrize("loss", [0.01, 0.1, 0.2])
def test_as_many_are_lost_as_was_said(loss: float) -> None:
    lane = Lane(_network(loss=loss), "seed")
    fates = [lane.loses(0.0) for _ in range(100_000)]
    runs = [len(list(run)) for lost, run in groupby(fates) if lost]
    assert sum(fates) / len(fates) == pytest.approx(loss, rel=0.1)
    assert sum(runs) / len(runs) == pytest.approx(1 / (1 - loss), rel=0.1), "each by itself"


@pytest.mark.parametrize("burst", [0.2, 1, 5])
@pytest.mark.parametrize("loss", [0.05, 0.2])
def test_bursts_are_as_long_and_as_much_of_the_time_as_was_said(loss: float, burst: float) -> None:
    lane = Lane(_network(loss=loss, burst=burst), "seed")
    step = burst / 20
    fates = [lane.loses(100 + n * step) for n in range(400_000)]
    runs = [len(list(run)) for lost, run in groupby(fates) if lost]
    assert sum(fates) / len(fates) == pytest.approx(loss, rel=0.15)
    assert step * sum(runs) / len(runs) == pytest.approx(burst, rel=0.15)


def test_bursts_come_at_the_same_times_whoever_sends_more() -> None:
    busy, calm = (Lane(_network(loss=0.3, burst=1), "1") for _ in range(2))
    busy.loses(3.0)
    for lane in (busy, calm):
        lane.start(10.0)
    for n in range(1000):
        busy.loses(10 + n * 0.1 - 0.05 if n else 10.0)
        assert busy.loses(10 + n * 0.1) == calm.loses(10 + n * 0.1)


def test_nothing_is_lost_where_nothing_was_said() -> None:
    lane = Lane(_network(), "seed")
    assert not any(lane.loses(0.0) for _ in range(1000))


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(40, 1500)), max_size=50), st.integers(0, 300_000))
@settings(deadline=None)
def test_packets_stay_in_order_and_take_the_delay_at_least(steps: list[tuple[float, int]], rate: int) -> None:
    lane = Lane(_network(delay=0.1, jitter=0.05, rate=rate), "seed")
    now, last = 0.0, 0.0
    for pause, size in steps:
        now += pause
        arrival = lane.arrival(size, now)
        if arrival is not None:
            assert arrival >= now + 0.1
            assert arrival >= last
            last = arrival


def test_a_thin_link_takes_its_time_and_its_queue_is_bounded() -> None:
    lane = Lane(_network(rate=8000, queue=1.5), "seed")
    assert [lane.arrival(1000, 0.0) for _ in range(4)] == [1.0, 2.0, None, None]
    assert lane.arrival(1000, 10.0) == 11.0, "idle time is not saved up"


def test_the_same_seed_loses_the_same_packets_and_another_one_others() -> None:
    def fates(seed: str) -> list[bool]:
        lane = Lane(_network(loss=0.3, jitter=0.1), seed)
        return [lane.loses(0.0) for _ in range(100)]

    assert fates("1") == fates("1")
    assert fates("1") != fates("2")


def test_jitter_does_not_change_what_is_lost() -> None:
    still, shaken = (Lane(_network(loss=0.3, jitter=jitter), "1") for jitter in (0.0, 0.1))
    fates = []
    for _ in range(100):
        fates.append((still.loses(0.0), shaken.loses(0.0)))
        shaken.arrival(100, 0.0)
    assert all(one == other for one, other in fates)


# The NAT


def _out(nat: Nat, now: float, *, flags: int = 0x10, source: End = DEVICE) -> bytes | None:
    packet = make_packet(source, SERVER, flags=flags)
    return nat.outwards(packet, _segment(packet), now)


def _in(nat: Nat, now: float, end: End) -> bytes | None:
    packet = make_packet(SERVER, end)
    return nat.inwards(packet, _segment(packet), now)


def test_the_server_sees_the_public_address_and_its_answer_finds_the_device() -> None:
    nat = Nat(60, PUBLIC)
    outside = _out(nat, 0.0, flags=SYN)
    assert outside is not None
    assert _segment(outside).source == (PUBLIC[0], FIRST_PORT)
    inside = _in(nat, 1.0, (PUBLIC[0], FIRST_PORT))
    assert inside is not None
    assert _segment(inside).target == DEVICE


def test_after_its_silence_a_flow_is_forgotten_in_both_directions_until_a_new_syn() -> None:
    nat = Nat(60, PUBLIC)
    _out(nat, 0.0, flags=SYN)
    assert _in(nat, 60.0, (PUBLIC[0], FIRST_PORT)) is not None, "and this wakes it"
    assert _out(nat, 120.0) is not None
    assert _in(nat, 180.5, (PUBLIC[0], FIRST_PORT)) is None
    assert _out(nat, 180.5) is None
    again = _out(nat, 181.0, flags=SYN)
    assert again is not None
    assert _segment(again).source == (PUBLIC[0], FIRST_PORT + 1)


def test_a_nat_without_a_limit_remembers() -> None:
    nat = Nat(0, PUBLIC)
    _out(nat, 0.0, flags=SYN)
    assert _out(nat, 1e9) is not None


def test_who_moved_has_another_address_and_nothing_of_before() -> None:
    nat = Nat(0, PUBLIC)
    _out(nat, 0.0, flags=SYN)
    nat.move()
    assert _out(nat, 1.0) is None
    assert _in(nat, 1.0, (PUBLIC[0], FIRST_PORT)) is None
    again = _out(nat, 2.0, flags=SYN)
    assert again is not None
    assert _segment(again).source[0] == PUBLIC[1]


def test_the_longest_silent_flow_goes_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_module, "MAX_FLOWS", 2)
    nat = Nat(0, PUBLIC)
    first, second, third = ((DEVICE[0], port) for port in (1, 2, 3))
    for source in (first, second, first, third):
        _out(nat, 0.0, flags=SYN, source=source)
    assert _out(nat, 0.0, source=second) is None
    assert _out(nat, 0.0, source=first) is not None


# Paths


def test_a_path_delays_both_ways() -> None:
    path = _path(delay=0.1)
    assert _up(path, 1.0, flags=SYN)[0] == pytest.approx(1.1)
    assert _down(path, 2.0)[0] == pytest.approx(2.1)


def test_what_is_lost_on_the_way_does_not_wake_the_nat() -> None:
    path = _path(forget=60, event=(Event(what="dead", way="up", at=1, until=50),))
    _up(path, 0.0, flags=SYN)
    path.start(0.0)
    assert _up(path, 30.0) is None
    assert _up(path, 70.0) is None
    assert (path.counts.dead, path.counts.forgotten) == (1, 1)


def test_long_packets_vanish() -> None:
    path = _path(mtu=100)
    _up(path, 0.0, flags=SYN)
    assert _down(path, 0.0, size=60) is not None
    assert _down(path, 0.0, size=61) is None
    assert path.counts.too_long == 1
    whole = make_packet(SERVER, (PUBLIC[0], FIRST_PORT), bytes(61), whole=False)
    assert path.down(whole, 0.0) is not None, "a router may cut this one"


@pytest.mark.parametrize(
    ("way", "up", "down"), [("both", False, False), ("up", False, True), ("down", True, False)]
)
def test_a_dead_direction_is_dead_in_its_time(way: Any, up: bool, down: bool) -> None:
    path = _path(event=(Event(what="dead", way=way, at=10, until=20),))
    _up(path, 0.0, flags=SYN)
    path.start(100.0)
    for now, alive in ((109.0, True), (110.0, False), (119.9, False), (120.0, True)):
        assert (_up(path, now) is not None) is (alive or up), now
        assert (_down(path, now) is not None) is (alive or down), now


@pytest.mark.parametrize("what", ["dead", "edge"])
def test_a_dead_address_leaves_the_other_alive(what: Any) -> None:
    path = _path(addresses=2, event=(Event(what=what, address=1, at=10),))
    _up(path, 0.0, flags=SYN)
    _up(path, 0.0, flags=SYN, to=OTHER)
    path.start(0.0)
    assert _up(path, 10.0) is None
    assert _up(path, 10.0, to=OTHER) is not None
    assert _down(path, 10.0) is None
    assert _down(path, 10.0, origin=OTHER, port=FIRST_PORT + 1) is not None


def test_who_moves_is_cut_off_each_time_once() -> None:
    path = _path(event=(Event(what="moved", at=10, every=20),))
    path.start(0.0)
    _up(path, 0.0, flags=SYN)
    assert _up(path, 9.0) is not None
    assert _up(path, 10.0) is None
    _up(path, 11.0, flags=SYN)
    assert _up(path, 29.0) is not None
    assert _up(path, 30.0) is None


def test_before_the_start_no_event_happens() -> None:
    path = _path(event=(Event(what="dead", at=0),))
    assert _up(path, 1e6, flags=SYN) is not None


def test_what_was_sent_is_counted_and_heartbeats_once() -> None:
    path = _path(loss=0.99, event=(Event(what="dead", at=0),))
    path.start(0.0)
    for payload in (b"\xc0\x00", b"\xc0\x00", b"\x30\x00", b"\xc0\x00\xc0\x00"):
        _up(path, 1.0, payload=payload)
    _down(path, 1.0, size=10)
    counts = path.counts
    assert (counts.up, counts.down, counts.heartbeats) == (4, 1, 1), "a repeated PINGREQ is TCP's"
    assert counts.up_bytes == 4 * 40 + 10
    assert counts.down_bytes == 50
    path.up(make_packet(DEVICE, SERVER, b"\xc0\x00", sequence=100), 2.0)
    assert counts.heartbeats == 2


def test_what_the_start_finds_is_not_counted() -> None:
    path = _path()
    _up(path, 0.0, flags=SYN)
    path.start(0.0)
    assert path.counts.as_dict()["up"] == 0


def test_what_comes_when_the_time_is_over_is_not_counted() -> None:
    path = _path(seconds=100, drain=20, loss=0.5)
    path.start(0.0)
    _up(path, 120.0, flags=SYN)
    before = path.counts.as_dict()
    for _ in range(20):
        _up(path, 120.5, payload=b"\xc0\x00")
        _down(path, 120.5)
    assert path.counts.as_dict() == before
    assert before["up"] == 1


def test_what_is_no_flow_goes_nowhere() -> None:
    path = _path()
    assert path.up(b"\x60" + bytes(60), 0.0) is None
    assert path.down(b"\x60" + bytes(60), 0.0) is None


def test_a_full_queue_is_counted() -> None:
    path = _path(rate=8000, queue=0.04)
    _up(path, 0.0, flags=SYN)
    assert _up(path, 0.0) is None or _up(path, 0.0) is None
    assert path.counts.full >= 1
