"""Whether the generator is what was measured: its CPU, its waits for a core, schedules that fell behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loadtest.histogram import Histogram
from loadtest.trial.conductor import Conductor
from loadtest.trial.limits import cores
from loadtest.trial.sampler import Sample, Use

BUSY: Final = 0.9  # of a core, in one window
BUSY_OFTEN: Final = 0.1  # of the windows
WAITED: Final = 0.2  # of the time
BEHIND: Final = 0.02  # seconds, at the 99th percentile of pushes
CONNECTS_BEHIND: Final = 0.25  # seconds, the latest of a process
FULL: Final = 0.95  # of all cores


def notices(conductor: Conductor) -> list[str]:
    """One line for each reason; none if the generator was quick enough."""
    found = [line for use in conductor.sampler.uses for line in accuse_process(use)]
    found += accuse_schedule(conductor.account.behind)
    for number, late in sorted(conductor.account.connects_behind.items()):
        found += accuse_connects(conductor.sampler.uses[1 + number].process.name, late / 1000)
    return found + accuse_machine(conductor.sampler.samples)


def accuse_process(use: Use) -> list[str]:
    found = []
    busy = [share for share in use.cpu if share >= BUSY]
    if use.cpu and len(busy) >= max(1, BUSY_OFTEN * len(use.cpu)):
        found.append(
            f"{use.process.name}: used {max(busy):.0%} of a core, and {BUSY:.0%} or more in {len(busy)} of "
            f"{len(use.cpu)} windows{_more(use)}"
        )
    if use.mean_waited >= WAITED:
        found.append(
            f"{use.process.name}: waited for a core {use.mean_waited:.0%} of the time: others use this machine"
        )
    return found


def _more(use: Use) -> str:
    return ": more --processes would spread it" if use.process.devices else ""


def accuse_schedule(behind: Histogram) -> list[str]:
    if not behind.count or (late := behind.quantile(0.99)) < BEHIND:
        return []
    return [
        f"publisher: one in a hundred pushes left {late * 1000:,.0f} ms or more after it was due; "
        "latencies contain that"
    ]


def accuse_connects(name: str, late: float) -> list[str]:
    if late < CONNECTS_BEHIND:
        return []
    return [f"{name}: connects began up to {late:.2f} s after they were due; their latencies contain that"]


def accuse_machine(samples: Sequence[Sample]) -> list[str]:
    if len(samples) < 2 or samples[-1].at <= samples[0].at:
        return []
    used = (samples[-1].machine_cpu - samples[0].machine_cpu) / (samples[-1].at - samples[0].at) / cores()
    return (
        [f"this machine: its cores were busy {used:.0%} of the time, whoever used them"]
        if used >= FULL
        else []
    )
