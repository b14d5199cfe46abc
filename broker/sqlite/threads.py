"""The store's threads: one writer, two readers, one checkpointer.

The writer takes everything that waits and commits it as one transaction, so that thousands of writes share an
fsync; while it commits, the next group gathers. Each group ends in one callback on the event loop: first what
changed in memory (`Effects`), then the futures, in order. So whoever is told "done" finds every cache as it
was committed, and no cache can show what was rolled back.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from broker.sqlite.engine import as_store_error
from broker.store import StoreFull, StoreUnavailable

log = logging.getLogger(__name__)

# Seconds until the next commit, for each write in this one: the more comes in, the more share an fsync, log pages
# and the interpreter's lock. With five times as long 2,000 pushes a second arrived after 3.0 ms (p50), with this
# after 1.5, and no fewer were accepted (`bench targeted accepts`, 2026-11-22).
GROUP_PACE: Final = 0.0001
GROUP_PACE_MAX: Final = 0.003
GROUP_ROWS: Final = 20_000  # of one transaction; bounds the time the next one waits (0.1 to 0.3 s)
READS_PER_BATCH: Final = 1_024  # of one read transaction: calls, or devices asked about
# A page that many pushes touch is moved once: single accepts, 5,900 a second with 4 MB, 9,000 with 64 MB.
CHECKPOINT_PAGES: Final = 16_000  # new pages in the log (64 MB) after which they are moved into the database
RESET_PAGES: Final = 64_000  # pages in the log (256 MB) at which the writer makes it start anew
TRUNCATE_PAGES: Final = 4 * RESET_PAGES  # past it the log file gives its space back, too


@dataclass(slots=True, eq=False)
class Operation:
    """One call on its way through a thread."""

    kind: str
    argument: Any
    rows: int  # about how much work it is
    future: asyncio.Future[Any]
    result: Any = None  # an Exception is raised to the caller


@dataclass(slots=True)
class Effects:
    """What a committed group changes in the caches of the event loop's thread."""

    loaded: dict[tuple[int, str, str], Any] = field(default_factory=dict)  # term -> posting list
    postings: dict[tuple[int, str, str], dict[int, bool]] = field(default_factory=dict)  # devno -> has it
    generations: dict[tuple[int, int], int] = field(default_factory=dict)  # (app, devno) -> generation


@dataclass(slots=True)
class StoreStats:
    """Counters for the metrics. Written by the writer thread only."""

    commits: int = 0
    failed_commits: int = 0
    on_commit: Callable[[int, float], None] | None = None
    """Called on the event loop with (operations, seconds) after each commit."""


class Worker:
    """A thread with a queue of operations. `run` gets all that wait, up to a limit of rows. A worker with a `pace`
    pauses between calls, the longer the more the last one had to do, so that more share the next."""

    def __init__(
        self, name: str, run: Callable[[list[Operation]], None], limit: int, pace: float = 0.0
    ) -> None:
        self._pace = pace  # seconds for each operation
        self._next = 0.0  # when the next call may be
        self._queue: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._run = run
        self._limit = limit
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, operation: Operation) -> None:
        self._queue.put(operation)

    def stop(self) -> None:
        """Finish what waits, then end. Blocks."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        stopping = False
        while not stopping:
            group, stopping = self._take()
            if group:
                self._run(group)

    def _take(self) -> tuple[list[Operation], bool]:
        operation = self._queue.get()
        if self._pace and (early := self._next - time.monotonic()) > 0:
            time.sleep(early)
        started = time.monotonic()
        group: list[Operation] = []
        rows = 0
        while operation is not None:
            group.append(operation)
            rows += operation.rows
            if rows >= self._limit:
                return group, False
            try:
                operation = self._queue.get_nowait()
            except queue.Empty:
                self._next = started + min(self._pace * len(group), GROUP_PACE_MAX)
                return group, False
        return group, True


def resolve(operations: Sequence[Operation]) -> None:
    """Give the results to those who wait. On the event loop."""
    for operation in operations:
        if operation.future.done():  # cancelled by its caller
            continue
        if isinstance(operation.result, Exception):
            operation.future.set_exception(operation.result)
        else:
            operation.future.set_result(operation.result)


Handler = Callable[[list[Any]], list[Any]]
"""Arguments of several calls of one kind -> their results; an Exception among them is that call's."""


def apply(handlers: dict[str, Handler], kind: str, operations: list[Operation]) -> None:
    results = handlers[kind]([operation.argument for operation in operations])
    for operation, result in zip(operations, results, strict=True):
        operation.result = result


class Reader:
    """Runs reads that wait together as one, in one read transaction that ends with them: a later read must
    see later commits (S10)."""

    def __init__(
        self,
        name: str,
        connection: sqlite3.Connection,
        handlers: dict[str, Handler],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._connection = connection
        self._handlers = handlers
        self._loop = loop
        self.worker = Worker(name, self._run, READS_PER_BATCH)

    def _run(self, group: list[Operation]) -> None:
        by_kind: dict[str, list[Operation]] = {}
        for operation in group:
            by_kind.setdefault(operation.kind, []).append(operation)
        for kind, operations in by_kind.items():
            self._read(kind, operations)
        with suppress(RuntimeError):  # the loop was closed without us: nobody waits any more
            self._loop.call_soon_threadsafe(resolve, group)

    def _read(self, kind: str, operations: list[Operation]) -> None:
        try:
            self._connection.execute("BEGIN")
            try:
                apply(self._handlers, kind, operations)
            finally:
                self._connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - whatever it is, the callers wait for it
            if len(operations) > 1:
                for operation in operations:
                    self._read(kind, [operation])
                return
            operations[0].result = as_store_error(error)


class LogGauge:
    """How many pages the write-ahead log holds, from its shared index: `mxFrame` and `nBackfill` at fixed
    offsets (https://www.sqlite.org/walformat.html, 2.1). One system call, where a pragma would be several.

    Closing any descriptor of that file drops the process's locks on it: close this after all connections."""

    def __init__(self, database: Path) -> None:
        self._descriptor = os.open(f"{database}-shm", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> tuple[int, int]:
        """(pages in the log, those not moved yet)."""
        index = os.pread(self._descriptor, 100, 0)
        if len(index) < 100:
            return 0, 0
        pages = int.from_bytes(index[16:20], sys.byteorder)
        return pages, pages - int.from_bytes(index[96:100], sys.byteorder)

    def close(self) -> None:
        os.close(self._descriptor)


class Checkpointer:
    """Moves the write-ahead log into the database, away from the writer, so that no commit pays for it."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._wanted = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="store-checkpoint", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wanted.set()

    def stop(self) -> None:
        self._stopping = True
        self._wanted.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._stopping:
                return
            try:
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except sqlite3.Error as error:
                log.warning("checkpoint failed, the log keeps growing: %s", error)
                continue


class Engine:
    """What the writer needs from the code that knows the tables."""

    handlers: dict[str, Handler]

    def begin(self) -> Effects:
        raise NotImplementedError

    def finish(self) -> None:
        """Write what the handlers left pending, before the commit."""
        raise NotImplementedError


INDEX_KINDS: Final = frozenset(
    (
        "create_app",
        "rotate_secret",
        "set_access",
        "set_settings",
        "delete_app",
        "register",
        "register_new",
        "change_devices",
        "drop_term",
        "load_postings",
    )
)
LATER_KINDS: Final = (
    "append",
    "settle",
    "fold",
    "receipts",
    "events",
    "retain",
    "session_items",
    "last_online",
)
ALONE: Final = "expire"  # upkeep: a transaction of its own, between two groups


def phases(group: list[Operation]) -> list[tuple[str, list[Operation]]]:
    """The group in the order of its execution: the index in order of arrival (runs of one kind together),
    then all of each other kind, those of LATER_KINDS first. Nobody can tell: the calls of one group were all waiting
    at once."""
    runs: list[tuple[str, list[Operation]]] = []
    later: dict[str, list[Operation]] = {}
    for operation in group:
        if operation.kind not in INDEX_KINDS:
            later.setdefault(operation.kind, []).append(operation)
        elif runs and runs[-1][0] == operation.kind:
            runs[-1][1].append(operation)
        else:
            runs.append((operation.kind, [operation]))
    ordered = [kind for kind in LATER_KINDS if kind in later]
    return runs + [(kind, later[kind]) for kind in dict.fromkeys([*ordered, *later])]


class Writer:
    """The one thread that writes."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        engine: Engine,
        checkpointer: Checkpointer,
        gauge: LogGauge,
        stats: StoreStats,
        *,
        loop: asyncio.AbstractEventLoop,
        committed: Callable[[list[Operation], Effects], None],
    ) -> None:
        self._connection = connection
        self._engine = engine
        self._checkpointer = checkpointer
        self._gauge = gauge
        self._stats = stats
        self._loop = loop
        self._committed = committed  # on the event loop, before the futures
        self.worker = Worker("store-writer", self._run, GROUP_ROWS, GROUP_PACE)

    def _run(self, group: list[Operation]) -> None:
        together = [operation for operation in group if operation.kind != ALONE]
        if together:
            self._write(together)
        for operation in group:
            if operation.kind == ALONE:
                self._write([operation])
        self._bound_log()

    def _write(self, operations: list[Operation]) -> None:
        started = time.perf_counter()
        effects = Effects()
        try:
            effects = self._transact(operations)
        except Exception as error:  # noqa: BLE001 - whatever it is, the callers wait for it
            self._stats.failed_commits += 1
            reason = as_store_error(error)
            if len(operations) > 1 and not isinstance(reason, StoreFull | StoreUnavailable):
                for operation in operations:  # so that only the culprit fails
                    self._write([operation])
                return
            self._fail(operations, reason)
            seconds = None
        else:
            seconds = time.perf_counter() - started
            self._stats.commits += 1
        with suppress(RuntimeError):  # the loop was closed without us: nobody waits any more
            self._loop.call_soon_threadsafe(self._finish, operations, effects, seconds)

    def _transact(self, operations: list[Operation]) -> Effects:
        effects = self._engine.begin()
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            for kind, run in phases(operations) or [(ALONE, operations)]:
                apply(self._engine.handlers, kind, run)
            self._engine.finish()
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        return effects

    def _fail(self, operations: list[Operation], reason: Exception) -> None:
        log.error("a group of %d writes was rolled back: %s", len(operations), reason)
        self._checkpointer.wake()  # on a full disk the log may be what fills it
        for operation in operations:
            operation.result = type(reason)(*reason.args)  # one traceback each

    def _finish(self, operations: list[Operation], effects: Effects, seconds: float | None) -> None:
        """`seconds` of the commit; None if there was none."""
        self._committed(operations, effects)
        resolve(operations)
        if seconds is not None and self._stats.on_commit is not None:
            self._stats.on_commit(len(operations), seconds)

    def _bound_log(self) -> None:
        try:
            pages, waiting = self._gauge.read()
        except OSError as error:
            log.warning("the size of the log is not known: %s", error)
            return
        if pages >= RESET_PAGES:
            # It starts anew by itself only in a pause. The passes beside us moved most of it: this is short.
            mode = "TRUNCATE" if pages >= TRUNCATE_PAGES else "RESTART"
            with suppress(sqlite3.Error):  # as it was, then; the next group tries again
                self._connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        elif waiting >= CHECKPOINT_PAGES:
            self._checkpointer.wake()
