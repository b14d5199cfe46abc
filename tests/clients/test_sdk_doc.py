"""The examples of docs/sdk.md, run in order on a real server."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from broker.telling.callbacks import sign
from clients.device import Device
from clients.local_server import AppKeys, LocalServer
from clients.publisher import Audience, Notification, Options, Publisher, PushRequest
from tests.patience import PATIENCE

PAGE = (Path(__file__).parents[2] / "docs" / "sdk.md").read_text()


def examples(title: str) -> list[str]:
    section = re.search(rf"(?ms)^### {title}\n(.*?)(?=^##|\Z)", PAGE)
    assert section, title
    found: list[str] = re.findall(r"(?s)```python\n(.*?)```", section[1])
    assert found, title
    return found


class Page:
    """Runs its examples, which see each other's names."""

    def __init__(self, server: LocalServer, app: AppKeys) -> None:
        host, port = server.addresses.mqtt
        self._words = {
            "http://127.0.0.1:8080": server.addresses.http,
            'host="127.0.0.1"': f'host="{host}"',
            "port=1883": f"port={port}",
            "APP_KEY": app.app_key,
            "MASTER_SECRET": app.master_secret,
            "DEVICE_KEY": app.device_key,
        }
        self.names: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        return self.names[name]

    async def run(self, title: str) -> None:
        for code in examples(title):
            await self.run_code(code)

    async def run_code(self, code: str) -> None:
        for word, value in self._words.items():
            code = code.replace(word, value)
        compiled = compile(code, "docs/sdk.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        running = eval(compiled, self.names)  # our own page
        if inspect.iscoroutine(running):
            await asyncio.wait_for(running, PATIENCE)


@pytest.fixture
async def page(
    server: LocalServer, app: AppKeys, publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Page:
    monkeypatch.chdir(tmp_path)
    await publisher.register_device(
        "phone-1", platform="android", alias="ann", tags=["red"], attributes={"app_version": "2.9"}
    )
    for name in ("phone-2", "phone-3", "phone-4"):  # a slow push to one device is over at once
        await publisher.register_device(name)
    return Page(server, app)


PUBLISHER = ("Push", "Schedule", "Segment", "File", "Devices", "Reports", "Callbacks")
DEVICE = ("Receive", "Tell what people did", "Say who it is", "Follow the phone", "End")


def test_every_part_of_the_page_is_run() -> None:
    assert tuple(re.findall(r"(?m)^### (.*)$", PAGE)) == PUBLISHER + DEVICE
    assert PAGE.count("```python") == sum(len(examples(title)) for title in PUBLISHER + DEVICE)


async def test_the_publishers_half(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = examples("Push")
    await page.run_code(first)
    async with page["publisher"]:
        for code in others:
            await page.run_code(code)
        said = capsys.readouterr().out.splitlines()
        assert (said[0], said[1][:9]) == (str(page["accepted"].msg_id), "1011 400 ")
        assert said[2:] == ["[False, True]", "Estimate(registered=1, online=0)", "paused"]
        await page.run("Schedule")
        assert [one async for one in page["publisher"].schedules.all()] != []
        assert not (await page["publisher"].schedules.get(page["schedule_id"])).enabled
        await page.run("Segment")
        assert (page["estimate"].registered, page["estimate"].online) == (1, 0)
        await page.run("File")
        capsys.readouterr()
        await page.run("Devices")
        assert capsys.readouterr().out.endswith("['red', 'vip'] ['phone-7']\n")
        assert await page["publisher"].tags.has("vip", "phone-1")
        await page.run("Reports")
        said = capsys.readouterr().out.splitlines()
        assert said[:2] == ["sending 1 0 1 0", "pending ['accepted', 'matched']"]
        assert (await page["publisher"].reports.push(page["won"].msg_id)).recalled == 1
        await page.run("Callbacks")


async def test_the_receiver_of_callbacks(page: Page, publisher: Publisher) -> None:
    page.names["publisher"] = publisher
    await page.run("Callbacks")
    answer: Callable[[str, bytes], int] = page["answer"]
    event = {
        "event_id": "7", "msg_id": "5", "event": "delivered", "at": 1.5, "registration_ids": ["a"], "params": None,
    }  # fmt: skip
    body = orjson.dumps({"app_key": "k", "sent_at": 1.5, "events": [event]})
    secret = (await publisher.callbacks.counts()).signing_secret
    right = sign(secret, int(time.time()), body)
    assert [answer(right, body), answer(right, body)] == [200, 200]
    assert page["seen"] == {"7"}
    old = sign(secret, int(time.time()) - 301, body)
    assert [answer(right, body + b" "), answer("", body), answer(old, body)] == [403, 403, 403]


async def test_the_devices_half(page: Page, publisher: Publisher) -> None:
    page.names["Path"] = Path
    await page.run("Receive")
    device: Device = page["device"]
    try:
        first = await send(publisher)
        await happens(lambda: list(page["shown"]) == [first])
        assert page["shown"][first] == {"alert": "Hello"}
        await page.run("Tell what people did")
        report = await publisher.reports.push(first)
        assert (report.shown, report.clicked) == (1, 1)
        await page.run("Say who it is")
        found = await publisher.device("tablet-1")
        assert (found.alias, found.tags) == ("bob", {"news"})
        assert found.attributes == {"app_version": "2.10.1", "language": "de", "level": 7}
        second = await send(publisher, Options(override_msg_id=first))
        await happens(lambda: list(page["shown"]) == [second])
        await publisher.withdraw(second)
        await happens(lambda: not page["shown"])
        await page.run("Follow the phone")
        assert device.online
        await page.run("End")
        assert not device.online
    finally:
        await device.close()


async def send(publisher: Publisher, options: Options | None = None) -> int:
    request = PushRequest(Audience(registration_id=["tablet-1"]), Notification("Hello"), options=options)
    return (await publisher.push(request)).msg_id


async def happens(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            if true():
                return
            await asyncio.sleep(0.02)
