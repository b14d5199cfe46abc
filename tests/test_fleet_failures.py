"""G1, G2, G3, G4 and G5 in a fleet that loses its parts.

The load of test_crash.py runs against several nodes on a real Redis, while something goes wrong: a node is killed, or
stands still while its devices move; Redis is killed; a master of a Cluster dies; a node is cut off. Then everything
heals, drains, and the ledger of the test is compared with what the fleet says, push by push and device by device.
`HOLDFAST_CRASH_ROUNDS` makes it long, `HOLDFAST_CRASH_SEED` makes the same choices again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, Final

import aiohttp
import orjson
import pytest

from gateway.mqtt import Connect, Puback, Publish
from tests.crash_load import GONE, Load, TryAgain, Wire
from tests.fleet_rig import Fleet, OneRedis, RedisCluster
from tests.test_crash import fleet as devices_of
from tests.test_crash import publishers, running, wrong_counts

ROUNDS: Final = int(os.environ.get("HOLDFAST_CRASH_ROUNDS", "2"))
NODES: Final = 3
HEAL_LIMIT: Final = 60.0  # seconds until everything owed has come and is recorded
PAUSE: Final = float(
    os.environ.get("HOLDFAST_PAUSE", "8")
)  # seconds that a node stands still: over its lease
INSIDE: Final = "HOLDFAST_IN_NAMESPACE"
FLAGS: Final = (
    "--push-fanout-limit", "12",
    "--push-offline-limit", "1000000",
    "--mqtt-max-inflight", "8",
    "--server-log-level", "warning",
)  # fmt: skip

Disturb = Callable[[Fleet, Random], Awaitable[None]]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    yield from _fleet(tmp_path, OneRedis(tmp_path))


@pytest.fixture
def cluster_fleet(tmp_path: Path) -> Iterator[Fleet]:
    yield from _fleet(tmp_path, RedisCluster(tmp_path))


def _fleet(directory: Path, store: OneRedis) -> Iterator[Fleet]:
    fleet = Fleet(directory, store, NODES, *FLAGS)
    try:
        store.start()
        fleet.start()
        yield fleet
    finally:
        fleet.close()
        store.close()
    assert "Traceback" not in fleet.logs(), fleet.logs()[-10_000:]


# What goes wrong


async def kill_a_node(fleet: Fleet, random: Random) -> None:
    """And whatever its broker is in the middle of."""
    node = random.choice(fleet.nodes)
    await asyncio.sleep(random.random() * 2)
    os.kill(node.pid, signal.SIGKILL)
    await asyncio.sleep(random.choice((0.0, PAUSE)))
    await asyncio.to_thread(node.restart)


async def kill_redis(fleet: Fleet, random: Random) -> None:
    await asyncio.sleep(random.random() * 2)
    await asyncio.to_thread(fleet.store.servers[0].kill)
    await asyncio.sleep(random.random() * 2)
    await asyncio.to_thread(fleet.store.servers[0].start)


async def pause_a_node(fleet: Fleet, random: Random) -> None:
    """Its devices move meanwhile."""
    node = random.choice(fleet.nodes)
    await asyncio.sleep(random.random())
    os.kill(node.pid, signal.SIGSTOP)
    await asyncio.sleep(PAUSE)
    os.kill(node.pid, signal.SIGCONT)
    await asyncio.sleep(1)


async def restart_one_after_another(fleet: Fleet, random: Random) -> None:
    for node in fleet.nodes:
        assert await asyncio.to_thread(node.terminate) == 0
        await asyncio.to_thread(node.start)


async def kill_a_master(fleet: Fleet, random: Random) -> None:
    assert isinstance(fleet.store, RedisCluster)
    master = random.choice(await asyncio.to_thread(fleet.store.masters))
    await asyncio.sleep(random.random())
    await asyncio.to_thread(master.kill)
    await asyncio.sleep(5)
    await asyncio.to_thread(master.start)


async def cut_a_node_off(fleet: Fleet, random: Random) -> None:
    """From Redis; packets vanish in both directions, nobody is told."""
    number = random.randrange(NODES)
    await asyncio.sleep(random.random())
    rule = f"add rule inet holdfast cut ip daddr 127.0.{number + 1}.1 drop"
    back = f"add rule inet holdfast cut ip saddr 127.0.{number + 1}.1 drop"
    await asyncio.to_thread(_nft, f"{rule}; {back}")
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


def test_a_node_that_is_cut_off_from_redis_harms_nobody(seed: int) -> None:
    """In a network namespace of its own: this file again, with the test below."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    for program in ("unshare", "nft", "ip"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            pytest.skip(f"{program} is not installed")
    test = f"{__file__}::test_inside_the_namespace_a_node_is_cut_off"
    command = f"ip link set lo up && exec {sys.executable} -m pytest -q -p no:cacheprovider {test}"
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", command],
        env=os.environ
        | {INSIDE: "1", "HOLDFAST_CRASH_SEED": str(seed), "PATH": f"{os.environ['PATH']}:/usr/sbin"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout


@pytest.mark.skipif(INSIDE not in os.environ, reason="runs inside the namespace that the test above makes")
async def test_inside_the_namespace_a_node_is_cut_off(fleet: Fleet, seed: int) -> None:
    _nft("add table inet holdfast; add chain inet holdfast cut { type filter hook output priority 0; }")
    await survive(fleet, cut_a_node_off, seed)


def _nft(commands: str) -> None:
    subprocess.run(["nft", commands], check=True, capture_output=True)


async def survive(fleet: Fleet, disturb: Disturb, seed: int) -> None:
    load = Load(fleet, seed, patient=True)
    async with load.session() as http:
        await load.register(http)
        async with running(load, devices_of(load)) as devices:
            async with running(load, publishers(load)):
                load.open_gate()
                for _ in range(ROUNDS):
                    await disturb(fleet, load.random)
                    await asyncio.sleep(0.5)
                await load.close_gate()
            load.ledger.expect(fleet.store.stored_ids())
            load.draining.set()
            with contextlib.suppress(TimeoutError):  # the ledger says what is missing
                async with asyncio.timeout(HEAL_LIMIT):
                    await load.ledger.complete.wait()
                    while await wrong_counts(load, http):
                        pass  # each look is a hundred calls
                    load.recorded.set()
                    await asyncio.gather(*devices)
        mistakes = load.ledger.mistakes() + await wrong_accounts(fleet, load, http)
    counts = f"{len(load.ledger.pushes)} pushes, {load.ledger.copies} copies"
    print(counts)  # noqa: T201
    assert load.ledger.copies > 500, "the load was none"
    assert not mistakes, f"HOLDFAST_CRASH_SEED={seed}, {counts}: {len(mistakes)} mistakes\n" + "\n".join(
        mistakes[:20]
    )


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

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.name = name
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
            keep_alive=60,
            username=app.app_key,
            password=self._token,
        )
        async with asyncio.timeout(30):
            while True:
                try:
                    return await Wire.open(self._fleet.nodes[node].addresses.mqtt, connect)
                except TryAgain:
                    await asyncio.sleep(0.1)


async def take_push(wire: Wire) -> Publish:
    async with asyncio.timeout(20):
        while True:
            for packet in wire.waiting():
                assert isinstance(packet, Publish), packet
                return packet
            await wire.fill()


async def is_closed(wire: Wire) -> bool:
    """Within 10 s, by the server."""
    try:
        async with asyncio.timeout(10):
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
    async with asyncio.timeout(20):
        while await look() != wanted:
            pass


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
