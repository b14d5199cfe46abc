"""Commands of the operator: `holdfast config`, `app`, `device`, `group`, `audit`, `node`.

All but the first work on the store: that of a fleet is shared, so they are one more process on it. The embedded store
has a lock: who can open it is alone with it, and a running server that has it is asked through its admin API.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar, cast
from urllib.parse import quote, urlencode

import aiohttp
import click
import orjson

from broker.admin import Actions, LocalActions, read_admin_file
from broker.broker import Broker
from broker.bus import Bus
from broker.bus_local import LocalBus
from broker.carriers.catalog import LINKS
from broker.config import Config, ConfigError, config_options, format_config, load_config, sample_config
from broker.errors import ApiError
from broker.metrics import Metrics
from broker.printing import print_json, print_table
from broker.store import Store, StoreError, StoreUnavailable
from broker.store_sqlite import SqliteStore
from broker.tenants.audit import MAX_ENTRIES

if TYPE_CHECKING:
    from broker.store_redis import RedisStore

_T = TypeVar("_T")


def make_store(config: Config, *, checked: bool = True) -> Store:
    """The store that the settings name; not opened. `checked`: refuse a Redis that may lose what was answered."""
    if config.store.url:
        return _redis_store(config, checked=checked and not config.store.unsafe)
    return SqliteStore(config.server.data_dir / "holdfast.db", **_lifetimes(config))


def _redis_store(config: Config, *, checked: bool) -> RedisStore:
    from broker.store_redis import RedisStore  # 5 MB that an embedded server does not need

    return RedisStore(config.store.url, replicas=config.store.replicas, checked=checked, **_lifetimes(config))


def _lifetimes(config: Config) -> dict[str, Any]:
    store = config.store
    return {
        "report_lifetime": store.report_lifetime,
        "cid_lifetime": store.cid_lifetime,
        "event_lifetime": store.event_lifetime,
        "audit_lifetime": store.audit_lifetime,
        "activity_lifetime": store.activity_lifetime,
        "time_zone": store.time_zone,
    }


def make_bus(config: Config, store: Store) -> Bus:
    """The one that belongs to the store, which closes it."""
    return cast("RedisStore", store).bus if config.store.url else LocalBus()


def count_store(config: Config, store: Store, metrics: Metrics) -> None:
    """Metrics that only a fleet's store has."""
    if config.store.url:
        cast("RedisStore", store).count_in(metrics)


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

_where = config_options("server.data_dir", "store.url")


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


@device.command()
@click.argument("registration_id")
@click.option("--app", "key", required=True, metavar="KEY", help="App key.")
@_where
def find(config: Config, registration_id: str, key: str) -> None:
    """Print which node a device is connected to, or when it was last seen, and how many pushes wait for it."""
    _run(config, lambda actions: actions.find_device(key, registration_id))


# node


@click.group()
def node() -> None:
    """See the processes of a fleet, and have them hand their devices over."""


@node.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@_where
def list_nodes(config: Config, as_json: bool) -> None:
    """Print the processes that share the store. Those that died without a goodbye are listed for an hour, as lost."""
    nodes = _ask(config, lambda actions: actions.list_nodes())
    if as_json:
        print_json(nodes)
    else:
        print_table(NODE_COLUMNS, nodes)


@node.command()
@click.argument("name")
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Hand over this part of its devices only, and go on.",
)
@_where
def drain(config: Config, name: str, share: float) -> None:
    """Have a node take no new devices and hand its own over to others, at a pace."""
    _run(config, lambda actions: actions.drain_node(name, share))


@node.command()
@click.argument("name")
@_where
def resume(config: Config, name: str) -> None:
    """Have a drained node take devices again."""
    _run(config, lambda actions: actions.resume_node(name))


NODE_COLUMNS: Final = ("name", "role", "state", "connections", "address", "beat_age", "version", "wish")


# carriers


def list_carriers(config: Config, days: int) -> list[dict[str, object]]:
    """What was learned of each network: `holdfast carriers` prints it."""
    return _ask(config, lambda actions: actions.list_carriers(str(days)))


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


# dispatch


@click.group()
def dispatch() -> None:
    """Where devices are told to connect."""


@dispatch.command("key")
@_where
def dispatch_key(config: Config) -> None:
    """Print the public key by which devices check what they are told; it is made if there is none."""
    _run(config, lambda actions: actions.dispatch_key())


@dispatch.command("next-key")
@_where
def next_dispatch_key(config: Config) -> None:
    """Print the public key that is to follow; it is made if there is none."""
    _run(config, lambda actions: actions.next_dispatch_key())


@dispatch.command("change-key")
@_where
def change_dispatch_key(config: Config) -> None:
    """Sign with the next key from now on, and print it; the one before is gone."""
    _run(config, lambda actions: actions.change_dispatch_key())


@dispatch.command("ask")
@click.option("--address", default="", help="Of the device.")
@click.option("--carrier", default="", help="MCC+MNC, or a carrier's name.")
@click.option("--link", type=click.Choice(sorted(LINKS)), help="What it declares.")
@click.option("--region", default="")
@config_options("server.data_dir", "store.url", "carriers.directory")
def ask_dispatch(config: Config, **question: str | None) -> None:
    """Print what such a device is told now."""
    said = {name: value for name, value in question.items() if value}
    _run(config, lambda actions: actions.ask_dispatch(said))


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
    print_json(_ask(config, act, make=make))


def _ask(config: Config, act: Callable[[Actions], Awaitable[_T]], *, make: bool = False) -> _T:
    data_dir = config.server.data_dir
    if not config.store.url and not make and not data_dir.is_dir():
        raise click.ClickException(
            f"there is no data directory {data_dir}; name it with --data-dir, or a Redis with --store"
        )

    async def run() -> _T:
        async with _open_actions(config) as actions:
            return await act(actions)

    try:
        return asyncio.run(run())
    except (ApiError, StoreError, OSError, ValueError) as error:
        raise click.ClickException(error.message if isinstance(error, ApiError) else str(error)) from error


@asynccontextmanager
async def _open_actions(config: Config) -> AsyncIterator[Actions]:
    store = make_store(config, checked=False)
    try:
        await store.open()
    except StoreUnavailable as error:
        if config.store.url:
            raise
        async with _reach_server(config, error) as actions:
            yield actions
        return
    bus = make_bus(config, store)
    try:
        broker = Broker(store, bus, config.limits(), carriers=config.carriers.directory)
        yield LocalActions(broker, config.push.offline_limit)
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

    async def find_device(self, key: str, registration_id: str) -> object:
        return await self._call("GET", f"/v1/apps/{_quote(key)}/devices/{_quote(registration_id)}")

    async def list_nodes(self) -> list[dict[str, object]]:
        nodes: Any = await self._call("GET", "/v1/nodes")
        return list(nodes)

    async def list_carriers(self, days: str | None = None) -> list[dict[str, object]]:
        networks: Any = await self._call("GET", f"/v1/carriers?days={days or 1}")
        return list(networks)

    async def drain_node(self, name: str, share: float = 1.0) -> object:
        return await self._call("POST", f"/v1/nodes/{_quote(name)}/drain", {"share": share})

    async def resume_node(self, name: str) -> object:
        return await self._call("POST", f"/v1/nodes/{_quote(name)}/resume")

    async def issue_token(self, key: str, registration_id: str) -> object:
        return await self._call("POST", _path(key, "device-token"), {"registration_id": registration_id})

    async def create_group(self, group: object) -> object:
        return await self._call("POST", "/v1/groups", group)

    async def list_groups(self) -> object:
        return await self._call("GET", "/v1/groups")

    async def change_group(self, key: str, group: object) -> object:
        return await self._call("PUT", f"/v1/groups/{_quote(key)}", group)

    async def delete_group(self, key: str) -> object:
        return await self._call("DELETE", f"/v1/groups/{_quote(key)}")

    async def dispatch_key(self) -> object:
        return await self._call("GET", "/v1/dispatch/key")

    async def next_dispatch_key(self) -> object:
        return await self._call("POST", "/v1/dispatch/key/next")

    async def change_dispatch_key(self) -> object:
        return await self._call("POST", "/v1/dispatch/key/change")

    async def ask_dispatch(self, question: Mapping[str, str]) -> object:
        return await self._call("GET", f"/v1/dispatch?{urlencode(question)}")

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
    return f"/v1/apps/{_quote(key)}/access"


def _settings_path(key: str) -> str:
    return f"/v1/apps/{_quote(key)}/settings"


def _path(key: str, action: str) -> str:
    return f"/v1/app/{_quote(key)}/{action}"


def _quote(text: str) -> str:
    return quote(text, safe="")
