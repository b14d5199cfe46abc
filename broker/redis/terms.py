"""The index: which devices a term holds for.

A posting list is in pieces, one for each partition that has any of its devices; a piece changes together with the
devices it follows from, in one script. Beside that there are, for the app:

- **Where a term is**: by term, the partitions that have it, each with a count of devices, never too low: a writer
  counts up before he adds a piece, and down after he took it away. From 64 devices on it stays: then nobody counts
  any more, and each process remembers that. So a rare term is read from the partitions that have it, not from all.
- **What changed when**: by partition, the version of its last change. A writer raises it after his change and before
  he answers; a reader asks for what is newer than what he knows, one small call for each question whatever the app's
  size, and reads these partitions' pieces anew. So what is remembered is never older than the last call that was
  answered, in whichever process. A writer that dies in between leaves a change that others may not see for
  at most LONGEST seconds.

Aliases have a digest for each device instead of pieces, for nearly each device has its own; where an alias is, is
told by groups of 256 devices, whose digests are 2 KB.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pyroaring import BitMap

from broker.bitmaps import memory_of
from broker.model import PLATFORMS, Term, TermKey
from broker.redis.engine import Engine
from broker.redis.keys import PARTITION, PARTITION_BITS, of_app, of_partition
from broker.redis.names import Names
from broker.redis.pages import DIGEST, alias_digest
from broker.redis.pieces import unite
from broker.redis.scripts import load
from broker.store import StoreError

log = logging.getLogger(__name__)

LONGEST: Final = 60.0  # seconds until a remembered list is read anew as a whole
POSTING_BYTES: Final = 64 << 20  # memory for lists that were used lately
POSTING_OVERHEAD: Final = 600  # of one of them, beside its bits
KNOWN_APPS: Final = 4_096  # apps whose versions are remembered
KNOWN_PLACES: Final = (
    65_536  # (term, partition) that need no counting any more; each forgotten one costs a call
)
PIECES_AT_ONCE: Final = 1_024  # read in one go: some 5 ms of this process
CONTAINER: Final = 16  # partitions of one container of a bitmap: read together, at least
GROUP_BITS: Final = 8  # devices of one group of alias digests
GROUPS_AT_ONCE: Final = 512  # looked at in one go: a megabyte
EVERYWHERE: Final = frozenset((Term.ALL, Term.PLATFORM))  # kinds that every partition may have: not counted
_CHECKS: Final = (1, 8, 1 << 24)  # places looked at in one round, for whether a term still is anywhere

_there: Final = load("terms_there")

Place = tuple[str, str, int]  # kind, value, partition; of an alias: group


@dataclass(slots=True, eq=False)
class _List:
    """A remembered list; never changed in place, callers may hold `bits`."""

    bits: BitMap
    version: int
    read_at: float  # as a whole
    weight: int


@dataclass(slots=True, eq=False)
class _Versions:
    """Of one app. `changes`: partition -> version of its last change, in that order."""

    newest: int = -1
    changes: OrderedDict[int, int] = field(default_factory=OrderedDict)

    def since(self, version: int) -> list[int]:
        found = []
        for partition, changed in reversed(self.changes.items()):
            if changed <= version:
                break
            found.append(partition)
        return found


class Terms:
    """Both sides of it. `clock`: any that only moves forward, in seconds."""

    def __init__(
        self,
        engine: Engine,
        names: Names,
        posting_bytes: int = POSTING_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._names = names
        self._limit = posting_bytes
        self._clock = clock
        self._size = 0
        self._lists: OrderedDict[tuple[int, TermKey], _List] = OrderedDict()
        self._versions: OrderedDict[int, _Versions] = OrderedDict()
        self._for_ever: OrderedDict[tuple[int, Place], None] = OrderedDict()

    def forget(self, app_id: int) -> None:
        """What is remembered of it is perhaps not true: a write went wrong, or the app is gone."""
        self._versions.pop(app_id, None)
        self._for_ever.clear()
        for key in [key for key in self._lists if key[0] == app_id]:
            self._size -= self._lists.pop(key).weight

    # Where a term is

    async def count_up(self, app_id: int, places: Mapping[Place, int]) -> None:
        """Before pieces are added to; `places` with the number of devices. May be more than will be."""
        await self._count(app_id, places, 1)

    async def count_down(self, app_id: int, places: Mapping[Place, int]) -> None:
        """After pieces were taken from. It may fail, then the count stays too high."""
        try:
            await self._count(app_id, places, -1)
        except StoreError as error:
            log.warning("app %d: terms are counted as there that perhaps are not: %s", app_id, error)

    async def _count(self, app_id: int, places: Mapping[Place, int], sign: int) -> None:
        counted = [
            place for place in places if place[0] not in EVERYWHERE and not self._stays((app_id, place))
        ]
        if not counted:
            return
        changes = [(*place, sign * places[place]) for place in counted]
        for place, for_ever in zip(counted, await self._names.count(app_id, changes), strict=True):
            if for_ever:
                self._for_ever[app_id, place] = None
        while len(self._for_ever) > KNOWN_PLACES:
            self._for_ever.popitem(last=False)

    def _stays(self, key: tuple[int, Place]) -> bool:
        if key not in self._for_ever:
            return False
        self._for_ever.move_to_end(key)
        return True

    async def _find_places(
        self, app_id: int, terms: Iterable[TermKey], versions: _Versions
    ) -> dict[TermKey, list[int]]:
        """The partitions that may have each term."""
        places = {term: list(versions.changes) for term in terms if term[0] in EVERYWHERE}
        by_kind: dict[str, list[str]] = {}
        for kind, value in terms:
            if kind not in EVERYWHERE:
                by_kind.setdefault(kind, []).append(value)
        found = await asyncio.gather(
            *[self._names.find(app_id, kind, values) for kind, values in by_kind.items()]
        )
        for (name, values), counts in zip(by_kind.items(), found, strict=True):
            places |= {(Term(name), value): places_of(counts.get(value, b"")) for value in values}
        return places

    # Reading

    async def versions(self, app_id: int) -> _Versions:
        """As they are now. The members of the sorted set: partitions, and v with the newest version."""
        known = self._versions.get(app_id) or _Versions()
        asked = known.newest
        words = await self._engine.run(
            "ZRANGEBYSCORE", of_app(app_id, "changed"), max(asked, 0), "+inf", "WITHSCORES"
        )
        changes = {word: int(score) for word, score in zip(words[::2], words[1::2], strict=True)}
        newest = changes.pop(b"v", -1)
        if newest < asked:  # Redis lost something: a failover
            self.forget(app_id)
            return await self.versions(app_id)
        if newest > known.newest:
            for partition in sorted(changes, key=changes.__getitem__):
                known.changes[int(partition)] = max(changes[partition], known.changes.get(int(partition), 0))
                known.changes.move_to_end(int(partition))
            known.newest = newest
        self._versions[app_id] = known
        self._versions.move_to_end(app_id)
        while len(self._versions) > KNOWN_APPS:
            self._versions.popitem(last=False)
        return known

    async def postings(self, app_id: int, terms: Sequence[TermKey]) -> list[BitMap]:
        """See `broker.store.Store.postings`. What is read anew of one partition is of one moment."""
        if not terms:
            return []
        wanted = list(dict.fromkeys((Term(kind), value) for kind, value in terms))
        aliases = [value for kind, value in wanted if kind == Term.ALIAS]
        others = [term for term in wanted if term[0] != Term.ALIAS]
        found: dict[TermKey, BitMap] = {}
        if others:
            found = await self._read_lists(app_id, others)
        if aliases:
            found |= await self._find_aliases(app_id, aliases)
        return [found[Term(kind), value] for kind, value in terms]

    async def _read_lists(self, app_id: int, terms: Sequence[TermKey]) -> dict[TermKey, BitMap]:
        versions = await self.versions(app_id)
        newest = versions.newest
        kept = {term: one for term in terms if (one := self._kept(app_id, term)) is not None}
        stale = {p for one in kept.values() for p in versions.since(one.version)}
        plan: dict[int, list[TermKey]] = {p: list(kept) for p in stale}
        missing = [term for term in terms if term not in kept]
        for term, partitions in (await self._find_places(app_id, missing, versions)).items():
            for partition in partitions:
                plan.setdefault(partition, []).append(term)
        pieces = await self._read_pieces(app_id, plan)
        found: dict[TermKey, BitMap] = {}
        for term in terms:
            bits = pieces.get(term) or BitMap()
            one = kept.get(term)
            if one is not None:
                bits = _without(one.bits, stale) | bits if stale else one.bits
            self._keep(app_id, term, bits, newest, one.read_at if one else self._clock())
            found[term] = bits
        return found

    async def _read_pieces(self, app_id: int, plan: Mapping[int, Sequence[TermKey]]) -> dict[TermKey, BitMap]:
        """Of each partition these terms. What comes in one go is united before the next, so that the loop's other
        work gets between."""
        found: dict[TermKey, BitMap] = {}
        partitions, first = sorted(plan), 0
        while first < len(partitions):
            count = max(CONTAINER, PIECES_AT_ONCE // len(plan[partitions[first]]))
            some: dict[TermKey, dict[int, bytes]] = {}
            for partition, pieces in (
                await self._ask(app_id, partitions[first : first + count], plan)
            ).items():
                for term, piece in zip(plan[partition], pieces, strict=True):
                    if piece is not None:
                        some.setdefault(term, {})[partition] = piece
            for term, parts in some.items():
                found.setdefault(term, BitMap()).update(unite(parts))
            first += count
        return found

    async def _ask(
        self, app_id: int, partitions: Sequence[int], plan: Mapping[int, Sequence[TermKey]]
    ) -> dict[int, Sequence[bytes | None]]:
        calls = [
            self._engine.run("HMGET", of_partition(app_id, p, "terms"), *map(field_of, plan[p]))
            for p in partitions
        ]
        return dict(zip(partitions, await asyncio.gather(*calls), strict=True))

    async def _find_aliases(self, app_id: int, aliases: Sequence[str]) -> dict[TermKey, BitMap]:
        counts = await self._names.find(app_id, Term.ALIAS, aliases)
        plan: dict[int, list[str]] = {}
        for alias, words in counts.items():
            for group in places_of(words):
                plan.setdefault(group, []).append(alias)
        found: dict[TermKey, BitMap] = {(Term.ALIAS, alias): BitMap() for alias in aliases}
        for group, answers in (await self._look_for_aliases(app_id, plan)).items():
            for alias, devnos in zip(plan[group], answers, strict=True):
                found[Term.ALIAS, alias].update(devnos)
        return found

    async def _look_for_aliases(
        self, app_id: int, plan: Mapping[int, Sequence[str]]
    ) -> dict[int, list[list[int]]]:
        """For each group the devices that have its aliases, one list for each."""
        found: dict[int, list[list[int]]] = {}
        groups = list(plan)
        for first in range(0, len(groups), GROUPS_AT_ONCE):
            some = groups[first : first + GROUPS_AT_ONCE]
            digests = await asyncio.gather(*[self._read_digests(app_id, group) for group in some])
            for group, all_ in zip(some, digests, strict=True):
                start = group << GROUP_BITS
                found[group] = [
                    [start + place for place in find_digest(all_, alias_digest(alias))]
                    for alias in plan[group]
                ]
        return found

    def _read_digests(self, app_id: int, group: int) -> asyncio.Future[bytes]:
        start = group << GROUP_BITS
        first = start % PARTITION * DIGEST
        key = of_partition(app_id, start >> PARTITION_BITS, "aliases")
        return self._engine.run("GETRANGE", key, first, first + (DIGEST << GROUP_BITS) - 1)

    async def union(self, app_id: int, kind: Term, values: Sequence[str]) -> BitMap:
        """See `broker.store.Store.union_bitmap`: nothing of it is remembered."""
        if kind == Term.ALIAS:
            aliases = await self._find_aliases(app_id, list(dict.fromkeys(values)))
            return BitMap.union(BitMap(), *aliases.values())
        terms = [(kind, value) for value in dict.fromkeys(values)]
        versions = await self.versions(app_id) if kind in EVERYWHERE else _Versions()
        plan: dict[int, list[TermKey]] = {}
        for term, partitions in (await self._find_places(app_id, terms, versions)).items():
            for partition in partitions:
                plan.setdefault(partition, []).append(term)
        lists = await self._read_pieces(app_id, plan)
        return BitMap.union(BitMap(), *lists.values())

    async def list_terms(self, app_id: int, kind: Term) -> list[str]:
        """The terms of a kind that hold for some device, sorted."""
        if kind in EVERYWHERE:
            values = [""] if kind == Term.ALL else list(PLATFORMS)
            lists = await self.postings(app_id, [(kind, value) for value in values])
            return sorted(value for value, bits in zip(values, lists, strict=True) if bits)
        counts = await self._names.everything(app_id, kind)
        left = {value: places_of(words) for value, words in counts.items()}
        found: list[str] = []
        for checks in _CHECKS:
            there = await self._check(app_id, kind, {v: ps[:checks] for v, ps in left.items()})
            found += there
            left = {v: ps[checks:] for v, ps in left.items() if v not in there and ps[checks:]}
        return sorted(found)

    async def _check(self, app_id: int, kind: Term, places: Mapping[str, Sequence[int]]) -> set[str]:
        plan: dict[int, list[str]] = {}
        for value, partitions in places.items():
            for partition in partitions:
                plan.setdefault(partition, []).append(value)
        if kind == Term.ALIAS:
            answers: Mapping[int, Sequence[Any]] = await self._look_for_aliases(app_id, plan)
        else:
            answers = await self._look_for_terms(app_id, kind, plan)
        return {
            value for p, answer in answers.items() for value, one in zip(plan[p], answer, strict=True) if one
        }

    async def _look_for_terms(
        self, app_id: int, kind: Term, plan: Mapping[int, Sequence[str]]
    ) -> dict[int, list[int]]:
        calls = [
            self._engine.call(
                _there, [of_partition(app_id, p, "terms")], [field_of((kind, value)) for value in values]
            )
            for p, values in plan.items()
        ]
        return dict(zip(plan, await asyncio.gather(*calls), strict=True))

    # What is remembered

    def _kept(self, app_id: int, term: TermKey) -> _List | None:
        key = (app_id, term)
        one = self._lists.get(key)
        if one is None or self._clock() - one.read_at > LONGEST:
            return None
        self._lists.move_to_end(key)
        return one

    def _keep(self, app_id: int, term: TermKey, bits: BitMap, version: int, read_at: float) -> None:
        """Unless somebody else has read a newer one meanwhile."""
        before = self._lists.get((app_id, term))
        if before is not None and (before.version > version or before.bits is bits):
            before.version = max(before.version, version)
            return
        if before is not None:
            self._size -= before.weight
        weight = POSTING_OVERHEAD + len(term[1]) + memory_of(bits)
        self._lists[app_id, term] = _List(bits, version, read_at, weight)
        self._size += weight
        while self._size > self._limit and len(self._lists) > 1:
            self._size -= self._lists.popitem(last=False)[1].weight


def field_of(term: TermKey) -> str:
    """Its piece's, in the hash of a partition's pieces."""
    return f"{term[0]}{term[1]}"


def group_of(devno: int) -> int:
    return devno >> GROUP_BITS


def places_of(words: bytes) -> list[int]:
    """Of a term's value in the index (lua/terms_count.lua): partitions, or groups."""
    return [
        int.from_bytes(words[i : i + 4], "big") >> 8  # the rest is the count
        for i in range(0, len(words), 4)
    ]


def find_digest(digests: bytes, digest: bytes) -> Iterator[int]:
    """Where it is."""
    at = digests.find(digest)
    while at >= 0:
        if at % DIGEST == 0:
            yield at // DIGEST
        at = digests.find(digest, at + 1)


def _without(bits: BitMap, partitions: Iterable[int]) -> BitMap:
    bits = bits.copy()
    for partition in partitions:
        bits.remove_range(partition << PARTITION_BITS, (partition << PARTITION_BITS) + PARTITION)
    return bits
