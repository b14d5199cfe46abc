"""Moments that a process has in common for all that it does again and again, and with no other process.

To wake a core that sleeps costs more than most of what is done then. So pauses of a quarter of a second and more end
at the same moments, and what is due together is done together.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final

PULSE: Final = 0.25  # seconds between two of these moments: so much earlier may a pause end
GOLDEN: Final = 0.618034  # of whose multiples no two are near each other, less whole numbers


def phase_of(process: int) -> float:
    """Seconds: those of a machine have one clock, and are not all to wake at once."""
    return process * GOLDEN % 1.0 * PULSE


def end_of_pause(now: float, pause: float, phase: float | None = None) -> float:
    """When a pause of so many seconds is over that begins `now`, on the event loop's clock. Never later than asked
    for, and as asked for if it is too short to meet a common moment. `phase`: None is this process's."""
    shift = phase_of(os.getpid()) if phase is None else phase
    common = (now + pause - shift) // PULSE * PULSE + shift
    return common if common > now else now + pause


async def rest(pause: float) -> None:
    now = asyncio.get_running_loop().time()
    await asyncio.sleep(end_of_pause(now, pause) - now)
