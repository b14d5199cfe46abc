"""A result as text, for whoever ran the trial; page.py has the same sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loadtest.trial.results import Latency, Result, Verdict

KB, MB = 1 << 10, 1 << 20
Row = tuple[str, str]
Section = tuple[str, Sequence[Row]]


def show_time(seconds: float | None) -> str:
    """Three digits."""
    if seconds is None:
        return "-"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def show_memory(size: float | None) -> str:
    if size is None:
        return "-"
    return f"{size / MB:,.1f} MB" if abs(size) >= MB else f"{size / KB:,.1f} KB"


def show_latency(latency: Latency) -> str:
    names = ("p50", "p90", "p99", "p999", "max")
    if not latency.count:
        return "-"
    return ", ".join(
        f"{'p99.9' if name == 'p999' else name} {show_time(getattr(latency, name))}" for name in names
    )


def show_reasons(total: int, reasons: Mapping[str, int]) -> str:
    ranked = sorted(reasons.items(), key=lambda one: -one[1])
    told = ", ".join(f"{count:,} {reason}" for reason, count in ranked)
    return f"{total:,} ({told})" if told else f"{total:,}"


def sections(result: Result) -> list[Section]:
    return [one for one in (_devices(result), _pushes(result), _server(result), _generator(result)) if one[1]]


def _devices(result: Result) -> Section:
    told = result.connects
    rows = [
        ("online at the end", f"{told.online:,} of {result.plan['devices']:,}"),
        ("connected", f"{told.connected:,}, {told.a_second:,.0f} a second"),
        ("from due to online", show_latency(told.latency)),
        ("connections lost", show_reasons(sum(told.dropped.values()), told.dropped)),
        ("tries that failed", show_reasons(sum(told.failed.values()), told.failed)),
        ("devices refused", show_reasons(sum(told.refused.values()), told.refused)),
    ]
    if told.breaks:
        rows.append(("went away on purpose", f"{told.breaks:,}"))
    if result.receipts.sent:
        rows.append(("receipts", f"{result.receipts.sent:,}, {result.receipts.answered:,} answered"))
    return "Devices", rows


def _pushes(result: Result) -> Section:
    pushes, deliveries = result.pushes, result.deliveries
    if not pushes.sent:
        return "Pushes", []
    rows = [
        ("sent", f"{pushes.sent:,}, {pushes.accepted:,} accepted"),
        ("refused", show_reasons(sum(pushes.refused.values()), pushes.refused)),
        ("without an answer", f"{pushes.unanswered:,}"),
        ("from due to accepted", show_latency(pushes.latency)),
        ("deliveries", f"{deliveries.arrived:,}, {deliveries.a_second:,.0f} a second"),
        ("from due to the device", show_latency(deliveries.latency)),
        ("LOST" if deliveries.lost else "lost", f"{deliveries.lost:,}"),
        ("repeated, strayed", f"{deliveries.repeated:,}, {deliveries.strayed:,}"),
    ]
    if deliveries.under_way:
        rows.append(("under way when it was stopped", f"{deliveries.under_way:,}"))
    return "Pushes", rows


def _server(result: Result) -> Section:
    server = result.server
    if server.memory_most is None:
        return "Server", [("memory", server.trouble)] if server.trouble else []
    rows = [
        (
            "memory",
            f"{show_memory(server.memory_first)} at first, {show_memory(server.memory_most)} at most, "
            f"{show_memory(server.memory_last)} at last",
        )
    ]
    if server.memory_a_device is not None:
        rows.append(("for each device", show_memory(server.memory_a_device)))
    if server.memory_growth is not None:
        rows.append(("growth in an hour", show_memory(server.memory_growth)))
    if server.cpu is not None:
        rows.append(("CPU", f"{server.cpu:.2f} cores"))
    if server.trouble:
        rows.append(("then", server.trouble))
    return "Server", rows


def _generator(result: Result) -> Section:
    rows = [
        (
            process.name,
            f"{process.cpu:.0%} of a core, {process.cpu_most:.0%} at most, waited {process.waited:.0%} of the time",
        )
        for process in result.generator.processes
    ]
    if result.generator.behind.count:
        rows.append(("pushes left after they were due", show_latency(result.generator.behind)))
    return "Generator", rows


def headline(result: Result) -> str:
    target = result.target
    return (
        f"{result.scenario}: {result.plan['devices']:,} devices against {target['mqtt']} ({target['kind']}), "
        f"{result.seconds:.1f} s, {result.ended}"
    )


def show_verdict(verdict: Verdict) -> str:
    measured = "not measured" if verdict.measured is None else f"{verdict.measured:.4g}"
    return (
        f"{'met' if verdict.met else 'MISSED'}: {verdict.threshold}: {measured}, wanted {verdict.wanted:.4g}"
    )


def summarize(result: Result) -> str:
    lines = [headline(result)]
    for title, rows in sections(result):
        width = max(len(name) for name, _ in rows)
        lines += ["", title, *(f"  {name:{width}}  {value}" for name, value in rows)]
    lines += _listed("Notes", result.notes)
    lines += _listed("THE GENERATOR MAY BE THE LIMIT", result.generator.bottleneck)
    lines += _listed("Thresholds", [show_verdict(one) for one in result.verdicts])
    return "\n".join(lines)


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    return ["", title, *(f"  {line}" for line in lines)] if lines else []
