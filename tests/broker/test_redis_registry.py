"""Devices on Redis: several brokers that register and change the same ones, and what a crash leaves."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from broker.audiences.device_terms import changed
from broker.model import Device, DeviceChange, NewDevice, Term
from broker.redis.keys import of_app, of_partition
from broker.redis.names import DEVICES, TAGS, tag_of
from broker.redis.pages import device_of, entry_of
from broker.redis.registry import WRITE_SLICE
from broker.redis.scripts import load
from broker.store import StoreError, StoreUnavailable, UnknownDevice
from tests.broker.redis_index import APP, HOUR, START, Side, check_index, open_sides
from tests.broker.redis_rigs import Rig
from tests.broker.store_contract import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def sides(plain: Rig, clock: Clock) -> AsyncIterator[list[Side]]:
    async with open_sides(plain.url, clock) as sides:
        yield sides


@pytest.fixture
def side(sides: list[Side]) -> Side:
    return sides[0]


def add(*tags: str) -> DeviceChange:
    return DeviceChange(add_tags=frozenset(tags))


# Entries and names


@given(
    st.builds(
        Device,
        st.just(APP),
        st.just(5),
        st.text(min_size=1, max_size=64),
        st.sampled_from(("android", "ios", "other")),
        st.none() | st.text(min_size=1, max_size=40),
        st.frozensets(st.text(min_size=1, max_size=10), max_size=4),
        st.none() | st.text(min_size=1, max_size=10),
        st.integers(0, 2**31),
        st.floats(0, 1e10),
        st.none(),
        st.dictionaries(
            st.text(min_size=1, max_size=5),
            st.text() | st.booleans() | st.floats(allow_nan=False) | st.integers(-(2**53), 2**53),
            max_size=3,
        ),
    )
)
def test_a_device_comes_back_from_its_entry(device: Device) -> None:
    again = device_of(APP, 5, entry_of(device))
    assert again == device
    assert repr(again.attributes) == repr(device.attributes)  # true is not 1, 1 is not 1.0


async def test_buckets_grow_and_stay_packed(plain: Rig, side: Side) -> None:
    """Some thousand names behind one tag."""
    names = list(itertools.islice((f"n{i}" for i in range(10**6) if tag_of(f"n{i}") == 3), 3000))
    for i in range(0, len(names), 250):
        await side.names.reserve(APP, {name: int(name[1:]) for name in names[i : i + 250]})
    base = f"{{{APP}:3}}:{DEVICES}"
    buckets = int(plain.servers[0].command("GET", base))
    sizes = [plain.servers[0].command("HLEN", f"{base}{i}") for i in range(buckets)]
    assert sum(sizes) == len(names)
    assert max(sizes) <= 128
    assert sum(sizes) / buckets > 35, "half empty: each bucket costs a hundred bytes"
    for i in range(buckets):
        assert plain.servers[0].command("OBJECT", "ENCODING", f"{base}{i}") in ("listpack", "ziplist")
    found = await side.names.find(APP, DEVICES, [*names, "stranger"])
    assert found == {name: b"%d" % (-1 - int(name[1:])) for name in names}
    assert (await side.names.everything(APP, DEVICES)).keys() == set(names)


async def test_buckets_go_slice_by_slice(side: Side) -> None:
    names = [f"n{i}" for i in range(30_000)]
    await side.names.reserve(APP, {name: i for i, name in enumerate(names)})
    gone = 0
    while some := await side.names.purge(APP, (DEVICES,), TAGS):
        gone += some
    assert gone >= TAGS
    assert await side.names.everything(APP, DEVICES) == {}
    assert not await side.real.run("KEYS", f"*{{{APP}:*")


# Registration


async def test_two_brokers_agree_on_one_devno(sides: list[Side]) -> None:
    """And what both say is the device that is there."""
    for turn in range(10):
        ids = [f"{turn}-{n}" for n in range(7)]
        new = [[NewDevice(rid, alias=f"{n}-{rid}") for rid in ids] for n in range(2)]
        first, second = await asyncio.gather(
            *[side.registry.register(APP, devices) for side, devices in zip(sides, new, strict=True)]
        )
        assert first == second
        assert len({device.devno for device in first}) == len(ids)
    assert len(await check_index(sides[0])) == 70


async def test_a_name_that_was_only_reserved_is_no_device_and_is_completed(sides: list[Side]) -> None:
    one, other = sides
    await one.registry.register(APP, [NewDevice("first")])
    reserved = await one.registry._reserve(APP, ["late"], START)
    assert reserved == {"late": 1}
    for side in sides:
        assert await side.registry.resolve(APP, ["late", "first"]) == {"first": 0}
        assert await side.registry.resolve_bitmap(APP, ["late", "first"]) == BitMap([0])
        assert await side.registry.find_devices(APP, ["late"]) == {}
        assert await side.registry.names(APP, [0, 1]) == {0: "first"}
        with pytest.raises(UnknownDevice, match="late"):
            await side.registry.change_devices(APP, {"late": add("x")})
    assert (await other.registry.register(APP, [NewDevice("more")]))[0].devno == 2
    (device,) = await other.registry.register(APP, [NewDevice("late", tags=frozenset("x"))])
    assert (device.devno, device.tags) == (1, {"x"})
    assert await one.registry.resolve(APP, ["late"]) == {"late": 1}
    await check_index(one)


async def test_a_device_whose_name_was_not_confirmed_is_there(side: Side) -> None:
    (device,) = await side.registry.register(APP, [NewDevice("a")])
    await side.names._call(
        load("names_confirm"), APP, DEVICES, {tag_of("a"): ["a", str(-1 - device.devno)]}
    )  # as it was before
    assert await side.registry.resolve(APP, ["a"]) == {"a": 0}
    assert await side.registry.register(APP, [NewDevice("a", alias="other")]) == [device]


async def test_a_name_that_is_used_once_is_found_without_asking_again(side: Side) -> None:
    await side.registry.register(APP, [NewDevice("a")])
    assert await side.registry.resolve(APP, ["a"]) == {"a": 0}
    side.engine.calls.clear()
    assert await side.registry.resolve(APP, ["a"]) == {"a": 0}
    assert side.engine.calls == []


async def test_calls_of_one_turn_go_together(side: Side) -> None:
    calls = [side.registry.register(APP, [NewDevice(f"d{n}")]) for n in range(200)]
    devices = [devices[0] for devices in await asyncio.gather(*calls)]
    assert [device.devno for device in devices] == list(range(200))
    assert side.engine.calls.count("devices_write") == 200 // WRITE_SLICE


async def test_one_bad_call_does_not_fail_the_others(side: Side) -> None:
    bad = NewDevice("bad", attributes={"x": object()})  # type: ignore[dict-item]
    calls = [side.registry.register(APP, [new]) for new in (NewDevice("a"), bad, NewDevice("b"))]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(answer, list) for answer in answers] == [True, False, True]
    assert len(await check_index(side)) == 2


async def test_a_deleted_app_takes_no_devices(sides: list[Side]) -> None:
    one, other = sides
    app = await one.apps.create_app("shop")
    await one.registry.register(app.app_id, [NewDevice("a")])
    await one.apps.delete_app(app.key)
    for side in (one, other):  # the other has not heard of it
        with pytest.raises(StoreError, match="deleted"):
            await side.registry.register(app.app_id, [NewDevice("b")])


# Changes


async def test_changes_of_two_brokers_are_all_made(sides: list[Side]) -> None:
    await sides[0].registry.register(APP, [NewDevice("a"), NewDevice("b")])
    calls = [
        sides[n % 2].registry.change_devices(APP, {"a": add(f"t{n}"), "b": add(f"t{n}")}) for n in range(40)
    ]
    await asyncio.gather(*calls)
    devices = await check_index(sides[0])
    assert all(device.tags == {f"t{n}" for n in range(40)} for device in devices.values())


async def test_a_change_is_made_anew_on_what_another_broker_left(sides: list[Side]) -> None:
    """The other's call falls between our reading and our writing, once in each of two partitions."""
    one, other = sides
    await one.registry.register(APP, [NewDevice(f"d{n}") for n in range(5000)])
    ids = ["d1", "d4999"]
    left = list(ids)

    async def come_between(name: str) -> None:
        if name == "devices_write" and left:
            await other.registry.change_devices(APP, {left.pop(): add("theirs")})

    one.engine.before = come_between
    revoked = replace(add("mine"), revoke_tokens=True)
    answer = await one.registry.change_devices(APP, dict.fromkeys(ids, revoked))
    one.engine.before = None
    assert {rid: (d.tags, d.token_generation) for rid, d in answer.items()} == {
        rid: ({"mine", "theirs"}, 1) for rid in ids
    }
    assert await other.postings((Term.TAG, "mine"), (Term.TAG, "theirs")) == [[1, 4999]] * 2


async def test_what_changes_nothing_writes_nothing(side: Side) -> None:
    await side.registry.register(APP, [NewDevice("a", tags=frozenset("x"))])
    side.engine.calls.clear()
    await side.registry.change_devices(APP, {"a": add("x")})
    assert "devices_write" not in side.engine.calls


async def test_dropping_a_term_from_many_devices(sides: list[Side]) -> None:
    one, other = sides
    await one.registry.register(
        APP, [NewDevice(f"d{n}", alias="us", tags=frozenset("xy")) for n in range(1500)]
    )
    dropped, _ = await asyncio.gather(
        one.registry.drop_term(APP, (Term.TAG, "x")),
        other.registry.change_devices(APP, {f"d{n}": add("z") for n in range(0, 1500, 100)}),
    )
    assert dropped == BitMap(range(1500))
    assert await other.postings((Term.TAG, "x"), (Term.TAG, "z")) == [[], list(range(0, 1500, 100))]
    assert await other.registry.drop_term(APP, (Term.ALIAS, "us"), BitMap([3, 9999])) == BitMap([3])
    devices = await check_index(one, 1500)
    assert all(device.tags >= {"y"} and "x" not in device.tags for device in devices.values())


# What a lost call leaves


async def _change_much(side: Side) -> None:
    registry = side.registry
    await registry.register(
        APP, [NewDevice("new", "ios", "me", frozenset(("x", "n")), None, {"level": 5, "v": "1.2"})]
    )
    change = DeviceChange(
        alias="you", set_tags=frozenset(("x", "z")), platform="ios", attributes={"level": 6, "v": None}
    )
    await registry.change_devices(APP, {"old": change, "new": change})


@pytest.mark.parametrize("carried_out", [False, True])
async def test_whatever_call_is_lost_the_index_is_that_of_the_devices_and_a_repetition_completes_it(
    plain: Rig, clock: Clock, carried_out: bool
) -> None:
    """The n-th call to Redis is lost, for every n; other brokers see what the devices say, at the latest a minute
    later."""
    for n in itertools.count():
        plain.flush()
        async with open_sides(plain.url, clock) as (one, other):
            old = NewDevice("old", alias="me", tags=frozenset(("x", "y")), attributes={"level": 3})
            await one.registry.register(APP, [old])
            await other.postings((Term.TAG, "x"), (Term.TAG, "z"), (Term.TAG, "y"))
            one.engine.lose, one.engine.carried_out = n, carried_out
            try:
                await _change_much(one)
                done = one.engine.lose is not None
            except StoreUnavailable:
                done = False
            one.engine.lose = None
            devices = await check_index(other)
            for side in (one, other):
                side.now += 61
                for tag in "xyzn":
                    has = [devno for devno, device in devices.items() if tag in device.tags]
                    assert await side.postings((Term.TAG, tag)) == [has], (n, tag)
            await _change_much(one)
            devices = await check_index(other)
            assert {d.registration_id: (d.alias, d.tags, d.platform) for d in devices.values()} == {
                rid: ("you", {"x", "z"}, "ios") for rid in ("old", "new")
            }
        if done:
            assert n > 10
            return


# Brokers against each other, and against a plain model


@dataclass(frozen=True)
class Register:
    new: NewDevice


@dataclass(frozen=True)
class Change:
    changes: tuple[tuple[str, DeviceChange], ...]


@dataclass(frozen=True)
class Drop:
    kind: Term
    value: str


Act = Register | Change | Drop
Model = dict[str, Device]

_rids = st.sampled_from("abcd")
_aliases = st.sampled_from(("me", "you"))
_tags = st.frozensets(st.sampled_from("xyz"), max_size=2)
_attributes = st.dictionaries(st.sampled_from(("n", "m")), st.sampled_from((1, True, -2.5, "1.2", "b")))
_changes = st.builds(
    DeviceChange,
    alias=st.none() | st.just("") | _aliases,
    platform=st.sampled_from((None, "ios")),
    set_tags=st.none() | _tags,
    add_tags=_tags,
    remove_tags=_tags,
    revoke_tokens=st.booleans(),
    attributes=st.dictionaries(st.sampled_from(("n", "m")), st.sampled_from((None, 1, "1.2"))),
)
_acts: st.SearchStrategy[Act] = st.one_of(
    st.builds(
        Register,
        st.builds(NewDevice, _rids, st.just("other"), st.none() | _aliases, _tags, st.none(), _attributes),
    ),
    st.dictionaries(_rids, _changes, min_size=1, max_size=2).map(lambda c: Change(tuple(c.items()))),
    st.builds(Drop, st.just(Term.TAG), st.sampled_from("xyz")),
    st.builds(Drop, st.just(Term.ALIAS), _aliases),
)


def act_on_model(model: Model, act: Act) -> Model:
    match act:
        case Register(new):
            if new.registration_id in model:
                return model
            device = Device(
                APP, 0, new.registration_id, new.platform, new.alias, new.tags, None, 0, START, None,
                new.attributes,
            )  # fmt: skip
            return model | {new.registration_id: device}
        case Change(changes):
            if any(rid not in model for rid, _ in changes):
                return model
            return model | {rid: changed(model[rid], change) for rid, change in changes}
        case Drop(kind, value):
            gone = DeviceChange(remove_tags=frozenset((value,)))
            if kind == Term.ALIAS:
                gone = DeviceChange(alias="")
            if kind == Term.TAG:
                has = {rid: device for rid, device in model.items() if value in device.tags}
            else:
                has = {rid: device for rid, device in model.items() if device.alias == value}
            return model | {rid: changed(device, gone) for rid, device in has.items()}


def call_of(side: Side, act: Act) -> Awaitable[Any]:
    match act:
        case Register(new):
            return side.registry.register(APP, [new])
        case Change(changes):
            return side.registry.change_devices(APP, dict(changes))
        case Drop(kind, value):
            return side.registry.drop_term(APP, (kind, value))


def _plain(devices: Sequence[Device]) -> dict[str, str]:
    return {
        d.registration_id: repr(
            (d.platform, d.alias, sorted(d.tags), d.token_generation, sorted(d.attributes.items()))
        )
        for d in devices
    }


async def _play(url: str, turns: Sequence[Sequence[tuple[int, Act]]]) -> None:
    async with open_sides(url, lambda: START) as sides:
        await sides[0].real.run("FLUSHALL")
        models: list[Model] = [{}]
        for turn in turns:
            calls = [call_of(sides[n], act) for n, act in turn]
            for answer in await asyncio.gather(*calls, return_exceptions=True):
                assert not isinstance(answer, BaseException) or isinstance(answer, UnknownDevice)
            for side in sides:  # what is remembered is not older than the calls that were answered
                await _check_answers(side)
            seen = _plain(list((await check_index(sides[0])).values()))
            orders = [
                _after(model, [act for _, act in order])
                for model in models
                for order in itertools.permutations(turn)
            ]
            models = [model for model in orders if _plain(list(model.values())) == seen][:1]
            assert models, "no order of these calls leads here"


def _after(model: Model, acts: Sequence[Act]) -> Model:
    for act in acts:
        model = act_on_model(model, act)
    return model


async def _check_answers(side: Side) -> None:
    known = await side.registry.find_devices(APP, list("abcd"))
    for tag in "xyz":
        has = sorted(device.devno for device in known.values() if tag in device.tags)
        assert await side.postings((Term.TAG, tag)) == [has]
    everyone = sorted(device.devno for device in known.values())
    assert await side.postings((Term.ALL, "")) == [everyone]
    for device in known.values():
        assert side.generations.of(APP).get(device.devno, 0) <= device.token_generation


def _is_serial(turn: Sequence[tuple[int, Act]]) -> bool:
    """A drop reads the list, then takes the term from these devices: others' calls may fall in between, and so may
    another partition's share of a change. With one of them in a turn there is one order for all."""
    return len(turn) == 1 or not any(isinstance(act, Drop) for _, act in turn)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 1), _acts), min_size=1, max_size=3).filter(_is_serial),
        max_size=8,
    )
)
def test_brokers_that_race_leave_what_one_order_of_their_calls_leaves(
    plain: Rig, turns: list[list[tuple[int, Act]]]
) -> None:
    asyncio.run(_play(plain.url, turns))


# Who was registered before, and what it costs


async def test_registered_before_over_partitions_and_holes(side: Side, clock: Clock) -> None:
    sizes = (10, 4100, 50, 4000, 1)
    for hour, size in enumerate(sizes):
        clock.now = START + hour * HOUR
        await side.registry.register(APP, [NewDevice(f"{hour}-{n}") for n in range(size)])
        await side.registry._reserve(
            APP, [f"hole-{hour}-{n}" for n in range(70)], clock.now
        )  # over two pages
    ends = [sum(sizes[: n + 1]) + 70 * n for n in range(len(sizes))]
    times = [START + hour * HOUR for hour in range(len(sizes) + 1)]
    found = await side.registry.registered_before(APP, times)
    starts = [sum(sizes[:n]) + 70 * n for n in range(len(sizes))]
    assert found[0] == 0
    for n in range(1, len(sizes)):
        assert ends[n - 1] <= found[n] <= starts[n], n  # what lies between are holes
    assert found[-1] == ends[-1]


async def test_a_device_costs_less_than_350_bytes(plain: Rig, side: Side) -> None:
    """With alias, five tags and its route; names of 20 and tags of 8 characters. The same at a million devices:
    docs/numbers.md."""
    count, dice = 20_000, random.Random(1)
    redis = plain.servers[0]
    before = _used(redis.command("INFO", "memory"))
    for first in range(0, count, 1000):
        new = [
            NewDevice(
                f"{dice.getrandbits(80):020x}",
                "android",
                f"user-{first + n:08d}",
                frozenset(f"tag-{dice.randrange(1000):04d}" for _ in range(5)),
            )
            for n in range(1000)
        ]
        await side.registry.register(APP, new)
    for devno in range(0, count, 4096):
        redis.command("SETRANGE", of_partition(APP, devno >> 12, "routes"), 12 * 4096 - 1, "x")
    assert int(redis.command("GET", of_app(APP, "devnos"))) == count
    assert (_used(redis.command("INFO", "memory")) - before) / count < 350


def _used(info: str) -> int:
    return int(next(line for line in info.splitlines() if line.startswith("used_memory:")).split(":")[1])


def test_names_go_to_all_tags() -> None:
    assert {tag_of(f"d{n}") for n in range(5000)} == set(range(TAGS))
