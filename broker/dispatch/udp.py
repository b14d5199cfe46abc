"""The same answers for one datagram: for devices whose network holds up DNS, TCP or HTTP.

A question is a JSON object (`app`, `carrier`, `link`, `region`, `v`), padded with blanks; the answer is the
document. Whoever forges a sender's address gets nothing from it: an answer is at most AMPLIFICATION times as long
as its question, as in QUIC (RFC 9000, 8.1), there is one for each question or none, and a network (/24, /48) gets
at most SOURCE_RATE a second. What is wrong is not answered: who asks right gets an answer, and nobody else is worth
a datagram.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Annotated, Final, cast

import msgspec

from broker.dispatch.dispatch import Dispatch, Question
from broker.dispatch.document import VERSION
from broker.dispatch.outcomes import source_of
from broker.errors import ApiError
from broker.metrics import Metrics
from broker.store import StoreError

AMPLIFICATION: Final = 3
MAX_DATAGRAM: Final = 1200  # bytes that every path takes in one piece (RFC 9000, 14)
MAX_WAITING: Final = 256  # questions that wait for an answer; more are dropped, and asked again
SOURCE_RATE: Final = (
    100  # questions a second of one network: a carrier's NAT has thousands of devices, asking hourly
)
MAX_SOURCES: Final = 10_000  # networks told apart in a second (2 MB), whoever forges senders

log = logging.getLogger(__name__)

Text = Annotated[str, msgspec.Meta(max_length=64)]
Peer = tuple[str, int]


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    app: Text
    carrier: Text = ""
    link: Text = ""
    region: Text = ""
    v: int = VERSION


_read: Final = msgspec.json.Decoder(Asked).decode


class DispatchDoor(asyncio.DatagramProtocol):
    """`open`, then `close`. One question is answered at a time: nearly all from memory."""

    def __init__(self, dispatch: Dispatch, clock: Callable[[], float] = time.monotonic) -> None:
        self._dispatch = dispatch
        self._clock = clock
        self._second = 0
        self._asked: dict[str, int] = {}  # questions of each network in this second
        self._transport: asyncio.DatagramTransport | None = None
        self._waiting: asyncio.Queue[tuple[bytes, Peer]] = asyncio.Queue(MAX_WAITING)
        self._answering: asyncio.Task[None] | None = None
        self.address: Peer = ("", 0)  # where it listens
        self.answered = 0
        self.unanswered = 0

    def count_in(self, metrics: Metrics) -> None:
        metrics.read_counter(
            "dispatch_datagrams_answered", "Questions over UDP that got an answer.", lambda: self.answered
        )
        metrics.read_counter(
            "dispatch_datagrams_unanswered",
            "Datagrams that got none: wrong, too short for the answer, or too many at once or of one network.",
            lambda: self.unanswered,
        )

    async def open(self, host: str, port: int, *, shared: bool = False) -> Peer:
        """Where it listens. `shared`: where other processes do, too. Raises OSError."""
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(
            lambda: self, local_addr=(host, port), reuse_port=shared or None
        )
        self._answering = loop.create_task(self._answer_all())
        host, number = transport.get_extra_info("sockname")[:2]
        self.address = host, number
        return self.address

    async def close(self) -> None:
        if self._answering is not None:
            self._answering.cancel()
            await asyncio.wait([self._answering])
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: Peer) -> None:
        wrong = not data.startswith(b"{") or len(data) > MAX_DATAGRAM
        if wrong or self._waiting.full() or not self._admits(addr[0]):
            self.unanswered += 1
        else:
            self._waiting.put_nowait((data, addr))

    def _admits(self, address: str) -> bool:
        """And counts."""
        second = int(self._clock())
        if second != self._second:
            self._second = second
            self._asked.clear()
        source = source_of(address)
        asked = self._asked.get(source, 0)
        if asked >= SOURCE_RATE or (not asked and len(self._asked) >= MAX_SOURCES):
            return False
        self._asked[source] = asked + 1
        return True

    def error_received(self, exc: Exception) -> None:
        """An answer before met nobody (ICMP); that device may ask again."""

    async def _answer_all(self) -> None:
        while True:
            data, peer = await self._waiting.get()
            try:
                answer = await self.answer(data, peer[0])
            except Exception:
                log.exception("a question over UDP failed")
                answer = None
            if answer is None or self._transport is None:
                self.unanswered += 1
            else:
                self.answered += 1
                self._transport.sendto(answer, peer)

    async def answer(self, data: bytes, address: str) -> bytes | None:
        """None: there is none for such a question."""
        try:
            asked = _read(data)
            if asked.v != VERSION:
                return None
            question = Question(asked.app, asked.carrier, asked.link, asked.region, address)
            raw = (await self._dispatch.answer(question)).raw
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ApiError, StoreError):
            return None
        return raw if len(raw) <= min(AMPLIFICATION * len(data), MAX_DATAGRAM) else None
