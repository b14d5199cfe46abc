"""What ordinary MQTT keeps: items of durable sessions, and retained messages. Each is a hash in the app's slot.

The value that was saved last counts (S11). A call whose answer was lost may reach Redis after the next one, so calls
carry the name of their writer and a number, and Redis ignores one that is older than what it has of that writer.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Final, TypeAlias

import msgspec

from broker.model import Retained, SessionItem
from broker.redis.engine import Engine
from broker.redis.keys import of_app, tag_of_app
from broker.redis.scripts import Script, load
from broker.redis.wire import Argument
from broker.store import StoreUnavailable

PAGE: Final = 1000  # fields read at once, about

_Item: TypeAlias = tuple[int, str, int | str]  # session, kind, item
_Retained: TypeAlias = tuple[bytes, int, bytes, float | None, str]

_save: Final = load("session_items")
_retain: Final = load("retain")
_item: Final = msgspec.msgpack.Decoder(_Item)
_retained: Final = msgspec.msgpack.Decoder(_Retained)


class _Writer:
    """Numbers the calls of one process."""

    def __init__(self, engine: Engine, script: Script, what: str, node: Callable[[], int]) -> None:
        self._engine = engine
        self._script = script
        self._what = what
        self._node = node
        self._name = secrets.token_hex(8)
        self._numbers = itertools.count(1)

    async def write(self, calls: Mapping[int, Sequence[Argument]]) -> None:
        """The arguments by app. Raises StoreUnavailable."""
        number = next(self._numbers)
        answers = await asyncio.gather(
            *[
                self._engine.call(
                    self._script,
                    [of_app(app_id, self._what)],
                    (tag_of_app(app_id), self._name, number, self._node(), *arguments),
                )
                for app_id, arguments in calls.items()
            ],
            return_exceptions=True,  # the others go on: who raises has nothing under way
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        if -1 in answers:
            raise StoreUnavailable("another node is the app's home now")
        if not all(answers):
            raise StoreUnavailable("a later call was stored before this one")


class RedisSessions:
    """Of one call over several apps that raises, some apps' items may be stored: those of one app are all or none.
    `node`: the number of this process, 0 if it is none."""

    def __init__(self, engine: Engine, node: Callable[[], int] = lambda: 0) -> None:
        self._engine = engine
        self._writer = _Writer(engine, _save, "sessions", node)

    async def save(self, items: Sequence[SessionItem]) -> None:
        newest: dict[int, dict[_Item, bytes | None]] = {}
        for item in items:
            newest.setdefault(item.app_id, {})[item.session, item.kind, item.item] = item.value
        await self._writer.write({app_id: _item_arguments(values) for app_id, values in newest.items()})

    async def list(self, app_id: int) -> list[SessionItem]:
        found = {
            _item.decode(field): value
            async for field, value in _fields(self._engine, of_app(app_id, "sessions"))
        }
        return [
            SessionItem(app_id, session, kind, item, found[session, kind, item])
            for session, kind, item in sorted(found, key=_order)
        ]

    async def purge(self, app_id: int, _partitions: range, _budget: int) -> int:
        """Of a deleted app."""
        gone: int = await self._engine.run("UNLINK", of_app(app_id, "sessions"), of_app(app_id, "home"))
        return gone


def _item_arguments(values: Mapping[_Item, bytes | None]) -> list[Argument]:
    arguments: list[Argument] = []
    removed: list[Argument] = []
    for key, value in values.items():
        if value is None:
            removed.append(msgspec.msgpack.encode(key))
        else:
            arguments += (msgspec.msgpack.encode(key), value)
    return [len(arguments) // 2, *arguments, *removed]


def _order(key: _Item) -> tuple[int, bytes, bool, int, bytes]:
    session, kind, item = key
    if isinstance(item, int):
        return session, kind.encode(), False, item, b""
    return session, kind.encode(), True, 0, item.encode()


class RedisRetained:
    """`clock` gives Unix seconds; `node`: as above."""

    def __init__(
        self, engine: Engine, clock: Callable[[], float], node: Callable[[], int] = lambda: 0
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._writer = _Writer(engine, _retain, "retained", node)

    async def retain(self, retained: Sequence[Retained]) -> None:
        newest = {(one.app_id, one.topic): one for one in retained}
        calls: dict[int, list[Argument]] = {}
        for one in newest.values():
            arguments = calls.setdefault(one.app_id, [self._clock()])
            expires_at = one.expires_at if one.payload else None
            arguments += (one.topic, _pack(one), "" if expires_at is None else expires_at)
        await self._writer.write(calls)

    async def list(self, app_id: int) -> list[Retained]:
        """By topic, without those that are over."""
        now = self._clock()
        found: dict[bytes, Retained] = {}
        async for topic, packed in _fields(self._engine, of_app(app_id, "retained")):
            payload, qos, properties, expires_at, source = _retained.decode(packed)
            if expires_at is None or expires_at > now:
                found[topic] = Retained(app_id, topic.decode(), payload, qos, properties, expires_at, source)
        return [found[topic] for topic in sorted(found)]

    async def purge(self, app_id: int, _partitions: range, _budget: int) -> int:
        """Of a deleted app."""
        gone: int = await self._engine.run(
            "UNLINK", of_app(app_id, "retained"), of_app(app_id, "retained:over")
        )
        return gone


def _pack(one: Retained) -> bytes:
    if not one.payload:
        return b""
    return msgspec.msgpack.encode((one.payload, one.qos, one.properties, one.expires_at, one.source))


async def _fields(engine: Engine, key: str) -> AsyncIterator[tuple[bytes, bytes]]:
    """Of a hash, page by page: those that are there all the while come, some perhaps twice."""
    cursor = b"0"
    while True:
        cursor, page = await engine.run("HSCAN", key, cursor, "COUNT", PAGE)
        for field, value in zip(page[::2], page[1::2], strict=True):
            yield field, value
        if cursor == b"0":
            return
