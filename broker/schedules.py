"""Schedules: pushes that are made at a time, once or again and again.

A live schedule is a record of kind `schedule`; one that is over is moved to `schedule-over`, where it and the ids of
its pushes can be read as long as their reports. The ids are records of their own, because an id is only known when
the push is stored: the store fills it in (`RecordChange.key`), in the transaction that stores the push and moves the
schedule on. So a schedule fires once, with any number of brokers and crashes.

What is missed while no broker runs: the newest of the missed times fires, late, if it is not older than
`schedule_grace`; the others never do, and are counted.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import msgspec
import orjson

from broker.errors import PUSH, SCHEDULE, ApiError
from broker.limits import Limits, limits_of
from broker.logs import log_event
from broker.metrics import Metrics
from broker.model import App, Record, RecordChange
from broker.pushes import Pushes
from broker.requests import check_cid, decode
from broker.schedule_times import Times, Trigger, check_span, read_times, show
from broker.store import Conflict, Store, StoreError, StoreUnavailable
from broker.timekeeper import Handle

log: Final = logging.getLogger(__name__)

Clock = Callable[[], float]

LIVE: Final = "schedule"
OVER: Final = "schedule-over"
CID: Final = "schedule-cid"
PAGE: Final = 50  # schedules in one answer of the list
MAX_PAGE: Final = 1_000_000
KEPT_IDS: Final = 1000  # of a schedule's pushes, the newest
KEPT_ERRORS: Final = 20  # of a schedule's refused pushes, the newest
TRIES: Final = 5  # of a change that others are faster with


class Failure(msgspec.Struct, frozen=True):
    """A firing whose push was refused."""

    at: float
    code: int
    message: str


class Schedule(msgspec.Struct, frozen=True, omit_defaults=True):
    """The value of a record."""

    name: str
    trigger: Trigger  # with its zone
    push: msgspec.Raw  # compact JSON, without a cid
    enabled: bool = True
    next: float | None = None  # None: it is over, or not enabled
    fired: int = 0
    missed: int = 0
    failed: int = 0
    errors: tuple[Failure, ...] = ()

    @property
    def times(self) -> Times:
        return read_times(self.trigger, "UTC", _NO_LIMITS)


_NO_LIMITS: Final = Limits(
    max_schedule_span=10**9, max_schedule_frequency=10**9
)  # for what was checked before


class CreateRequest(msgspec.Struct, frozen=True):
    """Other keys are accepted, as in a push."""

    name: str
    trigger: Trigger
    push: dict[str, Any]
    enabled: bool | None = None
    cid: str | None = None


class ChangeRequest(msgspec.Struct, frozen=True):
    name: str | None = None
    trigger: Trigger | None = None
    push: dict[str, Any] | None = None
    enabled: bool | None = None


class Created(msgspec.Struct, frozen=True):
    """The answer to the first POST, and to each with the same cid."""

    schedule_id: str
    name: str


class _Fired(msgspec.Struct, frozen=True):
    at: float


_read_create: Final = msgspec.json.Decoder(CreateRequest).decode
_read_change: Final = msgspec.json.Decoder(ChangeRequest).decode
_read_schedule: Final = msgspec.json.Decoder(Schedule).decode
_read_created: Final = msgspec.json.Decoder(Created).decode
_read_fired: Final = msgspec.json.Decoder(_Fired).decode
_encode: Final = msgspec.json.encode


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


class Schedules:
    """`wake` is called when something may be due earlier than before. Methods let StoreError pass."""

    def __init__(
        self,
        store: Store,
        pushes: Pushes,
        wake: Callable[[], None],
        limits: Limits | None = None,
        clock: Clock = time.time,
    ) -> None:
        self._store = store
        self._pushes = pushes
        self._wake = wake
        self._limits = limits or Limits()
        self._clock = clock
        self.counts = ScheduleCounts()

    @property
    def handlers(self) -> dict[str, Handle]:
        """For the timekeeper."""
        return {LIVE: self.fire, OVER: self._forget, CID: self._drop}

    # For publishers

    async def create(self, app: App, raw: bytes) -> Created:
        request = decode(_read_create, raw, SCHEDULE)
        limits = limits_of(self._limits, app)
        _check_name(request.name, limits)
        if request.enabled is False:
            raise ApiError(SCHEDULE.invalid, "enabled: must be true when a schedule is created")
        times = read_times(request.trigger, limits.schedule_zone, limits)
        push = self._read_push(app, request.push, limits)
        repeated = await self._find_cid(app, request.cid, limits)
        if isinstance(repeated, Created):
            return repeated
        await self._check_room(app, limits)
        trigger = request.trigger.in_zone(limits.schedule_zone)
        schedule = Schedule(request.name, trigger, push, next=self._first(times, limits))
        created = Created(_new_id(self._clock()), request.name)
        changes = [_change(app.app_id, LIVE, created.schedule_id, schedule)]
        if request.cid is not None:
            due = self._clock() + limits.cid_lifetime
            changes.append(RecordChange(app.app_id, CID, request.cid, _encode(created), repeated, due))
        try:
            await self._store.records.save(changes)
        except Conflict:  # of two calls with this cid at the same time, the other won
            repeated = await self._find_cid(app, request.cid, limits)
            if not isinstance(repeated, Created):
                raise
            return repeated
        self._wake()
        return created

    async def page(self, app: App, page: str | None) -> dict[str, object]:
        """Live schedules in the order in which they were created, PAGE of them; pages count from 1."""
        number = _read_page(page)
        count = await self._store.records.count(app.app_id, LIVE)
        records: Sequence[Record] = ()
        if (number - 1) * PAGE < count:
            records = await self._records_of_page(app.app_id, number)
        return {
            "total_count": count,
            "total_pages": -(-count // PAGE),
            "page": number,
            "schedules": [_view(record.key, _read_schedule(record.value)) for record in records],
        }

    async def find(self, app: App, schedule_id: str) -> dict[str, object]:
        return _view(schedule_id, _read_schedule((await self._find(app, schedule_id)).value))

    async def change(self, app: App, schedule_id: str, raw: bytes) -> dict[str, object]:
        """What is given takes the place of what was; returns the schedule as it is now."""
        request = decode(_read_change, raw, SCHEDULE)
        limits = limits_of(self._limits, app)
        if request == ChangeRequest():
            raise ApiError(SCHEDULE.missing, "name, enabled, trigger or push is required")
        push = None if request.push is None else self._read_push(app, request.push, limits)
        if request.name is not None:
            _check_name(request.name, limits)
        for _ in range(TRIES):
            record = await self._find(app, schedule_id)
            if record.kind == OVER:
                raise ApiError(SCHEDULE.invalid, "the schedule is over and cannot be changed any more")
            changed = self._changed(_read_schedule(record.value), request, push, limits)
            if changed.next is None and not changed.enabled and changed.times.end <= self._clock():
                raise ApiError(SCHEDULE.invalid, "the schedule is over and cannot be changed any more")
            try:
                await self._store.records.save(
                    [_change(app.app_id, LIVE, schedule_id, changed, record.version)]
                )
            except Conflict:
                continue
            self._wake()
            return _view(schedule_id, changed)
        raise StoreError(f"schedule {schedule_id} is changed by others all the time")

    async def delete(self, app: App, schedule_id: str) -> None:
        """Pushes that it made stay."""
        for _ in range(TRIES):
            record = await self._find(app, schedule_id)
            try:
                return await self._forget(record)
            except Conflict:
                continue
        raise StoreError(f"schedule {schedule_id} is changed by others all the time")

    async def msg_ids(self, app: App, schedule_id: str) -> dict[str, object]:
        """The newest KEPT_IDS pushes that it made, and of the newest KEPT_ERRORS that were refused why; oldest first.
        `count` and `msgids` are the vendor's."""
        record = await self._find(app, schedule_id)
        pushed = await self._store.records.list(app.app_id, _ids_kind(schedule_id), limit=KEPT_IDS)
        rows: list[dict[str, Any]] = [{"at": _read_fired(r.value).at, "msg_id": r.key} for r in pushed]
        rows += [
            {"at": failure.at, "error": {"code": failure.code, "message": failure.message}}
            for failure in _read_schedule(record.value).errors
        ]
        rows.sort(key=lambda row: (row["at"], int(row.get("msg_id", 0))))
        msg_ids = [row["msg_id"] for row in rows if "msg_id" in row]
        return {"count": len(msg_ids), "msgids": msg_ids, "log": rows}

    # For the timekeeper

    async def fire(self, record: Record) -> None:
        """Push what is due, and move on to the next time; both or neither. Raises Conflict if another broker did."""
        schedule = _read_schedule(record.value)
        now = self._clock()
        if (
            schedule.next is None or schedule.next > now
        ):  # not enabled, and over; or it was put off, then changed
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
        kind = _ids_kind(record.key)
        changes = [
            *self._moves(record, fired),
            RecordChange(record.app_id, kind, "", _encode(_Fired(now)), 0),
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
            return [_change(app_id, LIVE, key, schedule, record.version)]
        until = self._clock() + self._limits.report_lifetime
        return [
            RecordChange(app_id, LIVE, key, None, record.version),
            RecordChange(app_id, OVER, key, _encode(schedule), 0, until),
        ]

    async def _surplus_id(self, record: Record, fired: Schedule) -> list[RecordChange]:
        if fired.fired <= KEPT_IDS:
            return []
        kind = _ids_kind(record.key)
        kept = await self._store.records.list(record.app_id, kind, limit=KEPT_IDS)
        if len(kept) < KEPT_IDS:
            return []
        oldest = min(kept, key=lambda one: int(one.key))
        return [RecordChange(record.app_id, kind, oldest.key, None, oldest.version)]

    async def _forget(self, record: Record) -> None:
        """Remove a schedule and its ids."""
        ids = await self._store.records.list(record.app_id, _ids_kind(record.key), limit=KEPT_IDS)
        await self._store.records.save(
            [RecordChange(one.app_id, one.kind, one.key, None, one.version) for one in (record, *ids)]
        )

    async def _drop(self, record: Record) -> None:
        await self._store.records.save(
            [RecordChange(record.app_id, record.kind, record.key, None, record.version)]
        )

    async def _app(self, app_id: int) -> App | None:
        found = await self._store.list_apps(app_id - 1, 1)
        return found[0] if found and found[0].app_id == app_id else None

    # Checks

    def _changed(
        self, schedule: Schedule, request: ChangeRequest, push: msgspec.Raw | None, limits: Limits
    ) -> Schedule:
        trigger, enabled, upcoming = schedule.trigger, schedule.enabled, schedule.next
        if request.enabled is not None:
            enabled = request.enabled
        if request.trigger is not None:
            if (request.trigger.single is None) != (trigger.single is None):
                raise ApiError(
                    SCHEDULE.invalid, "trigger: single and periodical cannot be changed into each other"
                )
            times = read_times(request.trigger, limits.schedule_zone, limits)
            first = self._first(times, limits)
            trigger = request.trigger.in_zone(limits.schedule_zone)
            upcoming = first if enabled else None
        elif enabled and upcoming is None:
            upcoming = self._first(schedule.times, limits)
        elif not enabled:
            upcoming = None
        return msgspec.structs.replace(
            schedule,
            name=schedule.name if request.name is None else request.name,
            enabled=enabled,
            trigger=trigger,
            push=schedule.push if push is None else push,
            next=upcoming,
        )

    def _first(self, times: Times, limits: Limits) -> float:
        """Raises ApiError 8100 if it would never fire."""
        now = self._clock()
        check_span(times, now, limits)
        first = times.next_after(now)
        if first is None:
            raise ApiError(SCHEDULE.invalid, "trigger: it would never fire, all its times are over")
        return first

    def _read_push(self, app: App, push: dict[str, Any], limits: Limits) -> msgspec.Raw:
        """The push as it is kept. Its cid goes: the vendor ignores it, and a second firing would send nothing."""
        push.pop("cid", None)
        try:
            raw = _encode(push)
        except RecursionError:
            raise ApiError(SCHEDULE.invalid, "push: nested too deeply") from None
        if len(raw) > limits.max_schedule:
            raise ApiError(SCHEDULE.invalid, f"push: at most {limits.max_schedule} bytes, got {len(raw)}")
        with _as_schedule_error("push: "):
            self._pushes.read(app, raw)
        return msgspec.Raw(raw)

    async def _check_room(self, app: App, limits: Limits) -> None:
        """Calls at the same time may get past it together: it sells plans, it protects nothing."""
        most = limits.max_schedules
        if most is not None and await self._store.records.count(app.app_id, LIVE) >= most:
            raise ApiError(SCHEDULE.invalid, f"there are {most} live schedules, which is the app's limit")

    async def _find_cid(self, app: App, cid: str | None, limits: Limits) -> Created | int:
        """What the cid was used for, or the version of its record."""
        if cid is None:
            return 0
        with _as_schedule_error():
            check_cid(cid, limits)
        record = await self._store.records.find(app.app_id, CID, cid)
        if record is None:
            return 0
        used = record.due is not None and record.due > self._clock()
        return _read_created(record.value) if used else record.version

    async def _find(self, app: App, schedule_id: str) -> Record:
        """Raises ApiError 8104."""
        for kind in (LIVE, OVER, LIVE):  # again: it may have fired for the last time between, or not yet
            record = await self._store.records.find(app.app_id, kind, schedule_id)
            if record is not None:
                return record
        raise ApiError(8104, "there is no such schedule")

    async def _records_of_page(self, app_id: int, number: int) -> Sequence[Record]:
        after = ""
        for _ in range(number - 1):
            skipped = await self._store.records.list(app_id, LIVE, after, PAGE)
            if len(skipped) < PAGE:
                return []
            after = skipped[-1].key
        return await self._store.records.list(app_id, LIVE, after, PAGE)


def _passed(schedule: Schedule, now: float) -> tuple[list[float], float | None]:
    """The times from `next` to now, and the one after them."""
    assert schedule.next is not None
    times = schedule.times
    passed, upcoming = [schedule.next], times.next_after(schedule.next)
    while upcoming is not None and upcoming <= now:
        passed.append(upcoming)
        upcoming = times.next_after(upcoming)
    return passed, upcoming


def _change(app_id: int, kind: str, key: str, schedule: Schedule, version: int = 0) -> RecordChange:
    """A schedule that is not enabled is looked at when it is over."""
    due = schedule.times.end if schedule.next is None else schedule.next
    return RecordChange(app_id, kind, key, _encode(schedule), version, due)


def _ids_kind(schedule_id: str) -> str:
    """Each schedule's pushes have a kind of their own, and so are listed without those of others."""
    return f"schedule-ids {schedule_id}"


def _view(schedule_id: str, schedule: Schedule) -> dict[str, object]:
    """The vendor's keys first."""
    return {
        "schedule_id": schedule_id,
        "name": schedule.name,
        "enabled": schedule.enabled,
        "trigger": schedule.trigger.as_dict(),
        "push": orjson.Fragment(bytes(schedule.push)),
        "next": show(schedule.next, schedule.trigger.zone or "UTC"),
        "fired": schedule.fired,
        "missed": schedule.missed,
        "failed": schedule.failed,
    }


def _new_id(now: float) -> str:
    """A UUID that grows with the time (RFC 9562, version 7, with its 12 bits below the millisecond): records are
    listed in the order of their keys."""
    ticks = int(now * 1000 * 4096)
    bits = (ticks >> 12 & (1 << 48) - 1) << 80 | 0x7 << 76 | (ticks & 0xFFF) << 64
    return str(UUID(int=bits | 0x2 << 62 | secrets.randbits(62)))


def _check_name(name: str, limits: Limits) -> None:
    if not 0 < len(name.encode()) <= limits.max_schedule_name or not name.isprintable():
        raise ApiError(
            SCHEDULE.invalid, f"name: must be 1 to {limits.max_schedule_name} bytes of printable text"
        )


def _read_page(page: str | None) -> int:
    if not page:
        return 1
    if not (page.isascii() and page.isdigit() and len(page) <= 7 and 1 <= int(page) <= MAX_PAGE):
        raise ApiError(SCHEDULE.invalid, f"page: must be 1 to {MAX_PAGE}")
    return int(page)


@contextmanager
def _as_schedule_error(path: str = "") -> Iterator[None]:
    """What a push is refused for, as the schedule's error."""
    try:
        yield
    except ApiError as error:
        raise ApiError(SCHEDULE.invalid, path + error.message) from error
