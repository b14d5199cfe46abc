"""`holdfast report`, `callbacks`, `key` and `settings`: what the owner of an app sees and sets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO, Final

import click

from clients.command_shared import (
    Login,
    always_json,
    json_option,
    login_options,
    moment,
    print_fields,
    print_json,
    print_table,
    read_object,
)
from clients.publisher import AuditEntry, ParkedEvent, Publisher, Settings

SCOPES: Final = ("push", "report", "device", "schedule", "file", "segment", "callback", "admin")


# report


@click.group()
def report() -> None:
    """Show how many devices there were."""


@report.command()
@login_options
@json_option
@click.option("--unit", type=click.Choice(["hour", "day", "month"]), default="day", show_default=True)
@click.option(
    "--from",
    "start",
    metavar="TIME",
    help='"2027-01-31 18", "2027-01-31" or "2027-01". Default: so that the last one is now.',
)
@click.option(
    "--count", type=click.IntRange(1, 1000), default=1, show_default=True, help="So many of the unit."
)
def users(login: Login, as_json: bool, unit: Any, start: str | None, count: int) -> None:
    """Show the devices that were new, online and active, in each hour, day or month."""
    begin = start or start_of_last(count, unit, datetime.now(UTC))
    found = login.call(lambda publisher: publisher.reports.users(unit.upper(), begin, count))
    if as_json:
        print_json(found)
        return
    totals = [(item.time, item.total()) for item in found.items]
    rows = [(time, total.new, total.online, total.active) for time, total in totals]
    print_table((unit, "new", "online", "active"), rows)


def start_of_last(count: int, unit: str, now: datetime) -> str:
    """Of so many hours, days or months, the last of which is now."""
    if unit == "month":
        months = now.year * 12 + now.month - count  # since year 0; January is 0
        return f"{months // 12:04}-{months % 12 + 1:02}"
    first = now - timedelta(**{f"{unit}s": count - 1})
    return first.strftime("%Y-%m-%d %H" if unit == "hour" else "%Y-%m-%d")


# callbacks


@click.group()
def callbacks() -> None:
    """Show what waits to be told to your receivers, and what was given up."""


@callbacks.command("show")
@login_options
@json_option
def show_callbacks(login: Login, as_json: bool) -> None:
    """Show how many events wait to be told, and how many were given up."""
    found = login.call(lambda publisher: publisher.callbacks.counts())
    counts = {"waiting": found.waiting, "parked": found.parked}
    if as_json:
        print_json(counts)
    else:
        print_fields(counts)


@callbacks.command("secret")
@login_options
@always_json
def show_signing_secret(login: Login) -> None:
    """Print as JSON the secret that signs what your receivers are told."""
    found = login.call(lambda publisher: publisher.callbacks.counts())
    print_json({"signing_secret": found.signing_secret})


@callbacks.command()
@login_options
@json_option
def parked(login: Login, as_json: bool) -> None:
    """Show the events that were given up, oldest first."""

    async def ask(publisher: Publisher) -> list[ParkedEvent]:
        return [event async for event in publisher.callbacks.parked()]

    found = login.call(ask)
    if as_json:
        print_json(found)
        return
    rows = [
        (moment(one.at), one.msg_id, one.event, one.devices, one.url, one.attempts, one.error)
        for one in found
    ]
    print_table(
        ("time", "msg_id", "event", "devices", "url", "attempts", "error"), rows, "nothing was given up"
    )


@callbacks.command()
@login_options
@always_json
def retry(login: Login) -> None:
    """Try what was given up again, and print as JSON how many events that are."""
    print_json({"retried": login.call(lambda publisher: publisher.callbacks.retry())})


@callbacks.command()
@login_options
@always_json
def drop(login: Login) -> None:
    """Forget what was given up, and print as JSON how many events that were."""
    print_json({"dropped": login.call(lambda publisher: publisher.callbacks.drop())})


# key


@click.group()
def key() -> None:
    """Manage API keys: secrets for a part of the API."""


@key.command()
@login_options
@always_json
@click.argument("name")
@click.option(
    "--scope", "scopes", multiple=True, required=True, type=click.Choice(SCOPES), help="Repeatable."
)
@click.option("--days", type=click.IntRange(1), help="It ends after so many. Default: never.")
@click.option("--allow-from", multiple=True, metavar="NETWORK", help="Only from there. Repeatable.")
def create(
    login: Login, name: str, scopes: tuple[Any, ...], days: int | None, allow_from: tuple[str, ...]
) -> None:
    """Make a key and print it as JSON, with its secret, which is shown this once."""
    end = None if days is None else int((datetime.now(UTC) + timedelta(days=days)).timestamp())
    print_json(
        login.call(
            lambda publisher: publisher.keys.create(
                name, scopes, expires_at=end, allow_from=allow_from or None
            )
        )
    )


@key.command("list")
@login_options
@json_option
def list_keys(login: Login, as_json: bool) -> None:
    """Show all keys, without secrets."""
    found = login.call(lambda publisher: publisher.keys.list())
    if as_json:
        print_json(found)
        return
    rows = [
        (
            one.id,
            one.name,
            ",".join(one.scopes),
            ",".join(one.allow_from),
            moment(one.created_at),
            moment(one.expires_at),
        )
        for one in found
    ]
    print_table(("id", "name", "scopes", "from", "made", "ends"), rows, "no keys")


@key.command()
@login_options
@click.argument("key_id")
def delete(login: Login, key_id: str) -> None:
    """Delete a key: it stops at once."""
    login.call(lambda publisher: publisher.keys.delete(key_id))


# settings


@click.group()
def settings() -> None:
    """Show and change what you set for your app."""


@settings.command("show")
@login_options
@always_json
def show_settings(login: Login) -> None:
    """Print the app's settings as JSON: allow_from, quiet_hours, frequency_caps, callback."""
    print_json(_every_key(login.call(lambda publisher: publisher.settings())))


@settings.command("set")
@login_options
@always_json
@click.argument("file", type=click.File("rb"))
def set_settings(login: Login, file: BinaryIO) -> None:
    """Replace the settings by those of a JSON file (- is stdin), and print them as they are now.

    What the file leaves out gets its default.
    """
    wanted = read_object(file, "FILE")  # as it is: a key that we do not know is the server's to refuse
    print_json(_every_key(login.call(lambda publisher: publisher.change_settings(wanted))))


def _every_key(found: Settings) -> dict[str, object]:
    return {name: getattr(found, name) for name in found.__struct_fields__}


@settings.command()
@login_options
@json_option
@click.option("--count", type=click.IntRange(1), default=50, show_default=True, help="At most so many.")
def audit(login: Login, as_json: bool, count: int) -> None:
    """Show administrative calls on your app, newest first."""

    async def ask(publisher: Publisher) -> list[AuditEntry]:
        found: list[AuditEntry] = []
        async for entry in publisher.audit():
            found.append(entry)
            if len(found) == count:
                break
        return found

    found = login.call(ask)
    if as_json:
        print_json(found)
        return
    rows = [(moment(one.at), one.actor, one.address, one.action, one.subject, one.outcome) for one in found]
    print_table(("time", "who", "from", "did", "to", "outcome"), rows, "nothing yet")
