"""`holdfast devices` on a real server."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from clients.command_devices import devices
from clients.device import Device, DeviceStopped
from clients.local_server import AppKeys, LocalServer
from clients.publisher import Publisher
from tests.patience import PATIENCE


class Shell:
    def __init__(self, server: LocalServer, app: AppKeys) -> None:
        self._environment = {
            "HOLDFAST_APP_KEY": app.app_key,
            "HOLDFAST_MASTER_SECRET": app.master_secret,
            "HOLDFAST_URL": server.addresses.http,
        }

    def run(self, *words: str, stdin: str = "") -> Result:
        return CliRunner().invoke(devices, words, env=self._environment, input=stdin)

    def text(self, *words: str, stdin: str = "") -> str:
        result = self.run(*words, stdin=stdin)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *words: str) -> Any:
        return json.loads(self.text(*words, "--json"))

    def refused(self, *words: str, stdin: str = "", status: int = 1) -> str:
        result = self.run(*words, stdin=stdin)
        assert (result.exit_code, result.stdout) == (status, ""), result.output
        return result.stderr


@pytest.fixture
def shell(server: LocalServer, app: AppKeys) -> Shell:
    return Shell(server, app)


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def lines(*rows: Any) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


@pytest.fixture
async def three(publisher: Publisher) -> None:
    await publisher.register_device("a", platform="android", alias="ann", tags=["red", "blue"])
    await publisher.register_device("b", platform="ios", alias="ann", tags=["red"])
    await publisher.register_device("c")


# One device


def test_a_device_is_changed_and_shown(shell: Shell, three: None) -> None:
    words = (
        "--add-tag",
        "green",
        "--add-tag",
        "big",
        "--remove-tag",
        "red",
        "--alias",
        "",
        "--mobile",
        "123",
    )
    values = ("age=41", "ratio=0.1", "paying=true", "app_version=2.9", 'code="41"', "city=Ulm an der Donau")
    given = [word for value in values for word in ("--attribute", value)]
    assert shell.text("set", "a", *words, *given) == ""
    assert shell.json("show", "a") == {
        "registration_id": "a",
        "alias": None,
        "mobile": "123",
        "tags": ["big", "blue", "green"],
        "attributes": {
            "age": 41, "ratio": 0.1, "paying": True, "app_version": "2.9", "code": "41", "city": "Ulm an der Donau",
        },
        "online": False,
        "last_online_time": None,
    }  # fmt: skip
    assert [line.split(maxsplit=1) for line in shell.text("show", "a").splitlines()] == [
        ["registration_id", "a"],
        ["alias"],
        ["mobile", "123"],
        ["tags", "big blue green"],
        ["online", "no"],
        ["last", "online"],
        ["attribute.age", "41"],
        ["attribute.app_version", "2.9"],
        ["attribute.city", "Ulm an der Donau"],
        ["attribute.code", '"41"'],
        ["attribute.paying", "true"],
        ["attribute.ratio", "0.1"],
    ]
    shell.text("set", "a", "--remove-attribute", "age", "--attribute", "paying=false", "--platform", "hmos")
    changed = shell.json("show", "a")["attributes"]
    assert ("age" in changed, changed["paying"]) == (False, False)
    assert shell.json("alias", "show", "ann") == ["b"]


def test_what_is_no_device_is_refused(shell: Shell, three: None) -> None:
    assert "no such device in this app: nobody (code 7002" in shell.refused("show", "nobody")
    assert "code 7002" in shell.refused("set", "nobody", "--alias", "x")
    assert "code 7002" in shell.refused("set", "a", "--mobile", "mine")


async def test_who_is_online(shell: Shell, server: LocalServer, app: AppKeys, publisher: Publisher) -> None:
    token = (await publisher.register_device("on")).token
    await publisher.register_device("off")
    host, port = server.addresses.mqtt
    async with Device(app.app_key, "on", on_push=print, token=token, host=host, port=port) as device:
        await device.connected()
        assert await asyncio.to_thread(lambda: shell.json("show", "on")["online"])
        assert await asyncio.to_thread(lambda: shell.json("status", "on", "off", "nobody")) == {
            "on": {"online": True, "last_online_time": None},
            "off": {"online": False, "last_online_time": None},
        }
        assert await asyncio.to_thread(lambda: table(shell.text("status", "on", "off", "nobody"))) == [
            ["device", "online", "last", "online"],
            ["on", "yes"],
            ["off", "no"],
            ["nobody", "not", "a", "device"],
        ]
        assert await asyncio.to_thread(lambda: shell.text("revoke", "on")) == ""
        with pytest.raises(DeviceStopped):
            await asyncio.wait_for(device.wait(), PATIENCE)


def test_status_of_more_than_one_call_takes(shell: Shell, three: None) -> None:
    names = [f"n{number}" for number in range(1500)]
    assert shell.json("status", *names, "a", "c").keys() == {"a", "c"}


# Import


def test_devices_are_imported(shell: Shell, tmp_path: Path) -> None:
    text = "registration_id,platform,alias,tags,attribute.level\na,ios,ann,red blue,3\nb,,,,\n"
    tokens = [json.loads(line) for line in shell.text("import", "-", stdin=text).splitlines()]
    assert [(row["registration_id"], set(row)) for row in tokens] == [
        ("a", {"registration_id", "token", "expires_at"}),
        ("b", {"registration_id", "token", "expires_at"}),
    ]
    found = shell.json("show", "a")
    assert (found["alias"], found["tags"], found["attributes"]) == ("ann", ["blue", "red"], {"level": 3})
    (tmp_path / "more").write_text(lines({"registration_id": "a", "alias": "eve"}, {"registration_id": "c"}))
    out = tmp_path / "tokens"
    done = shell.run("import", str(tmp_path / "more"), "--out", str(out))
    assert (json.loads(done.stdout), done.stderr) == ({"imported": 2}, "")
    assert [json.loads(line)["registration_id"] for line in out.read_text().splitlines()] == ["a", "c"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    found = shell.json("show", "a")
    assert (found["alias"], found["tags"]) == ("eve", ["blue", "red"])


def test_a_file_of_tokens_is_not_written_over(shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    out.write_text("precious")
    text = lines({"registration_id": "a"})
    assert "exists" in shell.refused("import", "-", "--out", str(out), stdin=text, status=2)
    assert out.read_text() == "precious"
    assert "code 7002" in shell.refused("show", "a")


def test_an_import_that_did_nothing_leaves_no_file(shell: Shell, tmp_path: Path) -> None:
    out = str(tmp_path / "tokens")
    shell.refused("import", "-", "--out", out, stdin="x\n", status=2)
    assert json.loads(shell.text("import", "-", "--out", out, stdin=fine(1))) == {"imported": 1}


def fine(count: int) -> str:
    return lines(*({"registration_id": f"i{number}"} for number in range(count)))


@pytest.mark.parametrize(
    ("bad", "status", "told"),
    [
        ("x\n", 2, "FILE: line 1003: JSON is malformed"),
        ('{"registration_id": "x", "platform": "palm"}\n', 1, "line 1003: platform: must be one of"),
        ('{"registration_id": "x", "alias": "a b"}\n', 1, "line 1003: alias: "),
    ],
)
def test_nothing_of_the_batch_of_a_bad_line_happens(shell: Shell, bad: str, status: int, told: str) -> None:
    result = shell.run("import", "-", stdin=fine(1002) + bad)
    assert (result.exit_code, told in result.stderr) == (status, True), result.stderr
    assert "the 1000 devices before this batch are imported" in result.stderr
    assert [json.loads(line)["registration_id"] for line in result.stdout.splitlines()] == [
        f"i{number}" for number in range(1000)
    ]
    assert shell.json("status", "i999", "i1000", "i1001", "x").keys() == {"i999"}


def test_a_refusal_that_names_no_device_names_the_lines(shell: Shell) -> None:
    told = shell.run("import", "-", "--secret", "wrong", stdin=fine(3)).stderr
    assert "lines 1 to 3: " in told
    assert "no device is imported" in told


@pytest.mark.parametrize("text", ["", "registration_id\n"])
def test_a_file_without_devices_is_wrong_usage(shell: Shell, text: str) -> None:
    assert "there is no device in it" in shell.refused("import", "-", stdin=text, status=2)


# Tags and aliases


def test_tags(shell: Shell, three: None) -> None:
    assert table(shell.text("tags", "list")) == [["tag"], ["blue"], ["red"]]
    assert shell.json("tags", "list") == ["blue", "red"]
    assert shell.json("tags", "members", "red") == {"registered": 2, "online": 0}
    assert table(shell.text("tags", "members", "red")) == [["registered", "2"], ["online", "0"]]
    assert table(shell.text("tags", "members", "red", "a", "c", "nobody")) == [
        ["device", "has", "it"],
        ["a", "yes"],
        ["c", "no"],
        ["nobody", "not", "a", "device"],
    ]
    assert shell.json("tags", "members", "red", "b", "--add", "c", "--remove", "a") == {
        "c": True,
        "a": False,
        "b": True,
    }
    assert "code 7002" in shell.refused("tags", "members", "red", "--add", "a", "--add", "nobody")
    assert shell.json("tags", "members", "red", "a") == {"a": False}
    shell.text("tags", "delete", "red", "--platform", "android", "--platform", "other")
    assert shell.json("tags", "members", "red", "b", "c") == {"b": True, "c": False}
    shell.text("tags", "delete", "red")
    assert shell.json("tags", "list") == ["blue"]
    shell.text("tags", "delete", "blue")
    assert shell.text("tags", "list") == "no tags\n"


def test_aliases(shell: Shell, three: None) -> None:
    assert table(shell.text("alias", "show", "ann")) == [["device"], ["a"], ["b"]]
    assert shell.json("alias", "show", "ann") == ["a", "b"]
    assert shell.json("alias", "show", "ann", "--platform", "ios") == ["b"]
    shell.text("alias", "delete", "ann", "--platform", "ios")
    assert shell.json("alias", "show", "ann") == ["a"]
    shell.text("alias", "delete", "ann")
    assert shell.text("alias", "show", "ann") == "no devices\n"


# All of them


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("set", "a"), "say what to change"),
        (("set", "a", "--attribute", "x"), "must be NAME=VALUE"),
        (("set", "a", "--attribute", "=x"), "must be NAME=VALUE"),
        (("set", "a", "--attribute", "x="), "must be NAME=VALUE"),
        (("set", "a", "--attribute", "x=1", "--remove-attribute", "x"), "both name x"),
        (("set", "a", "--platform", "palm"), "palm"),
        (("status",), "Missing argument"),
        (("import", "/nonexistent"), "nonexistent"),
    ],
)
def test_wrong_usage_ends_with_2(shell: Shell, words: tuple[str, ...], told: str) -> None:
    assert told in shell.refused(*words, status=2)
