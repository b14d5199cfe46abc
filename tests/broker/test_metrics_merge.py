"""The metrics of several processes as those of one."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter as Multiset

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from broker.metrics import Metrics
from broker.metrics_merge import Whole, export


class Process:
    """What one counts."""

    def __init__(self, connections: float = 0, waiting: float = 0, files: float = 0) -> None:
        self.metrics = Metrics()
        self.pushes = self.metrics.counter("pushes", "Pushes.")
        self.refusals = self.metrics.counters("refusals", "Refused.", "reason")
        self.seconds = self.metrics.histograms("seconds", "Time.", "kind", bounds=(0.5, 1.0, 10.0))
        self.metrics.gauge("connections", "Now.", lambda: {("tcp",): connections}, "transport")
        self.metrics.gauge("waiting", "In the store.", lambda: waiting, merge="max")
        self.metrics.gauge("left", "Of the lease.", lambda: files, merge="min")

    def export(self) -> bytes:
        return export(self.metrics)


def _samples(whole: Whole) -> dict[str, float]:
    return {
        sample.name + "".join(f",{value}" for value in sample.labels.values()): sample.value
        for family in parse_text(whole.render()[0].decode())
        for sample in family.samples
    }


def _whole(*processes: Process) -> Whole:
    whole = Whole()
    for n, process in enumerate(processes):
        whole.take(str(n), process.export())
    return whole


def test_counters_add_up_and_gauges_as_they_were_declared() -> None:
    first, second = Process(3, 10, 5.0), Process(4, 12, 2.0)
    first.pushes.value, second.pushes.value = 1, 2
    first.refusals.labels("password").value = 5
    second.refusals.labels("rate").value = 6
    samples = _samples(_whole(first, second))
    assert samples["holdfast_pushes_total"] == 3
    assert (samples["holdfast_refusals_total,password"], samples["holdfast_refusals_total,rate"]) == (5, 6)
    assert samples["holdfast_connections,tcp"] == 7
    assert (samples["holdfast_waiting"], samples["holdfast_left"]) == (12, 2)


def test_what_processes_have_of_the_system_is_merged_so_that_alerts_hold_for_the_worst() -> None:
    samples = _samples(_whole(Process(), Process()))
    one = _samples(_whole(Process()))
    assert samples["process_max_fds"] == one["process_max_fds"]
    assert samples["process_start_time_seconds"] == one["process_start_time_seconds"]
    assert samples["process_resident_memory_bytes"] > 1.5 * one["process_resident_memory_bytes"]
    assert [value for name, value in samples.items() if name.startswith("python_info")] == [1]


def test_buckets_stay_in_order_where_processes_have_other_children() -> None:
    first, second = Process(), Process()
    first.seconds.labels("b").observe(0.1)
    second.seconds.labels("a").observe(2)
    second.seconds.labels("b").observe(0.7)
    whole = _whole(first, second)
    lines = [
        line for line in whole.render()[0].decode().splitlines() if line.startswith("holdfast_seconds_bucket")
    ]
    assert lines == [
        f'holdfast_seconds_bucket{{kind="{kind}",le="{le}"}} {value}'
        for kind, values in (("a", "0.0 0.0 1.0 1.0"), ("b", "1.0 2.0 2.0 2.0"))
        for le, value in zip(("0.5", "1.0", "10.0", "+Inf"), values.split(), strict=True)
    ]
    assert _samples(whole)["holdfast_seconds_sum,b"] == pytest.approx(0.8)


def test_the_dead_leave_their_counters_and_take_their_gauges() -> None:
    first, second = Process(3, 10), Process(4, 12)
    first.pushes.value, second.pushes.value = 1, 2
    second.seconds.labels("x").observe(1)
    whole = _whole(first, second)
    whole.drop("1")
    samples = _samples(whole)
    assert samples["holdfast_pushes_total"] == 3
    assert samples["holdfast_seconds_count,x"] == 1
    assert (samples["holdfast_connections,tcp"], samples["holdfast_waiting"]) == (3, 10)


def test_who_does_not_answer_keeps_his_counters_and_loses_his_gauges() -> None:
    first, second = Process(3, 10), Process(4, 12)
    second.pushes.value = 2
    whole = _whole(first, second)
    whole.rest("1")
    whole.rest("unknown")
    samples = _samples(whole)
    assert (samples["holdfast_pushes_total"], samples["holdfast_connections,tcp"]) == (2, 3)
    whole.take("1", second.export())
    assert _samples(whole)["holdfast_connections,tcp"] == 7


def test_when_all_are_gone_their_counters_are_there() -> None:
    process = Process(3)
    process.pushes.value = 2
    whole = _whole(process)
    whole.drop("0")
    whole.drop("0")
    samples = _samples(whole)
    assert samples["holdfast_pushes_total"] == 2
    assert "holdfast_connections,tcp" not in samples


def test_what_is_no_export_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError):
        Whole().take("0", b"nonsense")


Step = tuple[int, str, int]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(("count", "scrape", "silent", "die")), st.integers(0, 5))
    )
)
def test_no_sum_ever_goes_backwards_and_what_was_scraped_is_in_it(steps: list[Step]) -> None:
    whole, seen = Whole(), 0.0
    living: dict[int, tuple[str, Process]] = {}
    scraped: Multiset[str] = Multiset()
    for serial, (slot, what, number) in enumerate(steps):
        name, process = living.setdefault(slot, (f"{slot}.{serial}", Process()))
        match what:
            case "count":
                process.pushes.value += number
            case "scrape":
                whole.take(name, process.export())
                scraped[name] = int(process.pushes.value)
            case "silent":
                whole.rest(name)
            case _:
                whole.drop(name)
                del living[slot]
        total = _samples(whole).get("holdfast_pushes_total", 0)
        assert total == scraped.total() >= seen
        seen = total


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool: apt-get install prometheus")
def test_promtool_finds_nothing_wrong() -> None:
    first, second = Process(1), Process(2)
    first.seconds.labels("b").observe(0.1)
    second.seconds.labels("a").observe(2)
    whole = _whole(first, second)
    whole.drop("1")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=whole.render()[0], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_openmetrics_where_it_is_asked_for() -> None:
    body, content_type = _whole(Process(1), Process(2)).render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert "holdfast_pushes" in {family.name for family in parse_openmetrics(body.decode())}  # type: ignore[no-untyped-call]
