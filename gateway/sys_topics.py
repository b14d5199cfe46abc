"""`$SYS/broker/…`: the server's counters as topics, under the names that mosquitto made customary.

They tell of the whole server, whoever's apps it serves, and go to apps whose access rules name them (decision 0009).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Final

from gateway.hub import Hub
from gateway.live import SYS
from gateway.messages import TopicMessage
from gateway.topics import RetainedMessages

VERSION: Final = f"holdfast {version('holdfast')}"
MAX_VALUES: Final = 100  # topics; there are a dozen

Read = Callable[[], Mapping[str, float | str]]  # topic below $SYS/broker/ -> value
Route = Callable[[Hub, TopicMessage], object]


class SysTopics:
    def __init__(self, read: Read, route: Route, interval: float) -> None:
        self._read = read
        self._route = route
        self._interval = interval  # seconds
        self._listeners: set[Hub] = set()
        self._values = RetainedMessages(MAX_VALUES, MAX_VALUES * 1024)
        self._due: float | None = None  # None: the first ones know all there is

    def match(self, hub: Hub, topic_filter: str) -> Iterator[TopicMessage | None]:
        """What a new subscription gets; from now on its app gets all of them, every `interval` seconds."""
        if not self._listeners:
            self._refresh()
            self._due = None
        self._listeners.add(hub)
        return self._values.match(topic_filter)

    def tick(self, now: float) -> None:
        """Publish what has to be told now. Costs nothing while nobody listens."""
        if not self._listeners or (self._due is not None and now < self._due):
            return
        first, self._due = self._due is None, now + self._interval
        if first:
            return
        self._listeners = {hub for hub in self._listeners if hub.subscriptions.below(SYS)}
        for message in self._refresh() if self._listeners else ():
            for hub in self._listeners:
                self._route(hub, message)

    def _refresh(self) -> list[TopicMessage]:
        messages = [
            TopicMessage(f"{SYS}broker/{name}", str(value).encode(), 0)
            for name, value in {"version": VERSION, **self._read()}.items()
        ]
        for message in messages:
            self._values.set(message)
        return messages
