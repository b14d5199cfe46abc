"""Reads inboxes for the connections that are owed something, many at a time.

One loop serves the node: in a reconnect storm the devices' fetches share reads, and at most one batch of pages is
in memory beside the windows (architecture: owed = inbox + broadcasts, window by window).

A read may be faster than the doorbells of what it found, and an older broadcast would then come too late (G3). So
a page waits until the log has the broadcast that its last row comes after (`StoredMessage.after`). Where the store
does not say which that is, it waits until the doorbell of the row itself has rung: doorbells ring in msg_id order,
and so the broadcasts before it are in the log. Rows from before this node listened have no doorbell to wait for. If
neither comes in time, the app is looked up (`sweeper.py`). So it is, at once, for a device that may have been
elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

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
RETRY_AFTER: Final = 1.0
HOLD: Final = 1.0  # seconds that a page waits for a doorbell, which may be lost (bus B1)
HOLD_KNOWN: Final = (
    0.05  # the same for a broadcast that is named: it may be over since before the app was loaded
)

log = logging.getLogger(__name__)


class Look(Protocol):
    """`Sweeper.look`."""

    def __call__(self, hub: Hub, then: Callable[[], None], *, whole: bool = False) -> None: ...


class Fetcher:
    """`sure(session, hub)` is called when the store was asked about a device that may have been elsewhere."""

    def __init__(
        self,
        store: Store,
        metrics: NodeMetrics,
        clock: Clock,
        *,
        look: Look,
        sure: Callable[[Session, Hub], None],
    ) -> None:
        self._look = look
        self._sure = sure
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._since = clock.wall  # when this node began to listen
        self._rung = 0  # the newest msg_id a doorbell brought
        self._waiting: list[Connection] = []
        self._held: dict[Hub, list[_Page]] = {}
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
        requests = [_request(connection) for connection in batch]
        pages = await self._store.fetch_owed(requests)
        self._metrics.fetches.value += len(batch)
        shared: dict[int, LivePush] = {}  # one object, so one set of frames, for a message to several devices
        for connection, request, found in zip(batch, requests, pages, strict=True):
            if connection.session is None:
                continue  # gone meanwhile
            assert connection.hub is not None
            rows = [_live(message, shared) for message in found]
            more = len(rows) == request.limit
            self._take(_Page(connection, connection.session, connection.hub, rows, more))

    def _take(self, page: _Page) -> None:
        if page.session.unsure:
            self._look(page.hub, lambda: self._is_sure(page))
        elif self._early(page):
            self._hold(page)
        else:
            page.hand_over()

    def _is_sure(self, page: _Page) -> None:
        if page.here:
            page.session.unsure = False
            self._sure(page.session, page.hub)
            self._take(page)

    # Pages that were faster than their doorbells

    def rang(self, msg_id: int, hub: Hub | None) -> None:
        """The doorbell of this message was heard, and what it asks for is done. `hub`: of its app, if that is
        loaded."""
        self._rung = max(self._rung, msg_id)
        if hub is not None and self._held:
            for page in self._held.pop(hub, ()):
                if self._early(page):
                    self._held.setdefault(hub, []).append(page)
                else:
                    page.hand_over()

    def _early(self, page: _Page) -> bool:
        if not page.rows:
            return False
        last = page.rows[-1].message
        if last.after >= 0:
            return last.after > page.hub.last_broadcast
        return last.msg_id > self._rung and last.created_at >= self._since

    def _hold(self, page: _Page) -> None:
        self._held.setdefault(page.hub, []).append(page)
        patience = HOLD_KNOWN if page.rows[-1].message.after >= 0 else HOLD
        asyncio.get_running_loop().call_later(patience, self._late, page)

    def _late(self, page: _Page) -> None:
        if page in self._held.get(page.hub, ()):
            self._look(page.hub, lambda: self._release(page), whole=True)

    def _release(self, page: _Page) -> None:
        """The app was looked up after the page was read: all broadcasts before its last row are known, or over."""
        held = self._held.get(page.hub, [])
        if page not in held:
            return
        held.remove(page)
        if not held:
            del self._held[page.hub]
        page.hub.last_broadcast = max(page.hub.last_broadcast, page.rows[-1].message.after)
        page.hand_over()


@dataclass(frozen=True, slots=True, eq=False)
class _Page:
    """What was read for one device."""

    connection: Connection
    session: Session
    hub: Hub
    rows: list[LivePush]
    more: bool  # it is full

    @property
    def here(self) -> bool:
        """The device has not gone meanwhile."""
        return self.connection.session is self.session

    def hand_over(self) -> None:
        if not self.here:
            return
        self.hub.fetched(self.session, self.rows, more=self.more)
        try:
            self.connection.catch_up()
        except Exception:  # a push that cannot be encoded must not stop the inboxes of everybody else
            log.exception("pushes of %.64r not sent", self.connection.client_id)
            self.connection.close("internal error", Reason.UNSPECIFIED_ERROR)


def _request(connection: Connection) -> OwedRequest:
    session, hub = connection.session, connection.hub
    assert session is not None
    assert hub is not None
    return OwedRequest(hub.app.app_id, session.devno, session.newest, Hub.page_size(session))


def _live(message: StoredMessage, shared: dict[int, LivePush]) -> LivePush:
    push = shared.get(message.msg_id)
    if push is None:
        push = shared[message.msg_id] = LivePush(message)
    return push
