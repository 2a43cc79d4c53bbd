"""Two of torch's optimizers behind the face of one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from training.muon import Muon


def tiny() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    config = Qwen3Config(**shape, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False)
    return Qwen3ForCausalLM(config)


def train(model: Any, optimizers: list[torch.optim.Optimizer], schedulers: list[LambdaLR], steps: range) -> None:
    for step in steps:
        ids = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        for stepper in [*optimizers, *schedulers]:
            stepper.step()
        model.zero_grad()


def warm_down(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 / (1 + step))


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_it_equals_both_run_apart_under_a_schedule_that_reaches_both() -> None:
    ours, theirs = tiny(), tiny()
    optimizer = Muon(ours, lr=0.02, adam_lr=0.003)
    train(ours, [optimizer], [warm_down(optimizer)], range(3))

    inner = [p for n, p in theirs.named_parameters() if n.endswith("proj.weight")]
    outer = [p for n, p in theirs.named_parameters() if not n.endswith("proj.weight")]
    assert len(inner) == 14 and {p.ndim for p in inner} == {2} and len(outer) == 2 + 4 * 2 + 1
    apart = [
        torch.optim.Muon(inner, lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    train(theirs, apart, [warm_down(part) for part in apart], range(3))
    assert equal(ours, theirs) and not equal(ours, tiny())
    assert [group["lr"] for group in optimizer.param_groups] == [0.02 / 4, 0.003 / 4]


def test_a_restored_state_continues_identically() -> None:
    whole = tiny()
    optimizer = Muon(whole, lr=0.02, adam_lr=0.003)
    scheduler = warm_down(optimizer)
    train(whole, [optimizer], [scheduler], range(2))
    resumed, state = copy.deepcopy(whole), copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    train(whole, [optimizer], [scheduler], range(2, 5))

    optimizer = Muon(resumed, lr=0.02, adam_lr=0.003)
    scheduler = warm_down(optimizer)
    optimizer.load_state_dict(state[0])
    scheduler.load_state_dict(state[1])
    train(resumed, [optimizer], [scheduler], range(2, 5))
    assert equal(whole, resumed)
