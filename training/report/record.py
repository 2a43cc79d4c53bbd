"""What a run directory holds, also of a run that still goes on."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from rollout.errors import UserError

Row = dict[str, Any]


@dataclass
class RunRecord:
    """``summary`` is empty until the run has ended; ``config`` where there is no config.yaml."""

    path: Path
    metrics: list[Row]
    episodes: list[Row]
    evaluations: list[Row]
    summary: Row
    config: Row
    config_text: str

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.path.resolve().name)


def read(path: Path) -> RunRecord:
    """Read a run's directory. Raises UserError where it is none, where it has no step yet, and for a broken file."""
    if not path.is_dir():
        raise UserError(f"{path} is no directory; give the run_dir of a training run")
    metrics = rows(path / "metrics.jsonl")
    if not metrics:
        raise UserError(f"{path / 'metrics.jsonl'} has no step yet; wait for the run's first, or give another run_dir")
    config, text = _config(path / "config.yaml")
    return RunRecord(
        path=path,
        metrics=metrics,
        episodes=rows(path / "episodes.jsonl"),
        evaluations=_json(path / "stages.json").get("evaluations", []),
        summary=_json(path / "summary.json"),
        config=config,
        config_text=text,
    )


def rows(path: Path) -> list[Row]:
    """JSON lines that each have a step; a last line that is still being written is left out."""
    if not path.exists():
        return []
    *lines, last = path.read_text().split("\n")
    found = [_row(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]
    if last:
        with contextlib.suppress(UserError):  # half-written: the run goes on, or was killed
            found.append(_row(last, str(path)))
    return found


def _row(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is not JSON ({error}); restore the file or take the line out") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise UserError(f"{place} is no row of a run: it has no step; restore the file or take the line out")
    return row


def _config(path: Path) -> tuple[Row, str]:
    if not path.exists():
        return {}, ""
    text = path.read_text()
    try:
        return dict(OmegaConf.create(text)), text
    except (YAMLError, ValueError) as error:
        raise UserError(f"{path} is no YAML ({str(error).splitlines()[0]}); restore the file or remove it") from error


def _json(path: Path) -> Row:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore the file or remove it") from error
