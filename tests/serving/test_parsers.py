"""The parsers that fit real chat templates (those that TRL ships), and the reasoning modes on top of any template."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from rollout.chat import TEMPLATE
from rollout.errors import UserError
from serving.parsers import (
    OURS,
    REASONING_FAMILIES,
    TOOL_FAMILIES,
    TOOL_FORMATS,
    Parsers,
    choose,
    takes,
    with_modes,
)

TEMPLATES = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
TAGS = frozenset({"<think>", "</think>"})
TOOLS = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}]
CONVERSATION = [
    {"role": "user", "content": "1+1?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    },
    {"role": "tool", "content": "2"},
]


def render(template: str, messages: list[dict[str, Any]] = CONVERSATION, **kwargs: Any) -> str:
    texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **kwargs)
    return texts[0]


@pytest.mark.parametrize(
    ("template", "model_type", "tokens", "tool", "reasoning"),
    [
        ("qwen3", "qwen3", TAGS, "hermes", OURS),
        ("qwen3_training", "qwen3", TAGS, "hermes", OURS),  # TRL's own, with {% generation %}
        ("qwen3_instruct_2507", "qwen3", TAGS, "hermes", OURS),
        ("qwen2_5", "qwen2", frozenset(), "hermes", None),
        ("qwen3_5_think", "qwen3_5", TAGS, "qwen3_coder", OURS),
        ("nemotron_3_nano", "nemotron_h", TAGS, "qwen3_coder", "nemotron_v3"),
        ("glm4moe", "glm4_moe", TAGS, "glm45", "glm45"),
        ("gptoss", "gpt_oss", frozenset(), "openai", "openai_gptoss"),
        ("deepseekv3", "deepseek_v3", TAGS, "deepseek_v3", "deepseek_v3"),
        ("deepseek_r1_distill", "qwen2", TAGS, "deepseek_v3", OURS),
        ("llama3_1", "llama", frozenset(), "llama3_json", None),
        ("gemma4_v5", "gemma4", frozenset(), "gemma4", "gemma4"),
        ("lfm2", "lfm2", frozenset(), "lfm2", None),
        ("gemma3", "gemma3", frozenset(), None, None),
        ("phi3", "phi3", frozenset(), None, None),
    ],
)
def test_real_templates(template: str, model_type: str, tokens: frozenset[str], tool: str, reasoning: str) -> None:
    chosen = choose((TEMPLATES / f"{template}.jinja").read_text(), model_type, tokens)
    assert (chosen.tool, chosen.reasoning) == (tool, reasoning)
    assert (chosen.template is not None) == (reasoning == OURS)


def test_our_template_needs_no_wrapping() -> None:
    assert choose(TEMPLATE.read_text(), "qwen3", TAGS) == Parsers("hermes", OURS)


def test_no_template_no_tool_parser() -> None:
    assert choose("", "qwen3", frozenset()) == Parsers(None, None)
    assert choose("", "qwen3", TAGS) == Parsers(None, OURS)


def test_every_name_is_registered_in_vllm() -> None:
    """Read, not imported: importing vLLM takes ten seconds."""
    package = importlib.util.find_spec("vllm")
    if package is None:
        pytest.skip("vLLM is not installed")
    registered = {}
    for folder, table in (
        ("tool_parsers", "_TOOL_PARSERS_TO_REGISTER"),
        ("reasoning", "_REASONING_PARSERS_TO_REGISTER"),
    ):
        tree = ast.parse((Path(package.origin).parent / folder / "__init__.py").read_text())
        value = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == table)
        registered[folder] = set(ast.literal_eval(value))
    assert {name for _, name in TOOL_FORMATS} | set(TOOL_FAMILIES.values()) <= registered["tool_parsers"]
    assert set(REASONING_FAMILIES.values()) <= registered["reasoning"]
    assert OURS not in registered["reasoning"]


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_instruct_2507", "deepseek_r1_distill"]
)
def test_modes_on_any_template(name: str) -> None:
    template = (TEMPLATES / f"{name}.jinja").read_text()
    messages = CONVERSATION if name.startswith("qwen3") else CONVERSATION[:1]
    plain, wrapped = render(template, messages, tools=TOOLS), with_modes(template)
    assert takes(wrapped, "reasoning")
    assert render(wrapped, messages, tools=TOOLS) == plain
    assert render(wrapped, messages, tools=TOOLS, reasoning="auto") == plain
    assert render(wrapped, messages, tools=TOOLS, reasoning="always").rstrip().endswith("<think>")
    assert render(wrapped, messages, tools=TOOLS, reasoning="never").rstrip().endswith("</think>")
    with pytest.raises(Exception, match="auto, always or never"):
        render(wrapped, messages, reasoning="sometimes")


def test_own_switch_still_works_under_the_modes() -> None:
    template = (TEMPLATES / "qwen3.jinja").read_text()
    wrapped = with_modes(template)
    assert takes(wrapped, "enable_thinking")
    assert render(wrapped, enable_thinking=False) == render(template, enable_thinking=False)
    assert render(wrapped, reasoning="never") == render(template, enable_thinking=False)


def test_broken_template() -> None:
    with pytest.raises(UserError, match=r"not valid Jinja \(line 1"):
        choose("{% if %}", "qwen3", TAGS)
