"""`holdfast push`, `status` and `listen` against a real server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from broker.command import dispatch
from clients.command_listen import listen
from clients.command_push import push, status, withdraw
from clients.command_shared import print_fields, print_table
from clients.local_server import LocalServer
from clients.publisher import Publisher
from tests.patience import PATIENCE


@pytest.fixture
def environment(server: LocalServer) -> dict[str, str]:
    app = server.app
    return {
        "HOLDFAST_APP_KEY": app.app_key,
        "HOLDFAST_MASTER_SECRET": app.master_secret,
        "HOLDFAST_DEVICE_KEY": app.device_key,
        "HOLDFAST_URL": server.addresses.http,
    }


@contextmanager
def listening(server: LocalServer, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """A `holdfast listen` that is online."""
    app, (host, port) = server.app, server.addresses.mqtt
    command = [sys.executable, "-m", "clients.command", "listen", "--app", app.app_key]
    command += ["--device-key", app.device_key, "--host", host, "--port", str(port), *flags]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stderr is not None
            line = next(process.stderr)
            assert line.startswith("online as"), line
            yield process
        finally:
            process.kill()


def run_push(environment: dict[str, str], *arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(push, arguments, env=environment, input=stdin)


def pushed(result: Result) -> str:
    assert result.exit_code == 0, result.output
    msg_id: str = json.loads(result.stdout)["msg_id"]
    return msg_id


def once_delivered(environment: dict[str, str], msg_id: str, *devices: str) -> dict[str, Any]:
    """What `holdfast status` says when the acknowledgement is recorded."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        result = CliRunner().invoke(status, [msg_id, *devices, "--json"], env=environment)
        report: dict[str, Any] = json.loads(result.stdout)
        if report["delivered"]:
            return report
    pytest.fail(f"not delivered: {report}")


def read(process: subprocess.Popen[str]) -> dict[str, object]:
    assert process.stdout is not None
    line: dict[str, object] = json.loads(next(process.stdout))
    return line


def test_listen_prints_what_push_sends(server: LocalServer, environment: dict[str, str]) -> None:
    with listening(server, "--id", "cli-1", "--count", "2", "--receipts") as process:
        first = pushed(run_push(environment, "--registration-id", "cli-1", "--ttl", "60", "Hello"))
        second = pushed(run_push(environment, "--all", "--message", "m", "--title", "t"))
        assert read(process) == {"msg_id": first, "notification": {"alert": "Hello"}}
        assert read(process) == {"msg_id": second, "message": {"msg_content": "m", "title": "t"}}
        assert process.wait(PATIENCE) == 0
    report = once_delivered(environment, first, "cli-1", "other")
    assert (report["msg_id"], report["pending"], report["shown"]) == (first, 0, 1)
    assert report["devices"] == {"cli-1": "delivered", "other": "not a device"}
    shown = CliRunner().invoke(status, [first, "cli-1"], env=environment)
    assert shown.stdout == (
        f"message {first}, for 1 device: 1 delivered, 0 pending, 0 expired, 0 evicted;"
        " 1 shown, 0 clicked, 0 dismissed\ncli-1  delivered\n"
    )


def test_listen_says_what_takes_the_place_of_what_and_what_was_withdrawn(
    server: LocalServer, environment: dict[str, str]
) -> None:
    with listening(server, "--id", "cli-7") as process:
        first = pushed(run_push(environment, "--registration-id", "cli-7", "Hello"))
        assert read(process)["msg_id"] == first
        second = pushed(run_push(environment, "--registration-id", "cli-7", "--override", first, "Sorry"))
        assert read(process) == {"msg_id": second, "notification": {"alert": "Sorry"}, "override": first}
        once_delivered(environment, second)
        withdrawn = CliRunner().invoke(withdraw, [second], env=environment)
        assert (withdrawn.exit_code, withdrawn.stdout) == (0, "")
        recall = read(process)
        assert recall.keys() == {"msg_id", "recall"}
        assert recall["recall"] == second


def test_listen_is_a_device_of_a_platform(server: LocalServer, environment: dict[str, str]) -> None:
    words = ("--tag", "listens", "--platform", "ios", "--dry-run", "x")
    assert run_push(environment, *words).exit_code == 1
    with listening(server, "--id", "cli-8", "--platform", "ios"):
        tell(environment, "cli-8", {"tags": ["listens"]})
        deadline = time.monotonic() + PATIENCE
        while (result := run_push(environment, *words)).exit_code and time.monotonic() < deadline:
            time.sleep(0.02)
        assert json.loads(result.stdout) == {"valid": True, "registered": 1, "online": 1}


def tell(environment: dict[str, str], device: str, change: dict[str, Any]) -> None:
    async def run() -> None:
        keys = (environment["HOLDFAST_APP_KEY"], environment["HOLDFAST_MASTER_SECRET"])
        async with Publisher(*keys, environment["HOLDFAST_URL"]) as publisher:
            await publisher.update_device(device, **change)

    asyncio.run(run())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_listen_ends_clean_on_a_signal(server: LocalServer, number: signal.Signals) -> None:
    with listening(server, "--id", "cli-2") as process:
        process.send_signal(number)
        assert process.wait(PATIENCE) == 0


def test_listen_killed_and_started_again_prints_each_push_once(
    server: LocalServer, environment: dict[str, str], tmp_path: Path
) -> None:
    flags = ("--id", "cli-3", "--journal", str(tmp_path / "journal"))
    seen, sent = [], []
    for _ in range(3):
        with listening(server, *flags) as process:
            for _ in range(3):
                sent.append(pushed(run_push(environment, "--registration-id", "cli-3", "x")))
                seen.append(str(read(process)["msg_id"]))
                once_delivered(environment, sent[-1])
            os.kill(process.pid, signal.SIGKILL)
        assert seen == sent


def test_listen_with_wrong_credentials_says_so(server: LocalServer) -> None:
    host, port = server.addresses.mqtt
    command = [sys.executable, "-m", "clients.command", "listen", "--app", server.app.app_key]
    command += ["--device-key", "wrong", "--host", host, "--port", str(port)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 1
    assert "the password does not fit" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give --device-key or --token"),
        (("--token", "t"), "give its --id"),
        (("--device-key", "k", "--url", "http://x"), "--url needs --journal"),
        (("--device-key", "k", "--url", "x", "--journal", "j"), "must be an http or https address"),
        (("--device-key", "k", "--platform", "palm"), "palm"),
        (("--device-key", "k", "--server", "http://x"), "'http' is none of tcp, tls, ws, wss"),
        (("--device-key", "k", "--dispatch", "http://x"), "belong together"),
        (("--device-key", "k", "--dispatch", "http://x", "--dispatch-key", "k"), "must be a public key"),
    ],
)
def test_wrong_usage_of_listen(arguments: tuple[str, ...], told: str) -> None:
    result = CliRunner().invoke(listen, ["--app", "a", *arguments])
    assert (result.exit_code, told in result.stderr) == (2, True)


def test_listen_tries_its_servers_in_order(server: LocalServer, environment: dict[str, str]) -> None:
    assert server.addresses.ws is not None
    host, port = server.addresses.ws
    flags = (
        "--server",
        "127.0.0.1:1",
        "--server",
        f"ws://{host}:{port}",
        "--carrier",
        "46000",
        "--link",
        "cellular",
    )
    with listening(server, "--id", "cli-9", "--count", "1", *flags) as process:
        msg_id = pushed(run_push(environment, "--registration-id", "cli-9", "x"))
        assert read(process)["msg_id"] == msg_id


def test_listen_goes_where_dispatch_says(server: LocalServer, environment: dict[str, str]) -> None:
    app = server.app
    key = json.loads(CliRunner().invoke(dispatch, ["key", "--data-dir", str(server.data_dir)]).stdout)["key"]
    command = [sys.executable, "-m", "clients.command", "listen", "--app", app.app_key, "--id", "cli-10"]
    command += ["--device-key", app.device_key, "--count", "1"]
    command += ["--dispatch", server.addresses.http, "--dispatch-key", key]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stderr is not None
            assert next(process.stderr).startswith("online as cli-10")
            msg_id = pushed(run_push(environment, "--registration-id", "cli-10", "x"))
            assert read(process)["msg_id"] == msg_id
        finally:
            process.kill()


def test_listen_registers_once_and_keeps_its_token(server: LocalServer, tmp_path: Path) -> None:
    app, (host, port) = server.create_app("listeners"), server.addresses.mqtt
    common = ("--app", app.app_key, "--host", host, "--port", str(port), "--journal", str(tmp_path / "j"))
    for flags in (("--device-key", app.device_key, "--url", server.addresses.http, "--id", "kept"), ()):
        command = [sys.executable, "-m", "clients.command", "listen", *common, *flags]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                assert next(process.stderr).startswith("online as kept")
                process.send_signal(signal.SIGTERM)
                assert process.wait(PATIENCE) == 0
            finally:
                process.kill()


def test_listen_into_a_pipe_that_closes(server: LocalServer, environment: dict[str, str]) -> None:
    with listening(server, "--id", "cli-4") as process:
        assert process.stdout is not None
        process.stdout.close()
        run_push(environment, "--registration-id", "cli-4", "x")
        assert process.wait(PATIENCE) == 1
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_push_reads_json(server: LocalServer, environment: dict[str, str], tmp_path: Path) -> None:
    with listening(server, "--id", "cli-5") as process:
        body = {"platform": "all", "audience": "all", "notification": {"alert": "from a file"}}
        (tmp_path / "push.json").write_text(json.dumps(body))
        file = str(tmp_path / "push.json")
        msg_id = pushed(run_push(environment, "--body", file, "--registration-id", "cli-5"))
        assert read(process) == {"msg_id": msg_id, "notification": {"alert": "from a file"}}
        pushed(run_push(environment, "--body", "-", "Other words", stdin=json.dumps(body)))
        assert read(process)["notification"] == {"alert": "Other words"}


def test_a_cid_is_sent(environment: dict[str, str], server: LocalServer) -> None:
    with listening(server, "--id", "cli-6"):
        arguments = ("--registration-id", "cli-6", "--cid", "cli-cid", "x")
        assert pushed(run_push(environment, *arguments)) == pushed(run_push(environment, *arguments))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("x",), "say whom it is for"),
        (("--all",), "say what to push"),
        (("--all", "--tag", "a", "x"), "--all stands alone"),
        (("--all", "--title", "x"), "--title needs"),
        (("--all", "--body", "-"), "not valid JSON"),
        (("--all", "--platform", "palm", "x"), "palm"),
    ],
)
def test_wrong_usage_of_push(environment: dict[str, str], arguments: tuple[str, ...], told: str) -> None:
    result = run_push(environment, *arguments)
    assert result.exit_code == 2
    assert told in result.stderr


def test_keys_are_needed() -> None:
    result = run_push({}, "--all", "x")
    assert (result.exit_code, "--app" in result.stderr) == (2, True)


def test_refusals_and_absence_end_with_1(environment: dict[str, str]) -> None:
    refused = run_push(environment, "--alias", "nobody", "x")
    assert refused.exit_code == 1
    assert refused.stderr == "Error: no target matches the audience (code 1011, HTTP 400)\n"
    unknown = CliRunner().invoke(status, ["1"], env=environment)
    assert (unknown.exit_code, "not a message" in unknown.stderr) == (1, True)
    nowhere = run_push(environment | {"HOLDFAST_URL": "no address"}, "--all", "x")
    assert (nowhere.exit_code, "must be an http or https address" in nowhere.stderr) == (2, True)


def test_names_of_others_do_not_tell_the_terminal_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name",), [["a\x1b[2Jb"], ["日本"], [None]])
    print_fields({"name": "a\x1b[2Jb"})
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count("a\ufffd[2Jb") == 2
    assert "日本" in out
