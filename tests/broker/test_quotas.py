"""Plan limits: what is counted, what is refused, and what a restart remembers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import ApiError
from broker.limits import Limits
from broker.model import App, AppSettings
from broker.store_sqlite import SqliteStore
from broker.tenants.quotas import Quotas, Spent

DAY = 86_400.0
NOON = 1_793_448_000.0  # 2026-10-31 12:00 UTC


class Clock:
    now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(tmp_path / "data.db")
    await store.open()
    yield store
    await store.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def _refused(quotas: Quotas, app: App, pushes: int = 1, broadcasts: int = 0) -> int:
    with pytest.raises(ApiError) as error:
        await quotas.spend(app, pushes, broadcasts)
    assert error.value.http_status == 403
    return error.value.code


async def test_off_is_off(store: SqliteStore) -> None:
    app = await store.create_app("shop")
    assert not Quotas(store).applies(app)
    for limits in (
        Limits(daily_pushes=1),
        Limits(monthly_pushes=1),
        Limits(daily_broadcasts=1),
        Limits(max_targets=1),
    ):
        assert Quotas(store, limits).applies(app)


async def test_a_day_and_a_month_end(store: SqliteStore, clock: Clock) -> None:
    app = await store.create_app("shop")
    quotas = Quotas(store, Limits(daily_pushes=3, monthly_pushes=5, daily_broadcasts=1), clock)
    await quotas.spend(app, 2, 1)
    assert await _refused(quotas, app, 2) == 2006
    assert await _refused(quotas, app, 1, 1) == 2008
    await quotas.spend(app)
    assert await _refused(quotas, app) == 2006
    clock.now += DAY  # the 1st of November
    await quotas.spend(app, 3, 1)
    clock.now += DAY
    assert await _refused(quotas, app, 3) == 2007
    await quotas.spend(app, 2)
    assert await _refused(quotas, app) == 2007
    await quotas.close()


async def test_what_is_refused_is_not_counted(store: SqliteStore, clock: Clock) -> None:
    app = await store.create_app("shop")
    quotas = Quotas(store, Limits(daily_pushes=3), clock)
    assert await _refused(quotas, app, 4) == 2006
    quotas.refund(app, await quotas.spend(app, 3), 1)
    await quotas.spend(app, 1)
    assert await _refused(quotas, app) == 2006
    await quotas.close()


@pytest.mark.parametrize("nights", [1, 2])  # into the 31st, and into the next month
async def test_what_is_given_back_after_midnight_is_yesterdays(
    store: SqliteStore, clock: Clock, nights: int
) -> None:
    clock.now -= DAY
    app = await store.create_app("shop")
    quotas = Quotas(store, Limits(daily_pushes=2, daily_broadcasts=2, monthly_pushes=2), clock)
    day = await quotas.spend(app, 2, 2)
    clock.now += nights * DAY
    quotas.refund(app, day, 2, 2)
    await quotas.spend(app, 2, 2)
    assert await _refused(quotas, app) == 2006
    await quotas.close()


async def test_a_restart_remembers(store: SqliteStore, clock: Clock) -> None:
    app = await store.create_app("shop")
    limits = Limits(daily_pushes=3)
    quotas = Quotas(store, limits, clock)
    await quotas.spend(app, 3)
    await quotas.close()
    assert await _refused(Quotas(store, limits, clock), app) == 2006


async def test_two_brokers_add_up(store: SqliteStore, clock: Clock) -> None:
    app = await store.create_app("shop")
    limits = Limits(daily_pushes=10)
    one, two = Quotas(store, limits, clock), Quotas(store, limits, clock)
    for _ in range(3):
        await one.spend(app, 1)
        await two.spend(app, 2)
        await one.save()
        await two.save()  # the record is newer than it knew: read again
        await two.save()
    await one.close()
    await two.close()
    after = Quotas(store, limits, clock)
    assert await _refused(after, app, 2) == 2006
    await after.spend(app, 1)
    await after.close()


async def test_a_push_for_too_many_devices(store: SqliteStore) -> None:
    app = await store.create_app("shop")
    quotas = Quotas(store, Limits(max_targets=10))
    quotas.check_targets(app, 10)
    with pytest.raises(ApiError) as error:
        quotas.check_targets(app, 11)
    assert (error.value.code, error.value.http_status) == (2005, 403)
    Quotas(store).check_targets(app, 10_000_000)


async def test_a_restricted_app_pushes_nothing(store: SqliteStore) -> None:
    app = await store.create_app("shop")
    app = replace(app, settings=AppSettings(restricted=True))
    quotas = Quotas(store)
    assert quotas.applies(app)
    assert await _refused(quotas, app) == 2003


async def test_an_app_may_have_limits_of_its_own(store: SqliteStore, clock: Clock) -> None:
    app = await store.create_app("shop")
    quotas = Quotas(store, Limits(daily_pushes=1), clock)
    generous = replace(app, settings=AppSettings(limits={"daily_pushes": None}))
    strict = replace(app, settings=AppSettings(limits={"daily_pushes": 2}))
    assert not quotas.applies(generous)
    await quotas.spend(generous, 2)
    assert await _refused(quotas, strict) == 2006
    await quotas.close()


async def test_counts_of_a_deleted_app_are_let_go(
    store: SqliteStore, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    app = await store.create_app("shop")
    quotas = Quotas(store, Limits(daily_pushes=5), clock)
    await quotas.spend(app)
    await store.delete_app(app.key)
    await quotas.close()
    assert not caplog.records


async def test_a_store_that_is_away_gets_the_count_later(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqliteStore(tmp_path / "other.db")
    await store.open()
    app = await store.create_app("shop")
    quotas = Quotas(store, Limits(daily_pushes=5), clock)
    await quotas.spend(app)
    await store.close()
    await quotas.save()
    assert "trying again" in caplog.text
    await quotas.close()


# Over HTTP

HELLO: dict[str, Any] = {"platform": "all", "audience": "all", "notification": {"alert": "hi"}}


async def _settle(service: Any, **settings: Any) -> None:
    for name in "abc":
        await service.register(name, tags=["red"])
    await service.apps.set_settings(service.app.key, AppSettings(**settings))


async def _push(service: Any, **more: Any) -> tuple[int, int]:
    answer = await service.call("POST", "/v3/push", HELLO | more)
    return answer.status, 0 if answer.status == 200 else answer.code


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"daily_pushes": 2}, 2006),
        ({"monthly_pushes": 2}, 2007),
        ({"daily_pushes": 9, "monthly_pushes": 2}, 2007),
    ],
)
async def test_a_push_over_a_quota_is_refused(service: Any, limits: dict[str, int], code: int) -> None:
    await _settle(service, limits=limits)
    assert await _push(service) == await _push(service) == (200, 0)
    assert await _push(service) == (403, code)
    service.now += 31 * DAY
    assert await _push(service) == (200, 0)


async def test_broadcasts_have_a_quota_of_their_own(start: Any) -> None:
    service = await start(limits=Limits(fanout_limit=2))
    await _settle(service, limits={"daily_broadcasts": 1})
    assert await _push(service) == (200, 0)
    assert await _push(service) == (403, 2008)
    assert await _push(service, audience={"tag": ["red"]}) == (403, 2008)
    assert await _push(service, audience={"registration_id": ["a", "b"]}) == (200, 0)
    service.now += DAY
    assert await _push(service) == (200, 0)


async def test_a_push_may_be_for_so_many(service: Any) -> None:
    await _settle(service, limits={"max_targets": 2})
    assert await _push(service) == (403, 2005)
    assert await _push(service, audience={"registration_id": ["a", "b"]}) == (200, 0)


async def test_a_restricted_app_is_told_so(service: Any) -> None:
    await _settle(service, restricted=True)
    assert await _push(service) == (403, 2003)
    assert (await service.call("GET", "/v3/received?msg_ids=1")).status == 200
    await service.apps.set_settings(service.app.key, AppSettings())
    assert await _push(service) == (200, 0)


async def test_what_was_repeated_or_refused_does_not_count(service: Any) -> None:
    await _settle(service, limits={"daily_pushes": 3})
    assert await _push(service, audience={"alias": ["nobody"]}) == (400, 1011)
    for _ in range(3):
        assert await _push(service, cid="x") == (200, 0)
    assert await _push(service) == await _push(service) == (200, 0)
    assert await _push(service) == (403, 2006)


async def test_each_push_of_a_batch_counts(service: Any) -> None:
    await _settle(service, limits={"daily_pushes": 2})
    item = {"platform": "all", "target": "a", "notification": {"alert": "hi"}}
    body = {"pushlist": {f"c{n}": item for n in range(3)}}
    answer = await service.call("POST", "/v3/push/batch/regid/single", body)
    assert (answer.status, answer.code) == (403, 2006)
    body["pushlist"].pop("c2")
    assert (await service.call("POST", "/v3/push/batch/regid/single", body)).status == 200
    assert await _push(service) == (403, 2006)


# The algebra of what was spent

DAYS = st.sampled_from(["2026-10-30", "2026-10-31", "2026-11-01", "2026-11-02", "2027-11-01"])
SPENDINGS = st.lists(st.tuples(DAYS, st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8)


def _model(spendings: Any) -> Spent:
    """What the last day and its month got."""
    last = max(day for day, *_ in spendings)
    return Spent(
        last,
        sum(pushes for day, pushes, _ in spendings if day == last),
        sum(broadcasts for day, _, broadcasts in spendings if day == last),
        sum(pushes for day, pushes, _ in spendings if day[:7] == last[:7]),
    )


@given(SPENDINGS)
def test_the_order_of_spendings_does_not_matter(spendings: Any) -> None:
    total = Spent(spendings[0][0])
    for day, pushes, broadcasts in spendings:
        total = total.plus(Spent(day, pushes, broadcasts, pushes))
    assert total == _model(spendings)


@given(SPENDINGS, SPENDINGS)
def test_two_counts_add_up_to_one(left: Any, right: Any) -> None:
    assert _model(left).plus(_model(right)) == _model(left + right) == _model(right).plus(_model(left))
