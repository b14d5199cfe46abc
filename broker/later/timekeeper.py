"""What happens at a time: one task per broker asks the store for the records that are due, and has each looked at
by the handler of its kind.

A handler changes the record that it was called with, or removes it: to another time, because of the version, only
one of several brokers succeeds (S12), and the others get Conflict, which is as good. So a broker that dies while it
handles a record leaves it due, and whoever looks next takes it up. Where many are due at one time, a broker that is
overtaken with most of them takes fewer of those it sees, at random: so what all of them do together in vain stays in
proportion to what they do, however many they are.

A record whose handler fails is put off in the store, each time for longer: it neither spins nor stands in the way of
others. `due` is therefore only when to look; a handler keeps in the record's value what it has to know exactly.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final

from broker.metrics import Metrics
from broker.model import Record, RecordChange
from broker.store import Conflict, Records, StoreError

log: Final = logging.getLogger(__name__)

Clock = Callable[[], float]
Handle = Callable[[Record], Awaitable[None]]

LOOK_EVERY: Final = 5.0  # seconds: what other brokers saved is seen this late at most
STORE_PAUSE: Final = 2.0  # seconds until the store is asked again after it failed
AT_ONCE: Final = 64  # records handled together; their writes share commits
CROWDED: Final = 1 / 2  # others were faster with more than this part of what was tried: take less
ALONE: Final = 1 / 4  # with less than this: take more
PUT_OFF: Final = (
    1.0,
    300.0,
)  # seconds: after a first failure, doubled after each further one up to the second
FAILING: Final = 1000  # records whose failures are counted; beyond it the oldest counts anew

_Key = tuple[int, str, str]


class Timekeeper:
    """`clock` gives Unix seconds. Used on one event loop; several brokers may each have one on the same store."""

    def __init__(self, records: Records, clock: Clock = time.time) -> None:
        self._records = records
        self._clock = clock
        self._handlers: dict[str, Handle] = {}
        self._woken = asyncio.Event()
        self._turn = asyncio.Lock()  # one round at a time: a test's, or the task's
        self._failures: OrderedDict[_Key, int] = OrderedDict()
        self._take = AT_ONCE  # of those that are due, at once
        self._beaten = 0  # times that others were faster
        self._task: asyncio.Task[None] | None = None
        self.failed = 0  # calls of handlers that ended with an error

    def count_in(self, metrics: Metrics) -> None:
        metrics.read_counter(
            "due_failed",
            "Times that something due could not be done; it is tried again.",
            lambda: self.failed,
        )

    def register(self, handlers: Mapping[str, Handle]) -> None:
        """Whom to call with records of each kind."""
        self._handlers |= handlers

    def open(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """A handler that is under way is cancelled; its record stays due."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def wake(self) -> None:
        """A record was saved that may be due earlier than those before it."""
        self._woken.set()

    async def run_due(self) -> float:
        """Handle all that is due now, and return when to look again (Unix seconds, at most LOOK_EVERY from now)."""
        async with self._turn:
            try:
                while await self._handle_some():
                    pass
                due = await self._records.next_due(list(self._handlers))
            except StoreError as error:
                log.warning("what is due cannot be looked up, trying again: %s", error)
                return self._clock() + STORE_PAUSE
        soon = self._clock() + LOOK_EVERY
        return soon if due is None else min(due, soon)

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            try:
                pause = await self.run_due() - self._clock()
            except Exception:
                log.exception("what is due was not looked up, trying again")
                pause = STORE_PAUSE
            with suppress(TimeoutError):
                async with asyncio.timeout(
                    max(pause, 0.0)
                ):  # wait_for of Python 3.11 may swallow a cancellation
                    await self._woken.wait()

    async def _handle_some(self) -> bool:
        """Whether there may be more. Raises StoreError."""
        records = await self._look()
        if len(records) > self._take:
            records = random.sample(records, self._take)
        before = self._beaten
        results = await asyncio.gather(*map(self._handle, records))
        self._make_way(self._beaten - before, len(records))
        if records and not any(results):
            raise StoreError("none of the records that are due could be handled")
        return bool(records)

    def _make_way(self, beaten: int, tried: int) -> None:
        if beaten > CROWDED * tried:
            self._take = max(1, self._take // 2)
        elif beaten < ALONE * tried:
            self._take = min(AT_ONCE, self._take * 2)

    async def _look(self) -> list[Record]:
        """AT_ONCE of what is due, the kinds in turn: many of one kind at once do not hold up those of another."""
        now = self._clock()
        looks = (self._records.due([kind], now, AT_ONCE) for kind in self._handlers)
        turns = itertools.zip_longest(*await asyncio.gather(*looks))
        return [record for turn in turns for record in turn if record is not None][:AT_ONCE]

    async def _handle(self, record: Record) -> bool:
        """False: the store does not take anything."""
        try:
            overtaken = await self._overtaken(record)
            after = await self._records.find(record.app_id, record.kind, record.key)
            if after is not None and _is_left(after, record, overtaken):
                record = after
                raise AssertionError("its handler left it due")
        except Exception as error:
            self.failed += 1
            expected = isinstance(error, StoreError)
            log.log(
                logging.WARNING if expected else logging.ERROR,
                "%s %s of app %d could not be handled, trying again later: %s",
                *(record.kind, record.key, record.app_id, error),
                exc_info=None if expected else error,
            )
            return await self._put_off(record)
        self._failures.pop(_key(record), None)
        return True

    async def _overtaken(self, record: Record) -> bool:
        """Call the handler. True: another broker, or the publisher, was faster; or it met some other record."""
        try:
            await self._handlers[record.kind](record)
        except Conflict:
            self._beaten += 1
            return True
        return False

    async def _put_off(self, record: Record) -> bool:
        failures = self._failures.pop(_key(record), 0)
        self._failures[_key(record)] = failures + 1
        if len(self._failures) > FAILING:
            self._failures.popitem(last=False)
        least, most = PUT_OFF
        due = self._clock() + min(least * 2 ** min(failures, 30), most)
        change = RecordChange(record.app_id, record.kind, record.key, record.value, record.version, due)
        try:
            await self._records.save([change])
        except Conflict:
            return True
        except StoreError as error:
            log.warning("%s %s cannot be put off: %s", record.kind, record.key, error)
            return False
        return True


def _is_left(after: Record, before: Record, overtaken: bool) -> bool:
    """It would be due at once, for ever. What somebody else changed meanwhile may well be due again."""
    if overtaken:
        return after.version == before.version
    return after.due is not None and before.due is not None and after.due <= before.due


def _key(record: Record) -> _Key:
    return record.app_id, record.kind, record.key
