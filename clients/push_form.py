"""A push as the options of a command say it, for `holdfast push` and `holdfast schedule create`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final

import click
import msgspec

from clients.command_shared import PLATFORMS, read_msg_id, read_object
from clients.publisher import Audience, FileAudience, Message, Notification, Options

_FORM: Final = (
    click.argument("alert", required=False),
    click.option(
        "--priority",
        type=click.Choice(["normal", "high"]),
        help="high: also in quiet hours; no cap counts it.",
    ),
    click.option(
        "--override", callback=read_msg_id, metavar="MSG_ID", help="Take the place of this push of mine."
    ),
    click.option(
        "--collapse-key", metavar="KEY", help="Of waiting pushes with this key, a device keeps the newest."
    ),
    click.option(
        "--slow", type=click.IntRange(1, 1400), metavar="MINUTES", help="Spread evenly over so many minutes."
    ),
    click.option("--ttl", type=click.IntRange(0), help="Seconds it waits for absent devices."),
    click.option(
        "--body", "content", type=click.File("rb"), help="File with the push as a JSON object; - is stdin."
    ),
    click.option("--message", help="Text for the app itself instead of, or besides, the notification ALERT."),
    click.option("--title", help="Title of the notification, or of the message if there is no ALERT."),
    click.option(
        "--platform", multiple=True, type=click.Choice(PLATFORMS), help="Only on these. Repeatable."
    ),
    click.option("--all", "everyone", is_flag=True, help="To every device of the app."),
    click.option("--file", metavar="FILE_ID", help="Only those of an uploaded list; see holdfast file."),
    click.option("--segment", metavar="ID", help="Only those of a saved segment; see holdfast segment."),
    click.option("--tag-not", multiple=True, help="Only with none of these tags. Repeatable."),
    click.option("--tag-and", multiple=True, help="Only with all of these tags. Repeatable."),
    click.option("--tag", multiple=True, help="To devices with any of these tags. Repeatable."),
    click.option("--alias", multiple=True, help="To devices with any of these aliases. Repeatable."),
    click.option("--registration-id", multiple=True, metavar="ID", help="To these devices. Repeatable."),
)


def push_form(command: Callable[..., None]) -> Callable[..., None]:
    """The command gets a `body`: a push as the API takes it, without a cid."""

    @functools.wraps(command)
    def run(
        registration_id: tuple[str, ...],
        alias: tuple[str, ...],
        tag: tuple[str, ...],
        tag_and: tuple[str, ...],
        tag_not: tuple[str, ...],
        segment: str | None,
        file: str | None,
        everyone: bool,
        platform: tuple[str, ...],
        title: str | None,
        message: str | None,
        content: BinaryIO | None,
        ttl: int | None,
        slow: int | None,
        collapse_key: str | None,
        override: int | None,
        priority: Any,
        alert: str | None,
        **rest: Any,
    ) -> None:
        audience = Audience(
            registration_id,
            alias,
            tag,
            tag_and,
            tag_not,
            (segment,) if segment else (),
            FileAudience(file) if file else None,
        )
        options = Options(
            time_to_live=ttl,
            big_push_duration=slow,
            collapse_key=collapse_key,
            override_msg_id=override,
            priority=priority,
        )
        body = read_object(content, "--body") if content else {}
        body |= _content(alert, title, message)
        body |= _audience(audience, everyone)
        body |= {"platform": list(platform)} if platform else {}
        body |= _options(options, body)
        command(body=_checked(body), **rest)

    for option in _FORM:
        run = option(run)
    return run


def _audience(audience: Audience, everyone: bool) -> dict[str, Any]:
    if everyone and audience != Audience():
        raise click.UsageError("--all stands alone: it means every device")
    if everyone:
        return {"audience": "all"}
    return {"audience": msgspec.to_builtins(audience)} if audience != Audience() else {}


def _options(options: Options, body: Mapping[str, Any]) -> dict[str, Any]:
    """Over those of the file."""
    own = msgspec.to_builtins(options)
    return {"options": (body.get("options") or {}) | own} if own else {}


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


def _checked(body: dict[str, Any]) -> dict[str, Any]:
    if "audience" not in body:
        raise click.UsageError(
            "say whom it is for: --registration-id, --alias, --tag, --tag-and, --segment, --file, --all"
        )
    if not (body.get("notification") or body.get("message")):
        raise click.UsageError("say what to push: ALERT, --message or --body")
    return {"platform": "all"} | body
