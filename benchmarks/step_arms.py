"""The arms of ``benchmarks.step_vs_trl``: one training run each, in a process of its own, step by step on command."""

from __future__ import annotations

import functools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rollout.episode import Episode
from rollout.errors import WaitTimeout

TIMEOUT_S = 300.0  # longest wait for an arm's start or its turn
LAST_STEP = 100_000  # the gate ends a run, never its length


class RandomReward:
    """Varies in every group and asks for nothing: no group can be skipped, and lengths stay what they are."""

    needs_tools = False

    def __call__(self, group: Sequence[Episode]) -> list[dict[str, float]]:
        return [{"random": random.random()} for _ in group]


def overrides(folder: Path, batch: dict[str, int]) -> list[str]:
    """Our run, as a person would type it."""
    return [
        "experiment=quickstart",
        f"model.path={folder / 'model'}",
        f"run_dir={folder / 'run'}",
        f"steps={LAST_STEP}",
        "task.use_tool=false",
        "warm_start=none",
        "reward._target_=benchmarks.step_arms.RandomReward",
        f"batch.prompts={batch['prompts']}",
        "batch.max_tokens=4096",  # smaller micro-batches of shorter rows: less padding, and caches hold them
        "batch.row_tokens=64",
        f"budget.samples={batch['samples']}",
        f"limits.max_new_tokens={batch['tokens']}",
        "limits.max_turns=1",
        "optimizer.learning_rate=1e-5",  # small: the reward is noise, and lengths must stay
        "optimizer.lr_scheduler_type=constant",
        f"engine.max_num_seqs={batch['prompts'] * batch['samples']}",
        "evaluation.before=false",
        "evaluation.after=false",
        "evaluation.every=null",
        f"checkpoint.every={LAST_STEP}",
    ]


def configuration(folder: Path, batch: dict[str, int], *more: str) -> Any:
    """The same as an object: TRL's numbers are read from it."""
    from hydra import compose, initialize_config_dir

    from rollout.hydra import conf_dir, to_object
    from training import config

    config.register()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return to_object(compose("training", [*overrides(folder, batch), *more]))


def make_gate(pipe: Connection, warm: int) -> Any:
    """The callback that reports times and lets the parent decide when the next steps run."""
    from transformers import TrainerCallback

    class Gate(TrainerCallback):
        def __init__(self) -> None:
            self.left, self.start, self.seconds = warm, 0.0, list[float]()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)
            self.left -= 1
            if self.left <= 0:
                pipe.send(self.seconds)
                if not pipe.poll(10 * TIMEOUT_S):
                    raise WaitTimeout(f"no word from the benchmark for {10 * TIMEOUT_S:.0f} s")
                self.left, self.seconds = pipe.recv(), []
                control.should_training_stop = self.left == 0
            self.start = time.perf_counter()

    return Gate()


def column(history: list[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in history if name in row]


def train_ours(settings: dict[str, Any], folder: Path, gate: Any) -> dict[str, Any]:
    """``python -m training`` with one more callback."""
    from training import build
    from training.__main__ import main

    make_trainer, made = build.make_trainer, []

    def with_gate(*arguments: Any) -> Any:
        made.append(make_trainer(*arguments))
        made[0].add_callback(gate)
        return made[0]

    build.make_trainer = with_gate
    sys.argv = ["training", *overrides(folder, settings["batch"]), f"threads={settings['threads']}"]
    main()
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "completion": statistics.fmean(column(rows, "rollout/tokens_per_episode")),
        "truncated": statistics.fmean(column(rows, "rollout/truncated")),
        "varied": statistics.fmean(column(rows, "effective_gradient_ratio")),
        "weights_off": max(column(rows, "sync/difference")),
    }


def train_trl(settings: dict[str, Any], folder: Path, gate: Any) -> dict[str, Any]:
    """The same run on ``trl.GRPOTrainer``."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from training import build

    torch.set_num_threads(settings["threads"])
    cfg = configuration(folder, settings["batch"])
    samples = cfg.batch.prompts * cfg.budget.samples
    generation = {
        "trl_generate": {},
        "trl_continuous": {
            "use_transformers_continuous_batching": True,
            "transformers_continuous_batching_config": {
                "page_size": 32,
                "num_blocks": 1024,
                "max_batch_tokens": 8192,
                "max_requests_per_batch": samples,
                "allow_block_sharing": False,
                "use_async_batching": False,
            },
        },
    }.get(settings["arm"])
    if generation is None:
        generation = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_max_model_length": cfg.engine.max_model_len,
            "vllm_importance_sampling_correction": False,
            "generation_kwargs": {"detokenize": False},
        }
        cure_vllm(cfg.engine, compiled=settings["arm"] == "trl_vllm_compiled")
    arguments = GRPOConfig(
        output_dir=str(folder / "run"),
        model_init_kwargs={"dtype": cfg.model.dtype},
        max_steps=LAST_STEP,
        per_device_train_batch_size=samples,
        num_generations=cfg.budget.samples,
        max_completion_length=cfg.limits.max_new_tokens,
        temperature=cfg.sampling.temperature,
        loss_type="dapo",  # the mean over all tokens of the batch
        epsilon=cfg.loss.clip_low,
        epsilon_high=cfg.loss.clip_high,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **asdict(cfg.optimizer),
        **generation,
    )
    trainer = GRPOTrainer(
        str(folder / "model"),
        reward_funcs=lambda completions, **_: [random.random() for _ in completions],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": row.messages} for row in build.make_task(cfg.task).rows("train")]),
        callbacks=[gate],
    )
    trainer.train()
    history = trainer.state.log_history
    result = {
        "completion": statistics.fmean(column(history, "completions/mean_length")),
        "truncated": statistics.fmean(column(history, "completions/clipped_ratio")),
        "varied": 1 - statistics.fmean(column(history, "frac_reward_zero_std")),
    }
    return result | (weights_follow(trainer) if arguments.use_vllm else {})


def cure_vllm(engine: Any, compiled: bool) -> None:
    """Give TRL's colocated vLLM our engine's settings, and weights that can be replaced."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from trl.generation import vllm_generation
    from vllm import LLM

    from rollout.engines.vllm_plugin import keep_weights

    keep_weights()
    vllm_generation.LLM = functools.partial(
        LLM,
        dtype=engine.dtype,
        block_size=engine.block_size,
        kv_cache_memory_bytes=int(engine.kv_cache_gib * 2**30),
        enforce_eager=not compiled,
        enable_chunked_prefill=False,
    )


def weights_follow(trainer: Any) -> dict[str, float]:
    """Move all weights and sync as TRL does: how far log-probs moved, and how far vLLM's are from the trainer's."""
    import torch

    from rollout.weights import model_logprobs

    model, generation = trainer.accelerator.unwrap_model(trainer.model), trainer.vllm_generation
    prompts = [trainer.processing_class(f"What is {a} + 2?").input_ids for a in range(8)]
    _, written, _, _ = generation.generate(prompts=prompts, images=None, num_generations=1)
    before = model_logprobs(model, [p + list(c) for p, c in zip(prompts, written, strict=True)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    after = model_logprobs(model, [p + list(c) for p, c in zip(prompts, written, strict=True)])
    generation.sync_weights()
    _, written, logprobs, _ = generation.generate(prompts=prompts, images=None, num_generations=1)
    theirs = [[x[0] for x in row] for row in logprobs]
    scored = model_logprobs(model, [p + list(c) for p, c in zip(prompts, written, strict=True)])
    ours = [row[len(p) - 1 :] for p, row in zip(prompts, scored, strict=True)]
    return {"weights_moved": furthest(before, after), "weights_off": furthest(theirs, ours)}


def furthest(a: list[list[float]], b: list[list[float]]) -> float:
    return max(abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def build_model(folder: Path, batch: dict[str, int]) -> None:
    """The checkpoint that all arms start from, in ``folder/model``: untrained, or after the task's warm start."""
    from training import build, checkpoint
    from training.models import load_policy
    from training.warm_start import warm_start

    steps = batch["warm_start"]
    cfg = configuration(folder, batch, "model.path=null", "warm_start=arithmetic", f"warm_start.steps={steps or 1}")
    task = build.make_task(cfg.task)
    made = build.initial_model(cfg, task, folder / "untrained")
    if steps:
        model, tokenizer = load_policy(made)
        demonstrations, work_dir = task.demonstrations(cfg.warm_start.demonstrations, cfg.seed), folder / "warm_start"
        warm_start(model, tokenizer, demonstrations, cfg.warm_start, work_dir, cfg.seed, lambda step, logs: None)
        made = work_dir / "policy"
        checkpoint.save_policy(model, tokenizer, made)
    Path(made).rename(folder / "model")


def work(pipe: Connection, settings: dict[str, Any], folder: Path) -> None:
    """An arm's process: what it prints goes to ``log``, its result to the parent."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    gate = make_gate(pipe, settings["warm"])
    pipe.send((train_ours if settings["arm"] == "ours" else train_trl)(settings, folder, gate))
