"""G1, G2, G3, G4 and G5 in a fleet that loses its parts.

The load of test_crash.py runs against several nodes on a real Redis, while something goes wrong: a node is killed, or
stands still while its devices move; Redis is killed; a master of a Cluster dies; somebody is cut off. Then everything
heals, drains, and the ledger of the test is compared with what the fleet says, push by push and device by device. A
loss is what does not come any more: the time that a slow machine takes for the rest is no mistake.
`HOLDFAST_CRASH_ROUNDS` makes it long, `HOLDFAST_CRASH_SEED` makes the same choices again.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson
import pytest

from gateway.mqtt import Connect, Puback, Publish
from tests.crash_load import GONE, HttpPublisher, Load, TryAgain, Wire
from tests.fleet_rig import Fleet, OneRedis, RedisBehindFaultyBus, RedisCluster, RedisPair
from tests.patience import PATIENCE
from tests.test_crash import fleet as devices_of
from tests.test_crash import publishers, running, wrong_counts

ROUNDS: Final = int(os.environ.get("HOLDFAST_CRASH_ROUNDS", "2"))
NODES: Final = 3
STALL: Final = 120.0  # seconds in which nothing owed has come: far beyond a lease, a beat and a sweep
PAUSE: Final = float(os.environ.get("HOLDFAST_PAUSE", "12"))  # seconds that a node is away: over its lease
PACE: Final = 4.0  # devices, nodes and Redis share the machine, and failures are the point, not rates
IN_MID_REQUEST: Final = 20  # requests that a broker has when it is killed
INSIDE: Final = "HOLDFAST_IN_NAMESPACE"
FLAGS: Final = (
    "--push-fanout-limit", "12",
    "--push-offline-limit", "1000000",
    "--mqtt-max-inflight", "8",
    "--server-log-level", "warning",
)  # fmt: skip

Disturb = Callable[[Fleet, Load], Awaitable[None]]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    yield from _fleet(tmp_path, OneRedis(tmp_path))


@pytest.fixture
def split_fleet(tmp_path: Path) -> Iterator[Fleet]:
    yield from _fleet(tmp_path, OneRedis(tmp_path), ("gateway", "gateway", "broker", "broker"))


@pytest.fixture
def crew_fleet(tmp_path: Path) -> Iterator[Fleet]:
    """One machine with three workers."""
    yield from _fleet(tmp_path, OneRedis(tmp_path), 1, "--workers", str(NODES))


@pytest.fixture
def cluster_fleet(tmp_path: Path) -> Iterator[Fleet]:
    yield from _fleet(tmp_path, RedisCluster(tmp_path))


@pytest.fixture
def pair_fleet(tmp_path: Path) -> Iterator[Fleet]:
    yield from _fleet(tmp_path, RedisPair(tmp_path))


@pytest.fixture
def faulty_bus_fleet(tmp_path: Path, seed: int) -> Iterator[Fleet]:
    yield from _fleet(tmp_path, RedisBehindFaultyBus(tmp_path, seed))


def _fleet(
    directory: Path, store: OneRedis, roles: int | Sequence[str] = NODES, *flags: str
) -> Iterator[Fleet]:
    fleet = Fleet(directory, store, roles, *FLAGS, *flags)
    try:
        store.start()
        fleet.start()
        yield fleet
    finally:
        fleet.close()
        store.close()
    assert "Traceback" not in fleet.logs(), fleet.logs()[-10_000:]


# What goes wrong


async def kill_a_node(fleet: Fleet, load: Load) -> None:
    """And whatever its broker is in the middle of."""
    node = load.random.choice(fleet.nodes)
    await asyncio.sleep(load.random.random() * 2)
    os.kill(node.pid, signal.SIGKILL)
    await asyncio.sleep(load.random.choice((0.0, PAUSE)))
    await asyncio.to_thread(node.restart)


async def kill_a_broker_in_mid_request(fleet: Fleet, load: Load) -> None:
    """It has many when it dies. Those with a cid are tried again, at any broker."""
    broker = load.random.choice(fleet.brokers)
    async with load.session() as http, load.turn():
        lines = [
            asyncio.create_task(_push_until_cut(load, http, broker.addresses.http))
            for _ in range(IN_MID_REQUEST)
        ]
        await asyncio.sleep(0.1 + load.random.random() * 0.4)
        os.kill(broker.pid, signal.SIGKILL)
        async with asyncio.timeout(STALL):
            await asyncio.gather(*lines)
    await asyncio.to_thread(broker.restart)


async def _push_until_cut(load: Load, http: aiohttp.ClientSession, address: str) -> None:
    """One request after the other, until one has no answer."""
    while True:
        push = load.new_push(load.random)
        try:
            async with http.post(f"{address}/v3/push", data=push.body()) as answer:
                raw = await answer.read()
                assert answer.status == 200, raw
                load.ledger.answered(push, orjson.loads(raw)["msg_id"])
        except GONE:
            break
    if push.cid is not None:
        told = await HttpPublisher(load, 0).call(http, "/v3/push", push.body(), again=True)
        load.ledger.answered(push, told["msg_id"])


async def kill_redis(fleet: Fleet, load: Load) -> None:
    await asyncio.sleep(load.random.random() * 2)
    await asyncio.to_thread(fleet.store.servers[0].kill)
    await asyncio.sleep(load.random.random() * 2)
    await asyncio.to_thread(fleet.store.servers[0].start)


async def pause_a_node(fleet: Fleet, load: Load) -> None:
    """Its devices move meanwhile."""
    node = load.random.choice(fleet.nodes)
    await asyncio.sleep(load.random.random())
    os.kill(node.pid, signal.SIGSTOP)
    await asyncio.sleep(PAUSE)
    os.kill(node.pid, signal.SIGCONT)
    await asyncio.sleep(1)


async def restart_one_after_another(fleet: Fleet, load: Load) -> None:
    for node in fleet.nodes:
        assert await asyncio.to_thread(node.terminate) == 0
        await asyncio.to_thread(node.start)


async def replace_the_workers(fleet: Fleet, load: Load) -> None:
    await asyncio.to_thread(fleet.nodes[0].replace_workers)


async def kill_a_master(fleet: Fleet, load: Load) -> None:
    assert isinstance(fleet.store, RedisCluster)
    master = load.random.choice(await asyncio.to_thread(fleet.store.masters))
    await asyncio.sleep(load.random.random())
    await asyncio.to_thread(master.kill)
    await asyncio.sleep(5)
    await asyncio.to_thread(master.start)


async def promote_a_replica(fleet: Fleet, load: Load) -> None:
    """By hand, as an operator does it when the master's machine has gone."""
    assert isinstance(fleet.store, RedisPair)
    await asyncio.sleep(load.random.random() * 2)
    await asyncio.to_thread(fleet.store.kill_the_master)
    await asyncio.sleep(load.random.random() * 2)
    await asyncio.to_thread(fleet.store.promote_the_replica)


async def lose_doorbells(fleet: Fleet, load: Load) -> None:
    assert isinstance(fleet.store, RedisBehindFaultyBus)
    bus = fleet.store.bus
    before = bus.lost, bus.doubled
    await asyncio.sleep(8)
    assert min(bus.lost - before[0], bus.doubled - before[1]) > 10, "the bus has no faults"


async def cut_a_node_off(fleet: Fleet, load: Load) -> None:
    """From Redis; packets vanish in both directions, nobody is told."""
    number = load.random.randrange(NODES)
    await _cut(load, f"ip daddr 127.0.{number + 1}.1", f"ip saddr 127.0.{number + 1}.1")


async def cut_devices_off(fleet: Fleet, load: Load) -> None:
    """All those of a node, which has them until they are elsewhere."""
    _, port = load.random.choice(fleet.nodes).addresses.mqtt
    await _cut(load, f"tcp dport {port}", f"tcp sport {port}")


async def _cut(load: Load, *packets: str) -> None:
    """These vanish for a while; nobody is told."""
    await asyncio.sleep(load.random.random())
    await asyncio.to_thread(_drop, *packets)
    await asyncio.sleep(PAUSE)
    await asyncio.to_thread(_nft, "flush chain inet holdfast cut")
    await asyncio.sleep(1)


# The tests


@pytest.mark.parametrize(
    "disturb",
    [kill_a_node, kill_redis, pause_a_node, restart_one_after_another],
    ids=lambda one: one.__name__,
)
async def test_nothing_is_lost_or_unaccounted_when(fleet: Fleet, disturb: Disturb, seed: int) -> None:
    await survive(fleet, disturb, seed)


async def test_a_masters_death_loses_nothing_that_was_answered(cluster_fleet: Fleet, seed: int) -> None:
    await survive(cluster_fleet, kill_a_master, seed)


async def test_a_broker_that_dies_in_mid_request_took_all_of_a_push_or_nothing(
    split_fleet: Fleet, seed: int
) -> None:
    """With roles of their own. What has a cid is there once, what has none at most once."""
    await survive(split_fleet, kill_a_broker_in_mid_request, seed)


async def test_workers_that_are_replaced_under_load_lose_nothing(crew_fleet: Fleet, seed: int) -> None:
    await survive(crew_fleet, replace_the_workers, seed)


async def test_a_bus_that_loses_and_doubles_doorbells_only_delays(faulty_bus_fleet: Fleet, seed: int) -> None:
    await survive(faulty_bus_fleet, lose_doorbells, seed)


async def test_a_promoted_replica_has_all_that_was_answered(pair_fleet: Fleet, seed: int) -> None:
    await survive(pair_fleet, promote_a_replica, seed)


@pytest.mark.parametrize(
    "test", ["a_node_is_cut_off_from_redis", "devices_are_cut_off", "a_silent_device_is_let_go"]
)
def test_packets_that_vanish_harm_nobody(seed: int, test: str) -> None:
    """In a network namespace of its own: this file again, with one of those below that have no name of a test."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    for program in ("unshare", "nft", "ip"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            pytest.skip(f"{program} is not installed")
    command = (
        f"ip link set lo up && exec {sys.executable} -m pytest -q -s -p no:cacheprovider"
        f" -o python_functions=inside_* {__file__}::inside_a_namespace_{test}"
    )
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", command],
        env=os.environ
        | {INSIDE: "1", "HOLDFAST_CRASH_SEED": str(seed), "PATH": f"{os.environ['PATH']}:/usr/sbin"},
        capture_output=True,
        text=True,
        timeout=900 + ROUNDS * (PAUSE + 10),
        check=False,
    )
    print(done.stdout[-300:])  # noqa: T201
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout


async def inside_a_namespace_a_node_is_cut_off_from_redis(fleet: Fleet, seed: int) -> None:
    await survive(fleet, cut_a_node_off, seed)


async def inside_a_namespace_devices_are_cut_off(fleet: Fleet, seed: int) -> None:
    await survive(fleet, cut_devices_off, seed)


async def inside_a_namespace_a_silent_device_is_let_go(fleet: Fleet) -> None:
    """Its packets vanish. Nobody tells the node, which lets it go after one and a half keep-alives; what it was sent
    meanwhile it gets where it comes back."""
    device = Mover(fleet, "phone", keep_alive=5)
    old = await device.connect(0)
    first = await push_to(fleet, "phone")
    await take_push(old)
    node = fleet.nodes[0].addresses.mqtt[1]
    _drop(f"tcp sport {old.port} tcp dport {node}", f"tcp sport {node} tcp dport {old.port}")
    old.send(Puback(1))  # never arrives
    second = await push_to(fleet, "phone")
    await eventually(lambda: closed_for(fleet, 0, "keep-alive timeout"), 1.0)
    new = await device.connect(1)
    for msg_id in (first, second):
        push = await take_push(new)
        assert orjson.loads(push.payload)["msg_id"] == msg_id
        new.send(Puback(push.packet_id))
    for msg_id in (first, second):
        await eventually(lambda: state_of(fleet, msg_id), {"target": 1, "delivered": 1, "pending": 0})  # noqa: B023
    new.abort()
    old.abort()


async def closed_for(fleet: Fleet, node: int, label: str) -> float:
    samples = await asyncio.to_thread(fleet.nodes[node].metrics)
    return sum(
        value
        for name, value in samples.items()
        if name.startswith("holdfast_disconnects_total") and label in name
    )


def _drop(*packets: str) -> None:
    """Only where these tests have a network of their own."""
    assert INSIDE in os.environ
    chain = "add table inet holdfast; add chain inet holdfast cut { type filter hook output priority 0; }"
    _nft("; ".join((chain, *(f"add rule inet holdfast cut {which} drop" for which in packets))))


def _nft(commands: str) -> None:
    subprocess.run(["nft", commands], check=True, capture_output=True)


async def survive(fleet: Fleet, disturb: Disturb, seed: int) -> None:
    load = Load(fleet, seed, patient=True, pace=PACE)
    async with load.session() as http:
        await load.register(http)
        async with running(load, devices_of(load)) as devices:
            async with running(load, publishers(load)):
                load.open_gate()
                for _ in range(ROUNDS):
                    await disturb(fleet, load)
                    await asyncio.sleep(0.5)
                await load.close_gate()
            load.ledger.expect(await asyncio.to_thread(fleet.store.stored_ids))
            load.draining.set()
            if await all_come(lambda: still_missing(load)) and await all_come(
                lambda: still_unrecorded(load, http)
            ):
                load.recorded.set()
                _, left = await asyncio.wait(devices, timeout=STALL)
                load.ledger.wrong += [f"{load.names[devices.index(one)]} has no PINGRESP" for one in left]
        mistakes = load.ledger.mistakes() + await wrong_accounts(fleet, load, http)
    counts = f"{len(load.ledger.pushes)} pushes, {load.ledger.copies} copies"
    print(counts)  # noqa: T201
    assert load.ledger.copies > 100, "the load was none"  # thousands, but for a machine that stands still
    assert not mistakes, f"HOLDFAST_CRASH_SEED={seed}, {counts}: {len(mistakes)} mistakes\n" + "\n".join(
        mistakes[:20]
    )


async def all_come(look: Callable[[], Awaitable[int]]) -> bool:
    """Wait until `look` finds none; False if it finds no fewer for STALL: then the ledger says what is missing."""
    least, since = inf, time.monotonic()
    while left := await look():
        if left < least:
            least, since = left, time.monotonic()
        elif time.monotonic() - since > STALL:
            return False
        await asyncio.sleep(0.2)
    return True


async def still_missing(load: Load) -> int:
    return len(load.ledger.missing) + len(load.ledger.unseen)


async def still_unrecorded(load: Load, http: aiohttp.ClientSession) -> int:
    return len(await wrong_counts(load, http))


async def wrong_accounts(fleet: Fleet, load: Load, http: aiohttp.ClientSession) -> list[str]:
    """G4: the account of each push, in sum and by device; and nothing is stored that nobody knows."""
    pushes = {msg_id: push for push in load.ledger.pushes.values() for msg_id in push.answers | push.msg_ids}
    found = [f"{msg_id} is stored, and nobody knows it" for msg_id in fleet.store.stored_ids() - set(pushes)]
    found += await wrong_counts(load, http)
    for msg_id, push in itertools.islice(pushes.items(), 200):
        body = orjson.dumps({"msg_id": msg_id, "registration_ids": load.names})
        async with http.post("/v3/status/message", data=body) as answer:
            told = orjson.loads(await answer.read())
        wrong = {
            n: told.get(n) for n in load.names if told.get(n) != {"status": 0 if n in push.targets else 3}
        }
        if wrong:
            found.append(f"{msg_id}: the status says {wrong}")
    return found


# G5, device by device


class Mover:
    """A device that connects where it is told to."""

    def __init__(self, fleet: Fleet, name: str, *, keep_alive: int = 60) -> None:
        self.name = name
        self._keep_alive = keep_alive
        self._fleet = fleet
        self._token = b""

    async def connect(self, node: int) -> Wire:
        """Tried again while the store is away."""
        app = self._fleet.app
        if not self._token:
            answer = await post(self._fleet, "/v1/devices", {"registration_id": self.name})
            self._token = answer["token"].encode()
        connect = Connect(
            self.name,
            clean_start=False,
            keep_alive=self._keep_alive,
            username=app.app_key,
            password=self._token,
        )
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    return await Wire.open(self._fleet.nodes[node].addresses.mqtt, connect)
                except TryAgain:
                    await asyncio.sleep(0.1)


async def take_push(wire: Wire) -> Publish:
    async with asyncio.timeout(PATIENCE):
        while (packet := wire.next()) is None:
            await wire.fill()
    assert isinstance(packet, Publish), packet
    return packet


async def is_closed(wire: Wire) -> bool:
    """By the server."""
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                await wire.fill()
    except TimeoutError:
        return False
    except GONE:
        return True
    finally:
        wire.abort()


async def post(fleet: Fleet, path: str, body: object) -> Any:
    load = Load(fleet, 0)
    async with load.session() as http, http.post(path, data=orjson.dumps(body)) as answer:
        assert answer.status == 200, await answer.text()
        return orjson.loads(await answer.read())


async def state_of(fleet: Fleet, msg_id: str) -> dict[str, int]:
    load = Load(fleet, 0)
    async with load.session() as http, http.get("/v3/received/detail", params={"msg_ids": msg_id}) as answer:
        (row,) = orjson.loads(await answer.read())
    return {key: row[key] for key in ("target", "delivered", "pending")}


async def push_to(fleet: Fleet, name: str) -> str:
    body = {"platform": "all", "audience": {"registration_id": [name]}, "notification": {"alert": "hello"}}
    answer = await post(fleet, "/v3/push", body)
    return str(answer["msg_id"])


async def test_g5_the_old_node_closes_the_connection_of_a_device_that_moved(fleet: Fleet) -> None:
    device = Mover(fleet, "phone")
    old = await device.connect(0)
    new = await device.connect(1)
    assert await is_closed(old)
    await push_to(fleet, "phone")
    new.send(Puback((await take_push(new)).packet_id))
    new.abort()


@pytest.mark.parametrize("moved_to", [1, 2])
async def test_g5_a_node_that_stood_still_acknowledges_nothing_for_a_device_that_moved(
    fleet: Fleet, moved_to: int
) -> None:
    """The device's answer on its old connection lies in the node's socket when the node goes on."""
    device = Mover(fleet, "phone")
    old = await device.connect(0)
    msg_id = await push_to(fleet, "phone")
    push = await take_push(old)
    stopped = fleet.nodes[0]
    os.kill(stopped.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(PAUSE)
        new = await device.connect(moved_to)
        again = await take_push(new)
        old.send(Puback(push.packet_id))
        await asyncio.sleep(0.2)
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    assert await is_closed(old)
    await asyncio.sleep(2)
    assert await state_of(fleet, msg_id) == {"target": 1, "delivered": 0, "pending": 1}
    new.send(Puback(again.packet_id))
    await eventually(lambda: state_of(fleet, msg_id), {"target": 1, "delivered": 1, "pending": 0})
    new.abort()


async def eventually(look: Callable[[], Awaitable[Any]], wanted: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            if await look() == wanted:
                return
            await asyncio.sleep(0.02)


async def test_a_push_reaches_its_device_whichever_node_took_it(fleet: Fleet) -> None:
    wires = [await Mover(fleet, f"phone-{n}").connect(n) for n in range(NODES)]
    for target, node in itertools.product(range(NODES), range(NODES)):
        body = {
            "platform": "all",
            "audience": {"registration_id": [f"phone-{target}"]},
            "notification": {"alert": str(node)},
        }
        async with Load(fleet, 0).session() as http:
            address = fleet.nodes[node].addresses.http
            async with http.post(f"{address}/v3/push", data=orjson.dumps(body)) as answer:
                assert answer.status == 200, await answer.text()
        push = await take_push(wires[target])
        assert orjson.loads(push.payload)["notification"]["alert"] == str(node)
        wires[target].send(Puback(push.packet_id))
    for wire in wires:
        wire.abort()
