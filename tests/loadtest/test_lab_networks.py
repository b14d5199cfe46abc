"""The lab's networks and plans: what may be said, and what follows from a seed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.lab.networks import EVER, NETWORKS, Event, Network, NetworkError, read_networks
from loadtest.lab.plan import oracle_heartbeats, plan_pushes, read_serial

QUICK = NETWORKS.with_name("quick.toml")


def _network(**given: Any) -> Network:
    return Network(name="test", title="a test", **given)


@pytest.mark.parametrize("file", [NETWORKS, QUICK], ids=lambda file: file.name)
def test_what_comes_along_can_be_read(file: Path) -> None:
    lab = read_networks(file)
    assert lab.network
    for network in lab.network:
        assert plan_pushes(network, lab.seed), network.name


def test_the_long_form_has_what_the_issue_asks_for() -> None:
    networks = read_networks().network
    assert {network.loss for network in networks} >= {0.01, 0.05, 0.1, 0.2}
    assert any(network.burst for network in networks)
    assert {network.forget for network in networks} >= {45, 60, 300}
    assert {2 * network.delay for network in networks} >= {0.1, 0.2, 0.6}
    assert {network.rate for network in networks} >= {16_000, 64_000, 256_000}
    assert any(network.mtu for network in networks)
    events = [event for network in networks for event in network.event]
    assert {event.what for event in events} == {"dead", "moved", "edge"}
    assert {event.way for event in events if event.what == "dead"} == {"both", "up", "down"}


def test_the_short_form_is_short() -> None:
    assert max(network.end for network in read_networks(QUICK).network) <= 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('name = "x"', "title"),
        ('name = "X"\ntitle = "x"', "name"),
        ('name = "x"\ntitle = "x"\nloss = 1.5', "loss"),
        ('name = "x"\ntitle = "x"\nlosses = 0.5', "losses"),
        ('name = "x"\ntitle = "x"\nevent = [{ what = "rain", at = 1 }]', "rain"),
        ('name = "x"\ntitle = "x"\nevent = [{ what = "dead", at = 1, address = 2 }]', "address 2 of 1"),
        ('name = "x"\ntitle = "x"\nevent = [{ what = "dead", at = 5, until = 5 }]', "from 5.0 until 5.0"),
        ('name = "x"\ntitle = "x"\nevent = [{ what = "edge", at = 5, address = 1 }]', "one address of two"),
        ('name = "x"\ntitle = "x"\nevent = [{ what = "dead", at = 1, told = true }]', "nothing else"),
        ('name = "x"\ntitle = "x"\nlearn = 600', "learn"),
        ('name = "x"\ntitle = "x"\ntext = []', "text"),
        ('name = "x"\ntitle = "x"\ntext = [3]', "text"),
        ('name = "x"\ntitle = "x"\nburst = 2', "no time is lost"),
        ('name = "x"\ntitle = "x"\n[[network]]\nname = "x"\ntitle = "y"', "two networks"),
        ("name = ", "Invalid"),
    ],
)
def test_a_wrong_file_is_refused_by_name_and_reason(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "networks.toml"
    file.write_text(f"[[network]]\n{text}\n")
    with pytest.raises(NetworkError, match=expected) as raised:
        read_networks(file)
    assert str(file) in str(raised.value)


def test_a_file_that_is_not_there_is_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="No such file"):
        read_networks(tmp_path / "none.toml")


def test_an_event_once() -> None:
    event = Event(what="dead", at=10, until=20)
    assert [event.is_on(at) for at in (9.9, 10, 19.9, 20, 1000)] == [False, True, True, False, False]
    assert event.times(100) == [10]
    assert event.times(5) == []


def test_an_event_again_and_again() -> None:
    event = Event(what="dead", at=10, until=20, every=30)
    assert [event.is_on(at) for at in (9.9, 10, 20, 39.9, 40, 49.9, 50)] == [
        False,
        True,
        False,
        False,
        True,
        True,
        False,
    ]
    assert event.times(100) == [10, 40, 70, 100]


def test_an_event_without_end() -> None:
    assert Event(what="dead", at=10).is_on(EVER / 2)


# Plans


def test_a_plan_follows_from_the_seed_alone() -> None:
    network = _network()
    assert plan_pushes(network, 1) == plan_pushes(network, 1)
    assert plan_pushes(network, 1) != plan_pushes(network, 2)


@given(st.integers(1, 20), st.floats(5, 60), st.integers(0, 1000))
def test_a_plan_is_in_order_and_within_its_time(devices: int, every: float, seed: int) -> None:
    network = _network(devices=devices, every=every, seconds=600, learn=60, text=(12, 400))
    plan = plan_pushes(network, seed, 500)
    assert [push.serial for push in plan] == list(range(500, 500 + len(plan)))
    assert all(before.at <= after.at for before, after in pairwise(plan))
    for push in plan:
        assert 0 < push.at < 600
        assert push.counted == (push.at >= 60)
        assert read_serial(push.text) == push.serial
        assert len(push.text) in (12, 400)


def test_as_many_pushes_as_was_said() -> None:
    plan = plan_pushes(_network(devices=50, every=10, seconds=1000), 1)
    assert len(plan) == pytest.approx(50 * 100, rel=0.05)


def test_an_oracle_sends_just_before_the_nat_forgets() -> None:
    network = _network(forget=61, seconds=3500, drain=100, devices=1, every=1e9)
    assert oracle_heartbeats(network, []) == pytest.approx(60)
    plan = plan_pushes(_network(forget=61, seconds=3500, devices=4, every=100), 1)
    busy = _network(forget=61, seconds=3500, drain=100, devices=4)
    assert 0 < oracle_heartbeats(busy, plan) < 60, "a push takes the place of a heartbeat"
    assert oracle_heartbeats(_network(), []) == 0
