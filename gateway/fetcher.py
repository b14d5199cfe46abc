"""Reads inboxes for the connections that are owed something, many at a time.

One loop serves the node: in a reconnect storm the devices' fetches share reads, and at most one batch of pages is
in memory beside the windows (architecture: owed = inbox + broadcasts, window by window).

A read may be faster than the doorbells of what it found, and an older broadcast would then come too late (G3). So
a page waits until the doorbell of its last row has rung: doorbells ring in msg_id order, and so the broadcasts
before it are in the log. Rows from before this node listened have no doorbell to wait for.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from broker.model import OwedRequest, StoredMessage
from broker.store import Store, StoreError
from gateway.hub import Hub
from gateway.live import LivePush
from gateway.metrics import NodeMetrics
from gateway.mqtt import Reason
from gateway.session import Inbox, Session
from gateway.wheel import Clock

if TYPE_CHECKING:
    from gateway.connection import Connection

BATCH: Final = 256  # devices in one read
PAGE: Final = 32  # rows of one device in one read: what a connected device may hold in RAM beyond its window
RETRY_AFTER: Final = 1.0
HOLD: Final = 1.0  # seconds that a page waits for a doorbell, which may be lost (bus B1)

log = logging.getLogger(__name__)


class Fetcher:
    def __init__(self, store: Store, metrics: NodeMetrics, clock: Clock) -> None:
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._since = clock.wall  # when this node began to listen
        self._rung = 0  # the newest msg_id a doorbell brought
        self._waiting: list[Connection] = []
        self._held: list[_Page] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._since = self._clock.wall
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def request(self, connection: Connection) -> None:
        """Have `connection.catch_up` called once a page of its inbox is there."""
        assert connection.session is not None
        connection.session.fetch = Inbox.FETCHING
        self._waiting.append(connection)
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            batch, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
            if not self._waiting:
                self._wake.clear()
            batch = [connection for connection in batch if connection.session is not None]
            try:
                await self._fetch(batch)
            except StoreError as error:
                log.warning("inboxes not read, trying again: %s", error)
                self._waiting = batch + self._waiting
                self._wake.set()
                await asyncio.sleep(RETRY_AFTER)

    async def _fetch(self, batch: list[Connection]) -> None:
        pages = await self._store.fetch_owed([_request(connection) for connection in batch])
        self._metrics.fetches.value += len(batch)
        shared: dict[int, LivePush] = {}  # one object, so one set of frames, for a message to several devices
        for connection, found in zip(batch, pages, strict=True):
            if connection.session is None:
                continue  # gone meanwhile
            page = _Page(connection, connection.session, [_live(message, shared) for message in found])
            if self._early(page):
                self._hold(page)
            else:
                page.hand_over()

    # Pages that were faster than their doorbells

    def rang(self, msg_id: int) -> None:
        """The doorbell of this message was heard, and what it asks for is done."""
        self._rung = max(self._rung, msg_id)
        if self._held:
            held, self._held = self._held, []
            for page in held:
                if self._early(page):
                    self._held.append(page)
                else:
                    page.hand_over()

    def _early(self, page: _Page) -> bool:
        if not page.rows:
            return False
        last = page.rows[-1].message
        return last.msg_id > self._rung and last.created_at >= self._since

    def _hold(self, page: _Page) -> None:
        self._held.append(page)
        asyncio.get_running_loop().call_later(HOLD, self._release, page)

    def _release(self, page: _Page) -> None:
        if page in self._held:
            self._held.remove(page)
            page.hand_over()


@dataclass(frozen=True, slots=True, eq=False)
class _Page:
    """What was read for one device."""

    connection: Connection
    session: Session
    rows: list[LivePush]

    def hand_over(self) -> None:
        if self.connection.session is not self.session:
            return  # gone meanwhile
        Hub.fetched(self.session, self.rows, more=len(self.rows) == PAGE)
        try:
            self.connection.catch_up()
        except Exception:  # a push that cannot be encoded must not stop the inboxes of everybody else
            log.exception("pushes of %.64r not sent", self.connection.client_id)
            self.connection.close("internal error", Reason.UNSPECIFIED_ERROR)


def _request(connection: Connection) -> OwedRequest:
    session, hub = connection.session, connection.hub
    assert session is not None
    assert hub is not None
    return OwedRequest(hub.app.app_id, session.devno, session.newest, PAGE)


def _live(message: StoredMessage, shared: dict[int, LivePush]) -> LivePush:
    push = shared.get(message.msg_id)
    if push is None:
        push = shared[message.msg_id] = LivePush(message)
    return push
