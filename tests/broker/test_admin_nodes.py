"""What the operator sees and asks of nodes and devices, on the embedded store."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pyroaring import BitMap

from broker.admin import LocalActions, describe_node
from broker.broker import Broker
from broker.bus_local import LocalBus
from broker.errors import ApiError
from broker.model import App, NewMessage, NodeEntry, NodeInfo
from broker.store_sqlite import SqliteStore

NOW = 1_700_000_000.0


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    store = SqliteStore(tmp_path / "holdfast.db", clock=lambda: NOW)
    await store.open()
    yield Broker(store, LocalBus(), clock=lambda: NOW)
    await store.close()


@pytest.fixture
def actions(broker: Broker) -> LocalActions:
    return LocalActions(broker, 100)


@pytest.fixture
async def app(broker: Broker) -> App:
    return await broker.apps.create("Shop")


def _push(app: App, devnos: list[int], *, broadcast: bool = False) -> NewMessage:
    return NewMessage(app.app_id, b"{}", BitMap(devnos), broadcast, NOW, NOW + 60)


async def test_a_device_is_found_with_its_node_and_what_waits_for_it(
    broker: Broker, actions: LocalActions, app: App
) -> None:
    for name in ("phone-1", "phone-2"):
        await broker.devices.register(app, registration_id=name, trusted=True)
    await broker.store.append([_push(app, [0]), _push(app, [0, 1], broadcast=True), _push(app, [1])])
    away = await actions.find_device(app.key, "phone-1")
    assert away == {
        "registration_id": "phone-1",
        "online": False,
        "node": None,
        "epoch": 0,
        "seen_at": None,
        "waiting": 2,
    }
    claims = []
    broker.store.claim_route(app.app_id, 0, "node-7", claims.append)
    there = await actions.find_device(app.key, "phone-1")
    assert isinstance(there, dict)
    assert (there["online"], there["node"], there["epoch"]) == (True, "node-7", claims[0].epoch)
    broker.store.release_route(app.app_id, 0, claims[0].epoch, NOW)
    gone = await actions.find_device(app.key, "phone-1")
    assert isinstance(gone, dict)
    assert (gone["online"], gone["node"], gone["seen_at"]) == (False, None, int(NOW))


async def test_a_device_or_app_that_is_not_there_is_said(actions: LocalActions, app: App) -> None:
    with pytest.raises(ApiError, match="no device phone-9"):
        await actions.find_device(app.key, "phone-9")
    with pytest.raises(ApiError, match="no app"):
        await actions.find_device("nobody", "phone-9")


async def test_nodes_are_listed_with_their_state(broker: Broker, actions: LocalActions) -> None:
    assert await actions.list_nodes() == []
    await broker.store.nodes.join(NodeInfo("a", address="h:1", connections=3, version="1.2", started_at=NOW))
    [node] = await actions.list_nodes()
    assert node == {
        "name": "a",
        "role": "all",
        "state": "live",
        "connections": 3,
        "address": "h:1",
        "admin": "",
        "pid": 0,
        "version": "1.2",
        "started_at": int(NOW),
        "beat_age": max(0, round(NOW - time.time())),
        "wish": "",
    }


STATES = [(True, False, "live"), (True, True, "draining"), (False, False, "lost"), (False, True, "lost")]


@pytest.mark.parametrize(("live", "draining", "state"), STATES)
def test_what_does_not_beat_is_lost_whatever_it_said(live: bool, draining: bool, state: str) -> None:
    described = describe_node(NodeEntry(NodeInfo("a", draining=draining), 1, NOW - 7.4, live), NOW)
    assert (described["state"], described["beat_age"]) == (state, 7)


async def test_a_wish_reaches_the_node_and_the_audit_log(broker: Broker, actions: LocalActions) -> None:
    nodes = broker.store.nodes
    await nodes.join(NodeInfo("a"))
    wishes = []
    for wish in (actions.drain_node("a"), actions.drain_node("a", 0.25), actions.resume_node("a")):
        answer = await wish
        assert isinstance(answer, dict)
        assert answer["nodes"] == ["a"]
        wishes.append((await nodes.beat(NodeInfo("a"))).wish)
    assert wishes == ["drain", f"rebalance:25:{int(NOW)}", "resume"]
    entries = await broker.store.list_audit(None, 0, 10)
    assert [entry.action for _, entry in entries] == ["node.resume", "node.drain", "node.drain"]


class Named:
    """Nodes by these names."""

    lease = 10.0

    def __init__(self, *names: str) -> None:
        self.names = names
        self.wished: list[str] = []

    async def list(self) -> list[NodeEntry]:
        return [NodeEntry(NodeInfo(name), 1, NOW, not name.endswith("dead")) for name in self.names]

    async def wish(self, name: str, wish: str) -> bool:
        self.wished.append(name)
        return name in self.names


NAMES = [
    ("push7", ["push7-1", "push7-2"], ["push7-1", "push7-2"]),
    ("push7-1", ["push7-1", "push7-2"], ["push7-1"]),
    ("push7", ["push7", "push7-1"], ["push7"]),  # who has the name is meant
    ("push", ["push7-1", "push-7-1", "push-1"], ["push-1"]),
]


@pytest.mark.parametrize(("named", "names", "wished"), NAMES)
async def test_a_supervisor_is_named_without_the_numbers_of_its_workers(
    broker: Broker, actions: LocalActions, named: str, names: list[str], wished: list[str]
) -> None:
    nodes = Named(*names, "push7-dead")
    broker.store.nodes = nodes  # type: ignore[misc, assignment]
    assert await actions.drain_node(named) == {"nodes": wished, "wish": "drain"}
    assert nodes.wished == wished
    for missing in ("push7-dead", "nobody"):
        with pytest.raises(ApiError, match=f"no live node {missing}"):
            await actions.drain_node(missing)
