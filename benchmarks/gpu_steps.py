"""One arm of ``benchmarks.gpu --part steps``: seconds of an engine step, and the roofline fitted to them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.gpu_shapes import ARCHITECTURES
from rollout.scheduling.costs import Roofline, Work

REPEATS = 10
DECODE = [(b, c) for b in (1, 4, 16, 64, 128) for c in (512, 2048, 8192)]  # batch, tokens in the cache
PREFILL = [(1, 256), (1, 1024), (1, 2048), (1, 4096), (1, 8192), (1, 16384), (4, 2048), (8, 1024)]  # batch, tokens each
CACHE_BYTES = 40e9  # larger caches are left out


def run(architecture: str, graphs: bool, decode: Sequence[Sequence[int]], prefill: Sequence[Sequence[int]]) -> Any:
    """Seconds of plain forward passes in bfloat16, decoding with a filled KV cache.

    ``graphs``: decoding is replayed from a CUDA graph, as engines do; else Python starts every kernel. The cache is a
    buffer with room for the step, since a growing one is copied whole at every step.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.cache_utils import Cache, DynamicLayer
    from transformers.utils import logging

    class Buffer(DynamicLayer):
        """``length`` filled tokens and room for ``room``; a step writes there, and the next writes there again."""

        def __init__(self, batch: int, length: int, room: int) -> None:
            super().__init__()
            shape = (batch, config.num_key_value_heads, length + room, config.head_dim)
            self.both = [torch.zeros(shape, dtype=dtype, device=device) for _ in "kv"]
            self.keys, self.values = (x[:, :, :length] for x in self.both)
            self.dtype, self.device, self.is_initialized = dtype, device, True

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
            for buffer, new in zip(self.both, (key_states, value_states), strict=True):
                buffer[:, :, start:end] = new
            return tuple(buffer[:, :, :end] for buffer in self.both)

    logging.set_verbosity_error()
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16
    config = AutoConfig.for_model(**ARCHITECTURES[architecture])
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()

    def step(batch: int, length: int, new: int) -> Callable[[], Any]:
        cache = Cache(layers=[Buffer(batch, length, new) for _ in range(config.num_hidden_layers)])
        ids = torch.zeros((batch, new), dtype=torch.long, device=device)
        where = torch.arange(length, length + new, device=device)[None]
        return lambda: model(input_ids=ids, position_ids=where, past_key_values=cache, use_cache=True, logits_to_keep=1)

    kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    times = []
    with torch.no_grad():
        for batch, length in decode:
            if batch * length * kv_bytes <= CACHE_BYTES:
                forward = step(batch, length, 1)
                times.append(["decode", batch, length, timed(replayed(forward) if graphs else forward)])
        for batch, length in prefill:
            times.append(["prefill", batch, length, timed(step(batch, 0, length))])
    return {"times": times, "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}


def replayed(forward: Callable[[], Any]) -> Callable[[], Any]:
    """The same kernels without Python between them."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    return graph.replay


def timed(forward: Callable[[], Any]) -> float:
    """Median seconds of ``REPEATS`` calls, after two that are not counted."""
    import torch

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds = []
    for _ in range(2 + REPEATS):
        start = now()
        forward()
        seconds.append(now() - start)
    return statistics.median(seconds[2:])


def work(kind: str, batch: int, length: int) -> Work:
    """What the simulator is told of such a step."""
    if kind == "decode":
        return Work(decode=batch, decode_context=batch * (length + 1), read=batch * (length + 1), running=batch)
    return Work(
        prefill=batch * length,
        prefill_context=batch * length * (length + 1) / 2,
        read=batch * length,
        running=batch,
    )


def own_roofline(architecture: str, **changes: float) -> Roofline:
    """The preset's machine with this model's own bytes and FLOPs in bfloat16; the embedding is only looked up."""
    from training.memory import kv_bytes_per_token
    from training.model_shape import build_shape

    s = build_shape(ARCHITECTURES[architecture])
    n = s.parameters - (0 if s.tied else s.vocabulary * s.hidden)
    mine = {
        "weight_bytes": 2.0 * n,
        "kv_bytes": float(kv_bytes_per_token(s, 2)),
        "flops": 2.0 * n,
        "attention_flops": 4.0 * s.layers * s.query,
    }
    return Roofline(**(mine | changes))


def fit(architecture: str, times: list[list[Any]]) -> Roofline:
    """Bandwidth, peak and overhead by least squares of relative errors.

    Steps are bound by memory or by arithmetic: given which, seconds are linear in 1/bandwidth, 1/peak and overhead.
    Starts from the preset's split and repeats until it stays; what comes out negative is left out (a bandwidth or peak
    is then without bound, an overhead 0).
    """
    works = [work(*row[:3]) for row in times]
    seconds = np.array([row[3] for row in times])
    unit = own_roofline(architecture, bandwidth=1.0, peak=1.0, overhead=0.0)
    traffic = np.array([w.rounds * (unit.weight_bytes + unit.kv_bytes * w.read) for w in works])
    compute = np.array(
        [
            unit.flops * (w.prefill + w.decode) + unit.attention_flops * (w.prefill_context + w.decode_context)
            for w in works
        ]
    )
    preset = Roofline()
    scale = np.array([1 / preset.bandwidth, 1 / preset.peak, preset.overhead])  # columns of like size
    slopes = np.ones(3)
    for _ in range(50):
        by_memory = traffic * scale[0] * slopes[0] >= compute * scale[1] * slopes[1]
        columns = scale * np.stack([traffic * by_memory, compute * ~by_memory, np.ones(len(works))], axis=1)
        seen = columns.any(axis=0)
        used, found = seen.copy(), np.zeros(3)
        while True:
            found[:] = 0
            found[used], *_ = np.linalg.lstsq(columns[:, used] / seconds[:, None], np.ones(len(works)), rcond=None)
            if (found[used] > 0).all():
                break
            used &= found > 0
        found = np.where(seen, found, slopes)  # a side that bounds no step says nothing of its slope
        if np.allclose(found, slopes, rtol=1e-9):
            break
        slopes = found
    per_byte, per_flop, overhead = (float(x) for x in np.maximum(slopes, [1e-9, 1e-9, 0]) * scale)
    return own_roofline(architecture, bandwidth=1 / per_byte, peak=1 / per_flop, overhead=overhead)


def errors(cost: Roofline, times: list[list[Any]]) -> np.ndarray:
    """|predicted / measured − 1| of each step."""
    return np.array([abs(cost.seconds(work(*row[:3])) / row[3] - 1) for row in times])
