"""`holdfast config`, `app` and `device`: on a stopped server, and beside one that has the store open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click
import orjson
import pytest
from click.testing import CliRunner, Result

from broker.admin import AdminFile, AdminListener, Health, LocalActions, ProcessOverview, write_admin_file
from broker.broker import Broker
from broker.bus_local import LocalBus
from broker.command import app, audit, config, device, group, make_bus, make_store, node
from broker.config import load_config
from broker.metrics import LoopLag, Metrics
from broker.store_redis import RedisStore
from broker.tenants import tokens

COMMANDS: dict[str, click.Command] = {c.name or "": c for c in (app, audit, config, device, group, node)}


def _run(line: str, *more: str) -> Result:
    name, *words = line.split()
    return CliRunner().invoke(COMMANDS[name], [*words, *more])


def _answer(data_dir: Path, line: str) -> Any:
    done = _run(line, "--data-dir", str(data_dir))
    assert done.exit_code == 0, done.output
    return orjson.loads(done.stdout)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


# config


def test_check_says_ok(tmp_path: Path) -> None:
    file = tmp_path / "h.toml"
    file.write_text("[mqtt]\nport = 0\n")
    done = _run("config check", str(file))
    assert (done.exit_code, done.output) == (0, "ok\n")


def test_check_prints_every_mistake_and_fails(tmp_path: Path) -> None:
    file = tmp_path / "h.toml"
    file.write_text("[mqtt]\nprot = 0\nport = -1\n")
    done = _run("config check", str(file))
    assert done.exit_code == 1
    assert [line.split(": ")[0] for line in done.output.splitlines()] == [f"{file}:2", f"{file}:3"]


def test_show_prints_what_is_in_effect_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "h.toml"
    file.write_text("[mqtt]\nport = 11\n[http]\nport = 12\n")
    monkeypatch.setenv("HOLDFAST_HTTP_PORT", "13")
    monkeypatch.setenv("HOLDFAST_ADMIN_KEY", "0123456789abcdef")
    monkeypatch.setenv("HOLDFAST_CONFIG", str(file))
    done = _run("config show", "--admin-port", "14")
    assert done.exit_code == 0
    for line in ("port = 11", "port = 13", "port = 14", 'key = "(hidden)"'):
        assert line in done.output.splitlines()
    assert "0123456789abcdef" not in done.output


def test_a_wrong_setting_ends_any_command_with_status_2(tmp_path: Path) -> None:
    done = _run("config show", "--mqtts-port", "x")
    assert done.exit_code == 2
    assert "--mqtts-port (mqtt.tls_port) = 'x': must be a whole number from 0 to 65535" in done.output


def test_a_secret_is_no_flag() -> None:
    done = _run("config show", "--admin-key", "0123456789abcdef")
    assert done.exit_code == 2
    assert "No such option" in done.output


def test_sample_is_a_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "h.toml"
    file.write_text(_run("config sample").stdout)
    assert _run("config check", str(file)).output == "ok\n"


# A stopped server


def test_apps_of_a_stopped_server(data_dir: Path) -> None:
    made = _answer(data_dir, "app create Shop --open")
    assert (made["name"], made["open"]) == ("Shop", True)
    rotated = _answer(data_dir, f"app rotate-secret {made['app_key']}")
    assert rotated["master_secret"] != made["master_secret"]
    assert _answer(data_dir, "app list") == [rotated]
    _answer(data_dir, f"app delete {made['app_key']}")
    assert _answer(data_dir, "app list") == []


def test_tokens_of_a_stopped_server(data_dir: Path) -> None:
    made = _answer(data_dir, "app create Shop")
    first = _answer(data_dir, f"device token phone-1 --app {made['app_key']}")
    again = _answer(data_dir, f"device token phone-1 --app {made['app_key']}")
    other = _answer(data_dir, f"device token phone-2 --app {made['app_key']}")
    assert len(first["token"]) == len(other["token"]) == tokens.LENGTH
    assert first["registration_id"] == again["registration_id"] == "phone-1"


RULES = [
    {"deny": "all", "topic": "secret/#", "who": "devices"},
    {"allow": "all", "topic": "ü/{registration_id}", "who": "everyone"},
]


def _set_access(data_dir: Path, key: str, content: bytes, source: str = "-") -> Result:
    words = ["access", key, "--set", source, "--data-dir", str(data_dir)]
    return CliRunner().invoke(app, words, input=content)


def test_access_rules_of_a_stopped_server(data_dir: Path, tmp_path: Path) -> None:
    key = _answer(data_dir, "app create Shop")["app_key"]
    assert _answer(data_dir, f"app access {key}") == []
    done = _set_access(data_dir, key, orjson.dumps(RULES))
    assert (done.exit_code, orjson.loads(done.stdout)) == (0, RULES)
    assert _answer(data_dir, f"app access {key}") == RULES
    file = tmp_path / "rules.json"
    file.write_text("[]")
    assert _set_access(data_dir, key, b"", str(file)).exit_code == 0
    assert _answer(data_dir, f"app access {key}") == []


WRONG_RULES = [
    (b"[", "Error: the access rules are not valid JSON: "),
    (b"null", "Error: access rules = None: must be a list"),
    (b"[5]", "Error: rule 0 = 5: must be an object"),
]


@pytest.mark.parametrize(("content", "message"), WRONG_RULES)
def test_wrong_access_rules_are_refused_with_the_reason(data_dir: Path, content: bytes, message: str) -> None:
    key = _answer(data_dir, "app create Shop")["app_key"]
    done = _set_access(data_dir, key, content)
    assert (done.exit_code, done.output[: len(message)]) == (1, message)


def _set_settings(data_dir: Path, key: str, content: bytes) -> Result:
    return CliRunner().invoke(
        app, ["settings", key, "--set", "-", "--data-dir", str(data_dir)], input=content
    )


def test_settings_of_a_stopped_server(data_dir: Path) -> None:
    key = _answer(data_dir, "app create Shop")["app_key"]
    before = _answer(data_dir, f"app settings {key}")
    assert before["limits"] == {}
    done = _set_settings(data_dir, key, b'{"limits": {"daily_pushes": 5}, "restricted": true}')
    assert (done.exit_code, orjson.loads(done.stdout)["limits"]) == (0, {"daily_pushes": 5})
    assert _answer(data_dir, f"app settings {key}")["restricted"] is True
    for content, message in (
        (b"[", "Error: the settings are not valid JSON: "),
        (b'{"restricted": 1}', "Error: restricted: expected bool"),
        (b'{"limits": {"x": 1}}', "Error: limits.x: there is no such limit"),
    ):
        refused = _set_settings(data_dir, key, content)
        assert (refused.exit_code, refused.output[: len(message)]) == (1, message)


def test_groups_of_a_stopped_server(data_dir: Path) -> None:
    shop, club = (_answer(data_dir, f"app create {name}")["app_key"] for name in ("Shop", "Club"))
    made = _answer(data_dir, f"group create all --app {shop} --app {club}")
    key = made["group_key"]
    assert (made["name"], made["apps"]) == ("all", [shop, club])
    assert _answer(data_dir, "group list") == [made]
    assert _answer(data_dir, f"group change {key} --app {shop}") == made | {"apps": [shop]}
    assert _answer(data_dir, f"group change {key} --name one") == made | {"apps": [shop], "name": "one"}
    _answer(data_dir, f"group delete {key}")
    assert _answer(data_dir, "group list") == []
    done = _run(f"group create all --app nope --data-dir {data_dir}")
    assert (done.exit_code, done.output) == (1, "Error: apps: there is no app nope\n")


def test_the_audit_log_of_a_stopped_server(data_dir: Path) -> None:
    shop, club = (_answer(data_dir, f"app create {name}")["app_key"] for name in ("Shop", "Club"))
    _answer(data_dir, f"app rotate-secret {shop}")
    entries = _answer(data_dir, "audit")["entries"]
    assert [(entry["action"], entry["app_key"]) for entry in entries] == [
        ("app.rotate_secret", shop),
        ("app.create", club),
        ("app.create", shop),
    ]
    assert {entry["actor"] for entry in entries} == {"local"}
    page = _answer(data_dir, f"audit --app {shop} --limit 1")
    assert page["entries"] == entries[:1]
    assert _answer(data_dir, f"audit --app {shop} --before {page['before']}")["entries"] == entries[2:]


def test_an_unknown_app_is_said(data_dir: Path) -> None:
    _answer(data_dir, "app create Shop")
    done = _run("app delete nope", "--data-dir", str(data_dir))
    assert (done.exit_code, done.output) == (1, "Error: there is no app nope\n")


def test_a_misspelt_data_directory_is_not_created(data_dir: Path) -> None:
    done = _run("app list", "--data-dir", str(data_dir))
    assert done.exit_code == 1
    assert f"there is no data directory {data_dir}" in done.output
    assert not data_dir.exists()


def test_a_data_directory_that_cannot_be_written_is_said(data_dir: Path) -> None:
    (data_dir / "holdfast.lock").mkdir(parents=True)  # unlike permissions, this stops root too
    done = _run("app list", "--data-dir", str(data_dir))
    assert done.exit_code == 1
    assert f"cannot write in the data directory {data_dir}" in done.output


# A running server


@pytest.fixture
async def running(data_dir: Path) -> AsyncIterator[Path]:
    """What of a server matters here: it has the store open, and its admin listener is up."""
    settings = load_config(None, None, {"server.data_dir": str(data_dir), "admin.port": "0"})
    store, bus, metrics = make_store(settings), LocalBus(), Metrics()
    await store.open()
    lag = LoopLag(metrics)
    actions = LocalActions(Broker(store, bus), settings.push.offline_limit)
    listener = AdminListener(settings, actions, ProcessOverview(metrics, Health(), lag))
    await listener.open()
    yield data_dir
    await listener.close()
    lag.close()
    await store.close()


async def test_apps_and_tokens_of_a_running_server(running: Path) -> None:
    made = await asyncio.to_thread(_answer, running, "app create Shop")
    key = made["app_key"]
    issued = await asyncio.to_thread(_answer, running, f"device token phone-1 --app {key}")
    assert issued["registration_id"] == "phone-1"
    rotated = await asyncio.to_thread(_answer, running, f"app rotate-secret {key}")
    assert await asyncio.to_thread(_answer, running, "app list") == [rotated]
    done = await asyncio.to_thread(_set_access, running, key, orjson.dumps(RULES))
    assert (done.exit_code, orjson.loads(done.stdout)) == (0, RULES)
    assert await asyncio.to_thread(_answer, running, f"app access {key}") == RULES
    for content in (b"[5]", b"null"):
        refused = await asyncio.to_thread(_set_access, running, key, content)
        assert (refused.exit_code, refused.output.split(":")[0]) == (1, "Error")
    assert await asyncio.to_thread(_answer, running, f"app access {key}") == RULES
    await asyncio.to_thread(_answer, running, f"app delete {key}")
    assert await asyncio.to_thread(_answer, running, "app list") == []


async def test_settings_groups_and_the_audit_log_of_a_running_server(running: Path) -> None:
    key = (await asyncio.to_thread(_answer, running, "app create Shop"))["app_key"]
    done = await asyncio.to_thread(_set_settings, running, key, b'{"restricted": true}')
    assert (done.exit_code, orjson.loads(done.stdout)["restricted"]) == (0, True)
    shown = await asyncio.to_thread(_answer, running, f"app settings {key}")
    assert shown["restricted"] is True
    refused = await asyncio.to_thread(_set_settings, running, key, b'{"limits": {"x": 1}}')
    assert (refused.exit_code, refused.output.split(":")[1]) == (1, " limits.x")
    made = await asyncio.to_thread(_answer, running, f"group create all --app {key}")
    path = made["group_key"]
    renamed = await asyncio.to_thread(_answer, running, f"group change {path} --name one")
    assert await asyncio.to_thread(_answer, running, "group list") == [renamed] == [made | {"name": "one"}]
    await asyncio.to_thread(_answer, running, f"group delete {path}")
    entries = (await asyncio.to_thread(_answer, running, "audit --limit 50"))["entries"]
    assert {entry["actor"] for entry in entries} == {"admin"}
    assert [entry["action"] for entry in entries] == [
        "group.delete",
        "group.change",
        "group.create",
        "app.set_settings",
        "app.set_settings",
        "app.create",
    ]
    assert (await asyncio.to_thread(_answer, running, f"audit --app {key}"))["entries"][-1] == entries[-1]


async def test_devices_are_found_and_nodes_told_by_a_running_server(running: Path) -> None:
    key = (await asyncio.to_thread(_answer, running, "app create Shop"))["app_key"]
    await asyncio.to_thread(_answer, running, f"device token phone-1 --app {key}")
    found = await asyncio.to_thread(_answer, running, f"device find phone-1 --app {key}")
    assert found == {
        "registration_id": "phone-1",
        "online": False,
        "node": None,
        "epoch": 0,
        "seen_at": None,
        "waiting": 0,
    }
    missing = await asyncio.to_thread(_run, f"device find phone-2 --app {key}", "--data-dir", str(running))
    assert (missing.exit_code, missing.output) == (1, "Error: there is no device phone-2\n")
    assert await asyncio.to_thread(_answer, running, "node list --json") == []
    for line in ("node drain a/b", "node drain x --share 0.5", "node resume x"):
        done = await asyncio.to_thread(_run, line, "--data-dir", str(running))
        assert (done.exit_code, done.output) == (1, f"Error: there is no live node {line.split()[2]}\n")


async def test_the_running_server_says_why_not(running: Path) -> None:
    odd = "../../v1/apps?x=#/"
    done = await asyncio.to_thread(_run, f"app delete {odd}", "--data-dir", str(running))
    assert (done.exit_code, done.output) == (1, f"Error: there is no app {odd}\n")


async def test_a_locked_store_without_a_server_that_answers_is_said(data_dir: Path) -> None:
    store = make_store(load_config(None, None, {"server.data_dir": str(data_dir)}))
    await store.open()
    free = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = free.sockets[0].getsockname()[1]
    free.close()
    await free.wait_closed()
    for address, expected in (
        (None, "in use by another server"),
        (f"http://127.0.0.1:{port}", "does not answer"),
    ):
        write_admin_file(data_dir, AdminFile("k" * 16, address))
        done = await asyncio.to_thread(_run, "app list", "--data-dir", str(data_dir))
        assert done.exit_code == 1
        assert expected in done.output
    await store.close()


def test_a_file_left_by_a_killed_server_is_in_nobodys_way(data_dir: Path) -> None:
    data_dir.mkdir()
    write_admin_file(data_dir, AdminFile("k" * 16, "http://127.0.0.1:9"))
    assert _answer(data_dir, "app list") == []


# A fleet: on its Redis, beside whatever runs


def test_a_redis_that_is_away_is_said_without_its_password(data_dir: Path) -> None:
    done = _run("app list", "--store", "redis://:hush@127.0.0.1:1", "--data-dir", str(data_dir))
    assert done.exit_code == 1
    assert "127.0.0.1:1" in done.output
    assert "hush" not in done.output
    assert not data_dir.exists()


def test_settings_choose_the_store_and_its_bus(data_dir: Path) -> None:
    embedded = load_config(None, None, {"server.data_dir": str(data_dir)})
    assert isinstance(make_bus(embedded, make_store(embedded)), LocalBus)
    shared = load_config(None, None, {"store.url": "redis://127.0.0.1:1", "store.replicas": "2"})
    store = make_store(shared)
    assert isinstance(store, RedisStore)
    assert make_bus(shared, store) is store.bus
    assert store.engine.replicas == 2
