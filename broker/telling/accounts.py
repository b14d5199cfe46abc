"""The whole account of one push: its counts, the curve of its first hours and days, and its trace to one device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

import msgspec
from pyroaring import BitMap

from broker.errors import ApiError
from broker.later.pacer import Pacer, Progress
from broker.model import App, DeliveryState, MessageRecord, Step
from broker.store import Store
from broker.telling.calendar import HOUR
from broker.telling.reports import RECEIPTS, account, read_msg_id

Clock = Callable[[], float]
CURVES: Final = ("sent", "delivered", *RECEIPTS)
SENT, DELIVERED = "sent", "delivered"


class Accounts:
    """Methods let StoreError pass; ApiError with HTTP 404 where there is no such push."""

    def __init__(self, store: Store, clock: Clock = time.time, pacer: Pacer | None = None) -> None:
        self._store = store
        self._clock = clock
        self._pacer = pacer

    async def push(self, app: App, msg_id: str) -> dict[str, object]:
        """Everything that is counted of one push."""
        record = await self._find(app, msg_id)
        progress = await self._pacer.describe(app.app_id, record.msg_id) if self._pacer else None
        counts = account(record, self._clock())
        return {
            "msg_id": str(record.msg_id),
            "sendno": record.sendno or "0",  # as the push was answered
            "state": _state(record, counts, progress),
            "accepted_at": record.created_at,
            "expires_at": record.expires_at,
            "broadcast": record.broadcast,
            **counts,
            "withdrawn_at": record.withdrawn_at,
            "replaced_by": None if record.replaced_by is None else str(record.replaced_by),
            "parts": record.parts,
            "progress": None if progress is None else msgspec.structs.asdict(progress),
        }

    async def curve(self, app: App, msg_id: str) -> dict[str, object]:
        """For each hour since the push was accepted: how many devices it was first sent to, and so on."""
        record = await self._find(app, msg_id)
        curves = _curves(record, await self._store.find_steps(app.app_id, record.msg_id))
        last = max((hour for curve in curves.values() for hour in curve), default=0)
        return {
            "msg_id": str(record.msg_id),
            "accepted_at": record.created_at,
            "hours": [
                {"hour": hour, "at": record.created_at + hour * HOUR}
                | {name: curves[name].get(hour, 0) for name in CURVES}
                for hour in range(last + 1)
            ],
        }

    async def trace(self, app: App, msg_id: str, registration_id: str) -> dict[str, object]:
        """What happened between one push and one device, in order."""
        record = await self._find(app, msg_id)
        devno = (await self._store.resolve(app.app_id, [registration_id])).get(registration_id)
        if devno is None:
            raise ApiError(3004, f"{registration_id[:64]} is not a device of this app", http_status=404)
        steps = await self._store.find_steps(app.app_id, record.msg_id)
        own = _first_steps(steps, devno)
        state = DeliveryState.DELIVERED if DELIVERED in own else record.state(devno, self._clock())
        released = await self._released(app, record, own.values())
        return {
            "msg_id": str(record.msg_id),
            "registration_id": registration_id,
            "status": state.value if state else "not a target",
            "steps": list(_trace(record, state, own, released)),
        }

    async def _released(self, app: App, record: MessageRecord, steps: Iterable[Step]) -> float | None:
        """When the device's part of a push that goes in parts was let go, if anything happened to it since."""
        parts = [step.msg_id for step in steps if step.msg_id != record.msg_id]
        found = await self._store.find_messages(app.app_id, parts[:1]) if parts else {}
        return next((part.created_at for part in found.values()), None)

    async def _find(self, app: App, text: str) -> MessageRecord:
        msg_id = read_msg_id(text)
        record = (await self._store.find_messages(app.app_id, [msg_id])).get(msg_id)
        if record is None:
            message = f"msg_id: {msg_id} is not a message of this app, or its report is over"
            raise ApiError(3004, message, http_status=404)
        return record


def _state(record: MessageRecord, counts: Mapping[str, int], progress: Progress | None) -> str:
    """waiting, paused, stopped: of a push that goes in parts. sending: somebody may still get it; done: nobody."""
    if progress is not None and progress.state in {"waiting", "paused", "stopped"}:
        return progress.state
    if record.withdrawn_at is not None:
        return "withdrawn"
    return "sending" if counts["pending"] else "done"


def _curves(record: MessageRecord, steps: Iterable[Step]) -> dict[str, dict[int, int]]:
    """By step, then hour: each device once, when it did that first."""
    curves: dict[str, dict[int, int]] = {name: {} for name in CURVES}
    seen = {name: BitMap() for name in CURVES}
    for name, step, devnos in _attributed(list(steps)):
        fresh = (devnos & record.targets) - seen[name]
        seen[name] |= fresh
        if fresh:
            hour = max(
                0, int((step.start - record.created_at) // HOUR)
            )  # a stretch may begin before the push
            curves[name][hour] = curves[name].get(hour, 0) + len(fresh)
    return curves


def _attributed(steps: list[Step]) -> Iterator[tuple[str, Step, BitMap]]:
    """Steps that have a curve. Who acknowledged without a step of its own for `sent` was sent it just before."""
    sent = BitMap.union(BitMap(), *(step.devnos for step in steps if step.step == SENT))
    for step in sorted(steps, key=lambda step: step.start):
        if step.step in CURVES:
            yield step.step, step, step.devnos
        if step.step == DELIVERED:
            yield SENT, step, step.devnos - sent


def _first_steps(steps: Iterable[Step], devno: int) -> dict[str, Step]:
    own: dict[str, Step] = {}
    for step in sorted(steps, key=lambda step: step.start):
        if devno in step.devnos:
            own.setdefault(step.step, step)
    if DELIVERED in own:
        own.setdefault(SENT, own[DELIVERED])
    return own


ORDER: Final = ("sent", "delivered", *RECEIPTS, "evicted", "recalled")
ENDS: Final = {"evicted": DeliveryState.EVICTED, "recalled": DeliveryState.RECALLED}


def _trace(
    record: MessageRecord, state: DeliveryState | None, own: Mapping[str, Step], released: float | None
) -> Iterator[dict[str, object]]:
    yield _exactly("accepted", record.created_at)
    if state is None:
        return
    if state is DeliveryState.SUPPRESSED:
        yield _exactly("suppressed", record.created_at)
        return
    yield _exactly("matched", record.created_at)
    if released is not None:
        yield _exactly("released", released)
    for name in ORDER:
        if name in own and ENDS.get(name, state) is state:  # a delivery wins over what was noted before it
            yield _between("acknowledged" if name == DELIVERED else name, own[name], record.created_at)
    if state is DeliveryState.EXPIRED:
        yield _exactly("expired", record.expires_at)
    if state is DeliveryState.DELIVERED and record.withdrawn_at is not None:  # it is told to remove it
        yield _exactly("withdrawn", record.withdrawn_at)


def _exactly(name: str, at: float) -> dict[str, object]:
    return {"step": name, "at": at, "resolution": 0}


def _between(name: str, step: Step, accepted_at: float) -> dict[str, object]:
    """It happened at `at` or up to `resolution` seconds later. Nothing happens to a push before it is accepted."""
    if step.start + step.width < accepted_at:  # told before times were kept
        return {"step": name, "at": None, "resolution": None}
    node = {"node": step.node} if step.node else {}
    return {"step": name, "at": max(step.start, accepted_at), "resolution": step.width, **node}
