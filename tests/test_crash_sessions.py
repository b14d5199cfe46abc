"""Ordinary messages and durable sessions under SIGKILL (decision 0008): QoS 1 at least once, QoS 2 exactly once, in
order, and nothing left in the store when everybody has gone.

The sister of test_crash.py: publishers and durable subscribers (crash_sessions.py) run against a server that is
killed at random moments, often in the very instant of an answer, and started again on its data.
`HOLDFAST_CRASH_ROUNDS` makes it long; a failing run prints its seed, and `HOLDFAST_CRASH_SEED` makes the same choices
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
from collections.abc import Callable
from typing import Final

from clients.local_server import LocalServer
from tests.crash_sessions import WATCHED, Load

ROUNDS: Final = int(os.environ.get("HOLDFAST_CRASH_ROUNDS", "6"))
DRAIN_LIMIT: Final = 180.0  # seconds, for what was left unacknowledged in all rounds
FLAGS: Final = (
    "--mqtt-max-queued", "1000000",  # nothing is dropped: every message must arrive
    "--mqtt-max-queued-bytes", "1000000000",
    "--mqtt-max-inflight", "8",  # windows are full all the time
    "--server-log-level", "warning",
)  # fmt: skip


async def test_ordinary_messages_arrive_as_promised_across_kills(
    start_server: Callable[..., LocalServer], seed: int
) -> None:
    server = await asyncio.to_thread(start_server, *FLAGS)
    load = Load(server, seed)
    for subscriber in load.subscribers:
        await subscriber.subscribe()
    async with asyncio.TaskGroup() as everybody:
        publishing = [everybody.create_task(publisher.run()) for publisher in load.publishers]
        subscribed = [everybody.create_task(subscriber.run()) for subscriber in load.subscribers]
        for _ in range(ROUNDS):
            await one_round(load)
        load.gate.clear()
        await asyncio.gather(*publishing)
        load.ledger.expect()
        load.draining.set()
        _, late = await asyncio.wait(subscribed, timeout=DRAIN_LIMIT)
        for task in late:  # the ledger says what is missing
            task.cancel()
    for subscriber in load.subscribers:
        await subscriber.look_again()
    for client in (*load.publishers, *load.subscribers):
        await client.end()
    assert await asyncio.to_thread(server.terminate) == 0
    mistakes = load.ledger.mistakes() + left_over(server)
    counts = f"{ROUNDS} rounds, {len(load.ledger.accepted)} messages, {load.ledger.copies} copies"
    print(counts)  # noqa: T201
    assert not mistakes, f"HOLDFAST_CRASH_SEED={seed}, {counts}: {len(mistakes)} mistakes\n" + "\n".join(
        mistakes[:20]
    )


async def one_round(load: Load) -> None:
    random = load.random
    await asyncio.sleep(random.choice((0.0, 0.2, 0.5, 1.0, 2.0)) + random.random() * 0.1)
    if random.random() < 0.1:
        await asyncio.to_thread(load.server.terminate)
        await asyncio.to_thread(load.server.start)
        return
    if random.random() < 0.7:
        await after_a_packet(load)
    else:
        os.kill(load.server.pid, signal.SIGKILL)
    await asyncio.to_thread(load.server.restart)


async def after_a_packet(load: Load) -> None:
    """The very instant in which a client sees one of some kind."""
    killed = asyncio.Event()

    def kill() -> None:
        os.kill(load.server.pid, signal.SIGKILL)
        killed.set()

    load.ledger.on_kind = load.random.choice(WATCHED)
    load.ledger.on_packet = kill
    await killed.wait()


def left_over(server: LocalServer) -> list[str]:
    (database,) = server.data_dir.glob("*.db")
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT session, kind, item FROM session_items").fetchall()
    return [f"left in the store: {row}" for row in rows]
