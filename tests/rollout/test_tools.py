from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from typing import Literal

import pytest

from rollout.errors import WaitTimeout
from rollout.tools import Tool, ToolError, call, tool


@tool
def repeat(text: str, times: int = 2) -> str:
    """Repeat a text.

    Args:
        text: What to repeat.
        times: How often.
    """
    return text * times


@tool
def mixed(ratio: float, mode: Literal["a", "b"], names: list[str], deep: bool = False) -> str:
    """Take one of each type.

    Args:
        ratio: A number.
        mode: One of two.
        names: A list.
        deep: A flag.
    """
    return f"{ratio} {mode} {names} {deep}"


def run(made: Tool, **arguments: object) -> str:
    return asyncio.run(call(made, arguments))


def test_the_schema_comes_from_the_signature() -> None:
    function = repeat.schema["function"]
    assert function["name"] == "repeat" and set(function) == {"name", "description", "parameters"}
    assert function["parameters"]["required"] == ["text"]
    assert function["parameters"]["properties"]["times"]["type"] == "integer"


def test_a_tool_runs_with_defaults_and_types() -> None:
    assert run(repeat, text="ab") == "abab"
    assert run(mixed, ratio=1, mode="a", names=["x"]) == "1 a ['x'] False"


@pytest.mark.parametrize(
    ("made", "arguments", "words"),
    [
        (repeat, {}, "'text' is missing"),
        (repeat, {"text": "a", "speed": 1}, "unknown argument 'speed'"),
        (repeat, {"text": 3}, "must be of type string"),
        (repeat, {"text": "a", "times": "2"}, "must be of type integer"),
        (repeat, {"text": "a", "times": True}, "must be of type integer"),
        (repeat, {"text": None}, "must be of type string"),
        (mixed, {"ratio": 1.0, "mode": "c", "names": []}, "must be one of a, b"),
        (mixed, {"ratio": 1.0, "mode": "a", "names": "x"}, "must be of type array"),
        (mixed, {"ratio": 1.0, "mode": "a", "names": [], "deep": 1}, "must be of type boolean"),
    ],
)
def test_wrong_arguments_are_words_for_the_model(made: Tool, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ToolError, match=words):
        run(made, **arguments)


def make(function: object, timeout: float | None) -> Tool:
    schema = {"function": {"name": "made", "parameters": {"properties": {}}}}
    return Tool("made", schema, function, timeout)  # type: ignore[arg-type]


async def hang_async() -> str:
    await asyncio.sleep(60)
    return ""


@pytest.mark.parametrize("function", [lambda: time.sleep(60), hang_async])
def test_a_tool_that_hangs_is_named(function: object) -> None:
    start = time.monotonic()
    with pytest.raises(WaitTimeout, match=r"tool made: no result after 0\.1 s"):
        run(make(function, 0.1))
    assert time.monotonic() - start < 5


async def fails_async() -> str:
    raise TimeoutError("its own")


def fails() -> str:
    raise TimeoutError("its own")


@pytest.mark.parametrize(("function", "timeout"), [(fails, None), (fails, 5.0), (fails_async, 5.0)])
def test_other_exceptions_pass_unchanged(function: object, timeout: float | None) -> None:
    with pytest.raises(TimeoutError, match="its own") as error:
        run(make(function, timeout))
    assert not isinstance(error.value, WaitTimeout)


@pytest.mark.parametrize("function", [lambda: next(iter([])), lambda: sys.exit(3)])
def test_exceptions_that_would_end_the_event_loop_do_not(function: object) -> None:
    with pytest.raises(RuntimeError):
        run(make(function, 5.0))


def test_threads_run_side_by_side_and_leave_the_loop_free() -> None:
    barrier = threading.Barrier(8, timeout=10)

    async def together() -> list[str]:
        made = make(lambda: str(barrier.wait() >= 0), 10.0)
        return await asyncio.gather(*(call(made, {}) for _ in range(8)))

    assert asyncio.run(together()) == ["True"] * 8


def test_a_hung_tool_does_not_hold_up_the_end_of_the_process() -> None:
    program = (
        "import asyncio, time\n"
        "from rollout.tools import in_thread\n"
        "try:\n    asyncio.run(in_thread('x', 0.1, time.sleep, 60))\n"
        "except TimeoutError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout == "x: no result after 0.1 s\n" and done.returncode == 0 and done.stderr == ""
