"""Apps on Redis, and revoked tokens: several brokers that change the same app, and a deletion that was broken off."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest

from broker.bus import CredentialsChanged
from broker.model import AccessRule, App, AppSettings, DeviceChange, NewDevice
from broker.redis.apps import PURGED, UNFINISHED
from broker.store import StoreError, StoreUnavailable
from tests.broker.redis_index import START, Side, open_sides
from tests.broker.redis_rigs import Rig
from tests.broker.store_contract import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def sides(plain: Rig, clock: Clock) -> AsyncIterator[list[Side]]:
    async with open_sides(plain.url, clock) as sides:
        yield sides


async def expire_all(side: Side, now: float) -> int:
    total = 0
    while gone := await side.apps.expire(now, 100):
        total += gone
    return total


async def test_changes_of_different_things_are_all_kept(sides: list[Side]) -> None:
    one, other = sides
    app = await one.apps.create_app("shop", open=True, offline_limit=7)
    rule, settings = AccessRule(True, "all", "a/#", "devices"), AppSettings(restricted=True)
    for _ in range(10):
        before = await one.apps.find_app(app.key)
        assert before is not None
        await asyncio.gather(
            one.apps.set_access(app.key, [rule]),
            other.apps.set_settings(app.key, settings),
            one.apps.rotate_secret(app.key),
        )
        after = await other.apps.find_app(app.key)
        assert after is not None
        assert (after.access, after.settings, after.name, after.open, after.offline_limit) == (
            (rule,), settings, "shop", True, 7,
        )  # fmt: skip
        assert after.master_secret != before.master_secret
        await asyncio.gather(
            one.apps.set_access(app.key, []), other.apps.set_settings(app.key, AppSettings())
        )


async def test_nothing_is_set_for_an_app_that_is_not_there(sides: list[Side], plain: Rig) -> None:
    assert await sides[0].apps.set_settings("f" * 24, AppSettings()) is None
    assert await sides[0].apps.rotate_secret("f" * 24) is None
    assert plain.servers[0].command("DBSIZE") == 0


async def test_one_of_two_deletes_an_app_and_all_of_it_goes(
    sides: list[Side], plain: Rig, clock: Clock
) -> None:
    one, other = sides
    app, kept = await one.apps.create_app("shop"), await one.apps.create_app("kept")
    await one.registry.register(
        app.app_id, [NewDevice(f"d{n}", alias=f"a{n}", tags=frozenset("xy")) for n in range(5000)]
    )
    await one.registry.register(kept.app_id, [NewDevice("d")])
    await one.registry.change_devices(app.app_id, {"d1": DeviceChange(revoke_tokens=True)})
    assert sorted(await asyncio.gather(*[side.apps.delete_app(app.key) for side in sides])) == [False, True]
    for side in sides:
        assert await side.apps.find_app(app.key) is None
        assert await side.apps.list_apps() == [kept]
        await side.apps.refresh()
    clock.now += UNFINISHED
    assert await expire_all(one, clock.now) > 64
    assert await one.registry.find_devices(app.app_id, ["d1"]) == {}
    clock.now += PURGED
    await expire_all(other, clock.now)
    left = set(plain.servers[0].command("KEYS", f"*{{{app.app_id}*"))
    assert left == {f"{{{app.app_id}}}:deleted"}, "the mark stays, lest a late call makes anything again"
    assert not plain.servers[0].command("EXISTS", "{apps}:deleted")
    with pytest.raises(StoreError, match="deleted"):
        await other.registry.register(app.app_id, [NewDevice("late")])
    assert len(await one.registry.find_devices(kept.app_id, ["d"])) == 1


@pytest.mark.parametrize("carried_out", [False, True])
async def test_a_deletion_that_was_broken_off_is_finished_or_forgotten(
    plain: Rig, clock: Clock, carried_out: bool
) -> None:
    """The n-th call is lost, for every n, and the broker with it."""
    for n in itertools.count():
        plain.flush()
        async with open_sides(plain.url, clock) as (one, other):
            app = await one.apps.create_app("shop")
            await one.registry.register(app.app_id, [NewDevice("a")])
            one.engine.lose, one.engine.carried_out = n, carried_out
            try:
                await one.apps.delete_app(app.key)
                done = one.engine.lose is not None
            except StoreUnavailable:
                done = False
            clock.now += UNFINISHED
            await expire_all(other, clock.now)
            clock.now += PURGED
            await expire_all(other, clock.now)
            found = await other.apps.find_app(app.key)
            devices = await other.registry.find_devices(app.app_id, ["a"])
            assert (found == app) == bool(devices) == (found is not None), n
            assert (await other.apps.list_apps() == [app]) == (found is not None)
            assert not plain.servers[0].command("EXISTS", "{apps}:deleted")
        if done:
            assert n >= 5
            return


async def test_an_app_whose_creation_was_broken_off_is_not_there(sides: list[Side]) -> None:
    one, _ = sides
    for n in range(3):
        one.engine.lose = n
        with pytest.raises(StoreUnavailable):
            await one.apps.create_app("shop")
    whole = await one.apps.create_app("shop")
    assert await one.apps.list_apps(limit=2) == [whole]
    assert await one.apps.list_apps(whole.app_id) == []


# Revoked tokens


async def hear(side: Side, app: App, *devnos: int) -> None:
    side.generations.hear([CredentialsChanged(app.app_id, devnos)])
    await asyncio.gather(*side.generations._looking)


async def test_a_revocation_is_known_here_at_once_and_elsewhere_when_it_was_heard(sides: list[Side]) -> None:
    one, other = sides
    app = await one.apps.create_app("shop")
    await one.registry.register(app.app_id, [NewDevice("a"), NewDevice("b")])
    await other.apps.find_app(app.key)
    theirs = other.generations.of(app.app_id)
    await one.registry.change_devices(app.app_id, {"b": DeviceChange(revoke_tokens=True)})
    assert dict(one.generations.of(app.app_id)) == {1: 1}
    assert dict(theirs) == {}
    await hear(other, app, 1)
    assert dict(theirs) == {1: 1}, "the same mapping"
    await one.registry.change_devices(app.app_id, {"a": DeviceChange(revoke_tokens=True)})
    await other.generations.refresh()
    assert dict(theirs) == {0: 1, 1: 1}
    other.engine.calls.clear()
    await other.generations.refresh()
    assert other.engine.calls == ["ZRANGEBYSCORE"], "one question for all apps"


async def test_apps_that_are_not_in_use_here_are_not_loaded(sides: list[Side]) -> None:
    one, other = sides
    app = await one.apps.create_app("shop")
    await one.registry.register(app.app_id, [NewDevice("a")])
    await one.registry.change_devices(app.app_id, {"a": DeviceChange(revoke_tokens=True)})
    await hear(other, app, 0)
    await other.generations.refresh()
    assert "HGETALL" not in other.engine.calls
    await other.apps.find_app(app.key)
    assert dict(other.generations.of(app.app_id)) == {0: 1}


async def test_deletions_elsewhere_are_noticed(sides: list[Side]) -> None:
    one, other = sides
    app = await one.apps.create_app("shop")
    await one.apps.delete_app(app.key)
    other.apps.check(app.app_id)
    await other.apps.refresh()
    with pytest.raises(StoreError, match="deleted"):
        other.apps.check(app.app_id)


def test_the_times_are_in_order() -> None:
    """Who removes what is left does so while late writes are still refused, and after broken off deletions ended."""
    assert START > PURGED > UNFINISHED > 0
