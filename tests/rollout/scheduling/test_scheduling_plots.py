"""Pictures say what the numbers say: written as SVG with their text as text, or read back pixel by pixel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import image

from rollout.scheduling.plots import Interval, delay_cdf, ratio_curve, timeline, waiting_share

HALF_WAITING = [Interval(0, "waiting", 0, 4), Interval(0, "running", 4, 5), Interval(0, "tool", 5, 8)]


@pytest.fixture(autouse=True)
def text_as_text() -> Any:
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        yield


def words(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def test_every_policy_is_named_in_the_delays_and_the_axis_has_numbers(tmp_path: Path) -> None:
    delays = {f"policy_{i}": [0.0, 1.0 + i, 40.0] for i in range(14)}  # more than there are colours; a delay of nothing
    delay_cdf(tmp_path / "d.svg", delays, "Delays")
    assert {*delays, "Delays", "p95", "1", "10"} <= set(words(tmp_path / "d.svg"))


def test_few_decades_get_more_numbers(tmp_path: Path) -> None:
    delay_cdf(tmp_path / "d.svg", {"fcfs": [8.0, 60.0]})
    assert {"10", "20", "50"} <= set(words(tmp_path / "d.svg"))


def test_timeline_tells_waiting_and_end_of_each_panel(tmp_path: Path) -> None:
    calm = [Interval(1, "running", 0, 2), Interval(1, "tool", 2, 4), Interval(1, "pinned", 2, 4)]
    timeline(tmp_path / "t.svg", {"fcfs": HALF_WAITING, "turnstile": calm}, "Programs")
    shown = words(tmp_path / "t.svg")
    assert "50% of job time is waiting · all done after 8 s" in shown
    assert "0% of job time is waiting · all done after 4 s" in shown
    assert {"fcfs", "turnstile", "running", "waiting", "tool", "KV cache pinned"} <= set(shown)


def test_states_that_do_not_occur_are_not_explained(tmp_path: Path) -> None:
    timeline(tmp_path / "t.svg", {"fcfs": HALF_WAITING})
    assert "KV cache pinned" not in words(tmp_path / "t.svg")


def test_pins_and_a_persons_pauses_are_no_time_of_jobs() -> None:
    assert waiting_share(HALF_WAITING) == 0.5
    assert waiting_share([*HALF_WAITING, Interval(0, "pinned", 5, 8), Interval(0, "person", 8, 99)]) == 0.5
    assert waiting_share([]) == 0.0


def test_a_timeline_is_as_wide_as_a_readme_however_many_programs(tmp_path: Path) -> None:
    for programs in (1, 300):
        intervals = [Interval(i, "running", i, i + 1) for i in range(programs)]
        timeline(tmp_path / "t.png", {"fcfs": intervals, "turnstile": intervals})
        height, width = image.imread(tmp_path / "t.png").shape[:2]
        assert width == 896 and height < 900


def test_ratios_name_their_sizes_as_fractions(tmp_path: Path) -> None:
    points = [(2.0, 1.8, 2.1), (1.5, 1.5000001, 1.6), (1.0, 0.9, 1.1)]  # rounding may put a median beyond its interval
    ratio_curve(tmp_path / "r.svg", [0.25, 0.5, 2.0], {"turnstile": points, "program_cap": points})
    assert {"1/4", "1/2", "2", "stock", "turnstile", "program_cap"} <= set(words(tmp_path / "r.svg"))


def test_data_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no delay for 'fcfs'"):
        delay_cdf(tmp_path / "x.png", {"fcfs": []})
    with pytest.raises(ValueError, match="no interval for \\['plas'\\]"):
        timeline(tmp_path / "x.png", {"fcfs": HALF_WAITING, "plas": []})
    with pytest.raises(ValueError, match="1 points for 'plas' and 2 sizes"):
        ratio_curve(tmp_path / "x.png", [1.0, 2.0], {"plas": [(1.0, 1.0, 1.0)]})
