"""Retained messages for new subscriptions (MQTT5-3.3.1-9), as fast as each subscriber takes them.

A replay is a search that goes on when the subscriber has room, a slice at a time: it costs no queue, drops nothing,
and holds up nobody, however much is retained. One that is not over when the connection ends goes on with the session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from gateway.fanout import SLICE
from gateway.hub import Hub
from gateway.live import SYS
from gateway.mailbox import Entry, Mailbox, Replay, role_of
from gateway.messages import TopicCopy, TopicMessage
from gateway.postman import Postman
from gateway.sys_topics import SysTopics
from gateway.wheel import Clock

if TYPE_CHECKING:
    from gateway.session import Member, Session

NO_IDS: Final[tuple[int, ...]] = ()

Keep = Callable[[Hub, TopicMessage, Sequence[tuple[TopicCopy, Sequence[Mailbox]]]], None]


class Replays:
    def __init__(self, clock: Clock, postman: Postman, sys_topics: SysTopics, keep: Keep) -> None:
        self._clock = clock
        self._postman = postman
        self._sys_topics = sys_topics
        self._keep = keep  # stores a message for durable sessions

    def of(self, hub: Hub, entry: Entry) -> Iterator[Replay | None]:
        """Those that match, and whose source may still publish there. None: ask again later."""
        options, identifier = entry
        if options.filter.startswith(SYS):
            found = self._sys_topics.match(hub, options.filter)
        else:
            found = hub.retained.match(options.filter)
        for message in found:
            if message is None or message.expired(self._clock.now) or not _stands(hub, message):
                yield None
            else:
                yield message, min(message.qos, options.qos), identifier

    def begin(self, mailbox: Mailbox, replays: Mapping[str, Iterator[Replay | None]]) -> None:
        for topic_filter, replay in replays.items():
            if topic_filter in mailbox.subscriptions:
                mailbox.replays[topic_filter] = replay
        if mailbox.replays and mailbox.member is not None:
            mailbox.member.catch_up()

    def go_on(self, hub: Hub, mailbox: Mailbox) -> None:
        """Send the next ones while nothing else waits, the window has room and the socket drains."""
        mailbox.replaying = False
        for _ in range(SLICE):
            session, member = mailbox.session, mailbox.member
            if session is None or member is None or not _ready(mailbox, session, member):
                return
            topic_filter, replay = next(iter(mailbox.replays.items()))
            try:
                found = next(replay)
            except StopIteration:
                _end(mailbox, topic_filter)
                continue
            if found is not None:
                self._send(hub, mailbox, found)
        if mailbox.replays:
            mailbox.replaying = True
            asyncio.get_running_loop().call_soon(self.go_on, hub, mailbox)

    def _send(self, hub: Hub, mailbox: Mailbox, found: Replay) -> None:
        message, qos, identifier = found
        copy = TopicCopy(message, qos, retain=True, subscription_ids=(identifier,) if identifier else NO_IDS)
        if qos and mailbox.log is not None:
            self._keep(hub, message, [(copy, [mailbox])])
        self._postman.hand(mailbox, copy)


def _stands(hub: Hub, message: TopicMessage) -> bool:
    return not message.source or hub.access.may_publish(*role_of(message.source), message.topic)


def _ready(mailbox: Mailbox, session: Session, member: Member) -> bool:
    waiting = mailbox.queue or mailbox.in_flight or mailbox.waits or member.blocked
    return bool(mailbox.replays) and session.room > 0 and not waiting


def _end(mailbox: Mailbox, topic_filter: str) -> None:
    del mailbox.replays[topic_filter]
    if mailbox.log is not None:
        mailbox.log.subscribed(mailbox.subscriptions[topic_filter], owed=False)
