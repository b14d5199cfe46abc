"""One server for the whole folder: each test uses a client id and topics of its own (`name`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from clients.local_server import LocalServer
from tests.conftest import PATIENT

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    shared = LocalServer(tmp_path_factory.mktemp("conformance"), *PATIENT)
    shared.start()
    yield shared
    shared.kill()
    assert "Traceback" not in shared.log_text(), shared.log_text()


@pytest.fixture
def name() -> str:
    """A client id, or the first level of topics, that no other test uses."""
    return f"c{next(_numbers)}"


@pytest.fixture(params=[4, 5], ids=["mqtt311", "mqtt5"])
def version(request: pytest.FixtureRequest) -> int:
    """For a rule that is the same in both."""
    return int(request.param)
