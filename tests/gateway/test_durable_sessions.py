"""Durable sessions on a running server (decision 0008): what survives when it is stopped, or killed, and started again;
and what the store holds of sessions, which is nothing of those that are over.

A story is a generator: what happens before the restart, `yield`, what happens after. All of them begin together and
share one restart with SIGTERM and one with SIGKILL.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec
import pytest
from pyroaring import BitMap

from clients.local_server import AppKeys, LocalServer
from gateway.journal import COPIES, MESSAGE, SESSION, CopyRow
from gateway.mqtt import (
    Connack,
    Connect,
    Disconnect,
    Properties,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Reason,
    Suback,
    Subscribe,
    Subscription,
    Will,
    decode,
    encode,
)
from tests.conftest import StartServer
from tests.gateway.conformance.talk import (
    leave,
    nothing_waits,
    opened,
    publish,
    short,
    subscribe,
    take,
    take_all,
    unsubscribe,
)
from tests.gateway.peer import PATIENCE, Peer, connect_packet, device, eventually

MANY: Final = 1000
VERSIONS: Final = (4, 5)
STOPS: Final = ("sigterm", "sigkill")


@dataclass(frozen=True, slots=True)
class Scene:
    server: LocalServer
    name: str  # a client id and a first level of topics that no other story uses
    version: int  # of the client whose session it is about
    stop: str

    def client(self, suffix: str = "", **options: Any) -> contextlib.AbstractContextManager[Peer]:
        return device(self.server, self.name + suffix, **{"version": self.version, **options})

    def back(self, suffix: str = "", **options: Any) -> contextlib.AbstractContextManager[tuple[Peer, Connack]]:
        return opened(self.server, self.name + suffix, **{"version": self.version, **options})

    def publish(self, topic: str, *payloads: bytes, qos: int = 1, **options: Any) -> None:
        """By somebody else. When this returns, the server has them."""
        with short(self.server, self.name + "-sender") as sender:
            for payload in payloads:
                publish(sender, f"{self.name}/{topic}", payload, qos, **options)


Story = Generator[None, None, None]
STORIES: Final[dict[str, tuple[Callable[[Scene], Story], Sequence[int]]]] = {}


def story(tell: Callable[[Scene], Story]) -> Callable[[Scene], Story]:
    STORIES[tell.__name__] = (tell, VERSIONS)
    return tell


def story_of_5(tell: Callable[[Scene], Story]) -> Callable[[Scene], Story]:
    """What 3.1.1 cannot say."""
    STORIES[tell.__name__] = (tell, VERSIONS[1:])
    return tell


@dataclass(slots=True)
class Begun:
    rest: Story
    error: BaseException | None = None


@pytest.fixture(scope="module", params=STOPS)
def begun(request: pytest.FixtureRequest, start_server: StartServer) -> Iterator[dict[tuple[str, int], Begun]]:
    """Every story up to its `yield`, with a server that has been stopped and started."""
    server = start_server()
    stories: dict[tuple[str, int], Begun] = {}
    numbers = itertools.count(1)
    for title, (tell, versions) in STORIES.items():
        for version in versions:
            one = Begun(tell(Scene(server, f"s{next(numbers)}", version, request.param)))
            stories[title, version] = one
            try:
                next(one.rest)
            except BaseException as error:  # noqa: BLE001 - raised by its own test
                one.error = error
    if request.param == "sigterm":
        assert server.terminate() == 0
        server.start()
    else:
        server.restart()
    yield stories
    for one in stories.values():
        one.rest.close()


@pytest.mark.parametrize(
    ("title", "version"), [(title, version) for title, (_, versions) in STORIES.items() for version in versions]
)
def test_across_a_restart(begun: dict[tuple[str, int], Begun], title: str, version: int) -> None:
    one = begun[title, version]
    if one.error is not None:
        raise one.error
    with contextlib.suppress(StopIteration):
        next(one.rest)
