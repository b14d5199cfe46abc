"""Appending: a push is committed to its app's log, and spread from there to rows, inboxes and doorbells.

1. *Commit*, one script in the app's slot: from here on the push is accepted. Appends that come while a commit of
   their app is under way go together into the next one; those that depend on records or other messages go alone, in
   their turn.
2. *Spread*: whoever has the lock takes the log from its front. For each entry, in the order of the ids: what it takes
   back is taken back; its row is written and its id put into the inboxes; the doorbells are rung; it leaves the log.
   While doorbells are on their way the next entries are put: those that this process commits while it has the lock
   it knows already, and need not be read back.

Any process may stop between any two of these, for ever or for a minute. So each step may be done twice, and late: a
row is written once; a partition ignores ids that are not above the greatest it had; an old doorbell finds nothing to
do; to let entries go, or to go on, takes the lock, and no holder's name comes twice. A log without a holder is found
within a lease and a turn of `recover`: the index that it looks at knows an app before its first commit
(`lua/log_look.lua`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple, Protocol

import msgspec
from msgspec.structs import replace
from pyroaring import BitMap

from broker.bitmaps import decode_bits
from broker.bus import Broadcast, Doorbell, Recalled, Targeted
from broker.model import (
    Appended,
    NewMessage,
    OwedRequest,
    RecordChange,
    StoredBroadcast,
    StoredMessage,
    Withdrawn,
)
from broker.redis.engine import Engine
from broker.redis.keys import of_app, tag_of_app
from broker.redis.partitions import Eviction, Inbox, Put
from broker.redis.records import refused
from broker.redis.rows import ROWS, Row, row_of, stored_message
from broker.redis.scripts import load
from broker.redis.streams import first_id
from broker.redis.watch import Watch
from broker.store import StoreError, StoreFull, StoreUnavailable, UnknownMessage

log = logging.getLogger(__name__)

LEASE: Final = 3.0  # seconds that a holder keeps the lock without a sign of life
MAX_LOG: Final = (
    100_000  # entries that wait to be spread: past it pushes are refused, so that Redis keeps its memory
)
BACKLOG: Final = 500  # entries; past it appends wait until another process has spread theirs
GROUP_MESSAGES: Final = 2_000  # in one commit
GROUP_BYTES: Final = 4 << 20  # of their rows, likewise; one call may have more
SPREAD_ENTRIES: Final = 512  # taken from the log at once: a lease is long enough for them
SPREAD_BYTES: Final = 1 << 20
SPREAD_DELIVERIES: Final = 20_000
SPREAD_WAIT: Final = 10.0  # seconds that an append waits for its own process to spread it
RECOVER: Final = 1.0  # seconds between two looks for logs without a holder
LOOKS: Final = 1_000  # apps that all processes look at in one turn
IDLE: Final = 10.0  # seconds without a push after which an app leaves the index
PATIENCE: Final = 10.0  # seconds to wait for somebody else's spreading
RING_WAIT: Final = 1.0  # seconds for the doorbells of one step; the bus keeps their order
MAX_UNRUNG: Final = 8  # steps whose doorbells are on their way while the next one is put
POLL: Final = 0.005  # seconds between two looks whether it is done
TRIES: Final = 20  # times a commit is prepared anew
INDEX: Final = "{spread}:apps"

_commit = load("commit")
_take = load("take")
_front = load("log_front")
_look = load("log_look")
_unindex = load("unindex")


class Rows(Protocol):
    async def write(self, entries: Sequence[tuple[int, Row]]) -> Mapping[int, BitMap]:
        """Each once. Answers, of parts, the targets that are to get nothing because their whole was taken back."""

    async def read(self, app_id: int, ids: Iterable[int]) -> Mapping[int, Row]: ...


class Settling(Protocol):
    async def take_back(self, app_id: int, msg_id: int, row: Row) -> Sequence[Withdrawn]:
        """What no longer waits because of this message. It takes its place among those of its collapse key."""

    async def evicted(self, app_id: int, dropped: Sequence[tuple[int, int]], at: float) -> None:
        """msg_id, devno"""

    async def suppressed(self, app_id: int, msg_id: int, row: Row) -> None: ...


class Records(Protocol):
    async def prepare(self, changes: Sequence[RecordChange]) -> bytes: ...

    async def save(self, changes: Sequence[RecordChange]) -> Sequence[int]: ...


class Bell(Protocol):
    async def ring_nodes(self, numbers: Sequence[int] | None, doorbells: Sequence[Doorbell]) -> None:
        """Returns when they are published; None: to all live gateway nodes."""


class Inboxes(Protocol):
    async def put(self, app_id: int, inboxes: Mapping[int, Inbox], limit: int) -> Put: ...

    async def recorded(self, app_id: int, evictions: Iterable[Eviction]) -> None: ...

    async def owed_ids(self, requests: Sequence[OwedRequest]) -> list[list[int]]: ...

    async def online(self, app_id: int, devnos: BitMap | None = None) -> BitMap: ...


class Entry(NamedTuple):
    """Of the log."""

    msg_id: int
    row: Row
    targets: BitMap


class _Step(NamedTuple):
    """Entries that are in the inboxes, and their doorbells."""

    entries: list[Entry]
    ringing: asyncio.Task[None]


def read_entry(packed: bytes) -> tuple[int, Row]:
    """As the log has it; the row knows the lasting broadcast before it."""
    msg_id, after, row = packed.split(b" ", 2)
    return int(msg_id), replace(ROWS.decode(row), after=int(after))


class _Call:
    """One append on its way into the log."""

    __slots__ = ("changes", "future", "messages", "rows", "size")

    def __init__(
        self, messages: Sequence[NewMessage], changes: Sequence[RecordChange], future: asyncio.Future[Any]
    ) -> None:
        self.messages = messages
        self.changes = changes
        self.future = future
        self.rows = [row_of(message) for message in messages]
        self.size = sum(map(_size, self.rows))

    @property
    def alone(self) -> bool:
        """It is refused by itself, or not."""
        return bool(self.changes) or any(message.replaces for message in self.messages)


class _App:
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
        self.waiting: deque[_Call] = deque()
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
            _wake(self.watched.popleft()[1])

    def give_up(self) -> None:
        """Nobody here spreads any more."""
        while self.watched:
            _wake(self.watched.popleft()[1])
        self.online.clear()
        self.ready, self.newest = [], 0

    def extend(self, entries: Sequence[Entry], before: int) -> None:
        """These were committed, behind the entry with the id `before`."""
        if entries and self.run is not None and before == self.newest:
            self.ready += entries
            self.newest = entries[-1].msg_id
            if self.more is not None:
                _wake(self.more)

    async def wait(self, ringing: asyncio.Task[None], *, more: bool) -> None:
        """Until these doorbells have rung, or (`more`) entries are ready."""
        self.more = asyncio.get_running_loop().create_future()
        await asyncio.wait((ringing, self.more) if more else (ringing,), return_when=asyncio.FIRST_COMPLETED)
        self.more = None

    def take_ready(self) -> list[Entry]:
        """As many as are spread in one step."""
        some = _bounded(self.ready)
        del self.ready[: len(some)]
        return some


class Log:
    """`offline_limit` gives an app's newest-N; `clock` Unix seconds. Used on one event loop."""

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float],
        inboxes: Inboxes,
        rows: Rows,
        settling: Settling,
        records: Records,
        bell: Bell,
        *,
        offline_limit: Callable[[int], Awaitable[int]],
        cid_lifetime: float = 86_400.0,
        processes: Callable[[], int] = lambda: 1,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._inboxes = inboxes
        self._rows = rows
        self._settling = settling
        self._records = records
        self._bell = bell
        self._offline_limit = offline_limit
        self._cid_lifetime = cid_lifetime
        self._processes = processes  # that share the work of `recover`
        self._name = secrets.token_hex(6)
        self._runs = 0
        self.left = 0  # times that a log with entries had no holder; for the metrics
        self._apps: dict[int, _App] = {}
        self._watch = Watch(self.recover, RECOVER, "logs without a holder cannot be looked for")

    async def open(self) -> None:
        self._watch.open()

    async def close(self) -> None:
        """Finish what was accepted; what cannot be spread now stays in the log."""
        await self._watch.close()
        await self.finish()

    async def finish(self) -> None:
        """Returns when nothing is under way here: what was accepted is spread, or left to others."""
        while tasks := [
            task for app in self._apps.values() for task in (app.committing, app.run) if task is not None
        ]:
            await asyncio.wait(tasks)

    # Appending

    async def append(
        self, messages: Sequence[NewMessage], changes: Sequence[RecordChange] = ()
    ) -> list[Appended]:
        """See Store. Raises ValueError for messages of several apps."""
        if not messages:
            await self._records.save(changes)
            return []
        (app_id, *others) = {m.app_id for m in messages} | {change.app_id for change in changes}
        if others:
            raise ValueError("the messages and record changes of one append belong to one app")
        call = _Call(messages, changes, asyncio.get_running_loop().create_future())
        app = self._app(app_id)
        app.waiting.append(call)
        if app.committing is None:
            app.committing = asyncio.create_task(self._commit_all(app))
        appended: list[Appended] = await call.future
        return appended

    def _app(self, app_id: int) -> _App:
        app = self._apps.get(app_id)
        if app is None:
            app = self._apps[app_id] = _App(app_id)
        return app

    def _forget(self, app: _App) -> None:
        if app.idle:
            self._apps.pop(app.app_id, None)

    async def _commit_all(self, app: _App) -> None:
        while app.waiting:
            group = list(_next_group(app.waiting))
            try:
                await self._commit(app, group)
            except Exception as error:  # noqa: BLE001 - whoever called is told
                for call in group:
                    if not call.future.done():
                        call.future.set_exception(error)
            finally:
                if app.counted is not None:
                    _wake(app.counted)
        app.committing = app.counted = None
        self._forget(app)

    async def _commit(self, app: _App, group: Sequence[_Call]) -> None:
        messages = [message for call in group for message in call.messages]
        rows = [row for call in group for row in call.rows]
        await self._check_replaced(app.app_id, messages)
        app.counted = (
            asyncio.get_running_loop().create_future()
        )  # not before: what is looked up may need spreading
        self._runs += 1
        holder = f"{self._name}.{self._runs}"
        answer, online = await asyncio.gather(
            self._ask_commit(app.app_id, holder, rows, group[0].changes, messages),
            self._online(app.app_id, [message.targets for message in messages]),
            return_exceptions=True,
        )
        if isinstance(answer, BaseException):
            raise answer
        first, owner, before, after = int(answer[0]), answer[1], answer[2], int(answer[3])
        used = _used(answer[5:])
        entries: list[Entry] = []
        for place, (row, message) in enumerate(zip(rows, messages, strict=True)):
            if place not in used:
                entries.append(Entry(first + place, replace(row, after=after), message.targets))
                if row.broadcast and row.lasting:
                    after = first + place
        ours = owner == 1 or owner.startswith(f"{self._name}.".encode())
        if ours and not isinstance(online, BaseException):
            app.online.update(
                (entry.msg_id, count) for entry, count in zip(entries, _counts(entries, online), strict=True)
            )
        _wake(app.counted)
        if ours and owner != 1:
            app.extend(entries, int(answer[4]))
        if owner == 1:
            self._start(app, holder, None if before else entries)
        elif ours and app.run is None:  # it stopped because Redis was away
            self._start(app, owner.decode(), None)
        elif not ours and before > BACKLOG:
            await self._let_spread(app.app_id, first)
        for call, ids in _ids_of(group, first):
            answers = [
                used.get(msg_id - first) or Appended(msg_id, False, message.sendno, rung=True)
                for msg_id, message in zip(ids, call.messages, strict=True)
            ]
            self._answer(app, call, answers, ours)

    async def _let_spread(self, app_id: int, msg_id: int) -> None:
        """Who does not spread must not commit faster than another process spreads."""
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(SPREAD_WAIT):
                await self.passed(app_id, msg_id)

    def _answer(self, app: _App, call: _Call, answers: list[Appended], ours: bool) -> None:
        fresh = [answer.msg_id for answer in answers if not answer.repeated]
        if not fresh or not ours or app.run is None or fresh[-1] <= app.spread_to:
            _finish(app, call, answers)
            return
        app.awaited.update(fresh)
        spread: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        late = asyncio.get_running_loop().call_later(SPREAD_WAIT, _wake, spread)
        app.watched.append((fresh[-1], spread))

        def done(_: asyncio.Future[None]) -> None:
            late.cancel()
            _finish(app, call, answers)

        spread.add_done_callback(done)

    async def _ask_commit(
        self,
        app_id: int,
        holder: str,
        rows: Sequence[Row],
        changes: Sequence[RecordChange],
        messages: Sequence[NewMessage],
    ) -> list[Any]:
        token, tag, number = secrets.token_hex(8), tag_of_app(app_id), 0
        items = [item for pair in zip(rows, messages, strict=True) for item in _arguments(*pair)]
        for _ in range(TRIES):
            packed = await self._records.prepare(changes)
            now = self._clock()
            answer: list[Any] = await self._engine.call(
                _commit,
                (of_app(app_id, "log"),),
                (
                    *(tag, token, first_id(now), repr(now), holder, *self._lock_times(now), number, packed),
                    *(repr(now + self._cid_lifetime), int(self._cid_lifetime * 1000) + 60_000, MAX_LOG),
                    *items,
                ),
            )
            if answer[0] == b"index":
                number = int(answer[1])
                await self._engine.run("ZADD", INDEX, "GT", number, app_id)
            elif answer[:2] == [b"refused", b"full"]:
                raise StoreFull(f"app {app_id}: {answer[2].decode()}")
            elif not refused(answer):
                return answer
        raise StoreUnavailable("records are read and changed too often at the same time")

    @staticmethod
    def _lock_times(now: float) -> tuple[int, int]:
        """Until when, by the clock, and for how long, by Redis's: whichever ends first."""
        return int((now + LEASE) * 1000), int((LEASE + 1) * 1000)

    async def _check_replaced(self, app_id: int, messages: Sequence[NewMessage]) -> None:
        """Raises UnknownMessage."""
        for msg_id in {message.replaces for message in messages if message.replaces}:
            if not await self._rows.read(app_id, [msg_id]):
                await self.passed(app_id, msg_id)
                if not await self._rows.read(app_id, [msg_id]):
                    raise UnknownMessage(str(msg_id))

    async def _online(self, app_id: int, targets: Sequence[BitMap]) -> BitMap:
        return await self._inboxes.online(app_id, BitMap.union(*targets) if len(targets) > 1 else targets[0])

    async def find_cids(self, app_id: int, cids: Sequence[str]) -> dict[str, Appended]:
        now, found = self._clock(), {}
        answers = await asyncio.gather(
            *[self._engine.run("GET", of_app(app_id, f"cid:{cid}")) for cid in cids]
        )
        for cid, answer in zip(cids, answers, strict=True):
            if answer is not None:
                msg_id, expires_at, sendno = answer.split(b" ", 2)
                if float(expires_at) > now:
                    found[cid] = Appended(int(msg_id), True, sendno.decode())
        return found

    async def fetch_owed(self, requests: Sequence[OwedRequest]) -> list[list[StoredMessage]]:
        """See Store."""
        found: list[list[StoredMessage]] = [[] for _ in requests]
        messages: dict[tuple[int, int], StoredMessage | None] = {}
        asked = list(enumerate(requests))
        while asked:
            lists = await self._inboxes.owed_ids([request for _, request in asked])
            pages = [(place, request, ids) for (place, request), ids in zip(asked, lists, strict=True) if ids]
            await self._read(messages, [(request.app_id, ids) for _, request, ids in pages])
            asked = []
            for place, request, ids in pages:
                page = [messages[request.app_id, msg_id] for msg_id in ids]
                found[place] += [message for message in page if message is not None]
                missing = request.limit - sum(message is not None for message in page)
                if len(ids) == request.limit and missing:  # some have just expired
                    asked.append((place, replace(request, after=ids[-1], limit=missing)))
        return found

    async def _read(
        self, messages: dict[tuple[int, int], StoredMessage | None], wanted: Sequence[tuple[int, list[int]]]
    ) -> None:
        by_app: dict[int, set[int]] = {}
        for app_id, ids in wanted:
            by_app.setdefault(app_id, set()).update(i for i in ids if (app_id, i) not in messages)
        found = await asyncio.gather(*[self._rows_of(app_id, fresh) for app_id, fresh in by_app.items()])
        now = self._clock()
        for (app_id, fresh), rows in zip(by_app.items(), found, strict=True):
            for msg_id in fresh:
                row = rows.get(msg_id)
                owed = row is not None and row.body and row.expires_at > now  # settled ones have no body
                messages[app_id, msg_id] = stored_message(msg_id, row) if row and owed else None

    async def _rows_of(self, app_id: int, ids: Iterable[int]) -> Mapping[int, Row]:
        """A row that is not there yet is just being written, or its writer has died."""
        wanted = sorted(ids)
        rows = await self._rows.read(app_id, wanted)
        missing = [msg_id for msg_id in wanted if msg_id not in rows]
        if missing:
            await self.passed(app_id, missing[-1])
            rows = {**rows, **await self._rows.read(app_id, missing)}
        return rows

    # Spreading

    def _start(self, app: _App, holder: str, entries: list[Entry] | None, *, acquire: bool = False) -> None:
        app.run = asyncio.create_task(self._run(app, holder, entries, app.run, acquire))

    async def _run(
        self,
        app: _App,
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
                self._forget(app)

    async def _spread_all(self, app: _App, holder: str, acquire: bool) -> None:
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
        self, app: _App, holder: str, rung: Sequence[Entry], held: int, acquire: bool
    ) -> bool:
        """See `_take`: they are ready. Some of them may be already: those that were committed here meanwhile."""
        taken = await self._take(app.app_id, holder, rung, acquire, held=held)
        if taken is None:
            return False
        known = app.newest if app.ready else 0
        app.ready += [entry for entry in taken if entry.msg_id > known]
        if app.ready:
            app.newest = app.ready[-1].msg_id
        return True

    async def _let_go(self, app_id: int, holder: str, rung: Sequence[Entry], held: int) -> bool:
        """False: another process has the lock."""
        return not rung or await self._take(app_id, holder, rung, held=held, most=0) is not None

    async def _take(
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
                *(tag_of_app(app_id), holder, *self._lock_times(now), int(now * 1000)),
                *(len(rung), rung[0].msg_id if rung else 0, most, SPREAD_BYTES, int(acquire), held),
            ),
        )
        if answer[0] != b"more":
            return None
        return [Entry(msg_id, row, decode_bits(row.targets)) for msg_id, row in map(read_entry, answer[1:])]

    async def _spread(self, app: _App, entries: Sequence[Entry]) -> None:
        """Their doorbells ring afterwards: `app.ringing`."""
        for part in _independent(entries):
            await self._spread_part(app, part)

    async def _spread_part(self, app: _App, entries: Sequence[Entry]) -> None:
        app_id, settling = app.app_id, self._settling
        takers = [entry for entry in entries if _takes(entry.row)]
        taken = await asyncio.gather(
            *[settling.take_back(app_id, entry.msg_id, entry.row) for entry in takers]
        )
        withdrawn = {entry.msg_id: tuple(some) for entry, some in zip(takers, taken, strict=True) if some}
        entries = await self._with_online(app, entries)
        written = self._rows.write([(entry.msg_id, entry.row) for entry in entries])
        if any(entry.row.part_of for entry in entries):
            entries = _without(entries, await written)
            put = await self._put(app_id, _inboxes(entries))
        else:
            _, put = await asyncio.gather(written, self._put(app_id, _inboxes(entries)))
        await self._settle(app_id, entries, put.evictions)
        app.withdrawn.update((i, some) for i, some in withdrawn.items() if i in app.awaited)
        app.passed(entries[-1].msg_id)
        app.ringing = asyncio.create_task(self._ring(app.ringing, entries, put.routes, withdrawn))

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
        for rings in _rings(entries, routes, withdrawn):
            rung = [asyncio.ensure_future(self._bell.ring_nodes(*ring)) for ring in rings]
            _, late = await asyncio.wait(rung, timeout=RING_WAIT)
            for ring in rung:
                if ring in late:
                    ring.add_done_callback(_rung)
                else:
                    _rung(ring)

    async def _with_online(self, app: _App, entries: Sequence[Entry]) -> list[Entry]:
        """How many targets were online: counted when they were committed, if this process did it."""
        known = app.online
        if app.counted is not None and not app.counted.done() and entries[-1].msg_id not in known:
            await asyncio.wait(
                (app.counted,)
            )  # perhaps they are those of the commit whose answer comes just now
        unknown = [entry for entry in entries if entry.msg_id not in known]
        if unknown:
            online = await self._online(app.app_id, [entry.targets for entry in unknown])
            known.update(zip((e.msg_id for e in unknown), _counts(unknown, online), strict=True))
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
            self._help(app_id)
            await asyncio.sleep(POLL)

    def _help(self, app_id: int) -> None:
        """Spread the app's log, if nobody has the lock."""
        app = self._app(app_id)
        if app.run is None:
            self._runs += 1
            self._start(app, f"{self._name}.{self._runs}", None, acquire=True)

    # Recovery

    async def recover(self) -> None:
        """One turn: spread what waits and whose holder has gone; forget apps that have been idle."""
        share = max(LOOKS // max(self._processes(), 1), 16)
        count = int(await self._engine.run("ZCARD", INDEX))
        first = random.randrange(count - share + 1) if count > share else 0
        found = await self._engine.run("ZRANGE", INDEX, first, first + share - 1, "WITHSCORES")
        apps = [(int(app), int(float(number))) for app, number in zip(found[::2], found[1::2], strict=True)]
        looks = await asyncio.gather(*[self._look(app_id, number) for app_id, number in apps])
        for (app_id, _), look in zip(apps, looks, strict=True):
            if look == 2:
                self.left += 1
                self._help(app_id)
        await asyncio.gather(
            *[
                self._engine.call(_unindex, (INDEX,), (app_id, number))
                for (app_id, number), look in zip(apps, looks, strict=True)
                if look == 1
            ]
        )

    def _look(self, app_id: int, number: int) -> asyncio.Future[int]:
        return self._engine.call(
            _look, (of_app(app_id, "log"),), (tag_of_app(app_id), repr(self._clock()), IDLE, number)
        )

    async def purge(self, app_id: int, partitions: range, budget: int) -> int:
        """Of a deleted app; returns how many keys went."""
        keys = [of_app(app_id, what) for what in ("log", "lock", "head", "live")]
        return int(await self._engine.run("UNLINK", *keys))


def _rung(ring: asyncio.Future[None]) -> None:
    if not ring.cancelled() and (error := ring.exception()) is not None:
        log.warning("a node was not rung, it will notice: %s", error)


def _take_rung(steps: deque[_Step]) -> list[Entry]:
    rung: list[Entry] = []
    while steps and steps[0].ringing.done():
        rung += steps.popleft().entries
    return rung


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _next_group(waiting: deque[_Call]) -> Iterator[_Call]:
    """What goes into the next commit: one that goes alone, or those before it."""
    messages = size = 0
    while waiting:
        call = waiting[0]
        messages, size = messages + len(call.messages), size + call.size
        first = messages == len(call.messages)
        if not first and (call.alone or messages > GROUP_MESSAGES or size > GROUP_BYTES):
            return
        yield waiting.popleft()
        if call.alone:
            return


def _size(row: Row) -> int:
    return len(row.body) + (len(row.targets) if isinstance(row.targets, bytes) else 0)


def _arguments(row: Row, message: NewMessage) -> tuple[str | bytes, ...]:
    """As commit.lua wants them."""
    live = repr(row.expires_at) if row.broadcast and row.lasting else ""
    return live, row.cid, row.sendno, msgspec.msgpack.encode(row)


def _used(answer: Sequence[Any]) -> dict[int, Appended]:
    """By place: what was stored before with the same cid."""
    return {
        int(place): Appended(int(msg_id), True, sendno.decode())
        for place, msg_id, sendno in zip(answer[::3], answer[1::3], answer[2::3], strict=True)
    }


def _ids_of(group: Sequence[_Call], first: int) -> Iterator[tuple[_Call, range]]:
    for call in group:
        yield call, range(first, first + len(call.messages))
        first += len(call.messages)


def _finish(app: _App, call: _Call, answers: list[Appended]) -> None:
    app.awaited.difference_update(answer.msg_id for answer in answers if not answer.repeated)
    if app.withdrawn:
        answers = [
            replace(answer, withdrawn=app.withdrawn.pop(answer.msg_id))
            if not answer.repeated and answer.msg_id in app.withdrawn
            else answer
            for answer in answers
        ]
    if not call.future.done():
        call.future.set_result(answers)


def _counts(entries: Sequence[Entry], online: BitMap) -> list[int]:
    return [entry.targets.intersection_cardinality(online) for entry in entries]


def _bounded(entries: Iterable[Entry]) -> list[Entry]:
    """As many as are spread in one step."""
    some: list[Entry] = []
    deliveries = size = 0
    for entry in entries:
        deliveries += 0 if entry.row.broadcast else len(entry.targets)
        size += _size(entry.row)
        if some and (deliveries > SPREAD_DELIVERIES or size > SPREAD_BYTES or len(some) >= SPREAD_ENTRIES):
            break
        some.append(entry)
    return some


def _without(entries: Sequence[Entry], gone: Mapping[int, BitMap]) -> Sequence[Entry]:
    """Some targets are to get nothing of them."""
    return [entry._replace(targets=entry.targets - gone.get(entry.msg_id, BitMap())) for entry in entries]


def _takes(row: Row) -> bool:
    """It may take others' places, or (paced) its parts may lose theirs."""
    return bool(row.collapse or (row.replaces and not row.paced))


def _independent(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Runs in which none takes another one's place: that has to be in the inboxes before."""
    run: list[Entry] = []
    keys: set[str] = set()
    ids: set[int] = set()
    for entry in entries:
        row = entry.row
        if run and ((row.collapse and row.collapse in keys) or (row.replaces and row.replaces in ids)):
            yield run
            run, keys, ids = [], set(), set()
        run.append(entry)
        if row.collapse:
            keys.add(row.collapse)
        ids.update((entry.msg_id, row.part_of))
    if run:
        yield run


def _inboxes(entries: Sequence[Entry]) -> dict[int, Inbox]:
    """What each device gets of them. What does not last is not kept, but the route is asked for."""
    inboxes: dict[int, Inbox] = {}
    for msg_id, row, targets in entries:
        if row.broadcast or row.paced:
            continue
        one = (msg_id, row.expires_at if row.lasting else 0.0)
        evicts = row.evicts and row.lasting
        for devno in targets:
            known = inboxes.get(devno)
            if known is None:
                inboxes[devno] = Inbox([one], evicts)
            else:
                known.entries.append(one)
                if evicts and not known.evicts:
                    inboxes[devno] = known._replace(evicts=True)
    return inboxes


Ring = tuple[Sequence[int] | None, list[Doorbell]]
"""Whom to ring (None: all nodes), and what."""


def _rings(
    entries: Sequence[Entry], routes: Mapping[int, int], withdrawn: Mapping[int, Sequence[Withdrawn]]
) -> Iterator[list[Ring]]:
    """Those of one list may go at the same time: what goes to all nodes and what goes to some take turns, so that
    each node hears the ids in their order."""
    everywhere: list[Doorbell] = []
    by_node: dict[int, list[Doorbell]] = {}
    for entry in entries:
        general, targeted = _general(entry, withdrawn), _targeted(entry, routes)
        if general and by_node:
            yield [((node,), doorbells) for node, doorbells in by_node.items()]
            by_node = {}
        everywhere += general
        if targeted and everywhere:
            yield [(None, everywhere)]
            everywhere = []
        for node, doorbell in targeted.items():
            by_node.setdefault(node, []).append(doorbell)
    if everywhere:
        yield [(None, everywhere)]
    if by_node:
        yield [((node,), doorbells) for node, doorbells in by_node.items()]


def _general(entry: Entry, withdrawn: Mapping[int, Sequence[Withdrawn]]) -> list[Doorbell]:
    msg_id, row, targets = entry
    doorbells: list[Doorbell] = []
    if msg_id in withdrawn:
        doorbells.append(Recalled(withdrawn[msg_id]))
    if row.broadcast and targets and not row.paced:
        doorbells.append(Broadcast(StoredBroadcast(stored_message(msg_id, row), targets, BitMap())))
    return doorbells


def _targeted(entry: Entry, routes: Mapping[int, int]) -> dict[int, Doorbell]:
    """By node."""
    msg_id, row, targets = entry
    if row.broadcast or row.paced:
        return {}
    devnos: dict[int, list[int]] = {}
    for devno in targets:
        node = routes.get(devno)
        if node is not None:
            devnos.setdefault(node, []).append(devno)
    if not devnos:
        return {}
    message = stored_message(msg_id, row)
    return {node: Targeted(message, tuple(some)) for node, some in devnos.items()}
