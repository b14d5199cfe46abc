"""The broker: every service behind the public API, on one store and one bus."""

from __future__ import annotations

import time
from collections.abc import Callable

from broker.apps import Apps
from broker.bus import Bus
from broker.devices import Devices
from broker.limits import Limits
from broker.pushes import Pushes
from broker.reports import Reports
from broker.store import Store

Clock = Callable[[], float]


class Broker:
    """`open` starts what works on its own, once the store is open; `close` ends it, before the store is closed.
    `clock` gives Unix seconds."""

    def __init__(
        self, store: Store, bus: Bus, limits: Limits | None = None, clock: Clock = time.time
    ) -> None:
        self.limits = limits or Limits()
        self.clock = clock
        self.store = store
        self.apps = Apps(store, bus, self.limits)
        self.devices = Devices(store, bus, self.limits, clock)
        self.pushes = Pushes(store, bus, self.limits, clock)
        self.reports = Reports(store, self.limits, clock)

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        self.apps.close()
