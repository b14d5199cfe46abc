"""What becomes of messages, whatever keeps it: the states of a message's targets (S4), the steps that led there, and
the record that is made of both. A store gathers settlements as they come and merges them here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from pyroaring import BitMap

from broker.bitmaps import decode_bits
from broker.model import MessageRecord

IN_FLIGHT: Final = (
    60.0  # seconds after its expiry in which a push may still be on its way to a device, or a node have it
)
FLEETING: Final = 15.0  # seconds in which a push without time to live may still be acknowledged
EVENT_DEVICES: Final = (
    1000  # of one callback event: what is told, tried again and forgotten together (about 60 KB of JSON)
)
MINUTE: Final = 60
HOUR: Final = 3600
STATES: Final = ("delivered", "evicted", "recalled", "sent")


class States(NamedTuple):
    """The bitmaps of one message as they are now. `delivered` wins over the others (S4)."""

    targets: BitMap
    delivered: BitMap
    evicted: BitMap
    recalled: BitMap
    sent: BitMap  # delivered ones are not all in it

    @property
    def settled(self) -> BitMap:
        return self.delivered | self.evicted | self.recalled

    @property
    def waiting(self) -> BitMap:
        return self.targets - self.settled


def stretch(created_at: float, at: float) -> tuple[int, int]:
    """Start and width, in seconds, of the stretch of time that `at` belongs to in a message's steps."""
    age = at - created_at
    width = 1 if age < MINUTE else MINUTE if age < HOUR else HOUR
    return int(at // width * width), width


def unfold(
    states: States, created_at: float, at: float, sent_at: float, columns: Sequence[BitMap | None]
) -> Iterator[tuple[str, tuple[int, int], BitMap]]:
    """One settlement (who is in which of STATES), merged into `states`: which step is new, when, for whom."""
    when = stretch(created_at, at)
    for state, known, column in zip(STATES, states[1:], columns, strict=True):
        if column is None:
            continue
        fresh = (column & states.targets) - known
        if state == "delivered" and sent_at and stretch(created_at, sent_at) != when:
            yield "sent", stretch(created_at, sent_at), fresh - states.sent
            states.sent.update(fresh)
        yield state, when, fresh - states.delivered
        known.update(fresh)


class Stored(NamedTuple):
    """A message or a part of one, with what became of it."""

    msg_id: int
    states: States
    app_id: int
    broadcast: int
    created_at: float
    expires_at: float
    sendno: str
    suppressed: bytes | None
    online: int
    paced: int
    part_of: int
    withdrawn_at: float | None
    replaced_by: int | None

    def expired(self, now: float) -> BitMap:
        return self.states.waiting if now >= self.expires_at else BitMap()


def released(parts: Iterable[Stored]) -> BitMap:
    """The targets that a paced message's parts have."""
    return BitMap.union(BitMap(), *(part.states.targets for part in parts))


def message_record(
    stored: Stored, parts: Sequence[Stored], receipts: Mapping[str, BitMap], now: float
) -> MessageRecord:
    """`stored` is used up."""
    states, suppressed = stored.states, decode_bits(stored.suppressed)
    for part in parts:
        for whole, bits in zip(states[1:], part.states[1:], strict=True):
            whole |= bits  # noqa: PLW2901 - in place
    let_go = released(parts)
    expired = None
    if stored.paced:
        expired = BitMap.union(stored.expired(now) - let_go, *(part.expired(now) for part in parts))
    return MessageRecord(
        stored.msg_id,
        stored.app_id,
        bool(stored.broadcast),
        stored.created_at,
        stored.expires_at,
        states.targets | suppressed,
        states.delivered,
        states.evicted,
        states.recalled,
        suppressed,
        states.sent | states.delivered,
        expired,
        stored.online,
        receipts,
        stored.sendno,
        bool(stored.paced),
        len(parts),
        let_go,
        stored.withdrawn_at,
        stored.replaced_by,
    )


def event_parts(devnos: BitMap) -> Iterable[BitMap]:
    """Of one callback event, at most EVENT_DEVICES each."""
    if len(devnos) <= EVENT_DEVICES:
        return (devnos,)
    names = devnos.to_array()
    return (BitMap(names[i : i + EVENT_DEVICES]) for i in range(0, len(names), EVENT_DEVICES))
