"""What every store must do with messages beyond one append: parts, withdrawals, states, steps, records (S4, S12)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable

import pytest
from msgspec.structs import replace
from pyroaring import BitMap

from broker.model import (
    App,
    Appended,
    DeliveryState,
    MessageRecord,
    NewDevice,
    OwedRequest,
    Receipt,
    Record,
    RecordChange,
    Settled,
    Withdrawn,
)
from broker.store import Conflict, Store, StoreError, TooMany, UnknownMessage
from tests.broker.store_contract import HOUR, START, Clock, MakeStore, claimed, expire_all, owed, push

NOW = START + 1


async def record_of(store: Store, app: App, msg_id: int) -> MessageRecord:
    return (await store.find_messages(app.app_id, [msg_id]))[msg_id]


async def counts(store: Store, app: App, msg_id: int, now: float = NOW) -> dict[str, int]:
    """The states that some device is in."""
    record = await record_of(store, app, msg_id)
    by_state = record.counts(now)
    assert sum(by_state.values()) == len(record.targets)
    return {state.value: count for state, count in by_state.items() if count}


async def registered(store: Store, app: App, count: int = 4) -> None:
    await store.register(app.app_id, [NewDevice(f"d{i}") for i in range(count)])


async def delivered(
    store: Store, app: App, msg_id: int, devnos: Iterable[int], *, broadcast: bool = False, at: float = NOW
) -> None:
    await store.settle(
        [Settled(app.app_id, msg_id, broadcast, list(devnos), at=at, sent_at=at - 0.5, node="n1")]
    )


def withdrawn(answers: Iterable[Withdrawn]) -> dict[int, tuple[list[int], list[int]]]:
    return {answer.msg_id: (list(answer.devnos), list(answer.reached)) for answer in answers}


class MessageContract:
    # Withdrawing

    @pytest.mark.parametrize("broadcast", [False, True])
    @pytest.mark.parametrize("count", [1, 3])
    async def test_what_is_recalled_is_owed_to_nobody_any_more(
        self, store: Store, app: App, count: int, broadcast: bool
    ) -> None:
        await registered(store, app)
        (appended,) = await store.append([push(app, range(count), broadcast=broadcast)])
        if count > 1:
            await delivered(store, app, appended.msg_id, [0], broadcast=broadcast)
        gone = await store.recall(app.app_id, [appended.msg_id], NOW)
        reached = [0] if count > 1 else []
        assert withdrawn(gone) == {appended.msg_id: (list(range(len(reached), count)), reached)}
        assert [await owed(store, app, devno) for devno in range(count)] == [[]] * count
        assert await store.live_broadcasts(app.app_id) == []
        left = {"recalled": count - len(reached)} | ({"delivered": 1} if reached else {})
        assert await counts(store, app, appended.msg_id) == left
        assert await counts(store, app, appended.msg_id, START + 2 * HOUR) == left

    async def test_recalling_twice_and_recalling_nothing_change_nothing(self, store: Store, app: App) -> None:
        await registered(store, app)
        (appended,) = await store.append([push(app, [0, 1])])
        await store.recall(app.app_id, [appended.msg_id], NOW)
        (again,) = await store.recall(app.app_id, [appended.msg_id], NOW)
        assert not again.devnos
        assert await store.recall(app.app_id, [appended.msg_id + 1], NOW) == []
        assert await counts(store, app, appended.msg_id) == {"recalled": 2}

    @pytest.mark.parametrize("broadcast", [False, True])
    @pytest.mark.parametrize("count", [1, 2])
    async def test_an_acknowledgement_that_comes_after_the_recall_wins(
        self, store: Store, app: App, count: int, broadcast: bool
    ) -> None:
        await registered(store, app)
        (appended,) = await store.append([push(app, range(count), broadcast=broadcast)])
        await store.recall(app.app_id, [appended.msg_id], NOW)
        await delivered(store, app, appended.msg_id, [0], broadcast=broadcast, at=NOW + 1)
        more = {"recalled": 1} if count == 2 else {}
        assert await counts(store, app, appended.msg_id) == {"delivered": 1} | more

    async def test_what_expired_stays_expired_when_it_is_recalled(
        self, store: Store, app: App, clock: Clock
    ) -> None:
        await registered(store, app)
        (appended,) = await store.append([push(app, [0, 1], ttl=10)])
        for late, told in ((1, [0, 1]), (100, [])):  # a moment ago a node may still have had it
            clock.now = START + 10 + late
            (gone,) = await store.recall(app.app_id, [appended.msg_id], clock.now)
            assert (list(gone.devnos), list(gone.reached)) == (told, [])
            assert await counts(store, app, appended.msg_id, clock.now) == {"expired": 2}

    async def test_another_app_recalls_nothing(self, store: Store, app: App, other: App) -> None:
        await registered(store, app)
        (appended,) = await store.append([push(app, [0])])
        assert await store.recall(other.app_id, [appended.msg_id], NOW) == []
        assert await owed(store, app, 0) == [appended.msg_id]

    async def test_a_recall_survives_a_restart(self, store: Store, app: App, make_store: MakeStore) -> None:
        await registered(store, app)
        (appended,) = await store.append([push(app, [0, 1], broadcast=True)])
        await store.recall(app.app_id, [appended.msg_id], NOW)
        await store.close()
        again = await make_store()
        assert await again.live_broadcasts(app.app_id) == []
        assert await counts(again, app, appended.msg_id) == {"recalled": 2}
        await again.close()

    # Override and collapse key

    async def test_a_replaced_push_waits_on_only_where_the_new_one_does_not_go(
        self, store: Store, app: App
    ) -> None:
        await registered(store, app)
        (old,) = await store.append([push(app, [0, 1, 2])])
        await delivered(store, app, old.msg_id, [0])
        (new,) = await store.append([replace(push(app, [0, 1]), replaces=old.msg_id)])
        assert withdrawn(new.withdrawn) == {old.msg_id: ([1], [0])}
        assert await counts(store, app, old.msg_id) == {"delivered": 1, "recalled": 1, "pending": 1}
        assert [await owed(store, app, d) for d in (0, 1, 2)] == [[new.msg_id], [new.msg_id], [old.msg_id]]
        ((message,),) = await store.fetch_owed([_first(app, 0)])
        assert message.replaces == old.msg_id

    async def test_what_replaces_an_unknown_push_is_not_stored(
        self, store: Store, app: App, other: App
    ) -> None:
        await registered(store, app)
        (foreign,) = await store.append([push(other, [0])])
        for unknown in (foreign.msg_id, 17):
            with pytest.raises(UnknownMessage, match=str(unknown)):
                await store.append([push(app, [1]), replace(push(app, [0]), replaces=unknown)])
        assert await owed(store, app, 0) == await owed(store, app, 1) == []

    @pytest.mark.parametrize("old_broadcast", [False, True])
    @pytest.mark.parametrize("new_broadcast", [False, True])
    async def test_of_a_collapse_key_only_the_newest_waits(
        self, store: Store, app: App, old_broadcast: bool, new_broadcast: bool
    ) -> None:
        await registered(store, app)
        first, second = (replace(push(app, [0, 1], broadcast=old_broadcast), collapse=key) for key in "ab")
        old, untouched = await store.append([first, second])
        (new,) = await store.append([replace(push(app, [1, 2], broadcast=new_broadcast), collapse="a")])
        assert withdrawn(new.withdrawn) == {old.msg_id: ([1], [])}
        assert await counts(store, app, old.msg_id) == {"recalled": 1, "pending": 1}
        assert await counts(store, app, untouched.msg_id) == {"pending": 2}

    async def test_a_collapse_key_holds_within_one_append_too(self, store: Store, app: App) -> None:
        await registered(store, app)
        pushes = [replace(push(app, [0]), collapse="a") for _ in range(3)]
        answers = await store.append(pushes)
        assert await owed(store, app, 0) == [answers[2].msg_id]

    async def test_what_is_not_released_yet_of_an_older_push_collapses_too(
        self, store: Store, app: App
    ) -> None:
        await registered(store, app)
        slow = replace(push(app, range(4), broadcast=True), paced=True, collapse="price")
        (whole,) = await store.append([slow], [RecordChange(app.app_id, "pace", "", b"", 0, NOW)])
        part = replace(push(app, [0]), part_of=whole.msg_id, collapse="price")
        (first,) = await store.append([part])
        (new,) = await store.append([replace(push(app, [0, 1]), collapse="price")])
        assert withdrawn(new.withdrawn) == {whole.msg_id: ([1], []), first.msg_id: ([0], [])}
        assert await counts(store, app, whole.msg_id) == {"recalled": 2, "pending": 2}

    async def test_a_part_is_as_old_as_its_whole_and_takes_no_newer_pushs_place(
        self, store: Store, app: App
    ) -> None:
        await registered(store, app)
        (whole,) = await store.append([replace(push(app, range(4), broadcast=True), paced=True)])
        newer = await store.append(
            [
                replace(push(app, [0]), collapse="price"),
                replace(push(app, [0, 1], broadcast=True), collapse="price"),
            ]
        )
        late = replace(push(app, [0, 1]), part_of=whole.msg_id, collapse="price")
        (part,) = await store.append([late])
        assert part.withdrawn == ()
        assert await counts(store, app, newer[1].msg_id) == {"pending": 2}

    @pytest.mark.parametrize("by", ["recall", "override", "collapse"])
    async def test_whoever_was_about_to_release_a_part_must_look_again_after_a_recall(
        self, store: Store, app: App, by: str
    ) -> None:
        await registered(store, app)
        slow = replace(push(app, range(4), broadcast=True), paced=True, collapse="k")
        (whole,) = await store.append([slow], [RecordChange(app.app_id, "pace", "", b"", 0, NOW)])
        (seen,) = await store.records.due(["pace"], NOW, 1)
        if by == "recall":
            await store.recall(app.app_id, [whole.msg_id], NOW)
        else:
            more = {"replaces": whole.msg_id} if by == "override" else {"collapse": "k"}
            await store.append([replace(push(app, [0]), **more)])
        part = replace(push(app, [0]), part_of=whole.msg_id)
        with pytest.raises(Conflict):
            await store.append([part], [RecordChange(app.app_id, "pace", seen.key, b"", seen.version, NOW)])

    async def test_ids_grow_in_the_order_of_the_calls_whatever_they_depend_on(
        self, store: Store, app: App
    ) -> None:
        await registered(store, app)
        plain, key = push(app, [0]), replace(push(app, [1]), collapse="k")
        changes = [RecordChange(app.app_id, "k", str(n), b"", 0) for n in range(30)]
        calls = [
            store.append([(plain, key)[n % 3 == 0]], changes[n : n + 1] if n % 5 == 0 else [])
            for n in range(30)
        ]
        order: list[int] = []

        async def noted(call: Awaitable[list[Appended]]) -> int:
            (appended,) = await call
            order.append(appended.msg_id)
            return appended.msg_id

        ids = await asyncio.gather(*map(noted, calls))
        assert ids == order == sorted(set(ids))

    # States and steps

    async def test_the_suppressed_are_in_the_report_and_nowhere_else(self, store: Store, app: App) -> None:
        await registered(store, app)
        (appended,) = await store.append([replace(push(app, [0, 1]), suppressed=BitMap([2, 3]))])
        assert await owed(store, app, 2) == []
        assert await counts(store, app, appended.msg_id) == {"pending": 2, "suppressed": 2}
        record = await record_of(store, app, appended.msg_id)
        assert record.state(3, NOW) is DeliveryState.SUPPRESSED

    @pytest.mark.parametrize("count", [1, 3])
    async def test_sent_is_known_until_it_is_delivered(self, store: Store, app: App, count: int) -> None:
        await registered(store, app)
        await claimed(store, app, 0)
        (appended,) = await store.append([push(app, range(count))])
        await store.settle([Settled(app.app_id, appended.msg_id, False, sent=[0], at=NOW, node="n1")])
        record = await record_of(store, app, appended.msg_id)
        assert (list(record.sent), list(record.delivered), record.online) == ([0], [], 1)
        (gone,) = await store.recall(app.app_id, [appended.msg_id], NOW)
        assert list(gone.reached) == [0]

    @pytest.mark.parametrize("folded", [False, True])
    @pytest.mark.parametrize(("count", "broadcast"), [(1, False), (3, False), (3, True)])
    async def test_steps_say_who_did_what_when_and_where(
        self, store: Store, app: App, clock: Clock, count: int, broadcast: bool, folded: bool
    ) -> None:
        await registered(store, app)
        (appended,) = await store.append([push(app, range(count), broadcast=broadcast, ttl=2 * HOUR)])
        msg_id, app_id = appended.msg_id, app.app_id
        await store.settle([Settled(app_id, msg_id, broadcast, sent=[0], at=START + 2.5, node="n1")])
        await delivered(store, app, msg_id, [0], broadcast=broadcast, at=START + 90.25)
        await store.record_receipts([Receipt(app_id, msg_id, 0, "shown", START + 4000)])
        await store.record_receipts([Receipt(app_id, msg_id, 0, "shown", START + 5000)])
        if folded:
            clock.now = START + 2 * HOUR
            await expire_all(store, clock.now)
        steps = await store.find_steps(app_id, msg_id)
        found = {(step.step, step.node): (step.start, step.width, list(step.devnos)) for step in steps}
        exact = count == 1
        assert found == {
            ("sent", "n1"): (START + 2.5, 0, [0]) if exact else (START + 2, 1, [0]),
            ("delivered", "n1"): (START + 90.25, 0, [0]) if exact else (START + 60, 60, [0]),
            ("shown", ""): (START + 3600, 3600, [0]),
        }
        assert len(steps) == 3

    async def test_steps_count_nobody_twice(self, store: Store, app: App) -> None:
        await registered(store, app)
        (appended,) = await store.append([push(app, range(4), broadcast=True)])
        for second in range(200):  # more than are folded at once
            await delivered(store, app, appended.msg_id, [second % 4], broadcast=True, at=START + second * 30)
        steps = await store.find_steps(app.app_id, appended.msg_id)
        for name in ("sent", "delivered"):
            bits = [step.devnos for step in steps if step.step == name]
            assert sum(map(len, bits)) == len(BitMap.union(BitMap(), *bits))
        assert await counts(store, app, appended.msg_id) == {"delivered": 4}

    # Parts

    async def test_parts_are_delivered_and_the_whole_tells_of_all(self, store: Store, app: App) -> None:
        await registered(store, app)
        whole = replace(push(app, range(4), broadcast=True), paced=True)
        change = RecordChange(app.app_id, "pace", "", b"{}", 0, due=NOW)
        (appended,) = await store.append([whole], [change])
        msg_id = appended.msg_id
        assert await store.live_broadcasts(app.app_id) == []
        assert await owed(store, app, 0) == []
        (due,) = await store.records.due(["pace"], NOW, 10)
        assert due.key == str(msg_id)
        part = replace(push(app, [0, 1]), part_of=msg_id)
        (first,) = await store.append(
            [part], [RecordChange(app.app_id, "pace", due.key, b"1", due.version, NOW)]
        )
        await delivered(store, app, first.msg_id, [0])
        ((message,),) = await store.fetch_owed([_first(app, 1)])
        assert (message.part_of, message.public_id) == (msg_id, msg_id)
        record = await record_of(store, app, msg_id)
        assert (record.paced, record.parts, list(record.released)) == (True, 1, [0, 1])
        assert await counts(store, app, msg_id) == {"delivered": 1, "pending": 3}
        steps = await store.find_steps(app.app_id, msg_id)
        assert {(step.step, step.msg_id, *step.devnos) for step in steps} == {
            ("sent", first.msg_id, 0),
            ("delivered", first.msg_id, 0),
        }

    async def test_recalling_the_whole_recalls_its_parts_and_what_is_not_released(
        self, store: Store, app: App
    ) -> None:
        await registered(store, app)
        (whole,) = await store.append([replace(push(app, range(4), broadcast=True), paced=True)])
        (part,) = await store.append([replace(push(app, [0, 1]), part_of=whole.msg_id)])
        await delivered(store, app, part.msg_id, [0])
        gone = await store.recall(app.app_id, [whole.msg_id], NOW)
        assert withdrawn(gone) == {whole.msg_id: ([2, 3], []), part.msg_id: ([1], [0])}
        assert await counts(store, app, whole.msg_id) == {"delivered": 1, "recalled": 3}

    async def test_each_part_expires_on_its_own(self, store: Store, app: App, clock: Clock) -> None:
        await registered(store, app)
        whole = replace(push(app, range(4), broadcast=True, ttl=100), paced=True)
        (appended,) = await store.append([whole])
        await store.append([replace(push(app, [0], ttl=10), part_of=appended.msg_id)])
        clock.now = START + 20
        assert await counts(store, app, appended.msg_id, clock.now) == {"expired": 1, "pending": 3}
        clock.now = START + 101
        assert await counts(store, app, appended.msg_id, clock.now) == {"expired": 4}

    # cids

    async def test_a_cid_is_found_while_it_is_taken(
        self, store: Store, app: App, other: App, clock: Clock
    ) -> None:
        await registered(store, app)
        (appended,) = await store.append([replace(push(app, [0]), cid="c", sendno="7")])
        assert await store.find_cids(app.app_id, ["c", "d"]) == {"c": Appended(appended.msg_id, True, "7")}
        assert await store.find_cids(other.app_id, ["c"]) == {}
        clock.now += 24 * HOUR + 1
        assert await store.find_cids(app.app_id, ["c"]) == {}

    # Records

    async def test_s12_a_record_changes_only_from_the_version_it_has(self, store: Store, app: App) -> None:
        records, where = store.records, (app.app_id, "segment", "a")
        assert await records.save([RecordChange(*where, b"1", 0)]) == [1]
        for wrong in (0, 2):
            with pytest.raises(Conflict):
                await records.save([RecordChange(*where, b"2", wrong)])
        assert await records.save([RecordChange(*where, b"2", 1, due=5.0)]) == [2]
        assert await records.find(*where) == Record(*where, b"2", 2, 5.0)
        assert await records.save([RecordChange(*where, None, 2)]) == [0]
        assert await records.find(*where) is None

    async def test_s12_changes_of_one_call_are_made_all_or_none(
        self, store: Store, app: App, other: App
    ) -> None:
        records = store.records
        with pytest.raises(Conflict):
            await records.save(
                [RecordChange(app.app_id, "k", "a", b"1", 0), RecordChange(app.app_id, "k", "b", b"1", 7)]
            )
        assert await records.count(app.app_id, "k") == 0
        await records.save([RecordChange(app.app_id, "k", key, b"1", 0) for key in ("b", "a", "ä")])
        assert [record.key for record in await records.list(app.app_id, "k")] == ["a", "b", "ä"]
        assert [record.key for record in await records.list(app.app_id, "k", "a", 1)] == ["b"]
        assert await records.count(other.app_id, "k") == await records.count(app.app_id, "l") == 0

    async def test_s12_an_append_and_its_changes_happen_together_or_not_at_all(
        self, store: Store, app: App
    ) -> None:
        await registered(store, app)
        change = RecordChange(app.app_id, "schedule", "s", b"1", 0)
        await store.append([push(app, [0])], [change])
        with pytest.raises(Conflict):
            await store.append([push(app, [1])], [change])
        assert await owed(store, app, 1) == []
        used = replace(push(app, [1]), cid="c")
        await store.append([used])
        (repeated,) = await store.append([used], [RecordChange(app.app_id, "schedule", "t", b"1", 0)])
        assert repeated.repeated
        assert await store.records.find(app.app_id, "schedule", "t") is None

    async def test_s12_of_two_who_read_the_same_version_one_changes_it(self, store: Store, app: App) -> None:
        await registered(store, app)
        change = RecordChange(app.app_id, "schedule", "s", b"1", 0)
        calls = [store.append([push(app, [0])], [change]) for _ in range(5)]
        results = await asyncio.gather(*map(_tried, calls))
        assert sorted(results) == ["conflict"] * 4 + ["done"]
        assert len(await owed(store, app, 0)) == 1

    async def test_a_change_may_limit_how_many_records_there_are(
        self, store: Store, app: App, other: App
    ) -> None:
        await registered(store, app)

        def change(key: str, owner: App = app) -> RecordChange:
            return RecordChange(owner.app_id, "pace", key, b"", 0, at_most=2)

        await store.records.save([change("a")])
        await store.records.save([change("a", other)])
        with pytest.raises(TooMany):
            await store.records.save([change("b"), change("c")])
        await store.append([push(app, [0])], [change("")])
        with pytest.raises(TooMany):
            await store.append([push(app, [0])], [change("")])
        assert await store.records.count(app.app_id, "pace") == 2
        assert len(await owed(store, app, 0)) == 1

    async def test_records_are_due_in_the_order_of_their_times_until_the_app_is_deleted(
        self, store: Store, app: App, other: App
    ) -> None:
        records = store.records
        assert await records.next_due(["a", "b"]) is None
        await records.save(
            [
                RecordChange(app.app_id, "a", "late", b"", 0, 30.0),
                RecordChange(app.app_id, "b", "never", b"", 0),
                RecordChange(app.app_id, "c", "other kind", b"", 0, 1.0),
            ]
        )
        await records.save([RecordChange(other.app_id, "b", "early", b"", 0, 10.0)])
        assert [record.key for record in await records.due(["a", "b"], 30.0, 10)] == ["early", "late"]
        assert [record.key for record in await records.due(["a", "b"], 29.9, 10)] == ["early"]
        assert [record.key for record in await records.due(["a", "b"], 30.0, 1)] == ["early"]
        assert await records.next_due(["a", "b"]) == 10.0
        await store.delete_app(other.key)
        assert [record.key for record in await records.due(["a", "b"], 30.0, 10)] == ["late"]
        assert await records.next_due(["a", "b"]) == 30.0

    async def test_records_of_the_installation_belong_to_no_app(self, store: Store, app: App) -> None:
        await store.records.save([RecordChange(0, "group", "g", b"1", 0)])
        assert await store.records.find(app.app_id, "group", "g") is None
        assert [record.key for record in await store.records.list(0, "group")] == ["g"]

    async def test_a_record_needs_a_key(self, store: Store, app: App) -> None:
        with pytest.raises(StoreError, match="key"):
            await store.records.save([RecordChange(app.app_id, "k", "", b"1", 0)])


async def _tried(call: Awaitable[object]) -> str:
    try:
        await call
    except Conflict:
        return "conflict"
    return "done"


def _first(app: App, devno: int) -> OwedRequest:
    return OwedRequest(app.app_id, devno, 0, 10)
