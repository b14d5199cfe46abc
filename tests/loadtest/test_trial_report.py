"""What is made of a trial: verdicts, what accuses the generator, text, plots and a page that a browser shows."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from rich.live import Live

from clients.local_server import LocalServer
from loadtest.histogram import Histogram
from loadtest.trial.bottleneck import accuse_connects, accuse_machine, accuse_process, accuse_schedule
from loadtest.trial.conductor import View
from loadtest.trial.limits import cores
from loadtest.trial.page import make_page, plots
from loadtest.trial.plot import Line, Plot, draw, nice_step
from loadtest.trial.progress import Lines, Living, facts
from loadtest.trial.results import Latency, Result, growth_of, read_result, write_result
from loadtest.trial.sampler import Process, Sample, Use
from loadtest.trial.scenarios import diurnal
from loadtest.trial.summary import show_memory, show_time, summarize
from loadtest.trial.thresholds import THRESHOLDS, judge, read_thresholds
from tests.loadtest.trial_world import play, small_plan, target_of

SAMPLE = Path(__file__).parents[2] / "configs/loadtest/thresholds.toml"


@pytest.fixture(scope="module")
def result(server: LocalServer) -> Result:
    """Of one trial."""
    return play(small_plan("targeted", rate=100.0, window=0.2), target_of(server))


def changed(result: Result, part: str, **values: Any) -> Result:
    """With other values in one part."""
    return msgspec.structs.replace(result, **{part: msgspec.structs.replace(getattr(result, part), **values)})


# JSON


def test_a_result_can_be_read_again(result: Result) -> None:
    assert read_result(write_result(result)) == result


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]"])
def test_another_json_is_none(text: bytes) -> None:
    with pytest.raises(ValueError):
        read_result(text)


def test_another_format_is_refused(result: Result) -> None:
    with pytest.raises(ValueError, match="its format is 2, and not 1"):
        read_result(write_result(msgspec.structs.replace(result, format=2)))


def test_growth_is_of_the_last_four_fifths() -> None:
    """What is there for the first time at the beginning is no growth; of 75 s, 60 count."""
    samples = [(1000.0 + second, 10**9 if second < 15 else 5000 + 1000 * second) for second in range(76)]
    assert growth_of(samples, 1000.0) == pytest.approx(3_600_000)
    assert growth_of(samples[:-1], 1000.0) is None
    assert growth_of([], 1000.0) is None


# Verdicts


@pytest.mark.parametrize("name", THRESHOLDS)
def test_every_threshold_can_be_met_and_missed(result: Result, name: str) -> None:
    least, most = judge(result, {name: 0.0})[0], judge(result, {name: 1e15})[0]
    if least.measured is None:
        assert name == "server_memory_growth"  # too short a trial
        assert not least.met
        assert not most.met
    elif THRESHOLDS[name].at_least:
        assert (least.met, most.met) == (True, False)
    else:
        assert most.met
        assert least.met == (least.measured == 0)


def test_what_is_lost_is_missed(result: Result) -> None:
    bad = changed(result, "deliveries", lost=3, arrived=9)
    verdicts = judge(bad, {"lost": 2, "lost_share": 0.3})
    assert [(one.measured, one.met) for one in verdicts] == [(3, False), (0.25, True)]
    assert "LOST" in summarize(bad)
    assert "  MISSED: lost: 3, wanted 2" in summarize(msgspec.structs.replace(bad, verdicts=verdicts))


def test_what_was_not_measured_is_missed(result: Result) -> None:
    bad = changed(result, "deliveries", latency=Latency(0, None, None, None, None, None))
    [verdict] = judge(bad, {"latency_p99": 1.0})
    assert (verdict.measured, verdict.met) == (None, False)


def test_the_sample_is_valid_and_says_something_of_each_scenario() -> None:
    for scenario in ("idle", "targeted", "mixed-day"):
        assert read_thresholds(SAMPLE, scenario)["lost"] == 0
    assert read_thresholds(SAMPLE, "mixed-day")["repeated"] == 100  # over that of [all]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[all]\nloss = 1", r"\[all\] loss is no threshold; there are lost, lost_share, "),
        ("[storm]\nlost = 1", r"\[storm\] is no scenario; there are \[all\] and idle, connect-storm"),
        ("lost = 1", r"\[lost\] is no scenario"),
        ("all = 1", r"all must be a table, \[all\]"),
        ("[all]\nlost = -1", r"\[all\] lost must be a number of 0 or more, and is -1"),
        ("[all]\nlost = nan", r"\[all\] lost must be a number of 0 or more, and is nan"),
        ("[all]\nlost = true", r"\[all\] lost must be a number of 0 or more, and is True"),
        ('[idle]\nlost = "1"', r"\[idle\] lost must be a number of 0 or more, and is '1'"),
        ("[all", "not valid TOML: "),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "thresholds.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=told):
        read_thresholds(file, "targeted")


# The generator


def _use(cpu: list[float], waited: float = 0.0, devices: int = 5) -> Use:
    return Use(Process("devices 0 to 4", 1, devices), cpu, [waited])


@pytest.mark.parametrize(
    ("use", "told"),
    [
        (_use([]), []),
        (_use([0.89] * 10), []),
        (_use([0.95] + [0.1] * 10), []),
        (
            _use([0.95, 0.92] + [0.1] * 18),
            [
                "devices 0 to 4: used 95% of a core, and 90% or more in 2 of 20 windows: "
                "more --processes would spread it"
            ],
        ),
        (_use([1.0], devices=0), ["devices 0 to 4: used 100% of a core, and 90% or more in 1 of 1 windows"]),
        (_use([0.1], 0.19), []),
        (_use([0.1], 0.2), ["devices 0 to 4: waited for a core 20% of the time: others use this machine"]),
    ],
)
def test_a_process_is_accused(use: Use, told: list[str]) -> None:
    assert accuse_process(use) == told


def test_a_late_schedule_is_accused() -> None:
    behind = Histogram()
    assert accuse_schedule(behind) == []
    for _ in range(99):
        behind.add(0.001)
    assert accuse_schedule(behind) == []
    behind.add(0.03)
    [line] = accuse_schedule(behind)
    assert line.startswith("publisher: one in a hundred pushes left 30 ms or more after it was due")
    assert accuse_connects("p", 0.24) == []
    assert accuse_connects("p", 0.3)[0].startswith("p: connects began up to 0.30 s after")


def test_a_machine_without_idle_cores_is_accused() -> None:
    before = Sample(10.0, 0, 0, machine_cpu=5.0)
    assert accuse_machine([before]) == []
    assert accuse_machine([before, Sample(12.0, 0, 0, machine_cpu=5.0 + 1.8 * cores())]) == []
    [line] = accuse_machine([before, Sample(12.0, 0, 0, machine_cpu=5.0 + 1.96 * cores())])
    assert line == "this machine: its cores were busy 98% of the time, whoever used them"


def test_the_accusation_is_in_the_summary_and_on_the_page(result: Result) -> None:
    bad = changed(result, "generator", bottleneck=["devices: too slow <b>"])
    assert "THE GENERATOR MAY BE THE LIMIT\n  devices: too slow <b>" in summarize(bad)
    assert "devices: too slow &lt;b&gt;" in make_page(bad)
    good = changed(result, "generator", bottleneck=[])
    assert "THE GENERATOR" not in summarize(good)
    assert "may be the limit" not in make_page(good)


# Text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0.000_25, "250 µs"), (0.0125, "12.5 ms"), (1.234, "1.23 s"), (1234.0, "1,234 s")],
)
def test_times_are_shown(seconds: float | None, shown: str) -> None:
    assert show_time(seconds) == shown


def test_sizes_are_shown() -> None:
    assert (show_memory(None), show_memory(2048), show_memory(-3 << 20)) == ("-", "2.0 KB", "-3.0 MB")


def test_the_summary_has_what_was_asked_and_found(result: Result) -> None:
    text = summarize(result)
    assert text.startswith("targeted: 30 devices against mqtt://127.0.0.1:")
    for line in ("online at the end", "from due to the device", "lost ", "CPU", "publisher "):
        assert line in text


def test_progress_is_a_line_for_each_phase_where_there_is_no_terminal() -> None:
    file = io.StringIO()
    lines = Lines(file)
    view = View("connect", 1.0, 2.0, 30, 10, 0, 0, 0, 0, 0.0, Histogram(), 0.0, 0.5, None)
    for phase in ("connect", "connect", "push"):
        lines.show(replace(view, phase=phase))
    assert [line.split("phase ")[1][:7] for line in file.getvalue().splitlines()] == ["connect", "push, 1"]
    assert "online 10 of 30; generator 50% of a core" in file.getvalue()


def test_a_terminal_has_a_table_that_lives() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Live(console=console, auto_refresh=False) as live:
        shown = Living(live, "targeted")
        for arrived in (1, 2):
            shown.show(View("push", 1.0, 2.0, 30, 30, 9, 8, 0, arrived, 0.0, Histogram(), 0.0, 0.5, None))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "targeted" in text
    assert text.index("1, 0 a second") < text.index("\x1b[1A") < text.index("2, 0 a second")


def test_the_display_shows_what_is_known() -> None:
    latencies = Histogram()
    latencies.add(0.01)
    full = View("push", 1.0, None, 30, 30, 9, 8, 1, 7, 3.0, latencies, 0.002, 0.5, 1 << 20)
    shown = dict(facts(full))
    assert shown["pushes"] == "9 sent, 8 accepted, 1 refused"
    assert shown["delivered"] == "7, 3 a second"
    assert shown["latency"].startswith("p50 10")
    assert (shown["behind"], shown["server"]) == ("2 ms", "1.0 MB")


# Plots and the page


def test_a_gap_parts_a_line_and_a_lonely_point_is_a_dot() -> None:
    line = Line("a", [(1, 2.0), (2, 3.0), (3, None), (4, 1.0), (5, None)])
    drawn = draw(Plot("p", "A & B", [line], str))
    assert len(re.findall("<polyline", drawn)) == 1
    assert len(re.findall("<circle", drawn)) == 1
    assert "A &amp; B" in drawn


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[0.0], [5.0], [0.0, 1e-6, 1e6], [3.0, 3.0]])
def test_every_point_is_in_the_picture(values: list[float], log: bool) -> None:
    points = list(enumerate(values))
    drawn = draw(Plot("p", "t", [Line("a", points)], str, log=log))
    places = re.findall(r'points="([^"]+)"', drawn) + re.findall(r'cx="([^"]+)" cy="([^"]+)"', drawn)
    assert places
    flat = " ".join(place if isinstance(place, str) else ",".join(place) for place in places)
    for x, y in (map(float, pair.split(",")) for pair in flat.split()):
        assert 80 <= x <= 884
        assert 28 <= y <= 208


@pytest.mark.parametrize(("least", "step"), [(0.9, 1), (1.0, 1), (1.1, 2), (2.1, 2.5), (30, 50), (0.06, 0.1)])
def test_steps_are_round(least: float, step: float) -> None:
    assert nice_step(least) == pytest.approx(step)


def test_a_plot_without_a_point_is_not_on_the_page(result: Result) -> None:
    idle = msgspec.structs.replace(
        result, windows=[msgspec.structs.replace(one, p50=None, p90=None, p99=None, p999=None, max=None)
                         for one in result.windows]
    )  # fmt: skip
    assert {plot.name for plot in plots(result) if plot.is_empty} == set()
    assert 'id="latency"' not in make_page(idle)


def test_the_page_needs_nothing_else(result: Result) -> None:
    page = make_page(result)
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import", page)


PROBE = """<script>
const found = [...document.querySelectorAll("svg")].map(svg => {
  const lines = [...svg.querySelectorAll("polyline, circle")].map(line => line.getBoundingClientRect());
  return svg.id + ":" + lines.filter(box => box.width > 0).length + ":" + (svg.getBoundingClientRect().width > 100);
});
document.title = "plots " + found.join(" ");
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium: apt-get install chromium")
def test_a_browser_draws_all_plots(result: Result, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(make_page(result).replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
    command = ["chromium", *flags, f"--user-data-dir={tmp_path}/profile", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search("<title>plots (.*?)</title>", shown)
    assert found, shown[:500]
    drawn = dict(plot.split(":", 1) for plot in found[1].split())
    assert drawn.keys() == {"latency", "connects", "throughput", "online", "memory", "cpu", "lost", "behind"}
    assert all(int(lines.split(":")[0]) > 0 and lines.endswith(":true") for lines in drawn.values()), drawn


# A day


def test_a_day_begins_and_ends_at_night_and_has_its_mean() -> None:
    rate = diurnal(100.0, 60.0)
    assert rate(0.0) == pytest.approx(10.0)
    assert rate(30.0) == pytest.approx(190.0)
    assert sum(rate(n / 10) for n in range(600)) / 600 == pytest.approx(100.0)
