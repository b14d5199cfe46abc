"""Metrics: cheap to count, turned into Prometheus families only when scraped.

What is counted on a hot path is a plain number in a `Counter` or `Histogram`: no lock, no call into
prometheus_client. All of it belongs to the event loop's thread. A family with labels holds at most
`LABEL_LIMIT` combinations; more are counted as "other", so that nothing a peer sends grows memory. There is
no global registry: each server has its own `Metrics`.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, Generic, Literal, TypeVar

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from broker.pulse import end_of_pause
from broker.store import StoreStats

LABEL_LIMIT: Final = 1000
OTHER: Final = "other"

REFUSAL_LAPSE: Final = 30.0

PROCESS_MERGES: Final[Mapping[str, Merge]] = {
    "process_open_fds": "max",
    "process_max_fds": "min",
    "process_start_time_seconds": "min",
    "python_info": "max",
}

LATENCY_BOUNDS: Final = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1),
    *(0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0),
)
SIZE_BOUNDS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0)

Merge = Literal["sum", "max", "min"]
"""How gauges of several processes become one: what each has of its own adds up; of what all see alike, or of a limit
that one of them meets first, the worst counts."""

Labels = tuple[str, ...]
Read = Callable[[], float | Mapping[Labels, float]]


class Counter:
    """`counter.value += 1`."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0


class Histogram:
    """Counts by bucket; `bounds` are the upper limits, ascending, +Inf left out."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = LATENCY_BOUNDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count `count` events of the same value: a write that settles a thousand deliveries is one call."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def buckets(self) -> Iterator[tuple[str, float]]:
        """Cumulative, as Prometheus wants them."""
        running = 0
        for bound, count in zip((*self.bounds, inf), self.counts, strict=True):
            running += count
            yield "+Inf" if bound == inf else str(bound), running


Child = TypeVar("Child", bound=Counter | Histogram)


class Family(Generic[Child]):
    """One metric with labels. Keep what `labels` returns where a lookup would be too much."""

    __slots__ = ("about", "children", "label_names", "make", "name")

    def __init__(self, name: str, about: str, label_names: Labels, make: Callable[[], Child]) -> None:
        self.name = name
        self.about = about
        self.label_names = label_names
        self.make: Callable[[], Child] = make
        self.children: dict[Labels, Child] = {}

    def labels(self, *values: str) -> Child:
        """The child with these label values; the shared "other" one past LABEL_LIMIT."""
        child = self.children.get(values)
        return child if child is not None else self._add(values)

    def _add(self, values: Labels) -> Child:
        if len(values) != len(self.label_names):
            raise AssertionError(f"{self.name} has the labels {self.label_names}, not {values}")
        if len(self.children) >= LABEL_LIMIT:
            values = (OTHER,) * len(values)
        return self.children.setdefault(values, self.make())


class Metrics:
    """All metrics of one server. Names are without the `holdfast_` prefix and without `_total`. `process`: with those
    of the process itself, its memory and files."""

    def __init__(self, *, process: bool = True) -> None:
        self.registry = CollectorRegistry()
        self._families: list[Family[Counter] | Family[Histogram]] = []
        self._readings: list[_Reading] = []
        self.merges: dict[str, Merge] = dict(PROCESS_MERGES)  # of gauges
        if process:
            ProcessCollector(registry=self.registry)
            PlatformCollector(registry=self.registry)
            GCCollector(registry=self.registry)
        self.registry.register(_Collector(self))

    def counter(self, name: str, about: str) -> Counter:
        return self.counters(name, about).labels()

    def counters(self, name: str, about: str, *label_names: str) -> Family[Counter]:
        family = Family(f"holdfast_{name}", about, label_names, Counter)
        self._families.append(family)
        return family

    def histogram(self, name: str, about: str, bounds: Sequence[float] = LATENCY_BOUNDS) -> Histogram:
        return self.histograms(name, about, bounds=bounds).labels()

    def histograms(
        self, name: str, about: str, *label_names: str, bounds: Sequence[float] = LATENCY_BOUNDS
    ) -> Family[Histogram]:
        family = Family(f"holdfast_{name}", about, label_names, lambda: Histogram(bounds))
        self._families.append(family)
        return family

    def gauge(self, name: str, about: str, read: Read, *label_names: str, merge: Merge = "sum") -> None:
        """`read` is called at each scrape; with labels it returns a mapping of label values to numbers."""
        self.merges[f"holdfast_{name}"] = merge
        self._readings.append(_Reading(GaugeMetricFamily, f"holdfast_{name}", about, label_names, read))

    def read_counter(self, name: str, about: str, read: Read, *label_names: str) -> None:
        """A counter that is kept elsewhere; `read` as for a gauge."""
        self._readings.append(_Reading(CounterMetricFamily, f"holdfast_{name}", about, label_names, read))

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            yield _as_metric(family)
        for reading in self._readings:
            yield reading.as_metric()

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """A scrape's body and content type: OpenMetrics where `accept` asks for it, else the text format."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


@dataclass(frozen=True, slots=True)
class _Reading:
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily]
    name: str
    about: str
    label_names: Labels
    read: Read

    def as_metric(self) -> Metric:
        metric = self.kind(self.name, self.about, labels=self.label_names)
        value = self.read()
        for labels, number in value.items() if isinstance(value, Mapping) else [((), value)]:
            metric.add_metric(labels, number)
        return metric


class _Collector:
    """What prometheus_client registers."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        return ()  # else `register` would read every gauge before its owner exists

    def collect(self) -> Iterable[Metric]:
        return self._metrics.collect()


def _as_metric(family: Family[Counter] | Family[Histogram]) -> Metric:
    counters = CounterMetricFamily(family.name, family.about, labels=family.label_names)
    histograms = HistogramMetricFamily(family.name, family.about, labels=family.label_names)
    kind: Metric = counters if family.make is Counter else histograms
    for values, child in family.children.items():
        if isinstance(child, Counter):
            counters.add_metric(values, child.value)
        else:
            histograms.add_metric(values, list(child.buckets()), child.total)
    return kind


# What the broker counts


class StoreMetrics:
    """`on_commit` is the store's hook, `refusing` a check of readiness."""

    def __init__(
        self, metrics: Metrics, stats: StoreStats, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stats = stats
        self._clock = clock
        self._seen_failed = stats.failed_commits
        self._failed_at: float | None = None  # None: the last commit went well
        self._seconds = metrics.histogram("store_commit_seconds", "Time of one commit, fsync included.")
        self._operations = metrics.histogram(
            "store_commit_operations", "Writes that shared one commit.", bounds=SIZE_BOUNDS
        )
        metrics.read_counter(
            "store_failed_commits",
            "Commits that failed; their writes changed nothing.",
            lambda: stats.failed_commits,
        )

    def on_commit(self, operations: int, seconds: float) -> None:
        """Called on the event loop's thread after each commit."""
        self._seconds.observe(seconds)
        self._operations.observe(operations)
        self._seen_failed, self._failed_at = self._stats.failed_commits, None

    def refusing(self) -> str | None:
        """A reason while commits fail. It lapses: a server that gets no traffic for it has nothing to commit,
        and would never be ready again."""
        if self._stats.failed_commits > self._seen_failed:
            self._seen_failed, self._failed_at = self._stats.failed_commits, self._clock()
        lapsed = self._failed_at is None or self._clock() >= self._failed_at + REFUSAL_LAPSE
        return None if lapsed else "the store refuses writes"


class HttpMetrics:
    def __init__(self, metrics: Metrics) -> None:
        self._requests = metrics.counters("http_requests", "Requests answered.", "endpoint", "status")
        self._seconds = metrics.histograms("http_request_seconds", "Time to answer a request.", "endpoint")

    def observe(self, endpoint: str, status: int, seconds: float) -> None:
        """`endpoint` is a route's pattern, never a path as the peer sent it."""
        self._requests.labels(endpoint, str(status)).value += 1
        self._seconds.labels(endpoint).observe(seconds)


class LoopLag:
    """How late the event loop runs its timers: what a callback that takes too long does to everybody else."""

    OFTEN: Final = 0.1  # seconds between two samples of a loop that works,
    RARELY: Final = 0.25  # and of one that mostly sleeps
    BUSY: Final = 0.1  # of a core: it works

    def __init__(self, metrics: Metrics, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self._histogram = metrics.histogram("event_loop_lag_seconds", "How late a timer ran.")
        self.last = 0.0
        self._sampled, self._cpu = self._loop.time(), time.thread_time()
        self._due = end_of_pause(self._sampled, self.RARELY)
        self._timer = self._loop.call_at(self._due, self._sample)

    def close(self) -> None:
        self._timer.cancel()

    def _sample(self) -> None:
        now = self._loop.time()
        self.last = max(0.0, now - self._due)
        self._histogram.observe(self.last)
        cpu = time.thread_time()
        works = cpu - self._cpu > self.BUSY * (now - self._sampled)
        self._sampled, self._cpu = now, cpu
        self._due = now + self.OFTEN if works else end_of_pause(now, self.RARELY)
        self._timer = self._loop.call_at(self._due, self._sample)
