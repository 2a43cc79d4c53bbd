"""What an engine step costs on a given machine: the arithmetic behind the simulator's virtual clock.

Seconds, tokens, bytes and FLOPs; no vLLM, no torch. A step is described by sums over its requests, so that a model of
the cost never walks over them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

from rollout.errors import UserError


@dataclass(slots=True)
class Work:
    """What one scheduler step computes, in real tokens.

    rounds: forward passes that the step stands for (the token scale where a request gets a token, else 1).
    prefill, decode: tokens computed of prompts (and again after a preemption), and of answers.
    prefill_context, decode_context: Σ over those tokens of the tokens that each attends to, itself included.
    read: Σ over requests of the tokens of KV cache that one forward pass reads. running: requests in the step.
    loaded: tokens of KV cache brought back from the offload tier.
    """

    rounds: int = 1
    prefill: float = 0.0
    decode: float = 0.0
    prefill_context: float = 0.0
    decode_context: float = 0.0
    read: float = 0.0
    running: int = 0
    loaded: float = 0.0


class Cost(Protocol):
    """A model of the hardware."""

    def seconds(self, work: Work) -> float:
        """Seconds that one step takes."""
        ...


@dataclass
class Roofline:
    """Seconds of a forward pass = max(bytes over bandwidth, FLOPs over peak) + overhead.

    Bandwidth (bytes/s) and peak (FLOP/s) are those achieved, not those printed. A step of several rounds spreads its
    prefill evenly over them, as chunked prefill does. The default is an H100 with an 8B model in bf16: 2 FLOP a
    parameter and token, 32 layers × 4096 × 4 FLOP a token of context, 8 KV heads × 128 × 2 × 32 layers × 2 bytes of
    cache.
    """

    weight_bytes: float = 16e9  # read once a pass
    kv_bytes: float = 131e3  # of one token's cache, on one GPU
    bandwidth: float = 2.7e12
    flops: float = 16e9  # of one token, apart from attention
    attention_flops: float = 0.52e6  # of one token for each token that it attends to
    peak: float = 500e12
    overhead: float = 1.5e-3  # seconds a pass
    prefill_scale: float = (
        1.0  # of a prompt token's FLOPs: below 1 prefill is cheap (sparse attention, lower precision)
    )
    pcie: float = 25e9  # bytes/s from the offload tier to one GPU

    def __post_init__(self) -> None:
        _check(self, may_be_zero=("weight_bytes", "kv_bytes", "flops", "attention_flops", "overhead", "prefill_scale"))

    def seconds(self, work: Work) -> float:
        """Seconds of a step; bringing KV back from the tier adds to it, nothing hides it."""
        traffic = work.rounds * (self.weight_bytes + self.kv_bytes * work.read) / self.bandwidth
        prefill = self.flops * work.prefill + self.attention_flops * work.prefill_context
        decode = self.flops * work.decode + self.attention_flops * work.decode_context
        compute = (self.prefill_scale * prefill + decode) / self.peak
        return max(traffic, compute) + work.rounds * self.overhead + self.kv_bytes * work.loaded / self.pcie


@dataclass
class Linear:
    """Seconds = a + b · prefill tokens + c · Σ prefill context + d · running requests, fitted to real steps.

    For a small engine whose steps were timed; the defaults are of the size that a 30M-parameter model on CPU has.
    A step of several rounds pays a and d in each of them.
    """

    a: float = 10e-3
    b: float = 0.6e-3
    c: float = 0.0
    d: float = 1e-3
    load: float = 0.0  # seconds for a token from the offload tier

    def __post_init__(self) -> None:
        _check(self, may_be_zero=("a", "b", "c", "d", "load"))

    def seconds(self, work: Work) -> float:
        rounds = work.rounds * (self.a + self.d * work.running)
        return rounds + self.b * work.prefill + self.c * work.prefill_context + self.load * work.loaded


def h100_8b(**changes: float) -> Roofline:
    """An H100 with an 8B model in bf16; ``prefill_scale=0.25`` is the variant with cheap prefill."""
    return Roofline(**changes)


def h100x4_70b(**changes: float) -> Roofline:
    """Four H100, tensor parallel, with Llama-70B in bf16: one GPU's share of it.

    140 GB of weights and 327 kB of cache a token (80 layers, 8 KV heads × 128) over 4; 140 GFLOP a token and
    80 × 8192 × 4 FLOP a token of context over 4. Achieved shares of the printed peaks as on one GPU (2.7 of 3.35 TB/s,
    500 of 989 TFLOP/s), compute less a tenth and overhead plus 160 × 10 µs for the all-reduces: our estimate.
    """
    share: dict[str, float] = {
        "weight_bytes": 35e9,
        "kv_bytes": 82e3,
        "flops": 35e9,
        "attention_flops": 0.66e6,
        "peak": 450e12,
        "overhead": 3.1e-3,
    }
    return Roofline(**(share | changes))


def _check(model: Any, may_be_zero: tuple[str, ...]) -> None:
    for field in fields(model):
        value = getattr(model, field.name)
        if not (0 <= value < float("inf")) or (value == 0 and field.name not in may_be_zero):
            low = "0 or more" if field.name in may_be_zero else "above 0"
            raise UserError(f"hardware.{field.name}: {value} must be finite and {low}")
