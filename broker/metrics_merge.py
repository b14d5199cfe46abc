"""The metrics of several processes as those of one.

A process exports what it counts; `Whole` keeps the latest export of each. Counters and histograms add up, gauges are
merged as they were declared (`Metrics.gauge`). A process that is gone leaves its counters behind and takes its
gauges with it, so that no sum ever goes backwards: to Prometheus that would be a restart, and all that was ever
counted a rate. What the dead had counted can be packed, for whoever comes after the process that keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import msgspec
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from broker.metrics import Merge, Metrics

COUNTED: Final = frozenset(("counter", "histogram"))
MERGES: Final[Mapping[str, Callable[[Iterable[float]], float]]] = {"sum": sum, "max": max, "min": min}

SampleKey = tuple[str, tuple[tuple[str, str], ...]]  # a sample's name, and its labels


class Exported(msgspec.Struct, frozen=True, array_like=True):
    """One family of one process."""

    name: str
    about: str
    kind: str  # counter | histogram | gauge
    merge: Merge
    samples: Sequence[tuple[str, tuple[tuple[str, str], ...], float]]

    @property
    def counted(self) -> bool:
        """Its samples only grow."""
        return self.kind in COUNTED


class Gone(msgspec.Struct, frozen=True, array_like=True):
    """What the dead had counted of one family."""

    family: Exported  # without samples
    sums: Sequence[tuple[str, tuple[tuple[str, str], ...], float]]


_gone_decoder: Final = msgspec.msgpack.Decoder(list[Gone])
_decoder: Final = msgspec.msgpack.Decoder(list[Exported])


def export(metrics: Metrics) -> bytes:
    """What this process counts now."""
    return msgspec.msgpack.encode([_exported(metric, metrics) for metric in metrics.registry.collect()])


def _exported(metric: Metric, metrics: Metrics) -> Exported:
    samples = [(s.name, tuple(s.labels.items()), s.value) for s in metric.samples]
    return Exported(
        metric.name, metric.documentation, metric.type, metrics.merges.get(metric.name, "sum"), samples
    )


class Whole(Collector):
    """`take` what processes export, `drop` a process when it is gone, `render` the whole."""

    def __init__(self) -> None:
        self._latest: dict[str, list[Exported]] = {}  # by process
        self._gone: dict[
            str, tuple[Exported, dict[SampleKey, float]]
        ] = {}  # what the dead had counted, by family
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def take(self, process: str, exported: bytes) -> None:
        """`process`: a name that no other ever has. Raises msgspec.DecodeError."""
        self._latest[process] = _decoder.decode(exported)

    def rest(self, process: str) -> None:
        """It does not answer: what it counted stays, what it has now is not known."""
        latest = self._latest.get(process, ())
        self._latest[process] = [family for family in latest if family.counted]

    def drop(self, process: str) -> None:
        for family in self._latest.pop(process, ()):
            if family.counted:
                self._bury(family, family.samples)

    def _bury(
        self, family: Exported, samples: Iterable[tuple[str, tuple[tuple[str, str], ...], float]]
    ) -> None:
        _, sums = self._gone.setdefault(family.name, (family, {}))
        for name, labels, value in samples:
            sums[name, labels] = sums.get((name, labels), 0) + value

    def pack_gone(self) -> bytes:
        """What the dead had counted."""
        gone = [
            Gone(
                msgspec.structs.replace(family, samples=()),
                [(name, labels, value) for (name, labels), value in sums.items()],
            )
            for family, sums in self._gone.values()
        ]
        return msgspec.msgpack.encode(gone)

    def unpack_gone(self, packed: bytes) -> None:
        """Add what `pack_gone` of another gave."""
        for gone in _gone_decoder.decode(packed):
            self._bury(gone.family, gone.sums)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """As `Metrics.render`."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Exported] = {name: family for name, (family, _) in self._gone.items()}
        values: dict[str, dict[SampleKey, list[float]]] = {}
        for name, (_, sums) in self._gone.items():
            values[name] = {key: [value] for key, value in sums.items()}
        for exported in self._latest.values():
            for family in exported:
                families.setdefault(family.name, family)
                samples = values.setdefault(family.name, {})
                for sample, labels, value in family.samples:
                    samples.setdefault((sample, labels), []).append(value)
        return [_merged(family, values[name]) for name, family in families.items()]


def _merged(family: Exported, values: Mapping[SampleKey, Sequence[float]]) -> Metric:
    metric = Metric(family.name, family.about, family.kind)
    merge = MERGES["sum" if family.counted else family.merge]
    for (sample, labels), numbers in _in_order(values):
        metric.add_sample(sample, dict(labels), merge(numbers))
    return metric


def _in_order(
    values: Mapping[SampleKey, Sequence[float]],
) -> Iterable[tuple[SampleKey, Sequence[float]]]:
    """A histogram's samples stay together, its buckets in order, though a process may have brought children that
    others do not have: children are sorted by their labels, the rest stays as it came."""
    return sorted(values.items(), key=lambda item: tuple(pair for pair in item[0][1] if pair[0] != "le"))
