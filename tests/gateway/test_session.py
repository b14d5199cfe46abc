"""Stories of the session machine: packets in, actions and bytes out, the clock an argument."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.model import StoredMessage
from gateway.live import LivePush, encoding
from gateway.mailbox import Mailbox, MailboxLimits
from gateway.messages import TopicCopy, TopicMessage
from gateway.mqtt import (
    Disconnect,
    Pingreq,
    ProtocolError,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Reason,
    Subscribe,
    Subscription,
    TopicAliasInvalid,
    decode,
)
from gateway.session import (
    Acked,
    Closed,
    Manners,
    Published,
    Send,
    Session,
    SessionLimits,
    Subscribed,
)


def session(version: int = 5, **values: Any) -> Session:
    return Session(encoding(version, "android"), devno=7, **values)


def push(msg_id: int) -> LivePush:
    return LivePush(StoredMessage(msg_id, 1, b'{"notification":{"alert":"hi"}}', 0.0, 1e9))


def read(frame: bytes, version: int = 5) -> Any:
    found = decode(frame, 0, version, 1 << 20)
    assert found is not None
    assert found[1] == len(frame)
    return found[0]


def test_a_push_is_sent_on_push_with_qos_1_and_its_msg_id() -> None:
    packet = read(session().send_push(push(123), now=0.0))
    assert (packet.topic, packet.qos, packet.dup, packet.packet_id) == ("push", 1, False, 1)
    assert packet.payload == b'{"msg_id":"123","notification":{"alert":"hi"}}'


def test_an_acknowledgement_names_the_push_and_makes_room() -> None:
    device, first = session(window=1), push(1)
    device.send_push(first, now=0.0)
    assert device.room == 0
    assert device.receive(Puback(1), now=1.0) == [Acked(first)]
    assert device.room == 1
    assert device.unacked is None


def test_an_acknowledgement_of_nothing_is_ignored() -> None:
    device = session()
    assert device.receive(Puback(9), now=0.0) == []
    device.send_push(push(1), now=0.0)
    assert device.receive(Puback(9), now=0.0) == []
    assert device.room == device.window - 1


def test_unacked_is_resent_after_reconnect_with_dup_and_its_packet_id() -> None:
    before = session()
    for msg_id in (11, 12, 13):
        before.send_push(push(msg_id), now=0.0)
    before.acked(2, now=0.0)
    after = session()
    after.resend = before.suspend()
    assert after.resend == {11: 1, 13: 3}
    fresh = read(after.send_push(push(14), now=0.0))
    assert (fresh.packet_id, fresh.dup) == (2, False)  # 1 and 3 are spoken for
    again = read(after.send_push(push(13), now=0.0))
    assert (again.packet_id, again.dup) == (3, True)
    again = read(after.send_push(push(11), now=0.0))
    assert (again.packet_id, again.dup) == (1, True)


def test_waiting_time_restarts_with_every_progress() -> None:
    device = session()
    device.send_push(push(1), now=10.0)
    device.send_push(push(2), now=20.0)
    assert device.waiting_since == 10.0
    device.acked(1, now=25.0)
    assert device.waiting_since == 25.0


def test_packet_ids_wrap_around_past_those_in_flight() -> None:
    device = session(window=65_535)
    device.next_id = 65_535
    ids = [read(device.send_push(push(n), now=0.0)).packet_id for n in range(1, 4)]
    assert ids == [65_535, 1, 2]
    device.next_id = 65_535
    assert read(device.send_push(push(9), now=0.0)).packet_id == 3


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=200), st.integers(1, 5))
def test_window_and_ids_hold_whatever_happens(steps: list[tuple[bool, int]], window: int) -> None:
    device = session(window=window)
    device.next_id = 65_530
    in_flight: dict[int, int] = {}
    for msg_id, (send, which) in enumerate(steps, start=1):
        if send and device.room > 0:
            packet_id = read(device.send_push(push(msg_id), now=0.0)).packet_id
            assert packet_id not in in_flight
            in_flight[packet_id] = msg_id
        elif not send and in_flight:
            packet_id = sorted(in_flight)[which % len(in_flight)]
            acked = device.acked(packet_id, now=0.0)
            assert acked is not None
            assert acked.msg_id == in_flight.pop(packet_id)
        assert device.room == window - len(in_flight)
        assert len(in_flight) <= window


# Inbound


def test_ping_is_answered() -> None:
    assert session().receive(Pingreq(), now=0.0) == [Send(b"\xd0\x00")]


@pytest.mark.parametrize("packet", [Subscribe(1, (Subscription("a"),))])
def test_subscribe_is_for_the_node(packet: Subscribe) -> None:
    assert session().receive(packet, now=0.0) == [Subscribed(packet)]


def test_answers_keep_the_order_of_the_messages() -> None:
    device = session()
    first, second = Publish("event/a", b"", 1, packet_id=5), Publish("event/b", b"", 1, packet_id=6)
    assert device.receive(first, 0.0) == [Published(first)]
    assert device.receive(second, 0.0) == [Published(second)]
    assert device.answer(second) == b""
    assert device.answer(first) == b"\x40\x02\x00\x05\x40\x02\x00\x06"


def test_a_refusal_carries_reason_text_and_code_in_mqtt_5_only() -> None:
    packet = Publish("x", b"", 1, packet_id=5)
    new, old = session(5), session(4)
    for device in (new, old):
        device.receive(packet, 0.0)
    refusal = read(new.answer(packet, Reason.NOT_AUTHORIZED, text="no", user_properties=[("code", "1")]))
    assert refusal == Puback(
        5, Reason.NOT_AUTHORIZED, {"reason_string": "no", "user_properties": (("code", "1"),)}
    )
    assert old.answer(packet, Reason.NOT_AUTHORIZED, text="no") == b"\x40\x02\x00\x05"


def test_qos_2_message_is_published_once_and_completed() -> None:
    device = session()
    packet = Publish("a", b"x", 2, packet_id=3)
    assert device.receive(packet, 0.0) == [Published(packet)]
    assert read(device.answer(packet)) == Pubrec(3)
    again = Publish("a", b"x", 2, dup=True, packet_id=3)
    assert device.receive(again, 0.0) == [Send(b"\x50\x02\x00\x03")]
    assert device.receive(Pubrel(3), 0.0) == [Send(b"\x70\x02\x00\x03")]
    assert device.receive(packet, 0.0) == [Published(packet)]  # the id is free again


def test_pubrel_of_nothing_is_told_so() -> None:
    [action] = session().receive(Pubrel(3), 0.0)
    assert isinstance(action, Send)
    assert read(action.data) == Pubcomp(3, Reason.PACKET_IDENTIFIER_NOT_FOUND)


def test_more_unanswered_messages_than_announced_is_an_error_in_5_and_allowed_in_311() -> None:
    new, old = session(5, limits=SessionLimits(1)), session(4, limits=SessionLimits(1))
    for device in (new, old):
        device.receive(Publish("a", b"", 1, packet_id=1), 0.0)
    with pytest.raises(ProtocolError) as error:
        new.receive(Publish("a", b"", 1, packet_id=2), 0.0)
    assert error.value.reason is Reason.RECEIVE_MAXIMUM_EXCEEDED
    assert old.receive(Publish("a", b"", 1, packet_id=2), 0.0)


def test_topic_alias_is_set_and_used() -> None:
    device = session()
    device.receive(Publish("a", b"", properties={"topic_alias": 1}), 0.0)
    [action] = device.receive(Publish("", b"x", properties={"topic_alias": 1}), 0.0)
    assert isinstance(action, Published)
    assert action.packet.topic == "a"


def test_unknown_and_excessive_topic_aliases_are_errors() -> None:
    with pytest.raises(ProtocolError):
        session().receive(Publish("", b"x", properties={"topic_alias": 1}), 0.0)
    with pytest.raises(TopicAliasInvalid):
        session().receive(Publish("a", b"x", properties={"topic_alias": 17}), 0.0)


@pytest.mark.parametrize(("reason", "with_will"), [(Reason.SUCCESS, False), (Reason(4), True)])
def test_goodbye_says_whether_the_will_is_sent(reason: Reason, with_will: bool) -> None:
    assert session().receive(Disconnect(reason), 0.0) == [Closed(with_will, None)]


# Ordinary messages


def copy(payload: bytes = b"x", qos: int = 1, **values: Any) -> TopicCopy:
    return TopicCopy(TopicMessage("a/b", payload, qos, **values), qos)


def test_a_full_window_queues_ordinary_messages_and_an_ack_lets_them_out() -> None:
    device = session(window=1)
    frame = device.send_copy(copy(b"1"), now=0.0)
    assert frame is not None
    assert read(frame).payload == b"1"
    assert device.send_copy(copy(b"2"), now=0.0) is None
    device.acked(1, now=0.0)
    [frame] = device.drain_mailbox(now=0.0)
    assert read(frame).payload == b"2"


def test_qos_2_towards_the_subscriber() -> None:
    device = session()
    frame = device.send_copy(copy(qos=2), now=0.0)
    assert frame is not None
    assert read(frame).qos == 2
    [action] = device.receive(Pubrec(1), 0.0)
    assert isinstance(action, Send)
    assert read(action.data) == Pubrel(1)
    assert device.room == device.window - 1
    assert device.receive(Pubcomp(1), 0.0) == []
    assert device.room == device.window


def test_puback_for_a_qos_2_message_is_an_error() -> None:
    device = session()
    device.send_copy(copy(qos=2), now=0.0)
    with pytest.raises(ProtocolError):
        device.receive(Puback(1), 0.0)


def test_what_was_in_flight_is_sent_again_in_order_when_the_session_is_taken_up() -> None:
    before = session()
    for payload, qos in ((b"1", 1), (b"2", 2), (b"3", 1)):
        before.send_copy(copy(payload, qos), now=0.0)
    before.receive(Pubrec(2), 0.0)
    mailbox = before.own_mailbox()
    before.suspend()
    after = session()
    first, second, third = [read(frame) for frame in after.resume(mailbox, now=0.0)]
    assert (first.payload, first.dup, first.packet_id) == (b"1", True, 1)
    assert second == Pubrel(2)
    assert (third.payload, third.dup, third.packet_id) == (b"3", True, 3)
    assert after.room == after.window - 3


def test_mailbox_is_bounded_in_number_and_bytes_and_counts_what_it_drops() -> None:
    few = Mailbox(MailboxLimits(queued_messages=2))
    small = Mailbox(MailboxLimits(queued_bytes=10))
    for _ in range(3):
        few.put(copy(b"x"))
        small.put(copy(b"xxxx"))
    assert (len(few.queue), few.dropped) == (2, 1)
    assert (len(small.queue), small.dropped) == (1, 2)


def test_expiry_is_counted_down_and_an_expired_message_is_not_sent() -> None:
    device = session(window=1)
    device.send_copy(copy(b"1"), now=0.0)
    device.send_copy(copy(b"gone", expires_at=5.0), now=0.0)
    device.send_copy(copy(b"kept", expires_at=60.0), now=0.0)
    device.acked(1, now=0.0)
    [frame] = device.drain_mailbox(now=20.0)
    packet = read(frame)
    assert packet.payload == b"kept"
    assert packet.properties["message_expiry_interval"] == 40


def test_a_message_over_the_peers_maximum_packet_size_is_not_sent() -> None:
    device = session(manners=Manners(maximum_packet=50))
    assert device.send_copy(copy(b"x" * 100), now=0.0) is None
    assert device.room == device.window
