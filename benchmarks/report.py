"""How every benchmark reports: a table for people, then one JSON object as the last line."""

from __future__ import annotations

import json
import operator
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}


def machine() -> str:
    """The hardware in words: processor, usable cores, memory, accelerator if torch is loaded and sees one."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"
    torch = sys.modules.get("torch")
    return text + f", {torch.cuda.get_device_name()}" if torch and torch.cuda.is_available() else text + ", no GPU"


def figure_name(text: str) -> str:
    """A label for people as part of a figure's name: its words, joined by underscores."""
    return "_".join(re.findall(r"\w+", text))


class Report:
    """Collects the figures and bars of one benchmark."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.figures: dict[str, float] = {}
        self.bars: list[dict[str, Any]] = []
        self.console = Console(width=None if sys.stdout.isatty() else 160)  # in a log tables would be cut at 80
        self.start = time.monotonic()

    def figure(self, name: str, value: float) -> float:
        self.figures[name] = float(f"{value:.6g}")
        return value

    def bar(self, figure: str, op: str, bound: float) -> None:
        """A bound that was asked for; its figure must have been given."""
        met = bool(OPERATORS[op](self.figures[figure], bound))
        self.bars.append({"figure": figure, "op": op, "bound": bound, "met": met})

    def input(self, name: str, path: Path, remedy: str) -> bool:
        """Whether something that is read is there. If not, that is a bar missed, and the terminal says what to do."""
        missing = not path.exists()
        self.figure(f"missing_{name}", missing)
        self.bar(f"missing_{name}", "==", 0)
        if missing:
            self.console.print(f"missing: {path}: {remedy}", style="red", markup=False, soft_wrap=True)
        return not missing

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        table = Table(title=title)
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row))
        self.console.print(table)

    def finish(self, quick: bool = False) -> NoReturn:
        """Print the JSON line and exit: 1 if a bar was missed. A quick run has no bars."""
        bars = [] if quick else self.bars
        seconds = round(time.monotonic() - self.start, 1)
        last = {"benchmark": self.name, "machine": machine(), "seconds": seconds, "figures": self.figures, "bars": bars}
        print(json.dumps(last), flush=True)
        sys.exit(any(not bar["met"] for bar in bars))
