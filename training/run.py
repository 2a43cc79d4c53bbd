"""A training run from its first line to its summary: warm start, evaluation, RL, evaluation, pictures."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from rollout import plots
from rollout.chat import Chat
from rollout.display import Stage, console, stage
from rollout.engines.device_transfer import check_transfer
from rollout.environment import Row
from rollout.errors import UserError
from rollout.evaluation import evaluate, write_outcomes
from training import build, checkpoint, layout, success_history, summary
from training.config import TrainingConfig
from training.device import give_memory_back
from training.engine_sync import EngineSync
from training.journal import Journal
from training.models import load_policy
from training.ranks import Ranks
from training.report import page
from training.run_directory import RunDirectory
from training.together import Together
from training.warm_start import warm_start


def execute(cfg: TrainingConfig, composed: Any, run_dir: Path, start: float) -> dict[str, Any]:
    """Run it and give the summary; ``start`` (time.monotonic) is when the command began.

    On Ctrl-C and on errors the last checkpoint stands and nothing is left running. Ranks other than the first write
    nothing of their own and give no summary.
    """
    check_transfer(cfg.engine)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    transformers.utils.logging.disable_progress_bar()  # bars of loading and saving tear our own display
    transformers.utils.logging.set_verbosity_error()
    with ExitStack() as stack:
        ranks = Ranks(cfg.process_timeout_s)
        # NCCL's part of leaving waits for all ranks: not after an error, when the others wait for something else.
        stack.push(lambda error, *_: ranks.close() if error is None or not torch.cuda.is_available() else None)
        directory = RunDirectory(Path(ranks.agree(str(run_dir))), writes=ranks.leads)
        if ranks.leads:
            os.environ["TENSORBOARD_LOGGING_DIR"] = str(directory.path / "tensorboard")
            if cfg.resume:
                check_resumable(cfg, directory, ranks.size)
            stack.enter_context(directory.open(composed, resume=cfg.resume, overwrite=cfg.overwrite))
        else:
            console.quiet = True
        ranks.agree()  # rank 0 has made the directory
        with ranks.waiting("the others"):
            run = Run(cfg, directory, ranks, stack)
            directory.stands()
            run.train()
        return finish(cfg, directory, time.monotonic() - start) if ranks.leads else {}


def check_resumable(cfg: TrainingConfig, directory: RunDirectory, processes: int) -> None:
    """Raise UserError where the last checkpoint is not what this run could go on from; say so where there is none."""
    found = checkpoint.latest(directory.checkpoints)
    if found is None:
        console.print(f"note: resume: {directory.path} holds no checkpoint; the run begins at step 0", highlight=False)
        return
    if (done := checkpoint.step_of(found)) > cfg.steps:
        raise UserError(
            f"steps={cfg.steps}: {found} has {done} behind it; give as many, or delete the later checkpoints"
        )
    layout.check_resumable(found, layout.wanted(cfg.trainer, processes))


class Run:
    """The parts of a run, built in order; ``stack`` stops the engine and the rollouts whatever happens.

    Engine, rollouts and journal are rank 0's.
    """

    def __init__(self, cfg: TrainingConfig, directory: RunDirectory, ranks: Ranks, stack: ExitStack) -> None:
        self.cfg, self.directory, self.ranks = cfg, directory, ranks
        self.task = build.make_task(cfg.task)
        self.axes = build.make_axes(cfg, self.task)  # refuses what cannot be, before anything takes time
        self.resume = ranks.agree(checkpoint.latest(directory.checkpoints) if cfg.resume and ranks.leads else None)
        with directory.timed("warm_start"):
            self.first = first_policy(cfg, self.task, directory, ranks)
        give_memory_back()
        adapter = self.resume / "adapter" if self.resume is not None and cfg.lora is not None else None
        weights = self.first if adapter is not None else self.resume or self.first
        self.model, self.tokenizer = build.make_policy_model(cfg, weights, adapter)
        probe_ids = build.probe_sequences(self.task, Chat(self.tokenizer), cfg.probe.sequences)
        if not ranks.leads:
            self.sync = EngineSync(cfg, ranks, None, None, self.model, probe_ids)
            return
        start = self.resume or self.first
        settings = build.engine_settings(cfg, start, directory.path)
        if cfg.sends_adapter:  # over the weights that it was trained over: a checkpoint's have it in them already
            settings, start = build.with_adapter(cfg, settings, self.model), self.first
        with directory.timed("engine_start"), stage("engine start", 1, "engine") as shown:
            engine = build.make_engine(settings, start, directory.path / "engine.log")
            shown.update(1)
        self.runner, engine_of_episodes = build.make_runner(cfg, self.task, engine)
        stack.callback(self.runner.close)
        stack.callback(lambda: self.runner.call(engine.close(), cfg.engine.timeout_s, "the engine to stop"))
        self.policy = build.make_policy(cfg, engine_of_episodes, self.tokenizer)
        self.rollouts = build.make_rollouts(cfg, self.task, self.axes, self.runner, self.policy)
        self.sync = EngineSync(cfg, ranks, self.runner, engine_of_episodes, self.model, probe_ids)
        self.journal = Journal(directory.path, self.tokenizer.decode)
        stack.callback(self.journal.flush)  # a step that failed is the one to look at
        self.sync.rest()  # an optimizer's states may have to be read first

    def train(self) -> None:
        """Evaluate, train and evaluate again; a resumed run goes on where its last whole checkpoint stands."""
        cfg, directory, ranks = self.cfg, self.directory, self.ranks
        done = 0 if self.resume is None else checkpoint.step_of(self.resume)
        if ranks.leads:
            self.journal.cut_after(done)
            directory.go_back_to(done)
        if ranks.agree(cfg.evaluation.before and not directory.evaluations and done == 0):
            self.measure(0, cfg.evaluation.questions, "evaluation before")
        if done and cfg.max_staleness:
            self.sync(done)  # rounds in the air begin at once: what they write is of this version
        if done < cfg.steps:  # else transformers would train one step too many
            with directory.timed("training"), stage("training", cfg.steps, "steps") as shown:
                self.trainer(shown).train(resume_from_checkpoint=None if self.resume is None else str(self.resume))
        if ranks.agree(cfg.evaluation.after and not any(e["step"] == cfg.steps for e in directory.evaluations)):
            self.measure(cfg.steps, cfg.evaluation.questions, "evaluation after")

    def trainer(self, shown: Stage) -> Any:
        """The trainer on its stream, both as the checkpoint left them where there is one."""
        reference = build.make_reference(self.cfg, self.model, self.first)
        packs = build.packs(self.cfg, self.model)
        callbacks = [LoopCallback(self, shown)]
        trainer = build.make_trainer(
            self.cfg, self.directory.path, self.model, self.tokenizer, reference, callbacks, self.ranks
        )
        trainer.critic = build.make_value_model(self.cfg, self.first, self.resume, trainer)
        together = Together(self.ranks, self.sync, trainer.logprobs, trainer.critic)
        batch = build.make_batch(self.cfg, packs, trainer.critic)
        if not self.ranks.leads:
            trainer.steps = together.followed()
            return trainer

        def warmed_up(rounds: int, metrics: dict[str, float]) -> None:
            explained = metrics.get("critic/explained_variance", 0.0)
            shown.update(0, f"critic warm-up {rounds} of {self.cfg.critic.warmup_rounds}, explains {explained:.2f}")

        stream = build.make_stream(
            self.cfg, self.rollouts, trainer, self.sync, self.journal, warmed_up, together, batch
        )
        if self.resume is not None:
            stream.load_state_dict(torch.load(self.resume / "stream.pt", weights_only=False))
        trainer.stream, trainer.steps = stream, together.led(stream)
        return trainer

    def measure(self, step: int, questions: int | None, title: str) -> None:
        """Evaluate the policy as it is after ``step`` steps."""
        self.sync(step)
        if self.ranks.leads:
            self._evaluate(step, self.task.rows("test")[:questions], title)
        self.sync.forget()  # what the evaluation left in the prefix cache must not touch training
        self.sync.rest()

    def _evaluate(self, step: int, rows: list[Row], title: str) -> None:
        settings = self.cfg.evaluation
        behind = {"sampled": 0, "greedy": len(rows) * settings.samples}
        plays = len(rows) * (settings.samples + settings.greedy)
        with self.directory.timed("evaluation"), stage(title, plays, "episodes") as shown:

            def progress(mode: str, done: int, total: int) -> None:
                shown.update(behind[mode] + done)

            result, episodes = evaluate(self.runner, self.policy, rows, settings, progress)
        write_outcomes(episodes, self.directory.path / "outcomes" / f"step-{step}.jsonl")
        self.directory.evaluated(step, result)


class LoopCallback(TrainerCallback):
    """Writes each step's row, moves the progress display, and evaluates every so many steps."""

    def __init__(self, run: Run, shown: Stage) -> None:
        self.run, self.shown = run, shown

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or not self.run.ranks.leads:
            return
        self.run.journal.write_metrics(state.global_step, {**logs, "sync/difference": self.run.sync.difference})
        reward = logs.get("reward")
        note = "" if reward is None else f"reward {reward:.3f}  tool calls {logs['rollout/tool_calls']:.2f}"
        self.shown.update(state.global_step, note)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.save_steps = args.save_steps  # a resumed run has those of its checkpoint in force

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        cfg = self.run.cfg
        every, last = cfg.evaluation.every, state.global_step == cfg.steps
        if every is not None and state.global_step % every == 0 and not last:
            self.run.measure(state.global_step, cfg.evaluation.every_questions, "evaluation")
        if last:
            control.should_save = True


def first_policy(cfg: TrainingConfig, task: Any, directory: RunDirectory, ranks: Ranks) -> Path | str:
    """The policy that RL starts from: the model as it is, or warm-started on demonstrations."""
    path = ranks.agree(build.initial_model(cfg, task, directory.path / "model") if ranks.leads else None)
    if cfg.warm_start is None:
        return path
    target = directory.checkpoints / "warm_start"
    if ranks.agree(target.exists()):
        return target
    if not hasattr(task, "demonstrations"):
        raise UserError(f"warm_start: task {task.name} has no demonstrations; add warm_start=none")
    torch.manual_seed(cfg.seed)
    model, tokenizer = load_policy(path, dtype=cfg.model.dtype, attention=cfg.model.attention)
    demonstrations = task.demonstrations(cfg.warm_start.demonstrations, cfg.seed)
    with ExitStack() as stack:
        shown = stack.enter_context(stage("warm start", cfg.warm_start.steps, "steps"))
        scratch = ranks.agree(stack.enter_context(checkpoint.written_whole(target)) if ranks.leads else None)

        def progress(done: int, logs: dict[str, float]) -> None:
            shown.update(done, f"loss {logs['loss']:.3f}" if "loss" in logs else "")

        warm_start(model, tokenizer, demonstrations, cfg.warm_start, scratch / "work", cfg.seed, progress)
        if ranks.leads:
            shutil.rmtree(scratch / "work", ignore_errors=True)
            checkpoint.save_policy(model, tokenizer, scratch)
    ranks.agree()  # rank 0 has renamed it into place
    return target


def finish(cfg: TrainingConfig, directory: RunDirectory, seconds: float) -> dict[str, Any]:
    """Summary, plots, and what to type next."""
    result = summary.summarise(directory.evaluations, cfg.steps, directory.seconds, seconds)
    (directory.path / "summary.json").write_text(json.dumps(result, indent=1))
    rows = plots.read_jsonl(directory.path / "metrics.jsonl")
    plots.plot_reward(rows, directory.evaluations, directory.path / "reward.png")
    plots.plot_behaviour(rows, directory.path / "behaviour.png")
    last = checkpoint.latest(directory.checkpoints)
    history = last is not None and (last / success_history.FILE).exists()
    if history and (spent := success_history.SuccessHistory.read(last).spent()):
        plots.plot_budget(spent, directory.path / "budget.png")
    page.write(directory.path)
    summary.show(result, directory, cfg)
    return result
