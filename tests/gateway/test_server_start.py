"""What a start does before anybody can connect: the app for those without credentials, and the node's settings."""

from __future__ import annotations

import os
import socket
from dataclasses import fields
from pathlib import Path

import pytest

from broker.config import Config, load_config
from broker.store_sqlite import SqliteStore
from gateway.mailbox import MailboxLimits
from gateway.node import NodeSettings
from gateway.open_apps import StartError, check_anonymous
from gateway.ports import hold_ports, release_ports, settle_ports
from gateway.server import (
    SPARE_FILES,
    Listening,
    Service,
    _node_settings,
    _within_files,
    raise_file_limit,
)

ANY_PORT = {f"{key}": "0" for key in ("mqtt.port", "mqtt.ws_port", "http.port", "admin.port")}


@pytest.fixture(autouse=True)
def _interpreter_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.server.tune_interpreter", lambda _: None)


async def _started(directory: Path, **mqtt: str) -> tuple[Listening, str | None, dict[str, object]]:
    """Where it listened, the app its node was told, and the line that `serve` prints."""
    flags = {"server.data_dir": str(directory), **ANY_PORT}
    config = load_config(None, None, flags | {f"mqtt.{key}": value for key, value in mqtt.items()})
    service = Service(config)
    try:
        listening = await service.open()
        return listening, service.node.settings.anonymous_app, listening.as_json(config)
    finally:
        await service.close()


async def _apps(directory: Path) -> list[tuple[str, bool]]:
    store = SqliteStore(directory / "holdfast.db")
    await store.open()
    apps = await store.list_apps()
    await store.close()
    return [(app.name, app.open) for app in apps]


async def test_there_is_no_anonymous_app_unless_it_is_asked_for(tmp_path: Path) -> None:
    listening, told, line = await _started(tmp_path)
    assert (listening.anonymous_app, told, line["anonymous_app"]) == (None, None, None)
    assert await _apps(tmp_path) == [("demo", True)]


async def test_the_anonymous_app_is_made_once_and_found_again(tmp_path: Path) -> None:
    keys = set()
    for _ in range(2):
        listening, told, line = await _started(tmp_path, anonymous_app="lab")
        app = listening.anonymous_app
        assert app is not None
        assert (app.name, app.open, app.key) == ("lab", True, told)
        assert isinstance(line["anonymous_app"], dict)
        assert line["anonymous_app"]["app_key"] == told
        keys.add(told)
    assert len(keys) == 1
    assert await _apps(tmp_path) == [("demo", True), ("lab", True)]


async def test_an_app_that_is_not_open_never_takes_in_strangers(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "holdfast.db")
    await store.open()
    closed = await store.create_app("lab")
    for n in range(1000):  # the page of apps is full of others
        await store.create_app(f"app {n}")
    wanted = await store.create_app("lab", open=True)
    await store.close()
    _, told, _ = await _started(tmp_path, anonymous_app="lab")
    assert told == wanted.key != closed.key


OUTSIDE = {"server.host": "0.0.0.0", "mqtt.anonymous_app": "lab"}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"server.host": "0.0.0.0"},
        {"mqtt.anonymous_app": "lab"},
        {"mqtt.anonymous_app": "lab", "server.host": "::1"},
        OUTSIDE | {"mqtt.anonymous_anywhere": "true"},
        OUTSIDE | {"mqtt.anonymous_app": "off"},
    ],
)
def test_who_may_reach_the_anonymous_app_is_this_machine_or_said_so(flags: dict[str, str]) -> None:
    check_anonymous(load_config(None, None, flags))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "push.example.org"])
async def test_an_anonymous_app_in_reach_of_others_is_refused_with_what_to_do(
    tmp_path: Path, host: str
) -> None:
    directory = tmp_path / "data"
    flags = OUTSIDE | {"server.host": host, "server.data_dir": str(directory)}
    service = Service(load_config(None, None, flags))
    with pytest.raises(StartError) as refused:
        await service.open()
    await service.close()
    for part in ("mqtt.anonymous_app = 'lab'", f"server.host = '{host}'", "mqtt.anonymous_anywhere to true"):
        assert part in str(refused.value)
    assert not directory.exists()


def test_every_setting_of_the_node_comes_from_the_configuration() -> None:
    """Each is a number of its own, and arrives."""
    mqtt = {
        "connect_timeout": "11",
        "max_packet_size": "2001",
        "max_connections": "2002",
        "max_connecting": "2003",
        "keep_alive_max": "2004",
        "keep_alive_min": "12",
        "session_expiry_max": "2005",
        "max_inflight": "13",
        "receive_maximum": "14",
        "max_retained": "2006",
        "max_retained_bytes": "2007",
        "max_sessions": "2008",
        "max_topic_length": "2009",
        "max_topic_levels": "15",
        "topic_alias_maximum": "17",
        "sys_interval": "18",
        "max_subscriptions": "19",
        "max_queued": "20",
        "max_queued_bytes": "2010",
    }
    settings = _node_settings(load_config(None, None, {f"mqtt.{key}": value for key, value in mqtt.items()}))
    assert settings.mailbox == MailboxLimits(19, 20, 2010)
    same = {field.name for field in fields(NodeSettings)} & mqtt.keys()
    assert {name: str(getattr(settings, name)).removesuffix(".0") for name in same} == {
        name: mqtt[name] for name in same
    }
    assert settings.window == 13
    assert mqtt.keys() - same == {"max_inflight", "max_subscriptions", "max_queued", "max_queued_bytes"}


def test_the_defaults_of_node_and_configuration_are_the_same() -> None:
    assert _node_settings(Config()) == NodeSettings(node_id=Config().server.node_id)


# Files and connections


def _limited(monkeypatch: pytest.MonkeyPatch, files: int) -> list[int]:
    """The process's limits, as they are set."""
    limits = [files // 4, files]
    monkeypatch.setattr("resource.getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr("resource.setrlimit", lambda _, wanted: limits.__setitem__(slice(None), wanted))
    return limits


def test_the_limit_of_open_files_is_raised_to_what_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = _limited(monkeypatch, 20_000)
    assert raise_file_limit() == 20_000
    assert limits == [20_000, 20_000]


FILES = [
    ({}, 2_000_000, 1_000_000),
    ({}, 20_000, 20_000 - 4096 - SPARE_FILES),
    ({}, 4096, 2048),  # half, where the HTTP API could take them all
    ({"store.url": "redis://r", "server.role": "gateway"}, 20_000, 20_000 - SPARE_FILES),
    ({"mqtt.max_connections": "500"}, 20_000, 500),
]


@pytest.mark.parametrize(("flags", "files", "expected"), FILES)
def test_no_more_connections_than_there_are_files_for(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, str], files: int, expected: int
) -> None:
    _limited(monkeypatch, files)
    raise_file_limit()
    config = load_config(None, None, flags)
    assert _within_files(_node_settings(config), config).max_connections == expected


# Ports of workers


def _config(**flags: str) -> Config:
    return load_config(None, None, ANY_PORT | {key.replace("__", "."): value for key, value in flags.items()})


def test_ports_are_held_by_number_and_nobody_else_gets_them() -> None:
    config = _config(mqtt__ws_port="off")
    ports = hold_ports(config, {})
    try:
        assert set(ports) == {"mqtt", "http", "admin"}
        settled = settle_ports(config, ports)
        assert settled.mqtt.ws_port is None
        numbers = {settled.mqtt.port, settled.http.port, settled.admin.port}
        assert 0 not in numbers
        assert len(numbers) == 3
        with pytest.raises(OSError, match="another process listens there"):
            hold_ports(settled, {})
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", settled.mqtt.port))
    finally:
        release_ports(ports)


def test_the_next_program_keeps_the_ports_that_it_still_wants() -> None:
    before = hold_ports(_config(), {})
    after = hold_ports(_config(mqtt__ws_port="off", server__host="127.0.0.2"), before)
    try:
        assert after["admin"] == before["admin"]
        assert after["mqtt"] != before["mqtt"]
        assert "ws" not in after
        for name in ("mqtt", "ws", "http"):
            with pytest.raises(OSError, match="Bad file"):
                os.fstat(before[name].files[0])
    finally:
        release_ports(after)


def test_where_one_port_is_taken_none_is_held_and_the_former_stay() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        before = hold_ports(_config(), {})
        files = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match=f":{taken.getsockname()[1]}: another"):
            hold_ports(_config(http__port=str(taken.getsockname()[1]), server__host="127.0.0.1"), before)
        assert len(os.listdir("/proc/self/fd")) == files
        release_ports(before)


def test_each_role_holds_what_it_serves() -> None:
    for role, names in (("gateway", {"mqtt", "ws", "admin"}), ("broker", {"http", "admin"})):
        ports = hold_ports(_config(store__url="redis://r", server__role=role), {})
        release_ports(ports)
        assert set(ports) == names
