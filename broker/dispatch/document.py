"""What a device is told: one JSON object, small enough for one datagram, and signed.

The signature is Ed25519 (RFC 8032) over the object without its `signature`, as canonical JSON: keys sorted, no
blanks, ASCII and whole numbers only, which is what RFC 8785 makes of it, too. So it may be stored and sent on in
any form, and whoever has the public key can check it. Nothing that a caller says is ever signed: carrier and region
are names of profiles, addresses those of the operator or of nodes.
"""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import orjson

from broker.carriers.profile import Address, CarrierProfile, Heartbeat
from broker.carriers.profile import Reconnect as Waits

VERSION: Final = 1
MAX_ADDRESSES: Final = 8  # of one answer: a device that has tried so many asks again


class Reconnect(msgspec.Struct, frozen=True, kw_only=True):
    """How a device comes back: milliseconds, and how many addresses it may try at once."""

    base: int
    cap: int
    stagger: int
    ban: int
    parallel: int


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """All but time, key and signature."""

    addresses: tuple[str, ...]  # in the order in which to try them; none: those that the device knows
    carrier: str  # the profile's name
    heartbeat: str  # "start least most", seconds, as CONNACK has it
    reconnect: Reconnect
    region: str
    ttl: int  # seconds for which the answer holds
    v: int = VERSION


class Signed(msgspec.Struct, frozen=True):
    """An answer as it is sent."""

    content: Content
    made: int  # Unix seconds
    raw: bytes
    etag: str
    key: str  # its name


def compose(
    profile: CarrierProfile, heartbeat: Heartbeat, addresses: Sequence[str], region: str, ttl: int
) -> Content:
    waits: Waits = profile.reconnect
    return Content(
        addresses=tuple(addresses[:MAX_ADDRESSES]),
        carrier=profile.name,
        heartbeat=f"{heartbeat.start} {heartbeat.least} {heartbeat.most}",
        reconnect=Reconnect(
            base=_milliseconds(waits.base),
            cap=_milliseconds(waits.cap),
            stagger=_milliseconds(waits.stagger),
            ban=_milliseconds(waits.ban),
            parallel=waits.parallel,
        ),
        region=region,
        ttl=ttl,
    )


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def canonical(fields: dict[str, Any]) -> bytes:
    """The bytes that are signed."""
    return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)


def encode_bytes(raw: bytes) -> str:
    """base64url without padding (RFC 4648, 5)."""
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


def as_url(address: Address) -> str:
    return url_of(address.transport, host_port(address))


def host_port(address: Address) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{host}:{address.port}"


def url_of(transport: str, host_and_port: str) -> str:
    return f"{transport}://{host_and_port}"
