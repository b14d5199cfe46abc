"""The fleet's store, on Redis or Valkey: the parts in `broker/redis/`, put together.

Data model: docs/decisions/0019-a-fleet-on-redis.md. Any number of processes may have one open on the same Redis.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar

from pyroaring import BitMap

from broker.bus_redis import RedisBus
from broker.metrics import Metrics
from broker.model import (
    AccessRule,
    Activity,
    App,
    Appended,
    AppSettings,
    AuditEntry,
    BehaviourEvent,
    Claim,
    Device,
    DeviceChange,
    MessageRecord,
    NewDevice,
    NewMessage,
    NodeInfo,
    OwedRequest,
    Receipt,
    RecordChange,
    Retained,
    Route,
    RouteCheck,
    SessionItem,
    Settled,
    Step,
    StoredBroadcast,
    StoredMessage,
    Term,
    TermKey,
    Withdrawn,
)
from broker.redis import durability
from broker.redis.activity import RedisActivity
from broker.redis.apps import RedisApps
from broker.redis.callbacks import RedisCallbacks, Telling
from broker.redis.endings import Endings
from broker.redis.engine import Engine
from broker.redis.files import RedisFiles
from broker.redis.generations import Generations
from broker.redis.homes import Homes
from broker.redis.log import Log
from broker.redis.metering import count_redis
from broker.redis.names import Names
from broker.redis.node_names import NodeNames
from broker.redis.nodes import RedisNodes
from broker.redis.partitions import Partitions
from broker.redis.records import RedisRecords
from broker.redis.registry import Registry
from broker.redis.reports import Reports
from broker.redis.rows import Rows
from broker.redis.sessions import RedisRetained, RedisSessions
from broker.redis.settling import Settling
from broker.redis.streams import RedisAudit, RedisEvents
from broker.redis.terms import Terms
from broker.redis.upkeep import MessageUpkeep
from broker.redis.withdrawing import Withdrawing, until_now
from broker.store import Callbacks, Files, Records, StoreUnavailable
from broker.telling.calendar import Calendar

log = logging.getLogger(__name__)
T = TypeVar("T")

DAY: Final = 86_400.0
KNOWN_LIMITS: Final = 100_000  # apps whose newest-N is remembered
EXPIRE_BUDGET: Final = 2_000  # rows that one part removes in one call of `expire`


class Expiring(Protocol):
    """A part that removes what is over."""

    async def expire(self, now: float, budget: int) -> int: ...


class Purging(Protocol):
    """A part that removes what a deleted app left: 0 where nothing is left."""

    async def purge(self, app_id: int, partitions: range, budget: int) -> int: ...


class RedisStore:
    """Implements `broker.store.Store`. `url`: see `broker.redis.engine.Engine`.

    `clock` gives Unix seconds. `node_clock` is that of the leases; None: Redis's own. Each write waits for `replicas`
    replicas. `checked`: refuse a Redis that may lose an answered write (durability.py)."""

    records: Records
    files: Files
    callbacks: Callbacks

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], float] = time.time,
        node_clock: Callable[[], float] | None = None,
        report_lifetime: float = 30 * DAY,
        cid_lifetime: float = 1 * DAY,
        event_lifetime: float = 7 * DAY,
        activity_lifetime: float = 61 * DAY,
        audit_lifetime: float = 365 * DAY,
        time_zone: str = "UTC",
        replicas: int = 0,
        checked: bool = True,
    ) -> None:
        self.engine = engine = Engine(url, replicas=replicas)
        self.stats = engine.stats
        self.activity_lifetime = activity_lifetime
        self.calendar = Calendar(time_zone)
        self.nodes = RedisNodes(engine, node_clock)
        self.bus = RedisBus(engine, self.nodes)
        self._open = False
        self._running = 0  # calls under way
        self._idle = asyncio.Event()
        self._checked = checked
        self._expiring: list[Expiring] = []
        self._purging: list[Purging] = []
        names = Names(engine)
        self._terms, self._generations = Terms(engine, names), Generations(engine)
        self._registry = Registry(
            engine, clock, names, self._terms, self._generations, self._check_app, self._last_seen
        )
        self._apps = RedisApps(engine, clock, self._generations, self._registry.span, self._purging)
        self._activity = RedisActivity(
            engine, clock, self.calendar, activity_lifetime, self._apps, self._apps.deleted.__contains__
        )
        self._expiring += (self._apps, self._activity)
        self._purging += (self._registry, self._activity)
        records, files = RedisRecords(engine), RedisFiles(engine, clock)
        self.records, self.files = records, files
        self._events = RedisEvents(engine, clock, event_lifetime)
        self._audit = RedisAudit(engine, clock, audit_lifetime)
        self._homes = Homes(engine, self.nodes)
        self._retained = RedisRetained(engine, clock, self.nodes.mine)
        self._sessions = RedisSessions(engine, self.nodes.mine)
        self._make_messages(clock, report_lifetime, cid_lifetime, event_lifetime, records)
        self._expiring += (files, self._audit)
        self._purging += (records, files, self._events, self._retained, self._sessions)

    def _make_messages(
        self,
        clock: Callable[[], float],
        report_lifetime: float,
        cid_lifetime: float,
        event_lifetime: float,
        records: RedisRecords,
    ) -> None:
        engine = self.engine
        self._limits: dict[int, int] = {}  # by app, newest-N
        self._partitions = inboxes = Partitions(engine, self.nodes, clock, self._activity.claimed)
        endings, names = Endings(engine, clock), NodeNames(engine)
        rows = Rows(engine, clock, report_lifetime, endings)
        telling = Telling(engine, rows)
        spread = until_now(engine, lambda app_id, msg_id: self._log.passed(app_id, msg_id))  # noqa: PLW0108
        self._settling = settling = Settling(engine, rows, inboxes, self.nodes, names, telling, spread)
        self._withdrawing = Withdrawing(engine, clock, rows, inboxes, settling, spread)
        self._reports = Reports(engine, clock, rows, names, settling, spread)
        upkeep = MessageUpkeep(engine, rows, endings, inboxes, settling, telling)
        self._log = Log(
            engine,
            clock,
            inboxes,
            rows,
            self._withdrawing,
            records,
            self.bus,
            offline_limit=self._offline_limit,
            cid_lifetime=cid_lifetime,
            processes=lambda: len(self.nodes.live),
        )
        callbacks = RedisCallbacks(engine, event_lifetime)
        self.callbacks = callbacks
        self.bus.read_broadcast = self._reports.read_broadcast
        self._expiring += (upkeep, inboxes, callbacks)
        self._purging += (upkeep, self._log, inboxes, callbacks)

    async def _offline_limit(self, app_id: int) -> int:
        """It never changes."""
        limit = self._limits.get(app_id)
        if limit is None:
            apps = await self._apps.list_apps(app_id - 1, 1)
            limit = apps[0].offline_limit if apps and apps[0].app_id == app_id else 0
            if len(self._limits) >= KNOWN_LIMITS:
                self._limits.clear()
            self._limits[app_id] = limit
        return limit

    def count_in(self, metrics: Metrics) -> None:
        """Metrics that only a fleet has."""
        count_redis(metrics, self.engine.stats, self.bus.stats)
        metrics.read_counter(
            "logs_left", "Logs of apps that were found with nobody to spread them.", lambda: self._log.left
        )

    # Life

    async def open(self) -> None:
        """Connect, check, and look who is there. Raises StoreUnavailable with what to do about it."""
        await self.engine.open()
        try:
            await durability.check(self.engine, self.engine.replicas, checked=self._checked)
            await self.nodes.open()
        except BaseException:
            await self.nodes.close()
            await self.engine.close()
            raise
        await self._generations.open()
        await self._apps.open()
        self._activity.open()
        self.bus.subscribe(self._generations.hear, self._generations.look)
        await self._log.open()
        self._open = True

    async def close(self) -> None:
        if not self._open:
            return
        self._open = False
        while self._running:
            self._idle.clear()
            await self._idle.wait()
        await self._log.close()
        await self._partitions.close()
        await self._registry.close()
        await self._activity.close()
        await self._apps.close()
        await self._generations.close()
        await self.bus.close()
        await self.nodes.close()
        await self.engine.close()

    async def _do(self, call: Coroutine[Any, Any, T]) -> T:
        """Every call goes through here, so that `close` can wait for it."""
        if not self._open:
            call.close()
            raise StoreUnavailable("the store is closed")
        self._running += 1
        try:
            return await call
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    def _check_app(self, app_id: int) -> None:
        """Raises StoreError for an app that was deleted."""
        self._apps.check(app_id)

    async def _last_seen(self, app_id: int, devnos: Sequence[int]) -> Mapping[int, float]:
        return await self._partitions.last_seen(app_id, devnos)

    def _check_open(self) -> None:
        """For the calls that are no coroutines."""
        if not self._open:
            raise StoreUnavailable("the store is closed")

    # Apps

    async def create_app(self, name: str, *, open: bool = False, offline_limit: int = 100) -> App:
        return await self._do(self._apps.create_app(name, open=open, offline_limit=offline_limit))

    async def find_app(self, key: str) -> App | None:
        return await self._do(self._apps.find_app(key))

    async def list_apps(self, after: int = 0, limit: int = 1000) -> list[App]:
        return await self._do(self._apps.list_apps(after, limit))

    async def rotate_secret(self, key: str) -> App | None:
        return await self._do(self._apps.rotate_secret(key))

    async def set_access(self, key: str, rules: Sequence[AccessRule]) -> App | None:
        return await self._do(self._apps.set_access(key, rules))

    async def set_settings(
        self, key: str, settings: AppSettings, former: AppSettings | None = None
    ) -> App | None:
        return await self._do(self._apps.set_settings(key, settings, former))

    async def delete_app(self, key: str) -> bool:
        return await self._do(self._apps.delete_app(key))

    # Devices and the index over them

    async def register(self, app_id: int, devices: Sequence[NewDevice]) -> list[Device]:
        return await self._do(self._registry.register(app_id, devices))

    async def register_new(self, app_id: int, device: NewDevice) -> Device | None:
        return await self._do(self._registry.register_new(app_id, device))

    async def find_devices(self, app_id: int, registration_ids: Sequence[str]) -> dict[str, Device]:
        return await self._do(self._registry.find_devices(app_id, registration_ids))

    async def resolve(self, app_id: int, registration_ids: Sequence[str]) -> dict[str, int]:
        return await self._do(self._registry.resolve(app_id, registration_ids))

    async def resolve_bitmap(self, app_id: int, registration_ids: Sequence[str]) -> BitMap:
        return await self._do(self._registry.resolve_bitmap(app_id, registration_ids))

    async def names(self, app_id: int, devnos: Sequence[int]) -> dict[int, str]:
        return await self._do(self._registry.names(app_id, devnos))

    async def change_devices(self, app_id: int, changes: Mapping[str, DeviceChange]) -> dict[str, Device]:
        return await self._do(self._registry.change_devices(app_id, changes))

    async def postings(self, app_id: int, terms: Sequence[TermKey]) -> list[BitMap]:
        return await self._do(self._terms.postings(app_id, terms))

    async def union_bitmap(self, app_id: int, kind: Term, values: Sequence[str]) -> BitMap:
        return await self._do(self._terms.union(app_id, kind, values))

    async def list_terms(self, app_id: int, kind: str) -> list[str]:
        return await self._do(self._terms.list_terms(app_id, Term(kind)))

    async def drop_term(self, app_id: int, term: TermKey, only: BitMap | None = None) -> BitMap:
        return await self._do(self._registry.drop_term(app_id, term, only))

    # Who was there when. Exempt from S1: a crash may lose the last seconds

    async def active(self, app_id: int, activity: Activity, start: float, end: float) -> BitMap:
        return await self._do(self._activity.active(app_id, activity, start, end))

    async def active_counts(
        self, app_id: int, activity: Activity, stretches: Sequence[tuple[float, float]]
    ) -> list[int]:
        return await self._do(self._activity.active_counts(app_id, activity, stretches))

    async def registered_before(self, app_id: int, times: Sequence[float]) -> list[int]:
        return await self._do(self._registry.registered_before(app_id, times))

    def token_generations(self, app_id: int) -> Mapping[int, int]:
        return self._generations.of(app_id)

    # Messages

    async def append(
        self, messages: Sequence[NewMessage], changes: Sequence[RecordChange] = ()
    ) -> list[Appended]:
        return await self._do(self._log.append(messages, changes))

    async def find_cids(self, app_id: int, cids: Sequence[str]) -> dict[str, Appended]:
        return await self._do(self._log.find_cids(app_id, cids))

    async def fetch_owed(self, requests: Sequence[OwedRequest]) -> list[list[StoredMessage]]:
        return await self._do(self._log.fetch_owed(requests))

    async def live_broadcasts(self, app_id: int) -> list[StoredBroadcast]:
        return await self._do(self._reports.live_broadcasts(app_id))

    async def settle(self, settled: Sequence[Settled]) -> None:
        return await self._do(self._settling.settle(settled))

    async def recall(self, app_id: int, msg_ids: Sequence[int], now: float) -> list[Withdrawn]:
        return await self._do(self._withdrawing.recall(app_id, msg_ids, now))

    async def find_messages(self, app_id: int, msg_ids: Sequence[int]) -> dict[int, MessageRecord]:
        return await self._do(self._reports.find_messages(app_id, msg_ids))

    async def find_steps(self, app_id: int, msg_id: int) -> list[Step]:
        return await self._do(self._reports.find_steps(app_id, msg_id))

    async def record_receipts(self, receipts: Sequence[Receipt]) -> None:
        for receipt in receipts:
            if receipt.event != "shown":
                self._activity.note_active(receipt.app_id, receipt.devno)
        await self._do(self._settling.record_receipts(receipts))

    async def record_events(self, events: Sequence[BehaviourEvent]) -> None:
        for event in events:
            self._activity.note_active(event.app_id, event.devno)
        for event in events:
            self._activity.note_active(event.app_id, event.devno)
        await self._do(self._events.record(events))

    async def list_events(self, app_id: int, after: int, limit: int) -> list[tuple[int, BehaviourEvent]]:
        return await self._do(self._events.list(app_id, after, limit))

    # Administrative calls

    async def record_audit(self, entries: Sequence[AuditEntry]) -> None:
        await self._do(self._audit.record(entries))

    async def list_audit(self, app_id: int | None, before: int, limit: int) -> list[tuple[int, AuditEntry]]:
        return await self._do(self._audit.list(app_id, before, limit))

    # Ordinary retained messages

    async def retain(self, retained: Sequence[Retained]) -> None:
        await self._do(self._retained.retain(retained))

    async def list_retained(self, app_id: int) -> list[Retained]:
        return await self._do(self._retained.list(app_id))

    async def find_home(self, app_id: int) -> NodeInfo | None:
        return await self._do(self._homes.find(app_id))

    # Durable MQTT sessions

    async def save_session_items(self, items: Sequence[SessionItem]) -> None:
        await self._do(self._sessions.save(items))

    async def list_session_items(self, app_id: int) -> list[SessionItem]:
        return await self._do(self._sessions.list(app_id))

    # Routes

    def claim_route(self, app_id: int, devno: int, node_id: str, done: Callable[[Claim], None]) -> None:
        self._check_open()
        self._partitions.claim_route(app_id, devno, node_id, done)

    def release_route(self, app_id: int, devno: int, epoch: int, now: float) -> None:
        self._check_open()
        self._activity.released(app_id, devno)
        self._partitions.release_route(app_id, devno, epoch, now)

    async def inspect_routes(self, app_id: int, routes: Mapping[int, int]) -> RouteCheck:
        return await self._do(self._partitions.inspect_routes(app_id, routes))

    async def find_routes(self, app_id: int, devnos: Sequence[int]) -> dict[int, Route]:
        return await self._do(self._partitions.find_routes(app_id, devnos))

    async def online(self, app_id: int, devnos: BitMap | None = None) -> BitMap:
        return await self._do(self._partitions.online(app_id, devnos))

    # Upkeep

    async def expire(self, now: float) -> int:
        return await self._do(self._expire(now))

    async def _expire(self, now: float) -> int:
        return sum([await part.expire(now, EXPIRE_BUDGET) for part in self._expiring])
