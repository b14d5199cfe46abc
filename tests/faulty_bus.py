"""A proxy between nodes and Redis that loses some messages of the bus, and delivers others twice.

It runs in a thread with an event loop of its own. Only messages of pub/sub are touched, each a frame of RESP; calls
and answers pass as they are, those on the bus's own connections, too.
"""

from __future__ import annotations

import asyncio
import threading
from random import Random
from typing import Final

AGGREGATES: Final = {b"*": 1, b"~": 1, b">": 1, b"%": 2, b"|": 2}  # values for each that is counted
BLOBS: Final = (b"$", b"=", b"!")
CHUNK: Final = 1 << 16


def end_of(data: bytes | bytearray, start: int = 0) -> int | None:
    """Where the RESP value that begins at `start` ends; None: not here yet."""
    end, left = start, 1
    while left:
        line = data.find(b"\r\n", end)
        if line < 0:
            return None
        kind, text = bytes(data[end : end + 1]), bytes(data[end + 1 : line])
        end, left = line + 2, left - 1
        if kind in BLOBS and int(text) >= 0:
            end += int(text) + 2
        elif kind in AGGREGATES and int(text) > 0:
            left += AGGREGATES[kind] * int(text) + (kind == b"|")
    return end if end <= len(data) else None


def is_message(frame: bytes | bytearray) -> bool:
    """Of sharded pub/sub, and not the answer to a call."""
    return frame.startswith((b">3\r\n$8\r\nsmessage\r\n", b"*3\r\n$8\r\nsmessage\r\n"))


class FaultyBus:
    """Nodes connect to `port` on any address of this machine. `lost` and `doubled` count."""

    def __init__(self, port: int, target: int, seed: int, *, lose: float = 0.3, double: float = 0.3) -> None:
        self.port = port
        self.lost = 0
        self.doubled = 0
        self._target = target
        self._random = Random(seed)
        self._lose = lose
        self._double = double
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(60), "the proxy does not listen"

    def close(self) -> None:
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(60)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        lines: set[asyncio.Task[None]] = set()

        def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            line = asyncio.ensure_future(self._pass_on(reader, writer))
            lines.add(line)
            line.add_done_callback(lines.discard)

        server = await asyncio.start_server(take, "0.0.0.0", self.port)
        self._ready.set()
        await self._stop.wait()
        server.close()
        for line in lines:
            line.cancel()
        await asyncio.gather(*lines, return_exceptions=True)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            its_reader, its_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:  # Redis is away
            writer.transport.abort()
            return
        ways = [
            asyncio.ensure_future(self._copy(reader, its_writer)),
            asyncio.ensure_future(self._disturb(its_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            its_writer.transport.abort()
            writer.transport.abort()

    @staticmethod
    async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()

    async def _disturb(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting = bytearray()
        while data := await reader.read(CHUNK):
            waiting += data
            start = 0
            while (end := end_of(waiting, start)) is not None:
                writer.write(bytes(waiting[start:end]) * self._copies(waiting[start : min(end, start + 32)]))
                start = end
            del waiting[:start]
            await writer.drain()

    def _copies(self, frame: bytearray) -> int:
        if not is_message(frame):
            return 1
        chance = self._random.random()
        if chance < self._lose:
            self.lost += 1
            return 0
        if chance < self._lose + self._double:
            self.doubled += 1
            return 2
        return 1
