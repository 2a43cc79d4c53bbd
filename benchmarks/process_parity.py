"""The same steps on one process and on several: gradients and weight changes of GRPO and T-PPO from recorded episodes.

The episodes come from real rollouts (vLLM, CPU). Arms: one process; two, and once four, with DDP; two with ZeRO-2,
ZeRO-3 and FSDP2; gloo, float32. Relative: the norm of the difference over the norm, of all weights together.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.arms import STORE, code
from benchmarks.report import Report, figure_name

STEPS = 4
SMALL = [
    "experiment=quickstart",
    "warm_start=none",
    "reward._target_=benchmarks.process_parity.Varied",
    "model.hidden=64",
    "model.heads=2",
    "batch.prompts=8",
    "budget.samples=4",
    "limits.max_new_tokens=24",
    "batch.max_tokens=512",
    f"steps={STEPS}",
    "checkpoint.every=1000",
    "optimizer.learning_rate=1e-3",
    "optimizer.max_grad_norm=0",
    "evaluation.before=false",
    "evaluation.after=false",
]
ALGORITHMS = {
    "GRPO": ["algorithm=grpo_token", "batch.minibatches=2"],
    "T-PPO": [
        "algorithm=tppo",
        "window.length=6",
        "critic.warmup_rounds=1",
        "critic.minibatches=2",
        "critic.optimizer.max_grad_norm=0",
        "critic.optimizer.learning_rate=1e-3",
    ],
}
ARMS = {
    "2 processes": (2, "none"),
    "2 processes, ZeRO-2": (2, "zero2"),
    "2 processes, ZeRO-3": (2, "zero3"),
    "2 processes, FSDP2": (2, "fsdp2"),
    "4 processes": (4, "none"),
}


class Varied:
    """A reward that varies even for an untrained policy."""

    needs_tools = False

    def __call__(self, group: Any) -> list[dict[str, float]]:
        return [{"length": e.own_tokens / 16 + len(set(e.sequences[0].token_ids)) / 50} for e in group]


class Recorded:
    """Rounds of a real run, played back: a member of the ``window`` axis without an engine."""

    ahead = False

    def __init__(self, rounds: list[Any], source: Any) -> None:
        self.rounds, self.source = iter(rounds), source

    def play(self, version: int) -> Any:
        return next(self.rounds)

    def state_dict(self) -> dict[str, Any]:
        return {}


def composed(overrides: list[str]) -> Any:
    from hydra import compose, initialize_config_dir
    from omegaconf import open_dict

    from rollout.hydra import conf_dir, to_object
    from training import config

    config.register()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("training", overrides)
    with open_dict(cfg):
        cfg.pop("hydra", None)
    made = to_object(cfg)
    made.check()
    return made, cfg


def record(folder: Path, overrides: list[str]) -> None:
    """A run of a few steps with a real engine; its rounds go to ``rounds.pt``, the policy to ``run/model``."""
    import copy
    from contextlib import ExitStack

    import torch

    from training.ranks import Ranks
    from training.run import Run
    from training.run_directory import RunDirectory

    torch.set_num_threads(1)
    cfg, raw = composed([*overrides, f"run_dir={folder}/run"])
    directory = RunDirectory(folder / "run")
    directory.open(raw, resume=False, overwrite=True)
    rounds = []
    with ExitStack() as stack:
        run = Run(cfg, directory, Ranks(), stack)
        play = run.rollouts.play

        def recording(version: int) -> Any:
            rounds.append(copy.deepcopy(play(version)))
            return rounds[-1]

        run.rollouts.play = recording
        run.train()
    torch.save(rounds, folder / "rounds.pt")


def replay(folder: Path, out: Path, overrides: list[str]) -> None:
    """On each process: the recorded rounds again; rank 0 keeps the first gradients, and what the steps changed."""
    import torch
    from transformers import TrainerCallback

    from rollout.activity import Activity
    from training import build
    from training.lora import merged_weights
    from training.prompts import PromptOrder
    from training.ranks import Ranks
    from training.sharding import is_sharded, whole, whole_weights
    from training.stream import RolloutStream
    from training.together import Together

    torch.set_num_threads(1)
    cfg, _ = composed([*overrides, f"run_dir={out}"])
    ranks = Ranks(600.0)
    task = build.make_task(cfg.task)
    path = folder / "run" / "model"
    model, tokenizer = build.make_policy_model(cfg, path, None)
    packs = build.packs(cfg, model)
    first = {name: value.clone() for name, value in merged_weights(model)}
    gradients: dict[str, torch.Tensor] = {}

    class Gradients(TrainerCallback):
        """Of the first step: before the optimizer, and under DeepSpeed before its engine steps by itself."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            engine = trainer.model_wrapped
            if trainer.is_deepspeed_enabled and state.global_step == 0:
                from deepspeed.utils import safe_get_full_grad

                step = engine.step

                def kept(*args: Any, **kwargs: Any) -> Any:
                    for name, parameter in model.named_parameters():
                        gradient = safe_get_full_grad(parameter).clone()
                        gradients.setdefault(name.removeprefix("module."), gradient)
                    return step(*args, **kwargs)

                engine.step = kept

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not trainer.is_deepspeed_enabled and state.global_step == 0:
                gradients.update({n: whole(p.grad).clone() for n, p in model.named_parameters()})

    trainer = build.make_trainer(cfg, out, model, tokenizer, None, [Gradients()], ranks)
    trainer.critic = build.make_value_model(cfg, path, None, trainer)
    critic_first = {n: v.clone() for n, v in whole_weights(trainer.critic.model)} if trainer.critic else {}
    together = Together(ranks, lambda version: version, trainer.logprobs, trainer.critic)
    batch = build.make_batch(cfg, packs, trainer.critic)
    if ranks.leads:
        rounds = torch.load(folder / "rounds.pt", weights_only=False)
        axes = build.make_axes(cfg, task)
        source = SimpleNamespace(
            axes=axes, runner=SimpleNamespace(activity=Activity()), prompts=PromptOrder(task.rows("train"), cfg.seed)
        )
        stream = RolloutStream(
            Recorded(rounds, source),
            batch,
            seed=cfg.seed,
            pad_id=tokenizer.pad_token_id,
            max_new_tokens=cfg.limits.max_new_tokens,
            sync=lambda: together.sync(trainer.state.global_step),
            critic=together if trainer.critic else None,
            processes=ranks.size,
        )
        trainer.stream, trainer.steps = stream, together.led(stream)
    else:
        trainer.steps = together.followed()
    trainer.train()
    spread = [is_sharded(each) for each in (model, trainer.critic and trainer.critic.model) if each is not None]
    if any(spread) != all(spread) or any(spread) != (cfg.trainer.keys() & {"fsdp"} != set() or _stage(cfg) == 3):
        raise AssertionError(f"sharded: {spread}, under {dict(cfg.trainer)}")
    last = {name: value.clone() for name, value in merged_weights(model)}
    critic_last = {n: v.clone() for n, v in whole_weights(trainer.critic.model)} if trainer.critic else {}
    if ranks.leads:
        changes = {name: last[name] - first[name] for name in first}
        critic = {name: critic_last[name] - critic_first[name] for name in critic_first}
        torch.save({"gradients": gradients, "changes": changes, "critic": critic}, out / "result.pt")
    ranks.close()


def _stage(cfg: Any) -> int:
    return cfg.trainer.get("deepspeed", {}).get("zero_optimization", {}).get("stage", 0)


def relative(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The norm of the difference over the norm, all tensors together."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    difference = sum(float(((ours[n] - theirs[n]).double() ** 2).sum()) for n in theirs)
    return (difference / sum(float((theirs[n].double() ** 2).sum()) for n in theirs)) ** 0.5


def launched(mode: str, folder: Path, out: Path, overrides: list[str], processes: int = 1) -> None:
    """This file on one process, or by torchrun on several."""
    launcher = ["-m"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, *launcher, "benchmarks.process_parity", mode, str(folder), str(out), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=900, check=False)
    if done.returncode:
        sys.exit(f"error: {out.name} ended with exit code {done.returncode}; see {out / 'log'}")


def main() -> None:
    if sys.argv[1:2] in (["--record"], ["--replay"]):
        mode, folder, out, *overrides = sys.argv[1:]
        record(Path(folder), overrides) if mode == "--record" else replay(Path(folder), Path(out), overrides)
        return
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run: GRPO, two processes, no bars")
    quick = parser.parse_args().quick
    report = Report("process_parity")
    root = STORE / "process_parity" / (code() + ("-quick" if quick else ""))
    algorithms = {"GRPO": ALGORITHMS["GRPO"]} if quick else ALGORITHMS
    arms = dict(list(ARMS.items())[:1]) if quick else ARMS
    rows = []
    for algorithm, settings in algorithms.items():
        folder = root / figure_name(algorithm)
        overrides = [*SMALL, *settings]
        if not (folder / "rounds.pt").exists():
            report.console.print(f"{algorithm}: episodes …", style="dim")
            launched("--record", folder, folder / "recording", overrides)
        results = {}
        for arm, (processes, sharding) in {"1 process": (1, "none"), **arms}.items():
            out = folder / figure_name(arm)
            if not (out / "result.pt").exists():
                report.console.print(f"{algorithm}, {arm} …", style="dim")
                launched("--replay", folder, out, [*overrides, f"sharding={sharding}"], processes)
            results[arm] = torch.load(out / "result.pt", weights_only=False)
        alone = results.pop("1 process")
        for arm, result in results.items():
            errors = {part: relative(result[part], alone[part]) for part in alone if alone[part]}
            key = f"{figure_name(algorithm)}_{figure_name(arm)}"
            for part, error in errors.items():
                report.figure(f"{key}_{part}", error)
                if not quick:
                    report.bar(f"{key}_{part}", "<=", 1e-5 if part == "gradients" else 1e-3)
            moved = max(float(change.abs().max()) for change in alone["changes"].values())
            rows.append((algorithm, arm, *(f"{errors[p]:.1e}" if p in errors else "" for p in alone), f"{moved:.1e}"))
    report.table(
        f"against one process, relative, {STEPS} steps of the policy",
        ["algorithm", "arm", "gradients", "weight changes", "the critic's", "largest change"],
        rows,
    )
    report.finish(quick)


if __name__ == "__main__":
    main()
