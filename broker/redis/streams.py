"""Logs: the behaviour events of each app, in its slot, and the audit log of the installation, which is small and in a
slot of its own. Ids are milliseconds, then a counter; the script that appends gives them, so they grow in the order
in which entries become visible, whoever wrote them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import msgspec

from broker.model import AuditEntry, BehaviourEvent
from broker.redis.engine import Engine
from broker.redis.keys import of_app, tag_of_app
from broker.redis.records import refused
from broker.redis.scripts import load
from broker.redis.wire import Argument

COUNTER: Final = 1024  # ids of one millisecond; ids stay below 2**53 for centuries
MINUTE: Final = 60.0
AUDIT: Final = ("{audit}:log", "{audit}:last")

_Event: TypeAlias = tuple[int, str, float, bytes]  # devno, name, at, payload

_append: Final = load("events")
_audit: Final = load("audit")
_list_audit: Final = load("list_audit")
_expire_audit: Final = load("expire_audit")
_event: Final = msgspec.msgpack.Decoder(_Event)
_entry: Final = msgspec.msgpack.Decoder(AuditEntry)


def first_id(at: float) -> int:
    """The least id that is given out at this time."""
    return max(0, int(at * 1000)) * COUNTER


class RedisEvents:
    """`clock` gives Unix seconds; `lifetime` in seconds."""

    def __init__(self, engine: Engine, clock: Callable[[], float], lifetime: float) -> None:
        self._engine = engine
        self._clock = clock
        self._lifetime = lifetime

    async def record(self, events: Sequence[BehaviourEvent]) -> None:
        """Of several apps, each app's are stored or not. An event may be stored twice: its answer was lost."""
        packed: dict[int, list[bytes]] = {}
        for event in events:
            row = (event.devno, event.name, event.at, event.payload)
            packed.setdefault(event.app_id, []).append(msgspec.msgpack.encode(row))
        await asyncio.gather(*[self._append(app_id, entries) for app_id, entries in packed.items()])

    async def _append(self, app_id: int, entries: Sequence[bytes]) -> None:
        now = self._clock()
        kept = int((self._lifetime + MINUTE) * 1000)
        arguments: list[Argument] = [
            tag_of_app(app_id),
            first_id(now),
            first_id(now - self._lifetime),
            kept,
            *entries,
        ]
        keys = (of_app(app_id, "events"), of_app(app_id, "events:last"))
        refused(await self._engine.call(_append, keys, arguments))

    async def list(self, app_id: int, after: int, limit: int) -> list[tuple[int, BehaviourEvent]]:
        start = max(after + 1, first_id(self._clock() - self._lifetime))
        found = await self._engine.run("XRANGE", of_app(app_id, "events"), start, "+", "COUNT", limit)
        return [
            (_number(entry_id), BehaviourEvent(app_id, *_event.decode(fields[1])))
            for entry_id, fields in found
        ]

    async def purge(self, app_id: int, _partitions: range, _budget: int) -> int:
        """Of a deleted app."""
        gone: int = await self._engine.run("UNLINK", of_app(app_id, "events"), of_app(app_id, "events:last"))
        return gone


class RedisAudit:
    """Entries of deleted apps stay for the lifetime, too."""

    def __init__(self, engine: Engine, clock: Callable[[], float], lifetime: float) -> None:
        self._engine = engine
        self._clock = clock
        self._lifetime = lifetime

    async def record(self, entries: Sequence[AuditEntry]) -> None:
        if entries:
            arguments: list[Argument] = [first_id(self._clock())]
            for entry in entries:
                arguments += (entry.app_id, msgspec.msgpack.encode(entry))
            await self._engine.call(_audit, AUDIT, arguments)

    async def list(self, app_id: int | None, before: int, limit: int) -> list[tuple[int, AuditEntry]]:
        arguments = ("" if app_id is None else app_id, before or "+", limit)
        found = await self._engine.call(_list_audit, AUDIT[:1], arguments)
        return [(_number(entry_id), _entry.decode(fields[1])) for entry_id, fields in found]

    async def expire(self, now: float, budget: int) -> int:
        """Entries come nearly in the order of their times: only the oldest are looked at."""
        oldest = await self._engine.run("XRANGE", AUDIT[0], "-", "+", "COUNT", budget)
        arguments: list[Argument] = []
        for entry_id, fields in oldest:
            entry = _entry.decode(fields[1])
            if entry.at <= now - self._lifetime:
                arguments += (_number(entry_id), entry.app_id)
        gone: int = await self._engine.call(_expire_audit, AUDIT[:1], arguments) if arguments else 0
        return gone


def _number(entry_id: bytes) -> int:
    return int(entry_id.partition(b"-")[0])
