"""A node: every connection's life from accept to close, and the parts that serve them.

Everything here runs on the event loop's thread. What may take long (unknown apps, first sight of an open app's
device, the store) is a task in `spawn`, or a callback of the store; an authenticated device that is owed nothing
costs none of these (architecture, decision 4: claim the route, then fetch).
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from time import time
from typing import Any, Final

from broker.apps import Apps
from broker.bus import Broadcast, Bus, CredentialsChanged, Doorbell, Targeted
from broker.devices import Devices
from broker.errors import ApiError
from broker.logs import log_event
from broker.metrics import Metrics
from broker.model import Claim, Retained
from broker.pushes import Pushes
from broker.reports import Reports
from broker.store import Store, StoreError
from gateway.admission import (
    NO_CREDENTIALS,
    OVERTAKEN,
    STORE_AWAY,
    UNKNOWN_APP,
    KnownDevice,
    OpenDevice,
    Publisher,
    Refusal,
    admit,
    agree,
    connack,
)
from gateway.carriers import Carriers
from gateway.connection import OPENING_CHECK, Connection, Phase
from gateway.exchange import Exchange
from gateway.fanout import Fanout
from gateway.fetcher import Fetcher
from gateway.hub import Hub, Resend
from gateway.intake import Intake
from gateway.live import TopicMessage, encoding
from gateway.metrics import NodeMetrics
from gateway.mqtt import Connect, Publish, Reason, decode
from gateway.session import Mailbox, MailboxLimits, Member, Session
from gateway.settler import Settler
from gateway.wheel import Clock, Wheel

TICK: Final = 0.25  # seconds: how exact keep-alives and expiries are
HUB_REST: Final = 60.0  # seconds without a CONNECT or anybody there before an app is unloaded
UPKEEP_SLICE: Final = 500  # apps looked after in one tick
FORMAT_PROPERTY: Final = ("format", "msgpack")  # user property of a CONNECT that wants MessagePack payloads
MAX_RECEIVE: Final = 65_535

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """Times are seconds, sizes bytes. Each limit stops one peer, or all together, from growing memory (G6)."""

    node_id: str
    connect_timeout: float = 10.0
    max_packet_size: int = 262_144
    max_connections: int = 1_000_000
    max_connecting: int = 10_000
    keep_alive_max: int = 3600
    session_expiry_max: int = 7 * 86_400
    window: int = 32
    receive_maximum: int = 256
    max_retained: int = 10_000
    max_retained_bytes: int = 16 << 20
    max_sessions: int = 100_000  # sessions of one app kept for absent clients
    mailbox: MailboxLimits = field(default_factory=MailboxLimits)


@dataclass(slots=True)
class _Load:
    """An app's hub on its way from the store, and what came meanwhile."""

    heard: list[Doorbell] = field(default_factory=list)
    waiting: list[tuple[Connection, Connect]] = field(default_factory=list)  # in the order they came (G5)


class Node:
    def __init__(
        self,
        settings: NodeSettings,
        *,
        store: Store,
        bus: Bus,
        apps: Apps,
        devices: Devices,
        pushes: Pushes,
        reports: Reports,
        carriers: Carriers,
        metrics: Metrics,
        wall: Callable[[], float] = time,
    ) -> None:
        self.settings = settings
        self.carriers = carriers
        self.metrics = NodeMetrics(metrics)
        self._store = store
        self._bus = bus
        self._apps = apps
        self._devices = devices
        self._wall = wall
        self._loop = asyncio.get_running_loop()
        self.clock = Clock(self._loop.time(), wall())
        self._wheel: Wheel[Connection] = Wheel(self.clock.now, TICK)
        self._hubs: dict[str, Hub] = {}
        self._by_id: dict[int, Hub] = {}
        self._loading: dict[str, _Load] = {}
        self._opening: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.live = 0  # connections after CONNECT
        self.live_by: dict[tuple[str, ...], float] = {}  # the same by listener and MQTT version
        self.blocked = 0  # of them, those whose socket is over the write buffer limit
        self.draining = False
        self.settler = Settler(store, self.metrics, wall)
        self.fetcher = Fetcher(store, self.metrics, self.clock)
        self.fanout = Fanout(self.clock, self.metrics)
        self.exchange = Exchange(store, self.clock, self.metrics)
        self.intake = Intake(
            store=store,
            pushes=pushes,
            devices=devices,
            reports=reports,
            exchange=self.exchange,
            clock=self.clock,
            metrics=self.metrics,
        )
        self._unsubscribe: Callable[[], None] = lambda: None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._upkeep_todo: list[Hub] = []
        _declare_gauges(self, metrics)

    # Life

    def start(self) -> None:
        self._unsubscribe = self._bus.subscribe(self._heard)
        self.settler.start()
        self.fetcher.start()
        self._tick()

    async def drain(self, limit: float) -> None:
        """Stop serving: tell every peer why, at a pace, and record what they acknowledged. At most `limit`
        seconds."""
        self.draining = True
        connections = [*self._opening, *(member for hub in self._by_id.values() for member in hub.everyone())]
        deadline = self._loop.time() + limit
        for i, connection in enumerate(connections):
            connection.close("server shutting down", Reason.SERVER_SHUTTING_DOWN)
            if i % 500 == 499:  # let writes and closes happen between slices
                await asyncio.sleep(0.002)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(0.0, deadline - self._loop.time()))

    async def close(self) -> None:
        self._unsubscribe()
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.fetcher.close()
        await self.settler.close()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in the background; its failure is logged, and close waits for it."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task failed", exc_info=error)

    def _tick(self) -> None:
        self._tick_timer = self._loop.call_later(TICK, self._tick)
        clock = self.clock
        clock.now, clock.wall = self._loop.time(), self._wall()
        due = self._wheel.due(clock.now)
        try:
            while due:
                connection = due.pop()
                following = connection.check(clock.now)
                if following is not None:
                    self._wheel.add(connection, following)
        finally:  # what went wrong with one connection is not the others' business
            for connection in due:
                self._wheel.add(connection, clock.now)
        self._upkeep()

    def _upkeep(self) -> None:
        """Look after the next apps, a slice at a time: there may be hundreds of thousands."""
        if not self._upkeep_todo:
            self._upkeep_todo = list(self._by_id.values())
        for hub in self._upkeep_todo[-UPKEEP_SLICE:]:
            hub.drop_finished(self.clock.wall)
            for mailbox in hub.drop_sessions(self.clock.now):
                self.exchange.forget(hub, mailbox)
            if (
                hub.idle(self.clock.now)
                and self.clock.now > hub.touched + HUB_REST
                and not self.fanout.walking
            ):
                self._hubs.pop(hub.app.key, None)
                self._by_id.pop(hub.app.app_id, None)
        del self._upkeep_todo[-UPKEEP_SLICE:]

    # Doorbells

    def _heard(self, doorbells: Sequence[Doorbell]) -> None:
        for load in self._loading.values():
            load.heard += doorbells
        for doorbell in doorbells:
            try:
                self._hear(doorbell)
            except Exception:  # a push that cannot be encoded must not silence the doorbells after it
                log.exception("a doorbell was not followed")

    def _hear(self, doorbell: Doorbell) -> None:
        match doorbell:
            case Targeted():
                hub = self._by_id.get(doorbell.message.app_id)
                if hub is not None:
                    self.fanout.targeted(hub, doorbell)
                self.fetcher.rang(doorbell.message.msg_id)
            case Broadcast():
                hub = self._by_id.get(doorbell.broadcast.message.app_id)
                if hub is not None:
                    self.fanout.broadcast(hub, doorbell)
                self.fetcher.rang(doorbell.broadcast.message.msg_id)
            case CredentialsChanged():
                self.spawn(self._credentials_changed(doorbell))

    async def _credentials_changed(self, bell: CredentialsChanged) -> None:
        hub = self._by_id.get(bell.app_id)
        if hub is None:
            return
        if bell.devnos is not None:
            for devno in bell.devnos:
                member = hub.members.get(devno)
                if member is not None:
                    member.close("token revoked", Reason.NOT_AUTHORIZED)
            return
        app = await self._apps.find(hub.app.key)
        if app is not None:
            if app.master_secret != hub.app.master_secret:
                for member in list(hub.publishers.values()):
                    member.close("secret rotated", Reason.NOT_AUTHORIZED)
            hub.app = app
            return
        self._hubs.pop(hub.app.key, None)
        self._by_id.pop(hub.app.app_id, None)
        for member in hub.everyone():
            member.close("app deleted", Reason.NOT_AUTHORIZED)

    # Connections: from accept to CONNACK

    def opened(self, connection: Connection) -> None:
        self.metrics.accepted.labels(connection.listener).value += 1
        if (
            self.draining
            or len(self._opening) >= self.settings.max_connecting
            or self.live + len(self._opening) >= self.settings.max_connections
        ):
            self.count_refusal("draining" if self.draining else "too many connections")
            connection.transport.abort()
            return
        self._opening.add(connection)
        self._wheel.add(connection, self.clock.now + OPENING_CHECK)

    def join(self, connection: Connection, connect: Connect) -> None:
        """A CONNECT came. Ends, at once or later, in CONNACK; until then nothing more is read."""
        if connect.username is None or connect.password is None:
            self._refuse(connection, connect, NO_CREDENTIALS)
            return
        if connect.properties.get("authentication_method") is not None:
            text = "enhanced authentication is not supported"
            refusal = Refusal(Reason.BAD_AUTHENTICATION_METHOD, text, "authentication method")
            self._refuse(connection, connect, refusal)
            return
        hub = self._hubs.get(connect.username)
        if hub is None:
            self._join_later(connection, connect, connect.username)
        else:
            self._admit(connection, connect, hub)

    def _join_later(self, connection: Connection, connect: Connect, key: str) -> None:
        """The app's hub is loaded once, however many of its devices wait for it."""
        load = self._loading.get(key)
        if load is None:
            load = self._loading[key] = _Load()
            self.spawn(self._load(key, load))
        load.waiting.append((connection, connect))

    async def _load(self, key: str, load: _Load) -> None:
        hub, refusal = None, UNKNOWN_APP
        try:
            hub = await self._load_hub(key, load)
        except StoreError as error:
            log.warning("app not read: %s", error)
            refusal = STORE_AWAY
        except Exception:  # whatever it is, those who wait get an answer
            log.exception("app not loaded")
            refusal = STORE_AWAY
        del self._loading[key]
        for connection, connect in load.waiting:  # at once: whoever comes from now on is newer
            if connection.phase is Phase.CLOSED:
                continue
            if hub is None:
                self._refuse(connection, connect, refusal)
            else:
                self._admit(connection, connect, hub)

    async def _load_hub(self, key: str, load: _Load) -> Hub | None:
        app = await self._apps.find(key)
        if app is None:
            return None
        hub = Hub(
            app,
            max_retained=self.settings.max_retained,
            max_retained_bytes=self.settings.max_retained_bytes,
            too_large=self.metrics.too_large,
        )
        for row in await self._store.live_broadcasts(app.app_id):
            hub.add_broadcast(row)
        for retained in await self._store.list_retained(app.app_id):
            hub.retained.set(_as_message(retained, self.clock))
        self._hubs[key] = self._by_id[app.app_id] = hub
        for doorbell in load.heard:  # accepted after the rows were read; known ones are ignored
            if isinstance(doorbell, Broadcast) and doorbell.broadcast.message.app_id == app.app_id:
                self.fanout.broadcast(hub, doorbell)
        return hub

    def _admit(self, connection: Connection, connect: Connect, hub: Hub) -> None:
        hub.touched = self.clock.now
        generations = self._store.token_generations(hub.app.app_id)
        match admit(hub.app, connect, generations, self._wall()):
            case KnownDevice(devno, platform):
                self._claim(connection, connect, hub, devno, platform)
            case OpenDevice():
                self.spawn(self._admit_open(connection, connect, hub))
            case Publisher():
                self._welcome_publisher(connection, connect, hub)
            case Refusal() as refusal:
                self._refuse(connection, connect, refusal)

    async def _admit_open(self, connection: Connection, connect: Connect, hub: Hub) -> None:
        try:
            device = await self._devices.register_open(hub.app, connect.client_id)
        except ApiError as error:
            refusal = Refusal(Reason.CLIENT_IDENTIFIER_NOT_VALID, error.message, "bad client id")
            self._refuse(connection, connect, STORE_AWAY if error.http_status >= 500 else refusal)
        except StoreError as error:
            log.warning("device not registered: %s", error)
            self._refuse(connection, connect, STORE_AWAY)
        else:
            if connection.phase is not Phase.CLOSED:
                self._claim(connection, connect, hub, device.devno, device.platform)

    def _claim(self, connection: Connection, connect: Connect, hub: Hub, devno: int, platform: str) -> None:
        done = functools.partial(self._welcome_device, connection, connect, hub, devno, platform)
        self._store.claim_route(hub.app.app_id, devno, self.settings.node_id, done)

    def _welcome_device(
        self, connection: Connection, connect: Connect, hub: Hub, devno: int, platform: str, claim: Claim
    ) -> None:
        if connection.phase is Phase.CLOSED:
            self._store.release_route(hub.app.app_id, devno, claim.epoch, self._wall())
            return
        if self._by_id.get(hub.app.app_id) is not hub:  # the app was deleted meanwhile
            self._store.release_route(hub.app.app_id, devno, claim.epoch, self._wall())
            self._refuse(connection, connect, UNKNOWN_APP)
            return
        old = hub.members.get(devno)
        if old is not None:
            if old.epoch > claim.epoch:  # answered late: it has come back since, and the newer wins (G5)
                self._refuse(connection, connect, OVERTAKEN)
                return
            self._take_over(old)
        packed = FORMAT_PROPERTY in connect.properties.get("user_properties", ())
        session = self._session(connection, connect, platform, devno=devno, packed=packed)
        connection.epoch = claim.epoch
        connection.client_id = connect.client_id
        resumed, present = self._resume(connection, connect, hub, session)
        hub.members[devno] = connection
        hub.online.add(devno)
        for push in hub.start(session, may_owe=claim.may_owe):
            self.settler.note_evicted(push)
        self._welcome(connection, connect, hub, session, present=present, role="device")
        if resumed:
            connection.send(b"".join(resumed))
        connection.catch_up()

    def _welcome_publisher(self, connection: Connection, connect: Connect, hub: Hub) -> None:
        client_id = connect.client_id
        if not client_id and connect.version == 4 and not connect.clean_start:  # MQTT311-3.1.3-8
            text = "an empty client id needs a clean session"
            refusal = Refusal(Reason.CLIENT_IDENTIFIER_NOT_VALID, text, "no client id")
            self._refuse(connection, connect, refusal)
            return
        assigned = "" if client_id else token_hex(10)
        connection.client_id = client_id or assigned
        old = hub.publishers.get(connection.client_id)
        if old is not None:
            self._take_over(old)
        session = self._session(connection, connect, "other")
        resumed, present = self._resume(connection, connect, hub, session)
        hub.publishers[connection.client_id] = connection
        self._welcome(
            connection, connect, hub, session, present=present, role="publisher", assigned=assigned or None
        )
        if resumed:
            connection.send(b"".join(resumed))
        connection.catch_up()

    def _take_over(self, old: Member) -> None:
        self.metrics.takeovers.value += 1
        old.close("taken over", Reason.SESSION_TAKEN_OVER)  # MQTT5-3.1.4-3

    def _session(
        self,
        connection: Connection,
        connect: Connect,
        platform: str,
        *,
        devno: int = -1,
        packed: bool = False,
    ) -> Session:
        properties = connect.properties
        return Session(
            encoding(connect.version, platform, packed),
            devno=devno,
            window=min(
                properties.get("receive_maximum", MAX_RECEIVE),
                connection.profile.window,
                self.settings.window,
            ),
            maximum_packet=properties.get("maximum_packet_size", 0),
            inbound_maximum=self.settings.receive_maximum,
            limits=self.settings.mailbox,
        )

    def _resume(
        self, connection: Connection, connect: Connect, hub: Hub, session: Session
    ) -> tuple[list[bytes], bool]:
        """Take up the session before this one, or discard it. Returns what to send again, and Session Present."""
        key = _mailbox_key(session, connection.client_id)
        mailbox = hub.mailboxes.pop(key, None)
        resend = hub.resend.pop(session.devno, None)
        will = hub.wills.pop(key, None)
        known = hub.session_ends.take(session.devno, self.clock.now)
        expired = (
            mailbox is not None and mailbox.expires_at is not None and mailbox.expires_at <= self.clock.now
        )
        if will is not None:
            will.timer.cancel()  # MQTT5-3.1.3-9
        if connect.clean_start or expired:
            if will is not None:  # the session it belongs to ends here (MQTT5-3.1.2-10)
                will.publish()
            if mailbox is not None:
                self.exchange.forget(hub, mailbox)
            return [], False
        if resend is not None and resend.expires_at > self.clock.now:
            session.resend = resend.packet_ids
        if mailbox is None:
            return [], known
        mailbox.member = connection
        return session.resume(mailbox, self.clock.now), True

    def _welcome(
        self,
        connection: Connection,
        connect: Connect,
        hub: Hub,
        session: Session,
        *,
        present: bool,
        role: str,
        assigned: str | None = None,
    ) -> None:
        self._opening.discard(connection)
        self._count_live(connection, str(connect.version), 1)
        connection.hub = hub
        connection.session = session
        connection.will = connect.will
        connection.last_seen = self.clock.now
        terms = agree(
            connect,
            keep_alive_max=min(connection.profile.keep_alive_max, self.settings.keep_alive_max),
            session_expiry_max=self.settings.session_expiry_max,
        )
        connection.keep_alive = 1.5 * terms.keep_alive  # MQTT5-3.1.2-22, MQTT311-3.1.2-24
        connection.session_expiry = terms.session_expiry
        connection.transport.set_write_buffer_limits(high=connection.profile.write_buffer)
        connection.phase = Phase.LIVE
        most = (self.settings.receive_maximum, self.settings.max_packet_size)
        connection.send(connack(connect.version, present, terms, *most, assigned))
        self.metrics.connects.labels(connection.listener, str(connect.version), role).value += 1
        log_event(
            log,
            logging.INFO,
            f"{role} connected",
            app=hub.app.key,
            device=connection.client_id,
            node=self.settings.node_id,
            transport=connection.listener,
            version=connect.version,
            keep_alive=terms.keep_alive,
        )
        if connection.partial is not None:  # it sent on before it had its CONNACK
            self._loop.call_soon(connection.resume_reading)

    def _refuse(self, connection: Connection, connect: Connect, refusal: Refusal) -> None:
        log_event(
            log,
            logging.INFO,
            "connect refused",
            app=(connect.username or "")[:64],
            device=connect.client_id[:64],
            node=self.settings.node_id,
            reason=refusal.label,
        )
        connection.refuse(connect.version, refusal.reason, refusal.text, refusal.label)

    def count_refusal(self, label: str) -> None:
        self.metrics.refusals.labels(label).value += 1

    # Connections: the end

    def closed(self, connection: Connection, was: Phase, label: str) -> None:
        if was is not Phase.LIVE:
            self._opening.discard(connection)
            return
        hub, session = connection.hub, connection.session
        assert hub is not None
        assert session is not None
        self._count_live(connection, str(session.encoding.version), -1)
        if connection.blocked:
            self.blocked -= 1
        self._leave(connection, hub, session)
        self.metrics.disconnects.labels(label).value += 1
        if connection.will is not None:
            key = _mailbox_key(session, connection.client_id)
            self.exchange.send_will(connection, hub, key, connection.will)
        log_event(
            log,
            logging.INFO,
            "disconnected",
            app=hub.app.key,
            device=connection.client_id,
            node=self.settings.node_id,
            reason=label,
        )

    def _count_live(self, connection: Connection, version: str, change: int) -> None:
        self.live += change
        key = (connection.listener, version)
        self.live_by[key] = self.live_by.get(key, 0) + change

    def _leave(self, connection: Connection, hub: Hub, session: Session) -> None:
        devno = session.devno
        if devno < 0:
            if hub.publishers.get(connection.client_id) is connection:
                del hub.publishers[connection.client_id]
        elif hub.members.get(devno) is connection:
            del hub.members[devno]
            hub.online.discard(devno)
            self._store.release_route(hub.app.app_id, devno, connection.epoch, self._wall())
        in_flight = session.suspend()
        self.metrics.abandoned.value += len(in_flight)
        mailbox = session.mailbox
        if not connection.session_expiry:
            if mailbox is not None:
                self.exchange.forget(hub, mailbox)
            return
        if devno >= 0:
            hub.session_ends.note(devno, self.clock.now, connection.session_expiry)
            if in_flight and len(hub.resend) < self.settings.max_sessions:
                hub.resend[devno] = Resend(in_flight, self.clock.now + connection.session_expiry)
        if mailbox is not None and not mailbox.empty:
            self._keep_mailbox(connection, hub, session, mailbox)

    def _keep_mailbox(self, connection: Connection, hub: Hub, session: Session, mailbox: Mailbox) -> None:
        if len(hub.mailboxes) >= self.settings.max_sessions:
            self.exchange.forget(hub, mailbox)
            log.warning("session of %s not kept: max_sessions reached", connection.client_id)
            return
        mailbox.expires_at = self.clock.now + connection.session_expiry
        hub.mailboxes[_mailbox_key(session, connection.client_id)] = mailbox


def _mailbox_key(session: Session, client_id: str) -> str:
    """Devices and publishers with the same client id are different sessions."""
    return ("d/" if session.devno >= 0 else "p/") + client_id


def _as_message(row: Retained, clock: Clock) -> TopicMessage:
    found = decode(row.properties, 0, 5, 1 << 28)
    properties = found[0].properties if found is not None and isinstance(found[0], Publish) else None
    expires = None if row.expires_at is None else clock.now + row.expires_at - clock.wall
    return TopicMessage(row.topic, row.payload, row.qos, True, properties, expires)


def _declare_gauges(node: Node, metrics: Metrics) -> None:
    metrics.gauge(
        "connections_live", "Connections after CONNECT.", lambda: node.live_by, "transport", "version"
    )
    metrics.gauge(
        "connections_blocked", "Connections whose socket does not drain; skipped.", lambda: node.blocked
    )
    metrics.gauge(
        "deliveries_in_flight", "Pushes sent and not yet acknowledged.", node.metrics.count_in_flight
    )
    metrics.gauge("connections_opening", "Connections before CONNACK.", lambda: len(node._opening))
    metrics.gauge("apps_loaded", "Apps with a device connected since the start.", lambda: len(node._by_id))
    metrics.gauge(
        "broadcasts_live",
        "Unexpired broadcasts that some device is still owed.",
        lambda: sum(1 for hub in node._by_id.values() for _ in hub.broadcasts()),
    )
    metrics.gauge("broadcasts_walking", "Broadcasts still being offered.", lambda: node.fanout.walking)
    metrics.gauge(
        "broadcast_devices_left", "Online devices that broadcasts still walk to.", lambda: node.fanout.left
    )
