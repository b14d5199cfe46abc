"""What the repository says about itself is true."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest

from broker.config import KEYS

ROOT = Path(__file__).parent.parent
PACKAGES = ("broker", "clients", "gateway", "loadtest")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def _sources(package: str) -> Iterator[Path]:
    return (ROOT / package).rglob("*.py")


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = file.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def _block_paths(text: str) -> Iterator[str]:
    """Paths of the folder list in ARCHITECTURE.md: a name at the line's start, what is under it indented."""
    folder = ""
    for line in text.split("```")[1].splitlines():
        if found := re.match(r"( *)(\S+)  ", line):
            folder = found[2] if not found[1] else folder
            yield found[2] if not found[1] else folder + found[2]


def test_each_path_in_the_architecture_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    paths = [*_block_paths(text), *re.findall(r"[\w/]+\.(?:py|md|toml)\b", text)]
    assert len(paths) > 20
    known = [str(path) for path in ROOT.rglob("*.*") if ".venv" not in path.parts]
    missing = [p for p in paths if not (ROOT / p).exists() and not any(k.endswith(f"/{p}") for k in known)]
    assert missing == []


def test_the_architecture_fits_on_one_screen() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 60


ALLOWED = {
    "gateway/mqtt": ("gateway.mqtt",),
    "gateway": ("gateway", "broker"),
    "broker": ("broker",),
    "clients": ("clients", "gateway.mqtt"),
    "loadtest": ("loadtest", "clients", "gateway.mqtt"),
}


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_follow_the_arrows(folder: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}: {module}"
        for file in _sources(folder)
        for module in _imports(file)
        if any(_within(module, package) for package in PACKAGES)
        and not any(_within(module, package) for package in ALLOWED[folder])
    ]
    assert wrong == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_make_targets_have_help_and_those_in_the_documents_exist() -> None:
    listed = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    targets = {line.split()[0] for line in listed.splitlines()}
    wanted = "help setup run demo check test bench bench-peers lab fuzz clean"
    assert targets == set(wanted.split())
    used = re.findall(r"(?m)^make ([\w-]+)|`make ([\w-]+)", "\n".join(d.read_text() for d in DOCUMENTS))
    assert {first or second for first, second in used} <= targets


def _commands() -> dict[str, click.Command]:
    table = PYPROJECT["project"]["entry-points"]["holdfast.commands"]
    return {name: EntryPoint(name, value, "holdfast.commands").load() for name, value in table.items()}


def test_each_holdfast_command_in_the_documents_exists() -> None:
    commands = _commands()
    for document in DOCUMENTS:
        for name, second in re.findall(
            r"(?m)(?:^|`)holdfast ([a-z]+)(?: ([a-z][a-z-]*))?", document.read_text()
        ):
            assert name in commands, f"{document.name}: holdfast {name}"
            command = commands[name]
            if isinstance(command, click.Group) and second:
                assert second in command.commands, f"{document.name}: holdfast {name} {second}"


def test_each_setting_in_the_documents_exists() -> None:
    sections = "|".join({key.section for key in KEYS.values()})
    for document in DOCUMENTS:
        for path in re.findall(rf"`((?:{sections})\.(?!json)[a-z_]+)(?: = [^`]*)?`", document.read_text()):
            assert path in KEYS, f"{document.name}: {path}"


def test_each_setting_is_used() -> None:
    code = "".join(file.read_text() for package in ("broker", "gateway") for file in _sources(package))
    assert [path for path, key in KEYS.items() if not re.search(rf"\.{key.name}\b", code)] == []


def _metric_names() -> set[str]:
    """As the code declares them: without prefix and suffix."""
    declared = r'metrics\.(?:counters?|histograms?|gauge|read_counter)\(\s*"([a-z_]+)"'
    code = "".join(file.read_text() for package in ("broker", "gateway") for file in _sources(package))
    return set(re.findall(declared, code))


def test_the_catalogue_of_metrics_is_complete() -> None:
    text = (ROOT / "docs/operating.md").read_text()
    rows = set(re.findall(r"(?m)^\| ([a-z_]+) \|", text.split("## Metrics")[1].split("## Alerts")[0]))
    assert rows - {"metric"} == _metric_names()


def test_alerts_use_metrics_that_exist_and_say_what_to_do() -> None:
    rules = (ROOT / "configs/prometheus/alerts.yml").read_text()
    names = _metric_names()
    for used in re.findall(r"holdfast_([a-z_]+?)(?:_total|_bucket|_count|_sum)?[\[{]", rules):
        assert used in names
    told = re.findall(r"(?m)^\| (Holdfast\w+) \|", (ROOT / "docs/operating.md").read_text())
    assert told == re.findall(r"alert: (\w+)", rules)


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool: apt-get install prometheus")
def test_promtool_accepts_the_prometheus_files() -> None:
    folder = ROOT / "configs/prometheus"
    for check in (["config", "prometheus.yml"], ["rules", "alerts.yml"]):
        done = subprocess.run(
            ["promtool", "check", *check], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_changelog_begins_with_what_is_not_released_or_with_this_version() -> None:
    first = re.findall(r"(?m)^## (.+)$", (ROOT / "CHANGELOG.md").read_text())[0]
    assert first == "Unreleased" or first.startswith(PYPROJECT["project"]["version"])


def test_decisions_are_numbered_without_gaps_and_say_when_to_change_them() -> None:
    records = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [int(record.name[:4]) for record in records] == list(range(1, len(records) + 1))
    for record in records:
        text = record.read_text()
        assert text.startswith(f"# {record.name[:4]} "), record.name
        for heading in ("## Context", "## Choice", "## What would make us change it"):
            assert heading in text, record.name


def test_each_dependency_has_its_reason() -> None:
    reasons = (ROOT / "docs/decisions/0001-dependencies.md").read_text()
    names = [re.split(r"[>=<]", line)[0] for line in PYPROJECT["project"]["dependencies"]]
    assert [name for name in names if f"| {name} |" not in reasons] == []


def test_scripts_of_ci_can_run() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


def test_the_systemd_unit_gives_a_stop_more_time_than_the_drain() -> None:
    unit = (ROOT / "configs/systemd/holdfast.service").read_text()
    [limit] = re.findall(r"TimeoutStopSec=(\d+)", unit)
    assert int(limit) > KEYS["server.drain_limit"].default


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
