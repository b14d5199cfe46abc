"""Measures the index on a Redis of its own: `python tests/broker/measure_redis_index.py [devices]`.

Each device has a name of 20 characters, an alias of 13, five tags (of 300 cities, 20 languages, 50 versions, 1,000
interests, 4 plans) and room for its route. Redis writes no file, so that the disk does not count."""

from __future__ import annotations

import asyncio
import random
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":  # by hand: `broker` is not `tests/broker`, and `tests` is nobody else's package
    _tests = Path(__file__).resolve().parents[1]
    sys.path[0] = str(_tests.parent)
    sys.modules["tests"] = ModuleType("tests")
    sys.modules["tests"].__path__ = [str(_tests)]

from broker.model import DeviceChange, NewDevice, Term, TermKey
from broker.redis.keys import PARTITION, of_partition
from tests.broker.redis_index import APP, Side, open_sides
from tests.broker.redis_rigs import servers

BATCH, BATCHES = 1000, 2
ROUTE = 12
TERMS: list[TermKey] = [(Term.TAG, "lang-3"), (Term.TAG, "plan-2"), (Term.TAG, "city-7")]
_dice = random.Random(1)


def new_device(devno: int) -> NewDevice:
    tags = (
        f"city-{_dice.randrange(300)}",
        f"lang-{_dice.randrange(20)}",
        f"v{_dice.randrange(50)}",
        f"likes-{_dice.randrange(1000)}",
        f"plan-{_dice.randrange(4)}",
    )
    return NewDevice(secrets.token_hex(10), "android", f"user-{devno:08d}", frozenset(tags))


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


async def _info(side: Side, name: str) -> float:
    lines: bytes = await side.real.run("INFO", "everything")
    return float(
        next(line for line in lines.decode().splitlines() if line.startswith(name + ":")).split(":")[1]
    )


async def _timed(what: str, act: Callable[[], Awaitable[Any]], times: int = 5) -> None:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        await act()
        taken.append(time.perf_counter() - start)
    say(f"{what}: {' '.join(f'{1000 * seconds:.2f}' for seconds in taken)} ms")


async def _register(side: Side, count: int) -> list[str]:
    ids: list[str] = []
    memory, start = await _info(side, "used_memory"), time.perf_counter()
    cpu, ours = await _info(side, "used_cpu_user"), time.process_time()

    async def some(batch: int) -> None:
        for first in range(batch * BATCH, count, BATCH * BATCHES):
            new = [new_device(devno) for devno in range(first, min(first + BATCH, count))]
            ids.extend(device.registration_id for device in new)
            await side.registry.register(APP, new)

    await asyncio.gather(*map(some, range(BATCHES)))
    seconds = time.perf_counter() - start
    cpu, ours = await _info(side, "used_cpu_user") - cpu, time.process_time() - ours
    say(
        f"registered {count / seconds:,.0f} /s; CPU: Redis {cpu / count * 1e6:.0f} us, we {ours / count * 1e6:.0f} us"
    )
    for partition in range(-(-count // PARTITION)):
        last = min(PARTITION, count - partition * PARTITION) - 1
        await side.real.run("SETRANGE", of_partition(APP, partition, "routes"), ROUTE * last, bytes(ROUTE))
    memory = await _info(side, "used_memory") - memory
    fragmented = await _info(side, "mem_fragmentation_ratio")
    say(f"{memory / count:.0f} bytes a device, fragmentation {fragmented}")
    return ids


async def _ask(side: Side, other: Side, ids: list[str]) -> None:
    def some(count: int) -> list[str]:
        return _dice.sample(ids, count)

    def aliases(count: int) -> list[str]:
        return [f"user-{n:08d}" for n in _dice.sample(range(len(ids)), count)]

    async def algebra() -> None:
        x, y, z = await other.terms.postings(APP, TERMS)
        assert (x & y) | z

    async def change(count: int) -> None:
        await side.registry.change_devices(
            APP,
            dict.fromkeys(
                some(count), DeviceChange(add_tags=frozenset(("new",)), remove_tags=frozenset(("v1",)))
            ),
        )

    async def singles() -> None:
        tags = [DeviceChange(add_tags=frozenset((f"n{n % 20}",))) for n in range(2000)]
        calls = [
            side.registry.change_devices(APP, {rid: tag}) for rid, tag in zip(some(2000), tags, strict=True)
        ]
        await asyncio.gather(*calls)

    for term in [(Term.TAG, "likes-5"), *TERMS, (Term.ALL, "")]:
        await _timed(
            f"postings of {term}, first and later", lambda term=term: other.terms.postings(APP, [term])
        )
    await _timed("algebra of three lists", algebra)
    for _ in range(3):
        await change(1)
        await _timed("algebra after one change by another broker", algebra, 1)
    await _timed("1,000 devices change their tags in one call", lambda: change(1000))
    await _timed("algebra after that", algebra, 2)
    await _timed("2,000 calls that change one device each", singles, 3)
    await _timed("one alias", lambda: side.postings((Term.ALIAS, aliases(1)[0])))
    await _timed("union of 1,000 aliases", lambda: side.terms.union(APP, Term.ALIAS, aliases(1000)))
    await _timed("1,000 names", lambda: side.registry.resolve(APP, some(1000)))
    await _timed("10,000 names of a file", lambda: side.registry.resolve_bitmap(APP, some(10_000)))
    await _timed("one device", lambda: side.registry.find_devices(APP, some(1)))
    await _timed("1,000 devices", lambda: side.registry.find_devices(APP, some(1000)))
    await _timed("all tags", lambda: side.terms.list_terms(APP, Term.TAG), 2)
    await _timed("registered before", lambda: side.registry.registered_before(APP, [time.time() - 5]))


async def main(count: int) -> None:
    with servers(1, "--appendonly", "no") as (server,):
        async with open_sides(server.url, time.time) as (side, other):
            await _ask(side, other, await _register(side, count))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000))
