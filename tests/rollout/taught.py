"""The shared engine's model, taught two conversations by heart: one thinks and calls the calculator, one answers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.chat import Chat, tool_call
from rollout.environment import Message, Row
from rollout.tools.calculator import calculator
from rollout.weights import named_weights
from tests.by_heart import learn_by_heart
from tests.conftest import load_model
from training.models import train_tokenizer

if TYPE_CHECKING:
    from rollout.engines.vllm_in_process import InProcessEngine
    from tests.conftest import Loop

EASY = Row("easy", [{"role": "user", "content": "What is 2 + 2?"}], "It is 4.")
HARD = Row("hard", [{"role": "user", "content": "What is 12 * 34?"}], "It is 408.")
THOUGHTS = "12*34 is hard\n"


@functools.cache
def chat() -> Chat:
    """With as many tokens as the shared engine's model."""
    call = '{"name": "calculator", "arguments": {"expression": "12*34"}}'
    texts = [*(row.messages[0]["content"] for row in (EASY, HARD)), EASY.answer, HARD.answer, THOUGHTS, call]
    tokenizer = train_tokenizer(texts * 4, 512)
    tokenizer.add_tokens([f"filler {i}" for i in range(len(tokenizer), 512)])
    return Chat(tokenizer)


def conversations() -> list[list[Message]]:
    calls = {"role": "assistant", "content": "", "reasoning_content": THOUGHTS}
    calls["tool_calls"] = [tool_call("calculator", {"expression": "12*34"})]
    result = {"role": "tool", "content": "408"}
    return [
        [*EASY.messages, {"role": "assistant", "content": EASY.answer}],
        [*HARD.messages, calls, result, {"role": "assistant", "content": HARD.answer}],
    ]


@functools.cache
def taught(folder: Path) -> Any:
    """The model of ``folder`` after some seconds of lessons."""
    model = load_model(folder)
    rows = [chat().demonstration(messages, [calculator]) for messages in conversations()]
    learn_by_heart(model, rows, learning_rate=3e-3, loss=2e-2)
    return model.requires_grad_(False)


@contextlib.contextmanager
def teaching(engine: InProcessEngine, run: Loop, folder: Path) -> Iterator[InProcessEngine]:
    """The engine with the taught weights; afterwards it has its own again."""
    run(engine.update_weights(named_weights(taught(folder)), engine.version + 1))
    try:
        yield engine
    finally:
        run(engine.update_weights(named_weights(load_model(folder)), engine.version + 1))
