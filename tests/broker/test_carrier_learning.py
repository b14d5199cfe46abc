"""What is counted of carriers: that it adds up over nodes, days and failures, and what is advised and shown of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from broker.admin import LocalActions
from broker.broker import Broker
from broker.bus_local import LocalBus
from broker.carriers import learning
from broker.carriers.command import carriers
from broker.carriers.learning import (
    DAY,
    EVERY,
    FRESH,
    HALF_LIFE,
    KEPT_DAYS,
    MAX_FOLDED,
    MAX_NETWORKS,
    Learning,
)
from broker.carriers.profile import CarrierProfile, Heartbeat
from broker.carriers.rows import ENDS, INSTALLATION, KIND, Row, day_of, key_of, node_of, read_row
from broker.carriers.silences import LEAST, LEAST_DEATHS, bin_of
from broker.carriers.tally import ACK_BOUNDS, LIFETIME_BOUNDS, SHAPE, Tally, place, quantile
from broker.errors import ApiError
from broker.metrics import Metrics
from broker.model import Record, RecordChange
from broker.store import Conflict, Store, StoreUnavailable
from broker.store_redis import RedisStore
from broker.store_sqlite import SqliteStore
from tests.patience import PATIENCE

NOON = 1_800_000_000.0 - 1_800_000_000 % DAY + DAY / 2

TIETONG = CarrierProfile(name="tietong", heartbeat=Heartbeat(start=240, least=30, most=1200))
MOBILE = CarrierProfile(name="mobile")


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "redis"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> AsyncIterator[Store]:
    made: Store = (
        SqliteStore(tmp_path / "holdfast.db", clock=clock)
        if request.param == "sqlite"
        else RedisStore(request.getfixturevalue("plain").url)
    )
    await made.open()
    yield made
    await made.close()


Node = Callable[[str], Awaitable[Learning]]


@pytest.fixture
async def node(store: Store, clock: Clock) -> AsyncIterator[Node]:
    """Opens one by this name."""
    async with AsyncExitStack() as stack:

        async def opened(name: str) -> Learning:
            made = Learning(store.records, clock)
            await made.open(name)
            stack.push_async_callback(made.close)
            return made

        yield opened


async def rows(store: Store) -> list[Record]:
    return list(await store.records.list(INSTALLATION, KIND))


# Tallies

tallies = st.builds(
    Tally,
    connects=st.integers(0, 99),
    silent=st.integers(0, 99),
    acks=st.lists(st.integers(0, 9), min_size=len(ACK_BOUNDS) + 1, max_size=len(ACK_BOUNDS) + 1),
    trip_seconds=st.integers(0, 99).map(float),
)


def added(*some: Tally) -> Tally:
    total = Tally()
    for tally in some:
        total.add(tally)
    return total


@given(tallies, tallies, tallies)
def test_tallies_add_up_in_any_order_and_grouping(a: Tally, b: Tally, c: Tally) -> None:
    assert added(a, b, c) == added(c, added(b, a))
    assert added(a) == a
    assert added(a, Tally()) == a


def test_adding_changes_the_one_and_not_the_other() -> None:
    one, other = Tally(), Tally()
    other.acks[3] = 1
    one.add(other)
    other.acks[3] = 5
    assert one.acks[3] == 1


@given(tallies)
def test_a_tally_is_stored_as_it_is(tally: Tally) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(tally), type=Tally) == tally


def test_a_tally_is_small() -> None:
    assert len(msgspec.msgpack.encode(Tally())) < 250


QUANTILES = [
    ([0, 0, 0], 0.5, None),
    ([2, 0, 0], 0.5, 0.5),  # evenly in the bucket from 0 to 1
    ([1, 1, 0], 0.5, 1.0),
    ([1, 1, 0], 0.99, 2.96),
    ([0, 0, 7], 0.5, 3.0),  # beyond the last bound
    ([0, 4, 0], 0.0, 1.0),
]


@pytest.mark.parametrize(("found", "share", "value"), QUANTILES)
def test_quantiles(found: list[int], share: float, value: float | None) -> None:
    got = quantile((1.0, 3.0), found, share)
    assert got == (None if value is None else pytest.approx(value))


@given(st.lists(st.floats(0, 60), min_size=1), st.floats(0, 1))
def test_a_quantile_lies_in_the_bucket_of_the_value_it_stands_for(values: list[float], share: float) -> None:
    found = [0] * (len(ACK_BOUNDS) + 1)
    for value in values:
        found[place(ACK_BOUNDS, value)] += 1
    got = quantile(ACK_BOUNDS, found, share)
    assert got is not None
    true = sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]
    assert abs(place(ACK_BOUNDS, got) - place(ACK_BOUNDS, true)) <= 1


# A node and its row


def live(one: Learning, profile: CarrierProfile = TIETONG, link: str = "wifi") -> None:
    """A device comes, and goes after a minute in which it got a push."""
    network = one.network(profile, link)
    network.connected()
    network.acked(0.15)
    network.survived(bin_of(50))
    network.delivered(4, 1)
    network.tcp(0.2, 10, 2)
    network.tcp(0.0, 0, 0)
    network.ended("taken", 60.0)


async def test_what_a_node_counts_is_in_its_row_of_the_day(store: Store, node: Node) -> None:
    one = await node("n1")
    live(one)
    one.network(TIETONG, "wifi").connected()
    await one.save()
    [record] = await rows(store)
    assert (day_of(record), node_of(record)) == (NOON // DAY, "n1")
    row = read_row(record)
    assert row.saved_at == NOON
    [(name, entry)] = row.entries.items()
    assert (name, entry.online, entry.heartbeat) == ("tietong/wifi", 1, 240)
    tally = entry.tally
    assert (tally.connects, tally.taken, tally.ends, tally.sent, tally.unanswered) == (2, 1, 1, 4, 1)
    assert tally.lifetimes[place(LIFETIME_BOUNDS, 60.0)] == 1
    assert tally.survived[bin_of(50)] == 1
    assert (tally.segments, tally.retransmits, tally.trips, tally.trip_seconds) == (10, 2, 1, 0.2)


async def test_a_row_grows_and_begins_anew_each_day(store: Store, node: Node, clock: Clock) -> None:
    one = await node("n1")
    for _ in range(3):
        live(one)
        await one.save()
    clock.now += DAY
    live(one)
    await one.save()
    counts = [read_row(record).entries["tietong/wifi"].tally.connects for record in await rows(store)]
    assert counts == [3, 1]


async def test_a_process_that_comes_back_on_the_same_day_goes_on_with_its_row(
    store: Store, node: Node
) -> None:
    for _ in range(2):
        one = await node("n1")
        live(one)
        await one.close()
    [record] = await rows(store)
    assert read_row(record).entries["tietong/wifi"].tally.connects == 2


async def test_who_saw_nothing_writes_nothing(store: Store, node: Node) -> None:
    one = await node("n1")
    one.network(TIETONG, "wifi")
    await one.save()
    assert await rows(store) == []
    live(one)
    await one.save()
    version = (await rows(store))[0].version
    await one.save()
    assert (await rows(store))[0].version == version


async def test_who_has_somebody_online_says_so_each_time(store: Store, node: Node, clock: Clock) -> None:
    one = await node("n1")
    one.network(TIETONG, "wifi").connected()
    for _ in range(2):
        await one.save()
        clock.now += EVERY
    assert read_row((await rows(store))[0]).saved_at == NOON + EVERY


async def test_what_was_not_saved_is_saved_the_next_time(
    store: Store, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await node("n1")
    live(one)
    await one.save()

    async def away(*_: object) -> None:
        live(one)  # life goes on meanwhile
        raise StoreUnavailable("away")

    for method in ("find", "save"):
        with monkeypatch.context() as patched:
            patched.setattr(store.records, method, away)
            live(one)
            with pytest.raises(StoreUnavailable):
                await one.save()
    await one.save()
    [record] = await rows(store)
    assert read_row(record).entries["tietong/wifi"].tally.connects == 5


async def test_two_with_one_name_lose_nothing(store: Store, node: Node) -> None:
    one, other = await node("n1"), await node("n1")
    live(one)
    live(other)
    for _ in range(2):  # one of them meets a Conflict
        await asyncio.gather(one.save(), other.save(), return_exceptions=True)
    [record] = await rows(store)
    assert read_row(record).entries["tietong/wifi"].tally.connects == 2


async def test_it_saves_and_reads_by_itself(
    store: Store, node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(learning, "EVERY", 0.0)
    told, reads, list_records = asyncio.Event(), 0, store.records.list

    async def listed(*where: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads == 1:
            raise StoreUnavailable("away")
        if other.heartbeat(TIETONG, "wifi").start != 240:
            told.set()
        return await list_records(*where)

    one, other = await node("n1"), await node("n2")
    monkeypatch.setattr(store.records, "list", listed)
    deadly(one)
    await asyncio.wait_for(told.wait(), PATIENCE)
    assert "not shared now: away" in caplog.text


async def test_networks_are_few_whatever_the_profiles_are_called(node: Node) -> None:
    one = await node("n1")
    for number in range(MAX_NETWORKS + 5):
        live(one, CarrierProfile(name=f"c{number}"))
    last = one.network(CarrierProfile(name="another"), "wifi")
    assert last.fresh.connects == 5
    assert one.network(CarrierProfile(name="c7"), "wifi").fresh.connects == 1


# Days that are over


async def test_the_rows_of_a_day_become_one(store: Store, node: Node, clock: Clock) -> None:
    nodes = [await node(f"n{number}") for number in range(3)]
    for one in nodes:
        live(one)
        live(one, MOBILE, "")
        await one.save()
    clock.now += DAY
    await nodes[0].read()
    assert len(await rows(store)) == 3  # somebody's clock may be late
    clock.now += DAY
    await asyncio.gather(*(one.read() for one in nodes))
    [record] = await rows(store)
    assert (day_of(record), node_of(record)) == (NOON // DAY, "")
    entries = read_row(record).entries
    assert {name: entry.tally.connects for name, entry in entries.items()} == {
        "mobile/unknown": 3,
        "tietong/wifi": 3,
    }
    assert all(entry.online == 0 for entry in entries.values())


async def test_who_comes_late_is_folded_in(store: Store, node: Node, clock: Clock) -> None:
    one, late = await node("n1"), await node("n2")
    live(one)
    await one.save()
    live(late)
    clock.now += 2 * DAY
    await one.read()
    clock.now -= 2 * DAY
    await late.save()
    clock.now += 2 * DAY
    for _ in range(2):
        await one.read()
        [record] = await rows(store)
        assert read_row(record).entries["tietong/wifi"].tally.connects == 2


async def test_many_rows_are_folded_piece_by_piece(store: Store, node: Node, clock: Clock) -> None:
    one = await node("n1")
    live(one)
    await one.save()
    [record] = await rows(store)
    changes = [
        RecordChange(INSTALLATION, KIND, key_of(day_of(record), f"m{n:04d}"), record.value, 0)
        for n in range(MAX_FOLDED)
    ]
    await store.records.save(changes)
    clock.now += 2 * DAY
    await one.read()
    assert len(await rows(store)) == 2
    await one.read()
    [record] = await rows(store)
    assert read_row(record).entries["tietong/wifi"].tally.connects == MAX_FOLDED + 1


async def test_a_day_is_forgotten_after_some_weeks(store: Store, node: Node, clock: Clock) -> None:
    one = await node("n1")
    deadly(one)
    await one.save()
    clock.now += KEPT_DAYS * DAY
    await one.read()
    assert len(await rows(store)) == 1
    clock.now += DAY
    await one.read()
    assert await rows(store) == []
    assert await one.report(KEPT_DAYS) == []


async def test_of_two_who_fold_one_is_faster(store: Store, node: Node, clock: Clock) -> None:
    one = await node("n1")
    live(one)
    await one.save()
    clock.now += 2 * DAY
    records, save = store.records, store.records.save

    async def beaten(changes: Any) -> Any:
        await save(changes)
        raise Conflict("another was faster")

    records.save = beaten  # type: ignore[method-assign]
    try:
        await one.read()
    finally:
        records.save = save  # type: ignore[method-assign]
    [record] = await rows(store)
    assert read_row(record).entries["tietong/wifi"].tally.connects == 1


OTHERS = [
    msgspec.msgpack.encode(Row((0, *SHAPE), NOON, {})),
    msgspec.msgpack.encode({"of": "another version"}),
    b"",
]


@pytest.mark.parametrize("value", OTHERS)
async def test_rows_of_another_version_are_left_out(
    store: Store, node: Node, clock: Clock, value: bytes
) -> None:
    today = int(NOON // DAY)
    await store.records.save([RecordChange(INSTALLATION, KIND, key_of(today, "old"), value, 0)])
    one = await node("n1")
    assert await one.report(1) == []
    assert one.heartbeat(TIETONG, "wifi") is TIETONG.heartbeat
    live(one)
    await one.save()
    clock.now += 2 * DAY
    await one.read()
    [record] = await rows(store)
    assert read_row(record).entries["tietong/wifi"].tally.connects == 1


# Advice


def deadly(one: Learning, link: str = "wifi", survived: int = 100, died: int = 200) -> None:
    """Enough is seen there to know of these silences, seconds."""
    network = one.network(TIETONG, link)
    for _ in range(LEAST):
        network.survived(bin_of(survived))
    for _ in range(LEAST_DEATHS):
        network.died(bin_of(died))


async def test_what_one_node_saw_is_advised_by_all(node: Node) -> None:
    one, other = await node("n1"), await node("n2")
    assert other.heartbeat(TIETONG, "wifi") is TIETONG.heartbeat
    deadly(one)
    await one.save()
    await other.read()
    assert other.heartbeat(TIETONG, "wifi") == Heartbeat(
        start=100, least=30, most=1200
    )  # 200 halved is more than 90
    assert other.longest(TIETONG, "wifi") == 100
    third = await node("n3")
    assert third.heartbeat(TIETONG, "wifi").start == 100


async def test_another_link_or_carrier_is_another_network(node: Node) -> None:
    one = await node("n1")
    deadly(one, "")
    await one.save()
    await one.read()
    assert one.heartbeat(TIETONG, "").start == 100
    for profile, link in ((TIETONG, "wifi"), (MOBILE, "")):
        assert one.heartbeat(profile, link) is profile.heartbeat
        assert one.longest(profile, link) == profile.heartbeat.most


async def test_the_profile_bounds_the_advice(node: Node) -> None:
    one = await node("n1")
    deadly(one)
    await one.save()
    await one.read()
    narrow = CarrierProfile(name="tietong", heartbeat=Heartbeat(start=240, least=150, most=300))
    assert one.heartbeat(narrow, "wifi").start == 150


async def test_little_from_each_of_many_is_enough_together(node: Node) -> None:
    nodes = [await node(f"n{number}") for number in range(4)]
    for one in nodes:
        network = one.network(TIETONG, "wifi")
        for _ in range(LEAST // 4):
            network.survived(bin_of(300))
        await one.save()
    assert nodes[0].heartbeat(TIETONG, "wifi").start == 240
    await nodes[0].read()
    assert nodes[0].heartbeat(TIETONG, "wifi").start == 270


async def test_what_was_seen_long_ago_counts_less_and_less(node: Node, clock: Clock) -> None:
    one = await node("n1")
    deadly(one)
    await one.save()
    clock.now += HALF_LIFE * DAY
    await one.read()
    assert one.heartbeat(TIETONG, "wifi").start == 240  # five deaths are not enough
    network = one.network(TIETONG, "wifi")
    for _ in range(LEAST_DEATHS // 2):
        network.died(bin_of(200))
    await one.save()
    await one.read()
    assert one.heartbeat(TIETONG, "wifi").start == 100


# What is shown


async def test_the_report_sums_the_days_and_counts_who_is_online_now(node: Node, clock: Clock) -> None:
    one, other = await node("n1"), await node("n2")
    live(one)
    await one.save()
    clock.now += DAY
    live(one)
    for each in (one, other):
        each.network(TIETONG, "wifi").connected()
    await other.save()
    [today] = await one.report(1)
    assert today == {
        "carrier": "tietong",
        "link": "wifi",
        "online": 2,
        "connects": 3,
        "ends": {"closed": 0, "told": 0, "silent": 0, "taken": 1},
        "lifetime_p50": pytest.approx(45.0),
        "silent_share": 1.0,
        "silences": {"survived": 1, "died": 0},
        "heartbeat": 240,
        "ack_p50": pytest.approx(0.15),
        "ack_p99": pytest.approx(0.199),
        "answered_share": 0.75,
        "round_trip": 0.2,
        "retransmit_share": 0.2,
    }
    [both] = await one.report(2)
    assert (both["online"], both["connects"]) == (2, 4)
    clock.now += FRESH + 1
    [later] = await one.report(1)
    assert later["online"] == 1  # the other has not been heard of since


async def test_a_report_says_nothing_of_what_was_not_counted(node: Node) -> None:
    one = await node("n1")
    one.network(MOBILE, "").connected()
    [found] = await one.report(1)
    nothing = {name for name, value in found.items() if value is None}
    assert nothing == {
        "lifetime_p50",
        "silent_share",
        "ack_p50",
        "ack_p99",
        "answered_share",
        "round_trip",
        "retransmit_share",
    }


async def test_prometheus_sees_what_this_process_counted(node: Node) -> None:
    one, metrics = await node("n1"), Metrics(process=False)
    one.count_in(metrics)
    for how in ENDS:
        one.network(TIETONG, "wifi").connected()
        one.network(TIETONG, "wifi").ended(how, 61.0)
    one.network(MOBILE, "").connected()
    one.network(MOBILE, "").acked(0.15, 3)
    await one.save()  # which resets nothing here
    value = metrics.registry.get_sample_value
    wifi, unknown = {"carrier": "tietong", "link": "wifi"}, {"carrier": "mobile", "link": "unknown"}
    assert value("holdfast_carrier_connects_total", wifi) == 4
    for how in ENDS:
        assert value("holdfast_carrier_ends_total", {**wifi, "how": how}) == 1
    assert value("holdfast_carrier_lifetime_seconds_bucket", {**wifi, "le": "60.0"}) == 0
    assert value("holdfast_carrier_lifetime_seconds_bucket", {**wifi, "le": "120.0"}) == 4
    assert value("holdfast_carrier_ack_seconds_count", unknown) == 3
    assert value("holdfast_carrier_connections", wifi) == 0
    assert value("holdfast_carrier_connections", unknown) == 1
    assert value("holdfast_carrier_heartbeat_seconds", wifi) == 240


# For the operator


async def test_days_that_are_none_are_refused(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "holdfast.db")
    await store.open()
    actions = LocalActions(Broker(store, LocalBus()), 100)
    assert await actions.list_carriers() == await actions.list_carriers("28") == []
    for wrong in ("", "0", "29", "-1", "x", "1111", "²"):
        with pytest.raises(ApiError, match="days: must be an integer from 1 to 28") as refused:
            await actions.list_carriers(wrong)
        assert refused.value.code == 1003
    await store.close()


async def _learn(data_dir: Path) -> None:
    store = SqliteStore(data_dir / "holdfast.db")
    await store.open()
    one = Learning(store.records)
    await one.open("n1")
    live(one)
    one.network(MOBILE, "").connected()
    await one.close()
    await store.close()


def _print(data_dir: Path, *words: str) -> str:
    done = CliRunner().invoke(carriers, [*words, "--data-dir", str(data_dir)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_prints_a_table_or_all_there_is(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    asyncio.run(_learn(tmp_path / "data"))
    heading, *lines = _print(tmp_path / "data").splitlines()
    assert heading.split()[:7] == ["carrier", "link", "online", "connects", "lifetime", "silent", "heartbeat"]
    assert [line.split()[:4] for line in lines] == [
        ["mobile", "unknown", "1", "1"],
        ["tietong", "wifi", "0", "1"],
    ]
    assert "100.00 %" in lines[1]
    assert "45 s" in lines[1]
    assert lines[0].split()[4:6] == ["-", "-"]
    learned = orjson.loads(_print(tmp_path / "data", "--json", "--days", "7"))
    assert [network["carrier"] for network in learned] == ["mobile", "tietong"]


def test_the_command_wants_a_store_only_where_it_needs_one(tmp_path: Path) -> None:
    nowhere = ["--data-dir", str(tmp_path / "nowhere")]
    assert "no data directory" in CliRunner().invoke(carriers, nowhere).output
    done = CliRunner().invoke(carriers, [*nowhere, "check"])
    assert (done.exit_code, "default" in done.output) == (0, True)
