"""Callbacks against real receivers: HTTP servers on loopback that do what receivers do."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from pyroaring import BitMap

from broker.metrics import Metrics
from broker.model import App, Callback, NewDevice, NewMessage, Receipt, Settled
from broker.store_sqlite import SqliteStore
from broker.telling.callbacks import (
    BATCH_EVENTS,
    CROWDED,
    LEASE,
    LEAST_RATE,
    CallbackMetrics,
    Callbacks,
    CallbackSettings,
    Host,
    Turns,
    sign,
    signing_secret,
)
from tests.patience import PATIENCE
from tests.ports import free_port

START = 1_800_000_000.0
SETTINGS = CallbackSettings(timeout=PATIENCE, first_pause=10.0, max_pause=100.0, private_addresses=True)


@dataclass
class Clock:
    now: float = START

    def __call__(self) -> float:
        return self.now


@dataclass
class Receiver:
    """Answers each POST with `status`, or with what `answer` makes of it."""

    url: str = ""
    status: int = 200
    answer: Callable[[web.Request], Awaitable[web.Response]] | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    came: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.Response:
        self.raw.append(await request.read())
        self.bodies.append(orjson.loads(self.raw[-1]))
        self.headers.append(dict(request.headers))
        self.paths.append(request.path_qs)
        self.came.set()
        return await self.answer(request) if self.answer is not None else web.Response(status=self.status)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for body in self.bodies for event in body["events"]]

    @property
    def told(self) -> list[tuple[str, str, list[str]]]:
        return [(event["msg_id"], event["event"], event["registration_ids"]) for event in self.events]


@asynccontextmanager
async def receiving(**kept: Any) -> AsyncIterator[Receiver]:
    receiver = Receiver(**kept)
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", receiver.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", 0).start()  # all of 127.0.0.0/8: as many hosts
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}/told"
    try:
        yield receiver
    finally:
        await runner.cleanup()


@dataclass
class World:
    """A store, an app with ten devices, and callbacks that look at the store when a test says so."""

    path: Path
    clock: Clock = field(default_factory=Clock)
    settings: CallbackSettings = SETTINGS

    async def open(self) -> None:
        self.store = SqliteStore(self.path / "data.db", clock=self.clock)
        await self.store.open()
        self.callbacks = self.dispatcher()

    async def close(self) -> None:
        await self.callbacks.close()
        await self.store.close()

    async def restart(self) -> None:
        await self.close()
        await self.open()

    def dispatcher(self) -> Callbacks:
        return Callbacks(self.store, self.settings, self.clock, chance=lambda: 1.0)

    async def make_app(self, devices: int = 10) -> App:
        app = await self.store.create_app("test")
        await self.store.register(app.app_id, [NewDevice(f"device-{i}") for i in range(devices)])
        return app

    async def push(self, app: App, callback: Callback | None, targets: Iterable[int] = (0,)) -> int:
        devnos = BitMap(targets)
        now = self.clock.now
        message = NewMessage(app.app_id, b"{}", devnos, len(devnos) > 5, now, now + 1000, callback=callback)
        return (await self.store.append([message]))[0].msg_id

    async def deliver(
        self, app: App, msg_id: int, devnos: Iterable[int] = (0,), broadcast: bool = False
    ) -> None:
        await self.store.settle([Settled(app.app_id, msg_id, broadcast, tuple(devnos), at=self.clock.now)])

    async def pushed(self, app: App, callback: Callback, count: int = 1) -> list[int]:
        """So many pushes to device 0, delivered."""
        msg_ids = [await self.push(app, callback) for _ in range(count)]
        await self.store.settle([Settled(app.app_id, m, False, (0,), at=self.clock.now) for m in msg_ids])
        return msg_ids

    async def pushed_to(self, app: App, urls: Sequence[str]) -> None:
        """A push to device 0 for each, delivered."""
        now = self.clock.now
        messages = [
            NewMessage(app.app_id, b"{}", BitMap([0]), False, now, now + 1000, callback=Callback(url))
            for url in urls
        ]
        appended = await self.store.append(messages)
        await self.store.settle([Settled(app.app_id, a.msg_id, False, (0,), at=now) for a in appended])

    async def run_until(self, moment: asyncio.Event) -> None:
        while not moment.is_set():
            self.callbacks._moved.clear()
            if not await self.callbacks.turn():
                await asyncio.wait_for(self.callbacks._moved.wait(), PATIENCE)

    async def send(self, callbacks: Callbacks | None = None) -> None:
        """Until nothing is due any more and nothing is under way."""
        callbacks = callbacks or self.callbacks
        more = True
        while more or callbacks._sending:
            more = await callbacks.turn()
            if callbacks._sending:
                await asyncio.wait(callbacks._sending, return_when=asyncio.FIRST_COMPLETED)
                more = True


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.open()
    yield world
    await world.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


# What is told


async def test_a_delivery_is_told(world: World, receiver: Receiver) -> None:
    app = await world.make_app()
    msg_id = await world.push(app, Callback(receiver.url, params={"order": 7}))
    await world.send()
    assert receiver.bodies == []
    world.clock.now += 2
    await world.deliver(app, msg_id)
    await world.send()
    [body] = receiver.bodies
    [event] = body["events"]
    assert body == {"app_key": app.key, "sent_at": START + 2, "events": [event]}
    assert int(event.pop("event_id")) > 0
    assert event == {
        "msg_id": str(msg_id),
        "event": "delivered",
        "at": START + 2,
        "registration_ids": ["device-0"],
        "params": {"order": 7},
    }
    assert receiver.headers[0]["Content-Type"] == "application/json"
    await world.send()
    assert len(receiver.bodies) == 1  # taken: not again


async def test_only_events_that_were_asked_for_are_told(world: World, receiver: Receiver) -> None:
    app = await world.make_app()
    clicks = await world.push(app, Callback(receiver.url, ("clicked",)))
    silent = await world.push(app, None)
    await world.deliver(app, clicks)
    await world.deliver(app, silent)
    for msg_id in (clicks, silent):
        for event in ("shown", "clicked", "clicked"):
            await world.store.record_receipts([Receipt(app.app_id, msg_id, 0, event, START)])
    await world.send()
    assert receiver.told == [(str(clicks), "clicked", ["device-0"])]


async def test_every_event_of_the_list_is_told(world: World, receiver: Receiver) -> None:
    app = await world.make_app()
    asked = Callback(
        receiver.url, ("delivered", "shown", "dismissed", "expired", "evicted", "recalled", "suppressed")
    )
    now = world.clock.now
    several = NewMessage(
        app.app_id, b"{}", BitMap([0, 1, 2, 3]), False, now, now + 10, suppressed=BitMap([4]), callback=asked
    )
    msg_id = (await world.store.append([several]))[0].msg_id
    await world.store.settle([Settled(app.app_id, msg_id, False, (0,), (1,), at=now)])
    await world.store.record_receipts(
        [Receipt(app.app_id, msg_id, 0, e, now) for e in ("shown", "dismissed")]
    )
    recalled = await world.push(app, asked, (5,))
    await world.store.recall(app.app_id, [recalled], now)
    world.clock.now = now + 10
    while await world.store.expire(world.clock.now):
        pass
    await world.send()
    told = {(m, event): names for m, event, names in receiver.told}
    assert len(told) == len(receiver.told)
    whole = str(msg_id)
    assert told == {
        (whole, "suppressed"): ["device-4"],
        (whole, "delivered"): ["device-0"],
        (whole, "evicted"): ["device-1"],
        (whole, "shown"): ["device-0"],
        (whole, "dismissed"): ["device-0"],
        (whole, "expired"): ["device-2", "device-3"],
        (str(recalled), "recalled"): ["device-5"],
    }


async def test_devices_that_were_no_targets_are_not_told_of(world: World, receiver: Receiver) -> None:
    app, other = await world.make_app(), await world.make_app()
    msg_id = await world.push(app, Callback(receiver.url), (1, 2))
    await world.store.record_receipts([Receipt(app.app_id, msg_id, 3, "clicked", START)])
    await world.store.record_receipts([Receipt(other.app_id, msg_id, 1, "clicked", START)])
    await world.send()
    assert receiver.told == []


async def test_deliveries_that_come_together_are_one_event(world: World, receiver: Receiver) -> None:
    app = await world.make_app()
    msg_id = await world.push(app, Callback(receiver.url), range(10))
    await world.store.settle(
        [Settled(app.app_id, msg_id, True, part, at=START) for part in ((0, 1), (1, 2), (3,))]
    )
    await world.send()
    assert receiver.told == [(str(msg_id), "delivered", [f"device-{i}" for i in range(4)])]


async def test_a_broadcast_is_told_in_events_of_a_thousand_devices(world: World, receiver: Receiver) -> None:
    app = await world.make_app(2500)
    msg_id = await world.push(app, Callback(receiver.url), range(2500))
    await world.deliver(app, msg_id, range(2500), broadcast=True)
    await world.send()
    assert [len(names) for _, _, names in receiver.told] == [1000, 1000, 500]
    assert {n for _, _, names in receiver.told for n in names} == {f"device-{i}" for i in range(2500)}


async def test_events_of_one_url_come_in_batches_and_in_order(world: World, receiver: Receiver) -> None:
    app = await world.make_app()
    msg_ids = await world.pushed(app, Callback(receiver.url), BATCH_EVENTS + 5)
    await world.send()
    assert [len(body["events"]) for body in receiver.bodies] == [BATCH_EVENTS, 5]
    assert [event["msg_id"] for event in receiver.events] == list(map(str, msg_ids))
    numbers = [int(event["event_id"]) for event in receiver.events]
    assert numbers == sorted(set(numbers))


async def test_apps_and_urls_do_not_share_a_batch(world: World, receiver: Receiver) -> None:
    one, two = await world.make_app(), await world.make_app()
    for app in (one, two):
        for path in ("a", "b?c=1"):
            await world.pushed(app, Callback(f"{receiver.url}/{path}"))
    await world.send()
    seen = {(body["app_key"], path) for body, path in zip(receiver.bodies, receiver.paths, strict=True)}
    assert seen == {(app.key, path) for app in (one, two) for path in ("/told/a", "/told/b?c=1")}
    assert len(receiver.bodies) == 4


# The signature


def check_signature(secret: str, header: str, body: bytes, now: float, tolerance: float = 300) -> bool:
    """As docs/api.md shows it."""
    given = dict(part.split("=", 1) for part in header.split(","))
    wanted = hmac.new(secret.encode(), f"{given['t']}.".encode() + body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(wanted, given["v1"]) and abs(now - int(given["t"])) <= tolerance


async def test_a_receiver_can_check_who_calls(world: World, receiver: Receiver) -> None:
    app, other = await world.make_app(), await world.make_app()
    await world.pushed(app, Callback(receiver.url))
    await world.send()
    header, body = receiver.headers[0]["Holdfast-Signature"], receiver.raw[0]
    assert check_signature(signing_secret(app), header, body, START)
    assert not check_signature(signing_secret(other), header, body, START)
    assert not check_signature(signing_secret(app), header, body + b" ", START)
    assert not check_signature(signing_secret(app), header, body, START + 301)
    assert app.signing_key.hex() not in signing_secret(app)


def test_the_signature_of_a_known_body() -> None:
    """By `openssl dgst -sha256 -hmac secret`."""
    assert sign("secret", 1_800_000_000, b'{"events":[]}') == (
        "t=1800000000,v1=a11ba81d3993108a7a926ee1290c124c42984361f3249001274d6a3dbdd151d3"
    )


# Receivers that fail


@pytest.mark.parametrize("status", [500, 404, 301, 199 + 104])
async def test_a_refused_batch_is_tried_again_later_and_later(
    world: World, receiver: Receiver, status: int
) -> None:
    app = await world.make_app()
    receiver.status = status
    await world.pushed(app, Callback(receiver.url))
    for pause in (10, 20, 40, 80, 100, 100):
        posts = len(receiver.bodies)
        await world.send()
        assert len(receiver.bodies) == posts + 1
        world.clock.now += pause - 1
        await world.send()
        assert len(receiver.bodies) == posts + 1
        world.clock.now += 1
    receiver.status = 204
    await world.send()
    assert await world.store.callbacks.counts(app.app_id) == (0, 0)
    assert len({event["event_id"] for event in receiver.events}) == 1


async def test_pauses_are_partly_random(world: World) -> None:
    pauses = [Callbacks(world.store, SETTINGS, chance=lambda c=c: c)._backoff(3) for c in (0.0, 0.5, 1.0)]
    assert pauses == [20.0, 30.0, 40.0]
    assert Callbacks(world.store, SETTINGS, chance=lambda: 1.0)._backoff(10_000) == 100.0


async def test_redirects_are_not_followed(world: World, receiver: Receiver) -> None:
    async with receiving() as elsewhere:
        app = await world.make_app()

        async def redirect(_request: web.Request) -> web.Response:
            return web.Response(status=307, headers={"Location": elsewhere.url})

        receiver.answer = redirect
        await world.pushed(app, Callback(receiver.url))
        await world.send()
        assert (len(receiver.bodies), elsewhere.bodies) == (1, [])


async def test_a_receiver_that_is_down_gets_it_when_it_is_back(world: World) -> None:
    app = await world.make_app()
    port = free_port()
    [msg_id] = await world.pushed(app, Callback(f"http://127.0.0.1:{port}/x"))
    await world.send()
    assert await world.store.callbacks.counts(app.app_id) == (1, 0)
    receiver = Receiver()
    server = web.Application()
    server.router.add_post("/x", receiver.handle)
    runner = web.AppRunner(server, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        world.clock.now += 10
        await world.send()
    finally:
        await runner.cleanup()
    assert [event["msg_id"] for event in receiver.events] == [str(msg_id)]


async def test_half_an_answer_counts_as_none(world: World) -> None:
    """A receiver that takes the request and dies, and one that never says a word."""
    app = await world.make_app()
    seen = 0
    release = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        await reader.readuntil(b"\r\n\r\n")
        seen += 1
        if seen == 1:
            writer.write(b"HTTP/1.1 20")
        else:
            await release.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        await world.pushed(app, Callback(f"http://127.0.0.1:{port}/x"))
        await world.send()
        assert seen == 1
        world.settings = replace(SETTINGS, timeout=0.2)
        await world.restart()
        while seen == 1:  # on a slow machine the time may be up before the request is there
            world.clock.now += SETTINGS.max_pause
            await world.send()
        assert await world.store.callbacks.counts(app.app_id) == (1, 0)
    finally:
        release.set()
        server.close()


async def test_while_a_receiver_fails_new_events_wait_untried(world: World, receiver: Receiver) -> None:
    app = await world.make_app()
    receiver.status = 500
    first = await world.pushed(app, Callback(receiver.url))
    await world.send()
    second = await world.pushed(app, Callback(receiver.url), 3)
    await world.send()
    assert len(receiver.bodies) == 1
    receiver.status = 200
    world.clock.now += 10
    await world.send()
    assert [event["msg_id"] for event in receiver.bodies[1]["events"]] == list(map(str, first + second))


async def test_one_slow_receiver_does_not_hold_up_the_others(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though more waits for it than memory holds for one, each for a URL of its own, and it was there first."""
    held = 300
    monkeypatch.setattr("broker.telling.callbacks.HELD", 4 * held)
    monkeypatch.setattr("broker.telling.callbacks.LANES", 100)
    await world.restart()
    app = await world.make_app()
    release = asyncio.Event()

    async def hang(_request: web.Request) -> web.Response:
        await release.wait()
        return web.Response()

    async with receiving(answer=hang) as slow:
        slow.url = slow.url.replace("127.0.0.1", "127.0.0.2")
        urls = [f"{slow.url}/{i % 350}" for i in range(500)]
        await world.pushed_to(app, urls)
        [msg_id] = await world.pushed(app, Callback(receiver.url))
        await world.run_until(receiver.came)
        assert receiver.told == [(str(msg_id), "delivered", ["device-0"])]
        assert 0 < len(slow.bodies) <= SETTINGS.connections_per_host
        assert world.callbacks._held <= held
        release.set()
        await world.send()
        while await world.store.callbacks.counts(0) != (0, 0):
            world.clock.now += 1
            await world.send()
        assert len({event["event_id"] for event in slow.events}) == len(slow.events) == len(urls)


async def test_an_app_with_many_slow_receivers_does_not_hold_up_the_others(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them alone is within its limits, and they were there first."""
    monkeypatch.setattr("broker.telling.callbacks.HELD", 200)
    bad, good = await world.make_app(), await world.make_app()
    release = asyncio.Event()

    async def hang(_request: web.Request) -> web.Response:
        await release.wait()
        return web.Response()

    async with receiving(answer=hang) as slow:
        hosts = [slow.url.replace("127.0.0.1", f"127.0.0.{n}") for n in range(2, 102)]
        urls = [f"{host}/{i}" for i in range(5) for host in hosts]
        await world.pushed_to(bad, urls)
        await world.pushed(good, Callback(receiver.url))
        await world.run_until(receiver.came)
        assert world.callbacks._held <= 100
        assert len(slow.bodies) <= SETTINGS.connections // 2
        release.set()
        while await world.store.callbacks.counts(0) != (0, 0):
            world.clock.now += 1
            await world.send()
        assert len(slow.events) == len(urls)


async def test_apps_take_turns_at_a_host_that_they_share(world: World) -> None:
    one, two = await world.make_app(), await world.make_app()
    release = asyncio.Semaphore(0)

    async def wait(_request: web.Request) -> web.Response:
        await release.acquire()
        return web.Response()

    async with receiving(answer=wait) as shared:
        await world.pushed_to(one, [f"{shared.url}/one/{i}" for i in range(50)])
        await world.pushed_to(two, [f"{shared.url}/two"])
        world.settings = replace(SETTINGS, connections_per_host=1)
        await world.restart()
        for _ in range(100):
            release.release()
        await world.send()
        assert len(shared.paths) == 51
        assert shared.paths.index("/told/two") <= 1


async def test_the_ports_of_a_host_share_its_connections(world: World) -> None:
    app = await world.make_app()
    release = asyncio.Event()
    most = now = 0

    async def hang(_request: web.Request) -> web.Response:
        nonlocal most, now
        now += 1
        most = max(most, now)
        if now == SETTINGS.connections_per_host:
            release.set()
        await release.wait()
        now -= 1
        return web.Response()

    async with AsyncExitStack() as stack:
        ports = [await stack.enter_async_context(receiving(answer=hang)) for _ in range(8)]
        await world.pushed_to(app, [port.url for port in ports])
        await world.send()
        assert [len(port.bodies) for port in ports] == [1] * 8
        assert most == SETTINGS.connections_per_host


async def test_a_long_queue_for_a_dead_receiver_is_not_moved_at_each_attempt(
    world: World, receiver: Receiver
) -> None:
    app = await world.make_app()
    receiver.status = 500
    count = 20 * int(LEAST_RATE)
    await world.pushed_to(app, [receiver.url] * count)
    await world.send()
    moved = 0
    postpone = world.store.callbacks.postpone

    async def counted(event_ids: Sequence[int], due: float) -> None:
        nonlocal moved
        moved += len(event_ids)
        await postpone(event_ids, due)

    world.store.callbacks.postpone = counted  # type: ignore[method-assign]
    for _ in range(30):
        world.clock.now += 1
        await world.send()
    assert len(receiver.bodies) == 3  # at 0, 10 and 30 seconds
    assert 0 < moved <= 31 * LEAST_RATE
    receiver.status = 200
    for _ in range(120):
        world.clock.now += 1
        await world.send()
    assert await world.store.callbacks.counts(app.app_id) == (0, 0)
    assert len({event["event_id"] for event in receiver.events}) == count


def test_what_is_handed_back_comes_at_an_even_pace() -> None:
    turns = Turns()
    due = [turns.next(START + 10.25) for _ in range(5 * int(LEAST_RATE))]
    assert due[: BATCH_EVENTS + 1] == [START + 10.25] * (BATCH_EVENTS + 1)  # the next batch, at once
    assert due == sorted(due)
    assert max(Counter(due).values()) <= 2 * LEAST_RATE
    assert due[-1] == pytest.approx(START + 15, abs=1)
    assert len(set(due)) <= 7  # each is a write
    assert turns.next(START) >= due[-1]  # behind them, whatever the next attempt brings
    assert turns.next(START + 100) == START + 100


def test_a_receiver_gets_as_much_as_it_takes() -> None:
    host = Host(sending=2)
    for _ in range(50):
        host.took(1000, 0.5)
    assert host.rate == pytest.approx(4000, rel=0.01)
    due = [host.next_room(START) for _ in range(20_000)]
    assert due[0] == START + CROWDED
    assert due[-1] == pytest.approx(START + 5, abs=1)
    for _ in range(50):
        host.took(1, 5)
    assert host.next_room(START + 100) == START + 100 + CROWDED
    assert max(host.next_room(START) for _ in range(500)) == pytest.approx(START + 101, abs=1)


# Given up, and taken up again


async def test_an_event_is_parked_after_so_many_attempts(world: World, receiver: Receiver) -> None:
    world.settings = CallbackSettings(first_pause=1.0, max_attempts=3, private_addresses=True)
    await world.restart()
    app = await world.make_app()
    receiver.status = 503
    [msg_id] = await world.pushed(app, Callback(receiver.url))
    for _ in range(5):
        await world.send()
        world.clock.now += 1000
    assert len(receiver.bodies) == 3
    [parked] = await world.store.callbacks.list_parked(app.app_id, 0, 10)
    assert (parked.msg_id, parked.attempts, parked.error) == (msg_id, 3, "HTTP 503")
    assert await world.store.callbacks.counts(app.app_id) == (0, 1)
    receiver.status = 200
    assert await world.callbacks.retry_parked(app) == 1
    await world.send()
    assert len(receiver.bodies) == 4
    assert await world.store.callbacks.counts(app.app_id) == (0, 0)


async def test_an_event_is_parked_when_it_is_too_old(world: World, receiver: Receiver) -> None:
    app = await world.make_app()
    receiver.status = 500
    await world.pushed(app, Callback(receiver.url))
    await world.send()
    world.clock.now += SETTINGS.max_age
    await world.send()
    assert await world.store.callbacks.counts(app.app_id) == (0, 1)
    assert await world.store.callbacks.drop_parked(app.app_id) == 1
    assert await world.store.callbacks.counts(app.app_id) == (0, 0)


async def test_410_parks_at_once(world: World, receiver: Receiver) -> None:
    app = await world.make_app()
    receiver.status = 410
    await world.pushed(app, Callback(receiver.url), 3)
    await world.send()
    assert len(receiver.bodies) == 1
    assert await world.store.callbacks.counts(app.app_id) == (0, 3)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.1", "10.0.0.1", "0x7f000001"])
async def test_private_addresses_are_not_called(world: World, receiver: Receiver, host: str) -> None:
    world.settings = CallbackSettings()
    await world.restart()
    app = await world.make_app()
    await world.pushed(app, Callback(receiver.url.replace("127.0.0.1", host)))
    await world.send()
    assert receiver.bodies == []
    [parked] = await world.store.callbacks.list_parked(app.app_id, 0, 10)
    assert "not a public address" in parked.error


async def test_a_url_that_cannot_be_read_does_not_stop_the_others(world: World, receiver: Receiver) -> None:
    """One that was stored before it was refused."""
    app, other = await world.make_app(), await world.make_app()
    await world.pushed_to(app, ["http://!][a@?_)", "http://[::1/x"])
    await world.pushed(other, Callback(receiver.url))
    await world.send()
    assert len(receiver.events) == 1
    assert await world.store.callbacks.counts(app.app_id) == (0, 2)


async def test_a_receiver_may_have_any_time(world: World, receiver: Receiver) -> None:
    """Also more than a lease is long."""
    world.settings = replace(SETTINGS, timeout=2 * LEASE)
    await world.restart()
    await world.pushed(await world.make_app(), Callback(receiver.url))
    await world.send()
    assert len(receiver.events) == 1


async def test_a_clock_that_is_put_back_does_not_stop_a_receiver_that_failed(
    world: World, receiver: Receiver
) -> None:
    app = await world.make_app()
    world.clock.now += 86_400
    receiver.status = 500
    await world.pushed(app, Callback(receiver.url))
    await world.send()
    world.clock.now -= 86_400
    receiver.status = 200
    await world.pushed(app, Callback(receiver.url), 2)
    await world.send()
    assert len(receiver.bodies[-1]["events"]) == 2


async def test_parked_ones_are_found_without_passing_over_those_that_wait(world: World) -> None:
    """Each slice of `retry` and `drop_parked` is the writer's, and pushes wait for it."""
    with closing(sqlite3.connect(world.path / "data.db")) as connection:
        plan = connection.execute(
            "EXPLAIN QUERY PLAN SELECT id FROM callback_events WHERE app = 1 AND due IS NULL ORDER BY id"
        ).fetchall()
    assert ["callback_events_parked" in row[3] for row in plan] == [True]


# Restarts, and two servers


async def test_events_survive_a_restart(world: World, receiver: Receiver) -> None:
    app = await world.make_app()
    receiver.status = 500
    told = await world.pushed(app, Callback(receiver.url), 2)
    await world.send()
    waiting = await world.push(app, Callback(receiver.url))
    receiver.status = 200
    await world.restart()
    await world.deliver(app, waiting)  # its callback is known from the store
    world.clock.now += 10
    await world.send()
    assert {m for m, _, _ in receiver.told} == {str(msg_id) for msg_id in (*told, waiting)}


async def test_events_survive_their_message_and_a_restart(world: World, receiver: Receiver) -> None:
    app = await world.make_app()
    await world.pushed(app, Callback(receiver.url))
    await world.close()
    with closing(sqlite3.connect(world.path / "data.db")) as database:
        database.execute("DELETE FROM messages")
        database.commit()
    await world.open()
    await world.send()
    assert len(receiver.events) == 1


async def test_who_never_had_a_callback_wakes_no_thread(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, asked = await world.make_app(), []
    monkeypatch.setattr(world.store.callbacks, "_read", lambda *call: asked.append(call))
    assert await world.store.callbacks.claim(world.clock.now, 1.0, 10) == []
    assert await world.store.callbacks.counts(app.app_id) == (0, 0)
    assert asked == []


async def test_a_crash_in_a_post_repeats_it_with_the_same_event_id(world: World, receiver: Receiver) -> None:
    app = await world.make_app()
    await world.pushed(app, Callback(receiver.url))
    await world.store.callbacks.claim(world.clock.now, LEASE, 10)  # by a server that is dead now
    await world.send()
    assert receiver.bodies == []
    world.clock.now += LEASE
    await world.send()
    assert len(receiver.events) == 1


async def test_a_stop_in_the_middle_hands_back_what_was_not_sent(world: World, receiver: Receiver) -> None:
    app = await world.make_app()
    release = asyncio.Event()

    async def hang(_request: web.Request) -> web.Response:
        await release.wait()
        return web.Response()

    receiver.answer = hang
    await world.pushed(app, Callback(receiver.url), BATCH_EVENTS + 1)
    await world.callbacks.turn()
    await receiver.came.wait()
    await world.restart()
    release.set()
    receiver.answer = None
    await world.send()
    assert len(receiver.bodies[-1]["events"]) == 1  # the others are leased
    world.clock.now += LEASE + SETTINGS.timeout
    await world.send()
    assert len({event["event_id"] for event in receiver.events}) == BATCH_EVENTS + 1


async def test_two_dispatchers_tell_each_event_once(world: World, receiver: Receiver) -> None:
    app = await world.make_app()
    other = world.dispatcher()
    msg_ids = [m for i in range(20) for m in await world.pushed(app, Callback(f"{receiver.url}/{i}"), 3)]
    await asyncio.gather(world.send(), world.send(other))
    await other.close()
    assert sorted(m for m, _, _ in receiver.told) == sorted(map(str, msg_ids))


async def test_events_of_a_deleted_app_are_not_told(world: World, receiver: Receiver) -> None:
    app = await world.make_app()
    await world.pushed(app, Callback(receiver.url))
    await world.store.delete_app(app.key)
    await world.send()
    assert receiver.bodies == []
    while await world.store.expire(world.clock.now):
        pass
    assert await world.store.callbacks.counts(0) == (0, 0)


# In the background


async def test_the_background_task_tells_and_survives_a_store_that_is_away(
    world: World, receiver: Receiver
) -> None:
    async with AsyncExitStack() as stack:
        metrics = Metrics()
        background = Callbacks(world.store, SETTINGS, world.clock, pause=0.001)
        CallbackMetrics(metrics, background.stats)
        claim, failures = world.store.callbacks.claim, 3

        async def flaky(*arguments: Any) -> Any:
            nonlocal failures
            if failures:
                failures -= 1
                await world.store.callbacks._write("no such operation", None, 1)
            return await claim(*arguments)

        world.store.callbacks.claim = flaky  # type: ignore[method-assign]
        await background.open()
        stack.push_async_callback(background.close)
        app = await world.make_app()
        await world.pushed(app, Callback(receiver.url))
        await asyncio.wait_for(receiver.came.wait(), PATIENCE)
        while background._sending:
            await asyncio.wait(background._sending)
        assert failures == 0
        scraped = metrics.render()[0].decode()
    assert 'holdfast_callback_posts_total{outcome="taken"} 1.0' in scraped
    assert "holdfast_callbacks_told_total 1.0" in scraped
    assert "holdfast_callback_seconds_count 1.0" in scraped


async def test_pushes_are_settled_while_a_receiver_hangs(world: World, receiver: Receiver) -> None:
    app = await world.make_app()
    release = asyncio.Event()

    async def hang(_request: web.Request) -> web.Response:
        await release.wait()
        return web.Response()

    receiver.answer = hang
    await world.pushed(app, Callback(receiver.url))
    await world.callbacks.turn()
    await receiver.came.wait()
    msg_ids = await world.pushed(app, Callback(receiver.url), 100)  # awaited while the receiver hangs
    records = await world.store.find_messages(app.app_id, msg_ids)
    assert all(0 in record.delivered for record in records.values())
    assert len(receiver.bodies) == 1
    release.set()
    await world.send()
    assert len(receiver.events) == 101
