"""What the embedded store keeps in memory about each app: its routes, and who may have something waiting. All
of it costs bits or a few bytes for each device, nothing for each waiting copy."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Final

from pyroaring import BitMap

from broker.model import RouteCheck

MIN_EPOCHS: Final = 16  # most apps of a large installation have few devices


class AppState:
    """One app's share. Only the event loop's thread changes it."""

    __slots__ = ("_epochs", "generations", "may_owe", "routed")

    def __init__(self) -> None:
        self.routed = BitMap()
        self.may_owe = BitMap()  # inboxes that are perhaps not empty
        self.generations: dict[int, int] = {}
        self._epochs = array("Q")  # by devno: 8 bytes each

    def claim(self, devno: int, epoch: int) -> bool:
        """Route the device; returns whether it may be owed something."""
        if devno >= len(self._epochs):
            room = max(MIN_EPOCHS, devno + 1 + devno // 8)
            self._epochs.frombytes(bytes(8 * (room - len(self._epochs))))
        self._epochs[devno] = epoch
        self.routed.add(devno)
        return devno in self.may_owe

    def epoch(self, devno: int) -> int:
        """0: it was not claimed since the start."""
        return self._epochs[devno] if devno < len(self._epochs) else 0

    def inspect(self, routes: Mapping[int, int]) -> RouteCheck:
        """`routes`: devno -> epoch of its newest claim, as somebody believes."""
        known = len(self._epochs)
        lost = BitMap(
            [devno for devno, epoch in routes.items() if devno >= known or self._epochs[devno] != epoch]
        )
        return RouteCheck(lost, BitMap(list(routes)) & self.may_owe)

    def release(self, devno: int, epoch: int) -> bool:
        """False: the epoch is not the newest, or was released before (S9)."""
        if devno >= len(self._epochs) or self._epochs[devno] != epoch or devno not in self.routed:
            return False
        self.routed.discard(devno)
        return True


class AppStates:
    """The states of the apps that were used; made when first asked for."""

    def __init__(self) -> None:
        self._states: dict[int, AppState] = {}
        self._fetches = 0  # under way
        self._touched: dict[int, BitMap] = {}  # appended to since the fetches that are under way began

    def __getitem__(self, app_id: int) -> AppState:
        state = self._states.get(app_id)
        if state is None:
            state = self._states[app_id] = AppState()
        return state

    def drop(self, app_id: int) -> None:
        self._states.pop(app_id, None)

    def without_route(self, app_id: int, devnos: BitMap) -> BitMap:
        """Called by the writer thread: one operation under the GIL."""
        state = self._states.get(app_id)
        return devnos - state.routed if state else devnos

    def count_online(self, app_id: int, devnos: BitMap) -> int:
        """How many of them have a route; likewise."""
        state = self._states.get(app_id)
        return int(state.routed.intersection_cardinality(devnos)) if state else 0

    # Who may have something waiting. A bit is set when an append is submitted and again when it is committed;
    # it is cleared by a fetch from the start that found nothing, unless an append was committed since the
    # fetch began: the fetch may have looked before it.

    def load_owed(self, owed: Mapping[int, BitMap]) -> None:
        for app_id, devnos in owed.items():
            self[app_id].may_owe = devnos

    def committed(self, inboxes: Mapping[int, BitMap]) -> None:
        for app_id, devnos in inboxes.items():
            self[app_id].may_owe |= devnos
            if self._fetches:
                self._touched.setdefault(app_id, BitMap()).update(devnos)

    def begin_fetch(self) -> None:
        self._fetches += 1

    def end_fetch(self, nothing: Mapping[int, BitMap]) -> None:
        """`nothing`: devices that were looked up from the start, without a result."""
        self._fetches -= 1
        for app_id, devnos in nothing.items():
            touched = self._touched.get(app_id)
            self[app_id].may_owe -= devnos - touched if touched else devnos
        if not self._fetches:
            self._touched.clear()
