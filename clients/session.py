"""The device's side of its session: bytes and *now* in, actions out; no I/O, no clock, no random numbers.

Theory. A session lives through many connections:

    RESTING -tick-> OPENING -opened-> GREETING -CONNACK-> ONLINE     the last three end in RESTING, or,
    REFUSED -retry-> RESTING                close -> OVER            if the server wants us not, REFUSED

Two streams go through it.

- *Pushes*, inwards. They are handed out one at a time, in the order in which they came: `Offer`, then
  `handled` (the id is durable: PUBACK leaves) or `failed` (nothing leaves, the next connection brings the
  push again). `seen` holds the newest ids that were handled; a push with one of them is acknowledged at its
  turn and not offered. What a connection brought and is not offered yet is forgotten with it: the server
  brings it again.
- *Reports*, outwards (receipts, events, changes of alias and tags). They stay in the outbox, under one packet
  id, until the server answers, and go out again on each connection.

What must always hold: at most one push is offered and not finished; an id is in `seen` before its PUBACK
leaves; PUBACKs leave in the order of the pushes (MQTT5-4.6.0-2); at most `receive_maximum` pushes of a
connection, and `MAX_OUTBOX` reports, are held (G6).
"""

from __future__ import annotations

import contextlib
import enum
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import orjson

from clients.heartbeat import Bounds, Heartbeat, Rhythm
from gateway.mqtt import (
    Connack,
    Connect,
    Disconnect,
    MQTTError,
    Packet,
    Pingreq,
    Pingresp,
    Properties,
    ProtocolError,
    Puback,
    Publish,
    Reason,
    decode,
    encode,
)

PUSH_TOPIC: Final = "push"
VERSION: Final = 5
SEEN_KEPT: Final = 4096  # handled msg_ids; the server can repeat its window and what a crash made it forget
MAX_PUSH: Final = 1 << 20  # bytes of a push that came compressed: a few could blow up to gigabytes
ZLIB: Final = b"\x78"  # the first byte of a zlib stream of this server (RFC 1950 2.2: deflate, 32 KB window)
MAX_OUTBOX: Final = 1000  # reports that wait for an answer; past it, publishing is refused
MAX_WAIT: Final = 3600.0  # seconds that a server may ask us to stay away
HEARTBEAT_OVERDUE: Final = "heartbeat overdue"  # as Offline says it: the connection died without a word
EAGER: Final = 60.0  # seconds after a death without a word in which an attempt to connect has …
EAGER_TIMEOUT: Final = (
    10.0  # … no more: a SYN that is lost is sent again ever later, a new attempt sends one at once
)
SOON: Final = 30.0  # seconds from a death to CONNACK: the network was there, so the connection was forgotten
MAX_TAKEOVERS: Final = 5  # in a row: another process uses the registration id, and would fight for ever
HEARTBEAT: Final = Bounds()
PINGREQ: Final = encode(Pingreq(), VERSION)

# What another attempt with the same credentials will not change. All else is tried again.
FINAL: Final = frozenset(
    {
        Reason.UNSUPPORTED_PROTOCOL_VERSION,
        Reason.CLIENT_IDENTIFIER_NOT_VALID,
        Reason.BAD_USER_NAME_OR_PASSWORD,
        Reason.NOT_AUTHORIZED,
        Reason.BANNED,
        Reason.BAD_AUTHENTICATION_METHOD,
    }
)
MOVED: Final = frozenset({Reason.USE_ANOTHER_SERVER, Reason.SERVER_MOVED})


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Times are seconds, sizes bytes."""

    keep_alive: int | None = None  # a fixed heartbeat, 0: none; the server's wish goes first. None: learned
    heartbeat: Bounds = HEARTBEAT  # for learning, until the server says its own
    answer_timeout: float = 10.0  # nothing heard for so long after a question: dead. A heartbeat's is learned
    connect_timeout: float = 30.0  # from the first attempt to CONNACK, registration included
    session_expiry: int = 86_400
    receive_maximum: int = 32  # pushes the server may send ahead
    max_packet_size: int = 262_144
    compression: bool = True  # ask for pushes in zlib streams where that is shorter
    backoff_base: float = 1.0
    backoff_cap: float = 60.0
    stable_after: float = 30.0  # a connection that lived so long was good: the backoff begins anew


@dataclass(frozen=True, slots=True)
class Push:
    """What a publisher sent, as this device gets it. With `override` it takes the place of that push where it still
    shows; with `recall` it is nothing but the wish that that push be removed."""

    msg_id: int
    notification: Any = None
    message: Any = None
    override: int | None = None  # msg_id
    recall: int | None = None  # msg_id


@dataclass(frozen=True, slots=True)
class Send:
    data: bytes


@dataclass(frozen=True, slots=True)
class Open:
    """Open a connection, then call `opened` or `lost`. `address`: where the server sent us; None: as
    usual."""

    address: str | None


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the connection, or stop opening it. Nothing more of it may be reported."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Hand this to the app, then call `handled` or `failed`."""

    push: Push


@dataclass(frozen=True, slots=True)
class Discarded:
    """Something on `push` that is no push: acknowledged, or it would come for ever."""

    text: str


@dataclass(frozen=True, slots=True)
class Answered:
    """The server's verdict on a report."""

    ticket: int
    reason: Reason
    text: str = ""
    code: int | None = None  # of the public API, where there is one

    @property
    def refused(self) -> bool:
        return self.reason >= Reason.UNSPECIFIED_ERROR


@dataclass(frozen=True, slots=True)
class Online:
    resumed: bool  # the server still had the session


@dataclass(frozen=True, slots=True)
class Offline:
    """The connection ended, or none came about; the next attempt is `retry_in` seconds away."""

    why: str
    retry_in: float


@dataclass(frozen=True, slots=True)
class Refused:
    """The server does not want this device. Nothing more happens unless `retry` is called."""

    reason: Reason
    text: str


Action = Send | Open | Drop | Offer | Discarded | Answered | Online | Offline | Refused


class Phase(enum.IntEnum):
    RESTING = 0
    OPENING = 1
    GREETING = 2
    ONLINE = 3
    REFUSED = 4
    OVER = 5


class OutboxFull(Exception):
    """MAX_OUTBOX reports wait for an answer already."""


class _Report:
    __slots__ = ("flying", "payload", "sent", "topic")

    def __init__(self, topic: str, payload: bytes) -> None:
        self.topic = topic
        self.payload = payload
        self.sent = False  # in this session: the next time it is a repetition
        self.flying = False  # on this connection, and not answered


class DeviceSession:
    """`client_id` and `password` may change while it is not connected. `foreground`: somebody looks at the app, so no
    heartbeat may be a gamble. `dozing`: the phone sleeps, so it is not woken for a question that is not due.
    `alternatives`: other addresses are known. `jitter` gives numbers in [0, 1)."""

    __slots__ = (
        "_address",
        "_answer_by",
        "_asked_at",
        "_asked_early",
        "_attempt",
        "_busy",
        "_busy_packet",
        "_give_up_at",
        "_heartbeat",
        "_in_flight",
        "_interval",
        "_jitter",
        "_keep_alive",
        "_last_sent",
        "_max_packet",
        "_next_id",
        "_not_before",
        "_online_since",
        "_outbox",
        "_partial",
        "_quiet",
        "_quiet_since",
        "_retry_at",
        "_rhythm",
        "_seen",
        "_suspect",
        "_takeovers",
        "_unacked",
        "_unsent",
        "_waiting",
        "_window",
        "alternatives",
        "carrier",
        "client_id",
        "dozing",
        "foreground",
        "link",
        "password",
        "phase",
        "repeats",
        "settings",
        "username",
    )

    def __init__(
        self,
        client_id: str,
        username: str,
        password: bytes,
        jitter: Callable[[], float],
        *,
        settings: LinkSettings = LinkSettings(),
    ) -> None:
        self.client_id = client_id
        self.username = username
        self.password = password
        self.settings = settings
        self.phase = Phase.RESTING
        self.repeats = 0  # pushes that came again and were not offered again
        self.foreground = self.dozing = self.alternatives = False
        self.link = self.carrier = ""  # as the server is told them
        self._jitter = jitter
        self._seen: dict[int, None] = {}  # oldest first
        # The connection, or the next one
        self._address: str | None = None
        self._attempt = 0
        self._takeovers = 0
        self._retry_at = 0.0
        self._not_before = 0.0  # the server's wish for the next attempt
        self._give_up_at = 0.0
        self._online_since = 0.0
        self._keep_alive = 0
        self._last_sent = 0.0
        self._answer_by: float | None = None  # if nothing is heard until then, nobody is there
        self._partial: bytearray | None = None  # the beginning of a packet whose end has not come
        # Its silences
        self._heartbeat = Heartbeat(settings.heartbeat)  # of the network it is on
        self._interval = 0.0  # of silence until a heartbeat; 0: none
        self._quiet_since = 0.0
        self._quiet = 0.0  # how long it was silent before the question that is open
        self._asked_at: float | None = None  # CONNECT or PINGREQ, whose answer is timed
        self._asked_early = False  # that question
        self._suspect: tuple[float, float, bool] | None = (
            None  # the silence that the last one may have died of, when, and whether it was asked early
        )
        self._rhythm = Rhythm()
        # Pushes
        self._busy: Push | None = None  # offered
        self._busy_packet = 0  # its packet id; 0: of a connection that is gone
        self._waiting: deque[tuple[Push | str, int]] | None = None  # a str says why it is no push
        self._unacked = 0  # QoS 1 pushes of this connection without PUBACK
        # Reports
        self._outbox: dict[int, _Report] | None = None  # packet id -> report, in order
        self._unsent: deque[int] | None = None  # those that this connection has not sent yet
        self._in_flight = 0
        self._next_id = 1
        self._window = 0  # reports the server takes ahead
        self._max_packet = 0  # bytes the server accepts, 0: any

    # Connections

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to do; None: not on its own."""
        match self.phase:
            case Phase.RESTING:
                return self._retry_at
            case Phase.OPENING | Phase.GREETING:
                return self._give_up_at
            case Phase.ONLINE:
                ping_at = self._ping_at()
                if self._answer_by is None or ping_at is None:
                    return ping_at if self._answer_by is None else self._answer_by
                return min(self._answer_by, ping_at)
            case _:
                return None

    def tick(self, now: float) -> list[Action]:
        """What time brings: the next attempt, a heartbeat, the end of patience."""
        match self.phase:
            case Phase.RESTING if now >= self._retry_at:
                self.phase = Phase.OPENING
                self._give_up_at = now + self._patience(now)
                return [Open(self._address)]
            case Phase.OPENING | Phase.GREETING if now >= self._give_up_at:
                return self._end("no answer from the server", now)
            case Phase.ONLINE if self._answer_by is not None and now >= self._answer_by:
                return self._end(HEARTBEAT_OVERDUE, now)
            case Phase.ONLINE if (ping_at := self._ping_at()) is not None and now >= ping_at:
                return [self._ping(now)]
            case _:
                return []

    def _patience(self, now: float) -> float:
        """Until the server has answered an attempt to connect."""
        eager = self._suspect is not None and now < self._suspect[1] + EAGER
        return min(self.settings.connect_timeout, EAGER_TIMEOUT if eager else math.inf)

    def _ping_at(self) -> float | None:
        """Before a NAT forgets us, which sees traffic of either side; and before the server does, who counts ours."""
        if not self._interval:
            return None
        due = min(self._quiet_since + self._interval, self._early_at())
        return min(due, self._last_sent + self._keep_alive) if self._keep_alive else due

    def _early_at(self) -> float:
        """Pushes are missing by then, if they come as often as before."""
        if self.dozing or self.settings.keep_alive is not None:
            return math.inf
        since = self._quiet_since
        return since + self._rhythm.patience(since, alternatives=self.alternatives)

    def _ping(self, now: float) -> Send:
        early = self._early_at() <= now < self._quiet_since + self._interval
        self._expect_answer(now, self._heartbeat.answers.limit(self.settings.answer_timeout), early=early)
        self._asked_at = now
        self._rhythm.asked()
        return self._send(PINGREQ, now)

    def check(self, now: float) -> list[Action]:
        """A heartbeat out of turn: is anybody there? For when the app is opened, or the system wakes up."""
        return [self._ping(now)] if self.phase is Phase.ONLINE and self._answer_by is None else []

    def opened(self, now: float) -> list[Action]:
        """The connection that `Open` asked for is there."""
        assert self.phase is Phase.OPENING
        self.phase = Phase.GREETING
        properties: Properties = {
            "session_expiry_interval": self.settings.session_expiry,
            "receive_maximum": self.settings.receive_maximum,
            "maximum_packet_size": self.settings.max_packet_size,
        }
        if told := self._introduction():
            properties["user_properties"] = told
        self._keep_alive = self._wanted_keep_alive()
        self._asked_at = now
        connect = Connect(
            client_id=self.client_id,
            clean_start=False,
            keep_alive=self._keep_alive,
            username=self.username,
            password=self.password,
            properties=properties,
        )
        return [self._send(encode(connect, VERSION), now)]

    def _introduction(self) -> tuple[tuple[str, str], ...]:
        told = [("compression", "deflate")] if self.settings.compression else []
        told += [(name, value) for name, value in (("carrier", self.carrier), ("link", self.link)) if value]
        return tuple(told)

    def _wanted_keep_alive(self) -> int:
        fixed = self.settings.keep_alive
        return math.ceil(self._heartbeat.bounds.most) if fixed is None else fixed

    def enter_network(self, kept: object, now: float, *, link: str = "", carrier: str = "") -> list[Action]:
        """The device is on another network, so its connection is gone: it belonged to another address. `kept`: what
        `heartbeat_state` said there; None, or what cannot be read: a new network. `link` (wifi, cellular, …) and
        `carrier` (MCC+MNC, or a name) are told to the server."""
        connected = self.phase in (Phase.OPENING, Phase.GREETING, Phase.ONLINE)
        self.lost("the network changed", now)
        self.hurry(now)
        self._suspect = None
        self._rhythm.moved()
        self._heartbeat = Heartbeat.restored(kept, self.settings.heartbeat, now)
        self.link, self.carrier = link, carrier
        return [Drop(), Offline("the network changed", self._retry_at - now)] if connected else []

    def heartbeat_state(self, now: float) -> dict[str, float]:
        """What was learned of this network: small, for JSON."""
        return self._heartbeat.saved(now)

    def lost(self, why: str, now: float) -> list[Action]:
        """The connection is gone, or could not be opened."""
        if self.phase in (Phase.OPENING, Phase.GREETING, Phase.ONLINE):
            return self._end(why, now)
        return []

    def retry(self, why: str, now: float) -> list[Action]:
        """After `Refused`: there may be other credentials now."""
        assert self.phase is Phase.REFUSED
        return [self._rest(why, now)]

    def hurry(self, now: float) -> None:
        """What kept it offline may be over (another network, the app was opened): the next attempt is due, and the
        backoff begins anew. A server that told when it wants us back is obeyed."""
        if self.phase is Phase.RESTING:
            self._attempt = 0
            self._retry_at = min(self._retry_at, max(now, self._not_before))

    def close(self, now: float) -> list[Action]:
        """Say goodbye. The server keeps the session, and what is owed, for the next time."""
        online = self.phase is Phase.ONLINE
        self._forget_connection()
        self.phase = Phase.OVER
        return [self._send(encode(Disconnect(), VERSION), now), Drop()] if online else [Drop()]

    def _end(self, why: str, now: float, told: float | None = None) -> list[Action]:
        return [Drop(), self._rest(why, now, told)]

    def _rest(self, why: str, now: float, told: float | None = None) -> Offline:
        """`told`: seconds until the next attempt, if the server said so."""
        if self.phase is Phase.ONLINE and now >= self._online_since + self.settings.stable_after:
            self._attempt = 0
        self._address = None  # where we were sent to was for one connection
        if self.phase is Phase.ONLINE and now > self._online_since + 2 * self.settings.backoff_cap:
            self._takeovers = 0  # rivals come back within one cap
        if (
            self._answer_by is not None and self.phase is Phase.ONLINE
        ):  # overdue, or a question was answered by a reset
            self._suspect = (self._quiet, now, self._asked_early)
        self._forget_connection()
        self.phase = Phase.RESTING
        backoff = self._backoff()
        delay = backoff if told is None else max(told, min(backoff, self.settings.backoff_base))
        self._retry_at = now + delay
        self._not_before = now if told is None else self._retry_at
        return Offline(why, delay)

    def _backoff(self) -> float:
        """Full jitter: uniform in [0, min(cap, base * 2^attempt)) (Brooker, "Exponential Backoff And Jitter",
        AWS 2015). After an outage the devices of a node come back spread out."""
        most = min(self.settings.backoff_cap, self.settings.backoff_base * 2.0 ** min(self._attempt, 62))
        self._attempt += 1
        return self._jitter() * most

    def _forget_connection(self) -> None:
        self._partial = None
        self._answer_by = self._asked_at = None
        self._asked_early = False
        self._busy_packet = 0
        self._waiting = None
        self._unacked = 0
        self._in_flight = 0
        self._unsent = None

    # Receiving

    def receive(self, data: bytes, now: float) -> list[Action]:
        if self.phase not in (Phase.GREETING, Phase.ONLINE):
            return []
        self._hear(now)
        if self._partial is None:
            return self._take_all(data, now)
        self._partial += data
        return self._take_all(self._partial, now)

    def _hear(self, now: float) -> None:
        """Somebody is there. How long it was silent before, the network allows."""
        silence = now - self._quiet_since if self._answer_by is None else self._quiet
        self._quiet_since, self._quiet = now, 0.0
        self._answer_by = now + self.settings.answer_timeout if self._in_flight else None
        if self.phase is Phase.ONLINE:
            self._heartbeat.survived(silence, now)
            self._plan_heartbeat(now)

    def _take_all(self, data: bytes | bytearray, now: float) -> list[Action]:
        actions: list[Action] = []
        start = 0
        try:
            while (found := decode(data, start, VERSION, self.settings.max_packet_size)) is not None:
                packet, start = found
                actions += self._take(packet, now)
                if self.phase is not Phase.ONLINE:
                    return actions
        except MQTTError as error:
            return [*actions, *self._complain(error, now)]
        if self._waiting:
            actions += self._next(now)
        self._keep(data, start)
        return actions

    def _keep(self, data: bytes | bytearray, start: int) -> None:
        if start >= len(data):
            self._partial = None
        elif data is not self._partial:
            self._partial = bytearray(data[start:])
        elif start:
            del self._partial[:start]

    def _complain(self, error: MQTTError, now: float) -> list[Action]:
        """The server broke a rule: say so and try again later."""
        why = f"the server broke a rule: {error}"
        if self.phase is not Phase.ONLINE:  # MQTT5-3.14: DISCONNECT belongs after CONNACK
            return self._end(why, now)
        unsupported = error.reason is Reason.UNSUPPORTED_PROTOCOL_VERSION  # which DISCONNECT may not say
        reason = Reason.PROTOCOL_ERROR if unsupported else error.reason
        return [Send(encode(Disconnect(reason), VERSION)), *self._end(why, now)]

    def _take(self, packet: Packet, now: float) -> list[Action]:
        if self.phase is Phase.GREETING:
            if not isinstance(packet, Connack):
                raise ProtocolError(f"{type(packet).__name__} before CONNACK")
            return self._take_connack(packet, now)
        match packet:
            case Publish():
                self._rhythm.spoke(now)
                self._take_publish(packet)
                return []
            case Puback():
                return self._take_puback(packet, now)
            case Pingresp():
                self._time_answer(now)
                return []
            case Disconnect():
                return self._turned_away(packet.reason, packet.properties, now)
            case _:
                raise ProtocolError(f"{type(packet).__name__} is not for a server to send")

    def _take_connack(self, packet: Connack, now: float) -> list[Action]:
        properties = packet.properties
        if packet.reason >= Reason.UNSPECIFIED_ERROR:
            return self._turned_away(packet.reason, properties, now)
        self.phase = Phase.ONLINE
        self._online_since = now
        self._agree_heartbeat(properties, now)
        self._window = properties.get("receive_maximum", 65_535)
        self._max_packet = properties.get("maximum_packet_size", 0)
        return [Online(packet.session_present), *self._resend(packet.session_present, now)]

    def _agree_heartbeat(self, properties: Properties, now: float) -> None:
        self._keep_alive = properties.get("server_keep_alive", self._keep_alive)  # MQTT5-3.1.2-21
        self.take_advice(dict(properties.get("user_properties", ())).get("heartbeat", ""))
        self._time_answer(now)
        suspect, self._suspect = self._suspect, None
        died = suspect is not None and now <= suspect[1] + SOON
        if suspect is not None and died:
            self._heartbeat.died(suspect[0], now, early=suspect[2])
        self._rhythm.connected(now, died=died)
        self._quiet_since = now
        self._plan_heartbeat(now)

    def take_advice(self, told: str) -> None:
        """What is not understood was not said."""
        with contextlib.suppress(ValueError):
            self._heartbeat.bounds = Bounds.read(told)

    def _plan_heartbeat(self, now: float) -> None:
        if self.settings.keep_alive is None:
            self._interval = self._heartbeat.interval(now, probe=not self.foreground)
        else:
            self._interval = self._keep_alive

    def _turned_away(self, reason: Reason, properties: Properties, now: float) -> list[Action]:
        """CONNACK with a failure, or DISCONNECT."""
        text = properties.get("reason_string", "") or reason.name.lower().replace("_", " ")
        if reason in FINAL:
            self._forget_connection()
            self.phase = Phase.REFUSED
            return [Drop(), Refused(reason, text)]
        if reason is Reason.SESSION_TAKEN_OVER:
            return self._taken_over(reason, text, now)
        ended = self._end(text, now, self._told_wait(properties))
        if reason in MOVED:
            self._address = properties.get("server_reference")
        return ended

    def _told_wait(self, properties: Properties) -> float | None:
        """When the server wants us back: `retry_after` and a random part of `retry_jitter`, in seconds. What is not
        understood was not said."""
        told = dict(properties.get("user_properties", ()))
        if not told.keys() & {"retry_after", "retry_jitter"}:
            return None
        try:
            after, jitter = (float(told.get(name, 0)) for name in ("retry_after", "retry_jitter"))
        except ValueError:
            return None
        wait = after + self._jitter() * jitter
        return wait if after >= 0 and jitter >= 0 and wait <= MAX_WAIT else None

    def _taken_over(self, reason: Reason, text: str, now: float) -> list[Action]:
        """Once is no proof of a rival: a CONNECT of ours that the network held back takes over too."""
        ended = self._end(text, now)
        self._takeovers += 1
        if self._takeovers < MAX_TAKEOVERS:
            return ended
        self._takeovers = 0
        self.phase = Phase.REFUSED
        return [Drop(), Refused(reason, f"{text}; another process uses this registration id")]

    # Pushes

    def handled(self, now: float) -> list[Action]:
        """The app has the push that was offered, and its id is durable."""
        assert self._busy is not None
        self._remember(self._busy.msg_id)
        return self._finish(now, acknowledge=True)

    def failed(self, now: float) -> list[Action]:
        """The app did not take the push that was offered: the next connection brings it again."""
        return self._finish(now, acknowledge=False)

    def _finish(self, now: float, *, acknowledge: bool) -> list[Action]:
        packet_id = self._busy_packet
        self._busy, self._busy_packet = None, 0
        actions: list[Action] = [self._acknowledge([packet_id], now)] if acknowledge and packet_id else []
        return actions + self._next(now)

    def remember_all(self, msg_ids: Iterable[int]) -> None:
        """Pushes that were handled before this process started, oldest first."""
        for msg_id in msg_ids:
            self._remember(msg_id)

    def _remember(self, msg_id: int) -> None:
        self._seen[msg_id] = None
        if len(self._seen) > SEEN_KEPT:
            del self._seen[next(iter(self._seen))]

    def _take_publish(self, packet: Publish) -> None:
        if packet.qos == 2:
            raise ProtocolError("a message with QoS 2, which was not asked for")
        if "topic_alias" in packet.properties:
            raise ProtocolError("a topic alias, which was not allowed")  # MQTT5-3.1.2-27
        if packet.qos:
            self._unacked += 1
            if self._unacked > self.settings.receive_maximum:  # MQTT5-3.3.4-9
                raise ProtocolError("more pushes than asked for", Reason.RECEIVE_MAXIMUM_EXCEEDED)
        if self._waiting is None:
            self._waiting = deque()
        self._waiting.append((_read_push(packet), packet.packet_id))

    def _next(self, now: float) -> list[Action]:
        """Acknowledge what needs no handing over, up to the next push to offer."""
        actions: list[Action] = []
        packet_ids = []
        while self._waiting and self._busy is None:
            push, packet_id = self._waiting.popleft()
            if isinstance(push, Push) and push.msg_id not in self._seen:
                self._busy, self._busy_packet = push, packet_id
                actions.append(Offer(push))
                break
            if isinstance(push, str):
                actions.append(Discarded(push))
            else:
                self.repeats += 1
            if packet_id:
                packet_ids.append(packet_id)
        return [self._acknowledge(packet_ids, now), *actions] if packet_ids else actions

    def _acknowledge(self, packet_ids: Iterable[int], now: float) -> Send:
        frames = [encode(Puback(packet_id), VERSION) for packet_id in packet_ids]
        self._unacked -= len(frames)
        return self._send(b"".join(frames), now)

    # Reports

    def publish(self, topic: str, payload: bytes, now: float) -> tuple[int, list[Action]]:
        """Report something. Returns the ticket that `Answered` will carry, on this connection or a later one.
        Raises OutboxFull."""
        if self._outbox is None:
            self._outbox = {}
        if len(self._outbox) >= MAX_OUTBOX:
            raise OutboxFull(f"{MAX_OUTBOX} reports wait for the server's answer")
        ticket = self._free_id(self._outbox)
        self._outbox[ticket] = _Report(topic, payload)
        if self.phase is not Phase.ONLINE:
            return ticket, []
        if self._unsent is None:
            self._unsent = deque()
        self._unsent.append(ticket)
        return ticket, self._flush(now)

    def _free_id(self, outbox: dict[int, _Report]) -> int:
        while self._next_id in outbox:
            self._next_id = self._next_id % 65_535 + 1
        packet_id = self._next_id
        self._next_id = packet_id % 65_535 + 1
        return packet_id

    def _resend(self, resumed: bool, now: float) -> list[Action]:
        if not self._outbox:
            return []
        for report in self._outbox.values():
            report.flying = False
            report.sent = report.sent and resumed  # a new session knows none of the packet ids
        self._unsent = deque(self._outbox)
        return self._flush(now)

    def _flush(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while self._unsent and self._in_flight < self._window:  # MQTT5-3.3.4-7
            actions.append(self._send_report(self._unsent.popleft(), now))
        return actions

    def _send_report(self, ticket: int, now: float) -> Action:
        assert self._outbox is not None
        report = self._outbox[ticket]
        packet = Publish(report.topic, report.payload, qos=1, dup=report.sent, packet_id=ticket)
        frame = encode(packet, VERSION)
        if self._max_packet and len(frame) > self._max_packet:  # MQTT5-3.2.2-15
            del self._outbox[ticket]
            text = f"{len(frame)} bytes; the server accepts {self._max_packet}"
            return Answered(ticket, Reason.PACKET_TOO_LARGE, text)
        report.sent = report.flying = True
        self._in_flight += 1
        self._expect_answer(now, self.settings.answer_timeout)
        return self._send(frame, now)

    def _take_puback(self, packet: Puback, now: float) -> list[Action]:
        report = self._outbox.get(packet.packet_id) if self._outbox else None
        if self._outbox is None or report is None or not report.flying:
            return []
        del self._outbox[packet.packet_id]
        self._in_flight -= 1
        if not self._in_flight:
            self._answer_by = None
        properties = packet.properties
        code = dict(properties.get("user_properties", ())).get("code", "")
        answered = Answered(
            packet.packet_id,
            packet.reason,
            properties.get("reason_string", ""),
            int(code) if code.isdecimal() else None,
        )
        return [answered, *self._flush(now)]

    # Sending

    def _send(self, data: bytes, now: float) -> Send:
        self._last_sent = self._quiet_since = now
        return Send(data)

    def _expect_answer(self, now: float, limit: float, *, early: bool = False) -> None:
        """Before what asks is sent."""
        if self._answer_by is None:
            self._answer_by = now + limit
            self._quiet = now - self._quiet_since
            self._asked_early = early

    def _time_answer(self, now: float) -> None:
        if self._asked_at is not None:
            self._heartbeat.answers.sample(now - self._asked_at)
            self._asked_at = None


def _read_push(packet: Publish) -> Push | str:
    if packet.topic != PUSH_TOPIC:
        return "a message on another topic than push"
    try:
        content = orjson.loads(_inflated(packet.payload))
        msg_id = int(content["msg_id"])
        override, recall = (int(i) if (i := content.get(key)) else None for key in ("override", "recall"))
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        return f"a push that cannot be read: {type(error).__name__}"
    if not 0 <= msg_id < 1 << 63:
        return "a push whose msg_id is out of range"
    return Push(msg_id, content.get("notification"), content.get("message"), override, recall)


def _inflated(payload: bytes) -> bytes:
    """JSON begins with a brace, a zlib stream never does. Cut at MAX_PUSH: what is longer is no JSON then."""
    if payload[:1] != ZLIB:
        return payload
    return zlib.decompressobj().decompress(payload, MAX_PUSH)
