"""The asyncio shell of one connection: bytes to packets, actions to bytes, and nothing else.

An idle connection costs this object and its session: no task, queue, stream or timer (architecture, decision 2).
"""

from __future__ import annotations

import asyncio
import enum
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

from broker.carriers.panels import panel_of
from broker.carriers.profile import CarrierProfile
from broker.store import StoreError
from gateway import sockets
from gateway.hub import Ending
from gateway.mqtt import (
    CONNACK_RETURN_CODES,
    Auth,
    Connack,
    Connect,
    Disconnect,
    MQTTError,
    PacketTooLarge,
    Properties,
    ProtocolError,
    Reason,
    UnsupportedVersion,
    decode,
    encode,
    puback_run,
)
from gateway.proxy_protocol import Endpoint
from gateway.session import (
    PINGREQ,
    PINGRESP,
    PUBACK_BYTES,
    PUBACK_SIZE,
    Acked,
    Authenticating,
    Closed,
    Published,
    Send,
    Session,
    Subscribed,
    Unsubscribed,
)

if TYPE_CHECKING:
    from broker.carriers.learning import Network
    from gateway.hub import Hub
    from gateway.mqtt import Will
    from gateway.node import Node

LINGER: Final = (
    2.0  # seconds in which a peer may read our last bytes; one that never does would keep its socket
)
LOOK: Final = (
    30.0  # seconds between looks at who is idle, at most: so late is a loss noticed, and a silence measured
)
OPENING_CHECK: Final = 1.0  # seconds between checks before CONNECT; the first check after it follows in time
JOINING_PATIENCE: Final = 6  # connect timeouts that an answer may take, whatever the store does
MAX_CONNECT_SIZE: Final = 65_536  # bytes of a CONNECT, will included: nobody has proved anything yet
TYPE: Final = 0xF0  # of a packet: the upper half of its first byte
PUBLISH: Final = 0x30
TURN: Final = 512  # packets of one peer taken in a row, about 2 ms: a flood holds up nobody else
MAX_UNREAD: Final = 1_048_576  # bytes not sent yet, above which nothing is read: a peer that never listens


NOT_IN_ORDER: Final = {
    "keep-alive timeout": Ending.WORDLESS,
    "taken over": Ending.WORDLESS,  # the device is back, and its connection before looked alive
    "ack timeout": Ending.OVERDUE,
}
FROM_NODES: Final = "node"  # the listener of connections that another node carried here


class Phase(enum.IntEnum):
    OPENING = 0  # no CONNECT yet
    JOINING = 1  # CONNECT is being decided; reading is paused
    PROVING = 2  # CONNECT came, and AUTH is awaited
    LIVE = 3
    CLOSED = 4
    CARRIED = 5  # its socket is a tunnel's now


class Connection(asyncio.Protocol):
    """Made by a listener for each accepted socket (or WebSocket)."""

    __slots__ = (
        "blocked",
        "busy",
        "client_id",
        "epoch",
        "generation",
        "hub",
        "keep_alive",
        "last_seen",
        "listener",
        "longest",
        "network",
        "node",
        "partial",
        "phase",
        "prefix",
        "profile",
        "quiet",
        "session",
        "session_expiry",
        "since",
        "transport",
        "voice",
        "will",
    )

    def __init__(self, node: Node, listener: str) -> None:
        self.node = node
        self.listener = listener  # tcp | tls | ws | FROM_NODES
        self.phase = Phase.OPENING
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)
        self.session: Session | None = None
        self.hub: Hub | None = None
        self.client_id = ""
        self.prefix = ""  # of the session's key: the role
        self.epoch = 0
        self.generation = 0  # of the device's token
        self.profile: CarrierProfile = node.carriers.catalog.default
        self.network: Network | None = None  # of a device, while it is live
        self.since = 0.0  # when that began
        self.quiet = self.longest = 0  # bins of its silences (gateway/witness.py)
        self.voice = 0  # in which panels they count (broker/carriers/panels.py): by address, then by app too
        self.partial: bytearray | None = None  # the beginning of a packet whose end has not come
        self.last_seen = 0.0
        self.keep_alive = 0.0  # seconds of silence until it counts as dead; 0 = never
        self.session_expiry = 0
        self.will: Will | None = None
        self.blocked = False
        self.busy = 0  # messages of the peer that wait for the store

    @property
    def key(self) -> str:
        """Of the session, within the app: devices and publishers with the same client id are different sessions."""
        return self.prefix + self.client_id

    # Where the peer is: of use at accept, and kept nowhere

    @property
    def peer(self) -> Endpoint:
        """Its address and port; ("", 0): unknown."""
        return endpoint_of(self.transport.get_extra_info("peername"))

    @property
    def came_to(self) -> Endpoint:
        """The address and port that it connected to."""
        return endpoint_of(self.transport.get_extra_info("sockname"))

    @property
    def proxy(self) -> str:
        """The address of the proxy that it connected to; "": there is none, or the proxy does not say."""
        return ""

    @property
    def direct(self) -> bool:
        """Not carried here by another node, which is the only one that knows where the peer is."""
        return self.listener != FROM_NODES

    # From the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        address = self.peer[0]
        self.profile = self._accepted_as(address)
        self.voice = panel_of(address)
        sockets.set_up(transport, self.profile.tcp)
        self.last_seen = self.node.clock.now
        self.node.arrivals.opened(self)

    def _accepted_as(self, address: str) -> CarrierProfile:
        """Of who comes through another node only that one knows the address."""
        catalog = self.node.carriers.catalog
        if not self.direct:
            return catalog.default
        port = self.came_to[1] if catalog.knows_ports else 0
        return catalog.at_accept(address, listener=self.listener, port=port, proxy=self.proxy)

    def data_received(self, data: bytes) -> None:
        if self.session is not None:  # before CONNECT the deadline does not move, whatever trickles in
            self.last_seen = self.node.clock.now
        elif self.phase is Phase.CLOSED:
            return  # it may still send while it reads why
        if self.partial is not None:
            self.partial += data
            self._take(self.partial)
        elif self.phase is Phase.LIVE and data[0] == PUBACK_BYTES:
            try:
                self._take_acks(data)
            except MQTTError as error:
                self.fail(error)
        elif data == PINGREQ and self._is_calm():
            self.transport.write(PINGRESP)  # all that most devices ever say: the shortest way
        else:
            self._take(data)

    def _is_calm(self) -> bool:
        """It takes what it is sent, and is owed nothing that a packet of its own would bring."""
        session = self.session
        return self.phase is Phase.LIVE and not self.blocked and session is not None and session.at_rest

    def _take_acks(self, data: bytes) -> None:
        """The hot path: a run of PUBACKs (architecture, decision 7), then whatever else there is."""
        session = cast("Session", self.session)
        note, devno, now = self.node.settler.note, session.devno, self.last_seen
        flight = session.flight
        if flight is not None and data == flight.acks:
            end = len(data)
            session.arrived(now)
            for sent in flight.pushes:
                note(sent, devno)
        elif len(data) == PUBACK_SIZE and data[1] == 2:
            end = PUBACK_SIZE
            push = session.acked(data[2] << 8 | data[3], now)
            if push is not None:
                note(push, devno)
        else:
            packet_ids, end = puback_run(data, 0)
            for packet_id in packet_ids:
                push = session.acked(packet_id, now)
                if push is not None:
                    note(push, devno)
        if session.behind or (session.mailbox is not None and session.mailbox.waiting):
            self.catch_up()
        if end < len(data):
            self._take(data[end:])

    def _take(self, data: bytes | bytearray) -> None:
        start = taken = 0
        try:
            while start < len(data) and self.phase is not Phase.CLOSED:
                if self._must_wait() or (data[start] & TYPE == PUBLISH and self.node.postman.pauses(self)):
                    self.transport.pause_reading()
                    break
                if taken == TURN:
                    self.transport.pause_reading()
                    asyncio.get_running_loop().call_soon(self.resume_reading)
                    break
                found = self._decode(data, start)
                if found is None:
                    break
                packet, start = found
                self._take_packet(packet)
                taken += 1
        except MQTTError as error:
            self.fail(error)
        self._keep(data, start)

    def _must_wait(self) -> bool:
        """Nothing more is taken from the peer until `resume_reading`."""
        if self.phase is Phase.JOINING or self.busy >= self.node.settings.receive_maximum:
            return True
        return self.blocked and self.transport.get_write_buffer_size() > MAX_UNREAD

    def _keep(self, data: bytes | bytearray, start: int) -> None:
        """What is left waits in `partial`, which grows in place: a packet that trickles in costs no copies."""
        if start >= len(data) or self.phase is Phase.CLOSED:
            self.partial = None
        elif data is not self.partial:
            self.partial = bytearray(data[start:] if start else data)
        elif start:
            del self.partial[:start]

    def _decode(self, data: bytes | bytearray, start: int) -> tuple[Any, int] | None:
        if self.session is None:
            return decode(data, start, 5 if self.phase is Phase.PROVING else 0, MAX_CONNECT_SIZE)
        return decode(data, start, self.session.encoding.version, self.node.settings.max_packet_size)

    def _take_packet(self, packet: Any) -> None:
        if self.phase is Phase.PROVING:
            self._take_proof(packet)
            return
        if self.session is None:
            assert isinstance(packet, Connect)
            self.phase = Phase.JOINING
            self.node.arrivals.join(self, packet)
            return
        if isinstance(packet, Connect):
            raise ProtocolError("a second CONNECT")  # MQTT5-3.1.0-2
        actions = self.session.receive(packet, self.last_seen)
        if self.session.mailbox is not None and self.session.mailbox.member is None:
            self.node.keeper.adopt(self)
        for action in actions:
            match action:
                case Send():
                    self.send(action.data)
                case Acked():
                    self.node.settler.note(action.push, self.session.devno)
                case Published():
                    self.node.intake.take(self, action.packet)
                case Subscribed():
                    self.node.exchange.subscribe(self, action.packet)
                case Unsubscribed():
                    self.node.exchange.unsubscribe(self, action.packet)
                case Authenticating():
                    self.node.arrivals.authenticate(self, action.packet)
                case Closed():
                    self._goodbye(action)
                    return
        self.send_held()
        self.catch_up()

    def _take_proof(self, packet: Any) -> None:
        """Between CONNECT and CONNACK of an enhanced authentication (MQTT5-3.1.2-30)."""
        match packet:
            case Auth():
                self.node.arrivals.authenticate(self, packet)
            case Disconnect():
                self.close("client disconnected")
            case _:
                raise ProtocolError(f"{type(packet).__name__.upper()} before CONNACK")

    def _goodbye(self, action: Closed) -> None:
        if action.session_expiry is not None:
            if action.session_expiry and not self.session_expiry:  # MQTT5-3.14.2.2.2
                raise ProtocolError("session expiry set at DISCONNECT after 0 at CONNECT")
            self.session_expiry = min(action.session_expiry, self.node.settings.session_expiry_max)
        if not action.with_will:
            self.will = None  # MQTT5-3.14.4-3
        self.close("client disconnected")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("connection lost", reset=exc is not None)

    def eof_received(self) -> bool:
        return False  # close: half-open connections are of no use

    def pause_writing(self) -> None:
        self.blocked = True
        self.node.blocked += self.phase is Phase.LIVE

    def resume_writing(self) -> None:
        self.blocked = False
        self.node.blocked -= self.phase is Phase.LIVE
        self.catch_up()
        self.resume_reading()

    # For the node

    def send(self, data: bytes) -> None:
        if data and self.phase is not Phase.CLOSED:
            self.transport.write(data)

    def send_held(self) -> None:
        """Packets of the session that rely on a change of it leave when the change is saved (decision 0008)."""
        session = self.session
        if session is not None and session.held is not None:
            frames, session.held = b"".join(session.held), None
            self.when_saved(lambda: self.send(frames))

    def when_saved(self, then: Callable[[], None]) -> None:
        """Call `then` once all changes of the session so far are saved; when they cannot be, the connection ends:
        what the peer was not told it will ask for again."""
        session = self.session

        def saved(error: StoreError | None) -> None:
            if self.session is not session or session is None:
                return
            if error is None:
                then()
            else:
                self.close("store unavailable", Reason.IMPLEMENTATION_SPECIFIC_ERROR, str(error))

        self.node.journal.when_saved(saved)

    def read_on(self) -> None:
        """CONNACK is out: take what the peer sent before it had that."""
        self.transport.resume_reading()
        if self.partial is not None:
            asyncio.get_running_loop().call_soon(self.resume_reading)

    def resume_reading(self) -> None:
        """CONNECT is decided, or the backlog of unanswered messages went down: take what has waited."""
        if self.phase is Phase.CLOSED or self._must_wait():
            return
        self.transport.resume_reading()
        if self.partial is not None:
            self._take(self.partial)

    def less_busy(self) -> None:
        """The store took a message of the peer; if reading stopped for that, go on."""
        self.busy -= 1
        if self.busy == self.node.settings.receive_maximum - 1:
            self.resume_reading()

    def catch_up(self) -> None:
        """Send what is owed and has room; ask for the inbox if it may hold more."""
        session, hub = self.session, self.hub
        if session is None or hub is None or self.blocked or self.phase is not Phase.LIVE:
            return
        clock = self.node.clock
        if session.devno >= 0:
            frames = hub.collect(session, clock)
            if frames:
                self.node.fanout.count(len(frames))
                self.transport.write(b"".join(frames))
            if hub.wants_fetch(session):
                self.node.fetcher.request(self)
        if session.mailbox is not None and session.mailbox.waiting:
            self.node.exchange.drain(self, session)

    def check(self, now: float) -> float | None:
        """On the timer wheel: when to look again, None if the connection is over."""
        if self.phase is Phase.CARRIED:
            return None
        if self.phase is Phase.CLOSED:
            if now < self.last_seen + LINGER:
                return self.last_seen + LINGER
            self.transport.abort()  # of no effect on a socket that is closed
            return None
        session = self.session
        if session is None:
            return self._check_opening(now)
        if self.network is not None:
            self.node.witness.looked(self, self.network, now)
        acks = self.profile.acks
        if session.unacked is None:
            next_check = now + min(acks.first, LOOK)
        else:
            next_check = session.waiting_since + session.ack_time.timeout(acks)
            if now >= next_check:
                # Dead or hopeless: the next connection resends (architecture, decision 6).
                self.close("ack timeout", Reason.UNSPECIFIED_ERROR)
                return None
        if not self.keep_alive:
            return next_check
        deadline = self.last_seen + self.keep_alive
        if now >= deadline:
            self.close("keep-alive timeout", Reason.KEEP_ALIVE_TIMEOUT)  # MQTT5-3.1.2-22
            return None
        return min(deadline, next_check)

    def _check_opening(self, now: float) -> float | None:
        timeout = self.node.settings.connect_timeout
        if now < self.last_seen + timeout * (JOINING_PATIENCE if self.phase is Phase.JOINING else 1):
            return now + OPENING_CHECK
        self.node.count_refusal("connect timeout")
        self.close("connect timeout")
        return None

    def refuse(
        self,
        version: int,
        reason: Reason,
        text: str,
        label: str,
        *,
        maximum_packet: int = 0,
        more: Properties | None = None,
    ) -> None:
        """CONNACK with a failure, then close. 3.1.1 has six codes; a reason without one closes at once. `more`: what
        an MQTT 5 peer is told beside the reason."""
        self.node.count_refusal(label)
        if self.phase is Phase.CLOSED:
            return
        if version == 5 or reason in CONNACK_RETURN_CODES:
            explain = functools.partial(Connack, False, reason)
            self.send(_explained(explain, text, version or 4, maximum_packet, more or {}))
        self.close(label)

    def fail(self, error: MQTTError) -> None:
        """The peer broke a rule: the one place where that is answered."""
        if self.session is None:
            label = "packet too large" if isinstance(error, PacketTooLarge) else "bad CONNECT"
            self.refuse(error.version or 0, error.reason, str(error), label)
        else:
            # DISCONNECT has no "unsupported version": that was in a second CONNECT.
            reason = Reason.PROTOCOL_ERROR if isinstance(error, UnsupportedVersion) else error.reason
            self.close(reason.name.lower().replace("_", " "), reason, str(error))

    def close(
        self, label: str, reason: Reason | None = None, text: str = "", *, more: Properties | None = None
    ) -> None:
        """End the connection; `reason` is told to an MQTT 5 peer in DISCONNECT, and `more` beside it."""
        if self.phase is Phase.CLOSED:
            return
        told = False
        if reason is not None and self.session is not None and self.session.encoding.version == 5:
            told = True
            most = self.session.manners.maximum_packet
            self.send(_explained(functools.partial(Disconnect, reason), text, 5, most, more or {}))
        if label in NOT_IN_ORDER:
            sockets.give_up(self.transport)
        if self.blocked:
            self.transport.abort()  # it does not read: a polite close would wait for ever
        elif told and self.transport.can_write_eof():
            # What a peer sends to a closed socket is answered with a reset, which may take DISCONNECT from it.
            self.transport.write_eof()
            self.transport.resume_reading()
            self.node.watch(self, LINGER)
        else:
            self.transport.close()
        self._end(label)

    def give_away(self) -> None:
        """The socket belongs to somebody else."""
        self.phase = Phase.CARRIED
        self.partial = None

    def _end(self, label: str, *, reset: bool = False) -> None:
        if self.phase is Phase.CLOSED:
            return
        was = self.phase
        self.phase = Phase.CLOSED
        self.partial = None
        ending = Ending.WORDLESS if reset else NOT_IN_ORDER.get(label, Ending.ORDERLY)
        self.node.closed(self, was, label, ending)
        self.last_seen = self.node.clock.now
        self.session = None
        self.hub = None
        self.will = None


def endpoint_of(name: object) -> Endpoint:
    """Of a socket's name, as `getpeername` gives it."""
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else ("", 0)


def _explained(
    packet: Callable[[Properties], Connack | Disconnect],
    text: str,
    version: int,
    maximum_packet: int,
    more: Properties,
) -> bytes:
    """With the reason in words and what else there is to say, if the peer takes a packet of that size
    (MQTT5-3.2.2-19, MQTT5-3.14.2-3)."""
    if version != 5:
        return encode(packet({}), version)
    told: Properties = {"reason_string": text, **more} if text else more
    frame = encode(packet(told), version)
    return frame if not maximum_packet or len(frame) <= maximum_packet else encode(packet({}), version)
