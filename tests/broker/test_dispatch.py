"""Where devices are told to connect: the order, the signature, what devices report, and the two doors."""

from __future__ import annotations

import asyncio
import json
import random
from base64 import urlsafe_b64decode
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from broker.admin import AdminListener, Health, LocalActions, ProcessOverview
from broker.api.peers import Peers
from broker.broker import Broker
from broker.bus_local import LocalBus
from broker.carriers.catalog import CarrierError, Carriers
from broker.carriers.profile import Address, CarrierProfile, Heartbeat
from broker.command import dispatch as dispatch_command
from broker.command import make_store
from broker.config import load_config
from broker.dispatch import outcomes as outcomes_module
from broker.dispatch import udp
from broker.dispatch.dispatch import MAX_ANSWERS, REFRESH, Dispatch, Question
from broker.dispatch.document import MAX_ADDRESSES, as_url, canonical, compose
from broker.dispatch.outcomes import (
    ENOUGH_SOURCES,
    KIND,
    SYNC_PAUSE,
    WINDOW,
    Outcomes,
    Row,
    Tally,
    Tried,
    source_bit,
    source_of,
)
from broker.dispatch.ranking import SPREAD, Place, node_urls, places, rank, rank_nodes, variant_of
from broker.dispatch.signing import SigningKey, change_key, installation_key, next_key
from broker.dispatch.udp import AMPLIFICATION, MAX_DATAGRAM, MAX_WAITING, SOURCE_RATE, DispatchDoor
from broker.errors import ApiError
from broker.metrics import LoopLag, Metrics
from broker.model import NodeEntry, NodeInfo
from broker.store import StoreUnavailable
from broker.store_redis import RedisStore
from tests.broker.redis_rigs import Rig
from tests.broker.store_contract import Clock as StoreClock
from tests.patience import PATIENCE


def _verify(answer: dict[str, Any], public: str) -> None:
    """As docs/api.md says a device does it: with nothing of ours. Raises InvalidSignature."""
    signed = json.dumps(
        {k: v for k, v in answer.items() if k != "signature"}, sort_keys=True, separators=(",", ":")
    )
    key = Ed25519PublicKey.from_public_bytes(urlsafe_b64decode(public + "="))
    key.verify(urlsafe_b64decode(answer["signature"] + "=="), signed.encode())


# The order

A, B, C = (Address(host=f"{name}.example.com", port=8883, transport="tls", region=name) for name in "abc")
URL = {address: as_url(address) for address in (A, B, C)}
GONE, IDLE, BUSY, CROWDED = Place(0, 0, True), Place(1, 10, True), Place(2, 900, True), Place(1, 5000, True)


def _at(**there: Place) -> dict[str, Place]:
    return {f"{name}.example.com:8883": place for name, place in there.items()}


ORDERS: list[tuple[str, dict[str, Place], dict[Address, int], str]] = [
    # region, nodes, failing, order
    ("", {}, {}, "abc"),
    ("b", {}, {}, "bac"),
    ("x", {}, {}, "abc"),
    ("", _at(a=GONE), {}, "bca"),
    ("", _at(a=GONE, b=IDLE), {B: 2}, "cba"),
    ("", {}, {A: 2}, "bca"),
    ("", {}, {A: 2, B: 1}, "cba"),
    ("", {}, {A: 2, B: 2, C: 2}, "abc"),
    ("a", {}, {A: 2}, "bca"),
    ("", _at(a=BUSY, b=IDLE), {}, "abc"),
    ("", _at(a=CROWDED, b=IDLE), {}, "bca"),
    ("", _at(a=CROWDED, b=CROWDED, c=CROWDED), {}, "abc"),
    ("", _at(a=CROWDED, b=GONE), {}, "acb"),
    ("a", _at(a=CROWDED, b=IDLE), {}, "abc"),
]


@pytest.mark.parametrize(("region", "nodes", "failing", "order"), ORDERS)
def test_the_profiles_order_is_moved_by_health_reports_region_and_load(
    region: str, nodes: dict[str, Place], failing: dict[Address, int], order: str
) -> None:
    ranked = rank([A, B, C], region, nodes, {URL[address]: band for address, band in failing.items()})
    assert "".join(url.removeprefix("tls://")[0] for url in ranked) == order


a_place = st.builds(Place, st.integers(0, 3), st.floats(0, 1e6), st.booleans())


@given(
    hosts=st.lists(st.sampled_from("abcdefgh"), unique=True),
    region=st.sampled_from(["", "a", "b"]),
    there=st.dictionaries(st.sampled_from("abcdefgh"), a_place),
    bands=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 2)),
)
def test_nothing_that_is_known_of_an_address_leaves_it_out(
    hosts: list[str], region: str, there: dict[str, Place], bands: dict[str, int]
) -> None:
    addresses = [Address(host=host, port=1, region=host) for host in hosts]
    nodes = {f"{host}:1": place for host, place in there.items()}
    ranked = rank(addresses, region, nodes, {f"tcp://{host}:1": band for host, band in bands.items()})
    assert sorted(ranked) == sorted(map(as_url, addresses))


def _node(name: str, address: str, connections: int = 0, **more: Any) -> NodeEntry:
    live = more.pop("live", True)
    return NodeEntry(NodeInfo(name, address=address, connections=connections, **more), 1, 0.0, live)


def test_places_are_what_the_nodes_say() -> None:
    found = places(
        [
            _node("n-1", "n.example.com:1883", 10),
            _node("n-2", "n.example.com:1883", 30),
            _node("n-3", "n.example.com:1883", 500, draining=True),
            _node("dead", "d.example.com:8883", 7, live=False, tls=True),
            _node("broker", "b.example.com:1883", role="broker"),
            _node("mute", ""),
            _node("everywhere", "0.0.0.0:1883"),
            _node("everywhere6", "[::]:1883"),
        ]
    )
    assert found == {
        "n.example.com:1883": Place(2, 20.0, False),
        "d.example.com:8883": Place(0, 0.0, True),
    }
    assert node_urls(found) == {"tcp://n.example.com:1883", "tls://d.example.com:8883"}


def test_live_nodes_come_in_many_orders_the_less_busy_ones_early_in_most() -> None:
    nodes = {f"n{n}.example.com:1883": Place(1, 100.0 * n, False) for n in range(4)} | _at(a=GONE)
    orders = [rank_nodes(nodes, {}, variant) for variant in range(SPREAD)]
    assert {tuple(sorted(order)) for order in orders} == {
        tuple(f"tcp://n{n}.example.com:1883" for n in range(4))
    }
    first = [order[0] for order in orders]
    assert first.count("tcp://n0.example.com:1883") > SPREAD / 2  # it has no connection at all
    alike = {address: Place(1, 100.0, False) for address in nodes}
    assert len({rank_nodes(alike, {}, variant)[0] for variant in range(SPREAD)}) >= 3
    worst = rank_nodes(nodes, {"tcp://n0.example.com:1883": 2}, 0)[-1]
    assert worst == "tcp://n0.example.com:1883"


def test_callers_are_spread_over_the_orders() -> None:
    counts = [0] * SPREAD
    for n in range(1600):
        counts[variant_of(f"192.0.{n // 200}.{n % 200}")] += 1
    assert min(counts) > 50
    assert variant_of("192.0.2.1") == variant_of("192.0.2.1")


def test_ipv6_addresses_have_brackets() -> None:
    assert as_url(Address(host="2001:db8::1", port=8883, transport="wss")) == "wss://[2001:db8::1]:8883"
    there = {"[2001:db8::1]:8883": GONE}
    literal = Address(host="2001:db8::1", port=8883, transport="tls")
    assert rank([literal, A], "", there, {}) == [URL[A], as_url(literal)]


# The document

PROFILE = CarrierProfile(name="p", addresses=(A, B, C))
SEED = bytes(range(32))


def _content(**changes: Any) -> Any:
    content = compose(PROFILE, Heartbeat(), [URL[A], URL[B]], "a", 3600)
    return msgspec.structs.replace(content, **changes)


def test_an_answer_is_small_and_says_what_the_profile_does() -> None:
    signed = SigningKey(SEED).sign(_content(), 1_800_000_000.9)
    answer = json.loads(signed.raw)
    assert answer | {"signature": ""} == {
        "addresses": ["tls://a.example.com:8883", "tls://b.example.com:8883"],
        "carrier": "p",
        "heartbeat": "240 30 1200",
        "key": SigningKey(SEED).name,
        "made": 1_800_000_000,
        "reconnect": {"ban": 360_000, "base": 1000, "cap": 60_000, "parallel": 3, "stagger": 2500},
        "region": "a",
        "signature": "",
        "ttl": 3600,
        "v": 1,
    }
    assert len(signed.raw) < 450
    assert signed.etag == f'"{answer["signature"][:16]}"'


def test_an_answer_has_no_more_addresses_than_a_device_tries() -> None:
    urls = [f"tls://n{n}.example.com:8883" for n in range(20)]
    assert compose(PROFILE, Heartbeat(), urls, "", 60).addresses == tuple(urls[:MAX_ADDRESSES])


@given(st.sampled_from(sorted(json.loads(SigningKey(SEED).sign(_content(), 7).raw).keys() - {"signature"})))
def test_whatever_is_changed_the_signature_is_wrong(name: str) -> None:
    key = SigningKey(SEED)
    answer = json.loads(key.sign(_content(), 7).raw)
    _verify(answer, key.public)
    changed = {**answer, name: 8 if name != "addresses" else answer[name][::-1]}
    with pytest.raises(InvalidSignature):
        _verify(changed, key.public)
    with pytest.raises(InvalidSignature):
        _verify(answer, SigningKey(SEED[::-1]).public)


names = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)


@given(st.recursive(st.integers(0, 2**53) | names, lambda inner: st.dictionaries(names, inner, max_size=5)))
def test_the_signed_bytes_are_those_of_any_canonical_json(value: Any) -> None:
    fields = {"value": value, "a": 1}
    wanted = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert canonical(fields) == wanted.encode()


def test_keys_are_text_that_can_be_copied() -> None:
    key = SigningKey(SEED)
    assert len(key.public) == 43
    assert len(urlsafe_b64decode(key.public + "=")) == 32
    assert len(key.name) == 8


async def test_all_processes_have_one_key(service: Any) -> None:
    keys = await asyncio.gather(*(installation_key(service.store.records) for _ in range(5)))
    assert len({key.public for key in keys}) == 1
    assert (await installation_key(service.store.records)).public == keys[0].public


async def test_a_key_is_changed_after_the_next_one_was_given_out(service: Any, dispatch: Dispatch) -> None:
    records = service.store.records
    first = await installation_key(records)
    with pytest.raises(ValueError, match="there is no next key"):
        await change_key(records)
    assert (await _ask(dispatch, service))["key"] == first.name
    following = await next_key(records)
    assert (await next_key(records)).public == following.public != first.public
    service.now += REFRESH
    assert (await _ask(dispatch, service))["key"] == first.name  # it is not used yet
    assert (await change_key(records)).public == following.public
    service.now += REFRESH
    answer = await _ask(dispatch, service)  # the very process that had the first one
    assert answer["key"] == following.name
    _verify(answer, following.public)
    after = await next_key(records)
    assert after.public not in (first.public, following.public)


def test_the_key_is_changed_by_two_commands(tmp_path: Path) -> None:
    where = ("--data-dir", str(tmp_path))
    refused = CliRunner().invoke(dispatch_command, ["change-key", *where])
    assert (refused.exit_code, "there is no next key" in refused.output) == (1, True)
    first = _command("key", *where)
    following = _command("next-key", *where)
    assert _command("next-key", *where) == following != first
    assert _command("change-key", *where) == following
    assert _command("key", *where) == following


# What devices report

KNOWN = {URL[A], URL[B]}


def _outcomes(service: Any) -> Outcomes:
    return Outcomes(service.store.records)


def _tell(outcomes: Outcomes, sources: Sequence[str], now: float, *, failed: int = 1, ok: int = 0) -> None:
    for source in sources:
        outcomes.take("p", source, [Tried(URL[A], ok, failed)], KNOWN, now)


def _sources(count: int, start: int = 0) -> list[str]:
    """Callers whose bits in the sketch differ."""
    found: dict[int, str] = {}
    for n in range(start, start + 10_000):
        caller = f"10.{n >> 8}.{n & 255}.1"
        found.setdefault(source_bit(caller), caller)
        if len(found) == count:
            return list(found.values())
    raise AssertionError(f"only {len(found)} bits")


SOURCES: list[tuple[str, str]] = [
    ("192.0.2.77", "192.0.2.0/24"),
    ("::ffff:192.0.2.77", "192.0.2.0/24"),
    ("2001:db8:1:2::3", "2001:db8:1::/48"),
    ("", ""),
    ("nonsense", ""),
]


@pytest.mark.parametrize(("caller", "source"), SOURCES)
def test_a_source_is_the_network_of_one_customer(caller: str, source: str) -> None:
    assert source_of(caller) == source


def test_enough_sources_move_an_address_down_and_fewer_do_not(service: Any) -> None:
    outcomes = _outcomes(service)
    sources = _sources(ENOUGH_SOURCES)
    _tell(outcomes, sources[:-1], 0.0)
    assert outcomes.bands("p", 0.0) == {}
    _tell(outcomes, sources[-1:], 0.0)
    assert outcomes.bands("p", 0.0) == {URL[A]: 2}
    assert outcomes.bands("q", 0.0) == {}
    assert outcomes.failing(0.0) == 1


def test_one_source_is_one_source_however_much_and_often_it_tells(service: Any) -> None:
    outcomes = _outcomes(service)
    for n in range(1000):
        _tell(outcomes, [f"192.0.2.{n % 256}"], n * WINDOW / 100, failed=1_000_000)
    assert outcomes.taken == 10
    assert outcomes.ignored == 990
    assert outcomes.bands("p", 10 * WINDOW) == {}


def test_those_who_get_through_outweigh_those_who_say_they_do_not(service: Any) -> None:
    outcomes = _outcomes(service)
    _tell(outcomes, _sources(ENOUGH_SOURCES), 0.0)
    honest = [f"172.16.{n}.1" for n in range(3 * ENOUGH_SOURCES)]
    _tell(outcomes, honest, 0.0, ok=5, failed=0)
    assert outcomes.bands("p", 0.0) == {URL[A]: 1}  # a quarter fails
    _tell(outcomes, [f"172.17.{n}.1" for n in range(2 * ENOUGH_SOURCES)], 0.0, ok=5, failed=0)
    assert outcomes.bands("p", 0.0) == {}


def test_what_was_told_fades(service: Any) -> None:
    outcomes = _outcomes(service)
    _tell(outcomes, _sources(ENOUGH_SOURCES), 0.0)
    assert outcomes.bands("p", WINDOW) == {URL[A]: 2}
    assert outcomes.bands("p", 2 * WINDOW) == {}  # nobody says so any more
    half = ENOUGH_SOURCES // 2
    _tell(outcomes, _sources(half), 2 * WINDOW)
    _tell(outcomes, _sources(ENOUGH_SOURCES)[half:], 3 * WINDOW)
    assert outcomes.bands("p", 3 * WINDOW) == {URL[A]: 2}


def test_only_addresses_that_there_are_take_room(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = _outcomes(service)
    invented = [Tried(f"tls://x{n}.example.com:1", 0, 1) for n in range(100)]
    outcomes.take("p", "192.0.2.1", [*invented, Tried(URL[B], 0, 0)], KNOWN, 0.0)
    assert (outcomes.taken, outcomes.ignored, outcomes.carriers) == (0, 101, set())
    monkeypatch.setattr(outcomes_module, "MAX_HEARD", 3)
    _tell(outcomes, _sources(5), 0.0)
    assert outcomes.taken == 3
    _tell(outcomes, _sources(5), WINDOW)
    assert outcomes.taken == 6


sketches = st.integers(0, 2**64 - 1)
a_tally = st.builds(Tally, st.floats(0.25, 100), st.floats(0.25, 100), sketches, sketches)
a_row = st.builds(Row, st.integers(0, 6), st.dictionaries(st.sampled_from("abc"), a_tally))


def _sum(*rows: Row) -> Row:
    whole = Row(0)
    for row in rows:
        whole.add(row.copy())
    whole.age(6)
    return whole


@given(st.lists(a_row, min_size=2, max_size=5), st.randoms())
def test_it_does_not_matter_who_adds_first(rows: list[Row], chance: random.Random) -> None:
    """The same up to what has faded in between."""
    shuffled = list(rows)
    chance.shuffle(shuffled)
    first, second = _sum(*rows), _sum(*shuffled)
    assert first.window == second.window
    for name in first.tallies.keys() | second.tallies.keys():
        one, other = (row.tallies.get(name, Tally()) for row in (first, second))
        assert one.weight == pytest.approx(other.weight, abs=0.3)
        assert (one.sources, one.sources_before) == (other.sources, other.sources_before)


@given(a_tally, a_tally)
def test_sources_of_two_processes_are_united_and_not_counted_twice(one: Tally, other: Tally) -> None:
    sources = one.sources | other.sources
    one.add(other)
    one.add(other)
    assert one.sources == sources


@given(a_row, st.integers(0, 8))
def test_ageing_never_adds(row: Row, windows: int) -> None:
    before = row.copy()
    row.age(row.window + windows)
    assert row.tallies.keys() <= before.tallies.keys()
    for name, tally in row.tallies.items():
        assert tally.weight <= before.tallies[name].weight
        assert tally.sources.bit_count() + tally.sources_before.bit_count() <= (
            before.tallies[name].sources.bit_count() + before.tallies[name].sources_before.bit_count()
        )


async def test_processes_add_up_what_they_hear(service: Any) -> None:
    one, other = _outcomes(service), _outcomes(service)
    sources = _sources(ENOUGH_SOURCES)
    _tell(one, sources[:4], 0.0)
    _tell(other, sources[4:], 0.0)
    await asyncio.gather(one.sync(0.0), other.sync(0.0))  # one of them is slower, and tries again
    await other.sync(SYNC_PAUSE)
    await one.sync(SYNC_PAUSE)
    await other.sync(2 * SYNC_PAUSE)
    for outcomes in (one, other):
        assert outcomes.bands("p", 2 * SYNC_PAUSE) == {URL[A]: 2}
    record = await service.store.records.find(0, KIND, "p")
    row = msgspec.msgpack.decode(record.value, type=Row)
    assert row.tallies[URL[A]].failed == ENOUGH_SOURCES


async def test_telling_two_processes_makes_no_second_source(service: Any) -> None:
    one, other = _outcomes(service), _outcomes(service)
    few = _sources(ENOUGH_SOURCES - 1)
    for outcomes in (one, other):
        _tell(outcomes, few, 0.0)
        await outcomes.sync(0.0)
    await one.sync(SYNC_PAUSE)
    assert one.bands("p", SYNC_PAUSE) == {}


async def test_rows_that_have_faded_are_removed(service: Any) -> None:
    outcomes = _outcomes(service)
    _tell(outcomes, _sources(2), 0.0)
    await outcomes.sync(0.0)
    assert await service.store.records.count(0, KIND) == 1
    await outcomes.sync(20 * WINDOW)
    assert await service.store.records.count(0, KIND) == 0
    assert outcomes.carriers == set()


async def test_what_could_not_be_saved_is_saved_later(service: Any) -> None:
    records = _Moody(service.store.records)
    outcomes = Outcomes(records)  # type: ignore[arg-type]
    _tell(outcomes, _sources(ENOUGH_SOURCES), 0.0)
    records.away = {"save"}
    with pytest.raises(StoreUnavailable):
        await outcomes.sync(0.0)
    assert outcomes.bands("p", 0.0) == {URL[A]: 2}
    records.away = set()
    await outcomes.sync(0.0)
    assert outcomes.bands("p", 0.0) == {URL[A]: 2}
    assert await service.store.records.count(0, KIND) == 1


class _Moody:
    """Records or nodes of a real store; the calls named in `away` fail as those of one that is away."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.away: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return self._fail if name in self.away else getattr(self._real, name)

    async def _fail(self, *_: Any) -> Any:
        raise StoreUnavailable("the store is away")


# Answers

PROFILES = {
    "default.toml": 'name = "default"\n',
    "mobile.toml": """
name = "mobile"
inherits = "default"
[recognise]
operators = ["46000"]
networks = ["198.51.100.0/24"]
[heartbeat]
start = 270
[[addresses]]
host = "m1.example.com"
port = 8883
transport = "tls"
region = "north"
[[addresses]]
host = "m2.example.com"
port = 443
transport = "wss"
region = "south"
""",
}
MOBILE = ["tls://m1.example.com:8883", "wss://m2.example.com:443"]


@pytest.fixture
def carriers(tmp_path: Path) -> Carriers:
    folder = tmp_path / "carriers"
    folder.mkdir()
    for name, text in PROFILES.items():
        (folder / name).write_text(text)
    return Carriers(folder)


@pytest.fixture
async def dispatch(service: Any, carriers: Carriers) -> Dispatch:
    return Dispatch(service.store, service.apps, service.clock, carriers=carriers)


async def _join(service: Any, *, address: str = "n1.example.com:8883", **more: Any) -> None:
    await service.store.nodes.join(NodeInfo("n1", address=address, **more))


async def _ask(dispatch: Dispatch, service: Any, **said: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((await dispatch.answer(Question(service.app.key, **said))).raw)
    return answer


async def test_a_carriers_devices_are_told_what_its_profile_says(service: Any, dispatch: Dispatch) -> None:
    for said in ({"carrier": "46000"}, {"carrier": "Mobile"}, {"address": "198.51.100.7"}):
        answer = await _ask(dispatch, service, **said)
        assert (answer["carrier"], answer["addresses"]) == ("mobile", MOBILE), said
        assert answer["heartbeat"].startswith("270 ")
        _verify(answer, (await dispatch.signing_key()).public)
    assert dispatch.signed == 1
    southern = await _ask(dispatch, service, carrier="46000", region="south")
    assert (southern["region"], southern["addresses"]) == ("south", MOBILE[::-1])
    nowhere = await _ask(dispatch, service, carrier="46000", region="moon")
    assert (nowhere["region"], nowhere["addresses"]) == ("", MOBILE)


async def test_devices_of_nobody_are_told_the_live_nodes(service: Any, dispatch: Dispatch) -> None:
    assert (await _ask(dispatch, service))["addresses"] == []
    await _join(service, tls=True)
    service.now += REFRESH
    answer = await _ask(dispatch, service, address="192.0.2.1")
    assert (answer["carrier"], answer["addresses"]) == ("default", ["tls://n1.example.com:8883"])
    await service.store.nodes.leave()
    service.now += REFRESH
    assert (await _ask(dispatch, service, address="192.0.2.1"))["addresses"] == []


async def test_the_default_profiles_addresses_are_for_all_that_have_none(
    service: Any, carriers: Carriers, tmp_path: Path
) -> None:
    folder = tmp_path / "carriers"
    own = '[[addresses]]\nhost = "d.example.com"\nport = 1883\n'
    (folder / "default.toml").write_text(f'name = "default"\n{own}')
    (folder / "poor.toml").write_text('name = "poor"\n[recognise]\noperators = ["46099"]\n')
    carriers.reload()
    await _join(service)
    dispatch = Dispatch(service.store, service.apps, service.clock, carriers=carriers)
    for carrier in ("", "46099"):
        assert (await _ask(dispatch, service, carrier=carrier))["addresses"] == ["tcp://d.example.com:1883"]


async def test_the_same_answer_is_given_until_it_says_something_else(
    service: Any, dispatch: Dispatch
) -> None:
    question = Question(service.app.key, carrier="46000")
    first = await dispatch.answer(question)
    assert await dispatch.answer(Question(service.app.key, carrier="mobile")) is first
    service.now += 3600 / 2 - 1
    assert await dispatch.answer(question) is first
    service.now += REFRESH
    later = await dispatch.answer(question)
    assert later.content == first.content
    assert later.made == int(service.now)
    assert later.etag != first.etag
    assert dispatch.signed == 2


async def test_a_reload_of_the_profiles_is_seen_at_once(
    service: Any, dispatch: Dispatch, carriers: Carriers, tmp_path: Path
) -> None:
    assert (await _ask(dispatch, service, carrier="46000"))["heartbeat"].startswith("270 ")
    file = tmp_path / "carriers" / "mobile.toml"
    file.write_text(PROFILES["mobile.toml"].replace("270", "200"))
    carriers.reload()
    assert (await _ask(dispatch, service, carrier="46000"))["heartbeat"].startswith("200 ")


async def test_who_has_profiles_of_its_own_reads_them_again(service: Any, tmp_path: Path) -> None:
    directory = tmp_path / "own"
    directory.mkdir()
    default = directory / "default.toml"
    address = "[[addresses]]\nhost = 'a.example.com'\nport = 1\n"
    default.write_text(address)
    dispatch = Dispatch(service.store, service.apps, service.clock, carriers=directory)
    dispatch.reload()  # nobody asked: nothing was read, and nothing is
    default.write_text(address + "[heartbeat]\nstart = 1\n")
    dispatch.reload()
    default.write_text(address)
    assert json.loads((await dispatch.compute(Question(""))).raw)["addresses"] == ["tcp://a.example.com:1"]
    default.write_text(address + "[heartbeat]\nstart = 1\n")
    with pytest.raises(CarrierError, match=r"heartbeat\.start"):
        dispatch.reload()
    assert json.loads((await dispatch.compute(Question(""))).raw)["addresses"] == ["tcp://a.example.com:1"]
    default.write_text(address.replace("a.", "b."))
    dispatch.reload()
    assert json.loads((await dispatch.compute(Question(""))).raw)["addresses"] == ["tcp://b.example.com:1"]


async def test_the_heartbeat_is_what_was_learned(service: Any, carriers: Carriers) -> None:
    asked: list[tuple[str, str]] = []

    def advise(profile: CarrierProfile, link: str) -> Heartbeat:
        asked.append((profile.name, link))
        return Heartbeat(start=100 if link == "wifi" else 200, least=50, most=900)

    dispatch = Dispatch(service.store, service.apps, service.clock, carriers=carriers, advise=advise)
    assert (await _ask(dispatch, service, carrier="mobile", link="wifi"))["heartbeat"] == "100 50 900"
    assert (await _ask(dispatch, service, carrier="mobile", link="tin can"))["heartbeat"] == "200 50 900"
    assert asked == [("mobile", "wifi"), ("mobile", "other")]


async def test_reports_of_many_move_an_address_down_for_their_carrier(
    service: Any, dispatch: Dispatch
) -> None:
    for caller in _sources(ENOUGH_SOURCES):
        question = Question(service.app.key, carrier="mobile", address=caller)
        await dispatch.report(question, [Tried(MOBILE[0], 0, 1), Tried(MOBILE[1], 1, 0)])
    service.now += REFRESH
    assert (await _ask(dispatch, service, carrier="mobile"))["addresses"] == MOBILE[::-1]
    service.now += 3 * WINDOW
    assert (await _ask(dispatch, service, carrier="mobile"))["addresses"] == MOBILE


async def test_questions_of_those_who_get_through_speak_for_an_address(
    service: Any, dispatch: Dispatch
) -> None:
    callers = _sources(ENOUGH_SOURCES)
    for caller in [*callers, *(f"172.16.{n}.1" for n in range(4 * ENOUGH_SOURCES))]:
        await dispatch.answer(Question(service.app.key, "mobile", address=caller, reached=MOBILE[0]))
    for caller in callers:  # whose word on a failure counts beside that
        question = Question(service.app.key, carrier="mobile", address=caller)
        await dispatch.report(question, [Tried(MOBILE[0], 0, 1)])
    assert dispatch.outcomes.taken == 6 * ENOUGH_SOURCES
    assert dispatch.outcomes.bands("mobile", service.now) == {}
    await dispatch.answer(Question(service.app.key, "mobile", address=callers[0], reached="tls://x:1"))
    assert dispatch.outcomes.ignored == 1


async def test_another_process_hears_of_it(service: Any, dispatch: Dispatch, carriers: Carriers) -> None:
    other = Dispatch(service.store, service.apps, service.clock, carriers=carriers)
    for caller in _sources(ENOUGH_SOURCES):
        question = Question(service.app.key, carrier="mobile", address=caller)
        await dispatch.report(question, [Tried(MOBILE[0], 0, 1)])
    service.now += SYNC_PAUSE
    await _ask(dispatch, service)
    assert (await _ask(other, service, carrier="mobile"))["addresses"] == MOBILE[::-1]


async def test_live_nodes_can_be_reported_where_there_are_no_others(service: Any, dispatch: Dispatch) -> None:
    await _join(service)
    question = Question(service.app.key, address="192.0.2.1")
    await dispatch.report(question, [Tried("tcp://n1.example.com:8883", 1, 0), Tried(MOBILE[0], 1, 0)])
    assert (dispatch.outcomes.taken, dispatch.outcomes.ignored) == (1, 1)


async def test_while_the_store_is_away_answers_go_on(service: Any, carriers: Carriers) -> None:
    store = _Store(service.store)
    dispatch = Dispatch(store, service.apps, service.clock, carriers=carriers)  # type: ignore[arg-type]
    store.nodes.away = {"list"}
    with pytest.raises(StoreUnavailable):
        await _ask(dispatch, service, carrier="mobile")
    store.nodes.away = set()
    await _ask(dispatch, service, carrier="mobile")
    store.nodes.away = {"list"}
    service.now += REFRESH
    assert (await _ask(dispatch, service, carrier="mobile"))["addresses"] == MOBILE


class _Store:
    def __init__(self, real: Any) -> None:
        self.records, self.nodes = real.records, _Moody(real.nodes)


async def test_a_storm_of_devices_signs_once_and_looks_once(service: Any, carriers: Carriers) -> None:
    looks: list[float] = []

    class Nodes(_Moody):
        async def list(self) -> Any:
            looks.append(service.now)
            return await self._real.list()

    store = _Store(service.store)
    store.nodes = Nodes(service.store.nodes)
    dispatch = Dispatch(store, service.apps, service.clock, carriers=carriers)  # type: ignore[arg-type]
    await asyncio.gather(*(_ask(dispatch, service, carrier="mobile") for _ in range(200)))
    assert dispatch.signed == 1
    assert len(looks) == 1


async def test_answers_kept_ready_are_bounded(
    service: Any, dispatch: Dispatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_ANSWERS >= 1000
    monkeypatch.setattr("broker.dispatch.dispatch.MAX_ANSWERS", 3)
    for link in ("wifi", "cellular", "ethernet", "satellite", "other"):
        await _ask(dispatch, service, carrier="Mobile", link=link)
    assert dispatch.signed == 5
    await _ask(dispatch, service, carrier="Mobile", link="wifi")
    assert dispatch.signed == 6  # it had been dropped


async def test_an_unknown_app_is_told_so(service: Any, dispatch: Dispatch) -> None:
    for call in (dispatch.answer(Question("nobody")), dispatch.report(Question("nobody"), [])):
        with pytest.raises(ApiError) as refused:
            await call
        assert (refused.value.code, refused.value.http_status) == (1008, 400)


async def test_brokers_of_a_fleet_have_one_key_one_list_of_nodes_and_hear_alike(plain: Rig) -> None:
    clock = StoreClock()
    async with AsyncExitStack() as stack:
        brokers = []
        for number in range(3):
            store = RedisStore(plain.url, clock=clock, node_clock=StoreClock())  # no lease runs out meanwhile
            await store.open()
            stack.push_async_callback(store.close)
            address = f"n{number}.example.com:8883"
            await store.nodes.join(NodeInfo(f"n{number}", address=address, tls=True, connections=number))
            brokers.append(Broker(store, store.bus, clock=clock))
            stack.push_async_callback(brokers[-1].close)
        app = await brokers[0].apps.create("shop")
        question = Question(app.key, address="192.0.2.1")
        answers = [json.loads((await broker.dispatch.answer(question)).raw) for broker in brokers]
        assert len({answer["key"] for answer in answers}) == 1
        assert [sorted(answer["addresses"]) for answer in answers] == [
            [f"tls://n{number}.example.com:8883" for number in range(3)]
        ] * 3
        first = answers[0]["addresses"][0]
        for number, caller in enumerate(_sources(ENOUGH_SOURCES)):
            told = Question(app.key, address=caller)
            await brokers[number % 3].dispatch.report(told, [Tried(first, 0, 1)])
        for _ in range(4):  # who is late tries again
            clock.now += SYNC_PAUSE
            for broker in brokers:
                await broker.dispatch.compute(question)
        for broker in brokers:
            assert (await broker.dispatch.compute(question)).content.addresses[-1] == first


# Over HTTP


def _path(service: Any, query: str = "") -> str:
    return f"/v1/dispatch?app={service.app.key}{query}"


async def test_anybody_with_an_app_key_gets_an_answer_to_keep(service: Any) -> None:
    await _join(service)
    answer = await service.call("GET", _path(service), auth=None)
    assert answer.status == 200
    assert answer.json["addresses"] == ["tcp://n1.example.com:8883"]
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "private, max-age=60"
    _verify(answer.json, (await service.broker.dispatch.signing_key()).public)
    again = await service.call("GET", _path(service), auth=("wrong", "wrong"))
    assert again.body == answer.body


IF_NONE_MATCH: list[tuple[str, int]] = [
    ("{etag}", 304),
    ("W/{etag}", 304),
    ('"other", {etag}', 304),
    ('"other"', 200),
    ("", 200),
]


@pytest.mark.parametrize(("header", "status"), IF_NONE_MATCH)
async def test_who_has_the_answer_gets_none(service: Any, header: str, status: int) -> None:
    etag = _etag(await service.call("GET", _path(service), auth=None))
    headers = {"If-None-Match": header.format(etag=etag)}
    answer = await service.call("GET", _path(service), auth=None, headers=headers)
    assert (answer.status, bool(answer.body)) == (status, status == 200)
    assert _etag(answer) == etag
    assert service.counters.requests["/v1/dispatch", status] >= 1


def _etag(answer: Any) -> str:
    [etag] = [value for name, value in answer.headers.items() if name.lower() == "etag"]
    return str(etag)


REFUSED: list[tuple[str, str, object, int, int, str]] = [
    # method, path, body, status, code, what the message says
    ("GET", "/v1/dispatch", None, 400, 7002, "app is required"),
    ("GET", "/v1/dispatch?app=", None, 400, 7002, "app is required"),
    ("GET", "/v1/dispatch?app=nobody", None, 400, 1008, "there is no app 'nobody'"),
    ("GET", f"/v1/dispatch?app={'x' * 65}", None, 400, 7002, "app: must be at most 64"),
    ("GET", f"/v1/dispatch?app=KEY&carrier={'x' * 65}", None, 400, 7002, "carrier: must be at most 64"),
    ("GET", f"/v1/dispatch?app=KEY&link={'x' * 65}", None, 400, 7002, "link: must be at most 64"),
    ("GET", f"/v1/dispatch?app=KEY&region={'x' * 65}", None, 400, 7002, "region: must be at most 64"),
    ("GET", f"/v1/dispatch?app=KEY&reached={'x' * 301}", None, 400, 7002, "reached: must be at most 300"),
    ("GET", "/v1/dispatch?app=KEY&v=2", None, 400, 7002, "v: must be 1, got 2"),
    ("POST", "/v1/dispatch", {}, 405, 7002, "only GET"),
    ("GET", "/v1/dispatch/x", None, 404, 7002, "no such path"),
    ("GET", "/v1/dispatch/report", None, 405, 7002, "only POST"),
    ("POST", "/v1/dispatch/report", None, 400, 7002, "not valid JSON"),
    ("POST", "/v1/dispatch/report", {}, 400, 7002, "app is required"),
    ("POST", "/v1/dispatch/report", {"app": "KEY"}, 400, 7002, "tried is required"),
    ("POST", "/v1/dispatch/report", {"app": "KEY", "tried": [], "x": 1}, 400, 7002, "x: this key"),
    ("POST", "/v1/dispatch/report", {"app": "nobody", "tried": []}, 400, 1008, "no app"),
    ("POST", "/v1/dispatch/report", {"app": "KEY", "tried": [{"ok": 1}]}, 400, 7002, "address is required"),
    (
        "POST",
        "/v1/dispatch/report",
        {"app": "KEY", "tried": [{"address": "x", "failed": -1}]},
        400,
        7002,
        "failed",
    ),
    ("POST", "/v1/dispatch/report", {"app": "KEY", "tried": [{"address": "x"}] * 17}, 400, 7002, "tried"),
    ("POST", "/v1/dispatch/report", b" " * 10_000, 413, 7002, "larger than 8192 bytes"),
]


async def test_every_refusal_says_what_is_wrong(service: Any) -> None:
    for method, path, body, status, code, message in REFUSED:
        if isinstance(body, dict):
            body = {**body, **({"app": service.app.key} if body.get("app") == "KEY" else {})}  # noqa: PLW2901
        answer = await service.call(method, path.replace("KEY", service.app.key), body, auth=None)
        where = (method, path, body, answer.body)
        assert (answer.status, answer.code) == (status, code), where
        assert message in answer.message, where


async def test_the_callers_address_decides_and_counts_behind_a_trusted_proxy(start: Any) -> None:
    service = await start(peers=Peers(["127.0.0.0/8"]))
    await _join(service)
    body = {"app": service.app.key, "tried": [{"address": "tcp://n1.example.com:8883", "failed": 1}]}
    outcomes = service.broker.dispatch.outcomes
    for caller in _sources(ENOUGH_SOURCES):
        for _ in range(2):
            answer = await service.call(
                "POST", "/v1/dispatch/report", body, auth=None, headers={"X-Forwarded-For": caller}
            )
            assert (answer.status, answer.body) == (200, b"")
    assert (outcomes.taken, outcomes.ignored) == (ENOUGH_SOURCES, ENOUGH_SOURCES)
    assert outcomes.bands("default", service.now) == {"tcp://n1.example.com:8883": 2}


async def test_it_is_counted(service: Any) -> None:
    metrics = Metrics(process=False)
    service.broker.count_in(metrics)
    door = DispatchDoor(service.broker.dispatch)
    door.count_in(metrics)
    await service.call("GET", _path(service), auth=None)
    text = metrics.render("")[0].decode()
    assert "holdfast_dispatch_signed_total 1.0" in text
    assert "holdfast_dispatch_addresses_failing 0.0" in text
    assert "holdfast_dispatch_datagrams_unanswered_total 0.0" in text


# Over UDP


class _Phone(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.heard: asyncio.Queue[bytes] = asyncio.Queue()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.heard.put_nowait(data)


@contextmanager
def _closing(transport: asyncio.BaseTransport) -> Iterator[None]:
    try:
        yield
    finally:
        transport.close()


def _question(service: Any, size: int = 450, **said: Any) -> bytes:
    return json.dumps({"app": service.app.key, **said}).encode().ljust(size)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def test_a_datagram_gets_the_same_answer(service: Any, stack: AsyncExitStack) -> None:
    door = DispatchDoor(service.broker.dispatch)
    stack.push_async_callback(door.close)
    where = await door.open("127.0.0.1", 0)
    transport, phone = await asyncio.get_running_loop().create_datagram_endpoint(_Phone, remote_addr=where)
    with _closing(transport):
        transport.sendto(b"{nonsense}" + b" " * 450)
        transport.sendto(_question(service, carrier="46000", link="cellular", v=1))
        answer = await asyncio.wait_for(phone.heard.get(), PATIENCE)
    assert (
        answer == (await service.broker.dispatch.answer(Question(service.app.key, "46000", "cellular"))).raw
    )
    assert phone.heard.empty()
    assert (door.answered, door.unanswered) == (1, 1)


async def test_processes_share_a_port(service: Any, stack: AsyncExitStack) -> None:
    doors = [DispatchDoor(service.broker.dispatch) for _ in range(2)]
    for door in doors:
        stack.push_async_callback(door.close)
    where = await doors[0].open("127.0.0.1", 0, shared=True)
    assert await doors[1].open(*where, shared=True) == where
    for _ in range(32):  # the kernel chooses by the sender's port
        loop = asyncio.get_running_loop()
        transport, phone = await loop.create_datagram_endpoint(_Phone, remote_addr=where)
        with _closing(transport):
            transport.sendto(_question(service))
            await asyncio.wait_for(phone.heard.get(), PATIENCE)
    assert doors[0].answered + doors[1].answered == 32
    assert min(door.answered for door in doors) > 0


UNANSWERED: list[dict[str, Any]] = [
    {"size": 0},  # too short for the answer
    {"app": "nobody"},
    {"v": 2},
    {"carrier": "x" * 65},
    {"link": 1},
    {"reached": "tls://a.example.com:8883"},  # whoever sends it may have forged where it comes from
]


@pytest.mark.parametrize("said", UNANSWERED)
async def test_what_is_wrong_is_not_answered(service: Any, said: dict[str, Any]) -> None:
    door = DispatchDoor(service.broker.dispatch)
    assert await door.answer(_question(service, **said), "127.0.0.1") is None
    assert await door.answer(_question(service), "127.0.0.1") is not None


@given(st.binary(max_size=600) | st.binary(max_size=600).map(lambda raw: b'{"app":' + raw))
def test_no_datagram_is_an_exception(raw: bytes) -> None:
    door = DispatchDoor(Dispatch(_Nothing(), _Nothing()))  # type: ignore[arg-type]
    assert asyncio.run(door.answer(raw, "127.0.0.1")) is None


class _Nothing:
    """There is no app."""

    records = None

    def peek(self, _: str) -> None:
        return None

    async def find(self, _: str) -> None:
        return None


@given(size=st.integers(60, MAX_DATAGRAM))
def test_an_answer_is_never_much_longer_than_its_question(size: int) -> None:
    async def ask() -> bytes | None:
        return await DispatchDoor(_Same()).answer(b'{"app":"a"}'.ljust(size), "192.0.2.1")  # type: ignore[arg-type]

    answer = asyncio.run(ask())
    assert (answer is not None) == (AMPLIFICATION * size >= len(_Same.raw))


class _Same:
    raw = SigningKey(SEED).sign(_content(), 7).raw

    async def answer(self, _: Question) -> Any:
        return self


async def test_datagrams_that_nobody_could_mean_cost_nothing(service: Any) -> None:
    door = DispatchDoor(service.broker.dispatch)
    for raw in (b"", b"GET / HTTP/1.1", b"{" + b" " * MAX_DATAGRAM):
        door.datagram_received(raw, ("192.0.2.1", 1))
    assert door.unanswered == 3
    for n in range(MAX_WAITING + 10):
        door.datagram_received(b"{}", (f"192.0.{n % 256}.{n // 256}", 1))
    assert door.unanswered == 13


async def test_a_network_is_answered_so_often_a_second_and_the_others_all_the_same(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 7.0
    door = DispatchDoor(service.broker.dispatch, lambda: now)
    for n in range(SOURCE_RATE + 5):
        door.datagram_received(b"{}", (f"192.0.2.{n}", n))  # whatever address of it
    assert door.unanswered == 5
    door.datagram_received(b"{}", ("198.51.100.1", 1))
    assert door.unanswered == 5
    now = 8.0
    door.datagram_received(b"{}", ("192.0.2.1", 1))
    assert door.unanswered == 5
    monkeypatch.setattr(udp, "MAX_SOURCES", 2)
    for n in range(4):
        door.datagram_received(b"{}", (f"203.0.{n}.1", 1))
    assert door.unanswered == 8  # three networks more than are told apart
    door.datagram_received(b"{}", ("192.0.2.1", 1))
    assert door.unanswered == 8


# For the operator


async def test_the_operator_sees_key_and_answer(service: Any) -> None:
    actions = LocalActions(service.broker, 100)
    key: Any = await actions.dispatch_key()
    answer: Any = await actions.ask_dispatch({"carrier": "46000", "link": "cellular"})
    assert answer["carrier"] == "china-mobile"
    assert answer["key"] == key["id"]
    _verify(answer, key["key"])


def _command(*words: str) -> Any:
    done = CliRunner().invoke(dispatch_command, [*words])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_link_that_no_device_can_have_is_refused(tmp_path: Path) -> None:
    refused = CliRunner().invoke(dispatch_command, ["ask", "--link", "celular", "--data-dir", str(tmp_path)])
    assert (refused.exit_code, "'cellular'" in refused.output) == (2, True)


def test_the_commands_work_beside_a_stopped_server(tmp_path: Path) -> None:
    where = ("--data-dir", str(tmp_path))
    key = _command("key", *where)
    assert _command("key", *where) == key
    answer = _command("ask", "--carrier", "46000", *where)
    assert (answer["carrier"], answer["addresses"]) == ("china-mobile", [])
    _verify(answer, key["key"])


async def test_the_commands_ask_a_running_server(tmp_path: Path) -> None:
    settings = load_config(None, None, {"server.data_dir": str(tmp_path), "admin.port": "0"})
    store, metrics = make_store(settings), Metrics(process=False)
    await store.open()
    await store.nodes.join(NodeInfo("n1", address="n1.example.com:8883", tls=True))
    broker, lag = Broker(store, LocalBus()), LoopLag(metrics)
    overview = ProcessOverview(metrics, Health(), lag)
    listener = AdminListener(settings, LocalActions(broker, 100), overview)
    await listener.open()
    try:
        where = ("--data-dir", str(tmp_path))
        key = await asyncio.to_thread(_command, "key", *where)
        assert key["key"] == (await broker.dispatch.signing_key()).public
        answer = await asyncio.to_thread(_command, "ask", "--address", "192.0.2.1", "--link", "wifi", *where)
        assert answer["addresses"] == ["tls://n1.example.com:8883"]
        _verify(answer, key["key"])
        following = await asyncio.to_thread(_command, "next-key", *where)
        assert await asyncio.to_thread(_command, "change-key", *where) == following
        assert (await broker.dispatch.signing_key()).public == following["key"]
        refused = await asyncio.to_thread(CliRunner().invoke, dispatch_command, ["change-key", *where])
        assert "there is no next key" in refused.output
        deeds = [entry.action for _, entry in await broker.audit.entries(0)]
        assert deeds == ["dispatch.change_key", "dispatch.change_key", "dispatch.next_key"]
    finally:
        await listener.close()
        lag.close()
        await broker.close()
        await store.close()
