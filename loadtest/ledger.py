"""Who was pushed what, and what came: the load generator's own account, to hold against the server's.

Each push carries a serial, the last eight digits of its alert, so that the fleet needs no JSON to name it.
"""

from __future__ import annotations

import time
from typing import Final

SERIAL_DIGITS: Final = 8
PAYLOAD_SIZE: Final = 100  # bytes on the wire, msg_id included
_FRAME: Final = len('{"msg_id":"","notification":{"alert":""}}')


class BroadcastMarks:
    """One broadcast's arrivals, a byte for each device."""

    __slots__ = ("left", "marks", "targets")

    def __init__(self, devices: int, targets: int) -> None:
        self.marks = bytearray(devices)
        self.targets = targets
        self.left = targets


class Ledger:
    """`repeats` and `strays` (to the wrong device, or never sent) stay 0 unless the server errs."""

    def __init__(self, devices: int, *, first: int = 1) -> None:
        """`first`: the first serial that is given out."""
        self._devices = devices
        self._first = first
        self._last = first - 1
        self.broadcasts: dict[int, BroadcastMarks] = {}
        self.waiting: dict[int, tuple[int, float]] = {}  # serial of a targeted push -> device, due time
        self.arrived = 0
        self.repeats = 0
        self.strays = 0
        self.latencies: list[float] = []  # of targeted pushes, from the due time

    def add_broadcast(self, targets: int) -> int:
        """The serial of a new broadcast to `targets` of the devices."""
        self._last += 1
        self.broadcasts[self._last] = BroadcastMarks(self._devices, targets)
        return self._last

    def add_targeted(self, device: int, due: float = 0.0) -> int:
        self._last += 1
        self.waiting[self._last] = (device, due)
        return self._last

    def take(self, device: int, serial: int) -> None:
        """A push arrived: the fleet's hot path."""
        broadcast = self.broadcasts.get(serial)
        if broadcast is None:
            self.take_targeted(device, serial, time.perf_counter())
        elif broadcast.marks[device]:
            self.repeats += 1
        else:
            broadcast.marks[device] = 1
            broadcast.left -= 1
            self.arrived += 1

    def take_targeted(self, device: int, serial: int, at: float, since: float = 0.0) -> None:
        """A push that is no broadcast arrived, at that time.perf_counter; `since`: when the device was to
        be there."""
        target, due = self.waiting.pop(serial, (-1, 0.0))
        if target == device:
            self.arrived += 1
            self.note(max(due, since), at)
        elif target < 0 and self._first <= serial <= self._last:
            self.repeats += 1
        else:
            self.strays += 1

    def note(self, due: float, at: float) -> None:
        """A targeted push that was due then has arrived."""
        self.latencies.append(at - due)

    def forget(self, serial: int) -> None:
        """This targeted push was not accepted: it must not arrive."""
        self.waiting.pop(serial, None)

    @property
    def missing(self) -> int:
        """Deliveries that have not come."""
        return len(self.waiting) + sum(broadcast.left for broadcast in self.broadcasts.values())

    def errors(self) -> str:
        """What went wrong so far, "" if nothing did."""
        counts = {"repeated": self.repeats, "stray": self.strays}
        return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)


def alert(serial: int, msg_id_digits: int, payload_size: int = PAYLOAD_SIZE) -> str:
    """The text that makes a push's payload `payload_size` bytes long and ends in its serial."""
    width = max(payload_size - _FRAME - msg_id_digits, SERIAL_DIGITS)
    return f"{serial:0{SERIAL_DIGITS}d}".rjust(width, "x")
