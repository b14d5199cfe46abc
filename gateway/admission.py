"""Who a CONNECT comes from, and on what terms. No I/O: a signed token, a secret or a shared key is checked against
the app in memory."""

from __future__ import annotations

import functools
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from broker import tokens
from broker.model import App
from gateway.live import DEVICE_TOPIC, EVENT_PREFIX, PUSH_TOPIC, RECEIPT_TOPIC
from gateway.mqtt import Connack, Connect, Properties, Reason, encode
from gateway.session import TOPIC_ALIAS_MAXIMUM

DEVICE_TOPICS: Final = frozenset((PUSH_TOPIC, RECEIPT_TOPIC, DEVICE_TOPIC))


@dataclass(frozen=True, slots=True)
class KnownDevice:
    """A device with a valid token."""

    devno: int
    platform: str


@dataclass(frozen=True, slots=True)
class OpenDevice:
    """Any client id of an open app: registered on first sight."""


@dataclass(frozen=True, slots=True)
class Publisher:
    """A backend with the master secret."""


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: Reason
    text: str  # for the peer, says nothing about secrets
    label: str  # for logs and metrics


Admission = KnownDevice | OpenDevice | Publisher | Refusal

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
REVOKED = Refusal(Reason.NOT_AUTHORIZED, "the device token was revoked", "token revoked")
WILL_NOT_ALLOWED = Refusal(
    Reason.NOT_AUTHORIZED, "this peer may not publish on the topic of its will", "will not allowed"
)
WRONG_PASSWORD = Refusal(
    Reason.BAD_USER_NAME_OR_PASSWORD,
    "the password does not fit the app key and the client id",
    "wrong password",
)
STORE_AWAY = Refusal(Reason.SERVER_UNAVAILABLE, "the store is not available; try again", "store away")
OVERTAKEN = Refusal(Reason.SERVER_BUSY, "the device has connected again since", "overtaken")


def admit(app: App, connect: Connect, generations: Mapping[int, int], now: float) -> Admission:
    """`generations`: devno -> token generation of the app's devices with revoked tokens. `now` in Unix seconds."""
    peer = _identify(app, connect, generations, now)
    refused = connect.will is not None and not _may_publish(app, peer, connect.will.topic)
    return WILL_NOT_ALLOWED if refused and not isinstance(peer, Refusal) else peer


def _may_publish(app: App, peer: Admission, topic: str) -> bool:
    """A will is an ordinary message, under the access rule of `gateway.exchange`."""
    if isinstance(peer, Publisher):
        return topic != PUSH_TOPIC
    return app.open and topic not in DEVICE_TOPICS and not topic.startswith(EVENT_PREFIX)


def _identify(app: App, connect: Connect, generations: Mapping[int, int], now: float) -> Admission:
    password = connect.password or b""
    if hmac.compare_digest(password, app.master_secret.encode()):
        return Publisher()
    if not connect.client_id:
        return NO_CLIENT_ID
    if app.open and hmac.compare_digest(password, app.device_key.encode()):
        return OpenDevice()
    try:
        claims = tokens.verify(app, connect.client_id, password, now)
    except tokens.TokenError as error:
        if error.reason == "expired":
            return Refusal(Reason.NOT_AUTHORIZED, "the device token has expired; renew it", "token expired")
        return WRONG_PASSWORD
    if claims.generation < generations.get(claims.devno, 0):
        return REVOKED
    return KnownDevice(claims.devno, claims.platform)


class Terms(NamedTuple):
    """What holds for a connection, in seconds; `told_…` is None where it is what the peer asked for."""

    keep_alive: int  # 0: none
    told_keep_alive: int | None
    session_expiry: int
    told_session_expiry: int | None


def agree(connect: Connect, *, keep_alive_max: int, session_expiry_max: int) -> Terms:
    """3.1.1 cannot be told anything: its keep-alive is taken as it is, and a session that is not clean lives as long
    as any. MQTT 5 is overruled where it asks for more (MQTT5-3.2.2-21, MQTT5-3.2.2.3.2)."""
    if connect.version == 4:
        return Terms(connect.keep_alive, None, 0 if connect.clean_start else session_expiry_max, None)
    overruled = not 0 < connect.keep_alive <= keep_alive_max
    wished = connect.properties.get("session_expiry_interval", 0)
    expiry = min(wished, session_expiry_max)
    return Terms(
        keep_alive_max if overruled else connect.keep_alive,
        keep_alive_max if overruled else None,
        expiry,
        None if expiry == wished else expiry,
    )


@functools.lru_cache(maxsize=1024)
def connack(
    version: int, present: bool, terms: Terms, receive_maximum: int, maximum_packet: int, assigned: str | None
) -> bytes:
    """The packet that welcomes; a few serve all devices."""
    properties: Properties = {}
    if version == 5:
        if assigned is not None:
            properties["assigned_client_identifier"] = assigned
        properties["receive_maximum"] = receive_maximum
        properties["maximum_packet_size"] = maximum_packet
        properties["topic_alias_maximum"] = TOPIC_ALIAS_MAXIMUM
        properties["shared_subscription_available"] = 0
        if terms.told_session_expiry is not None:
            properties["session_expiry_interval"] = terms.told_session_expiry
        if terms.told_keep_alive is not None:
            properties["server_keep_alive"] = terms.told_keep_alive
    return encode(Connack(present, Reason.SUCCESS, properties), version)
