"""Pictures of what a policy does, as wide as a README: delays, a timeline of programs, ratios to stock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rollout.plots import BLUE, GREY, ORANGE

WIDTH, DPI = 6.4, 140  # 896 pixels
SHORTEST = 1e-3  # s; a log axis has no zero
# Okabe and Ito's colours, which stay apart for the colour-blind; then again with another dash.
COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":")
OURS, STOCK = "turnstile", "fcfs"  # look the same in every picture
State = Literal["running", "waiting", "tool", "person", "pinned"]
STATES: dict[State, str] = {
    "running": BLUE,
    "waiting": ORANGE,
    "tool": "#d3d8df",
    "person": "#f4ead2",
    "pinned": "#222222",
}
WORDS = {"person": "person's pause", "pinned": "KV cache pinned"}
SMALL = {"fontsize": 8, "color": "#555555", "va": "center"}


class Interval(NamedTuple):
    """One program in one state. ``pinned`` lies over another state as a thin line. Times in seconds."""

    program: int
    state: State
    start: float
    end: float


def delay_cdf(path: Path, delays: Mapping[str, Sequence[float]], title: str = "") -> None:
    """Share of jobs by delay (job time − gaps, s), one curve a policy. Delays below 1 ms are drawn there."""
    from matplotlib.ticker import LogLocator

    figure, (axis,) = _rows(1, 3.3)
    for (policy, values), look in zip(delays.items(), looks(delays), strict=True):
        if not values:
            raise ValueError(f"delay_cdf: no delay for {policy!r}; leave it out")
        ordered = sorted(max(value, SHORTEST) for value in values)
        shares = [i / len(ordered) for i in range(len(ordered) + 1)]
        axis.step([ordered[0], *ordered], shares, where="post", label=policy, **look)
    axis.axhline(0.95, color=GREY, linewidth=1, linestyle=":", zorder=1)
    axis.annotate("p95", (1, 0.95), xycoords="axes fraction", xytext=(4, 0), textcoords="offset points", **SMALL)
    axis.set(xscale="log", xlabel="delay of a job: job time − tool time (s)", ylabel="share of jobs", ylim=(0, 1.005))
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 500 else (1,)))  # few decades: more labels
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    _finish(figure, path, title)


def timeline(path: Path, panels: Mapping[str, Sequence[Interval]], title: str = "") -> None:
    """Programs × time, one panel a policy over one time axis. Each panel says how much was waiting, and its end."""
    if empty := [policy for policy, intervals in panels.items() if not intervals]:
        raise ValueError(f"timeline: no interval for {empty}; leave it out")
    programs = 1 + max(interval.program for intervals in panels.values() for interval in intervals)
    last = max(interval.end for intervals in panels.values() for interval in intervals)
    tall = min(2.6, max(1.2, 0.1 * programs + 0.5))
    figure, axes = _rows(len(panels), 0.6 + tall * len(panels))
    for axis, (policy, intervals) in zip(axes, panels.items(), strict=True):
        bars: dict[tuple[int, State], list[tuple[float, float]]] = defaultdict(list)
        for i in intervals:
            bars[i.program, i.state].append((i.start, i.end - i.start))
        for (program, state), spans in bars.items():
            low, height, order = (0.12, 0.24, 3) if state == "pinned" else (0.43, 0.86, 2)
            axis.broken_barh(spans, (program - low, height), color=STATES[state], linewidth=0, zorder=order)
        end = max(interval.end for interval in intervals)
        axis.axvline(end, color=GREY, linewidth=1, linestyle="--", zorder=1)
        axis.set_title(policy, loc="left", fontsize=9, fontweight="bold")
        told = f"{waiting_share(intervals):.0%} of job time is waiting · all done after {end:,.0f} s"
        axis.set_title(told, loc="right", fontsize=8, color=SMALL["color"])
        axis.set(ylabel="program", ylim=(programs - 0.4, -0.6), xlim=(0, last * 1.01), yticks=[])
    for axis in axes[:-1]:
        axis.tick_params(labelbottom=False)
    axes[-1].set_xlabel("time (s)")
    _timeline_legend(figure, {interval.state for intervals in panels.values() for interval in intervals})
    figure.suptitle(title or None, fontsize=10)
    _save(figure, path)


def waiting_share(intervals: Iterable[Interval]) -> float:
    """Seconds of waiting over seconds in jobs: a person's pauses do not count, nor do pins. 0 for no time at all."""
    seconds: dict[State, float] = defaultdict(float)
    for interval in intervals:
        seconds[interval.state] += interval.end - interval.start
    total = seconds["waiting"] + seconds["running"] + seconds["tool"]
    return seconds["waiting"] / total if total else 0.0


def ratio_curve(
    path: Path,
    xs: Sequence[float],
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    xlabel: str = "KV pool ÷ working set",
    ylabel: str = "mean job time, stock ÷ policy",
    title: str = "",
) -> None:
    """Ratios to stock over pool sizes, for each x a (median, low, high). Above 1 is better than stock; x is log."""
    figure, (axis,) = _rows(1, 3.3)
    axis.axhline(1, color=GREY, linewidth=1.2, zorder=1)
    axis.annotate(
        "stock", (1, 1), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points", **SMALL
    )
    for number, ((name, points), look) in enumerate(zip(series.items(), looks(series), strict=True)):
        if len(points) != len(xs):
            raise ValueError(f"ratio_curve: {len(points)} points for {name!r} and {len(xs)} sizes; give one for each")
        aside = 1.035 ** (number - (len(series) - 1) / 2)  # so that whiskers stand apart
        middle = [point[0] for point in points]
        spread = [[max(0.0, m - low) for m, low, _ in points], [max(0.0, high - m) for m, _, high in points]]
        places = [x * aside for x in xs]
        axis.errorbar(places, middle, spread, label=name, marker="o", markersize=4, capsize=3, elinewidth=1.4, **look)
    axis.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    axis.set_xticks(list(xs), [str(Fraction(x).limit_denominator(16)) for x in xs])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    _finish(figure, path, title)


def _rows(count: int, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(count, 1, figsize=(WIDTH, height), squeeze=False, layout="constrained")
    for axis in axes[:, 0]:
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:, 0]


def looks(names: Iterable[str]) -> list[dict[str, Any]]:
    """Stock is grey and ours thick and blue, in every picture; the others take colours in turn."""
    looks: list[dict[str, Any]] = []
    taken = 0
    for name in names:
        if name == OURS:
            looks.append({"color": BLUE, "linewidth": 2.6, "zorder": 4})
        elif name == STOCK:
            looks.append({"color": GREY, "linewidth": 2.2, "zorder": 3})
        else:
            dash = DASHES[taken // len(COLOURS) % len(DASHES)]
            looks.append({"color": COLOURS[taken % len(COLOURS)], "linewidth": 1.4, "linestyle": dash, "zorder": 2})
            taken += 1
    return looks


def _timeline_legend(figure: Any, states: set[State]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = [
        Line2D([], [], color=STATES[state], linewidth=2, label=WORDS.get(state, state))
        if state == "pinned"
        else Patch(color=STATES[state], label=WORDS.get(state, state))
        for state in STATES
        if state in states
    ]
    figure.legend(handles=shown, loc="outside lower center", ncols=len(shown), frameon=False, fontsize=8)


def _finish(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title or None, fontsize=10)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
