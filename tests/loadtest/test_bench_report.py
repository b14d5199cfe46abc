"""Rows, tables and their place in docs/numbers.md."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from loadtest.bench import SCENARIOS, in_turns, main, make_plan
from loadtest.http_pool import read_answer
from loadtest.ledger import Ledger, alert
from loadtest.publishing import quantile
from loadtest.report import Contest, Load, Row, contest_table, contests, show, write_block
from loadtest.server import Server, ServerError, read_usage, run_holdfast, sum_histogram, sum_metric
from loadtest.stage import Plan, Stage
from loadtest.transports import masked_frame


def test_a_row_tells_median_spread_and_goal() -> None:
    row = Row("connects", "/s", [9000.0, 12000.0, 11000.0], at_least=10_000, loads=[Load(1.0, 0.5)])
    assert row.as_markdown() == (
        "| connects | ≥ 10,000 /s | 11,000 /s | 9,000 … 12,000 | 3 | 100 % | 50 % |  |"
    )


@pytest.mark.parametrize(
    ("row", "remark"),
    [
        (Row("a", "ms", [5.0], at_most=3.0), "missed"),
        (Row("a", "ms", [3.0], at_most=3.0), ""),
        (Row("a", "/s", [3.0], at_least=4.0, note="none lost"), "missed; none lost"),
        (Row("a", "/s", [3.0], loads=[Load(0.9, 0.96)]), "the generator is the limit"),
        (Row("a", "/s", [3.0], loads=[Load(0.9, 0.9, 0.25)]), "not quiet: others took 25 % of a core"),
    ],
)
def test_a_row_remarks_on_what_spoils_it(row: Row, remark: str) -> None:
    assert row.as_markdown().endswith(f"| {remark} |")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.0"), (1.789, "1.79"), (99.94, "99.9"), (1234.5, "1,234"), (140_000.0, "140,000")],
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert show(value) == shown


def test_a_block_is_replaced_where_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "numbers.md"
    file.write_text("# Numbers\n\n<!-- bench idle -->\nold\n<!-- end idle -->\n\nafter\n")
    write_block(file, "idle", r"new \1")
    write_block(file, "connects", "more")
    write_block(file, "idle", r"newer \1")
    assert file.read_text() == (
        "# Numbers\n\n<!-- bench idle -->\nnewer \\1\n<!-- end idle -->\n\nafter\n"
        "\n<!-- bench connects -->\nmore\n<!-- end connects -->\n"
    )


def test_an_empty_block_is_filled(tmp_path: Path) -> None:
    file = tmp_path / "numbers.md"
    file.write_text("<!-- bench idle -->\n<!-- end idle -->\n")
    write_block(file, "idle", "new")
    assert file.read_text() == "<!-- bench idle -->\nnew\n<!-- end idle -->\n"


ANSWER = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 7\r\nServer: x\r\n\r\n{"a":1}'


def test_an_answer_is_read_once_it_is_whole() -> None:
    assert [read_answer(ANSWER[:size]) for size in range(len(ANSWER))] == [None] * len(ANSWER)
    assert read_answer(ANSWER) == (200, b'{"a":1}')
    assert read_answer(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n") == (503, b"")


def test_a_metric_is_summed_over_its_labels() -> None:
    text = 'x_total{kind="a"} 2.0\nx_total{kind="b"} 3.5\nx_total_more 9.0\nx 1.0\n# x_total 4\n'
    assert sum_metric(text, "x_total") == 5.5
    assert sum_metric(text, "y") == 0


def test_the_ledger_tells_repeats_and_strays() -> None:
    ledger = Ledger(devices=2)
    broadcast, push = ledger.add_broadcast(2), ledger.add_targeted(1, due=0.0)
    ledger.take(0, broadcast)
    assert (ledger.arrived, ledger.missing) == (1, 2)
    ledger.take(1, broadcast)
    ledger.take(1, push)
    assert (ledger.arrived, ledger.missing, ledger.errors()) == (3, 0, "")
    ledger.take(1, push)
    ledger.take(1, broadcast)
    ledger.take(0, 99)
    assert (ledger.repeats, ledger.strays) == (2, 1)
    assert ledger.errors() == "2 repeated, 1 stray"


def test_a_push_to_the_wrong_device_is_a_stray() -> None:
    ledger = Ledger(devices=2)
    ledger.take(0, ledger.add_targeted(1))
    assert ledger.errors() == "1 stray"


@pytest.mark.parametrize("digits", [1, 7, 19])
def test_an_alert_fills_the_payload_and_ends_in_its_serial(digits: int) -> None:
    text = alert(42, digits)
    assert text.endswith("00000042")
    assert len(f'{{"msg_id":"{"1" * digits}","notification":{{"alert":"{text}"}}}}') == 100


def test_quantiles_are_values_that_occurred() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert [quantile(values, share) for share in (0.5, 0.99, 1.0)] == [51.0, 100.0, 100.0]
    assert quantile([], 0.5) == 0


@pytest.mark.parametrize(("size", "head"), [(5, b"\x82\x85"), (125, b"\x82\xfd"), (126, b"\x82\xfe\x00\x7e")])
def test_a_websocket_frame_says_its_length(size: int, head: bytes) -> None:
    assert masked_frame(b"x" * size) == head + bytes(4) + b"x" * size


def test_what_is_given_goes_before_the_plan() -> None:
    none: dict[str, None] = dict.fromkeys(("runs", "devices", "registered", "cycles"))
    assert make_plan(quick=False, **none) == Plan()
    plan = make_plan(quick=True, **none | {"runs": 3, "devices": 1300, "cycles": 7})
    assert (plan.runs, plan.devices, plan.registered, plan.cycles) == (3, 1300, 3000, 7)


def test_an_unknown_scenario_names_those_there_are() -> None:
    answer = CliRunner().invoke(main, ["speed"])
    assert answer.exit_code == 2
    assert all(name in answer.output for name in SCENARIOS)


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="no data directory"):
        run_holdfast("app", "list", "--data-dir", str(tmp_path / "none"))


# Side by side


def test_a_contest_tells_both_medians_and_their_ratio() -> None:
    ours = [Row("idle", "KB", [1.0]), Row("idle", "KB", [3.0], note="odd")]
    theirs = [Row("idle", "KB", [2.0]), Row("idle", "KB", [2.0])]
    assert Contest(ours, theirs).as_markdown() == (
        "| idle | 2.00 KB | 2.00 KB | 1.000 | 0.500 … 1.500 | 2 | here: odd |"
    )
    assert Contest(ours[:1], theirs[:1]).as_markdown() == "| idle | 1.00 KB | 2.00 KB | 0.500 |  | 1 |  |"


def test_a_number_that_was_nothing_has_no_ratio() -> None:
    assert "| nan |" in Contest([Row("lost", "", [0.0])], [Row("lost", "", [0.0])]).as_markdown()


def test_contests_hold_the_same_rows_of_all_turns_together() -> None:
    def turn(*values: float) -> list[Row]:
        return [Row(str(place), "", [value]) for place, value in enumerate(values)]

    found = contests([turn(1, 2), turn(3, 4)], [turn(5, 6), turn(7, 8)])
    assert [[row.values for row in contest.ours] for contest in found] == [[[1], [3]], [[2], [4]]]
    assert [contest.ratio for contest in found] == [2 / 6, 3 / 7]
    assert contest_table(found, "before").startswith("| what | here | before |")


def test_turns_begin_with_one_and_then_with_the_other(tmp_path: Path) -> None:
    affinity = os.sched_getaffinity(0)
    ours, theirs = Stage(Plan(), tmp_path / "a"), Stage(Plan(), tmp_path / "b", source=tmp_path)
    os.sched_setaffinity(0, affinity)
    order: list[Stage] = []

    def scenario(stage: Stage) -> list[Row]:
        order.append(stage)
        return [Row("turns", "", [float(len(order))])]

    [contest] = in_turns(scenario, ours, theirs, 3)
    assert order == [ours, theirs, theirs, ours, ours, theirs]
    assert [row.values for row in contest.ours] == [[1.0], [4.0], [5.0]]


def test_the_server_of_another_checkout_is_started(tmp_path: Path) -> None:
    package = tmp_path / "checkout" / "clients"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "command.py").write_text("def main():\n    raise SystemExit('another checkout')\n")
    with pytest.raises(ServerError, match="another checkout"):
        Server(tmp_path / "data", source=tmp_path / "checkout").start()
    with pytest.raises(ServerError, match="another checkout"):
        run_holdfast("app", "list", source=tmp_path / "checkout")


def test_cpu_time_is_told_up_to_this_moment() -> None:
    here = [read_usage(os.getpid()).cpu for _ in range(100)]
    assert len(set(here)) == 100
    assert here[-1] <= time.process_time()


def test_a_process_that_is_gone_has_no_cpu_time() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    with pytest.raises(ProcessLookupError, match=f"process {gone.pid} is gone"):
        read_usage(gone.pid)


LAGS = """\
# TYPE holdfast_lag_seconds histogram
holdfast_lag_seconds_bucket{le="0.005"} 990.0
holdfast_lag_seconds_bucket{le="0.02"} 999.0
holdfast_lag_seconds_bucket{le="+Inf"} 1000.0
holdfast_lag_seconds_count 1000.0
holdfast_pause_seconds_bucket{le="0.005",look="full"} 0.0
holdfast_pause_seconds_bucket{le="+Inf",look="full"} 1.0
holdfast_pause_seconds_bucket{le="0.005",look="young"} 3.0
holdfast_pause_seconds_bucket{le="+Inf",look="young"} 3.0
"""


@pytest.mark.parametrize(
    ("share", "bound"), [(0.5, 0.005), (0.99, 0.005), (0.991, 0.02), (0.999, 0.02), (0.9991, float("inf"))]
)
def test_a_histograms_quantile_is_the_bound_of_its_bucket(share: float, bound: float) -> None:
    assert sum_histogram(LAGS, "holdfast_lag_seconds").quantile(share) == bound


def test_a_histogram_is_summed_over_its_labels_and_counted_since_another() -> None:
    pauses = sum_histogram(LAGS, "holdfast_pause_seconds")
    assert pauses == {0.005: 3, float("inf"): 1}
    later = sum_histogram(LAGS.replace("} 3.0", "} 5.0"), "holdfast_pause_seconds").since(pauses)
    assert (later, later.quantile(1.0)) == ({0.005: 2}, 0.005)
    assert later.since(later).quantile(1.0) == 0.0
