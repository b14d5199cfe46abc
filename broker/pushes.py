"""Accepting pushes: check, resolve, store durably, ring, answer; in this order (architecture, decision 4).

Used by the HTTP API and by publishers that push over MQTT. Every failure is an ApiError.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
from pyroaring import BitMap

from broker.audience import resolve
from broker.bus import Broadcast, Bus, Doorbell, Targeted
from broker.errors import PUSH, ApiError, refusal
from broker.limits import Limits
from broker.model import App, NewMessage, StoredBroadcast, StoredMessage
from broker.requests import Checked, check_item, read_batch, read_push
from broker.store import Store, StoreError

Clock = Callable[[], float]


class Accepted(msgspec.Struct, frozen=True, gc=False):
    """A push that is durable, or (its cid was used before) the push that was stored then."""

    msg_id: int
    sendno: str


class Pushes:
    """`clock` gives Unix seconds. Called on the event loop's thread; any number of calls may overlap."""

    def __init__(
        self, store: Store, bus: Bus, limits: Limits | None = None, clock: Clock = time.time
    ) -> None:
        self._store = store
        self._bus = bus
        self._limits = limits or Limits()
        self._clock = clock

    async def push(self, app: App, raw: bytes) -> Accepted:
        """`raw`: the JSON push object."""
        checked = read_push(raw, self._limits)
        try:
            targets = await self._targets(app, checked)
            return (await self._accept(app, [checked], [targets]))[0]
        except StoreError as error:
            raise refusal(error, PUSH, checked.sendno) from error

    async def validate(self, app: App, raw: bytes) -> Accepted:
        """All checks of `push`, its audience included, and nothing sent; msg_id is 0."""
        checked = read_push(raw, self._limits)
        try:
            await self._targets(app, checked)
        except StoreError as error:
            raise refusal(error, PUSH, checked.sendno) from error
        return Accepted(0, checked.sendno)

    async def push_batch(
        self, app: App, raw: bytes, by: Literal["regid", "alias"] = "regid"
    ) -> dict[str, Accepted | ApiError]:
        """A result for each cid. What is right goes into one append, all or none; raises if that fails, or if
        the batch as a whole cannot be read."""
        items, wrong = read_batch(raw, self._limits)
        results: dict[str, Accepted | ApiError] = dict(wrong)
        right: list[Checked] = []
        for cid, item in items.items():
            try:
                right.append(check_item(cid, item, by, self._limits))
            except ApiError as error:
                results[cid] = error
        try:
            results.update(await self._accept_batch(app, right))
        except StoreError as error:
            raise refusal(error, PUSH) from error
        return results

    async def _targets(self, app: App, checked: Checked) -> BitMap:
        targets = (await resolve(self._store, app.app_id, [checked.audience]))[0]
        if not targets:
            raise ApiError(1011, sendno=checked.sendno)
        return targets

    async def _accept_batch(self, app: App, batch: Sequence[Checked]) -> dict[str, Accepted | ApiError]:
        targets = await resolve(self._store, app.app_id, [checked.audience for checked in batch])
        reached = [(checked, devnos) for checked, devnos in zip(batch, targets, strict=True) if devnos]
        accepted = await self._accept(app, [c for c, _ in reached], [devnos for _, devnos in reached])
        results: dict[str, Accepted | ApiError] = {
            checked.cid: ApiError(1011, sendno=checked.sendno)
            for checked, devnos in zip(batch, targets, strict=True)
            if not devnos
        }
        results.update((c.cid, answer) for (c, _), answer in zip(reached, accepted, strict=True))
        return results

    async def _accept(self, app: App, batch: Sequence[Checked], targets: Sequence[BitMap]) -> list[Accepted]:
        if not batch:
            return []
        now = self._clock()
        messages = [
            NewMessage(
                app.app_id,
                checked.body,
                devnos,
                len(devnos) > self._limits.fanout_limit,
                now,
                now + checked.ttl,
                checked.cid or None,
                checked.sendno,
            )
            for checked, devnos in zip(batch, targets, strict=True)
        ]
        appended = await self._store.append(messages)
        self._bus.ring(
            [_doorbell(m, a.msg_id) for m, a in zip(messages, appended, strict=True) if not a.repeated]
        )
        return [Accepted(answer.msg_id, answer.sendno) for answer in appended]


def _doorbell(message: NewMessage, msg_id: int) -> Doorbell:
    stored = StoredMessage(msg_id, message.app_id, message.body, message.created_at, message.expires_at)
    if message.broadcast:
        # Receivers own the bitmaps; the store may have kept ours.
        return Broadcast(StoredBroadcast(stored, message.targets.copy(), BitMap()))
    return Targeted(stored, tuple(message.targets))
