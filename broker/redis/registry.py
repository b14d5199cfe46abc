"""Devices: who is registered, under which number, and what is known of each.

A registration: the name is reserved with a devno; then the device's entry, its posting pieces and its alias digest
are written, one script a partition; then the name is confirmed. A device is there once its entry is. Whoever finds a
name that was reserved and left so completes it under the same devno; two brokers that register the same name agree on
the devno of the one that reserved first. Whoever writes the entry has registered the device. Where that matters
(`register_new`), the script leaves a mark of its call beside it for a minute: so a call that is repeated, because its
answer was lost, is told from that of another broker that wrote the same. Devnos are given to each call in a block, so
they are dense but for crashes and for names that two brokers reserve in the same moment.

A change: entries are read, changed here, and written if they still are as they were read; else read again. Everything
about up to 100 devices of one partition happens or does not. Over several such slices, all that can refuse a change
is checked before the first is written; if Redis goes away in between, some devices are changed and others are not,
each with its index, and the caller, who got StoreUnavailable, may simply repeat the call.

Calls for one app wait for each other, and those that wait are done together: they keep their order, and share the
round trips.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import msgpack
from pyroaring import BitMap

from broker.audiences.device_terms import changed, differ, term_changes, terms, too_many
from broker.model import Device, DeviceChange, NewDevice, Term, TermKey
from broker.redis.engine import Engine
from broker.redis.generations import Generations
from broker.redis.keys import PARTITION, PARTITION_BITS, of_app, of_partition
from broker.redis.names import DEVICES, Names, devno_of
from broker.redis.pages import alias_digest, device_of, entry_of
from broker.redis.pieces import pack_places
from broker.redis.scripts import load
from broker.redis.terms import Place, Terms, field_of, group_of
from broker.store import StoreError, StoreUnavailable, TooMany, UnknownDevice

log = logging.getLogger(__name__)

GROUP: Final = 250  # devices of calls that are done together: some 10 ms of this process
TRIES: Final = 20  # times a device is read again because somebody else changed it
RESOLVED: Final = 131_072  # registration ids whose devno is remembered, about 300 bytes each
DROP_SLICE: Final = 512  # devices that lose a term in one go, so that other calls get between
WRITE_SLICE: Final = 100  # devices written by one script: 2 ms of Redis, which does nothing else meanwhile
READ_SLICE: Final = 64  # partitions read in one go
KEYS: Final = ("pages", "terms", "aliases")  # of a partition
APP_KEYS: Final = ("devnos", "begun", "changed", "generations")

_take: Final = load("devnos_take")
_read: Final = load("devices_read")
_write: Final = load("devices_write")
_changed: Final = load("devices_changed")
_older: Final = load("devices_older")

LastSeen: TypeAlias = Callable[[int, Sequence[int]], Awaitable[Mapping[int, float]]]
Handler: TypeAlias = Callable[[int, Sequence["_Call"]], Awaitable[Sequence[Any]]]
Known: TypeAlias = dict[int, tuple[Device, bytes]]  # devno -> the device, its entry as it was read
_Named: TypeAlias = dict[str, Device]  # by registration id
Changes: TypeAlias = Mapping[int, Sequence[DeviceChange]]  # by devno, in order


@dataclass(slots=True, eq=False)
class _Call:
    handler: Handler
    argument: Any
    size: int
    future: asyncio.Future[Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Edit:
    before: Device | None
    entry: bytes  # before
    after: Device


@dataclass(slots=True, eq=False)
class _Part:
    """What changes in one partition."""

    edits: list[_Edit] = field(default_factory=list)
    on: dict[TermKey, list[int]] = field(default_factory=dict)  # places that a term holds for from now on
    off: dict[TermKey, list[int]] = field(default_factory=dict)

    def add(self, edit: _Edit) -> None:
        self.edits.append(edit)
        after, place = edit.after, edit.after.devno % PARTITION
        old, new = (set(), terms(after)) if edit.before is None else term_changes(edit.before, after)
        for term in new:
            self.on.setdefault(term, []).append(place)
        for term in old:
            self.off.setdefault(term, []).append(place)

    def packed(self) -> bytes:
        """As lua/devices_write.lua takes it."""
        devices: list[int | bytes] = []
        digests: list[int | bytes] = []
        for edit in self.edits:
            before, after, place = edit.before, edit.after, edit.after.devno % PARTITION
            devices += (place, edit.entry, entry_of(after))
            if after.alias != (before.alias if before else None):
                digests += (place, alias_digest(after.alias))
        pieces: list[str | bytes] = []
        for term in self.on.keys() | self.off.keys():
            if term[0] != Term.ALIAS:
                on, off = self.on.get(term, ()), self.off.get(term, ())
                pieces += (field_of(term), pack_places(on), pack_places(off))
        packed: bytes = msgpack.packb((devices, pieces, digests), use_bin_type=False)  # cmsgpack knows no bin
        return packed


class Registry:
    """The store's methods about devices. `check` raises StoreError for an app that was deleted; `last_seen` gives
    when devices were online last."""

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float],
        names: Names,
        index: Terms,
        generations: Generations,
        check: Callable[[int], None],
        last_seen: LastSeen,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._names = names
        self._index = index
        self._generations = generations
        self._check = check
        self._last_seen = last_seen
        self._resolved: OrderedDict[tuple[int, str], int] = OrderedDict()
        self._queues: dict[int, deque[_Call]] = {}
        self._writers: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Finish what was begun."""
        while self._writers:
            await asyncio.wait(self._writers)

    # Calls that change something, one group of an app after the other

    async def _submit(self, app_id: int, handler: Handler, argument: Any, size: int) -> Any:
        self._check(app_id)
        call = _Call(handler, argument, size, asyncio.get_running_loop().create_future())
        queue = self._queues.get(app_id)
        if queue is None:
            self._queues[app_id] = deque((call,))
            task = asyncio.create_task(self._work(app_id))
            self._writers.add(task)
            task.add_done_callback(self._writers.discard)
        else:
            queue.append(call)
        return await call.future

    async def _work(self, app_id: int) -> None:
        queue = self._queues[app_id]
        await asyncio.sleep(0)  # what is called in the same turn of the loop goes along
        while queue:
            await self._carry_out(app_id, _next_group(queue))
        del self._queues[app_id]

    async def _carry_out(self, app_id: int, calls: Sequence[_Call]) -> None:
        try:
            results = await calls[0].handler(app_id, calls)
        except StoreError as error:
            results = [error] * len(calls)
        except Exception as error:  # noqa: BLE001 (handed to the callers)
            if len(calls) > 1:  # only the culprit fails
                for call in calls:
                    await self._carry_out(app_id, [call])
                return
            results = [error]
        for call, result in zip(calls, results, strict=True):
            if call.future.done():
                continue
            if isinstance(result, Exception):
                call.future.set_exception(result)
            else:
                call.future.set_result(result)

    # Registration

    async def register(self, app_id: int, devices: Sequence[NewDevice]) -> list[Device]:
        registered: list[Device] = await self._submit(app_id, self._register, devices, len(devices))
        return registered

    async def _register(self, app_id: int, calls: Sequence[_Call]) -> list[list[Device]]:
        wanted: dict[str, NewDevice] = {}
        for call in calls:
            for new in call.argument:
                wanted.setdefault(new.registration_id, new)
        there, made = await self._register_all(app_id, wanted)
        found = there | made
        return [[found[new.registration_id] for new in call.argument] for call in calls]

    async def register_new(self, app_id: int, device: NewDevice) -> Device | None:
        registered: Device | None = await self._submit(app_id, self._register_new, device, 1)
        return registered

    async def _register_new(self, app_id: int, calls: Sequence[_Call]) -> list[Device | None]:
        wanted = {call.argument.registration_id: call.argument for call in reversed(calls)}
        _, made = await self._register_all(app_id, wanted, secrets.token_bytes(8))
        # The first of several calls with one id gets the device.
        return [made.pop(call.argument.registration_id, None) for call in calls]

    async def _register_all(
        self, app_id: int, wanted: Mapping[str, NewDevice], mark: bytes = b""
    ) -> tuple[_Named, _Named]:
        """Those that were there, and those that were made here (certainly: only with a mark)."""
        there: _Named = {}
        made: _Named = {}
        for _ in range(TRIES):
            left = [new for rid, new in wanted.items() if rid not in there and rid not in made]
            if not left:
                return there, made
            found, fresh = await self._register_some(app_id, left, mark)
            there |= found
            made |= fresh
        raise StoreUnavailable("devices are registered too often at the same time")

    async def _register_some(
        self, app_id: int, wanted: Sequence[NewDevice], mark: bytes
    ) -> tuple[_Named, _Named]:
        """Those that are there, and those that were made; those that somebody else is just making are left out."""
        devnos, known = await self._look_up(app_id, [new.registration_id for new in wanted])
        found = {device.registration_id: device for device, _ in known.values()}
        missing = [new for new in wanted if new.registration_id not in found]
        if not missing:
            return found, {}
        unnamed = [new.registration_id for new in missing if new.registration_id not in devnos]
        now = self._clock()
        if unnamed:
            devnos |= await self._reserve(app_id, unnamed, now)
        edits = [
            _Edit(None, b"", _new_device(app_id, devnos[new.registration_id], new, now)) for new in missing
        ]
        refused = await self._store(app_id, edits, confirm=True, mark=mark)
        made = [edit.after for edit in edits if edit.after.devno not in refused]
        return found, {device.registration_id: device for device in made}

    async def _reserve(self, app_id: int, rids: Sequence[str], now: float) -> dict[str, int]:
        keys = [of_app(app_id, what) for what in ("devnos", "begun", "deleted")]
        first: int = await self._engine.call(_take, keys, (len(rids), now))
        if first < 0:
            raise StoreError(f"app {app_id} was deleted")
        return await self._names.reserve(app_id, {rid: first + i for i, rid in enumerate(rids)})

    # Changes

    async def change_devices(self, app_id: int, changes: Mapping[str, DeviceChange]) -> dict[str, Device]:
        by_name: dict[str, Device] = await self._submit(app_id, self._change, changes, len(changes))
        seen = await self._last_seen(app_id, [device.devno for device in by_name.values()])
        return {rid: replace(d, last_online_at=seen.get(d.devno)) for rid, d in by_name.items()}

    async def _change(self, app_id: int, calls: Sequence[_Call]) -> list[dict[str, Device] | StoreError]:
        """Decide about each call in its order, then make the changes of those that can be made."""
        names = list(dict.fromkeys(rid for call in calls for rid in call.argument))
        devnos, known = await self._look_up(app_id, names)
        now = {rid: known[devno][0] for rid, devno in devnos.items() if devno in known}
        accepted: dict[int, list[DeviceChange]] = {}
        results: list[Any] = []
        places: list[
            dict[str, tuple[int, int]]
        ] = []  # of each call: rid -> devno, how many changes it has then
        for call in calls:
            changes: Mapping[str, DeviceChange] = call.argument
            refusal, after = _decide(now, changes)
            results.append(refusal)
            places.append({})
            if refusal is not None:
                continue
            now |= after
            for rid, change in changes.items():
                chain = accepted.setdefault(devnos[rid], [])
                chain.append(change)
                places[-1][rid] = devnos[rid], len(chain)
        states = await self._apply(app_id, known, accepted)
        return [
            refusal or {rid: states[devno][count] for rid, (devno, count) in places[i].items()}
            for i, refusal in enumerate(results)
        ]

    async def _apply(self, app_id: int, known: Known, changes: Changes) -> dict[int, list[Device]]:
        """Make the changes; returns what each device was before, and after each of its changes."""
        states: dict[int, list[Device]] = {}
        left = list(changes)
        for _ in range(TRIES):
            edits = []
            for devno in left:
                device, entry = known[devno]
                states[devno] = [device]
                for change in changes[devno]:
                    states[devno].append(changed(states[devno][-1], change))
                if differ(device, states[devno][-1]):
                    edits.append(_Edit(device, entry, states[devno][-1]))
            left = list(await self._store(app_id, edits)) if edits else []
            if not left:
                return states
            known = await self._read(app_id, left)
        raise StoreUnavailable("devices are changed too often at the same time; some of the changes are made")

    async def drop_term(self, app_id: int, term: TermKey, only: BitMap | None = None) -> BitMap:
        (posting,) = await self._index.postings(app_id, [term])
        left = posting.copy() if only is None else posting & only
        dropped = BitMap()
        while left:
            part = left[:DROP_SLICE]
            dropped |= await self._submit(app_id, self._drop, (term, part), len(part))
            left -= part
        return dropped

    async def _drop(self, app_id: int, calls: Sequence[_Call]) -> list[BitMap]:
        known = await self._read(app_id, BitMap.union(*[devnos for _, devnos in (c.argument for c in calls)]))
        changes: dict[int, list[DeviceChange]] = {}
        dropped: list[BitMap] = []
        for call in calls:
            (kind, value), devnos = call.argument
            change = (
                DeviceChange(remove_tags=frozenset((value,))) if kind == Term.TAG else DeviceChange(alias="")
            )
            dropped.append(BitMap([d for d in devnos if d in known and (kind, value) in terms(known[d][0])]))
            for devno in dropped[-1]:
                changes.setdefault(devno, []).append(change)
        await self._apply(app_id, known, changes)
        return dropped

    # Writing

    async def _store(
        self, app_id: int, edits: Iterable[_Edit], confirm: bool = False, mark: bytes = b""
    ) -> set[int]:
        """Write devices with what follows from them. Returns the devnos of those slices in which somebody else
        was faster: nothing was changed there."""
        parts: dict[tuple[int, int], _Part] = {}
        sizes: Counter[int] = Counter()
        for edit in edits:
            partition = edit.after.devno >> PARTITION_BITS
            parts.setdefault((partition, sizes[partition] // WRITE_SLICE), _Part()).add(edit)
            sizes[partition] += 1
        await self._index.count_up(app_id, _places(parts, on=True))
        answers = await asyncio.gather(
            *[self._write(app_id, partition, part, mark) for (partition, _), part in parts.items()],
            return_exceptions=True,
        )
        written, refused, failed = {}, {}, []
        for (place, part), answer in zip(parts.items(), answers, strict=True):
            if isinstance(answer, BaseException):
                failed.append(answer)
            elif answer:
                refused[place] = part
            else:
                written[place] = part
        gone = Counter(_places(written, on=False)) + Counter(_places(refused, on=True))
        await asyncio.gather(
            self._tell(app_id, {p for p, _ in parts.keys() - refused.keys()}, written.values()),
            self._index.count_down(app_id, gone),
            self._confirm(app_id, written.values() if confirm else ()),
        )
        if failed:
            self._index.forget(app_id)
            raise failed[0]
        return {edit.after.devno for part in refused.values() for edit in part.edits}

    def _write(self, app_id: int, partition: int, part: _Part, mark: bytes) -> asyncio.Future[Any]:
        keys = [of_partition(app_id, partition, what) for what in KEYS]
        return self._engine.call(_write, keys, (part.packed(), mark) if mark else (part.packed(),))

    async def _tell(self, app_id: int, partitions: Iterable[int], parts: Iterable[_Part]) -> None:
        """Everybody who remembers posting lists or token generations."""
        raised = {
            edit.after.devno: edit.after.token_generation
            for part in parts
            for edit in part.edits
            if edit.before is not None and edit.before.token_generation != edit.after.token_generation
        }
        words: list[str | bytes | int | float] = [" ".join(map(str, partitions))]
        words += [word for pair in raised.items() for word in pair]
        if words == [""]:
            return
        try:
            await self._engine.call(
                _changed, [of_app(app_id, "changed"), of_app(app_id, "generations")], words
            )
        except StoreError:
            self._index.forget(app_id)
            raise
        if raised:
            await self._generations.raised(app_id, raised)

    async def _confirm(self, app_id: int, parts: Iterable[_Part]) -> None:
        """If that fails the names stay reserved, which costs those who look them up a second look."""
        names = {edit.after.registration_id: edit.after.devno for part in parts for edit in part.edits}
        try:
            await self._names.confirm(app_id, names)
        except StoreError as error:
            log.warning("app %d: %d registration ids stay reserved: %s", app_id, len(names), error)

    # Reading

    async def _read(self, app_id: int, devnos: Iterable[int]) -> Known:
        """Those that are there."""
        parts: dict[int, list[int]] = {}
        for devno in devnos:
            parts.setdefault(devno >> PARTITION_BITS, []).append(devno)
        found: Known = {}
        partitions = list(parts)
        for first in range(0, len(partitions), READ_SLICE):
            some = partitions[first : first + READ_SLICE]
            answers = await asyncio.gather(
                *[
                    self._engine.call(
                        _read, [of_partition(app_id, p, "pages")], [devno % PARTITION for devno in parts[p]]
                    )
                    for p in some
                ]
            )
            for partition, entries in zip(some, answers, strict=True):
                for devno, entry in zip(parts[partition], entries, strict=True):
                    if entry:
                        found[devno] = device_of(app_id, devno, entry), entry
        return found

    async def _look_up(self, app_id: int, rids: Iterable[str]) -> tuple[dict[str, int], Known]:
        """The devnos that these names have, reserved ones included, and the devices that are there."""
        values = await self._names.find(app_id, DEVICES, rids)
        devnos = {rid: devno_of(value)[0] for rid, value in values.items()}
        return devnos, await self._read(app_id, devnos.values())

    async def find_devices(self, app_id: int, registration_ids: Sequence[str]) -> dict[str, Device]:
        devnos, known = await self._look_up(app_id, registration_ids)
        seen = await self._last_seen(app_id, list(known))
        return {
            rid: replace(known[devno][0], last_online_at=seen.get(devno))
            for rid, devno in devnos.items()
            if devno in known
        }

    async def names(self, app_id: int, devnos: Sequence[int]) -> dict[int, str]:
        known = await self._read(app_id, dict.fromkeys(devnos))
        return {devno: known[devno][0].registration_id for devno in devnos if devno in known}

    async def resolve(self, app_id: int, registration_ids: Sequence[str]) -> dict[str, int]:
        """A name never changes its devno, and no device goes: what was found once holds."""
        resolved = self._resolved
        known = {rid: resolved.get((app_id, rid)) for rid in registration_ids}
        missing = [rid for rid, devno in known.items() if devno is None]
        if missing:
            found = await self._find_devnos(app_id, missing)
            known |= found
            resolved.update({(app_id, rid): devno for rid, devno in found.items()})
            while len(resolved) > RESOLVED:
                resolved.popitem(last=False)
        return {rid: devno for rid, devno in known.items() if devno is not None}

    async def resolve_bitmap(self, app_id: int, registration_ids: Sequence[str]) -> BitMap:
        return BitMap(list((await self._find_devnos(app_id, registration_ids)).values()))

    async def _find_devnos(self, app_id: int, rids: Iterable[str]) -> dict[str, int]:
        values = await self._names.find(app_id, DEVICES, rids)
        devnos: dict[str, int] = {}
        reserved: dict[str, int] = {}
        for rid, value in values.items():
            devno, in_use = devno_of(value)
            (devnos if in_use else reserved)[rid] = devno
        if reserved:
            there = await self._read(app_id, reserved.values())
            devnos |= {rid: devno for rid, devno in reserved.items() if devno in there}
        return devnos

    async def registered_before(self, app_id: int, times: Sequence[float]) -> list[int]:
        """Found by the times at which partitions were begun, then by the devices' own. Devnos that nobody has, left
        by a crash, are counted."""
        return list(await asyncio.gather(*[self._registered_before(app_id, time) for time in times]))

    async def _registered_before(self, app_id: int, time: float) -> int:
        begun = of_app(app_id, "begun")
        last = await self._engine.run("ZREVRANGEBYSCORE", begun, f"({time!r}", "-inf", "LIMIT", 0, 1)
        if not last:
            return 0
        partition = int(last[0])
        (places,) = await self._engine.call(_older, [of_partition(app_id, partition, "pages")], (repr(time),))
        return partition * PARTITION + int(places)

    # Deleted apps

    async def span(self, app_id: int) -> range:
        """The app's partitions."""
        devnos = int(await self._engine.run("GET", of_app(app_id, "devnos")) or 0)
        return range(-(-devnos // PARTITION))

    async def purge(self, app_id: int, partitions: range, budget: int) -> int:
        self._index.forget(app_id)
        gone = await self._names.purge(app_id, (DEVICES, *Term), budget)
        for first in range(0, len(partitions), READ_SLICE):
            if gone >= budget:
                return gone
            some = partitions[first : first + READ_SLICE]
            gone += sum(await asyncio.gather(*[self._remove(app_id, partition) for partition in some]))
        return gone + int(await self._engine.run("UNLINK", *[of_app(app_id, key) for key in APP_KEYS]))

    def _remove(self, app_id: int, partition: int) -> asyncio.Future[int]:
        return self._engine.run("UNLINK", *[of_partition(app_id, partition, key) for key in KEYS])


def _next_group(queue: deque[_Call]) -> list[_Call]:
    """Calls of one kind, in their order."""
    calls = [queue.popleft()]
    size = calls[0].size
    while queue and queue[0].handler == calls[0].handler and size + queue[0].size <= GROUP:
        calls.append(queue.popleft())
        size += calls[-1].size
    return calls


def _new_device(app_id: int, devno: int, new: NewDevice, now: float) -> Device:
    return Device(
        app_id,
        devno,
        new.registration_id,
        new.platform,
        new.alias or None,
        new.tags,
        new.mobile or None,
        0,
        now,
        None,
        new.attributes,
    )


def _decide(
    now: Mapping[str, Device], changes: Mapping[str, DeviceChange]
) -> tuple[StoreError | None, dict[str, Device]]:
    """Why the changes cannot be made, or what the devices are after them."""
    unknown = next((rid for rid in changes if rid not in now), None)
    if unknown is not None:
        return UnknownDevice(unknown), {}
    after = {rid: changed(now[rid], change) for rid, change in changes.items()}
    crowded = next((problem for rid in changes if (problem := too_many(after[rid], changes[rid]))), None)
    return (TooMany(crowded), {}) if crowded is not None else (None, after)


def _places(parts: Mapping[tuple[int, int], _Part], on: bool) -> dict[Place, int]:
    """How many devices of each place a term begins to hold for, or ends to."""
    counts: Counter[Place] = Counter()
    for (partition, _), part in parts.items():
        for (kind, value), places in (part.on if on else part.off).items():
            if kind == Term.ALIAS:
                first = partition << PARTITION_BITS
                counts.update((kind, value, group_of(first + place)) for place in places)
            else:
                counts[kind, value, partition] += len(places)
    return counts
