"""Changes of durable sessions on their way to the store (decision 0008).

A change is one *item*: an app, a session's number, a kind, which one of it, and its new value. What nobody waits for
is written within LAZY seconds; who waits (`when_saved`) has everything that was noted before written at once, in one
commit with whatever else there is. A write that fails has changed nothing (S2): it is tried again, under what came
later, and those who waited are told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

import msgspec
from pyroaring import BitMap

from broker.model import SessionItem
from broker.store import Store, StoreError
from gateway.mailbox import Entry
from gateway.messages import TopicCopy, TopicMessage
from gateway.metrics import NodeMetrics
from gateway.mqtt import Publish, Subscription, encode
from gateway.wheel import Clock

LAZY: Final = 0.05  # seconds
RETRY_AFTER: Final = 1.0
SHARED: Final = 0  # the session number of what an app's sessions share

# Kinds of items. The first two are shared, by message number; the others belong to a session.
MESSAGE: Final = "m"
COPIES: Final = "c"
SESSION: Final = "s"
SUBSCRIPTION: Final = "f"  # by filter
SENT: Final = "i"  # by packet id
RECEIVED: Final = "r"
WILL: Final = "w"

Key = tuple[int, int, str, int | str]  # app_id, session, kind, item
Then = Callable[[StoreError | None], None]

log = logging.getLogger(__name__)


class Journal:
    """All calls on the event loop's thread."""

    def __init__(self, store: Store, metrics: NodeMetrics, clock: Clock) -> None:
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._noted: dict[Key, bytes | None] = {}
        self._touched: dict[TopicMessage, int] = {}  # whose copies changed -> app_id
        self._waiting: list[Then] = []
        self._writing: list[Then] | None = None  # those who wait for the write under way
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._told = 0.0  # when a failure was logged

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Write what there is."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task

    # Noting

    def note(self, app_id: int, session: int, kind: str, item: int | str, value: bytes | None) -> None:
        """This item has this value now; None: it is gone."""
        self._noted[app_id, session, kind, item] = value
        self._soon()

    def note_message(self, app_id: int, message: TopicMessage) -> None:
        """A message that durable sessions wait for, for the first time; its number is new."""
        self._noted[app_id, SHARED, MESSAGE, message.number] = encode_message(message, self._clock)
        self.touch(app_id, message)

    def touch(self, app_id: int, message: TopicMessage) -> None:
        """Other sessions wait for its copies than before."""
        self._touched[message] = app_id
        self._soon()

    def _soon(self) -> None:
        if self._timer is None and not self._closing:
            self._timer = asyncio.get_running_loop().call_later(LAZY, self._wake.set)

    def drop(self, app_id: int) -> None:
        """Another node is the app's home now, and what is noted here would be refused for ever."""
        self._noted = {key: value for key, value in self._noted.items() if key[0] != app_id}
        self._touched = {message: app for message, app in self._touched.items() if app != app_id}

    def when_saved(self, then: Then) -> None:
        """Call `then` once all that was noted so far is durable, or with why it is not."""
        if self._noted or self._touched:
            self._waiting.append(then)
            self._wake.set()
        elif self._writing is not None:
            self._writing.append(then)
        else:
            then(None)

    async def saved(self) -> None:
        """The same to be awaited. Raises StoreError."""
        done: asyncio.Future[StoreError | None] = asyncio.get_running_loop().create_future()
        self.when_saved(lambda error: None if done.done() else done.set_result(error))
        error = await done
        if error is not None:
            raise error

    # Writing

    async def _run(self) -> None:
        while not self._closing:
            await self._wake.wait()
            self._wake.clear()
            await self._write()
        await self._write()

    async def _write(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        noted = self._take_noted()
        self._writing, self._waiting = self._waiting, []
        error: StoreError | None = None
        if noted:
            try:
                await self._store.save_session_items(
                    [SessionItem(*key, value) for key, value in noted.items()]
                )
            except StoreError as failure:
                error = failure
                self._failed(noted, failure)
        for then in self._writing:  # may grow meanwhile
            self._tell(then, error)
        self._writing = None

    @staticmethod
    def _tell(then: Then, error: StoreError | None) -> None:
        try:
            then(error)
        except Exception:  # what went wrong with one connection is not the others' business
            log.exception("who waited for the journal failed")

    def _take_noted(self) -> dict[Key, bytes | None]:
        for message, app_id in self._touched.items():
            self._note_copies(app_id, message)
        self._touched = {}
        noted, self._noted = self._noted, {}
        return noted

    def _note_copies(self, app_id: int, message: TopicMessage) -> None:
        number = message.number
        message.copies = [copy for copy in message.copies if copy.left]
        if message.copies:
            self._noted[app_id, SHARED, COPIES, number] = encode_copies(message)
            return
        message.number = 0
        row, copies = (app_id, SHARED, MESSAGE, number), (app_id, SHARED, COPIES, number)
        if self._noted.pop(row, None) is None:
            self._noted[row] = self._noted[copies] = None
        else:  # never written: while the store is away, what came and went must not add up
            self._noted.pop(copies, None)

    def _failed(self, noted: dict[Key, bytes | None], error: StoreError) -> None:
        self._noted = noted | self._noted  # what came later stands
        self._metrics.session_errors.value += 1
        now = asyncio.get_running_loop().time()
        if now >= self._told + RETRY_AFTER:  # with traffic there are many a second
            self._told = now
            log.warning("sessions not saved, trying again: %s", error)
        if not self._closing and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(RETRY_AFTER, self._wake.set)


class StoredSession:
    """The log of one durable session: see `gateway.mailbox.SessionLog`."""

    __slots__ = ("_app_id", "_journal", "has_will", "ids", "number")

    def __init__(self, journal: Journal, app_id: int, number: int) -> None:
        self._journal = journal
        self._app_id = app_id
        self.number = number
        self.ids: set[int] = set()  # packet ids the store knows of
        self.has_will = False  # likewise

    def note(self, kind: str, item: int | str, value: bytes | None) -> None:
        self._journal.note(self._app_id, self.number, kind, item, value)

    def subscribed(self, entry: Entry, *, owed: bool) -> None:
        options, identifier = entry
        flags = (options.qos, options.no_local, options.retain_as_published, options.retain_handling)
        self.note(SUBSCRIPTION, options.filter, msgspec.msgpack.encode((*flags, identifier, owed)))

    def unsubscribed(self, topic_filter: str) -> None:
        self.note(SUBSCRIPTION, topic_filter, None)

    def sent(self, packet_id: int, copy: TopicCopy, *, released: bool) -> None:
        self.ids.add(packet_id)
        self.note(SENT, packet_id, msgspec.msgpack.encode((copy.number, released)))

    def completed(self, packet_id: int) -> None:
        if packet_id in self.ids:
            self.ids.discard(packet_id)
            self.note(SENT, packet_id, None)

    def received(self, packet_ids: BitMap) -> None:
        self.note(RECEIVED, 0, packet_ids.serialize() if packet_ids else None)

    def will(self, value: bytes | None) -> None:
        if value is not None or self.has_will:
            self.note(WILL, 0, value)
        self.has_will = value is not None

    def done(self, copy: TopicCopy) -> None:
        if copy.left is not None and self.number in copy.left:
            copy.left.discard(self.number)
            self._journal.touch(self._app_id, copy.message)


# What the store keeps. Times in it are Unix seconds.


class SessionRow(msgspec.Struct, frozen=True, array_like=True):
    key: str
    expiry: int  # seconds
    expires_at: float | None  # None: its client is connected
    next_id: int


class CopyRow(msgspec.Struct, frozen=True, array_like=True):
    """A copy and the sessions that wait for it."""

    number: int
    qos: int
    retain: bool
    subscription_ids: tuple[int, ...]
    share: str  # filter of the shared subscription it came by, or ""
    left: bytes  # bitmap of session numbers


class MessageRow(msgspec.Struct, frozen=True, array_like=True):
    packet: bytes  # MQTT 5
    qos: int
    source: str
    expires_at: float | None


def encode_message(message: TopicMessage, clock: Clock) -> bytes:
    packet = Publish(message.topic, message.payload, retain=message.retain, properties=message.properties)
    expires_at = None if message.expires_at is None else message.expires_at - clock.now + clock.wall
    return msgspec.msgpack.encode(MessageRow(encode(packet, 5), message.qos, message.source, expires_at))


def encode_copies(message: TopicMessage) -> bytes:
    return msgspec.msgpack.encode(
        [
            CopyRow(
                copy.number,
                copy.qos,
                copy.retain,
                copy.subscription_ids,
                copy.share.filter if copy.share else "",
                (copy.left or BitMap()).serialize(),
            )
            for copy in message.copies
        ]
    )


def decode_subscription(topic_filter: str, value: bytes) -> tuple[Entry, bool]:
    """The subscription, and whether its retained messages are still owed."""
    qos, no_local, as_published, handling, identifier, owed = msgspec.msgpack.decode(
        value, type=tuple[int, bool, bool, int, int, bool]
    )
    return (Subscription(topic_filter, qos, no_local, as_published, handling), identifier), owed
