"""Sessions on a running server, read packet by packet: what survives a connection, what is sent again, limits."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace

import orjson
import pytest

from clients.local_server import LocalServer
from gateway.mqtt import (
    Connack,
    Disconnect,
    Pingreq,
    Pingresp,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Reason,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
    Will,
)
from tests.conftest import StartServer
from tests.gateway.peer import (
    TICK,
    Peer,
    accounts,
    acknowledged_within,
    call,
    clock_of,
    connect_packet,
    counted,
    device,
    eventually,
    let_pass,
    publisher,
    push,
    push_body,
    register,
)
from tests.patience import PATIENCE

BOTH = pytest.mark.parametrize("version", [4, 5])


def alert(packet: Publish) -> object:
    return orjson.loads(packet.payload)["notification"]["alert"]


def ids(packet: Publish) -> str:
    return str(orjson.loads(packet.payload)["msg_id"])


# Pushes


@BOTH
def test_a_push_arrives_online_and_its_delivery_is_recorded(server: LocalServer, version: int) -> None:
    with device(server, f"online-{version}", version=version) as peer:
        msg_id = push(server, server.app, f"online-{version}")
        packet = peer.push()
        assert (ids(packet), alert(packet), packet.qos, packet.dup, packet.retain) == (
            msg_id,
            "Hello",
            1,
            False,
            False,
        )
        eventually(lambda: accounts(server, server.app, msg_id)["delivered"] == 1)


@BOTH
def test_pushes_wait_for_a_device_that_is_away_and_come_in_order(server: LocalServer, version: int) -> None:
    name = f"away-{version}"
    with device(server, name, version=version):
        pass
    sent = [push(server, server.app, name, str(i)) for i in range(40)]  # more than a window
    with device(server, name, version=version, clean=True) as peer:  # pushes are not of the session
        assert [ids(peer.push()) for _ in sent] == sent


@BOTH
def test_an_unacknowledged_push_is_sent_again_with_dup_under_its_packet_id(
    server: LocalServer, version: int
) -> None:
    name = f"again-{version}"
    with device(server, name, version=version) as peer:
        sent = [push(server, server.app, name, str(i)) for i in range(3)]
        first = [peer.push(ack=False) for _ in sent]
        peer.send(Puback(first[1].packet_id))
        eventually(lambda: accounts(server, server.app, sent[1])["delivered"] == 1)
    with Peer(server.addresses.mqtt) as peer:
        assert peer.connect(connect_packet(server.app, name, version=version)).session_present
        assert [peer.push(), peer.push()] == [replace(first[0], dup=True), replace(first[2], dup=True)]
        peer.expect_nothing()


@BOTH
def test_after_a_clean_start_it_is_sent_as_a_new_packet(server: LocalServer, version: int) -> None:
    name = f"clean-{version}"
    with device(server, name, version=version) as peer:
        msg_id = push(server, server.app, name)
        peer.push(ack=False)
    with Peer(server.addresses.mqtt) as peer:
        assert not peer.connect(connect_packet(server.app, name, version=version, clean=True)).session_present
        packet = peer.push()
        assert (ids(packet), packet.dup) == (msg_id, False)


def test_receive_maximum_is_a_window(server: LocalServer) -> None:
    with device(server, "window", properties={"receive_maximum": 2}) as peer:
        sent = [push(server, server.app, "window", str(i)) for i in range(5)]
        flying = [peer.push(ack=False), peer.push(ack=False)]
        peer.expect_nothing()
        for _ in sent[2:]:
            peer.send(Puback(flying.pop(0).packet_id))
            flying.append(peer.push(ack=False))
            peer.expect_nothing(0.1)
        assert [ids(packet) for packet in flying] == sent[-2:]


def test_a_push_over_the_maximum_packet_size_stays_and_a_smaller_one_passes(server: LocalServer) -> None:
    with (
        counted(server, "deliveries_too_large_total"),
        device(server, "small", properties={"maximum_packet_size": 200}) as peer,
    ):
        large = push(server, server.app, "small", "x" * 500)
        small = push(server, server.app, "small", "y")
        assert ids(peer.push()) == small
        assert accounts(server, server.app, large)["pending"] == 1
    with device(server, "small") as peer:
        assert ids(peer.push()) == large


def test_a_push_with_time_to_live_0_reaches_only_who_is_online(server: LocalServer) -> None:
    with device(server, "now-a") as peer, device(server, "now-b"):
        pass
    with device(server, "now-a") as peer:
        body = push_body(["now-a", "now-b"], time_to_live=0)
        assert call(server, server.app, "POST", "/v3/push", body)[0] == 200
        later = push(server, server.app, "now-b")
        peer.push()
    with device(server, "now-b") as peer:
        assert ids(peer.push()) == later


def test_a_device_may_ask_for_messagepack(server: LocalServer) -> None:
    import msgpack

    with device(server, "packed", properties={"user_properties": (("format", "msgpack"),)}) as peer:
        msg_id = push(server, server.app, "packed")
        assert msgpack.unpackb(peer.push().payload) == {"msg_id": msg_id, "notification": {"alert": "Hello"}}


def test_push_cannot_be_joined_or_left(server: LocalServer) -> None:
    with device(server, "joiner") as peer:
        suback = peer.subscribe("push", qos=2)
        assert isinstance(suback, Suback)
        assert suback.reasons == (Reason.GRANTED_QOS_1,)
        peer.send(Unsubscribe(2, ("push",)))
        assert peer.expect(Unsuback).reasons == (Reason.NO_SUBSCRIPTION_EXISTED,)
        push(server, server.app, "joiner")
        peer.push()


# Sessions


def test_session_present(server: LocalServer) -> None:
    def present(**options: object) -> bool:
        with Peer(server.addresses.mqtt) as peer:
            connack = peer.connect(connect_packet(server.app, "present", **options))  # type: ignore[arg-type]
            peer.send(Disconnect())
            assert peer.rest() == []
            return connack.session_present

    assert not present()
    assert present()
    assert present(expiry=0)  # the last time: it ends with this connection
    assert not present()
    assert not present(clean=True)
    assert present(version=4)
    assert not present(version=4, clean=True)
    assert not present(version=4)


def test_a_session_expires(server: LocalServer) -> None:
    with device(server, "expiring") as peer:
        assert isinstance(peer.subscribe("expiring/#"), Suback)
    with Peer(server.addresses.mqtt) as peer:
        assert peer.connect(connect_packet(server.app, "expiring", expiry=1)).session_present
        peer.send(Disconnect())
        assert peer.rest() == []
    let_pass(server, 2.0)  # a whole second, rounded up
    with Peer(server.addresses.mqtt) as peer:
        assert not peer.connect(connect_packet(server.app, "expiring", expiry=1)).session_present


def test_disconnect_may_shorten_the_session_but_not_begin_one(server: LocalServer) -> None:
    with device(server, "shortened") as peer:
        peer.send(Disconnect(properties={"session_expiry_interval": 0}))
        assert peer.rest() == []
    with Peer(server.addresses.mqtt) as peer:
        assert not peer.connect(connect_packet(server.app, "shortened", expiry=0)).session_present
        peer.send(Disconnect(properties={"session_expiry_interval": 10}))
        [told] = peer.rest()
        assert isinstance(told, Disconnect)
        assert told.reason is Reason.PROTOCOL_ERROR


@BOTH
def test_the_newer_connection_takes_over(server: LocalServer, version: int) -> None:
    name = f"twice-{version}"
    samples = ("takeovers_total", 'disconnects_total{reason="taken over"}')
    with counted(server, *samples), device(server, name, version=version) as old:
        msg_id = push(server, server.app, name)
        first = old.push(ack=False)
        with device(server, name, version=version) as new:
            told = [Disconnect(Reason.SESSION_TAKEN_OVER)] if version == 5 else []
            assert old.rest() == told
            assert new.push() == replace(first, dup=True)
            eventually(lambda: accounts(server, server.app, msg_id)["delivered"] == 1)


def test_queued_messages_and_qos_2_survive_the_connection(server: LocalServer) -> None:
    with device(server, "keeper", properties={"receive_maximum": 3}) as peer:
        peer.subscribe("keep/#", qos=2)
        with publisher(server) as backend:
            for i in range(5):
                backend.send(Publish(f"keep/{i}", b"x", 2 if i == 1 else 1, packet_id=i + 1))
            backend.send(Pubrel(2))
            # One of QoS 2 leaves when its packet id is saved, and others may overtake it.
            first = sorted((peer.expect(Publish) for _ in range(3)), key=lambda packet: packet.packet_id)
            assert [packet.topic for packet in first] == ["keep/0", "keep/1", "keep/2"]
            peer.send(Pubrec(first[1].packet_id))
            assert peer.expect(Pubrel).packet_id == first[1].packet_id
    with Peer(server.addresses.mqtt) as peer:
        # One at a time: the window is smaller than what is in flight.
        connect = connect_packet(server.app, "keeper", properties={"receive_maximum": 1})
        assert peer.connect(connect).session_present
        assert peer.expect(Publish) == replace(first[0], dup=True)
        peer.expect_nothing(0.1)
        peer.send(Puback(first[0].packet_id))
        assert peer.expect(Pubrel).packet_id == first[1].packet_id
        peer.expect_nothing(0.1)
        peer.send(Pubcomp(first[1].packet_id))
        assert peer.expect(Publish) == replace(first[2], dup=True)
        peer.send(Puback(first[2].packet_id))
        for i in (3, 4):
            packet = peer.expect(Publish)
            assert (packet.topic, packet.dup) == (f"keep/{i}", False)
            peer.send(Puback(packet.packet_id))


def test_an_inbound_qos_2_message_is_taken_once_across_connections(server: LocalServer) -> None:
    with device(server, "once-sub") as subscriber:
        subscriber.subscribe("once")
        message = Publish("once", b"x", 2, packet_id=9)
        with device(server, "once-pub") as peer:
            peer.send(message)
            assert peer.expect(Pubrec).packet_id == 9
        with device(server, "once-pub") as peer:
            peer.send(replace(message, dup=True))
            assert peer.expect(Pubrec).packet_id == 9
            peer.send(Pubrel(9))
            assert peer.expect(Pubcomp).reason is Reason.SUCCESS
        subscriber.send(Puback(subscriber.expect(Publish).packet_id))
        subscriber.expect_nothing()


# Time


@BOTH
def test_silence_of_one_and_a_half_keep_alives_ends_the_connection(server: LocalServer, version: int) -> None:
    with counted(server, 'disconnects_total{reason="keep-alive timeout"}'):
        began = clock_of(server)
        with device(server, f"silent-{version}", version=version, keep_alive=1) as peer:
            assert peer.rest() == ([Disconnect(Reason.KEEP_ALIVE_TIMEOUT)] if version == 5 else [])
        assert time.monotonic() - began >= 1.5 - TICK


def test_a_server_lowers_what_is_too_long_and_says_so(start_server: StartServer) -> None:
    server = start_server("--mqtt-keep-alive-max", "100", "--mqtt-session-expiry-max", "60")
    with Peer(server.addresses.mqtt) as peer:
        told = peer.connect(connect_packet(server.app, "long", keep_alive=101)).properties
        assert (told["server_keep_alive"], told["session_expiry_interval"]) == (100, 60)
    with Peer(server.addresses.mqtt) as peer:
        told = peer.connect(connect_packet(server.app, "none", keep_alive=0, expiry=60)).properties
        assert told["server_keep_alive"] == 100
        assert "session_expiry_interval" not in told
    with Peer(server.addresses.mqtt) as peer:
        told = peer.connect(connect_packet(server.app, "fine", keep_alive=100, expiry=60)).properties
        assert "server_keep_alive" not in told
        assert (told["receive_maximum"], told["topic_alias_maximum"]) == (256, 16)


def test_a_peer_without_client_id_is_told_everything(server: LocalServer) -> None:
    with Peer(server.addresses.mqtt) as peer:
        connect = connect_packet(server.app, "", password=server.app.master_secret, keep_alive=0)
        told = peer.connect(connect).properties
        assert len(told["assigned_client_identifier"]) == 20
        assert (told["server_keep_alive"], told["receive_maximum"]) == (1200, 256)


@BOTH
def test_without_an_acknowledgement_the_connection_ends(
    start_server: StartServer, version: int, quick: str
) -> None:
    server = start_server("--carriers-directory", quick)
    with (
        counted(server, 'disconnects_total{reason="ack timeout"}'),
        device(server, "mute", version=version) as peer,
    ):
        msg_id = push(server, server.app, "mute")
        first = peer.push(ack=False)
        peer.send(Pingreq())
        told = [Disconnect(Reason.UNSPECIFIED_ERROR)] if version == 5 else []
        assert [packet for packet in peer.rest() if packet != Pingresp()] == told
    assert accounts(server, server.app, msg_id)["pending"] == 1
    with device(server, "mute", version=version) as peer:
        assert peer.push() == replace(first, dup=True)


@pytest.fixture
def quick(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Carrier profiles that lose patience after a second."""
    return str(acknowledged_within(1, tmp_path_factory.mktemp("carriers")))


# Wills


@BOTH
def test_a_will_is_sent_on_loss_and_not_on_disconnect(server: LocalServer, version: int) -> None:
    with device(server, f"heir-{version}") as heir:
        heir.subscribe(f"will-{version}/#")
        will = Will(f"will-{version}/lost", b"gone", 1)
        with device(server, f"mortal-{version}", version=version, will=will) as peer:
            peer.send(Disconnect())
            assert peer.rest() == []
        heir.expect_nothing()
        with device(server, f"mortal-{version}", version=version, will=will):
            pass
        packet = heir.expect(Publish)
        assert (packet.topic, packet.payload, packet.qos) == (f"will-{version}/lost", b"gone", 1)


def test_disconnect_with_will_message_sends_it(server: LocalServer) -> None:
    with device(server, "heir-w") as heir, device(server, "leaver", will=Will("wish", b"gone")) as peer:
        heir.subscribe("wish")
        peer.send(Disconnect(Reason.DISCONNECT_WITH_WILL_MESSAGE))
        assert heir.expect(Publish).payload == b"gone"


def test_a_delayed_will_is_sent_unless_the_session_is_taken_up(server: LocalServer) -> None:
    with device(server, "heir-d") as heir:
        heir.subscribe("late")
        for word, delay in ((b"not yet", 3600), (b"gone", 1)):
            will = Will("late", word, properties={"will_delay_interval": delay})
            with device(server, "sleeper", will=will) as peer:
                peer.send(Pingreq())
                peer.expect(Pingresp)
                heir.expect_nothing()
                left = clock_of(server)
        assert heir.expect(Publish).payload == b"gone"
        assert time.monotonic() - left >= 1 - TICK
        with device(server, "sleeper", clean=True):  # a will that still waited would go with its session
            heir.expect_nothing()


def test_a_retained_will_survives_a_restart(start_server: StartServer) -> None:
    server = start_server()
    with device(server, "heir-r") as heir:
        heir.subscribe("last")
        with device(server, "noble", will=Will("last", b"gone", 1, retain=True)):
            pass
        heir.expect(Publish)
        with publisher(server) as backend:  # after it in the store, so that it is there now
            backend.send(Publish("after", b"x", 1, retain=True, packet_id=1))
            backend.expect(Puback)
    server.restart()
    with device(server, "heir-r", clean=True) as heir:
        heir.subscribe("last")
        packet = heir.expect(Publish)
        assert (packet.payload, packet.retain) == (b"gone", True)


# Access


def test_a_device_of_a_closed_app_has_no_ordinary_topics(server: LocalServer) -> None:
    app = server.create_app("closed")
    token = register(server, app, "phone")
    refused = 'publishes_refused_total{reason="not allowed"}'
    with counted(server, refused, by=3), device(server, "phone", app=app, password=token) as peer:
        peer.send(Subscribe(1, (Subscription("#"), Subscription("push", 1))))
        assert peer.expect(Suback).reasons == (Reason.NOT_AUTHORIZED, Reason.GRANTED_QOS_1)
        peer.send(Publish("a/b", b"x", 1, packet_id=1), Publish("push", b"x", 2, packet_id=2))
        assert peer.expect(Puback).reason is Reason.NOT_AUTHORIZED
        assert peer.expect(Pubrec).reason is Reason.NOT_AUTHORIZED
        with device(server, "phone", app=app, password=token, version=4) as peer4:
            peer4.send(Subscribe(1, (Subscription("#"),)))
            assert peer4.expect(Suback).reasons == (Reason.UNSPECIFIED_ERROR,)
            peer4.send(Publish("a/b", b"x", 1, packet_id=1))
            assert peer4.expect(Puback) == Puback(1)
    with counted(server, 'refusals_total{reason="will not allowed"}'), Peer(server.addresses.mqtt) as peer:
        connack = peer.connect(connect_packet(app, "phone", password=token, will=Will("a", b"x")))
        assert connack.reason is Reason.NOT_AUTHORIZED


@pytest.mark.parametrize("topic", ["push", "receipt", "device", "event/gone"])
def test_a_will_on_a_reserved_topic_is_refused(server: LocalServer, topic: str) -> None:
    with counted(server, 'refusals_total{reason="will not allowed"}'), Peer(server.addresses.mqtt) as peer:
        connack = peer.connect(connect_packet(server.app, "forger", will=Will(topic, b"x")))
        assert connack.reason is Reason.NOT_AUTHORIZED


def test_publishers_of_a_closed_app_have_topics_and_apps_do_not_meet(server: LocalServer) -> None:
    one, other = server.create_app("one"), server.create_app("other")
    with publisher(server, "reader", app=one) as reader, publisher(server, "reader", app=other) as stranger:
        reader.subscribe("#")
        stranger.subscribe("#")
        with publisher(server, "writer", app=one) as writer:
            writer.send(Publish("news", b"x", 1, packet_id=1))
            assert writer.expect(Puback).reason is Reason.SUCCESS
        assert reader.expect(Publish).topic == "news"
        stranger.expect_nothing()


# What devices tell


def test_receipts_and_events_reach_the_api(server: LocalServer) -> None:
    app = server.create_app("teller")
    token = register(server, app, "phone")
    with device(server, "phone", app=app, password=token) as peer:
        msg_id = push(server, app, "phone")
        peer.push()
        for number, event in enumerate(("shown", "clicked", "shown"), 1):
            body = orjson.dumps({"msg_id": msg_id, "event": event})
            peer.send(Publish("receipt", body, 1, packet_id=number))
            assert peer.expect(Puback).reason is Reason.SUCCESS
        row = accounts(server, app, msg_id)
        assert (row["shown"], row["clicked"], row["dismissed"]) == (1, 1, 0)
        peer.send(Publish("event/cart/paid", b'{"sum":3}', 2, packet_id=7))
        assert peer.expect(Pubrec).reason is Reason.SUCCESS
        peer.send(Publish("event/closed", b""), Disconnect())  # at QoS 0, and gone: it counts all the same
        assert peer.rest() == []

    def events() -> list[tuple[object, ...]]:
        rows = call(server, app, "GET", "/v1/events")[1]["events"]
        return [(row["registration_id"], row["name"], row["payload"]) for row in rows]

    eventually(lambda: len(events()) == 2)
    assert events() == [("phone", "cart/paid", {"sum": 3}), ("phone", "closed", None)]


def test_a_device_changes_its_tags_and_alias(server: LocalServer) -> None:
    with device(server, "changer") as peer:
        peer.send(Publish("device", b'{"alias":"ann","tags":["red"]}', 1, packet_id=1))
        assert peer.expect(Puback).reason is Reason.SUCCESS
        assert call(server, server.app, "GET", "/v3/devices/changer")[1]["tags"] == ["red"]
        body = push_body([], "by alias") | {"audience": {"alias": ["ann"], "tag": ["red"]}}
        assert call(server, server.app, "POST", "/v3/push", body)[0] == 200
        assert alert(peer.push()) == "by alias"


@pytest.mark.parametrize(
    ("topic", "payload", "code"),
    [
        ("receipt", b"{", "3004"),
        ("receipt", b'{"msg_id":"1","event":"eaten"}', "3004"),
        ("event/x", b"not json", "3004"),
        ("event/x", b'"' + b"x" * 4096 + b'"', "3004"),
        ("event/" + "x" * 65, b"", "3004"),
        ("event/", b"", "3004"),
        ("device", b'{"alias":"a b"}', "7002"),
    ],
)
def test_what_is_wrong_is_told_and_counted(
    server: LocalServer, topic: str, payload: bytes, code: str
) -> None:
    samples = (f'publishes_refused_total{{reason="{code}"}}',)
    with counted(server, *samples, by=2), device(server, "wrong") as peer:
        peer.send(Publish(topic, payload, 1, packet_id=1))
        puback = peer.expect(Puback)
        assert puback.reason is Reason.PAYLOAD_FORMAT_INVALID
        assert puback.properties["user_properties"] == (("code", code),)
        assert puback.properties["reason_string"]
        with device(server, "wrong", version=4) as peer4:
            peer4.send(Publish(topic, payload, 1, packet_id=1))
            assert peer4.expect(Puback) == Puback(1)


# Publishers


def test_a_publisher_pushes_over_mqtt_and_puback_is_durable(start_server: StartServer) -> None:
    server = start_server()
    with device(server, "target"):
        pass
    with publisher(server) as backend:
        bodies = [orjson.dumps(push_body(["target"], str(i), sendno=i)) for i in range(3)]
        backend.send(*(Publish("push", body, 1, packet_id=i + 1) for i, body in enumerate(bodies)))
        answers = [backend.expect(Puback) for _ in bodies]
    server.restart()  # SIGKILL the next instant
    told = [dict(answer.properties["user_properties"]) for answer in answers]
    assert [(answer.packet_id, answer.reason) for answer in answers] == [
        (i, Reason.SUCCESS) for i in (1, 2, 3)
    ]
    assert [one["sendno"] for one in told] == ["0", "1", "2"]
    with device(server, "target") as peer:
        assert [ids(peer.push()) for _ in told] == [one["msg_id"] for one in told]


@pytest.mark.parametrize(
    ("payload", "reason", "code"),
    [
        (b"{", Reason.PAYLOAD_FORMAT_INVALID, "1003"),
        (b'{"platform":"all"}', Reason.PAYLOAD_FORMAT_INVALID, "1002"),
        (orjson.dumps(push_body(["nobody-here"])), Reason.NO_MATCHING_SUBSCRIBERS, "1011"),
        (orjson.dumps(push_body("all", "x" * 5000)), Reason.PAYLOAD_FORMAT_INVALID, "1005"),
        (orjson.dumps(push_body(["a"] * 1001)), Reason.PAYLOAD_FORMAT_INVALID, "1003"),
        (orjson.dumps(push_body("all", time_to_live=-1)), Reason.PAYLOAD_FORMAT_INVALID, "1003"),
    ],
)
def test_a_push_over_mqtt_is_checked_as_over_http(
    server: LocalServer, payload: bytes, reason: Reason, code: str
) -> None:
    status, answer = call(server, server.app, "POST", "/v3/push", payload)
    assert (status, str(answer["error"]["code"])) == (400, code)
    samples = (f'publishes_refused_total{{reason="{code}"}}', 'publishes_received_total{kind="push"}')
    with counted(server, *samples, by=2), publisher(server) as backend:
        backend.send(Publish("push", payload, 1, packet_id=1))
        puback = backend.expect(Puback)
        assert (puback.reason, puback.properties["user_properties"]) == (reason, (("code", code),))
        with publisher(server, version=4) as backend4:
            backend4.send(Publish("push", payload, 1, packet_id=1))
            assert backend4.expect(Puback) == Puback(1)


def test_a_311_publisher_pushes(server: LocalServer) -> None:
    with device(server, "target-4") as peer, publisher(server, "backend-4", version=4) as backend:
        backend.send(Publish("push", orjson.dumps(push_body(["target-4"])), 1, packet_id=1))
        assert backend.expect(Puback) == Puback(1)
        assert alert(peer.push()) == "Hello"


# Credentials


def test_a_revoked_token_closes_the_connection_and_opens_no_other(server: LocalServer) -> None:
    app = server.create_app("revoker")
    token = register(server, app, "phone")
    with (
        counted(
            server, 'disconnects_total{reason="token revoked"}', 'refusals_total{reason="token revoked"}'
        ),
        device(server, "phone", app=app, password=token) as peer,
    ):
        assert call(server, app, "DELETE", "/v1/devices/phone/token")[0] == 200
        peer_end = peer.rest()
        assert peer_end == [Disconnect(Reason.NOT_AUTHORIZED)]
        with Peer(server.addresses.mqtt) as again:
            connack = again.connect(connect_packet(app, "phone", password=token))
            assert (connack.reason, again.rest()) == (Reason.NOT_AUTHORIZED, [])
    with device(server, "phone", app=app, password=register(server, app, "phone")):
        pass


EXPIRED = 'refusals_total{reason="token expired"}'


def test_an_expired_token_opens_no_connection_but_does_not_end_one(start_server: StartServer) -> None:
    server = start_server("--push-token-lifetime", "3")
    app = server.create_app("hasty")
    with contextlib.ExitStack() as stack:

        def early() -> Peer | None:
            """Lives while its token does, which is not long on a machine that is slow."""
            peer, token = stack.enter_context(Peer(server.addresses.mqtt)), register(server, app, "early")
            return None if peer.connect(connect_packet(app, "early", password=token)).reason else peer

        peer, token = eventually(early), register(server, app, "late")

        def refused() -> Connack | None:
            with Peer(server.addresses.mqtt) as late:
                connack = late.connect(connect_packet(app, "late", password=token, version=4))
                return connack if connack.reason else None

        before = server.metrics().get(f"holdfast_{EXPIRED}", 0)
        connack = eventually(refused)
        assert connack.reason is Reason.NOT_AUTHORIZED
        assert server.metrics()[f"holdfast_{EXPIRED}"] == before + 1
        peer.send(Pingreq())
        peer.expect(Pingresp)


def test_a_rotated_secret_ends_publishers_and_a_deleted_app_everybody(server: LocalServer) -> None:
    app = server.create_app("moving")
    token = register(server, app, "phone")
    with (
        counted(
            server, 'disconnects_total{reason="secret rotated"}', 'disconnects_total{reason="app deleted"}'
        ),
        device(server, "phone", app=app, password=token) as peer,
        publisher(server, app=app) as backend,
    ):
        server_admin(server, f"/v1/app/{app.app_key}/rotate-secret")
        assert backend.rest() == [Disconnect(Reason.NOT_AUTHORIZED)]
        peer.expect_nothing(0.1)
        server_admin(server, f"/v1/app/{app.app_key}/delete")
        assert peer.rest() == [Disconnect(Reason.NOT_AUTHORIZED)]
        with Peer(server.addresses.mqtt) as again:
            connack = again.connect(connect_packet(app, "phone", password=token))
            assert connack.reason is Reason.BAD_USER_NAME_OR_PASSWORD


def server_admin(server: LocalServer, path: str) -> None:
    import urllib.request

    key = orjson.loads((server.data_dir / "admin.json").read_bytes())["key"]
    url, headers = server.addresses.admin + path, {"Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(url, b"", headers), timeout=PATIENCE) as response:
        assert response.status == 200


def test_a_drain_tells_everybody_why(start_server: StartServer) -> None:
    server = start_server()
    with device(server, "five") as five, device(server, "four", version=4) as four:
        push(server, server.app, "five")
        five.push()
        assert server.terminate() == 0
        assert five.rest() == [Disconnect(Reason.SERVER_SHUTTING_DOWN)]
        assert four.rest() == []
    server.start()
    with device(server, "five") as five:
        five.expect_nothing()  # its acknowledgement was recorded


def test_a_qos_2_push_that_was_not_accepted_is_tried_again_by_its_repeat(server: LocalServer) -> None:
    """The id of a refused message is free, whatever the version can be told (MQTT5-4.3.3-9)."""
    with publisher(server) as backend:
        backend.send(Publish("push", b"no JSON", 2, packet_id=5))
        assert backend.expect(Pubrec).reason is Reason.PAYLOAD_FORMAT_INVALID
        body = b'{"platform":"all","audience":"all","notification":{"alert":"hi"}}'
        backend.send(Publish("push", body, 2, packet_id=5))
        pubrec = backend.expect(Pubrec)
        assert pubrec.reason is Reason.SUCCESS
        backend.send(Publish("push", body, 2, dup=True, packet_id=5))
        assert "user_properties" not in backend.expect(Pubrec).properties  # a repeat, and no second push
        backend.send(Pubrel(5))
        assert backend.expect(Pubcomp).reason is Reason.SUCCESS
