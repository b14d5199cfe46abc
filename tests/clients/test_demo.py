from __future__ import annotations

import subprocess
import sys


def test_the_demo_is_true() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "clients.demo"], capture_output=True, text=True, timeout=90, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "All of this was true." in ended.stdout
