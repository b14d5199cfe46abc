"""Random lives of messages on the real store, held after each step against a plain model of sets and numbers.

What must always hold: each target is in exactly one state, the one the model has (G4, S4); sent, receipts and parts
are the model's; the curve's sums are the counts; each step is in the stretch of time when it happened; a device's
trace ends in its state; and what a device would fetch is what is pending for it."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from pyroaring import BitMap

import broker.sqlite.inbox
import broker.sqlite.settling
from broker.model import (
    App,
    DeliveryState,
    MessageRecord,
    NewDevice,
    NewMessage,
    OwedRequest,
    Receipt,
    Settled,
    Step,
    Withdrawn,
)
from broker.store_sqlite import SqliteStore
from broker.telling.accounts import Accounts
from broker.telling.reports import RECEIPTS

T = TypeVar("T")
STRANGER = 5
DEVICES = 6
FAR = (65_535, 65_536, 200_000)  # other rows of `steps`; registered they are not
LIMIT = 2  # the newest-N rule
STEPS = 40
YEARS = 20 * 365 * 86_400.0

devnos = st.sampled_from([*range(DEVICES), *FAR])
crowds = st.sets(devnos, min_size=1, max_size=6)
lives = st.sampled_from([200_000.0, 0.0, 5.0, 100.0, 5_000.0])
delays = st.sampled_from([0.001, 0.4, 1.0, 7.0, 59.0, 600.0, 3_601.0, 90_000.0])
places = st.integers(0, 1_000)
masks = st.integers(0, 511)  # which of the targets, in their order; the last bit: a stranger, too


@dataclass
class Message:
    """One row of the store, as it should be."""

    msg_id: int
    targets: set[int]
    broadcast: bool
    created_at: float
    expires_at: float
    suppressed: set[int] = field(default_factory=set)
    collapse: str = ""
    paced: bool = False
    whole: Message | None = None
    parts: list[Message] = field(default_factory=list)
    online: int = 0
    delivered: set[int] = field(default_factory=set)
    evicted: set[int] = field(default_factory=set)
    recalled: set[int] = field(default_factory=set)
    sent: set[int] = field(default_factory=set)
    inbox: set[int] = field(default_factory=set)  # rows that are there
    receipts: dict[str, set[int]] = field(default_factory=dict)
    when: dict[tuple[str, int], float] = field(default_factory=dict)  # the first time

    @property
    def public_id(self) -> int:
        return self.whole.msg_id if self.whole else self.msg_id

    @property
    def released(self) -> set[int]:
        return set().union(*(part.targets for part in self.parts))

    def some(self, mask: int) -> set[int]:
        chosen = {device for place, device in enumerate(sorted(self.targets)) if mask >> place & 1}
        return chosen | {STRANGER} if mask >> 8 else chosen or self.targets

    def waiting(self, now: float) -> set[int]:
        if now >= self.expires_at:
            return set()
        return self.targets - self.delivered - self.evicted - self.recalled - self.released

    def note(self, step: str, devices: Iterable[int], at: float) -> None:
        for device in devices:
            self.when.setdefault((step, device), at)

    def state(self, device: int, now: float) -> DeliveryState:
        """The first of these that fits, in the whole or its part."""
        rows = [self, *self.parts]
        for state in (DeliveryState.DELIVERED, DeliveryState.EVICTED, DeliveryState.RECALLED):
            if any(device in getattr(row, state.value) for row in rows):
                return state
        own = next((part for part in self.parts if device in part.targets), self)
        return DeliveryState.EXPIRED if now >= own.expires_at else DeliveryState.PENDING


class Truth(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="holdfast-truth-"))
        self.runner = asyncio.Runner()
        self.now = 1_800_000_000.0
        self.routes: dict[int, int] = {}
        self.messages: dict[int, Message] = {}
        self.fold_after = broker.sqlite.settling.FOLD_AFTER
        self.move_after = broker.sqlite.inbox.MOVE_AFTER

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        broker.sqlite.settling.FOLD_AFTER = self.fold_after
        broker.sqlite.inbox.MOVE_AFTER = self.move_after
        self.run(self.store.close())
        self.runner.close()
        shutil.rmtree(self.folder)

    @initialize(
        fold_after=st.sampled_from([1, 3, 64]),
        move_after=st.sampled_from([1, 3, 1_000]),
        crowd=st.sets(devnos, min_size=3, max_size=8),
        life=lives,
    )
    def start(self, fold_after: int, move_after: int, crowd: set[int], life: float) -> None:
        """With one message of each kind."""
        broker.sqlite.settling.FOLD_AFTER = fold_after
        broker.sqlite.inbox.MOVE_AFTER = move_after
        self.run(self._open())
        self.app: App = self.run(self.store.create_app("truth", offline_limit=LIMIT))
        self.run(self.store.register(self.app.app_id, [NewDevice(f"d{n}") for n in range(DEVICES)]))
        until = self.now + life
        self.append(Message(0, {min(crowd)}, False, self.now, until), None)
        self.append(Message(0, set(crowd), False, self.now, until, collapse="weather"), None)
        self.append(Message(0, set(crowd), True, self.now, until, collapse="weather"), None)
        self.append(
            Message(0, set(crowd), True, self.now, self.now + 9_000.0, set(), "weather", paced=True), None
        )

    async def _open(self) -> None:
        self.store = SqliteStore(self.folder / "db", clock=lambda: self.now, report_lifetime=YEARS)
        await self.store.open()
        self.accounts = Accounts(self.store, lambda: self.now)

    # What happens

    @rule(delay=delays)
    def time_passes(self, delay: float) -> None:
        self.now += delay

    @rule(
        crowd=crowds,
        suppressed=st.sets(devnos, max_size=2),
        broadcast=st.booleans(),
        life=lives,
        collapse=st.sampled_from(["", "", "weather"]),
        place=st.none() | places,
        paced=st.sampled_from([False, False, True]),
    )
    def push(
        self,
        crowd: set[int],
        suppressed: set[int],
        broadcast: bool,
        life: float,
        collapse: str,
        place: int | None,
        paced: bool,
    ) -> None:
        suppressed -= crowd
        wholes = [message for message in self.messages.values() if message.whole is None]
        replaces = wholes[place % len(wholes)] if place is not None and wholes and not paced else None
        message = Message(0, crowd, broadcast, self.now, self.now + life, suppressed, collapse, paced)
        self.append(message, replaces)

    @precondition(lambda self: any(m.paced for m in self.messages.values()))
    @rule(
        place=places,
        count=st.integers(1, 4),
        broadcast=st.booleans(),
        life=lives,
    )
    def release_a_part(self, place: int, count: int, broadcast: bool, life: float) -> None:
        """A part has its whole's collapse key, and is as old as that."""
        paced = [message for message in self.messages.values() if message.paced]
        whole = paced[place % len(paced)]
        rest = sorted(whole.waiting(self.now))[:count]
        if rest:
            expires_at = min(self.now + life, whole.expires_at)
            self.append(
                Message(0, set(rest), broadcast, self.now, expires_at, set(), whole.collapse, whole=whole),
                None,
            )

    def append(self, message: Message, replaces: Message | None) -> None:
        wanted = NewMessage(
            self.app.app_id,
            b'{"message":{}}',
            BitMap(message.targets),
            message.broadcast,
            message.created_at,
            message.expires_at,
            collapse=message.collapse,
            replaces=replaces.msg_id if replaces else 0,
            suppressed=BitMap(message.suppressed) or None,
            paced=message.paced,
            part_of=message.whole.msg_id if message.whole else 0,
        )
        (appended,) = self.run(self.store.append([wanted]))
        message.msg_id = appended.msg_id
        message.online = len(message.targets & self.routes.keys())
        older = list(self.messages.values())
        self.messages[message.msg_id] = message
        if message.whole:
            message.whole.parts.append(message)
        if not message.broadcast and not message.paced and message.expires_at > message.created_at:
            message.inbox = set(message.targets)
        gone: dict[int, set[int]] = {}
        if replaces:
            for row in (replaces, *replaces.parts):
                gone[row.msg_id] = self.withdraw(row, message.targets)
        for row in older if message.collapse else ():
            if row.collapse == message.collapse and row.public_id < message.public_id:
                gone[row.msg_id] = gone.get(row.msg_id, set()) | self.withdraw(row, message.targets)
        self.check_withdrawn(appended.withdrawn, gone)
        if message.inbox:
            self.evict_surplus(message.targets - self.routes.keys())
        self.check(self.messages.values() if gone else [message])

    def withdraw(self, message: Message, only: set[int] | None = None) -> set[int]:
        waiting = message.waiting(self.now)
        gone = waiting if only is None else waiting & only
        message.recalled |= gone
        message.inbox -= gone
        message.note("recalled", gone, self.now)
        return gone

    def evict_surplus(self, away: set[int]) -> None:
        touched = []
        for device in away:
            rows = [message for message in self.messages.values() if device in message.inbox]
            for message in sorted(rows, key=lambda row: row.msg_id)[:-LIMIT]:
                message.inbox.discard(device)
                message.evicted.add(device)
                message.note("evicted", [device], self.now)
                touched.append(message)
        self.check(touched)

    def check_withdrawn(self, told: Iterable[Withdrawn], gone: dict[int, set[int]]) -> None:
        """Devices that a message expired for a moment ago may be told, too: it may be on its way to them."""
        found: dict[int, set[int]] = {}
        for one in told:
            row, devices = self.messages[one.msg_id], set(one.devnos)
            late = row.targets - row.delivered - row.evicted if self.now >= row.expires_at else set()
            found[one.msg_id] = found.get(one.msg_id, set()) | (devices - late)
            assert devices - late == devices & gone.get(one.msg_id, set())
            assert row.delivered | row.sent <= set(one.reached) <= row.delivered | row.sent | late
        gone = {i: devices for i, devices in gone.items() if devices}
        assert {i: devices for i, devices in found.items() if devices} == gone

    def pick(self, place: int) -> Message | None:
        rows = [message for message in self.messages.values() if not message.paced]
        return rows[place % len(rows)] if rows else None

    @rule(
        place=places,
        mask=masks,
        ago=st.sampled_from([0.0, 0.2, 2.0, 100.0]),
        node=st.sampled_from(["n1", "n2"]),
    )
    def acknowledged(self, place: int, mask: int, ago: float, node: str) -> None:
        """Also by devices that are no targets, again, and after it expired or was recalled."""
        if (message := self.pick(place)) is None:
            return
        devices = message.some(mask)
        sent_at = max(self.now - ago, message.created_at)
        self.settle(message, delivered=sorted(devices), sent_at=sent_at, node=node)
        there = devices & message.targets
        message.note("sent", there - message.delivered, sent_at)
        message.note("delivered", there, self.now)
        message.delivered |= there
        message.inbox -= there
        self.check([message])

    @rule(place=places, mask=masks, node=st.sampled_from(["n1", "n2"]))
    def sent(self, place: int, mask: int, node: str) -> None:
        if (message := self.pick(place)) is None:
            return
        devices = message.some(mask)
        self.settle(message, sent=sorted(devices), node=node)
        there = devices & message.targets
        message.note("sent", there - message.delivered, self.now)
        message.sent |= there
        self.check([message])

    @rule(place=places, mask=masks)
    def dropped_by_a_node(self, place: int, mask: int) -> None:
        if (message := self.pick(place)) is None:
            return
        devices = message.some(mask) & message.waiting(self.now)
        self.settle(message, evicted=sorted(devices), node="n1")
        message.evicted |= devices
        message.inbox -= devices
        message.note("evicted", devices, self.now)
        self.check([message])

    def settle(self, message: Message, *, sent_at: float = 0.0, node: str, **devices: list[int]) -> None:
        settled = Settled(
            self.app.app_id,
            message.msg_id,
            message.broadcast,
            at=self.now,
            sent_at=sent_at,
            node=node,
            **devices,
        )
        self.run(self.store.settle([settled]))

    @rule(place=places, device=devnos, event=st.sampled_from(RECEIPTS))
    def told(self, place: int, device: int, event: str) -> None:
        wholes = [message for message in self.messages.values() if message.whole is None]
        if not wholes:
            return
        message = wholes[place % len(wholes)]
        self.run(
            self.store.record_receipts([Receipt(self.app.app_id, message.msg_id, device, event, self.now)])
        )
        if device in message.targets:
            message.receipts.setdefault(event, set()).add(device)
            message.note(event, [device], self.now)
        self.check([message])

    @rule(place=places)
    def recalled(self, place: int) -> None:
        wholes = [message for message in self.messages.values() if message.whole is None]
        if not wholes:
            return
        message = wholes[place % len(wholes)]
        told = self.run(self.store.recall(self.app.app_id, [message.msg_id], self.now))
        rows = [message, *message.parts]
        assert {one.msg_id for one in told} == {row.msg_id for row in rows}
        self.check_withdrawn(told, {row.msg_id: self.withdraw(row) for row in rows})
        self.check(rows)

    @rule(device=devnos)
    def comes_or_goes(self, device: int) -> None:
        if (epoch := self.routes.pop(device, None)) is not None:
            self.run(self._release(device, epoch))
            return
        self.routes[device] = self.run(self._claim(device))
        self.check_fetch(device)

    async def _claim(self, device: int) -> int:
        claimed = asyncio.get_running_loop().create_future()
        self.store.claim_route(self.app.app_id, device, "n1", claimed.set_result)
        return int((await claimed).epoch)

    async def _release(self, device: int, epoch: int) -> None:
        self.store.release_route(self.app.app_id, device, epoch, self.now)

    @rule()
    def upkeep(self) -> None:
        async def run() -> None:
            while await self.store.expire(self.now):
                pass

        self.run(run())
        for message in self.messages.values():
            if self.now >= message.expires_at:
                message.inbox.clear()
        self.check(self.messages.values())

    @rule()
    def restart(self) -> None:
        self.run(self.store.close())
        self.run(self._open())
        self.routes.clear()
        self.check(self.messages.values())

    @rule()
    def the_log_is_read(self) -> None:
        """Which folds what owes nobody any more."""
        live = self.run(self.store.live_broadcasts(self.app.app_id))
        found = {one.message.msg_id: set(one.targets) - set(one.settled) for one in live}
        assert found == {
            message.msg_id: waiting
            for message in self.messages.values()
            if message.broadcast and not message.paced and (waiting := message.waiting(self.now))
        }

    # What must hold

    def check(self, messages: Iterable[Message]) -> None:
        wholes = {message.public_id: message.whole or message for message in messages}
        records = self.run(self.store.find_messages(self.app.app_id, list(wholes)))
        assert records.keys() == wholes.keys()
        for msg_id, message in wholes.items():
            self.check_record(records[msg_id], message)
            steps = self.run(self.store.find_steps(self.app.app_id, msg_id))
            self.check_steps(steps, message)
            self.check_curve(message)
            for device in range(DEVICES):
                self.check_trace(message, device)

    def check_record(self, record: MessageRecord, message: Message) -> None:
        states: dict[DeliveryState, set[int]] = {state: set() for state in DeliveryState}
        for device in message.targets:
            states[message.state(device, self.now)].add(device)
        states[DeliveryState.SUPPRESSED] = message.suppressed
        assert {state: set(found) for state, found in record.sets(self.now).items()} == states
        assert sum(record.counts(self.now).values()) == len(record.targets)
        assert set(record.targets) == message.targets | message.suppressed
        rows = [message, *message.parts]
        assert set(record.sent) == set().union(*(row.sent | row.delivered for row in rows))
        assert {event: set(found) for event, found in record.receipts.items()} == message.receipts
        assert (record.parts, set(record.released)) == (len(message.parts), message.released)
        assert (record.online, record.paced) == (message.online, message.paced)

    def check_steps(self, steps: list[Step], message: Message) -> None:
        """Each thing that happened has a stretch that it fits in, and nothing else has one."""
        first: dict[tuple[str, int], Step] = {}
        for step in steps:
            for device in step.devnos:
                assert step.step == "sent" or (step.step, device) not in first, "it happened once"
                first.setdefault((step.step, device), step)
        happened = {key: at for row in (message, *message.parts) for key, at in row.when.items()}
        for (name, device), step in first.items():
            at = happened[name, device]
            assert step.start - 1 <= at <= step.start + step.width + 1, (name, device, step, at)
        for name, device in happened:
            state = message.state(device, self.now)
            if name in RECEIPTS or (name in {"delivered", "evicted", "recalled"} and state.value == name):
                assert (name, device) in first
            elif name == "sent":
                assert first.keys() & {("sent", device), ("delivered", device)}

    def check_curve(self, message: Message) -> None:
        curve = self.run(self.accounts.curve(self.app, str(message.msg_id)))
        report = self.run(self.accounts.push(self.app, str(message.msg_id)))
        for name in ("sent", "delivered", *RECEIPTS):
            assert sum(hour[name] for hour in curve["hours"]) == report[name], name  # type: ignore[attr-defined]

    def check_trace(self, message: Message, device: int) -> None:
        trace: Any = self.run(self.accounts.trace(self.app, str(message.msg_id), f"d{device}"))
        names = [step["step"] for step in trace["steps"]]
        if device in message.suppressed:
            assert (trace["status"], names) == ("suppressed", ["accepted", "suppressed"])
        elif device not in message.targets:
            assert (trace["status"], names) == ("not a target", ["accepted"])
        else:
            state = message.state(device, self.now).value
            assert trace["status"] == state
            assert names[:2] == ["accepted", "matched"]
            ends = set(names) & {"acknowledged", "evicted", "recalled", "expired"}
            assert ends == ({"acknowledged" if state == "delivered" else state} - {"pending"})
            sent = any(device in row.sent | row.delivered for row in (message, *message.parts))
            assert ("sent" in names) == sent

    def check_fetch(self, device: int) -> None:
        request = OwedRequest(self.app.app_id, device, 0, 100)
        ((*found,),) = self.run(self.store.fetch_owed([request]))
        assert [message.msg_id for message in found] == sorted(
            message.msg_id for message in self.messages.values()
            if not message.broadcast and not message.paced and device in message.waiting(self.now)
        )  # fmt: skip


TestTruth = Truth.TestCase
TestTruth.settings = settings(
    max_examples=max(10, settings().max_examples // 3),
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
