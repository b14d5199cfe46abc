"""What a part of the store does again and again in the background."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from broker.store import StoreError

log = logging.getLogger(__name__)


class Watch:
    """`look` is called every so many `seconds`; of failures one after the other the first is logged: `complaint`."""

    def __init__(self, look: Callable[[], Awaitable[object]], seconds: float, complaint: str) -> None:
        self._look = look
        self._seconds = seconds
        self._complaint = complaint
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        away = False
        while True:
            await asyncio.sleep(self._seconds)
            try:
                await self._look()
                away = False
            except StoreError as error:
                if not away:
                    log.warning("%s: %s", self._complaint, error)
                away = True
