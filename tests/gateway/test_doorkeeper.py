"""Who may open a connection, with the clock in hand."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.local_server import LocalServer
from gateway.doorkeeper import BURST, ROUNDING, Doorkeeper, DoorLimits, TurnedAway, source_of
from tests.conftest import StartServer
from tests.gateway.peer import TICK, Closed, Peer, clock_of, counted, device, eventually, works

NOW = 1_000_000.0  # a machine that is up for some days: what is left of a float's digits


def keeper(**limits: Any) -> Doorkeeper:
    return Doorkeeper(DoorLimits(**limits))


def admitted(door: Doorkeeper, source: str, count: int, now: float) -> int:
    return sum(door.admit(source, now) is None for _ in range(count))


def test_nothing_is_limited_by_default() -> None:
    assert DoorLimits().off
    assert not DoorLimits(rate=1).off
    assert admitted(keeper(), "a", 1000, NOW) == 1000


def test_one_address_has_its_connections_and_another_its_own() -> None:
    door = keeper(connections_per_address=2)
    assert [door.admit("a", NOW) for _ in range(3)] == [None, None, TurnedAway.ADDRESS]
    assert door.admit("b", NOW) is None
    door.left("a", NOW)
    assert [door.admit("a", NOW) for _ in range(2)] == [None, TurnedAway.ADDRESS]


@pytest.mark.parametrize("rate", [1, 3, 7, 10, 1000, 30_000])
def test_a_second_s_worth_may_come_at_once_and_then_one_at_a_time(rate: int) -> None:
    door = keeper(rate=rate)
    assert admitted(door, "a", rate + 5, NOW) == rate
    assert door.admit("b", NOW) is TurnedAway.RATE  # it is everybody's
    assert door.admit("a", NOW + 0.9 / rate) is TurnedAway.RATE
    assert admitted(door, "a", 2, NOW + 1.01 / rate) == 1
    assert admitted(door, "a", rate + 5, NOW + 60) == rate  # no more for having waited


def test_an_address_that_is_too_quick_does_not_hold_up_the_others() -> None:
    door = keeper(rate=10, rate_per_address=2)
    assert admitted(door, "a", 1000, NOW) == 2
    assert sum(door.admit(f"b{n}", NOW) is None for n in range(20)) == 8
    assert door.admit("a", NOW + 1) is None


def test_too_many_connections_are_told_from_too_quick_ones() -> None:
    door = keeper(connections_per_address=1, rate_per_address=1)
    door.admit("a", NOW)
    assert door.admit("a", NOW) is TurnedAway.ADDRESS
    door.left("a", NOW)
    assert door.admit("a", NOW) is TurnedAway.RATE
    assert door.admit("a", NOW + 1) is None


def test_refused_addresses_are_not_remembered() -> None:
    door = keeper(rate=1, rate_per_address=1, connections_per_address=1)
    door.admit("a", NOW)
    assert {door.admit(f"b{n}", NOW) for n in range(1000)} == {TurnedAway.RATE}
    assert len(door) == 1


def test_an_address_is_forgotten_with_its_last_connection_where_no_rate_counts() -> None:
    door = keeper(connections_per_address=5)
    for n in range(100):
        door.admit(f"a{n}", NOW)
        door.admit(f"a{n}", NOW)
        door.left(f"a{n}", NOW)
    assert len(door) == 100
    for n in range(100):
        door.left(f"a{n}", NOW)
    assert len(door) == 0


def test_leaving_does_not_fill_a_bucket() -> None:
    door = keeper(rate_per_address=1)
    for tenth in range(10):
        now = NOW + tenth / 10
        assert (door.admit("a", now) is None) is (tenth == 0)
        if not tenth:
            door.left("a", now)
    assert len(door) == 1
    door.admit("b", NOW + 1.1)
    assert len(door) == 1  # b; a was forgotten a second after it went
    door.left("b", NOW + 1.1)
    door.admit("c", NOW + 2.2)
    door.left("c", NOW + 10)
    assert len(door) == 0


visits = st.lists(
    st.tuples(st.sampled_from(["come", "go"]), st.sampled_from("abcd"), st.floats(0, 0.7), st.integers(0, 3)),
    max_size=60,
)


@given(
    visits,
    st.none() | st.integers(1, 5),
    st.none() | st.integers(1, 5),
    st.none() | st.integers(1, 3),
)
def test_no_limit_is_passed_and_nobody_remembered_without_need(
    visits: list[tuple[str, str, float, int]], most: int | None, rate: int | None, per_address: int | None
) -> None:
    door = keeper(connections_per_address=most, rate=rate, rate_per_address=per_address)
    now, here, let_in, gone = NOW, Counter[str](), list[tuple[float, str]](), dict[str, float]()
    for what, source, pause, times in visits:
        now += pause
        if what == "come":
            for _ in range(times):
                if door.admit(source, now) is None:
                    here[source] += 1
                    let_in.append((now, source))
                assert len(door) <= len({*+here, *(who for who, when in gone.items() if now < when + BURST)})
        elif here[source]:
            door.left(source, now)
            here[source] -= 1
            gone[source] = now
        assert most is None or max(here.values(), default=0) <= most
        lately = [who for when, who in let_in if when > now - BURST + ROUNDING]
        # In any second: what the bucket held, and what ran into it meanwhile.
        assert rate is None or len(lately) <= 2 * rate
        assert per_address is None or max(Counter(lately).values(), default=0) <= 2 * per_address
    for source, count in here.items():
        for _ in range(count):
            door.left(source, now)
    door.admit("later", now + 2)
    door.left("later", now + 4)
    door.admit("last", now + 8)
    assert len(door) == 1


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::1", "::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_an_address_is_counted_as(host: str, source: str) -> None:
    assert source_of((host, 1883)) == source


@pytest.mark.parametrize("name", [None, "/run/some.socket", b""])
def test_who_has_no_address_is_counted_together(name: object) -> None:
    assert source_of(name) == ""


# Against a server


@contextlib.contextmanager
def crowd(address: tuple[str, int], count: int, source: str = "127.0.0.1") -> Iterator[list[Peer]]:
    """So many connections from one address."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Peer(address, source=source)) for _ in range(count)]


def closed(peers: list[Peer]) -> int:
    return sum(peer.is_closed() for peer in peers)


def refused(reason: TurnedAway) -> str:
    return f'refusals_total{{reason="{reason}"}}'


@pytest.mark.parametrize("listener", ["mqtt", "ws"])
def test_a_server_lets_in_so_many_of_one_address(start_server: StartServer, listener: str) -> None:
    server = start_server("--mqtt-max-connections-per-address", "3")
    address = getattr(server.addresses, listener)
    with crowd(address, 1, "127.0.0.2") as [other]:
        with counted(server, refused(TurnedAway.ADDRESS), by=7), crowd(address, 10) as peers:
            eventually(lambda: closed(peers) == 7)
            assert not other.is_closed()
        eventually(lambda: server.metrics()["holdfast_connections_opening"] == 1)
        with crowd(address, 3) as peers:  # the first three have gone
            eventually(lambda: server.metrics()["holdfast_connections_opening"] == 4)
            assert closed(peers) == 0
    works(server)


def test_a_server_lets_in_so_many_in_a_second(start_server: StartServer) -> None:
    server = start_server("--mqtt-connect-rate", "5")
    began = clock_of(server)
    with crowd(server.addresses.mqtt, 100) as peers:
        eventually(lambda: server.metrics()["holdfast_connections_opening"] + turned_away(server) == 100)
        let_in = 100 - turned_away(server)
        assert 5 <= let_in <= 5 * (time.monotonic() - began + TICK + BURST) + 1
        eventually(lambda: closed(peers) == 100 - let_in)
    eventually(lambda: lets_in(server))


def turned_away(server: LocalServer) -> float:
    return server.metrics().get(f"holdfast_{refused(TurnedAway.RATE)}", 0)


def lets_in(server: LocalServer) -> bool:
    try:
        with device(server, "patient"):
            return True
    except (Closed, ConnectionError):
        return False
