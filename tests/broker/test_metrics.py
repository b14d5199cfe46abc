from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from broker.metrics import (
    LABEL_LIMIT,
    Family,
    Histogram,
    HttpMetrics,
    LoopLag,
    Metrics,
    StoreMetrics,
)
from broker.pulse import end_of_pause
from broker.sqlite.threads import StoreStats

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def _failed(commits: int) -> StoreStats:
    stats = StoreStats()
    stats.failed_commits = commits
    return stats


def _samples(metrics: Metrics) -> dict[str, float]:
    """Sample name with its labels -> value."""
    text = metrics.render()[0].decode()
    return {
        sample.name + "".join(f",{v}" for v in sample.labels.values()): sample.value
        for family in parse_text(text)
        for sample in family.samples
    }


def _used(metrics: Metrics) -> None:
    store = StoreMetrics(metrics, _failed(2))
    store.on_commit(3, 0.002)
    HttpMetrics(metrics).observe('/v3/"push"\n', 200, 0.001)
    metrics.gauge("connections", "Now.", lambda: {("tcp", "5"): 3}, "transport", "version")
    metrics.gauge("devices", "Now.", lambda: 7)


def test_counts_are_scraped() -> None:
    metrics = Metrics()
    counter = metrics.counter("pushes", "Pushes.")
    refusals = metrics.counters("refusals", "Refused.", "reason")
    assert _samples(metrics)["holdfast_pushes_total"] == 0
    counter.value += 2
    refusals.labels("password").value += 1
    _used(metrics)
    samples = _samples(metrics)
    assert samples["holdfast_pushes_total"] == 2
    assert samples["holdfast_refusals_total,password"] == 1
    assert samples["holdfast_store_failed_commits_total"] == 2
    assert samples["holdfast_connections,tcp,5"] == 3
    assert samples["holdfast_devices"] == 7
    assert "process_resident_memory_bytes" in samples
    assert "python_gc_collections_total,0" in samples


@given(st.lists(st.tuples(st.floats(0, 4), st.integers(0, 1000)), max_size=20))
def test_a_histogram_counts_each_value_in_the_first_bucket_that_holds_it(
    values: list[tuple[float, int]],
) -> None:
    histogram = Histogram((0.5, 1.0, 2.0))
    for value, count in values:
        histogram.observe(value, count)
    for (name, counted), bound in zip(histogram.buckets(), (0.5, 1.0, 2.0, 1e9), strict=True):
        assert counted == sum(count for value, count in values if value <= bound), name
    assert histogram.total == pytest.approx(sum(value * count for value, count in values))


def test_label_values_are_bounded() -> None:
    family: Family[Histogram] = Metrics().histograms("x", "About.", "reason")
    for number in range(LABEL_LIMIT + 100):
        family.labels(str(number)).observe(1.0)
    assert len(family.children) == LABEL_LIMIT + 1
    assert sum(family.labels("other").counts) == 100


def test_the_wrong_number_of_labels_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="reason"):
        Metrics().counters("x", "About.", "reason").labels()


def test_openmetrics_where_it_is_asked_for() -> None:
    metrics = Metrics()
    _used(metrics)
    body, content_type = metrics.render(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")
    assert "holdfast_http_requests" in {family.name for family in parse_openmetrics(body.decode())}  # type: ignore[no-untyped-call]
    assert metrics.render("text/html")[1].startswith("text/plain; version=0.0.4")


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool: apt-get install prometheus")
def test_promtool_finds_nothing_wrong() -> None:
    metrics = Metrics()
    _used(metrics)
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics.render()[0], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_servers_in_one_process_do_not_share_metrics() -> None:
    first, second = Metrics(), Metrics()
    first.counter("x", "About.").value += 1
    assert _samples(second).get("holdfast_x_total") is None


def test_the_store_refuses_while_commits_fail_and_for_a_while_after() -> None:
    now, stats = [100.0], StoreStats()
    store = StoreMetrics(Metrics(), stats, lambda: now[0])
    assert store.refusing() is None
    stats.failed_commits = 1
    assert store.refusing() == "the store refuses writes"
    now[0] = 129.0
    assert store.refusing() is not None
    now[0] = 130.0
    assert store.refusing() is None
    stats.failed_commits = 2
    assert store.refusing() is not None
    store.on_commit(1, 0.1)
    assert store.refusing() is None


class Loop:
    """A loop whose clock we move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.real = asyncio.get_running_loop()

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        self.when, self.callback = when, callback
        return self.real.call_later(3600, print)

    def run(self, at: float) -> None:
        self.now = at
        self.callback()


async def test_loop_lag_shows_a_callback_that_takes_too_long() -> None:
    loop, metrics = Loop(), Metrics()
    lag = LoopLag(metrics, loop)  # type: ignore[arg-type]
    loop.run(at=loop.when)
    loop.run(at=loop.when + 0.25)
    lag.close()
    assert lag.last == pytest.approx(0.25)
    assert _samples(metrics)["holdfast_event_loop_lag_seconds_bucket,0.2"] == 1
    assert _samples(metrics)["holdfast_event_loop_lag_seconds_count"] == 2


async def test_a_loop_that_sleeps_is_woken_less_often_for_its_lag() -> None:
    loop = Loop()
    lag = LoopLag(Metrics(), loop)  # type: ignore[arg-type]
    loop.run(at=1000.0)  # no test takes a tenth of that
    assert loop.when == end_of_pause(1000.0, 0.25)
    loop.run(at=1000.0)  # whatever was done since was done in no time
    assert loop.when == 1000.1
    lag.close()
