"""What became of a push, told end to end: a real server, devices with the SDK, and the report over HTTP."""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import aiohttp
import orjson
import pytest

from clients.device import Device, LinkSettings, Push
from clients.local_server import LocalServer
from gateway.mqtt import Connect, Publish
from tests.crash_load import Wire
from tests.patience import PATIENCE

QUICK = LinkSettings(backoff_base=0.05, backoff_cap=0.2, answer_timeout=PATIENCE)
STATES = ("delivered", "pending", "expired", "evicted", "recalled", "suppressed")


class Backend:
    def __init__(self, server: LocalServer, http: aiohttp.ClientSession) -> None:
        self.server = server
        self._http = http

    async def call(self, method: str, path: str, body: object = None) -> Any:
        raw = None if body is None else orjson.dumps(body)
        async with self._http.request(method, self.server.addresses.http + path, data=raw) as answer:
            assert answer.status == 200, await answer.text()
            return orjson.loads(await answer.read() or b"null")

    async def push(self, *names: str) -> str:
        body = {
            "platform": "all", "audience": {"registration_id": names}, "notification": {"alert": "hi"},
            "options": {"sendno": 17},
        }  # fmt: skip
        return str((await self.call("POST", "/v3/push", body))["msg_id"])

    async def becomes(self, msg_id: str, **counts: int) -> dict[str, Any]:
        """The report, once these counts are so. It adds up whenever one looks (G4)."""
        deadline = time.monotonic() + PATIENCE
        while True:
            report: dict[str, Any] = await self.call("GET", f"/v1/pushes/{msg_id}")
            assert report["target"] == sum(report[state] for state in STATES), report
            if all(report[name] == count for name, count in counts.items()):
                return report
            assert time.monotonic() < deadline, report


@pytest.fixture
async def backend(server: LocalServer) -> AsyncIterator[Backend]:
    login = b64encode(f"{server.app.app_key}:{server.app.master_secret}".encode()).decode()
    async with aiohttp.ClientSession(headers={"Authorization": f"Basic {login}"}) as http:
        yield Backend(server, http)


Join = Callable[[str], Any]


@pytest.fixture
async def join(server: LocalServer) -> AsyncIterator[Join]:
    """Connects a device; returns it, and a queue of what it gets."""
    devices: list[Device] = []

    async def run(name: str) -> tuple[Device, asyncio.Queue[Push]]:
        host, port = server.addresses.mqtt
        got: asyncio.Queue[Push] = asyncio.Queue()
        device = Device(
            server.app.app_key, name, host=host, port=port, settings=QUICK,
            device_key=server.app.device_key, on_push=got.put_nowait,
        )  # fmt: skip
        devices.append(device)
        await device.start()
        await asyncio.wait_for(device.connected(), PATIENCE)
        return device, got

    yield run
    for device in devices:
        await device.close()


async def test_a_push_is_told_from_its_acceptance_to_the_click(backend: Backend, join: Join) -> None:
    await backend.call("POST", "/v1/devices", {"registration_id": "away"})
    device, got = await join("here")
    before = time.time()
    msg_id = await backend.push("here", "away")
    push = await asyncio.wait_for(got.get(), PATIENCE)
    await device.receipt(push, "shown")
    await device.receipt(push, "clicked")
    report = await backend.becomes(msg_id, delivered=1, shown=1, clicked=1)
    assert before - 1 <= report["accepted_at"] <= time.time()
    counts = {name: report[name] for name in ("target", "online", "sent", "pending", "dismissed")}
    assert counts == {"target": 2, "online": 1, "sent": 1, "pending": 1, "dismissed": 0}
    assert (report["state"], report["sendno"]) == ("sending", "17")
    curve = await backend.call("GET", f"/v1/pushes/{msg_id}/curve")
    assert curve["hours"] == [
        {
            "hour": 0,
            "at": report["accepted_at"],
            "sent": 1,
            "delivered": 1,
            "shown": 1,
            "clicked": 1,
            "dismissed": 0,
        }
    ]
    trace = await backend.call("GET", f"/v1/pushes/{msg_id}/devices/here")
    assert trace["status"] == "delivered"
    steps = trace["steps"]
    assert [step["step"] for step in steps] == [
        "accepted", "matched", "sent", "acknowledged", "shown", "clicked",
    ]  # fmt: skip
    assert all(report["accepted_at"] <= step["at"] <= time.time() for step in steps)
    assert {step["resolution"] <= 1 for step in steps} == {True}
    assert [step["step"] for step in steps if "node" in step] == ["sent", "acknowledged"]
    trace = await backend.call("GET", f"/v1/pushes/{msg_id}/devices/away")
    assert (trace["status"], [step["step"] for step in trace["steps"]]) == (
        "pending",
        ["accepted", "matched"],
    )


async def test_what_was_sent_and_not_acknowledged_is_told_apart(
    backend: Backend, server: LocalServer
) -> None:
    await backend.call("POST", "/v1/devices", {"registration_id": "silent"})
    connect = Connect(
        "silent", False, 60, server.app.app_key, server.app.device_key.encode(),
        properties={"session_expiry_interval": 600},
    )  # fmt: skip
    wire = await Wire.open(server.addresses.mqtt, connect)
    try:
        msg_id = await backend.push("silent")
        async with asyncio.timeout(PATIENCE):
            while not isinstance(wire.next(), Publish):
                await wire.fill()
    finally:
        wire.abort()
    report = await backend.becomes(msg_id, sent=1)
    assert (report["delivered"], report["pending"], report["online"]) == (0, 1, 1)
    trace = await backend.call("GET", f"/v1/pushes/{msg_id}/devices/silent")
    assert (trace["status"], [step["step"] for step in trace["steps"]]) == (
        "pending",
        ["accepted", "matched", "sent"],
    )


async def test_a_withdrawn_push_says_so(backend: Backend) -> None:
    await backend.call("POST", "/v1/devices", {"registration_id": "gone"})
    msg_id = await backend.push("gone")
    await backend.call("DELETE", f"/v3/push/{msg_id}")
    report = await backend.becomes(msg_id, recalled=1)
    assert report["state"] == "withdrawn"
    trace = await backend.call("GET", f"/v1/pushes/{msg_id}/devices/gone")
    assert [step["step"] for step in trace["steps"]] == ["accepted", "matched", "recalled"]


async def test_users_are_counted_by_the_hour(backend: Backend, join: Join) -> None:
    hour = f"{datetime.now(UTC):%Y-%m-%d %H}"
    query = f"/v3/users?time_unit=HOUR&start={hour}&duration=2".replace(" ", "%20")

    async def counted() -> list[int]:
        items = (await backend.call("GET", query))["items"]
        return [sum(item["other"][name] for item in items) for name in ("new", "online", "active")]

    before = await counted()
    device, _ = await join("a-user")
    assert await counted() == [before[0] + 1, before[1] + 1, before[2]]
    await device.event("bought", {"n": 1})
    assert (await counted())[2] == before[2] + 1
