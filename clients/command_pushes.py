"""`holdfast pushes`: what became of one push, and the control of a slow one."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal

import click

from clients.command_shared import (
    Login,
    json_option,
    login_options,
    moment,
    msg_id_argument,
    print_fields,
    print_json,
    print_table,
    progress_bar,
)
from clients.publisher import CURVES, RECEIPTS, STATES, Progress, Publisher, PushReport, TraceStep

Until = Literal["released", "settled"]
Show = Callable[[PushReport], None]
COUNTS: Final = ("target", "online", "sent", *STATES, *RECEIPTS)


@click.group()
def pushes() -> None:
    """Show what became of a push, and control a slow one."""


@pushes.command()
@login_options
@json_option
@msg_id_argument
def show(login: Login, as_json: bool, msg_id: int) -> None:
    """Show the whole account of a push."""
    report = login.call(lambda publisher: publisher.reports.push(msg_id))
    if as_json:
        print_json(report)
        return
    fields: dict[str, object] = {
        "state": report.state,
        "accepted": moment(report.accepted_at),
        "expires": moment(report.expires_at),
    }
    fields |= {name: getattr(report, name) for name in COUNTS}
    if report.progress is not None:
        fields |= _describe(report.progress)
    print_fields(fields)


def _describe(progress: Progress) -> dict[str, object]:
    return {
        "let go": f"{progress.released} of {progress.total}, {progress.state}",
        "planned end": moment(progress.planned_end),
    }


@pushes.command()
@login_options
@json_option
@msg_id_argument
def curve(login: Login, as_json: bool, msg_id: int) -> None:
    """Show what happened in each hour since the push was accepted."""
    found = login.call(lambda publisher: publisher.reports.curve(msg_id))
    if as_json:
        print_json(found)
        return
    rows = [(hour.hour, moment(hour.at), *(getattr(hour, name) for name in CURVES)) for hour in found.hours]
    print_table(("hour", "from", *CURVES), rows)


@pushes.command()
@login_options
@json_option
@msg_id_argument
@click.argument("registration_id")
def trace(login: Login, as_json: bool, msg_id: int, registration_id: str) -> None:
    """Show what happened between a push and one device, step by step."""
    found = login.call(lambda publisher: publisher.reports.trace(msg_id, registration_id))
    if as_json:
        print_json(found)
        return
    click.echo(found.status)
    rows = [(moment(step.at), _within(step), step.step, step.node) for step in found.steps]
    print_table(("time", "within", "step", "node"), rows)


def _within(step: TraceStep) -> str:
    """How exact the time is."""
    if not step.resolution:
        return ""
    return next((text for most, text in STRETCHES if step.resolution <= most), f"{step.resolution:g} s")


STRETCHES: Final = ((1, "1 s"), (60, "1 min"), (3600, "1 h"))


def _control(verb: str, text: str) -> click.Command:
    """A command that does one thing to a slow push and prints how far it is."""

    @pushes.command(verb, help=text)
    @login_options
    @json_option
    @msg_id_argument
    def act(login: Login, as_json: bool, msg_id: int) -> None:
        progress: Progress = login.call(lambda publisher: getattr(publisher, verb)(msg_id))
        if as_json:
            print_json(progress)
        else:
            print_fields(_describe(progress))

    return act


_control("pause", "Let nothing more of a slow push go until it is resumed.")
_control("resume", "Let a paused push go on.")
_control("stop", "End a slow push: the rest never goes, and what waits is withdrawn.")


@pushes.command()
@login_options
@json_option
@click.option("--every", type=click.FloatRange(0.05), default=1.0, show_default=True, help="Seconds.")
@click.option(
    "--until",
    type=click.Choice(["released", "settled"]),
    help="released: all of it was let go; settled: nobody is to get it any more. Default: released for a push that"
    " goes in parts (slow, or held back by quiet hours), settled for any other.",
)
@msg_id_argument
def watch(login: Login, as_json: bool, every: float, until: Any, msg_id: int) -> None:
    """Follow a push to its end, then show its account.

    On a terminal there is a progress bar; elsewhere, without --json, a line at each change. A paused push is waited
    for.
    """
    with _follower(msg_id, as_json) as show:
        report = login.call(lambda publisher: until_over(publisher, msg_id, every, show, until))
    if as_json:
        print_json(report)
        return
    print_fields({"state": report.state} | {name: getattr(report, name) for name in COUNTS})


@contextmanager
def _follower(msg_id: int, as_json: bool) -> Iterator[Show]:
    """Shows each report: as a bar where a person looks at it, as lines where it is read later."""
    if not (as_json or (sys.stdout.isatty() and sys.stderr.isatty())):
        yield Lines(lambda: moment(time.time()))
        return
    with progress_bar() as bar:
        task = bar.add_task(f"push {msg_id}", total=None)

        def show(report: PushReport) -> None:
            bar.update(task, total=report.target, completed=settled(report), description=_title(report))

        yield show


def _title(report: PushReport) -> str:
    released = f", let go {report.progress.released}" if report.progress else ""
    return f"{report.state}: {report.delivered} delivered{released}"


class Lines:
    """Prints a line for each report that says something else than the one before it."""

    def __init__(self, now: Callable[[], str]) -> None:
        self._now = now
        self._last = ""

    def __call__(self, report: PushReport) -> None:
        line = f"{_title(report)}, {report.pending} pending, of {report.target}"
        if line != self._last:
            click.echo(f"{self._now()}  {line}")  # and flushes
            self._last = line


def settled(report: PushReport) -> int:
    return (report.target or 0) - (report.pending or 0)


def is_over(report: PushReport, until: Until | None) -> bool:
    """Whether there is nothing more to wait for. None: for all parts of a push that goes in parts, for all devices of
    any other."""
    if not report.pending:
        return True
    released = report.progress is None or report.progress.over
    return released and (until == "released" or (until is None and report.progress is not None))


async def until_over(
    publisher: Publisher, msg_id: int, every: float, show: Show, until: Until | None = None
) -> PushReport:
    """The report, asked for every so many seconds, when the push is over. Raises PushError."""
    while True:
        report = await publisher.reports.push(msg_id)
        show(report)
        if is_over(report, until):
            return report
        await asyncio.sleep(every)
