"""Accepting pushes: check, resolve, apply the app's rules, store durably, ring, answer; in this order (architecture,
decision 4).

Used by the HTTP API, by publishers that push over MQTT, by schedules and the bridge. Every failure is an
ApiError.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import inf
from typing import Final, Literal

import msgspec
from pyroaring import BitMap

from broker.audiences.audience import resolve
from broker.bus import Broadcast, Bus, Doorbell, Recalled, Targeted
from broker.errors import PUSH, ApiError, refusal
from broker.later.paces import SLOW, start_pace
from broker.limits import Limits, limits_of
from broker.model import (
    App,
    Appended,
    NewMessage,
    RecordChange,
    StoredBroadcast,
    StoredMessage,
)
from broker.pushing.requests import NO_WISHES, Checked, check_item, read_batch, read_push
from broker.pushing.rules import Rules, has_rules, quiet_until
from broker.store import Conflict, Store, StoreError, TooMany, UnknownMessage
from broker.tenants.quotas import Quotas

Clock = Callable[[], float]
MINUTE: Final = 60
NOTHING: Final = ("", 0, 0)  # that was counted against a plan


class Accepted(msgspec.Struct, frozen=True, gc=False):
    """A push that is durable, or (its cid was used before) the push that was stored then."""

    msg_id: int
    sendno: str


class Pushes:
    """`clock` gives Unix seconds. Called on the event loop's thread; any number of calls may overlap."""

    def __init__(
        self,
        store: Store,
        bus: Bus,
        limits: Limits | None = None,
        clock: Clock = time.time,
        *,
        rules: Rules | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        self._store = store
        self._bus = bus
        self._limits = limits or Limits()
        self._clock = clock
        self._rules = rules or Rules(store, clock)
        self._quotas = quotas or Quotas(store, self._limits, clock)
        self.on_later: Callable[[], None] = _nobody
        """Called when something was stored that is to happen later."""

    def read(self, app: App, raw: bytes) -> Checked:
        """What is right with a push in itself; whom it reaches is not asked."""
        return read_push(raw, limits_of(self._limits, app), app.settings.callback)

    async def push(self, app: App, raw: bytes, changes: Sequence[RecordChange] = ()) -> Accepted:
        """`raw`: the JSON push object. `changes` are made along with it, not if its cid was used before; Conflict
        passes."""
        return await self.push_checked(app, self.read(app, raw), changes)

    async def push_checked(
        self, app: App, checked: Checked, changes: Sequence[RecordChange] = ()
    ) -> Accepted:
        """What `read` gave."""
        try:
            targets = await self._targets(app, checked)
            return (await self._accept(app, [checked], [targets], changes))[0]
        except ApiError as error:
            error.sendno = checked.sendno
            return await self._first_result(app, checked, error)
        except Conflict:
            raise
        except StoreError as error:
            raise refusal(error, PUSH, checked.sendno) from error

    async def _first_result(self, app: App, checked: Checked, error: ApiError) -> Accepted:
        """Of a cid that was used: it does not matter what would be said of the push now. Else raises the error."""
        found = await self._store.find_cids(app.app_id, [checked.cid]) if checked.cid else {}
        if checked.cid not in found:
            raise error
        first = found[checked.cid]
        return Accepted(first.msg_id, first.sendno)

    async def validate(self, app: App, raw: bytes) -> Accepted:
        """All checks of `push` but what its plan still has, its audience included, and nothing sent; msg_id is 0."""
        checked = self.read(app, raw)
        try:
            self._quotas.check_restricted(app)
            await self._targets(app, checked)
        except StoreError as error:
            raise refusal(error, PUSH, checked.sendno) from error
        return Accepted(0, checked.sendno)

    async def push_batch(
        self, app: App, raw: bytes, by: Literal["regid", "alias"] = "regid"
    ) -> dict[str, Accepted | ApiError]:
        """A result for each cid. What is right goes into one append, all or none; raises if that fails, or if
        the batch as a whole cannot be read."""
        limits = limits_of(self._limits, app)
        items = read_batch(raw, limits)
        results: dict[str, Accepted | ApiError] = {}
        right: list[Checked] = []
        for cid, item in items.items():
            try:
                if isinstance(item, ApiError):
                    raise item
                right.append(check_item(cid, item, by, limits, app.settings.callback))
            except ApiError as error:
                results[cid] = error
        try:
            results.update(await self._accept_batch(app, right))
            refused = [checked.cid for checked in right if isinstance(results[checked.cid], ApiError)]
            if refused:  # unless they were accepted before
                first = await self._store.find_cids(app.app_id, refused)
                results.update((cid, Accepted(one.msg_id, one.sendno)) for cid, one in first.items())
        except StoreError as error:
            raise refusal(error, PUSH) from error
        return {cid: results[cid] for cid in items}

    async def _targets(self, app: App, checked: Checked) -> BitMap:
        targets = (await resolve(self._store, app.app_id, [checked.audience], self._clock()))[0]
        if not targets:
            raise ApiError(1011, sendno=checked.sendno)
        await self._check_reach(app, checked, targets)
        return targets

    async def _check_reach(self, app: App, checked: Checked, targets: BitMap) -> None:
        """What can be said of one push alone, once its targets are known. Raises ApiError."""
        if self._quotas.applies(app):
            self._quotas.check_targets(app, len(targets))
        if checked.wishes is not NO_WISHES:
            await self._check_wishes(app, checked)

    async def _check_wishes(self, app: App, checked: Checked) -> None:
        """Those that depend on what else there is."""
        limits, wishes = limits_of(self._limits, app), checked.wishes
        if wishes.replaces:
            found = (await self._store.find_messages(app.app_id, [wishes.replaces])).get(wishes.replaces)
            if found is None or found.created_at < self._clock() - limits.override_lifetime:
                unknown = (
                    f"options.override_msg_id: {wishes.replaces} is no push of this app in the last"
                    f" {limits.override_lifetime} seconds"
                )
                raise ApiError(1003, unknown, sendno=checked.sendno)

    async def _accept_batch(self, app: App, batch: Sequence[Checked]) -> dict[str, Accepted | ApiError]:
        targets = await resolve(
            self._store, app.app_id, [checked.audience for checked in batch], self._clock()
        )
        results: dict[str, Accepted | ApiError] = {}
        reached: list[tuple[Checked, BitMap]] = []
        for checked, devnos in zip(batch, targets, strict=True):
            if not devnos:
                results[checked.cid] = ApiError(1011, sendno=checked.sendno)
                continue
            try:
                await self._check_reach(app, checked, devnos)
            except ApiError as error:
                error.sendno = checked.sendno
                results[checked.cid] = error
            else:
                reached.append((checked, devnos))
        try:
            accepted = await self._accept(app, [c for c, _ in reached], [devnos for _, devnos in reached])
        except ApiError as error:  # holds for all of them, or for those of a kind that there were too many of
            guilty = {c.cid for c, devnos in reached if self._is_guilty(error, c, devnos)}
            results |= dict.fromkeys(guilty, error)
            rest = [checked for checked, _ in reached if checked.cid not in guilty]
            return results | (await self._accept_batch(app, rest) if rest else {})
        results.update((c.cid, answer) for (c, _), answer in zip(reached, accepted, strict=True))
        return results

    def _is_guilty(self, error: ApiError, checked: Checked, targets: BitMap) -> bool:
        if error.code == 1012:
            return checked.wishes.slow_minutes > 0
        return error.code != 2008 or len(targets) > self._limits.fanout_limit

    async def _accept(
        self,
        app: App,
        batch: Sequence[Checked],
        targets: Sequence[BitMap],
        changes: Sequence[RecordChange] = (),
    ) -> list[Accepted]:
        """Of pushes that have targets."""
        if not batch:
            return []
        spent = await self._spend(app, targets) if self._quotas.applies(app) else NOTHING
        messages: list[NewMessage] = []
        plans: list[RecordChange] = []
        ruled = has_rules(app)
        try:
            for checked, devnos in zip(batch, targets, strict=True):
                rules = await self._apply_rules(app, checked, devnos) if ruled else None
                self._draft(app, checked, devnos, rules, messages, plans)
            appended = await self._store_and_ring(app, messages, [*changes, *plans])
        except BaseException:
            await self._undo(app, messages)
            self._quotas.refund(app, *spent)
            raise
        repeated = [i for i, one in enumerate(appended) if one.repeated]
        if repeated:
            await self._undo(app, [messages[i] for i in repeated])
            if spent != NOTHING:
                self._quotas.refund(app, spent[0], len(repeated), self._wide([targets[i] for i in repeated]))
        return [Accepted(one.msg_id, one.sendno) for one in appended]

    async def _spend(self, app: App, targets: Sequence[BitMap]) -> tuple[str, int, int]:
        """Count against the app's plan; returns for which day, and how many pushes and broadcasts. Raises
        ApiError."""
        pushes, broadcasts = len(targets), self._wide(targets)
        return await self._quotas.spend(app, pushes, broadcasts), pushes, broadcasts

    def _wide(self, targets: Sequence[BitMap]) -> int:
        """How many are over the fan-out limit."""
        return sum(len(devnos) > self._limits.fanout_limit for devnos in targets)

    async def _apply_rules(self, app: App, checked: Checked, targets: BitMap) -> _Ruled | None:
        if checked.wishes.high:
            return None
        now = self._clock()
        lasts = (
            inf if checked.wishes.slow_minutes else now + checked.ttl
        )  # a slow push's ttl begins with each part
        return await self._rules.suppressed(app, targets, lasts), quiet_until(app.settings, now)

    def _draft(
        self,
        app: App,
        checked: Checked,
        targets: BitMap,
        rules: _Ruled | None,
        messages: list[NewMessage],
        plans: list[RecordChange],
    ) -> None:
        """Append the message, and its plan if it goes in parts."""
        now, wishes = self._clock(), checked.wishes
        suppressed, quiet = rules or (None, None)
        if suppressed:
            targets = targets - suppressed
        start, duration = quiet or now, wishes.slow_minutes * MINUTE
        paced = bool(targets) and (duration > 0 or start > now)
        message = NewMessage(
            app.app_id,
            checked.body,
            targets,
            len(targets) > self._limits.fanout_limit,
            now,
            (start + duration if duration else now) + checked.ttl,
            checked.cid or None,
            checked.sendno,
        )
        if wishes is not NO_WISHES or suppressed or paced:
            message = msgspec.structs.replace(
                message,
                high=wishes.high,
                collapse=wishes.collapse,
                replaces=wishes.replaces,
                suppressed=suppressed or None,
                paced=paced,
                callback=wishes.callback,
            )
        if paced:
            most = limits_of(self._limits, app).max_slow_pushes
            plan = start_pace(message, (start, duration, checked.ttl), len(messages))
            plans.append(_limited(plan, most))
        messages.append(message)

    async def _store_and_ring(
        self, app: App, messages: Sequence[NewMessage], changes: Sequence[RecordChange]
    ) -> list[Appended]:
        try:
            appended = await self._store.append(messages, changes)
        except TooMany as error:
            most = limits_of(self._limits, app).max_slow_pushes
            raise ApiError(
                1012, f"{most} slow pushes are under way, which is the limit of the app"
            ) from error
        except UnknownMessage as error:  # since it was looked up
            raise ApiError(1003, f"options.override_msg_id: {error} is gone") from error
        self._bus.ring(doorbells(messages, appended))
        if changes:
            self.on_later()
        return appended

    async def _undo(self, app: App, messages: Sequence[NewMessage]) -> None:
        """They were not stored: nobody got them."""
        if app.settings.frequency_caps:
            for message in messages:
                if not message.high:
                    await self._rules.forget(app, message.targets)


_Ruled = tuple[BitMap, float | None]
"""What an app's rules say of a push: whom not to send it, and until when it is held."""


def _limited(pace: RecordChange, most: int | None) -> RecordChange:
    """Those that quiet hours hold back are not limited: they go when these end."""
    return msgspec.structs.replace(pace, at_most=most) if pace.kind == SLOW else pace


def doorbells(messages: Sequence[NewMessage], appended: Sequence[Appended]) -> list[Doorbell]:
    """What the nodes are told of an append, unless the store tells them: first what waits no longer because of it."""
    bells: list[Doorbell] = []
    for message, answer in zip(messages, appended, strict=True):
        if answer.repeated or answer.rung:
            continue
        if answer.withdrawn:
            bells.append(Recalled(answer.withdrawn))
        if not message.paced and message.targets:
            bells.append(_doorbell(message, answer.msg_id))
    return bells


def _doorbell(message: NewMessage, msg_id: int) -> Doorbell:
    stored = StoredMessage(
        msg_id,
        message.app_id,
        message.body,
        message.created_at,
        message.expires_at,
        message.part_of,
        message.replaces,
        message.high,
    )
    if message.broadcast:
        # Receivers own the bitmaps; the store may have kept ours.
        return Broadcast(StoredBroadcast(stored, message.targets.copy(), BitMap()))
    return Targeted(stored, tuple(message.targets))


def _nobody() -> None:
    pass
