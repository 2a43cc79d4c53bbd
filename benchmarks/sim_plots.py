"""Overload as a trade-off: what each policy makes of job time and of the wait for a first token, cell by cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollout.scheduling.plots import looks


@dataclass(frozen=True)
class Point:
    """An arm in a cell, as ratios to stock. ``label`` stands beside a point of a curve."""

    arm: str
    job_time: float
    first_turn_p99: float
    label: str = ""


def trade_off(path: Path, cells: Mapping[str, Sequence[Point]]) -> None:
    """A panel a cell; points of one arm are joined. Down and left is better; stock is at (1, 1)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    columns = 5
    rows = -(-len(cells) // columns)
    arms = list(dict.fromkeys(point.arm for points in cells.values() for point in points))
    look = dict(zip(arms, looks(arms), strict=True))
    figure, grid = plt.subplots(rows, columns, figsize=(3.1 * columns, 2.9 * rows), layout="constrained", squeeze=False)
    for axes in grid.flat[len(cells) :]:
        axes.set_visible(False)
    for axes, (name, points) in zip(grid.flat, cells.items(), strict=False):
        axes.set_title(name, fontsize=9)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.axhline(1, color="#9aa3ad", lw=0.8)
        axes.axvline(1, color="#9aa3ad", lw=0.8)
        for arm in arms:
            mine = [point for point in points if point.arm == arm]
            xs, ys = [p.job_time for p in mine], [p.first_turn_p99 for p in mine]
            axes.plot(xs, ys, marker="o", markersize=4, label=arm, **{**look[arm], "linewidth": 0.8})
            for point in mine:
                axes.annotate(point.label, (point.job_time, point.first_turn_p99), fontsize=6)
        for scale in (axes.xaxis, axes.yaxis):
            scale.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            scale.set_minor_locator(NullLocator())
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.45), max(high, 1.1))  # at least one labelled tick beside stock's
        axes.tick_params(labelsize=7)
    figure.supxlabel("mean job time ÷ stock's", fontsize=9)
    figure.supylabel("p99 of the first token's wait ÷ stock's", fontsize=9)
    grid.flat[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
