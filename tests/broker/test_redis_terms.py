"""The index on Redis: pieces, where a term is, and what a broker remembers while others change it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from broker.audiences.attributes import Question
from broker.model import DeviceChange, NewDevice, Term, TermKey
from broker.redis.engine import Engine
from broker.redis.keys import PARTITION, of_app, of_partition
from broker.redis.pieces import BITS, pack_places, unite, unpack_places
from broker.redis.scripts import load
from broker.redis.terms import places_of
from tests.broker.redis_index import APP, START, Side, open_sides
from tests.broker.redis_rigs import Rig

X: TermKey = (Term.TAG, "x")
EVERYONE: TermKey = (Term.ALL, "")


@pytest.fixture
async def sides(plain: Rig) -> AsyncIterator[list[Side]]:
    async with open_sides(plain.url, lambda: START) as sides:
        yield sides


@pytest.fixture
def side(sides: list[Side]) -> Side:
    return sides[0]


def add(*tags: str) -> DeviceChange:
    return DeviceChange(add_tags=frozenset(tags))


def take(*tags: str) -> DeviceChange:
    return DeviceChange(remove_tags=frozenset(tags))


async def fleet(side: Side, count: int) -> None:
    for first in range(0, count, 5000):
        await side.registry.register(
            APP, [NewDevice(f"d{n}") for n in range(first, min(first + 5000, count))]
        )


# Pieces

_places = st.integers(0, PARTITION - 1)
_sets = st.frozensets(_places, max_size=60) | st.builds(
    lambda start, count: frozenset(range(start, min(start + count, PARTITION))), _places, st.integers(0, 700)
)


def piece_of(places: frozenset[int]) -> bytes:
    if len(places) <= 255:
        return pack_places(sorted(places))
    return sum(1 << place for place in places).to_bytes(BITS, "little")


@given(st.dictionaries(st.integers(0, 70), _sets.filter(bool), max_size=40))
@example({p: frozenset(range(0, PARTITION, 3)) for p in range(40)})  # full containers
@example({0: frozenset(range(256)), 17: frozenset((0, 4095))})
def test_a_list_is_what_its_pieces_are(pieces: Mapping[int, frozenset[int]]) -> None:
    united = unite({partition: piece_of(places) for partition, places in pieces.items()})
    assert united == BitMap([p * PARTITION + place for p, places in pieces.items() for place in places])
    united.add(2**32 - 1)  # ours to change


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(_sets, _sets), min_size=1, max_size=6))
@example(
    [
        (frozenset(range(255)), frozenset()),
        (frozenset((4000,)), frozenset()),
        (frozenset(), frozenset((4000,))),
    ]
)
@example([(frozenset(range(300)), frozenset()), (frozenset(), frozenset(range(300)))])
@example([(frozenset(range(250)), frozenset()), (frozenset(range(250, 270)), frozenset((1, 2)))])
@example([(frozenset((n,)), frozenset()) for n in (5, 3, 9, 5)] + [(frozenset(), frozenset((3, 4)))])
def test_a_piece_follows_its_changes(
    plain: Rig, changes: list[tuple[frozenset[int], frozenset[int]]]
) -> None:
    async def play() -> None:
        engine = Engine(plain.url)
        await engine.open()
        try:
            await engine.run("FLUSHALL")
            has: set[int] = set()
            for on, off in changes:
                has = (has - off) | on
                piece = await _change_piece(engine, on, off)
                assert (set(unite({0: piece})) if piece else set()) == has
                assert piece is None or len(piece) == BITS or len(piece) <= BITS - 2
                assert piece is not None or not has
                assert len(has) <= 255 or len(piece or b"") == BITS
        finally:
            await engine.close()

    asyncio.run(play())


async def _change_piece(engine: Engine, on: frozenset[int], off: frozenset[int]) -> bytes | None:
    keys = [of_partition(APP, 0, what) for what in ("pages", "terms", "aliases")]
    term: list[Any] = ["t", pack_places(sorted(on)), pack_places(sorted(off - on))]
    assert (
        await engine.call(load("devices_write"), keys, [msgpack.packb(([], term, []), use_bin_type=False)])
        == 0
    )
    piece: bytes | None = await engine.run("HGET", keys[1], "t")
    return piece


async def test_entries_that_are_not_as_they_were_leave_all_as_it_was(plain: Rig, side: Side) -> None:
    keys = [of_partition(APP, 0, what) for what in ("pages", "terms", "aliases")]

    async def write(*devices: Any) -> Any:
        packed = msgpack.packb((devices, ["t", pack_places([5]), b""], [3, b"12345678"]), use_bin_type=False)
        return await side.real.call(load("devices_write"), keys, [packed])

    assert await write(0, b"", b"a", 31, b"", b"b", 4095, b"", b"c") == 0
    await side.real.run("UNLINK", *keys[1:])
    assert await write(0, b"a", b"A", 31, b"x", b"B", 4095, b"", b"C") == [32, 4096]
    read = load("devices_read")
    assert await side.real.call(read, keys[:1], [0, 31, 4095, 1]) == [b"a", b"b", b"c", b""]
    assert not await side.real.run("EXISTS", *keys[1:])
    assert await write(0, b"a", b"A" * 70_000, 31, b"", b"b") == 0, "a repetition is none"
    assert await side.real.call(read, keys[:1], [0, 31]) == [b"A" * 70_000, b"b"]
    assert unpack_places(await side.real.run("HGET", keys[1], "t")).tolist() == [5]


# Where a term is


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from((0, 3, 7, 90_000)), st.integers(-3, 40)), max_size=30))
def test_a_term_counts_as_there_where_it_is(plain: Rig, changes: list[tuple[int, int]]) -> None:
    async def play() -> None:
        async with open_sides(plain.url, lambda: START, 1) as (side,):
            await side.real.run("FLUSHALL")
            counts: dict[int, int | None] = {}  # None: for ever
            for partition, change in changes:
                (for_ever,) = await side.names.count(APP, [("t", "x", partition, change)])
                count = counts.get(partition, 0)
                if count is not None:
                    counts[partition] = None if count + change >= 64 else max(0, count + change)
                assert for_ever == (counts[partition] is None)
            words = (await side.names.find(APP, "t", ["x"])).get("x", b"")
            assert places_of(words) == sorted(p for p, count in counts.items() if count != 0)

    asyncio.run(play())


async def test_a_rare_term_is_read_where_it_is_and_nowhere_else(side: Side) -> None:
    await fleet(side, 5 * PARTITION)
    await side.registry.change_devices(APP, {"d9000": add("x")})
    await side.postings(EVERYONE)
    side.engine.calls.clear()
    assert await side.postings(X) == [[9000]]
    assert side.engine.calls.count("HMGET") == 1
    await side.registry.change_devices(APP, {"d9000": take("x")})
    side.terms.forget(APP)
    side.engine.calls.clear()
    assert await side.postings(X) == [[]]
    assert side.engine.calls.count("HMGET") == 0


async def test_a_common_term_is_not_counted_any_more(side: Side) -> None:
    new = [NewDevice(f"d{n}", tags=frozenset("x")) for n in range(100)]
    await side.registry.register(APP, new[:70])
    side.engine.calls.clear()
    await side.registry.register(APP, new[70:])
    await side.registry.change_devices(APP, {"d0": take("x")})
    assert not {"terms_up", "terms_down"} & set(side.engine.calls)
    await side.registry.drop_term(APP, X)
    assert await side.terms.list_terms(APP, Term.TAG) == [], "it is counted, and holds for nobody"
    assert "x" in await side.names.everything(APP, "t")


async def test_terms_are_listed_where_some_device_has_them(sides: list[Side]) -> None:
    side, other = sides
    await fleet(side, 3 * PARTITION)
    await side.registry.change_devices(APP, {f"d{n}": add("x", f"t{n % 7}") for n in range(0, 12_000, 100)})
    await side.registry.change_devices(APP, {"d12001": DeviceChange(alias="me", attributes={"a": "b"})})
    await side.terms.count_up(APP, {("t", "crashed", 0): 1, ("a", "crashed", 1): 1})
    await side.registry.drop_term(APP, (Term.TAG, "t3"))
    assert await other.terms.list_terms(APP, Term.TAG) == ["t0", "t1", "t2", "t4", "t5", "t6", "x"]
    assert await other.terms.list_terms(APP, Term.ALIAS) == ["me"]
    assert await other.terms.list_terms(APP, Term.PLATFORM) == ["other"]
    assert await other.terms.list_terms(APP, Term.ATTRIBUTE) == ["a\0", "a\0=b"]
    assert await other.terms.list_terms(APP + 1, Term.TAG) == []


# What is remembered


async def test_a_broker_sees_what_another_was_answered(sides: list[Side]) -> None:
    one, other = sides
    await fleet(one, 2 * PARTITION + 10)
    for n in range(0, 2 * PARTITION, 1000):
        before = await other.terms.postings(APP, [X, EVERYONE])
        copy = before[0].copy()
        await one.registry.change_devices(APP, {f"d{n}": add("x"), f"d{n + 1}": add("x")})
        await one.registry.change_devices(APP, {f"d{n + 1}": take("x")})
        assert await other.postings(X) == await one.postings(X) == [list(range(0, n + 1, 1000))]
        assert before[0] == copy, "results stay as they were"


async def test_what_did_not_change_is_not_read_again(sides: list[Side]) -> None:
    one, other = sides
    await fleet(one, 3 * PARTITION)
    await one.registry.change_devices(APP, {f"d{n}": add("x") for n in range(0, 3 * PARTITION, 10)})
    first = await other.terms.postings(APP, [X, EVERYONE])
    other.engine.calls.clear()
    again = await other.terms.postings(APP, [X, EVERYONE])
    assert other.engine.calls == ["ZRANGEBYSCORE"]
    assert all(a is b for a, b in zip(first, again, strict=True))
    await one.registry.change_devices(APP, {"d5001": add("x")})
    other.engine.calls.clear()
    assert 5001 in (await other.terms.postings(APP, [X]))[0]
    assert other.engine.calls == ["ZRANGEBYSCORE", "HMGET"]
    other.engine.calls.clear()
    assert len((await other.terms.postings(APP, [EVERYONE]))[0]) == 3 * PARTITION
    assert other.engine.calls == ["ZRANGEBYSCORE", "HMGET"], "the other list looks at the change, too"


async def test_a_read_that_was_overtaken_does_not_take_the_newer_ones_place(sides: list[Side]) -> None:
    one, other = sides
    await fleet(one, 10)
    await other.postings(X)
    await one.registry.change_devices(APP, {"d1": add("x")})
    held, go = asyncio.Event(), asyncio.Event()

    async def hold(name: str) -> None:
        if name == "HMGET" and not held.is_set():
            held.set()
            await go.wait()

    other.engine.before = hold
    slow = asyncio.ensure_future(other.terms.postings(APP, [X]))
    await held.wait()
    await one.registry.change_devices(APP, {"d2": add("x")})
    assert await other.postings(X) == [[1, 2]]
    go.set()
    await slow
    other.engine.before = None
    assert await other.postings(X) == [[1, 2]]


async def test_a_change_that_nobody_told_of_is_seen_after_a_minute(sides: list[Side]) -> None:
    """Its writer died between the two."""
    one, other = sides
    await fleet(one, 10)
    assert await other.postings(X) == [[]]
    one.registry._tell = _nothing  # type: ignore[method-assign,assignment]
    await one.registry.change_devices(APP, {"d1": add("x")})
    other.now += 61
    assert await other.postings(X) == [[1]]


async def _nothing(*_: object) -> None: ...


async def test_versions_that_redis_lost_are_noticed(plain: Rig, sides: list[Side]) -> None:
    one, other = sides
    await fleet(one, 10)
    await one.registry.change_devices(APP, {"d1": add("x")})
    assert await other.postings(X) == [[1]]
    plain.flush()
    assert await other.postings(X) == [[]]
    await fleet(one, 3)
    await one.registry.change_devices(APP, {"d2": add("x")})
    assert await other.postings(X) == [[2]]


async def test_memory_for_lists_is_bounded(sides: list[Side]) -> None:
    one, _ = sides
    one.terms._limit = 5_000
    await one.registry.register(APP, [NewDevice(f"d{n}", tags=frozenset((f"t{n}", "x"))) for n in range(100)])
    for n in range(100):
        assert await one.postings((Term.TAG, f"t{n}"), X) == [[n], list(range(100))]
    assert one.terms._size == sum(held.weight for held in one.terms._lists.values()) <= 5_000
    assert len(one.terms._lists) < 10


async def test_apps_do_not_see_each_other(side: Side) -> None:
    await side.registry.register(APP, [NewDevice("a", alias="me", tags=frozenset("x"))])
    for term in (X, EVERYONE, (Term.ALIAS, "me")):
        assert [list(bits) for bits in await side.terms.postings(APP + 1, [term])] == [[]]
    assert await side.terms.union(APP + 1, Term.ALIAS, ["me"]) == BitMap()


# Aliases, unions, numbers


async def test_an_alias_has_its_devices_wherever_they_are(sides: list[Side]) -> None:
    one, other = sides
    await fleet(one, 3 * PARTITION)
    alias = DeviceChange(alias="us")
    await one.registry.change_devices(APP, dict.fromkeys(["d1", "d2", "d5000", "d12287"], alias))
    assert await other.postings((Term.ALIAS, "us"), (Term.ALIAS, "them")) == [[1, 2, 5000, 12287], []]
    await one.registry.change_devices(
        APP, {"d5000": DeviceChange(alias="them"), "d2": DeviceChange(alias="")}
    )
    assert await other.postings((Term.ALIAS, "us"), (Term.ALIAS, "them")) == [[1, 12287], [5000]]
    words = await one.names.find(APP, Term.ALIAS, ["us"])
    assert places_of(words["us"]) == [0, 12287 >> 8], "where it is no more is forgotten"
    await one.registry.drop_term(APP, (Term.ALIAS, "them"))
    assert await one.names.find(APP, Term.ALIAS, ["them"]) == {}


async def test_unions_are_read_by_the_thousand(side: Side) -> None:
    tags = [frozenset((f"t{n % 900}",)) for n in range(6000)]
    await side.registry.register(APP, [NewDevice(f"d{n}", alias=f"a{n}", tags=tags[n]) for n in range(6000)])
    some = [f"t{n}" for n in range(0, 2000, 2)]
    assert await side.terms.union(APP, Term.TAG, some) == BitMap([n for n in range(6000) if n % 900 % 2 == 0])
    aliases = [f"a{n}" for n in range(1, 9000, 3)]
    assert await side.terms.union(APP, Term.ALIAS, aliases) == BitMap(range(1, 6000, 3))
    assert await side.terms.union(APP, Term.PLATFORM, ["other", "ios"]) == BitMap(range(6000))
    assert side.terms._lists == {}, "none is remembered"


async def test_numbers_are_compared_over_partitions(sides: list[Side]) -> None:
    one, other = sides
    await one.registry.register(
        APP, [NewDevice(f"d{n}", attributes={"level": n % 50}) for n in range(2 * PARTITION)]
    )
    question = Question("level", ">=", (48,))
    terms = list(question.terms())
    lists = dict(zip(terms, await other.terms.postings(APP, terms), strict=True))
    assert question.answer(lists) == BitMap([n for n in range(2 * PARTITION) if n % 50 >= 48])


async def test_versions_are_kept_by_partition(side: Side) -> None:
    await fleet(side, 2 * PARTITION)
    await side.registry.change_devices(APP, {"d0": add("x")})
    scores = await side.real.run("ZRANGE", of_app(APP, "changed"), 0, -1)
    assert scores[0] == b"1"
    assert set(scores) == {b"0", b"1", b"v"}
