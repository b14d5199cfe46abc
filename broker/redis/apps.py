"""Apps: a hash each, so that setting one field loses no change of another; and a list of all, by number.

To delete one: a note that it is about to happen, with what has to be removed later; then its hash goes, which only
one caller can do; then its slot gets a mark that refuses whatever a slower process still sends, and the note becomes
final. A note that nobody made final is forgotten after a minute, if the app is there, and else finished."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec
from msgspec import Struct

from broker.model import AccessRule, App, AppSettings
from broker.redis.engine import Engine
from broker.redis.generations import Generations
from broker.redis.keys import of_app
from broker.redis.scripts import load
from broker.redis.watch import Watch
from broker.redis.wire import Argument
from broker.store import Conflict, StoreError
from broker.tenants.tokens import new_credentials, new_secret

log = logging.getLogger(__name__)

LAST: Final = "{apps}:last"
BY_NUMBER: Final = "{apps}:all"  # sorted set of keys; superset
DELETED: Final = "{apps}:deleted"  # app_id -> _Note
REFRESH: Final = 5.0  # seconds between two looks at what others deleted
PURGED: Final = 600.0  # seconds after which nobody writes for a deleted app any more
UNFINISHED: Final = 60.0  # seconds until a note that nobody made final is looked into

_set: Final = load("app_set")
_rules: Final = msgspec.json.Decoder(tuple[AccessRule, ...])
_settings: Final = msgspec.json.Decoder(AppSettings)


class _Note(Struct, array_like=True, frozen=True):
    key: str
    at: float
    partitions: int
    final: bool = False


_notes: Final = msgspec.msgpack.Decoder(_Note)


class Purging(Protocol):
    """A part that removes what a deleted app left: 0 where nothing is left."""

    async def purge(self, app_id: int, partitions: range, budget: int) -> int: ...


class RedisApps:
    """`span` gives an app's partitions; `purging` are the parts that have something of each app."""

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float],
        generations: Generations,
        span: Callable[[int], Any],
        purging: Sequence[Purging],
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._generations = generations
        self._span = span
        self._purging = purging
        self.deleted: set[int] = set()
        self._watch = Watch(self.refresh, REFRESH, "deleted apps cannot be looked up")

    async def open(self) -> None:
        await self.refresh()
        self._watch.open()

    async def close(self) -> None:
        await self._watch.close()

    async def refresh(self) -> None:
        """Look for what others deleted."""
        self.deleted |= {app_id for app_id, note in (await self._read_notes()).items() if note.final}

    async def _read_notes(self) -> dict[int, _Note]:
        words = await self._engine.run("HGETALL", DELETED)
        return {int(i): _notes.decode(note) for i, note in zip(words[::2], words[1::2], strict=True)}

    def check(self, app_id: int) -> None:
        """Raises StoreError for an app that was deleted."""
        if app_id in self.deleted:
            raise StoreError(f"app {app_id} was deleted")

    # Calls

    async def create_app(self, name: str, *, open: bool = False, offline_limit: int = 100) -> App:
        app_id = int(await self._engine.run("INCR", LAST))
        app = App(app_id, *_first(new_credentials(), name), open, self._clock(), offline_limit)
        await self._engine.run("ZADD", BY_NUMBER, app_id, app.key)
        await self._engine.run("HSET", _key(app.key), *_fields(app))
        return app

    async def find_app(self, key: str) -> App | None:
        app = await self._change(key)
        if app is None or app.app_id in self.deleted:
            return None
        await self._generations.load(app.app_id)
        return app

    async def list_apps(self, after: int = 0, limit: int = 1000) -> list[App]:
        apps: list[App] = []
        while len(apps) < limit:
            words = await self._engine.run(
                "ZRANGEBYSCORE", BY_NUMBER, f"({after}", "+inf", "WITHSCORES", "LIMIT", 0, limit - len(apps)
            )
            if not words:
                break
            found = await asyncio.gather(*[self._change(key.decode()) for key in words[::2]])
            apps += [app for app in found if app is not None]
            after = int(words[-1])
        return apps

    async def rotate_secret(self, key: str) -> App | None:
        return await self._change(key, "master_secret", new_secret())

    async def set_access(self, key: str, rules: Sequence[AccessRule]) -> App | None:
        return await self._change(key, "access", msgspec.json.encode(tuple(rules)))

    async def set_settings(
        self, key: str, settings: AppSettings, former: AppSettings | None = None
    ) -> App | None:
        """What was written by an older release may read the same and be other bytes: these are compared as they are
        there."""
        wanted = msgspec.json.encode(settings)
        if former is None:
            return await self._change(key, "settings", wanted)
        fields = await self._fields(key)
        if not fields:
            return None
        there = fields.get(b"settings", b"")
        if _settings.decode(there or b"{}") != former:
            raise _overtaken(key)
        fields = await self._fields(key, "settings", wanted, there)
        if fields and fields[b"settings"] != wanted:
            raise _overtaken(key)
        return _app_of(key, fields) if fields else None

    async def _change(self, key: str, *field: Argument) -> App | None:
        fields = await self._fields(key, *field)
        return _app_of(key, fields) if fields else None

    async def _fields(self, key: str, *field: Argument) -> dict[bytes, bytes]:
        words = await self._engine.call(_set, [_key(key)], field)
        return dict(zip(words[::2], words[1::2], strict=True))

    # Deletion

    async def delete_app(self, key: str) -> bool:
        app = await self._change(key)
        if app is None:
            return False
        note = _Note(key, self._clock(), len(await self._span(app.app_id)))
        await self._write_note(app.app_id, note)
        if not await self._engine.run("DEL", _key(key)):
            return False
        await self._finish(app.app_id, note)
        return True

    async def _finish(self, app_id: int, note: _Note) -> None:
        await self._engine.run("SET", of_app(app_id, "deleted"), 1)
        await self._engine.run("ZREM", BY_NUMBER, note.key)
        await self._write_note(app_id, msgspec.structs.replace(note, final=True))
        self.deleted.add(app_id)
        self._generations.drop(app_id)

    async def _write_note(self, app_id: int, note: _Note) -> None:
        await self._engine.run("HSET", DELETED, app_id, msgspec.msgpack.encode(note))

    async def expire(self, now: float, budget: int) -> int:
        """Remove what deleted apps left. A note stays for a while: slower processes may still have written."""
        gone = 0
        for app_id, note in (await self._read_notes()).items():
            if not note.final:
                await self._look_into(app_id, note, now)
                continue
            self.deleted.add(app_id)
            left = sum([await part.purge(app_id, range(note.partitions), budget) for part in self._purging])
            if not left and now >= note.at + PURGED:
                await self._engine.run("HDEL", DELETED, app_id)
            gone += left
            if gone >= budget:
                break
        return gone

    async def _look_into(self, app_id: int, note: _Note, now: float) -> None:
        if now < note.at + UNFINISHED:
            return
        if await self._engine.run("EXISTS", _key(note.key)):
            await self._engine.run("HDEL", DELETED, app_id)
        else:
            await self._finish(app_id, note)


def _overtaken(key: str) -> Conflict:
    return Conflict(f"the settings of app {key} were changed meanwhile")


def _key(key: str) -> str:
    return f"app:{key}"


def _first(credentials: tuple[str, str, str, bytes], name: str) -> tuple[str, str, str, str, bytes]:
    key, *secrets = credentials
    return key, name, *secrets  # type: ignore[return-value]


def _fields(app: App) -> list[Argument]:
    return [
        *("app_id", app.app_id),
        *("name", app.name),
        *("master_secret", app.master_secret),
        *("device_key", app.device_key),
        *("signing_key", app.signing_key),
        *("open", int(app.open)),
        *("created_at", repr(app.created_at)),
        *("offline_limit", app.offline_limit),
    ]


def _app_of(key: str, fields: Mapping[bytes, bytes]) -> App:
    return App(
        int(fields[b"app_id"]),
        key,
        fields[b"name"].decode(),
        fields[b"master_secret"].decode(),
        fields[b"device_key"].decode(),
        fields[b"signing_key"],
        fields[b"open"] == b"1",
        float(fields[b"created_at"]),
        int(fields[b"offline_limit"]),
        _rules.decode(fields.get(b"access", b"[]")),
        _settings.decode(fields.get(b"settings", b"{}")),
    )
