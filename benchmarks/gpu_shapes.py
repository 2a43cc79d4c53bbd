"""One arm of ``benchmarks.gpu --part shapes``: training steps of a random model of a public shape, and its plan."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.memory import PlanInput
from training.model_shape import Shape

if TYPE_CHECKING:
    from training.stream import StepBatch

# config.json of the Qwen3 models (arXiv 2505.09388), and of one small enough for a smoke run
COMMON = {"model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_1.7b": COMMON
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3_8b": COMMON
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}
MICRO_BATCHES = 2  # of an optimizer step: with one, gradients and all kept activations would never stand together
STEPS = 3  # optimizer steps, the first not timed
NOT_TENSORS = ("reserve", "engine asleep")  # of the plan, what torch's allocator does not see


@dataclass
class Arm:
    """``packed``: several sequences a row, kept apart by variable-length attention, or a mask under SDPA; else a row
    for each. ``tokens`` of a micro-batch, ``length`` of a sequence."""

    architecture: str
    lora: bool
    tokens: int
    length: int
    packed: bool


def varlen() -> bool:
    """Whether attention of variable length can be had: the package flash-attn, on a GPU."""
    import torch

    return torch.cuda.is_available() and find_spec("flash_attn") is not None


def overrides(arm: Arm) -> list[str]:
    """The run as a person would type it; ``dry_run=true`` with these prints the plan that is held against it."""
    numbers = ",".join(f"{k}:{str(v).lower()}" for k, v in ARCHITECTURES[arm.architecture].items())
    return [
        "run_dir=unused",
        "engine=vllm_process",  # of the plan only: asleep, it holds nothing that torch knows of
        "engine.sleep_level=2",
        f"engine.max_model_len={arm.length}",
        f"limits.max_new_tokens={arm.length - 1}",
        "model=hf",
        "model.path=random",
        f"+model.architecture={{{numbers}}}",
        f"model.dtype={'bfloat16' if arm.lora else 'float32'}",
        f"model.attention={'flash_attention_2' if varlen() else 'sdpa'}",
        *(["lora=lora", "lora.rank=32", "lora.alpha=64"] if arm.lora else []),
        f"batch.max_tokens={arm.tokens}",
        f"batch.row_tokens={'null' if arm.packed else 1}",
        "++trainer.bf16=true",
        "++trainer.gradient_checkpointing=true",
        "++trainer.report_to=none",
        "steps=1000",
        "checkpoint.every=1000",
    ]


SHAPES = {
    **{f"qwen3_1.7b {t // 1024}k": Arm("qwen3_1.7b", False, t, 4096, False) for t in (8192, 16384, 32768)},
    **{f"qwen3_8b lora {t // 1024}k": Arm("qwen3_8b", True, t, 4096, False) for t in (8192, 16384, 32768)},
    "qwen3_1.7b packed 16k": Arm("qwen3_1.7b", False, 16384, 2048, True),
    "qwen3_8b lora packed 16k": Arm("qwen3_8b", True, 16384, 2048, True),
}
QUICK = {"tiny": Arm("tiny", False, 128, 64, False), "tiny lora packed": Arm("tiny", True, 128, 32, True)}


def configuration(arm: Arm) -> Any:
    """The checked settings of its ``overrides``."""
    from hydra import compose, initialize_config_dir

    from rollout.hydra import conf_dir, to_object
    from training import config

    config.register()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = to_object(compose("training", overrides(arm)))
    cfg.check()
    return cfg


def plan_of(cfg: Any) -> PlanInput:
    """What ``dry_run=true`` plans with."""
    from training.dry_run import plan_input

    return plan_input(cfg)


def run(arm: Arm) -> dict[str, Any]:
    """Seconds a step, tokens, FLOPs a token and peak bytes; ``measured`` is None without a GPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
    from transformers.utils import logging

    from training import build
    from training.head import attach_head
    from training.lora import add_adapter
    from training.memory_plan import plan
    from training.ranks import Ranks

    logging.set_verbosity_error()
    cfg = configuration(arm)
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**ARCHITECTURES[arm.architecture]),
            dtype=getattr(torch, cfg.model.dtype),
            attn_implementation=cfg.model.attention,
        )
    attach_head(model)
    if arm.lora:
        model = add_adapter(model, cfg.lora, None)
    seconds: list[float] = []

    class Timed(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.start = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds.append(now() - self.start)
            if cuda and len(seconds) == 1:
                torch.cuda.reset_peak_memory_stats()
            control.should_training_stop = len(seconds) == STEPS

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        trainer = build.make_trainer(cfg, Path(folder), model, None, None, [Timed()], Ranks())  # type: ignore[arg-type]
        trainer.steps = step_batches(arm)
        trainer.train()
    inputs = plan_of(cfg)
    parts = plan(inputs).phases[1].parts
    return {
        "seconds": float(np.mean(seconds[1:])),
        "tokens": MICRO_BATCHES * arm.tokens,
        "attention": cfg.model.attention + (", masked" if inputs.masked else ""),
        "flops": flops_per_token(inputs),
        "attention_flops": attention_flops(inputs.shape, arm.length),
        "measured": torch.cuda.max_memory_allocated() if cuda else None,
        "planned": sum(size for name, size in parts.items() if name not in NOT_TENSORS),
        "parts": parts,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def step_batches(arm: Arm) -> Iterator[StepBatch]:
    """Endless steps of random tokens: sequences of one length, all but the first token the policy's own."""
    from training.packing import TrainSequence, pack

    generator = np.random.default_rng(0)
    vocabulary = ARCHITECTURES[arm.architecture]["vocab_size"]
    count = arm.tokens // arm.length
    for _ in itertools.count():
        micro_batches = []
        for _ in range(MICRO_BATCHES):
            sequences = []
            for index in range(count):
                own = np.arange(arm.length) > 0
                advantages = own * generator.standard_normal()
                weights = own / (MICRO_BATCHES * count * own.sum())
                logprobs = own * -np.log(vocabulary)
                ids = generator.integers(0, vocabulary, arm.length)
                sequences.append(TrainSequence(ids, own, advantages, logprobs, weights, index, own - 1))
            row = None if arm.packed else 1
            micro_batches += pack(sequences, max_tokens=arm.tokens, row_tokens=row, pad_id=0)
        yield {"micro_batches": micro_batches, "anchors": None, "critic": [], "metrics": {}}


def flops_per_token(p: PlanInput) -> float:
    """6N where all weights train. With LoRA 4N + 6A: frozen weights have no gradient of their own, adapters (A) do.

    N: weights that multiply a token, so without an embedding that is not the head too. What checkpointing computes
    again does not count, nor does attention.
    """
    s = p.shape
    n = s.parameters - (0 if s.tied else s.vocabulary * s.hidden)
    return 4.0 * n + 6.0 * s.adapter if s.adapter else 6.0 * n


def attention_flops(s: Shape, length: int) -> float:
    """Of a token, forward and backward, in causal sequences of ``length``: 3 × 4 × query × layers × length / 2."""
    return 6.0 * s.layers * s.query * length
