"""The values that stores, buses, the API and gateway nodes exchange. All are frozen.

Times are Unix seconds (float) unless a name says otherwise. A `devno` is a device's dense integer within its
app (0, 1, 2 …, below 2**32), which is what bitmaps over devices hold. What is made for each push or connection is
a msgspec Struct: the same as a frozen dataclass, made in a fifth of the time.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from msgspec import Struct
from pyroaring import BitMap

PLATFORMS: Final = ("android", "ios", "quickapp", "hmos", "winphone", "other")
"""What a device may be; the position is the code a device token carries."""


@dataclass(frozen=True, slots=True)
class AccessRule:
    """Who may do what with the ordinary topics that a filter matches. See broker/tenants/access.py."""

    allow: bool  # else deny
    action: str  # publish | subscribe | all
    topic: str  # a filter; its level {registration_id} stands for the peer's own name
    who: str  # devices | publishers | everyone


class QuietHours(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """From `start` to `end`, wall-clock time in `zone`; past midnight where `end` is not later than `start`. Pushes
    of high priority go all the same."""

    start: str  # HH:MM
    end: str
    zone: str = "UTC"  # a name of the IANA time zone database
    action: str = "delay"  # delay: to the end of the quiet hours | suppress


class FrequencyCap(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """At most `count` pushes for one device in a calendar hour or day of `zone`; pushes of high priority do not
    count. What is over it is suppressed."""

    count: int  # 1 to 1000
    per: str = "day"  # hour | day
    zone: str = "UTC"


class Callback(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Where the publisher wants to be told what becomes of a push."""

    url: str
    events: tuple[str, ...] = ("delivered", "clicked")  # of CALLBACK_EVENTS
    params: Mapping[str, Any] | None = None  # sent along as they are


CALLBACK_EVENTS: Final = (
    "delivered",
    "shown",
    "clicked",
    "dismissed",
    "expired",
    "evicted",
    "recalled",
    "suppressed",
)


class AppSettings(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What an operator or the app's owner may set for one app."""

    restricted: bool = False  # pushes nothing (2003)
    allow_from: tuple[str, ...] = ()  # networks (CIDR) that may call the API; empty: all
    limits: Mapping[str, int | None] = {}  # fields of broker.limits.Limits that are other for this app
    quiet_hours: QuietHours | None = None
    frequency_caps: tuple[FrequencyCap, ...] = ()
    callback: Callback | None = None  # of pushes that do not bring one


@dataclass(frozen=True, slots=True)
class App:
    """A tenant."""

    app_id: int
    key: str  # public name, 24 hex digits: the user name of devices and publishers
    name: str
    master_secret: str = field(repr=False)  # publishers
    device_key: str = field(
        repr=False
    )  # shared by the app's installations: may register a device, nothing else
    signing_key: bytes = field(repr=False)  # signs device tokens; 32 bytes, never leaves the server
    open: bool  # any client id may connect with the device key, and all ordinary topics are, where no rule says else
    created_at: float
    offline_limit: int = 100  # newest-N rule: pushes kept for a device that stays away
    access: tuple[AccessRule, ...] = ()  # the first that fits decides
    settings: AppSettings = field(default_factory=AppSettings)


AttributeValue: TypeAlias = str | float | bool
"""Integers count as float. `app_version`, `carrier`, `language` and `region` are text; other names are the app's."""


@dataclass(frozen=True, slots=True)
class Device:
    """One installation of an app."""

    app_id: int
    devno: int
    registration_id: str
    platform: str  # one of PLATFORMS
    alias: str | None
    tags: frozenset[str]
    mobile: str | None
    token_generation: int  # tokens of an earlier generation are revoked
    created_at: float
    last_online_at: float | None
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NewDevice:
    registration_id: str
    platform: str = "other"
    alias: str | None = None
    tags: frozenset[str] = frozenset()
    mobile: str | None = None
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeviceChange:
    """What to change about one device. None leaves a field as it is; "" clears alias and mobile."""

    alias: str | None = None
    mobile: str | None = None
    platform: str | None = None
    set_tags: frozenset[str] | None = None  # replace all tags
    add_tags: frozenset[str] = frozenset()
    remove_tags: frozenset[str] = frozenset()
    revoke_tokens: bool = False  # raise the token generation by one
    # None removes one; others stay.
    attributes: Mapping[str, AttributeValue | None] = field(default_factory=dict)
    most_tags: int | None = None  # a change that adds tags must leave no more than that on the device
    most_attributes: int | None = None  # likewise


class Term(enum.StrEnum):
    """Kinds of index term. A posting list is the bitmap of devnos a term holds for."""

    ALL = "*"  # every registered device; the value is empty
    ALIAS = "a"
    PLATFORM = "p"
    TAG = "t"
    ATTRIBUTE = "v"  # a text, a truth value or one binary digit of a number: audiences/attributes.py


TermKey = tuple[Term, str]


class NewMessage(Struct, frozen=True, gc=False):
    """An accepted push on its way into the store: checked, its audience resolved."""

    app_id: int
    body: bytes  # JSON object with "notification" and/or "message", as the publisher sent them
    targets: (
        BitMap  # devnos, at least one; fixed from here on (G2). Those suppressed by a rule are not among them
    )
    broadcast: bool  # one row in the app's broadcast log, instead of one inbox row for each target
    created_at: float
    expires_at: float  # == created_at: only for devices that are online now
    cid: str | None = None  # idempotency key
    sendno: str = ""  # the publisher's own number, echoed
    high: bool = False  # priority
    collapse: str = ""  # of the app's waiting pushes with this key, a device keeps the newest
    replaces: int = 0  # msg_id of a push that stops waiting wherever this one goes
    suppressed: BitMap | None = None  # in the audience, but a rule of the app holds it back
    paced: bool = False  # its targets get it in parts: nothing of this row is ever fetched
    part_of: int = 0  # msg_id of the paced push that this is a part of
    callback: Callback | None = None
    evicts: bool = True  # false: it takes nobody's place by the newest-N rule


class Withdrawn(Struct, frozen=True, eq=False, gc=False):
    """What no longer waits. Whoever receives one owns the bitmaps."""

    app_id: int
    msg_id: int
    devnos: BitMap  # those that were still to get it
    reached: BitMap  # those that have it, or were sent it


class Appended(Struct, frozen=True, gc=False):
    """The answer to one append."""

    msg_id: int
    repeated: bool  # the cid was used before: nothing was stored, msg_id is the first push's
    sendno: str  # of the push that was stored
    withdrawn: tuple[Withdrawn, ...] = ()  # by `replaces` and `collapse`
    rung: bool = False  # the store rings the doorbells of this append itself


class StoredMessage(Struct, frozen=True, eq=False, gc=False):
    """A push as a node needs it in order to deliver it."""

    msg_id: int
    app_id: int
    body: bytes
    created_at: float
    expires_at: float
    part_of: int = 0  # the id that publishers and devices know it by, if not its own
    replaces: int = 0
    high: bool = False
    after: int = (
        -1  # msg_id of the broadcast that devices must be offered before this (G3); 0: there is none, -1: not known
    )

    @property
    def public_id(self) -> int:
        return self.part_of or self.msg_id


class StoredBroadcast(Struct, frozen=True, eq=False, gc=False):
    """A row of the broadcast log. Whoever receives one owns the bitmaps."""

    message: StoredMessage
    targets: BitMap
    settled: BitMap  # delivered, evicted or recalled: nothing is owed to these any more


class OwedRequest(Struct, frozen=True, gc=False):
    """Asks for one device's inbox rows after `after` (a msg_id), oldest first."""

    app_id: int
    devno: int
    after: int
    limit: int


class Settled(Struct, frozen=True, gc=False):
    """What became of one message for some devices, to be recorded."""

    app_id: int
    msg_id: int
    broadcast: bool
    delivered: Sequence[int] = ()  # devnos that acknowledged
    evicted: Sequence[int] = ()  # devnos for which the newest-N rule dropped it
    sent: Sequence[int] = ()  # devnos it was sent to and that have not acknowledged it yet
    at: float = 0.0  # when it was acknowledged (or sent, or evicted), to a few milliseconds
    sent_at: float = 0.0  # when what was acknowledged had been sent, the earliest
    node: str = ""  # where


class Receipt(Struct, frozen=True, gc=False):
    """What a person did with a push, told by the device."""

    app_id: int
    msg_id: int
    devno: int
    event: str  # shown | clicked | dismissed
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class BehaviourEvent:
    """What happened in the app, told by the device on `event/<name>`."""

    app_id: int
    devno: int
    name: str
    at: float
    payload: bytes


class DeliveryState(enum.Enum):
    DELIVERED = "delivered"
    PENDING = "pending"
    EXPIRED = "expired"
    EVICTED = "evicted"
    RECALLED = "recalled"
    SUPPRESSED = "suppressed"


@dataclass(frozen=True, slots=True, eq=False)
class MessageRecord:
    """The whole truth about one message, its parts included. For every device in `targets` there is exactly one state
    (G4): the first of suppressed, delivered, recalled, evicted that it is in, else expired or pending."""

    msg_id: int
    app_id: int
    broadcast: bool
    created_at: float
    expires_at: float
    targets: BitMap  # suppressed ones included
    delivered: BitMap
    evicted: BitMap
    recalled: BitMap = field(default_factory=BitMap)
    suppressed: BitMap = field(default_factory=BitMap)
    sent: BitMap = field(default_factory=BitMap)  # delivered ones included
    expired: BitMap | None = None  # of a paced push: what its parts say; else it follows from the time
    online: int = 0  # targets that were online when it was accepted
    receipts: Mapping[str, BitMap] = field(default_factory=dict)  # event -> devnos
    sendno: str = ""
    paced: bool = False
    parts: int = 0  # so many were released
    released: BitMap = field(default_factory=BitMap)  # targets of the parts so far
    withdrawn_at: float | None = None  # by its publisher, as a whole
    replaced_by: int | None = None  # msg_id of the first push that overrode it

    def sets(self, now: float) -> dict[DeliveryState, BitMap]:
        """The devnos in each state: a partition of `targets`."""
        delivered = self.delivered - self.suppressed
        gone = self.suppressed | delivered
        recalled = self.recalled - gone
        gone |= recalled
        evicted = self.evicted - gone
        gone |= evicted
        waiting = self.targets - gone
        if self.expired is None:
            expired = waiting if now >= self.expires_at else BitMap()
        else:
            expired = waiting & self.expired
        return {
            DeliveryState.DELIVERED: delivered,
            DeliveryState.PENDING: waiting - expired,
            DeliveryState.EXPIRED: expired,
            DeliveryState.EVICTED: evicted,
            DeliveryState.RECALLED: recalled,
            DeliveryState.SUPPRESSED: self.suppressed,
        }

    def state(self, devno: int, now: float) -> DeliveryState | None:
        """None: the device was not among the targets."""
        return next((state for state, devnos in self.sets(now).items() if devno in devnos), None)

    def counts(self, now: float) -> dict[DeliveryState, int]:
        """Deliveries by state; they add up to len(targets)."""
        return {state: len(devnos) for state, devnos in self.sets(now).items()}


class Step(Struct, frozen=True, gc=False):
    """Devices that a message did one step for in one stretch of time at one node. Stretches are a second in the first
    minute of a message, a minute in its first hour, an hour from then on; 0 where the time is exact."""

    msg_id: int  # of the part, where it has parts
    step: str  # sent | delivered | evicted | recalled | shown | clicked | dismissed
    node: str  # "" where no node was concerned
    start: float
    width: float
    devnos: BitMap


# Small documents: schedules, segments, keys, …


class Record(Struct, frozen=True, gc=False):
    """A small document of an app; app_id 0: of the installation."""

    app_id: int
    kind: str  # schedule | pace | segment | file | key | group | …
    key: str
    value: bytes
    version: int  # grows with every change
    due: float | None = None  # when somebody is to look at it


class RecordChange(Struct, frozen=True, gc=False):
    """Set a record, or (value None) remove it, if its version is still `version`; 0: there is none."""

    app_id: int
    kind: str
    key: str  # "": in `append`, the id of one of its messages, in decimal
    value: bytes | None
    version: int
    due: float | None = None
    message: int = 0  # which one; if its cid was used before, the change is not made
    at_most: int | None = None  # records of this kind that the app may have with this one


class AuditEntry(Struct, frozen=True, gc=False):
    """One administrative call."""

    at: float
    app_id: int  # 0: of the installation
    actor: str  # "master", "key <id> <name>", "admin", "local" (a command beside the store)
    address: str  # of the caller; "" if none
    action: str  # "app.create", "key.delete", …
    subject: str  # what it was done to
    outcome: str = "done"  # or the error's message


class CallbackEvent(Struct, frozen=True, eq=False, gc=False):
    """Something a publisher wants to be told: one event of one message, for some devices."""

    event_id: int
    app_id: int
    msg_id: int  # the public id
    event: str
    at: float
    devnos: BitMap
    callback: Callback
    attempts: int  # made so far
    error: str = ""  # of the last one


class Activity(enum.StrEnum):
    """What a device did in some hour."""

    ONLINE = "online"  # was connected
    ACTIVE = "active"  # a person was there: a behaviour event, a clicked or dismissed receipt


@dataclass(frozen=True, slots=True)
class Retained:
    """A retained ordinary message; an empty payload removes it."""

    app_id: int
    topic: str
    payload: bytes
    qos: int
    properties: bytes  # as encoded by the gateway, opaque here
    expires_at: float | None
    source: str = ""  # who set it: "d/<registration id>" or "p/<client id>"; "" where that is not known


class SessionItem(Struct, frozen=True, gc=False):
    """One value of a durable MQTT session, as the gateway writes and reads it back; opaque here."""

    app_id: int
    session: int  # its number within the app, from 1; 0: what the app's sessions share
    kind: str  # what it is, one letter
    item: int | str  # which one of its kind; a number is below 2**63, and is never the same as a text
    value: bytes | None  # None removes it


class Claim(Struct, frozen=True, gc=False):
    """A device's route, as claimed by a node."""

    epoch: int  # grows with every claim of this device
    may_owe: bool  # False only if the inbox is certainly empty: then there is no need to fetch
    former: str = ""  # the other node that had the device, to be told (doorbell Taken)


class RouteCheck(Struct, frozen=True, eq=False, gc=False):
    """What the store says of routes that a node believes to have."""

    lost: BitMap  # devnos that another claim was made for
    owing: BitMap  # devnos whose inboxes are perhaps not empty


class Route(Struct, frozen=True):
    """Where a device is connected, or was last."""

    node: str  # "": nowhere now
    epoch: int  # of the newest claim; 0: not known
    seen_at: float | None = None  # when it came (connected), or left; None: not known


# Nodes: the processes of one installation


class NodeInfo(Struct, frozen=True):
    """What a process tells of itself."""

    name: str  # unique among those that live
    role: str = "all"  # gateway | broker | all
    address: str = ""  # where devices reach it, host:port; "" if it has no such listener
    direct: str = ""  # where other nodes reach it, and nobody else is served: likewise
    admin: str = ""  # where metrics, health and the admin API are, host:port
    pid: int = 0
    started_at: float = 0.0
    connections: int = 0
    draining: bool = False
    version: str = ""  # of Holdfast
    tls: bool = False  # devices speak TLS at `address`


class NodeEntry(Struct, frozen=True):
    """A process as the others see it."""

    info: NodeInfo
    number: int  # of this life of the process; grows, is never used again
    beaten_at: float  # its last beat
    live: bool  # its lease has not run out
    wish: str = ""  # what the operator asked of it last: drain | resume | ""


class Beat(Struct, frozen=True):
    """The answer to a beat."""

    lapsed: bool  # the lease had run out: pushes may have been stored without a doorbell, devices have moved
    wish: str = ""  # drain | resume | ""
