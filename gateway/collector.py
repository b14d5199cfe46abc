"""Python's collector of cyclic garbage, in a process whose event loop thousands of devices wait for.

A look of the collector stops everything for as long as it takes to go through what it looks at, and connections are
long-lived: 15,000 of them are 100,000 objects, some ten milliseconds. But none of them is its business: what a device
leaves behind is freed by reference counts (tests/gateway/test_collector.py). What it does find is young: exceptions
of refused calls, TLS handshakes, HTTP connections that broke. So it looks at each object once, soon after that was
made; what is still in use then is frozen, and looked at no more.

Garbage that was frozen before it became garbage would stay for ever. Therefore, when more than a limit is frozen,
there is a look at everything; the limit is far beyond what a process of a usual size holds.
"""

from __future__ import annotations

import asyncio
import gc
from contextlib import suppress
from time import perf_counter
from typing import Any, Final

from broker.metrics import Metrics

YOUNG: Final = 2_000  # objects made, less those freed, between two looks: one takes about a millisecond
NEVER: Final = 2**31 - 1  # what lived through a look is frozen: there are no older generations
MOST_FROZEN: Final = 2_000_000  # objects, some 200 MB: a peer that makes us freeze garbage gets no further


class Collector:
    """Of the whole process, from `start` on. `most`: frozen objects, from which on all are looked at."""

    def __init__(self, metrics: Metrics, most: int = MOST_FROZEN) -> None:
        pauses = metrics.histograms("gc_pause_seconds", "How long garbage collection stopped all.", "look")
        self._young = pauses.labels("young")
        self._full = pauses.labels("full")
        self._garbage = metrics.counter("gc_garbage_objects", "Objects that only the collector could free.")
        self._loop = asyncio.get_running_loop()
        self._least = self._most = most
        self._frozen = 0  # at most: what was freed since is not known
        self._young_objects = 0
        self._began = 0.0

    def start(self) -> None:
        gc.collect()
        self._freeze()
        gc.set_threshold(YOUNG, NEVER, NEVER)
        gc.callbacks.append(self._called)

    def stop(self) -> None:
        gc.callbacks.remove(self._called)

    def _called(self, phase: str, info: dict[str, Any]) -> None:
        """By the collector, on whichever thread makes objects."""
        if phase == "start":
            self._young_objects = gc.get_count()[0]
            self._began = perf_counter()
            return
        self._young.observe(perf_counter() - self._began)
        self._garbage.value += info["collected"]
        gc.freeze()
        before = self._frozen
        self._frozen += max(self._young_objects - info["collected"], 0)
        if before <= self._most < self._frozen:
            with suppress(RuntimeError):  # the loop is closed: the process ends
                self._loop.call_soon_threadsafe(self._look_at_all)

    def _look_at_all(self) -> None:
        self._frozen = gc.get_freeze_count()
        if self._frozen <= self._most:
            return  # the others were freed
        self.stop()
        began = perf_counter()
        gc.unfreeze()
        self._garbage.value += gc.collect()
        self._freeze()
        self._full.observe(perf_counter() - began)
        self._most = max(self._least, 2 * self._frozen)
        gc.callbacks.append(self._called)

    def _freeze(self) -> None:
        gc.freeze()
        self._frozen = gc.get_freeze_count()
