"""A fleet in one thread, with one clock that a scheduler turns: what happens next is decided by a seed.

Each process has an event loop of its own, so that it can be stopped for a while and killed while the others go on.
Its connections to Redis are the real ones of `broker/redis/wire.py` over a network of ours; behind that stands a real
redis-server, which is asked at the very moment at which the bytes arrive. So the scripts are the real ones, too.

What the network may do to a connection to Redis: delay it; cut it (what was on its way to Redis may still arrive,
later than what is sent over the next connection); drop or repeat pushes of the bus. What is for different shards of
a Cluster overtakes each other. TTLs run in real time; a run takes milliseconds of it, so nothing that matters may
hang on one.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import re
import socket
import threading
import zlib
from asyncio import events
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final, cast

import hiredis

START: Final = 1_800_000_000.0
LATENCY: Final = (0.0002, 0.001)  # seconds, one way
RETRANSMIT: Final = 0.2  # seconds after a cut network is whole until TCP tries again
SHARDS: Final = 3
NODES_TABLE: Final = b"{nodes}:table"
OF_THE_DEAD: Final = "carried out late, of a killed process"
INFINITE: Final = float("inf")
_NOTHING: Final = object()
_PUBLISHING: Final = re.compile(rb"PUBLISH", re.IGNORECASE)


class _NoSelector:
    def select(self, _timeout: float | None) -> list[Any]:
        return []

    def close(self) -> None:
        pass


class Loop(asyncio.BaseEventLoop):
    """The event loop of one process: `step` runs what is due now."""

    def __init__(self, machine: Machine, process: Process) -> None:
        super().__init__()
        self._selector = _NoSelector()
        self._machine = machine
        self._process = process
        self.errors: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _loop, context: self.errors.append(context))

    def time(self) -> float:
        return self._machine.now

    def _process_events(self, _event_list: Any) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def next_time(self) -> float:
        if self._ready:  # type: ignore[attr-defined]
            return self._machine.now
        scheduled = self._scheduled  # type: ignore[attr-defined]
        while scheduled and scheduled[0]._cancelled:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            self._timer_cancelled_count -= 1  # type: ignore[attr-defined]
        return cast("float", scheduled[0]._when) if scheduled else INFINITE

    def step(self) -> None:
        self._thread_id = threading.get_ident()
        events._set_running_loop(self)
        try:
            self._run_once()  # type: ignore[attr-defined]
        finally:
            events._set_running_loop(None)
            self._thread_id = None

    async def create_connection(self, factory: Any, host: Any = None, port: Any = None, **_more: Any) -> Any:
        protocol = factory()
        return await self._machine.dial(self._process, protocol), protocol

    async def shutdown_default_executor(self, _timeout: float | None = None) -> None:
        pass


@dataclass(eq=False)
class Process:
    """`stopped` until a time (SIGSTOP); `cut` off from Redis until a time; `skew` of its wall clock. `due`: when its
    loop has something to do."""

    machine: Machine
    name: str
    skew: float = 0.0
    alive: bool = True
    due: float = INFINITE
    stopped: float = 0.0
    cut: float = 0.0
    links: list[Link] = field(default_factory=list)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    loop: Loop = field(init=False)

    def __post_init__(self) -> None:
        self.loop = Loop(self.machine, self)

    def wall(self) -> float:
        return START + self.machine.now + self.skew

    def inject(self, callback: Callable[..., object], *arguments: Any) -> None:
        """From outside: on the loop's next turn, if it lives."""
        if self.alive:
            self.loop.call_soon(callback, *arguments)
            self.due = self.machine.now

    def step(self) -> None:
        self.loop.step()
        self.due = self.loop.next_time() if self.alive else INFINITE

    def kill(self) -> None:
        """SIGKILL. What its kernel had sent arrives."""
        if self.alive:
            self.alive = False
            self.due = INFINITE
            for link in list(self.links):
                link.abandon()
            self.loop.close()


@dataclass(slots=True)
class _Asked:
    request: list[bytes]
    answer: bytes | None = None


class Link(asyncio.Transport):
    """One connection to Redis, as its process sees it; behind it a socket that only blocks."""

    def __init__(self, machine: Machine, process: Process, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._machine, self.process, self._protocol = machine, process, protocol
        self._socket = machine.redis.connect()
        self._requests = hiredis.Reader(notEnoughData=_NOTHING)
        self._answers = hiredis.Reader(notEnoughData=_NOTHING)
        self._sent = [0.0] * SHARDS  # when the last request arrives: what is sent later arrives later
        self._answered = 0.0  # likewise
        self._asked: deque[_Asked] = deque()
        self.flying = 0  # requests on their way
        self._lost: set[int] = set()  # shards to which nothing gets through any more
        self.over = False  # for the process
        process.links.append(self)
        machine.links.append(self)

    # As the process uses it

    def write(self, data: Any) -> None:
        """Requests to different shards of a Cluster overtake each other: nobody may rely on more than the order
        within one slot. Answers come in the order of the requests all the same."""
        if self.over:
            return
        machine = self._machine
        self._requests.feed(bytes(data))
        while (request := self._requests.gets()) is not _NOTHING:
            shard = zlib.crc32(_tag(request)) % SHARDS
            whole = machine.whole(self.process)
            self._sent[shard] = max(self._sent[shard], machine.now + machine.latency(), whole)
            self.flying += 1
            asked = _Asked(request)
            self._asked.append(asked)
            machine.at(self._sent[shard], self._arrive, asked, shard)

    def is_closing(self) -> bool:
        return self.over

    def get_extra_info(self, _name: str, default: Any = None) -> Any:
        return default

    def close(self) -> None:
        self.abort()

    def finish(self) -> None:
        """The run is over."""
        self.over = True
        self.flying = 0
        self._hang_up()

    def abort(self) -> None:
        if not self.over:
            self.over = True
            self.process.inject(self._protocol.connection_lost, None)
            self._drop()

    def cut(self, reason: str) -> None:
        """The network, or the server, ended it."""
        if not self.over:
            self.over = True
            self.process.inject(self._protocol.connection_lost, ConnectionResetError(reason))
            self._drop()

    def abandon(self) -> None:
        self.over = True
        self._drop()

    def _drop(self) -> None:
        with suppress(ValueError):
            self.process.links.remove(self)
        if not self.flying:
            self._hang_up()

    def _hang_up(self) -> None:
        self._machine.redis.forget(self)
        self._socket.close()

    # On the side of Redis

    def _arrive(self, asked: _Asked, shard: int) -> None:
        self.flying -= 1
        machine = self._machine
        if self.over and machine.dice.random() < machine.lost_in_flight:
            self._lost.add(shard)  # and what was sent after it
        if machine.down or shard in self._lost:
            machine.note("lost in flight")
        else:
            if self.over:
                machine.note("carried out late" if self.process.alive else OF_THE_DEAD)
            self._exchange(asked)
        if self.over and not self.flying:
            self._hang_up()

    def _exchange(self, asked: _Asked) -> None:
        """Have Redis carry it out, now."""
        machine, request = self._machine, asked.request
        if request[0] in {b"SSUBSCRIBE", b"SUBSCRIBE"}:
            machine.redis.listeners.append(self)
        if request[3:4] == [NODES_TABLE]:  # leases run by the clock of Redis, which is ours
            request[5] = repr(START + machine.now).encode()
        data = hiredis.pack_command(tuple(request))
        self._socket.sendall(data)
        received, owed = b"", 1
        while owed:
            piece = self._socket.recv(1 << 20)
            assert piece, "Redis hung up"
            received += piece
            self._answers.feed(piece)
            while (answer := self._answers.gets()) is not _NOTHING:
                owed -= type(answer) is not hiredis.PushNotification or _confirms(answer)
        machine.redis.published(data)
        asked.answer = received
        while self._asked and self._asked[0].answer is not None:
            self._answer(self._asked.popleft().answer or b"")

    def _answer(self, data: bytes) -> None:
        machine = self._machine
        if not self.over:
            self._answered = max(self._answered, machine.now + machine.latency(), machine.whole(self.process))
            machine.at(self._answered, self._deliver, data)

    def pushed(self) -> None:
        """Take what the bus has for it."""
        try:
            data = self._socket.recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        self._answers.feed(data)
        while self._answers.gets() is not _NOTHING:
            pass
        for copy in self._machine.tampered(data):
            self._answer(copy)

    def _deliver(self, data: bytes) -> None:
        if not self.over:
            self.process.inject(self._hand_over, data)

    def _hand_over(self, data: bytes) -> None:
        if not self.over:
            self._protocol.data_received(data)


def _tag(request: list[bytes]) -> bytes:
    """What decides the slot: the hash tag of the first key."""
    script = request[0] in {b"EVAL", b"EVALSHA"}
    key = request[3] if script and len(request) > 3 else request[1] if len(request) > 1 else b""
    return key.partition(b"{")[2].partition(b"}")[0] or key


def _confirms(push: Any) -> bool:
    """The answer to a subscription is a push."""
    return push[0] in {b"ssubscribe", b"subscribe", b"unsubscribe", b"sunsubscribe"}


class RedisBehind:
    """The real server, behind a Unix socket. Pushes come by other sockets than the answer to what caused them: they
    are there when a PING that was sent after that answer is answered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listeners: list[Link] = []
        self._control = self.connect()
        self._publishing: set[bytes] = set()

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(self.path))
        except OSError:
            sock.close()
            raise
        return sock

    def close(self) -> None:
        self._control.close()

    def command(self, *words: str) -> Any:
        self._control.sendall(hiredis.pack_command(words))
        reader = hiredis.Reader(notEnoughData=_NOTHING)
        while (answer := reader.gets()) is _NOTHING:
            reader.feed(self._control.recv(1 << 20))
        return answer

    def published(self, data: bytes) -> None:
        if self.listeners and self._publishes(data):
            self.command("PING")
            for link in list(self.listeners):
                link.pushed()

    def _publishes(self, data: bytes) -> bool:
        if _PUBLISHING.search(data):
            return True
        return any(sha in data for sha in self._publishing)

    def learn(self, sources: Iterator[tuple[str, str]]) -> None:
        """All scripts: (sha, source). Redis knows them from the beginning: on the way to it an EVALSHA may overtake
        the EVAL that it relies on, which cannot happen where each shard has a connection of its own."""
        for sha, source in sources:
            self.command("SCRIPT", "LOAD", source)
            if "PUBLISH" in source:
                self._publishing.add(sha.encode())

    def forget(self, link: Link) -> None:
        with suppress(ValueError):
            self.listeners.remove(link)


class Machine:
    """`at` plans, `run` lets time go on to the next thing that happens, whoever's it is."""

    def __init__(self, redis: RedisBehind, dice: Random) -> None:
        self.redis = redis
        self.dice = dice
        self.now = 0.0
        self.processes: list[Process] = []
        self.links: list[Link] = []
        self.down = False  # Redis is away
        self.slow = 0.0  # seconds that are added to a latency, at most
        self.lost_in_flight = 0.5  # of what a cut connection still carried
        self.tampering = 0.0  # share of the pushes of the bus that are dropped, repeated or late
        self.counts: dict[str, int] = {}
        self._plan: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    def note(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def at(self, time: float, call: Callable[..., object], *arguments: Any) -> None:
        heapq.heappush(self._plan, (max(time, self.now), next(self._numbers), call, arguments))

    def after(self, seconds: float, call: Callable[..., object], *arguments: Any) -> None:
        self.at(self.now + seconds, call, *arguments)

    def run(self, until: float) -> None:
        while True:
            time, who = self._next()
            if time > until:
                break
            self.now = max(self.now, time)
            if who is None:
                _, _, call, arguments = heapq.heappop(self._plan)
                call(*arguments)
            else:
                who.step()
        self.now = until

    def _next(self) -> tuple[float, Process | None]:
        best: list[Process | None] = [None]
        time = self._plan[0][0] if self._plan else INFINITE
        for process in self.processes:
            due = process.due
            if due > time:
                continue
            if due < process.stopped:
                due = process.stopped
                if due > time:
                    continue
            if due < time:
                time, best = due, []
            best.append(process)
        return time, best[0] if len(best) == 1 else self.dice.choice(best)

    # The network

    def latency(self) -> float:
        slow = self.slow * self.dice.random() ** 4 if self.slow else 0.0
        return self.dice.uniform(*LATENCY) + slow

    def whole(self, process: Process) -> float:
        """When what is sent now may pass."""
        return process.cut + RETRANSMIT if process.cut > self.now else 0.0

    async def dial(self, process: Process, protocol: asyncio.Protocol) -> Link:
        await asyncio.sleep(max(self.latency(), self.whole(process) - self.now))
        if self.down:
            raise ConnectionRefusedError("connection refused")
        link = Link(self, process, protocol)
        protocol.connection_made(link)
        return link

    def tampered(self, push: bytes) -> list[bytes]:
        """What arrives of it."""
        if self.dice.random() >= self.tampering:
            return [push]
        kind = self.dice.choice(("dropped", "repeated"))
        self.note(f"push {kind}")
        return [] if kind == "dropped" else [push, push]

    def close(self) -> None:
        """The end of all processes."""
        for process in self.processes:
            process.kill()
        for link in self.links:
            link.finish()

    def stop_redis(self, seconds: float) -> None:
        """Killed and started anew: all connections end, what was written stays."""
        self.down = True
        self.note("redis killed")
        for process in self.processes:
            for link in list(process.links):
                link.cut("the server has gone")
        self.after(seconds, self._start_redis)

    def _start_redis(self) -> None:
        self.down = False
