"""`holdfast pushes`: what became of one push, and the control of a slow one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

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
    rows = [(moment(step.at), _exact(step), step.step, step.node) for step in found.steps]
    print_table(("time", "within", "step", "node"), rows)


def _exact(step: TraceStep) -> str:
    """How exact the time is."""
    return f"{step.resolution:g} s" if step.resolution else ""


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
@msg_id_argument
def watch(login: Login, as_json: bool, every: float, msg_id: int) -> None:
    """Wait until nobody is to get a push any more, with a progress bar on a terminal; then show its account.

    A paused push is waited for.
    """
    with progress_bar() as bar:
        task = bar.add_task(f"push {msg_id}", total=None)

        def shown(report: PushReport) -> None:
            bar.update(task, total=report.target, completed=settled(report), description=_title(report))

        report = login.call(lambda publisher: until_done(publisher, msg_id, every, shown))
    if as_json:
        print_json(report)
        return
    print_fields({"state": report.state} | {name: getattr(report, name) for name in COUNTS})


def _title(report: PushReport) -> str:
    released = f", let go {report.progress.released}" if report.progress else ""
    return f"{report.state}: {report.delivered} delivered{released}"


def settled(report: PushReport) -> int:
    return (report.target or 0) - (report.pending or 0)


async def until_done(
    publisher: Publisher, msg_id: int, every: float, shown: Callable[[PushReport], None]
) -> PushReport:
    """The report, asked for every so many seconds, when the push is over. Raises PushError."""
    while True:
        report = await publisher.reports.push(msg_id)
        shown(report)
        if not report.pending:
            return report
        await asyncio.sleep(every)
