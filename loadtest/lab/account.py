"""What became of the pushes of one contender in one network: the columns of the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from loadtest.lab.networks import Network
from loadtest.lab.plan import PlannedPush, oracle_heartbeats

WITHIN: Final = (1.0, 5.0, 30.0, 300.0)  # seconds
NEVER: Final = math.inf
BACK: Final = 15.0  # seconds; wanted of devices that can go another way
UNTOUCHED: Final = 1.0  # a push so soon after an event may have been on its way before
SAME_TIME: Final = 0.05  # seconds; what differs by less is the machine's noise
SAME: Final = 0.05  # share


@dataclass(frozen=True, slots=True)
class Happening:
    """A line of the devices' log."""

    what: str  # on, off, got
    device: int
    at: float  # time.monotonic()
    serial: int = 0


def read_log(text: str) -> list[Happening]:
    """What a process that was killed left half-written is not read."""
    found = []
    for line in text.splitlines(keepends=True):
        words = line.split()
        if line.endswith("\n") and len(words) in (3, 4) and words[0] in ("on", "off", "got"):
            serial = int(words[3]) if len(words) == 4 else 0
            found.append(Happening(words[0], int(words[1]), float(words[2]), serial))
    return found


def read_accepted(text: str) -> dict[int, float]:
    """Serial -> when the server had taken it."""
    rows = (line.split() for line in text.splitlines() if line.startswith("accepted "))
    return {int(row[1]): float(row[2]) for row in rows if len(row) == 3}


@dataclass(frozen=True, slots=True)
class Result:
    """Times in seconds from the moment a push was due; NEVER: it did not come. `back`: seconds from the beginning of
    an event until a device that it cut off was online again; `again`: the same, from when the device noticed."""

    network: str
    contender: str
    pushes: int  # that count for shares and times
    shares: Mapping[float, float]  # arrived within so many seconds
    p50: float
    p99: float
    lost: int  # of all that were accepted
    refused: int  # not accepted: the publisher was told
    repeats: int  # seen twice by the application
    heartbeats: float  # of a device, an hour
    oracle: float  # the same, of one who knows the NAT
    bytes_per_push: float  # that arrived
    back: Sequence[float] = ()
    again: Sequence[float] = ()
    times: Sequence[float] = field(default=(), repr=False)  # of each push, sorted
    dropped: Mapping[str, int] = field(default_factory=dict)  # packets, by why

    @property
    def back_worst(self) -> float | None:
        return max(self.back) if self.back else None

    @property
    def again_worst(self) -> float | None:
        return max(self.again) if self.again else None


def make_result(
    network: Network,
    contender: str,
    plan: Sequence[PlannedPush],
    accepted: Iterable[int],
    log: Sequence[Happening],
    counts: Mapping[str, int],
    start: float,
) -> Result:
    """`start`: of time.monotonic(); `counts`: of the path (path.Counts)."""
    taken = set(accepted)
    first, repeats = _arrivals(plan, log)
    due = {push.serial: start + push.at for push in plan}
    counted = [push.serial for push in plan if push.counted and push.serial in taken]
    times = sorted(first[serial] - due[serial] if serial in first else NEVER for serial in counted)
    hours = network.end / 3600
    cuts = cut_off(network, plan, log, start)
    return Result(
        network.name,
        contender,
        len(times),
        {limit: _share(times, limit) for limit in WITHIN},
        quantile(times, 0.5),
        quantile(times, 0.99),
        len(taken - first.keys()),
        len(due.keys() - taken),
        repeats,
        counts["heartbeats"] / network.devices / hours,
        oracle_heartbeats(network, plan),
        (counts["up_bytes"] + counts["down_bytes"]) / max(1, len(first)),
        [cut.back for cut in cuts],
        [cut.back - cut.noticed for cut in cuts if cut.noticed != NEVER],
        times,
        {why: counts[why] for why in ("lost", "full", "forgotten", "dead", "too_long") if counts[why]},
    )


def _arrivals(plan: Sequence[PlannedPush], log: Sequence[Happening]) -> tuple[dict[int, float], int]:
    """When each came first, and how many came again. What is nobody's, or another's, is an error of the lab."""
    targets = {push.serial: push.device for push in plan}
    first: dict[int, float] = {}
    repeats = 0
    for one in log:
        if one.what != "got":
            continue
        assert targets.get(one.serial) == one.device, f"push {one.serial} came to device {one.device}"
        repeats += one.serial in first
        first.setdefault(one.serial, one.at)
    return first, repeats


@dataclass(frozen=True, slots=True)
class Cut:
    """A device that an event cut off: seconds after it when the device noticed, and when it was online again."""

    noticed: float
    back: float


def cut_off(
    network: Network, plan: Sequence[PlannedPush], log: Sequence[Happening], start: float
) -> list[Cut]:
    """A device that gets a push and was not offline before it was not cut off, nor is one to which no more are sent.
    One that does nothing more: NEVER."""
    last = {push.device: push.at for push in sorted(plan, key=lambda push: push.at)}
    return [
        cut
        for event in network.event
        for at in event.times(network.end)
        for device in range(network.devices)
        if at < last.get(device, 0.0) and (cut := _cut_off(log, device, start + at)) is not None
    ]


def _cut_off(log: Sequence[Happening], device: int, at: float) -> Cut | None:
    noticed = NEVER
    for one in log:
        if one.device != device or one.at <= at:
            continue
        if one.what == "on":
            return Cut(min(noticed, one.at - at), one.at - at)
        if one.what == "off":
            noticed = min(noticed, one.at - at)
        elif one.at > at + UNTOUCHED:
            return None
    return Cut(noticed, NEVER)


def _share(times: Sequence[float], limit: float) -> float:
    return sum(time <= limit for time in times) / len(times) if times else 0.0


def quantile(times: Sequence[float], share: float) -> float:
    """The nearest rank of what is sorted: NEVER if that one did not come, 0 for none."""
    return times[max(0, math.ceil(share * len(times)) - 1)] if times else 0.0


# What is wanted


def shortcomings(network: Network, results: Mapping[str, Result]) -> list[str]:
    """What the contender `a` does not reach: what holds everywhere, what this network wants, and each column in which
    `c` is better."""
    ours = results["a"]
    missed = []
    if ours.lost:
        missed.append(f"{ours.lost} lost")
    if ours.repeats:
        missed.append(f"{ours.repeats} repeated")
    for wish in network.wanted:
        missed += _missed(wish, network, ours, results.get("c"))
    if "c" in results:
        missed += worse(ours, results["c"])
    return missed


def _missed(wish: str, network: Network, ours: Result, theirs: Result | None) -> list[str]:
    """One wish of networks.toml, as the issue says it."""
    if wish == "within-5" and ours.shares[5.0] < 0.99:
        return [f"{ours.shares[5.0]:.1%} within 5 s, wanted 99 %"]
    if wish == "oracle":
        within = _share(ours.times, 10.0)
        missed = [] if within >= 0.99 else [f"{within:.1%} within 10 s, wanted 99 %"]
        if ours.heartbeats > 1.3 * ours.oracle:
            missed.append(
                f"{ours.heartbeats:.1f} heartbeats /h, wanted 1.3 of the oracle's {ours.oracle:.1f}"
            )
        return missed
    if wish == "back":
        return _missed_back(network, ours)
    if wish == "tenfold" and theirs is not None and ours.p99 * 10 > theirs.p99:
        return [f"p99 {ours.p99:.2f} s against {theirs.p99:.2f} s, wanted a tenth"]
    return []


def _missed_back(network: Network, ours: Result) -> list[str]:
    """Phones that were not told have to notice first, and nothing can help them to but packets of theirs."""
    told = any(event.told for event in network.event)
    worst = ours.back_worst if told else ours.again_worst
    if worst is None or worst <= BACK:
        return []
    return [f"back {worst:.1f} s after {'the event' if told else 'it was noticed'}, wanted {BACK:g}"]


def worse(ours: Result, theirs: Result) -> list[str]:
    """Each column in which `theirs` is better by more than the machine's noise."""
    found = [
        f"within {limit:g} s: {ours.shares[limit]:.1%} against {theirs.shares[limit]:.1%}"
        for limit in WITHIN
        if ours.shares[limit] < theirs.shares[limit] - SAME / 10
    ]
    for name, mine, other, noise in (
        ("p50", ours.p50, theirs.p50, SAME_TIME),
        ("p99", ours.p99, theirs.p99, SAME_TIME),
        ("heartbeats", ours.heartbeats, theirs.heartbeats, 0.5),
        ("bytes", ours.bytes_per_push, theirs.bytes_per_push, 1.0),
    ):
        if mine > other * (1 + SAME) + noise:
            found.append(f"{name}: {mine:.3g} against {other:.3g}")
    if ours.lost > theirs.lost or ours.repeats > theirs.repeats:
        found.append("lost or repeated more")
    return found
