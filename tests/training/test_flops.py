"""FLOPs of training: closed forms, and torch's own count of the same model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from training.flops import TrainingWork, peak_flops, rates
from training.lora import add_adapter
from training.packing import MicroBatch, TrainSequence, pack
from training.settings import LoraConfig


def model(*, tied: bool = True) -> Any:
    config = Qwen3Config(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=80,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    return Qwen3ForCausalLM(config)


LAYER = 32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 80  # q, k and v, o, the MLP
BODY, HEAD, WIDTH = 3 * LAYER, 96 * 32, 3 * 4 * 16


def work(made: Any) -> TrainingWork:
    found = TrainingWork.of(made)
    assert found is not None
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_looked_up_and_the_head_multiplies(tied: bool) -> None:
    assert work(model(tied=tied)) == TrainingWork(BODY, 0, HEAD, True, WIDTH)


def test_torch_counts_the_same_matrix_products_and_twice_the_attention() -> None:
    """Its count knows no mask: attention of every position to every other."""
    made, tokens = model(), 24
    with FlopCounterMode(display=False) as counter:
        made(input_ids=torch.arange(2 * tokens).view(2, tokens), use_cache=False).logits.sum().backward()
    found = work(made)
    assert counter.get_total_flops() == found.matrix_flops(2 * tokens, 2 * tokens) + 2 * found.attention_flops(
        [tokens, tokens]
    )


def test_a_frozen_matrix_gets_no_gradient_but_passes_it_on() -> None:
    adapted = add_adapter(model(), LoraConfig(rank=4), None)
    found = work(adapted)
    adapter = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert found == TrainingWork(adapter, BODY, HEAD, False, WIDTH) and 0 < adapter < BODY
    assert found.matrix_flops(10, 5) == 6 * adapter * 10 + 4 * BODY * 10 + 4 * HEAD * 5


def sequence(index: int, prompt: int, own: int) -> TrainSequence:
    zeros = np.zeros(prompt + own)
    mask = np.arange(prompt + own) >= prompt
    return TrainSequence(zeros.astype(np.int64), mask, zeros, zeros, zeros, index, zeros - 1)


def test_a_step_costs_what_its_sequences_need_however_they_are_packed() -> None:
    sequences = [sequence(0, 3, 17), sequence(1, 5, 2), sequence(2, 4, 9)]
    found, tokens = work(model()), 20 + 7 + 13
    expected = 6 * BODY * tokens + 6 * HEAD * (17 + 2 + 9) + 6 * WIDTH * (20**2 + 7**2 + 13**2)
    for settings in ({"max_tokens": 64}, {"max_tokens": 60, "row_tokens": 1}):
        batches: list[MicroBatch] = pack(sequences, pad_id=0, **settings)
        assert found.flops(batches) == expected
    assert found.flops([]) == 0


def test_what_the_formula_does_not_cover_is_not_counted() -> None:
    made = model()
    made.config.num_experts = 4
    assert TrainingWork.of(made) is None
    made = model()
    made.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    assert TrainingWork.of(made) is None


def test_devices_are_known_by_the_words_of_their_names() -> None:
    known = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989.4e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989.4e12,
        "NVIDIA GH200 480GB": 989.4e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA L40S": 362.05e12,
        "NVIDIA GeForce RTX 4090": 165.2e12,
    }
    assert {name: peak_flops(name) for name in known} == known
    assert [peak_flops(name) for name in ("NVIDIA L40", "AMD Instinct MI300X", "NVIDIA A1000")] == [None] * 3


def test_rates_without_a_known_device_or_formula() -> None:
    assert rates(100, 4e12, 2.0, 989.4e12) == {
        "train/tokens_per_second": 50,
        "train/flops": 2e12,
        "train/mfu": pytest.approx(2 / 989.4),
    }
    assert rates(100, 4e12, 2.0, None).keys() == {"train/tokens_per_second", "train/flops"}
    assert rates(100, None, 2.0, 989.4e12).keys() == {"train/tokens_per_second"}
