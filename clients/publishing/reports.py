"""What became of pushes, and how many devices there were."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from clients.publishing.calls import Calls, join, quoted

Unit = Literal["HOUR", "DAY", "MONTH"]


class Delivery(enum.StrEnum):
    """One message and one device."""

    DELIVERED = "delivered"
    PENDING = "pending"
    EXPIRED = "expired"
    EVICTED = "evicted"
    RECALLED = "recalled"
    SUPPRESSED = "suppressed"
    NOT_A_DEVICE = "not a device"
    NOT_A_TARGET = "not a target"


class DeliveryRow(msgspec.Struct, frozen=True):
    """On the wire: the vendor's number, and why a message is not delivered (status 1)."""

    status: Literal[0, 1, 2, 3]
    state: Delivery = Delivery.PENDING

    @property
    def delivery(self) -> Delivery:
        return (Delivery.DELIVERED, self.state, Delivery.NOT_A_DEVICE, Delivery.NOT_A_TARGET)[self.status]


class Received(msgspec.Struct, frozen=True):
    """Deliveries by platform; None for an unknown message."""

    msg_id: int
    android_received: int | None
    ios_msg_received: int | None
    wp_mpns_sent: int | None


class Report(msgspec.Struct, frozen=True):
    """The whole accounting of a message: target = delivered + pending + expired + evicted + recalled + suppressed.
    `online`: targets that were connected when it was accepted. All None: the message is unknown, or its report is
    over."""

    msg_id: int
    target: int | None
    online: int | None
    sent: int | None
    delivered: int | None
    pending: int | None
    expired: int | None
    evicted: int | None
    recalled: int | None
    suppressed: int | None
    shown: int | None
    clicked: int | None
    dismissed: int | None

    @property
    def known(self) -> bool:
        return self.target is not None

    @property
    def adds_up(self) -> bool:
        return self.target is not None and self.target == sum(getattr(self, name) or 0 for name in STATES)


STATES: Final = ("delivered", "pending", "expired", "evicted", "recalled", "suppressed")
"""What a target may be; exactly one of them at any time."""
RECEIPTS: Final = ("shown", "clicked", "dismissed")
CURVES: Final = ("sent", "delivered", *RECEIPTS)


class Progress(msgspec.Struct, frozen=True):
    """How far a paced push is: devices it is for, and those it was let go for. `planned_end` in Unix seconds; None:
    it is over, or nobody knows. `state`: waiting | sending | paused | done | stopped | expired."""

    total: int
    released: int
    planned_end: float | None
    state: str

    @property
    def over(self) -> bool:
        return self.state in ("done", "stopped", "expired")


class PushReport(Report, frozen=True):
    """`state`: waiting, paused or stopped (of a push that goes in parts), else sending while somebody may still get
    it, and done. Times are Unix seconds. `progress`: of a push that goes in parts."""

    sendno: str
    state: str
    accepted_at: float
    expires_at: float
    broadcast: bool
    parts: int
    progress: Progress | None


class CurveHour(msgspec.Struct, frozen=True):
    """Devices that were first sent the push, first acknowledged it, … in this hour since it was accepted. `at`: its
    start in Unix seconds."""

    hour: int
    at: float
    sent: int
    delivered: int
    shown: int
    clicked: int
    dismissed: int


class Curve(msgspec.Struct, frozen=True):
    msg_id: int
    accepted_at: float
    hours: list[CurveHour]


class TraceStep(msgspec.Struct, frozen=True):
    """It happened at `at` (Unix seconds) or up to `resolution` seconds later (0, 1, 60 or 3600), at `node`. None:
    before times were kept."""

    step: str
    at: float | None
    resolution: float | None
    node: str = ""


class Trace(msgspec.Struct, frozen=True):
    """What happened between one push and one device, in order."""

    msg_id: int
    registration_id: str
    status: str
    steps: list[TraceStep]


class MessageCounts(msgspec.Struct, frozen=True):
    """To how many devices of a platform a message was to go, was sent, and came; and how many were clicked."""

    target: int | None = None
    online_push: int | None = None
    received: int | None = None
    click: int | None = None


class MessageReport(msgspec.Struct, frozen=True):
    """By platform; all None: the message is unknown."""

    msg_id: int
    android: MessageCounts | None
    ios: MessageCounts | None
    winphone: MessageCounts | None
    quickapp: MessageCounts | None
    hmos: MessageCounts | None


class UserCounts(msgspec.Struct, frozen=True):
    """Devices that were registered, were connected, and had a person there."""

    new: int = 0
    online: int = 0
    active: int = 0


class UsersItem(msgspec.Struct, frozen=True):
    """One hour, day or month, by platform."""

    time: str
    android: UserCounts = UserCounts()
    ios: UserCounts = UserCounts()
    quickapp: UserCounts = UserCounts()
    hmos: UserCounts = UserCounts()
    winphone: UserCounts = UserCounts()
    other: UserCounts = UserCounts()

    def total(self) -> UserCounts:
        rows = [getattr(self, name) for name in PLATFORMS]
        return UserCounts(*(sum(getattr(row, kind) for row in rows) for kind in ("new", "online", "active")))


PLATFORMS: Final = ("android", "ios", "quickapp", "hmos", "winphone", "other")


class UsersReport(msgspec.Struct, frozen=True):
    time_unit: str
    start: str
    duration: int
    items: list[UsersItem]


class Reports:
    """What became of single pushes. PushError 3004 with http_status 404: there is no such push, or its report is
    over."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def push(self, msg_id: int) -> PushReport:
        return await self._calls.get(f"/v1/pushes/{msg_id}", PushReport)

    async def curve(self, msg_id: int) -> Curve:
        """By hours since the push was accepted."""
        return await self._calls.get(f"/v1/pushes/{msg_id}/curve", Curve)

    async def trace(self, msg_id: int, registration_id: str) -> Trace:
        return await self._calls.get(f"/v1/pushes/{msg_id}/devices/{quoted(registration_id)}", Trace)

    async def messages(self, msg_ids: Sequence[int]) -> list[MessageReport]:
        """Up to 100 messages, in the order given."""
        return await self._calls.get("/v3/messages", list[MessageReport], msg_ids=join(msg_ids))

    async def users(self, unit: Unit, start: str, duration: int = 1) -> UsersReport:
        """`duration` hours, days or months from `start` on, `2026-01-31 23`, `2026-01-31` or `2026-01` in the
        server's time zone. Hours are told apart for three days."""
        asked = {"time_unit": unit, "start": start, "duration": duration}
        return await self._calls.get("/v3/users", UsersReport, **asked)
