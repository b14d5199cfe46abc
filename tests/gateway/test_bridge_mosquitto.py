"""A real mosquitto bridges to the running server and back: `up/…` goes from it to us, `down/…` from us to it."""

from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from clients.local_server import LocalServer
from gateway.mqtt import (
    Connect,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Suback,
    Subscribe,
    Subscription,
)
from tests.conftest import StartServer
from tests.gateway.peer import Peer, connect_packet, eventually
from tests.patience import PATIENCE
from tests.ports import free_port

pytestmark = pytest.mark.skipif(not shutil.which("mosquitto"), reason="mosquitto: apt-get install mosquitto")

BRIDGES: Final = ("mqttv311", "mqttv50")
ONE_WAY_EACH: Final = ("up/# out 2", "down/# in 2")
_packet_ids = itertools.count(1)


class Mosquitto:
    """A mosquitto with one bridge to the server. It keeps its data in `folder`, over a restart too."""

    def __init__(self, server: LocalServer, folder: Path, name: str, version: str, *lines: str) -> None:
        self.address = ("127.0.0.1", free_port())
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        host, port = server.addresses.mqtt
        settings = [
            f"listener {self.address[1]} {self.address[0]}", "allow_anonymous true", "user root",
            "persistence true", f"persistence_location {folder}/", "log_dest stderr",
            f"connection {name}", f"address {host}:{port}", f"bridge_protocol_version {version}",
            f"remote_clientid {name}", f"remote_username {server.app.app_key}",
            f"remote_password {server.app.device_key}", "cleansession false", "restart_timeout 1",
            *lines,
        ]  # fmt: skip
        (folder / "mosquitto.conf").write_text("\n".join(settings) + "\n")

    def start(self) -> None:
        with (self._folder / "mosquitto.log").open("ab") as log:
            command = ["mosquitto", "-c", str(self._folder / "mosquitto.conf")]
            self._process = subprocess.Popen(command, stderr=log)
        eventually(self._listens)

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "mosquitto.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(self.address) == 0

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(PATIENCE)
            self._process = None


@contextmanager
def bridge(server: LocalServer, folder: Path, name: str, version: str, *topics: str) -> Iterator[Mosquitto]:
    """Runs until the block ends; returns once the bridge has subscribed."""
    made = Mosquitto(server, folder, name, version, *(f"topic {topic}" for topic in topics))
    try:
        made.start()
        with ours(server, f"{name}-witness") as witness:
            wait_for_bridge(witness, made)
        yield made
    finally:
        made.stop()


def wait_for_bridge(witness: Peer, mosquitto: Mosquitto) -> None:
    """Until what is published at one end comes out at the other, in both directions."""
    with theirs(mosquitto, "witness") as local:
        subscribe(local, "down/probe")
        subscribe(witness, "up/probe")
        probes = itertools.count(1)
        eventually(lambda: _passes(witness, local, "down/probe", next(probes)))
        eventually(lambda: _passes(local, witness, "up/probe", next(probes)))


def _passes(sender: Peer, receiver: Peer, topic: str, number: int) -> bool:
    """Whether this very probe comes out: then none that was sent before it is under way any more."""
    probe = Publish(topic, b"%d" % number)
    sender.send(probe)
    try:
        while receiver.receive(0.1) != probe:
            pass
    except TimeoutError:
        return False
    return True


@contextmanager
def ours(server: LocalServer, name: str, *, clean: bool = True, present: bool = False) -> Iterator[Peer]:
    """A device at our server."""
    with Peer(server.addresses.mqtt) as peer:
        connack = peer.connect(connect_packet(server.app, name, clean=clean, expiry=0 if clean else 3600))
        assert (connack.reason, connack.session_present) == (0, present)
        yield peer


@contextmanager
def theirs(mosquitto: Mosquitto, name: str, *, clean: bool = True) -> Iterator[Peer]:
    """A client of mosquitto."""
    with Peer(mosquitto.address) as peer:
        wished = {"session_expiry_interval": 0 if clean else 3600}
        connack = peer.connect(Connect(name, clean, 60, None, None, properties=wished))  # type: ignore[arg-type]
        assert connack.reason == 0
        yield peer


def subscribe(peer: Peer, topic_filter: str, qos: int = 2) -> None:
    peer.send(Subscribe(next(_packet_ids), (Subscription(topic_filter, qos),)))
    assert peer.expect(Suback).reasons == (qos,)


def publish(peer: Peer, topic: str, payload: str, qos: int, *, retain: bool = False) -> None:
    """By a peer that receives nothing else meanwhile."""
    packet_id = next(_packet_ids) if qos else 0
    peer.send(Publish(topic, payload.encode(), qos, retain, packet_id=packet_id))
    if qos == 1:
        assert peer.expect(Puback).packet_id == packet_id
    if qos == 2:
        assert peer.expect(Pubrec).packet_id == packet_id
        peer.send(Pubrel(packet_id))
        assert peer.expect(Pubcomp).packet_id == packet_id


def received(peer: Peer, number: int) -> list[Publish]:
    """So many messages, each acknowledged to the end."""
    messages: list[Publish] = []
    open_ids: set[int] = set()
    while len(messages) < number or open_ids:
        packet = peer.receive()
        if isinstance(packet, Pubrel):
            open_ids.remove(packet.packet_id)
            peer.send(Pubcomp(packet.packet_id))
            continue
        assert isinstance(packet, Publish), packet
        messages.append(packet)
        if packet.qos == 1:
            peer.send(Puback(packet.packet_id))
        if packet.qos == 2:
            open_ids.add(packet.packet_id)
            peer.send(Pubrec(packet.packet_id))
    return messages


def said(messages: list[Publish]) -> list[tuple[str, str, int]]:
    return [(message.topic, message.payload.decode(), message.qos) for message in messages]


@pytest.mark.parametrize("version", BRIDGES)
def test_a_bridge_carries_both_ways(server: LocalServer, tmp_path: Path, version: str) -> None:
    with (
        bridge(server, tmp_path, f"both-{version}", version, *ONE_WAY_EACH) as mosquitto,
        ours(server, "here") as here,
        ours(server, "here-sends") as here_sends,
        theirs(mosquitto, "there") as there,
        theirs(mosquitto, "there-sends") as there_sends,
    ):
        subscribe(here, "up/#")
        subscribe(there, "down/#")
        for sender, receiver, direction in ((here_sends, there, "down"), (there_sends, here, "up")):
            sent = [(f"{direction}/{i}", f"{direction} {i}", qos) for qos in (1, 2) for i in range(20)]
            for topic, payload, qos in sent:
                publish(sender, topic, payload, qos)
            assert said(received(receiver, len(sent))) == sent
            receiver.expect_nothing()


@pytest.mark.parametrize("version", BRIDGES)
def test_a_bridge_with_both_on_one_topic_echoes_nothing(
    server: LocalServer, tmp_path: Path, version: str
) -> None:
    """MQTT 5 has No Local for this. In 3.1.1 the bridge says that it is one, with protocol level 0x84."""
    topics = (*ONE_WAY_EACH, "same/# both 1")
    with (
        bridge(server, tmp_path, f"echo-{version}", version, *topics) as mosquitto,
        ours(server, "here") as here,
        theirs(mosquitto, "there") as there,
    ):
        subscribe(here, "same/#", 0)
        subscribe(there, "same/#", 0)
        for sender in (here, there):
            sender.send(Publish("same/topic", b"x"))
            for receiver in (here, there):
                assert receiver.expect(Publish).payload == b"x"
        for receiver in (here, there):
            receiver.expect_nothing()


@pytest.mark.parametrize("version", BRIDGES)
def test_retained_messages_cross_a_bridge(server: LocalServer, tmp_path: Path, version: str) -> None:
    name = f"retained-{version}"
    with ours(server, "here") as here:
        publish(here, f"down/{name}/before", "before", 1, retain=True)
        with bridge(server, tmp_path, name, version, *ONE_WAY_EACH) as mosquitto:
            with theirs(mosquitto, "there") as there:
                publish(there, f"up/{name}", "up", 2, retain=True)
            subscribe(here, f"up/{name}")
            assert said(received(here, 1)) == [(f"up/{name}", "up", 2)]  # now or in a moment
            publish(here, f"down/{name}/live", "live", 1, retain=True)
            with ours(server, "late") as late:
                subscribe(late, f"up/{name}")
                assert [message.retain for message in received(late, 1)] == [True]
            eventually(lambda: kept(mosquitto, f"down/{name}/#", 2) == {"before", "live"})
        for topic in (f"down/{name}/before", f"down/{name}/live", f"up/{name}"):
            publish(here, topic, "", 0, retain=True)


def kept(mosquitto: Mosquitto, topic_filter: str, number: int) -> set[str]:
    """What mosquitto has retained there, if it is so much."""
    with theirs(mosquitto, "looker") as looker:
        subscribe(looker, topic_filter, 0)
        found = set()
        for _ in range(number):
            try:
                message = looker.receive(0.1)
            except TimeoutError:
                break
            assert isinstance(message, Publish)
            assert message.retain
            found.add(message.payload.decode())
        return found


def test_a_bridge_comes_back_after_our_restart(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server()
    with bridge(server, tmp_path, "back", "mqttv50", *ONE_WAY_EACH) as mosquitto:
        server.kill()
        with theirs(mosquitto, "there") as there:
            publish(there, "up/meanwhile", "while you were away", 1, retain=True)
        server.start()
        with ours(server, "here") as here, ours(server, "witness") as witness:
            subscribe(here, "up/meanwhile")
            # Perhaps more than once: a bridge sends what is retained again whenever it connects.
            assert said(received(here, 1)) == [("up/meanwhile", "while you were away", 1)]
            wait_for_bridge(witness, mosquitto)


@pytest.mark.parametrize("restarts", [False, True])
def test_a_bridge_gets_what_came_while_it_was_away(
    start_server: StartServer, tmp_path: Path, restarts: bool
) -> None:
    """In 3.1.1: `cleansession false` of a bridge that speaks 5 sends no Session Expiry Interval, which means 0."""
    server = start_server()
    sent = [
        (f"down/{i}", str(i), 1 + i // 15) for i in range(30)
    ]  # mosquitto passes QoS 2 on later than QoS 1
    with bridge(server, tmp_path, "absent", "mqttv311", *ONE_WAY_EACH) as mosquitto:
        with theirs(mosquitto, "there", clean=False) as there:
            subscribe(there, "down/#")
        mosquitto.stop()
        with ours(server, "here") as here:
            for topic, payload, qos in sent:
                publish(here, topic, payload, qos)
        if restarts:
            server.restart()
        mosquitto.start()
        with theirs(mosquitto, "there", clean=False) as there:
            assert said(received(there, len(sent))) == sent
