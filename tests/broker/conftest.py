from __future__ import annotations

import asyncio
import io
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp.http_parser import DeflateBuffer

import broker.api.call
from broker.api.call import ApiCounters
from broker.api.door import Door
from broker.api.http import build_api
from broker.api.peers import Peers
from broker.audiences.devices import Devices
from broker.broker import Broker
from broker.bus import Doorbell
from broker.bus_local import LocalBus
from broker.limits import Limits
from broker.model import App, Device
from broker.pushing.pushes import Pushes
from broker.redis.spreading import Spreader
from broker.store_sqlite import SqliteStore
from broker.telling.reports import Reports
from broker.tenants.apps import Apps
from tests.broker.redis_rigs import (
    cluster,
    plain,
    plain_redis,
    redis_cluster,
    replicated,
    replicated_redis,
)
from tests.patience import PATIENCE

# Fixtures.
__all__ = ["cluster", "plain", "plain_redis", "redis_cluster", "replicated", "replicated_redis"]


HOUR = 3_600_000  # milliseconds


@pytest.fixture(autouse=True)
def patient_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis of tests, or its replica, may have to wait for a processor; locks end by the clock of the test."""
    monkeypatch.setattr("broker.redis.wire.CONNECT_TIMEOUT", PATIENCE)
    monkeypatch.setattr("broker.redis.wire.ANSWER_TIMEOUT", 2 * PATIENCE)
    monkeypatch.setattr("broker.redis.engine.WAIT_TIMEOUT", PATIENCE)
    lock_times = Spreader.lock_times
    monkeypatch.setattr(Spreader, "lock_times", staticmethod(lambda now: (lock_times(now)[0], HOUR)))


@pytest.fixture
def inflated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who inflated something: aiohttp, or we."""
    told: list[str] = []

    def note(who: str, inflate: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (told.append(who), inflate(*arguments))[1]

    monkeypatch.setattr(DeflateBuffer, "feed_data", note("aiohttp", DeflateBuffer.feed_data))
    monkeypatch.setattr(broker.api.call, "_inflate", note("we", broker.api.call._inflate))
    return told


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def code(self) -> int:
        return int(self.json["error"]["code"])

    @property
    def message(self) -> str:
        return str(self.json["error"]["message"])


@dataclass
class Clock:
    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Service:
    """Everything behind the public API, on a real store, listening on a real port."""

    store: SqliteStore
    bus: LocalBus
    broker: Broker
    limits: Limits
    app: App
    clock: Clock
    counters: ApiCounters = field(default_factory=ApiCounters)
    rung: asyncio.Queue[Doorbell] = field(default_factory=asyncio.Queue)
    base: str = ""
    session: aiohttp.ClientSession | None = None

    @property
    def apps(self) -> Apps:
        return self.broker.apps

    @property
    def devices(self) -> Devices:
        return self.broker.devices

    @property
    def pushes(self) -> Pushes:
        return self.broker.pushes

    @property
    def reports(self) -> Reports:
        return self.broker.reports

    @property
    def now(self) -> float:
        return self.clock.now

    @now.setter
    def now(self, now: float) -> None:
        self.clock.now = now

    def hear(self, doorbells: Sequence[Doorbell]) -> None:
        for doorbell in doorbells:
            self.rung.put_nowait(doorbell)

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        auth: tuple[str, str] | None = ("", ""),
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """`body`: bytes as they are, anything else as JSON. `auth` defaults to the app's own."""
        assert self.session is not None
        raw = body if isinstance(body, bytes) or body is None else orjson.dumps(body)
        body_file = None if raw is None else io.BytesIO(raw)  # bytes of a megabyte would warn
        headers = dict(headers or {})
        if auth is not None:
            user, password = auth if auth != ("", "") else (self.app.key, self.app.master_secret)
            headers["Authorization"] = "Basic " + b64encode(f"{user}:{password}".encode()).decode()
        async with self.session.request(method, self.base + path, data=body_file, headers=headers) as answer:
            return Answer(answer.status, dict(answer.headers), await answer.read())

    async def register(self, registration_id: str, **properties: Any) -> Device:
        registered = await self.devices.register(
            self.app, registration_id=registration_id, trusted=True, **properties
        )
        return registered.device

    async def doorbell(self) -> Doorbell:
        return await asyncio.wait_for(self.rung.get(), PATIENCE)


Start = Callable[..., Awaitable[Service]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts services: `await start(limits=Limits(…), open=True)`."""
    async with AsyncExitStack() as stack:

        async def run(*, limits: Limits | None = None, peers: Peers | None = None, **app: Any) -> Service:
            clock = Clock()
            store, bus = SqliteStore(tmp_path / "data.db", clock=clock), LocalBus()
            limits = limits or Limits()
            await store.open()
            stack.push_async_callback(store.close)
            broker = Broker(store, bus, limits, clock)
            await broker.open()
            stack.push_async_callback(broker.close)
            service = Service(store, bus, broker, limits, await broker.apps.create("test", **app), clock)
            stack.callback(bus.subscribe(service.hear))
            door = Door(1000, PATIENCE)  # not limits.request_timeout: that is how long a body may take
            runner = door.runner(build_api(broker, service.counters.observe, peers))
            stack.push_async_callback(runner.cleanup)
            await door.open(runner, "127.0.0.1", 0)
            service.base = "http://{}:{}".format(*runner.addresses[0][:2])
            service.session = await stack.enter_async_context(aiohttp.ClientSession())
            return service

        yield run


@pytest.fixture
async def service(start: Start) -> Service:
    return await start()
