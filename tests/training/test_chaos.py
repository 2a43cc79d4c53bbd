"""What happens to a real run when something under it breaks: it goes on, or ends soon with a line that says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rollout.plots import read_jsonl
from tests.training.launch import SMALL, context, train

pytestmark = pytest.mark.timeout(400)


def start(overrides: list[str], log: Path, *, processes: int = 1) -> subprocess.Popen[bytes]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    with log.open("a") as file:
        return subprocess.Popen([sys.executable, *launcher, "-m", "training", *overrides], stdout=file, stderr=file)


def trained(run_dir: Path, steps: int, process: subprocess.Popen[bytes], within_s: float = 200.0) -> None:
    deadline = time.monotonic() + within_s
    while len(read_jsonl(run_dir / "metrics.jsonl")) < steps:
        assert process.poll() is None and time.monotonic() < deadline, f"no step {steps}"
        time.sleep(0.1)


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.slow
def test_an_engine_that_is_killed_costs_no_episode(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    settings = [*SMALL, "engine=vllm_process", "engine.max_num_seqs=8", "engine.kv_cache_gib=0.1", "steps=40"]
    process = start([*settings, f"run_dir={run_dir}"], log)
    trained(run_dir, 2, process)
    started = family(process)
    (core,) = [p for p in started if "EngineCore" in p.name() or "EngineCore" in " ".join(p.cmdline())]
    os.kill(core.pid, signal.SIGKILL)
    assert process.wait(250) == 0, log.read_text()[-3000:]
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert all(row["rollout/episodes"] == 8 for row in rows)
    assert not psutil.wait_procs(started, timeout=20)[1]


@pytest.mark.slow
def test_a_run_of_two_processes_ends_soon_when_one_is_killed_and_can_be_resumed(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    settings = [*SMALL, "engine=vllm_process", "checkpoint.every=1", "steps=60", f"run_dir={run_dir}"]
    process = start(settings, log, processes=2)
    trained(run_dir, 3, process)
    started = family(process)
    second = next(p for p in started if p.environ().get("RANK") == "1")
    os.kill(second.pid, signal.SIGKILL)
    assert process.wait(60) != 0
    assert "Signal 9 (SIGKILL)" in log.read_text()
    assert not psutil.wait_procs(started, timeout=30)[1]
    done = len(read_jsonl(run_dir / "metrics.jsonl"))
    process = start([*settings[:-2], "steps=64", f"run_dir={run_dir}", "resume=true"], log, processes=2)
    assert process.wait(250) == 0, log.read_text()[-3000:]
    assert [row["step"] for row in read_jsonl(run_dir / "metrics.jsonl")] == list(range(1, 65)) and done >= 3


def test_sandboxes_that_raise_or_hang_cost_what_is_counted_and_no_more(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    shaky = ["task._target_=tests.training.launch.ShakyArithmetic", "limits.episode_timeout_s=1", "limits.retries=1"]
    overrides = [*SMALL, *shaky, "limits.max_failures_in_a_row=100", "steps=6", f"run_dir={run_dir}"]
    process = context().Process(target=train, args=(overrides, log))
    process.start()
    process.join(240)
    assert process.exitcode == 0, log.read_text()[-3000:]
    rows = read_jsonl(run_dir / "metrics.jsonl")
    dropped = [sum(value for name, value in row.items() if name.startswith("dropped/")) for row in rows]
    assert all(row["rollout/episodes"] + lost == 8 for row, lost in zip(rows, dropped, strict=True))
    assert 0 < sum(dropped) < 24, "those that hang are dropped, those that raise once are played again"
    assert {name for row in rows for name in row if name.startswith("dropped/")} == {"dropped/episode_timeout"}


def test_an_engine_of_this_process_is_refused_where_several_train(tmp_path: Path) -> None:
    variables = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    command = [sys.executable, "-m", "training", *SMALL, f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: engine: lives in the trainer's process, of which there are several; take engine=vllm_process"
    )
