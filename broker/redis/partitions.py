"""Routes and inboxes: what every device has, packed by partition, so that it costs no key and no task of its own.

Each call touches one partition, where a script is atomic; a set of devices is as many calls at once as it has
partitions. Claims and releases of one turn of the loop go together, in their order: one call a partition.

Whether a node lives is decided here, by the table of nodes, never by a script: scripts answer who has the route.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import ceil, inf
from typing import Any, Final, NamedTuple, Protocol

from pyroaring import BitMap

from broker.model import Claim, OwedRequest, Route, RouteCheck
from broker.redis.engine import Engine
from broker.redis.keys import PARTITION, PARTITION_BITS, of_app, of_node, of_partition
from broker.redis.pieces import BITS, unite
from broker.redis.scripts import load
from broker.store import StoreError

log = logging.getLogger(__name__)

RETRY: Final = (
    0.05,
    1.0,
)  # seconds until a claim or release that failed is tried again: the first, the longest
RELEASE_TRIES: Final = (
    8  # a release that is lost leaves the device online until its next claim or its node's end
)
EXPIRED_GRACE: Final = 60.0  # seconds until an expired message is taken out: clocks may differ by so much
REAPED_AT_ONCE: Final = 512  # routes of a partition: about a millisecond of Redis
PARTITIONS_AT_ONCE: Final = 64  # looked at for routes of a dead node
MANY: Final = 10_000  # devices; fewer are looked at one by one
MAX_TIME: Final = 0xFFFF_FFFF

_RELEASE: Final = struct.Struct(">BHII")
_CLAIM: Final = _RELEASE
_CLAIMED: Final = struct.Struct(">IIB")
_ROUTE: Final = struct.Struct(">III")
_BELIEF: Final = struct.Struct(">HI")
_NODE: Final = struct.Struct(">HI")
_REQUEST: Final = struct.Struct(">HQH")
_DEVICE: Final = struct.Struct(">HBH")
_ENTRY: Final = struct.Struct(">QI")
_OUT: Final = struct.Struct(">HH")
_TIME: Final = struct.Struct(">d")
_GONE: Final = struct.Struct(">QH")

_routes = load("routes")
_inspect = load("inspect")
_online = load("online")
_reap = load("reap")
_put = load("put")
_evict = load("evict")
_owed = load("owed")
_take_out = load("take_out")


class Nodes(Protocol):
    """What is asked of the table of nodes."""

    @property
    def number(self) -> int: ...

    @property
    def name(self) -> str: ...

    async def ensure(self, name: str) -> int: ...

    def is_live(self, number: int) -> bool: ...

    def may_hear(self, number: int) -> bool: ...

    def name_of(self, number: int) -> str: ...

    async def refresh(self) -> bool: ...

    def dead(self) -> Sequence[int]: ...


class Inbox(NamedTuple):
    """What one device gets, oldest first."""

    entries: list[tuple[int, float]]  # msg_id, when it expires; 0: it is not kept
    evicts: bool


class Eviction(NamedTuple):
    """What the newest-N rule took out of one partition's inboxes, and nobody recorded yet."""

    partition: int
    at: float
    dropped: list[tuple[int, int]]  # msg_id, devno
    packed: bytes  # to be named when it is recorded


class Put(NamedTuple):
    """The answer to one round of puts."""

    routes: dict[int, int]  # devno -> the node to ring: it lives, or may wake up
    evictions: list[Eviction]


class _Op(NamedTuple):
    """A claim (with `done`) or a release, on its way."""

    devno: int
    node: str
    epoch: int
    seen: int
    done: Callable[[Claim], None] | None
    tries: int = 0


class Partitions:
    """`noted` is called with (app_id, devno) for each claim. `clock` gives Unix seconds."""

    def __init__(
        self,
        engine: Engine,
        nodes: Nodes,
        clock: Callable[[], float],
        noted: Callable[[int, int], None] | None = None,
    ) -> None:
        self._engine = engine
        self._nodes = nodes
        self._clock = clock
        self._noted = noted
        self._ops: dict[int, list[_Op]] = {}  # by app, of this turn of the loop
        self._held: dict[int, list[_Op]] = {}  # by app: until it is known where they go
        self._spans: dict[int, int] = {}  # app -> partitions that are known to be counted
        self._listed: set[tuple[int, int]] = set()  # node, app: the node's list has the app
        self._sent: set[asyncio.Future[Any]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: dict[int, asyncio.TimerHandle] = {}  # until something is tried again
        self._timer_count = 0
        self._name = secrets.token_hex(4)  # of the caller, for Redis
        self._calls = 0
        self._reaped: set[int] = set()  # dead nodes without routes
        self._closed = False

    async def close(self) -> None:
        """Returns when claims and releases have gone, or failed once more."""
        self._closed = True
        self.flush()
        while self._sent or self._tasks:
            await asyncio.wait((*self._sent, *self._tasks))
        for timer in self._timers.values():
            timer.cancel()

    # Claims and releases

    def claim_route(self, app_id: int, devno: int, node_id: str, done: Callable[[Claim], None]) -> None:
        """See Store. While Redis is away it is tried again and again."""
        if self._noted is not None:
            self._noted(app_id, devno)
        self._add(app_id, _Op(devno, node_id, 0, 0, done))

    def release_route(self, app_id: int, devno: int, epoch: int, now: float) -> None:
        self._add(app_id, _Op(devno, "", epoch, _seconds(now), None))

    def _add(self, app_id: int, op: _Op) -> None:
        if not self._ops:
            asyncio.get_running_loop().call_soon(self.flush)
        self._ops.setdefault(app_id, []).append(op)

    def flush(self) -> None:
        """Send what was gathered, so that whoever asks now sees it."""
        gathered, self._ops = self._ops, {}
        for app_id, ops in gathered.items():
            if app_id in self._held:
                self._held[app_id] += ops
            elif self._is_known(app_id, ops):
                self._send(app_id, ops, self._nodes.number)
            else:
                self._held[app_id] = ops
                self._start(self._prepare(app_id))

    def _is_known(self, app_id: int, ops: Sequence[_Op]) -> bool:
        """Whether everybody who looks for these routes will look there."""
        nodes, span = self._nodes, self._spans.get(app_id, 0)
        return all(
            op.done is None
            or (
                op.node == nodes.name
                and op.devno >> PARTITION_BITS < span
                and (nodes.number, app_id) in self._listed
            )
            for op in ops
        )

    async def _prepare(self, app_id: int) -> None:
        """Write down, before the routes, which partitions the app has and that the nodes are in it."""
        try:
            while ops := self._held[app_id]:
                self._held[app_id] = []
                await self._prepare_some(app_id, ops)
        finally:
            del self._held[app_id]

    async def _prepare_some(self, app_id: int, ops: Sequence[_Op]) -> None:
        numbers: dict[str, int] = {}
        try:
            for name in {op.node for op in ops if op.done is not None}:
                numbers[name] = number = await self._nodes.ensure(name)
                await self._list(number, app_id)
            await self._widen(app_id, max(op.devno for op in ops))
        except StoreError as error:
            self._failed(app_id, ops, error)
            return
        run: list[_Op] = []  # of one node: those of one partition stay in order
        for op in ops:
            if run and op.done is not None and op.node != run[-1].node:
                self._send(app_id, run, numbers.get(run[-1].node, 0))
                run = []
            run.append(op if op.done is not None or not run else op._replace(node=run[-1].node))
        if run:
            self._send(app_id, run, numbers.get(run[-1].node, 0))

    async def _list(self, number: int, app_id: int) -> None:
        if (number, app_id) not in self._listed:
            await self._engine.run("SADD", of_node(number, "apps"), app_id)
            self._listed.add((number, app_id))

    async def _widen(self, app_id: int, devno: int) -> None:
        """A sorted set of one member is a number that only grows."""
        count = (devno >> PARTITION_BITS) + 1
        if count > self._spans.get(app_id, 0):
            await self._engine.run("ZADD", of_app(app_id, "span"), "GT", count, "partitions")
            self._spans[app_id] = max(count, self._spans.get(app_id, 0))

    def _send(self, app_id: int, ops: Sequence[_Op], node: int) -> None:
        for partition, some in _by_partition(ops).items():
            packed = b"".join(
                [
                    _CLAIM.pack(1, op.devno % PARTITION, node, 0)
                    if op.done is not None
                    else _RELEASE.pack(0, op.devno % PARTITION, op.epoch & MAX_TIME, op.seen)
                    for op in some
                ]
            )
            self._calls += 1
            future = self._engine.call(
                _routes, (of_partition(app_id, partition, "routes"),), (packed, self._name, self._calls)
            )
            self._sent.add(future)
            future.add_done_callback(lambda sent, some=some: self._answered(app_id, node, some, sent))  # type: ignore[misc]

    def _answered(self, app_id: int, node: int, ops: Sequence[_Op], sent: asyncio.Future[Any]) -> None:
        self._sent.discard(sent)
        if sent.cancelled():
            return
        error = sent.exception()
        if error is not None:
            self._failed(app_id, ops, error)
            return
        claims: list[tuple[_Op, int, bool, int]] = []
        for op, (epoch, former, owes) in zip(ops, _CLAIMED.iter_unpack(sent.result()), strict=True):
            if op.done is not None and not epoch:
                self._add(app_id, op)  # a later call was carried out first
            elif op.done is not None:
                claims.append((op, epoch, owes != 0, 0 if former == node else former))
        if any(former and not self._nodes.name_of(former) for _, _, _, former in claims):
            self._start(self._tell_later(claims))
        else:
            self._tell(claims)

    async def _tell_later(self, claims: Sequence[tuple[_Op, int, bool, int]]) -> None:
        """A former node that joined since the last look at the table has to be told as well."""
        try:
            await self._nodes.refresh()
        except StoreError as error:
            log.warning("who had these devices before cannot be looked up: %s", error)
        self._tell(claims)

    def _tell(self, claims: Sequence[tuple[_Op, int, bool, int]]) -> None:
        for op, epoch, owes, former in claims:
            assert op.done is not None
            name = self._nodes.name_of(former) if former and self._nodes.may_hear(former) else ""
            try:
                op.done(Claim(epoch, owes, name))
            except Exception:
                log.exception("a claim's caller failed")

    def _failed(self, app_id: int, ops: Sequence[_Op], error: BaseException) -> None:
        if not isinstance(error, StoreError):
            log.error("claims and releases of routes failed", exc_info=error)
        again = [
            op._replace(tries=op.tries + 1) for op in ops if op.done is not None or op.tries < RELEASE_TRIES
        ]
        if len(again) < len(ops):
            log.warning("app %d: %d routes were not released: %s", app_id, len(ops) - len(again), error)
        if again and not self._closed:
            first, longest = RETRY
            delay = min(first * 2 ** min(again[0].tries, 8), longest)
            self._timer_count += 1
            self._timers[self._timer_count] = asyncio.get_running_loop().call_later(
                delay, self._again, app_id, again, self._timer_count
            )

    def _again(self, app_id: int, ops: Sequence[_Op], timer: int) -> None:
        del self._timers[timer]
        for op in ops:
            self._add(app_id, op)

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Who is where

    async def inspect_routes(self, app_id: int, routes: Mapping[int, int]) -> RouteCheck:
        self.flush()
        parts = split(routes)
        answers = await asyncio.gather(
            *[
                self._engine.call(
                    _inspect,
                    (of_partition(app_id, partition, "routes"),),
                    (
                        b"".join([_BELIEF.pack(devno % PARTITION, routes[devno]) for devno in devnos]),
                        self._nodes.number,
                    ),
                )
                for partition, devnos in parts.items()
            ]
        )
        lost, owing = BitMap(), BitMap()
        for partition, (gone, owes) in zip(parts, answers, strict=True):
            base = partition << PARTITION_BITS
            lost.update([base + offset for (offset,) in struct.iter_unpack(">H", gone)])
            owing.update([base + offset for (offset,) in struct.iter_unpack(">H", owes)])
        return RouteCheck(lost, owing)

    async def online(self, app_id: int, devnos: BitMap | None = None) -> BitMap:
        """Those with a route to a live node. Exact; it costs one small call a partition, and where a node died
        lately, 48 KB."""
        self.flush()
        if devnos is None:
            parts: Mapping[int, list[int] | None] = dict.fromkeys(range(await self._span(app_id)))
        else:
            parts = split(devnos) if len(devnos) <= MANY else dict.fromkeys(_partitions(devnos))
        answers = await asyncio.gather(*[self._bits(app_id, partition) for partition in parts])
        few: list[int] = []
        pieces: dict[int, bytes] = {}
        for (partition, asked), bits in zip(parts.items(), answers, strict=True):
            if asked is not None:
                few += [devno for devno in asked if _has(bits, devno % PARTITION)]
            elif bits:
                pieces[partition] = bits.ljust(BITS, b"\0")
        online = unite(pieces)
        online.update(few)
        return online if devnos is None else online & devnos

    async def _bits(self, app_id: int, partition: int) -> bytes:
        """One for each place, low bits first; zeros at the end may be left out."""
        key = of_partition(app_id, partition, "routes")
        bits, nodes = await self._engine.call(_online, (key,))
        is_live = self._nodes.is_live
        if bits is None or all(is_live(int(number)) for number in nodes):
            return bits or b""
        routes: bytes = await self._engine.run("GET", key) or b""
        live = bytearray(BITS)
        for place, (node, _, _) in enumerate(_ROUTE.iter_unpack(routes)):
            if node and is_live(node):
                live[place >> 3] |= 1 << (place & 7)
        return bytes(live)

    async def find_routes(self, app_id: int, devnos: Sequence[int]) -> dict[int, Route]:
        found = await self._read_routes(app_id, devnos)
        is_live, name_of = self._nodes.is_live, self._nodes.name_of
        return {
            devno: Route(
                name_of(node) if node and is_live(node) else "", epoch, float(seen) if seen else None
            )
            for devno, (node, epoch, seen) in found.items()
        }

    async def last_seen(self, app_id: int, devnos: Sequence[int]) -> dict[int, float]:
        """When they were last online, in whole Unix seconds; those that never left are left out."""
        found = await self._read_routes(app_id, devnos)
        return {devno: float(seen) for devno, (_, _, seen) in found.items() if seen}

    async def _read_routes(self, app_id: int, devnos: Sequence[int]) -> dict[int, tuple[int, int, int]]:
        """node, epoch, last seen of those that ever had a route."""
        self.flush()
        answers = await asyncio.gather(
            *[
                self._engine.run(
                    "GETRANGE",
                    of_partition(app_id, devno >> PARTITION_BITS, "routes"),
                    devno % PARTITION * _ROUTE.size,
                    devno % PARTITION * _ROUTE.size + _ROUTE.size - 1,
                )
                for devno in devnos
            ]
        )
        routes = [_ROUTE.unpack(answer) if answer else (0, 0, 0) for answer in answers]
        return {devno: route for devno, route in zip(devnos, routes, strict=True) if route[1]}

    # Inboxes

    async def put(self, app_id: int, inboxes: Mapping[int, Inbox], limit: int) -> Put:
        """Put messages into inboxes (devno -> what it gets), in the order of their ids over all calls. The newest-N
        rule holds for whoever has no live route. Called again with the same it changes nothing."""
        now, parts = self._clock(), split(inboxes)
        answers = await asyncio.gather(
            *[
                self._engine.call(
                    _put,
                    (of_partition(app_id, partition, "top"),),
                    (limit, int(now), _TIME.pack(now), _pack_inboxes(inboxes, devnos)),
                )
                for partition, devnos in parts.items()
            ]
        )
        routes: dict[int, int] = {}
        evictions: list[Eviction] = []
        away: dict[int, list[bytes]] = {}  # of dead nodes' devices that have too much
        is_live, may_hear = self._nodes.is_live, self._nodes.may_hear
        for partition, (routed, over, dropped) in zip(parts, answers, strict=True):
            base = partition << PARTITION_BITS
            routes.update(
                [(base + offset, node) for offset, node in _NODE.iter_unpack(routed) if may_hear(node)]
            )
            dead = [_NODE.pack(*pair) for pair in _NODE.iter_unpack(over) if not is_live(pair[1])]
            if dead:
                away[partition] = dead
            else:
                evictions += _evictions(partition, dropped)
        if away:
            evictions += await self._evict(app_id, away, limit, now)
        return Put(routes, evictions)

    async def _evict(
        self, app_id: int, away: Mapping[int, Sequence[bytes]], limit: int, now: float
    ) -> list[Eviction]:
        answers = await asyncio.gather(
            *[
                self._engine.call(
                    _evict,
                    (of_partition(app_id, partition, "top"),),
                    (limit, _TIME.pack(now), b"".join(devices)),
                )
                for partition, devices in away.items()
            ]
        )
        return [one for p, dropped in zip(away, answers, strict=True) for one in _evictions(p, dropped)]

    async def recorded(self, app_id: int, evictions: Iterable[Eviction]) -> None:
        """What became of these is in the messages' reports: forget it."""
        await asyncio.gather(
            *[
                self._engine.run("LREM", of_partition(app_id, one.partition, "evicted"), 1, one.packed)
                for one in evictions
            ]
        )

    async def owed_ids(self, requests: Sequence[OwedRequest]) -> list[list[int]]:
        """For each request the msg_ids that wait, oldest first, at most `limit`; by whole seconds unexpired."""
        now, parts = self._clock(), _by_partition_of_app(requests)
        answers = await asyncio.gather(
            *[
                self._engine.call(
                    _owed,
                    (of_partition(app_id, partition, "top"),),
                    (int(now), int(EXPIRED_GRACE), b"".join([_pack_request(requests[i]) for i in places])),
                )
                for (app_id, partition), places in parts.items()
            ]
        )
        owed: list[list[int]] = [[]] * len(requests)
        for places, lists in zip(parts.values(), answers, strict=True):
            for place, ids in zip(places, lists, strict=True):
                owed[place] = [msg_id for (msg_id,) in struct.iter_unpack(">Q", ids)]
        return owed

    async def take_out(
        self, app_id: int, messages: Mapping[int, Sequence[int]], node: int | None = None
    ) -> BitMap:
        """Take messages (devno -> msg_ids) out of inboxes. With a node: where the route is that one's, or nobody's
        who lives; returns the devnos whose route is another's, which are left as they are."""
        refused = await self._take_out(app_id, messages, node)
        by_dead: dict[int, dict[int, Sequence[int]]] = {}
        for devno, other in refused.items():
            if not self._nodes.is_live(other):
                by_dead.setdefault(other, {})[devno] = messages[devno]
        if by_dead:
            again = await asyncio.gather(
                *[self._take_out(app_id, some, dead) for dead, some in by_dead.items()]
            )
            taken = BitMap([devno for some in by_dead.values() for devno in some])
            still = BitMap([devno for some in again for devno in some])
            return (BitMap(list(refused)) - taken) | still
        return BitMap(list(refused))

    async def _take_out(
        self, app_id: int, messages: Mapping[int, Sequence[int]], node: int | None
    ) -> dict[int, int]:
        parts = split(messages)
        name = b"" if node is None else struct.pack(">I", node)
        answers = await asyncio.gather(
            *[
                self._engine.call(
                    _take_out,
                    (of_partition(app_id, partition, "top"),),
                    (name, b"".join([_pack_out(devno % PARTITION, messages[devno]) for devno in devnos])),
                )
                for partition, devnos in parts.items()
            ]
        )
        return {
            (partition << PARTITION_BITS) + offset: other
            for partition, refused in zip(parts, answers, strict=True)
            for offset, other in _NODE.iter_unpack(refused)
        }

    # Upkeep

    async def expire(self, now: float, budget: int) -> int:
        """Erase routes of nodes that will not come back; returns how many."""
        dead = set(self._nodes.dead())
        self._reaped &= dead
        erased = 0
        for number in sorted(dead - self._reaped):
            erased += await self._reap(number, budget - erased)
            if erased >= budget:
                break
        return erased

    async def _reap(self, number: int, budget: int) -> int:
        """What is left of the list of its apps says how far it has come."""
        erased = 0
        while True:
            apps = await self._engine.run("SRANDMEMBER", of_node(number, "apps"), 16)
            if not apps:
                self._reaped.add(number)
                return erased
            for app_id in map(int, apps):
                erased += await self._reap_app(number, app_id, budget - erased)
                if erased >= budget:
                    return erased
                await self._engine.run("SREM", of_node(number, "apps"), app_id)

    async def _reap_app(self, number: int, app_id: int, budget: int) -> int:
        span = await self._span(app_id)
        erased = 0
        for first in range(0, span, PARTITIONS_AT_ONCE):
            partitions = range(first, min(first + PARTITIONS_AT_ONCE, span))
            while erased < budget:
                counts: list[int] = await asyncio.gather(
                    *[
                        self._engine.call(
                            _reap, (of_partition(app_id, partition, "routes"),), (number, REAPED_AT_ONCE)
                        )
                        for partition in partitions
                    ]
                )
                if not any(counts):
                    break
                erased += sum(counts)
                partitions = [p for p, count in zip(partitions, counts, strict=True) if count]  # type: ignore[assignment]
        return erased

    async def purge(self, app_id: int, partitions: range, budget: int) -> int:
        """Of a deleted app; returns how many keys went. `partitions`: at least those of its devices."""
        span = await self._span(app_id)
        self._spans.pop(app_id, None)
        names = ["routes", "on", "nodes", "formers", "calls", "top", "evicted"]
        names += [f"in:{n}" for n in range(PARTITION // 64)]
        removed = 0
        for partition in range(max(span, partitions.stop)):
            keys = [of_partition(app_id, partition, name) for name in names]
            removed += int(await self._engine.run("UNLINK", *keys))
            if removed >= budget:
                return removed
        return removed + int(await self._engine.run("UNLINK", of_app(app_id, "span")))

    async def _span(self, app_id: int) -> int:
        """Partitions that ever had a route, counted from the first."""
        return int(float(await self._engine.run("ZSCORE", of_app(app_id, "span"), "partitions") or 0))


def split(devnos: Iterable[int]) -> dict[int, list[int]]:
    """By partition, ascending."""
    parts: dict[int, list[int]] = {}
    for devno in devnos if isinstance(devnos, BitMap) else sorted(devnos):
        parts.setdefault(devno >> PARTITION_BITS, []).append(devno)
    return parts


def _partitions(devnos: BitMap) -> list[int]:
    """Those that have some of them: a quarter of a microsecond each, however many devices there are."""
    return [
        partition
        for partition in range(devnos.min() >> PARTITION_BITS, (devnos.max() >> PARTITION_BITS) + 1)
        if devnos.range_cardinality(partition << PARTITION_BITS, (partition + 1) << PARTITION_BITS)
    ]


def _has(bits: bytes, place: int) -> bool:
    return place >> 3 < len(bits) and bool(bits[place >> 3] >> (place & 7) & 1)


def _by_partition(ops: Sequence[_Op]) -> dict[int, list[_Op]]:
    parts: dict[int, list[_Op]] = {}
    for op in ops:
        parts.setdefault(op.devno >> PARTITION_BITS, []).append(op)
    return parts


def _by_partition_of_app(requests: Sequence[OwedRequest]) -> dict[tuple[int, int], list[int]]:
    """The places of the requests in their list."""
    parts: dict[tuple[int, int], list[int]] = {}
    for place, request in enumerate(requests):
        parts.setdefault((request.app_id, request.devno >> PARTITION_BITS), []).append(place)
    return parts


def _pack_request(request: OwedRequest) -> bytes:
    return _REQUEST.pack(request.devno % PARTITION, max(request.after, 0), min(request.limit, 0xFFFF))


def _pack_inboxes(inboxes: Mapping[int, Inbox], devnos: Sequence[int]) -> bytes:
    packed: list[bytes] = []
    for devno in devnos:
        entries, evicts = inboxes[devno]
        packed.append(_DEVICE.pack(devno % PARTITION, evicts, len(entries)))
        packed += [_ENTRY.pack(msg_id, _seconds(ceil(expires))) for msg_id, expires in entries]
    return b"".join(packed)


def _pack_out(offset: int, msg_ids: Sequence[int]) -> bytes:
    return _OUT.pack(offset, len(msg_ids)) + struct.pack(f">{len(msg_ids)}Q", *msg_ids)


def _seconds(at: float) -> int:
    """As 32 bits, until 2106."""
    return 0 if at <= 0 else MAX_TIME if at == inf else min(int(at), MAX_TIME)


def _evictions(partition: int, packed: Iterable[bytes]) -> Iterator[Eviction]:
    base = partition << PARTITION_BITS
    for one in packed:
        (at,) = _TIME.unpack_from(one)
        dropped = [(msg_id, base + offset) for msg_id, offset in _GONE.iter_unpack(one[_TIME.size :])]
        yield Eviction(partition, at, dropped, one)
