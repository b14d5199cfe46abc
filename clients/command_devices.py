"""`holdfast devices`: a publisher's devices, their tags, aliases and attributes; and many of them from a file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import click
import msgspec

from clients.command_shared import (
    PLATFORMS,
    Login,
    json_option,
    login_options,
    print_fields,
    print_json,
    print_table,
    progress_bar,
)
from clients.device_file import ATTRIBUTE, BadLine, Batch, read_batches, read_value
from clients.publisher import (
    BATCH,
    Audience,
    DeviceStatus,
    Estimate,
    Publisher,
    PushError,
    Registered,
)

EVERY_PLATFORM: Final = (*PLATFORMS, "other")
NO_DEVICE: Final = 7002
_WHICH: Final = re.compile(r"devices\[(\d+)\]\.(.*)", re.DOTALL)
_encode_lines: Final = msgspec.json.Encoder().encode_lines

_device = click.argument("registration_id")
_only = click.option(
    "--platform",
    "platforms",
    multiple=True,
    type=click.Choice(EVERY_PLATFORM),
    help="Only of this. Repeatable.",
)


@click.group()
def devices() -> None:
    """Show and change your devices; import many."""


@devices.command()
@login_options
@json_option
@_device
def show(login: Login, as_json: bool, registration_id: str) -> None:
    """Show what is known of a device."""

    async def ask(publisher: Publisher) -> dict[str, Any]:
        found = await publisher.device(registration_id)
        status = (await publisher.devices_status([registration_id])).get(registration_id, DeviceStatus(False))
        properties = {"alias": found.alias, "mobile": found.mobile, "tags": sorted(found.tags)}
        return {
            "registration_id": registration_id,
            **properties,
            "attributes": found.attributes,
            "online": status.online,
            "last_online_time": status.last_online_time,
        }

    found = login.call(ask)
    if as_json:
        print_json(found)
        return
    attributes = {
        f"{ATTRIBUTE}{name}": _text(name, value) for name, value in sorted(found["attributes"].items())
    }
    known = {name: found[name] for name in ("registration_id", "alias", "mobile")}
    online = "yes" if found["online"] else "no"
    rows = {
        **known,
        "tags": " ".join(found["tags"]),
        "online": online,
        "last online": found["last_online_time"],
    }
    print_fields(rows | attributes)


def _text(name: str, value: str | float | bool) -> str:
    """As `--attribute` takes it."""
    if isinstance(value, str):
        return value if read_value(name, value) == value else f'"{value}"'
    return str(value).lower().removesuffix(".0")


def _read_attributes(
    _ctx: click.Context, _param: click.Parameter, values: Sequence[str]
) -> dict[str, str | float | bool | None]:
    found: dict[str, str | float | bool | None] = {}
    for given in values:
        name, separator, text = given.partition("=")
        if not (name and separator and text):
            raise click.BadParameter(f"must be NAME=VALUE, got {given[:40]}")
        found[name] = read_value(name, text)
    return found


@devices.command("set")
@login_options
@_device
@click.option("--alias", help='"" clears it.')
@click.option("--mobile", help='Telephone number; "" clears it.')
@click.option("--platform", type=click.Choice(EVERY_PLATFORM))
@click.option("--add-tag", "add_tags", multiple=True, help="Repeatable.")
@click.option("--remove-tag", "remove_tags", multiple=True, help="Repeatable.")
@click.option(
    "--attribute",
    "attributes",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_read_attributes,
    help='A number, true, false, or text; NAME="41" in double quotes is text. Repeatable.',
)
@click.option("--remove-attribute", "removed", multiple=True, metavar="NAME", help="Repeatable.")
def set_device(
    login: Login, registration_id: str, attributes: dict[str, Any], removed: Sequence[str], **rest: Any
) -> None:
    """Change a device; what is not named stays."""
    if both := attributes.keys() & set(removed):
        raise click.UsageError(f"--attribute and --remove-attribute both name {', '.join(sorted(both))}")
    changed = attributes | dict.fromkeys(removed)
    if not changed and all(value in (None, ()) for value in rest.values()):
        raise click.UsageError("say what to change")
    login.call(lambda publisher: publisher.update_device(registration_id, attributes=changed or None, **rest))


@devices.command()
@login_options
@_device
def revoke(login: Login, registration_id: str) -> None:
    """End all tokens of a device, and its connection; an import or a registration gives it a new one."""
    login.call(lambda publisher: publisher.revoke_tokens(registration_id))


@devices.command()
@login_options
@json_option
@click.argument("registration_ids", nargs=-1, required=True, metavar="REGISTRATION_ID...")
def status(login: Login, as_json: bool, registration_ids: Sequence[str]) -> None:
    """Show who is connected, and who was when. With --json, those that are no device are left out."""

    async def ask(publisher: Publisher) -> dict[str, DeviceStatus]:
        found: dict[str, DeviceStatus] = {}
        for start in range(0, len(registration_ids), BATCH):
            found |= await publisher.devices_status(registration_ids[start : start + BATCH])
        return found

    found = login.call(ask)
    if as_json:
        print_json(found)
        return
    print_table(
        ("device", "online", "last online"), [(one, *_presence(found.get(one))) for one in registration_ids]
    )


def _presence(status: DeviceStatus | None) -> tuple[str, str | None]:
    if status is None:
        return "not a device", None
    return "yes" if status.online else "no", status.last_online_time


# import


@devices.command("import")
@login_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="A new file for the tokens, for its owner's eyes only. Default: standard output.",
)
@click.argument("file", type=click.File("rb"))
def import_devices(login: Login, out: Path | None, file: BinaryIO) -> None:
    """Register the devices of a file (- is stdin), or change those that are registered; print the token of each as a
    line of JSON.

    The file is CSV with a header, or a JSON object on each line. A thousand go in one call, and all of them or none.
    """
    with _open_tokens(out) as tokens, progress_bar(in_bytes=True) as bar:
        task = bar.add_task("import", total=_size(file))
        done = 0

        async def send(publisher: Publisher) -> None:
            nonlocal done
            for batch in read_batches(file):
                registered = await _import(publisher, batch)
                tokens.write(_encode_lines(registered))
                tokens.flush()
                done += len(registered)
                bar.update(task, completed=batch.read)

        try:
            login.call(send)
        except BadLine as bad:
            raise click.UsageError(f"FILE: {bad}{_so_far(done)}") from bad
        except click.ClickException as error:
            raise click.ClickException(f"{error.message}{_so_far(done)}") from error
    if not done:
        raise click.UsageError("FILE: there is no device in it")
    if out is not None:
        print_json({"imported": done})


@contextlib.contextmanager
def _open_tokens(out: Path | None) -> Iterator[BinaryIO]:
    """A file that is there already may hold the only copy of other tokens."""
    if out is None:
        yield sys.stdout.buffer
        return
    try:
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise click.UsageError(f"--out: {out}: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as tokens:
        try:
            yield tokens
        finally:
            if not tokens.tell():  # or the next attempt would be refused
                out.unlink()


def _size(file: BinaryIO) -> int | None:
    """None: it is no file on a disk."""
    try:
        return os.fstat(file.fileno()).st_size or None
    except OSError:
        return None


async def _import(publisher: Publisher, batch: Batch) -> list[Registered]:
    """A refusal names the line."""
    try:
        return await publisher.import_devices(batch.devices)
    except PushError as error:
        where, why = f"lines {batch.lines[0]} to {batch.lines[-1]}", error.message
        if match := _WHICH.match(error.message):
            where, why = f"line {batch.lines[int(match[1])]}", match[2]
        raise PushError(error.code, error.http_status, f"{where}: {why}") from error


def _so_far(done: int) -> str:
    return f"; the {done} devices before this batch are imported" if done else "; no device is imported"


# tags


@devices.group()
def tags() -> None:
    """Show and change tags of many devices."""


@tags.command("list")
@login_options
@json_option
def list_tags(login: Login, as_json: bool) -> None:
    """Show the tags that some device has."""
    found = login.call(lambda publisher: publisher.tags.all())
    if as_json:
        print_json(found)
    else:
        print_table(("tag",), [(tag,) for tag in found], "no tags")


@tags.command("delete")
@login_options
@_only
@click.argument("tag")
def delete_tag(login: Login, tag: str, platforms: Sequence[str]) -> None:
    """Take a tag from all devices."""
    login.call(lambda publisher: publisher.tags.delete(tag, platforms))


@tags.command()
@login_options
@json_option
@click.option("--add", multiple=True, metavar="REGISTRATION_ID", help="Give it the tag. Repeatable.")
@click.option("--remove", multiple=True, metavar="REGISTRATION_ID", help="Take the tag from it. Repeatable.")
@click.argument("tag")
@click.argument("registration_ids", nargs=-1, metavar="[REGISTRATION_ID]...")
def members(
    login: Login,
    as_json: bool,
    tag: str,
    registration_ids: Sequence[str],
    add: Sequence[str],
    remove: Sequence[str],
) -> None:
    """Show which of these devices have a tag; without any, how many have it. --add and --remove come first, and are
    done for all or none."""
    named = list(dict.fromkeys((*add, *remove, *registration_ids)))

    async def ask(publisher: Publisher) -> Estimate | dict[str, bool | None]:
        if add or remove:
            await publisher.tags.change(tag, add=add, remove=remove)
        if not named:
            return await publisher.estimate(Audience(tag=[tag]))
        found = await asyncio.gather(*(_has(publisher, tag, one) for one in named))
        return dict(zip(named, found, strict=True))

    found = login.call(ask)
    if as_json:
        print_json(found)
    elif isinstance(found, Estimate):
        print_fields({"registered": found.registered, "online": found.online})
    else:
        words = {True: "yes", False: "no", None: "not a device"}
        print_table(("device", "has it"), [(name, words[has]) for name, has in found.items()])


async def _has(publisher: Publisher, tag: str, registration_id: str) -> bool | None:
    """None: it is no device."""
    try:
        return await publisher.tags.has(tag, registration_id)
    except PushError as error:
        if error.code == NO_DEVICE:
            return None
        raise


# alias


@devices.group()
def alias() -> None:
    """Show the devices of an alias; take it from all."""


@alias.command("show")
@login_options
@json_option
@_only
@click.argument("alias")
def show_alias(login: Login, as_json: bool, alias: str, platforms: Sequence[str]) -> None:
    """Show the devices that have an alias."""
    found = login.call(lambda publisher: publisher.aliases.devices(alias, platforms))
    if as_json:
        print_json(found)
    else:
        print_table(("device",), [(one,) for one in found], "no devices")


@alias.command("delete")
@login_options
@_only
@click.argument("alias")
def delete_alias(login: Login, alias: str, platforms: Sequence[str]) -> None:
    """Take an alias from all devices."""
    login.call(lambda publisher: publisher.aliases.delete(alias, platforms))
