"""Alerts fire when they should, and not before."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

RULES: Final = Path(__file__).parent.parent / "configs/prometheus/alerts.yml"
NODE: Final = 'instance="a:8081",job="holdfast"'

# Alert; series as promtool writes them (value, growth in 15 s, how often); minutes; does it fire; labels of the alert
ROWS: Final = [
    ("HoldfastDown", {"up": "0x40"}, 2, True, {}),
    ("HoldfastDown", {"up": "1x40"}, 2, False, {}),
    ("HoldfastNodeLost", {"holdfast_node_lapses_total": "0x20 1x20"}, 6, True, {}),
    ("HoldfastNodeLost", {"holdfast_node_lapses_total": "3x40"}, 6, False, {}),
    ("HoldfastRedisRefuses", {"holdfast_node_beats_failed_total": "0+10x40"}, 4, True, {}),
    ("HoldfastRedisRefuses", {"holdfast_node_beats_failed_total": "0x20 2x20"}, 8, False, {}),
    ("HoldfastDoorbellsMissed", {"holdfast_doorbells_missed_total": "0+3x100"}, 20, True, {}),
    ("HoldfastDoorbellsMissed", {"holdfast_doorbells_missed_total": "0x40 5x60"}, 20, False, {}),
    ("HoldfastLogNotSpread", {"holdfast_logs_left_total": "0+1x100"}, 20, True, None),
    ("HoldfastLogNotSpread", {"holdfast_logs_left_total": "0x40 2x60"}, 20, False, None),
    ("HoldfastWorkersDie", {"holdfast_worker_restarts_total": "0x20 5x60"}, 8, True, {}),
    ("HoldfastWorkersDie", {"holdfast_worker_restarts_total": "0x20 1x60"}, 8, False, {}),
    ("HoldfastWorkerDown", {"holdfast_worker_up": "1x10 0x40"}, 6, True, {"worker": "a-1"}),
    ("HoldfastWorkerDown", {"holdfast_worker_up": "1x10 0x4 1x40"}, 6, False, {"worker": "a-1"}),
    ("HoldfastStoreRefuses", {"holdfast_store_failed_commits_total": "0+1x40"}, 8, True, {}),
    (
        "HoldfastFilesRunOut",
        {"process_open_fds": "950x40", "process_max_fds": "1000x40"},
        8,
        True,
        {},
    ),
    ("HoldfastCallbacksParked", {"holdfast_callbacks_parked": "3x100"}, 20, True, {}),
    ("HoldfastSchedulesMissed", {"holdfast_schedules_missed_total": "0x20 2x60"}, 8, True, {}),
]


def _series(name: str, labels: dict[str, str] | None) -> str:
    more = "".join(f',{key}="{value}"' for key, value in (labels or {}).items())
    return f"{name}{{{NODE}{more}}}"


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool: apt-get install prometheus")
@pytest.mark.parametrize(
    ("alert", "series", "minutes", "fires", "labels"), ROWS, ids=[f"{row[0]}-{row[3]}" for row in ROWS]
)
def test_an_alert_fires(
    tmp_path: Path,
    alert: str,
    series: dict[str, str],
    minutes: int,
    fires: bool,
    labels: dict[str, str] | None,
) -> None:
    expression = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
    expected = [{"labels": "{}", "value": 1}] if fires else []
    test: dict[str, Any] = {
        "interval": "15s",
        "input_series": [
            {"series": _series(name, labels), "values": values} for name, values in series.items()
        ],
        "promql_expr_test": [{"expr": expression, "eval_time": f"{minutes}m", "exp_samples": expected}],
    }
    file = tmp_path / "test.yml"  # JSON is YAML
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "15s", "tests": [test]}))
    done = subprocess.run(
        ["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
