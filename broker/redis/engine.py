"""Calls to Redis, gathered: what is asked for in one turn of the event loop goes out together, one write a server.

`call` runs a script, `run` a command, each in the slot of its first key. Calls to one slot are carried out in the
order they were made. One server, one with replicas (give all of them in the URL) or a Cluster.

What was certainly not carried out (no connection, MOVED, TRYAGAIN, LOADING, a master that became a replica, a script
that the server does not know) is held, with what comes after it for its slot, and sent again when the masters are
known anew, for at most PATIENCE seconds. A call whose connection ended before its answer came may have been carried
out: it is made again if that changes nothing, which holds for reading commands and for scripts with a line
`-- reads only` or `-- repeatable`; else it raises StoreUnavailable. So what else is not idempotent carries a token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import hiredis

from broker.redis.address import Address, RedisUrl, parse_url, shown
from broker.redis.scripts import Script
from broker.redis.topology import ADVICE, SLOTS, View, look, slot_of, trouble
from broker.redis.wire import Argument, Asked, Connection, Refused, connect, pack
from broker.store import StoreError, StoreFull, StoreUnavailable

log = logging.getLogger(__name__)

PATIENCE: Final = 5.0  # seconds that a call waits for a server that can take it
BACKOFF: Final = (0.02, 0.5)  # seconds between two attempts to find the masters: the first, the longest
WAIT_TIMEOUT: Final = 1.0  # seconds for the replicas' acknowledgement
MAX_CALLS: Final = 100_000  # unanswered: a Redis that does not keep up must not fill our memory
MAX_BYTES: Final = 256 << 20  # of their requests
VOLATILE: Final = (
    "-- volatile"  # a line of a script whose writes a failover may lose: they wait for no replicas
)
READS_ONLY: Final = "-- reads only"  # a line of a script that changes nothing
REPEATABLE: Final = "-- repeatable"  # of one that changes nothing more when it is called again
GROUP: Final = 1_000  # calls whose answers are handed on together
DISCOVERY: Final = 1.0  # seconds in which all known servers may say who the masters are

# First words of errors that mean "not now, not here": nothing was carried out.
ELSEWHERE: Final = frozenset(
    ("MOVED", "TRYAGAIN", "CLUSTERDOWN", "LOADING", "READONLY", "MASTERDOWN", "NOSCRIPT")
)
_READING = """
PING TIME GET MGET STRLEN GETRANGE GETBIT BITCOUNT EXISTS TYPE TTL PTTL DBSIZE INFO ROLE CLUSTER
HGET HMGET HGETALL HLEN HEXISTS HKEYS HVALS HSCAN HRANDFIELD LLEN LRANGE LINDEX SCARD SMEMBERS SISMEMBER
SMISMEMBER SSCAN SCAN ZCARD ZCOUNT ZRANGE ZRANGEBYSCORE ZRANGEBYLEX ZREVRANGE ZSCORE ZMSCORE ZLEXCOUNT ZSCAN
XLEN XRANGE XREVRANGE XREAD
"""
READING: Final = frozenset(_READING.split())
"""Commands that change nothing. `run` repeats them, and they wait for no replicas."""


@dataclass(slots=True)
class RedisStats:
    """Counters for the metrics."""

    commits: int = 0  # groups with a write
    failed_commits: int = 0  # calls that Redis did not take, or not as durably as it must
    on_commit: Callable[[int, float], None] | None = None
    """Called with (calls, seconds) after each group of calls in which something was written, and nothing failed."""
    calls: int = 0  # answered
    lost_connections: int = 0
    redirected: int = 0  # calls that met a server that was not, or not yet, the one for them
    pending: int = 0  # calls without an answer
    pending_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Call:
    words: tuple[Argument, ...]  # the command, or the script's number of keys, keys and arguments
    script: Script | None
    slot: int
    future: asyncio.Future[Any]
    made_at: float
    size: int = 0


class _Group:
    """Calls that were sent in one write, and perhaps a WAIT."""

    __slots__ = ("calls", "count", "link", "sent_at", "waits", "writes")

    def __init__(self, link: _Link, calls: Sequence[_Call]) -> None:
        self.link, self.calls, self.sent_at = link, calls, link.engine.loop.time()
        self.writes = any(map(_writes, calls))
        self.waits = link.engine.replicas > 0 and any(map(_durable, calls))
        self.count = len(calls) + self.waits

    def done(self, answers: list[Any]) -> None:
        self.link.engine.answered(self, answers)

    def lost(self, reason: str) -> None:
        self.link.engine.lost(self, reason)


class _Asking:
    """One call after ASKING."""

    __slots__ = ("call", "count", "link")

    def __init__(self, link: _Link, call: _Call) -> None:
        self.link, self.call = link, call
        self.count = 2

    def done(self, answers: list[Any]) -> None:
        self.link.engine.settle(self.link, self.call, answers[1])

    def lost(self, reason: str) -> None:
        self.link.engine.lost_call(self.call, reason)


class _Link:
    """The connection to one master."""

    __slots__ = ("batch", "connection", "engine", "known")

    def __init__(self, engine: Engine, connection: Connection) -> None:
        self.engine, self.connection = engine, connection
        self.batch: list[_Call] = []
        self.known: set[str] = set()  # scripts that were sent in full over this connection

    def submit(self, call: _Call) -> None:
        if not self.batch:
            self.engine.loop.call_soon(self.flush)
        self.batch.append(call)

    def flush(self) -> None:
        batch, self.batch = self.batch, []
        if self.connection.closed:
            self.engine.hold(batch)
            return
        for start in range(0, len(batch), GROUP):
            self._send(batch[start : start + GROUP])

    def _send(self, calls: Sequence[_Call]) -> None:
        engine, packed, sound = self.engine, [], []
        for call in calls:
            try:
                packed.append(self.packed(call))
            except (TypeError, ValueError) as error:  # an argument is no text, bytes or number: fails alone
                engine.misused(call, error)
            else:
                sound.append(call)
                engine.weigh(call, len(packed[-1]))
        if sound:
            group = _Group(self, sound)
            if group.waits:
                packed.append(engine.wait_command)
            self.connection.send(b"".join(packed), group)

    def packed(self, call: _Call) -> bytes:
        script = call.script
        if script is None:
            return pack(call.words)
        if script.sha in self.known:
            return pack(("EVALSHA", script.sha, *call.words))
        self.known.add(script.sha)
        return pack(("EVAL", script.source, *call.words))

    def ask(self, call: _Call) -> None:
        """For a slot that is being moved here. The script goes in full: order does not help to know it."""
        asked: Asked = _Asking(self, call)
        self.known.discard(call.script.sha if call.script else "")
        self.connection.send(pack(("ASKING",)) + self.packed(call), asked)


@dataclass(slots=True)
class _Topology:
    """Who is master of what. `links` by slot in a cluster, else one for all."""

    cluster: bool = False
    links: list[_Link | None] = field(default_factory=lambda: [None])
    addresses: dict[Address, _Link] = field(default_factory=dict)


class Engine:
    """`url`: see `broker.redis.address.FORM`. Answers are bytes, integers and lists. Used on one event loop.

    `replicas`: so many must acknowledge each write before its call returns. Raises ValueError for a bad URL."""

    def __init__(self, url: str, *, replicas: int = 0, patience: float = PATIENCE) -> None:
        self.url: RedisUrl = parse_url(url)
        self.replicas = replicas
        self.stats = RedisStats()
        self.wait_command = pack(("WAIT", replicas, int(WAIT_TIMEOUT * 1000)))
        self.loop: asyncio.AbstractEventLoop
        self._patience = patience
        self._topology = _Topology()
        self._known: set[Address] = set()  # all servers of the cluster
        self._held: dict[int, list[_Call]] = {}  # by slot: what waits for a server, in order
        self._recovering: asyncio.Task[None] | None = None
        self._trouble = ""  # why there is no server
        self._open = False
        self._idle = asyncio.Event()
        self._delay = 0.0  # until the next attempt
        self._restored_at = -1e9
        self._giving_up: asyncio.TimerHandle | None = None

    # Life

    async def open(self) -> None:
        """Find the masters. Raises StoreUnavailable with what to do."""
        self.loop = asyncio.get_running_loop()
        try:
            self._tls = self.url.context()
        except OSError as error:
            raise StoreUnavailable(f"store.url: a file of TLS cannot be read: {error}") from error
        if not await self._discover():
            await self._drop_links()
            raise StoreUnavailable(self._trouble)
        self._open = True

    async def close(self) -> None:
        """Wait for the answers, then hang up."""
        self._open = False
        while self.stats.pending:
            self._idle.clear()
            await self._idle.wait()
        if self._recovering is not None:
            self._recovering.cancel()
            with suppress(asyncio.CancelledError):
                await self._recovering
        if self._giving_up is not None:
            self._giving_up.cancel()
        await self._drop_links()

    async def _drop_links(self) -> None:
        links, self._topology = self._topology.addresses, _Topology()
        for link in links.values():
            link.connection.on_lost = None
            link.connection.close()
        await asyncio.gather(*[link.connection.ended() for link in links.values()])

    # Calls

    def call(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()
    ) -> asyncio.Future[Any]:
        """All keys are in one slot."""
        slot = slot_of(keys[0]) if self._topology.cluster else 0
        return self._submit(script, (len(keys), *keys, *arguments), slot)

    def run(self, *command: Argument) -> asyncio.Future[Any]:
        """The command's first key is its second word."""
        slot = slot_of(command[1]) if self._topology.cluster and len(command) > 1 else 0
        return self._submit(None, command, slot)

    def _submit(self, script: Script | None, words: tuple[Argument, ...], slot: int) -> asyncio.Future[Any]:
        future = self.loop.create_future()
        if not self._open or self.stats.pending >= MAX_CALLS or self.stats.pending_bytes >= MAX_BYTES:
            future.set_exception(self._refusal())
            return future
        self.stats.pending += 1
        call = _Call(words, script, slot, future, self.loop.time())
        link = self._link_of(slot)
        if link is None or (self._held and slot in self._held):
            self.hold((call,))
        else:
            link.submit(call)
        return future

    def _refusal(self) -> StoreUnavailable:
        if not self._open:
            return StoreUnavailable("the store is closed")
        return StoreUnavailable(f"Redis does not keep up: {self.stats.pending} calls wait for it")

    async def everywhere(self, *command: Argument) -> dict[Address, Any]:
        """Ask each master; an answer may be a hiredis.ReplyError. Raises StoreUnavailable."""
        links = self._topology.addresses
        try:
            answers = await asyncio.gather(*[link.connection.ask(*command) for link in links.values()])
        except OSError as error:
            raise StoreUnavailable(f"Redis: {error}") from error
        return dict(zip(links, answers, strict=True))

    async def ask(self, address: Address, *commands: tuple[Argument, ...]) -> list[Any]:
        """Ask any server over a connection of its own; answers may be hiredis.ReplyError. Raises StoreUnavailable."""
        try:
            connection = await connect(address, self.url, self._tls)
            try:
                return await asyncio.gather(*[connection.ask(*command) for command in commands])
            finally:
                connection.close()
                await connection.ended()
        except (OSError, TimeoutError, Refused) as error:
            raise StoreUnavailable(trouble(address, error)) from error

    @property
    def masters(self) -> list[Address]:
        return list(self._topology.addresses)

    @property
    def cluster(self) -> bool:
        return self._topology.cluster

    def master_of(self, key: str) -> Address | None:
        link = self._link_of(slot_of(key) if self._topology.cluster else 0)
        return None if link is None else link.connection.address

    async def listen(self, key: str) -> Connection:
        """A connection of its own, with pushes, to the master of this key. Raises StoreUnavailable."""
        address = self.master_of(key)
        if address is None:
            self.look_again()
            raise StoreUnavailable(self._trouble or "Redis is away")
        try:
            return await connect(address, self.url, self._tls, pushes=True)
        except (OSError, TimeoutError, Refused) as error:
            self.look_again()
            raise StoreUnavailable(trouble(address, error)) from error

    # What the links tell

    def weigh(self, call: _Call, size: int) -> None:
        self.stats.pending_bytes += size - call.size
        call.size = size

    def misused(self, call: _Call, error: Exception) -> None:
        self._finish(call)
        if not call.future.done():
            call.future.set_exception(error)

    def answered(self, group: _Group, answers: list[Any]) -> None:
        stats = self.stats
        missing = self._missing(answers.pop()) if group.waits else ""
        failed = stats.failed_commits
        for call, answer in zip(group.calls, answers, strict=True):
            if missing and _durable(call) and not isinstance(answer, hiredis.ReplyError):
                self._fail(call, StoreUnavailable(missing))
            else:
                self.settle(group.link, call, answer)
        stats.calls += len(group.calls)
        stats.commits += group.writes
        if group.writes and stats.failed_commits == failed and stats.on_commit is not None:
            stats.on_commit(len(group.calls), self.loop.time() - group.sent_at)

    def _missing(self, acknowledged: Any) -> str:
        """Empty: enough replicas have it."""
        if isinstance(acknowledged, hiredis.ReplyError):
            return (
                f"Redis: the replicas' acknowledgement was cut off ({acknowledged}); it may have been stored"
            )
        if acknowledged >= self.replicas:
            return ""
        return (
            f"Redis: {acknowledged} of {self.replicas} replicas (store.replicas) acknowledged within"
            f" {WAIT_TIMEOUT:g} s; what was written may have been stored all the same"
        )

    def settle(self, link: _Link, call: _Call, answer: Any) -> None:
        if not isinstance(answer, hiredis.ReplyError):
            self._finish(call)
            if not call.future.done():
                call.future.set_result(answer)
            return
        word, *rest = str(answer).split(" ", 3)
        if word == "ASK" and (target := self._link_to(link, rest[-1])) is not None:
            target.ask(call)
        elif word in ELSEWHERE or word == "ASK":
            self._redirect(link, call, word)
        else:
            self._fail(call, as_store_error(answer), refused=word == "OOM" or word in ADVICE)

    def _link_to(self, link: _Link, text: str) -> _Link | None:
        host, _, port = text.rpartition(":")
        address = host.strip("[]") or link.connection.address[0], int(port)
        return self._topology.addresses.get(address)

    def _redirect(self, link: _Link, call: _Call, word: str) -> None:
        self.stats.redirected += 1
        if word == "NOSCRIPT" and call.script is not None:
            link.known.discard(call.script.sha)
        else:
            self._trouble = f"Redis at {shown(link.connection.address)}: {ADVICE.get(word, word)}"
        self.hold((call,))

    def lost(self, group: _Group, reason: str) -> None:
        for call in group.calls:
            self.lost_call(call, reason)

    def lost_call(self, call: _Call, reason: str) -> None:
        if _repeatable(call):
            self.hold((call,))
        else:
            self._fail(
                call,
                StoreUnavailable(f"Redis: the answer was lost ({reason}); what was asked may have been done"),
            )

    def hold(self, calls: Iterable[_Call]) -> None:
        """They are sent when a server can take them."""
        for call in calls:
            self._held.setdefault(call.slot, []).append(call)
        if self._held:
            self.look_again()
            if self._giving_up is None:
                self._giving_up = self.loop.call_later(self._patience / 10, self._give_up)

    def _fail(self, call: _Call, error: StoreError, *, refused: bool = True) -> None:
        """`refused`: not for something that is wrong about the call itself."""
        self.stats.failed_commits += refused
        self._finish(call)
        if not call.future.done():
            call.future.set_exception(error)

    def _finish(self, call: _Call) -> None:
        self.stats.pending -= 1
        self.stats.pending_bytes -= call.size
        if not self.stats.pending:
            self._idle.set()

    # Finding the masters

    def _lost_link(self, link: _Link, reason: str) -> None:
        """A connection ended."""
        self.stats.lost_connections += 1
        address = link.connection.address
        self._trouble = f"Redis at {shown(address)}: {reason}"
        log.warning("%s", self._trouble)
        topology = self._topology
        if topology.addresses.get(address) is link:
            del topology.addresses[address]
            topology.links = [None if other is link else other for other in topology.links]
        self.look_again()

    def look_again(self) -> None:
        """Somebody met a server that is not the master it should be."""
        if self._recovering is None or self._recovering.done():
            self._recovering = self.loop.create_task(self._restore())

    async def _restore(self) -> None:
        """Until every slot has a master and nothing is held."""
        first, longest = BACKOFF
        if self.loop.time() - self._restored_at > longest:
            self._delay = first
        else:  # what is held was sent a moment ago, and refused again
            await self._pause(longest)
        while True:
            whole = await self._discover()
            self._send_held()
            if whole and not self._held:
                self._restored_at = self.loop.time()
                return
            await self._pause(longest)

    async def _pause(self, longest: float) -> None:
        await asyncio.sleep(self._delay)
        self._delay = min(2 * self._delay, longest)

    def _send_held(self) -> None:
        held, self._held = self._held, {}
        for slot, calls in held.items():
            link = self._link_of(slot)
            if link is None:
                self._held[slot] = calls
            else:
                for call in calls:
                    link.submit(call)

    def _link_of(self, slot: int) -> _Link | None:
        links = self._topology.links
        return links[slot] if slot < len(links) else None

    def _give_up(self) -> None:
        """What was held for too long fails."""
        latest = self.loop.time() - self._patience
        for slot, calls in tuple(self._held.items()):
            late = [call for call in calls if call.made_at <= latest]
            if late:
                self._held[slot] = calls[len(late) :]
                for call in late:
                    self._fail(call, StoreUnavailable(self._trouble or "Redis is away"))
            if not self._held[slot]:
                del self._held[slot]
        self._giving_up = self.loop.call_later(self._patience / 10, self._give_up) if self._held else None

    async def _discover(self) -> bool:
        """Ask all we know who the masters are, and connect to them. False: some slot has none."""
        known = dict.fromkeys((*self._topology.addresses, *self.url.seeds, *self._known))
        asked = [self.loop.create_task(self._ask_masters(address)) for address in known]
        try:
            done, late = await asyncio.wait(asked, timeout=DISCOVERY)
            if late and not any(task.result() for task in done):
                done, _ = await asyncio.wait(asked)
        finally:
            for task in asked:
                task.cancel()
        views = [view for task in asked if task in done and (view := task.result()) is not None]
        if not views:
            return False
        newest = max(views, key=lambda view: view.epoch)
        if not newest.epoch[0]:
            self._trouble = f"Redis: {ADVICE['CLUSTERDOWN']}"
        return await self._take(newest)

    async def _ask_masters(self, address: Address) -> View | None:
        link = self._topology.addresses.get(address)
        try:
            if link is not None and not link.connection.closed:
                return await look(link.connection)
            connection = await connect(address, self.url, self._tls)
            try:
                return await look(connection)
            finally:
                connection.close()
                await connection.ended()
        except (OSError, TimeoutError, Refused) as error:
            self._trouble = trouble(address, error)
        return None

    async def _take(self, view: View) -> bool:
        """Make it the topology. False: a master cannot be reached."""
        old = self._topology
        wanted = {address for _, _, address in view.masters}
        addresses = {
            address: link
            for address, link in old.addresses.items()
            if address in wanted and not link.connection.closed
        }
        retired = [link for link in old.addresses.values() if link not in addresses.values()]
        self._topology = topology = _Topology(view.cluster, old.links, addresses)
        await asyncio.gather(*[self._join(address) for address in wanted if address not in addresses])
        links: list[_Link | None] = [None] * (SLOTS if view.cluster else 1)
        for first, last, address in view.masters:
            links[first : last + 1] = [topology.addresses.get(address)] * (last + 1 - first)
        topology.links = links
        self._known = set(view.others)
        for link in retired:
            link.connection.on_lost = None
            link.connection.retire()
        return None not in links

    async def _join(self, address: Address) -> None:
        try:
            connection = await connect(address, self.url, self._tls)
        except (OSError, TimeoutError, Refused) as error:
            self._trouble = trouble(address, error)
            return
        link = self._topology.addresses[address] = _Link(self, connection)
        connection.on_lost = lambda reason: self._lost_link(link, reason)


_marks: dict[str, frozenset[str]] = {}  # by the hash of a script: the lines that say what it does


def _has_mark(script: Script, mark: str) -> bool:
    marks = _marks.get(script.sha)
    if marks is None:
        marks = _marks[script.sha] = frozenset(script.source.splitlines()) & {
            READS_ONLY,
            REPEATABLE,
            VOLATILE,
        }
    return mark in marks


def _writes(call: _Call) -> bool:
    if call.script is None:
        return str(call.words[0]).upper() not in READING
    return not _has_mark(call.script, READS_ONLY)


def _durable(call: _Call) -> bool:
    return _writes(call) and (call.script is None or not _has_mark(call.script, VOLATILE))


def _repeatable(call: _Call) -> bool:
    return not _writes(call) or (call.script is not None and _has_mark(call.script, REPEATABLE))


def as_store_error(error: Exception) -> StoreFull | StoreUnavailable:
    """What an error that Redis answered means to the store's callers."""
    word = str(error).split(" ", 1)[0]
    if word == "OOM":
        return StoreFull(f"Redis has no room: raise its maxmemory ({error})")
    if word in ADVICE:
        return StoreUnavailable(f"Redis: {ADVICE[word]} ({error})")
    return StoreUnavailable(f"Redis: {error}")
