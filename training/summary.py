"""What a run comes to: summary.json, a table for people, and the next commands to type."""

from __future__ import annotations

from typing import Any

from rollout.display import console, evaluation_table
from training import checkpoint
from training.config import TrainingConfig
from training.run_directory import RunDirectory


def summarise(evaluations: list[dict[str, Any]], by_stage: dict[str, float], seconds: float) -> dict[str, Any]:
    """Accuracy before and after on unseen questions, and where the time went; absent figures are left out."""
    result: dict[str, Any] = {}
    ends = ({"before": evaluations[0]} if evaluations and evaluations[0]["step"] == 0 else {}) | (
        {"after": evaluations[-1]} if evaluations and evaluations[-1]["step"] > 0 else {}
    )
    for end, evaluation in ends.items():
        for mode, name in (("sampled", "accuracy"), ("greedy", "greedy")):
            if mode in evaluation:
                result[f"{name}_{end}"] = evaluation[mode]["accuracy"]
    result["seconds_total"] = round(seconds, 1)
    result["seconds_by_stage"] = {name: round(value, 1) for name, value in by_stage.items()}
    return result


def show(result: dict[str, Any], directory: RunDirectory, cfg: TrainingConfig) -> None:
    """The summary table, the pictures' places, and what to type next."""
    run_dir = directory.path
    if directory.evaluations:
        console.print(evaluation_table([(f"step {e['step']}", e) for e in directory.evaluations]))
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds_by_stage"].items())
    console.print(f"{result['seconds_total']:.0f} s in all: {seconds}", highlight=False)
    console.print(f"pictures: {run_dir / 'reward.png'}  {run_dir / 'behaviour.png'}", highlight=False)
    last = checkpoint.latest(directory.checkpoints)
    if last is not None:
        task = f"task={cfg.task.name}" + (f" task.path={cfg.task.path}" if getattr(cfg.task, "path", None) else "")
        console.print("next:", highlight=False)
        for command in (
            f"python -m serving checkpoint={last}",
            f"python -m rollout.evaluate checkpoint={last} {task}",
            f"tensorboard --logdir {run_dir}",
        ):
            console.print(f"  {command}", highlight=False)
