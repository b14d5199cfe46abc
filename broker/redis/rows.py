"""A message as it is kept: one row, written once. What becomes of it: `fates.py`, and who records it: `settling.py`.

A row stays as long as its report; the body, most of it, goes as soon as nobody is owed the message any more.
"""

from __future__ import annotations

import asyncio
import struct
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from pyroaring import BitMap

from broker.bitmaps import decode_bits, encode_bits
from broker.model import Callback, NewMessage, StoredMessage
from broker.redis.endings import Endings
from broker.redis.engine import Engine
from broker.redis.fates import Fate, entry, read_fate, read_settled, read_single_fate
from broker.redis.keys import of_message
from broker.redis.scripts import load
from broker.settlements import Stored

CACHE_BYTES: Final = 16 << 20  # of rows that were read lately
ROW_BYTES: Final = 500  # of one row in memory, beside body and bitmap
SLACK: Final = 60_000  # milliseconds that a row stays longer: clocks differ
OWN_KEYS: Final = ("row", "log", "sum", "parts")  # of a message

_write: Final = load("write")
_note_part: Final = load("note_part")
_record: Final = load("record")
_look: Final = load("look")
_live_row: Final = load("live_row")
_fold: Final = load("fold")
_cut: Final = load("cut")


class Row(Struct, frozen=True, gc=False, array_like=True, omit_defaults=True):
    """Also an entry of the app's log. The msg_id is in the name of its key, and before it in the log."""

    app_id: int
    body: bytes
    targets: int | bytes  # one devno, or a bitmap
    broadcast: bool
    created_at: float
    expires_at: float
    sendno: str = ""
    cid: str = ""
    high: bool = False
    collapse: str = ""
    replaces: int = 0
    suppressed: bytes | None = None
    paced: bool = False
    part_of: int = 0
    callback: Callback | None = None
    evicts: bool = True
    online: int = 0  # targets that were online when it was spread
    after: int = 0  # msg_id of the broadcast of the app before it

    @property
    def lasting(self) -> bool:
        """Somebody may fetch it."""
        return self.expires_at > self.created_at and not self.paced

    @property
    def kept(self) -> bool:
        """Its body is: somebody may fetch it, or is rung with its name only."""
        return self.lasting or (self.broadcast and not self.paced)


ROWS: Final = msgspec.msgpack.Decoder(Row)


def row_of(message: NewMessage) -> Row:
    """As it goes into the log."""
    targets, suppressed = message.targets, message.suppressed
    return Row(
        message.app_id,
        message.body,
        targets.min() if len(targets) == 1 else encode_bits(targets.copy()),
        message.broadcast,
        message.created_at,
        message.expires_at,
        message.sendno,
        message.cid or "",
        message.high,
        message.collapse,
        message.replaces,
        encode_bits(suppressed) if suppressed else None,
        message.paced,
        message.part_of,
        message.callback,
        message.evicts,
    )


def stored_message(msg_id: int, row: Row) -> StoredMessage:
    return StoredMessage(
        msg_id,
        row.app_id,
        row.body,
        row.created_at,
        row.expires_at,
        row.part_of,
        row.replaces,
        row.high,
        row.after,
    )


# At rest

HEAD: Final = struct.Struct(">BIHI")  # flags, bytes of meta and tail, devno
AFTER: Final = struct.Struct(">Q")
SINGLE: Final = 1  # for one device: what became of it stands in the row
LIVE: Final = 2  # somebody may be owed it
CALLBACK: Final = 4


def encode_row(row: Row) -> bytes:
    """Meta (what a report needs), then what goes once nobody is owed the message any more."""
    single = isinstance(row.targets, int) and not row.broadcast
    flags = SINGLE * single | LIVE * row.kept | CALLBACK * (row.callback is not None)
    meta = msgspec.msgpack.encode(
        replace(row, app_id=0, body=b"", cid="", after=0, targets=0 if single else row.targets)
    )
    live = AFTER.pack(row.after) + row.body if row.kept else b""
    return HEAD.pack(flags, len(meta), 0, int(row.targets) if single else 0) + meta + live


def decode_row(app_id: int, packed: bytes) -> tuple[Row, bytes]:
    """And the tail. A row that nobody is owed any more has no body."""
    flags, meta, tail, devno = HEAD.unpack_from(packed)
    start = HEAD.size + meta
    row = ROWS.decode(memoryview(packed)[HEAD.size : start])
    end = start + tail
    after, body = 0, b""
    if flags & LIVE:
        (after,), body = AFTER.unpack_from(packed, end), packed[end + AFTER.size :]
    targets = devno if flags & SINGLE else row.targets
    return replace(row, app_id=app_id, body=body, after=after, targets=targets), packed[start:end]


class Message(NamedTuple):
    """A row, and what became of it."""

    msg_id: int
    row: Row
    fate: Fate

    @property
    def stored(self) -> Stored:
        row, fate = self.row, self.fate
        return Stored(
            self.msg_id,
            fate.states,
            row.app_id,
            row.broadcast,
            row.created_at,
            row.expires_at,
            row.sendno,
            row.suppressed,
            row.online,
            row.paced,
            row.part_of,
            fate.withdrawn_at,
            fate.replaced_by,
        )


class _Cache:
    """Rows that were read lately, up to CACHE_BYTES. They never change, but that their bodies go."""

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[int, int], Row] = OrderedDict()
        self._size = 0

    def get(self, app_id: int, msg_id: int) -> Row | None:
        row = self._rows.get((app_id, msg_id))
        if row is not None:
            self._rows.move_to_end((app_id, msg_id))
        return row

    def put(self, msg_id: int, row: Row) -> None:
        key = (row.app_id, msg_id)
        if key not in self._rows:
            self._size += _weight(row)
            self._rows[key] = row
        while self._size > CACHE_BYTES:
            self._size -= _weight(self._rows.popitem(last=False)[1])

    def drop(self, app_id: int, msg_id: int) -> None:
        row = self._rows.pop((app_id, msg_id), None)
        if row is not None:
            self._size -= _weight(row)


def _weight(row: Row) -> int:
    bits = len(row.targets) if isinstance(row.targets, bytes) else 0
    return ROW_BYTES + len(row.body) + bits


class Rows:
    """Reads and writes them. `clock` gives Unix seconds; `report_lifetime` is that of a row."""

    def __init__(
        self, engine: Engine, clock: Callable[[], float], report_lifetime: float, endings: Endings
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._report_lifetime = report_lifetime
        self._endings = endings
        self._cache = _Cache()

    # Writing

    async def write(self, entries: Sequence[tuple[int, Row]]) -> dict[int, BitMap]:
        """Write each once: a second writing does nothing. What is noted about it elsewhere is noted before.

        Answers, of parts, the targets that their whole was taken back for meanwhile: they are recalled in the part,
        too, and are to get nothing of it."""
        entries = [(msg_id, await self._with_callback(row)) for msg_id, row in entries]
        parts = [(msg_id, row) for msg_id, row in entries if row.part_of]
        await asyncio.gather(self._endings.note(entries), *[self._note_part(*part) for part in parts])
        await asyncio.gather(*[self._write(*entry) for entry in entries])
        if not parts:
            return {}
        gone = await asyncio.gather(*[self._taken_back(*part) for part in parts])
        return {msg_id: bits for (msg_id, _), bits in zip(parts, gone, strict=True) if bits}

    async def _with_callback(self, row: Row) -> Row:
        """A part tells whom its whole would tell."""
        if not row.part_of or row.callback is not None:
            return row
        whole = (await self.read(row.app_id, [row.part_of])).get(row.part_of)
        return row if whole is None else replace(row, callback=whole.callback)

    def _lifetime(self, row: Row) -> int:
        """Milliseconds from now on."""
        end = max(row.expires_at, row.created_at + self._report_lifetime)
        return int(max(0.0, end - self._clock()) * 1000) + SLACK

    def _write(self, msg_id: int, row: Row) -> Awaitable[object]:
        key = of_message(row.app_id, msg_id, "row")
        return self._engine.call(_write, (key,), (encode_row(row), self._lifetime(row)))

    async def _note_part(self, msg_id: int, row: Row) -> None:
        key = of_message(row.app_id, row.part_of, "parts")
        await self._engine.call(_note_part, (key,), (msg_id, self._lifetime(row)))

    async def _taken_back(self, msg_id: int, row: Row) -> BitMap:
        whole = (await self.look(row.app_id, [row.part_of])).get(row.part_of)
        gone = decode_bits(row.targets) & whole.fate.states.recalled if whole else BitMap()
        if gone:
            packed = entry("recalled", self._clock(), gone)
            await self._engine.call(_record, (of_message(row.app_id, msg_id, "row"),), ("1", packed))
        return gone

    # Reading

    async def read(self, app_id: int, msg_ids: Iterable[int]) -> dict[int, Row]:
        """Those that exist. One with a body may have lost it a moment ago."""
        found: dict[int, Row] = {}
        missing: list[int] = []
        for msg_id in msg_ids:
            row = self._cache.get(app_id, msg_id)
            if row is None:
                missing.append(msg_id)
            else:
                found[msg_id] = row
        keys = [of_message(app_id, msg_id, "row") for msg_id in missing]
        answers = await asyncio.gather(*[self._engine.run("GET", key) for key in keys])
        for msg_id, packed in zip(missing, answers, strict=True):
            if packed is not None:
                found[msg_id] = row = decode_row(app_id, packed)[0]
                self._cache.put(msg_id, row)
        return found

    async def look(self, app_id: int, msg_ids: Sequence[int]) -> dict[int, Message]:
        """Those that exist and whose report is kept, with all that became of them."""
        keys = [of_message(app_id, msg_id, "row") for msg_id in msg_ids]
        answers = await asyncio.gather(*[self._engine.call(_look, (key,)) for key in keys])
        now = self._clock()
        messages = (
            _read_message(app_id, msg_id, answer)
            for msg_id, answer in zip(msg_ids, answers, strict=True)
            if answer is not None
        )
        return {message.msg_id: message for message in messages if not self._is_over(message.row, now)}

    def _is_over(self, row: Row, now: float) -> bool:
        return now >= max(row.expires_at, row.created_at + self._report_lifetime)

    async def read_live(self, app_id: int, msg_ids: Sequence[int]) -> list[tuple[int, Row, BitMap, BitMap]]:
        """Of broadcasts: msg_id, row, targets, settled; a small part of what `look` reads."""
        keys = [of_message(app_id, msg_id, "row") for msg_id in msg_ids]
        answers = await asyncio.gather(*[self._engine.call(_live_row, (key,)) for key in keys])
        found: list[tuple[int, Row, BitMap, BitMap]] = []
        for msg_id, answer in zip(msg_ids, answers, strict=True):
            if answer is not None:
                row = decode_row(app_id, answer[0])[0]
                targets = decode_bits(row.targets)
                found.append((msg_id, row, targets, read_settled(answer[1], answer[2:]) & targets))
        return found

    async def unfinished(self, app_id: int, msg_ids: Sequence[int]) -> list[int]:
        """Those of which something may be left to do; most are for one device, and it has them."""
        keys = [of_message(app_id, msg_id, "row") for msg_id in msg_ids]
        heads = await asyncio.gather(*[self._engine.run("GETRANGE", key, 0, 0) for key in keys])
        return [msg_id for msg_id, head in zip(msg_ids, heads, strict=True) if head and head[0] != SINGLE]

    async def parts(self, app_id: int, msg_id: int) -> list[Message]:
        """Of a paced push, in order."""
        members: Collection[bytes] = await self._engine.run("SMEMBERS", of_message(app_id, msg_id, "parts"))
        found = await self.look(app_id, sorted(map(int, members)))
        return [part for part in found.values() if part.row.part_of == msg_id]

    # When nobody is owed it any more

    async def fold(self, message: Message, *, finished: bool) -> None:
        """Merge its entries, if nobody does it at the same time. `finished`: its body goes."""
        row, fate = message.row, message.fate
        key = of_message(row.app_id, message.msg_id, "row")
        cut = finished and bool(row.body)
        if fate.unfolded:
            await self._engine.call(_fold, (key,), (fate.version, fate.unfolded, fate.encode(), int(cut)))
        elif cut:
            await self._engine.call(_cut, (key,))
        if finished:
            self._cache.drop(row.app_id, message.msg_id)

    async def remove(self, app_id: int, msg_ids: Iterable[int]) -> None:
        """With everything that is known of them."""
        keys = [[of_message(app_id, msg_id, what) for what in OWN_KEYS] for msg_id in msg_ids]
        await asyncio.gather(*[self._engine.run("UNLINK", *one) for one in keys])


def _read_message(app_id: int, msg_id: int, answer: Sequence[bytes]) -> Message:
    packed, *others = answer
    row, tail = decode_row(app_id, packed)
    if packed[0] & SINGLE:
        fate = read_single_fate(int(row.targets), row.created_at, tail)
    else:
        fate = read_fate(decode_bits(row.targets), row.created_at, others[0], others[1:])
    return Message(msg_id, row, fate)
