"""Calls to Redis, gathered: what is asked for in one turn of the event loop goes out together.

`call` runs a script, `run` a command, each in the slot of its first key. Calls to one slot are carried out in the
order they were made. A call that raises StoreUnavailable may have been carried out all the same: its answer was
lost. So whatever is not idempotent carries a token of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import redis.asyncio
import redis.exceptions

from broker.redis.scripts import Script
from broker.store import StoreFull, StoreUnavailable

Argument: TypeAlias = str | bytes | int | float
TIMEOUT: Final = 5.0  # seconds for one answer


@dataclass(slots=True)
class RedisStats:
    """Counters for the metrics."""

    commits: int = 0
    failed_commits: int = 0
    on_commit: Callable[[int, float], None] | None = None
    """Called with (calls, seconds) after each group of calls was answered."""


@dataclass(slots=True, eq=False)
class _Call:
    script: Script | None
    words: tuple[Argument, ...]  # the command, or the script's keys and arguments
    keys: int
    future: asyncio.Future[Any]


class Engine:
    """`url`: redis://[user:password@]host[:port][/0], rediss:// with TLS. Answers are bytes, integers and lists."""

    def __init__(self, url: str) -> None:
        self._client = redis.asyncio.Redis.from_url(url, socket_timeout=TIMEOUT)
        self.stats = RedisStats()
        self._waiting: list[_Call] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Raises StoreUnavailable."""
        self._loop = asyncio.get_running_loop()
        await self.run("PING")

    async def close(self) -> None:
        while self._tasks or self._waiting:
            self._flush()
            await asyncio.wait(self._tasks)
        await self._client.aclose()

    def call(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()
    ) -> asyncio.Future[Any]:
        """All keys are in one slot."""
        return self._submit(script, (*keys, *arguments), len(keys))

    def run(self, *command: Argument) -> asyncio.Future[Any]:
        """The command's first key is its second word."""
        return self._submit(None, command, 0)

    def _submit(self, script: Script | None, words: tuple[Argument, ...], keys: int) -> asyncio.Future[Any]:
        future = self._loop.create_future()
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(_Call(script, words, keys, future))
        return future

    def _flush(self) -> None:
        if self._waiting:
            calls, self._waiting = self._waiting, []
            task = self._loop.create_task(self._send(calls))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _send(self, calls: Sequence[_Call]) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for call in calls:
            if call.script is None:
                pipeline.execute_command(*call.words)
            else:
                pipeline.execute_command("EVAL", call.script.source, call.keys, *call.words)
        try:
            answers = await pipeline.execute(raise_on_error=False)
        except (redis.exceptions.RedisError, OSError) as error:
            answers = [error] * len(calls)
        for call, answer in zip(calls, answers, strict=True):
            if call.future.done():
                continue
            if isinstance(answer, Exception):
                call.future.set_exception(as_store_error(answer))
            else:
                call.future.set_result(answer)


def as_store_error(error: Exception) -> StoreFull | StoreUnavailable:
    if isinstance(error, redis.exceptions.OutOfMemoryError):
        return StoreFull(f"Redis has no room: {error}")
    return StoreUnavailable(f"Redis: {error}")
