"""Which of vLLM's parsers read a checkpoint's turns, judged by what its chat template writes. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from serving.reasoning import CLOSE_TAG, OPEN_TAG

OURS = "turnstile"  # serving.reasoning_parser


@dataclass(frozen=True)
class Parsers:
    """vLLM's parser names, None where there is none. ``template`` replaces the checkpoint's own where that is wrapped."""

    tool: str | None
    reasoning: str | None
    template: str | None = None


# How a call looks in the template → tool parser. The first that matches wins: the particular stand before the general.
TOOL_FORMATS: tuple[tuple[str, str], ...] = (
    (r"<function=", "qwen3_coder"),
    (r"<arg_key>", "glm45"),
    (r"<minimax:tool_call>", "minimax_m2"),
    (r"<seed:tool_call>", "seed_oss"),
    (r"<\|tool_calls_section_begin\|>", "kimi_k2"),
    (r"<｜tool▁call▁begin｜>(?s:.*)```json", "deepseek_v3"),
    (r"<｜tool▁call▁begin｜>", "deepseek_v31"),
    (r"<\|channel\|>(?s:.*)functions\.", "openai"),
    (r"<\|tool_call>", "gemma4"),
    (r"<start_function_call>", "functiongemma"),
    (r"<\|tool_call_start\|>", "lfm2"),
    (r"\[TOOL_CALLS\]", "mistral"),
    (r"<tool_call>", "hermes"),
)
# Model families whose template does not tell, or shares a format with others.
TOOL_FAMILIES = {"llama4": "llama4_pythonic", "granite": "granite", "granitemoe": "granite", "ernie4_5_moe": "ernie45"}
REASONING_FAMILIES = {
    "gpt_oss": "openai_gptoss",
    "nemotron_h": "nemotron_v3",
    "glm4_moe": "glm45",
    "minimax_m2": "minimax_m2",
    "seed_oss": "seed_oss",
    "kimi_k2": "kimi_k2",
    "gemma4": "gemma4",
    "granite": "granite",
    "ernie4_5_moe": "ernie45",
    "deepseek_v3": "deepseek_v3",
}


def choose(template: str, model_type: str, added_tokens: frozenset[str]) -> Parsers:
    """Parsers for a chat template's source, config.json's ``model_type`` and the strings that are single tokens."""
    reasoning = reasoning_parser(template, model_type, added_tokens)
    wrapped = reasoning == OURS and not takes(template, "reasoning")
    return Parsers(tool_parser(template, model_type), reasoning, with_modes(template) if wrapped else None)


def tool_parser(template: str, model_type: str) -> str | None:
    for pattern, name in TOOL_FORMATS:
        if re.search(pattern, template):
            return name
    if "tools" not in template:
        return None
    if model_type in ("llama", "mllama") and '"parameters"' in template:
        return "llama3_json"
    return TOOL_FAMILIES.get(model_type)


def reasoning_parser(template: str, model_type: str, added_tokens: frozenset[str]) -> str | None:
    """Ours where a ChatML template has a switch for thinking, else the family's, else deepseek_r1 for plain tags."""
    tags = OPEN_TAG in template and CLOSE_TAG in template
    single = {OPEN_TAG, CLOSE_TAG} <= added_tokens
    if tags and single and takes(template, "reasoning"):
        return OURS
    if model_type in REASONING_FAMILIES:
        return REASONING_FAMILIES[model_type]
    if tags and single and takes(template, "enable_thinking") and "<|im_start|>" in template:
        return OURS
    return "deepseek_r1" if single and OPEN_TAG in template else None


def takes(template: str, variable: str) -> bool:
    """Whether the template reads a variable of that name from outside."""
    from jinja2 import Environment, meta

    return variable in meta.find_undeclared_variables(
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    )


def with_modes(template: str) -> str:
    """A template with ``enable_thinking`` that takes ``reasoning`` too: never is false, always opens ``<think>`` as well."""
    return (
        "{%- if reasoning is defined and reasoning not in ['auto', 'always', 'never'] %}"
        "{{- raise_exception('reasoning must be auto, always or never') }}{%- endif %}"
        "{%- if reasoning in ['always', 'never'] %}{%- set enable_thinking = reasoning == 'always' %}{%- endif %}"
        "{%- set turns %}" + template + "{%- endset %}{{- turns }}"
        "{%- if add_generation_prompt and reasoning == 'always' and not turns.rstrip().endswith('" + OPEN_TAG + "') %}"
        "{{- '" + OPEN_TAG + "\\n' }}{%- endif %}"
    )
