"""Where callbacks may go: how a publisher says it, and which addresses a server calls for strangers."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Final

import msgspec
import orjson
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from broker.errors import ApiError
from broker.model import CALLBACK_EVENTS, Callback

URL_SIZE: Final = 2048
PARAMS_SIZE: Final = 1024  # bytes of JSON; each event carries them
RESOLVING: Final = 64  # look-ups at once, a thread each: a stranger's name server may never answer
KEYS: Final = ("url", "events", "type", "params")
TYPES: Final[Mapping[int, tuple[str, ...]]] = {  # the vendor's
    1: ("delivered",),
    2: ("clicked",),
    3: ("delivered", "clicked"),
}


class Refused(OSError):
    """We do not call this address. Another attempt would be refused alike."""


# What a publisher sends


def read_callback(value: object, default: Callback | None = None) -> Callback:
    """The `callback` of a push or of an app's settings: `{"url", "events", "params"}`, or with the vendor's "type"
    for "events". Without a URL it goes to that of `default`. Raises ApiError 1003."""
    if not isinstance(value, dict):
        raise _wrong("callback", "must be an object")
    if unknown := [key for key in value if key not in KEYS]:
        raise _wrong(f"callback.{unknown[0]}", f"unknown; there is {', '.join(KEYS)}")
    given = {key: item for key, item in value.items() if item is not None}
    if "type" in given and "events" in given:
        raise _wrong("callback", 'has "type" or "events", not both')
    url = _read_url(given["url"]) if "url" in given else default.url if default is not None else None
    if url is None:
        raise _wrong("callback.url", "is missing, and the app has none of its own")
    callback = Callback(url, params=_read_params(given.get("params")))
    if "type" in given:
        return msgspec.structs.replace(callback, events=_read_type(given["type"]))
    if "events" in given:
        return msgspec.structs.replace(callback, events=_read_events(given["events"]))
    return callback


def _wrong(name: str, problem: str) -> ApiError:
    return ApiError(1003, f"{name}: {problem}")


def _read_url(value: object) -> str:
    if not isinstance(value, str) or len(value.encode(errors="replace")) > URL_SIZE:
        raise _wrong("callback.url", f"must be text of at most {URL_SIZE} bytes")
    try:
        url = URL(value)
        right = url.scheme in ("http", "https") and url.port != 0 and _is_host(url.raw_host or "")
    except (ValueError, IndexError):  # yarl has both for a host that it cannot read
        right = False
    if not right or not value.isprintable() or " " in value:
        raise _wrong("callback.url", "must be a URL such as https://example.com/holdfast")
    if url.user is not None or url.password is not None:
        raise _wrong("callback.url", "must not hold credentials; check the signature instead")
    return value


def _is_host(text: str) -> bool:
    """A name as it is asked for (IDNA), or an address."""
    if ":" in text:
        ipaddress.ip_address(text)  # raises ValueError
        return True
    return _NAME.fullmatch(text) is not None


_NAME: Final = re.compile(r"[A-Za-z0-9_.-]+")


def _read_params(value: object) -> Mapping[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _wrong("callback.params", "must be an object")
    try:
        size = len(orjson.dumps(value))
    except TypeError:
        raise _wrong("callback.params", "must be an object of plain JSON") from None
    if size > PARAMS_SIZE:
        raise _wrong("callback.params", f"is {size} bytes, at most {PARAMS_SIZE} are allowed")
    return value


def _read_type(value: object) -> tuple[str, ...]:
    if isinstance(value, bool) or not isinstance(value, int) or value not in TYPES:
        raise _wrong("callback.type", "must be 1 (delivered), 2 (clicked) or 3 (both)")
    return TYPES[value]


def _read_events(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(event in CALLBACK_EVENTS for event in value):
        raise _wrong("callback.events", f"must be a list of {', '.join(CALLBACK_EVENTS)}")
    return tuple(event for event in CALLBACK_EVENTS if event in value)


# Which addresses we call


def is_public(address: str) -> bool:
    """False for loopback, private, link-local, shared, multicast and reserved addresses, also where an IPv6
    address stands for such an IPv4 address (RFC 4291 2.5.5.2, 6052, 3056)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    closed = any(ip in network for network in _CLOSED if network.version == ip.version)
    return ip.is_global and not (closed or ip.is_multicast or ip.is_reserved)


# Not global in fact, whatever the Python at hand knows of it.
_CLOSED: Final = tuple(
    map(
        ipaddress.ip_network,
        (
            "192.0.0.0/24",  # protocol assignments; one cloud's metadata service
            "192.88.99.0/24",  # 6to4 relays (RFC 7526)
            "168.63.129.16/32",  # one cloud's host, of each machine in it
            "fec0::/10",  # site-local (RFC 3879); the host of some virtual machines
            "3fff::/20",  # documentation (RFC 9637)
            "5f00::/16",  # segment routing (RFC 9602)
        ),
    )
)
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")


def check_literal(url: URL, *, private: bool) -> None:
    """A URL that names an address needs no resolver. Raises Refused, also for what only some read as an address:
    127.1, 0x7f000001."""
    host = url.host or ""
    try:
        allowed = private or is_public(host)
    except ValueError:
        allowed = ":" not in host and not _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2])
    if not allowed:
        raise _refused(host)


_NUMBER: Final = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")  # as a last label it makes an address (WHATWG URL)


def _refused(address: str) -> Refused:
    return Refused(f"{address} is not a public address (callbacks.private_addresses)")


CALLER: Final[ContextVar[int]] = ContextVar("CALLER", default=0)
"""The app for which a name is looked up."""


class CheckedResolver(AbstractResolver):
    """Hands out only addresses that may be called. What is connected to is what was checked, so a name cannot
    change its mind in between (DNS rebinding).

    getaddrinfo has no time limit, and whoever gave up waiting cannot end it. So each look-up has a thread of its own,
    which nobody waits for, and an app has at most as many as are still free for all others."""

    def __init__(self, *, private: bool) -> None:
        self._private = private
        self._resolving: Counter[int] = Counter()  # look-ups under way, by app

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Raises OSError, of which Refused is one."""
        app_id = CALLER.get()
        if self._resolving[app_id] >= RESOLVING - self._resolving.total():
            raise OSError(f"{host}: too many names of this app are being looked up")
        found = await self._look_up(app_id, host, port, family)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        allowed = [address for address in addresses if self._private or is_public(address)]
        if not allowed:
            raise _refused(f"{host} ({', '.join(addresses)})")
        return [_result(host, port, address) for address in allowed]

    def _look_up(
        self, app_id: int, host: str, port: int, family: socket.AddressFamily
    ) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def settle(found: Any, error: Exception | None) -> None:
            self._resolving[app_id] -= 1
            self._resolving += Counter()  # less the zeros
            if answer.done():  # given up
                return
            answer.set_exception(error) if error is not None else answer.set_result(found)

        def run() -> None:
            found, failed = None, None
            try:
                found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
            except (OSError, ValueError) as error:  # the latter: not a name that could be asked for
                failed = error
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, found, failed)

        threading.Thread(target=run, name="callback-names", daemon=True).start()
        self._resolving[app_id] += 1
        return answer

    async def close(self) -> None:
        """Look-ups under way are left to end by themselves."""


def _result(host: str, port: int, address: str) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return ResolveResult(
        hostname=host, host=address, port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST
    )
