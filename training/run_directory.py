"""A run's directory, and what it remembers so that a resumed run does nothing twice."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rollout.errors import UserError

WRITTEN = ("save_latencies", "metrics_path")  # settings that name what a run writes, not what it reads


class RunDirectory:
    """``stages.json`` holds the seconds of each stage and the evaluations made so far; one process ``writes`` it."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._file = path / "stages.json"
        self.seconds: dict[str, float] = {}
        self.evaluations: list[dict[str, Any]] = []

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def open(self, composed: Any, *, resume: bool, overwrite: bool) -> None:
        """Make the directory, or find in it the run to go on with; a run is never overwritten unasked."""
        # A run that was refused before it had made anything is no run: the mended command may use its place.
        found = self._file.exists() and (self.checkpoints.exists() or any(self.path.glob("*.jsonl")))
        if found and not (resume or overwrite):
            raise UserError(
                f"run_dir: {self.path} holds a run already; resume=true goes on, overwrite=true starts it anew"
            )
        if found and not resume:
            self._refuse_to_lose(OmegaConf.to_container(composed, resolve=True))
            shutil.rmtree(self.path)
        elif found:
            state = json.loads(self._file.read_text())
            self.seconds, self.evaluations = state["seconds"], state["evaluations"]
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(OmegaConf.to_yaml(composed, resolve=True))
        self._write()

    def _refuse_to_lose(self, settings: Any, key: str = "") -> None:
        """Raise UserError where a setting names something that starting anew would delete before it is read."""
        if isinstance(settings, dict | list):
            items = settings.items() if isinstance(settings, dict) else enumerate(settings)
            for name, value in items:
                self._refuse_to_lose(value, f"{key}.{name}".lstrip("."))
        elif isinstance(settings, str) and key != "run_dir" and key.rpartition(".")[2] not in WRITTEN:
            named = Path(settings)
            if self.path.resolve() in (named.resolve(), *named.resolve().parents) and named.exists():
                raise UserError(
                    f"{key}: {settings} lies in run_dir={self.path}, which overwrite=true would delete first; "
                    "give another run_dir"
                )

    def evaluated(self, step: int, result: dict[str, Any]) -> None:
        self.evaluations.append({"step": step, **result})
        self._write()

    def go_back_to(self, step: int) -> None:
        """Forget the evaluations of later steps: the resumed run makes them again."""
        self.evaluations = [e for e in self.evaluations if e["step"] <= step]

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's seconds to the stage's; a stage inside another one counts once, as itself."""
        start, before = time.monotonic(), sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - before
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start - inside
            self._write()

    def _write(self) -> None:
        if not self.writes:
            return
        scratch = self._file.with_suffix(".tmp")
        scratch.write_text(json.dumps({"seconds": self.seconds, "evaluations": self.evaluations}, indent=1))
        scratch.replace(self._file)
