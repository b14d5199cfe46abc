"""After a connection that ended without a word the next one begins with a small window, which grows with success."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.carriers.catalog import Carriers
from broker.model import Claim
from gateway.ack_time import OVERDUE, UNKNOWN
from gateway.arrivals import Arrivals
from gateway.hub import Ending, Endings, Hub
from gateway.mqtt import Disconnect, Puback, Reason
from gateway.session import Session
from tests.gateway.fleet_world import FleetWorld
from tests.gateway.test_hub import NOW, acked, broadcast, connected, make_hub, sent
from tests.gateway.world import Phone, World

FIRST, WINDOW = 2, 12


def returned(hub: Hub, first: int = FIRST, window: int = WINDOW) -> Session:
    session = connected(hub, window=window)
    session.come_back(first, urgent=False)
    return session


def owing(count: int) -> Hub:
    hub = make_hub(offline_limit=1000)
    for msg_id in range(1, count + 1):
        hub.add_broadcast(broadcast(msg_id))
    return hub


def in_flight(session: Session) -> list[int]:
    return list(session.unacked or ())


def test_the_window_doubles_with_each_round_of_acknowledgements() -> None:
    hub = owing(100)
    session = returned(hub)
    sizes = []
    for _ in range(5):
        sizes.append(len(hub.collect(session, NOW)))
        acked(session, *in_flight(session))
    assert sizes == [2, 4, 8, 12, 12]
    assert session.comeback is None  # one like all others


def test_a_round_ends_with_the_packet_that_was_the_newest_when_it_began() -> None:
    hub = owing(100)
    session = returned(hub)
    windows = []
    assert sent(hub.collect(session, NOW)) == [1, 2]
    for packet_id in range(1, 15):
        acked(session, packet_id)
        hub.collect(session, NOW)
        windows.append(session.window)
    assert windows == [2, *[4] * 4, *[8] * 8, 12]  # rounds end with 2, 6 and 14


def test_without_an_acknowledgement_the_window_stays() -> None:
    hub = owing(100)
    session = returned(hub)
    assert len(hub.collect(session, NOW)) == FIRST
    for _ in range(5):
        assert hub.collect(session, NOW) == []
    assert session.window == FIRST


def test_a_window_that_was_never_full_is_small_still() -> None:
    hub = make_hub()
    session = returned(hub)
    for _ in range(3):
        assert hub.collect(session, NOW) == []
    assert session.window == FIRST


@pytest.mark.parametrize("first", [WINDOW, WINDOW + 1, 1000])
def test_a_first_window_as_large_as_the_other_changes_nothing(first: int) -> None:
    session = returned(make_hub(), first)
    assert (session.window, session.comeback) == (WINDOW, None)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.lists(st.integers(0, 40), max_size=80))
def test_whatever_is_acknowledged_when_the_window_holds_and_grows_by_doubling(
    first: int, window: int, acks: list[int]
) -> None:
    hub = owing(200)
    session = returned(hub, first, window)
    allowed = {window, *(min(first << n, window) for n in range(12))}
    got: list[int] = []
    for which in acks:
        before, widest = session.window, len(in_flight(session))
        got += sent(hub.collect(session, NOW))
        assert session.window in allowed
        assert before <= session.window <= max(before, min(2 * before, window))
        assert len(in_flight(session)) <= session.window
        assert session.window == before or widest < before  # it grows for an acknowledgement only
        ids = in_flight(session)
        if ids:
            acked(session, ids[which % len(ids)])
    assert got == list(range(1, len(got) + 1))


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 40))
def test_a_device_that_answers_gets_the_whole_window_in_a_few_rounds(first: int, window: int) -> None:
    hub = owing(400)
    session = returned(hub, first, window)
    for _ in range(7):
        hub.collect(session, NOW)
        acked(session, *in_flight(session))
    hub.collect(session, NOW)
    assert (session.window, session.comeback, len(in_flight(session))) == (window, None, window)


def test_packet_ids_that_come_round_end_no_round() -> None:
    hub = owing(100)
    session = returned(hub)
    session.next_id = 65_535
    assert len(hub.collect(session, NOW)) == FIRST
    acked(session, 65_535)
    hub.collect(session, NOW)
    assert session.window == FIRST
    acked(session, 1)
    hub.collect(session, NOW)
    assert session.window == 2 * FIRST


# How connections end


def test_an_ending_is_known_until_the_device_is_back() -> None:
    endings = Endings()
    endings.note(5, Ending.WORDLESS)
    endings.note(6, Ending.OVERDUE)
    endings.note(7, Ending.ORDERLY)
    assert [endings.take(devno) for devno in (5, 6, 7, 8)] == [
        Ending.WORDLESS,
        Ending.OVERDUE,
        Ending.ORDERLY,
        Ending.ORDERLY,
    ]
    assert {endings.take(devno) for devno in (5, 6, 7)} == {Ending.ORDERLY}


def test_what_ended_here_before_the_device_was_elsewhere_is_of_no_interest() -> None:
    hub = make_hub()
    hub.endings.note(7, Ending.OVERDUE)
    hub.note_taken(7, 5, 100.0)
    assert hub.endings.take(7) is Ending.ORDERLY


def test_many_that_ended_without_a_word_take_little() -> None:
    endings = Endings()
    for devno in range(100_000):
        endings.note(devno, Ending.WORDLESS)
    assert len(endings._wordless.serialize()) < 200_000


@pytest.mark.parametrize(
    ("ending", "former", "window"),
    [
        (Ending.ORDERLY, "", WINDOW),
        (Ending.WORDLESS, "", FIRST),
        (Ending.OVERDUE, "", FIRST),
        (Ending.ORDERLY, "node-2", FIRST),  # it had not ended there when the device came back
    ],
)
async def test_who_begins_with_a_small_window(ending: Ending, former: str, window: int, world: World) -> None:
    phone = await world.online(0)
    session = connected(make_hub(), window=WINDOW)
    Arrivals._come_back(phone.connection, session, ending, Claim(1, False, former))
    assert session.window == window
    assert session.ack_time is (OVERDUE if ending is Ending.OVERDUE else UNKNOWN)


@pytest.fixture
def carriers(tmp_path: Path) -> Carriers:
    folder = tmp_path / "carriers"
    folder.mkdir()
    text = f'name = "default"\n[delivery]\nwindow = {WINDOW}\nfirst_window = {FIRST}\n'
    (folder / "default.toml").write_text(text)
    return Carriers(folder)


@pytest.fixture
async def world(tmp_path: Path, carriers: Carriers) -> AsyncIterator[World]:
    world = await World(tmp_path, carriers=carriers).open()
    yield world
    await world.close()


@pytest.fixture
async def fleet(tmp_path: Path, carriers: Carriers) -> AsyncIterator[FleetWorld]:
    world = FleetWorld(tmp_path, carriers=carriers)
    await world.open()
    yield await world.build()
    await world.close()


def reset(phone: Phone) -> None:
    phone.connection.connection_lost(ConnectionResetError())


def times_out(phone: Phone) -> None:
    over = phone.connection.last_seen + 1.5 * 60
    phone.session.waiting_since = over - 1.0
    phone.connection.check(over)
    assert phone.goodbye.reason is Reason.KEEP_ALIVE_TIMEOUT


def is_overdue(phone: Phone) -> None:
    phone.connection.check(phone.session.waiting_since + 60)


def says_goodbye(phone: Phone) -> None:
    phone.send(Disconnect())


def takes_leave(phone: Phone) -> None:
    phone.leave()


def is_closed(phone: Phone) -> None:
    phone.connection.close("server shutting down", Reason.SERVER_SHUTTING_DOWN)


def nothing(phone: Phone) -> None:
    """And the device comes back all the same: the old connection is taken over."""


@pytest.mark.parametrize(
    ("end", "window"),
    [
        (reset, FIRST),
        (times_out, FIRST),
        (is_overdue, FIRST),
        (nothing, FIRST),
        (says_goodbye, WINDOW),
        (takes_leave, WINDOW),
        (is_closed, WINDOW),
    ],
)
@pytest.mark.parametrize("expiry", [0, 600])
async def test_the_next_connection_begins_as_the_last_one_ended(
    world: World, end: Callable[[Phone], None], window: int, expiry: int
) -> None:
    properties: Any = {"session_expiry_interval": expiry}
    phone = await world.online(0, keep_alive=60, properties=properties)
    assert phone.session.window == WINDOW
    msg_id = await world.push(0)
    await phone.pushed(1)
    end(phone)
    again = await world.online(0, properties=properties)
    assert (again.session.window, again.got) == (window, [msg_id])
    again.send(Disconnect())
    assert (await world.online(0)).session.window == WINDOW


async def test_a_backlog_comes_in_growing_bursts(world: World) -> None:
    reset(await world.online(0))
    ids = [await world.push(0) for _ in range(30)]
    phone = await world.online(0)
    bursts = []
    while len(phone.got) < 30:
        had = sum(bursts)
        await phone.pushed(had + 1)
        await world.calm()
        bursts.append(len(phone.got) - had)
        phone.send(*(Puback(packet_id) for packet_id in in_flight(phone.session)))
        await world.calm()
    assert phone.got == ids
    assert bursts[:3] == [2, 4, 8]
    assert max(bursts) <= WINDOW


async def test_receive_maximum_is_smaller_still(world: World) -> None:
    reset(await world.online(0))
    phone = await world.online(0, properties={"receive_maximum": 1})
    assert (phone.session.window, phone.session.comeback) == (1, None)


async def test_who_comes_to_another_node_while_the_first_one_has_it_begins_small(fleet: FleetWorld) -> None:
    old = await fleet.online_at(0, 0)
    new = await fleet.online_at(1, 0)
    fleet.hear()
    assert (old.closed, new.session.window) == (True, FIRST)
    new.send(Disconnect())
    await fleet.calm()
    assert (await fleet.online_at(0, 0)).session.window == WINDOW


async def test_how_it_ended_at_another_node_is_not_known(fleet: FleetWorld) -> None:
    reset(await fleet.online_at(0, 0))
    await fleet.calm()
    assert (await fleet.online_at(1, 0)).session.window == WINDOW
