"""A training run from its first line to its summary: warm start, evaluation, RL, evaluation, pictures."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import OmegaConf
from transformers import TrainerCallback

from rollout import plots
from rollout.chat import Chat
from rollout.display import Stage, stage
from rollout.errors import UserError
from rollout.evaluation import evaluate
from training import build, checkpoint, summary
from training.config import TrainingConfig
from training.journal import Journal
from training.models import load_policy
from training.warm_start import warm_start


class Run:
    """One run in its directory. ``stages.json`` remembers what was done, so that a resumed run does not do it again."""

    def __init__(self, cfg: TrainingConfig, run_dir: Path) -> None:
        self.cfg, self.dir = cfg, run_dir
        self.start = time.monotonic()
        self.stages_file = run_dir / "stages.json"
        self.stages: dict[str, Any] = {"seconds": {}, "evaluations": []}

    def open(self, composed: Any) -> None:
        """Make the directory, or find in it the run to go on with."""
        found = self.stages_file.exists()
        if found and not (self.cfg.resume or self.cfg.overwrite):
            raise UserError(f"run_dir: {self.dir} holds a run already; resume=true goes on, overwrite=true replaces it")
        if found and self.cfg.overwrite and not self.cfg.resume:
            shutil.rmtree(self.dir)
            found = False
        self.dir.mkdir(parents=True, exist_ok=True)
        if found:
            self.stages = json.loads(self.stages_file.read_text())
        (self.dir / "config.yaml").write_text(OmegaConf.to_yaml(composed, resolve=True))
        self.remember()

    def remember(self) -> None:
        scratch = self.stages_file.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.stages, indent=1))
        scratch.replace(self.stages_file)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's seconds to the stage's."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = self.stages["seconds"]
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
            self.remember()

    def execute(self) -> dict[str, Any]:
        """Everything; gives the summary that is also written to ``summary.json``."""
        cfg = self.cfg
        with ExitStack() as stack:
            task = build.make_task(cfg.task)
            build.make_axes(cfg, task)  # refuses what cannot be, before anything takes time
            resume = checkpoint.latest(self.dir / "checkpoints") if cfg.resume else None
            with self.timed("warm_start"):
                first = self.first_policy(task)
            start_from = resume or first
            adapter = resume / "adapter" if resume is not None and cfg.lora is not None else None
            model, tokenizer = build.make_policy_model(cfg, start_from if adapter is None else first, adapter)
            with self.timed("engine_start"), stage("engine start", 1, "engine") as shown:
                engine = build.make_engine(cfg.engine, start_from, self.dir / "engine.log")
                shown.update(1)
            runner, seen_engine = build.make_runner(cfg, task, engine)
            stack.callback(runner.close)
            stack.callback(lambda: runner.call(engine.close(), cfg.engine.timeout_s, "the engine to stop"))
            policy = build.make_policy(cfg, seen_engine, tokenizer)
            chat = Chat(tokenizer)
            ids = build.probe_sequences(task, chat, cfg.probe.sequences)
            engine_sync = build.EngineSync(cfg, runner, seen_engine, model, ids)
            journal = Journal(self.dir)
            done = json.loads((resume / "trainer_state.json").read_text())["global_step"] if resume is not None else 0
            journal.cut_after(done)
            self.stages["evaluations"] = [e for e in self.stages["evaluations"] if e["step"] <= done]

            def measure(step: int, questions: int | None, title: str) -> None:
                rows = task.rows("test")[:questions]
                engine_sync(step)
                with self.timed("evaluation"), stage(title, len(rows) * self._plays(), "episodes") as shown:
                    behind = {"sampled": 0, "greedy": len(rows) * cfg.evaluation.samples}
                    result, _ = evaluate(
                        runner,
                        policy,
                        rows,
                        cfg.evaluation,
                        lambda mode, done, total: shown.update(behind[mode] + done),
                    )
                engine_sync.forget()
                self.stages["evaluations"].append({"step": step, **result})
                self.remember()

            if cfg.evaluation.before and resume is None and not self.stages["evaluations"]:
                measure(0, cfg.evaluation.questions, "evaluation before")
            with stage("training", cfg.steps, "steps") as shown:
                callback = LoopCallback(cfg, shown, journal, measure)
                reference = build.make_reference(cfg, model, first)
                trainer = build.make_trainer(cfg, self.dir, model, tokenizer, reference, [callback])
                trainer.stream = build.make_stream(cfg, task, runner, policy, trainer, engine_sync, journal)
                callback.stream, callback.engine_sync = trainer.stream, engine_sync
                if resume is not None:
                    state = torch.load(resume / "stream.pt", weights_only=False)
                    trainer.stream.load_state_dict(state)
                with self.timed("training"):
                    if done < cfg.steps:  # transformers would train one step too many
                        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
            if cfg.evaluation.after and not any(e["step"] == cfg.steps for e in self.stages["evaluations"][1:]):
                measure(cfg.steps, cfg.evaluation.questions, "evaluation after")
        return self.finish()

    def _plays(self) -> int:
        return self.cfg.evaluation.samples + int(self.cfg.evaluation.greedy)

    def first_policy(self, task: Any) -> Path | str:
        """The policy that RL starts from: the model as it is, or warm-started on demonstrations."""
        cfg = self.cfg
        path = build.initial_model(cfg, task, self.dir / "model")
        if cfg.warm_start is None:
            return path
        target = self.dir / "checkpoints" / "warm_start"
        if target.exists():
            return target
        if not hasattr(task, "demonstrations"):
            raise UserError(f"warm_start: task {task.name} has no demonstrations; add warm_start=none")
        torch.manual_seed(cfg.seed)
        model, tokenizer = load_policy(path, dtype=cfg.model.dtype, attention=cfg.model.attention)
        demonstrations = task.demonstrations(cfg.warm_start.demonstrations, cfg.seed)
        with stage("warm start", cfg.warm_start.steps, "steps") as shown:

            def progress(done: int, total: int, logs: dict[str, float]) -> None:
                shown.update(done, f"loss {logs['loss']:.3f}" if "loss" in logs else "")

            with checkpoint.folder_written_whole(target) as scratch:
                warm_start(model, tokenizer, demonstrations, cfg.warm_start, scratch / "work", cfg.seed, progress)
                shutil.rmtree(scratch / "work", ignore_errors=True)
                checkpoint.save_policy(model, tokenizer, scratch)
        return target

    def finish(self) -> dict[str, Any]:
        """Summary, plots, and what to type next."""
        result = summary.summarise(self.stages, time.monotonic() - self.start)
        (self.dir / "summary.json").write_text(json.dumps(result, indent=1))
        rows = plots.read_jsonl(self.dir / "metrics.jsonl")
        plots.plot_reward(rows, self.stages["evaluations"], self.dir / "reward.png")
        plots.plot_behaviour(rows, self.dir / "behaviour.png")
        summary.show(result, self.stages, self.dir, self.cfg)
        return result


class LoopCallback(TrainerCallback):
    """Writes each step's row, moves the progress display, and evaluates every so many steps."""

    def __init__(self, cfg: TrainingConfig, shown: Stage, journal: Journal, measure: Any) -> None:
        self.cfg, self.shown, self.journal, self.measure = cfg, shown, journal, measure
        self.stream: Any = None
        self.engine_sync: Any = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        self.journal.write_metrics(state.global_step, {**logs, "sync/difference": self.engine_sync.difference})
        reward = logs.get("reward")
        note = "" if reward is None else f"reward {reward:.3f}  tool calls {logs['rollout/tool_calls']:.2f}"
        self.shown.update(state.global_step, note)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.cfg.evaluation.every
        if every is not None and state.global_step % every == 0 and state.global_step < self.cfg.steps:
            self.measure(state.global_step, self.cfg.evaluation.every_questions, "evaluation")
        if state.global_step == self.cfg.steps:
            control.should_save = True


def execute(cfg: TrainingConfig, composed: Any, run_dir: Path) -> dict[str, Any]:
    """Run it; on Ctrl-C and on errors the last checkpoint stands and nothing else is left running."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    transformers.utils.logging.disable_progress_bar()  # bars of loading and saving tear our own display
    transformers.utils.logging.set_verbosity_error()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_dir / "tensorboard")
    run = Run(cfg, run_dir)
    run.open(composed)
    return run.execute()
