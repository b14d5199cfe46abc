"""The command line of load tests: what it refuses, what it writes, and that its page says the truth."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import orjson
import pytest
from click.testing import CliRunner, Result

from clients.local_server import AppKeys, LocalServer
from loadtest.server import Address
from loadtest.trial import results
from loadtest.trial.command import main, run
from loadtest.trial.limits import check_files, check_memory, check_ports, check_sources, choose_processes
from loadtest.trial.plan import TrialError
from loadtest.trial.scenarios import SCENARIOS
from loadtest.trial.target import Target, read_http, read_mqtt, read_tokens
from loadtest.trial.thresholds import THRESHOLDS
from loadtest.wires import Endpoint, Tls
from tests.loadtest.trial_world import certify, running_mosquitto, tls_before

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/loadtest.md").read_text()
EXAMPLES = [
    line
    for block in re.findall(r"(?s)```sh\n(.*?)```", PAGE)
    for line in block.replace("\\\n", "").splitlines()
]
NO_KEYS = {"HOLDFAST_APP_KEY": None, "HOLDFAST_MASTER_SECRET": None}


def call(*arguments: str, env: Mapping[str, str | None] = NO_KEYS) -> Result:
    return CliRunner().invoke(main, list(arguments), env=env)


@pytest.fixture(scope="module")
def app(server: LocalServer) -> AppKeys:
    return server.create_app("loadtest")


# What is refused

HERE = ("--target", "mqtt://127.0.0.1:1")
OURS = (*HERE, "--http", "http://127.0.0.1:1", "--app", "a", "--secret", "b")
THEIRS = (*HERE, "--foreign")
SECURED = ("--target", "mqtts://127.0.0.1:1", "--foreign")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("storm",), "'storm' is not one of 'idle'"),
        (("idle", "--devices", "0"), "'--devices'"),
        (("idle", "--rate", "1"), "--rate: idle pushes nothing"),
        (("targeted", "--rate", "0"), "'--rate'"),
        (("targeted", "--duration", "-1"), "'--duration'"),
        (("targeted", "--payload", "20"), "'--payload'"),
        (("targeted", "--keep-alive", "1"), "'--keep-alive'"),
        (("targeted", "--receipts", "2"), "'--receipts'"),
        (("idle", "--devices", "2", "--processes", "3"), "--processes 3: more than the 2 devices"),
        (("idle", "--target", "http://a"), "http://a: must be an address such as mqtt://"),
        (("idle", "--target", "wss://a"), "wss://a: must be an address such as mqtt://"),
        (("idle", "--target", "mqtt://a:x"), "Port could not be cast"),
        (("idle", "--target", "mqtt://"), "must name a host"),
        (("idle", "--target", "mqtt://nowhere.invalid"), "nowhere.invalid: "),
        (("idle", "--http", "ftp://a"), "ftp://a: must be an address such as http://127.0.0.1:8080"),
        (("idle", "--http", "http://127.0.0.1/v3"), "the API has no path"),
        (
            ("idle", "--http", "http://127.0.0.1"),
            "--http: without --target a server is started, which needs none",
        ),
        (("idle", "--clean-up", "--source", "1.2.3.4"), "--source, --clean-up: without --target"),
        (("idle", "--insecure"), "--insecure: without --target"),
        (("idle", *THEIRS, "--insecure"), "--cafile, --insecure: no address is one of TLS"),
        (("idle", *SECURED, "--insecure", "--cafile", "README.md"), "--cafile: --insecure checks no"),
        (("idle", *SECURED, "--cafile", "README.md"), "--cafile README.md: has no certificates in PEM"),
        (("idle", *HERE), "which needs --http, --app, --secret; another broker needs --foreign"),
        (("idle", *OURS, "--username", "x"), "--username: devices of Holdfast have tokens"),
        (("tags", *THEIRS), "tags cannot be run with --foreign: another broker has no tags"),
        (("mixed-day", *THEIRS), "mixed-day cannot be run with --foreign"),
        (
            ("offline-backlog", *THEIRS),
            "offline-backlog cannot be run with --foreign: its devices have clean",
        ),
        (
            ("idle", *THEIRS, "--everyone", "--clean-up"),
            "--everyone, --clean-up: another broker has none of these",
        ),
        (("idle", *THEIRS, "--password", "x"), "--password needs --username"),
        (("idle", *THEIRS, "--server-pid", "4194999"), "--server-pid 4194999: there is no such process"),
        (("idle", *OURS, "--tokens", "missing"), "'missing' does not exist"),
        (
            ("idle", *OURS, "--tokens", "README.md", "--devices", "1"),
            "README.md, line 3: must be a registration id",
        ),
        (("tags", *OURS, "--tokens", "README.md"), "--tokens: tags needs devices with its own tags"),
        (("broadcast", *OURS, "--tokens", "README.md"), "needs --everyone"),
        (
            ("idle", "--thresholds", "pyproject.toml"),
            "--thresholds: pyproject.toml: [build-system] is no scenario",
        ),
    ],
)
def test_a_wrong_command_line_is_told(
    arguments: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    answer = call("run", *arguments)
    assert answer.exit_code == 2, answer.output
    assert told in " ".join(answer.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("idle", "--devices", "1000000", "--processes", "1"), "files that it may have open: --processes"),
        (("idle", *OURS), "the devices could not be registered: 0 Connection refused"),
        (
            ("idle", *OURS, "--metrics", "http://127.0.0.1:1/metrics"),
            "--metrics: Connection refused",
        ),
        (("idle", *OURS, "--source", "203.0.113.1"), "--source 203.0.113.1: Cannot assign requested address"),
        (("idle", *SECURED), "no TLS with mqtts://127.0.0.1:1: Connection refused"),
        (("targeted", *THEIRS), "the publisher was not let in: Connection refused"),
        (
            ("idle", *THEIRS, "--devices", "1", "--patience", "0.5"),
            "no device came online: .*Connection refused",
        ),
    ],
)
def test_a_trial_that_cannot_be_run_is_told(arguments: tuple[str, ...], told: str) -> None:
    answer = call("run", *arguments)
    assert answer.exit_code == 3, answer.output
    assert re.search(told, answer.output), answer.output


def test_metrics_that_are_none_are_told(server: LocalServer) -> None:
    http = read_http(server.addresses.http)[0].address
    for path, told in (("/metrics", "it answers 404"), ("/v1/openapi.json", "it has no process_resident")):
        answer = call("run", "idle", *THEIRS, "--metrics", "http://{}:{}{}".format(*http, path))
        assert answer.exit_code == 3, answer.output
        assert f"--metrics: {told}" in answer.output


# Limits


@pytest.mark.parametrize(
    ("devices", "files", "cores", "processes"),
    [(1, 20_000, 2, 1), (500, 20_000, 2, 1), (501, 20_000, 2, 2), (20_000, 20_000, 2, 4), (1000, 1000, 1, 2)],
)
def test_processes_are_chosen(devices: int, files: int, cores: int, processes: int) -> None:
    assert choose_processes(devices, files, cores) == processes


def test_files_are_looked_at() -> None:
    check_files(19_500, 1, 20_000, embedded=False)
    with pytest.raises(
        TrialError, match=r"19,501 devices in a process need more than .* --processes 2 or more"
    ):
        check_files(19_501, 1, 20_000, embedded=False)
    with pytest.raises(TrialError, match="a server of our own may have 20,000 files open"):
        check_files(19_501, 2, 20_000, embedded=True)


def test_memory_is_looked_at() -> None:
    check_memory(10)
    with pytest.raises(TrialError, match=r"1,000,000,000 devices over TLS need 22351\.7 GB here"):
        check_memory(1_000_000_000)


def test_ports_are_looked_at() -> None:
    check_ports(100_000, 1, None)  # loopback
    with pytest.raises(TrialError, match=r"to one address need .* addresses of their own.* --source"):
        check_ports(100_000, 1, 1)
    with pytest.raises(TrialError, match="251 processes are too many"):
        check_ports(1000, 251, None)


def test_sources_are_of_this_machine() -> None:
    check_sources(["127.0.0.1", "127.9.9.9"])
    with pytest.raises(TrialError, match=r"--source 203\.0\.113\.1: "):
        check_sources(["203.0.113.1"])


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("127.0.0.1", Endpoint(("127.0.0.1", 1883))),
        ("mqtt://127.0.0.1:9", Endpoint(("127.0.0.1", 9))),
        ("mqtt://[::1]:9", Endpoint(("::1", 9))),
        ("mqtts://127.0.0.1", Endpoint(("127.0.0.1", 8883), Tls("127.0.0.1"))),
        ("mqtts://localhost:9", Endpoint(("127.0.0.1", 9), Tls("localhost"))),
        ("mqtts://[::1]:9", Endpoint(("::1", 9), Tls("::1"))),
    ],
)
def test_an_address_is_read(text: str, endpoint: Endpoint) -> None:
    assert read_mqtt(text) == endpoint
    assert Target("mqtt", endpoint).is_local == (endpoint.address[0] == "127.0.0.1")


def test_the_api_has_the_ports_of_http() -> None:
    assert read_http("http://127.0.0.1") == (Endpoint(("127.0.0.1", 80)), "/")
    assert read_http("https://127.0.0.1/x") == (Endpoint(("127.0.0.1", 443), Tls("127.0.0.1")), "/x")


def test_tokens_are_read(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# ours\nphone-1 abc\n\nphone-2,def\n")
    assert read_tokens(file, "app", 2).devices == (("phone-1", "abc"), ("phone-2", "def"))
    with pytest.raises(ValueError, match="has 2 devices, fewer than the 3 of --devices"):
        read_tokens(file, "app", 3)


# What is written


def test_a_miss_is_an_exit_status_and_the_files_are_there(
    server: LocalServer, app: AppKeys, tmp_path: Path
) -> None:
    wanted = tmp_path / "wanted.toml"
    wanted.write_text("[idle]\nlost = 0\n[targeted]\nlost = 0\nlatency_p50 = 0\n")
    files = [tmp_path / name for name in ("result.json", "result.html")]
    answer = call(
        *("run", "targeted", "--devices", "5", "--rate", "20", "--duration", "0.3"),
        *("--target", "mqtt://{}:{}".format(*server.addresses.mqtt), "--http", server.addresses.http),
        *("--app", app.app_key, "--secret", app.master_secret),
        *("--json", str(files[0]), "--html", str(files[1]), "--thresholds", str(wanted)),
    )
    assert answer.exit_code == 1, answer.output
    assert "  met: lost: 0, wanted 0\n  MISSED: latency_p50: " in answer.output
    assert app.master_secret not in files[0].read_text() + files[1].read_text() + answer.output
    assert [one["met"] for one in orjson.loads(files[0].read_bytes())["verdicts"]] == [True, False]
    assert "MISSED: latency_p50" in files[1].read_text()
    again = call("show", str(files[0]))
    assert (again.exit_code, again.stdout) == (1, answer.stdout)
    wanted.write_text("[all]\nlost = 0\n")
    assert call("show", str(files[0]), "--thresholds", str(wanted)).exit_code == 0


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    answer = call("show", str(tmp_path / "other.json"))
    assert answer.exit_code == 2
    assert "not a result of this version" in answer.output


def test_ctrl_c_on_a_terminal_ends_the_trial_and_not_its_server() -> None:
    """It goes to the whole group of processes."""
    command = [
        sys.executable,
        "-m",
        "loadtest.trial",
        "run",
        "targeted",
        "--devices",
        "5",
        "--duration",
        "600",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        told = next(line for line in process.stderr if "phase push" in line or "Error" in line)
        assert "phase push" in told
        os.killpg(process.pid, signal.SIGINT)
        summary = process.stdout.read()
    assert process.returncode == 130
    assert "stopped" in summary.splitlines()[0]
    assert re.search(r"online at the end +5 of 5\n", summary), summary
    assert re.search(r"connections lost +0\n", summary), summary


# The page


class Words:
    """What the examples' words stand for."""

    def __init__(
        self, server: LocalServer, app: AppKeys, broker: Target, mqtts: Address, https: Address
    ) -> None:
        self._words = {
            "MQTTS_ADDRESS": f"localhost:{mqtts[1]}",
            "HTTPS_ADDRESS": f"localhost:{https[1]}",
            "MQTT_ADDRESS": "{}:{}".format(*server.addresses.mqtt),
            "HTTP_ADDRESS": server.addresses.http.removeprefix("http://"),
            "BROKER_ADDRESS": "{}:{}".format(*broker.mqtt.address),
            "APP_KEY": app.app_key,
            "MASTER_SECRET": app.master_secret,
        }

    def fill(self, line: str) -> list[str]:
        for word, meaning in self._words.items():
            line = re.sub(rf"\b{word}\b", meaning, line)
        return shlex.split(line)


@pytest.fixture
def words(server: LocalServer, app: AppKeys, tmp_path: Path) -> Iterator[Words]:
    if not shutil.which("mosquitto"):
        pytest.skip("mosquitto: apt-get install mosquitto")
    certified = certify(tmp_path, "localhost")
    context, api = certified.context(), read_http(server.addresses.http)[0].address
    with (
        running_mosquitto(tmp_path) as broker,
        tls_before(server.addresses.mqtt, context) as mqtts,
        tls_before(api, context) as https,
    ):
        yield Words(server, app, broker, mqtts, https)


def test_the_examples_work_in_order(words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are, but for the sizes: nobody learns more from two seconds than from a fifth."""
    monkeypatch.chdir(tmp_path)
    sample = (ROOT / "configs/loadtest/thresholds.toml").read_text()
    kept = [line for line in sample.splitlines() if not re.match("latency|accept|bottlenecks", line)]
    Path("thresholds.toml").write_text("\n".join(kept))  # those of a machine that is as quick as it may be
    assert len(EXAMPLES) == 6
    for example in EXAMPLES:
        line = example.replace("--duration 2", "--duration 0.2").replace("--devices 200", "--devices 20")
        name, *arguments = words.fill(line)
        assert name == "holdfast-loadtest"
        answer = call(*arguments)
        assert answer.exit_code == 0, (line, answer.output)
    assert Path("result.html").read_text().startswith("<!doctype html>")


def test_the_command_is_installed_under_its_name() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "loadtest.trial", "scenarios"], capture_output=True, text=True, check=True
    )
    assert [line for line in answer.stdout.splitlines() if not line.startswith(" ")] == list(SCENARIOS)
    assert 'holdfast-loadtest = "loadtest.trial.command:main"' in (ROOT / "pyproject.toml").read_text()


def _rows(title: str) -> list[str]:
    """First cells of the section's tables."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [line.split(" | ")[0].strip("| ") for line in section.splitlines() if line.startswith("| `")]


def _names(cells: list[str]) -> set[str]:
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_page_has_every_scenario_flag_and_threshold() -> None:
    assert _names(_rows("Scenarios")) == set(SCENARIOS)
    assert _names(_rows("Thresholds")) == set(THRESHOLDS)
    flags = {name for parameter in run.params for name in parameter.opts if name.startswith("--")}
    assert _names(_rows("Flags")) == flags


def test_the_page_says_which_scenarios_another_broker_can_play() -> None:
    table = PAGE.split("\n## Scenarios\n")[1].split("\n## ")[0]
    for name, scenario in SCENARIOS.items():
        [row] = [line for line in table.splitlines() if line.startswith(f"| `{name}` ")]
        assert row.split("|")[3].strip().startswith("no" if scenario.why_not_foreign else "yes")


def test_the_page_has_every_key_of_a_result() -> None:
    told = set(re.findall(r"`([a-z_0-9]+)`", PAGE.split("\n## The result in JSON\n")[1]))
    latency = {field.name for field in msgspec.structs.fields(results.Latency)}  # said in one piece
    assert latency <= set(re.findall(r'"([a-z0-9]+)"', PAGE))
    assert _keys(results.Result) - latency <= told


def _keys(kind: Any) -> set[str]:
    """Of a struct and all that is in it."""
    keys: set[str] = set()
    for name, hint in get_type_hints(kind).items():
        if name.startswith("_"):
            continue
        keys.add(name)
        for inner in (hint, *get_args(hint)):
            if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                keys |= _keys(inner)
    return keys
