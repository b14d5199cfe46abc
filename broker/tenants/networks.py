"""Lists of networks, as settings and callers write them."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Sequence

MAPPED_BITS = 96  # of ::ffff:0:0/96, as which IPv6 has the IPv4 addresses
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


def is_within(address: str, networks: Sequence[str]) -> bool:
    """Whether the address is in one of the networks (as read_network gave them). What is no address is in none."""
    found = read_address(address)
    return found is not None and any(found in network for network in _parsed(tuple(networks)))


@functools.lru_cache(maxsize=4096)
def _parsed(networks: tuple[str, ...]) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(network) for network in networks)
