"""`holdfast serve --workers`: real processes, killed, replaced and stopped."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
import pytest

from clients.local_server import ANY_PORT, LocalServer, ServerFailed
from gateway import inquiries
from tests.fleet_rig import Redis

pytestmark = pytest.mark.xdist_group("supervisor")  # they share servers

PATIENCE = 120.0  # seconds for what takes one, on a machine that does much else
CONNECT = (
    bytes.fromhex("100d00044d51545405020000000001") + b"x"
)  # MQTT 5, client id x, no credentials: refused
WORKERS = 3

Start = Callable[..., "Crew"]


class Crew(LocalServer):
    """A server with workers, as its admin listener shows it."""

    name = ""

    def health(self) -> dict[str, Any]:
        return _get(f"{self.addresses.admin}/healthz")[1]

    def workers(self) -> dict[str, int]:
        """Those that are ready: name -> process."""
        return {w["name"]: w["pid"] for w in self.health()["workers"] if w["state"] == "ready"}

    def ready(self, count: int = WORKERS, *, without: frozenset[int] = frozenset()) -> dict[str, int] | None:
        """The workers, if so many are and none of those processes."""
        workers = self.workers()
        states = {w["state"] for w in self.health()["workers"]}
        fits = len(workers) == count and states == {"ready"} and not without & set(workers.values())
        return workers if fits else None

    def until_ready(self, count: int = WORKERS, *, without: frozenset[int] = frozenset()) -> dict[str, int]:
        """These, in the end."""
        return _until(lambda: self.ready(count, without=without))

    def requests(self) -> float:
        """Answered by the HTTP API, as the metrics have it."""
        found, slow = _timed(self.metrics)
        while slow:
            found, slow = _timed(self.metrics)
        return sum(value for name, value in found.items() if name.startswith("holdfast_http_requests_total"))

    def replace(self) -> None:
        """By the program and the settings as they are now."""
        before = frozenset(self.workers().values())
        replaced = self.log_text().count("the workers are replaced")
        self.ask_to_replace(lambda: self.log_text().count("the workers are replaced") > replaced)
        assert not before & set(self.workers().values())

    def ask_to_replace(self, done: Callable[[], Any]) -> None:
        """SIGUSR2, until it is done: again where the trial of the program took too long on this machine."""
        asked = -1  # trials that had taken too long by then

        def look() -> Any:
            nonlocal asked
            if (slow := self.log_text().count("timed out after")) > asked:
                asked = slow
                os.kill(self.pid, signal.SIGUSR2)
            return done()

        _until(look)


def _until(look: Callable[[], Any]) -> Any:
    """What it finds, once it finds something."""
    deadline = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < deadline, "nothing found in time"
        time.sleep(0.02)
    return found


def _timed(ask: Callable[[], Any]) -> tuple[Any, bool]:
    """What it answers, and whether that took so long that the front may have gone without a worker's answer."""
    began = time.monotonic()
    return ask(), time.monotonic() - began >= inquiries.PATIENCE


def _get(url: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as response:
            return response.status, orjson.loads(response.read())
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, orjson.loads(refused.read())


def _call_api(crew: Crew, count: int) -> None:
    """Each over a connection of its own: so all workers get some."""
    for _ in range(count):
        assert _get(f"{crew.addresses.http}/v3/nothing")[0] == 404


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    server = Redis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def url(redis: Redis) -> str:
    return f"redis://127.0.0.1:{redis.port}"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, url: str) -> Iterator[Start]:
    crews: list[Crew] = []

    def make(*flags: str, workers: int = WORKERS) -> Crew:
        name = f"node{len(crews)}"
        flags = ("--store", url, "--workers", str(workers), "--node-id", name, *flags)
        crews.append(Crew(tmp_path_factory.mktemp("crew"), *flags))
        crews[-1].name = name
        crews[-1].start()
        return crews[-1]

    yield make
    for crew in crews:
        crew.kill()
    for crew in crews:
        assert "Traceback" not in crew.log_text(), crew.log_text()


@pytest.fixture(scope="module")
def crew(start: Start) -> Crew:
    return start()


# Together


def test_workers_share_the_ports_and_are_nodes_of_their_own(crew: Crew) -> None:
    workers = crew.until_ready()
    assert len({name for name in workers if re.fullmatch(rf"{crew.name}-[1-9][0-9]*", name)}) == WORKERS
    ports = {crew.addresses.mqtt[1], int(crew.addresses.http.rpartition(":")[2])}
    for pid in workers.values():
        assert _listening(pid) >= ports


def _listening(pid: int) -> set[int]:
    """The TCP ports on which it does."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ports = {f"socket:[{row[9]}]": int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}
    return {ports[name] for file in Path(f"/proc/{pid}/fd").iterdir() if (name := os.readlink(file)) in ports}


def test_the_admin_api_answers_for_all(crew: Crew) -> None:
    crew.create_app("through the supervisor")
    nodes = _nodes(crew)
    assert {node["name"] for node in nodes if node["state"] == "live"} >= set(crew.workers())
    by_name = {node["name"]: node for node in nodes}
    admin = crew.addresses.admin.removeprefix("http://")
    assert {by_name[name]["admin"] for name in crew.workers()} == {admin}


def _nodes(crew: Crew) -> list[dict[str, Any]]:
    done = _command(crew, "node", "list", "--json")
    nodes: list[dict[str, Any]] = orjson.loads(done)
    return nodes


def _command(crew: Crew, *words: str) -> str:
    store = crew._flags[crew._flags.index("--store") + 1]
    command = [sys.executable, "-m", "clients.command", *words, "--store", store]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_work_beside_it(crew: Crew) -> None:
    app = orjson.loads(_command(crew, "app", "create", "beside"))
    assert app["app_key"] in _command(crew, "app", "list")
    token = orjson.loads(_command(crew, "device", "token", "phone-1", "--app", app["app_key"]))
    assert token["registration_id"] == "phone-1"
    found = orjson.loads(_command(crew, "device", "find", "phone-1", "--app", app["app_key"]))
    assert (found["online"], found["node"], found["waiting"]) == (False, None, 0)
    table = _command(crew, "node", "list").splitlines()
    assert table[0].split()[:4] == ["name", "role", "state", "connections"]
    assert any(line.startswith(f"{crew.name}-") and " live " in line for line in table)


def test_requests_of_all_workers_are_counted(crew: Crew) -> None:
    before = crew.requests()
    _call_api(crew, 40)
    assert crew.requests() == before + 40
    metrics = crew.metrics()
    assert [metrics[f'holdfast_worker_up{{worker="{name}"}}'] for name in crew.workers()] == [1.0] * WORKERS
    assert metrics['holdfast_workers{state="ready"}'] == WORKERS


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool: apt-get install prometheus")
def test_promtool_finds_nothing_wrong_with_the_whole(crew: Crew) -> None:
    with urllib.request.urlopen(f"{crew.addresses.admin}/metrics", timeout=PATIENCE) as response:
        body = response.read()
    done = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


# Death


def test_a_worker_that_is_killed_is_followed_and_no_count_goes_backwards(crew: Crew) -> None:
    workers = crew.until_ready()
    restarts = crew.metrics()["holdfast_worker_restarts_total"]
    _call_api(crew, 20)
    before = crew.requests()
    victim = workers.popitem()[1]
    os.kill(victim, signal.SIGKILL)
    after = crew.until_ready(without=frozenset((victim,)))
    assert set(workers.values()) < set(after.values())
    assert crew.requests() >= before
    assert crew.metrics()["holdfast_worker_restarts_total"] == restarts + 1
    assert f'pid={victim} reason="killed by SIGKILL"' in crew.log_text()


def test_a_front_that_is_killed_is_followed_at_the_same_address(crew: Crew) -> None:
    workers = crew.until_ready()
    crew.replace()  # so that some have ended and left their counts
    before = crew.requests()
    [front] = _children(crew.pid) - set(crew.workers().values())
    os.kill(front, signal.SIGKILL)
    _until(lambda: _children(crew.pid) - set(crew.workers().values()) if _answers(crew) else None)
    assert _children(crew.pid) - set(crew.workers().values()) != {front}
    assert crew.requests() == before
    assert len(crew.until_ready()) == len(workers)


def _answers(crew: Crew) -> bool:
    try:
        return len(crew.workers()) == WORKERS
    except OSError:
        return False


def _children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def test_without_its_supervisor_no_worker_stays(start: Start) -> None:
    crew = start(workers=2)
    processes = _children(crew.pid)
    assert len(processes) == 3
    crew.kill()
    _until(lambda: not any(map(_alive, processes)))


def test_brokers_beside_the_workers_leave_them_the_devices(start: Start) -> None:
    crew = start("--brokers", "1", workers=2)
    workers = crew.until_ready(3)
    roles = {node["name"]: node["role"] for node in _nodes(crew) if node["name"] in workers}
    (broker,) = (name for name, role in roles.items() if role == "broker")
    assert sorted(roles.values()) == ["broker", "gateway", "gateway"]
    mqtt, http = crew.addresses.mqtt[1], int(crew.addresses.http.rpartition(":")[2])
    for name, pid in workers.items():
        assert _listening(pid) & {mqtt, http} == {http if name == broker else mqtt}
    _call_api(crew, 3)
    with _stopped(crew.pid):  # or there might be another before anybody has looked
        os.kill(workers[broker], signal.SIGKILL)
        assert _until(lambda: _not_ready(crew)) == ["no broker answers"]
    after = crew.until_ready(3, without=frozenset((workers[broker],)))
    assert set(workers.values()) & set(after.values()) == set(workers.values()) - {workers[broker]}
    _call_api(crew, 3)
    assert _not_ready(crew) == []


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _not_ready(crew: Crew) -> list[str]:
    reasons: list[str] = _get(f"{crew.addresses.admin}/readyz")[1].get("reasons", [])
    return reasons


# Replacement


class Visitors(threading.Thread):
    """Connect one after the other, and see whether somebody answers."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__()
        self._address = address
        self.stop = threading.Event()
        self.answered = 0
        self.reset = 0
        self.refused = 0

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                with closing(socket.create_connection(self._address, PATIENCE)) as peer:
                    peer.sendall(CONNECT)
                    self.answered += bool(peer.recv(100))
            except ConnectionRefusedError:
                self.refused += 1
            except ConnectionError:
                self.reset += 1


def test_in_a_rolling_restart_the_port_answers_all_the_time(crew: Crew) -> None:
    crew.until_ready()
    visitors = Visitors(crew.addresses.mqtt)
    visitors.start()
    unready: list[Any] = []
    try:
        watching = threading.Thread(target=crew.replace)
        watching.start()
        while watching.is_alive():
            (status, answer), slow = _timed(lambda: _get(f"{crew.addresses.admin}/readyz"))
            unready += [answer] if status != 200 and not slow else []
        watching.join()
        _until(lambda: visitors.answered > 20)
    finally:
        visitors.stop.set()
        visitors.join()
    assert (visitors.refused, unready) == (0, [])
    assert visitors.reset <= 2 * WORKERS  # in the queue of a socket that closed


def test_nothing_that_was_counted_is_lost_in_a_rolling_restart(crew: Crew) -> None:
    crew.until_ready()
    _call_api(crew, 30)
    before = crew.requests()
    _call_api(crew, 10)  # nobody has seen these yet
    crew.replace()
    assert crew.requests() == before + 10


def test_new_settings_come_with_it_and_wrong_ones_change_nothing(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "h.toml"
    file.write_text("[server]\nlog_level = 'info'\n")
    crew = start("--config", str(file), workers=1)
    before = crew.until_ready(1)
    file.write_text("[server]\nlog_level = 'loud'\n")
    crew.ask_to_replace(lambda: "must be one of debug, error, info, warning" in crew.log_text())
    assert "not replaced: the program does not start" in crew.log_text()
    assert crew.until_ready(1) == before
    file.write_text("[server]\nlog_level = 'warning'\n")
    crew.ask_to_replace(lambda: crew.ready(1, without=frozenset(before.values())))
    assert "replaced the" not in crew.log_text()


def test_the_number_of_workers_is_a_setting_like_others(start: Start, tmp_path: Path, url: str) -> None:
    file = tmp_path / "h.toml"
    file.write_text(f"[store]\nurl = '{url}'\n[server]\nworkers = 3\nnode_id = 'sized'\n")
    crew = Crew(tmp_path, "--config", str(file))
    crew.start()
    try:
        crew.until_ready(3)
        for count in (1, 2):
            file.write_text(file.read_text().replace("workers = ", f"workers = {count} # "))
            before = frozenset(crew.workers().values())
            crew.ask_to_replace(lambda count=count, before=before: crew.ready(count, without=before))
        assert crew.terminate() == 0
    finally:
        crew.kill()


# Stop


def test_sigterm_drains_all_and_ends_with_0(start: Start) -> None:
    crew = start(workers=2)
    processes = _children(crew.pid)
    with closing(socket.create_connection(crew.addresses.mqtt, PATIENCE)) as peer:
        peer.settimeout(PATIENCE)
        assert crew.terminate() == 0
        with suppress(ConnectionError):
            assert peer.recv(100) == b""
    assert not any(map(_alive, processes))
    assert len(re.findall(r"gateway.process stopped", crew.log_text())) == 2
    assert "address" not in orjson.loads((crew.data_dir / "admin.json").read_bytes())


def test_sighup_and_an_interrupt_of_the_terminal_are_for_all(start: Start) -> None:
    crew = start(workers=2)
    workers = crew.until_ready(2)
    os.kill(crew.pid, signal.SIGHUP)
    _until(lambda: crew.log_text().count("carrier profiles reloaded") == 2)
    assert crew.until_ready(2) == workers
    for pid in (*_children(crew.pid), crew.pid):  # as a terminal does it
        os.kill(pid, signal.SIGINT)
    _until(lambda: not crew.running)
    assert crew.log_text().count("gateway.process stopped") == 2


# What cannot be


def _refused(*flags: str) -> str:
    command = [sys.executable, "-m", "clients.command", "serve", *ANY_PORT, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode in (1, 2), done.stderr
    return done.stderr


def test_a_port_in_use_is_named_once(crew: Crew, url: str, tmp_path: Path) -> None:
    port = str(crew.addresses.mqtt[1])
    told = _refused("--data-dir", str(tmp_path), "--store", url, "--workers", "2", "--mqtt-port", port)
    assert told.count(f"127.0.0.1:{port}: another process listens there") == 1


def test_a_redis_that_is_away_ends_the_start_with_one_error(tmp_path: Path) -> None:
    with closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))
        store = f"redis://:hush@127.0.0.1:{nobody.getsockname()[1]}"
        told = _refused("--data-dir", str(tmp_path), "--store", store, "--workers", "2")
    assert told.count("Error: ") == 1
    assert "hush" not in told


def test_a_worker_that_cannot_start_ends_the_start(url: str, tmp_path: Path) -> None:
    told = _refused(
        *("--data-dir", str(tmp_path), "--store", url, "--workers", "2", "--node-id", "broken"),
        *("--carriers-directory", str(tmp_path / "none")),
    )
    assert "Error: " in told


def test_two_supervisors_of_one_name_are_one_too_many(start: Start) -> None:
    crew = start(workers=1)
    twin = Crew(crew.data_dir.parent / "twin", *crew._flags)
    try:
        with pytest.raises(ServerFailed, match="is alive"):
            twin.start()
    finally:
        twin.kill()
    assert crew.until_ready(1)


# Full


def test_a_full_worker_leaves_the_port_to_the_others(start: Start) -> None:
    crew = start("--mqtt-max-connections", "4", "--mqtt-connect-timeout", "600", workers=2)
    with ExitStack() as stack:

        def let_in() -> float:
            """So many are in when another has tried."""
            with suppress(
                ConnectionError
            ):  # in the queue of a socket that closed, or nobody listens any more
                stack.enter_context(socket.create_connection(crew.addresses.mqtt, PATIENCE))
            return crew.metrics()["holdfast_connections_opening"]

        _until(lambda: let_in() == 8)
        _until(lambda: "not listening" in crew.log_text())
    _until(lambda: "listening again" in crew.log_text())
