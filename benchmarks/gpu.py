"""What a bare CUDA machine is needed for, in one command: python -m benchmarks.gpu [--part train|shapes|steps]. Not run
on GPU yet.

It needs torch >= 2.11 and transformers >= 5.17 on CUDA, and accelerate >= 1.15, peft, numpy, safetensors, tokenizers,
matplotlib, jinja2, tensorboard and rich of the usual stack; beside these only wheels that hold no GPU code: trl 1.16,
datasets with pyarrow, pandas, dill, multiprocess and xxhash, hydra-core and omegaconf with antlr4-python3-runtime 4.9.3
(PyPI has its sources only: ``pip wheel``). No vLLM, no DeepSpeed, no network. With flash-attn installed attention is of
variable length, else SDPA, and the table says which.

train: ``arithmetic`` and ``long_chain`` end to end on engine=transformers: accuracy before and after, seconds a stage.
shapes: two training steps of RolloutTrainer on random models of the shapes of Qwen3-1.7B (every weight, float32 under
bfloat16 autocast) and Qwen3-8B (bfloat16 with LoRA), checkpointed, 8k to 32k tokens a micro-batch: tokens/s, MFU by 6N
(LoRA: 4N + 6A, see gpu_shapes.flops_per_token), and peak memory against the plan of ``dry_run=true``.
steps: seconds of prefill and decode steps of the 8B shape, and the simulator's roofline fitted to them.

Every run and arm is stored as it ends; a command that was stopped goes on from there. Each part is meant for less than
eight minutes of one H100.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import gpu_shapes, gpu_steps
from benchmarks.arms import STORE, code, run_arm
from benchmarks.report import Report, figure_name
from benchmarks.training_runs import Run, train
from rollout.scheduling.costs import Roofline
from training.memory import GIB

PARTS = ("train", "shapes", "steps")
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # FLOP/s printed for dense bfloat16
COMMON = ["engine=transformers", "++trainer.gradient_checkpointing=false", "evaluation.every=null"]
RUNS = {  # a task, its experiment, and what is shorter than there
    "arithmetic": ("quickstart", "steps=30 checkpoint.every=30 engine.num_blocks=2048 evaluation.questions=500"),
    "long_chain": ("long_chain", "steps=8 checkpoint.every=8 engine.num_blocks=4096 evaluation.questions=256"),
}
QUICK_RUN = (
    "warm_start.steps=2 warm_start.batch_size=4 warm_start.demonstrations=64 steps=1 batch.prompts=2 budget.samples=2 "
    "limits.max_new_tokens=32 evaluation.questions=2 engine.num_blocks=256"
)
MEMORY_ERROR = 0.10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="Without --part: all three."
    )
    parser.add_argument("--part", choices=PARTS, help="this one alone")
    parser.add_argument(
        "--quick", action="store_true", help="everything tiny, on the CPU where there is no GPU; no bars"
    )
    parser.add_argument("--eager", action="store_true", help="steps: decode without CUDA graphs")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(arm(json.loads(options.arm))))
        return
    import torch

    if not options.quick and not torch.cuda.is_available():
        sys.exit("error: no CUDA device; run it on a machine with an NVIDIA GPU, or add --quick for a smoke run on CPU")
    report = Report("gpu")
    store = STORE / "gpu" / (code() + ("-quick" if options.quick else ""))
    for part in (options.part,) if options.part else PARTS:
        if part == "train":
            train_tasks(report, store, options.quick)
        elif part == "shapes":
            train_shapes(report, store, options.quick)
        else:
            time_steps(report, store, options.quick, graphs=torch.cuda.is_available() and not options.eager)
    if options.quick:
        shutil.rmtree(store, ignore_errors=True)
    report.finish(options.quick)


def arm(settings: dict[str, Any]) -> dict[str, Any]:
    """What an interpreter of its own does: one shape, or the steps of one model."""
    if settings.pop("part") == "shapes":
        return gpu_shapes.run(gpu_shapes.Arm(**settings))
    return gpu_steps.run(**settings)


def stored(report: Report, store: Path, arms: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each arm's result, read back where it is stored. One that fails is a bar missed and does not end the others."""
    failed = 0
    for name, settings in arms.items():
        path = store / f"{settings['part']}-{figure_name(name)}.json"
        report.console.print(f"{name} …", style="dim")
        if not path.exists():
            try:
                last = run_arm("gpu", json.dumps(settings), timeout_s=300.0)
            except subprocess.CalledProcessError as error:
                failed += 1
                report.console.print(f"{name} ended with {error.returncode}; why stands above", style="red")
                continue
            except subprocess.TimeoutExpired as error:
                failed += 1
                report.console.print(f"{name} was not done after {error.timeout:.0f} s", style="red")
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(last)
        yield name, json.loads(path.read_text())
    part = next(iter(arms.values()))["part"]
    report.figure(f"{part}_failed", failed)
    report.bar(f"{part}_failed", "==", 0)


def train_tasks(report: Report, store: Path, quick: bool) -> None:
    """Two runs from an untrained model to the evaluation after RL."""
    rows = []
    for task, (experiment, overrides) in RUNS.items():
        report.console.print(f"{task} …", style="dim")
        settings = [*COMMON, *overrides.split(), *(QUICK_RUN.split() if quick else ())]
        run = Run(train(store / task, experiment, settings, timeout_s=420.0))
        summary = run.summary
        before, after = summary["accuracy_before"], summary["accuracy_after"]
        stages = summary["seconds_by_stage"]
        report.figure(f"{task}_before", before)
        report.figure(f"{task}_after", after)
        report.figure(f"{task}_gain", after - before)
        report.figure(f"{task}_seconds", summary["seconds_total"])
        report.figure(f"{task}_rollout_tokens_per_second", run.mean("rollout/tokens_per_second"))
        report.figure(f"{task}_sync_difference", max(row["sync/difference"] for row in run.rows))
        for stage, seconds in stages.items():
            report.figure(f"{task}_seconds_{stage}", seconds)
        shown = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in stages.items())
        rows.append((task, before, after, run.mean("rollout/tokens_per_second"), summary["seconds_total"], shown))
    columns = ["task", "accuracy before", "after", "rollout tokens/s", "seconds", "by stage"]
    report.table("training end to end, engine=transformers", columns, rows)
    report.bar("arithmetic_gain", ">=", 0.1)


def train_shapes(report: Report, store: Path, quick: bool) -> None:
    """Real steps: speed, and memory against its plan."""
    chosen = gpu_shapes.QUICK if quick else gpu_shapes.SHAPES
    arms = {name: {"part": "shapes", **asdict(shape)} for name, shape in chosen.items()}
    rows, worst = [], []
    for name, result in stored(report, store, arms):
        key = figure_name(name)
        speed = report.figure(f"{key}_tokens_per_second", result["tokens"] / result["seconds"])
        report.figure(f"{key}_planned_gib", result["planned"] / GIB)
        peak = next((flops for chip, flops in PEAKS.items() if chip in result["device"]), None)
        shown: list[object] = ["–", "–", "–", "–"]
        if peak is not None:
            shown[0] = report.figure(f"{key}_mfu", speed * result["flops"] / peak)
            whole = result["flops"] + result["attention_flops"]
            shown[1] = report.figure(f"{key}_mfu_with_attention", speed * whole / peak)
        if result["measured"] is not None:
            shown[2] = report.figure(f"{key}_peak_gib", result["measured"] / GIB)
            shown[3] = report.figure(f"{key}_memory_error", result["planned"] / result["measured"] - 1)
            worst.append(abs(result["planned"] / result["measured"] - 1))
        rows.append((name, result["attention"], speed, *shown[:3], result["planned"] / GIB, shown[3]))
    columns = ["model, tokens a micro-batch", "attention", "tokens/s", "MFU", "with attention", "peak GiB", "plan GiB"]
    title = "a training step; MFU by 6N a token, 4N + 6A with LoRA, of the printed peak"
    report.table(title, [*columns, "plan ÷ peak − 1"], rows)
    if worst:
        report.figure("worst_memory_error", max(worst))
        report.bar("worst_memory_error", "<=", MEMORY_ERROR)


def time_steps(report: Report, store: Path, quick: bool, graphs: bool) -> None:
    """Measured steps, the roofline fitted to them, and the preset that the simulator has for the same GPU."""
    architecture = "tiny" if quick else "qwen3_8b"
    decode = [(1, 16), (4, 64)] if quick else gpu_steps.DECODE
    prefill = [(1, 32), (2, 64)] if quick else gpu_steps.PREFILL
    settings = {"part": "steps", "architecture": architecture, "graphs": graphs, "decode": decode, "prefill": prefill}
    for name, result in stored(report, store, {f"{architecture}{' graphs' if graphs else ' eager'}": settings}):
        times = result["times"]
        fitted, preset = gpu_steps.fit(architecture, times), Roofline()
        by_fit, by_preset = gpu_steps.errors(fitted, times), gpu_steps.errors(preset, times)
        report.table(
            f"seconds of a step, {name}",
            ["step", "batch", "tokens each", "ms", "fit: error", "preset h100_8b: error"],
            [(k, b, n, 1e3 * s, e, p) for (k, b, n, s), e, p in zip(times, by_fit, by_preset, strict=True)],
        )
        for kind, batch, length, seconds in times:
            report.figure(f"{kind}_{batch}x{length}_ms", 1e3 * seconds)
        rows = []
        for field in ("bandwidth", "peak", "overhead"):
            ours, given = getattr(fitted, field), getattr(preset, field)
            report.figure(f"fitted_{field}", ours)
            report.figure(f"fitted_{field}_over_preset", ours / given)
            rows.append((field, f"{ours:.4g}", f"{given:.4g}", given / ours - 1 if ours else float("inf")))
        report.table("roofline (bytes/s, FLOP/s, s)", ["", "fitted", "preset h100_8b", "preset ÷ fitted − 1"], rows)
        for label, errors in (("fit", by_fit), ("preset", by_preset)):
            report.figure(f"{label}_median_error", float(np.median(errors)))
            report.figure(f"{label}_worst_error", float(errors.max()))


if __name__ == "__main__":
    main()
