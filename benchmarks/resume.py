"""Runs that are killed (SIGKILL) at random instants and resumed, against runs that are not: nothing is lost.

All algorithms, real vLLM (CPU). On one process with ``engine.deterministic`` the weights must end equal, bit for bit;
on two, whose engine is a process of its own, within float order. Kills come at a random instant of a random step, every
third one in the middle of a save, and on two processes they hit one of the two. Every prompt that was asked for must
have been trained on as often as without kills, every checkpoint that is left must load, and no process may be left.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.arms import STORE, code
from benchmarks.report import Report
from rollout.plots import read_jsonl

STEPS = 16
SMALL = [
    "experiment=quickstart",
    "overwrite=false",
    "warm_start=none",
    "reward._target_=benchmarks.process_parity.Varied",
    "model.hidden=64",
    "model.heads=2",
    "model.mlp=128",
    "task.size=64",
    "task.test_size=20",
    "batch.prompts=4",
    "budget.samples=2",
    "limits.max_new_tokens=16",
    "engine.max_num_seqs=8",
    "engine.kv_cache_gib=0.1",
    "engine.deterministic=true",
    "evaluation.before=false",
    "evaluation.after=false",
    "episodes_logged=1000",
    "checkpoint.every=1",
    "optimizer.learning_rate=0.01",
    f"steps={STEPS}",
]
VALUES = ["critic.warmup_rounds=2", "critic.optimizer.learning_rate=0.01"]
ARMS = {
    "grpo": ["algorithm=grpo"],
    "grpo_token": ["algorithm=grpo_token", "batch.minibatches=2"],
    "dr_grpo": ["algorithm=dr_grpo"],
    "dapo": ["algorithm=dapo"],
    "knapsack_grpo": ["algorithm=knapsack_grpo"],
    "ppo": ["algorithm=ppo", *VALUES],
    "tppo": ["algorithm=tppo", "batch.prompts=8", "window.length=5", *VALUES],
    "two processes": ["algorithm=grpo_token", "batch.minibatches=2", "engine=vllm_process"],
}
TWO = "two processes"
KILLS = 2  # an arm; --full: 6, and 8 of two processes
START_S, END_S = 240.0, 600.0
FORKS = multiprocessing.get_context("forkserver")


def train(overrides: list[str], log: Path) -> None:
    """``python -m training`` in this process."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["training", *overrides]
    from training.__main__ import main

    main()


class Launched:
    """A run in processes of its own, and all that they start."""

    def __init__(self, folder: Path, settings: list[str], *, processes: int, resume: bool) -> None:
        overrides = [*SMALL, *settings, f"run_dir={folder}", f"resume={str(resume).lower()}"]
        self.log = folder.with_suffix(".log")
        if processes == 1:  # out of a process that has imported everything: nothing else is quick enough for 50 kills
            process = FORKS.Process(target=train, args=(overrides, self.log))
            process.start()
            self.ended: Callable[[], int | None] = lambda: process.exitcode
            self.wait: Callable[[float], object] = process.join
        else:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            with self.log.open("a") as log:
                command = [sys.executable, *launcher, "-m", "training", *overrides]
                process = subprocess.Popen(command, stdout=log, stderr=log)
            self.ended, self.wait = process.poll, process.wait
        self.pid = process.pid
        self.started = {self.pid: psutil.Process(self.pid)}

    def look(self) -> bool:
        """Whether it still runs; remembers what it has started."""
        if self.ended() is not None:
            return False
        try:
            children = self.started[self.pid].children(recursive=True)
        except psutil.NoSuchProcess:  # it ends in this moment
            self.wait(10)
            return False
        for child in children:
            self.started.setdefault(child.pid, child)
        return True

    def kill(self, victim: int) -> None:
        os.kill(victim, signal.SIGKILL)

    def trainers(self) -> list[int]:
        """Process ids of the training processes: the launcher's children, else the run itself."""
        found = [p.pid for p in psutil.Process(self.pid).children() if p.environ().get("LOCAL_RANK")]
        return sorted(found) or [self.pid]

    def orphans(self, within_s: float = 60.0) -> list[str]:
        """What is left of it after a while."""
        _, left = psutil.wait_procs(list(self.started.values()), timeout=within_s)
        return [" ".join(p.cmdline())[:120] for p in left if p.status() != psutil.STATUS_ZOMBIE]


def rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def saving(folder: Path) -> bool:
    return any(path.is_dir() for path in (folder / "checkpoints").glob(".step-*.tmp"))


def until(what: str, happened: bool | object, run: Launched, limit_s: float) -> bool:
    """Wait for ``happened()``; False if the run ended first."""
    deadline = time.monotonic() + limit_s
    while not happened():
        if not run.look():
            return False
        if time.monotonic() > deadline:
            run.kill(run.pid)
            sys.exit(f"error: {what} did not happen within {limit_s:.0f} s; see {run.log}")
        time.sleep(0.003)
    return True


def killed_run(folder: Path, settings: list[str], *, processes: int, kills: int, rng: random.Random) -> list[str]:
    """Killed so often and resumed to its end; gives what was left of it each time."""
    left: list[str] = []
    done = 0
    while True:
        run = Launched(folder, settings, processes=processes, resume=done > 0)
        before = rows(folder)
        step = before + rng.randint(1, max((STEPS - before) // (kills - done + 1), 1)) if done < kills else STEPS + 1
        ended = not until(f"step {step} of {folder.name}", lambda s=step: rows(folder) >= s, run, START_S + END_S)
        if not ended:
            if done % 3 == 2:
                ended = not until("a save", lambda: saving(folder), run, END_S)
            else:
                time.sleep(rng.random() * 0.5)
            run.look()
        if ended or run.ended() is not None:
            break
        run.kill(rng.choice(run.trainers()))
        until("the end of the other process", lambda: False, run, 120.0)
        left += run.orphans()
        done += 1
    if run.ended() or done < kills:
        sys.exit(f"error: {folder.name} ended with exit code {run.ended()} after {done} kills; see {run.log}")
    return left + run.orphans()


def difference(ours: Path, theirs: Path) -> float:
    """The largest difference between two checkpoints' weights, the critic's too; 0: every bit is equal."""
    from safetensors.torch import load_file

    worst = 0.0
    for name in ("model.safetensors", "critic/model.safetensors"):
        if (theirs / name).exists():
            a, b = load_file(ours / name), load_file(theirs / name)
            assert a.keys() == b.keys()
            worst = max(worst, *(float((a[key] - b[key]).abs().max()) for key in b))
    return worst


def trained_on(folder: Path) -> list[Counter[str]]:
    """By step, the prompts of the episodes that were trained on."""
    found: dict[int, Counter[str]] = {}
    for row in read_jsonl(folder / "episodes.jsonl"):
        found.setdefault(row["step"], Counter())[row["prompt_id"]] += 1
    return [found[step] for step in sorted(found)]


def unreadable(folder: Path) -> int:
    """Of the checkpoints that are left, those that cannot be loaded; half-written ones count."""
    from training.checkpoint import latest, steps
    from training.models import load_policy

    broken = sum(1 for _ in (folder / "checkpoints").glob(".*"))
    for _, checkpoint in steps(folder / "checkpoints"):
        load_policy(checkpoint)
    assert latest(folder / "checkpoints") is not None
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one algorithm, one kill, no bars")
    parser.add_argument("--full", action="store_true", help="50 kills instead of 16")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    FORKS.set_forkserver_preload(["torch", "vllm", "training.run"])
    report = Report("resume")
    kind = "-quick" if given.quick else "-full" if given.full else ""
    root = STORE / "resume" / (code() + kind)
    root.mkdir(parents=True, exist_ok=True)
    arms = {"grpo_token": ARMS["grpo_token"]} if given.quick else ARMS
    rng = random.Random(0)
    table = []
    totals = dict.fromkeys(("kills", "not_bit_equal", "prompts_lost_or_repeated", "unreadable", "orphans"), 0)
    for name, settings in arms.items():
        processes = 2 if name == TWO else 1
        kills = 1 if given.quick else KILLS if not given.full else 8 if name == TWO else 6
        whole, killed = root / name.replace(" ", "_"), root / f"{name.replace(' ', '_')}-killed"
        if not (whole / "summary.json").exists():
            report.console.print(f"{name} …", style="dim")
            shutil.rmtree(whole, ignore_errors=True)
            killed_run(whole, settings, processes=processes, kills=0, rng=rng)
        marker = root / f"{killed.name}.left"
        if not marker.exists():
            report.console.print(f"{name}, killed {kills} times …", style="dim")
            shutil.rmtree(killed, ignore_errors=True)
            orphans = killed_run(killed, settings, processes=processes, kills=kills, rng=rng)
            marker.write_text("\n".join(orphans))
        left = [line for line in marker.read_text().splitlines() if line]
        last = f"checkpoints/step-{STEPS}"
        apart = difference(killed / last, whole / last)
        wrong = sum(a != b for a, b in zip(trained_on(killed), trained_on(whole), strict=True))
        broken = unreadable(killed)
        if processes == 1:
            totals["not_bit_equal"] += apart > 0
        else:
            report.figure("two_processes_difference", apart)
        totals["kills"] += kills
        totals["prompts_lost_or_repeated"] += wrong
        totals["unreadable"] += broken
        totals["orphans"] += len(left)
        table.append((name, kills, f"{apart:.1e}", wrong, broken, len(left)))
    report.table(
        f"{STEPS} steps, killed and resumed, against a run that was not",
        ["arm", "kills", "weights differ by", "steps with other prompts", "unreadable", "orphans"],
        table,
    )
    for name, total in totals.items():
        report.figure(name, total)
    if not given.quick:
        report.bar("kills", ">=", 50 if given.full else 16)
        for name in list(totals)[1:]:
            report.bar(name, "<=", 0)
        report.bar("two_processes_difference", "<=", 1e-3)
    report.finish(given.quick)


if __name__ == "__main__":
    main()
