"""The pushes of a run: which device is sent what, when. The same for all contenders: it follows from the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from loadtest.lab.networks import Network

SERIAL_DIGITS: Final = 8
MARGIN: Final = 1.0  # seconds before its NAT forgets in which an oracle sends

# Texts of the kind that people get: compressible as those are, no more.
TEXT: Final = (
    "your order has been sent and will arrive on monday between nine and eleven please have the code ready at door "
    "new message from anna see you at the station tonight price of flight to lisbon fell by twelve per cent goal "
    "three two after extra time account balance below limit tap here to read more weather warning heavy rain until"
)
WORDS: Final = tuple(TEXT.split())


@dataclass(frozen=True, slots=True)
class PlannedPush:
    """`at`: seconds after the start. `counted`: its time to the device is."""

    serial: int
    at: float
    device: int
    text: str
    counted: bool


def plan_pushes(network: Network, seed: int, first_serial: int = 1) -> list[PlannedPush]:
    """In the order of their times: each device gets its own Poisson stream."""
    random = Random(f"{seed} {network.name} pushes")
    moments = sorted((at, device) for device in range(network.devices) for at in _moments(network, random))
    return [
        PlannedPush(serial, at, device, _text(serial, random, network.text), at >= network.learn)
        for serial, (at, device) in enumerate(moments, first_serial)
    ]


def _moments(network: Network, random: Random) -> list[float]:
    found = []
    at = random.expovariate(1 / network.every)
    while at < network.seconds:
        found.append(at)
        at += random.expovariate(1 / network.every)
    return found


def _text(serial: int, random: Random, sizes: Sequence[int]) -> str:
    size = random.choice(sizes)
    text = f"{serial:0{SERIAL_DIGITS}d}"
    while len(text) < size:
        text += " " + random.choice(WORDS)
    return text[:size]


def read_serial(text: str) -> int:
    """Raises ValueError."""
    return int(text[:SERIAL_DIGITS])


def oracle_heartbeats(network: Network, pushes: Sequence[PlannedPush]) -> float:
    """Of a device in an hour, on average, which knows when its NAT forgets and sends just before that, but not when
    the next push comes. A NAT that never forgets needs none."""
    if not network.forget:
        return 0.0
    pause = max(network.forget - MARGIN, MARGIN)
    sent = 0
    for device in range(network.devices):
        last = 0.0
        for at in [*(push.at for push in pushes if push.device == device), network.end]:
            sent += int((at - last) / pause)
            last = at
    return sent / network.devices * 3600 / network.end
