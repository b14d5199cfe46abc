"""What the fuzzer begins with, and what it once broke something with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz import seeds, targets

FOUND: dict[str, list[bytes]] = {
    "codec": [],
    "websocket": [],
    "node": [],
}


@pytest.fixture(scope="module")
def node() -> Iterator[targets.Node]:
    node = targets.Node()
    yield node
    node.close()


@pytest.mark.parametrize("raw", [*seeds.of("codec"), *FOUND["codec"]], ids=lambda raw: raw[:8].hex())
def test_codec(raw: bytes) -> None:
    targets.codec(raw)


@pytest.mark.parametrize("raw", [*seeds.of("websocket"), *FOUND["websocket"]], ids=lambda raw: raw[:8].hex())
def test_websocket(raw: bytes) -> None:
    targets.websocket(raw)


def test_node(node: targets.Node) -> None:
    for raw in (*seeds.of("node"), *FOUND["node"]):
        node(raw)
