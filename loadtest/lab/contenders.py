"""Who is compared: each has servers of its own, and devices that know what it gives them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal

from loadtest.lab.networks import Network
from loadtest.lab.phones import Login, PhonesSpec
from loadtest.lab.sites import ADDRESSES, PORT, Access, HoldfastSite, MosquittoSite, Site

TOPIC: Final = "push/"  # of mosquitto, a device's name behind it

Letter = Literal["a", "b", "c"]


@dataclass(frozen=True, slots=True)
class Contender:
    letter: Letter
    title: str


CONTENDERS: Final[Mapping[str, Contender]] = {
    one.letter: one
    for one in (
        Contender("a", "holdfast, profiles, SDK"),
        Contender("b", "holdfast, defaults, paho"),
        Contender("c", "mosquitto, paho"),
    )
}


def make_site(letter: str, space: str, directory: Path, edges: int) -> Site:
    match letter:
        case "a":
            return HoldfastSite(space, directory, edges)
        case "b":
            return HoldfastSite(space, directory, edges, settings=only_default(directory.parent))
        case _:
            return MosquittoSite(space, directory, edges)


def only_default(directory: Path) -> dict[str, str]:
    """The setting that leaves a server with nothing but the profile `default`."""
    profiles = directory / "only-default"
    profiles.mkdir(exist_ok=True)
    shutil.copy(str(files("configs") / "carriers" / "default.toml"), profiles)
    return {"HOLDFAST_CARRIERS_DIRECTORY": str(profiles)}


def device_name(network: Network, number: int) -> str:
    return f"{network.name}-{number}"


def phones_spec(letter: str, network: Network, access: Access) -> PhonesSpec:
    logins = tuple(
        Login(name=device_name(network, number), username=access.app_key, password=access.device_key)
        for number in range(network.devices)
    )
    return PhonesSpec(
        kind="sdk" if letter == "a" else "plain",
        servers=tuple(f"{address}:{PORT}" for address in ADDRESSES[: network.addresses]),
        logins=logins,
        network=network.name,
        carrier=network.carrier,
        link=network.link,
        topic=TOPIC if letter == "c" else "",
    )
