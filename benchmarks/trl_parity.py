"""Our loss, gradients and group advantages against TRL's own code: ``python -m benchmarks.trl_parity``.

A real ``trl.GRPOTrainer`` gets fixed rollouts through its ``rollout_func``, prepares them (advantages, old and
reference log-probs, importance sampling) and computes its loss; ours runs from episodes to packed micro-batches on a
copy of the model. The rollouts are ragged, with injected tokens in the middle and one group without variance. Between
rollout and loss the policy moves and the old log-probs are perturbed, so that ratio, clipping and KL all matter.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import Report
from rollout.episode import Episode, Sequence
from training import corrections, losses
from training.aggregation import Aggregation, token_weights
from training.estimates import Group
from training.head import attach_head, token_logprobs
from training.objective import means, policy_objective, reduce
from training.packing import MicroBatch, TrainSequence, pack, unpack

VOCABULARY, GROUPS, SAMPLES, LONGEST, TEMPERATURE = 61, 4, 4, 24, 0.7
PERTURBATION, MISMATCH, MOVE = 0.3, 0.4, 0.03

# name: (TRL's settings, our loss, our aggregation)
LOSSES: dict[str, tuple[dict[str, Any], losses.PolicyLoss, Aggregation]] = {
    "grpo": ({"loss_type": "grpo"}, losses.Clip(0.2, 0.28), "sequence"),
    "dapo": ({"loss_type": "dapo"}, losses.Clip(0.2, 0.28), "token"),
    "dr_grpo": ({"loss_type": "dr_grpo"}, losses.Clip(0.2, 0.28), "constant"),
    "dual_clip": ({"loss_type": "dapo", "delta": 1.5}, losses.Clip(0.2, 0.28, dual_clip=1.5), "token"),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.5}, losses.Cispo(0.5), "token"),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
        losses.Gspo(0.02, 0.03),
        "sequence",
    ),
}
# name: (TRL's vllm_importance_sampling_*, our correction)
CORRECTIONS: dict[str, tuple[dict[str, Any], corrections.Correction]] = {
    "none": ({}, corrections.NoCorrection()),
    "tis": ({"mode": "token_truncate", "clip_max": 2.0}, corrections.Tis(2.0)),
    "token_mask": ({"mode": "token_mask", "clip_min": 0.6, "clip_max": 1.8}, corrections.TokenMask(0.6, 1.8)),
    "sequence_mask": ({"mode": "sequence_mask", "clip_max": 3.0}, corrections.SequenceMask(0.0, 3.0)),
}
# name: (coefficient, with the ratio as TRL's default)
PENALTIES: dict[str, tuple[float, bool]] = {"off": (0.0, True), "k3": (0.1, False), "unbiased": (0.1, True)}
ASKED = ("grpo", "dapo", "dr_grpo")  # the bars are about these; the others are figures
# TRL multiplies KL by gspo's sequence ratio, and says that it is not unbiased then; ours is always the token's.
ODD = ("gspo", "unbiased")
QUICK = [("grpo", "none", "off"), ("dapo", "tis", "unbiased")]


@dataclass
class Rollouts:
    """``behaviour`` is what the engine would have said, ``noise`` what is added to it and to the old log-probs."""

    prompts: list[list[int]]
    completions: list[list[int]]
    own: list[list[bool]]
    behaviour: list[list[float]]
    noise: list[list[float]]
    rewards: list[float]


@dataclass
class Outcome:
    loss: float
    gradients: dict[str, torch.Tensor]
    advantages: list[float]
    clipped: float | None


def save_model(folder: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder)


def load_model(folder: str) -> Any:
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


@torch.no_grad()
def move(model: torch.nn.Module) -> None:
    """An update of the policy, the same for every copy."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(MOVE * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def make_rollouts(folder: str, seed: int) -> Rollouts:
    generator = np.random.default_rng(seed)
    model = load_model(folder)
    rollouts = Rollouts([], [], [], [], [], [])
    for group in range(GROUPS):
        prompt = generator.integers(3, VOCABULARY, int(generator.integers(2, 9))).tolist()
        for _ in range(SAMPLES):
            completion = generator.integers(3, VOCABULARY, int(generator.integers(4, LONGEST + 1))).tolist()
            own = generator.random(len(completion)) < 0.8  # the rest stands for tool results
            own[[0, -1]] = True
            ids = torch.tensor([prompt + completion])
            logps = (model(ids).logits[0, :-1] / TEMPERATURE).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            engine = logps[len(prompt) - 1 :].numpy() + MISMATCH * generator.normal(size=len(completion))
            rollouts.prompts.append(prompt)
            rollouts.completions.append(completion)
            rollouts.own.append(own.tolist())
            rollouts.behaviour.append(engine.tolist())
            rollouts.noise.append((PERTURBATION * generator.normal(size=len(completion))).tolist())
            rollouts.rewards.append(0.5 if group == 0 else float(np.float32(generator.random())))
    return rollouts


def theirs(folder: str, rollouts: Rollouts, loss: str, correction: str, penalty: str) -> Outcome:
    """TRL's preparation and ``_compute_loss``. Only the engine is left out: its log-probs come with the rollouts."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    importance = CORRECTIONS[correction][0]
    settings = {"epsilon": 0.2, "epsilon_high": 0.28} | LOSSES[loss][0]
    count = len(rollouts.rewards)
    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=count,
        num_generations=SAMPLES,
        num_iterations=2,  # makes TRL compute the old log-probs
        max_completion_length=LONGEST,
        temperature=TEMPERATURE,
        beta=PENALTIES[penalty][0],
        use_bias_correction_kl=PENALTIES[penalty][1],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        **{f"vllm_importance_sampling_{key}": value for key, value in importance.items()},
        **settings,
    )
    fixed = {"prompt_ids": rollouts.prompts, "completion_ids": rollouts.completions, "logprobs": rollouts.behaviour}
    trainer = GRPOTrainer(
        model=load_model(folder),
        reward_funcs=lambda **_: rollouts.rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["w3"] * count}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        rollout_func=lambda prompts, trainer: {**fixed, "env_mask": rollouts.own},
    )
    trainer.use_vllm = bool(importance)  # after __init__, which would start vLLM; it only switches the correction here
    trainer._last_loaded_step = trainer.state.global_step  # nothing to synchronise
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._generate_and_score_completions([{"prompt": "w3"}] * count)
    for row, noise in enumerate(rollouts.noise):
        inputs["old_per_token_logps"][row, : len(noise)] += torch.tensor(noise)
    move(trainer.model)
    value = trainer._compute_loss(trainer.model, inputs)
    value.backward()
    # In the others TRL counts nothing (cispo), sequences (gspo), or leaves the dual clip out
    clipped = trainer._metrics["train"]["clip_ratio/region_mean"][-1] if loss in ASKED else None
    return Outcome(value.item(), _gradients(trainer.model), inputs["advantages"].tolist(), clipped)


def ours(folder: str, rollouts: Rollouts, loss: str, correction: str, penalty: str) -> Outcome:
    """The path of a training step: episodes, advantages, weights, packed micro-batches, objective."""
    episodes = [_episode(rollouts, i) for i in range(len(rollouts.rewards))]
    advantages = [estimate.advantages[0] for estimate in Group()(episodes)]
    lengths = [len(x) for x in advantages]
    weights = token_weights(lengths, LOSSES[loss][2], max_tokens=LONGEST)
    given = [TrainSequence.of(e.sequences[0], i, advantages[i], weights[i]) for i, e in enumerate(episodes)]
    batches = pack(given, max_tokens=160, row_tokens=80, pad_id=0)

    model = load_model(folder)
    attach_head(model, temperature=TEMPERATURE)
    with torch.no_grad():
        before = [token_logprobs(model, batch)[0] for batch in batches]
    move(model)
    total, stats = 0.0, []
    for batch, old in zip(batches, before, strict=True):
        logprobs, entropy = token_logprobs(model, batch)
        value, part = policy_objective(
            logprobs,
            entropy,
            batch,
            loss=LOSSES[loss][1],
            correction=CORRECTIONS[correction][1],
            anchor_logprobs=old + _own_noise(batch, old, rollouts),
            reference_logprobs=old if penalty != "off" else None,
            kl_coef=PENALTIES[penalty][0],
            kl_unbiased=PENALTIES[penalty][1],
        )
        value.backward()
        total += value.item()
        stats.append(part)
    metrics = means(reduce(stats))
    clipped = metrics["clip_low"] + metrics["clip_high"]
    return Outcome(total, _gradients(model), [float(x[0]) for x in advantages], clipped)


def _episode(rollouts: Rollouts, i: int) -> Episode:
    sequence = Sequence.open(rollouts.prompts[i])
    for token, own, logprob, noise in zip(
        rollouts.completions[i], rollouts.own[i], rollouts.behaviour[i], rollouts.noise[i], strict=True
    ):
        if own:
            sequence.append_own([token], [logprob + noise], [0])
        else:
            sequence.append_injected([token])
    return Episode("prompt", str(i // SAMPLES), sequences=[sequence], rewards={"task": rollouts.rewards[i]})


def _own_noise(batch: MicroBatch, old: torch.Tensor, rollouts: Rollouts) -> torch.Tensor:
    """The perturbation of the batch's own tokens, in the order of the batch."""
    indices = dict.fromkeys(batch.own(batch.sequence_ids).tolist())
    assert {i: len(x) for i, x in unpack(batch, old).items()} == {i: sum(rollouts.own[i]) for i in indices}
    noise = [np.array(rollouts.noise[i])[rollouts.own[i]] for i in indices]
    return torch.tensor(np.concatenate(noise), dtype=old.dtype)


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(arms: list[tuple[str, str, str]], seeds: int, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row of differences per (loss, correction, KL), the largest over ``seeds`` batches."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        batches = [make_rollouts(folder, seed) for seed in range(seeds)]
        for loss, correction, penalty in arms:
            pairs = []
            for batch in batches:
                with Path(os.devnull).open("w") as quiet, redirect_stdout(quiet):
                    pairs.append([side(folder, batch, loss, correction, penalty) for side in (theirs, ours)])
            row = {
                "loss": loss,
                "size": max(abs(b.loss) for _, b in pairs),
                "loss_difference": max(abs(a.loss - b.loss) for a, b in pairs),
                "gradient_difference": max(_gradient_difference(a.gradients, b.gradients) for a, b in pairs),
                "advantage_difference": max(abs(np.subtract(a.advantages, b.advantages)).max() for a, b in pairs),
                "clipped_share": min(b.clipped for _, b in pairs),
                "clipped_difference": max(0.0 if a.clipped is None else abs(a.clipped - b.clipped) for a, b in pairs),
            }
            note(
                f"{loss} · {correction} · kl {penalty}: {row['loss_difference']:.1e}, {row['gradient_difference']:.1e}"
            )
            rows.append(row)
    return rows


def _gradient_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two arms on one batch, no bars")
    parser.add_argument("--seeds", type=int, default=3, help="batches per arm")
    options = parser.parse_args()
    report = Report("trl_parity")
    every = itertools.product(LOSSES, CORRECTIONS, PENALTIES)
    arms = QUICK if options.quick else [arm for arm in every if arm[::2] != ODD]
    rows = compare(arms, 1 if options.quick else options.seeds, lambda text: report.console.print(text, style="dim"))
    table = []
    for loss in dict.fromkeys(row["loss"] for row in rows):
        own = [row for row in rows if row["loss"] == loss]
        worst = [f"{max(row[name] for row in own):.1e}" for name in ("loss_difference", "gradient_difference")]
        table.append([loss, len(own), max(row["size"] for row in own), *worst, own[0]["clipped_share"]])
    columns = ["loss", "arms", "largest |loss|", "loss differs by", "gradient differs by", "tokens clipped"]
    report.table("Ours against trl.GRPOTrainer", columns, table)
    report.figure("arms", len(rows))
    asked = [row for row in rows if row["loss"] in ASKED]
    others = [row for row in rows if row["loss"] not in ASKED]
    for name in ("loss_difference", "gradient_difference", "advantage_difference", "clipped_difference"):
        report.figure(f"max_{name}", max(row[name] for row in asked))
        if others and name != "clipped_difference":
            report.figure(f"max_{name}_others", max(row[name] for row in others))
    report.figure("min_clipped_share", min(row["clipped_share"] for row in asked))
    report.bar("max_loss_difference", "<=", 1e-6)
    report.bar("max_gradient_difference", "<=", 1e-5)
    report.bar("max_advantage_difference", "<=", 1e-5)
    report.bar("min_clipped_share", ">=", 0.10)
    report.finish(quick=options.quick)


if __name__ == "__main__":
    main()
