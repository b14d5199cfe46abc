"""A carrier's TCP settings, on the sockets of its devices.

They are set when a connection is accepted, and again when its CONNECT changed the carrier. A system that does not
know an option, or forbids it, is the operator's to know and no reason to turn a device away: it is logged once.

`mss` is another matter: the kernel takes it before the handshake only, so it is set on listening sockets, of the
carrier that whoever comes in there has by that alone.
"""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from broker.carriers.catalog import Catalog
from broker.carriers.profile import Tcp
from broker.logs import log_event

MAX_NOTES: Final = 1000  # refusals of the system that are remembered; more than profiles have values
CACHED: Final = 1000  # profiles, and pairs of them

Value: TypeAlias = int | bytes

log = logging.getLogger(__name__)


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))  # 0 is the kernel's own


@dataclass(frozen=True, slots=True)
class _Option:
    field: str  # of Tcp
    level: int
    number: int
    encode: Callable[[Any], Value]


@dataclass(frozen=True, slots=True)
class Setting:
    field: str
    level: int
    number: int
    value: Value


def _mtu_discovery(fragment: bool) -> int:
    return IP_PMTUDISC_DONT if fragment else IP_PMTUDISC_WANT


TCP: Final = socket.IPPROTO_TCP
TCP_THIN_LINEAR_TIMEOUTS: Final = 16  # linux/tcp.h; Python's socket module has none of these
TCP_RTO_MAX_MS: Final = 44  # since Linux 6.15
IP_MTU_DISCOVER: Final = 10  # linux/in.h
IP_PMTUDISC_DONT: Final = 0  # packets without DF
IP_PMTUDISC_WANT: Final = 1
OPTIONS: Final = (
    _Option("user_timeout", TCP, socket.TCP_USER_TIMEOUT, _milliseconds),
    _Option("retry_pause", TCP, TCP_RTO_MAX_MS, _milliseconds),
    _Option("linear_retries", TCP, TCP_THIN_LINEAR_TIMEOUTS, int),
    _Option("keepalive_idle", TCP, socket.TCP_KEEPIDLE, int),
    _Option("keepalive_interval", TCP, socket.TCP_KEEPINTVL, int),
    _Option("keepalive_count", TCP, socket.TCP_KEEPCNT, int),
    _Option("congestion", TCP, socket.TCP_CONGESTION, str.encode),
    _Option("notsent_lowat", TCP, socket.TCP_NOTSENT_LOWAT, int),
    _Option("fragment", socket.IPPROTO_IP, IP_MTU_DISCOVER, _mtu_discovery),  # of no effect in IPv6
)
BUFFERS: Final = (  # the system's own size cannot be had back: it was growing as needed
    _Option("send_buffer", socket.SOL_SOCKET, socket.SO_SNDBUF, int),
    _Option("receive_buffer", socket.SOL_SOCKET, socket.SO_RCVBUF, int),
)
SOON: Final = Setting("user_timeout", TCP, socket.TCP_USER_TIMEOUT, 5000)  # from the first repetition
KEEPALIVE: Final = ("keepalive_idle", "keepalive_interval", "keepalive_count")
CONGESTION_SIZE: Final = 16  # TCP_CA_NAME_MAX


def set_up(transport: Any, tcp: Tcp) -> None:
    """On a socket that is as the system made it. `transport`: anything with `get_extra_info`."""
    _set_all(transport, settings_of(tcp))


def change(transport: Any, former: Tcp, tcp: Tcp) -> None:
    """On a socket that was set up for `former`."""
    if former != tcp:
        _set_all(transport, changes(former, tcp))


def clamp(listening: Iterable[Any], catalog: Catalog, name: str) -> None:
    """The segments of who connects to these sockets, from now on. `name`: of the listener."""
    for bound in listening:
        profile = catalog.at_accept("", listener=name, port=bound.getsockname()[1])
        _set(bound, Setting("mss", TCP, socket.TCP_MAXSEG, profile.tcp.mss or 0))  # 0: as the system has it


def give_up(transport: Any) -> None:
    """The connection is over, and its peer did not answer: what it was sent goes to nobody, or again on the next one,
    and is not repeated for long."""
    _set_all(transport, (SOON,))


@functools.lru_cache(maxsize=CACHED)
def settings_of(tcp: Tcp) -> tuple[Setting, ...]:
    """What there is to set: nothing, where the profile leaves all to the system."""
    found = [
        Setting(option.field, option.level, option.number, option.encode(value))
        for option in (*OPTIONS, *BUFFERS)
        if (value := getattr(tcp, option.field)) is not None
    ]
    if _keeps_alive(tcp):
        found.append(_keep_alive(1))
    return tuple(found)


@functools.lru_cache(maxsize=CACHED)
def changes(former: Tcp, tcp: Tcp) -> tuple[Setting, ...]:
    """What only the former set goes back to the system's value, but for buffers."""
    left = [
        Setting(option.field, option.level, option.number, value)
        for option in OPTIONS
        if getattr(former, option.field) is not None
        and getattr(tcp, option.field) is None
        and (value := _system_value(option.level, option.number)) is not None
    ]
    if _keeps_alive(former) and not _keeps_alive(tcp):
        left.append(_keep_alive(0))
    return (*left, *settings_of(tcp))


def _keeps_alive(tcp: Tcp) -> bool:
    return any(getattr(tcp, field) is not None for field in KEEPALIVE)


def _keep_alive(on: int) -> Setting:
    return Setting("keepalive", socket.SOL_SOCKET, socket.SO_KEEPALIVE, on)


@functools.cache
def _system_value(level: int, number: int) -> Value | None:
    """What a new socket has; None: the system does not know the option."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as fresh, suppress(OSError):
        if (level, number) == (TCP, socket.TCP_CONGESTION):
            return fresh.getsockopt(level, number, CONGESTION_SIZE).rstrip(b"\0")
        return fresh.getsockopt(level, number)
    return None


def _set_all(transport: Any, settings: Iterable[Setting]) -> None:
    if not settings:
        return
    connected = transport.get_extra_info("socket")
    if connected is not None:
        for setting in settings:
            _set(connected, setting)


def _set(connected: Any, setting: Setting) -> None:
    try:
        connected.setsockopt(setting.level, setting.number, setting.value)
    except OSError as error:
        if connected.fileno() >= 0:  # or it is closed, which says nothing of the option
            _note(setting, error.strerror or str(error))


@functools.lru_cache(maxsize=MAX_NOTES)  # once for each option and value
def _note(setting: Setting, reason: str) -> None:
    value = setting.value.decode() if isinstance(setting.value, bytes) else setting.value
    log_event(
        log,
        logging.WARNING,
        "the system does not take a carrier's TCP setting",
        setting=f"tcp.{setting.field}",
        value=value,
        reason=reason,
    )
