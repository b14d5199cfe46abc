"""What each cost may be: costs.toml has its value for each Python, and how far from that it may be."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

FILE: Final = Path(__file__).with_name("costs.toml")
PYTHON: Final = "{}.{}".format(*sys.version_info)
RENEW: Final = "python tests/costs/costs.py --write"
HEAD: Final = """\
# What the guarded paths cost, for each Python; `{}` measures and enters those of the one that runs it.
# Instructions and writes are exact, on any machine; bytes move by one or two.

# Up or down: what fell is entered, too, or it could rise again unnoticed.
[allowance]
share = {}
bytes = {}  # at least
"""


class Allowance(msgspec.Struct, frozen=True):
    share: float
    bytes: float

    def of(self, name: str, known: float) -> float:
        share = self.share * known
        return max(share, self.bytes) if name.endswith(".bytes") else share


def read() -> tuple[Allowance, dict[str, dict[str, float]]]:
    """The allowance, and by Python version the costs."""
    found = tomllib.loads(FILE.read_text())
    return msgspec.convert(found.pop("allowance"), Allowance), found


def compare(measured: Mapping[str, float]) -> dict[str, str]:
    """What is wrong, by the name of the cost; nothing, if all is as it was."""
    allowance, versions = read()
    known = versions.get(PYTHON)
    if known is None:
        return {"": f"{FILE.name} has no costs for Python {PYTHON}: {RENEW}"}
    wrong = {}
    for name in sorted(known.keys() | measured.keys()):
        if name not in known or name not in measured:
            is_, not_ = ("measured", "known") if name in measured else ("known", "measured")
            wrong[name] = f"{name} is {is_}, and not {not_}: {RENEW}"
        elif abs(measured[name] - known[name]) > (allowed := allowance.of(name, known[name])):
            wrong[name] = _explain(name, known[name], measured[name], allowed)
    return wrong


def _explain(name: str, known: float, now: float, allowed: float) -> str:
    path, unit = name.rsplit(".", 1)
    hint = f" Where: python tests/costs/costs.py --functions {path}." if unit == "instructions" else ""
    return (
        f"{path} cost {show(known)} {unit}, and costs {show(now)} now: {now - known:+.1f}, of which "
        f"{show(allowed)} are allowed.{hint} If it is meant so: {RENEW}"
    )


def show(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def write(measured: Mapping[str, float]) -> None:
    """Enter these as the costs with this Python."""
    allowance, versions = read()
    versions[PYTHON] = dict(measured)
    tables = [_table(version, versions[version]) for version in sorted(versions, key=_number)]
    FILE.write_text("\n".join([HEAD.format(RENEW, allowance.share, allowance.bytes), *tables]))


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _table(version: str, costs: Mapping[str, float]) -> str:
    lines = [f'"{name}" = {show(value)}' for name, value in costs.items()]
    return "\n".join([f'["{version}"]', *lines, ""])
