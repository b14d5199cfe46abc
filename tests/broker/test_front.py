"""What the front of a supervisor's workers answers the operator of carriers: as its workers would."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from broker.carriers.learning import Learning
from broker.carriers.profile import CarrierProfile
from broker.carriers.silences import LEAST, LEAST_DEATHS, bin_of
from broker.store_redis import RedisStore
from clients.local_server import LocalServer
from tests.fleet_rig import Redis
from tests.patience import PATIENCE

pytestmark = pytest.mark.xdist_group("supervisor")

HOME = "[recognise]\nnames = ['home']\n[[addresses]]\nhost = '{}.example.com'\nport = 1883\n"


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    redis = Redis(tmp_path / "redis")
    redis.start()
    yield f"redis://127.0.0.1:{redis.port}"
    redis.kill()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    found = tmp_path / "carriers"
    found.mkdir()
    (found / "default.toml").write_text("")
    (found / "home.toml").write_text(HOME.format("a"))
    return found


@pytest.fixture
def crew(tmp_path: Path, url: str, directory: Path) -> Iterator[LocalServer]:
    asyncio.run(_learn(url))
    flags = ("--store", url, "--workers", "1", "--carriers-directory", str(directory))
    server = LocalServer(tmp_path / "crew", *flags)
    server.start()
    yield server
    server.kill()


async def _learn(url: str) -> None:
    """Before it starts: that devices of home die of 200 seconds."""
    store = RedisStore(url)
    await store.open()
    learning = Learning(store.records)
    await learning.open("before")
    network = learning.network(CarrierProfile(name="home"), "wifi")
    for _ in range(LEAST):
        network.survived(bin_of(100))
    for _ in range(LEAST_DEATHS):
        network.died(bin_of(200))
    await learning.close()
    await store.close()


def _ask(crew: LocalServer) -> dict[str, Any]:
    key = orjson.loads((crew.data_dir / "admin.json").read_bytes())["key"]
    request = urllib.request.Request(
        f"{crew.addresses.admin}/v1/dispatch?carrier=home&link=wifi",
        headers={"Authorization": f"Bearer {key}"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        answer: dict[str, Any] = orjson.loads(response.read())
    return answer


def _until_told(crew: LocalServer, address: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while (told := _ask(crew)["addresses"]) != [f"tcp://{address}.example.com:1883"]:
        assert time.monotonic() < deadline, told
        time.sleep(0.05)


def _reload(crew: LocalServer) -> None:
    os.kill(crew.pid, signal.SIGHUP)


def test_the_front_knows_what_was_learned_and_reads_the_profiles_again(
    crew: LocalServer, directory: Path
) -> None:
    answer = _ask(crew)
    assert (answer["addresses"], answer["heartbeat"]) == (["tcp://a.example.com:1883"], "100 30 1200")
    (directory / "home.toml").write_text(HOME.format("b"))
    _reload(crew)
    _until_told(crew, "b")
    (directory / "home.toml").write_text(HOME.format("c") + "[heartbeat]\nstart = 1\n")
    _reload(crew)
    deadline = time.monotonic() + PATIENCE
    while crew.log_text().count("not reloaded, the old ones stay") < 2:  # the worker, and the front
        assert time.monotonic() < deadline, crew.log_text()
        time.sleep(0.05)
    assert "home.toml" in crew.log_text()
    _until_told(crew, "b")
