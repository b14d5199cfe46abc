"""G1, G2, G3 and G4 under SIGKILL: nothing accepted is lost, nothing is unaccounted.

Publishers of every kind and a fleet that comes and goes run against a server that is killed at random moments
and started again on its data. Then everything drains, and the ledger of the test (crash_load.py) is compared with
what the server says. `HOLDFAST_CRASH_ROUNDS` makes it long; a failing run prints its seed, and
`HOLDFAST_CRASH_SEED` makes the same choices again (the moments of the kills stay the machine's).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine
from random import Random
from typing import Any, Final

import aiohttp
import orjson

from clients.local_server import LocalServer
from tests.crash_load import Device, HttpPublisher, Load, MqttPublisher

ROUNDS: Final = int(os.environ.get("HOLDFAST_CRASH_ROUNDS", "8"))
DRAIN_LIMIT: Final = 180.0  # seconds, for what the devices left unacknowledged in all rounds
FLAGS: Final = (
    "--push-fanout-limit", "12",  # so that both inboxes and the broadcast log are in use
    "--push-offline-limit", "1000000",  # nothing is evicted: every target must be reached
    "--mqtt-max-inflight", "8",  # windows are full all the time
    "--server-log-level", "warning",
)  # fmt: skip


async def test_nothing_accepted_is_lost_or_unaccounted_across_kills(
    start_server: Callable[..., LocalServer], seed: int
) -> None:
    server = await asyncio.to_thread(start_server, *FLAGS)
    load = Load(server, seed)
    async with load.session() as http:
        await load.register(http)
        async with running(load, fleet(load)) as devices:
            async with running(load, publishers(load)):
                load.open_gate()
                for _ in range(ROUNDS):
                    await one_round(load, http)
                await load.close_gate()
            load.ledger.expect(stored_ids(server))
            load.draining.set()
            with contextlib.suppress(TimeoutError):  # the ledger says what is missing
                async with asyncio.timeout(DRAIN_LIMIT):
                    await load.ledger.complete.wait()
                    while await wrong_counts(load, http):
                        pass  # each look is a hundred calls
                    load.recorded.set()
                    await asyncio.gather(*devices)
        assert await asyncio.to_thread(server.terminate) == 0  # records the last acknowledgements
        await asyncio.to_thread(server.start)
        mistakes = load.ledger.mistakes() + await wrong_reports(load, http)
    counts = f"{ROUNDS} rounds, {len(load.ledger.pushes)} pushes, {load.ledger.copies} copies"
    print(counts)  # noqa: T201
    assert not mistakes, f"HOLDFAST_CRASH_SEED={seed}, {counts}: {len(mistakes)} mistakes\n" + "\n".join(
        mistakes[:20]
    )


def fleet(load: Load) -> list[Coroutine[Any, Any, None]]:
    return [Device(load, name, load.random.getrandbits(32)).run() for name in load.names]


def publishers(load: Load) -> list[Coroutine[Any, Any, None]]:
    seeds = iter(lambda: load.random.getrandbits(32), None)
    singles = [HttpPublisher(load, seed).run() for seed in itertools.islice(seeds, 3)]
    return [
        *singles,
        HttpPublisher(load, next(seeds), batch=True).run(),
        MqttPublisher(load, next(seeds)).run(),
    ]


@contextlib.asynccontextmanager
async def running(
    load: Load, work: list[Coroutine[Any, Any, None]]
) -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        load.ledger.wrong += [repr(result) for result in results if isinstance(result, Exception)]


async def one_round(load: Load, http: aiohttp.ClientSession) -> None:
    """Let the load run, kill, start again, let the publishers finish what they began, change some tags."""
    random = load.random
    for moment in random.choices((after_a_while, after_an_answer), k=random.choice((1, 1, 1, 2))):
        await moment(load, random)
        await asyncio.to_thread(load.server.restart)
    await load.close_gate()
    await load.change_tags(http)
    load.open_gate()


async def after_a_while(load: Load, random: Random) -> None:
    await asyncio.sleep(random.choice((0.0, 0.2, 1.0, 2.0, 3.0)) + random.random() * 0.2)
    os.kill(load.server.pid, signal.SIGKILL)


async def after_an_answer(load: Load, random: Random) -> None:
    """The next instant (G1)."""
    await asyncio.sleep(random.random() * 2)
    killed = asyncio.Event()

    def kill() -> None:
        os.kill(load.server.pid, signal.SIGKILL)
        killed.set()

    load.ledger.on_answer = kill
    load.open_gate()
    await killed.wait()


def stored_ids(server: LocalServer) -> list[str]:
    """All messages there are, answered or not: each of them has to reach its targets."""
    (database,) = server.data_dir.glob("*.db")
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return [str(row[0]) for row in connection.execute("SELECT msg_id FROM messages")]


async def wrong_counts(load: Load, http: aiohttp.ClientSession) -> list[str]:
    """Pushes that not all targets have acknowledged, as far as the server knows."""
    pushes = {msg_id: push for push in load.ledger.pushes.values() for msg_id in push.answers | push.msg_ids}
    found = []
    ids = iter(pushes)
    while some := list(itertools.islice(ids, 100)):
        async with http.get("/v3/received/detail", params={"msg_ids": ",".join(some)}) as answer:
            for row in orjson.loads(await answer.read()):
                count = len(pushes[row["msg_id"]].targets)
                told = tuple(row[key] for key in ("target", "delivered", "pending", "expired", "evicted"))
                if told != (count, count, 0, 0, 0):
                    found.append(f"{row['msg_id']}: the report says {told} of {count}")
    return found


async def wrong_reports(load: Load, http: aiohttp.ClientSession) -> list[str]:
    """G4: the server's account of each push, in sum and by device."""
    pushes = {msg_id: push for push in load.ledger.pushes.values() for msg_id in push.answers | push.msg_ids}
    found = [
        f"{msg_id} is stored, and nobody knows it" for msg_id in set(stored_ids(load.server)) - set(pushes)
    ]
    found += await wrong_counts(load, http)
    for msg_id, push in pushes.items():
        body = orjson.dumps({"msg_id": msg_id, "registration_ids": load.names})
        async with http.post("/v3/status/message", data=body) as answer:
            told = orjson.loads(await answer.read())
        wrong = {
            n: told.get(n) for n in load.names if told.get(n) != {"status": 0 if n in push.targets else 3}
        }
        if wrong:
            found.append(f"{msg_id}: the status says {wrong}")
    return found
