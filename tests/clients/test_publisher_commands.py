"""`holdfast push` with all its options, and the commands for what a publisher keeps on the server; on a real one."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from clients.command import main
from clients.local_server import AppKeys, LocalServer

SOON = (datetime.now(UTC) + timedelta(days=2)).strftime("%Y-%m-%d %H:%M:%S")
LATER = (datetime.now(UTC) + timedelta(days=90)).strftime("%Y-%m-%d %H:%M:%S")
PATIENCE = 10.0  # seconds


class Shell:
    """Runs commands as the app's publisher."""

    def __init__(self, server: LocalServer, app: AppKeys) -> None:
        self.environment = {
            "HOLDFAST_APP_KEY": app.app_key,
            "HOLDFAST_MASTER_SECRET": app.master_secret,
            "HOLDFAST_URL": server.addresses.http,
        }

    def run(self, *words: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(main, words, env=self.environment, input=stdin)

    def text(self, *words: str, stdin: str | None = None) -> str:
        result = self.run(*words, stdin=stdin)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *words: str, stdin: str | None = None) -> Any:
        """All that is printed is one JSON document."""
        return json.loads(self.text(*words, stdin=stdin))

    def refused(self, *words: str, status: int = 1) -> str:
        result = self.run(*words)
        assert (result.exit_code, result.stdout) == (status, ""), result.output
        return result.stderr

    def on_a_terminal(self, *words: str) -> str:
        """What a person sees; standard output and error are a terminal."""
        front, back = pty.openpty()
        environment = os.environ | self.environment | {"TERM": "xterm", "COLUMNS": "200", "NO_COLOR": "1"}
        command = [sys.executable, "-m", "clients.command", *words]
        with subprocess.Popen(command, stdin=back, stdout=back, stderr=back, env=environment) as process:
            os.close(back)
            seen = b"".join(_read_all(front))
            assert process.wait(PATIENCE) == 0, seen
        os.close(front)
        return seen.decode()


def _read_all(descriptor: int) -> Iterator[bytes]:
    try:
        while block := os.read(descriptor, 65_536):
            yield block
    except OSError:  # Linux says so at the end of a terminal
        return


@pytest.fixture
def shell(server: LocalServer, app: AppKeys) -> Shell:
    return Shell(server, app)


@pytest.fixture(autouse=True)
async def devices(publisher: Any) -> None:
    for name, platform, tags in (("a", "android", ["red"]), ("b", "ios", ["red"]), ("c", "ios", [])):
        await publisher.register_device(name, platform=platform, alias=name * 2, tags=tags)


def push_to(shell: Shell, *words: str) -> str:
    msg_id: str = shell.json("push", *words, "Hello")["msg_id"]
    return msg_id


def report(shell: Shell, msg_id: str) -> Any:
    return shell.json("pushes", "show", msg_id, "--json")


# push, withdraw, pushes


def test_push_with_all_its_options(shell: Shell, tmp_path: Path) -> None:
    first = push_to(shell, "--all", "--priority", "high")
    second = push_to(shell, "--all", "--override", first, "--collapse-key", "news", "--ttl", "60")
    assert (report(shell, first)["recalled"], report(shell, second)["pending"]) == (3, 3)
    segment = shell.json("segment", "create", "red", "--rule", "-", stdin='{"tag": "red"}')["id"]
    assert report(shell, push_to(shell, "--segment", segment))["target"] == 2
    (tmp_path / "list").write_text("a\nc\n")
    file_id = shell.json("file", "upload", str(tmp_path / "list"))["file_id"]
    assert report(shell, push_to(shell, "--file", file_id))["target"] == 2
    assert report(shell, push_to(shell, "--file", file_id, "--tag-not", "red"))["target"] == 1
    assert shell.json("push", "--all", "--dry-run", "Hello") == {"valid": True}
    assert "no target" in shell.refused("push", "--tag", "none", "--dry-run", "Hello")


def test_withdraw(shell: Shell) -> None:
    msg_id = push_to(shell, "--all")
    assert shell.text("withdraw", msg_id) == ""
    assert shell.text("status", msg_id).startswith(
        f"message {msg_id}, for 3 devices: 0 delivered, 0 pending, 0 expired, 0 evicted, 3 recalled;"
    )
    assert "HTTP 404" in shell.refused("withdraw", "1")


def test_a_slow_push_is_controlled(shell: Shell) -> None:
    msg_id = push_to(shell, "--all", "--slow", "10")
    assert shell.json("pushes", "pause", msg_id, "--json")["state"] == "paused"
    assert shell.text("pushes", "resume", msg_id).startswith("let go")
    assert "of 3, stopped" in shell.text("pushes", "stop", msg_id)
    assert "code 1003" in shell.refused("pushes", "pause", msg_id)
    watched = shell.json("pushes", "watch", msg_id, "--json")
    assert (watched["msg_id"], watched["recalled"]) == (msg_id, 3)


def test_the_account_of_a_push_for_people(shell: Shell) -> None:
    msg_id = push_to(shell, "--all")
    lines = shell.text("pushes", "show", msg_id).splitlines()
    found = dict(line.split(maxsplit=1) for line in lines)
    assert (found["state"], found["target"], found["pending"], found["shown"]) == ("sending", "3", "3", "0")
    header, *rows = shell.text("pushes", "curve", msg_id).splitlines()
    assert header.split() == ["hour", "from", "sent", "delivered", "shown", "clicked", "dismissed"]
    assert [row.split()[0] for row in rows] == ["0"]
    state, header, *rows = shell.text("pushes", "trace", msg_id, "a").splitlines()
    assert (state, header.split()) == ("pending", ["time", "within", "step", "node"])
    assert [row.split()[-1] for row in rows] == ["accepted", "matched"]
    assert shell.json("pushes", "curve", msg_id, "--json")["msg_id"] == msg_id
    assert shell.json("pushes", "trace", msg_id, "a", "--json")["status"] == "pending"
    assert "HTTP 404" in shell.refused("pushes", "show", "1")


def test_watch_ends_when_nobody_is_to_get_it(shell: Shell) -> None:
    msg_id = push_to(shell, "--all", "--ttl", "1")
    seen = shell.text("pushes", "watch", msg_id, "--every", "0.1")
    assert "expired     3" in seen


def test_a_group(server: LocalServer, app: AppKeys, shell: Shell) -> None:
    other = server.create_app("empty")
    key, secret = server.create_group("both", app.app_key, other.app_key)
    words = ("push", "--group", "--app", key, "--secret", secret, "--all", "Hello")
    result = shell.run(*words)
    answer = json.loads(result.stdout)
    assert (result.exit_code, answer[other.app_key]["error"]["code"]) == (1, 1011)
    assert report(shell, answer[app.app_key]["msg_id"])["target"] == 3


# schedule


def test_a_push_later(shell: Shell) -> None:
    words = ("push", "--all", "--at", SOON, "--zone", "UTC", "--cid", "c", "Hello")
    made = shell.json(*words)
    assert shell.json(*words) == made
    found = shell.json("schedule", "show", made["schedule_id"], "--json")
    assert found["trigger"] == {"single": {"time": SOON, "zone": "UTC"}}
    assert (found["push"]["notification"], found["log"]) == ({"alert": "Hello"}, [])


@pytest.mark.parametrize(
    ("words", "when"),
    [
        (("--daily", "--every", "2"), "every 2 days at 12:00:00, UTC"),
        (("--weekly", "mon,FRI"), "every 1 weeks on MON,FRI at 12:00:00, UTC"),
        (("--monthly", "1,15"), "every 1 months on 01,15 at 12:00:00, UTC"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_periodical_schedules(shell: Shell, words: tuple[str, ...], when: str) -> None:
    span = ("--from", SOON, "--until", LATER, "--time", "12:00:00", "--zone", "UTC")
    made = shell.json("schedule", "create", "--all", *words, *span, "--name", "mine", "Hello")
    shown = shell.text("schedule", "show", made["schedule_id"])
    assert when in shown
    assert shown.splitlines()[-1] == "no pushes yet"


def test_schedules_are_listed_switched_and_deleted(shell: Shell) -> None:
    assert shell.text("schedule", "list") == "no schedules\n"
    made = shell.json("schedule", "create", "--all", "--at", SOON, "--zone", "UTC", "--name", "mine", "Hello")
    schedule_id = made["schedule_id"]
    shell.text("schedule", "disable", schedule_id)
    header, row = shell.text("schedule", "list").splitlines()
    assert header.split() == ["id", "name", "when", "enabled", "next", "fired"]
    assert row.split()[:5] == [schedule_id, "mine", "once,", "UTC", "no"]
    shell.text("schedule", "enable", schedule_id)
    [listed] = shell.json("schedule", "list", "--json")
    assert (listed["enabled"], listed["next"]) == (True, SOON)
    shell.text("schedule", "delete", schedule_id)
    assert "8104" in shell.refused("schedule", "show", schedule_id)


# segment, file


def test_segments(shell: Shell, tmp_path: Path) -> None:
    assert shell.text("segment", "list") == "no segments\n"
    (tmp_path / "rule").write_text('{"platform": "ios"}')
    segment = shell.json("segment", "create", "apples", "--rule", str(tmp_path / "rule"))
    assert shell.json("segment", "show", segment["id"]) == segment
    assert shell.json("segment", "estimate", segment["id"], "--json") == {"registered": 2, "online": 0}
    assert shell.text("segment", "estimate", "--rule", "-", stdin='{"tag": "red"}').startswith(
        "registered  2"
    )
    changed = shell.json("segment", "replace", segment["id"], "--rule", "-", stdin='{"tag": "red"}')
    assert changed == segment | {"rule": {"tag": "red"}}
    assert shell.text("segment", "list").splitlines()[1].split() == [segment["id"], "apples", '{"tag":"red"}']
    assert shell.json("segment", "list", "--json") == [changed]
    shell.text("segment", "delete", segment["id"])
    assert "HTTP 404" in shell.refused("segment", "show", segment["id"])


def test_files(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("aa\nbb\nnobody\n")
    file_id = shell.json("file", "upload", "--alias", str(tmp_path / "names.txt"))["file_id"]
    [listed] = shell.json("file", "list", "--json")
    assert (listed["file_id"], listed["lines"], listed["file_name"]) == (file_id, 3, "names.txt")
    assert shell.text("file", "list").splitlines()[1].split()[:4] == [file_id, "alias", "3", "names.txt"]
    shell.text("file", "delete", file_id)
    assert shell.text("file", "list") == "no files\n"
    (tmp_path / "empty").write_text("")
    assert "no lines" in shell.refused("file", "upload", str(tmp_path / "empty"))


# report, callbacks, key, settings


def test_the_users_report(shell: Shell) -> None:
    found = shell.json("report", "users", "--unit", "day", "--count", "2", "--json")
    assert (found["time_unit"], len(found["items"])) == ("DAY", 2)
    header, *rows = shell.text("report", "users", "--unit", "month").splitlines()
    assert (header.split(), len(rows)) == (["month", "new", "online", "active"], 1)
    assert "start" in shell.refused("report", "users", "--from", "yesterday")


def once(true: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := true():
            return found
        time.sleep(0.02)
    pytest.fail("it did not happen")


def test_callbacks(shell: Shell) -> None:
    assert shell.text("callbacks", "parked") == "nothing was given up\n"
    body = {"callback": {"url": "http://127.0.0.1:9/", "events": ["recalled"]}}
    result = shell.json("push", "--all", "--json", "-", "Hello", stdin=json.dumps(body))
    shell.text("withdraw", result["msg_id"])
    once(lambda: shell.json("callbacks", "show", "--json")["parked"])
    [event] = shell.json("callbacks", "parked", "--json")
    assert (event["msg_id"], event["event"], event["devices"]) == (result["msg_id"], "recalled", 3)
    assert "not a public address" in shell.text("callbacks", "parked").splitlines()[1]
    assert shell.json("callbacks", "retry") == {"retried": 1}
    once(lambda: shell.json("callbacks", "show", "--json")["parked"])
    assert shell.json("callbacks", "drop") == {"dropped": 1}
    assert [line.split()[0] for line in shell.text("callbacks", "show").splitlines()] == [
        "waiting",
        "parked",
        "signing",
    ]


def test_keys(shell: Shell) -> None:
    words = ("--scope", "report", "--scope", "push", "--days", "1", "--allow-from", "127.0.0.1")
    key = shell.json("key", "create", "backend", *words)
    assert (key["name"], key["scopes"]) == ("backend", ["push", "report"])
    assert push_to(shell, "--all", "--secret", key["secret"])
    assert "HTTP 40" in shell.refused("key", "list", "--secret", key["secret"])
    [listed] = shell.json("key", "list", "--json")
    assert "secret" not in listed
    assert shell.text("key", "list").splitlines()[1].split()[:3] == [key["id"], "backend", "push,report"]
    shell.text("key", "delete", key["id"])
    assert shell.text("key", "list") == "no keys\n"


def test_settings_and_their_audit(shell: Shell) -> None:
    nothing = {"allow_from": [], "quiet_hours": None, "frequency_caps": [], "callback": None}
    assert shell.json("settings", "show") == nothing
    wanted = {"quiet_hours": {"start": "22:00", "end": "07:00", "zone": "Europe/Berlin"}}
    changed = shell.json("settings", "set", "-", stdin=json.dumps(wanted))
    assert changed["quiet_hours"]["start"] == "22:00"
    assert shell.json("settings", "show") == changed
    [entry] = shell.json("settings", "audit", "--count", "1", "--json")
    assert (entry["action"], entry["actor"], entry["outcome"]) == ("settings.set", "master", "done")
    assert len(shell.text("settings", "audit", "--count", "1").splitlines()) == 2


# All of them


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("push", "--all", "--at", SOON, "--group", "x"), "do not go together"),
        (("push", "--all", "--zone", "UTC", "x"), "--zone belongs to --at"),
        (("push", "--all", "--segment", "s", "x"), "--all stands alone"),
        (("schedule", "create", "--all", "x"), "say when"),
        (("schedule", "create", "--all", "--daily", "--at", SOON, "x"), "say when"),
        (("schedule", "create", "--all", "--daily", "x"), "need --from"),
        (("segment", "estimate"), "one of them"),
        (("segment", "create", "x", "--rule", "/dev/null"), "not valid JSON"),
        (("key", "create", "x", "--scope", "everything"), "everything"),
        (("settings", "set", "/dev/null"), "not valid JSON"),
        (("pushes", "show", "0"), "0 is not in the range"),
    ],
)
def test_wrong_usage_ends_with_2(shell: Shell, words: tuple[str, ...], told: str) -> None:
    assert told in shell.refused(*words, status=2)


def test_settings_of_another_shape_are_wrong_usage(shell: Shell) -> None:
    result = shell.run("settings", "set", "-", stdin='{"quiet_hours": 5}')
    assert (result.exit_code, "quiet_hours" in result.stderr) == (2, True)


def test_refusals_say_code_and_status(shell: Shell) -> None:
    assert shell.refused("segment", "list", "--secret", "wrong").endswith("(code 1004, HTTP 401)\n")
    assert "cannot be reached" in shell.refused("key", "list", "--url", "http://127.0.0.1:9")


def test_people_get_a_ruled_table_and_names_are_no_markup(shell: Shell) -> None:
    shell.json("key", "create", "[bold]fox[/bold]", "--scope", "push")
    seen = shell.on_a_terminal("key", "list")
    assert "───" in seen
    assert "[bold]fox[/bold]" in seen


def test_people_see_the_progress_of_an_upload(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "names").write_text("a\n" * 10_000)
    seen = shell.on_a_terminal("file", "upload", str(tmp_path / "names"))
    assert "20.0/20.0 kB" in seen
    assert '{"file_id":' in seen


def test_people_see_how_far_a_push_is(shell: Shell) -> None:
    msg_id = push_to(shell, "--all", "--ttl", "1")
    seen = shell.on_a_terminal("pushes", "watch", msg_id, "--every", "0.1")
    assert "sending: 0 delivered" in seen
    assert "3/3" in seen
    assert seen.rstrip().endswith("dismissed   0")
