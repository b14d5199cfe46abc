"""What the commands of a publisher share: how they log in, how they say what they found, how they fail.

Exit status: 0; 1 if the server refused or could not be reached, with code and message on standard error; 2 for a
wrong command line.
"""

from __future__ import annotations

import asyncio
import functools
import re
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeVar

import click
import msgspec
import orjson

from clients.http import http_address
from clients.publisher import Publisher, PushError

if TYPE_CHECKING:
    from rich.progress import Progress

MSG_ID_DIGITS: Final = 18  # more are no msg_id, and none that the API takes
PLATFORMS: Final = ("android", "ios", "quickapp", "hmos", "winphone")
_T = TypeVar("_T")
_Command = TypeVar("_Command", bound=Callable[..., None])


@dataclass(frozen=True, slots=True)
class Login:
    """Where the server is, and who asks."""

    app_key: str
    secret: str
    url: str

    def call(self, act: Callable[[Publisher], Awaitable[_T]]) -> _T:
        """Run something on the server; a failure ends the command with exit status 1."""

        async def run() -> _T:
            async with Publisher(self.app_key, self.secret, self.url) as publisher:
                return await act(publisher)

        return run_call(run, self.url)


def run_call(run: Callable[[], Awaitable[_T]], url: str) -> _T:
    async def awaited() -> _T:
        return await run()

    try:
        return asyncio.run(awaited())
    except PushError as error:
        raise click.ClickException(str(error)) from error
    except BrokenPipeError:  # the reader has gone; click ends quietly
        raise
    except (ValueError, OSError) as error:  # of aiohttp, for an address that is none; of a file
        raise click.ClickException(
            f"{url}: {error}" if isinstance(error, ValueError) else str(error)
        ) from error


def read_address(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """Callback of an option that is the address of an HTTP API."""
    try:
        return value and http_address(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def read_msg_id(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """Callback of an option or argument that is the id of a push."""
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()) or len(value) > MSG_ID_DIGITS or not int(value):
        raise click.BadParameter(
            f"must be a positive whole number, as `holdfast push` prints it; got {value[:40]}"
        )
    return int(value)


_LOGIN: Final = (
    click.option(
        "--url",
        callback=read_address,
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
        help="Master secret, or the secret of an API key.",
    ),
    click.option(
        "--app", "app_key", envvar="HOLDFAST_APP_KEY", show_envvar=True, required=True, help="App key."
    ),
)


def login_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command gets a `login`."""

    @functools.wraps(command)
    def run(app_key: str, secret: str, url: str, **rest: Any) -> None:
        command(login=Login(app_key, secret, url), **rest)

    for option in _LOGIN:
        run = option(run)
    return run


json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
always_json: Final = click.option(
    "--json", is_flag=True, expose_value=False, help="Print one JSON document, as it always does."
)
msg_id_argument: Final = click.argument("msg_id", callback=read_msg_id)


# What is printed


def plain(value: object) -> Any:
    """As JSON has it: message ids are text, as in the API."""
    return _ids_as_text(msgspec.to_builtins(value))


def _ids_as_text(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: str(item) if key in ("msg_id", "msg_ids") and isinstance(item, int) else _ids_as_text(item)
            for key, item in value.items()
        }
    return [_ids_as_text(item) for item in value] if isinstance(value, list) else value


def print_json(value: object) -> None:
    click.echo(orjson.dumps(plain(value)))


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]], nothing: str = "none") -> None:
    """For people: ruled on a terminal, else plain columns, so that `grep` and `cut` work. `nothing` stands for no
    rows."""
    cells = [[_printable(cell) for cell in row] for row in rows]
    if not cells:
        click.echo(nothing)
    elif sys.stdout.isatty():
        _draw_table(headers, cells)
    else:
        _print_columns([list(headers), *cells])


def _printable(cell: object) -> str:
    """Names of others must not tell the terminal what to do."""
    text = "" if cell is None else str(cell)
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)


def _draw_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Each row as fields where the terminal is too narrow: what the next command needs is never cut."""
    from rich import box  # loaded where somebody sees it: a script need not wait for it
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for header, column in zip(headers, zip(*rows, strict=True), strict=True):
        whole = all(map(_is_one_word, column))
        width = max(map(len, column)) if whole else None
        table.add_column(header, no_wrap=whole, overflow="fold", min_width=width)
    for row in rows:
        table.add_row(*map(Text, row))  # names of others are no markup
    console = Console()
    least = Measurement.get(console, console.options.update(max_width=MAX_WIDTH), table).minimum
    if least <= console.width:
        console.print(table)
        return
    for number, row in enumerate(rows):
        if number:
            click.echo()
        print_fields(dict(zip(headers, row, strict=True)))


def _is_one_word(cell: str) -> bool:
    """Ids, numbers and times are; sentences and rules may be broken."""
    return len(cell) <= MAX_WORD and (" " not in cell or _MOMENT.fullmatch(cell) is not None)


MAX_WORD: Final = 64  # characters: a SHA-256 in hexadecimal
MAX_WIDTH: Final = 10_000
_MOMENT: Final = re.compile(r"[0-9-]{10} [0-9:]{8}Z?")


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())


def print_fields(fields: Mapping[str, object]) -> None:
    """One thing: a name and a value on each line."""
    width = max(map(len, fields))
    for name, value in fields.items():
        click.echo(f"{name:{width}}  {_printable(value)}".rstrip())


def moment(at: float | None) -> str:
    """Unix seconds as people read them, in UTC."""
    return "" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def progress_bar(*, in_bytes: bool = False) -> Progress:
    """On standard error, and only on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), DownloadColumn() if in_bytes else MofNCompleteColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


# What is read


def read_object(file: BinaryIO, option: str) -> dict[str, Any]:
    try:
        body = orjson.loads(file.read())
    except orjson.JSONDecodeError as error:
        raise click.UsageError(f"{option}: not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise click.UsageError(f"{option}: must be a JSON object")
    return body
