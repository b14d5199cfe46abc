"""How schedules are kept: a live one is a record of kind LIVE, looked at when it fires next. One that is over is
moved to OVER, where it and the ids of its pushes can be read as long as their reports.

The ids are records of their own, because an id is only known when the push is stored: the store fills it in
(`RecordChange.key`).
"""

from __future__ import annotations

from typing import Final

import msgspec
import orjson

from broker.later.schedule_times import Times, Trigger, read_times, show
from broker.limits import Limits
from broker.model import Record, RecordChange
from broker.store import Store

LIVE: Final = "schedule"
OVER: Final = "schedule-over"
CID: Final = "schedule-cid"
KEPT_IDS: Final = 1000  # of a schedule's pushes, the newest
KEPT_ERRORS: Final = 20  # of a schedule's refused pushes, the newest


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


_NO_LIMITS: Final = Limits(max_schedule_span=10**9, max_schedule_frequency=10**9)
"""For what was checked when it came in."""


class Fired(msgspec.Struct, frozen=True):
    """The value of the record of one push; its key is the msg_id."""

    at: float


read_schedule: Final = msgspec.json.Decoder(Schedule).decode
read_fired: Final = msgspec.json.Decoder(Fired).decode
encode: Final = msgspec.json.encode


def set_live(app_id: int, key: str, schedule: Schedule, version: int = 0) -> RecordChange:
    """A schedule that is not enabled is looked at when it is over."""
    due = schedule.times.end if schedule.next is None else schedule.next
    return RecordChange(app_id, LIVE, key, encode(schedule), version, due)


def ids_kind(schedule_id: str) -> str:
    """Each schedule's pushes have a kind of their own, and so are listed without those of others."""
    return f"schedule-ids {schedule_id}"


async def forget(store: Store, record: Record) -> None:
    """Remove a schedule and its ids. Raises Conflict."""
    ids = await store.records.list(record.app_id, ids_kind(record.key), limit=KEPT_IDS)
    await store.records.save(
        [RecordChange(one.app_id, one.kind, one.key, None, one.version) for one in (record, *ids)]
    )


def view(schedule_id: str, schedule: Schedule) -> dict[str, object]:
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
