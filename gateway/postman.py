"""Ordinary messages to their subscribers: at once where they are few, in slices where they are many.

As for pushes, a slice is bounded by subscribers, and everything else runs between slices (`fanout.py`). Messages of
one topic keep their order: a message waits for the one before it on its topic, and only there (MQTT5-4.6.0-6).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from gateway.fanout import SLICE
from gateway.hub import Hub
from gateway.mailbox import Mailbox
from gateway.messages import TopicCopy
from gateway.metrics import NodeMetrics
from gateway.wheel import Clock

if TYPE_CHECKING:
    from gateway.connection import Connection

MAX_WAITING: Final = (
    100_000  # deliveries: above it, who publishes on is not read from until half of them are done
)

Target = tuple[Mailbox, TopicCopy]
Topic = tuple[Hub, str]


class _Walk:
    """A message on its way through its subscribers."""

    __slots__ = ("left", "todo")

    def __init__(self, targets: Sequence[Target]) -> None:
        self.todo = iter(targets)
        self.left = len(targets)


class Postman:
    def __init__(
        self, clock: Clock, metrics: NodeMetrics, spawn: Callable[[Coroutine[Any, Any, None]], None]
    ) -> None:
        self._clock = clock
        self._metrics = metrics
        self.spawn = spawn
        self._walks: dict[Topic, deque[_Walk]] = {}
        self._turns: deque[Topic] = deque()  # the same topics
        self._paused: list[Connection] = []
        self.waiting = 0  # deliveries not made yet

    @property
    def full(self) -> bool:
        return self.waiting > MAX_WAITING

    def pause(self, connection: Connection) -> None:
        """It published while `full`, and is not read from; `resume_reading` is called when there is room again."""
        self._paused.append(connection)

    def deliver(self, hub: Hub, topic: str, targets: Sequence[Target]) -> None:
        walks = self._walks.get((hub, topic))
        if walks is None and len(targets) <= SLICE:
            for mailbox, copy in targets:
                self.hand(mailbox, copy)
            return
        self.waiting += len(targets)
        if walks is not None:
            walks.append(_Walk(targets))
            return
        self._walks[hub, topic] = deque((_Walk(targets),))
        self._turns.append((hub, topic))
        if len(self._turns) == 1:
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        topic = self._turns.popleft()
        walks = self._walks[topic]
        try:
            if not self._slice(walks[0]):
                walks.popleft()
        finally:  # one message that cannot be sent must not stop the others
            if walks:
                self._turns.append(topic)
            else:
                del self._walks[topic]
            if self._turns:
                asyncio.get_running_loop().call_soon(self._turn)
        if self._paused and self.waiting < MAX_WAITING // 2:
            paused, self._paused = self._paused, []
            for connection in paused:
                connection.resume_reading()

    def _slice(self, walk: _Walk) -> bool:
        """Hand the message to the next subscribers; whether there may be more."""
        part = list(islice(walk.todo, SLICE))
        walk.left -= len(part)
        self.waiting -= len(part)
        for mailbox, copy in part:
            self.hand(mailbox, copy)
        return walk.left > 0

    def hand(self, mailbox: Mailbox, copy: TopicCopy) -> None:
        """To one subscriber: now, or into its queue."""
        session, member = mailbox.session, mailbox.member
        dropped = mailbox.dropped
        if session is None or member is None:
            if copy.qos:
                self._put(mailbox, copy)
        elif not member.blocked:
            frame = session.send_copy(copy, self._clock.now)
            if frame is not None:
                self._metrics.topic_messages.value += 1
                member.send(frame)
            elif session.held is not None:
                member.send_held()
        elif copy.qos:
            mailbox.put(copy)
        else:
            mailbox.dropped += 1  # QoS 0 to a socket that does not drain
        self._metrics.topic_dropped.value += mailbox.dropped - dropped

    @staticmethod
    def _put(mailbox: Mailbox, copy: TopicCopy) -> None:
        """For an absent client, whose session may have ended while the message was on its way."""
        if mailbox.over:
            mailbox.done(copy)
        else:
            mailbox.put(copy)
