"""Tells devices where to connect: `answer` for each question, `report` for what they found out.

Answers are made for a carrier, link and region and not for a device, signed, and given to all who ask alike until
what they say has changed or half of their time is over: a storm of devices costs look-ups in a dict. The nodes and
the outcomes are looked at every few seconds, by one of those who ask. While the store is away answers go on as they
were.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from broker.carriers.catalog import Carriers, read_link
from broker.carriers.profile import Address, CarrierProfile, Heartbeat
from broker.dispatch.document import Content, Signed, as_url, compose
from broker.dispatch.outcomes import Outcomes, Tried
from broker.dispatch.ranking import Place, node_urls, places, rank, rank_nodes, variant_of
from broker.dispatch.signing import SigningKey, installation_key
from broker.errors import ApiError
from broker.metrics import Metrics
from broker.store import Store, StoreError
from broker.tenants.apps import Apps

REFRESH: Final = 5.0  # seconds between looks at the nodes, and the age at which an answer is checked
MAX_ANSWERS: Final = 4096  # kept ready, some 1 KB each; more mean many carriers times regions
DEFAULT_TTL: Final = 3600

log = logging.getLogger(__name__)

Clock = Callable[[], float]
Advise = Callable[[CarrierProfile, str], Heartbeat]


@dataclass(frozen=True, slots=True)
class Question:
    """What a device says of itself: "" where it does not. `address`: the caller's. `reached`: which of our addresses
    the device got through to last; only of callers who cannot have forged their own."""

    app: str
    carrier: str = ""
    link: str = ""
    region: str = ""
    address: str = ""
    reached: str = ""


@dataclass(frozen=True, slots=True)
class _View:
    """What an answer depends on beside the profile, the outcomes and the advice."""

    key: SigningKey
    nodes: dict[str, Place]
    seen_at: float


@dataclass(frozen=True, slots=True)
class _Ready:
    signed: Signed
    profile: CarrierProfile
    checked_at: float


def from_profile(profile: CarrierProfile, link: str) -> Heartbeat:
    """Advice of a server that has learned nothing."""
    del link
    return profile.heartbeat


class Dispatch:
    """`carriers`: the profiles, or where to read them once somebody asks. `advise` says which heartbeat a new device
    of a carrier begins with. `clock` gives Unix seconds."""

    def __init__(
        self,
        store: Store,
        apps: Apps,
        clock: Clock = time.time,
        *,
        carriers: Carriers | Path | None = None,
        advise: Advise = from_profile,
        ttl: int = DEFAULT_TTL,
    ) -> None:
        self._store = store
        self._apps = apps
        self._clock = clock
        self._given = carriers
        self._advise = advise
        self._ttl = ttl
        self._view: _View | None = None
        self._looking = asyncio.Lock()
        self._ready: OrderedDict[tuple[str, str, str, int], _Ready] = OrderedDict()  # least used first
        self.outcomes = Outcomes(store.records)
        self.signed = 0

    @cached_property
    def _carriers(self) -> Carriers:
        return self._given if isinstance(self._given, Carriers) else Carriers(self._given)

    def reload(self) -> None:
        """Read the profiles again, if somebody asked before. Raises CarrierError, and the old ones stay. Any thread.
        Where the profiles were given, whoever gave them reads them."""
        if "_carriers" in vars(self):
            self._carriers.reload()

    def count_in(self, metrics: Metrics) -> None:
        metrics.read_counter("dispatch_signed", "Answers of dispatch made and signed.", lambda: self.signed)
        metrics.read_counter(
            "dispatch_reports_taken",
            "Addresses of which a device told how its attempts went.",
            lambda: self.outcomes.taken,
        )
        metrics.read_counter(
            "dispatch_reports_ignored",
            "Such that did not count: the source had told already, or there is no such address.",
            lambda: self.outcomes.ignored,
        )
        metrics.gauge(
            "dispatch_addresses_failing",
            "Addresses to which most attempts of a carrier's devices fail, now.",
            lambda: self.outcomes.failing(self._clock()),
            merge="max",
        )

    async def answer(self, question: Question) -> Signed:
        """Raises ApiError 1008 for an unknown app; lets StoreError pass while there is nothing to answer with."""
        await self._check_app(question.app)
        return await self.compute(question)

    async def compute(self, question: Question) -> Signed:
        """For a device of any app."""
        view = await self._looked()
        profile = self._profile(question)
        if question.reached:
            self._count(profile, question.address, [Tried(question.reached, 1, 0)], view)
        addresses = self._addresses(profile)
        link = question.link and read_link(question.link)
        region = question.region if any(a.region == question.region for a in addresses) else ""
        variant = 0 if addresses else variant_of(question.address)
        slot = (profile.name, link, region, variant)
        now = self._clock()
        ready = self._ready.get(slot)
        if ready is None or ready.profile is not profile or not 0 <= now - ready.checked_at < REFRESH:
            failing = self.outcomes.bands(profile.name, now)
            urls = (
                rank(addresses, region, view.nodes, failing)
                if addresses
                else rank_nodes(view.nodes, failing, variant)
            )
            content = compose(profile, self._advise(profile, link), urls, region, self._ttl)
            ready = self._keep(slot, _Ready(self._renewed(ready, content, view.key, now), profile, now))
        self._ready.move_to_end(slot)
        return ready.signed

    def _renewed(self, ready: _Ready | None, content: Content, key: SigningKey, now: float) -> Signed:
        """What was signed before, where it says the same and holds long enough."""
        if (
            ready is not None
            and ready.signed.content == content
            and ready.signed.key == key.name
            and 0 <= now - ready.signed.made < self._ttl / 2
        ):
            return ready.signed
        self.signed += 1
        return key.sign(content, now)

    def _keep(self, slot: tuple[str, str, str, int], ready: _Ready) -> _Ready:
        self._ready[slot] = ready
        if len(self._ready) > MAX_ANSWERS:
            self._ready.popitem(last=False)
        return ready

    async def report(self, question: Question, tried: Collection[Tried]) -> None:
        """What a device found out. Raises ApiError 1008; lets StoreError pass where nothing was counted."""
        await self._check_app(question.app)
        view = await self._looked()
        self._count(self._profile(question), question.address, tried, view)

    def _count(self, profile: CarrierProfile, caller: str, tried: Collection[Tried], view: _View) -> None:
        known = {as_url(address) for address in self._addresses(profile)} or node_urls(view.nodes)
        self.outcomes.take(profile.name, caller, tried, known, self._clock())

    async def _check_app(self, key: str) -> None:
        if self._apps.peek(key) is None and await self._apps.find(key) is None:
            raise ApiError(1008, f"app: there is no app {key[:40]!r}")

    def _profile(self, question: Question) -> CarrierProfile:
        catalog = self._carriers.catalog
        accepted = catalog.at_accept(question.address, listener="", port=0)
        if not (question.carrier or question.link):
            return accepted
        return catalog.at_connect(accepted, question.carrier, question.link)

    def _addresses(self, profile: CarrierProfile) -> tuple[Address, ...]:
        return profile.addresses or self._carriers.catalog.default.addresses

    async def signing_key(self) -> SigningKey:
        """As it is now: the operator may have changed it. Lets StoreError pass."""
        return await installation_key(self._store.records, self._clock)

    async def _looked(self) -> _View:
        """The nodes as they were at most REFRESH ago; older where somebody else is looking, or the store is away."""
        view = self._view
        if view is not None and (self._looking.locked() or 0 <= self._clock() - view.seen_at < REFRESH):
            return view
        async with self._looking:
            if view is self._view:
                await self._look()
            assert self._view is not None
            return self._view

    async def _look(self) -> None:
        now = self._clock()
        try:
            key = await self.signing_key()
            await self.outcomes.sync(now)
            self._view = _View(key, places(await self._store.nodes.list()), now)
        except StoreError as error:
            if self._view is None:
                raise
            log.warning("dispatch answers with what it knew before: %s", error)
            self._view = replace(self._view, seen_at=now)
