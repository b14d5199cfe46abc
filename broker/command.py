"""Commands of the operator: `holdfast config`, `app`, `device`, `group`, `audit`.

All but the first work on a running server, through its admin API, and on a stopped one, on its store. Which it is,
the lock on the data directory says: who can open the store is alone with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlencode

import aiohttp
import click
import orjson

from broker.admin import Actions, LocalActions, read_admin_file
from broker.broker import Broker
from broker.bus_local import LocalBus
from broker.config import Config, ConfigError, config_options, format_config, load_config, sample_config
from broker.errors import ApiError
from broker.store import StoreError, StoreUnavailable
from broker.store_sqlite import SqliteStore
from broker.tenants.audit import MAX_ENTRIES


def make_store(config: Config) -> SqliteStore:
    """The store that the settings name; not opened."""
    return SqliteStore(
        config.server.data_dir / "holdfast.db",
        report_lifetime=config.store.report_lifetime,
        cid_lifetime=config.store.cid_lifetime,
        event_lifetime=config.store.event_lifetime,
        audit_lifetime=config.store.audit_lifetime,
        activity_lifetime=config.store.activity_lifetime,
        time_zone=config.store.time_zone,
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
    wanted = _read_json(rules, "the access rules are")
    _run(config, lambda actions: actions.set_access(key, wanted))


def _read_json(file: IO[bytes], what: str) -> object:
    try:
        content: object = orjson.loads(file.read())
    except orjson.JSONDecodeError as error:
        raise click.ClickException(f"{what} not valid JSON: {error}") from error
    return content


@app.command()
@click.argument("key", metavar="APP_KEY")
@click.option(
    "--set",
    "settings",
    type=click.File("rb"),
    metavar="FILE",
    help="Replace the settings by those of a JSON file; - is standard input.",
)
@_where
def settings(config: Config, key: str, settings: IO[bytes] | None) -> None:
    """Print an app's settings as JSON, or replace them; what is there now is printed."""
    if settings is None:
        _run(config, lambda actions: actions.show_settings(key))
        return
    wanted = _read_json(settings, "the settings are")
    _run(config, lambda actions: actions.set_settings(key, wanted))


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


# group and audit


@click.group()
def group() -> None:
    """Create and manage app groups: one push to several apps."""


_apps = click.option(
    "--app", "apps", multiple=True, metavar="APP_KEY", help="An app of the group; repeatable."
)


@group.command("create")
@click.argument("name")
@_apps
@_where
def create_group(config: Config, name: str, apps: tuple[str, ...]) -> None:
    """Create a group and print its key and secret: a group push logs in as group-KEY."""
    _run(config, lambda actions: actions.create_group({"name": name, "apps": apps}))


@group.command("list")
@_where
def list_groups(config: Config) -> None:
    """Print all groups."""
    _run(config, lambda actions: actions.list_groups())


@group.command("change")
@click.argument("key", metavar="GROUP_KEY")
@click.option("--name", help="Another name.")
@_apps
@_where
def change_group(config: Config, key: str, name: str | None, apps: tuple[str, ...]) -> None:
    """Give a group another name, or other apps in place of those it has."""
    wanted = {"name": name, "apps": apps or None}
    _run(config, lambda actions: actions.change_group(key, wanted))


@group.command("delete")
@click.argument("key", metavar="GROUP_KEY")
@_where
def delete_group(config: Config, key: str) -> None:
    """Delete a group; its apps stay."""
    _run(config, lambda actions: actions.delete_group(key))


@click.command()
@click.option("--app", "key", metavar="APP_KEY", help="Of this app only.")
@click.option("--before", type=click.IntRange(min=0), help="Go on where the last answer ended.")
@click.option("--limit", type=click.IntRange(1, MAX_ENTRIES), default=100, show_default=True)
@_where
def audit(config: Config, key: str | None, before: int | None, limit: int) -> None:
    """Print who did what: administrative calls, newest first."""
    start = None if before is None else str(before)
    _run(config, lambda actions: actions.list_audit(key, start, str(limit)))


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
        yield LocalActions(Broker(store, LocalBus(), config.limits()), config.push.offline_limit)
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

    async def show_settings(self, key: str) -> object:
        return await self._call("GET", _settings_path(key))

    async def set_settings(self, key: str, settings: object) -> object:
        return await self._call("PUT", _settings_path(key), settings)

    async def delete_app(self, key: str) -> object:
        return await self._call("POST", _path(key, "delete"))

    async def issue_token(self, key: str, registration_id: str) -> object:
        return await self._call("POST", _path(key, "device-token"), {"registration_id": registration_id})

    async def create_group(self, group: object) -> object:
        return await self._call("POST", "/v1/groups", group)

    async def list_groups(self) -> object:
        return await self._call("GET", "/v1/groups")

    async def change_group(self, key: str, group: object) -> object:
        return await self._call("PUT", f"/v1/groups/{quote(key, safe='')}", group)

    async def delete_group(self, key: str) -> object:
        return await self._call("DELETE", f"/v1/groups/{quote(key, safe='')}")

    async def list_audit(self, key: str | None, before: str | None, limit: str | None) -> object:
        asked = {"app": key, "before": before, "limit": limit}
        query = {name: value for name, value in asked.items() if value is not None}
        return await self._call("GET", f"/v1/audit?{urlencode(query)}")

    async def _call(self, method: str, path: str, body: object = None) -> object:
        async with self._session.request(method, path, json=body) as response:
            content: Any = await response.json()
        if response.status == 200:
            return content
        error = content["error"]
        raise ApiError(error["code"], error["message"], http_status=response.status)


def _access_path(key: str) -> str:
    return f"/v1/apps/{quote(key, safe='')}/access"


def _settings_path(key: str) -> str:
    return f"/v1/apps/{quote(key, safe='')}/settings"


def _path(key: str, action: str) -> str:
    return f"/v1/app/{quote(key, safe='')}/{action}"
