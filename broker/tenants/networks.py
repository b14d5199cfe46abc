"""Lists of networks, as settings and callers write them."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def read_network(text: str) -> str:
    """As CIDR; an address alone is a network of one. Raises ValueError that says what is wrong."""
    return str(ipaddress.ip_network(text.strip()))


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
