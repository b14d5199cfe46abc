"""What every store must know of who was there. A mixin for the suites of store_contract.py; the store's days are
those of UTC."""

from __future__ import annotations

import pytest

from broker.model import Activity, App, BehaviourEvent, NewDevice, Receipt
from broker.store import Store
from tests.broker.store_contract import DAY, HOUR, START, Clock, MakeStore, claimed, expire_all, push

MIDNIGHT = START // DAY * DAY
ONLINE, ACTIVE = Activity.ONLINE, Activity.ACTIVE


async def online(store: Store, app: App, start: float, end: float) -> list[int]:
    return list(await store.active(app.app_id, ONLINE, start, end))


class ActivityContract:
    async def test_who_had_a_route_in_an_hour_was_online_in_it(
        self, store: Store, app: App, clock: Clock
    ) -> None:
        clock.now = START + 100
        first = await claimed(store, app, 3)
        await claimed(store, app, 70_000)
        clock.now += HOUR
        store.release_route(app.app_id, 3, first.epoch, clock.now)
        clock.now += 2 * HOUR
        hours = [START + n * HOUR for n in range(5)]
        assert [await online(store, app, hour, hour + 1) for hour in hours] == [
            [3, 70_000], [3, 70_000], [70_000], [70_000], [],
        ]  # fmt: skip

    async def test_a_stretch_takes_each_hour_that_it_touches(
        self, store: Store, app: App, clock: Clock
    ) -> None:
        await self._visit(store, app, 1, clock)
        clock.now += HOUR
        await self._visit(store, app, 2, clock)
        assert await online(store, app, START + HOUR - 1, START + HOUR) == [1]
        assert await online(store, app, START + HOUR - 1, START + HOUR + 1) == [1, 2]
        assert await online(store, app, START + HOUR, START + 2 * HOUR) == [2]
        assert await online(store, app, START - HOUR, START) == []
        counts = await store.active_counts(app.app_id, ONLINE, [(START, START + HOUR), (START, START + DAY)])
        assert counts == [1, 2]

    async def _visit(self, store: Store, app: App, devno: int, clock: Clock) -> None:
        claim = await claimed(store, app, devno)
        store.release_route(app.app_id, devno, claim.epoch, clock.now)

    async def test_a_person_was_there_if_an_event_a_click_or_a_dismissal_came(
        self, store: Store, app: App
    ) -> None:
        (appended,) = await store.append([push(app, range(5))])
        await store.record_receipts(
            [
                Receipt(app.app_id, appended.msg_id, devno, event, START)
                for devno, event in enumerate(("shown", "clicked", "dismissed"))
            ]
        )
        await store.record_events([BehaviourEvent(app.app_id, 4, "bought", START, b"")])
        assert list(await store.active(app.app_id, ACTIVE, START, START + 1)) == [1, 2, 4]
        assert await online(store, app, START, START + 1) == []

    async def test_s7_an_app_sees_only_its_own_devices(self, store: Store, app: App, other: App) -> None:
        await claimed(store, app, 1)
        assert await online(store, other, 0, START + DAY) == []

    async def test_closing_loses_nothing_of_it(
        self, make_store: MakeStore, store: Store, app: App, clock: Clock
    ) -> None:
        await claimed(store, app, 1)
        clock.now += HOUR
        await store.close()
        again = await make_store()
        assert [await online(again, app, START + n * HOUR, START + n * HOUR + 1) for n in range(3)] == [
            [1],
            [1],
            [],
        ]
        await claimed(again, app, 2)
        assert await online(again, app, START + HOUR, START + HOUR + 1) == [1, 2]
        await again.close()

    async def test_old_hours_become_days_and_go_after_their_lifetime(
        self, make_store: MakeStore, store: Store, app: App, clock: Clock
    ) -> None:
        clock.now = MIDNIGHT + 1.5 * HOUR
        await self._visit(store, app, 1, clock)
        clock.now = MIDNIGHT + 22.5 * HOUR
        await self._visit(store, app, 2, clock)
        clock.now = MIDNIGHT + 24.5 * HOUR
        await self._visit(store, app, 3, clock)
        await store.close()
        store = await make_store()
        clock.now = MIDNIGHT + 3 * DAY - 1
        await expire_all(store, clock.now)
        assert await online(store, app, MIDNIGHT + HOUR, MIDNIGHT + 2 * HOUR) == [1], "folded too early"
        clock.now = MIDNIGHT + 3 * DAY + HOUR
        await expire_all(store, clock.now)
        assert await online(store, app, MIDNIGHT + HOUR, MIDNIGHT + 2 * HOUR) == [1, 2]
        assert await online(store, app, MIDNIGHT, MIDNIGHT + DAY) == [1, 2]
        assert await online(store, app, MIDNIGHT + DAY, MIDNIGHT + 2 * DAY) == [3]
        clock.now = MIDNIGHT + 61 * DAY + HOUR
        await expire_all(store, clock.now)
        assert await online(store, app, MIDNIGHT, MIDNIGHT + DAY) == [1, 2]
        clock.now = MIDNIGHT + 62 * DAY + 4 * HOUR
        await expire_all(store, clock.now)
        assert await online(store, app, 0, clock.now) == [3]
        await store.close()

    async def test_how_many_were_registered_before(self, store: Store, app: App, clock: Clock) -> None:
        assert await store.registered_before(app.app_id, [0.0, START + DAY]) == [0, 0]
        for batch in range(7):
            clock.now = START + batch * 10
            await store.register(app.app_id, [NewDevice(f"{batch}-{n}") for n in range(batch)])
        times = [START + 20.0, START - 1, START + 20.5, START + 59, START + 61, START + 10]
        assert await store.registered_before(app.app_id, times) == [1, 0, 3, 15, 21, 0]

    async def test_a_deleted_app_takes_it_along(
        self, make_store: MakeStore, store: Store, app: App, other: App, clock: Clock
    ) -> None:
        await claimed(store, app, 1)
        await claimed(store, other, 2)
        await store.close()
        store = await make_store()
        await store.delete_app(app.key)
        await expire_all(store, clock.now)
        assert await online(store, app, 0, START + DAY) == []
        assert await online(store, other, 0, START + DAY) == [2]
        await store.close()

    @pytest.mark.parametrize("back", [10.0, HOUR, 30 * DAY])
    async def test_a_clock_that_is_put_back_adds_the_hours_it_goes_through(
        self, store: Store, app: App, clock: Clock, back: float
    ) -> None:
        await claimed(store, app, 1)
        clock.now -= back
        await claimed(store, app, 2)
        assert 2 in await online(store, app, clock.now, clock.now + 1)
        assert 1 in await online(store, app, clock.now, clock.now + 1)
