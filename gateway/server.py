"""The whole service in one process: store, bus, broker, node and listeners, opened and closed in order."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from broker.admin import AdminListener, Health, LocalActions, describe_app
from broker.api.door import Door
from broker.api.http import build_api
from broker.api.peers import Peers
from broker.broker import Broker
from broker.bus_local import LocalBus
from broker.command import make_store
from broker.config import Config, is_loopback
from broker.logs import log_event
from broker.metrics import HttpMetrics, LoopLag, Metrics, StoreMetrics
from broker.model import App
from broker.store import StoreError
from broker.telling.callbacks import CallbackMetrics
from gateway.carriers import Carriers
from gateway.doorkeeper import DoorLimits
from gateway.listeners import Certificate, TlsError, address_of, format_address, listen_tcp, listen_websocket
from gateway.mailbox import MailboxLimits
from gateway.node import Node, NodeSettings

if TYPE_CHECKING:
    from broker.bridging.bridge import Bridge

DEMO_APP: Final = "demo"
UPKEEP_PAUSE: Final = 5.0  # seconds between looks for expired data
UPKEEP_BREATH: Final = 0.05  # seconds between slices while there is some

log = logging.getLogger(__name__)


class StartError(Exception):
    """The service cannot run like this; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Listening:
    """Addresses that are really bound, None where a listener is off."""

    mqtt: str | None
    mqtts: str | None
    ws: str | None
    http: str
    admin: str
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
            "data_dir": str(config.server.data_dir),
            "demo_app": describe_app(self.demo_app) if self.demo_app else None,
            "anonymous_app": describe_app(self.anonymous_app) if self.anonymous_app else None,
        }


class Service:
    """`open`, then `close`, once each, on one event loop."""

    def __init__(self, config: Config) -> None:
        self._config = config
        loop = asyncio.get_running_loop()
        self.metrics = Metrics()
        self.health = Health()
        self._lag = LoopLag(self.metrics, loop)
        self._store = make_store(config)
        store_metrics = StoreMetrics(self.metrics, self._store.stats)
        self._store.stats.on_commit = store_metrics.on_commit
        self.health.checks.append(store_metrics.refusing)
        self._bus = LocalBus()
        self._broker = Broker(self._store, self._bus, config.limits(), callbacks=config.callback_settings())
        CallbackMetrics(self.metrics, self._broker.callbacks.stats)
        self._broker.count_in(self.metrics)
        self.node = Node(
            _node_settings(config),
            store=self._store,
            bus=self._bus,
            apps=self._broker.apps,
            devices=self._broker.devices,
            pushes=self._broker.pushes,
            reports=self._broker.reports,
            carriers=Carriers(config.carriers.directory),
            metrics=self.metrics,
        )
        peers = Peers(config.trusted_proxies, https_only=config.http.https_only)
        api = build_api(self._broker, HttpMetrics(self.metrics).observe, peers)
        self._door = Door(config.http.max_connections, config.http.request_timeout)
        self._door.count_in(self.metrics)
        self._api = self._door.runner(api)
        self._certificate: Certificate | None = None
        self._servers: list[asyncio.Server] = []
        self._admin: AdminListener | None = None
        self._upkeep: asyncio.Task[None] | None = None
        self._bridge = self._make_bridge()

    async def open(self) -> Listening:
        """Raises StoreError, TlsError, OSError (an address in use) or StartError; call close after any."""
        config = self._config
        _check_anonymous(config)
        config.server.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if config.mqtt.tls_port is not None:
            assert config.mqtt.certificate is not None  # config.py checks that
            assert config.mqtt.private_key is not None
            self._certificate = Certificate(config.mqtt.certificate, config.mqtt.private_key)
        await self._store.open()
        await self._broker.open()
        demo_app = await self._demo_app()
        anonymous_app = await self._anonymous_app()
        actions = LocalActions(self._broker, config.push.offline_limit)
        self._admin = AdminListener(config, actions, self.metrics, self.health, self._lag)
        admin = await self._admin.open()
        self.node.start()
        await self._door.open(self._api, config.server.host, config.http.port)
        listening = Listening(
            mqtt=await self._listen_tcp(config.mqtt.port, None),
            mqtts=await self._listen_tcp(config.mqtt.tls_port, self._certificate),
            ws=await self._listen_websocket(config.mqtt.ws_port),
            http=format_address(self._api.addresses[0]),
            admin=admin.removeprefix("http://"),
            demo_app=demo_app,
            anonymous_app=anonymous_app,
        )
        self._upkeep = asyncio.get_running_loop().create_task(self._keep_up())
        if self._bridge is not None:
            await self._bridge.open()
        self.health.state = "ready"
        tune_interpreter()
        return listening

    def _make_bridge(self) -> Bridge | None:
        if self._config.bridge.host is None:
            return None
        from broker.bridging.bridge import make_bridge  # an MQTT client: 4 MB that few need

        return make_bridge(self._config, self._broker.apps, self._broker.pushes, self.metrics)

    async def _demo_app(self) -> App | None:
        """The app of the first steps: open, so it must not be reachable from outside."""
        found = await self._find_open_app(DEMO_APP)
        if self._config.on_loopback and self._config.server.demo_app:
            return found or await self._create_open_app(DEMO_APP)
        if found is not None and not self._config.on_loopback:
            raise StartError(
                f"the data directory {self._config.server.data_dir} holds the demo app, which anybody may join; "
                f"remove it with `holdfast app delete {found.key}`, or listen on a loopback address only"
            )
        return None

    async def _anonymous_app(self) -> App | None:
        """The app of those who bring no credentials; the node is told before it listens."""
        name = self._config.mqtt.anonymous_app
        if name is None:
            return None
        app = await self._find_open_app(name) or await self._create_open_app(name)
        self.node.settings = replace(self.node.settings, anonymous_app=app.key)
        log_event(log, logging.WARNING, "connections without credentials are taken in", app=app.key)
        return app

    async def _find_open_app(self, name: str) -> App | None:
        """The oldest of that name."""
        last = 0
        while page := await self._store.list_apps(last):
            for app in page:
                if app.name == name and app.open:
                    return app
            last = page[-1].app_id
        return None

    async def _create_open_app(self, name: str) -> App:
        return await self._broker.apps.create(name, open=True, offline_limit=self._config.push.offline_limit)

    async def _listen_tcp(self, port: int | None, certificate: Certificate | None) -> str | None:
        if port is None:
            return None
        self._servers.append(await listen_tcp(self.node, self._config.server.host, port, certificate))
        return address_of(self._servers[-1])

    async def _listen_websocket(self, port: int | None) -> str | None:
        if port is None:
            return None
        mqtt, host = self._config.mqtt, self._config.server.host
        self._servers.append(await listen_websocket(self.node, host, port, mqtt.ws_origins))
        return address_of(self._servers[-1])

    async def _keep_up(self) -> None:
        """Remove what is over, a slice at a time."""
        while True:
            try:
                removed = await self._store.expire(self.node.clock.wall)
            except StoreError as error:
                removed = 0
                log.warning("expired data not removed, trying again: %s", error)
            await asyncio.sleep(UPKEEP_BREATH if removed else UPKEEP_PAUSE)

    def reload_certificate(self) -> None:
        """On SIGHUP. Live connections go on undisturbed."""
        if self._certificate is None:
            return
        try:
            self._certificate.reload()
            log_event(log, logging.INFO, "certificate reloaded")
        except TlsError as error:
            log.error("certificate not reloaded, the old one stays: %s", error)

    async def close(self) -> None:
        """Drain: accept nothing new, tell the devices, record what they acknowledged, then let go."""
        self.health.state = "draining"
        log_event(log, logging.INFO, "draining", connections=self.node.live)
        for server in self._servers:
            server.close()
        for site in list(self._api.sites):
            await site.stop()
        if self._bridge is not None:
            await self._bridge.close()
        await self.node.drain(self._config.server.drain_limit / 2)
        await self._api.cleanup()
        if self._upkeep is not None:
            self._upkeep.cancel()
            await asyncio.wait([self._upkeep])
        await self.node.close()
        await self._broker.close()
        await self._store.close()
        self._lag.close()
        if self._admin is not None:
            await self._admin.close()


def _check_anonymous(config: Config) -> None:
    """Raises StartError where strangers could reach what asks for no credentials."""
    name, host = config.mqtt.anonymous_app, config.server.host
    if name is not None and not is_loopback(host) and not config.mqtt.anonymous_anywhere:
        raise StartError(
            f"mqtt.anonymous_app = {name!r} takes in everybody without credentials, and server.host = {host!r} is "
            "open to others than this machine; set server.host to a loopback address, mqtt.anonymous_app to off, or "
            "mqtt.anonymous_anywhere to true if that is meant"
        )


def tune_interpreter() -> None:
    """For one busy event loop beside the store's threads.

    A thread of the store that needs the interpreter waits at most half a millisecond for the loop to let go of
    it: Python's own 5 ms, met several times in a commit, would be the latency of a push. Connections are
    long-lived and few of them are garbage: what start-up made is never looked at again, and collections are rare
    (a full one over a million objects stops the loop for a quarter of a second).
    """
    sys.setswitchinterval(0.0005)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


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
        doors=DoorLimits(mqtt.max_connections_per_address, mqtt.connect_rate, mqtt.connect_rate_per_address),
        mailbox=MailboxLimits(
            subscriptions=mqtt.max_subscriptions,
            queued_messages=mqtt.max_queued,
            queued_bytes=mqtt.max_queued_bytes,
        ),
    )
