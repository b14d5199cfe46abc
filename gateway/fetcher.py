"""Reads inboxes for the connections that are owed something, many at a time.

One loop serves the node: in a reconnect storm the devices' fetches share reads, and at most one batch of pages is
in memory beside the windows (architecture: owed = inbox + broadcasts, window by window).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from broker.model import OwedRequest, StoredMessage
from broker.store import Store, StoreError
from gateway.hub import Hub
from gateway.live import LivePush
from gateway.metrics import NodeMetrics
from gateway.session import Inbox

if TYPE_CHECKING:
    from gateway.connection import Connection

BATCH: Final = 256  # devices in one read
PAGE: Final = 32  # rows of one device in one read: what a connected device may hold in RAM beyond its window
RETRY_AFTER: Final = 1.0

log = logging.getLogger(__name__)


class Fetcher:
    def __init__(self, store: Store, metrics: NodeMetrics) -> None:
        self._store = store
        self._metrics = metrics
        self._waiting: list[Connection] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
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
        for connection, page in zip(batch, pages, strict=True):
            session = connection.session
            if session is None:
                continue  # gone meanwhile
            pushes = [_live(message, shared) for message in page]
            Hub.fetched(session, pushes, more=len(page) == PAGE)
            connection.catch_up()


def _request(connection: Connection) -> OwedRequest:
    session, hub = connection.session, connection.hub
    assert session is not None
    assert hub is not None
    return OwedRequest(hub.app.app_id, session.devno, session.seen, PAGE)


def _live(message: StoredMessage, shared: dict[int, LivePush]) -> LivePush:
    push = shared.get(message.msg_id)
    if push is None:
        push = shared[message.msg_id] = LivePush(message)
    return push
