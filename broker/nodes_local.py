"""The only process of an embedded installation."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf

from broker.model import Beat, NodeEntry, NodeInfo


class OneNode:
    """Implements `broker.store.Nodes` in memory. `clock` gives Unix seconds."""

    lease = inf

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._entry: NodeEntry | None = None
        self._wish = ""

    async def join(self, info: NodeInfo) -> None:
        self._note(info)

    async def beat(self, info: NodeInfo) -> Beat:
        self._note(info)
        return Beat(False, self._wish)

    def _note(self, info: NodeInfo) -> None:
        self._entry = NodeEntry(info, 1, self._clock(), True, self._wish)

    async def leave(self) -> None:
        self._entry = None

    async def list(self) -> list[NodeEntry]:
        return [] if self._entry is None else [self._entry]

    async def wish(self, name: str, wish: str) -> bool:
        if self._entry is None or self._entry.info.name != name:
            return False
        self._wish = wish
        self._note(self._entry.info)
        return True
