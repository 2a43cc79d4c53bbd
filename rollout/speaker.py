"""The policy behind an engine: token ids in, token ids out, nothing is ever re-tokenised."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from rollout.chat import Chat, assistant_message
from rollout.engines import Engine, Sampling
from rollout.environment import Message
from rollout.episode import Episode, Sequence, ToolResult, Turn, program_id
from rollout.errors import UserError
from rollout.tools import Tool


def stable_seed(*parts: object) -> int:
    """A 31-bit seed that depends on its parts alone, in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big") >> 1


@dataclass(frozen=True)
class Policy:
    """How every episode of a run speaks: the engine, its chat format and how to sample.

    ``seed`` makes sampling a function of run, prompt, sample, turn and policy version, whatever the batch; None leaves
    it to the engine. ``seed_version=False`` leaves the version out, so that two checkpoints meet the same randomness.
    ``reasoning`` is the template's mode: auto, always or never.
    """

    engine: Engine
    chat: Chat
    sampling: Sampling
    max_model_len: int
    seed: int | None = None
    seed_version: bool = True
    reasoning: str = "auto"

    def at(self, temperature: float, seed: int | None) -> Policy:
        """The same policy for an evaluation: the full distribution at this temperature, the same seeds every time."""
        sampling = replace(self.sampling, temperature=temperature, top_p=1.0, top_k=0, min_p=0.0)
        return replace(self, sampling=sampling, seed=seed, seed_version=False)

    def speaker(self) -> EngineSpeaker:
        return EngineSpeaker(self)


class EngineSpeaker:
    """One episode's side of the conversation."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.messages: list[Message] = []
        self.tools: list[Tool] = []
        self.last_tool: str | None = None

    async def open(self, episode: Episode, messages: list[Message], tools: list[Tool]) -> None:
        self.messages, self.tools = list(messages), tools
        episode.sequences.append(Sequence.open(self.policy.chat.open(messages, tools, self.policy.reasoning)))

    async def speak(self, episode: Episode, max_tokens: int) -> tuple[Turn, int, bool]:
        policy, sequence = self.policy, episode.sequences[-1]
        room = min(max_tokens, policy.max_model_len - len(sequence))
        if room <= 0 and not episode.turns:
            raise UserError(
                f"engine.max_model_len: {policy.max_model_len} leaves no room after prompt {episode.prompt_id} of "
                f"{len(sequence)} tokens; raise it or leave such prompts out"
            )
        if room <= 0:  # what it has read fills the context: nothing more can be written
            return Turn("", "", well_formed=False), 0, True
        seed = None
        if policy.seed is not None:
            version = policy.engine.version if policy.seed_version else 0
            seed = stable_seed(policy.seed, episode.prompt_id, episode.sample, len(episode.turns), version)
        out = await policy.engine.generate(
            sequence.token_ids,
            replace(policy.sampling, max_tokens=room, seed=seed, stop_token_ids=tuple(policy.chat.stop_token_ids)),
            program_id=program_id(episode),
            tool=self.last_tool,
        )
        if out.finish == "abort":
            raise InterruptedError(f"the engine aborted {program_id(episode)}")
        sequence.append_own(out.ids, out.logprobs, out.versions)
        sequence.extras.update(out.extras)
        return policy.chat.parse(out.ids, policy.reasoning), len(out.ids), out.finish == "length"

    async def read(self, episode: Episode, results: list[ToolResult]) -> None:
        self.last_tool = results[-1].call.name
        contents = [result.content for result in results]
        if self.policy.chat.keeps_thinking:
            episode.sequences[-1].append_injected(self.policy.chat.tool_results(contents, self.policy.reasoning))
            return
        # A template that strips earlier thinking rewrites history: what follows is another sequence.
        self.messages.append(assistant_message(episode.turns[-1]))
        self.messages += [{"role": "tool", "name": r.call.name, "content": r.content} for r in results]
        ids = self.policy.chat.open(self.messages, self.tools, self.policy.reasoning)
        episode.sequences.append(Sequence.open(ids))

    async def close(self, episode: Episode) -> None:
        await self.policy.engine.release(program_id(episode))
