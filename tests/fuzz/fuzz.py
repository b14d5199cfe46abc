"""Run a fuzz target for a time, guided by coverage (atheris): `python tests/fuzz/fuzz.py TARGET --seconds 60`.

What fails: an exception other than MQTTError, an input of more than TIME_LIMIT seconds, a process of more than
MEMORY_LIMIT MB. The input is kept in the corpus directory, which is named at the end; make it a row of
test_fuzz_rows.py.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
tests = types.ModuleType("tests")  # some distribution may bring a package of that name along
tests.__path__ = [str(ROOT / "tests")]
sys.modules["tests"] = tests

TARGETS = ("codec", "websocket", "node")
TIME_LIMIT = 10  # seconds for one input: a hang
MEMORY_LIMIT = 700  # MB: growth
MAX_INPUT = 2000  # bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--corpus", type=Path, default=ROOT / ".fuzz", help="inputs found so far (.fuzz)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        fuzz(asked.targets[0], asked.corpus, asked.seconds)
    return max([run(target, asked.corpus / target, asked.seconds) for target in asked.targets])


def run(target: str, corpus: Path, seconds: int) -> int:
    """In a process of its own: the fuzzer ends its process when it finds something, or is done."""
    corpus.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, target, "--corpus", str(corpus), "--seconds", str(seconds), "--here"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    (corpus / "log.txt").write_text(done.stderr)
    rate = re.findall(r"stat::number_of_executed_units: +(\d+)", done.stderr)
    covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", done.stderr)
    sys.stdout.write(
        f"{target}: {(rate or ['?'])[-1]} inputs, edges/features/corpus {(covered or ['?'])[-1]}\n"
    )
    if done.returncode:
        sys.stdout.write(done.stderr[-3000:] + f"\n{target} failed; the input is in {corpus.parent}\n")
    return done.returncode


def fuzz(target: str, corpus: Path, seconds: int) -> None:
    """Does not return."""
    import atheris

    with atheris.instrument_imports(include=["gateway", "broker.tenants.access"]):
        from tests.fuzz import seeds, targets
    seed_folder = corpus.parent / f"{target}-seeds"
    seed_folder.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds.of(target)):
        (seed_folder / str(number)).write_bytes(seed)
    flags = [
        f"-max_total_time={seconds}",
        f"-timeout={TIME_LIMIT}",
        f"-rss_limit_mb={MEMORY_LIMIT}",
        f"-max_len={MAX_INPUT}",
        f"-artifact_prefix={corpus.parent}/{target}-",
        "-print_final_stats=1",
        "-len_control=20",
    ]
    run_one = targets.Node() if target == "node" else getattr(targets, target)
    atheris.Setup([sys.argv[0], *flags, str(corpus), str(seed_folder)], run_one)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
