"""Which addresses are tried, when and in what order: no socket, no clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.addresses import (
    GOOD_FOR,
    MAX_ADDRESSES,
    MOST_BAN,
    ONE_ROUND,
    PACE,
    SILENT_DEATHS,
    Abandon,
    Address,
    AddressBook,
    Hints,
    Race,
    Try,
    greeting_limit,
)

A, B, C, D, E = (Address(f"10.0.0.{n}", 1883) for n in range(1, 6))
NAMED = Address("push.example.net", 8883, "tls")
HINTS = Hints(stagger=2.5, parallel=3, ban=360, attempt=10)
NOW = 1_800_000_000.0


# Addresses


@pytest.mark.parametrize(
    ("text", "address", "again"),
    [
        ("10.0.0.1", Address("10.0.0.1", 1883), "tcp://10.0.0.1:1883"),
        ("10.0.0.1:99", Address("10.0.0.1", 99), "tcp://10.0.0.1:99"),
        ("push.example.net:80", Address("push.example.net", 80), "tcp://push.example.net:80"),
        ("tls://push.example.net:443", Address("push.example.net", 443, "tls"), "tls://push.example.net:443"),
        ("wss://push.example.net", Address("push.example.net", 1883, "wss"), "wss://push.example.net:1883"),
        ("::1", Address("::1", 1883), "tcp://[::1]:1883"),
        ("2001:db8::7", Address("2001:db8::7", 1883), "tcp://[2001:db8::7]:1883"),
        ("[::1]", Address("::1", 1883), "tcp://[::1]:1883"),
        ("[::1]:99", Address("::1", 99), "tcp://[::1]:99"),
        ("ws://[::1]:99", Address("::1", 99, "ws"), "ws://[::1]:99"),
    ],
)
def test_addresses_as_text(text: str, address: Address, again: str) -> None:
    assert Address.read(text) == address
    assert str(address) == again
    assert Address.read(again) == address


@pytest.mark.parametrize(
    "text",
    ["", ":1883", "tcp://", "host:nine", "host:0", "host:65536", "host:-1", "udp://host:1", "http://h"],
)
def test_what_is_no_address_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="address") as caught:
        Address.read(text)
    assert repr(text) in str(caught.value)


def test_port_and_transport_have_defaults() -> None:
    assert Address.read("host", port=8883, transport="tls") == Address("host", 8883, "tls")
    assert Address.read("tcp://host:1", port=8883, transport="tls") == Address("host", 1)


def test_a_literal_keeps_the_name_of_the_certificate() -> None:
    literal = NAMED.at("192.0.2.1")
    assert (literal.host, literal.name, literal.port, literal.transport) == (
        "192.0.2.1", "push.example.net", 8883, "tls",
    )  # fmt: skip
    assert (NAMED.literal, literal.literal, Address("::1", 1).literal) == (False, True, True)
    assert literal.at("192.0.2.2").name == "push.example.net"
    assert [address.secret for address in (A, NAMED, Address("h", 1, "ws"), Address("h", 1, "wss"))] == [
        False, True, False, True,
    ]  # fmt: skip


# One round


class Round:
    """A race, and its clock."""

    def __init__(self, *addresses: Address, hints: Hints = HINTS) -> None:
        self.now = 0.0
        self.race = Race(addresses, hints, self.now)

    def at(self, now: float) -> list[Try | Abandon]:
        self.now = now
        return self.race.tick(now)

    def fails(self, address: Address) -> list[Try | Abandon]:
        self.race.failed(address, "refused", self.now)
        return self.race.tick(self.now)


def test_the_first_at_once_and_the_next_after_a_stagger() -> None:
    story = Round(A, B, C)
    assert story.at(0) == [Try(A)]
    assert story.race.deadline == 2.5
    assert story.at(2.4) == []
    assert story.at(2.5) == [Try(B)]
    assert story.at(5.0) == [Try(C)]
    assert story.race.deadline is None


def test_a_failure_brings_the_next_one_at_once() -> None:
    story = Round(A, B, C)
    story.at(0)
    story.now = 0.1
    assert story.fails(A) == [Try(B)]
    assert story.at(2.5) == []  # the stagger counts from the last attempt
    assert story.at(2.6) == [Try(C)]
    assert story.race.failures == {A: "refused"}


def test_a_place_is_given_up_for_an_address_that_waits_for_one() -> None:
    story = Round(A, B, C, D, E)
    for now in (0, 2.5, 5):
        story.at(now)
    assert story.race.deadline == 10
    assert story.at(9.9) == []
    assert story.at(10) == [Abandon(A), Try(D)]
    assert story.at(12.5) == [Abandon(B), Try(E)]
    assert story.race.deadline is None  # nobody waits: the last ones may take their time
    assert set(story.race.failures) == {A, B}


def test_what_fails_among_many_makes_room() -> None:
    story = Round(A, B, C, D)
    for now in (0, 2.5, 5):
        story.at(now)
    story.now = 6
    assert story.fails(B) == [Try(D)]


def test_it_is_over_when_all_have_failed() -> None:
    story = Round(A, B)
    story.at(0)
    story.fails(A)
    assert not story.race.over
    story.fails(B)
    assert story.race.over
    assert Round().race.over


def test_who_was_slow_has_failed_and_who_just_began_has_not() -> None:
    story = Round(A, B, C)
    for now in (0, 2.5, 5.0):
        story.at(now)
    story.race.opened(C, 5.1)
    assert story.race.failures.keys() == {A, B}
    story = Round(A, B, C)
    for now in (0, 2.5):
        story.at(now)
    story.race.opened(A, 2.6)
    assert story.race.failures == {}
    assert story.at(100) == []


def test_a_better_list_goes_before_what_waits() -> None:
    story = Round(A, B)
    story.at(0)
    story.race.extend([C, A, D])
    assert [story.at(now) for now in (2.5, 5.0)] == [[Try(C)], [Try(D)]]
    story.now = 6
    assert story.fails(D) == [Try(B)]


def test_a_list_that_comes_late_revives_a_race() -> None:
    story = Round(A)
    story.at(0)
    story.now = 1
    assert story.fails(A) == []
    assert story.race.over
    story.race.extend([A, B])
    assert story.at(1) == [Try(B)]


addresses = st.lists(st.integers(1, 9).map(lambda n: Address(f"10.0.0.{n}", 1883)), unique=True)


@given(addresses, st.integers(1, 4), st.data())
def test_every_address_is_tried_once_and_never_too_many_at_a_time(
    all_addresses: list[Address], parallel: int, data: st.DataObject
) -> None:
    race, now, running, tried = Race(all_addresses, Hints(parallel=parallel), 0.0), 0.0, set(), []
    while not race.over:
        for action in race.tick(now):
            if isinstance(action, Try):
                tried.append(action.address)
                running.add(action.address)
            else:
                running.remove(action.address)
            assert len(running) <= parallel
        deadline = race.deadline
        if deadline is None or (running and data.draw(st.booleans())):
            if running:
                one = data.draw(st.sampled_from(sorted(running, key=str)))
                running.remove(one)
                race.failed(one, "refused", now)
        else:
            assert deadline > now
            now = deadline
    assert tried == all_addresses
    assert race.failures.keys() == set(all_addresses)


# What is known of a network


def book(*addresses: Address, hints: Hints = HINTS) -> AddressBook:
    return AddressBook(addresses, hints)


def test_the_order_is_that_of_the_list() -> None:
    assert book(B, A, B).order(NOW) == [B, A]


def test_the_last_good_one_goes_first_for_some_hours() -> None:
    known = book(A, B, C)
    known.reached(B, "10.0.0.2", NOW)
    assert known.order(NOW + GOOD_FOR - 1) == [B, A, C]
    assert known.order(NOW + GOOD_FOR) == [A, B, C]
    known.reached(B, "10.0.0.2", NOW + 1000)
    assert known.order(NOW + GOOD_FOR) == [A, B, C]  # or a better one would never be tried again
    known.reached(B, "10.0.0.2", NOW + GOOD_FOR)
    assert known.order(NOW + GOOD_FOR + 1) == [B, A, C]


def test_a_good_one_that_is_not_on_the_list_any_more_is_not_tried() -> None:
    known = book(A, B)
    known.reached(B, "10.0.0.2", NOW)
    known.replace([A, C])
    assert known.order(NOW) == [A, C]


def test_where_the_server_sent_us_goes_before_all() -> None:
    known = book(A, B)
    known.reached(B, "10.0.0.2", NOW)
    assert known.order(NOW, [C, A]) == [C, A, B]


def test_what_failed_beside_a_success_is_banned() -> None:
    known = book(A, B)
    known.failed(A, NOW)
    known.reached(B, "10.0.0.2", NOW + 1)
    assert known.order(NOW + 360) == [B, A]
    known.reached(B, "10.0.0.2", NOW + 2)  # the good one is still B
    assert known.doubt(A, NOW + 360)
    assert not known.doubt(A, NOW + 361)


def test_what_failed_while_nothing_could_be_reached_only_waits_its_turn() -> None:
    known = book(A, B)
    known.failed(A, NOW)
    assert known.order(NOW) == [B, A]
    known.failed(B, NOW)
    assert known.order(NOW) == [A, B]
    known.reached(B, "10.0.0.2", NOW + ONE_ROUND)  # long after: the network was down
    assert known.state().get("bans", {}) == {}


def test_a_ban_doubles_to_a_limit_and_ends_with_a_success() -> None:
    known, now = book(A, B), NOW
    for ban in (360, 720, 1440, MOST_BAN, MOST_BAN):
        known.failed(A, now)
        known.reached(B, "10.0.0.2", now)
        assert known.doubt(A, now + ban - 1)
        assert not known.doubt(A, now + ban)
        now += ban
    known.reached(A, "10.0.0.1", now)
    known.failed(A, now)
    known.reached(B, "10.0.0.2", now)
    assert not known.doubt(A, now + 360)


def test_among_banned_ones_the_most_often_failed_goes_last() -> None:
    known = book(A, B, C)
    for failing in ((A,), (A, B)):
        for address in failing:
            known.failed(address, NOW)
        known.reached(C, "10.0.0.3", NOW)
    assert known.order(NOW) == [C, B, A]


def test_a_good_one_that_fails_is_good_no_more() -> None:
    known = book(A, B)
    known.reached(B, "10.0.0.2", NOW)
    known.failed(B, NOW + 10)
    assert known.order(NOW + 10) == [A, B]


def test_what_just_broke_is_better_than_what_never_worked() -> None:
    known = book(A, B)
    known.failed(A, NOW)
    known.reached(B, "10.0.0.2", NOW)
    known.failed(B, NOW + 5)
    assert known.order(NOW + 5) == [B, A]


def test_a_clock_that_was_set_back_ends_bans() -> None:
    known = book(A, B)
    known.failed(A, NOW)
    known.reached(B, "10.0.0.2", NOW)
    assert not known.doubt(A, NOW - 86_400)


def test_a_path_that_dies_without_a_word_again_and_again_is_left() -> None:
    known = book(A, B)
    for _ in range(SILENT_DEATHS - 1):
        known.reached(A, "10.0.0.1", NOW)
        known.ended(A, NOW, silent=True)
    known.ended(A, NOW, silent=False)
    assert known.order(NOW) == [A, B]
    for _ in range(SILENT_DEATHS):
        known.ended(A, NOW, silent=True)
    assert known.order(NOW) == [B, A]


def test_a_name_is_followed_by_the_literal_it_was_found_at() -> None:
    known = book(NAMED, A, B)
    assert known.order(NOW) == [NAMED, A, B]
    known.reached(NAMED, "192.0.2.1", NOW)
    literal = NAMED.at("192.0.2.1")
    assert known.order(NOW) == [NAMED, A, literal, B]
    known.failed(NAMED, NOW + 1)  # no name server answers
    known.reached(literal, "192.0.2.1", NOW + 1)
    assert known.order(NOW + 1) == [NAMED, A, literal, B]  # it was the same server
    known.failed(literal, NOW + 2)
    assert known.take_outcomes() == [(str(NAMED), 2, 1)]


def test_each_network_has_its_own() -> None:
    known = book(A, B)
    known.failed(A, NOW)
    known.reached(B, "10.0.0.2", NOW)
    home = known.state()
    known.enter()
    assert known.order(NOW) == [A, B]
    known.enter(home)
    assert known.order(NOW) == [B, A]
    assert known.state() == home


@pytest.mark.parametrize("kept", [{"good": 7}, [], "x", {"bans": {"tcp://a:1": "x"}}])
def test_what_was_kept_and_cannot_be_read_is_forgotten(kept: object) -> None:
    known = book(A, B)
    known.enter(kept)
    assert known.order(NOW) == [A, B]


def test_outcomes_are_told_once() -> None:
    known = book(A, B)
    assert not known.has_failures
    known.failed(A, NOW)
    known.reached(B, "10.0.0.2", NOW)
    known.failed(C, NOW)  # on nobody's list: where a server sent us
    assert known.has_failures
    assert known.take_outcomes() == [(str(A), 0, 1), (str(B), 1, 0)]
    assert known.take_outcomes() == []


def test_what_is_kept_is_bounded() -> None:
    many = [Address("h", port) for port in range(1, 5 * MAX_ADDRESSES)]
    known = book(*many)
    assert len(known.addresses) == MAX_ADDRESSES
    for address in many:
        known.failed(address, NOW)
    known.reached(A, "10.0.0.1", NOW)
    assert len(known.state()["bans"]) == MAX_ADDRESSES


steps = st.lists(
    st.tuples(st.sampled_from(["failed", "reached", "silent", "closed", "wait"]), st.integers(0, 4)),
    max_size=60,
)


@given(steps)
def test_no_address_is_ever_left_out_and_all_bans_end(story: list[tuple[str, int]]) -> None:
    all_addresses, now = (A, B, C, D, NAMED), NOW
    known = book(*all_addresses)
    for what, n in story:
        address = all_addresses[n]
        match what:
            case "failed":
                known.failed(address, now)
            case "reached":
                known.reached(address, "192.0.2.1", now)
            case "wait":
                now += 100.0 * n
            case _:
                known.ended(address, now, silent=what == "silent")
        order = known.order(now)
        assert {a for a in order if not a.name} == set(all_addresses)
        assert len(order) == len(set(order))
        again = book(*all_addresses)
        again.enter(known.state())
        assert {a for a in again.order(now) if not a.name} == set(all_addresses)
    known.reached(A, "10.0.0.1", now)
    assert [a for a in known.order(now + MOST_BAN + GOOD_FOR) if not a.name] == list(all_addresses)


# How long


def test_the_greeting_may_take_longer_where_opening_did() -> None:
    assert greeting_limit(6, 0.2, 0) == 6
    assert greeting_limit(6, 3, 0) == 18
    assert greeting_limit(6, 0.2, 1) == 12
    assert greeting_limit(6, 0.2, 99) == greeting_limit(6, 0.2, 3)


def test_nobody_waits_longer_than_with_somebody_looking() -> None:
    assert PACE["foreground"] == (1, 1)
    assert PACE["foreground"] < PACE["background"] < PACE["doze"]
