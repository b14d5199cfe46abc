"""The longest of very many prefixes that an address is in.

Prefixes lie within each other or apart, so they can be cut into ranges that do not overlap, each of which belongs to
the innermost prefix around it. Neighbours of one owner are one range. What is left is a sorted table without
pointers, 6 bytes a range in IPv4 and 18 in IPv6, and one binary search (decision 0023 has it beside trees).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Final, Generic, TypeVar

T = TypeVar("T")

IPV4: Final = 4  # bytes of an address
IPV6: Final = 16
HALVES: Final = {IPV4: "H", IPV6: "Q"}  # array types of half an address
MAPPED: Final = (
    bytes(10) + b"\xff\xff"
)  # how an IPv4 address begins that came over an IPv6 socket (RFC 4291 2.5.5.2)
MAX_OWNERS: Final = 65_535  # that two bytes can tell apart
NETWORK_ALLOWED: Final = "a network such as 192.0.2.0/24, without bits after its length"


@dataclass(frozen=True, slots=True)
class Prefix:
    """`width`: bytes of an address; `first`, `last`: the addresses it spans, as numbers."""

    width: int
    first: int
    last: int

    def __contains__(self, packed: bytes) -> bool:
        return len(packed) == self.width and self.first <= int.from_bytes(packed) <= self.last

    def __str__(self) -> str:
        address = inet_ntop(AF_INET if self.width == IPV4 else AF_INET6, self.first.to_bytes(self.width))
        return f"{address}/{8 * self.width - (self.last - self.first).bit_length()}"


def read_prefix(text: str) -> Prefix:
    """Of CIDR; an address alone is a network of one. Raises ValueError that says what is allowed."""
    address, slash, length = text.partition("/")
    packed = pack(address)
    if packed is None or (slash and not (length.isascii() and length.isdecimal())):
        raise ValueError(f"must be {NETWORK_ALLOWED}")
    mapped = len(packed) == IPV4 and ":" in address
    bits = 8 * len(packed)
    span = bits - (int(length) - 8 * len(MAPPED) * mapped if slash else bits)
    first = int.from_bytes(packed)
    if not 0 <= span <= bits or first & (1 << span) - 1:
        raise ValueError(f"must be {NETWORK_ALLOWED}")
    return Prefix(len(packed), first, first | (1 << span) - 1)


def pack(address: str) -> bytes | None:
    """4 or 16 bytes; IPv4 written as IPv6 is IPv4. None: it is no address."""
    try:
        packed = inet_pton(AF_INET6 if ":" in address else AF_INET, address)
    except (OSError, ValueError):  # ValueError: with a NUL
        return None
    return packed.removeprefix(MAPPED) if len(packed) == IPV6 else packed


class Prefixes(Generic[T]):
    """Whose an address is. Immutable."""

    __slots__ = ("_owners", "_tables")

    def __init__(self, owned: Iterable[tuple[Prefix, T]]) -> None:
        """Where the same prefix comes twice, the last one has it."""
        owners: dict[int, tuple[int, T]] = {}
        ranges: dict[int, list[tuple[int, int, int]]] = {IPV4: [], IPV6: []}
        for prefix, owner in owned:
            number, _ = owners.setdefault(id(owner), (len(owners) + 1, owner))
            ranges[prefix.width].append((prefix.first, -prefix.last, number))
        assert len(owners) <= MAX_OWNERS
        self._owners: Sequence[T | None] = (None, *(owner for _, owner in owners.values()))
        self._tables = {width: _Table(width, found) for width, found in ranges.items() if found}

    def find(self, address: str) -> T | None:
        """None: nobody's, or no address. 2 µs."""
        packed = pack(address) if self._tables else None
        if packed is None or (table := self._tables.get(len(packed))) is None:
            return None
        return self._owners[table.owner_of(int.from_bytes(packed))]

    def __len__(self) -> int:
        """Ranges that are left."""
        return sum(len(table) for table in self._tables.values())


class _Table:
    """Of one width: where each range begins, in halves that an array can hold, and whose it is; 0: nobody's."""

    __slots__ = ("_half", "_highs", "_lows", "_owners")

    def __init__(self, width: int, ranges: Iterable[tuple[int, int, int]]) -> None:
        starts, owners = _cut(sorted(ranges), last_address=(1 << 8 * width) - 1)
        self._half = 4 * width
        self._highs = array(HALVES[width], (start >> self._half for start in starts))
        self._lows = array(HALVES[width], (start & (1 << self._half) - 1 for start in starts))
        self._owners = array("H", owners)

    def __len__(self) -> int:
        return len(self._owners)

    def owner_of(self, address: int) -> int:
        high, low = address >> self._half, address & (1 << self._half) - 1
        first = bisect_left(self._highs, high)
        past = bisect_right(self._highs, high, first)
        at = bisect_right(self._lows, low, first, past)  # past the last that begins at the address or before
        return self._owners[at - 1] if at else 0


def _cut(ranges: Sequence[tuple[int, int, int]], *, last_address: int) -> tuple[list[int], list[int]]:
    """Of (first, -last, owner), sorted: what lies around comes before what lies within."""
    starts: list[int] = []
    owners: list[int] = []
    around: list[tuple[int, int]] = []  # (last, owner), innermost at the end

    def begins(start: int, owner: int) -> None:
        if starts and starts[-1] == start:
            starts.pop()
            owners.pop()
        if (owners[-1] if owners else 0) != owner:
            starts.append(start)
            owners.append(owner)

    def ends_before(first: int) -> None:
        while around and around[-1][0] < first:
            last, _ = around.pop()
            if last < last_address:
                begins(last + 1, around[-1][1] if around else 0)

    for first, minus_last, owner in ranges:
        ends_before(first)
        begins(first, owner)
        around.append((-minus_last, owner))
    ends_before(last_address + 1)
    return starts, owners
