"""Who a CONNECT comes from. No I/O: a signed token, a secret or a shared key is checked against the app in memory."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from broker import tokens
from broker.model import App
from gateway.live import DEVICE_TOPIC, EVENT_PREFIX, PUSH_TOPIC, RECEIPT_TOPIC
from gateway.mqtt import Connect, Reason

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
