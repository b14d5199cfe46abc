"""What is advised of a network although some of its devices misbehave, or somebody forges them.

Theory. An app that drops its connections by mistake, and a stranger who declares a carrier he is not in, look like a
network that forgets; a share of half a percent would be enough. So each silence is counted twice more: in one of
PANELS by the app, and in one of PANELS by the network (/24, /48) that the device comes from. A panel is a fleet of
its own and has findings of its own, and the middle one decides (median of means: Nemirovsky and Yudin 1983). Whoever
is in one panel, an app or an address, moves one opinion of five and not the middle. The two middles must agree,
too: the advice leaves the wish no farther than the one that stays nearer to it.

Who controls devices of most apps, or of very many networks, or makes forty times the silences of all others, is not
stopped here, but by the profile's bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_high, median_low
from typing import Final
from zlib import crc32

from broker.carriers.prefixes import IPV4, pack
from broker.carriers.silences import BINS, Findings, advise, weigh

PANELS: Final = 5  # of each kind; two of them may be wrong
SPOKEN: Final = 1 / 200  # of all trials; with fewer a panel has no opinion: a test holds up nobody
KEYS: Final = 2 * PANELS * 2 * BINS  # at most, in what is counted of one network


def panel_of(address: str) -> int:
    """By the network that a device comes from. `address` may be none."""
    packed = pack(address) or b""
    return crc32(packed[:3] if len(packed) == IPV4 else packed[:6]) % PANELS


def voice_of(app_id: int, panel: int) -> int:
    """Of a device: which two panels it is in. `panel`: by its network."""
    return app_id % PANELS * PANELS + panel


def count_in(panels: dict[int, int], voice: int, silence: int, *, died: bool) -> None:
    """A silence of this bin has ended."""
    by_app, by_source = divmod(voice, PANELS)
    for panel in (by_app, PANELS + by_source):
        key = (2 * panel + died) * BINS + silence
        panels[key] = panels.get(key, 0) + 1


class Silences:
    """Of one network, those of all nodes; weighed by their age. `advise` once nothing is added any more."""

    __slots__ = ("_advice", "_counts", "_findings")

    def __init__(self) -> None:
        self._counts: list[float] = [0.0] * KEYS
        self._findings: list[list[Findings]] = []  # of the panels that have an opinion: by app, by source
        self._advice: dict[tuple[int, int, int], int] = {}

    def add(self, panels: dict[int, int], weight: float) -> None:
        for key, count in panels.items():
            self._counts[key] += weight * count

    def advise(self, wish: int, least: int, most: int) -> int:
        """As broker.carriers.silences.advise."""
        asked = (wish, least, most)
        found = self._advice.get(asked)
        if found is None:
            found = self._advice[asked] = self._settle(*asked)
        return found

    def _settle(self, wish: int, least: int, most: int) -> int:
        if not self._findings:
            panels = [self._counts[at : at + 2 * BINS] for at in range(0, KEYS, 2 * BINS)]
            self._findings = [_opinions(panels[:PANELS]), _opinions(panels[PANELS:])]
        wish = max(least, min(wish, most))
        both = [
            _middle([advise(findings, wish, least, most) for findings in kind], wish)
            for kind in self._findings
        ]
        return _middle(both, wish)


def _opinions(panels: Sequence[Sequence[float]]) -> list[Findings]:
    least = SPOKEN * sum(map(sum, panels))
    return [weigh(panel[:BINS], panel[BINS:]) for panel in panels if any(panel) and sum(panel) >= least]


def _middle(opinions: Sequence[int], wish: int) -> int:
    """Between two middle ones whatever is nearest to the wish."""
    if not opinions:
        return wish
    return sorted((median_low(opinions), wish, median_high(opinions)))[1]
