"""Of several processes with the same bridge one works: who leads, and what becomes of the messages when it stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from broker.bridging import bridge, lead
from broker.bridging.bridge import Bridge, BridgeSettings, make_bridge
from broker.bridging.bridge_rules import read_rules
from broker.bridging.lead import LEASE, LOOK_EVERY, TAKE_AFTER, Lead
from broker.broker import Broker
from broker.config import Bridge as WantedBridge
from broker.config import Config, Server, Store
from broker.metrics import Metrics
from broker.model import NewDevice
from broker.store import StoreUnavailable
from broker.store_redis import RedisStore
from tests.broker.redis_rigs import Rig
from tests.broker.store_contract import Clock
from tests.broker.test_bridge_push import (
    ForeignBroker,
    mosquitto,
    needs_mosquitto,
    publish,
    until,
    write_rules,
)

__all__ = ["mosquitto"]


@pytest.fixture
async def stores(plain: Rig) -> AsyncIterator[list[RedisStore]]:
    """Of two processes."""
    async with AsyncExitStack() as stack:
        made = [RedisStore(plain.url) for _ in range(2)]
        for store in made:
            await store.open()
            stack.push_async_callback(store.close)
        yield made


@pytest.fixture
async def stack(stores: list[RedisStore]) -> AsyncIterator[AsyncExitStack]:
    """Ends before the stores do."""
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def leads(stores: list[RedisStore]) -> tuple[Lead, Lead, Clock, Clock]:
    """Their clocks have nothing to do with each other."""
    clocks = Clock(), Clock()
    clocks[1].now = 5.0
    one, other = (
        Lead(store.records, "bridge", name, clock)
        for store, name, clock in zip(stores, ("n1", "n2"), clocks, strict=True)
    )
    return one, other, *clocks


async def test_one_of_those_who_look_at_once_leads(leads: tuple[Lead, Lead, Clock, Clock]) -> None:
    one, other, *_ = leads
    assert sorted(await asyncio.gather(one.look(), other.look())) == [False, True]
    assert sorted([one.held, other.held]) == [False, True]


async def test_a_leader_leads_as_long_as_it_looks(leads: tuple[Lead, Lead, Clock, Clock]) -> None:
    one, other, *clocks = leads
    for _ in range(20):
        assert await one.look()
        assert not await other.look()
        for clock in clocks:
            clock.now += LOOK_EVERY


async def test_a_leader_that_stands_still_leads_no_more_before_another_does(
    leads: tuple[Lead, Lead, Clock, Clock],
) -> None:
    one, other, mine, theirs = leads
    assert await one.look()
    assert not await other.look()
    mine.now += LEASE
    theirs.now += LEASE
    assert not one.held
    assert not await other.look()
    theirs.now += TAKE_AFTER - LEASE
    assert await other.look()
    assert not await one.look()
    assert other.held


async def test_a_leader_that_cannot_reach_the_store_leads_until_its_lease_ends(
    leads: tuple[Lead, Lead, Clock, Clock], stores: list[RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _, mine, _ = leads
    assert await one.look()

    async def away(*_: object) -> None:
        raise StoreUnavailable("away")

    monkeypatch.setattr(stores[0].records, "find", away)
    mine.now += LEASE - 1
    assert await one.look()
    mine.now += 1
    assert not await one.look()


async def test_what_is_released_is_taken_at_once(leads: tuple[Lead, Lead, Clock, Clock]) -> None:
    one, other, *_ = leads
    assert await one.look()
    assert not await other.look()
    await other.release()  # it has nothing to release
    assert await one.look()
    await one.release()
    assert not one.held
    assert await other.look()


async def test_a_process_that_starts_anew_under_its_name_goes_on_at_once(
    leads: tuple[Lead, Lead, Clock, Clock], stores: list[RedisStore]
) -> None:
    assert await leads[0].look()
    assert await Lead(stores[1].records, "bridge", "n1").look()


@pytest.mark.parametrize(
    ("url", "group", "client_id", "led"),
    [
        ("", None, "holdfast-n1", False),
        ("redis://127.0.0.1", None, "holdfast-bridge", True),
        ("redis://127.0.0.1", "us", "holdfast-n1", False),
    ],
)
async def test_processes_that_share_a_store_take_turns_unless_the_foreign_broker_shares_out(
    stores: list[RedisStore], tmp_path: Path, url: str, group: str | None, client_id: str, led: bool
) -> None:
    config = Config(
        server=Server(node_id="n1"),
        store=Store(url=url),
        bridge=WantedBridge(host="::1", rules=write_rules(tmp_path, "a"), group=group),
    )
    broker = Broker(stores[0], stores[0].bus)
    made = make_bridge(config, broker.apps, broker.pushes, Metrics(), stores[0].records)
    assert made is not None
    assert (made._settings.client_id, made._lead is not None) == (client_id, led)
    await broker.close()


@needs_mosquitto
async def test_each_message_is_pushed_once_and_the_next_leader_gets_what_waits(
    stores: list[RedisStore],
    mosquitto: ForeignBroker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stack: AsyncExitStack,
) -> None:
    for module in (bridge, lead):
        monkeypatch.setattr(module, "LOOK_EVERY", 0.05)
    brokers = [Broker(store, store.bus) for store in stores]
    app = await brokers[0].apps.create("shop")
    await stores[0].register(app.app_id, [NewDevice("d", alias="ann")])
    settings = BridgeSettings(
        *mosquitto.address, client_id="holdfast-bridge", rules=read_rules(write_rules(tmp_path, app.key))
    )
    bridges = [
        Bridge(settings, broker.apps, broker.pushes, 0.05, lead=Lead(store.records, "bridge", name, Clock()))
        for broker, store, name in zip(brokers, stores, ("n1", "n2"), strict=True)
    ]
    for started in (*brokers, *bridges):
        stack.push_async_callback(started.close)

    def pushed() -> int:
        return sum(one.stats.pushed for one in bridges)

    async def send(first: int) -> None:
        await publish(
            mosquitto, *(("orders/ann/shipped", {"text": str(n)}) for n in range(first, first + 10))
        )

    await bridges[0].open()
    await until(lambda: bridges[0].stats.connected)
    await bridges[1].open()
    await send(0)
    await until(lambda: pushed() == 10)
    assert bridges[1].stats.received == 0
    assert not bridges[1].stats.connected
    await bridges[0].close()
    await send(10)
    await until(lambda: bridges[1].stats.pushed == 10)
    assert pushed() == 20
