"""How pushes leave: over HTTP to Holdfast, or as MQTT messages to another broker. Nothing here blocks for long, and a
server that does not answer, or is gone, is an answer of its own: NO_ANSWER."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, Protocol

import orjson

from gateway.mqtt import Connack, Connect, MQTTError, Puback, Publish, decode, encode
from loadtest import http_pool
from loadtest.http_pool import HttpPool
from loadtest.ledger import alert
from loadtest.publishing import push_body
from loadtest.reactor import Reactor
from loadtest.roster import Strangers
from loadtest.topic_publisher import payload
from loadtest.trial.account import NO_ANSWER
from loadtest.trial.plan import TrialError
from loadtest.trial.target import Enrolled
from loadtest.wires import Endpoint, suspect_tls, why_of, wires_of

MSG_ID_DIGITS: Final = 16
READ_SIZE: Final = 65_536
VERSION: Final = 4
PACKET_IDS: Final = 65_535
UNSENT_MOST: Final = 64 << 20  # bytes that wait for a broker which does not read
WHY: Final = 80  # characters of a refusal

Done = Callable[[str], None]  # gets nothing if the push was accepted, or NO_ANSWER, or why it was refused


class Sender(Protocol):
    """`waiting`: pushes that are not on the wire yet, because all connections wait for answers."""

    @property
    def waiting(self) -> int: ...

    def to_device(self, serial: int, device: int, done: Done) -> None: ...

    def to_all(self, serial: int, done: Done) -> None: ...

    def to_group(self, serial: int, number: int, done: Done) -> None: ...

    def close(self) -> None: ...


class HttpSender:
    def __init__(self, pool: HttpPool, enrolled: Enrolled, size: int, *, everyone: bool) -> None:
        self._pool = pool
        self._enrolled = enrolled
        self._size = size
        self._everyone = everyone

    @property
    def waiting(self) -> int:
        return self._pool.waiting

    def close(self) -> None:
        self._pool.close()

    def to_device(self, serial: int, device: int, done: Done) -> None:
        self._send(push_body(self._enrolled.who.name(device), self._text(serial)), done)

    def to_all(self, serial: int, done: Done) -> None:
        self._send_to('"all"' if self._everyone else f'{{"tag":["{self._enrolled.tag}"]}}', serial, done)

    def to_group(self, serial: int, number: int, done: Done) -> None:
        self._send_to(f'{{"tag":["{self._enrolled.group(number)}"]}}', serial, done)

    def _send_to(self, audience: str, serial: int, done: Done) -> None:
        alert_field = f'"notification":{{"alert":"{self._text(serial)}"}}'
        self._send(f'{{"platform":"all","audience":{audience},{alert_field}}}'.encode(), done)

    def _text(self, serial: int) -> str:
        return alert(serial, MSG_ID_DIGITS, self._size)

    def _send(self, body: bytes, done: Done) -> None:
        self._pool.send(
            self._pool.build("POST", "/v3/push", body),
            lambda status, answer: done(refusal_of(status, answer)),
        )


def refusal_of(status: int, body: bytes) -> str:
    """Nothing for 200."""
    if status == 200:
        return ""
    if status == http_pool.NO_ANSWER:
        return NO_ANSWER
    try:
        error = orjson.loads(body)["error"]
        why = f"{error['code']} {error['message']}"
    except (orjson.JSONDecodeError, KeyError, TypeError):
        why = body.decode(errors="replace")
    return f"{status} {why}"[:WHY]


class TopicSender:
    """One MQTT 3.1.1 connection that publishes at QoS 1; made anew when it broke and something is to be sent."""

    def __init__(self, reactor: Reactor, endpoint: Endpoint, strangers: Strangers, size: int) -> None:
        """Raises TrialError if the broker does not take it."""
        self._reactor = reactor
        self._address = endpoint.address
        self._wires = wires_of(endpoint.tls, [endpoint.address])
        self._strangers = strangers
        self._size = size
        self._fd = -1
        self._unsent = bytearray()
        self._received = bytearray()
        self._open: dict[int, Done] = {}  # packet id -> who is told; in the order they were sent
        self._last = 0
        self._welcome = False
        self._watches_writing = False
        self._refused = ""
        self._connect()
        reactor.run_until(lambda: self._welcome or self._fd < 0, "the publisher's CONNACK")
        if not self._welcome:
            why = self._refused or "the connection was closed"
            raise TrialError(f"the publisher was not let in: {why}{suspect_tls(endpoint)}")

    @property
    def waiting(self) -> int:
        return 0

    def close(self) -> None:
        if self._fd >= 0:
            self._reactor.forget(self._fd)
            self._wires.close(self._fd)
            self._fd = -1

    def to_device(self, serial: int, device: int, done: Done) -> None:
        self._publish(self._strangers.topic(device), serial, done)

    def to_all(self, serial: int, done: Done) -> None:
        self._publish(self._strangers.topic(None), serial, done)

    def to_group(self, serial: int, number: int, done: Done) -> None:
        raise AssertionError("a foreign broker has no groups")

    def _publish(self, topic: str, serial: int, done: Done) -> None:
        if self._fd < 0 and not self._connect():
            done(NO_ANSWER)
            return
        packet_id = self._last % PACKET_IDS + 1
        if len(self._unsent) > UNSENT_MOST or packet_id in self._open:
            done("more is unanswered than MQTT allows")
            return
        self._last = packet_id
        self._open[packet_id] = done
        packet = Publish(topic, payload(serial, self._size), 1, packet_id=packet_id)
        self._write(encode(packet, VERSION))

    def _connect(self) -> bool:
        """Begin to. False: nothing comes of it."""
        who = self._strangers
        name = f"loadtest-publisher-{os.getpid()}"
        password = None if who.password is None else who.password.encode()
        packet = Connect(name, username=who.username, password=password, version=VERSION)
        try:
            self._fd = self._wires.open(self._address, None)
        except OSError as error:
            self._refused = why_of(error)
            return False
        self._welcome = False
        self._watches_writing = False
        self._unsent.clear()
        self._received.clear()
        self._reactor.watch(self._fd, self._ready, urgent=True)
        self._write(encode(packet, VERSION))
        return True

    def _write(self, data: bytes) -> None:
        self._unsent += data
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._wires.write(self._fd, self._unsent)]
        except BlockingIOError:
            pass
        except OSError as error:
            self._refused = self._refused or why_of(error)
            return  # reading ends it
        writable = bool(self._unsent) and self._wires.waits_to_write(self._fd)
        if self._watches_writing != writable:
            self._watches_writing = writable
            self._reactor.rewatch(self._fd, self._ready, writable=writable, urgent=True)

    def _ready(self, _: int) -> None:
        if self._unsent:
            self._flush()
        try:
            data = self._wires.read(self._fd, READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._refused = self._refused or why_of(error)
            data = b""
        if not data:
            self._lose()
            return
        self._received += data
        try:
            self._take()
        except MQTTError as error:
            self._refused = str(error)
            self._lose()

    def _take(self) -> None:
        start = 0
        while found := decode(self._received, start, VERSION, READ_SIZE):
            packet, start = found
            match packet:
                case Connack():
                    self._welcome = not packet.reason
                    self._refused = "" if self._welcome else packet.reason.name
                case Puback(packet_id=packet_id):
                    done = self._open.pop(packet_id, None)
                    if done is not None:
                        done("")
        del self._received[:start]

    def _lose(self) -> None:
        self.close()
        lost, self._open = self._open, {}
        for done in lost.values():
            done(NO_ANSWER)
