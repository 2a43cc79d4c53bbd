"""Whole training runs in processes of their own: what they leave, and how they stop."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from rollout.plots import read_jsonl
from rollout.scheduling.files import LATENCIES, NUMBERS
from rollout.scheduling.latency import ToolLatencies
from rollout.scheduling.metrics import read_snapshot
from tests.training.launch import SMALL, context, train
from training.success_history import SuccessHistory
from training.timing import PARTS


def run(overrides: list[str], log: Path, before: object = None) -> tuple[int | None, str]:
    process = context().Process(target=before or train, args=(overrides, log))
    process.start()
    process.join(240)
    if process.exitcode is None:
        process.kill()
    return process.exitcode, log.read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with everything in it: warm start, evaluations, minibatches, recomputed anchor, KL."""
    root = tmp_path_factory.mktemp("run")
    overrides = [
        *SMALL,
        "warm_start=sft",
        "warm_start.steps=12",
        "warm_start.batch_size=16",
        "steps=4",
        "batch.minibatches=2",
        "anchor=recomputed",
        "correction=tis",
        "kl.coef=0.01",
        "evaluation.before=true",
        "evaluation.after=true",
        "evaluation.every=2",
        "evaluation.questions=10",
        "checkpoint.every=2",
        "scheduler=turnstile",
        f"run_dir={root / 'run'}",
    ]
    code, text = run(overrides, root / "log")
    assert code == 0, text[-3000:]
    return root / "run"


def test_a_run_leaves_what_the_design_promises(finished: Path) -> None:
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "episodes.jsonl",
        "summary.json",
        "engine.log",
        "reward.png",
        "report.html",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step-2", "step-4", "warm_start"]
    assert list((finished / "tensorboard").glob("events*"))
    rows = read_jsonl(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["sync/difference"] < 1e-4 for row in rows)
    assert all(row["policy/mismatch_max"] < 1e-3 for row in rows if row["step"] % 2), "first update of a round"
    assert rows[0]["policy/kl"] < 1e-6 < rows[3]["policy/kl"]
    summary = json.loads((finished / "summary.json").read_text())
    assert {"accuracy_before", "accuracy_after", "greedy_before", "greedy_after"} <= summary.keys()
    assert summary["seconds_by_stage"].keys() == {"warm_start", "engine_start", "evaluation", "training"}
    evaluations = json.loads((finished / "stages.json").read_text())["evaluations"]
    assert [e["step"] for e in evaluations] == [0, 2, 4]
    outcomes = [read_jsonl(finished / "outcomes" / f"step-{step}.jsonl") for step in (0, 4)]
    questions = [[row["prompt_id"] for row in rows if row["mode"] == "sampled"] for rows in outcomes]
    assert questions[0] == questions[1] and len(questions[0]) == 10, "two steps can be compared question by question"


LUCKY = "tests.training.launch.Lucky"
EXACT = ["correction=tis", "anchor=recomputed"]
WAYS = {
    "ppo": ["algorithm=ppo", "batch.minibatches=2", "batch.epochs=2"],
    "tppo": ["algorithm=tppo", "window.length=5", "engine.keep_cache=true"],
    "partial": ["algorithm=ppo", "window=truncated", "window.length=5", *EXACT],
    "groups of windows": ["window=truncated", "window.length=5", *EXACT],
    "rounds ahead": ["max_staleness=2", "batch.minibatches=2", *EXACT],
    "on the trainer's device": ["engine.sleep_level=2", "algorithm=ppo", "batch.minibatches=2", "evaluation.every=3"],
    "over-provisioned": ["window=over_provisioned"],
    "knapsack": ["budget=knapsack", "budget.least_seen=2", "advantage=rloo"],
    "tokens": ["budget=bayes_knapsack", "budget.cost=tokens", "batch.minibatches=2", "selection=dynamic_sampling"],
    "budgets of windows": [
        "budget=bayes_knapsack",
        "budget.half_life=4",
        "window=truncated",
        "window.length=5",
        *EXACT,
    ],
    "economy of calls": ["reward=otc", f"reward._target_={LUCKY}Otc", "advantage.normalize=false"],
    "economy in windows": [
        "algorithm=tppo",
        "window.length=5",
        "reward=otc_adacot",
        f"reward.otc._target_={LUCKY}Otc",
        "reward.adacot.labels=self",
    ],
    "when to think": [
        "reward=adacot",
        f"reward._target_={LUCKY}AdaCot",
        "reward.labels=self",
        "reward.mask_decision=true",
        "advantage=decoupled",
        "task.use_tool=false",
        "reasoning.forced_never=0.5",
        "reasoning.told_always=0.5",
    ],
}


# Their parts are in the others too, or have tests of their own.
SLOW = ("ppo", "partial", "over-provisioned", "tokens", "budgets of windows", "economy in windows")


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way in SLOW)) for way in WAYS])
def test_every_way_to_play_and_to_judge_trains_and_goes_on(way: str, tmp_path: Path) -> None:
    judged = any(setting.startswith("algorithm=") for setting in WAYS[way])
    critic = ["critic.warmup_rounds=2", "critic.optimizer.learning_rate=0.01"] if judged else []
    own_reward = any(setting.startswith("reward=") for setting in WAYS[way])
    small = [setting for setting in SMALL if not (own_reward and setting.startswith("reward."))]
    # Groups of two, so that a group may end in two windows.
    settings = [*small, *WAYS[way], *critic, "budget.samples=2", "checkpoint.every=2", f"run_dir={tmp_path / 'run'}"]
    for steps in (4, 8):
        code, text = run([*settings, f"steps={steps}", f"resume={str(steps > 4).lower()}"], tmp_path / "log")
        assert code == 0, text[-3000:]
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert max(row.get("policy/tokens", 0.0) for row in rows) > 0
    assert (tmp_path / "run" / "checkpoints" / "step-8" / "critic").exists() == bool(critic)
    slept = (tmp_path / "run" / "engine.log").read_text().count("seconds to fall asleep")
    assert slept >= 4 if "engine.sleep_level=2" in WAYS[way] else slept == 0
    if "budget=" in " ".join(WAYS[way]):
        known = SuccessHistory.read(tmp_path / "run" / "checkpoints" / "step-8").visits.values()
        trained = sum(row.get("rollout/episodes", 0) for row in rows)
        assert sum(visit.rollouts for visits in known for visit in visits) >= trained > 0


def test_the_scheduler_kept_its_numbers_and_latencies_travel(finished: Path) -> None:
    numbers = read_snapshot(finished / NUMBERS)
    trained = 2 * 4 * 2  # rounds of two steps, prompts, samples
    evaluated = 2 * (10 + 20 + 10)  # sampled and greedy; the one between asks all of the test split
    assert numbers.counters["programs"] == trained + evaluated
    assert numbers.counters["pins"] == numbers.counters["claims"] + sum(numbers.drops.values()) > 0
    assert numbers.drops["release"] > 0 == numbers.gauges["pins_now"], "every episode released its program"
    ToolLatencies().load(finished / LATENCIES)
    for step in (2, 4):
        folder = finished / "checkpoints" / f"step-{step}"
        ToolLatencies().load(folder / LATENCIES)
        assert LATENCIES in json.loads((folder / "parts.json").read_text())


def test_the_checkpoint_is_an_ordinary_folder(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished / "checkpoints" / "step-4"
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert model.config.architectures == ["Qwen3ForCausalLM"]


def test_episodes_can_be_read(finished: Path) -> None:
    rows = read_jsonl(finished / "episodes.jsonl")
    assert {"step", "advantage", "prompt_id", "success", "rewards", "turns", "status"} <= rows[0].keys()


def test_the_parts_of_a_step_make_up_its_seconds(finished: Path) -> None:
    rows = read_jsonl(finished / "metrics.jsonl")
    for row in rows:
        parts = {part: row.get(f"time/{part}", 0.0) for part in PARTS}
        assert sum(parts.values()) == pytest.approx(row["time/step"]) and min(parts.values()) >= 0
        assert parts["train"] > 0 and row["train/flops"] > 0 and "train/mfu" not in row, "a CPU has no peak"
        assert row["train/tokens_per_second"] > 0
    for row in rows[::2]:  # the first of each round
        assert min(row["time/generate"], row["time/sync"], row["time/anchor"]) > 0
        assert 0 <= row["rollout/cache_hit_rate"] <= 1 and row["rollout/tool_seconds"] >= 0
    assert rows[-1]["time/elapsed"] >= sum(row["time/step"] for row in rows)


def test_logged_tokens_know_what_the_recomputed_anchor_says_of_them(finished: Path) -> None:
    turns = [turn for row in read_jsonl(finished / "episodes.jsonl") for turn in row["turns"]]
    known = [turn["tokens"] for turn in turns if "difference" in turn["tokens"]]
    assert known and all(len(tokens["text"]) == len(tokens["engine"]) == len(tokens["difference"]) for tokens in known)
    differences = [abs(value) for tokens in known for value in tokens["difference"]]
    assert 0 < max(differences) < 1e-3, "of both steps of each round, before the first update"


def test_a_run_is_never_overwritten_unasked(finished: Path, tmp_path: Path) -> None:
    code, text = run([*SMALL, f"run_dir={finished}"], tmp_path / "log")
    assert code == 2
    remedy = "resume=true goes on, overwrite=true starts it anew"
    assert text == f"error: run_dir: {finished} holds a run already; {remedy}\n"


def test_a_tool_reward_needs_tools(tmp_path: Path) -> None:
    reward = "reward._target_=tests.training.launch.ToolReward"
    code, text = run([*SMALL, "task.use_tool=false", reward, f"run_dir={tmp_path / 'run'}"], tmp_path / "log")
    assert code == 2
    assert text == "error: reward: ToolReward rewards tool calls, but task arithmetic has no tools\n"


def train_on_a_full_disk(overrides: list[str], log: Path) -> None:
    """No file may grow above 200 kB, so that the weights cannot be written: what a full disk does to a save."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    from training import checkpoint

    writing = checkpoint.writing

    def limited(*args: object, **kwargs: object) -> object:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        return writing(*args, **kwargs)  # type: ignore[arg-type]

    checkpoint.writing = limited  # type: ignore[assignment]
    train(overrides, log)


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    overrides = [*SMALL, "steps=2", "checkpoint.every=1", f"run_dir={tmp_path / 'run'}"]
    code, text = run(overrides, tmp_path / "log", train_on_a_full_disk)
    assert code == 2, text[-3000:]
    last = text.splitlines()[-1]
    assert last.startswith(f"error: cannot write {tmp_path}") and "free disk space" in last
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_an_engine_that_dies_once_too_often_stops_the_run_with_one_line_and_no_orphan(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [*SMALL, "engine=vllm_process", "engine.restarts=0", "steps=2000", f"run_dir={run_dir}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "training", *overrides], stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while len(read_jsonl(run_dir / "metrics.jsonl")) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    core = [p for p in family if "EngineCore" in p.name() or "EngineCore" in " ".join(p.cmdline())]
    assert core, [p.cmdline() for p in family]
    os.kill(core[0].pid, signal.SIGKILL)
    assert process.wait(60) == 2, (tmp_path / "log").read_text()[-3000:]
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("error: ") and "engine" in last.lower()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_resume_goes_on_where_the_run_stopped(finished: Path, tmp_path: Path) -> None:
    overrides = [line for line in SMALL if line != "overwrite=false"]
    code, text = run([*overrides, "overwrite=false", "steps=6", "resume=true", f"run_dir={finished}"], tmp_path / "log")
    assert code == 0, text[-3000:]
    assert [row["step"] for row in read_jsonl(finished / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
