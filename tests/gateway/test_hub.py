"""What a session is sent next: order, window, what it is owed. No I/O."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

import gateway.hub
from broker.errors import ApiError
from broker.limits import Limits
from broker.metrics import Counter
from broker.model import App, StoredBroadcast, StoredMessage, Withdrawn
from broker.pushing.requests import read_push
from gateway.hub import FLEETING, SPREADING, TAKEN_MEMORY, Hub, Resend, SessionEnds
from gateway.live import LivePush, encoding
from gateway.mqtt import Publish, decode
from gateway.session import Inbox, Manners, Member, Session
from gateway.wheel import Clock

NOW = Clock(now=5.0, wall=1000.0)
LATER = 2000.0


def make_hub(offline_limit: int = 100) -> Hub:
    app = App(1, "key", "app", "secret", "device", b"s" * 32, False, 0.0, offline_limit)
    return Hub(app, max_retained=10, max_retained_bytes=1000, too_large=Counter())


def message(msg_id: int, *, expires_at: float = LATER, size: int = 2) -> StoredMessage:
    body = orjson.dumps({"notification": {"alert": "x" * size}})
    return StoredMessage(msg_id, 1, body, 1000.0, expires_at)


def targeted(msg_id: int, **values: Any) -> LivePush:
    return LivePush(message(msg_id, **values))


def broadcast(
    msg_id: int, devnos: Iterable[int] = (7,), settled: Iterable[int] = (), **values: Any
) -> StoredBroadcast:
    return StoredBroadcast(message(msg_id, **values), BitMap(devnos), BitMap(settled))


def connected(hub: Hub, *, may_owe: bool = False, devno: int = 7, **values: Any) -> Session:
    """A session that has begun; nothing was sent yet."""
    session = Session(encoding(5, "other"), devno=devno, **values)
    hub.online.add(devno)
    hub.start(session, may_owe=may_owe)
    return session


def sent(frames: list[bytes]) -> list[int]:
    """The msg_ids in these packets."""
    ids = []
    for frame in frames:
        found = decode(frame, 0, 5, 1 << 20)
        assert found is not None
        packet, _ = found
        assert isinstance(packet, Publish)
        ids.append(int(orjson.loads(packet.payload)["msg_id"]))
    return ids


def acked(session: Session, *packet_ids: int) -> None:
    for packet_id in packet_ids:
        assert session.acked(packet_id, 6.0) is not None


def test_broadcasts_owed_are_sent_at_connect_in_order() -> None:
    hub = make_hub()
    for msg_id in (1, 2, 3):
        hub.add_broadcast(broadcast(msg_id, settled=(7,) if msg_id == 2 else ()))
    assert sent(hub.collect(connected(hub), NOW)) == [1, 3]


def test_another_devices_broadcast_is_not_sent() -> None:
    hub = make_hub()
    hub.add_broadcast(broadcast(1, (8,)))
    assert hub.collect(connected(hub), NOW) == []


def test_inbox_and_broadcasts_are_merged_by_msg_id() -> None:
    hub = make_hub()
    for msg_id in (2, 4, 9):
        hub.add_broadcast(broadcast(msg_id))
    session = connected(hub, may_owe=True)
    assert hub.collect(session, NOW) == []  # an older row may still turn up
    assert hub.wants_fetch(session)
    hub.fetched(session, [targeted(1), targeted(3), targeted(5)], more=False)
    assert sent(hub.collect(session, NOW)) == [1, 2, 3, 4, 5, 9]


def test_a_full_page_holds_newer_broadcasts_back_until_the_next_one() -> None:
    hub = make_hub()
    hub.add_broadcast(broadcast(4))
    session = connected(hub, may_owe=True)
    hub.fetched(session, [targeted(1), targeted(2)], more=True)
    assert sent(hub.collect(session, NOW)) == [1, 2]
    assert hub.wants_fetch(session)
    hub.fetched(session, [targeted(3)], more=False)
    assert sent(hub.collect(session, NOW)) == [3, 4]


def test_what_the_window_has_no_room_for_waits_for_acknowledgements() -> None:
    hub = make_hub()
    for msg_id in range(1, 6):
        hub.add_broadcast(broadcast(msg_id))
    session = connected(hub, window=2)
    assert sent(hub.collect(session, NOW)) == [1, 2]
    assert session.behind
    assert hub.collect(session, NOW) == []
    acked(session, 1)
    assert sent(hub.collect(session, NOW)) == [3]
    acked(session, 2, 3)
    assert sent(hub.collect(session, NOW)) == [4, 5]


def test_a_targeted_push_with_a_full_window_is_left_in_the_store() -> None:
    hub = make_hub()
    session = connected(hub, window=1)
    assert sent(hub.offer(session, targeted(1), NOW)) == [1]
    assert hub.offer(session, targeted(2), NOW) == []
    assert session.behind
    assert session.fetch is Inbox.WANTED
    assert not hub.wants_fetch(session)  # no room yet
    acked(session, 1)
    assert hub.wants_fetch(session)


def test_older_broadcasts_go_before_a_targeted_push() -> None:
    hub = make_hub()
    session = connected(hub)
    hub.collect(session, NOW)
    hub.add_broadcast(broadcast(1))  # its walk has not come here yet
    assert sent(hub.offer(session, targeted(2), NOW)) == [1, 2]


def test_a_doorbell_that_rings_twice_sends_once() -> None:
    hub = make_hub()
    session = connected(hub)
    assert sent(hub.offer(session, targeted(5), NOW)) == [5]
    assert hub.offer(session, targeted(5), NOW) == []
    assert hub.add_broadcast(broadcast(6)) is not None
    assert hub.add_broadcast(broadcast(6)) is None


def test_a_doorbell_that_rings_again_after_newer_broadcasts_sends_nothing() -> None:
    hub = make_hub()
    session = connected(hub)  # it had push 5 on the connection before
    hub.add_broadcast(broadcast(6))
    assert sent(hub.collect(session, NOW)) == [6]
    assert hub.offer(session, targeted(5), NOW) == []


def test_a_doorbell_during_a_fetch_makes_another_fetch() -> None:
    hub = make_hub()
    session = connected(hub, may_owe=True)
    session.fetch = Inbox.FETCHING
    assert hub.offer(session, targeted(5), NOW) == []
    hub.fetched(session, [], more=False)
    assert hub.wants_fetch(session)


def test_expired_pushes_are_passed_over() -> None:
    hub = make_hub()
    hub.add_broadcast(broadcast(1, expires_at=1000.0 + 1))
    hub.add_broadcast(broadcast(2))
    session = connected(hub, may_owe=True)
    hub.fetched(session, [targeted(3, expires_at=1000.5)], more=False)
    assert sent(hub.collect(session, Clock(5.0, 1001.0))) == [2]


def test_a_push_over_the_maximum_packet_size_is_passed_over_and_counted() -> None:
    hub = make_hub()
    hub.add_broadcast(broadcast(1, size=500))
    hub.add_broadcast(broadcast(2))
    session = connected(hub, manners=Manners(maximum_packet=100))
    assert sent(hub.collect(session, NOW)) == [2]
    assert hub.offer(session, targeted(3, size=500), NOW) == []
    assert sent(hub.offer(session, targeted(4), NOW)) == [4]
    assert hub._too_large.value == 2


def test_the_newest_n_broadcasts_are_kept_for_a_device_that_was_away() -> None:
    hub = make_hub(offline_limit=2)
    pushes = [added[0] for i in range(1, 5) if (added := hub.add_broadcast(broadcast(i, (7, 8))))]
    session = Session(encoding(5, "other"), devno=7)
    assert hub.start(session, may_owe=False) == pushes[:2]
    assert [push.evicted for push in pushes] == [[7], [7], [], []]
    assert sent(hub.collect(session, NOW)) == [3, 4]
    assert pushes[0].owed_to(8)


def test_no_time_to_live_is_for_those_who_are_online() -> None:
    hub = make_hub()
    here = connected(hub)
    hub.add_broadcast(broadcast(1, (7, 8), expires_at=1000.0))
    assert sent(hub.collect(here, NOW)) == [1]
    assert hub.collect(connected(hub, devno=8), NOW) == []


def test_no_time_to_live_keeps_its_place_in_the_order() -> None:
    hub = make_hub()
    session = connected(hub)
    hub.add_broadcast(broadcast(1, expires_at=1000.0))
    assert sent(hub.offer(session, targeted(2), NOW)) == [1, 2]


def test_no_time_to_live_is_over_soon() -> None:
    hub = make_hub()
    session = connected(hub, window=1)
    hub.offer(session, targeted(1), NOW)
    hub.add_broadcast(broadcast(2, expires_at=1000.0))
    acked(session, 1)
    assert hub.collect(session, Clock(5.0, 1000.0 + FLEETING)) == []
    hub.drop_finished(1000.0 + FLEETING)
    assert list(hub.broadcasts()) == []


NESTED = b'{"platform":"all","audience":"all","message":{"msg_content":"x","extras":{"a":%s%s}}}'


@pytest.mark.parametrize("depth", [100, 240, 245, 250, 255, 400, 900])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_accepted_can_be_encoded(depth: int, packed: bool) -> None:
    """Or else it can never be sent, and whatever tries to fails."""
    try:
        checked = read_push(NESTED % (b"[" * depth, b"]" * depth), Limits())
    except ApiError:
        return
    LivePush(StoredMessage(1, 1, checked.body, 0.0, 1.0)).frames(encoding(5, "other", packed))


# Trimming


def test_positions_survive_the_log_being_trimmed() -> None:
    hub = make_hub()
    session = connected(hub, window=1)
    for msg_id in (1, 2, 3):
        hub.add_broadcast(broadcast(msg_id, expires_at=1500.0 if msg_id < 3 else LATER))
    assert sent(hub.collect(session, NOW)) == [1]
    hub.drop_finished(1500.0)
    assert hub.end == 3
    added = hub.add_broadcast(broadcast(4))
    assert added is not None
    assert added[1] == 3
    for packet_id, msg_id in ((1, 3), (2, 4)):
        acked(session, packet_id)
        assert sent(hub.collect(session, NOW)) == [msg_id]


def test_a_broadcast_that_everybody_has_is_dropped() -> None:
    hub = make_hub()
    for msg_id in (1, 2):
        hub.add_broadcast(broadcast(msg_id, (7, 8), settled=(7, 8) if msg_id == 1 else ()))
    hub.drop_finished(1000.0)
    assert [push.msg_id for push in hub.broadcasts()] == [2]


def test_one_whose_acknowledgements_are_not_recorded_stays_until_it_expires() -> None:
    hub = make_hub()
    for msg_id in (1, 2):
        hub.add_broadcast(broadcast(msg_id, settled=(7,), expires_at=1500.0))
    hub.drop_finished(1000.0, {(1, 1), (2, 2)})
    assert [push.msg_id for push in hub.broadcasts()] == [1]
    hub.unsettle(1, BitMap([7]))
    assert sent(hub.collect(connected(hub), NOW)) == [1]
    hub.drop_finished(1500.0, {(1, 1)})
    assert list(hub.broadcasts()) == []


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.booleans()),
            st.tuples(st.just("trim"), st.integers(0, 10)),
            st.tuples(st.just("collect"), st.integers(1, 3)),
        ),
        max_size=60,
    )
)
def test_trimming_never_hides_or_repeats_a_broadcast(steps: list[tuple[str, int]]) -> None:
    hub, got, owed = make_hub(), [], set()
    session = connected(hub, window=100_000)
    wall = 1000.0
    for msg_id, (step, value) in enumerate(steps, start=1):
        if step == "add":
            hub.add_broadcast(broadcast(msg_id, (7,) if value else (8,), expires_at=wall + 10))
            owed |= {(msg_id, wall + 10)} if value else set()
        elif step == "trim":
            wall += value
            hub.drop_finished(wall)
        else:
            got += sent(hub.collect(session, Clock(0.0, wall)))
            assert {msg_id for msg_id, expires_at in owed if expires_at > wall} <= set(got)
    assert got == sorted(set(got))


# Sessions of absent devices


@pytest.mark.parametrize(("back", "there"), [(0.0, True), (59.0, True), (61.5, False)])
def test_a_session_lives_until_its_expiry(back: float, there: bool) -> None:
    hub = make_hub()
    hub.session_ends.note(7, 100.25, 60)
    assert hub.session_ends.take(7, 100.25 + back) is there
    assert hub.session_ends.take(7, 100.25) is False  # taken
    assert hub.session_ends.take(8, 100.25) is False


def test_sessions_of_few_devices_of_a_huge_app_take_little() -> None:
    ends = SessionEnds()
    for devno in (3, 99_999_999):
        ends.note(devno, 100.0, 60)
    assert sum(sys.getsizeof(page) for page in ends._pages.values()) < 1000
    assert [ends.take(devno, 110.0) for devno in (3, 4, 99_999_999, 50)] == [True, False, True, False]
    assert not ends.take(-1, 110.0)  # no device


def test_past_the_limit_the_oldest_sessions_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.hub, "MAX_PAGES", 2)
    ends = SessionEnds()
    for devno in (0, 100, 200):
        ends.note(devno, 100.0, 60)
    assert [ends.take(devno, 110.0) for devno in (0, 100, 200)] == [False, True, True]


def test_a_hub_is_idle_once_its_sessions_are_over() -> None:
    hub = make_hub()
    assert hub.idle(100.0)
    hub.session_ends.note(7, 100.0, 60)
    assert not hub.idle(130.0)
    assert hub.idle(162.0)


# What the store and other nodes know


def owed_to_seven(hub: Hub) -> list[int]:
    return [push.msg_id for push in hub.broadcasts() if push.owed_to(7)]


def test_what_was_acknowledged_elsewhere_is_merged() -> None:
    hub = make_hub()
    for msg_id in (1, 2, 3):
        hub.add_broadcast(broadcast(msg_id, (7, 8)))
    hub.merge([broadcast(1, (7, 8), (8,)), broadcast(2, (7, 8), (7,)), broadcast(3, (7, 8))], NOW.wall)
    assert owed_to_seven(hub) == [1, 3]


def test_a_broadcast_that_the_store_does_not_list_before_one_that_it_lists_is_over() -> None:
    hub = make_hub()
    for msg_id in (1, 2, 3):
        hub.add_broadcast(broadcast(msg_id))
    hub.merge([broadcast(2)], NOW.wall)  # 3 has rung, and may not be listed yet
    assert owed_to_seven(hub) == [2, 3]


def test_a_broadcast_that_is_not_listed_for_long_is_over() -> None:
    hub = make_hub()
    hub.add_broadcast(broadcast(1))
    hub.merge([], NOW.wall + SPREADING)
    assert owed_to_seven(hub) == [1]
    hub.merge([], NOW.wall + SPREADING + 1)
    assert owed_to_seven(hub) == []


def test_a_broadcast_without_time_to_live_is_never_listed() -> None:
    hub = make_hub()
    hub.online.add(7)
    hub.add_broadcast(broadcast(1, expires_at=1000.0))
    hub.merge([broadcast(2)], NOW.wall)
    assert owed_to_seven(hub) == [1]


def test_a_walk_leaves_out_who_has_it() -> None:
    hub = make_hub()
    hub.online |= BitMap((6, 7, 8))
    added = hub.add_broadcast(broadcast(1, (6, 7, 8), (7,)))
    assert added is not None
    assert list(hub.walk(*added).todo) == [6, 8]


def test_what_does_not_count_is_owed_again() -> None:
    hub = make_hub()
    hub.add_broadcast(broadcast(1, (7, 8), (7, 8)))
    hub.unsettle(1, BitMap((7,)))
    hub.unsettle(99, BitMap((7,)))
    assert owed_to_seven(hub) == [1]


def test_a_device_that_may_have_been_elsewhere_waits_until_the_store_was_asked() -> None:
    hub = make_hub()
    hub.add_broadcast(broadcast(1))
    session = Session(encoding(5, "other"), devno=7)
    hub.start(session, may_owe=False, elsewhere=True)
    assert (session.unsure, session.fetch, hub.collect(session, NOW)) == (True, Inbox.WANTED, [])
    session.unsure = False
    hub.fetched(session, [], more=False)
    assert sent(hub.collect(session, NOW)) == [1]


def test_a_device_that_is_owed_no_broadcast_waits_for_nothing() -> None:
    hub = make_hub()
    hub.add_broadcast(broadcast(1, (8,)))
    session = Session(encoding(5, "other"), devno=7)
    hub.start(session, may_owe=False, elsewhere=True)
    assert (session.unsure, session.fetch) == (False, Inbox.EMPTY)


def test_a_claim_older_than_a_takeover_is_known_for_a_minute() -> None:
    hub = make_hub()
    hub.note_taken(7, 5, 100.0)
    hub.note_taken(7, 4, 101.0)  # rang late
    assert [hub.is_overtaken(7, epoch) for epoch in (4, 5, 6)] == [True, False, False]
    assert not hub.is_overtaken(8, 1)
    hub.forget(101.0 + TAKEN_MEMORY)
    assert not hub.is_overtaken(7, 4)


def test_a_session_that_goes_on_elsewhere_is_forgotten_here() -> None:
    hub = make_hub()
    hub.session_ends.note(7, 100.0, 60)
    hub.resend[7] = Resend({1: 1}, 160.0)
    hub.note_taken(7, 5, 101.0)
    assert (hub.resend, hub.session_ends.take(7, 101.0)) == ({}, False)


@pytest.mark.parametrize(("wall", "got"), [(LATER, [1]), (LATER + 1, [])])
def test_a_doorbell_that_rings_after_its_push_expired_brings_nothing(wall: float, got: list[int]) -> None:
    hub = make_hub()
    session = connected(hub)
    assert sent(hub.offer(session, targeted(1), Clock(5.0, wall))) == got


def test_a_doorbell_that_rings_after_its_push_was_recalled_brings_nothing() -> None:
    hub = make_hub()
    session = connected(hub)
    hub.members[7] = cast("Any", SimpleNamespace(session=session))
    hub.recall(Withdrawn(1, 1, BitMap((7,)), BitMap()), NOW.now)
    assert hub.offer(session, targeted(1), NOW) == []
    assert sent(hub.offer(session, targeted(2), NOW)) == [2]


def test_a_sweep_has_a_page_read_again_and_rows_fetched() -> None:
    hub = make_hub()
    session = connected(hub, may_owe=True, window=1)
    hub.fetched(session, [targeted(1), targeted(2), targeted(3)], more=False)
    assert sent(hub.collect(session, NOW)) == [1]
    assert hub.look_again(session, owing=True)
    assert (session.inbox, session.newest, session.fetch) == (None, 1, Inbox.WANTED)
    idle = connected(hub, devno=8)
    assert not hub.look_again(idle, owing=False)
    assert hub.look_again(idle, owing=True)
    idle.fetch = Inbox.FETCHING
    assert not hub.look_again(idle, owing=True)
    assert idle.fetch is Inbox.FETCHING_STALE


def test_many_who_left_leave_no_room_behind() -> None:
    hub, nobody = make_hub(), cast("Member", None)
    hub.members |= dict.fromkeys(range(10_000), nobody)
    full = hub.members
    hub.forget(1.0)
    assert hub.members is full
    for devno in range(9_990):
        del full[devno]
    hub.forget(1.0)
    assert list(hub.members) == list(range(9_990, 10_000))
    assert sys.getsizeof(hub.members) < sys.getsizeof(full) / 100
