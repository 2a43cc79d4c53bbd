"""The policy behind a real engine: what its sampling depends on, and when history may not be rewritten."""

from __future__ import annotations

import asyncio
import copy
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from rollout.chat import Chat
from rollout.engines import Sampling
from rollout.environment import Message
from rollout.episode import Episode, ToolCall, ToolResult, Turn
from rollout.errors import UserError
from rollout.speaker import Policy, program_id, stable_seed
from rollout.tasks.arithmetic import Arithmetic
from rollout.tools.calculator import calculator
from training.models import train_tokenizer

if TYPE_CHECKING:
    from rollout.engines.vllm_in_process import InProcessEngine
    from tests.conftest import Loop

QUESTION: list[Message] = [{"role": "user", "content": "What is 12 + 34?"}]
CALLED = ToolCall("calculator", {"expression": "12+34"})
RESULT = [ToolResult(CALLED, "46", False, 0.0)]
# What DeepSeek's and others do: only what stands after </think> is left of earlier turns.
THOUGHTS = "'<think>' + ('\\n' + thoughts if thoughts else '') + '</think>' + content"
STRIPPED = {THOUGHTS: "content", "{{- content }}": "{{- content.split('</think>')[-1] }}"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """With as many tokens as the shared engine's model."""
    tokenizer = train_tokenizer(Arithmetic().corpus(), 512)
    tokenizer.add_tokens([f"filler {i}" for i in range(len(tokenizer), 512)])
    return tokenizer


@pytest.fixture
def policy(vllm_engine: InProcessEngine, tokenizer: Any) -> Policy:
    return Policy(vllm_engine, Chat(tokenizer), Sampling(max_tokens=1), 512, seed=3)


async def first_turn(policy: Policy, prompt: str = "q", group: str = "g", sample: int = 0) -> tuple[list[int], Any]:
    """The ids of one episode's first turn, and the episode."""
    episode = Episode(prompt, group, sample)
    speaker = policy.speaker()
    await speaker.open(episode, QUESTION, [calculator])
    await speaker.speak(episode, 12)
    await speaker.close(episode)
    sequence = episode.sequences[0]
    return sequence.token_ids[sequence.prompt_length :], episode


def test_a_seed_depends_on_its_parts_alone() -> None:
    assert stable_seed(1, "q", 0, 0, 7) == 216241048, "in every process, on every machine, in every version of ours"
    parts = list(itertools.product((0, 1), ("q", "q1"), range(4), range(3), range(3)))
    assert len({stable_seed(*p) for p in parts}) == len(parts)
    assert all(0 <= stable_seed(*p) < 2**31 for p in parts)
    assert stable_seed(1, 11) != stable_seed(11, 1)


def test_what_is_sampled_depends_on_run_prompt_sample_and_nothing_else(policy: Policy, run: Loop) -> None:
    async def together() -> list[list[int]]:
        cases = [("q", "g", 0), ("q", "another visit", 0), ("q", "g", 1), ("other", "g2", 0)]
        return [ids for ids, _ in await asyncio.gather(*(first_turn(policy, *case) for case in cases))]

    alone, _ = run(first_turn(policy))
    same, another_visit, sample, prompt = run(together())
    assert alone == same == another_visit, "whatever the batch, and whatever the visit is called"
    assert len({tuple(ids) for ids in (alone, sample, prompt)}) == 3
    assert run(first_turn(replace(policy, seed=4)))[0] != alone


def test_the_version_enters_the_seed_unless_two_checkpoints_shall_meet_the_same(
    policy: Policy, run: Loop, trainer_model: Any
) -> None:
    from rollout.weights import named_weights

    fixed = replace(policy, seed_version=False)
    before, before_fixed = run(first_turn(policy))[0], run(first_turn(fixed))[0]
    run(policy.engine.update_weights(named_weights(trainer_model), policy.engine.version + 1))
    assert run(first_turn(policy))[0] != before
    assert run(first_turn(fixed))[0] == before_fixed


def test_an_episode_keeps_what_the_engine_gave(policy: Policy, run: Loop) -> None:
    ids, episode = run(first_turn(policy))
    (sequence,) = episode.sequences
    assert sequence.token_ids[: sequence.prompt_length] == policy.chat.open(QUESTION, [calculator])
    assert 0 < len(ids) == sequence.own_tokens <= 12
    assert sequence.versions[sequence.prompt_length :] == [policy.engine.version] * len(ids)
    scored = run(policy.engine.score(sequence.token_ids))[sequence.prompt_length - 1 :]
    assert sequence.behaviour_logprobs[sequence.prompt_length :] == pytest.approx(scored, abs=1e-4)
    assert program_id(episode) == "g/0"


def two_turns(policy: Policy, run: Loop) -> Episode:
    """A turn, a tool's result, and another turn. The untrained policy calls nothing: a call is put in its mouth."""

    async def scenario() -> Episode:
        episode, speaker = Episode("q", "g"), policy.speaker()
        await speaker.open(episode, QUESTION, [calculator])
        await speaker.speak(episode, 6)
        episode.turns.append(Turn("hm", "", [CALLED], RESULT))
        await speaker.read(episode, RESULT)
        await speaker.speak(episode, 6)
        await speaker.close(episode)
        return episode

    return run(scenario())


def test_tool_results_are_appended_where_thinking_stays(policy: Policy, run: Loop) -> None:
    (sequence,) = two_turns(policy, run).sequences
    injected = policy.chat.tool_results(["46"])
    end = sequence.own_mask.index(False, sequence.prompt_length)
    assert sequence.token_ids[end : end + len(injected)] == injected
    assert sequence.own_mask[end : end + len(injected) + 1] == [False] * len(injected) + [True]


def test_a_template_that_strips_thinking_starts_a_new_sequence(policy: Policy, tokenizer: Any, run: Loop) -> None:
    strips = copy.deepcopy(tokenizer)
    for kept, stripped in STRIPPED.items():
        assert kept in strips.chat_template
        strips.chat_template = strips.chat_template.replace(kept, stripped)
    policy = replace(policy, chat=Chat(strips))
    assert not policy.chat.keeps_thinking
    first, second = two_turns(policy, run).sequences
    assert first.own_mask[-1] and second.own_mask[-1], "both end with what the policy wrote"
    text = strips.decode(second.token_ids[: second.prompt_length])
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "12+34"}}</tool_call>'
    assert text == (
        "<|im_start|>user\nWhat is 12 + 34?<|im_end|>\n"
        f"<|im_start|>assistant\n{call}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>46</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_full_context_ends_the_episode_without_asking_the_engine(policy: Policy, run: Loop) -> None:
    prompt = policy.chat.open(QUESTION, [calculator])
    episode, speaker = Episode("q", "g"), replace(policy, max_model_len=len(prompt)).speaker()
    run(speaker.open(episode, QUESTION, [calculator]))
    episode.turns.append(Turn("", ""))  # what it has read since fills the context
    turn, written, cut = run(speaker.speak(episode, 6))
    assert (written, cut, turn.well_formed) == (0, True, False)
    assert episode.own_tokens == 0


def test_a_prompt_that_fills_the_context_is_refused_not_scored(policy: Policy, run: Loop) -> None:
    prompt = policy.chat.open(QUESTION, [calculator])
    episode, speaker = Episode("q", "g"), replace(policy, max_model_len=len(prompt)).speaker()
    run(speaker.open(episode, QUESTION, [calculator]))
    with pytest.raises(UserError, match=rf"engine\.max_model_len: {len(prompt)} leaves no room after prompt q of"):
        run(speaker.speak(episode, 6))
