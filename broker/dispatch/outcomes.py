"""What devices tell of addresses: how often they got through, by carrier.

Theory. Anybody can say anything here, so what is said has little power. A source (the /24 or /48 of the caller)
counts once in a window of ten minutes for one address, and once more if something failed, with all it tells then
weighing one; weights halve with each window. An address counts as failing only where most of the weight says so and
enough sources did: each sets one bit of a sketch of 64, and sketches of several processes are united, so that
telling many processes makes one source no heavier. And failing means a place further down, never the end.

Each process counts what it hears, and adds it now and then to the row of the carrier in the store (`records`, app
0); the sums are the same whoever adds first. All methods belong to the event loop.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import msgspec

from broker.model import Record, RecordChange
from broker.store import Conflict, Records, every_record
from broker.tenants.networks import read_address

KIND: Final = "dispatch-outcomes"
WINDOW: Final = 600.0  # seconds
SYNC_PAUSE: Final = 15.0  # seconds between two looks at the rows
ENOUGH_SOURCES: Final = 8  # of failures, in this window and the one before
BAD: Final = 0.2  # share of attempts that failed: after those that are better
FAILING: Final = 0.5
FADED: Final = 0.05  # weight under which an address is forgotten
MAX_HEARD: Final = 50_000  # source, carrier and address in one window (4 MB); what is beyond is not counted
SKETCH_BITS: Final = 64  # one whole number in the row
SOURCE_BITS: Final = {4: 24, 6: 48}  # what one customer of a provider has of addresses, and no more


class Tally(msgspec.Struct, array_like=True):
    """Of one address. The sketches have a bit for each source that told of failures."""

    ok: float = 0.0
    failed: float = 0.0
    sources: int = 0
    sources_before: int = 0  # in the window before

    def age(self, windows: int) -> None:
        if windows <= 0:
            return
        fading = 0.5**windows
        self.ok *= fading
        self.failed *= fading
        self.sources_before = self.sources if windows == 1 else 0
        self.sources = 0

    def add(self, other: Tally) -> None:
        self.ok += other.ok
        self.failed += other.failed
        self.sources |= other.sources
        self.sources_before |= other.sources_before

    @property
    def weight(self) -> float:
        return self.ok + self.failed

    @property
    def band(self) -> int:
        """0: good, or not known to be bad; 1: bad; 2: failing."""
        if (self.sources | self.sources_before).bit_count() < ENOUGH_SOURCES:
            return 0
        share = self.failed / self.weight
        return 2 if share >= FAILING else 1 if share >= BAD else 0


class Row(msgspec.Struct):
    """Of one carrier, as it was in a window."""

    window: int
    tallies: dict[str, Tally] = msgspec.field(default_factory=dict)

    def age(self, window: int) -> None:
        """Rows from the future (a clock that was set back) keep their window until it comes."""
        if window <= self.window:
            return
        for tally in self.tallies.values():
            tally.age(window - self.window)
        self.window = window
        self.tallies = {name: tally for name, tally in self.tallies.items() if tally.weight >= FADED}

    def add(self, other: Row) -> None:
        other.age(self.window)
        self.age(other.window)
        for name, tally in other.tallies.items():
            self.tallies.setdefault(name, Tally()).add(tally)

    def copy(self) -> Row:
        return _read(_write(self))


_write: Final = msgspec.msgpack.Encoder().encode
_read: Final = msgspec.msgpack.Decoder(Row).decode


@dataclass(frozen=True, slots=True)
class Tried:
    """Attempts to reach one address."""

    address: str
    ok: int
    failed: int


class Outcomes:
    """`heard` counts what was taken and what was not."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._told: dict[str, Row] = {}  # since the carrier's row was saved
        self._known: dict[str, Row] = {}  # as it was read, with what was saved since
        self._heard: set[int] = set()  # hashes of source, carrier and address, in this window
        self._window = 0
        self._synced_at = float("-inf")
        self._syncing = False
        self.taken = 0
        self.ignored = 0

    def take(
        self, carrier: str, caller: str, tried: Collection[Tried], known: Collection[str], now: float
    ) -> None:
        """`known`: addresses that there are; what is told of others is not kept."""
        window = self._enter(now)
        for each in tried:
            heard = hash((source_of(caller), carrier, each.address, each.failed > 0))
            attempts = each.ok + each.failed
            if (
                not attempts
                or each.address not in known
                or heard in self._heard
                or len(self._heard) >= MAX_HEARD
            ):
                self.ignored += 1
                continue
            self._heard.add(heard)
            self.taken += 1
            bit = 1 << source_bit(caller) if each.failed else 0
            tally = Tally(each.ok / attempts, each.failed / attempts, bit)
            row = self._told.setdefault(carrier, Row(window))
            row.add(Row(window, {each.address: tally}))

    def _enter(self, now: float) -> int:
        window = int(now // WINDOW)
        if window != self._window:
            self._window = window
            self._heard.clear()
        return window

    def bands(self, carrier: str, now: float) -> dict[str, int]:
        """address -> 1 or 2, of those that are bad or failing."""
        whole = Row(int(now // WINDOW))
        for rows in (self._known, self._told):
            if carrier in rows:
                whole.add(rows[carrier].copy())
        return {address: tally.band for address, tally in whole.tallies.items() if tally.band}

    def failing(self, now: float) -> int:
        """How many addresses are, over all carriers."""
        return sum(band == 2 for carrier in self.carriers for band in self.bands(carrier, now).values())

    @property
    def carriers(self) -> set[str]:
        return self._known.keys() | self._told.keys()

    async def sync(self, now: float) -> None:
        """Add what was heard to the rows, and read those of the others; at most every SYNC_PAUSE, by one caller at a
        time. Lets StoreError pass: what was not saved is saved the next time."""
        if self._syncing or now < self._synced_at + SYNC_PAUSE:
            return
        self._syncing = True
        try:
            records = {record.key: record for record in await every_record(self._records, 0, KIND)}
            self._known = {carrier: _read(record.value) for carrier, record in records.items()}
            for change, carrier, told in list(self._changes(records, int(now // WINDOW))):
                await self._save(change, carrier, told)
            self._synced_at = now
        finally:
            self._syncing = False

    def _changes(
        self, records: Mapping[str, Record], window: int
    ) -> Iterator[tuple[RecordChange, str, Row | None]]:
        for carrier in self.carriers:
            told, record = self._told.get(carrier), records.get(carrier)
            row = Row(window)
            if record is not None:
                row.add(_read(record.value))
            if told is not None:
                row.add(told.copy())
            elif row.tallies:
                continue
            version = 0 if record is None else record.version
            value = _write(row) if row.tallies else None
            if value is not None or record is not None:
                yield RecordChange(0, KIND, carrier, value, version), carrier, told

    async def _save(self, change: RecordChange, carrier: str, told: Row | None) -> None:
        """What was told while it was being saved waits for the next time."""
        if told is not None:
            del self._told[carrier]
        try:
            await self._records.save([change])
        except BaseException as error:
            if told is not None:
                told.add(self._told.pop(carrier, Row(told.window)))
                self._told[carrier] = told
            if not isinstance(error, Conflict):  # another process was faster
                raise
        else:
            self._known.pop(carrier, None)
            if change.value is not None:
                self._known[carrier] = _read(change.value)


def source_of(caller: str) -> str:
    """What counts as one who tells: the network of the address. "": not known, which is one, too."""
    address = read_address(caller)
    if address is None:
        return ""
    return str(ipaddress.ip_network((address, SOURCE_BITS[address.version]), strict=False))


def source_bit(caller: str) -> int:
    return int.from_bytes(blake2b(source_of(caller).encode(), digest_size=4).digest()) % SKETCH_BITS
