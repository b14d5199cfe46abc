"""Keys, settings, the audit log and callbacks through the publisher SDK."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from clients.local_server import AppKeys, LocalServer
from clients.publisher import (
    CallbackTo,
    FrequencyCap,
    Notification,
    Publisher,
    PushError,
    PushRequest,
    QuietHours,
    Settings,
    SignatureError,
    read_callback,
    verify_signature,
)
from tests.conftest import StartServer
from tests.patience import PATIENCE

HELLO = Notification("Hello")


async def test_a_key_opens_what_its_scopes_say(
    server: LocalServer, app: AppKeys, publisher: Publisher
) -> None:
    ends = int(time.time()) + 3600
    key = await publisher.keys.create("reports", ["report"], expires_at=ends, allow_from=["127.0.0.0/8"])
    assert (key.name, key.scopes, key.expires_at) == ("reports", ["report"], ends)
    async with Publisher(app.app_key, key.secret, server.addresses.http) as reader:
        assert not (await reader.received_detail([1]))[0].known
        with pytest.raises(PushError) as caught:
            await reader.push(PushRequest("all", HELLO))
        assert caught.value.http_status in (401, 403)
        [listed] = await publisher.keys.list()
        assert (listed.id, listed.allow_from) == (key.id, ["127.0.0.0/8"])
        await publisher.keys.delete(key.id)
        with pytest.raises(PushError) as caught:
            await reader.received_detail([1])
        assert caught.value.http_status == 401
    assert await publisher.keys.list() == []


async def test_settings_are_read_and_replaced(publisher: Publisher) -> None:
    assert await publisher.settings() == Settings()
    wanted = Settings(
        ("127.0.0.0/8",),
        QuietHours("22:00", "07:00", "Europe/Berlin", "suppress"),
        (FrequencyCap(3), FrequencyCap(1, "hour", "Asia/Tokyo")),
        CallbackTo("https://example.com/told", ["delivered", "clicked"], {"a": 1}),
    )
    assert await publisher.change_settings(wanted) == wanted
    assert await publisher.settings() == wanted
    assert await publisher.change_settings(Settings()) == Settings()
    with pytest.raises(PushError, match=r"quiet_hours\.zone") as caught:
        await publisher.change_settings(Settings(quiet_hours=QuietHours("22:00", "07:00", "Nowhere")))
    assert caught.value.code == 1003


async def test_the_audit_log_names_what_was_done(publisher: Publisher) -> None:
    for number in range(101):
        await publisher.change_settings(Settings(frequency_caps=(FrequencyCap(number + 1),)))
    await publisher.keys.create("k", ["push"])
    entries = [entry async for entry in publisher.audit()]
    assert [entry.action for entry in entries[:2]] == ["key.create", "settings.set"]
    assert len([entry for entry in entries if entry.action == "settings.set"]) == 101
    assert (entries[0].actor, entries[0].outcome, entries[0].address) == ("master", "done", "127.0.0.1")


# Callbacks


async def parked(publisher: Publisher) -> None:
    """Wait until something was given up."""
    async with asyncio.timeout(PATIENCE):
        while True:
            if (await publisher.callbacks.counts()).parked:
                return
            await asyncio.sleep(0.02)


async def test_what_nobody_takes_is_parked(publisher: Publisher) -> None:
    """Loopback is no address for callbacks, unless the operator says so."""
    await publisher.register_device("a")
    told = CallbackTo("http://127.0.0.1:9/told", ["recalled"])
    msg_id = (await publisher.push(PushRequest("all", HELLO, callback=told))).msg_id
    await publisher.withdraw(msg_id)
    await parked(publisher)
    [event] = [event async for event in publisher.callbacks.parked()]
    assert (event.msg_id, event.event, event.devices, event.url) == (msg_id, "recalled", 1, told.url)
    assert "not a public address" in event.error
    assert await publisher.callbacks.retry() == 1
    await parked(publisher)
    assert await publisher.callbacks.drop() == 1
    counts = await publisher.callbacks.counts()
    assert (counts.waiting, counts.parked) == (0, 0)


class Receiver:
    """Of callbacks: keeps what came."""

    def __init__(self) -> None:
        self.came: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()

    async def take(self, request: web.Request) -> web.Response:
        self.came.put_nowait((request.headers["Holdfast-Signature"], await request.read()))
        return web.Response()


@pytest.fixture
async def receiver() -> AsyncIterator[tuple[Receiver, str]]:
    receiver, application = Receiver(), web.Application()
    application.router.add_post("/told", receiver.take)
    async with TestServer(application) as server:
        yield receiver, str(server.make_url("/told"))


async def test_a_callback_arrives_and_is_signed(
    start_server: StartServer, tmp_path: Path, receiver: tuple[Receiver, str]
) -> None:
    (tmp_path / "holdfast.toml").write_text("[callbacks]\nprivate_addresses = true\n")
    server = start_server("--config", str(tmp_path / "holdfast.toml"))
    desk, url = receiver
    async with Publisher(server.app.app_key, server.app.master_secret, server.addresses.http) as publisher:
        await publisher.register_device("a")
        told = CallbackTo(url, ["recalled"], {"order": 17})
        msg_id = (await publisher.push(PushRequest("all", HELLO, callback=told))).msg_id
        await publisher.withdraw(msg_id)
        header, body = await asyncio.wait_for(desk.came.get(), PATIENCE)
        secret = (await publisher.callbacks.counts()).signing_secret
    callback = read_callback(secret, header, body, time.time())
    [event] = callback.events
    assert (callback.app_key, event.msg_id, event.event) == (server.app.app_key, msg_id, "recalled")
    assert (event.registration_ids, event.params) == (["a"], {"order": 17})


def signed(at: int, body: bytes, secret: str = "secret") -> str:
    digest = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"


@pytest.mark.parametrize(
    ("header", "now", "told"),
    [
        (signed(1000, b"{}"), 1000.0, None),
        (signed(1000, b"{}"), 1299.0, None),
        (signed(1000, b"{}"), 1301.0, "signed 301 seconds ago"),
        (signed(1000, b"{}"), 600.0, "signed -400 seconds ago"),
        (signed(1000, b"[]"), 1000.0, "does not fit"),
        (signed(1000, b"{}", "other"), 1000.0, "does not fit"),
        (signed(1000, b"{}").replace("t=1000", "t=1001"), 1000.0, "does not fit"),
        ("", 1000.0, "not of the form"),
        ("v1=00,t=5", 1000.0, "not of the form"),
    ],
)
def test_signatures(header: str, now: float, told: str | None) -> None:
    if told is None:
        verify_signature("secret", header, b"{}", now)
        return
    with pytest.raises(SignatureError, match=told):
        verify_signature("secret", header, b"{}", now)


def test_a_callback_of_another_shape_is_an_error() -> None:
    with pytest.raises(msgspec.DecodeError):
        read_callback("secret", signed(5, b"{}"), b"{}", 5.0)


def test_all_kinds_of_events_are_read() -> None:
    event: dict[str, Any] = {
        "event_id": "7", "msg_id": "8", "event": "clicked", "at": 1.5, "registration_ids": ["a"], "params": None,
    }  # fmt: skip
    body = msgspec.json.encode({"app_key": "k", "sent_at": 2.5, "events": [event]})
    assert read_callback("secret", signed(5, body), body, 5.0).events[0].msg_id == 8
