"""The settings of the HTTP API's door reach it."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from broker.config import load_config
from gateway.server import Service

OFF = {"mqtt.port": "0", "mqtt.ws_port": "off", "http.port": "0", "admin.port": "0"}


@pytest.fixture(autouse=True)
def _interpreter_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.server.tune_interpreter", lambda _: None)


@pytest.mark.parametrize(
    ("flags", "status", "code"),
    [
        ({}, 401, 1004),
        ({"http.trusted_proxies": "127.0.0.0/8", "http.https_only": "true"}, 404, 1020),
        ({"http.trusted_proxies": "10.0.0.0/8", "http.https_only": "true"}, 404, 1020),
    ],
)
async def test_https_only_is_wired(tmp_path: Path, flags: dict[str, str], status: int, code: int) -> None:
    service = Service(load_config(None, None, {"server.data_dir": str(tmp_path), **OFF, **flags}))
    listening = await service.open()
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{listening.http}/v3/push/cid") as answer,
        ):
            assert (answer.status, (await answer.json())["error"]["code"]) == (status, code)
        trusted = "127" in flags.get("http.trusted_proxies", "")
        async with (
            aiohttp.ClientSession(headers={"X-Forwarded-Proto": "https"}) as session,
            session.get(f"http://{listening.http}/v3/push/cid") as answer,
        ):
            assert answer.status == (401 if trusted or not flags else 404)
    finally:
        await service.close()
