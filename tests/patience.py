"""How long tests wait for what must happen. It costs nothing where it does; a machine with tests may stand still."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

PATIENCE: Final = 60.0  # seconds


async def until(look: Callable[[], object]) -> None:
    """Return when it looks true."""
    deadline = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.01)
