"""How the store keeps tallies: rows of a node's day, and of a day of all nodes once it is over.

A row is a record of app 0, its key `day/node`, the node empty where it is of all. A reader who meets a row of another
version of the program, which counts other things, leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from broker.carriers.tally import ACK_BOUNDS, LIFETIME_BOUNDS, SHAPE, Tally, quantile
from broker.model import Record, RecordChange

KIND: Final = "carriers"
INSTALLATION: Final = 0  # what belongs to no app
ENDS: Final = ("closed", "told", "silent", "taken")  # fields of Tally: how connections end


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """Of one network, in a row."""

    online: int
    heartbeat: int  # the advice to its devices, seconds
    tally: Tally

    def after(self, former: Entry | None) -> Entry:
        """With what was counted before."""
        tally = Tally()
        tally.add(self.tally)
        if former is not None:
            tally.add(former.tally)
        return Entry(self.online, self.heartbeat, tally)


Entries = Mapping[str, Entry]  # by carrier/link


class Row(msgspec.Struct, frozen=True, array_like=True):
    shape: tuple[int, ...]
    saved_at: float  # Unix seconds
    entries: Entries


_NO_ROW: Final = Row(SHAPE, 0.0, {})
_read: Final = msgspec.msgpack.Decoder(Row).decode


def key_of(day: int, node: str) -> str:
    return f"{day:06d}/{node}"


def day_of(record: Record) -> int:
    return int(record.key.partition("/")[0])


def node_of(record: Record) -> str:
    return record.key.partition("/")[2]


def read_row(record: Record | None) -> Row:
    """Empty where there is none that can be read."""
    if record is None:
        return _NO_ROW
    try:
        row = _read(record.value)
    except msgspec.DecodeError:
        return _NO_ROW
    return row if row.shape == SHAPE else _NO_ROW


def add_to(record: Record | None, key: str, news: Entries, now: float) -> RecordChange:
    """Put these on top of what the row has. Who is not in the news has nobody online."""
    former = read_row(record).entries
    entries = {name: Entry(0, entry.heartbeat, entry.tally) for name, entry in former.items()}
    entries |= {name: entry.after(former.get(name)) for name, entry in news.items()}
    return _change(key, Row(SHAPE, now, entries), 0 if record is None else record.version)


def fold(day: int, records: Sequence[Record]) -> list[RecordChange]:
    """Rows of this day become one of no node, which is perhaps among them."""
    entries: dict[str, Entry] = {}
    saved_at, version = 0.0, 0
    for record in records:
        row = read_row(record)
        saved_at = max(saved_at, row.saved_at)
        version = version if node_of(record) else record.version
        for name, entry in row.entries.items():
            if name in entries:
                entries[name].tally.add(entry.tally)
            else:
                entries[name] = Entry(0, entry.heartbeat, entry.tally)
    folded = _change(key_of(day, ""), Row(SHAPE, saved_at, entries), version)
    return [folded, *drop([record for record in records if node_of(record)])]


def drop(records: Sequence[Record]) -> list[RecordChange]:
    return [RecordChange(INSTALLATION, KIND, record.key, None, record.version) for record in records]


def _change(key: str, row: Row, version: int) -> RecordChange:
    return RecordChange(INSTALLATION, KIND, key, msgspec.msgpack.encode(row), version)


# For people


def summarise(records: Sequence[Record], fresh_since: float) -> list[dict[str, Any]]:
    """Each network of these rows. Online are those of a node that has saved since then."""
    found: dict[str, _Summary] = {}
    for record in records:
        row = read_row(record)
        fresh = bool(node_of(record)) and row.saved_at >= fresh_since
        for name, entry in row.entries.items():
            found.setdefault(name, _Summary()).add(entry, row.saved_at, fresh=fresh)
    return [summary.describe(name) for name, summary in sorted(found.items())]


class _Summary:
    """Of one network over rows."""

    def __init__(self) -> None:
        self._online = 0
        self._advised = (0.0, 0)  # last: when, and what
        self._tally = Tally()

    def add(self, entry: Entry, saved_at: float, *, fresh: bool) -> None:
        self._tally.add(entry.tally)
        self._online += entry.online if fresh else 0
        self._advised = max(self._advised, (saved_at, entry.heartbeat))

    def describe(self, name: str) -> dict[str, Any]:
        """Times in seconds; a share is 0 to 1; None: nothing was counted."""
        tally, (carrier, _, link) = self._tally, name.partition("/")
        return {
            "carrier": carrier,
            "link": link,
            "online": self._online,
            "connects": tally.connects,
            "ends": {how: getattr(tally, how) for how in ENDS},
            "lifetime_p50": _rounded(quantile(LIFETIME_BOUNDS, tally.lifetimes, 0.5)),
            "silent_share": _share(tally.silent + tally.taken, tally.ends),
            "silences": {"survived": sum(tally.survived), "died": sum(tally.died)},
            "heartbeat": self._advised[1],
            "ack_p50": _rounded(quantile(ACK_BOUNDS, tally.acks, 0.5)),
            "ack_p99": _rounded(quantile(ACK_BOUNDS, tally.acks, 0.99)),
            "answered_share": _share(tally.sent - tally.unanswered, tally.sent),
            "round_trip": _rounded(tally.trip_seconds / tally.trips if tally.trips else None),
            "retransmit_share": _share(tally.retransmits, tally.segments),
        }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
