"""Telling publishers what became of their pushes: signed POSTs, in batches, tried again, never in anybody's way.

The store enters each event in the transaction in which it happened, so none is lost; here they are claimed, sent and
taken out. An event goes out at least once: a receiver that saw it while its answer was lost sees the same `event_id`
again. Events of one app and URL form a lane. A lane has one POST at a time, so they arrive in order while all goes
well; a lane whose receiver fails waits, the longer the more often it failed, and what comes for it meanwhile is
handed back to the store untried. So is what an app or a receiver has no room for. What is handed back comes again
spread out (Turns), so a long queue for one is neither read again and again nor stands before the others' events.

Nobody can take all of the room. An app may hold as many events, and have as many POSTs under way, as are still free
for all others: half if it is alone, a third each if they are two. The same holds within an app for its hosts.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import random
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import aiohttp
import orjson
from yarl import URL

from broker.logs import log_event
from broker.metrics import Metrics
from broker.model import App, CallbackEvent
from broker.pulse import end_of_pause
from broker.store import Store, StoreError
from broker.telling.callback_urls import CALLER, CheckedResolver, Refused, check_literal

log: Final = logging.getLogger(__name__)
DAY: Final = 86_400.0

PAUSE: Final = 1.0  # between looks at the store; also how long events gather
BREATH: Final = 0.05  # between two looks while there is more: the writer is for pushes
CLAIMED: Final = 2000  # events of one look
BREATH_EVENTS: Final = 100  # of them taken in one go
HELD: Final = 20_000  # weight of the events in memory, some 20 MB; the others stay in the store
WEIGHED_DEVICES: Final = 50  # devices that weigh as much as an event
BATCH_EVENTS: Final = 200  # of one POST
BATCH_BYTES: Final = 256 << 10  # of one POST's body, by estimate
LANES: Final = (
    4096  # app and URL pairs remembered; past it the failures of the oldest idle ones are forgotten
)
LEASE: Final = 120.0  # what was claimed and not begun by then is due again
CROWDED: Final = 0.5  # until events that found no room are looked at again, at least
LEAST_RATE: Final = 500.0  # handed-back events that come again each second, however slow the receiver is
COUNT_PAUSE: Final = 10.0  # between two counts of what waits, for the metrics
ERROR_SIZE: Final = 200  # characters of an error that are kept
EVENT_BYTES: Final = 160  # of an event's JSON, less params and ids
ID_BYTES: Final = 70  # of one registration id in JSON, at most
SECRET_LABEL: Final = b"holdfast callback signature"

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class CallbackSettings:
    """Times are seconds."""

    timeout: float = 10.0  # of one POST, from name look-up to the answer's head
    first_pause: float = 5.0  # after a first failure; doubled for each further one
    max_pause: float = 900.0
    max_attempts: int = 100  # then an event is parked
    max_age: float = DAY  # or when it is so old
    connections: int = 64
    connections_per_host: int = 4
    private_addresses: bool = False  # may callbacks go to loopback, private and link-local addresses?


# Signature


def signing_secret(app: App) -> str:
    """What signs an app's callbacks; shown to its owner."""
    return hmac.new(app.signing_key, SECRET_LABEL, hashlib.sha256).hexdigest()


def sign(secret: str, at: int, body: bytes) -> str:
    """The value of the Holdfast-Signature header: `t=<Unix seconds>,v1=<hex HMAC-SHA256 of "t.body">`."""
    signed = hmac.new(secret.encode(), b"%d." % at + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={signed}"


# What is sent, and to whom


class Stats:
    """Counters for the metrics."""

    def __init__(self) -> None:
        self.told = 0
        self.failed = 0
        self.parked = 0
        self.waiting_now = 0
        self.parked_now = 0
        self.on_post: Callable[[bool, float], None] | None = None
        """Called after each POST: was it taken, and its seconds."""


@dataclass(slots=True)
class Turns:
    """When events that were handed back come again, one after the other: each look at the store moves few of them."""

    booked: float = 0.0

    def next(self, earliest: float, rate: float = LEAST_RATE) -> float:
        """At most `rate` a second; in steps of a second, so that many come back at once."""
        begin = max(self.booked, earliest)
        self.booked = begin + 1 / rate
        return max(earliest, math.floor(begin))


@dataclass(slots=True, eq=False)
class Share:
    """What an app, or one of its hosts, has of the room."""

    held: int = 0  # weight
    sending: int = 0  # POSTs
    rate: float = LEAST_RATE  # events a second that it takes
    turns: Turns = field(default_factory=Turns)

    def next_room(self, now: float) -> float:
        """When there should be room for one event more."""
        return self.turns.next(now + CROWDED, max(self.rate, LEAST_RATE))

    def hold(self, weight: int) -> None:
        self.held += weight
        if not self.held:
            self.turns = Turns()

    def took(self, events: int, seconds: float) -> None:
        self.rate += 0.3 * (events * self.sending / max(seconds, 1e-3) - self.rate)


@dataclass(slots=True, eq=False)
class Tenant(Share):
    """What all lanes of one app share."""

    hosts: dict[str, Host] = field(default_factory=dict)
    # Those with lanes that wait for a connection, the one that had its turn last at the end.
    waiting: dict[str, Host] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Host(Share):
    """What all lanes of one app to one host share. A host is a name: with many ports it is still one machine."""

    queue: deque[Lane] = field(default_factory=deque)  # those that wait for a connection


@dataclass(slots=True, eq=False)
class Lane:
    """The events of one app for one URL that are in memory."""

    app_id: int
    url: str
    name: str  # of the host
    tenant: Tenant
    host: Host
    events: deque[tuple[float, CallbackEvent]] = field(default_factory=deque)  # claimed until
    busy: bool = False  # a POST is under way, or in the host's queue
    failures: int = 0  # in a row
    retry_at: float = 0.0
    turns: Turns = field(default_factory=Turns)  # of what waits for the retry
    error: str = ""  # of the last failure

    @property
    def shares(self) -> tuple[Share, Share]:
        return self.tenant, self.host

    def hold(self, weight: int) -> None:
        for share in self.shares:
            share.hold(weight)

    def forget_failures(self) -> None:
        self.failures, self.retry_at, self.turns, self.error = 0, 0.0, Turns(), ""


@dataclass(frozen=True, slots=True)
class Outcome:
    error: str = ""  # "": it was taken
    final: bool = False  # another attempt would not help


class Callbacks:
    """`open` starts sending, `close` ends it. `clock` gives Unix seconds, `chance` a number in [0, 1)."""

    def __init__(
        self,
        store: Store,
        settings: CallbackSettings | None = None,
        clock: Clock = time.time,
        chance: Callable[[], float] = random.random,
        pause: float = PAUSE,
    ) -> None:
        self.stats = Stats()
        self._store = store
        self._settings = settings or CallbackSettings()
        self._lease = LEASE + self._settings.timeout  # that a POST takes
        self._clock = clock
        self._chance = chance
        self._pause = pause
        self._lanes: OrderedDict[tuple[int, str], Lane] = OrderedDict()  # least lately used first
        self._lanes_kept = LANES
        self._tenants: dict[int, Tenant] = {}
        # Those with lanes that wait for a connection, the one that had its turn last at the end.
        self._waiting: dict[int, Tenant] = {}
        self._connections: Counter[str] = Counter()  # POSTs under way, by host
        self._held = 0
        self._counted_at = -COUNT_PAUSE
        self._sending: set[asyncio.Task[None]] = set()
        self._moved = asyncio.Event()  # a POST ended, or somebody wants a look at the store
        self._session: aiohttp.ClientSession | None = None
        self._run: asyncio.Task[None] | None = None

    # Life

    async def open(self) -> None:
        self._run = asyncio.get_running_loop().create_task(self._keep_on(), name="callbacks")

    async def close(self) -> None:
        """POSTs under way are given up, and come again."""
        tasks = [task for task in (self._run, *self._sending) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._session is not None:
            await self._session.close()
        left = [event.event_id for lane in self._lanes.values() for _, event in lane.events]
        if left:
            with suppress(StoreError):  # then they come when their lease ends
                await self._store.callbacks.postpone(left, self._clock())

    async def _keep_on(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._moved.clear()
            try:
                more = await self.turn()
                await self._count()
            except StoreError as error:
                more = False
                log.warning("callbacks wait, trying again: %s", error)
            except Exception:  # a mistake of ours about one event must not end all of them
                more = False
                log.exception("callbacks")
            with suppress(TimeoutError):
                async with asyncio.timeout_at(end_of_pause(loop.time(), BREATH if more else self._pause)):
                    await self._moved.wait()

    def wake(self) -> None:
        """Look at the store now."""
        self._moved.set()

    # One look at the store

    async def turn(self) -> bool:
        """Claim what is due and start what may start. True: there may be more that is due. Raises StoreError."""
        now = self._clock()
        claimed = await self._store.callbacks.claim(now, self._lease, CLAIMED)
        later: dict[float, list[int]] = {}
        parked: dict[str, list[int]] = {}
        for i, event in enumerate(claimed, 1):
            try:
                self._take(event, now, later, parked)
            except (ValueError, IndexError):  # its URL: one that was stored must not stop those of others
                log.exception("callbacks of app %d", event.app_id)
                parked.setdefault("the URL cannot be read", []).append(event.event_id)
            if not i % BREATH_EVENTS:
                await asyncio.sleep(0)  # each may be of a new lane
        self._start()
        await self._postpone(later)
        for error, event_ids in parked.items():
            await self._park(event_ids, error)
        return len(claimed) == CLAIMED

    async def _postpone(self, later: dict[float, list[int]]) -> None:
        for due, event_ids in later.items():
            await self._store.callbacks.postpone(event_ids, due)

    def _take(
        self, event: CallbackEvent, now: float, later: dict[float, list[int]], parked: dict[str, list[int]]
    ) -> None:
        """Put a claimed event into its lane, or say when it is to come again, or that it is given up."""
        lane = self._lane(event.app_id, event.callback.url)
        if now < lane.retry_at <= now + self._settings.max_pause:  # else the clock was put back
            if now - event.at >= self._settings.max_age:
                parked.setdefault(lane.error, []).append(event.event_id)
            else:
                later.setdefault(lane.turns.next(lane.retry_at), []).append(event.event_id)
        elif (crowded := self._crowded(lane)) is not None:
            later.setdefault(crowded.next_room(now), []).append(event.event_id)
        else:
            lane.events.append((now + self._lease, event))
            self._hold(lane, _weight(event))
            self._enqueue(lane)

    def _crowded(self, lane: Lane) -> Share | None:
        """Whose share of the memory is used up. A host alone has a quarter of it, two of an app a sixth each."""
        left = HELD - self._held - lane.tenant.held
        if left <= 0:
            return lane.tenant
        return lane.host if 2 * lane.host.held >= left else None

    def _enqueue(self, lane: Lane) -> None:
        if lane.events and not lane.busy:
            lane.busy = True
            lane.host.queue.append(lane)
            lane.tenant.waiting[lane.name] = lane.host
            self._waiting[lane.app_id] = lane.tenant

    def _hold(self, lane: Lane, weight: int) -> None:
        lane.hold(weight)
        self._held += weight

    def _lane(self, app_id: int, url: str) -> Lane:
        lane = self._lanes.get((app_id, url))
        if lane is None:
            self._forget_lanes()
            name = URL(url).host or ""
            tenant = self._tenants.setdefault(app_id, Tenant())
            host = tenant.hosts.setdefault(name, Host())
            lane = self._lanes[app_id, url] = Lane(app_id, url, name, tenant, host)
        self._lanes.move_to_end((app_id, url))
        return lane

    def _forget_lanes(self) -> None:
        if len(self._lanes) < self._lanes_kept:
            return
        idle = [key for key, lane in self._lanes.items() if not lane.events and not lane.busy]
        for key in idle[: LANES // 8]:
            del self._lanes[key]
        self._lanes_kept = max(LANES, len(self._lanes) + LANES // 8)  # not looked through for each new one
        self._tenants = {}
        for lane in self._lanes.values():
            lane.tenant.hosts = {}
        for lane in self._lanes.values():
            self._tenants[lane.app_id] = lane.tenant
            lane.tenant.hosts[lane.name] = lane.host

    def _start(self) -> None:
        """One POST for each lane that waits, while there are connections: apps in turn, of each its hosts in turn."""
        turns = deque(self._waiting)
        while turns and len(self._sending) < self._settings.connections:
            app_id = turns.popleft()
            tenant = self._waiting[app_id]
            lane = self._next_lane(tenant)
            if lane is None:
                continue
            del self._waiting[app_id]
            if tenant.waiting:
                self._waiting[app_id] = tenant
                turns.append(app_id)
            self._send(lane)

    def _next_lane(self, tenant: Tenant) -> Lane | None:
        if tenant.sending >= self._settings.connections - len(self._sending):
            return None
        for name, host in tenant.waiting.items():
            if self._connections[name] < self._settings.connections_per_host:
                del tenant.waiting[name]
                lane = host.queue.popleft()
                if host.queue:
                    tenant.waiting[name] = host
                return lane
        return None

    def _send(self, lane: Lane) -> None:
        self._count_post(lane, 1)
        task = asyncio.get_running_loop().create_task(self._serve(lane))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    def _count_post(self, lane: Lane, change: int) -> None:
        for share in lane.shares:
            share.sending += change
        self._connections[lane.name] += change
        if not self._connections[lane.name]:
            del self._connections[lane.name]

    async def _count(self) -> None:
        now = time.monotonic()
        if now - self._counted_at >= COUNT_PAUSE:
            self._counted_at = now
            self.stats.waiting_now, self.stats.parked_now = await self._store.callbacks.counts(0)

    # One POST

    async def _serve(self, lane: Lane) -> None:
        """Send the next batch of a lane, and write down what came of it."""
        batch = self._next_batch(lane)
        CALLER.set(lane.app_id)
        try:
            if batch:
                await self._tell(lane, batch)
        except StoreError as error:
            log.warning("callbacks wait for the store, they come again: %s", error)
        except Exception:
            log.exception("callbacks of app %d", lane.app_id)
        finally:
            lane.busy = False
            self._count_post(lane, -1)
            self._enqueue(lane)
            self._moved.set()

    def _next_batch(self, lane: Lane) -> list[CallbackEvent]:
        """Events whose lease will do; the others come again from the store. A lane that waits keeps nothing."""
        latest = self._clock() + self._settings.timeout
        batch: list[CallbackEvent] = []
        size = 0
        while lane.events and len(batch) < BATCH_EVENTS:
            until, event = lane.events[0]
            if latest < until:
                size += _size(event)
                if batch and size > BATCH_BYTES:
                    break
                batch.append(event)
            lane.events.popleft()
            self._hold(lane, -_weight(event))
        return batch

    async def _tell(self, lane: Lane, batch: list[CallbackEvent]) -> None:
        app = await self._find_app(lane.app_id)
        event_ids = [event.event_id for event in batch]
        if app is None:
            await self._store.callbacks.done(event_ids)
            return
        body = await self._body(app, batch)
        started = time.perf_counter()
        outcome = await self._post(app, lane.url, body)
        if self.stats.on_post is not None:
            self.stats.on_post(not outcome.error, time.perf_counter() - started)
        if outcome.error:
            await self._failed(app, lane, batch, outcome)
            return
        if lane.failures:
            log_event(log, logging.INFO, "callbacks arrive again", app=app.key, host=URL(lane.url).host)
        lane.forget_failures()
        await self._store.callbacks.done(event_ids)
        for share in lane.shares:
            share.took(len(batch), time.perf_counter() - started)
        self.stats.told += len(batch)

    async def _find_app(self, app_id: int) -> App | None:
        apps = await self._store.list_apps(app_id - 1, 1)
        return apps[0] if apps and apps[0].app_id == app_id else None

    async def _body(self, app: App, batch: Sequence[CallbackEvent]) -> bytes:
        devnos = list({devno: None for event in batch for devno in event.devnos})
        names = await self._store.names(app.app_id, devnos)
        return orjson.dumps(
            {
                "app_key": app.key,
                "sent_at": self._clock(),
                "events": [_event(event, (names[d] for d in event.devnos if d in names)) for event in batch],
            }
        )

    async def _post(self, app: App, url: str, body: bytes) -> Outcome:
        headers = {
            "Content-Type": "application/json",
            "Holdfast-Signature": sign(signing_secret(app), int(self._clock()), body),
        }
        try:
            target = URL(url)
            check_literal(target, private=self._settings.private_addresses)
            async with self._client().post(
                target, data=body, headers=headers, allow_redirects=False
            ) as answer:
                return _outcome(answer.status)
        except TimeoutError:
            return Outcome(f"no answer within {self._settings.timeout:g} seconds")
        except aiohttp.ClientConnectorError as error:
            return Outcome(_cut(str(error.os_error)), isinstance(error.os_error, Refused))
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Outcome(_cut(f"{type(error).__name__}: {error}"), isinstance(error, Refused))

    def _client(self) -> aiohttp.ClientSession:
        """No cookies, no proxy of the environment, no address that was not checked."""
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=self._settings.connections,
                resolver=CheckedResolver(private=self._settings.private_addresses),
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=self._settings.timeout),
                headers={"User-Agent": "holdfast-callbacks"},
            )
        return self._session

    # What came of it

    async def _failed(self, app: App, lane: Lane, batch: Sequence[CallbackEvent], outcome: Outcome) -> None:
        now = self._clock()
        settings = self._settings
        if not lane.failures:
            log_event(
                log,
                logging.WARNING,
                "callbacks fail",
                app=app.key,
                host=URL(lane.url).host,
                reason=outcome.error,
            )
        lane.failures += 1
        lane.error = outcome.error
        lane.retry_at = now + self._backoff(lane.failures)
        over: list[int] = []
        again: list[int] = []
        for event in batch:
            last = event.attempts + 1 >= settings.max_attempts or now - event.at >= settings.max_age
            (over if outcome.final or last else again).append(event.event_id)
        self.stats.failed += len(again)
        if again:
            await self._store.callbacks.failed(again, lane.retry_at, outcome.error)
        if over:
            await self._park(over, outcome.error)
        await self._hand_back(lane)

    def _backoff(self, failures: int) -> float:
        """Seconds until the next attempt: a random part of what doubles with each failure."""
        whole = min(self._settings.max_pause, self._settings.first_pause * 2.0 ** min(failures - 1, 40))
        return whole * (0.5 + self._chance() / 2)

    async def _hand_back(self, lane: Lane) -> None:
        """What a failing lane still holds waits in the store, so that others have the room."""
        later: dict[float, list[int]] = {}
        for _, event in lane.events:
            later.setdefault(lane.turns.next(lane.retry_at), []).append(event.event_id)
        self._hold(lane, -sum(_weight(event) for _, event in lane.events))
        lane.events.clear()
        await self._postpone(later)

    async def _park(self, event_ids: Sequence[int], error: str) -> None:
        await self._store.callbacks.failed(event_ids, None, error)
        self.stats.parked += len(event_ids)

    # For the API

    async def retry_parked(self, app: App) -> int:
        """Try the parked ones again, at once: what their receivers did before is forgotten."""
        for lane in self._lanes.values():
            if lane.app_id == app.app_id:
                lane.forget_failures()
        count = await self._store.callbacks.retry(app.app_id, self._clock())
        self.wake()
        return count


def _weight(event: CallbackEvent) -> int:
    return 1 + len(event.devnos) // WEIGHED_DEVICES


def _size(event: CallbackEvent) -> int:
    params = event.callback.params
    return EVENT_BYTES + (len(orjson.dumps(params)) if params else 0) + ID_BYTES * len(event.devnos)


def _event(event: CallbackEvent, registration_ids: Iterable[str]) -> dict[str, object]:
    return {
        "event_id": str(event.event_id),
        "msg_id": str(event.msg_id),
        "event": event.event,
        "at": event.at,
        "registration_ids": list(registration_ids),
        "params": event.callback.params,
    }


def _outcome(status: int) -> Outcome:
    if 200 <= status < 300:
        return Outcome()
    if 300 <= status < 400:
        return Outcome(f"HTTP {status}: redirects are not followed")
    return Outcome(f"HTTP {status}", final=status == 410)  # 410 Gone: told not to come again


def _cut(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:ERROR_SIZE])


class CallbackMetrics:
    def __init__(self, metrics: Metrics, stats: Stats) -> None:
        posts = metrics.counters("callback_posts", "POSTs to receivers of callbacks.", "outcome")
        self._taken, self._refused = posts.labels("taken"), posts.labels("failed")
        self._seconds = metrics.histogram("callback_seconds", "Time of one POST.")
        metrics.read_counter("callbacks_told", "Callback events that were taken.", lambda: stats.told)
        metrics.read_counter("callbacks_failed", "Callback events to be tried again.", lambda: stats.failed)
        metrics.read_counter("callbacks_given_up", "Callback events that were parked.", lambda: stats.parked)
        metrics.gauge(
            "callbacks_waiting", "Callback events to be sent, now.", lambda: stats.waiting_now, merge="max"
        )
        metrics.gauge(
            "callbacks_parked", "Callback events given up, now.", lambda: stats.parked_now, merge="max"
        )
        stats.on_post = self._on_post

    def _on_post(self, taken: bool, seconds: float) -> None:
        (self._taken if taken else self._refused).value += 1
        self._seconds.observe(seconds)
