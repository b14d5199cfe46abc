"""One broker of a fleet, as far as apps, devices and the index go: the parts of the store, put together on a test's
Redis. Several sides on one Redis are several brokers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from pyroaring import BitMap

from broker.audiences.device_terms import terms
from broker.model import Device, Term, TermKey
from broker.redis.apps import RedisApps
from broker.redis.engine import Engine
from broker.redis.generations import Generations
from broker.redis.names import Names
from broker.redis.registry import Registry
from broker.redis.scripts import Script
from broker.redis.terms import Terms
from broker.store import StoreUnavailable
from broker.telling.calendar import HOUR
from tests.broker.store_contract import START

APP = 7
__all__ = ["APP", "HOUR", "START", "Side", "Unreliable", "check_index", "open_sides"]


class Unreliable:
    """An engine that counts its calls, and loses one of them: before it is carried out, or its answer."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.calls: list[str] = []  # names of scripts and commands
        self.lose: int | None = None  # so many calls from now
        self.carried_out = False  # what is lost is only the answer
        self.before: Callable[[str], Any] | None = None  # awaited before a call of this name goes out

    def call(self, script: Script, keys: Sequence[str], arguments: Sequence[Any] = ()) -> asyncio.Future[Any]:
        return self._submit(script.name, lambda: self.engine.call(script, keys, arguments))

    def run(self, *command: Any) -> asyncio.Future[Any]:
        return self._submit(command[0], lambda: self.engine.run(*command))

    def _submit(self, name: str, send: Callable[[], asyncio.Future[Any]]) -> asyncio.Future[Any]:
        self.calls.append(name)
        if self.before is not None:
            return asyncio.ensure_future(self._later(name, send))
        if self.lose is None:
            return send()
        self.lose -= 1
        if self.lose >= 0:
            return send()
        self.lose = None
        return asyncio.ensure_future(self._lost(send if self.carried_out else None))

    async def _later(self, name: str, send: Callable[[], asyncio.Future[Any]]) -> Any:
        assert self.before is not None
        await self.before(name)
        return await send()

    async def _lost(self, send: Callable[[], asyncio.Future[Any]] | None) -> Any:
        if send is not None:
            await send()
        raise StoreUnavailable("lost")


class Side:
    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        self.real = Engine(url)
        self.engine = Unreliable(self.real)
        engine: Any = self.engine
        self.clock = clock
        self.now = 0.0  # of the clock that only moves forward
        self.names = Names(engine)
        self.terms = Terms(engine, self.names, clock=lambda: self.now)
        self.generations = Generations(engine)
        self.registry = Registry(
            engine, clock, self.names, self.terms, self.generations, self._check, self._last_seen
        )
        self.apps = RedisApps(engine, clock, self.generations, self.registry.span, [self.registry])

    def _check(self, app_id: int) -> None:
        self.apps.check(app_id)

    async def _last_seen(self, app_id: int, devnos: Sequence[int]) -> Mapping[int, float]:
        return {}

    async def postings(self, *terms: TermKey) -> list[list[int]]:
        return [list(bits) for bits in await self.terms.postings(APP, terms)]

    async def close(self) -> None:
        await self.registry.close()
        await self.apps.close()
        await self.generations.close()
        await self.real.close()


@asynccontextmanager
async def open_sides(url: str, clock: Callable[[], float], count: int = 2) -> AsyncIterator[list[Side]]:
    sides = [Side(url, clock) for _ in range(count)]
    for side in sides:
        await side.real.open()
    try:
        yield sides
    finally:
        for side in sides:
            await side.close()


async def check_index(side: Side, span: int = 256) -> dict[int, Device]:
    """That each device has its terms and no other has; returns the devices. Every term that is counted anywhere is
    looked at."""
    known = await side.registry._read(APP, range(span))
    devices = {devno: device for devno, (device, _) in known.items()}
    wanted: dict[TermKey, BitMap] = {}
    for devno, device in devices.items():
        for term in terms(device):
            wanted.setdefault(term, BitMap()).add(devno)
    counted: list[TermKey] = [
        (kind, value)
        for kind in (Term.ALIAS, Term.TAG, Term.ATTRIBUTE)
        for value in await side.names.everything(APP, kind)
    ]
    asked = list(dict.fromkeys([*wanted, *counted]))
    side.terms.forget(APP)
    found = await side.terms.postings(APP, asked)
    for term, bits in zip(asked, found, strict=True):
        assert bits == wanted.get(term, BitMap()), term
    fields = {
        (Term(field[:1].decode()), field[1:].decode())
        for field in await side.real.run("HKEYS", f"{{{APP}.0}}:terms")
    }
    assert fields == {term for term in wanted if term[0] != Term.ALIAS}, (
        "pieces that nobody needs, or too few"
    )
    return devices
