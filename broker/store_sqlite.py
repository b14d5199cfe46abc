"""The embedded store: SQLite in WAL mode, one writer thread with group commit, two reader threads.

    event loop --submit--> writer   one transaction for all that waits; then Effects and futures come back
               --submit--> readers  (devices and owed rows; reports and lists): one read transaction for all

In memory, bounded: posting lists and registration ids that were used lately. For each device: a route bit, a
"may owe" bit, eight bytes of epoch. Why it is so, with the measurements: docs/decisions/0004-sqlite-store.md.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from weakref import WeakValueDictionary

from pyroaring import BitMap

from broker.bitmaps import memory_of
from broker.model import (
    AccessRule,
    Activity,
    App,
    Appended,
    AppSettings,
    AuditEntry,
    BehaviourEvent,
    Claim,
    Device,
    DeviceChange,
    MessageRecord,
    NewDevice,
    NewMessage,
    NodeInfo,
    OwedRequest,
    Receipt,
    RecordChange,
    Retained,
    Route,
    RouteCheck,
    SessionItem,
    Settled,
    Step,
    StoredBroadcast,
    StoredMessage,
    Term,
    TermKey,
    Withdrawn,
)
from broker.nodes_local import OneNode
from broker.sqlite.activity import ActivityReads, ActivityWrites
from broker.sqlite.audit import AuditReads, AuditWrites
from broker.sqlite.callbacks import CallbackReads, CallbackWrites, SqliteCallbacks
from broker.sqlite.engine import cannot_open, connect, lock_data_dir, open_database
from broker.sqlite.files import RESERVE, FileReads, FileWrites, SqliteFiles, remove_orphans
from broker.sqlite.inbox import Fresh, InboxWrites
from broker.sqlite.index import IndexReads, IndexWrites
from broker.sqlite.messages import Append, Ids, MessageWrites
from broker.sqlite.reads import Reads
from broker.sqlite.records import RecordReads, RecordWrites, SqliteRecords
from broker.sqlite.routes import AppStates
from broker.sqlite.settling import SettleWrites
from broker.sqlite.threads import (
    Checkpointer,
    Effects,
    Engine,
    LogGauge,
    Operation,
    Reader,
    StoreStats,
    Writer,
)
from broker.sqlite.upkeep import Upkeep
from broker.store import StoreError, StoreFull, StoreUnavailable
from broker.telling.attendance import Attendance, Bits, Stretch, add_fresh
from broker.telling.calendar import Calendar

log = logging.getLogger(__name__)

DAY: Final = 86_400.0
POSTING_BYTES: Final = 64 << 20  # memory for posting lists that were used lately
POSTING_OVERHEAD: Final = 400  # of one cached list, beside its bits
CHANGE_SIZE: Final = 100  # of one devno whose change is not applied to a cached list yet
LOAD_SLICE: Final = 16  # posting lists read at once: about 8 ms of the writer for a million devices
RESOLVED_DEVICES: Final = (
    131_072  # registration ids whose devno is remembered (about 300 bytes each); others cost a read
)
WRITER_CACHE: Final = 32 << 20  # SQLite pages
READER_CACHE: Final = 8 << 20
LAST_ONLINE_DELAY: Final = 3.0  # until the times of the devices that left are written
LAST_ONLINE_DEVICES: Final = 20_000  # or until so many left
EPOCHS_PER_RUN: Final = 1 << 40  # claims between two starts: a million a second for twelve days; 2**63 in all
DROP_SLICE: Final = 4_096  # devices that lose a term in one transaction, so that other writes get through

PostingKey = tuple[int, str, str]  # app, kind, value


class _Engine(Engine):
    """The tables' handlers, on the writer's connection. What they gather in a transaction is begun and ended here."""

    def __init__(
        self,
        index: IndexWrites,
        inbox: InboxWrites,
        settling: SettleWrites,
        callbacks: CallbackWrites,
        *others: AuditWrites | RecordWrites | FileWrites | ActivityWrites | MessageWrites | Upkeep,
    ) -> None:
        self._index = index
        self._inbox = inbox
        self._settling = settling
        self._callbacks = callbacks
        self.handlers = {}
        for part in (index, settling, callbacks, *others):
            self.handlers |= part.handlers

    def begin(self) -> Effects:
        effects = Effects()
        self._index.begin(effects)
        self._inbox.begin()
        self._settling.begin()
        self._callbacks.begin()
        return effects

    def finish(self) -> None:
        self._index.flush_postings()
        self._inbox.finish()
        self._callbacks.flush()


class _Posting:
    """One cached list. `bits` is never changed in place, its users may hold it: changes are gathered, and applied
    when somebody asks or when they weigh as much as the list."""

    __slots__ = ("__weakref__", "_changes", "bits", "weight")

    def __init__(self) -> None:
        self.bits: BitMap | None = None  # None: it is being loaded
        self.weight = 0  # bytes of the bits
        self._changes: dict[int, bool] = {}

    @property
    def size(self) -> int:
        return self.weight + CHANGE_SIZE * len(self._changes)

    def load(self, bits: BitMap) -> None:
        self.bits, self.weight = bits, memory_of(bits)
        self._changes.clear()

    def change(self, devnos: Mapping[int, bool]) -> None:
        self._changes.update(devnos)
        if CHANGE_SIZE * len(self._changes) > self.weight:
            self.read()

    def read(self) -> BitMap:
        assert self.bits is not None
        if self._changes:
            on = BitMap([devno for devno, has in self._changes.items() if has])
            off = BitMap([devno for devno, has in self._changes.items() if not has])
            self.load((self.bits | on) - off)
        return self.bits


class _Postings:
    """Posting lists that were used lately, and those that somebody holds: changes reach both."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._held: WeakValueDictionary[PostingKey, _Posting] = WeakValueDictionary()
        self._recent: OrderedDict[PostingKey, tuple[_Posting, int]] = (
            OrderedDict()
        )  # with the size it counts for

    def hold(self, key: PostingKey) -> _Posting:
        """Follows the changes for as long as the caller has it, whatever is put aside meanwhile."""
        if key in self._recent:
            self._recent.move_to_end(key)
            return self._recent[key][0]
        return self._held.setdefault(key, _Posting())

    def put(self, key: PostingKey, bits: BitMap) -> None:
        posting = self.hold(key)
        posting.load(bits)
        self._weigh(key, posting)

    def change(self, key: PostingKey, devnos: Mapping[int, bool]) -> None:
        posting = self._held.get(key)
        if posting is not None and posting.bits is not None:
            posting.change(devnos)
            if key in self._recent:
                self._weigh(key, posting)

    def _weigh(self, key: PostingKey, posting: _Posting) -> None:
        """Count it among the recent ones, and put others aside."""
        _, before = self._recent.get(key, (posting, 0))
        size = POSTING_OVERHEAD + len(key[2]) + posting.size
        self._recent[key] = posting, size
        self._size += size - before
        while self._size > self._limit and len(self._recent) > 1:
            self._size -= self._recent.popitem(last=False)[1][1]


class SqliteStore:
    """Implements `broker.store.Store`. `path` is the database file; its directory is locked while it is open.

    `clock` gives Unix seconds. `stats` has the counters for the metrics."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.time,
        report_lifetime: float = 30 * DAY,
        cid_lifetime: float = 1 * DAY,
        event_lifetime: float = 7 * DAY,
        activity_lifetime: float = 61 * DAY,
        audit_lifetime: float = 365 * DAY,
        time_zone: str = "UTC",
        posting_bytes: int = POSTING_BYTES,
        file_reserve: int = RESERVE,
    ) -> None:
        self.stats = StoreStats()
        self._path = path
        self._file_reserve = file_reserve
        self._clock = clock
        self._report_lifetime = report_lifetime
        self._cid_lifetime = cid_lifetime
        self._event_lifetime = event_lifetime
        self.activity_lifetime = activity_lifetime
        self._audit_lifetime = audit_lifetime
        self.calendar = Calendar(time_zone)
        self._open = False
        self._states = AppStates()
        self._fresh = Fresh()
        self._deleted: set[int] = set()  # apps that are gone but whose rows may still be there
        self._postings = _Postings(posting_bytes)
        # Ordered: to find the oldest entry of a dict takes a pass over all that were deleted before it.
        self._resolved: OrderedDict[tuple[int, str], int] = OrderedDict()
        self._last_online: dict[tuple[int, int], float] = {}
        self._writing_last_online: dict[tuple[int, int], float] = {}
        self._last_online_timer: asyncio.TimerHandle | None = None
        self._last_epoch = 0
        self._claimer = ""  # the node whose devices those with a route are
        self._attendance = Attendance(self.calendar, clock, self._routed, self._write_activity)
        self.records = SqliteRecords(self._write, self._list, self._check_app)
        self.files = SqliteFiles(self._write, self._list, self._check_app, self._free)
        self.callbacks = SqliteCallbacks(self._write, self._list, lambda: self._callback_writes.wanted)
        self.nodes = OneNode(clock)

    # Life

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self._open_engine)
        except sqlite3.Error as error:
            raise cannot_open(self._path, error) from error
        self._open = True
        self._attendance.open()

    def _open_engine(self) -> None:
        self._lock = lock_data_dir(self._path.parent)
        self._connections: list[sqlite3.Connection] = []
        self._gauge: LogGauge | None = None
        try:
            connection = open_database(self._path, cache_size=WRITER_CACHE)
            self._connections.append(connection)
            self._load(connection)
            self._start(connection)
        except BaseException:
            self._disconnect()
            raise

    def _connect(self) -> sqlite3.Connection:
        connection = connect(self._path, cache_size=READER_CACHE)
        self._connections.append(connection)
        return connection

    def _disconnect(self) -> None:
        for connection in reversed(self._connections):  # the last one empties the log
            connection.close()
        if self._gauge is not None:
            self._gauge.close()
        os.close(self._lock)

    def _load(self, connection: sqlite3.Connection) -> None:
        greatest = connection.execute(
            "SELECT max(id, moved, coalesce((SELECT max(msg_id) FROM messages), 0),"
            " coalesce((SELECT max(id) FROM events), 0),"
            " coalesce((SELECT max(id) FROM callback_events), 0)) FROM high_water"
        ).fetchone()[0]
        self._ids = Ids(greatest, self._clock)
        (self._last_epoch,) = connection.execute(
            "UPDATE high_water SET epoch = epoch + ? RETURNING epoch", (EPOCHS_PER_RUN,)
        ).fetchone()
        self._deleted = {row[0] for row in connection.execute("SELECT app_id FROM apps WHERE deleted")}
        remove_orphans(connection)

    def _start(self, connection: sqlite3.Connection) -> None:
        self._callback_writes = callbacks = CallbackWrites(connection, self._ids)
        inbox = InboxWrites(connection, self._states, self._fresh)
        self._states.load_owed(inbox.open())
        settling = SettleWrites(connection, self._clock, inbox, callbacks)
        records = RecordWrites(connection)
        activity = ActivityWrites(connection, self.calendar, self.activity_lifetime)
        engine = _Engine(
            IndexWrites(connection, self._clock),
            inbox,
            settling,
            callbacks,
            records,
            FileWrites(connection),
            AuditWrites(connection),
            activity,
            MessageWrites(
                connection,
                self._ids,
                self._clock,
                self._cid_lifetime,
                self._states,
                inbox,
                settling,
                records,
                callbacks,
            ),
            Upkeep(
                connection,
                self._ids,
                inbox,
                settling,
                callbacks,
                activity,
                self._report_lifetime,
                self._event_lifetime,
                self._audit_lifetime,
            ),
        )
        self._checkpointer = Checkpointer(self._connect())
        self._gauge = LogGauge(self._path)
        self._writer = Writer(
            connection,
            engine,
            self._checkpointer,
            self._gauge,
            self.stats,
            loop=self._loop,
            committed=self._committed,
        )
        self._reader = self._new_reader("store-reader")  # what a connecting device waits for
        self._lister = self._new_reader("store-lister")  # what may take long
        self._checkpointer.start()
        for worker in (self._writer.worker, self._reader.worker, self._lister.worker):
            worker.start()

    def _new_reader(self, name: str) -> Reader:
        connection = self._connect()
        handlers = {
            **Reads(connection, self._clock, self._fresh).handlers,
            **IndexReads(connection).handlers,
            **RecordReads(connection).handlers,
            **FileReads(connection).handlers,
            **CallbackReads(connection).handlers,
            **AuditReads(connection).handlers,
            **ActivityReads(connection).handlers,
        }
        return Reader(name, connection, handlers, self._loop)

    async def close(self) -> None:
        if not self._open:
            return
        self._write_last_online()
        self._attendance.close()
        self._open = False
        await asyncio.to_thread(self._close_engine)

    def _close_engine(self) -> None:
        for worker in (self._writer.worker, self._reader.worker, self._lister.worker):
            worker.stop()
        self._checkpointer.stop()
        self._disconnect()

    # Calls into the threads

    def _future(self) -> asyncio.Future[Any]:
        if not self._open:
            raise StoreUnavailable("the store is closed")
        return self._loop.create_future()

    def _write(self, kind: str, argument: Any, rows: int = 1) -> asyncio.Future[Any]:
        future = self._future()
        self._writer.worker.submit(Operation(kind, argument, rows, future))
        return future

    def _read(self, reader: Reader, kind: str, argument: Any, rows: int = 1) -> asyncio.Future[Any]:
        future = self._future()
        reader.worker.submit(Operation(kind, argument, rows, future))
        return future

    def _list(self, kind: str, argument: Any, rows: int = 1) -> asyncio.Future[Any]:
        """A read that nobody who connects waits for."""
        return self._read(self._lister, kind, argument, rows)

    def _committed(self, operations: list[Operation], effects: Effects) -> None:
        """A group was committed (or failed, then `effects` is empty and the results are errors)."""
        for key, bits in effects.loaded.items():
            self._postings.put(key, bits)
        for key, devnos in effects.postings.items():  # final states: right for what was loaded midway, too
            self._postings.change(key, devnos)
        for (app_id, devno), generation in effects.generations.items():
            self._states[app_id].generations[devno] = generation
        for operation in operations:
            if operation.kind == "append":
                self._states.committed(operation.argument.inboxes)

    def _check_app(self, app_id: int) -> None:
        if app_id in self._deleted:
            raise StoreError(f"app {app_id} was deleted")

    def _free(self) -> int:
        """Bytes that files may take: the disk's, less the reserve."""
        disk = os.statvfs(self._path.parent)
        return disk.f_bavail * disk.f_frsize - self._file_reserve

    # Apps

    async def create_app(self, name: str, *, open: bool = False, offline_limit: int = 100) -> App:
        app: App = await self._write("create_app", (name, open, offline_limit))
        return app

    async def find_app(self, key: str) -> App | None:
        found: tuple[App, dict[int, int]] | None = await self._read(self._reader, "find_app", key)
        if found is None or found[0].app_id in self._deleted:
            return None
        app, generations = found
        known = self._states[app.app_id].generations
        for devno, generation in generations.items():
            known[devno] = max(generation, known.get(devno, 0))  # a newer one may have come meanwhile
        return app

    async def list_apps(self, after: int = 0, limit: int = 1000) -> list[App]:
        apps: list[App] = await self._read(self._lister, "list_apps", (after, limit))
        return apps

    async def rotate_secret(self, key: str) -> App | None:
        app: App | None = await self._write("rotate_secret", key)
        return app

    async def set_access(self, key: str, rules: Sequence[AccessRule]) -> App | None:
        app: App | None = await self._write("set_access", (key, tuple(rules)))
        return app

    async def set_settings(
        self, key: str, settings: AppSettings, former: AppSettings | None = None
    ) -> App | None:
        app: App | None = await self._write("set_settings", (key, settings, former))
        return app

    async def delete_app(self, key: str) -> bool:
        app_id: int | None = await self._write("delete_app", key)
        if app_id is None:
            return False
        self._deleted.add(app_id)
        self._states.drop(app_id)
        self._attendance.drop(app_id)
        return True

    # Devices and the index over them

    async def register(self, app_id: int, devices: Sequence[NewDevice]) -> list[Device]:
        self._check_app(app_id)
        registered: list[Device] = await self._write("register", (app_id, devices), 4 * len(devices))
        return registered

    async def register_new(self, app_id: int, device: NewDevice) -> Device | None:
        self._check_app(app_id)
        registered: Device | None = await self._write("register_new", (app_id, device), 4)
        return registered

    async def find_devices(self, app_id: int, registration_ids: Sequence[str]) -> dict[str, Device]:
        unwritten = self._unwritten_last_online()
        found: dict[str, Device] = await self._read(self._reader, "find_devices", (app_id, registration_ids))
        return {rid: self._with_last_online(device, unwritten) for rid, device in found.items()}

    def _unwritten_last_online(self) -> tuple[Mapping[tuple[int, int], float], ...]:
        """Before a read: what it may not find in the database, even if it was written when the read ends."""
        return self._last_online, self._writing_last_online

    def _with_last_online(
        self, device: Device, unwritten: Sequence[Mapping[tuple[int, int], float]]
    ) -> Device:
        key = (device.app_id, device.devno)
        newest = (*self._unwritten_last_online(), *unwritten)
        at = next((times[key] for times in newest if key in times), None)
        return device if at is None else replace(device, last_online_at=at)

    async def resolve(self, app_id: int, registration_ids: Sequence[str]) -> dict[str, int]:
        resolved = self._resolved
        known: dict[str, int] = {}
        missing: list[str] = []
        for rid in registration_ids:
            devno = resolved.get((app_id, rid))
            if devno is None:
                missing.append(rid)
            else:
                known[rid] = devno
        if missing:
            found: dict[str, int] = await self._read(self._reader, "resolve", (app_id, missing))
            resolved.update({(app_id, rid): devno for rid, devno in found.items()})
            while len(resolved) > RESOLVED_DEVICES:
                resolved.popitem(last=False)
            known.update(found)
        return known

    async def resolve_bitmap(self, app_id: int, registration_ids: Sequence[str]) -> BitMap:
        found: BitMap = await self._list("resolve_bitmap", (app_id, registration_ids), len(registration_ids))
        return found

    async def names(self, app_id: int, devnos: Sequence[int]) -> dict[int, str]:
        found: dict[int, str] = await self._read(self._lister, "names", (app_id, devnos))
        return found

    async def change_devices(self, app_id: int, changes: Mapping[str, DeviceChange]) -> dict[str, Device]:
        self._check_app(app_id)
        unwritten = self._unwritten_last_online()
        devices: dict[str, Device] = await self._write("change_devices", (app_id, changes), 4 * len(changes))
        return {rid: self._with_last_online(device, unwritten) for rid, device in devices.items()}

    async def postings(self, app_id: int, terms: Sequence[TermKey]) -> list[BitMap]:
        held = {(kind, value): self._postings.hold((app_id, str(kind), value)) for kind, value in terms}
        while missing := [term for term, posting in held.items() if posting.bits is None]:
            # Through the writer's queue, so that no change of before or after is missed; others' writes go between.
            await self._write("load_postings", (app_id, missing[:LOAD_SLICE]), LOAD_SLICE)
        return [held[kind, value].read() for kind, value in terms]  # of one moment: nothing is awaited here

    async def union_bitmap(self, app_id: int, kind: Term, values: Sequence[str]) -> BitMap:
        found: BitMap = await self._list("union_bitmap", (app_id, str(kind), values), len(values))
        return found

    async def list_terms(self, app_id: int, kind: str) -> list[str]:
        values: list[str] = await self._read(self._lister, "list_terms", (app_id, str(kind)))
        return values

    async def drop_term(self, app_id: int, term: TermKey, only: BitMap | None = None) -> BitMap:
        self._check_app(app_id)
        (posting,) = await self.postings(app_id, [term])
        dropped = posting.copy() if only is None else posting & only
        left = dropped.copy()
        while left:
            part = left[:DROP_SLICE]
            await self._write("drop_term", (app_id, term, part), 4 * len(part))
            left -= part
        return dropped

    # Who was there when

    def _routed(self, app_id: int) -> BitMap:
        return self._states[app_id].routed

    def _write_activity(self, rows: list[Bits]) -> asyncio.Future[Any]:
        return self._write("activity", rows, sum(1 + len(row[-1]) // 65_536 for row in rows))

    async def active(self, app_id: int, activity: Activity, start: float, end: float) -> BitMap:
        (devnos,) = await self._active(app_id, activity, [(start, end)])
        return devnos

    async def active_counts(self, app_id: int, activity: Activity, stretches: Sequence[Stretch]) -> list[int]:
        return [len(devnos) for devnos in await self._active(app_id, activity, stretches)]

    async def _active(self, app_id: int, activity: Activity, stretches: Sequence[Stretch]) -> list[BitMap]:
        fresh = self._attendance.find(app_id, activity)
        found: list[BitMap] = await self._list("active", (app_id, str(activity), stretches), len(stretches))
        add_fresh(found, stretches, fresh)
        return found

    async def registered_before(self, app_id: int, times: Sequence[float]) -> list[int]:
        counts: list[int] = await self._list("registered_before", (app_id, times), len(times))
        return counts

    def token_generations(self, app_id: int) -> Mapping[int, int]:
        return MappingProxyType(self._states[app_id].generations)

    # Messages

    async def append(
        self, messages: Sequence[NewMessage], changes: Sequence[RecordChange] = ()
    ) -> list[Appended]:
        inboxes: defaultdict[int, BitMap] = defaultdict(BitMap)
        rows, depends = 0, bool(changes)
        for message in messages:
            self._check_app(message.app_id)
            rows += 2
            depends = depends or bool(message.replaces or message.collapse)
            if message.broadcast or message.paced or message.expires_at <= message.created_at:
                continue
            app_id, targets = message.app_id, message.targets
            rows += len(targets)
            may_owe = self._states[app_id].may_owe
            if len(targets) == 1:  # most are: a third of the time that bitmaps take
                devno = targets.min()
                may_owe.add(devno)
                inboxes[app_id].add(devno)
                continue
            may_owe |= targets
            inboxes[app_id].update(targets)
        call = Append(messages, inboxes, changes, depends)
        appended: list[Appended] = await self._write("append", call, rows)
        return appended

    async def find_cids(self, app_id: int, cids: Sequence[str]) -> dict[str, Appended]:
        found: dict[str, Appended] = await self._list("find_cids", (app_id, cids), len(cids))
        return found

    async def fetch_owed(self, requests: Sequence[OwedRequest]) -> list[list[StoredMessage]]:
        future = self._read(self._reader, "fetch_owed", requests, len(requests))
        nothing: dict[int, BitMap] = {}
        self._states.begin_fetch()
        try:
            owed: list[list[StoredMessage]] = await future
            for request, found in zip(requests, owed, strict=True):
                if not found and request.after <= 0:
                    nothing.setdefault(request.app_id, BitMap()).add(request.devno)
        finally:
            self._states.end_fetch(nothing)
        return owed

    async def live_broadcasts(self, app_id: int) -> list[StoredBroadcast]:
        answer: tuple[list[StoredBroadcast], list[int]] = await self._read(
            self._lister, "live_broadcasts", app_id
        )
        live, finished = answer
        if finished:
            with suppress(StoreError):  # only saves the next call work
                await self._write("fold", finished, len(finished))
        return live

    async def settle(self, settled: Sequence[Settled]) -> None:
        rows = sum(1 + len(item.delivered) + len(item.evicted) for item in settled if not item.broadcast)
        await self._write("settle", settled, rows + len(settled))

    async def recall(self, app_id: int, msg_ids: Sequence[int], now: float) -> list[Withdrawn]:
        withdrawn: list[Withdrawn] = await self._write("recall", (app_id, msg_ids, now), len(msg_ids))
        return withdrawn

    async def find_steps(self, app_id: int, msg_id: int) -> list[Step]:
        steps: list[Step] = await self._list("find_steps", (app_id, msg_id))
        return steps

    async def find_messages(self, app_id: int, msg_ids: Sequence[int]) -> dict[int, MessageRecord]:
        found: dict[int, MessageRecord] = await self._read(self._lister, "find_messages", (app_id, msg_ids))
        return found

    async def record_receipts(self, receipts: Sequence[Receipt]) -> None:
        for receipt in receipts:
            if receipt.event != "shown":
                self._attendance.note(receipt.app_id, Activity.ACTIVE, receipt.devno)
        await self._write("receipts", receipts, len(receipts))

    async def record_events(self, events: Sequence[BehaviourEvent]) -> None:
        for event in events:
            self._attendance.note(event.app_id, Activity.ACTIVE, event.devno)
        await self._write("events", events, len(events))

    async def list_events(self, app_id: int, after: int, limit: int) -> list[tuple[int, BehaviourEvent]]:
        events: list[tuple[int, BehaviourEvent]] = await self._read(
            self._lister, "list_events", (app_id, after, limit)
        )
        return events

    # Administrative calls

    async def record_audit(self, entries: Sequence[AuditEntry]) -> None:
        await self._write("audit", tuple(entries), len(entries))

    async def list_audit(self, app_id: int | None, before: int, limit: int) -> list[tuple[int, AuditEntry]]:
        entries: list[tuple[int, AuditEntry]] = await self._list("list_audit", (app_id, before, limit), 1)
        return entries

    # Ordinary retained messages

    async def retain(self, retained: Sequence[Retained]) -> None:
        await self._write("retain", retained, len(retained))

    async def list_retained(self, app_id: int) -> list[Retained]:
        retained: list[Retained] = await self._read(self._lister, "list_retained", app_id)
        return retained

    async def find_home(self, app_id: int) -> NodeInfo | None:
        return None

    # Durable MQTT sessions

    async def save_session_items(self, items: Sequence[SessionItem]) -> None:
        await self._write("session_items", items, len(items))

    async def list_session_items(self, app_id: int) -> list[SessionItem]:
        items: list[SessionItem] = await self._read(self._lister, "list_session_items", app_id)
        return items

    # Routes: one node, this process, so they are only in memory

    def claim_route(self, app_id: int, devno: int, node_id: str, done: Callable[[Claim], None]) -> None:
        if not self._open:
            raise StoreUnavailable("the store is closed")
        self._attendance.note(app_id, Activity.ONLINE, devno)
        self._last_epoch += 1
        self._claimer = node_id
        done(Claim(self._last_epoch, self._states[app_id].claim(devno, self._last_epoch)))

    def release_route(self, app_id: int, devno: int, epoch: int, now: float) -> None:
        if not self._open:
            raise StoreUnavailable("the store is closed")
        self._attendance.turn(app_id)
        if not self._states[app_id].release(devno, epoch):
            return
        self._last_online[app_id, devno] = now
        if len(self._last_online) >= LAST_ONLINE_DEVICES:
            self._write_last_online()
        elif self._last_online_timer is None:
            self._last_online_timer = self._loop.call_later(LAST_ONLINE_DELAY, self._write_last_online)

    def _write_last_online(self) -> None:
        if self._last_online_timer is not None:
            self._last_online_timer.cancel()
            self._last_online_timer = None
        if not self._last_online:
            return
        times, self._last_online = self._last_online, {}
        self._writing_last_online.update(times)
        future = self._write("last_online", times, len(times))
        future.add_done_callback(lambda done: self._wrote_last_online(times, done))

    def _wrote_last_online(self, times: Mapping[tuple[int, int], float], done: asyncio.Future[Any]) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            log.warning("when %d devices were last online is not recorded: %s", len(times), error)
        # Another dict: reads that are under way hold this one.
        self._writing_last_online = {
            key: at for key, at in self._writing_last_online.items() if times.get(key) != at
        }

    async def inspect_routes(self, app_id: int, routes: Mapping[int, int]) -> RouteCheck:
        return self._states[app_id].inspect(routes)

    async def find_routes(self, app_id: int, devnos: Sequence[int]) -> dict[int, Route]:
        state = self._states[app_id]
        epochs = {devno: epoch for devno in devnos if (epoch := state.epoch(devno))}
        return {
            devno: Route(self._claimer if devno in state.routed else "", epoch)
            for devno, epoch in epochs.items()
        }

    async def online(self, app_id: int, devnos: BitMap | None = None) -> BitMap:
        routed = self._states[app_id].routed
        return routed.copy() if devnos is None else routed & devnos

    # Upkeep

    async def expire(self, now: float) -> int:
        with suppress(StoreFull):  # there is still no room; the rest may make some
            if gone := await self.files.remove_again():
                return gone
        expired: int = await self._write("expire", now)
        return expired
