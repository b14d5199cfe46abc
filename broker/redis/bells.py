"""Doorbells as bytes: msgpack arrays. A sequence that is rung is one array; a message is an array of sequences.

What a newer version adds at the end of an array is ignored, and so is a kind that is not known: during a rolling
upgrade both versions ring each other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, assert_never

import msgspec
from msgspec.structs import astuple
from pyroaring import BitMap

from broker.bitmaps import encode_bits
from broker.bus import Broadcast, CredentialsChanged, Doorbell, Recalled, Taken, Targeted
from broker.model import StoredBroadcast, StoredMessage, Withdrawn

INLINE: Final = 16 << 10  # bytes of a broadcast's bitmaps up to which they are in its doorbell
TARGETED, BROADCAST, STORED, RECALLED, CREDENTIALS, TAKEN = range(6)
MAX_SEQUENCES: Final = 65_535  # in one message
_FIELDS: Final = len(StoredMessage.__struct_fields__)

ReadBroadcast = Callable[[int, int], Awaitable[StoredBroadcast | None]]
"""(app_id, msg_id) -> the row, for doorbells that only name it."""


@dataclass(frozen=True, slots=True)
class Named:
    """A broadcast whose row is to be read before it is handed over."""

    app_id: int
    msg_id: int


def encode(doorbells: Sequence[Doorbell], inline: int = INLINE) -> bytes:
    """Reads the bitmaps now: their owner may change them afterwards."""
    return msgspec.msgpack.encode([_packed(doorbell, inline) for doorbell in doorbells])


def join(sequences: Sequence[bytes]) -> bytes:
    return b"\xdc" + len(sequences).to_bytes(2, "big") + b"".join(sequences)


def decode(message: bytes) -> list[list[Doorbell | Named]]:
    """Raises ValueError (msgspec.DecodeError) if these are no doorbells."""
    sequences = msgspec.msgpack.decode(message, type=list[list[list[Any]]])
    return [
        [doorbell for packed in sequence if (doorbell := _doorbell(packed)) is not None]
        for sequence in sequences
    ]


def _packed(doorbell: Doorbell, inline: int) -> tuple[Any, ...]:
    match doorbell:
        case Targeted():
            return TARGETED, astuple(doorbell.message), tuple(doorbell.devnos)
        case Broadcast():
            return _broadcast(doorbell.broadcast, inline)
        case Recalled():
            return RECALLED, [_withdrawn(withdrawn) for withdrawn in doorbell.withdrawn]
        case CredentialsChanged():
            devnos = doorbell.devnos
            return CREDENTIALS, doorbell.app_id, None if devnos is None else tuple(devnos)
        case Taken():
            return TAKEN, doorbell.app_id, doorbell.devno, doorbell.epoch, doorbell.former
        case _:
            assert_never(doorbell)


def _broadcast(row: StoredBroadcast, inline: int) -> tuple[Any, ...]:
    targets, settled = encode_bits(row.targets.copy()), encode_bits(row.settled.copy())
    if len(targets) + len(settled) + len(row.message.body) > inline:
        return STORED, row.message.app_id, row.message.msg_id
    return BROADCAST, astuple(row.message), targets, settled


def _withdrawn(withdrawn: Withdrawn) -> tuple[Any, ...]:
    return (
        withdrawn.app_id,
        withdrawn.msg_id,
        encode_bits(withdrawn.devnos.copy()),
        encode_bits(withdrawn.reached.copy()),
    )


def _doorbell(packed: Sequence[Any]) -> Doorbell | Named | None:
    kind, *fields = packed
    if kind == TARGETED:
        return Targeted(_message(fields[0]), tuple(fields[1]))
    if kind == BROADCAST:
        message, targets, settled = fields[:3]
        return Broadcast(
            StoredBroadcast(_message(message), BitMap.deserialize(targets), BitMap.deserialize(settled))
        )
    if kind == STORED:
        return Named(*fields[:2])
    if kind == RECALLED:
        return Recalled(
            [
                Withdrawn(app_id, msg_id, BitMap.deserialize(devnos), BitMap.deserialize(reached))
                for app_id, msg_id, devnos, reached, *_ in fields[0]
            ]
        )
    if kind == CREDENTIALS:
        app_id, devnos = fields[:2]
        return CredentialsChanged(app_id, None if devnos is None else tuple(devnos))
    if kind == TAKEN:
        return Taken(*fields[:4])
    return None


def _message(fields: Sequence[Any]) -> StoredMessage:
    return StoredMessage(*fields[:_FIELDS])
