"""The requirement index: each normative statement of MQTT 3.1.1 and 5.0 (appendix B of both), and what holds it.

The data are `mqtt311.toml` and `mqtt5.toml`; docs/conformance.md is made of them:

    python tests/gateway/conformance/requirements.py --write
"""

from __future__ import annotations

import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[2]
PAGE: Final = ROOT / "docs/conformance.md"
VERSIONS: Final = {"MQTT311": "mqtt311.toml", "MQTT5": "mqtt5.toml"}
HEADINGS: Final = {"MQTT311": "MQTT 3.1.1", "MQTT5": "MQTT 5.0"}

INTRODUCTION: Final = """\
# Conformance

Each normative statement of MQTT 3.1.1 and 5.0 (appendix B of both), in our words, with the tests that hold it or the
reason why there is none. Where only a client can break a statement, the test shows what the server does with one that
does. The data are `mqtt311.toml` and `mqtt5.toml` in `tests/gateway/conformance/`. This page is made of them:

    python tests/gateway/conformance/requirements.py --write

`test_requirement_index.py`, in the same folder, holds the page against the data, and the data against the tests. A
test is named by its file and function: `grep -rn <function> tests` leads to it.
"""


@dataclass(frozen=True, slots=True)
class Statement:
    id: str  # without the version: "3.1.2-22"
    about: str
    tests: tuple[str, ...]  # "path/to/test_file.py::test_name"
    why: str  # why there are none


def statements(version: str) -> list[Statement]:
    rows = tomllib.loads((HERE / VERSIONS[version]).read_text())["statement"]
    return [
        Statement(row["id"], row["about"], tuple(row.get("tests", ())), row.get("why", "")) for row in rows
    ]


def page() -> str:
    return INTRODUCTION + "".join(_section(version) for version in VERSIONS)


def _section(version: str) -> str:
    rows = statements(version)
    tested = sum(bool(row.tests) for row in rows)
    lines = [
        f"\n## {HEADINGS[version]}\n",
        f"{len(rows)} statements: {tested} with tests, {len(rows) - tested} with a reason.\n",
        "| statement | what it asks for | held by |",
        "|---|---|---|",
        *(f"| {version}-{row.id} | {row.about} | {_held_by(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _held_by(row: Statement) -> str:
    """The tests by file: "test_conform_will: test_one, test_two; test_mqtt_rows: test_three"."""
    by_file: dict[str, list[str]] = {}
    for test in row.tests:
        path, _, name = test.partition("::")
        by_file.setdefault(Path(path).stem, []).append(name)
    return "; ".join(f"{file}: {', '.join(names)}" for file, names in by_file.items()) or row.why


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/gateway/conformance/requirements.py --write")
    PAGE.write_text(page())
