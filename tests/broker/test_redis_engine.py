"""Calls to Redis: their order, what a server that is away does to them, and what the operator is told."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from broker.redis import engine as engine_module
from broker.redis.address import RedisUrl, parse_url
from broker.redis.engine import Engine
from broker.redis.scripts import Script
from broker.redis.topology import slot_of
from broker.store import StoreFull, StoreUnavailable
from tests.broker.redis_rigs import (
    RedisServer,
    Rig,
    cluster_of_six,
    give_slot,
    servers,
    take_over,
    until,
    with_replica,
)
from tests.patience import PATIENCE

Connect = Callable[..., Awaitable[Engine]]


def script(text: str) -> Script:
    return Script("test", text, hashlib.sha1(text.encode()).hexdigest())


MIGRATE_TIMEOUT = int(PATIENCE * 1000)  # milliseconds
PUSH = script("return redis.call('RPUSH', KEYS[1], ARGV[1])")
PASSING = script("-- volatile\nreturn redis.call('INCR', KEYS[1])")
PUT = script("-- repeatable\nredis.call('SET', KEYS[1], ARGV[1]) return ARGV[1]")


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Opens engines: `await connect(url, patience=1)`."""
    engines: list[Engine] = []

    async def run(url: str, *, replicas: int = 0, patience: float = PATIENCE) -> Engine:
        engine = Engine(url, replicas=replicas, patience=patience)
        await engine.open()
        engines.append(engine)
        return engine

    yield run
    for engine in engines:
        await engine.close()


@pytest.fixture
async def engine(connect: Connect, plain: Rig) -> Engine:
    return await connect(plain.url)


@pytest.fixture
def own() -> Iterator[RedisServer]:
    """A server that a test may do anything to."""
    with servers(1) as (server,):
        yield server


# Where Redis is


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("redis://h", RedisUrl((("h", 6379),))),
        ("redis://h:1/3", RedisUrl((("h", 1),), database=3)),
        ("redis://u:p%40@h:1,i:2", RedisUrl((("h", 1), ("i", 2)), "u", "p@")),
        ("redis://h:1,redis://i:2,j", RedisUrl((("h", 1), ("i", 2), ("j", 6379)))),
        ("redis://:pw@[::1]:7,[::2]", RedisUrl((("::1", 7), ("::2", 6379)), password="pw")),
        ("rediss://h?ca=/x", RedisUrl((("h", 6379),), tls=True, ca="/x")),
    ],
)
def test_urls(url: str, parsed: RedisUrl) -> None:
    assert parse_url(url) == parsed


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://h", "redis://[user:password@]host"),
        ("redis://u:secret@h:x", "'h:x' is no host and port"),
        ("redis://u:secret@", "'' is no host"),
        ("redis://h:70000", "no host and port"),
        ("redis://u:secret@h/a", "'a' is no number of a database"),
        ("redis://u:secret@h?timeout=3", "knows no timeout"),
    ],
)
def test_bad_urls_say_what_is_allowed_and_no_password(url: str, says: str) -> None:
    with pytest.raises(ValueError, match="Redis URL") as error:
        parse_url(url)
    assert says in str(error.value)
    assert "secret" not in str(error.value)
    assert "secret" not in repr(RedisUrl((("h", 1),), password="secret"))


@given(st.lists(st.text(alphabet="ab{}:é", max_size=12).filter(bool), min_size=1, max_size=50))
def test_slots_are_those_of_redis(cluster_slots: Callable[[str], int], keys: list[str]) -> None:
    assert [slot_of(key) for key in keys] == [cluster_slots(key) for key in keys]


@pytest.fixture(scope="session")
def cluster_slots(redis_cluster: Rig) -> Callable[[str], int]:
    return lambda key: int(redis_cluster.servers[0].command("CLUSTER", "KEYSLOT", key))


# Order, and what goes together


async def test_calls_of_one_turn_go_together_and_in_order(engine: Engine) -> None:
    answers = await asyncio.gather(*[engine.call(PUSH, ("list",), (number,)) for number in range(500)])
    assert answers == list(range(1, 501))
    assert engine.stats.commits == 1
    assert await engine.run("LRANGE", "list", 0, -1) == [b"%d" % number for number in range(500)]


async def test_each_group_with_a_write_is_told_to_the_metrics(engine: Engine) -> None:
    told: list[tuple[int, float]] = []
    engine.stats.on_commit = lambda calls, seconds: told.append((calls, seconds))
    await asyncio.gather(*[engine.run("PING") for _ in range(3)])
    assert told == []
    await asyncio.gather(engine.run("PING"), engine.run("SET", "a", 1), engine.run("GET", "a"))
    ((calls, seconds),) = told
    assert calls == 3
    assert 0 < seconds < PATIENCE


async def test_a_script_is_sent_once_and_again_when_it_was_forgotten(engine: Engine, plain: Rig) -> None:
    def evals() -> int:
        stats = plain.servers[0].command("INFO", "commandstats")
        return sum(
            int(line.split("calls=")[1].split(",")[0]) for line in stats.splitlines() if "_eval:" in line
        )

    before = evals()
    for number in range(3):
        await engine.call(PUSH, ("list",), (number,))
    assert evals() == before + 1
    plain.servers[0].command("SCRIPT", "FLUSH")
    assert await engine.call(PUSH, ("list",), (3,)) == 4
    assert evals() == before + 2


async def test_one_failing_call_fails_alone(engine: Engine) -> None:
    answers = await asyncio.gather(
        engine.run("SET", "a", 1), engine.run("LPUSH", "a", 1), engine.run("GET", "a"), return_exceptions=True
    )
    assert (answers[0], answers[2]) == (b"OK", b"1")
    assert isinstance(answers[1], StoreUnavailable)
    assert "WRONGTYPE" in str(answers[1])
    assert engine.stats.failed_commits == 0


async def test_an_argument_that_cannot_be_sent_fails_alone(engine: Engine) -> None:
    answers = await asyncio.gather(
        engine.run("PING"),
        engine.run("SET", "a", None),  # type: ignore[arg-type]
        engine.call(PUSH, ("list",), ("\ud800",)),
        engine.run("PING"),
        return_exceptions=True,
    )
    assert (answers[0], answers[3]) == (b"PONG", b"PONG")
    assert isinstance(answers[1], TypeError)
    assert isinstance(answers[2], ValueError)
    assert engine.stats.pending == 0


async def test_close_waits_for_the_answers_and_no_call_follows(plain: Rig) -> None:
    engine = Engine(plain.url)
    await engine.open()
    calls = [engine.call(PUSH, ("list",), (number,)) for number in range(10)]
    await engine.close()
    assert [call.result() for call in calls] == list(range(1, 11))
    with pytest.raises(StoreUnavailable, match="closed"):
        await engine.run("PING")
    with pytest.raises(StoreUnavailable, match="closed"):
        await engine.call(PUSH, ("list",))


async def test_g6_calls_without_answers_are_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_CALLS", 2)
    calls = [engine.run("PING") for _ in range(3)]
    with pytest.raises(StoreUnavailable, match="does not keep up"):
        await calls[2]
    assert await asyncio.gather(*calls[:2]) == [b"PONG", b"PONG"]
    assert await engine.run("PING") == b"PONG"


async def test_g6_bytes_without_answers_are_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_BYTES", 1_000)
    first = engine.run("SET", "a", bytes(2_000))
    await asyncio.sleep(0)  # it is packed
    with pytest.raises(StoreUnavailable, match="does not keep up"):
        await engine.run("PING")
    await first
    assert engine.stats.pending_bytes == engine.stats.pending == 0
    assert await engine.run("PING") == b"PONG"


async def test_a_cancelled_caller_disturbs_nobody(engine: Engine) -> None:
    first, second = engine.run("PING"), engine.run("PING")
    first.cancel()
    assert await second == b"PONG"
    assert engine.stats.pending == 0


# What Redis refuses


async def test_no_room_is_store_full(engine: Engine, plain: Rig) -> None:
    server = plain.servers[0]
    server.command("CONFIG", "SET", "maxmemory", 1)
    try:
        for call in (engine.run("SET", "a", 1), engine.call(PUSH, ("list",), (1,))):
            with pytest.raises(StoreFull, match="maxmemory"):
                await call
        assert engine.stats.failed_commits == 2
    finally:
        server.command("CONFIG", "SET", "maxmemory", 0)


async def test_a_disk_that_fails_is_said(engine: Engine, plain: Rig) -> None:
    misconf = script("return redis.error_reply('MISCONF Errors writing to the AOF file')")
    with pytest.raises(StoreUnavailable, match="make room"):
        await engine.call(misconf, ("a",))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://127.0.0.1:{port}", "wants a password: set store.url"),
        ("redis://:wrong@127.0.0.1:{port}", "user or password are wrong"),
        ("redis://nobody:right@127.0.0.1:{port}", "user or password are wrong"),
        ("redis://:right@127.0.0.1:{port}/99", "DB index is out of range"),
    ],
)
async def test_a_login_that_fails_says_what_to_do(own: RedisServer, url: str, says: str) -> None:
    own.command("CONFIG", "SET", "requirepass", "right")
    with pytest.raises(StoreUnavailable, match=says) as error:
        await Engine(url.format(port=own.port)).open()
    assert "right" not in str(error.value)
    assert "wrong@" not in str(error.value)


async def test_user_password_and_database(own: RedisServer, connect: Connect) -> None:
    own.command("ACL", "SETUSER", "me", "on", ">p@w", "~*", "&*", "+@all")
    engine = await connect(f"redis://me:p%40w@127.0.0.1:{own.port}/3")
    await engine.run("SET", "a", 1)
    assert "db3:keys=1" in own.command("INFO", "keyspace")


async def test_nobody_there_is_said(own: RedisServer) -> None:
    own.stop()
    with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{own.port} cannot be reached.*store.url"):
        await Engine(own.url).open()


async def test_a_replica_alone_is_no_store(replicated: Rig) -> None:
    with pytest.raises(StoreUnavailable, match="it is a replica: store"):
        await Engine(replicated.servers[1].url).open()


async def test_what_does_not_speak_redis_is_refused() -> None:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 no\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1")
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(StoreUnavailable, match="protocol"):
            await Engine(f"redis://127.0.0.1:{port}").open()


async def test_tls_with_a_certificate_of_its_own(tmp_path: Path, connect: Connect) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca")
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "pem")
    with servers(1) as (server,):
        pem, ca = str(tmp_path / "pem"), str(tmp_path / "ca")
        port = server.port
        server.command(
            "CONFIG", "SET", "tls-cert-file", pem, "tls-key-file", pem, "tls-ca-cert-file", ca,
            "tls-auth-clients", "no", "port", 0, "tls-port", port,
        )  # fmt: skip
        engine = await connect(f"rediss://127.0.0.1:{port}?ca={ca}")
        assert await engine.run("SET", "a", bytes(300_000)) == b"OK"
        assert len(await engine.run("GET", "a")) == 300_000
        with pytest.raises(StoreUnavailable, match="certificate"):
            await Engine(f"rediss://127.0.0.1:{port}").open()
        with pytest.raises(StoreUnavailable, match="file of TLS"):
            await Engine("rediss://127.0.0.1?ca=/none").open()


# Servers that go


async def test_calls_wait_for_a_server_that_comes_back(own: RedisServer, connect: Connect) -> None:
    engine = await connect(own.url)
    await engine.call(PUSH, ("list",), (1,))
    own.restart()
    await asyncio.sleep(0)
    answers = await asyncio.gather(*[engine.call(PUT, ("key",), (number,)) for number in range(3)])
    assert answers == [b"0", b"1", b"2"]
    assert await engine.call(PUSH, ("list",), (2,)) == 2


async def test_calls_wait_for_a_bounded_time(own: RedisServer, connect: Connect) -> None:
    engine, patient = await connect(own.url, patience=0.3), await connect(own.url)
    own.stop()
    waiting = patient.call(PUT, ("key",), (1,))
    with pytest.raises(StoreUnavailable, match=f"Redis at 127.0.0.1:{own.port}"):
        await engine.call(PUT, ("key",), (2,))
    assert not waiting.done()
    own.start()
    own.wait()
    assert await waiting == b"1"
    assert await _again(lambda: engine.run("PING")) == b"PONG"


async def _again(call: Callable[[], Awaitable[object]]) -> object:
    async with asyncio.timeout(PATIENCE):
        while True:
            with suppress(StoreUnavailable):
                return await call()
            await asyncio.sleep(0.05)


async def test_a_write_whose_answer_is_lost_is_not_made_again(own: RedisServer, connect: Connect) -> None:
    engine = await connect(own.url)
    assert own.process is not None
    own.process.send_signal(signal.SIGSTOP)
    write, read, put = (
        engine.call(PUSH, ("list",), (1,)),
        engine.run("GET", "a"),
        engine.call(PUT, ("key",), (1,)),
    )
    await asyncio.sleep(0.05)  # it is sent
    own.restart()
    with pytest.raises(StoreUnavailable, match="may have been done"):
        await write
    assert await asyncio.gather(read, put) == [None, b"1"]


async def test_a_server_that_hangs_is_given_up(
    own: RedisServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await connect(own.url)
    assert own.process is not None
    own.process.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr("broker.redis.wire.ANSWER_TIMEOUT", 0.2)
        with pytest.raises(StoreUnavailable, match="did not answer"):
            await engine.call(PUSH, ("list",), (1,))
    own.process.send_signal(signal.SIGCONT)
    assert await _again(lambda: engine.run("PING")) == b"PONG"


async def test_writes_wait_for_replicas(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    with with_replica() as rig:
        patient = await connect(rig.url, replicas=1)
        assert await patient.call(PUSH, ("list",), (1,)) == 1
        monkeypatch.setattr(engine_module, "WAIT_TIMEOUT", 0.1)
        engine = await connect(rig.url, replicas=1)
        replica = rig.servers[1].process
        assert replica is not None
        replica.send_signal(signal.SIGSTOP)
        push, read = engine.call(PUSH, ("list",), (2,)), engine.run("LLEN", "list")
        passing = engine.call(PASSING, ("count",))
        with pytest.raises(StoreUnavailable, match=r"0 of 1 replicas .* may have been stored"):
            await push
        assert (await read, await passing) == (2, 1)
        assert engine.stats.failed_commits == 1
        replica.send_signal(signal.SIGCONT)
        assert await patient.call(PUT, ("key",), (1,)) == b"1"


async def test_a_replica_that_became_the_master_is_found(connect: Connect) -> None:
    with with_replica() as rig:
        engine = await connect(rig.url)
        await engine.run("SET", "a", 1)
        until(lambda: rig.servers[1].command("GET", "a") == "1", "it is not replicated")
        rig.servers[0].stop()
        waiting = engine.run("GET", "a")
        rig.servers[1].command("REPLICAOF", "NO", "ONE")
        assert await waiting == b"1"
        assert await engine.run("SET", "a", 2) == b"OK"


async def test_a_master_that_became_a_replica_is_left(connect: Connect) -> None:
    with with_replica() as rig:
        engine = await connect(rig.url)
        await engine.run("SET", "a", 1)
        until(lambda: rig.servers[1].command("GET", "a") == "1", "it is not replicated")
        rig.servers[1].command("REPLICAOF", "NO", "ONE")
        rig.servers[0].command("REPLICAOF", "127.0.0.1", rig.servers[1].port)
        assert await engine.call(PUSH, ("list",), (1,)) == 1
        assert rig.servers[1].command("LLEN", "list") == 1
        assert engine.stats.redirected == 1


# Clusters


async def test_each_master_of_a_cluster_gets_its_share(cluster: Rig, connect: Connect) -> None:
    engine = await connect(cluster.servers[1].url)  # any of them knows the others
    calls = [engine.call(PUSH, (f"{{{number}}}",), (number,)) for number in range(300)]
    assert await asyncio.gather(*calls) == [1] * 300
    assert engine.stats.commits == 3
    sizes = await engine.everywhere("DBSIZE")
    assert sum(sizes.values()) == 300
    assert all(size > 50 for size in sizes.values())


async def test_a_slot_that_moves_is_followed(cluster: Rig, connect: Connect) -> None:
    """ASK while it moves, TRYAGAIN for keys that are torn apart, MOVED afterwards."""
    source, target, *_ = cluster.servers
    engine = await connect(cluster.url)
    slot = slot_of("{3}")
    assert slot < 16_384 // 3  # the first master's
    await engine.run("MSET", "{3}a", 1, "{3}b", 2)
    names = [server.command("CLUSTER", "MYID") for server in (source, target)]
    target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", names[0])
    source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", names[1])
    source.command("MIGRATE", "127.0.0.1", target.port, "{3}a", 0, MIGRATE_TIMEOUT)
    try:
        assert await engine.run("GET", "{3}a") == b"1"
        assert await engine.run("GET", "{3}b") == b"2"
        assert await engine.call(PUT, ("{3}a",), (3,)) == b"3"
        assert await engine.call(PUT, ("{3}new",), (4,)) == b"4"
        torn = engine.run("MGET", "{3}a", "{3}b")
        await engine.run("GET", "{3}b")
        source.command("MIGRATE", "127.0.0.1", target.port, "{3}b", 0, MIGRATE_TIMEOUT)
        assert await torn == [b"3", b"2"]
        give_slot(cluster, slot, 1)
        pushes = [engine.call(PUSH, ("{3}list",), (n,)) for n in range(5)]
        assert await asyncio.gather(*pushes) == [1, 2, 3, 4, 5]
        assert engine.stats.redirected
    finally:
        cluster.flush()
        give_slot(cluster, slot, 0)
    assert await engine.run("GET", "{3}a") is None


async def test_the_death_of_a_master_is_survived(connect: Connect) -> None:
    with cluster_of_six() as rig:
        engine = await connect(rig.url, replicas=1)
        keys = [f"{{{number}}}" for number in range(30)]
        await asyncio.gather(*[engine.call(PUSH, (key,), (1,)) for key in keys])
        rig.servers[0].stop()
        answers = asyncio.gather(*[engine.run("LLEN", key) for key in keys])
        take_over(rig, 0)
        assert await answers == [1] * 30
        assert await asyncio.gather(*[engine.run("LLEN", key) for key in keys]) == [1] * 30


def test_it_runs_on_uvloop(plain: Rig) -> None:
    """As the server does; its transports are of other classes."""

    async def run() -> object:
        engine = Engine(plain.url)
        await engine.open()
        try:
            return await engine.call(PUSH, ("list",), (1,))
        finally:
            await engine.close()

    assert uvloop.run(run()) == 1
