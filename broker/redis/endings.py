"""When messages are over: what nobody got by then expires, its body and its inbox entries go.

Ids stand in *buckets* of ten minutes, a list in the app's slot: nine bytes a message. A message whose end somebody
wants to be told of has a place of its own, to the moment. All buckets and places are in one sorted set, by the time
at which they are due. A bucket is noted there before its ids are, and lapses by itself a day later: what is lost with
one is the room of some bodies, until their reports go.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from broker.redis.engine import Engine
from broker.redis.keys import of_app
from broker.redis.scripts import load
from broker.settlements import FLEETING

if TYPE_CHECKING:
    from broker.redis.rows import Row

BUCKET: Final = 600  # seconds
LEASE: Final = 60.0  # seconds in which whoever took a place should be done with it
KNOWN_BUCKETS: Final = 10_000  # of which this process knows that they are noted
AT_ONCE: Final = 4_000  # arguments of one script: Lua unpacks no more than 8,000
SLACK: Final = 86_400.0  # seconds that a bucket outlives its time
KEY: Final = "{endings}:due"

_claim: Final = load("claim_endings")
_bucket: Final = load("bucket")
_empty: Final = load("empty_bucket")


class Place(NamedTuple):
    """Where ids are that are due: a bucket of an app, or one message."""

    app_id: int
    due: int  # a bucket's name
    msg_id: int = 0

    @property
    def member(self) -> str:
        return f"{self.app_id}:{self.due}/{self.msg_id}"

    @property
    def key(self) -> str:
        return of_app(self.app_id, f"over:{self.due}")


def read_place(member: bytes) -> Place:
    app_id, _, rest = member.decode().partition(":")
    due, _, msg_id = rest.partition("/")
    return Place(int(app_id), int(due), int(msg_id))


def due_at(row: Row) -> float:
    """A push without time to live may still be acknowledged for a moment."""
    return row.expires_at if row.expires_at > row.created_at else row.expires_at + FLEETING


class Endings:
    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._noted: OrderedDict[Place, None] = OrderedDict()

    async def note(self, entries: Sequence[tuple[int, Row]]) -> None:
        """These will end. Those of which nothing will be left to remove or to tell are passed over."""
        exact: list[tuple[Place, float]] = []
        buckets: dict[Place, list[int]] = {}
        for msg_id, row in entries:
            if row.callback is not None and "expired" in row.callback.events:
                exact.append((Place(row.app_id, math.ceil(due_at(row)), msg_id), due_at(row)))
            elif row.kept:
                bucket = math.ceil(due_at(row) / BUCKET) * BUCKET
                buckets.setdefault(Place(row.app_id, bucket), []).append(msg_id)
        fresh = [(place, float(place.due)) for place in buckets if place not in self._noted]
        if exact or fresh:
            words = [word for place, due in (*exact, *fresh) for word in (due, place.member)]
            await self._engine.run("ZADD", KEY, *words)
        for place, _ in fresh:
            self._noted[place] = None
        while len(self._noted) > KNOWN_BUCKETS:
            self._noted.popitem(last=False)
        await asyncio.gather(
            *[
                self._put(place, ids[start : start + AT_ONCE])
                for place, ids in buckets.items()
                for start in range(0, len(ids), AT_ONCE)
            ]
        )

    def _put(self, place: Place, ids: Sequence[int]) -> asyncio.Future[object]:
        lifetime = max(0.0, place.due - self._clock()) + SLACK
        return self._engine.call(_bucket, (place.key,), (int(lifetime * 1000), *ids))

    async def claim(self, now: float, limit: int) -> list[Place]:
        """Places that are due, which nobody else gets for a while."""
        members: list[bytes] = await self._engine.call(_claim, (KEY,), (now, now + LEASE, limit))
        return [read_place(member) for member in members]

    async def of_app(self, app_id: int) -> list[Place]:
        """All places of an app. Reads the whole set, in slices: for apps that were deleted."""
        cursor, found = b"0", list[bytes]()
        while True:
            cursor, page = await self._engine.run("ZSCAN", KEY, cursor, "MATCH", f"{app_id}:*", "COUNT", 1000)
            found += page[::2]
            if int(cursor) == 0:
                return [read_place(member) for member in dict.fromkeys(found)]

    async def ids(self, place: Place, limit: int) -> list[int]:
        """The first of them."""
        if place.msg_id:
            return [place.msg_id]
        return [int(i) for i in await self._engine.run("LRANGE", place.key, 0, limit - 1)]

    async def done(self, place: Place, ids: Sequence[int], now: float) -> None:
        """These, the first of it, are dealt with. While ids are left the place is due again at once."""
        self._noted.pop(place, None)
        first = ids[0] if ids else ""
        if place.msg_id or not await self._engine.call(_empty, (place.key,), (len(ids), first)):
            await self._engine.run("ZREM", KEY, place.member)
        else:
            await self._engine.run("ZADD", KEY, now, place.member)

    async def later(self, place: Place, due: float) -> None:
        await self._engine.run("ZADD", KEY, due, place.member)
