"""Schedules, as publishers make, read, change and delete them. See schedule_records.py for how they are kept and
schedule_firing.py for what happens at their times.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from uuid import UUID

import msgspec

from broker.errors import SCHEDULE, ApiError
from broker.later.schedule_records import (
    CID,
    KEPT_IDS,
    LIVE,
    OVER,
    Schedule,
    encode,
    forget,
    ids_kind,
    read_fired,
    read_schedule,
    set_live,
    view,
)
from broker.later.schedule_times import Times, Trigger, check_span, read_times
from broker.limits import Limits, limits_of
from broker.model import App, Record, RecordChange
from broker.pushing.pushes import Pushes
from broker.pushing.requests import check_cid, decode
from broker.store import Conflict, Store, StoreError

Clock = Callable[[], float]

PAGE: Final = 50  # schedules in one answer of the list
MAX_PAGE: Final = 1_000_000
TRIES: Final = 5  # of a change that others are faster with


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


_read_create: Final = msgspec.json.Decoder(CreateRequest).decode
_read_change: Final = msgspec.json.Decoder(ChangeRequest).decode
_read_created: Final = msgspec.json.Decoder(Created).decode


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

    async def create(self, app: App, raw: bytes) -> Created:
        request = decode(_read_create, raw, SCHEDULE)
        limits = limits_of(self._limits, app)
        schedule = self._read_new(app, request, limits)
        earlier = await self._find_cid(app, request.cid, limits)
        if isinstance(earlier, Created):
            return earlier
        await self._check_room(app, limits)
        upcoming = self._first(schedule.times, limits)
        created = Created(_new_id(self._clock()), request.name)
        changes = [
            set_live(app.app_id, created.schedule_id, msgspec.structs.replace(schedule, next=upcoming))
        ]
        if request.cid is not None:
            due = self._clock() + limits.cid_lifetime
            changes.append(RecordChange(app.app_id, CID, request.cid, encode(created), earlier, due))
        return await self._save_new(app, request.cid, changes, created)

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
            "schedules": [view(record.key, read_schedule(record.value)) for record in records],
        }

    async def find(self, app: App, schedule_id: str) -> dict[str, object]:
        return view(schedule_id, read_schedule((await self._find(app, schedule_id)).value))

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
            changed = self._changed(read_schedule(record.value), request, push, limits)
            if changed.next is None and not changed.enabled and changed.times.end <= self._clock():
                raise ApiError(SCHEDULE.invalid, "the schedule is over and cannot be changed any more")
            try:
                await self._store.records.save([set_live(app.app_id, schedule_id, changed, record.version)])
            except Conflict:
                continue
            self._wake()
            return view(schedule_id, changed)
        raise StoreError(f"schedule {schedule_id} is changed by others all the time")

    async def delete(self, app: App, schedule_id: str) -> None:
        """Pushes that it made stay."""
        for _ in range(TRIES):
            record = await self._find(app, schedule_id)
            try:
                return await forget(self._store, record)
            except Conflict:
                continue
        raise StoreError(f"schedule {schedule_id} is changed by others all the time")

    async def msg_ids(self, app: App, schedule_id: str) -> dict[str, object]:
        """The newest KEPT_IDS pushes that it made, and of the newest KEPT_ERRORS that were refused why; oldest first.
        `count` and `msgids` are the vendor's."""
        record = await self._find(app, schedule_id)
        pushed = await self._store.records.list(app.app_id, ids_kind(schedule_id), limit=KEPT_IDS)
        rows: list[dict[str, Any]] = [{"at": read_fired(r.value).at, "msg_id": r.key} for r in pushed]
        rows += [
            {"at": failure.at, "error": {"code": failure.code, "message": failure.message}}
            for failure in read_schedule(record.value).errors
        ]
        rows.sort(key=lambda row: (row["at"], int(row.get("msg_id", 0))))
        msg_ids = [row["msg_id"] for row in rows if "msg_id" in row]
        return {"count": len(msg_ids), "msgids": msg_ids, "log": rows}

    def _read_new(self, app: App, request: CreateRequest, limits: Limits) -> Schedule:
        """Whether it would ever fire is not asked: the answer to a repeated call does not depend on it."""
        _check_name(request.name, limits)
        if request.enabled is False:
            raise ApiError(SCHEDULE.invalid, "enabled: must be true when a schedule is created")
        read_times(request.trigger, limits.schedule_zone, limits)
        push = self._read_push(app, request.push, limits)
        return Schedule(request.name, request.trigger.in_zone(limits.schedule_zone), push)

    async def _save_new(
        self, app: App, cid: str | None, changes: Sequence[RecordChange], created: Created
    ) -> Created:
        try:
            await self._store.records.save(changes)
        except Conflict:  # of two calls with this cid at the same time, the other won
            earlier = await self._find_cid(app, cid, self._limits)
            if not isinstance(earlier, Created):
                raise
            return earlier
        self._wake()
        return created

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
            raw = encode(push)
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
