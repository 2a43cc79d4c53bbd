"""GSM8K (arXiv 2110.14168) from its own JSONL: each ``<<expression=value>>`` becomes a call of the calculator."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from rollout.chat import tool_call
from rollout.environment import Message, Row
from rollout.errors import UserError
from rollout.tasks import Demonstration, Split, ToolEnvironment, row_id
from rollout.tasks.verifiers import final_number
from rollout.tools import Tool, ToolError
from rollout.tools.calculator import calculator, evaluate

STEP = re.compile(r"<<(.*?)>>")
MANY_STEPS = 6
VERIFIER_TIMEOUT = 300.0  # seconds, waiting for a free math-verify process included


class Gsm8k:
    """``path`` is a folder with train.jsonl and test.jsonl; ``size`` and ``test_size`` keep a seeded sample of each.

    A row's difficulty is its number of calculator steps, ``6+`` from six on.
    """

    def __init__(
        self, *, path: str, name: str = "gsm8k", size: int | None = None, test_size: int | None = None, seed: int = 0
    ) -> None:
        self.name = name
        self._folder = Path(path)
        self._sizes = {"train": size, "test": test_size}
        self._seed = seed
        self._rows: dict[str, list[Row]] = {}

    def tools(self) -> list[Tool]:
        return [calculator]

    def environment(self) -> ToolEnvironment:
        return ToolEnvironment(self.tools(), final_number, timeout=VERIFIER_TIMEOUT)

    def rows(self, split: Split) -> list[Row]:
        if split not in self._rows:
            rows = read(self._folder / f"{split}.jsonl")
            size = self._sizes[split]
            if size is not None and size < len(rows):
                rows = Random(f"{split} {self._seed if split == 'train' else ''}").sample(rows, size)
            self._rows[split] = rows
        return self._rows[split]

    def demonstrations(self, n: int, seed: int = 0) -> Iterator[Demonstration]:
        """Passes over the training split, each in its own order, until ``n`` are given."""
        rng = Random(f"demonstrations {seed}")
        order: list[Row] = []
        for _ in range(n):
            if not order:
                order = rng.sample(self.rows("train"), len(self.rows("train")))
            yield demonstration(order.pop())

    def corpus(self) -> Iterator[str]:
        for row in self.rows("train"):
            for message in demonstration(row).messages:
                yield message["content"]
                yield message.get("reasoning_content", "")
                for call in message.get("tool_calls", []):
                    yield json.dumps(call["function"])


def read(file: Path) -> list[Row]:
    """All rows of a JSONL file; a line that is not a question with an answer after ``####`` is a UserError."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{file}: {reason}; task.path must be a folder with train.jsonl and test.jsonl") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            question, solution = record["question"].strip(), record["answer"]
            solution, mark, gold = solution.rpartition("####")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file}, line {number}: not a JSON object with the texts question and answer "
                f"({type(error).__name__}: {error}); mend or remove the line"
            ) from error
        if not mark or not gold.strip():
            raise UserError(f"{file}, line {number}: no answer after ####; mend or remove the line")
        steps = len(STEP.findall(solution))
        difficulty = str(steps) if steps < MANY_STEPS else f"{MANY_STEPS}+"
        extras = {"solution": solution.strip(), "where": f"{file}, line {number}"}
        messages = [{"role": "user", "content": question}]
        rows.append(Row(row_id(question), messages, gold.strip(), difficulty, extras))
    return rows


def demonstration(row: Row) -> Demonstration:
    """The solution as an episode: what is said before a step is thought, the step is computed, its result read.

    A step that the calculator does not answer with the value written is a UserError.
    """
    messages: list[Message] = list(row.messages)
    position = 0
    for match in STEP.finditer(row.extras["solution"]):
        thoughts, position = row.extras["solution"][position : match.start()], match.end()
        expression, _, value = match[1].rpartition("=")
        try:
            agrees = evaluate(expression) == evaluate(value)
        except ToolError as error:
            raise UserError(f"{row.extras['where']}: {match[0]}: {error}; mend or remove the line") from error
        if not agrees:
            raise UserError(f"{row.extras['where']}: {match[0]} is not true; mend or remove the line")
        call = tool_call("calculator", {"expression": expression})
        messages.append(assistant("", thoughts, tool_calls=[call]))
        messages.append({"role": "tool", "content": calculator.function(expression)})
    messages.append(assistant(row.answer, row.extras["solution"][position:]))
    return Demonstration(messages, [calculator], "tool" if position else "think", row.difficulty)


def assistant(content: str, thoughts: str, **fields: Any) -> Message:
    message: Message = {"role": "assistant", "content": content, **fields}
    if thoughts.strip():
        message["reasoning_content"] = thoughts.strip()
    return message
