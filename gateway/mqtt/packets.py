"""The fifteen packets, in the words of the specification. Values only: `codec` checks them.

3.1.1 is described in terms of 5: what it lacks has its default (`SUCCESS`, no properties).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from .errors import Reason
from .properties import Properties, no_properties


@dataclass(frozen=True, slots=True)
class Will:
    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    properties: Properties = field(default_factory=no_properties, hash=False)


@dataclass(frozen=True, slots=True)
class Connect:
    """`keep_alive` in seconds, 0 = none. `version` is 4 (3.1.1) or 5. The decoder accepts an empty
    `client_id` with `clean_start` off; in 3.1.1 the caller refuses it, CLIENT_IDENTIFIER_NOT_VALID
    (MQTT311-3.1.3-8)."""

    client_id: str
    clean_start: bool = True
    keep_alive: int = 0
    username: str | None = None
    password: bytes | None = field(default=None, repr=False)
    will: Will | None = None
    version: int = 5
    properties: Properties = field(default_factory=no_properties, hash=False)
    bridge: bool = False  # 3.1.1 only: see the codec


@dataclass(frozen=True, slots=True)
class Connack:
    """In 3.1.1 the reason is one of the six that have a return code (`CONNACK_RETURN_CODES`)."""

    session_present: bool = False
    reason: Reason = Reason.SUCCESS
    properties: Properties = field(default_factory=no_properties, hash=False)


@dataclass(frozen=True, slots=True)
class Publish:
    """`packet_id` is 0 exactly when `qos` is 0. `topic` is empty only with a topic alias (5)."""

    topic: str
    payload: bytes = field(repr=False)
    qos: int = 0
    retain: bool = False
    dup: bool = False
    packet_id: int = 0
    properties: Properties = field(default_factory=no_properties, hash=False)


@dataclass(frozen=True, slots=True)
class Puback:
    packet_id: int
    reason: Reason = Reason.SUCCESS
    properties: Properties = field(default_factory=no_properties, hash=False)


@dataclass(frozen=True, slots=True)
class Pubrec:
    packet_id: int
    reason: Reason = Reason.SUCCESS
    properties: Properties = field(default_factory=no_properties, hash=False)


@dataclass(frozen=True, slots=True)
class Pubrel:
    packet_id: int
    reason: Reason = Reason.SUCCESS
    properties: Properties = field(default_factory=no_properties, hash=False)


@dataclass(frozen=True, slots=True)
class Pubcomp:
    packet_id: int
    reason: Reason = Reason.SUCCESS
    properties: Properties = field(default_factory=no_properties, hash=False)


@dataclass(frozen=True, slots=True)
class Subscription:
    """`retain_handling`: 0 send retained messages, 1 only for a new subscription, 2 never."""

    filter: str
    qos: int = 0
    no_local: bool = False
    retain_as_published: bool = False
    retain_handling: int = 0


@dataclass(frozen=True, slots=True)
class Subscribe:
    packet_id: int
    subscriptions: tuple[Subscription, ...]
    properties: Properties = field(default_factory=no_properties, hash=False)


@dataclass(frozen=True, slots=True)
class Suback:
    """One reason per subscription, in its order; in 3.1.1 every failure is UNSPECIFIED_ERROR."""

    packet_id: int
    reasons: tuple[Reason, ...]
    properties: Properties = field(default_factory=no_properties, hash=False)


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    packet_id: int
    filters: tuple[str, ...]
    properties: Properties = field(default_factory=no_properties, hash=False)


@dataclass(frozen=True, slots=True)
class Unsuback:
    """`reasons` is empty in 3.1.1."""

    packet_id: int
    reasons: tuple[Reason, ...] = ()
    properties: Properties = field(default_factory=no_properties, hash=False)


@dataclass(frozen=True, slots=True)
class Pingreq:
    pass


@dataclass(frozen=True, slots=True)
class Pingresp:
    pass


@dataclass(frozen=True, slots=True)
class Disconnect:
    reason: Reason = Reason.NORMAL_DISCONNECTION
    properties: Properties = field(default_factory=no_properties, hash=False)


@dataclass(frozen=True, slots=True)
class Auth:
    """MQTT 5 only."""

    reason: Reason = Reason.SUCCESS
    properties: Properties = field(default_factory=no_properties, hash=False)


Packet: TypeAlias = (
    Connect
    | Connack
    | Publish
    | Puback
    | Pubrec
    | Pubrel
    | Pubcomp
    | Subscribe
    | Suback
    | Unsubscribe
    | Unsuback
    | Pingreq
    | Pingresp
    | Disconnect
    | Auth
)
