"""Real sockets, and what stands for their transports."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

from tests.patience import PATIENCE


async def until(condition: Callable[[], object]) -> None:
    """With what the kernel and timers bring."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - a counter tells nobody
            await asyncio.sleep(0)


class Held:
    """A transport with this socket."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def get_extra_info(self, name: str) -> Any:
        assert name == "socket"
        return self.held


@contextlib.contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection: our end, theirs."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as theirs,
    ):
        ours, _ = listening.accept()
        with ours:
            yield ours, theirs
