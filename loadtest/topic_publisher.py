"""A backend that publishes ordinary messages over one MQTT 3.1.1 connection, and its subscribers' side of that."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from typing import Final

from gateway.mqtt import Connect, Publish, Subscribe, Subscription, encode
from loadtest.ledger import PAYLOAD_SIZE, alert
from loadtest.population import Population
from loadtest.reactor import Reactor
from loadtest.server import Address

VERSION: Final = 4
ACK_SIZE: Final = 4  # of CONNACK and PUBACK alike
PUBACK: Final = 0x40
PACKET_IDS: Final = 65_535
MSG_ID: Final = "1" * 18  # so that an ordinary message is as long as a push


class PublishError(Exception):
    """The server refused or dropped the publisher, or answered something else."""


class TopicPublisher:
    """The socket blocks when it is written to: who publishes faster than the server reads, waits."""

    def __init__(self, reactor: Reactor, address: Address, connect: bytes) -> None:
        """`connect`: its CONNECT. Raises PublishError."""
        self._reactor = reactor
        self._socket = socket.create_connection(address)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(connect)
        answer = self._socket.recv(ACK_SIZE)
        if answer != b"\x20\x02\x00\x00":
            self._socket.close()
            raise PublishError(f"the publisher was refused: {answer.hex()}")
        self._received = b""
        self._last = 0
        self.unanswered = 0
        reactor.watch(self._socket.fileno(), self._readable, urgent=True)

    def close(self) -> None:
        self._reactor.forget(self._socket.fileno())
        self._socket.close()

    def publish(self, topic: str, payload: bytes, qos: int, *, retain: bool = False) -> None:
        """QoS 0 or 1."""
        self._socket.sendall(self._frame(topic, payload, qos, retain=retain))

    def publish_together(self, messages: Iterable[tuple[str, bytes]], qos: int) -> None:
        """In one write: topic and payload of each."""
        self._socket.sendall(b"".join(self._frame(topic, payload, qos) for topic, payload in messages))

    def wait_for_answers(self) -> None:
        self._reactor.run_until(lambda: not self.unanswered, "all messages acknowledged")

    def _frame(self, topic: str, payload: bytes, qos: int, *, retain: bool = False) -> bytes:
        if qos:
            self._last = self._last % PACKET_IDS + 1
            self.unanswered += 1
        packet = Publish(topic, payload, qos, retain=retain, packet_id=self._last if qos else 0)
        return encode(packet, VERSION)

    def _readable(self, _: int) -> None:
        data = self._socket.recv(4096)
        if not data:
            raise PublishError("the publisher was disconnected by the server")
        data = self._received + data
        whole = len(data) - len(data) % ACK_SIZE
        if data[:whole:ACK_SIZE] != bytes((PUBACK,)) * (whole // ACK_SIZE):
            raise PublishError(f"the publisher got something else: {data.hex()}")
        self.unanswered -= whole // ACK_SIZE
        self._received = data[whole:]


def publisher_connect(population: Population) -> bytes:
    """CONNECT of an app's publisher."""
    password = population.master_secret.encode()
    packet = Connect("bench-publisher", username=population.app_key, password=password, version=VERSION)
    return encode(packet, VERSION)


def subscribe_packet(filters: Sequence[str], qos: int = 1) -> bytes:
    return encode(Subscribe(1, tuple(Subscription(name, qos) for name in filters)), VERSION)


def payload(serial: int, size: int = PAYLOAD_SIZE) -> bytes:
    """What a push with this serial would have: the fleet cannot tell the two."""
    text = alert(serial, len(MSG_ID), size)
    return f'{{"msg_id":"{MSG_ID}","notification":{{"alert":"{text}"}}}}'.encode()
