"""Rows, batches and the loss of the warm start, against a loop over single demonstrations in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.chat import Chat, tool_call
from rollout.errors import UserError
from rollout.tasks import Demonstration
from rollout.tools.calculator import calculator
from training.head import attach_head
from training.models import build_tiny, load_policy
from training.settings import SftConfig
from training.warm_start import collate, tokenised, warm_start, weighted_loss

CALL = {"role": "assistant", "content": "", "tool_calls": [tool_call("calculator", {"expression": "1+2"})]}
USER = {"role": "user", "content": "What is 1 + 2?"}
DIRECT = Demonstration([USER, {"role": "assistant", "content": "3"}], weight=3.0)
THINKING = Demonstration([USER, {"role": "assistant", "content": "3", "reasoning_content": "1+2=3"}], weight=0.5)
TOOL = Demonstration(
    [USER, CALL, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3"}], [calculator]
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = build_tiny(tmp_path_factory.mktemp("tiny"), [USER["content"]] * 4, hidden=32, mlp=48, heads=2, head_dim=16)
    model, tokenizer = load_policy(folder)
    attach_head(model)
    return model, tokenizer


def text(chat: Chat, row: dict[str, Any], own: bool) -> list[str]:
    """The runs of tokens that the policy writes, or those that it reads."""
    runs: list[list[int]] = []
    before = None
    for token, weight in zip(row["input_ids"], row["loss_weights"], strict=True):
        mine = weight > 0
        if mine == own:
            if mine != before:
                runs.append([])
            runs[-1].append(token)
        before = mine
    return [chat.tokenizer.decode(run) for run in runs]


def test_own_tokens_carry_the_demonstrations_weight_and_nothing_else_does(loaded: Any) -> None:
    chat = Chat(loaded[1])
    direct, thinking, tool = tokenised(chat, [DIRECT, THINKING, TOOL], 500)
    assert [set(row["loss_weights"]) for row in (direct, thinking, tool)] == [{0.0, 3.0}, {0.0, 0.5}, {0.0, 1.0}]
    assert text(chat, thinking, own=True) == ["<think>\n1+2=3</think>3<|im_end|>"]
    called, answer = text(chat, tool, own=True)
    assert chat.parse(chat.encode(called)).calls[0].arguments == {"expression": "1+2"}
    assert answer == "<think></think>3<|im_end|>"
    assert "<tool_response>3</tool_response>" in text(chat, tool, own=False)[1]


def test_long_demonstrations_are_left_out_and_none_at_all_is_refused(loaded: Any) -> None:
    chat = Chat(loaded[1])
    short = len(tokenised(chat, [DIRECT], 500)[0]["input_ids"])
    assert len(tokenised(chat, [TOOL, DIRECT, TOOL], short)) == 1
    with pytest.raises(UserError, match=rf"warm_start\.max_length: no demonstration is as short as {short - 1} tokens"):
        tokenised(chat, [DIRECT, TOOL], short - 1)


@pytest.mark.parametrize("row_tokens", [1, 100, 1000], ids=["short rows", "some a row", "one row"])
def test_the_loss_is_the_weighted_mean_over_own_tokens(loaded: Any, row_tokens: int) -> None:
    model, tokenizer = loaded
    rows = tokenised(Chat(tokenizer), [DIRECT, TOOL, THINKING, DIRECT], 500)
    batch = collate(rows, tokenizer.pad_token_id, row_tokens)
    total, norm = 0.0, 0.0
    with torch.no_grad():
        for row in rows:
            logprobs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
            for i in range(1, len(row["input_ids"])):
                total -= row["loss_weights"][i] * logprobs[i - 1, row["input_ids"][i]].item()
                norm += row["loss_weights"][i]
        ours = weighted_loss(model, batch).item()
    assert ours == pytest.approx(total / norm, rel=1e-5)
    lengths = [len(row["input_ids"]) for row in rows]
    assert batch["input_ids"].shape[1] <= max(row_tokens, *lengths)
    assert (batch["input_ids"].shape[0] == 1) == (row_tokens == 1000)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "muon"])
def test_it_learns_and_reports_as_it_goes(tmp_path: Path, optimizer: str) -> None:
    folder = build_tiny(tmp_path / "m", [USER["content"]] * 4, hidden=32, mlp=48, heads=2, head_dim=16)
    model, tokenizer = load_policy(folder)
    seen: list[tuple[int, float]] = []

    def progress(step: int, logs: dict[str, float]) -> None:
        if "loss" in logs:
            seen.append((step, logs["loss"]))

    config = SftConfig(steps=20, batch_size=2, learning_rate=0.01, warmup_steps=2, optimizer=optimizer)
    warm_start(model, tokenizer, [DIRECT, THINKING], config, tmp_path / "work", 0, progress)
    assert [step for step, _ in seen] == [10, 20]
    assert seen[1][1] < 0.5 * seen[0][1]
