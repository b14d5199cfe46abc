"""A node: the parts that serve connections, their common clock, and the end of every connection.

Everything here runs on the event loop's thread. How a connection comes in is in `arrivals.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from time import time
from typing import Any, Final, cast

from pyroaring import BitMap

from broker.audiences.devices import Devices
from broker.bus import Broadcast, Bus, CredentialsChanged, Doorbell, Recalled, Taken, Targeted
from broker.carriers.catalog import Carriers
from broker.carriers.learning import Learning
from broker.logs import log_event
from broker.metrics import Metrics
from broker.model import App
from broker.pulse import end_of_pause
from broker.pushing.pushes import Pushes
from broker.store import Store
from broker.telling.reports import Reports
from broker.tenants.apps import Apps
from gateway.arrivals import Arrivals
from gateway.connection import Connection, Phase
from gateway.doorkeeper import Doorkeeper, DoorLimits
from gateway.exchange import Exchange
from gateway.fanout import Fanout
from gateway.fetcher import Fetcher
from gateway.gate import Gate
from gateway.handover import Handover
from gateway.hub import Ending, Hub
from gateway.hubs import Hubs, has_topics
from gateway.intake import Intake
from gateway.journal import Journal
from gateway.keeper import Keeper
from gateway.mailbox import PUBLISHER, MailboxLimits
from gateway.membership import Membership
from gateway.metrics import NodeMetrics
from gateway.mqtt import Reason
from gateway.postman import Postman
from gateway.session import Session
from gateway.settler import Settler
from gateway.sweeper import Sweeper
from gateway.tcp_info import TcpSamples
from gateway.tunnels import Tunnels
from gateway.wheel import Clock, Wheel
from gateway.wills import Wills
from gateway.wires import Wires
from gateway.witness import Witness

TICK: Final = 0.25  # seconds: how exact keep-alives and expiries are

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
    max_topic_length: int = 4096
    max_topic_levels: int = 128
    keep_alive_min: int = 0  # MQTT 5 only; 0: as the peer asks
    topic_alias_maximum: int = 16  # aliases that a peer may set
    sys_interval: float = 10.0
    doors: DoorLimits = field(default_factory=DoorLimits)
    admit_rate: int | None = None  # CONNECTs decided in a second; the others are told when to come
    drain_rate: int = 1000  # connections asked in a second to go to another node
    anonymous_app: str | None = None  # key of the app that takes in who brings no credentials
    mailbox: MailboxLimits = field(default_factory=MailboxLimits)
    gives_way: bool = False  # walks rest while other processes of the machine wait for a core


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
        membership: Membership,
        learning: Learning | None = None,
        wall: Callable[[], float] = time,
    ) -> None:
        """`membership` is joined and left by whoever made it: before `start`, and after `close`. `learning` likewise
        is opened and closed; without it, nothing is learned for good."""
        self.settings = settings
        self.membership = membership
        self.carriers = carriers
        self.metrics = NodeMetrics(metrics)
        self._store = store
        self._bus = bus
        self._apps = apps
        self._wall = wall
        self._loop = asyncio.get_running_loop()
        self.clock = Clock(self._loop.time(), wall())
        self._wheel: Wheel[Connection] = Wheel(self.clock.now, TICK)
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = self.clock.now
        self.live = 0  # connections after CONNECT
        self.live_by: dict[tuple[str, ...], float] = {}  # the same by listener and MQTT version
        self.blocked = 0  # of them, those whose socket is over the write buffer limit
        self.draining = False
        self.learning = learning or Learning(store.records, wall)
        self.learning.count_in(metrics)
        self.witness = Witness(self.learning, self.clock, self._find_hub)
        self.settler = Settler(
            store,
            self.metrics,
            wall,
            settings.node_id,
            certain=self._certain,
            unsettle=self._unsettle,
            acked=self.witness.acked,
        )
        self.fanout = Fanout(self.clock, self.metrics, gives_way=settings.gives_way)
        self.journal = Journal(store, self.metrics, self.clock)
        self.postman = Postman(self.clock, self.metrics, self.spawn)
        self.exchange = Exchange(
            store,
            self.journal,
            self.postman,
            self.clock,
            self.metrics,
            max_topic_length=settings.max_topic_length,
            max_topic_levels=settings.max_topic_levels,
            counters=self._counters,
            sys_interval=settings.sys_interval,
        )
        self.keeper = Keeper(
            self.journal,
            Wills(self.exchange.publish_will, self.clock),
            self.clock,
            self.metrics,
            limits=settings.mailbox,
            max_sessions=settings.max_sessions,
            reassign=self.exchange.reassign,
            replay=self.exchange.replays.of,
        )
        self.intake = Intake(
            store=store,
            pushes=pushes,
            devices=devices,
            reports=reports,
            exchange=self.exchange,
            clock=self.clock,
            metrics=self.metrics,
        )
        self.hubs = Hubs(
            store=store,
            apps=apps,
            exchange=self.exchange,
            keeper=self.keeper,
            fanout=self.fanout,
            clock=self.clock,
            metrics=self.metrics,
            max_retained=settings.max_retained,
            max_retained_bytes=settings.max_retained_bytes,
            spawn=self.spawn,
            alone=membership.alone,
            unrecorded=self.settler.unrecorded_broadcasts,
        )
        self.sweeper = Sweeper(
            self,
            store=store,
            hubs=self.hubs,
            fanout=self.fanout,
            clock=self.clock,
            metrics=self.metrics,
            spawn=self.spawn,
        )
        self.fetcher = Fetcher(store, self.metrics, self.clock, look=self.sweeper.look, sure=self._is_sure)
        self.handover = Handover(self, store.nodes)
        self.tunnels = Tunnels()
        self.wires = Wires(self._loop)
        self.tcp = TcpSamples(self.metrics)
        self.tcp.learn = self.witness.sampled
        self.arrivals = Arrivals(
            self,
            store=store,
            bus=bus,
            devices=devices,
            doorkeeper=None if settings.doors.off else Doorkeeper(settings.doors),
            gate=Gate(settings.admit_rate, self.clock.now),
            wall=wall,
        )
        membership.watch(lapsed=self._lapsed, wished=self.handover.wished)
        self._unsubscribe: Callable[[], None] = lambda: None
        self._round: asyncio.Task[None] | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        _declare_gauges(self, metrics)

    # Life

    def start(self) -> None:
        self._unsubscribe = self._bus.subscribe(self._heard, self._missed)
        self.settler.start()
        self.fetcher.start()
        self.journal.start()
        self._round = self._loop.create_task(self.sweeper.go_round())
        self._tick()

    def connections(self) -> list[Connection]:
        """All that did CONNECT."""
        return [cast("Connection", member) for hub in self.hubs for member in hub.everyone()]

    async def drain(self, limit: float) -> None:
        """Stop serving: ask every peer to go, at a pace, and let what is under way end. At most some `limit`
        seconds."""
        self.draining = True
        deadline = self._loop.time() + limit
        await self.handover.stop(limit)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(0.0, deadline - self._loop.time()))

    async def close(self) -> None:
        """Record what was acknowledged."""
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        self.handover.cancel()
        self.tunnels.close()
        if self._round is not None:
            self._round.cancel()
            await asyncio.wait([self._round])
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.fetcher.close()
        await self.journal.close()
        await self.settler.close()
        self._unsubscribe()  # until then it hears whom others took
        self.fanout.close()
        self.wires.close()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in the background; its failure is logged, and close waits for it."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task failed", exc_info=error)

    def watch(self, connection: Connection, after: float) -> None:
        """Have `connection.check` called in so many seconds, and then as it says itself."""
        self._wheel.add(connection, self.clock.now + after)

    def _tick(self) -> None:
        self._tick_timer = self._loop.call_at(end_of_pause(self._loop.time(), TICK), self._tick)
        clock = self.clock
        clock.now, clock.wall = self._loop.time(), self._wall()
        due = self._wheel.due(clock.now)
        self.tcp.tick(due, clock.now)
        try:
            while due:
                connection = due.pop()
                following = connection.check(clock.now)
                if following is not None:
                    self._wheel.add(connection, following)
        finally:  # what went wrong with one connection is not the others' business
            for connection in due:
                self._wheel.add(connection, clock.now)
        self.witness.sweep()
        self.hubs.upkeep()
        self.exchange.sys_topics.tick(clock.now)

    def _counters(self) -> dict[str, float | str]:
        """What `$SYS/broker` tells, under mosquitto's names."""
        metrics, hubs = self.metrics, list(self.hubs)
        kept = sum(len(hub.mailboxes) for hub in hubs)
        pushes = sum(child.value for child in metrics.sent.children.values())
        return {
            "uptime": f"{int(self.clock.now - self._started)} seconds",
            "clients/connected": self.live,
            "clients/disconnected": kept,
            "clients/total": self.live + kept,
            "subscriptions/count": sum(hub.subscriptions.count for hub in hubs),
            "retained messages/count": sum(hub.retained.count for hub in hubs),
            "publish/messages/received": sum(int(child.value) for child in metrics.inbound.children.values()),
            "publish/messages/sent": int(metrics.topic_messages.value + pushes),
            "publish/messages/dropped": int(metrics.topic_dropped.value),
        }

    # Doorbells

    def _heard(self, doorbells: Sequence[Doorbell]) -> None:
        self.hubs.heard(doorbells)
        for doorbell in doorbells:
            try:
                self._hear(doorbell)
            except Exception:  # a push that cannot be encoded must not silence the doorbells after it
                log.exception("a doorbell was not followed")

    def _hear(self, doorbell: Doorbell) -> None:
        match doorbell:
            case Targeted():
                hub = self.hubs.get(doorbell.message.app_id)
                if hub is not None:
                    self.fanout.targeted(hub, doorbell)
                self.fetcher.rang(doorbell.message.msg_id, hub)
            case Broadcast():
                hub = self.hubs.get(doorbell.broadcast.message.app_id)
                if hub is not None:
                    self.fanout.broadcast(hub, doorbell)
                self.fetcher.rang(doorbell.broadcast.message.msg_id, hub)
            case Recalled():
                for app_id in {gone.app_id for gone in doorbell.withdrawn}:
                    hub = self.hubs.get(app_id)
                    if hub is not None:
                        self.fanout.recalled(hub, doorbell)
            case CredentialsChanged():
                self.spawn(self._credentials_changed(doorbell))
            case Taken():
                hub = self.hubs.get(doorbell.app_id)
                if hub is not None:
                    self.lose(hub, doorbell.devno, doorbell.epoch)

    async def _credentials_changed(self, bell: CredentialsChanged) -> None:
        hub = self.hubs.get(bell.app_id)
        if hub is None:
            return
        if bell.devnos is not None:
            for devno in bell.devnos:
                member = hub.members.get(devno)
                if member is not None:
                    member.close("token revoked", Reason.NOT_AUTHORIZED)
            return
        self._app_is(hub, await self._apps.find(hub.app.key))

    def _app_is(self, hub: Hub, app: App | None) -> None:
        """As the store has it now; None: deleted."""
        if app is not None:
            self._app_changed(hub, app)
            return
        self.hubs.remove(hub)
        for member in hub.everyone():
            member.close("app deleted", Reason.NOT_AUTHORIZED)

    def _app_changed(self, hub: Hub, app: App) -> None:
        if app.master_secret != hub.app.master_secret:
            for key, member in list(hub.others.items()):
                if key.startswith(PUBLISHER):
                    member.close("secret rotated", Reason.NOT_AUTHORIZED)
        before = hub.app
        rules_changed = (app.access, app.open) != (before.access, before.open)
        hub.change_app(app)
        if has_topics(app) is not has_topics(before) and not self.membership.alone:
            self._moved(hub)
        elif rules_changed:
            self.exchange.rules_changed(hub)

    # One node of many

    async def _certain(self) -> None:
        """Return when nothing that others did before the call is unknown here. Raises StoreError."""
        await self.membership.certain()
        await self._bus.catch_up()

    async def _missed(self) -> None:
        """A doorbell was lost. Raises StoreError."""
        await self.sweeper.sweep("missed")

    async def _lapsed(self) -> None:
        """For a while nobody counted on this node. Of devices that are gone nobody can tell whether they left before:
        what they acknowledged does not count either. Raises StoreError."""
        for app_id, devnos in list(self.settler.unrecorded()):
            hub = self.hubs.get(app_id)
            for devno in devnos:
                if hub is None or devno not in hub.members:
                    self.settler.fence(app_id, devno)
        await self.sweeper.sweep("lapsed")

    def lose(self, hub: Hub, devno: int, epoch: int) -> None:
        """Another node has the device, with a claim of this epoch: the connection here can neither acknowledge, route
        nor erase anything any more (G5)."""
        member = hub.members.get(devno)
        if member is not None and member.epoch >= epoch:
            return
        self.settler.fence(hub.app.app_id, devno)
        if member is not None:
            self.metrics.takeovers.value += 1
            member.close("taken over", Reason.SESSION_TAKEN_OVER)
        hub.note_taken(devno, epoch, self.clock.now)

    def _moved(self, hub: Hub) -> None:
        """The app's ordinary topics are elsewhere, or there are some now: everybody comes in anew."""
        self.hubs.remove(hub)
        self.journal.drop(hub.app.app_id)
        for member in hub.everyone():
            member.close("app moved", Reason.USE_ANOTHER_SERVER)

    async def look_at_app(self, hub: Hub) -> None:
        """Whether the app changed or moved, or tokens were revoked, and nobody told. Raises StoreError."""
        if not await self.hubs.is_right(hub) and self.hubs.get(hub.app.app_id) is hub:
            self._moved(hub)
            return
        app = await self._store.find_app(hub.app.key)
        if app != hub.app and self.hubs.get(hub.app.app_id) is hub:
            self._apps.forget(hub.app.app_id)
            self._app_is(hub, app)
        for devno, generation in self._store.token_generations(hub.app.app_id).items():
            member = hub.members.get(devno)
            if member is not None and member.generation < generation:
                member.close("token revoked", Reason.NOT_AUTHORIZED)

    def _is_sure(self, session: Session, hub: Hub) -> None:
        """What the device acknowledged elsewhere is known now."""
        for push in hub.apply_newest_n(session):
            self.settler.note_evicted(push)

    def _unsettle(self, app_id: int, msg_id: int, devnos: BitMap) -> None:
        hub = self.hubs.get(app_id)
        if hub is not None:
            hub.unsettle(msg_id, devnos)

    def _find_hub(self, app_id: int) -> Hub | None:
        return self.hubs.get(app_id)

    # Connections

    def count_refusal(self, label: str) -> None:
        self.metrics.refusals.labels(label).value += 1

    def count_live(self, connection: Connection, version: str, change: int) -> None:
        self.live += change
        key = (connection.listener, version)
        self.live_by[key] = self.live_by.get(key, 0) + change

    def closed(self, connection: Connection, was: Phase, label: str, ending: Ending) -> None:
        self.arrivals.left(connection)
        if was is not Phase.LIVE:
            return
        hub, session = connection.hub, connection.session
        assert hub is not None
        assert session is not None
        self.tcp.left(connection)
        self.count_live(connection, str(session.encoding.version), -1)
        if connection.blocked:
            self.blocked -= 1
        wordless = ending is not Ending.ORDERLY
        self.witness.ended(connection, hub.app.app_id, session, label, wordless=wordless)
        self._leave(connection, hub, session, ending)
        self.metrics.disconnects.labels(label).value += 1
        log_event(
            log,
            logging.INFO,
            "disconnected",
            app=hub.app.key,
            device=connection.client_id,
            node=self.settings.node_id,
            reason=label,
        )

    def _leave(self, connection: Connection, hub: Hub, session: Session, ending: Ending) -> None:
        devno = session.devno
        if devno < 0:
            if hub.others.get(connection.key) is connection:
                del hub.others[connection.key]
        elif hub.members.get(devno) is connection:
            del hub.members[devno]
            hub.online.discard(devno)
            hub.endings.note(devno, ending)
            self._store.release_route(hub.app.app_id, devno, connection.epoch, self._wall())
        since = self.clock.wall - (self.clock.now - session.waiting_since)
        for push in session.unanswered():
            self.settler.note_unanswered(push, devno, since)
        self.keeper.leave(connection, hub, session)


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
    metrics.gauge(
        "connections_carried",
        "Connections passed on to the node where their app is at home.",
        lambda: len(node.tunnels),
    )
    metrics.gauge("connections_opening", "Connections before CONNACK.", lambda: len(node.arrivals.opening))
    metrics.gauge("connects_waiting", "CONNECTs that stand in line.", lambda: node.arrivals.waiting)
    metrics.gauge(
        "apps_loaded", "Apps with a device connected since the start.", lambda: len(node.hubs), merge="max"
    )
    metrics.gauge(
        "broadcasts_live",
        "Unexpired broadcasts that some device is still owed.",
        lambda: sum(1 for hub in node.hubs for _ in hub.broadcasts()),
        merge="max",
    )
    metrics.gauge("broadcasts_walking", "Broadcasts still being offered.", lambda: node.fanout.walking)
    metrics.gauge(
        "broadcast_devices_left", "Online devices that broadcasts still walk to.", lambda: node.fanout.left
    )
