"""Measure what the guarded paths cost: `python tests/costs/costs.py`. docs/decisions/0027-cost-guard.md says how.

Prints each cost, and how much it differs from costs.toml.
"""

from __future__ import annotations

import argparse
import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import orjson

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
tests = types.ModuleType("tests")  # some distribution may bring a package of that name along
tests.__path__ = [str(ROOT / "tests")]
sys.modules["tests"] = tests

from tests.costs import limits  # noqa: E402 - it is found now
from tests.costs.paths import measure  # noqa: E402

MOST_FUNCTIONS = 40


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--write", action="store_true", help=f"enter them in {limits.FILE.name}")
    how.add_argument("--json", action="store_true", help="print nothing else, as JSON")
    how.add_argument(
        "--functions", metavar="PATH", help="which functions the instructions of this one are of"
    )
    asked = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of a set is an order of instructions
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    bill = measure()
    if asked.json:
        sys.stdout.buffer.write(orjson.dumps(bill.costs))
    elif asked.functions is None:
        print_costs(bill.costs)
    elif asked.functions in bill.functions:
        print_functions(bill.functions[asked.functions])
    else:
        parser.error(f"--functions: must be one of {', '.join(bill.functions)}, not {asked.functions}")
    if asked.write:
        limits.write(bill.costs)
    return 0


def print_costs(costs: Mapping[str, float]) -> None:
    known = limits.read()[1].get(limits.PYTHON, {})
    for name, value in costs.items():
        before = known.get(name)
        change = f"{value / before - 1:+8.1%}" if before else "     new"
        sys.stdout.write(f"{limits.show(value):>9} {change}  {name}\n")


def print_functions(functions: Mapping[str, float]) -> None:
    ranked = sorted(functions.items(), key=lambda entry: -entry[1])
    for function, count in ranked[:MOST_FUNCTIONS]:
        if count:
            sys.stdout.write(f"{count:9.1f}  {function}\n")


if __name__ == "__main__":
    sys.exit(main())
