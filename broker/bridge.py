"""The MQTT bridge: messages of an organisation's own MQTT broker become pushes, by rule.

At least once, end to end: the foreign broker keeps our session and what comes for it while we are away; a message is
acknowledged when all its pushes are durable, and not before. While the store is away nothing is acknowledged, so the
broker's own window stops the flow. Acknowledgements go out in the order in which the messages came (MQTT5-4.6.0-2).

What the broker sends again (DUP), because an acknowledgement was lost with its connection, is known by packet id and
contents, and not pushed again. Only a crash between the push and its acknowledgement makes a second push, unless the
message carries a cid: by the rule's `cid`, or by a user property of that name.

aiomqtt acknowledges a message before it hands it out, and has no setting for that. So the paho client underneath is
told not to, and gives its messages to us: `_open_client` is the only place that knows.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import aiomqtt
from paho.mqtt.client import MQTTMessage
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from broker.apps import Apps
from broker.bridge_rules import Incoming, Rule, Unfit
from broker.errors import ApiError
from broker.logs import log_event
from broker.metrics import Metrics
from broker.pushes import Pushes

log: Final = logging.getLogger(__name__)

FIRST_PAUSE: Final = 0.5  # before connecting again, or trying the store again; doubled each time
MAX_PAUSE: Final = 30.0
NO_RULE: Final = "no rule"
CID: Final = "cid"  # the user property


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


class Bridge:
    """`open` starts it, `close` ends it: what was not acknowledged by then comes again to whoever connects next."""

    def __init__(self, settings: BridgeSettings, apps: Apps, pushes: Pushes, first_pause: float = FIRST_PAUSE) -> None:
        self.stats = Stats()
        self._settings = settings
        self._apps = apps
        self._pushes = pushes
        self._first_pause = first_pause
        self._pushed: dict[int, bytes] = {}  # packet id (16 bits) -> what was pushed for it last
        self._run: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._run = asyncio.get_running_loop().create_task(self._keep_on(), name="bridge")

    async def close(self) -> None:
        if self._run is not None:
            self._run.cancel()
            await asyncio.wait([self._run])

    async def _keep_on(self) -> None:
        failures = 0
        while True:
            try:
                async with self._open_client() as connection:
                    log_event(log, logging.INFO, "bridge connected", host=self._settings.host)
                    failures = 0
                    await self._serve(connection)
            except (aiomqtt.MqttError, OSError, ssl.SSLError) as error:
                log_event(log, logging.WARNING, "bridge not connected", host=self._settings.host, reason=str(error))
            await asyncio.sleep(self._pause(failures))
            failures += 1

    def _pause(self, failures: int) -> float:
        return min(MAX_PAUSE, self._first_pause * 2.0 ** min(failures, 20)) * (0.5 + random.random() / 2)

    # The connection

    @asynccontextmanager
    async def _open_client(self) -> AsyncIterator[_Connection]:
        """Connected and subscribed. Raises MqttError."""
        settings = self._settings
        modern = settings.protocol == "5"
        client = aiomqtt.Client(
            settings.host,
            settings.port,
            username=settings.username,
            password=settings.password,
            identifier=settings.client_id,
            protocol=aiomqtt.ProtocolVersion.V5 if modern else aiomqtt.ProtocolVersion.V311,
            clean_session=None if modern else False,
            clean_start=False if modern else True,  # 3.1.1 has no such thing; paho wants a value
            keepalive=settings.keep_alive,
            properties=self._connect_properties() if modern else None,
            tls_context=ssl.create_default_context(cafile=settings.ca_file) if settings.tls else None,
        )
        paho = client._client
        connection = _Connection(client, paho.ack)
        paho.manual_ack_set(True)
        paho.on_message = lambda _client, _userdata, message: connection.arrived.put_nowait(message)
        connected = paho.on_connect
        assert connected is not None

        def on_connect(paho: Any, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
            if not flags.session_present:
                self._pushed.clear()  # its packet ids begin anew
            connected(paho, userdata, flags, reason, properties)

        paho.on_connect = on_connect
        async with client:
            await self._subscribe(client, modern)
            self.stats.connected = True
            try:
                yield connection
            finally:
                self.stats.connected = False

    def _connect_properties(self) -> Properties:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = self._settings.session_expiry
        properties.ReceiveMaximum = self._settings.window
        return properties

    async def _subscribe(self, client: aiomqtt.Client, modern: bool) -> None:
        group = f"$share/{self._settings.group}/" if self._settings.group else ""
        filters = list(dict.fromkeys(group + rule.pattern.filter for rule in self._settings.rules))
        if modern:  # what is retained is old: not sent at all
            options = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
            answers = await client.subscribe([(name, options) for name in filters])
        else:
            answers = await client.subscribe([(name, 1) for name in filters])
        for name, answer in zip(filters, answers, strict=True):
            granted = answer if isinstance(answer, int) else answer.value
            if granted != 1:
                raise aiomqtt.MqttError(f"the broker answers {granted} to a subscription of {name} with QoS 1")

    async def _serve(self, connection: _Connection) -> None:
        """Until the connection ends; raises MqttError then. Pushes under way are waited for: the next connection has
        to know of them."""
        pushing = asyncio.create_task(self._push_all(connection))
        try:
            async for _ in connection.client.messages:  # all come to `arrived`; this tells when the connection ends
                pass
        finally:
            connection.ended.set()
            connection.arrived.put_nowait(None)
            await asyncio.shield(asyncio.wait([pushing]))

    # Messages

    async def _push_all(self, connection: _Connection) -> None:
        """Start what arrives, at most a window at once; acknowledge in order."""
        room = asyncio.Semaphore(self._settings.window)
        started: asyncio.Queue[tuple[MQTTMessage, asyncio.Task[bool]] | None] = asyncio.Queue()
        acknowledging = asyncio.create_task(self._acknowledge(connection, started, room))
        while True:
            message = await connection.arrived.get()
            if message is None:
                break
            self.stats.received += 1
            await room.acquire()
            started.put_nowait((message, asyncio.create_task(self._handle(message, connection))))
        started.put_nowait(None)
        await acknowledging

    async def _acknowledge(
        self,
        connection: _Connection,
        started: asyncio.Queue[tuple[MQTTMessage, asyncio.Task[bool]] | None],
        room: asyncio.Semaphore,
    ) -> None:
        while (entry := await started.get()) is not None:
            message, task = entry
            try:
                done = await task
            except Exception:
                log.exception("a message of the bridge is left to come again")
                done = False
            if done and message.qos == 1 and not connection.ended.is_set():
                connection.ack(message.mid, message.qos)
            room.release()

    async def _handle(self, message: MQTTMessage, connection: _Connection) -> bool:
        """True: it may be acknowledged."""
        contents = _digest(message)
        if message.qos == 1 and message.dup and self._pushed.get(message.mid) == contents:
            self.stats.repeated += 1
            return True
        self._pushed.pop(message.mid, None)
        if message.retain:  # what was there when we subscribed is old
            self._refuse(message, "retained")
            return True
        incoming = Incoming(message.topic, message.payload, _cid(message))
        matches = [(rule, values) for rule in self._settings.rules if (values := rule.pattern.match(message.topic)) is not None]
        problem = "" if matches else NO_RULE
        for rule, values in matches:
            try:
                if not await self._push(rule, incoming, values, connection):
                    return False
            except (ApiError, Unfit) as error:
                problem = self._explain(rule, error)
        if problem:
            self._refuse(message, problem)
            return await self._bury(message, problem, connection)
        if message.qos == 1:
            self._pushed[message.mid] = contents
        return True
