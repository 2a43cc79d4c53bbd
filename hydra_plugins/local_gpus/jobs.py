"""Runs commands, some at a time, each in a process group of its own."""

# No postponed annotations here: Hydra's scanner runs a module before it is in sys.modules, where dataclasses look.

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_plugins.local_gpus.callback import RETURN_VALUE
from hydra_plugins.local_gpus.groups import POLL_S, end_groups, interrupted_by
from rollout.children import ends_with_parent

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@dataclass
class Job:
    """One command. ``value`` is what its main function returned; ``problem`` says in one line why it failed."""

    label: str
    command: list[str]
    folder: Path
    value: Any = None
    problem: str | None = None

    @property
    def log(self) -> Path:
        """Beside the folder, not in it: a run that starts anew deletes its folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def result(self) -> Path:
        return self.folder / RETURN_VALUE


@dataclass
class Running:
    job: Job
    slot: dict[str, str]
    process: subprocess.Popen[bytes]
    started: float

    def seconds(self) -> float:
        return time.monotonic() - self.started


def run_jobs(jobs: list[Job], slots: list[dict[str, str]], *, timeout_s: float | None = None) -> None:
    """Run every job, at most one per slot at a time; sets ``problem`` of those that fail, and goes on with the rest.

    Ctrl-C, SIGTERM or SIGHUP (a terminal that is gone) ends all that run, with everything that they started.
    Where this process is killed outright, each job gets SIGTERM.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    waiting, free, running = list(jobs), list(slots), list[Running]()
    columns = (TextColumn("jobs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with (
        interrupted_by(signal.SIGTERM, signal.SIGHUP),
        Progress(*columns, TextColumn("{task.description}")) as progress,
    ):
        bar = progress.add_task("", total=len(jobs))
        try:
            while waiting or running:
                while waiting and free:
                    running.append(_start(waiting.pop(0), free.pop(0)))
                for ended in [r for r in running if _ended(r, timeout_s)]:
                    running.remove(ended)
                    free.append(ended.slot)
                    end_groups([ended.process])
                    _report(progress, bar, ended)
                progress.update(bar, description=", ".join(r.job.label for r in running))
                time.sleep(POLL_S)
        finally:
            end_groups([r.process for r in running])


def _start(job: Job, slot: dict[str, str]) -> Running:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    if job.result.exists():
        job.result.unlink()  # of an earlier sweep in the same directory
    # HYDRA_FULL_ERROR: our commands set it for themselves; inherited, it would turn one-line errors into tracebacks.
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"} | slot
    with job.log.open("wb") as log:
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=ends_with_parent(),
        )
    return Running(job, slot, process, time.monotonic())


def _ended(running: Running, timeout_s: float | None) -> bool:
    """Whether the job is over; then its ``value`` or its ``problem`` is set."""
    job, code = running.job, running.process.poll()
    if code is None:
        if timeout_s is None or running.seconds() < timeout_s:
            return False
        job.problem = f"did not end in hydra.launcher.job_timeout_s={timeout_s:g}"
    elif code != 0:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        job.problem = f"{how}: {last_line(job.log)}"
    elif not job.result.exists():
        job.problem = f"ended without running its main function: {last_line(job.log)}"
    else:
        outcome = json.loads(job.result.read_text())
        job.value, job.problem = outcome.get("value"), outcome.get("problem")
    return True


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _report(progress: "Progress", bar: "TaskID", running: Running) -> None:
    from rich.text import Text

    job = running.job
    text = f"{job.label}: failed, {job.problem} (log: {job.log})" if job.problem else f"{job.label}: done"
    progress.console.print(
        Text(f"{text} [{running.seconds():.1f} s]", style="red" if job.problem else ""), soft_wrap=True
    )
    progress.advance(bar)
