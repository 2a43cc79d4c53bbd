"""Who decides to think: the policy, the template (forced), or a system prompt that the policy is to obey (told)."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from rollout.environment import Row

TOLD = {"always": "Think before you answer.", "never": "Answer at once, without thinking."}


def told(row: Row, mode: str) -> Row:
    """The row with a system prompt that asks for ``mode``, always or never: then that is the need for thought."""
    text, messages = TOLD[mode], list(row.messages)
    if messages and messages[0]["role"] == "system":
        messages[0] = {**messages[0], "content": f"{messages[0]['content']}\n{text}"}
    else:
        messages.insert(0, {"role": "system", "content": text})
    extras = {**row.extras, "needs_thought": mode == "always", "told": mode}
    return replace(row, id=f"{row.id}+{mode}", messages=messages, extras=extras)


def maybe_told(row: Row, visit: str, always: float, never: float) -> Row:
    """The row as it is, or told: with these probabilities, by the visit's name alone."""
    draw = Random(f"told {visit}").random()
    return told(row, "always") if draw < always else told(row, "never") if draw < always + never else row


def forced_modes(count: int, always: float, never: float) -> list[str | None]:
    """The modes of a group of ``count``: these shares, rounded to whole rollouts, are forced by the template."""
    modes = ["always"] * round(count * always) + ["never"] * round(count * never)
    return [*[None] * (count - len(modes)), *modes][:count]
