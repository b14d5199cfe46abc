"""Durable sessions on a running server (decision 0008): what survives when it is stopped, or killed, and started
again; and what the store holds of sessions, which is nothing of those that are over.

A story is a generator: what happens before the restart, `yield`, what happens after. All of them begin together and
share one restart with SIGTERM and one with SIGKILL.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec
import pytest
from pyroaring import BitMap

from clients.local_server import AppKeys, LocalServer
from gateway.journal import COPIES, MESSAGE, SESSION, CopyRow
from gateway.mqtt import (
    Connack,
    Disconnect,
    Properties,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Reason,
    Subscribe,
    Subscription,
    Will,
)
from tests.conftest import StartServer
from tests.gateway.conformance.talk import (
    leave,
    nothing_waits,
    opened,
    publish,
    short,
    subscribe,
    take,
    take_all,
    unsubscribe,
)
from tests.gateway.peer import Peer, connect_packet, device, eventually, let_pass

MANY: Final = 1000
BATCH: Final = 100
VERSIONS: Final = (4, 5)
HOUR, DAY = 3600, 86_400  # seconds: no machine stands still for the one, no message of the other expires
STOPS: Final = ("sigterm", "sigkill")


@dataclass(frozen=True, slots=True)
class Scene:
    server: LocalServer
    name: str  # a client id, and a first level of topics, that no other story uses
    version: int  # of the client whose session it is about
    stop: str

    def client(self, suffix: str = "", **options: Any) -> contextlib.AbstractContextManager[Peer]:
        return device(self.server, self.name + suffix, **{"version": self.version, **options})

    def back(
        self, suffix: str = "", **options: Any
    ) -> contextlib.AbstractContextManager[tuple[Peer, Connack]]:
        return opened(self.server, self.name + suffix, **{"version": self.version, **options})

    def publish(self, topic: str, *payloads: bytes, qos: int = 1, **options: Any) -> None:
        """By somebody else. When this returns, the server has them."""
        with short(self.server, self.name + "-sender") as sender:
            for payload in payloads:
                publish(sender, f"{self.name}/{topic}", payload, qos, **options)


Story = Generator[None, None, None]
STORIES: Final[dict[str, tuple[Callable[[Scene], Story], Sequence[int]]]] = {}


def story(tell: Callable[[Scene], Story]) -> Callable[[Scene], Story]:
    STORIES[tell.__name__] = (tell, VERSIONS)
    return tell


def story_of_5(tell: Callable[[Scene], Story]) -> Callable[[Scene], Story]:
    """What 3.1.1 cannot say."""
    STORIES[tell.__name__] = (tell, VERSIONS[1:])
    return tell


# Subscriptions


@story
def subscriptions_stay_and_those_given_up_do_not(scene: Scene) -> Story:
    with scene.client() as peer:
        for qos in (0, 1, 2):
            subscribe(peer, f"{scene.name}/{qos}", qos=qos)
        subscribe(peer, f"{scene.name}/gone", f"{scene.name}/changed", qos=2)
        subscribe(peer, f"{scene.name}/changed", qos=1)
        unsubscribe(peer, f"{scene.name}/gone")
        yield
    with scene.back() as (peer, connack):
        assert connack.session_present
        for topic in ("0", "1", "2", "gone", "changed"):
            scene.publish(topic, b"x", qos=2)
        messages = take_all(peer, 4)
        assert [(m.topic.removeprefix(scene.name), m.qos) for m in messages] == [
            ("/0", 0),
            ("/1", 1),
            ("/2", 2),
            ("/changed", 1),
        ]
        nothing_waits(peer)


@story_of_5
def the_options_of_subscriptions_stay(scene: Scene) -> Story:
    with scene.client() as peer:
        kept = Subscription(f"{scene.name}/kept", 1, retain_as_published=True)
        subscribe(peer, kept, identifier=7)
        subscribe(peer, Subscription(f"{scene.name}/+", 1, no_local=True), identifier=268_435_455)
        leave(peer)
    yield
    with scene.back() as (peer, _):
        publish(peer, f"{scene.name}/other", b"its own")
        nothing_waits(peer)
        scene.publish("kept", b"x", retain=True)
        message = take(peer)
        assert message.retain
        assert set(message.properties["subscription_identifiers"]) == {7, 268_435_455}
        scene.publish("other", b"x", retain=True)
        message = take(peer)
        assert not message.retain
        assert message.properties["subscription_identifiers"] == (268_435_455,)


# Messages that wait


SAID: Final[Properties] = {
    "payload_format_indicator": 1,
    "content_type": "text/plain",
    "response_topic": "answers",
    "correlation_data": b"\x00\xff",
    "user_properties": (("a", "1"), ("a", "2")),
}


@story
def queued_messages_come_in_their_order_as_they_were_sent(scene: Scene) -> Story:
    with scene.client() as peer:
        subscribe(peer, f"{scene.name}/#", qos=2, identifier=0 if scene.version == 4 else 5)
        leave(peer)
    sent = [(n, 1 + n % 2) for n in range(40)]  # more than a window
    for n, qos in sent:
        scene.publish("t", b"%d" % n, qos=qos, properties=SAID)
    scene.publish("t", b"", qos=0)  # does not wait
    yield
    with scene.back() as (peer, _):
        messages = take_all(peer, len(sent))
        for wanted_qos in (1, 2):
            came = [m.payload for m in messages if m.qos == wanted_qos]
            assert came == [b"%d" % n for n, qos in sent if qos == wanted_qos]
        assert not any(m.dup or m.retain for m in messages)
        wanted = {**SAID, "subscription_identifiers": (5,)} if scene.version == 5 else {}
        assert all(m.properties == wanted for m in messages)
        nothing_waits(peer)


@story
def a_session_may_be_taken_up_with_the_other_version(scene: Scene) -> Story:
    with scene.client() as peer:
        subscribe(peer, f"{scene.name}/#", qos=2)
        scene.publish("t", b"0", qos=2, properties=SAID)
        first = peer.expect(Publish)
        leave(peer)
    scene.publish("t", b"1", properties=SAID)
    yield
    other = 9 - scene.version
    with scene.back(version=other) as (peer, connack):
        assert connack.session_present
        wanted: Properties = SAID if other == 5 else {}
        assert peer.receive() == replace(first, dup=True, properties=wanted)
        second = peer.expect(Publish)
        assert (second.payload, second.properties) == (b"1", wanted)


@story
def acknowledged_messages_do_not_come_again(scene: Scene) -> Story:
    with scene.client() as peer:
        subscribe(peer, f"{scene.name}/#", qos=2)
        scene.publish("one", b"x")
        scene.publish("two", b"x", qos=2)
        take_all(peer, 2)
        yield
    with scene.back() as (peer, connack):
        assert connack.session_present
        nothing_waits(peer)


@story
def a_full_queue_and_a_full_window_lose_nothing(scene: Scene) -> Story:
    """What was in flight when the server was killed joins what waited, over the limit of the queue."""
    with scene.client() as peer:
        subscribe(peer, f"{scene.name}/#", qos=1)
        with short(scene.server, scene.name + "-flood", properties={"receive_maximum": 10}) as sender:
            for n in range(1032):
                sender.send(Publish(f"{scene.name}/t", b"%d" % n, 1, packet_id=n % 200 + 1))
                if n % 100 == 99 or n == 1031:
                    for _ in range(n % 100 + 1):
                        sender.expect(Puback)
        yield
    with scene.back() as (peer, _):
        assert [m.payload for m in take_all(peer, 1032)] == [b"%d" % n for n in range(1032)]
        nothing_waits(peer)


@story_of_5
def a_message_expires_while_the_server_is_down(scene: Scene) -> Story:
    with scene.client() as peer:
        subscribe(peer, f"{scene.name}/#", qos=1)
        leave(peer)
    scene.publish("t", b"short", properties={"message_expiry_interval": 1})
    scene.publish("t", b"long", properties={"message_expiry_interval": DAY})
    yield
    let_pass(scene.server, 1.0)
    with scene.back() as (peer, _):
        message = take(peer)
        assert message.payload == b"long"
        assert DAY - HOUR < message.properties["message_expiry_interval"] < DAY
        nothing_waits(peer)


# In flight


@story
def an_unacknowledged_qos_1_message_of_who_is_connected_comes_again(scene: Scene) -> Story:
    with scene.client() as peer:
        subscribe(peer, f"{scene.name}/#", qos=1)
        scene.publish("t", b"0", b"1", b"2")
        flying = [peer.expect(Publish) for _ in range(3)]
        peer.send(Puback(flying[1].packet_id))
        nothing_waits(peer)
        yield
    with scene.back() as (peer, _):
        again = [peer.expect(Publish), peer.expect(Publish)]
        assert [m.payload for m in again] == [b"0", b"2"]
        if scene.stop == "sigterm":
            assert again == [replace(flying[0], dup=True), replace(flying[2], dup=True)]
        nothing_waits(peer)


@story
def an_unacknowledged_qos_1_message_of_who_is_away_comes_again_under_its_packet_id(scene: Scene) -> Story:
    with scene.client() as peer:
        subscribe(peer, f"{scene.name}/#", qos=1)
        scene.publish("t", b"0", b"1")
        flying = [peer.expect(Publish), peer.expect(Publish)]
        leave(peer)
    scene.publish("t", b"2")
    yield
    with scene.back() as (peer, _):
        assert [peer.receive(), peer.receive()] == [replace(m, dup=True) for m in flying]
        new = peer.expect(Publish)
        assert (new.payload, new.dup) == (b"2", False)
        assert new.packet_id not in {m.packet_id for m in flying}


@story
def a_qos_2_message_before_pubrec_comes_again_under_its_packet_id(scene: Scene) -> Story:
    with scene.client() as peer:
        subscribe(peer, f"{scene.name}/#", qos=2)
        scene.publish("t", b"0", b"1", qos=2)
        flying = [peer.expect(Publish), peer.expect(Publish)]
        yield
    with scene.back() as (peer, _):
        assert [peer.receive(), peer.receive()] == [replace(m, dup=True) for m in flying]
        nothing_waits(peer)


@story
def a_qos_2_message_after_pubrec_is_released_again(scene: Scene) -> Story:
    with scene.client() as peer:
        subscribe(peer, f"{scene.name}/#", qos=2)
        scene.publish("t", b"0", b"1", qos=2)
        flying = [peer.expect(Publish).packet_id, peer.expect(Publish).packet_id]
        peer.send(*map(Pubrec, flying))
        assert [peer.receive(), peer.receive()] == [*map(Pubrel, flying)]
        yield
    with scene.back() as (peer, _):
        assert [peer.receive(), peer.receive()] == [*map(Pubrel, flying)]
        peer.send(*map(Pubcomp, flying))
        nothing_waits(peer)
    with scene.back() as (peer, _):
        nothing_waits(peer)


@story
def an_inbound_qos_2_message_is_taken_once(scene: Scene) -> Story:
    with scene.client("-heir") as heir:
        subscribe(heir, f"{scene.name}/#", qos=1)
        leave(heir)
    message = Publish(f"{scene.name}/t", b"x", 2, packet_id=77)
    with scene.client() as peer:
        peer.send(message)
        assert peer.expect(Pubrec).packet_id == 77
        yield
    with scene.back() as (peer, connack):
        assert connack.session_present
        peer.send(replace(message, dup=True))
        assert peer.expect(Pubrec) == Pubrec(77)
        peer.send(Pubrel(77))
        assert peer.expect(Pubcomp) == Pubcomp(77)
        peer.send(replace(message, payload=b"new"))  # the id is that of a new message now
        assert peer.expect(Pubrec) == Pubrec(77)
    with scene.back("-heir") as (heir, _):
        assert [m.payload for m in take_all(heir, 2)] == [b"x", b"new"]
        nothing_waits(heir)


@story
def an_inbound_qos_2_message_is_released_after_the_restart(scene: Scene) -> Story:
    with scene.client() as peer:
        peer.send(Publish(f"{scene.name}/t", b"x", 2, packet_id=77))
        peer.expect(Pubrec)
        yield
    with scene.back() as (peer, _):
        peer.send(Pubrel(77), Pubrel(78))
        unknown = Reason.PACKET_IDENTIFIER_NOT_FOUND if scene.version == 5 else Reason.SUCCESS
        assert [peer.receive(), peer.receive()] == [Pubcomp(77), Pubcomp(78, unknown)]


@story
def an_inbound_qos_2_message_that_was_completed_leaves_its_packet_id_free(scene: Scene) -> Story:
    with scene.client() as peer:
        publish(peer, f"{scene.name}/t", b"old", 2)
        subscribe(peer, f"{scene.name}/#", qos=0)
        yield
    with scene.back() as (peer, _):
        peer.send(Publish(f"{scene.name}/t", b"new", 2, packet_id=9))
        assert {type(peer.receive()), type(peer.receive())} == {Publish, Pubrec}


# The life of sessions


@story_of_5
def a_session_expires_while_the_server_is_down(scene: Scene) -> Story:
    with scene.client(expiry=1) as peer:
        subscribe(peer, f"{scene.name}/#", qos=1)
        leave(peer)
    with scene.client("-told") as peer:
        subscribe(peer, f"{scene.name}/#", qos=1)
        peer.send(Disconnect(properties={"session_expiry_interval": 1}))
        assert peer.rest() == []
    scene.publish("t", b"x")
    yield
    let_pass(scene.server, 2.0)
    for suffix in ("", "-told"):
        with scene.back(suffix) as (peer, connack):
            assert not connack.session_present
            scene.publish("t", b"y")
            nothing_waits(peer)


@story
def a_session_that_ends_with_its_connection_is_not_back(scene: Scene) -> Story:
    with scene.client(clean=True, expiry=0) as peer:
        subscribe(peer, f"{scene.name}/#", qos=1)
        scene.publish("t", b"x")
        peer.expect(Publish)
        yield
    with scene.back() as (peer, connack):
        assert not connack.session_present
        nothing_waits(peer)


@story
def a_session_that_was_ended_is_not_back(scene: Scene) -> Story:
    with scene.client() as peer:
        subscribe(peer, f"{scene.name}/#", qos=1)
        leave(peer)
    scene.publish("t", b"x")
    with scene.back(clean=True) as (peer, _):
        subscribe(peer, f"{scene.name}/other", qos=1)
        leave(peer)
    scene.publish("t", b"y")
    yield
    with scene.back() as (peer, connack):
        assert connack.session_present is (
            scene.version == 5
        )  # in 3.1.1 a clean session ends with its connection
        scene.publish("t", b"z")
        nothing_waits(peer)


# Wills


def with_will(scene: Scene, delay: int) -> contextlib.AbstractContextManager[Peer]:
    will = Will(f"{scene.name}/will", b"gone", 1, False, {**SAID, "will_delay_interval": delay})
    return scene.client(version=5, will=will)


@contextlib.contextmanager
def heir_of(scene: Scene) -> Iterator[Peer]:
    with scene.client("-heir") as heir:
        yield heir


def name_an_heir(scene: Scene) -> None:
    with heir_of(scene) as heir:
        subscribe(heir, f"{scene.name}/will", qos=1)
        leave(heir)


@story
def a_will_whose_delay_began_is_published_when_it_is_over(scene: Scene) -> Story:
    name_an_heir(scene)
    with with_will(scene, 2) as peer:
        nothing_waits(peer)
    yield
    with heir_of(scene) as heir:
        message = take(heir)
        assert (message.payload, message.qos) == (b"gone", 1)
        assert message.properties == (SAID if scene.version == 5 else {})
        nothing_waits(heir)


@story
def a_will_is_not_published_when_its_session_is_taken_up(scene: Scene) -> Story:
    name_an_heir(scene)
    with with_will(scene, 3600) as peer:
        nothing_waits(peer)
    yield
    with scene.back(version=5) as (peer, connack):
        assert connack.session_present
        leave(peer)
    with scene.back(clean=True):
        pass
    with heir_of(scene) as heir:
        nothing_waits(heir)


@story
def a_will_that_waits_is_published_when_its_session_ends(scene: Scene) -> Story:
    name_an_heir(scene)
    with with_will(scene, 3600) as peer:
        nothing_waits(peer)
    yield
    with scene.back(clean=True), heir_of(scene) as heir:
        assert take(heir).payload == b"gone"
        nothing_waits(heir)


# Shared subscriptions and retained messages


@story
def members_of_a_shared_subscription_stay_members(scene: Scene) -> Story:
    for suffix in ("-a", "-b"):
        with scene.client(suffix) as peer:
            subscribe(peer, f"$share/group/{scene.name}/#", qos=1)
            leave(peer)
    sent = {b"%d" % n for n in range(6)}
    scene.publish("t", *sorted(sent))
    yield
    with scene.back("-a") as (first, _), scene.back("-b") as (second, _):
        mine, others = take_all(first, 3), take_all(second, 3)
        assert {m.payload for m in (*mine, *others)} == sent
        scene.publish("t", b"a", b"b", b"c", b"d")
        assert {m.payload for m in (*take_all(first, 2), *take_all(second, 2))} == {b"a", b"b", b"c", b"d"}
        nothing_waits(first)
        nothing_waits(second)


@story
def a_retained_message_stays_with_its_properties(scene: Scene) -> Story:
    scene.publish("kept", b"x", qos=2, retain=True, properties={**SAID, "message_expiry_interval": DAY})
    scene.publish("expired", b"x", retain=True, properties={"message_expiry_interval": 1})
    scene.publish("removed", b"x", b"", retain=True)
    yield
    let_pass(scene.server, 1.0)
    with scene.client() as peer:
        subscribe(peer, f"{scene.name}/#", qos=2)
        message = take(peer)
        assert (message.topic, message.payload, message.qos, message.retain) == (
            f"{scene.name}/kept",
            b"x",
            2,
            True,
        )
        properties = dict(message.properties)
        if scene.version == 5:
            left = properties.pop("message_expiry_interval")
            assert isinstance(left, int)
            assert DAY - HOUR < left < DAY
        assert properties == (SAID if scene.version == 5 else {})
        nothing_waits(peer)


@story
def a_retained_message_that_waits_for_a_session_is_still_a_retained_one(scene: Scene) -> Story:
    scene.publish("t", b"x", retain=True)
    with scene.client() as peer:
        subscribe(peer, f"{scene.name}/#", qos=1, identifier=3 if scene.version == 5 else 0)
        peer.expect(Publish)
        leave(peer)
    yield
    with scene.back() as (peer, _):
        message = take(peer)
        assert (message.payload, message.retain) == (b"x", True)
        assert message.properties == ({"subscription_identifiers": (3,)} if scene.version == 5 else {})
        nothing_waits(peer)


# All of them


@dataclass(slots=True)
class Begun:
    rest: Story
    error: BaseException | None = None


@pytest.fixture(scope="module", params=STOPS)
def begun(
    request: pytest.FixtureRequest, start_server: StartServer
) -> Iterator[dict[tuple[str, int], Begun]]:
    """Every story up to its `yield`, with a server that has been stopped and started."""
    server = start_server()
    stories: dict[tuple[str, int], Begun] = {}
    numbers = itertools.count(1)
    for title, (tell, versions) in STORIES.items():
        for version in versions:
            one = Begun(tell(Scene(server, f"s{next(numbers)}", version, request.param)))
            stories[title, version] = one
            try:
                next(one.rest)
            except Exception as error:  # noqa: BLE001 - its own test raises it
                one.error = error
    if request.param == "sigterm":
        assert server.terminate() == 0
        server.start()
    else:
        server.restart()
    yield stories
    for one in stories.values():
        one.rest.close()


@pytest.mark.parametrize(
    ("title", "version"),
    [(title, version) for title, (_, versions) in STORIES.items() for version in versions],
)
def test_across_a_restart(begun: dict[tuple[str, int], Begun], title: str, version: int) -> None:
    one = begun[title, version]
    if one.error is not None:
        raise one.error
    assert next(one.rest, "over") == "over"


# What the store holds


@dataclass(frozen=True, slots=True)
class Ward:
    """An app of its own, and what the store holds of its sessions."""

    server: LocalServer
    app: AppKeys

    def rows(self, kind: str = "%") -> list[tuple[int, str, Any, bytes]]:
        (database,) = self.server.data_dir.glob("*.db")
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return connection.execute(
                "SELECT session, kind, item, value FROM session_items"
                " WHERE kind LIKE ? AND app = (SELECT app_id FROM apps WHERE key = ?)",
                (kind, self.app.app_key),
            ).fetchall()

    def client(self, client_id: str, **options: Any) -> contextlib.AbstractContextManager[Peer]:
        return device(self.server, client_id, app=self.app, **options)

    def publish(self, topic: str, payload: bytes = b"x", qos: int = 1) -> None:
        with self.client("sender", clean=True, expiry=0) as sender:
            publish(sender, topic, payload, qos)


_wards = itertools.count(1)


@pytest.fixture
def ward(server: LocalServer) -> Ward:
    return Ward(server, server.create_app(f"ward-{next(_wards)}", open=True))


def full_session(ward: Ward, peer: Peer) -> None:
    """Something of everything that a session can hold, and what its client has not acknowledged."""
    subscribe(peer, "a/#", "$share/group/b/#", qos=2)
    subscribe(peer, "gone", qos=1)
    unsubscribe(peer, "gone")
    for topic, qos in (("a/one", 1), ("a/two", 2), ("a/released", 2), ("b/shared", 1)):
        ward.publish(topic, qos=qos)
    flying = [peer.expect(Publish) for _ in range(4)]
    peer.send(Pubrec(flying[2].packet_id))
    peer.expect(Pubrel)
    peer.send(Publish("elsewhere", b"x", 2, packet_id=77))
    peer.expect(Pubrec)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_session_that_ends_with_its_connection_is_never_stored(ward: Ward, version: int) -> None:
    with ward.client("fleeting", version=version, clean=True, expiry=0, will=Will("a/will", b"x", 1)) as peer:
        full_session(ward, peer)
        with ward.client("durable") as witness:  # whatever was noted before is saved with this
            subscribe(witness, "other")
            assert {kind for _, kind, _, _ in ward.rows()} == {"s", "f"}
            witness.send(Disconnect(properties={"session_expiry_interval": 0}))
            witness.rest()
    eventually(lambda: ward.rows() == [])


@pytest.mark.parametrize("ending", ["clean start", "clean start, kept", "disconnect", "expiry", "taken over"])
@pytest.mark.parametrize("away", [False, True], ids=["connected", "away"])
def test_a_session_that_is_over_leaves_nothing_in_the_store(ward: Ward, ending: str, away: bool) -> None:
    expiry = 1 if ending == "expiry" else 3600
    will = Will("a/will", b"gone", 2, False, {"will_delay_interval": 3600})
    with ward.client("client", expiry=expiry, will=will) as peer:
        full_session(ward, peer)
        assert {kind for _, kind, _, _ in ward.rows()} >= {"s", "f", "m", "c", "i", "r"}
        if ending == "disconnect" and not away:
            peer.send(Disconnect(properties={"session_expiry_interval": 0}))
            assert peer.rest() == []
        elif ending == "taken over" or (ending.startswith("clean start") and not away):
            with ward.client("client", clean=True, expiry=0):
                pass
    if away:
        eventually(lambda: ward.rows("w") or not ward.rows("s") or ending == "taken over")
        for topic in ("a/one", "a/two", "b/shared"):
            ward.publish(topic, qos=2)
    match ending:
        case "disconnect" if away:
            with ward.client("client") as peer:
                peer.send(Disconnect(properties={"session_expiry_interval": 0}))
        case "clean start":
            with ward.client("client", clean=True, expiry=0):
                pass
        case "clean start, kept":
            with ward.client("client", clean=True) as peer:
                nothing_waits(peer)
    eventually(lambda: ward.rows() == [])


def test_unsubscribing_and_taking_everything_leaves_the_session_alone(ward: Ward) -> None:
    with ward.client("client") as peer:
        subscribe(peer, "a", "$share/group/b", qos=2)
        ward.publish("a", qos=1)
        ward.publish("b", qos=2)
        take_all(peer, 2)
        unsubscribe(peer, "a", "$share/group/b")
        eventually(lambda: {kind for _, kind, _, _ in ward.rows()} == {SESSION})
        leave(peer)
    eventually(lambda: ward.rows() == [])  # a device that holds nothing


def test_a_session_for_which_there_is_no_room_ends_with_its_will_and_leaves_nothing(
    start_server: StartServer,
) -> None:
    server = start_server("--mqtt-max-sessions", "1")
    ward = Ward(server, server.create_app("full", open=True))
    with ward.client("first") as first:
        subscribe(first, "a/#")
        leave(first)
    stays = sorted(ward.rows())
    with ward.client("heir", clean=True, expiry=0) as heir:
        subscribe(heir, "b/will")
        with ward.client(
            "second", will=Will("b/will", b"gone", properties={"will_delay_interval": 3600})
        ) as peer:
            subscribe(peer, "b/#")
        assert take(heir).payload == b"gone"
    eventually(lambda: [row[:3] for row in sorted(ward.rows())] == [row[:3] for row in stays])
    with Peer(server.addresses.mqtt) as peer:
        assert not peer.connect(connect_packet(ward.app, "second")).session_present


def crowd(ward: Ward, first: int, count: int) -> None:
    """So many clients subscribe and go, all at once."""
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(ward.server.addresses.mqtt)) for _ in range(count)]
        for n, peer in enumerate(peers, first):
            connect = connect_packet(ward.app, f"c{n}", password=ward.app.master_secret)
            peer.send(connect, Subscribe(1, (Subscription("news", 1),)), Disconnect())
        for peer in peers:
            peer.rest_of_bytes()


def copies_left(ward: Ward) -> list[int]:
    """How many sessions wait for each message."""
    rows = [msgspec.msgpack.decode(value, type=list[CopyRow]) for *_, value in ward.rows(COPIES)]
    return [sum(len(BitMap.deserialize(copy.left)) for copy in row) for row in rows]


def test_a_message_to_a_thousand_durable_sessions_is_one_row(ward: Ward) -> None:
    for first in range(0, MANY, BATCH):
        crowd(ward, first, BATCH)
    eventually(lambda: len(ward.rows(SESSION)) == MANY)
    ward.publish("news", b"x" * 1000)
    assert (len(ward.rows(MESSAGE)), copies_left(ward)) == (1, [MANY])
    assert sum(len(value) for *_, value in ward.rows(MESSAGE) + ward.rows(COPIES)) < 1000 + 4 * MANY
    ward.server.restart()
    for n in range(3):
        connect = replace(connect_packet(ward.app, f"c{n}"), password=ward.app.master_secret.encode())
        with Peer(ward.server.addresses.mqtt) as peer:
            assert peer.connect(connect).session_present
            assert take(peer).payload == b"x" * 1000
            leave(peer)
    eventually(lambda: copies_left(ward) == [MANY - 3])
    assert len(ward.rows(MESSAGE)) == 1
