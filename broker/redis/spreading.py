"""Spreading: what was committed to an app's log goes to rows, inboxes and doorbells (log.py has the steps).

One holder of the log's lock at a time does it, in *runs*: from the first entry until the log is empty. Entries that
this process commits meanwhile it knows already (`AppLog.extend`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from msgspec.structs import replace
from pyroaring import BitMap

from broker.bitmaps import decode_bits
from broker.bus import Doorbell
from broker.model import Withdrawn
from broker.redis.engine import Engine
from broker.redis.entries import (
    SPREAD_BYTES,
    SPREAD_ENTRIES,
    Entry,
    bounded,
    count_online,
    inboxes_of,
    independent,
    is_wide,
    read_entry,
    rings_of,
    takes,
    with_routes,
    without,
)
from broker.redis.keys import of_app, tag_of_app
from broker.redis.partitions import Eviction, Inbox, Put
from broker.redis.rows import Row
from broker.redis.scripts import load
from broker.store import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from broker.redis.log import Call

log = logging.getLogger(__name__)

LEASE: Final = 3.0  # seconds that a holder keeps the lock without a sign of life
PATIENCE: Final = 10.0  # seconds to wait for somebody else's spreading
RING_WAIT: Final = 1.0  # seconds for the doorbells of one step; the bus keeps their order
MAX_UNRUNG: Final = 8  # steps whose doorbells are on their way while the next one is put
POLL: Final = 0.005  # seconds between two looks whether it is done

_take = load("take")
_front = load("log_front")


class Rows(Protocol):
    async def write(self, entries: Sequence[tuple[int, Row]]) -> Mapping[int, BitMap]:
        """Each once. Answers, of parts, the targets that are to get nothing because their whole was taken back."""


class Settling(Protocol):
    async def take_back(self, app_id: int, msg_id: int, row: Row) -> Sequence[Withdrawn]:
        """What no longer waits because of this message. It takes its place among those of its collapse key."""

    async def evicted(self, app_id: int, dropped: Sequence[tuple[int, int]], at: float) -> None:
        """msg_id, devno"""

    async def suppressed(self, app_id: int, msg_id: int, row: Row) -> None: ...


class Bell(Protocol):
    async def ring_nodes(self, numbers: Sequence[int] | None, doorbells: Sequence[Doorbell]) -> None:
        """Returns when they are published; None: to all live gateway nodes."""


class Inboxes(Protocol):
    async def put(self, app_id: int, inboxes: Mapping[int, Inbox], limit: int) -> Put: ...

    async def recorded(self, app_id: int, evictions: Iterable[Eviction]) -> None: ...

    async def online(self, app_id: int, devnos: BitMap | None = None) -> BitMap: ...


class _Step(NamedTuple):
    """Entries that are in the inboxes, and their doorbells."""

    entries: list[Entry]
    ringing: asyncio.Task[None]


class AppLog:
    """What this process has to do with one app's log."""

    __slots__ = (
        "app_id",
        "awaited",
        "committing",
        "counted",
        "more",
        "newest",
        "online",
        "ready",
        "ringing",
        "run",
        "spread_to",
        "waiting",
        "watched",
        "withdrawn",
    )

    def __init__(self, app_id: int) -> None:
        self.app_id = app_id
        self.waiting: deque[Call] = deque()
        self.committing: asyncio.Task[None] | None = None
        self.run: asyncio.Task[None] | None = None  # the newest one: it waits for those before it
        self.ready: list[Entry] = []  # committed here, behind all that the run has in its hands
        self.newest = 0  # msg_id of the last of these; 0: what is behind them is not known
        self.more: asyncio.Future[None] | None = None  # ends when some get ready
        self.ringing: asyncio.Task[None] | None = (
            None  # the newest doorbells: they wait for those before them
        )
        self.spread_to = 0  # msg_id: this process has put everything up to it into the inboxes
        self.watched: deque[tuple[int, asyncio.Future[None]]] = deque()  # whoever waits for that, in order
        self.counted: asyncio.Future[None] | None = None  # ends with the commit that is under way
        self.online: dict[int, int] = {}  # msg_id -> targets that were online when it was committed
        self.awaited: set[int] = set()  # msg_ids whose appends wait for what they take back
        self.withdrawn: dict[int, tuple[Withdrawn, ...]] = {}  # by msg_id, that

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.committing or self.run or self.watched)

    def passed(self, msg_id: int) -> None:
        self.spread_to = max(self.spread_to, msg_id)
        while self.watched and self.watched[0][0] <= self.spread_to:
            wake(self.watched.popleft()[1])

    def give_up(self) -> None:
        """Nobody here spreads any more."""
        while self.watched:
            wake(self.watched.popleft()[1])
        self.online.clear()
        self.ready, self.newest = [], 0

    def extend(self, entries: Sequence[Entry], before: int) -> None:
        """These were committed, behind the entry with the id `before`."""
        if entries and self.run is not None and before == self.newest:
            self.ready += entries
            self.newest = entries[-1].msg_id
            if self.more is not None:
                wake(self.more)

    async def wait(self, ringing: asyncio.Task[None], *, more: bool) -> None:
        """Until these doorbells have rung, or (`more`) entries are ready."""
        self.more = asyncio.get_running_loop().create_future()
        await asyncio.wait((ringing, self.more) if more else (ringing,), return_when=asyncio.FIRST_COMPLETED)
        self.more = None

    def take_ready(self) -> list[Entry]:
        """As many as are spread in one step."""
        some = bounded(self.ready)
        del self.ready[: len(some)]
        return some


class Spreader:
    """Of all apps of one process. `offline_limit` gives an app's newest-N; `clock` Unix seconds."""

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float],
        inboxes: Inboxes,
        rows: Rows,
        settling: Settling,
        bell: Bell,
        offline_limit: Callable[[int], Awaitable[int]],
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._inboxes = inboxes
        self._rows = rows
        self._settling = settling
        self._bell = bell
        self._offline_limit = offline_limit
        self._name = secrets.token_hex(6)
        self._runs = 0
        self._apps: dict[int, AppLog] = {}

    def app(self, app_id: int) -> AppLog:
        app = self._apps.get(app_id)
        if app is None:
            app = self._apps[app_id] = AppLog(app_id)
        return app

    def forget(self, app: AppLog) -> None:
        """If there is nothing to do."""
        if app.idle:
            self._apps.pop(app.app_id, None)

    @property
    def idle(self) -> bool:
        return not self._apps

    async def finish(self) -> None:
        """Returns when nothing is under way here: what was accepted is spread, or left to others."""
        while tasks := [
            task for app in self._apps.values() for task in (app.committing, app.run) if task is not None
        ]:
            await asyncio.wait(tasks)

    # The lock

    def new_holder(self) -> str:
        """No name comes twice."""
        self._runs += 1
        return f"{self._name}.{self._runs}"

    def is_ours(self, holder: bytes) -> bool:
        return holder.startswith(f"{self._name}.".encode())

    @staticmethod
    def lock_times(now: float) -> tuple[int, int]:
        """Until when, by the clock, and for how long, by Redis's: whichever ends first."""
        return int((now + LEASE) * 1000), int((LEASE + 1) * 1000)

    # Runs

    def start(self, app: AppLog, holder: str, entries: list[Entry] | None, *, acquire: bool = False) -> None:
        app.run = asyncio.create_task(self._run(app, holder, entries, app.run, acquire))

    async def _run(
        self,
        app: AppLog,
        holder: str,
        entries: list[Entry] | None,
        before: asyncio.Task[None] | None,
        acquire: bool,
    ) -> None:
        """`entries`: what is in front of the log, if that is known. Runs of an app come one after the other."""
        try:
            if before is not None:
                await asyncio.wait((before,))
            app.ready, app.newest = list(entries or ()), entries[-1].msg_id if entries else 0
            await self._spread_all(app, holder, acquire)
        except StoreError as error:
            log.warning("app %d: its pushes are spread later: %s", app.app_id, error)
        except Exception:
            log.exception("app %d: its pushes cannot be spread", app.app_id)
        finally:
            if app.run is asyncio.current_task():
                app.run = None
                app.give_up()
                self.forget(app)

    async def _spread_all(self, app: AppLog, holder: str, acquire: bool) -> None:
        """Until the log is empty, or another process has the lock."""
        unrung: deque[_Step] = deque()
        while True:
            rung = _take_rung(unrung)
            held = sum(len(step.entries) for step in unrung)
            if app.ready:
                held += len(app.ready)
                entries = app.take_ready()
                _, ours = await asyncio.gather(
                    self._spread(app, entries), self._let_go(app.app_id, holder, rung, held)
                )
                if not ours:
                    return
                assert app.ringing is not None
                unrung.append(_Step(entries, app.ringing))
            elif not await self._take_next(app, holder, rung, held, acquire):
                return
            if unrung and (not app.ready or len(unrung) >= MAX_UNRUNG):
                await app.wait(unrung[0].ringing, more=len(unrung) < MAX_UNRUNG)

    async def _take_next(
        self, app: AppLog, holder: str, rung: Sequence[Entry], held: int, acquire: bool
    ) -> bool:
        """See `take`: they are ready. Some of them may be already: those that were committed here meanwhile."""
        taken = await self.take(app.app_id, holder, rung, acquire, held=held)
        if taken is None:
            return False
        known = app.newest if app.ready else 0
        app.ready += [entry for entry in taken if entry.msg_id > known]
        if app.ready:
            app.newest = app.ready[-1].msg_id
        return True

    async def _let_go(self, app_id: int, holder: str, rung: Sequence[Entry], held: int) -> bool:
        """False: another process has the lock."""
        return not rung or await self.take(app_id, holder, rung, held=held, most=0) is not None

    async def take(
        self,
        app_id: int,
        holder: str,
        rung: Sequence[Entry],
        acquire: bool = False,
        *,
        held: int = 0,
        most: int = SPREAD_ENTRIES,
    ) -> list[Entry] | None:
        """Let these go, and get those behind the `held` next ones; None: the log is empty, or another process has the
        lock."""
        now = self._clock()
        answer = await self._engine.call(
            _take,
            (of_app(app_id, "log"),),
            (
                *(tag_of_app(app_id), holder, *self.lock_times(now), int(now * 1000)),
                *(len(rung), rung[0].msg_id if rung else 0, most, SPREAD_BYTES, int(acquire), held),
            ),
        )
        if answer[0] != b"more":
            return None
        return [Entry(msg_id, row, decode_bits(row.targets)) for msg_id, row in map(read_entry, answer[1:])]

    async def _spread(self, app: AppLog, entries: Sequence[Entry]) -> None:
        """Their doorbells ring afterwards: `app.ringing`."""
        for part in independent(entries):
            await self._spread_part(app, part)

    async def _spread_part(self, app: AppLog, entries: Sequence[Entry]) -> None:
        app_id, settling = app.app_id, self._settling
        takers = [entry for entry in entries if takes(entry.row)]
        taken = await asyncio.gather(
            *[settling.take_back(app_id, entry.msg_id, entry.row) for entry in takers]
        )
        withdrawn = {entry.msg_id: tuple(some) for entry, some in zip(takers, taken, strict=True) if some}
        if any(is_wide(entry.row) for entry in entries):
            entries = await self._with_online(app, entries)
            written = self._write(entries)
            if any(entry.row.part_of for entry in entries):
                entries = without(entries, await written)
                put = await self._put(app_id, inboxes_of(entries))
            else:
                _, put = await asyncio.gather(written, self._put(app_id, inboxes_of(entries)))
        else:
            put = await self._put(app_id, inboxes_of(entries))
            await self._write(with_routes(entries, put.routes))
        await self._settle(app_id, entries, put.evictions)
        app.withdrawn.update((i, some) for i, some in withdrawn.items() if i in app.awaited)
        app.passed(entries[-1].msg_id)
        app.ringing = asyncio.create_task(self._ring(app.ringing, entries, put.routes, withdrawn))

    def _write(self, entries: Iterable[Entry]) -> Awaitable[Mapping[int, BitMap]]:
        return self._rows.write([(entry.msg_id, entry.row) for entry in entries])

    async def _ring(
        self,
        before: asyncio.Task[None] | None,
        entries: Sequence[Entry],
        routes: Mapping[int, int],
        withdrawn: Mapping[int, Sequence[Withdrawn]],
    ) -> None:
        """After the doorbells before them. A node that cannot be rung now is not waited for: the bus lets it know."""
        if before is not None:
            await asyncio.wait((before,))
        for rings in rings_of(entries, routes, withdrawn):
            rung = [asyncio.ensure_future(self._bell.ring_nodes(*ring)) for ring in rings]
            _, late = await asyncio.wait(rung, timeout=RING_WAIT)
            for ring in rung:
                if ring in late:
                    ring.add_done_callback(_rung)
                else:
                    _rung(ring)

    async def _with_online(self, app: AppLog, entries: Sequence[Entry]) -> list[Entry]:
        """How many targets were online: counted when they were committed, if this process did it."""
        known = app.online
        if app.counted is not None and not app.counted.done() and entries[-1].msg_id not in known:
            await asyncio.wait(
                (app.counted,)
            )  # perhaps they are those of the commit whose answer comes just now
        unknown = [entry for entry in entries if entry.msg_id not in known]
        if unknown:
            online = await self.online(app.app_id, [entry.targets for entry in unknown])
            known.update(zip((e.msg_id for e in unknown), count_online(unknown, online), strict=True))
        return [entry._replace(row=replace(entry.row, online=known.pop(entry.msg_id))) for entry in entries]

    async def _put(self, app_id: int, inboxes: Mapping[int, Inbox]) -> Put:
        if not inboxes:
            return Put({}, [])
        return await self._inboxes.put(app_id, inboxes, await self._offline_limit(app_id))

    async def _settle(self, app_id: int, entries: Sequence[Entry], evictions: Sequence[Eviction]) -> None:
        """What is to be recorded at once."""
        steps: list[Coroutine[Any, Any, None]] = [
            self._settling.evicted(app_id, eviction.dropped, eviction.at) for eviction in evictions
        ]
        steps += [
            self._settling.suppressed(app_id, entry.msg_id, entry.row)
            for entry in entries
            if entry.row.callback is not None and entry.row.suppressed
        ]
        if steps:
            await asyncio.gather(*steps)
        if evictions:
            await self._inboxes.recorded(app_id, evictions)

    async def passed(self, app_id: int, msg_id: int) -> None:
        """Returns when everything up to this message was spread, by whomever; at once if it is not in the log. Raises
        StoreUnavailable if that takes too long."""
        loop = asyncio.get_running_loop()
        end, key = loop.time() + PATIENCE, of_app(app_id, "log")
        while True:
            if (app := self._apps.get(app_id)) is not None and msg_id <= app.spread_to:
                return
            front, last = await self._engine.call(_front, (key,), (tag_of_app(app_id),))
            if not front or not int(front) <= msg_id <= int(last):
                return
            if loop.time() >= end:
                raise StoreUnavailable("a push that was accepted is still being spread")
            self.help(app_id)
            await asyncio.sleep(POLL)

    def help(self, app_id: int) -> None:
        """Spread the app's log, if nobody has the lock."""
        app = self.app(app_id)
        if app.run is None:
            self.start(app, self.new_holder(), None, acquire=True)

    async def online(self, app_id: int, targets: Sequence[BitMap]) -> BitMap:
        if not targets:
            return BitMap()
        return await self._inboxes.online(app_id, BitMap.union(*targets) if len(targets) > 1 else targets[0])


def _rung(ring: asyncio.Future[None]) -> None:
    if not ring.cancelled() and (error := ring.exception()) is not None:
        log.warning("a node was not rung, it will notice: %s", error)


def _take_rung(steps: deque[_Step]) -> list[Entry]:
    rung: list[Entry] = []
    while steps and steps[0].ringing.done():
        rung += steps.popleft().entries
    return rung


def wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
