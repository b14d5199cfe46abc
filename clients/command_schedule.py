"""`holdfast schedule`: pushes at a time."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import click
import msgspec

from clients.command_shared import (
    Login,
    always_json,
    json_option,
    login_options,
    moment,
    print_fields,
    print_json,
    print_table,
)
from clients.publisher import Firing, Periodical, Publisher, Schedule, Single
from clients.push_form import push_form

_id = click.argument("schedule_id")


@click.group()
def schedule() -> None:
    """Make pushes at a time, once or again and again."""


@schedule.command("list")
@login_options
@json_option
def list_schedules(login: Login, as_json: bool) -> None:
    """Show the schedules that are not over."""

    async def ask(publisher: Publisher) -> list[Schedule]:
        return [found async for found in publisher.schedules.all()]

    found = login.call(ask)
    if as_json:
        print_json(found)
        return
    rows = [
        (one.schedule_id, one.name, _when(one), "yes" if one.enabled else "no", one.next, one.fired)
        for one in found
    ]
    print_table(("id", "name", "when", "enabled", "next", "fired"), rows, "no schedules")


def _when(schedule: Schedule) -> str:
    single, periodical = schedule.trigger.single, schedule.trigger.periodical
    if single is not None:
        return f"once, {single.zone}"
    if periodical is None:
        return ""
    often = f"every {periodical.frequency} {periodical.time_unit}s"
    points = " on " + ",".join(map(str, periodical.point)) if periodical.point else ""
    return f"{often}{points} at {periodical.time}, {periodical.zone}"


@schedule.command()
@login_options
@json_option
@_id
def show(login: Login, as_json: bool, schedule_id: str) -> None:
    """Show a schedule and what it did."""

    async def ask(publisher: Publisher) -> tuple[Schedule, list[Firing]]:
        return await publisher.schedules.get(schedule_id), await publisher.schedules.log(schedule_id)

    found, log = login.call(ask)
    if as_json:
        print_json(msgspec.to_builtins(found) | {"log": msgspec.to_builtins(log)})
        return
    names = ("name", "enabled", "next", "fired", "missed", "failed")
    print_fields({"when": _when(found)} | {name: getattr(found, name) for name in names})
    rows = [(moment(one.at), one.msg_id, one.error.message if one.error else "") for one in log]
    print_table(("time", "msg_id", "error"), rows, "no pushes yet")


@schedule.command()
@login_options
@always_json
@push_form
@click.option("--name", default="holdfast schedule", show_default=True, help="1 to 255 bytes.")
@click.option("--at", metavar="TIME", help='Once: "2027-01-31 18:00:00".')
@click.option("--daily", is_flag=True, help="On every day from --from to --until, at --time.")
@click.option("--weekly", metavar="DAYS", help="On MON,TUE,… of every week.")
@click.option("--monthly", metavar="DAYS", help="On days such as 1,15 of every month.")
@click.option("--every", type=click.IntRange(1, 100), default=1, show_default=True, help="Every so many.")
@click.option("--from", "start", metavar="TIME", help='"2027-01-01 00:00:00"')
@click.option("--until", "end", metavar="TIME", help="At most a year after --from.")
@click.option("--time", metavar="HH:MM:SS")
@click.option("--zone", help="Time zone, such as Europe/Berlin. Default: the server's.")
@click.option("--cid", help="Key of your own: the same schedule is not made twice. Default: a random one.")
def create(login: Login, body: dict[str, Any], name: str, cid: str | None, **when: Any) -> None:
    """Make a schedule and print its schedule_id as JSON.

    The push is said as to `holdfast push`; when, by --at, or by --daily, --weekly or --monthly.
    """
    trigger = _read_trigger(**when)
    body.pop("cid", None)  # every push of a schedule is one of its own
    key = cid or str(uuid4())
    schedule_id = login.call(lambda publisher: publisher.schedules.create(name, trigger, body, cid=key))
    print_json({"schedule_id": schedule_id})


def _read_trigger(
    at: str | None,
    daily: bool,
    weekly: str | None,
    monthly: str | None,
    every: int,
    start: str | None,
    end: str | None,
    time: str | None,
    zone: str | None,
) -> Single | Periodical:
    if sum((at is not None, daily, weekly is not None, monthly is not None)) != 1:
        raise click.UsageError("say when: --at, --daily, --weekly or --monthly, one of them")
    if at is not None:
        return Single(at, zone)
    if start is None or end is None or time is None:
        raise click.UsageError("--daily, --weekly and --monthly need --from, --until and --time")
    if weekly is not None:
        return Periodical(start, end, time, "week", every, weekly.upper().split(","), zone)
    if monthly is not None:
        return Periodical(
            start, end, time, "month", every, [day.zfill(2) for day in monthly.split(",")], zone
        )
    return Periodical(start, end, time, "day", every, None, zone)


@schedule.command()
@login_options
@_id
def delete(login: Login, schedule_id: str) -> None:
    """Delete a schedule; pushes that it made stay."""
    login.call(lambda publisher: publisher.schedules.delete(schedule_id))


@schedule.command()
@login_options
@_id
def enable(login: Login, schedule_id: str) -> None:
    """Let a schedule make pushes again."""
    login.call(lambda publisher: publisher.schedules.change(schedule_id, enabled=True))


@schedule.command()
@login_options
@_id
def disable(login: Login, schedule_id: str) -> None:
    """Let a schedule make no pushes until it is enabled."""
    login.call(lambda publisher: publisher.schedules.change(schedule_id, enabled=False))
