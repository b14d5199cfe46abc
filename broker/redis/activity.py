"""Who was there when, for a fleet: each process keeps the hour that is going on for the devices it holds
(Attendance), and every ten seconds appends what is new.

One hash for each app, kind and 65,536 devices: by hour or day, a list of bitmaps whose union counts; so processes
append without reading, and the same bitmap twice does no harm. A value that has grown long is folded into one bitmap,
and old hours into days, by whoever sees it: a script replaces what was read by its union if it still is there."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha1
from typing import Any, Final, Protocol, TypeAlias

from pyroaring import BitMap

from broker.bitmaps import decode_bits, encode_bits
from broker.model import Activity, App
from broker.redis.engine import Engine
from broker.redis.keys import PARTITION_BITS, of_app, of_partition
from broker.redis.scripts import load
from broker.telling.attendance import (
    DAYS_OF_HOURS,
    GAP,
    LONGEST_DAY,
    PASS_EVERY,
    Attendance,
    Bits,
    Stretch,
    add_fresh,
    touches,
)
from broker.telling.calendar import HOUR, Calendar

CHUNK_BITS: Final = 16
FOLD_BYTES: Final = 20_000  # of a value that is folded; a bitmap of one chunk has 8,200 at most
PASS: Final = "{apps}:pass:"  # and the number of the hour: somebody goes through the apps in it
PASS_APPS: Final = 64  # looked at in one call of `expire`
LONG_AGO: Final = -GAP - 400 * 24 * HOUR

_add: Final = load("activity_add")
_find: Final = load("activity_find")
_fold: Final = load("activity_fold")
_SIZE: Final = struct.Struct(">I")  # before each bitmap of a value

Field: TypeAlias = tuple[int, int]  # width, start
Values: TypeAlias = dict[Field, bytes]


class ListApps(Protocol):
    async def list_apps(self, after: int = 0, limit: int = 1000) -> list[App]: ...


class RedisActivity:
    """`check` raises StoreError for an app that was deleted."""

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float],
        calendar: Calendar,
        lifetime: float,
        apps: ListApps,
        deleted: Callable[[int], bool],
    ) -> None:
        self._engine = engine
        self._calendar = calendar
        self._lifetime = lifetime
        self._apps = apps
        self._deleted = deleted
        self._routed: dict[int, BitMap] = {}  # devices that this process holds
        self._chunks: set[tuple[int, int]] = set()  # of apps, that are in the app's list
        self._tasks: set[asyncio.Task[None]] = set()
        self._attendance = Attendance(calendar, clock, self._held, self._write)
        self._after: int | None = None  # the pass has come to this app; None: none is under way
        self._passed = -1  # the hour of the last pass, here or elsewhere

    def open(self) -> None:
        self._attendance.open()

    async def close(self) -> None:
        """Write the rest."""
        self._attendance.close()
        while self._tasks:
            await asyncio.wait(self._tasks)

    # What happens

    def claimed(self, app_id: int, devno: int) -> None:
        """This process has the device now."""
        self._attendance.note(app_id, Activity.ONLINE, devno)
        self._routed.setdefault(app_id, BitMap()).add(devno)

    def released(self, app_id: int, devno: int) -> None:
        """It has gone, or is elsewhere."""
        held = self._routed.get(app_id)
        if held is None or devno not in held:
            return
        self._attendance.turn(app_id)
        held.discard(devno)
        if not held:
            del self._routed[app_id]

    def note_active(self, app_id: int, devno: int) -> None:
        self._attendance.note(app_id, Activity.ACTIVE, devno)

    def _held(self, app_id: int) -> BitMap:
        return self._routed.get(app_id) or BitMap()

    # Writing

    def _write(self, rows: list[Bits]) -> asyncio.Future[Any]:
        task = asyncio.get_running_loop().create_task(self._append(rows))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _append(self, rows: Iterable[Bits]) -> None:
        values: dict[tuple[int, str, int], list[str | bytes]] = {}
        for app_id, kind, width, start, bits in rows:
            if not self._deleted(app_id):
                for chunk, part in _chunks(bits):
                    words = values.setdefault((app_id, kind, chunk), [])
                    words += (f"{width}:{start}", _entry(part))
        await self._list_chunks({(app_id, chunk) for app_id, _, chunk in values} - self._chunks)
        answers = await asyncio.gather(
            *[self._engine.call(_add, [_key(*place)], words) for place, words in values.items()]
        )
        long = [
            (place, _field(field))
            for (place, words), lengths in zip(values.items(), answers, strict=True)
            for field, length in zip(words[::2], lengths, strict=True)
            if length > FOLD_BYTES
        ]
        await asyncio.gather(*[self._fold_one(*place, field) for place, field in long])

    async def _list_chunks(self, fresh: set[tuple[int, int]]) -> None:
        """Before they are written, so that whoever reads knows of them."""
        await asyncio.gather(*[self._engine.run("SADD", of_app(app, "seen"), chunk) for app, chunk in fresh])
        self._chunks |= fresh

    async def _fold_one(self, app_id: int, kind: str, chunk: int, field: Field) -> None:
        values = await self._read(app_id, kind, chunk, field[1], field[1] + 1)
        if field in values:
            await self._unite(app_id, kind, chunk, field, {field: values[field]})

    async def _unite(self, app_id: int, kind: str, chunk: int, into: Field, values: Values) -> bool:
        bits = BitMap.union(BitMap(), *[_decode(value) for value in values.values()])
        words: list[str | bytes | int] = ["{}:{}".format(*into), _entry(bits)]
        for field, value in values.items():
            words += ("{}:{}".format(*field), len(value), sha1(value, usedforsecurity=False).hexdigest())
        return bool(await self._engine.call(_fold, [_key(app_id, kind, chunk)], words))

    # Reading

    async def active(self, app_id: int, activity: Activity, start: float, end: float) -> BitMap:
        (devnos,) = await self._active(app_id, activity, [(start, end)])
        return devnos

    async def active_counts(self, app_id: int, activity: Activity, stretches: Sequence[Stretch]) -> list[int]:
        return [len(devnos) for devnos in await self._active(app_id, activity, stretches)]

    async def _active(self, app_id: int, activity: Activity, stretches: Sequence[Stretch]) -> list[BitMap]:
        fresh = self._attendance.find(app_id, activity)
        first, last = min(start for start, _ in stretches), max(end for _, end in stretches)
        found = [BitMap() for _ in stretches]
        for chunk in await self._read_chunks(app_id):
            for (width, start), value in (await self._read(app_id, activity, chunk, first, last)).items():
                bits = _decode(value)
                for devnos, stretch in zip(found, stretches, strict=True):
                    if touches(start, width, stretch):
                        devnos.update(bits)
        add_fresh(found, stretches, fresh)
        return found

    async def _read_chunks(self, app_id: int) -> list[int]:
        return [int(chunk) for chunk in await self._engine.run("SMEMBERS", of_app(app_id, "seen"))]

    async def _read(self, app_id: int, kind: str, chunk: int, first: float, last: float) -> Values:
        words = await self._engine.call(_find, [_key(app_id, kind, chunk)], (repr(first), repr(last)))
        return {_field(field): value for field, value in zip(words[::2], words[1::2], strict=True)}

    # Upkeep

    async def expire(self, now: float, budget: int) -> int:
        """Fold hours into days and drop what is over, app by app: once an hour, by one process."""
        if self._after is None and not await self._begin_pass(now):
            return 0
        gone = 0
        while gone < budget:
            apps = await self._apps.list_apps(self._after or 0, PASS_APPS)
            if not apps:
                self._after = None
                return gone
            gone += sum(await asyncio.gather(*[self._expire_app(app.app_id, now) for app in apps]))
            self._after = apps[-1].app_id
        return gone

    async def _begin_pass(self, now: float) -> bool:
        hour = int(now // PASS_EVERY)
        if hour == self._passed:
            return False
        self._passed = hour
        mine = await self._engine.run("SET", f"{PASS}{hour}", 1, "NX", "EX", int(2 * PASS_EVERY))
        self._after = 0 if mine else None
        return bool(mine)

    async def _expire_app(self, app_id: int, now: float) -> int:
        old = max(self._calendar.day(now, -DAYS_OF_HOURS), now - self._lifetime - HOUR)
        gone = 0
        for chunk in await self._read_chunks(app_id):
            for kind in Activity:
                values = await self._read(app_id, kind, chunk, LONG_AGO, old)
                gone += await self._fold_days(app_id, kind, chunk, values, old)
                gone += await self._drop(app_id, kind, chunk, now - self._lifetime)
        return gone

    async def _fold_days(self, app_id: int, kind: str, chunk: int, values: Values, before: float) -> int:
        days: dict[Field, Values] = {}
        for (width, start), value in values.items():
            if width == HOUR and start < before:
                day = self._calendar.day(start)
                field = self._calendar.day(start, 1) - day, day
                days.setdefault(field, {})[width, start] = value
        done = [await self._unite(app_id, kind, chunk, day, hours) for day, hours in days.items()]
        return sum(len(hours) for hours, one in zip(days.values(), done, strict=True) if one)

    async def _drop(self, app_id: int, kind: str, chunk: int, over: float) -> int:
        """Hours of 60 minutes, days as if each had the longest."""
        values = await self._read(app_id, kind, chunk, LONG_AGO, over)
        fields = [
            f"{width}:{start}"
            for width, start in values
            if start < over - (HOUR if width == HOUR else LONGEST_DAY)
        ]
        return int(await self._engine.run("HDEL", _key(app_id, kind, chunk), *fields)) if fields else 0

    async def purge(self, app_id: int, partitions: range, budget: int) -> int:
        """Of a deleted app; `partitions` do not matter, the chunks are listed."""
        self._attendance.drop(app_id)
        self._routed.pop(app_id, None)
        self._chunks = {place for place in self._chunks if place[0] != app_id}
        gone = 0
        for chunk in await self._read_chunks(app_id):
            gone += await self._engine.run("UNLINK", *[_key(app_id, kind, chunk) for kind in Activity])
        return gone + int(await self._engine.run("UNLINK", of_app(app_id, "seen")))


def _key(app_id: int, kind: str, chunk: int) -> str:
    """In the slot of the chunk's first partition."""
    return of_partition(app_id, chunk << CHUNK_BITS >> PARTITION_BITS, f"seen:{kind}")


def _field(name: str | bytes) -> Field:
    width, start = (name if isinstance(name, str) else name.decode()).split(":")
    return int(width), int(start)


def _entry(bits: BitMap) -> bytes:
    packed = encode_bits(bits)
    return _SIZE.pack(len(packed)) + packed


def _decode(value: bytes) -> BitMap:
    bits, at = BitMap(), 0
    while at < len(value):
        (size,) = _SIZE.unpack_from(value, at)
        at += _SIZE.size
        bits |= decode_bits(value[at : at + size])
        at += size
    return bits


def _chunks(bits: BitMap) -> Iterator[tuple[int, BitMap]]:
    while bits:
        chunk = bits.min() >> CHUNK_BITS
        part = bits & BitMap(range(chunk << CHUNK_BITS, (chunk + 1) << CHUNK_BITS))
        yield chunk, part
        bits = bits - part
