from __future__ import annotations

import asyncio
import gzip
import io
import logging
import shutil
import stat
import subprocess
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from broker.admin import (
    AdminFile,
    AdminListener,
    Health,
    LocalActions,
    ProcessOverview,
    read_admin_file,
    write_admin_file,
)
from broker.broker import Broker
from broker.bus_local import LocalBus
from broker.config import Config, load_config
from broker.logs import VALUE_LIMIT, log_event, set_up_logs
from broker.metrics import LoopLag, Metrics, StoreMetrics
from broker.store_sqlite import SqliteStore
from broker.tenants import tokens
from broker.tenants.access import MAX_RULES
from broker.tenants.apps import Apps


@dataclass(slots=True)
class Server:
    """A running admin listener with a key-bearing session to it."""

    config: Config
    store: SqliteStore
    apps: Apps
    health: Health
    listener: AdminListener
    session: aiohttp.ClientSession

    async def call(self, method: str, path: str, body: object = None, **options: Any) -> tuple[int, Any]:
        async with self.session.request(method, path, json=body, **options) as response:
            return response.status, await response.json()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    config = load_config(None, None, {"server.data_dir": str(tmp_path), "admin.port": "0"})
    store, bus, metrics, health = SqliteStore(tmp_path / "holdfast.db"), LocalBus(), Metrics(), Health()
    await store.open()
    store_metrics = StoreMetrics(metrics, store.stats)
    store.stats.on_commit = store_metrics.on_commit
    health.checks.append(store_metrics.refusing)
    broker = Broker(store, bus)
    actions = LocalActions(broker, config.push.offline_limit)
    lag = LoopLag(metrics)
    listener = AdminListener(config, actions, ProcessOverview(metrics, health, lag))
    address = await listener.open()
    found = read_admin_file(tmp_path)
    assert found is not None
    headers = {"Authorization": f"Bearer {found.key}"}
    async with aiohttp.ClientSession(address, headers=headers) as session:
        yield Server(config, store, broker.apps, health, listener, session)
    await listener.close()
    lag.close()
    await store.close()


# Apps


async def test_an_app_is_created_listed_rotated_and_deleted(server: Server) -> None:
    status, made = await server.call("POST", "/v1/app", {"name": "Shop", "open": True})
    assert status == 200
    assert (made["name"], made["open"], made["offline_limit"], made["is_new_created"]) == (
        "Shop",
        True,
        100,
        True,
    )
    [listed] = (await server.call("GET", "/v1/apps"))[1]
    assert listed == {name: value for name, value in made.items() if name != "is_new_created"}

    path = f"/v1/app/{made['app_key']}"
    status, rotated = await server.call("POST", f"{path}/rotate-secret")
    assert status == 200
    assert rotated["master_secret"] != made["master_secret"]
    assert {**rotated, "master_secret": ""} == {**listed, "master_secret": ""}

    assert await server.call("POST", f"{path}/delete") == (200, {"success": "delete app success"})
    assert await server.call("GET", "/v1/apps") == (200, [])


async def test_the_jpush_form_creates_an_app(server: Server) -> None:
    body = {"app_name": "Shop", "android_package": "org.example.shop", "group_name": "all"}
    status, made = await server.call("POST", "/v1/app", body)
    assert (status, made["name"]) == (200, "Shop")


async def test_a_signing_key_never_leaves_the_server(server: Server) -> None:
    _, made = await server.call("POST", "/v1/app", {"name": "Shop"})
    app = await server.apps.find(made["app_key"])
    assert app is not None
    assert app.signing_key.hex() not in str(made)
    assert "signing_key" not in made


async def test_a_token_is_issued_and_registers_the_device(server: Server) -> None:
    _, made = await server.call("POST", "/v1/app", {"name": "Shop"})
    path = f"/v1/app/{made['app_key']}/device-token"
    status, issued = await server.call("POST", path, {"registration_id": "phone-1"})
    assert status == 200
    app = await server.apps.find(made["app_key"])
    assert app is not None
    claims = tokens.verify(app, "phone-1", issued["token"].encode(), issued["expires_at"] - 1)
    assert claims.devno == (await server.store.resolve(app.app_id, ["phone-1"]))["phone-1"]


async def test_access_rules_are_replaced_as_a_whole(server: Server) -> None:
    _, made = await server.call("POST", "/v1/app", {"name": "Shop"})
    path = f"/v1/apps/{made['app_key']}/access"
    assert await server.call("GET", path) == (200, [])
    rules = [{"allow": "publish", "topic": "up/{registration_id}/#", "who": "devices"}]
    assert await server.call("PUT", path, rules) == (200, rules)
    assert await server.call("GET", path) == (200, rules)
    status, refused = await server.call("PUT", path, [*rules, {"allow": "all", "topic": "a", "who": "me"}])
    assert (status, refused["error"]["code"]) == (400, 1003)
    assert refused["error"]["message"].startswith("rule 1: who = 'me': must be one of devices")
    assert await server.call("GET", path) == (200, rules)
    assert await server.call("PUT", path, []) == (200, [])
    assert await server.call("GET", path) == (200, [])


async def test_settings_are_replaced_as_a_whole(server: Server) -> None:
    _, made = await server.call("POST", "/v1/app", {"name": "Shop"})
    path = f"/v1/apps/{made['app_key']}/settings"
    status, nothing = await server.call("GET", path)
    assert (status, nothing["limits"], nothing["restricted"]) == (200, {}, False)
    wanted = {"restricted": True, "limits": {"push_rate": 600}, "allow_from": ["10.0.0.0/8"]}
    assert await server.call("PUT", path, wanted) == (200, nothing | wanted)
    assert await server.call("GET", path) == (200, nothing | wanted)
    status, refused = await server.call("PUT", path, {"limits": {"push_rate": 0}})
    assert (status, refused["error"]["code"]) == (400, 1003)
    assert refused["error"]["message"].startswith("limits.push_rate = 0: must be")
    assert await server.call("GET", path) == (200, nothing | wanted)
    assert await server.call("PUT", path, {}) == (200, nothing)
    for method in ("GET", "PUT"):
        status, refused = await server.call(method, "/v1/apps/nope/settings", {})
        assert (status, refused["error"]["code"]) == (404, 1008)


async def test_groups_are_managed(server: Server) -> None:
    _, made = await server.call("POST", "/v1/app", {"name": "Shop"})
    status, group = await server.call("POST", "/v1/groups", {"name": "all", "apps": [made["app_key"]]})
    assert (status, group["name"], group["apps"]) == (200, "all", [made["app_key"]])
    assert len(group["secret"]) == 24
    assert await server.call("GET", "/v1/groups") == (200, [group])
    path = f"/v1/groups/{group['group_key']}"
    assert await server.call("PUT", path, {"apps": []}) == (200, group | {"apps": []})
    for body, code in (([], 1003), ({"apps": ["nope"]}, 1008), ({"name": 1}, 1003)):
        status, refused = await server.call("PUT", path, body)
        assert (status, refused["error"]["code"]) == (400, code)
    assert await server.call("DELETE", path) == (200, {"success": "delete group success"})
    status, refused = await server.call("DELETE", path)
    assert (status, refused["error"]["code"]) == (404, 1003)
    assert await server.call("GET", "/v1/groups") == (200, [])


async def test_what_the_operator_did_is_listed(server: Server) -> None:
    for name in ("Shop", "Club"):
        _, made = await server.call("POST", "/v1/app", {"name": name})
    _, page = await server.call("GET", "/v1/audit")
    newest = page["entries"][0]
    assert (newest["subject"], newest["app_key"]) == (f"{made['app_key']} Club", made["app_key"])
    assert {(entry["actor"], entry["address"], entry["action"]) for entry in page["entries"]} == {
        ("admin", "127.0.0.1", "app.create")
    }
    _, one = await server.call("GET", f"/v1/audit?app={made['app_key']}&limit=5")
    assert (one["entries"], one["before"]) == (page["entries"][:1], 0)
    for query, code in (("limit=0", 1003), ("before=x", 1003), ("app=nope", 1008)):
        _, refused = await server.call("GET", f"/v1/audit?{query}")
        assert refused["error"]["code"] == code


async def test_who_has_no_admin_key_is_not_recorded(server: Server) -> None:
    wrong = {"Authorization": "Bearer wrong-key-wrong-key"}
    status, _ = await server.call("POST", "/v1/app", {"name": "Shop"}, headers=wrong)
    assert status == 401
    assert (await server.call("GET", "/v1/audit"))[1]["entries"] == []


async def test_the_longest_list_of_access_rules_is_taken(server: Server) -> None:
    _, made = await server.call("POST", "/v1/app", {"name": "Shop"})
    path = f"/v1/apps/{made['app_key']}/access"
    rules = [{"deny": "subscribe", "topic": "ü" * 512, "who": "publishers"}] * MAX_RULES
    assert await server.call("PUT", path, rules) == (200, rules)


REFUSED = [
    ("POST", "/v1/app", b"{", 400, 1003),
    ("POST", "/v1/app", b"{}", 400, 1003),
    ("POST", "/v1/app", b'{"name": 5}', 400, 1003),
    ("POST", "/v1/app", b'{"name": "\xff"}', 400, 1003),
    ("POST", "/v1/app", b'{"name": "\\ud800"}', 400, 1003),
    ("PUT", "/v1/apps/none/access", b"[" * 3000, 400, 1003),
    ("PUT", "/v1/apps/none/settings", b'{"limits": {"max_ids": 1%s}}' % (b"0" * 30), 400, 1003),
    ("PUT", "/v1/apps/none/settings", b'{"limits": %s}' % (b"[" * 3000), 400, 1003),
    ("POST", "/v1/groups", b'{"name": "a", "apps": [1%s]}' % (b"0" * 30), 400, 1003),
    ("POST", "/v1/app", b'{"name": "a", "opne": true}', 400, 1003),
    ("POST", "/v1/app", b'{"name": "a\\nb"}', 400, 1003),
    ("POST", "/v1/app", orjson.dumps({"name": "a" * 201}), 400, 1003),
    ("POST", "/v1/app", b" " * 530_000, 413, 1003),
    ("POST", "/v1/app/none/rotate-secret", b"", 404, 1008),
    ("POST", "/v1/app/none/delete", b"", 404, 1008),
    ("POST", "/v1/app/none/device-token", b'{"registration_id": "a"}', 404, 1008),
    ("GET", "/v1/apps/none/access", b"", 404, 1008),
    ("PUT", "/v1/apps/none/access", b"[]", 404, 1008),
    ("PUT", "/v1/apps/none/access", b"", 400, 1003),
    ("PUT", "/v1/apps/none/access", b'[{"allow": "all", "topic": "a#", "who": "everyone"}]', 400, 1003),
    ("POST", "/v1/apps/none/access", b"[]", 405, 1001),
    ("GET", "/v1/app", b"", 405, 1001),
    ("GET", "/v1/nothing", b"", 404, 1003),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "code"), REFUSED)
async def test_a_wrong_call_is_answered_with_a_code(
    server: Server, method: str, path: str, body: bytes, status: int, code: int
) -> None:
    answered, content = await server.call(method, path, data=body)
    assert (answered, content["error"]["code"]) == (status, code)


@pytest.mark.parametrize("registration_id", ["", "a" * 65, "a\n"])
async def test_a_wrong_registration_id_is_refused(server: Server, registration_id: str) -> None:
    _, made = await server.call("POST", "/v1/app", {"name": "Shop"})
    path = f"/v1/app/{made['app_key']}/device-token"
    assert (await server.call("POST", path, {"registration_id": registration_id}))[0] == 400


# The key


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer wrong", "Basic !", "Basic " + b64encode(b"a:b").decode()]
)
async def test_without_the_key_nothing_is_done(server: Server, header: str) -> None:
    status, content = await server.call("POST", "/v1/app", {"name": "x"}, headers={"Authorization": header})
    assert (status, content["error"]["code"]) == (401, 1004)
    assert await server.store.list_apps() == []


async def test_the_key_is_also_a_basic_password(server: Server, tmp_path: Path) -> None:
    found = read_admin_file(tmp_path)
    assert found is not None
    header = "Basic " + b64encode(f"admin:{found.key}".encode()).decode()
    assert (await server.call("GET", "/v1/apps", headers={"Authorization": header}))[0] == 200


async def test_the_file_names_key_and_address_for_the_owner_only(server: Server, tmp_path: Path) -> None:
    found = read_admin_file(tmp_path)
    assert found is not None
    assert found.address == server.listener.address
    assert stat.S_IMODE((tmp_path / "admin.json").stat().st_mode) == 0o600
    await server.listener.close()
    assert read_admin_file(tmp_path) == AdminFile(found.key)


def test_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "admin.json").write_text("{")
    with pytest.raises(ValueError, match="delete it to get a new admin key"):
        read_admin_file(tmp_path)


def test_a_draft_left_by_a_crash_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "admin.new").write_text("half")
    write_admin_file(tmp_path, AdminFile("k" * 16))
    assert read_admin_file(tmp_path) == AdminFile("k" * 16)


# Metrics and health


async def _get(server: Server, path: str, **headers: str) -> tuple[int, str, bytes]:
    url = server.listener.address + path
    async with aiohttp.ClientSession(headers=headers) as anybody, anybody.get(url) as response:
        return response.status, response.headers["Content-Type"], await response.read()


async def test_metrics_need_no_key_and_speak_both_formats(server: Server) -> None:
    await server.apps.create("Shop")
    status, content_type, body = await _get(server, "/metrics")
    assert (status, content_type.split(";")[0]) == (200, "text/plain")
    assert b"holdfast_store_commit_seconds_count 1.0" in body
    _, content_type, body = await _get(
        server, "/metrics", Accept="application/openmetrics-text; version=1.0.0"
    )
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool: apt-get install prometheus")
async def test_promtool_finds_nothing_wrong_with_a_scrape(server: Server) -> None:
    _, _, body = await _get(server, "/metrics")
    promtool = await asyncio.create_subprocess_exec(
        "promtool", "check", "metrics", stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert ((await promtool.communicate(body))[1], promtool.returncode) == (b"", 0)


async def test_readiness_follows_the_state_and_the_store(server: Server) -> None:
    assert (await _get(server, "/healthz"))[0] == 200
    status, _, body = await _get(server, "/readyz")
    assert (status, orjson.loads(body)) == (503, {"ready": False, "reasons": ["starting"]})
    server.health.state = "ready"
    assert (await _get(server, "/readyz"))[0] == 200
    server.store.stats.failed_commits += 1
    server.health.state = "draining"
    status, _, body = await _get(server, "/readyz")
    assert (status, orjson.loads(body)["reasons"]) == (503, ["draining", "the store refuses writes"])
    server.health.state = "ready"
    await server.apps.create("Shop")
    assert (await _get(server, "/readyz"))[0] == 200


# Logs


@pytest.fixture
def lines() -> Any:
    """Sets up logs of a form and gives what they wrote."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers[:] = []
    streams = []

    def set_up(form: Any, level: str = "info") -> Callable[[], list[str]]:
        stream = io.StringIO()
        streams.append(stream)
        set_up_logs(form, level, stream)
        return lambda: stream.getvalue().splitlines()

    yield set_up
    root.handlers[:], root.level = before


LOG = logging.getLogger("gateway.node")
EVIL = 'x\n2026-01-01T00:00:00.000Z INFO broker app deleted app="1"\r\x1b[2J\u2028'


def test_an_event_is_one_line_of_text(lines: Any) -> None:
    read = lines("text")
    log_event(LOG, logging.INFO, "device connected", app="ab12", device="phone 1", version=5, none=None)
    [line] = read()
    _, rest = line.split(" ", 1)
    assert rest == 'INFO gateway.node device connected app=ab12 device="phone 1" version=5 none=None'
    assert line[10] == "T"
    assert line.split(" ")[0].endswith("Z")


def test_an_event_is_one_object(lines: Any) -> None:
    read = lines("json")
    log_event(LOG, logging.WARNING, "refused", reason=EVIL, wait=0.5, big=2**70, odd="\ud800")
    [line] = read()
    entry = orjson.loads(line)
    del entry["time"]
    assert entry == {
        "level": "warning",
        "logger": "gateway.node",
        "event": "refused",
        "reason": EVIL,
        "wait": 0.5,
        "big": str(2**70),
        "odd": "\\ud800",
    }


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_value_and_no_exception_can_forge_a_line(lines: Any, form: str) -> None:
    read = lines(form)
    log_event(LOG, logging.INFO, "refused", device=EVIL)
    LOG.error("library says %s", EVIL)
    try:
        raise ValueError(EVIL)
    except ValueError:
        LOG.exception("failed")
    starts = [line for line in read() if not line.startswith("    | ")]
    assert len(starts) == 3
    assert not any("\x1b" in line or "\r" in line for line in read())


def test_long_values_are_cut_and_secrets_hidden(lines: Any) -> None:
    read = lines("json")
    log_event(LOG, logging.INFO, "x", device="d" * 70_000, token="abc", password="p", payload=b"body")
    entry = orjson.loads(read()[0])
    assert len(entry["device"]) == VALUE_LIMIT + 1
    assert (entry["token"], entry["password"], entry["payload"]) == ("(hidden)",) * 3


def test_quotes_and_backslashes_can_be_read_back(lines: Any) -> None:
    read = lines("text")
    log_event(LOG, logging.INFO, "x", a='say "hi" \\', b="")
    assert read()[0].endswith('x a="say \\"hi\\" \\\\" b=""')


def test_levels_below_the_set_one_cost_nothing_and_say_nothing(lines: Any) -> None:
    read = lines("text")
    log_event(LOG, logging.DEBUG, "packet")
    assert read() == []


async def test_nothing_is_inflated_for_anybody(server: Server, inflated: list[str]) -> None:
    """aiohttp reads the rest of a refused body, for up to ten seconds."""
    bomb = io.BytesIO(gzip.compress(b" " * (200 << 20), 9))
    headers = {"Content-Encoding": "gzip", "Authorization": "Bearer wrong"}
    async with server.session.post("/v1/app", data=bomb, headers=headers) as answer:
        assert answer.status == 401
    assert (await server.call("GET", "/v1/apps"))[0] == 200
    assert inflated == []
