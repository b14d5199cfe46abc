"""Where a device connects: which addresses, in what order, how many at a time. No I/O, no clock, no chance.

Theory. A list of addresses comes from dispatch or from the app, best first. An `AddressBook` moves it by what this
device saw on the network it is on: the address that was good last goes first, those that failed go last. A `Race`
tries them: one at once, the next after a stagger or as soon as one fails, a few beside each other (RFC 8305 does the
same with the addresses of one host). The first that opens wins.

What must always hold: no address is ever left out, a ban only puts it behind the others; what failed while nothing
else could be reached is no proof against an address, for then it was the network; what is kept is bounded (G6).

Two clocks: a race is timed in seconds of any clock that only goes forward, a book in Unix seconds, since it outlives
the process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final, Literal, get_args

import msgspec

Transport = Literal["tcp", "tls", "ws", "wss"]
AppState = Literal["foreground", "background", "doze"]

TRANSPORTS: Final[tuple[Transport, ...]] = get_args(Transport)
MAX_ADDRESSES: Final = 64  # of a list, and of a book: a list from a server that lost its mind
GOOD_FOR: Final = (
    6 * 3600.0
)  # seconds for which the last good address goes before a better one that failed once
ONE_ROUND: Final = (
    60.0  # seconds: a failure counts against an address that is followed so soon by a success elsewhere
)
MOST_BAN: Final = 1800.0  # seconds; mars bans for 6 to 30 minutes
SILENT_DEATHS: Final = 3  # in a row, of long connections: more than a NAT that is being learned explains
GREETING_ROUND_TRIPS: Final = 6  # a connection that took long to open has a long way to go

# How much longer than while somebody looks a device waits between attempts: the radio is what costs, and doze delays
# timers anyway.
PACE: Final[Mapping[AppState, tuple[float, float]]] = {  # of (base, cap)
    "foreground": (1, 1),
    "background": (2, 5),
    "doze": (5, 15),
}


@dataclass(frozen=True, slots=True)
class Address:
    """`host` is a name or a literal. `name` is whose certificate is expected there, where that is not the host."""

    host: str
    port: int
    transport: Transport = "tcp"
    name: str = ""

    @classmethod
    def read(cls, text: str, *, port: int = 1883, transport: Transport = "tcp") -> Address:
        """`[transport://]host[:port]`; an IPv6 literal with a port is in brackets. Raises ValueError."""
        scheme, found, rest = text.rpartition("://")
        if found and scheme not in TRANSPORTS:
            raise ValueError(f"address {text!r}: {scheme!r} is none of {', '.join(TRANSPORTS)}")
        host, colon, number = rest.rpartition(":")
        if not colon or number.endswith("]") or ":" in host.partition("[")[0]:
            host, number = rest, str(port)
        host = host.removeprefix("[").removesuffix("]")
        if not host or not number.isdecimal() or not 0 < int(number) < 65_536:
            raise ValueError(f"address {text!r}: not [transport://]host[:port]")
        return cls(host, int(number), _transport(scheme) if found else transport)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.transport}://{host}:{self.port}"

    @property
    def secret(self) -> bool:
        return self.transport in ("tls", "wss")

    @property
    def literal(self) -> bool:
        """No name server is needed to get there."""
        try:
            ip_address(self.host.partition("%")[0])
        except ValueError:
            return False
        return True

    def at(self, literal: str) -> Address:
        """The same, without asking a name server."""
        return Address(literal, self.port, self.transport, self.name or self.host)


def _transport(scheme: str) -> Transport:
    return next(transport for transport in TRANSPORTS if transport == scheme)


@dataclass(frozen=True, slots=True)
class Hints:
    """How hard to try; dispatch says it by the carrier. Seconds, but for `parallel`."""

    stagger: float = 2.5  # until the next address is tried beside the one before
    parallel: int = 3
    ban: float = 360.0  # after the first failure; doubled with each further one
    attempt: float = 10.0  # an attempt that took so long gives its place to an address that waits for one
    greeting: float = (
        6.0  # CONNACK takes no longer: two losses in a row, sent again after 1 + 2 s, and the way itself
    )
    base: float | None = None  # of the backoff between rounds; None: as the device's settings have it
    cap: float | None = None


@dataclass(frozen=True, slots=True)
class Try:
    """Begin to connect to it."""

    address: Address


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop trying to connect to it."""

    address: Address


class Race:
    """One round. Do what `tick` says, tell it what `failed`; it ends with the first that opens, or when it is
    `over`."""

    __slots__ = ("_hints", "_next_at", "_running", "_waiting", "failures")

    def __init__(self, addresses: Iterable[Address], hints: Hints, now: float) -> None:
        self.failures: dict[Address, str] = {}  # why, of those that count against the address
        self._hints = hints
        self._waiting = deque(dict.fromkeys(addresses))
        self._running: dict[Address, float] = {}  # since when; oldest first
        self._next_at = now

    @property
    def over(self) -> bool:
        """Everything was tried, in vain."""
        return not self._waiting and not self._running

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to do; None: not on its own. The last ones may take as long as they like."""
        if not self._waiting:
            return None
        if len(self._running) < self._hints.parallel:
            return self._next_at
        return max(self._next_at, next(iter(self._running.values())) + self._hints.attempt)

    def tick(self, now: float) -> list[Try | Abandon]:
        actions: list[Try | Abandon] = []
        while (deadline := self.deadline) is not None and now >= deadline:
            if len(self._running) >= self._hints.parallel:
                actions.append(Abandon(self._give_up(now)))
            actions.append(Try(self._begin(now)))
        return actions

    def _begin(self, now: float) -> Address:
        address = self._waiting.popleft()
        self._running[address] = now
        self._next_at = now + self._hints.stagger
        return address

    def _give_up(self, now: float) -> Address:
        address, since = next(iter(self._running.items()))
        del self._running[address]
        self.failures[address] = f"no answer in {now - since:.0f} s"
        return address

    def failed(self, address: Address, why: str, now: float) -> None:
        """The next one need not wait."""
        del self._running[address]
        self.failures[address] = why
        self._next_at = now

    def opened(self, address: Address, now: float) -> None:
        """It won. Who had a stagger's time and has not opened is a failure; who has just begun is not."""
        del self._running[address]
        self.cut(now)

    def cut(self, now: float) -> None:
        """Patience is over, or one has won."""
        for address, since in self._running.items():
            if now >= since + self._hints.stagger:
                self.failures[address] = f"no answer in {now - since:.1f} s"
        self._running.clear()
        self._waiting.clear()

    def extend(self, addresses: Iterable[Address]) -> None:
        """A newer list came: what was not tried yet is tried in its order."""
        tried = self._running.keys() | self.failures.keys()
        self._waiting = deque(a for a in dict.fromkeys([*addresses, *self._waiting]) if a not in tried)


class Ban(msgspec.Struct, frozen=True, array_like=True):
    until: float
    times: int  # failures in a row


class Known(msgspec.Struct, omit_defaults=True):
    """What was seen on one network; kept in the journal."""

    good: str = ""
    good_at: float = 0.0  # when it became the good one
    literal: str = ""  # the IP address it was found at
    bans: dict[str, Ban] = {}


class AddressBook:
    """All times are Unix seconds; a clock that was set back shortens a ban, and never makes one longer."""

    __slots__ = ("_known", "_missed", "_silent", "_tallies", "addresses", "hints")

    def __init__(
        self, addresses: Iterable[Address] = (), hints: Hints = Hints(), *, counting: bool = True
    ) -> None:
        """`counting`: somebody takes the outcomes."""
        self.hints = hints
        self.addresses: tuple[Address, ...] = ()
        self._known = Known()
        self._missed: dict[Address, float] = {}  # failed since anything was reached: when
        self._silent: tuple[Address, int] | None = None  # silent deaths in a row
        # Reached, failed; since they were asked for.
        self._tallies: dict[Address, tuple[int, int]] | None = {} if counting else None
        self.replace(addresses)

    def replace(self, addresses: Iterable[Address]) -> None:
        """A new list, best first."""
        self.addresses = tuple(dict.fromkeys(addresses))[:MAX_ADDRESSES]

    # Networks

    def enter(self, kept: object = None) -> None:
        """The device is on another network. `kept`: what `state` said there; None, or what cannot be read: a new
        one."""
        try:
            self._known = Known() if kept is None else msgspec.convert(kept, Known)
        except msgspec.ValidationError:
            self._known = Known()
        self._missed.clear()
        self._silent = None

    def state(self) -> dict[str, Any]:
        """Of this network, small, for JSON."""
        found: dict[str, Any] = msgspec.to_builtins(self._known)
        return found

    # The order

    def order(self, now: float, first: Iterable[Address] = ()) -> list[Address]:
        """All addresses. `first`: where the server sent the device, whatever is known of it."""
        ranked = sorted(self.addresses, key=lambda address: self.doubt(address, now))  # sorted is stable
        good = self._good(now)
        if good is not None and good in ranked and not self.doubt(good, now):
            ranked = list(dict.fromkeys([good, *ranked]))
            if self._known.literal and not good.literal:
                ranked.insert(2, good.at(self._known.literal))  # for where no name server answers
        return list(dict.fromkeys([*first, *ranked]))

    def _good(self, now: float) -> Address | None:
        known = self._known
        fresh = known.good and now < known.good_at + GOOD_FOR
        return (
            next((address for address in self.addresses if str(address) == known.good), None)
            if fresh
            else None
        )

    def doubt(self, address: Address, now: float) -> int:
        """0: none. What failed while others did not weighs more than what just failed."""
        ban = self._known.bans.get(str(address))
        banned = ban.times if ban is not None and now < ban.until <= now + MOST_BAN else 0
        return 2 * banned + (address in self._missed)

    def _listed(self, address: Address) -> Address:
        """A literal stands for the name it was found by."""
        return Address(address.name, address.port, address.transport) if address.name else address

    # What happened

    def reached(self, address: Address, literal: str, now: float) -> None:
        """The server answered there; `literal` is the IP address. What failed just before was not the network's
        fault."""
        address = self._listed(address)
        self._missed.pop(address, None)
        for other, at in self._missed.items():
            if now < at + ONE_ROUND:
                self._ban(other, now)
        self._missed.clear()
        known = self._known
        known.bans.pop(str(address), None)
        if address in self.addresses:
            known.literal = literal
            if known.good != str(address) or now >= known.good_at + GOOD_FOR or now < known.good_at:
                known.good, known.good_at = str(address), now
            self._count(address, reached=1)

    def failed(self, address: Address, now: float) -> None:
        """It could not be opened, or nobody spoke there, or what was opened broke at once."""
        if address.name:
            return  # the name is tried as well, and tells
        self._missed[address] = now
        if len(self._missed) > MAX_ADDRESSES:  # where servers sent us
            del self._missed[next(iter(self._missed))]
        self._count(address, failed=1)

    def ended(self, address: Address, now: float, *, silent: bool) -> None:
        """A connection ended that had lived for a while. `silent`: nobody said so, its heartbeat was not answered.
        Some carriers pass small packets and swallow large ones: such a path opens well, and dies again and again."""
        address = self._listed(address)
        times = self._silent[1] if self._silent is not None and self._silent[0] == address else 0
        self._silent = (address, times + 1) if silent else None
        if silent and times + 1 >= SILENT_DEATHS:
            self._silent = None
            self._ban(address, now)
            self._count(address, failed=1)

    def _ban(self, address: Address, now: float) -> None:
        bans = self._known.bans
        before = bans.pop(str(address), None)
        times = 1 + (before.times if before is not None else 0)
        bans[str(address)] = Ban(now + min(self.hints.ban * 2.0 ** min(times - 1, 62), MOST_BAN), times)
        if len(bans) > MAX_ADDRESSES:
            del bans[next(iter(bans))]

    def _count(self, address: Address, *, reached: int = 0, failed: int = 0) -> None:
        if self._tallies is not None and address in self.addresses:
            before = self._tallies.get(address, (0, 0))
            self._tallies[address] = (before[0] + reached, before[1] + failed)

    @property
    def has_failures(self) -> bool:
        return any(failed for _reached, failed in (self._tallies or {}).values())

    def take_outcomes(self) -> list[tuple[str, int, int]]:
        """(address, reached, failed) since the last call: for dispatch."""
        tallies, self._tallies = self._tallies, {}
        return [(str(address), *counts) for address, counts in (tallies or {}).items()]


def greeting_limit(least: float, opening: float, failures: int) -> float:
    """Seconds that CONNACK may take while there is another address to try. `opening`: that the connection took to
    open; `failures`: times in a row that nobody spoke. A path that loses much makes it longer until it is long
    enough."""
    return max(least, GREETING_ROUND_TRIPS * opening) * 2.0 ** min(failures, 3)
