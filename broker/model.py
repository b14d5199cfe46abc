"""The values that stores, buses, the API and gateway nodes exchange. All are frozen.

Times are Unix seconds (float) unless a name says otherwise. A `devno` is a device's dense integer within its
app (0, 1, 2 …, below 2**32), which is what bitmaps over devices hold. What is made for each push or connection is
a msgspec Struct: the same as a frozen dataclass, made in a fifth of the time.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from msgspec import Struct
from pyroaring import BitMap

PLATFORMS: Final = ("android", "ios", "quickapp", "hmos", "winphone", "other")
"""What a device may be; the position is the code a device token carries."""


@dataclass(frozen=True, slots=True)
class AccessRule:
    """Who may do what with the ordinary topics that a filter matches. See broker/access.py."""

    allow: bool  # else deny
    action: str  # publish | subscribe | all
    topic: str  # a filter; its level {registration_id} stands for the peer's own name
    who: str  # devices | publishers | everyone


@dataclass(frozen=True, slots=True)
class App:
    """A tenant."""

    app_id: int
    key: str  # public name, 24 hex digits: the user name of devices and publishers
    name: str
    master_secret: str  # publishers
    device_key: str  # shared by the app's installations: may register a device, nothing else
    signing_key: bytes  # signs device tokens; 32 bytes, never leaves the server
    open: bool  # any client id may connect with the device key, and all ordinary topics are, where no rule says else
    created_at: float
    offline_limit: int = 100  # newest-N rule: pushes kept for a device that stays away
    access: tuple[AccessRule, ...] = ()  # the first that fits decides


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


@dataclass(frozen=True, slots=True)
class NewDevice:
    registration_id: str
    platform: str = "other"
    alias: str | None = None
    tags: frozenset[str] = frozenset()
    mobile: str | None = None


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


class Term(enum.StrEnum):
    """Kinds of index term. A posting list is the bitmap of devnos a term holds for."""

    ALL = "*"  # every registered device; the value is empty
    ALIAS = "a"
    PLATFORM = "p"
    TAG = "t"


TermKey = tuple[Term, str]


class NewMessage(Struct, frozen=True, gc=False):
    """An accepted push on its way into the store: checked, its audience resolved."""

    app_id: int
    body: bytes  # JSON object with "notification" and/or "message", as the publisher sent them
    targets: BitMap  # devnos, at least one; fixed from here on (G2)
    broadcast: bool  # one row in the app's broadcast log, instead of one inbox row for each target
    created_at: float
    expires_at: float  # == created_at: only for devices that are online now
    cid: str | None = None  # idempotency key
    sendno: str = ""  # the publisher's own number, echoed


class Appended(Struct, frozen=True, gc=False):
    """The answer to one append."""

    msg_id: int
    repeated: bool  # the cid was used before: nothing was stored, msg_id is the first push's
    sendno: str  # of the push that was stored


class StoredMessage(Struct, frozen=True, eq=False, gc=False):
    """A push as a node needs it in order to deliver it."""

    msg_id: int
    app_id: int
    body: bytes
    created_at: float
    expires_at: float


class StoredBroadcast(Struct, frozen=True, eq=False, gc=False):
    """A row of the broadcast log. Whoever receives one owns the bitmaps."""

    message: StoredMessage
    targets: BitMap
    settled: BitMap  # delivered or evicted: nothing is owed to these any more


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


class Receipt(Struct, frozen=True, gc=False):
    """What a person did with a push, told by the device."""

    app_id: int
    msg_id: int
    devno: int
    event: str  # shown | clicked | dismissed


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


@dataclass(frozen=True, slots=True, eq=False)
class MessageRecord:
    """The whole truth about one message. For every device in `targets` there is exactly one state (G4)."""

    msg_id: int
    app_id: int
    broadcast: bool
    created_at: float
    expires_at: float
    targets: BitMap
    delivered: BitMap
    evicted: BitMap
    receipts: Mapping[str, BitMap] = field(default_factory=dict)  # event -> devnos

    def state(self, devno: int, now: float) -> DeliveryState | None:
        """None: the device was not among the targets."""
        if devno not in self.targets:
            return None
        if devno in self.delivered:
            return DeliveryState.DELIVERED
        if devno in self.evicted:
            return DeliveryState.EVICTED
        return DeliveryState.EXPIRED if now >= self.expires_at else DeliveryState.PENDING

    def counts(self, now: float) -> dict[DeliveryState, int]:
        """Deliveries by state; they add up to len(targets)."""
        delivered = len(self.delivered)
        evicted = len(self.evicted - self.delivered)
        waiting = len(self.targets) - delivered - evicted
        expired = now >= self.expires_at
        return {
            DeliveryState.DELIVERED: delivered,
            DeliveryState.EVICTED: evicted,
            DeliveryState.EXPIRED: waiting if expired else 0,
            DeliveryState.PENDING: 0 if expired else waiting,
        }


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
