"""Real training runs in processes of their own, started quickly: a fork server imports torch and vLLM once."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import ClassVar

import psutil

from rollout.environment import Message, Row
from rollout.episode import Episode
from rollout.tasks import ToolEnvironment
from rollout.tasks.arithmetic import Arithmetic, is_right
from training.rewards.adacot import AdaCot
from training.rewards.otc import Otc

LAUNCHED_S = 400.0  # DeepSpeed compiles what it uses at its first start


class LengthReward:
    """A reward that varies even for an untrained policy."""

    needs_tools = False

    def __call__(self, group: Sequence[Episode]) -> list[dict[str, float]]:
        return [
            {"length": episode.own_tokens / 16 + len(set(episode.sequences[0].token_ids)) / 50} for episode in group
        ]


def made_lucky(group: Sequence[Episode]) -> Sequence[Episode]:
    """As if every other sample of an untrained policy had kept the format and been right."""
    for episode in group:
        episode.success = episode.sample % 2 == 0
        episode.rewards = {"task": float(episode.success)}
        for turn in episode.turns:
            turn.well_formed = True
    return group


class LuckyOtc(Otc):
    def __call__(self, group: Sequence[Episode]) -> list[dict[str, float]]:
        return super().__call__(made_lucky(group))


class LuckyAdaCot(AdaCot):
    def __call__(self, group: Sequence[Episode]) -> list[dict[str, float]]:
        return super().__call__(made_lucky(group))


class ToolReward(LengthReward):
    """Reads tool calls, so a task must have tools."""

    needs_tools = True


class Shaky(ToolEnvironment):
    """Its first attempt at every third prompt raises, and every seventh prompt hangs for ever."""

    raised: ClassVar[set[str]] = set()

    async def reset(self, row: Row) -> list[Message]:
        number = int(row.id[:8], 16)
        if number % 7 == 0:
            await asyncio.sleep(3600)
        if number % 3 == 0 and row.id not in self.raised:
            self.raised.add(row.id)
            raise OSError("the sandbox is gone")
        return await super().reset(row)


class ShakyArithmetic(Arithmetic):
    def environment(self) -> Shaky:
        return Shaky(self._tools, is_right)


SMALL = [
    "experiment=quickstart",
    "overwrite=false",
    "warm_start=none",
    "reward._target_=tests.training.launch.LengthReward",
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
    "evaluation.before=false",
    "evaluation.after=false",
]

# An engine that starts in seconds, on rank 0
ON_TWO = [
    *(line for line in SMALL if "kv_cache" not in line),
    "engine=transformers",
    "engine.num_blocks=128",
    "checkpoint.every=1",
    "episodes_logged=1000",
]


def launched(
    overrides: list[str], log: Path, *, processes: int = 2, module: Sequence[str] = ("training",)
) -> tuple[int, str]:
    """A run by torchrun: its exit code and what it printed. No process may be left of it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *launcher, *module, *overrides], stdout=file, stderr=file)
    started = {process.pid: psutil.Process(process.pid)}
    deadline = time.monotonic() + LAUNCHED_S
    while process.poll() is None:
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        with contextlib.suppress(psutil.NoSuchProcess):
            started |= {child.pid: child for child in psutil.Process(process.pid).children(recursive=True)}
        time.sleep(0.1)
    _, left = psutil.wait_procs(list(started.values()), timeout=30)
    assert not left, [each.cmdline() for each in left]
    return process.returncode, log.read_text()


def context() -> ForkServerContext:
    """Processes that start with the heavy imports done; each is a fresh copy, and SIGKILL is real."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    fork_server = multiprocessing.get_context("forkserver")
    fork_server.set_forkserver_preload(["torch", "vllm", "training.run"])
    return fork_server


def train(overrides: list[str], output: Path) -> None:
    """``python -m training`` in this process; what it prints goes to ``output``."""
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["training", *overrides]
    from training.__main__ import main

    main()
