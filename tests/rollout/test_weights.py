"""Weight sync and its gate: what arrives is what was sent, and a layer left stale stops the run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rollout.config import TransformersConfig
from rollout.engines.transformers import build as build_transformers
from rollout.errors import UserError
from rollout.weights import BOUNDS, Probe, SyncMismatch, bound_for, model_logprobs, named_weights, sync
from tests.conftest import Loop, load_model, spread_model

if TYPE_CHECKING:
    import torch

    from rollout.engines.vllm_in_process import InProcessEngine

IDS = [[(3 * i + 5 * j) % 500 for j in range(48)] for i in range(3)]
STALE = ["embed_tokens", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "layers.1.input_layernorm", "norm"]


def moved(model: Any, seed: int = 1) -> Any:
    """The model after a step that moves its log-probs by much more than the bound."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def without(stream: Iterator[tuple[str, torch.Tensor]], part: str, old: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The stream with one layer left as it was."""
    before = dict(named_weights(old))
    for name, tensor in stream:
        yield name, before[name] if part in name else tensor


@pytest.fixture
def restored(vllm_engine: InProcessEngine, run: Loop, model_dir: Path) -> Iterator[InProcessEngine]:
    yield vllm_engine
    run(vllm_engine.update_weights(named_weights(load_model(model_dir)), vllm_engine.version + 1))


def test_sync_passes_its_gate(restored: InProcessEngine, run: Loop, trainer_model: Any) -> None:
    before = model_logprobs(trainer_model, IDS)
    model = moved(trainer_model)
    change = max(
        abs(a - b) for x, y in zip(before, model_logprobs(model, IDS), strict=True) for a, b in zip(x, y, strict=True)
    )
    assert change > 0.1
    difference = run(
        sync(
            restored,
            named_weights(model),
            7,
            probe=Probe(IDS, bound_for("float32")),
            trainer_logprobs=lambda ids: model_logprobs(model, ids),
        )
    )
    assert difference < 1e-5
    assert restored.version == 7


@pytest.mark.parametrize("part", STALE)
def test_a_stale_layer_is_stopped(
    part: str, restored: InProcessEngine, run: Loop, trainer_model: Any, model_dir: Path
) -> None:
    model = moved(trainer_model)
    stream = without(named_weights(model), part, load_model(model_dir))
    with pytest.raises(SyncMismatch, match=r"differ by [\d.e+-]+ nats, above the bound of 0\.0001"):
        run(
            sync(
                restored,
                stream,
                restored.version + 1,
                probe=Probe(IDS, bound_for("float32")),
                trainer_logprobs=lambda ids: model_logprobs(model, ids),
            )
        )


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_arrive(tied: bool, tmp_path: Path, run: Loop) -> None:
    directory = spread_model(tmp_path / "model", tied=tied)
    model = moved(load_model(directory))
    names = [name for name, _ in named_weights(model)]
    assert ("lm_head.weight" in names) is not tied
    engine = build_transformers(TransformersConfig(), str(directory))
    try:
        probe = Probe(IDS, bound_for("float32"))
        assert (
            run(sync(engine, named_weights(model), 1, probe=probe, trainer_logprobs=lambda x: model_logprobs(model, x)))
            < 1e-5
        )
        with pytest.raises(UserError, match="no weight"):
            run(engine.update_weights([("nowhere.weight", next(model.parameters()))], 2))
    finally:
        run(engine.close())


def test_bf16_stays_within_its_bound_and_a_stale_layer_does_not(tmp_path: Path, run: Loop) -> None:
    """The trainer in fp32, the engine in bf16: the bound of bf16 lies between its noise and a stale layer."""
    directory = spread_model(tmp_path / "model")
    engine = build_transformers(TransformersConfig(dtype="bfloat16"), str(directory))
    model = moved(load_model(directory))
    try:
        run(sync(engine, named_weights(model), 1))
        logprobs = model_logprobs(model, IDS)
        assert run(Probe(IDS, math.inf).check(engine, logprobs)) < BOUNDS["bfloat16"] / 2
        run(sync(engine, without(named_weights(model), "layers.0.self_attn.q_proj", load_model(directory)), 2))
        with pytest.raises(SyncMismatch):
            run(Probe(IDS, BOUNDS["bfloat16"]).check(engine, logprobs))
    finally:
        run(engine.close())


def test_not_a_number_is_above_every_bound(vllm_engine: InProcessEngine, run: Loop, trainer_model: Any) -> None:
    logprobs = model_logprobs(trainer_model, IDS)
    logprobs[1][3] = math.nan
    with pytest.raises(SyncMismatch):
        run(Probe(IDS, 1e6).check(vllm_engine, logprobs))


def test_misuse_is_refused(vllm_engine: InProcessEngine, run: Loop) -> None:
    with pytest.raises(ValueError, match="two tokens"):
        Probe([[1]], 1e-4)
    with pytest.raises(ValueError, match="trainer_logprobs"):
        run(sync(vllm_engine, [], vllm_engine.version, probe=Probe(IDS, 1e-4)))
    with pytest.raises(UserError, match=r"engine\.dtype"):
        bound_for("int8")
