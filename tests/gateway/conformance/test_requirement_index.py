"""The requirement index is complete, and what it names exists."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.gateway.conformance.requirements import HERE, PAGE, ROOT, VERSIONS, page, statements

# How many statements each section has, in the order of appendix B: "3.1.2:24" is 3.1.2-1 to 3.1.2-24. MQTT 5 has no
# 2.2.1-1.
SECTIONS: Final = {
    "MQTT311": """
        1.5.3:3 2.2.2:2 2.3.1:7
        3.1.0:2 3.1.2:24 3.1.3:11 3.1.4:5 3.2.0:1 3.2.2:6 3.3.1:12 3.3.2:3 3.3.4:1 3.3.5:2 3.6.1:1 3.8.1:1 3.8.3:4
        3.8.4:6 3.9.3:2 3.10.1:1 3.10.3:2 3.10.4:6 3.12.4:1 3.14.1:1 3.14.4:3
        4.1.0:2 4.3.1:1 4.3.2:2 4.3.3:2 4.4.0:1 4.5.0:2 4.6.0:6 4.7.1:3 4.7.2:1 4.7.3:4 4.8.0:2
        6.0.0:4 7.0.0:2 7.1.1:1 7.1.2:1
    """,
    "MQTT5": """
        1.5.4:3 1.5.5:1 1.5.7:1 2.1.3:1 2.2.1:2-6 2.2.2:1
        3.1.0:2 3.1.2:30 3.1.3:12 3.1.4:6 3.2.0:2 3.2.2:22 3.3.1:13 3.3.2:20 3.3.4:10 3.4.2:3 3.5.2:3 3.6.1:1 3.6.2:3
        3.7.2:3 3.8.1:1 3.8.3:5 3.8.4:8 3.9.2:2 3.9.3:2 3.10.1:1 3.10.3:2 3.10.4:6 3.11.2:2 3.11.3:2 3.12.4:1 3.14.0:1
        3.14.1:1 3.14.2:4 3.14.4:3 3.15.1:1 3.15.2:3
        4.1.0:2 4.2.0:1 4.3.1:1 4.3.2:5 4.3.3:13 4.4.0:2 4.5.0:2 4.6.0:6 4.7.0:1 4.7.1:2 4.7.2:1 4.7.3:4 4.8.2:6
        4.9.0:3 4.12.0:7 4.12.1:2 4.13.1:1 4.13.2:1 6.0.0:4
    """,
}
MAX_WORDS: Final = 12  # of `about`: what it asks for, not the statement again
ID: Final = r"\d+\.\d+\.\d+-\d+"
# "MQTT5-3.1.2-1, -2", "MQTT311-3.2.0-1, 3.2.2-1", "MQTT5-3.4.2-1 to -3": all of them.
MENTION: Final = re.compile(rf"(MQTT5|MQTT311)-({ID}(?:(?:,\s+|\s+to\s+)(?:{ID}|-\d+\b))*)")
CHAPTERS: Final = sorted(HERE.glob("test_conform_*.py"))

both = pytest.mark.parametrize("version", VERSIONS)


def _expected(version: str) -> Iterator[str]:
    for part in SECTIONS[version].split():
        section, _, numbers = part.partition(":")
        first, _, last = numbers.rpartition("-")
        yield from (f"{section}-{number}" for number in range(int(first or 1), int(last) + 1))


@both
def test_the_index_has_every_statement_in_order(version: str) -> None:
    assert [row.id for row in statements(version)] == list(_expected(version))


def test_the_counts_are_those_of_the_specifications() -> None:
    assert [len(list(_expected(version))) for version in VERSIONS] == [141, 251]


@both
def test_each_statement_has_tests_or_a_reason(version: str) -> None:
    assert [row.id for row in statements(version) if bool(row.tests) == bool(row.why)] == []
    assert [row.id for row in statements(version) if len(set(row.tests)) != len(row.tests)] == []


@both
def test_each_statement_is_in_a_few_words_of_ours(version: str) -> None:
    assert [row.id for row in statements(version) if not 0 < len(row.about.split()) <= MAX_WORDS] == []
    assert [row.id for row in statements(version) if re.search(r"\b(MUST|SHOULD|MAY)\b", row.about)] == []


@both
def test_each_test_exists(version: str) -> None:
    named = {test for row in statements(version) for test in row.tests}
    assert sorted(test for test in named if test not in _tests_in(test.partition("::")[0])) == []


@functools.cache
def _tests_in(path: str) -> frozenset[str]:
    """As pytest names them, without parameters; those in classes as `path::Class::name`."""
    file = ROOT / path
    if not file.is_file():
        return frozenset()
    return frozenset(f"{path}::{name}" for name in _test_names(ast.parse(file.read_text()).body))


def _test_names(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node.name
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield from (f"{node.name}::{name}" for name in _test_names(node.body))


def test_a_test_that_is_not_there_is_noticed() -> None:
    here = Path(__file__).relative_to(ROOT).as_posix()
    assert f"{here}::test_a_test_that_is_not_there_is_noticed" in _tests_in(here)
    assert f"{here}::test_that_never_was" not in _tests_in(here)
    assert _tests_in("tests/test_of_nothing.py") == frozenset()
    assert list(_test_names(ast.parse("class TestA:\n    async def test_b(self): ...").body)) == [
        "TestA::test_b"
    ]


def test_each_statement_that_the_code_names_exists() -> None:
    known = {f"{version}-{name}" for version in VERSIONS for name in _expected(version)}
    wrong = [
        f"{file.relative_to(ROOT)}: {name}"
        for folder in ("gateway", "clients", "tests/gateway")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for name in _mentions(file.read_text())
        if name not in known
    ]
    assert wrong == []


def _mentions(text: str) -> Iterator[str]:
    """`MQTT5-3.1.2-1, -2` names two statements, `-1 to -3` three."""
    for version, names in MENTION.findall(re.sub(r"\s*\n\s*#?\s*", " ", text)):
        section, last = "", 0
        for separator, name in re.findall(rf"(,\s+|\s+to\s+|^)({ID}|-\d+)", names):
            section = section if name.startswith("-") else name.rpartition("-")[0]
            number = int(name.rpartition("-")[2])
            for each in range(last + 1 if separator.strip() == "to" else number, number + 1):
                yield f"{version}-{section}-{each}"
            last = number


def test_statements_are_found_in_comments() -> None:
    text = "# MQTT5-3.1.2-1, -2, 3.2.0-1;\n# MQTT311-3.1.4-1, -3 to\n#   -5. MQTT5-3.1.2.3 is none, nor is 3.1.2-9"
    assert list(_mentions(text)) == [
        *("MQTT5-3.1.2-1", "MQTT5-3.1.2-2", "MQTT5-3.2.0-1"),
        *("MQTT311-3.1.4-1", "MQTT311-3.1.4-3", "MQTT311-3.1.4-4", "MQTT311-3.1.4-5"),
    ]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_the_index_and_the_docstrings_name_each_other(chapter: Path) -> None:
    path = chapter.relative_to(ROOT).as_posix()
    told = {
        (f"{path}::{node.name}", name)
        for node in ast.parse(chapter.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        for name in _mentions(ast.get_docstring(node) or "")
    }
    listed = {
        (test, f"{version}-{row.id}")
        for version in VERSIONS
        for row in statements(version)
        for test in row.tests
        if test.startswith(f"{path}::")
    }
    assert {"only in the docstring": told - listed, "only in the index": listed - told} == {
        "only in the docstring": set(),
        "only in the index": set(),
    }


def test_the_page_is_what_the_index_says() -> None:
    assert PAGE.read_text() == page(), "run: python tests/gateway/conformance/requirements.py --write"
