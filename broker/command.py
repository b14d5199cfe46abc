"""Commands of the operator: `holdfast config`, `holdfast app`, `holdfast device`.

The last two work on a running server, through its admin API, and on a stopped one, on its store. Which it is,
the lock on the data directory says: who can open the store is alone with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import aiohttp
import click
import orjson

from broker.admin import Actions, LocalActions, read_admin_file
from broker.apps import Apps
from broker.bus_local import LocalBus
from broker.config import Config, ConfigError, config_options, format_config, load_config, sample_config
from broker.devices import Devices
from broker.errors import ApiError
from broker.store import StoreError, StoreUnavailable
from broker.store_sqlite import SqliteStore


def make_store(config: Config) -> SqliteStore:
    """The store that the settings name; not opened."""
    return SqliteStore(
        config.server.data_dir / "holdfast.db",
        report_lifetime=config.store.report_lifetime,
        cid_lifetime=config.store.cid_lifetime,
        event_lifetime=config.store.event_lifetime,
    )


# config


@click.group()
def config() -> None:
    """Check and show settings."""


@config.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Check a settings file: print ok, or every mistake in it."""
    try:
        load_config(file)
    except ConfigError as error:
        for line in error.errors:
            click.echo(line)
        raise SystemExit(1) from error
    click.echo("ok")


@config.command()
@config_options()
def show(config: Config) -> None:
    """Print the settings as they are in effect, secrets hidden."""
    click.echo(format_config(config), nl=False)


@config.command()
def sample() -> None:
    """Print a settings file with every key and its default."""
    click.echo(sample_config(), nl=False)


# app and device

_where = config_options("server.data_dir")


@click.group()
def app() -> None:
    """Create and manage apps."""


@app.command()
@click.argument("name")
@click.option("--open", "is_open", is_flag=True, help="Any client id may connect with the app's device key.")
@_where
def create(config: Config, name: str, is_open: bool) -> None:
    """Create an app and print its keys."""
    _run(config, lambda actions: actions.create_app(name, open=is_open), make=True)


@app.command("list")
@_where
def list_apps(config: Config) -> None:
    """Print all apps."""
    _run(config, lambda actions: actions.list_apps())


@app.command()
@click.argument("key")
@_where
def rotate_secret(config: Config, key: str) -> None:
    """Give an app a fresh master secret; the old one stops at once."""
    _run(config, lambda actions: actions.rotate_secret(key))


@app.command()
@click.argument("key", metavar="APP_KEY")
@click.option(
    "--set",
    "rules",
    type=click.File("rb"),
    metavar="FILE",
    help="Replace the rules by those of a JSON file; - is standard input.",
)
@_where
def access(config: Config, key: str, rules: IO[bytes] | None) -> None:
    """Print an app's access rules as JSON, or replace them; what is there now is printed."""
    if rules is None:
        _run(config, lambda actions: actions.show_access(key))
        return
    wanted = _read_json(rules)
    _run(config, lambda actions: actions.set_access(key, wanted))


def _read_json(file: IO[bytes]) -> object:
    try:
        content: object = orjson.loads(file.read())
    except orjson.JSONDecodeError as error:
        raise click.ClickException(f"the access rules are not valid JSON: {error}") from error
    return content


@app.command()
@click.argument("key")
@_where
def delete(config: Config, key: str) -> None:
    """Delete an app with its devices and pushes."""
    _run(config, lambda actions: actions.delete_app(key))


@click.group()
def device() -> None:
    """Manage devices."""


@device.command()
@click.argument("registration_id")
@click.option("--app", "key", required=True, metavar="KEY", help="App key.")
@_where
def token(config: Config, registration_id: str, key: str) -> None:
    """Print a token for a device, which is registered if it is new."""
    _run(config, lambda actions: actions.issue_token(key, registration_id))


# On the store, or by way of the server that has it open


def _run(config: Config, act: Callable[[Actions], Awaitable[object]], *, make: bool = False) -> None:
    """Do it and print the answer as JSON; `make`: the data directory may be new."""
    data_dir = config.server.data_dir
    if not make and not data_dir.is_dir():
        raise click.ClickException(f"there is no data directory {data_dir}; name it with --data-dir")

    async def run() -> object:
        async with _open_actions(config) as actions:
            return await act(actions)

    try:
        answer = asyncio.run(run())
    except (ApiError, StoreError, OSError, ValueError) as error:
        raise click.ClickException(error.message if isinstance(error, ApiError) else str(error)) from error
    click.echo(orjson.dumps(answer, option=orjson.OPT_INDENT_2))


@asynccontextmanager
async def _open_actions(config: Config) -> AsyncIterator[Actions]:
    store = make_store(config)
    try:
        await store.open()
    except StoreUnavailable as error:
        async with _reach_server(config, error) as actions:
            yield actions
        return
    try:
        bus, limits = LocalBus(), config.limits()
        apps, devices = Apps(store, bus, limits), Devices(store, bus, limits)
        yield LocalActions(store, apps, devices, config.push.offline_limit)
    finally:
        await store.close()


@asynccontextmanager
async def _reach_server(config: Config, error: StoreUnavailable) -> AsyncIterator[Actions]:
    """The server that has the store open; if there is none, `error` is why the store cannot be opened."""
    found = read_admin_file(config.server.data_dir)
    if found is None or found.address is None:
        raise error
    headers = {"Authorization": f"Bearer {found.key}"}
    async with aiohttp.ClientSession(found.address, headers=headers) as session:
        try:
            yield RemoteActions(session)
        except aiohttp.ClientError as unreachable:
            raise StoreUnavailable(
                f"{error}; and {found.address} does not answer: {unreachable}"
            ) from unreachable


class RemoteActions:
    """Through the admin API."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def create_app(self, name: str, *, open: bool) -> object:
        return await self._call("POST", "/v1/app", {"name": name, "open": open})

    async def list_apps(self) -> object:
        return await self._call("GET", "/v1/apps")

    async def rotate_secret(self, key: str) -> object:
        return await self._call("POST", _path(key, "rotate-secret"))

    async def show_access(self, key: str) -> object:
        return await self._call("GET", _access_path(key))

    async def set_access(self, key: str, rules: object) -> object:
        return await self._call("PUT", _access_path(key), rules)

    async def delete_app(self, key: str) -> object:
        return await self._call("POST", _path(key, "delete"))

    async def issue_token(self, key: str, registration_id: str) -> object:
        return await self._call("POST", _path(key, "device-token"), {"registration_id": registration_id})

    async def _call(self, method: str, path: str, body: object = None) -> object:
        async with self._session.request(method, path, json=body) as response:
            content: Any = await response.json()
        if response.status == 200:
            return content
        error = content["error"]
        raise ApiError(error["code"], error["message"], http_status=response.status)


def _access_path(key: str) -> str:
    return f"/v1/apps/{quote(key, safe='')}/access"


def _path(key: str, action: str) -> str:
    return f"/v1/app/{quote(key, safe='')}/{action}"
