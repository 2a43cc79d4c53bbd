"""Two conversations that a tiny model learns by heart in seconds, in each reasoning mode."""

from __future__ import annotations

from pathlib import Path

from rollout.chat import Chat, tool_call
from rollout.environment import Message
from rollout.tools.calculator import calculator
from tests.by_heart import learn_by_heart

EASY, HARD = "What is 2 + 2?", "What is 12 * 34?"
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "12*34"}}</tool_call>'


def question(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def lessons(chat: Chat) -> list[tuple[list[int], str]]:
    """Prompts and what follows: a call and then the answer, after thinking or without; and an answer without a call."""
    pairs = [
        (chat.open(question(HARD), [calculator]), f"<think>\n12*34 is hard\n</think>{CALL}"),
        (chat.open(question(HARD), [calculator], "never"), CALL),
        (chat.open(question(HARD), [calculator], "always"), f"12*34 is hard\n</think>{CALL}"),
        (chat.open(question(EASY), []), "<think></think>It is 4."),
        (chat.open(question(EASY), [], "never"), "It is 4."),
        (chat.open(question(EASY), [], "always"), "2 and 2\n</think>It is 4."),
    ]
    for thoughts in ("12*34 is hard\n", ""):
        turn = {"role": "assistant", "content": "", "reasoning_content": thoughts}
        turn["tool_calls"] = [tool_call("calculator", {"expression": "12*34"})]
        answered = [*question(HARD), turn, {"role": "tool", "content": "408"}]
        pairs += [
            (chat.open(answered, [calculator]), "<think></think>It is 408."),
            (chat.open(answered, [calculator], "never"), "It is 408."),
            (chat.open(answered, [calculator], "always"), "the tool says 408\n</think>It is 408."),
        ]
    return pairs


def build_parrot(folder: Path) -> Path:
    """A checkpoint that answers the lessons greedily; seconds."""
    from training.models import build_tiny, load_policy

    corpus = [EASY, HARD, CALL, "12*34 is hard\n", "2 and 2\n", "the tool says 408\n", "It is 4.", "It is 408."] * 4
    build_tiny(folder, corpus, hidden=64, mlp=128)
    model, tokenizer = load_policy(folder)
    chat = Chat(tokenizer)
    answers = [(prompt, [*chat.encode(text), chat.end_of_turn_id]) for prompt, text in lessons(chat)]
    rows = [(prompt + answer, [False] * len(prompt) + [True] * len(answer)) for prompt, answer in answers]
    learn_by_heart(model, rows, learning_rate=1e-2, loss=5e-3)
    model.save_pretrained(folder)
    return folder
