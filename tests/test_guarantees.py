"""The guarantees of architecture.md, each against a real server. Said at each: what breaks it."""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import orjson
import pytest

from clients.local_server import LocalServer
from gateway.mqtt import (
    Connect,
    Disconnect,
    Packet,
    Pingreq,
    Pingresp,
    Puback,
    Publish,
    Reason,
    Suback,
    Subscribe,
    Subscription,
)
from tests.crash_load import Wire
from tests.patience import PATIENCE

WINDOW, NEWEST = 4, 3
FLAGS = (
    "--push-fanout-limit", "1",  # two devices make a broadcast
    "--push-offline-limit", str(NEWEST),
    "--mqtt-max-inflight", str(WINDOW),
    "--mqtt-max-subscriptions", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def limited(start_server: Callable[..., LocalServer]) -> LocalServer:
    return start_server(*FLAGS)


class Backend:
    """A publisher over HTTP."""

    def __init__(self, server: LocalServer, http: aiohttp.ClientSession) -> None:
        self.server = server
        self._http = http

    async def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        raw = None if body is None else orjson.dumps(body)
        async with self._http.request(method, self.server.addresses.http + path, data=raw) as answer:
            return answer.status, orjson.loads(await answer.read() or b"null")

    async def register(self, *names: str) -> None:
        for name in names:
            assert (await self.call("POST", "/v1/devices", {"registration_id": name}))[0] == 200

    async def push(self, *names: str, ttl: int = 3600, **more: Any) -> int:
        body = {
            "platform": "all", "audience": {"registration_id": names}, "notification": {"alert": "hi"},
            "options": {"time_to_live": ttl}, **more,
        }  # fmt: skip
        status, answer = await self.call("POST", "/v3/push", body)
        assert status == 200, answer
        return int(answer["msg_id"])

    async def report(self, msg_id: int) -> dict[str, int]:
        """The counts that are not 0. They add up whenever one looks (G4)."""
        _, (row,) = await self.call("GET", f"/v3/received/detail?msg_ids={msg_id}")
        states = {key: row[key] for key in ("delivered", "pending", "expired", "evicted")}
        assert row["target"] == sum(states.values()), row
        return {state: count for state, count in states.items() if count}

    async def report_becomes(self, msg_id: int, **states: int) -> None:
        """Acknowledgements are recorded some milliseconds after they came."""
        deadline = time.monotonic() + PATIENCE
        while (told := await self.report(msg_id)) != states:
            assert time.monotonic() < deadline, told


class Phone:
    """A device of the demo app that acknowledges when it is told to."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.pushes: list[Publish] = []

    @classmethod
    async def connect(cls, server: LocalServer, name: str) -> Phone:
        key, properties = server.app.device_key.encode(), {"session_expiry_interval": 600}
        connect = Connect(name, False, 60, server.app.app_key, key, properties=properties)  # type: ignore[arg-type]
        return cls(await Wire.open(server.addresses.mqtt, connect))

    async def next(self, kind: type[Packet]) -> Any:
        """The next packet of this kind; pushes on the way are kept."""
        async with asyncio.timeout(PATIENCE):
            while True:
                while (packet := self.wire.next()) is not None:
                    if isinstance(packet, Publish):
                        self.pushes.append(packet)
                    if isinstance(packet, kind):
                        return packet
                await self.wire.fill()

    @property
    def got(self) -> list[int]:
        return [int(orjson.loads(push.payload)["msg_id"]) for push in self.pushes]

    async def pushed(self, count: int) -> list[int]:
        while len(self.pushes) < count:
            await self.next(Publish)
        return self.got

    async def everything(self) -> list[int]:
        """All that came until the server, asked now, answers."""
        self.wire.send(Pingreq())
        await self.next(Pingresp)
        return self.got

    def ack(self, *msg_ids: int) -> None:
        pushes = zip(self.got, self.pushes, strict=True)
        self.wire.send(*(Puback(push.packet_id) for got, push in pushes if not msg_ids or got in msg_ids))

    def leave(self) -> None:
        self.wire.abort()


@pytest.fixture
async def http(limited: LocalServer) -> AsyncIterator[aiohttp.ClientSession]:
    login = b64encode(f"{limited.app.app_key}:{limited.app.master_secret}".encode()).decode()
    async with aiohttp.ClientSession(headers={"Authorization": f"Basic {login}"}) as session:
        yield session


@pytest.fixture
def backend(limited: LocalServer, http: aiohttp.ClientSession) -> Backend:
    return Backend(limited, http)


@pytest.fixture
async def connect(limited: LocalServer) -> AsyncIterator[Callable[[str], Any]]:
    phones: list[Phone] = []

    async def run(name: str) -> Phone:
        phones.append(await Phone.connect(limited, name))
        return phones[-1]

    yield run
    for phone in phones:
        phone.leave()
    await asyncio.sleep(0)  # the transports close in the loop's next turn


Dial = Callable[[str], Any]


async def test_g1_a_push_answered_200_survives_kill_9_the_next_instant(
    limited: LocalServer, backend: Backend, connect: Dial
) -> None:
    """Breaks if Pushes answers before `append` has returned, or the writer before its commit."""
    await backend.register("g1-a", "g1-b")
    ids = [await backend.push("g1-a"), await backend.push("g1-a", "g1-b")]
    limited.kill()
    await asyncio.to_thread(limited.start)
    assert await (await connect("g1-a")).pushed(2) == ids
    ids.append(await backend.push("g1-b"))
    limited.kill()
    await asyncio.to_thread(limited.start)
    assert await (await connect("g1-b")).pushed(2) == ids[1:]


async def test_g2_each_target_gets_it_until_it_is_acknowledged_and_nobody_else(
    backend: Backend, connect: Dial
) -> None:
    """Breaks if CONNECT does not fetch, or the log is not walked from its start, or what is in flight counts as
    delivered, or an audience is resolved again after its push was accepted."""
    await backend.register("g2-a", "g2-b")
    here = await connect("g2-a")
    ids = [await backend.push("g2-a"), await backend.push("g2-a", "g2-b")]
    everyone = int((await backend.call("POST", "/v3/push", TO_ALL))[1]["msg_id"])
    assert await here.pushed(3) == [*ids, everyone]
    here.leave()  # without an acknowledgement
    here = await connect("g2-a")
    assert await here.pushed(3) == [*ids, everyone]
    here.ack()
    await backend.report_becomes(ids[0], delivered=1)
    here.leave()
    assert await (await connect("g2-a")).everything() == []
    assert await (await connect("g2-b")).pushed(2) == [ids[1], everyone]
    await backend.register("g2-late")
    assert await (await connect("g2-late")).everything() == []


TO_ALL = {"platform": "all", "audience": "all", "notification": {"alert": "hi"}}


async def test_g3_pushes_arrive_in_msg_id_order_on_one_connection(backend: Backend, connect: Dial) -> None:
    """Breaks if inbox and broadcasts are not merged, or a doorbell overtakes what waits, or a page of the inbox
    an older broadcast's doorbell. The window is small, so most of these wait somewhere."""
    await backend.register("g3-a", "g3-b")
    audiences = [("g3-a",), ("g3-a", "g3-b")] * 30
    here = await connect("g3-a")
    pushing = asyncio.gather(*(backend.push(*names) for names in audiences))
    seen = 0
    while seen < len(audiences):
        await here.next(Publish)
        seen = len(here.got)
        here.ack(here.got[-1])
    assert here.got == sorted(await pushing)
    assert len(set(here.got)) == len(audiences)


async def test_g4_every_delivery_is_in_one_state_at_every_moment(backend: Backend, connect: Dial) -> None:
    """Breaks if acknowledgements, expiry or evictions are recorded for one kind of push and not the other, or
    twice (`report` checks the sum each time)."""
    await backend.register("g4-a", "g4-b")
    one, both = await backend.push("g4-a"), await backend.push("g4-a", "g4-b")
    assert (await backend.report(one), await backend.report(both)) == ({"pending": 1}, {"pending": 2})
    here = await connect("g4-a")
    await here.pushed(2)
    assert (await backend.report(one), await backend.report(both)) == ({"pending": 1}, {"pending": 2})
    here.ack()
    await backend.report_becomes(one, delivered=1)
    await backend.report_becomes(both, delivered=1, pending=1)
    gone = [await backend.push("g4-b", ttl=0), await backend.push("g4-a", "g4-b", ttl=0)]
    assert await backend.report(gone[0]) == {"expired": 1}
    await here.pushed(3)
    here.ack(gone[1])
    await backend.report_becomes(gone[1], delivered=1, expired=1)


async def test_g4_what_the_newest_n_rule_drops_is_counted(backend: Backend, connect: Dial) -> None:
    await backend.register("g4-c", "g4-d")
    inbox = [await backend.push("g4-c") for _ in range(NEWEST + 1)]
    assert [await backend.report(msg_id) for msg_id in inbox] == [{"evicted": 1}, *[{"pending": 1}] * NEWEST]
    log = [await backend.push("g4-c", "g4-d") for _ in range(NEWEST + 1)]
    assert await backend.report(log[0]) == {"pending": 2}  # the log forgets when the device comes
    here = await connect("g4-c")
    assert (await here.pushed(WINDOW))[:WINDOW] == (inbox[1:] + log[1:])[:WINDOW]
    await backend.report_becomes(log[0], evicted=1, pending=1)


async def test_g5_the_newer_connection_wins_and_the_older_can_acknowledge_nothing(
    backend: Backend, connect: Dial
) -> None:
    """Breaks if the older session stays reachable after the newer one's CONNACK."""
    await backend.register("g5")
    msg_id = await backend.push("g5")
    older = await connect("g5")
    assert await older.pushed(1) == [msg_id]
    newer = await connect("g5")
    assert await newer.pushed(1) == [msg_id]
    older.ack()
    assert (await older.next(Disconnect)).reason is Reason.SESSION_TAKEN_OVER
    with pytest.raises((EOFError, ConnectionError)):
        await older.next(Pingresp)
    assert await newer.everything() == [msg_id]
    assert await backend.report(msg_id) == {"pending": 1}
    online = await backend.call("POST", "/v3/devices/status", {"registration_ids": ["g5"]})
    assert online[1]["g5"]["online"] is True
    newer.ack()
    await backend.report_becomes(msg_id, delivered=1)


async def test_g6_a_device_that_acknowledges_nothing_is_sent_a_window_and_no_more(
    limited: LocalServer, backend: Backend, connect: Dial
) -> None:
    """Breaks if pushes for a full window wait in memory, or are sent all the same."""
    await backend.register("g6-a", "g6-b")
    here = await connect("g6-a")
    before = (await asyncio.to_thread(limited.metrics))["holdfast_deliveries_in_flight"]
    ids = [await backend.push(*names) for names in [("g6-a",), ("g6-a", "g6-b")] * 20]
    assert await here.everything() == ids[:WINDOW]
    metrics = await asyncio.to_thread(limited.metrics)
    assert metrics["holdfast_deliveries_in_flight"] == before + WINDOW


async def test_g6_a_device_may_subscribe_to_so_many_topics(connect: Dial) -> None:
    """Breaks if `max_subscriptions` is not looked at."""
    here = await connect("g6-c")
    here.wire.send(Subscribe(1, tuple(Subscription(f"topic/{n}", 1) for n in range(3))))
    granted, full = Reason.GRANTED_QOS_1, Reason.QUOTA_EXCEEDED
    assert (await here.next(Suback)).reasons == (granted, granted, full)
