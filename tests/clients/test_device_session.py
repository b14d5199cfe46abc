"""The device's session, told in stories: no socket, no clock, no chance."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.session import (
    MAX_OUTBOX,
    MAX_TAKEOVERS,
    SEEN_KEPT,
    Action,
    Answered,
    Discarded,
    Drop,
    LinkSettings,
    Offer,
    Offline,
    Online,
    Open,
    OutboxFull,
    Phase,
    Refused,
)
from gateway.mqtt import (
    Connack,
    Connect,
    Disconnect,
    Packet,
    Pingreq,
    Pingresp,
    Properties,
    Puback,
    Publish,
    Reason,
    encode,
)
from tests.clients import session_story
from tests.clients.session_story import packets_of

SETTINGS = LinkSettings(
    keep_alive=100, answer_timeout=5, connect_timeout=20, receive_maximum=4, stable_after=30
)


class Story(session_story.Story):
    def __init__(self, settings: LinkSettings = SETTINGS, jitter: float = 0.5) -> None:
        super().__init__(settings, jitter)

    def connect(self, *, resumed: bool = False, **properties: int) -> list[Action]:
        assert self.wait() == [Open(None)]
        self.session.opened(self.now)
        return self.hear(Connack(resumed, Reason.SUCCESS, properties))  # type: ignore[typeddict-item]

    def reconnect(self, **properties: int) -> list[Action]:
        self.session.lost("cable cut", self.now)
        return self.connect(resumed=True, **properties)


def push(msg_id: int, packet_id: int = 1, *, dup: bool = False) -> Publish:
    payload = orjson.dumps({"msg_id": str(msg_id), "notification": {"alert": "x"}})
    return Publish("push", payload, qos=1, packet_id=packet_id, dup=dup)


def offered(actions: list[Action]) -> list[int]:
    return [action.push.msg_id for action in actions if isinstance(action, Offer)]


@pytest.fixture
def story() -> Story:
    return Story()


# Connecting


def test_connect_asks_for_the_old_session_and_says_its_limits(story: Story) -> None:
    assert story.wait() == [Open(None)]
    (connect,) = packets_of(story.session.opened(story.now))
    assert isinstance(connect, Connect)
    assert (connect.client_id, connect.username, connect.password) == ("phone", "app", b"secret")
    assert (connect.clean_start, connect.keep_alive) == (False, 100)
    assert connect.properties["receive_maximum"] == 4
    assert story.hear(Connack(True)) == [Online(True)]


def test_silence_after_connect_is_given_up_and_tried_again(story: Story) -> None:
    story.wait()
    story.session.opened(story.now)
    drop, offline = story.wait()
    assert (drop, story.now) == (Drop(), 1020.0)
    assert isinstance(offline, Offline)
    assert story.wait() == [Open(None)]


@pytest.mark.parametrize(
    "reason",
    [
        Reason.BAD_USER_NAME_OR_PASSWORD,
        Reason.NOT_AUTHORIZED,
        Reason.CLIENT_IDENTIFIER_NOT_VALID,
        Reason.BANNED,
    ],
)
def test_a_final_refusal_stops_until_told_to_retry(story: Story, reason: Reason) -> None:
    story.wait()
    story.session.opened(story.now)
    assert story.hear(Connack(False, reason, {"reason_string": "no"})) == [Drop(), Refused(reason, "no")]
    assert story.session.deadline is None
    story.session.retry("new token", story.now)
    assert story.wait() == [Open(None)]


@pytest.mark.parametrize("reason", [Reason.SERVER_BUSY, Reason.SERVER_UNAVAILABLE, Reason.QUOTA_EXCEEDED])
def test_a_passing_refusal_is_tried_again(story: Story, reason: Reason) -> None:
    story.wait()
    story.session.opened(story.now)
    assert [type(action) for action in story.hear(Connack(False, reason))] == [Drop, Offline]


def test_a_server_reference_is_followed_and_left_when_nobody_answers_there(story: Story) -> None:
    story.connect()
    story.hear(Disconnect(Reason.USE_ANOTHER_SERVER, {"server_reference": "node-2:1883"}))
    assert story.wait() == [Open("node-2:1883")]
    story.session.lost("refused", story.now)
    assert story.wait() == [Open(None)]


def test_a_server_reference_holds_for_one_connection(story: Story) -> None:
    story.connect()
    story.hear(Disconnect(Reason.USE_ANOTHER_SERVER, {"server_reference": "node-2:1883"}))
    assert story.wait() == [Open("node-2:1883")]
    story.session.opened(story.now)
    story.hear(Connack())
    story.session.lost("cable cut", story.now)
    assert story.wait() == [Open(None)]


def test_a_drained_node_sends_a_newcomer_elsewhere(story: Story) -> None:
    story.wait()
    story.session.opened(story.now)
    story.hear(Connack(False, Reason.USE_ANOTHER_SERVER, {"server_reference": "node-2:1883"}))
    assert story.wait() == [Open("node-2:1883")]


def waited(story: Story, *told: tuple[str, str], packet: type[Connack] | type[Disconnect] = Connack) -> float:
    """Until the next attempt, when the server said this."""
    properties: Properties = {"user_properties": told}
    if packet is Connack:
        story.wait()
        story.session.opened(story.now)
        actions = story.hear(Connack(False, Reason.SERVER_BUSY, properties))
    else:
        story.connect()
        actions = story.hear(Disconnect(Reason.SERVER_SHUTTING_DOWN, properties))
    (_, offline) = actions
    assert isinstance(offline, Offline)
    assert story.session.deadline == story.now + offline.retry_in
    return offline.retry_in


@pytest.mark.parametrize("packet", [Connack, Disconnect])
def test_a_server_may_say_when_to_come_back(story: Story, packet: type[Connack] | type[Disconnect]) -> None:
    assert waited(story, ("retry_after", "12.0"), ("retry_jitter", "4.0"), packet=packet) == 14.0


def test_what_else_it_says_beside_changes_nothing(story: Story) -> None:
    assert waited(story, ("code", "7"), ("retry_after", "12.5")) == 12.5
    assert waited(story, ("retry_jitter", "30")) == 15.0


@pytest.mark.parametrize("told", ["soon", "-1", "nan", "inf", "3601", ""])
def test_what_is_not_understood_was_not_said(story: Story, told: str) -> None:
    assert waited(story, ("retry_after", told)) == 0.5  # the backoff


def test_at_once_means_with_a_first_backoff(story: Story) -> None:
    for _ in range(5):
        assert waited(story, ("retry_after", "0.0"), ("retry_jitter", "0.0")) <= SETTINGS.backoff_base


def test_after_an_appointment_the_backoff_goes_on(story: Story) -> None:
    waited(story, ("retry_after", "12.0"))
    assert waited(story) == 1.0


def test_revoked_while_connected_is_a_refusal(story: Story) -> None:
    story.connect()
    assert story.hear(Disconnect(Reason.NOT_AUTHORIZED)) == [
        Drop(),
        Refused(Reason.NOT_AUTHORIZED, "not authorized"),
    ]


def test_being_taken_over_again_and_again_stops(story: Story) -> None:
    for _ in range(MAX_TAKEOVERS - 1):
        story.connect()
        assert isinstance(story.hear(Disconnect(Reason.SESSION_TAKEN_OVER))[-1], Offline)
    story.connect()
    (_, refused) = story.hear(Disconnect(Reason.SESSION_TAKEN_OVER))
    assert isinstance(refused, Refused)
    assert "another process" in refused.text


# Backoff


@given(
    failures=st.integers(1, 200),
    jitter=st.floats(0, 1, exclude_max=True),
    base=st.floats(0.01, 10),
    cap=st.floats(0.01, 1000),
)
def test_backoff_is_within_its_bounds(failures: int, jitter: float, base: float, cap: float) -> None:
    story = Story(LinkSettings(backoff_base=base, backoff_cap=cap), jitter)
    for attempt in range(failures):
        story.wait()
        (_, offline) = story.session.lost("no route", story.now)
        assert isinstance(offline, Offline)
        most = min(cap, base * 2.0**attempt)
        assert offline.retry_in == jitter * most
        assert story.session.deadline == story.now + offline.retry_in


def test_backoff_begins_anew_only_after_a_connection_that_lasted(story: Story) -> None:
    delays = []
    for lived in (0, 0, 0, 31, 0):
        story.connect()
        story.now += lived
        delays.append(story.session.lost("gone", story.now)[-1].retry_in)  # type: ignore[union-attr]
    assert delays == [0.5, 1.0, 2.0, 0.5, 1.0]


# Heartbeat


def test_heartbeat_follows_the_servers_keep_alive(story: Story) -> None:
    story.connect(server_keep_alive=10)
    assert packets_of(story.wait()) == [Pingreq()]
    assert story.now == 1010.0
    assert story.hear(Pingresp()) == []
    assert packets_of(story.wait()) == [Pingreq()]
    assert story.now == 1020.0


def test_an_overdue_heartbeat_drops_the_connection(story: Story) -> None:
    story.connect()
    story.wait()
    assert story.wait() == [Drop(), Offline("heartbeat overdue", 0.5)]
    assert story.now == 1104.0  # CONNACK came at once
    assert story.wait() == [Open(None)]


def test_what_we_send_puts_the_heartbeat_off(story: Story) -> None:
    story.connect()
    story.now += 60
    story.hear(push(1))
    story.session.handled(story.now)
    assert story.session.deadline == 1160.0


def test_no_keep_alive_means_no_heartbeat() -> None:
    story = Story(LinkSettings(keep_alive=0))
    story.connect()
    assert story.session.deadline is None


# Pushes


def test_a_push_is_acknowledged_after_it_was_handled(story: Story) -> None:
    story.connect()
    actions = story.hear(push(7, 3))
    assert offered(actions) == [7]
    assert packets_of(actions) == []
    assert packets_of(story.session.handled(story.now)) == [Puback(3)]


def test_pushes_are_offered_one_at_a_time_and_in_order(story: Story) -> None:
    story.connect()
    assert offered(story.hear(push(1, 1), push(2, 2), push(3, 3))) == [1]
    assert offered(story.session.handled(story.now)) == [2]
    assert offered(story.session.handled(story.now)) == [3]
    assert offered(story.session.handled(story.now)) == []


def test_a_push_that_comes_again_is_acknowledged_and_not_offered(story: Story) -> None:
    story.connect()
    story.hear(push(7, 3))
    story.session.handled(story.now)
    story.reconnect()
    actions = story.hear(push(7, 3, dup=True))
    assert (offered(actions), packets_of(actions)) == ([], [Puback(3)])
    assert story.session.repeats == 1


def test_a_push_handled_before_a_restart_is_not_offered(story: Story) -> None:
    story.session.remember_all([5, 6])
    story.connect()
    actions = story.hear(push(5, 1), push(6, 2), push(7, 3))
    assert (offered(actions), packets_of(actions)) == ([7], [Puback(1), Puback(2)])


def test_a_push_that_comes_again_while_it_is_handed_over_is_offered_once(story: Story) -> None:
    story.connect()
    story.hear(push(7, 3))
    story.reconnect()
    assert offered(story.hear(push(7, 9, dup=True))) == []
    assert packets_of(story.session.handled(story.now)) == [Puback(9)]


def test_an_acknowledgement_does_not_reach_into_the_next_connection(story: Story) -> None:
    story.connect()
    story.hear(push(7, 3))
    story.reconnect()
    assert packets_of(story.session.handled(story.now)) == []


def test_what_was_not_offered_is_left_to_the_next_connection(story: Story) -> None:
    story.connect()
    story.hear(push(1, 1), push(2, 2))
    story.reconnect()
    assert offered(story.session.handled(story.now)) == []
    assert offered(story.hear(push(2, 2, dup=True))) == [2]


def test_a_failed_push_is_not_acknowledged_and_comes_again(story: Story) -> None:
    story.connect()
    story.hear(push(1, 1), push(2, 2))
    actions = story.session.failed(story.now)
    assert (offered(actions), packets_of(actions)) == ([2], [])
    assert packets_of(story.session.handled(story.now)) == [Puback(2)]
    story.reconnect()
    assert offered(story.hear(push(1, 1, dup=True))) == [1]
    assert packets_of(story.session.handled(story.now)) == [Puback(1)]


def test_acknowledgements_keep_the_order_of_the_pushes(story: Story) -> None:
    story.session.remember_all([2])
    story.connect()
    assert packets_of(story.hear(push(1, 1), push(2, 2))) == []
    assert packets_of(story.session.handled(story.now)) == [Puback(1), Puback(2)]


def test_seen_is_bounded(story: Story) -> None:
    story.session.remember_all(range(SEEN_KEPT + 1))
    story.connect()
    actions = story.hear(push(SEEN_KEPT, 1), push(1, 2), push(0, 3))
    assert (offered(actions), packets_of(actions)) == ([0], [Puback(1), Puback(2)])


@pytest.mark.parametrize(
    "payload", [b"", b"{", b"[1]", b"{}", b'{"msg_id": "x"}', b'{"msg_id": 9223372036854775808}']
)
def test_what_is_no_push_is_acknowledged_and_told(story: Story, payload: bytes) -> None:
    story.connect()
    actions = story.hear(Publish("push", payload, qos=1, packet_id=1))
    assert packets_of(actions) == [Puback(1)]
    assert any(isinstance(action, Discarded) for action in actions)


def test_more_pushes_than_asked_for_end_the_connection(story: Story) -> None:
    story.connect()
    actions = story.hear(*(push(i, i) for i in range(1, 6)))
    assert packets_of(actions) == [Disconnect(Reason.RECEIVE_MAXIMUM_EXCEEDED)]
    assert story.session.phase is Phase.RESTING


@given(chunk=st.integers(1, 40))
def test_bytes_may_come_in_any_pieces(chunk: int) -> None:
    story = Story()
    story.wait()
    story.session.opened(story.now)
    data = b"".join(encode(packet, 5) for packet in (Connack(True), push(1, 1), Pingresp(), push(2, 2)))
    actions = [
        action
        for start in range(0, len(data), chunk)
        for action in story.session.receive(data[start : start + chunk], story.now)
    ]
    assert actions[0] == Online(True)
    assert offered(actions) == [1]
    assert offered(story.session.handled(story.now)) == [2]


# The life of a device: whatever the network and the app do, each push is handled once


@given(
    st.lists(st.sampled_from(["push", "handled", "failed", "lost", "restart"]), max_size=60),
)
def test_every_push_is_handled_exactly_once(events: list[str]) -> None:
    story, handled, owed, busy = Story(), [], {}, None
    flying: dict[int, int] = {}  # packet id -> msg_id
    story.connect()

    def see(actions: list[Action]) -> None:
        nonlocal busy
        for action in actions:
            if isinstance(action, Offer):
                assert busy is None
                busy = action.push.msg_id
        for packet in packets_of(actions):
            if isinstance(packet, Puback):
                msg_id = flying.pop(packet.packet_id)
                assert msg_id in handled
                owed.pop(msg_id, None)

    def bring() -> None:
        """As the server: what is owed and not on its way, in order, as far as the window reaches."""
        for msg_id in owed:
            if msg_id not in flying.values() and len(flying) < SETTINGS.receive_maximum:
                packet_id = next(i for i in range(1, 10) if i not in flying)
                flying[packet_id] = msg_id
                see(story.hear(push(msg_id, packet_id)))

    for number, event in enumerate([*events, *["lost", *["handled"] * 80] * 3]):
        if event == "push":
            owed[number] = None
        elif event in ("handled", "failed") and busy is not None:
            if event == "handled":
                handled.append(busy)
            busy = None
            see(story.session.handled(story.now) if event == "handled" else story.session.failed(story.now))
        elif event == "lost":
            flying.clear()
            story.reconnect()
        elif event == "restart":  # only what is durable survives
            flying.clear()
            busy, story = None, Story()
            story.session.remember_all(handled)
            story.connect()
        bring()
    assert sorted(handled) == [number for number, event in enumerate(events) if event == "push"]
    assert not owed


# Reports


def test_a_report_is_answered(story: Story) -> None:
    story.connect()
    ticket, actions = story.session.publish("event/x", b"1", story.now)
    assert packets_of(actions) == [Publish("event/x", b"1", qos=1, packet_id=ticket)]
    assert story.hear(Puback(ticket)) == [Answered(ticket, Reason.SUCCESS)]
    assert story.hear(Puback(ticket)) == []


def test_a_refusal_carries_reason_text_and_code(story: Story) -> None:
    story.connect()
    ticket, _ = story.session.publish("receipt", b"", story.now)
    properties: Properties = {"reason_string": "bad event", "user_properties": (("code", "3004"),)}
    (answered,) = story.hear(Puback(ticket, Reason.PAYLOAD_FORMAT_INVALID, properties))
    assert answered == Answered(ticket, Reason.PAYLOAD_FORMAT_INVALID, "bad event", 3004)
    assert answered.refused


def test_a_report_made_offline_leaves_with_the_next_connection(story: Story) -> None:
    ticket, actions = story.session.publish("event/x", b"1", story.now)
    assert actions == []
    assert packets_of(story.connect()) == [Publish("event/x", b"1", qos=1, packet_id=ticket)]


@pytest.mark.parametrize("resumed", [True, False])
def test_an_unanswered_report_is_sent_again_with_dup_where_the_session_survived(resumed: bool) -> None:
    story = Story()
    story.connect()
    ticket, _ = story.session.publish("event/x", b"1", story.now)
    story.session.lost("gone", story.now)
    again = Publish("event/x", b"1", qos=1, packet_id=ticket, dup=resumed)
    assert packets_of(story.connect(resumed=resumed)) == [again]


def test_reports_keep_to_the_servers_window(story: Story) -> None:
    story.connect(receive_maximum=2)
    tickets = [story.session.publish("event/x", b"", story.now)[0] for _ in range(3)]
    actions = story.hear(Puback(tickets[0]))
    assert packets_of(actions) == [Publish("event/x", b"", qos=1, packet_id=tickets[2])]


def test_reports_that_nobody_answers_end_the_connection(story: Story) -> None:
    story.connect()
    story.session.publish("event/x", b"", story.now)
    assert story.wait()[0] == Drop()
    assert story.now == 1005.0


def test_a_report_too_large_for_the_server_is_refused_here(story: Story) -> None:
    story.connect(maximum_packet_size=50)
    ticket, (answered,) = story.session.publish("event/x", b"x" * 100, story.now)
    assert isinstance(answered, Answered)
    assert (answered.ticket, answered.reason) == (ticket, Reason.PACKET_TOO_LARGE)


def test_the_outbox_is_bounded(story: Story) -> None:
    for _ in range(MAX_OUTBOX):
        story.session.publish("event/x", b"", story.now)
    with pytest.raises(OutboxFull):
        story.session.publish("event/x", b"", story.now)


def test_packet_ids_wrap_around_and_skip_those_in_use(story: Story) -> None:
    story.connect()
    kept, _ = story.session.publish("event/x", b"", story.now)
    for _ in range(70_000):
        ticket, _ = story.session.publish("event/y", b"", story.now)
        assert ticket != kept
        assert 0 < ticket <= 65_535
        story.hear(Puback(ticket))


# The end, and a server that breaks rules


def test_close_says_goodbye(story: Story) -> None:
    story.connect()
    actions = story.session.close(story.now)
    assert (packets_of(actions), actions[-1]) == ([Disconnect()], Drop())
    assert story.session.deadline is None


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (Connack(), Reason.PROTOCOL_ERROR),
        (Publish("push", b"", qos=2, packet_id=1), Reason.PROTOCOL_ERROR),
        (Publish("push", b"", qos=1, packet_id=1, properties={"topic_alias": 1}), Reason.PROTOCOL_ERROR),
        (Connect("x", version=5), Reason.PROTOCOL_ERROR),
        (Publish("push", b"x" * 300_000), Reason.PACKET_TOO_LARGE),
    ],
)
def test_a_broken_rule_is_told_and_tried_again(story: Story, packet: Packet, reason: Reason) -> None:
    story.connect()
    actions = story.hear(packet)
    assert packets_of(actions) == [Disconnect(reason)]
    assert isinstance(actions[-1], Offline)
    assert story.wait() == [Open(None)]


def test_anything_but_connack_first_is_a_broken_rule(story: Story) -> None:
    story.wait()
    story.session.opened(story.now)
    assert [type(action) for action in story.hear(push(1))] == [Drop, Offline]
