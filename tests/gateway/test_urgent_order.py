"""A carrier whose profile says `order = "urgent"`: what waited comes with high priority first, then the newest first;
and after that in order, like everywhere (G3)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

import gateway.fetcher
import gateway.hub
import gateway.sweeper
from broker.carriers.catalog import Carriers
from broker.model import DeliveryState, StoredBroadcast, StoredMessage, Withdrawn
from gateway.hub import BACKLOG, ROWS, Hub, by_urgency
from gateway.live import LivePush
from gateway.session import Inbox, Session
from tests.gateway.test_hub import LATER, NOW, acked, connected, make_hub, message, sent
from tests.gateway.test_node import (
    LOSSY_STEPS,
    STEPS,
    _small_slices,  # noqa: F401 (a fixture)
    courses,
    devnos,
    masks,
    run,
)
from tests.gateway.world import Phone, World


def row(msg_id: int, *, high: bool = False, replaces: int = 0, expires_at: float = LATER) -> LivePush:
    body = message(msg_id).body
    return LivePush(StoredMessage(msg_id, 1, body, 1000.0, expires_at, high=high, replaces=replaces))


def log_row(msg_id: int, *, high: bool = False, devnos: Sequence[int] = (7,)) -> StoredBroadcast:
    return StoredBroadcast(row(msg_id, high=high).message, BitMap(devnos), BitMap())


def returned(hub: Hub, *, may_owe: bool = True, window: int = 32) -> Session:
    session = connected(hub, may_owe=may_owe, window=window)
    session.come_back(window, urgent=True)
    return session


def order(*pushes: LivePush) -> list[int]:
    return [push.msg_id for push in reversed(by_urgency(pushes))]


# Which is more urgent


@pytest.mark.parametrize(
    ("pushes", "expected"),
    [
        ((), []),
        ((row(1), row(2), row(3)), [3, 2, 1]),
        ((row(1, high=True), row(2), row(3, high=True)), [3, 1, 2]),
        ((row(1), row(2), row(3, replaces=1)), [1, 3, 2]),  # the one that is replaced goes before
        ((row(1), row(2, replaces=1), row(3, replaces=2), row(4)), [4, 1, 2, 3]),
        ((row(1), row(2, replaces=1), row(3, replaces=1)), [1, 2, 3]),
        ((row(2), row(3, replaces=1)), [3, 2]),  # what it replaces is not here
        ((row(1, high=True), row(2), row(3, replaces=1)), [1, 3, 2]),  # as urgent as before
        ((row(1), row(2), row(3, replaces=1, high=True), row(4)), [1, 3, 4, 2]),
    ],
)
def test_high_priority_first_then_the_newest(pushes: Sequence[LivePush], expected: list[int]) -> None:
    assert order(*pushes) == expected
    assert order(*reversed(pushes)) == expected


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=14))
def test_by_urgency_holds_for_any_backlog(kinds: list[tuple[bool, int]]) -> None:
    pushes = [
        row(n, high=high, replaces=replaces if replaces < n else 0)
        for n, (high, replaces) in enumerate(kinds, start=1)
    ]
    found = order(*pushes)
    assert sorted(found) == [push.msg_id for push in pushes]
    place = {msg_id: n for n, msg_id in enumerate(found)}
    for push in pushes:
        replaces = push.message.replaces
        assert not replaces or place[replaces] < place[push.msg_id], "what it replaces shows again"
    alone = [push for push in pushes if not push.message.replaces]
    taken = {push.message.replaces for push in pushes}
    alone = [push for push in alone if push.msg_id not in taken]
    expected = sorted(alone, key=lambda push: (push.message.high, push.msg_id), reverse=True)
    assert [n for n in found if n in {push.msg_id for push in alone}] == [push.msg_id for push in expected]


# What a session is sent


def test_what_waited_comes_by_urgency_and_what_follows_in_order() -> None:
    hub = make_hub()
    hub.add_broadcast(log_row(2))
    hub.add_broadcast(log_row(5, high=True))
    session = returned(hub)
    assert hub.collect(session, NOW) == []  # the most urgent may be among the rows
    assert hub.wants_fetch(session)
    hub.fetched(session, [row(1), row(3, high=True), row(4)], more=False)
    assert sent(hub.collect(session, NOW)) == [5, 3, 4, 2, 1]
    assert session.comeback is None
    hub.add_broadcast(log_row(6))
    assert sent(hub.offer(session, row(7, high=True), NOW)) == [6, 7]


def test_broadcasts_alone_need_no_fetch() -> None:
    hub = make_hub()
    for msg_id in (1, 2, 3):
        hub.add_broadcast(log_row(msg_id))
    session = returned(hub, may_owe=False)
    assert sent(hub.collect(session, NOW)) == [3, 2, 1]
    assert session.comeback is None


def test_who_is_owed_nothing_is_like_all_others() -> None:
    hub = make_hub()
    session = returned(hub, may_owe=False)
    assert hub.collect(session, NOW) == []
    assert session.comeback is None


def test_a_new_push_overtakes_the_rest_of_the_backlog() -> None:
    hub = make_hub()
    session = returned(hub, window=1)
    hub.fetched(session, [row(1), row(2), row(3)], more=False)
    assert sent(hub.collect(session, NOW)) == [3]
    for _ in range(2):  # its doorbell rings again
        assert hub.offer(session, row(4), NOW) == []
    hub.add_broadcast(log_row(5, high=True))
    came = []
    for packet_id in range(1, 5):
        acked(session, packet_id)
        came += sent(hub.collect(session, NOW))
    assert came == [5, 4, 2, 1]
    assert not hub.wants_fetch(session)  # it was taken from the doorbell
    acked(session, 5)
    assert hub.collect(session, NOW) == []
    assert session.comeback is None


def test_a_doorbell_that_rings_again_sends_nothing_again() -> None:
    hub = make_hub()
    session = returned(hub, window=1)
    hub.fetched(session, [row(1), row(2), row(3)], more=False)
    hub.collect(session, NOW)
    for msg_id in (1, 2, 3):
        assert hub.offer(session, row(msg_id), NOW) == []
    assert session.inbox is not None
    assert len(session.inbox) == 2
    for packet_id in (1, 2, 3):
        acked(session, packet_id)
        hub.collect(session, NOW)
    for msg_id in (1, 2, 3):
        assert hub.offer(session, row(msg_id), NOW) == []
    assert session.fetch is Inbox.EMPTY


def test_after_the_backlog_nothing_older_than_it_follows() -> None:
    hub = make_hub()
    session = returned(hub)
    hub.fetched(session, [row(3), row(9)], more=False)
    assert sent(hub.collect(session, NOW)) == [9, 3]
    assert session.sent == 9
    hub.last_broadcast = 4
    hub.add_broadcast(log_row(5))  # its doorbell was late: it is for the next connection
    assert hub.collect(session, NOW) == []


def test_a_page_is_larger_and_the_next_one_follows() -> None:
    hub = make_hub()
    session = returned(hub, window=100)
    assert (hub.page_size(session), hub.page_size(connected(hub, devno=8))) == (BACKLOG, ROWS)
    hub.fetched(session, [row(1), row(2)], more=True)
    assert sent(hub.collect(session, NOW)) == [2, 1]
    assert hub.wants_fetch(session)
    assert session.newest == 2
    hub.fetched(session, [row(3), row(4)], more=False)
    assert sent(hub.collect(session, NOW)) == [4, 3]
    assert session.comeback is None
    assert hub.page_size(session) == ROWS


def test_broadcasts_that_are_newer_hide_no_rows() -> None:
    """The next page begins after the rows that were read, whatever was sent."""
    hub = make_hub()
    hub.add_broadcast(log_row(50))
    session = returned(hub)
    hub.fetched(session, [row(1), row(2)], more=True)
    assert sent(hub.collect(session, NOW)) == [50, 2, 1]
    assert session.newest == 2
    hub.fetched(session, [row(3, high=True), row(4, high=True)], more=True)
    hub.add_broadcast(log_row(51))
    assert sent(hub.collect(session, NOW)) == [4, 3, 51]
    assert (session.sent, session.newest) == (51, 4)


def test_a_backlog_holds_so_many_and_the_rest_stays_in_the_store() -> None:
    hub = make_hub()
    session = returned(hub, window=1)
    hub.fetched(session, [row(n) for n in range(1, BACKLOG + 2)], more=False)
    assert sent(hub.collect(session, NOW)) == [BACKLOG + 1]
    assert hub.offer(session, row(BACKLOG + 2), NOW) == []
    assert len(session.inbox or ()) == BACKLOG
    assert session.fetch is Inbox.WANTED


def test_what_was_recalled_meanwhile_is_not_sent() -> None:
    hub = make_hub()
    for msg_id in (2, 4):
        hub.add_broadcast(log_row(msg_id))
    session = returned(hub, window=1)
    hub.members[7] = cast("Any", SimpleNamespace(session=session))
    hub.fetched(session, [row(1), row(3), row(5)], more=False)
    assert sent(hub.collect(session, NOW)) == [5]
    hub.recall(Withdrawn(1, 4, BitMap((7,)), BitMap()), NOW.now)
    hub.recall(Withdrawn(1, 3, BitMap((7,)), BitMap()), NOW.now)
    came = []
    for packet_id in range(1, 3):
        acked(session, packet_id)
        came += sent(hub.collect(session, NOW))
    assert came == [2, 1]


def test_expired_ones_are_passed_over() -> None:
    hub = make_hub()
    session = returned(hub)
    hub.fetched(session, [row(1), row(2, expires_at=900.0), row(3)], more=False)
    assert sent(hub.collect(session, NOW)) == [3, 1]


def test_a_sweep_leaves_the_backlog_and_has_new_rows_fetched_after_it() -> None:
    hub = make_hub()
    session = returned(hub, window=1)
    hub.fetched(session, [row(1), row(2)], more=False)
    hub.collect(session, NOW)
    assert hub.look_again(session, owing=True)
    assert not hub.wants_fetch(session)
    acked(session, 1)
    assert sent(hub.collect(session, NOW)) == [1]
    acked(session, 2)
    assert hub.collect(session, NOW) == []
    assert hub.wants_fetch(session)
    assert session.newest == 2


def test_what_was_not_sent_again_keeps_its_packet_id() -> None:
    """In order an older one would be over once a newer one went out; here it is still to come."""
    hub = make_hub()
    session = returned(hub, window=1)
    session.resend = {1: 11, 2: 12, 3: 13}
    hub.fetched(session, [row(1), row(2), row(3)], more=False)
    assert sent(hub.collect(session, NOW)) == [3]
    assert session.suspend() == {3: 13, 1: 11, 2: 12}


def test_a_small_window_and_urgency_go_together() -> None:
    hub = make_hub()
    session = connected(hub, may_owe=True, window=8)
    session.come_back(1, urgent=True)
    hub.fetched(session, [row(n) for n in range(1, 8)], more=False)
    bursts = []
    while frames := hub.collect(session, NOW):
        bursts.append(sent(frames))
        acked(session, *(session.unacked or ()))
    assert bursts == [[7], [6, 5], [4, 3, 2, 1]]
    assert session.comeback is None


# A whole node


def urgent_carriers(folder: Path) -> Carriers:
    folder.mkdir(exist_ok=True)
    text = 'name = "default"\n[delivery]\norder = "urgent"\nfirst_window = 1\n'
    (folder / "default.toml").write_text(text)
    return Carriers(folder)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = await World(tmp_path, carriers=urgent_carriers(tmp_path / "carriers")).open()
    yield world
    await world.close()


async def drained(world: World, phone: Phone, count: int) -> list[int]:
    while len(phone.got) < count:
        had = len(phone.got)
        phone.ack()
        await phone.pushed(had + 1)
        await world.calm()
    return phone.got


async def test_a_device_that_was_away_gets_the_newest_first_whatever_its_kind(world: World) -> None:
    ids = [await world.push(*devnos) for devnos in ((0,), (0, 1), (0,), (0, 1), (0, 2), (0,))]
    phone = await world.online(0)
    assert phone.got == ids[::-1]
    phone.ack()
    after = [await world.push(*devnos) for devnos in ((0,), (0, 1), (0,))]
    assert await phone.pushed(9) == ids[::-1] + after


async def test_a_thin_window_lets_new_ones_pass(world: World) -> None:
    ids = [await world.push(0) for _ in range(6)]
    phone = await world.online(0, properties={"receive_maximum": 1})
    assert phone.got == ids[-1:]
    new = await world.push(0)
    await world.calm()
    assert await drained(world, phone, 7) == [ids[5], new, *ids[4::-1]]
    phone.ack()
    await world.recorded()
    for msg_id in ids:
        assert await world.states(msg_id) == {0: DeliveryState.DELIVERED}


async def test_more_than_a_backlog_comes_piece_by_piece(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.hub, "BACKLOG", 4)
    ids = [await world.push(0) for _ in range(10)]
    phone = await world.online(0)
    assert await drained(world, phone, 10) == [*ids[3::-1], *ids[7:3:-1], *ids[:7:-1]]


# The property of test_node: each device gets what it is owed, and nothing twice on a connection

KINDS = st.sampled_from(
    (0, 0, 1, 1, 2, 3, 5, 4, 8, 9, 8, 9, 16, 17, 25)
)  # 8: high; 16: replaces the one before
MORE = (
    st.tuples(st.just("push_and_ring"), masks, KINDS),
    st.tuples(st.just("push"), masks, KINDS),
    st.tuples(st.just("connect"), devnos, st.integers(1, 3), st.sampled_from((0, 0, 1))),
)


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages and backlogs of a few pushes."""
    monkeypatch.setattr(gateway.hub, "BACKLOG", 3)
    monkeypatch.setattr(gateway.hub, "ROWS", 2)


@pytest.mark.usefixtures("tight")
@settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(steps=[(0, ("push_and_ring", 1, 0))] * 9)
@given(steps=courses((*STEPS, *MORE)))
def test_everything_owed_is_sent_once_on_a_connection(
    tmp_path: Path, steps: list[tuple[int, tuple[Any, ...]]]
) -> None:
    run(steps, carriers=urgent_carriers(tmp_path / "carriers"), in_order=False)


@pytest.mark.usefixtures("tight")
@settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=courses((*LOSSY_STEPS, *MORE)))
def test_the_same_where_doorbells_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[tuple[int, tuple[Any, ...]]]
) -> None:
    monkeypatch.setattr(gateway.fetcher, "HOLD", 0)
    for rest in ("RESTS", "REST_MIN"):
        monkeypatch.setattr(gateway.sweeper, rest, 0)
    run(steps, carriers=urgent_carriers(tmp_path / "carriers"), in_order=False)
