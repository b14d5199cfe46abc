"""What a network of the lab is like: data, read from TOML files (networks.toml beside this module).

Times are seconds, sizes bytes, rates bits a second, shares 0 to 1. Delay, jitter and loss are of one direction.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

Share = Annotated[float, Meta(ge=0, lt=1)]
Seconds = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Name = Annotated[str, Meta(pattern="^[a-z][a-z0-9-]{0,31}$")]

EVER: Final = float(1 << 40)
NETWORKS: Final = Path(__file__).with_name("networks.toml")


class NetworkError(Exception):
    """Networks that cannot be used; the message names the file and what is wrong in it."""


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One section of a file."""


class Event(_Part, frozen=True, kw_only=True):
    """Something that happens to the path, `at` seconds after the start.

    `dead`: nothing passes, in the directions of `way`, to and from the server's `address` (1, 2, …; 0: any), until
    `until`. `moved`: the devices have another public address, and nothing that was open passes any more. `edge`:
    `dead`, and what answers at `address` is killed, and started again at `until`. `told`: the phones' system knows
    that they moved, says so to our SDK, and ends what was open, as Android does.
    """

    what: Literal["dead", "moved", "edge"]
    at: Seconds
    until: Seconds = EVER
    every: Seconds = 0  # and again after so long; 0: once
    way: Literal["both", "up", "down"] = "both"  # up: from devices
    told: bool = False
    address: Annotated[int, Meta(ge=0)] = 0

    def happened(self, since_start: float) -> int:
        """How often it has begun."""
        if since_start < self.at:
            return 0
        return 1 + int((since_start - self.at) / self.every) if self.every else 1

    def is_on(self, since_start: float) -> bool:
        times = self.happened(since_start)
        if not times:
            return False
        return since_start < self.until + (times - 1) * self.every

    def times(self, end: float) -> list[float]:
        """When it begins, before `end`."""
        return [self.at + n * self.every for n in range(self.happened(end))]


class Network(_Part, frozen=True, kw_only=True):
    name: Name
    title: str
    seconds: Positive = 600  # for which pushes are sent
    learn: Seconds = (
        0  # of them, in which a device may learn: what is due in them is not counted in shares and times
    )
    drain: Positive = 300  # after the last push, until what has not come counts as lost
    devices: Annotated[int, Meta(ge=1, le=200)] = 8
    every: Positive = 15  # mean seconds between two pushes to one device
    text: tuple[int, ...] = (60, 60, 60, 400)  # bytes of a push's text, one of these
    delay: Seconds = 0
    jitter: Seconds = 0  # up to so much more; packets stay in order
    loss: Share = 0
    burst: Seconds = (
        0  # mean time in which all are lost (Gilbert–Elliott), `loss` of the time; 0: each by itself
    )
    rate: Annotated[int, Meta(ge=0)] = 0  # of all devices together; 0: unlimited
    queue: Positive = 2  # seconds of `rate` that wait; more is dropped
    forget: Seconds = 0  # the NAT drops a flow after such a silence and tells nobody; 0: never
    mtu: Annotated[int, Meta(ge=0)] = 0  # longer packets with DF vanish, and nobody is told; 0: none
    addresses: Annotated[int, Meta(ge=1, le=2)] = 1  # under which the server is reached
    carrier: str = ""  # what our SDK declares
    link: str = "cellular"
    event: tuple[Event, ...] = ()
    wanted: tuple[Literal["within-5", "oracle", "back", "tenfold"], ...] = ()  # beyond what holds everywhere

    @property
    def end(self) -> float:
        return self.seconds + self.drain


class Lab(_Part, frozen=True, kw_only=True):
    """A file of networks."""

    seed: int = 2026
    network: tuple[Network, ...]


def read_networks(file: Path = NETWORKS) -> Lab:
    """Raises NetworkError."""
    try:
        lab = msgspec.convert(tomllib.loads(file.read_text()), Lab)
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise NetworkError(f"{file}: {error}") from error
    for network in lab.network:
        _check(network, file)
    names = [network.name for network in lab.network]
    if twice := {name for name in names if names.count(name) > 1}:
        raise NetworkError(f"{file}: two networks are called {', '.join(sorted(twice))}")
    return lab


def _check(network: Network, file: Path) -> None:
    where = f"{file}: network {network.name}"
    if network.learn >= network.seconds:
        raise NetworkError(f"{where}: learn ({network.learn}) must be less than seconds ({network.seconds})")
    if not network.text or not all(12 <= size <= 100_000 for size in network.text):
        raise NetworkError(f"{where}: text is of sizes from 12 to 100000, one at least")
    if network.burst and not network.loss:
        raise NetworkError(f"{where}: bursts of which no time is lost")
    for event in network.event:
        _check_event(event, network, where)


def _check_event(event: Event, network: Network, where: str) -> None:
    if event.address > network.addresses:
        raise NetworkError(f"{where}: an event at address {event.address} of {network.addresses}")
    if event.until <= event.at:
        raise NetworkError(f"{where}: an event from {event.at} until {event.until}")
    if event.told and event.what != "moved":
        raise NetworkError(f"{where}: a phone is told that it moved, and nothing else")
    if event.what == "edge" and (network.addresses < 2 or not event.address or event.every):
        raise NetworkError(f"{where}: an edge is lost once, at one address of two")
