"""Ordinary messages to their subscribers: at once where they are few, in slices where they are many.

As for pushes, a slice is bounded by subscribers, and everything else runs between slices (`fanout.py`). Messages of
one topic keep their order: a message waits for the one before it on its topic, and only there (MQTT5-4.6.0-5).

Theory. Messages of one topic that are on their way together go round together, in a *convoy*: the subscribers stand
in a circle, and what arrives while the convoy is under way joins it where it is and leaves when it is back there. So
each subscriber gets all of them in one write, in their order, as with broadcasts. A message whose subscribers are not
the same (somebody subscribed meanwhile) starts the next convoy, which waits for this one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gateway.fanout import SLICE
from gateway.hub import Hub
from gateway.mailbox import Mailbox
from gateway.messages import TopicCopy
from gateway.metrics import NodeMetrics
from gateway.session import Member, Session
from gateway.wheel import Clock

if TYPE_CHECKING:
    from gateway.connection import Connection

MAX_WAITING: Final = (
    100_000  # deliveries: above it, who publishes on is not read from until half of them are done
)
AT_ONCE: Final = 8 * SLICE  # deliveries in one turn of the loop that do not wait for a slice, about 2 ms

Topic = tuple[Hub, str]

log = logging.getLogger(__name__)


class Targets(NamedTuple):
    """The subscribers of a message, and at the same places what each gets."""

    mailboxes: list[Mailbox]
    copies: list[TopicCopy]

    def add(self, mailbox: Mailbox, copy: TopicCopy) -> None:
        self.mailboxes.append(mailbox)
        self.copies.append(copy)


class _Passenger:
    """A message, with the copy for each subscriber of the circle."""

    __slots__ = ("copies", "left")

    def __init__(self, copies: Sequence[TopicCopy]) -> None:
        self.copies = copies
        self.left = len(copies)  # subscribers that are still to get it


class _Convoy:
    __slots__ = ("circle", "passengers", "position")

    def __init__(self, circle: list[Mailbox], passenger: _Passenger) -> None:
        self.circle = circle
        self.position = 0
        self.passengers = [passenger]

    def move(self, most: int) -> tuple[range, list[_Passenger]]:
        """The places of the next subscribers, and who travels there; passengers that have been everywhere leave."""
        passengers, at = self.passengers, self.position
        count = min(most, len(self.circle) - at, *(passenger.left for passenger in passengers))
        self.position = at + count if at + count < len(self.circle) else 0
        for passenger in passengers:
            passenger.left -= count
        self.passengers = [passenger for passenger in passengers if passenger.left]
        return range(at, at + count), passengers


class Postman:
    def __init__(
        self, clock: Clock, metrics: NodeMetrics, spawn: Callable[[Coroutine[Any, Any, None]], None]
    ) -> None:
        self._clock = clock
        self._metrics = metrics
        self.spawn = spawn
        self._convoys: dict[Topic, deque[_Convoy]] = {}
        self._turns: deque[Topic] = deque()  # the same topics
        self._paused: dict[Connection, None] = {}  # in the order they are resumed
        self._gone_now = 0  # deliveries made at once in this turn of the loop
        self.waiting = 0  # deliveries not made yet

    def pauses(self, connection: Connection) -> bool:
        """Whether what it wants to publish must wait: `resume_reading` is called when there is room again."""
        if self.waiting > MAX_WAITING:
            self._paused[connection] = None
            return True
        return False

    def deliver(self, hub: Hub, topic: str, targets: Targets) -> None:
        circle, copies = targets
        if not circle:
            return
        convoys = self._convoys.get((hub, topic))
        if convoys is None and self._may_go_now(len(circle)):
            for mailbox, copy in zip(circle, copies, strict=True):
                self.hand(mailbox, copy)
            return
        self.waiting += len(circle)
        passenger = _Passenger(copies)
        if convoys is None:
            self._convoys[hub, topic] = deque((_Convoy(circle, passenger),))
            self._turns.append((hub, topic))
            if len(self._turns) == 1:
                asyncio.get_running_loop().call_soon(self._turn)
        elif convoys[-1].circle == circle:
            convoys[-1].passengers.append(passenger)
        else:
            convoys.append(_Convoy(circle, passenger))

    def _may_go_now(self, count: int) -> bool:
        """What is delivered at once, in the turn of its publisher, is bounded, too: a publisher may send hundreds of
        messages in one read."""
        if count > SLICE or self._gone_now + count > AT_ONCE:
            return False
        if not self._gone_now:
            asyncio.get_running_loop().call_soon(self._new_turn)
        self._gone_now += count
        return True

    def _new_turn(self) -> None:
        self._gone_now = 0

    def _turn(self) -> None:
        left = SLICE
        while left > 0 and self._turns:
            left -= self._move(self._turns.popleft(), left)
        if self._turns:
            asyncio.get_running_loop().call_soon(self._turn)
        self._resume()

    def _move(self, topic: Topic, most: int) -> int:
        """Take the first convoy of a topic some stops further; how many."""
        convoys = self._convoys[topic]
        convoy = convoys[0]
        places, passengers = convoy.move(most)
        self.waiting -= len(places) * len(passengers)
        circle, copies, alone = convoy.circle, passengers[0].copies, len(passengers) == 1
        for at in places:
            try:
                if alone:
                    self.hand(circle[at], copies[at])
                else:
                    self.hand_all(circle[at], [passenger.copies[at] for passenger in passengers])
            except Exception:  # one message that cannot be sent must not stop the others
                log.exception("a message was not handed over")
        if not convoy.passengers:
            convoys.popleft()
        if convoys:
            self._turns.append(topic)
        else:
            del self._convoys[topic]
        return len(places)

    def _resume(self) -> None:
        while self._paused and self.waiting < MAX_WAITING // 2:
            connection = next(iter(self._paused))
            del self._paused[connection]
            connection.resume_reading()

    def hand(self, mailbox: Mailbox, copy: TopicCopy) -> None:
        """To one subscriber: now, or into its queue."""
        session, member = mailbox.session, mailbox.member
        if session is None or member is None or member.blocked:
            self._leave(mailbox, copy)
            return
        dropped = mailbox.dropped
        frame = session.send_copy(copy, self._clock.now)
        if frame is not None:
            self._metrics.topic_messages.value += 1
            member.send(frame)
        else:
            self._note(session, member, mailbox.dropped - dropped)

    def hand_all(self, mailbox: Mailbox, copies: Sequence[TopicCopy]) -> None:
        """The same for several messages: in one write."""
        session, member = mailbox.session, mailbox.member
        if session is None or member is None or member.blocked:
            for copy in copies:
                self._leave(mailbox, copy)
            return
        dropped, now = mailbox.dropped, self._clock.now
        frames = [frame for copy in copies if (frame := session.send_copy(copy, now)) is not None]
        self._metrics.topic_messages.value += len(frames)
        member.send(b"".join(frames))
        self._note(session, member, mailbox.dropped - dropped)

    def _note(self, session: Session, member: Member, dropped: int) -> None:
        self._metrics.topic_dropped.value += dropped
        if session.held is not None:
            self._metrics.topic_messages.value += len(session.held)
            member.send_held()

    def _leave(self, mailbox: Mailbox, copy: TopicCopy) -> None:
        """For a client that is away or does not read; its session may have ended while the message was on its way."""
        dropped = mailbox.dropped
        if mailbox.over:
            mailbox.done(copy)
        elif copy.qos:
            mailbox.put(copy)
        elif mailbox.session is not None:
            mailbox.dropped += 1  # QoS 0 to a socket that does not drain
        self._metrics.topic_dropped.value += mailbox.dropped - dropped
