"""In which order a device is to try addresses.

The profile's order is the operator's. Four things move an address: nobody lives there (of nodes that say where
devices reach them), devices of the carrier fail to reach it, it is in another region than the device asked for, its
nodes are crowded. None of them removes an address: what is last is still raced for, so that whoever is wrong about
an address costs a device a stagger, and not its connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from broker.carriers.profile import Address
from broker.dispatch.document import as_url, host_port, url_of
from broker.model import NodeEntry

CROWD_FACTOR: Final = 2.0  # times the connections of the least busy address
CROWD_ROOM: Final = 1000  # connections by which it must be more, too: small numbers say nothing
SPREAD: Final = (
    16  # orders of equal nodes that are handed out: or all that come at once went to the least busy
)
UNBOUND: Final = ("0.0.0.0", "[::]", "")  # hosts at which nobody reaches a node


@dataclass(frozen=True, slots=True)
class Place:
    """What the nodes say of one `host:port`."""

    live: int  # nodes there that take devices
    connections: float  # of each of these
    tls: bool


def places(nodes: Iterable[NodeEntry]) -> dict[str, Place]:
    """By `host:port`. Workers of one supervisor share theirs."""
    found: dict[str, list[NodeEntry]] = {}
    for node in nodes:
        address = node.info.address
        if node.info.role != "broker" and address and address.rpartition(":")[0] not in UNBOUND:
            found.setdefault(address, []).append(node)
    return {address: _place(there) for address, there in found.items()}


def _place(nodes: Sequence[NodeEntry]) -> Place:
    taking = [node.info for node in nodes if node.live and not node.info.draining]
    connections = sum(info.connections for info in taking) / max(1, len(taking))
    return Place(len(taking), connections, any(node.info.tls for node in nodes))


def rank(
    addresses: Sequence[Address], region: str, nodes: Mapping[str, Place], failing: Mapping[str, int]
) -> list[str]:
    """Addresses of a profile, best first. `failing`: 0 is good, by address."""
    known = [nodes.get(host_port(address)) for address in addresses]
    least = min((place.connections for place in known if place is not None and place.live), default=0.0)

    def worth(position: int) -> tuple[bool, int, bool, bool, int]:
        address, place = addresses[position], known[position]
        return (
            place is not None and not place.live,
            failing.get(as_url(address), 0),
            bool(region) and address.region != region,
            place is not None and place.connections > least * CROWD_FACTOR + CROWD_ROOM,
            position,
        )

    return [as_url(addresses[position]) for position in sorted(range(len(addresses)), key=worth)]


def rank_nodes(nodes: Mapping[str, Place], failing: Mapping[str, int], variant: int) -> list[str]:
    """Live nodes, for profiles without addresses. Of `SPREAD` variants each is another order; those with few
    connections are early in most."""
    urls = {address: _node_url(address, place) for address, place in nodes.items() if place.live}

    def worth(address: str) -> tuple[int, float]:
        return failing.get(urls[address], 0), (nodes[address].connections + 1) * _draw(f"{variant} {address}")

    return [urls[address] for address in sorted(urls, key=worth)]


def variant_of(address: str) -> int:
    """Of a caller: the same each time."""
    return int(_draw(address) * SPREAD)


def _draw(text: str) -> float:
    """In [0, 1), the same for the same text in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest()) / 2**32


def node_urls(nodes: Mapping[str, Place]) -> set[str]:
    return {_node_url(address, place) for address, place in nodes.items()}


def _node_url(address: str, place: Place) -> str:
    return url_of("tls" if place.tls else "tcp", address)
