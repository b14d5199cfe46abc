"""How one device gets to a server: its addresses, dispatch, and what became of each attempt. The asyncio shell around
`clients.addresses` and `clients.dispatch`; it has a task only while it opens a connection, asks or reports."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final

from clients.addresses import Address, AddressBook, Hints, Race, greeting_limit
from clients.dispatch import Dispatch, Told, ask, tell
from clients.reach import L, News, open_first

SUSPICION: Final = (
    0.2  # of the stagger: where a connection just died without a word, the next address is near
)


class Approach:
    """`own`: the app's addresses, after those of dispatch, which is asked at `doors`. `secret`: only addresses with
    TLS are used. `clock` gives Unix seconds. `on_answer` is called when dispatch has answered."""

    __slots__ = (
        "_asking",
        "_book",
        "_clock",
        "_dispatch",
        "_doors",
        "_on_answer",
        "_own",
        "_race",
        "_secret",
        "_suspicious",
        "_telling",
        "_unspoken",
        "at",
        "greet_by",
    )

    def __init__(
        self,
        own: Sequence[Address],
        hints: Hints,
        dispatch: Dispatch | None,
        doors: Sequence[str],
        *,
        secret: bool,
        clock: Callable[[], float],
        on_answer: Callable[[], None],
    ) -> None:
        self.at: Address | None = None  # of the connection that is there
        self.greet_by: float | None = None  # by the loop's clock: another address is tried then
        self._own = tuple(own)
        self._book = AddressBook(own, hints, counting=dispatch is not None)
        self._dispatch = dispatch
        self._doors = tuple(doors)
        self._secret = secret
        self._clock = clock
        self._on_answer = on_answer
        self._race: Race | None = None
        self._unspoken = 0  # connections in a row on which nobody spoke
        self._suspicious = False  # the last one died without a word, or nobody spoke on it
        self._asking: News | None = None
        self._telling: asyncio.Future[bool] | None = None

    @property
    def hints(self) -> Hints:
        return self._book.hints

    @property
    def alternatives(self) -> bool:
        """There is more than one address."""
        return len(self._book.addresses) > 1

    @property
    def told(self) -> Told | None:
        """What dispatch said of this network."""
        return None if self._dispatch is None else self._dispatch.told

    # The network

    def enter(self, network: str, kept: object, *, link: str, carrier: str) -> None:
        """The device is on this network now. `kept`: what `state` said there."""
        self._unspoken, self._suspicious = 0, False
        self._race = None  # what it found out is about the one before
        self._book.enter(kept)
        if self._asking is not None:
            self._asking.cancel()  # the answer would be, too
            self._asking = None
        if self._dispatch is not None:
            self._dispatch.enter(network, carrier=carrier, link=link)
            self._heed(self._dispatch)

    def state(self) -> dict[str, Any]:
        """What is known of this network, for JSON."""
        return self._book.state()

    # Opening

    async def open(self, first: Iterable[Address], connect: Callable[[Address], Awaitable[L]]) -> L:
        """The first line that opens. `first`: where the server sent the device. Raises OSError."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        race = self._race = Race(self._book.order(self._clock(), self._safe(first)), self._hints_now(), begun)
        try:
            address, line = await open_first(race, connect, self._news())
        finally:
            if self._race is race:
                self._race = None
                self._fail(race)
        self.at, now = address, loop.time()
        if self.alternatives:
            self.greet_by = now + greeting_limit(self.hints.greeting, now - begun, self._unspoken)
        return line

    def _hints_now(self) -> Hints:
        hints = self.hints
        return dataclasses.replace(hints, stagger=SUSPICION * hints.stagger) if self._suspicious else hints

    def _safe(self, addresses: Iterable[Address]) -> list[Address]:
        """An app that asked for TLS gives its token to nobody without."""
        return [address for address in addresses if address.secret or not self._secret]

    def _fail(self, race: Race) -> None:
        for address in race.failures:
            self._book.failed(address, self._clock())
        race.failures.clear()

    # What became of it

    def greeted(self, literal: str) -> None:
        """The server took the device. `literal`: its IP address, or ""."""
        assert self.at is not None
        self.greet_by, self._unspoken, self._suspicious = None, 0, False
        self._book.reached(self.at, literal, self._clock())
        if self._dispatch is not None:
            self._dispatch.reached(self.at)
        self._tell()

    def gave_up(self) -> None:
        """Patience is over before anything opened."""
        if self._race is not None:
            self._race.cut(asyncio.get_running_loop().time())
            self._fail(self._race)

    def broke(self, *, greeted: bool, stable: bool, silent: bool) -> None:
        """The connection ended, and nobody said so. `stable`: it had lived for a while; `silent`: it was not even
        reset."""
        if self.at is None:
            return
        self._suspicious = silent
        if greeted and stable:
            self._book.ended(self.at, self._clock(), silent=silent)
            return
        self._unspoken += not greeted
        self._book.failed(self.at, self._clock())

    def left(self) -> None:
        """There is no connection any more."""
        self.at = self.greet_by = None

    # Dispatch

    def _news(self) -> News | None:
        """A question is on its way, or should be."""
        dispatch = self._dispatch
        if dispatch is not None and self._asking is None and self._doors and dispatch.wants(self._clock()):
            self._asking = asyncio.ensure_future(self._ask(dispatch))
            self._asking.add_done_callback(self._asked)
        return self._asking

    async def _ask(self, dispatch: Dispatch) -> tuple[Address, ...]:
        if await ask(dispatch, self._doors, self._clock) is None:
            return ()
        self._heed(dispatch)
        self._on_answer()
        return self._book.addresses

    def _asked(self, asking: News) -> None:
        if self._asking is asking:
            self._asking = None

    def _heed(self, dispatch: Dispatch) -> None:
        self._book.replace([*self._safe(dispatch.addresses()), *self._own])
        if dispatch.told is not None:
            self._book.hints = dispatch.told.hints

    def _tell(self) -> None:
        """Where it failed, and where not. What went well alone is told with the next failure."""
        if (
            self._dispatch is None
            or not self._doors
            or self._telling is not None
            or not self._book.has_failures
        ):
            return
        self._telling = asyncio.ensure_future(tell(self._dispatch, self._doors, self._book.take_outcomes()))
        self._telling.add_done_callback(self._tell_ended)

    def _tell_ended(self, telling: asyncio.Future[bool]) -> None:
        self._telling = None
        if not telling.cancelled():
            telling.result()

    async def close(self) -> None:
        for task in (self._asking, self._telling):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
