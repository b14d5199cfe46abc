"""What commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click
import orjson


def print_json(answer: object) -> None:
    click.echo(orjson.dumps(answer, option=orjson.OPT_INDENT_2))


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Plain columns, for people and for `grep`; the first row names them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip())


def print_table(columns: Sequence[str], things: Sequence[Mapping[str, object]]) -> None:
    texts = [["-" if thing[name] in ("", None) else str(thing[name]) for name in columns] for thing in things]
    print_rows([columns, *texts])
