"""`holdfast push` and `holdfast status`: a publisher on the command line."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, BinaryIO, Final, TypeVar
from uuid import uuid4

import click
import msgspec
import orjson

from clients.publisher import (
    Audience,
    Delivery,
    Message,
    Notification,
    Options,
    Publisher,
    PushError,
    Report,
)

PLATFORMS: Final = ("android", "ios", "quickapp", "hmos", "winphone")
STATES: Final = ("delivered", "pending", "expired", "evicted")
RECEIPTS: Final = ("shown", "clicked", "dismissed")
_T = TypeVar("_T")


def publisher_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--url",
            envvar="HOLDFAST_URL",
            show_envvar=True,
            default="http://127.0.0.1:8080",
            show_default=True,
        ),
        click.option(
            "--secret",
            envvar="HOLDFAST_MASTER_SECRET",
            show_envvar=True,
            required=True,
            help="Master secret.",
        ),
        click.option(
            "--app", "app_key", envvar="HOLDFAST_APP_KEY", show_envvar=True, required=True, help="App key."
        ),
    ):
        command = option(command)
    return command


@click.command()
@publisher_options
@click.option("--registration-id", multiple=True, metavar="ID", help="To these devices. Repeatable.")
@click.option("--alias", multiple=True, help="To devices with any of these aliases. Repeatable.")
@click.option("--tag", multiple=True, help="To devices with any of these tags. Repeatable.")
@click.option("--tag-and", multiple=True, help="Only with all of these tags. Repeatable.")
@click.option("--tag-not", multiple=True, help="Only with none of these tags. Repeatable.")
@click.option("--all", "everyone", is_flag=True, help="To every device of the app.")
@click.option("--platform", multiple=True, type=click.Choice(PLATFORMS), help="Only on these. Repeatable.")
@click.option("--title", help="Title of the notification, or of the message if there is no ALERT.")
@click.option("--message", help="Text for the app itself instead of, or besides, the notification ALERT.")
@click.option("--json", "file", type=click.File("rb"), help="The push as a JSON object; - is stdin.")
@click.option("--ttl", type=click.IntRange(0), help="Seconds it waits for absent devices.")
@click.option("--cid", help="Key of your own: the same push is not sent twice. Default: a random one.")
@click.argument("alert", required=False)
def push(
    app_key: str,
    secret: str,
    url: str,
    registration_id: tuple[str, ...],
    alias: tuple[str, ...],
    tag: tuple[str, ...],
    tag_and: tuple[str, ...],
    tag_not: tuple[str, ...],
    everyone: bool,
    platform: tuple[str, ...],
    title: str | None,
    message: str | None,
    file: BinaryIO | None,
    ttl: int | None,
    cid: str | None,
    alert: str | None,
) -> None:
    """Send a push and print its msg_id as JSON.

    The options that choose devices narrow each other down; --all stands alone. What is given besides --json
    goes over what the file says.
    """
    audience = Audience(registration_id, alias, tag, tag_and, tag_not)
    body = _read_object(file) if file else {}
    body |= _content(alert, title, message)
    if everyone and audience != Audience():
        raise click.UsageError("--all stands alone: it means every device")
    if everyone or audience != Audience():
        body["audience"] = "all" if everyone else msgspec.to_builtins(audience)
    if platform:
        body["platform"] = list(platform)
    if ttl is not None:
        body["options"] = (body.get("options") or {}) | msgspec.to_builtins(Options(time_to_live=ttl))
    if "audience" not in body:
        raise click.UsageError("say whom it is for: --registration-id, --alias, --tag, --tag-and, --all")
    if not (body.get("notification") or body.get("message")):
        raise click.UsageError("say what to push: ALERT, --message or --json")
    body = {"platform": "all", "cid": str(uuid4())} | body | ({"cid": cid} if cid else {})
    accepted = call(app_key, secret, url, lambda publisher: publisher.push(body))
    click.echo(orjson.dumps({"msg_id": str(accepted.msg_id)}))


def _content(alert: str | None, title: str | None, message: str | None) -> dict[str, Any]:
    if title is not None and alert is None and message is None:
        raise click.UsageError("--title needs an ALERT or a --message")
    content: dict[str, Any] = {}
    if alert is not None:
        notification = Notification(alert) if title is None else Notification.titled(title, alert)
        content["notification"] = msgspec.to_builtins(notification)
    if message is not None:
        content["message"] = msgspec.to_builtins(Message(message, title if alert is None else None))
    return content


def _read_object(file: BinaryIO) -> dict[str, Any]:
    try:
        body = orjson.loads(file.read())
    except orjson.JSONDecodeError as error:
        raise click.UsageError(f"--json: not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise click.UsageError("--json: must be a JSON object, as in POST /v3/push")
    return body


@click.command()
@publisher_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("msg_id", type=click.IntRange(1))
@click.argument("registration_ids", nargs=-1, metavar="[REGISTRATION_ID]...")
def status(
    app_key: str, secret: str, url: str, as_json: bool, msg_id: int, registration_ids: tuple[str, ...]
) -> None:
    """Show what became of a push, altogether and for single devices."""

    async def ask(publisher: Publisher) -> tuple[Report, dict[str, Delivery]]:
        report = (await publisher.received_detail([msg_id]))[0]
        if not report.known:
            raise PushError(3004, 400, f"{msg_id} is not a message of this app, or its report is over")
        return report, await publisher.status(msg_id, registration_ids) if registration_ids else {}

    report, devices = call(app_key, secret, url, ask)
    names = {name: state.name.lower().replace("_", " ") for name, state in devices.items()}
    if as_json:
        found = msgspec.to_builtins(report) | {"msg_id": str(msg_id)} | ({"devices": names} if names else {})
        click.echo(orjson.dumps(found))
        return
    click.echo(_describe(report))
    width = max(map(len, names), default=0)
    for name, state in names.items():
        click.echo(f"{name:{width}}  {state}")


def _describe(report: Report) -> str:
    def say(names: tuple[str, ...]) -> str:
        return ", ".join(f"{getattr(report, name)} {name}" for name in names)

    devices = "1 device" if report.target == 1 else f"{report.target} devices"
    return f"message {report.msg_id}, for {devices}: {say(STATES)}; {say(RECEIPTS)}"


def call(app_key: str, secret: str, url: str, act: Callable[[Publisher], Awaitable[_T]]) -> _T:
    """Run one call; a failure ends the command with exit status 1."""

    async def run() -> _T:
        async with Publisher(app_key, secret, url) as publisher:
            return await act(publisher)

    try:
        return asyncio.run(run())
    except PushError as error:
        raise click.ClickException(str(error)) from error
    except ValueError as error:  # of aiohttp, for an address that is none
        raise click.ClickException(f"{url}: {error}") from error
