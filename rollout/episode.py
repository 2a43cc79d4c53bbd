"""The data model: what a rollout leaves behind for training, evaluation and logs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rollout.environment import Row

Need = bool | list[bool | None] | None


class Status(StrEnum):
    """How an episode ended."""

    FINISHED = "finished"  # the policy gave its final answer
    TRUNCATED = "truncated"  # the token limit cut it
    CALL_LIMIT = "call_limit"  # it asked for more tool calls, or more turns, than allowed
    UNFINISHED = "unfinished"  # a window cut it: it has no reward yet and goes on in the next window


@dataclass
class Sequence:
    """One append-only run of tokens that the policy saw and wrote; never re-tokenised.

    All lists have one entry per token. ``own_mask`` is True where the policy wrote the token. ``behaviour_logprobs``
    are the engine's, after temperature, and None for text that was injected; ``versions`` are the policy versions that
    wrote each token, -1 for injected text. ``train_prompt_ids`` replaces the first ``prompt_length`` tokens in training
    where the sampled prompt must differ from the trained one. ``trained`` is how many of its own tokens, from the first
    on, the policy has been trained on already: T-PPO trains each own token once, in the window that wrote it (arXiv
    2506.15050).
    """

    token_ids: list[int] = field(default_factory=list)
    own_mask: list[bool] = field(default_factory=list)
    behaviour_logprobs: list[float | None] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    prompt_length: int = 0
    train_prompt_ids: list[int] | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    trained: int = 0

    @classmethod
    def open(cls, prompt_ids: list[int]) -> Sequence:
        """A new sequence that holds only its prompt."""
        sequence = cls(prompt_length=len(prompt_ids))
        sequence.append_injected(prompt_ids)
        return sequence

    def append_injected(self, ids: list[int]) -> None:
        """Text that the policy did not write: prompts, tool results."""
        self.token_ids += ids
        self.own_mask += [False] * len(ids)
        self.behaviour_logprobs += [None] * len(ids)
        self.versions += [-1] * len(ids)

    def append_own(self, ids: list[int], logprobs: list[float], versions: list[int]) -> None:
        """Text that the policy wrote, with the engine's log-probs and the policy version of each token."""
        if not len(ids) == len(logprobs) == len(versions):
            raise ValueError(f"{len(ids)} tokens, {len(logprobs)} log-probs and {len(versions)} versions must be equal")
        self.token_ids += ids
        self.own_mask += [True] * len(ids)
        self.behaviour_logprobs += logprobs
        self.versions += versions

    def snapshot(self) -> Sequence:
        """A copy that stays as it is while tokens are appended."""
        return replace(
            self,
            token_ids=list(self.token_ids),
            own_mask=list(self.own_mask),
            behaviour_logprobs=list(self.behaviour_logprobs),
            versions=list(self.versions),
            extras=dict(self.extras),
        )

    @property
    def own_tokens(self) -> int:
        return sum(self.own_mask)

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass
class ToolCall:
    """A tool call that the policy wrote. ``arguments`` is None if they were not a JSON object (see ``problem``)."""

    name: str
    arguments: dict[str, Any] | None
    problem: str | None = None


@dataclass
class ToolResult:
    """What the policy read back. ``error`` marks a value that says what was wrong with the policy's own arguments."""

    call: ToolCall
    content: str
    error: bool
    seconds: float


@dataclass
class Turn:
    """One assistant turn, parsed. ``well_formed`` is False where tags were nested, repeated, missing or left open."""

    reasoning: str
    content: str
    calls: list[ToolCall] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)
    well_formed: bool = True

    @property
    def thought(self) -> bool:
        """AdaCoT's HasReasoning: the think block is not empty (arXiv 2505.11896 §2.1)."""
        return bool(self.reasoning.strip())


class Member(Protocol):
    """One of a group: an episode, or the job that will become one."""

    @property
    def group_id(self) -> str: ...

    @property
    def sample(self) -> int: ...


def program_id(member: Member) -> str:
    """The engine's name for an episode: what scheduling and retention go by."""
    return f"{member.group_id}/{member.sample}"


@dataclass
class Episode:
    """One attempt at one prompt. ``success`` is the verifier's word, kept apart from the shaped ``rewards``.

    ``open_turn`` is where in the last sequence a turn begins that a window has cut; None between turns.
    ``needs_thought`` is what the row says of the need to think, for the episode or turn by turn; None where unknown.
    ``reasoning`` is the mode that its template forces, None where the engine's policy has the say; ``told`` the one
    that its system prompt asks for. ``prompt_tokens`` is what the engine was given over all requests, ``cached_tokens``
    what it had of that in its cache.
    """

    prompt_id: str
    group_id: str
    sample: int = 0
    difficulty: str = ""
    sequences: list[Sequence] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    rewards: dict[str, float] = field(default_factory=dict)
    success: bool = False
    status: Status = Status.FINISHED
    extras: dict[str, Any] = field(default_factory=dict)
    open_turn: int | None = None
    needs_thought: Need = None
    reasoning: str | None = None
    told: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @classmethod
    def begin(cls, row: Row, group_id: str, sample: int = 0, reasoning: str | None = None) -> Episode:
        """An episode of which nothing has been played yet."""
        episode = cls(row.id, group_id, sample, row.difficulty, status=Status.UNFINISHED, reasoning=reasoning)
        episode.needs_thought, episode.told = row.extras.get("needs_thought"), row.extras.get("told")
        return episode

    def snapshot(self) -> Episode:
        """A copy that stays as it is while the episode goes on."""
        return replace(
            self,
            sequences=[sequence.snapshot() for sequence in self.sequences],
            turns=[replace(turn, results=list(turn.results)) for turn in self.turns],
        )

    @property
    def reward(self) -> float:
        """The scalar that advantages are computed from: the sum of the named parts."""
        return sum(self.rewards.values())

    @property
    def own_tokens(self) -> int:
        """Tokens that the policy wrote; a server that keeps the ids to itself at least counts them."""
        return self.extras.get("own_tokens") or sum(sequence.own_tokens for sequence in self.sequences)

    @property
    def open_tokens(self) -> int:
        """Tokens that the policy wrote of a turn that is not over."""
        return 0 if self.open_turn is None else len(self.sequences[-1]) - self.open_turn

    @property
    def unanswered(self) -> bool:
        """Whether the tools that the last turn called have yet to answer."""
        return (
            self.status is Status.UNFINISHED
            and bool(self.turns and self.turns[-1].calls)
            and not self.turns[-1].results
        )

    @property
    def tool_results(self) -> list[ToolResult]:
        return [result for turn in self.turns for result in turn.results]

    @property
    def thought(self) -> bool:
        """Whether any turn thought."""
        return any(turn.thought for turn in self.turns)

    @property
    def well_formed(self) -> bool:
        """Whether every turn kept the format: no tag nested, repeated, left open, or written in another's place."""
        return all(turn.well_formed for turn in self.turns)

    def decisions(self, need: Need, longest_answer: int | None = None) -> list[tuple[bool, bool | None]]:
        """Whether it thought, and whether there was need: once for a single ``need``, turn by turn for a list.

        A turn whose content is longer than ``longest_answer`` characters counts as one that thought.
        """
        thoughts = [
            turn.thought or (longest_answer is not None and len(turn.content) > longest_answer) for turn in self.turns
        ]
        return list(zip(thoughts, need, strict=False)) if isinstance(need, list) else [(any(thoughts), need)]

    @property
    def answer(self) -> str:
        """The final answer: the content of the last turn."""
        return self.turns[-1].content if self.turns else ""
