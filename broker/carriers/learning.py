"""What the installation learns of its networks from the connections it has.

A network is a carrier (a profile's name) and the link that the device declares; so there are few. A node counts
what its own connections live through, in `Network`. Once a minute it adds that to its row of the day in the store,
and reads the rows of all. Those of a day that is over are folded into one by whoever sees them first (S12: one
succeeds), so what is kept is bounded by live nodes and days, however many nodes come and go. What a node counted
since its last save is lost when it is killed.

The advice is drawn from all days, an old one counting less: networks change.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

from msgspec.structs import replace

from broker.carriers.panels import Silences, count_in
from broker.carriers.profile import CarrierProfile, Heartbeat
from broker.carriers.rows import (
    ENDS,
    INSTALLATION,
    KIND,
    Entry,
    add_to,
    day_of,
    drop,
    fold,
    key_of,
    node_of,
    read_row,
    summarise,
)
from broker.carriers.tally import ACK_BOUNDS, LIFETIME_BOUNDS, Tally, place
from broker.metrics import Counter, Family, Histogram, Metrics
from broker.model import Record
from broker.store import Conflict, Records, StoreError, every_record

DAY: Final = 86_400
EVERY: Final = 60.0  # seconds between saves, more or less: nodes that start together shall not save together
MAX_NETWORKS: Final = 500  # of one node, the others are counted as one: profiles come and go with each reload
KEPT_DAYS: Final = 28
HALF_LIFE: Final = 3.0  # days after which a silence counts half
FRESH: Final = 3 * EVERY  # seconds for which a row says who is online now
MAX_FOLDED: Final = 20  # rows in one change: 5 ms with ten networks in each
UNKNOWN_LINK: Final = "unknown"  # of a device that declares none
OTHER: Final = "other"

log = logging.getLogger(__name__)

Key = tuple[str, str]  # carrier, link


class Network:
    """What this process sees of one. Events cost a few additions; none comes from a packet."""

    __slots__ = ("_acks", "_connects", "_ends", "_lifetimes", "fresh", "online", "profile")

    def __init__(self, profile: CarrierProfile, key: Key, counts: Counts) -> None:
        self.profile = profile
        self.online = 0
        self.fresh = Tally()  # what is not saved yet
        self._connects = counts.connects.labels(*key)
        self._lifetimes = counts.lifetimes.labels(*key)
        self._acks = counts.acks.labels(*key)
        self._ends = {how: counts.ends.labels(*key, how) for how in ENDS}

    def connected(self) -> None:
        self.online += 1
        self.fresh.connects += 1
        self._connects.value += 1

    def ended(self, how: str, lifetime: float) -> None:
        """`how`: one of ENDS."""
        fresh = self.fresh
        self.online -= 1
        setattr(fresh, how, getattr(fresh, how) + 1)
        fresh.lifetimes[place(LIFETIME_BOUNDS, lifetime)] += 1
        self._ends[how].value += 1
        self._lifetimes.observe(lifetime)

    def survived(self, silence: int, voice: int = 0) -> None:
        """A packet of the device ended a silence of this bin. `voice`: of broker.carriers.panels.voice_of."""
        self.fresh.survived[silence] += 1
        count_in(self.fresh.panels, voice, silence, died=False)

    def died(self, silence: int, voice: int = 0) -> None:
        """After a silence of this bin its packets did not come through any more."""
        self.fresh.died[silence] += 1
        count_in(self.fresh.panels, voice, silence, died=True)

    def acked(self, seconds: float, count: int = 1) -> None:
        self.fresh.acks[place(ACK_BOUNDS, seconds)] += count
        self._acks.observe(seconds, count)

    def delivered(self, sent: int, unanswered: int) -> None:
        """By a connection that has ended."""
        self.fresh.sent += sent
        self.fresh.unanswered += unanswered

    def tcp(self, rtt: float, segments: int, retransmits: int) -> None:
        """Of one connection since it was looked at last: seconds (0: not known), and segments with data."""
        fresh = self.fresh
        fresh.trips += rtt > 0
        fresh.trip_seconds += rtt
        fresh.segments += segments
        fresh.retransmits += retransmits


class Counts:
    """For Prometheus, since the process began."""

    def __init__(self, metrics: Metrics) -> None:
        self.connects: Family[Counter] = metrics.counters(
            "carrier_connects", "Devices that connected.", "carrier", "link"
        )
        self.ends: Family[Counter] = metrics.counters(
            "carrier_ends", "Connections of devices that ended.", "carrier", "link", "how"
        )
        self.lifetimes: Family[Histogram] = metrics.histograms(
            "carrier_lifetime_seconds",
            "From a device's CONNECT to the end of its connection.",
            "carrier",
            "link",
            bounds=LIFETIME_BOUNDS,
        )
        self.acks: Family[Histogram] = metrics.histograms(
            "carrier_ack_seconds",
            "From a push's sending to its acknowledgement; a sample.",
            "carrier",
            "link",
            bounds=ACK_BOUNDS,
        )


class Learning:
    """On the event loop's thread. `clock` gives Unix seconds."""

    def __init__(self, records: Records, clock: Callable[[], float] = time.time) -> None:
        self._records = records
        self._clock = clock
        self._name = ""
        self._counts = Counts(Metrics(process=False))
        self._networks: dict[Key, Network] = {}
        self._silences: dict[str, Silences] = {}  # by carrier/link
        self._task: asyncio.Task[None] | None = None
        self._saving = asyncio.Lock()

    def count_in(self, metrics: Metrics) -> None:
        """Show in these what is counted from now on. Before the first device comes."""
        self._counts = Counts(metrics)
        metrics.gauge("carrier_connections", "Devices connected.", self._online, "carrier", "link")
        metrics.gauge(
            "carrier_heartbeat_seconds",
            "The heartbeat that devices are advised to begin with.",
            self._all_advice,
            "carrier",
            "link",
            merge="max",
        )

    def _online(self) -> dict[tuple[str, ...], float]:
        return {key: network.online for key, network in self._networks.items()}

    def _all_advice(self) -> dict[tuple[str, ...], float]:
        return {key: self._advice(network, key) for key, network in self._networks.items()}

    def _advice(self, network: Network, key: Key) -> int:
        return self.heartbeat(network.profile, key[1]).start

    # Counting

    def network(self, profile: CarrierProfile, link: str) -> Network:
        """To be counted in. `link`: one of broker.carriers.catalog.LINKS, "" where the device declares none."""
        key = (profile.name, link or UNKNOWN_LINK)
        found = self._networks.get(key)
        if found is None:
            if len(self._networks) >= MAX_NETWORKS:
                key = (OTHER, OTHER)
            found = self._networks.setdefault(key, Network(profile, key, self._counts))
        found.profile = profile  # it may have been read again
        return found

    # Advice

    def heartbeat(self, profile: CarrierProfile, link: str) -> Heartbeat:
        """The profile's, with the start that is learned for this link. A microsecond or two."""
        wanted = profile.heartbeat
        start = self._advise(profile, link, wanted.start)
        return wanted if start == wanted.start else replace(wanted, start=start)

    def longest(self, profile: CarrierProfile, link: str) -> int:
        """The longest keep-alive, seconds, that a client which learns nothing by itself should have there: the
        profile's most, unless shorter silences are known to be too long."""
        return self._advise(profile, link, profile.heartbeat.most)

    def _advise(self, profile: CarrierProfile, link: str, wish: int) -> int:
        silences = self._silences.get(_name(profile.name, link))
        if silences is None:
            return wish
        return silences.advise(wish, profile.heartbeat.least, profile.heartbeat.most)

    # Life

    async def open(self, name: str) -> None:
        """`name`: of this process, and of no other that lives."""
        self._name = name
        await _guarded(self.read())
        self._task = asyncio.get_running_loop().create_task(self._go_round())

    async def close(self) -> None:
        """Save what there is. Before the store is closed."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        self._task = None
        await _guarded(self.save())

    async def _go_round(self) -> None:
        while True:
            await asyncio.sleep(EVERY * random.uniform(0.9, 1.1))
            await _guarded(self.save())
            await _guarded(self.read())

    # The store

    async def save(self) -> None:
        """Add what is new to this process's row of the day. Raises StoreError: then it is added the next time."""
        async with self._saving:
            taken = {key: self._take(network) for key, network in self._networks.items()}
            news = {
                _name(*key): Entry(network.online, self._advice(network, key), taken[key])
                for key, network in self._networks.items()
                if network.online or taken[key] != _NOTHING
            }
            row = key_of(self._today(), self._name)
            try:
                if news:
                    record = await self._records.find(INSTALLATION, KIND, row)
                    await self._records.save([add_to(record, row, news, self._clock())])
            except BaseException:
                for network, tally in taken.items():
                    self._networks[network].fresh.add(tally)
                raise

    @staticmethod
    def _take(network: Network) -> Tally:
        taken, network.fresh = network.fresh, Tally()
        return taken

    async def read(self) -> None:
        """What all have saved; and fold a day that is over. Raises StoreError."""
        today = self._today()
        silences: dict[str, Silences] = {}
        days: dict[int, list[Record]] = {}
        for record in await every_record(self._records, INSTALLATION, KIND):
            day = day_of(record)
            days.setdefault(day, []).append(record)
            weight = 0.5 ** (max(0, today - day) / HALF_LIFE)
            for name, entry in read_row(record).entries.items():
                await asyncio.sleep(0)  # each takes up to a tenth of a millisecond
                silences.setdefault(name, Silences()).add(entry.tally.panels, weight)
        self._silences = silences
        await self._tidy(today, days)

    async def _tidy(self, today: int, days: Mapping[int, Sequence[Record]]) -> None:
        """Fold or drop some rows of one day."""
        for day, records in sorted(days.items()):
            if day < today - KEPT_DAYS:
                changes = drop(records[:MAX_FOLDED])
            elif day < today - 1 and any(map(node_of, records)):  # over by every clock
                changes = fold(day, records[:MAX_FOLDED])
            else:
                continue
            try:
                await self._records.save(changes)
            except Conflict:
                log.debug("another process was faster with day %d", day)
            return

    def _today(self) -> int:
        return int(self._clock()) // DAY

    async def report(self, days: int) -> list[dict[str, Any]]:
        """Each network in the last `days` days, today among them, as far as others have saved. Raises StoreError."""
        if self._task is not None:
            await self.save()
        since = self._today() - days
        records = await every_record(self._records, INSTALLATION, KIND)
        return summarise([r for r in records if day_of(r) > since], self._clock() - FRESH)


_NOTHING: Final = Tally()


def _name(carrier: str, link: str) -> str:
    return f"{carrier}/{link or UNKNOWN_LINK}"


async def _guarded(work: Coroutine[Any, Any, None]) -> None:
    """A minute that is lost is no reason to stop learning."""
    try:
        await work
    except StoreError as error:
        log.warning("what is learned of carriers is not shared now: %s", error)
    except Exception:
        log.exception("what is learned of carriers is not shared now")
