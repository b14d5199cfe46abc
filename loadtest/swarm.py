"""The devices of one process, for as long as it runs: connected, kept alive, and back again when they are dropped.

A device is a few bytes in arrays: its fd, its state, how often it tried. What it does next follows from those and
from two schedules that know no device by name: PINGREQs sweep over all numbers once in an interval, and whoever has
lost its connection stands in a heap until its pause is over. A dropped device waits a random time below a limit that
doubles (full jitter), as phones must, or the server that comes back meets all of them at once.
"""

from __future__ import annotations

import heapq
import random
import re
import resource
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, Final

from gateway.mqtt import Connack, Disconnect, MQTTError, Pingreq, Publish, Reason, Suback, decode, encode
from loadtest.fleet import READ_SIZE, SOURCES, take_pushes
from loadtest.histogram import Timeline
from loadtest.reactor import Reactor
from loadtest.roster import Connects
from loadtest.server import Address
from loadtest.tally import Tally
from loadtest.wires import Tls, is_hopeless, why_of, wires_of

AWAY, WAITING, OPENING, GREETING, ONLINE, REFUSED = range(6)
"""Not wanted online; its pause runs; SYN sent, perhaps a handshake; CONNECT sent; CONNACK came; told to stay away."""

CONNACK, PUBACK, SUBACK, PINGRESP, DISCONNECT = 0x20, 0x40, 0x90, 0xD0, 0xE0
OPENING_AT_ONCE: Final = 64  # between SYN and CONNACK, in one process
TICK: Final = 0.05  # seconds: PINGREQs are sent that often
LATE: Final = 1.0  # a schedule of connects that is further behind does not catch up, unless it is to be kept
PAUSE: Final = 1.0  # before the first try: up to this
PAUSE_MAX: Final = 16.0
PATIENCE: Final = 30.0  # from SYN to CONNACK
PACKET_MAX: Final = 65_536
REFUSAL: Final = 0x80  # reason codes from here on
RETRY_AFTER, RETRY_JITTER = "retry_after", "retry_jitter"  # user properties

FINAL: Final = frozenset(
    {
        Reason.MALFORMED_PACKET,
        Reason.PROTOCOL_ERROR,
        Reason.UNSUPPORTED_PROTOCOL_VERSION,
        Reason.CLIENT_IDENTIFIER_NOT_VALID,
        Reason.BAD_USER_NAME_OR_PASSWORD,
        Reason.NOT_AUTHORIZED,
        Reason.BANNED,
        Reason.BAD_AUTHENTICATION_METHOD,
    }
)
"""Reasons after which a device must not come back: each is an error of the test or the server. SESSION_TAKEN_OVER is
none: who gives a CONNECT up, and sends another, may meet the first again, which stood in line."""

_PINGREQ: Final = encode(Pingreq(), 4)
_DISCONNECT: Final = encode(Disconnect(), 4)
_MSG_ID: Final = re.compile(rb'\{"msg_id":"(\d+)"')
_EVENTS: Final = ("shown", "clicked", "dismissed")


@dataclass(slots=True)
class Counts:
    """What happened since the start."""

    connects: int = 0  # CONNACKs with success
    acked: int = 0
    pings: int = 0
    pongs: int = 0
    moves: int = 0  # to a Server Reference
    breaks: int = 0  # devices that went away for a while, because they were told to
    receipts: int = 0  # published
    receipts_answered: int = 0
    lost: Counter[str] = field(default_factory=Counter)  # why a device that was online is not any more
    failed: Counter[str] = field(default_factory=Counter)  # tries that came to nothing
    refused: Counter[str] = field(default_factory=Counter)  # devices that will not come back

    def as_dict(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}


class Swarm:
    """Devices `tally.first` and on, of `connects`."""

    def __init__(
        self,
        connects: Connects,
        tally: Tally,
        addresses: Sequence[Address],
        *,
        tls: Tls | None = None,
        number: int = 0,
        ping_interval: float = 180.0,
        pause: float = PAUSE,
        pause_max: float = PAUSE_MAX,
        sources: Sequence[str] | None = None,
        opening_at_once: int = OPENING_AT_ONCE,
        keeps_schedule: bool = False,
    ) -> None:
        """`sources`: addresses that connections come from, in turn; empty: the kernel chooses; None: 127.2.`number`.1
        to .SOURCES. `keeps_schedule`: connects that are late are made all the same, as soon as they can."""
        self._sources = [f"127.2.{number}.{1 + n}" for n in range(SOURCES)] if sources is None else sources
        self._opening_at_once = opening_at_once
        self._keeps_schedule = keeps_schedule
        self._head = 2 + connects.topic_size
        self._connects = connects
        self.tally = tally
        self._addresses = addresses
        self._wires = wires_of(tls, addresses)
        self._read, self._write = self._wires.read, self._wires.write
        self._ping_interval = ping_interval
        self._pause = pause
        self._pause_max = pause_max
        self.reactor = Reactor(self._ready)
        self.counts = Counts()
        self.online = 0
        self.wanted = 0  # devices that are to be online
        count = tally.count
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._place = array("i", [-1]) * files  # fd -> place, which is the device's number less the first's
        self._fd = array("i", [-1]) * count
        self._state = bytearray(count)
        self._tries = bytearray(count)  # since it was last online
        self._pinged = bytearray(count)  # 1: the PINGRESP has not come
        self._due = array("d", [0.0]) * count  # when it was to be online, or to begin to come back
        self.connect_times = Timeline(tally.latencies.width)  # from then until it was
        self.behind = 0.0  # seconds: how late a connect was begun, the latest since somebody set it to 0
        self._breaks = 0.0  # a second
        self._away = 0.0  # seconds that such a device stays away, on average
        self._next_break = 0.0
        self._receipts = 0.0  # for each push
        self._partial: dict[int, bytes] = {}  # place -> the beginning of a packet
        self._referred: dict[int, Address] = {}  # place -> where it was told to go
        self._retries: list[tuple[float, int]] = []  # when, place; a heap
        self._retries_at = 0.0  # when the one that was put in last is due
        self._deadlines: dict[int, float] = {}  # place of one between SYN and CONNACK; in the order of time
        self._todo: Iterator[int] = iter(())
        self._connecting = False  # `_todo` may have more
        self._rate = 0.0
        self._next_connect = 0.0
        self._next_tick = 0.0
        self._pinged_until = time.perf_counter() / ping_interval  # the sweep's position, in intervals
        self._random = random.Random(number)

    # Commands

    def connect(self, rate: float, begin: float = 0.0) -> None:
        """Bring all online that are not wanted so far, `rate` a second, from the time.perf_counter `begin` on; 0 is
        now."""
        self._rate = rate
        self._next_connect = begin or time.perf_counter()
        self.wanted += self._state.count(AWAY)
        self._todo = (place for place in range(self.tally.count) if self._state[place] == AWAY)
        self._connecting = True

    def take_breaks(self, rate: float, away: float) -> None:
        """So many devices a second, whichever they are, say DISCONNECT, and come back after `away` seconds or so."""
        self._breaks = rate
        self._away = away
        self._next_break = time.perf_counter()

    def send_receipts(self, share: float) -> None:
        """Of the pushes that come from now on."""
        self._receipts = share

    def leave(self) -> None:
        """All say DISCONNECT and stay away."""
        self._connecting = False
        self._breaks = 0.0
        self._retries.clear()
        self.wanted = 0
        for place, fd in enumerate(self._fd):
            if fd >= 0:
                self._farewell(place, fd)
            self._state[place] = AWAY

    def close(self) -> None:
        """Close everything without a word."""
        for place in range(self.tally.count):
            self._close(place)
        self.reactor.close()

    def turn(self) -> None:
        """Do what is due, then handle what is ready, for at most a tick."""
        now = time.perf_counter()
        if now >= self._next_tick:
            self._next_tick = now + TICK
            self._ping_due(now)
            self._give_up_due(now)
            self._send_away_due(now)
        due = self._begin_due(now)
        self.reactor.turn(max(0.0, min(due, self._next_tick) - now))

    # Connecting

    def _begin_due(self, now: float) -> float:
        """When the next is due."""
        at_once = self._opening_at_once
        while self._retries and self._retries[0][0] <= now and len(self._deadlines) < at_once:
            self._begin(heapq.heappop(self._retries)[1], now)
        if not self._keeps_schedule:
            self._next_connect = max(self._next_connect, now - LATE)
        while self._connecting and self._next_connect <= now and len(self._deadlines) < at_once:
            place = next(self._todo, None)
            if place is None:
                self._connecting = False
                break
            self._due[place] = self.tally.since[place] = self._next_connect
            self.behind = max(self.behind, now - self._next_connect)
            self._next_connect += 1 / self._rate
            self._begin(place, now)
        if len(self._deadlines) >= at_once:
            return now + TICK
        retry = self._retries[0][0] if self._retries else now + TICK
        return min(retry, self._next_connect) if self._connecting else retry

    def _begin(self, place: int, now: float) -> None:
        tries = self._tries[place]
        address = self._referred.pop(place, None) or self._addresses[(place + tries) % len(self._addresses)]
        try:
            source = self._sources[place % len(self._sources)] if self._sources else None
            fd = self._wires.open(address, source)
        except OSError as error:
            self._fail(place, why_of(error))
            return
        self._fd[place], self._place[fd] = fd, place
        self._state[place] = OPENING
        self._deadlines[place] = now + PATIENCE
        # Over loopback the handshake is mostly done by now.
        writable = self._greet(place, fd)
        if writable is not None:
            self.reactor.watch_plainly(fd, writable=writable)

    def _greet(self, place: int, fd: int) -> bool | None:
        """Send CONNECT. Whether that waits for the socket to take bytes; None: it came to nothing."""
        try:
            self._write(fd, self._connects.packet(self.tally.first + place))
        except BlockingIOError:
            return self._wires.waits_to_write(fd)
        except OSError as error:
            self._break(place, error)
            return None
        self._state[place] = GREETING
        return False

    def _give_up_due(self, now: float) -> None:
        late = []
        for place, deadline in self._deadlines.items():
            if deadline > now:
                break
            late.append(place)
        for place in late:
            self._drop(place, self._missing(place))

    def _missing(self, place: int) -> str:
        """What has not come in time."""
        if self._state[place] == GREETING:
            return "no CONNACK"
        return (
            "no connection" if self._wires.waits_to_write(self._fd[place]) else "no end of the TLS handshake"
        )

    def _break(self, place: int, error: OSError) -> None:
        """The connection is broken; the device comes back unless that would be for nothing."""
        if self._state[place] != ONLINE and is_hopeless(error):
            self._refuse(place, why_of(error))
        else:
            self._drop(place, why_of(error))

    def _drop(self, place: int, why: str, wait: float | None = None) -> None:
        """The connection is over; the device comes back after a pause, or after the `wait` it was told."""
        was_online = self._state[place] == ONLINE
        self._close(place)
        if was_online:
            self.counts.lost[why] += 1
            self._retry(place, wait)
            self._due[place] = self._retries_at
        else:
            self._fail(place, why, wait)

    def _fail(self, place: int, why: str, wait: float | None = None) -> None:
        self.counts.failed[why] += 1
        self._tries[place] = min(self._tries[place] + 1, 255)
        self._retry(place, wait)

    def _retry(self, place: int, wait: float | None) -> None:
        self._state[place] = WAITING
        if wait is None:
            pause = min(self._pause * 2 ** min(self._tries[place], 16), self._pause_max)
            wait = self._random.uniform(0, pause)
        self._retries_at = time.perf_counter() + wait
        heapq.heappush(self._retries, (self._retries_at, place))

    def _refuse(self, place: int, why: str) -> None:
        """For good."""
        self._close(place)
        self._state[place] = REFUSED
        self.counts.refused[why] += 1

    def _close(self, place: int) -> None:
        fd = self._fd[place]
        if fd < 0:
            return
        if self._state[place] == ONLINE:
            self.online -= 1
        self._fd[place] = self._place[fd] = -1
        self._pinged[place] = 0
        self._partial.pop(place, None)
        self._deadlines.pop(place, None)
        self._wires.close(fd)

    def _farewell(self, place: int, fd: int) -> None:
        with suppress(OSError):  # it is gone already
            self._write(fd, _DISCONNECT)
        self._close(place)

    # Churn

    def _send_away_due(self, now: float) -> None:
        """Whoever is not online anyway is none of those."""
        if not self._breaks:
            return
        while self._next_break <= now:
            self._next_break += 1 / self._breaks
            place = self._random.randrange(self.tally.count)
            if self._state[place] == ONLINE:
                self._farewell(place, self._fd[place])
                self.counts.breaks += 1
                self._retry(place, self._random.uniform(0.5, 1.5) * self._away)
                self._due[place] = self.tally.since[place] = self._retries_at

    # Keep-alive

    def _ping_due(self, now: float) -> None:
        """The sweep passes each device once in an interval, whoever is online."""
        until = now / self._ping_interval
        count = self.tally.count
        start, end = int(self._pinged_until * count), int(until * count)
        self._pinged_until = until
        for place in range(max(start, end - count), end):
            if self._state[place % count] == ONLINE:
                self._ping(place % count)

    def _ping(self, place: int) -> None:
        if self._pinged[place]:
            self._drop(place, "no PINGRESP")
            return
        self._pinged[place] = 1
        self.counts.pings += 1
        self._send(place, _PINGREQ)

    # What comes

    def _ready(self, fd: int) -> None:
        place = self._place[fd]
        if place < 0:
            return  # closed in this slice
        if self._state[place] == OPENING:
            writable = self._greet(place, fd)
            if writable is not None:
                self.reactor.rewatch_plainly(fd, writable=writable)
            return
        try:
            data = self._read(fd, READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._break(place, error)
            return
        if not data:
            self._drop(place, "closed")
            return
        if place in self._partial:
            data = self._partial.pop(place) + data
        self._take(place, fd, data)

    def _take(self, place: int, fd: int, data: bytes) -> None:
        acks, end = take_pushes(self.tally.first + place, data, self._head, self.tally.take, self._other)
        if self._fd[place] != fd:
            return  # one of the packets ended the connection
        if end < len(data):
            self._partial[place] = data[end:]
        if acks:
            self.counts.acked += len(acks)
            self._send(place, acks[0] if len(acks) == 1 else b"".join(acks))
            if self._receipts:
                self._send_receipts(place, data[:end])

    def _send_receipts(self, place: int, data: bytes) -> None:
        version = self._connects.version(self.tally.first + place)
        for packet_id, msg_id in enumerate(_MSG_ID.findall(data), 1):
            if self._random.random() < self._receipts and self._state[place] == ONLINE:
                receipt = f'{{"msg_id":"{msg_id.decode()}","event":"{self._random.choice(_EVENTS)}"}}'
                self.counts.receipts += 1
                self._send(
                    place, encode(Publish("receipt", receipt.encode(), 1, packet_id=packet_id), version)
                )

    def _send(self, place: int, data: bytes) -> None:
        try:
            sent = self._write(self._fd[place], data)
        except OSError:
            sent = 0
        if sent < len(data):
            self._drop(place, "cannot be written to")

    def _other(self, device: int, packet: bytes) -> None:
        place = device - self.tally.first
        kind = packet[0] & 0xF0
        if kind == PINGRESP:
            self._pinged[place] = 0
            self.counts.pongs += 1
        elif kind == CONNACK:
            self._welcomed(place, packet)
        elif kind == SUBACK and self._state[place] == GREETING:
            self._granted(place, packet)
        elif kind == PUBACK:
            self.counts.receipts_answered += 1
        elif kind == DISCONNECT:
            self._dismissed(place, packet)
        else:
            self._refuse(place, f"got a packet {packet[0]:#04x}")

    def _welcomed(self, place: int, packet: bytes) -> None:
        """CONNACK."""
        if packet[3] != Reason.SUCCESS:
            self._deadlines.pop(place, None)
            self._dismissed(place, packet)
        elif subscribe := self._connects.subscribe(self.tally.first + place):
            self._send(place, subscribe)
        else:
            self._arrived(place)

    def _granted(self, place: int, packet: bytes) -> None:
        """SUBACK."""
        answer = self._decode(place, packet)
        if isinstance(answer, Suback) and max(answer.reasons) < REFUSAL:
            self._arrived(place)
        else:
            self._refuse(place, f"was not granted its subscriptions: {answer}")

    def _arrived(self, place: int) -> None:
        self._deadlines.pop(place, None)
        self._state[place] = ONLINE
        self._tries[place] = 0
        self.online += 1
        self.counts.connects += 1
        self.connect_times.add(self._due[place], time.perf_counter())

    def _dismissed(self, place: int, packet: bytes) -> None:
        """DISCONNECT, or a CONNACK that is none."""
        answer = self._decode(place, packet)
        if not isinstance(answer, Connack | Disconnect):
            self._refuse(place, f"got a packet {packet[0]:#04x} that is malformed")
            return
        why = f"{type(answer).__name__.upper()} {answer.reason.name}"
        if answer.reason in FINAL:
            self._refuse(place, why)
            return
        self._drop(place, why, self._told_wait(answer))
        self._refer(place, answer)

    def _decode(self, place: int, packet: bytes) -> object:
        try:
            found = decode(packet, 0, self._connects.version(self.tally.first + place), PACKET_MAX)
        except MQTTError:
            return None
        return found[0] if found else None

    def _told_wait(self, answer: Connack | Disconnect) -> float | None:
        """When the server wants it back, if it says so: docs/protocol.md, Come later."""
        told = dict(answer.properties.get("user_properties", ()))
        if RETRY_AFTER not in told:
            return None
        return float(told[RETRY_AFTER]) + self._random.uniform(0, float(told.get(RETRY_JITTER, 0)))

    def _refer(self, place: int, answer: Connack | Disconnect) -> None:
        """Go where the answer says, if it does."""
        reference = answer.properties.get("server_reference")
        if reference:
            self.counts.moves += 1
            self._referred[place] = read_reference(reference)


def read_reference(reference: str) -> Address:
    """The first of a Server Reference's places (MQTT5-4.11), as host:port. Raises ValueError."""
    host, _, port = reference.split(maxsplit=1)[0].rpartition(":")
    return host.strip("[]"), int(port)
