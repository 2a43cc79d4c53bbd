"""One progress display per stage, with rate and remaining time; plain lines where the output is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
LINE_EVERY_S = 10.0  # without a terminal
NOTHING = "–"


class Stage:
    """Progress of one stage: ``update(done, note)`` as often as one likes."""

    def __init__(self, title: str, total: int, unit: str, bar: Progress | None) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.start = self._printed = time.monotonic()
        self._first: int | None = None
        self._bar = bar
        self._task = bar.add_task(title, total=total, note="") if bar is not None else None

    def update(self, done: int, note: str = "") -> None:
        """``done`` of ``total`` units are behind us; ``note`` says what matters now."""
        now = time.monotonic()
        if self._first is None:
            self._first = max(done - 1, 0)  # a resumed stage starts above 0: the rate counts what was done here
        rate = (done - self._first) / max(now - self.start, 1e-9)
        text = f"{rate:.3g} {self.unit}/s  {note}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=text)
        elif now - self._printed > LINE_EVERY_S or done >= self.total:
            self._printed = now
            left = (self.total - done) / max(rate, 1e-9)
            console.print(f"{self.title}: {done}/{self.total}, {left:.0f} s left, {text}", highlight=False)


@contextmanager
def stage(title: str, total: int, unit: str) -> Iterator[Stage]:
    """Show a stage while the block runs."""
    if not sys.stdout.isatty():
        console.print(f"{title} …", highlight=False)
        yield Stage(title, total, unit, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield Stage(title, total, unit, bar)


def evaluation_table(
    evaluations: list[tuple[str, dict[str, Any]]], title: str = "accuracy on unseen questions"
) -> Table:
    """One row for each named evaluation, sampled unless it says greedy; a column that nobody has anything for is left
    out. ``facts`` are questions that the task trains exhaustively; ``trigger`` is how thinking met the need for it.
    """
    rows = [_evaluation_row(evaluation) for _, evaluation in evaluations]
    columns = [column for column in rows[0] if any(row[column] != NOTHING for row in rows)]
    table = Table(title=title)
    for column in ("", *columns):
        table.add_column(column, justify="left" if not column else "right")
    for (name, _), row in zip(evaluations, rows, strict=True):
        table.add_row(name, *(row[column] for column in columns))
    return table


def _evaluation_row(evaluation: dict[str, Any]) -> dict[str, str]:
    sampled = evaluation["sampled"]
    trigger = sampled["trigger"] or {}
    return {
        "sampled": f"{sampled['accuracy']:.3f}",
        "95% interval": f"{sampled['accuracy_low']:.3f} – {sampled['accuracy_high']:.3f}",
        "greedy": _number(evaluation.get("greedy", {}).get("accuracy"), 3),
        "tool calls": f"{sampled['tool_calls']:.2f}",
        "right / call": _number(sampled["tool_productivity"], 2),
        "tokens": f"{sampled['tokens']:.1f}",
        "E³ · 1000": _number(sampled["e3"] and 1000 * sampled["e3"], 2),
        "thinking": f"{sampled['thinking']:.2f}",
        **{f"trigger {name}": _number(trigger.get(name), 2) for name in ("accuracy", "precision", "recall", "f1")},
        "facts": _number(sampled.get("facts", {}).get("accuracy"), 3),
    }


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"
