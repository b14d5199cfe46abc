"""One process of the service: store, bus, broker, node and listeners, opened and closed in order.

Its role says which of them it has: `gateway` holds devices, `broker` serves the HTTP API and does what happens later,
`all` is both. A worker (decision 0021) shares its ports with others, and answers its supervisor instead of the
operator.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import msgspec

from broker.admin import AdminListener, Health, LocalActions, ProcessOverview, describe_app
from broker.broker import Broker
from broker.carriers.catalog import Carriers
from broker.carriers.reading import CarrierError
from broker.command import count_store, make_bus, make_store
from broker.config import Config
from broker.dispatch.udp import DispatchDoor
from broker.logs import log_event
from broker.metrics import HttpMetrics, LoopLag, Metrics, StoreMetrics
from broker.metrics_merge import export
from broker.model import App, NodeInfo
from broker.pulse import rest
from broker.store import Conflict, StoreError
from broker.telling.callbacks import CallbackMetrics
from gateway import sockets
from gateway.collector import Collector
from gateway.connection import FROM_NODES
from gateway.doorkeeper import DoorLimits
from gateway.inquiries import Inquiries
from gateway.listeners import (
    Certificate,
    Listener,
    TlsError,
    address_of,
    format_address,
    listen_tcp,
    listen_to_nodes,
    listen_websocket,
)
from gateway.mailbox import MailboxLimits
from gateway.membership import Membership
from gateway.node import Node, NodeSettings
from gateway.open_apps import OpenApps, StartError, check_anonymous

if TYPE_CHECKING:
    from aiohttp import web

    from broker.api.door import Door
    from broker.bridging.bridge import Bridge

UPKEEP_PAUSE: Final = 5.0  # seconds between looks for expired data
UPKEEP_BREATH: Final = 0.05  # seconds between slices while there is some
ROOM_PAUSE: Final = 0.1  # seconds between looks whether a worker is full
ROOM_AGAIN: Final = 0.98  # of mqtt.max_connections: below it, a worker that was full listens again
SPARE_FILES: Final = 64  # for the store, logs, and what Python opens
JOIN_PAUSE: Final = 0.5  # seconds between tries to get the name of a process that was killed

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listening:
    """Addresses that are really bound, None where a listener is off."""

    mqtt: str | None
    mqtts: str | None
    ws: str | None
    http: str | None
    admin: str | None  # of a worker: its supervisor's
    demo_app: App | None
    anonymous_app: App | None

    def as_json(self, config: Config) -> dict[str, object]:
        return {
            "event": "listening",
            "mqtt": self.mqtt,
            "mqtts": self.mqtts,
            "ws": self.ws,
            "http": self.http,
            "admin": self.admin,
            "node": config.server.node_id,
            "role": config.server.role,
            "data_dir": str(config.server.data_dir),
            "demo_app": describe_app(self.demo_app) if self.demo_app else None,
            "anonymous_app": describe_app(self.anonymous_app) if self.anonymous_app else None,
        }


@dataclass(frozen=True, slots=True)
class Seat:
    """A worker's place under its supervisor."""

    answers_at: str  # where it answers inquiries
    admin: str  # where the operator is answered for all of them


class WorkerHealth(msgspec.Struct, frozen=True, array_like=True):
    """What a worker says of itself."""

    reasons: list[str]
    connections: int
    loop_lag: float


class Service:
    """`open`, then `close`, once each, on one event loop. `seat`: it is a worker."""

    def __init__(self, config: Config, seat: Seat | None = None) -> None:
        self._config = config
        self._seat = seat
        loop = asyncio.get_running_loop()
        self._started_at = time.time()
        self.metrics = Metrics()
        self.health = Health()
        self._lag = LoopLag(self.metrics, loop)
        self.carriers = Carriers(config.carriers.directory)
        self._reloading = asyncio.Lock()  # of the carriers: what was read last counts
        self._store = make_store(config, checked=seat is None)  # the supervisor has checked it
        store_metrics = StoreMetrics(self.metrics, self._store.stats)
        self._store.stats.on_commit = store_metrics.on_commit
        self.health.checks.append(store_metrics.refusing)
        count_store(config, self._store, self.metrics)
        self._bus = make_bus(config, self._store)
        self._broker = Broker(
            self._store,
            self._bus,
            config.limits(),
            callbacks=config.callback_settings(),
            carriers=self.carriers,
            dispatch_ttl=config.dispatch.ttl,
        )
        self._membership = Membership(self._store.nodes, self._tell, self.metrics)
        self.node = self._make_node() if config.serves_devices else None
        self._door: Door | None = None
        self._api: web.AppRunner | None = None
        self.dispatch_door: DispatchDoor | None = None
        if config.serves_api:
            CallbackMetrics(self.metrics, self._broker.callbacks.stats)
            self._broker.count_in(self.metrics)
            self._make_api()
        self._certificate: Certificate | None = None
        self._servers: dict[str, Listener] = {}  # by name: tcp, tls, ws, node
        self._admin: AdminListener | None = None
        self._inquiries = Inquiries({"metrics": self._export, "health": self._report})
        self._address = ""  # where devices reach it
        self._direct = ""  # where other nodes do
        self._tasks: list[asyncio.Task[None]] = []
        self._bridge = self._make_bridge()

    def _make_node(self) -> Node:
        return Node(
            _within_files(_node_settings(self._config), self._config),
            store=self._store,
            bus=self._bus,
            apps=self._broker.apps,
            devices=self._broker.devices,
            pushes=self._broker.pushes,
            reports=self._broker.reports,
            carriers=self.carriers,
            metrics=self.metrics,
            membership=self._membership,
            learning=self._broker.learning,
        )

    def _make_api(self) -> None:
        from broker.api.door import Door  # a gateway has no use for it
        from broker.api.http import build_api
        from broker.api.peers import Peers

        http = self._config.http
        peers = Peers(self._config.trusted_proxies, https_only=http.https_only)
        self._door = Door(
            http.max_connections,
            http.request_timeout,
            per_address=http.max_connections_per_address,
            proxies=self._config.trusted_proxies,
        )
        self._door.count_in(self.metrics)
        if self._config.dispatch.udp_port is not None:
            self.dispatch_door = DispatchDoor(self._broker.dispatch)
            self.dispatch_door.count_in(self.metrics)
        self._api = self._door.runner(build_api(self._broker, HttpMetrics(self.metrics).observe, peers))

    async def open(self) -> Listening:
        """Raises StoreError, TlsError, OSError (an address in use) or StartError; call close after any."""
        config = self._config
        check_anonymous(config)
        if self._seat is None:
            config.server.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if config.serves_devices and config.mqtt.tls_port is not None:
            assert config.mqtt.certificate is not None  # config.py checks that
            assert config.mqtt.private_key is not None
            self._certificate = Certificate(config.mqtt.certificate, config.mqtt.private_key)
        await self._store.open()
        apps = OpenApps(config, self._store, self._broker.apps)
        demo_app = await apps.demo_app() if self._seat is None else None
        anonymous_app = await apps.anonymous_app()
        if self.node is not None and anonymous_app is not None:  # told before it listens
            self.node.settings = replace(self.node.settings, anonymous_app=anonymous_app.key)
        admin = await self._open_admin()
        await self._join()
        await self._broker.learning.open(config.server.node_id)
        if config.serves_api:
            await self._broker.open()
        if self.node is not None:
            self.node.start()
        http = await self._listen_http()
        mqtt, mqtts, ws = self._listen_devices()
        self._address = config.server.advertise or mqtts or mqtt or ""
        await self._membership.beat()  # with the address
        self._start_tasks()
        if self._bridge is not None:
            await self._bridge.open()
        self.health.state = "ready"
        tune_interpreter(self.metrics)
        return Listening(mqtt, mqtts, ws, http, admin, demo_app, anonymous_app)

    async def _open_admin(self) -> str | None:
        if self._seat is not None:
            await self._inquiries.open(self._seat.answers_at)
            return None
        actions = LocalActions(self._broker, self._config.push.offline_limit)
        overview = ProcessOverview(self.metrics, self.health, self._lag)
        self._admin = AdminListener(self._config, actions, overview)
        return (await self._admin.open()).removeprefix("http://")

    async def _join(self) -> None:
        """A process of this name that was killed has it for the rest of its lease."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._store.nodes.lease + JOIN_PAUSE
        while True:
            try:
                await self._membership.join()
                return
            except Conflict as error:
                if loop.time() >= until:
                    raise StartError(f"{error}; server.node_id sets its name") from error
                log_event(log, logging.WARNING, "the name is still taken", node=self._config.server.node_id)
                await asyncio.sleep(JOIN_PAUSE)

    def _tell(self) -> NodeInfo:
        """What the other processes know of this one."""
        server, node = self._config.server, self.node
        admin = (
            self._seat.admin
            if self._seat
            else self._admin.address.removeprefix("http://")
            if self._admin
            else ""
        )
        return NodeInfo(
            server.node_id,
            role=server.role,
            address=self._address,
            direct=_reachable(self._direct, self._address),
            admin=admin,
            pid=os.getpid(),
            started_at=self._started_at,
            connections=0 if node is None else node.live,
            draining=self.health.state == "draining" or (node is not None and node.draining),
            version=_version(),
            tls=self._config.mqtt.tls_port is not None,
        )

    def _make_bridge(self) -> Bridge | None:
        if self._config.bridge.host is None:
            return None
        from broker.bridging.bridge import make_bridge  # an MQTT client: 4 MB that few need

        broker = self._broker
        return make_bridge(self._config, broker.apps, broker.pushes, self.metrics, self._store.records)

    # Listeners

    @property
    def _shared(self) -> bool:
        return self._seat is not None

    async def _listen_http(self) -> str | None:
        if self._door is None or self._api is None:
            return None
        config = self._config
        await self._door.open(self._api, config.server.host, config.http.port, shared=self._shared)
        if self.dispatch_door is not None and config.dispatch.udp_port is not None:
            host, port = config.server.host, config.dispatch.udp_port
            bound = await self.dispatch_door.open(host, port, shared=self._shared)
            log_event(log, logging.INFO, "dispatch over UDP", address=format_address(bound))
        return format_address(self._api.addresses[0])

    def _listen_devices(self) -> tuple[str | None, str | None, str | None]:
        """Over TCP, TLS and WebSocket."""
        node, mqtt, host, shared = self.node, self._config.mqtt, self._config.server.host, self._shared
        proxies = self._config.device_proxies
        if node is None:
            return None, None, None
        tcp = tls = ws = None
        if not self._membership.alone:
            self._direct = self._add(FROM_NODES, listen_to_nodes(node, host))
        if mqtt.port is not None:
            tcp = self._add("tcp", listen_tcp(node, host, mqtt.port, shared=shared, proxies=proxies))
        if mqtt.tls_port is not None:
            listener = listen_tcp(
                node, host, mqtt.tls_port, self._certificate, shared=shared, proxies=proxies
            )
            tls = self._add("tls", listener)
        if mqtt.ws_port is not None:
            listener = listen_websocket(
                node, host, mqtt.ws_port, mqtt.ws_origins, shared=shared, proxies=proxies
            )
            ws = self._add("ws", listener)
        return tcp, tls, ws

    def _add(self, name: str, server: Listener) -> str:
        self._servers[name] = server
        self._clamp()
        return address_of(server)

    def _clamp(self) -> None:
        for name, server in self._servers.items():
            if name != FROM_NODES:
                sockets.clamp(server.sockets, self.carriers.catalog, name)

    def _stop_listening(self) -> None:
        servers, self._servers = self._servers, {}
        for server in servers.values():
            server.close()

    # In the background

    def _start_tasks(self) -> None:
        loop = asyncio.get_running_loop()
        if self._config.serves_api:
            self._tasks.append(loop.create_task(self._keep_up()))
        if self._seat is not None and self.node is not None:
            self._tasks.append(loop.create_task(self._mind_room(self.node)))

    async def _keep_up(self) -> None:
        """Remove what is over, a slice at a time."""
        while True:
            try:
                removed = await self._store.expire(self._broker.clock())
            except StoreError as error:
                removed = 0
                log.warning("expired data not removed, trying again: %s", error)
            await rest(UPKEEP_BREATH if removed else UPKEEP_PAUSE)

    async def _mind_room(self, node: Node) -> None:
        """A worker that is full, or drained, leaves the ports to the others: the kernel would go on to give it its
        share of those that connect, which it could only refuse."""
        most = node.settings.max_connections
        while True:
            await asyncio.sleep(ROOM_PAUSE)
            connections = node.live + len(node.arrivals.opening)
            if self._servers and (connections >= most or node.draining):
                self._stop_listening()
                log_event(log, logging.WARNING, "full or drained, not listening", connections=connections)
            elif not self._servers and connections < most * ROOM_AGAIN and not node.draining:
                self._listen_devices()
                log_event(log, logging.INFO, "listening again", connections=connections)

    def reload(self) -> None:
        """On SIGHUP. Live connections go on undisturbed."""
        self._reload_certificate()
        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(asyncio.get_running_loop().create_task(self._reload_carriers()))

    async def _reload_carriers(self) -> None:
        try:
            async with self._reloading:
                await asyncio.to_thread(self.carriers.reload)
        except CarrierError as error:
            log.error("carrier profiles not reloaded, the old ones stay: %s", error)
        else:
            self._clamp()
            count = len(self.carriers.catalog.profiles)
            log_event(log, logging.INFO, "carrier profiles reloaded", profiles=count)

    def _reload_certificate(self) -> None:
        if self._certificate is None:
            return
        try:
            self._certificate.reload()
            log_event(log, logging.INFO, "certificate reloaded")
        except TlsError as error:
            log.error("certificate not reloaded, the old one stays: %s", error)

    # Of a worker

    def _export(self) -> bytes:
        return export(self.metrics)

    def _report(self) -> bytes:
        connections = 0 if self.node is None else self.node.live
        return msgspec.msgpack.encode(WorkerHealth(self.health.reasons(), connections, self._lag.last))

    # The end

    async def close(self) -> None:
        """Drain: accept nothing new, tell the devices, record what they acknowledged, then let go."""
        self.health.state = "draining"
        node = self.node
        log_event(log, logging.INFO, "draining", connections=0 if node is None else node.live)
        await self._membership.tell()  # that it is draining: who lives here finds another home
        await self._end_tasks()
        self._stop_listening()
        for site in list(self._api.sites) if self._api is not None else ():
            await site.stop()
        if self.dispatch_door is not None:
            await self.dispatch_door.close()
        if self._bridge is not None:
            await self._bridge.close()
        if node is not None:
            await node.drain(self._config.server.drain_limit / 2)
        if self._api is not None:
            await self._api.cleanup()
        if node is not None:
            await node.close()
        await self._broker.close()
        await self._broker.learning.close()
        await self._membership.leave()
        await self._store.close()
        self._lag.close()
        if self._admin is not None:
            await self._admin.close()
        await self._inquiries.close()

    async def give_up(self) -> None:
        """After an `open` that failed: the name is free for the next try."""
        await self._membership.leave()

    async def _end_tasks(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def raise_file_limit() -> int:
    """Each connection is a file: allow as many as the system does, and return how many that is."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def _within_files(settings: NodeSettings, config: Config) -> NodeSettings:
    """With no more connections than there are files for them: who comes beyond is told so, and the store and the
    operator still get theirs."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = SPARE_FILES + (config.http.max_connections if config.serves_api else 0)
    room = max(files - others, files // 2)
    if settings.max_connections <= room:
        return settings
    log_event(
        log,
        logging.WARNING,
        "the limit of open files lowers mqtt.max_connections",
        files=files,
        wanted=settings.max_connections,
        connections=room,
    )
    return replace(settings, max_connections=room)


def _reachable(bound: str, advertised: str) -> str:
    """The port of the one, and where it is bound to all addresses the host of the other."""
    host, colon, port = bound.rpartition(":")
    if host in ("0.0.0.0", "[::]"):
        host = advertised.rpartition(":")[0]
    return f"{host}{colon}{port}"


@cache
def _version() -> str:
    return version("holdfast")


def tune_interpreter(metrics: Metrics) -> None:
    """For one busy event loop beside the store's threads.

    A thread of the store that needs the interpreter waits at most half a millisecond for the loop to let go of
    it: Python's own 5 ms, met several times in a commit, would be the latency of a push.
    """
    sys.setswitchinterval(0.0005)
    Collector(metrics).start()


def _node_settings(config: Config) -> NodeSettings:
    mqtt = config.mqtt
    return NodeSettings(
        node_id=config.server.node_id,
        connect_timeout=mqtt.connect_timeout,
        max_packet_size=mqtt.max_packet_size,
        max_connections=mqtt.max_connections,
        max_connecting=mqtt.max_connecting,
        keep_alive_max=mqtt.keep_alive_max,
        session_expiry_max=mqtt.session_expiry_max,
        window=mqtt.max_inflight,
        receive_maximum=mqtt.receive_maximum,
        max_retained=mqtt.max_retained,
        max_retained_bytes=mqtt.max_retained_bytes,
        max_sessions=mqtt.max_sessions,
        max_topic_length=mqtt.max_topic_length,
        max_topic_levels=mqtt.max_topic_levels,
        keep_alive_min=mqtt.keep_alive_min,
        topic_alias_maximum=mqtt.topic_alias_maximum,
        sys_interval=mqtt.sys_interval,
        admit_rate=mqtt.admit_rate,
        drain_rate=mqtt.drain_rate,
        doors=DoorLimits(mqtt.max_connections_per_address, mqtt.connect_rate, mqtt.connect_rate_per_address),
        mailbox=MailboxLimits(
            subscriptions=mqtt.max_subscriptions,
            queued_messages=mqtt.max_queued,
            queued_bytes=mqtt.max_queued_bytes,
        ),
        gives_way=config.store.kind == "redis",  # its nodes and brokers may share it
    )
