"""Taking pushes back: by their publisher (`recall`), or because another push has their place (`take_back`).

The spreader calls `take_back`, in order of ids, before it writes the row: everything older is in its inboxes by then.
A recall waits for that. Whoever is about to let a part go has to look again (S12); parts that were let go before, but
are spread later, find their targets recalled in the whole (`Rows.write`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Final, Protocol

from pyroaring import BitMap

from broker.bitmaps import decode_bits
from broker.later.paces import HELD, SLOW
from broker.model import OwedRequest, Withdrawn
from broker.redis.engine import Engine
from broker.redis.fates import entry
from broker.redis.keys import of_app
from broker.redis.rows import Message, Row, Rows
from broker.redis.scripts import load
from broker.redis.settling import Settling
from broker.settlements import IN_FLIGHT, released

COLLAPSED: Final = (
    2_000  # pushes of one collapse key that are remembered; waiting ones a broadcast takes the place of
)
INBOX: Final = 0xFFFF  # pushes of one device that are looked at

_stop_parts: Final = load("stop_parts")
_collapse: Final = load("collapse")


class Inboxes(Protocol):
    """What is needed of the partitions."""

    async def take_out(
        self, app_id: int, messages: Mapping[int, Sequence[int]], node: int | None = None
    ) -> BitMap: ...

    async def owed_ids(self, requests: Sequence[OwedRequest]) -> list[list[int]]: ...


def until_now(
    engine: Engine, passed: Callable[[int, int], Awaitable[None]]
) -> Callable[[int], Awaitable[None]]:
    """Returns when everything that was committed to an app before the call is spread. `passed`: up to a msg_id."""

    async def spread(app_id: int) -> None:
        last: bytes | None = await engine.run("HGET", of_app(app_id, "head"), "id")
        if last is not None:
            await passed(app_id, int(last))

    return spread


class Withdrawing:
    """`spread`: see `until_now`."""

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float],
        rows: Rows,
        inboxes: Inboxes,
        settling: Settling,
        spread: Callable[[int], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._rows = rows
        self._inboxes = inboxes
        self._settling = settling
        self._spread = spread
        # What the spreader calls is here.
        self.evicted, self.suppressed = settling.evicted, settling.suppressed

    # By the publisher

    async def recall(self, app_id: int, msg_ids: Sequence[int], now: float) -> list[Withdrawn]:
        """See Store. Its publisher wanted it so: that is noted."""
        await self._spread(app_id)
        found = await self._rows.read(app_id, dict.fromkeys(msg_ids))
        if paced := [msg_id for msg_id, row in found.items() if row.paced]:
            await asyncio.gather(*[self._stop_parts(app_id, msg_id) for msg_id in paced])
            await self._spread(app_id)  # parts that were on their way
        withdrawn = entry("withdrawn", now, ())
        return await self._take(app_id, list(found), now, None, 0, withdrawn)

    async def _take(
        self, app_id: int, wholes: Sequence[int], now: float, only: BitMap | None, taker: int, about: bytes
    ) -> list[Withdrawn]:
        """`about`: recorded of the wholes, in any case."""
        await self._settling.record({(app_id, whole): [about] for whole in wholes}, [])
        parts = [part for whole in wholes for part in await self._parts(app_id, whole)]
        every = list(dict.fromkeys([*wholes, *parts]))
        answers = await asyncio.gather(
            *[self._withdraw(app_id, msg_id, now, only, taker) for msg_id in every]
        )
        return [answer for answer in answers if answer is not None]

    async def _parts(self, app_id: int, msg_id: int) -> list[int]:
        row = (await self._rows.read(app_id, [msg_id])).get(msg_id)
        if row is None or not row.paced:
            return []
        return [part.msg_id for part in await self._rows.parts(app_id, msg_id)]

    async def _stop_parts(self, app_id: int, msg_id: int) -> None:
        """Whoever is about to let the next part go has seen other targets: he is to look again (S12)."""
        keys = [of_app(app_id, f"rec:{kind}") for kind in (SLOW, HELD)]
        await self._engine.call(_stop_parts, keys, (msg_id,))

    async def _withdraw(
        self, app_id: int, msg_id: int, now: float, only: BitMap | None, taker: int
    ) -> Withdrawn | None:
        """What waits of one message (`only`: for these devices) is recalled. None: there is no such message. Asked
        again by the same taker it answers the same."""
        message = (await self._rows.look(app_id, [msg_id])).get(msg_id)
        if message is None:
            return None
        row, states = message.row, message.fate.states
        reached, waiting = states.delivered | states.sent, states.waiting
        over = now >= row.expires_at
        if row.paced:
            waiting -= released(part.stored for part in await self._rows.parts(app_id, msg_id))
        if only is not None:
            waiting &= only
        if over and now >= row.expires_at + IN_FLIGHT:
            waiting = BitMap()
        elif not over:
            await self._take_back(message, now, waiting, only, taker)
        taken = message.fate.taken.get(taker) if taker else None
        return Withdrawn(app_id, msg_id, waiting if taken is None else waiting | taken, reached)

    async def _take_back(
        self, message: Message, now: float, waiting: BitMap, only: BitMap | None, taker: int
    ) -> None:
        row, states, msg_id = message.row, message.fate.states, message.msg_id
        finished = bool(waiting) and waiting == states.waiting
        if waiting:
            await self._settling.record(
                {
                    (row.app_id, msg_id): [
                        entry("recalled", now, waiting, more=taker, few=not row.broadcast),
                    ]
                },
                [(row.app_id, msg_id, "recalled", waiting, now)],
            )
        # Also what was recalled before: whoever did it may have come no further.
        gone = waiting | (states.recalled if only is None else states.recalled & only)
        if gone and row.lasting and not row.broadcast:
            await self._inboxes.take_out(row.app_id, dict.fromkeys(gone, (msg_id,)))
        if finished:
            await self._settling.fold(row.app_id, msg_id)

    # By another push

    async def take_back(self, app_id: int, msg_id: int, row: Row) -> list[Withdrawn]:
        """What waits no longer because of this push, which is about to be spread."""
        if not row.replaces and not row.collapse:
            return []
        now, targets, gone = self._clock(), decode_bits(row.targets), list[Withdrawn]()
        if row.replaces and not row.paced:  # its parts do
            gone += await self._replace(app_id, msg_id, row, targets, now)
        if row.collapse:
            gone += await self._collapse(app_id, msg_id, row, targets, now)
        return gone

    async def _replace(
        self, app_id: int, msg_id: int, row: Row, targets: BitMap, now: float
    ) -> list[Withdrawn]:
        """For these devices it has the other's place."""
        replaced = (await self._rows.read(app_id, [row.replaces])).get(row.replaces)
        if replaced is None:
            return []
        if replaced.paced:
            await self._stop_parts(app_id, row.replaces)
        about = entry("replaced", now, (), more=row.part_of or msg_id)
        return await self._take(app_id, [row.replaces], now, targets, msg_id, about)

    async def _collapse(
        self, app_id: int, msg_id: int, row: Row, targets: BitMap, now: float
    ) -> list[Withdrawn]:
        """What is older and has the key waits no longer for these devices. A part is as old as its whole, however
        late it is let go."""
        wide, near = await self._collapsing(app_id, msg_id, row, now)
        older = {
            found: both
            for found, one in (await self._with_key(app_id, row, wide, msg_id)).items()
            if (both := decode_bits(one.targets) & targets)
        }
        if near:
            for found, devnos in (await self._waiting(app_id, msg_id, row, targets, near)).items():
                older.setdefault(found, devnos)
        paced = [found for found, one in (await self._rows.read(app_id, older)).items() if one.paced]
        await asyncio.gather(*[self._stop_parts(app_id, found) for found in paced])
        answers = await asyncio.gather(
            *[self._withdraw(app_id, found, now, only, msg_id) for found, only in sorted(older.items())]
        )
        return [answer for answer in answers if answer is not None and answer.devnos]

    async def _collapsing(
        self, app_id: int, msg_id: int, row: Row, now: float
    ) -> tuple[list[int], list[int]]:
        """Pushes with its key: broadcasts and wholes; the newest of the others, newest first. It is one of them from
        now on."""
        kind = "wide" if row.broadcast or row.paced else "near"
        keys = [of_app(app_id, f"{name}:{row.collapse}") for name in ("wide", "near")]
        lifetime = int(max(0.0, row.expires_at - now) * 1000) + 60_000
        arguments = (kind, msg_id, row.expires_at, now, COLLAPSED, lifetime)
        wide, near = await self._engine.call(_collapse, keys, arguments)
        return [int(i) for i in wide], [int(i) for i in near]

    async def _with_key(self, app_id: int, row: Row, ids: Iterable[int], msg_id: int) -> dict[int, Row]:
        age = row.part_of or msg_id
        found = await self._rows.read(app_id, ids)
        return {
            i: one
            for i, one in found.items()
            if i != msg_id
            and one.collapse == row.collapse
            and (i if one.paced else one.part_of or i) < age
            and (one.body or one.paced)
        }

    async def _waiting(
        self, app_id: int, msg_id: int, row: Row, targets: BitMap, near: Sequence[int]
    ) -> dict[int, BitMap]:
        """In inboxes: msg_id -> for whom. For more than COLLAPSED devices of the newest pushes only, up to so many
        deliveries."""
        older: dict[int, BitMap] = {}
        if len(targets) <= COLLAPSED:
            devnos = list(targets)
            lists = await self._inboxes.owed_ids([OwedRequest(app_id, devno, 0, INBOX) for devno in devnos])
            known = await self._with_key(app_id, row, {i for ids in lists for i in ids}, msg_id)
            pairs = [(i, devno) for devno, ids in zip(devnos, lists, strict=True) for i in ids if i in known]
        else:
            known = await self._with_key(app_id, row, near, msg_id)
            found = ((i, devno) for i in known for devno in decode_bits(known[i].targets) & targets)
            pairs = list(islice(found, COLLAPSED))
        for i, devno in pairs:
            older.setdefault(i, BitMap()).add(devno)
        return older
