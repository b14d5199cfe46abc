"""`holdfast push` with all its options, and the commands for what a publisher keeps on the server; on a real one."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from clients.command import main
from clients.command_app import start_of_last
from clients.command_pushes import Lines, _within, is_over
from clients.local_server import AppKeys, LocalServer
from clients.publisher import RECEIPTS, STATES, Progress, PushReport, TraceStep
from tests.patience import PATIENCE

SOON = (datetime.now(UTC) + timedelta(days=2)).strftime("%Y-%m-%d %H:%M:%S")
LATER = (datetime.now(UTC) + timedelta(days=90)).strftime("%Y-%m-%d %H:%M:%S")

Act = Callable[[], object]
Process = subprocess.Popen[bytes]


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

    def on_a_terminal(self, *words: str, columns: int = 200, at: str = "", then: Act = lambda: None) -> str:
        """What a person sees; standard output and error are a terminal. `then` is done once `at` is there."""
        front, back = pty.openpty()
        size = {"TERM": "xterm", "COLUMNS": f"{columns}", "NO_COLOR": "1"}
        try:
            with self._process(*words, stdin=back, stdout=back, stderr=back, more=size) as process:
                os.close(back)
                seen = _read_all(front, at, then)
                assert process.wait(PATIENCE) == 0, seen
        finally:
            os.close(front)
        return seen

    def in_a_pipe(self, *words: str, at: str, then: Act) -> str:
        """What a program reads. `then` is done once `at` is there."""
        with self._process(*words, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            seen = _read_all(process.stdout.fileno(), at, then)
            assert process.wait(PATIENCE) == 0, seen
        return seen

    @contextmanager
    def _process(self, *words: str, more: Mapping[str, str] | None = None, **files: int) -> Iterator[Process]:
        command = [sys.executable, "-m", "clients.command", *words]
        environment = os.environ | self.environment | dict(more or {})
        with subprocess.Popen(command, env=environment, **files) as process:  # type: ignore[call-overload]
            try:
                yield process
            finally:
                process.kill()


def _read_all(descriptor: int, at: str, then: Act) -> str:
    seen, waits = b"", bool(at)
    with suppress(OSError):  # Linux says so at the end of a terminal
        while block := os.read(descriptor, 65_536):
            seen += block
            if waits and at.encode() in seen:
                waits = False
                then()
    return seen.decode()


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
    assert shell.json("push", "--all", "--json", "Hello").keys() == {"msg_id"}
    assert "no target" in shell.refused("push", "--tag", "none", "--dry-run", "Hello")


async def test_a_dry_run_says_for_how_many_it_would_be(shell: Shell, phone: Any, tmp_path: Path) -> None:
    (tmp_path / "push").write_text('{"audience": {"registration_id": ["d"]}, "platform": ["android"]}')
    (tmp_path / "list").write_text("a\nc\n")

    def check() -> None:
        assert found("--all") == (4, 1)
        assert found("--all", "--platform", "ios") == (2, 0)
        assert found("--tag", "red", "--tag-not", "none") == (2, 0)
        assert found("--body", str(tmp_path / "push")) == (1, 1)
        segment = shell.json("segment", "create", "red", "--rule", "-", stdin='{"tag": "red"}')["id"]
        file_id = shell.json("file", "upload", str(tmp_path / "list"))["file_id"]
        assert found("--segment", segment, "--file", file_id) == (1, 0)

    def found(*words: str) -> tuple[int, int]:
        answer = shell.json("push", *words, "--dry-run", "Hello")
        assert answer.pop("valid") is True
        return answer["registered"], answer["online"]

    async with phone("d"):
        await asyncio.to_thread(check)


def test_withdraw(shell: Shell) -> None:
    msg_id = push_to(shell, "--all")
    assert shell.text("withdraw", msg_id) == ""
    assert shell.text("status", msg_id).startswith(
        f"message {msg_id}, for 3 devices: 0 delivered, 0 pending, 0 expired, 0 evicted, 3 recalled;"
    )
    assert "a  recalled" in shell.text("status", msg_id, "a")
    for words in (("withdraw", "1"), ("status", "1"), ("pushes", "show", "1")):
        assert "HTTP 404" in shell.refused(*words)


def test_status_says_why_a_device_does_not_have_it(shell: Shell) -> None:
    first, second = push_to(shell, "--all", "--ttl", "0"), push_to(shell, "--tag", "red")
    assert shell.json("status", first, "a", "nobody", "--json")["devices"] == {
        "a": "expired", "nobody": "not a device",
    }  # fmt: skip
    assert shell.text("status", second, "a", "c").splitlines()[1:] == ["a  pending", "c  not a target"]


def test_a_slow_push_is_controlled(shell: Shell) -> None:
    msg_id = push_to(shell, "--all", "--slow", "10")
    assert shell.json("pushes", "pause", msg_id, "--json")["state"] == "paused"
    assert shell.text("pushes", "resume", msg_id).startswith("let go")
    assert "of 3, stopped" in shell.text("pushes", "stop", msg_id)
    assert "code 1003" in shell.refused("pushes", "pause", msg_id)
    watched = shell.json("pushes", "watch", msg_id, "--json")
    assert (watched["msg_id"], watched["recalled"]) == (msg_id, 3)
    assert "stopped: 0 delivered, let go" in shell.text("pushes", "watch", msg_id)


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
    msg_id = push_to(shell, "--all")
    words = ("pushes", "watch", msg_id, "--every", "0.1")
    seen = shell.in_a_pipe(*words, at="sending", then=lambda: shell.text("withdraw", msg_id))
    assert "recalled    3" in seen
    at_first, at_last, account = seen.split("\n", 2)
    assert at_first[22:] == "sending: 0 delivered, 3 pending, of 3"
    assert at_last[22:] == "withdrawn: 0 delivered, 0 pending, of 3"
    assert account.startswith("state       withdrawn\n")


def test_watch_ends_when_all_was_let_go_where_one_wants_that(shell: Shell) -> None:
    msg_id = push_to(shell, "--all")
    assert "pending     3" in shell.text("pushes", "watch", msg_id, "--until", "released")


def paced(state: str | None, pending: int) -> PushReport:
    counts = dict.fromkeys(("online", "sent", *STATES, *RECEIPTS), 0) | {"target": 3, "pending": pending}
    progress = None if state is None else Progress(3, 1, None, state)
    facts: dict[str, Any] = {"sendno": "0", "state": "sending", "accepted_at": 0, "expires_at": 9, "parts": 1}
    return PushReport(msg_id=1, broadcast=True, progress=progress, **facts, **counts)


@pytest.mark.parametrize(
    ("state", "pending", "released", "settled", "by_default"),
    [
        (None, 3, True, False, False),
        (None, 0, True, True, True),
        ("waiting", 3, False, False, False),
        ("sending", 3, False, False, False),
        ("paused", 3, False, False, False),
        ("done", 3, True, False, True),
        ("expired", 3, True, False, True),
        ("stopped", 0, True, True, True),
    ],
)
def test_when_a_push_is_over(
    state: str | None, pending: int, released: bool, settled: bool, by_default: bool
) -> None:
    report = paced(state, pending)
    found = is_over(report, "released"), is_over(report, "settled"), is_over(report, None)
    assert found == (released, settled, by_default)


def test_a_line_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    show = Lines(lambda: "now")
    for report in (paced("sending", 3), paced("sending", 3), paced("sending", 2), paced("done", 2)):
        show(report)
    said = "now  sending: 0 delivered, let go 1"
    assert capsys.readouterr().out.splitlines() == [f"{said}, 3 pending, of 3", f"{said}, 2 pending, of 3"]


def test_a_watch_whose_reader_goes_away_ends_without_noise(shell: Shell) -> None:
    msg_id = push_to(shell, "--all")
    command = [sys.executable, "-m", "clients.command", "pushes", "watch", msg_id, "--every", "0.05"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=os.environ | shell.environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert b"3 pending" in process.stdout.readline()
        process.stdout.close()
        shell.text("withdraw", msg_id)
        assert (process.wait(PATIENCE), process.stderr.read()) == (1, b"")


@pytest.mark.parametrize(
    ("resolution", "said"),
    [
        (None, ""),
        (0, ""),
        (0.54, "1 s"),
        (1, "1 s"),
        (2, "1 min"),
        (60, "1 min"),
        (3600, "1 h"),
        (7200, "7200 s"),
    ],
)
def test_how_exact_a_step_is(resolution: float | None, said: str) -> None:
    assert _within(TraceStep("sent", 1.0, resolution)) == said


def test_a_group(server: LocalServer, app: AppKeys, shell: Shell) -> None:
    other = server.create_app("empty")
    key, secret = server.create_group("both", app.app_key, other.app_key)
    words = ("push", "--group", "--secret", secret, "--cid", "once", "--all", "Hello")
    result = shell.run(*words, "--app", key)
    assert shell.run(*words, "--app", f"group-{key}").stdout == result.stdout
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


@pytest.mark.parametrize(
    ("count", "unit", "start"),
    [
        (1, "hour", "2027-03-01 00"),
        (3, "hour", "2027-02-28 22"),
        (1, "day", "2027-03-01"),
        (7, "day", "2027-02-23"),
        (1, "month", "2027-03"),
        (3, "month", "2027-01"),
        (4, "month", "2026-12"),
        (16, "month", "2025-12"),
        (1000, "month", "1943-12"),
    ],
)
def test_the_last_hours_days_or_months_end_now(count: int, unit: str, start: str) -> None:
    assert start_of_last(count, unit, datetime(2027, 3, 1, 0, 30, tzinfo=UTC)) == start


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
    result = shell.json("push", "--all", "--body", "-", "Hello", stdin=json.dumps(body))
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
    ]
    assert shell.json("callbacks", "show", "--json") == {"waiting": 0, "parked": 0}
    assert shell.json("callbacks", "secret").keys() == {"signing_secret"}


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
        (("pushes", "show", "0"), "must be a positive whole number, as `holdfast push` prints it; got 0"),
        (("pushes", "show", "abc"), "got abc"),
        (("status", "9" * 19), "must be a positive whole number"),
        (("withdraw", "²"), "must be a positive whole number"),
        (("push", "--all", "--override", "x", "x"), "must be a positive whole number"),
        (("push", "--all", "--url", "htp:/foo", "x"), "'--url'"),
        (("push", "--all", "--url", "htp:/foo", "x"), "must be an http or https address"),
        (("report", "users", "--count", "1001"), "1001"),
        (("pushes", "watch", "1", "--until", "later"), "later"),
    ],
)
def test_wrong_usage_ends_with_2(shell: Shell, words: tuple[str, ...], told: str) -> None:
    assert told in shell.refused(*words, status=2)


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"quiet_hour": None}, "quiet_hour"),
        ({"quiet_hours": 5}, "quiet_hours"),
        ({"quiet_hours": {"start": "22:00", "end": "07:00", "acton": "delay"}}, "acton"),
        ({"frequency_caps": [{"count": 5, "per": "week"}]}, "hour, day"),
    ],
)
def test_wrong_settings_are_refused_and_change_nothing(
    shell: Shell, wanted: dict[str, object], told: str
) -> None:
    """A misspelt key, above all, which would reset what it was meant to change."""
    kept = shell.json("settings", "set", "-", stdin='{"frequency_caps": [{"count": 5}]}')
    result = shell.run("settings", "set", "-", stdin=json.dumps(wanted))
    assert (result.exit_code, result.stdout) == (1, "")
    assert told in result.stderr
    assert shell.json("settings", "show") == kept


def test_refusals_say_code_and_status(shell: Shell) -> None:
    assert shell.refused("segment", "list", "--secret", "wrong").endswith("(code 1004, HTTP 401)\n")
    assert "cannot be reached" in shell.refused("key", "list", "--url", "http://127.0.0.1:9")


def test_people_get_a_ruled_table_and_names_are_no_markup(shell: Shell) -> None:
    shell.json("key", "create", "[bold]fox[/bold]", "--scope", "push")
    seen = shell.on_a_terminal("key", "list")
    assert "───" in seen
    assert "[bold]fox[/bold]" in seen


def test_ids_and_times_are_whole_on_a_narrow_terminal(shell: Shell) -> None:
    words = ("--at", SOON, "--zone", "UTC", "--name", "the news of the week and of the day after it")
    schedule_id = shell.json("schedule", "create", "--all", *words, "Hello")["schedule_id"]
    for columns in (120, 80, 40):
        seen = shell.on_a_terminal("schedule", "list", columns=columns)
        assert schedule_id in seen
        assert SOON in seen
        assert "…" not in seen
        assert ("───" in seen) == (columns == 120)  # else fields
        assert (words[-1] in seen) == (columns != 120)  # there a name is broken instead


def test_people_see_the_progress_of_an_upload(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "names").write_text("a\n" * 10_000)
    seen = shell.on_a_terminal("file", "upload", str(tmp_path / "names"))
    assert "20.0/20.0 kB" in seen
    assert '{"file_id":' in seen


def test_people_see_how_far_a_push_is(shell: Shell) -> None:
    msg_id = push_to(shell, "--all")
    words = ("pushes", "watch", msg_id, "--every", "0.1")
    at = "sending: 0 delivered"
    seen = shell.on_a_terminal(*words, at=at, then=lambda: shell.text("withdraw", msg_id))
    assert at in seen
    assert "3/3" in seen
    assert seen.rstrip().endswith("dismissed   0")
