"""Any data set that ``datasets.load_dataset`` loads, by a map of columns."""

from __future__ import annotations

import logging
from importlib import import_module
from random import Random
from typing import Any

from omegaconf import OmegaConf

from rollout.environment import Row
from rollout.episode import Need
from rollout.errors import UserError
from rollout.tasks import Split, ToolEnvironment, Verifier, row_id, verifiers
from rollout.tools import Tool

log = logging.getLogger(__name__)
VERIFIER_TIMEOUT = 300.0  # seconds, waiting for a free math-verify process included


class DatasetTask:
    """Prompts are text or lists of messages. Rows that occur twice are kept once, test rows never train."""

    def __init__(
        self,
        *,
        path: str,
        name: str = "dataset",
        data_files: Any = None,
        config: str | None = None,
        train_split: str = "train",
        test_split: str = "test",
        prompt_column: str = "prompt",
        answer_column: str = "answer",
        difficulty_column: str | None = None,
        thought_column: str | None = None,
        tools: list[str] | None = None,
        verifier: str = "math",
        size: int | None = None,
        test_size: int | None = None,
        seed: int = 0,
    ) -> None:
        self.name = name
        files = OmegaConf.to_container(data_files) if OmegaConf.is_config(data_files) else data_files
        self._source = {"path": path, "name": config, "data_files": files}
        self._splits = {"train": train_split, "test": test_split}
        self._columns = {"prompt_column": prompt_column, "answer_column": answer_column}
        optional = {"difficulty_column": difficulty_column, "thought_column": thought_column}
        self._columns |= {key: column for key, column in optional.items() if column is not None}
        self._sizes = {"train": size, "test": test_size}
        self._seed = seed
        self._tools = [find_tool(dotted) for dotted in tools or []]
        self._verifier = find_verifier(verifier)
        self._rows: dict[str, list[Row]] = {}

    def tools(self) -> list[Tool]:
        return self._tools

    def environment(self) -> ToolEnvironment:
        return ToolEnvironment(self._tools, self._verifier, timeout=VERIFIER_TIMEOUT)

    def rows(self, split: Split) -> list[Row]:
        if split not in self._rows:
            rows = {row.id: row for row in self._load(split)}
            if split == "train":
                shared = rows.keys() & {row.id for row in self.rows("test")}
                if shared:
                    log.warning("%s: %d training rows stand in the test split and are left out", self.name, len(shared))
                rows = {key: row for key, row in rows.items() if key not in shared}
            kept, size = list(rows.values()), self._sizes[split]
            if not kept:
                raise UserError(f"task.{split}_split: {self._splits[split]} of {self._source['path']} has no rows")
            if size is not None and size < len(kept):
                kept = Random(f"{split} {self._seed if split == 'train' else ''}").sample(kept, size)
            self._rows[split] = kept
        return self._rows[split]

    def _load(self, split: Split) -> list[Row]:
        from datasets import load_dataset
        from datasets.exceptions import DatasetGenerationError

        wanted = self._splits[split]
        try:
            data = load_dataset(**self._source, split=wanted)
        except (OSError, ValueError, StopIteration, DatasetGenerationError) as error:
            # datasets ends with a bare StopIteration on an empty file
            reason = str(error.__cause__ or error).strip().partition("\n")[0] or "a data file is empty"
            raise UserError(
                f"task.path: cannot load split {wanted!r} of {self._source['path']}: {reason}; "
                "see task.path, task.data_files and task.train_split, task.test_split (slices such as train[:90%] work)"
            ) from error
        for key, column in self._columns.items():
            if column not in data.column_names:
                there = ", ".join(data.column_names)
                raise UserError(f"task.{key}: no column {column!r} in {self._source['path']}; it has {there}")
        return [self._row(record, number) for number, record in enumerate(data)]

    def _row(self, record: dict[str, Any], number: int) -> Row:
        prompt, answer = record[self._columns["prompt_column"]], record[self._columns["answer_column"]]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not (isinstance(messages, list) and messages and all({"role", "content"} <= set(m) for m in messages)):
            column = self._columns["prompt_column"]
            raise UserError(f"task.prompt_column: row {number}: {column!r} is neither text nor a list of messages")
        difficulty, thought = (self._columns.get(key) for key in ("difficulty_column", "thought_column"))
        extras = {} if thought is None else {"needs_thought": self._need(record[thought], number)}
        return Row(row_id(messages), messages, answer, str(record[difficulty]) if difficulty else "", extras)

    def _need(self, value: Any, number: int) -> Need:
        for one in value if isinstance(value, list) else [value]:
            if not (one is None or isinstance(one, bool)):
                raise UserError(f"task.thought_column: row {number}: {one!r} is not true, false or null")
        return value  # type: ignore[no-any-return]


def find_tool(dotted: str) -> Tool:
    found = find("task.tools", dotted)
    if not isinstance(found, Tool):
        raise UserError(f"task.tools: {dotted} is no Tool; decorate the function with rollout.tools.tool")
    return found


def find_verifier(name: str) -> Verifier:
    """``math``, ``exact``, or the dotted name of a function of (answer, gold) -> bool."""
    if name in ("math", "exact"):
        return getattr(verifiers, name)
    found = find("task.verifier", name)
    if not callable(found):
        raise UserError(f"task.verifier: {name} is not a function of (answer, gold)")
    return found


def find(key: str, dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    if not module:
        raise UserError(f"{key}: {dotted!r} is not known; give a dotted name such as package.module.{dotted}")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{key}: cannot import {dotted} ({error}); give the dotted name of an importable object"
        ) from error
