"""Doorbells to sockets: targeted pushes at once, broadcasts in slices between which everything else runs.

A slice is bounded by devices, not by time: SLICE writes and the acknowledgements that come back meanwhile make
turns of the event loop of half a millisecond, and a targeted push takes some four turns from its HTTP request to
the socket (architecture, decision 8; with 256 its p99 amid a broadcast was 44 ms, with 32 it is 18, and the
broadcast is as fast: docs/numbers.md). Several broadcasts walk in turn; a device that a walk reaches gets all it
is owed in one write, so the later walk finds nothing left to do there.

Most devices are at rest when a broadcast comes, and owed the same: what they are sent, and what they answer, is made
once (`Flight`), and a device that acknowledges it in one piece never owns a window of its own.

A node of many also gives way to the other processes of its machine: when it had to wait for a core, the walk rests
for much longer, and the core is there for whoever handles a targeted push. A broadcast to 60,000 devices on four
nodes and two cores takes 1.4 s instead of 1.2, and a push amid it 6 ms instead of 59.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from contextlib import suppress
from itertools import islice
from time import perf_counter
from typing import Final

from broker.bus import Broadcast, Recalled, Targeted
from gateway.hub import Hub, Walk
from gateway.live import LivePush
from gateway.metrics import NodeMetrics
from gateway.wheel import Clock

SLICE: Final = 32
SCHEDSTAT = "/proc/thread-self/schedstat"  # ns on a core, ns waited for one, times
PATIENCE: Final = 0.001  # seconds that a slice may wait for a core
REST: Final = (
    20.0  # seconds for each second of that: one long rest lets another node finish, short ones disturb it
)
LONGEST_REST: Final = 0.3
MOST_RESTED: Final = 0.75  # of the time of a walk: others may want the cores for ever


class Fanout:
    def __init__(self, clock: Clock, metrics: NodeMetrics, *, gives_way: bool = False) -> None:
        """`gives_way`: to others that wait for a core."""
        self._clock = clock
        self._metrics = metrics
        self._walks: deque[tuple[Hub, Walk]] = deque()
        self._scheduled = False
        self._load = CoreLoad(asked=gives_way)
        self._sent_broadcast = metrics.sent.labels("broadcast")
        self._sent_targeted = metrics.sent.labels("targeted")
        self._sent_backlog = metrics.sent.labels("backlog")

    @property
    def walking(self) -> int:
        """Broadcasts not yet offered to every online device."""
        return len(self._walks)

    @property
    def left(self) -> int:
        """Devices they are still to be offered to."""
        return sum(walk.left for _, walk in self._walks)

    def count(self, frames: int) -> None:
        """Pushes sent while a connection caught up."""
        self._sent_backlog.value += frames

    def targeted(self, hub: Hub, bell: Targeted) -> None:
        push = LivePush(bell.message)
        for devno in bell.devnos:
            member = hub.members.get(devno)
            if member is None or member.session is None:
                continue
            if member.blocked:
                hub.note_rows(member.session)
                continue
            frames = hub.offer(member.session, push, self._clock)
            if frames:
                self._sent_targeted.value += len(frames)
                member.send(frames[0] if len(frames) == 1 else b"".join(frames))
            if hub.wants_fetch(member.session):
                member.catch_up()

    def broadcast(self, hub: Hub, bell: Broadcast) -> None:
        added = hub.add_broadcast(bell.broadcast)
        if added is not None:
            self._begin(hub, hub.walk(*added))

    def recalled(self, hub: Hub, bell: Recalled) -> None:
        """Those of this app are not sent any more to whom they were not sent yet."""
        for gone in bell.withdrawn:
            push = hub.recall(gone, self._clock.now) if gone.app_id == hub.app.app_id else None
            for _, walk in self._walks:
                if walk.push is push:
                    walk.leave_out(gone.devnos)

    def close(self) -> None:
        self._load.close()

    def _begin(self, hub: Hub, walk: Walk) -> None:
        self._enqueue(hub, walk)
        if not self._scheduled:
            self._scheduled = True
            self._load.begin()
            asyncio.get_running_loop().call_soon(self._turn)

    def _enqueue(self, hub: Hub, walk: Walk) -> None:
        """Walks take turns, those of high priority before all others."""
        if walk.push.message.high:
            self._walks.appendleft((hub, walk))
        else:
            self._walks.append((hub, walk))

    def _turn(self) -> None:
        if rest := self._load.rest():
            asyncio.get_running_loop().call_later(rest, self._go_on)
            return
        hub, walk = self._walks.popleft()
        try:
            if self._slice(hub, walk):
                self._enqueue(hub, walk)
            else:
                walk.push.forget_frames()
        finally:  # one broadcast that cannot be sent must not stop the others
            self._scheduled = bool(self._walks)
            if self._scheduled:
                asyncio.get_running_loop().call_soon(self._turn)

    def _go_on(self) -> None:
        self._load.waited()  # to go on after a rest it waits, too
        self._turn()

    def _slice(self, hub: Hub, walk: Walk) -> bool:
        """Offer the broadcast to the next devices; whether there may be more."""
        members, position, end = hub.members, walk.position, hub.end
        now, wall, msg_id = self._clock.now, self._clock.wall, walk.push.msg_id
        alone: tuple[LivePush, ...] = (walk.push,)
        latest = position + 1 == end  # or newer broadcasts wait, to go in the same write
        sent = visited = 0
        devno = walk.last
        for devno in islice(walk.todo, SLICE):
            visited += 1
            member = members.get(devno)
            if member is None or member.session is None:
                continue
            if member.blocked:
                self._metrics.skipped.value += 1
                continue
            session = member.session
            if session.cursor > position:
                continue  # another walk, or its connect, was here
            if not session.at_rest:
                member.catch_up()  # the long way, which includes this broadcast and those behind it
                continue
            if latest and session.cursor == position and session.sent < msg_id:
                owed = alone
            else:
                owed = hub.owed_broadcasts(session, wall)
            if owed:
                flight = walk.flight(session, owed)
                if flight is None:
                    member.catch_up()
                    continue
                session.depart(flight, now)
                member.send(flight.data)
                sent += len(owed)
            session.cursor = end
        self._sent_broadcast.value += sent
        walk.last = devno
        walk.left -= visited
        return visited == SLICE


class CoreLoad:
    """How long this thread waits for a core, and how long it is to rest therefore. There are no rests where nobody
    asks for them, or the kernel does not tell."""

    __slots__ = ("_asked", "_began", "_file", "_rested", "_waited")

    def __init__(self, *, asked: bool) -> None:
        self._asked = asked
        self._file: int | None = None
        self._waited = self._began = self._rested = 0.0

    def begin(self) -> None:
        """A walk."""
        if self._asked and self._file is None:  # not before: it is of the thread that opens it
            with suppress(OSError):
                self._file = os.open(SCHEDSTAT, os.O_RDONLY | os.O_CLOEXEC)
        self._began, self._rested = perf_counter(), 0.0
        self.waited()

    def waited(self) -> float:
        """Seconds since the last look: ready to run, but no core."""
        if self._file is None:
            return 0.0
        before = self._waited
        self._waited = int(os.pread(self._file, 64, 0).split()[1]) / 1e9
        return self._waited - before

    def rest(self) -> float:
        """Seconds; 0: go on."""
        waited = self.waited()
        if waited <= PATIENCE:
            return 0.0
        most = MOST_RESTED * (perf_counter() - self._began) + LONGEST_REST - self._rested
        rest = max(min(REST * waited, LONGEST_REST, most), 0.0)
        self._rested += rest
        return rest

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
