"""The firing of schedules.

The push, its id among the schedule's and the schedule's next time are one transaction, from the version that was
read. So a schedule fires once, with any number of brokers and crashes.

What is missed while no broker runs: the newest of the missed times fires, late, if it is not older than
`schedule_grace`; the others never do, and are counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from broker.errors import PUSH, ApiError
from broker.later.schedule_records import (
    CID,
    KEPT_ERRORS,
    KEPT_IDS,
    LIVE,
    OVER,
    Failure,
    Fired,
    Schedule,
    encode,
    forget,
    ids_kind,
    read_schedule,
    set_live,
)
from broker.later.timekeeper import Handle
from broker.limits import Limits
from broker.logs import log_event
from broker.metrics import Metrics
from broker.model import App, Record, RecordChange
from broker.pushing.pushes import Pushes
from broker.store import Store, StoreUnavailable

log: Final = logging.getLogger(__name__)

Clock = Callable[[], float]


@dataclass(slots=True)
class ScheduleCounts:
    """What this broker did."""

    fired: int = 0
    missed: int = 0
    failed: int = 0

    def count_in(self, metrics: Metrics) -> None:
        metrics.read_counter("schedules_fired", "Pushes that schedules made.", lambda: self.fired)
        metrics.read_counter(
            "schedules_missed", "Times of schedules that nobody was there for.", lambda: self.missed
        )
        metrics.read_counter(
            "schedules_failed", "Pushes of schedules that were refused.", lambda: self.failed
        )


class Firing:
    """What the timekeeper calls. `clock` gives Unix seconds."""

    def __init__(
        self, store: Store, pushes: Pushes, limits: Limits | None = None, clock: Clock = time.time
    ) -> None:
        self._store = store
        self._pushes = pushes
        self._limits = limits or Limits()
        self._clock = clock
        self.counts = ScheduleCounts()

    @property
    def handlers(self) -> dict[str, Handle]:
        return {LIVE: self.fire, OVER: self._forget, CID: self._drop}

    async def fire(self, record: Record) -> None:
        """Push what is due, and move on to the next time; both or neither. Raises Conflict if another broker did."""
        schedule = read_schedule(record.value)
        now = self._clock()
        if schedule.next is None or schedule.next > now:  # over while not enabled; or put off, then changed
            await self._save(record, schedule)
            return
        passed, upcoming = _passed(schedule, now)
        late = now - passed[-1] > self._limits.schedule_grace
        missed = len(passed) if late else len(passed) - 1
        moved = msgspec.structs.replace(schedule, next=upcoming, missed=schedule.missed + missed)
        if late:
            await self._save(record, moved)
        else:
            await self._push(record, moved, now)
        self.counts.missed += missed
        if missed:
            log_event(
                log,
                logging.WARNING,
                "schedule missed",
                app_id=record.app_id,
                schedule=record.key,
                times=missed,
            )

    async def _push(self, record: Record, moved: Schedule, now: float) -> None:
        app = await self._app(record.app_id)
        if app is None:  # it is being deleted, and its records with it
            return
        fired = msgspec.structs.replace(moved, fired=moved.fired + 1)
        kind = ids_kind(record.key)
        changes = [
            *self._moves(record, fired),
            RecordChange(record.app_id, kind, "", encode(Fired(now)), 0),
            *await self._surplus_id(record, fired),
        ]
        try:
            accepted = await self._pushes.push(app, bytes(moved.push), changes)
        except ApiError as error:
            if error.code == PUSH.unavailable:  # not refused: it may work in a moment
                raise StoreUnavailable(error.message) from error
            await self._note_failure(record, moved, now, error)
            return
        self.counts.fired += 1
        log_event(
            log,
            logging.INFO,
            "schedule fired",
            app=app.key,
            schedule=record.key,
            msg_id=str(accepted.msg_id),
        )

    async def _note_failure(self, record: Record, moved: Schedule, now: float, error: ApiError) -> None:
        errors = (*moved.errors, Failure(now, error.code, error.message))[-KEPT_ERRORS:]
        await self._save(record, msgspec.structs.replace(moved, failed=moved.failed + 1, errors=errors))
        self.counts.failed += 1
        log_event(
            log,
            logging.WARNING,
            "schedule's push refused",
            app_id=record.app_id,
            schedule=record.key,
            code=error.code,
            message=error.message,
        )

    async def _save(self, record: Record, schedule: Schedule) -> None:
        await self._store.records.save(self._moves(record, schedule))

    def _moves(self, record: Record, schedule: Schedule) -> list[RecordChange]:
        """From the record to this. What is over goes where it is kept."""
        app_id, key = record.app_id, record.key
        if schedule.next is not None:
            return [set_live(app_id, key, schedule, record.version)]
        until = self._clock() + self._limits.report_lifetime
        return [
            RecordChange(app_id, LIVE, key, None, record.version),
            RecordChange(app_id, OVER, key, encode(schedule), 0, until),
        ]

    async def _surplus_id(self, record: Record, fired: Schedule) -> list[RecordChange]:
        if fired.fired <= KEPT_IDS:
            return []
        kind = ids_kind(record.key)
        kept = await self._store.records.list(record.app_id, kind, limit=KEPT_IDS)
        if len(kept) < KEPT_IDS:
            return []
        oldest = min(kept, key=lambda one: int(one.key))
        return [RecordChange(record.app_id, kind, oldest.key, None, oldest.version)]

    async def _forget(self, record: Record) -> None:
        await forget(self._store, record)

    async def _drop(self, record: Record) -> None:
        await self._store.records.save(
            [RecordChange(record.app_id, record.kind, record.key, None, record.version)]
        )

    async def _app(self, app_id: int) -> App | None:
        found = await self._store.list_apps(app_id - 1, 1)
        return found[0] if found and found[0].app_id == app_id else None


def _passed(schedule: Schedule, now: float) -> tuple[list[float], float | None]:
    """The times from `next` to now, and the one after them."""
    assert schedule.next is not None
    times = schedule.times
    passed, upcoming = [schedule.next], times.next_after(schedule.next)
    while upcoming is not None and upcoming <= now:
        passed.append(upcoming)
        upcoming = times.next_after(upcoming)
    return passed, upcoming
