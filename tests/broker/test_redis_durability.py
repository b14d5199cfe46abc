from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from broker.redis.durability import RULES, check
from broker.redis.engine import Engine
from broker.store import StoreUnavailable
from broker.store_redis import RedisStore
from tests.broker.redis_rigs import RedisServer, Rig

SetFor = Callable[[RedisServer, str, str], None]


@pytest.fixture
def set_for() -> Iterator[SetFor]:
    """Changes a setting of a server for this test."""
    with ExitStack() as stack:
        yield lambda server, name, value: stack.enter_context(_set(server, name, value))


@contextmanager
def _set(server: RedisServer, name: str, value: str) -> Iterator[None]:
    before = server.command("CONFIG", "GET", name)[1]
    server.command("CONFIG", "SET", name, value)
    yield
    server.command("CONFIG", "SET", name, before)


async def refusal(rig: Rig, replicas: int = 0, *, checked: bool = True, url: str = "") -> str:
    engine = Engine(url or rig.url)
    await engine.open()
    try:
        await check(engine, replicas, checked=checked)
    except StoreUnavailable as error:
        return str(error)
    finally:
        await engine.close()
    return ""


async def test_what_keeps_everything_is_taken(plain: Rig, replicated: Rig) -> None:
    assert await refusal(plain) == ""
    assert await refusal(replicated, 1) == ""


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("appendonly", "no"),
        ("appendfsync", "everysec"),
        ("appendfsync", "no"),
        ("maxmemory-policy", "allkeys-lru"),
    ],
)
async def test_what_may_lose_an_answered_write_is_refused(
    plain: Rig, set_for: SetFor, setting: str, value: str
) -> None:
    set_for(plain.servers[0], setting, value)
    said = await refusal(plain)
    needed = next(rule.needed for rule in RULES if rule.setting == setting)
    assert f"127.0.0.1:{plain.servers[0].port}: {setting} is {value}, it must be {needed}" in said
    assert "store.unsafe" in said


async def test_all_that_is_wrong_is_said_at_once(plain: Rig, set_for: SetFor) -> None:
    set_for(plain.servers[0], "appendonly", "no")
    set_for(plain.servers[0], "appendfsync", "no")
    said = await refusal(plain)
    assert "appendonly is no" in said
    assert "appendfsync is no" in said


async def test_told_otherwise_it_is_a_warning(
    plain: Rig, set_for: SetFor, caplog: pytest.LogCaptureFixture
) -> None:
    set_for(plain.servers[0], "appendonly", "no")
    assert await refusal(plain, checked=False) == ""
    assert "appendonly is no" in caplog.text


async def test_a_replica_is_checked_too(replicated: Rig, set_for: SetFor) -> None:
    replica = replicated.servers[1]
    set_for(replica, "appendfsync", "everysec")
    assert f"127.0.0.1:{replica.port}: appendfsync is everysec" in await refusal(replicated, 1)


async def test_every_master_of_a_cluster_is_checked(cluster: Rig, set_for: SetFor) -> None:
    last = cluster.servers[2]
    set_for(last, "appendfsync", "everysec")
    assert f"127.0.0.1:{last.port}: appendfsync is everysec" in await refusal(cluster, 1)


async def test_more_replicas_than_there_are_are_refused(plain: Rig, replicated: Rig) -> None:
    assert "has 0 replicas in step, store.replicas asks for 1" in await refusal(plain, 1)
    assert "has 1 replicas in step, store.replicas asks for 2" in await refusal(replicated, 2)


async def test_replicas_that_are_not_waited_for_are_a_warning(
    replicated: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert await refusal(replicated) == ""
    assert "store.replicas is 0" in caplog.text


async def test_full_coverage_is_advised_against(cluster: Rig, caplog: pytest.LogCaptureFixture) -> None:
    assert await refusal(cluster, 1) == ""
    assert "cluster-require-full-coverage is yes" in caplog.text


async def test_a_provider_that_hides_its_settings_needs_a_word(plain: Rig) -> None:
    server = plain.servers[0]
    server.command("ACL", "SETUSER", "app", "on", ">pw", "~*", "&*", "+@all", "-config")
    url = f"redis://app:pw@127.0.0.1:{server.port}"
    try:
        said = await refusal(plain, url=url)
        assert "appendfsync cannot be read, because it answers: NOPERM" in said
        assert "appendonly cannot" not in said  # INFO tells
        assert "store.unsafe = true" in said
        assert "pw" not in said
        assert await refusal(plain, url=url, checked=False) == ""
    finally:
        server.command("ACL", "DELUSER", "app")


async def test_an_old_version_is_refused_whatever_was_said(
    plain: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.redis.durability.OLDEST", (99, 0))
    assert "Redis 99.0 or later" in await refusal(plain, checked=False)


async def test_a_store_does_not_open_on_it(plain: Rig, set_for: SetFor) -> None:
    set_for(plain.servers[0], "appendonly", "no")
    with pytest.raises(StoreUnavailable, match="appendonly is no"):
        await RedisStore(plain.url).open()
    store = RedisStore(plain.url, checked=False)
    await store.open()
    await store.close()
