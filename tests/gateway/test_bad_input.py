"""What a server does with bad peers and a bad disk: the answer of docs/protocol.md, the metric that counts it, and
that everybody else is served afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import orjson
import pytest

from clients.local_server import ANY_PORT, LocalServer
from gateway.mqtt import (
    Connack,
    Connect,
    Disconnect,
    Pingreq,
    Pingresp,
    Puback,
    Pubcomp,
    Publish,
    Pubrel,
    Reason,
    Suback,
    Will,
    encode,
)
from tests.conftest import StartServer
from tests.gateway.peer import (
    Peer,
    accounts,
    acknowledged_within,
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
    works,
)
from tests.patience import PATIENCE

PUBLISH_5: Final = b"\x30\x04\x00\x01a\x00"
SMALL, LARGE = 4096, 1 << 20  # bytes of a socket's buffers
HUGE: Final = b"\xff\xff\xff\x7f"  # a remaining length of 268,435,455


def refused(reason: str) -> str:
    return f'refusals_total{{reason="{reason}"}}'


def ended(reason: str) -> str:
    return f'disconnects_total{{reason="{reason}"}}'


# Before CONNECT


@pytest.mark.parametrize(
    ("sent", "answer", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"", "bad CONNECT"),
        (b"\x16\x03\x01\x02\x00\x01", b"", "bad CONNECT"),  # TLS on the plain port
        (b"\x00" * 64, b"", "bad CONNECT"),
        (PUBLISH_5, b"", "bad CONNECT"),
        (encode(Pingreq(), 4), b"", "bad CONNECT"),
        (b"\x11\x00", b"", "bad CONNECT"),  # flags that CONNECT must not have
        (b"\x10\x09\x00\x06MQIsdp\x03", b"\x20\x02\x00\x01", "bad CONNECT"),  # MQTT 3.1
        (b"\x10\x07\x00\x04MQTT\x06", b"\x20\x02\x00\x01", "bad CONNECT"),  # MQTT 6
        (b"\x10\x09\x00\x04MQTT\x04\x03\x00", b"", "bad CONNECT"),  # the reserved flag, in 3.1.1
        (b"\x10\x09\x00\x04MQTT\x05\x03\x00", b"\x20", "bad CONNECT"),  # in 5
        (b"\x10" + HUGE, b"", "packet too large"),
        (b"\x10\xff\xff\xff\xff\x01", b"", "bad CONNECT"),  # a length of five bytes
    ],
)
def test_what_is_no_connect_is_refused(server: LocalServer, sent: bytes, answer: bytes, reason: str) -> None:
    with counted(server, refused(reason)), Peer(server.addresses.mqtt) as peer:
        peer.send(sent)
        assert peer.rest_of_bytes().startswith(answer)
    works(server)


def test_connects_that_trickle_stop_or_never_begin_time_out(start_server: StartServer) -> None:
    server = start_server("--mqtt-connect-timeout", "1")
    whole = encode(connect_packet(server.app, "slow"), 5)
    endless = encode(connect_packet(server.app, "slow", will=Will("a", bytes(60_000))), 5)
    with counted(server, refused("connect timeout"), by=3), contextlib.ExitStack() as stack:
        address = server.addresses.mqtt
        silent, stopped, trickling = (stack.enter_context(Peer(address)) for _ in range(3))
        stopped.send(whole[:-1])
        trickle = iter(endless)
        eventually(lambda: trickling.trickles(trickle))
        assert [peer.rest_of_bytes() for peer in (silent, stopped)] == [b"", b""]
    sooner_or_later(lambda: works(server))


def test_a_connect_whose_peer_has_left_takes_nobody_over(start_server: StartServer) -> None:
    """It waits unread while the server is busy; its device is tired of it, and comes anew."""
    server = start_server()
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with Peer(server.addresses.mqtt) as tired:
            tired.send(connect_packet(server.app, "phone"))
    finally:
        os.kill(server.pid, signal.SIGCONT)
    eventually(lambda: server.metrics().get('holdfast_refusals_total{reason="peer left"}') == 1)
    assert not any("connects_total" in name and value for name, value in server.metrics().items())


def test_a_connect_cut_off_by_the_end_is_forgotten(server: LocalServer) -> None:
    with Peer(server.addresses.mqtt) as peer:
        peer.send(encode(connect_packet(server.app, "cut"), 5)[:20])
        peer.stop_sending()
        assert peer.rest_of_bytes() == b""
    eventually(lambda: server.metrics()["holdfast_connections_opening"] == 0)
    works(server)


def test_a_connect_byte_by_byte_is_as_good_as_any(server: LocalServer) -> None:
    with Peer(server.addresses.mqtt) as peer:
        for byte in encode(connect_packet(server.app, "bytes"), 5) + encode(Pingreq(), 5):
            peer.send(bytes((byte,)))
        assert peer.expect(Connack).reason is Reason.SUCCESS
        assert peer.receive() == Pingresp()


# After CONNECT


@pytest.mark.parametrize(
    ("sent", "told", "reason"),
    [
        (b"\x00\x00", Reason.MALFORMED_PACKET, "malformed packet"),
        (b"\x36\x04\x00\x01a\x00", Reason.MALFORMED_PACKET, "malformed packet"),  # QoS 3
        (b"\x30\x03\x00\x05a", Reason.MALFORMED_PACKET, "malformed packet"),  # a topic beyond the end
        (b"\x30\x05\x00\x02\xc3\x28\x00", Reason.MALFORMED_PACKET, "malformed packet"),  # not UTF-8
        (b"\x82\x06\x00\x01\x00\x00\x01a", Reason.MALFORMED_PACKET, "malformed packet"),  # no options
        (b"\xc0\x01\x00", Reason.MALFORMED_PACKET, "malformed packet"),  # PINGREQ with a body
        (b"\x30" + b"\xff\xff\xff\xff\x01", Reason.MALFORMED_PACKET, "malformed packet"),
        (b"\x32\x06\x00\x01a\x00\x00\x00", Reason.PROTOCOL_ERROR, "protocol error"),  # packet id 0
        (b"\x82\x03\x00\x01\x00", Reason.PROTOCOL_ERROR, "protocol error"),  # no filters
        (encode(Connack(), 5), Reason.PROTOCOL_ERROR, "protocol error"),
        (encode(Suback(1, (Reason.SUCCESS,)), 5), Reason.PROTOCOL_ERROR, "protocol error"),
        (encode(Pingresp(), 5), Reason.PROTOCOL_ERROR, "protocol error"),
        (encode(Connect("again", version=5), 5), Reason.PROTOCOL_ERROR, "protocol error"),
        (b"\x10\x09\x00\x06MQIsdp\x03", Reason.PROTOCOL_ERROR, "protocol error"),  # CONNECT again, MQTT 3.1
        (b"\xf0\x00", Reason.PROTOCOL_ERROR, "protocol error"),  # AUTH
        (b"\x30\x04\x00\x01#\x00", Reason.TOPIC_NAME_INVALID, "topic name invalid"),
        (b"\x82\x08\x00\x01\x00\x00\x02a#\x00", Reason.TOPIC_FILTER_INVALID, "topic filter invalid"),
        (b"\x30\x07\x00\x01a\x03\x23\x00\x00", Reason.TOPIC_ALIAS_INVALID, "topic alias invalid"),
        (b"\x30\x07\x00\x01a\x03\x23\x00\x11", Reason.TOPIC_ALIAS_INVALID, "topic alias invalid"),
        (b"\x30" + HUGE, Reason.PACKET_TOO_LARGE, "packet too large"),
    ],
)
def test_a_packet_that_breaks_a_rule_ends_the_connection(
    server: LocalServer, sent: bytes, told: Reason, reason: str
) -> None:
    with counted(server, ended(reason)), device(server, "rude") as peer:
        peer.send(sent, Pingreq())
        [disconnect] = peer.rest()
        assert isinstance(disconnect, Disconnect)
        assert disconnect.reason is told
        assert disconnect.properties["reason_string"]
    with counted(server, ended("malformed packet")), device(server, "rude", version=4) as peer:
        peer.send(b"\x00\x00", Pingreq())
        assert peer.rest() == []
    works(server)


def test_a_packet_that_stops_in_the_middle_ends_with_the_keep_alive(server: LocalServer) -> None:
    with counted(server, ended("keep-alive timeout")), device(server, "halves", keep_alive=1) as peer:
        peer.send(b"\x30\x7f\x00")
        assert peer.rest() == [Disconnect(Reason.KEEP_ALIVE_TIMEOUT)]
    with counted(server, ended("connection lost")), device(server, "halves") as peer:
        peer.send(b"\x30\x7f\x00")
        peer.stop_sending()
        assert peer.rest() == []
    works(server)


def test_a_puback_for_a_qos_2_message_ends_the_connection(server: LocalServer) -> None:
    with counted(server, ended("protocol error")), device(server, "confused") as peer:
        peer.subscribe("confused", qos=2)
        peer.send(Publish("confused", b"x", 2, packet_id=1))
        packet = next(p for p in (peer.receive(), peer.receive()) if isinstance(p, Publish))
        peer.send(Puback(packet.packet_id))
        [told] = peer.rest()
        assert isinstance(told, Disconnect)
        assert told.reason is Reason.PROTOCOL_ERROR
    works(server)


def test_answers_to_what_was_never_sent_are_harmless(server: LocalServer) -> None:
    with device(server, "eager") as peer:
        peer.send(Puback(77), Pubcomp(78), Pubrel(79), Puback(80, Reason.UNSPECIFIED_ERROR))
        assert peer.expect(Pubcomp).reason is Reason.PACKET_IDENTIFIER_NOT_FOUND
        msg_id = push(server, server.app, "eager")
        packet = peer.push()
        peer.send(Puback(packet.packet_id))  # twice
        eventually(lambda: accounts(server, server.app, msg_id)["delivered"] == 1)
        peer.send(Pingreq())
        assert peer.receive() == Pingresp()


# Too much


def test_more_unanswered_messages_than_allowed_end_the_connection(server: LocalServer) -> None:
    body = orjson.dumps(push_body(["witness"]))
    register(server, server.app, "witness")
    with counted(server, ended("receive maximum exceeded")), publisher(server) as peer:
        first = Publish("push", body, 1, packet_id=1)  # holds the answers of the others back
        peer.send(
            b"".join(
                encode(p, 5) for p in (first, *(Publish("x", b"", 1, packet_id=i) for i in range(2, 300)))
            )
        )
        told = peer.rest()[-1]
        assert isinstance(told, Disconnect)
        assert told.reason is Reason.RECEIVE_MAXIMUM_EXCEEDED


@pytest.mark.parametrize("version", [4, 5])
def test_a_flood_of_events_is_taken_at_the_pace_of_the_store(server: LocalServer, version: int) -> None:
    app = server.create_app(f"flood-{version}")
    token = register(server, app, "phone")
    with (
        counted(server, 'publishes_received_total{kind="event"}', by=20_000),
        device(server, "phone", app=app, password=token, version=version) as peer,
    ):
        before = server.metrics()["process_resident_memory_bytes"]
        peer.send(encode(Publish("event/tick", b'"' + b"x" * 100 + b'"'), version) * 20_000)
        peer.send(Pingreq())
        assert peer.receive() == Pingresp()
        assert server.metrics()["process_resident_memory_bytes"] - before < 50e6


def test_a_peer_that_asks_and_never_reads_is_not_read_either(server: LocalServer) -> None:
    forbidden = encode(Publish("push", b"", 1, packet_id=1), 5)  # and the answer is four times as long

    def talk() -> bool:
        """Whether it held up nobody."""
        with device(server, "talker") as peer:
            peer.set_buffers(SMALL)
            before, late = server.metrics()["process_resident_memory_bytes"], late_turns(server)
            sent = peer.send_until_stuck(forbidden * 10_000, most=100_000_000, idle=server.metrics)
            assert sent < 100_000_000  # it was stopped
            assert server.metrics()["process_resident_memory_bytes"] - before < 20e6
            works(server)
            held_up = late_turns(server) > late
            peer.set_buffers(LARGE)
            for _ in range(1000):
                assert peer.expect(Puback).reason is Reason.NOT_AUTHORIZED
            return not held_up

    eventually(talk)  # a machine that stood still held up the server, too


def late_turns(server: LocalServer) -> float:
    """Timers that ran more than a second late."""
    metrics, name = server.metrics(), "holdfast_event_loop_lag_seconds"
    return metrics[f"{name}_count"] - metrics[f'{name}_bucket{{le="1.0"}}']


def test_a_slow_reader_costs_little_and_catches_up(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server("--carriers-directory", str(acknowledged_within(600, tmp_path)))
    app = server.create_app("slow")
    tokens = {name: register(server, app, name) for name in ("slow", "quick")}
    with device(server, "slow", app=app, password=tokens["slow"]) as slow:
        slow.set_buffers(SMALL)
        before = server.metrics()["process_resident_memory_bytes"]
        sent = push_many(server, app, ["slow"] * 1000)
        broadcasts = [push_broadcast(server, app) for _ in range(20)]
        assert server.metrics()["process_resident_memory_bytes"] - before < 30e6
        with device(server, "quick", app=app, password=tokens["quick"]) as quick:
            msg_id = push(server, app, "quick")
            seen = ""
            while seen != msg_id:
                seen = orjson.loads(quick.push().payload)["msg_id"]
        slow.set_buffers(LARGE)
        got = [orjson.loads(slow.push().payload)["msg_id"] for _ in range(1020)]
        assert got == sent + broadcasts


def push_many(server: LocalServer, app: object, names: list[str]) -> list[str]:
    """One large push to each, in this order; their msg_ids."""
    items = {
        f"{time.monotonic_ns()}-{i}": {
            "platform": "all",
            "target": name,
            "message": {"msg_content": "x" * 3500},
        }
        for i, name in enumerate(names)
    }
    status, rows = call(server, app, "POST", "/v3/push/batch/regid/single", {"pushlist": items})  # type: ignore[arg-type]
    assert status == 200, rows
    return [rows[cid]["msg_id"] for cid in items]


def push_broadcast(server: LocalServer, app: object) -> str:
    status, answer = call(server, app, "POST", "/v3/push", push_body("all"))  # type: ignore[arg-type]
    assert status == 200, answer
    return str(answer["msg_id"])


def test_a_reader_that_never_reads_is_closed_and_gets_everything_later(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server("--carriers-directory", str(acknowledged_within(1, tmp_path)))
    with counted(server, ended("ack timeout")), device(server, "deaf") as peer:
        peer.set_buffers(SMALL)
        sent = push_many(server, server.app, ["deaf"] * 300)
        eventually(lambda: server.metrics().get(f"holdfast_{ended('ack timeout')}"))
    acknowledged_within(600, tmp_path)  # from here on it is this machine that may be slow
    os.kill(server.pid, signal.SIGHUP)
    eventually(lambda: "carrier profiles reloaded" in server.log_text())
    with device(server, "deaf") as peer:
        assert [orjson.loads(peer.push().payload)["msg_id"] for _ in sent] == sent
    works(server)


@pytest.mark.parametrize("flag", ["--mqtt-max-connecting", "--mqtt-max-connections"])
def test_a_flood_of_connections_is_cut_off_and_who_is_in_stays(start_server: StartServer, flag: str) -> None:
    server = start_server(flag, "20")
    with device(server, "inside") as peer:
        free = 20 if flag == "--mqtt-max-connecting" else 19
        with counted(server, refused("too many connections"), by=30), contextlib.ExitStack() as stack:
            flood = [stack.enter_context(Peer(server.addresses.mqtt)) for _ in range(free + 30)]
            eventually(lambda: sum(one.is_closed() for one in flood) == 30)
            push(server, server.app, "inside")
            peer.push()
        eventually(lambda: server.metrics()["holdfast_connections_opening"] == 0)
        works(server)


def test_a_session_has_a_hundred_subscriptions_and_a_thousand_waiting_messages(server: LocalServer) -> None:
    with device(server, "hoarder") as peer:
        suback = peer.subscribe(*(f"hoard/{i}" for i in range(101)))
        assert isinstance(suback, Suback)
        assert suback.reasons == (Reason.GRANTED_QOS_1,) * 100 + (Reason.QUOTA_EXCEEDED,)
    with counted(server, "topic_messages_dropped_total", by=5), publisher(server) as backend:
        for i in range(1005):
            backend.send(Publish("hoard/1", b"%d" % i, 1, packet_id=i + 1))
            assert backend.expect(Puback).reason is Reason.SUCCESS
    with device(server, "hoarder") as peer:
        for i in range(1000):
            packet = peer.expect(Publish)
            assert packet.payload == b"%d" % i
            peer.send(Puback(packet.packet_id))
        peer.expect_nothing()


def test_an_app_retains_sixteen_megabytes(server: LocalServer) -> None:
    app = server.create_app("archive", open=True)
    with (
        counted(server, 'publishes_refused_total{reason="retained full"}'),
        publisher(server, app=app) as backend,
    ):
        for i in range(65):
            backend.send(Publish(f"page/{i}", bytes(261_800), 1, retain=True, packet_id=i + 1))
            expected = Reason.QUOTA_EXCEEDED if i == 64 else Reason.NO_MATCHING_SUBSCRIBERS
            assert backend.expect(Puback).reason is expected
    works(server)


# WebSocket

UPGRADE: Final = (
    b"GET /mqtt HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Protocol: mqtt\r\n\r\n"
)


@pytest.mark.parametrize(
    ("sent", "answer", "reason"),
    [
        (UPGRADE.replace(b"/mqtt", b"/x"), b"HTTP/1.1 404", "websocket path"),
        (UPGRADE.replace(b": mqtt", b": soap"), b"HTTP/1.1 400", "websocket subprotocol"),
        (b"GET /mqtt HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 426", "not a websocket"),
        (b"\x10\x0c\x00\x04MQTT\r\n\r\n", b"HTTP/1.1 400", "bad websocket handshake"),
        (b"GET /mqtt HTTP/1.1\r\nX: " + b"x" * 9000, b"HTTP/1.1 431", "websocket handshake too large"),
        (UPGRADE + b"\x81\x80aaaa", b"HTTP/1.1 101", "websocket text frame"),
        (UPGRADE + b"\x82\x00", b"HTTP/1.1 101", "bad websocket frame"),  # not masked
        (UPGRADE + b"\x82\x80aaaa" * 300, b"HTTP/1.1 101", "too many websocket frames"),
        (
            UPGRADE + b"\x82\xff" + bytes(4) + b"\x7f\xff\xff\xffaaaa",
            b"HTTP/1.1 101",
            "websocket frame too large",
        ),
        (UPGRADE + b"\x82\x82aaaa\xa1\xa1", b"HTTP/1.1 101", "bad CONNECT"),  # PINGREQ, masked
    ],
)
def test_what_is_no_websocket_is_refused(
    server: LocalServer, sent: bytes, answer: bytes, reason: str
) -> None:
    assert server.addresses.ws is not None
    with counted(server, refused(reason)), Peer(server.addresses.ws) as peer:
        peer.send(sent)
        assert peer.rest_of_bytes().startswith(answer)
    works(server)


# Who are you?


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    ("label", "reason", "code"),
    [
        ("no credentials", Reason.BAD_USER_NAME_OR_PASSWORD, 4),
        ("unknown app", Reason.BAD_USER_NAME_OR_PASSWORD, 4),
        ("wrong password", Reason.BAD_USER_NAME_OR_PASSWORD, 4),
        ("another app's token", Reason.BAD_USER_NAME_OR_PASSWORD, 4),
        ("another device's token", Reason.BAD_USER_NAME_OR_PASSWORD, 4),
        ("a changed token", Reason.BAD_USER_NAME_OR_PASSWORD, 4),
        ("the device key of a closed app", Reason.BAD_USER_NAME_OR_PASSWORD, 4),
        ("no client id", Reason.CLIENT_IDENTIFIER_NOT_VALID, 2),
        ("bad client id", Reason.CLIENT_IDENTIFIER_NOT_VALID, 2),
    ],
)
def test_who_does_not_belong_here_is_refused(
    server: LocalServer, version: int, label: str, reason: Reason, code: int
) -> None:
    app, other = server.create_app("mine"), server.create_app("theirs")
    token = register(server, app, "phone")
    connects = {
        "no credentials": Connect("phone", version=version),
        "unknown app": Connect("phone", username="nobody", password=b"x", version=version),
        "wrong password": connect_packet(app, "phone", password="wrong", version=version),
        "another app's token": connect_packet(other, "phone", password=token, version=version),
        "another device's token": connect_packet(app, "tablet", password=token, version=version),
        "a changed token": connect_packet(app, "phone", password=changed(token), version=version),
        "the device key of a closed app": connect_packet(app, "phone", version=version),
        "no client id": connect_packet(app, "", clean=True, version=version),
        "bad client id": connect_packet(server.app, "x" * 65, version=version),
    }
    counts = refused(
        label
        if label in {"no credentials", "unknown app", "no client id", "bad client id"}
        else "wrong password"
    )
    with counted(server, counts), Peer(server.addresses.mqtt) as peer:
        peer.send(connects[label])
        raw = peer.rest_of_bytes()
    assert raw[3] == (reason if version == 5 else code)
    assert token.encode() not in server.log_text().encode()
    works(server, app)


def changed(token: str) -> str:
    """The same claims with another signature."""
    return token[:-1] + ("A" if token[-1] != "A" else "B")


def test_enhanced_authentication_is_refused(server: LocalServer) -> None:
    with counted(server, refused("authentication method")), Peer(server.addresses.mqtt) as peer:
        connack = peer.connect(connect_packet(server.app, "x", properties={"authentication_method": "SCRAM"}))
        assert connack.reason is Reason.BAD_AUTHENTICATION_METHOD


def test_guessing_app_keys_costs_no_memory(server: LocalServer) -> None:
    with counted(server, refused("unknown app"), by=300):
        for i in range(300):
            with Peer(server.addresses.mqtt) as peer:
                connack = peer.connect(Connect("x", username=f"guess-{i}", password=b"x", version=5))
                assert connack.reason is Reason.BAD_USER_NAME_OR_PASSWORD
    works(server)


# Disks


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A file system of its own in this folder."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("to mount a tmpfs needs root")
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"to mount a tmpfs is not allowed here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_refuses_pushes_and_loses_none(tmp_path: Path) -> None:
    with mounted(tmp_path / "data", "size=8m") as disk, contextlib.closing(Stopped(tmp_path)) as server:
        server.start()
        accepted = []
        with (
            device(server, "phone") as peer,
            publisher(server) as backend,
            publisher(server, "old", version=4) as old,
        ):
            accepted.append(push(server, server.app, "phone"))
            peer.push()
            fill(disk)
            body = push_body(["phone"], "x" * 1500)
            status = 200
            answer: dict[str, Any] = {}
            while status == 200:  # what the file has free pages for is accepted
                status, answer = call(server, server.app, "POST", "/v3/push", body)
                accepted += [answer["msg_id"]] if status == 200 else []
            assert (status, answer["error"]["code"]) == (503, 1030)
            assert "room" in answer["error"]["message"]
            backend.send(Publish("push", orjson.dumps(body), 1, packet_id=1))
            puback = backend.expect(Puback)
            assert puback.reason is Reason.IMPLEMENTATION_SPECIFIC_ERROR
            assert puback.properties["user_properties"] == (("code", "1030"),)
            with counted(server, ended("store unavailable")):
                old.send(Publish("push", orjson.dumps(body), 1, packet_id=1))
                assert old.rest() == []
            metrics = server.metrics()
            assert metrics["holdfast_store_failed_commits_total"] >= 2
            assert metrics['holdfast_publishes_refused_total{reason="1030"}'] == 2
            assert metrics['holdfast_http_requests_total{endpoint="/v3/push",status="503"}'] == 1
            assert readiness(server) == (503, ["the store refuses writes"])
            peer.send(Pingreq())
            while not isinstance(peer.receive(), Pingresp):
                pass  # devices stay, and get what was accepted
            (disk / "filler").unlink()
            accepted.append(str(eventually(lambda: accepted_push(server))))
        eventually(lambda: readiness(server)[0] == 200)
        for msg_id in accepted:
            row = accounts(server, server.app, msg_id)
            assert row["target"] == row["delivered"] + row["pending"] == 1
        server.kill()
        server.start()
        with device(server, "phone") as peer:
            pending = [m for m in accepted if accounts(server, server.app, m)["pending"]]
            got: list[str] = []
            while not set(pending) <= set(got):
                got.append(orjson.loads(peer.push().payload)["msg_id"])
        works(server)


class Stopped(LocalServer):
    """Stopped for good by close."""

    def close(self) -> None:
        self.kill()
        assert "Traceback" not in self.log_text(), self.log_text()


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def accepted_push(server: LocalServer) -> str | None:
    status, answer = call(server, server.app, "POST", "/v3/push", push_body(["phone"]))
    return str(answer["msg_id"]) if status == 200 else None


def readiness(server: LocalServer) -> tuple[int, list[str]]:
    try:
        with urllib.request.urlopen(f"{server.addresses.admin}/readyz", timeout=PATIENCE) as response:
            return response.status, orjson.loads(response.read())["reasons"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, orjson.loads(error.read())["reasons"]


def fails_to_start(data_dir: Path) -> str:
    """The one line that `serve` prints before it exits 1."""
    command = [sys.executable, "-m", "clients.command", "serve", "--data-dir", str(data_dir), *ANY_PORT]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_data_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path / "data", "ro") as disk:
        told = fails_to_start(disk)
        assert f"cannot write in the data directory {disk}" in told
        assert "--data-dir" in told


def test_a_data_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    assert str(tmp_path / "data") in fails_to_start(tmp_path / "data")


def test_a_second_server_on_the_same_data_is_refused(server: LocalServer) -> None:
    told = fails_to_start(server.data_dir)
    assert f"is in use by another server (process {server.pid})" in told
    works(server)


@pytest.mark.parametrize("damage", ["no database", "cut off", "pages overwritten", "another's database"])
def test_a_damaged_database_is_refused(tmp_path: Path, damage: str) -> None:
    with contextlib.closing(Stopped(tmp_path)) as server:
        server.start()
        works(server)
        assert server.terminate() == 0
    path = server.data_dir / "holdfast.db"
    content = path.read_bytes()
    if damage == "another's database":
        path.unlink()
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE something (x)")
    else:
        path.write_bytes(
            {
                "no database": b"not a database" * 1000,
                "cut off": content[: len(content) // 2],
                "pages overwritten": content[:4096] + b"\xa5" * (len(content) - 4096),
            }[damage]
        )
    told = fails_to_start(server.data_dir)
    assert str(path) in told
    assert ".recover" in told or damage == "another's database"
