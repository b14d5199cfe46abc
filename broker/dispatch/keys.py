"""`python -m broker.dispatch.keys next` and `change`: another signing key, in two steps (docs/operating.md).

With Redis at any time; with SQLite while the server is stopped, for a database has one process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import click
import orjson

from broker.config import Config, config_options
from broker.dispatch.signing import SigningKey, change_key, next_key
from broker.store import Records, StoreError


@click.group()
def keys() -> None:
    """Another key that dispatch signs with."""


_where = config_options("server.data_dir", "store.url")


@keys.command("next")
@_where
def make_next(config: Config) -> None:
    """Print the public key that is to follow; it is made if there is none."""
    _print(config, next_key)


@keys.command()
@_where
def change(config: Config) -> None:
    """Sign with the next key from now on, and print it; the one before is gone."""
    _print(config, change_key)


def _print(config: Config, act: Callable[[Records], Awaitable[SigningKey]]) -> None:
    from broker.command import make_store

    if not config.store.url and not config.server.data_dir.is_dir():
        raise click.ClickException(
            f"there is no data directory {config.server.data_dir}; name it with --data-dir"
        )

    async def run() -> SigningKey:
        store = make_store(config)
        await store.open()
        try:
            return await act(store.records)
        finally:
            await store.close()

    try:
        key = asyncio.run(run())
    except (StoreError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(orjson.dumps({"key": key.public, "id": key.name}, option=orjson.OPT_INDENT_2))


if __name__ == "__main__":
    keys(prog_name="python -m broker.dispatch.keys")
