"""Clients that come, do something and go, many at once: MQTT spoken in full, in all its kinds, by few names.

A visit is steps: bytes to send, and how many answers must come before the next step. What the server asks of a
client meanwhile (PUBACK, PUBREC, PUBREL, PUBCOMP) a visitor does, unless it is a deaf one, which answers nothing and
so leaves what is in flight behind.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from gateway.mqtt import (
    Connect,
    Disconnect,
    Properties,
    Publish,
    Reason,
    Subscribe,
    Subscription,
    Unsubscribe,
    Will,
    encode,
)
from loadtest.fleet import open_socket
from loadtest.population import Population
from loadtest.reactor import Reactor
from loadtest.server import Address

READ_SIZE: Final = 65_536
STUCK: Final = 30.0  # seconds in which nobody finishes a visit: the server has lost an answer
SOURCES: Final = (
    250  # addresses: each has 28,000 ports, and one is in TIME_WAIT for a minute after each visit
)
RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST, without TIME_WAIT

NAMES: Final = 500  # client ids
PLACES: Final = 100  # topics are t/0/0 to t/99/99
RETAINED: Final = 200  # r/0 to r/199
GROUPS: Final = 5  # of shared subscriptions

CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, DISCONNECT = 0x20, 0x30, 0x40, 0x50, 0x60, 0xE0
PUBREL_FLAGS: Final = 0x02


class VisitError(Exception):
    """The server let somebody wait for an answer, or sent what is no packet."""


@dataclass(frozen=True, slots=True)
class Step:
    sends: bytes
    answers: int  # CONNACK, SUBACK, UNSUBACK, PUBACK, PUBCOMP; to the deaf PUBREC


@dataclass(frozen=True, slots=True)
class Visit:
    steps: tuple[Step, ...]
    parting: bytes  # DISCONNECT, or nothing
    reset: bool  # end the connection with RST instead of FIN
    deaf: bool


class Programme:
    """An endless supply of visits, the same for the same seed."""

    def __init__(self, population: Population, session_expiry: int, seed: int = 2026) -> None:
        self._population = population
        self._session_expiry = session_expiry
        self._random = random.Random(seed)

    def __iter__(self) -> Iterator[Visit]:
        while True:
            yield self._visit()

    def _visit(self) -> Visit:
        chance, version = self._random.random, self._random.choice((4, 5))
        deaf = chance() < 0.1
        steps = [Step(encode(self._connect(version), version), 1)]
        subscribed = chance() < 0.7
        if subscribed:
            steps.append(Step(encode(self._subscribe(version), version), 1))
        steps += [
            self._publish(version, packet_id) for packet_id in range(1, 1 + self._random.choice((0, 1, 2, 3)))
        ]
        if subscribed and chance() < 0.3:
            steps.append(Step(encode(Unsubscribe(9, (self._filter(),)), version), 1))
        return Visit(tuple(steps), self._parting(version), chance() < 0.2, deaf)

    def _connect(self, version: int) -> Connect:
        chance, population = self._random.random, self._population
        publisher = chance() < 0.2
        nameless = publisher and chance() < 0.5
        secret = population.master_secret if publisher else population.device_key
        properties: Properties = {}
        if version == 5 and chance() < 0.7:
            properties["session_expiry_interval"] = self._random.randint(0, self._session_expiry)
        return Connect(
            "" if nameless else f"visitor-{self._random.randrange(NAMES)}",
            clean_start=nameless or chance() < 0.5,
            keep_alive=60,
            username=population.app_key,
            password=secret.encode(),
            will=self._will(version) if chance() < 0.25 else None,
            version=version,
            properties=properties,
        )

    def _will(self, version: int) -> Will:
        properties: Properties = {}
        if version == 5 and self._random.random() < 0.5:
            properties["will_delay_interval"] = self._random.randint(0, self._session_expiry)
        return Will(self._topic(), b"gone", self._random.randrange(3), properties=properties)

    def _subscribe(self, version: int) -> Subscribe:
        some = range(self._random.randint(1, 3))
        properties: Properties = {}
        if version == 5 and self._random.random() < 0.3:
            properties["subscription_identifiers"] = (self._random.randint(1, 9),)
        entries = tuple(
            Subscription(self._filter(shared=version == 5), self._random.randrange(3)) for _ in some
        )
        return Subscribe(8, entries, properties)

    def _filter(self, *, shared: bool = False) -> str:
        a, b = self._random.randrange(PLACES), self._random.randrange(PLACES)
        kinds = [f"t/{a}/{b}", f"t/{a}/+", f"t/+/{b}", f"t/{a}/#", f"r/{a}"]
        if shared:
            kinds.append(f"$share/group-{a % GROUPS}/t/{a}/+")
        return self._random.choice(kinds)

    def _topic(self) -> str:
        return f"t/{self._random.randrange(PLACES)}/{self._random.randrange(PLACES)}"

    def _publish(self, version: int, packet_id: int) -> Step:
        chance, qos = self._random.random, self._random.randrange(3)
        retain = chance() < 0.3
        payload = b"" if retain and chance() < 0.5 else b"x" * self._random.randrange(200)
        topic = f"r/{self._random.randrange(RETAINED)}" if retain else self._topic()
        properties: Properties = {}
        if version == 5 and chance() < 0.3:
            properties = {"message_expiry_interval": 2, "user_properties": (("a", "b"),), "topic_alias": 1}
        packet = Publish(
            topic, payload, qos, retain, packet_id=packet_id if qos else 0, properties=properties
        )
        return Step(encode(packet, version), 1 if qos else 0)

    def _parting(self, version: int) -> bytes:
        how = self._random.random()
        if how < 0.3:
            return b""
        if version == 5 and how < 0.5:
            return encode(Disconnect(Reason.DISCONNECT_WITH_WILL_MESSAGE), version)
        return encode(Disconnect(), version)


class _Guest:
    """One visit under way."""

    __slots__ = ("awaited", "partial", "step", "visit")

    def __init__(self, visit: Visit) -> None:
        self.visit = visit
        self.step = 0
        self.awaited = 0
        self.partial = b""


class Visitors:
    """`finished` visits came to their end; of them the server ended `cut` (taken over, …) and refused `refused`."""

    def __init__(self, reactor: Reactor, address: Address, visits: Iterator[Visit]) -> None:
        self._reactor = reactor
        self._address = address
        self._visits = visits
        self._guests: dict[int, _Guest] = {}
        self._begun = 0
        self.finished = 0
        self.cut = 0
        self.refused = 0

    def run(self, until: int, at_once: int, deadline: float) -> None:
        """Visits up to the `until`th, or until the time `deadline`. Raises VisitError if no visit ends any more."""
        last, since = self.finished, time.perf_counter()
        while self._guests or (self._begun < until and time.perf_counter() < deadline):
            while len(self._guests) < at_once and self._begun < until and time.perf_counter() < deadline:
                self._begin()
            self._reactor.turn(0.05)
            if self.finished > last:
                last, since = self.finished, time.perf_counter()
            elif time.perf_counter() - since > STUCK:
                raise VisitError(f"{len(self._guests)} visits wait: {self._first_waiting()}")

    def close(self) -> None:
        for fd in list(self._guests):
            self._leave(fd)

    def _first_waiting(self) -> str:
        guest = next(iter(self._guests.values()))
        sent = [step.sends.hex() for step in guest.visit.steps[: guest.step]]
        return f"for {guest.awaited} answers after {sent}, got {guest.partial.hex()}"

    def _begin(self) -> None:
        self._begun += 1
        fd = open_socket(self._address, f"127.2.0.{1 + self._begun % SOURCES}")
        self._guests[fd] = _Guest(next(self._visits))
        self._reactor.watch(fd, self._connected, writable=True)

    def _connected(self, fd: int) -> None:
        self._reactor.rewatch(fd, self._readable)
        self._go_on(fd, self._guests[fd])

    def _go_on(self, fd: int, guest: _Guest) -> None:
        """Send the following steps, up to one that is answered, or leave."""
        steps = guest.visit.steps
        while not guest.awaited:
            if guest.step == len(steps):
                if self._send(fd, guest.visit.parting):
                    self._leave(fd)
                return
            step = steps[guest.step]
            guest.step += 1
            guest.awaited = step.answers
            if not self._send(fd, step.sends):
                return

    def _send(self, fd: int, packet: bytes) -> bool:
        """False: the server has closed, and the visit is over."""
        try:
            os.write(fd, packet)
        except ConnectionError:
            self.cut += 1
            self._leave(fd)
            return False
        return True

    def _leave(self, fd: int) -> None:
        guest = self._guests.pop(fd)
        self.finished += 1
        self._reactor.forget(fd)
        with socket.socket(fileno=fd) as opened:
            if guest.visit.reset:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def _readable(self, fd: int) -> None:
        guest = self._guests[fd]
        try:
            data = os.read(fd, READ_SIZE)
        except ConnectionError:
            data = b""
        if not data:
            self.cut += 1
            self._leave(fd)
            return
        answers, guest.partial = read_frames(guest.partial + data, self._take(guest))
        if answers and not self._send(fd, answers):
            return
        if guest.awaited <= 0 and fd in self._guests:
            guest.awaited = 0
            self._go_on(fd, guest)

    def _take(self, guest: _Guest) -> Callable[[int, bytes], bytes]:
        """What a visitor answers to a packet, by its first byte and body."""
        deaf = guest.visit.deaf

        def take(first: int, body: bytes) -> bytes:
            kind = first & 0xF0
            if kind == PUBLISH:
                return b"" if deaf else answer_publish(first, body)
            if kind == PUBREL:
                return b"" if deaf else bytes((0x70, 2)) + body[:2]
            if kind == PUBREC and not deaf and (len(body) < 3 or body[2] < 0x80):
                return bytes((PUBREL | PUBREL_FLAGS, 2)) + body[:2]
            if kind == DISCONNECT:
                return b""  # and the connection ends
            if kind == CONNACK and body[1]:
                self.refused += 1
            guest.awaited -= 1
            return b""

        return take


def answer_publish(first: int, body: bytes) -> bytes:
    """PUBACK or PUBREC."""
    qos = first >> 1 & 3
    if not qos:
        return b""
    at = 2 + int.from_bytes(body[:2])
    return bytes((PUBACK if qos == 1 else PUBREC, 2)) + body[at : at + 2]


def read_frames(data: bytes, take: Callable[[int, bytes], bytes]) -> tuple[bytes, bytes]:
    """Have `take` answer each whole packet; all answers, and the rest of `data`."""
    answers, start = [], 0
    while len(data) - start > 1:
        length, shift, body = 0, 0, start + 1
        while body < len(data) and data[body] & 0x80:
            length |= (data[body] & 0x7F) << shift
            shift, body = shift + 7, body + 1
        if shift > 21:
            raise VisitError(f"this is no packet: {data[start : start + 10].hex()}")
        if body >= len(data):
            break
        length |= data[body] << shift
        body += 1
        if body + length > len(data):
            break
        answers.append(take(data[start], data[body : body + length]))
        start = body + length
    return b"".join(answers), data[start:]
