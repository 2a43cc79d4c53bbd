"""An episode as people read it: turns, calls and results, and what training made of each token of the policy's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rollout.episode import Episode
from rollout.episode import Sequence as EpisodeSequence
from training.estimates import Estimate
from training.packing import MicroBatch, unpack

Decode = Callable[[list[int]], str]

MOST_TOKENS = 600  # of an episode that are recorded one by one: half from its start, half from its end
MOST_PROMPT = 4000  # characters


def episode_record(episode: Episode, estimate: Estimate, decode: Decode) -> dict[str, Any]:
    """An episode with its advantage. Each turn has ``tokens``, the open one of an unfinished episode too: see ``_run``.

    ``decode`` gives the text of token ids.
    """
    turns: list[dict[str, Any]] = [
        {
            "reasoning": turn.reasoning,
            "content": turn.content,
            "calls": [
                {
                    "name": r.call.name,
                    "arguments": r.call.arguments,
                    "result": r.content,
                    "error": r.error,
                    "seconds": round(r.seconds, 3),
                }
                for r in turn.results
            ],
        }
        for turn in episode.turns
    ]
    runs = _runs(episode, estimate, decode)
    turns += [{"reasoning": "", "content": "", "calls": [], "open": True} for _ in runs[len(turns) :]]
    for turn, tokens in zip(turns, runs, strict=False):  # one that found the context full wrote nothing
        turn["tokens"] = tokens
    prompt = decode(_prompt(episode.sequences[0])) if episode.sequences else ""
    return {
        "prompt_id": episode.prompt_id,
        "sample": episode.sample,
        "difficulty": episode.difficulty,
        "success": episode.success,
        "rewards": episode.rewards,
        "advantage": next((float(values[0]) for values in estimate.advantages if len(values)), 0.0),
        "status": str(episode.status),
        "tokens": episode.own_tokens,
        "prompt": prompt if len(prompt) <= MOST_PROMPT else prompt[:MOST_PROMPT] + " …",
        "turns": turns,
    }


def add_scores(record: dict[str, Any], episode: Episode, scores: dict[bytes, np.ndarray]) -> None:
    """Add ``difference``, trainer − engine, of the log-probs where ``scores`` knows a sequence: see ``scored``."""
    own = [
        scores.get(_key(sequence), np.full(len(_trained_ids(sequence)), np.nan))[_own_places(sequence)]
        - [x for x, mine in zip(sequence.behaviour_logprobs, sequence.own_mask, strict=True) if mine]
        for sequence in episode.sequences
    ]
    values = np.concatenate([np.zeros(0), *own])
    if np.isnan(values).all():
        return
    kept, at = _kept(len(values)), 0
    known = values[kept]
    for tokens in (turn["tokens"] for turn in record["turns"] if "tokens" in turn):
        part, at = known[at : at + len(tokens["text"])], at + len(tokens["text"])
        tokens["difference"] = [None if np.isnan(value) else float(f"{value:.2g}") for value in part]


def scored(micro_batches: Sequence[MicroBatch], logprobs: Sequence[Any]) -> dict[bytes, np.ndarray]:
    """The trainer's log-probs by sequence: one entry per token, NaN where it got no loss.

    ``logprobs`` are flat, as ``batch.own`` gives them. Equal sequences have equal log-probs, so that the tokens
    themselves are the key.
    """
    found: dict[bytes, np.ndarray] = {}
    for batch, values in zip(micro_batches, logprobs, strict=True):
        masks, own = unpack(batch, batch.policy_mask), unpack(batch, values.float())
        for index, ids in unpack(batch, batch.input_ids).items():
            full = np.full(len(ids), np.nan)
            if index in own:
                full[np.flatnonzero(masks[index]) + 1] = own[index]  # a position holds what belongs to the next token
            found[ids.tobytes()] = full
    return found


def _runs(episode: Episode, estimate: Estimate, decode: Decode) -> list[dict[str, Any]]:
    """Of each unbroken run of own tokens, which is one turn: ``text``, ``advantage``, ``engine`` (log-probs).

    ``version`` is that of the policy that wrote a token; it and ``advantage`` are one number where all are equal.
    ``gap`` is the place and number of tokens that were left out.
    """
    kept, runs, at = _kept(episode.own_tokens), [], 0
    for sequence, advantages in zip(episode.sequences, estimate.advantages, strict=True):
        own = np.flatnonzero(sequence.own_mask)
        for part in np.split(np.arange(len(own)), np.flatnonzero(np.diff(own) > 1) + 1):
            if not len(part):
                continue
            chosen = part[kept[at : at + len(part)]]
            run: dict[str, Any] = {
                "text": [decode([sequence.token_ids[i]]) for i in own[chosen]],
                "advantage": _compact([round(float(value), 4) for value in advantages[chosen]]),
                "engine": [round(sequence.behaviour_logprobs[i] or 0.0, 4) for i in own[chosen]],
                "version": _compact([sequence.versions[i] for i in own[chosen]]),
            }
            if len(chosen) < len(part):
                first_missing = int(np.flatnonzero(~kept[at : at + len(part)])[0])
                run["gap"] = [first_missing, len(part) - len(chosen)]
            runs.append(run)
            at += len(part)
    return runs


def _kept(tokens: int) -> np.ndarray:
    """Which of an episode's own tokens are recorded."""
    places = np.arange(tokens)
    return (places < MOST_TOKENS // 2) | (places >= tokens - MOST_TOKENS // 2)


def _compact(values: list[float]) -> float | list[float]:
    return values[0] if len(set(values)) == 1 else values


def _prompt(sequence: EpisodeSequence) -> list[int]:
    """As it is trained on."""
    sampled = sequence.token_ids[: sequence.prompt_length]
    return sampled if sequence.train_prompt_ids is None else sequence.train_prompt_ids


def _trained_ids(sequence: EpisodeSequence) -> list[int]:
    return _prompt(sequence) + sequence.token_ids[sequence.prompt_length :]


def _own_places(sequence: EpisodeSequence) -> np.ndarray:
    """Of its own tokens, among those of ``_trained_ids``."""
    return np.flatnonzero(sequence.own_mask[sequence.prompt_length :]) + len(_prompt(sequence))


def _key(sequence: EpisodeSequence) -> bytes:
    return np.array(_trained_ids(sequence), dtype=np.int64).tobytes()
