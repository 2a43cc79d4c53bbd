"""vLLM reasoning parser for ``chat_template_kwargs={"reasoning": "auto|always|never"}``; loaded by vLLM only.

Stock parsers read one of the three modes wrongly: without streaming they never see the prompt, so after a prompt that
ends with ``<think></think>`` they take the whole answer for thinking (deepseek_r1, qwen3); and in a second turn
deepseek_r1 takes the ``</think>`` of the first for its own. Here the request's template arguments say where it starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser

from rollout.chat import THINK, THINK_END
from serving.reasoning import Split, Start, prompt_start, split

MODES = {"always": Start.THINKING, "never": Start.ANSWER}


def turn_start(tokenizer: Any, arguments: dict[str, Any]) -> Start:
    """Where the assistant's turn starts under a request's template arguments."""
    if arguments.get("reasoning") in MODES:
        return MODES[arguments["reasoning"]]
    if arguments.get("continue_final_message") or not arguments.get("add_generation_prompt", True):
        return Start.CHOOSES
    probe = [{"role": "user", "content": ""}]
    return prompt_start(
        tokenizer.apply_chat_template(probe, **arguments | {"tokenize": False, "add_generation_prompt": True})
    )


class TurnstileReasoningParser(BaseThinkingReasoningParser):
    """``<think>…</think>`` in front of the answer. Calls inside it stay thinking, as in training."""

    start_token = THINK
    end_token = THINK_END

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self.start = turn_start(tokenizer, kwargs.get("chat_template_kwargs") or {})
        self.last: Split | None = None

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Asked of the prompt: an earlier turn's ``</think>`` must not count, so the ids do not matter."""
        return self.start is Start.ANSWER

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        """By the text where it is streamed, which stop strings may hold back; by ids in the engine's grammar gate."""
        return self.end_token_id in delta_ids if self.last is None else self.last.ended

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        reasoning, content, _ = split(model_output, self.start, whole=True)
        return reasoning or None, content or None

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        before, self.last = split(previous_text, self.start), split(current_text, self.start)
        reasoning = self.last.reasoning[len(before.reasoning) :]
        content = self.last.content[len(before.content) :]
        return DeltaMessage(reasoning=reasoning or None, content=content or None) if reasoning or content else None

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        opened = [self.start_token_id] if self.start is Start.THINKING else []
        return super().count_reasoning_tokens([*opened, *token_ids])


ReasoningParserManager.register_lazy_module("turnstile", __name__, TurnstileReasoningParser.__name__)
