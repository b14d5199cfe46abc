"""Lists of networks, as settings and callers write them."""

from __future__ import annotations

import functools
import ipaddress
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Final

CACHED_LISTS: Final = 256  # that are kept ready, also of keys that are gone: 0.2 MB each at most
MAPPED_BITS = 96  # of ::ffff:0:0/96, as which IPv6 has the IPv4 addresses
V6_SITE: Final = 64  # bits of an IPv6 address that name a site: one customer has all that follow (RFC 6177)
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def read_network(text: str) -> str:
    """As CIDR; an address alone is a network of one; IPv4 written as IPv6 is IPv4, as in read_address. Raises
    ValueError that says what is wrong."""
    network = ipaddress.ip_network(text.strip())
    mapped = network.network_address.ipv4_mapped if isinstance(network, ipaddress.IPv6Network) else None
    if mapped is None or network.prefixlen < MAPPED_BITS:
        return str(network)
    return f"{mapped}/{network.prefixlen - MAPPED_BITS}"


def read_address(text: str) -> Address | None:
    """None: it is no address. An IPv4 address that came over an IPv6 socket is an IPv4 address."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def site_of(address: str) -> str:
    """What one customer has: an IPv4 address, or the /64 of an IPv6 address. What is no address is itself."""
    found = read_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        return f"{ipaddress.IPv6Network((int(found), V6_SITE), strict=False).network_address}/{V6_SITE}"
    return address if found is None else str(found)


def is_within(address: str, networks: Sequence[str]) -> bool:
    """Whether the address is in one of the networks (as read_network gave them). What is no address is in none."""
    found = read_address(address)
    return found is not None and _parsed(tuple(networks)).covers(found)


class _Ranges:
    """Of addresses, disjoint and sorted: a look-up is ten comparisons in a list of a thousand."""

    __slots__ = ("_firsts", "_lasts")

    def __init__(self, networks: Iterable[Network]) -> None:
        self._firsts: dict[int, list[int]] = {4: [], 6: []}  # by version
        self._lasts: dict[int, list[int]] = {4: [], 6: []}
        ranges = [(n.version, int(n.network_address), -int(n.broadcast_address)) for n in networks]
        for version, first, last in sorted(ranges):  # the largest of one beginning first
            lasts = self._lasts[version]
            if (
                not lasts or first > lasts[-1]
            ):  # else it is within the one before: networks never overlap by half
                self._firsts[version].append(first)
                lasts.append(-last)

    def covers(self, address: Address) -> bool:
        number = int(address)
        before = bisect_right(self._firsts[address.version], number)
        return before > 0 and number <= self._lasts[address.version][before - 1]


@functools.lru_cache(maxsize=CACHED_LISTS)
def _parsed(networks: tuple[str, ...]) -> _Ranges:
    return _Ranges(map(ipaddress.ip_network, networks))
