"""Which of several processes does what only one may do at a time.

A record names the leader, who writes it again at every look; so its version says that the leader is there, and no
clocks are compared. Whoever sees the same version for TAKE_AFTER by its own clock writes its name there, from that
version, so only one succeeds (S12). A leader whose last writing began LEASE ago leads no more, by its own clock:
before anybody else can lead.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import Final

from broker.model import RecordChange
from broker.store import Conflict, Records, StoreError

log: Final = logging.getLogger(__name__)

KIND: Final = "lead"
INSTALLATION: Final = 0  # what belongs to no app
LOOK_EVERY: Final = 3.0  # seconds
LEASE: Final = 9.0
TAKE_AFTER: Final = 12.0


class Lead:
    """`name` is this process's: no other live one has it, and one that starts anew goes on at once. `clock` is
    monotonic."""

    def __init__(
        self, records: Records, key: str, name: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._records = records
        self._key = key
        self._name = name.encode()
        self._clock = clock
        self._version = -1  # that was seen last
        self._seen_at = -inf  # when it was seen first
        self._until = -inf

    @property
    def held(self) -> bool:
        return self._clock() < self._until

    async def look(self) -> bool:
        """Take it, keep it, or see that another has it; whether it is held. To be called every LOOK_EVERY."""
        try:
            await self._look()
        except Conflict:
            self._until = -inf
        except StoreError as error:
            log.warning("cannot see who leads %s: %s", self._key, error)
        return self.held

    async def release(self) -> None:
        """Another may take it at once."""
        if self.held:
            with suppress(StoreError):  # then it takes TAKE_AFTER
                await self._write(b"")
        self._until = -inf

    async def _look(self) -> None:
        now = self._clock()
        record = await self._records.find(INSTALLATION, KIND, self._key)
        leader, version = (b"", 0) if record is None else (record.value, record.version)
        if version != self._version:
            self._version, self._seen_at = version, now
        if leader in (b"", self._name) or now >= self._seen_at + TAKE_AFTER:
            await self._write(self._name)
            self._until = now + LEASE
        else:
            self._until = -inf

    async def _write(self, name: bytes) -> None:
        change = RecordChange(INSTALLATION, KIND, self._key, name, self._version)
        (self._version,) = await self._records.save([change])
