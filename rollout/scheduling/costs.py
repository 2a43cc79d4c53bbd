"""What an engine step costs on a given machine: the arithmetic behind the simulator's virtual clock.

Seconds, tokens, bytes and FLOPs; no vLLM, no torch. A step is described by sums over its requests (``Work``), so that
the cost of describing it does not grow with the model of the cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class Work:
    """What one scheduler step computes, in real tokens.

    rounds: forward passes that the step stands for (1, or the token scale where a request decodes).
    prefill: prompt tokens computed (every token of a chunk that is longer than one). decode: tokens decoded.
    prefill_context, decode_context: Σ over those tokens of the tokens that each attends to.
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
    def seconds(self, work: Work) -> float:
        """Seconds that one step takes."""
        ...


@dataclass(frozen=True)
class Roofline:
    """Seconds of a forward pass = max(bytes over bandwidth, FLOPs over peak) + overhead, all of them as achieved.

    weight_bytes: read once a pass. kv_bytes: of one token's cache, on one GPU. flops: of one token apart from
    attention. attention_flops: of one token for each token that it attends to. prefill_scale: below 1, prefill is
    cheaper than the model says (faster kernels, sparse attention). pcie: bytes/s from the offload tier.
    """

    weight_bytes: float
    kv_bytes: float
    bandwidth: float
    flops: float
    attention_flops: float
    peak: float
    overhead: float
    prefill_scale: float = 1.0
    pcie: float = 25e9

    def seconds(self, work: Work) -> float:
        """A step of several rounds spreads its prefill evenly over them, as chunked prefill does."""
        traffic = work.rounds * (self.weight_bytes + self.kv_bytes * work.read) / self.bandwidth
        prefill = self.flops * work.prefill + self.attention_flops * work.prefill_context
        decode = self.flops * work.decode + self.attention_flops * work.decode_context
        compute = (self.prefill_scale * prefill + decode) / self.peak
        load = self.kv_bytes * work.loaded / self.pcie
        return max(traffic, compute) + work.rounds * self.overhead + load


@dataclass(frozen=True)
class Linear:
    """Seconds = a + b·prefill tokens + c·Σ prefill context + d·running requests: fitted to real steps of a small
    engine. load: seconds for a token brought back from the offload tier.
    """

    a: float
    b: float
    c: float
    d: float
    load: float = 0.0

    def seconds(self, work: Work) -> float:
        """A decode round costs a + d·running; prefill is charged once, however many rounds it is spread over."""
        rounds = work.rounds * (self.a + self.d * work.running)
        return rounds + self.b * work.prefill + self.c * work.prefill_context + self.load * work.loaded


# H100 with an 8B model in bf16, papers/scheduling_study.md: 8 B x 2 FLOP a token, 32 layers x 4096 x 4 FLOP a token of
# context, 8 KV heads x 128 x 2 x 32 layers x 2 bytes of cache.
H100_8B = Roofline(16e9, 131e3, 2.7e12, 16e9, 0.52e6, 500e12, 1.5e-3)

# 4 x H100 (tensor parallel) with Llama-70B in bf16, one GPU's share: 140 GB of weights and 327 kB of cache a token (80
# layers, 8 KV heads) over 4; 140 GFLOP a token and 80 x 8192 x 4 FLOP a token of context over 4. Achieved shares
# of the peak are those of one GPU (2.7 of 3.35 TB/s, 500 of 989 TFLOP/s), compute less a tenth for the all-reduces;
# overhead as on one GPU plus 160 all-reduces of about 10 µs.
H100X4_70B = Roofline(35e9, 82e3, 2.7e12, 35e9, 0.66e6, 450e12, 3.1e-3)
