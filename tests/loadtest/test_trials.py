"""Each scenario, small, against a real server; and servers that stand still, die or refuse."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients.local_server import LocalServer
from loadtest.http_pool import HttpError, HttpPool
from loadtest.reactor import Reactor
from loadtest.roster import Listed, Strangers, name_of
from loadtest.trial.conductor import View
from loadtest.trial.plan import TrialError
from loadtest.trial.target import TAGS, Target, app_pool
from loadtest.wires import Endpoint
from tests.conftest import StartServer
from tests.loadtest.trial_world import DEVICES, check_complete, play, running_mosquitto, small_plan, target_of

needs_mosquitto = pytest.mark.skipif(
    not shutil.which("mosquitto"), reason="mosquitto: apt-get install mosquitto"
)


@pytest.fixture(scope="module")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with running_mosquitto(tmp_path_factory.mktemp("mosquitto")) as target:
        yield target


# Scenarios, here and on another broker


@pytest.mark.parametrize("scenario", ["idle", "connect-storm"])
def test_devices_come_and_stay(server: LocalServer, scenario: str) -> None:
    result = play(small_plan(scenario), target_of(server))
    check_complete(result)
    assert result.connects.latency.count == result.connects.connected == DEVICES
    assert result.pushes.sent == 0
    assert [process.devices for process in result.generator.processes] == [0, DEVICES // 2, DEVICES // 2]
    assert result.server.memory_most is not None
    assert result.server.memory_a_device is not None


def test_every_device_gets_each_broadcast(server: LocalServer) -> None:
    result = play(small_plan("broadcast", rate=20.0), target_of(server))
    check_complete(result)
    assert result.pushes.sent > 0
    assert result.deliveries.arrived == result.pushes.sent * DEVICES


def test_a_broadcast_to_everyone_reaches_the_devices_of_the_trial(server: LocalServer) -> None:
    result = play(small_plan("broadcast", rate=10.0), target_of(server, everyone=True))
    check_complete(result)
    assert result.deliveries.arrived == result.pushes.sent * DEVICES > 0


def test_the_schedule_says_how_many_are_pushed(server: LocalServer) -> None:
    result = play(small_plan("targeted", rate=200.0), target_of(server))
    check_complete(result)
    assert result.deliveries.arrived == result.pushes.sent == 120
    assert result.deliveries.repeated == 0


def test_a_tag_is_for_a_tenth(server: LocalServer) -> None:
    result = play(small_plan("tags", rate=20.0), target_of(server))
    check_complete(result)
    assert result.deliveries.arrived == result.pushes.sent * DEVICES // TAGS > 0


def test_a_mixed_day_has_breaks_and_receipts(server: LocalServer) -> None:
    plan = small_plan("mixed-day", rate=200.0, seconds=1.0, churn=60.0, away=0.2, receipts=1.0)
    result = play(plan, target_of(server))
    check_complete(result)
    assert result.connects.breaks > 0
    assert result.connects.connected > DEVICES
    assert result.receipts.sent >= result.receipts.answered > 0
    assert result.deliveries.arrived > result.pushes.sent  # some were for many


def test_what_waited_is_there_when_devices_come(server: LocalServer) -> None:
    result = play(small_plan("offline-backlog", waiting=3, rate=300.0), target_of(server))
    check_complete(result)
    assert result.deliveries.arrived == result.pushes.sent == 3 * DEVICES
    # They were due long before anybody connected, and nobody is to blame for that.
    piled_up = next(phase for phase in result.phases if phase.name == "pile up")
    first = min(window.at for window in result.windows if window.p50 is not None)
    assert first >= piled_up.end


def test_a_short_soak_says_nothing_of_an_hour(server: LocalServer) -> None:
    result = play(small_plan("soak", rate=20.0), target_of(server))
    check_complete(result)
    assert result.server.memory_growth is None
    assert result.server.memory_most is not None


@needs_mosquitto
@pytest.mark.parametrize("scenario", ["idle", "connect-storm", "broadcast", "targeted", "soak"])
def test_another_broker_can_play(mosquitto: Target, scenario: str) -> None:
    plan = small_plan(scenario, rate=20.0 if scenario != "connect-storm" else 300.0)
    result = play(plan, mosquitto, who=Strangers())
    check_complete(result)
    each = DEVICES if scenario == "broadcast" else 1
    assert result.deliveries.arrived == result.pushes.sent * each
    assert (result.pushes.sent > 0) == (scenario not in ("idle", "connect-storm"))
    assert result.server.memory_most is not None


@needs_mosquitto
def test_another_broker_may_ask_for_a_password(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("anna:secret\n")
    subprocess.run(["mosquitto_passwd", "-U", tmp_path / "names"], check=True)
    lines = ("allow_anonymous false", f"password_file {tmp_path}/names")
    plan = small_plan("targeted")
    with running_mosquitto(tmp_path, *lines) as target:
        check_complete(play(plan, target, who=Strangers("anna", "secret")))
        with pytest.raises(TrialError, match="the publisher was not let in: "):
            play(plan, target, who=Strangers("anna", "wrong"))
        with pytest.raises(TrialError, match=r"no device came online: .*refused: 30 CONNACK"):
            play(small_plan("idle"), target, who=Strangers())


# Who the devices are


def test_devices_of_an_earlier_trial_are_taken_over(server: LocalServer) -> None:
    target, plan = target_of(server), small_plan("broadcast", rate=10.0)
    play(plan, target)
    check_complete(play(plan, target))


def test_cleaning_up_revokes_the_tokens_and_leaves_no_tag(server: LocalServer) -> None:
    target = target_of(server)
    play(small_plan("idle", seconds=0.1, first_device=500), target, tidy=True)
    reactor = Reactor()
    pool = app_pool(reactor, target, 1)
    assert pool.call("GET", "/v3/tags") == {"tags": []}
    assert pool.call("GET", f"/v3/devices/{name_of(500)}")["tags"] == []
    pool.close()
    reactor.close()


def test_devices_may_be_brought(server: LocalServer) -> None:
    target = target_of(server)
    reactor = Reactor()
    pool = app_pool(reactor, target, 1)
    made = [pool.call("POST", "/v1/devices", {"platform": "ios"}) for _ in range(3)]
    pool.close()
    reactor.close()
    assert target.login is not None
    who = Listed(target.login.app_key, tuple((one["registration_id"], one["token"]) for one in made))
    check_complete(play(small_plan("targeted", devices=3), target, who=who), 3)


def test_a_trial_without_a_target_has_its_own_server() -> None:
    result = play(small_plan("idle", seconds=0.1), None)
    check_complete(result)
    assert result.target["kind"] == "embedded"


def test_the_server_may_be_watched_over_http(server: LocalServer) -> None:
    host, port = server.addresses.admin.removeprefix("http://").split(":")
    target = target_of(server, pid=None, metrics=(Endpoint((host, int(port))), "/metrics"))
    result = play(small_plan("idle", window=0.2), target)
    assert result.server.memory_first is not None
    assert any(window.server_memory for window in result.windows)
    assert result.server.trouble == ""


# What goes wrong


class Stall:
    """Stops the server when pushes begin, and lets it go on a second later."""

    SECONDS = 1.0

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.began = 0.0
        self.ended = 0.0

    def __call__(self, view: View) -> None:
        if not self.began and view.phase == "push":
            os.kill(self._pid, signal.SIGSTOP)
            self.began = time.perf_counter()
        elif self.began and not self.ended and time.perf_counter() - self.began >= self.SECONDS:
            self.ended = time.perf_counter()
            os.kill(self._pid, signal.SIGCONT)


def test_a_server_that_stands_still_shows_in_all_that_was_due(start_server: StartServer) -> None:
    """Nothing is left out because nobody answered: half of what is due in a stall waits for half of it, or longer."""
    server = start_server()
    stall = Stall(server.pid)
    result = play(small_plan("targeted", rate=100.0, seconds=3.0), target_of(server), stall)
    assert 0 < stall.began < stall.ended
    check_complete(result)
    latency = result.deliveries.latency
    assert result.pushes.sent == 300
    assert latency.max is not None
    assert latency.p90 is not None
    assert latency.max >= 0.9 * Stall.SECONDS
    assert latency.p90 >= 0.5 * Stall.SECONDS  # 50 of 300 at least
    assert max(window.max or 0 for window in result.windows) == latency.max


def test_a_trial_goes_on_without_its_server_and_ends(start_server: StartServer) -> None:
    server = start_server()
    killed: list[int] = []

    def act(view: View) -> None:
        if not killed and view.phase == "push" and view.arrived > 20:
            killed.append(view.arrived)
            server.kill()

    plan = small_plan("broadcast", rate=30.0, seconds=5.0, patience=3.0)
    result = play(plan, target_of(server), act)
    assert killed
    assert result.ended == "complete"
    assert result.connects.online == 0
    assert sum(result.connects.dropped.values()) == DEVICES
    assert result.pushes.unanswered + sum(result.pushes.refused.values()) > 0
    assert result.pushes.accepted < result.pushes.sent
    assert result.server.trouble


def test_a_push_that_was_accepted_and_does_not_come_is_lost(server: LocalServer) -> None:
    """The devices' tokens are revoked while pushes flow: they stay away, and what is accepted for them waits."""
    target = target_of(server)
    revoked: list[int] = []

    def act(view: View) -> None:
        if not revoked and view.phase == "push" and view.arrived:
            reactor = Reactor()
            pool = app_pool(reactor, target, 1)
            for device in range(0, DEVICES, 2):
                pool.call("DELETE", f"/v1/devices/{name_of(device)}/token")
                revoked.append(device)
            pool.close()
            reactor.close()

    result = play(small_plan("targeted", rate=200.0, seconds=1.5, patience=3.0), target, act)
    assert len(revoked) == DEVICES // 2
    deliveries = result.deliveries
    assert deliveries.lost > 0
    assert result.pushes.accepted <= deliveries.arrived + deliveries.lost <= result.pushes.sent
    assert sum(window.lost for window in result.windows) == deliveries.lost
    assert result.connects.online == DEVICES // 2


def test_nobody_online_ends_the_trial(server: LocalServer) -> None:
    target = target_of(server)
    assert target.login is not None
    who = Listed(target.login.app_key, (("nobody", "wrong"),))
    with pytest.raises(TrialError, match=r"no device came online: .*refused: 1 CONNACK"):
        play(small_plan("targeted", devices=1, processes=1), target, who=who)


def test_a_wrong_secret_is_told(server: LocalServer) -> None:
    target = target_of(server)
    assert target.login is not None
    wrong = Target("holdfast", target.mqtt, target.http, type(target.login)(target.login.app_key, "wrong"))
    with pytest.raises(TrialError, match="the devices could not be registered: 401"):
        play(small_plan("targeted"), wrong)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_trial_with_what_was_measured(server: LocalServer, number: signal.Signals) -> None:
    def act(view: View) -> None:
        if view.phase == "push" and view.arrived:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    result = play(small_plan("targeted", rate=100.0, seconds=600.0), target_of(server), act)
    assert signal.getsignal(number) is before
    assert result.ended == "stopped"
    assert 0 < result.pushes.sent < 60_000
    assert result.deliveries.arrived > 0
    assert result.deliveries.lost == 0


def test_a_second_signal_ends_it_at_once(server: LocalServer) -> None:
    def act(view: View) -> None:
        if view.phase == "push":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        play(small_plan("targeted", seconds=600.0), target_of(server), act)


def test_a_generator_that_falls_behind_says_so(server: LocalServer) -> None:
    """The publisher's own loop is held up once: what was due meanwhile leaves late."""
    held: list[float] = []

    def act(view: View) -> None:
        if not held and view.phase == "push":
            until = time.perf_counter() + 0.3
            held.append(until)
            while time.perf_counter() < until:
                pass

    result = play(small_plan("targeted", rate=100.0, seconds=1.5), target_of(server), act)
    assert held
    assert result.pushes.sent == 150
    assert result.generator.behind.p99 is not None
    assert result.generator.behind.p99 >= 0.2
    assert any("one in a hundred pushes left" in line for line in result.generator.bottleneck)


def test_a_process_of_devices_that_dies_ends_the_trial_with_what_was_measured(server: LocalServer) -> None:
    killed: list[int] = []

    def act(view: View) -> None:
        if not killed and view.phase == "push" and view.arrived:
            killed.append(_last_child())
            os.kill(killed[0], signal.SIGKILL)

    result = play(small_plan("targeted", rate=100.0, seconds=600.0), target_of(server), act)
    assert result.ended.startswith("given up: process 1 of the fleet ended")
    assert result.deliveries.arrived > 0


def _last_child() -> int:
    """Of the process that forked those that play devices, the last one: it is the youngest child of ours."""
    forker = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[-1]
    return int(Path(f"/proc/{forker}/task/{forker}/children").read_text().split()[-1])


def test_an_answer_that_never_comes_is_one(server: LocalServer) -> None:
    """Of a pool that bears loss: the port is nobody's."""
    reactor = Reactor()
    pool = HttpPool(reactor, ("127.0.0.1", 1), 2, bears_loss=True)
    answers: list[tuple[int, bytes]] = []
    for _ in range(5):
        pool.send(pool.build("GET", "/"), lambda status, body: answers.append((status, body)))
    reactor.run_until(lambda: len(answers) == 5, "five answers")
    assert answers == [(0, b"Connection refused")] * 5
    with pytest.raises(HttpError, match="0 Connection refused"):
        pool.call("GET", "/")
    pool.close()
    reactor.close()
