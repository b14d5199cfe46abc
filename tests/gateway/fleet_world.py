"""Several nodes in this process, on one database: each sees the store and the bus as a process of a fleet does.

`SharedStore` is one node's view of a SqliteStore: it has a lease of its own in `Table`, its claims tell who had the
device, and the routes of nodes that do not live do not hold. `SharedBus` is one node's end of a bus that a test can
have lose doorbells, which a node notices at its next beat or `catch_up`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from msgspec.structs import replace

from broker.audiences.devices import Devices
from broker.bus import Doorbell, Missed, Subscriber, Taken
from broker.bus_local import copy_of
from broker.metrics import Metrics
from broker.model import Beat, Claim, NodeEntry, NodeInfo, RouteCheck, Settled
from broker.store import Conflict, Store, StoreUnavailable
from broker.store_sqlite import SqliteStore
from broker.telling.reports import Reports
from gateway.hub import Hub
from gateway.membership import Membership
from gateway.node import Node, NodeSettings
from tests.gateway.world import Phone, World, start_node

LEASE = 10.0


class Table:
    """The nodes of the installation, and who has which device."""

    def __init__(self) -> None:
        self.now = 1000.0  # monotonic, of every node
        self.entries: dict[str, NodeEntry] = {}
        self.routes: dict[tuple[int, int], tuple[str, int]] = {}  # (app_id, devno) -> node, epoch
        self.given = 0

    def is_live(self, name: str) -> bool:
        entry = self.entries.get(name)
        return entry is not None and self.now - entry.beaten_at <= LEASE


class SharedNodes:
    """`broker.store.Nodes` of one node."""

    lease = LEASE

    def __init__(self, table: Table) -> None:
        self._table = table
        self.away = 0  # calls that will fail
        self.beats = 0

    def _call(self) -> None:
        if self.away:
            self.away -= 1
            raise StoreUnavailable("away")

    async def join(self, info: NodeInfo) -> None:
        self._call()
        table = self._table
        if table.is_live(info.name):
            raise Conflict(f"node {info.name} lives")
        table.given += 1
        table.entries[info.name] = NodeEntry(info, table.given, table.now, True)

    async def beat(self, info: NodeInfo) -> Beat:
        self._call()
        self.beats += 1
        lapsed = not self._table.is_live(info.name)
        entry = self._table.entries[info.name]
        self._table.entries[info.name] = replace(entry, info=info, beaten_at=self._table.now)
        return Beat(lapsed, entry.wish)

    async def leave(self) -> None:
        self._call()

    async def list(self) -> list[NodeEntry]:
        self._call()
        entries = sorted(self._table.entries.items())
        return [replace(entry, live=self._table.is_live(name)) for name, entry in entries]

    async def wish(self, name: str, wish: str) -> bool:
        self._table.entries[name] = replace(self._table.entries[name], wish=wish)
        return True


class SharedStore:
    """One node's view."""

    def __init__(self, store: SqliteStore, table: Table, name: str) -> None:
        self._store = store
        self._table = table
        self._name = name
        self.nodes = SharedNodes(table)
        self.away = False
        self.rows_away = False  # live broadcasts alone
        self.settled: list[Settled] = []
        self.rows_read = 0  # times that live broadcasts were

    def __getattr__(self, name: str) -> Any:
        if self.away:
            raise StoreUnavailable("away")
        return getattr(self._store, name)

    def claim_route(self, app_id: int, devno: int, node_id: str, done: Callable[[Claim], None]) -> None:
        former, _ = self._table.routes.get((app_id, devno), ("", 0))

        def claimed(claim: Claim) -> None:
            self._table.routes[app_id, devno] = node_id, claim.epoch
            other = former if former != node_id and self._table.is_live(former) else ""
            done(replace(claim, former=other))

        self._store.claim_route(app_id, devno, node_id, claimed)

    def release_route(self, app_id: int, devno: int, epoch: int, now: float) -> None:
        if self._table.routes.get((app_id, devno), ("", 0))[1] == epoch:
            del self._table.routes[app_id, devno]
        self._store.release_route(app_id, devno, epoch, now)

    async def inspect_routes(self, app_id: int, routes: Mapping[int, int]) -> RouteCheck:
        if self.away:
            raise StoreUnavailable("away")
        return await self._store.inspect_routes(app_id, routes)

    async def live_broadcasts(self, app_id: int) -> Any:
        if self.away or self.rows_away:
            raise StoreUnavailable("away")
        self.rows_read += 1
        return await self._store.live_broadcasts(app_id)

    async def settle(self, settled: Sequence[Settled]) -> None:
        if self.away:
            raise StoreUnavailable("away")
        self.settled += settled
        await self._store.settle(settled)


class Ether:
    """What connects the buses. `lossy` decides whether a doorbell for a node is lost."""

    def __init__(self) -> None:
        self.buses: list[SharedBus] = []
        self.lossy: Callable[[str, Doorbell], bool] = lambda _name, _bell: False


class SharedBus:
    """`broker.bus.Bus` of one node. Doorbells wait until `hear` or `catch_up`."""

    def __init__(self, ether: Ether, name: str) -> None:
        self._ether = ether
        self._name = name
        self._hear: list[tuple[Subscriber, Missed | None]] = []
        self._waiting: list[Doorbell] = []
        self._lost = False
        ether.buses.append(self)

    def ring(self, doorbells: Sequence[Doorbell]) -> None:
        for bus in self._ether.buses:
            for doorbell in doorbells:
                if isinstance(doorbell, Taken) and doorbell.former != bus._name:
                    continue
                if self._ether.lossy(bus._name, doorbell):
                    bus._lost = True
                else:
                    bus._waiting.append(copy_of(doorbell))

    def subscribe(self, subscriber: Subscriber, missed: Missed | None = None) -> Callable[[], None]:
        entry = (subscriber, missed)
        self._hear.append(entry)
        return lambda: self._leave(entry)

    def _leave(self, entry: tuple[Subscriber, Missed | None]) -> None:
        if entry in self._hear:
            self._hear.remove(entry)

    def hear(self) -> None:
        waiting, self._waiting = self._waiting, []
        for subscriber, _ in list(self._hear):
            subscriber(waiting)

    async def catch_up(self) -> None:
        lost, self._lost = self._lost, False
        for _, missed in list(self._hear):
            if lost and missed is not None:
                await missed()
        self.hear()

    async def close(self) -> None:
        pass


class Member:
    """A node with its own ends of store and bus."""

    def __init__(self, world: World, table: Table, ether: Ether, settings: NodeSettings) -> None:
        name = settings.node_id
        self.store = SharedStore(world.store, table, name)
        self.bus = SharedBus(ether, name)
        self.metrics = Metrics()
        self.membership = Membership(self.store.nodes, self.info, self.metrics, now=lambda: table.now)
        self.address = f"{name}.example:1883"
        store = cast("Store", self.store)
        self.node = Node(
            settings,
            store=store,
            bus=self.bus,
            apps=world.apps,
            devices=Devices(store, self.bus, world.limits, world.clock),
            pushes=world.pushes,
            reports=Reports(store, world.limits, world.clock),
            carriers=world.carriers,
            metrics=self.metrics,
            membership=self.membership,
            wall=world.clock,
        )

    def info(self) -> NodeInfo:
        node = self.node
        return NodeInfo(
            node.settings.node_id, address=self.address, connections=node.live, draining=node.draining
        )

    async def recorded(self) -> None:
        self.node.settler.fold()
        await self.node.settler._record()

    def hub(self, app_id: int) -> Hub:
        hub = self.node.hubs.get(app_id)
        assert hub is not None
        return hub


class FleetWorld(World):
    """`nodes[0]` is world.node. Pushes of `push` and `ring` go to all of them, as one turn of the ether."""

    async def build(self, count: int = 2, settings: NodeSettings | None = None) -> FleetWorld:
        """After `open`."""
        await self.node.close()
        self.table, self.ether = Table(), Ether()
        base = settings or NodeSettings("")
        self.nodes = [
            Member(self, self.table, self.ether, dataclasses.replace(base, node_id=f"node-{n + 1}"))
            for n in range(count)
        ]
        for member in self.nodes:
            await member.membership.join()
            start_node(member.node)
        self.node = self.nodes[0].node
        self.bus = cast("Any", self.nodes[0].bus)
        return self

    def connect_at(self, number: int, devno: int, **values: Any) -> Phone:
        """To node `number`, from 0."""
        first, self.node = self.node, self.nodes[number].node
        try:
            return self.connect(devno, **values)
        finally:
            self.node = first

    async def online_at(self, number: int, devno: int, **values: Any) -> Phone:
        phone = self.connect_at(number, devno, **values)
        await phone.until(lambda phone: phone.packets)
        await self.calm()
        return phone

    def ring(self, msg_id: int, *devnos: int, ttl: float = 86_400.0) -> None:
        super().ring(msg_id, *devnos, ttl=ttl)
        self.hear()

    def hear(self) -> None:
        """Whatever is on its way arrives."""
        for member in self.nodes:
            member.bus.hear()

    async def close(self) -> None:
        for member in self.nodes:
            member.store.away, member.store.nodes.away = False, 0
            await member.node.drain(0.0)
            await member.node.close()
            await member.membership.leave()
        self.apps.close()
        await self.store.close()
