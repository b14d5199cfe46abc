from __future__ import annotations

import subprocess
import sys

from tests.patience import PATIENCE


def test_the_demo_is_true() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "clients.demo"],
        capture_output=True,
        text=True,
        timeout=10 * PATIENCE,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "All of this was true." in ended.stdout
