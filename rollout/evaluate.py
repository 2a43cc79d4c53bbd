"""python -m rollout.evaluate: a checkpoint, or a running OpenAI-compatible server, on a task's unseen questions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from rollout import config
from rollout.checkpoint import read
from rollout.errors import UserError
from rollout.hydra import conf_dir, guarded, run_command, run_dir, to_object
from rollout.reasoning import told

config.register()


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="evaluate")
@guarded
def run(composed: DictConfig) -> float:
    """Evaluate and write ``evaluation.json``, a table and a plot; gives the sampled accuracy."""
    cfg: config.EvaluateConfig = to_object(composed)
    cfg.check()
    directory = run_dir()
    if cfg.threads is not None:  # before torch reads it
        os.environ["OMP_NUM_THREADS"] = str(cfg.threads)
    result = evaluate_server(cfg, directory) if cfg.url is not None else evaluate_checkpoint(cfg, directory)
    record = {"name": label(cfg), "checkpoint": cfg.checkpoint, "url": cfg.url, "task": task_name(cfg), **result}
    (directory / "evaluation.json").write_text(json.dumps(record, indent=1))
    OmegaConf.save(composed, directory / "config.yaml", resolve=True)
    show([record], directory)
    return result["sampled"]["accuracy"]


def label(cfg: config.EvaluateConfig) -> str:
    """A short name for tables and plots: the end of the checkpoint's path, or the server, and the task."""
    parts = Path(cfg.checkpoint).parts[-3:] if cfg.checkpoint else (str(cfg.url),)
    return "/".join(part for part in parts if part != "checkpoints") + f" · {task_name(cfg)}"


def task_name(cfg: config.EvaluateConfig) -> str:
    """The task's own name where its schema has one, else the class that was given."""
    return cfg.task["_target_"] if isinstance(cfg.task, dict) else cfg.task.name


def rows_of(cfg: config.EvaluateConfig, task: Any) -> list[Any]:
    rows = task.rows("test")[: cfg.evaluation.questions]
    if not rows:
        raise UserError(f"task {task_name(cfg)}: no test questions; give task.test_size or another split")
    return rows if cfg.told is None else [told(row, cfg.told) for row in rows]


def evaluate_checkpoint(cfg: config.EvaluateConfig, directory: Path) -> dict[str, Any]:
    """Start the engine on the checkpoint, play the questions, stop it."""
    folder = read(str(cfg.checkpoint)).path  # before the imports that take seconds
    from hydra.utils import get_method, instantiate
    from transformers import AutoTokenizer

    from rollout.chat import Chat
    from rollout.display import stage
    from rollout.engines import Sampling
    from rollout.evaluation import evaluate, write_outcomes
    from rollout.runner import Runner, concurrency
    from rollout.speaker import Policy

    task = instantiate(cfg.task)
    rows = rows_of(cfg, task)
    chat = Chat(AutoTokenizer.from_pretrained(folder))
    with stage("engine start", 1, "engine") as shown:
        engine = get_method(cfg.engine._target_)(cfg.engine, str(folder), log_path=directory / "engine.log")
        shown.update(1)
    runner = Runner(task.environment, cfg.limits, concurrency=concurrency(cfg.engine))
    try:
        policy = Policy(engine, chat, Sampling(max_tokens=1), cfg.engine.max_model_len, reasoning=cfg.reasoning)
        with counted(cfg, len(rows)) as progress:
            result, episodes = evaluate(runner, policy, rows, cfg.evaluation, progress)
    finally:
        runner.call(engine.close(), cfg.engine.timeout_s, "the engine to stop")
        runner.close()
    write_outcomes(episodes, directory / "outcomes.jsonl")
    return result


def evaluate_server(cfg: config.EvaluateConfig, directory: Path) -> dict[str, Any]:
    """Play the questions through chat completions; tools run here."""
    from hydra.utils import instantiate

    from rollout.chat_client import Server
    from rollout.evaluation import evaluate, write_outcomes
    from rollout.runner import Runner

    task = instantiate(cfg.task)
    rows = rows_of(cfg, task)
    runner = Runner(task.environment, cfg.limits, concurrency=cfg.concurrency)
    e = cfg.evaluation
    timeout = cfg.engine.timeout_s
    server = Server(str(cfg.url), cfg.model, e.temperature, e.seed, cfg.reasoning, timeout)
    try:
        server.model = runner.call(server.connect(), timeout, f"{cfg.url} to list its models")
        with counted(cfg, len(rows)) as progress:
            result, episodes = evaluate(runner, server, rows, e, progress)
    finally:
        runner.close()
    write_outcomes(episodes, directory / "outcomes.jsonl")
    return result


class counted:
    """One progress display over the sampled and the greedy pass."""

    def __init__(self, cfg: config.EvaluateConfig, rows: int) -> None:
        from rollout.display import stage

        e = cfg.evaluation
        self.behind = {"sampled": 0, "greedy": rows * e.samples}
        self.stage = stage(f"evaluation on {task_name(cfg)}", rows * (e.samples + e.greedy), "episodes")

    def __enter__(self) -> Callable[[str, int, int], None]:
        shown = self.stage.__enter__()
        return lambda mode, done, total: shown.update(self.behind[mode] + done)

    def __exit__(self, *error: Any) -> None:
        self.stage.__exit__(*error)


def show(records: list[dict[str, Any]], directory: Path) -> None:
    """The table, and ``evaluation.png`` beside the JSON."""
    from rollout import plots
    from rollout.display import console, evaluation_table

    console.print(evaluation_table([(record["name"], record) for record in records]))
    for record in records if len(records) == 1 else []:
        parts = record["sampled"]["by_difficulty"]
        greedy = record.get("greedy", {}).get("by_difficulty", {})
        each = {d: {"sampled": f} | ({"greedy": greedy[d]} if d in greedy else {}) for d, f in parts.items()}
        console.print(evaluation_table([(f"difficulty {d}", figures) for d, figures in each.items()], "by difficulty"))
    named = [(record["name"], record) for record in records]
    plots.plot_evaluations(named, directory / "evaluation.png")
    if len(records) > 1:
        plots.plot_pareto(named, directory / "pareto.png")
    pictures = "  ".join(map(str, sorted(directory.glob("*.png"))))
    console.print(f"written: {directory / 'evaluation.json'}  {pictures}", highlight=False)


class Combine(Callback):
    """At the end of a sweep: one table and one plot over its jobs, and all results in one ``evaluation.json``.

    The jobs whose directories the launcher calls ``failed`` are left out: what lies there is of an earlier sweep.
    """

    def on_multirun_end(self, config: DictConfig, failed: Sequence[Path] = (), **kwargs: Any) -> None:
        directory = Path(config.hydra.sweep.dir)
        jobs = sorted(directory.glob("*/evaluation.json"), key=lambda path: int(path.parent.name))
        records = [json.loads(path.read_text()) for path in jobs if path.parent.absolute() not in failed]
        if records:
            (directory / "evaluation.json").write_text(json.dumps(records, indent=1))
            show(records, directory)


def main() -> None:
    run_command(run)


if __name__ == "__main__":
    main()
