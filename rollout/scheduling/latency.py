"""How long tools take: the seconds between a turn that calls a tool and the turn that brings its result. Pure.

Continuum's S[f] (arXiv 2511.02230, §4.2): for each tool the most recent durations, and those of all tools together.
Gaps after turns without a call are a person's: a class of their own, ``PERSON``, which is no tool and not in the global
set. A training run saves what it saw beside the checkpoint, and serving loads it.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rollout.errors import UserError

PERSON = "person"
MOST_TOOLS = 1024  # names come from model output: beyond this many, the tool seen longest ago is forgotten
VERSION = 1


class _Window:
    """The most recent durations of one class, also in order of size (a CDF costs O(log n)), and how many there were."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self.recent: deque[float] = deque()
        self.ordered: list[float] = []

    def add(self, seconds: float) -> None:
        self.count += 1
        self.recent.append(seconds)
        insort(self.ordered, seconds)
        if len(self.recent) > self.limit:
            del self.ordered[bisect_left(self.ordered, self.recent.popleft())]

    def merge(self, count: int, newest: list[float]) -> None:
        """Add another's. Where both do not fit, each keeps its newest, by its share of what there is."""
        mine = list(self.recent)
        keep = max(self.limit - len(newest), self.limit * len(mine) // max(len(mine) + len(newest), 1))
        mine = mine[-keep:] if keep else []
        newest = newest[-(self.limit - len(mine)) :] if len(mine) < self.limit else []
        self.count += count
        self.recent = deque(mine + newest)
        self.ordered = sorted(self.recent)

    def cdf(self, seconds: float) -> float:
        return bisect_right(self.ordered, seconds) / len(self.ordered) if self.ordered else 0.0

    def quantile(self, q: float) -> float:
        return self.ordered[max(math.ceil(q * len(self.ordered)) - 1, 0)] if self.ordered else math.nan


class ToolLatencies:
    """Durations by tool, in seconds: the most recent ``limit`` of each, at most ``MOST_TOOLS`` tools.

    ``PERSON`` may stand wherever a tool's name may; it is never forgotten. Counts are of all that was ever observed.
    """

    def __init__(self, limit: int = 4096) -> None:
        if limit < 1:
            raise ValueError(f"limit={limit}: keep at least one duration per tool")
        self.limit = limit
        self._tools: OrderedDict[str, _Window] = OrderedDict()  # the tool seen longest ago stands first
        self._person = _Window(limit)
        self._all = _Window(limit)

    def observe(self, tool: str, seconds: float) -> None:
        """One gap. Negative seconds (a clock that stepped back) count as 0; NaN and infinity are ignored."""
        if not math.isfinite(seconds):
            return
        seconds = max(float(seconds), 0.0)
        self._open(tool).add(seconds)
        if tool != PERSON:
            self._all.add(seconds)

    def durations(self, tool: str) -> list[float]:
        """The tool's most recent durations, oldest first; empty for an unknown tool."""
        return list(self._find(tool).recent)

    def everything(self) -> list[float]:
        """The most recent durations of all tools together, without those of persons."""
        return list(self._all.recent)

    def count(self, tool: str) -> int:
        """How often the tool was observed, also beyond ``limit``."""
        return self._find(tool).count

    def total(self) -> int:
        """How often any tool was observed, also tools forgotten since; persons do not count."""
        return self._all.count

    @property
    def observed(self) -> int:
        """How many gaps were observed in all, persons' too."""
        return self._all.count + self._person.count

    def tools(self) -> list[str]:
        """Names of the tools remembered, the one seen last at the end; ``PERSON`` is not among them."""
        return list(self._tools)

    def cdf(self, tool: str, seconds: float) -> float:
        """P(duration ≤ seconds) over the tool's recent durations; 0 for an unknown tool."""
        return self._find(tool).cdf(seconds)

    def quantiles(self, tool: str, at: Iterable[float] = (0.5, 0.9, 0.99)) -> list[float]:
        """Recent durations at ranks in [0, 1], each the smallest that covers its rank; NaN for an unknown tool."""
        window = self._find(tool)
        return [window.quantile(q) for q in at]

    def merge(self, other: ToolLatencies) -> None:
        """Add what another saw. Counts add up exactly; of durations each side keeps its newest, by its share."""
        for name, window in [*other._tools.items(), (PERSON, other._person)]:
            self._open(name).merge(window.count, list(window.recent))
        self._all.merge(other._all.count, list(other._all.recent))

    def save(self, path: str | Path) -> None:
        """Write ``path`` as JSON: wholly or not at all."""
        path = Path(path)
        content = {
            "version": VERSION,
            "tools": {name: _record(window) for name, window in self._tools.items()},
            "person": _record(self._person),
            "all": _record(self._all),
        }
        scratch = path.with_name(path.name + ".tmp")
        scratch.write_text(json.dumps(content))
        scratch.replace(path)

    def load(self, path: str | Path) -> None:
        """Add what a file of ``save`` holds, as ``merge`` does.

        Raises:
            UserError: the file is missing, unreadable or not one of ours; nothing was added.
        """
        try:
            content = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"tool latencies {path}: cannot be read ({error}); name a file that a run saved") from error
        try:
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']!r}, expected {VERSION}")
            other = ToolLatencies(self.limit)
            for name, record in content["tools"].items():
                if name == PERSON:
                    raise ValueError(f"a tool is called {PERSON!r}")
                _fill(other._open(name), record)
            _fill(other._person, content["person"])
            _fill(other._all, content["all"])
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise UserError(
                f"tool latencies {path}: not a file of ours ({error!r}); remove or save it again"
            ) from error
        self.merge(other)

    def _find(self, tool: str) -> _Window:
        return self._person if tool == PERSON else self._tools.get(tool) or _Window(self.limit)

    def _open(self, tool: str) -> _Window:
        if tool == PERSON:
            return self._person
        window = self._tools.setdefault(tool, _Window(self.limit))
        self._tools.move_to_end(tool)
        if len(self._tools) > MOST_TOOLS:
            self._tools.popitem(last=False)
        return window


def _record(window: _Window) -> dict[str, Any]:
    return {"count": window.count, "seconds": list(window.recent)}


def _fill(window: _Window, record: dict[str, Any]) -> None:
    count, seconds = record["count"], record["seconds"]
    if not isinstance(count, int) or isinstance(count, bool) or not isinstance(seconds, list) or count < len(seconds):
        raise ValueError("a count must be an integer, no less than its list of seconds is long")
    for value in seconds:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{value!r} is no number of seconds")
    window.merge(count, [float(value) for value in seconds])
