"""One thread, two epolls: thousands of devices in `bulk`, and the few sockets that measure time in `urgent`.

A broadcast makes thousands of sockets readable at once. A latency taken from one of them would be the time the
load generator needed for those before it, so urgent sockets are looked at after every SLICE of the others: what
they show is late by no more than the handling of one slice, some 0.3 ms.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Final

SLICE: Final = 64
PATIENCE: Final = 60.0

Handler = Callable[[int], None]  # gets the file descriptor


def _nothing(_: int) -> None:
    """Of an fd that was forgotten in this slice."""


class Reactor:
    """`otherwise` is the handler of fds that are watched without one of their own: a table entry, some 150 bytes,
    less for each. It must bear fds that were closed in this slice."""

    def __init__(self, otherwise: Handler = _nothing) -> None:
        self._otherwise = otherwise
        self._bulk = select.epoll()
        self._urgent = select.epoll()
        self._handlers: dict[int, Handler] = {self._urgent.fileno(): self._take_urgent}
        self._bulk.register(self._urgent.fileno(), select.EPOLLIN)

    def close(self) -> None:
        self._urgent.close()
        self._bulk.close()

    def watch(self, fd: int, handler: Handler, *, writable: bool = False, urgent: bool = False) -> None:
        """Have `handler` called while `fd` is readable; `writable`: also while it takes bytes."""
        self._handlers[fd] = handler
        events = select.EPOLLIN | select.EPOLLOUT if writable else select.EPOLLIN
        (self._urgent if urgent else self._bulk).register(fd, events)

    def watch_plainly(self, fd: int, *, writable: bool = False) -> None:
        """For `otherwise`; closing the fd ends it."""
        self._bulk.register(fd, select.EPOLLIN | select.EPOLLOUT if writable else select.EPOLLIN)

    def rewatch_plainly(self, fd: int, *, writable: bool = False) -> None:
        """Another wish."""
        self._bulk.modify(fd, select.EPOLLIN | select.EPOLLOUT if writable else select.EPOLLIN)

    def rewatch(self, fd: int, handler: Handler, *, writable: bool = False, urgent: bool = False) -> None:
        """Another handler, another wish."""
        self._handlers[fd] = handler
        events = select.EPOLLIN | select.EPOLLOUT if writable else select.EPOLLIN
        (self._urgent if urgent else self._bulk).modify(fd, events)

    def forget(self, fd: int) -> None:
        """Before the fd is closed, which takes it out of the epoll."""
        del self._handlers[fd]

    def unwatch(self, fd: int) -> None:
        """The fd stays open."""
        self.forget(fd)
        self._bulk.unregister(fd)

    def turn(self, timeout: float) -> None:
        """Handle a slice of what is ready; wait for it at most `timeout` seconds."""
        ready = self._bulk.poll(0, SLICE)
        if not ready and timeout > 0:
            # epoll counts in milliseconds, select in microseconds: an open-loop schedule needs those.
            select.select([self._bulk], [], [], timeout)
            ready = self._bulk.poll(0, SLICE)
        handlers, otherwise, urgent = self._handlers, self._otherwise, self._urgent.fileno()
        for fd, _ in ready:
            if fd != urgent:
                handlers.get(fd, otherwise)(fd)
        self._take_urgent(urgent)

    def _take_urgent(self, _: int) -> None:
        handlers = self._handlers
        for fd, _events in self._urgent.poll(0, SLICE):
            if fd in handlers:
                handlers[fd](fd)

    def run_until(self, done: Callable[[], bool], what: str, limit: float = PATIENCE) -> None:
        """Raises TimeoutError naming `what` if it does not come true in `limit` seconds."""
        deadline = time.perf_counter() + limit
        while not done():
            if time.perf_counter() > deadline:
                raise TimeoutError(f"{what}: not within {limit:g} s")
            self.turn(0.05)

    def run_for(self, seconds: float) -> None:
        deadline = time.perf_counter() + seconds
        while (left := deadline - time.perf_counter()) > 0:
            self.turn(min(left, 0.05))
