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
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol

import msgspec
from msgspec.structs import replace

from broker.model import Appended, NewMessage, OwedRequest, RecordChange, StoredMessage
from broker.redis import spreading
from broker.redis.engine import Engine
from broker.redis.entries import Entry, count_online, is_wide, size_of, takes
from broker.redis.keys import of_app, tag_of_app
from broker.redis.records import refused
from broker.redis.rows import Row, row_of, stored_message
from broker.redis.scripts import load
from broker.redis.spreading import AppLog, Spreader, wake
from broker.redis.streams import first_id
from broker.redis.watch import Watch
from broker.store import StoreError, StoreFull, StoreUnavailable, UnknownMessage

log = logging.getLogger(__name__)

MAX_LOG: Final = (
    100_000  # entries that wait to be spread: past it pushes are refused, so that Redis keeps its memory
)
BACKLOG: Final = 500  # entries; past it appends wait until another process has spread theirs
GROUP_MESSAGES: Final = 2_000  # in one commit
GROUP_BYTES: Final = 4 << 20  # of their rows, likewise; one call may have more
SPREAD_WAIT: Final = 10.0  # seconds that an append waits for its own process to spread it
RECOVER: Final = 1.0  # seconds between two looks for logs without a holder
LOOKS: Final = 1_000  # apps that all processes look at in one turn
IDLE: Final = 10.0  # seconds without a push after which an app leaves the index
TRIES: Final = 20  # times a commit is prepared anew
INDEX: Final = "{spread}:apps"

_commit = load("commit")
_look = load("log_look")
_unindex = load("unindex")


class Rows(spreading.Rows, Protocol):
    async def read(self, app_id: int, ids: Iterable[int]) -> Mapping[int, Row]: ...


class Records(Protocol):
    async def prepare(self, changes: Sequence[RecordChange]) -> bytes: ...

    async def save(self, changes: Sequence[RecordChange]) -> Sequence[int]: ...


class Inboxes(spreading.Inboxes, Protocol):
    async def owed_ids(self, requests: Sequence[OwedRequest]) -> list[list[int]]: ...


class Call:
    """One append on its way into the log."""

    __slots__ = ("changes", "future", "messages", "rows", "size")

    def __init__(
        self, messages: Sequence[NewMessage], changes: Sequence[RecordChange], future: asyncio.Future[Any]
    ) -> None:
        self.messages = messages
        self.changes = changes
        self.future = future
        self.rows = [row_of(message) for message in messages]
        self.size = sum(map(size_of, self.rows))

    @property
    def alone(self) -> bool:
        """It is refused by itself, or not."""
        return bool(self.changes) or any(message.replaces for message in self.messages)


class Log:
    """`offline_limit` gives an app's newest-N; `clock` Unix seconds. Used on one event loop."""

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float],
        inboxes: Inboxes,
        rows: Rows,
        settling: spreading.Settling,
        records: Records,
        bell: spreading.Bell,
        *,
        offline_limit: Callable[[int], Awaitable[int]],
        cid_lifetime: float = 86_400.0,
        processes: Callable[[], int] = lambda: 1,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._inboxes = inboxes
        self._rows = rows
        self._records = records
        self._cid_lifetime = cid_lifetime
        self._processes = processes  # that share the work of `recover`
        self.left = 0  # times that a log with entries had no holder; for the metrics
        self.spreader = Spreader(engine, clock, inboxes, rows, settling, bell, offline_limit)
        self.finish, self.passed = self.spreader.finish, self.spreader.passed
        self._watch = Watch(self.recover, RECOVER, "logs without a holder cannot be looked for")

    async def open(self) -> None:
        self._watch.open()

    async def close(self) -> None:
        """Finish what was accepted; what cannot be spread now stays in the log."""
        await self._watch.close()
        await self.finish()

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
        call = Call(messages, changes, asyncio.get_running_loop().create_future())
        app = self.spreader.app(app_id)
        app.waiting.append(call)
        if app.committing is None:
            app.committing = asyncio.create_task(self._commit_all(app))
        appended: list[Appended] = await call.future
        return appended

    async def _commit_all(self, app: AppLog) -> None:
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
                    wake(app.counted)
        app.committing = app.counted = None
        self.spreader.forget(app)

    async def _commit(self, app: AppLog, group: Sequence[Call]) -> None:
        messages = [message for call in group for message in call.messages]
        rows = [row for call in group for row in call.rows]
        await self._check_replaced(app.app_id, messages)
        holder = self.spreader.new_holder()
        wide = [place for place, row in enumerate(rows) if is_wide(row)]
        if wide:  # not before: what is looked up may need spreading
            app.counted = asyncio.get_running_loop().create_future()
        answer, online = await asyncio.gather(
            self._ask_commit(app.app_id, holder, rows, group[0].changes, messages),
            self.spreader.online(app.app_id, [messages[place].targets for place in wide]),
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
        ours = owner == 1 or self.spreader.is_ours(owner)
        if ours and not isinstance(online, BaseException):
            counted = [entry for entry in entries if is_wide(entry.row)]
            app.online.update(zip((e.msg_id for e in counted), count_online(counted, online), strict=True))
        if app.counted is not None:
            wake(app.counted)
        if ours and owner != 1:
            app.extend(entries, int(answer[4]))
        if owner == 1:
            self.spreader.start(app, holder, None if before else entries)
        elif ours and app.run is None:  # it stopped because Redis was away
            self.spreader.start(app, owner.decode(), None)
        elif not ours and before > BACKLOG:
            await self._let_spread(app.app_id, first)
        answers = [
            used.get(place) or Appended(first + place, False, message.sendno, rung=True)
            for place, message in enumerate(messages)
        ]
        if entries and ours and app.run is not None and entries[-1].msg_id > app.spread_to:
            self._finish_when_spread(app, group, answers, entries)
        else:
            _finish(app, group, answers)

    async def _let_spread(self, app_id: int, msg_id: int) -> None:
        """Who does not spread must not commit faster than another process spreads."""
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(SPREAD_WAIT):
                await self.spreader.passed(app_id, msg_id)

    def _finish_when_spread(
        self, app: AppLog, group: Sequence[Call], answers: list[Appended], entries: Sequence[Entry]
    ) -> None:
        takers = [entry.msg_id for entry in entries if takes(entry.row)]
        app.awaited.update(takers)
        spread: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        late = asyncio.get_running_loop().call_later(SPREAD_WAIT, wake, spread)
        app.watched.append((entries[-1].msg_id, spread))

        def done(_: asyncio.Future[None]) -> None:
            late.cancel()
            app.awaited.difference_update(takers)
            _finish(app, group, answers)

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
            times = self.spreader.lock_times(now)
            answer: list[Any] = await self._engine.call(
                _commit,
                (of_app(app_id, "log"),),
                (
                    *(tag, token, first_id(now), repr(now), holder, *times, number, packed),
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

    async def _check_replaced(self, app_id: int, messages: Sequence[NewMessage]) -> None:
        """Raises UnknownMessage."""
        for msg_id in {message.replaces for message in messages if message.replaces}:
            if not await self._rows.read(app_id, [msg_id]):
                await self.spreader.passed(app_id, msg_id)
                if not await self._rows.read(app_id, [msg_id]):
                    raise UnknownMessage(str(msg_id))

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
            await self.spreader.passed(app_id, missing[-1])
            rows = {**rows, **await self._rows.read(app_id, missing)}
        return rows

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
                self.spreader.help(app_id)
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


def _next_group(waiting: deque[Call]) -> Iterator[Call]:
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


def _finish(app: AppLog, group: Iterable[Call], answers: list[Appended]) -> None:
    """`answers`: to all messages of these calls."""
    if app.withdrawn:
        answers = [
            replace(answer, withdrawn=app.withdrawn.pop(answer.msg_id))
            if not answer.repeated and answer.msg_id in app.withdrawn
            else answer
            for answer in answers
        ]
    start = 0
    for call in group:
        end = start + len(call.messages)
        if not call.future.done():
            call.future.set_result(answers[start:end])
        start = end
