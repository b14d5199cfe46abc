"""The operator's listener: metrics, health, and the admin API; and `admin.json`, by which commands find it.

`/metrics`, `/healthz` and `/readyz` need no key: the listener is on loopback unless told otherwise. The other
paths need the admin key, as `Authorization: Bearer KEY` or as the password of Basic.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import os
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Protocol, TypeVar

import msgspec
import orjson
from aiohttp import hdrs, web

from broker.api.door import Door
from broker.broker import Broker
from broker.carriers.learning import KEPT_DAYS
from broker.config import Config
from broker.dispatch.dispatch import Question
from broker.dispatch.signing import SigningKey, change_key, next_key
from broker.errors import ADMIN, ApiError
from broker.metrics import LoopLag, Metrics
from broker.model import App, AppSettings, NodeEntry, OwedRequest, Route
from broker.pushing.requests import decode
from broker.store import StoreError
from broker.tenants.access import describe_rules, parse_rules
from broker.tenants.app_settings import describe_settings, names_of_changes, read_settings
from broker.tenants.apps import read_basic
from broker.tenants.audit import Deed, describe_page, read_page
from broker.tenants.groups import Group

MAX_BODY: Final = 524_288  # room for the longest list of access rules; nothing else comes near it
MAX_NAME: Final = 200
PAGE: Final = 1000
WORKER: Final = re.compile(r"-[0-9]+$")  # what a worker's name has beyond its supervisor's
WAITING: Final = 10_000  # rows of one inbox that are counted; the newest-N rule keeps nearly all below


class Actions(Protocol):
    """What an operator may do, here or by way of a running server. Each answers what is printed as JSON, or
    raises ApiError."""

    async def create_app(self, name: str, *, open: bool) -> object: ...
    async def list_apps(self) -> object: ...
    async def rotate_secret(self, key: str) -> object: ...
    async def show_access(self, key: str) -> object: ...
    async def set_access(self, key: str, rules: object) -> object: ...
    async def show_settings(self, key: str) -> object: ...
    async def set_settings(self, key: str, settings: object) -> object: ...
    async def delete_app(self, key: str) -> object: ...
    async def issue_token(self, key: str, registration_id: str) -> object: ...
    async def find_device(self, key: str, registration_id: str) -> object: ...
    async def list_nodes(self) -> list[dict[str, object]]: ...
    async def drain_node(self, name: str, share: float = 1.0) -> object: ...
    async def resume_node(self, name: str) -> object: ...
    async def create_group(self, group: object) -> object: ...
    async def list_groups(self) -> object: ...
    async def change_group(self, key: str, group: object) -> object: ...
    async def delete_group(self, key: str) -> object: ...
    async def list_audit(self, key: str | None, before: str | None, limit: str | None) -> object: ...
    async def dispatch_key(self) -> object: ...
    async def next_dispatch_key(self) -> object: ...
    async def change_dispatch_key(self) -> object: ...
    async def ask_dispatch(self, question: Mapping[str, str]) -> object: ...
    async def list_carriers(self, days: str | None = None) -> list[dict[str, object]]: ...


class LocalActions:
    """On the store of this process. What changes something is in the audit log, as done by `actor` from `address`."""

    def __init__(
        self, broker: Broker, offline_limit: int, *, actor: str = "local", address: str = ""
    ) -> None:
        self._broker = broker
        self._apps = broker.apps
        self._offline_limit = offline_limit  # of new apps
        self._actor = actor
        self._address = address

    def by(self, actor: str, address: str) -> LocalActions:
        """The same, done by somebody else."""
        return LocalActions(self._broker, self._offline_limit, actor=actor, address=address)

    def _deed(self, action: str, subject: str) -> AbstractAsyncContextManager[Deed]:
        return self._broker.audit.deed(self._actor, self._address, action, subject)

    async def create_app(self, name: str, *, open: bool) -> object:
        async with self._deed("app.create", name) as deed:
            if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
                raise ApiError(1003, f"name must be 1 to {MAX_NAME} printable characters")
            app = await self._apps.create(name, open=open, offline_limit=self._offline_limit)
            deed.app_id, deed.subject = app.app_id, f"{app.key} {name}"
        return {**describe_app(app), "is_new_created": True}

    async def list_apps(self) -> object:
        apps: list[App] = []
        while page := await self._broker.store.list_apps(apps[-1].app_id if apps else 0, PAGE):
            apps += page
        return [describe_app(app) for app in apps]

    async def rotate_secret(self, key: str) -> object:
        async with self._deed("app.rotate_secret", key) as deed:
            app = await self._apps.rotate_secret(key) or _no_app(key)
            deed.app_id = app.app_id
        return describe_app(app)

    async def show_access(self, key: str) -> object:
        return describe_rules((await self._app(key)).access)

    async def set_access(self, key: str, rules: object) -> object:
        async with self._deed("app.set_access", key) as deed:
            app = await self._apps.set_access(key, parse_rules(rules)) or _no_app(key)
            deed.app_id, deed.subject = app.app_id, f"{key} {len(app.access)} rules"
        return describe_rules(app.access)

    async def show_settings(self, key: str) -> object:
        return describe_settings((await self._app(key)).settings)

    async def set_settings(self, key: str, settings: object) -> object:
        """All of them: what is left out gets its default."""
        async with self._deed("app.set_settings", key) as deed:
            read = read_settings(_encode(settings), self._broker.limits)

            def replaced(before: AppSettings) -> AppSettings:
                deed.subject = f"{key} {names_of_changes(before, read)}".strip()
                return read

            app = await self._apps.change_settings(key, replaced) or _no_app(key)
            deed.app_id = app.app_id
        return describe_settings(app.settings)

    async def delete_app(self, key: str) -> object:
        async with self._deed("app.delete", key) as deed:
            app = await self._app(key)
            deed.app_id, deed.subject = app.app_id, f"{key} {app.name}"
            if not await self._apps.delete(key):
                _no_app(key)
        return {"success": "delete app success"}

    async def issue_token(self, key: str, registration_id: str) -> object:
        """Registers the device if it is new."""
        async with self._deed("device.issue_token", f"{key} {registration_id}") as deed:
            app = await self._app(key)
            deed.app_id = app.app_id
            registered = await self._broker.devices.register(
                app, registration_id=registration_id, trusted=True
            )
        return {
            "registration_id": registered.device.registration_id,
            "token": registered.token,
            "expires_at": registered.expires_at,
        }

    async def find_device(self, key: str, registration_id: str) -> object:
        """Where it is, and how much waits for it: at most WAITING are counted of each kind."""
        app, store = await self._app(key), self._broker.store
        device = (await store.find_devices(app.app_id, [registration_id])).get(registration_id)
        if device is None:
            raise ApiError(1003, f"there is no device {registration_id}", http_status=404)
        route = (await store.find_routes(app.app_id, [device.devno])).get(device.devno, Route("", 0))
        [inbox] = await store.fetch_owed([OwedRequest(app.app_id, device.devno, 0, WAITING)])
        broadcasts = await store.live_broadcasts(app.app_id)
        owed = sum(device.devno in row.targets and device.devno not in row.settled for row in broadcasts)
        return {
            "registration_id": registration_id,
            "online": bool(route.node),
            "node": route.node or None,
            "epoch": route.epoch,
            "seen_at": _second(route.seen_at or device.last_online_at),
            "waiting": len(inbox) + owed,
        }

    async def list_nodes(self) -> list[dict[str, object]]:
        now = self._broker.clock()
        return [describe_node(entry, now) for entry in await self._broker.store.nodes.list()]

    async def drain_node(self, name: str, share: float = 1.0) -> object:
        """`share` of its devices, above 0; all: and it takes no new ones."""
        if share >= 1:
            return await self._wish("drain", name, "drain")
        again = int(self._broker.clock())  # the same wish once more is another one
        return await self._wish("drain", name, f"rebalance:{max(1, round(share * 100))}:{again}")

    async def resume_node(self, name: str) -> object:
        return await self._wish("resume", name, "resume")

    async def _wish(self, action: str, name: str, wish: str) -> object:
        """Of a node, or of all workers of a supervisor, which is named without their numbers."""
        nodes = self._broker.store.nodes
        async with self._deed(f"node.{action}", f"{name} {wish}"):
            live = {entry.info.name for entry in await nodes.list() if entry.live}
            named = {name} & live or {other for other in live if WORKER.sub("", other) == name}
            wished = [each for each in sorted(named) if await nodes.wish(each, wish)]
            if not wished:
                raise ApiError(1003, f"there is no live node {name}", http_status=404)
        return {"nodes": wished, "wish": wish}

    async def create_group(self, group: object) -> object:
        """`{"name", "apps"?}`."""
        async with self._deed("group.create", "") as deed:
            made = await self._broker.groups.create(_encode(group))
            deed.subject = _about_group(made)
        return made.describe()

    async def list_groups(self) -> object:
        return [group.describe() for group in await self._broker.groups.every()]

    async def change_group(self, key: str, group: object) -> object:
        """`{"name"?, "apps"?}`: what is left out stays."""
        async with self._deed("group.change", key) as deed:
            changed = await self._broker.groups.change(key, _encode(group))
            deed.subject = _about_group(changed)
        return changed.describe()

    async def delete_group(self, key: str) -> object:
        async with self._deed("group.delete", key) as deed:
            deed.subject = _about_group(await self._broker.groups.delete(key))
        return {"success": "delete group success"}

    async def list_audit(self, key: str | None, before: str | None, limit: str | None) -> object:
        """Of one app, or of all; newest first."""
        app_id = None if key is None else (await self._app(key)).app_id
        start, count = read_page(before, limit)
        found = await self._broker.audit.entries(app_id, start, count)
        return describe_page(found, count, await self._keys({entry.app_id for _, entry in found}))

    async def dispatch_key(self) -> object:
        return _describe_key(await self._broker.dispatch.signing_key())

    async def next_dispatch_key(self) -> object:
        """The one that is to follow; it is made if there is none."""
        async with self._deed("dispatch.next_key", "") as deed:
            key = await next_key(self._broker.store.records, self._broker.clock)
            deed.subject = key.name
        return _describe_key(key)

    async def change_dispatch_key(self) -> object:
        async with self._deed("dispatch.change_key", "") as deed:
            try:
                key = await change_key(self._broker.store.records)
            except ValueError as error:
                raise ApiError(1003, str(error)) from error
            deed.subject = key.name
        return _describe_key(key)

    async def ask_dispatch(self, question: Mapping[str, str]) -> object:
        """`address`, `carrier`, `link`, `region`: of a device of any app."""
        said = {name: question.get(name, "") for name in ("address", "carrier", "link", "region")}
        return orjson.loads((await self._broker.dispatch.compute(Question("", **said))).raw)

    async def list_carriers(self, days: str | None = None) -> list[dict[str, object]]:
        """What was learned of each network in the last days, 1 where it is left out: since midnight, UTC."""
        return await self._broker.learning.report(_read_days(days))

    async def _keys(self, app_ids: set[int]) -> dict[int, str]:
        """Keys of those apps that are there."""
        keys: dict[int, str] = {}
        for app_id in app_ids - {0}:
            for app in await self._broker.store.list_apps(app_id - 1, 1):
                keys[app.app_id] = app.key
        return keys

    async def _app(self, key: str) -> App:
        return await self._apps.find(key) or _no_app(key)


def _encode(value: object) -> bytes:
    """What came as JSON, as JSON again: the others do not write every number that msgspec reads."""
    return json.dumps(value).encode()


def _about_group(group: Group) -> str:
    return f"{group.key} {group.name}: {', '.join(group.apps) or 'no apps'}"


def describe_app(app: App) -> dict[str, object]:
    """All an operator needs to hand an app to its developers. The signing key stays inside."""
    return {
        "app_key": app.key,
        "name": app.name,
        "master_secret": app.master_secret,
        "device_key": app.device_key,
        "open": app.open,
        "offline_limit": app.offline_limit,
        "created_at": int(app.created_at),
    }


def describe_node(entry: NodeEntry, now: float) -> dict[str, object]:
    info = entry.info
    return {
        "name": info.name,
        "role": info.role,
        "state": "lost" if not entry.live else "draining" if info.draining else "live",
        "connections": info.connections,
        "address": info.address,
        "admin": info.admin,
        "pid": info.pid,
        "version": info.version,
        "started_at": _second(info.started_at or None),
        "beat_age": max(0, round(now - entry.beaten_at)),
        "wish": entry.wish,
    }


def _read_days(text: str | None) -> int:
    if text is None:
        return 1
    if not (text.isascii() and text.isdigit()) or len(text) > 3 or not 1 <= int(text) <= KEPT_DAYS:
        raise ApiError(1003, f"days: must be an integer from 1 to {KEPT_DAYS}")
    return int(text)


def _second(at: float | None) -> int | None:
    return None if at is None else int(at)


def _no_app(key: str) -> App:
    raise ApiError(1008, f"there is no app {key}", http_status=404)


@dataclass(slots=True)
class Health:
    """Whether this process should get traffic. `serve` moves `state` on: starting, ready, draining."""

    state: str = "starting"
    checks: list[Callable[[], str | None]] = field(default_factory=list)  # each: a reason why not, or None

    def reasons(self) -> list[str]:
        found = [reason for check in self.checks if (reason := check())]
        return found if self.state == "ready" else [self.state, *found]


class Overview(Protocol):
    """What anybody may see of this server."""

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """A scrape's body and content type."""

    async def alive(self) -> dict[str, object]:
        """The answer of /healthz; to give one at all is the proof."""

    async def reasons(self) -> list[str]:
        """Why it should get no traffic."""


class ProcessOverview:
    """Of one process."""

    def __init__(self, metrics: Metrics, health: Health, lag: LoopLag) -> None:
        self._metrics = metrics
        self._health = health
        self._lag = lag

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        return self._metrics.render(accept)

    async def alive(self) -> dict[str, object]:
        return {"status": "alive", "loop_lag_seconds": self._lag.last}

    async def reasons(self) -> list[str]:
        return self._health.reasons()


# The file by which commands find a running server


class AdminFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """`admin.json` in the data directory, mode 0600."""

    key: str
    address: str | None = (
        None  # of the admin listener while a server runs; left behind by one that was killed
    )


def _admin_path(data_dir: Path) -> Path:
    return data_dir / "admin.json"


def read_admin_file(data_dir: Path) -> AdminFile | None:
    """None: no server ran here yet. Raises ValueError if the file is damaged."""
    try:
        content = _admin_path(data_dir).read_bytes()
    except FileNotFoundError:
        return None
    try:
        return msgspec.json.decode(content, type=AdminFile)
    except msgspec.DecodeError as error:
        raise ValueError(f"{_admin_path(data_dir)}: {error}; delete it to get a new admin key") from error


def write_admin_file(data_dir: Path, content: AdminFile) -> None:
    """Replace the file in one step; it is never readable by others."""
    target = _admin_path(data_dir)
    draft = target.with_suffix(".new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(content))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(target)


def _admin_key(config: Config) -> str:
    """The configured key, else the one of an earlier start, else a new one."""
    known = read_admin_file(config.server.data_dir)
    return config.admin.key or (known.key if known else secrets.token_urlsafe(32))


class AdminListener:
    """Serves the admin application, and says where in `admin.json`. Made with the data directory locked."""

    def __init__(self, config: Config, actions: LocalActions, overview: Overview) -> None:
        self._config = config
        self._key = _admin_key(config)
        self._door = Door(config.http.max_connections, config.http.request_timeout)  # its own count
        self._runner = self._door.runner(admin_application(actions, overview, self._key))
        self.address = ""

    async def open(self, *, shared: bool = False) -> str:
        """Returns the address, `http://127.0.0.1:8081`. `shared`: for a while another process may listen there, too.
        Raises OSError."""
        admin = self._config.admin
        await self._door.open(self._runner, admin.host, admin.port, shared=shared)
        self.address = _as_url(self._runner.addresses[0])
        write_admin_file(self._config.server.data_dir, AdminFile(self._key, self.address))
        return self.address

    async def close(self, *, succeeded: bool = False) -> None:
        """`succeeded`: another process answers at the same address."""
        await self._runner.cleanup()
        if succeeded:
            return
        with contextlib.suppress(OSError):  # a full disk: who finds the old address finds nobody there
            write_admin_file(self._config.server.data_dir, AdminFile(self._key))


def _as_url(address: Sequence[Any]) -> str:
    """Of a bound socket; where it listens everywhere, loopback is one of the places."""
    host, port = ipaddress.ip_address(address[0]), address[1]
    if host.is_unspecified:
        host = ipaddress.ip_address("127.0.0.1" if host.version == 4 else "::1")
    return f"http://{host}:{port}" if host.version == 4 else f"http://[{host}]:{port}"


# HTTP


class _NewApp(msgspec.Struct, forbid_unknown_fields=True):
    """`app_name`, `android_package` and `group_name` are the JPush form; the last two change nothing here."""

    name: str = ""
    app_name: str = ""
    open: bool = False
    android_package: str | None = None
    group_name: str | None = None


class _NewToken(msgspec.Struct, forbid_unknown_fields=True):
    registration_id: str


class _Drain(msgspec.Struct, forbid_unknown_fields=True):
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0


_Body = TypeVar("_Body")


async def _read(request: web.Request, shape: type[_Body]) -> _Body:
    return decode(msgspec.json.Decoder(shape).decode, await request.read(), ADMIN)


def _answer(body: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")


def admin_application(actions: LocalActions, overview: Overview, key: str) -> web.Application:
    async def show_metrics(request: web.Request) -> web.Response:
        body, content_type = await overview.metrics(request.headers.get(hdrs.ACCEPT, ""))
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})

    async def show_health(_: web.Request) -> web.Response:
        return _answer(await overview.alive())

    async def show_readiness(_: web.Request) -> web.Response:
        reasons = await overview.reasons()
        return _answer({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    application = web.Application(
        middlewares=[_guard(key)], client_max_size=MAX_BODY, handler_args={"auto_decompress": False}
    )
    application.add_routes(
        [
            web.get("/metrics", show_metrics),
            web.get("/healthz", show_health),
            web.get("/readyz", show_readiness),
            *(web.route(method, path, _acting(actions, act)) for method, path, act in ADMIN_CALLS),
        ]
    )
    return application


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Act = Callable[[LocalActions, web.Request], Awaitable[object]]


def _acting(actions: LocalActions, act: Act) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        return _answer(await act(actions.by("admin", request.remote or ""), request))

    return handle


async def _create_app(actions: LocalActions, request: web.Request) -> object:
    body = await _read(request, _NewApp)
    return await actions.create_app(body.name or body.app_name, open=body.open)


async def _issue_token(actions: LocalActions, request: web.Request) -> object:
    body = await _read(request, _NewToken)
    return await actions.issue_token(_key(request), body.registration_id)


async def _drain_node(actions: LocalActions, request: web.Request) -> object:
    body = await _read(request, _Drain) if request.can_read_body else _Drain()
    return await actions.drain_node(request.match_info["name"], body.share)


async def _set_access(actions: LocalActions, request: web.Request) -> object:
    return await actions.set_access(_key(request), await _read(request, object))


async def _set_settings(actions: LocalActions, request: web.Request) -> object:
    return await actions.set_settings(_key(request), await _read(request, object))


async def _create_group(actions: LocalActions, request: web.Request) -> object:
    return await actions.create_group(await _read(request, object))


async def _change_group(actions: LocalActions, request: web.Request) -> object:
    return await actions.change_group(_key(request), await _read(request, object))


def _list_audit(actions: LocalActions, request: web.Request) -> Awaitable[object]:
    return actions.list_audit(*(request.query.get(name) for name in ("app", "before", "limit")))


ADMIN_CALLS: Final[Sequence[tuple[str, str, Act]]] = (
    ("POST", "/v1/app", _create_app),
    ("GET", "/v1/apps", lambda actions, _: actions.list_apps()),
    ("POST", "/v1/app/{key}/rotate-secret", lambda actions, request: actions.rotate_secret(_key(request))),
    ("GET", "/v1/apps/{key}/access", lambda actions, request: actions.show_access(_key(request))),
    ("PUT", "/v1/apps/{key}/access", _set_access),
    ("GET", "/v1/apps/{key}/settings", lambda actions, request: actions.show_settings(_key(request))),
    ("PUT", "/v1/apps/{key}/settings", _set_settings),
    ("POST", "/v1/app/{key}/delete", lambda actions, request: actions.delete_app(_key(request))),
    ("POST", "/v1/app/{key}/device-token", _issue_token),
    (
        "GET",
        "/v1/apps/{key}/devices/{registration_id}",
        lambda actions, request: actions.find_device(_key(request), request.match_info["registration_id"]),
    ),
    ("GET", "/v1/nodes", lambda actions, _: actions.list_nodes()),
    ("POST", "/v1/nodes/{name}/drain", _drain_node),
    (
        "POST",
        "/v1/nodes/{name}/resume",
        lambda actions, request: actions.resume_node(request.match_info["name"]),
    ),
    ("POST", "/v1/groups", _create_group),
    ("GET", "/v1/groups", lambda actions, _: actions.list_groups()),
    ("PUT", "/v1/groups/{key}", _change_group),
    ("DELETE", "/v1/groups/{key}", lambda actions, request: actions.delete_group(_key(request))),
    ("GET", "/v1/audit", _list_audit),
    ("GET", "/v1/carriers", lambda actions, request: actions.list_carriers(request.query.get("days"))),
    ("GET", "/v1/dispatch/key", lambda actions, _: actions.dispatch_key()),
    ("POST", "/v1/dispatch/key/next", lambda actions, _: actions.next_dispatch_key()),
    ("POST", "/v1/dispatch/key/change", lambda actions, _: actions.change_dispatch_key()),
    ("GET", "/v1/dispatch", lambda actions, request: actions.ask_dispatch(request.query)),
)


def _describe_key(key: SigningKey) -> dict[str, object]:
    return {"key": key.public, "id": key.name}


def _key(request: web.Request) -> str:
    return request.match_info["key"]


def _guard(key: str) -> Any:
    """Ask for the key on every path but the open ones, and answer errors in the API's shape."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if request.path not in ("/metrics", "/healthz", "/readyz"):
                _check_key(request.headers.get(hdrs.AUTHORIZATION, ""), key)
            return await handler(request)
        except web.HTTPException as error:  # of the router, or a body that is too large
            code = 1001 if error.status == 405 else 1003
            return _answer(ApiError(code, error.reason).as_dict(), error.status)
        except ApiError as error:
            return _answer(error.as_dict(), error.http_status)
        except StoreError as error:
            return _answer(ApiError(1030, str(error)).as_dict(), 503)

    return guard


def _check_key(header: str, key: str) -> None:
    scheme, _, credentials = header.partition(" ")
    basic = read_basic(header)
    given = basic[1] if basic else credentials.encode() if scheme.lower() == "bearer" else b""
    if not hmac.compare_digest(given, key.encode()):
        raise ApiError(1004, "the admin key is missing or wrong; it is in admin.json in the data directory")
