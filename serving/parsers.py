"""Which of vLLM's parsers read a checkpoint's turns, judged by what its chat template writes. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rollout.chat import THINK, THINK_END
from rollout.errors import UserError

OURS = "turnstile"  # serving.reasoning_parser


@dataclass(frozen=True)
class Parsers:
    """vLLM's names of parsers, or None. ``template`` replaces the checkpoint's own where that is wrapped."""

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
TOOL_FAMILIES = {
    "llama4": "llama4_pythonic",
    "lfm2": "lfm2",
    "granite": "granite",
    "granitemoe": "granite",
    "ernie4_5_moe": "ernie45",
}
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
    reasoning = reasoning_parser(model_type, added_tokens)
    wrapped = reasoning == OURS and template and not takes(template, "reasoning")
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


def reasoning_parser(model_type: str, added_tokens: frozenset[str]) -> str | None:
    """The family's where it has one of its own, else ours where both tags are single tokens."""
    if model_type in REASONING_FAMILIES:
        return REASONING_FAMILIES[model_type]
    return OURS if {THINK, THINK_END} <= added_tokens else None


def takes(template: str, variable: str) -> bool:
    """Whether the template reads a variable of that name from outside."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # transformers' own tag: it only marks
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except TemplateSyntaxError as error:
        raise UserError(f"checkpoint: its chat template is not valid Jinja (line {error.lineno}: {error})") from None
    return variable in meta.find_undeclared_variables(tree)


def with_modes(template: str) -> str:
    """The template with ``reasoning`` on top: its own ``enable_thinking`` where it has that, else by opening tags.

    always ends the prompt inside ``<think>``, never behind an empty block; auto and no value change nothing.
    """
    return (
        "{%- if reasoning is defined and reasoning not in ['auto', 'always', 'never'] %}"
        "{{- raise_exception('reasoning must be auto, always or never') }}{%- endif %}"
        "{%- if reasoning in ['always', 'never'] %}{%- set enable_thinking = reasoning == 'always' %}{%- endif %}"
        "{%- set turns %}" + template + "{%- endset %}{{- turns }}"
        "{%- if add_generation_prompt and reasoning in ['always', 'never'] %}"
        "{%- set opened = turns.rstrip().endswith('<think>') %}"
        "{%- set answered = turns.rstrip().endswith('</think>') %}"
        "{%- if reasoning == 'always' and not opened %}{{- '<think>\\n' }}"
        "{%- elif reasoning == 'never' and not answered %}"
        "{{- '</think>\\n\\n' if opened else '<think>\\n\\n</think>\\n\\n' }}"
        "{%- endif %}{%- endif %}"
    )
