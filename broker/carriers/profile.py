"""What a carrier profile says (configs/carriers/*.toml). Data only; who finds it, and who obeys it, is elsewhere.

Times are seconds, sizes bytes. What a file does not say comes from the profile that it inherits from, in the end
from `default.toml`, which says everything that has no default here.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1, le=65_535)]
Size = Annotated[int, Meta(ge=1024, le=1 << 26)]
KeepAlive = Annotated[int, Meta(ge=10, le=65_535)]

Link = Literal["wifi", "cellular", "ethernet", "satellite", "other"]

DEFAULT = "default"


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One section of a profile."""


class Recognise(_Part, frozen=True):
    """Whose devices these are: the first of these that fits anybody decides, in this order."""

    proxies: tuple[str, ...] = ()  # addresses (CIDR) that a PROXY header says the device came in on
    listeners: tuple[str, ...] = ()  # names of listeners: tcp, tls, ws, or a port
    operators: tuple[
        str, ...
    ] = ()  # MCC+MNC that a device declares, "46000", or its beginning; the longest wins
    names: tuple[
        str, ...
    ] = ()  # carrier names that a device declares, case ignored; the profile's own is one
    networks: tuple[str, ...] = ()  # CIDR of devices' addresses; the longest prefix of all profiles wins
    network_files: tuple[str, ...] = ()  # files beside the profile with more of them, one a line
    links: tuple[Link, ...] = ()  # what a device declares


class Heartbeat(_Part, frozen=True):
    """Silence after which a device sends PINGREQ."""

    start: KeepAlive = 240  # of a device that has learned nothing of its network
    least: KeepAlive = 30
    most: KeepAlive = 1200  # a longer wish is overridden (MQTT 5)


class Acks(_Part, frozen=True):
    """How long an acknowledgement may take until the connection is dead or hopeless (RFC 6298 between the bounds)."""

    first: Seconds = 30.0  # while no round-trip time is known
    least: Seconds = 10.0
    most: Seconds = 60.0


class Reconnect(_Part, frozen=True):
    """What a device is told."""

    base: Seconds = 1.0  # of its backoff, with full jitter
    cap: Seconds = 60.0
    stagger: Seconds = 2.5  # until the next address is tried beside the one before
    parallel: Annotated[int, Meta(ge=1, le=8)] = 3
    ban: Seconds = 360.0  # for which an address that failed comes last


class Delivery(_Part, frozen=True):
    window: Count = 32  # packets on their way to one device, unacknowledged
    first_window: Count = (
        32  # of a connection whose predecessor ended without a word; doubled with each round of acks
    )
    order: Literal["oldest", "urgent"] = (
        "oldest"  # urgent: high priority first, then newest first, when it comes back
    )
    compress: Literal["ask", "packet"] = "ask"  # packet: where that saves a packet on the wire, too
    write_buffer: Size = 65_536  # bytes that wait for a slow socket before it is skipped
    largest: Size = 1 << 20  # of a payload; what is larger is not sent on this carrier, and expires


class Tcp(_Part, frozen=True):
    """Of a device's socket; None: as the system has it."""

    user_timeout: Seconds | None = (
        None  # TCP_USER_TIMEOUT: unacknowledged bytes for so long end the connection
    )
    retry_pause: Annotated[int, Meta(ge=1, le=120)] | None = None  # TCP_RTO_MAX_MS: between retries, at most
    linear_retries: bool | None = None  # TCP_THIN_LINEAR_TIMEOUTS: the first ones without doubling the pause
    keepalive_idle: Count | None = None  # SO_KEEPALIVE with TCP_KEEPIDLE …
    keepalive_interval: Count | None = None
    keepalive_count: Count | None = None
    congestion: str | None = None  # TCP_CONGESTION, where the kernel has it
    mss: Annotated[int, Meta(ge=88, le=32_767)] | None = None  # TCP_MAXSEG
    fragment: bool | None = None  # IP_MTU_DISCOVER: whether routers may cut packets into pieces
    send_buffer: Size | None = None
    receive_buffer: Size | None = None
    notsent_lowat: Size | None = None  # TCP_NOTSENT_LOWAT


class Address(_Part, frozen=True):
    """Where devices of this carrier reach us."""

    host: Annotated[str, Meta(min_length=1)]
    port: Annotated[int, Meta(ge=1, le=65_535)]
    transport: Literal["tcp", "tls", "ws", "wss"] = "tcp"
    region: str = ""


class CarrierProfile(_Part, frozen=True):
    """Shared by all connections of a carrier."""

    name: Annotated[str, Meta(pattern="^[a-z][a-z0-9-]{0,39}$")]
    title: str = ""
    recognise: Recognise = msgspec.field(default_factory=Recognise)
    heartbeat: Heartbeat = msgspec.field(default_factory=Heartbeat)
    acks: Acks = msgspec.field(default_factory=Acks)
    reconnect: Reconnect = msgspec.field(default_factory=Reconnect)
    delivery: Delivery = msgspec.field(default_factory=Delivery)
    tcp: Tcp = msgspec.field(default_factory=Tcp)
    addresses: tuple[Address, ...] = ()  # in this order; none: those of the default
