"""Tools are typed functions: the schema comes from the signature and the docstring."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rollout.errors import WaitTimeout


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

    schema = get_json_schema(function)
    schema["function"].pop("return", None)  # transformers' own; OpenAI's format has no such key
    return Tool(function.__name__, schema, function, timeout)


TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def check_arguments(tool: Tool, arguments: dict[str, Any]) -> None:
    """Refuse, in words for the model, arguments that the tool's schema does not know, lacks or types differently."""
    parameters = tool.schema["function"]["parameters"]
    known = parameters["properties"]
    for name in parameters.get("required", []):
        if name not in arguments:
            raise ToolError(f"{tool.name}: the argument {name!r} is missing")
    for name, value in arguments.items():
        if name not in known:
            raise ToolError(f"{tool.name}: unknown argument {name!r}; it takes {', '.join(known) or 'none'}")
        schema = known[name]
        wanted = schema.get("type", [])
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        if names and schema.get("nullable"):
            names.append("null")
        # A boolean is an int in Python and none in JSON.
        fits = [n for n in names if isinstance(value, TYPES[n]) and (n == "boolean" or not isinstance(value, bool))]
        if names and not fits:
            raise ToolError(f"{tool.name}: {name!r} must be of type {' or '.join(names)}")
        if "enum" in schema and value not in schema["enum"]:
            raise ToolError(f"{tool.name}: {name!r} must be one of {', '.join(map(str, schema['enum']))}")


async def call(tool: Tool, arguments: dict[str, Any]) -> str:
    """Run a tool. ToolError: the arguments were wrong, for the model to read. WaitTimeout: it ran past its time-out.

    Any other exception of the tool passes through: it is no fault of the policy.
    """
    check_arguments(tool, arguments)
    if tool.is_async:
        try:
            async with asyncio.timeout(tool.timeout) as limit:
                return str(await tool.function(**arguments))  # type: ignore[misc]
        except TimeoutError as error:
            if limit.expired():
                raise WaitTimeout(f"tool {tool.name}: no result after {tool.timeout:g} s") from error
            raise
    if tool.timeout is None:
        return str(tool.function(**arguments))
    return str(await in_thread(f"tool {tool.name}", tool.timeout, tool.function, **arguments))


async def in_thread(what: str, timeout: float, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run ``function`` in a daemon thread of its own and wait at most ``timeout`` seconds, else WaitTimeout.

    A thread that hangs is left behind: an executor would join it when the interpreter exits, and hang there.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            setter(value)

    def report(setter: Callable[[Any], None], value: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, setter, value)

    def work() -> None:
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            if not isinstance(error, Exception) or isinstance(error, StopIteration):
                error = RuntimeError(f"{what} raised {error!r}")  # these would end the event loop, not this wait
            report(future.set_exception, error)
        else:
            report(future.set_result, result)

    threading.Thread(target=work, name=what, daemon=True).start()
    try:
        async with asyncio.timeout(timeout) as limit:
            return await future
    except TimeoutError as error:
        if limit.expired():
            raise WaitTimeout(f"{what}: no result after {timeout:g} s") from error
        raise
