from __future__ import annotations

import os
from pathlib import Path

import pytest

from broker.config import (
    KEYS,
    Config,
    ConfigError,
    format_config,
    hide_password,
    is_loopback,
    load_config,
    sample_config,
)
from broker.limits import Limits


def _errors(
    file: Path | None = None, environ: dict[str, str] | None = None, flags: dict[str, str] | None = None
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(file, environ, flags)
    return caught.value.errors


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "holdfast.toml"


def test_nothing_configured_is_the_defaults() -> None:
    assert load_config() == Config()


def test_the_sample_file_is_up_to_date_and_changes_nothing() -> None:
    sample = Path("configs/holdfast.toml")
    assert sample.read_text() == sample_config(), "run: holdfast config sample > configs/holdfast.toml"
    assert load_config(sample) == Config()


def test_the_sample_with_every_line_uncommented_is_the_defaults(file: Path) -> None:
    lines = [
        line[1:] if line[:2] not in ("# ", "") and line[0] == "#" else line
        for line in sample_config().split("\n")
    ]
    file.write_text("\n".join(lines))
    assert load_config(file) == Config()


def test_variables_win_over_the_file_and_flags_over_both(file: Path) -> None:
    file.write_text("[mqtt]\nport = 1\nws_port = 2\n[http]\nport = 3\n")
    environ = {"HOLDFAST_MQTT_WS_PORT": "20", "HOLDFAST_HTTP_PORT": "30"}
    config = load_config(file, environ, {"http.port": "300"})
    assert (config.mqtt.port, config.mqtt.ws_port, config.http.port) == (1, 20, 300)


@pytest.mark.parametrize("path", KEYS)
def test_every_key_is_read_from_each_place(file: Path, path: str) -> None:
    key = KEYS[path]
    text = {
        "mqtt.tls_port": "7",
        "server.log_level": "debug",
        "server.log_format": "json",
        "server.role": "broker",
        "server.workers": "7",
        "server.brokers": "0",
        "server.advertise": "push.example.com:1883",
        "store.url": "redis://127.0.0.1",
        "store.unsafe": "true",
        "server.demo_app": "false",
        "mqtt.anonymous_anywhere": "false",
        "http.https_only": "false",
        "http.trusted_proxies": "10.0.0.0/8, ::1",
        "callbacks.private_addresses": "false",
        "bridge.tls": "false",
        "bridge.protocol": "3.1.1",
        "mqtt.keep_alive_min": "7",
        "mqtt.ws_origins": "https://app.example.com, null",
        "push.default_ttl": "7",
        "push.max_ttl": "90000",
        "push.schedule_zone": "Asia/Tokyo",
        "store.time_zone": "Asia/Tokyo",
        "admin.key": "0123456789abcdef",
    }.get(path, "4096")
    expected: object = Path(text) if "path" in key.allowed else text
    if "number" in key.allowed:
        expected = int(text)
    elif "true" in key.allowed:
        expected = text == "true"
    pair = {"mqtt.certificate": "c.pem", "mqtt.private_key": "k.pem", "store.url": "redis://127.0.0.1"}
    pair.pop(path, None)
    if path == "bridge.host":
        rules = file.with_name("rules.toml")
        rules.write_text('[[rule]]\ntopic = "push"\napp = "x"\npayload = "push"\n')
        pair["bridge.rules"] = str(rules)
    file.write_text(
        f"[{key.section}]\n{key.name} = {text if not isinstance(expected, str | Path) else repr(text)}\n"
    )
    read = [load_config(file, None, pair), load_config(None, None, {path: text, **pair})]
    read += [load_config(None, {variable: text}, pair) for variable in key.variables]
    for config in read:
        assert getattr(getattr(config, key.section), key.name) == expected


ROWS = [
    ("[mqtt]\nprot = 1", ":2: mqtt.prot: unknown key; did you mean mqtt.port?"),
    ("[mqttt]\nport = 1", ":1: unknown section [mqttt]; did you mean mqtt?"),
    ("mqtt = 1", ":1: mqtt = 1: must be a section, [mqtt]"),
    (
        "# a\n\n[mqtt]\nport = 70000",
        ':4: mqtt.port = 70000: must be a whole number from 0 to 65535, or "off"',
    ),
    ("mqtt.port = -1", ':1: mqtt.port = -1: must be a whole number from 0 to 65535, or "off"'),
    ("[mqtt]\nport = '1'", ":2: mqtt.port = '1': must be a whole number from 0 to 65535, or \"off\""),
    ("[http]\nport = true", ":2: http.port = True: must be a whole number from 0 to 65535"),
    ("[http]\nport = 'off'", ":2: http.port = 'off': must be a whole number from 0 to 65535"),
    ("[server]\nlog_format = 'xml'", ":2: server.log_format = 'xml': must be one of json, text"),
    ("[server]\ndrain_limit = 0", ":2: server.drain_limit = 0: must be a number above 0"),
    ("[server]\ndrain_limit = inf", ":2: server.drain_limit = inf: must be a number above 0"),
    ("[server]\ndrain_limit = nan", ":2: server.drain_limit = nan: must be a number above 0"),
    ("[server]\ndata_dir = ''", ":2: server.data_dir = '': must be a path"),
    (
        "[mqtt]\nanonymous_app = ''",
        ":2: mqtt.anonymous_app = '': must be text of at least 1 character, or \"off\"",
    ),
    ("[server]\nhost = 5", ":2: server.host = 5: must be text"),
    ("[admin]\nkey = 'short'", ':2: admin.key = (hidden): must be text of at least 16 characters, or "off"'),
    ("[mqtt", ": not valid TOML: "),
]


@pytest.mark.parametrize(("text", "expected"), ROWS, ids=[row[0] for row in ROWS])
def test_a_mistake_names_file_line_key_value_and_what_is_allowed(
    file: Path, text: str, expected: str
) -> None:
    file.write_text(text)
    [error] = _errors(file)
    assert error.startswith(f"{file}{expected}")


def test_every_mistake_is_named_not_only_the_first(file: Path) -> None:
    file.write_text("[mqtt]\nport = -1\n[htp]\n")
    assert len(_errors(file, {"HOLDFAST_HTTP_PORT": "x"}, {"admin.port": "y"})) == 4


def test_a_variable_that_is_no_key_names_the_nearest() -> None:
    [error] = _errors(environ={"HOLDFAST_MQTT_PROT": "1"})
    assert error == "environment: HOLDFAST_MQTT_PROT: unknown; did you mean HOLDFAST_MQTT_PORT?"


def test_a_wrong_variable_and_a_wrong_flag_are_named() -> None:
    [variable] = _errors(environ={"HOLDFAST_MQTTS_PORT": "tcp://10.0.0.1:1883"})
    assert variable.startswith(
        "environment: HOLDFAST_MQTTS_PORT (mqtt.tls_port) = 'tcp://10.0.0.1:1883': must be"
    )
    [flag] = _errors(flags={"mqtt.tls_port": "x"})
    assert flag.startswith("--mqtts-port (mqtt.tls_port) = 'x': must be")


def test_empty_variables_and_those_of_other_commands_are_left_alone() -> None:
    assert load_config(None, {"HOLDFAST_MQTT_PORT": "", "HOLDFAST_APP_KEY": "x", "HOME": "/"}) == Config()


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    [error] = _errors(tmp_path / name)
    assert error.startswith(f"{tmp_path / name}: cannot be read: ")


def test_a_file_that_is_not_utf8_is_named(file: Path) -> None:
    file.write_bytes(b"\xff")
    assert "cannot be read" in _errors(file)[0]


CONFLICTS = [
    ({"mqtt.certificate": "c"}, "mqtt.certificate and mqtt.private_key: must be set together"),
    ({"mqtt.tls_port": "0"}, "mqtt.tls_port = 0: needs mqtt.certificate and mqtt.private_key"),
    *(
        (
            {"mqtt.ws_origins": wrong},
            f"mqtt.ws_origins = {wrong!r}: must be same, any, or origins such as https://app.example.com "
            "with commas between",
        )
        for wrong in ("*", "any, https://a", "https://a/", "app.example.com", "")
    ),
    (
        {"mqtt.keep_alive_max": "9", "mqtt.keep_alive_min": "10"},
        "mqtt.keep_alive_min = 10: must be at most mqtt.keep_alive_max = 9",
    ),
    (
        {"push.schedule_zone": "Mars/Olympus"},
        "push.schedule_zone: 'Mars/Olympus' is no time zone, such as Europe/Berlin or UTC",
    ),
    ({"push.max_ttl": "1"}, "push.default_ttl = 86400: must be at most push.max_ttl = 1"),
    ({"store.time_zone": "Mars"}, "store.time_zone: 'Mars' is no time zone, such as Europe/Berlin or UTC"),
]


@pytest.mark.parametrize(("flags", "expected"), CONFLICTS)
def test_keys_that_do_not_go_together(flags: dict[str, str], expected: str) -> None:
    assert _errors(flags=flags) == [expected]


def test_off_turns_a_listener_off() -> None:
    assert load_config(None, {"HOLDFAST_WS_PORT": "off"}).mqtt.ws_port is None


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "push.example.org", "")),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
    assert load_config(None, None, {"server.host": host}).on_loopback is expected


def test_the_limits_of_the_public_api_are_the_defaults_unless_set() -> None:
    assert Config().limits() == Limits()
    assert load_config(None, None, {"push.fanout_limit": "5"}).limits() == Limits(fanout_limit=5)


def test_shown_settings_are_valid_and_hide_the_secret(file: Path) -> None:
    config = load_config(None, None, {"admin.key": "a-very-long-secret", "mqtt.port": "off"})
    shown = format_config(config)
    assert "a-very-long-secret" not in shown
    file.write_text(shown.replace("(hidden)", "a-very-long-secret"))
    assert load_config(file) == config


HTTP_ROWS = [
    ({"http.https_only": "true"}, "http.https_only = true: nobody could call; name the proxies"),
    (
        {"http.trusted_proxies": "10.0.0.1/8"},
        "http.trusted_proxies = '10.0.0.1/8': must be networks with commas",
    ),
    ({"http.trusted_proxies": "proxy.example"}, "http.trusted_proxies = 'proxy.example': must be networks"),
]


@pytest.mark.parametrize(("flags", "expected"), HTTP_ROWS)
def test_proxies_are_networks_and_https_needs_them(flags: dict[str, str], expected: str) -> None:
    [error] = _errors(flags=flags)
    assert error.startswith(expected)


def test_trusted_proxies_are_read() -> None:
    config = load_config(None, None, {"http.trusted_proxies": "10.0.0.0/8, ::1", "http.https_only": "true"})
    assert config.trusted_proxies == ("10.0.0.0/8", "::1/128")
    assert Config().trusted_proxies == ()


REDIS = {"store.url": "redis://r"}
FLEET_ROWS = [
    ({"server.role": "broker"}, "server.role = 'broker': needs a Redis"),
    ({"server.role": "gateway"}, "server.role = 'gateway': needs a Redis"),
    ({"server.workers": "2"}, "server.workers = 2: needs a Redis"),
    ({"server.workers": "1"}, "server.workers = 1: needs a Redis"),
    (REDIS | {"server.brokers": "1"}, "server.brokers = 1: needs server.workers"),
    (
        REDIS | {"server.brokers": "1", "server.workers": "2", "server.role": "gateway"},
        'server.brokers = 1: needs server.workers, and server.role = "all"',
    ),
    ({"server.workers": "auto"}, "server.workers = 'auto': needs a Redis"),
    ({"store.replicas": "1"}, "store.replicas = 1: needs a Redis"),
    ({"store.unsafe": "true"}, "store.unsafe = true: needs a Redis"),
    ({"store.url": "http://r"}, "store.url = 'http://r': a Redis URL has the form redis://"),
    ({"store.url": "redis://u:hush@r:x"}, "store.url = 'redis://u:***@r:x': 'r:x' is no host and port"),
    (
        REDIS | {"server.advertise": "push.example.com"},
        "server.advertise = 'push.example.com': must be host:port",
    ),
    (
        REDIS | {"server.role": "gateway", "mqtt.port": "off", "mqtt.ws_port": "off"},
        "server.role = 'gateway': needs mqtt.port, mqtt.tls_port or mqtt.ws_port",
    ),
    (
        {"server.workers": "-1"},
        "--workers (server.workers) = '-1': must be a whole number from 0 to 512, or \"auto\"",
    ),
    ({"server.workers": "many"}, "--workers (server.workers) = 'many': must be"),
    ({"server.role": "boss"}, "--role (server.role) = 'boss': must be one of"),
]


@pytest.mark.parametrize(("flags", "expected"), FLEET_ROWS)
def test_what_only_a_fleet_has_says_what_it_needs(flags: dict[str, str], expected: str) -> None:
    [error] = _errors(flags=flags)
    assert error.startswith(expected)


@pytest.mark.parametrize("more", [{"server.workers": "2"}, {"server.role": "gateway"}])
def test_the_bridge_is_in_one_process(tmp_path: Path, more: dict[str, str]) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\ntopic = "push"\napp = "x"\npayload = "push"\n')
    flags = REDIS | {"bridge.host": "mqtt", "bridge.rules": str(rules)}
    assert load_config(None, None, flags | {"server.role": "broker"}).bridge.host == "mqtt"
    [error] = _errors(flags=flags | more)
    assert error.startswith("bridge.host = 'mqtt': one process has the bridge")


def test_how_many_workers() -> None:
    assert [load_config(None, None, REDIS | {"server.workers": n}).workers for n in ("0", "7")] == [0, 7]
    assert load_config(None, None, REDIS | {"server.workers": "auto"}).workers == len(os.sched_getaffinity(0))


def test_roles_say_what_is_served() -> None:
    served = {
        role: (config.serves_devices, config.serves_api)
        for role in ("all", "gateway", "broker")
        for config in [load_config(None, None, REDIS | {"server.role": role})]
    }
    assert served == {"all": (True, True), "gateway": (True, False), "broker": (False, True)}


def test_the_kind_of_store_follows_from_its_address() -> None:
    assert (Config().store.kind, load_config(None, None, REDIS).store.kind) == ("sqlite", "redis")


URLS = [
    ("redis://127.0.0.1", "redis://127.0.0.1"),
    ("redis://ann:hush@r:1/0", "redis://ann:***@r:1/0"),
    ("redis://:hush@r", "redis://:***@r"),
    ("redis://hush@r", "redis://***@r"),
    ("redis://:hu@sh@r", "redis://:***@r"),
    ("redis://:hu/sh@r,redis://:hush@s", "redis://:***@s"),
    ("redis://:hush\n@r", "redis://:***@r"),
    ("whatever://a:hush@r", "whatever://a:***@r"),
]


@pytest.mark.parametrize(("url", "shown"), URLS)
def test_a_password_is_never_shown(url: str, shown: str, file: Path) -> None:
    assert hide_password(url) == shown
    assert "hush" not in "".join(_errors(flags={"store.url": url, "mqtt.port": "x"}))


def test_shown_settings_hide_the_password_of_the_store() -> None:
    config = load_config(None, None, {"store.url": "redis://:hush@r"})
    assert 'url = "redis://:***@r"' in format_config(config)
    assert config.store.url == "redis://:hush@r"
