"""What a trial came to: the shape of its JSON (docs/loadtest.md has every key), and how it is made of the account."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import msgspec

from loadtest.histogram import Histogram
from loadtest.report import machine
from loadtest.trial.bottleneck import notices
from loadtest.trial.conductor import Conductor
from loadtest.trial.plan import Plan
from loadtest.trial.sampler import Sample, Use
from loadtest.trial.target import Target

FORMAT: Final = 1
QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
HOUR: Final = 3600.0
GROWTH_FROM: Final = 0.2  # of the trial: memory grows before that because things are made for the first time
GROWTH_LEAST: Final = 60.0  # seconds: of less, an hour says nothing


class Latency(msgspec.Struct, frozen=True):
    """Seconds; None: there was nothing to measure."""

    count: int
    p50: float | None
    p90: float | None
    p99: float | None
    p999: float | None
    max: float | None


class Connects(msgspec.Struct, frozen=True):
    online: int  # at the end
    connected: int  # CONNACKs with success
    dropped: dict[str, int]  # devices that lost their connection, by reason
    failed: dict[str, int]  # tries that came to nothing
    refused: dict[str, int]  # devices that must not come back
    breaks: int  # of devices that went away on purpose
    latency: Latency  # from when a connect was due until the device was online
    a_second: float  # while all connected


class Pushes(msgspec.Struct, frozen=True):
    sent: int
    accepted: int
    refused: dict[str, int]
    unanswered: int
    latency: Latency  # from when a push was due until the server had accepted it


class Deliveries(msgspec.Struct, frozen=True):
    arrived: int
    lost: int  # accepted, and did not come in time
    under_way: int  # when somebody ended the trial
    repeated: int
    strayed: int  # to devices that they were not for, or of an earlier trial
    latency: (
        Latency  # from when a push was due (or its device, if that was away on purpose) until it was there
    )
    a_second: float  # while pushes were due


class Receipts(msgspec.Struct, frozen=True):
    sent: int
    answered: int


class Server(msgspec.Struct, frozen=True):
    """None: neither its pid nor its /metrics was known, or could be read."""

    memory_first: int | None
    memory_last: int | None
    memory_most: int | None
    memory_a_device: float | None  # bytes: the growth while all connected
    memory_growth: (
        float | None
    )  # bytes an hour, of the line through the last four fifths of the trial; None in a minute
    cpu: float | None  # cores, on average
    trouble: str


class Process(msgspec.Struct, frozen=True):
    """One of the generator's; shares of a core, and of the time in which it could have run and had no core."""

    name: str
    devices: int
    cpu: float
    cpu_most: float  # of a window
    waited: float


class Generator(msgspec.Struct, frozen=True):
    processes: list[Process]
    behind: Latency  # from when a push was due until it was sent
    bottleneck: list[str]  # why the numbers may be the generator's; nothing if they are not


class Window(msgspec.Struct, frozen=True):
    """Latencies and what was lost are of pushes that were due in it; the rest is as it was at its end."""

    at: float  # seconds since the trial began, of its end
    due: int
    online: int | None
    arrivals: int | None  # deliveries in it, whenever they were due
    p50: float | None
    p90: float | None
    p99: float | None
    p999: float | None
    max: float | None
    connect_p99: float | None
    lost: int
    behind: float  # the latest push that was sent
    server_memory: int | None
    server_cpu: float | None  # cores


class PhaseResult(msgspec.Struct, frozen=True):
    name: str
    begin: float
    end: float


class Verdict(msgspec.Struct, frozen=True):
    threshold: str
    wanted: float
    measured: float | None  # None: it was not measured, which is a miss
    met: bool


class Result(msgspec.Struct, frozen=True):
    format: int
    scenario: str
    began: str  # RFC 3339
    seconds: float
    ended: str  # "complete", "stopped" or why it was given up
    target: dict[str, Any]
    plan: dict[str, Any]
    machine: str  # of the generator
    phases: list[PhaseResult]
    connects: Connects
    pushes: Pushes
    deliveries: Deliveries
    receipts: Receipts
    server: Server
    generator: Generator
    notes: list[str]
    window: float  # seconds
    windows: list[Window]
    verdicts: list[Verdict] = []


def read_result(text: bytes) -> Result:
    """Raises ValueError."""
    result = msgspec.json.decode(text, type=Result)
    if result.format != FORMAT:
        raise ValueError(f"its format is {result.format}, and not {FORMAT}")
    return result


def write_result(result: Result) -> bytes:
    return msgspec.json.format(msgspec.json.encode(result)) + b"\n"


# From the account


def make_result(conductor: Conductor, ended: str) -> Result:
    """After `conductor.finish()`."""
    account, status = conductor.account, conductor.swarms.status
    missing = account.close(lost=not conductor.stopped)
    deliveries, connects = Histogram(), Histogram()
    for window in account.windows.values():
        deliveries.merge(window.latencies.counts)
        connects.merge(window.connects.counts)
    now = time.perf_counter()
    return Result(
        format=FORMAT,
        scenario=conductor.plan.scenario,
        began=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - (now - conductor.begun))),
        seconds=now - conductor.begun,
        ended=ended,
        target=describe_target(conductor.target),
        plan=describe_plan(conductor.plan),
        machine=machine(),
        phases=[PhaseResult(one.name, one.begin, one.end) for one in conductor.phases],
        connects=Connects(
            online=status.online,
            connected=status.counts.get("connects", 0),
            dropped=dict(status.lost),
            failed=dict(status.failed),
            refused=dict(status.refused),
            breaks=status.counts.get("breaks", 0),
            latency=latency_of(connects),
            a_second=_connect_rate(conductor),
        ),
        pushes=Pushes(
            sent=account.sent,
            accepted=account.accepted,
            refused=dict(account.refusals),
            unanswered=len(account.unanswered) + len(account.posted),
            latency=latency_of(account.answers),
        ),
        deliveries=Deliveries(
            arrived=account.arrivals,
            lost=0 if conductor.stopped else missing,
            under_way=missing if conductor.stopped else 0,
            repeated=account.repeated,
            strayed=account.strayed,
            latency=latency_of(deliveries),
            a_second=_delivery_rate(conductor),
        ),
        receipts=Receipts(status.counts.get("receipts", 0), status.counts.get("receipts_answered", 0)),
        server=_server(conductor),
        generator=Generator(
            processes=[_process(use) for use in conductor.sampler.uses],
            behind=latency_of(account.behind),
            bottleneck=notices(conductor),
        ),
        notes=_notes(conductor),
        window=conductor.plan.window,
        windows=_windows(conductor),
    )


def latency_of(histogram: Histogram) -> Latency:
    if not histogram.count:
        return Latency(0, None, None, None, None, None)
    return Latency(histogram.count, *histogram.quantiles([*QUANTILES.values(), 1.0]))


def describe_target(target: Target) -> dict[str, Any]:
    """Without what is secret."""
    return {
        "kind": target.kind,
        "mqtt": target.mqtt.url("mqtt"),
        "http": None if target.http is None else target.http.url("http"),
        "insecure": target.insecure,
    }


def describe_plan(plan: Plan) -> dict[str, Any]:
    described: dict[str, Any] = msgspec.to_builtins(plan)
    return described


def _process(use: Use) -> Process:
    return Process(
        use.process.name, use.process.devices, use.mean_cpu, max(use.cpu, default=0.0), use.mean_waited
    )


def _notes(conductor: Conductor) -> list[str]:
    notes = [conductor.given_up] if conductor.given_up else []
    if conductor.target.insecure:
        notes.append("no certificate was checked (--insecure)")
    if conductor.queued:
        notes.append(
            f"up to {conductor.queued:,} pushes waited for one of {conductor.plan.connections} HTTP connections: "
            "the server answers more slowly than asked, or --connections is too small"
        )
    return notes


def _span(conductor: Conductor, names: Sequence[str]) -> tuple[float, float] | None:
    """When the first phase of these began, and ended."""
    return next(((one.begin, one.end) for one in conductor.phases if one.name in names), None)


def _connect_rate(conductor: Conductor) -> float:
    span = _span(conductor, ("connect", "storm"))
    if span is None:
        return 0.0
    counted = sum(window.connects.count for window in conductor.account.windows.values())
    return min(counted, conductor.swarms.devices) / max(span[1] - span[0], 1e-9)


def _delivery_rate(conductor: Conductor) -> float:
    """From the beginning of the phase in which they came until the last sample in which one did."""
    samples = conductor.sampler.samples
    rising = [(before, after) for before, after in pairwise(samples) if after.arrived > before.arrived]
    if not rising:
        return 0.0
    first, last = rising[0][0], rising[-1][1]
    return (last.arrived - first.arrived) / max(last.at - first.at, 1e-9)


def _server(conductor: Conductor) -> Server:
    samples = conductor.sampler.samples
    memory = [(one.at, one.server_memory) for one in samples if one.server_memory is not None]
    cpu = [(one.at, one.server_cpu) for one in samples if one.server_cpu is not None]
    cores = None
    if len(cpu) > 1:
        cores = (cpu[-1][1] - cpu[0][1]) / (cpu[-1][0] - cpu[0][0])
    return Server(
        memory_first=memory[0][1] if memory else None,
        memory_last=memory[-1][1] if memory else None,
        memory_most=max((value for _, value in memory), default=None),
        memory_a_device=_memory_a_device(conductor),
        memory_growth=growth_of(memory, conductor.begun),
        cpu=cores,
        trouble=conductor.sampler.trouble,
    )


def _memory_a_device(conductor: Conductor) -> float | None:
    """Between the first sample, which is taken before anybody connects, and the first one after all have."""
    span = _span(conductor, ("connect", "storm"))
    samples = conductor.sampler.samples
    after = [one for one in samples if span and one.at - conductor.begun >= span[1] and one.online]
    if not after or after[0].server_memory is None or samples[0].server_memory is None:
        return None
    return (after[0].server_memory - samples[0].server_memory) / after[0].online


def growth_of(memory: Sequence[tuple[float, int]], begun: float) -> float | None:
    """The slope of the least squares' line, bytes an hour."""
    if not memory:
        return None
    start = begun + (memory[-1][0] - begun) * GROWTH_FROM
    points = [(at, value) for at, value in memory if at >= start]
    if len(points) < 2 or points[-1][0] - points[0][0] < GROWTH_LEAST:
        return None
    mean_at = sum(at for at, _ in points) / len(points)
    mean = sum(value for _, value in points) / len(points)
    spread = sum((at - mean_at) ** 2 for at, _ in points)
    return sum((at - mean_at) * (value - mean) for at, value in points) / spread * HOUR


def _windows(conductor: Conductor) -> list[Window]:
    account = conductor.account
    samples = _by_window(conductor)
    last = max([*account.windows, *samples], default=-1)
    rows, before = [], conductor.sampler.samples[0]
    for number in range(last + 1):
        window, sample = account.windows.get(number), samples.get(number)
        latencies = latency_of(window.latencies if window else Histogram())
        connects = latency_of(window.connects if window else Histogram())
        cpu = None
        if sample and sample.server_cpu is not None and before.server_cpu is not None:
            cpu = (sample.server_cpu - before.server_cpu) / max(sample.at - before.at, 1e-9)
        rows.append(
            Window(
                at=account.end_of(number) - conductor.begun,
                due=window.due if window else 0,
                online=sample.online if sample else None,
                arrivals=sample.arrived - before.arrived if sample else None,
                p50=latencies.p50,
                p90=latencies.p90,
                p99=latencies.p99,
                p999=latencies.p999,
                max=latencies.max,
                connect_p99=connects.p99,
                lost=window.lost if window else 0,
                behind=window.behind if window else 0.0,
                server_memory=sample.server_memory if sample else None,
                server_cpu=cpu,
            )
        )
        before = sample or before
    return rows


def _by_window(conductor: Conductor) -> Mapping[int, Sample]:
    """Each sample at the window that ended when it was taken; the first, which is before all, is none of them."""
    account = conductor.account
    return {max(0, account.number(one.at) - 1): one for one in conductor.sampler.samples[1:]}
