"""What happens to a real run when something under it breaks: it goes on, or ends soon with a line that says why."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from rollout.plots import read_jsonl
from tests.training.launch import ON_TWO, SMALL, context, launched, train

pytestmark = pytest.mark.timeout(400)


def start(
    overrides: list[str], log: Path, *, processes: int = 1, module: Sequence[str] = ("training",)
) -> subprocess.Popen[bytes]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    with log.open("a") as file:
        return subprocess.Popen([sys.executable, *launcher, "-m", *module, *overrides], stdout=file, stderr=file)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharding", "rank"),
    [("none", 0), ("none", 1), ("zero2", 0), ("zero2", 1), ("zero3", 1), ("fsdp2", 0), ("fsdp2", 1)],
)
def test_a_disk_that_is_full_for_one_of_two_processes_ends_the_run_soon_and_costs_nothing(
    tmp_path: Path, sharding: str, rank: int
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    settings = [*ON_TWO, f"sharding={sharding}", f"run_dir={run_dir}"]
    process = start([*settings, "steps=6"], log, processes=2, module=["tests.training.full_disk", str(rank), "3"])
    trained(run_dir, 3, process)
    started = family(process)
    assert process.wait(60) != 0
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    line = f"error: rank {rank}: cannot write {run_dir}/checkpoints/step-3: "
    assert [each for each in errors if each.startswith(line) and "free disk space" in each], log.read_text()[-3000:]
    assert "Error executing job" not in log.read_text(), "the traceback is torchrun's own"
    assert not psutil.wait_procs(started, timeout=30)[1]
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step-1", "step-2"]
    code, text = launched([*settings, "steps=6", "resume=true"], log)
    assert code == 0, text[-3000:]
    assert [row["step"] for row in read_jsonl(run_dir / "metrics.jsonl")] == list(range(1, 7))
    prompts = [row["prompt_id"] for row in read_jsonl(run_dir / "episodes.jsonl")]
    assert len(prompts) == len(set(prompts)) == 24, "of 64 each at most once, though step 3 was trained twice"


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_that_is_taken_where_processes_meet_is_one_line(tmp_path: Path, taken_port: int) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken_port)}
    variables = {**os.environ, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", **place}  # as Slurm's srun gives them
    command = [sys.executable, "-m", "training", *ON_TWO, f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: rank 0 cannot meet the others at 127.0.0.1:{taken_port} (")
    assert last.endswith("give another --master-port, or torchrun --standalone, which takes a free one")


@pytest.mark.slow
def test_a_port_of_the_engine_that_is_taken_ends_all_processes_with_one_line(tmp_path: Path, taken_port: int) -> None:
    settings = [*SMALL, "engine=vllm_http", f"+engine.extra.port={taken_port}", f"run_dir={tmp_path / 'run'}"]
    code, text = launched(settings, tmp_path / "log")
    assert code != 0
    line = f"error: engine.extra.port: port {taken_port} is in use; choose another, or leave it out"
    assert text.splitlines().count(line) == 1 and "Error executing job" not in text, text[-3000:]


def test_an_engine_of_this_process_is_refused_where_several_train(tmp_path: Path) -> None:
    variables = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    command = [sys.executable, "-m", "training", *SMALL, f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: engine: lives in the trainer's process, of which there are several; take engine=vllm_process"
    )


@pytest.mark.parametrize("sharding", ["fsdp2", "zero2"])
def test_sharding_without_a_launcher_is_refused(tmp_path: Path, sharding: str) -> None:
    command = [sys.executable, "-m", "training", *SMALL, f"sharding={sharding}", f"run_dir={tmp_path / 'run'}"]
    variables = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: sharding: needs a launcher, for one process too; torchrun")
