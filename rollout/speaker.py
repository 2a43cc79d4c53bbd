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
from rollout.window import Window


def stable_seed(*parts: object) -> int:
    """A 31-bit seed that depends on its parts alone, in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big") >> 1


@dataclass(frozen=True)
class Policy:
    """How every episode of a run speaks: the engine, its chat format and how to sample.

    ``seed`` makes sampling a function of run, prompt, sample, turn and policy version, whatever the batch; None leaves
    it to the engine. ``seed_version=False`` leaves the version out, so that two checkpoints meet the same randomness.
    ``reasoning`` is the template's mode where an episode has none of its own: auto, always or never. ``window`` deals
    out the tokens that an episode may write before the next weight update; None: as many as it likes.
    """

    engine: Engine
    chat: Chat
    sampling: Sampling
    max_model_len: int
    seed: int | None = None
    seed_version: bool = True
    reasoning: str = "auto"
    window: Window | None = None

    def at(self, temperature: float, seed: int | None) -> Policy:
        """The same policy for an evaluation: the full distribution at this temperature, the same seeds every time."""
        sampling = replace(self.sampling, temperature=temperature, top_p=1.0, top_k=0, min_p=0.0)
        return replace(self, sampling=sampling, seed=seed, seed_version=False, window=None)

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
        if not episode.sequences:
            ids = self.policy.chat.open(messages, tools, self._mode(episode))
            episode.sequences.append(Sequence.open(ids))
        for turn in (turn for turn in episode.turns if turn.results):  # taken up again
            self._remember(turn)

    async def speak(self, episode: Episode, max_tokens: int) -> tuple[Turn, int, bool]:
        sequence = episode.sequences[-1]
        if episode.open_turn is None:
            episode.open_turn = len(sequence)
        start = episode.open_turn
        if start >= self.policy.max_model_len and not episode.turns:
            raise UserError(
                f"engine.max_model_len: {self.policy.max_model_len} leaves no room after prompt {episode.prompt_id} of "
                f"{start} tokens; raise it or leave such prompts out"
            )
        limit = min(start + max_tokens, self.policy.max_model_len)
        stopped = False
        while not stopped and len(sequence) < limit:
            stopped = await self._write(episode, limit - len(sequence))
        written = sequence.token_ids[start:]
        episode.open_turn = None
        # What it has read may fill the context: then nothing more can be written.
        turn = self.policy.chat.parse(written, self._mode(episode)) if written else Turn("", "", well_formed=False)
        return turn, len(written), not stopped

    def _mode(self, episode: Episode) -> str:
        return episode.reasoning or self.policy.reasoning

    async def _write(self, episode: Episode, room: int) -> bool:
        """Append up to ``room`` tokens, or as many as the window grants; True if the policy ended its turn."""
        policy, sequence, window = self.policy, episode.sequences[-1], self.policy.window
        if window is not None:
            room = min(room, await window.grant(episode))
        seed = None
        if policy.seed is not None:
            version = policy.engine.version if policy.seed_version else 0
            parts = (policy.seed, episode.prompt_id, episode.sample, len(episode.turns), version)
            seed = stable_seed(*parts, *([episode.open_tokens] if episode.open_tokens else []))
        out = await policy.engine.generate(
            sequence.token_ids,
            replace(policy.sampling, max_tokens=room, seed=seed, stop_token_ids=tuple(policy.chat.stop_token_ids)),
            program_id=program_id(episode),
            tool=None if episode.open_tokens else self.last_tool,  # what a window cut was not away with a tool
        )
        ended_by_window = window is not None and window.charge(episode, len(out.ids))
        if out.finish == "abort" and not ended_by_window:
            raise InterruptedError(f"the engine aborted {program_id(episode)}")
        episode.prompt_tokens += len(sequence)
        episode.cached_tokens += out.cached_tokens
        sequence.append_own(out.ids, out.logprobs, out.versions)
        sequence.extras.update(out.extras)
        return out.finish == "stop"

    async def read(self, episode: Episode, results: list[ToolResult]) -> None:
        self._remember(episode.turns[-1])
        if self.policy.chat.keeps_thinking:
            contents = [result.content for result in results]
            episode.sequences[-1].append_injected(self.policy.chat.tool_results(contents, self._mode(episode)))
            return
        # A template that strips earlier thinking rewrites history: what follows is another sequence.
        ids = self.policy.chat.open(self.messages, self.tools, self._mode(episode))
        episode.sequences.append(Sequence.open(ids))

    def _remember(self, turn: Turn) -> None:
        self.last_tool = turn.results[-1].call.name
        self.messages.append(assistant_message(turn))
        self.messages += [{"role": "tool", "name": r.call.name, "content": r.content} for r in turn.results]

    async def close(self, episode: Episode) -> None:
        await self.policy.engine.release(program_id(episode))
