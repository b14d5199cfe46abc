"""What publishers are to be told: events in the app's slot, and the list of the apps that have some that are due.

An event is entered before what it tells of is recorded, in another slot: a crash in between tells it twice. Who is
due is asked over all apps; the list of apps follows the rules of `records.py`: an app is *touched* before an event
gets a time, and whoever finds the list too early *closes* the touches it saw before it puts the app later.

An event's id has its app in the low bits: whoever has the id knows the slot.
"""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

import msgspec
from msgspec import Struct
from pyroaring import BitMap

from broker.bitmaps import decode_bits, encode_bits
from broker.model import Callback, CallbackEvent
from broker.redis.engine import Engine
from broker.redis.keys import of_app, tag_of_app
from broker.redis.rows import Row, Rows
from broker.redis.scripts import load
from broker.redis.wire import Argument
from broker.settlements import event_parts
from broker.store import StoreUnavailable

APP_BITS: Final = 22  # of an event's id: 4 million apps; the rest is a number that grows over all of them
APPS: Final = 64  # looked at together
SLICE: Final = 1_000  # events entered or changed by one call
TRIES: Final = (
    20  # times that events are prepared: each fails only if a reader closes the list at the same moment
)
LATE: Final = b"late"
HEAD: Final = struct.Struct(">IdH")  # attempts, when it happened, bytes of the last error
MAX_ERROR: Final = 1_000  # bytes of it that are kept
EXPIRE_EVERY: Final = 60.0  # seconds
KINDS: Final = "told"

_apps: Final = load("due_apps")
_change: Final = load("told_change")
_claim: Final = load("told_claim")
_parked: Final = load("told_parked")
_expire: Final = load("told_expire")

Note: TypeAlias = tuple[int, int, str, BitMap | Sequence[int], float]
"""(app_id, msg_id of the row, event, devnos, when)"""


class _Event(Struct, frozen=True, array_like=True):
    """As it is kept, after HEAD and the error."""

    msg_id: int
    event: str
    bits: bytes
    callback: Callback


_events: Final = msgspec.msgpack.Decoder(_Event)


class Telling:
    """Enters events."""

    def __init__(self, engine: Engine, rows: Rows) -> None:
        self._rows = rows
        self._list = DueApps(engine)

    async def note(self, notes: Iterable[Note]) -> None:
        """What happens to messages. Those without a callback, or not for these devices, are passed over."""
        noted: dict[tuple[int, int, str], tuple[BitMap, float]] = {}
        for app_id, msg_id, event, devnos, at in notes:
            noted.setdefault((app_id, msg_id, event), (BitMap(), at))[0].update(devnos)
        ids: dict[int, set[int]] = {}
        for app_id, msg_id, _ in noted:
            ids.setdefault(app_id, set()).add(msg_id)
        found = await asyncio.gather(*[self._rows.read(app_id, some) for app_id, some in ids.items()])
        rows = dict(zip(ids, found, strict=True))
        await asyncio.gather(*[self._enter(app_id, _told(noted, app_id, rows[app_id])) for app_id in ids])

    async def _enter(self, app_id: int, told: Sequence[tuple[_Event, float]]) -> None:
        for start in range(0, len(told), SLICE):
            arguments: list[Argument] = []
            for event, at in told[start : start + SLICE]:
                arguments += (at, HEAD.pack(0, at, 0) + msgspec.msgpack.encode(event))
            await self._list.change(app_id, min(at for _, at in told), "add", *arguments)


def _told(
    noted: dict[tuple[int, int, str], tuple[BitMap, float]], app_id: int, rows: dict[int, Row]
) -> list[tuple[_Event, float]]:
    """Of one app: parts of one push tell together, under its id."""
    whole: dict[tuple[int, str], tuple[BitMap, float, Callback]] = {}
    for (owner, msg_id, event), (devnos, at) in noted.items():
        row = rows.get(msg_id) if owner == app_id else None
        if row is None or row.callback is None or event not in row.callback.events:
            continue
        meant = devnos & (decode_bits(row.targets) | decode_bits(row.suppressed))
        if meant:
            key = (row.part_of or msg_id, event)
            whole.setdefault(key, (meant, at, row.callback))[0].update(meant)
    return [
        (_Event(msg_id, event, encode_bits(part), callback), at)
        for (msg_id, event), (devnos, at, callback) in whole.items()
        for part in event_parts(devnos)
    ]


class DueApps:
    """The apps that have events, each with a time that is not above its earliest; infinity: parked ones only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def _call(self, *arguments: Argument) -> asyncio.Future[Any]:
        keys = [f"{{due:{KINDS}}}:{what}" for what in ("apps", "touches", "count")]
        return self._engine.call(_apps, keys, arguments)

    async def listed(self, now: float, limit: int) -> list[tuple[int, int]]:
        """app_id and touch of those that may have something, earliest first."""
        answer: list[bytes] = await self._call("list", now, limit)
        return [(int(app), int(touch)) for app, touch in zip(answer[::3], answer[2::3], strict=True)]

    async def change(self, app_id: int, due: float, verb: str, *arguments: Argument) -> int:
        """Change events of an app, of which the earliest is due then; how many."""
        for _ in range(TRIES):
            touch = await self._call("touch", app_id, due)
            answer = await self._engine.call(
                _change, (of_app(app_id, "told"),), (tag_of_app(app_id), touch, verb, *arguments)
            )
            if answer != LATE:
                return int(answer)
        raise StoreUnavailable("callbacks are claimed and changed too often at the same time")

    async def put_later(self, app_id: int, touch: int) -> None:
        """The app has nothing due now: say when it has, unless it was touched since."""
        _, earliest, parked, *_ = await claim(self._engine, app_id, -math.inf, 0, 0, close=touch)
        due: Argument = earliest.decode() or (math.inf if parked else "")
        await self._call("raise", app_id, touch, due)


async def claim(
    engine: Engine, app_id: int, now: float, until: float, limit: int, close: int | str = ""
) -> list[Any]:
    """How many more are due, the earliest time or b"", how many are parked; then seq, packed event, … of those
    claimed now."""
    answer: list[Any] = await engine.call(
        _claim, (of_app(app_id, "told"),), (tag_of_app(app_id), now, until, limit, close)
    )
    return answer


class RedisCallbacks:
    """`store.callbacks`. Events that nobody took in `lifetime` seconds are forgotten."""

    def __init__(self, engine: Engine, lifetime: float) -> None:
        self._engine = engine
        self._lifetime = lifetime
        self._list = DueApps(engine)
        self._expired_at = -math.inf

    async def claim(self, now: float, lease: float, limit: int) -> list[CallbackEvent]:
        """See Callbacks. A script in the app's slot claims: two brokers never have the same event."""
        found: dict[int, CallbackEvent] = {}
        before = -1
        while before < len(found) < limit:
            left = limit - len(found)
            apps = await self._list.listed(now, min(left, APPS))
            if not apps:
                break
            before = len(found) if lease <= 0 else -1  # without a lease they would come again and again
            share = left // len(apps)
            answers = await asyncio.gather(
                *[claim(self._engine, app_id, now, now + lease, share) for app_id, _ in apps]
            )
            for (app_id, _), answer in zip(apps, answers, strict=True):
                found |= {event.event_id: event for event in _read_events(app_id, answer[3:])}
            await asyncio.gather(
                *[
                    self._list.put_later(*app)
                    for app, answer in zip(apps, answers, strict=True)
                    if not answer[0]
                ]
            )
        return [found[event_id] for event_id in sorted(found)]

    async def done(self, event_ids: Sequence[int]) -> None:
        await asyncio.gather(
            *[
                self._engine.call(
                    _change, (of_app(app_id, "told"),), (tag_of_app(app_id), "", "done", *numbers)
                )
                for app_id, numbers in _by_app(event_ids)
            ]
        )

    async def failed(self, event_ids: Sequence[int], due: float | None, error: str) -> None:
        text = error.encode()[:MAX_ERROR]
        time: Argument = "" if due is None else due
        await self._change(event_ids, math.inf if due is None else due, "failed", time, text)

    async def postpone(self, event_ids: Sequence[int], due: float) -> None:
        await self._change(event_ids, due, "postpone", due)

    async def _change(self, event_ids: Sequence[int], due: float, verb: str, *arguments: Argument) -> None:
        await asyncio.gather(
            *[
                self._list.change(app_id, due, verb, *arguments, *numbers)
                for app_id, numbers in _by_app(event_ids)
            ]
        )

    async def retry(self, app_id: int, now: float) -> int:
        return await self._slices(app_id, now, "retry", now)

    async def drop_parked(self, app_id: int) -> int:
        return await self._slices(app_id, math.inf, "drop")

    async def _slices(self, app_id: int, due: float, verb: str, *arguments: Argument) -> int:
        changed = 0
        while count := await self._list.change(app_id, due, verb, SLICE, *arguments):
            changed += count
        return changed

    async def list_parked(self, app_id: int, after: int, limit: int) -> list[CallbackEvent]:
        least = max(0, (after - app_id) // (1 << APP_BITS) + 1)
        keys = (of_app(app_id, "told"),)
        return _read_events(app_id, await self._engine.call(_parked, keys, (least, limit)))

    async def counts(self, app_id: int) -> tuple[int, int]:
        if app_id:
            waiting, parked = await asyncio.gather(
                self._engine.run("ZCARD", of_app(app_id, "told:due")),
                self._engine.run("ZCARD", of_app(app_id, "told:parked")),
            )
            return waiting, parked
        apps = await self._list.listed(math.inf, -1)
        counted = await asyncio.gather(*[self.counts(app) for app, _ in apps])
        gone = [app for app, both in zip(apps, counted, strict=True) if both == (0, 0)]
        await asyncio.gather(*[self._list.put_later(*app) for app in gone])
        return sum(waiting for waiting, _ in counted), sum(parked for _, parked in counted)

    async def expire(self, now: float, budget: int) -> int:
        """Looks at every app that has events, but not often."""
        if now < self._expired_at + EXPIRE_EVERY:
            return 0
        apps = await self._list.listed(math.inf, -1)
        arguments = (now - self._lifetime, max(1, budget // max(1, len(apps))))
        gone = await asyncio.gather(
            *[self._engine.call(_expire, (of_app(app_id, "told"),), arguments) for app_id, _ in apps]
        )
        if not sum(gone):
            self._expired_at = now
        return sum(gone)

    async def purge(self, app_id: int, partitions: range, budget: int) -> int:
        """Of a deleted app."""
        del partitions, budget
        names = ("told", "told:due", "told:parked", "told:seq", "told:fence")
        removed: int = await self._engine.run("UNLINK", *[of_app(app_id, name) for name in names])
        return removed


def _by_app(event_ids: Iterable[int]) -> Iterable[tuple[int, list[str]]]:
    """app_id and the numbers of its events, SLICE at a time."""
    apps: dict[int, list[str]] = {}
    for event_id in event_ids:
        apps.setdefault(event_id % (1 << APP_BITS), []).append(f"{event_id >> APP_BITS:013}")
    for app_id, numbers in apps.items():
        for start in range(0, len(numbers), SLICE):
            yield app_id, numbers[start : start + SLICE]


def _read_events(app_id: int, answer: Sequence[Any]) -> list[CallbackEvent]:
    """seq, packed event, …"""
    return [
        _read_event(app_id, int(number), packed)
        for number, packed in zip(answer[::2], answer[1::2], strict=True)
    ]


def _read_event(app_id: int, number: int, packed: bytes) -> CallbackEvent:
    attempts, at, length = HEAD.unpack_from(packed)
    start = HEAD.size + length
    event = _events.decode(memoryview(packed)[start:])
    return CallbackEvent(
        number << APP_BITS | app_id,
        app_id,
        event.msg_id,
        event.event,
        at,
        decode_bits(event.bits),
        event.callback,
        attempts,
        packed[HEAD.size : start].decode(errors="replace"),
    )
