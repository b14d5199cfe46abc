"""The broker: every service behind the public API, on one store and one bus."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from broker.audiences.devices import Devices
from broker.audiences.files import Files
from broker.audiences.segments import Segments
from broker.bus import Bus
from broker.carriers.catalog import Carriers
from broker.carriers.learning import Learning
from broker.dispatch.dispatch import DEFAULT_TTL, Dispatch
from broker.later.pacer import Pacer
from broker.later.schedule_firing import Firing
from broker.later.schedules import Schedules
from broker.later.timekeeper import Timekeeper
from broker.limits import Limits
from broker.metrics import Metrics
from broker.pushing.pushes import Pushes
from broker.pushing.rules import Rules
from broker.pushing.withdrawals import Withdrawals
from broker.store import Store
from broker.telling.accounts import Accounts
from broker.telling.callbacks import Callbacks, CallbackSettings
from broker.telling.reports import Reports
from broker.telling.users import Users
from broker.tenants.apps import Apps
from broker.tenants.audit import Audit
from broker.tenants.groups import GroupPushes, Groups
from broker.tenants.keys import Keys
from broker.tenants.quotas import Quotas
from broker.tenants.rates import RateLimits

Clock = Callable[[], float]


class Broker:
    """`open` starts what works on its own, once the store is open; `close` ends it, before the store is closed.
    `clock` gives Unix seconds."""

    def __init__(
        self,
        store: Store,
        bus: Bus,
        limits: Limits | None = None,
        clock: Clock = time.time,
        callbacks: CallbackSettings | None = None,
        carriers: Carriers | Path | None = None,
        dispatch_ttl: int = DEFAULT_TTL,
    ) -> None:
        self.limits = limits or Limits()
        self.clock = clock
        self.store = store
        self.apps = Apps(store, bus, self.limits)
        self.audit = Audit(store, clock)
        self.keys = Keys(store, self.apps.changed, self.limits, clock)
        self.groups = Groups(store, self.apps, self.limits, clock)
        self.rates = RateLimits(self.limits, clock)
        self.quotas = Quotas(store, self.limits, clock)
        self.devices = Devices(store, bus, self.limits, clock)
        self.segments = Segments(store, self.limits, clock)
        self.files = Files(store, self.limits, clock)
        self.rules = Rules(store, clock)
        self.timekeeper = Timekeeper(store.records, clock)
        self.pacer = Pacer(store, bus, self.timekeeper.wake, self.limits, clock)
        self.pushes = Pushes(store, bus, self.limits, clock, rules=self.rules, quotas=self.quotas)
        self.pushes.on_later = self.timekeeper.wake
        self.withdrawals = Withdrawals(store, bus, self.pacer, self.limits, clock)
        self.schedules = Schedules(store, self.pushes, self.timekeeper.wake, self.limits, clock)
        self.firing = Firing(store, self.pushes, self.limits, clock)
        self.timekeeper.register(self.firing.handlers | self.pacer.handlers | self.files.handlers)
        self.group_pushes = GroupPushes(self.apps, self.pushes, self.rates, self.limits)
        self.reports = Reports(store, self.limits, clock)
        self.accounts = Accounts(store, clock, self.pacer)
        self.users = Users(store, self.limits, clock)
        self.callbacks = Callbacks(store, callbacks, clock)
        self.learning = Learning(
            store.records, clock
        )  # whoever serves devices, or advises them, opens and closes it
        self.dispatch = Dispatch(
            store, self.apps, clock, carriers=carriers, advise=self.learning.heartbeat, ttl=dispatch_ttl
        )

    def count_in(self, metrics: Metrics) -> None:
        """Show in these what happens later."""
        self.timekeeper.count_in(metrics)
        self.firing.counts.count_in(metrics)
        self.pacer.counts.count_in(metrics)
        self.dispatch.count_in(metrics)

    async def open(self) -> None:
        await self.callbacks.open()
        self.timekeeper.open()

    async def close(self) -> None:
        await self.timekeeper.close()
        await self.callbacks.close()
        await self.quotas.close()
        await self.rules.close()
        self.apps.close()
