"""Connections go to other nodes: all of them when this one stops or is drained, a share after a scale-out.

They are asked at a pace, so that the other nodes are not run over: `drain_rate` a second. MQTT 5 peers are told
where to go, if the others say where devices reach them: 0x9C Use Another Server with a Server Reference, to the node
with the fewest connections. 3.1.1 can only be closed. Whoever has not acknowledged what it was sent goes last, and
MOMENT after it was asked for first: what comes until then is recorded, and need not be sent again.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from broker.logs import log_event
from broker.model import NodeEntry
from broker.store import Nodes, StoreError
from gateway.gate import Appointment
from gateway.mqtt import Properties, Reason

if TYPE_CHECKING:
    from gateway.connection import Connection
    from gateway.node import Node

STEP: Final = 0.05  # seconds between two groups
MOMENT: Final = 0.5  # seconds in which acknowledgements may still come
ASK_LIMIT: Final = 2.0  # seconds that the list of nodes may take
SHARE_OF_LIMIT: Final = 0.7  # of the time that a stop may take, for the asking
ALONE_GROUP: Final = 500  # connections closed in one turn where nobody else can be run over
GATEWAYS: Final = ("all", "gateway")
REBALANCE: Final = (
    "rebalance"  # a wish: rebalance:<percent>, and what makes it differ from the last: rebalance:30:7
)

log = logging.getLogger(__name__)


class Elsewhere:
    """The other nodes that take devices."""

    def __init__(self, entries: Iterable[NodeEntry], own_name: str) -> None:
        others = [entry.info for entry in entries if entry.live and entry.info.name != own_name]
        self.others = [info for info in others if info.role in GATEWAYS and not info.draining]
        self._load = [(info.connections, info.address) for info in self.others if info.address]
        heapq.heapify(self._load)

    def address(self) -> str | None:
        """Where the next one goes; None: nobody says where devices reach them."""
        if not self._load:
            return None
        connections, address = self._load[0]
        heapq.heapreplace(self._load, (connections + 1, address))
        return address


class Handover:
    def __init__(self, node: Node, nodes: Nodes) -> None:
        self._node = node
        self._nodes = nodes
        self._elsewhere = Elsewhere((), "")
        self._going: asyncio.Task[None] | None = None

    # Wishes of the operator

    def wished(self, wish: str) -> None:
        """drain | resume | rebalance:<percent>[:…]. A wish that is not understood changes nothing."""
        word, *numbers = wish.split(":")
        if word == "drain":
            self._node.draining = True
            self._begin(self._drain())
        elif word == "resume":
            self._resume()
        elif word == REBALANCE and numbers and numbers[0].isdecimal() and not self._node.draining:
            self._begin(self._rebalance(min(100, int(numbers[0]))))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self.cancel()
        self._going = asyncio.get_running_loop().create_task(work)
        self._going.add_done_callback(_note_error)

    def cancel(self) -> None:
        """Ask nobody else."""
        if self._going is not None:
            self._going.cancel()
            self._going = None

    def _resume(self) -> None:
        self.cancel()
        self._node.draining = False
        log_event(log, logging.INFO, "resumed", node=self._node.settings.node_id)

    async def _drain(self) -> None:
        """Take nobody in, hand over everybody, keep running."""
        node = self._node
        log_event(log, logging.INFO, "draining", node=node.settings.node_id, connections=node.live)
        while node.connections() or node.arrivals.opening:  # some were being let in
            self._elsewhere = await self._others()
            await self._ask(node.connections(), node.settings.drain_rate)
            await asyncio.sleep(STEP)
        log_event(log, logging.INFO, "drained", node=node.settings.node_id)

    async def _rebalance(self, percent: int) -> None:
        """The least recently active go: they notice least."""
        self._elsewhere = await self._others()
        connections = sorted(self._node.connections(), key=_activity)
        share = connections[: len(connections) * percent // 100]
        log_event(log, logging.INFO, "rebalancing", node=self._node.settings.node_id, connections=len(share))
        await self._ask(share, self._node.settings.drain_rate)

    # A stop

    async def stop(self, limit: float) -> None:
        """Ask everybody to go, within about `limit` seconds: the pace is raised where that needs it."""
        self.cancel()
        node = self._node
        self._elsewhere = await self._others()
        if self._elsewhere.others:
            pace = max(node.settings.drain_rate, len(node.connections()) / max(SHARE_OF_LIMIT * limit, STEP))
            await self._ask(node.connections(), pace, moment=min(MOMENT, limit / 4))
        else:
            await self._shut_down(node.connections(), moment=min(MOMENT, limit / 4))
        for connection in list(node.arrivals.opening):
            connection.close("server shutting down", Reason.SERVER_SHUTTING_DOWN)

    async def _shut_down(self, connections: Sequence[Connection], moment: float) -> None:
        """There is no other node: they come back here, spread over what it takes to let them in."""
        await _acknowledged(connections, moment)
        spread = Appointment(0.0, min(60.0, len(connections) / self._node.arrivals.gate.pace))
        more: Properties = {"user_properties": spread.properties} if spread.retry_jitter >= 1 else {}
        for i, connection in enumerate(connections):
            connection.close("server shutting down", Reason.SERVER_SHUTTING_DOWN, more=more)
            if i % ALONE_GROUP == ALONE_GROUP - 1:  # let writes and closes happen between slices
                await asyncio.sleep(0.002)

    # Asking

    async def _others(self) -> Elsewhere:
        try:
            entries = await asyncio.wait_for(self._nodes.list(), ASK_LIMIT)
        except (StoreError, TimeoutError) as error:
            log.warning("the other nodes are not known: %s", error)
            entries = []
        return Elsewhere(entries, self._node.settings.node_id)

    async def _ask(self, connections: Sequence[Connection], pace: float, moment: float = MOMENT) -> None:
        idle = [connection for connection in connections if not _in_flight(connection)]
        busy = [connection for connection in connections if _in_flight(connection)]
        started = asyncio.get_running_loop().time()
        await self._ask_each(idle, pace)
        if busy:
            await _acknowledged(busy, moment - (asyncio.get_running_loop().time() - started))
            await self._ask_each(busy, pace)

    async def _ask_each(self, connections: Sequence[Connection], pace: float) -> None:
        group = max(1, int(pace * STEP))
        for i, connection in enumerate(connections, 1):
            connection.close("moved", Reason.USE_ANOTHER_SERVER, more=self.reference())
            if i % group == 0:
                await asyncio.sleep(group / pace)

    def reference(self) -> Properties:
        """Where the next one goes, as CONNACK and DISCONNECT tell it."""
        address = self._elsewhere.address()
        return {} if address is None else {"server_reference": address}


async def _acknowledged(connections: Sequence[Connection], moment: float) -> None:
    """Wait until they acknowledged what they were sent, but not longer than that."""
    for _ in range(round(moment / STEP)):
        if not any(map(_in_flight, connections)):
            return
        await asyncio.sleep(STEP)


def _in_flight(connection: Connection) -> bool:
    return connection.session is not None and bool(connection.session.unacked)


def _activity(connection: Connection) -> tuple[bool, float]:
    return _in_flight(connection), connection.last_seen


def _note_error(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("handing over failed", exc_info=error)
