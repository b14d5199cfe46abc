"""What the kernel says of connections: its record, and the sample of connections that are looked at."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.metrics import Metrics
from gateway.connection import Connection
from gateway.metrics import NodeMetrics
from gateway.tcp_info import (
    COHORT,
    COUNTER_MASK,
    LOOK_PAUSE,
    LOOKS_AT_ONCE,
    RTT_BOUNDS,
    STAY,
    TcpSamples,
    parse_tcp_info,
    read_tcp_info,
)
from tests.conftest import StartServer
from tests.gateway.connected import Held, pair
from tests.gateway.peer import device, eventually, push, works

NOW = 1_000_000.0

# Where linux/tcp.h has them.
OFFSETS = {
    "retransmits": (2, "B"),
    "snd_mss": (16, "I"),
    "unacked": (24, "I"),
    "rtt": (68, "I"),
    "rttvar": (72, "I"),
    "total_retrans": (100, "I"),
    "segs_out": (136, "I"),
    "data_segs_out": (156, "I"),
}
TIMES = {"rtt", "rttvar"}
SIZE = 160  # up to Linux 4.6's last


def record(**values: int) -> bytes:
    """struct tcp_info with these values, and others where nobody should look."""
    raw = bytearray(b"\xa5" * 280)
    for name, (offset, kind) in OFFSETS.items():
        struct.pack_into(f"={kind}", raw, offset, values.get(name, 0))
    return bytes(raw)


by_kind = {"B": st.integers(0, 255), "I": st.integers(0, COUNTER_MASK)}


@settings(deadline=None)
@given(st.fixed_dictionaries({name: by_kind[kind] for name, (_, kind) in OFFSETS.items()}))
def test_each_value_is_where_the_kernel_has_it(values: dict[str, int]) -> None:
    info = parse_tcp_info(record(**values))
    assert info is not None
    expected = {name: value / 1_000_000 if name in TIMES else value for name, value in values.items()}
    assert info._asdict() == pytest.approx(expected)


def test_what_an_older_kernel_says_is_not_enough() -> None:
    assert parse_tcp_info(record()[: SIZE - 1]) is None
    assert parse_tcp_info(record()[:SIZE]) is not None
    assert parse_tcp_info(b"") is None


def test_the_kernel_counts_what_was_sent() -> None:
    with pair() as (ours, theirs):
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(5):
            ours.sendall(b"push")
            assert theirs.recv(4) == b"push"
        info = read_tcp_info(Held(ours))
        assert info is not None
        assert info.data_segs_out == 5
        assert info.segs_out >= 5
        assert 0 < info.rtt < 1
        assert info.snd_mss > 500
        assert info.total_retrans == info.retransmits == 0


def test_there_is_nothing_to_see_of_what_is_no_tcp_connection() -> None:
    with pair() as (ours, _):
        pass
    assert read_tcp_info(Held(ours)) is None  # closed
    assert read_tcp_info(Held(None)) is None
    one, other = socket.socketpair()
    with one, other:
        assert read_tcp_info(Held(one)) is None


# The sample


class Kernel:
    """Answers as a socket does."""

    def __init__(self) -> None:
        self.segments = self.again = 0
        self.rtt = 40_000  # us
        self.looks = 0
        self.first: int | None = None  # segments at the first look
        self.closed = False

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO)
        if self.closed:
            raise OSError(9, "Bad file descriptor")
        self.looks += 1
        self.first = self.segments if self.first is None else self.first
        raw = record(data_segs_out=self.segments & COUNTER_MASK, total_retrans=self.again, rtt=self.rtt)
        return raw[:size]

    def sends(self, segments: int, again: int = 0) -> None:
        self.segments += segments
        self.again += again


@dataclass(eq=False)
class Device:
    """What the sample needs of a connection."""

    carrier: str = "default"
    session: object = "its session"
    direct: bool = True
    proxy: str = ""
    kernel: Kernel = field(default_factory=Kernel)

    @property
    def profile(self) -> Any:
        return SimpleNamespace(name=self.carrier)

    @property
    def transport(self) -> Held:
        return Held(self.kernel)


class Watcher:
    """A sample, its clock, and what it counted."""

    def __init__(self) -> None:
        self.metrics = NodeMetrics(Metrics(process=False))
        self.samples = TcpSamples(self.metrics)
        self.learned: list[tuple[str, float, int, int]] = []
        self.samples.learn = lambda of, *told: self.learned.append((of.profile.name, *told))
        self.now = NOW

    def tick(self, *due: Device, after: float = 0.25) -> None:
        self.now += after
        self.samples.tick(cast("list[Connection]", list(due)), self.now)

    def left(self, device: Device) -> None:
        self.samples.left(cast("Connection", device))

    def counted(self, carrier: str = "default") -> tuple[int, int]:
        """Segments, and repeated ones."""
        metrics = self.metrics
        return (
            int(metrics.tcp_segments.labels(carrier).value),
            int(metrics.tcp_retransmits.labels(carrier).value),
        )

    def round_trips(self, carrier: str = "default") -> int:
        return sum(self.metrics.tcp_rtt.labels(carrier).counts)


def test_what_a_connection_did_before_it_was_watched_does_not_count() -> None:
    watcher, phone = Watcher(), Device()
    phone.kernel.sends(1000, again=30)
    watcher.tick(phone)
    assert watcher.counted() == (0, 0)
    phone.kernel.sends(10, again=2)
    watcher.tick(after=LOOK_PAUSE)
    assert watcher.counted() == (10, 2)


def test_one_that_is_watched_is_looked_at_again_after_a_pause() -> None:
    watcher, phone = Watcher(), Device()
    watcher.tick(phone)
    for _ in range(10):
        watcher.tick(phone, after=LOOK_PAUSE / 20)
    assert phone.kernel.looks == 1
    watcher.tick(after=LOOK_PAUSE / 2)
    assert phone.kernel.looks == 2


def test_the_end_of_a_connection_counts() -> None:
    watcher, phone = Watcher(), Device()
    watcher.tick(phone)
    phone.kernel.sends(8, again=7)
    watcher.left(phone)
    assert watcher.counted() == (8, 7)
    assert len(watcher.samples) == 0
    watcher.tick(after=LOOK_PAUSE)
    assert phone.kernel.looks == 2


def test_one_that_is_closed_already_is_forgotten() -> None:
    watcher, phone, other = Watcher(), Device(), Device()
    watcher.tick(phone, other)
    phone.kernel.closed = True
    watcher.left(phone)
    other.kernel.closed = True
    watcher.tick(after=LOOK_PAUSE)
    assert len(watcher.samples) == 0
    watcher.left(other)
    assert watcher.counted() == (0, 0)


def test_round_trips_count_while_there_is_traffic() -> None:
    watcher, phone = Watcher(), Device()
    watcher.tick(phone)
    assert watcher.round_trips() == 1
    watcher.tick(after=LOOK_PAUSE)
    assert watcher.round_trips() == 1  # it is the same one
    phone.kernel.sends(1)
    watcher.tick(after=LOOK_PAUSE)
    assert watcher.round_trips() == 2
    phone.kernel.rtt = 0  # not known
    phone.kernel.sends(1)
    watcher.tick(after=LOOK_PAUSE)
    assert watcher.round_trips() == 2
    assert watcher.counted() == (2, 0)
    assert watcher.metrics.tcp_rtt.labels("default").total == pytest.approx(0.08)
    assert list(RTT_BOUNDS) == sorted(RTT_BOUNDS)


def test_each_carrier_has_its_own_and_the_learner_hears_the_same() -> None:
    watcher, fast, lossy = Watcher(), Device("wifi"), Device("satellite")
    watcher.tick(fast, lossy)
    fast.kernel.sends(100)
    lossy.kernel.sends(50, again=9)
    watcher.tick(after=LOOK_PAUSE)
    assert watcher.counted("wifi") == (100, 0)
    assert watcher.counted("satellite") == (50, 9)
    assert watcher.learned[2:] == [("wifi", 0.04, 100, 0), ("satellite", 0.04, 50, 9)]


def test_counts_that_begin_anew_are_no_leap() -> None:
    watcher, phone = Watcher(), Device()
    phone.kernel.segments = COUNTER_MASK - 2
    watcher.tick(phone)
    phone.kernel.sends(10)
    watcher.tick(after=LOOK_PAUSE)
    assert watcher.counted() == (10, 0)


@pytest.mark.parametrize(
    "other",
    [Device(session=None), Device(direct=False), Device(proxy="192.0.2.1")],
    ids=["no CONNECT yet", "of another node", "of a proxy"],
)
def test_who_is_no_device_at_the_end_of_a_socket_is_not_watched(other: Device) -> None:
    watcher = Watcher()
    watcher.tick(other)
    assert len(watcher.samples) == other.kernel.looks == 0


def test_others_get_their_turn() -> None:
    """Or those that live long would be all that is ever seen."""
    watcher, old = Watcher(), [Device() for _ in range(COHORT)]
    while len(watcher.samples) < COHORT:
        watcher.tick(*[phone for phone in old if not phone.kernel.looks])
    new = Device()
    watcher.tick(new)
    assert not was_seen(new)
    for _ in range(int(STAY / LOOK_PAUSE) + 1):
        for _ in range(COHORT // LOOKS_AT_ONCE):
            watcher.tick(after=LOOK_PAUSE / 16)
    watcher.tick(new)
    assert was_seen(new)


def was_seen(device: Device) -> bool:
    return device.kernel.looks > 0


def test_a_tick_looks_at_some_only() -> None:
    watcher, crowd = Watcher(), [Device() for _ in range(10_000)]
    watcher.tick(*crowd)
    assert sum(phone.kernel.looks for phone in crowd) == LOOKS_AT_ONCE
    for _ in range(200):
        watcher.tick(*[phone for phone in crowd if not phone.kernel.looks], after=0.0)
    assert len(watcher.samples) == COHORT
    before = sum(phone.kernel.looks for phone in crowd)
    watcher.tick(after=LOOK_PAUSE)
    assert sum(phone.kernel.looks for phone in crowd) == before + LOOKS_AT_ONCE


steps = st.lists(
    st.tuples(
        st.sampled_from(["send", "due", "tick", "leave"]),
        st.integers(0, 4),
        st.integers(0, 9),
        st.floats(0, 7),
    ),
    max_size=80,  # so that nobody's stay ends
)


@settings(deadline=None)
@given(steps)
def test_all_that_is_sent_from_the_first_look_to_the_end_counts_and_counts_once(
    steps: list[tuple[str, int, int, float]],
) -> None:
    watcher, phones, gone = Watcher(), [Device() for _ in range(5)], list[Device]()
    for what, n, count, pause in steps:
        match what:
            case "send":
                phones[n].kernel.sends(count, again=count // 3)
            case "due":
                watcher.tick(phones[n], after=pause)
            case "tick":
                watcher.tick(after=pause)
            case _:
                watcher.left(phones[n])
                gone.append(phones[n])
                phones[n] = Device()
    for phone in phones:
        watcher.left(phone)
    seen = [phone.kernel for phone in (*gone, *phones) if phone.kernel.first is not None]
    assert watcher.counted()[0] == sum(kernel.segments - (kernel.first or 0) for kernel in seen)
    assert watcher.counted()[1] <= watcher.counted()[0]


# A server


def test_a_server_says_what_its_kernel_measured(start_server: StartServer) -> None:
    server = start_server()
    with device(server, "phone") as peer:
        name = 'holdfast_tcp_segments_total{carrier="default"}'
        eventually(lambda: name in server.metrics())
        for _ in range(5):
            push(server, server.app, "phone")
            peer.push()
    eventually(lambda: server.metrics()[name] >= 5)  # the last look is at the end
    metrics = server.metrics()
    assert metrics['holdfast_tcp_rtt_seconds_count{carrier="default"}'] >= 2
    # None, unless the machine stood still for longer than TCP waits.
    assert metrics['holdfast_tcp_retransmits_total{carrier="default"}'] < metrics[name]
    works(server)
