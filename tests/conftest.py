"""A real server for every test that wants one.

`server` is one for the whole test module: use registration ids of your own, or `server.create_app(name)`.
`start_server(*flags)` starts another one, for tests that kill or configure it. All are killed at the end of the
module, which fails if a server logged a traceback.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from random import SystemRandom
from typing import Final

import pytest
from hypothesis import HealthCheck, settings

from clients.local_server import LocalServer
from tests.ports import listeners

StartServer = Callable[..., LocalServer]

# A test that stood still between dialling and CONNECT is not refused.
PATIENT: Final = ("--mqtt-connect-timeout", "60")

# Examples have no time limit, nor has making them: a machine that stood still for a moment says nothing of the code.
settings.register_profile("holdfast", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("holdfast")


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    servers: list[LocalServer] = []

    def start(*flags: str) -> LocalServer:
        servers.append(LocalServer(tmp_path_factory.mktemp("server"), *listeners(), *flags))
        servers[-1].start()
        return servers[-1]

    yield partial(start, *PATIENT)
    for server in servers:
        server.kill()
    for server in servers:
        assert "Traceback" not in server.log_text(), server.log_text()


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> LocalServer:
    return start_server()


@pytest.fixture
def seed() -> int:
    """Of a crash test; HOLDFAST_CRASH_SEED repeats one."""
    chosen = int(os.environ.get("HOLDFAST_CRASH_SEED") or SystemRandom().randrange(2**32))
    print(f"HOLDFAST_CRASH_SEED={chosen}")  # noqa: T201 - pytest shows it when the test fails
    return chosen
