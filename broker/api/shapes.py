"""What the API answers, as types: for the OpenAPI document, which is tested against the answers themselves."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from broker.audiences.segments import Segment
from broker.later.pacer import Progress


class Shape(Struct, frozen=True, forbid_unknown_fields=True):
    """Has these keys and no others."""


Number = Annotated[str, Meta(pattern="^[0-9]+$")]  # as text: JavaScript has no 64-bit integers
Count = Annotated[int, Meta(ge=0)]
MaybeCount = Count | None  # null: not known, or not a channel of ours


class Trouble(Struct, frozen=True):
    code: int
    message: str


class Refusal(Struct, frozen=True):
    """What every failure is. Answers to batches and group pushes have the single results beside `error`."""

    error: Trouble
    sendno: str | None = None


class Pushed(Shape, frozen=True):
    sendno: str
    msg_id: Number


class Result(Shape, frozen=True):
    """Of one push of several: `sendno` and `msg_id`, or `error` (and `sendno`)."""

    sendno: str | None = None
    msg_id: Number | None = None
    error: Trouble | None = None


class Cids(Shape, frozen=True):
    cidlist: list[str]


class DispatchWaits(Shape, frozen=True):
    """Milliseconds, and how many addresses are tried at once."""

    base: Count
    cap: Count
    stagger: Count
    ban: Count
    parallel: Count


class DispatchAnswer(Shape, frozen=True):
    """`signature`: Ed25519 over the other keys as canonical JSON (RFC 8785), base64url without padding."""

    addresses: list[str]
    carrier: str
    heartbeat: Annotated[str, Meta(pattern="^[0-9]+ [0-9]+ [0-9]+$")]
    key: Annotated[str, Meta(pattern="^[0-9a-f]{8}$")]
    made: Count
    reconnect: DispatchWaits
    region: str
    signature: Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{86}$")]
    ttl: Count
    v: Count


class ScheduleView(Shape, frozen=True):
    """`next`: when it fires next, in its zone; null: never again, or it is not enabled."""

    schedule_id: str
    name: str
    enabled: bool
    trigger: dict[str, Any]
    push: dict[str, Any]
    next: str | None
    fired: Count
    missed: Count
    failed: Count


class SchedulePage(Shape, frozen=True):
    total_count: Count
    total_pages: Count
    page: int
    schedules: list[ScheduleView]


class FiredLog(Struct, frozen=True):
    """`msg_id`, or `error`."""

    at: float
    msg_id: str | None = None
    error: Trouble | None = None


class SchedulePushes(Shape, frozen=True):
    count: Count
    msgids: list[Any]
    log: list[FiredLog]


class FileId(Shape, frozen=True):
    file_id: str


class FileView(Shape, frozen=True):
    file_id: str
    type: str
    file_name: str
    lines: Count
    create_time: str
    expire_time: str


class FileList(Shape, frozen=True):
    total_count: Count
    files: list[FileView]


class SegmentList(Shape, frozen=True):
    segments: list[Segment]


class Registered(Shape, frozen=True):
    registration_id: str
    token: str
    expires_at: int


class Imported(Shape, frozen=True):
    devices: list[Registered]


class Presence(Shape, frozen=True):
    online: bool
    last_online_time: str | None = None


class Tags(Shape, frozen=True):
    tags: list[str]


class HasTag(Shape, frozen=True):
    result: bool


class OfAlias(Shape, frozen=True):
    registration_ids: list[str]


class DeviceView(Shape, frozen=True):
    tags: list[str]
    alias: str | None
    mobile: str | None
    attributes: dict[str, Any] = {}


class Received(Shape, frozen=True):
    msg_id: Number
    android_received: MaybeCount
    ios_apns_sent: MaybeCount
    ios_apns_received: MaybeCount
    ios_msg_received: MaybeCount
    wp_mpns_sent: MaybeCount


class ReceivedDetail(Shape, frozen=True):
    """target = delivered + pending + expired + evicted + recalled + suppressed."""

    msg_id: Number
    jpush_received: MaybeCount
    android_pns_sent: MaybeCount
    android_pns_received: MaybeCount
    ios_apns_sent: MaybeCount
    ios_apns_received: MaybeCount
    ios_msg_received: MaybeCount
    wp_mpns_sent: MaybeCount
    quickapp_jpush_received: MaybeCount
    quickapp_pns_sent: MaybeCount
    hmos_msg_received: MaybeCount
    hmos_hmpns_sent: MaybeCount
    target: MaybeCount
    online: MaybeCount
    sent: MaybeCount
    delivered: MaybeCount
    pending: MaybeCount
    expired: MaybeCount
    evicted: MaybeCount
    recalled: MaybeCount
    suppressed: MaybeCount
    shown: MaybeCount
    clicked: MaybeCount
    dismissed: MaybeCount


class Statistics(Struct, frozen=True):
    """Of one platform; a platform may have keys of other channels beside these, which are null."""

    target: MaybeCount = None
    online_push: MaybeCount = None
    received: MaybeCount = None
    click: MaybeCount = None
    msg_click: MaybeCount = None


class MessageStatistics(Shape, frozen=True):
    msg_id: Number
    android: Statistics | None
    ios: Statistics | None
    winphone: Statistics | None
    quickapp: Statistics | None
    hmos: Statistics | None


class MessageDetail(Shape, frozen=True):
    msg_id: Number
    jpush: Statistics | None
    android_pns: Statistics | None
    ios: Statistics | None
    winphone: Statistics | None
    quickapp: Statistics | None
    hmos: Statistics | None
    details: dict[str, Any] | None


class DeviceStatus(Shape, frozen=True):
    """0 delivered, 1 not delivered, 2 not a device of this app, 3 not in this push's audience. `state`: why it is
    1."""

    status: Annotated[int, Meta(ge=0, le=4)]
    state: Literal["pending", "expired", "evicted", "recalled", "suppressed"] | UnsetType = UNSET


class Event(Shape, frozen=True):
    id: int
    registration_id: str | None
    name: str
    at: float
    payload: Any


class Events(Shape, frozen=True):
    events: list[Event]
    after: int


class UserCounts(Shape, frozen=True):
    new: Count
    online: Count
    active: Count


class UserItem(Shape, frozen=True):
    time: str
    android: UserCounts
    ios: UserCounts
    quickapp: UserCounts
    hmos: UserCounts
    winphone: UserCounts
    other: UserCounts


class Users(Shape, frozen=True):
    time_unit: str
    start: str
    duration: int
    items: list[UserItem]


class PushReport(Shape, frozen=True):
    """target = delivered + pending + expired + evicted + recalled + suppressed."""

    msg_id: Number
    sendno: str
    state: str
    accepted_at: float
    expires_at: float
    broadcast: bool
    target: Count
    online: Count
    sent: Count
    delivered: Count
    pending: Count
    expired: Count
    evicted: Count
    recalled: Count
    suppressed: Count
    shown: Count
    clicked: Count
    dismissed: Count
    withdrawn_at: float | None
    replaced_by: Number | None
    parts: Count
    progress: Progress | None


class Hour(Shape, frozen=True):
    hour: Count
    at: float
    sent: Count
    delivered: Count
    shown: Count
    clicked: Count
    dismissed: Count


class Curve(Shape, frozen=True):
    msg_id: Number
    accepted_at: float
    hours: list[Hour]


class TraceStep(Shape, frozen=True):
    step: str
    at: float | None
    resolution: float | None
    node: str | None = None


class Trace(Shape, frozen=True):
    msg_id: Number
    registration_id: str
    status: str
    steps: list[TraceStep]


class CallbackCounts(Shape, frozen=True):
    waiting: Count
    parked: Count
    signing_secret: str


class ParkedEvent(Shape, frozen=True):
    event_id: Number
    msg_id: Number
    event: str
    at: float
    devices: Count
    url: str
    attempts: Count
    error: str


class Parked(Shape, frozen=True):
    events: list[ParkedEvent]


class Retried(Shape, frozen=True):
    retried: Count


class Dropped(Shape, frozen=True):
    dropped: Count


class OwnSettings(Shape, frozen=True):
    """Every key, as a PUT takes it."""

    allow_from: list[str]
    quiet_hours: dict[str, Any] | None
    frequency_caps: list[dict[str, Any]]
    callback: dict[str, Any] | None


class KeyView(Shape, frozen=True):
    id: str
    name: str
    scopes: list[str]
    allow_from: list[str]
    created_at: int
    expires_at: int | None


class NewKey(KeyView, frozen=True, kw_only=True):
    """The only answer with the secret."""

    secret: str


class KeyList(Shape, frozen=True):
    keys: list[KeyView]


class AuditRow(Shape, frozen=True):
    id: int
    at: float
    actor: str
    address: str
    action: str
    subject: str
    outcome: str


class AuditPage(Shape, frozen=True):
    """`before` continues, 0: that was all."""

    entries: list[AuditRow]
    before: int
