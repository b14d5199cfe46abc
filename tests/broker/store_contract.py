"""What every store must do. A back end subclasses `StoreContract` and gives it `make_store`; S1 (kill -9) and the
engine's own errors are tested beside each back end, because only it knows how to break itself."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace

import pytest
from pyroaring import BitMap

from broker.audiences.attributes import terms
from broker.model import (
    AccessRule,
    App,
    AppSettings,
    AuditEntry,
    BehaviourEvent,
    Callback,
    Claim,
    DeliveryState,
    DeviceChange,
    FrequencyCap,
    NewDevice,
    NewMessage,
    OwedRequest,
    QuietHours,
    Receipt,
    RecordChange,
    Retained,
    SessionItem,
    Settled,
    Term,
)
from broker.store import PIECE, Conflict, Store, StoreError, StoreUnavailable, TooMany, UnknownDevice

START = 1_800_000_000.0
HOUR = 3600.0
DAY = 24 * HOUR


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


MakeStore = Callable[[], Awaitable[Store]]


def push(
    app: App, targets: Iterable[int], *, broadcast: bool = False, ttl: float = HOUR, **more: str
) -> NewMessage:
    return NewMessage(app.app_id, b'{"message":{}}', BitMap(targets), broadcast, START, START + ttl, **more)


async def owed(store: Store, app: App, devno: int, after: int = 0, limit: int = 100) -> list[int]:
    (messages,) = await store.fetch_owed([OwedRequest(app.app_id, devno, after, limit)])
    return [message.msg_id for message in messages]


async def claimed(store: Store, app: App, devno: int, node: str = "node-1") -> Claim:
    future: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
    store.claim_route(app.app_id, devno, node, future.set_result)
    return await future


async def expire_all(store: Store, now: float) -> int:
    total = 0
    while gone := await store.expire(now):
        total += gone
    return total


class StoreContract:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def make_store(self, clock: Clock) -> MakeStore:
        """Opens a store on this test's data, with report, cid and event lifetimes of 30 days, 1 day, 7 days."""
        raise NotImplementedError

    @pytest.fixture
    async def store(self, make_store: MakeStore) -> AsyncIterator[Store]:
        store = await make_store()
        yield store
        await store.close()

    @pytest.fixture
    async def app(self, store: Store) -> App:
        return await store.create_app("shop", offline_limit=5)

    @pytest.fixture
    async def other(self, store: Store) -> App:
        return await store.create_app("shop")

    # Apps

    async def test_an_app_is_found_by_its_key_until_it_is_deleted(self, store: Store, app: App) -> None:
        assert await store.find_app(app.key) == app
        assert await store.delete_app(app.key)
        assert await store.find_app(app.key) is None
        assert not await store.delete_app(app.key)

    async def test_apps_are_listed_in_pages(self, store: Store) -> None:
        apps = [await store.create_app(f"app {n}") for n in range(5)]
        assert await store.list_apps(limit=2) == apps[:2]
        assert await store.list_apps(after=apps[1].app_id) == apps[2:]

    async def test_rotating_changes_only_the_master_secret(self, store: Store, app: App) -> None:
        rotated = await store.rotate_secret(app.key)
        assert rotated is not None
        assert rotated.master_secret != app.master_secret
        assert rotated.signing_key == app.signing_key
        assert await store.find_app(app.key) == rotated
        assert await store.rotate_secret("no such key") is None

    async def test_access_rules_are_replaced_and_kept(
        self, make_store: MakeStore, store: Store, app: App, other: App
    ) -> None:
        rules = [
            AccessRule(False, "all", "a/secret/#", "everyone"),
            AccessRule(True, "publish", 'ü/"\\/{registration_id}', "devices"),
        ]
        assert app.access == ()
        changed = replace(app, access=tuple(rules))
        assert await store.set_access(app.key, [rules[1]]) == replace(app, access=(rules[1],))
        assert await store.set_access(app.key, rules) == changed
        rotated = await store.rotate_secret(app.key)
        assert rotated is not None
        assert rotated.access == changed.access
        assert await store.list_apps() == [rotated, other]
        await store.close()
        again = await make_store()
        assert await again.find_app(app.key) == rotated
        assert await again.set_access(app.key, []) == replace(rotated, access=())
        assert await again.set_access("no such key", rules) is None
        await again.delete_app(app.key)
        assert await again.set_access(app.key, rules) is None
        await again.close()

    # Devices

    async def test_devnos_are_dense_and_an_existing_registration_is_left_alone(
        self, store: Store, app: App
    ) -> None:
        first = await store.register(app.app_id, [NewDevice("a", alias="me"), NewDevice("b"), NewDevice("a")])
        again = await store.register(app.app_id, [NewDevice("c"), NewDevice("a", alias="you")])
        assert [device.devno for device in first] == [0, 1, 0]
        assert [device.devno for device in again] == [2, 0]
        assert again[1].alias == "me"

    async def test_one_call_of_all_gets_a_device_that_is_to_be_new(
        self, store: Store, app: App, other: App
    ) -> None:
        await store.register(app.app_id, [NewDevice("there")])
        calls = [store.register_new(app.app_id, NewDevice(rid, "ios")) for rid in ("a", "b", "there") * 5]
        made = [device for device in await asyncio.gather(*calls) if device is not None]
        assert sorted(device.registration_id for device in made) == ["a", "b"]
        assert {d.registration_id: d for d in made} == await store.find_devices(app.app_id, ["a", "b"])
        assert await store.register_new(app.app_id, NewDevice("a")) is None
        assert (await store.register_new(other.app_id, NewDevice("a"))) is not None
        (tagged,) = [await store.register_new(app.app_id, NewDevice("c", tags=frozenset("x"), alias="me"))]
        assert tagged is not None
        assert await store.postings(app.app_id, [(Term.TAG, "x"), (Term.ALIAS, "me")]) == 2 * [
            BitMap([tagged.devno])
        ]

    async def test_concurrent_registrations_get_distinct_devnos(self, store: Store, app: App) -> None:
        lists = await asyncio.gather(
            *[store.register(app.app_id, [NewDevice(f"d{n}"), NewDevice("same")]) for n in range(50)]
        )
        assert len({devices[0].devno for devices in lists} | {devices[1].devno for devices in lists}) == 51
        (everyone,) = await store.postings(app.app_id, [(Term.ALL, "")])
        assert everyone == BitMap(range(51))

    async def test_names_and_numbers_resolve_both_ways(self, store: Store, app: App, other: App) -> None:
        await store.register(app.app_id, [NewDevice("a"), NewDevice("b")])
        for _ in range(2):  # the second time from memory, where there is one
            assert await store.resolve(app.app_id, ["b", "x", "a"]) == {"b": 1, "a": 0}
        assert await store.names(app.app_id, [1, 7]) == {1: "b"}
        assert await store.resolve(other.app_id, ["a"]) == {}
        assert await store.find_devices(other.app_id, ["a"]) == {}
        assert await store.names(other.app_id, [0]) == {}

    async def test_changes_apply_to_row_and_index_together(self, store: Store, app: App) -> None:
        await store.register(app.app_id, [NewDevice("a", tags=frozenset({"x", "y"}), alias="me", mobile="1")])
        change = DeviceChange(
            alias="", mobile="2", add_tags=frozenset({"z"}), remove_tags=frozenset({"x"}), platform="ios"
        )
        device = (await store.change_devices(app.app_id, {"a": change}))["a"]
        assert (device.tags, device.alias, device.mobile) == ({"y", "z"}, None, "2")
        assert await store.find_devices(app.app_id, ["a"]) == {"a": device}
        terms = [(Term.TAG, "x"), (Term.TAG, "z"), (Term.ALIAS, "me"), (Term.PLATFORM, "ios")]
        found = await store.postings(app.app_id, [*terms, (Term.PLATFORM, "other")])
        assert [list(bits) for bits in found] == [[], [0], [], [0], []]

    async def test_cached_postings_follow_later_changes_and_old_results_stay(
        self, store: Store, app: App
    ) -> None:
        await store.register(app.app_id, [NewDevice("a", tags=frozenset({"x"})), NewDevice("b")])
        (before,) = await store.postings(app.app_id, [(Term.TAG, "x")])
        await store.change_devices(
            app.app_id,
            {"a": DeviceChange(set_tags=frozenset()), "b": DeviceChange(add_tags=frozenset({"x"}))},
        )
        assert [list(bits) for bits in await store.postings(app.app_id, [(Term.TAG, "x")])] == [[1]]
        assert list(before) == [0]

    async def test_all_changes_or_none(self, store: Store, app: App) -> None:
        await store.register(app.app_id, [NewDevice("a")])
        with pytest.raises(UnknownDevice, match="ghost"):
            await store.change_devices(
                app.app_id, {"a": DeviceChange(alias="x"), "ghost": DeviceChange(alias="x")}
            )
        assert (await store.find_devices(app.app_id, ["a"]))["a"].alias is None
        assert await store.list_terms(app.app_id, Term.ALIAS) == []

    async def test_a_revocation_raises_the_generation_and_survives(
        self, make_store: MakeStore, store: Store, app: App
    ) -> None:
        await store.register(app.app_id, [NewDevice("a"), NewDevice("b")])
        await store.change_devices(app.app_id, {"b": DeviceChange(revoke_tokens=True)})
        assert dict(store.token_generations(app.app_id)) == {1: 1}
        await store.close()
        again = await make_store()
        await again.find_app(app.key)
        assert dict(again.token_generations(app.app_id)) == {1: 1}
        await again.close()

    async def test_dropping_a_term_takes_it_from_the_devices(self, store: Store, app: App) -> None:
        await store.register(
            app.app_id, [NewDevice(f"d{n}", tags=frozenset({"x", "y"}), alias="us") for n in range(4)]
        )
        assert list(await store.drop_term(app.app_id, (Term.TAG, "x"), BitMap([1, 2, 9]))) == [1, 2]
        assert await store.list_terms(app.app_id, Term.TAG) == ["x", "y"]
        assert list(await store.drop_term(app.app_id, (Term.TAG, "x"))) == [0, 3]
        assert list(await store.drop_term(app.app_id, (Term.ALIAS, "us"))) == [0, 1, 2, 3]
        assert await store.list_terms(app.app_id, Term.TAG) == ["y"]
        device = (await store.find_devices(app.app_id, ["d3"]))["d3"]
        assert (device.tags, device.alias) == ({"y"}, None)

    # Messages

    async def test_s3_ids_grow_even_when_the_clock_steps_back_over_a_restart(
        self, make_store: MakeStore, store: Store, app: App, clock: Clock
    ) -> None:
        first = await store.append([push(app, [0]), push(app, [1])])
        clock.now -= DAY
        second = await store.append([push(app, [0])])
        await store.close()
        again = await make_store()
        third = await again.append([push(app, [0])])
        await again.close()
        ids = [appended.msg_id for appended in [*first, *second, *third]]
        assert ids == sorted(set(ids))
        assert 0 < ids[-1] < 2**63

    async def test_owed_rows_come_oldest_first_in_pages(self, store: Store, app: App, other: App) -> None:
        ids = [a.msg_id for a in await store.append([push(app, [0, 1]), push(app, [0]), push(app, [0])])]
        assert await owed(store, app, 0, limit=2) == ids[:2]
        assert await owed(store, app, 0, after=ids[1]) == ids[2:]
        assert await owed(store, app, 1) == ids[:1]
        assert await owed(store, other, 0) == []
        one, two = await store.fetch_owed([OwedRequest(app.app_id, devno, 0, 9) for devno in (0, 1)])
        assert one[0] is two[0]
        assert one[0].body == b'{"message":{}}'

    async def test_expired_rows_do_not_use_up_the_limit(self, store: Store, app: App, clock: Clock) -> None:
        short, long = await store.append([push(app, [0], ttl=10), push(app, [0])])
        clock.now += 10
        assert await owed(store, app, 0, limit=1) == [long.msg_id]
        record = (await store.find_messages(app.app_id, [short.msg_id]))[short.msg_id]
        assert record.state(0, clock.now) is DeliveryState.EXPIRED

    async def test_a_push_for_now_only_can_be_reported_but_not_fetched(self, store: Store, app: App) -> None:
        one, all_ = await store.append([push(app, [0], ttl=0), push(app, [0], ttl=0, broadcast=True)])
        assert await owed(store, app, 0) == []
        assert await store.live_broadcasts(app.app_id) == []
        await store.settle(
            [
                Settled(app.app_id, one.msg_id, False, [0]),
                Settled(app.app_id, all_.msg_id, True, [0]),
            ]
        )
        records = await store.find_messages(app.app_id, [one.msg_id, all_.msg_id])
        assert all(list(record.delivered) == [0] for record in records.values())

    async def test_s4_s5_settling_is_idempotent_and_only_for_targets(
        self, store: Store, app: App, other: App
    ) -> None:
        single, shared, wide = [
            a.msg_id
            for a in await store.append(
                [push(app, [0]), push(app, [0, 1, 2]), push(app, range(1000), broadcast=True)]
            )
        ]
        for settling_app in (other, app, app):
            await store.settle(
                [
                    Settled(settling_app.app_id, single, False, [0, 7]),
                    Settled(settling_app.app_id, shared, False, [1, 1, 7], evicted=[2]),
                    Settled(settling_app.app_id, wide, True, [5, 2000], evicted=[6]),
                    Settled(settling_app.app_id, 12345, True, [0]),
                ]
            )
            if settling_app is other:
                assert await owed(store, app, 0) == [single, shared]
        records = await store.find_messages(app.app_id, [single, shared, wide])
        assert [list(records[i].delivered) for i in (single, shared, wide)] == [[0], [1], [5]]
        assert [list(records[i].evicted) for i in (single, shared, wide)] == [[], [2], [6]]
        assert await owed(store, app, 0) == [shared]
        assert await owed(store, app, 1) == await owed(store, app, 2) == []
        assert await store.find_messages(other.app_id, [single]) == {}

    async def test_a_broadcast_is_live_until_nobody_is_owed_it(
        self, store: Store, app: App, other: App, clock: Clock
    ) -> None:
        done, live, _ = await store.append(
            [push(app, range(300), broadcast=True, ttl=ttl) for ttl in (HOUR, HOUR, 10)]
        )
        clock.now += 10
        for devno in range(300):  # one by one: many more settlements than are kept unfolded
            await store.settle([Settled(app.app_id, done.msg_id, True, [devno])])
        (found,) = await store.live_broadcasts(app.app_id)
        assert (found.message.msg_id, len(found.targets), len(found.settled)) == (live.msg_id, 300, 0)
        found.settled.add(1)  # ours to change
        (found,) = await store.live_broadcasts(app.app_id)
        assert not found.settled
        assert await store.live_broadcasts(other.app_id) == []
        record = (await store.find_messages(app.app_id, [done.msg_id]))[done.msg_id]
        assert record.counts(clock.now)[DeliveryState.DELIVERED] == 300

    async def test_s6_a_cid_is_used_once_in_its_lifetime(
        self, store: Store, app: App, other: App, clock: Clock
    ) -> None:
        first, twin = await store.append(
            [push(app, [0], cid="c", sendno="1"), push(app, [1], cid="c", sendno="2")]
        )
        (later,) = await store.append([push(app, [1], cid="c", sendno="3")])
        (elsewhere,) = await store.append([push(other, [0], cid="c")])
        assert not first.repeated
        assert twin == later
        assert (later.msg_id, later.repeated, later.sendno) == (first.msg_id, True, "1")
        assert not elsewhere.repeated
        assert await owed(store, app, 1) == []
        clock.now += DAY
        (fresh,) = await store.append([push(app, [1], cid="c")])
        assert not fresh.repeated

    async def test_s6_of_concurrent_appends_with_one_cid_one_wins(self, store: Store, app: App) -> None:
        answers = await asyncio.gather(*[store.append([push(app, [0], cid="c")]) for _ in range(50)])
        assert sum(not answer.repeated for (answer,) in answers) == 1
        assert len({answer.msg_id for (answer,) in answers}) == 1

    async def test_s8_the_newest_n_stay_for_a_device_that_is_away(self, store: Store, app: App) -> None:
        ids = [(await store.append([push(app, [0])]))[0].msg_id for _ in range(4)]
        ids += [a.msg_id for a in await store.append([push(app, [0, 1]) for _ in range(4)])]
        assert await owed(store, app, 0) == ids[-5:]
        records = await store.find_messages(app.app_id, ids)
        assert [list(records[i].evicted) for i in ids] == [[0]] * 3 + [[]] * 5
        assert await owed(store, app, 1) == ids[4:]

    async def test_s8_applies_within_one_append_and_to_shared_messages(self, store: Store, app: App) -> None:
        ids = [a.msg_id for a in await store.append([push(app, [0, 1]) for _ in range(7)])]
        assert await owed(store, app, 1) == ids[-5:]
        record = (await store.find_messages(app.app_id, ids[:1]))[ids[0]]
        assert list(record.evicted) == [0, 1]

    async def test_s8_a_routed_device_loses_nothing(self, store: Store, app: App) -> None:
        route = await claimed(store, app, 0)
        ids = [a.msg_id for a in await store.append([push(app, [0]) for _ in range(9)])]
        assert await owed(store, app, 0) == ids
        store.release_route(app.app_id, 0, route.epoch, START)
        ids += [a.msg_id for a in await store.append([push(app, [0])])]
        assert await owed(store, app, 0) == ids[-5:]

    async def test_receipts_of_strangers_are_dropped(self, store: Store, app: App, other: App) -> None:
        (appended,) = await store.append([push(app, [0, 70_000])])
        for app_, devno, event in (
            (app, 0, "shown"),
            (app, 70_000, "shown"),
            (app, 3, "shown"),
            (other, 0, "clicked"),
        ):
            await store.record_receipts([Receipt(app_.app_id, appended.msg_id, devno, event)])
        await store.record_receipts([Receipt(app.app_id, 1, 0, "shown")])
        record = (await store.find_messages(app.app_id, [appended.msg_id]))[appended.msg_id]
        assert {event: list(bits) for event, bits in record.receipts.items()} == {"shown": [0, 70_000]}

    async def test_events_are_listed_in_order_and_pages(self, store: Store, app: App, other: App) -> None:
        events = [BehaviourEvent(app.app_id, n, "buy", START, b"%d" % n) for n in range(5)]
        await store.record_events(events)
        page = await store.list_events(app.app_id, 0, 2)
        rest = await store.list_events(app.app_id, page[-1][0], 100)
        assert [event for _, event in [*page, *rest]] == events
        assert await store.list_events(other.app_id, 0, 10) == []

    async def test_retained_messages_are_replaced_removed_and_expire(
        self, store: Store, app: App, other: App, clock: Clock
    ) -> None:
        def kept(topic: str, payload: bytes, expires_at: float | None = None) -> Retained:
            return Retained(app.app_id, topic, payload, 1, b"", expires_at, f"d/{topic}")

        await store.retain([kept("a", b"1"), kept("b", b"1"), kept("c", b"1", START + 5), kept("a", b"2")])
        await store.retain([kept("b", b"")])
        assert await store.list_retained(app.app_id) == [kept("a", b"2"), kept("c", b"1", START + 5)]
        assert await store.list_retained(other.app_id) == []
        clock.now += 5
        assert await store.list_retained(app.app_id) == [kept("a", b"2")]

    # Durable MQTT sessions

    async def test_s11_the_last_value_of_an_item_counts(
        self, make_store: MakeStore, store: Store, app: App, other: App
    ) -> None:
        def item(session: int, kind: str, name: int | str, value: bytes | None) -> SessionItem:
            return SessionItem(app.app_id, session, kind, name, value)

        theirs = SessionItem(other.app_id, 1, "s", "a", b"theirs")
        await store.save_session_items([item(1, "s", "a", b"old"), item(2, "q", 7, b"gone"), theirs])
        await store.save_session_items(
            [
                item(1, "s", "a", None),
                item(1, "s", "a", b"mine"),
                item(2, "q", 8, b"never"),
                item(2, "q", 8, None),
                item(2, "q", 7, None),
                item(9, "x", "not there", None),
                item(1, "s", "", b""),
            ]
        )
        kept = [item(1, "s", "", b""), item(1, "s", "a", b"mine")]
        assert await store.list_session_items(app.app_id) == kept
        assert await store.list_session_items(other.app_id) == [theirs]
        await store.close()
        again = await make_store()
        assert await again.list_session_items(app.app_id) == kept
        await again.close()

    async def test_session_items_come_in_order_and_a_number_is_not_its_text(
        self, store: Store, app: App
    ) -> None:
        names: list[int | str] = [
            -1,
            0,
            7,
            10,
            (1 << 63) - 1,
            "",
            "0",
            "10",
            "7",
            "a\0b",
            "é",
            "\uffff",
            "😀",
        ]
        items = [
            SessionItem(app.app_id, session, kind, name, repr(name).encode())
            for session in (0, 1, 300)
            for kind in "Mas"
            for name in names
        ]
        shuffled = random.Random(1).sample(items, len(items))
        await store.save_session_items(shuffled)
        assert await store.list_session_items(app.app_id) == items
        await store.save_session_items([SessionItem(app.app_id, 1, "a", 7, None)])
        left = [item for item in items if (item.session, item.kind, item.item) != (1, "a", 7)]
        assert await store.list_session_items(app.app_id) == left

    async def test_s11_calls_made_at_once_count_in_their_order(self, store: Store, app: App) -> None:
        def calls(n: int) -> list[SessionItem]:
            return [SessionItem(app.app_id, s, "p", "state", b"%d" % n) for s in range(n % 5, 700)]

        await asyncio.gather(*[store.save_session_items(calls(n)) for n in range(30)])
        newest = [b"25", b"26", b"27", b"28", *[b"29"] * 696]
        assert [item.value for item in await store.list_session_items(app.app_id)] == newest

    # Routes

    async def test_s9_the_newer_claim_wins_and_the_older_epoch_can_do_nothing(
        self, store: Store, app: App
    ) -> None:
        await store.register(app.app_id, [NewDevice("a")])
        old = await claimed(store, app, 0)
        new = await claimed(store, app, 0, "node-2")
        assert new.epoch > old.epoch
        store.release_route(app.app_id, 0, old.epoch, START)
        assert list(await store.online(app.app_id)) == [0]
        store.release_route(app.app_id, 0, new.epoch, START + 1)
        store.release_route(app.app_id, 0, new.epoch, START + 2)
        assert not await store.online(app.app_id, BitMap([0, 1]))
        assert (await store.find_devices(app.app_id, ["a"]))["a"].last_online_at == START + 1

    async def test_routes_do_not_outlive_the_node_and_epochs_grow_over_a_restart(
        self, make_store: MakeStore, store: Store, app: App
    ) -> None:
        await store.register(app.app_id, [NewDevice("a"), NewDevice("b")])
        gone, route = await claimed(store, app, 0), await claimed(store, app, 1)
        store.release_route(app.app_id, 0, gone.epoch, START + 3)
        await store.close()
        again = await make_store()
        assert not await again.online(app.app_id)
        assert (await again.find_devices(app.app_id, ["a"]))["a"].last_online_at == START + 3
        assert (await claimed(again, app, 1)).epoch > route.epoch
        await again.close()

    async def test_a_route_names_the_node_while_it_holds(self, store: Store, app: App, other: App) -> None:
        await store.register(app.app_id, [NewDevice("a"), NewDevice("b"), NewDevice("c")])
        gone, there = await claimed(store, app, 0), await claimed(store, app, 1)
        store.release_route(app.app_id, 0, gone.epoch, START + 3)
        assert not await store.online(app.app_id, BitMap([0]))  # the release is done
        found = await store.find_routes(app.app_id, [0, 1, 2, 77])
        assert {devno: route.node for devno, route in found.items() if route.node} == {1: "node-1"}
        assert found[1].epoch == there.epoch
        assert await store.find_routes(other.app_id, [1]) == {}
        assert await store.find_routes(app.app_id, []) == {}

    async def test_a_claim_tells_whether_the_inbox_may_hold_something(
        self, make_store: MakeStore, store: Store, app: App
    ) -> None:
        assert not (await claimed(store, app, 0)).may_owe
        (appended,) = await store.append([push(app, [0, 1])])
        assert (await claimed(store, app, 0)).may_owe
        await owed(store, app, 0)
        assert (await claimed(store, app, 0)).may_owe
        await store.settle([Settled(app.app_id, appended.msg_id, False, [0])])
        await owed(store, app, 0, after=appended.msg_id)  # says nothing about what is before
        await owed(store, app, 0)
        assert not (await claimed(store, app, 0)).may_owe
        await store.close()
        again = await make_store()
        assert not (await claimed(again, app, 0)).may_owe
        assert (await claimed(again, app, 1)).may_owe
        await again.close()

    async def test_no_append_slips_past_a_fetch_that_found_nothing(self, store: Store, app: App) -> None:
        """Appends and fetches at the same time: afterwards whoever has a row may owe."""
        for turn in range(30):
            devnos = range(turn * 10, turn * 10 + 10)
            await asyncio.gather(
                *[store.append([push(app, [devno])]) for devno in devnos],
                *[owed(store, app, devno) for devno in devnos],
                *[owed(store, app, devno) for devno in devnos],
            )
            for devno in devnos:
                assert (await claimed(store, app, devno)).may_owe

    # Upkeep

    async def test_what_is_over_goes_and_the_report_stays_for_its_lifetime(
        self, store: Store, app: App, clock: Clock
    ) -> None:
        appended = await store.append(
            [push(app, [0], cid="c"), push(app, [0, 1, 2]), push(app, range(50), broadcast=True)]
        )
        ids = [a.msg_id for a in appended]
        await store.settle([Settled(app.app_id, ids[1], False, [2]), Settled(app.app_id, ids[2], True, [3])])
        await store.record_receipts([Receipt(app.app_id, ids[1], 2, "shown")])
        await store.record_events([BehaviourEvent(app.app_id, 0, "x", START, b"")])
        assert await store.expire(START) == 0
        clock.now = START + HOUR
        assert await expire_all(store, clock.now) > 0
        records = await store.find_messages(app.app_id, ids)
        assert [record.counts(clock.now)[DeliveryState.EXPIRED] for record in records.values()] == [1, 2, 49]
        clock.now = START + 8 * DAY
        await expire_all(store, clock.now)
        assert await store.list_events(app.app_id, 0, 10) == []
        assert len(await store.find_messages(app.app_id, ids)) == 3
        clock.now = START + 31 * DAY
        await expire_all(store, clock.now)
        assert await store.find_messages(app.app_id, ids) == {}
        clock.now = START  # and still no id comes again
        (fresh,) = await store.append([push(app, [0])])
        assert fresh.msg_id > max(ids)

    async def test_a_deleted_app_leaves_nothing_behind_and_others_whole(
        self, store: Store, app: App, other: App
    ) -> None:
        for one in (app, other):
            await store.register(one.app_id, [NewDevice("a", tags=frozenset({"x"}))])
            await store.append([push(one, [0], cid="c"), push(one, [0], broadcast=True)])
            await store.retain([Retained(one.app_id, "t", b"1", 0, b"", None)])
            await store.save_session_items([SessionItem(one.app_id, 1, "s", "a", b"1")])
        assert await store.delete_app(app.key)
        with pytest.raises(StoreError):
            await store.append([push(app, [0])])
        late = [SessionItem(one.app_id, 2, "s", "a", b"1") for one in (app, other)]
        await store.save_session_items(late)
        await expire_all(store, START)
        await store.save_session_items(late)
        assert await store.list_session_items(app.app_id) == []
        assert len(await store.list_session_items(other.app_id)) == 2
        assert await store.find_devices(app.app_id, ["a"]) == {}
        assert await store.live_broadcasts(app.app_id) == []
        assert await owed(store, app, 0) == []
        assert len(await owed(store, other, 0)) == 1
        assert len(await store.live_broadcasts(other.app_id)) == 1
        assert len(await store.list_retained(other.app_id)) == 1

    # Everything at once

    @pytest.mark.parametrize("seed", range(3))
    async def test_g4_every_delivery_has_one_state_after_many_concurrent_calls(
        self, store: Store, app: App, clock: Clock, seed: int
    ) -> None:
        dice = random.Random(seed)
        ids: dict[int, NewMessage] = {}

        async def append() -> None:
            messages = [
                push(
                    app,
                    dice.sample(range(20), dice.choice((1, 1, 1, 4))),
                    broadcast=dice.random() < 0.2,
                    ttl=dice.choice((10, HOUR)),
                    cid=str(dice.randrange(200)),
                )
                for _ in range(dice.randrange(1, 5))
            ]
            for answer, message in zip(await store.append(messages), messages, strict=True):
                if not answer.repeated:
                    ids[answer.msg_id] = message

        async def settle() -> None:
            chosen = dice.sample(sorted(ids), min(len(ids), 3))
            await store.settle(
                [
                    Settled(
                        app.app_id, i, ids[i].broadcast, dice.sample(range(20), 3), dice.sample(range(20), 1)
                    )
                    for i in chosen
                ]
            )

        async def route() -> None:
            devno = dice.randrange(20)
            answer = await claimed(store, app, devno)
            await owed(store, app, devno)
            store.release_route(app.app_id, devno, answer.epoch, clock.now)

        for turn in range(30):
            calls = [dice.choice((append, append, settle, route))() for _ in range(10)]
            await asyncio.gather(*calls, *([store.expire(clock.now)] if turn % 5 == 0 else []))
            clock.now += dice.choice((0, 0, 4))
        records = await store.find_messages(app.app_id, sorted(ids))
        assert records.keys() == ids.keys()
        waiting: dict[int, list[int]] = {devno: [] for devno in range(20)}
        for msg_id, record in records.items():
            assert record.targets == ids[msg_id].targets
            assert sum(record.counts(clock.now).values()) == len(record.targets)
            for devno in record.targets:
                if record.state(devno, clock.now) is DeliveryState.PENDING and not record.broadcast:
                    waiting[devno].append(msg_id)
        for devno, expected in waiting.items():
            assert await owed(store, app, devno) == expected

    async def test_a_closed_store_says_so(self, store: Store, app: App) -> None:
        await store.close()
        with pytest.raises(StoreUnavailable, match="closed"):
            await store.append([push(app, [0])])
        with pytest.raises(StoreUnavailable, match="closed"):
            await store.find_app(app.key)
        with pytest.raises(StoreUnavailable, match="closed"):
            await claimed(store, app, 0)

    async def test_close_finishes_what_was_accepted(
        self, make_store: MakeStore, store: Store, app: App
    ) -> None:
        tasks = [asyncio.create_task(store.append([push(app, [n])])) for n in range(100)]
        await asyncio.sleep(0)  # each has made its call
        await store.close()
        ids = [(await task)[0].msg_id for task in tasks]
        again = await make_store()
        assert len(await again.find_messages(app.app_id, ids)) == 100
        await again.close()

    async def test_settings_are_those_that_were_set_last(self, store: Store, app: App) -> None:
        settings = AppSettings(
            restricted=True,
            allow_from=("10.0.0.0/8",),
            limits={"push_rate": None, "max_ids": 7},
            quiet_hours=QuietHours("22:00", "07:00", "Asia/Tokyo", "suppress"),
            frequency_caps=(FrequencyCap(3, "hour"), FrequencyCap(9)),
            callback=Callback("https://shop.example", ("clicked",), {"a": [1]}),
        )
        assert app.settings == AppSettings()
        assert await store.set_settings(app.key, settings) == replace(app, settings=settings)
        assert await store.find_app(app.key) == replace(app, settings=settings)
        assert await store.list_apps() == [replace(app, settings=settings)]
        assert await store.set_settings(app.key, AppSettings()) == app
        assert await store.set_settings("f" * 24, settings) is None
        assert await store.set_settings("f" * 24, AppSettings(), settings) is None
        await store.delete_app(app.key)
        assert await store.set_settings(app.key, settings) is None
        assert await store.set_settings(app.key, settings, AppSettings()) is None

    async def test_settings_change_only_from_those_that_are_named(self, store: Store, app: App) -> None:
        first, second = AppSettings(restricted=True), AppSettings(limits={"max_ids": 7})
        assert await store.set_settings(app.key, first, AppSettings()) == replace(app, settings=first)
        with pytest.raises(Conflict):
            await store.set_settings(app.key, second, AppSettings())
        assert await store.find_app(app.key) == replace(app, settings=first)
        assert await store.set_settings(app.key, second, first) == replace(app, settings=second)
        calls = [
            store.set_settings(app.key, AppSettings(limits={"max_ids": n}), second) for n in range(100, 110)
        ]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        (won,) = [answer for answer in answers if not isinstance(answer, Conflict)]
        assert await store.find_app(app.key) == won

    async def test_the_audit_log_is_kept_for_its_lifetime(self, store: Store, app: App) -> None:
        """Longer than anything else: a year."""
        entries = [
            AuditEntry(START + n, (0, app.app_id)[n % 2], "master", "::1", "key.create", f"k{n}", "done")
            for n in range(10)
        ]
        await store.record_audit(entries[:3])
        await store.record_audit(entries[3:])
        found = await store.list_audit(None, 0, 100)
        assert [entry for _, entry in found] == entries[::-1]
        assert [entry for _, entry in await store.list_audit(app.app_id, 0, 100)] == entries[::-2]
        assert await store.list_audit(None, found[3][0], 2) == found[4:6]
        assert await store.list_audit(app.app_id, found[-1][0], 2) == []
        await store.delete_app(app.key)
        await expire_all(store, START + 365 * DAY - 1)
        assert await store.list_audit(None, 0, 100) == found
        await expire_all(store, START + 365 * DAY + 4)
        assert [entry for _, entry in await store.list_audit(None, 0, 100)] == entries[:4:-1]
        await store.record_audit(entries[:1])
        assert (await store.list_audit(None, 0, 1))[0][0] > found[0][0]  # ids do not come again

    # Attributes, and names by the thousand

    async def test_attributes_are_kept_and_indexed(
        self, make_store: MakeStore, store: Store, app: App, other: App
    ) -> None:
        first = {"app_version": "2.3", "age": -1.5, "paying": True, "größe": "1"}
        (device,) = await store.register(app.app_id, [NewDevice("a", attributes=first)])
        await store.register(other.app_id, [NewDevice("a", attributes={"age": 7})])
        assert device.attributes == first
        change = DeviceChange(attributes={"app_version": "2.10", "age": None, "level": 3})
        changed = (await store.change_devices(app.app_id, {"a": change}))["a"]
        now = {"app_version": "2.10", "paying": True, "größe": "1", "level": 3}
        assert changed == replace(device, attributes=now)
        for name, values in {**first, **now}.items():
            for value in (values, first.get(name), now.get(name)):
                if value is None:
                    continue
                keys = list(terms(name, value))
                holds = now.get(name) == value
                lists = await store.postings(app.app_id, keys)
                assert all(list(bits) == [0] for bits in lists) == holds, (name, value)
        await store.close()
        again = await make_store()
        assert await again.find_devices(app.app_id, ["a"]) == {"a": changed}
        (age,) = await again.postings(other.app_id, [next(terms("age", 7))])
        assert list(age) == [0]
        await again.close()

    async def test_changes_that_wait_together_are_made_in_order(self, store: Store, app: App) -> None:
        await store.register(app.app_id, [NewDevice("a"), NewDevice("b")])

        def add(tag: str, *ids: str) -> Awaitable[object]:
            change = DeviceChange(add_tags=frozenset((tag,)), attributes={"last": tag})
            return store.change_devices(app.app_id, dict.fromkeys(ids, change))

        results = await asyncio.gather(
            add("x", "a"),
            add("y", "a", "b"),
            add("bad", "b", "nobody"),
            add("z", "b"),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [dict, dict, UnknownDevice, dict]
        found = await store.find_devices(app.app_id, ["a", "b"])
        assert {rid: (device.tags, device.attributes["last"]) for rid, device in found.items()} == {
            "a": ({"x", "y"}, "y"),
            "b": ({"y", "z"}, "z"),
        }
        lists = await store.postings(app.app_id, [(Term.TAG, tag) for tag in ("x", "y", "z", "bad")])
        assert [list(bits) for bits in lists] == [[0], [0, 1], [1], []]
        lists = await store.postings(app.app_id, [(Term.ATTRIBUTE, f"last\0={tag}") for tag in "xyz"])
        assert [list(bits) for bits in lists] == [[], [0], [1]]

    async def test_names_are_resolved_by_the_thousand(self, store: Store, app: App, other: App) -> None:
        devices = [NewDevice(f"d{n}", alias=f"ä{n % 7}") for n in range(3000)]
        await store.register(app.app_id, devices)
        await store.register(other.app_id, devices[:1])
        names = [f"d{n}" for n in range(0, 5000, 2)]
        assert await store.resolve_bitmap(app.app_id, names) == BitMap(range(0, 3000, 2))
        assert await store.resolve_bitmap(app.app_id, ["", '"', "d1", "d1", "d\0"]) == BitMap([1])
        assert await store.resolve_bitmap(app.app_id, []) == BitMap()
        assert await store.resolve_bitmap(other.app_id, names) == BitMap([0])
        found = await store.union_bitmap(app.app_id, Term.ALIAS, ["ä1", "ä3", "ä1", "nobody"])
        assert found == BitMap([n for n in range(3000) if n % 7 in (1, 3)])
        found.clear()
        assert len(await store.union_bitmap(app.app_id, Term.ALIAS, ["ä1"])) == 429
        assert await store.union_bitmap(app.app_id, Term.TAG, ["ä1"]) == BitMap()
        assert await store.union_bitmap(other.app_id, Term.ALIAS, ["ä1", "ä0"]) == BitMap([0])
        await store.change_devices(app.app_id, {"d1": DeviceChange(alias="")})
        assert 1 not in await store.union_bitmap(app.app_id, Term.ALIAS, ["ä1"]), "S10"

    # Files

    async def test_a_file_is_read_as_it_was_written(
        self, make_store: MakeStore, store: Store, app: App, other: App
    ) -> None:
        pieces = [b"x" * PIECE, b"", b"y"]
        assert await store.files.write(app.app_id, "f", _each(pieces)) == PIECE + 1
        assert await store.files.write(other.app_id, "f", _each([b"z"])) == 1
        for owner in (app, other):
            await store.records.save([RecordChange(owner.app_id, "file", "f", b"{}", 0)])
        await store.close()
        again = await make_store()
        assert [piece async for piece in again.files.read(app.app_id, "f")] == pieces
        await again.files.remove(app.app_id, "f")
        assert [piece async for piece in again.files.read(app.app_id, "f")] == []
        assert [piece async for piece in again.files.read(other.app_id, "f")] == [b"z"]
        await again.files.remove(app.app_id, "f")  # once more does nothing
        await again.close()

    async def test_a_file_that_fails_leaves_nothing(self, store: Store, app: App) -> None:
        async def broken() -> AsyncIterator[bytes]:
            yield b"x"
            raise ValueError("the peer went away")

        with pytest.raises(ValueError, match="went away"):
            await store.files.write(app.app_id, "f", broken())
        with pytest.raises(StoreError, match="at most 65536 bytes"):
            await store.files.write(app.app_id, "g", _each([b"x", b"x" * (PIECE + 1)]))
        for file_id in ("f", "g"):
            assert [piece async for piece in store.files.read(app.app_id, file_id)] == []

    # Callbacks

    async def _tell(self, store: Store, app: App, count: int = 1) -> list[int]:
        """So many deliveries to device 0 of messages with a callback."""
        await store.register(app.app_id, [NewDevice("d0"), NewDevice("d1")])
        callback = Callback("http://example.com/", ("delivered",), {"a": 1})
        messages = [push(app, [0], callback=callback) for _ in range(count)]  # type: ignore[arg-type]
        msg_ids = [appended.msg_id for appended in await store.append(messages)]
        await store.settle([Settled(app.app_id, m, False, (0,), at=START + 1) for m in msg_ids])
        return msg_ids

    async def test_a_callback_event_is_claimed_for_a_lease(
        self, store: Store, app: App, clock: Clock
    ) -> None:
        msg_ids = await self._tell(store, app, 3)
        assert await store.callbacks.claim(START, 60, 10) == [], "not before it happened"
        first, second = await store.callbacks.claim(START + 1, 60, 2)
        assert (first.msg_id, second.msg_id) == (msg_ids[0], msg_ids[1])
        assert (first.event, first.at, first.devnos, first.attempts) == (
            "delivered",
            START + 1,
            BitMap([0]),
            0,
        )
        assert first.callback == Callback("http://example.com/", ("delivered",), {"a": 1})
        [third] = await store.callbacks.claim(START + 1, 60, 10)
        assert await store.callbacks.claim(START + 60, 60, 10) == []
        await store.callbacks.done([first.event_id])
        again = await store.callbacks.claim(START + 61, 60, 10)
        assert [event.event_id for event in again] == [second.event_id, third.event_id]

    async def test_callback_events_fail_are_parked_and_come_back(
        self, store: Store, app: App, other: App
    ) -> None:
        await self._tell(store, app, 2)
        await self._tell(store, other)
        one, two, three = await store.callbacks.claim(START + 1, 60, 10)
        await store.callbacks.failed([one.event_id], START + 5, "HTTP 500")
        await store.callbacks.failed([two.event_id], None, "HTTP 410")
        await store.callbacks.postpone([three.event_id], START + 9)
        assert await store.callbacks.counts(app.app_id) == (1, 1)
        assert await store.callbacks.counts(0) == (2, 1)
        [due] = await store.callbacks.claim(START + 5, 60, 10)
        assert (due.event_id, due.attempts, due.error) == (one.event_id, 1, "HTTP 500")
        [late] = await store.callbacks.claim(START + 9, 60, 10)
        assert (late.event_id, late.attempts) == (three.event_id, 0)
        [parked] = await store.callbacks.list_parked(app.app_id, 0, 10)
        assert (parked.event_id, parked.attempts, parked.error) == (two.event_id, 1, "HTTP 410")
        assert await store.callbacks.list_parked(app.app_id, two.event_id, 10) == []
        assert await store.callbacks.list_parked(other.app_id, 0, 10) == []
        assert await store.callbacks.retry(other.app_id, START) == 0
        assert await store.callbacks.retry(app.app_id, START + 10) == 1
        [back] = await store.callbacks.claim(START + 10, 60, 10)
        assert (back.event_id, back.attempts) == (two.event_id, 0)
        await store.callbacks.failed([back.event_id], None, "")
        assert await store.callbacks.drop_parked(other.app_id) == 0
        assert await store.callbacks.drop_parked(app.app_id) == 1
        assert await store.callbacks.counts(app.app_id) == (1, 0)

    async def test_callback_events_survive_and_their_ids_are_not_used_again(
        self, make_store: MakeStore, store: Store, app: App, clock: Clock
    ) -> None:
        await self._tell(store, app)
        [told] = await store.callbacks.claim(START + 1, 60, 1)
        await store.callbacks.done([told.event_id])
        await store.close()
        clock.now = START - DAY  # a clock that was put back
        again = await make_store()
        [msg_id] = await self._tell(again, app)
        [event] = await again.callbacks.claim(START + 1, 60, 10)
        assert event.msg_id == msg_id
        assert event.event_id > told.event_id
        await again.close()
        once_more = await make_store()
        assert [e.event_id for e in await once_more.callbacks.claim(START + 61, 60, 10)] == [event.event_id]
        await once_more.close()

    async def test_a_part_is_told_as_its_whole(self, store: Store, app: App) -> None:
        await store.register(app.app_id, [NewDevice(f"d{i}") for i in range(4)])
        callback = Callback("http://example.com/", ("delivered",))
        whole = NewMessage(
            app.app_id, b"{}", BitMap(range(4)), False, START, START + HOUR, paced=True, callback=callback
        )
        [public] = await store.append([whole])
        parts = [
            NewMessage(app.app_id, b"{}", BitMap(t), False, START, START + HOUR, part_of=public.msg_id)
            for t in ((0, 1), (2, 3))
        ]
        ids = [appended.msg_id for appended in await store.append(parts)]
        await store.settle(
            [
                Settled(app.app_id, ids[0], False, (0, 1, 3), at=START),  # 3 is no target of this part
                Settled(app.app_id, ids[1], False, (2,), at=START),
            ]
        )
        [event] = await store.callbacks.claim(START, 60, 10)
        assert (event.msg_id, event.devnos) == (public.msg_id, BitMap([0, 1, 2]))

    async def test_old_callback_events_and_those_of_deleted_apps_go(
        self, store: Store, app: App, other: App, clock: Clock
    ) -> None:
        await self._tell(store, app)
        await self._tell(store, other)
        await store.delete_app(other.key)
        assert [event.app_id for event in await store.callbacks.claim(START + 1, 0, 10)] == [app.app_id]
        await expire_all(store, START + 1)
        assert await store.callbacks.counts(0) == (1, 0)
        await expire_all(store, START + 8 * DAY)
        assert await store.callbacks.counts(0) == (0, 0)


async def _each(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece

    async def test_a_change_may_limit_what_a_device_has(self, store: Store, app: App) -> None:
        await store.register(app.app_id, [NewDevice("a", tags=frozenset("xy"), attributes={"level": 1.0})])
        more = {
            "a": DeviceChange(add_tags=frozenset("z"), most_tags=2),
            "b": DeviceChange(attributes={"name": "ann"}, most_attributes=1),
        }
        with pytest.raises(TooMany, match="tags: a device has at most 2, not 3"):
            await store.change_devices(app.app_id, {"a": more["a"]})
        with pytest.raises(TooMany, match="attributes: a device has at most 1, not 2"):
            await store.change_devices(app.app_id, {"a": more["b"]})
        swapped = DeviceChange(add_tags=frozenset("z"), remove_tags=frozenset("y"), most_tags=2)
        assert (await store.change_devices(app.app_id, {"a": swapped}))["a"].tags == frozenset("xz")

    async def test_true_and_one_are_different_values_of_an_attribute(self, store: Store, app: App) -> None:
        await store.register(app.app_id, [NewDevice("a", attributes={"vip": 1.0})])
        for value in (True, 0.0, False, 1.0, True, None):
            device = (await store.change_devices(app.app_id, {"a": DeviceChange(attributes={"vip": value})}))[
                "a"
            ]
            expected = {} if value is None else {"vip": value}
            found = (await store.find_devices(app.app_id, ["a"]))["a"]
            assert repr(found.attributes) == repr(device.attributes) == repr(expected)
            both = [*terms("vip", True), *terms("vip", 1.0)]
            now = set(terms("vip", value)) if value is not None else set()
            lists = await store.postings(app.app_id, both)
            assert {term for term, devnos in zip(both, lists, strict=True) if devnos} == now & set(both)
