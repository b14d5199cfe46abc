"""Small documents with versions, all of an app in its slot: a change is one script, alone or inside the commit of an
append (`lua/records.lua`).

Who is due is asked over all apps, and no script reaches two slots. So each kind has a list of the apps that have due
records, each with a time that is never above the earliest of its records:

- Before a change sets a due time it *touches* the app in that list: the time there goes down, if need be, and the
  change carries the number of the touch.
- A reader who finds that an app's earliest record is later than the list says *closes* the last touch it saw, in the
  app's slot: changes prepared before are refused there (and prepared again). Then it raises the time in the list,
  which does nothing if the app was touched since.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import struct
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import msgspec

from broker.model import Record, RecordChange
from broker.redis.engine import Engine
from broker.redis.keys import of_app, tag_of_app
from broker.redis.scripts import load
from broker.store import Conflict, StoreError, StoreUnavailable, TooMany

HEAD: Final = struct.Struct(">Id")  # version, due
TRIES: Final = 20  # times a change is prepared: each is refused only if a reader was there at the same moment
APPS: Final = 64  # looked at together for the earliest time

_Found: TypeAlias = list[Record]
_Listed: TypeAlias = list[tuple[int, float, int]]  # app_id, time, touch

_save: Final = load("save_records")
_list: Final = load("list_records")
_due: Final = load("due_records")
_apps: Final = load("due_apps")


class RedisRecords:
    """`store.records`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def find(self, app_id: int, kind: str, key: str) -> Record | None:
        packed: bytes | None = await self._engine.run("HGET", _hash(app_id, kind), key)
        return None if packed is None else _unpack(app_id, kind, key.encode(), packed)

    async def list(self, app_id: int, kind: str, after: str = "", limit: int = 1000) -> Sequence[Record]:
        keys = (of_app(app_id, f"recs:{kind}"), _hash(app_id, kind))
        return _records(app_id, kind, await self._engine.call(_list, keys, (after, limit)))

    async def count(self, app_id: int, kind: str) -> int:
        count: int = await self._engine.run("ZCARD", of_app(app_id, f"recs:{kind}"))
        return count

    # Changes

    async def save(self, changes: Sequence[RecordChange]) -> Sequence[int]:
        """Raises ValueError for changes of several apps."""
        if not all(change.key for change in changes):
            raise StoreError("a record needs a key")
        if not changes:
            return []
        app_id, token = changes[0].app_id, secrets.token_hex(8)
        for _ in range(TRIES):
            arguments = (tag_of_app(app_id), await self.prepare(changes), token)
            answer: list[int] = await self._engine.call(_save, [of_app(app_id, "kinds")], arguments)
            if not refused(answer):
                return answer
        raise StoreUnavailable("records are read and changed too often at the same time")

    async def prepare(self, changes: Sequence[RecordChange]) -> bytes:
        """Changes of one app as `lua/records.lua` takes them. To be called again after a refusal."""
        if not changes:
            return b""
        (app_id, *others) = {change.app_id for change in changes}
        if others:
            raise ValueError("the record changes of one call belong to one app")
        earliest: dict[str, float] = {}
        for change in changes:
            if change.due is not None and change.value is not None:
                earliest[change.kind] = min(change.due, earliest.get(change.kind, math.inf))
        touches = await asyncio.gather(
            *[self._call_apps(kind, "touch", app_id, due) for kind, due in earliest.items()]
        )
        packed = [(c.kind, c.key, for_lua(c.value), c.version, c.due, c.message, c.at_most) for c in changes]
        return msgspec.msgpack.encode((dict(zip(earliest, touches, strict=True)), packed))

    # What is due

    async def due(self, kinds: Sequence[str], now: float, limit: int) -> Sequence[Record]:
        lists = await asyncio.gather(*[self._due_of_kind(kind, now, limit) for kind in kinds])
        found = [record for records in lists for record in records]
        return sorted(found, key=lambda record: record.due or 0.0)[:limit]

    async def _due_of_kind(self, kind: str, now: float, limit: int) -> _Found:
        """Each round looks at the earliest apps; those without anything due leave the list with it, and make room."""
        while True:
            listed = await self._listed(kind, now, limit)
            answers = await asyncio.gather(
                *[self._due_of_app(app_id, kind, now, limit) for app_id, _, _ in listed]
            )
            stale = [entry for entry, (_, records) in zip(listed, answers, strict=True) if not records]
            await asyncio.gather(*[self._raise(kind, app_id, touch) for app_id, _, touch in stale])
            if not stale or len(listed) < limit:
                return [record for _, records in answers for record in records]

    async def next_due(self, kinds: Sequence[str]) -> float | None:
        times = await asyncio.gather(*map(self._next_of_kind, kinds))
        return min((time for time in times if time is not None), default=None)

    async def _next_of_kind(self, kind: str) -> float | None:
        """The list's first time, once it is true."""
        while listed := await self._listed(kind, math.inf, APPS):
            answers = await asyncio.gather(
                *[self._due_of_app(app_id, kind, -math.inf, 0) for app_id, _, _ in listed]
            )
            earliest, time = answers[0][0], listed[0][1]
            if earliest is not None and earliest <= time:
                return earliest
            await asyncio.gather(
                *[
                    self._raise(kind, app_id, touch)
                    for (app_id, time, touch), (true, _) in zip(listed, answers, strict=True)
                    if true != time
                ]
            )
        return None

    async def _listed(self, kind: str, now: float, limit: int) -> _Listed:
        answer: list[bytes] = await self._call_apps(kind, "list", now, limit)
        return [
            (int(app), float(time), int(touch))
            for app, time, touch in zip(answer[::3], answer[1::3], answer[2::3], strict=True)
        ]

    async def _due_of_app(
        self, app_id: int, kind: str, now: float, limit: int, close: int | str = ""
    ) -> tuple[float | None, _Found]:
        arguments = (tag_of_app(app_id), kind, now, limit, close)
        answer = await self._engine.call(_due, [of_app(app_id, f"due:{kind}")], arguments)
        return float(answer[0]) if answer[0] else None, _records(app_id, kind, answer[1:])

    async def _raise(self, kind: str, app_id: int, touch: int) -> None:
        earliest, _ = await self._due_of_app(app_id, kind, -math.inf, 0, close=touch)
        await self._call_apps(kind, "raise", app_id, touch, "" if earliest is None else earliest)

    def _call_apps(self, kind: str, *arguments: str | int | float) -> asyncio.Future[Any]:
        keys = [f"{{due:{kind}}}:{what}" for what in ("apps", "touches", "count")]
        return self._engine.call(_apps, keys, arguments)

    async def purge(self, app_id: int, _partitions: range, _budget: int) -> int:
        """Of a deleted app. Returns how many kinds went."""
        kinds: list[bytes] = await self._engine.run("SMEMBERS", of_app(app_id, "kinds"))
        keys = [
            of_app(app_id, f"{what}:{kind.decode()}") for kind in kinds for what in ("rec", "recs", "due")
        ]
        await self._engine.run("UNLINK", *keys, of_app(app_id, "kinds"), of_app(app_id, "fence"))
        return len(kinds)


def for_lua(value: bytes | None) -> msgspec.Raw | None:
    """Lua's cmsgpack knows bytes as texts only."""
    return None if value is None else msgspec.Raw(b"\xdb" + len(value).to_bytes(4) + value)


def refused(answer: object) -> bool:
    """Whether the changes have to be prepared again. Raises Conflict, TooMany, or StoreError for a deleted app."""
    match answer:
        case [b"refused", b"late", *_]:
            return True
        case [b"refused", b"conflict", bytes() as text]:
            raise Conflict(text.decode())
        case [b"refused", b"too many", bytes() as text]:
            raise TooMany(text.decode())
        case [b"refused", b"deleted", bytes() as tag]:
            raise StoreError(f"app {tag.decode().strip('{}')} was deleted")
    return False


def _hash(app_id: int, kind: str) -> str:
    return of_app(app_id, f"rec:{kind}")


def _records(app_id: int, kind: str, answer: Sequence[bytes]) -> list[Record]:
    """key, packed, key, …"""
    return [_unpack(app_id, kind, key, packed) for key, packed in zip(answer[::2], answer[1::2], strict=True)]


def _unpack(app_id: int, kind: str, key: bytes, packed: bytes) -> Record:
    version, due = HEAD.unpack_from(packed)
    value = packed[HEAD.size :]
    return Record(app_id, kind, key.decode(), value, version, None if math.isinf(due) else due)
