"""A fleet in several processes, against a real server."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loadtest.http_pool import HttpPool
from loadtest.ledger import Ledger, alert
from loadtest.machine import Guard, OutOfRoom, family, pss, read_memory
from loadtest.publishing import OpenLoop, broadcast_body, check_accepted
from loadtest.reactor import Reactor
from loadtest.roster import TOKEN_SIZE, Roster, enroll, name_of
from loadtest.server import Server, run_holdfast
from loadtest.swarms import Status, SwarmError, Swarms
from tests.patience import PATIENCE
from tests.ports import free_port

DEVICES = 300
RATE = 5_000.0


@dataclass(slots=True)
class World:
    server: Server
    reactor: Reactor
    pool: HttpPool
    roster: Roster

    def swarms(self, devices: int = DEVICES, **settings: Any) -> Swarms:
        address = self.server.address("mqtt")
        return Swarms(self.reactor, self.roster, devices, [address], processes=3, **settings)

    def wait(self, done: Callable[[], bool]) -> None:
        deadline = time.perf_counter() + PATIENCE
        while not done():
            assert time.perf_counter() < deadline
            self.reactor.turn(0.02)

    def broadcast(self, swarms: Swarms, serial: int) -> None:
        swarms.ask("expect", serial)
        answers: list[int] = []

        def take(status: int, body: bytes) -> None:
            check_accepted(status, body)
            answers.append(status)

        self.pool.send(self.pool.build("POST", "/v3/push", broadcast_body(alert(serial, 18))), take)
        self.wait(lambda: bool(answers))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    data = tmp_path / "data"
    app = run_holdfast("app", "create", "swarms", "--data-dir", str(data))
    # A server that comes back has the address that devices know.
    server = Server(data, settings={"HOLDFAST_PUSH_FANOUT_LIMIT": "50"}, flags=[f"--mqtt-port={free_port()}"])
    server.start()
    reactor = Reactor()
    pool = HttpPool(
        reactor, server.address("http"), 8, user=app["app_key"], password=app["master_secret"], again=True
    )
    roster = enroll(pool, app["app_key"], DEVICES, tmp_path / "tokens", lambda n: {"alias": f"user{n}"})
    yield World(server, reactor, pool, roster)
    pool.close()
    reactor.close()
    server.stop()


def test_every_device_is_registered_with_its_token(world: World) -> None:
    assert world.roster.tokens.stat().st_size == DEVICES * TOKEN_SIZE
    found = world.pool.call("GET", f"/v3/devices/{name_of(DEVICES - 1)}")
    assert found["alias"] == f"user{DEVICES - 1}"


def test_all_are_online_and_get_a_broadcast_once(world: World) -> None:
    seen: list[Status] = []
    with world.swarms(probes=10) as swarms:
        assert swarms.processes == 4
        assert len(swarms.pids) == 5
        swarms.connect(RATE, PATIENCE, seen.append)
        assert world.server.metric("connections_live") == DEVICES
        world.broadcast(swarms, 1)
        world.wait(lambda: swarms.arrived(1).count == DEVICES)
        assert (swarms.arrived(1).repeats, swarms.missing(1)) == (0, [])
        assert swarms.arrived(1).first <= swarms.arrived(1).last
        world.wait(lambda: world.server.metric("deliveries_acked_total") == DEVICES)
        assert swarms.renew().counts["acked"] == DEVICES
        assert pss(swarms.pids) > 1 << 20
        pids = swarms.pids
    assert seen[-1].line() == f"{DEVICES} of {DEVICES} online; 0 acked"
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_who_is_away_is_missing(world: World) -> None:
    with world.swarms() as swarms:
        swarms.connect(RATE, PATIENCE)
        swarms.ask("leave")
        swarms.wait(lambda status: status.online == 0, "all away", PATIENCE)
        world.wait(lambda: world.server.metric("connections_live") == 0)
        world.broadcast(swarms, 1)
        assert swarms.missing(1, 4) == [0, 1, 2, 3]
        swarms.connect(RATE, PATIENCE)
        world.wait(lambda: swarms.arrived(1).count == DEVICES)
        assert not swarms.renew().lost


def test_targeted_pushes_find_their_devices(world: World) -> None:
    ledger = Ledger(0)
    with world.swarms() as swarms:
        swarms.connect(RATE, PATIENCE)
        publisher = OpenLoop(world.pool, ledger, name_of, range(DEVICES), 1000.0, 18, cids=True)
        while publisher.sent < 200:
            world.reactor.turn(publisher.send_due())

        def all_arrived() -> bool:
            swarms.take_arrivals(ledger)
            return not ledger.missing

        world.wait(all_arrived)
        assert (len(ledger.latencies), ledger.errors()) == (publisher.sent, "")
        assert all(0 < latency < PATIENCE for latency in ledger.latencies)
        assert publisher.accepted == publisher.sent


def test_keep_alives_go_on(world: World) -> None:
    with world.swarms(ping_interval=3.0, keep_alive=10) as swarms:
        swarms.connect(RATE, PATIENCE)
        swarms.wait(lambda status: status.counts["pongs"] > 2 * DEVICES, "two rounds of pings", PATIENCE)
        assert not swarms.status.lost


def test_the_fleet_comes_back_when_its_server_does(world: World) -> None:
    with world.swarms(pause=0.1, pause_max=0.4) as swarms:
        swarms.connect(RATE, PATIENCE)
        world.server.kill()
        swarms.wait(lambda status: status.online == 0, "all dropped", PATIENCE)
        world.server.start()
        world.pool.address = world.server.address("http")
        world.broadcast(swarms, 1)
        swarms.wait(lambda status: status.online == DEVICES, "all back", PATIENCE)
        world.wait(lambda: swarms.arrived(1).count == DEVICES)
        assert sum(swarms.status.lost.values()) == DEVICES
        assert not swarms.status.refused


def test_a_token_of_somebody_else_is_refused(world: World, tmp_path: Path) -> None:
    tokens = world.roster.tokens.read_bytes()
    wrong = tmp_path / "wrong"
    wrong.write_bytes(tokens[TOKEN_SIZE:] + tokens[:TOKEN_SIZE])
    world.roster = Roster(world.roster.app_key, DEVICES, wrong)
    with (
        pytest.raises(SwarmError, match=r"refused: .* CONNACK BAD_USER_NAME_OR_PASSWORD"),
        world.swarms() as swarms,
    ):
        swarms.connect(RATE, PATIENCE)


def test_a_process_that_dies_is_told_and_the_others_end(world: World, tmp_path: Path) -> None:
    pids: list[int] = []

    def run() -> None:
        with world.swarms(log=tmp_path / "swarms.log") as swarms:
            swarms.connect(RATE, PATIENCE)
            pids.extend(swarms.pids)
            os.kill(pids[2], signal.SIGKILL)
            world.wait(lambda: not swarms.renew())

    with pytest.raises(SwarmError, match="process 1 of the fleet ended"):
        run()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_process_that_fails_says_why(world: World, tmp_path: Path) -> None:
    with (
        pytest.raises(SwarmError, match="KeyError: 99"),
        world.swarms(log=tmp_path / "swarms.log") as swarms,
    ):
        swarms.ask("marks", 99)


def test_too_many_devices_are_too_many(world: World) -> None:
    with pytest.raises(SwarmError, match="need 513 processes, more than 250"):
        Swarms(world.reactor, world.roster, 10_000_000, [])


# The machine


def test_memory_of_the_machine_is_read() -> None:
    memory = read_memory()
    assert memory.available > memory.tcp
    assert memory.kernel == memory.slab + memory.tcp
    with socket.create_server(("127.0.0.1", 0)):
        assert read_memory().sockets > 0


def test_a_family_has_all_descendants(world: World) -> None:
    with world.swarms() as swarms:
        swarms.connect(RATE, PATIENCE)
        assert sorted(swarms.pids) == sorted(family(swarms.pids[0]))
        assert set(swarms.pids) < set(family(os.getpid()))


def test_the_guard_stops_before_the_memory_ends(capsys: pytest.CaptureFixture[str]) -> None:
    guard = Guard("a run")
    guard.show(Status(3, 5))
    guard.show(Status(4, 5))  # too soon for another line
    told = capsys.readouterr().err
    assert "a run: 3 of 5 online" in told
    assert "4 of 5" not in told
    with pytest.raises(OutOfRoom, match="a run: only"):
        Guard("a run", least=1 << 50).check()


def test_a_status_says_what_went_wrong() -> None:
    status = Status(1, 2, {"acked": 3}, lost=Status().lost + Status().lost)
    status.lost.update({"closed": 7, "no PINGRESP": 1, "other": 1})
    assert status.line() == "1 of 2 online; 3 acked; lost: 7 closed, 1 no PINGRESP"
