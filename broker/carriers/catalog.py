"""Which profile a device has. Asked at accept, by how and from where it comes in, and at CONNECT, by what it
declares.

What a way in says is a fact: devices that came in by a PROXY address or listener of a profile keep that profile.
What a device declares wins over the networks it could be in, for an operator's table of those is older than a SIM
card. But a SIM card says nothing of the Wi-Fi under it, so an operator's code counts on cellular links only.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Final, get_args

from broker.carriers.prefixes import Prefixes
from broker.carriers.profile import DEFAULT, CarrierProfile, Link
from broker.carriers.reading import CarrierError, Read, read_profiles

__all__ = ["LINKS", "CarrierError", "Carriers", "Catalog"]

LINKS: Final = frozenset(get_args(Link))
OTHER_LINK: Final = "other"
SIM_LINKS: Final = frozenset({"", "cellular", OTHER_LINK})  # of the carrier that the SIM card names
MAX_DECLARED: Final = 64  # characters of a carrier's name; a longer one is nobody's
OPERATOR_DIGITS: Final = range(6, 0, -1)  # of an MCC+MNC, longest first


class Catalog:
    """All profiles. Immutable; any thread."""

    __slots__ = (
        "_links",
        "_listeners",
        "_names",
        "_networks",
        "_operators",
        "_proxies",
        "default",
        "knows_ports",
        "profiles",
    )

    def __init__(self, found: Read) -> None:
        self.profiles = profiles = found.profiles
        self.default = profiles[DEFAULT]
        self._networks = Prefixes((prefix, profiles[name]) for prefix, (name, _) in found.networks.items())
        self._proxies = Prefixes((prefix, profiles[name]) for prefix, (name, _) in found.proxies.items())
        self._listeners = {text: one for one in profiles.values() for text in one.recognise.listeners}
        self.knows_ports = any(text.isdecimal() for text in self._listeners)  # if not, any will do
        self._operators = {text: one for one in profiles.values() for text in one.recognise.operators}
        self._links = {str(text): one for one in profiles.values() for text in one.recognise.links}
        self._names = {
            text.casefold(): one for one in profiles.values() for text in (one.name, *one.recognise.names)
        }

    @classmethod
    def read(cls, directory: Path | None) -> Catalog:
        """None: the profiles that come along. Raises CarrierError. Not on the event loop: a long list of networks
        takes a second."""
        return cls(read_profiles(directory or shipped()))

    def at_accept(self, address: str, *, listener: str, port: int, proxy: str = "") -> CarrierProfile:
        """Of a connection to our `listener` (tcp, tls, ws) at `port`. `proxy`: the address of ours that a PROXY
        header names. A few µs; an address that is none is nobody's."""
        return self._by_way_in(listener, port, proxy) or self._networks.find(address) or self.default

    def _by_way_in(self, listener: str, port: int, proxy: str) -> CarrierProfile | None:
        if proxy and (found := self._proxies.find(proxy)) is not None:
            return found
        if not self._listeners:
            return None
        return self._listeners.get(str(port)) or self._listeners.get(listener)

    def at_connect(self, accepted: CarrierProfile, carrier: str, link: str) -> CarrierProfile:
        """Of a device that came in as `accepted`, and declares a carrier (MCC+MNC or a name) and a link; empty: it
        does not."""
        way_in = accepted.recognise
        if way_in.proxies or way_in.listeners:
            return accepted
        declared = self._declared(carrier, link)
        if declared is not None:
            return declared
        if accepted.name != DEFAULT:
            return accepted
        return self._links.get(read_link(link), accepted) if link else accepted

    def _declared(self, carrier: str, link: str) -> CarrierProfile | None:
        name = carrier.strip().casefold()
        if not name or len(name) > MAX_DECLARED:
            return None
        code = name.replace("-", "").replace(" ", "")
        if not (code.isascii() and code.isdecimal()):
            return self._names.get(name)
        if (link and read_link(link)) not in SIM_LINKS or len(code) not in OPERATOR_DIGITS:
            return None
        found = (self._operators.get(code[:digits]) for digits in OPERATOR_DIGITS)
        return next(filter(None, found), None)


def read_link(text: str) -> str:
    """One of LINKS, whatever a device declares: these are labels of metrics."""
    return text if text in LINKS else OTHER_LINK


def shipped() -> Path:
    """The profiles that come along."""
    return Path(str(files("configs") / "carriers"))


class Carriers:
    """Holds the newest catalog. Live connections keep the profile they have until they come back."""

    __slots__ = ("_directory", "catalog")

    def __init__(self, directory: Path | None = None) -> None:
        """Raises CarrierError."""
        self._directory = directory
        self.catalog = Catalog.read(directory)

    def reload(self) -> None:
        """Raises CarrierError, and the old one stays. Any thread."""
        self.catalog = Catalog.read(self._directory)
