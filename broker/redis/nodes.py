"""The processes of one installation: a table in Redis, which every process looks at once a second.

A process gets a number when it joins, which no other ever gets; so a route that carries it says which life of which
process it belongs to. Its lease is renewed by each beat. Leases run by Redis's own clock, unless a test gives one.
When a lease ends the node is not live, and its routes do not hold; when it beats again within GRACE they do. GRACE
counts from when somebody noted the end, so also after Redis itself was away. Afterwards its routes may be erased, and
it has to join anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol, TypeAlias

import msgspec
from msgspec.structs import replace

from broker.model import Beat, NodeEntry, NodeInfo
from broker.redis.scripts import Script, load
from broker.redis.watch import Watch
from broker.redis.wire import Argument
from broker.store import Conflict, StoreUnavailable

log = logging.getLogger(__name__)

LEASE: Final = 10.0  # seconds; also how soon a process that died may be started anew under its name
REFRESH: Final = 1.0  # seconds between two looks at the table
GRACE: Final = 60.0  # seconds from the end of a lease until the routes may be erased
MEMORY: Final = 3600.0  # seconds that the dead are listed
TABLE: Final = "{nodes}:table"
GATEWAYS: Final = frozenset(("all", "gateway"))

Numbers: TypeAlias = list[int]
_nodes: Final = load("nodes")
_info: Final = msgspec.msgpack.Decoder(NodeInfo)


class Calls(Protocol):
    """What is needed of the engine."""

    def call(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()
    ) -> Awaitable[Any]: ...


class RedisNodes:
    """Implements `broker.store.Nodes`; and is what the store's parts ask who lives.

    `number` is that of this process, 0 before it joined. `clock`: None is Redis's own."""

    lease = LEASE

    def __init__(self, engine: Calls, clock: Callable[[], float] | None = None) -> None:
        self._engine = engine
        self._clock = clock
        self.number = 0
        self.name = ""
        self.live: Mapping[int, NodeEntry] = {}
        self.on_number: Callable[[int], None] | None = None
        """Called with the new number when this process has joined."""
        self._sent: NodeInfo | None = None  # as told by the last beat
        self._wish = ""
        self._entries: dict[int, NodeEntry] = {}
        self._hearing: dict[int, NodeEntry] = {}  # not dead
        self._dead: Numbers = []
        self._numbers: dict[str, int] = {}
        self._next = 0  # the greatest number that was given
        self._version: bytes = b""
        self._guests: dict[str, asyncio.Task[int]] = {}  # nodes that this process plays: see `ensure`
        self._watch = Watch(self._look, REFRESH, "the table of nodes cannot be read")

    # Life

    async def open(self) -> None:
        """Look at the table, and then again every second."""
        await self.refresh()
        self._watch.open()

    async def close(self) -> None:
        """Leave, if that was not done."""
        await self._watch.close()
        guests, self._guests = self._guests, {}
        with suppress(StoreUnavailable):
            for name, joining in guests.items():
                await self._ask("leave", await joining, name)
            await self.leave()

    async def _look(self) -> None:
        for name, joining in tuple(self._guests.items()):
            await self._ask("beat", await joining, name, NodeInfo(name))
        await self.refresh()

    # The facet of the store

    async def join(self, info: NodeInfo) -> None:
        number = await self._ask("join", 0, info.name, info)
        if not number:
            raise Conflict(
                f"node {info.name}: another process with this name is alive; give this one another, or wait"
                f" {LEASE:.0f} s if it was killed"
            )
        self.number, self.name, self._sent = number, info.name, info
        await self.refresh()
        if self.on_number is not None:
            self.on_number(number)

    async def beat(self, info: NodeInfo) -> Beat:
        """A node whose lease ran out long ago is a new one afterwards: none of its routes holds."""
        answer = await self._ask("beat", self.number, info.name, info)
        if answer < 0:
            log.warning("node %s: its lease ran out too long ago, it joins anew", info.name)
            await self.join(info)
        self._sent = info
        return Beat(answer != 0, self._wish_for(self.number))

    def _wish_for(self, number: int) -> str:
        entry = self._entries.get(number)
        return "" if entry is None else entry.wish

    async def leave(self) -> None:
        if self.number:
            number, self.number = self.number, 0
            await self._ask("leave", number, self.name)

    async def list(self) -> list[NodeEntry]:
        self._version = b""  # the beats themselves do not change it
        await self.refresh()
        return sorted(self._entries.values(), key=lambda entry: entry.info.name)

    async def wish(self, name: str, wish: str) -> bool:
        return bool(await self._ask("wish", 0, name, wish))

    # For the parts of the store and the bus

    async def ensure(self, name: str) -> int:
        """The number of the node with this name: this process itself, or (in a process that never joined, such as a
        test) a node that it plays from now on until it closes."""
        if name == self.name and self.number:
            return self.number
        if name not in self._guests:
            self._guests[name] = asyncio.ensure_future(self._join_as(name))
        return await asyncio.shield(self._guests[name])

    async def _join_as(self, name: str) -> int:
        number = await self._ask("join", 0, name, NodeInfo(name))
        if not number:
            raise Conflict(f"node {name}: another process with this name is alive")
        return number

    def mine(self) -> int:
        return self.number

    def is_live(self, number: int) -> bool:
        """Numbers that were given since the last look are."""
        return number in self.live or number > self._next

    def name_of(self, number: int) -> str:
        """Empty: it is not known (any more)."""
        entry = self._entries.get(number)
        return "" if entry is None else entry.info.name

    def number_of(self, name: str) -> int:
        """0: no node of this name lives, or may wake up."""
        return self._numbers.get(name, 0)

    def everybody(self) -> Numbers:
        """Who is rung: those that live, and those that slept through their lease and may wake up with their number.
        When they do, the doorbells that rang meanwhile are a gap to them; else they would hear later ones only."""
        return list(self._hearing)

    def gateways(self) -> Numbers:
        """Of these, those that hold devices."""
        return [number for number, entry in self._hearing.items() if entry.info.role in GATEWAYS]

    def may_hear(self, number: int) -> bool:
        return number in self._hearing or number > self._next

    def dead(self) -> Numbers:
        """Those whose routes may be erased: they never hold again."""
        return self._dead

    async def refresh(self) -> bool:
        """Look at the table now. True: it changed."""
        version = self._version
        await self._ask("look", 0, "")
        return self._version != version

    # The script

    async def _ask(self, verb: str, number: int, name: str, value: NodeInfo | str = "") -> int:
        changes = isinstance(value, NodeInfo) and self._shape(value) != self._shape(self._sent)
        packed = msgspec.msgpack.encode(value) if isinstance(value, NodeInfo) else value
        now = "" if self._clock is None else repr(self._clock())
        answer, version, *table = await self._engine.call(
            _nodes,
            (TABLE,),
            (verb, now, LEASE, GRACE, MEMORY, self._version, number, name, packed, int(changes)),
        )
        if table:
            self._take(version, *table)
        return int(answer)

    @staticmethod
    def _shape(info: NodeInfo | None) -> NodeInfo | None:
        """What everybody is to know soon; `connections` is read by `list`."""
        return info and replace(info, connections=0)

    def _take(self, version: bytes, greatest: bytes, nodes: Sequence[Any], dead: Numbers) -> None:
        entries = {}
        for at in range(0, len(nodes), 5):
            number, packed, beaten_at, live, wish = nodes[at : at + 5]
            entries[number] = NodeEntry(
                _info.decode(packed), number, float(beaten_at), bool(live), wish.decode()
            )
        self._version, self._next, self._entries, self._dead = version, int(greatest), entries, dead
        self.live = {number: entry for number, entry in entries.items() if entry.live}
        self._hearing = {number: entry for number, entry in entries.items() if number not in dead}
        self._numbers = {entry.info.name: number for number, entry in self._hearing.items()}
