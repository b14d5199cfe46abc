"""The MQTT bridge: messages of an organisation's own MQTT broker become pushes, by rule.

At least once, end to end: the foreign broker keeps our session and what comes for it while we are away; a message is
acknowledged when all its pushes are durable, and not before. While the store is away nothing is acknowledged, so the
broker's own window stops the flow. Acknowledgements go out in the order in which the messages came (MQTT5-4.6.0-2).

What the broker sends again (DUP), because an acknowledgement was lost with its connection, is known by packet id and
contents, and not pushed again. But a broker may give the id anew once it has the acknowledgement, to an equal message
of its own right; so only what was not acknowledged, or in the connection's last ACK_DOUBT, is taken for a repeat. An
acknowledgement that was lost earlier than that, and a crash of ours before it, make a second push, unless the message
carries a cid: by the rule's `cid`, or by a user property of that name.

aiomqtt acknowledges a message before it hands it out, and has no setting for that. So the paho client underneath is
told not to, and gives its messages to us: `_take_over` is the only place that knows.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import aiomqtt
from paho.mqtt.client import MQTT_CLEAN_START_FIRST_ONLY, MQTTMessage
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from broker.bridging.bridge_rules import Incoming, Rule, Unfit, read_rules
from broker.bridging.lead import LOOK_EVERY, Lead
from broker.config import Config
from broker.errors import ApiError
from broker.logs import log_event
from broker.metrics import Metrics
from broker.pushing.pushes import Pushes
from broker.store import Records, StoreError
from broker.tenants.apps import Apps

log: Final = logging.getLogger(__name__)

FIRST_PAUSE: Final = 0.5  # before connecting again, or trying the store again; doubled each time
MAX_PAUSE: Final = 30.0
MAX_PACKET: Final = 1 << 20  # a larger message is no push, and should not fill our memory (MQTT 5)
MOST_ARRIVED: Final = (
    10_000  # messages in memory: of a broker that sends without waiting for acknowledgements
)
ARRIVED_BYTES: Final = 64 << 20  # of their payloads
ACK_DOUBT: Final = 5.0  # an acknowledgement sent so shortly before the connection ended may not have arrived
REASON_SIZE: Final = 500  # characters of why a message was refused, logged and sent along
ENVELOPE: Final = 64  # of a dead letter besides payload, topics and reason, at most
UNBURIED: Final = (
    60.0  # after two connections within it ended by a dead letter, none is tried for so long: longer
)
# than MAX_PAUSE, so that what comes again after a reconnect is acknowledged
CLOSE_LIMIT: Final = 8.0  # for what is under way
CID: Final = "cid"  # the user property
GOODBYE: Final = "holdfast/goodbye"  # nobody subscribes to it

_Started: TypeAlias = "asyncio.Queue[tuple[MQTTMessage, asyncio.Task[bool]] | None]"


@dataclass(frozen=True, slots=True)
class BridgeSettings:
    host: str
    port: int
    client_id: str
    rules: Sequence[Rule]
    tls: bool = False
    ca_file: str | None = None  # None: the system's
    username: str | None = None
    password: str | None = None
    keep_alive: int = 30
    protocol: str = "5"  # or 3.1.1
    session_expiry: int = 7 * 86_400
    window: int = 32  # messages being pushed at once
    group: str | None = None  # of a shared subscription
    dead_topic: str | None = None  # where messages go that are no push


class Stats:
    """Counters for the metrics."""

    def __init__(self) -> None:
        self.connected = False
        self.received = 0
        self.pushed = 0
        self.repeated = 0  # sent again by the broker, and pushed before
        self.on_refused: Callable[[str], None] | None = None
        """Called with the reason, of few."""


def make_bridge(
    config: Config, apps: Apps, pushes: Pushes, metrics: Metrics, records: Records
) -> Bridge | None:
    """The bridge that the settings ask for. Raises RulesError.

    Of the processes that share a store one works, unless the foreign broker shares the messages out (`group`). They
    have one session there, which the next leader takes over with all that waits in it."""
    wanted = config.bridge
    if wanted.host is None or wanted.rules is None:
        return None
    leads = bool(config.store.url) and not wanted.group
    settings = BridgeSettings(
        host=wanted.host,
        port=wanted.port,
        client_id=wanted.client_id or ("holdfast-bridge" if leads else f"holdfast-{config.server.node_id}"),
        rules=read_rules(wanted.rules, config.limits()),
        tls=wanted.tls,
        ca_file=None if wanted.ca_file is None else str(wanted.ca_file),
        username=wanted.username,
        password=wanted.password,
        keep_alive=wanted.keep_alive,
        protocol=wanted.protocol,
        session_expiry=wanted.session_expiry,
        window=wanted.window,
        group=wanted.group,
        dead_topic=wanted.dead_topic,
    )
    lead = Lead(records, "bridge", config.server.node_id) if leads else None
    bridge = Bridge(settings, apps, pushes, lead=lead)
    BridgeMetrics(metrics, bridge.stats)
    return bridge


@dataclass(slots=True, eq=False)
class _Known:
    """The message that had a packet id last."""

    contents: bytes  # their hash
    rules: set[int] = field(default_factory=set)  # by which it was pushed
    acked_at: float = math.inf


@dataclass(slots=True, eq=False)
class _Connection:
    """One TCP life. What is left of it when it ends is waited for, so that the next one knows what was pushed."""

    client: aiomqtt.Client
    ack: Callable[[int, int], object]  # packet id, QoS
    end: Callable[[], object]
    arrived: asyncio.Queue[MQTTMessage | None] = field(default_factory=asyncio.Queue)  # None: the end
    waiting_bytes: int = 0  # of `arrived`
    max_packet: float = math.inf  # that the broker takes
    unburied: bool = False  # it took no dead letter
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # from now on nothing is begun


class Bridge:
    """`open` starts it, `close` ends it: what was not acknowledged by then comes again to whoever connects next."""

    def __init__(
        self,
        settings: BridgeSettings,
        apps: Apps,
        pushes: Pushes,
        first_pause: float = FIRST_PAUSE,
        *,
        lead: Lead | None = None,
    ) -> None:
        self.stats = Stats()
        self._settings = settings
        self._apps = apps
        self._pushes = pushes
        self._first_pause = first_pause
        self._lead = lead  # None: always
        self._pushed: dict[int, _Known] = {}  # by packet id (16 bits)
        self._lost_at = -math.inf  # when the last connection ended
        self._unburied_at = -math.inf  # when a dead letter ended a connection last
        self._bury_at = 0.0  # not before
        self._stop = asyncio.Event()
        self._subscribed = False  # messages may be under way: worth waiting for
        self._run: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._run = asyncio.get_running_loop().create_task(self._keep_on(), name="bridge")

    async def close(self) -> None:
        self._stop.set()
        if self._run is not None:
            await asyncio.wait([self._run], timeout=CLOSE_LIMIT if self._subscribed else 0)
            self._run.cancel()
            await asyncio.wait([self._run])
        if self._lead is not None:
            await self._lead.release()

    async def _keep_on(self) -> None:
        failures = 0
        while not self._stop.is_set():
            if self._lead is not None and not await self._lead.look():
                self._pushed.clear()  # meanwhile others get messages under these packet ids
                await _wait(self._stop, LOOK_EVERY)
                continue
            began = time.monotonic()
            try:
                await self._connect()
            except (aiomqtt.MqttError, OSError) as error:
                level = logging.DEBUG if failures else logging.WARNING
                log_event(log, level, "bridge not connected", host=self._settings.host, reason=str(error))
            except Exception:  # a broker that answers what nobody expects must not end the bridge
                log.exception("bridge")
            self._subscribed = False
            failures = 0 if time.monotonic() - began > MAX_PAUSE else failures + 1
            await _wait(self._stop, self._pause(failures))

    def _pause(self, failures: int) -> float:
        whole = min(MAX_PAUSE, self._first_pause * 2.0 ** min(failures, 20))
        return whole * (0.5 + random.random() / 2)

    # The connection

    async def _connect(self) -> None:
        """Work until the connection ends (raises MqttError) or we are to stop."""
        client = self._make_client()
        connection = self._take_over(client)
        async with client:
            await self._subscribe(client)
            log_event(log, logging.INFO, "bridge connected", host=self._settings.host)
            self.stats.connected = self._subscribed = True
            pushing = asyncio.create_task(self._push_all(connection))
            try:
                await self._until_end(client, pushing)
            finally:
                self.stats.connected = False
                self._lost_at = time.monotonic()
                connection.ended.set()
                connection.arrived.put_nowait(None)
                await asyncio.wait([pushing])
            await client.unsubscribe(GOODBYE)  # its answer says that the acknowledgements before it were read

    def _make_client(self) -> aiomqtt.Client:
        settings = self._settings
        modern = settings.protocol == "5"
        return aiomqtt.Client(
            settings.host,
            settings.port,
            username=settings.username,
            password=settings.password,
            identifier=settings.client_id,
            protocol=aiomqtt.ProtocolVersion.V5 if modern else aiomqtt.ProtocolVersion.V311,
            clean_session=None if modern else False,
            clean_start=False
            if modern
            else MQTT_CLEAN_START_FIRST_ONLY,  # the latter: 3.1.1 has no such thing
            keepalive=settings.keep_alive,
            properties=self._connect_properties() if modern else None,
            tls_context=ssl.create_default_context(cafile=settings.ca_file) if settings.tls else None,
            logger=log,
        )

    def _connect_properties(self) -> Properties:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = self._settings.session_expiry
        properties.ReceiveMaximum = self._settings.window
        properties.MaximumPacketSize = MAX_PACKET
        return properties

    def _take_over(self, client: aiomqtt.Client) -> _Connection:
        """Have its messages come to us, unacknowledged."""
        paho = client._client
        connection = _Connection(client, paho.ack, paho.disconnect)
        paho.manual_ack_set(True)
        connected: Any = paho.on_connect
        published: Any = paho.on_publish

        def on_message(paho: Any, _userdata: Any, message: MQTTMessage) -> None:
            if len(message.payload) > MAX_PACKET:
                message.payload = b""  # 3.1.1 cannot forbid it; as an empty one it is refused
            size = len(message.payload)
            if connection.arrived.qsize() < MOST_ARRIVED and connection.waiting_bytes + size <= ARRIVED_BYTES:
                connection.waiting_bytes += size
                connection.arrived.put_nowait(message)
            elif message.qos == 0:
                self._count_refused("crowded")
            else:
                paho.disconnect()  # not acknowledged: it comes again

        def on_connect(paho: Any, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
            if not flags.session_present:
                self._pushed.clear()  # its packet ids begin anew
            connection.max_packet = getattr(properties, "MaximumPacketSize", math.inf)
            connected(paho, userdata, flags, reason, properties)

        def on_publish(paho: Any, userdata: Any, mid: int, reason: Any, properties: Any) -> None:
            if reason.is_failure:  # aiomqtt does not look at it
                self._stop_burying(str(reason))
            published(paho, userdata, mid, reason, properties)

        paho.on_publish = on_publish
        paho.on_message = on_message
        paho.on_connect = on_connect
        return connection

    async def _subscribe(self, client: aiomqtt.Client) -> None:
        group = f"$share/{self._settings.group}/" if self._settings.group else ""
        filters = list(dict.fromkeys(group + rule.pattern.filter for rule in self._settings.rules))
        if self._settings.protocol == "5":
            options = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
            answers = await client.subscribe([(name, options) for name in filters])
        else:
            answers = await client.subscribe([(name, 1) for name in filters])
        if len(answers) != len(filters):
            raise aiomqtt.MqttError(f"the broker answers {len(answers)} of {len(filters)} subscriptions")
        for name, answer in zip(filters, answers, strict=True):
            granted: Any = getattr(answer, "value", answer)
            if granted != 1:
                raise aiomqtt.MqttError(
                    f"the broker answers {granted} to a subscription of {name} with QoS 1"
                )

    async def _until_end(self, client: aiomqtt.Client, pushing: asyncio.Task[None]) -> None:
        lost = asyncio.create_task(_drain(client))
        stopped = asyncio.create_task(self._until_stopped())
        try:
            await asyncio.wait([lost, stopped, pushing], return_when=asyncio.FIRST_COMPLETED)
            if pushing.done():
                pushing.result()
            if lost.done():
                lost.result()
        finally:
            for task in (lost, stopped):
                task.cancel()
            await asyncio.wait([lost, stopped])

    async def _until_stopped(self) -> None:
        """Or until another process leads."""
        if self._lead is None:
            await self._stop.wait()
            return
        while not self._stop.is_set() and await self._lead.look():
            await _wait(self._stop, LOOK_EVERY)
        if not self._stop.is_set():
            log_event(log, logging.WARNING, "another process has the bridge", host=self._settings.host)

    # Messages

    async def _push_all(self, connection: _Connection) -> None:
        """Start what arrives, at most a window at once, and have it acknowledged in order."""
        room = asyncio.Semaphore(self._settings.window)
        started: _Started = asyncio.Queue()
        async with asyncio.TaskGroup() as group:  # if one of the two fails, the connection ends
            group.create_task(self._acknowledge(connection, started, room))
            while (message := await connection.arrived.get()) is not None:
                connection.waiting_bytes -= len(message.payload)
                await room.acquire()
                if connection.ended.is_set():
                    break
                self.stats.received += 1
                started.put_nowait((message, asyncio.create_task(self._handle(message, connection))))
            started.put_nowait(None)

    async def _acknowledge(self, connection: _Connection, started: _Started, room: asyncio.Semaphore) -> None:
        refused = False  # one that must come again: later ones are acknowledged after it (MQTT5-4.6.0-2)
        while (entry := await started.get()) is not None:
            message, handling = entry
            if not await handling:
                refused = True
            elif message.qos == 1 and not refused:
                connection.ack(message.mid, 1)
                if (known := self._pushed.get(message.mid)) is not None:
                    known.acked_at = time.monotonic()
            room.release()

    async def _handle(self, message: MQTTMessage, connection: _Connection) -> bool:
        """True: it may be acknowledged. Also what breaks us: it must not come again for ever."""
        try:
            return await self._try(message, connection)
        except Exception:
            log.exception("bridge: message %d", message.mid)
            self._count_refused("error")
            return True

    async def _try(self, message: MQTTMessage, connection: _Connection) -> bool:
        """Push it by each rule that it fits. True: it may be acknowledged."""
        if message.retain:  # of before our subscription, which a broker may send at every connect
            self._count_refused("retained")
            return True
        done = self._pushed_by(message)
        incoming = Incoming(message.topic, bytes(message.payload), _cid(message))
        matches = self._matches(message.topic)
        problem = None if matches else ("no rule", "no rule has this topic")
        for rule, values in matches:
            if rule.number in done:
                self.stats.repeated += 1
                continue
            try:
                if not await self._push(rule, rule.make_push(incoming, values), connection):
                    return False
                done.add(rule.number)
            except Unfit as error:
                problem = ("unfit", f"rule {rule.number}: {error}")
            except ApiError as error:
                problem = (str(error.code), f"rule {rule.number}: {error.message}")
            except Exception:  # one message must not end the bridge
                log.exception("bridge: rule %d", rule.number)
                problem = ("error", f"rule {rule.number}: internal error")
        if problem is None:
            return True
        label, reason = problem[0], problem[1][:REASON_SIZE]
        self._refuse(message, label, reason)
        return await self._bury(message, reason, connection)

    def _pushed_by(self, message: MQTTMessage) -> set[int]:
        """Rules by which it was pushed, in this life of ours and of the session."""
        if message.qos == 0:
            return set()
        contents = hashlib.blake2b(message.topic.encode() + b"\0" + message.payload, digest_size=16).digest()
        known = self._pushed.get(message.mid)
        again = message.dup and known is not None and known.acked_at > self._lost_at - ACK_DOUBT
        if known is None or not again or known.contents != contents:
            known = self._pushed[message.mid] = _Known(contents)
        return known.rules

    def _matches(self, topic: str) -> list[tuple[Rule, dict[str, str]]]:
        found = [(rule, rule.pattern.match(topic)) for rule in self._settings.rules]
        return [(rule, values) for rule, values in found if values is not None]

    async def _push(self, rule: Rule, raw: bytes, connection: _Connection) -> bool:
        """Until it is durable: while the store is away, it is tried again. False: the connection ended first."""
        pause = self._first_pause
        while True:
            try:
                app = await self._apps.find(rule.app)
                if app is None:
                    raise Unfit(f"there is no app {rule.app}")
                accepted = await self._pushes.push(app, raw)
                self.stats.pushed += 1
                log_event(
                    log, logging.INFO, "bridge pushed", app=app.key, rule=rule.number, msg_id=accepted.msg_id
                )
                return True
            except StoreError as error:
                problem = str(error)
            except ApiError as error:
                if error.http_status < 500:
                    raise
                problem = error.message
            log_event(log, logging.WARNING, "bridge waits for the store", reason=problem)
            if await _wait(connection.ended, pause):
                return False
            pause = min(MAX_PAUSE, 2 * pause)

    def _refuse(self, message: MQTTMessage, label: str, reason: str) -> None:
        log_event(log, logging.WARNING, "bridge refused a message", topic=message.topic, reason=reason)
        self._count_refused(label)

    def _count_refused(self, label: str) -> None:
        if self.stats.on_refused is not None:
            self.stats.on_refused(label)

    async def _bury(self, message: MQTTMessage, reason: str, connection: _Connection) -> bool:
        """Publish what cannot be pushed on the dead topic, if the broker takes it: pushes matter more. False: the
        connection ends, and it comes again."""
        topic = self._settings.dead_topic
        if topic is None:
            return True
        size = ENVELOPE + sum(len(text.encode()) for text in (topic, message.topic, reason))
        if time.monotonic() < self._bury_at or size + len(message.payload) > connection.max_packet:
            self._count_refused("unburied")
            return True
        try:
            await connection.client.publish(
                topic, message.payload, qos=1, properties=self._letter_properties(message.topic, reason)
            )
        except aiomqtt.MqttError as error:
            self._note_unburied(connection, str(error))
            return False
        return True

    def _letter_properties(self, topic: str, reason: str) -> Properties | None:
        if self._settings.protocol != "5":
            return None
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.UserProperty = [("topic", topic), ("reason", reason)]
        return properties

    def _note_unburied(self, connection: _Connection, reason: str) -> None:
        """Later messages must not be acknowledged before this one: so its connection ends."""
        if not connection.unburied:
            connection.unburied = True
            before, self._unburied_at = self._unburied_at, time.monotonic()
            if self._unburied_at < before + UNBURIED:
                self._stop_burying(reason)
        connection.ended.set()
        connection.end()

    def _stop_burying(self, reason: str) -> None:
        self._bury_at = time.monotonic() + UNBURIED
        log_event(log, logging.ERROR, "bridge buries nothing", topic=self._settings.dead_topic, reason=reason)


async def _drain(client: aiomqtt.Client) -> None:
    """Raises MqttError when the connection ends. Nothing comes out: all messages are taken before."""
    async for _ in client.messages:
        pass


async def _wait(event: asyncio.Event, limit: float) -> bool:
    """Did it happen within so many seconds?"""
    with suppress(TimeoutError):
        async with asyncio.timeout(limit):
            await event.wait()
    return event.is_set()


def _cid(message: MQTTMessage) -> str | None:
    """The user property, of MQTT 5."""
    pairs = getattr(message.properties, "UserProperty", ()) if message.properties is not None else ()
    return next((value for name, value in pairs if name == CID), None)


class BridgeMetrics:
    def __init__(self, metrics: Metrics, stats: Stats) -> None:
        self._refused = metrics.counters("bridge_refused", "Messages that became no push.", "reason")
        metrics.gauge("bridge_connected", "1 while connected.", lambda: float(stats.connected))
        metrics.read_counter("bridge_received", "Messages received.", lambda: stats.received)
        metrics.read_counter("bridge_pushed", "Pushes made of them.", lambda: stats.pushed)
        metrics.read_counter(
            "bridge_repeated", "Messages sent again, of pushes made before.", lambda: stats.repeated
        )
        stats.on_refused = self._on_refused

    def _on_refused(self, reason: str) -> None:
        self._refused.labels(reason).value += 1
