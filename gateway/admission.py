"""Who a CONNECT comes from, and on what terms. No I/O: a signed token, a secret or a shared key is checked against
the app in memory."""

from __future__ import annotations

import functools
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from broker.carriers.profile import Heartbeat
from broker.model import App
from broker.tenants import tokens
from broker.tenants.access import Access, Role
from gateway.live import DEVICE_TOPIC, EVENT_PREFIX, PUSH_TOPIC, RECEIPT_TOPIC, SYS
from gateway.mqtt import Connack, Connect, Properties, Reason, Will, encode
from gateway.session import ALIASES_SENT, PLAIN, Manners

MAX_CLIENT_ID: Final = (
    256  # bytes, of publishers; each kept session keeps its own. Registration ids are shorter
)
NO_PUSH_IS_LARGER: Final = 1 << 20  # bytes: a call that brings one is not (`Limits.max_body`)
HEARTBEAT_PROPERTY: Final = "heartbeat"
DEVICE_TOPICS: Final = frozenset((PUSH_TOPIC, RECEIPT_TOPIC, DEVICE_TOPIC))


@dataclass(frozen=True, slots=True)
class KnownDevice:
    """A device with a valid token."""

    devno: int
    platform: str
    generation: int = 0


@dataclass(frozen=True, slots=True)
class OpenDevice:
    """Any client id of an open app: registered on first sight."""


@dataclass(frozen=True, slots=True)
class Guest:
    """Somebody without a name in an open app: gets one for the session's life, and is no device."""


@dataclass(frozen=True, slots=True)
class Publisher:
    """A backend with the master secret."""


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: Reason
    text: str  # for the peer, says nothing about secrets
    label: str  # for logs and metrics


UserProperties = tuple[tuple[str, str], ...]
Admission = KnownDevice | OpenDevice | Guest | Publisher | Refusal

UNKNOWN_APP = Refusal(Reason.BAD_USER_NAME_OR_PASSWORD, "the user name is not an app key", "unknown app")
NO_CREDENTIALS = Refusal(
    Reason.BAD_USER_NAME_OR_PASSWORD,
    "user name (app key) and password (device token) are needed",
    "no credentials",
)
NO_CLIENT_ID = Refusal(
    Reason.CLIENT_IDENTIFIER_NOT_VALID,
    "the client id must be the registration id of the device",
    "no client id",
)
NO_CLEAN_SESSION = Refusal(  # MQTT311-3.1.3-8
    Reason.CLIENT_IDENTIFIER_NOT_VALID, "an empty client id needs a clean session", "no client id"
)
UNKNOWN_METHOD = Refusal(
    Reason.BAD_AUTHENTICATION_METHOD,
    "the one authentication method here is SCRAM-SHA-256",
    "authentication method",
)
WRONG_PAYLOAD_FORMAT = Refusal(
    Reason.PAYLOAD_FORMAT_INVALID, "the will's payload is said to be UTF-8 and is not", "will payload format"
)
REVOKED = Refusal(Reason.NOT_AUTHORIZED, "the device token was revoked", "token revoked")
WILL_NOT_ALLOWED = Refusal(
    Reason.NOT_AUTHORIZED, "this peer may not publish on the topic of its will", "will not allowed"
)
WRONG_PASSWORD = Refusal(
    Reason.BAD_USER_NAME_OR_PASSWORD,
    "the password does not fit the app key and the client id",
    "wrong password",
)
INTERNAL_ERROR = Refusal(Reason.UNSPECIFIED_ERROR, "internal error", "internal error")
TOO_LONG_ID = Refusal(
    Reason.CLIENT_IDENTIFIER_NOT_VALID, "a client id is at most 256 bytes long", "bad client id"
)
STORE_AWAY = Refusal(Reason.SERVER_UNAVAILABLE, "the store is not available; try again", "store away")
HOME_AWAY = Refusal(
    Reason.SERVER_BUSY, "the node that the app is at home on cannot be reached; try again", "home away"
)
DRAINING = Refusal(Reason.USE_ANOTHER_SERVER, "this node is about to stop", "draining")
OVER_RATE = Refusal(Reason.CONNECTION_RATE_EXCEEDED, "too many CONNECTs; come back as told", "admit rate")
BUSY = Refusal(Reason.SERVER_BUSY, "too many CONNECTs wait; come back as told", "busy")
OVERTAKEN = Refusal(Reason.SERVER_BUSY, "the device has connected again since", "overtaken")


def admit(
    app: App,
    access: Access,
    connect: Connect,
    generations: Mapping[int, int],
    now: float,
    *,
    anonymous: bool = False,
) -> Admission:
    """`generations`: devno -> token generation of the app's devices with revoked tokens. `now` in Unix seconds.
    `anonymous`: the app is the one that asks for no credentials, and none came."""
    peer = _identify(app, connect, generations, now, anonymous)
    if isinstance(peer, Refusal):
        return peer
    if len(connect.client_id) > MAX_CLIENT_ID or len(connect.client_id.encode()) > MAX_CLIENT_ID:
        return TOO_LONG_ID
    if not connect.client_id and connect.version == 4 and not connect.clean_start:
        return NO_CLEAN_SESSION
    will = connect.will
    return peer if will is None else _check_will(access, peer, connect.client_id, will) or peer


def _check_will(access: Access, peer: Admission, client_id: str, will: Will) -> Refusal | None:
    """A will is an ordinary message, under the same rules."""
    if will.topic.startswith(SYS):
        return None  # dropped, see arrivals.py
    if will.topic == PUSH_TOPIC:
        return WILL_NOT_ALLOWED
    if not isinstance(peer, Publisher) and (
        will.topic in DEVICE_TOPICS or will.topic.startswith(EVENT_PREFIX)
    ):
        return WILL_NOT_ALLOWED
    role: Role = "publisher" if isinstance(peer, Publisher) else "device"
    if not access.may_publish(role, client_id, will.topic):
        return WILL_NOT_ALLOWED
    if will.properties.get("payload_format_indicator"):
        try:
            will.payload.decode()
        except UnicodeDecodeError:
            return WRONG_PAYLOAD_FORMAT
    return None


def _identify(
    app: App, connect: Connect, generations: Mapping[int, int], now: float, anonymous: bool
) -> Admission:
    if anonymous:
        return OpenDevice() if connect.client_id else Guest()
    password = connect.password or b""
    if hmac.compare_digest(password, app.master_secret.encode()):
        return Publisher()
    if app.open and hmac.compare_digest(password, app.device_key.encode()):
        return OpenDevice() if connect.client_id else Guest()
    if not connect.client_id:
        return NO_CLIENT_ID
    try:
        claims = tokens.verify(app, connect.client_id, password, now)
    except tokens.TokenError as error:
        if error.reason == "expired":
            return Refusal(Reason.NOT_AUTHORIZED, "the device token has expired; renew it", "token expired")
        return WRONG_PASSWORD
    if claims.generation < generations.get(claims.devno, 0):
        return REVOKED
    return KnownDevice(claims.devno, claims.platform, claims.generation)


class Limits(NamedTuple):
    """What CONNACK tells every peer."""

    receive_maximum: int
    maximum_packet: int
    topic_alias_maximum: int


class Terms(NamedTuple):
    """What holds for a connection, in seconds; `told_…` is None where it is what the peer asked for."""

    keep_alive: int  # 0: none
    told_keep_alive: int | None
    session_expiry: int
    told_session_expiry: int | None
    patience: float  # silence after which the peer is dead (MQTT5-3.1.2-22, MQTT311-3.1.2-24)


def agree(connect: Connect, *, keep_alive_min: int, keep_alive_max: int, session_expiry_max: int) -> Terms:
    """3.1.1 cannot be told anything: its keep-alive is taken as it is, and a session that is not clean lives as long
    as any. MQTT 5 is overruled where it asks for more, or for less (MQTT5-3.2.2-21, MQTT5-3.2.2.3.2)."""
    if connect.version == 4:
        return _terms(connect.keep_alive, None, 0 if connect.clean_start else session_expiry_max, None)
    asked = connect.keep_alive or keep_alive_max  # 0: for ever
    keep_alive = max(min(asked, keep_alive_max), min(keep_alive_min, keep_alive_max))
    wished = connect.properties.get("session_expiry_interval", 0)
    expiry = min(wished, session_expiry_max)
    return _terms(
        keep_alive,
        None if keep_alive == connect.keep_alive else keep_alive,
        expiry,
        None if expiry == wished else expiry,
    )


@functools.lru_cache(maxsize=1024)
def _terms(
    keep_alive: int, told_keep_alive: int | None, session_expiry: int, told_session_expiry: int | None
) -> Terms:
    """The same for all who agreed on the same: their connections keep these numbers, and none of their own."""
    return Terms(keep_alive, told_keep_alive, session_expiry, told_session_expiry, 1.5 * keep_alive)


def manners(connect: Connect, largest: int = 0) -> Manners:
    """What the peer wants to be sent. `largest`: bytes of a push's payload that its carrier lets through."""
    properties = connect.properties
    if not properties and not connect.bridge and not 0 < largest < NO_PUSH_IS_LARGER:
        return PLAIN
    return _manners(
        properties.get("maximum_packet_size", 0),
        min(properties.get("topic_alias_maximum", 0), ALIASES_SENT),
        properties.get("request_problem_information", 1),
        connect.bridge,
        largest if largest < NO_PUSH_IS_LARGER else 0,
    )


@functools.lru_cache(maxsize=1024)
def _manners(
    maximum_packet: int, alias_maximum: int, problem_information: int, bridge: bool, largest: int
) -> Manners:
    found = Manners(maximum_packet, alias_maximum, bool(problem_information), bridge, largest)
    return PLAIN if found == PLAIN else found  # the one that the hot path knows


@functools.lru_cache(maxsize=1024)
def welcome(version: int, present: bool, terms: Terms, limits: Limits, told: UserProperties = ()) -> bytes:
    """The packet that welcomes; a few serve all devices."""
    return connack(version, present, terms, limits, {"user_properties": told} if told else {})


@functools.lru_cache(maxsize=1024)
def advice(heartbeat: Heartbeat, keep_alive_min: int, keep_alive_max: int) -> UserProperties:
    """What a device that declares its network is told of its heartbeat: seconds to start with, at least, at most."""
    most = min(heartbeat.most, keep_alive_max)
    least = min(max(heartbeat.least, keep_alive_min), most)
    start = max(min(heartbeat.start, most), least)
    return ((HEARTBEAT_PROPERTY, f"{start} {least} {most}"),)


def connack(version: int, present: bool, terms: Terms, limits: Limits, more: Properties) -> bytes:
    """`more`: what holds for this peer alone."""
    if version != 5:
        return encode(Connack(present, Reason.SUCCESS), version)
    properties: Properties = {
        "receive_maximum": limits.receive_maximum,
        "maximum_packet_size": limits.maximum_packet,
        "topic_alias_maximum": limits.topic_alias_maximum,
        **more,
    }
    if terms.told_session_expiry is not None:
        properties["session_expiry_interval"] = terms.told_session_expiry
    if terms.told_keep_alive is not None:
        properties["server_keep_alive"] = terms.told_keep_alive
    return encode(Connack(present, Reason.SUCCESS, properties), version)
