"""SCRAM-SHA-256 over the wire: who comes in, who does not, and what a login that is not finished leaves behind. The
peer's side is that of test_scram.py, made of hashlib and hmac; what every method must do is in
conformance/test_conform_auth.py."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import orjson
import pytest

from broker.tenants.tokens import CLAIMS_LENGTH
from clients.local_server import AppKeys, LocalServer
from gateway.logins import Logins
from gateway.mqtt import (
    Auth,
    Connack,
    Connect,
    Disconnect,
    Packet,
    Pingreq,
    Pingresp,
    Properties,
    Publish,
    Reason,
    Subscribe,
    Subscription,
    Will,
    encode,
)
from gateway.node import NodeSettings
from gateway.scram import DEVICE, METHOD, PUBLISHER
from tests.conftest import StartServer
from tests.gateway.peer import (
    Closed,
    Peer,
    call,
    connect_packet,
    counted,
    device,
    eventually,
    publisher,
    push,
    push_body,
    register,
    sooner_or_later,
)
from tests.gateway.test_live_sessions import server_admin
from tests.gateway.test_scram import Client
from tests.gateway.world import Phone, World

FAILED: Final = 'refusals_total{reason="authentication failed"}'


def said(data: bytes, method: str = METHOD) -> Properties:
    return {"authentication_method": method, "authentication_data": data}


def connect(app: AppKeys, client_id: str, client: Client, **options: Any) -> Connect:
    properties: Properties = {**options.pop("properties", {}), **said(client.first())}
    packet = connect_packet(app, client_id, properties=properties, **options)
    return replace(packet, password=None)


def prove(peer: Peer, client: Client) -> None:
    """Answer the challenge that comes."""
    challenge = peer.expect(Auth)
    assert challenge.reason is Reason.CONTINUE_AUTHENTICATION
    assert challenge.properties["authentication_method"] == METHOD
    final = client.final(challenge.properties["authentication_data"])
    peer.send(Auth(Reason.CONTINUE_AUTHENTICATION, said(final)))


def log_in(peer: Peer, app: AppKeys, client_id: str, client: Client, **options: Any) -> Connack:
    peer.send(connect(app, client_id, client, **options))
    prove(peer, client)
    return peer.expect(Connack)


@contextlib.contextmanager
def logged_in(
    server: LocalServer, app: AppKeys, client_id: str, client: Client, **options: Any
) -> Iterator[Peer]:
    with Peer(server.addresses.mqtt) as peer:
        connack = log_in(peer, app, client_id, client, **options)
        assert connack.reason is Reason.SUCCESS
        assert connack.properties["authentication_method"] == METHOD
        assert client.trusts(connack.properties["authentication_data"])
        yield peer


def token_client(token: str, password: str | None = None) -> Client:
    return Client(token[:CLAIMS_LENGTH], token if password is None else password)


@pytest.fixture(scope="module")
def closed(server: LocalServer) -> AppKeys:
    """An app that is not open."""
    return server.create_app("closed")


# Who comes in


def test_a_publisher_comes_in_and_pushes(server: LocalServer, closed: AppKeys) -> None:
    token = register(server, closed, "reached")
    client = Client(PUBLISHER, closed.master_secret)
    with (
        device(server, "reached", app=closed, password=token) as phone,
        logged_in(server, closed, "backend", client) as peer,
    ):
        peer.send(Publish("push", orjson.dumps(push_body(["reached"])), 1, packet_id=1))
        phone.push()


def test_a_device_comes_in_with_its_token_and_gets_its_pushes(server: LocalServer, closed: AppKeys) -> None:
    client = token_client(register(server, closed, "phone"))
    waiting = push(server, closed, "phone")
    with logged_in(server, closed, "phone", client) as peer:
        assert waiting.encode() in peer.push().payload


def test_a_device_of_an_open_app_comes_in_with_the_device_key(server: LocalServer) -> None:
    with logged_in(server, server.app, "newcomer", Client(DEVICE, server.app.device_key)) as peer:
        assert push(server, server.app, "newcomer").encode() in peer.push().payload


def test_a_login_takes_up_the_session_and_takes_over_from_a_plain_one(server: LocalServer) -> None:
    client = Client(DEVICE, server.app.device_key)
    with device(server, "both-ways") as plain:
        plain.subscribe("both-ways/#")
        with Peer(server.addresses.mqtt) as peer:
            assert log_in(peer, server.app, "both-ways", client).session_present
            assert plain.rest() == [Disconnect(Reason.SESSION_TAKEN_OVER)]
            peer.send(Publish("both-ways/x", b"x"))
            assert peer.expect(Publish).payload == b"x"


def test_a_connect_in_pieces_is_a_connect(server: LocalServer) -> None:
    client = Client(DEVICE, server.app.device_key)
    with device(server, "witness-of-pieces"), Peer(server.addresses.mqtt) as peer:  # the app is loaded
        raw = encode(connect(server.app, "pieces", client), 5)
        peer.send(raw[:20])
        eventually(lambda: server.metrics()["holdfast_connections_opening"] == 1)
        peer.send(raw[20:])
        prove(peer, client)
        assert peer.expect(Connack).reason is Reason.SUCCESS


def test_a_publisher_without_client_id_is_told_the_one_it_gets(server: LocalServer, closed: AppKeys) -> None:
    with Peer(server.addresses.mqtt) as peer:
        client = Client(PUBLISHER, closed.master_secret)
        connack = log_in(peer, closed, "", client, clean=True, expiry=0)
        assert connack.properties["assigned_client_identifier"]
        assert client.trusts(connack.properties["authentication_data"])


# Who does not


STRANGERS: Final = {
    "publisher with a wrong secret": (PUBLISHER, "a guess"),
    "device key of an app that is not open": (DEVICE, "the device key"),
    "nobody": ("nobody", "nothing"),
    "claims with a wrong signature": ("the claims", "a guess"),
    "token of another device": ("the other's claims", "the other's token"),
}


@pytest.mark.parametrize("who", STRANGERS)
def test_who_cannot_prove_it_is_refused(server: LocalServer, closed: AppKeys, who: str) -> None:
    mine, other = register(server, closed, "mine"), register(server, closed, "other")
    words = {
        "the device key": closed.device_key,
        "the claims": mine[:CLAIMS_LENGTH],
        "the other's claims": other[:CLAIMS_LENGTH],
        "the other's token": other,
    }
    user, password = (words.get(word, word) for word in STRANGERS[who])
    with counted(server, FAILED), Peer(server.addresses.mqtt) as peer:
        connack = log_in(peer, closed, "mine", Client(user, password))
        assert (connack.reason, connack.session_present) == (Reason.NOT_AUTHORIZED, False)
        assert "authentication_data" not in connack.properties
        assert peer.rest() == []


@pytest.mark.parametrize("data", [b"", b"n,,n=device", b"\xff", b"p=tls-unique,,n=device,r=x", b"n" * 600])
def test_a_first_message_that_is_none_is_refused(server: LocalServer, data: bytes) -> None:
    packet = replace(connect_packet(server.app, "odd", properties=said(data)), password=None)
    with counted(server, FAILED), Peer(server.addresses.mqtt) as peer:
        assert peer.connect(packet).reason is Reason.NOT_AUTHORIZED
        assert peer.rest() == []


@pytest.mark.parametrize("data", [b"", b"c=biws", b"\xff", b"c=biws,r=other,p=AAAA", b"c" * 600])
def test_a_last_message_that_is_none_is_refused(server: LocalServer, data: bytes) -> None:
    client = Client(DEVICE, server.app.device_key)
    with counted(server, FAILED), Peer(server.addresses.mqtt) as peer:
        peer.send(connect(server.app, "odd", client))
        peer.expect(Auth)
        peer.send(Auth(Reason.CONTINUE_AUTHENTICATION, said(data)))
        assert peer.expect(Connack).reason is Reason.NOT_AUTHORIZED
        assert peer.rest() == []


@pytest.mark.parametrize("method", ["", "PLAIN", "SCRAM-SHA-1", "SCRAM-SHA-256-PLUS", "scram-sha-256"])
def test_another_method_is_refused(server: LocalServer, method: str) -> None:
    packet = connect_packet(server.app, "other-method", properties=said(b"x", method))
    with (
        counted(server, 'refusals_total{reason="authentication method"}'),
        Peer(server.addresses.mqtt) as peer,
    ):
        assert peer.connect(packet).reason is Reason.BAD_AUTHENTICATION_METHOD
        assert peer.rest() == []


def test_a_revoked_token_is_refused_though_it_is_proved(server: LocalServer, closed: AppKeys) -> None:
    token = register(server, closed, "revoked")
    assert call(server, closed, "DELETE", "/v1/devices/revoked/token")[0] == 200
    with counted(server, 'refusals_total{reason="token revoked"}'), Peer(server.addresses.mqtt) as peer:
        connack = log_in(peer, closed, "revoked", token_client(token))
        assert connack.reason is Reason.NOT_AUTHORIZED


def test_what_a_plain_connect_may_not_a_proved_one_may_not(server: LocalServer, closed: AppKeys) -> None:
    client = token_client(register(server, closed, "willed"))
    with Peer(server.addresses.mqtt) as peer:
        connack = log_in(peer, closed, "willed", client, will=Will("anywhere", b"x"))
        assert connack.reason is Reason.NOT_AUTHORIZED


@pytest.mark.parametrize("change", ["delete", "rotate-secret"])
def test_an_app_that_changes_during_a_login_counts_as_it_is_now(server: LocalServer, change: str) -> None:
    app = server.create_app("moving")
    client = Client(PUBLISHER, app.master_secret)
    with publisher(server, "witness", app=app) as witness, Peer(server.addresses.mqtt) as peer:
        peer.send(connect(app, "late", client))
        challenge = peer.expect(Auth)
        server_admin(server, f"/v1/app/{app.app_key}/{change}")
        assert witness.rest() == [Disconnect(Reason.NOT_AUTHORIZED)]
        final = client.final(challenge.properties["authentication_data"])
        peer.send(Auth(Reason.CONTINUE_AUTHENTICATION, said(final)))
        assert peer.expect(Connack).reason >= Reason.UNSPECIFIED_ERROR
        assert peer.rest() == []


# Out of place


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(Subscribe(1, (Subscription("x"),)), id="SUBSCRIBE"),
        pytest.param(Publish("x", b"x"), id="PUBLISH"),
        pytest.param(Pingreq(), id="PINGREQ"),
        pytest.param(connect_packet(AppKeys("a", "b", "c"), "x"), id="CONNECT"),
        pytest.param(Auth(Reason.RE_AUTHENTICATE, said(b"n,,n=device,r=x")), id="re-authentication"),
        pytest.param(Auth(Reason.CONTINUE_AUTHENTICATION, said(b"x", "PLAIN")), id="another method"),
        pytest.param(Auth(Reason.CONTINUE_AUTHENTICATION), id="no method"),
    ],
)
def test_nothing_else_is_taken_before_connack(server: LocalServer, packet: Packet) -> None:
    client = Client(DEVICE, server.app.device_key)
    with (
        counted(server, 'refusals_total{reason="bad CONNECT"}'),
        Peer(server.addresses.mqtt) as peer,
        device(server, "neighbour") as neighbour,
    ):
        peer.send(connect(server.app, "impatient", client))
        peer.expect(Auth)
        peer.send(packet)
        assert [p for p in peer.rest() if not isinstance(p, Connack) or p.reason < 0x80] == []
        neighbour.send(Pingreq())
        neighbour.expect(Pingresp)


def test_two_answers_to_one_challenge_are_one_too_many(server: LocalServer) -> None:
    client = Client(PUBLISHER, server.app.master_secret + "?")  # keys that nobody has to hand
    with Peer(server.addresses.mqtt) as peer:
        peer.send(connect(server.app, "twice", client))
        final = client.final(peer.expect(Auth).properties["authentication_data"])
        answer = Auth(Reason.CONTINUE_AUTHENTICATION, said(final))
        peer.send(answer, answer)
        assert all(isinstance(p, Connack) and p.reason >= 0x80 for p in peer.rest())


@pytest.mark.parametrize("reason", [Reason.CONTINUE_AUTHENTICATION, Reason.RE_AUTHENTICATE])
def test_auth_on_a_connection_that_began_without_is_an_error(server: LocalServer, reason: Reason) -> None:
    with device(server, "plain") as peer:
        peer.send(Auth(reason, said(b"n,,n=device,r=x")))
        assert [p.reason for p in peer.rest() if isinstance(p, Disconnect)] == [Reason.PROTOCOL_ERROR]


def test_an_answer_without_a_question_is_an_error(server: LocalServer) -> None:
    with logged_in(server, server.app, "eager", Client(DEVICE, server.app.device_key)) as peer:
        peer.send(Auth(Reason.CONTINUE_AUTHENTICATION, said(b"x")))
        assert [p.reason for p in peer.rest() if isinstance(p, Disconnect)] == [Reason.PROTOCOL_ERROR]


# Again


def ask_again(peer: Peer, client: Client) -> None:
    peer.send(Auth(Reason.RE_AUTHENTICATE, said(client.first())))


def test_a_peer_proves_it_again_and_again(server: LocalServer) -> None:
    with logged_in(server, server.app, "again", Client(DEVICE, server.app.device_key)) as peer:
        peer.subscribe("again")
        for n in range(3):
            client = Client(DEVICE, server.app.device_key, nonce=f"nonce-{n}")
            ask_again(peer, client)
            prove(peer, client)
            done = peer.expect(Auth)
            assert done.reason is Reason.SUCCESS
            assert client.trusts(done.properties["authentication_data"])
        peer.send(Publish("again", b"x"))
        assert peer.expect(Publish).payload == b"x"


def test_meanwhile_the_connection_goes_on(server: LocalServer) -> None:
    client = Client(DEVICE, server.app.device_key)
    with logged_in(server, server.app, "busy", Client(DEVICE, server.app.device_key)) as peer:
        ask_again(peer, client)
        challenge = peer.expect(Auth)
        peer.send(Pingreq())
        peer.expect(Pingresp)
        final = client.final(challenge.properties["authentication_data"])
        peer.send(Auth(Reason.CONTINUE_AUTHENTICATION, said(final)), Pingreq())
        assert {type(peer.receive()), type(peer.receive())} == {Auth, Pingresp}


@pytest.mark.parametrize("user", [DEVICE, "nobody"])
def test_a_second_proof_that_is_wrong_ends_the_connection(server: LocalServer, user: str) -> None:
    client = Client(user, "a guess", nonce="another")
    with (
        counted(server, 'disconnects_total{reason="authentication failed"}'),
        logged_in(server, server.app, "liar", Client(DEVICE, server.app.device_key)) as peer,
    ):
        ask_again(peer, client)
        prove(peer, client)
        assert peer.rest() == [Disconnect(Reason.NOT_AUTHORIZED)]


def test_two_proofs_at_once_are_an_error(server: LocalServer) -> None:
    with logged_in(server, server.app, "hasty", Client(DEVICE, server.app.device_key)) as peer:
        client = Client(DEVICE, server.app.device_key, nonce="another")
        ask_again(peer, client)
        peer.expect(Auth)
        ask_again(peer, client)
        assert [p.reason for p in peer.rest() if isinstance(p, Disconnect)] == [Reason.PROTOCOL_ERROR]


def test_a_token_that_is_over_opens_no_connection_and_proves_nothing_again(start_server: StartServer) -> None:
    server = start_server("--push-token-lifetime", "3")
    app = server.create_app("hasty")
    with contextlib.ExitStack() as stack:

        def come_in() -> tuple[Peer, str] | None:
            """While the token lives, which is not long on a machine that is slow."""
            peer, token = stack.enter_context(Peer(server.addresses.mqtt)), register(server, app, "phone")
            connack = log_in(peer, app, "phone", token_client(token))
            return None if connack.reason else (peer, token)

        peer, token = eventually(come_in)
        numbers = itertools.count()

        def refused() -> bool:
            client = Client(token[:CLAIMS_LENGTH], token, nonce=f"nonce-{next(numbers)}")
            ask_again(peer, client)
            prove(peer, client)
            packet = peer.receive()
            assert isinstance(packet, Auth | Disconnect)
            return packet.reason is Reason.NOT_AUTHORIZED

        eventually(refused)
        with pytest.raises(Closed):
            peer.receive()
    with Peer(server.addresses.mqtt) as late:
        assert log_in(late, app, "phone", token_client(token)).reason is Reason.NOT_AUTHORIZED


def test_a_revoked_token_ends_a_connection_in_the_middle_of_its_second_proof(
    server: LocalServer, closed: AppKeys
) -> None:
    token = register(server, closed, "fickle")
    with logged_in(server, closed, "fickle", token_client(token)) as peer:
        ask_again(peer, Client(token[:CLAIMS_LENGTH], token, nonce="another"))
        peer.expect(Auth)
        assert call(server, closed, "DELETE", "/v1/devices/fickle/token")[0] == 200
        assert peer.rest() == [Disconnect(Reason.NOT_AUTHORIZED)]


# What is left of it


def test_a_login_that_stalls_is_closed(start_server: StartServer) -> None:
    server = start_server("--mqtt-connect-timeout", "1")
    client = Client(DEVICE, server.app.device_key)
    endless = encode(Auth(Reason.CONTINUE_AUTHENTICATION, said(b"x" * 60_000)), 5)

    def stall() -> None:
        with (
            counted(server, 'refusals_total{reason="connect timeout"}'),
            Peer(server.addresses.mqtt) as peer,
        ):
            peer.send(connect(server.app, "staller", client))
            peer.expect(Auth)
            trickle = iter(endless)
            eventually(lambda: peer.trickles(trickle))  # which makes it no longer
        assert server.metrics()["holdfast_connections_opening"] == 0

    sooner_or_later(stall)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = await World(tmp_path, settings=NodeSettings("node-1")).open(open=True)
    yield world
    await world.close()


def logins(world: World) -> Logins:
    return world.node.arrivals.logins


def knock(world: World, client: Client, **values: Any) -> Phone:
    app = world.app
    return Phone(
        world.node,
        Connect("device-0", False, username=app.key, properties=said(client.first()), **values),
    )


async def answer(phone: Phone, client: Client) -> None:
    await phone.until(lambda phone: phone.packets)
    (challenge,) = phone.packets
    assert isinstance(challenge, Auth)
    final = client.final(challenge.properties["authentication_data"])
    phone.send(Auth(Reason.CONTINUE_AUTHENTICATION, said(final)))


@pytest.mark.parametrize("when", ["before the answer", "during the proof", "disconnect", "wrong", "right"])
async def test_a_login_that_ended_leaves_nothing(world: World, when: str) -> None:
    client = Client(DEVICE, "a guess" if when == "wrong" else world.app.device_key)
    phone = knock(world, client)
    await phone.until(lambda phone: phone.packets)
    assert len(logins(world)._logins) == 1
    match when:
        case "before the answer":
            phone.leave()
        case "disconnect":
            phone.send(Disconnect())
        case "during the proof":
            await answer(phone, client)
            phone.leave()
        case "wrong":
            await answer(phone, client)
            await phone.until(lambda phone: phone.closed)
        case "right":
            await answer(phone, client)
            await phone.until(lambda phone: len(phone.packets) > 1)
            assert isinstance(phone.packets[1], Connack)
            phone.leave()
    assert not logins(world)._logins
    assert not world.node.arrivals.opening
    await world.when(lambda: not world.node._tasks)
    await world.calm()
    assert not world.hub.members
    assert not logins(world)._logins


async def test_many_strangers_are_not_remembered(world: World) -> None:
    for n in range(50):
        client = Client(f"stranger-{n}", "x")
        phone = knock(world, client)
        await answer(phone, client)
        await phone.until(lambda phone: phone.closed)
    assert not logins(world)._logins
    assert len(logins(world)._cache) == 0
