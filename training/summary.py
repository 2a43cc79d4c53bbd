"""What a run comes to: summary.json, a table for people, and the next commands to type."""

from __future__ import annotations

import shlex
from dataclasses import MISSING, fields
from typing import Any

from hydra.core.hydra_config import HydraConfig

from rollout.display import console, evaluation_table
from training import checkpoint
from training.config import TrainingConfig
from training.run_directory import RunDirectory


def summarise(
    evaluations: list[dict[str, Any]], steps: int, by_stage: dict[str, float], seconds: float
) -> dict[str, Any]:
    """Accuracy before and after on unseen questions, and where the time went; absent figures are left out."""
    result: dict[str, Any] = {}
    ends = ({"before": evaluations[0]} if evaluations and evaluations[0]["step"] == 0 else {}) | (
        {"after": evaluations[-1]} if evaluations and evaluations[-1]["step"] == steps else {}
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
    console.print(f"pictures: {'  '.join(map(str, sorted(run_dir.glob('*.png'))))}", highlight=False)
    console.print(f"report: {run_dir / 'report.html'}", highlight=False)
    last = checkpoint.latest(directory.checkpoints)
    if last is not None:
        console.print("next:", highlight=False)
        task = HydraConfig.get().runtime.choices["task"]
        for command in (
            f"python -m serving checkpoint={last}",
            f"python -m rollout.evaluate checkpoint={last} {evaluation_settings(cfg, task)}",
            f"tensorboard --logdir {run_dir}",
        ):
            console.print(f"  {command}", highlight=False)


def evaluation_settings(cfg: TrainingConfig, task: str) -> str:
    """Overrides that make ``rollout.evaluate`` measure what the run measured: the ``task`` member, limits, context."""
    parts = [f"task={task}", *differences("task", cfg.task), *differences("limits", cfg.limits)]
    return " ".join([*parts, f"engine.max_model_len={cfg.engine.max_model_len}"])


def differences(name: str, member: Any) -> list[str]:
    """``name.key=value`` for every setting that is not its schema's default; all of them where there is no schema.

    What demonstrations are made of is left out: nobody is shown any.
    """
    changed: list[str] = []
    if isinstance(member, dict):
        for key, value in member.items():  # its file has no key but the class: the others are new
            changed += overrides(f"{'' if key == '_target_' else '++'}{name}.{key}", value)
        return changed
    for f in fields(member):
        value = getattr(member, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if value != default and f.name != "demonstration_mix":
            changed += overrides(f"{name}.{f.name}", value)
    return changed


def overrides(key: str, value: Any) -> list[str]:
    """A setting as Hydra's command line takes it, quoted for the shell where that needs it.

    Keys that read like numbers would come as numbers from between braces: each is set by itself.
    """
    if isinstance(value, dict) and any(str(k).isdigit() for k in value):
        return [x for k, v in value.items() for x in overrides(f"{key}.{k}", v)]
    if isinstance(value, dict):
        value = f"{{{','.join(f'{k}:{v}' for k, v in value.items())}}}"
    elif isinstance(value, list):
        value = f"[{','.join(map(str, value))}]"
    return [f"{key}=null" if value is None else shlex.quote(f"{key}={value}")]
