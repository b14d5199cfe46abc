"""Recording what becomes of messages: settlements, evictions, receipts.

One call a message, in its slot: what it was told is appended there, and only then the device's inbox entry goes. A
crash in between costs a repeat. An entry is never taken out where another node has the device meanwhile (G5).

A message whose publisher wants to be told of it refuses to be recorded until its callback events are entered: so a
crash tells an event twice, never not at all. Nobody else pays for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, Protocol

from pyroaring import BitMap

from broker.bitmaps import decode_bits
from broker.model import Receipt, Settled
from broker.redis.callbacks import Note, Telling
from broker.redis.engine import Engine
from broker.redis.fates import entry
from broker.redis.keys import of_app, of_message
from broker.redis.node_names import NodeNames
from broker.redis.rows import Message, Row, Rows
from broker.redis.scripts import load

FOLD_AFTER: Final = 64  # entries of one message
FOLD_SHARE: Final = (
    64  # and one for so many bytes of its sum: what folding writes stays a share of what came in
)
AT_ONCE: Final = 1_000  # entries of one call
SETTLED_AT_ONCE: Final = (
    5_000  # of one settlement: what gathered while Redis was away must not be refused for its size
)

_record: Final = load("record")

Key = tuple[int, int]  # app, msg_id


class Inboxes(Protocol):
    """What is needed of the partitions."""

    async def take_out(
        self, app_id: int, messages: Mapping[int, Sequence[int]], node: int | None = None
    ) -> BitMap: ...


class Lives(Protocol):
    """What is needed of the table of nodes."""

    @property
    def number(self) -> int: ...

    @property
    def name(self) -> str: ...

    def number_of(self, name: str) -> int: ...


_Shared = tuple[int, int, bool, str, str, int, int]
"""What is one entry: app, msg_id, broadcast, state, node, seconds in which it was settled and sent."""


class Settling:
    """`spread`: see `withdrawing.until_now`."""

    def __init__(
        self,
        engine: Engine,
        rows: Rows,
        inboxes: Inboxes,
        lives: Lives,
        names: NodeNames,
        telling: Telling,
        spread: Callable[[int], Awaitable[None]],
    ) -> None:
        self._spread = spread
        self._engine = engine
        self._rows = rows
        self._inboxes = inboxes
        self._lives = lives
        self._names = names
        self._telling = telling

    # Settlements

    async def settle(self, settled: Sequence[Settled]) -> None:
        """See Store. Deliveries of one message in one second at one node are one entry."""
        for start in range(0, len(settled), SETTLED_AT_ONCE):
            await self._settle(settled[start : start + SETTLED_AT_ONCE])

    async def _settle(self, settled: Sequence[Settled]) -> None:
        names = await self._names.numbers({item.node for item in settled})
        entries: dict[Key, list[bytes]] = {}
        for key, (at, sent_at, devnos) in _share(settled).items():
            app_id, msg_id, broadcast, state, node, *_ = key
            more = sent_at if state == "delivered" else 0.0
            packed = entry(state, at, devnos, more=more, node=names[node], few=not broadcast)
            entries.setdefault((app_id, msg_id), []).append(packed)
        known = await self.record(entries, _notes(settled))
        if missing := {key: packed for key, packed in entries.items() if key not in known}:
            # Accepted, and settled before it was spread: whoever did that did not wait for its doorbell.
            await asyncio.gather(*[self._spread(app_id) for app_id in {app_id for app_id, _ in missing}])
            known |= await self.record(missing, _notes(settled))
        await self._take_out([item for item in settled if (item.app_id, item.msg_id) in known])

    async def _take_out(self, settled: Iterable[Settled]) -> None:
        by_node: dict[tuple[int, int | None], dict[int, list[int]]] = {}
        for item in settled:
            if item.broadcast:
                continue
            out = by_node.setdefault((item.app_id, self._life(item.node)), {})
            for devnos in (item.delivered, item.evicted):
                for devno in devnos:
                    out.setdefault(devno, []).append(item.msg_id)
        await asyncio.gather(
            *[self._inboxes.take_out(app_id, out, node) for (app_id, node), out in by_node.items() if out]
        )

    def _life(self, node: str) -> int | None:
        """Its number in the table of nodes; 0 if it is not there. None: no node asks, so none has to be compared."""
        if not node:
            return None
        return self._lives.number if node == self._lives.name else self._lives.number_of(node)

    async def evicted(self, app_id: int, dropped: Iterable[tuple[int, int]], at: float) -> None:
        """These (msg_id, devno) were taken out of their inboxes by the newest-N rule."""
        by_message: dict[int, list[int]] = {}
        for msg_id, devno in dropped:
            by_message.setdefault(msg_id, []).append(devno)
        await self.record(
            {(app_id, msg_id): [entry("evicted", at, devnos)] for msg_id, devnos in by_message.items()},
            [(app_id, msg_id, "evicted", devnos, at) for msg_id, devnos in by_message.items()],
        )

    async def suppressed(self, app_id: int, msg_id: int, row: Row) -> None:
        """A rule of the app holds it back from some: its publisher is told."""
        if row.suppressed and row.callback is not None:
            note: Note = (app_id, msg_id, "suppressed", decode_bits(row.suppressed), row.created_at)
            await self._telling.note([note])

    # Recording

    async def record(self, entries: Mapping[Key, Sequence[bytes]], notes: Iterable[Note]) -> set[Key]:
        """Those of the messages that exist. `notes` of those that have a callback are entered before."""
        counts = await asyncio.gather(*[self._append(key, packed) for key, packed in entries.items()])
        answers = dict(zip(entries, counts, strict=True))
        if told := [key for key, answer in answers.items() if answer == [-1]]:
            asked = set(told)
            await self._telling.note([note for note in notes if note[:2] in asked])
            again = await asyncio.gather(*[self._append(key, entries[key], told=True) for key in told])
            answers |= zip(told, again, strict=True)
        long = [key for key, answer in answers.items() if _is_long(answer, len(entries[key]))]
        await asyncio.gather(*[self.fold(*key) for key in long])
        return {key for key, answer in answers.items() if answer}

    def _append(
        self, key: Key, entries: Sequence[bytes], *, told: bool = False
    ) -> Awaitable[list[int] | None]:
        """None: there is no such message."""
        if len(entries) <= AT_ONCE:
            return self._call(key, entries, told=told)
        return self._append_slices(key, entries, told=told)

    async def _append_slices(self, key: Key, entries: Sequence[bytes], *, told: bool) -> list[int] | None:
        """The answer to the last."""
        answer: list[int] | None = None
        for start in range(0, len(entries), AT_ONCE):
            answer = await self._call(key, entries[start : start + AT_ONCE], told=told)
        return answer

    def _call(self, key: Key, entries: Sequence[bytes], *, told: bool) -> Awaitable[list[int] | None]:
        return self._engine.call(_record, (of_message(*key, "row"),), (int(told), *entries))

    async def fold(self, app_id: int, msg_id: int) -> None:
        """Merge what was recorded of it."""
        message = (await self._rows.look(app_id, [msg_id])).get(msg_id)
        if message is not None:
            await self.fold_message(message, finished=not message.fate.states.waiting)

    async def fold_message(self, message: Message, *, finished: bool) -> None:
        """`finished`: nobody is owed it any more."""
        app_id = message.row.app_id
        await self._rows.fold(message, finished=finished)
        if finished and message.row.broadcast:
            await self._engine.run("ZREM", of_app(app_id, "live"), message.msg_id)

    # Receipts

    async def record_receipts(self, receipts: Sequence[Receipt]) -> None:
        """See Store. The first receipt of an event counts."""
        together: dict[tuple[int, int, str, float], list[int]] = {}
        for receipt in receipts:
            key = (receipt.app_id, receipt.msg_id, receipt.event, receipt.at)
            together.setdefault(key, []).append(receipt.devno)
        entries: dict[Key, list[bytes]] = {}
        for (app_id, msg_id, event, at), devnos in together.items():
            entries.setdefault((app_id, msg_id), []).append(entry(event, at, devnos))
        keys = list(entries)
        answers = await asyncio.gather(*[self._append(key, entries[key]) for key in keys])
        long = [key for key, answer in zip(keys, answers, strict=True) if _is_long(answer, len(entries[key]))]
        told = {key for key, answer in zip(keys, answers, strict=True) if answer == [-1]}
        await asyncio.gather(
            *[self.fold(*key) for key in long],
            *[self._tell_receipts(key, [one for one in receipts if _key(one) == key]) for key in told],
        )

    async def _tell_receipts(self, key: Key, receipts: Sequence[Receipt]) -> None:
        """Of a message with a callback. Told are those that were not recorded yet."""
        app_id, msg_id = key
        message = (await self._rows.look(app_id, [msg_id])).get(msg_id)
        if message is None:
            return
        known = message.fate.receipts()
        fresh: list[Receipt] = []
        for receipt in receipts:
            bits = known.setdefault(receipt.event, BitMap())
            if receipt.devno not in bits:
                bits.add(receipt.devno)
                fresh.append(receipt)
        if fresh:
            notes: list[Note] = [(app_id, msg_id, one.event, (one.devno,), one.at) for one in fresh]
            await self.record({key: [entry(one.event, one.at, (one.devno,)) for one in fresh]}, notes)


def _notes(settled: Iterable[Settled]) -> Iterator[Note]:
    for item in settled:
        for event, devnos in (("delivered", item.delivered), ("evicted", item.evicted)):
            if devnos:
                yield item.app_id, item.msg_id, event, devnos, item.at


def _key(receipt: Receipt) -> Key:
    return receipt.app_id, receipt.msg_id


def _share(settled: Iterable[Settled]) -> dict[_Shared, tuple[float, float, list[int]]]:
    """The times are those of the first."""
    shared: dict[_Shared, tuple[float, float, list[int]]] = {}
    for item in settled:
        when = (item.node, int(item.at), int(item.sent_at))
        for state, devnos in (
            ("delivered", item.delivered),
            ("evicted", item.evicted),
            ("sent", item.sent),
        ):
            if devnos:
                key = (item.app_id, item.msg_id, item.broadcast, state, *when)
                shared.setdefault(key, (item.at, item.sent_at, []))[2].extend(devnos)
    return shared


def _is_long(answer: Sequence[int] | None, added: int) -> bool:
    """Whether these entries took the list over the next multiple of what is folded together: so one of all who add
    folds, and if that one dies the next does."""
    length, size = (0, 0) if answer is None or answer == [-1] else answer
    if not length:  # there is no list
        return False
    after = max(FOLD_AFTER, size // FOLD_SHARE)
    return length // after > (length - added) // after
