"""A run's directory, and what it remembers so that a resumed run does nothing twice."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rollout.display import console
from rollout.errors import UserError
from training import checkpoint
from training.dotted_names import dotted
from training.replaced_run import ReplacedRun

ENDING = 30.0  # seconds that a run which was stopped may need to be gone
WRITTEN = ("save_latencies", "metrics_path")  # settings that name what a run writes, not what it reads


class RunDirectory:
    """``stages.json`` holds the seconds of each stage and the evaluations made so far; one process ``writes`` it."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._file = path / "stages.json"
        self.seconds: dict[str, float] = {}
        self.evaluations: list[dict[str, Any]] = []
        self.replaced = ReplacedRun(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @contextmanager
    def open(self, composed: Any, *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Make the directory this process's, or find in it the run to go on with; none is overwritten unasked.

        A run that is, is put back if the block ends in an error before ``stands`` was called.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            if resume:
                self.replaced.recover()
            else:
                self.replaced.put_back()  # of a start that was killed before it stood
            if not resume and self._file.exists():
                # A run that was refused before it had made anything is no run: the mended command may use its place.
                if not overwrite and (self.checkpoints.exists() or any(self.path.glob("*.jsonl"))):
                    raise UserError(
                        f"run_dir: {self.path} holds a run already; resume=true goes on, overwrite=true starts it anew"
                    )
                self._refuse_to_lose(composed)
                self.replaced.set_aside()
            try:
                self._begin(composed)
                yield
            except BaseException:
                self.replaced.put_back()
                raise

    def stands(self) -> None:
        """The run has all that it needs: what it takes the place of is deleted."""
        if self.writes:
            self.replaced.delete()

    def _begin(self, composed: Any) -> None:
        file, wanted = self.path / "config.yaml", OmegaConf.to_yaml(composed, resolve=True)
        if self._file.exists():
            state = json.loads(self._file.read_text())
            self.seconds, self.evaluations = state["seconds"], state["evaluations"]
            if file.exists() and (before := file.read_text()) != wanted:
                self._note_changes(before, wanted)
        file.write_text(wanted)
        self._write()

    def _note_changes(self, before: str, now: str) -> None:
        """Say what a resumed run does otherwise than it did, and keep what it did."""
        old, new = (settings(OmegaConf.create(text)) for text in (before, now))
        changes = [
            f"{key}={new.get(key)} (was {old.get(key)})"
            for key in [*old, *(key for key in new if key not in old)]
            if old.get(key) != new.get(key) and key not in ("resume", "overwrite")
        ]
        if changes:
            console.print(f"note: resumed with {', '.join(changes)}", highlight=False, markup=False)
            step = max((number for number, _ in checkpoint.steps(self.checkpoints)), default=0)
            (self.path / f"config-until-step-{step}.yaml").write_text(before)

    def _refuse_to_lose(self, composed: Any) -> None:
        """Raise UserError where a setting names something that starting anew would delete before it is read."""
        for key, value in settings(composed).items():
            if not isinstance(value, str) or key == "run_dir" or key.rpartition(".")[2] in WRITTEN:
                continue
            named = Path(value)
            if self.path.resolve() in (named.resolve(), *named.resolve().parents) and named.exists():
                raise UserError(
                    f"{key}: {value} lies in run_dir={self.path}, which overwrite=true would delete first; "
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


def settings(composed: Any) -> dict[str, Any]:
    """Every single setting by its whole name, those in lists by number."""
    every = dotted(OmegaConf.to_container(composed, resolve=True), into=(dict, list))
    return {key: value for key, value in every.items() if value not in ({}, [])}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Have the directory alone; the system lets go of what a killed process had.

    Raises UserError where it cannot be written, or another process has it for ``ENDING`` seconds more.
    """
    try:
        lock = (path / ".lock").open("a+")
    except PermissionError as error:
        raise UserError(f"run_dir: {path} cannot be written ({error.strerror}); give another run_dir") from error
    with lock as file:
        deadline = time.monotonic() + ENDING
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise UserError(
                        f"run_dir: {path} is in use by {file.read() or 'a process'}; stop it, or give another run_dir"
                    ) from None
                time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
