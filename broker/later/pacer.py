"""Lets paced pushes go: a slow push evenly over its minutes, one that quiet hours hold back when they are over.

Each part is stored in one transaction with the change of the push's record, so that it goes once, with any number of
brokers and crashes; a broker that was away lets go what the plan asks for by then, as one part. The record goes with
the last part. Until then the push can be paused, resumed and stopped. To stop it is to recall it, which leaves nobody
for the parts to come (those that are about to go are refused), and then to remove the record: a crash in between
leaves a plan that can be stopped again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec
from pyroaring import BitMap

from broker.bus import Bus, Recalled
from broker.errors import ApiError
from broker.later.paces import HELD, SLOW, Pace, decode, encode
from broker.later.timekeeper import Handle
from broker.limits import Limits
from broker.logs import log_event
from broker.metrics import Metrics
from broker.model import App, NewMessage, Record, RecordChange
from broker.pushing.pushes import doorbells
from broker.pushing.rules import quiet_until
from broker.store import Conflict, Store, StoreError

log: Final = logging.getLogger(__name__)

Clock = Callable[[], float]
CUT: Final = "pace-cut"
TRIES: Final = 5  # of a change that others are faster with


@dataclass(slots=True)
class PaceCounts:
    """What this broker did."""

    begun: int = 0
    ended: int = 0  # of those that had begun
    expired: int = 0
    parts: int = 0
    devices: int = 0
    postponed: int = 0

    def count_in(self, metrics: Metrics) -> None:
        metrics.read_counter("paced_begun", "Slow and held pushes whose first part went.", lambda: self.begun)
        metrics.read_counter("paced_ended", "Of these, those that came to their end.", lambda: self.ended)
        metrics.read_counter(
            "paced_expired", "Slow and held pushes that expired before their end.", lambda: self.expired
        )
        metrics.read_counter("paced_parts", "Parts of slow and held pushes that went.", lambda: self.parts)
        metrics.read_counter("paced_devices", "Targets of these parts.", lambda: self.devices)
        metrics.read_counter(
            "paced_postponed", "Slow pushes that quiet hours held up.", lambda: self.postponed
        )


class Progress(msgspec.Struct, frozen=True):
    """How far a paced push is. `total` and `released` count targets, suppressed ones are not among them."""

    total: int
    released: int
    planned_end: float | None  # None: nobody knows, or it is past
    state: str  # waiting | sending | paused | done | stopped | expired


class Pacer:
    """`wake` is called when something may be due earlier than before. Methods let StoreError pass."""

    def __init__(
        self,
        store: Store,
        bus: Bus,
        wake: Callable[[], None],
        limits: Limits | None = None,
        clock: Clock = time.time,
    ) -> None:
        self._store = store
        self._bus = bus
        self._wake = wake
        self._limits = limits or Limits()
        self._clock = clock
        self.counts = PaceCounts()

    @property
    def handlers(self) -> dict[str, Handle]:
        """For the timekeeper."""
        return {SLOW: self.release, HELD: self.release, CUT: self.drop}

    # For publishers

    async def describe(self, app_id: int, msg_id: int) -> Progress | None:
        """None: no such push, or not a paced one."""
        record = await self._record(app_id, msg_id)
        if record is not None:
            return self._progress(decode(record.value))
        message = (await self._store.find_messages(app_id, [msg_id])).get(msg_id)
        if message is None or not message.paced:
            return None
        cut = await self._store.records.find(app_id, CUT, str(msg_id))
        total = len(message.targets - message.suppressed)
        if cut is None:
            return Progress(total, total, None, "done")
        return Progress(total, len(message.released), None, cut.value.decode())

    async def pause(self, app_id: int, msg_id: int) -> Progress:
        """No part goes until it is resumed. Raises ApiError 1003."""
        now = self._clock()
        return await self._change(
            app_id, msg_id, lambda pace: msgspec.structs.replace(pace, paused_at=pace.paused_at or now)
        )

    async def resume(self, app_id: int, msg_id: int) -> Progress:
        """The plan goes on where it was. Raises ApiError 1003."""
        now = self._clock()
        progress = await self._change(
            app_id, msg_id, lambda pace: pace if pace.paused_at is None else pace.resumed(now)
        )
        self._wake()
        return progress

    async def stop(self, app_id: int, msg_id: int) -> Progress:
        """What was not delivered yet never is. Raises ApiError 1003."""
        _, pace = await self._find(app_id, msg_id)
        self._bus.ring([Recalled(await self._store.recall(app_id, [msg_id], self._clock()))])
        pace = await self.end(app_id, msg_id) or pace
        log_event(log, logging.INFO, "slow push stopped", app_id=app_id, msg_id=str(msg_id))
        return Progress(pace.total, pace.released, None, "stopped")

    async def end(self, app_id: int, msg_id: int) -> Pace | None:
        """No part goes any more; the push was recalled. Returns how far it was; None: there was no part to come."""
        for _ in range(TRIES):
            record = await self._record(app_id, msg_id)
            if record is None:
                return None
            try:
                await self._cut(record, "stopped")
            except Conflict:
                continue
            return decode(record.value)
        raise StoreError(f"push {msg_id} is changed by others all the time")

    # For the timekeeper

    async def release(self, record: Record) -> None:
        """Let the next part go, if it is time. Raises Conflict if another broker did."""
        pace, now = decode(record.value), self._clock()
        if now >= pace.expires_at:
            await self._cut(record, "expired")
            self.counts.expired += 1
            log_event(log, logging.WARNING, "paced push expired", app_id=record.app_id, msg_id=record.key)
            return
        part = pace.due_part(now)
        if pace.paused_at is not None or part == pace.part:  # it was put off, then changed
            await self._store.records.save([_changed(record, pace)])
            return
        app = await self._app(record.app_id)
        if app is None:  # it is being deleted, and its records with it
            return
        quiet = None if pace.high else quiet_until(app.settings, now)
        if quiet is not None:
            self.counts.postponed += 1
            await self._store.records.save([_changed(record, pace.held_until(quiet))])
        else:
            await self._let_go(record, pace, part, now)

    async def drop(self, record: Record) -> None:
        """Nobody can ask for the push any more."""
        await self._store.records.save([_removed(record)])

    async def _cut(self, record: Record, state: str) -> None:
        """It ends before its plan does, which is remembered as long as its report."""
        until = self._clock() + self._limits.report_lifetime
        mark = RecordChange(record.app_id, CUT, record.key, state.encode(), 0, until)
        await self._store.records.save([_removed(record), mark])
        self.counts.ended += decode(record.value).part > 0

    async def _let_go(self, record: Record, pace: Pace, part: int, now: float) -> None:
        targets = await self._targets(record, pace.released, pace.reaches(part))
        moved = msgspec.structs.replace(pace, part=part)
        change = _removed(record) if part == pace.parts else _changed(record, moved)
        if not targets:  # all of them were recalled
            await self._store.records.save([change])
            self._count(pace, part, 0)
            return
        message = NewMessage(
            record.app_id,
            pace.body,
            targets,
            len(targets) > self._limits.fanout_limit,
            now,
            min(now + pace.ttl, pace.expires_at),
            high=pace.high,
            collapse=pace.collapse,
            replaces=pace.replaces,
            part_of=int(record.key),
            callback=pace.callback,
        )
        appended = await self._store.append([message], [change])
        self._bus.ring(doorbells([message], appended))
        self._count(pace, part, len(targets))

    def _count(self, pace: Pace, part: int, devices: int) -> None:
        """From the pace to this part."""
        self.counts.begun += pace.part == 0
        self.counts.ended += part == pace.parts
        self.counts.parts += devices > 0
        self.counts.devices += devices

    async def _targets(self, record: Record, first: int, last: int) -> BitMap:
        """Those at these places, without who was recalled."""
        msg_id = int(record.key)
        message = (await self._store.find_messages(record.app_id, [msg_id])).get(msg_id)
        if message is None:
            return BitMap()
        targets = message.targets - message.suppressed
        targets = targets[first:last]
        return targets - message.recalled

    async def _change(self, app_id: int, msg_id: int, change: Callable[[Pace], Pace]) -> Progress:
        for _ in range(TRIES):
            record, pace = await self._find(app_id, msg_id)
            changed = change(pace)
            try:
                await self._store.records.save([_changed(record, changed)])
            except Conflict:
                continue
            return self._progress(changed)
        raise StoreError(f"push {msg_id} is changed by others all the time")

    async def _find(self, app_id: int, msg_id: int) -> tuple[Record, Pace]:
        """Raises ApiError 1003."""
        record = await self._record(app_id, msg_id)
        if record is not None:
            return record, decode(record.value)
        if not await self._store.find_messages(app_id, [msg_id]):
            raise ApiError(1003, f"msg_id: there is no push {msg_id}", http_status=404)
        raise _finished()

    async def _record(self, app_id: int, msg_id: int) -> Record | None:
        for kind in (SLOW, HELD):
            record = await self._store.records.find(app_id, kind, str(msg_id))
            if record is not None:
                return record
        return None

    async def _app(self, app_id: int) -> App | None:
        found = await self._store.list_apps(app_id - 1, 1)
        return found[0] if found and found[0].app_id == app_id else None

    def _progress(self, pace: Pace) -> Progress:
        if pace.paused_at is not None:
            return Progress(pace.total, pace.released, None, "paused")
        soon = self._clock() + pace.duration / pace.parts
        state = "waiting" if pace.begins(pace.part) > soon else "sending"
        return Progress(pace.total, pace.released, pace.end, state)


def _changed(record: Record, pace: Pace) -> RecordChange:
    return RecordChange(record.app_id, record.kind, record.key, encode(pace), record.version, pace.due)


def _removed(record: Record) -> RecordChange:
    return RecordChange(record.app_id, record.kind, record.key, None, record.version)


def _finished() -> ApiError:
    return ApiError(
        1003, "msg_id: this push is not slow, or all of it is sent; DELETE /v3/push/… withdraws it"
    )
