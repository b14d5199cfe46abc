"""The same work for all, small: against real servers, and what the tables say of it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from loadtest.peers.__main__ import main
from loadtest.peers.entrants import SYSTEM, Peer, Recipe, read_entrants
from loadtest.peers.tables import LIMITED, MISSING, as_markdown
from loadtest.peers.work import KINDS, RATES, Findings, Pace, Ways, Work, kind, take_turn
from loadtest.scenarios.ceiling import ceiling
from loadtest.stage import QUICK, Stage
from tests.patience import PATIENCE

DEVICES = 40
SMALL = replace(QUICK, devices=DEVICES, subscribers=DEVICES, warm_devices=10, seconds=0.1, runs=1)


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """A stage binds it to a core, the command has its own end."""
    affinity, end = os.sched_getaffinity(0), signal.getsignal(signal.SIGTERM)
    yield
    os.sched_setaffinity(0, affinity)
    signal.signal(signal.SIGTERM, end)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(SMALL, tmp_path, settings={"HOLDFAST_PUSH_FANOUT_LIMIT": str(DEVICES - 1)})


def _recipe(*command: str, **more: object) -> Recipe:
    told = {
        "title": "a peer",
        "install": "get it",
        "needs": ["sh"],
        "version": ["sh"],
        "command": command,
        "lacks": "",
        **more,
    }
    return msgspec.convert(told, Recipe)


# The work


@pytest.mark.parametrize("name", ["bare", "bare-coalescing", "holdfast", "mosquitto"])
def test_everybody_does_all_of_it(stage: Stage, name: str) -> None:
    entrant = read_entrants()[name]
    if missing := entrant.missing():
        pytest.skip(missing)
    findings = take_turn(stage, entrant)
    assert findings.failure == ""
    assert findings.connects is not None
    assert findings.connects.rate > 0
    assert None not in (findings.rss, findings.subscribed, findings.kernel)
    kinds = {kind(*one) for one in KINDS}
    assert findings.ways.keys() == ({"push", "topics"} if name == "holdfast" else {"topics"})
    for way, found in findings.ways.items():
        assert found.fan_out.keys() == (kinds if way == "topics" else {"QoS 1, one", "QoS 1, four"})
        assert all(work.rate > 0 and work.cost >= 0 for work in found.fan_out.values())
        assert found.single is not None
        assert found.single.rate > 0
        assert found.paces.keys() == set(map(str, RATES))
        assert all(0 < pace.p50 <= pace.p99 for pace in found.paces.values())


def test_the_bare_server_still_takes_orders(stage: Stage) -> None:
    rows = ceiling(stage)
    assert [row.values[0] > 0 for row in rows] == [True, True]


def test_a_server_that_does_not_start_is_told_with_its_last_words(stage: Stage) -> None:
    findings = take_turn(stage, Peer("peer", _recipe("sh", "-c", "echo no such port; exit 3")))
    assert findings == Findings(failure="starting: a peer did not start:\nno such port\n")


def test_where_a_server_fails_the_rest_is_missing(stage: Stage) -> None:
    if shutil.which("mosquitto", path=f"{os.environ['PATH']}:{SYSTEM}") is None:
        pytest.skip("mosquitto is missing")
    few = "listener $port 127.0.0.1\nallow_anonymous true\nmax_connections 5\n"
    recipe = _recipe("mosquitto", "-c", "$home/few.conf", files={"few.conf": few})
    findings = take_turn(stage, Peer("peer", recipe))
    assert findings.failure.startswith("connecting: device ")
    assert (findings.connects, findings.ways) == (None, {})


def test_a_turn_that_takes_too_long_ends_with_what_it_has(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtest.peers.work.LIMIT", 1.0)
    stage.plan = replace(SMALL, seconds=60.0)
    findings = take_turn(stage, read_entrants()["bare"])
    assert findings.failure.endswith(": the turn took longer than 1 s")
    assert not any(way.fan_out for way in findings.ways.values())


def test_what_a_peer_started_ends_with_it(stage: Stage, tmp_path: Path) -> None:
    helper = tmp_path / "helper"
    serve = "exec $python -m loadtest.bare --port $port"
    peer = Peer("peer", _recipe("sh", "-c", f"sleep 600 & echo $$! > {helper}; {serve}"))
    with peer.open(stage) as arena:
        pids = [arena.pid, int(helper.read_text())]
        assert all(map(_lives, pids))
    deadline = time.monotonic() + PATIENCE
    while any(map(_lives, pids)):
        assert time.monotonic() < deadline, pids


def _lives(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


# The tables


def _work(rate: float, cost: float, generator: float = 0.5) -> Work:
    return Work(rate, cost, server=1.0, generator=generator, others=0.0)


def _findings(rate: float, cost: float, generator: float = 0.5, *, kept: bool = True) -> Findings:
    way = Ways(
        fan_out={"QoS 1, one": _work(rate, cost, generator)},
        single=_work(rate / 2, cost * 2),
        paces={"500": Pace(0.5, 1.25, kept)},
    )
    return Findings(1.0, 2.0, 3.0, _work(10_000.0, 50.0), {"topics": way})


def _line(text: str, heading: str, server: str) -> list[str]:
    """The cells of a server's row in the table under this heading."""
    table = text.split(f"{heading}\n\n", 1)[1].split("\n\n", 1)[0]
    [row] = [line for line in table.splitlines() if line.startswith(f"| {server} ")]
    return row.strip("| ").split(" | ")


def test_cells_have_medians_spreads_and_shares_of_the_same_turn() -> None:
    entrants = read_entrants()
    turns = [
        {"bare": _findings(100_000.0, 5.0), "mosquitto": _findings(50_000.0, 20.0)},
        {"bare": _findings(50_000.0, 10.0), "mosquitto": _findings(40_000.0, 40.0)},
        {"bare": _findings(80_000.0, 6.0, 0.99), "mosquitto": _findings(60_000.0, 24.0, 0.99)},
    ]
    text = as_markdown(turns, list(entrants.values()))
    assert _line(text, "Messages to all, deliveries a second:", "mosquitto") == [
        "mosquitto",
        "50,000 (40,000 … 60,000), 0.75 ×",
        MISSING,
        MISSING,
        MISSING,
    ]
    [costs] = [line for line in text.splitlines() if line.startswith("| mosquitto | 24.0")]
    assert costs == f"| mosquitto | 24.0 (20.0 … 40.0) → 41,667, 0.25 × | {MISSING} | {MISSING} | {MISSING} |"
    assert _line(text, "Connections:", "mosquitto")[1:4] == [
        "1.00 KB (1.00 … 1.00)",
        "2.00 KB (2.00 … 2.00)",
        "3.00 KB (3.00 … 3.00)",
    ]
    assert "| aedes" not in text
    assert next(line for line in text.splitlines() if line.startswith("| mosquitto")).split(" | ")[2] == "3"


def test_a_table_says_where_the_generator_was_the_limit() -> None:
    text = as_markdown([{"mosquitto": _findings(50_000.0, 20.0, 0.99)}], list(read_entrants().values()))
    assert _line(text, "Messages to all, deliveries a second:", "mosquitto")[1] == f"50,000 {LIMITED}"


def test_a_table_says_who_cannot_keep_up_and_who_failed() -> None:
    slow = _findings(5_000.0, 200.0, kept=False)
    slow.failure = "topics: 8,000 messages a second: all messages arrived: not within 60 s"
    text = as_markdown([{"amqtt": slow}], list(read_entrants().values()))
    assert _line(text, "p50 / p99:", "amqtt")[3:] == ["cannot keep up", MISSING, MISSING]
    assert text.endswith(f"What failed:\n\n- amqtt (Python): {slow.failure} (1 of 1 turns)")


# The command


def test_who_is_missing_is_named_with_how_to_install_it(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--peers", "aedes"], env={"NODE_MODULES": str(tmp_path)})
    assert done.exit_code == 1
    assert f"left out: aedes: {tmp_path}/aedes/package.json is missing (npm install" in done.output.replace(
        "node, ", ""
    )
    assert "nobody is left" in done.output


def test_an_unknown_peer_is_refused_with_those_that_are() -> None:
    done = CliRunner().invoke(main, ["--peers", "mosquito,bare"])
    assert done.exit_code == 2
    assert "no peer mosquito: bare, bare-coalescing, holdfast, mosquitto, nats" in done.output


def test_turns_are_added_to_those_of_before(tmp_path: Path) -> None:
    kept = tmp_path / "turns.json"
    kept.write_bytes(msgspec.json.encode([{"mosquitto": _findings(50_000.0, 20.0)}]))
    told = ["--peers", "bare", "--quick", "--devices", "1200", "--seconds", "0.1", "--add-to", str(kept)]
    done = CliRunner().invoke(main, told, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "turns: 2" in done.output
    assert [list(turn) for turn in msgspec.json.decode(kept.read_bytes())] == [["mosquitto"], ["bare"]]
    assert _line(done.output, "Connections:", "mosquitto")
    again = CliRunner().invoke(main, ["--turns", "0", "--add-to", str(kept)], catch_exceptions=False)
    assert "turns: 2" in again.output


def test_a_file_without_turns_is_refused(tmp_path: Path) -> None:
    kept = tmp_path / "turns.json"
    kept.write_text("{}")
    done = CliRunner().invoke(main, ["--peers", "bare", "--add-to", str(kept)])
    assert done.exit_code == 1
    assert f"{kept} has no turns of before" in done.output
