"""docs/commands.md says what `--help` says, and its examples work."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from clients.command import GROUP, main
from clients.local_server import AppKeys, LocalServer
from clients.publisher import Publisher

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
SECTIONS = {match[1]: match[2] for match in re.finditer(r"(?ms)^## holdfast (\w+)\n(.*?)(?=^## |\Z)", PAGE)}
COMMON = {"--app", "--secret", "--url", "--help"}


def _commands() -> dict[str, click.Command]:
    points = entry_points(group=GROUP)
    return {point.name: point.load() for point in points if point.value.startswith("clients.")}


def _leaves(command: click.Command) -> Iterator[click.Command]:
    if isinstance(command, click.Group):
        for part in command.commands.values():
            yield from _leaves(part)
    else:
        yield command


def _options(command: click.Command) -> set[str]:
    names = {
        name
        for leaf in _leaves(command)
        for p in leaf.params
        if isinstance(p, click.Option)
        for name in p.opts
    }
    return names - COMMON


def test_each_command_of_ours_has_its_section() -> None:
    assert set(SECTIONS) == set(_commands())


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_names_the_options_and_parts_that_there_are(name: str) -> None:
    command, text = _commands()[name], SECTIONS[name]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) - COMMON
    # A section may show how another command uses what it is about.
    others = set().union(*(_options(one) for one in _commands().values()))
    assert _options(command) <= named
    assert named <= others
    if isinstance(command, click.Group):
        assert set(re.findall(rf"holdfast {name} (\w+)", text)) == set(command.commands)


NEEDS_ANSWERS = ("msg_id", "schedule_id", "segment_id", "file_id", "id")


class Story:
    """Runs the examples; MSG_ID and the like stand for those that were printed last."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        now = datetime.now(UTC)
        self._seen = {
            "NEXT_MONTH": f"{now + timedelta(days=30):%Y-%m-%d}",
            "NEXT_YEAR": f"{now + timedelta(days=330):%Y-%m-%d}",
            "LAST_WEEK": f"{now - timedelta(days=6):%Y-%m-%d}",
        }

    def run(self, line: str) -> None:
        for name, value in self._seen.items():
            line = re.sub(rf"\b{name}\b", value, line)
        result = CliRunner().invoke(main, shlex.split(line)[1:], env=self._environment)
        assert result.exit_code == 0, (line, result.output)
        if result.stdout.startswith("{"):
            self._remember(line, json.loads(result.stdout))

    def _remember(self, line: str, answer: dict[str, Any]) -> None:
        for name in NEEDS_ANSWERS:
            if isinstance(answer.get(name), str):
                key = "SEGMENT_ID" if name == "id" and " segment " in line else name.upper()
                self._seen[key] = answer[name]


@pytest.fixture
async def registered(publisher: Publisher) -> None:
    await publisher.register_device(
        "phone-1", platform="android", alias="ann", tags=["red"], attributes={"level": 7}
    )
    await publisher.register_device("phone-2", platform="ios")


def test_the_examples_work_in_order(
    server: LocalServer, app: AppKeys, registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rule.json").write_text('{"attribute": "level", "op": ">=", "value": 3}')
    Path("names.txt").write_text("phone-1\nphone-2\n")
    csv = PAGE[PAGE.index("    registration_id,platform") :].partition("\n\n")[0]
    Path("devices.csv").write_text(textwrap.dedent(csv))
    Path("settings.json").write_text('{"frequency_caps": [{"count": 5}]}')
    story = Story(
        {
            "HOLDFAST_APP_KEY": app.app_key,
            "HOLDFAST_MASTER_SECRET": app.master_secret,
            "HOLDFAST_URL": server.addresses.http,
        }
    )
    lines = [line for block in re.findall(r"(?s)```sh\n(.*?)```", PAGE) for line in block.splitlines()]
    assert len(lines) > 30
    for line in lines:
        story.run(line)
