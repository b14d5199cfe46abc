"""Moments that a process has in common for all that it does again and again. Others of the machine have the same.

To wake a core that sleeps costs more than most of what is done then. So pauses of a quarter of a second and more end
at the same moments, and what is due together is done together.
"""

from __future__ import annotations

import asyncio
from typing import Final

PULSE: Final = 0.25  # seconds between two of these moments: so much earlier may a pause end


def end_of_pause(now: float, pause: float) -> float:
    """When a pause of so many seconds is over that begins `now`, on the event loop's clock. Never later than asked
    for, and as asked for if it is too short to meet a common moment."""
    common = (now + pause) // PULSE * PULSE
    return common if common > now else now + pause


async def rest(pause: float) -> None:
    now = asyncio.get_running_loop().time()
    await asyncio.sleep(end_of_pause(now, pause) - now)
