"""The bus between processes: sharded pub/sub of Redis, one channel a node, each message counted.

    ring -> a line for each node: at most one call under way, what comes meanwhile goes together with the next
    channel -> ear: a connection of its own; numbers are compared with the counter that rings raise

A message has the number to which it raised its node's counter, in the same script. So the ear sees a gap at the next
message, and a lost last message when it asks for the counter, which it does over the same connection: whatever was
published before the answer has arrived before it. It asks once a second, and before acknowledgements are recorded
(`catch_up`). After a gap, and after each new subscription, `missed` is awaited before anything later is handed over.
A line that could not send counts one more, so that what was dropped is a gap, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import hiredis

from broker.bus import Broadcast, CredentialsChanged, Doorbell, Missed, Subscriber, Taken
from broker.bus_local import copy_of, hand_over
from broker.model import StoredBroadcast
from broker.redis import bells
from broker.redis.engine import Engine
from broker.redis.keys import of_node
from broker.redis.nodes import RedisNodes
from broker.redis.scripts import load
from broker.redis.wire import Connection, pack
from broker.store import StoreError, StoreUnavailable

log = logging.getLogger(__name__)

CHECK: Final = 1.0  # seconds between two looks at the counter: bounds how long a lost doorbell is not noticed
BACKOFF: Final = (
    0.05,
    1.0,
)  # seconds between two attempts to listen, or to look for what was missed: first, longest
MAX_WAITING: Final = 4 << 20  # bytes that wait for one node: it, or its shard, is away while publishers go on
MAX_MESSAGE: Final = 1 << 20  # bytes of the sequences that go out in one call
MAX_INCOMING: Final = (
    32 << 20
)  # bytes heard and not handed over: a sweep takes long while others go on ringing
COUNTER_LIFETIME: Final = 86_400  # seconds that a dead node's counter is kept
PROLONG: Final = 600  # checks between two prolongations of our own

_ring: Final = load("ring")


@dataclass(slots=True)
class BusStats:
    """Counters for the metrics."""

    rung: int = 0  # sequences published, once for each node
    dropped: int = 0  # sequences that could not be; their nodes see a gap
    heard: int = 0  # messages
    repeated: int = 0  # messages that had been heard before
    missed: int = 0  # times that something was not heard


class RedisBus:
    """Implements `broker.bus.Bus`. It hears once its process has joined the nodes.

    `read_broadcast` reads the rows that are too large for a doorbell; without it all bitmaps are in the doorbells."""

    def __init__(self, engine: Engine, nodes: RedisNodes) -> None:
        self.stats = BusStats()
        self.read_broadcast: bells.ReadBroadcast | None = None
        self._engine = engine
        self._nodes = nodes
        self._lines: dict[int, _Line] = {}
        self._ear = _Ear(engine, self.stats, self._read)
        self._greeting: asyncio.Task[None] | None = None  # rings those that joined lately
        self._closed = False
        self._late: list[tuple[bytes, bool, set[int]]] = []  # what they may not have got, and who has
        nodes.on_number = self._ear.listen
        if nodes.number:
            self._ear.listen(nodes.number)

    # Ringing

    def ring(self, doorbells: Sequence[Doorbell]) -> None:
        if self._closed:
            return
        for doorbell_set, everyone, number in self._addressed(doorbells):
            sequence = self._encode(doorbell_set)
            if number is not None:
                self._line(number).put(sequence)
                continue
            numbers = set(self._nodes.everybody() if everyone else self._nodes.gateways())
            for each in numbers:
                self._line(each).put(sequence)
            self._late.append((sequence, everyone, numbers))
        if self._late and (self._greeting is None or self._greeting.done()):
            self._greeting = asyncio.get_running_loop().create_task(self._greet())

    def _addressed(
        self, doorbells: Sequence[Doorbell]
    ) -> Iterable[tuple[Sequence[Doorbell], bool, int | None]]:
        """(doorbells, do brokers hear them, the only node): each run of doorbells for the same nodes is one call."""
        run: list[Doorbell] = []
        kind: tuple[bool, int | None] = (False, None)
        for doorbell in doorbells:
            number = self._nodes.number_of(doorbell.former) if isinstance(doorbell, Taken) else None
            if number == 0:
                continue  # it does not live, and will look for itself should it wake up
            whose = (isinstance(doorbell, CredentialsChanged), number)
            if run and whose != kind:
                yield run, *kind
                run = []
            kind = whose
            run.append(doorbell)
        if run:
            yield run, *kind

    async def _greet(self) -> None:
        """A process that joined since our last look at the table hears, too, what everybody was told."""
        while self._late:
            late, self._late = self._late, []
            try:
                await self._nodes.refresh()
            except StoreUnavailable as error:
                log.warning("processes that just joined may not hear of a change: %s", error)
                return
            for sequence, everyone, had in late:
                for number in self._nodes.everybody() if everyone else self._nodes.gateways():
                    if number not in had:
                        self._line(number).put(sequence)

    async def ring_nodes(self, numbers: Iterable[int] | None, doorbells: Sequence[Doorbell]) -> None:
        """Returns when they are published. None: to all nodes with devices, those included that joined a moment
        ago. Raises StoreUnavailable: some node was not rung, but will notice."""
        if not doorbells:
            return
        if self._closed:
            raise StoreUnavailable("the bus is closed")
        sequence = self._encode(doorbells)
        told = set(self._nodes.gateways() if numbers is None else numbers)
        published: list[Awaitable[None]] = [self._line(number).publish(sequence) for number in told]
        if numbers is None:
            published.append(self._ring_late(sequence, told))
        for answer in await asyncio.gather(*published, return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer

    async def _ring_late(self, sequence: bytes, told: set[int]) -> None:
        """Nodes that joined since our last look at the table."""
        await self._nodes.refresh()
        late = [number for number in self._nodes.gateways() if number not in told]
        await asyncio.gather(*[self._line(number).publish(sequence) for number in late])

    def _encode(self, doorbells: Sequence[Doorbell]) -> bytes:
        return bells.encode(doorbells, bells.INLINE if self.read_broadcast is not None else MAX_MESSAGE)

    def _line(self, number: int) -> _Line:
        if number not in self._lines:
            self._lines[number] = _Line(self, number)
        return self._lines[number]

    def forget(self, number: int) -> None:
        """Nothing waits for this node."""
        self._lines.pop(number, None)

    def may_hear(self, number: int) -> bool:
        return self._nodes.may_hear(number)

    @property
    def engine(self) -> Engine:
        return self._engine

    # Hearing

    def subscribe(self, subscriber: Subscriber, missed: Missed | None = None) -> Callable[[], None]:
        return self._ear.subscribe(subscriber, missed)

    async def catch_up(self) -> None:
        """Waits while Redis is away. Not to be called by `missed`, which it waits for."""
        await self._ear.catch_up()

    async def _read(self, named: bells.Named) -> StoredBroadcast | None:
        return None if self.read_broadcast is None else await self.read_broadcast(named.app_id, named.msg_id)

    async def flush(self) -> None:
        """Return when what was rung is published, or dropped."""
        if self._greeting is not None:
            await self._greeting
        await asyncio.gather(*[line.flush() for line in tuple(self._lines.values())])

    async def close(self) -> None:
        self._closed = True
        if self._greeting is not None:
            await self._greeting
        await asyncio.gather(*[line.close() for line in tuple(self._lines.values())])
        await self._ear.close()


_Waiting: TypeAlias = tuple[
    bytes, "asyncio.Future[None] | None"
]  # a sequence, and who waits until it is published


class _Line:
    """What waits for one node, in order."""

    def __init__(self, bus: RedisBus, number: int) -> None:
        self._bus = bus
        self._number = number
        self._keys = (of_node(number, "rung"), of_node(number, "bells"))
        self._waiting: deque[_Waiting] = deque()
        self._size = 0
        self._gap = False  # something was lost, and the node does not know it yet
        self._sending: asyncio.Task[None] | None = None
        self._closing = False

    def put(self, sequence: bytes, published: asyncio.Future[None] | None = None) -> None:
        self._waiting.append((sequence, published))
        self._size += len(sequence)
        if self._size > MAX_WAITING:
            self._drop(self._take(self._size), StoreUnavailable("Redis does not take doorbells fast enough"))
        if self._sending is None:
            self._sending = asyncio.get_running_loop().create_task(self._send())

    def publish(self, sequence: bytes) -> asyncio.Future[None]:
        published = asyncio.get_running_loop().create_future()
        self.put(sequence, published)
        return published

    async def close(self) -> None:
        self._closing = True  # what cannot be rung now is left
        await self.flush()

    async def flush(self) -> None:
        if self._sending is not None:
            await self._sending

    async def _send(self) -> None:
        try:
            await self._send_all()
        finally:
            self._drop(self._take(self._size), None)
            self._sending = None
            self._bus.forget(self._number)

    async def _send_all(self) -> None:
        delay, longest = BACKOFF
        while (self._waiting or self._gap) and self._bus.may_hear(self._number):
            batch = self._take(MAX_MESSAGE)
            try:
                await self._call(batch)
                delay = BACKOFF[0]
            except StoreError as error:
                self._drop(batch, error)
                if self._closing:
                    return
                await asyncio.sleep(delay)
                delay = min(2 * delay, longest)

    async def _call(self, batch: Sequence[_Waiting]) -> None:
        gap, self._gap = self._gap, False
        try:
            message = bells.join([sequence for sequence, _ in batch])
            await self._bus.engine.call(_ring, self._keys, (1 + gap, message, COUNTER_LIFETIME))
        except StoreError:
            self._gap = True
            raise
        self._bus.stats.rung += len(batch)
        for _, published in batch:
            if published is not None and not published.done():
                published.set_result(None)

    def _take(self, most: int) -> list[_Waiting]:
        batch: list[_Waiting] = []
        size = 0
        while self._waiting and len(batch) < bells.MAX_SEQUENCES:
            size += len(self._waiting[0][0])
            if batch and size > most:
                break
            batch.append(self._waiting.popleft())
            self._size -= len(batch[-1][0])
        return batch

    def _drop(self, batch: Sequence[_Waiting], error: StoreError | None) -> None:
        """Without an error: the node does not live, there is nobody to be told."""
        self._bus.stats.dropped += len(batch)
        self._gap = self._gap or error is not None
        for _, published in batch:
            if published is None or published.done():
                continue
            if error is None:
                published.set_result(None)
            else:
                published.set_exception(StoreUnavailable(f"a node was not rung: {error}"))


class _Reader(Protocol):
    async def __call__(self, named: bells.Named) -> StoredBroadcast | None: ...


class _Look:
    """Asks for the counter."""

    count = 1

    def __init__(self, ear: _Ear, answer: asyncio.Future[Any]) -> None:
        self._ear, self.answer = ear, answer

    def done(self, answers: list[Any]) -> None:
        answer = answers[0]
        if not isinstance(answer, hiredis.ReplyError):
            self._ear.counted(int(answer or 0))
        if not self.answer.done():
            self.answer.set_result(answer)

    def lost(self, reason: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(ConnectionResetError(reason))


class _Ear:
    """What this process hears. `_seen` is the number up to which the connection brought everything, `_incoming` what
    is not handed over yet; while `_working` runs, nothing else hands over."""

    def __init__(self, engine: Engine, stats: BusStats, read: _Reader) -> None:
        self._engine = engine
        self._stats = stats
        self._read = read
        self._subscribers: list[tuple[Subscriber, Missed | None]] = []
        self._number = 0
        self._connection: Connection | None = None
        self._seen = 0
        self._gap = False  # something was not heard, and `missed` was not awaited since
        self._incoming: deque[bytes] = deque()
        self._incoming_size = 0
        self._working: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()  # there is a subscription
        self._wake = asyncio.Event()  # there is none any more

    @property
    def _counter(self) -> str:
        return of_node(self._number, "rung")

    @property
    def _channel(self) -> str:
        return of_node(self._number, "bells")

    def subscribe(self, subscriber: Subscriber, missed: Missed | None) -> Callable[[], None]:
        entry = (subscriber, missed)
        self._subscribers = [*self._subscribers, entry]
        return lambda: self._unsubscribe(entry)

    def _unsubscribe(self, entry: tuple[Subscriber, Missed | None]) -> None:
        self._subscribers = [other for other in self._subscribers if other is not entry]

    # The subscription

    def listen(self, number: int) -> None:
        """To this node's channel from now on."""
        self._number = number
        self._hang_up()
        if self._listening is None:
            self._listening = asyncio.get_running_loop().create_task(self._stay())

    def _hang_up(self) -> None:
        self._ready.clear()
        self._wake.set()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def close(self) -> None:
        self._number = 0
        for task in (self._listening, self._working):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        connection = self._connection
        self._hang_up()
        self._ready.set()  # nobody waits for more
        if connection is not None:
            await connection.ended()

    async def _stay(self) -> None:
        """Have a subscription, and look at the counter every second."""
        delay, longest = BACKOFF
        checks = 0
        while True:
            try:
                await self._subscribed()
                delay = BACKOFF[0]
                await self._pause(CHECK)
                await self._check()
                checks += 1
                if checks % PROLONG == 0:
                    await self._engine.run("EXPIRE", self._counter, COUNTER_LIFETIME)
            except (StoreError, OSError) as error:
                self._hang_up()
                log.warning("doorbells are not heard: %s", error)
                await asyncio.sleep(delay)
                delay = min(2 * delay, longest)

    async def _subscribed(self) -> None:
        if self._connection is not None and not self._connection.closed:
            if self._engine.master_of(self._counter) in {None, self._connection.address}:
                return
            self._hang_up()  # another server is the master now
        number = self._number
        self._wake.clear()
        connection = await self._engine.listen(self._counter)
        try:
            connection.on_push = self._hear
            connection.on_lost = self._lost
            self._seen = -1  # until the counter is known: then everything before it was missed
            connection.tell(pack(("SSUBSCRIBE", self._channel)))
            await self._count(connection)
        except BaseException:
            connection.close()
            raise
        if number != self._number:
            connection.close()
            raise ConnectionResetError("the process has joined anew")
        self._connection = connection
        self._ready.set()

    def _lost(self, reason: str) -> None:
        self._ready.clear()
        self._wake.set()

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    async def _count(self, connection: Connection) -> None:
        """Read the counter, after everything that was published before. If it was refused that we subscribe, the
        refusal is what is answered here. Raises StoreUnavailable, ConnectionResetError."""
        if connection.closed:
            raise ConnectionResetError("the connection was lost")
        look = _Look(self, asyncio.get_running_loop().create_future())
        connection.send(pack(("GET", self._counter)), look)
        answer = await look.answer
        if isinstance(answer, hiredis.ReplyError):
            self._engine.look_again()
            raise StoreUnavailable(str(answer))

    def counted(self, count: int) -> None:
        """The counter, before anything later is heard."""
        if count != self._seen:
            self._seen = count
            self._note_gap()

    # Gaps

    async def _check(self) -> None:
        """Raises OSError where there is no connection, StoreUnavailable where it is to the wrong server."""
        if self._connection is None:
            raise ConnectionResetError("the connection was lost")
        await self._count(self._connection)

    def _note_gap(self) -> None:
        self._gap = True
        self._stats.missed += 1
        self._incoming.clear()  # what is in them will be found, too
        self._incoming_size = 0
        self._work()

    async def catch_up(self) -> None:
        while self._subscribers:
            if self._number:
                await self._ready.wait()
            if not self._number:
                return  # not joined, or closed
            try:
                await self._check()
            except (StoreError, OSError):
                self._hang_up()
                continue
            while self._working is not None:
                await asyncio.shield(self._working)
            return

    # Handing over

    def _hear(self, push: Sequence[Any]) -> None:
        if push[0] == b"sunsubscribe":  # the slot has moved to another master
            self._hang_up()
            return
        if push[0] != b"smessage" or self._seen < 0:
            return  # before the counter was read: it is among what is looked up then
        number, _, message = push[2].partition(b" ")
        self._stats.heard += 1
        count = int(number)
        if count <= self._seen:
            self._stats.repeated += 1
            return
        whole, self._seen = count == self._seen + 1, count
        if not whole or self._incoming_size > MAX_INCOMING:
            self._note_gap()
        self._incoming.append(message)
        self._incoming_size += len(message)
        if self._working is None:
            self._hand_over()
        if self._incoming:
            self._work()

    def _hand_over(self) -> None:
        """What needs no look into the store."""
        while self._incoming and not self._gap:
            try:
                sequences = bells.decode(self._incoming[0])
            except ValueError:
                log.exception("doorbells that cannot be read")
                self._note_gap()
                return
            if any(isinstance(doorbell, bells.Named) for sequence in sequences for doorbell in sequence):
                return
            self._drop_first()
            self._give(sequences)

    def _drop_first(self) -> None:
        self._incoming_size -= len(self._incoming.popleft())

    def _give(self, sequences: Sequence[Sequence[Any]]) -> None:
        for subscriber, _ in self._subscribers[1:]:
            hand_over(subscriber, [[copy_of(doorbell) for doorbell in one] for one in sequences])
        for subscriber, _ in self._subscribers[:1]:  # last: it gets the originals
            hand_over(subscriber, sequences)

    def _work(self) -> None:
        if self._working is None:
            self._working = asyncio.get_running_loop().create_task(self._catch())

    async def _catch(self) -> None:
        """Look up what was missed and what was only named, then hand over what came meanwhile."""
        try:
            while self._gap or self._incoming:
                if self._gap:
                    self._gap = False
                    await self._miss()
                else:
                    await self._fetch()
                self._hand_over()
        finally:
            self._working = None

    async def _fetch(self) -> None:
        """The first message has a doorbell that names a row."""
        message = self._incoming[0]
        given: list[list[Doorbell]] = []
        try:
            for sequence in bells.decode(message):
                found = [await self._whole(doorbell) for doorbell in sequence]
                given.append([doorbell for doorbell in found if doorbell is not None])
        except StoreError as error:
            log.warning("a broadcast could not be read: %s", error)
            self._note_gap()
            return
        if self._incoming and self._incoming[0] is message:  # else there was a gap meanwhile
            self._drop_first()
            self._give(given)

    async def _whole(self, doorbell: Doorbell | bells.Named) -> Doorbell | None:
        if not isinstance(doorbell, bells.Named):
            return doorbell
        row = await self._read(doorbell)
        return None if row is None else Broadcast(row)

    async def _miss(self) -> None:
        delay, longest = BACKOFF
        for _, missed in self._subscribers:
            while missed is not None:
                try:
                    await missed()
                    break
                except StoreError as error:
                    log.warning("what was missed cannot be looked up yet: %s", error)
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, longest)
                except Exception:
                    log.exception("a bus subscriber failed to look for what it missed")
                    break
