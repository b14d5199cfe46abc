"""The lab itself, with real namespaces and TCP: what the relay does to a connection, and the short form."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest
from click.testing import CliRunner

from loadtest.lab import __main__ as command
from loadtest.lab import namespaces
from loadtest.lab.contenders import make_site
from loadtest.lab.namespaces import HOME, NamespaceError, Namespaces, entered, why_not
from loadtest.lab.networks import NETWORKS, Event, Network, read_networks
from loadtest.lab.relay import PathPlan, RelayPlan, RelayReport
from loadtest.lab.run import LabError, Run
from loadtest.lab.sites import ADDRESSES, Site, SiteError
from tests.patience import PATIENCE

needs_root = pytest.mark.skipif(bool(why_not()), reason=why_not())
QUICK = NETWORKS.with_name("quick.toml")


@contextmanager
def _relayed(network: Network) -> Iterator[tuple[str, str, Callable[[], RelayReport]]]:
    """Namespaces of a device and of a server, the network between them, and how to end it."""
    with ExitStack() as stack:
        spaces = stack.enter_context(Namespaces(f"btest-{os.getpid()}"))
        device, server = spaces.make("device"), spaces.make("server")
        plan = PathPlan(
            key="one",
            network=network,
            device_space=device,
            server_space=server,
            device_tun="up0",
            server_tun="path0",
            public=("10.0.1.1", "10.0.2.1"),
            servers=ADDRESSES,
        )
        relay = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "loadtest.lab.relay"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        )
        stack.callback(relay.kill)
        assert relay.stdin is not None
        assert relay.stdout is not None
        relay.stdin.write(msgspec.json.encode(RelayPlan(seed=1, paths=(plan,))) + b"\n")
        relay.stdin.flush()
        assert relay.stdout.readline() == b"ready\n"
        servers = [f"addr add {address}/32 dev lo" for address in ADDRESSES]
        spaces.set_up(server, [*servers, "link set path0 up", "route add 10.0.0.0/16 dev path0"])
        spaces.set_up(
            device, ["addr add 192.168.0.2/32 dev up0", "link set up0 up", "route add default dev up0"]
        )
        relay.stdin.write(f"start {time.monotonic()}\n".encode())
        relay.stdin.flush()

        def end() -> RelayReport:
            assert relay.stdin is not None
            assert relay.stdout is not None
            relay.stdin.close()
            return msgspec.json.decode(relay.stdout.readline(), type=RelayReport)

        yield device, server, end


@contextmanager
def _connected(device: str, server: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection."""
    with entered(server):
        listener = socket.create_server((ADDRESSES[0], 1883))
    with listener:
        with entered(device):
            near = socket.create_connection((ADDRESSES[0], 1883), timeout=PATIENCE)
        far, _ = listener.accept()
        far.settimeout(PATIENCE)
        with near, far:
            yield near, far


def _there_and_back(near: socket.socket, far: socket.socket) -> float:
    began = time.perf_counter()
    near.sendall(b"x")
    far.sendall(far.recv(1))
    near.recv(1)
    return time.perf_counter() - began


def _network(**given: Any) -> Network:
    return Network(name="test", title="a test", **given)


@needs_root
def test_the_server_sees_the_public_address_and_the_relay_adds_little() -> None:
    with _relayed(_network()) as (device, server, end), _connected(device, server) as (near, far):
        assert far.getpeername()[0] == "10.0.1.1"
        assert near.getsockname()[0] == "192.168.0.2"
        trips = [_there_and_back(near, far) for _ in range(200)]
        report = end()
    assert min(trips) < 0.02, "four packets through a select loop"
    [path] = report.paths
    assert path.counts["up"] >= 200
    assert path.counts["lost"] == 0


@needs_root
def test_delay_and_loss_are_those_of_the_network() -> None:
    network = _network(delay=0.05, loss=0.1)
    with _relayed(network) as (device, server, end), _connected(device, server) as (near, far):
        trips = [_there_and_back(near, far) for _ in range(30)]
        report = end()
    assert 0.1 <= min(trips) < 0.2
    counts = report.paths[0].counts
    assert counts["lost"] > 0
    assert max(trips) > 0.25, "TCP sent again what was lost"
    assert 0 <= report.late <= report.latest


@needs_root
def test_a_thin_link_is_thin() -> None:
    with _relayed(_network(rate=400_000)) as (device, server, _), _connected(device, server) as (near, far):
        began = time.perf_counter()
        near.sendall(bytes(50_000))
        left = 50_000
        while left:
            left -= len(far.recv(65_536))
        assert time.perf_counter() - began >= 1.0, "50 KB at 50 KB a second, with the headers"


@needs_root
def test_nobody_is_told_that_a_nat_forgot() -> None:
    network = _network(forget=3.0)
    with _relayed(network) as (device, server, end), _connected(device, server) as (near, far):
        _there_and_back(near, far)
        near.settimeout(5.0)
        with pytest.raises(TimeoutError):
            near.recv(1)  # the silence
        far.sendall(b"late")
        with pytest.raises(TimeoutError):
            near.recv(1)
        near.sendall(b"late, too")  # no error, and no answer
        far.settimeout(0.5)
        with pytest.raises(TimeoutError):
            far.recv(1)
        assert end().paths[0].counts["forgotten"] >= 2


@needs_root
def test_a_connection_does_not_survive_another_address() -> None:
    network = _network(event=(Event(what="moved", at=5.0),))  # a slow machine needs some to connect
    with _relayed(network) as (device, server, _), _connected(device, server) as (near, far):
        near.settimeout(6.0)
        with pytest.raises(TimeoutError):
            near.recv(1)
        near.sendall(b"x")
        far.settimeout(0.5)
        with pytest.raises(TimeoutError):
            far.recv(1)
        with entered(server):
            listener = socket.create_server((ADDRESSES[1], 1883))
        with listener, entered(device), socket.create_connection((ADDRESSES[1], 1883), timeout=PATIENCE):
            anew, seen = listener.accept()
            anew.close()
            assert seen[0] == "10.0.2.1"


# Namespaces


@needs_root
def test_namespaces_and_what_runs_in_them_are_gone_at_the_end() -> None:
    with Namespaces(f"btest-{os.getpid()}") as spaces:
        name = spaces.make("one")
        with entered(name):
            sleeper = subprocess.Popen(["sleep", "600"])
        assert (HOME / name).exists()
        assert sleeper.poll() is None
    assert not (HOME / name).exists()
    assert sleeper.wait(PATIENCE) < 0


@needs_root
def test_who_was_in_a_namespace_is_out_again_even_after_an_error() -> None:
    before = os.readlink("/proc/thread-self/ns/net")
    with Namespaces(f"btest-{os.getpid()}") as spaces:
        name = spaces.make("two")
        with entered(name):
            assert os.readlink("/proc/thread-self/ns/net") != before
        with pytest.raises(ZeroDivisionError), entered(name):
            raise ZeroDivisionError
    assert os.readlink("/proc/thread-self/ns/net") == before


@needs_root
def test_an_ip_command_that_fails_says_what_ip_said() -> None:
    with Namespaces(f"btest-{os.getpid()}") as spaces:
        name = spaces.make("three")
        with pytest.raises(NamespaceError, match="nothing-there"):
            spaces.set_up(name, ["link set nothing-there up"])


# Servers


@pytest.fixture
def spaces() -> Iterator[Namespaces]:
    with Namespaces(f"btest-{os.getpid()}") as made:
        yield made


def _site(spaces: Namespaces, letter: str, directory: Path, edges: int) -> Site:
    space = spaces.make("site")
    spaces.set_up(space, [f"addr add {address}/32 dev lo" for address in ADDRESSES])
    return make_site(letter, space, directory / "site", edges)


def _answers(site: Site, address: str, port: int) -> bool:
    with entered(site.space):
        try:
            socket.create_connection((address, port), timeout=PATIENCE).close()
        except ConnectionRefusedError:
            return False
    return True


@needs_root
def test_a_broker_that_was_killed_comes_back(spaces: Namespaces, tmp_path: Path) -> None:
    site = _site(spaces, "c", tmp_path, 2)
    site.start()
    try:
        assert _answers(site, ADDRESSES[0], 1883)
        site.kill_edge(1)
        assert not _answers(site, ADDRESSES[0], 1883)
        site.restore_edge(1)
        assert _answers(site, ADDRESSES[0], 1883)
    finally:
        site.stop()
    assert not _answers(site, ADDRESSES[0], 1883)


@needs_root
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_one_of_two_edges_is_killed_and_the_other_stays(spaces: Namespaces, tmp_path: Path) -> None:
    site = _site(spaces, "b", tmp_path, 2)
    site.start()
    try:
        assert site.access.app_key
        assert site.access.url == f"http://{ADDRESSES[1]}:8080", "of the edge that stays"
        assert [path.name for path in (tmp_path / "only-default").iterdir()] == ["default.toml"]
        assert all(_answers(site, address, 1883) for address in ADDRESSES)
        site.kill_edge(1)
        assert [_answers(site, address, 1883) for address in ADDRESSES] == [False, True]
    finally:
        site.stop()


@needs_root
def test_a_broker_that_does_not_start_says_why(
    spaces: Namespaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = _site(spaces, "c", tmp_path, 1)
    fake = tmp_path / "mosquitto"
    fake.write_text("#!/bin/sh\necho it does not like this\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SiteError, match="it does not like this"):
        site.start()
    fake.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SiteError, match="apt-get install mosquitto"):
        site.restore_edge(1)


# The command


def test_without_root_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 1000)
    result = CliRunner().invoke(command.main, [])
    assert result.exit_code == 1
    assert "only root may" in result.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "no network nowhere"),
        (["--contenders", "ax"], "no contender x"),
        (["--networks", "{tmp}/bad.toml"], "bad.toml"),
    ],
)
def test_what_there_is_not_is_refused(tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "bad.toml").write_text("seed = 'x'")
    result = CliRunner().invoke(command.main, [one.format(tmp=tmp_path) for one in arguments])
    assert result.exit_code
    assert expected in result.output


def test_the_networks_can_be_listed() -> None:
    result = CliRunner().invoke(command.main, ["--list"])
    assert [line.split()[0] for line in result.output.splitlines()] == [
        n.name for n in read_networks().network
    ]


# All of it


@needs_root
def test_the_short_form_loses_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    lab = read_networks(QUICK)
    outcome = Run(lab.network, "ac", lab.seed, tmp_path, said.append).go()
    results = {(result.network, result.contender): result for result in outcome.results}
    assert len(results) == 2 * len(lab.network)
    for result in results.values():
        assert (result.lost, result.refused) == (0, 0), result
        assert result.pushes > 5
        assert result.bytes_per_push > 100
    assert all(result.repeats == 0 for result in results.values() if result.contender == "a")
    assert results["loss-10", "a"].shares[30.0] > 0.9
    assert results["loss-10", "a"].p50 >= 0.1, "the delay of the network"
    assert results["loss-10", "a"].dropped["lost"] > 10
    assert results["blackhole", "a"].dropped["dead"] > 0
    assert results["blackhole", "a"].times[-1] > 1, "what was due while nothing passed"
    assert not list(HOME.glob(f"blab-{os.getpid()}-*"))


@needs_root
def test_phones_that_know_that_they_moved_are_back_at_once(tmp_path: Path) -> None:
    event = (Event(what="moved", at=3, told=True),)
    network = _network(seconds=8, drain=8, devices=2, every=1, event=event)
    outcome = Run([network], "ac", 1, tmp_path, lambda _: None).go()
    for result in outcome.results:
        assert len(result.back) == 2, result  # no heartbeat would have told them in this time
        assert result.lost == 0, result


@needs_root
def test_a_run_whose_devices_cannot_connect_says_whose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtest.lab.run.CONNECT_LIMIT", 1.0)
    network = _network(mtu=50, devices=1, seconds=1)
    with pytest.raises(LabError, match="phones test c"):
        Run([network], "c", 1, tmp_path, lambda _: None).go()
    assert not list(HOME.glob(f"blab-{os.getpid()}-*"))


@needs_root
def test_the_command_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "one.toml"
    file.write_text(
        '[[network]]\nname = "one"\ntitle = "One"\nseconds = 3\ndrain = 1\nevery = 1\ndevices = 1\n'
    )
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    options = ["--networks", str(file), "--contenders", "c", "--seed", "5", "--write"]
    result = CliRunner().invoke(command.main, [*options, "--json", "lab.json"])
    assert result.exit_code == 0, result.output
    assert "| One | c |" in result.output
    assert orjson.loads(Path("lab.json").read_bytes())["seed"] == 5
    assert "<!-- bench lab -->" in Path("docs/numbers.md").read_text()
    assert not list((tmp_path / ".bench").iterdir())
