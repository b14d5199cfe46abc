"""No path costs more than it did: counted, so that no machine is too slow or too busy for it (decision 0027)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

import tests.costs.limits
from gateway.connection import Connection
from gateway.hub import Hub
from gateway.live import LivePush
from gateway.session import Session
from gateway.settler import Settler
from tests.costs.limits import PYTHON, RENEW, Allowance, compare, read, write
from tests.costs.paths import Bill, broadcast_one, deliver, run_idle_memory, run_paths

ALLOWANCE = "[allowance]\nshare = 0.02\nbytes = 3\n"
PROGRAM = Path(__file__).with_name("costs.py")

pytestmark = pytest.mark.xdist_group("costs")  # measured once


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    done = subprocess.run([sys.executable, PROGRAM, "--json"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return compare(orjson.loads(done.stdout))


@pytest.mark.parametrize("name", sorted(read()[1].get(PYTHON, {"none is known": 0})))
def test_it_costs_what_it_did(wrong: dict[str, str], name: str) -> None:
    assert name not in wrong, wrong[name]


def test_all_that_is_measured_is_known(wrong: dict[str, str]) -> None:
    assert wrong.keys() <= read()[1].get(PYTHON, {}).keys(), "\n".join(wrong.values())


def test_a_needless_loop_on_a_path_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    note = Settler.note

    def dearer(settler: Settler, push: LivePush, devno: int) -> None:
        for _ in range(10):
            assert push.msg_id
        note(settler, push, devno)

    bill = Bill()
    run_paths(bill, [deliver, broadcast_one])
    assert _noticed(bill) == set()
    monkeypatch.setattr(Settler, "note", dearer)
    run_paths(bill, [deliver, broadcast_one])
    assert _noticed(bill) == {"deliver.instructions", "broadcast.one.instructions"}


def test_a_second_write_to_a_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    send = Connection.send

    def in_two(connection: Connection, data: bytes) -> None:
        send(connection, data[:5])
        send(connection, data[5:])

    monkeypatch.setattr(Connection, "send", in_two)
    bill = Bill()
    run_paths(bill, [deliver])
    assert "deliver.writes" in _noticed(bill)


def test_what_an_idle_session_holds_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Hub.start
    kept = []

    def hoarding(hub: Hub, session: Session, **values: Any) -> list[LivePush]:
        kept.append(bytes(32))
        return start(hub, session, **values)

    monkeypatch.setattr(Hub, "start", hoarding)
    bill = Bill()
    run_idle_memory(bill)
    assert _noticed(bill) == {"idle.tcp.bytes", "idle.ws.bytes", "absent.bytes"}


def _noticed(bill: Bill) -> set[str]:
    """Of what was measured."""
    return compare(bill.costs).keys() & bill.costs.keys()


@pytest.fixture
def costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "costs.toml"
    monkeypatch.setattr(tests.costs.limits, "FILE", file)
    return file


def test_what_is_wrong_says_what_it_was_and_what_to_do(costs: Path) -> None:
    costs.write_text(f'{ALLOWANCE}["{PYTHON}"]\n"connect.instructions" = 200\n"idle.bytes" = 0\n')
    assert compare({"connect.instructions": 204, "idle.bytes": 3}) == {}
    wrong = compare({"connect.instructions": 205, "idle.bytes": 4})
    assert wrong["connect.instructions"] == (
        "connect cost 200 instructions, and costs 205 now: +5.0, of which 4 are allowed. "
        f"Where: python tests/costs/costs.py --functions connect. If it is meant so: {RENEW}"
    )
    assert "idle cost 0 bytes, and costs 4 now: +4.0" in wrong["idle.bytes"]
    assert wrong.keys() == compare({"connect.instructions": 195, "idle.bytes": 4}).keys()


def test_costs_come_and_go(costs: Path) -> None:
    costs.write_text(f'{ALLOWANCE}["{PYTHON}"]\n"a.bytes" = 1\n')
    assert compare({"b.bytes": 1}) == {
        "a.bytes": f"a.bytes is known, and not measured: {RENEW}",
        "b.bytes": f"b.bytes is measured, and not known: {RENEW}",
    }


def test_renewed_costs_are_those_of_this_python(costs: Path) -> None:
    costs.write_text(ALLOWANCE + '["3.5"]\n"a.bytes" = 1\n')
    assert compare({"a.bytes": 1}) == {"": f"costs.toml has no costs for Python {PYTHON}: {RENEW}"}
    write({"a.bytes": 2.126})
    assert read() == (Allowance(0.02, 3), {"3.5": {"a.bytes": 1}, PYTHON: {"a.bytes": 2.13}})
    assert compare({"a.bytes": 2.126}) == {}
