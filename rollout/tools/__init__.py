"""Tools are typed functions: the schema comes from the signature and the docstring."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any


class ToolError(Exception):
    """The model's own arguments were wrong. The message is a value that the model reads, never a failure of the run."""


@dataclass(frozen=True)
class Tool:
    """A function with its OpenAI schema. ``timeout`` in seconds; None runs a fast, pure function without a thread."""

    name: str
    schema: dict[str, Any]
    function: Callable[..., str | Awaitable[str]]
    timeout: float | None = 30.0

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function)


def tool(function: Callable[..., Any] | None = None, *, timeout: float | None = 30.0) -> Any:
    """Make a ``Tool`` of a typed function with a Google-style docstring (every argument described).

    ``timeout`` in seconds ends a call that hangs; None is for fast, pure functions, which then run without a thread.
    """
    if function is None:
        return lambda f: tool(f, timeout=timeout)
    from transformers.utils import get_json_schema

    return Tool(function.__name__, get_json_schema(function), function, timeout)
