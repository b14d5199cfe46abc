"""`holdfast push`, `status` and `withdraw`: a publisher on the command line."""

from __future__ import annotations

from typing import Any, Final
from uuid import uuid4

import click

from clients.command_shared import (
    Login,
    always_json,
    json_option,
    login_options,
    msg_id_argument,
    plain,
    print_json,
    run_call,
)
from clients.publisher import (
    RECEIPTS,
    STATES,
    Accepted,
    Delivery,
    Estimate,
    GroupPublisher,
    Publisher,
    PushError,
    Report,
    Single,
)
from clients.push_form import push_form

ALWAYS: Final = ("delivered", "pending", "expired", "evicted")  # shown also where nobody is in it


@click.command()
@login_options
@always_json
@push_form
@click.option("--cid", help="Key of your own: the same push is not sent twice. Default: a random one.")
@click.option("--at", metavar="TIME", help='Later: "2027-01-31 18:00:00", a schedule of one time.')
@click.option("--zone", help="Time zone of --at, such as Europe/Berlin. Default: the server's.")
@click.option("--group", is_flag=True, help="To all apps of a group: --app and --secret are the group's.")
@click.option("--dry-run", is_flag=True, help="All checks and an estimate, and nothing is sent.")
def push(
    login: Login,
    body: dict[str, Any],
    cid: str | None,
    at: str | None,
    zone: str | None,
    group: bool,
    dry_run: bool,
) -> None:
    """Send a push and print its msg_id as JSON.

    The options that choose devices narrow each other down; --all stands alone. What is given besides --body
    goes over what the file says. With --at, what is printed is the schedule_id; with --dry-run, how many devices the
    push would be for, and how many of them are connected.
    """
    if sum((at is not None, group, dry_run)) > 1:
        raise click.UsageError("--at, --group and --dry-run do not go together")
    if zone is not None and at is None:
        raise click.UsageError("--zone belongs to --at")
    if at is not None:
        _schedule(login, body, Single(at, zone), cid)
        return
    body = {"cid": str(uuid4())} | body | ({"cid": cid} if cid else {})
    if group:
        _push_to_group(login, body)
    elif dry_run:
        found = login.call(lambda publisher: _validate(publisher, body))
        print_json({"valid": True, "registered": found.registered, "online": found.online})
    else:
        accepted = login.call(lambda publisher: publisher.push(body))
        print_json({"msg_id": accepted.msg_id})


async def _validate(publisher: Publisher, body: dict[str, Any]) -> Estimate:
    await publisher.validate(body)
    return await publisher.estimate(body["audience"], body["platform"])


def _schedule(login: Login, body: dict[str, Any], when: Single, cid: str | None) -> None:
    body.pop("cid", None)  # every push of a schedule is one of its own
    name = f"holdfast push at {when.time}"
    key = cid or str(uuid4())
    print_json(
        {"schedule_id": login.call(lambda publisher: publisher.schedules.create(name, when, body, cid=key))}
    )


def _push_to_group(login: Login, body: dict[str, Any]) -> None:
    """Exit status 1 if an app refused it."""

    async def send() -> dict[str, Accepted | PushError]:
        async with GroupPublisher(login.app_key, login.secret, login.url) as publisher:
            return (await publisher.push(body)).results

    results = run_call(send, login.url)
    print_json({key: _row(result) for key, result in results.items()})
    if any(isinstance(result, PushError) for result in results.values()):
        raise SystemExit(1)


def _row(result: Accepted | PushError) -> dict[str, object]:
    if isinstance(result, Accepted):
        return {"msg_id": result.msg_id}
    return {"error": {"code": result.code, "message": result.message}}


@click.command()
@login_options
@msg_id_argument
def withdraw(login: Login, msg_id: int) -> None:
    """Take a push back: who does not have it never gets it, who has it is told to remove it."""
    login.call(lambda publisher: publisher.withdraw(msg_id))


@click.command()
@login_options
@json_option
@msg_id_argument
@click.argument("registration_ids", nargs=-1, metavar="[REGISTRATION_ID]...")
def status(login: Login, as_json: bool, msg_id: int, registration_ids: tuple[str, ...]) -> None:
    """Show what became of a push, altogether and for single devices."""

    async def ask(publisher: Publisher) -> tuple[Report, dict[str, Delivery]]:
        report = (await publisher.received_detail([msg_id]))[0]
        if not report.known:
            raise PushError(3004, 404, f"{msg_id} is not a message of this app, or its report is over")
        return report, await publisher.status(msg_id, registration_ids) if registration_ids else {}

    report, devices = login.call(ask)
    if as_json:
        print_json(plain(report) | ({"devices": plain(devices)} if devices else {}))
        return
    click.echo(describe(report))
    width = max(map(len, devices), default=0)
    for name, state in devices.items():
        click.echo(f"{name:{width}}  {state}")


def describe(report: Report) -> str:
    """On one line."""
    devices = "1 device" if report.target == 1 else f"{report.target} devices"
    states = [name for name in STATES if name in ALWAYS or getattr(report, name)]
    return f"message {report.msg_id}, for {devices}: {_say(report, states)}; {_say(report, RECEIPTS)}"


def _say(report: Report, names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"{getattr(report, name)} {name}" for name in names)
