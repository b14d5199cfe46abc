"""`holdfast segment` and `holdfast file`: audiences that are kept on the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import click
import orjson

from clients.command_shared import (
    Login,
    always_json,
    json_option,
    login_options,
    print_fields,
    print_json,
    print_table,
    progress_bar,
    read_object,
)
from clients.publisher import Estimate, Publisher, Segment

_segment_id = click.argument("segment_id")
_rule = click.option(
    "--rule",
    type=click.File("rb"),
    required=True,
    help="The rule as a JSON object; - is stdin. See docs/api.md.",
)


@click.group()
def segment() -> None:
    """Save audiences as rules, and count them."""


@segment.command("list")
@login_options
@json_option
def list_segments(login: Login, as_json: bool) -> None:
    """Show all segments."""

    async def ask(publisher: Publisher) -> list[Segment]:
        return [found async for found in publisher.segments.all()]

    found = login.call(ask)
    if as_json:
        print_json(found)
        return
    rows = [(one.id, one.name, orjson.dumps(one.rule).decode()) for one in found]
    print_table(("id", "name", "rule"), rows, "no segments")


@segment.command()
@login_options
@always_json
@click.argument("name")
@_rule
def create(login: Login, name: str, rule: BinaryIO) -> None:
    """Save a rule and print the segment as JSON."""
    wanted = read_object(rule, "--rule")
    print_json(login.call(lambda publisher: publisher.segments.create(name, wanted)))


@segment.command()
@login_options
@always_json
@_segment_id
@click.option("--name", help="Another name. Default: the one it has.")
@_rule
def replace(login: Login, segment_id: str, name: str | None, rule: BinaryIO) -> None:
    """Give a segment another rule, for pushes from now on, and print it as JSON."""
    wanted = read_object(rule, "--rule")

    async def change(publisher: Publisher) -> Segment:
        kept = name or (await publisher.segments.get(segment_id)).name
        return await publisher.segments.replace(segment_id, kept, wanted)

    print_json(login.call(change))


@segment.command()
@login_options
@always_json
@_segment_id
def show(login: Login, segment_id: str) -> None:
    """Print a segment as JSON."""
    print_json(login.call(lambda publisher: publisher.segments.get(segment_id)))


@segment.command()
@login_options
@_segment_id
def delete(login: Login, segment_id: str) -> None:
    """Delete a segment; schedules that name it fail from then on."""
    login.call(lambda publisher: publisher.segments.delete(segment_id))


@segment.command()
@login_options
@json_option
@click.option("--rule", type=click.File("rb"), help="Of this JSON object instead of a saved one; - is stdin.")
@click.argument("segment_id", required=False)
def estimate(login: Login, as_json: bool, segment_id: str | None, rule: BinaryIO | None) -> None:
    """Show how many devices a push would be for now, and how many of them are connected."""
    if (segment_id is None) == (rule is None):
        raise click.UsageError("give a SEGMENT_ID or --rule, one of them")
    wanted = read_object(rule, "--rule") if rule else {}

    async def ask(publisher: Publisher) -> Estimate:
        if segment_id is None:
            return await publisher.segments.estimate_rule(wanted)
        return await publisher.segments.estimate(segment_id)

    found = login.call(ask)
    if as_json:
        print_json(found)
    else:
        print_fields({"registered": found.registered, "online": found.online})


@click.group()
def file() -> None:
    """Upload lists of registration ids or aliases as audiences."""


@file.command()
@login_options
@always_json
@click.option("--alias", is_flag=True, help="The lines are aliases. Default: registration ids.")
@click.option("--hours", type=click.IntRange(1), help="Remove it after so many. Default: the server's limit.")
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def upload(login: Login, alias: bool, hours: int | None, path: Path) -> None:
    """Upload a list, one name on each line, and print its file_id as JSON."""
    with progress_bar(in_bytes=True) as bar:
        task = bar.add_task(path.name, total=None)

        def sent(count: int, total: int | None) -> None:
            bar.update(task, completed=count, total=total)

        by: Any = "alias" if alias else "registration_id"
        file_id = login.call(lambda publisher: publisher.files.upload(path, by, ttl=hours, progress=sent))
    print_json({"file_id": file_id})


@file.command("list")
@login_options
@json_option
def list_files(login: Login, as_json: bool) -> None:
    """Show the lists that are there."""
    found = login.call(lambda publisher: publisher.files.all())
    if as_json:
        print_json(found)
        return
    rows = [
        (one.file_id, one.type, one.lines, one.file_name, one.create_time, one.expire_time) for one in found
    ]
    print_table(("id", "of", "lines", "name", "uploaded", "expires"), rows, "no files")


@file.command("delete")
@login_options
@click.argument("file_id")
def delete_file(login: Login, file_id: str) -> None:
    """Delete a list; pushes that were made for it stay."""
    login.call(lambda publisher: publisher.files.delete(file_id))
