"""What became of one message: entries, and the sum of those that were folded.

An *entry* is one step of some devices: kind, time, node, devnos. Entries may come in any order and twice; reading
them is a union (S5). A message for one device has them inside its row, without devnos, one of each kind at most
(`lua/record.lua`). Any other has them in a list (`:log`); when that grows long, whoever sees it merges it into the
sum (`:sum`), which holds steps only: the states follow from them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
from msgspec import Struct
from pyroaring import BitMap

from broker.bitmaps import decode_bits, encode_bits
from broker.settlements import STATES, States, stretch, unfold

ENTRY: Final = struct.Struct(">cddI")  # kind, at, more, node
SUM: Final = struct.Struct(
    ">II"
)  # how often it was folded; bytes of the bitmap of the settled, which comes next
DEVNO_BYTES: Final = 4
KINDS: Final = {
    "sent": b"s",
    "delivered": b"d",  # more: when it had been sent, or 0
    "evicted": b"e",
    "recalled": b"r",  # more: msg_id of the push that took its place, or 0
    "shown": b"S",
    "clicked": b"C",
    "dismissed": b"D",
    "withdrawn": b"W",  # by its publisher, as a whole
    "replaced": b"R",  # more: the public id of the push that did
}
_STEPS: Final = {kind: step for step, kind in KINDS.items()}
TAKERS: Final = 16  # pushes that took a message's place of which the sum still tells what each took

StepKey = tuple[str, int, float, float]  # step, node, start, width


class Entry(Struct, frozen=True, gc=False):
    step: str
    at: float
    more: float
    node: int
    devnos: BitMap


def entry(
    step: str, at: float, devnos: Iterable[int], *, more: float = 0.0, node: int = 0, few: bool = True
) -> bytes:
    """`few`: the devnos as they are, which `lua/record.lua` can read; else as a bitmap."""
    head = ENTRY.pack(KINDS[step], at, more, node)
    if few:
        numbers = tuple(devnos)
        return head + b"\0" + struct.pack(f">{len(numbers)}I", *numbers)
    return head + b"\1" + encode_bits(BitMap(devnos))


def read_entry(packed: bytes) -> Entry:
    kind, at, more, node = ENTRY.unpack_from(packed)
    start = ENTRY.size + 1
    if packed[ENTRY.size]:
        devnos = BitMap.deserialize(packed[start:])
    else:
        devnos = BitMap(struct.unpack(f">{(len(packed) - start) // DEVNO_BYTES}I", packed[start:]))
    return Entry(_STEPS[kind], at, more, node, devnos)


def read_tail(tail: bytes, devno: int) -> list[Entry]:
    """The entries inside the row of a message for this device."""
    return [
        Entry(_STEPS[kind], at, more, node, BitMap((devno,)))
        for kind, at, more, node in ENTRY.iter_unpack(tail)
    ]


class _Sum(Struct, frozen=True, array_like=True):
    withdrawn_at: float | None
    replaced_by: int | None
    taken: list[tuple[int, bytes]]
    steps: list[tuple[StepKey, bytes]]


_sums: Final = msgspec.msgpack.Decoder(_Sum)


@dataclass(slots=True, eq=False)
class Fate:
    """What became of one message as far as it was read. Whoever has one owns the bitmaps."""

    states: States
    steps: dict[StepKey, BitMap] = field(default_factory=dict)  # no device twice in one step
    withdrawn_at: float | None = None
    replaced_by: int | None = None
    taken: dict[int, BitMap] = field(default_factory=dict)  # msg_id of the taker -> what was recalled for it
    version: int = 0  # of the sum
    unfolded: int = 0  # entries that are not in it

    def add(self, step: str, node: int, when: tuple[float, float], devnos: BitMap) -> None:
        if devnos:
            key = (step, node, *when)
            known = self.steps.get(key)
            self.steps[key] = devnos if known is None else known | devnos

    def of_step(self, step: str) -> BitMap:
        """Everybody who did it."""
        return BitMap.union(BitMap(), *(bits for key, bits in self.steps.items() if key[0] == step))

    def receipts(self) -> dict[str, BitMap]:
        return {
            event: self.of_step(event) for event in {key[0] for key in self.steps if key[0] not in STATES}
        }

    def note(self, one: Entry) -> None:
        """What an entry tells of the message as a whole; the first time of each counts."""
        if one.step == "withdrawn":
            self.withdrawn_at = one.at if self.withdrawn_at is None else min(one.at, self.withdrawn_at)
        elif one.step == "replaced" and self.replaced_by is None:
            self.replaced_by = int(one.more)
        elif one.step == "recalled" and one.more:
            taker = int(one.more)
            self.taken[taker] = self.taken.get(taker, BitMap()) | (one.devnos & self.states.targets)

    def take_receipt(self, one: Entry, created_at: float, known: BitMap) -> None:
        """`known`: who did it before; whoever is new comes to it."""
        fresh = (one.devnos & self.states.targets) - known
        self.add(one.step, 0, stretch(created_at, one.at), fresh)
        known.update(fresh)

    def encode(self) -> bytes:
        """The sum with everything that is in this, one version on."""
        newest = list(self.taken.items())[-TAKERS:]
        summed = _Sum(
            self.withdrawn_at,
            self.replaced_by,
            [(taker, encode_bits(bits)) for taker, bits in newest],
            [(key, encode_bits(bits)) for key, bits in self.steps.items()],
        )
        settled = encode_bits(self.states.settled)
        return SUM.pack(self.version + 1, len(settled)) + settled + msgspec.msgpack.encode(summed)


def read_fate(targets: BitMap, created_at: float, summed: bytes, log: Sequence[bytes]) -> Fate:
    """Of a message with a list. Whoever was not meant has no state (S4)."""
    fate = _read_sum(targets, summed)
    fate.unfolded = len(log)
    told = fate.receipts()
    for one in sorted(map(read_entry, log), key=lambda one: one.at):
        fate.note(one)
        if one.step in STATES:
            sent_at = one.more if one.step == "delivered" else 0.0
            columns = [one.devnos if one.step == state else None for state in STATES]
            for step, when, devnos in unfold(fate.states, created_at, one.at, sent_at, columns):
                fate.add(step, one.node, when, devnos)
        elif one.devnos:
            fate.take_receipt(one, created_at, told.setdefault(one.step, BitMap()))
    return fate


def _read_sum(targets: BitMap, summed: bytes) -> Fate:
    if not summed:
        return Fate(States(targets, *(BitMap() for _ in STATES)))
    version, length = SUM.unpack_from(summed)
    known = _sums.decode(memoryview(summed)[SUM.size + length :])
    fate = Fate(
        States(targets, *(BitMap() for _ in STATES)),
        {key: decode_bits(bits) for key, bits in known.steps},
        known.withdrawn_at,
        known.replaced_by,
        {taker: decode_bits(bits) for taker, bits in known.taken},
        version,
    )
    for state, bits in zip(STATES, fate.states[1:], strict=True):
        bits.update(fate.of_step(state))
    return fate


def read_settled(settled: bytes, log: Iterable[bytes]) -> BitMap:
    """To whom nothing is owed any more: the bitmap of a sum, and the entries after it."""
    bits = decode_bits(settled or None)
    for one in map(read_entry, log):
        if one.step in STATES and one.step != "sent":
            bits.update(one.devnos)
    return bits


def read_single_fate(devno: int, created_at: float, tail: bytes) -> Fate:
    """Of a message for one device: the times are exact, but for receipts."""
    target = BitMap((devno,))
    fate = Fate(States(target.copy(), *(BitMap() for _ in STATES)))
    entries = {one.step: one for one in read_tail(tail, devno)}
    for step, one in entries.items():
        fate.note(one)
        if step in STATES:
            getattr(fate.states, step).update(target)
        elif step not in ("withdrawn", "replaced"):
            fate.take_receipt(one, created_at, BitMap())
    for step, node, at in _single_steps(entries):
        fate.add(step, node, (at, 0.0), target)
    return fate


def _single_steps(entries: dict[str, Entry]) -> Iterator[tuple[str, int, float]]:
    """Of the ends it may have come to, the one that counts."""
    done = next((one for step in ("delivered", "recalled", "evicted") if (one := entries.get(step))), None)
    sent = entries.get("sent")
    if sent is not None:
        yield "sent", sent.node, sent.at
    elif done is not None and done.step == "delivered" and done.more:
        yield "sent", done.node, done.more
    if done is not None:
        yield done.step, done.node, done.at
