"""What services written for one process do when several brokers share a Redis: each broker has a store of its own, as
another process would."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import orjson
import pytest
from msgspec.structs import replace as with_fields

from broker.broker import Broker
from broker.errors import ApiError
from broker.later.timekeeper import Timekeeper
from broker.model import AppSettings, FrequencyCap, NewDevice, Record, RecordChange
from broker.redis.engine import Engine
from broker.store import Conflict, StoreUnavailable
from broker.store_redis import RedisStore
from broker.tenants import quotas, tokens
from tests.broker.redis_index import APP, open_sides
from tests.broker.redis_rigs import Rig
from tests.broker.store_contract import START, Clock
from tests.patience import PATIENCE

HELLO = orjson.dumps({"platform": "all", "audience": "all", "notification": {"alert": "hi"}})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def brokers(plain: Rig, clock: Clock) -> AsyncIterator[list[Broker]]:
    """Four, that are not opened: their timekeepers would run on their own."""
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(4):
            store = RedisStore(plain.url, clock=clock)
            await store.open()
            stack.push_async_callback(store.close)
            made.append(Broker(store, store.bus, clock=clock))
            stack.push_async_callback(made[-1].close)
        yield made


# Registration


async def test_a_chosen_id_is_given_to_one_of_all_who_ask_at_once(brokers: list[Broker]) -> None:
    """Every installation knows the device key: a second one must not get a token for the first one's device."""
    app = await brokers[0].apps.create("shop")
    for n in range(10):
        calls = [
            broker.devices.register(app, registration_id=f"d{n}", platform="ios")
            for broker in brokers
            for _ in range(3)
        ]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        (registered,) = [answer for answer in answers if not isinstance(answer, ApiError)]
        assert not isinstance(registered, BaseException)
        tokens.verify(app, f"d{n}", registered.token.encode(), START)
        assert {answer.code for answer in answers if isinstance(answer, ApiError)} == {7002}


async def test_equal_devices_written_over_the_same_reservation_have_one_owner(
    plain: Rig, clock: Clock
) -> None:
    """A name was reserved by a broker that died; two complete it at the same moment, with the same bytes."""
    async with open_sides(plain.url, clock) as sides:
        for n in range(10):
            await sides[0].registry._reserve(APP, [f"d{n}"], clock())
            new = NewDevice(f"d{n}", "ios")
            both = asyncio.Barrier(2)

            async def meet(name: str, both: asyncio.Barrier = both) -> None:
                if name == "devices_write":
                    await both.wait()

            for side in sides:
                side.engine.before = meet
            calls = [asyncio.create_task(side.registry.register_new(APP, new)) for side in sides]
            made = await asyncio.wait_for(asyncio.gather(*calls), PATIENCE)
            assert Counter(device is None for device in made) == {True: 1, False: 1}


async def test_a_call_that_is_repeated_because_its_answer_was_lost_still_owns_what_it_made(
    plain: Rig, clock: Clock
) -> None:
    """The engine sends it once more; the device is there already, by the same call."""

    class Repeating(Engine):
        def call(self, script: Any, keys: Any, arguments: Any = ()) -> asyncio.Future[Any]:
            if script.name != "devices_write":
                return super().call(script, keys, arguments)
            first = super().call(script, keys, arguments)
            assert first is not None
            return super().call(script, keys, arguments)

    async with open_sides(plain.url, clock) as (one, other):
        one.real.__class__ = Repeating
        assert await one.registry.register_new(APP, NewDevice("d", "ios")) is not None
        assert await other.registry.register_new(APP, NewDevice("d", "ios")) is None
        assert await one.registry.register_new(APP, NewDevice("d", "ios")) is None


# Settings


async def test_no_change_of_settings_is_lost(brokers: list[Broker]) -> None:
    app = await brokers[0].apps.create("shop")

    def add(name: str) -> Any:
        return lambda settings: with_fields(settings, limits={**settings.limits, name: 1})

    names = [
        "push_rate",
        "report_rate",
        "device_rate",
        "max_ids",
        "max_push",
        "max_keys",
        "max_ttl",
        "max_body",
    ]
    calls = [brokers[n % 4].apps.change_settings(app.key, add(name)) for n, name in enumerate(names)]
    await asyncio.gather(*calls)
    found = await brokers[0].store.find_app(app.key)
    assert found is not None
    assert found.settings.limits == dict.fromkeys(names, 1)


async def test_settings_that_others_change_all_the_time_are_given_up(brokers: list[Broker]) -> None:
    store = brokers[0].store
    app = await brokers[0].apps.create("shop")
    tries = 0

    async def refuse(*_: Any) -> None:
        nonlocal tries
        tries += 1
        raise Conflict("always")

    store.set_settings = refuse  # type: ignore[method-assign, assignment]
    with pytest.raises(StoreUnavailable, match="all the time"):
        await brokers[0].apps.change_settings(app.key, lambda settings: settings)
    assert 1 < tries < 100


async def test_what_an_older_release_wrote_can_be_changed(plain: Rig, clock: Clock) -> None:
    """It reads the same, and is other bytes."""
    async with open_sides(plain.url, clock) as (one, _):
        app = await one.apps.create_app("shop")
        plain.servers[0].command("HSET", f"app:{app.key}", "settings", '{"limits": {}, "restricted": false}')
        wanted = AppSettings(restricted=True)
        assert await one.apps.set_settings(app.key, wanted, AppSettings()) == replace(app, settings=wanted)


# Counters


async def test_a_plan_is_spent_once_by_all_brokers_together(brokers: list[Broker], clock: Clock) -> None:
    """However their turns to save fall: a broker whose turn always comes after another's is heard, too."""
    app = await brokers[0].apps.create("shop")
    app = await brokers[0].apps.set_settings(app.key, AppSettings(limits={"daily_pushes": 1000})) or app
    for _ in range(5):
        for broker in brokers:
            await broker.quotas.spend(app, 10)
        for broker in brokers:  # in the same order each second
            await broker.quotas.save()
        clock.now += quotas.SAVE_DELAY
    fresh = Broker(brokers[0].store, brokers[0].store.bus, clock=clock)  # type: ignore[attr-defined]
    with pytest.raises(ApiError, match="200 are spent"):
        await fresh.quotas.spend(app, 801)
    await fresh.close()


async def test_a_broker_that_was_idle_knows_what_others_spent(brokers: list[Broker], clock: Clock) -> None:
    one, other, *_ = brokers
    app = await one.apps.create("shop")
    app = await one.apps.set_settings(app.key, AppSettings(limits={"daily_broadcasts": 3})) or app
    await other.quotas.spend(app, 1, 1)
    await other.quotas.save()
    for _ in range(2):
        await one.quotas.spend(app, 1, 1)
    await one.quotas.save()
    clock.now += quotas.SAVE_DELAY
    with pytest.raises(ApiError, match="daily_broadcasts"):
        await other.quotas.spend(app, 1, 1)


async def test_a_broker_that_was_idle_knows_whom_others_pushed_to(
    brokers: list[Broker], clock: Clock
) -> None:
    one, other, *_ = brokers
    app = await one.apps.create("shop")
    settings = AppSettings(frequency_caps=(FrequencyCap(2, "day"),))
    app = await one.apps.set_settings(app.key, settings) or app
    (device,) = await one.store.register(app.app_id, [NewDevice("d")])
    await other.pushes.push(app, HELLO)
    await other.rules.save()
    await one.pushes.push(app, HELLO)
    await one.rules.save()
    clock.now += 60
    accepted = await other.pushes.push(app, HELLO)
    found = await one.store.find_messages(app.app_id, [accepted.msg_id])
    assert device.devno in found[accepted.msg_id].suppressed


# What happens later


async def test_each_schedule_fires_once(brokers: list[Broker], clock: Clock) -> None:
    one = brokers[0]
    app = await one.apps.create("shop")
    await one.store.register(app.app_id, [NewDevice("d")])
    for n in range(40):
        schedule = {
            "name": f"s{n}", "enabled": True, "push": orjson.loads(HELLO),
            "trigger": {"single": {"time": "2027-01-15 16:05:00"}},  # of Shanghai
        }  # fmt: skip
        await one.schedules.create(app, orjson.dumps(schedule))
    clock.now = START + 6 * 60
    await asyncio.gather(*[broker.timekeeper.run_due() for broker in brokers])
    assert sum(broker.firing.counts.fired for broker in brokers) == 40
    assert sum(broker.timekeeper.failed for broker in brokers) == 0


async def test_brokers_that_meet_at_the_same_records_make_way(brokers: list[Broker], clock: Clock) -> None:
    """Else each would try all of them."""
    records, app = brokers[0].store.records, await brokers[0].apps.create("shop")
    for n in range(0, 400, 50):
        changes = [RecordChange(app.app_id, "job", str(m), b"", 0, START) for m in range(n, n + 50)]
        await records.save(changes)
    tries = done = 0

    async def handle(record: Record) -> None:
        nonlocal tries, done
        tries += 1
        await records.save([RecordChange(record.app_id, record.kind, record.key, None, record.version)])
        done += 1

    keepers = [Timekeeper(brokers[n % 4].store.records, clock) for n in range(8)]
    for keeper in keepers:
        keeper.register({"job": handle})
    await asyncio.gather(*[keeper.run_due() for keeper in keepers])
    assert done == 400
    assert tries < 8 * done * 2 / 3
    assert sum(keeper.failed for keeper in keepers) == 0
